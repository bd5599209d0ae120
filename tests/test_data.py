import base64
import csv
import io
import json
import re
import subprocess
import sys
from collections import Counter

import pytest
from conftest import ROOT
from PIL import Image

import data
from reward import format_reward
from tiny import questions
from utils import cli, formats
from utils.cli import InputError
from utils.judge import is_correct


def test_same_split_seed_and_index_give_the_same_question():
    for index in range(24):
        a, b = data.synthetic("train", 3, index), data.synthetic("train", 3, index)
        assert (a.question, a.answer, a.choices, a.meta) == (b.question, b.answer, b.choices, b.meta)
        assert a.images[0].tobytes() == b.images[0].tobytes()
    assert data.synthetic("train", 3, 0).images[0].tobytes() != data.synthetic("train", 4, 0).images[0].tobytes()


def test_splits_share_no_picture():
    seen = {split: {s.images[0].tobytes() + s.question.encode() for seed in range(3) for s in data.load(
        "synthetic", split, 400, seed)} for split in questions.SPLITS}
    assert min(map(len, seen.values())) > 1000
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["val"] and not seen["val"] & seen["test"]


def test_twelve_questions_hold_each_skill_and_level_once():
    pairs = Counter((s.meta["skill"], s.meta["level"]) for s in data.load("synthetic", "test", 12))
    assert set(pairs) == {(skill, level) for skill in questions.SKILLS for level in questions.LEVELS}


def test_worked_solutions_are_right_and_evidence_is_part_of_the_picture():
    side = questions.CELL * questions.GRID
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
    ({"id": "e4", "question": "Q", "choices": ["a", "b"], "answer": "Z"}, "e4"),
    ({"id": "e5", "question": "Q", "answer": {"value": 3}}, "e5")])
def test_a_bad_row_is_named_in_one_sentence(tmp_path, row, names):
    with pytest.raises(InputError, match=names) as error:
        data.load(rows(tmp_path, row))
    assert "\n" not in str(error.value)


def test_missing_unknown_empty_and_repeated(tmp_path):
    (tmp_path / "empty").mkdir()
    for source, words in (("nowhere.jsonl", "does not exist"), (tmp_path / "empty", "neither a data file"),
                          (rows(tmp_path), "no question"), (tmp_path, "no question")):
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


@pytest.mark.parametrize(("size", "picture_bytes"), [(20_000, 3_000), (60_000, 60)])
def test_of_a_tsv_only_the_places_of_its_rows_are_held(tmp_path, size, picture_bytes):
    cell = base64.b64encode(bytes(picture_bytes)).decode()
    path = tmp_path / "big.tsv"
    with open(path, "w") as file:
        file.write("index\timage\tquestion\tanswer\n")
        file.writelines(f"{i}\t{cell}\tHow many?\t1\n" for i in range(size))
    script = ("import resource, sys, data; peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
              "before = peak(); samples = data.load(sys.argv[1]); print(len(samples), samples[-1].id, peak() - before)")
    done = subprocess.run([sys.executable, "-c", script, path], cwd=ROOT, capture_output=True, text=True, check=True)
    count, last, kib = map(int, done.stdout.split())            # ru_maxrss: of a process of its own, in KiB
    assert (count, last) == (size, size - 1)
    assert kib * 1024 < 400 * size, kib * 1024 / size           # bytes a row, whatever its picture weighs


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


# ---- what real files hold

PNG = base64.b64encode((ROOT / "tiny" / "example.png").read_bytes()).decode()


def written(tmp_path, header, *lines):
    path = tmp_path / "q.tsv"
    path.write_bytes(("\t".join(header) + "\n" + "".join("\t".join(cells) + "\n" for cells in lines)).encode())
    return path


