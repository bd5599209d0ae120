"""Free baselines and headline figures against their definitions, by brute force."""
import math

import numpy as np
import pytest
import torch

from utils import baselines
from utils.metrics import auroc, calibration_error, cross_fitted, first_half


def answers(count=60, each=4, seed=0):
    """Answers to `count` questions of unlike difficulty, C and p that know some of it, with ties."""
    rng = np.random.default_rng(seed)
    easy = np.repeat(rng.uniform(size=count), each)
    correct = (rng.uniform(size=count * each) < easy).astype(float)
    value = (easy + 0.3 * correct + 0.4 * rng.standard_normal(count * each)).round(1)
    return {"id": np.repeat([f"q{i}" for i in range(count)], each), "correct": correct, "confidence": value + 10,
            "probability": 1 / (1 + np.exp(-value))}


def share_above(right, wrong):
    return np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for a in right for b in wrong])


def test_auroc_over_views_is_that_of_both_in_equal_numbers():
    clean, noised = answers(20), answers(20, seed=1)
    views = [(view["confidence"], view["correct"]) for view in (clean, noised)]
    pooled = np.concatenate([v for v, _ in views]), np.concatenate([r for _, r in views])
    assert baselines.auroc_over_views(*views) == pytest.approx(auroc(*pooled), abs=1e-12)
    by_hand = share_above(pooled[0][pooled[1] == 1], pooled[0][pooled[1] == 0])
    assert baselines.auroc_over_views(*views) == pytest.approx(by_hand)
    twice = tuple(np.tile(x, 3) for x in views[0])          # more answers to one view: the same weight of one half
    assert baselines.auroc_over_views(twice, views[1]) == pytest.approx(auroc(*pooled), abs=1e-12)
    assert math.isnan(baselines.auroc_over_views((np.ones(3), np.ones(3)), (np.ones(2), np.ones(2))))


def test_auroc_within_questions_counts_pairs_of_one_question():
    a = answers()
    pairs = [0.5 + 0.5 * np.sign(a["confidence"][i] - a["confidence"][j]) for i in range(240) for j in range(240)
             if a["id"][i] == a["id"][j] and a["correct"][i] > a["correct"][j]]
    assert baselines.auroc_within_questions(a["id"], a["confidence"], a["correct"]) == pytest.approx(np.mean(pairs))
    assert math.isnan(baselines.auroc_within_questions(a["id"][::4], a["confidence"][::4], a["correct"][::4]))


def test_a_confidence_of_the_question_alone_says_nothing_within():
    a = answers()
    mean = np.repeat(a["confidence"].reshape(-1, 4).mean(1), 4)
    assert baselines.auroc_within_questions(a["id"], mean, a["correct"]) == 0.5 < auroc(mean, a["correct"])


def test_majority_share_is_that_of_the_most_frequent_answer():
    ids, said = list("aaaabbbcc"), ["1", "2", "2", None, None, None, "3", "5", "4"]
    right = np.array([1, 0, 0, 0, 0, 0, 1, 1, 0])
    share, correct = baselines.majority_share(ids, said, right)
    assert share.tolist() == [0.5, 2 / 3, 0.5] and correct.tolist() == [0, 0, 1]      # None has most votes: not answered


def test_declines_counts_what_is_below_the_threshold():
    assert baselines.declines(np.array([0.1, 0.5, 0.7, 0.49])) == 0.5 and baselines.declines(np.array([0.9])) == 0


def test_free_maps_are_calibrated_and_never_see_their_own_half():
    a = answers(400)
    maps = baselines.free_maps(a["id"], a["confidence"], a["correct"])
    assert maps["platt"] == calibration_error(cross_fitted(a["id"], a["confidence"], a["correct"]), a["correct"])
    assert max(maps.values()) < 0.08 < calibration_error(a["probability"] ** 4, a["correct"])
    half = first_half(a["id"])
    other = np.where(half, a["correct"], 1 - a["correct"])          # answers of one half change the maps of the other alone
    for kind in ("platt", "isotonic"):
        first, second = (cross_fitted(a["id"], a["confidence"], y, kind) for y in (a["correct"], other))
        assert (first[~half] == second[~half]).all() and (first[half] != second[half]).any()


