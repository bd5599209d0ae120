"""Does the model know when it does not know? Methods, metrics, scaling, and the probe of the paper's Figure 1.

    python eval.py --model runs/cdrl --baseline tiny/base          # both on the built-in questions: tables, report.html
    python eval.py --model runs/qwen7b --data MMStar.tsv --expert https://host/v1 --expert_model NAME

Two files are stored for each model, a line a question, resumable and split over torchrun's ranks: votes.jsonl (samples,
and every module's votes) and probe.jsonl (answers under noise). Every table is recomputed from them: a row is measured,
never inferred. Unanswered counts as wrong. Intervals are bootstrapped by question, differences are paired.

Left out on purpose: an LLM as the judge; the rules of reward.py decide.
"""
import argparse
import json
import math
import re
import sys
import zlib
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

import catts
import data
import report
from catts import Vote, sample_votes, share_of, spoken, tally, winner
from data import InputError, command
from noise import MODES, ClipAttention, make_pair, parse_t
from probe import (
    PROBE_STEPS,
    auroc,
    bootstrap,
    calibrated,
    calibration_error,
    cross_fitted,
    first_half,
    interval,
    metrics,
    plot_probe,
    probed,
    prober,
    reliability_points,
    risk_coverage,
    summaries,
    threshold_for,
)
from reward import accepts, extract_answer
from vlm import VLM

HERE = Path(__file__).resolve().parent


# ---------------------------------------------------------------------------------------------------------------------
# Methods: one stored run of samples and votes, from which every table is recomputed

class Memo:
    """An Expert that is asked the same thing once. What it said before counts as asked anew: costs stay those of a method
    that runs alone."""

    def __init__(self, expert):
        self.expert, self.said = expert, {}

    def ask(self, turns, attempt=0):
        keys = [(attempt, prompt, *(zlib.crc32(p.tobytes()) for p in pictures)) for pictures, prompt in turns]
        new = {key: turn for key, turn in zip(keys, turns) if key not in self.said}
        self.said |= dict(zip(new, self.expert.ask(list(new.values()), attempt))) if new else {}
        return [self.said[key] for key in keys]


def collector(controller, sizes):
    """-> a function: batch of samples -> rows for `catts.answer_file`, with all that the methods need.

    The largest of `sizes` samples a question; the votes of every module for the first n of them, for each n; the greedy
    answer, the one with the plausibility cut alone (alpha = 0), and the Expert's own.
    """
    vlm, settings, checker = controller.vlm, controller.settings, controller.checker
    length = {"max_new_tokens": settings.max_new_tokens}

    def collect(batch):
        pictures, prompts = [s.pictures() for s in batch], [data.prompt(s) for s in batch]
        groups = vlm.sample(pictures, prompts, max(sizes), temperature=settings.temperature, top_k=settings.top_k,
                            seed=[f"{settings.seed} {s.id}" for s in batch], **length)
        greedy = [group[0] for group in vlm.sample(pictures, prompts, greedy=True, **length)]
        cut = checker.contrast(pictures, pictures, prompts, alpha=0, beta=settings.check_beta, **length) if checker else None
        expert, own = controller.expert, controller.expert.ask(list(zip(pictures, prompts)))
        controller.expert = Memo(expert)
        found = {n: controller.answer_all(batch, [group[:n] for group in groups]) for n in sizes}
        controller.expert = expert
        rows = []
        for i, sample in enumerate(batch):
            row = found[max(sizes)][i].record(sample, settings.window)
            row = {key: row[key] for key in ("id", "gold", "choices", "question", "source", "meta", "samples")}
            row |= {"greedy": spoken(greedy[i], sample), "cut_only": spoken(cut[i], sample) if cut else None}
            answer = extract_answer(own[i].text, sample.choices)
            row["expert"] = {"answer": answer, "correct": accepts(answer, sample), "tokens": own[i].tokens}
            row["by_n"] = {str(n): {"ran": list(votes), "votes": votes, "parts": r.ledger.parts, "notes": r.ledger.notes,
                                    "said": r.said, "order": r.order}
                           for n, results in found.items() for r in [results[i]] for votes in [r.by_source()]}
            rows.append(row)
        return rows
    return collect


