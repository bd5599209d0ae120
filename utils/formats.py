"""Files of questions, as benchmarks publish them: JSONL, JSON, CSV, TSV, parquet and folders -> one plain row
a question."""
import csv
import json
import os
from array import array
from collections.abc import Sequence
from pathlib import Path

from utils.cli import InputError, reason, warn
from utils.rows import IMAGE, LAYOUT, QUESTION, SUFFIXES, image_cells, to_sample

SHOWN_FAULTS = 20           # broken rows that are named one by one
SENTENCE = 12               # words; no short answer is longer


def _is_sentence(fields):
    golds = fields["answer"] if isinstance(fields["answer"], list) else [fields["answer"] or ""]
    return not fields["choices"] and min(len(gold.split()) for gold in golds) > SENTENCE


class File(Sequence):
    """The questions of a file, made on demand, as the fields of a `data.Sample` (dict).

    rows: see `Rows`. fault_of: function(fields) -> why a question cannot be used, or None. broken: how many
    rows were left out. strict: broken rows raise one InputError, and each of the first ones is named on
    stderr.
    """

    def __init__(self, path, rows, limit, strict, fault_of, allow_outside=False):
        self.path, self.rows, self.allow_outside = path, rows, allow_outside
        self.indices, self.broken = array("q"), 0
        seen_ids, faults, systems, sentences = set(), [], 0, 0
        for index in range(len(rows)):
            if limit is not None and len(self.indices) == limit:
                break
            try:
                fields = self._fields(index)
                where, id = fields["where"], fields["id"]
                if id in seen_ids:
                    raise InputError(f"{where}: id {id!r} occurs twice; make ids unique")
                if fault := fault_of(fields):
                    names = ", ".join(map(str, rows[index][1]))[:200] if fields["answer"] is None else ""
                    raise InputError(f"{where}: question {id!r} {fault}" + f" (it has {names})" * bool(names))
            except InputError as error:
                self.broken += 1
                faults += [error] * (self.broken <= SHOWN_FAULTS)
                continue
            seen_ids.add(id)
            self.indices.append(index)
            systems += "system" in fields["meta"]
            sentences += _is_sentence(fields)
        for error in faults if self.broken > 1 or not strict else ():
            warn(f"{'broken' if strict else 'left out'}: {error}")
        if self.broken and strict:
            raise InputError(str(faults[0]) if self.broken == 1 else
                             f"{path} has {self.broken} broken rows, each of the first {len(faults)} named "
                             f"above; the first: "
                             f"{faults[0]}")
        if self.broken and not self.indices:
            raise InputError(f"{path} has no row that can be used; the first: {faults[0]}")
        if self.broken:
            warn(f"{path}: {self.broken} broken rows left out, {len(self.indices)} questions kept")
        if sentences:
            warn(f"{path}: the answers of {sentences} questions are sentences of more than {SENTENCE} words, "
                 f"which a response must repeat to be right")
        if systems:
            warn(f"{path}: the system prompts of {systems} rows are not used; the prompt asks for a boxed "
                 f"answer")

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        return self._fields(self.indices[index])

    def _fields(self, index):
        where, row = self.rows[index]
        if isinstance(row, InputError):
            raise row
        try:
            return to_sample(row, where, self.path, self.rows.cells, self.allow_outside)
        except InputError:
            raise
        except (ArithmeticError, AssertionError, AttributeError, LookupError, RecursionError, TypeError,
                ValueError) as error:
            raise InputError(f"{where} cannot be read as a question ({reason(error)}); repair or remove "
                             "it") from error


class Rows(list):
    """Rows of a file that fits in memory: (where in the file, dict or InputError) each."""

    def cells(self, row, where):
        """The image cells of a row (list)."""
        return image_cells(row)


