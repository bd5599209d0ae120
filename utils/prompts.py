"""Prompts as a model takes them: their wording, where pictures stand, rows of a batch encoded once."""
import re
from dataclasses import dataclass

import torch

from utils.cli import InputError, reason
from utils.pictures import limited_size, resized

# The hints of MathVista's own evaluation, by (question type, answer type, decimals).
MATHVISTA = {
    "multiple choice": "provide the correct option letter, e.g., A, B, C, D, at the end",
    "integer": "requiring an integer answer and provide the final value, e.g., 1, 2, 3, at the end",
    "float 1": "requiring a floating-point number with one decimal place and provide the final value, e.g., "
               "1.2, 1.3, 1.4, at the end",
    "float 2": "requiring a floating-point number with two decimal places and provide the final value, e.g., "
               "1.23, 1.34, 1.45, at the end",
    "list": "requiring a Python list as an answer and provide the final list, e.g., [1, 2, 3], [1.2, 1.3, "
            "1.4], at the end"}


def project_prompt(question, sample):
    """Reasoning, then one boxed answer: what CDRL trains on."""
    what = "the letter of the answer" if sample.choices else "the answer"
    return f"{question}\nThink step by step, then put {what} in \\boxed{{}}."


def bare_prompt(question, sample):
    """The question and its options, nothing else."""
    return question


def official_prompt(question, sample):
    """The wording of the benchmark's own evaluation, told by the names of file and source. Raises
    InputError."""
    name = re.sub(r"[^a-z]", "", re.split(r"[/\\]", sample.where)[-1].lower() + str(sample.source).lower())
    if "mathvista" in name:
        return _mathvista(question, sample)
    if "mathvision" in name or "mathv" in name:
        return ("Please solve the problem step by step and put your answer in one \"\\boxed{}\". If it is a "
                "multiple choice question, only one letter is allowed in the \"\\boxed{}\".\n" + question)
    if "mmmu" in name:
        hint = ("Answer with the option's letter from the given choices directly." if sample.choices
                else "Answer the question using a single word or phrase.")
        return f"{question}\n{hint}"
    if "mmstar" in name:
        return question + "\nPlease select the correct answer from the options above."
    raise InputError(f"--prompt official: question {sample.id!r} is of none of MathVista, MathVision, MMMU "
                     f"and MMStar by the name of its file; rename the file, or use --prompt project")


def _mathvista(question, sample):
    """Hint, question, choices, as MathVista's create_query lays them out."""
    kind = "multiple choice" if sample.choices else str(sample.meta.get("answer_type", "integer"))
    if kind == "float":
        places = str(sample.meta.get("precision") or "2").split(".")[0]
        kind = f"float {places if places in '12' else 2}"
    hint = MATHVISTA.get(kind, MATHVISTA["integer"])
    stem, *options = question.split("\n(A) ", maxsplit=1)
    choices = "".join(f"\nChoices:\n(A) {text}" for text in options)
    joint = " and " if kind == "multiple choice" else " "
    return f"Hint: Please answer the question{joint}{hint}.\nQuestion: {stem}{choices}"


PROMPTS = {"project": project_prompt, "bare": bare_prompt, "official": official_prompt}


def place_images(prompt, count, special_tokens):
    """A prompt and its number of pictures -> (content of a chat message, order of the pictures in it).

    `<image>` is the next picture not named yet, `<image 2>` and `<image2>` the second. A picture stands at
    its first mention; those never named stand in front. A tag of a picture that does not exist stays text.
    special_tokens (a pattern) become spaces: the words of a user or of an Expert cannot open a picture or end
    the turn.
    """
    pieces, order = [], []
    for piece in re.split(r"(<image ?\d{0,3}>)", prompt):
        number = re.fullmatch(r"<image ?(\d{0,3})>", piece)
        if number:
            index = int(number[1]) - 1 if number[1] else next((i for i in range(count) if i not in order), -1)
            if 0 <= index < count and index not in order:
                order.append(index)
                pieces.append({"type": "image"})
                continue
        if piece.strip():
            pieces.append({"type": "text", "text": special_tokens.sub(" ", piece)})
    front = [i for i in range(count) if i not in order]
    return [{"type": "image"} for _ in front] + pieces, front + order


@dataclass
class Reading:
    """How prompts and pictures are put to a model. system: words of a system turn before each prompt; none
    where "". max_pixels, min_pixels: larger pictures are shrunk, smaller ones enlarged; 0: no bound."""
    system: str = ""
    max_pixels: int = 0
    min_pixels: int = 0

    def turns(self, content):
        """The content of a user's turn -> a chat (list of turns)."""
        system = {"role": "system", "content": [{"type": "text", "text": self.system}]}
        return [system] * bool(self.system) + [{"role": "user", "content": content}]

    def picture(self, image):
        """A picture within the bounds; the picture itself where it is."""
        size = self.size(image.size)
        if size == image.size:
            return image
        return image.at_size(size) if hasattr(image, "at_size") else resized(image, size)

    def size(self, size):
        """(width, height) of a picture within the bounds, of the same shape."""
        return limited_size(size, self.min_pixels, self.max_pixels)

    def check(self, processor):
        """InputError for bounds that contradict each other, and for a template without a system turn."""
        if 0 < self.max_pixels < self.min_pixels:
            raise InputError(f"--min_pixels {self.min_pixels} is above --max_pixels {self.max_pixels}")
        if not self.system:
            return
        try:
            text = processor.apply_chat_template(self.turns([{"type": "text", "text": "?"}]), tokenize=False)
            why = "" if self.system.strip() in text else "drops it"
        except Exception as error:          # templates fail in any way on roles that they do not know
            why = f"refuses it: {reason(error)}"
        if why:
            raise InputError(f"--system {self.system[:40]!r}: the model's chat template {why}; put the words "
                             f"into the questions")


class Inputs(dict):
    """Left-padded model inputs of B prompts, by name. `rows` selects prompts without encoding them again."""

    def __init__(self, tensors, one_picture_each):
        super().__init__(tensors)
        self.one_picture_each = one_picture_each

    def rows(self, indices):
        """The inputs of these prompts (list of int), in this order, without columns that are padding only ->
        Inputs.

        None where a tensor does not tell which of its rows belong to which prompt: pictures cut into any
        number of tiles, or prompts without exactly one picture."""
        if not self.one_picture_each:
            return None
        count, length = self["input_ids"].shape
        padding = length - int(self["attention_mask"][indices].sum(-1).max())
        grid = self.get("image_grid_thw")
        patches = [] if grid is None else grid.prod(-1).tolist()            # of each picture (Qwen)
        selected = Inputs({}, True)
        for name, value in self.items():
            if value.shape == (count, length):
                selected[name] = value[indices, padding:]
            elif len(value) == count:
                selected[name] = value[indices]
            elif len(value) == sum(patches):
                by_picture = value.split(patches)
                selected[name] = torch.cat([by_picture[i] for i in indices])
            else:
                return None
        return selected
