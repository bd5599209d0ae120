"""Numbers from (confidence, correct): AUROC, calibration error, risk and coverage, bootstrap, fitted maps."""
import math
import zlib

import numpy as np
import torch

MIN_QUESTIONS = 10              # fewer give no interval: resampling them tells nothing


def _tied(confidence, correct):
    """Correctness, most confident first, ties replaced by their mean: the expected value under a random order
    of ties."""
    order = np.argsort(-confidence, kind="stable")
    block = np.cumsum(np.diff(confidence[order],
                              prepend=confidence[order[:1]]) != 0)          # which run of equal values
    return (np.bincount(block, correct[order]) / np.bincount(block))[block]


def auroc(confidence, correct):
    """P(a right answer is more confident than a wrong one), ties count half; nan when all are right or all
    wrong."""
    right, wrong = int(correct.sum()), int(len(correct) - correct.sum())
    if not right or not wrong:
        return float("nan")
    _, where, counts = np.unique(confidence, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[where]
    return float((ranks[correct == 1].sum() - right * (right + 1) / 2) / (right * wrong))


def average_precision_of_errors(confidence, correct):
    """AUPR with wrong answers as the positive class and low confidence as the score; nan when nothing is
    wrong."""
    errors = 1 - correct
    if not errors.sum():
        return float("nan")
    order = np.argsort(confidence, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(confidence[order])),
                     len(order) - 1)     # one threshold a distinct value
    hits = np.cumsum(errors[order])[ends]
    return float(np.sum(np.diff(hits, prepend=0) / errors.sum() * hits / (ends + 1)))


def calibration_error(confidence, correct, bins=15, mass=False):
    """ECE: mean |accuracy - confidence| over bins of equal width, (lower, upper] each, or of equal mass. nan
    where a confidence is nan, as of a map whose other half has no questions (`cross_fitted`)."""
    if not np.isfinite(confidence).all():
        return math.nan
    if mass:
        index = np.empty(len(confidence), int)
        for b, group in enumerate(np.array_split(np.argsort(confidence, kind="stable"),
                                                 min(bins, len(confidence)))):
            index[group] = b
    else:
        index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    return float(np.abs(np.bincount(index, correct) - np.bincount(index, confidence)).sum() / len(confidence))


def confidence_metrics(confidence, correct, groups=None):
    """Everything about one list of answers -> dict of floats.

    confidence (N,) any real numbers, higher = surer; correct (N,) 0/1; groups (N,) labels: the same metrics
    within each under "groups". accuracy, auroc, aupr (errors), aurc, eaurc, accuracy at 50/80/90% coverage;
    ece, ece_mass, brier and over (mean confidence minus accuracy, with its sign) only when every confidence
    lies in [0, 1], else nan. Raises ValueError on empty, unequal or non-finite input.
    """
    confidence, correct = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if confidence.ndim != 1 or confidence.shape != correct.shape or not len(confidence):
        raise ValueError(f"confidence {confidence.shape} and correct {correct.shape}: two equally long "
                         f"lists are needed")
    if not np.isfinite(confidence).all() or not np.isin(correct, (0, 1)).all():
        raise ValueError("confidence must be finite and correct 0 or 1")
    ranked = _tied(confidence, correct)
    counts = np.arange(1, len(ranked) + 1)
    risk, best = 1 - np.cumsum(ranked) / counts, 1 - np.cumsum(np.sort(correct)[::-1]) / counts
    is_probability = confidence.min() >= 0 and confidence.max() <= 1
    nan = float("nan")
    result = {
        "n": len(correct), "accuracy": float(correct.mean()), "auroc": auroc(confidence, correct),
        "ece": calibration_error(confidence, correct) if is_probability else nan,
        "ece_mass": calibration_error(confidence, correct, mass=True) if is_probability else nan,
        "brier": float(((confidence - correct) ** 2).mean()) if is_probability else nan,
        "over": float((confidence - correct).mean()) if is_probability else nan,
        "aupr": average_precision_of_errors(confidence, correct),
        "aurc": float(risk.mean()), "eaurc": float(risk.mean() - best.mean()),
    }
    for coverage in (50, 80, 90):
        result[f"accuracy@{coverage}"] = float(ranked[:max(1, round(coverage / 100 * len(ranked)))].mean())
    if groups is not None:
        groups = np.asarray(groups)
        result["groups"] = {str(g): confidence_metrics(confidence[groups == g], correct[groups == g])
                            for g in np.unique(groups)}
    return result


def clusters(ids):
    """(N,) labels -> list of index arrays, one a question, in the order of first appearance."""
    groups = {}
    for i, name in enumerate(ids):
        groups.setdefault(name, []).append(i)
    return [np.array(indices) for indices in groups.values()]


def bootstrap(ids, confidence, correct, statistics, rounds=1000, seed=0):
    """Statistics of (confidence, correct) on `rounds` resamples of whole questions -> {name: (rounds,)
    floats}.

    statistics: (confidence, correct) -> {name: float}, such as `confidence_metrics`. The answers to one
    question stay together. The same ids and seed give the same questions: differences of two results are
    paired.
    """
    groups, rng, resamples = clusters(ids), np.random.default_rng(seed), []
    for _ in range(rounds):
        index = np.concatenate([groups[g] for g in rng.integers(len(groups), size=len(groups))])
        resamples.append(statistics(confidence[index], correct[index]))
    return {name: np.array([row[name] for row in resamples]) for name in resamples[0]}


