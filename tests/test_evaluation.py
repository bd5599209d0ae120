"""What a user types for a real model: nothing of the built-in world comes in silently, and costs are known before."""
import csv
import json
import math
import re
import shlex
import time
import types

import numpy as np
import pytest
from conftest import ROOT

import catts
import data
import eval
import train_cdrl
from noise import MODES, parse_t
from utils import answering, cost, evaluation, findings, judge, model_defaults, results_file, tables
from utils.cli import TINY, InputError

QWEN = "Qwen/Qwen2.5-VL-7B-Instruct"
GIVEN = {"--clip": "openai/clip-vit-large-patch14-336", "--expert": "self", "--max_new_tokens": "1024"}


def parsed(*argv):
    return evaluation.parse([*argv, "--dry_run"], catts.Settings, MODES, eval.PROBE_STEPS, parse_t)


# ---- No silent toy

def test_the_built_in_models_get_what_belongs_to_them():
    args, settings = parsed()
    assert (args.clip, args.expert, settings.max_new_tokens) == (str(TINY / "clip"), str(TINY / "expert"), 64)
    assert model_defaults.is_built_in(TINY / "expert") and not model_defaults.is_built_in(QWEN)


def test_a_model_trained_from_the_built_in_one_counts_as_built_in(tmp_path):
    (tmp_path / "config.json").write_text((TINY / "base" / "config.json").read_text())
    assert model_defaults.is_built_in(tmp_path)
    other = json.loads((tmp_path / "config.json").read_text())
    other["text_config"]["vocab_size"] = 152_000
    (tmp_path / "config.json").write_text(json.dumps(other))
    assert not model_defaults.is_built_in(tmp_path)


@pytest.mark.parametrize("left_out", GIVEN)
def test_a_real_model_is_asked_what_goes_with_it(left_out):
    words = [word for flag, value in GIVEN.items() if flag != left_out for word in (flag, value)]
    for command in (parsed, lambda *argv: catts.run(["--data", "no.jsonl", *argv])):
        with pytest.raises(InputError, match=f"is no built-in model.*{left_out} {GIVEN[left_out][:5]}") as refusal:
            command("--model", QWEN, *words)
        assert all(flag not in str(refusal.value) for flag in GIVEN if flag != left_out)
    args, _ = parsed("--model", QWEN, *words, left_out, GIVEN[left_out])
    assert vars(args)[left_out[2:]] == type(vars(args)[left_out[2:]])(GIVEN[left_out])


def test_no_clip_and_no_expert_are_chosen_openly():
    args, settings = parsed("--model", QWEN, "--max_new_tokens", "9", "--region", "all", "--expert", "none")
    assert args.clip is None and args.regions == ["all"] and settings.modules == "self_check"
    assert "expert" not in args.methods
    args, settings = parsed("--model", QWEN, "--max_new_tokens", "9", "--only", "probe", "--clip", "x")
    assert settings.modules == "" and args.parts == ["probe"] and args.probe_samples == 4


def test_the_default_for_a_file_is_what_a_person_would_choose():
    args, _ = parsed("--data", "MMStar.tsv")
    assert (args.sizes, args.drawn, args.regions, args.t, args.probe_samples) == ([8], 8, ["key"], [0, 999], 1)
    args, _ = parsed()
    assert (args.sizes, args.drawn, args.probe_samples) == ([1, 2, 4, 8, 16, 32], 32, 4)


@pytest.mark.parametrize("model, flags, with_file", [
    (str(TINY / "base"), [], False), (str(TINY / "base"), ["--max_new_tokens", "40"], True),
    (QWEN, ["--clip", GIVEN["--clip"], "--max_new_tokens", "1024", "--data", "train.jsonl"], True)])
