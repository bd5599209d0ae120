"""One row of a file, in any layout that people publish, -> the fields of a `data.Sample`.

Plain columns, MathVista, MathVision, MMMU and MMStar, problem and solution, messages with parts, ShareGPT
conversations, verl's prompt and reward_model. What a row holds beyond the known names is named where
something is missing.
"""
import ast
import base64
import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from utils.cli import InputError
from utils.judge import extract_answer

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# The names under which the known layouts keep a thing, in the order in which they are looked for.
ID = ("id", "qid", "pid", "index", "question_id", "uid")
QUESTION = ("question", "problem", "query", "prompt", "instruction")
TURNS = ("messages", "conversations", "conversation", "prompt")
IMAGE = ("decoded_image", "image", "images", "image_path", "img", "image_file", "img_path", "image_paths",
         "image_url",
         "picture", "file_name")
ANSWER = ("answer_option", "answer", "ground_truth", "gold", "gt_answer", "correct_answer", "solution",
          "label", "target")
LAYOUT = (f"a question ({', '.join(QUESTION)}) or {', '.join(TURNS[:2])}, pictures "
          f"({', '.join(IMAGE[1:5])}, image_1, .. "
          f"or parts of messages), an answer ({', '.join(ANSWER[1:4])} or solution), and for multiple "
          f"choice choices, "
          "options or columns A, B, ..")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")


def to_sample(row, where, path, cells, allow_outside=False):
    """One row of any known layout -> the fields of a `data.Sample` (dict).

    where: its place, for messages. path: the file. cells: function(row, where) -> the row's image cells
    (`Rows.cells`). allow_outside: a picture may lie outside the file's folder. Raises InputError that names
    place and id.
    """
    if not isinstance(row, dict):
        raise InputError(f"{where}: a JSON object is expected, not {type(row).__name__}")
    if not any(key in row for key in (*QUESTION, *TURNS)):
        raise InputError(f"{where} has the fields {', '.join(map(_text, row))[:200]}; {LAYOUT} are expected")
    row = {key: value for key, value in row.items() if not is_absent(value)}
    extra = row["extra_info"] if isinstance(row.get("extra_info"), dict) else {}                    # verl
    id = next((_text(fields[key]) for fields in (row, extra) for key in ID if not is_absent(fields.get(key))),
              where.split()[-1])
    here = f"{where}: question {id!r}"
    row, reply, system = _flat(row, here)
    question = next((row[key] for key in QUESTION if key in row), None)
    if not isinstance(question, str):
        raise InputError(f"{here} is empty or no text; give it one or remove the row")
    question = _with_plain_tags(_HINT.sub("", _text(question).strip()))
    if "unit" in row and "(Unit:" not in question:  # MathVista's own files keep it beside the question
        question += f" (Unit: {_text(row['unit'])})"
    question, choices = _choices(row, question, here)
    answer = _gold(row, extra, reply, choices, here)
    images = [_picture(cell, path.parent, here, allow_outside) for cell in cells(row, here)]
    if not images and (column := next((key for key in row if key not in IMAGE
                                       and _looks_like_a_picture(row[key])), None)):
        raise InputError(f"{here} has no picture under a known name, but the field {_text(column)!r} looks "
                         f"like one; rename "
                         f"it to image (known: {', '.join(IMAGE[1:])}, image_1, ..)")
    if len(images) == 1:
        question = _one_composite(question)
    _check_tags("\n".join([question, *(choices or [])]), len(images), here)
    return {"id": id, "images": images, "question": question, "answer": answer, "choices": choices,
            "source": _text(row.get("source", row.get("data_source", path.stem))),
            "meta": _meta(row, here) | ({"system": system} if system else {}), "where": where}


# ------------------------------------------------------------------------------------------------------------
# ----------
# Cells

def listed(value):
    """A list, or one written as text ("['a', 'b']"), parsed as a literal and never evaluated -> list, else
    None."""
    if isinstance(value, str) and value.strip().startswith("["):
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return None
    return list(value) if isinstance(value, (list, tuple)) else None


def is_absent(value):
    """Whether a cell holds nothing: blank text, None, [], or the NaN that pandas and parquet put there. 0 and
    "None" are something."""
    return value is None or value == [] or value != value or isinstance(value, str) and not value.strip()


