"""Checks before training: every question, on all ranks, in one run, before anything is moved or written.

Sizes of pictures come from their headers, and tokens from the processor's own arithmetic where it has one. So
ten thousand photos take seconds, and a question whose photo is larger than all others is found before its
step.
"""
import importlib.util
import re
import shutil
import sys
from pathlib import Path

from PIL import Image

from utils import cli
from utils.cli import InputError, warn
from utils.distributed import dtype_of, gathered, parameters, place
from utils.judge import is_correct
from utils.rows import ANSWER

SHOWN_FAULTS = 20
# tokens that text and template may share or not; lengths within it of the limit are counted exactly
MARGIN = 8


def check_settings(args, world):
    """Refuse settings that cannot work, each in one sentence."""
    cli.check_bounds(args)
    cli.check_bounds(args.run)
    if abs(args.seed) >= 2**63:
        raise InputError(f"--seed is {args.seed}; it must fit into 64 bits")
    if args.run.merge and not args.run.lora_rank:
        raise InputError("--merge merges an adapter, and there is none without --lora_rank")
    if args.group_size < 2:
        raise InputError(f"--group_size is {args.group_size}; a group needs at least 2 rollouts to compare")
    if args.batch_size % world:
        raise InputError(f"--batch_size {args.batch_size} does not divide over {world} ranks; use a "
                         f"multiple of {world}")
    if args.run.log != "none" and importlib.util.find_spec(args.run.log) is None:
        raise InputError(f"--log {args.run.log} needs a package that is not here; pip install "
                         f"{args.run.log}, or leave the flag out")
    if args.lr > 1e30:
        raise InputError(f"--lr is {args.lr:g}; AdamW moves every weight by about as much a step, 1e-6 "
                         "suits a 7B model")


class PromptLengths:
    """Tokens of prompts with pictures, from the pictures' sizes and the words alone.

    vlm: has processor, tokenizer and prompt_length. The length is that of the words, and of the pictures of
    these sizes. The latter is counted once on blank pictures for each list of sizes. A processor with its own
    arithmetic is asked instead, for each number of pictures a prompt, as soon as two blank counts have shown
    that it is right up to a constant.
    """

    def __init__(self, vlm):
        self.vlm = vlm
        self.counted = {}               # ((width, height), ..) -> tokens
        self.constants = {}             # number of pictures -> blank counts minus the arithmetic, list
        # transformers keeps it for servers, under this name
        self.arithmetic = getattr(vlm.processor, "_get_num_multimodal_tokens", None)

    def __call__(self, sizes, prompt):
        """sizes: list of (width, height). -> (tokens of the prompt within MARGIN, those of its pictures)."""
        words = len(self.vlm.tokenizer(re.sub(r"<image ?\d{0,3}>", "", prompt))["input_ids"])
        pictures = self.picture_tokens(tuple(self.vlm.reading.size(size) for size in sizes))
        return words + pictures, pictures

    def picture_tokens(self, sizes):
        """Tokens of a prompt beside its words (int)."""
        if sizes in self.counted:
            return self.counted[sizes]
        constants = self.constants.setdefault(len(sizes), [])
        by_arithmetic = self._by_arithmetic(sizes)
        if by_arithmetic is not None and len(constants) > 1 and len({*constants}) == 1:
            self.counted[sizes] = by_arithmetic + constants[0]
            return self.counted[sizes]
        blanks = [Image.new("RGB", size, "gray") for size in sizes]
        self.counted[sizes] = self.vlm.prompt_length(blanks, "?") - len(self.vlm.tokenizer("?")["input_ids"])
        if by_arithmetic is not None:
            constants.append(self.counted[sizes] - by_arithmetic)
        return self.counted[sizes]

    def _by_arithmetic(self, sizes):
        if self.arithmetic is None or not sizes:
            return None
        try:
            return sum(self.arithmetic(image_sizes=[[height, width] for width,
                                                    height in sizes])["num_image_tokens"])
        except (AttributeError, KeyError, NotImplementedError, TypeError,
                ValueError):  # a class that only inherits it
            self.arithmetic = None
            return None


