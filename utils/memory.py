"""Does it fit? Parameters, tokens and memory of a training run from a model's settings; no weight is read.

    torchrun --nproc-per-node 8 train_cdrl.py --model Qwen/Qwen2.5-VL-7B-Instruct --data train.jsonl --dry_run
    WORLD_SIZE=8 python train_cdrl.py --model ... --dtype bfloat16 --memory 80 --dry_run       # the same
    without the GPUs
(LOCAL_WORLD_SIZE=8 beside WORLD_SIZE=16: of two machines; the CPU's memory is that of one.)

Exact: weights, gradients, optimizer state, CLIP. From above: keys and values of the rollouts (samples of a
prompt share its part where the model lets them). Estimated: activations, from the sizes of the blocks with
fused attention and a gated MLP. Fragmentation and the CUDA context are a flat tenth on top.
"""
import math
import os
import random
from collections import defaultdict

import torch
from transformers.cache_utils import DynamicLayer

from utils import cli, distributed, loading
from utils.caches import StateLayer, new_cache
from utils.cli import InputError
from utils.distributed import GIB, choices, describe, device_memory, dtype_of, parameters, state_bytes
from utils.loading import CHUNK_LOGITS, TRIM_EVERY
from utils.preflight import PromptLengths, check_questions, disk_of_run

ASKED = 32              # questions whose tokens are counted


def host_memory():
    """GiB of this machine's own memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB






def activations(config, tokens, size, gradient_checkpointing, read):
    """Bytes that the backward pass needs of `tokens` passing the blocks of a text or vision config.

    A block holds about 12 vectors of the hidden size and 4 of the MLP's for each token; with checkpointing
    its input alone (and, in a decoder, the keys and values it read: `read` tokens of them), beside one block
    that is run again. Without, those are held twice: as they were read, and repeated for the heads that share
    them.
    """
    def of(*names, default=0):
        return next((getattr(config, name) for name in names if getattr(config, name, None)), default)
    layers, hidden = of("num_hidden_layers", "depth", default=1), of("embed_dim", "hidden_size", default=1)
    count, used = loading.experts(config)
    mlp = of("intermediate_size", default=4 * hidden) if count == 1 else \
        used * of("moe_intermediate_size", "intermediate_size") + of("shared_expert_intermediate_size")
    block, cached = size * tokens * (12 * hidden + 4 * mlp), size * read * key_values(config)
    if gradient_checkpointing:
        return layers * (size * tokens * hidden + cached) + block
    return layers * (block + cached + size * read * key_values(config, repeated=True))


def patches(pixels, config):
    """How many tokens a question's pictures are inside the vision tower, before any merging (int).

    pixels: what the processor made of them; one row a patch (..., N, D), or whole tiles (..., 3, H, W), which
    the tower cuts into patches of config.patch_size, 14 where its settings name none.
    """
    if pixels is None:
        return 0
    if pixels.ndim <= 3:
        return math.prod(pixels.shape[:-1])
    size = getattr(config, "patch_size", 14)
    height, width = (size, size) if isinstance(size, int) else size
    return math.prod(pixels.shape[:-3]) * (pixels.shape[-2] // height) * (pixels.shape[-1] // width)


def key_values(config, repeated=False):
    """Numbers that one layer's cache holds for a token; repeated: a copy for each head of the queries. Of
    layers that differ (Gemma 4): the largest."""
    if getattr(config, "is_heterogeneous", False):
        return max(key_values(layer, repeated) for layer in config.per_layer_config)
    heads = None if repeated else getattr(config, "num_key_value_heads", None)
    heads = heads or getattr(config, "num_attention_heads", None) or 1
    width = getattr(config, "head_dim",
                    None) or config.hidden_size // (getattr(config, "num_attention_heads", None) or 1)
    return 2 * heads * width


def cache_bytes(config, size):
    """Bytes that the cache of a text config holds -> (for a token, for a row). size: bytes of a number.

    Attention layers hold keys and values for each token. Linear-attention layers hold states for each row: a
    convolution's last words, and a matrix a head in fp32 (48 MiB a row for Qwen3.5-9B)."""
    layers = new_cache(config).layers
    linear = sum(isinstance(layer, StateLayer) for layer in layers)
    configs = config.per_layer_config if getattr(config, "is_heterogeneous",
                                                 False) else [config] * len(layers)
    numbers = sum(key_values(of) for layer, of in zip(layers, configs) if isinstance(layer, DynamicLayer))
    heads, width = getattr(config, "linear_num_value_heads", 0), getattr(config, "linear_value_head_dim", 0)
    key_width = getattr(config, "linear_key_head_dim", 0)
    convolved = 2 * key_width * getattr(config, "linear_num_key_heads",
                                        0) + heads * width or config.hidden_size
    kernel = getattr(config, "linear_conv_kernel_dim", None) or getattr(config, "conv_L_cache", 0)
    return size * numbers, linear * (size * convolved * kernel + 4 * heads * key_width * width)


