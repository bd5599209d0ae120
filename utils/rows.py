"""One row of a file, in any layout that people publish, -> the fields of a `data.Sample`.

Plain columns, MathVista, MathVision, MMMU and MMStar, problem and solution, messages with parts, ShareGPT
conversations, verl's prompt and reward_model. What a row holds beyond the known names is named where
something is missing.
"""
import ast
import base64
import json
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
          "label", "target", "answers", "multiple_choice_answer", "response", "output")
INDEX = ("answer_index", "answer_idx", "correct_choice_idx")     # of a choice, from 0
WORKED = ("solution", "response", "output", "reply")            # whole texts, whose end names the answer
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
    row = _with_known_names(row)
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
    if isinstance(value, str) and re.match(r"\s*(\[|\(['\"])", value):
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return None
    return list(value) if isinstance(value, (list, tuple)) else None


def parsed(value):
    """What a cell of JSON text holds, a list or an object; any other cell as it is."""
    if isinstance(value, str) and re.match(r"\s*(\{|\[\s*\{)", value):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            pass
    return value


def _with_known_names(row):
    """A row whose names in other cases ("Question", "Image") are those known here."""
    known = {*QUESTION, *TURNS, *IMAGE, *ANSWER, "choices", "options"}
    return {key.lower() if isinstance(key, str) and key.lower() in known and key.lower() not in row
            else key: value for key, value in row.items()}


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
    turns = next((turns for key in TURNS if isinstance(turns := parsed(row.get(key)), list)), None)
    if turns is None:
        if not is_absent(words := row.get("input")) and "instruction" in row:             # Alpaca
            row = row | {"instruction": f"{_text(row['instruction'])}\n{_text(words)}"}
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


PART_IMAGES = ("image", "image_url", "input_image", "image_path", "image_file", "img")


def _content(content, here):
    """The content of one turn, text or a list of parts -> (text with a tag at each picture, image cells)."""
    texts, cells = [], []
    content = parsed(content)
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            texts.append(_text(part))
            continue
        kind = part.get("type",
                        next((name for name in ("text", *PART_IMAGES) if name in part), None)) \
            if isinstance(part, dict) else type(part).__name__
        words = [part[name] for name in ("text", "value", "content") if isinstance(part, dict)
                 and isinstance(part.get(name), str)]
        if kind in ("text", "input_text", "output_text") and words:
            texts.append(_text(words[0]))
        elif kind in PART_IMAGES:
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
_FILE = r"[^<>\n]{1,300}?\.(?:" + "|".join(suffix[1:] for suffix in SUFFIXES) + ")"
_TAG = re.compile(
    rf"<img>(?:{_FILE})?</img>|<img[^<>]*\bsrc=[^<>]*/?>|!\[[^\]\n]{{0,300}}\]\({_FILE}\)"     # with a name
    r"|<image></image>|<\|vision_start\|>(?:<\|image_pad\|>)+<\|vision_end\|>|(?:<\|image_pad\|>)+"
    r"|<\|?start_of_image\|?>|<\|?image[ _]?(?:here|token|placeholder|soft_token)\|?>"
    r"|<\|?(?:image|img|picture)[ _-]?#?(\d{0,3})\|?>|\[(?:image|img)[ _-]?(\d{0,3})\]", re.IGNORECASE)


