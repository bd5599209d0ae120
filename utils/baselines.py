"""What costs no training, and the figures by which a trained confidence is held against it.

Free readings of a model: its sequence probability p; C and p through a map fitted on other questions; the
share of a majority; a logistic readout of its last hidden state, as in P(IK) (Kadavath et al., arXiv
2207.05221), also with the ranking loss against a blank picture of BICR (arXiv 2605.10893). Arrays are (N,),
one entry an answer; ids name the questions.
"""
import base64
import math
from collections import Counter

import numpy as np
import torch

from utils.metrics import (
    auroc,
    calibrated,
    calibration_error,
    clusters,
    confidence_metrics,
    cross_fitted,
    first_half,
    interval,
)

RIDGE = 100.0                   # weight of half the squared norm of the readout, on standardised states


# ------------------------------------------------------------------------------------------------------------
# Headline figures

def auroc_over_views(clean, noised):
    """AUROC over the answers to clean and to noised pictures together, each view weighing one half (float).

    clean, noised: (confidence, correct) of any lengths. Does the confidence say which answers are right, also
    when the evidence is gone? nan where all are right or all are wrong.
    """
    confidence, correct = (np.concatenate(pair) for pair in zip(clean, noised))
    weights = np.concatenate([np.full(len(view[0]), 1 / len(view[0])) for view in (clean, noised)])
    right, wrong = weights * (correct == 1), weights * (correct == 0)
    if not right.sum() or not wrong.sum():
        return math.nan
    _, place = np.unique(confidence, return_inverse=True)
    right, wrong = np.bincount(place, right), np.bincount(place, wrong)     # by distinct value, rising
    below = np.cumsum(wrong) - wrong / 2                                    # ties count half
    return float((right * below).sum() / (right.sum() * wrong.sum()))


def pairs_within_questions(ids, confidence, correct):
    """Pairs of a right and a wrong answer to one question -> (Q,) those where the right one is more
    confident, ties counting half, and (Q,) all."""
    won, pairs = [], []
    for group in clusters(ids):
        right = correct[group] == 1
        difference = confidence[group][right][:, None] - confidence[group][~right]      # (right, wrong)
        won.append((0.5 + 0.5 * np.sign(difference)).sum())
        pairs.append(difference.size)
    return np.array(won), np.array(pairs)


def auroc_within_questions(ids, confidence, correct):
    """Does the confidence tell the right answers to one question from the wrong ones? The share of
    `pairs_within_questions` that are in order, which is the questions' AUROCs weighed by their numbers of
    pairs (float; nan without pairs)."""
    won, pairs = pairs_within_questions(ids, confidence, correct)
    return float(won.sum() / pairs.sum()) if pairs.sum() else math.nan


def declines(probability, threshold=0.5):
    """Share of answers whose stated probability of being right is below a threshold (float)."""
    return float((probability < threshold).mean())


def majority_share(ids, answers, correct):
    """The most frequent answer to each question and the share of its votes -> share (Q,), correct (Q,).

    answers: N strings or None, None being an answer that could not be read. The first of those that tie wins.
    """
    shares, right = [], []
    for group in clusters(ids):
        votes = [answers[i] for i in group]
        best, count = Counter(votes).most_common(1)[0]
        shares.append(count / len(group))
        right.append(0.0 if best is None else float(correct[group[votes.index(best)]]))
    return np.array(shares), np.array(right)


def interval_over_seeds(values, resamples, seed=0, level=0.95):
    """95% interval of a mean over training seeds, of seeds and of questions -> (mean, low, high).

    values (S,): the statistic of each seed. resamples (S, R): the same on R draws of questions, draw r alike
    in each seed. Seeds are drawn anew as well; with replacement a few vary too little, which S / (S - 1)
    corrects. Of one seed: the interval of the questions alone.
    """
    values, resamples = np.asarray(values, float), np.asarray(resamples, float)
    count, rounds = resamples.shape
    drawn = np.random.default_rng(seed).integers(count, size=(rounds, count))
    between = (values[drawn].mean(1) - values.mean()) * math.sqrt(count / max(1, count - 1))
    tail = 50 * (1 - level)
    return float(values.mean()), *map(float,
                                      np.nanpercentile(resamples.mean(0) + between, [tail, 100 - tail]))


# ------------------------------------------------------------------------------------------------------------
# Readouts of a frozen model

