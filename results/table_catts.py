"""The table of CA-TTS: every method and every subset of its modules, with its cost, for the base and a trained model.

    torchrun train_cdrl.py && python results/table_catts.py              # writes results/catts.json, prints the tables

Resumable: votes are stored under runs/table_catts/, one line a question, and every row is recomputed from them.
"""
import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data
import eval
from catts import Controller, Settings, Vote, record, tally, winner
from noise import ClipAttention
from utils import (
    cli,
    tables,
)
from utils.experts import LocalExpert
from utils.results_file import run_resumable
from vlm import VLM


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=[str(ROOT / "tiny" / "base"), "runs/cdrl"])
    parser.add_argument("--questions", type=int, default=300, help="of the test split, for each seed")
    parser.add_argument("--seeds", type=int, default=3, help="of the questions and of the samples")
    parser.add_argument("--n", type=int, default=8, help="samples a question")
    args = parser.parse_args()
    clip, expert = ClipAttention.from_pretrained(), LocalExpert(VLM.load(ROOT / "tiny" / "expert"), Settings.expert_tokens)
    report = {}
    for path in args.models:
        vlm, name = VLM.load(path), Path(path).name
        methods, exits = [], []
        for seed in range(args.seeds):
            settings = Settings(seed=seed, samples=args.n)
            samples = list(data.load("synthetic", "test", args.questions, seed))
            controller = Controller(vlm, expert, clip, settings)
            frame = {"model": path, "seed": seed, "questions": args.questions, "n": args.n}
            rows = run_resumable(eval.collector(controller, [args.n], args.n), samples,
                               f"runs/table_catts/{name}-{seed}.jsonl", frame, 50, f"{name}, seed {seed}")
            methods.append({method: tables.method_row(outcomes)
                            for method, outcomes in eval.by_method(rows.values(), args.n, settings).items()})
            control = Controller(vlm, expert, clip, replace(settings, early_exit="exact"))
            exact = run_resumable(lambda batch, control=control: [
                record(r, s) for s, r in zip(batch, control.answer_all(batch))], samples,
                f"runs/table_catts/{name}-{seed}-exact.jsonl", frame, 50, f"{name}, seed {seed}, exact")
            exits += [off_and_exact(rows[key], exact[key], settings) for key in rows]
        report[name] = {"methods": mean_rows(methods), "early exit": early_exit_rows(exits)}
        print(f"\n{name}: {args.questions} questions x {args.seeds} seeds; +- = standard deviation over the seeds")
        print(cli.table(report[name]["methods"]))
        print(cli.table(report[name]["early exit"]))
    output = ROOT / "results" / "catts.json"
    arguments = vars(args) | {"models": [cli.shown(path) for path in args.models]}
    output.write_text(json.dumps({"args": arguments, **report}, indent=1))
    print(f"\nwrote {output.relative_to(ROOT)}\nnext: python eval.py --model runs/cdrl --baseline tiny/base")


def mean_rows(tables):
    """[{method: row} of each seed] -> {method: mean row, with the spread of the accuracy}."""
    return {method: {"accuracy": float(np.mean([t[method]["accuracy"] for t in tables])),
                     "+-": float(np.std([t[method]["accuracy"] for t in tables], ddof=min(1, len(tables) - 1))),
                     **{key: float(np.mean([t[method][key] for t in tables])) for key in row if key != "accuracy"}}
            for method, row in tables[0].items()}


COSTS = ("expert_calls", "expert_tokens", "tokens", "forward_passes", "image_encodings")


def off_and_exact(row, exact, settings):
    """One question's stored votes, all of them (early exit off), and its result under `exact`
    -> (cost off, cost exact, is the answer another one)."""
    run = row["by_n"][str(settings.samples)]
    votes = [Vote(source, *vote) for source, outcomes in run["votes"].items() for vote in outcomes]
    best = winner(tally(votes, settings.taus(), row["choices"]))
    spent = {key: sum(costs.get(key, 0) for costs in run["parts"].values()) for key in COSTS}
    return spent, exact["ledger"], (best.answer if best else None) != exact["answer"]


def early_exit_rows(exits):
    """What `exact` saves: sums over all questions and seeds."""
    modes = {mode: {key: sum(costs[i][key] for costs in exits) for key in COSTS} for i, mode in enumerate(("off", "exact"))}
    for row in modes.values():
        row["generated"] = row["tokens"] + row["expert_tokens"]
    modes["saved"] = {key: 1 - modes["exact"][key] / max(1, value) for key, value in modes["off"].items()}
    for mode, row in modes.items():
        row["other answers"] = sum(differs for *_, differs in exits) if mode == "exact" else 0
    return modes


if __name__ == "__main__":
    cli.command("table_catts.py", main)
