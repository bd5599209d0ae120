"""Work that goes on while servers are waited for.

A batch's steps are a generator. It yields a Future where it waits for a server, and returns its result. One
thread drives many of them: while one waits, others go on. Servers are asked on daemon threads, which Ctrl-C
does not wait for.
"""
import queue
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, wait
from types import GeneratorType

from utils.cli import InputError


def in_background(function, *args):
    """function(*args) on a daemon thread -> Future; its `finished` says when, in time.perf_counter()."""
    future = Future()

    def work():
        try:
            value, failure = function(*args), None
        except BaseException as error:                      # raised by future.result()
            value, failure = None, error
        future.finished = time.perf_counter()
        if failure is None:
            future.set_result(value)
        else:
            future.set_exception(failure)
    threading.Thread(target=work, daemon=True).start()
    return future


def at_once(function, items, workers):
    """[function(item), ...] on several threads. The first error, in the order of the items, is raised."""
    results, work = [None] * len(items), queue.SimpleQueue()
    for pair in enumerate(items):
        work.put(pair)

    def labour():
        try:
            while True:
                i, item = work.get_nowait()
                try:
                    results[i] = (True, function(item))
                except Exception as error:                  # raised below
                    results[i] = (False, error)
        except queue.Empty:
            pass

    threads = [threading.Thread(target=labour, daemon=True) for _ in range(min(workers, len(items)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for is_fine, value in results:
        if not is_fine:
            raise value
    return [value for _, value in results]


def waited(future):
    """A generator that yields a Future unless it is done, and returns its value."""
    if not future.done():
        yield future
    return future.result()


def together(*steps):
    """Generators side by side: each is started before the first is waited for. They end in their order."""
    futures = [next(step, None) for step in steps]
    for step, future in zip(steps, futures):
        if future is not None:
            yield future
            yield from step


def timed(states, steps):
    """Drive a generator -> what it returns. Its work and its waits go into the questions' ledgers, in equal
    shares. What other batches do in the meantime does not."""
    seconds, future = 0.0, None
    try:
        while True:
            start = time.perf_counter()
            try:
                future = next(steps)
            except StopIteration as end:
                return end.value
            finally:
                seconds += time.perf_counter() - start
            start = time.perf_counter()
            yield future
            seconds += max(0.0, getattr(future, "finished", start) - start)
    finally:
        for state in states:
            state.result.ledger.seconds += seconds / len(states)


def run_through(steps):
    """Drive a generator -> what it returns."""
    while True:
        try:
            wait([next(steps)])
        except StopIteration as end:
            return end.value


def answer_batches(answer_batch, batches, in_flight):
    """Yields (batch, its rows) as they are done. While one batch waits for a server, others go on.

    answer_batch: see `results_file.run_resumable`. An error ends the run after the batches that are under
    way: what they bought is not lost.
    """
    under_way, failure, exhausted = [], None, False          # [batch, generator, Future that it waits for]
    while under_way or not (exhausted or failure):
        entry = next((entry for entry in under_way if entry[2] is None or entry[2].done()), None)
        if entry is None and len(under_way) < in_flight and not (exhausted or failure):
            batch = next(batches, None)
            exhausted = batch is None
            if exhausted:
                continue
            try:
                outcome = answer_batch(batch)
            except InputError as error:
                failure = error
                continue
            if not isinstance(outcome, GeneratorType):
                yield batch, outcome
                continue
            under_way.append(entry := [batch, outcome, None])
        if entry is None:
            wait([future for _, _, future in under_way], return_when=FIRST_COMPLETED)
            continue
        try:
            entry[2] = next(entry[1])
        except StopIteration as end:
            under_way.remove(entry)
            yield entry[0], end.value
        except InputError as error:
            under_way.remove(entry)
            failure = failure or error
    if failure:
        raise failure
