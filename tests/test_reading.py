"""How prompts and pictures are put to a model: a system prompt, bounds of pictures; what a run writes on the way."""
import json
import shutil

import pytest
import torch
from conftest import ROOT
from PIL import Image

import noise
import train_cdrl
from utils import preflight
from utils.cli import InputError
from utils.pictures import limited_size
from utils.prompts import Reading
from vlm import VLM

SMALL = ["--batch_size", "4", "--group_size", "2", "--scale_questions", "4", "--max_new_tokens", "4", "--eval_size", "4"]


def train(*argv):
    torch.manual_seed(0)
    return train_cdrl.train(train_cdrl.parse([*SMALL, *map(str, argv)]))


@pytest.mark.parametrize("size", [(4000, 3000), (112, 112), (30, 400), (1, 1), (57, 33)])
def test_bounds_of_pictures_hold_and_keep_the_shape(size):
    for least, most in ((0, 0), (0, 5000), (20_000, 0), (3000, 5000)):
        width, height = limited_size(size, least, most)
        assert (not most or width * height <= most) and width * height >= least
        assert abs(width / height - size[0] / size[1]) <= 0.05 * size[0] / size[1] + 1 / min(width, height)
    assert limited_size(size, 1, 10**8) == size


def test_large_pictures_take_fewer_tokens_and_noise_stays_at_the_towers_size(fresh):
    image = Image.new("RGB", (448, 448), "gray")
    plain = fresh.prompt_length([image], "?")
    fresh.reading = Reading(max_pixels=112 * 112)
    small = image.resize((112, 112))
    assert fresh.prompt_length([image], "?") == fresh.prompt_length([small], "?") < plain
    lengths = preflight.PromptLengths(fresh)
    assert lengths([(448, 448)], "?")[1] == lengths([(112, 112)], "?")[1]
    twin = noise.NoisedPicture(image, 999, None, 3)
    a, b = (fresh.encode([[picture]], ["?"])["pixel_values"]
            for picture in (twin, noise.NoisedPicture(small, 999, None, 3)))
    assert torch.equal(a, b)


def test_a_system_prompt_stands_before_the_question(fresh):
    plain = fresh.encode([[]], ["How many?"])["input_ids"]
    fresh.reading = Reading(system="You are brief.")
    text = fresh.tokenizer.decode(fresh.encode([[]], ["How many?"])["input_ids"][0])
    assert text.index("You are brief.") < text.index("How many?") and len(fresh.tokenizer(text)["input_ids"]) > plain.shape[1]
    fresh.reading.check(fresh.processor)
    fresh.processor.chat_template = "{{ messages[-1]['content'][0]['text'] }}"
    with pytest.raises(InputError, match="chat template drops it"):
        fresh.reading.check(fresh.processor)


def test_a_template_without_a_generation_prompt_is_said(tmp_path, capsys):
    shutil.copytree(ROOT / "tiny" / "base", tmp_path / "m")
    path = tmp_path / "m" / "chat_template.jinja"
    path.write_text(path.read_text().replace("add_generation_prompt", "false"))
    VLM.load(tmp_path / "m", "cpu")
    assert "has no generation prompt" in capsys.readouterr().err


def test_evaluation_and_weights_on_the_way_in_float16(tmp_path):
    train("--output", tmp_path / "run", "--steps", 2, "--eval_every", 1, "--weights_every", 1, "--keep_weights", 1,
          "--dtype", "float16", "--recipe", "grpo")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= row["held_out/accuracy"] <= 1 and 0 <= row["grad_norm"] < 100 for row in rows)
    assert [path.name for path in (tmp_path / "run").glob("weights-*")] == ["weights-2"]
    a = VLM.load(tmp_path / "run" / "weights-2", "cpu").model.state_dict()
    b = VLM.load(tmp_path / "run", "cpu").model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_full_disk_and_a_missing_logger_are_refused_first(tmp_path, monkeypatch, fresh):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 10**6))
    with pytest.raises(InputError, match="GiB into .* make room, lower --keep"):
        train("--output", tmp_path / "run", "--steps", 1)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match="--log wandb needs a package"):
        train("--output", tmp_path / "run", "--steps", 1, "--log", "wandb")