# ---- readouts

def states_of(count=300, width=6, seed=0):
    rng = np.random.default_rng(seed)
    states, truth = 3 + rng.standard_normal((count, width)) * np.arange(1, width + 1), rng.standard_normal(width) / 3
    return states, (rng.uniform(size=count) < 1 / (1 + np.exp(-(states - 3) @ truth))).astype(float)


def loss_of(weights, states, correct, blank, ranking, ridge):
    """The objective by hand, from weights on raw states."""
    z, z_blank = ((x @ weights[:-1] + weights[-1]) for x in (states, blank))
    return (np.logaddexp(0, z).sum() - (correct * z).sum() + ranking * (correct * np.logaddexp(0, z_blank - z)).sum()
            + ridge / 2 * ((weights[:-1] * states.std(0)) ** 2).sum())


@pytest.mark.parametrize("ranking", [0.0, 2.0])
def test_a_readout_is_the_minimum_of_its_loss(ranking):
    states, correct = states_of()
    blank = states_of(seed=1)[0]
    found = baselines.fit_readout(states, correct, blank, ranking, ridge=5.0).numpy()
    least, rng = loss_of(found, states, correct, blank, ranking, 5.0), np.random.default_rng(2)
    assert all(loss_of(found + 1e-3 * rng.standard_normal(7), states, correct, blank, ranking, 5.0) > least for _ in range(50))
    moved = baselines.fit_readout(states * 7 - 4, correct, blank * 7 - 4, ranking, ridge=5.0).numpy()       # any units
    np.testing.assert_allclose((states * 7 - 4) @ moved[:-1] + moved[-1], states @ found[:-1] + found[-1], atol=1e-4)


def test_the_ranking_loss_puts_a_picture_above_a_blank_one():
    states, correct = states_of()
    blank = states + np.random.default_rng(3).standard_normal(states.shape)
    gaps = []
    for ranking in (0.0, 20.0):
        w = baselines.fit_readout(states, correct, blank, ranking).numpy()
        gaps.append((((states - blank) @ w[:-1]) > 0)[correct == 1].mean())
    assert gaps[1] > gaps[0]
    torch.testing.assert_close(baselines.fit_readout(states, correct, blank, 0.0), baselines.fit_readout(states, correct))


def test_a_constant_state_is_no_evidence():
    _, correct = states_of()
    weights = baselines.fit_readout(np.ones((300, 2)), correct).numpy()
    assert 1 / (1 + math.exp(-weights.sum())) == pytest.approx(correct.mean(), abs=1e-4)


def test_a_readout_never_sees_its_own_half():
    states, correct = states_of(240)
    ids = np.repeat([f"q{i}" for i in range(60)], 4)
    p, half = baselines.cross_fitted_readout(ids, states, correct), first_half(ids)
    changed = baselines.cross_fitted_readout(ids, states, np.where(half, correct, 1 - correct))
    assert (p[~half] == changed[~half]).all() and (p[half] != changed[half]).all()
    assert auroc(p, correct) > 0.6
    weights = baselines.fit_readout(states[~half], correct[~half]).numpy()
    np.testing.assert_allclose(p[half], 1 / (1 + np.exp(-(states[half] @ weights[:-1] + weights[-1]))))
    assert np.isnan(baselines.cross_fitted_readout(ids, states, np.ones(240))).all()


# ---- rows

def test_the_headline_row_is_made_of_its_figures():
    clean, noised = answers(), answers(seed=5)
    row = baselines.headline(clean, noised, {"slope": 2.0, "intercept": -21.0})
    c = 1 / (1 + np.exp(21 - 2 * clean["confidence"]))
    assert row["AUROC, p"] == row["AUROC, C"]               # p rises with C here
    assert row["pass@1"] == clean["correct"].mean() and row["declines, clean"] == (c < 0.5).mean()
    assert row["ECE c"] == pytest.approx(calibration_error(c, clean["correct"]), abs=1e-5)
    assert row["AUROC mixed, C"] == baselines.auroc_over_views(*((v["confidence"], v["correct"]) for v in (clean, noised)))
    assert not {"ECE c", "declines, clean"} & baselines.headline(clean, noised).keys()


