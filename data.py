"""Questions about pictures: the `Sample`, the built-in synthetic questions, the loaders, and every prompt.

    data.load("synthetic", split="test")          # four skills, three levels, drawn on demand
    data.load("questions.jsonl")                  # {"id", "image", "question", "choices"?, "answer"} a line
    data.load("MathVista_MINI.tsv")  # VLMEvalKit; also the official .json and .jsonl files, and parquet

The built-in world is a board of 4 x 4 cells, 28 pixels each: one cell is one merged patch of the built-in
model, so that noise on a cell removes exactly one piece of evidence. Thin strokes make the evidence
fine-grained. Every question has its evidence in part of the board (`meta["evidence"]`, boxes in pixels) and a
worked solution in which every word is determined by the picture, cell by cell (`meta["solution"]`; only the
warm-up of `tiny/` reads it, and `meta["rows"]`, the board in words).

Left out on purpose: downloads. A file is opened where the user has it.
"""
from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image

from tiny import questions
from tiny.questions import SIZES, SPLITS, Synthetic
from utils.cli import InputError
from utils.formats import File, open_rows
from utils.held_out import hold_out
from utils.pictures import UNREADABLE, load_picture, shown_size, unreadable
from utils.preflight import training_fault
from utils.prompts import PROMPTS, project_prompt
from utils.rows import LETTERS


