"""Confidence and reward terms against their formulas, and proper scores against what "proper" means."""
import math
from types import SimpleNamespace

import pytest
import torch

import reward
from train_cdrl import Args
from utils import loading, metrics
from utils.judge import is_correct


def padded(lengths, width, left):
    positions = torch.arange(width)
    starts = [width - n if left else 0 for n in lengths]
    return torch.stack([(positions >= start) & (positions < start + n) for start, n in zip(starts, lengths)])


# ---- confidence


@pytest.mark.parametrize(("vocab", "k"), [(1000, 20), (400, 5), (96, 20), (5, 20)])
def test_token_confidence_is_equation_3(vocab, k):
    logits = torch.randn(2, 7, vocab, generator=torch.Generator().manual_seed(0)) * 4
    kept = min(k, max(1, vocab // 8))
    log_probs = logits.log_softmax(-1).sort(dim=-1, descending=True).values
    torch.testing.assert_close(reward.token_confidence(logits, k), -log_probs[..., :kept].sum(-1) / kept)


@pytest.mark.parametrize("vocab", [30, 20480, 30001])
def test_the_largest_are_those_of_topk(vocab):
    """Values and gradients, bit for bit, with ties at the edge, banned words and a rest that fills no chunk."""
    torch.manual_seed(0)
    x = torch.randn(3, 2, vocab).round(decimals=1).masked_fill(torch.rand(vocab) < 0.3, -torch.inf)
    x[1, 0, -3:] = 9
    x[2, 1, 100:130] = 7.5          # more than k alike, over two chunks
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, wanted, weight = loading.largest(ours, 20), theirs.topk(20).values, torch.randn(3, 2, 20)
    assert torch.equal(found, wanted)
    (found.exp() * weight).sum().backward(), (wanted.exp() * weight).sum().backward()
    torch.testing.assert_close(ours.grad.sort().values, theirs.grad.sort().values)      # of those alike either may be taken


def test_token_confidence_by_hand():
    """16 tokens, so k = 2: p = (1/2, 1/4, 1/4 shared by 14) scores -(log 1/2 + log 1/4) / 2 = 1.5 log 2."""
    probs = torch.tensor([0.5, 0.25] + [0.25 / 14] * 14)
    assert reward.token_confidence(probs.log() + 3.0).item() == pytest.approx(1.5 * math.log(2), rel=1e-6)


def test_peaked_is_more_certain_than_flat_and_the_known_flaw_is_real():
    flat, peaked = torch.zeros(200), torch.zeros(200)
    peaked[0] = 12.0
    assert reward.token_confidence(peaked) > reward.token_confidence(flat)
    narrow = torch.full((200,), -80.0)
    narrow[:20] = 0.0  # uniform over k = 20: the lower entropy, and yet the lower confidence
    entropy = [torch.distributions.Categorical(logits=logits).entropy() for logits in (narrow, flat)]
    assert entropy[0] < entropy[1]
    assert reward.token_confidence(narrow).item() == pytest.approx(math.log(20), rel=1e-5)
    assert reward.token_confidence(flat).item() == pytest.approx(math.log(200), rel=1e-5)


def test_k_for_tiny_and_large_vocabularies():
    assert [reward.top_k_for(v) for v in (3, 8, 80, 160, 152_000)] == [1, 1, 10, 20, 20]
    assert reward.top_k_for(152_000, k=5) == 5
    with pytest.raises(ValueError, match="at least 1"):
        reward.top_k_for(100, k=0)


def test_half_precision_logits_are_read_in_fp32():
    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert reward.token_confidence(logits).dtype == torch.float32
    torch.testing.assert_close(reward.token_confidence(logits), reward.token_confidence(logits.float()))


def reading_by_loop(values, reading, window):
    if reading == "mean" or len(values) <= window:
        return sum(values) / len(values)
    means = [sum(values[i:i + window]) / window for i in range(len(values) - window + 1)]
    if reading == "tail":
        return means[-1]
    means.sort()
    lowest = means[:max(1, len(means) // 10)] if reading == "bottom" else means[:1]
    return sum(lowest) / len(lowest)


def read(conf, mask, reading, window):
    return (reward.sequence_confidence(conf, mask) if reading == "mean"
            else reward.window_confidence(conf, mask, reading, window))


@pytest.mark.parametrize("reading", ["mean", "tail", "bottom", "min"])
@pytest.mark.parametrize("left", [False, True])
def test_readings_equal_a_plain_loop(reading, left):
    lengths, width = [50, 33, 8, 7, 1], 50
    mask = padded(lengths, width, left)
    conf = torch.randn(5, width, generator=torch.Generator().manual_seed(3))
    conf = conf.masked_fill(~mask, float("nan"))  # padding that leaks would show
    wanted = [reading_by_loop(row[keep].tolist(), reading, 8) for row, keep in zip(conf, mask)]
    for kind in (mask, mask.int(), mask.float()):
        torch.testing.assert_close(read(conf, kind, reading, 8), torch.tensor(wanted))


def test_eos_counts_and_padding_does_not():
    conf = torch.tensor([[1.0, 2.0, 9.0, 100.0]])  # two words, EOS, padding
    assert reward.sequence_confidence(conf, torch.tensor([[1, 1, 1, 0]])).item() == 4.0


@pytest.mark.parametrize("reading", ["mean", "tail", "bottom", "min"])
def test_gradient_reaches_the_tokens_and_not_the_padding(reading):
    mask = padded([40, 9], 40, left=False)
    conf = torch.randn(2, 40, generator=torch.Generator().manual_seed(4)).requires_grad_()
    read(conf, mask, reading, 8).sum().backward()
    assert (conf.grad[~mask] == 0).all()
    torch.testing.assert_close(conf.grad.sum(-1), torch.ones(2))  # each reading is an average: weights sum to 1


def test_bad_readings_and_empty_rows_are_refused():
    conf = torch.ones(2, 3)
    with pytest.raises(ValueError, match="median"):
        reward.window_confidence(conf, conf, "median")
    for reading in ("mean", "tail"):
        with pytest.raises(ValueError, match="at least one generated token"):
            read(conf, torch.tensor([[1, 1, 1], [0, 0, 0]]), reading, 8)


# ---- reward terms


def settings(**changes):
    return Args(**{"alpha": 0.5, "beta": 2.0, "calibration": "none", **changes})


def perception(c, c_noised, **changes):
    none = torch.zeros(len(c), dtype=torch.bool)
    return reward.confidence_reward(c, c_noised, torch.zeros_like(c), none, {}, settings(**changes))[0]


def test_perception_term_is_bounded_odd_and_zero_for_controls():
    c, c_noised = torch.randn(3, 4, generator=torch.Generator().manual_seed(5)) * 9, torch.zeros(3, 4)
    term = perception(c, c_noised)
    assert term.shape == (3, 4) and term.abs().max() <= 0.5
    torch.testing.assert_close(term, -perception(c_noised, c))
    assert perception(torch.tensor([[50.0]]), torch.zeros(1, 1)).item() == pytest.approx(0.5)
    small = torch.tensor([[1e-3]])  # slope alpha * beta at zero
    assert perception(small, torch.zeros(1, 1)).item() == pytest.approx(1e-3, rel=1e-5)
    is_control = torch.tensor([True, False, True])
    controls = reward.confidence_reward(c, c_noised, c_noised, is_control, {}, settings())[0]
    assert torch.equal(controls[~is_control], term[~is_control]) and not controls[is_control].any()
    assert not perception(c, None).any() and not perception(c, c_noised, alpha=0.0).any()


def c_norm(c, **changes):
    """Cnorm, read from the linear term of right answers."""
    return reward.calibration_reward(c, torch.ones_like(c), {"lo": 10, "hi": 15}, settings(calibration="linear", **changes))


def test_normalisers():
    c = torch.tensor([[9.0, 10.0, 12.5, 15.0, 99.0]])
    torch.testing.assert_close(c_norm(c, cnorm="range"), torch.tensor([[0.0, 0.0, 0.5, 1.0, 1.0]]))
    group = torch.tensor([[1.0, 2.0, 5.0], [4.0, 4.0, 4.0]], requires_grad=True)
    normal = c_norm(group, cnorm="group")
    torch.testing.assert_close(normal, torch.tensor([[0.0, 0.25, 1.0], [0.5, 0.5, 0.5]]))
    normal.sum().backward()
    assert group.grad.isfinite().all()
    torch.testing.assert_close(c_norm(7 * group + 3, cnorm="group"), normal)  # a scale of its own for each group


GRID = torch.linspace(0, 1, 101)


def score(name, prob, correct):
    """The calibration term of answers whose c, or Cnorm, is `prob`."""
    c = prob if name == "linear" else prob.double().logit()
    confidence_map = {"lo": 0.0, "hi": 1.0, "slope": 1.0, "intercept": 0.0}
    return reward.calibration_reward(c, correct, confidence_map, settings(calibration=name, cnorm="range")).float()


def best_bet(name, rate):
    """The reported probability that earns the most, when a fraction `rate` of the answers is right."""
    right, wrong = torch.ones(101), torch.zeros(101)
    expected = rate * score(name, GRID, right) + (1 - rate) * score(name, GRID, wrong)
    return GRID[expected.argmax()].item()


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.5, 0.62, 0.97])
def test_brier_and_log_pay_for_the_true_rate_and_linear_does_not(rate):
    assert best_bet("brier", rate) == pytest.approx(rate, abs=1e-6)
    assert best_bet("log", rate) == pytest.approx(rate, abs=1e-6)
    if rate != 0.5:
        assert best_bet("linear", rate) == float(rate > 0.5)


@pytest.mark.parametrize("name", ["brier", "log"])
def test_proper_scores_span_zero_to_one(name):
    values = torch.stack([score(name, GRID, torch.full((101,), outcome)) for outcome in (True, False)])
    assert values.min().item() == pytest.approx(0, abs=1e-6)
    assert values.max().item() == pytest.approx(1, abs=1e-6)
    assert (values[0].diff() >= 0).all() and (values[1].diff() <= 0).all()


def test_linear_by_hand_and_bool_equals_float():
    prob, correct = torch.tensor([0.25, 0.25]), torch.tensor([True, False])
    assert score("linear", prob, correct).tolist() == [0.25, -0.25]
    for name in ("linear", "brier", "log"):
        torch.testing.assert_close(score(name, prob, correct), score(name, prob, correct.float()))


def simulated(slope, intercept, n, spread=2.0):
    generator = torch.Generator().manual_seed(6)
    c = 13 + spread * torch.randn(n, generator=generator)
    return c, torch.bernoulli(torch.sigmoid(slope * c + intercept), generator=generator)


@pytest.mark.parametrize("slope", [0.8, -0.5])
def test_platt_recovers_what_generated_the_data(slope):
    c, correct = simulated(slope, -13 * slope + 0.3, 40_000)
    found, intercept = metrics.fit_platt(c, correct)
    assert found == pytest.approx(slope, abs=0.03)
    assert intercept == pytest.approx(-13 * slope + 0.3, abs=0.4)
    p = metrics.probability(c, found, intercept)
    assert p.mean().item() == pytest.approx(correct.mean().item(), abs=1e-3)  # calibrated on average


def test_platt_agrees_with_gradient_descent_on_its_objective():
    c, correct = simulated(0.8, -10.0, 300)
    positives = correct.sum()
    targets = torch.where(correct > 0, (positives + 1) / (positives + 2), 1 / (300 - positives + 2)).double()
    centred = c.double() - c.double().mean()
    z = centred / centred.square().mean().sqrt()
    weights = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([weights], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        logits = weights[0] * z + weights[1]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
        loss = loss + 0.5e-3 * weights.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    fitted = metrics.probability(c.double(), *metrics.fit_platt(c, correct))
    torch.testing.assert_close(fitted, torch.sigmoid(weights[0] * z + weights[1]).detach(), atol=1e-6, rtol=0)


def test_platt_is_monotone_and_survives_degenerate_data():
    c = torch.linspace(5, 15, 50)
    cases = {"separable": (c > 10).float(), "all right": torch.ones(50), "all wrong": torch.zeros(50),
             "one outlier": (c == c[-1]).float()}
    for name, correct in cases.items():
        slope, intercept = metrics.fit_platt(c, correct)
        p = metrics.probability(c, slope, intercept)
        assert math.isfinite(slope) and math.isfinite(intercept) and ((p > 0) & (p < 1)).all(), name
        assert slope >= -1e-6 and (p.diff() >= -1e-6).all(), name
    assert metrics.probability(c, *metrics.fit_platt(c, torch.ones(50))).mean().item() == pytest.approx(51 / 52, abs=1e-3)
    slope, intercept = metrics.fit_platt(torch.full((10,), 12.0), torch.tensor([1.0] * 7 + [0.0] * 3))
    assert abs(slope) < 1e-6 and 0.6 < metrics.probability(torch.tensor(12.0), slope, intercept) < 0.75
    wild = torch.cat([torch.zeros(200), torch.tensor([1e6])])  # one point carries all the spread
    assert all(map(math.isfinite, metrics.fit_platt(wild, torch.arange(201) % 2)))


@pytest.mark.parametrize("c", [[], [[1.0, 2.0]], [1.0, float("nan")], [1.0]])
def test_platt_refuses_what_it_cannot_fit(c):
    with pytest.raises(ValueError, match="fit_platt"):
        metrics.fit_platt(torch.tensor(c), torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize(("text", "finished", "wanted"), [
    (r"Three and four: \boxed{7}", True, 1.0),
    (r"Three and four: \boxed{\frac{1}{2}}.", True, 1.0),
    (r"A set: \boxed{\{1, 2\}}", True, 1.0),
    (r"Three and four: \boxed{7}", False, 0.0),
    (r"\boxed{7}", True, 0.0),
    (r" $\boxed{7}$", True, 0.0),
    (r"Seven: \boxed{}", True, 0.0),
    (r"Seven: \boxed{ }", True, 0.0),
    (r"Seven: \boxed{7", True, 0.0),
    (r"Seven: \boxed{\frac{1}{2}", True, 0.0),
    (r"Seven: \boxed{7} or \boxed{8}", True, 0.0),
    (r"Seven: \boxed{7} or \boxed{8", True, 0.0),
    (r"Seven: \boxed{\boxed{7}}", True, 0.0),
    ("Seven: 7", True, 0.0),
    ("", True, 0.0),
])
def test_format_reward(text, finished, wanted):
    assert reward.format_reward(text, finished) == wanted


def test_outcome_reward_is_the_judge():
    sample = SimpleNamespace(id="q", answer="7", choices=None, meta={})
    assert is_correct(r"so \boxed{7}", sample) is True
    assert is_correct(r"so \boxed{17}", sample) is False