def test_readouts_that_know_the_noise_rank_over_both_views():
    """States that show which picture is noised, where every answer is wrong: of use to a readout that was fitted there."""
    rng, clean = np.random.default_rng(0), answers(250)
    noised = answers(250) | {"correct": np.zeros(1000)}
    names = dict.fromkeys(clean["id"])
    easy = {i: clean["correct"][clean["id"] == i].mean() + 0.2 * rng.standard_normal() for i in names}
    states = {view: {i: np.array([easy[i], float(view == "noised") + 0.1 * rng.standard_normal()]) for i in names}
              for view in ("clean", "noised", "blank")}
    rows = baselines.readouts(clean, noised, states)
    assert rows["P(IK)"]["AUROC"] > 0.75 and rows["P(IK)"]["ECE"] < 0.15
    assert rows["P(IK), both views"]["AUROC mixed"] > rows["P(IK)"]["AUROC mixed"] + 0.05


# ---- intervals

def test_an_interval_over_seeds_is_as_wide_as_both_kinds_of_chance():
    rng, wide = np.random.default_rng(0), []
    questions = 0.02 * rng.standard_normal((1, 4000))
    for spread in (0.0, 0.05):
        values = 0.7 + spread * np.array([-1.0, 0.0, 1.0])
        mean, low, high = baselines.interval_over_seeds(values, values[:, None] + questions)
        sd = math.sqrt(0.02 ** 2 + values.var(ddof=1) / 3)
        assert mean == pytest.approx(0.7) and (high - low) / 3.92 == pytest.approx(sd, rel=0.1)
        wide.append(high - low)
    assert wide[1] > wide[0]
    assert baselines.interval_over_seeds([0.7], 0.7 + questions)[1:] == tuple(np.percentile(0.7 + questions, [2.5, 97.5]))


def test_intervals_of_the_headline_hold_its_values():
    clean, noised = answers(80), answers(80, seed=5)
    plain = baselines.headline(clean, noised, {"slope": 2.0, "intercept": -21.0})
    found = baselines.headline_intervals(clean, noised, {"slope": 2.0, "intercept": -21.0}, rounds=200)
    assert {name: value[0] if isinstance(value, tuple) else value for name, value in found.items()} == plain
    ranges = {name: value for name, value in found.items() if isinstance(value, tuple)}
    assert set(plain) - set(ranges) == {f"ECE {name}, {kind}" for name in "Cp" for kind in ("platt", "isotonic")}
    assert all(low < high for _, low, high in ranges.values())
    for name in ("pass@1", "AUROC mixed, C", "AUROC, p", "AUROC within questions, C", "gap"):
        assert ranges[name][1] <= plain[name] <= ranges[name][2]
    means = clean["correct"].reshape(80, 4).mean(1)
    assert (ranges["pass@1"][2] - ranges["pass@1"][1]) / 3.92 == pytest.approx(means.std() / 80 ** 0.5, rel=0.2)


def test_states_are_stored_in_half_precision():
    state = np.random.default_rng(0).standard_normal(64) * 100
    np.testing.assert_allclose(baselines.unpacked(baselines.packed(state)), state, rtol=1e-3)
    assert baselines.unpacked(baselines.packed(torch.tensor([1e9, -1e9]))).tolist() == [65504, -65504]


def test_a_severity_row_by_hand():
    clean, fog = answers(40), answers(40, seed=2)
    row = baselines.severity_row(clean, fog, {"slope": 2.0, "intercept": -21.0})
    c = 1 / (1 + np.exp(21 - 2 * fog["confidence"]))
    assert row["accuracy"] == fog["correct"].mean() and row["c"] == pytest.approx(c.mean(), abs=1e-5)
    assert row["AUROC mixed, C"] == pytest.approx(auroc(*(np.concatenate([v[k] for v in (clean, fog)])
                                                          for k in ("confidence", "correct"))))
    assert "c" not in baselines.severity_row(clean, fog)