def tower_pixels(vlm):
    """How many pixels of a large picture reach the vision tower, tiles and thumbnail together (int)."""
    inputs = vlm.encode([[Image.new("RGB", (4096, 4096))]], ["?"])
    name = next(name for name in inputs if name.startswith("pixel_values"))
    return vlm.sight.levels(inputs[name].cpu())[:, 0].size


def check_questions(lengths, samples, prompt_of, max_new_tokens, context, skip_broken=False):
    """Every picture has a readable header, every prompt and its completion fit the context -> list of
    (tokens, of them pictures, sample), one a question.

    lengths: `PromptLengths`. A prompt that did not fit would have to be cut, image tokens included. Raises
    InputError; all faults but the first are named on stderr. skip_broken: they are left out.
    """
    counts, faults = [], []
    for sample in samples:
        try:
            tokens, pictures = lengths(sample.picture_sizes(), prompt_of(sample))
            if tokens + MARGIN + max_new_tokens > context:
                tokens = lengths.vlm.prompt_length(sample.pictures(), prompt_of(sample))
            if tokens + max_new_tokens > context:
                raise InputError(f"question {sample.id!r} takes {tokens} tokens ({pictures} of its "
                                 f"pictures) and "
                                 f"--max_new_tokens {max_new_tokens} more, but the model's context is "
                                 f"{context}; shorten it, "
                                 "shrink its pictures, or remove it")
            counts.append((tokens, pictures, sample))
        except InputError as error:
            faults.append(str(error))
    if skip_broken and faults:
        for fault in faults[:SHOWN_FAULTS]:
            warn(f"left out: {fault}")
        return counts
    if len(faults) > 1:
        for fault in faults[:SHOWN_FAULTS]:
            warn(f"broken: {fault}")
        raise InputError(f"{len(faults)} questions cannot be used, each of the first "
                         f"{min(len(faults), SHOWN_FAULTS)} named "
                         f"above; the first: {faults[0]}")
    if faults:
        raise InputError(faults[0])
    return counts


def check_run(vlm, train_set, held_out, order, args, prompt_of):
    """Check this rank's share of the questions before training. Raises InputError.

    Pictures of a file are then decoded no larger than the vision tower can use. With --skip_broken the
    questions that any rank found broken or overlong leave both lists, and are counted on stderr. Built-in
    questions are alike in length: those of the first steps stand for all.
    """
    if isinstance(train_set, list):
        indices, largest = range(len(train_set)), tower_pixels(vlm)
        for sample in (*train_set, *held_out):
            sample.enough = largest
    else:
        indices = sorted({i for step in range(min(args.steps, 16)) for i in order.indices(step)})
    questions = [train_set[i] for i in indices] + list(held_out)
    counts = check_questions(PromptLengths(vlm), questions[order.rank::order.world], prompt_of,
                             args.max_new_tokens, vlm.context, args.run.skip_broken)
    _check_mixture(vlm, questions, prompt_of)
    total, trained = parameters(vlm, args.freeze_vision, args.run.lora_rank, args.run.lora_target)
    check_disk(args, total, trained, dtype_of(args.run, vlm.device).itemsize)
    return [sample.id for *_, sample in counts]


def leave_out(sound, train_set, held_out, args):
    """With --skip_broken keep the questions of these ids, of all ranks, in both lists (in place). All ranks
    call it. InputError where nothing is left to train on."""
    if not args.run.skip_broken or not isinstance(train_set, list):             # built-in questions
        return
    sound, before = {*gathered(sound)}, len(train_set) + len(held_out)
    for questions in (train_set, held_out):
        questions[:] = [sample for sample in questions if sample.id in sound]
    if not train_set:
        raise InputError("--skip_broken leaves no question to train on; repair those named above")
    if (missing := before - len(train_set) - len(held_out)) and place()[0] == 0:
        warn(f"{missing} broken or overlong questions left out, {len(train_set)} train")


def _check_mixture(vlm, questions, prompt_of):
    """Refuse questions without a picture beside others where the model's processor does."""
    pairs = {bool(sample.images): sample for sample in questions}
    if len(pairs) < 2:
        return
    try:
        vlm.encode([sample.pictures() for sample in pairs.values()], [prompt_of(s) for s in pairs.values()])
    except InputError as error:
        raise InputError(f"question {pairs[False].id!r} has no picture and others have one: {error}; remove "
                         f"one kind") from error


