"""Which question deserves which computation: a posterior over answers, and a controller that buys evidence.

    python eval.py --model runs/cdrl --baseline tiny/base                  # fits policy.json on stored votes
    python catts.py photo.png "How many red circles?" --policy policy.json # what was bought, why it stopped
    python catts.py --data questions.jsonl --policy policy.json --budget 0.5       # mean Expert calls

The paper runs every module with fixed weights. Here evidence is bought one piece at a time: more samples,
Visual Self-Check, the Voter, Self-Reflection, the Expert's own answer.

1. *Posterior*: P(right) of each candidate answer, and of "none of these", from what has been bought so far: a
   conditional logit with the coefficients of FEATURES, fitted by maximum likelihood with a ridge.
2. *Outcomes*: how each purchase changed P of the leading answer on the fitted questions, a table by P.
3. *Controller*: it buys what promises the largest P in the end, less `rate` times all prices on the way. It
   stops when nothing promises more than the P at hand. Promises follow from the table, by backward induction.

All three are fitted on stored votes of answered questions, and kept in policy.json. A piece of evidence that
was not bought is absent: it changes no candidate's score. One that was bought and is silent about a candidate
counts against it. Left out on purpose: features of the picture or the question; a learned value function.
"""
import math
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations

import numpy as np

from utils import frontier, policy_file
from utils.cli import InputError
from utils.frontier import Spent, StoredVotes
from utils.judge import equivalent
from utils.logit import fit_logit, softmax
from utils.results_file import SOURCE

# What can be bought, in the order in which equal bargains are taken. A purchase is filed under its votes'
# source.
PURCHASES = ("samples", "self_check", "voter", "self_reflection", "expert")
MODULE_OF = {source: module for module, source in SOURCE.items()}         # the others are modules' names
HEARS_EXPERT = {"voter", "self_reflection", "expert"}
# Voter and Critic are shown the samples' answers: once they have spoken, no more samples are drawn, so that
# all orders of buying the same evidence give the same votes.
SEES_SAMPLES = {"voter", "self_reflection"}
# In Expert calls.
PRICES = {"base_token": 2e-4, "expert_token": 1e-3, "expert_call": 1.0}


# ---- 1. Evidence and its posterior

@dataclass
class Evidence:
    """What is known of one question.

    samples: (answer or None, C, mean log-prob) of each. votes: {source: [[answer, share], ...]} of what was
    bought; the Expert's share is the probability of the least probable token of its reply. A source that is
    not in it was not bought; one with an empty list was, and gave no answer.
    """
    samples: list
    votes: dict = field(default_factory=dict)
    choices: list | None = None

    def candidates(self):
        """Equal answers merged -> list of (answer, indices of its samples, {source: share}), most samples
        first."""
        merged = []

        def entry(answer):
            for other in merged:
                if _same(other[0], answer, tuple(self.choices or ())):
                    return other
            merged.append((answer, [], {}))
            return merged[-1]

        for i, (answer, *_) in enumerate(self.samples):
            if answer is not None:
                entry(answer)[1].append(i)
        for source in PURCHASES[1:]:
            for answer, share in self.votes.get(source, []):
                shares = entry(answer)[2]
                shares[source] = shares.get(source, 0.0) + share
        return sorted(merged, key=lambda candidate: -len(candidate[1]))

    def signals(self):
        """(answer, share of the samples, their mean C) of each candidate: what a Planner is shown."""
        given = [(answer, [self.samples[i][1] for i in indices]) for answer, indices, _ in self.candidates()]
        return [(answer, len(c) / len(self.samples), sum(c) / len(c)) for answer, c in given if c]


@lru_cache(maxsize=2**18)
def _same(a, b, choices):
    return equivalent(a, b, list(choices) or None)


# name: what it is, in words. The first ten are a candidate's, the others those of "none of these"
FEATURES = {
    "share": "log of its share of the samples",
    "C": "best C of its samples, in standard deviations",
    "p": "best mean log-prob of its samples, in standard deviations",
    "unsampled": "no sample gave it",
    "self_check": "Visual Self-Check arrives at it",
    "voter": "log of the Voter's probability over an even split",
    "self_reflection": "Self-Reflection arrives at it",
    "expert": "the Expert answers it",
    "expert, p": "log-odds of the least probable token of the Expert's reply",
    "share, Expert heard": "share, once the Expert has spoken in any role",
    "voter, Expert's answer": "voter, once the Expert's own answer is known: one model, asked twice",
    "none": "none of these",
    "none, C": "mean C of the samples",
    "none, p": "mean log-prob of the samples",
    "none, samples": "log of their number",
    "none, candidates": "log of the number of candidates",
    "none, Expert heard": "the Expert has spoken in any role",
}


