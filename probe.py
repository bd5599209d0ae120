"""The probe (paper Figure 1): noise the visual evidence; does confidence fall with accuracy? And the metrics that tell.

Answers of one model to the same questions on clean and on noised pictures, and what they say about it: accuracy, calibration
(ECE, Brier), ranking (AUROC, AUPR of errors, AURC, accuracy at a coverage), each with intervals clustered by question. The
held-out table of `train_cdrl.py`, the model cards of `tiny/` and `eval.py` are all made of these.
"""
import math
import zlib
from collections import Counter
from dataclasses import asdict, dataclass

import numpy as np
import torch
from tqdm import tqdm

import data
from noise import make_pairs
from reward import fit_platt, probability
from utils.judge import extract_answer, is_correct

PROBE_STEPS = (0, 300, 500, 700, 850, 999)


# ---------------------------------------------------------------------------------------------------------------------
# Metrics of (confidence, correct)

def _tied(confidence, correct):
    """Correctness, most confident first, ties replaced by their mean: the expected value under a random order of ties."""
    order = np.argsort(-confidence, kind="stable")
    block = np.cumsum(np.diff(confidence[order], prepend=confidence[order[:1]]) != 0)          # which run of equal values
    return (np.bincount(block, correct[order]) / np.bincount(block))[block]


def auroc(confidence, correct):
    """P(a right answer is more confident than a wrong one), ties count half; nan when all are right or all wrong."""
    right, wrong = int(correct.sum()), int(len(correct) - correct.sum())
    if not right or not wrong:
        return float("nan")
    _, where, counts = np.unique(confidence, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[where]
    return float((ranks[correct == 1].sum() - right * (right + 1) / 2) / (right * wrong))


def average_precision_of_errors(confidence, correct):
    """AUPR with wrong answers as the positive class and low confidence as the score; nan when nothing is wrong."""
    errors = 1 - correct
    if not errors.sum():
        return float("nan")
    order = np.argsort(confidence, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(confidence[order])), len(order) - 1)     # one threshold a distinct value
    found = np.cumsum(errors[order])[ends]
    return float(np.sum(np.diff(found, prepend=0) / errors.sum() * found / (ends + 1)))


def calibration_error(confidence, correct, bins=15, mass=False):
    """ECE: mean |accuracy - confidence| over bins of equal width, (lower, upper] each, or of equal mass."""
    if mass:
        groups = np.array_split(np.argsort(confidence, kind="stable"), min(bins, len(confidence)))
    else:
        index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
        groups = [np.flatnonzero(index == b) for b in range(bins)]
    return float(sum(abs(correct[g].sum() - confidence[g].sum()) for g in groups) / len(confidence))


def metrics(confidence, correct, groups=None):
    """Everything about one list of answers -> dict of floats.

    confidence (N,) any real numbers, higher = surer; correct (N,) 0/1; groups (N,) labels: the same metrics within each
    under "groups". accuracy, auroc, aupr (errors), aurc, eaurc, accuracy at 50/80/90% coverage; ece, ece_mass and brier
    only when every confidence lies in [0, 1], else nan. Raises ValueError on empty, unequal or non-finite input.
    """
    confidence, correct = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if confidence.ndim != 1 or confidence.shape != correct.shape or not len(confidence):
        raise ValueError(f"confidence {confidence.shape} and correct {correct.shape}: two equally long lists are needed")
    if not np.isfinite(confidence).all() or not np.isin(correct, (0, 1)).all():
        raise ValueError("confidence must be finite and correct 0 or 1")
    kept = _tied(confidence, correct)
    counts = np.arange(1, len(kept) + 1)
    risk, best = 1 - np.cumsum(kept) / counts, 1 - np.cumsum(np.sort(correct)[::-1]) / counts
    is_probability = confidence.min() >= 0 and confidence.max() <= 1
    nan = float("nan")
    result = {
        "n": len(correct), "accuracy": float(correct.mean()), "auroc": auroc(confidence, correct),
        "ece": calibration_error(confidence, correct) if is_probability else nan,
        "ece_mass": calibration_error(confidence, correct, mass=True) if is_probability else nan,
        "brier": float(((confidence - correct) ** 2).mean()) if is_probability else nan,
        "aupr": average_precision_of_errors(confidence, correct),
        "aurc": float(risk.mean()), "eaurc": float(risk.mean() - best.mean()),
    }
    for coverage in (50, 80, 90):
        result[f"accuracy@{coverage}"] = float(kept[:max(1, round(coverage / 100 * len(kept)))].mean())
    if groups is not None:
        groups = np.asarray(groups)
        result["groups"] = {str(g): metrics(confidence[groups == g], correct[groups == g]) for g in np.unique(groups)}
    return result


