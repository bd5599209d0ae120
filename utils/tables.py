"""Tables from stored rows: methods, subsets, scaling, calibration, abstention, probe, before and after."""
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils import baselines, cli, findings, metrics, schema
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
    twice, the Expert's included; calls of the Expert; cut: share of its answers that met the limit."""
    id: str
    confidence: float
    correct: bool
    tokens: int
    calls: int = 0
    cut: float = 0.0


@dataclass
class Answer:
    """One sampled answer. confidence: C (Eq. 3, mean); probability: exp of the mean log-prob, in (0, 1];
    token_probability: mean probability of the sampled tokens (the paper's Figure 1)."""
    id: str
    skill: str
    level: str
    text: str
    correct: bool
    confidence: float
    probability: float
    token_probability: float
    length: int
    finished: bool


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
    row["cut_only"], row["meta"], row["choices"]
    for name in ("greedy", "expert"):
        if row[name] is not None:               # --methods may leave it out
            row[name]["correct"]
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


def _stored_scale(file):
    try:
        scale = cli.parse_json(file.read_text())
        words = schema.fault(scale, {"slope": float, "intercept": float})
    except (OSError, ValueError, RecursionError) as error:
        words = cli.reason(error)
    if words:
        raise InputError(f"{file} is damaged ({words}); restore it: training.json of the run's newest "
                         f"checkpoint holds it as \"scale\"")
    return scale


def stored_scales(paths):
    """The map from C to c of each model directory, fixed before the first step -> list of dicts, or of None
    where there is
    none: its confidence.json, of a training run that judged C of Eq. 3; of a model that no such run has left,
    that of the last which one has, as it was fitted on the base."""
    files = [Path(path) / "confidence.json" for path in paths]
    scales = [_stored_scale(file) if file.is_file() else {} for file in files]
    scales = [scale if scale and scale.get("judged", "topk") == "topk" else None for scale in scales]
    last = next(filter(None, reversed(scales)), None)
    return [scale or (last and metrics.as_fitted(last)) for scale in scales]


def arrays(outcomes):
    """List of Outcome -> ids, confidence (N,), correct (N,)."""
    return ([o.id for o in outcomes], np.array([o.confidence for o in outcomes]),
            np.array([o.correct for o in outcomes], float))


ROUNDS = 1000
HEADLINE = ("accuracy", "over", "auroc", "ece", "brier", "aurc", "accuracy@80")
REPORTED = (*HEADLINE, "ece_mass", "aupr", "eaurc", "accuracy@50", "accuracy@90")
COSTS = ("tokens", "calls", "cut")


def statistics(confidence, correct):
    """What is reported of (confidence, correct) -> dict of floats; a method without a confidence has an
    accuracy alone."""
    if not np.isfinite(confidence).all():
        return {"accuracy": float(correct.mean())}
    values = confidence_metrics(confidence, correct)
    return {name: values[name] for name in REPORTED}


def resampled(outcomes):
    """List of Outcome -> `bootstrap` of its `statistics`."""
    return bootstrap(*arrays(outcomes), statistics, ROUNDS)


def method_row(outcomes):
    """List of Outcome -> one row of the methods' table, without intervals."""
    values = statistics(*arrays(outcomes)[1:])
    costs = {name: float(np.mean([getattr(o, name) for o in outcomes])) for name in COSTS}
    return {name: values.get(name, math.nan) for name in HEADLINE} | costs


def summarise(outcomes, boot):
    """List of Outcome and its `resampled` -> all of REPORTED with intervals, and COSTS."""
    count = len({o.id for o in outcomes})
    return method_row(outcomes) | {name: (value, *interval(boot[name], count=count))
                                   for name, value in statistics(*arrays(outcomes)[1:]).items()}


def paired(first, second, boots):
    """second minus first, both lists of Outcome on the same questions, boots their two `resampled`
    -> {statistic: (difference, low, high)}."""
    values, count = [statistics(*arrays(side)[1:]) for side in (first, second)], len({o.id for o in first})
    return {name: (values[1][name] - values[0][name], *interval(boots[1][name] - boots[0][name], count=count))
            for name in HEADLINE if name in values[0].keys() & values[1].keys()}


def slope(accuracies, sizes):
    """Least-squares slope of accuracy per log2 N. accuracies (..., len(sizes))."""
    x = np.log2(sizes) - np.mean(np.log2(sizes))
    return (accuracies * x).sum(-1) / (x**2).sum()


