"""Does it fit? Parameters, tokens and memory of a training run from a model's settings; no weight is read.

    torchrun --nproc-per-node 8 train_cdrl.py --model Qwen/Qwen2.5-VL-7B-Instruct --data train.jsonl --dry_run
    WORLD_SIZE=8 python train_cdrl.py --model ... --dtype bfloat16 --memory 80 --dry_run       # the same without the GPUs
(LOCAL_WORLD_SIZE=8 beside WORLD_SIZE=16: of two machines; the CPU's memory is that of one.)

Exact: weights, gradients, optimiser state, CLIP. From above: keys and values of the rollouts (samples of a prompt share its
part where the model lets them). Estimated: activations, from the sizes of the blocks with fused attention and a gated MLP.
Fragmentation and the CUDA context are a flat tenth on top.
"""
import math
import os
import random
from collections import defaultdict

import torch

from utils import cli, distributed
from utils.cli import InputError
from utils.distributed import GIB, choices, describe, device_memory, dtype_of, parameters, state_bytes
from utils.loading import CHUNK_LOGITS, TRIM_EVERY

ASKED = 32              # questions whose tokens are counted


def host_memory():
    """GiB of this machine's own memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB






def activations(config, tokens, size, again, read):
    """Bytes that the backward pass needs of `tokens` passing the blocks of a text or vision config.

    A block holds about 12 vectors of the hidden size and 4 of the MLP's for each token; with checkpointing its input alone
    (and, in a decoder, the keys and values it read: `read` tokens of them), beside one block that is run again. Without, those
    are held twice: as they were read, and repeated for the heads that share them.
    """
    def of(*names, default=0):
        return next((getattr(config, name) for name in names if getattr(config, name, None)), default)
    layers, hidden = of("num_hidden_layers", "depth", default=1), of("embed_dim", "hidden_size", default=1)
    mlp = of("intermediate_size", default=4 * hidden)
    block, kept = size * tokens * (12 * hidden + 4 * mlp), size * read * key_values(config)
    if again:
        return layers * (size * tokens * hidden + kept) + block
    return layers * (block + kept + size * read * key_values(config, repeated=True))


def patches(pixels, config):
    """How many tokens a question's pictures are inside the vision tower, before any merging (int).

    pixels: what the processor made of them; one row a patch (..., N, D), or whole tiles (..., 3, H, W), which the tower cuts
    into patches of config.patch_size, 14 where its settings name none.
    """
    if pixels is None:
        return 0
    if pixels.ndim <= 3:
        return math.prod(pixels.shape[:-1])
    size = getattr(config, "patch_size", 14)
    height, width = (size, size) if isinstance(size, int) else size
    return math.prod(pixels.shape[:-3]) * (pixels.shape[-2] // height) * (pixels.shape[-1] // width)


def key_values(config, repeated=False):
    """Numbers that one layer's cache holds for a token; repeated: a copy for each head of the queries."""
    heads = None if repeated else getattr(config, "num_key_value_heads", None)
    heads = heads or getattr(config, "num_attention_heads", None) or 1
    width = getattr(config, "head_dim", None) or config.hidden_size // (getattr(config, "num_attention_heads", None) or 1)
    return 2 * heads * width


