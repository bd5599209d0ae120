"""What is made ahead is what would have been made in time."""
import threading

import pytest
import torch
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
    # all in one thread that is not this one; no step beyond the last
    assert made == [2, 3, 4] and len(threads) == 1 and threading.get_ident() not in threads


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
    assert prefetch.open_pictures(samples) == (samples, [s.pictures() for s in samples])
    (tmp_path / "3.png").write_bytes(b"")
    with pytest.raises(InputError, match="question '3'"):
        prefetch.open_pictures(samples)


def test_a_broken_picture_gives_way_to_the_next_question(tmp_path):
    samples = [data.Sample(str(i), [tmp_path / f"{i}.png"], f"question {i}") for i in range(4)]
    for i in (0, 2):
        Image.new("RGB", (20 + i, 10)).save(tmp_path / f"{i}.png")
    opened, images = prefetch.open_pictures(samples, skip_broken=True)
    assert [s.id for s in opened] == ["0", "2 for 1", "2", "0 for 3"]
    assert [pictures[0].width for pictures in images] == [20, 22, 22, 20]
    with pytest.raises(InputError, match="question '1'"):
        prefetch.open_pictures([samples[1], samples[3]], skip_broken=True)


def test_a_reader_encodes_beside_the_model(base, mixed):
    """Prompts encoded in another thread, again and again, while the model's own tokenizer works, are the
    same."""
    images, prompts = mixed
    reader, wanted = prefetch.reader_of(base), base.encode(images, prompts)
    with prefetch.Ahead(lambda step: reader.encode(images, prompts), 20) as ahead:
        for step in range(20):
            inputs = ahead(step)
            for _ in range(20):
                base.tokenizer(prompts, padding=True)
            assert all(torch.equal(inputs[name], wanted[name]) for name in wanted)
    assert reader.model is base.model and reader.tokenizer is not base.tokenizer
