"""Five ways to take the evidence out of a picture, at five severities each: one that training uses, four that
it never saw.

The kinds follow ImageNet-C (Hendrycks and Dietterich, arXiv 1903.12261). Lengths are shares of the picture's
longer side, so that a severity means the same at any size. Severity 5 leaves nothing to read on the built-in
pictures.
"""
import numpy as np
from PIL import Image, ImageFilter

SEVERITIES = (1, 2, 3, 4, 5)
DIFFUSION_STEPS = (300, 500, 700, 850, 999)             # t of the DDPM forward process
BLUR = (0.01, 0.02, 0.035, 0.06, 0.1)                   # sigma, of the longer side
COVERED = (0.2, 0.4, 0.6, 0.8, 1.0)                     # share of the cells of an 8 x 8 grid that are filled
CELLS = (48, 32, 20, 12, 6)                             # mosaic tiles along the longer side
FOG = (0.3, 0.5, 0.7, 0.85, 0.95)                       # how much of the light is the fog's
GRID, FOG_LEVEL, FOG_DEPTH = 8, 225.0, 20.0             # fog is light grey, with slow waves of this depth


def blur(pixels, severity, rng):
    """Gaussian blur of (H, W, 3) float pixels in [0, 255]."""
    sigma = BLUR[severity - 1] * max(pixels.shape[:2])
    return np.asarray(_picture(pixels).filter(ImageFilter.GaussianBlur(sigma)), dtype=np.float64)


def occlusion(pixels, severity, rng):
    """Cells of a grid, drawn at random, filled with the picture's mean colour; severity 5 fills all."""
    filled = np.zeros(GRID * GRID, bool)
    filled[rng.permutation(GRID * GRID)[:round(COVERED[severity - 1] * GRID * GRID)]] = True
    height, width = pixels.shape[:2]
    cell = (np.arange(height) * GRID // height)[:,
                                                None] * GRID + np.arange(width) * GRID // width  # (H, W)
    return np.where(filled[cell][..., None], pixels.mean((0, 1)), pixels)


def pixelation(pixels, severity, rng):
    """A mosaic: the mean colour of each tile."""
    height, width = pixels.shape[:2]
    share = CELLS[severity - 1] / max(height, width)
    if share >= 1:                      # the picture has no more pixels than that
        return pixels
    small = _picture(pixels).resize((max(1, round(width * share)), max(1, round(height * share))),
                                    Image.Resampling.BOX)
    return np.asarray(small.resize((width, height), Image.Resampling.NEAREST), dtype=np.float64)


def fog(pixels, severity, rng):
    """Blended with a light grey haze of slow waves: low contrast."""
    height, width = pixels.shape[:2]
    waves = Image.fromarray(rng.uniform(-1, 1, (4, 4)).astype(np.float32)).resize((width, height),
                                                                                  Image.Resampling.BICUBIC)
    haze = FOG_LEVEL + FOG_DEPTH * np.asarray(waves, dtype=np.float64)[..., None]
    return pixels + FOG[severity - 1] * (haze - pixels)


UNTRAINED = {"blur": blur, "occlusion": occlusion, "pixelation": pixelation, "fog": fog}
NAMES = ("noise", *UNTRAINED)


def corrupt(image, name, severity, diffuse, *, mask=None, seed=0):
    """A picture with a corruption on it; same size and mode, transparency left alone.

    name: one of NAMES; "noise" is diffuse(image, t, mask=mask, seed=seed), `noise.diffuse`. severity: 1 to 5,
    0 = a copy. mask (H, W) in [0, 1]: how much of the corrupted picture shows, default 1 everywhere.
    ValueError for what does not fit.
    """
    if name not in NAMES or severity not in (0, *SEVERITIES):
        raise ValueError(f"corruption {name!r} at severity {severity!r}; one of {', '.join(NAMES)} at 0 to "
                         f"5 is expected")
    if mask is not None and mask.shape != (image.height, image.width):
        raise ValueError(f"mask has shape {mask.shape}; the image needs {(image.height, image.width)}")
    if severity == 0:
        return image.copy()
    if name == "noise":
        return diffuse(image, DIFFUSION_STEPS[severity - 1], mask=mask, seed=seed)
    before = np.asarray(image.convert("RGB"), dtype=np.float64)
    after = UNTRAINED[name](before, severity, np.random.default_rng(seed))
    if mask is not None:
        after = before + (after - before) * mask[..., None]
    result = _picture(after).convert(image.mode)
    if "A" in image.getbands():
        result.putalpha(image.getchannel("A"))
    return result


def _picture(pixels):
    return Image.fromarray(np.rint(pixels.clip(0, 255)).astype(np.uint8), "RGB")