def _text(value):
    """A cell as text. Half a character ("\\ud800"), which JSON can hold and no tokenizer takes, becomes
    "?"."""
    return str(value).encode("utf-8", "replace").decode()


# ------------------------------------------------------------------------------------------------------------
# ----------
# Conversations

def _flat(row, here):
    """A row with a conversation -> (row with question and image, the assistant's last words or None, system
    prompt). Other rows as they are."""
    turns = next((row[key] for key in TURNS if isinstance(row.get(key), list)), None)
    if turns is None:
        return row, None, row.get("system", row.get("system_prompt"))
    said = {"user": [], "assistant": [], "system": [_text(row["system"])] if "system" in row else []}
    pictures = []
    for turn in turns:
        turn = turn if isinstance(turn, dict) else {}
        role = {"human": "user", "gpt": "assistant"}.get(name := turn.get("role", turn.get("from")), name)
        content = turn.get("content", turn.get("value"))
        if not isinstance(role, str) or role not in said or is_absent(content):
            raise InputError(f"{here} has a turn of {_text(name)[:20]!r} that cannot be read; role and "
                             f"content of user, "
                             "assistant or system (or from and value of human or gpt) are expected")
        text, cells = _content(content, here)
        said[role].append(text)
        pictures += cells if role == "user" else []
    if len(said["user"]) != 1:
        raise InputError(f"{here} is a conversation with {len(said['user'])} questions; give each one a row "
                         f"of its own")
    plain = {key: value for key, value in row.items() if key not in TURNS}
    known = {"question": said["user"][0]} | ({"image": pictures} if pictures else {})
    return plain | known, (said["assistant"] or [None])[-1], "\n".join(said["system"])


def _content(content, here):
    """The content of one turn, text or a list of parts -> (text with a tag at each picture, image cells)."""
    texts, cells = [], []
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            texts.append(_text(part))
            continue
        kind = part.get("type",
                        next((name for name in ("text", "image", "image_url") if name in part), None)) \
            if isinstance(part, dict) else type(part).__name__
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(_text(part["text"]))
        elif kind in ("image", "image_url", "input_image"):
            texts.append("<image>")
            value = {key: value for key, value in part.items() if key != "type" and not is_absent(value)}
            cells += [value] if value else []
        else:
            raise InputError(f"{here} has a part of type {_text(kind)[:20]!r}; text and image are read")
    return re.sub(r"<image>\n(?=<image>)", "<image>", "\n".join(texts)), cells


# ------------------------------------------------------------------------------------------------------------
# ----------
# Question and choices

_HINT = re.compile(r"^Hint: .*?\nQuestion: ",
                   re.DOTALL)  # VLMEvalKit and MathVista wrap the question in instructions
_OPTIONS = re.compile(r"\n(?:Options?|Choices): *\n?(?=\(?A)", re.IGNORECASE)
_TAG = re.compile(r"<\|vision_start\|><\|image_pad\|><\|vision_end\|>|<\|?(?:image|img)[ _]?(\d{0,3})\|?>",
                  re.IGNORECASE)


def _with_plain_tags(text):
    """Every spelling of a picture's place (<image_1>, <img>, <|image_1|>) as `<image>` or `<image 1>`."""
    return _TAG.sub(lambda match: f"<image {match[1]}>" if match[1] else "<image>", text)


def _one_composite(text):
    """Numbered tags of a row with one picture: MathVision draws them into one. `<image 2>` becomes words."""
    return re.sub(r"<image ([2-9]|\d\d+)>", r"(image \1)", text)


def _check_tags(text, count, here):
    """Refuse a prompt that names other pictures than the row has."""
    numbers = [int(number) for number in re.findall(r"<image (\d+)>", text)]
    unnumbered = text.count("<image>")
    if unnumbered and not numbers and unnumbered != count or max(numbers,
                                                                 default=0) > count or unnumbered > count:
        raise InputError(f"{here} names {max([unnumbered, *numbers])} pictures in its text (<image>) and "
                         f"has {count}; give "
                         "one tag for each picture, or none")


