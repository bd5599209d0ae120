r"""What a response is worth: how sure the model was, and the terms of its reward.

Confidence (CDRL, arXiv 2603.12149, Eq. 3); reward terms (Eq. 4, section 3.2.2, and proper scores beside them). Whether an
answer is right, `judge.py` decides. Nothing here knows a model, or how text was sampled.
"""
import math
import re

import torch

from utils import metrics
from utils.judge import boxes, is_correct
from utils.loading import largest

KINDS = ("topk", "logprob", "entropy")          # confidences of a token


def token_values(source, kind):
    """The per-token confidence of a Rollout (T,) or Scores (B, T) that --confidence names; higher = surer."""
    one = hasattr(source, "confidences")
    if kind == "topk":
        return source.confidences if one else source.confidence
    if kind == "logprob":
        return source.logprobs
    return -(source.entropies if one else source.entropy)


def outcomes(groups, samples):
    """R_out (Q, G)."""
    return torch.tensor([[outcome_reward(r.text, s) for r in group] for s, group in zip(samples, groups)])


def confidence_reward(c, c_other, control, judged, correct, scale, args):
    """R_conf's two terms (paper Eq. 4), differentiable in the confidences -> perception, calibration, like judged each.

    c (Q, G), c_other (P, G): C and C' of the perception term, the same for both views; the first P of the Q questions have a
    noised view, None = no question. control (P,) bool: of those, the ones whose noise spares the evidence; no perception
    term. judged (Q, G) or (P, G): the confidence that the calibration term holds against `correct`, each view's own.
    """
    perception = torch.zeros_like(judged)
    if args.alpha and c_other is not None:
        term = perception_term(c[:len(c_other)], c_other, args.alpha, args.beta)
        perception[:len(c_other)] = term.masked_fill(control[:, None].to(c.device), 0)
    if args.calibration == "none":
        return perception, torch.zeros_like(judged)
    if args.calibration == "linear":
        c_norm = (normalise_group(judged) if args.cnorm == "group"
                  else normalise_range(judged, scale["lo"], scale["hi"]))
        return perception, calibration_linear(c_norm, correct)
    proper = calibration_brier if args.calibration == "brier" else calibration_log
    probability = judged.exp() if args.probability == "exp" else metrics.probability(judged, scale["slope"], scale["intercept"])
    return perception, proper(probability, correct)


def set_apart(c, weight):
    """The values of c (Q, G), with weight times the gradient of each one's distance from the mean of its group. In the mean
    over rollouts a proper score is still best where c is the true rate: each part of its gradient is 0 there. Answers to one
    question share the picture, and nearly all of C with it: at weight 1 C learns which questions are hard, and nothing about
    which of the answers is right."""
    apart = c - c.mean(-1, keepdim=True)
    return c + (weight - 1) * (apart - apart.detach())


def group_advantages(rewards, norm):
    """A_j = (r_j - mean) / (std + 1e-4) in the group (GRPO), or r_j - mean (Dr. GRPO): (Q, G) -> (Q, G), divisor (Q, 1)."""
    centred = rewards - rewards.mean(-1, keepdim=True)
    spread = rewards.std(-1, keepdim=True) + 1e-4 if norm == "std" else torch.ones_like(rewards[:, :1])
    return centred / spread, spread


def top_k_for(vocab, k=20):
    """The k of Eq. 3 for a vocabulary of `vocab` tokens: k, but at most an eighth of a tiny vocabulary, at least 1."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    return min(k, max(1, vocab // 8))


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


def measure_scale(original, noised, steepness):
    """The base model's confidence, once, before step 0 -> {"lo", "hi", "slope", "intercept", "steepness"}.

    original, noised: (C, R_out) of its rollouts on each view, (N,) each. lo, hi: 5th and 95th percentile of C on original
    pictures (`--cnorm range`). slope, intercept: the logistic map from C to the probability of being right, fitted on both
    views, times steepness (`--calibration brier|log`).
    """
    lo, hi = torch.quantile(original[0], torch.tensor([0.05, 0.95])).tolist()
    slope, intercept = metrics.fit_platt(*(torch.cat(both) for both in zip(original, noised)))
    return {"lo": lo, "hi": max(hi, lo + 1e-6), "slope": steepness * slope, "intercept": steepness * intercept,
            "steepness": steepness}
