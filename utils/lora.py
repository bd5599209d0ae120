"""LoRA: a frozen model learns through two thin matrices beside each linear layer, W + (alpha / r) B A (arXiv
2106.09685).

    python train_cdrl.py --model Qwen/Qwen3-VL-8B-Instruct --lora_rank 64 ...           # needs: pip install
    peft

Gradients, optimizer state and checkpoints hold the adapter alone. A run folder holds it in PEFT's form, and
with `--merge` the merged weights. `VLM.load` opens such a folder everywhere: it adds the adapter to the
weights of its base, without peft.

Left out on purpose: DoRA, RS-LoRA and adapters with biases or whole layers; LoRA on the fused experts of an
MoE (they are no linear layers; its attention and shared layers are adapted); 4-bit base weights (QLoRA),
which merging here does not read.
"""
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from utils.cli import InputError, parse_json, reason

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAME, PREFIX = "default", "base_model.model."  # PEFT's: of an adapter, of every module's name in its file


def add(vlm, rank, alpha, target, base):
    """Freeze the model and put an adapter beside its linear layers; it starts as zero.

    target: language (all linear layers of the language model), all (the vision tower's as well), or endings
    of their names such as q_proj,v_proj. base: the model's path or hub id, for the adapter's config.
    InputError without peft, or where nothing matches."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise InputError("--lora_rank needs the package peft, which is not installed: pip install "
                         "peft") from error
    names = target_layers(vlm, target)
    base = str(Path(base).resolve()) if Path(base).is_dir() else str(base)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, base_model_name_or_path=base)
    inject_adapter_in_model(config, vlm.model)
    for p in vlm.model.parameters():
        if p.requires_grad:                             # the adapter; its base may be in half precision
            p.data = p.data.float()
    vlm.model.lora = config


def target_layers(vlm, target):
    """Names of the linear layers that get an adapter (list), never the vocabulary head; see `add`."""
    language = {id(module) for module in vlm.model.get_decoder().modules()}
    linear = {name: module for name, module in vlm.model.named_modules()
              if type(module) is nn.Linear and module is not vlm.head}
    if target != "all":
        linear = {name: module for name, module in linear.items() if id(module) in language}
    if target not in ("language", "all"):
        endings = [ending.strip() for ending in target.split(",")]
        unknown = [ending for ending in endings if not any(name.split(".")[-1] == ending for name in linear)]
        if unknown:
            kinds = sorted({name.split(".")[-1] for name in linear})
            raise InputError(f"--lora_target {target}: the language model has no linear layer named "
                             f"{unknown[0]!r}; "
                             f"it has {', '.join(kinds)}")
        linear = {name: module for name, module in linear.items() if name.split(".")[-1] in endings}
    return list(linear)


def count(vlm, rank, target):
    """Parameters of an adapter (int), without peft and without weights."""
    layers = dict(vlm.model.named_modules())
    return sum(rank * (layers[name].in_features + layers[name].out_features)
               for name in target_layers(vlm, target))


def is_adapted(model):
    """Whether a model learns through an adapter alone."""
    return getattr(model, "lora", None) is not None


class Frozen:
    """The base under an adapted policy, as the reference of `--kl_beta`: no second copy of the weights."""

    def __init__(self, policy):
        self.policy = policy

    def score(self, *args, **kwargs):
        layers = [module for module in self.policy.modules() if hasattr(module, "lora_A")]
        before = [layer.scaling[NAME] for layer in layers]
        for layer in layers:
            layer.scaling[NAME] = 0.0
        try:
            return self.policy.score(*args, **kwargs)
        finally:
            for layer, scaling in zip(layers, before):
                layer.scaling[NAME] = scaling


# ------------------------------------------------------------------------------------------------------------
# Files

def save(model, path, state):
    """Write the adapter in PEFT's form. state: its weights by name in the model, or None for those of the
    model."""
    state = model.state_dict() if state is None else state
    Path(path).mkdir(parents=True, exist_ok=True)
    save_file({PREFIX + name.replace(f".{NAME}.", "."): weight.detach().contiguous() for name,
               weight in state.items()
               if ".lora_" in name}, Path(path) / WEIGHTS)
    model.lora.save_pretrained(path)


def merged_state(model, state):
    """The weights of an adapted model by name, with the adapter added -> dict, as a model without adapter has
    them.

    state: all weights in full. The dtype of a sum is that of the base's weight."""
    factor, merged = model.lora.lora_alpha / model.lora.r, {}
    for name, weight in state.items():
        if ".lora_" in name:
            continue
        module = name.removesuffix(".base_layer.weight")
        if module != name:
            a, b = (state[f"{module}.lora_{side}.{NAME}.weight"] for side in "AB")
            weight = _sum(weight, a, b, factor)
        merged[name.replace(".base_layer.", ".")] = weight
    return merged


