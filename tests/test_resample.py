"""--resample: tied groups give way to others, the rest stays, and it is a pure function of the step."""
import json
from dataclasses import replace

import pytest
import torch

import data
import train_cdrl
from utils.distributed import QuestionOrder, replace_tied
from utils.judge import is_correct

ARGS = replace(train_cdrl.parse(["--recipe", "grpo"]), group_size=3, max_new_tokens=48)


def roll_out(base, samples, name):
    views = train_cdrl.roll_out(base, *train_cdrl.prepare_step(base, None, samples, name, ARGS), name, ARGS)
    train_cdrl.add_rewards(views, None, ARGS)
    return views


@pytest.mark.parametrize("attempts", [0, 1, 3])
def test_tied_groups_give_way_and_the_rest_stays(base, attempts):
    order = QuestionOrder(data.load("synthetic", "train", None, 0), 8, 0)
    samples = order.samples(0)
    original, = roll_out(base, samples, 0)
    tied = original.is_tied
    assert 0 < tied.sum() < 8
    made = [replace_tied(samples, [original], order, 0, lambda s, name: roll_out(base, s, name), attempts)
            for _ in range(2)]
    (mine, (after,), count), again = made[0], made[1]
    assert count == int(tied.sum()) - int(after.is_tied.sum()) and (count > 0) == (attempts > 0)
    assert [s.id for s in mine] == [s.id for s in again[0]] and torch.equal(after.confidence, again[1][0].confidence)
    assert len(mine) == len(after.rollouts) == len(after.confidence) == 8
    for q in (~tied).nonzero()[:, 0].tolist():
        assert mine[q].id == samples[q].id and after.rollouts[q] == original.rollouts[q]
        assert after.rewards["outcome"][q].tolist() == original.rewards["outcome"][q].tolist()
    for q, sample in enumerate(mine):           # question, prompt and rollouts belong together
        assert after.prompts[q] == data.prompt(sample)
        assert after.correct[q].tolist() == [float(is_correct(r.text, sample)) for r in after.rollouts[q]]


def test_a_run_counts_what_it_replaced(tmp_path):
    flags = ["--recipe", "grpo", "--steps", "2", "--batch_size", "4", "--group_size", "3", "--max_new_tokens", "48",
             "--eval_size", "0", "--scale_questions", "4"]
    rows = {}
    for resample in ("0", "2"):
        folder = tmp_path / resample
        train_cdrl.train(train_cdrl.parse([*flags, "--resample", resample, "--output", str(folder)]))
        rows[resample] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all("resampled" not in row for row in rows["0"]) and sum(row["resampled"] for row in rows["2"]) > 0
    first = [rows[resample][0]["original/zero_variance"] for resample in ("0", "2")]
    assert first[1] == first[0] - rows["2"][0]["resampled"] / 4
