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
import io
import os
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from tiny import questions
from tiny.questions import SIZES, SPLITS, Synthetic
from utils.cli import InputError
from utils.formats import LETTERS, READERS, File


def open_data(args):
    """(training questions, held-out questions). Built-in questions have a test split; a file gives up every fifth
    question at most, drawn by the seed; each of its questions must have a picture."""
    if args.data == "synthetic":
        held_out = load("synthetic", "test", args.eval_size, args.seed) if args.eval_size else []
        return load("synthetic", "train", None, args.seed), held_out
    samples = list(load(args.data, answered=True))
    for sample in samples:
        if not sample.images:
            raise InputError(f"question {sample.id!r} has no picture; training noises one, give it or remove the row")
    order = list(range(len(samples)))
    random.Random(f"hold out {args.seed}").shuffle(order)
    size = min(args.eval_size, len(samples) // 5)
    return [samples[i] for i in sorted(order[size:])], [samples[i] for i in sorted(order[:size])]


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


MODULES = ("self_consistency", "self_reflection", "self_check")


def planner_prompt(sample):
    """Expert as Planner (paper 3.3): the order of the modules, as a JSON list of names."""
    return (f"{ask(sample)}\nIn which order should these be run: {', '.join(MODULES)}? "
            "Reply with a JSON list of names, nothing else.")


class Samples(Sequence):
    """The rows of a source, each made a Sample when it is asked for. broken: how many rows were left out."""

    def __init__(self, rows):
        self.rows, self.broken = rows, getattr(rows, "broken", 0)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [Sample(**row) for row in self.rows[index]]
        return Sample(**self.rows[index])


def synthetic(split, seed, index, skill=None):
    """The built-in question number `index` of a split (Sample), of one skill if it is named."""
    return Sample(**questions.synthetic(split, seed, index, skill))


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
        return Samples(Synthetic(split, seed, SIZES[split] if limit is None else limit))
    path = Path(source)
    if not os.path.isfile(path):            # False, not an error, where the name is too long for a file
        raise InputError(f"data file {str(source)!r} does not exist; give 'synthetic' or the path of a file")
    if path.suffix.lower() not in READERS:
        raise InputError(f"data file {str(source)!r} ends in {path.suffix!r}; one of {', '.join(READERS)} is expected")
    try:
        rows = READERS[path.suffix.lower()](path)
    except OSError as error:
        raise InputError(f"data file {str(source)!r} cannot be read ({error}); repair it or its permissions") from error
    samples = Samples(File(path, rows, limit, strict, answered))
    if not len(samples):
        raise InputError(f"data file {str(source)!r} holds no question")
    return samples


def critique(sample, answer):
    """What a Critic who knows the solution says about an answer, in one line (str)."""
    shown = sample.meta.get("solution", f"The answer is {golds(sample)[0]}").split(". \\boxed")[0]
    return f"{shown}. {answer} {'correct' if answer in golds(sample) else 'wrong'}"
