r"""What a response is worth: how sure the model was (Eq. 3), and the terms of its reward (Eq. 4).

Read from top to bottom: confidence of a token and of a sequence; the two terms of Eq. 4 and their variants;
their sum; outcome and format (paper 3.2.2); advantages; the map from C to a probability. Nothing here knows a
model or how text was sampled. Whether an answer is right is decided in `utils/judge.py`.

C: mean over the generated tokens of -(1/k) * sum of log p over the k most probable tokens. C': the same on
the noised picture. c = sigmoid(slope * C + intercept): the probability of being right that C stands for, by a
map fitted once on the base.
"""
import math
import re

import torch
from torch.nn.utils.rnn import pad_sequence

from utils.judge import boxes
from utils.loading import largest
from utils.metrics import fit_platt

LOG_FLOOR = 0.01                # the log score clips probabilities to [.01, .99]

# ------------------------------------------------------------------------------------------------------------
# Confidence. Higher = more certain, everywhere in this repository. The paper's prose says the opposite of its
# own Eq. 3. The equation, the authors' code and DeepConf (arXiv 2508.15260) agree with us: in a peaked
# distribution the k - 1 runners-up have very negative log-probabilities, so minus their mean is large. Known
# flaw: C is no probability, and not monotone in entropy. Uniform over V > k tokens scores log V, more than
# uniform over k, log k.


def top_k_for(vocab, k=20):
    """The k of Eq. 3 for a vocabulary of `vocab` tokens: k, at most an eighth of a tiny one, at least 1."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    return min(k, max(1, vocab // 8))


def token_confidence(logits, k=20, normaliser=None):
    """Eq. 3: conf_t = -(1/k) * sum of log p over the k most probable tokens.

    logits: (..., V), raw: before temperature, top-k, top-p, penalties and bans. normaliser: their logsumexp
    (...), where it is known already. Returns (...) fp32, nats, >= log k. Differentiable. The normaliser is
    taken out of the sum, so that no (..., V) log-softmax is stored.
    """
    logits = logits.float()
    top = largest(logits, top_k_for(logits.shape[-1], k))
    return (logits.logsumexp(-1) if normaliser is None else normaliser) - top.mean(-1)


def sequence_confidence(token_conf, mask):
    """C: the mean of Eq. 3 over each sequence's tokens, (B, T) and (B, T) -> (B,) fp32. Differentiable.

    token_conf: `token_confidence`, or log-probs (exp of their mean is in (0, 1]). mask: bool or 0/1, true on
    generated tokens, EOS included, padding on either side excluded. ValueError on an empty row.
    """
    mask = mask.bool()
    if not mask.any(-1).all():
        raise ValueError("a row of the mask is empty: a confidence needs at least one generated token.")
    return token_conf.float().masked_fill(~mask, 0).sum(-1) / mask.sum(-1)


def rollout_confidence(groups):
    """Q lists of G rollouts -> C (Q, G), over each rollout's tokens, EOS included."""
    rollouts = [rollout for group in groups for rollout in group]
    token_conf = pad_sequence([r.confidences for r in rollouts], batch_first=True)                # (Q*G, T)
    mask = pad_sequence([torch.ones(len(r.tokens)) for r in rollouts], batch_first=True)          # (Q*G, T)
    return sequence_confidence(token_conf, mask).view(len(groups), -1)


