"""The paper's table, end to end on the built-in models with files in the benchmarks' layouts, and by hand."""
import base64
import contextlib
import csv
import io
import json
import os
import subprocess
import sys

import pytest
from conftest import ENVIRONMENT, ROOT, ahead, recorded

import data
import eval
from utils import evaluation, paper_table, tables
from utils.cli import InputError


def picture(sample):
    buffer = io.BytesIO()
    sample.images[0].save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


LAYOUTS = {
    "MathVista_MINI": lambda i: {"task": ("geometry problem solving", "figure question answering")[i % 2],
                                 "answer_type": ("integer", "text")[i % 2], "question_type": "free_form"},
    "MathVision": lambda i: {"category": ("counting", "algebra")[i % 2], "level": i % 2 + 1},
    "MMStar": lambda i: {"category": ("math", "logical reasoning")[i % 2], "l2_category": ("geometry", "counting")[i % 2],
                         "A": "1", "B": "2", "C": "3", "D": ("4", "nan")[i % 2], "answer": "ABCD"[i]},
    "MMMU_DEV_VAL": lambda i: {"category": ("Art", "Physics")[i % 2], "l2-category": "any",
                               "split": ("dev", "validation", "validation")[i % 3]}}


def write_benchmarks(folder, names=LAYOUTS, count=2):
    """Questions in layouts of VLMEvalKit; five of MMMU, two of which are of its dev split."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        rows = [{"index": i, "image": picture(sample), "question": sample.question, "answer": sample.answer, **LAYOUTS[name](i)}
                for i in range(5 if name == "MMMU_DEV_VAL" else count) for sample in [data.synthetic("val", 3, i)]]
        with open(folder / f"{name}.tsv", "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t")
            writer.writeheader()
            writer.writerows(rows)
    return folder


FLAGS = ["--samples", "2", "--max_new_tokens", "40", "--expert_tokens", "40", "--batch_size", "2"]


def script(folder, flags=FLAGS, **environment):
    """Run the script on a folder's files -> what it printed."""
    environment = ENVIRONMENT | {"MODEL": "tiny/base", "OUTPUT": str(folder / "paper"),
                                 "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"} | environment
    run = subprocess.run(["bash", str(ROOT / "runs" / "paper_table.sh"), str(folder / "files"), *flags],
                         env=environment, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stdout[-2000:] + run.stderr[-4000:])
    return run.stdout


@ahead
def two_ranks(folder):
    """MMMU alone, split over two ranks."""
    write_benchmarks(folder / "files", ["MMMU_DEV_VAL"])
    return folder, script(folder, RANKS="2")


@pytest.fixture(scope="session")
def paper_run(two_ranks):
    """All benchmarks with each row of the table: the script's own commands, in this process, in the same folder."""
    folder, _ = two_ranks
    write_benchmarks(folder / "files")
    votes = folder / "paper/MMMU_DEV_VAL/self/base/votes.jsonl"
    before, output = votes.read_bytes(), io.StringIO()
    commands = recorded(folder, lambda **changed: script(folder, TRAINED="tiny/expert", EXPERT="tiny/expert", **changed))
    assert len(commands) == 3 * len(LAYOUTS) + 1
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.chdir(ROOT)
        patch.setattr(tables, "ROUNDS", 20)
        for words in commands:
            eval.main(words[1:]) if words[0] == "eval.py" else paper_table.main(words[2:])
    assert votes.read_bytes() == before                     # answered by the two ranks: gone on with, not again
    return folder / "paper", output.getvalue()


def lines(folder):
    return [json.loads(line) for line in folder.read_text().splitlines()]


def test_the_script_makes_every_row_and_never_pools_dev_with_validation(paper_run):
    folder, printed = paper_run
    table = json.loads((folder / "table.json").read_text())
    assert [name for name in table if " by " not in name] == sorted(LAYOUTS)
    for benchmark in LAYOUTS:
        assert list(table[benchmark]) == [name for name, _, _ in paper_table.ROWS]
        families = next(names for key, names in paper_table.FAMILIES.items() if benchmark.lower().startswith(key))
        assert [f"{benchmark} by {family}" for family in families] == [name for name in table if name.startswith(f"{benchmark} by")]
    assert {f"MMMU_DEV_VAL by {family}" for family in ("discipline", "subject", "split")} <= {*table}
    assert list(next(iter(table["MMMU_DEV_VAL by split"].values()))) == ["validation (3)"]
    assert {row["subsets"]["split"] for row in lines(folder / "MMMU_DEV_VAL/self/base/results.jsonl")} == {"validation"}
    assert "| base, greedy | 3 |" in printed and (folder / "table.md").read_text() in printed


