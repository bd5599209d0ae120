"""Pictures to look at: what the noise does to one question, and whether it lies on the evidence of eight."""
import argparse
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from utils import inputs
from utils.cli import InputError
from utils.pictures import open_picture

MODES = ("key", "random", "inverse")
QUESTIONS, SIDE, MARGIN = 8, 224, 8             # of a sheet of pairs; pixels of a picture and beside it


def contact_sheet(image, question, attention, mass, ts, path, seed, region, diffuse):
    """Write one picture: original, heat map, and for each region its mask and the noised picture at every t.

    attention (H, W): of the image (PIL). region, diffuse: of `noise.py`. Raises InputError where path cannot
    be written.
    """
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(len(MODES), 3 + len(ts), figsize=(2.1 * (3 + len(ts)), 2.3 * len(MODES)))
    for row, mode in zip(axes, MODES):
        mask = region(attention, mass, mode, seed)
        row[0].imshow(image)
        row[0].set_title(f"{mode}, {mask.mean():.0%} of the area", fontsize=9)
        row[1].imshow(image)
        row[1].imshow(attention, cmap="inferno", alpha=0.7)
        row[1].set_title("attention", fontsize=9)
        row[2].imshow(mask, cmap="gray", vmin=0, vmax=1)
        row[2].set_title(f"mask, mass {mass:g}", fontsize=9)
        for axis, t in zip(row[3:], ts):
            axis.imshow(diffuse(image, t, mask=mask, seed=seed))
            axis.set_title(f"t = {t}", fontsize=9)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.suptitle(question, fontsize=11)
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise InputError(f"--output {path!r} cannot be written ({error}); give the path of a .png "
                         "file") from error
    finally:
        pyplot.close(figure)


def command(argv, default_clip, kinds, open_clip, region, diffuse, parse_t):
    """The command `python noise.py PICTURE QUESTION`. Its functions and constants are arguments."""
    parser = argparse.ArgumentParser(description="Write a contact sheet: the map, masks, noised pictures.")
    parser.add_argument("image", help="a picture")
    parser.add_argument("question", help="the question that guides the attention")
    parser.add_argument("--clip", default=default_clip, help="CLIPModel directory or hub id")
    parser.add_argument("--clip_map", default="auto", choices=kinds, help="the map it makes: ClipAttention")
    parser.add_argument("--mass", type=float, default=0.5, help="share of the attention in the key region")
    parser.add_argument("--t", type=int, nargs="+", default=[300, 500, 700, 999], help="noise steps to show")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="noise_sheet.png")
    args = parser.parse_args(argv)
    if not args.question.strip():
        raise InputError("the question is empty; give the words that say what to look for")
    if not 0 < args.mass <= 1:
        raise InputError(f"--mass is {args.mass}; a number above 0 and at most 1 is expected")
    for t in args.t:
        parse_t(t)
    inputs.refuse_as_output(args.output, image=args.image)
    image = open_picture(args.image)
    attention = open_clip(args.clip, kind=args.clip_map).map(image, args.question)
    contact_sheet(image, args.question, attention, args.mass, args.t, args.output, args.seed, region, diffuse)
    print(f"wrote {args.output}\nnext: python train_cdrl.py --noise_t {args.t[-1]} --mass {args.mass:g}")


def write_pairs(folder, samples, twins_of):
    """Write folder/contact_sheet.png, once: the first questions with a picture, each picture, where the noise
    goes (red), and the noised twin, at the size of the sheet.

    twins_of: function(Q lists of pictures, Q samples) -> Q lists of `noise.NoisedPicture`s.
    """
    path = Path(folder) / "contact_sheet.png"
    chosen, images = [], []
    for sample in (samples[i] for i in range(min(len(samples), 16 * QUESTIONS))):
        if sample.images and len(chosen) < QUESTIONS and not path.exists():
            try:
                images.append(sample.pictures()[:1])
                chosen.append(sample)
            except InputError:              # it is refused, or skipped, at its own step
                pass
    if not chosen:
        return
    rows = [_row(sample.question + " (a control: the noise spares it)" * is_control(twins[0]),
                 pictures[0], twins[0])
            for sample, pictures, twins in zip(chosen, images, twins_of(images, chosen))]
    columns = [rows[:len(rows) // 2], rows[len(rows) // 2:]] if len(rows) > 1 else [rows]
    height = max(sum(row.height for row in column) for column in columns)
    sheet = Image.new("RGB", (sum(column[0].width for column in columns), height), "white")
    for left, column in enumerate(columns):
        top = 0
        for row in column:
            sheet.paste(row, (left * row.width, top))
            top += row.height
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    print(f"wrote {path}; look at it: is the noise on the evidence?")


def is_control(twin):
    """Whether a twin's noise spares the evidence (bool). A fork's twin, a plain picture, does not say."""
    return getattr(twin, "overlap", None) is not None


def _row(question, image, twin):
    """A question in words above its picture, the picture with the noise's place in red, and the twin."""
    scale = SIDE / max(image.size)
    small = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
    is_lazy = hasattr(twin, "mask_at")                  # else a fork's twin, a plain picture
    mask = twin.mask_at(*small.size) if is_lazy else None
    mask = np.ones((small.height, small.width)) if mask is None else mask
    red = Image.composite(Image.new("RGB", small.size, "red"), small,
                          Image.fromarray(np.rint(mask * 140).astype(np.uint8)))
    noised = twin.at_size(small.size) if is_lazy else twin.resize(small.size)
    words = textwrap.wrap(" ".join(question.split()), 100)[:3]
    top = 14 * (len(words) + 1)
    row = Image.new("RGB", (3 * (SIDE + MARGIN) + MARGIN, top + small.height + MARGIN), "white")
    ImageDraw.Draw(row).multiline_text((MARGIN, 4), "\n".join(words), fill="black", font_size=12)
    for i, picture in enumerate((small, red, noised)):
        row.paste(picture.convert("RGB"), (MARGIN + i * (SIDE + MARGIN), top))
    return row