# ---------------------------------------------------------------------------------------------------------------------
# How sure the figures are: bootstrap by question, maps fitted on held-out questions, thresholds

def clusters(ids):
    """(N,) labels -> list of index arrays, one a question, in the order of first appearance."""
    found = {}
    for i, name in enumerate(ids):
        found.setdefault(name, []).append(i)
    return [np.array(indices) for indices in found.values()]


def bootstrap(ids, confidence, correct, statistics, rounds=1000, seed=0):
    """Statistics of (confidence, correct) on `rounds` resamples of whole questions -> {name: (rounds,) floats}.

    statistics: (confidence, correct) -> {name: float}, such as `metrics`. The answers to one question stay together. The
    same ids and seed give the same questions: differences of two results are paired.
    """
    groups, rng, found = clusters(ids), np.random.default_rng(seed), []
    for _ in range(rounds):
        index = np.concatenate([groups[g] for g in rng.integers(len(groups), size=len(groups))])
        found.append(statistics(confidence[index], correct[index]))
    return {name: np.array([row[name] for row in found]) for name in found[0]}


def mean_interval(ids, values, rounds=1000, seed=0):
    """The mean of values (N,) and its 95% interval, questions resampled -> (mean, low, high)."""
    groups = clusters(ids)
    sums, sizes = np.array([values[g].sum() for g in groups]), np.array([len(g) for g in groups])
    draws = np.random.default_rng(seed).integers(len(groups), size=(rounds, len(groups)))
    return float(values.mean()), *interval(sums[draws].sum(1) / sizes[draws].sum(1))


def interval(values, level=0.95):
    """Percentile interval of bootstrap values, nans left out -> (low, high)."""
    tail = 50 * (1 - level)
    if not np.isfinite(values).any():
        return math.nan, math.nan
    return tuple(float(x) for x in np.nanpercentile(values, [tail, 100 - tail]))


def fit_isotonic(confidence, correct):
    """Isotonic regression by pooling adjacent violators -> a function of confidences, rising, linear between blocks."""
    order = np.argsort(confidence, kind="stable")
    values, index = np.unique(confidence[order], return_inverse=True)
    weights = np.bincount(index).astype(float)
    blocks = []                                     # [mean, weight, number of distinct values]
    for mean, weight in zip(np.bincount(index, correct[order]) / weights, weights):
        blocks.append([mean, weight, 1])
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            mean, weight, size = blocks.pop()
            last = blocks[-1]
            blocks[-1] = [(last[0] * last[1] + mean * weight) / (last[1] + weight), last[1] + weight, last[2] + size]
    fitted = np.repeat([block[0] for block in blocks], [block[2] for block in blocks])
    return lambda x: np.interp(x, values, fitted)


def fit_map(confidence, correct, kind):
    """Confidence -> probability of being right: "platt" (logistic) or "isotonic" -> a function of arrays."""
    if kind == "isotonic":
        return fit_isotonic(confidence, correct)
    slope, intercept = fit_platt(confidence, correct)
    return lambda x: 1 / (1 + np.exp(-np.clip(slope * x + intercept, -60, 60)))


def first_half(ids):
    """(N,) bool: which answers belong to the one half of the questions, by a checksum of their ids."""
    return np.array([zlib.crc32(f"half {name}".encode()) % 2 == 0 for name in ids])


def cross_fitted(ids, confidence, correct, kind="platt"):
    """Confidences mapped to probabilities, each by a map fitted on the other half of the questions (N,)."""
    half = first_half(ids)
    mapped = np.full(len(half), np.nan)
    for own in (half, ~half):
        if own.any() and not own.all():
            mapped[own] = fit_map(confidence[~own], correct[~own], kind)(confidence[own])
    return mapped