@dataclass
class Outcome:
    """What a method made of one question: confidence in [0, 1] or nan; tokens, a contrasted one counting twice, the
    Expert's included; calls of the Expert."""
    id: str
    confidence: float
    correct: bool
    tokens: int
    calls: int = 0


LETTER = {"voter": "V", "self_reflection": "R", "self_check": "C"}


def outcomes(row, n, settings):
    """One stored row -> {method: [Outcome, ...]}; several for pass@1, one each for the others.

    Every subset of the modules is recomputed from its own stored votes: InputError when a module's votes are gone.
    """
    sample = data.Sample(row["id"], [], row["question"], row["gold"], row["choices"], row["source"], row["meta"])
    run, drawn = row["by_n"][str(n)], row["samples"][:n]
    parts = run["parts"]

    def single(said):
        return [Outcome(row["id"], math.exp(said["logprob"]), said["correct"], said["tokens"])]

    def voted(votes, tokens, calls=0):
        rows = tally(votes, taus, sample.choices)
        best = winner(rows)
        return [Outcome(row["id"], share_of(best, rows), best is not None and accepts(best.answer, sample), tokens, calls)]

    def samples(**change):
        return sample_votes([s["answer"] for s in drawn], [s["confidence"][settings.reading] for s in drawn],
                            [math.exp(s["logprob"]) for s in drawn], replace(settings, **change))

    taus = settings.taus()
    tokens = sum(s["tokens"] for s in drawn)
    found = {"pass@1": [outcome for s in drawn for outcome in single(s)], "greedy": single(row["greedy"])}
    if row["cut_only"]:
        found["greedy, cut only"] = single(row["cut_only"])
    found |= {f"majority@{n}": voted(samples(weight="equal"), tokens), f"weighted@{n}": voted(samples(), tokens),
              f"filtered@{n}": voted(samples(top_share=0.5), tokens),
              "expert alone": [Outcome(row["id"], float("nan"), row["expert"]["correct"], row["expert"]["tokens"], 1)]}
    part = defaultdict(lambda: defaultdict(int), {name: defaultdict(int, cost) for name, cost in parts.items()})
    cost = {"voter": (part["voter"]["expert_tokens"], part["voter"]["expert_calls"]),
            "self_reflection": (part["critic"]["expert_tokens"] + part["self_reflection"]["tokens"],
                                part["critic"]["expert_calls"]),
            "self_check": (2 * part["self_check"]["tokens"], 0)}
    modules = [source for source in LETTER if source in run["ran"]]
    for size in range(1, len(modules) + 1):
        for subset in combinations(modules, size):
            for source in subset:
                if source not in run["votes"]:
                    raise InputError(f"question {row['id']!r}: the votes of {source} for {n} samples are gone; collect again")
            votes = samples() + [Vote(source, *vote) for source in subset for vote in run["votes"][source]]
            name = "CA-TTS" if len(subset) == len(LETTER) else "+" + "".join(LETTER[source] for source in subset)
            found[f"{name}@{n}"] = voted(votes, tokens + sum(cost[s][0] for s in subset), sum(cost[s][1] for s in subset))
            if subset == ("self_check",):
                check = run["votes"]["self_check"]
                found["greedy VCD"] = [Outcome(row["id"], float("nan"), bool(check) and accepts(check[0][0], sample),
                                               cost["self_check"][0])]
    return found


def by_method(rows, n, settings):
    """Stored rows -> {method: list of Outcome over all questions}."""
    found = defaultdict(list)
    for row in rows:
        for method, some in outcomes(row, n, settings).items():
            found[method] += some
    return dict(found)


CALIBRATED = "pass@1, c"


def methods_of(votes, settings, scale):
    """{model name: stored rows} -> {model name: `by_method`}. scale: the map of a training run's confidence.json, or None;
    with it, `CALIBRATED` is pass@1 once more, its confidence c = sigmoid(slope * C + intercept): the probability that the
    run trained, by a map that was fitted on the base before the first step and is the same for every model here."""
    found = {}
    for name, rows in votes.items():
        found[name] = by_method(rows, settings.samples, settings)
        if scale:
            drawn = [(row["id"], s) for row in rows for s in row["samples"][:settings.samples]]
            c = calibrated([s["confidence"]["mean"] for _, s in drawn], scale)
            found[name][CALIBRATED] = [Outcome(i, p, s["correct"], s["tokens"]) for (i, s), p in zip(drawn, c.tolist())]
    return found


