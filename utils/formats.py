"""Files of questions, as benchmarks publish them: JSONL, JSON, TSV and parquet -> one plain row a question."""
import ast
import base64
import csv
import json
import re
import sys
from array import array
from collections.abc import Sequence

from utils.cli import InputError, reason

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# The names under which the known formats keep a thing, in the order in which they are looked for.
ID, QUESTION, IMAGE = ("id", "qid", "pid", "index"), ("question", "problem"), ("image", "images", "decoded_image", "image_path")
LAYOUT = ("a question (question or problem), image, image_path, images or image_1.., answer, and for multiple choice choices, "
          "options or columns A, B, ..")


class File(Sequence):
    """The questions of a file, made on demand, as the fields of a `data.Sample` (dict).

    rows: see `Rows`. broken: how many rows were left out.
    """

    def __init__(self, path, rows, limit, strict, answered):
        self.path, self.rows, self.kept, self.broken = path, rows, array("q"), 0
        seen, first = set(), None
        for place in range(len(rows)):
            if limit is not None and len(self.kept) == limit:
                break
            try:
                row = self._row(place)
                where, name = row["where"], row["id"]
                if name in seen:
                    raise InputError(f"{where}: id {name!r} occurs twice; make ids unique")
                if answered and row["answer"] is None:
                    raise InputError(f"{where}: question {name!r} has no answer; give it one or remove the row")
            except InputError as error:
                if strict:
                    raise
                self.broken += 1
                first = first or error
                if self.broken <= 20:
                    print(f"left out: {error}", file=sys.stderr)
                continue
            seen.add(name)
            self.kept.append(place)
        if self.broken and not self.kept:
            raise InputError(f"{path} has no row that can be used; the first: {first}")
        if self.broken:
            print(f"{path}: {self.broken} broken rows left out, {len(self.kept)} questions kept", file=sys.stderr)

    def __len__(self):
        return len(self.kept)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        return self._row(self.kept[index])

    def _row(self, place):
        where, row = self.rows[place]
        if isinstance(row, InputError):
            raise row
        return to_sample(row, where, self.path, self.rows.cells)


class Rows(list):
    """Rows of a file that fits in memory: (where in the file, dict or InputError) each."""

    def cells(self, row, where):
        """The image cells of a row (list)."""
        return _image_cells(row)


class TsvRows:
    """Rows of a VLMEvalKit TSV: only their places in the file are held; base64 pictures are decoded on demand."""

    def __init__(self, path):
        csv.field_size_limit(2**31 - 1)
        self.file, self.offsets, self.lines, self.by_index = open(path, "rb"), array("q"), array("q"), {}
        self.path, self.header = path, None
        for offset, line, cells, _ in self._records(0, 1):
            if self.header is None:
                self.header = [name.strip() for name in cells]
                if not {*QUESTION} & {*self.header} or not {*IMAGE, "image_1"} & {*self.header}:
                    raise InputError(f"{path} has the columns {', '.join(self.header)[:200]}; {LAYOUT} are expected")
                continue
            if cells:
                if "index" in self.header and len(cells) == len(self.header):
                    self.by_index.setdefault(cells[self.header.index("index")], len(self.offsets))
                self.offsets.append(offset)
                self.lines.append(line)

    def _records(self, offset, line):
        """(offset, line, cells, whole) of the records from a place on; a cell may span lines, so csv decides where one ends.
        whole: false where the file ends inside a quoted cell. Only one such walk at a time: they share the file's position."""
        self.file.seek(offset)
        end, whole = [offset, line], True

        def lines():
            nonlocal whole
            for raw in iter(self.file.readline, b""):
                end[0], end[1] = end[0] + len(raw), end[1] + 1
                # csv takes a lone \r for the end of a record and refuses what follows; before Python 3.11, NUL as well
                text = raw.decode("utf-8", "replace").removeprefix("\ufeff")
                yield text.replace("\r\n", "\n").replace("\r", " ").replace("\0", "\ufffd")
            whole = False
        start = list(end)
        for cells in csv.reader(lines(), delimiter="\t"):
            yield (*start, cells, whole)
            start = list(end)

    def __len__(self):
        return len(self.offsets)

    def __getitem__(self, place):
        line = self.lines[place]
        _, _, cells, whole = next(self._records(self.offsets[place], line))
        where = f"{self.path}, line {line}"
        if not whole:
            return where, InputError(f"{where}: row {cells[0][:40]!r} opens a quote that never closes, so that it holds the "
                                     "rest of the file; double the quote or remove it")
        if len(cells) != len(self.header):
            return where, InputError(f"{where}: row {(cells or [''])[0][:40]!r} has {len(cells)} cells where the header has "
                                     f"{len(self.header)}; repair or remove the row")
        return where, dict(zip(self.header, cells))

    def cells(self, row, where):
        """As above; a cell that is the index of another row stands for all the cells of that row."""
        found, todo, seen = [], _image_cells(row)[::-1], set()
        while todo:
            cell = todo.pop()
            if not isinstance(cell, str) or len(cell) > 64 or cell not in self.by_index:
                found.append(cell)
                continue
            other = self[self.by_index[cell]][1]
            more = _image_cells(other) if isinstance(other, dict) and cell not in seen and len(seen) < 64 else []
            if not more:                                # real files refer once
                raise InputError(f"{where} has an image that is the index of row {cell!r}, which leads in a circle, over more "
                                 "than 64 rows or to no picture; repair or remove the row")
            seen.add(cell)
            todo += more[::-1]
        return found


