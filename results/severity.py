"""Does a model know when it cannot see, under corruptions that it was never trained on?

    python results/severity.py base=tiny/base ours=runs/recipes/ours-0            # each model, the first the baseline
    python results/severity.py base=tiny/base ours=runs/recipes/ours-0,runs/recipes/ours-1         # seeds of one row

Five corruptions at five severities, on the key region and on the whole picture (`eval.corrupter`, as `eval.py --corruptions`).
Answers stay under runs/severity. The tables are printed and go to results/severity.json: accuracy, C, c and ECE of c by
severity; for each corruption the AUROC over the answers to clean and to corrupted pictures of all severities together, of C
and p, and the better of them minus the baseline's better one, with an interval of questions and seeds.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import eval  # noqa: E402
import noise  # noqa: E402
from utils import baselines, cli, corruptions, tables  # noqa: E402
from vlm import VLM  # noqa: E402

FIELDS = {"C": "confidence", "p": "probability"}


def answers_of(path, samples, answers, file):
    """Rows of `eval.corrupter` for one model, kept in a file."""
    if not file.exists():
        collect = eval.corrupter(VLM.load(path), noise.ClipAttention.from_pretrained(), corruptions.NAMES, 0.5, answers, 0,
                                 max_new_tokens=64)
        rows = [row for start in range(0, len(samples), 50) for row in collect(samples[start:start + 50])]
        file.parent.mkdir(parents=True, exist_ok=True)
        cli.write_atomically(file, json.dumps(rows))
    return json.loads(file.read_text())


def arrays_of(rows, name):
    """One condition -> {"C", "p", "correct": (Q, answers)}."""
    return {field: np.array([[a[key] for a in row["found"][name]] for row in rows], float)
            for field, key in (*FIELDS.items(), ("correct", "correct"))}


def mixed(rows, kind, place, draws):
    """AUROC over clean and corrupted answers of all severities -> {"C", "p": (1 + R,)}: as measured, then on each draw of
    questions."""
    clean = arrays_of(rows, "clean")
    levels = [arrays_of(rows, f"{kind}, {place}, {severity}") for severity in corruptions.SEVERITIES]
    blind = {key: np.concatenate([level[key] for level in levels], 1) for key in clean}
    return {name: np.array([baselines.auroc_over_views(*((view[name][d].ravel(), view["correct"][d].ravel())
                                                         for view in (clean, blind))) for d in draws]) for name in FIELDS}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", help="NAME=PATH[,PATH...], seeds of a row; the first is the baseline")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--question_seed", type=int, default=10)
    parser.add_argument("--answers", type=int, default=2, help="a question and condition")
    args = parser.parse_args()
    samples = list(data.load("synthetic", "test", args.questions, args.question_seed))
    rng = np.random.default_rng(0)
    draws = [np.arange(len(samples)), *rng.integers(len(samples), size=(500, len(samples)))]
    severity, overall, baseline = {}, {}, {}
    for given in args.models:
        name, _, paths = given.partition("=")
        paths = [Path(path) for path in paths.split(",")]
        conditions, folder = f"{args.question_seed}-{args.questions}-{args.answers}", ROOT / "runs" / "severity"
        seeds = [answers_of(path, samples, args.answers, folder / f"{path.name}-{cli.checksum(path):08x}-{conditions}.json")
                 for path in paths]
        scales = tables.stored_scales([str(path) for path in paths])
        by_seed = [tables.severity_table(rows, scale) for rows, scale in zip(seeds, scales)]
        severity |= {f"{name}, {row}": {key: float(np.mean([table[row][key] for table in by_seed])) for key in figures}
                     for row, figures in by_seed[0].items()}
        for kind in corruptions.NAMES:
            for place in ("key", "all"):
                aurocs = [mixed(rows, kind, place, draws) for rows in seeds]
                best = max(FIELDS, key=lambda field: np.mean([a[field][0] for a in aurocs]))
                overall[f"{name}, {kind}, {place}"] = row = {
                    **{field: float(np.mean([a[field][0] for a in aurocs])) for field in FIELDS}, "the better": best}
                values = np.array([a[best] for a in aurocs])                                     # (S, 1 + R)
                values = values - baseline.setdefault((kind, place), values.mean(0))            # the first model's own: 0
                row["minus the baseline"] = baselines.interval_over_seeds(values[:, 0], values[:, 1:])
    titles = {"Accuracy and confidence by severity": baselines.by_figure(baselines.by_figure(severity)),
              "AUROC over clean and corrupted answers together, of all severities": overall}
    for title, rows in titles.items():
        print(f"\n{title}\n{cli.table(rows)}")
    cli.write_atomically(ROOT / "results" / "severity.json", cli.strict_json(titles, indent=1))
    print("\nwrote results/severity.json\nnext: python eval.py --corruptions --model runs/cdrl --baseline tiny/base")


if __name__ == "__main__":
    cli.command("severity.py", main)