def stored_scale(paths):
    """confidence.json of the first of the model directories that has one and judged C of Eq. 3, else None."""
    found = (json.loads(file.read_text()) for path in paths if (file := Path(path) / "confidence.json").is_file())
    return next((scale for scale in found if scale.get("judged") == "topk"), None)


def arrays(some):
    """List of Outcome -> ids, confidence (N,), correct (N,)."""
    return [o.id for o in some], np.array([o.confidence for o in some]), np.array([o.correct for o in some], float)


def method_row(some):
    """List of Outcome -> one row of the methods' table."""
    _, confidence, correct = arrays(some)
    known = metrics(confidence, correct) if np.isfinite(confidence).all() else defaultdict(lambda: float("nan"))
    shown = ("auroc", "ece", "brier", "aurc", "accuracy@80")
    return {"accuracy": float(correct.mean()), **{name: known[name] for name in shown},
            "tokens": float(np.mean([o.tokens for o in some])), "calls": float(np.mean([o.calls for o in some]))}


# ---------------------------------------------------------------------------------------------------------------------
# Tables: plain dicts of numbers; a triple is (value, low, high), a 95% interval clustered by question

ROUNDS = 1000
STATISTICS = {"accuracy": lambda confidence, correct: float(correct.mean()), "auroc": auroc, "ece": calibration_error}


def resampled(some):
    """List of Outcome -> `bootstrap` of every statistic that its confidence allows."""
    ids, confidence, correct = arrays(some)
    known = STATISTICS if np.isfinite(confidence).all() else {"accuracy": STATISTICS["accuracy"]}
    return bootstrap(ids, confidence, correct, known, ROUNDS)


def summarise(some, boot):
    """List of Outcome and its `resampled` -> `method_row` with intervals."""
    return method_row(some) | {name: (STATISTICS[name](*arrays(some)[1:]), *interval(values)) for name, values in boot.items()}


def paired(first, second, boots):
    """second minus first, both lists of Outcome on the same questions, boots their two `resampled`
    -> {statistic: (difference, low, high)}."""
    found = {}
    for name in boots[0].keys() & boots[1].keys():
        values = [float(STATISTICS[name](*arrays(some)[1:])) for some in (first, second)]
        found[name] = (values[1] - values[0], *interval(boots[1][name] - boots[0][name]))
    return {name: found[name] for name in STATISTICS if name in found}


def groups_of(rows):
    """{id: labels}: skill, level, category and question type, for tables within them; a label is "what: value"."""
    found = {}
    for row in rows:
        meta = row["meta"]
        labels = [f"{name}: {meta[name]}" for name in ("skill", "level", "category", "subject") if name in meta]
        found[row["id"]] = [*labels, "type: multiple choice" if row["choices"] else "type: open"]
    return found


def slope(accuracies, sizes):
    """Least-squares slope of accuracy per log2 N. accuracies (..., len(sizes))."""
    x = np.log2(sizes) - np.mean(np.log2(sizes))
    return (accuracies * x).sum(-1) / (x**2).sum()


def scaling(rows, sizes, settings):
    """Accuracy against N for the methods that scale, and its slope per log2 N in points, with intervals."""
    found, by_n = {}, {n: by_method(rows, n, settings) for n in sizes}
    for name in sorted({method.split("@")[0] for method in by_n[sizes[-1]] if method.endswith(f"@{sizes[-1]}")}):
        table = np.array([[o.correct for o in by_n[n][f"{name}@{n}"]] for n in sizes], float).T             # (Q, sizes)
        draws = np.random.default_rng(0).integers(len(table), size=(ROUNDS, len(table)))
        means = table[draws].mean(1)                                                                        # (rounds, sizes)
        found[name] = {str(n): (float(table[:, i].mean()), *interval(means[:, i])) for i, n in enumerate(sizes)}
        found[name]["slope"] = tuple(100 * v for v in (float(slope(table.mean(0), sizes)), *interval(slope(means, sizes))))
        found[name]["tokens"] = {str(n): float(np.mean([o.tokens for o in by_n[n][f"{name}@{n}"]])) for n in sizes}
    return found


