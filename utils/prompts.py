"""Prompts as a model takes them: where pictures stand, and rows of a batch that was encoded once."""
import re

import torch


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
