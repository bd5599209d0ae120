"""Which questions a step sees, and which of them pass through the model together."""
import random
from dataclasses import replace


class Order:
    """Which questions step s sees: a fresh seeded permutation an epoch; a pure function of the step, so that a resumed
    run neither replays nor skips (the step is the data position)."""

    def __init__(self, size, batch_size, seed):
        self.size, self.batch_size, self.seed, self.epoch, self.permutation = size, batch_size, seed, None, None

    def __call__(self, step):
        indices = []
        for position in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, place = divmod(position, self.size)
            if epoch != self.epoch:
                self.epoch, self.permutation = epoch, list(range(self.size))
                random.Random(f"order {self.seed} {epoch}").shuffle(self.permutation)
            indices.append(self.permutation[place])
        return indices


def questions_of(train_set, order, step, rank=0, world=1):
    """A rank's questions of a step (list of Sample). One that comes again within the step, as it does where --batch_size is
    more than the questions of a file, has another id there, and with it other noise and other rollouts."""
    indices, samples = order(step), []
    for place in range(rank, len(indices), world):
        sample, earlier = train_set[indices[place]], indices[:place].count(indices[place])
        samples.append(replace(sample, id=f"{sample.id} again {earlier}") if earlier else sample)
    return samples


def micro_batches(vlm, views, prompts, args):
    """Which questions are learned from in one forward and backward pass -> lists of their indices: at most --micro_batch, and
    as many as --micro_tokens allows, at least one. Questions with completions of like length go together: a pass is as wide
    as its longest."""
    seen = [[view for view in views if q < len(view.images)] for q in range(len(prompts))]
    longest = [max(len(r.tokens) for view in seen[q] for r in view.rollouts[q]) for q in range(len(prompts))]
    lengths = [max(vlm.prompt_length(view.images[q], prompt) for view in seen[q]) if args.micro_tokens else 0
               for q, prompt in enumerate(prompts)]
    found = [[]]
    for q in sorted(range(len(prompts)), key=longest.__getitem__):
        part = [*found[-1], q]
        tokens = sum(len(seen[i]) for i in part) * (max(lengths[i] for i in part) + args.group_size * longest[q])
        if found[-1] and (len(part) > args.micro_batch or args.micro_tokens and tokens > args.micro_tokens):
            found.append([q])
        else:
            found[-1] = part
    return found
