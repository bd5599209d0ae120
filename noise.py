"""Image pairs: where the evidence lies (CLIP attention), and noise put exactly there (paper 3.2.1).

    python noise.py photo.png "How many red circles are there?"     # a contact sheet: what the training sees

The noise is the forward process of DDPM in pixel space with the schedule of Visual Contrastive Decoding.
Regions: `key` (the smallest region that holds a share `mass` of the attention), `all`, and two controls of
the same area that show the effect is about evidence and not about noise: `random` (the same shape, elsewhere)
and `inverse` (the least attended). `ClipAttention.from_pretrained(cache=FOLDER)` keeps its maps on disk for
further epochs and runs.
"""
import math
import os
import random
from functools import lru_cache, partial

import numpy as np
import torch
from PIL import Image, ImageFilter

from utils import cli
from utils.cli import TINY, InputError
from utils.clip_files import MapCache, contribution_weights, open_clip
from utils.loading import ATTENTION
from utils.pictures import LazyTwin, shrunk

KINDS = ("auto", "attention", "contribution")
STEPS = 1000
REGION_SIDE = 224               # pixels; CLIP tells at most 24 x 24 patches apart
SHIFTS = 32                     # of which a random region takes the one that spares the evidence best
MODES = ("key", "all", "random", "inverse")
CLIP = str(TINY / "clip")


@lru_cache(1)
def signal_levels():
    """abar_t for t = 0 .. 1000, (1001,) float64: the share of signal variance left after t steps; abar_0 = 1.

    beta_s = sigmoid(linspace(-6, 6)) * (0.5e-2 - 1e-5) + 1e-5, abar_t = prod_{s < t} (1 - beta_s) (VCD's
    schedule).
    """
    betas = 1 / (1 + np.exp(-np.linspace(-6, 6, STEPS))) * (0.5e-2 - 1e-5) + 1e-5
    return np.concatenate([[1.0], np.cumprod(1 - betas)])


def diffuse(image, t, *, mask=None, seed=0):
    """x_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps on pixels scaled to [-1, 1], clamped; same size and mode.

    t: 0 (identity) .. 1000. mask (H, W) in [0, 1]: how much of the noised picture shows, default 1
    everywhere. seed fixes eps. Transparency is left alone. Raises ValueError for t or a mask that does not
    fit.
    """
    if not 0 <= t <= STEPS or int(t) != t:
        raise ValueError(f"noise step t is {t}; a whole number from 0 to {STEPS} is expected")
    if mask is not None and mask.shape != (image.height, image.width):
        raise ValueError(f"mask has shape {mask.shape}; the image needs {(image.height, image.width)}")
    if t == 0:
        return image.copy()
    plain = image if image.mode in ("RGB", "L") else image.convert("RGB")
    x = np.asarray(plain, dtype=np.float64) / 127.5 - 1
    eps = np.random.default_rng(seed).standard_normal(x.shape)
    mask = mask if mask is None or x.ndim == 2 else mask[..., None]
    noised = Image.fromarray(np.rint((add_noise(x, eps, t, mask) + 1) * 127.5).astype(np.uint8), plain.mode)
    if image.mode == plain.mode:
        return noised
    result = noised.convert(image.mode)
    if "A" in image.getbands():
        result.putalpha(image.getchannel("A"))
    return result


def add_noise(x, eps, t, mask=None):
    """The forward process on x in [-1, 1], shown by mask (broadcastable, in [0, 1]), clamped -> as x."""
    level = float(signal_levels()[int(t)])
    noised = math.sqrt(level) * x + math.sqrt(1 - level) * eps
    if mask is not None:
        noised = x + (noised - x) * mask
    return noised.clip(-1, 1)


class NoisedPicture(LazyTwin):
    """The noised twin of a picture: source (PIL image), step t, mask (H, W) or None for everywhere, seed.

    A processor that shrinks a photo averages pixel noise away, and the evidence returns. So a model noises
    what its vision tower gets of `source`, after its processor's own resize (`utils/sight.py`, which calls
    `noised_values`). Everybody else sees a picture of the source's size.
    """

    def __init__(self, source, t, mask=None, seed=0):
        super().__init__(source, mask)
        self.t, self.seed = t, seed
        self.overlap = None  # of a random region: the share of the key region that it covers all the same

    def render(self):
        return diffuse(self.source, self.t, mask=self.mask_at(*self.size), seed=self.seed)

    def noised_values(self, x, mask):
        """What a vision tower gets, x (n, 3) float32 in [-1, 1]; mask (n, 1) in [0, 1] -> noised, as x."""
        eps = np.random.default_rng(self.seed).standard_normal(x.shape, dtype=np.float32)
        return add_noise(x, eps, self.t, mask)

    def __reduce__(self):                   # to another process without its pixels
        return NoisedPicture, (self.source, self.t, self.mask, self.seed)


