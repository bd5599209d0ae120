"""Which question deserves which computation: the frontier of accuracy against Expert calls, tokens and seconds.

    python results/policy.py                                # policy.md and policy.png, from the votes in results/policy/
    python results/policy.py --collect base 0 tiny/base     # collects the votes of a model first: recipe, seed, path
    python results/policy.py --seconds tiny/base            # measures the seconds of each purchase first
    python results/policy.py --planner tiny/base            # and what the Expert as Planner is good for

Votes are collected with `eval.collector` on the built-in questions: split val, seed 0, to fit on; split test to report
on. They are kept short, one file a model and split under results/policy/. What is printed goes to results/policy.md.
Several training seeds of a recipe are fitted one by one; their outcomes are averaged by question.
"""
import argparse
import gzip
import json
import sys
import time
from itertools import product
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
from utils.overlap import run_through
from utils.results_file import QuestionState, Result, run_resumable
from vlm import VLM

FOLDER, SIZES, BUDGETS = ROOT / "results" / "policy", [2, 4, 8], (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.3)
RECIPES = ("base", "paper", "grpo", "ours")
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


def load(recipe, seed, split):
    """Stored questions of a trained model."""
    questions = []
    for path in sorted(FOLDER.glob(f"{recipe}-{seed}-{split}-*.jsonl.gz")):
        lines = gzip.decompress(path.read_bytes()).splitlines()
        questions += [policies.StoredQuestion(json.loads(line), judge) for line in lines]
    return questions


# ---- Ways to spend: {method: points}, a point is (Expert calls, right by question (N,), tokens, seconds)

def seconds_of(bought):
    """CPU seconds of purchases in order, by the table of `--seconds`."""
    table, n, total = json.loads((FOLDER / "seconds.json").read_text()), 0, 0.0
    for purchase in bought:
        if purchase == "samples":
            first, n = n, policies.next_size(SIZES, n)
            total += table[f"samples {first}-{n}"]
        else:
            total += table[purchase]
    return total


def shares_of(question):
    """Candidates of all fixed votes at N = 8 -> shares (K, 4) by source, right (K,)."""
    run, sources = question.row["by_n"]["8"], list(catts.Settings().taus())
    votes = catts.sample_votes([s[0] for s in question.samples], [s[1] for s in question.samples],
                               [np.exp(s[2]) for s in question.samples], catts.Settings())
    votes += [catts.Vote(source, *vote) for source, given in run["votes"].items() if source != "samples" for vote in given]
    candidates = catts.tally(votes, catts.Settings().taus(), question.choices)
    return (np.array([[c.shares.get(source, 0.0) for source in sources] for c in candidates]).reshape(-1, len(sources)),
            np.array([question.accepts(c.answer) for c in candidates], float))


def voted(tables, taus):
    """Fixed votes with weights (4,) -> right (N,), share of the winner (N,)."""
    outcomes = []
    for shares, right in tables:
        totals = shares @ np.array(taus)
        best = int((totals >= totals.max() - 1e-9).argmax()) if len(totals) and totals.max() > 0 else None
        outcomes.append((0.0, 0.0) if best is None else (right[best], totals[best] / totals.sum()))
    return np.array(outcomes).T


def tuned(held_out, fresh):
    """tau1 to tau3 chosen on held-out questions, with the Voter, with the Critic, with both, without -> points."""
    tables, fresh_tables, points = [shares_of(q) for q in held_out], [shares_of(q) for q in fresh], []
    grid = (0.25, 0.5, 1.0, 2.0, 4.0)
    for voter, critic in product((False, True), repeat=2):
        choices = [(1.0, *taus) for taus in product(grid if voter else (0.0,), grid if critic else (0.0,), (0.0, *grid))]
        taus = max(choices, key=lambda taus: voted(tables, taus)[0].mean())
        bought = ["voter"] * voter + ["self_reflection"] * critic + ["self_check"] * bool(taus[3])
        points.append((*cost_of(fresh, bought), voted(fresh_tables, taus)[0], taus))
    best = [max((p for p in points if round(p[0]) == calls), key=lambda p: p[3].mean()) for calls in (0, 1, 2)]
    return [(calls, right, tokens, seconds) for calls, tokens, seconds, right, _ in best]


