import json
from collections import Counter

import pytest
from PIL import Image

import data
from data import InputError
from reward import format_reward, is_correct


def test_same_split_seed_and_index_give_the_same_question():
    for index in range(24):
        a, b = data.synthetic("train", 3, index), data.synthetic("train", 3, index)
        assert (a.question, a.answer, a.choices, a.meta) == (b.question, b.answer, b.choices, b.meta)
        assert a.images[0].tobytes() == b.images[0].tobytes()
    assert data.synthetic("train", 3, 0).images[0].tobytes() != data.synthetic("train", 4, 0).images[0].tobytes()


def test_splits_share_no_picture():
    seen = {split: {s.images[0].tobytes() + s.question.encode() for seed in range(3) for s in data.load(
        "synthetic", split, 400, seed)} for split in data.SPLITS}
    assert min(map(len, seen.values())) > 1000
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["val"] and not seen["val"] & seen["test"]


def test_twelve_questions_hold_each_skill_and_level_once():
    pairs = Counter((s.meta["skill"], s.meta["level"]) for s in data.load("synthetic", "test", 12))
    assert set(pairs) == {(skill, level) for skill in data.SKILLS for level in data.LEVELS}


def test_worked_solutions_are_right_and_evidence_is_part_of_the_picture():
    side = data.CELL * data.GRID
    for s in data.load("synthetic", "train", 240):
        assert is_correct(s.meta["solution"], s) and format_reward(s.meta["solution"], True) == 1.0
        area = sum((r - left) * (b - top) for left, top, r, b in s.meta["evidence"])
        assert 0 < area <= side * side * 6 / 16
        assert s.choices is None and s.answer in s.meta["solution"]


def test_answers_follow_from_the_board_in_words():
    """The renderer and the question maker describe the same board: count and sum from the words alone."""
    for s in data.load("synthetic", "val", 240):
        cells = [cell for row in s.meta["rows"] for cell in row.split(", ")]
        if s.meta["skill"] == "count":
            color, shape = s.question.removeprefix("How many ").removesuffix(" are there?").split()
            assert str(cells.count(f"{color} {shape[:-2] if shape == 'crosses' else shape[:-1]}")) == s.answer
        elif s.meta["skill"] == "digits":
            color = s.question.split()[-2]
            assert sum(int(c.split()[1]) for c in cells if c.startswith(color) and c[-1].isdigit()
                       and "bar" not in c) == int(s.answer)
        elif s.meta["skill"] == "spatial":
            assert any(cell.startswith(s.answer) for cell in cells)


def test_prompt_asks_for_a_box_and_lists_the_options():
    s = data.Sample("a", [], "Which?", "B", ["red circle", "blue star", "green cross", "pink square"])
    assert "\\boxed{}" in data.prompt(s) and all(f"({letter}) {c}" in data.prompt(s) for letter, c in zip("ABCD", s.choices))


def rows(tmp_path, *lines):
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_jsonl_paths_are_relative_choices_become_letters(tmp_path):
    (tmp_path / "pics").mkdir()
    Image.new("L", (30, 20)).save(tmp_path / "pics" / "a.png")
    path = rows(tmp_path, {"id": 7, "image": "pics/a.png", "question": "Q?", "choices": ["x", "y"], "answer": "y"},
                {"id": "b", "image": ["pics/a.png", "pics/a.png"], "question": "Q?", "answer": 3})
    a, b = data.load(path)
    assert (a.id, a.answer, b.answer, len(b.images)) == ("7", "B", "3", 2)
    assert a.pictures()[0].size == (30, 20) and a.pictures()[0].mode == "RGB"
    assert len(data.load(path, limit=1)) == 1


@pytest.mark.parametrize("row, names", [
    ({"id": "e1", "image": "a.png", "question": "  "}, "e1"), ('{"id": ', "line 1"), ([1], "list"),
    ({"id": "e2", "image": 3, "question": "Q"}, "e2"), ({"id": "e3", "question": "Q", "choices": ["a"]}, "e3"),
    ({"id": "e4", "question": "Q", "choices": ["a", "b"], "answer": "Z"}, "e4")])
def test_a_bad_row_is_named_in_one_sentence(tmp_path, row, names):
    with pytest.raises(InputError, match=names) as error:
        data.load(rows(tmp_path, row))
    assert "\n" not in str(error.value)


def test_missing_unknown_empty_and_repeated(tmp_path):
    for source, words in (("nowhere.jsonl", "does not exist"), (tmp_path, "does not exist"), (rows(tmp_path), "no question")):
        with pytest.raises(InputError, match=words):
            data.load(source)
    with pytest.raises(InputError, match="twice"):
        data.load(rows(tmp_path, {"id": 1, "question": "a"}, {"id": 1, "question": "b"}))
    with pytest.raises(InputError, match="split"):
        data.load("synthetic", "dev")


def test_an_unreadable_image_is_named(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    for name in ("bad.png", "absent.png"):
        sample = data.load(rows(tmp_path, {"id": "q9", "image": name, "question": "Q", "answer": "1"}))[0]
        with pytest.raises(InputError, match="q9"):
            sample.pictures()


def test_every_real_question_opens(real):
    samples = data.load(real / "data.jsonl")
    assert len(samples) == 119 and max(len(s.images) for s in samples) == 5
    for s in samples:
        sizes = s.pictures()
        assert sizes and all(min(image.size) > 0 for image in sizes)
