"""The paper's table from stored results: accuracy by benchmark and by its subsets, ECE, AUROC.

    python -m utils.paper_table runs/paper         # FOLDER/BENCHMARK/RUN/MODEL/results.jsonl -> table.md

`runs/paper_table.sh` makes the runs: self (the base with itself as Expert), server (with a server as Expert),
trained (after CDRL). Every figure follows from the lines of results.jsonl alone.
"""
import sys
from pathlib import Path

from utils import cli
from utils.cli import InputError
from utils.metrics import MIN_QUESTIONS, mean_interval
from utils.tables import SUBSETS, Outcome, arrays, statistics

# (row, run, method as eval.py names it, without @N)
ROWS = (("base, greedy", "self", "greedy"), ("base, pass@1", "self", "pass@1"),
        ("base, majority", "self", "majority"), ("base, DeepConf weighted", "self", "weighted"),
        ("base, DeepConf filtered", "self", "filtered"), ("CA-TTS, self as Expert", "self", "CA-TTS"),
        ("CA-TTS, server as Expert", "server", "CA-TTS"),
        ("after CDRL, greedy", "trained", "greedy"), ("after CDRL, pass@1", "trained", "pass@1"),
        ("after CDRL, majority", "trained", "majority"), ("after CDRL, CA-TTS", "trained", "CA-TTS"))
# What each benchmark's own tables are split by; other files by all that their rows name.
FAMILIES = {"mathvista": ("task", "answer_type"), "mathvision": ("subject", "level", "type"),
            "mmstar": ("l2-category", "category"), "mmmu": ("discipline", "subject", "split")}


def read_run(folder):
    """The lines of the one results.jsonl below a run's folder -> list of dicts; [] where there is none."""
    files = sorted(folder.glob("*/results.jsonl"))
    if len(files) > 1:
        raise InputError(f"{folder} holds results of {len(files)} models; one is expected, remove the others")
    try:
        return [cli.parse_json(line) for file in files for line in file.read_text().splitlines()]
    except ValueError as error:
        raise InputError(f"{files[0]} is damaged ({error}); the same run writes it again") from error


def outcomes_of(rows, method, label=None):
    """Lines of results.jsonl -> list of Outcome of a method, in one subset (what, value) or in all."""
    return [Outcome(row["id"], **dict(fields, confidence=_number(fields["confidence"])))
            for row in rows if label is None or row["subsets"].get(label[0]) == label[1]
            for name, results in row["methods"].items() if name.split("@")[0] == method.split("@")[0]
            and (name == "pass@1") == (method == "pass@1") for fields in results]


def _number(value):
    return float("nan") if value is None else value


def summary_row(outcomes):
    """n, accuracy with its interval, ECE, AUROC and the share that was cut off (dict) of list of Outcome."""
    ids, confidence, correct = arrays(outcomes)
    count, values = len(set(ids)), statistics(confidence, correct)
    accuracy = mean_interval(ids, correct) if count >= MIN_QUESTIONS else float(correct.mean())
    return {"n": count, "accuracy": accuracy, "ECE": values.get("ece", float("nan")),
            "AUROC": values.get("auroc", float("nan")), "cut": sum(o.cut for o in outcomes) / len(outcomes)}


def benchmark_tables(folder):
    """The tables of one benchmark -> {title: {row: {column: value}}}: all questions, then one a family of
    subsets with the accuracy in each. Raises InputError where no run has left results."""
    runs = {run: read_run(folder / run) for run in dict.fromkeys(run for _, run, _ in ROWS)}
    runs = {run: rows for run, rows in runs.items() if rows}
    if not runs:
        raise InputError(f"{folder} holds no results; runs/paper_table.sh makes them")
    methods = [(name, runs[run], method) for name, run, method in ROWS
               if run in runs and outcomes_of(runs[run], method)]
    tables = {folder.name: {name: summary_row(outcomes_of(rows, method)) for name, rows, method in methods}}
    rows = next(iter(runs.values()))
    known = next((names for key, names in FAMILIES.items() if folder.name.lower().startswith(key)), None)
    for family in known or (*SUBSETS, "type"):
        counts = {}
        for row in rows:
            if family in row["subsets"]:
                counts[row["subsets"][family]] = counts.get(row["subsets"][family], 0) + 1
        if counts and (known or len(counts) > 1):
            tables[f"{folder.name} by {family}"] = {name: {
                f"{value} ({counts[value]})": accuracy_in(lines, method, (family, value))
                for value in sorted(counts)} for name, lines, method in methods}
    return tables


def accuracy_in(rows, method, label):
    """The accuracy of a method in a subset (what, value), nan where none of its questions was answered."""
    outcomes = outcomes_of(rows, method, label)
    return sum(o.correct for o in outcomes) / len(outcomes) if outcomes else float("nan")


def markdown(tables):
    """{title: {row: {column: value}}} -> Markdown (str), accuracies in percent."""
    def shown(value, column):
        if isinstance(value, tuple):
            return f"{100 * value[0]:.1f} [{100 * value[1]:.1f}, {100 * value[2]:.1f}]"
        if column == "n":
            return str(value)
        if value != value:
            return "-"
        return f"{value:.3f}" if column in ("ECE", "AUROC", "cut") else f"{100 * value:.1f}"
    text = ""
    for title, rows in tables.items():
        columns = list(next(iter(rows.values())))
        lines = [["", *columns], ["---"] * (len(columns) + 1)]
        lines += [[name, *(shown(row[column], column) for column in columns)] for name, row in rows.items()]
        text += f"## {title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"
    return text


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) != 1:
        raise InputError("give the folder with the runs, such as runs/paper")
    folder, tables = Path(argv[0]), {}
    if not folder.is_dir():
        raise InputError(f"{argv[0]!r} is no folder; runs/paper_table.sh makes it")
    for benchmark in sorted(path for path in folder.iterdir() if path.is_dir()):
        tables |= benchmark_tables(benchmark)
    if not tables:
        raise InputError(f"{argv[0]!r} holds no benchmark; runs/paper_table.sh makes the runs")
    text = markdown(tables)
    cli.write_atomically(folder / "table.md", text)
    cli.write_atomically(folder / "table.json", cli.strict_json(tables, indent=1))
    print(f"{text}wrote {folder}/table.md and table.json")


if __name__ == "__main__":
    cli.command("paper_table", main)
