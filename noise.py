"""Image pairs: where the evidence lies (CLIP attention), and noise put exactly there (paper 3.2.1).

    python noise.py photo.png "How many red circles are there?"     # writes a contact sheet: see what the training sees

The noise is the forward process of DDPM in pixel space with the schedule of Visual Contrastive Decoding. Regions:
`key` (the smallest region that holds a share `mass` of the attention), `all`, and two controls of the same area that
show the effect is about evidence and not about noise: `random` (the same shape, elsewhere) and `inverse` (the least
attended). `ClipAttention.from_pretrained(cache=FOLDER)` keeps its maps on disk for further epochs and runs.
"""
import argparse
import hashlib
import os
import random
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, CLIPModel

from utils.cli import TINY, InputError, reason
from utils.loading import ATTENTION, read_map

STEPS = 1000
MODES = ("key", "all", "random", "inverse")
CLIP = str(TINY / "clip")


@lru_cache(1)
def signal_levels():
    """abar_t for t = 0 .. 1000, (1001,) float64: the share of signal variance left after t steps; abar_0 = 1.

    beta_s = sigmoid(linspace(-6, 6)) * (0.5e-2 - 1e-5) + 1e-5, abar_t = prod_{s < t} (1 - beta_s) (VCD's schedule).
    """
    betas = 1 / (1 + np.exp(-np.linspace(-6, 6, STEPS))) * (0.5e-2 - 1e-5) + 1e-5
    return np.concatenate([[1.0], np.cumprod(1 - betas)])


def diffuse(image, t, *, mask=None, seed=0):
    """x_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps on pixels scaled to [-1, 1], clamped; same size and mode.

    t: 0 (identity) .. 1000. mask (H, W) in [0, 1]: how much of the noised picture shows, default 1 everywhere.
    seed fixes eps. Transparency is left alone. Raises ValueError for t or a mask that does not fit.
    """
    if not 0 <= t <= STEPS or int(t) != t:
        raise ValueError(f"noise step t is {t}; a whole number from 0 to {STEPS} is expected")
    if mask is not None and mask.shape != (image.height, image.width):
        raise ValueError(f"mask has shape {mask.shape}; the image needs {(image.height, image.width)}")
    if t == 0:
        return image.copy()
    plain = image if image.mode in ("RGB", "L") else image.convert("RGB")
    x = np.asarray(plain, dtype=np.float64) / 127.5 - 1
    level = signal_levels()[int(t)]
    noised = np.sqrt(level) * x + np.sqrt(1 - level) * np.random.default_rng(seed).standard_normal(x.shape)
    if mask is not None:
        noised = x + (noised - x) * (mask if x.ndim == 2 else mask[..., None])
    noised = Image.fromarray(np.rint((noised.clip(-1, 1) + 1) * 127.5).astype(np.uint8), plain.mode)
    if image.mode == plain.mode:
        return noised
    result = noised.convert(image.mode)
    if "A" in image.getbands():
        result.putalpha(image.getchannel("A"))
    return result