def cost_of(questions, bought):
    """Mean Expert calls, tokens and seconds of 8 samples and some modules."""
    costs = np.array([np.sum([q.cost(m, 8) for m in ("samples", *bought)], 0) for q in questions]).mean(0)
    table = json.loads((FOLDER / "seconds.json").read_text())
    return float(costs[2]), float(costs[0] + costs[1]), table["samples 0-8"] + sum(table[m] for m in bought)


def known_of(questions):
    """Everything that needs no fit, by question -> dict of arrays."""
    leaders = [next(iter(q.evidence(8).candidates()), (None, [])) for q in questions]
    fixed = voted([shares_of(q) for q in questions], (1.0, 0.5, 0.5, 0.5))
    return {"majority": np.array([q.accepts(a) for q, (a, *_) in zip(questions, leaders)], float),
            "majority share": np.array([len(leader[1]) / 8 for leader in leaders]),
            "expert": np.array([q.accepts(q.row["expert"]["answer"]) for q in questions], float),
            "C": np.array([np.mean([s[1] for s in q.samples]) for q in questions]),
            "p": np.array([np.mean(np.exp([s[2] for s in q.samples])) for q in questions]),
            "CA-TTS": fixed[0], "CA-TTS share": fixed[1]}


def replayed(policy, questions):
    """-> [(point, list of Spent), ...], one a rate."""
    points = []
    for policy.rate in RATES:
        spent = [policy.replay(q) for q in questions]
        costs = frontier.means(spent)
        points.append(((costs["calls"], np.array([s.correct for s in spent], float), costs["tokens"],
                        float(np.mean([seconds_of(s.bought) for s in spent]))), spent))
    return points


def ways_of(known, held_out, fresh, policy_points):
    """{method: points} of one trained model."""
    majority, expert = known["majority"], known["expert"]
    (_, tokens, seconds), (_, all_tokens, all_seconds) = cost_of(fresh, []), cost_of(fresh, ["expert"])

    def mixture(share, right):
        return share, right, tokens + share * (all_tokens - tokens), seconds + share * (all_seconds - seconds)

    shares = sorted({0.0, 1.0, *(b for b in BUDGETS if b < 1)})
    ways = {"policy": policy_points, "tuned tau": tuned(held_out, fresh)}
    for signal in ("C", "p", "share"):
        values = known["majority share" if signal == "share" else signal]
        ways[f"gate by {signal}"] = [mixture(s, frontier.gate(values, majority, expert, s)) for s in shares]
    ways["random"] = [mixture(0.0, majority), mixture(1.0, expert)]
    return ways


def at(points, budget):
    """-> right (N,), tokens, seconds at a mean number of calls: a coin between the two nearest points."""
    points = sorted(points, key=lambda point: point[0])
    calls = [point[0] for point in points]
    right = frontier.mixed([point[:2] for point in points], budget)
    return right, *(float(np.interp(budget, calls, [point[i] for point in points])) for i in (2, 3))


# ---- One trained model, one recipe

def run_of(recipe, seed):
    """Everything that is measured on one trained model (dict)."""
    held_out, fresh = load(recipe, seed, "val"), load(recipe, seed, "test")
    policy = policies.fit_policy(held_out, SIZES, policies.PURCHASES[1:], rates=RATES)
    known, points = known_of(fresh), replayed(policy, fresh)
    ways = ways_of(known, held_out, fresh, [point for point, _ in points])
    served = {}                             # what a user gets: the rate is chosen on held-out questions
    for budget in (0.5, 1.0, 1.3):
        rate = policy.choose_rate(budget).rate
        served[budget] = points[list(RATES).index(rate)][1]
    return {"policy": policy, "known": known, "ways": ways, "served": served, "held_out": held_out, "fresh": fresh}


def quality(confidence, right, share):
    """The confidence of some answers, and the vote share's on the same questions, as a row of a table."""
    rng, gains = np.random.default_rng(0), []
    for _ in range(300):
        draw = rng.integers(len(right), size=len(right))
        gains.append(auroc(confidence[draw], right[draw]) - auroc(share[0][draw], share[1][draw]))
    kept = {f"risk at {coverage:.0%}": 1 - right[np.argsort(-confidence)[:round(coverage * len(right))]].mean()
            for coverage in (0.5, 0.8)}
    return {"accuracy": right.mean(), "ece": calibration_error(confidence, right), "auroc": auroc(confidence, right),
            "auroc - vote share's": (auroc(confidence, right) - auroc(*share), *np.percentile(gains, [2.5, 97.5])), **kept}


