"""Numbers that are not finite: named where they appear, their update skipped, the third step ends a run."""
import math

from utils import cli
from utils.cli import InputError
from utils.distributed import gathered

PATIENCE = 3                    # steps in a row


def first_fault(samples, batches, micro_batches, update):
    """What is not finite of one update, the earliest in the order of computation -> words, or None.

    samples: Q questions. batches: RolloutBatch of the original and perhaps of the noised view. micro_batches:
    (views, weight) of them, scored. update: sums of loss terms, with grad_norm."""
    def name(q, batch):
        return f"question {samples[q].id!r} on the {batch.view} view"

    for batch in batches:
        for what, values in (("confidence", batch.confidence), *batch.rewards.items(),
                             ("advantage", batch.advantages)):
            if not values.isfinite().all():
                q = int((~values.isfinite()).nonzero()[0, 0])
                if any(not r.logprobs.isfinite().all() for r in batch.rollouts[q]):
                    what = "logits"
                return f"{'the term ' * (what in batch.rewards)}{what} of {name(q, batch)}"
    for views, _ in micro_batches:
        for batch in views:
            scored = batch.old_logprobs                                                             # (Q*G, T)
            if scored is not None and not scored.isfinite().all():
                row = int((~scored.isfinite()).nonzero()[0, 0]) // batch.confidence.shape[1]
                return f"the log-probs in the loss of {name(batch.rows[row] % len(samples), batch)}"
    terms = {"kl": "the KL to the starting model", "pathwise": "the pathwise term", "loss": "the loss",
             "grad_norm": "the gradient"}
    return next((words for key, words in terms.items() if not math.isfinite(update[key])), None)


class FiniteSteps:
    """Whether an update may be made. A step with a number that is not finite is skipped and said.

    in_a_row: such steps up to now; no checkpoint is worth writing meanwhile. skipped: updates of this step.
    """

    def __init__(self, args):
        self.args, self.in_a_row, self.skipped, self.step = args, 0, 0, None

    def __call__(self, step, *update):
        """update: as of `first_fault`. All ranks call it, and agree -> bool. Raises InputError after PATIENCE
        steps in a row, and where a run ends with two."""
        if step != self.step:
            self.in_a_row, self.skipped, self.step = self.in_a_row if self.skipped else 0, 0, step
        faults = gathered([first_fault(*update)])
        fault = next((words for words in faults if words), None)
        if fault is None:
            self.in_a_row = self.in_a_row if self.skipped else 0
            return True
        self.in_a_row += not self.skipped
        self.skipped += 1
        is_last = step + 1 >= self.args.steps
        if self.in_a_row >= (2 if is_last else PATIENCE):
            raise InputError(f"{fault} is not finite in step {step}, number {self.in_a_row} in a row; lower "
                             f"--lr ({self.args.lr:g}) or the reward's weights: the same command with a "
                             f"lower --lr and --resume from goes on from the newest checkpoint in "
                             f"{self.args.output}")
        if faults[0] is not None or len(faults) == 1:
            cli.warn(f"warning: step {step} is skipped: {fault} is not finite")
        if is_last:                         # alone: the run ends with the weights of the step before
            self.in_a_row = 0
        return False
