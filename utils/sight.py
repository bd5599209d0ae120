"""What a model's vision tower gets of a picture, and noise put exactly there.

Processors resize, cut into tiles, pad, and order patches, each class in its own way. None of that is repeated here. A probe
picture, whose channels hold the noise mask, the picture's number and a texture, goes through the model's own
processor, and tells for each value of the real picture where it came from.
"""
import numpy as np
import torch
from PIL import Image

from utils.cli import InputError

MAX_TWINS = 250                 # numbers that fit into the channel of a probe
CONTENT = 160                   # above it a probe's blue is texture, which is at least 192; padding is black or a mean
_TEXTURE = np.random.default_rng(0).integers(192, 256, (64, 64), dtype=np.uint8)


class Sight:
    """A processor that puts noise where the vision tower looks. Call it as the processor.

    A noised twin is told by its `noised_values` (`noise.NoisedPicture`). Where the processor leaves a picture as it is,
    the twin's own pixels are used. Else the values that the tower would get of the twin's source are noised.
    """

    def __init__(self, processor):
        self.processor = processor
        self.unchanged = {}             # (width, height) -> whether the processor leaves such a picture as it is

    def __call__(self, texts, images, **settings):
        """Texts and as many lists of pictures -> the model's inputs (dict of tensors)."""
        twins = [image for pictures in images for image in pictures if hasattr(image, "noised_values")]
        twins = [twin for twin in twins if not self.unchanged.get(twin.size)]
        batches = [twins[first:first + MAX_TWINS] for first in range(0, len(twins), MAX_TWINS)]
        marks = []
        for batch in batches:
            numbers = {id(twin): i for i, twin in enumerate(batch)}
            probes = self._run(texts, images, settings,
                               lambda image, of=numbers: probe(image.size, of.get(id(image)), image))
            marks.append({key: self._marks(value, batch) for key, value in probes.items() if key.startswith("pixel_values")})
        resized = {id(twin) for twin in twins if not self.unchanged[twin.size]}
        inputs = self._run(texts, images, settings, lambda image: image.source if id(image) in resized else image)
        for batch, by_key in zip(batches, marks):
            for key, mark in by_key.items():
                inputs[key] = self._noised(inputs[key], mark, [twin if id(twin) in resized else None for twin in batch])
        return inputs

    def _run(self, texts, images, settings, picture_of):
        nested = [[picture_of(image) for image in pictures] for pictures in images]
        return dict(self.processor(text=texts, images=nested if any(nested) else None, padding=True, return_tensors="pt",
                                   **settings))

    def levels(self, value):
        """Pixel values as the processor makes them, (..., C, H, W) or (patches, C * T * P * P) -> float32 array
        (units, 3, n) of 8-bit levels. A unit is a tile or a patch; the T frames that repeat a picture are read once."""
        frames, mean, std, scale = self._layout(value)
        unit = value.shape[-1] if value.ndim == 2 else value.shape[-3:].numel()
        values = value.float().reshape(-1, 3, frames, unit // (3 * frames)).numpy()[:, :, 0]
        return (values * std + mean) / scale

    def _layout(self, value):
        """-> frames T; mean and std of the channels, (3, 1) each; the scale of levels before them."""
        images = self.processor.image_processor
        normal = images.do_normalize
        mean, std = (np.broadcast_to(np.float32(x), 3)[:, None] for x in
                     ((images.image_mean, images.image_std) if normal else (0, 1)))
        frames = getattr(images, "temporal_patch_size", 1) if value.ndim == 2 else 1
        return frames, mean, std, images.rescale_factor if images.do_rescale else 1.0

    def _marks(self, value, twins):
        """A probe's pixel values -> (the twin of each unit or -1 (units,), mask (units, n), where there is a picture and no
        padding (units, n)). Learns which sizes the processor leaves as they are."""
        levels = self.levels(value)
        content, green = levels[:, 2] > CONTENT, np.rint(levels[:, 1]).astype(int)
        counted = content & (abs(levels[:, 1] - green) < 0.3) & (0 <= green) & (green <= len(twins))
        votes = np.arange(len(levels))[:, None] * (len(twins) + 1) + green              # a unit's number is its pixels'
        numbers = np.bincount(votes[counted], minlength=len(levels) * (len(twins) + 1))
        numbers = numbers.reshape(len(levels), -1).argmax(1) - 1
        if not {*range(len(twins))} <= {*numbers.tolist()}:
            raise InputError(f"{type(self.processor).__name__} arranges pixels in a way that is not known here, so that noise "
                             "cannot be put on what the vision tower gets; use another model")
        for number, twin in enumerate(twins):
            if twin.size not in self.unchanged:
                blue = np.sort(np.rint(levels[numbers == number, 2]).ravel())
                texture = np.sort(np.frombuffer(probe(twin.size).getchannel("B").tobytes(), np.uint8))
                self.unchanged[twin.size] = np.array_equal(blue, texture)
        return numbers, (levels[:, 0] / 255).clip(0, 1), content

    def _noised(self, value, marks, twins):
        """Pixel values whose twins (None: leave it) are noised where their marks say, as value."""
        numbers, mask, content = marks
        frames, mean, std, scale = self._layout(value)
        levels = self.levels(value).transpose(0, 2, 1)                                  # (units, n, 3)
        for number, twin in enumerate(twins):
            units = np.flatnonzero(numbers == number)
            if twin is not None and len(units):
                values, inside = levels[units], content[units]
                noised = twin.noised_values(values[inside] / 127.5 - 1, mask[units][inside][:, None])
                values[inside] = (noised + 1) * 127.5
                levels[units] = values
            elif twin is None:
                numbers = np.where(numbers == number, -1, numbers)
        normal = (levels.transpose(0, 2, 1) * scale - mean) / std                       # (units, 3, n)
        normal = np.repeat(normal[:, :, None], frames, 2)                               # (units, 3, T, n)
        noised = torch.from_numpy(normal).to(value.dtype).reshape(value.shape)
        unit_dims = 1 if value.ndim == 2 else 3
        touched = torch.from_numpy(numbers >= 0).view(*value.shape[:-unit_dims], *[1] * unit_dims)
        return torch.where(touched, noised, value)


def probe(size, number=None, twin=None):
    """A picture whose red is the twin's mask, green its number + 1 (0: no twin), blue a texture of 192 .. 255."""
    width, height = size
    channels = np.zeros((height, width, 3), dtype=np.uint8)
    channels[..., 2] = np.tile(_TEXTURE, (-(-height // 64), -(-width // 64)))[:height, :width]
    if number is not None:
        channels[..., 0] = np.rint(255 * twin.mask_at(width, height))
        channels[..., 1] = number + 1
    return Image.fromarray(channels)
