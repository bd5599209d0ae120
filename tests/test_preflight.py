"""Checks before training: what is held out, how long prompts are, what all ranks agree on, what cannot
learn."""
import json

import programs
import pytest
from conftest import ROOT
from PIL import Image
from test_models import FAMILIES, NEEDS_TORCHVISION, write

import data
from utils import distributed, held_out, preflight
from utils.cli import InputError
from vlm import VLM


def questions(folder, pictures, each):
    """`each` questions about each of so many pictures."""
    rows = []
    for p in range(pictures):
        Image.new("RGB", (40, 30), (p * 7 % 256, 30, 90)).save(folder / f"{p}.png")
        rows += [{"id": f"{p}-{q}", "question": f"How many? {q}", "image": f"{p}.png", "answer": "3"} for q in range(each)]
    return rows


def load(folder, rows):
    path = folder / "q.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return list(data.load(path, answered=True))


# ---- Held out by picture

@pytest.mark.parametrize("seed", range(5))
def test_no_picture_is_trained_on_and_held_out(tmp_path, seed):
    train, held = held_out.hold_out(load(tmp_path, questions(tmp_path, 12, 8)), 19, seed)
    assert len(train) + len(held) == 96 and len(held) == 16
    assert not {str(s.images[0]) for s in train} & {str(s.images[0]) for s in held}


def test_the_same_picture_under_other_names_is_one(tmp_path):
    rows = questions(tmp_path, 10, 1)
    for p in range(10):
        (tmp_path / f"copy{p}.png").write_bytes((tmp_path / f"{p}.png").read_bytes())
        rows.append({**rows[p], "id": f"copy{p}", "image": f"copy{p}.png"})
    train, held = held_out.hold_out(load(tmp_path, rows), 4, 0)
    assert {s.id.split("-")[0].removeprefix("copy") for s in held}.isdisjoint(
        s.id.split("-")[0].removeprefix("copy") for s in train)
    assert len(held) == 4


def test_an_id_column_groups_pictures_that_differ(tmp_path):
    """Two crops of one photo."""
    rows = [{**row, "image_id": i // 2} for i, row in enumerate(questions(tmp_path, 12, 1))]
    train, held = held_out.hold_out(load(tmp_path, rows), 5, 0)
    assert len(held) == 4 and {s.meta["image_id"] for s in held}.isdisjoint(s.meta["image_id"] for s in train)


def test_one_picture_for_all_cannot_be_held_out(tmp_path):
    with pytest.raises(InputError, match="the fewest by 20; raise --eval_size, or set it to 0"):
        held_out.hold_out(load(tmp_path, questions(tmp_path, 1, 20)), 4, 0)


def test_held_out_questions_come_back_from_their_file(tmp_path):
    rows = [*questions(tmp_path, 5, 1), {"id": "c", "question": "Which?", "image": "0.png", "choices": ["x", "y"],
                                         "answer": "y", "level": 2}]
    samples = load(tmp_path, rows)
    (tmp_path / "run").mkdir()
    held_out.write_held_out(samples, tmp_path / "run" / "heldout.jsonl")
    again = data.load(tmp_path / "run" / "heldout.jsonl", answered=True, allow_outside=True)
    for a, b in zip(samples, again, strict=True):
        assert (a.id, a.question, a.answer, a.choices, a.source, a.meta) == (b.id, b.question, b.answer, b.choices, b.source,
                                                                             b.meta)
        assert a.pictures() == b.pictures()


# ---- Lengths

@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in NEEDS_TORCHVISION], ids=lambda family: family.__name__)
def test_lengths_from_sizes_are_those_of_the_prompts(family, tmp_path):
    vlm = VLM.load(write(family, tmp_path), "cpu")
    lengths, encoded = preflight.PromptLengths(vlm), []
    exact = vlm.prompt_length
    vlm.prompt_length = lambda images, prompt: encoded.append(1) or exact(images, prompt)
    sizes = [[(64, 64)], [(120, 40)], [(40, 90)], [(90, 40)], [(200, 100)], [(100, 200)], [(300, 280)], [(33, 77)],
             [(64, 64), (120, 40)], [(40, 90), (90, 40)], [(200, 60), (33, 77)]]
    for chosen in sizes:
        for prompt in ("What is it?", "<image> is what, and how many of them can you see in the picture?"):
            prompt = prompt.replace("<image> is", "<image> and <image> are") if len(chosen) > 1 else prompt
            images = [Image.new("RGB", size, "red") for size in chosen]
            assert abs(lengths(chosen, prompt)[0] - exact(images, prompt)) <= preflight.MARGIN
    assert len(encoded) <= len(sizes)               # once for each list of sizes, fewer with arithmetic
    if family.__name__.startswith("qwen"):
        assert len(encoded) == 4