def mean_rows(rows):
    """Rows of several seeds -> their mean; of a tuple each number."""
    return {key: tuple(np.mean([row[key] for row in rows], 0).tolist()) if isinstance(rows[0][key], tuple)
            else float(np.mean([row[key] for row in rows])) for key in rows[0]}


def report(recipe, runs):
    """Tables of one recipe -> (text, curves for the picture)."""
    known = {key: np.mean([run["known"][key] for run in runs], 0) for key in runs[0]["known"]}
    rows, costs, curves = {}, {}, {}
    for budget in BUDGETS:
        found = {way: [at(run["ways"][way], budget) for run in runs] for way in runs[0]["ways"]}
        right = {way: np.mean([r for r, *_ in given], 0) for way, given in found.items()}
        best = max((way for way in right if way != "policy"), key=lambda way: right[way].mean())
        rows[f"{budget} calls"] = {way: float(r.mean()) for way, r in right.items()} | {
            "policy - best other": frontier.paired_difference(right[best], right["policy"]),
            "policy - Expert alone": frontier.paired_difference(known["expert"], right["policy"]),
            "policy - CA-TTS": frontier.paired_difference(known["CA-TTS"], right["policy"])}
        costs[f"{budget} calls"] = {f"{way}, {unit}": float(np.mean([given[i] for given in found[way]]))
                                    for i, unit in ((1, "tokens"), (2, "s")) for way in ("policy", "gate by C", "tuned tau")}
        for way, given in found.items():
            mean = np.mean([(r.mean(), tokens, seconds) for r, tokens, seconds in given], 0)
            curves.setdefault(way, []).append((budget, *mean.tolist()))
    calls, tokens, seconds = np.mean([cost_of(run["fresh"], ["voter", "self_reflection", "self_check"]) for run in runs], 0)
    curves["CA-TTS, tau = .5"] = [(calls, float(known["CA-TTS"].mean()), tokens, seconds)]
    sure = {}
    for budget in runs[0]["served"]:
        measured = []
        for run in runs:
            confidence, right = frontier.confidences(run["served"][budget])
            share = run["known"]["majority share"], run["known"]["majority"]
            measured.append({"calls": frontier.means(run["served"][budget])["calls"]} | quality(confidence, right, share))
        sure[f"policy --budget {budget}"] = mean_rows(measured)
    for label, right, share in (("vote share, majority", "majority", "majority share"),
                                ("vote share, CA-TTS", "CA-TTS", "CA-TTS share")):
        sure[label] = {"calls": 0.0 if right == "majority" else calls} | mean_rows([
            quality(run["known"][share], run["known"][right],
                    (run["known"]["majority share"], run["known"]["majority"])) for run in runs])
    text = [f"## {recipe}", "", f"{len(runs)} training seed(s). Fitted on {len(runs[0]['held_out'])} questions (val), reported "
            f"on {len(runs[0]['fresh'])} others (test). Majority of 8 {known['majority'].mean():.3f}, Expert alone "
            f"{known['expert'].mean():.3f}, either {np.maximum(known['majority'], known['expert']).mean():.3f}, CA-TTS "
            f"(tau = .5) {known['CA-TTS'].mean():.3f} at {calls:.2f} calls, {tokens:.0f} tokens, {seconds:.2f} s.", "",
            "```", cli.table(rows), "```", "", "Tokens and CPU seconds a question at the same calls:", "",
            "```", cli.table(costs), "```", "", "The final confidence, at rates chosen on the held-out questions:", "",
            "```", cli.table(sure), "```", "", "The first seed's coefficients:", "", "```", runs[0]["policy"].tables(),
            "```", ""]
    return "\n".join(text), curves


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