class ClipAttention:
    """Attention from CLIP's class token to the patches, optionally times each patch's similarity to a question."""

    def __init__(self, model, image_processor, tokenizer, layers=1, cache=None):
        self.model, self.image_processor, self.tokenizer, self.layers = model.eval(), image_processor, tokenizer, layers
        self._text = lru_cache(4096)(self._text)        # questions come again: in other epochs, and about other pictures
        sight = model.config.vision_config              # all attention weights of a batch are held, (heads, 1 + P, 1 + P)
        tokens = 1 + (sight.image_size // sight.patch_size)**2
        self.batch = max(1, ATTENTION // (sight.num_hidden_layers * sight.num_attention_heads * tokens**2))
        self.cache = Path(cache) if cache else None
        if cache:
            try:
                self.cache.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"the folder of CLIP's maps, {str(cache)!r}, cannot be made ({error})") from error
            weights = hashlib.sha256()              # maps of another model in the same folder are not taken for its own
            for value in model.state_dict().values():
                weights.update(value.cpu().numpy().tobytes())
            self.identity = f"{weights.hexdigest()} {layers}"

    @classmethod
    def from_pretrained(cls, path=CLIP, device=None, layers=1, cache=None):
        """A CLIPModel directory or hub id (`openai/clip-vit-large-patch14-336`). layers: how many of the last are
        averaged. cache: a folder in which each map is kept. Raises InputError when it cannot be opened."""
        with cls._opening(path) as config:
            # sdpa does not return attention weights; eager does.
            model = CLIPModel.from_pretrained(path, config=config, attn_implementation="eager", dtype=torch.float32)
            images, tokenizer = AutoImageProcessor.from_pretrained(path), AutoTokenizer.from_pretrained(path)
        return cls(model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), images, tokenizer, layers, cache)

    @staticmethod
    @contextmanager
    def _opening(path):
        """Yields the settings of the CLIPModel at path; what cannot be opened meanwhile is an InputError."""
        try:
            if (config := AutoConfig.from_pretrained(path)).model_type != "clip":
                raise ValueError(f"it is a {config.model_type} model")
            yield config
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"CLIP model {str(path)!r} cannot be loaded: {reason(error)}") from error

    @classmethod
    def count(cls, path=CLIP):
        """How many parameters it has (int); no weight is read. InputError as `from_pretrained`."""
        with cls._opening(path) as config, torch.device("meta"):
            return sum(p.numel() for p in CLIPModel(config).parameters())

    def map(self, image, question=None):
        """`maps` of one picture."""
        return next(self.maps([(image, question)]))

    def maps(self, asked):
        """Where the evidence of pictures lies. asked: list of (PIL image, question or None) -> iterator over (H, W) float64
        arrays that sum to 1.

        Attention of the class token, heads and the last `layers` averaged; with a question, times each patch's cosine
        similarity to the question's text embedding, scaled to [0, 1] over the picture.
        """
        files = [self._file(*pair) if self.cache else None for pair in asked]
        grids = [read_map(file) if file else None for file in files]
        missing = [i for i, grid in enumerate(grids) if grid is None]
        for start in range(0, len(missing), self.batch):
            part = missing[start:start + self.batch]
            for i, grid in zip(part, self._grids([asked[i] for i in part])):
                grids[i] = grid
                if files[i]:
                    own = files[i].with_suffix(f".{os.getpid()}.tmp")
                    with open(own, "wb") as stream:
                        np.save(stream, grid)
                    os.replace(own, files[i])       # ranks that write the same map do not see each other's half
        return (_spread(grid, image.width, image.height) for grid, (image, _) in zip(grids, asked))

    def _file(self, image, question):
        """Where a map is kept: one .npy, named by all that it follows from."""
        said = f"{self.identity} {image.size} {question}".encode()
        return self.cache / f"{hashlib.sha256(said + image.convert('RGB').tobytes()).hexdigest()}.npy"

    @torch.inference_mode()
    def _grids(self, asked):
        """What each patch weighs: B pairs of picture and question -> (B, h, w) float32 array."""
        vision = self.model.vision_model
        side = self.model.config.vision_config.image_size
        # The whole picture is squeezed into CLIP's square: its usual centre crop would hide the margins.
        pixels = self.image_processor(images=[image.convert("RGB") for image, _ in asked], do_center_crop=False,
                                      size={"height": side, "width": side}, return_tensors="pt")["pixel_values"]
        output = vision(pixels.to(self.model.device), output_attentions=True)
        attention = torch.stack(output.attentions[-self.layers:])             # (layers, B, heads, 1 + P, 1 + P)
        weights = attention[:, :, :, 0, 1:].mean((0, 2))                      # (B, P)
        guided = [b for b, (_, question) in enumerate(asked) if question]
        if guided:
            patches = self.model.visual_projection(vision.post_layernorm(output.last_hidden_state[guided, 1:]))   # (., P, E)
            texts = torch.stack([self._text(asked[b][1]) for b in guided])                                        # (., 1, E)
            similarity = torch.cosine_similarity(patches, texts, dim=-1)                                          # (., P)
            low, high = similarity.amin(-1, keepdim=True), similarity.amax(-1, keepdim=True)
            weights[guided] *= (similarity - low) / (high - low).clamp(min=1e-9)
        return weights.view(len(asked), side // vision.config.patch_size, -1).cpu().numpy()

    @torch.inference_mode()
    def _text(self, question):
        """The question's embedding (1, E)."""
        tokens = self.tokenizer(question, truncation=True, return_tensors="pt",
                                max_length=self.model.config.text_config.max_position_embeddings)
        return self.model.text_projection(self.model.text_model(**tokens.to(self.model.device)).pooler_output)


def _spread(grid, width, height):
    """Patch weights (h, w) -> (H, W) array, upsampled smoothly, that sums to 1."""
    image = Image.fromarray(grid.astype(np.float32))
    values = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64).clip(min=0)
    total = values.sum()
    return values / total if total > 0 else np.full(values.shape, 1 / values.size)


