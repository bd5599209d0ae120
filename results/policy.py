"""Which question deserves which computation: the frontier of accuracy against Expert calls, made again from stored votes.

    python results/policy.py                                # policy.md and policy.png, from the votes in results/policy/
    python results/policy.py --collect base tiny/base       # collects the votes of a model first

Votes are collected with `eval.collector` on the built-in questions: split val, seed 0, to fit on; split test to report
on. They are kept short, one file a model and split under results/policy/. What is printed goes to results/policy.md.
"""
import argparse
import gzip
import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import catts
import data
import eval
import policy as policies
from noise import ClipAttention
from utils import cli, frontier
from utils.experts import LocalExpert
from utils.judge import accepts
from utils.metrics import auroc, calibration_error
from utils.results_file import run_resumable
from vlm import VLM

FOLDER, SIZES, BUDGETS = ROOT / "results" / "policy", [2, 4, 8], (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.3)
RATES = np.geomspace(0.03, 0.6, 16)


def collect(name, path, split, seed, number):
    """Votes of a model on built-in questions, kept in results/policy/NAME-SPLIT-SEED.jsonl.gz."""
    settings = catts.Settings(seed=seed)
    expert = LocalExpert(VLM.load(ROOT / "tiny" / "expert"), settings.expert_tokens)
    controller = catts.Controller(VLM.load(path), expert, ClipAttention.from_pretrained(), settings)
    samples = list(data.load("synthetic", split, number, seed))
    rows = run_resumable(eval.collector(controller, SIZES, SIZES[-1], ["expert"]), samples, f"runs/policy/{name}-{split}-{seed}.jsonl",
                         {"model": name, "seed": seed, "sizes": SIZES}, 100, f"{name}, {split} {seed}")
    store(list(rows.values()), name, split, seed)


def store(rows, name, split, seed):
    """What the policy needs of the rows, rounded."""
    FOLDER.mkdir(exist_ok=True)
    lines = []
    for row in rows:
        samples = [{"answer": s["answer"], "logprob": round(s["logprob"], 5), "tokens": s["tokens"],
                    "confidence": {"mean": round(s["confidence"]["mean"], 4)}} for s in row["samples"]]
        by_n = {n: {"ran": run["ran"], "parts": run["parts"], "votes": {
            source: [[answer, round(share, 5)] for answer, share in votes] for source, votes in run["votes"].items()}}
            for n, run in row["by_n"].items()}
        lines.append(json.dumps({"id": row["id"], "gold": row["gold"], "choices": row["choices"], "meta": row["meta"],
                                 "samples": samples, "by_n": by_n, "expert": row["expert"]}) + "\n")
    with open(FOLDER / f"{name}-{split}-{seed}.jsonl.gz", "wb") as file:
        file.write(gzip.compress("".join(lines).encode(), mtime=0))


def judge(answer, row):
    return accepts(answer, data.Sample(row["id"], [], "", row["gold"], row["choices"]))


def load(name, split, seed=None):
    """Stored questions of a model, of one seed or of all."""
    questions = []
    for path in sorted(FOLDER.glob(f"{name}-{split}-{'*' if seed is None else seed}.jsonl.gz")):
        lines = gzip.decompress(path.read_bytes()).splitlines()
        questions += [policies.StoredQuestion(json.loads(line), judge) for line in lines]
    return questions


def votes_of(question, taus):
    """The paper's fixed votes on 8 samples -> (right, share of the winner)."""
    row, run = question.row, question.row["by_n"]["8"]
    votes = catts.sample_votes([s[0] for s in question.samples], [s[1] for s in question.samples],
                               [np.exp(s[2]) for s in question.samples], catts.Settings())
    votes += [catts.Vote(source, *vote) for source, given in run["votes"].items() if source != "samples" for vote in given]
    candidates = catts.tally(votes, taus, row["choices"])
    best = catts.winner(candidates)
    return best is not None and judge(best.answer, row), catts.share_of(best, candidates)


def rivals(questions):
    """Everything that needs no fit, by question -> dict of arrays."""
    leaders = [next(iter(q.evidence(8).candidates()), (None, [])) for q in questions]
    fixed = [votes_of(q, catts.Settings().taus()) for q in questions]
    return {"majority": np.array([q.accepts(a) for q, (a, *_) in zip(questions, leaders)], float),
            "majority share": np.array([len(leader[1]) / 8 for leader in leaders]),
            "expert": np.array([q.accepts(q.row["expert"]["answer"]) for q in questions], float),
            "C": np.array([np.mean([s[1] for s in q.samples]) for q in questions]),
            "p": np.array([np.mean(np.exp([s[2] for s in q.samples])) for q in questions]),
            "CA-TTS": np.array([f[0] for f in fixed], float), "CA-TTS share": np.array([f[1] for f in fixed]),
            "CA-TTS calls": np.array([q.cost("voter", 8)[2] + q.cost("self_reflection", 8)[2] for q in questions], float)}


