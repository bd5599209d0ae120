"""The memory that the recipes of newer models state is what --dry_run computes from their published settings."""
import json
import re

import pytest
from conftest import ROOT
from families import gemma4, qwen3_5, qwen3_vl, untyped
from PIL import Image
from test_plan import LARGE_CLIP, flags_of
from transformers import CLIPImageProcessor, Qwen2VLImageProcessor
from transformers.models.gemma4 import Gemma4ImageProcessorPil

import train_cdrl

QWEN35 = dict(num_hidden_layers=32, num_attention_heads=16, num_key_value_heads=4, head_dim=256, vocab_size=248320,
              linear_num_key_heads=16, linear_num_value_heads=32, linear_key_head_dim=128, linear_value_head_dim=128,
              layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 8, max_position_embeddings=262144)
TOWER = dict(depth=27, hidden_size=1152, intermediate_size=4304, num_heads=16, num_position_embeddings=2304)
# name: (family, text settings, vision settings, does the head share the embeddings?)
PUBLISHED = {
    "Qwen/Qwen3.5-4B": (qwen3_5, dict(QWEN35, hidden_size=2560, intermediate_size=9216),
                        dict(TOWER, depth=24, hidden_size=1024, intermediate_size=4096, out_hidden_size=2560), True),
    "Qwen/Qwen3.5-9B": (qwen3_5, dict(QWEN35, hidden_size=4096, intermediate_size=12288),
                        dict(TOWER, out_hidden_size=4096), False),
    "Qwen/Qwen3-VL-8B-Instruct": (qwen3_vl, dict(
        hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, vocab_size=151936, max_position_embeddings=262144),
        dict(TOWER, out_hidden_size=4096, deepstack_visual_indexes=[8, 16, 24]), False),
    "google/gemma-4-E4B-it": (gemma4, dict(
        hidden_size=2560, intermediate_size=10240, num_hidden_layers=42, num_attention_heads=8, num_key_value_heads=2,
        head_dim=256, vocab_size=262144, vocab_size_per_layer_input=262144, hidden_size_per_layer_input=256,
        num_kv_shared_layers=18, sliding_window=512, layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 7,
        final_logit_softcapping=30.0, max_position_embeddings=131072, per_layer_config=None, global_head_dim=512),
        dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=16, num_attention_heads=12, num_key_value_heads=12,
             head_dim=64, patch_size=16, pooling_kernel_size=3, position_embedding_size=10240), True)}


def write(name, path):
    """A model's settings, its processor at the published patch size, and no weights."""
    family, text, vision, tied = PUBLISHED[name]
    config, images, words, processor, settings = family()
    sizes = {key: value for key, value in (untyped(config.text_config) | text).items() if value is not None}
    ids = {key: value for key, value in untyped(config).items() if key.endswith(("_id", "_index"))}
    config = type(config)(text_config=dict(sizes, tie_word_embeddings=tied, dtype="bfloat16"), tie_word_embeddings=tied,
                          vision_config=untyped(config.vision_config) | vision, dtype="bfloat16", **ids)
    images = Gemma4ImageProcessorPil() if family is gemma4 else Qwen2VLImageProcessor(
        patch_size=16, size=dict(shortest_edge=896**2, longest_edge=896**2))
    for piece in (config, images, words):
        piece.save_pretrained(path)
    (path / "processor_config.json").write_text(json.dumps({"processor_class": processor, **settings}))


@pytest.mark.parametrize("script, name", [
    ("lora_24gb_gpu", "Qwen/Qwen3.5-4B"), ("lora_80gb_gpu", "Qwen/Qwen3.5-9B"), ("lora_80gb_gpu", "Qwen/Qwen3-VL-8B-Instruct"),
    ("lora_80gb_gpu", "google/gemma-4-E4B-it"), ("eight_gpus_qwen35", "Qwen/Qwen3.5-9B"),
    ("eight_gpus_qwen35", "Qwen/Qwen3-VL-8B-Instruct")])
def test_the_stated_memory_is_what_a_dry_run_computes(script, name, tmp_path, capsys, monkeypatch):
    LARGE_CLIP.save_pretrained(tmp_path / "clip")
    CLIPImageProcessor().save_pretrained(tmp_path / "clip")
    for i in range(5):                                  # held out by picture: each question has one of its own
        Image.new("RGB", (896, 896), (i, 0, 0)).save(tmp_path / f"{i}.png")
    rows = [{"id": str(i), "image": f"{i}.png", "question": "How many red circles are there?", "answer": "1"} for i in range(5)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags, ranks = flags_of(ROOT / "runs" / f"{script}.sh", tmp_path)
    text = " ".join(line.lstrip("# ") for line in (ROOT / "runs" / f"{script}.sh").read_text().splitlines())
    write(name, tmp_path / "model")
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    train_cdrl.main([*flags, "--model", str(tmp_path / "model"), "--clip", str(tmp_path / "clip"), "--dtype", "bfloat16",
                     "--memory", "24" if "24" in script else "80", "--dry_run"])
    printed = capsys.readouterr().out
    peak = round(max(map(float, re.search(r"peak: ([\d.]+) GiB while rolling out, ([\d.]+)", printed).groups())))
    default = flags[flags.index("--model") + 1] == name
    assert (f"not yet measured: {peak} GiB" if default else f"--model {name}: {peak} GiB") in text, printed
    row = next(line for line in (ROOT / "runs" / "README.md").read_text().splitlines() if line.startswith(f"| `runs/{script}.sh"))
    assert row.split("|")[3].strip() == str(peak) if default else f": {peak}" in row
    if "Qwen3.5" in name:       # a matrix of 128 x 128 in fp32 for 32 heads of 24 layers, and a convolution's last words
        a_rank = int(re.search(r"a rank at most (\d+)", printed)[1])
        assert 48 < float(re.search(r"states of the rollouts +([\d.]+)", printed)[1]) * 1024 / a_rank < 51
