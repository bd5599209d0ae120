"""Rows as people have them: every layout that loads, and for every other one a sentence that names the
cure."""
import base64
import io
import json
import os
import random

import pytest
from conftest import ROOT
from PIL import Image

import data
from utils import formats, preflight
from utils.cli import InputError
from utils.judge import is_correct

CASES = ROOT.parent / "shared" / "cases" / "rows"
PLAIN = {"question": "How many?", "image": "a.png", "answer": "3"}


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (20, 10), "red").save(tmp_path / name)
    return tmp_path


def load(folder, *rows, **settings):
    path = folder / "q.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return list(data.load(path, **settings))


def user(*content):
    return [{"role": "user", "content": content[0] if len(content) == 1 else list(content)}]


def encoded():
    stream = io.BytesIO()
    Image.new("RGB", (20, 10), "red").save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


QUESTION_TEXT, PICTURE = {"type": "text", "text": "How many?"}, {"type": "image", "image": "a.png"}
SAME = {
    "problem and solution in tags": {"problem": "How many?", "image": "a.png", "solution": "<answer> 3 </answer>"},
    "a plain solution": {"problem": "How many?", "image": "a.png", "solution": "3"},
    "a worked solution": {"problem": "How many?", "image": "a.png", "solution": "One and two are three.\nSo \\boxed{3}"},
    "thinking and answer tags": {**PLAIN, "answer": "<think>1 + 2</think><answer>3</answer>"},
    "GSM8K's mark": {**PLAIN, "answer": "1 + 2 = 3\n#### 3"},
    "a list of one": {**PLAIN, "answer": ["3"]},
    "a list of one as text": {**PLAIN, "answer": '["3"]'},
    "a list of one number": {**PLAIN, "answer": [3]},
    "img": {"question": "How many?", "img": "a.png", "answer": "3"},
    "image_file": {"question": "How many?", "image_file": "a.png", "answer": "3"},
    "a dictionary": {**PLAIN, "image": PICTURE},
    "a URL of a file in a dictionary": {**PLAIN, "image": {"type": "image_url", "image_url": {"url": "a.png"}}},
    "base64 in a dictionary": {**PLAIN, "image": {"url": f"data:image/png;base64,{encoded()}"}},
    "backslashes": {**PLAIN, "image": ".\\a.png"},
    "messages with parts": {"messages": user(PICTURE, QUESTION_TEXT), "answer": "3"},
    "messages with an OpenAI picture": {"messages": user({"type": "image_url", "image_url": {"url": "a.png"}}, QUESTION_TEXT),
                                        "answer": "3"},
    "messages with a picture column": {"messages": user({"type": "image"}, QUESTION_TEXT), "images": ["a.png"], "answer": 3},
    "messages with the answer": {"messages": [*user("<image>How many?"), {"role": "assistant", "content": "3"}],
                                 "images": ["a.png"]},
    "ShareGPT": {"conversations": [{"from": "human", "value": "<image>\nHow many?"}, {"from": "gpt", "value": "3"}],
                 "image": "a.png"},
    "verl": {"prompt": user("<image>How many?"), "images": [{"path": "a.png"}], "data_source": "geo3k",
             "reward_model": {"style": "rule", "ground_truth": "3"}, "extra_info": {"index": 7, "split": "train"}},
    "a prompt column": {"prompt": "How many?", "image": "a.png", "answer": "3"},
    "an answer in words": {**PLAIN, "answer": "The answer is 3."},
    "an answer in bold": {**PLAIN, "answer": "**3**"},
    "an answer in quotes": {**PLAIN, "answer": '"3"'},
    "an answer with a heading": {**PLAIN, "answer": "### 3"},
    "an answer in JSON": {**PLAIN, "answer": '{"answer": "3"}'},
    "a box in prose": {**PLAIN, "answer": "So there are \\boxed{3} of them."},
    "a list in a list": {**PLAIN, "answer": [["3"]]},
    "a tuple as text": {**PLAIN, "answer": "('3',)"},
    "VQA's answers": {"question": "How many?", "image": "a.png", "answers": [{"answer": "3", "answer_id": i} for i in (1, 2)]},
    "names in capitals": {"Question": "How many?", "Image": "a.png", "Answer": 3},
    "Alpaca": {"instruction": "How many?", "input": "", "output": "3", "image": "a.png"},
    "query and response": {"query": "<image>How many?", "response": "3", "images": ["a.png"]},
    "image1": {"question": "How many?", "image1": "a.png", "answer": "3"},
    "messages as text": {"messages": json.dumps(user(PICTURE, QUESTION_TEXT)), "answer": "3"},
    "parts as text": {"messages": user(json.dumps([PICTURE, QUESTION_TEXT])), "answer": "3"},
    "input parts": {"messages": user({"type": "input_image", "image_url": "a.png"}, {"type": "input_text", "text": "How many?"}),
                    "answer": "3"},
    "Anthropic's picture": {"messages": user({"type": "image", "source": {"type": "base64", "data": encoded()}}, QUESTION_TEXT),
                            "answer": "3"},
    "verl's reward as text": {"prompt": user("<image>How many?"), "images": ["a.png"], "reward_model": '{"ground_truth": "3"}'},
    "a relative file URL": {**PLAIN, "image": "file://a.png"},
    "bytes as Python writes them": {**PLAIN, "image": f"b'{encoded()}'"},
    "URL-safe base64": {**PLAIN, "image": encoded().replace("+", "-").replace("/", "_").rstrip("=")},
    "a list in a list of pictures": {**PLAIN, "image": [["a.png"]]},
}