HEAD = "index\tquestion\timage\tanswer"
WHOLE = '{"id": 1, "question": "b", "answer": "1", "precision": "1.0"}'
ODD = {
    "a bare return": ("q.tsv", f"{HEAD}\n0\tbare\rreturn\t{PNG}\t1\n1\tb\t{PNG}\t2\n", ["0", "1"]),
    "an unhashable literal": ("q.tsv", f"{HEAD}\tchoices\n0\ta\t{PNG}\tA\t[{{[]:1}}]\n1\tb\t{PNG}\t2\t[]\n", ["1"]),
    "brackets": ("q.tsv", f"{HEAD}\tchoices\n0\ta\t{PNG}\tA\t{'[' * 10**5}\n1\tb\t{PNG}\t2\t[]\n", ["1"]),
    "brackets in JSON": ("q.jsonl", "[" * 10**5 + f"\n{WHOLE}\n", ["1"]),
    "no precision": ("q.jsonl", f'{{"id": 0, "question": "a", "answer": "1", "precision": "abc"}}\n{WHOLE}', ["1"]),
    "a negative precision": ("q.jsonl", f'{{"id": 0, "question": "a", "answer": "1", "precision": -1}}\n{WHOLE}', ["1"]),
    "a cycle": ("q.tsv", f"{HEAD}\n0\ta\t1\t1\n1\tb\t0\t1\n2\tc\t{PNG}\t1\n", ["2"]),
    "a chain": ("q.tsv", f"{HEAD}\n0\ta\t2\t1\n1\tb\t0\t1\n2\tc\t{PNG}\t1\n", ["0", "1", "2"]),
}


@pytest.mark.parametrize("name, content, kept", ODD.values(), ids=list(ODD))
def test_odd_rows_are_left_out_or_load_and_never_end_the_run(tmp_path, name, content, kept, capsys):
    (tmp_path / name).write_text(content, newline="")
    found = data.load(tmp_path / name, strict=False)
    assert [s.id for s in found] == kept and capsys.readouterr().err.count("left out: ") == found.broken
    assert all(s.pictures() for s in found) or "json" in name


@pytest.mark.parametrize("name, content, words", [
    ("q.json", b"[" * 10**5, "not JSON"), ("q.json", b'[{"question": "\xff"', "not JSON"),
    ("q.parquet", b"PAR1 no", "parquet")])
def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        data.load(tmp_path / name, strict=False)


@pytest.mark.parametrize("answer", ["B", "(B)", "B.", "b", r"\boxed{B}", r"$\boxed{(B)}$", r"\boxed{\text{B}}", "two",
                                    r"\boxed{two}"])
def test_a_gold_letter_in_any_dress(tmp_path, answer):
    assert data.load(rows(tmp_path, {"question": "a", "choices": ["one", "two"], "answer": answer}))[0].answer == "B"


@pytest.mark.parametrize("answer", ["AB", "C", r"\boxed{AB}", "(A) (B)", "three"])
def test_a_gold_answer_that_is_no_option_is_refused(tmp_path, answer):
    with pytest.raises(InputError, match="a letter from A to B"):
        data.load(rows(tmp_path, {"question": "a", "choices": ["one", "two"], "answer": answer}))


def test_zero_is_an_option_nan_is_none(tmp_path):
    found = data.load(rows(tmp_path, {"id": 1, "question": "a", "choices": [0, 1, 2], "answer": 0},
                           {"id": 2, "question": "a", "A": 0, "B": 1, "C": float("nan"), "answer": "A", "level": float("nan")},
                           {"id": 3, "question": "a", "choices": ["None", "NA", "nan"], "answer": "NA"},
                           {"id": 4, "question": "half \ud800", "answer": float("nan")}))
    assert [s.choices for s in found] == [["0", "1", "2"], ["0", "1"], ["None", "NA", "nan"], None]
    assert [s.answer for s in found] == ["A", "A", "B", None] and found[1].meta == {} and found[3].question == "half ?"


def test_a_tail_that_is_no_mere_list_of_the_options_stays(tmp_path):
    def question(text):
        return data.load(rows(tmp_path, {"question": text, "choices": ["one", "two"], "answer": "A"}))[0].question
    assert question("Which?\nOptions: A: one, B: two") == question("Which?\nChoices:\n(A) one\n(B) two") == "Which?"
    kept = "Which?\nOptions: A quick look at the figure is enough."
    assert question(kept) == kept


