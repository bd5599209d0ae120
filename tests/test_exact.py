"""The gradient of a training step against that of the expected reward, for a policy small enough to enumerate."""
import math
from dataclasses import replace
from itertools import product

import pytest
import torch

import reward
from train_cdrl import RolloutBatch, accumulate_gradients, add_advantages, add_rewards, parse
from vlm import Rollout, Scores

VIEWS = ("original", "noised")
TEXTS = ("no box", r"so \boxed{1}", r"so \boxed{2}")        # by first word; the second is right on the original picture
SCALE = {"lo": 0.5, "hi": 0.9, "slope": 3.0, "intercept": -2.0}
EXACT = {"adv_norm": "loo", "pathwise": 1.0, "noised_policy": 1.0}


class Toy:
    """Three words, two pictures, one parameter vector: logits = W[picture, last word] theta. An answer has one word, or, with
    `longest` 2, ends with word 0 or after two. Each question has a copy of theta, and so a gradient of its own."""

    def __init__(self, longest):
        generator = torch.Generator().manual_seed(3)
        self.maps = torch.randn(2, 4, 3, 4, generator=generator, dtype=torch.float64)         # (view, last word, V, D)
        self.theta = torch.randn(4, generator=generator, dtype=torch.float64)
        self.copies = None
        self.answers = [[0], [1], [2]] if longest == 1 else [[0], *([a, b] for a in (1, 2) for b in range(3))]

    def logits(self, theta, view, words):
        """The logits that each word of an answer was drawn from (T, V)."""
        return torch.stack([self.maps[view, last] @ theta for last in (3, *words[:-1])])

    def read(self, theta, view, words):
        """-> log-probs (T,) and token confidences (T,)."""
        logits = self.logits(theta, view, words)
        return logits.log_softmax(-1)[range(len(words)), words], -logits.log_softmax(-1).amax(-1)        # Eq. 3 with k = 1

    def score(self, images, prompts, completions, temperature, inputs, rows):
        group, width = len(completions) // len(images), max(map(len, completions))
        words = torch.stack([torch.nn.functional.pad(w, (0, width - len(w))) for w in completions])      # (B, T)
        mask = torch.arange(width) < torch.tensor([len(w) for w in completions])[:, None]
        view, question = (torch.tensor([image[i] for image in images for _ in range(group)]) for i in (0, 1))
        last = torch.cat([torch.full((len(words), 1), 3), words[:, :-1]], 1)
        logits = torch.einsum("btvd,bd->btv", self.maps[view[:, None], last], self.copies[question])
        logprobs = (logits / temperature).log_softmax(-1).gather(-1, words[..., None])[..., 0]
        confidence = reward.token_confidence(logits)
        return Scores(*(x.masked_fill(~mask, 0) for x in (logprobs, confidence)), mask)

    def backward(self, loss, is_last):
        loss.backward()


def correct_of(view, words):
    return float(words[0] == 1 + view)


def format_of(words, longest):
    return reward.format_reward(TEXTS[words[0]], words[-1] == 0 or longest == 1)


def expected_gradient(toy, args, longest):
    """Each way to draw G pairs of answers is a question: its gradient by `accumulate_gradients`, weighed by its probability."""
    drawn = list(product(range(len(toy.answers)), repeat=2 * args.group_size))
    toy.copies = toy.theta.repeat(len(drawn), 1).requires_grad_()
    with torch.no_grad():
        seen = [[toy.read(toy.theta, view, words) for words in toy.answers] for view in range(2)]
    rollouts = [[Rollout(TEXTS[words[0]], torch.tensor(words), logprobs, confidences.float(), words[-1] == 0 or longest == 1)
                 for words, (logprobs, confidences) in zip(toy.answers, row)] for row in seen]
    views = []
    for v, name in enumerate(VIEWS):
        groups = [[rollouts[v][i] for i in draw[v * args.group_size:(v + 1) * args.group_size]] for draw in drawn]
        c = reward.rollout_confidence(groups)
        right = torch.tensor([[correct_of(v, r.tokens.tolist()) for r in group] for group in groups])
        views.append(RolloutBatch(name, [(v, q) for q in range(len(drawn))], [""] * len(drawn), groups, c, right,
                                  torch.zeros(len(drawn), dtype=torch.bool), None, list(range(len(drawn))),
                                  policy_weight=1.0 if v == 0 else args.noised_policy * args.noised_learns))
    add_rewards(views, SCALE, args)
    add_advantages(views, args.adv_norm)
    half = len(drawn) // 2
    halves = [range(half), range(half, len(drawn))]
    passes = [([view.select(list(indices)) for view in views], 1.0) for indices in halves]
    accumulate_gradients(toy, None, passes, SCALE, 1.0, args)
    chance = torch.tensor([math.exp(sum(r.logprobs.sum().item() for view in views for r in view.rollouts[q]))
                           for q in range(len(drawn))])
    assert chance.sum().item() == pytest.approx(1, abs=1e-6)
    return -(chance[:, None] * toy.copies.grad).sum(0) / args.group_size                # of a reward, not of a loss


