"""A picture of what the noise does to one question: the map, each region's mask, the noised pictures."""
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from utils.cli import InputError

MODES = ("key", "random", "inverse")


def contact_sheet(image, question, attention, mass, ts, path, seed, region, diffuse):
    """Write one picture: original, heat map, and for each region its mask and the noised picture at every t.

    attention (H, W): of the image (PIL). region, diffuse: of `noise.py`. Raises InputError where path cannot
    be written.
    """
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
