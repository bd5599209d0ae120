"""Which questions a step asks, and which of them pass through the model together."""
import random
from dataclasses import replace

from utils.distributed import gathered


class QuestionOrder:
    """The questions of each step: a fresh seeded permutation every epoch, dealt to the ranks in turn.

    It is a pure function of the step. A resumed run therefore neither replays nor skips a question.
    """

    def __init__(self, questions, batch_size, seed, rank=0, world=1):
        self.questions, self.batch_size, self.seed = questions, batch_size, seed
        self.rank, self.world = rank, world
        self.epoch, self.permutation = None, None

    def indices(self, step):
        """The step's indices into the questions, of all ranks (list of batch_size ints)."""
        indices = []
        for position in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, place = divmod(position, len(self.questions))
            if epoch != self.epoch:
                self.epoch, self.permutation = epoch, list(range(len(self.questions)))
                random.Random(f"order {self.seed} {epoch}").shuffle(self.permutation)
            indices.append(self.permutation[place])
        return indices

    def samples(self, step):
        """This rank's questions of a step (list of Sample).

        A question that occurs twice in the step (a file smaller than the batch) gets a second id. Its noise
        and its rollouts then differ from those of its first occurrence.
        """
        indices, samples = self.indices(step), []
        for place in range(self.rank, len(indices), self.world):
            sample, earlier = self.questions[indices[place]], indices[:place].count(indices[place])
            samples.append(replace(sample, id=f"{sample.id} again {earlier}") if earlier else sample)
        return samples


def micro_batches(vlm, original, noised, run):
    """Split a step's rollouts for the forward and backward passes -> list of (original, noised or None,
    weight).

    original, noised: RolloutBatch, the noised one None where its words are not scored. A pass holds at most
    --micro_batch questions, and as many as --micro_tokens allows, at least one. Questions with completions of
    similar length share a pass, because a pass is as wide as its longest row. Every rank gets the same number
    of passes, because a sharded model needs all ranks in each; the surplus ones have weight 0.
    """
    views = [view for view in (original, noised) if view is not None]
    questions = range(len(original.prompts))
    longest = [max(len(r.tokens) for view in views for r in view.rollouts[q]) for q in questions]
    prompt_lengths = [max(vlm.prompt_length(view.images[q], view.prompts[q]) for view in views)
                      if run.micro_tokens else 0
                      for q in questions]
    group_size, passes = len(original.rollouts[0]), [[]]
    for q in sorted(questions, key=longest.__getitem__):
        candidate = [*passes[-1], q]
        rows = len(views) * len(candidate)
        tokens = rows * (max(prompt_lengths[i] for i in candidate) + group_size * longest[q])
        if passes[-1] and (len(candidate) > run.micro_batch or run.micro_tokens
                           and tokens > run.micro_tokens):
            passes.append([q])
        else:
            passes[-1] = candidate
    missing = max(gathered([len(passes)])) - len(passes)
    weighted = [(sorted(indices), 1.0) for indices in passes] + [(sorted(passes[-1]), 0.0)] * missing
    return [(original.select(indices), noised and noised.select(indices), weight) for indices,
            weight in weighted]