def mean_interval(ids, values, rounds=1000, seed=0):
    """The mean of values (N,) and its 95% interval, questions resampled -> (mean, low, high)."""
    groups = clusters(ids)
    sums, sizes = np.array([values[g].sum() for g in groups]), np.array([len(g) for g in groups])
    draws = np.random.default_rng(seed).integers(len(groups), size=(rounds, len(groups)))
    return float(values.mean()), *interval(sums[draws].sum(1) / sizes[draws].sum(1))


def interval(values, level=0.95, count=MIN_QUESTIONS):
    """Percentile interval of bootstrap values, nans left out -> (low, high).

    count: of the questions that were resampled; nan where there are too few.
    """
    tail = 50 * (1 - level)
    if count < MIN_QUESTIONS or not np.isfinite(values).any():
        return math.nan, math.nan
    return tuple(float(x) for x in np.nanpercentile(values, [tail, 100 - tail]))


def fit_isotonic(confidence, correct):
    """Isotonic regression by pooling adjacent violators -> a function of confidences, rising, linear between
    blocks."""
    order = np.argsort(confidence, kind="stable")
    values, index = np.unique(confidence[order], return_inverse=True)
    weights = np.bincount(index).astype(float)
    blocks = []                                     # [mean, weight, number of distinct values]
    for mean, weight in zip(np.bincount(index, correct[order]) / weights, weights):
        blocks.append([mean, weight, 1])
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            mean, weight, size = blocks.pop()
            last = blocks[-1]
            blocks[-1] = [(last[0] * last[1] + mean * weight) / (last[1] + weight), last[1] + weight,
                          last[2] + size]
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
    for side in (half, ~half):
        if side.any() and not side.all():
            mapped[side] = fit_map(confidence[~side], correct[~side], kind)(confidence[side])
    return mapped


def threshold_for(confidence, correct, risk):
    """The lowest confidence from which on at most a share `risk` of the answers is wrong -> (threshold,
    coverage, risk); (inf, 0.0, nan) when no threshold reaches it."""
    best = (math.inf, 0.0, math.nan)
    for threshold in np.unique(confidence)[::-1]:
        answered = confidence >= threshold
        wrong = float(1 - correct[answered].mean())
        if wrong <= risk:
            best = (float(threshold), float(answered.mean()), wrong)
    return best


def calibrated(confidences, scale):
    """c = sigmoid(slope * C + intercept) of C (N,), the map that a training run stores in confidence.json
    (N,)."""
    return probability(torch.as_tensor(confidences), scale["slope"], scale["intercept"]).double().numpy()


def as_fitted(scale):
    """The map of a training run before it was made steeper (`--steepness`): how the c of a model that was not
    trained by it is read."""
    steepness = scale.get("steepness", 1.0)
    return scale | {"slope": scale["slope"] / steepness, "intercept": scale["intercept"] / steepness}


def risk_coverage(confidence, correct, points=40):
    """[(coverage, risk), ...], most confident first."""
    ranked = _tied(confidence, correct)
    risk = 1 - np.cumsum(ranked) / np.arange(1, len(ranked) + 1)
    places = np.unique(np.linspace(max(0, len(ranked) // 20), len(ranked) - 1, points).astype(int))
    return [((int(i) + 1) / len(ranked), float(risk[i])) for i in places]


def reliability_points(confidence, correct, bins=10):
    """[(mean confidence, accuracy), ...] in bins of equal mass, rising."""
    order = np.argsort(confidence, kind="stable")
    return [(float(confidence[g].mean()), float(correct[g].mean()))
            for g in np.array_split(order, min(bins, len(order)))]


def probability(c, slope, intercept):
    """The probability of being right that a confidence stands for: sigmoid(slope * c + intercept); any
    shape."""
    return torch.sigmoid(slope * c + intercept)


def fit_platt(c, correct, ridge=1e-3):
    """Fit `probability` by logistic regression (Platt, 1999): c, correct (N,) -> floats slope, intercept.

    Newton's method in float64 on the standardised confidence. Platt's smoothed targets, (N+ + 1)/(N+ + 2) and
    1/(N- + 2), keep the optimum finite for separable or one-class data; the ridge settles the slope of a
    constant c. ValueError unless both are equally long, not empty, and c is finite.
    """
    c, right = (torch.as_tensor(x).detach().cpu().double() for x in (c, correct))
    if c.ndim != 1 or c.shape != right.shape or len(c) == 0 or not c.isfinite().all():
        raise ValueError(f"fit_platt needs two finite (N,) inputs, got {tuple(c.shape)} and "
                         f"{tuple(right.shape)}.")
    targets = torch.where(right > 0, (right.sum() + 1) / (right.sum() + 2), 1 / (len(c) - right.sum() + 2))
    centre, scale = c.mean(), c.std(correction=0)
    scale = torch.where(scale > 1e-12 * (1 + centre.abs()), scale, 1)
    design = torch.stack([(c - centre) / scale, torch.ones_like(c)], dim=1)  # (N, 2)

    def loss(weights):
        z = design @ weights
        return torch.nn.functional.softplus(z).sum() - targets @ z + ridge / 2 * weights @ weights

    weights = torch.zeros(2, dtype=torch.float64)
    for _ in range(50):
        p = torch.sigmoid(design @ weights)
        hessian = (design.T * (p * (1 - p))) @ design + ridge * torch.eye(2, dtype=torch.float64)
        step = torch.linalg.solve(hessian, design.T @ (p - targets) + ridge * weights)
        if step.abs().max() < 1e-7:
            break
        # a full Newton step may overshoot
        while loss(weights - step) > loss(weights) and step.abs().max() > 1e-7:
            step = step / 2
        weights = weights - step
    slope = weights[0] / scale
    return slope.item(), (weights[1] - slope * centre).item()
