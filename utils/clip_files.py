"""CLIP models opened and counted, what a token adds to their embedding, and their maps kept on disk."""
import hashlib
import os
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, CLIPModel

from utils.cli import InputError, reason, warn
from utils.loading import SAFE, opening

LATE_LAYERS = 4  # that write nearly all of the embedding directly (Gandelsman et al., Figure 2)


def open_clip(path, device=None):
    """A CLIPModel directory or hub id -> (model, image processor, tokenizer). Raises InputError."""
    with _opening(path) as config:
        # sdpa does not return attention weights; eager does.
        model = CLIPModel.from_pretrained(path, config=config, attn_implementation="eager",
                                          dtype=torch.float32, use_safetensors=True)
        images = AutoImageProcessor.from_pretrained(path, **SAFE)
        tokenizer = AutoTokenizer.from_pretrained(path, **SAFE)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), images, tokenizer


def count_parameters(path):
    """How many parameters a CLIP has (int); no weight is read. Raises InputError."""
    with _opening(path) as config, torch.device("meta"):
        return sum(p.numel() for p in CLIPModel(config).parameters())


@contextmanager
def _opening(path):
    """Yields the settings of the CLIPModel at path; what cannot be opened meanwhile is an InputError."""
    with opening("CLIP model", path):
        if (config := AutoConfig.from_pretrained(path, **SAFE)).model_type != "clip":
            raise ValueError(f"it is a {config.model_type} model")
        yield config


def contributions(clip, output, layer):
    """What each token adds to CLIP's image embedding through one attention layer (Gandelsman et al., Eq.
    5-6).

    clip: a CLIPModel; output: of its vision_model, with attentions and hidden states; layer: a negative
    index. -> (B, 1 + P, E). They sum over tokens to the layer's attention output (without its bias) as the
    embedding sees it: the last layer norm, with its divisor as it is, is linear in the terms of the class
    token's residual sum.
    """
    vision = clip.vision_model
    block = vision.encoder.layers[layer]
    values = block.self_attn.v_proj(block.layer_norm1(output.hidden_states[layer - 1]))  # (B, N, D)
    attention = output.attentions[layer][:, :, 0]  # (B, heads, N)
    values = values.unflatten(-1, (attention.shape[1], -1)) * attention.transpose(1, 2)[..., None]
    terms = values.flatten(-2) @ block.self_attn.out_proj.weight.T  # (B, N, D)
    return clip.visual_projection(as_normed(terms, output.last_hidden_state[:, :1], vision.post_layernorm))


def contribution_weights(clip, output, texts):
    """What the late layers' patches add along texts ((1, E), or None: along the picture) -> (B, P).

    What is below the picture's median patch is its background, and weighs nothing.
    """
    late = range(-min(LATE_LAYERS, len(output.attentions)), 0)
    added = sum(contributions(clip, output, layer)[:, 1:] for layer in late)  # (B, P, E)
    last = clip.vision_model.post_layernorm(output.last_hidden_state[:, :1])
    embedding = clip.visual_projection(last)  # (B, 1, E)
    along = torch.stack([embedded if text is None else text
                         for text, embedded in zip(texts, embedding)])  # (B, 1, E)
    weights = (added * along / along.norm(dim=-1, keepdim=True)).sum(-1)
    return (weights - weights.median(-1, keepdim=True).values).clamp(min=0)


def as_normed(terms, total, norm):
    """Terms of a sum as a layer norm of the sum sees them, its bias apart: (..., D), (..., D), LayerNorm ->
    (..., D)."""
    divisor = (total.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    return (terms - terms.mean(-1, keepdim=True)) / divisor * norm.weight


class MapCache:
    """Maps kept in a folder, one .npy each, named by all that it follows from: weights, kind of map, picture,
    question."""

    def __init__(self, folder, model, kind):
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"the folder of CLIP's maps, {str(folder)!r}, cannot be made "
                             f"({error})") from error
        side = model.config.vision_config.image_size // model.config.vision_config.patch_size
        self.shape, self.warned, weights = (side, side), False, hashlib.sha256()
        for value in model.state_dict().values():
            weights.update(value.cpu().numpy().tobytes())
        self.identity = f"{weights.hexdigest()} {kind}"

    def file(self, image, question):
        """The path of a map."""
        key = f"{self.identity} {image.size} {question}".encode()
        return self.folder / f"{hashlib.sha256(key + image.convert('RGB').tobytes()).hexdigest()}.npy"

    def read(self, image, question):
        """A kept map, shape (h, w) of this CLIP's patches, or None where there is none or it was damaged."""
        try:
            grid = np.load(self.file(image, question), allow_pickle=False)
        except (OSError, ValueError, EOFError, MemoryError, OverflowError, SyntaxError, zipfile.BadZipFile):
            return None
        sound = isinstance(grid, np.ndarray) and grid.shape == self.shape and grid.dtype == np.float32
        return grid if sound and np.isfinite(grid).all() and (grid >= 0).all() else None

    def through(self, make, pairs):
        """The maps of pairs of picture and question (list): kept ones; of the others make(pairs)'."""
        grids = [self.read(*pair) for pair in pairs]
        absent = [i for i, grid in enumerate(grids) if grid is None]
        for i, grid in zip(absent, make([pairs[i] for i in absent]) if absent else ()):
            grids[i] = grid
            self.write(*pairs[i], grid)
        return grids

    def write(self, image, question, grid):
        """Keep a map. Where it cannot be written, that is said once, and the program goes on without."""
        file = self.file(image, question)
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as stream:
                np.save(stream, grid)
            os.replace(temporary, file)         # ranks that write the same map do not see each other's half
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            if not self.warned:
                warn(f"CLIP's maps are not kept in {self.folder}: {reason(error)}")
            self.warned = True
