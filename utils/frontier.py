"""What a policy costs and reaches: stored votes and their costs, means over questions, thresholds with a
guarantee, rival ways to spend, intervals."""
import math
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from utils.cli import InputError
from utils.metrics import auroc, calibration_error, interval

RISKS = (0.05, 0.1, 0.2)            # target risks for which thresholds are certified


class StoredVotes:
    """A row of `eval.collector`: the votes that could be bought, their costs, which answers are right.

    accepts: (answer, row) -> bool. reading: of C. samples: (answer or None, C, mean log-prob) of each.
    """

    def __init__(self, row, accepts, reading="mean"):
        self.id, self.row, self.choices, self.cache = row["id"], row, row["choices"], {}
        self.samples = [(s["answer"], s["confidence"][reading], s["logprob"]) for s in row["samples"]]
        self.accepts = lru_cache(None)(lambda answer: bool(answer is not None and accepts(answer, row)))

    def votes(self, n):
        """{source: [[answer, share], ...]} of the modules at n samples, and of the Expert's own answer."""
        own = self.row["expert"] or {"answer": None}
        return self.row["by_n"][str(n)]["votes"] | {
            "expert": [] if own["answer"] is None else [[own["answer"], own.get("probability", 1.0)]]}

    def cost(self, purchase, n, first=0):
        """Of a purchase at n samples (or of samples first to n) -> (base tokens, Expert tokens, Expert
        calls)."""
        if purchase == "samples":
            return sum(s["tokens"] for s in self.row["samples"][first:n]), 0, 0
        if purchase == "expert":
            return 0, self.row["expert"]["tokens"] or 0, 1      # None: a server that counts nothing
        parts = self.row["by_n"][str(n)]["parts"]
        role = {"voter": "voter", "self_reflection": "critic"}.get(purchase)
        base = 0 if purchase == "voter" else parts.get(purchase, {}).get("tokens", 0)
        base *= 2 if purchase == "self_check" else 1  # a contrasted token is read twice
        expert = parts.get(role, {})
        return base, expert.get("expert_tokens") or 0, expert.get("expert_calls",
                                                                0) + expert.get("cached_calls", 0)


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


def point(rate, judged, paid):
    """A point of a policy's frontier (dict): accuracy, calibration and thresholds by the Spent of `judged`,
    costs by those of `paid`."""
    costs = {name: value for name, value in means(paid).items() if name in ("calls", "tokens", "base_tokens")}
    thresholds = {f"{risk:g}": certified_threshold(*confidences(judged), risk) for risk in RISKS}
    return {"rate": rate, **means(judged), **costs, "thresholds": {
        risk: None if value == math.inf else value for risk, value in thresholds.items()}}


def rate_for(points, budget=None, accuracy=None):
    """The lowest rate within a budget (mean Expert calls a question), or the highest that reaches an accuracy
    -> rate, None without either. points: of a policy's frontier."""
    if budget is not None:
        rates = [point["rate"] for point in points if point["calls"] <= budget + 1e-9]
        if not rates:
            least = min(point["calls"] for point in points)
            raise InputError(f"--budget {budget:g} is below {least:.2f} calls, the least of this policy; "
                             f"raise it")
        return min(rates)
    if accuracy is None:
        return None
    rates = [point["rate"] for point in points if point["accuracy"] >= accuracy]
    if not rates:
        best = max(point["accuracy"] for point in points)
        raise InputError(f"--accuracy {accuracy:g} is above {best:.3f}, the best of this policy; lower it")
    return max(rates)


def threshold_for(points, rate, risk):
    """The confidence from which on an answer is given, at a rate and a target risk of the frontier."""
    thresholds = next(point for point in points if point["rate"] == rate)["thresholds"]
    if f"{risk:g}" not in thresholds:
        raise InputError(f"--risk {risk:g} was not certified; choose one of {', '.join(thresholds)}")
    value = thresholds[f"{risk:g}"]
    return math.inf if value is None else value


def outcome_table(pairs, bins=6, changes=5):
    """(P before, P after) of many purchases -> [[mean P, [mean change in each fifth of its bin]], ...].

    Bins hold equally many. More evidence cannot lower the expected P(right) of the best answer. Where the
    mean change is negative, it is noise of the fit, and the changes are shifted to mean 0.
    """
    before, after = np.array(pairs).T
    table = []
    for group in np.array_split(np.argsort(before, kind="stable"), min(bins, len(before))):
        change = np.sort(after[group] - before[group])
        change = change - min(0.0, change.mean())
        fifths = np.repeat(change, changes).reshape(changes, -1)        # equal parts, also of few values
        table.append([float(before[group].mean()), [float(fifth.mean()) for fifth in fifths]])
    return table


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
