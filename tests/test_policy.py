"""The posterior, the controller that buys evidence, its guarantees, and policy.json."""
import dataclasses
import itertools
import json
import math
import random

import numpy as np
import pytest
from conftest import ROOT

import data
import eval
import policy as policies
from catts import Controller, Settings, record
from policy import (
    FEATURES,
    PURCHASES,
    Evidence,
    Policy,
    Posterior,
    StoredQuestion,
    fit_controller,
    fit_on_votes,
    read_policy,
)
from utils import frontier, policy_file
from utils.cli import InputError
from utils.experts import LocalExpert, Reply
from utils.judge import accepts, extract_answer
from utils.logit import fit_logit
from utils.overlap import run_through
from vlm import VLM

SOURCES = {"model": "base 00000001", "expert": "expert 00000002"}
SCALE = ((10.0, 2.0), (-0.5, 0.3))


def right(answer, row):
    return answer == row["gold"]


def stored_rows(number, expert=0.9, seed=0):
    """Rows of votes.jsonl from an invented world: the base is right where the question is easy, and then its C and p are
    high; the Expert is right at the rate `expert` in every role."""
    rng, rows = random.Random(seed), []
    for i in range(number):
        ease, gold = rng.random(), str(rng.randrange(10))
        wrong = [str(x) for x in range(10) if str(x) != gold]

        def answer(p, gold=gold, wrong=wrong):
            return gold if rng.random() < p else rng.choice(wrong)
        samples = []
        for _ in range(8):
            given = answer(0.2 + 0.75 * ease, wrong=wrong[:3])
            sure = ease + rng.gauss(0, 0.3)
            samples.append({"answer": given, "confidence": {"mean": 10 + 2 * sure}, "logprob": -0.8 + 0.5 * sure, "tokens": 20})
        own, by_n = answer(expert), {}
        for n in ("2", "4", "8"):
            candidates = list(dict.fromkeys(s["answer"] for s in samples[:int(n)]))
            liked = own if own in candidates else rng.choice(candidates)
            voter = [[c, 0.8 if c == liked else 0.2 / max(1, len(candidates) - 1)] for c in candidates]
            check = answer(0.3 + 0.65 * ease, wrong=wrong[:3])
            reflected = own if rng.random() < 0.7 else answer(0.2 + 0.75 * ease)            # the critique tells what it saw
            by_n[n] = {"ran": ["samples", "voter", "self_reflection", "self_check"], "votes": {
                "voter": voter, "self_reflection": [[reflected, 1.0]], "self_check": [[check, 1.0]]},
                "parts": {"voter": {"expert_calls": 1, "expert_tokens": 40}, "critic": {"expert_calls": 1, "expert_tokens": 20},
                          "self_reflection": {"tokens": 20}, "self_check": {"tokens": 20}}}
        rows.append({"id": f"q{seed}-{i}", "gold": gold, "choices": None, "samples": samples, "by_n": by_n,
                     "expert": {"answer": own, "tokens": 30}})
    return rows


@pytest.fixture(scope="module")
def rates():
    return np.geomspace(0.03, 0.9, 8)


@pytest.fixture(scope="module")
def fitted(rates):
    """A policy of the invented world with an Expert that is right on nine in ten."""
    return fit_on_votes(stored_rows(120), Settings(), right, SOURCES, rates=rates)


def random_evidence(rng):
    samples = [(rng.choice(["1", "2", "3", None]), rng.gauss(10, 2), -rng.random()) for _ in range(rng.randint(1, 8))]
    votes = {"voter": [[a, rng.random()] for a in dict.fromkeys(s[0] for s in samples) if a],
             "self_check": [[rng.choice("1234"), 1.0]], "self_reflection": [[rng.choice("1235"), 1.0]],
             "expert": [[rng.choice("126"), rng.random()]]}
    return Evidence(samples, {source: votes[source] for source in votes if rng.random() < 0.5})


# ---- The posterior

