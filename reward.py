r"""What a response is worth: how sure the model was, and the terms of its reward.

Confidence (CDRL, arXiv 2603.12149, Eq. 3); reward terms (Eq. 4, section 3.2.2, and proper scores beside them). Whether an
answer is right, `judge.py` decides. Nothing here knows a model, or how text was sampled.
"""
import math
import re

import torch

from utils.judge import accepts, boxes, equivalent, extract_answer, is_correct  # noqa: F401 - the judge is spoken to by this name too

# ----------------------------------------------------------------------------------------------------------------------
# 1. Confidence. Higher = more certain, everywhere in this repository. The paper's prose says the opposite of its own
#    Eq. 3; the equation, the authors' code and DeepConf (arXiv 2508.15260) agree with us: in a peaked distribution the
#    k - 1 runners-up have very negative log-probabilities, so minus the mean is large.
#    Known flaw: it is no probability, and not monotone in entropy: uniform over V > k tokens scores log V, more than
#    uniform over k, log k. Hence the alternatives `logprob` and `entropy`, read by the same `sequence_confidence`.


def top_k_for(vocab, k=20):
    """The k of Eq. 3 for a vocabulary of `vocab` tokens: k, but at most an eighth of a tiny vocabulary, at least 1."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    return min(k, max(1, vocab // 8))


def largest(values, k, width=128):
    """The k largest of (..., V), in falling order -> (..., k), as `topk` finds them.

    `topk` walks over a real vocabulary several times. Whatever is among the k largest lies in one of the k chunks of `width`
    whose maxima are highest, so that one walk for the maxima is enough.
    """
    chunks = values.shape[-1] // width
    if chunks < 8 * k:
        return values.topk(k).values
    whole = values[..., :chunks * width].unflatten(-1, (chunks, width))                       # (..., chunks, width)
    best = whole.detach().amax(-1).topk(k).indices[..., None]                                 # (..., k, 1)
    among = whole.gather(-2, best.expand(*best.shape[:-1], width)).flatten(-2)                # (..., k * width)
    return torch.cat([among, values[..., chunks * width:]], -1).topk(k).values


def token_confidence(logits, k=20, normaliser=None):
    """Eq. 3: conf_t = -(1/k) * sum of log p over the k most probable tokens.

    logits: (..., V), raw: before temperature, top-k, top-p, penalties and bans. normaliser: their logsumexp (...), where it is
    known already. Returns (...) fp32, nats, >= log k. Differentiable. The normaliser is taken out of the sum, so that no
    (..., V) log-softmax is stored.
    """
    logits = logits.float()
    top = largest(logits, top_k_for(logits.shape[-1], k))
    return (logits.logsumexp(-1) if normaliser is None else normaliser) - top.mean(-1)


def token_entropy(logits, normaliser=None):
    """Shannon entropy of the next token: (..., V) raw logits -> (...) fp32, nats, in [0, log V]. normaliser: as above.

    Its negative is the `entropy` confidence. As log Z - E[logit] the gradient stays finite where a probability is 0.
    """
    logits = logits.float()
    return (logits.logsumexp(-1) if normaliser is None else normaliser) - (logits.softmax(-1) * logits).sum(-1)


def sequence_confidence(token_conf, mask, reading="mean", window=32):
    """One confidence per sequence, (B, T) and (B, T) -> (B,) fp32: the mean of Eq. 3, or a trace reading of DeepConf.

    token_conf: `token_confidence`, or log-probs (`logprob`: exp of the mean is in (0, 1]), or negative entropies.
    mask: bool or 0/1, true on generated tokens, EOS included, padding on either side excluded.
    reading: mean | tail: the last `window` tokens | min: the lowest sliding window | bottom: the lowest 10% of them, at
    least one. A sequence shorter than `window` is one window. ValueError on an unknown reading or an empty row.
    """
    if reading not in ("mean", "tail", "bottom", "min"):
        raise ValueError(f"unknown reading {reading!r}: choose mean, tail, bottom or min.")
    token_conf, mask = token_conf.float(), mask.bool()
    if not mask.any(-1).all():
        raise ValueError("a row of the mask is empty: a confidence needs at least one generated token.")
    if reading == "mean":
        return token_conf.masked_fill(~mask, 0).sum(-1) / mask.sum(-1)
    rows = []
    for conf, keep in zip(token_conf, mask):
        conf = conf[keep]
        windows = conf.unfold(0, min(window, len(conf)), 1).mean(-1)
        lowest = max(1, len(windows) // 10) if reading == "bottom" else 1
        rows.append(windows[-1] if reading == "tail" else windows.topk(lowest, largest=False).values.mean())
    return torch.stack(rows)


# ----------------------------------------------------------------------------------------------------------------------
# 2. Reward terms. Tensors that broadcast; c is a sequence confidence, `correct` is R_out in {0, 1} (or bool).


def perception_term(c, c_noised, alpha, beta):
    """Eq. 4, first term: alpha * tanh(beta * (C - C')), within +-alpha; C' is the confidence on the noised image."""
    return alpha * torch.tanh(beta * (c - c_noised))


def normalise_range(c, lo, hi):
    """Cnorm on an absolute scale: (c - lo) / (hi - lo) clipped to [0, 1] (gradient 0 there). ValueError if lo >= hi."""
    if not lo < hi:
        raise ValueError(f"normalise_range needs lo < hi, got {lo} and {hi}: measure them again on the base model.")
    return ((c - lo) / (hi - lo)).clamp(0, 1)


def normalise_group(c):
    """Cnorm inside a group: min-max over the last dimension, (..., G) -> (..., G) in [0, 1]; 0.5 if all are equal."""
    lo, hi = c.amin(-1, keepdim=True), c.amax(-1, keepdim=True)
    spread = torch.where(hi > lo, hi - lo, 1)
    return torch.where(hi > lo, (c - lo) / spread, 0.5)


def calibration_linear(c_norm, correct):
    """Eq. 4, second term: (2R - 1) * Cnorm, in [-1, 1]. Improper: linear in Cnorm, so 0 or 1 is always the best bet."""
    return (2 * correct.to(c_norm) - 1) * c_norm


def calibration_brier(prob, correct):
    """Proper (RLCR, arXiv 2507.16806): 1 - (p - R)^2, in [0, 1]; its expectation peaks where p is the true rate."""
    return 1 - (prob - correct.to(prob)) ** 2


def calibration_log(prob, correct, floor=0.01):
    """Proper for rates in [floor, 1 - floor]: log p if right, log(1 - p) if wrong, p clipped (no gradient outside).

    Mapped affinely to [0, 1], like Brier: (score - log floor) / (log(1 - floor) - log floor); 0 = sure and wrong.
    """
    prob = prob.clamp(floor, 1 - floor)
    score = torch.where(correct.bool(), prob, 1 - prob).log()
    return (score - math.log(floor)) / (math.log(1 - floor) - math.log(floor))


def probability(c, slope, intercept):
    """The probability of being right that a confidence stands for: sigmoid(slope * c + intercept); any shape."""
    return torch.sigmoid(slope * c + intercept)


def fit_platt(c, correct, ridge=1e-3):
    """Fit `probability` by logistic regression (Platt, 1999): c, correct (N,) -> floats slope, intercept.

    Newton's method in float64 on the standardised confidence. Platt's smoothed targets, (N+ + 1)/(N+ + 2) and
    1/(N- + 2), keep the optimum finite for separable or one-class data; the ridge settles the slope of a constant c.
    ValueError unless both are equally long, not empty, and c is finite.
    """
    c, right = (torch.as_tensor(x).detach().cpu().double() for x in (c, correct))
    if c.ndim != 1 or c.shape != right.shape or len(c) == 0 or not c.isfinite().all():
        raise ValueError(f"fit_platt needs two finite (N,) inputs, got {tuple(c.shape)} and {tuple(right.shape)}.")
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
        while loss(weights - step) > loss(weights) and step.abs().max() > 1e-7:  # a full Newton step may overshoot
            step = step / 2
        weights = weights - step
    slope = weights[0] / scale
    return slope.item(), (weights[1] - slope * centre).item()


def format_reward(text, finished):
    r"""R_format in {0., 1.}: one well-formed, non-empty `\boxed{}`, words before it, and `finished` (ended by EOS)."""
    found = boxes(text)
    if not finished or len(found) != 1 or text.count("\\boxed") != 1:
        return 0.0
    start, content = found[0]
    return float(text[content].strip() != "" and re.search(r"\w", text[:start]) is not None)


def outcome_reward(text, sample):
    """R_out in {0., 1.}: whether the judge accepts the response."""
    return float(is_correct(text, sample))
