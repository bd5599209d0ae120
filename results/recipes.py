"""The recipes, measured: every row trained with several seeds and asked the same held-out questions.

    python results/recipes.py                                     # the headline rows x 3 seeds, the others x 1; resumes
    python results/recipes.py --rows grpo ours --seeds 1          # some of them
    python results/recipes.py --split val --questions 240         # the questions on which settings were chosen

Each run is `train_cdrl.py` with the row's flags, then answers of the trained model to held-out questions, clean and with
noise on key, random and inverse regions, and the votes of CA-TTS. One summary a run, results/recipes/SPLIT-ROW-SEED.json;
models, answers and votes stay under runs/recipes (delete it when tiny/base or the code has changed). Confidences: C (Eq. 3)
ranks; c = sigmoid(aC + b) is the probability that training shapes, a and b fitted on the base's answers to training
questions before the first step, the same for every row; p = exp(mean log-prob); for CA-TTS the winner's share of the votes.
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
import eval as evaluation  # noqa: E402
import noise  # noqa: E402
import probe  # noqa: E402
import train_cdrl  # noqa: E402
from catts import Controller, Settings, answer_file  # noqa: E402
from data import InputError  # noqa: E402
from experts import LocalExpert  # noqa: E402
from probe import auroc, calibration_error, metrics  # noqa: E402
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
SPLITS = ("val", "test")
NOISE_T, ANSWERS, NOISED_ANSWERS = 999, 8, 4
SIZES = [1, 2, 4, 8, 16, 32]          # samples of the headline rows' scaling curves
HERE, RUNS = ROOT / "results" / "recipes", ROOT / "runs" / "recipes"


def name_of(row, seed):
    return f"{row.replace(', ', '-').replace(' ', '_')}-{seed}"


def train(row, seed, flags):
    """Train one run, unless it is there -> (model directory, folder for its answers, seconds of training)."""
    if ROWS[row] is None:
        (output := RUNS / "base").mkdir(parents=True, exist_ok=True)
        return ROOT / "tiny" / "base", output, 0.0
    output = RUNS / name_of(row, seed)
    wanted = [*ROWS[row].split(), *flags, "--seed", str(seed), "--eval_size", "0", "--output", str(output)]
    stored, seconds = output / "args.json", output / "seconds.json"
    if not (seconds.exists() and json.loads(stored.read_text()) == vars(train_cdrl.parse(wanted))):
        start = time.time()
        if subprocess.run([sys.executable, str(ROOT / "train_cdrl.py"), *wanted], check=False).returncode:
            raise InputError(f"{row!r}, seed {seed}, did not train; the command was: train_cdrl.py {' '.join(wanted)}")
        for split in SPLITS:
            for old in output.glob(f"{split}-*"):           # answers of a shorter run in this folder
                old.unlink()
        data.write_atomically(seconds, json.dumps(time.time() - start))
    return output, output, json.loads(seconds.read_text())


def scale_of(seed):
    """The map from C to a probability that `ours` fits on the base with this seed, before its first step; every row's c is
    read by it."""
    file = RUNS / f"scale-{seed}.json"
    if not file.exists():
        args = train_cdrl.parse(["--seed", str(seed), "--eval_size", "0"])
        questions, _ = train_cdrl.open_data(args)
        order = train_cdrl.Order(len(questions), args.batch_size, seed)
        clip = noise.ClipAttention.from_pretrained()
        data.write_atomically(file, json.dumps(train_cdrl.base_scale(VLM.load(args.model), clip, questions, order, args)))
    return json.loads(file.read_text())


def ask(path, samples, file):
    """Answers of a model on clean and on noised pictures -> {"clean" or region: list of Answer}, kept in a file."""
    if not file.exists():
        vlm, clip, mass = VLM.load(path), noise.ClipAttention.from_pretrained(), train_cdrl.Args.mass
        found = {"clean": probe.answer(vlm, samples, [s.pictures() for s in samples], ANSWERS, max_new_tokens=64)}
        for region in REGIONS:
            found[region] = probe.noised_answers(vlm, samples, clip, NOISE_T, region, mass, NOISED_ANSWERS, 0,
                                                 max_new_tokens=64)
        data.write_atomically(file, json.dumps({key: [vars(a) for a in answers] for key, answers in found.items()}))
    return {key: [probe.Answer(**a) for a in answers] for key, answers in json.loads(file.read_text()).items()}


def vote(path, samples, file, sizes):
    """Every method of CA-TTS from a model's stored votes -> {method: row}, and their scaling when there are several sizes."""
    settings = Settings(samples=ANSWERS)
    expert = LocalExpert(VLM.load(ROOT / "tiny" / "expert"), Settings.expert_tokens)
    controller = Controller(VLM.load(path), expert, noise.ClipAttention.from_pretrained(), settings)
    frame = {"model": str(path), "sizes": sizes}
    rows = answer_file(evaluation.collector(controller, sizes, sizes[-1]), samples, file, frame, 50,
                       f"votes of {Path(path).name}").values()
    methods = {name: evaluation.method_row(some) for name, some in evaluation.by_method(rows, ANSWERS, settings).items()}
    by_n = {n: evaluation.by_method(rows, n, settings) for n in sizes}
    against = evaluation.against_majority(by_n, ANSWERS)["CA-TTS@8"]
    return {"methods": methods, "scaling": evaluation.scaling(by_n), "equal cost": against}