@pytest.mark.parametrize("row", SAME.values(), ids=list(SAME))
def test_common_layouts_hold_the_same_question(folder, row):
    (sample,) = load(folder, row, answered=True)
    words = sample.question.replace("<image>", "").strip()
    assert (words, sample.answer) == ("How many?", "3") and is_correct("\\boxed{3}", sample)
    assert [picture.size for picture in sample.pictures()] == [(20, 10)]


REFUSED = {
    "a URL": ({**PLAIN, "image": "https://host/a.png"}, "fetch it and give its path"),
    "a file URL": ({**PLAIN, "image": "file:///etc/a.png"}, "outside the data file's "
                                                            "folder.*--allow_outside"),
    "an absolute path": ({**PLAIN, "image": "/etc/hostname"}, "--allow_outside"),
    "a way up": ({**PLAIN, "image": "../a.png"}, "--allow_outside"),
    "another name": ({"question": "Q", "photo": "a.png", "answer": "3"}, "'photo' looks like one; rename it "
                                                                         "to image"),
    "no known field": ({"foo": 1}, "fields foo; a question .* expected"),
    "more tags": ({**PLAIN, "question": "<image><image>How many?"}, "names 2 pictures .* and has 1"),
    "fewer tags": ({**PLAIN, "question": "<image>How many?", "images": None, "image": ["a.png", "b.png"]},
                   "names 1 pictures .* and has 2"),
    "a tag without a picture": ({"question": "<img>How many?", "answer": "3"}, "names 1 pictures .* and has "
                                                                               "0"),
    "two questions": ({"messages": user("a") + user("b"), "answer": "3"}, "conversation with 2 questions"),
    "a video": ({"messages": user({"type": "video", "video": "a.mp4"}), "answer": "3"}, "type 'video'; text "
                                                                                        "and image"),
    "a tool's turn": ({"messages": [*user("a"), {"role": "tool", "content": "x"}], "answer": "3"}, "turn of "
                                                                                                   "'tool'"),
    "prose without an answer": ({"problem": "Q", "solution": "First look at the figure.\nThen think about "
                                                             "it."},
                                "names no answer"),
    "no answer": ({"question": "Q", "image": "a.png"}, "has no answer"),
    "a gold that nothing matches": ({**PLAIN, "answer": "\\boxed{}"}, "no response can match"),
}


@pytest.mark.parametrize("row, words", REFUSED.values(), ids=list(REFUSED))
def test_other_layouts_are_refused_with_the_cure(folder, row, words):
    with pytest.raises(InputError, match=words) as error:
        load(folder, row, answered=True)
    assert "\n" not in str(error.value)


def test_synonyms_are_any_of_them_and_numbers_are_one_list(folder):
    a, b = load(folder, {**PLAIN, "id": 1, "answer": ["3", "three"]}, {**PLAIN, "id": 2, "answer": [1, 2]}, answered=True)
    assert a.answer == ["3", "three"] and is_correct("\\boxed{three}", a) and is_correct("\\boxed{3}", a)
    assert is_correct("\\boxed{[1, 2]}", b) and not is_correct("\\boxed{1}", b)


@pytest.mark.parametrize("choices", [["A. 2", "B. other"], ["(A) 2", "(B) other"], {"A": "2", "B": "other"},
                                     {"text": ["2", "other"], "label": ["A", "B"]}, ["a) 2", "b) other"],
                                     ["A.2", "B.other"], {"a": "2", "b": "other"}, "A. 2\nB. other", "A: 2; B: other",
                                     [{"label": "A", "text": "2"}, {"label": "B", "text": "other"}]])
@pytest.mark.parametrize("answer", ["A", "A. 2", "2"])
def test_choices_are_shown_with_one_letter_each(folder, choices, answer):
    (sample,) = load(folder, {**PLAIN, "choices": choices, "answer": answer}, answered=True)
    assert sample.answer == "A" and data.ask(sample) == "How many?\n(A) 2\n(B) other"