class TsvRows:
    """Rows of a VLMEvalKit TSV: only their places in the file are held; base64 pictures are decoded on
    demand."""

    def __init__(self, path):
        csv.field_size_limit(2**31 - 1)
        self.file, self.offsets, self.lines, self.by_index = open(path, "rb"), array("q"), array("q"), {}
        self.path, self.header, self.stamp = path, None, self._stamp()
        for offset, line, cells, _ in self._records(0, 1):
            if self.header is None:
                self.header = [name.strip() for name in cells]
                if not {*QUESTION} & {*self.header} or not {*IMAGE, "image_1"} & {*self.header}:
                    raise InputError(f"{path} has the columns {', '.join(self.header)[:200]}; {LAYOUT} are "
                                     f"expected")
                continue
            if cells:
                if "index" in self.header and len(cells) == len(self.header):
                    self.by_index.setdefault(cells[self.header.index("index")], len(self.offsets))
                self.offsets.append(offset)
                self.lines.append(line)

    def _records(self, offset, line):
        """(offset, line, cells, complete) of the records from a place on. A cell may span lines, so csv
        decides where a record ends. complete: false where the file ends inside a quoted cell. Only one such
        walk at a time, because they share the file's position."""
        self.file.seek(offset)
        end, complete = [offset, line], True

        def lines():
            nonlocal complete
            for raw in iter(self.file.readline, b""):
                end[0], end[1] = end[0] + len(raw), end[1] + 1
                # csv takes a lone \r for the end of a record and refuses what follows; before Python 3.11,
                # NUL as well
                text = raw.decode("utf-8", "replace").removeprefix("\ufeff")
                yield text.replace("\r\n", "\n").replace("\r", " ").replace("\0", "\ufffd")
            complete = False
        start = list(end)
        for cells in csv.reader(lines(), delimiter="\t"):
            yield (*start, cells, complete)
            start = list(end)

    def __len__(self):
        return len(self.offsets)

    def _stamp(self):
        """What changes when somebody writes into the file that is open here."""
        stats = os.fstat(self.file.fileno())
        return stats.st_size, stats.st_mtime_ns

    def __getitem__(self, index):
        line = self.lines[index]
        if self._stamp() != self.stamp:
            raise InputError(f"{self.path} was changed while it was read; put it back, and the same "
                             "command goes on")
        _, _, cells, complete = next(self._records(self.offsets[index], line))
        where = f"{self.path}, line {line}"
        if not complete:
            return where, InputError(f"{where}: row {cells[0][:40]!r} opens a quote that never closes, so "
                                     f"that it holds the "
                                     "rest of the file; double the quote or remove it")
        if len(cells) != len(self.header):
            return where, InputError(f"{where}: row {(cells or [''])[0][:40]!r} has {len(cells)} cells "
                                     f"where the header has "
                                     f"{len(self.header)}; repair or remove the row")
        return where, dict(zip(self.header, cells))

    def cells(self, row, where):
        """As above; a cell that is the index of another row stands for all the cells of that row."""
        pictures, todo, visited = [], image_cells(row)[::-1], set()
        while todo:
            cell = todo.pop()
            if not isinstance(cell, str) or len(cell) > 64 or cell not in self.by_index:
                pictures.append(cell)
                continue
            other = self[self.by_index[cell]][1]
            is_new = isinstance(other, dict) and cell not in visited and len(visited) < 64
            more = image_cells(other) if is_new else []
            if not more:                                # real files refer once
                raise InputError(f"{where} has an image that is the index of row {cell!r}, which leads in a "
                                 f"circle, over more "
                                 "than 64 rows or to no picture; repair or remove the row")
            visited.add(cell)
            todo += more[::-1]
        return pictures


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
    content = _parsed(path.read_text(encoding="utf-8-sig", errors="replace"), path)
    if isinstance(content, InputError):
        raise content
    if isinstance(content, dict):                 # MathVista: {"pid": row}
        content = [{"pid": key, **row} if isinstance(row, dict) else row for key, row in content.items()]
    if not isinstance(content, list):
        raise InputError(f"{path} holds a {type(content).__name__}; a list of rows, or an object of rows by "
                         f"id, is expected")
    return Rows([(f"{path}, row {number}", row) for number, row in enumerate(content, 1)])


def _read_csv(path):
    csv.field_size_limit(2**31 - 1)
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        try:
            return Rows([(f"{path}, row {number}",
                          {key: value for key, value in row.items() if isinstance(key, str)})
                         for number, row in enumerate(csv.DictReader(file), 1)])
        except csv.Error as error:
            raise InputError(f"{path} is no sound CSV file ({error}); repair it") from error


def _read_parquet(path):
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"{path} is a parquet file; install pyarrow to read it") from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, AssertionError, AttributeError, LookupError, OverflowError, TypeError,
            ValueError) as error:
        raise InputError(f"{path} is no sound parquet file ({reason(error)}); fetch or write it "
                         "again") from error
    return Rows([(f"{path}, row {number}", row) for number, row in enumerate(rows, 1)])


READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".tsv": TsvRows,
           ".parquet": _read_parquet}


def data_file(folder):
    """The data file of a folder: metadata.* first (Hugging Face's imagefolder), else the only one there is.
    None for an imagefolder without one, whose pictures lie in a folder a class. Raises InputError."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in READERS and path.is_file())
    files = [path for path in files if path.stem == "metadata"] or files
    if len(files) == 1:
        return files[0]
    if files:
        raise InputError(f"folder {str(folder)!r} holds {len(files)} data files "
                         f"({', '.join(path.name for path in files[:5])}); give the path of one")
    return None


def image_folder(folder):
    """An imagefolder, one folder of pictures a class -> Rows that ask for the class."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    pictures = [(path, file) for path in classes for file in sorted(path.iterdir())
                if file.suffix.lower() in SUFFIXES]
    if len({path for path, _ in pictures}) < 2:
        raise InputError(f"folder {str(folder)!r} holds neither a data file ({', '.join(READERS)}) nor a "
                         f"folder of pictures "
                         "for each of several classes; give the path of a file")
    names = sorted({path.name for path, _ in pictures})
    choices = {"choices": names} if len(names) <= 26 else {}
    return Rows([(str(file), {"id": str(file.relative_to(folder)), "image": str(file.relative_to(folder)),
                              "answer": path.name,
                              "question": "Which class does the picture show?", **choices}) for path,
                              file in pictures])


def open_rows(source):
    """A file or a folder -> (path whose folder the pictures are relative to, rows). Raises InputError."""
    path, shown = Path(source), repr(str(source)[:200])
    try:
        if os.path.isdir(path):             # False, not an error, where the name is too long for a file
            file = data_file(path)
            if file is None:
                return path / "folder", image_folder(path)
            path = file
        if not os.path.isfile(path):
            raise InputError(f"data file {shown} does not exist; give 'synthetic' or the path of a file or "
                             f"a folder")
        if path.suffix.lower() not in READERS:
            raise InputError(f"data file {shown} ends in {path.suffix!r}; one of {', '.join(READERS)} is "
                             f"expected")
        return path, READERS[path.suffix.lower()](path)
    except OSError as error:
        raise InputError(f"data file {shown} cannot be read ({error}); repair it or its "
                         "permissions") from error
