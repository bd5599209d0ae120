"""A picture file reaches the model as a viewer shows it."""
import io
import random
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

import data
from utils import pictures
from utils.cli import InputError

COLOURS = ((250, 20, 20), (20, 20, 250), (240, 240, 30), (20, 200, 40))


def saved(image, kind, **settings):
    stream = io.BytesIO()
    image.save(stream, kind, **settings)
    return stream.getvalue()


def board(width=64, height=48):
    """Four colours, so that every orientation looks different."""
    image = Image.new("RGB", (width, height))
    for i, colour in enumerate(COLOURS):
        left, top = (i % 2) * width // 2, (i // 2) * height // 2
        image.paste(colour, (left, top, left + width // 2, top + height // 2))
    return image


def close(shown, expected, tolerance=3.0):
    """Whether two RGB pictures agree away from compression's edges."""
    a, b = (np.asarray(picture, dtype=float) for picture in (shown, expected))
    return a.shape == b.shape and np.median(np.abs(a - b)) <= tolerance and np.abs(a - b).mean() <= 3 * tolerance


def upright(image, orientation):
    """What a viewer shows of pixels with an EXIF orientation, by the standard's own table of where row 0 and
    column 0 lie."""
    pixels = np.asarray(image)
    turned = {1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1], 5: pixels.transpose(1, 0, 2),
              6: pixels[::-1].transpose(1, 0, 2), 7: pixels[::-1, ::-1].transpose(1, 0, 2),
              8: pixels[:, ::-1].transpose(1, 0, 2)}
    return Image.fromarray(np.ascontiguousarray(turned[orientation]))


def generated(rng):
    """(bytes, what a viewer shows) of one file: format x mode x orientation x size."""
    kind = rng.choice(["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"])
    image = board(rng.randrange(24, 300), rng.randrange(24, 300))
    orientation = rng.randrange(1, 9) if kind in ("JPEG", "PNG", "WEBP", "TIFF") else 1
    modes = {"JPEG": ["RGB", "L", "CMYK"], "PNG": ["RGB", "L", "RGBA", "LA", "P", "1", "P+", "RGB+", "I;16"],
             "WEBP": ["RGB", "RGBA"], "TIFF": ["RGB", "L", "RGBA", "CMYK", "I;16", "I", "F", "1"], "GIF": ["P", "P+", "L"],
             "BMP": ["RGB", "L", "1"]}
    mode, settings = rng.choice(modes[kind]), {}
    pixels = np.asarray(image).astype(float)
    if mode in ("RGBA", "LA"):
        alpha = Image.linear_gradient("L").resize(image.size)
        source = image.convert(mode)
        source.putalpha(alpha)
        weight = np.asarray(alpha)[..., None] / 255
        ground = pixels if mode == "RGBA" else np.asarray(image.convert("L").convert("RGB"))
        shown = ground * weight + 255 * (1 - weight)
    elif mode in ("P+", "RGB+"):                # one colour is transparent
        source = image.quantize(8) if mode == "P+" else image
        settings["transparency"] = source.getpixel((2, 2)) if mode == "P+" else COLOURS[0]
        shown = np.asarray(source.convert("RGB")).astype(float)
        shown[(shown == shown[2, 2]).all(-1)] = 255
    elif mode in ("I;16", "I", "F"):
        grey = np.tile(np.linspace(0, 1, image.width), (image.height, 1))
        source = Image.fromarray({"I;16": (grey * 65535).astype(np.uint16), "I": (grey * 1e6).astype(np.int32),
                                  "F": grey.astype(np.float32)}[mode])
        shown = np.repeat(255 * grey[..., None], 3, 2)
    else:
        source = image.quantize(8) if mode == "P" else image.convert(mode)
        shown = np.asarray(source.convert("RGB"))
    if orientation > 1:
        settings["exif"] = Image.Exif()
        settings["exif"][0x0112] = orientation
    if kind == "JPEG":
        settings["quality"] = 95
    if kind == "WEBP":
        settings |= {"lossless": True, "exact": True}
    shown = Image.fromarray(np.rint(shown).astype(np.uint8))
    return f"{kind} {mode} {orientation} {image.size}", saved(source, kind, **settings), upright(shown, orientation)


def test_three_hundred_files_are_what_a_viewer_shows():
    rng = random.Random(0)
    for _ in range(300):
        name, content, expected = generated(rng)
        shown = data.Sample("q", [content], "?").pictures()[0]
        assert shown.mode == "RGB" and close(shown, expected), name
        assert pictures.shown_size(content) == shown.size, name


def test_transparent_edges_do_not_darken():
    """A black ground under transparent pixels must not bleed into what is shown."""
    image = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (10, 10, 30, 30))
    shown = pictures.load_picture(saved(image, "PNG"))
    assert shown.getpixel((2, 2)) == (255, 255, 255) and shown.getpixel((20, 20)) == (255, 0, 0)
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    assert pictures.load_picture(saved(half, "PNG")).getpixel((3, 3)) == (255, 127, 127)


