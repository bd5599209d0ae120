import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel

import data
import noise
from tiny import questions
from utils import clip_files
from utils.cli import InputError


def gradient(width=90, height=60, mode="RGB"):
    x = np.linspace(60, 190, width * height * 3).reshape(height, width, 3).astype(np.uint8)
    return Image.fromarray(x).convert(mode)


def test_schedule_is_the_published_one():
    """VCD's own lines, in torch."""
    betas = torch.sigmoid(torch.linspace(-6, 6, 1000, dtype=torch.float64)) * (0.5e-2 - 1e-5) + 1e-5
    np.testing.assert_allclose(noise.signal_levels()[1:], torch.cumprod(1 - betas, 0).numpy(), rtol=1e-12)
    assert noise.signal_levels()[0] == 1


@pytest.mark.parametrize("t", [100, 500])
def test_one_jump_equals_step_by_step_in_distribution(t):
    """x_t in closed form has the mean and variance of t single steps x <- sqrt(1 - b) x + sqrt(b) eps."""
    level, x0 = noise.signal_levels(), 0.3
    rng, x = np.random.default_rng(0), np.full(40_000, 0.3)
    for s in range(t):
        keep = level[s + 1] / level[s]
        x = np.sqrt(keep) * x + np.sqrt(1 - keep) * rng.standard_normal(x.size)
    assert abs(x.mean() - np.sqrt(level[t]) * x0) < 0.02 and abs(x.var() - (1 - level[t])) < 0.02


def test_pixels_of_diffuse_follow_the_formula():
    grey, t = 140, 250
    pixels = np.asarray(noise.diffuse(Image.new("RGB", (300, 300), (grey,) * 3), t, seed=1), float) / 127.5 - 1
    level = noise.signal_levels()[t]
    assert abs(pixels.mean() - np.sqrt(level) * (grey / 127.5 - 1)) < 0.005       # clamping is rare at this t
    assert abs(pixels.std() - np.sqrt(1 - level)) < 0.01


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "CMYK", "LA"])
def test_size_and_mode_are_kept_and_zero_is_identity(mode):
    image = gradient(mode=mode)
    noised = noise.diffuse(image, 600, seed=2)
    assert (noised.size, noised.mode) == (image.size, mode)
    assert noise.diffuse(image, 0).tobytes() == image.tobytes() and noised.tobytes() != image.tobytes()
    if "A" in mode:
        assert noised.getchannel("A").tobytes() == image.getchannel("A").tobytes()


def test_seeded_and_masked():
    image, mask = gradient(), np.zeros((60, 90))
    mask[10:30, 20:50] = 1
    a, b, c = (np.asarray(noise.diffuse(image, 700, mask=mask, seed=s)) for s in (5, 5, 6))
    assert (a == b).all() and (a != c).any()
    outside, full = mask == 0, np.asarray(noise.diffuse(image, 700, seed=5))
    assert (a[outside] == np.asarray(image)[outside]).all() and (a[~outside] == full[~outside]).all()


def test_misfits_are_refused():
    for bad in (dict(t=-1), dict(t=1001), dict(t=5.5), dict(t=5, mask=np.ones((90, 60)))):
        with pytest.raises(ValueError):
            noise.diffuse(gradient(), bad["t"], mask=bad.get("mask"))
    for text in ("abc", "1-2-3", "2000", "-5", "800-200"):
        with pytest.raises(InputError):
            noise.parse_t(text)
    assert noise.parse_t("300-999") == (300, 999) and noise.parse_t("7") == (7, 7)
    with pytest.raises(ValueError):
        noise.region(np.full((4, 4), 1 / 16), 0)
    with pytest.raises(ValueError):
        noise.region(np.full((4, 4), 1 / 16), mode="middle")


def test_regions_key_is_smallest_controls_have_its_area():
    rng = np.random.default_rng(0)
    attention = rng.random((80, 100)) ** 4
    attention /= attention.sum()
    # feathering spreads an edge: compare the regions before it through their total weight
    key, other, inverse = (noise.region(attention, 0.4, mode, seed=3) for mode in ("key", "random", "inverse"))
    assert (noise.region(attention, mode="all") == 1).all()
    assert abs(key.mean() - other.mean()) < 0.01 and abs(key.mean() - inverse.mean()) < 0.01
    held = (attention * key).sum()
    assert held > (attention * other).sum() > (attention * inverse).sum()
    smooth = np.add.outer(np.linspace(-1, 1, 80) ** 2, np.linspace(-1, 1, 100) ** 2)
    smooth = np.exp(-8 * smooth) / np.exp(-8 * smooth).sum()
    chosen = noise.region(smooth, 0.5) > 0.5
    assert abs(smooth[chosen].sum() - 0.5) < 0.03                # holds its mass
    assert smooth[chosen].min() >= smooth[~chosen].max() * 0.8     # and nothing outside is denser, feather aside


