"""Opening models: processors without torchvision, checks, activation checkpointing, fast kernels."""
import copy
import re
from pathlib import Path

import numpy as np
import torch
import transformers
from torch.utils.checkpoint import checkpoint
from transformers import PROCESSOR_MAPPING, AutoConfig, AutoImageProcessor, AutoProcessor, ImageProcessingMixin, ProcessorMixin

from utils.cli import InputError, reason

# Rows of the batch that have ended leave it every so many tokens (looking costs a synchronisation on a GPU).
TRIM_EVERY = 8
# Logits that one chunk of the vocabulary head, or the words that are recorded together, may hold (64 MiB in fp32).
CHUNK_LOGITS = 2**24
ATTENTION = 2**28           # attention weights in memory at once, 1 GiB: two pictures of ViT-L/14-336, hundreds of tiny/clip


def read_map(file):
    """A kept map, or None where it is not there or was torn by a machine that went down."""
    try:
        return np.load(file)
    except (OSError, ValueError, EOFError):
        return None


def largest(values, k, width=128):
    """The k largest of (..., V), in falling order -> (..., k), as `topk` finds them.

    `topk` walks over a real vocabulary several times. Whatever is among the k largest lies in one of the k chunks of `width`
    whose maxima are highest, so that one walk for the maxima is enough.
    """
    chunks = values.shape[-1] // width
    if chunks < 8 * k:
        return values.topk(k).values
    whole = values[..., :chunks * width].unflatten(-1, (chunks, width))                       # (..., chunks, width)
    best = whole.detach().amax(-1).topk(k).indices[..., None]                                 # (..., k, 1)
    among = whole.gather(-2, best.expand(*best.shape[:-1], width)).flatten(-2)                # (..., k * width)
    return torch.cat([among, values[..., chunks * width:]], -1).topk(k).values


# A head of so many weights and so few rows are multiplied by oneDNN on a CPU (`_head`).
LARGE_HEAD, FEW_ROWS = 2**24, range(4, 33)


class _ImagesOnly(ProcessorMixin):
    """Stands behind a class of processor and takes its video processor, which needs torchvision, out of its parts."""

    def __init__(self, *args, **kwargs):
        named = {**dict(zip(super().get_attributes(), args)), **kwargs}
        super().__init__(**{name: value for name, value in named.items() if "video" not in name})

    @classmethod
    def get_attributes(cls):
        return [name for name in super().get_attributes() if "video" not in name]

    @classmethod
    def from_args_and_dict(cls, args, *rest, **kwargs):
        found = dict(zip(cls.get_attributes(), args))           # the class takes its parts in an order of its own
        return super().from_args_and_dict([found.get(name) for name in super().get_attributes()], *rest, **kwargs)


def load_processor(path):
    """AutoProcessor; where it insists on a video processor, which needs torchvision, the same class without one."""
    blind = InputError(f"model {str(path)!r} has no image processor that can be opened; a vision-language model with "
                       "preprocessor_config.json or processor_config.json is needed")
    if Path(path).is_dir() and not list(Path(path).glob("*processor_config.json")):
        raise blind                 # transformers would take its class's defaults, which are not this model's
    broken = (AttributeError, ImportError, KeyError, OSError, RecursionError, TypeError, ValueError)

    def closed(what, error, named):
        why = reason(error)
        if re.search("torchvision|video_processor", str(error), re.IGNORECASE):
            why = f"{named} needs torchvision; pip install torchvision, or use another model"
        return InputError(f"model {str(path)!r} has {what} that cannot be opened here: {why}")
    try:
        processor = AutoProcessor.from_pretrained(path)
        if hasattr(processor, "image_processor"):
            return processor
    except broken:
        pass        # the parts below say what is missing, in a sentence
    try:
        AutoImageProcessor.from_pretrained(path)
    except broken as error:
        raise (closed("an image processor", error, "its class") if "torchvision" in str(error) else blind) from error
    named = None
    try:
        # The class that the files name, which need not be the one its model's class is known by (Pixtral).
        named = ProcessorMixin.get_processor_dict(path)[0].get("processor_class") or \
            ImageProcessingMixin.get_image_processor_dict(path)[0].get("processor_class")
        whole = getattr(transformers, named) if named else PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(path))]
        # Of the same name, because that is what `save_pretrained` writes down.
        return type(whole.__name__, (whole, _ImagesOnly), {}).from_pretrained(path)
    except broken as error:
        raise closed("a processor", error, named or "its class") from error


def run_again(block, cache_name):
    """A forward for `block` that holds its inputs and runs the block's own once more in the backward pass.

    A decoder layer reads and extends its entry of the cache. Run again, it must find that entry as it was, and must not
    append to it twice: each run works on an entry of its own, and its keys and values leave as outputs, with gradient.
    """
    forward = block.forward
    index = next((module.layer_idx for module in block.modules() if hasattr(module, "layer_idx")), None)

    def checkpointed(*args, **kwargs):
        cache = kwargs.get(cache_name)
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if cache is None:
            return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        before, seen = copy.copy(cache.layers[index]), []

        def once(keys, values, *args):
            own, whole = copy.copy(before), copy.copy(cache)
            own.keys, own.values, whole.layers = keys, values, list(cache.layers)
            whole.layers[index] = own
            out = forward(*args, **{**kwargs, cache_name: whole})
            seen.append({name: value for name, value in vars(own).items() if name not in ("keys", "values")})
            return out, own.keys, own.values
        out, keys, values = checkpoint(once, before.keys, before.values, *args, use_reentrant=False, preserve_rng_state=False)
        vars(cache.layers[index]).update(seen[0], keys=keys, values=values)
        return out
    return checkpointed