def features(evidence, scale):
    """Evidence -> candidates (list of K answers), X (K + 1, len(FEATURES)); the last row is "none of these".

    scale: (mean, std) of C and of the mean log-prob over samples, as fitted.
    """
    candidates, n = evidence.candidates(), len(evidence.samples)
    (c_mean, c_std), (p_mean, p_std) = scale
    c = [(sample[1] - c_mean) / c_std for sample in evidence.samples]
    p = [(sample[2] - p_mean) / p_std for sample in evidence.samples]
    heard = float(bool(HEARS_EXPERT & evidence.votes.keys()))
    num_voted = sum("voter" in shares for _, _, shares in candidates)
    rows = np.zeros((len(candidates) + 1, len(FEATURES)))
    for row, (_, indices, shares) in zip(rows, candidates):
        share = math.log((len(indices) + 0.5) / (n + 1))
        row[:3] = share, max((c[i] for i in indices), default=0.0), max((p[i] for i in indices), default=0.0)
        row[3] = not indices
        row[4] = "self_check" in shares
        # 0.02 bounds the weight of a Voter that is certain.
        voter = math.log((shares["voter"] + 0.02) / (1 / num_voted + 0.02)) if "voter" in shares else 0.0
        row[5:8] = voter, "self_reflection" in shares, "expert" in shares
        surest = min(max(shares.get("expert", 0.5), 0.01), 0.999)           # 0.5: log-odds 0
        row[8:11] = math.log(surest / (1 - surest)), share * heard, voter * ("expert" in evidence.votes)
    rows[-1, 11:] = (1.0, sum(c) / max(1, n), sum(p) / max(1, n), math.log(max(1, n)),
                    math.log(max(1, len(candidates))), heard)
    return [answer for answer, _, _ in candidates], rows


def num_sampled(x):
    """Features -> how many candidates the samples gave."""
    return int((x[:-1, list(FEATURES).index("unsampled")] == 0).sum())


@dataclass
class Posterior:
    """P(right) of each candidate: softmax over candidates and "none" of coefficients . features (conditional
    logit)."""
    coefficients: np.ndarray
    scale: tuple

    def __call__(self, evidence):
        """-> [(answer, P), ...], the most probable first; what is missing to 1 is P(none of these)."""
        answers, x = features(evidence, self.scale)
        return sorted(zip(answers, self.probabilities(x).tolist()), key=lambda pair: -pair[1])

    def probabilities(self, x):
        """Features (K + 1, D) -> P of the K candidates."""
        return softmax(x @ self.coefficients)[:-1]

    def leader(self, evidence):
        """The most probable answer and its P; (None, 0.0) without candidates."""
        return next(iter(self(evidence)), (None, 0.0))


# ---- 2. Stored votes, as questions on which anything can be bought

class StoredQuestion(StoredVotes):
    """A row of `eval.collector`: all evidence that could be bought, its costs, and which answers are
    right."""

    def evidence(self, n, sources=()):
        """The first n samples and the votes of some sources (Evidence)."""
        votes = self.votes(n)
        return Evidence(self.samples[:n], {source: votes[source] for source in sources}, self.choices)

    def features(self, n, sources, scale):
        """-> candidates, their features, which are right (K + 1,); the last is "none of these"."""
        key = (n, frozenset(sources), scale)
        if key not in self.cache:
            answers, x = features(self.evidence(n, sources), scale)
            right = np.array([self.accepts(answer) for answer in answers] + [False])
            right[-1] = not right.any()
            self.cache[key] = answers, x, right
        return self.cache[key]


def next_size(sizes, n):
    return next(size for size in sizes if size > n)


def affordable(n, sources, sizes, modules, num_candidates=2):
    """The purchases that are left in a state: n samples and the sources bought so far.

    num_candidates: different answers among the samples. A Voter with one, and a Critic without any, have
    nothing to say.
    """
    left = [m for m in PURCHASES[1:] if m in modules and m not in sources]
    if num_candidates < 2 and "voter" in left:
        left.remove("voter")
    if num_candidates < 1 and "self_reflection" in left:
        left.remove("self_reflection")
    return (["samples"] if n < sizes[-1] and not SEES_SAMPLES & set(sources) else []) + left