def at_equal_cost(scaled, n):
    """CA-TTS with n samples against majority at the same tokens, interpolated in log tokens between the measured N."""
    if "CA-TTS" not in scaled:
        return {}
    cost = scaled["CA-TTS"]["tokens"][str(n)]
    tokens, accuracy = zip(*((scaled["majority"]["tokens"][size], scaled["majority"][size][0])
                             for size in scaled["majority"]["tokens"]))
    inside = tokens[0] <= cost <= tokens[-1]
    return {"tokens": cost, "CA-TTS": scaled["CA-TTS"][str(n)][0],
            "majority": float(np.interp(math.log(cost), np.log(tokens), accuracy)) if inside else math.nan}


def calibration(methods, names):
    """ECE and Brier as they are, and after a map fitted on the other half of the questions."""
    found = {}
    for name in names:
        ids, confidence, correct = arrays(methods[name])
        found[name] = {"ece": calibration_error(confidence, correct), "brier": float(((confidence - correct) ** 2).mean())}
        for kind in ("platt", "isotonic"):
            mapped = cross_fitted(ids, confidence, correct, kind)
            if np.isfinite(mapped).all():
                found[name] |= {f"ece, {kind}": calibration_error(mapped, correct),
                                f"brier, {kind}": float(((mapped - correct) ** 2).mean())}
    return found


def abstention(some, risk):
    """A threshold for a target risk, fitted on one half of the questions, and what it does on the other half."""
    ids, confidence, correct = arrays(some)
    half = first_half(ids)
    if half.all() or not half.any():
        return {"threshold": math.inf, "target risk": risk, "coverage": math.nan, "risk": math.nan}
    threshold, _, _ = threshold_for(confidence[half], correct[half], risk)
    kept = confidence[~half] >= threshold
    return {"threshold": threshold, "target risk": risk, "coverage": float(kept.mean()),
            "risk": float(1 - correct[~half][kept].mean()) if kept.any() else math.nan}


def make_tables(votes, probes, settings, sizes, regions, ts, risk, scale=None):
    """Everything that is reported, from stored rows. votes, probes: {model name: rows}; scale: see `methods_of`."""
    n, last = settings.samples, max(ts)
    methods = methods_of(votes, settings, scale)
    best = f"CA-TTS@{n}" if all(f"CA-TTS@{n}" in found for found in methods.values()) else f"majority@{n}"
    shown = ["pass@1", *([CALIBRATED] if scale else []), f"majority@{n}", *([best] if best != f"majority@{n}" else [])]
    boots = {name: {method: resampled(some) for method, some in found.items()} for name, found in methods.items()}
    tables = {"methods": {name: {method: summarise(some, boots[name][method]) for method, some in found.items()}
                          for name, found in methods.items()}}
    names = list(votes)
    if len(names) == 2:
        both = [method for method in methods[names[1]] if method in methods[names[0]]]
        tables["difference"] = {method: paired(*(methods[name][method] for name in names),
                                               [boots[name][method] for name in names]) for method in both}
    majority = f"majority@{n}"
    tables["against majority"] = {name: {method: {"accuracy": paired(
        found[majority], found[method], [boots[name][majority], boots[name][method]])["accuracy"]}
        for method in found if method.endswith(f"@{n}") and method != majority} for name, found in methods.items()}
    tables["within"] = {}
    for name, rows in votes.items():
        labels = groups_of(rows)
        for label in sorted({label for some in labels.values() for label in some}):
            for method in shown:
                part = [o for o in methods[name][method] if label in labels[o.id]]
                row = method_row(part)
                tables["within"][f"{name}, {label}, {method}"] = {"n": len({o.id for o in part})} | {
                    key: row[key] for key in ("accuracy", "auroc", "ece", "brier")}
    tables["calibration"] = {name: calibration(found, shown) for name, found in methods.items()}
    tables["scaling"] = {name: scaling(rows, sizes, settings) for name, rows in votes.items()} if len(sizes) > 1 else {}
    tables["equal cost"] = {name: at_equal_cost(found, n) for name, found in tables["scaling"].items()}
    tables["abstention"] = {name: {"method": best} | abstention(found[best], risk) for name, found in methods.items()}
    tables["probe"] = {f"{name}, {region}, {part}": row for name, rows in probes.items() for region in regions
                       for part, row in summaries(probed(rows, region, 0), probed(rows, region, last)).items()}
    tables["curves"] = {name: {region: {field: {str(t): float(np.mean([getattr(a, field) for a in probed(rows, region, t)]))
                                                for t in ts} for field in ("correct", "token_probability", "confidence")}
                               for region in regions} for name, rows in probes.items()}
    return tables