class ClipAttention:
    """Where CLIP finds the evidence of a question in a picture: `map`, `maps`.

    kind "attention" (the paper): attention from the class token to the patches in the last layer, times each
    patch's similarity to the question. Large public CLIPs pool that attention in a few artefact patches
    (arXiv 2309.16588), and their patches are similar to the background's words (2304.05653). Kind
    "contribution" (Gandelsman et al., 2310.05916) asks instead how much each patch adds to the image
    embedding, along the question's, through the last attention layers.
    """

    def __init__(self, model, image_processor, tokenizer, kind="attention", cache=None):
        self.model, self.image_processor, self.tokenizer, self.kind = model, image_processor, tokenizer, kind
        # questions come again: in other epochs, and about other pictures
        self._text = lru_cache(4096)(self._text)
        # all attention weights of a batch are held, (heads, 1 + P, 1 + P)
        vision = model.config.vision_config
        tokens = 1 + (vision.image_size // vision.patch_size)**2
        self.batch = max(1, ATTENTION // (vision.num_hidden_layers * vision.num_attention_heads * tokens**2))
        self.cache = MapCache(cache, model, kind) if cache else None

    @classmethod
    def from_pretrained(cls, path=CLIP, device=None, kind="auto", cache=None):
        """A CLIPModel directory or hub id (`openai/clip-vit-large-patch14-336`). kind: see above; auto is
        attention for the built-in CLIP, which was trained to point at the evidence, and contribution for any
        other. cache: a folder in which each map is kept. Raises InputError when it cannot be opened."""
        if kind not in KINDS:
            raise InputError(f"--clip_map is {kind!r}; one of {', '.join(KINDS)} is expected")
        if kind == "auto":
            kind = "attention" if os.path.realpath(path) == os.path.realpath(CLIP) else "contribution"
        return cls(*open_clip(path, device), kind, cache)

    def map(self, image, question=None):
        """`maps` of one picture."""
        return next(self.maps([(image, question)]))

    def maps(self, pairs, longest=None):
        """List of (PIL image, question or None) -> iterator over (H, W) float64 arrays that sum to 1.

        longest: pictures are shrunk to this side first, and the map has that size; None leaves them.
        """
        pairs = [(shrunk(image, longest), question) for image, question in pairs]
        grids = self._grids if self.cache is None else partial(self.cache.through, self._grids)
        batches = (pairs[start:start + self.batch] for start in range(0, len(pairs), self.batch))
        return (_spread(grid, image.width, image.height) for batch in batches
                for grid, (image, _) in zip(grids(batch), batch))

    @torch.inference_mode()
    def _grids(self, pairs):
        """What each patch weighs: B pairs of picture and question -> (B, h, w) float32 array."""
        vision = self.model.vision_model
        side = self.model.config.vision_config.image_size
        # The whole picture is squeezed into CLIP's square: its usual centre crop would hide the margins.
        inputs = self.image_processor(images=[image.convert("RGB") for image, _ in pairs],
                                      do_center_crop=False, size={"height": side, "width": side},
                                      return_tensors="pt")
        output = vision(inputs["pixel_values"].to(self.model.device), output_attentions=True,
                        output_hidden_states=True)
        weigh = self._by_attention if self.kind == "attention" else self._by_contribution
        weights = weigh(output, [question for _, question in pairs])  # (B, P)
        return weights.view(len(pairs), side // vision.config.patch_size, -1).cpu().numpy()

    def _by_attention(self, output, questions):
        """Class-token attention, heads averaged, times the similarity, scaled to [0, 1] -> (B, P)."""
        weights = output.attentions[-1][:, :, 0, 1:].mean(1)  # (B, P)
        guided = [b for b, question in enumerate(questions) if question]
        if guided:
            last = self.model.vision_model.post_layernorm(output.last_hidden_state[guided, 1:])
            patches = self.model.visual_projection(last)  # (., P, E)
            texts = torch.stack([self._text(questions[b]) for b in guided])  # (., 1, E)
            similarity = torch.cosine_similarity(patches, texts, dim=-1)  # (., P)
            low, high = similarity.amin(-1, keepdim=True), similarity.amax(-1, keepdim=True)
            weights[guided] *= (similarity - low) / (high - low).clamp(min=1e-9)
        return weights

    def _by_contribution(self, output, questions):
        """What patches add along the question, or along the picture's own embedding without one -> (B, P)."""
        return contribution_weights(self.model, output,
                                    [self._text(question) if question else None for question in questions])

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

    attention (H, W) that sums to 1. key: the smallest region that holds `mass` (0, 1] of it. random: the same
    shape, shifted to where it covers least of the key region, of SHIFTS seeded shifts around the picture's
    edges. inverse: the same number of pixels, the least attended. all: ones.
    """
    if mode not in MODES:
        raise ValueError(f"region mode is {mode!r}; one of {', '.join(MODES)} is expected")
    if not 0 < mass <= 1:
        raise ValueError(f"attention mass is {mass}; a number above 0 and at most 1 is expected")
    if mode == "all":
        return np.ones(attention.shape)
    order = np.argsort(-attention, axis=None, kind="stable")
    area = 1 + int(np.searchsorted(np.cumsum(attention.ravel()[order]), mass * (1 - 1e-12)))
    chosen = np.zeros(attention.size, dtype=bool)
    chosen[order[-area:] if mode == "inverse" else order[:area]] = True
    chosen = chosen.reshape(attention.shape)
    if mode == "random":
        rng, key = random.Random(f"region {seed}"), chosen
        shifts = [(rng.randrange(key.shape[0]), rng.randrange(key.shape[1])) for _ in range(SHIFTS)]
        chosen = min((np.roll(key, shift, (0, 1)) for shift in shifts),
                     key=lambda shifted: np.count_nonzero(shifted & key))
    feather = ImageFilter.GaussianBlur(max(attention.shape) / 100)
    return np.asarray(Image.fromarray(chosen.astype(np.uint8) * 255).filter(feather), dtype=np.float64) / 255


def parse_t(text):
    """"500" -> (500, 500); "300-999" -> (300, 999). Raises InputError."""
    bounds = str(text).split("-")
    if len(bounds) > 2 or not all(t.strip().isdecimal() and int(t) <= STEPS for t in bounds):
        raise InputError(f"noise step {text!r} is not a whole number from 0 to {STEPS}, nor a range such as "
                         f"300-999")
    low, high = int(bounds[0]), int(bounds[-1])
    if low > high:
        raise InputError(f"noise range {text!r} runs backwards; write {high}-{low}")
    return low, high


def make_pairs(images, questions, clip, t, modes, mass, seeds):
    """The noised twins i' of Q questions' images (paper 3.2.1): Q lists of PIL images -> Q lists of
    `NoisedPicture`s.

    clip: a ClipAttention, unused where the mode is "all". t: (low, high), one step drawn for each question,
    both included. modes, seeds: Q each; a seed is any value, from which noise, step and random region follow.
    """
    guided = [(image, question) for pictures, question, mode in zip(images, questions, modes, strict=True)
              if mode != "all" for image in pictures]
    maps = clip.maps(guided, REGION_SIDE) if guided else None
    noised = []
    for pictures, mode, seed in zip(images, modes, seeds, strict=True):
        rng = random.Random(f"pair {seed}")
        step = rng.randint(*t)
        noised.append([])
        for image in pictures:
            image_seed = rng.getrandbits(63)
            attention = next(maps) if mode != "all" else None
            mask = None if attention is None else region(attention, mass, mode, image_seed)
            twin = NoisedPicture(image, step, mask, image_seed)
            if mode == "random":
                twin.overlap = float(mask[region(attention, mass) > 0.5].mean())
            noised[-1].append(twin)
    return noised


def main(argv=None):
    from utils.contact_sheet import command  # matplotlib, which nothing else here needs
    command(argv, CLIP, KINDS, ClipAttention.from_pretrained, region, diffuse, parse_t)


if __name__ == "__main__":
    cli.command("noise.py", main)
