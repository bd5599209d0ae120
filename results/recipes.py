"""The recipes, measured: every row trained with several seeds and asked the same held-out questions.

    python results/recipes.py                                     # all rows x 3 seeds; resumes; then the tables
    python results/recipes.py --rows grpo paper ours --seeds 1    # some of them
    python results/recipes.py --split val --questions 300         # the questions on which settings were chosen

Each run is `train_cdrl.py` with the row's flags, then answers of the trained model to held-out questions, clean and with
noise on key, random and inverse regions. One summary a run, results/recipes/SPLIT-ROW-SEED.json; the answers themselves,
from which the paired intervals are drawn, stay under runs/recipes. Confidences: C (Eq. 3) ranks; the sequence probability
exp(mean log-prob) is the one that ECE and Brier judge, without any map unless the column says so.
"""
import argparse
import json
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import noise  # noqa: E402
import probe  # noqa: E402
from data import InputError  # noqa: E402
from probe import auroc, calibration_error, metrics  # noqa: E402
from train_cdrl import Args  # noqa: E402
from vlm import VLM  # noqa: E402

# row: (flags of train_cdrl.py, None = not trained)
ROWS = {
    "base": None,
    "grpo": "--recipe grpo",
    "paper": "--recipe paper",
    "paper, alpha 0": "--recipe paper --alpha 0",
    "paper, both views learn": "--recipe paper --learn_noised",
    "paper, pathwise": "--recipe paper --pathwise 1",
    "paper, Brier": "--recipe paper --calibration brier",
    "paper, rescored pairs": "--recipe paper --noised rescore",
    "paper, logprob": "--recipe paper --confidence logprob --judged logprob",
    "ours": "",
    "ours, alpha 0": "--alpha 0",
    "ours, one view learns": "--no-learn_noised",
    "ours, no pathwise": "--pathwise 0",
    "ours, linear": "--calibration linear",
    "ours, noise everywhere": "--region all",
    "ours, random regions": "--region random",
}
HEADLINE = ("base", "grpo", "paper", "ours")
REGIONS = ("key", "random", "inverse")
NOISE_T, ANSWERS, NOISED_ANSWERS = 999, 8, 4
HERE, RUNS = ROOT / "results" / "recipes", ROOT / "runs" / "recipes"


def name_of(row, seed):
    return f"{row.replace(', ', '-').replace(' ', '_')}-{seed}"


def train(row, seed, flags):
    """Train one run, unless it is there -> (model directory, seconds). Seconds include the measure of the base's scale."""
    if ROWS[row] is None:
        return ROOT / "tiny" / "base", 0.0
    output = RUNS / name_of(row, seed)
    if not (output / "config.json").exists():
        command = [sys.executable, str(ROOT / "train_cdrl.py"), *ROWS[row].split(), *flags, "--seed", str(seed),
                   "--eval_size", "0", "--output", str(output)]
        start = time.time()
        if subprocess.run(command, check=False).returncode:
            raise InputError(f"{row!r}, seed {seed}, did not train; the command was: {' '.join(command)}")
        data.write_atomically(output / "seconds.json", json.dumps(time.time() - start))
    return output, json.loads((output / "seconds.json").read_text())


def ask(path, samples, file):
    """Answers of a model on clean and on noised pictures -> {"clean" or region: list of Answer}, kept in a file."""
    if not file.exists():
        vlm, clip = VLM.load(path), noise.ClipAttention.from_pretrained()
        found = {"clean": probe.answer(vlm, samples, [s.pictures() for s in samples], ANSWERS, max_new_tokens=64)}
        for region in REGIONS:
            found[region] = probe.noised_answers(vlm, samples, clip, NOISE_T, region, Args.mass, NOISED_ANSWERS, 0,
                                                 max_new_tokens=64)
        data.write_atomically(file, json.dumps({key: [vars(a) for a in answers] for key, answers in found.items()}))
    return {key: [probe.Answer(**a) for a in answers] for key, answers in json.loads(file.read_text()).items()}