def test_the_next_line_of_a_training_run_parses_as_printed(model, flags, with_file, tmp_path):
    """It repeats --data, --clip and --max_new_tokens, and nothing is asked for any more."""
    training = train_cdrl.parse(["--model", model, *flags])
    if with_file:
        (tmp_path / "heldout.jsonl").write_text("")
    if model != QWEN:
        (tmp_path / "config.json").write_text((TINY / "base" / "config.json").read_text())
    words = shlex.split(model_defaults.next_evaluation(tmp_path, training))
    assert words[:2] == ["python", "eval.py"]
    args, settings = parsed(*words[2:])
    assert (args.clip, settings.max_new_tokens) == (str(training.clip), training.max_new_tokens)
    assert args.data == (str(tmp_path / "heldout.jsonl") if with_file else None)
    assert args.expert == ("self" if model == QWEN else str(TINY / "expert"))


PAGES = ("README.md", "runs/README.md", "runs/paper_table.md")


def commands():
    """Commands of eval.py in the pages and scripts, a placeholder for each variable."""
    text = "\n".join((ROOT / page).read_text() for page in PAGES).replace("\\\n", " ")
    found = re.findall(r"^(?:\| `)?python eval\.py ([^#`\n|]+)", text, re.MULTILINE)
    return sorted({command.strip() for command in found})


@pytest.mark.parametrize("command", commands())
def test_commands_of_the_pages_parse_for_their_models_and_for_the_built_in_ones(command):
    words = shlex.split(command)
    parsed(*words)
    position = words.index("--model") + 1
    args, _ = parsed(*[word for i, word in enumerate(words) if i != position and word != "--model"], "--model", "tiny/base")
    assert args.model == "tiny/base"


def test_there_are_commands_to_check():
    assert len(commands()) >= 3


# ---- Settings that are stored

def test_what_shapes_a_part_alone_is_compared(tmp_path):
    def stored(part, *argv):
        args, _ = parsed(*argv)
        return evaluation.stored_settings(args, part, args.model)[0]
    base = stored("votes"), stored("probe")
    assert base == (stored("votes", "--t", "500", "--regions", "key"), stored("probe", "--samples", "4", "--expert", "self"))
    assert base[0] != stored("votes", "--samples", "4") and base[1] != stored("probe", "--t", "500")
    assert base[1] == stored("probe", "--only", "probe")           # the probe alone, then everything: the same file
    for flag in ("--prompt", "bare"), ("--split", "dev"):
        assert base[0] != stored("votes", *flag) and base[1] != stored("probe", *flag)


def test_presets_are_defaults_that_flags_override():
    args, settings = parsed("--preset", "deepconf", "--samples", "4")
    assert (settings.reading, settings.top_share, settings.samples, settings.modules) == ("bottom", 0.9, 4, "")
    assert parsed("--preset", "paper")[1] == parsed()[1]
    assert {*answering.PRESETS["paper"], *answering.PRESETS["deepconf"]} <= {*vars(settings)}


def test_math_verify_is_off_unless_asked_for_and_is_stored(monkeypatch):
    import sys
    args, _ = parsed()
    assert args.math_verify is None and judge.MATH_VERIFY is None
    assert evaluation.stored_settings(args, "votes", args.model)[0]["math_verify"] is None
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(InputError, match="--math_verify.*pip install"):
        parsed("--math_verify")
    assert judge.MATH_VERIFY is None


# ---- Prompts

def worded(style, where="MathVista_MINI.tsv, line 2", **fields):
    return data.prompt(data.Sample("q", [], "How many?", "3", source="x", where=where, wording=style, **fields))


def test_wordings():
    choices = {"choices": ["one", "two"]}
    assert worded("bare") == "How many?" and worded("bare", **choices) == "How many?\n(A) one\n(B) two"
    assert worded("project") == "How many?\nThink step by step, then put the answer in \\boxed{}."
    hint = worded("official", meta={"answer_type": "float", "precision": "1"})
    assert hint.startswith("Hint: ") and "one decimal place" in hint and hint.endswith("Question: How many?")
    assert worded("official", **choices).endswith("Question: How many?\nChoices:\n(A) one\n(B) two")
    assert worded("official", "a/MathVision.tsv, line 3").startswith("Please solve the problem step by step")
    assert worded("official", "MMStar.tsv, line 3", **choices).endswith("select the correct answer from the options above.")
    assert worded("official", "MMMU_DEV_VAL.tsv, line 3").endswith("a single word or phrase.")
    with pytest.raises(InputError, match="--prompt official.*MMStar"):
        worded("official", "mathvista/mine.jsonl, line 3")         # the folder's name does not count


