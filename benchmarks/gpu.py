"""On one GPU: decoding against the memory's bandwidth, and a whole training step, at the sizes of Qwen2.5-VL 3B and 7B.

    python benchmarks/gpu.py --sizes 3B 7B                            # random weights, real shapes; some ten minutes
    python benchmarks/gpu.py --sizes 7B --only train --offload        # 7B's state of training in the CPU's memory
    python benchmarks/gpu.py --sizes tiny --device cpu --dtype float32 --new_tokens 8 --rows 4 --pixels 112     # a dry run
    python benchmarks/gpu.py --write 7B runs/7B && python train_cdrl.py --model runs/7B --dry_run --memory 80

Decoding: --rows samples of one question with a picture of --pixels x --pixels (896: 1,024 tokens), tokens a second with
confidence, beside transformers' own `generate` without, in a dynamic and in a compiled static cache (CUDA graphs), as a share
of the bound: each token must read all weights and the keys and values of its row once, at --bandwidth.
Training: one question, 8 rollouts on each of two views, --completion tokens, with an adapter (LoRA, needs peft) and with all
weights. Seconds and peak memory by phase and of the whole step. MFU counts 6 FLOP a trained parameter and token (frozen
under an adapter: 4), the vision tower's at its patches, without what activation checkpointing runs again.
"""
import argparse
import gc
import json
import sys
import time
from dataclasses import replace

import torch
from common import ROOT, VLM, at_least, data, load_processor, picture, versions
from transformers import AutoConfig, AutoModelForImageTextToText, Qwen2_5_VLConfig

import noise
import train_cdrl
from utils import cli, distributed, loading, lora
from utils.cli import InputError
from utils.memory import key_values

# The published settings of Qwen2.5-VL.
VISION = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, patch_size=14, window_size=112,
              fullatt_block_indexes=[7, 15, 23, 31], spatial_merge_size=2, temporal_patch_size=2)
SIZES = {
    "3B": dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2,
               vocab_size=151936, tie=True),
    "7B": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
               vocab_size=152064, tie=False)}