def test_the_posterior_is_the_definition_written_out():
    """Against a plain computation, candidate by candidate and term by term."""
    rng = random.Random(0)
    for _ in range(100):
        evidence = random_evidence(rng)
        beta = dict(zip(FEATURES, (rng.gauss(0, 1) for _ in FEATURES)))
        n, votes = len(evidence.samples), evidence.votes
        c = [(s[1] - SCALE[0][0]) / SCALE[0][1] for s in evidence.samples]
        p = [(s[2] - SCALE[1][0]) / SCALE[1][1] for s in evidence.samples]
        heard = bool({"voter", "self_reflection", "expert"} & set(votes))
        answers = {s[0] for s in evidence.samples if s[0]} | {a for pairs in votes.values() for a, _ in pairs}
        number = math.log(max(1, len(answers)))
        weights = {None: math.exp(beta["none"] + beta["none, C"] * sum(c) / n + beta["none, p"] * sum(p) / n
                                  + beta["none, samples"] * math.log(n) + beta["none, candidates"] * number
                                  + beta["none, Expert heard"] * heard)}
        for answer in answers:
            given = [i for i, s in enumerate(evidence.samples) if s[0] == answer]
            share = math.log((len(given) + 0.5) / (n + 1))
            score = (beta["share"] + beta["share, Expert heard"] * heard) * share
            score += beta["C"] * max(c[i] for i in given) + beta["p"] * max(p[i] for i in given) if given else beta["unsampled"]
            for source in ("self_check", "self_reflection", "expert"):
                score += beta[source] * any(a == answer for a, _ in votes.get(source, []))
            if answer in dict(map(tuple, votes.get("expert", []))):
                least = min(max(dict(map(tuple, votes["expert"]))[answer], 0.01), 0.999)
                score += beta["expert, p"] * (math.log(least) - math.log(1 - least))
            if answer in dict(map(tuple, votes.get("voter", []))):
                probability = dict(map(tuple, votes["voter"]))[answer]
                log_ratio = math.log((probability + 0.02) / (1 / len(votes["voter"]) + 0.02))
                score += (beta["voter"] + beta["voter, Expert's answer"] * ("expert" in votes)) * log_ratio
            weights[answer] = math.exp(score)
        posterior = Posterior(np.array(list(beta.values())), SCALE)(evidence)
        for answer, probability in posterior:
            assert probability == pytest.approx(weights[answer] / sum(weights.values()), rel=1e-9)
        assert {answer for answer, _ in posterior} == answers
        assert [q for _, q in posterior] == sorted((q for _, q in posterior), reverse=True)


def test_evidence_that_was_not_bought_is_absent_and_not_zero():
    beta = np.array([{"share": 1.0, "self_check": 2.0}.get(name, 0.0) for name in FEATURES])
    posterior = Posterior(beta, SCALE)
    samples = [("1", 10, -0.5), ("1", 10, -0.5), ("2", 10, -0.5)]
    p = {name: dict(posterior(Evidence(samples, votes))) for name, votes in (
        ("absent", {}), ("silent", {"self_check": []}), ("first", {"self_check": [["1", 1.0]]}),
        ("second", {"self_check": [["2", 1.0]]}))}
    assert p["absent"] == p["silent"]                           # it spoke for nobody
    assert p["second"]["1"] < p["absent"]["1"] < p["first"]["1"]


def test_equal_answers_are_merged():
    evidence = Evidence([("1/2", 9, -0.1), ("0.5", 12, -0.3), ("3", 9, -0.2)], {"expert": [["0.50", 1.0]]})
    assert [(answer, indices, shares) for answer, indices, shares in evidence.candidates()] == [
        ("1/2", [0, 1], {"expert": 1.0}), ("3", [2], {})]


def test_the_order_of_buying_changes_no_bit():
    rng = random.Random(1)
    beta = np.array([rng.gauss(0, 1) for _ in FEATURES])
    for _ in range(30):
        evidence = random_evidence(rng)
        results = {tuple(Posterior(beta, SCALE)(Evidence(evidence.samples, dict(order))))
                   for order in itertools.permutations(evidence.votes.items())}
        assert len(results) == 1


def test_coefficients_are_the_maximum_of_the_likelihood():
    """The gradient of the penalised log-likelihood, by finite differences of its definition, is zero."""
    rng = np.random.default_rng(0)
    designs = [rng.normal(size=(rng.integers(2, 6), 4)) for _ in range(80)]
    rights = [np.arange(len(x)) == rng.integers(len(x)) for x in designs]
    rights[0][:2] = True                                        # two answers that the judge accepts
    weights, ridge = rng.random(80), 0.7

    def loss(beta):
        total = ridge / 2 * beta @ beta
        for x, correct, w in zip(designs, rights, weights):
            scores = [math.exp(row @ beta) for row in x]
            total -= w * math.log(sum(s for s, c in zip(scores, correct) if c) / sum(scores))
        return total
    beta = fit_logit(designs, rights, weights, ridge)
    for step in np.eye(4) * 1e-4:
        assert abs(loss(beta + step) - loss(beta - step)) / 2e-4 < 1e-6
        assert loss(beta + 100 * step) > loss(beta) < loss(beta - 100 * step)


# ---- The controller

def controller(rows):
    return fit_controller([StoredQuestion(row, right) for row in rows], [2, 8], PURCHASES[1:])