# ---- Costs

def test_costs_count_every_generation():
    args, _ = parsed("--data", "x.tsv", "--samples", "8", "--corruptions", "fog", "blur")
    parts = cost.eval_parts(args, list(data.MODULES))
    rows = cost.table(parts, 100, cost.Speed(length=50, rate=1000), max_new_tokens=64, expert_tokens=256)
    assert rows["samples"]["generations"] == 800 and rows["probe"]["generations"] == 200
    assert rows["corruptions"]["generations"] == 100 * (1 + 2 * 5 * 2)
    assert rows["self_check"]["hours"] == pytest.approx(2 * 100 * 50 / 1000 / 3600)     # contrast: two views
    assert rows["all"]["Expert calls"] == 300 and rows["all"]["Expert tokens, at most"] == 300 * 256
    assert rows["all"]["tokens"] == 50 * rows["all"]["generations"] == sum(r["tokens"] for n, r in rows.items() if n != "all")
    slow = cost.table(parts, 100, cost.Speed(50, 1000, prompt=3.6), 64, 256, local_expert=True)
    seconds = {name: 3600 * (slow[name]["hours"] - rows[name]["hours"]) for name in rows}
    assert seconds["samples"] == pytest.approx(100 * 3.6)               # a question's samples share its prompt
    assert seconds["self_check"] == pytest.approx(100 * 2 * 3.6)        # both pictures
    assert seconds["probe"] == pytest.approx(100 * (2 + 3) * 3.6)       # clean, noised; and the states on three
    assert seconds["self_consistency"] == pytest.approx(100 * (3.6 + .256))     # the Voter alone
    lean, _ = parsed("--data", "x.tsv", "--no-probe", "--methods", "modules")
    assert {*cost.eval_parts(lean, list(data.MODULES))} == {"samples", *data.MODULES}


def test_batches_are_bounded_by_tokens():
    assert cost.bounded_batch(None, 32, 64) == 50 and cost.bounded_batch(None, 8, 1024) == 16
    assert cost.bounded_batch(None, 64, 32_000) == 1 and cost.bounded_batch(7, 64, 32_000) == 7


def test_the_rate_is_measured_without_the_first_question():
    rollouts = [[types.SimpleNamespace(tokens=[0] * length, finished=length < 6) for length in (4, 6)]] * 3
    drawn = []

    def draw(count, **length):
        drawn.append((count, length))
        time.sleep(.02)                                            # the prompts
        time.sleep(0 if length else .03)                           # 30 tokens
        return rollouts[:count]
    speed = cost.measure(draw, 3)
    assert drawn == [(1, {}), (None, {"max_new_tokens": 1}), (None, {})] and speed.length == 5 and speed.cut == 0.5
    assert .02 / 3 <= speed.prompt and 30 / speed.rate < 2 * .03 + .02


def test_the_progress_bar_moves_within_a_batch_and_ends_at_its_total():
    with results_file.Progress(total=12, disable=False, smoothing=0, leave=False) as bar:
        bar.skip(4)
        assert bar.n == bar.initial == 4                            # answered earlier: not this run's speed
        results_file.advance(1.5)
        results_file.advance(1.5)
        assert bar.n == 7
        bar.finish(4)
        assert bar.n == 8 and bar.begun == 0
        bar.finish(4)
        assert bar.n == 12
    with results_file.Progress(total=0.3, disable=False, smoothing=0, leave=False) as bar:
        for _ in range(3):
            results_file.advance(0.1)                               # 0.1 + 0.1 + 0.1 > 0.3
        bar.finish(0.3)
        assert bar.n == 0.3
    results_file.advance(1.0)                                       # without a bar: nothing