def test_options_in_columns_and_an_index_from_zero(folder):
    for names in (("option_a", "option_b"), ("choice_A", "choice_B"), ("option1", "option2"), ("A", "B")):
        row = {"question": "Q", "image": "a.png", **dict(zip(names, ("2", "other")))}
        (sample,) = load(folder, row | {"answer": "B"}, answered=True)
        assert (sample.choices, sample.answer) == (["2", "other"], "B")
        assert load(folder, row | {"answer_index": 1}, answered=True)[0].answer == "B"
    with pytest.raises(InputError, match="put an index that counts from 0 into answer_index"):
        load(folder, row | {"answer": 1}, answered=True)
    with pytest.raises(InputError, match=r"has no answer.* \(it has question, image, A, B, verdict\)"):
        load(folder, row | {"verdict": "B"}, answered=True)


@pytest.mark.parametrize("choices", [["1.5", "2.5"], ["A.B. Smith", "B.C. Lee"], ["A - x", "C - y"]])
def test_options_that_carry_no_letters_of_their_own_stay(folder, choices):
    assert load(folder, {**PLAIN, "choices": choices, "answer": "B"})[0].choices == choices


def test_answers_that_are_sentences_are_counted(folder, capsys):
    prose = "There are three red circles and all of them lie in the top row, I believe."
    load(folder, {**PLAIN, "id": 1, "answer": prose}, {**PLAIN, "id": 2}, answered=True)
    assert "answers of 1 questions are sentences of more than 12 words" in capsys.readouterr().err


def test_options_that_merely_begin_with_a_capital_stay(folder):
    (sample,) = load(folder, {**PLAIN, "choices": ["A cat", "B flat"], "answer": "A"})
    assert sample.choices == ["A cat", "B flat"]


@pytest.mark.parametrize("tag", ["<image_1>", "<image1>", "<image 1>", "<|image_1|>", "<IMG>", "<img>", "<image>",
                                 "[IMAGE]", "<ImageHere>", "<image></image>", "<img>a.png</img>", "![the board](a.png)",
                                 '<img src="a.png"/>', "<|image_pad|>", "<start_of_image>", "<image_01>", "<picture>"])
def test_every_spelling_of_a_pictures_place_is_one(folder, tag):
    (sample,) = load(folder, {**PLAIN, "question": f"See {tag}: how many?"})
    assert sample.question in ("See <image>: how many?", "See <image 1>: how many?")


def test_a_composite_picture_takes_every_numbered_tag(folder):
    (sample,) = load(folder, {**PLAIN, "question": "Left or right?\n<image1>\n<image2>"})
    assert sample.question == "Left or right?\n<image 1>\n(image 2)"


def test_a_system_prompt_is_kept_and_said_to_be_unused(folder, capsys):
    (sample,) = load(folder, {"messages": [{"role": "system", "content": "Be brief."}, *user("How many?")], "answer": "3"})
    assert sample.meta["system"] == "Be brief." and "system prompts of 1 rows are not used" in capsys.readouterr().err


def test_all_faults_are_named_in_one_run(folder, capsys):
    with pytest.raises(InputError, match="3 broken rows.* the first: .*line 1"):
        load(folder, {"question": ""}, {**PLAIN, "id": "ok"}, {"question": "Q", "choices": ["a"]}, {"foo": 1})
    printed = capsys.readouterr().err
    assert all(f"line {line}" in printed for line in (1, 3, 4)) and "line 2" not in printed


# ---- Folders

def test_a_folder_with_metadata(folder):
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "question": "How many?", "answer": "3"}))
    (sample,) = data.load(folder, answered=True)
    assert sample.pictures()[0].size == (20, 10)
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text("file_name,question,answer\na.png,How many?,3\n")
    assert data.load(folder)[0].answer == "3"


def test_an_imagefolder_asks_for_the_class(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (20, 10)).save(tmp_path / name / "1.png")
    samples = list(data.load(tmp_path, answered=True))
    assert [(s.answer, s.choices) for s in samples] == [("A", ["cat", "dog"]), ("B", ["cat", "dog"])]
    assert all(s.pictures() for s in samples)


def test_a_folder_with_several_files_names_them(folder):
    for name in ("train.jsonl", "test.jsonl"):
        (folder / name).write_text("{}")
    with pytest.raises(InputError, match="2 data files .test.jsonl, train.jsonl."):
        data.load(folder)


# ---- Outside, and no regular file