# ---------------------------------------------------------------------------------------------------------------------
# The page

def make_report(tables, votes, settings, sizes, samples, clip, folders, lead, scale=None):
    """report.html from the tables, the stored votes, and a run folder's metrics.jsonl where there is one -> str."""
    methods = methods_of(votes, settings, scale)
    best = next(iter(tables["abstention"].values()))["method"]
    sections = [(f"Methods: {name}", "Value and 95% interval, clustered by question. Tokens: generated, a contrasted one "
                 "counting twice, the Expert's included.", [report.table(found)]) for name, found in tables["methods"].items()]
    if "difference" in tables:
        sections.append((f"Difference: {' against '.join(reversed(list(votes)))}", "Paired by question.",
                         [report.table(tables["difference"])]))
    for heading, kind in (("Reliability", reliability_points), ("Risk and coverage", risk_coverage)):
        labels = ("confidence", "accuracy") if kind is reliability_points else ("coverage", "risk")
        charts = [report.chart({name: kind(*arrays(found[method])[1:]) for name, found in methods.items()}, method, *labels,
                               diagonal=kind is reliability_points, xlim=(0, 1), ylim=(0, 1))
                  for method in ("pass@1", *([CALIBRATED] if scale else []), best)]
        sections.append((heading, "", charts))
    sections.append(("Calibration", "As it is, and after a map fitted on the other half of the questions.",
                     [report.table({f"{name}, {method}": row for name, found in tables["calibration"].items()
                                    for method, row in found.items()})]))
    charts = [report.chart({f"{name}, {region}": [(float(t), y) for t, y in curves[field].items()]
                            for name, by_region in tables["curves"].items() for region, curves in by_region.items()},
                           title, "noise step t", title, ylim=None if field == "confidence" else (0, 1))
              for field, title in (("correct", "accuracy"), ("token_probability", "mean token probability"),
                                   ("confidence", "confidence C"))]
    sections.append(("The probe: does confidence follow perception?", "Noise on the region where the evidence lies, and on two "
                     "controls of the same area.", [*charts, report.table(tables["probe"])]))
    if tables["scaling"]:
        shown = ("majority", "weighted", "CA-TTS")
        charts = [report.chart({method: [(float(size), *found[method][str(size)]) for size in sizes] for method in shown
                                if method in found}, f"{name}: accuracy against N", "samples N", "accuracy", log=True)
                  for name, found in tables["scaling"].items()]
        charts += [report.chart({method: sorted((found[method]["tokens"][str(size)], found[method][str(size)][0])
                                                for size in sizes) for method in shown if method in found},
                                f"{name}: accuracy against cost", "tokens a question", "accuracy")
                   for name, found in tables["scaling"].items()]
        sections.append(("Scaling", "Slope: points of accuracy per log2 N.", charts + [report.table(
            {f"{name}, {method}": {key: value for key, value in row.items() if key != "tokens"}
             for name, found in tables["scaling"].items() for method, row in found.items()})]))
    sections.append(("Abstention", "A threshold fitted on half of the questions, tried on the other half.",
                     [report.table(tables["abstention"])]))
    sections.append(("Within skill, level and type", "Pooled numbers lie.", [report.table(tables["within"])]))
    for name, folder in folders.items():
        if (log := Path(folder) / "metrics.jsonl").is_file():
            steps = [json.loads(line) for line in log.read_text().splitlines() if line.strip()]
            terms = ("reward", "perception", "calibration", "outcome", "format")
            charts = [report.chart({term: [(row["step"], row[f"{view}/{term}"]) for row in steps] for term in terms},
                                   f"{name}: {view} view", "step", "mean reward")
                      for view in ("original", "noised") if f"{view}/reward" in steps[0]]
            sections.append(("Training", "Each term of the reward, by view.", charts))
    sections.append(("Cases", "Picture, noised twin, samples, votes, verdict: where CA-TTS mends the majority, where it spoils "
                     "it, where both fail, and where both are right.", cases(votes, settings, samples, clip)))
    return report.page("Does it know when it does not know?", lead, sections)