def test_a_control_spares_the_evidence(clip):
    """Over 200 built-in questions a random region covers little of the key region, and says how much. Any one shift covers
    the region's share of the picture on average, and nearly all of it now and then."""
    covered, shares = [], []
    for i in range(200):
        s = data.synthetic("test", 1, i)
        ((twin,),) = noise.make_pairs([s.images], [s.question], clip, (999, 999), ["random"], 0.5, [i])
        key = noise.region(clip.map(s.images[0], s.question), 0.5) > 0.5
        assert twin.overlap == pytest.approx(twin.mask[key].mean())
        covered.append(twin.overlap)
        shares.append(key.mean())
    assert np.mean(covered) < 0.01 and max(covered) < 0.1 and np.mean(shares) > 0.05
    assert twin.mask.mean() == pytest.approx(noise.region(clip.map(s.images[0], s.question), 0.5).mean(), abs=0.02)


def test_map_sums_to_one_and_lies_on_the_evidence(clip):
    """On held-out questions the guided map puts far more on the evidence than its share of the area, in every skill."""
    share, mass = {}, {}
    for i in range(48):
        s = data.synthetic("test", 0, i)
        attention = clip.map(s.images[0], s.question)
        assert attention.shape == (112, 112) and abs(attention.sum() - 1) < 1e-9 and attention.min() >= 0
        box = np.zeros((112, 112), bool)
        for left, top, right, bottom in s.meta["evidence"]:
            box[top:bottom, left:right] = True
        share.setdefault(s.meta["skill"], []).append(box.mean())
        mass.setdefault(s.meta["skill"], []).append(attention[box].sum())
    for skill in questions.SKILLS:
        assert np.mean(mass[skill]) > 2.5 * np.mean(share[skill]), (skill, np.mean(mass[skill]))
    assert np.mean(sum(mass.values(), [])) > 0.6


def test_question_moves_the_map_and_any_size_works(clip):
    s = data.synthetic("test", 0, 2)
    unguided, guided = clip.map(s.images[0]), clip.map(s.images[0], s.question)
    assert np.abs(unguided - guided).sum() > 0.1
    wide = clip.map(s.images[0].resize((333, 50)), "What is this? " * 200)
    assert wide.shape == (50, 333) and abs(wide.sum() - 1) < 1e-9


def test_maps_of_a_batch_are_those_of_each_picture(clip, monkeypatch):
    """Whatever a batch holds, and however many it may hold: pictures of other sizes, with and without a question."""
    samples = [data.synthetic("test", 0, i) for i in range(5)]
    asked = [(s.images[0].resize((60 + 20 * i, 112)), s.question if i % 2 else None) for i, s in enumerate(samples)]
    alone = [clip.map(*pair) for pair in asked]
    for batch in (2, 100):
        monkeypatch.setattr(clip, "batch", batch)
        for found, wanted in zip(clip.maps(asked), alone, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-9)
    pictures, questions = [[image] for image, _ in asked] + [[image for image, _ in asked[:2]]], ["Where?"] * 6
    modes, seeds = ["key", "all", "random", "inverse", "key", "key"], list(range(6))
    together = noise.make_pairs(pictures, questions, clip, (300, 999), modes, 0.5, seeds)
    for found, images, mode, seed in zip(together, pictures, modes, seeds, strict=True):
        wanted = noise.make_pairs([images], ["Where?"], clip, (300, 999), [mode], 0.5, [seed])[0]
        for one, other in zip(found, wanted, strict=True):      # a last bit of a map may move an edge of its region by a pixel
            assert (np.asarray(one) != np.asarray(other)).mean() < 0.01