def columns(found, scale):
    """Answers by view -> one row of numbers."""
    clean, key = found["clean"], found["key"]
    correct = np.array([a.correct for a in clean], float)
    c, p = (np.array([getattr(a, field) for a in clean]) for field in ("confidence", "probability"))
    ids = [a.id for a in clean]
    mean = {view: float(np.mean([a.confidence for a in answers])) for view, answers in found.items()}
    both = np.array([a.confidence for a in clean[::2] + key]), np.array([a.correct for a in clean[::2] + key])
    by_p, by_c = metrics(p, correct), metrics(probe.calibrated(c, scale), correct)
    words = [word for a in clean for word in a.text.split()]
    return {**probe.headroom(clean), "C": mean["clean"],
            **{f"gap {region}": mean["clean"] - mean[region] for region in REGIONS},
            "AUROC": auroc(c, correct), "ECE c": by_c["ece"], "Brier c": by_c["brier"],
            "AUROC p": by_p["auroc"], "ECE p": by_p["ece"], "Brier p": by_p["brier"],
            "ECE mapped": calibration_error(probe.cross_fitted(ids, c, correct), correct), "AURC": metrics(c, correct)["aurc"],
            "accuracy@80": metrics(c, correct)["accuracy@80"],
            "noised": float(np.mean([a.correct for a in key])), "AUROC, clean and noised": auroc(*both),
            "accuracy@80, noised": metrics([a.confidence for a in key], [a.correct for a in key])["accuracy@80"],
            "entropy": -float(np.mean([np.log(a.probability) for a in clean])),
            "length": float(np.mean([a.length for a in clean])), "words": len(set(words))}


def summary(found, scale):
    """`columns` pooled ("all") and within each skill."""
    rows = {"all": columns(found, scale)}
    for skill in data.SKILLS:
        rows[skill] = columns({view: [a for a in answers if a.skill == skill] for view, answers in found.items()}, scale)
    return rows


STATISTICS = {"AUROC": ("C", auroc), "ECE c": ("c", calibration_error), "pass@1": ("C", lambda _, right: float(right.mean())),
              "Brier c": ("c", lambda p, right: float(((p - right) ** 2).mean())), "ECE p": ("p", calibration_error),
              "Brier p": ("p", lambda p, right: float(((p - right) ** 2).mean()))}


def differences(answers, rows, against="ours", rounds=1000):
    """`against` minus each row: means over seeds, 95% intervals of the questions, paired. answers: {row: [found of a seed]};
    a row with fewer seeds is held against the same seeds of `against`."""
    drawn = {}
    for row in {*rows, against}:
        for seed, found in enumerate(answers[row]):
            some = found["clean"]
            value = {"C": np.array([a.confidence for a in some]), "p": np.array([a.probability for a in some])}
            value["c"] = probe.calibrated(value["C"], scale_of(seed))
            ids, right = [a.id for a in some], np.array([a.correct for a in some], float)
            for name, (field, statistic) in STATISTICS.items():
                boot = probe.bootstrap(ids, value[field], right, lambda p, r, s=statistic: {"it": s(p, r)}, rounds)["it"]
                drawn[row, seed, name] = statistic(value[field], right), boot
    table = {}
    for row in (row for row in rows if row != against):
        seeds = range(len(answers[row]))
        table[row] = {}
        for name in STATISTICS:
            apart = [[drawn[against, seed, name][i] - drawn[row, seed, name][i] for seed in seeds] for i in (0, 1)]
            low, high = probe.interval(np.mean(apart[1], axis=0))
            table[row] |= {name: float(np.mean(apart[0])), f"{name} low": low, f"{name} high": high}
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS, help="of the table")
    parser.add_argument("--seeds", type=int, default=3, help="of training, for the headline rows; the questions are the same")
    parser.add_argument("--split", default="test", choices=SPLITS, help="val: to choose on; test: to report on")
    parser.add_argument("--questions", type=int, default=500, help="held-out questions")
    parser.add_argument("--flags", default="", help="flags added to every training run, for trials")
    args = parser.parse_args()
    samples = list(data.load("synthetic", args.split, args.questions, 0))
    HERE.mkdir(exist_ok=True)
    tables, answers = defaultdict(list), defaultdict(list)
    for seed in range(args.seeds):
        for row in args.rows:
            if seed and row not in HEADLINE:
                continue
            path, folder, seconds = train(row, seed, args.flags.split())
            found = ask(path, samples, folder / f"{args.split}-{args.questions}.json")
            votes = vote(path, samples, folder / f"{args.split}-{args.questions}-votes.jsonl",
                         SIZES if row in HEADLINE else [ANSWERS])
            record = {"flags": ROWS[row], "questions": args.questions, "seconds": seconds,
                      **summary(found, scale_of(seed)), **votes}
            data.write_atomically(HERE / f"{args.split}-{name_of(row, seed)}.json", json.dumps(record, indent=1))
            tables[row].append(record)
            answers[row].append(found)
    print_tables(tables, answers, args)
    if args.split == "test":
        draw(tables, answers, ROOT / "results" / "recipes.png")
    print(f"\nwrote {HERE.relative_to(ROOT)}/ and recipes.png\nnext: python eval.py --model {data.shown(RUNS / 'ours-0')} "
          "--baseline tiny/base")


