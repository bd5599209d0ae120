"""The shipped base is what the README says: partly competent in every skill, with headroom, and sure of what it cannot see;
the expert is better. Held-out questions, the defaults of train_cdrl.py."""
import json

import numpy as np
import pytest
from conftest import ROOT
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPModel

import data
import eval
from catts import Settings
from noise import parse_t
from tiny import questions
from train_cdrl import Args
from utils import tables
from vlm import VLM

SETTINGS = {"n": 8, "max_new_tokens": Args.max_new_tokens}


@pytest.fixture(scope="module")
def samples():
    return list(data.load("synthetic", "test", 240))


@pytest.fixture(scope="module")
def clean(base, samples):
    return eval.answer(base, samples, [s.images for s in samples], **SETTINGS)


@pytest.fixture(scope="module")
def noised(base, clip, samples):
    t = parse_t(Args.noise_t)[1]
    return {mode: eval.probe(base, samples, clip, (t,), mode, Args.mass, **SETTINGS)[t] for mode in ("key", "random")}


def mean(answers, field):
    return float(np.mean([getattr(a, field) for a in answers]))


@pytest.mark.parametrize("skill", questions.SKILLS)
def test_each_skill_is_partly_learned(clean, skill):
    assert 0.40 <= mean([a for a in clean if a.skill == skill], "correct") <= 0.75


def test_there_is_headroom_for_voting_and_for_rl(clean):
    found = tables.headroom(clean)
    assert found["majority@8"] >= found["pass@1"] + 0.04 and found["pass@8"] >= found["majority@8"] + 0.15, found


def test_it_does_not_know_that_it_cannot_see(clean, noised):
    """The paper's Figure 1: noise on the key region costs accuracy and no confidence, elsewhere it costs little."""
    key = mean(clean, "correct") - mean(noised["key"], "correct")
    random = mean(clean, "correct") - mean(noised["random"], "correct")
    assert key >= 0.15 and random <= key / 2, (key, random)
    assert mean(clean, "token_probability") - mean(noised["key"], "token_probability") < 0.05
    assert tables.summary(clean, noised["key"])["ECE"] > 0.15


def test_the_expert_is_clearly_better(clean, samples):
    expert = VLM.load(ROOT / "tiny" / "expert")
    own = eval.answer(expert, samples, [s.images for s in samples], n=2, max_new_tokens=Settings.expert_tokens)
    assert mean(own, "correct") >= mean(clean, "correct") + 0.25
    better = [mean([a for a in own if a.skill == s], "correct") - mean([a for a in clean if a.skill == s], "correct")
              for s in questions.SKILLS]
    assert min(better) > -0.05 and sum(gain > 0.05 for gain in better) >= 3, better


@pytest.mark.parametrize("name", ["base", "expert", "clip"])
def test_each_checkpoint_opens_plainly_and_has_a_card(name):
    path = ROOT / "tiny" / name
    if name == "clip":
        assert CLIPModel.from_pretrained(path).num_parameters() > 1e5
    else:
        assert AutoModelForImageTextToText.from_pretrained(path).num_parameters() > 1e6
        assert AutoProcessor.from_pretrained(path).image_processor.merge_size == 2
    card = (path / "README.md").read_text()
    assert all(word in card for word in (f"tiny/make.py {name}", "seed 1000", *questions.SKILLS))
    assert json.loads((path / "config.json").read_text())["model_type"] in ("qwen2_5_vl", "clip")


def test_together_they_take_at_most_12_megabytes():
    files = [f for name in ("base", "expert", "clip") for f in (ROOT / "tiny" / name).iterdir()]
    assert sum(f.stat().st_size for f in files) <= 12e6
