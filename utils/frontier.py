"""What a policy costs and reaches: means over questions, thresholds with a guarantee, rival ways to spend,
intervals."""
import math
from dataclasses import dataclass, field

import numpy as np

from utils.metrics import auroc, calibration_error, interval


@dataclass
class Spent:
    """What a policy made of one question. p: of the leading answer after each purchase. states: (number of
    samples, sources) there."""
    id: str
    confidence: float = 0.0
    correct: bool = False
    base_tokens: float = 0
    expert_tokens: float = 0
    calls: float = 0
    bought: list = field(default_factory=list)
    p: list = field(default_factory=list)
    states: list = field(default_factory=list)

    def add(self, purchase, cost):
        self.bought.append(purchase)
        self.base_tokens, self.expert_tokens, self.calls = (
            old + new for old, new in zip((self.base_tokens, self.expert_tokens, self.calls), cost))


def means(spent):
    """List of Spent -> accuracy, calibration of the final confidence, and mean costs (dict)."""
    confidence, correct = confidences(spent)
    return {"accuracy": float(correct.mean()), "ece": calibration_error(confidence, correct),
            "auroc": auroc(confidence, correct), "calls": float(np.mean([s.calls for s in spent])),
            "tokens": float(np.mean([s.base_tokens + s.expert_tokens for s in spent])),
            "base_tokens": float(np.mean([s.base_tokens for s in spent]))}


def confidences(spent):
    """List of Spent -> confidence (N,), correct (N,)."""
    return np.array([s.confidence for s in spent]), np.array([s.correct for s in spent], float)


# ---- "I don't know", with a guarantee

def risk_bound(wrong, n, delta=0.1):
    """Clopper and Pearson's upper bound: the risk under which `wrong` errors or fewer in n have probability
    delta."""
    if wrong >= n:
        return 1.0
    log_choose = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(wrong + 1)]
    low, high = wrong / n, 1.0
    for _ in range(60):
        r = (low + high) / 2
        tail = sum(math.exp(c + k * math.log(r) + (n - k) * math.log1p(-r)) for k, c in enumerate(log_choose))
        low, high = (r, high) if tail > delta else (low, r)
    return high


def certified_threshold(confidence, correct, risk, delta=0.1, steps=40):
    """The lowest confidence from which on answers are wrong at most at the rate `risk`; inf where none can be
    certified.

    It holds with probability 1 - delta over the held-out questions (confidence, correct: (N,)). Thresholds
    are tried from the highest down, and the first that fails ends the search (fixed-sequence testing): so
    trying many costs no confidence. The first one keeps just enough answers to be certified at all.
    """
    order = np.argsort(-confidence, kind="stable")
    least = math.ceil(math.log(delta) / math.log1p(-risk))  # fewer cannot show it, even without an error
    best = math.inf
    for size in sorted({max(least, round(len(order) * k / steps)) for k in range(1, steps + 1)}):
        if size > len(order):
            break
        threshold = float(confidence[order[size - 1]])
        kept = confidence >= threshold
        if risk_bound(int((1 - correct[kept]).sum()), int(kept.sum()), delta) > risk:
            break
        best = threshold
    return best


# ---- Rival ways to spend Expert calls, each at any mean number of them

def gate(signal, before, after, share):
    """Accuracy by question (N,) where the share of questions with the lowest signal goes to the Expert.

    signal (N,); before, after (N,): right without and with the Expert. share: of the questions; the last one
    is split, so that the mean number of calls is the share exactly.
    """
    order = np.argsort(signal, kind="stable")
    weight = np.clip(share * len(signal) - np.arange(len(signal)), 0,
                     1)        # of each question's call, in that order
    right = np.empty(len(signal))
    right[order] = before[order] * (1 - weight) + after[order] * weight
    return right


def mixed(points, calls):
    """By question (N,): the outcome at a mean number of calls, by a coin between the two nearest of points.

    points: [(mean calls, right (N,)), ...]. A coin between two policies is a policy. nan (N,) outside their
    range.
    """
    points = sorted(points, key=lambda point: point[0])
    at = [point[0] for point in points]
    if not at[0] - 1e-9 <= calls <= at[-1] + 1e-9:
        return np.full(len(points[0][1]), math.nan) if calls < at[0] else points[-1][1]
    high = min(int(np.searchsorted(at, calls)), len(points) - 1)
    low = max(0, high - 1)
    weight = 0.0 if at[high] == at[low] else (calls - at[low]) / (at[high] - at[low])
    return points[low][1] * (1 - weight) + points[high][1] * weight


def paired_difference(first, second, rounds=1000, seed=0):
    """second minus first, outcomes by question (N,) -> (mean, low, high), the 95% interval by resampled
    questions."""
    difference = np.asarray(second, float) - np.asarray(first, float)
    draws = np.random.default_rng(seed).integers(len(difference), size=(rounds, len(difference)))
    return float(difference.mean()), *interval(difference[draws].mean(1))
