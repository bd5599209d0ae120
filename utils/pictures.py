"""Picture files as a viewer shows them: upright, on a white ground, in sRGB, the first frame of an
animation."""
import hashlib
import io
import math
import os
import re
import stat
import warnings
from collections import Counter
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms, ImageOps

from utils.cli import InputError, reason

MAX_PIXELS = 2**26  # decoded at once, 268 MB; larger JPEGs are decoded at a half, a quarter or an eighth
# Fewer bytes than that hold no picture, whatever packs them: deflate reaches 1,032 to 1.
PLAUSIBLE_PIXELS, PIXELS_A_BYTE = 2**20, 1000
MAX_RATIO = 200             # what the models' processors take
# These hand the file to another program or need a plugin that is not part of Pillow.
UNSAFE_FORMATS = {"EPS", "WMF", "GRIB", "BUFR", "HDF5", "FPX", "MIC", "MPEG"}
UNREADABLE = (OSError, ValueError, SyntaxError, RuntimeError, TypeError, LookupError, ArithmeticError,
              AttributeError,
              AssertionError, Image.DecompressionBombError)


def open_header(source):
    """A path or the bytes of a file -> PIL image whose pixels are not decoded yet. Raises one of
    UNREADABLE."""
    if not isinstance(source, bytes) and not stat.S_ISREG(os.stat(source).st_mode):
        raise ValueError("it is no regular file")           # a FIFO or a device would wait for ever
    Image.init()
    with warnings.catch_warnings():
        # of odd tags, and of sizes, for which `load_picture` has its own bound
        warnings.simplefilter("ignore")
        return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source,
                          formats=sorted({*Image.OPEN} - UNSAFE_FORMATS))


def shown_size(source):
    """(width, height) of a picture as `load_picture` returns it, from the file's header. Where its end looks
    cut off, it is decoded. A file that has not changed is read once. Raises one of UNREADABLE."""
    if isinstance(source, bytes):
        return _shown_size(source)
    status = os.stat(source)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is no regular file")
    return _shown_size_of_file(str(source), status.st_mtime_ns, status.st_size)


@lru_cache(2**20)
def _shown_size_of_file(path, changed, size):
    return _shown_size(path)


def _shown_size(source):
    if _looks_cut_off(source):
        return load_picture(source).size
    with open_header(source) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _check_shape(file)
        turned = file.getexif().get(0x0112, 1) in (5, 6, 7,
                                                   8) and file.format != "TIFF"  # Pillow turns a TIFF itself
        return file.size[::-1] if turned else file.size


def _looks_cut_off(source):
    """Whether the end of a JPEG, PNG, GIF or WebP file is missing, as after a broken transfer."""
    with (io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")) as file:
        begin, size = file.read(12), file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 4096))
        end = file.read()
    if begin.startswith(b"RIFF"):
        return 8 + int.from_bytes(begin[4:8], "little") > size
    marks = {b"\xff\xd8": b"\xff\xd9", b"\x89P": b"IEND", b"GI": b"\x3b"}
    return marks.get(begin[:2], b"") not in end


def load_picture(source, enough=None):
    """A path or the bytes of a file -> RGB image, as a viewer shows it. Raises one of UNREADABLE.

    enough: a number of pixels that the caller can use. A JPEG with more than twice as many is decoded at a
    half, a quarter or an eighth of its size, which is faster and never leaves fewer than twice that number.
    """
    with open_header(source) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _check_shape(file)
        scale = next((s for s in (8, 4, 2) if enough and file.width * file.height >= 2 * enough * s * s), 1)
        while file.width * file.height > MAX_PIXELS * scale * scale and scale < 8:
            scale *= 2
        if scale > 1:
            file.draft(None, (file.width // scale, file.height // scale))  # only JPEG's decoder shrinks
        if file.width * file.height > MAX_PIXELS:
            raise ValueError(f"{file.width} x {file.height} pixels are more than {MAX_PIXELS:,}; shrink it")
        file.load()
        zero_is_white = getattr(file, "tag_v2", {}).get(262) == 0                       # TIFF
        return _on_white(ImageOps.exif_transpose(file), zero_is_white)


def open_picture(path):
    """`load_picture` of a path that a user typed. Raises InputError."""
    if not os.path.isfile(path):
        raise InputError(f"image {str(path)!r} does not exist")
    try:
        return load_picture(path)
    except UNREADABLE as error:
        raise InputError(f"image {str(path)!r} cannot be read ({reason(error)})") from error


def limited_size(size, least=0, most=0):
    """(width, height) of the same shape with at least and at most so many pixels (0: no bound)."""
    area = size[0] * size[1]
    bound = most if most and area > most else least if area < least else area
    if bound == area:
        return size
    scale, rounded = math.sqrt(bound / area), math.floor if bound < area else math.ceil
    return tuple(max(1, rounded(side * scale)) for side in size)


def resized(image, size):
    """A PIL image at another size, resampled once."""
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)


def _check_shape(file):
    """Refuse what no processor takes, and a few bytes that claim many pixels. Raises ValueError."""
    pixels = file.width * file.height
    if file.fp is not None:
        place = file.fp.tell()
        size = file.fp.seek(0, os.SEEK_END)
        file.fp.seek(place)
        if pixels > PLAUSIBLE_PIXELS + PIXELS_A_BYTE * size:
            raise ValueError(f"{file.width} x {file.height} pixels from {size:,} bytes: it is blank, or made "
                             "to fill the memory")
    if max(file.size) > MAX_RATIO * min(file.size):
        raise ValueError(f"{file.width} x {file.height} pixels, longer than {MAX_RATIO} times its breadth")


def _on_white(image, zero_is_white=False):
    """Any mode -> RGB: deep greys to 8 bits, colours through the file's profile, transparency on a white
    ground."""
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image, zero_is_white)
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    elif image.mode in ("P", "1", "YCbCr", "RGBX"):
        image = image.convert("RGB")
    image = _to_srgb(image)
    return image if alpha is None else Image.composite(image, Image.new("RGB", image.size, "white"), alpha)