def dry_run(args, vlm, clip_parameters, samples, prompt_of, noised, world):
    """Print what a run is made of and what it needs; InputError where that is more than a device has.

    vlm: the model without its weights. prompt_of: sample -> its prompt. noised: how many of a
    step's questions have a noised twin.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compute, (spread, again) = dtype_of(args, device), choices(args, device, world, vlm)
    total, trained = parameters(vlm, args.freeze_vision)
    vision = sum(p.numel() for p in vlm.vision_parameters())
    ranks, size = (world if spread else 1), compute.itemsize
    sharded = spread or world > 1 or args.offload or compute != torch.float32         # see parallel.shard

    image_id = next((getattr(vlm.model.config, name) for name in ("image_token_id", "image_token_index")
                     if isinstance(getattr(vlm.model.config, name, None), int)), -1)
    chosen = [samples[i] for i in random.Random(0).sample(range(len(samples)), min(ASKED, len(samples)))]
    text, sight = vlm.text_config, vlm.model.config.vision_config
    counts = []
    for s in chosen:
        inputs = vlm.encode([s.pictures()], [prompt_of(s)])
        ids = inputs["input_ids"]
        seen = sum(patches(value, sight) for key, value in inputs.items() if "pixel_values" in key)
        counts.append((ids.shape[1], int((ids == image_id).sum()), seen))
    prompt, picture, seen = (max(column) for column in zip(*counts))

    if prompt + args.max_new_tokens > vlm.context:
        raise InputError(f"a prompt takes {prompt} tokens and --max_new_tokens {args.max_new_tokens} more, but the model's "
                         f"context is {vlm.context}")
    questions, views = args.batch_size // world, 1 + (noised > 0)
    # Both views, whatever a step rolls out: so the base's confidence is measured, and the probe asks no more at once.
    rollouts, length = questions * args.group_size * 2, prompt + args.max_new_tokens
    part = min(questions, args.micro_batch)
    if args.micro_tokens:
        part = max(1, min(part, args.micro_tokens // (views * (prompt + args.group_size * args.max_new_tokens))))
    block = max(sum(p.numel() for p in b.parameters()) for b in distributed.blocks(vlm.model)) if sharded else 0
    left = total - sum(p.numel() for b in distributed.blocks(vlm.model) for p in b.parameters()) if sharded else 0
    state = state_bytes(total, trained, ranks, args.offload)
    state["device", "CLIP, fp32"] = 4 * clip_parameters
    if args.kl_beta:
        state["CPU" if args.offload else "device", "reference model"] = 4 * total / ranks
    rolling = {"all weights, gathered": size * total if sharded else 0,
               "keys and values of the rollouts": size * rollouts * length * text.num_hidden_layers * key_values(text),
               "probabilities of a word": 32 * rollouts * vlm.vocabulary,
               "logits of the words recorded together": 12 * min(CHUNK_LOGITS, TRIM_EVERY * rollouts * vlm.vocabulary)}
    tokens = part * views * (prompt + args.group_size * args.max_new_tokens)
    learning = {"weights of two blocks and the rest, gathered": size * (2 * block + left),
                "gradients of a block or the rest, before they are summed": (size + 4) * max(block, left),
                "activations, language": activations(text, tokens, size, again, part * views * args.group_size * length),
                "activations, vision": 0 if args.freeze_vision else activations(
                    sight, part * views * seen, size, again, 0),
                "vocabulary head, one chunk": 16 * min(CHUNK_LOGITS, tokens * vlm.vocabulary)}
    rows = defaultdict(dict)
    for (where, name), value in state.items():
        rows[name][where] = value / GIB
    file = vlm.model.dtype.itemsize * total                         # in the dtype that the settings name
    rows["the model's file, while each rank reads it"]["CPU"] = file / GIB
    rows["a checkpoint's weights, first rank"]["CPU"] = 4 * total / GIB
    for phase, parts in (("rolling out", rolling), ("learning", learning)):
        for name, value in parts.items():
            rows[name][phase] = value / GIB
    held = sum(value for (where, _), value in state.items() if where == "device")
    idle = state.get(("device", "gradients, fp32"), 0)              # there are none while rolling out
    peak = {"rolling out": 1.1 * (held - idle + sum(rolling.values())) / GIB,
            "learning": 1.1 * (held + sum(learning.values())) / GIB}
    print(f"{cli.shown(args.model)}: {total:,} parameters ({vision:,} of them vision), {trained:,} train")
    print(f"{describe(compute, spread, again, world)}{', offload' if args.offload else ''}")
    print(f"tokens: longest of {len(chosen)} prompts {prompt}, {picture} of them pictures; completion {args.max_new_tokens}")
    a_rank = (questions + math.ceil(noised / world)) * args.group_size
    print(f"rollouts a step: {(args.batch_size + noised) * args.group_size} ({args.batch_size} questions and {noised} noised "
          f"twins x {args.group_size}), a rank at most {a_rank}; questions a forward pass when learning: {part}")
    columns = [c for c in ("device", "CPU", "rolling out", "learning") if any(c in cells for cells in rows.values())]
    print("\nGiB a rank")
    print(cli.table({name: {c: cells.get(c, "") for c in columns} for name, cells in rows.items()}))
    memory, here = device_memory(args, device), int(os.environ.get("LOCAL_WORLD_SIZE", world))
    waiting = here * sum(value for (where, _), value in state.items() if where == "CPU") + 4 * total
    waiting = max(waiting, here * file) / GIB                       # not at once: what is kept is made share by share
    print(f"\npeak: {peak['rolling out']:.2f} GiB while rolling out, {peak['learning']:.2f} while learning"
          + (f", of {memory:g}" if memory else "; --memory N says what a device has")
          + f"; {waiting:.2f} of the CPU's memory")
    if memory and max(peak.values()) > memory:
        more = [flag for flag, used in (("--shard fsdp over more ranks", False), ("--offload", args.offload),
                                        ("--activation_checkpointing on", again), ("--freeze_vision", args.freeze_vision),
                                        ("--micro_batch 1", part == 1)) if not used]
        raise InputError(f"{max(peak.values()):.2f} GiB a rank do not fit into {memory:g}; try {', '.join(more)}, or a smaller "
                         "--batch_size, --group_size or --max_new_tokens")
    computing = 0.0 if device.type == "cuda" else here * max(peak.values())
    if waiting + computing > host_memory() and not args.memory:     # --memory: the plan is for another machine
        less = ["more machines", *["--freeze_vision"] * (not args.freeze_vision), *["do without --offload"] * args.offload,
                *["--memory N for a device that is not here"] * bool(computing)]
        raise InputError(f"{waiting + computing:.2f} GiB of the CPU's memory are needed, by {here} ranks together, and this "
                         f"machine has {host_memory():.2f}; try {' or '.join(less)}")