def _parsed(text, where):
    """A row of JSON, or the InputError that says why it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return InputError(f"{where}: not JSON ({error}); repair or remove it")


def _read_jsonl(path):
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        lines = ((f"{path}, line {number}", line) for number, line in enumerate(file, 1) if line.strip())
        return Rows([(where, _parsed(line, where)) for where, line in lines])


def _read_json(path):
    found = _parsed(path.read_text(encoding="utf-8-sig", errors="replace"), path)
    if isinstance(found, InputError):
        raise found
    if isinstance(found, dict):                 # MathVista: {"pid": row}
        found = [{"pid": key, **row} if isinstance(row, dict) else row for key, row in found.items()]
    if not isinstance(found, list):
        raise InputError(f"{path} holds a {type(found).__name__}; a list of rows, or an object of rows by id, is expected")
    return Rows([(f"{path}, row {number}", row) for number, row in enumerate(found, 1)])


def _read_parquet(path):
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"{path} is a parquet file; install pyarrow to read it") from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise InputError(f"{path} is no sound parquet file ({reason(error)}); fetch or write it again") from error
    return Rows([(f"{path}, row {number}", row) for number, row in enumerate(rows, 1)])


READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".tsv": TsvRows, ".parquet": _read_parquet}


def _listed(value):
    """A list, or one written as text ("['a', 'b']"), parsed as a literal and never evaluated -> list, else None."""
    if isinstance(value, str) and value.strip().startswith("["):
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return None
    return list(value) if isinstance(value, (list, tuple)) else None


def _absent(value):
    """Whether a cell holds nothing: blank text, None, [], or the NaN that pandas and parquet put there. 0 and "None" are
    something."""
    return value is None or value == [] or value != value or isinstance(value, str) and not value.strip()


def _text(value):
    """A cell as text; half a character ("\\ud800"), which JSON can hold and no tokenizer takes, becomes "?"."""
    return str(value).encode("utf-8", "replace").decode()


def _letter_of(answer, choices, by_text):
    """A gold answer -> the option's letter, by letter in any dress ("B", "(B)", "\\boxed{B}") or by text; None if neither."""
    letters = LETTERS[:len(choices)]
    if len(answer) == 1 and answer in letters and not by_text:
        return answer
    inner = re.sub(r"^\\boxed\{(.*)\}$", r"\1", answer.strip("$ "), flags=re.DOTALL).strip("$ ")
    for text in (answer, inner):
        if text in choices:
            return letters[choices.index(text)]
    bare = re.sub(r"\\text|[\s{}()\[\].:]", "", inner).upper()
    return bare if len(bare) == 1 and bare in letters else None


def _image_cells(row):
    """Where a row keeps its pictures: one cell, a list, a list as text, or image_1, image_2, .. -> list of cells."""
    cells = next((row[key] for key in ("decoded_image", *IMAGE) if not _absent(row.get(key))), None)
    if cells is None:
        numbered = sorted((key for key in row if re.fullmatch(r"image_\d+", str(key))), key=lambda key: int(key[6:]))
        cells = [row[key] for key in numbered]
    listed = _listed(cells)
    return [cell for cell in ([cells] if listed is None else listed) if not _absent(cell)]


def _picture(cell, folder, where):
    """An image cell -> a path, or the bytes of a picture. Raises InputError."""
    if isinstance(cell, dict):                      # Hugging Face: {"bytes": ..., "path": ...}
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes) and cell:
        return cell
    if not isinstance(cell, str) or _absent(cell):
        raise InputError(f"{where} has the image {str(cell)[:40]!r}; a path, a list of paths, or picture data is expected")
    # base64 has no dot, which every path with a suffix has, and 64 characters of it hold no picture
    if not cell.startswith("data:") and ("." in cell or len(cell) <= 64):
        return folder / cell
    try:
        text = cell.partition(",")[2] if cell.startswith("data:") else cell
        return base64.b64decode("".join(text.split()), validate=True)          # mail wraps it in lines
    except ValueError as error:
        raise InputError(f"{where} has an image that is not base64 ({error}); repair or remove the row") from error