def _eight_bits(image, zero_is_white):
    """A grey picture of 16 or 32 bits or of floats -> L, or LA where one grey stands for transparent.

    16 bits: the full range is black to white. 32 bits and floats have no agreed white. It is the smallest of
    1 (floats), 255, 65,535 that no pixel exceeds; beyond those, or below 0, the darkest pixel is black and
    the brightest white.
    """
    sixteen = image.mode.startswith("I;16")
    values = np.asarray(image).astype(np.float64)
    finite = np.isfinite(values)
    low, high = (values[finite].min(), values[finite].max()) if finite.any() else (0.0, 0.0)
    if sixteen:
        low, high = 0.0, 65535.0
    elif low >= 0 and high <= 65535:
        low, high = 0.0, next(white for white in (1.0, 255.0, 65535.0) if high <= white
                              and (image.mode == "F" or white > 1))
    scaled = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) * (255 / (high - low)
                                                                                if high > low else 0)
    if zero_is_white:
        scaled = 255 - scaled
    grey = Image.fromarray(np.rint(scaled).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey = Image.merge("LA", (grey, Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))))
    grey.info["icc_profile"] = image.info.get("icc_profile")
    return grey


def _to_srgb(image):
    """Colours by the file's ICC profile -> RGB. A profile that cannot be used is ignored, as viewers do."""
    profile = image.info.get("icc_profile")
    if image.mode == "LAB":
        return ImageCms.profileToProfile(image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"),
                                         outputMode="RGB")
    flat = image.convert("RGB") if image.mode in ("RGBA", "LA") else image
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "sRGB" not in ImageCms.getProfileDescription(source):
                return ImageCms.profileToProfile(flat, source, ImageCms.createProfile("sRGB"),
                                                 outputMode="RGB",
                                                 renderingIntent=ImageCms.getDefaultIntent(source))
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            pass
    return flat if flat.mode == "RGB" else flat.convert("RGB")


class LazyTwin(Image.Image):
    """A changed twin of a picture, of its size, whose pixels are made when they are first looked at.

    source: PIL image. mask: how much of the change shows, (H, W) float array in [0, 1], or None for all of
    it. A subclass says in `render` what the twin's own pixels are (PIL image).
    """

    def __init__(self, source, mask=None):
        super().__init__()
        self._mode, self._size = source.mode, source.size  # as Pillow's own pictures that load lazily
        self.source, self.mask = source, mask

    def mask_picture(self, size):
        """The mask as an 8-bit grey picture of a size (width, height)."""
        if self.mask is None:
            return Image.new("L", size, 255)
        mask = Image.fromarray(np.rint(self.mask * 255).astype(np.uint8))
        return mask if mask.size == size else mask.resize(size, Image.Resampling.BILINEAR)

    def mask_at(self, width, height):
        """The mask as (height, width) float array in [0, 1], None for everywhere."""
        if self.mask is None or self.mask.shape == (height, width):
            return self.mask
        return np.asarray(self.mask_picture((width, height)), dtype=np.float64) / 255

    def at_size(self, size):
        """The same twin of the source at another size."""
        make, (source, *rest) = self.__reduce__()
        return make(resized(source, size), *rest)

    def load(self):
        if self._im is None:
            self.im = self.render().im
        return super().load()


def groups_by_picture(samples):
    """Which questions share a picture, by its content or by meta["image_id"], also by way of others -> a
    number each (list).

    samples: have .images (paths, bytes or PIL images) and .meta. Only files of one size are read and
    compared.
    """
    sizes = Counter(os.path.getsize(image) for image in {image for s in samples for image in s.images
                                                         if not isinstance(image, (bytes, Image.Image))}
                    if os.path.isfile(image))

    def identity(image):
        if isinstance(image, Image.Image):
            return hashlib.sha256(image.tobytes()).digest()
        if isinstance(image, bytes):
            return hashlib.sha256(image).digest()
        if not os.path.isfile(image) or sizes[os.path.getsize(image)] == 1:
            return os.path.realpath(image)
        return _content(os.path.realpath(image))
    leader = list(range(len(samples)))

    def root(i):
        while leader[i] != i:
            leader[i] = i = leader[leader[i]]
        return i
    first = {}
    for i, s in enumerate(samples):
        keys = [("picture", identity(image)) for image in s.images]
        keys += [("id", str(s.meta["image_id"]))] if "image_id" in s.meta else []
        for key in keys:
            leader[root(i)] = root(first.setdefault(key, i))
    return [root(i) for i in range(len(samples))]


@lru_cache(2**17)
def _content(path):
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def unreadable(image, error):
    """What an error of `load_picture(image)` says of a path or of the bytes of a file (str)."""
    name = f"of {len(image)} bytes" if isinstance(image, bytes) else repr(str(image))
    if isinstance(image, bytes) and len(image) < 192:               # 255 characters, the longest name
        name += ", or a long name of a file that does not exist,"
    why = re.sub(r" <_io\.BytesIO[^>]*>", "", reason(error))  # its address differs from time to time
    return f"image {name} cannot be read ({why})"


def shrunk(image, longest):
    """A PIL image whose longer side has at most `longest` pixels; None leaves it."""
    scale = (longest or max(image.size)) / max(image.size)
    size = [max(1, round(side * scale)) for side in image.size]
    return image if scale >= 1 else image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
