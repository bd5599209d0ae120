"""Tables from lists of outcomes: methods, scaling, calibration, abstention, before and after."""
import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils import cli, metrics
from utils.baselines import by_figure
from utils.cli import InputError
from utils.judge import extract_answer
from utils.metrics import (
    auroc,
    bootstrap,
    calibrated,
    calibration_error,
    clusters,
    confidence_metrics,
    interval,
    mean_interval,
)
from utils.results_file import is_open


@dataclass
class Outcome:
    """What a method made of one question: confidence in [0, 1] or nan; tokens, a contrasted one counting
    twice, the Expert's included; calls of the Expert."""
    id: str
    confidence: float
    correct: bool
    tokens: int
    calls: int = 0


LETTER = {"voter": "V", "self_reflection": "R", "self_check": "C"}
# Whose work each module's vote takes, as the ledger's parts name it.
WORKERS = {"voter": ("voter",), "self_reflection": ("critic", "self_reflection"),
           "self_check": ("self_check",)}


def method_of(modules, is_incomplete=False):
    """The name of a subset of LETTER's modules, added to the samples' weighted vote. is_incomplete: too many
    of the Expert's votes are missing for all of them to be called CA-TTS."""
    letters = "+" + "".join(LETTER[source] for source in modules)
    if is_incomplete and len(modules) == len(LETTER):
        return f"{letters}, Expert failed"
    return {0: "weighted", len(LETTER): "CA-TTS"}.get(len(modules), letters)


def mark_incomplete(rows, max_failed):
    """Where a server failed on more than a share of the questions, no row of theirs is called CA-TTS."""
    if sum(map(is_open, rows)) > max_failed * len(rows):
        for row in rows:
            row["incomplete"] = True


def modules_of(row, n):
    """The modules that ran on the first n samples of a stored row, in the table's order."""
    return tuple(source for source in LETTER if source in row["by_n"][str(n)]["ran"])


def check_rows(rows, sizes, drawn, modules):
    """Every stored row holds what the tables need, and votes of all `modules` (sources). Raises InputError
    that names the question."""
    for row in rows:
        try:
            wrong = _missing(row, sizes, drawn)
            if not wrong and any(set(modules_of(row, n)) != set(modules) for n in sizes):
                wrong = f"other modules than {', '.join(modules) or 'none'}"
        except (KeyError, TypeError, AttributeError) as error:
            wrong = f"no {error}"
        if wrong:
            raise InputError(f"question {row['id']!r} has {wrong} in the stored votes; remove its line, and "
                             f"the same command "
                             "collects it again")


def _missing(row, sizes, drawn):
    """What a stored row lacks, "" if nothing. KeyError or the like where a whole part of it is gone."""
    row["greedy"]["correct"], row["cut_only"], row["expert"]["correct"], row["meta"], row["choices"]
    if len(row["samples"]) != drawn:
        return f"{len(row['samples'])} samples, not {drawn},"
    for n in sizes:
        run = row["by_n"][str(n)]
        for source in run["ran"]:
            # who abstains says why
            if source not in run["votes"] or not run["votes"][source] and not run["notes"]:
                return f"no votes of {source} for {n} samples"
            if run["votes"][source] and not run["parts"].keys() >= {*WORKERS.get(source, ())}:
                return f"no cost of {source} for {n} samples"
    return ""


CALIBRATED = "pass@1, c"


def stored_scales(paths):
    """The map from C to c of each model directory, fixed before the first step -> list of dicts, or of None
    where there is
    none: its confidence.json, of a training run that judged C of Eq. 3; of a model that no such run has left,
    that of the last which one has, as it was fitted on the base."""
    files = [Path(path) / "confidence.json" for path in paths]
    found = [json.loads(file.read_text()) if file.is_file() else {} for file in files]
    found = [scale if scale and scale.get("judged", "topk") == "topk" else None for scale in found]
    known = next(filter(None, reversed(found)), None)
    return [scale or (known and metrics.as_fitted(known)) for scale in found]


