"""How a training starts on people's rows: refused as a whole, held out by picture, gone on with from a
checkpoint."""
import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ENVIRONMENT, ROOT
from test_preflight import questions

import data
import train_cdrl
from utils.cli import InputError
from vlm import VLM

SMALL = ["--batch_size", "4", "--group_size", "2", "--scale_questions", "4", "--max_new_tokens", "4", "--save_every", "2"]


@pytest.fixture
def rows(tmp_path):
    """A data file of 10 pictures with 2 questions each."""
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(map(json.dumps, questions(tmp_path, 10, 2))))
    return path


def train(*argv):
    torch.manual_seed(0)
    return train_cdrl.train(train_cdrl.parse([*SMALL, *map(str, argv)]))


def test_a_run_writes_what_it_held_out_and_eval_is_pointed_at_it(rows, tmp_path, capsys):
    train("--data", rows, "--output", tmp_path / "run", "--steps", 1, "--eval_size", 4)
    printed = capsys.readouterr()
    path = tmp_path / "run" / "heldout.jsonl"
    assert f"--data {path} --allow_outside" in printed.out
    held_out, trained = list(data.load(path, allow_outside=True, answered=True)), set()
    for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines():
        trained.add(json.loads(line)["id"].split("-")[0])
    assert len(held_out) == 4 and trained.isdisjoint(s.id.split("-")[0] for s in held_out)
    assert "every completion was cut off in step 0" in printed.err


def test_hopeless_training_ends_with_a_sentence(rows, tmp_path):
    with pytest.raises(InputError, match="in 2 steps in a row, up to step 1; .*--patience 0"):
        train("--data", rows, "--output", tmp_path / "run", "--steps", 4, "--eval_size", 0, "--patience", 2)
    assert (tmp_path / "run" / "checkpoint-2").is_dir()         # nothing that was computed is lost


def test_a_run_goes_on_with_another_lr_and_says_so(tmp_path, capsys):
    common = ["--output", tmp_path / "run", "--eval_size", 0, "--recipe", "grpo", "--patience", 0]
    with pytest.raises(InputError, match="holds no run to go on with"):
        train(*common, "--steps", 2, "--resume", "from")
    train(*common, "--steps", 2, "--lr", 1e-4)
    with pytest.raises(InputError, match="cannot change group_size; it may change steps, lr"):
        train(*common, "--steps", 4, "--group_size", 4, "--resume", "from")
    train(*common, "--steps", 4, "--lr", 1e-5, "--resume", "from")
    assert "goes on from step 2 with steps 2 -> 4, lr 0.0001 -> 1e-05" in capsys.readouterr().out
    train(*common, "--steps", 4, "--lr", 1e-5)  # the same command again: nothing is moved aside
    settings = json.loads((tmp_path / "run" / "args.json").read_text())
    assert settings["history"] == [{"step": 2, "changes": {"steps": [2, 4], "lr": [1e-4, 1e-5]}}]
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [0, 1, 2, 3] and not (tmp_path / "run-1").exists()
    assert metrics[1]["lr"] > 5 * metrics[2]["lr"]


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_rows_without_a_picture_train_without_a_twin(rows, tmp_path):
    """Beside others: no perception term, and their noised answers earn and move nothing."""
    lines = rows.read_text().splitlines()[:4]
    lines[1:3] = [json.dumps({"id": f"words {i}", "question": "How many?", "answer": "3"}) for i in (1, 2)]
    rows.write_text("\n".join(lines))
    train("--data", rows, "--output", tmp_path / "run", "--steps", 1, "--eval_size", 0, "--controls", 0,
          "--noised_policy", 1)
    stored = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    bare = [row for row in stored if row["id"].startswith("words")]
    assert bare and all(row["control"] and row["perception"] == 0 for row in bare)
    assert all(row["calibration"] == row["advantage"] == 0 for row in bare if row["view"] == "noised")
    assert any(row["calibration"] for row in bare if row["view"] == "original")
    assert (tmp_path / "run" / "contact_sheet.png").exists()


def test_broken_and_overlong_rows_are_skipped_and_counted(rows, tmp_path, capsys):
    lines = rows.read_text().splitlines()
    lines[3] = json.dumps(json.loads(lines[3]) | {"image": "missing.png"})
    lines[6] = json.dumps(json.loads(lines[6]) | {"question": "word " * 3000})
    lines[9] = "{"
    (tmp_path / "5.png").write_bytes((tmp_path / "5.png").read_bytes()[:60])         # of two questions
    rows.write_text("\n".join(lines))
    with pytest.raises(InputError, match="has 4 broken rows"):
        train("--data", rows, "--output", tmp_path / "run", "--steps", 1, "--eval_size", 0)
    assert not (tmp_path / "run").exists()
    capsys.readouterr()
    train("--data", rows, "--output", tmp_path / "run", "--steps", 4, "--eval_size", 0, "--skip_broken")
    printed = capsys.readouterr().err
    assert "4 broken rows left out, 16 questions kept" in printed
    assert "1 broken or overlong questions left out, 15 train" in printed
    assert len(metrics(tmp_path / "run")) == 4 and all(0 <= row["seconds/pictures_share"] <= 1
                                                      for row in metrics(tmp_path / "run"))


def test_a_stop_token_that_generation_config_leaves_out_still_stops(base, tmp_path):
    """The built-in template ends turns with <|im_end|>; the copy's generation_config names the pad token instead."""
    shutil.copytree(ROOT / "tiny" / "base", tmp_path / "m")
    path = tmp_path / "m" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 0}))
    vlm, s = VLM.load(tmp_path / "m", "cpu"), data.synthetic("val", 0, 0)
    end = base.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in vlm.eos.tolist() and not vlm.banned[end] and base.eos.tolist() == [end]
    (group,) = vlm.sample([s.pictures()], [data.prompt(s)], n=4, max_new_tokens=64, seed=0)
    assert all(r.finished for r in group)


def test_two_ranks_refuse_together_and_move_nothing(rows, tmp_path):
    """The broken picture is in the second rank's share; an earlier run with other settings stands in the
    folder."""
    train("--data", rows, "--output", tmp_path / "run", "--steps", 1, "--eval_size", 0)
    before = sorted(path.name for path in tmp_path.iterdir())
    (tmp_path / "0.png").write_bytes(b"no picture")
    lines = rows.read_text().splitlines()
    rows.write_text("\n".join([lines[1 + 1], lines[0]] + lines[3:]))  # the only row about it is the second
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           str(ROOT / "train_cdrl.py"), *SMALL, "--data", str(rows), "--output", str(tmp_path / "run"),
                           "--steps", "1", "--eval_size", "0", "--lr", "1e-5"], capture_output=True, text=True, cwd=ROOT,
                          env=ENVIRONMENT, timeout=200)
    sentences = [line for line in done.stderr.splitlines() if line.startswith("train_cdrl.py: ")]
    assert len(sentences) == 2 and all("question '0-0': image" in line for line in sentences)
    assert "exitcode  : 2" in done.stderr and sorted(path.name for path in tmp_path.iterdir()) == before