def settings(size, pixels):
    """-> (config, processor) of a size, spoken to with the built-in tokenizer; pictures keep their pixels."""
    processor = load_processor(ROOT / "tiny" / "base")
    processor.image_processor.size = {"shortest_edge": pixels * pixels, "longest_edge": pixels * pixels}
    if size == "tiny":
        return AutoConfig.from_pretrained(ROOT / "tiny" / "base"), processor
    processor.image_processor.patch_size = 14
    text, tie = dict(SIZES[size]), SIZES[size]["tie"]
    del text["tie"]
    ids = {name: processor.tokenizer.convert_tokens_to_ids(token) for name, token in (
        ("image_token_id", "<|image_pad|>"), ("video_token_id", "<|video_pad|>"), ("vision_start_token_id", "<|vision_start|>"),
        ("vision_end_token_id", "<|vision_end|>"))}
    config = Qwen2_5_VLConfig(
        text_config=dict(text, max_position_embeddings=128000, rms_norm_eps=1e-6, tie_word_embeddings=tie, rope_parameters={
            "rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}),
        vision_config=dict(VISION, out_hidden_size=text["hidden_size"]), tie_word_embeddings=tie, **ids)
    return config, processor


def build(size, pixels, device, dtype):
    """A VLM with random weights, made on the device; no completion ends early."""
    config, processor = settings(size, pixels)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    vlm = VLM(model, processor)
    vlm.banned[len(vlm.tokenizer):] = False                     # words that the built-in tokenizer does not know
    vlm.banned[vlm.eos] = True
    vlm.eos = torch.tensor([-1], device=device)
    vlm.model.generation_config.eos_token_id = None
    return vlm


def clock(device, function, *arguments):
    """-> (seconds, peak GiB, result)."""
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    result = function(*arguments)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan"), result


def decoding(vlm, rows, args):
    """Tokens a second, of the steps after the prefill: a long run minus a short one."""
    images, prompts = [[picture(args.pixels)]], ["How many red circles are there?"]
    inputs = vlm.encode(images, prompts)
    length = inputs["input_ids"].shape[1]

    @torch.no_grad()
    def generate(new, static):
        vlm.model.generate(**inputs, max_new_tokens=new, do_sample=True, top_k=0, num_return_sequences=rows,
                           **({"cache_implementation": "static"} if static else {}))
    runs = {"ours, with confidence": lambda new: vlm.sample(images, prompts, rows, max_new_tokens=new),
            "generate, dynamic cache": lambda new: generate(new, False)}
    if args.device != "cpu":
        runs["generate, static cache, compiled"] = lambda new: generate(new, True)
    table, short = {}, max(2, args.new_tokens // 8)
    weights = sum(p.numel() * p.element_size() for p in vlm.model.parameters()) - sum(
        p.numel() * p.element_size() for p in loading.vision_parameters(vlm))
    read = weights + rows * (length + args.new_tokens / 2) * vlm.text_config.num_hidden_layers * key_values(
        vlm.text_config) * vlm.head.weight.element_size()
    bound = rows / (read / (args.bandwidth * 1e12))
    for name, run in runs.items():
        run(short)                                              # a warm-up
        (few, _, _), (many, peak, _) = (clock(args.device, run, count) for count in (short, args.new_tokens))
        speed = rows * (args.new_tokens - short) / max(many - few, 1e-9)
        table[f"{name}, {rows} rows"] = {"tokens/s": speed, "share of the bound": speed / bound, "peak GiB": peak}
    return table


def training(vlm, size, args, lora_rank=0):
    """One real step of `ours` on one question with two views -> a row for each phase. lora_rank: of an adapter that learns
    alone; 0 = all weights learn."""
    device = torch.device(args.device)
    settings = train_cdrl.parse([])
    settings = replace(settings, batch_size=1, group_size=8, max_new_tokens=args.completion,
                       run=replace(settings.run, micro_batch=1, eval_size=0))
    clip = noise.ClipAttention.from_pretrained(settings.clip, device)
    if lora_rank:
        lora.add(vlm, lora_rank, lora_rank, "language", size)
    loading.checkpoint_activations(distributed.blocks(vlm.model), vlm.cache_name)
    policy = distributed.shard(vlm, device, getattr(torch, args.dtype), False, offload=args.offload)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0, fused=parameters[0].device.type == "cuda")
    sample = data.synthetic("train", 0, 0)
    sample.images = [picture(args.pixels)]
    confidence_map = {"lo": 8.0, "hi": 14.0, "slope": 0.9, "intercept": -10.0}
    for step in range(2):                                       # the first warms up
        def rollouts(step=step):
            batch = train_cdrl.prepare_step(vlm, clip, [sample], step, settings)
            return train_cdrl.roll_out(policy, *batch, step, settings)
        sampled, peak_sampled, views = clock(device, rollouts)
        train_cdrl.add_rewards(views, confidence_map, settings)
        train_cdrl.add_advantages(views, settings.adv_norm)
        passes = distributed.micro_batches(vlm, views, settings.run)
        num_loss_tokens = sum(len(r.tokens) for view in views for r in view.rollouts[0])
        optimizer.zero_grad()
        learned, peak_learned, _ = clock(device, train_cdrl.accumulate_gradients, policy, None, passes, confidence_map,
                                         num_loss_tokens, settings)
        distributed.clip_gradients(policy, 1.0)
        updated, peak_updated, _ = clock(device, optimizer.step)
    inputs = vlm.encode([sample.images], views[0].prompts)
    prompt, patches = inputs["input_ids"].shape[1], len(inputs["pixel_values"])
    vision = sum(p.numel() for p in loading.vision_parameters(vlm))
    text = sum(p.numel() for p in vlm.model.parameters()) - vision
    completions = 2 * settings.group_size * args.completion
    # Of a frozen weight no gradient is computed: 4 FLOP a token in place of 6. A frozen tower below it: 2.
    flop = (4 if lora_rank else 6) * text * (2 * prompt + completions) + (2 if lora_rank else 6) * vision * 2 * patches
    mfu = flop / learned / (args.flops * 1e12)
    name, rows = f"{size}, LoRA {lora_rank}" if lora_rank else size, {}
    for phase, seconds, share, peak in (
            ("rolling out", sampled, "", peak_sampled), ("learning", learned, mfu, peak_learned),
            ("update", updated, "", peak_updated),
            ("one real step", sampled + learned + updated, "", max(peak_sampled, peak_learned, peak_updated))):
        rows[f"{name}, {phase}"] = {"seconds": seconds, "tokens/s": completions / seconds if phase != "update" else "",
                                    "MFU": share, "peak GiB": peak}
    return rows


def keep(tables, args):
    """Write what has been measured so far."""
    if args.json:
        cli.write_atomically(ROOT / args.json, json.dumps(tables, indent=1))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=["3B", "7B"], choices=["tiny", *SIZES])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rows", nargs="+", type=at_least(1), default=[64, 256], help="samples decoded together")
    parser.add_argument("--new_tokens", type=at_least(3), default=256, help="tokens decoded a row")
    parser.add_argument("--pixels", type=at_least(28), default=896, help="width and height of the picture")
    parser.add_argument("--completion", type=at_least(2), default=512, help="tokens of a completion in the training step")
    parser.add_argument("--offload", action="store_true", help="the state of training in the CPU's memory")
    parser.add_argument("--lora_rank", type=at_least(0), default=64, help="of a training step with an adapter; 0 = none")
    parser.add_argument("--only", choices=["decode", "train"])
    parser.add_argument("--bandwidth", type=float, default=4.3, help="TB/s of the GPU's memory, measured by copying")
    parser.add_argument("--flops", type=float, default=790.0, help="bf16 TFLOP/s of the GPU, measured by matrix products")
    parser.add_argument("--json", help="write the tables to this file")
    parser.add_argument("--write", nargs=2, metavar=("SIZE", "DIR"), help="write settings without weights, for --dry_run")
    args = parser.parse_args()
    if args.write:
        for component in settings(args.write[0], args.pixels):
            component.save_pretrained(args.write[1])
        return
    if args.device == "cpu" and {*args.sizes} & {*SIZES}:
        parser.error(f"no GPU here for --sizes {' '.join(args.sizes)}; on a CPU: --sizes tiny --device cpu --dtype float32 "
                     "--new_tokens 8 --rows 4 --pixels 112")
    name = torch.cuda.get_device_name() if args.device != "cpu" else "CPU"
    print(f"{versions()}, {name}, {args.dtype}, pictures of {args.pixels} x {args.pixels}")
    tables = {"machine": name}
    for size in args.sizes:
        dtype = getattr(torch, args.dtype)
        vlm = build(size, args.pixels, args.device, dtype)
        print(f"\n{size}: {sum(p.numel() for p in vlm.model.parameters()):,} parameters")
        if args.only != "train":
            tables[f"{size}, decoding"] = {k: v for rows in args.rows for k, v in decoding(vlm, rows, args).items()}
            print(cli.table(tables[f"{size}, decoding"]))
            keep(tables, args)
        # The adapter first: its model is the smaller one. Each row starts from a model of its own.
        for rank in () if args.only == "decode" else (args.lora_rank, 0) if args.lora_rank else (0,):
            vlm = vlm or build(size, args.pixels, args.device, dtype)
            name = f"{size}, training" + f" LoRA {rank}" * (rank > 0)
            try:
                tables[name] = training(vlm, size, args, rank)
                print(cli.table(tables[name]))
            except torch.OutOfMemoryError as error:
                tables[name] = {"out of memory": str(error).splitlines()[0]}
                print(f"{name}: a step does not fit ({str(error).splitlines()[0]}); try --offload")
            except InputError as error:                         # no peft
                tables[name] = {"not run": str(error)}
                print(f"{name}: {error}")
            keep(tables, args)
            vlm = None
            gc.collect()                    # blocks and the functions that run them again hold each other
            if args.device != "cpu":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