def region(attention, mass=0.5, mode="key", seed=0):
    """Where the noise goes -> (H, W) float array in [0, 1], feathered at its edges.

    attention (H, W) that sums to 1. key: the smallest region that holds `mass` (0, 1] of it. random: the same shape
    shifted around the picture by a seeded offset. inverse: the same number of pixels, the least attended. all: ones.
    """
    if mode not in MODES:
        raise ValueError(f"region mode is {mode!r}; one of {', '.join(MODES)} is expected")
    if not 0 < mass <= 1:
        raise ValueError(f"attention mass is {mass}; a number above 0 and at most 1 is expected")
    if mode == "all":
        return np.ones(attention.shape)
    order = np.argsort(-attention, axis=None, kind="stable")
    area = 1 + int(np.searchsorted(np.cumsum(attention.ravel()[order]), mass * (1 - 1e-12)))
    chosen = np.zeros(attention.size)
    chosen[order[-area:] if mode == "inverse" else order[:area]] = 1
    chosen = chosen.reshape(attention.shape)
    if mode == "random":
        rng = random.Random(f"region {seed}")
        chosen = np.roll(chosen, (rng.randrange(chosen.shape[0]), rng.randrange(chosen.shape[1])), (0, 1))
    feather = ImageFilter.GaussianBlur(max(attention.shape) / 100)
    return np.asarray(Image.fromarray((chosen * 255).astype(np.uint8)).filter(feather), dtype=np.float64) / 255


def parse_t(text):
    """"500" -> (500, 500); "300-999" -> (300, 999). Raises InputError."""
    parts = str(text).split("-")
    if len(parts) > 2 or not all(part.strip().isdecimal() and int(part) <= STEPS for part in parts):
        raise InputError(f"noise step {text!r} is not a whole number from 0 to {STEPS}, nor a range such as 300-999")
    low, high = int(parts[0]), int(parts[-1])
    if low > high:
        raise InputError(f"noise range {text!r} runs backwards; write {high}-{low}")
    return low, high


def make_pair(images, question, clip, t=(999, 999), mode="key", mass=0.5, seed=0, text_guidance=True):
    """`make_pairs` of one question -> list of PIL images."""
    return make_pairs([images], [question], clip, t, [mode], mass, [seed], text_guidance)[0]


def make_pairs(images, questions, clip, t, modes, mass, seeds, text_guidance=True):
    """The noised twins i' of Q questions' images (paper 3.2.1): Q lists of PIL images -> Q lists of PIL images.

    clip: a ClipAttention, unused where the mode is "all". t: (low, high), one step drawn for each question, both included.
    modes, seeds: Q each; a seed is any value, from which noise, step and random region follow.
    """
    asked = [(image, question if text_guidance else None)
             for pictures, question, mode in zip(images, questions, modes, strict=True) if mode != "all" for image in pictures]
    maps = clip.maps(asked) if asked else None
    noised = []
    for pictures, mode, seed in zip(images, modes, seeds, strict=True):
        rng = random.Random(f"pair {seed}")
        step = rng.randint(*t)
        noised.append([])
        for image in pictures:
            own = rng.getrandbits(63)
            mask = region(next(maps), mass, mode, own) if mode != "all" else None
            noised[-1].append(diffuse(image, step, mask=mask, seed=own))
    return noised


def contact_sheet(image, question, clip, mass, ts, path, seed=0):
    """Write one picture: original, heat map, and for each region its mask and the noised picture at every t."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    attention = clip.map(image, question)
    modes = ("key", "random", "inverse")
    figure, axes = pyplot.subplots(len(modes), 3 + len(ts), figsize=(2.1 * (3 + len(ts)), 2.3 * len(modes)))
    for row, mode in zip(axes, modes):
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
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Write a contact sheet: original, attention, mask, noised pictures.")
    parser.add_argument("image", help="a picture")
    parser.add_argument("question", help="the question that guides the attention")
    parser.add_argument("--clip", default=CLIP, help="CLIPModel directory or hub id")
    parser.add_argument("--mass", type=float, default=0.5, help="share of the attention that the key region holds")
    parser.add_argument("--t", type=int, nargs="+", default=[300, 500, 700, 999], help="noise steps to show, 0 to 1000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="noise_sheet.png")
    args = parser.parse_args(argv)
    if not args.question.strip():
        raise InputError("the question is empty; give the words that say what to look for")
    if not 0 < args.mass <= 1:
        raise InputError(f"--mass is {args.mass}; a number above 0 and at most 1 is expected")
    for t in args.t:
        parse_t(t)
    if not Path(args.image).is_file():
        raise InputError(f"image {args.image!r} does not exist")
    try:
        image = Image.open(args.image).convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"image {args.image!r} cannot be read ({error})") from error
    try:
        contact_sheet(image, args.question, ClipAttention.from_pretrained(args.clip), args.mass, args.t, args.output, args.seed)
    except (OSError, ValueError) as error:
        raise error if isinstance(error, InputError) else InputError(
            f"--output {args.output!r} cannot be written ({error}); give the path of a .png file") from error
    print(f"wrote {args.output}\nnext: python train_cdrl.py --noise_t {args.t[-1]} --mass {args.mass:g}")


if __name__ == "__main__":
    main()