# ---- 3. The policy

GRID = np.linspace(0, 1, 41)        # values of P at which promises are computed


@dataclass
class Policy:
    """What to buy next, and what to believe.

    outcomes: {purchase: {"before" or "after" the Expert was heard: [[P, [change of P, ...]], ...]}}, equally
    likely changes. costs: {purchase: mean (base tokens, Expert tokens, Expert calls)}, of one sample for
    "samples". sizes: numbers of samples, rising. modules: sources that can be bought. rate: P(right) that a
    unit of price must bring.
    frontier: means and thresholds (None = never answer) at each rate, cross-fitted. about: what it was fitted
    on.
    """
    posterior: Posterior
    outcomes: dict
    costs: dict
    sizes: list
    modules: list
    rate: float = 0.1
    prices: dict = field(default_factory=lambda: dict(PRICES))
    frontier: list = field(default_factory=list)
    about: dict = field(default_factory=dict)

    def __post_init__(self):
        self._offers = {}

    def after(self, purchase, p, heard):
        """Equally likely values of P after a purchase, where the leading answer has P = p: (N,) -> (S, N)."""
        points = self.outcomes.get(purchase, {}).get("after" if heard else "before", [])
        changes = np.array([changes for _, changes in points] or [[0.0]])           # (bins, S)
        at = [point for point, _ in points] or [0.0]
        return np.clip([p + np.interp(p, at, column) for column in changes.T], 0, 1)

    def price(self, purchase, n):
        """What a purchase costs on average, in the unit of the prices (float)."""
        base, expert, calls = self.costs[purchase]
        price = self.prices
        amount = price["base_token"] * base + price["expert_token"] * expert + price["expert_call"] * calls
        return amount * (next_size(self.sizes, n) - n if purchase == "samples" else 1)

    def offers(self, n, sources, rate):
        """{purchase: what it promises at each P of GRID}: the expected promise after it, less rate times its
        price."""
        key = (n, frozenset(sources), rate)
        if key not in self._offers:
            self._offers[key], heard = {}, bool(HEARS_EXPERT & set(sources))
            for m in affordable(n, sources, self.sizes, self.modules):
                state = (next_size(self.sizes, n), sources) if m == "samples" else (n, {*sources, m})
                promise = np.max([GRID, *self.offers(*state, rate).values()], 0)    # stop there, or go on
                expected = np.interp(self.after(m, GRID, heard), GRID, promise).mean(0)
                self._offers[key][m] = expected - rate * self.price(m, n)
        return self._offers[key]

    def next_purchase(self, n, sources, p, num_candidates):
        """-> (purchase, expected rise of P, price), or (None, why it stops, 0)."""
        promises = self.offers(n, sources, self.rate)
        values = {m: float(np.interp(p, GRID, promises[m]))
                  for m in affordable(n, sources, self.sizes, self.modules, num_candidates)}
        if not values:
            return None, "everything has been bought", 0.0
        best = max(values, key=values.get)
        rise = float(self.after(best, np.array([p]), bool(HEARS_EXPERT & set(sources))).mean()) - p
        price = self.price(best, n)
        if values[best] <= p + 1e-9:
            return None, (f"nothing left is worth its price: {best} would raise P by {rise:.2f} for "
                          f"{price:.2f}, "
                          f"{self.rate:.2f} a unit is asked"), 0.0
        return best, rise, price

    def choose_rate(self, budget=None, accuracy=None):
        """Set the rate for a budget (mean Expert calls a question) or a target accuracy -> self."""
        self.rate = frontier.rate_for(self.frontier, budget, accuracy) or self.rate
        return self

    def threshold(self, risk):
        """The confidence from which on an answer is given at a target risk of the file; inf: never."""
        return frontier.threshold_for(self.frontier, self.rate, risk)

    def buy(self, controller, states):
        """A generator: buy evidence for questions (QuestionStates of a catts.Controller) one piece at a time,
        where it pays. It yields the Futures of servers. Each result's `purchases` say what was bought, with P
        after it, and why it stopped."""
        while states:
            batches = {}                # {(purchase, number of samples where it matters): questions}
            for state in states:
                evidence, n, result = controller.evidence(state), len(state.result.rollouts), state.result
                answer, p = self.posterior.leader(evidence)
                sampled = num_sampled(features(evidence, self.posterior.scale)[1])
                purchase, reason, _ = self.next_purchase(n, evidence.votes, p, sampled)
                bought = f"{n} samples" if state.next in ("", "samples") else state.next
                result.purchases.append({"bought": bought, "answer": answer, "p": p})
                state.next = purchase
                if purchase is None:
                    result.purchases.append({"stopped": reason})
                else:
                    batches.setdefault((purchase, n if purchase == "samples" else 0), []).append(state)
            for (purchase, n), batch in batches.items():
                if purchase == "samples":
                    yield from controller.draw(batch, next_size(self.sizes, n))
                else:
                    yield from controller.run(MODULE_OF.get(purchase, purchase), batch)
                    for state in batch:
                        state.result.order.append(purchase)
            states = [state for batch in batches.values() for state in batch]

    def replay(self, question):
        """Spend on one StoredQuestion as on a new one -> Spent."""
        n, sources, spent = self.sizes[0], (), Spent(question.id)
        spent.add("samples", question.cost("samples", n))
        while True:
            answers, x, _ = question.features(n, sources, self.posterior.scale)
            p = self.posterior.probabilities(x)
            best = int(p.argmax()) if len(p) else None
            if best is not None:
                spent.confidence, spent.correct = float(p[best]), question.accepts(answers[best])
            spent.p.append(spent.confidence)
            spent.states.append((n, frozenset(sources)))
            purchase, *_ = self.next_purchase(n, sources, spent.confidence, num_sampled(x))
            if purchase is None:
                return spent
            if purchase == "samples":
                size = next_size(self.sizes, n)
                spent.add("samples", question.cost("samples", size, n))
                n = size
            else:
                spent.add(purchase, question.cost(purchase, n))
                sources = (*sources, purchase)

    def save(self, path):
        """policy.json, which `read_policy` opens."""
        stored = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "posterior"}
        coefficients = dict(zip(FEATURES, self.posterior.coefficients.tolist()))
        policy_file.write(path, {"coefficients": coefficients, "scale": self.posterior.scale, **stored})

    def tables(self):
        """The coefficients in words, and the mean rise of P by each purchase, by P (str)."""
        at = np.array([0.2, 0.4, 0.6, 0.8, 0.95])
        rises = {f"{m}, {when}": self.after(m, at, when == "after").mean(0) - at
                 for m in self.outcomes for when in self.outcomes[m]}
        return policy_file.tables(FEATURES, self.posterior.coefficients, at, rises)