def spend(policy, rows):
    return frontier.means([policy.replay(StoredQuestion(row, right)) for row in rows])


def test_it_learns_what_an_expert_is_worth():
    """A useless Expert is left alone, and a better one is asked more at the same rate."""
    results = {}
    for skill in (0.1, 0.8, 1.0):
        policy = controller(stored_rows(120, skill))
        policy.rate = 0.15
        results[skill] = spend(policy, stored_rows(2000 if skill == 0.1 else 400, skill, seed=1))
    rows = stored_rows(2000, 0.1, seed=1)
    majority = np.mean([right(StoredQuestion(row, right).evidence(8).candidates()[0][0], row) for row in rows])
    print({skill: (round(r["accuracy"], 3), round(r["calls"], 2)) for skill, r in results.items()}, f"majority {majority:.3f}")
    assert results[0.1]["calls"] < 0.03 and results[0.1]["accuracy"] > majority - 0.01
    assert results[0.1]["calls"] < results[0.8]["calls"] < results[1.0]["calls"]
    assert results[1.0]["accuracy"] > 0.95


def test_twenty_questions_are_enough_to_fit():
    policy = fit_on_votes(stored_rows(20), Settings(), right, SOURCES, rates=[0.1, 0.5])
    assert 0 <= spend(policy, stored_rows(20, seed=1))["calls"] <= 3


def test_a_dearer_unit_buys_less_and_a_budget_is_kept(fitted):
    rows = stored_rows(200, seed=2)
    calls = []
    for point in fitted.frontier:                               # rates rise
        fitted.rate = point["rate"]
        calls.append(spend(fitted, rows)["calls"])
    assert calls == sorted(calls, reverse=True) and calls[0] > 0.8
    for budget in (0.3, 0.6, 1.0):
        assert spend(fitted.choose_rate(budget), rows)["calls"] < budget + 0.1
    best = max(point["accuracy"] for point in fitted.frontier)
    point = next(p for p in fitted.frontier if p["rate"] == fitted.choose_rate(accuracy=best - 0.02).rate)
    assert point["accuracy"] >= best - 0.02
    for impossible in (dict(budget=-1.0), dict(accuracy=0.9999)):
        with pytest.raises(InputError, match="budget|accuracy"):
            fitted.choose_rate(**impossible)


def test_a_promise_is_the_best_plan_written_out(fitted):
    """Backward induction against a recursion over plans, on P alone."""
    fitted.rate = 0.2

    def value(n, sources, p):
        return max([p] + [offer(m, n, sources, p) for m in policies.affordable(n, sources, fitted.sizes, fitted.modules)])

    def offer(m, n, sources, p):
        heard = bool(policies.HEARS_EXPERT & set(sources))
        state = (policies.next_size(fitted.sizes, n), sources) if m == "samples" else (n, (*sources, m))
        after = fitted.after(m, np.array([p]), heard)[:, 0]
        return sum(value(*state, q) for q in after) / len(after) - 0.2 * fitted.price(m, n)

    sources = ("self_check", "self_reflection")                 # two purchases are left after the last samples
    for p in policies.GRID[::8]:
        for m, promises in fitted.offers(8, sources, 0.2).items():
            assert np.interp(p, policies.GRID, promises) == pytest.approx(offer(m, 8, sources, p), abs=0.01)


def test_fitted_on_a_hundred_questions_it_beats_fixed_weights():
    """The paper's tau = .5 spends two calls on every question."""
    fresh = stored_rows(400, seed=9)

    def fixed(row):
        totals = {}
        for s in row["samples"]:
            totals[s["answer"]] = totals.get(s["answer"], 0) + 1 / 8
        for pairs in row["by_n"]["8"]["votes"].values():
            for answer, share in pairs:
                totals[answer] = totals.get(answer, 0) + 0.5 * share
        return right(max(totals, key=totals.get), row)
    paper = np.mean([fixed(row) for row in fresh])
    for seed in (3, 4):
        policy = controller(stored_rows(100, seed=seed))
        policy.rate = 0.1
        spent = spend(policy, fresh)
        assert spent["accuracy"] >= paper - 0.005 and spent["calls"] < 1


# ---- The guarantee

def test_the_bound_is_the_binomial_one():
    for wrong, n in ((0, 30), (2, 60), (7, 50)):
        bound = frontier.risk_bound(wrong, n, 0.1)
        tail = sum(math.comb(n, k) * bound**k * (1 - bound)**(n - k) for k in range(wrong + 1))
        assert tail == pytest.approx(0.1, rel=1e-6)
    assert frontier.risk_bound(5, 5) == 1.0
    assert frontier.risk_bound(0, 30, 0.1) == pytest.approx(1 - 0.1 ** (1 / 30))


