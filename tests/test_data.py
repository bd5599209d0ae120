import base64
import csv
import io
import json
import re
import tracemalloc
from collections import Counter

import pytest
from PIL import Image

import data
from data import InputError
from judge import is_correct
from reward import format_reward


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


# ---- The formats that benchmarks come in

def tsv(real, name):
    return data.load(real / "tsv" / f"{name}.tsv")


def test_every_tsv_agrees_with_the_plain_rows(real):
    """Counts, sizes of the pictures, questions, letters and option texts, against data.jsonl, which is plain JSONL."""
    plain = {}
    for s in data.load(real / "data.jsonl"):
        plain.setdefault(s.source, []).append(s)
    pairs = {"EasyVQA": "easy-VQA", "MathVision": "MathVision", "MathVista": "MathVista(testmini)", "PuzzleVQA": "PuzzleVQA",
             "TheoremQA": "TheoremQA"}
    found = {name: list(tsv(real, name)) for name in pairs} | {"MMMU": list(tsv(real, "MMMU"))}
    plain["all MMMU"] = [s for s in data.load(real / "data.jsonl") if s.source.startswith("MMMU")]
    assert sum(map(len, found.values())) == 119
    for name, source in {**pairs, "MMMU": "all MMMU"}.items():
        assert len(found[name]) == len(plain[source])
        for a, b in zip(found[name], plain[source]):
            assert [image.size for image in a.pictures()] == [image.size for image in b.pictures()], (name, a.id)
            assert (a.answer, a.choices) == (b.answer, b.choices), (name, a.id)
            assert not a.question.startswith("Hint:") and "\nChoices:" not in a.question
            # VLMEvalKit strips the tags of single pictures from MathVision's questions
            words = [re.sub(r"\s*<image ?\d*>", "", s.question).split() for s in (a, b)]
            assert words[0] == words[1], (name, a.id)


def test_the_official_files_agree_with_the_plain_rows(real, tmp_path):
    plain = {s.id: s for s in data.load(real / "data.jsonl")}
    vision = data.load(real / "original" / "mathvision_test_rows.jsonl")
    assert len(vision) == 50
    for s in vision:
        twin = plain[f"mathvision_{s.id}"]
        assert (s.question, s.answer, s.choices) == (twin.question, twin.answer, twin.choices)
    vista = data.load(real / "original" / "mathvista_testmini_rows.json")
    assert len(vista) == 5
    for s in vista:
        twin = next(p for p in plain.values() if p.source.startswith("MathVista") and p.id.split("_")[-1] == s.id)
        assert (s.question, s.answer, s.choices) == (twin.question, twin.answer, twin.choices)
        assert "precision" in s.meta or s.meta["answer_type"] != "float"


def write_tsv(path, header, rows):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerows([header, *rows])
    return path


def picture(color="red", size=(40, 30)):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_tsv_cells_of_every_kind(tmp_path):
    red, blue = picture("red"), picture("blue", (20, 20))
    path = write_tsv(tmp_path / "a.tsv", ["index", "image", "question", "A", "B", "C", "D", "answer"], [
        ["0", red, "Two\nlines?", "None", "NA", "nan", "", "B"], ["1", "0", "Same picture?", "yes", "no", "", "", "A"],
        ["2", str([red, blue]), "Two <image 1> <image 2>?", "", "", "", "", "7"], ["3", blue, "Gap?", "x", "", "z", "", "C"]])
    a, b, c, e = data.load(path)
    assert a.choices == ["None", "NA", "nan"] and a.answer == "B" and a.question == "Two\nlines?"
    assert b.pictures()[0].getpixel((0, 0)) == (255, 0, 0) and b.choices == ["yes", "no"]
    assert [p.size for p in c.pictures()] == [(40, 30), (20, 20)] and c.choices is None and c.answer == "7"
    assert e.choices == ["x", "", "z"] and e.answer == "C" and "(B)" not in data.prompt(e) and "(C) z" in data.prompt(e)
    assert data.load(path)[3].id == "3" and [s.id for s in data.load(path, limit=2)] == ["0", "1"]