def true_gradient(toy, args, longest):
    """Autograd of E[perception + the original's other terms + the noised one's, where it learns], written out term by term.
    Without a policy gradient there, the noised answers are data: their probability is a constant."""
    theta = toy.theta.clone().requires_grad_()
    total = 0.0
    for y, other in product(toy.answers, repeat=2):
        values, logprob = [], []
        for view, words in enumerate((y, other)):
            logprobs, confidences = toy.read(theta, view, words)
            c, right = confidences.mean(), correct_of(view, words)
            probability = torch.sigmoid(SCALE["slope"] * c + SCALE["intercept"])
            score = {"none": 0.0 * c,
                     "linear": (2 * right - 1) * ((c - SCALE["lo"]) / (SCALE["hi"] - SCALE["lo"])).clamp(0, 1),
                     "brier": 1 - (probability - right) ** 2,
                     "log": 1 + (probability if right else 1 - probability).clamp(0.01, 0.99).div(0.99).log() / math.log(99),
                     }[args.calibration]
            values.append((c, score + right + format_of(words, longest)))
            logprob.append(logprobs.sum())
        if not (args.learn_noised and args.noised_policy):
            logprob[1] = logprob[1].detach()
        perception = args.alpha * torch.tanh(args.beta * (values[0][0] - values[1][0]))
        total = total + sum(logprob).exp() * (perception + values[0][1] + (values[1][1] if args.learn_noised else 0))
    return torch.autograd.grad(total, theta)[0]


def both(longest, **settings):
    args = replace(parse([]), **{**EXACT, "cnorm": "range", "beta": 1.5, "group_size": 2, **settings})
    toy = Toy(longest)
    return expected_gradient(toy, args, longest), true_gradient(toy, args, longest)


@pytest.mark.parametrize("calibration", ["linear", "brier", "log"])
@pytest.mark.parametrize("weights", [{"alpha": 0.0}, {"alpha": 0.5}])
@pytest.mark.parametrize("group, longest", [(3, 1), (2, 2)])
@pytest.mark.parametrize("noised", [{"learn_noised": True}, {"learn_noised": True, "noised_policy": 0.0},
                                    {"learn_noised": False}])
def test_the_gradient_is_that_of_the_expected_reward(noised, group, longest, weights, calibration):
    ours, truth = both(longest, group_size=group, calibration=calibration, **weights, **noised)
    assert truth.norm() > 0.02
    torch.testing.assert_close(ours, truth, atol=1e-6, rtol=0)


@pytest.mark.parametrize("knob", [{"adv_norm": "none"}, {"adv_norm": "std"}, {"pathwise": 0.0}, {"pathwise": 3.5},
                                  {"noised_policy": 0.5}, {"calibration": "linear", "cnorm": "group"}])
def test_these_knobs_leave_the_exact_gradient(knob):
    ours, truth = both(2, alpha=0.5, learn_noised=True, **{"calibration": "brier", **knob})
    assert (ours - truth).norm() > 1e-3


@pytest.mark.parametrize("group", [2, 3])
def test_a_mean_that_holds_the_sample_scales_the_policy_half(group):
    """--adv_norm none leaves (G - 1) / G of it, and the pathwise half whole."""
    settings = {"group_size": group, "alpha": 0.5, "calibration": "brier", "learn_noised": True}
    (whole, _), (policy, _), (scaled, _) = (both(1, **settings, **knob) for knob in (
        {}, {"pathwise": 0.0}, {"adv_norm": "none"}))
    torch.testing.assert_close(whole - scaled, policy / group, atol=1e-6, rtol=0)