def arrays(some):
    """List of Outcome -> ids, confidence (N,), correct (N,)."""
    return [o.id for o in some], np.array([o.confidence for o in some]), np.array([o.correct for o in some],
                                                                                  float)


ROUNDS = 1000
HEADLINE = ("accuracy", "auroc", "ece", "brier", "aurc", "accuracy@80")
REPORTED = (*HEADLINE, "ece_mass", "aupr", "eaurc", "accuracy@50", "accuracy@90")


def statistics(confidence, correct):
    """What is reported of (confidence, correct) -> dict of floats; a method without a confidence has an
    accuracy alone."""
    if not np.isfinite(confidence).all():
        return {"accuracy": float(correct.mean())}
    found = confidence_metrics(confidence, correct)
    return {name: found[name] for name in REPORTED}


def resampled(some):
    """List of Outcome -> `bootstrap` of its `statistics`."""
    return bootstrap(*arrays(some), statistics, ROUNDS)


def method_row(some):
    """List of Outcome -> one row of the methods' table, without intervals."""
    known = statistics(*arrays(some)[1:])
    return {**{name: known.get(name, math.nan) for name in HEADLINE},
            "tokens": float(np.mean([o.tokens for o in some])),
            "calls": float(np.mean([o.calls for o in some]))}


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
    """{id: labels}: skill, level, category and question type, for tables within them; a label is "what:
    value"."""
    found = {}
    for row in rows:
        meta = row["meta"]
        labels = [f"{name}: {meta[name]}" for name in ("skill", "level", "category", "subject")
                  if name in meta]
        found[row["id"]] = [*labels, "type: multiple choice" if row["choices"] else "type: open"]
    return found


def slope(accuracies, sizes):
    """Least-squares slope of accuracy per log2 N. accuracies (..., len(sizes))."""
    x = np.log2(sizes) - np.mean(np.log2(sizes))
    return (accuracies * x).sum(-1) / (x**2).sum()


def curve(by_n, name):
    """{N: by_method} -> of the method `name`: the N at which it was measured, correct (Q, sizes), tokens
    (sizes,)."""
    sizes = [n for n in sorted(by_n) if f"{name}@{n}" in by_n[n]]
    found = [by_n[n][f"{name}@{n}"] for n in sizes]
    return (sizes, np.array([[o.correct for o in some] for some in found], float).T,
            np.array([np.mean([o.tokens for o in some]) for some in found]))


def scaling(by_n):
    """Accuracy and tokens against N for the methods that scale, and the slope per log2 N in points, with
    intervals."""
    found = {}
    for name in sorted({method.split("@")[0] for some in by_n.values() for method in some
                        if re.search(r"@\d+$", method)}
                       - {"pass"}):
        sizes, table, tokens = curve(by_n, name)
        if len(sizes) > 1:
            draws = np.random.default_rng(0).integers(len(table), size=(ROUNDS, len(table)))
            means = table[draws].mean(1)  # (rounds, sizes)
            found[name] = {str(n): (float(table[:, i].mean()), *interval(means[:, i])) for i,
                           n in enumerate(sizes)}
            found[name]["slope"] = tuple(100 * v for v in (float(slope(table.mean(0), sizes)),
                                                           *interval(slope(means, sizes))))
            found[name]["tokens"] = {str(n): float(cost) for n, cost in zip(sizes, tokens)}
    return found


def against_majority(by_n, n):
    """Every method on n samples against majority@n, and against majority voting at the same tokens: its curve
    over N, linear in log tokens between two measured N, nan where the method costs more than the largest ->
    {method: row}."""
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
            row |= {"majority, same tokens": float(same.mean()),
                    "minus it": mean_interval(ids, correct - same, ROUNDS)}
        found[method] = row
    return found


