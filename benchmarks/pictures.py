"""What a picture costs: decoded, its noised twin, encoded for the model; and how long a step waits for
pictures.

    python benchmarks/pictures.py  # Qwen2-VL's default: at most 1,003,520 pixels reach the tower
    python benchmarks/pictures.py --pixels 262144           # 512 x 512

Seconds of one core a picture, medians. `twin + encode`: the key region by CLIP, and both views through the
processor, the twin noised at the tower's resolution. Goals: .35 s (12 MP JPEG), .12 s (2 MP PNG), .03 s
(512-pixel PNG). The CLIP is the built-in one; ViT-L/14-336 adds about a second a picture on a core, or its
kept map (--clip_cache) nothing.
"""
import argparse
import io
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data
import noise
from utils import cli, prefetch
from vlm import VLM

QUESTION = "How many red circles are there?"
FILES = {"12 MP JPEG": (4000, 3000, "JPEG"), "2 MP PNG": (1632, 1224, "PNG"), "512-pixel PNG": (512, 512, "PNG")}


def file_of(width, height, kind):
    """Bytes of a picture with detail at every scale, which compresses about as a photo does."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
    stream = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).save(stream, kind)
    return stream.getvalue()


def model(pixels, folder):
    """The built-in model behind a processor that lets so many pixels pass."""
    shutil.copytree(ROOT / "tiny" / "base", folder)
    config = json.loads((folder / "processor_config.json").read_text())
    config["image_processor"]["size"]["longest_edge"] = pixels
    (folder / "processor_config.json").write_text(json.dumps(config))
    return VLM.load(folder, "cpu")


def measure(vlm, clip, content, pixels, repeats):
    """Seconds of one core for each stage of a picture (dict)."""
    stages = {"decode": [], "region": [], "encode clean": [], "encode twin": []}
    for i in range(repeats):
        sample = data.Sample("q", [content], QUESTION, enough=pixels)
        clock = [time.process_time()]
        pictures = sample.pictures()
        clock.append(time.process_time())
        (twin,) = noise.make_pairs([pictures], [QUESTION], clip, (999, 999), ["key"], 0.5, [i])
        clock.append(time.process_time())
        for images in (pictures, twin):
            vlm.encode([images], [QUESTION])
            clock.append(time.process_time())
        for stage, start, end in zip(stages.values(), clock, clock[1:]):
            stage.append(end - start)
    row = {name: float(np.median(values)) for name, values in stages.items()}
    return row | {"twin + encode": sum(row.values()) - row["decode"]}


def waiting(clip, content, pixels, seconds, photos=16, steps=5):
    """The share of a step that waits for decoded pictures and their regions, made one step ahead (float). The
    step itself is a wait of so many seconds, as a GPU's is."""
    def make(step):
        samples = [data.Sample(f"{step} {i}", [content], QUESTION, enough=pixels) for i in range(photos)]
        _, pictures = prefetch.open_pictures(samples)
        return noise.make_pairs(pictures, [QUESTION] * photos, clip, (999, 999), ["key"] * photos, 0.5, range(photos))
    ahead, waited, start = prefetch.Ahead(make, steps), 0.0, None
    for step in range(steps):
        clock = time.perf_counter()
        ahead(step)
        if step:                        # the first step has nothing to run beside
            waited += time.perf_counter() - clock
        start = start or time.perf_counter()
        time.sleep(seconds)
    ahead.close()
    return waited / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pixels", type=int, default=1280 * 28 * 28, help="that reach the vision tower at "
                                                                           "most")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--step_seconds", type=float, default=5.0, help="what a step of 16 photos takes "
                                                                        "beside pictures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    clip = noise.ClipAttention.from_pretrained(device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        vlm = model(args.pixels, Path(folder) / "model")
        rows = {name: measure(vlm, clip, file_of(*shape), args.pixels, args.repeats) for name, shape in FILES.items()}
    print(f"seconds of one core a picture; at most {args.pixels:,} pixels reach the tower\n{cli.table(rows)}")
    share = waiting(clip, file_of(*FILES["12 MP JPEG"]), args.pixels, args.step_seconds)
    print(f"\na step of 16 photos of 12 MP and {args.step_seconds:g} s waits for pictures {share:.1%} of "
          f"its time")


if __name__ == "__main__":
    cli.command("pictures.py", main)
