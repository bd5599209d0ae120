"""Dynamic sampling (DAPO, arXiv 2503.14476): other questions for those whose answers all earn the same.

Such a tied group has no advantage, and its rollouts teach only their confidence.
"""
import random

from utils import distributed


def replace_tied(samples, views, order, step, roll_out, attempts):
    """Draw other questions for tied groups, at most `attempts` times -> samples, views, number replaced.

    views: RolloutBatch of each view, with rewards; the first view decides. order: QuestionOrder.
    roll_out(samples, name) -> views of other questions, with rewards; the name seeds them. The questions
    follow from seed, step, attempt and rank. A question whose replacement is tied as well stays.
    """
    replaced = 0
    for attempt in range(attempts):
        tied = views[0].is_tied.nonzero()[:, 0].tolist()
        if not distributed.summed([len(tied)])[0]:      # ranks stop together: a rollout gathers the weights
            break
        draw = random.Random(f"resample {order.seed} {step} {attempt} {order.rank}")
        others = draw.choices(order.questions, k=max(1, len(tied)))
        other_views = roll_out(others, f"{step} resample {attempt}")
        untied = (~other_views[0].is_tied).nonzero()[:, 0].tolist()
        rows = list(range(len(samples)))
        for slot, other in zip(tied, untied):
            rows[slot] = len(samples) + other
            replaced += 1
        samples = [[*samples, *others][row] for row in rows]
        views = [view.joined(other).select(rows) for view, other in zip(views, other_views)]
    return samples, views, replaced