def _sum(weight, a, b, factor):
    """weight (out, in) + factor * b (out, r) @ a (r, in), in fp32 and back."""
    return (weight.float() + factor * b.float() @ a.float()).to(weight.dtype)


def base_of(path):
    """The base that an adapter's folder names (str), None for a folder of weights or a hub id. InputError for
    a folder that holds both, or whose base is not there."""
    folder = Path(path)
    if not (folder / CONFIG).is_file():
        return None
    if (folder / "config.json").is_file():
        raise InputError(f"{path} holds an adapter ({CONFIG}) beside a model (config.json), and only one "
                         f"can be meant; move "
                         "one of them to a folder of its own")
    base = _config(folder).get("base_model_name_or_path") or ""
    local = next((candidate for candidate in (Path(base), folder / base) if base and candidate.is_dir()),
                 None)
    if local is None and (not base or base.startswith((".", "/")) or base.count("/") != 1):
        raise InputError(f"{path} is an adapter of {base!r}, which is not there; correct "
                         f"base_model_name_or_path in {CONFIG}")
    return os.fspath(local or base)


def _config(folder):
    try:
        return dict(parse_json((folder / CONFIG).read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise InputError(f"{folder / CONFIG} cannot be read: {reason(error)}") from error


@torch.no_grad()
def merge_into(model, path):
    """Add the adapter in a folder to a model's weights. InputError for a kind of adapter that is not plain
    LoRA."""
    folder = Path(path)
    config = _config(folder)
    odd = [name for name in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save",
                             "fan_in_fan_out")
           if config.get(name)] + ["bias"] * (config.get("bias", "none") != "none")
    if config.get("peft_type") != "LORA" or odd:
        kind = ", ".join(odd) or config.get("peft_type")
        raise InputError(f"{path} is an adapter that is not plain LoRA ({kind}); merge it with peft first")
    try:
        state = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder / WEIGHTS} cannot be read: {reason(error)}") from error
    layers, factor = dict(model.named_modules()), config["lora_alpha"] / config["r"]
    suffix = ".lora_A.weight"
    pairs = {name.removeprefix(PREFIX).removesuffix(suffix): name for name in state if name.endswith(suffix)}
    unknown = [name for name in pairs if not isinstance(layers.get(name), nn.Linear)]
    if unknown or 2 * len(pairs) != len(state):
        raise InputError(f"{path} is an adapter for another model: {type(model).__name__} has no linear "
                         f"layer "
                         f"{(unknown or [next(iter(state), 'at all')])[0]!r}")
    for name, key in pairs.items():
        weight = layers[name].weight
        a, b = (state[key.replace("lora_A", f"lora_{side}")].to(weight.device) for side in "AB")
        if (*b.shape[:1], *a.shape[1:]) != tuple(weight.shape):
            raise InputError(f"{path} is an adapter for another model: {name} is {tuple(weight.shape)} "
                             f"there and "
                             f"{(b.shape[0], a.shape[1])} here")
        weight.copy_(_sum(weight, a, b, factor))