def test_maps_on_disk_are_the_maps(clip, tmp_path, monkeypatch):
    """Kept maps are equal to the bit, are not made twice, are of their picture, question and model alone; a torn file is
    made again."""
    s, kept = data.synthetic("test", 0, 2), noise.ClipAttention.from_pretrained(cache=tmp_path)
    asked = [(s.images[0], s.question), (s.images[0], None), (s.images[0].rotate(90), s.question)]
    wanted = [clip.map(*pair) for pair in asked]
    for pair, attention in zip(asked, wanted):
        np.testing.assert_array_equal(kept.map(*pair), attention)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 3
    again = noise.ClipAttention.from_pretrained(cache=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(again, "_grids", None)            # calling it would be a TypeError
        for pair, attention in zip(asked, wanted):
            np.testing.assert_array_equal(again.map(*pair), attention)
    for file in files:
        file.write_bytes(file.read_bytes()[:50])
    np.testing.assert_array_equal(again.map(*asked[0]), wanted[0])
    noise.ClipAttention.from_pretrained(kind="contribution", cache=tmp_path).map(*asked[0])
    assert len(list(tmp_path.iterdir())) == 4


def test_pairs_are_seeded_and_only_touch_their_region(clip):
    s = data.synthetic("test", 0, 1)
    first, again, other = (noise.make_pairs([s.images], [s.question], clip, (999, 999), ["key"], 0.5, [seed])[0][0] for seed in (1, 1, 2))
    assert first.tobytes() == again.tobytes() != other.tobytes()
    changed = (np.asarray(first) != np.asarray(s.images[0])).any(-1).mean()
    assert 0 < changed < 0.6
    everywhere = noise.make_pairs([s.images], [s.question], None, (999, 999), ["all"], 0.5, [1])[0][0]
    assert (np.asarray(everywhere) != np.asarray(s.images[0])).any(-1).mean() > 0.95


def test_command_writes_a_sheet(tmp_path):
    data.synthetic("test", 0, 0).images[0].save(tmp_path / "q.png")
    noise.main([str(tmp_path / "q.png"), "How many?", "--output", str(tmp_path / "sheet.png"), "--t", "500", "999"])
    assert Image.open(tmp_path / "sheet.png").width > 500
    for argv in ([str(tmp_path / "no.png"), "How many?"], [str(tmp_path / "q.png"), " "],
                 [str(tmp_path / "q.png"), "How many?", "--mass", "2"],
                 [str(tmp_path / "q.png"), "How many?", "--clip", "no/such/clip"]):
        with pytest.raises(InputError):
            noise.main(argv)


# ---- The map for a CLIP that was not trained to point

@pytest.fixture(scope="module")
def random_clip():
    """A CLIP with a random vision tower, loud enough for every layer to matter."""
    torch.manual_seed(0)
    config = CLIPConfig(vision_config=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=4,
                                           image_size=32, patch_size=8),
                        text_config=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2),
                        projection_dim=16, attn_implementation="eager")
    model = CLIPModel(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def test_contributions_of_all_layers_sum_to_the_image_embedding(random_clip):
    """Attention of every layer, token by token, with its bias; the MLPs; what entered the first layer; the last norm's bias."""
    vision, pixels, mlps = random_clip.vision_model, torch.randn(3, 3, 32, 32), []
    for block in vision.encoder.layers:
        block.mlp.register_forward_hook(lambda _, __, out: mlps.append(out[:, :1]))
    with torch.no_grad():
        output = vision(pixels, output_attentions=True, output_hidden_states=True)
        attention = sum(clip_files.contributions(random_clip, output, layer).sum(1) for layer in range(-5, 0))
        biases = sum(block.self_attn.out_proj.bias for block in vision.encoder.layers)
        rest = output.hidden_states[0][:, :1] + sum(mlps) + biases
        rest = clip_files.as_normed(rest, output.last_hidden_state[:, :1], vision.post_layernorm) + vision.post_layernorm.bias
        embedding = random_clip.visual_projection(output.pooler_output)
        torch.testing.assert_close(attention + random_clip.visual_projection(rest)[:, 0], embedding, atol=1e-4, rtol=1e-4)
        for layer in range(-5, 0):                  # and layer by layer
            block, heard = vision.encoder.layers[layer], []
            hook = block.self_attn.register_forward_hook(lambda _, __, out, heard=heard: heard.append(out[0][:, :1]))
            vision(pixels)
            hook.remove()
            term = clip_files.as_normed(heard[0] - block.self_attn.out_proj.bias, output.last_hidden_state[:, :1],
                                   vision.post_layernorm)
            torch.testing.assert_close(clip_files.contributions(random_clip, output, layer).sum(1),
                                       random_clip.visual_projection(term)[:, 0], atol=1e-4, rtol=1e-4)


def test_the_kind_of_map_follows_the_clip(clip, tmp_path):
    assert clip.kind == "attention"
    shutil.copytree(noise.CLIP, tmp_path / "clip")
    other = noise.ClipAttention.from_pretrained(tmp_path / "clip")
    assert other.kind == "contribution"
    assert noise.ClipAttention.from_pretrained(tmp_path / "clip", kind="attention").kind == "attention"
    s = data.synthetic("test", 0, 2)
    guided, unguided = other.map(s.images[0], s.question), other.map(s.images[0])
    assert abs(guided.sum() - 1) < 1e-9 and guided.min() >= 0 and np.abs(guided - unguided).sum() > 0.1
    with pytest.raises(InputError, match="--clip_map is 'gradcam'"):
        noise.ClipAttention.from_pretrained(kind="gradcam")
