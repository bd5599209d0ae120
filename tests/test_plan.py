"""The memory that runs/*.sh and runs/README.md state is what --dry_run computes from the models' settings."""
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor

import train_cdrl

sys.path.insert(0, str(ROOT / "benchmarks"))
from gpu import settings  # noqa: E402

# What is published of openai/clip-vit-large-patch14-336 (427,944,193 parameters) and of Qwen2.5-VL.
LARGE_CLIP = CLIPConfig(projection_dim=768, text_config=dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12,
                                                             num_hidden_layers=12),
                        vision_config=dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16,
                                           num_hidden_layers=24, patch_size=14, image_size=336))
PARAMETERS = {"3B": "3,754,622,976", "7B": "8,292,166,656"}


def flags_of(script, folder):
    """What the script would start: (flags of train_cdrl.py, number of ranks)."""
    for name in ("python", "torchrun"):
        (folder / name).write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
        (folder / name).chmod(0o755)
    printed = subprocess.run(["bash", script, str(folder / "train.jsonl")], capture_output=True, text=True, check=True, env={
        **os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "NODES": "2", "HEAD": "a:1"}).stdout
    words = json.loads(printed)
    before, flags = words[:words.index("train_cdrl.py")], words[words.index("train_cdrl.py") + 1:]
    ranks = [int(before[before.index(name) + 1]) for name in ("--nnodes", "--nproc-per-node") if name in before]
    return flags, ranks[0] * ranks[-1] if len(ranks) == 2 else ranks[0] if ranks else 1


@pytest.mark.parametrize("name, offloaded", [("one_24gb_gpu", ""), ("one_80gb_gpu", ""), ("one_80gb_gpu", "7B"),
                                             ("eight_gpus", ""), ("several_nodes", "")])
def test_the_stated_memory_is_what_a_dry_run_computes(name, offloaded, tmp_path, capsys, monkeypatch):
    script = ROOT / "runs" / f"{name}.sh"
    LARGE_CLIP.save_pretrained(tmp_path / "clip")
    CLIPImageProcessor().save_pretrained(tmp_path / "clip")
    for i in range(5):
        Image.new("RGB", (896, 896), (i, 0, 0)).save(tmp_path / f"{i}.png")                 # 1,024 tokens
    rows = [{"id": str(i), "image": f"{i}.png", "question": "How many red circles are there?", "answer": "1"} for i in range(5)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags, ranks = flags_of(script, tmp_path)
    size = offloaded or re.search("[37]B", flags[flags.index("--model") + 1])[0]
    for part in settings(size, 896):
        part.save_pretrained(tmp_path / "model")
    published = json.loads((tmp_path / "model" / "config.json").read_text()) | {"dtype": "bfloat16"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(published))
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(min(ranks, 8)))
    train_cdrl.main([*flags, "--model", str(tmp_path / "model"), "--clip", str(tmp_path / "clip"), "--dtype", "bfloat16",
                     "--memory", "24" if "24" in name else "80", "--dry_run", *["--offload"] * bool(offloaded)])
    printed = capsys.readouterr().out
    assert f"{PARAMETERS[size]} parameters" in printed and "1024 of them pictures" in printed
    peak = round(max(map(float, re.search(r"peak: ([\d.]+) GiB while rolling out, ([\d.]+)", printed).groups())))
    waiting = round(float(re.search(r"([\d.]+) of the CPU's memory", printed)[1]))
    said = " ".join(line.lstrip("# ") for line in script.read_text().splitlines())
    row = next(line for line in (ROOT / "runs" / "README.md").read_text().splitlines() if line.startswith(f"| `runs/{name}.sh"))
    if offloaded:
        assert f"--offload: {peak} GiB on the GPU, {waiting} GiB in the CPU's memory" in said
        assert f"`--offload`: {peak} and {waiting} GiB of the CPU's memory" in row
        return
    assert f"not yet measured: {peak} GiB" in said and row.split("|")[3].strip() == str(peak)
    if ranks > 1:
        assert f"{waiting} GiB of the CPU's memory while eight ranks read the model" in said and f"({waiting} GiB)" in row
    if "--offload" in flags:
        assert f"{waiting} GiB in the CPU's memory" in said and f"({waiting} GiB)" in row
