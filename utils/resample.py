"""Dynamic sampling (DAPO, arXiv 2503.14476): questions whose answers all earn the same give way to others.

A tied group has no advantage, so that its rollouts were drawn for nothing but their confidence.
"""
import random
from dataclasses import fields, replace

import torch

TIED = 1e-6                     # a standard deviation of rewards below it is rounding


def is_tied(batch):
    """Which groups of a RolloutBatch have equal rewards throughout -> (Q,) bool."""
    return sum(batch.rewards.values()).std(-1) < TIED


def joined(batch, other):
    """Two RolloutBatches of one view -> one. Encoded apart, their prompts are encoded again when scored."""
    values = {}
    for name in (field.name for field in fields(batch)):
        value, more = getattr(batch, name), getattr(other, name)
        if isinstance(value, list):
            values[name] = value + more
        elif isinstance(value, torch.Tensor):
            values[name] = torch.cat([value, more])
    rewards = {name: torch.cat([term, other.rewards[name]]) for name, term in batch.rewards.items()}
    return replace(batch, **values, rewards=rewards, inputs=None)


def replace_tied(samples, original, noised, order, step, roll_out, attempts):
    """Draw other questions for tied groups, at most `attempts` times -> samples, original, noised, how many.

    original, noised: RolloutBatch with rewards; noised may be None. order: QuestionOrder. roll_out(samples,
    name) -> the two batches of other questions, with rewards; name seeds them. The questions of an attempt
    follow from seed, step, attempt and rank. A slot whose new group is tied, too, keeps its question.
    """
    replaced = 0
    for attempt in range(attempts):
        slots = is_tied(original).nonzero()[:, 0].tolist()
        if not slots:
            break
        draw = random.Random(f"resample {order.seed} {step} {attempt} {order.rank}")
        more = [order.questions[draw.randrange(len(order.questions))] for _ in slots]
        more_original, more_noised = roll_out(more, f"{step} resample {attempt}")
        places = (~is_tied(more_original)).nonzero()[:, 0].tolist()
        indices = list(range(len(samples)))
        for slot, place in zip(slots, places):
            indices[slot] = len(samples) + place
        replaced += len(places)
        original = joined(original, more_original).select(indices)
        noised = noised and joined(noised, more_noised).select(indices)
        samples = [[*samples, *more][i] for i in indices]
    return samples, original, noised, replaced