def _options_in(question):
    """A question whose last lines list its options -> (question, option texts), else (question, None)."""
    stem, *tail = _OPTIONS.split(question, maxsplit=1)
    pieces = re.split(r"(?:^|,\s*|\n\s*)\(?([A-H])[:.)]\s*", tail[0]) if tail else []
    if not pieces[1::2] or pieces[1::2] != list(LETTERS[:len(pieces) // 2]):
        return question, None
    return stem.strip(), [text.strip() for text in pieces[2::2]]


def _choices(row, question, here):
    """Options as a list, a list as text, {letter: text}, columns A, B, .., or the question's own last lines
    (MMStar) -> (question without them, list of texts or None)."""
    value = row.get("choices", row.get("options", []))
    stem, written = _options_in(question)
    if isinstance(value, dict) and {"text", "label"} <= {*value}:                   # ARC
        value = value["text"]
    elif isinstance(value, dict) and [*value] == list(LETTERS[:len(value)]):
        value = [*value.values()]
    if value not in ([], "[]"):
        options = listed(value)
        if options is None or not 2 <= len(options) <= len(LETTERS):
            raise InputError(f"{here} has choices {_text(value)[:60]!r}; a list of 2 to 26 texts is expected")
        choices = ["" if is_absent(option) else _text(option) for option in options]
    else:
        columns = [_text(row.get(letter, "")) for letter in LETTERS]
        used = [index for index, text in enumerate(columns) if text]
        choices = columns[:used[-1] + 1] if len(used) > 1 else written
    choices = choices and [_with_plain_tags(choice) for choice in choices]
    if choices and all(_lettered(text, letter) for text,
                       letter in zip(choices, LETTERS)):  # "A. two", "B. three"
        choices = [_lettered(text, letter)[1].strip() for text, letter in zip(choices, LETTERS)]
    if written and written == [choice.strip() for choice in choices]:           # the prompt lists them, once
        question = stem
    return question, choices


def _lettered(text, letter):
    """The match of an option that begins with its own letter; group 1 is the rest."""
    return re.match(rf"\s*\(?{letter}(?:[.:)]|\)\.)\s+(\S.*)", text, re.DOTALL)


# ------------------------------------------------------------------------------------------------------------
# ----------
# Answers

def _gold(row, extra, reply, choices, here):
    """The gold answer: text, a LETTER of the choices, a list where any of several is right, or None.

    Wrappings that no response repeats are taken off: <answer> tags, "#### 3", a list of one. A worked
    solution or the assistant's turn is read as a response is.
    """
    reward = row.get("reward_model")                                                                # verl
    sources = [(key, row[key]) for key in ANSWER if key in row]
    if isinstance(reward, dict) and "ground_truth" in reward:
        sources.append(("ground_truth", reward["ground_truth"]))
    sources += [("answer", extra["answer"])] if not is_absent(extra.get("answer")) else []
    sources += [("reply", reply)] if reply else []
    if not sources:
        return None
    key, value = sources[0]
    if isinstance(value, dict):
        raise InputError(f"{here} has an answer of named parts ({', '.join(map(_text, value))[:60]}); text "
                         f"or a number is "
                         "expected")
    texts = listed(value)
    if texts is not None and all(isinstance(text, str) for text in texts) or \
            texts is not None and (len(texts) == 1 or row.get("question_type") == "open"):
        golds = [_text(text).strip() for text in texts if not is_absent(text)]
    else:
        golds = [_text(value).strip()]
    golds = [_unwrapped(gold, key in ("solution", "reply"), choices, here) for gold in golds]
    if choices:
        # MathVista's own files give the option's text, even where it looks like a letter
        golds = [_letter_of(gold, choices, "pid" in row and "answer_option" not in row, here)
                 for gold in golds]
    return golds[0] if len(golds) == 1 else golds


def _unwrapped(text, worked, choices, here):
    """What is inside <answer> tags or after ####. worked: a whole solution, whose end names the answer."""
    if tags := re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL | re.IGNORECASE):
        return tags[-1].strip()
    if "####" in text:
        return text.rpartition("####")[2].strip()
    if not worked or len(text.split()) < 4 and "\n" not in text and "\\boxed" not in text:
        return text
    answer = extract_answer(text, choices)
    if answer is None or len(answer.split()) > 3:
        raise InputError(f"{here} has a worked solution whose end names no answer; put the answer into a "
                         f"field 'answer'")
    return answer


def _letter_of(answer, choices, by_text, here):
    """A gold answer -> the option's letter, by letter in any form ("B", "(B)", "\\boxed{B}", "B. two") or by
    text."""
    letters = LETTERS[:len(choices)]
    if len(answer) == 1 and answer in letters and not by_text:
        return answer
    inner = re.sub(r"^\\boxed\{(.*)\}$", r"\1", answer.strip("$ "), flags=re.DOTALL).strip("$ ")
    for text in (answer, inner):
        if text in choices:
            return letters[choices.index(text)]
        for letter, choice in zip(letters, choices):
            if (match := _lettered(text, letter)) and match[1].strip() == choice.strip():
                return letter
    bare = re.sub(r"\\text|[\s{}()\[\].:]", "", inner).upper()
    if len(bare) == 1 and bare in letters:
        return bare
    raise InputError(f"{here} has the answer {answer[:60]!r}; a letter from A to {letters[-1]} or the text "
                     f"of a choice is "
                     "expected")


# ------------------------------------------------------------------------------------------------------------
# ----------
# Pictures

def image_cells(row):
    """Where a row keeps its pictures: one cell, a list, a list as text, or image_1, image_2, .. -> list of
    cells."""
    cells = next((row[key] for key in IMAGE if not is_absent(row.get(key))), None)
    if cells is None:
        numbered = [key for key in row if re.fullmatch(r"image_[0-9]{1,3}", str(key))]
        cells = [row[key] for key in sorted(numbered, key=lambda key: int(key[6:]))]
    pictures = listed(cells)
    return [cell for cell in ([cells] if pictures is None else pictures) if not is_absent(cell)]


def _looks_like_a_picture(value):
    value = value[0] if isinstance(value, list) and value else value
    if isinstance(value, dict):
        return "bytes" in value and "path" in value
    return isinstance(value, str) and (value.startswith("data:image/")
                                       or value.lower().strip().endswith(SUFFIXES)
                                       and "\n" not in value.strip() and len(value) < 1000)


def _picture(cell, folder, where, allow_outside):
    """An image cell -> a path, or the bytes of a picture. Raises InputError."""
    shown = _text(cell)[:60]
    for _ in range(3):  # {"bytes": .., "path": ..}, {"type": "image_url", "image_url": {"url": ..}}
        if isinstance(cell, dict):
            names = ("bytes", "path", "image", "image_url", "url", "file_name")
            cell = next((cell[key] for key in names if not is_absent(cell.get(key))), None)
    if isinstance(cell, bytes) and cell:
        return cell
    if not isinstance(cell, str) or is_absent(cell):
        raise InputError(f"{where} has the image {shown!r}; a path, a list of paths, or picture data is "
                         f"expected")
    # base64 has no dot, which most paths have, and 64 characters of it hold no picture
    if not cell.startswith("data:") and ("." in cell or len(cell) <= 64 or os.path.isfile(folder / cell)):
        return _path(cell.strip(), folder, where, allow_outside)
    try:
        text = cell.partition(",")[2] if cell.startswith("data:") else cell
        return base64.b64decode("".join(unquote(text).split()), validate=True)  # mail wraps it in lines
    except ValueError as error:
        raise InputError(f"{where} has an image that is not base64 ({error}), nor a file; repair or remove "
                         f"the row") from error


def _path(text, folder, where, allow_outside):
    """The path of a picture, from a path relative to the data file's folder, with / or \\, or a file://
    URL."""
    if text.startswith("file:"):
        text = unquote(urlsplit(text).path)
    elif re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text):
        raise InputError(f"{where} has the image {text[:60]!r}; nothing is downloaded, so fetch it and give "
                         f"its path")
    path = folder / text
    if "\\" in text and not os.path.exists(path):
        path = folder / text.replace("\\", "/")
    if not allow_outside and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise InputError(f"{where} has the image {text[:100]!r}, which lies outside the data file's folder; "
                         f"move it there, or "
                         "allow it with --allow_outside")
    return path


def _meta(row, here):
    """What else the row knows (dict)."""
    meta = dict(row["meta"]) if isinstance(row.get("meta"), dict) else {}
    fields = row | row["metadata"] if isinstance(row.get("metadata"), dict) else row             # MathVista
    meta |= {key: fields[key] for key in ("answer_type", "precision", "category", "level", "subject", "split",
                                          "task", "l2-category", "l2_category", "question_type", "image_id")
             if key in fields}
    try:
        sound = 0 <= float(meta.get("precision") or 0) <= 15
    except (OverflowError, TypeError, ValueError):
        sound = False
    if not sound:
        raise InputError(f"{here} has the precision {_text(meta['precision'])[:20]!r}; a number of decimals "
                         f"is expected")
    return meta
