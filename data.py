"""Questions about pictures: the `Sample`, the built-in synthetic questions, the loaders, and every prompt.

    data.load("synthetic", split="test")          # four skills, three levels, drawn on demand
    data.load("questions.jsonl")                  # {"id", "image", "question", "choices"?, "answer"} a line
    data.load("MathVista_MINI.tsv")               # VLMEvalKit; also the official .json and .jsonl files, and parquet

The built-in world is a board of 4 x 4 cells, 28 pixels each: one cell is one merged patch of the built-in model, so
that noise on a cell removes exactly one piece of evidence. Thin strokes make the evidence fine-grained. Every question
has its evidence in part of the board (`meta["evidence"]`, boxes in pixels) and a worked solution in which every word
is determined by the picture, cell by cell (`meta["solution"]`; only the warm-up of `tiny/` reads it, and
`meta["rows"]`, the board in words).

Left out on purpose: downloads. A file is opened where the user has it.
"""
import argparse
import ast
import base64
import csv
import errno
import io
import json
import math
import os
import random
import re
import sys
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from PIL import Image, ImageDraw


class InputError(ValueError):
    """Bad input from the user: one sentence that says what, its value, and what to do. Commands exit with code 2."""


def command(name, function):
    """Run a command's main function: quiet libraries, and bad input as one sentence on stderr with exit code 2."""
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")            # a terminal that cannot show a character shows ?
    try:
        result = function()
        sys.stdout.flush()
        return result
    except BrokenPipeError:             # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except InputError as error:
        print(f"{name}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        where = error.filename or "the disk of the output"
        print(f"{name}: {error.strerror}: {where}; make room, and the same command goes on", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"{name}: stopped; the same command starts again", file=sys.stderr)
        raise SystemExit(130) from None


def option(default, text, choices=None):
    """A dataclass field that is also a command-line flag: its default, a sentence of help, what it may be."""
    return field(default=default, metadata={"help": text, "choices": choices})


def add_options(parser, settings):
    """One flag for each field of a dataclass made of `option`s."""
    for f in fields(settings):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        kind |= {"choices": f.metadata["choices"]} if f.metadata["choices"] else {}
        parser.add_argument(f"--{f.name}", help=f"{f.metadata['help']} (default: {f.default!r})".replace("%", "%%"),
                            default=f.default if parser.argument_default is None else parser.argument_default, **kind)


def reason(error):
    """The first line of what an error says, its class where it says nothing, or not a word (str)."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return said if " " in said else f"{type(error).__name__} {said}".strip()


def shown(path):
    """A model's directory as a user would type it, a hub id or URL as it is."""
    return os.path.relpath(path) if os.path.isdir(path) else str(path)


def strict_json(value, **how):
    """json.dumps without NaN and Infinity, which are no JSON: null stands for them."""
    def finite(x):
        if isinstance(x, dict):
            return {key: finite(item) for key, item in x.items()}
        if isinstance(x, (list, tuple)):
            return [finite(item) for item in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x
    return json.dumps(finite(value), allow_nan=False, **how)


def write_atomically(path, text):
    """Write a file by one rename: a kill leaves the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)           # a full disk
        raise
    os.replace(temporary, path)


def checksum(path):
    """CRC-32 of a file's content, or of a model directory's weights and settings (int)."""
    kinds = ("*.safetensors", "*.bin", "*config.json", "*token*", "chat_template*")
    files = [path] if path.is_file() else sorted({file for kind in kinds for file in path.glob(kind) if file.is_file()})
    total = 0
    for file in files:
        with open(file, "rb") as stream:
            while block := stream.read(2**24):
                total = zlib.crc32(block, total)
    return total


def table(rows, intervals=True):
    """{row name: {column: number, or (value, low, high)}} -> text with aligned columns."""
    def shown(value):
        if isinstance(value, tuple):
            ends = f" [{value[1]:.3f}, {value[2]:.3f}]" if intervals and math.isfinite(value[0]) else ""
            return f"{value[0]:.3f}{ends}"
        return f"{value:.3f}" if isinstance(value, float) else str(value)
    columns = list(next(iter(rows.values())))
    lines = [["", *columns]] + [[name, *(shown(row[c]) for c in columns)] for name, row in rows.items()]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths)))
                     for line in lines)


@dataclass
class Sample:
    """One question.

    id: unique in its source. images: PIL images, paths, or the bytes of a file, opened when `pictures` is called; none for a
    question of words alone, which training refuses. answer: the gold answer, a LETTER when `choices` (the option texts, ""
    where a letter is left out) is given, a list where any of several is right, None when unknown. meta: whatever the source
    knows; the built-in questions carry "skill", "level", "evidence", "rows" and "solution". where: its place in a file, for
    messages.
    """
    id: str
    images: list
    question: str
    answer: str | list | None = None
    choices: list[str] | None = None
    source: str = ""
    meta: dict = field(default_factory=dict)
    where: str = ""

    def pictures(self):
        """The images as RGB PIL images. Raises InputError, naming the sample, when a file is missing or unreadable."""
        opened = []
        for image in self.images:
            if not isinstance(image, Image.Image):
                try:
                    with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as file:
                        file.load()
                        if max(file.size) > 200 * min(file.size):           # what the models' processors take
                            raise ValueError(f"{file.width} x {file.height} pixels, longer than 200 times its breadth")
                        image = file.convert("RGB")
                except (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError) as error:
                    shown = f"of {len(image)} bytes" if isinstance(image, bytes) else repr(str(image))
                    why = re.sub(r" <_io\.BytesIO[^>]*>", "", str(error))             # its address differs from time to time
                    raise InputError(f"{self.where + ': ' if self.where else ''}question {self.id!r}: image {shown} cannot be "
                                     f"read ({why}); repair or remove it") from error
            opened.append(image.convert("RGB"))
        return opened


# ---------------------------------------------------------------------------------------------------------------------
# Prompts: the same words for a tiny model and a large one

def ask(sample):
    """The question with its options, without instructions."""
    if not sample.choices:
        return sample.question
    options = [f"({letter}) {text}" for letter, text in zip(LETTERS, sample.choices) if text]
    return "\n".join([sample.question, *options])


def prompt(sample):
    """The user turn that asks for reasoning and one boxed answer (str)."""
    what = "the letter of the answer" if sample.choices else "the answer"
    return f"{ask(sample)}\nThink step by step, then put {what} in \\boxed{{}}."


def voter_prompt(sample, candidates):
    """Expert as Voter (paper 3.3): one probability per candidate, as a JSON list."""
    listed = "\n".join(f"{i}: {answer}" for i, answer in enumerate(candidates, 1))
    return (f"{ask(sample)}\nCandidate answers:\n{listed}\n"
            "How probable is each candidate? Reply with a JSON list of probabilities, nothing else.")


def critic_prompt(sample, answer):
    """Expert as Critic (paper 3.3): what the picture shows, held against the current answer."""
    return f"{ask(sample)}\nCurrent answer: {answer}\nLook at the picture and criticise this answer in one line."


def reflect_prompt(sample, answer, critique):
    """The base model answers again with the critique (paper 3.3, Self-Reflection)."""
    return f"{ask(sample)}\nEarlier answer: {answer}\nCritique: {critique}\n" + prompt(sample).rsplit("\n", 1)[1]


def golds(sample):
    """The gold answers of a sample, of which any is right (list of str)."""
    return sample.answer if isinstance(sample.answer, list) else [sample.answer]


def critique(sample, answer):
    """What a Critic who knows the solution says about an answer, in one line (str)."""
    shown = sample.meta.get("solution", f"The answer is {golds(sample)[0]}").split(". \\boxed")[0]
    return f"{shown}. {answer} {'correct' if answer in golds(sample) else 'wrong'}"


MODULES = ("self_consistency", "self_reflection", "self_check")


def planner_prompt(sample):
    """Expert as Planner (paper 3.3): the order of the modules, as a JSON list of names."""
    return (f"{ask(sample)}\nIn which order should these be run: {', '.join(MODULES)}? "
            "Reply with a JSON list of names, nothing else.")


# ---------------------------------------------------------------------------------------------------------------------
# The built-in questions

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SKILLS = ("count", "chart", "digits", "spatial")
LEVELS = (1, 2, 3)
CELL, GRID = 28, 4
MAX_BAR = 16          # blocks: two cells high
# A grey near CLIP's mean pixel starts training near zero input; white would saturate it.
BACKGROUND = (122, 116, 104)
COLORS = {"red": (240, 40, 40), "green": (40, 225, 60), "blue": (50, 80, 255), "yellow": (250, 235, 40),
          "pink": (240, 70, 230), "white": (255, 255, 255)}
SHAPES = ("circle", "square", "triangle", "cross", "star")
DIGITS = {"0": "01110 10001 10011 10101 11001 10001 01110", "1": "00100 01100 00100 00100 00100 00100 01110",
          "2": "01110 10001 00001 00110 01000 10000 11111", "3": "01110 10001 00001 00110 00001 10001 01110",
          "4": "00010 00110 01010 10010 11111 00010 00010", "5": "11111 10000 11110 00001 00001 10001 01110",
          "6": "00110 01000 10000 11110 10001 10001 01110", "7": "11111 00001 00010 00100 01000 01000 01000",
          "8": "01110 10001 10001 01110 10001 10001 01110", "9": "01110 10001 10001 01111 00001 00010 01100"}
# A question belongs to the split that a checksum of its content names, whatever the seed: disjoint by construction.
SPLITS = {"train": range(0, 8), "val": range(8, 9), "test": range(9, 10)}
SIZES = {"train": 100_000, "val": 1_000, "test": 1_000}


def draw_shape(draw, cell, color, shape, jitter):
    """Outline one shape in a cell: (row, column), jitter (dx, dy, size) in pixels."""
    dx, dy, size = jitter
    x, y = cell[1] * CELL + CELL // 2 + dx, cell[0] * CELL + CELL // 2 + dy
    box, rgb = (x - size, y - size, x + size, y + size), COLORS[color]
    if shape == "circle":
        draw.ellipse(box, outline=rgb, width=2)
    elif shape == "square":
        draw.rectangle((box[0] + 1, box[1] + 1, box[2] - 1, box[3] - 1), outline=rgb, width=2)
    elif shape == "triangle":
        draw.polygon([(x, y - size), (x + size, y + size), (x - size, y + size)], outline=rgb, width=2)
    elif shape == "cross":
        draw.line((x, y - size, x, y + size), fill=rgb, width=3)
        draw.line((x - size, y, x + size, y), fill=rgb, width=3)
    else:
        for step in ((0, size), (size, size), (size, 0), (size, -size)):
            draw.line((x - step[0], y - step[1], x + step[0], y + step[1]), fill=rgb, width=1)


def draw_digit(draw, cell, color, digit, jitter):
    """A 5 x 7 pixel-font digit, three screen pixels a dot with a gap, so that its strokes are thin."""
    left, top = cell[1] * CELL + 7 + jitter[0], cell[0] * CELL + 4 + jitter[1]
    for row, bits in enumerate(DIGITS[digit].split()):
        for column, bit in enumerate(bits):
            if bit == "1":
                x, y = left + 3 * column, top + 3 * row
                draw.rectangle((x, y, x + 1, y + 1), fill=COLORS[color])


def draw_bar(draw, cell, color, value):
    """A bar of `value` thin blocks standing on the floor of `cell` (row, column), 3 pixels a block."""
    left, floor = cell[1] * CELL + 6, (cell[0] + 1) * CELL - 2
    for block in range(value):
        top = floor - 3 * (block + 1)
        draw.rectangle((left, top + 1, left + 15, top + 2), fill=COLORS[color])
    draw.line((cell[1] * CELL, floor + 1, cell[1] * CELL + CELL - 1, floor + 1), fill=(20, 20, 20))


class _Board:
    """What is drawn where. `things` maps a cell to (kind, color, what); the content is hashed to choose the split."""

    def __init__(self, rng):
        self.rng, self.things = rng, {}

    def free(self, cells=None):
        cells = cells or [(row, column) for row in range(GRID) for column in range(GRID)]
        return [cell for cell in cells if cell not in self.things]

    def put(self, cell, kind, color, what):
        jitter = (self.rng.randint(-2, 2), self.rng.randint(-2, 2), self.rng.randint(8, 10))
        self.things[cell] = (kind, color, what, jitter)

    def scatter(self, kind, options, number):
        """Put `number` things drawn from `options` [(color, what), ...] on free cells."""
        cells = self.free()
        for cell in self.rng.sample(cells, min(number, len(cells))):
            self.put(cell, kind, *self.rng.choice(options))

    def words(self):
        """The board in words, one string a row: "red circle, none, white 4, green bar 7"."""
        def cell(row, column):
            kind, color, what, _ = self.things.get((row, column), ("sky", "", "", None))
            return "none" if kind == "sky" else f"{color} bar {what}" if kind == "bar" else f"{color} {what}"
        return [", ".join(cell(row, column) for column in range(GRID)) for row in range(GRID)]

    def render(self):
        image = Image.new("RGB", (CELL * GRID, CELL * GRID), BACKGROUND)
        draw = ImageDraw.Draw(image)
        for cell, (kind, color, what, jitter) in self.things.items():
            if kind == "shape":
                draw_shape(draw, cell, color, what, jitter)
            elif kind == "digit":
                draw_digit(draw, cell, color, what, jitter)
            elif kind == "bar":
                draw_bar(draw, cell, color, int(what))
        return image


def _boxes(cells):
    """Pixel boxes (left, top, right, bottom) of cells."""
    return [(c * CELL, r * CELL, (c + 1) * CELL, (r + 1) * CELL) for r, c in cells]


def cell_name(cell):
    """(row, column) -> "b3": columns a to d from the left, rows 1 to 4 from the top."""
    return f"{'abcd'[cell[1]]}{cell[0] + 1}"


def _objects(besides=()):
    return [(color, shape) for color in COLORS for shape in SHAPES if (color, shape) not in besides]


def _count(rng, level):
    """How many red circles are there? The targets stand close together; look-alikes stand anywhere."""
    board = _Board(rng)
    target = color, shape = rng.choice(_objects())
    top, left = rng.randint(0, GRID - 2), rng.randint(0, GRID - 2 - (level > 1))
    block = [(top + r, left + c) for r in range(2) for c in range(2 + (level > 1))]
    cells = rng.sample(block, rng.randint(1, (2, 4, 6)[level - 1]))
    for cell in cells:
        board.put(cell, "shape", *target)
    look_alike = [thing for thing in _objects([target]) if (thing[0] == color) != (thing[1] == shape)]
    board.scatter("shape", look_alike, (2, 4, 6)[level - 1])
    board.scatter("digit", [(c, d) for c in COLORS for d in DIGITS], rng.randint(0, 3))
    solution = f"{' '.join(cell_name(cell) for cell in sorted(cells))}, total {len(cells)}"
    plural = shape + ("es" if shape == "cross" else "s")
    return board, f"How many {color} {plural} are there?", str(len(cells)), solution, cells


def _chart(rng, level):
    """What is the value of the green bar? At level 2 a difference of two bars, at level 3 the total of three."""
    board = _Board(rng)
    number = (3, 3, 4)[level - 1]
    row, left = rng.randint(1, GRID - 1), rng.randint(0, GRID - number)
    colors = rng.sample(list(COLORS), number)
    values = {color: rng.randint(1, MAX_BAR) for color in colors}
    columns = dict(zip(colors, range(left, left + number)))
    for color in colors:
        board.put((row, columns[color]), "bar", color, str(values[color]))
        board.put((row - 1, columns[color]), "sky", color, "")    # the upper half of a tall bar: nothing else stands there
    board.scatter("shape", _objects(), rng.randint(1, 5))
    asked = rng.sample(colors, level)
    if level == 2:
        asked.sort(key=values.get, reverse=True)
    numbers = [values[color] for color in asked]
    question = (f"What is the value of the {asked[0]} bar?", f"How much taller is the {asked[0]} bar than the {asked[-1]} bar?",
                f"What is the total of the {', '.join(asked[:-1])} and {asked[-1]} bars?")[level - 1]
    answer = (numbers[0], numbers[0] - numbers[-1], sum(numbers))[level - 1]
    solution = ", ".join(f"{color} {values[color]}" for color in asked)
    if level > 1:
        solution += ", " + _running((1, -1, 1)[level - 1], numbers)
    return board, question, str(answer), solution, [(r, columns[color]) for color in asked for r in (row - 1, row)]


def _running(sign, numbers):
    """"4 + 7 = 11, 11 + 2 = 13", or a difference."""
    total, steps = numbers[0], []
    for number in numbers[1:]:
        steps.append(f"{total} {'+' if sign > 0 else '-'} {number} = {total + sign * number}")
        total += sign * number
    return ", ".join(steps)


def _digits(rng, level):
    """What is the sum of the red digits? They stand side by side; digits of other colours are in the way."""
    board = _Board(rng)
    number = (2, 3, 4)[level - 1]
    row, left = rng.randint(0, GRID - 1), rng.randint(0, GRID - number)
    color = rng.choice(list(COLORS))
    digits = [rng.choice(list(DIGITS)) for _ in range(number)]
    cells = [(row, left + i) for i in range(number)]
    for cell, digit in zip(cells, digits):
        board.put(cell, "digit", color, digit)
    board.scatter("digit", [(c, d) for c in COLORS if c != color for d in DIGITS], (1, 2, 3)[level - 1])
    board.scatter("shape", _objects(), rng.randint(1, 5))
    numbers = [int(digit) for digit in digits]
    solution = ", ".join(f"{cell_name(cell)} {digit}" for cell, digit in zip(cells, digits)) + ", " + _running(1, numbers)
    return board, f"What is the sum of the {color} digits?", str(sum(numbers)), solution, cells


SIDES = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}


def _spatial(rng, level):
    """What color is the object directly left of the blue square? At level 3, two steps away."""
    board = _Board(rng)
    side = rng.choice(list(SIDES)[: 2 if level == 1 else 4])
    distance = 2 if level == 3 else 1
    dr, dc = (distance * step for step in SIDES[side])
    reference = rng.choice([(r, c) for r in range(GRID) for c in range(GRID)
                            if 0 <= r + dr < GRID and 0 <= c + dc < GRID])
    found = (reference[0] + dr, reference[1] + dc)
    here, there = rng.sample(_objects(), 2)
    board.put(reference, "shape", *here)
    board.put(found, "shape", *there)
    # The other neighbours have other colours: reading the wrong side gives a wrong answer.
    neighbours = [(reference[0] - dr, reference[1] - dc), (reference[0] + dc, reference[1] + dr),
                  (reference[0] - dc, reference[1] - dr)]
    others = rng.sample([color for color in COLORS if color != there[0]], 3)
    for cell, color in zip([c for c in neighbours if 0 <= c[0] < GRID and 0 <= c[1] < GRID], others):
        board.put(cell, "shape", *rng.choice([thing for thing in _objects([here]) if thing[0] == color]))
    board.scatter("shape", _objects([here]), (2, 5, 7)[level - 1])
    how = f"directly {side}" if distance == 1 else f"two cells {side}"
    solution = f"{cell_name(reference)}, {cell_name(found)} {there[0]}"
    return board, f"What color is the object {how} the {' '.join(here)}?", there[0], solution, [reference, found]


MAKERS = {"count": _count, "chart": _chart, "digits": _digits, "spatial": _spatial}


def synthetic(split, seed, index, skill=None):
    """The built-in question number `index` of a split: the same for the same (split, seed, index), on any machine.

    Skills and levels alternate with the index, so that every 12 questions in a row hold each pair once. Content is
    drawn again until its checksum falls into the split: no picture of one split can occur in another.
    """
    skill = skill or SKILLS[index % len(SKILLS)]
    level = LEVELS[index // len(SKILLS) % len(LEVELS)]
    rng = random.Random(f"{split} {seed} {index} {skill}")
    while True:
        board, question, answer, solution, cells = MAKERS[skill](rng, level)
        content = repr((question, sorted(board.things.items())))
        if zlib.crc32(content.encode()) % 10 in SPLITS[split]:
            break
    meta = {"skill": skill, "level": level, "evidence": _boxes(cells), "rows": board.words(),
            "solution": f"See {solution}. \\boxed{{{answer}}}"}
    return Sample(f"{split}-{seed}-{index}", [board.render()], question, answer, None, "synthetic", meta)


class Synthetic(Sequence):
    """Lazily drawn built-in questions; `len`, indexing and slices as for a list."""

    def __init__(self, split, seed, limit):
        self.split, self.seed, self.indices = split, seed, range(limit)

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        return synthetic(self.split, self.seed, self.indices[index])


# ---------------------------------------------------------------------------------------------------------------------
# Loading: one converter for every layout, since the columns say what they are

# The names under which the known formats keep a thing, in the order in which they are looked for.
ID, QUESTION, IMAGE = ("id", "qid", "pid", "index"), ("question", "problem"), ("image", "images", "decoded_image", "image_path")
LAYOUT = ("a question (question or problem), image, image_path, images or image_1.., answer, and for multiple choice choices, "
          "options or columns A, B, ..")


def load(source, split="train", limit=None, seed=0, strict=True, answered=False):
    """Open a set of questions -> Sequence[Sample].

    source: "synthetic", or a file: .jsonl (plain, MathVision, ViRL39K or Geometry3K rows), .json (MathVista, or a list of
    rows), .tsv (VLMEvalKit: MathVista, MathVision, MMStar, MMMU, ..), .parquet (needs pyarrow). An image is a path relative
    to the file, base64 or a data URI; a row may have none. Bytes that are no UTF-8 become U+FFFD. split and seed choose
    among the built-in questions and are ignored for files. limit: at most so many.
    strict: a broken row raises InputError, which names line and id; else it is named on stderr, left out and counted in
    the result's `broken`. answered: a row without a gold answer is a broken one. A .tsv stays on the disk and is read row by
    row; some 200 bytes a row are held.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; it must be at least 1")
    if str(source) == "synthetic":
        if split not in SPLITS:
            raise InputError(f"split {split!r} is unknown; the built-in questions have {', '.join(SPLITS)}")
        return Synthetic(split, seed, SIZES[split] if limit is None else limit)
    path = Path(source)
    if not os.path.isfile(path):            # False, not an error, where the name is too long for a file
        raise InputError(f"data file {str(source)!r} does not exist; give 'synthetic' or the path of a file")
    if path.suffix.lower() not in READERS:
        raise InputError(f"data file {str(source)!r} ends in {path.suffix!r}; one of {', '.join(READERS)} is expected")
    try:
        rows = READERS[path.suffix.lower()](path)
    except OSError as error:
        raise InputError(f"data file {str(source)!r} cannot be read ({error}); repair it or its permissions") from error
    samples = File(path, rows, limit, strict, answered)
    if not len(samples):
        raise InputError(f"data file {str(source)!r} holds no question")
    return samples


class File(Sequence):
    """The questions of a file, made on demand. rows: see `Rows`. broken: how many rows were left out."""

    def __init__(self, path, rows, limit, strict, answered):
        self.path, self.rows, self.kept, self.broken = path, rows, array("q"), 0
        seen, first = set(), None
        for place in range(len(rows)):
            if limit is not None and len(self.kept) == limit:
                break
            try:
                sample = self._sample(place)
                if sample.id in seen:
                    raise InputError(f"{sample.where}: id {sample.id!r} occurs twice; make ids unique")
                if answered and sample.answer is None:
                    raise InputError(f"{sample.where}: question {sample.id!r} has no answer; give it one or remove the row")
            except InputError as error:
                if strict:
                    raise
                self.broken += 1
                first = first or error
                if self.broken <= 20:
                    print(f"left out: {error}", file=sys.stderr)
                continue
            seen.add(sample.id)
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
        return self._sample(self.kept[index])

    def _sample(self, place):
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
    """One row of any known layout -> Sample. cells: see `Rows.cells`. Raises InputError that names place and id."""
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
    return Sample(name, images, question, answer, choices, _text(row.get("source", path.stem)), meta, where)