def columns(found):
    """Answers by view -> one row of numbers."""
    clean, key = found["clean"], found["key"]
    correct = np.array([a.correct for a in clean], float)
    c, p = (np.array([getattr(a, field) for a in clean]) for field in ("confidence", "probability"))
    ids = [a.id for a in clean]
    mean = {view: float(np.mean([a.confidence for a in answers])) for view, answers in found.items()}
    both = np.array([a.confidence for a in clean[::2] + key]), np.array([a.correct for a in clean[::2] + key])
    by_p = metrics(p, correct)
    words = [word for a in clean for word in a.text.split()]
    return {**probe.headroom(clean), "C": mean["clean"],
            **{f"gap {region}": mean["clean"] - mean[region] for region in REGIONS},
            "AUROC": auroc(c, correct), "AUROC of p": by_p["auroc"], "ECE": by_p["ece"], "Brier": by_p["brier"],
            "ECE mapped": calibration_error(probe.cross_fitted(ids, c, correct), correct), "AURC": metrics(c, correct)["aurc"],
            "accuracy@80": metrics(c, correct)["accuracy@80"],
            "noised": float(np.mean([a.correct for a in key])), "AUROC, clean and noised": auroc(*both),
            "accuracy@80, noised": metrics([a.confidence for a in key], [a.correct for a in key])["accuracy@80"],
            "entropy": -float(np.mean([np.log(a.probability) for a in clean])),
            "length": float(np.mean([a.length for a in clean])), "words": len(set(words))}


def summary(found):
    """`columns` pooled ("all") and within each skill."""
    rows = {"all": columns(found)}
    for skill in data.SKILLS:
        rows[skill] = columns({view: [a for a in answers if a.skill == skill] for view, answers in found.items()})
    return rows


def differences(answers, rows, against="ours", rounds=1000):
    """AUROC of C, ECE and Brier of p: `against` minus each row, mean over seeds, 95% intervals, paired by question."""
    statistics = {"AUROC": ("confidence", auroc), "ECE": ("probability", calibration_error),
                  "Brier": ("probability", lambda p, right: float(((p - right) ** 2).mean())),
                  "pass@1": ("confidence", lambda _, right: float(right.mean()))}
    boots = {}
    for row in {*rows, against}:
        for name, (field, statistic) in statistics.items():
            values = [(a := found["clean"]) and (
                statistic(*(x := (np.array([getattr(b, field) for b in a]), np.array([b.correct for b in a], float)))),
                probe.bootstrap([b.id for b in a], *x, {name: statistic}, rounds)[name]) for found in answers[row]]
            boots[row, name] = np.mean([v[0] for v in values]), np.mean([v[1] for v in values], axis=0)
    return {row: {name: (float(boots[against, name][0] - boots[row, name][0]),
                         *probe.interval(boots[against, name][1] - boots[row, name][1])) for name in statistics}
            for row in rows if row != against}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS, help="of the table")
    parser.add_argument("--seeds", type=int, default=3, help="of training; the questions are the same")
    parser.add_argument("--split", default="test", choices=("val", "test"), help="val: to choose on; test: to report on")
    parser.add_argument("--questions", type=int, default=500, help="held-out questions")
    parser.add_argument("--flags", default="", help="flags added to every training run, for trials")
    args = parser.parse_args()
    samples = list(data.load("synthetic", args.split, args.questions, 0))
    HERE.mkdir(exist_ok=True)
    tables, answers = defaultdict(list), defaultdict(list)
    for seed in range(args.seeds):
        for row in args.rows:
            if ROWS[row] is None and seed:
                continue
            path, seconds = train(row, seed, args.flags.split())
            found = ask(path, samples, RUNS / f"{args.split}-{args.questions}-{name_of(row, seed)}.json")
            tables[row].append(summary(found))
            answers[row].append(found)
            data.write_atomically(HERE / f"{args.split}-{name_of(row, seed)}.json", json.dumps(
                {"flags": ROWS[row], "questions": args.questions, "seconds": seconds, **tables[row][-1]}, indent=1))
    for part in ("all", *data.SKILLS):
        print(f"\n{part}: mean over {args.seeds} seeds, {args.questions} questions of {args.split}")
        print(data.table({row: {name: float(np.mean([t[part][name] for t in found])) for name in found[0][part]}
                          for row, found in tables.items()}))
    if "ours" in tables:
        print("\nours minus each row: mean over seeds and 95% interval, paired by question")
        print(data.table({row: {f"{name} {end}": value for name, triple in found.items()
                                for end, value in zip(("", "low", "high"), triple)}
                          for row, found in differences(answers, args.rows).items()}))


if __name__ == "__main__":
    data.command("recipes.py", main)
