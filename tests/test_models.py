"""Every architecture people use, as a tiny random model, passes the same tests: `VLM` against transformers' own `generate`
and its own full forward pass without a cache.

    python -m pytest tests/test_models.py                       # one family of each kind
    python benchmarks/families.py                               # all of them, and a table (results/families.md)

The families are in `families.py`. Those whose image processor needs torchvision are skipped by name where it is absent.
"""
import importlib.util
import json
import os

import programs
import pytest
import torch
import transformers as tf
from conftest import ENVIRONMENT, ROOT, ahead
from families import (
    FAMILIES,
    IMAGES,
    NEEDS_TORCHVISION,
    PROMPTS,
    REFUSED,
    emu3,
    gemma3,
    internvl,
    paligemma2,
    picture,
    qwen3_5_moe,
    smolvlm,
    write,
)

from utils import distributed, loading, memory
from utils.caches import STATES, tensors_of
from utils.cli import InputError
from vlm import VLM


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On matrices this small a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def absent(family):
    """The package that a family's processor needs and that is not here (str), or None."""
    needed = ["torchvision"] * (family in NEEDS_TORCHVISION) + ["num2words"] * (family is smolvlm)
    return next((name for name in needed if importlib.util.find_spec(name) is None), None)


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.__name__)
def path(request, tmp_path_factory):
    if package := absent(request.param):
        pytest.skip(f"{request.param.__name__}'s processor needs {package}, which is not here")
    return write(request.param, tmp_path_factory.mktemp(request.param.__name__))


@pytest.fixture(scope="module")
def vlm(path):
    return VLM.load(path, "cpu")


def rounding(vlm):
    """How far apart two orders of summing may be: a linear-attention layer's states add up over all words."""
    return 5e-5 if vlm.min_words > 1 else 1e-5


def flat(groups):
    return [r for group in groups for r in group]


def padded(rows):
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


@pytest.fixture(scope="module")
def rollouts(vlm):
    """Two samples of every prompt."""
    return flat(vlm.sample(IMAGES, PROMPTS, n=2, max_new_tokens=6, seed=1))


def pixels_of(inputs):
    return next(value for key, value in inputs.items() if key.startswith("pixel_values"))


def plain(vlm, images, prompt, completion):
    """Log-probs of a completion (T,) by one forward pass of transformers' own model: no cache, no padding, no batch. The
    loss of its labels path must be minus their mean."""
    inputs = loading.cast_pixels(vlm.encode([images], [prompt]), vlm.head.weight.dtype)
    length, size = inputs["input_ids"].shape[1], len(completion)
    for key, value in inputs.items():
        if value.shape == (1, length):                  # what goes along with the tokens: a completion is words, type 0
            more = {"input_ids": completion, "attention_mask": torch.ones(size)}.get(key, torch.zeros(size))
            inputs[key] = torch.cat([value, more[None].to(value.dtype)], 1)
    labels = inputs["input_ids"].clone()
    inputs.pop("labels", None)                          # PaliGemma's processor makes some of its own
    labels[:, :length] = -100
    outputs = vlm.model(**inputs, labels=labels, use_cache=False)
    logp = outputs.logits[0, length - 1:-1].float().log_softmax(-1).gather(-1, completion[:, None])[:, 0]
    torch.testing.assert_close(outputs.loss, -logp.mean(), atol=1e-4, rtol=0)
    return logp


def test_greedy_equals_generate_token_for_token(vlm):
    inputs = loading.cast_pixels(vlm.encode(IMAGES, PROMPTS), vlm.head.weight.dtype)
    assert (inputs["attention_mask"] == 0).any()
    expected = vlm.model.generate(**inputs, max_new_tokens=8, do_sample=False,
                                  suppress_tokens=vlm.banned.nonzero()[:, 0].tolist())[:, inputs["input_ids"].shape[1]:]
    found = [r.tokens for r in flat(vlm.sample(IMAGES, PROMPTS, greedy=True, max_new_tokens=8))]
    assert padded(found).tolist() == expected[:, :max(map(len, found))].tolist()


