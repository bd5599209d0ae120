"""The built-in world: boards of 4 x 4 cells, four skills, three levels, drawn on demand."""
import random
import zlib
from collections.abc import Sequence

from PIL import Image, ImageDraw

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
    chosen = rng.sample(colors, level)
    if level == 2:
        chosen.sort(key=values.get, reverse=True)
    numbers = [values[color] for color in chosen]
    question = (f"What is the value of the {chosen[0]} bar?", f"How much taller is the {chosen[0]} bar than the {chosen[-1]} bar?",
                f"What is the total of the {', '.join(chosen[:-1])} and {chosen[-1]} bars?")[level - 1]
    answer = (numbers[0], numbers[0] - numbers[-1], sum(numbers))[level - 1]
    solution = ", ".join(f"{color} {values[color]}" for color in chosen)
    if level > 1:
        solution += ", " + _running((1, -1, 1)[level - 1], numbers)
    return board, question, str(answer), solution, [(r, columns[color]) for color in chosen for r in (row - 1, row)]


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
    target = (reference[0] + dr, reference[1] + dc)
    here, there = rng.sample(_objects(), 2)
    board.put(reference, "shape", *here)
    board.put(target, "shape", *there)
    # The other neighbours have other colours: reading the wrong side gives a wrong answer.
    neighbours = [(reference[0] - dr, reference[1] - dc), (reference[0] + dc, reference[1] + dr),
                  (reference[0] - dc, reference[1] - dr)]
    others = rng.sample([color for color in COLORS if color != there[0]], 3)
    for cell, color in zip([c for c in neighbours if 0 <= c[0] < GRID and 0 <= c[1] < GRID], others):
        board.put(cell, "shape", *rng.choice([thing for thing in _objects([here]) if thing[0] == color]))
    board.scatter("shape", _objects([here]), (2, 5, 7)[level - 1])
    how = f"directly {side}" if distance == 1 else f"two cells {side}"
    solution = f"{cell_name(reference)}, {cell_name(target)} {there[0]}"
    return board, f"What color is the object {how} the {' '.join(here)}?", there[0], solution, [reference, target]


MAKERS = {"count": _count, "chart": _chart, "digits": _digits, "spatial": _spatial}


def synthetic(split, seed, index, skill=None):
    """The built-in question number `index` of a split, as the fields of a `data.Sample` (dict).

    It is the same for the same (split, seed, index), on any machine.

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
    return {"id": f"{split}-{seed}-{index}", "images": [board.render()], "question": question, "answer": answer,
            "source": "synthetic", "meta": meta}


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