def mean_of(records, *path):
    """The mean over seeds of a number that lies at `path` in each record."""
    values = []
    for record in records:
        for key in path:
            record = record[key]
        values.append(record[0] if isinstance(record, list | tuple) else record)
    return float(np.mean(values))


def print_tables(tables, answers, args):
    for part in ("all", *data.SKILLS):
        print(f"\n{part}: mean over seeds, {args.questions} questions of {args.split}")
        print(data.table({f"{row} ({len(found)})": {name: mean_of(found, part, name) for name in found[0][part]}
                          for row, found in tables.items()}))
    print("\nVotes, N = 8; the confidence is the winner's share")
    shown = [f"{name}@{ANSWERS}" for name in ("majority", "weighted", "CA-TTS")]
    print(data.table({f"{row}, {name}": {key: mean_of(found, "methods", name, key) for key in found[0]["methods"][name]}
                      for row, found in tables.items() for name in shown}))
    headline = {row: found for row, found in tables.items() if found[0]["scaling"]}
    if headline:
        print("\nScaling: points of accuracy per log2 N, and CA-TTS against majority at the same tokens")
        scaled = ("majority", "weighted", "CA-TTS")
        print(data.table({row: {**{f"slope, {name}": mean_of(found, "scaling", name, "slope") for name in scaled},
                                **{f"equal cost, {key}": mean_of(found, "equal cost", key)
                                   for key in found[0]["equal cost"]}}
                          for row, found in headline.items()}))
    if "ours" in tables:
        print("\nours minus each row: mean over seeds and 95% interval, paired by question")
        print(data.table(differences(answers, list(tables))))


def draw(tables, answers, path):
    """recipes.png: reliability and risk-coverage of the headline rows (seeds pooled), every row's gap by region, scaling."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(2, 2, figsize=(13, 9))
    headline = {row: [a for found in answers[row] for a in found["clean"]] for row in HEADLINE if row in answers}
    probe.plot_reliability(axes[0, 0], headline)
    for row, some in headline.items():
        c, correct = (np.array([getattr(a, field) for a in some], float) for field in ("confidence", "correct"))
        axes[0, 1].plot(*zip(*probe.risk_coverage(c, correct)), label=f"{row}, AUROC {auroc(c, correct):.2f}")
        scaled = [found["scaling"] for found in tables[row] if found["scaling"]]
        for name, style in (("majority", ":"), ("CA-TTS", "-")) if scaled else ():
            axes[1, 1].plot(SIZES, [np.mean([found[name][str(n)][0] for found in scaled]) for n in SIZES], style,
                            marker="o", markersize=4, color=f"C{list(headline).index(row)}", label=f"{row}, {name}")
    for i, region in enumerate(REGIONS):
        axes[1, 0].barh(np.arange(len(tables)) - 0.27 * (i - 1), [mean_of(found, "all", f"gap {region}")
                                                                 for found in tables.values()], 0.25, label=region)
    axes[0, 1].set(xlabel="coverage, highest C first", ylabel="share of wrong answers", title="Risk and coverage")
    axes[1, 0].set(xlabel="C - C', nats", yticks=range(len(tables)), yticklabels=tables, title="Gap under noise, by region")
    axes[1, 0].invert_yaxis()
    axes[1, 1].set(xlabel="samples N", ylabel="accuracy", xscale="log", title="Scaling")
    axes[1, 1].set_xticks(SIZES, SIZES)
    for axis in axes.flat:
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    data.command("recipes.py", main)