def threshold_for(confidence, correct, risk):
    """The lowest confidence from which on at most a share `risk` of the answers is wrong -> (threshold, coverage, risk);
    (inf, 0.0, nan) when no threshold reaches it."""
    best = (math.inf, 0.0, math.nan)
    for threshold in np.unique(confidence)[::-1]:
        kept = confidence >= threshold
        wrong = float(1 - correct[kept].mean())
        if wrong <= risk:
            best = (float(threshold), float(kept.mean()), wrong)
    return best


# ---------------------------------------------------------------------------------------------------------------------
# Answers and the probe

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


def answer(vlm, samples, images, n=4, *, seed=0, batch_size=32, progress=None, **sampling):
    """n sampled answers for each question about given images (lists of PIL images) -> list of Answer, in order."""
    answers = []
    for start in range(0, len(samples), batch_size):
        part = samples[start:start + batch_size]
        rollouts = vlm.sample(images[start:start + batch_size], [data.prompt(s) for s in part], n, seed=[
            f"{seed} {s.id}" for s in part], **sampling)
        for sample, group in zip(part, rollouts):
            for r in group:
                answers.append(Answer(
                    sample.id, str(sample.meta.get("skill", "")), str(sample.meta.get("level", "")), r.text,
                    is_correct(r.text, sample), r.confidences.mean().item(), r.logprobs.mean().exp().item(),
                    r.logprobs.exp().mean().item(), len(r.tokens), r.finished))
        if progress is not None:
            progress.update(len(part))
    return answers


def noised_answers(vlm, samples, clip, t, mode, mass, n, seed, progress=None, **sampling):
    """Answers to the same questions on pictures noised at step t on a region -> list of Answer."""
    images = make_pairs([s.pictures() for s in samples], [s.question for s in samples], clip, (t, t),
                        [mode if t else "all"] * len(samples), mass, [f"{seed} {s.id}" for s in samples])
    return answer(vlm, samples, images, n, seed=f"{seed} {t}", progress=progress, **sampling)


def probe(vlm, samples, clip, ts=PROBE_STEPS, mode="key", mass=0.5, n=4, seed=0, name="", **sampling):
    """Answers on the same questions at each noise step t (paper Figure 1) -> {t: list of Answer}."""
    samples = list(samples)
    with tqdm(total=len(samples) * len(ts), desc=f"probe {name}".strip(), unit="question", leave=False) as progress:
        return {t: noised_answers(vlm, samples, clip, t, mode, mass, n, seed, progress, **sampling) for t in ts}


def prober(vlm, clip, regions, ts, mass, n, seed, **sampling):
    """-> a function: batch of samples -> rows for `catts.answer_file`: {"id", "found": {region: {t: [Answer, ...]}}}."""
    def collect(batch):
        rows = {s.id: {"id": s.id, "found": {region: {} for region in ("clean", *regions)}} for s in batch}
        for region, t in [("clean", 0)] + [(region, t) for region in regions for t in ts if t]:
            for a in noised_answers(vlm, batch, clip, t, region, mass, n, seed, **sampling):
                rows[a.id]["found"][region].setdefault(str(t), []).append(asdict(a))
        return list(rows.values())
    return collect


def probed(rows, region, t):
    """Rows of `prober` -> list of Answer on a region at step t."""
    region, t = (region, t) if t else ("clean", 0)
    return [Answer(**a) for row in rows for a in row["found"][region][str(t)]]


def calibrated(confidences, scale):
    """c = sigmoid(slope * C + intercept) of C (N,), the map that a training run stores in confidence.json (N,)."""
    return probability(torch.as_tensor(confidences), scale["slope"], scale["intercept"]).double().numpy()


def as_fitted(scale):
    """The map of a training run before it was made steeper (`--steepness`): how the c of a model that was not trained by it is
    read."""
    steepness = scale.get("steepness", 1.0)
    return scale | {"slope": scale["slope"] / steepness, "intercept": scale["intercept"] / steepness}


def columns_of(answers):
    """List of Answer -> {field: (N,) array}."""
    return {field: np.array([getattr(a, field) for a in answers]) for field in (
        "id", "correct", "confidence", "probability", "token_probability", "length")}