def cases(votes, settings, samples, clip, each=3):
    """A dozen questions of the last model -> list of HTML."""
    n, rows = settings.samples, list(votes.values())[-1]
    by_id, kinds, taus = {s.id: s for s in samples}, defaultdict(list), settings.taus()
    for row in rows:
        found = outcomes(row, n, settings)
        verdict = found.get(f"CA-TTS@{n}", found[f"majority@{n}"])[0].correct
        kinds[(verdict, found[f"majority@{n}"][0].correct)].append(row)
    picked = [row for kind in ((True, False), (False, True), (False, False), (True, True)) for row in kinds[kind][:each]]
    blocks = []
    for row in picked:
        sample, run = by_id[row["id"]], row["by_n"][str(n)]
        drawn = row["samples"][:n]
        cast = [Vote(source, *vote) for source, some in run["votes"].items() for vote in some]
        table = tally(cast, taus, sample.choices)
        best = winner(table)
        noised = make_pair(sample.pictures(), sample.question, clip, parse_t(settings.noise_t), settings.region, settings.mass,
                           f"{settings.seed} {sample.id}")
        blocks.append(report.case(
            [report.picture(image) for image in (sample.pictures()[0], noised[0])], sample.question, sample.answer,
            [(s["text"], math.exp(s["logprob"]), s["correct"]) for s in drawn[:4]],
            {r.answer: {source: taus[source] * r.shares.get(source, 0.0) for source in taus} | {"total": r.total}
             for r in table}, str(best.answer if best else None), best is not None and accepts(best.answer, sample)))
    return blocks


def load_questions(args):
    """The questions of --data, each with an answer. Raises InputError; without --strict a question without one is left out."""
    samples = data.load(args.data or "synthetic", "test", args.limit, args.data_seed, args.strict)
    missing = [s.id for s in samples if s.answer is None]
    if missing and (args.strict or len(missing) == len(samples)):
        raise InputError(f"question {missing[0]!r} of {args.data!r} has no answer ({len(missing)} such); evaluation needs one")
    if missing:
        print(f"left out: {len(missing)} questions without an answer, {missing[0]!r} the first", file=sys.stderr)
    return [s for s in samples if s.answer is not None] if missing else samples