def test_abstention_keeps_its_target_on_fresh_questions():
    """At most one held-out set in ten may give a threshold whose true risk is above the target."""
    rng, broken, covered = np.random.default_rng(0), 0, []
    for _ in range(200):
        confidence = rng.random(300)
        correct = (rng.random(300) < confidence ** 0.5).astype(float)
        threshold = frontier.certified_threshold(confidence, correct, 0.1)
        # The true risk above t: mean of 1 - sqrt(x) over x > t.
        t = min(threshold, 1 - 1e-9)
        risk = 1 - (2 / 3) * (1 - t ** 1.5) / (1 - t)
        broken += np.isfinite(threshold) and risk > 0.1
        covered.append(np.isfinite(threshold))
    assert broken <= 20 + 2 * math.sqrt(18) and np.mean(covered) > 0.5
    assert frontier.certified_threshold(np.ones(10), np.ones(10), 0.05) == math.inf         # too few to show it


def test_gates_and_mixtures_end_where_they_should():
    rng = np.random.default_rng(0)
    before, after, signal = rng.integers(2, size=50), rng.integers(2, size=50), rng.random(50)
    assert (frontier.gate(signal, before, after, 0) == before).all()
    assert (frontier.gate(signal, before, after, 1) == after).all()
    half = frontier.gate(signal, before, after, 0.5)
    assert (half == np.where(signal <= np.sort(signal)[24], after, before)).all()
    points = [(0.2, before * 1.0), (0.6, after * 1.0)]
    assert frontier.mixed(points, 0.4) == pytest.approx((before + after) / 2)
    assert (frontier.mixed(points, 0.6) == after).all() and np.isnan(frontier.mixed(points, 0.1)).all()


# ---- policy.json

def test_a_policy_survives_its_file_and_is_refused_elsewhere(fitted, tmp_path):
    path = tmp_path / "policy.json"
    fitted.choose_rate(0.5).save(path)
    settings = Settings(policy=str(path))
    again = read_policy(settings, SOURCES)
    rows = [StoredQuestion(row, right) for row in stored_rows(30, seed=5)]
    assert [again.replay(q) for q in rows] == [fitted.replay(q) for q in rows]
    stored = json.loads(path.read_text())
    assert read_policy(Settings(policy=str(path), tau1=0.9), SOURCES)         # votes' weights do not matter to it
    path.write_text(json.dumps(stored | {"about": {**stored["about"], "settings": {"removed_flag": 1}}}))
    assert read_policy(settings, SOURCES)                                     # a flag that came, one that went
    path.write_text(json.dumps(stored))
    torn = tmp_path / "torn.json"
    torn.write_text(path.read_text()[:200])
    for change, sources, words in (
            (dict(samples=4), SOURCES, "fitted with samples 8, this run has samples 4"),
            ({}, SOURCES | {"expert": "other 00000003"}, "fitted with expert expert 00000002"),
            ({}, SOURCES | {"model": "base 00000009"}, "fitted with model"),
            ({}, SOURCES | {"check_model": "m 00000001"}, "check_model"),
            (dict(policy=str(torn)), SOURCES, "neither 'paper' nor a file"),
            (dict(policy=str(tmp_path)), SOURCES, "neither 'paper' nor a file"),
            (dict(early_exit="exact"), SOURCES, "early_exit exact"), (dict(abstain="0.5"), SOURCES, "abstain 0.5"),
            (dict(accuracy=0.9999), SOURCES, "lower it"),
            (dict(policy="paper", budget=0.5), SOURCES, "need a fitted policy")):
        with pytest.raises(InputError) as error:
            read_policy(dataclasses.replace(settings, **change), sources)
        assert words in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(InputError, match="choose one of 0.05"):
        fitted.threshold(0.07)
    with pytest.raises(InputError, match="too few"):
        fit_on_votes(stored_rows(5), Settings(), right, SOURCES)


# ---- With the built-in models

@pytest.fixture(scope="module")
def collected(base, clip):
    """Eight questions, all their evidence as eval.py stores it, and what collected it."""
    expert = LocalExpert(VLM.load(ROOT / "tiny" / "expert"), 96)
    settings = Settings(samples=4, expert_tokens=96)
    samples = list(data.load("synthetic", "test", 8))
    control = Controller(base, expert, clip, settings)
    return control, samples, eval.collector(control, [2, 4], 4)(samples)