def few_questions(name, run, number=100, draws=5):
    """Fitted on few questions, against the fixed votes -> rows of a table."""
    rng, rows = np.random.default_rng(0), {}
    for draw in range(draws):
        chosen = [run["held_out"][i] for i in rng.choice(len(run["held_out"]), number, replace=False)]
        policy = policies.fit_policy(chosen, SIZES, policies.PURCHASES[1:], rates=RATES).choose_rate(1.0)
        spent = [policy.replay(q) for q in run["fresh"]]
        right = np.array([s.correct for s in spent], float)
        rows[f"{name}, draw {draw}"] = {"policy": float(right.mean()), "calls": float(np.mean([s.calls for s in spent])),
                                        "policy - CA-TTS": frontier.paired_difference(run["known"]["CA-TTS"], right)}
    return rows


def other_experts(name, run):
    """An Expert that answers at random in every role, and one that is always right -> rows of a table."""
    rows, rng = {}, np.random.default_rng(0)
    golds = [q.row["gold"] for q in run["held_out"]]

    def changed(question, expert):
        row = json.loads(json.dumps(question.row))
        row["expert"]["answer"] = row["gold"] if expert == "perfect" else golds[rng.integers(len(golds))]
        for votes in [by_n["votes"] for by_n in row["by_n"].values()] if expert == "useless" else ():
            row["expert"]["probability"] = float(rng.random())
            shares = rng.dirichlet([1] * (len(votes["voter"]) or 1)).tolist()
            votes["voter"] = [[answer, x] for (answer, _), x in zip(votes["voter"], shares)]
            votes["self_reflection"] = [[golds[rng.integers(len(golds))], 1.0]]
        return policies.StoredQuestion(row, judge)

    for expert in ("useless", "real", "perfect"):
        train, test = ([q if expert == "real" else changed(q, expert) for q in run[part]] for part in ("held_out", "fresh"))
        policy = policies.fit_controller(train, SIZES, policies.PURCHASES[1:])
        policy.rate = 0.2
        spent = [policy.replay(q) for q in test]
        right = np.array([s.correct for s in spent], float)
        rows[f"{name}, {expert} Expert"] = {"accuracy": float(right.mean()), "calls": float(np.mean([s.calls for s in spent])),
                                            "minus majority": frontier.paired_difference(run["known"]["majority"], right)}
    return rows


def training_adds(results):
    """Accuracy of each recipe less the base's at equal calls, with each signal, on the questions that all answered."""
    rows, number = {}, min(len(run["fresh"]) for runs in results.values() for run in runs)
    for recipe, runs in results.items():
        for way in ("gate by C", "gate by p", "policy") if recipe != "base" else ():
            row = rows[f"{recipe} - base, {way}"] = {}
            for budget in (0.2, 0.4, 0.6, 0.8, 1.0):
                ours, base = (np.mean([at(run["ways"][way], budget)[0][:number] for run in given], 0)
                              for given in (runs, results["base"]))
                row[f"{budget} calls"] = frontier.paired_difference(base, ours)
    return rows