def test_a_profile_that_swaps_colours_is_followed():
    """An sRGB profile whose red and green primaries trade places: a viewer shows green where the file says
    red."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count, tags = struct.unpack(">I", profile[128:132])[0], {}
    for i in range(count):
        start = 132 + 12 * i
        tags[bytes(profile[start:start + 4])] = start
    red, green = tags[b"rXYZ"], tags[b"gXYZ"]
    profile[red:red + 4], profile[green:green + 4] = b"gXYZ", b"rXYZ"
    content = bytes(profile).replace("sRGB".encode("utf-16-be"), "odd ".encode("utf-16-be"))
    shown = pictures.load_picture(saved(Image.new("RGB", (8, 8), (255, 0, 0)), "PNG", icc_profile=content))
    red, green, blue = shown.getpixel((3, 3))
    assert green > 240 and red < 20
    junk = saved(Image.new("RGB", (8, 8), "red"), "PNG", icc_profile=b"junk")
    assert pictures.load_picture(junk).getpixel((3, 3)) == (255, 0, 0)


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "green", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        content = saved(frames[0], kind, save_all=True, append_images=frames[1:])
        red, green, blue = pictures.load_picture(content).getpixel((5, 5))
        assert red > 240 and max(green, blue) < 15, kind


def test_a_sixteen_bit_grey_that_is_transparent_and_a_tiff_whose_zero_is_white():
    ramp = Image.fromarray(np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (8, 1)))
    clear = int(np.asarray(ramp)[0, 0])
    shown = np.asarray(pictures.load_picture(saved(ramp, "PNG", transparency=clear)))
    assert (shown[:, 0] == 255).all() and shown[0, 1, 0] < 10
    inverted = np.asarray(pictures.load_picture(saved(ramp, "TIFF", tiffinfo={262: 0})))[0, :, 0]
    assert inverted[0] > 250 and inverted[-1] < 5


def test_large_jpegs_are_decoded_small_and_look_the_same():
    image = board(1600, 1200)
    content = saved(image, "JPEG", quality=95)
    small = pictures.load_picture(content, enough=100_000)
    assert small.size == (800, 600) or small.size == (400, 300)
    assert small.width * small.height >= 200_000 / 2 and close(small, image.resize(small.size))
    assert pictures.load_picture(content).size == (1600, 1200)
    turned = Image.Exif()
    turned[0x0112] = 6
    assert pictures.load_picture(saved(image, "JPEG", exif=turned), enough=100_000).size == small.size[::-1]


def test_too_many_pixels_are_refused_before_they_are_decoded(monkeypatch):
    content = saved(board(300, 200), "PNG")
    monkeypatch.setattr(pictures, "MAX_PIXELS", 50_000)
    with pytest.raises(InputError, match="300 x 200 pixels are more than 50,000; shrink it"):
        data.Sample("q", [content], "?").pictures()
    assert data.Sample("q", [saved(board(300, 200), "JPEG")], "?").pictures()[0].size == (150, 100)  # a JPEG shrinks


def test_postscript_is_never_run():
    """Pillow hands EPS to Ghostscript."""
    with pytest.raises(InputError, match="cannot be read"):
        data.Sample("q", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"], "?").pictures()


def test_fuzzed_files_raise_input_errors_only():
    rng = random.Random(2)
    for _ in range(400):
        content = bytearray(generated(rng)[1])
        for _ in range(rng.randrange(1, 6)):
            content[rng.randrange(min(len(content), 400))] = rng.randrange(256)
        sample = data.Sample("q", [bytes(content[:rng.randrange(1, len(content) + 1)])], "?")
        for look in (sample.pictures, sample.picture_sizes):
            try:
                look()
            except InputError as error:
                assert "question 'q': image of" in str(error) and "\n" not in str(error)
