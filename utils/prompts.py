"""Prompts as a model takes them: where pictures stand, and rows of a batch that was encoded once."""
import re
from dataclasses import dataclass

import torch

from utils.cli import InputError, reason
from utils.pictures import limited_size, resized


def place_images(prompt, count):
    """A prompt and its number of pictures -> (content of a chat message, order of the pictures in it).

    `<image>` is the next picture not named yet, `<image 2>` and `<image2>` the second. A picture stands at
    its first mention; those never named stand in front. A tag of a picture that does not exist stays text.
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
            pieces.append({"type": "text", "text": piece})
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