def test_every_row_is_checked_and_every_fault_named(tmp_path, base, capsys):
    rows = questions(tmp_path, 8, 1)
    samples = load(tmp_path, rows)
    (tmp_path / "2.png").unlink()
    (tmp_path / "5.png").write_bytes(b"no picture")
    Image.new("RGB", (900, 20)).save(tmp_path / "6.png")
    context = max(count for count, *_ in preflight.check_questions(
        preflight.PromptLengths(base), [samples[0]], data.prompt, 0, 10**6)) + 4
    with pytest.raises(InputError, match="3 questions cannot be used.* '2-0'"):
        preflight.check_questions(preflight.PromptLengths(base), samples, data.prompt, 0, context)
    printed = capsys.readouterr().err
    assert all(f"'{name}-0'" in printed for name in (2, 5, 6)) and "'3-0'" not in printed
    good = [s for s in samples if s.id not in ("2-0", "5-0", "6-0")]
    counts = preflight.check_questions(preflight.PromptLengths(base), good, data.prompt, 0, context)
    for tokens, pictures, sample in counts:
        assert abs(tokens - base.prompt_length(sample.pictures(), data.prompt(sample))) <= preflight.MARGIN
        assert 0 < pictures < tokens


# ---- Ranks

RANKS = """
import sys
import torch.distributed as dist
sys.path.insert(0, {root!r})
from utils import cli, distributed, preflight

def check():
    if dist.get_rank() == 1:
        raise cli.InputError("question 'q7' is broken; repair it")
    return "fine"

def main():
    distributed.start_ranks()
    distributed.agreed(check)
    open({moved!r}, "w")

cli.command("program", main)
"""


def test_a_refusal_of_one_rank_ends_all_with_its_sentence(tmp_path):
    moved, script = tmp_path / "moved", tmp_path / "program.py"
    script.write_text(RANKS.format(root=str(ROOT), moved=str(moved)))
    program = programs.Program(script, ranks=2)
    printed = program.wait().stderr
    assert [rank.exitcode for rank in program.ranks] == [2, 2] and not moved.exists()
    assert printed.count("program: question 'q7' is broken; repair it") == 2 and "Traceback" not in printed


def test_an_agreed_check_returns_what_it_found():
    assert distributed.agreed(lambda: 3) == 3


# ---- Training that cannot learn

def row(step, outcome=0.5, truncated=0.0, tied=0.2):
    return {"step": step, "original/outcome": outcome, "original/truncated": truncated, "original/zero_variance": tied}


@pytest.mark.parametrize("sign, words", [(dict(outcome=0.0), "no rollout was right.* gold answers"),
                                         (dict(truncated=1.0), "cut off.* --max_new_tokens"),
                                         (dict(tied=1.0), "equal.* --group_size")])
def test_hopeless_steps_warn_at_once_and_stop_after_some(sign, words):
    watch = preflight.HopelessTraining(4)
    assert watch(row(0)) is None
    assert "step 1" in watch(row(1, **sign)) and watch(row(2, **sign)) is None
    assert watch(row(3)) is None                    # a good step between: counted anew
    for step in range(4, 7):
        watch(row(step, **sign))
    with pytest.raises(InputError, match=f"{words}.*--patience 0"):
        watch(row(7, **sign))
    never = preflight.HopelessTraining(0)
    said = [never(row(step, **sign)) for step in range(1, 50)]
    assert said[0] and not any(said[1:])


def test_the_disk_that_a_run_needs(tmp_path):
    needed, free = preflight.disk_plan(tmp_path / "not" / "there", 10, 4, 2, keep=2)
    assert needed == 3 * (20 + 40 + 32) + 20 and free > 0
