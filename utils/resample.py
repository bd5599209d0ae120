"""Dynamic sampling (DAPO, arXiv 2503.14476): questions whose answers all earn the same give way to others.

A tied group has no advantage, so that its rollouts were drawn for nothing but their confidence.
"""
import random


def replace_tied(samples, views, order, step, roll_out, attempts):
    """Draw other questions for tied groups, at most `attempts` times -> samples, views, how many.

    views: RolloutBatch of each, with rewards; the first one decides. order: QuestionOrder. roll_out(samples,
    name) -> the views of other questions, with rewards; name seeds them. The questions of an attempt follow
    from seed, step, attempt and rank. A slot whose new group is tied, too, keeps its question.
    """
    replaced = 0
    for attempt in range(attempts):
        slots = views[0].is_tied.nonzero()[:, 0].tolist()
        if not slots:
            break
        draw = random.Random(f"resample {order.seed} {step} {attempt} {order.rank}")
        others = [order.questions[draw.randrange(len(order.questions))] for _ in slots]
        other_views = roll_out(others, f"{step} resample {attempt}")
        places = (~other_views[0].is_tied).nonzero()[:, 0].tolist()
        indices = list(range(len(samples)))
        for slot, place in zip(slots, places):
            indices[slot] = len(samples) + place
        replaced += len(places)
        views = [view.joined(other).select(indices) for view, other in zip(views, other_views)]
        samples = [[*samples, *others][i] for i in indices]
    return samples, views, replaced
