"""Each patch in forks/ applies to this code, is as small as forks/README.md says, and trains."""
import json
import re
import shutil
import subprocess

import programs
import pytest
from conftest import ENVIRONMENT, ROOT, ahead

FORKS = {path.stem: path for path in sorted((ROOT / "forks").glob("*.patch"))}
SMALL = ("lowest_window", "blur", "wins", "hacked", "mixed_corruptions")
TWO_STEPS = ("--steps 2 --batch_size 4 --group_size 2 --eval_size 0 --scale_questions 4 --max_new_tokens 12 "
             "--output run").split()
# {name: "lines changed | flags"}
LISTED = dict(re.findall(r"^\| `(\w+)\.patch` \|.*\| (\d+ \|[^|]*)\|$",
                         (ROOT / "forks" / "README.md").read_text(), re.M))


def changed_lines(patch):
    return re.findall(r"^[+-](?![+-]{2} ).*$", patch, re.M)


@ahead
def forks(folder):
    """{fork: (process, its samples.jsonl)} of two training steps in a patched copy of the repository."""
    trained = {}
    for name, patch in FORKS.items():
        copy = folder / name
        shutil.copytree(ROOT / "utils", copy / "utils", ignore=shutil.ignore_patterns("__pycache__"))
        for path in ROOT.glob("*.py"):
            shutil.copy(path, copy)
        (copy / "tiny").symlink_to(ROOT / "tiny")
        applied = subprocess.run(["git", "apply", str(patch)], cwd=copy, capture_output=True, text=True,
                                 env={**ENVIRONMENT, "GIT_CEILING_DIRECTORIES": str(folder)})
        flags = re.findall(r"`(--[^`]*)`", LISTED.get(name, ""))
        process = applied if applied.returncode else programs.run(
            "train_cdrl.py", *TWO_STEPS, *" ".join(flags).split(), cwd=copy)
        log = copy / "run" / "samples.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        trained[name] = process, [json.loads(line) for line in lines]
    return trained


def test_each_fork_is_listed_with_its_size():
    assert {*LISTED} == {*FORKS}
    for name, path in FORKS.items():
        assert int(LISTED[name].split()[0]) == len(changed_lines(path.read_text())), name


@pytest.mark.parametrize("name", SMALL)
def test_a_small_fork_changes_under_twelve_lines_of_one_or_two_files(name):
    patch = FORKS[name].read_text()
    assert len(changed_lines(patch)) < 12 and 1 <= len(re.findall(r"^\+\+\+ ", patch, re.M)) <= 2


@pytest.mark.parametrize("name", FORKS)
def test_a_fork_trains_two_steps(name, forks):
    process, samples = forks[name]
    assert process.returncode == 0, process.stderr[-2000:]
    assert {line["step"] for line in samples} == {0, 1}


def test_a_fork_does_what_it_says(forks):
    logs = {name: lines for name, (_, lines) in forks.items()}
    first = {name: {(line["id"], line["view"], line["rollout"]): line for line in lines if line["step"] == 0}
             for name, lines in logs.items()}
    # wins: of two rewards one wins, or neither does. Its first rollouts are those of no fork.
    assert {line["advantage"] for line in logs["wins"]} <= {-1, 0, 1}
    # lowest_window: of the same answers, at most their mean, and lower somewhere.
    lowest = first["lowest_window"]
    for key, mean in first["wins"].items():
        assert lowest[key]["text"] == mean["text"]
        assert lowest[key]["confidence"] <= mean["confidence"] + 1e-5
    drops = [line["confidence"] - lowest[key]["confidence"] for key, line in first["wins"].items()]
    assert max(drops) > 0.1
    # blur: other answers on the noised view alone.
    changed = {key[1] for key, line in first["wins"].items() if first["blur"][key]["text"] != line["text"]}
    assert changed == {"noised"}
    # hacked: what is judged is the mean log-probability of the words.
    for line in logs["hacked"]:
        assert line["confidence"] == pytest.approx(line["logprob"], abs=1e-5)
