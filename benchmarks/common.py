"""What the benchmarks share: a random-weight Qwen2.5-VL with the real vocabulary, timing side by side, peak memory.

Contenders run in one process, alternating, after a warm-up; medians are reported and the ratio is to `ours`. Peak memory is
measured in a process of its own for each contender: what it adds to what is resident once the model is loaded.
"""
import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers

import data

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from utils.loading import load_processor
from vlm import VLM

VOCABULARY = 151_936


def big_vocabulary(hidden=512, layers=4, heads=8, words=VOCABULARY):
    """A random-weight Qwen2.5-VL with so many words, spoken to with the built-in tokenizer; every word may be sampled."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    tiny = ROOT / "tiny" / "base"
    config = Qwen2_5_VLConfig.from_pretrained(tiny)
    text, vision = config.text_config, config.vision_config
    text.vocab_size, text.hidden_size, text.num_hidden_layers = words, hidden, layers
    text.num_attention_heads, text.num_key_value_heads, text.intermediate_size = heads, heads // 4, 4 * hidden
    text.rope_parameters = {**text.rope_parameters, "mrope_section": [hidden // heads // 2 - 2 * (hidden // heads // 6),
                                                                     hidden // heads // 6, hidden // heads // 6]}
    text.layer_types, text.max_position_embeddings = ["full_attention"] * layers, 4096
    vision.out_hidden_size = hidden
    torch.manual_seed(0)
    vlm = VLM(Qwen2_5_VLForConditionalGeneration(config), load_processor(tiny))
    vlm.banned[:] = False
    vlm.banned[[config.image_token_id, config.video_token_id]] = True
    return vlm


def picture(size=448):
    """A picture of size x size pixels: a built-in board, enlarged."""
    return data.synthetic("val", 0, 0).images[0].resize((size, size))


def endless(vlm):
    """No completion ends before max_new_tokens: equal tokens for every contender."""
    vlm.banned[vlm.eos] = True
    vlm.eos = torch.tensor([-1])
    vlm.model.generation_config.eos_token_id = None
    return vlm


def extra_memory(function):
    """MiB that a call adds, at its peak, to what is resident before it (Linux)."""
    def status(key):
        return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0]) / 1024
    Path("/proc/self/clear_refs").write_text("5")           # the peak so far is forgotten
    before = status("VmRSS")
    function()
    return status("VmHWM") - before


def at_least(low):
    """What argparse reads a whole number with that must not be below `low`."""
    def number(text):
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least {low}")
        return int(text)
    return number


def program(name):
    """What argparse reads a program with that must be there."""
    if not shutil.which(name):
        raise argparse.ArgumentTypeError(f"{name} is no program; install it as the top of this script says, and give its path")
    return name


def side_by_side(contenders, rounds):
    """{name: function} -> {name: median seconds}, alternating, after one warm-up each."""
    seconds = {name: [] for name in contenders}
    for i in range(rounds + 1):
        for name, function in contenders.items():
            start = time.perf_counter()
            function()
            if i:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def memory_of(script, *arguments):
    """Run `script --only ...` in a process of its own -> the MiB that it reports as its last line."""
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def versions():
    return (f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads, "
            f"Python {sys.version.split()[0]}")