def fit_readout(states, correct, blank=None, ranking=0.0, ridge=RIDGE):
    """Logistic regression of correct (N,) on states (N, D) -> weights (D + 1,) float64 on raw states, the
    intercept last.

    With blank (N, D), the states on a picture without content: `ranking` times softplus(z_blank - z) for each
    right answer, so that seeing counts (BICR). The loss is summed over answers; it is convex, and the ridge
    makes the optimum unique.
    """
    x, y = torch.as_tensor(states, dtype=torch.float64), torch.as_tensor(correct, dtype=torch.float64)
    centre, scale = x.mean(0), x.std(0, correction=0)
    scale = torch.where(scale > 1e-9 * (1 + centre.abs()), scale, 1)

    def standard(rows):
        rows = (torch.as_tensor(rows, dtype=torch.float64) - centre) / scale
        return torch.nn.functional.pad(rows, (0, 1), value=1.0)
    design = standard(states)
    blank_design = None if blank is None else standard(blank)
    weights = torch.zeros(design.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=300, tolerance_grad=1e-7, tolerance_change=1e-12,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        z = design @ weights
        loss = torch.nn.functional.binary_cross_entropy_with_logits(z, y, reduction="sum")
        if blank_design is not None:
            loss = loss + ranking * (y * torch.nn.functional.softplus(blank_design @ weights - z)).sum()
        loss = loss + ridge / 2 * (weights[:-1] ** 2).sum()
        loss.backward()
        return loss
    optimizer.step(closure)
    slopes = weights[:-1].detach() / scale
    return torch.cat([slopes, weights[-1:].detach() - slopes @ centre])


def cross_fitted_readout(ids, states, correct, fit_on=None, blank=None, ranking=0.0):
    """The probability of being right that a readout gives, each fitted on the other half of the questions
    (N,).

    states (N, D): the hidden state of the question that each answer belongs to. fit_on (N,) bool: the rows
    that may be fitted on, default all. blank, ranking: as in `fit_readout`. nan where the other half has no
    rows, or one outcome alone.
    """
    half, states, correct = first_half(ids), np.asarray(states, float), np.asarray(correct, float)
    fit_on = np.ones(len(half), bool) if fit_on is None else fit_on
    probabilities = np.full(len(half), np.nan)
    for side in (half, ~half):
        rows = ~side & fit_on
        if side.any() and 0 < correct[rows].sum() < rows.sum():
            weights = fit_readout(states[rows], correct[rows], None if blank is None else blank[rows],
                                  ranking).numpy()
            z = np.clip(states[side] @ weights[:-1] + weights[-1], -60, 60)
            probabilities[side] = 1 / (1 + np.exp(-z))
    return probabilities


# ------------------------------------------------------------------------------------------------------------
# One row a model

def free_maps(ids, confidence, correct):
    """ECE of a confidence after a map that was fitted on the other half of the questions -> {"platt",
    "isotonic": float}."""
    return {kind: calibration_error(cross_fitted(ids, confidence, correct, kind), correct)
            for kind in ("platt", "isotonic")}


def headline(clean, noised, scale=None, quick=False):
    """The headline columns of one model -> dict of floats. "mixed": over clean and noised answers together.

    clean, noised: its answers to clean pictures and to pictures with noise on the evidence, columns by name
    ("id", "correct", "confidence": C, "probability": p, (N,) each; `tables.columns_of`). scale: the map from
    C to c that was fixed before training began (confidence.json); None where there is none. quick: without
    maps and pairs within questions, which take long.
    """
    ids, right, blind = clean["id"], clean["correct"].astype(float), noised["correct"].astype(float)
    row = {"pass@1": float(right.mean())}
    for name, field in (("C", "confidence"), ("p", "probability")):
        value = clean[field]
        row |= {f"AUROC mixed, {name}": auroc_over_views((value, right), (noised[field], blind)),
                f"AUROC, {name}": auroc(value, right),
                f"AURC, {name}": confidence_metrics(value, right)["aurc"]}
        if not quick:
            row |= {f"AUROC within questions, {name}": auroc_within_questions(ids, value, right),
                    **{f"ECE {name}, {kind}": error for kind, error in free_maps(ids, value, right).items()}}
    row["gap"] = float(clean["confidence"].mean() - noised["confidence"].mean())
    row["ECE p"] = calibration_error(clean["probability"], right)
    if scale:
        c, c_noised = (calibrated(view["confidence"], scale) for view in (clean, noised))
        row |= {"ECE c": calibration_error(c, right), "declines, clean": declines(c),
                "declines, noised": declines(c_noised)}
    return row


def headline_intervals(clean, noised, scale=None, rounds=1000, seed=0):
    """`headline` with the 95% interval of each column but the mapped ones, questions resampled, on both views
    alike -> {name: (value, low, high) or value}."""
    groups, rng = [clusters(view["id"]) for view in (clean, noised)], np.random.default_rng(seed)
    resamples = []
    within = {name: pairs_within_questions(clean["id"], clean[field], clean["correct"])
              for name, field in (("C", "confidence"), ("p", "probability"))}
    for _ in range(rounds):
        draw = rng.integers(len(groups[0]), size=len(groups[0]))
        index = [np.concatenate([rows[g] for g in draw]) for rows in groups]
        views = ({name: column[i] for name, column in view.items()}
                 for view, i in zip((clean, noised), index))
        shares = {f"AUROC within questions, {name}": won[draw].sum() / max(1, pairs[draw].sum())
                  for name, (won, pairs) in within.items()}
        resamples.append(headline(*views, scale, quick=True) | shares)
    return {name: (value, *interval(np.array([row[name] for row in resamples]), count=len(groups[0])))
            if name in resamples[0] else value for name, value in headline(clean, noised, scale).items()}


def readouts(clean, noised, states, ranking=1.0):
    """The free readouts of a frozen model -> {name: {"AUROC mixed", "AUROC", "ECE"}}, cross-fitted.

    clean, noised: as for `headline`. states: {"clean", "noised", "blank": {id: (D,)}}, the last hidden state
    of each question with its picture, the noised picture, and a blank one. "P(IK)": fitted on clean answers;
    "BICR": with the ranking loss; "P(IK), both views": fitted on clean and noised answers, as training with
    noised pictures is.
    """
    ids = np.concatenate([clean["id"], noised["id"]])
    correct = np.concatenate([clean["correct"], noised["correct"]]).astype(float)
    is_clean = np.arange(len(ids)) < len(clean["id"])
    with_picture = np.stack([states["clean" if sees else "noised"][i]
                             for i, sees in zip(ids, is_clean)])
    blank = np.stack([states["blank"][i] for i in ids])
    rows = {}
    for name, fit_on, without in (("P(IK)", is_clean, None), ("BICR", is_clean, blank),
                                  ("P(IK), both views", None, None)):
        p = cross_fitted_readout(ids, with_picture, correct, fit_on, without, ranking)
        rows[name] = dict.fromkeys(("AUROC mixed", "AUROC", "ECE"), math.nan)
        if np.isfinite(p).all():
            on_clean, on_noised = ((p[view], correct[view]) for view in (is_clean, ~is_clean))
            rows[name] = {"AUROC mixed": auroc_over_views(on_clean, on_noised), "AUROC": auroc(*on_clean),
                          "ECE": calibration_error(*on_clean)}
    return rows


def by_figure(rows):
    """{model: {figure: value}} -> {figure: {model: value}}, nan where a model has none."""
    figures = list(dict.fromkeys(figure for row in rows.values() for figure in row))
    return {figure: {name: row.get(figure, math.nan) for name, row in rows.items()} for figure in figures}


def packed(state):
    """A hidden state (D,) -> text for a results file, in half precision."""
    values = np.asarray(state, dtype=np.float32).clip(-65504, 65504)
    return base64.b64encode(values.astype("<f2").tobytes()).decode()


def unpacked(text):
    """`packed` text -> (D,) float64."""
    return np.frombuffer(base64.b64decode(text), dtype="<f2").astype(np.float64)


# ------------------------------------------------------------------------------------------------------------
# Severity curves

def severity_row(clean, corrupted, scale=None):
    """What one corruption at one severity does -> dict of floats. clean, corrupted, scale: as for
    `headline`."""
    right = corrupted["correct"].astype(float)
    row = {"accuracy": float(right.mean()), "C": float(corrupted["confidence"].mean()),
           "p": float(corrupted["probability"].mean())}
    for name, field in (("C", "confidence"), ("p", "probability")):
        row[f"AUROC mixed, {name}"] = auroc_over_views((clean[field], clean["correct"]),
                                                       (corrupted[field], right))
    if scale:
        c = calibrated(corrupted["confidence"], scale)
        row |= {"c": float(c.mean()), "ECE c": calibration_error(c, right), "declines": declines(c)}
    return row