def fit_posterior(questions, sizes, modules, ridge=1.0, visits=None):
    """StoredQuestions -> Posterior, fitted on every state that evidence can be bought up to.

    visits: {state: weight} for each question, of the states in which a controller was; they then weigh more.
    """
    samples = np.array([sample[1:] for q in questions for sample in q.samples[:sizes[-1]]], float)
    scale = tuple((float(mean), float(max(std, 1e-6))) for mean, std in zip(samples.mean(0), samples.std(0)))
    states = states_of(sizes, modules)
    data = [q.features(n, sources, scale) for q in questions for n, sources in states]
    # Each number of purchases weighs the same: few are bought as a rule. A question counts as three answers,
    # however many states it is seen in, for they are not independent.
    weight = np.array([1 / math.comb(len(modules), len(sources)) for _, sources in states])
    weights = np.tile(3 * weight / weight.sum(), (len(questions), 1))
    if visits:
        weights = 0.3 * weights + [[given.get((n, frozenset(sources)), 0.0) for n, sources in states]
                                   for given in visits]
    return Posterior(fit_logit([x for _, x, _ in data], [right for *_, right in data], weights.ravel(),
                               ridge), scale)


def visits_of(policy, question, rates=(0.12, 0.26)):
    """{state: weight} of the states that a policy passes on a question; the last weighs as much as the
    others."""
    visits = Counter()
    for policy.rate in rates:
        *path, last = policy.replay(question).states
        visits.update({state: 0.7 / len(path) for state in path})
        visits[last] += 0.7
    return visits


def states_of(sizes, modules):
    """All states: (number of samples, sources bought)."""
    return [(n, sources) for n in sizes for k in range(len(modules) + 1)
            for sources in combinations(modules, k)]