def calibration(methods, names):
    """ECE and Brier as they are, and after a map fitted on the other half of the questions, with
    intervals."""
    found = {}
    for name in names:
        ids, confidence, correct = arrays(methods[name])
        found[name] = {}
        for kind, mapped in (("", confidence), *((kind, metrics.cross_fitted(ids, confidence, correct, kind))
                                                 for kind in ("platt", "isotonic"))):
            if np.isfinite(mapped).all():
                known, boot = confidence_metrics(mapped, correct), bootstrap(ids, mapped, correct,
                                                                             confidence_metrics, ROUNDS)
                found[name] |= {f"{key}, {kind}".strip(", "): (known[key], *interval(boot[key]))
                                for key in ("ece", "brier")}
    return found


def abstention(some, risk):
    """A threshold for a target risk, fitted on one half of the questions, and what it does on the other
    half."""
    ids, confidence, correct = arrays(some)
    half, nothing = metrics.first_half(ids), (math.nan,) * 3
    if half.all() or not half.any():
        return {"threshold": math.inf, "target risk": risk, "coverage": nothing, "risk": nothing}
    threshold, _, _ = metrics.threshold_for(confidence[half], correct[half], risk)
    ids, kept, wrong = [i for i, inside in zip(ids, half)
                        if not inside], confidence[~half] >= threshold, 1 - correct[~half]
    return {"threshold": threshold, "target risk": risk,
            "coverage": share_of_questions(ids, kept.astype(float)),
            "risk": share_of_questions([i for i, k in zip(ids, kept) if k], wrong[kept]) if kept.any()
            else nothing}


def share_of_questions(ids, values):
    """A mean with its interval; where it is 0 or 1, which no bootstrap leaves, the exact binomial one
    (Clopper, Pearson)."""
    mean, low, high = mean_interval(ids, values, ROUNDS)
    bound = 1 - 0.025 ** (1 / len(set(ids)))
    return (mean, 0.0, bound) if mean == 0 else (mean, 1 - bound, 1.0) if mean == 1 else (mean, low, high)


def curves_of(by_t):
    """{t: list of Answer} -> {field: {t: (mean, low, high)}}."""
    columns = {t: columns_of(answers) for t, answers in by_t.items()}
    return {field: {str(t): mean_interval(view["id"], view[field].astype(float), ROUNDS) for t,
                    view in columns.items()}
            for field in ("correct", "token_probability", "confidence")}


def columns_of(answers):
    """List of Answer -> {field: (N,) array}."""
    return {field: np.array([getattr(a, field) for a in answers]) for field in (
        "id", "correct", "confidence", "probability", "token_probability", "length")}


def summary(clean, noised, scale=None):
    """The before/after columns for one model from its answers on clean and on noised pictures -> dict of
    floats.

    clean, noised: lists of Answer, or their `columns_of`. AUROC is that of C. ECE and Brier are those of the
    sequence probability exp(mean log-prob), without any fitted map; with a scale (a training run's
    confidence.json), "ECE c" and "Brier c" those of c = sigmoid(slope * C + intercept), a map that was fixed
    before the first step. gap: mean C on clean pictures minus mean C on noised ones.
    """
    clean, noised = (columns_of(view) if isinstance(view, list) else view for view in (clean, noised))
    correct = clean["correct"].astype(float)

    def brier(p):
        return float(((p - correct) ** 2).mean())
    by_c = {}
    if scale:
        c = calibrated(clean["confidence"], scale)
        by_c = {"ECE c": calibration_error(c, correct), "Brier c": brier(c)}
    mean = {field: (float(clean[field].mean()), float(noised[field].mean())) for field in (
        "correct", "token_probability", "confidence")}
    return {"pass@1": mean["correct"][0], "pass@1 noised": mean["correct"][1],
            "token prob": mean["token_probability"][0], "token prob noised": mean["token_probability"][1],
            "C": mean["confidence"][0], "gap": mean["confidence"][0] - mean["confidence"][1],
            "AUROC": auroc(clean["confidence"], correct),
            "ECE": calibration_error(clean["probability"], correct),
            "Brier": brier(clean["probability"]), **by_c, "length": float(clean["length"].mean())}