def curve(by_n, name):
    """{N: by_method} -> of the method `name`: the N at which it was measured, correct (Q, sizes), tokens
    (sizes,)."""
    sizes = [n for n in sorted(by_n) if f"{name}@{n}" in by_n[n]]
    by_size = [by_n[n][f"{name}@{n}"] for n in sizes]
    return (sizes, np.array([[o.correct for o in outcomes] for outcomes in by_size], float).T,
            np.array([np.mean([o.tokens for o in outcomes]) for outcomes in by_size]))


def scaling(by_n):
    """Accuracy and tokens against N for the methods that scale, and the slope per log2 N in points, with
    intervals."""
    rows = {}
    names = {method.split("@")[0] for methods in by_n.values() for method in methods
             if re.search(r"@\d+$", method)}
    for name in sorted(names - {"pass"}):
        sizes, table, tokens = curve(by_n, name)
        if len(sizes) > 1:
            draws = np.random.default_rng(0).integers(len(table), size=(ROUNDS, len(table)))
            means = table[draws].mean(1)  # (rounds, sizes)
            rows[name] = {str(n): (float(table[:, i].mean()), *interval(means[:, i], count=len(table)))
                          for i, n in enumerate(sizes)}
            ends = interval(slope(means, sizes), count=len(table))
            rows[name]["slope"] = tuple(100 * value for value in (float(slope(table.mean(0), sizes)), *ends))
            rows[name]["tokens"] = {str(n): float(cost) for n, cost in zip(sizes, tokens)}
    return rows


def against_majority(by_n, n):
    """Every method on n samples against majority@n, and against majority voting at the same tokens: its curve
    over N, linear in log tokens between two measured N, nan where the method costs more than the largest ->
    {method: row}."""
    rows, (sizes, table, tokens) = {}, curve(by_n, "majority")
    ids = [o.id for o in by_n[n][f"majority@{n}"]]
    for method, outcomes in by_n[n].items():
        if not method.endswith(f"@{n}") or method == f"majority@{n}":
            continue
        cost = float(np.mean([o.tokens for o in outcomes]))
        correct = np.array([o.correct for o in outcomes], float)
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
        rows[method] = row
    return rows


def calibration(methods, names):
    """ECE and Brier as they are, and after a map fitted on the other half of the questions, with
    intervals."""
    rows = {}
    for name in names:
        ids, confidence, correct = arrays(methods[name])
        rows[name] = {}
        for kind, mapped in (("", confidence), *((kind, metrics.cross_fitted(ids, confidence, correct, kind))
                                                 for kind in ("platt", "isotonic"))):
            if np.isfinite(mapped).all():
                values = confidence_metrics(mapped, correct)
                boot = bootstrap(ids, mapped, correct, confidence_metrics, ROUNDS)
                rows[name] |= {f"{key}, {kind}".strip(", "):
                               (values[key], *interval(boot[key], count=len(set(ids))))
                               for key in ("ece", "brier")}
    return rows


def abstention(outcomes, risk):
    """A threshold for a target risk, fitted on one half of the questions, and what it does on the other.

    coverage: share that is answered; risk: share of errors among the answered; answered, errors: how many.
    """
    ids, confidence, correct = arrays(outcomes)
    half, nothing = metrics.first_half(ids), (math.nan,) * 3
    row = {"threshold": math.inf, "target risk": risk, "coverage": nothing, "risk": nothing}
    if half.all() or not half.any():
        return row
    row["threshold"], _, _ = metrics.threshold_for(confidence[half], correct[half], risk)
    answered, wrong = confidence[~half] >= row["threshold"], 1 - correct[~half]
    ids = [i for i, inside in zip(ids, half) if not inside]
    row |= {"coverage": share_of_questions(ids, answered.astype(float)), "answered": int(answered.sum()),
            "errors": int(wrong[answered].sum())}
    if answered.any():
        row["risk"] = share_of_questions([i for i, inside in zip(ids, answered) if inside], wrong[answered])
    return row


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
        "id", "correct", "confidence", "probability", "token_probability", "length", "finished")}


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
            "Brier": brier(clean["probability"]), **by_c, "length": float(clean["length"].mean()),
            "cut": 1 - float(clean["finished"].mean())}