def test_a_table_by_subset_equals_one_by_hand(paper_run):
    folder, _ = paper_run
    table = json.loads((folder / "table.json").read_text())
    for benchmark, family in (("MMMU_DEV_VAL", "subject"), ("MMMU_DEV_VAL", "discipline"), ("MathVision", "level"),
                              ("MathVista_MINI", "answer_type"), ("MMStar", "l2-category")):
        rows = lines(folder / benchmark / "self/base/results.jsonl")
        for label, method in (("base, pass@1", "pass@1"), ("base, majority", "majority@2"),
                              ("CA-TTS, self as Expert", "CA-TTS@2")):
            for value in {row["subsets"][family] for row in rows}:
                inside = [row for row in rows if row["subsets"][family] == value]
                right = [answer["correct"] for row in inside for answer in row["methods"][method]]
                by_hand = sum(right) / len(right)
                assert table[f"{benchmark} by {family}"][label][f"{value} ({len(inside)})"] == pytest.approx(by_hand)
        every = [answer["correct"] for row in rows for answer in row["methods"]["pass@1"]]
        assert table[benchmark]["base, pass@1"]["accuracy"] == pytest.approx(sum(every) / len(every))
        assert table[benchmark]["base, pass@1"]["n"] == len(rows)


@pytest.mark.parametrize("benchmark, families", [
    ("MathVista_MINI", ["task", "answer_type"]), ("MathVision", ["subject", "level", "type"]), ("MMStar", ["l2-category"]),
    ("other", ["skill"])])
def test_each_benchmark_has_the_columns_of_its_own_tables(benchmark, families, tmp_path):
    folder = tmp_path / benchmark / "self" / "m"
    folder.mkdir(parents=True)
    with open(folder / "results.jsonl", "w") as file:
        for i in range(24):
            answer = {"confidence": .5, "correct": i % 3 == 0, "tokens": 9, "calls": 0, "cut": 0}
            subsets = {family: "ab"[i % 2] for family in (*families, "type")}
            file.write(json.dumps({"id": f"q{i}", "subsets": subsets, "methods": {"greedy": [answer]}}) + "\n")
    made = paper_table.benchmark_tables(tmp_path / benchmark)
    expected = [benchmark, *(f"{benchmark} by {family}" for family in dict.fromkeys([*families, *(
        ["type"] if benchmark == "other" else [])]))]
    assert list(made) == expected
    row = made[benchmark]["base, greedy"]
    assert row["n"] == 24 and row["accuracy"][0] == pytest.approx(1 / 3) and row["accuracy"][1] < 1 / 3 < row["accuracy"][2]
    assert made[expected[1]] == {"base, greedy": {"a (12)": 4 / 12, "b (12)": 4 / 12}}
    assert "33.3" in paper_table.markdown(made)


def test_results_name_their_pictures_and_methods(paper_run):
    folder, _ = paper_run
    for row in lines(folder / "MMMU_DEV_VAL/trained/expert/results.jsonl"):
        assert row["images"] == [f"{row['id']} #1"] and {"greedy", "pass@1", "CA-TTS@2"} <= {*row["methods"]}
        assert "expert alone" not in row["methods"]             # --methods leaves it out


@pytest.mark.parametrize("row, labels", [
    ({"id": "validation_Art_Theory_3", "meta": {}}, {"split": "validation", "subject": "Art_Theory",
                                                     "discipline": "Art & Design"}),
    ({"id": "7", "meta": {"category": "Physics", "l2-category": "x", "split": "dev"}},
     {"subject": "Physics", "discipline": "Science", "split": "dev"}),
    ({"id": "7", "meta": {"category": "counting", "level": "3"}}, {"subject": "counting", "level": "3"}),
    ({"id": "7", "meta": {"category": "math", "l2_category": "geometry"}},
     {"category": "math", "l2-category": "geometry"}),
    ({"id": "7", "meta": {"task": "VQA", "answer_type": "float"}}, {"task": "VQA", "answer_type": "float"})])
def test_the_subsets_of_each_benchmark(row, labels):
    assert tables.labels_of(row | {"choices": None}) == labels | {"type": "open"}
    assert tables.labels_of(row | {"choices": ["a", "b"]}) == labels | {"type": "multiple choice"}


def test_splits_are_chosen_and_refused(tmp_path, capsys):
    samples = data.load(write_benchmarks(tmp_path) / "MMMU_DEV_VAL.tsv")
    assert [s.meta["split"] for s in evaluation.of_split(samples, None)] == ["validation"] * 3
    assert "2 questions of split dev are left out" in capsys.readouterr().out
    assert [s.meta["split"] for s in evaluation.of_split(samples, "dev")] == ["dev"] * 2
    with pytest.raises(InputError, match="--split 'test'.*dev, validation"):
        evaluation.of_split(samples, "test")


def test_what_is_missing_is_named(tmp_path):
    for argv, words in (([], "give the folder"), ([str(tmp_path / "none")], "is no folder"), ([str(tmp_path)], "no benchmark")):
        with pytest.raises(InputError, match=words):
            paper_table.main(argv)
    (tmp_path / "MMStar").mkdir()
    with pytest.raises(InputError, match="holds no results"):
        paper_table.main([str(tmp_path)])