def summary_intervals(clean, noised, scale=None, rounds=1000, seed=0):
    """`summary` with a 95% interval for each column, questions resampled, on both views alike -> {name:
    (value, low, high)}."""
    views, rng, found = [columns_of(clean), columns_of(noised)], np.random.default_rng(seed), []
    groups = [clusters(view["id"]) for view in views]
    for _ in range(rounds):
        draw = rng.integers(len(groups[0]), size=len(groups[0]))
        index = [np.concatenate([own[g] for g in draw]) for own in groups]
        found.append(summary(*({field: column[i] for field, column in view.items() if field != "id"}
                               for view, i in zip(views, index)), scale))
    return {name: (value, *interval(np.array([row[name] for row in found])))
            for name, value in summary(*views, scale).items()}


def within_skills(clean, noised, scale=None, make=summary):
    """`make` (`summary` or `summary_intervals`) of all answers ("all") and within each skill (pooled numbers
    lie)."""
    skills = sorted({a.skill for a in clean if a.skill})
    return {"all": make(clean, noised, scale),
            **{skill: make([a for a in clean if a.skill == skill], [a for a in noised if a.skill == skill],
                           scale)
               for skill in skills}}


def headroom(answers):
    """What sampling leaves to gain, from all n answers of each question -> {"pass@1", "majority@n",
    "pass@n"}.

    majority: the most frequent extracted answer (the first of those that tie), an unanswered one counting as
    wrong.
    """
    by_id = grouped(answers)
    n, best = len(answers) // len(by_id), [any(a.correct for a in group) for group in by_id]
    return {"pass@1": float(np.mean([a.correct for a in answers])),
            f"majority@{n}": float(np.mean(majorities(answers))),
            f"pass@{n}": float(np.mean(best))}


def grouped(answers):
    """List of Answer -> lists of the answers to one question, in the order of first appearance."""
    by_id = {}
    for a in answers:
        by_id.setdefault(a.id, []).append(a)
    return list(by_id.values())


def majorities(answers):
    """Whether the majority of each question's answers is right, as in `headroom` -> list of bool, a question
    each."""
    right = []
    for group in grouped(answers):
        found = [extract_answer(a.text) for a in group]
        right.append(group[found.index(Counter(found).most_common(1)[0][0])].correct)
    return right


def print_tables(tables, about, failures, drawn):
    """Print what eval.make_tables made. about: what was measured. failures: {model: a sentence about its
    servers' failures, or ""}. drawn: samples a question."""
    for name, methods in tables["methods"].items():
        print(f"\n{name}: {about}")
        if failures[name]:
            print(failures[name])
        print(cli.table({method: {key: row.get(key, math.nan) for key in (*HEADLINE, "tokens", "calls")}
                     for method, row in methods.items()}, intervals=False))
        against = tables["against majority"][name]
        print(f"\n{name}: against majority voting at the same N and at the same tokens")
        print(cli.table(against))
        if any(math.isnan(row["majority, same tokens"]) for row in against.values()):
            print(f"nan: more tokens than majority@{drawn}; a larger --sizes draws more samples")
    if tables["probe"]:
        print("\nThe probe")
        print(cli.table(tables["probe"], intervals=False))
        print("\nHeadline; mixed: over clean and noised answers together; Platt, isotonic: mapped on the "
              "other half's answers")
        pooled = {name.removesuffix(", all"): row for name, row in tables["headline"].items()
                  if name.endswith(", all")}
        print(cli.table(by_figure(pooled)))
        print("\nReadouts of the frozen model, fitted on the other half of the questions")
        print(cli.table(tables["free readouts"]))
    if "severity" in tables:
        print("\nSeverity; mixed: over clean and corrupted answers together")
        print(cli.table(tables["severity"]))


def before_after(before, after):
    """Two `within_skills` interleaved, pooled and within skill, for `data.table`."""
    return {f"{skill}, {when}": rows[skill] for skill in before for when,
            rows in (("before", before), ("after", after))}