def test_sampled_equals_scored_equals_a_plain_forward(vlm, rollouts):
    with torch.no_grad():
        scores = vlm.score(IMAGES, PROMPTS, [r.tokens for r in rollouts])
        for i, r in enumerate(rollouts):
            n = len(r.tokens)
            for scored, sampled in ((scores.logprobs, r.logprobs), (scores.confidence, r.confidences)):
                torch.testing.assert_close(scored[i, :n], sampled, atol=rounding(vlm), rtol=0)
            logp = plain(vlm, IMAGES[i // 2], PROMPTS[i // 2], r.tokens)
            torch.testing.assert_close(scores.logprobs[i, :n], logp, atol=1e-4, rtol=0)


def test_a_prompt_alone_is_the_same_prompt_in_a_batch(vlm, rollouts):
    with torch.no_grad():
        together = vlm.score(IMAGES, PROMPTS, [r.tokens for r in rollouts[::2]]).logprobs
        for i, r in enumerate(rollouts[::2]):
            alone = vlm.score(IMAGES[i:i + 1], PROMPTS[i:i + 1], [r.tokens]).logprobs[0]
            torch.testing.assert_close(together[i, :len(alone)], alone, atol=rounding(vlm), rtol=0)


def test_rows_of_encoded_prompts_equal_prompts_encoded_for_themselves(vlm):
    images, prompts = [IMAGES[i] for i in (0, 3, 3)], [PROMPTS[i] for i in (0, 3, 2)]
    words, encoded = torch.tensor([40, 50]), vlm.encode(images, prompts)
    for rows in ([2, 0], [1], [0, 1, 2]):
        batch = [images[i] for i in rows], [prompts[i] for i in rows], [words] * len(rows)
        inputs = encoded.rows(rows)
        # A picture cut into as many tiles as suit its shape (InternVL): whose is whose cannot be told
        tiles = "image_grid_thw" not in encoded and len(pixels_of(encoded)) != len(images)
        assert (inputs is None) == tiles
        with torch.no_grad():
            fresh, selected = vlm.score(*batch), vlm.score(*batch, inputs=inputs)
        torch.testing.assert_close(selected.logprobs, fresh.logprobs, atol=rounding(vlm), rtol=0)
    assert vlm.encode(IMAGES, PROMPTS).rows([0]) is None            # prompts with two pictures, and with none


def test_every_picture_is_looked_at(vlm):
    images, prompts, completions = [IMAGES[1]], [PROMPTS[1]], [torch.tensor([40, 50])]
    with torch.no_grad():
        seen = vlm.score(images, prompts, completions).logprobs
        for i in (0, 1):
            other = list(IMAGES[1])
            other[i] = picture(9, *other[i].size)
            assert (vlm.score([other], prompts, completions).logprobs - seen).abs().max() > 1e-3


def test_saved_and_loaded_says_the_same(vlm, rollouts, tmp_path):
    loading.save(vlm, tmp_path)
    weights = tf.AutoModelForImageTextToText.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(weights[key], value) for key, value in vlm.model.state_dict().items())
    again = flat(VLM.load(tmp_path, "cpu").sample(IMAGES, PROMPTS, n=2, max_new_tokens=6, seed=1))
    assert all(torch.equal(a.tokens, b.tokens) and torch.equal(a.logprobs, b.logprobs) for a, b in zip(again, rollouts))


def test_contrast(vlm):
    noised = [[picture(7, *image.size) for image in images] for images in IMAGES]
    plainly = flat(vlm.sample(IMAGES, PROMPTS, greedy=True, max_new_tokens=6))
    for beta in (0, 0.1):
        same = vlm.contrast(IMAGES, noised, PROMPTS, alpha=0, beta=beta, max_new_tokens=6)
        assert [r.tokens.tolist() for r in same] == [r.tokens.tolist() for r in plainly]
    other = vlm.contrast(IMAGES, noised, PROMPTS, alpha=5, beta=0, max_new_tokens=6)
    assert [r.text for r in other] != [r.text for r in plainly]


def test_gradient_equals_that_of_plain_forwards_and_a_step_along_it_lowers_the_loss(path, rollouts):
    vlm, completions = VLM.load(path, "cpu"), [r.tokens for r in rollouts]

    def loss():
        scores = vlm.score(IMAGES, PROMPTS, completions)
        return -scores.logprobs.sum() / scores.mask.sum()

    def gradient(value):
        vlm.model.zero_grad()
        value.backward()
        return torch.cat([p.grad.flatten() for p in vlm.model.parameters() if p.grad is not None])
    logp = torch.cat([plain(vlm, IMAGES[i // 2], PROMPTS[i // 2], c) for i, c in enumerate(completions)])
    expected, before = gradient(-logp.mean()), loss()
    found = gradient(before)
    assert (found - expected).norm() < 1e-4 * expected.norm() and expected.norm() > 0
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x.numel()) or x, lambda x: x):
        loss()
        loading.checkpoint_activations(distributed.blocks(vlm.model), vlm.cache_name)
        kept, _ = sum(held), held.clear()
        torch.testing.assert_close(gradient(loss()), found, atol=1e-6, rtol=1e-5)
    assert sum(held) < kept / 2                     # what the blocks need is made again
    torch.optim.AdamW(vlm.model.parameters(), lr=1e-3).step()
    assert loss() < before


@ahead
def differences(folder):
    """All families in one program of two ranks -> {family: how far the gradient is off}."""
    paths = [write(family, folder / family.__name__) for family in FAMILIES if not absent(family)]
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = programs.Program("tests/two_ranks.py", folder / "differences.json", *paths, ranks=2, env=environment).wait(1200)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "differences.json").read_text())


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_two_ranks_equal_one_where_one_has_no_picture(family, differences):
    """It would wait for ever if it did not gather the vision tower's weights with the other."""
    if package := absent(family):
        pytest.skip(f"{family.__name__}'s processor needs {package}, which is not here")
    assert differences[family.__name__] < 1e-4


def test_the_state_of_training_comes_back_where_some_weights_never_had_a_gradient_too(path, rollouts, tmp_path):
    """As LLaVA's last vision layer: two steps are one, a checkpoint, and another one."""
    def start():
        policy = distributed.Policy(VLM.load(path, "cpu"))
        return policy, torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.0)

    def step(policy, optimiser):
        policy.score(IMAGES, PROMPTS, [r.tokens for r in rollouts]).logprobs.mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    through, resumed = start(), start()
    step(*through)
    distributed.save_state(*through, tmp_path / "state")
    distributed.load_state(*resumed, tmp_path / "state")
    for run in (through, resumed):
        step(*run)
    assert len(through[1].state) == len(resumed[1].state)
    assert all(map(torch.equal, through[0].parameters(), resumed[0].parameters()))