def test_pictures_outside_the_folder_need_permission(folder):
    inner = folder / "inner"
    inner.mkdir()
    os.symlink(folder / "a.png", inner / "link.png")
    for image in ("../a.png", str(folder / "a.png"), "link.png"):
        with pytest.raises(InputError, match="--allow_outside"):
            load(inner, {**PLAIN, "image": image})
        (sample,) = load(inner, {**PLAIN, "image": image}, allow_outside=True)
        assert sample.pictures()[0].size == (20, 10)
    assert load(folder, {**PLAIN, "image": str(folder / "a.png")})       # absolute, and inside


def test_a_fifo_and_a_device_are_refused_and_never_waited_for(folder):
    os.mkfifo(folder / "pipe.png")
    for image in ("pipe.png", "/dev/zero", "."):
        (sample,) = load(folder, {**PLAIN, "image": image}, allow_outside=True)
        with pytest.raises(InputError, match="no regular file"):
            sample.pictures()


def test_a_long_name_without_a_suffix_is_a_path(folder):
    name = "a" * 100
    (folder / "a.png").rename(folder / name)
    (sample,) = load(folder, {**PLAIN, "image": name})
    assert sample.pictures()[0].size == (20, 10)


# ---- Hostile files

VALUES = [None, "", "x", "a.png", 3, -1.5, 10**400, float("nan"), float("inf"), True, [], [[]], {}, {"a": 1}, ["a", 1], "[1,",
          "['a']", "\ud800", "<image>", "A", {"bytes": 3}, {"image": {"image": {"image": {}}}}, "data:,", "(A) x", 10**5000,
          [{"role": "user"}], [{"role": [], "content": []}], [{"from": "human", "value": {"type": []}}], "image_9" * 9]
KEYS = ["id", "index", "qid", "question", "problem", "prompt", "messages", "conversations", "image", "images", "image_1",
        "image_99999999999", "image_path", "answer", "solution", "choices", "options", "A", "B", "C", "meta", "metadata",
        "unit",
        "reward_model", "extra_info", "precision", "question_type", "answer_type", "pid", "answer_option", "source", "foo"]


def test_fuzzed_rows_raise_input_errors_only(folder):
    rng, path = random.Random(0), folder / "q.jsonl"
    for _ in range(3000):
        row = {rng.choice(KEYS): rng.choice(VALUES) for _ in range(rng.randrange(1, 7))}
        rows = formats.Rows([("q.jsonl, line 1", row if rng.random() < 0.9 else rng.choice(VALUES))])
        try:
            samples = formats.File(
                path, rows, None, True, lambda fields: preflight.training_fault(data.Sample(**fields), data.golds))
        except InputError:
            continue
        assert isinstance(samples[0]["question"], str) and samples[0]["question"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".tsv", ".csv"])
def test_fuzzed_files_raise_input_errors_only(folder, suffix):
    rng, path, loaded, refused = random.Random(1), folder / f"f{suffix}", 0, 0
    separator = {".tsv": "\t", ".csv": ","}.get(suffix)
    for _ in range(300):
        if separator:
            names = ["question", "image", *rng.sample(KEYS, 3)]
            lines = [separator.join(names)] + [separator.join(json.dumps(str(rng.choice(VALUES[:-6])), ensure_ascii=False)
                                                              for _ in names) for _ in range(3)]
            content = "\n".join(lines).encode("utf-8", "replace")
        else:
            rows = [{rng.choice(KEYS): rng.choice(VALUES[:8] + VALUES[9:-6]) for _ in range(4)} for _ in range(3)]
            content = (json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows))).encode()
        content = bytearray(content)
        for _ in range(rng.randrange(4)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content)
        try:
            samples = list(data.load(path, strict=False))
        except InputError:
            refused += 1
        else:
            loaded += 1
            assert samples and all(isinstance(s.question, str) and s.question for s in samples)
    assert loaded and refused           # both happen: the fuzz is neither harmless nor all noise


# ---- The cases of the issue

@pytest.mark.skipif(not CASES.is_dir(), reason=f"the cases are not here ({CASES})")
@pytest.mark.parametrize("name, words", [
    ("gold_in_tags", None), ("gold_one_element_list", None), ("solution_column", None), ("img_column", None),
    ("image_dict_image", None), ("choices_with_letters", None), ("eight_questions_a_picture", None),
    ("more_tags_than_pictures", "names 2 pictures .* has 1"), ("file_url", "--allow_outside")])
def test_cases_of_rows_load_or_name_the_cure(name, words, capsys):
    if words:
        with pytest.raises(InputError, match=words):
            data.load(CASES / f"{name}.jsonl", answered=True)
        return
    for sample in data.load(CASES / f"{name}.jsonl", answered=True):
        assert sample.pictures()[0].size == (112, 112)
        gold = sample.answer
        assert is_correct(f"\\boxed{{{gold}}}", sample) and (sample.choices is None or sample.choices == ["2", "other"]
                                                             or sample.choices[1] == "other")