def fit_outcomes(questions, posterior, sizes, modules, bins=6, changes=5):
    """The table of outcomes (see Policy): in bins of P, the mean change of P in each fifth of the states."""
    pairs = {}
    for q in questions:
        x_of = {(n, frozenset(sources)): q.features(n, sources, posterior.scale)[1]
                for n, sources in states_of(sizes, modules)}
        p_of = {state: posterior.probabilities(x).max(initial=0.0) for state, x in x_of.items()}
        for (n, sources), x in x_of.items():
            for purchase in affordable(n, sources, sizes, modules, num_sampled(x)):
                after = (next_size(sizes, n), sources) if purchase == "samples" else (n, sources | {purchase})
                when = "after" if HEARS_EXPERT & sources else "before"
                pairs.setdefault((purchase, when), []).append((p_of[n, sources], p_of[after]))
    outcomes = {}
    for (purchase, when), values in pairs.items():
        outcomes.setdefault(purchase, {})[when] = frontier.outcome_table(values, bins, changes)
    return outcomes


def fit_controller(questions, sizes, modules, prices=None, ridge=1.0):
    """StoredQuestions -> Policy without a frontier."""
    costs = {m: np.mean([q.cost(m, sizes[-1]) for q in questions], 0) for m in ("samples", *modules)}
    costs["samples"] = costs["samples"] / sizes[-1]
    costs, visits = {m: cost.tolist() for m, cost in costs.items()}, None
    for _ in range(2):  # then once more, where the first controller went: there P must be calibrated
        posterior = fit_posterior(questions, sizes, modules, ridge, visits)
        outcomes = fit_outcomes(questions, posterior, sizes, modules)
        policy = Policy(posterior, outcomes, costs, list(sizes), list(modules), prices=dict(prices or PRICES))
        visits = [visits_of(policy, q) for q in questions]
    return policy


def fit_policy(questions, sizes, modules, prices=None, ridge=1.0, rates=None):
    """StoredQuestions -> Policy. Its frontier's accuracy is cross-fitted: no fit judges a question that it
    has seen."""
    if len(questions) < 20:
        raise InputError(f"{len(questions)} questions are too few to fit a policy on; give at least 20")
    rates = np.geomspace(0.02, 1.0, 40) if rates is None else rates
    halves = [questions[0::2], questions[1::2]]
    policy, *fitted = (fit_controller(part, sizes, modules, prices, ridge)
                       for part in (questions, halves[1], halves[0]))
    for rate in map(float, rates):
        policy.rate = fitted[0].rate = fitted[1].rate = rate
        judged = [judge.replay(q) for half, judge in zip(halves, fitted) for q in half]
        # Costs need no labels, so no cross-fitting.
        policy.frontier.append(frontier.point(rate, judged, [policy.replay(q) for q in questions]))
    policy.about = {"questions": len(questions)}
    return policy.choose_rate(budget=max(0.5, min(point["calls"] for point in policy.frontier)))


def fit_on_votes(rows, settings, accepts, sources, prices=None, rates=None):
    """Rows of votes.jsonl -> Policy for runs under the same settings and sources. accepts: (answer, row) ->
    bool."""
    sizes = sorted(size for size in map(int, rows[0]["by_n"]) if size <= settings.samples)
    sizes = [size for size in sizes if size > 1] or sizes           # one sample has no share
    available = {*rows[0]["by_n"][str(sizes[-1])]["ran"], *(["expert"] if rows[0]["expert"] else [])}
    modules = [m for m in PURCHASES[1:] if m in available]
    questions = [StoredQuestion(row, accepts, settings.reading) for row in rows]
    policy = fit_policy(questions, sizes, modules, prices, rates=rates)
    policy.about |= {"settings": policy_file.settings_of(settings), "sources": sources}
    return policy


# ---- 4. policy.json

def read_policy(settings, sources=None, can_check=True):
    """--policy FILE -> Policy; None for "paper". settings, sources: of this run (see `source_fingerprint`).
    can_check: whether Visual Self-Check can be bought.

    Raises InputError, also for a policy that was fitted under other settings, or with another model or
    Expert.
    """
    fields = [name for name in Policy.__dataclass_fields__ if name != "posterior"]
    stored = policy_file.read(settings, sources, list(FEATURES), fields)
    if stored is None:
        return None
    coefficients, scale, fields = stored
    policy = Policy(Posterior(coefficients, scale), **fields)
    policy.modules = [m for m in policy.modules if can_check or m != "self_check"]
    return policy.choose_rate(settings.budget or None, settings.accuracy or None)