def disk_plan(folder, parameters, trained, itemsize, keep, copies=0):
    """Bytes that a run writes, and what is free for them -> (needed, free).

    A checkpoint holds the model (itemsize bytes a parameter), fp32 weights and two moments of AdamW for what
    trains. `keep` of them stay while one more is written. copies: of the weights alone, likewise. The final
    model comes on top. What the folder holds already is free for them, too.
    """
    checkpoint = itemsize * parameters + 4 * parameters + 8 * trained
    models = 1 + (copies + 1) * bool(copies)
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    folder = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return (keep + 1) * checkpoint + models * itemsize * parameters, shutil.disk_usage(folder).free + held


def disk_of_run(args, parameters, trained, itemsize):
    """-> (needed, free) GiB of the disk under --output. parameters: all of a model."""
    saved = trained if args.run.lora_rank and not args.run.merge else parameters
    copies = args.run.keep_weights * bool(args.run.weights_every)
    plan = disk_plan(Path(args.output), saved, trained, itemsize, args.run.keep, copies)
    return tuple(size / 2**30 for size in plan)


def check_disk(args, parameters, trained, itemsize):
    """Raises InputError where a run needs more of the disk than is free; see `disk_of_run`."""
    needed, free = disk_of_run(args, parameters, trained, itemsize)
    if needed > free:
        raise InputError(f"the run writes {needed:.2f} GiB into {args.output}, whose disk has {free:.2f} "
                         f"free; make room, lower --keep ({args.run.keep}), or choose another --output")


class HopelessTraining:
    """Notices training that cannot learn. Call it with each line of metrics.jsonl.

    A step teaches nothing where no rollout is right, where every completion is cut off, or where all rewards
    of each group are equal. It is said at the first such step of a row, and `patience` in a row end the run
    (0: never).
    """
    SIGNS = {
        "no rollout was right": (
            lambda row: row["original/outcome"] == 0,
            "look at the gold answers and the responses in samples.jsonl: do they have the same form?"),
        "every completion was cut off": (
            lambda row: row["original/truncated"] == 1,
            "raise --max_new_tokens, or look for the model's stop token in its generation_config.json"),
        "all rewards of each group were equal": (
            lambda row: row["original/zero_variance"] == 1,
            "raise --group_size or --temperature, or take questions that are neither too easy nor too hard"),
    }

    def __init__(self, patience):
        self.patience, self.in_a_row = patience, dict.fromkeys(self.SIGNS, 0)

    def __call__(self, row, progress=None):
        """row: a dict of metrics; progress: the tqdm above which warnings are printed -> the warning, or
        None. Raises InputError after `patience` hopeless steps."""
        causes = []
        for sign, (is_hopeless, cure) in self.SIGNS.items():
            self.in_a_row[sign] = self.in_a_row[sign] + 1 if is_hopeless(row) else 0
            if self.patience and self.in_a_row[sign] >= self.patience:
                raise InputError(f"{sign} in {self.in_a_row[sign]} steps in a row, up to step "
                                 f"{row['step']}; {cure}, or go on "
                                 "with --patience 0")
            if self.in_a_row[sign] == 1:
                causes.append(f"{sign} in step {row['step']}; if that goes on, {cure}")
        warning = "; and ".join(causes) or None
        if warning and progress is not None:
            progress.write(f"warning: {warning}", file=sys.stderr)
        return warning


def training_fault(sample, golds):
    """Why a question cannot be trained on (str), or None: its gold answer at least matches itself.

    golds: of data.py. Raises InputError for a picture that does not open.
    """
    if sample.answer is None:
        return f"has no answer; give it one ({', '.join(ANSWER[1:])}) or remove the row"
    sample.picture_sizes()
    for gold in golds(sample):
        if not re.sub(r"\\boxed|[{}$\s]", "", gold) or not is_correct(f"\\boxed{{{gold}}}", sample):
            return f"has the answer {gold[:60]!r}, which no response can match; write the plain value"
    return None