def replays(policy, questions):
    """[(mean calls, right by question, Spent)], one a rate."""
    points = []
    for policy.rate in RATES:
        spent = [policy.replay(q) for q in questions]
        points.append((float(np.mean([s.calls for s in spent])), np.array([s.correct for s in spent], float), spent))
    return points


def report(name):
    """Tables of one model -> (text, curves for the picture, list of Spent at half a call)."""
    held_out, fresh = load(name, "val"), load(name, "test")
    policy = policies.fit_policy(held_out, SIZES, policies.PURCHASES[1:], rates=RATES)
    known, points = rivals(fresh), replays(policy, fresh)
    majority, expert, curves, rows = known["majority"], known["expert"], {}, {}
    for budget in BUDGETS:
        share = min(1.0, budget)
        ways = {"policy": frontier.mixed([(calls, right) for calls, right, _ in points], budget),
                "gate by C": frontier.gate(known["C"], majority, expert, share),
                "gate by p": frontier.gate(known["p"], majority, expert, share),
                "gate by share": frontier.gate(known["majority share"], majority, expert, share),
                "random": majority + share * (expert - majority)}
        best = max((way for way in ways if way != "policy"), key=lambda way: ways[way].mean())
        rows[f"{budget} calls"] = {way: float(right.mean()) for way, right in ways.items()} | {
            "policy - best other": frontier.paired_difference(ways[best], ways["policy"]),
            "policy - Expert alone": frontier.paired_difference(expert, ways["policy"])}
        for way, right in ways.items():
            curves.setdefault(way, []).append((share if way != "policy" else budget, float(right.mean())))
    text = [f"## {name}", "", f"Fitted on {len(held_out)} questions (val), reported on {len(fresh)} others (test). "
            f"Majority of 8 {majority.mean():.3f}, Expert alone {expert.mean():.3f}, either "
            f"{np.maximum(majority, expert).mean():.3f}, CA-TTS (tau = .5) {known['CA-TTS'].mean():.3f} at "
            f"{known['CA-TTS calls'].mean():.2f} calls.", "",
            "```", cli.table(rows), "```", ""]
    half = min(points, key=lambda point: abs(point[0] - 0.5))
    full = min(points, key=lambda point: abs(point[0] - 1.0))
    quality = {}
    for label, (*_, spent) in (("policy, ~.5 calls", half), ("policy, ~1 call", full)):
        quality[label] = {key: float(value) for key, value in frontier.means(spent).items()}
    for label, right, confidence in (("vote share, majority", majority, known["majority share"]),
                                     ("vote share, CA-TTS", known["CA-TTS"], known["CA-TTS share"])):
        quality[label] = {"accuracy": float(right.mean()), "ece": calibration_error(confidence, right),
                          "auroc": auroc(confidence, right)} | dict.fromkeys(("calls", "tokens", "base_tokens"), float("nan"))
    text += ["The final confidence:", "", "```", cli.table(quality), "```", "", "```", policy.tables(), "```", ""]
    curves["CA-TTS, tau = .5"] = [(float(known["CA-TTS calls"].mean()), float(known["CA-TTS"].mean()))]
    return "\n".join(text), curves, half[2]