def dry_run(args, vlm, clip_parameters, samples, prompt_of, world):
    """Print what a run is made of and what it needs; InputError where that is more than a device has.

    vlm: the model without its weights. prompt_of: sample -> its prompt.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compute, (state_sharded, gradient_checkpointing) = dtype_of(args.run, device), choices(args, device,
                                                                                           world, vlm)
    total, trained = parameters(vlm, args.freeze_vision, args.run.lora_rank, args.run.lora_target)
    vision = sum(p.numel() for p in loading.vision_parameters(vlm))
    ranks, size = (world if state_sharded else 1), compute.itemsize
    sharded = distributed.needs_fsdp(world, state_sharded, args.run.offload, compute,
                                     vlm.model.dtype if args.run.lora_rank else torch.float32)

    image_id = next((getattr(vlm.model.config, name) for name in ("image_token_id", "image_token_index")
                     if isinstance(getattr(vlm.model.config, name, None), int)), -1)
    if isinstance(samples, list):           # of a file: all are counted, and the longest are looked at
        counts = check_questions(PromptLengths(vlm), samples, prompt_of, args.max_new_tokens, vlm.context)
        chosen = [sample for *_, sample in sorted(counts, key=lambda count: -count[0])[:4]]
    else:                                   # built-in questions are alike
        chosen = [samples[i] for i in random.Random(0).sample(range(len(samples)), min(ASKED, len(samples)))]
    text, sight = vlm.text_config, vlm.model.config.vision_config
    counts = []
    for s in chosen:
        inputs = vlm.encode([s.pictures()], [prompt_of(s)])
        ids = inputs["input_ids"]
        vision_tokens = sum(patches(value, sight) for key, value in inputs.items() if "pixel_values" in key)
        counts.append((ids.shape[1], int((ids == image_id).sum()), vision_tokens))
    prompt, picture, vision = (max(column) for column in zip(*counts))

    if prompt + args.max_new_tokens > vlm.context:
        raise InputError(f"a prompt takes {prompt} tokens and --max_new_tokens {args.max_new_tokens} more, "
                         f"but the model's "
                         f"context is {vlm.context}")
    noised = args.batch_size if args.uses_noised else 0
    questions, views = args.batch_size // world, 1 + args.uses_noised
    # Both views, whatever a step rolls out: so the base's confidence is measured, and the probe asks no more
    # at once.
    rollouts, length = questions * args.group_size * 2, prompt + args.max_new_tokens
    micro_batch = min(questions, args.run.micro_batch)
    if args.run.micro_tokens:
        fitting = args.run.micro_tokens // (views * (prompt + args.group_size * args.max_new_tokens))
        micro_batch = max(1, min(micro_batch, fitting))
    block = max(sum(p.numel() for p in b.parameters())
                for b in distributed.blocks(vlm.model)) if sharded else 0
    left = total - sum(p.numel() for b in distributed.blocks(vlm.model)
                       for p in b.parameters()) if sharded else 0
    state = state_bytes(total, trained, ranks, args.run.offload, vlm.model.dtype.itemsize
                        if args.run.lora_rank else 4)
    state["device", "CLIP, fp32"] = 4 * clip_parameters
    if args.kl_beta and not args.run.lora_rank:  # the reference is the base under the adapter
        state["CPU" if args.run.offload else "device", "reference model"] = 4 * total / ranks
    a_token, a_row = cache_bytes(text, size)
    rolling = {"all weights, gathered": size * total if sharded else 0,
               "keys and values of the rollouts": rollouts * length * a_token,
               "probabilities of a word": 32 * rollouts * vlm.vocabulary,
               "logits of the words recorded together": 12 * min(CHUNK_LOGITS,
                                                                 TRIM_EVERY * rollouts * vlm.vocabulary)}
    if a_row:
        rolling["states of the rollouts"] = rollouts * a_row
    tokens = micro_batch * views * (prompt + args.group_size * args.max_new_tokens)
    learning = {"weights of two blocks and the rest, gathered": size * (2 * block + left),
                "gradients of a block or the rest, before they are summed": (size + 4) * max(block, left),
                "activations, language": activations(text, tokens, size, gradient_checkpointing,
                                                      micro_batch * views * args.group_size * length),
                "activations, vision": 0 if args.freeze_vision else activations(
                    sight, micro_batch * views * vision_tokens, size, gradient_checkpointing, 0),
                "vocabulary head, one chunk": 16 * min(CHUNK_LOGITS, tokens * vlm.vocabulary)}
    rows = defaultdict(dict)
    for (where, name), value in state.items():
        rows[name][where] = value / GIB
    file = vlm.model.dtype.itemsize * total                         # in the dtype that the settings name
    rows["the model's file, while each rank reads it"]["CPU"] = file / GIB
    saved = trained if args.run.lora_rank else total
    rows["a checkpoint's weights, first rank"]["CPU"] = 4 * saved / GIB
    for phase, bytes_by_name in (("rolling out", rolling), ("learning", learning)):
        for name, value in bytes_by_name.items():
            rows[name][phase] = value / GIB
    held = sum(value for (where, _), value in state.items() if where == "device")
    idle = state.get(("device", "gradients, fp32"), 0)              # there are none while rolling out
    peak = {"rolling out": 1.1 * (held - idle + sum(rolling.values())) / GIB,
            "learning": 1.1 * (held + sum(learning.values())) / GIB}
    active = loading.active_parameters(vlm.model)
    print(f"{cli.shown(args.model)}: {total:,} parameters ({vision:,} of them vision), {trained:,} train"
          + f", {active:,} are active for a token" * (loading.experts(text)[0] > 1))
    print(describe(compute, state_sharded, gradient_checkpointing, world) + ", offload" * args.run.offload)
    print(f"tokens: longest of {len(chosen)} prompts {prompt}, {picture} of them pictures; completion "
          f"{args.max_new_tokens}")
    a_rank = questions * views * args.group_size
    print(f"rollouts a step: {(args.batch_size + noised) * args.group_size} ({args.batch_size} questions "
          f"and {noised} noised "
          f"twins x {args.group_size}), a rank at most {a_rank}; questions a forward pass when learning: "
          f"{micro_batch}")
    columns = [c for c in ("device", "CPU", "rolling out", "learning")
               if any(c in cells for cells in rows.values())]
    print("\nGiB a rank")
    print(cli.table({name: {c: cells.get(c, "") for c in columns} for name, cells in rows.items()}))
    needed, free = disk_of_run(args, total, trained, size)      # said alone: the run may be elsewhere
    print(f"\ndisk: {needed:.2f} GiB are written, {free:.2f} are free here"
          + ("; too few, a run here would be refused" if needed > free else ""))
    memory, here = device_memory(args.run, device), int(os.environ.get("LOCAL_WORLD_SIZE", world))
    waiting = here * sum(value for (where, _), value in state.items() if where == "CPU") + 4 * saved
    waiting = max(waiting, here * file) / GIB  # not at once: what is kept is made share by share
    print(f"\npeak: {peak['rolling out']:.2f} GiB while rolling out, {peak['learning']:.2f} while learning"
          + (f", of {memory:g}" if memory else "; --memory N says what a device has")
          + f"; {waiting:.2f} of the CPU's memory")
    if memory and max(peak.values()) > memory:
        more = [flag for flag,
                used in (("--shard fsdp over more ranks", False), ("--offload", args.run.offload),
                                        ("--activation_checkpointing on", gradient_checkpointing),
                                        ("--freeze_vision", args.freeze_vision),
                                        ("--micro_batch 1", micro_batch == 1)) if not used]
        raise InputError(f"{max(peak.values()):.2f} GiB a rank do not fit into {memory:g}; try "
                         f"{', '.join(more)}, or a smaller --batch_size, --group_size or --max_new_tokens")
    computing = 0.0 if device.type == "cuda" else here * max(peak.values())
    # --memory: the plan is for another machine
    if waiting + computing > host_memory() and not args.run.memory:
        less = ["more machines", *["--freeze_vision"] * (not args.freeze_vision),
                *["do without --offload"] * args.run.offload,
                *["--memory N for a device that is not here"] * bool(computing)]
        raise InputError(f"{waiting + computing:.2f} GiB of the CPU's memory are needed, by {here} ranks "
                         f"together, and this "
                         f"machine has {host_memory():.2f}; try {' or '.join(less)}")