def window_confidence(token_conf, mask, reading, window=32):
    """A trace reading of DeepConf instead of the mean, (B, T) and (B, T) -> (B,) fp32. Differentiable.

    reading: tail: the last `window` tokens | min: the lowest sliding window | bottom: the lowest 10% of them,
    at least one. A sequence shorter than `window` is one window. ValueError on an unknown reading, or an
    empty row.
    """
    if reading not in ("tail", "bottom", "min"):
        raise ValueError(f"unknown reading {reading!r}: choose mean, tail, bottom or min.")
    rows = []
    for conf, keep in zip(token_conf.float(), mask.bool()):
        conf = conf[keep]
        if not len(conf):
            raise ValueError("a row of the mask is empty: a confidence needs at least one generated token.")
        windows = conf.unfold(0, min(window, len(conf)), 1).mean(-1)
        lowest = max(1, len(windows) // 10) if reading == "bottom" else 1
        rows.append(windows[-1] if reading == "tail" else windows.topk(lowest, largest=False).values.mean())
    return torch.stack(rows)


# ------------------------------------------------------------------------------------------------------------
# The terms of Eq. 4. Tensors that broadcast; `correct` is R_out in {0, 1}.

def calibration_reward(c, correct, confidence_map, args):
    """The calibration term: it holds each answer's C against R_out, (Q, G) each -> (Q, G).

    linear: (2R - 1) * Cnorm, the second term of Eq. 4, Cnorm in [0, 1] by `--cnorm`. Improper: being linear
    in Cnorm, it pays most at 0 or 1. brier, log: proper scores of c = sigmoid(slope * C + intercept) (RLCR,
    arXiv 2507.16806), best where c is the true rate; log clips c to [.01, .99] and is scaled to [0, 1].
    """
    if args.calibration == "none":
        return torch.zeros_like(c)
    right = correct.to(c)
    if args.calibration == "linear":
        lo, hi = (c.amin(-1, keepdim=True), c.amax(-1, keepdim=True)) if args.cnorm == "group" else \
            (torch.full_like(c, confidence_map[end]) for end in ("lo", "hi"))
        c_norm = ((c - lo) / torch.where(hi > lo, hi - lo, 1)).clamp(0, 1)
        c_norm = torch.where(hi > lo, c_norm, 0.5)                          # a tied group
        return (2 * right - 1) * c_norm
    prob = torch.sigmoid(confidence_map["slope"] * c + confidence_map["intercept"])
    if args.calibration == "brier":
        return 1 - (prob - right) ** 2
    prob = prob.clamp(LOG_FLOOR, 1 - LOG_FLOOR)
    score = torch.where(correct.bool(), prob, 1 - prob).log()                                     # (Q, G)
    return (score - math.log(LOG_FLOOR)) / (math.log(1 - LOG_FLOOR) - math.log(LOG_FLOOR))


def confidence_reward(c, c_noised, correct, is_control, confidence_map, args):
    """R_conf = alpha * tanh(beta * (C - C')) + (2R - 1) * Cnorm (Eq. 4) -> its two terms (Q, G).

    c (Q, G): C of the answers on original pictures, `correct` their R_out. c_noised (Q, G): C' of their
    pairs, None where no picture was noised. is_control (Q,) bool: pairs whose noise spares the evidence earn
    no perception term. Differentiable in both confidences.
    """
    perception = torch.zeros_like(c)
    if args.alpha and c_noised is not None:
        term = args.alpha * torch.tanh(args.beta * (c - c_noised))  # within +-alpha
        perception = term.masked_fill(is_control[:, None].to(c.device), 0)
    return perception, calibration_reward(c, correct, confidence_map, args)


# ------------------------------------------------------------------------------------------------------------
# Outcome and format (paper 3.2.2), advantages

def format_reward(text, finished):
    r"""R_format in {0., 1.}: one well-formed, non-empty `\boxed{}`, words before it, `finished` by EOS."""
    boxed = boxes(text)
    if not finished or len(boxed) != 1 or text.count("\\boxed") != 1:
        return 0.0
    start, content = boxed[0]
    return float(text[content].strip() != "" and re.search(r"\w", text[:start]) is not None)


def group_advantages(rewards, norm):
    """Rewards (Q, G) -> advantages within each question's group (Q, G), and what divided them (Q, 1).

    std: (r_j - mean) / (std + 1e-4), GRPO. none: r_j - mean, Dr. GRPO; the mean holds r_j itself, which
    scales the policy gradient by (G - 1) / G. loo: r_j - mean of the others (RLOO, arXiv 2402.14740).
    """
    advantages = rewards - rewards.mean(-1, keepdim=True)
    if norm == "loo":
        advantages = advantages * (rewards.shape[-1] / (rewards.shape[-1] - 1))
    divisor = rewards.std(-1, keepdim=True) + 1e-4 if norm == "std" else torch.ones_like(rewards[:, :1])
    return advantages / divisor, divisor


# ------------------------------------------------------------------------------------------------------------
# The map from C to a probability, fitted once on the base model

def fit_confidence_map(original, noised):
    """Fit the map on the base model's rollouts, before step 0 -> {"lo", "hi", "slope", "intercept"}.

    original, noised: (C, R_out) of the rollouts on each view, (N,) each. lo, hi: 5th and 95th percentile of C
    on original pictures (`--cnorm range`). slope, intercept: logistic regression of R_out on C over both
    views (Platt; `--calibration brier | log`).
    """
    lo, hi = torch.quantile(original[0], torch.tensor([0.05, 0.95])).tolist()
    slope, intercept = fit_platt(*(torch.cat(views) for views in zip(original, noised)))
    return {"lo": lo, "hi": max(hi, lo + 1e-6), "slope": slope, "intercept": intercept}
