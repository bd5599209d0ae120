"""What is made ahead is what would have been made in time."""
import threading

import pytest
from PIL import Image

import data
from utils import prefetch
from utils.cli import InputError


def test_batches_come_in_order_and_one_ahead():
    made, threads = [], set()

    def make(step):
        made.append(step)
        threads.add(threading.get_ident())
        return step * step
    ahead = prefetch.Ahead(make, 5)
    assert [ahead(step) for step in range(2, 5)] == [4, 9, 16]
    ahead.close()
    assert made == [2, 3, 4] and len(threads) == 2          # the first in this thread, no step beyond the last


def test_a_step_out_of_order_is_made_anew():
    ahead = prefetch.Ahead(lambda step: step, 100)
    assert [ahead(step) for step in (0, 7, 8, 3)] == [0, 7, 8, 3]
    ahead.close()


def test_what_goes_wrong_is_said_at_its_own_step():
    def make(step):
        if step == 2:
            raise InputError("the picture of step 2 is broken")
        return step
    ahead = prefetch.Ahead(make, 9)
    assert [ahead(0), ahead(1)] == [0, 1]
    with pytest.raises(InputError, match="step 2"):
        ahead(2)
    ahead.close()


def test_pictures_decoded_side_by_side_are_those_decoded_alone(tmp_path):
    samples = []
    for i in range(6):
        Image.new("RGB", (20 + i, 10), (40 * i, 9, 9)).save(tmp_path / f"{i}.png")
        samples.append(data.Sample(str(i), [tmp_path / f"{i}.png"], "?"))
    assert prefetch.decode_all(samples) == [s.pictures() for s in samples]
    (tmp_path / "3.png").write_bytes(b"")
    with pytest.raises(InputError, match="question '3'"):
        prefetch.decode_all(samples)