def test_the_plan_counts_what_the_vision_tower_sees(vlm):
    """A class token a tile apart, which some towers add."""
    sight, seen = {id(p) for p in loading.vision_parameters(vlm)}, []
    block = next(b for b in distributed.blocks(vlm.model) if id(next(b.parameters())) in sight)

    def look(_, args, named):
        seen.append((args[0] if args else next(iter(named.values()))).shape[:-1].numel())
    hook = block.register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        vlm.score([IMAGES[3]], [PROMPTS[3]], [torch.tensor([5])])
    hook.remove()
    pixels = pixels_of(vlm.encode([IMAGES[3]], [PROMPTS[3]]))
    tiles = 0 if pixels.ndim == 2 else pixels.shape[:-3].numel()
    assert 0 <= seen[0] - memory.patches(pixels, vlm.model.config.vision_config) <= tiles


def test_the_plan_counts_the_cache(vlm):
    """Bytes a token and a row, against the cache of one prompt read twice: `DynamicCache` where no window drops keys."""
    _, a_row = memory.cache_bytes(vlm.text_config, 4)
    cache = vlm.prefill(IMAGES[:1], PROMPTS[:1]).cache
    states = sum(tensor.nbytes for layer in cache.layers for (name, _), tensor in tensors_of(layer).items() if name in STATES)
    assert states == a_row


