"""The next step's pictures, made while this step runs."""
from concurrent.futures import ThreadPoolExecutor


class Ahead:
    """Makes batches in a thread, one ahead: `ahead(step)` is make(step).

    make: a pure function of the step, so that results do not depend on what was made ahead. Pillow's decoders
    and resizing, numpy and torch leave the interpreter free for the step that runs. last: no step from there
    on is made ahead. What make raises is raised by the call for its own step.
    """

    def __init__(self, make, last):
        self.make, self.last, self.pool = make, last, ThreadPoolExecutor(1)
        self.step, self.future = None, None

    def __call__(self, step):
        batch = self.future.result() if self.step == step else self.make(step)
        self.step = step + 1
        self.future = self.pool.submit(self.make, self.step) if self.step < self.last else None
        return batch

    def close(self):
        """Waits for what is being made."""
        self.pool.shutdown(cancel_futures=True)


def decode_all(samples, workers=2):
    """`pictures()` of several samples, decoded side by side -> list of lists of PIL images. The first
    sample's InputError is raised."""
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda sample: sample.pictures(), samples))