def draw(curves, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(3, len(curves), figsize=(4.2 * len(curves), 10.5), sharey=True, squeeze=False)
    styles = {"policy": ("C3", "-o"), "gate by C": ("C0", "-"), "gate by p": ("C2", "-"), "gate by share": ("C1", "-"),
              "random": ("0.6", "--"), "tuned tau": ("k", "-"), "CA-TTS, tau = .5": ("k", "s")}
    units = ((0, "Expert calls a question"), (2, "tokens a question"), (3, "CPU seconds a question"))
    for column, (name, ways) in zip(axes.T, curves.items()):
        column[0].set_title(name)
        for axis, (unit, label) in zip(column, units):
            for way, points in ways.items():
                color, style = styles[way]
                points = sorted((point[unit], point[1]) for point in points)
                axis.plot(*zip(*points), style, color=color, label=way, markersize=5)
            axis.set_xlabel(label)
            axis.grid(alpha=0.3)
    for row in axes:
        row[0].set_ylabel("accuracy, questions nothing was fitted on")
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


# ---- Seconds

def measure_seconds(path, number=24):
    """CPU seconds of each purchase, one question at a time -> seconds.json."""
    expert = LocalExpert(VLM.load(ROOT / "tiny" / "expert"), catts.Settings().expert_tokens)
    controller = catts.Controller(VLM.load(path), expert, ClipAttention.from_pretrained(), catts.Settings())
    table = {}
    for i, sample in enumerate(data.load("synthetic", "val", number + 2, 1)):
        state, at_once = (QuestionState(sample, sample.pictures(), Result(sample.id)) for _ in range(2))
        steps = {f"samples {first}-{n}": controller.draw([state], n) for first, n in zip([0, *SIZES], SIZES)}
        steps |= {m: controller.run(policies.MODULE_OF.get(m, m), [state]) for m in policies.PURCHASES[1:]}
        steps["samples 0-8"] = controller.draw([at_once], SIZES[-1])
        for name, step in steps.items():
            start = time.process_time()
            run_through(step)
            if i >= 2:                      # the first warm up
                table.setdefault(name, []).append(time.process_time() - start)
    (FOLDER / "seconds.json").write_text(json.dumps({k: round(float(np.mean(v)), 4) for k, v in table.items()}, indent=1))


def measure_planner(path, number=60):
    """A fixed order, a Planner that knows nothing, and an informed one that may stop -> planner.json."""
    expert, base = LocalExpert(VLM.load(ROOT / "tiny" / "expert"), catts.Settings().expert_tokens), VLM.load(path)
    samples, rows = list(data.load("synthetic", "test", number, 0)), {}
    for order in ("auto", "planner", "informed"):
        settings = catts.Settings(order=order)
        found = catts.Controller(base, expert, ClipAttention.from_pretrained(), settings).answer_all(samples)
        rows[f"--order {order}"] = {
            "questions": number, "accuracy": float(np.mean([r.correct for r in found])),
            "calls": float(np.mean([r.ledger.expert_calls for r in found])),
            "lists read": sum("planner" in r.texts for r in found),
            "stopped": sum("stop" in r.texts.get("planner", "") for r in found)}
    (FOLDER / "planner.json").write_text(json.dumps(rows, indent=1))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--collect", nargs=3, metavar=("RECIPE", "SEED", "MODEL"), help="collect a model's votes first")
    parser.add_argument("--seconds", metavar="MODEL", help="measure the seconds of each purchase first")
    parser.add_argument("--planner", metavar="MODEL", help="measure orders of the modules first")
    parser.add_argument("--fit_questions", type=int, default=300)
    parser.add_argument("--questions", type=int, default=500, help="of the test split, for each seed of it")
    parser.add_argument("--question_seeds", type=int, default=1)
    args = parser.parse_args()
    if args.seconds:
        measure_seconds(args.seconds)
    if args.planner:
        measure_planner(args.planner)
    if args.collect:
        recipe, seed, path = args.collect
        collect(f"{recipe}-{seed}", path, "val", 0, args.fit_questions)
        for question_seed in range(args.question_seeds):
            collect(f"{recipe}-{seed}", path, "test", question_seed, args.questions)
    results, texts, curves, abstained, few, others = {}, [], {}, {}, {}, {}
    for recipe in RECIPES:
        seeds = sorted(path.name.split("-")[1] for path in FOLDER.glob(f"{recipe}-*-test-0.jsonl.gz"))
        if seeds:
            results[recipe] = [run_of(recipe, seed) for seed in seeds]
            text, curves[recipe] = report(recipe, results[recipe])
            texts.append(text)
            print(text, flush=True)
            for seed, run in zip(seeds, results[recipe]):
                abstained |= abstention(f"{recipe} {seed}", run["served"][0.5])
                few |= few_questions(f"{recipe} {seed}", run)
                others |= other_experts(f"{recipe} {seed}", run)
    sections = {"What training adds at equal calls": training_adds(results),
                "Abstention at half a call a question: thresholds certified on 10 draws": abstained,
                "Orders of the modules, CA-TTS with tau = .5": json.loads((FOLDER / "planner.json").read_text()),
                "Fitted on 100 questions, --budget 1": few, "Another Expert, at the same rate (.2 of P a call)": others}
    tail = "\n".join(line for title, rows in sections.items() if rows for line in (f"## {title}", "", "```", cli.table(rows), "```", ""))
    print(tail)
    page = ROOT / "results" / "policy.md"
    head = page.read_text().split("<!-- measured -->")[0]
    page.write_text(head + "<!-- measured -->\n\n" + "\n".join(texts) + "\n" + tail)
    draw(curves, ROOT / "results" / "policy.png")


if __name__ == "__main__":
    cli.command("policy.py", main)