@pytest.fixture(scope="module")
def file(fitted, tmp_path_factory):
    """The invented world's policy, as if it had been fitted on such questions."""
    path = tmp_path_factory.mktemp("policy") / "policy.json"
    scale = ((12.0, 1.0), (-0.4, 0.3))
    about = {"questions": 120, "settings": policy_file.settings_of(Settings(samples=4, expert_tokens=96)), "sources": {}}
    Policy(Posterior(fitted.posterior.coefficients, scale), fitted.outcomes, fitted.costs, [2, 4], fitted.modules, 0.1,
           frontier=fitted.frontier, about=about).save(path)
    return str(path)


def test_a_live_answer_is_the_replay_of_stored_votes(collected, file):
    control, samples, rows = collected
    settings = dataclasses.replace(control.settings, policy=file)
    live = Controller(control.vlm, control.expert, control.clip, settings)
    results = live.answer_all(samples)
    for result, sample, row in zip(results, samples, rows):
        replayed = live.policy.replay(StoredQuestion(row, lambda answer, _, s=sample: accepts(answer, s)))
        bought = [step["bought"] for step in result.purchases if "bought" in step]
        assert ["samples" if name.endswith("samples") else name for name in bought] == replayed.bought
        assert [step["p"] for step in result.purchases if "p" in step] == pytest.approx(replayed.p, abs=1e-4)
        assert result.correct == replayed.correct and result.confidence == pytest.approx(replayed.confidence, abs=1e-4)
        assert result.ledger.expert_calls == replayed.calls and "stopped" in result.purchases[-1]
        assert json.dumps(record(result, sample))
    assert len({tuple(result.order) for result in results}) > 1                # not all questions deserve the same
    alone = live.answer(samples[3])
    assert (alone.answer, alone.order) == (results[3].answer, results[3].order)


def test_the_first_samples_of_many_are_the_same(collected):
    control, samples, _ = collected
    results = control.answer_all(samples[:3])
    states = [policies_state(sample) for sample in samples[:3]]
    for n in (1, 3, 4):
        run_through(control.draw(states, n))
        for state, full in zip(states, results):
            assert [r.text for r in state.result.rollouts] == [r.text for r in full.rollouts[:n]]
    for state, full in zip(states, results):
        drawn, at_once = state.result.votes, [v for v in full.votes if v.source == "samples"]
        assert [v.answer for v in drawn] == [v.answer for v in at_once]
        assert [v.share for v in drawn] == pytest.approx([v.share for v in at_once], abs=1e-6)


class StoppingPlanner:
    """An Expert that says when to stop, and keeps what it was shown."""
    remote = False

    def __init__(self, expert, reply):
        self.expert, self.reply, self.prompts = expert, reply, []

    def ask(self, turns, attempt=0):
        planned = [prompt for _, prompt in turns if "In which order" in prompt]
        self.prompts += planned
        return [Reply(self.reply, 3) for _ in planned] if planned else self.expert.ask(turns, attempt)


@pytest.mark.parametrize("reply,order", [('["stop"]', []), ('["self_check", "stop"]', ["self_check"]),
                                         (json.dumps(list(data.MODULES[::-1])), list(data.MODULES[::-1]))])
def test_an_informed_planner_sees_the_signals_and_may_stop(collected, reply, order):
    control, samples, _ = collected
    plain = control.answer_all(samples[:2])
    expert = StoppingPlanner(control.expert, reply)
    settings = dataclasses.replace(control.settings, order="informed")
    results = Controller(control.vlm, expert, control.clip, settings).answer_all(samples[:2])
    for result, full, prompt in zip(results, plain, expert.prompts):
        assert result.order == order and set(result.skipped) == set(data.MODULES) - set(order)
        assert {v.source for v in result.votes} <= {"samples", *order} or len(order) == 3
        calls = 0 if len(order) < 3 else full.ledger.expert_calls
        assert result.ledger.expert_calls == 1 + calls                  # it is paid for
        answers = [extract_answer(r.text, None) for r in result.rollouts]
        for answer in {a for a in answers if a is not None}:
            given = [r.confidences.mean().item() for r, a in zip(result.rollouts, answers) if a == answer]
            assert f"{answer}: share {len(given) / 4:.2f}, C {np.mean(given):.1f}\n" in prompt
        if len(order) == 3:
            assert (result.answer, result.confidence) == (full.answer, full.confidence)
    nothing = Controller(control.vlm, expert, control.clip, dataclasses.replace(settings, modules=""))
    before = len(expert.prompts)
    assert nothing.answer(samples[0]).ledger.expert_calls == 0 and len(expert.prompts) == before


def policies_state(sample):
    from utils.results_file import QuestionState, Result
    return QuestionState(sample, sample.pictures(), Result(sample.id))