def test_a_processor_that_cannot_be_written_is_refused_by_name(path, vlm, tmp_path, monkeypatch):
    """By the plan of --dry_run as well, and in one sentence."""
    monkeypatch.setattr(tf.ProcessorMixin, "save_pretrained", lambda *_: {}["no such setting"])
    for refuse in (lambda: loading.save_processor(vlm, tmp_path), lambda: VLM.load(path, meta=True)):
        with pytest.raises(InputError, match="^model class [A-Za-z0-9_]+ cannot be used here: its processor cannot be saved"):
            refuse()


def test_every_id_that_the_settings_name_is_never_sampled(vlm, monkeypatch):
    said = [i for i in (~vlm.banned).nonzero()[:, 0].tolist() if i not in vlm.eos.tolist()][:2]
    monkeypatch.setattr(vlm.model.config, "odd_token_id", said, raising=False)
    assert len(said) == 2 and loading.banned_ids(vlm.model, vlm.tokenizer, vlm.eos)[said].all()


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="there is torchvision, which Pixtral asks for")
def test_a_processor_is_never_taken_for_another_one(tmp_path):
    """Pixtral's model is a Llava, its processor is not Llava's."""
    write(internvl, tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "PixtralProcessor"}))
    with pytest.raises(InputError, match="cannot be opened here: .*Pixtral.*[Tt]orchvision"):
        VLM.load(tmp_path, "cpu")


def test_capped_logits_and_a_class_that_needs_a_picture(tmp_path):
    """`VLM.load` has compared log-probs with those of `generate`, which caps."""
    vlm = VLM.load(write(paligemma2, tmp_path), "cpu")
    images, prompts = IMAGES[:2], PROMPTS[:2]
    capped = flat(vlm.sample(images, prompts, n=2, max_new_tokens=6))
    scores = vlm.score(images, prompts, [r.tokens for r in capped]).logprobs
    assert all(torch.allclose(row[:len(r.tokens)], r.logprobs, atol=1e-5, rtol=0) for row, r in zip(scores, capped))
    vlm.text_config.final_logit_softcapping = None
    assert (vlm.score(images, prompts, [r.tokens for r in capped]).logprobs - scores).abs().max() > 0.1
    with pytest.raises(InputError, match="PaliGemmaProcessor does not take these prompts"):
        vlm.sample([[]], ["Say something."])


def test_no_second_bos_where_the_template_has_written_one(tmp_path):
    vlm = VLM.load(write(gemma3, tmp_path), "cpu")
    vlm.tokenizer.add_bos_token = True
    ids = vlm.encode(IMAGES, PROMPTS)["input_ids"]
    assert ((ids == vlm.tokenizer.bos_token_id).sum(1) == 1).all()


@pytest.mark.parametrize("family", REFUSED, ids=lambda family: family.__name__)
def test_a_class_that_cannot_work_is_refused_by_name_when_loaded(family, tmp_path):
    """By the plan of --dry_run, which has no weights, as well."""
    path = write(family, tmp_path)
    for load in (VLM.load, (lambda path: VLM.load(path, meta=True))):
        with pytest.raises(InputError, match=f"ForConditionalGeneration cannot be used here: .*{REFUSED[family]}"):
            load(path)


def test_a_class_whose_log_probs_of_a_prompt_depend_on_its_batch_is_refused(tmp_path):
    with pytest.raises(InputError, match="Emu3.* cannot be used here: its log-probs of a prompt alone are off from those in"):
        VLM.load(write(emu3, tmp_path))


def test_experts_count_as_far_as_a_token_passes_them(tmp_path):
    """Two of four experts of each layer are active: what is left when the other two are cut out."""
    vlm = VLM.load(write(qwen3_5_moe, tmp_path), "cpu")
    total = sum(p.numel() for p in vlm.model.parameters())
    unused = sum(p[2:].numel() for name, p in vlm.model.named_parameters() if ".experts." in name)
    assert loading.active_parameters(vlm.model) == total - unused and unused > 0
    assert loading.tolerance(vlm.model.bfloat16()) > 0.5