def abstention(name, spent, draws=10, number=300):
    """Thresholds certified on draws of the questions, their risk and coverage on the others -> rows of a table."""
    (confidence, correct), rows, rng = frontier.confidences(spent), {}, np.random.default_rng(0)
    for risk in (0.05, 0.1):
        risks, coverage = [], []
        for _ in range(draws):
            held = np.zeros(len(spent), bool)
            held[rng.choice(len(spent), min(number, len(spent) // 2), replace=False)] = True
            threshold = frontier.certified_threshold(confidence[held], correct[held], risk)
            kept = confidence[~held] >= threshold
            coverage.append(kept.mean())
            risks.append(1 - correct[~held][kept].mean() if kept.any() else 0.0)
        rows[f"{name}, target {risk:.0%}"] = {"draws kept": f"{sum(r <= risk for r in risks)} of {draws}",
                                              "risk": float(np.mean(risks)), "coverage": float(np.mean(coverage))}
    return rows


def few_questions(name, number=100, draws=5):
    """Fitted on few questions, against the fixed votes -> rows of a table."""
    held_out, fresh, rng = load(name, "val"), load(name, "test", 0), np.random.default_rng(0)
    fixed, rows = rivals(fresh)["CA-TTS"], {}
    for draw in range(draws):
        chosen = [held_out[i] for i in rng.choice(len(held_out), number, replace=False)]
        policy = policies.fit_policy(chosen, SIZES, policies.PURCHASES[1:], rates=RATES).choose_rate(1.0)
        spent = [policy.replay(q) for q in fresh]
        right = np.array([s.correct for s in spent], float)
        rows[f"{name}, draw {draw}"] = {"policy": float(right.mean()), "calls": float(np.mean([s.calls for s in spent])),
                                        "policy - CA-TTS": frontier.paired_difference(fixed, right)}
    return rows


def other_experts(name):
    """An Expert that answers at random in every role, and one that is always right -> rows of a table."""
    rows, rng = {}, np.random.default_rng(0)

    def changed(question, expert):
        row = json.loads(json.dumps(question.row))
        row["expert"]["answer"] = row["gold"] if expert == "perfect" else golds[rng.integers(len(golds))]
        for run in row["by_n"].values() if expert == "useless" else ():
            shares = rng.dirichlet([1] * (len(run["votes"]["voter"]) or 1)).tolist()
            run["votes"]["voter"] = [[answer, x] for (answer, _), x in zip(run["votes"]["voter"], shares)]
            run["votes"]["self_reflection"] = [[golds[rng.integers(len(golds))], 1.0]]
        return policies.StoredQuestion(row, judge)

    held_out, fresh = load(name, "val"), load(name, "test", 0)
    golds = [q.row["gold"] for q in held_out]
    majority = rivals(fresh)["majority"]
    for expert in ("useless", "real", "perfect"):
        train, test = ([q if expert == "real" else changed(q, expert) for q in part] for part in (held_out, fresh))
        policy = policies.fit_controller(train, SIZES, policies.PURCHASES[1:])
        policy.rate = 0.2
        spent = [policy.replay(q) for q in test]
        right = np.array([s.correct for s in spent], float)
        rows[f"{name}, {expert} Expert"] = {"accuracy": float(right.mean()), "calls": float(np.mean([s.calls for s in spent])),
                                            "minus majority": frontier.paired_difference(majority, right)}
    return rows


def draw(curves, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, len(curves), figsize=(5 * len(curves), 4.2), sharey=True, squeeze=False)
    styles = {"policy": ("C3", "-o"), "gate by C": ("C0", "-"), "gate by p": ("C2", "-"), "gate by share": ("C1", "-"),
              "random": ("0.6", "--"), "CA-TTS, tau = .5": ("k", "s")}
    for axis, (name, ways) in zip(axes[0], curves.items()):
        for way, points in ways.items():
            color, style = styles[way]
            axis.plot(*zip(*sorted(points)), style, color=color, label=way, markersize=5)
        axis.set_title(name)
        axis.set_xlabel("Expert calls a question")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("accuracy, questions nothing was fitted on")
    axes[0][0].legend(frameon=False)
    figure.suptitle("Confidence decides who is sent to the Expert: the same accuracy for fewer calls")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--collect", nargs=2, metavar=("NAME", "MODEL"), help="collect the votes of a model first")
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3, help="of the test questions")
    args = parser.parse_args()
    if args.collect:
        for split, seed in [("val", 0)] + [("test", seed) for seed in range(args.seeds)]:
            collect(*args.collect, split, seed, args.questions)
    names = [path.name.split("-val-")[0] for path in sorted(FOLDER.glob("*-val-0.jsonl.gz"))]
    texts, curves, kept, few, others = [], {}, {}, {}, {}
    for name in names:
        text, curves[name], spent = report(name)
        texts.append(text)
        kept |= abstention(name, spent)
        few |= few_questions(name)
        others |= other_experts(name)
        print(text, flush=True)
    tail = "\n".join(["## Abstention at about half a call a question", "", "```", cli.table(kept), "```", "",
                      "## Fitted on 100 questions, at most one call a question", "", "```", cli.table(few), "```", "",
                      "## Another Expert, at the same rate (.2 of P a call)", "", "```", cli.table(others), "```", ""])
    print(tail)
    page = ROOT / "results" / "policy.md"
    head = page.read_text().split("<!-- measured -->")[0]
    page.write_text(head + "<!-- measured -->\n\n" + "\n".join(texts) + "\n" + tail)
    draw(curves, ROOT / "results" / "policy.png")


if __name__ == "__main__":
    cli.command("policy.py", main)