def test_a_broken_picture_is_named_by_its_line(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (sample,) = data.load(rows(tmp_path, {"id": "x", "image": "bad.png", "question": "a"}))
    with pytest.raises(InputError, match="line 1: question 'x'"):
        sample.pictures()


def test_a_checksum_follows_the_content(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "metrics.jsonl").write_text("1")
    before = cli.checksum(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("2")
    assert cli.checksum(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"weightz")
    assert cli.checksum(tmp_path) != before


def test_a_file_that_may_not_be_read_and_a_name_too_long(tmp_path, monkeypatch):
    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setitem(formats.READERS, ".jsonl", refused)
    for source, words in ((rows(tmp_path), "cannot be read"), ("a" * 5000 + ".jsonl", "does not exist")):
        with pytest.raises(InputError, match=words):
            data.load(source)


def test_an_image_cell_that_names_a_row_means_all_pictures_of_that_row(tmp_path, capsys):
    red, blue = picture("red"), picture("blue", (20, 20))
    cells = [str([red, blue]), "0", "1", "3", "5", "4", "['0', '1']", "8", "", "0"]
    path = write_tsv(tmp_path / "a.tsv", ["index", "image", "question"], [[i, cell, "Q"] for i, cell in enumerate(cells)] + [
        [f"c{i}", f"c{i + 1}", "Q"] for i in range(70)] + [["c70", red, "Q"]])
    samples = {s.id: s for s in data.load(path, strict=False)}
    for name in ("0", "1", "2", "9"):
        assert [p.size for p in samples[name].pictures()] == [(40, 30), (20, 20)]
    said = capsys.readouterr().err
    for name in ("3", "4", "5", "6", "7", "c0"):         # itself, a circle, a row twice, a row without picture, 70 rows on
        assert name not in samples and re.search(f"question '{name}' has an image that is the index of row", said)
    assert samples["8"].images == [] and len(samples["c10"].pictures()) == 1


@pytest.mark.parametrize("layout", ["jsonl", "tsv"])
def test_pictures_as_base64_data_uri_and_long_path(tmp_path, layout):
    deep = "/".join(["a-rather-long-name-of-a-folder"] * 3)
    (tmp_path / deep).mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(tmp_path / deep / "p.png")
    cells = [picture(), re.sub("(.{76})", r"\1\n", picture()), re.sub("(.{76})", "\\1\r\n", picture()) + "\r\n",
             f"data:image/png;base64,{picture()}", f"{deep}/p.png"]
    if layout == "tsv":
        path = write_tsv(tmp_path / "a.tsv", ["index", "image_path", "question"], [[i, c, "Q"] for i, c in enumerate(cells)])
    else:
        path = rows(tmp_path, *({"id": i, "image": c, "question": "Q"} for i, c in enumerate(cells)))
    assert [[p.size for p in s.pictures()] for s in data.load(path)] == [[(40, 30)]] * 5


def test_tsv_text_that_csv_trips_over(tmp_path, capsys):
    path = tmp_path / "a.tsv"
    path.write_bytes(b'\xef\xbb\xbf"index"\timage\tproblem\tanswer\r\n1\tp.png\tone\rtwo\t1\r\n2\tp.png\ta\0b\t2\r\n'
                     b'3\tp.png\t"quoted\r\nlines"\t3\r\n4\tp.png\tQ\t"opened\r\n5\tp.png\tQ\t5\r\n')
    samples = data.load(path, strict=False)
    assert [(s.id, s.question, s.answer) for s in samples] == [("1", "one two", "1"), ("2", "a\ufffdb", "2"),
                                                               ("3", "quoted\nlines", "3")]
    assert samples.broken == 1 and "line 6: row '4' opens a quote that never closes" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "text"), [("a.json", '[{"id": "x", "question": "caf\\u00e9 %s"}]'),
                                            ("a.jsonl", '{"id": "x", "question": "caf\\u00e9 %s"}\n')])
def test_json_with_a_byte_order_mark_and_bytes_that_are_no_utf8(tmp_path, name, text):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode().replace(b"%s", b"\xff"))
    (s,) = data.load(tmp_path / name)
    assert s.id == "x" and s.question == "caf\u00e9 \ufffd"


@pytest.mark.parametrize("cell", [{}, *({"image": cell} for cell in (None, "", " ", float("nan"), [], "[]", [None])),
                                  {"images": [float("nan")]}, {"image_1": None, "image_2": ""}])
def test_a_question_without_a_picture_has_no_images(tmp_path, cell):
    (s,) = data.load(rows(tmp_path, {"question": "Q", **cell}))
    assert s.images == [] and s.pictures() == []