_HINT = re.compile(r"^Hint: .*?\nQuestion: ", re.DOTALL)        # VLMEvalKit and MathVista wrap the question in instructions
_OPTIONS = re.compile(r"\n(?:Options?|Choices): *\n?(?=\(?A)", re.IGNORECASE)


def _options_in(question):
    """A question whose last lines list its options -> (question, option texts); else (question, None)."""
    stem, *tail = _OPTIONS.split(question, maxsplit=1)
    parts = re.split(r"(?:^|,\s*|\n\s*)\(?([A-H])[:.)]\s*", tail[0]) if tail else []
    if not parts[1::2] or parts[1::2] != list(LETTERS[:len(parts) // 2]):
        return question, None
    return stem.strip(), [text.strip() for text in parts[2::2]]


def to_sample(row, where, path, cells):
    """One row of any known layout -> the fields of a `data.Sample` (dict). cells: see `Rows.cells`.

    Raises InputError that names place and id.
    """
    if not isinstance(row, dict):
        raise InputError(f"{where}: a JSON object is expected, found {type(row).__name__}")
    if not any(key in row for key in QUESTION):
        raise InputError(f"{where} has the fields {', '.join(map(_text, row))[:200]}; {LAYOUT} are expected")
    row = {key: value for key, value in row.items() if not _absent(value)}
    name = next((_text(row[key]) for key in ID if key in row), where.split()[-1])
    here = f"{where}: question {name!r}"
    question = next((row[key] for key in QUESTION if key in row), "")
    if not isinstance(question, str) or not question.strip():
        raise InputError(f"{here} is empty or no text; give it one or remove the row")
    question = _HINT.sub("", _text(question).strip())
    if "unit" in row and "(Unit:" not in question:          # MathVista's own files keep it beside the question
        question += f" (Unit: {_text(row['unit'])})"
    # Options: a list, a list as text, columns A, B, .., or the question's own last lines (MMStar)
    choices, (stem, written) = row.get("choices", row.get("options", [])), _options_in(question)
    if choices not in ([], "[]"):
        listed = _listed(choices)
        if listed is None or not 2 <= len(listed) <= len(LETTERS):
            raise InputError(f"{here} has choices {_text(choices)[:60]!r}; a list of 2 to 26 texts is expected")
        choices = ["" if _absent(choice) else _text(choice) for choice in listed]
    else:
        columns = [_text(row.get(letter, "")) for letter in LETTERS]
        used = [place for place, text in enumerate(columns) if text]
        choices = columns[:used[-1] + 1] if len(used) > 1 else written
    if written and written == [choice.strip() for choice in choices]:           # the prompt lists them, once
        question = stem
    answer = row.get("answer_option", row.get("answer"))
    if isinstance(answer, dict):
        raise InputError(f"{here} has an answer of named parts ({', '.join(map(_text, answer))[:60]}); text or a number is "
                         "expected")
    answer = None if answer is None else _text(answer).strip()
    if row.get("question_type") == "open" and _listed(answer):         # MMMU: any of several
        answer = [_text(item) for item in _listed(answer)]
    if choices and answer is not None:
        # MathVista's own files give the option's text, even where it looks like a letter
        letter = _letter_of(answer, choices, "pid" in row and "answer_option" not in row)
        if letter is None:
            raise InputError(f"{here} has the answer {answer[:60]!r}; a letter from A to {LETTERS[len(choices) - 1]} or the "
                             "text of a choice is expected")
        answer = letter
    images = [_picture(cell, path.parent, here) for cell in cells(row, here)]
    meta = dict(row["meta"]) if isinstance(row.get("meta"), dict) else {}
    known = row | row["metadata"] if isinstance(row.get("metadata"), dict) else row             # MathVista
    meta |= {key: known[key] for key in ("answer_type", "precision", "category", "level", "subject", "split", "question_type")
             if key in known}
    try:
        sound = 0 <= float(meta.get("precision") or 0) <= 15
    except (TypeError, ValueError):
        sound = False
    if not sound:
        raise InputError(f"{here} has the precision {_text(meta['precision'])[:20]!r}; a number of decimals is expected")
    return {"id": name, "images": images, "question": question, "answer": answer, "choices": choices,
            "source": _text(row.get("source", path.stem)), "meta": meta, "where": where}
