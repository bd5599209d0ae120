"""Does the model know when it does not know? Methods, metrics, scaling, and the probe of the paper's Figure 1.

    python eval.py --model runs/cdrl --baseline tiny/base          # both on the built-in questions: tables, report.html
    python eval.py --model runs/qwen7b --data MMStar.tsv --expert https://host/v1 --expert_model NAME

Two files are stored for each model, a line a question, resumable and split over torchrun's ranks: votes.jsonl (samples,
and every module's votes) and probe.jsonl (answers under noise). Every table is recomputed from them: a row is measured,
never inferred. Unanswered counts as wrong. Intervals are bootstrapped by question, differences are paired. A file gets
at least twice --samples answers a question, so that majority voting can be held against CA-TTS at the same number of tokens.

Left out on purpose: an LLM as the judge; the rules of judge.py decide.
"""
import argparse
import json
import math
import os
import re
import shlex
import zlib
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

import catts
import data
import probe
import report
from catts import Vote, sample_votes, share_of, spoken, tally, winner
from data import InputError, command
from noise import MODES, ClipAttention, make_pair, parse_t
from probe import PROBE_STEPS, bootstrap, calibrated, interval, mean_interval, metrics, probed
from utils.judge import accepts, extract_answer
from vlm import VLM

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


def collector(controller, sizes, drawn):
    """-> a function: batch of samples -> rows for `catts.answer_file`, with all that the methods need.

    `drawn` samples a question; the votes of every module for the first n of them, for each n of `sizes`; the greedy answer,
    the one with the plausibility cut alone (alpha = 0), and the Expert's own.
    """
    vlm, settings, checker = controller.vlm, controller.settings, controller.checker
    length = {"max_new_tokens": settings.max_new_tokens}

    def collect(batch):
        pictures, prompts = [s.pictures() for s in batch], [data.prompt(s) for s in batch]
        groups = vlm.sample(pictures, prompts, drawn, temperature=settings.temperature, top_k=settings.top_k,
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
            row = {key: row[key] for key in ("id", "gold", "choices", "question", "source", "meta")}
            row |= {"samples": [spoken(r, sample, settings.window) for r in groups[i]],
                    "greedy": spoken(greedy[i], sample), "cut_only": spoken(cut[i], sample) if cut else None}
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
# Whose work each module's vote takes, as the ledger's parts name it.
WORKERS = {"voter": ("voter",), "self_reflection": ("critic", "self_reflection"), "self_check": ("self_check",)}


def method_of(modules):
    """The name of a subset of LETTER's modules, added to the samples' weighted vote."""
    return {0: "weighted", len(LETTER): "CA-TTS"}.get(len(modules), "+" + "".join(LETTER[source] for source in modules))


def modules_of(row, n):
    """The modules that ran on the first n samples of a stored row, in the table's order."""
    return tuple(source for source in LETTER if source in row["by_n"][str(n)]["ran"])


def check_rows(rows, sizes, drawn, modules):
    """Every stored row holds what the tables need, and votes of all `modules` (sources). Raises InputError that names the
    question."""
    for row in rows:
        try:
            wrong = _missing(row, sizes, drawn)
            if not wrong and any(set(modules_of(row, n)) != set(modules) for n in sizes):
                wrong = f"other modules than {', '.join(modules) or 'none'}"
        except (KeyError, TypeError, AttributeError) as error:
            wrong = f"no {error}"
        if wrong:
            raise InputError(f"question {row['id']!r} has {wrong} in the stored votes; remove its line, and the same command "
                             "collects it again")


def _missing(row, sizes, drawn):
    """What a stored row lacks, "" if nothing. KeyError or the like where a whole part of it is gone."""
    row["greedy"]["correct"], row["cut_only"], row["expert"]["correct"], row["meta"], row["choices"]
    if len(row["samples"]) != drawn:
        return f"{len(row['samples'])} samples, not {drawn},"
    for n in sizes:
        run = row["by_n"][str(n)]
        for source in run["ran"]:
            if source not in run["votes"] or not run["votes"][source] and not run["notes"]:     # who abstains says why
                return f"no votes of {source} for {n} samples"
            if run["votes"][source] and not run["parts"].keys() >= {*WORKERS.get(source, ())}:
                return f"no cost of {source} for {n} samples"
    return ""


def outcomes(row, n, settings):
    """One stored row -> {method: [Outcome, ...]}; several for pass@1, one each for the others.

    Every subset of the modules is recomputed from its own stored votes: InputError when a module's votes are gone. Where
    no module voted on n samples there are the methods that need none.
    """
    sample = data.Sample(row["id"], [], row["question"], row["gold"], row["choices"], row["source"], row["meta"])
    drawn = row["samples"][:n]

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
    if str(n) not in row["by_n"]:
        return found
    run = row["by_n"][str(n)]
    part = defaultdict(lambda: defaultdict(int), {name: defaultdict(int, cost) for name, cost in run["parts"].items()})
    cost = {"voter": (part["voter"]["expert_tokens"], part["voter"]["expert_calls"]),
            "self_reflection": (part["critic"]["expert_tokens"] + part["self_reflection"]["tokens"],
                                part["critic"]["expert_calls"]),
            "self_check": (2 * part["self_check"]["tokens"], 0)}
    modules = modules_of(row, n)
    for size in range(1, len(modules) + 1):
        for subset in combinations(modules, size):
            for source in subset:
                if source not in run["votes"]:
                    raise InputError(f"question {row['id']!r}: the votes of {source} for {n} samples are gone; collect again")
            votes = samples() + [Vote(source, *vote) for source in subset for vote in run["votes"][source]]
            # one module needs no Planner; of several it orders the calls, and is paid for it
            planned = [(part["planner"]["expert_tokens"], part["planner"]["expert_calls"])] * (size > 1)
            more, calls = map(sum, zip(*(cost[source] for source in subset), *planned))
            found[f"{method_of(subset)}@{n}"] = voted(votes, tokens + more, calls)
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


def methods_of(votes, settings, scales):
    """{model name: stored rows} -> {model name: `by_method`}. scales: {model name: a map of `stored_scales`}; with one,
    `CALIBRATED` is pass@1 once more, its confidence c = sigmoid(slope * C + intercept): the probability that a run trained."""
    found = {}
    for name, rows in votes.items():
        found[name] = by_method(rows, settings.samples, settings)
        if scales.get(name):
            drawn = [(row["id"], s) for row in rows for s in row["samples"][:settings.samples]]
            c = calibrated([s["confidence"]["mean"] for _, s in drawn], scales[name])
            found[name][CALIBRATED] = [Outcome(i, p, s["correct"], s["tokens"]) for (i, s), p in zip(drawn, c.tolist())]
    return found


def stored_scales(paths):
    """The map from C to c of each model directory, fixed before the first step -> list of dicts, or of None where there is
    none: its confidence.json, of a training run that judged C of Eq. 3; of a model that no such run has left, that of the
    last which one has, as it was fitted on the base."""
    files = [Path(path) / "confidence.json" for path in paths]
    found = [json.loads(file.read_text()) if file.is_file() else {} for file in files]
    found = [scale if scale.get("judged") == "topk" else None for scale in found]
    known = next(filter(None, reversed(found)), None)
    return [scale or (known and probe.as_fitted(known)) for scale in found]


def arrays(some):
    """List of Outcome -> ids, confidence (N,), correct (N,)."""
    return [o.id for o in some], np.array([o.confidence for o in some]), np.array([o.correct for o in some], float)


# ---------------------------------------------------------------------------------------------------------------------
# Tables: plain dicts of numbers; a triple is (value, low, high), a 95% interval clustered by question

ROUNDS = 1000
HEADLINE = ("accuracy", "auroc", "ece", "brier", "aurc", "accuracy@80")
REPORTED = (*HEADLINE, "ece_mass", "aupr", "eaurc", "accuracy@50", "accuracy@90")


def statistics(confidence, correct):
    """What is reported of (confidence, correct) -> dict of floats; a method without a confidence has an accuracy alone."""
    if not np.isfinite(confidence).all():
        return {"accuracy": float(correct.mean())}
    found = metrics(confidence, correct)
    return {name: found[name] for name in REPORTED}


def resampled(some):
    """List of Outcome -> `bootstrap` of its `statistics`."""
    return bootstrap(*arrays(some), statistics, ROUNDS)


def method_row(some):
    """List of Outcome -> one row of the methods' table, without intervals."""
    known = statistics(*arrays(some)[1:])
    return {**{name: known.get(name, math.nan) for name in HEADLINE},
            "tokens": float(np.mean([o.tokens for o in some])), "calls": float(np.mean([o.calls for o in some]))}


def summarise(some, boot):
    """List of Outcome and its `resampled` -> all of REPORTED with intervals, tokens and calls."""
    known = {name: (value, *interval(boot[name])) for name, value in statistics(*arrays(some)[1:]).items()}
    return method_row(some) | known


def paired(first, second, boots):
    """second minus first, both lists of Outcome on the same questions, boots their two `resampled`
    -> {statistic: (difference, low, high)}."""
    values = [statistics(*arrays(some)[1:]) for some in (first, second)]
    return {name: (values[1][name] - values[0][name], *interval(boots[1][name] - boots[0][name]))
            for name in HEADLINE if name in values[0].keys() & values[1].keys()}


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


def curve(by_n, name):
    """{N: by_method} -> of the method `name`: the N at which it was measured, correct (Q, sizes), tokens (sizes,)."""
    sizes = [n for n in sorted(by_n) if f"{name}@{n}" in by_n[n]]
    found = [by_n[n][f"{name}@{n}"] for n in sizes]
    return (sizes, np.array([[o.correct for o in some] for some in found], float).T,
            np.array([np.mean([o.tokens for o in some]) for some in found]))


def scaling(by_n):
    """Accuracy and tokens against N for the methods that scale, and the slope per log2 N in points, with intervals."""
    found = {}
    for name in sorted({method.split("@")[0] for some in by_n.values() for method in some if re.search(r"@\d+$", method)}
                       - {"pass"}):
        sizes, table, tokens = curve(by_n, name)
        if len(sizes) > 1:
            draws = np.random.default_rng(0).integers(len(table), size=(ROUNDS, len(table)))
            means = table[draws].mean(1)                                                                # (rounds, sizes)
            found[name] = {str(n): (float(table[:, i].mean()), *interval(means[:, i])) for i, n in enumerate(sizes)}
            found[name]["slope"] = tuple(100 * v for v in (float(slope(table.mean(0), sizes)),
                                                           *interval(slope(means, sizes))))
            found[name]["tokens"] = {str(n): float(cost) for n, cost in zip(sizes, tokens)}
    return found


def against_majority(by_n, n):
    """Every method on n samples against majority@n, and against majority voting at the same tokens: its curve over N,
    linear in log tokens between two measured N, nan where the method costs more than the largest -> {method: row}."""
    found, (sizes, table, tokens) = {}, curve(by_n, "majority")
    ids = [o.id for o in by_n[n][f"majority@{n}"]]
    for method, some in by_n[n].items():
        if not method.endswith(f"@{n}") or method == f"majority@{n}":
            continue
        cost, correct = float(np.mean([o.tokens for o in some])), np.array([o.correct for o in some], float)
        row = {"tokens": cost, "accuracy": float(correct.mean()),
               "minus majority, same N": mean_interval(ids, correct - table[:, sizes.index(n)], ROUNDS),
               "majority, same tokens": math.nan, "minus it": (math.nan,) * 3}
        if tokens[0] <= cost <= tokens[-1]:
            place = np.interp(math.log(cost), np.log(tokens), np.arange(len(sizes)))
            low = min(int(place), max(0, len(sizes) - 2))
            high = min(low + 1, len(sizes) - 1)
            same = table[:, low] * (1 - (place - low)) + table[:, high] * (place - low)
            row |= {"majority, same tokens": float(same.mean()), "minus it": mean_interval(ids, correct - same, ROUNDS)}
        found[method] = row
    return found


def calibration(methods, names):
    """ECE and Brier as they are, and after a map fitted on the other half of the questions, with intervals."""
    found = {}
    for name in names:
        ids, confidence, correct = arrays(methods[name])
        found[name] = {}
        for kind, mapped in (("", confidence), *((kind, probe.cross_fitted(ids, confidence, correct, kind))
                                                 for kind in ("platt", "isotonic"))):
            if np.isfinite(mapped).all():
                known, boot = metrics(mapped, correct), bootstrap(ids, mapped, correct, metrics, ROUNDS)
                found[name] |= {f"{key}, {kind}".strip(", "): (known[key], *interval(boot[key])) for key in ("ece", "brier")}
    return found


def abstention(some, risk):
    """A threshold for a target risk, fitted on one half of the questions, and what it does on the other half."""
    ids, confidence, correct = arrays(some)
    half, nothing = probe.first_half(ids), (math.nan,) * 3
    if half.all() or not half.any():
        return {"threshold": math.inf, "target risk": risk, "coverage": nothing, "risk": nothing}
    threshold, _, _ = probe.threshold_for(confidence[half], correct[half], risk)
    ids, kept, wrong = [i for i, inside in zip(ids, half) if not inside], confidence[~half] >= threshold, 1 - correct[~half]
    return {"threshold": threshold, "target risk": risk, "coverage": share_of_questions(ids, kept.astype(float)),
            "risk": share_of_questions([i for i, k in zip(ids, kept) if k], wrong[kept]) if kept.any() else nothing}


def share_of_questions(ids, values):
    """A mean with its interval; where it is 0 or 1, which no bootstrap leaves, the exact binomial one (Clopper, Pearson)."""
    mean, low, high = mean_interval(ids, values, ROUNDS)
    bound = 1 - 0.025 ** (1 / len(set(ids)))
    return (mean, 0.0, bound) if mean == 0 else (mean, 1 - bound, 1.0) if mean == 1 else (mean, low, high)


def make_tables(votes, probes, settings, sizes, drawn, regions, ts, risk, scales):
    """Everything that is reported, from stored rows. votes, probes: {model name: rows}; sizes: where every module voted;
    drawn: samples a question; scales: see `methods_of`."""
    n, last, names = settings.samples, max(ts), list(votes)
    methods = methods_of(votes, settings, scales)
    best = f"{method_of(modules_of(votes[names[-1]][0], n))}@{n}"
    shown = list(dict.fromkeys(["pass@1", *([CALIBRATED] if scales[names[-1]] else []), f"majority@{n}", best]))
    boots = {name: {method: resampled(some) for method, some in found.items()} for name, found in methods.items()}
    tables = {"methods": {name: {method: summarise(some, boots[name][method]) for method, some in found.items()}
                          for name, found in methods.items()}}
    if len(names) == 2:
        both = [method for method in methods[names[1]] if method in methods[names[0]]]
        tables["difference"] = {method: paired(*(methods[name][method] for name in names),
                                               [boots[name][method] for name in names]) for method in both}
    sampled = {2**i for i in range(drawn.bit_length())} | {*sizes, drawn}
    by_n = {name: {size: by_method(rows, size, settings) for size in sorted(sampled)} for name, rows in votes.items()}
    tables["against majority"] = {name: against_majority(found, n) for name, found in by_n.items()}
    tables["scaling"] = {name: scaling(found) for name, found in by_n.items()}
    tables["within"] = {}
    for name, rows in votes.items():
        labels = groups_of(rows)
        for label in sorted({label for some in labels.values() for label in some}):
            for method in shown:
                part = [o for o in methods[name][method] if label in labels[o.id]]
                row = summarise(part, resampled(part))
                tables["within"][f"{name}, {label}, {method}"] = {"n": len({o.id for o in part})} | {
                    key: row.get(key, math.nan) for key in ("accuracy", "auroc", "ece", "brier")}
    tables["calibration"] = {name: calibration(found, shown) for name, found in methods.items()}
    for heading, points in (("reliability", probe.reliability_points), ("risk and coverage", probe.risk_coverage)):
        tables[heading] = {method: {name: points(*arrays(found[method])[1:]) for name, found in methods.items()
                                    if method in found} for method in shown if method != f"majority@{n}" or method == best}
    tables["abstention"] = {name: {"method": best} | abstention(found[best], risk) for name, found in methods.items()
                            if best in found}
    tables["probe"] = {f"{name}, {region}, {part}": row for name, rows in probes.items() for region in regions
                       for part, row in probe.within_skills(probed(rows, region, 0), probed(rows, region, last),
                                                            scales[name], probe.summary_intervals).items()}
    tables["curves"] = {name: {region: curves_of({t: probed(rows, region, t) for t in ts}) for region in regions}
                        for name, rows in probes.items()}
    return tables


def curves_of(by_t):
    """{t: list of Answer} -> {field: {t: (mean, low, high)}}."""
    columns = {t: probe.columns_of(answers) for t, answers in by_t.items()}
    return {field: {str(t): mean_interval(view["id"], view[field].astype(float), ROUNDS) for t, view in columns.items()}
            for field in ("correct", "token_probability", "confidence")}


# ---------------------------------------------------------------------------------------------------------------------
# The command

def cases(rows, settings, samples, clip, method, number=12):
    """About a dozen questions of one model for the report -> list of dicts for `report.case`: three each where the method
    mends the majority, spoils it, where both fail and where both are right, and more of them where a kind has fewer."""
    n, taus, kinds = settings.samples, settings.taus(), defaultdict(list)
    for row in rows:
        found = outcomes(row, n, settings)
        kinds[(found[method][0].correct, found[f"majority@{n}"][0].correct)].append(row)
    kinds = [kinds[kind] for kind in ((True, False), (False, True), (False, False), (True, True))]
    picked = [row for some in kinds for row in some[:3]]
    picked += [row for some in kinds for row in some[3:]][:max(0, number - len(picked))]
    wanted, found = {row["id"] for row in picked}, []
    by_id = {sample.id: sample for sample in samples if sample.id in wanted}
    for row in picked:
        sample, pictures = by_id[row["id"]], by_id[row["id"]].pictures()
        noised = make_pair(pictures, sample.question, clip, parse_t(settings.noise_t), settings.region, settings.mass,
                           f"{settings.seed} {sample.id}")
        table = tally([Vote(source, *vote) for source, some in row["by_n"][str(n)]["votes"].items() for vote in some], taus,
                      sample.choices)
        best = winner(table)
        found.append({
            "images": [*pictures[:1], *noised[:1]], "question": data.ask(sample), "gold": sample.answer,
            "samples": [(s["text"], math.exp(s["logprob"]), s["correct"]) for s in row["samples"][:4]],
            "votes": {r.answer: {source: taus[source] * r.shares.get(source, 0.0) for source in taus} | {"total": r.total}
                      for r in table}, "method": method, "verdict": best.answer if best else "nothing",
            "right": best is not None and accepts(best.answer, sample)})
    return found


def training_log(folder):
    """The lines of a run folder's metrics.jsonl, an empty list where there is none."""
    log = Path(folder) / "metrics.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines() if line.strip()] if log.is_file() else []


def main(argv=None):
    parser = argparse.ArgumentParser(description="Methods, calibration, scaling and the probe, for one model or two.")
    catts.add_sources(parser)
    parser.add_argument("--baseline", help="a second model to hold it against")
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of samples for which every module votes; default "
                        "1 2 4 8 16 32 on the built-in questions, else --samples alone")
    parser.add_argument("--regions", nargs="+", default=["key", "random", "inverse"], choices=MODES, help="of the probe")
    parser.add_argument("--t", type=int, nargs="+", default=list(PROBE_STEPS), help="noise steps of the probe; 0 is always run")
    parser.add_argument("--probe_samples", type=int, default=4, help="answers a question at each step of the probe")
    parser.add_argument("--target_risk", type=float, default=0.1, help="share of wrong answers that abstention aims at")
    parser.add_argument("--output", default="runs/eval", help="folder for what is measured")
    parser.add_argument("--json", action="store_true", help="print tables.json")
    data.add_options(parser, catts.Settings)
    parser.set_defaults(batch_size=50)
    args = parser.parse_args(argv)
    settings = catts.Settings(**{name: getattr(args, name) for name in catts.Settings.__dataclass_fields__})
    if settings.early_exit != "off":
        raise InputError(f"--early_exit is {settings.early_exit!r}; here every module must vote, leave it off")
    if args.probe_samples < 1 or not 0 < args.target_risk < 1:
        raise InputError(f"--probe_samples {args.probe_samples} must be at least 1, --target_risk {args.target_risk} between 0 "
                         "and 1")
    if args.baseline and os.path.realpath(args.baseline) == os.path.realpath(args.model):
        raise InputError(f"--baseline {args.baseline!r} is --model; name another model, or none")
    built_in = (args.data or "synthetic") == "synthetic"
    args.limit = 200 if built_in and args.limit is None else args.limit
    args.sizes = sorted({*(args.sizes or ([1, 2, 4, 8, 16, 32] if built_in else [])), settings.samples})
    if args.sizes[0] < 1:
        raise InputError(f"--sizes {args.sizes[0]} must be at least 1")
    drawn = max(args.sizes[-1], 2 * settings.samples, settings.samples + 8)        # what CA-TTS costs, in samples
    args.t = ts = sorted({0, *(parse_t(t)[0] for t in args.t)})
    args.regions = [region for region in MODES if region in args.regions]
    output, samples = Path(args.output), data.load(args.data or "synthetic", "test", args.limit, args.data_seed, args.strict,
                                                   answered=True)
    paths = list(filter(None, (args.baseline, args.model)))
    names = [Path(path).name for path in paths] if len({Path(path).name for path in paths}) == len(paths) else paths
    votes, probes = {}, {}
    for name, path in zip(names, paths):
        controller = catts.build(args, settings, path)
        folder = output / re.sub(r"[^\w.-]+", "_", name)
        frame = catts.frame_of(args, model=path, baseline=None, target_risk=None)
        votes[name] = catts.answer_file(collector(controller, args.sizes, drawn), samples, folder / "votes.jsonl", frame,
                                        args.batch_size, f"{name}: votes", args.strict)
        if isinstance(controller.vlm, VLM):
            probes[name] = catts.answer_file(
                probe.prober(controller.vlm, controller.clip, args.regions, ts, settings.mass, args.probe_samples,
                             settings.seed, max_new_tokens=settings.max_new_tokens),
                samples, folder / "probe.jsonl", frame, args.batch_size, f"{name}: probe", args.strict)
    if votes[names[0]] is None:             # not the first rank
        return
    ids = [s.id for s in samples]
    votes, probes = ({name: [rows[i] for i in ids if i in rows] for name, rows in found.items()} for found in (votes, probes))
    if not all(votes.values()):
        raise InputError(f"no question of {args.data!r} could be answered; every picture is broken")
    expected = [catts.SOURCE[m] for m in controller.modules if m != "self_check" or controller.checker is not None]
    for rows in votes.values():
        check_rows(rows, args.sizes, drawn, expected)
    scales = dict(zip(names, stored_scales(paths)))
    tables = make_tables(votes, probes, settings, args.sizes, drawn, args.regions, ts, args.target_risk, scales)
    kept, left_out = len(votes[names[-1]]), len(ids) - len(votes[names[-1]]) + getattr(samples, "broken", 0)
    about = (f"{kept} questions of {args.data or 'the built-in test split'}{f' ({left_out} left out)' if left_out else ''}, "
             f"N = {settings.samples}, noise at t = {max(ts)}, seed {settings.seed}; {' and '.join(map(data.shown, paths))}; "
             f"Expert {data.shown(args.expert)}; torch {torch.__version__}.")
    about += "".join(f" {name}: c = sigmoid({scale['slope']:.3g} C {scale['intercept']:+.3g}), fixed before the training began."
                     for name, scale in scales.items() if scale)
    data.write_atomically(output / "tables.json", data.strict_json({"about": about, **tables}, indent=1))
    threshold = tables["abstention"][names[-1]] | {"settings": catts.deciding(settings), "sources": catts.sources_of(args)}
    data.write_atomically(output / "threshold.json", data.strict_json(threshold, indent=1))
    clip = controller.clip or ClipAttention.from_pretrained(args.clip)
    (output / "report.html").write_text(report.build(
        tables, cases(votes[names[-1]], settings, samples, clip, threshold["method"]),
        {name: training_log(path) for name, path in zip(names, paths)}, about), encoding="utf-8")
    if probes:
        draw_probe(output / "probe.png", {f"{name}, {region}": {t: probed(rows, region, t) for t in ts}
                                          for name, rows in probes.items() for region in args.regions})
    if args.json:
        print(data.strict_json(tables))
        return
    for name, found in tables["methods"].items():
        print(f"\n{name}: {about}")
        print(data.table({method: {key: row.get(key, math.nan) for key in (*HEADLINE, "tokens", "calls")}
                          for method, row in found.items()}, intervals=False))
        print(f"\n{name}: against majority voting at the same N and at the same tokens")
        print(data.table(tables["against majority"][name]))
        if any(math.isnan(row["majority, same tokens"]) for row in tables["against majority"][name].values()):
            print(f"nan: more tokens than majority@{drawn}; a larger --sizes draws more samples")
    if probes:
        print("\nThe probe")
        print(data.table(tables["probe"], intervals=False))
    print(f"\nwrote {output}/: report.html, tables.json, threshold.json, probe.png and the stored votes; "
          "the page and tables.json hold every interval")
    changed = [f"--{key} {shlex.quote(str(value))}" for key, value in catts.deciding(settings).items()
               if value != getattr(catts.Settings, key)]
    changed += [f"--{key} {shlex.quote(getattr(args, key))}" for key in ("expert", "expert_model", "clip", "check_model")
                if getattr(args, key) != parser.get_default(key)]
    print("next: " + " ".join(["python catts.py tiny/example.png \"How many red crosses are there?\" --model",
                               data.shown(args.model), *changed, f"--abstain {output}/threshold.json"]))


def draw_probe(path, named):
    """probe.png: accuracy, token probability and C against noise. named: {label: {t: list of Answer}}."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4))
    for axis, field, ylabel in zip(axes, ("correct", "token_probability", "confidence"),
                                   ("accuracy", "mean token probability", "confidence C")):
        probe.plot_probe(axis, named, field, ylabel)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    command("eval.py", main)
