"""What a model's vision tower gets of a picture, and noise put exactly there.

Processors resize, cut into tiles, pad, and order patches, each class in its own way. None of that is repeated
here. A probe picture, whose channels hold the noise mask, the picture's number and a texture, goes through
the model's own processor, and tells for each value of the real picture where it came from.
"""
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from utils.cli import InputError

RAW = dict(do_rescale=False, do_normalize=False)            # a probe stays at levels of 8 bits
SPARSE = 3                      # every third value of a unit tells whose it is
MAX_TWINS = 250                 # numbers that fit into the channel of a probe
CONTENT = 160  # above it a probe's blue is texture, which is at least 192; padding is black or a mean
_TEXTURE = np.random.default_rng(0).integers(192, 256, (64, 64), dtype=np.uint8)


class Sight:
    """A processor that puts noise where the vision tower looks. Call it as the processor.

    A noised twin is told by its `noised_values` (`noise.NoisedPicture`). Where the processor leaves a picture
    as it is, the twin's own pixels are used. Else the values that the tower would get of the twin's source
    are noised.
    """

    def __init__(self, processor):
        self.processor = processor
        self.unchanged = {}  # (width, height) -> whether the processor leaves such a picture as it is

    def __call__(self, texts, images, **settings):
        """Texts and as many lists of pictures -> the model's inputs (dict of tensors). InputError where the
        processor refuses them."""
        twins = [image for pictures in images for image in pictures if hasattr(image, "noised_values")
                 and image.t > 0]
        twins = [twin for twin in twins if not self.unchanged.get(twin.size)]
        places = []                                     # of each batch: pixel values' name, and `_places`
        for batch in (twins[first:first + MAX_TWINS] for first in range(0, len(twins), MAX_TWINS)):
            numbers = {id(twin): i for i, twin in enumerate(batch)}
            probes = self._run(texts, images, settings | RAW,
                               lambda image, of=numbers: probe(image.size, of.get(id(image)), image))
            places += [(name, self._places(value, batch)) for name, value in probes.items()
                       if is_pixels(name)]
        resized = {id(twin) for twin in twins if not self.unchanged[twin.size]}
        inputs = self._run(texts, images, settings, lambda image: image.source if id(image) in resized
                           else image)
        for name, place in places:
            for twin, *where in place:
                if id(twin) in resized:
                    inputs[name] = self._noised(inputs[name], twin, *where)
        return inputs

    def _run(self, texts, images, settings, picture_of):
        nested = [[picture_of(image) for image in pictures] for pictures in images]
        try:
            return dict(self.processor(text=texts, images=nested if any(nested) else None, padding=True,
                                       return_tensors="pt", **settings))
        except InputError:              # of a picture that is read only now
            raise
        except ValueError as error:     # some classes take no prompt without a picture, or not beside others
            name = type(self.processor).__name__
            raise InputError(f"{name} does not take these prompts: {error}") from error

    def levels(self, value):
        """Pixel values as the processor makes them -> float32 array (units, 3, n) of 8-bit levels.

        A unit is a tile, a patch or a column of it. The T frames that repeat a picture are read once."""
        mean, std, scale = self._normalisation()
        return (self._units(value.contiguous())[:, :, 0].float().numpy() * std + mean) / scale

    def _units(self, value):
        """Contiguous pixel values -> (units, 3, T, n), a view."""
        images = self.processor.image_processor
        if value.ndim == 2:                                         # patches (N, C * T * P * P): Qwen, GLM
            frames = getattr(images, "temporal_patch_size", 1)
            return value.view(len(value), 3, frames, -1)
        if value.ndim == 3:                                         # patches (B, N, P * P * C): Gemma 4
            return value.view(-1, value.shape[-1] // 3, 3).transpose(1, 2)[:, :, None]
        if value.shape[-2] == getattr(images, "patch_size", None) != value.shape[-1]:
            return value.flatten(0, -4)[0].permute(2, 0, 1)[:, :,
                                                            # columns of patches (1, C, P, N * P): MiniCPM
                                                            None]
        return value.view(-1, 3, 1, value.shape[-2] * value.shape[-1])          # tiles (.., C, H, W)

    def _normalisation(self):
        """Mean and std of the channels, (3, 1) each, and the scale of levels before them."""
        images = self.processor.image_processor
        mean, std = (images.image_mean, images.image_std) if images.do_normalize else (0, 1)
        mean, std = (np.broadcast_to(np.float32(x), 3)[:, None] for x in (mean, std))
        return mean, std, images.rescale_factor if images.do_rescale else 1.0

    def _places(self, value, twins):
        """A probe's pixel values -> for each twin (twin, its noised units (u,), where they show it and not
        padding (u, n), mask there (., 1)). Learns which sizes of pictures the processor leaves as they
        are."""
        every_unit = self._units(value.contiguous())[:, :, 0]                           # (units, 3, n)
        sparse = every_unit[:, :, ::SPARSE].float().numpy()
        green = np.rint(sparse[:, 1]).astype(int)
        counted = (sparse[:, 2] > CONTENT) & (abs(sparse[:, 1] - green) < 0.3)
        counted &= (green >= 0) & (green <= len(twins))
        votes = np.arange(len(green))[:, None] * (len(twins) + 1) + green  # a unit's number is its pixels'
        votes = np.bincount(votes[counted], minlength=len(green) * (len(twins) + 1)).reshape(len(green), -1)
        numbers = votes.argmax(1) - 1
        if not {*range(len(twins))} <= {*numbers.tolist()}:
            raise InputError(f"{type(self.processor).__name__} arranges pixels in a way that is not known "
                             f"here, so that noise "
                             "cannot be put on what the vision tower gets; use another model")
        places = []
        for number, twin in enumerate(twins):
            units = np.flatnonzero(numbers == number)
            levels = every_unit[units].float().numpy()
            if twin.size not in self.unchanged:
                self.unchanged[twin.size] = _is_texture(levels[:, 2], twin.size)
            noised = levels[:, 0].max(1) > 0.5                      # others hold nothing of the region
            levels = levels[noised]
            content = levels[:, 2] > CONTENT
            places.append((twin, units[noised], content, (levels[:, 0][content][:, None] / 255).clip(0, 1)))
        return places

    def _noised(self, value, twin, units, content, mask):
        """Pixel values with one twin's units noised."""
        mean, std, scale = self._normalisation()
        value = value.contiguous()
        every_unit = self._units(value)
        levels = (every_unit[units, :, 0].float().numpy() * std + mean) / scale          # (u, 3, n)
        levels = np.ascontiguousarray(levels.transpose(0, 2, 1))
        levels[content] = (twin.noised_values(levels[content] / 127.5 - 1, mask) + 1) * 127.5
        normal = torch.from_numpy((levels.transpose(0, 2, 1) * scale - mean) / std)
        every_unit[units] = normal[:, :, None].to(value.dtype).expand(-1, -1, every_unit.shape[2], -1)
        return value


def is_pixels(name):
    return name.startswith("pixel_values")


def probe(size, number=None, twin=None):
    """A picture whose red is the twin's mask, green its number + 1 (0: no twin), blue a texture of 192 ..
    255."""
    red = Image.new("L", size) if number is None else twin.mask_picture(size)
    return Image.merge("RGB", (red, Image.new("L", size, 0 if number is None else number + 1),
                               _texture(size)))


@lru_cache(16)
def _texture(size):
    width, height = size
    return Image.fromarray(np.tile(_TEXTURE, (-(-height // 64), -(-width // 64)))[:height, :width])


def _is_texture(blue, size):
    """Whether these levels of blue are a probe's texture, in any order: no pixel was resized, cut off or
    repeated."""
    return blue.size == size[0] * size[1] and np.array_equal(
        np.bincount(np.rint(blue).astype(int).ravel(), minlength=256), np.array(_texture(size).histogram()))