def test_mmstar_viRL_and_geometry_rows(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "p.png")
    path = write_tsv(tmp_path / "MMStar.tsv", ["index", "question", "image", "answer"],
                     [["5", "Which?\nOptions: A: a cat, B: two, or three dogs, C: None, D: red", picture(), "C"]])
    (s,) = data.load(path)
    assert s.question == "Which?" and s.choices == ["a cat", "two, or three dogs", "None", "red"] and s.answer == "C"
    virl = {"qid": "v-1", "question": "<image>\nHow long is AB?", "answer": "\\boxed{4}", "image": ["p.png"], "category": "geo"}
    geometry = {"problem": "<image>Find x.", "answer": "12", "images": ["p.png"]}
    a, b = data.load(rows(tmp_path, virl, geometry))
    assert a.id == "v-1" and is_correct("so \\boxed{4}", a) and a.meta["category"] == "geo" and len(a.pictures()) == 1
    assert b.question == "<image>Find x." and is_correct("x = 12", b)
    mmmu = {"id": "o", "question": "Q", "question_type": "open", "image_1": "p.png", "image_2": None,
            "answer": "['1/2', '0.5 m']"}
    (c,) = data.load(rows(tmp_path, mmmu))
    assert c.answer == ["1/2", "0.5 m"] and len(c.images) == 1 and is_correct("\\boxed{0.5}", c)


def test_unknown_layouts_and_broken_rows(tmp_path, capsys):
    with pytest.raises(InputError, match="columns foo, bar.* expected"):
        data.load(write_tsv(tmp_path / "x.tsv", ["foo", "bar"], [["1", "2"]]))
    with pytest.raises(InputError, match="fields foo"):
        data.load(rows(tmp_path, {"foo": 1}))
    good = picture()
    path = write_tsv(tmp_path / "b.tsv", ["index", "image", "question", "answer"], [
        ["0", good, "fine\nhere", "1"], ["1", good, "", "1"], ["2", "###" + good, "no base64", "1"], ["3", good],
        ["0", good, "again", "1"], ["5", good, "last", "2"]])
    with pytest.raises(InputError, match="line 4: question '1' is empty"):
        data.load(path)
    samples = data.load(path, strict=False)
    assert [s.id for s in samples] == ["0", "5"] and samples.broken == 4 and samples[-1].question == "last"
    said = capsys.readouterr().err
    assert all(words in said for words in ("'1' is empty", "'2' has an image that is not base64", "'3' has 2 cells",
                                           "'0' occurs twice", "4 broken rows"))
    assert len(data.load(rows(tmp_path, {"question": "Q"}, "{", [1]), strict=False)) == 1


def test_hostile_cells_are_data(tmp_path):
    """Nothing in a file is run, and deep nesting is an error in a sentence."""
    bomb = "[__import__('os').system('touch " + str(tmp_path / "ran") + "')]"
    for cell in (bomb, "[" * 50_000, "[1,", "['a'] * 9"):
        with pytest.raises(InputError, match="choices"):
            data.load(rows(tmp_path, {"question": "Q", "options": cell}))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("size", "picture_bytes"), [(20_000, 3_000), (200_000, 60)])
def test_of_a_tsv_only_the_places_of_its_rows_are_held(tmp_path, size, picture_bytes):
    cell = base64.b64encode(bytes(picture_bytes)).decode()
    path = tmp_path / "big.tsv"
    with open(path, "w") as file:
        file.write("index\timage\tquestion\tanswer\n")
        file.writelines(f"{i}\t{cell}\tHow many?\t1\n" for i in range(size))
    tracemalloc.start()
    samples = data.load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(samples) == size and samples[size - 1].id == str(size - 1)
    assert peak < 400 * size, peak / size                # bytes a row, whatever its picture weighs


def test_parquet_opens_or_says_what_to_install(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1")
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        with pytest.raises(InputError, match="install pyarrow"):
            data.load(path)
        return
    image = {"bytes": base64.b64decode(picture()), "path": None}
    parquet.write_table(pyarrow.table({"id": ["a"], "question": ["Q <image 1>"], "options": ["['x', 'y']"], "answer": ["B"],
                                       "image_1": [image], "image_2": [None]}), path)
    (s,) = data.load(path)
    assert s.choices == ["x", "y"] and s.answer == "B" and s.pictures()[0].size == (40, 30)