def test_results_open_in_a_spreadsheet(tmp_path):
    """A line an answer, read back; texts that start like a formula are no formula."""
    rows = [{"id": name, "images": ["a, b.png"], "gold": gold, "choices": None, "meta": {"level": "hard"}}
            for name, gold in (("=1+1", "-3"), ('q "2"\nélan', "@x"))]
    outcomes = [tables.Outcome(row["id"], confidence, True, 5) for row in rows for confidence in (.25, math.nan)]
    evaluation.write_results(tmp_path / "results.jsonl", rows, {"pass@1": outcomes, "greedy": outcomes[:1]}, {"model": "m"})
    assert (tmp_path / "results.csv").read_bytes().startswith(b"\xef\xbb\xbfid,images,gold,model,level,type,method,confidence,")
    with open(tmp_path / "results.csv", encoding="utf-8-sig", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["method"] for line in lines] == ["pass@1", "pass@1", "greedy", "pass@1", "pass@1"]
    assert (lines[0]["id"], lines[0]["gold"], lines[0]["images"], lines[0]["confidence"]) == ("'=1+1", "-3", "a, b.png", "0.25")
    assert (lines[3]["id"], lines[3]["gold"], lines[4]["confidence"]) == (rows[1]["id"], "'@x", "")
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2


def test_errors_among_the_answered_stand_beside_what_was_left_open():
    ledger = dict.fromkeys(("tokens", "forward_passes", "expert_calls", "expert_tokens", "seconds"), 1)
    rows = [{"correct": correct, "confidence": .5, "abstained": abstained, "ledger": ledger}
            for correct, abstained in ((True, False), (False, False), (False, True), (None, False))]
    mean = results_file.average(rows)
    assert mean["abstained"] == .25 and mean["errors, answered"] == .5 and mean["accuracy"] == pytest.approx(1 / 3)
    assert "errors, answered" not in results_file.average(rows[:2])
    assert math.isnan(results_file.average(rows[2:3])["errors, answered"])


# ---- Findings in words

def view(confidence, right, n=40):
    correct = np.arange(n) < right * n
    return {"id": np.array([f"q{i}" for i in range(n)]), "correct": correct, "probability": np.full(n, confidence),
            "confidence": np.full(n, 12.0)}


@pytest.mark.parametrize("clean, noised, words", [
    ((.96, .55), (.92, .275), ["it says .96 and is right on .55: overconfident by 41 points", "right on .28 and says .92",
                               "it does not know that it cannot see"]),
    ((.80, .80), (.30, .25), ["about as sure as it is right", "it knows that it cannot see"]),
    ((.50, .90), (.45, .40), ["underconfident by 40 points", "it knows"]),
    ((.90, .50), (.60, .30), ["it half knows"]), ((.90, .50), (.90, .50), ["says nothing about seeing"])])
def test_findings_follow_the_figures(clean, noised, words):
    text = findings.finding(view(*clean), view(*noised))
    assert all(word in text for word in words), text
    assert ";" not in findings.finding(view(*clean))


def test_few_questions_tell_little():
    assert "5 questions cannot tell from 0" in findings.finding(view(.9, .6, 5))


def test_a_missed_and_an_unreachable_target_are_said_in_words():
    def outcomes(confidence, right):
        return [tables.Outcome(f"q{i}", c, r, 1) for i, (c, r) in enumerate(zip(confidence, right))]
    never = tables.abstention(outcomes([.9] * 40, [False] * 40), 0.1)
    assert "no threshold keeps the errors" in findings.abstention_finding(never, "m") and never["answered"] == 0
    half = tables.metrics.first_half([f"q{i}" for i in range(40)])
    missed = tables.abstention(outcomes([.9] * 40, half), 0.1)
    text = findings.abstention_finding(missed, "m")
    assert "MISSED" in text and f"wrong on {missed['errors']} of these {missed['answered']}" in text
    assert missed["errors"] == missed["answered"] == (~half).sum()
    met = findings.abstention_finding(tables.abstention(outcomes([.9] * 40, [True] * 40), 0.1), "m")
    assert "as aimed at" in met and "answers 100%" in met


def test_answers_that_were_cut_off_are_warned_of():
    assert not findings.cut_off_finding("m", 0.05, 64) and "6% of the answers were cut off" in findings.cut_off_finding("m", .06, 64)
