"""Every command that the pages and runs/ show for real models: with the built-in model put in and small limits it runs, or names
the flag that a real model needs."""
import json
import os
import re
import shlex
import subprocess

import pytest
from conftest import ENVIRONMENT, ROOT, recorded

import catts
import data
import eval
import train_cdrl
from utils import tables
from utils.cli import TINY, InputError

PAGES = ("README.md", "runs/README.md", "runs/paper_table.md")
TRAININGS = sorted(path.name for path in (ROOT / "runs").glob("*.sh") if "train_cdrl.py" in path.read_text())
MODEL, CLIP = ["--model", str(TINY / "base")], ["--clip", str(TINY / "clip")]
SMALL = ["--group_size", "2", "--batch_size", "2", "--scale_questions", "2", "--max_new_tokens", "16", "--steps", "1"]


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """A file with two questions."""
    folder = tmp_path_factory.mktemp("questions")
    rows = []
    for i in range(2):
        sample = data.synthetic("val", 3, i)
        sample.images[0].save(folder / f"{i}.png")
        rows.append({"id": f"q{i}", "image": f"{i}.png", "question": sample.question, "answer": sample.answer})
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "train.jsonl"


def of_pages(program):
    """The commands of a program in the pages -> list of their words behind its name."""
    text = "\n".join((ROOT / page).read_text() for page in PAGES).replace("\\\n", " ")
    return [shlex.split(words) for words in re.findall(rf"^(?:\| `)?(?:[^#`\n]*\s)?{program} ([^#`\n|]+)", text, re.MULTILINE)]


def replaced(words, **flags):
    """The words with the flags' values put in; None: the flag is left out."""
    words = list(words)
    for flag, value in flags.items():
        if f"--{flag}" in words:
            position = words.index(f"--{flag}")
            words[position:position + 2] = [] if value is None else [f"--{flag}", str(value)]
    return words


@pytest.mark.parametrize("script", TRAININGS)
def test_the_training_scripts(script, questions, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (command,) = recorded(tmp_path, lambda **changed: subprocess.run(
        ["bash", ROOT / "runs" / script, questions], check=True,
        env=ENVIRONMENT | {"NODES": "2", "HEAD": "localhost:1"} | changed))
    words = [*command[command.index("train_cdrl.py") + 1:], *MODEL, "--output", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stop:
        train_cdrl.main([*words, "--dry_run"])
    assert stop.value.code == 2 and "--clip" in capsys.readouterr().err      # the real one's, which is not here
    train_cdrl.main([*words, *CLIP, "--dry_run"])
    assert "parameters" in capsys.readouterr().out
    if script == "one_80gb_gpu.sh":
        train_cdrl.main([*words, *CLIP, *SMALL])
        assert (tmp_path / "run" / "model.safetensors").exists()


def test_the_training_command_of_the_page(questions, tmp_path, capsys, monkeypatch):
    """And the line "next:" that it prints, as it is printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tables, "ROUNDS", 20)
    words = next(words for words in of_pages("train_cdrl.py") if "--clip" in words)
    words = replaced(words, data=questions, output=tmp_path / "run")
    train_cdrl.main([*words, *MODEL, *CLIP, *SMALL])
    program, *words = shlex.split(re.search(r"^next: python (.*)", capsys.readouterr().out, re.MULTILINE)[1])
    assert program == "eval.py"
    eval.main(words)
    assert (tmp_path / "runs/eval/report.html").exists()
    assert "run" in (printed := capsys.readouterr().out) and "next: python catts.py" in printed


@pytest.mark.parametrize("words", of_pages("eval.py"), ids=" ".join)
def test_the_evaluations_of_the_pages(words, questions, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tables, "ROUNDS", 20)
    words = replaced(words, model=TINY / "base", data=questions, max_new_tokens=16, baseline=None)
    words += ["--limit", "2", "--samples", "2", "--probe_samples", "1", "--t", "999"]
    if "--clip" in words:
        with pytest.raises(InputError, match="--clip"):
            eval.main(words)
    eval.main(replaced(words, clip=TINY / "clip"))
    printed = capsys.readouterr().out
    assert "hours" in printed if "--dry_run" in words else "next:" in printed


@pytest.mark.parametrize("words", of_pages("catts.py"), ids=" ".join)
def test_the_questions_of_the_pages(words, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    picture = [str(TINY / "example.png"), "How many red crosses are there?"]
    words = replaced([*picture, *words[2:]], model=TINY / "base", model_name=None, expert_model=None, expert="self",
                     max_new_tokens=16)
    catts.run([*words, "--samples", "2"])
    assert "answer:" in capsys.readouterr().out


def test_there_are_commands_to_run():
    assert len(TRAININGS) >= 6 and len(of_pages("eval.py")) >= 3 and len(of_pages("catts.py")) >= 2
    assert os.environ["HF_HUB_OFFLINE"] == "1"          # a hub id is refused here, not fetched
