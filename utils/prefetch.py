"""The next step's pictures, made while this step runs.

Threads, not processes. Decoding, resizing, noise, normalising and CLIP are C code that leaves the interpreter
free, and pictures of a step need not be copied (12 MB each for Qwen's default size).
"""
import copy
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from utils.cli import InputError
from utils.distributed import agreed


class Ahead:
    """Makes batches in a thread, one ahead: `ahead(step)` is make(step).

    make: a pure function of the step, so that results do not depend on what was made ahead. last: no step
    from there on is made. What make raises is raised by the call for its own step. waited: seconds that the
    last call took. Each batch is made in the same thread, so that a resumed run's first step is too.
    """

    def __init__(self, make, last):
        self.make, self.last, self.pool = make, last, ThreadPoolExecutor(1)
        self.step, self.future, self.waited = None, None, 0.0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __call__(self, step):
        start = time.perf_counter()
        future = self.future if self.step == step else self.pool.submit(self.make, step)
        batch = agreed(future.result)                   # where one rank refuses, all do
        self.step = step + 1
        self.future = self.pool.submit(self.make, self.step) if self.step < self.last else None
        self.waited = time.perf_counter() - start
        return batch

    def close(self):
        """Waits for what is being made."""
        self.pool.shutdown(cancel_futures=True)


def open_pictures(samples, workers=2, skip_broken=False):
    """`pictures()` of several samples, decoded side by side -> (samples, list of lists of PIL images).

    A picture that cannot be read raises the first sample's InputError. With skip_broken its question gives
    way to the next one of the batch whose pictures can be read, under an id of its own.
    """
    def opened(sample):
        try:
            return sample.pictures()
        except InputError as error:
            return error
    with ThreadPoolExecutor(workers) as pool:
        images = list(pool.map(opened, samples))
    sound = [i for i, pictures in enumerate(images) if not isinstance(pictures, InputError)]
    for i, pictures in enumerate(images):
        if isinstance(pictures, InputError):
            if not (skip_broken and sound):
                raise pictures
            other = next((j for j in sound if j > i), sound[0])
            samples = [*samples[:i], replace(samples[other], id=f"{samples[other].id} for {samples[i].id}"),
                       *samples[i + 1:]]
            images[i] = images[other]
    return samples, images


def reader_of(vlm):
    """The same model with a processor of its own, to encode prompts in another thread: a tokenizer serves one
    at a time."""
    reader = copy.copy(vlm)
    reader.processor = copy.deepcopy(vlm.processor)
    reader.tokenizer, reader.sight = reader.processor.tokenizer, type(vlm.sight)(reader.processor)
    return reader