def _with_plain_tags(text):
    """Every spelling of a picture's place (<image_1>, <img>, <|image_1|>, [IMAGE], <img>a.png</img>,
    ![](a.png)) as `<image>` or `<image 1>`."""
    def plain(match):
        number = (match[1] or match[2] or "").lstrip("0")
        return f"<image {number}>" if number else "<image>"
    return _TAG.sub(plain, text)


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
    pieces = re.split(r"(?:^|[,;]\s*|\n\s*)\(?([A-H])[:.)]\s*", tail[0]) if tail else []
    if not pieces[1::2] or pieces[1::2] != list(LETTERS[:len(pieces) // 2]):
        return question, None
    return stem.strip(), [text.strip() for text in pieces[2::2]]


def _choices(row, question, here):
    """Options as a list, a list as text, {letter: text}, columns A, B, .., or the question's own last lines
    (MMStar) -> (question without them, list of texts or None)."""
    value = row.get("choices", row.get("options", []))
    stem, written = _options_in(question)
    value = parsed(value)
    if isinstance(value, dict) and {"text", "label"} <= {*value}:                   # ARC
        value = value["text"]
    elif isinstance(value, dict) and _alphabet([*map(_text, value)]):               # {"A": "two", ..}
        value = [*value.values()]
    elif isinstance(value, str) and not is_absent(value):                           # "A. two\nB. three"
        value = _options_in(f"\nOptions:\n{value.strip()}")[1] or value
    if value not in ([], "[]"):
        options = listed(value)
        if options and all(isinstance(option, dict) and {*option} & {"text", "value"} for option in options):
            options = [option.get("text", option.get("value")) for option in options]
        if options is None or not 2 <= len(options) <= len(LETTERS):
            raise InputError(f"{here} has choices {_text(value)[:60]!r}; a list of 2 to 26 texts is expected")
        choices = ["" if is_absent(option) else _text(option) for option in options]
    else:
        by_letter = {match[1].upper(): row[key] for key in row
                     if (match := re.fullmatch(r"(?:option|choice|opt)[ _]?([A-Za-z])", _text(key)))}
        by_letter |= {LETTERS[int(match[1]) - 1]: row[key] for key in row
                      if (match := re.fullmatch(r"(?:option|choice|opt)[ _]?([1-9])", _text(key)))}
        columns = [_text(row.get(letter, by_letter.get(letter, ""))) for letter in LETTERS]
        used = [index for index, text in enumerate(columns) if text]
        choices = columns[:used[-1] + 1] if len(used) > 1 else written
    choices = choices and _without_letters([_with_plain_tags(choice) for choice in choices])
    if written and written == [choice.strip() for choice in choices]:           # the prompt lists them, once
        question = stem
    return question, choices


def _alphabet(names):
    """Which of A B C, a b c, 1 2 3, 0 1 2 these names (list of str) are -> str, or None."""
    alphabets = (LETTERS, LETTERS.lower(), "123456789", "0123456789")
    return next((alphabet for alphabet in alphabets if names and names == list(alphabet[:len(names)])), None)


def _without_letters(choices):
    """Options without the letters or numbers that they carry in order: "A. two", "(b) three", "3) four"."""
    label = re.compile(r"\s*(\(?)([A-Za-z1-9])(?:[.:、]|\)\.?:?)(\s*)(?![A-Z]\.)(\S.*)", re.DOTALL)
    matches = [label.match(text) for text in choices]
    alphabet = _alphabet([match[2] for match in matches]) if all(matches) else None
    if alphabet is None or alphabet.startswith("1") and not all(match[3] for match in matches):   # 1.5, 2.5
        return choices
    return [match[4].strip() for match in matches]


def _lettered(text, letter):
    """The match of an option that begins with its own letter; group 1 is the rest."""
    return re.match(rf"\s*\(?{letter}(?:[.:)、]|\)\.)\s*(\S.*)", text, re.DOTALL | re.IGNORECASE)


# ------------------------------------------------------------------------------------------------------------
# ----------
# Answers

def _gold(row, extra, reply, choices, here):
    """The gold answer: text, a LETTER of the choices, a list where any of several is right, or None.

    Wrappings that no response repeats are taken off: <answer> tags, "#### 3", a list of one. A worked
    solution or the assistant's turn is read as a response is.
    """
    reward = parsed(row.get("reward_model"))                                                        # verl
    sources = [(key, row[key]) for key in ANSWER if key in row]
    if isinstance(reward, dict) and "ground_truth" in reward:
        sources.insert(0, ("ground_truth", reward["ground_truth"]))
    sources += [("answer", extra["answer"])] if not is_absent(extra.get("answer")) else []
    sources += [("reply", reply)] if reply else []
    if not sources:
        index = next((row[key] for key in INDEX if key in row), None)
        if choices and isinstance(index, (int, str)) and str(index) in map(str, range(len(choices))):
            return LETTERS[int(index)]
        return None if index is None or not choices else _letter_of(_text(index), choices, False, here)
    key, value = sources[0][0], parsed(sources[0][1])
    if isinstance(value, dict) and len(value) == 1 and {*value} <= {*ANSWER}:   # {"target": ["3", "three"]}
        (value,) = value.values()
    texts = listed(value)
    if texts and all(isinstance(text, dict) and "answer" in text for text in texts):              # VQAv2
        value = list(dict.fromkeys(_text(text["answer"]) for text in texts))
    while (texts := listed(value)) and len(texts) == 1 and listed(texts[0]):
        value = texts[0]
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
    golds = [_unwrapped(gold, key in WORKED, choices, here) for gold in golds]
    if choices:
        # MathVista's own files give the option's text, even where it looks like a letter
        golds = [_letter_of(gold, choices, "pid" in row and "answer_option" not in row, here)
                 for gold in golds]
    return golds[0] if len(golds) == 1 else golds or None


_WRAPPINGS = re.compile(
    r"(?:(?:the )?(?:final |correct )?answer(?: is|:| is:)|final answer)\s*[:：]?\s*(.+?)\.?"
    r"|(?:答案(?:是|为)?)[:：]?\s*(.+?)|#{2,}\s*(.+)|\*\*(.+)\*\*|`+(.+?)`+|\"(.+)\"|“(.+)”",
    re.DOTALL | re.IGNORECASE)


def _unwrapped(text, worked, choices, here):
    """The plain value that a response puts into its box: inside <answer> tags, after ####, without "The
    answer is", quotes and bold. worked: a whole solution, whose end names the answer."""
    if tags := re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL | re.IGNORECASE):
        return _unwrapped(tags[-1].strip(), False, choices, here)
    if "####" in text:
        return _unwrapped(text.rpartition("####")[2].strip(), False, choices, here)
    if match := _WRAPPINGS.fullmatch(text):
        inner = next(group for group in match.groups() if group).strip()
        if not re.search(r"\*\*|`|\"", inner):
            return _unwrapped(inner, worked, choices, here)
    worked = worked or "\\boxed" in text and not re.fullmatch(r"\$*\\boxed\{.*\}\$*\.?", text, re.DOTALL)
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
    inner = re.sub(r"^(?:option|choice)\s+(?=\(?[A-Za-z]\)?$)", "", inner, flags=re.IGNORECASE)
    for text in (answer, inner):
        if text in choices:
            return letters[choices.index(text)]
        for number, (letter, choice) in enumerate(zip(letters, choices), 1):
            match = _lettered(text, letter) or _lettered(text, number)
            if match and match[1].strip() == choice.strip():
                return letter
    alike = [letter for letter, choice in zip(letters, choices)
             if choice.strip().casefold() == inner.strip().casefold()]
    if len(alike) == 1:
        return alike[0]
    bare = re.sub(r"\\text|[\s{}()\[\].:]", "", inner).upper()
    if len(bare) == 1 and bare in letters:
        return bare
    index = "; put an index that counts from 0 into answer_index" if answer.isdecimal() else ""
    raise InputError(f"{here} has the answer {answer[:60]!r}; a letter from A to {letters[-1]} or the text "
                     f"of a choice is expected{index}")


# ------------------------------------------------------------------------------------------------------------
# ----------
# Pictures

def image_cells(row):
    """Where a row keeps its pictures: one cell, a list, a list as text, or image_1, image_2, .. -> list of
    cells."""
    cells = next((row[key] for key in IMAGE if not is_absent(row.get(key))), None)
    if cells is None:
        numbered = [key for key in row if re.fullmatch(r"image_?[0-9]{1,3}", str(key))]
        cells = [row[key] for key in sorted(numbered, key=lambda key: int(key.lstrip("image_")))]
    pictures = listed(parsed(cells))
    pictures = [cells] if pictures is None else pictures
    if len(pictures) == 1 and isinstance(pictures[0], list):
        pictures = pictures[0]
    return [cell for cell in pictures if not is_absent(cell)]


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
    cell = parsed(cell)
    for _ in range(3):  # {"bytes": .., "path": ..}, {"type": "image_url", "image_url": {"url": ..}}
        if isinstance(cell, dict):
            names = ("bytes", "path", "image", "image_url", "url", "file_name", "source", "data", "base64",
                     "image_path", "image_file", "img")
            cell = next((cell[key] for key in names if not is_absent(cell.get(key))), None)
    if isinstance(cell, bytes) and cell:
        return cell
    if not isinstance(cell, str) or is_absent(cell):
        raise InputError(f"{where} has the image {shown!r}; a path, a list of paths, or picture data is "
                         f"expected")
    cell = re.sub(r"^base64(?:://|,|:)|^b'(?=.*'$)|(?<=.)'$", "", cell) if len(cell) > 64 else cell
    # base64 has no dot, which most paths have, and 64 characters of it hold no picture
    if not cell.startswith("data:") and ("." in cell or len(cell) <= 64 or os.path.isfile(folder / cell)):
        return _path(cell.strip(), folder, where, allow_outside)
    try:
        text = cell.partition(",")[2] if cell.startswith("data:") else cell
        text = "".join(unquote(text).split()).translate(str.maketrans("-_", "+/"))  # mail wraps it in lines
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError as error:
        raise InputError(f"{where} has an image that is not base64 ({error}), nor a file; repair or remove "
                         f"the row") from error


def _path(text, folder, where, allow_outside):
    """The path of a picture, from a path relative to the data file's folder, with / or \\, or a file://
    URL."""
    if text.lower().startswith("file:"):
        host = urlsplit(text).netloc            # file://a.png, which is meant as a relative path
        text = unquote((host if host.lower() != "localhost" else "") + urlsplit(text).path)
    elif re.match(r"[A-Za-z]:[\\/]", text) and not os.path.exists(folder / text):
        raise InputError(f"{where} has the image {text[:100]!r}, a path of Windows; give it relative to "
                         f"the data file")
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