def open_data(args):
    """(training questions, held-out questions). Built-in questions have a test split. Of a file at most a
    fifth is held out, drawn by the seed, and no picture is in both parts."""
    if args.data == "synthetic":
        held_out = load("synthetic", "test", args.run.eval_size, args.seed) if args.run.eval_size else []
        return load("synthetic", "train", None, args.seed), held_out
    samples = list(load(args.data, strict=not args.run.skip_broken, answered=True,
                        allow_outside=args.run.allow_outside))
    return hold_out(samples, min(args.run.eval_size, len(samples) // 5), args.seed)


@dataclass
class Sample:
    """One question.

    id: unique in its source. images: PIL images, paths, or the bytes of a file, opened when `pictures` is
    called; none for a question of words alone, which has no noised twin. answer: the gold answer, a
    LETTER when `choices` (the option texts, "" where a letter is left out) is given, a list where any of
    several is right, None when unknown. meta: whatever the source knows; the built-in questions carry
    "skill", "level", "evidence", "rows" and "solution". where: its place in a file, for messages. enough:
    pixels of a picture that the model can use; larger JPEGs are decoded at a reduced size.
    wording: of the prompt, of PROMPTS.
    """
    id: str
    images: list
    question: str
    answer: str | list | None = None
    choices: list[str] | None = None
    source: str = ""
    meta: dict = field(default_factory=dict)
    where: str = ""
    enough: int | None = None
    wording: str = "project"

    def pictures(self):
        """The images as RGB PIL images, as a viewer shows them (`utils/pictures.py`). Raises InputError,
        naming the sample, when a file is missing or unreadable."""
        opened = []
        for image in self.images:
            if not isinstance(image, Image.Image):
                try:
                    image = load_picture(image, self.enough)
                except UNREADABLE as error:
                    raise self._unreadable(image, error) from error
            opened.append(image.convert("RGB"))
        return opened

    def picture_sizes(self):
        """(width, height) of each picture as shown, from the beginnings and ends of the files. Raises
        InputError, also for a file that was cut off."""
        sizes = []
        for image in self.images:
            try:
                sizes.append(image.size if isinstance(image, Image.Image) else shown_size(image))
            except UNREADABLE as error:
                raise self._unreadable(image, error) from error
        return sizes

    def _unreadable(self, image, error):
        return InputError(f"{self.where + ': ' if self.where else ''}question {self.id!r}: "
                          f"{unreadable(image, error)}; repair or remove it")


def ask(sample):
    """The question with its options, without instructions."""
    if not sample.choices:
        return sample.question
    options = [f"({letter}) {text}" for letter, text in zip(LETTERS, sample.choices) if text]
    return "\n".join([sample.question, *options])


def prompt(sample):
    """The user turn (str), in the sample's wording: by default it asks for reasoning and one boxed answer."""
    return PROMPTS[sample.wording](ask(sample), sample)


def voter_prompt(sample, candidates):
    """Expert as Voter (paper 3.3): one probability per candidate, as a JSON list."""
    listed = "\n".join(f"{i}: {answer}" for i, answer in enumerate(candidates, 1))
    return (f"{ask(sample)}\nCandidate answers:\n{listed}\n"
            "How probable is each candidate? Reply with a JSON list of probabilities, nothing else.")


def critic_prompt(sample, answer):
    """Expert as Critic (paper 3.3): what the picture shows, held against the current answer."""
    return (f"{ask(sample)}\nCurrent answer: {answer}\n"
            "Look at the picture and criticise this answer in one line.")


def reflect_prompt(sample, answer, critique):
    """The base model answers again with the critique (paper 3.3, Self-Reflection)."""
    instruction = project_prompt("", sample)
    return f"{ask(sample)}\nEarlier answer: {answer}\nCritique: {critique}{instruction}"


def golds(sample):
    """The gold answers of a sample, of which any is right (list of str)."""
    return sample.answer if isinstance(sample.answer, list) else [sample.answer]


MODULES = ("self_consistency", "self_reflection", "self_check")


def planner_prompt(sample, signals=None):
    """Expert as Planner (paper 3.3): the order of the modules, as a JSON list of names.

    signals: (answer, share of the samples, their mean C) of each candidate. With them it may stop early.
    """
    answers = "".join(f"{answer}: share {share:.2f}, C {c:.1f}\n" for answer, share, c in signals or [])
    note = "" if signals is None else f"{answers}The list may end early, with stop.\n"
    return (f"{note}{ask(sample)}\nIn which order should these be run: {', '.join(MODULES)}? "
            "Reply with a JSON list of names, nothing else.")


class Samples(Sequence):
    """The rows of a source, each made a Sample when it is asked for. broken: how many rows were left out."""

    def __init__(self, rows, wording):
        self.rows, self.broken, self.wording = rows, getattr(rows, "broken", 0), wording

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [Sample(**row, wording=self.wording) for row in self.rows[index]]
        return Sample(**self.rows[index], wording=self.wording)


def synthetic(split, seed, index, skill=None):
    """The built-in question number `index` of a split (Sample), of one skill if it is named."""
    return Sample(**questions.synthetic(split, seed, index, skill))


def load(source, split="train", limit=None, seed=0, strict=True, answered=False, allow_outside=False,
         wording="project"):
    """Open a set of questions -> Sequence[Sample].

    source: "synthetic", or a file, or a folder that holds one. Files: .jsonl, .json, .csv, .tsv (VLMEvalKit),
    .parquet (needs pyarrow), in any layout of `utils/rows.py`; a folder with metadata.jsonl, or one folder of
    pictures a class. An image is a path relative to the file, base64 or a data URI; a row may have none.
    Bytes that are no UTF-8 become U+FFFD. split, seed: choose among the built-in questions, ignored for
    files. limit: at most so many. strict: broken rows raise one InputError that names lines and ids. Else
    each is named on stderr, left out and counted in the result's `broken`. answered: a row without a gold
    answer, or with one that no response can match, is broken. allow_outside: pictures may lie outside the
    file's folder. wording: of the prompts. A .tsv is read row by row; some 200 bytes a row are held.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; it must be at least 1")
    if str(source) == "synthetic":
        if split not in SPLITS:
            raise InputError(f"split {split!r} is unknown; the built-in questions have {', '.join(SPLITS)}")
        return Samples(Synthetic(split, seed, SIZES[split] if limit is None else limit), wording)
    path, rows = open_rows(source)
    check = (lambda fields: training_fault(Sample(**fields), golds)) if answered else lambda fields: None
    samples = Samples(File(path, rows, limit, strict, check, allow_outside), wording)
    if not len(samples):
        raise InputError(f"data file {str(source)!r} holds no question")
    return samples