def main(argv=None):
    parser = argparse.ArgumentParser(description="Methods, calibration, scaling and the probe, for one model or two.")
    catts.add_sources(parser)
    parser.add_argument("--baseline", help="a second model to hold it against")
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of samples for the scaling curves; default "
                        "1 2 4 8 16 32 on the built-in questions, else --samples alone")
    parser.add_argument("--regions", nargs="+", default=["key", "random", "inverse"], choices=MODES, help="of the probe")
    parser.add_argument("--t", type=int, nargs="+", default=list(PROBE_STEPS), help="noise steps of the probe; 0 is always run")
    parser.add_argument("--probe_samples", type=int, default=4, help="answers a question at each step of the probe")
    parser.add_argument("--target_risk", type=float, default=0.1, help="share of wrong answers that abstention aims at")
    parser.add_argument("--output", default="runs/eval", help="folder for what is measured")
    parser.add_argument("--json", action="store_true", help="print tables.json")
    data.add_options(parser, catts.Settings)
    parser.set_defaults(limit=200, batch_size=50)
    args = parser.parse_args(argv)
    settings = catts.Settings(**{name: getattr(args, name) for name in catts.Settings.__dataclass_fields__})
    if settings.early_exit != "off":
        raise InputError(f"--early_exit is {settings.early_exit!r}; here every module must vote, leave it off")
    if args.probe_samples < 1 or not 0 < args.target_risk < 1:
        raise InputError(f"--probe_samples {args.probe_samples} must be at least 1, --target_risk {args.target_risk} between 0 "
                         "and 1")
    built_in = (args.data or "synthetic") == "synthetic"
    sizes = sorted({*(args.sizes or ([1, 2, 4, 8, 16, 32] if built_in else [])), settings.samples})
    if sizes[0] < 1:
        raise InputError(f"--sizes {sizes[0]} must be at least 1")
    ts, output = sorted({0, *(parse_t(t)[0] for t in args.t)}), Path(args.output)
    samples = load_questions(args)
    paths = list(filter(None, (args.baseline, args.model)))
    names = [Path(path).name for path in paths] if len({Path(path).name for path in paths}) == len(paths) else paths
    votes, probes, frame = {}, {}, {key: value for key, value in vars(args).items() if key not in (
        *catts.FREE, "model", "baseline", "target_risk")}
    for name, path in zip(names, paths):
        controller = catts.build(args, settings, path)
        folder = output / re.sub(r"[^\w.-]+", "_", name)
        votes[name] = catts.answer_file(collector(controller, sizes), samples, folder / "votes.jsonl",
                                        frame | {"sizes": sizes, "model": path}, args.batch_size, f"{name}: votes", args.strict)
        if isinstance(controller.vlm, VLM):
            probes[name] = catts.answer_file(
                prober(controller.vlm, controller.clip, args.regions, ts, settings.mass, args.probe_samples, settings.seed,
                       max_new_tokens=settings.max_new_tokens),
                samples, folder / "probe.jsonl", frame | {"model": path}, args.batch_size, f"{name}: probe", args.strict)
    if votes[names[0]] is None:             # not the first rank
        return
    ids = [s.id for s in samples]
    votes, probes = ({name: [rows[i] for i in ids if i in rows] for name, rows in found.items()} for found in (votes, probes))
    if not all(votes.values()):
        raise InputError(f"no question of {args.data!r} could be answered; every picture is broken")
    scale = stored_scale(paths[::-1])
    tables = make_tables(votes, probes, settings, sizes, args.regions, ts, args.target_risk, scale)
    first = next(iter(votes.values()))
    lead = (f"{len(first)} questions of {args.data or 'the built-in test split'}, N = {settings.samples}, "
            f"noise at t = {max(ts)}, seed {settings.seed}; {' and '.join(map(data.shown, paths))}; "
            f"Expert {data.shown(args.expert)}; torch {torch.__version__}.")
    if scale:
        lead += f" c = sigmoid({scale['slope']:.3g} C {scale['intercept']:+.3g}), a map fixed before the training began."
    data.write_atomically(output / "tables.json", data.strict_json({"about": lead, **tables}, indent=1))
    threshold = tables["abstention"][names[-1]]
    data.write_atomically(output / "threshold.json", data.strict_json(threshold, indent=1))
    clip = controller.clip or ClipAttention.from_pretrained(args.clip)
    (output / "report.html").write_text(make_report(tables, votes, settings, sizes, samples, clip,
                                                    dict(zip(names, paths)), lead, scale))
    if probes:
        draw_probe(output / "probe.png", {f"{name}, {region}": {t: probed(rows, region, t) for t in ts}
                                          for name, rows in probes.items() for region in args.regions})
    if args.json:
        print(data.strict_json(tables))
        return
    for name, found in tables["methods"].items():
        print(f"\n{name}: {lead}")
        print(data.table({method: {key: value[0] if isinstance(value, tuple) else value for key, value in row.items()}
                          for method, row in found.items()}))
    if probes:
        print("\nThe probe")
        print(data.table(tables["probe"]))
    print(f"\nwrote {output}/: report.html, tables.json, threshold.json, probe.png and the stored votes")
    print(f"next: python catts.py tiny/example.png \"How many red crosses are there?\" --model {data.shown(args.model)} "
          f"--abstain {output}/threshold.json")


def draw_probe(path, named):
    """probe.png: accuracy, token probability and C against noise. named: {label: {t: list of Answer}}."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4))
    for axis, field, ylabel in zip(axes, ("correct", "token_probability", "confidence"),
                                   ("accuracy", "mean token probability", "confidence C")):
        plot_probe(axis, named, field, ylabel)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    command("eval.py", main)