def summary(clean, noised, scale=None):
    """The before/after columns for one model from its answers on clean and on noised pictures -> dict of floats.

    clean, noised: lists of Answer, or their `columns_of`. AUROC is that of C. ECE and Brier are those of the sequence
    probability exp(mean log-prob), without any fitted map; with a scale (a training run's confidence.json), "ECE c" and
    "Brier c" those of c = sigmoid(slope * C + intercept), a map that was fixed before the first step. gap: mean C on clean
    pictures minus mean C on noised ones.
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
            "AUROC": auroc(clean["confidence"], correct), "ECE": calibration_error(clean["probability"], correct),
            "Brier": brier(clean["probability"]), **by_c, "length": float(clean["length"].mean())}


def summary_intervals(clean, noised, scale=None, rounds=1000, seed=0):
    """`summary` with a 95% interval for each column, questions resampled, on both views alike -> {name: (value, low, high)}."""
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
    """`make` (`summary` or `summary_intervals`) of all answers ("all") and within each skill (pooled numbers lie)."""
    skills = sorted({a.skill for a in clean if a.skill})
    return {"all": make(clean, noised, scale),
            **{skill: make([a for a in clean if a.skill == skill], [a for a in noised if a.skill == skill], scale)
               for skill in skills}}


def headroom(answers):
    """What sampling leaves to gain, from all n answers of each question -> {"pass@1", "majority@n", "pass@n"}.

    majority: the most frequent extracted answer (the first of those that tie), an unanswered one counting as wrong.
    """
    by_id = grouped(answers)
    n, best = len(answers) // len(by_id), [any(a.correct for a in group) for group in by_id]
    return {"pass@1": float(np.mean([a.correct for a in answers])), f"majority@{n}": float(np.mean(majorities(answers))),
            f"pass@{n}": float(np.mean(best))}


def grouped(answers):
    """List of Answer -> lists of the answers to one question, in the order of first appearance."""
    by_id = {}
    for a in answers:
        by_id.setdefault(a.id, []).append(a)
    return list(by_id.values())


def majorities(answers):
    """Whether the majority of each question's answers is right, as in `headroom` -> list of bool, a question each."""
    right = []
    for group in grouped(answers):
        found = [extract_answer(a.text) for a in group]
        right.append(group[found.index(Counter(found).most_common(1)[0][0])].correct)
    return right


def before_after(before, after):
    """Two `within_skills` interleaved, pooled and within skill, for `data.table`."""
    return {f"{skill}, {when}": rows[skill] for skill in before for when, rows in (("before", before), ("after", after))}


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

def risk_coverage(confidence, correct, points=40):
    """[(coverage, risk), ...], most confident first."""
    kept = _tied(confidence, correct)
    risk = 1 - np.cumsum(kept) / np.arange(1, len(kept) + 1)
    places = np.unique(np.linspace(max(0, len(kept) // 20), len(kept) - 1, points).astype(int))
    return [((int(i) + 1) / len(kept), float(risk[i])) for i in places]


def reliability_points(confidence, correct, bins=10):
    """[(mean confidence, accuracy), ...] in bins of equal mass, rising."""
    order = np.argsort(confidence, kind="stable")
    return [(float(confidence[g].mean()), float(correct[g].mean())) for g in np.array_split(order, min(bins, len(order)))]


def plot_reliability(axis, named, bins=10):
    """Reliability diagram of the sequence probability. named: {label: list of Answer}."""
    axis.plot([0, 1], [0, 1], color="0.7", linewidth=1, zorder=0)
    for label, answers in named.items():
        p, correct = (np.array([getattr(a, field) for a in answers], float) for field in ("probability", "correct"))
        axis.plot(*zip(*reliability_points(p, correct, bins)), marker="o", markersize=4,
                  label=f"{label}, ECE {calibration_error(p, correct):.2f}")
    axis.set(xlabel="sequence probability", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), title="Reliability")
    axis.legend(fontsize=8)


def plot_probe(axis, named, field, ylabel):
    """A field of the answers against the noise step. named: {label: {t: list of Answer}}."""
    for label, by_t in named.items():
        axis.plot(list(by_t), [np.mean([getattr(a, field) for a in answers]) for answers in by_t.values()],
                  marker="o", markersize=4, label=label)
    axis.set(xlabel="noise step t", ylabel=ylabel)
    if field != "confidence":
        axis.set_ylim(0, 1)         # accuracy and probability on one scale: what falls, and what does not
    axis.legend(fontsize=8)
