"""Noise reaches the vision tower of every family as the diffusion that was asked for, at the tower's own
resolution."""
import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image
from test_models import FAMILIES, NEEDS_TORCHVISION, paligemma2, pixels_of, write

import noise
from vlm import VLM

# as test_models.py: without torchvision some classes cannot be opened
OPEN = [family for family in FAMILIES if importlib.util.find_spec("torchvision") or family not in NEEDS_TORCHVISION]


def photo(width, height, seed=0):
    """A smooth picture, which shrinking leaves smooth."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(90, 166, (4, 4, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module", params=[*OPEN, paligemma2], ids=lambda family: family.__name__)
def vlm(request, tmp_path_factory):
    return VLM.load(write(request.param, tmp_path_factory.mktemp(request.param.__name__)), "cpu")


def levels(vlm, images):
    """Scaled to [-1, 1]: what the tower gets of prompts with one picture each, (units, 3, n)."""
    inputs = vlm.encode([[image] for image in images], ["?"] * len(images))
    return vlm.sight.levels(pixels_of(inputs)) / 127.5 - 1


@pytest.mark.parametrize("t", [300, 700])
def test_the_tower_gets_the_diffusion_that_was_asked_for(vlm, t):
    """On a picture twenty times larger than the tower sees: x_t - sqrt(abar) x has the variance 1 - abar, is
    independent of its neighbours, and that in every tile. (Noise in the file's pixels would have averaged
    away.)"""
    image = photo(1300, 1000)
    clean, noised = levels(vlm, [image]), levels(vlm, [noise.NoisedPicture(image, t, None, 3)])
    level = noise.signal_levels()[t]
    # unit by unit: tiles are as much noised as the thumbnail; padding is not
    content = (np.abs(noised - clean) > 0).any(1)
    assert content.mean() > 0.3
    inner = np.abs(noised) < 1                                                  # where clamping did not cut
    expected = np.sqrt(1 - level)
    rng = np.random.default_rng(0)
    for unit in range(len(clean)):
        inside = content[unit]
        if inside.sum() < 100:
            continue
        x = clean[unit][:, inside]
        reference = noise.add_noise(x, rng.standard_normal(x.shape), t)
        difference = noised[unit][:, inside]
        assert abs((difference - x).std() - (reference - x).std()) < 0.12 * expected
        assert abs((difference - x).mean() - (reference - x).mean()) < 0.25 * expected
    assert inner.any()


def test_the_tower_gets_exactly_diffuse_where_it_is_noised(vlm):
    """Value by value: the formula applied to what the tower gets of the clean picture, with the twin's own
    eps; nothing outside the mask."""
    image, mask = photo(400, 300), np.zeros((300, 400))
    mask[:, :200] = 1
    twin = noise.NoisedPicture(image, 600, mask, 5)
    seen = []
    twin.noised_values = lambda x, m: seen.append((x, m)) or noise.NoisedPicture.noised_values(twin, x, m)
    clean, noised = levels(vlm, [image]), levels(vlm, [twin])
    (x, m), = seen
    eps = np.random.default_rng(5).standard_normal(x.shape, dtype=np.float32)
    wanted = noise.add_noise(x, eps, 600, m)
    changed = np.abs(noised - clean).max(1) > 1e-4
    assert changed.sum() <= (m > 0).sum() and changed.sum() > 0.9 * (m > 0.5).sum()
    assert 0.2 < changed.mean() < 0.65  # half of the picture, and padding
    np.testing.assert_allclose(np.sort(noised.transpose(0, 2, 1)[changed].ravel())[::97],
                               np.sort(wanted[np.abs(wanted - x).max(1) > 1e-4].ravel())[::97], atol=2e-3)


def test_noise_does_not_depend_on_the_batch(vlm):
    images = [photo(300, 200, seed) for seed in range(3)]
    mask = np.zeros((200, 300))
    mask[50:150, 100:200] = 1
    twins = [noise.NoisedPicture(image, 999, mask, seed) for seed, image in enumerate(images)]
    scored = torch.tensor([5, 6])
    with torch.no_grad():
        both = [[image] for image in images] + [[twin] for twin in twins]
        together = vlm.score(both, ["Where is it?"] * 6, [scored] * 6).logprobs
        for i, pictures in enumerate(both):
            alone = vlm.score([pictures], ["Where is it?"], [scored]).logprobs
            torch.testing.assert_close(together[i], alone[0], atol=2e-4, rtol=0)
    assert (together[:3] - together[3:]).abs().max() > 1e-4


def test_several_pictures_in_a_prompt_are_noised_each_with_its_own_mask(vlm):
    if "PaliGemma" in type(vlm.processor).__name__:
        pytest.skip("one picture a prompt")
    images, masks = [photo(160, 90, 1), photo(90, 160, 2)], [np.ones((90, 160)), np.zeros((160, 90))]
    twins, calls = [noise.NoisedPicture(*each, seed) for seed, each in enumerate(zip(images, (999, 999), masks))], {}
    for i, twin in enumerate(twins):
        twin.noised_values = lambda x, m, i=i: calls.setdefault(i, (x, m)) and noise.NoisedPicture.noised_values(twins[i], x, m)
    prompt = ["<image 1> and <image 2>?"]
    plain, noised = (vlm.sight.levels(pixels_of(vlm.encode([pictures], prompt))) for pictures in (images, twins))
    changed = (np.abs(plain - noised) > 0.01).any(1)
    # a class that pads before it resizes blends the mask with the padding, a pixel wide
    assert np.median(calls[0][1]) > 0.99 and calls[0][1].mean() > 0.9 and calls[1][1].max(initial=0) < 0.1
    assert 0.9 * len(calls[0][0]) < changed.sum() <= 1.2 * len(calls[0][0])


def test_a_processor_that_leaves_pixels_gets_the_twins_own(base, clip):
    """Built-in pictures are not resized: the model gets `diffuse` of the picture, as `make_pairs` shows it."""
    image = photo(112, 112)
    ((twin,),) = noise.make_pairs([[image]], ["Where?"], clip, (999, 999), ["key"], 0.5, [4])
    shown = Image.fromarray(np.asarray(twin))
    a, b = (base.encode([[picture]], ["?"])["pixel_values"] for picture in (twin, shown))
    assert torch.equal(a, b) and base.sight.unchanged[112, 112]


def test_no_evidence_returns_when_a_processor_shrinks(base):
    """Regression: a photo of a board. The noised photo, shrunk by hand, shows the board; what the tower gets
    does not."""
    image = photo(1792, 1792)
    twin = noise.NoisedPicture(image, 999, None, 0)
    clean, noised = levels(base, [image]), levels(base, [twin])
    file = noise.diffuse(image, 999, seed=0).resize((224, 224), Image.Resampling.BICUBIC)
    shrunk = levels(base, [file])

    def seen(values):
        return abs(np.corrcoef(clean.ravel(), values.ravel())[0, 1])
    assert not base.sight.unchanged[1792, 1792]
    assert seen(shrunk) > 3 * seen(noised)


def test_step_zero_is_the_picture_itself(base):
    image = photo(1792, 1792)
    a, b = (base.encode([[picture]], ["?"])["pixel_values"] for picture in (image, noise.NoisedPicture(image, 0, None, 3)))
    assert torch.equal(a, b)


def test_a_twin_travels_to_another_process_without_its_pixels():
    import pickle
    twin = noise.NoisedPicture(photo(80, 60), 500, np.ones((60, 80)), 7)
    other = pickle.loads(pickle.dumps(twin))
    assert other._im is None and other.tobytes() == twin.tobytes() and other.size == (80, 60)

