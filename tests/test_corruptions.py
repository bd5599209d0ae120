"""Corruptions against their definitions, and what all of them share."""
import numpy as np
import pytest
from PIL import Image

import data
from noise import diffuse
from utils import corruptions
from utils.corruptions import NAMES, SEVERITIES, UNTRAINED, corrupt


@pytest.fixture(scope="module")
def picture():
    return data.synthetic("test", 0, 3).pictures()[0].convert("RGB")


def array(image):
    return np.asarray(image, dtype=np.float64)


@pytest.mark.parametrize("name", NAMES)
def test_each_severity_leaves_less(picture, name):
    """The mean squared distance from the picture grows with the severity, over four seeds; 0 is a copy."""
    distance = [np.mean([(array(corrupt(picture, name, severity, diffuse, seed=seed)) - array(picture)) ** 2
                         for seed in range(4)]) for severity in (0, *SEVERITIES)]
    assert distance[0] == 0 and all(a < b for a, b in zip(distance, distance[1:]))


@pytest.mark.parametrize("name", NAMES)
def test_a_mask_blends_and_a_seed_decides(picture, name):
    mask = np.zeros((picture.height, picture.width))
    mask[:40, :50] = 1
    mask[40:60, :50] = 0.5
    everywhere, masked = (array(corrupt(picture, name, 4, diffuse, mask=m, seed=7)) for m in (None, mask))
    before = array(picture)
    assert (masked[mask == 0] == before[mask == 0]).all()
    assert (masked[mask == 1] == everywhere[mask == 1]).all()
    if name != "noise":         # which is clamped after it is blended
        assert abs(masked - (before + everywhere) / 2)[mask == 0.5].max() <= 1
    again, other = (array(corrupt(picture, name, 4, diffuse, seed=seed)) for seed in (7, 8))
    assert (again == everywhere).all() and (other == everywhere).all() == (name in ("blur", "pixelation"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_size_mode_and_transparency_stay(picture, name, mode):
    image = picture.resize((90, 41)).convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    result = corrupt(image, name, 5, diffuse, seed=1)
    assert result.size == image.size and result.mode == mode
    if mode == "RGBA":
        assert result.getchannel("A").tobytes() == image.getchannel("A").tobytes()


def test_pixelation_is_the_mean_of_each_tile():
    pixels = np.random.default_rng(0).integers(0, 256, (48, 96, 3)).astype(np.float64)
    found = corruptions.pixelation(pixels, SEVERITIES[3], None)             # 12 tiles along 96 pixels: 8 x 8 each
    tiles = pixels.reshape(6, 8, 12, 8, 3).mean((1, 3)).repeat(8, 0).repeat(8, 1)
    assert abs(found - tiles).max() <= 1               # Pillow rounds rows, then columns
    assert (corruptions.pixelation(pixels[:20, :30], 1, None) == pixels[:20, :30]).all()        # fewer pixels than tiles


def test_occlusion_fills_its_share_with_the_mean_colour():
    pixels = np.random.default_rng(0).uniform(0, 255, (64, 64, 3))
    for severity, share in zip(SEVERITIES, corruptions.COVERED):
        found = corruptions.occlusion(pixels, severity, np.random.default_rng(1))
        filled = (found == pixels.mean((0, 1))).all(-1)
        assert filled.mean() == pytest.approx(round(share * 64) / 64) and (found[~filled] == pixels[~filled]).all()


def test_blur_is_a_gaussian_of_the_stated_width():
    """A white column spreads to the sigma of the table, at any size of the picture."""
    for side in (100, 300):
        pixels = np.zeros((side, side, 3))
        pixels[:, side // 2 - 1:side // 2 + 1] = 255
        row = corruptions.blur(pixels, 4, None)[side // 2, :, 0]
        sigma = np.sqrt((row * (np.arange(side) - (side - 1) / 2) ** 2).sum() / row.sum())
        assert sigma == pytest.approx(0.06 * side, rel=0.15)


def test_fog_lowers_the_contrast_by_its_share():
    pixels = np.random.default_rng(0).uniform(0, 255, (64, 64, 3))
    for severity, share in zip(SEVERITIES, corruptions.FOG):
        found = corruptions.fog(pixels, severity, np.random.default_rng(2))
        haze = (found - (1 - share) * pixels) / share
        assert np.allclose(haze, haze[..., :1]) and abs(haze - corruptions.FOG_LEVEL).max() < 1.5 * corruptions.FOG_DEPTH


@pytest.mark.parametrize("name, severity, mask", [("rain", 1, None), ("blur", 6, None), ("fog", 2.5, None),
                                                  ("fog", 1, np.ones((2, 2)))])
def test_what_does_not_fit_is_refused(picture, name, severity, mask):
    with pytest.raises(ValueError, match="expected|needs"):
        corrupt(picture, name, severity, diffuse, mask=mask)


def test_four_kinds_were_never_trained_on():
    assert len(NAMES) == 5 and set(UNTRAINED) == set(NAMES) - {"noise"}