def summary_intervals(clean, noised, scale=None, seed=0):
    """`summary` with a 95% interval for each column, questions resampled, on both views alike -> {name:
    (value, low, high)}."""
    views, rng, resamples = [columns_of(clean), columns_of(noised)], np.random.default_rng(seed), []
    groups = [clusters(view["id"]) for view in views]
    for _ in range(ROUNDS):
        draw = rng.integers(len(groups[0]), size=len(groups[0]))
        index = [np.concatenate([rows[g] for g in draw]) for rows in groups]
        resamples.append(summary(*({field: column[i] for field, column in view.items() if field != "id"}
                                   for view, i in zip(views, index)), scale))
    return {name: (value, *interval(np.array([row[name] for row in resamples]), count=len(groups[0])))
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
        votes = [extract_answer(a.text) for a in group]
        right.append(group[votes.index(Counter(votes).most_common(1)[0][0])].correct)
    return right


def before_after(before, after):
    """Two `within_skills` interleaved, pooled and within skill, for `cli.table`."""
    return {f"{skill}, {when}": rows[skill] for skill in before
            for when, rows in (("before", before), ("after", after))}


# ---- Subsets, as the benchmarks' papers report them

SUBSETS = ("skill", "level", "task", "answer_type", "category", "subject", "l2-category", "discipline",
           "split")
# MMMU's subjects by discipline (its Table 2).
DISCIPLINES = {"Art & Design": "Art Art_Theory Design Music",
               "Business": "Accounting Economics Finance Manage Marketing",
               "Science": "Biology Chemistry Geography Math Physics",
               "Health & Medicine": "Basic_Medical_Science Clinical_Medicine "
                                    "Diagnostics_and_Laboratory_Medicine Pharmacy Public_Health",
               "Humanities & Social Science": "History Literature Psychology Sociology",
               "Tech & Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics "
                                     "Energy_and_Power Materials Mechanical_Engineering"}
DISCIPLINE_OF = {subject: discipline for discipline, subjects in DISCIPLINES.items()
                 for subject in subjects.split()}
MMMU_ID = re.compile(r"(dev|validation|test)_(\w+?)_\d+")


def labels_of(row):
    """The subsets that a stored row belongs to -> {what: value}, "type" among them (open or multiple choice).

    VLMEvalKit has MMMU's subject in `category` and its discipline in `l2-category`; MMMU's own files have the
    split and the subject in the id alone.
    """
    meta = {key.replace("l2_category", "l2-category"): value for key, value in row["meta"].items()}
    if match := MMMU_ID.fullmatch(str(row["id"])):
        meta = {"split": match[1], "subject": match[2]} | meta
    if (subject := meta.get("subject", meta.get("category"))) in DISCIPLINE_OF:
        meta |= {"subject": subject, "discipline": DISCIPLINE_OF[subject]}
        meta.pop("category", None), meta.pop("l2-category", None)
    elif "level" in meta and "category" in meta:                # MathVision
        meta["subject"] = meta.pop("category")
    labels = {name: str(meta[name]) for name in SUBSETS if name in meta}
    return labels | {"type": "multiple choice" if row["choices"] else "open"}


def groups_of(rows):
    """{id: labels} for tables within subsets; a label is "what: value"."""
    return {row["id"]: [f"{what}: {value}" for what, value in labels_of(row).items()] for row in rows}


def within_rows(rows, methods, names):
    """{"label, method": row} of stored rows for the methods `names`, within each subset."""
    labels, table = groups_of(rows), {}
    for label in sorted({label for group in labels.values() for label in group}):
        for method in names:
            inside = [o for o in methods[method] if label in labels[o.id]]
            values = summarise(inside, resampled(inside))
            columns = ("accuracy", "over", "auroc", "ece", "brier", "cut")
            table[f"{label}, {method}"] = {"n": len({o.id for o in inside})} | {
                key: values.get(key, math.nan) for key in columns}
    return table


# ---- Everything that eval.py reports

STATES = ("clean", "noised", "blank")               # on which pictures a frozen model's hidden state is read


def probed(rows, region, t):
    """Rows of `eval.prober` -> list of Answer on a region at step t."""
    region, t = (region, t) if t else ("clean", 0)
    return [Answer(**a) for row in rows for a in row["found"][region][str(t)]]


def headline_tables(probes, regions, t, scales):
    """Whether confidence says when the evidence is gone, and what a reading costs that needs no training ->
    "headline": {model, part: `baselines.headline_intervals`}, pooled and within skill; "free readouts":
    {model, readout: figures}.

    The noised answers are those at step t on the first region (key, where it was asked for).
    """
    tables = {"headline": {}, "free readouts": {}, "findings": {}}
    for name, rows in probes.items():
        clean, noised = (probed(rows, regions[0], step) for step in (0, t))
        for skill in ("all", *sorted({a.skill for a in clean if a.skill})):
            views = [columns_of([a for a in view if skill in ("all", a.skill)]) for view in (clean, noised)]
            tables["headline"][f"{name}, {skill}"] = baselines.headline_intervals(*views, scales[name],
                                                                                  ROUNDS)
        views = [columns_of(view) for view in (clean, noised)]
        tables["findings"][name] = findings.finding(*views, scales[name])
        states = {view: {row["id"]: baselines.unpacked(row["states"][view]) for row in rows}
                  for view in STATES}
        tables["free readouts"] |= {f"{name}, {readout}": row for readout, row
                                    in baselines.readouts(*views, states).items()}
    return tables


def severity_table(rows, scale):
    """Rows of `eval.corrupter` of one model -> {"corruption, region, severity": `baselines.severity_row`}."""
    columns = {name: columns_of([Answer(**a) for row in rows for a in row["found"][name]])
               for name in rows[0]["found"]}
    return {name: baselines.severity_row(columns["clean"], view, scale)
            for name, view in columns.items() if name != "clean"}


def probe_tables(probes, regions, ts, scales):
    """The tables of the probe. probes: {model name: rows of `eval.prober`}; ts: noise steps."""
    tables = {"probe": {}}
    for name, rows in probes.items():
        for region in regions:
            by_skill = within_skills(probed(rows, region, 0), probed(rows, region, max(ts)), scales[name],
                                     summary_intervals)
            tables["probe"] |= {f"{name}, {region}, {skill}": row for skill, row in by_skill.items()}
    tables |= headline_tables(probes, regions, max(ts), scales)
    tables["curves"] = {name: {region: curves_of({t: probed(rows, region, t) for t in ts})
                               for region in regions} for name, rows in probes.items()}
    return tables


def vote_tables(votes, methods, by_n, n, risk, calibrated_models):
    """The tables of the methods.

    votes: {model name: stored rows}; methods: {model name: {method: list of Outcome}} on n samples; by_n:
    {model name: {N: the same}}; risk: that abstention aims at; calibrated_models: names of the models with a
    map from C to c, which have the row CALIBRATED.
    """
    names = list(votes)
    first_row = votes[names[-1]][0]
    best = f"{method_of(modules_of(first_row, n), first_row.get('incomplete'))}@{n}"
    calibrated_row = [CALIBRATED] if names[-1] in calibrated_models else []
    listed = list(dict.fromkeys(["pass@1", *calibrated_row, f"majority@{n}", best]))
    boots = {name: {method: resampled(outcomes) for method, outcomes in rows.items()}
             for name, rows in methods.items()}
    tables = {"questions": {name: len(rows) for name, rows in votes.items()}, "methods": {
        name: {method: summarise(outcomes, boots[name][method]) for method, outcomes in rows.items()}
        for name, rows in methods.items()}}
    if len(names) == 2:
        first, second = names
        tables["difference"] = {
            method: paired(methods[first][method], methods[second][method],
                           [boots[name][method] for name in names])
            for method in methods[second] if method in methods[first]}
    tables["against majority"] = {name: against_majority(sizes, n) for name, sizes in by_n.items()}
    tables["scaling"] = {name: scaling(sizes) for name, sizes in by_n.items()}
    tables["within"] = {f"{name}, {row}": figures for name, rows in votes.items()
                        for row, figures in within_rows(rows, methods[name], listed).items()}
    tables["calibration"] = {name: calibration(rows, listed) for name, rows in methods.items()}
    for heading, points in (("reliability", metrics.reliability_points),
                            ("risk and coverage", metrics.risk_coverage)):
        tables[heading] = {method: {name: points(*arrays(rows[method])[1:]) for name, rows in methods.items()
                                    if method in rows}
                           for method in listed if method != f"majority@{n}" or method == best}
    tables["abstention"] = {name: {"method": best} | abstention(rows[best], risk)
                            for name, rows in methods.items() if best in rows}
    return tables
