"""Sampling, scoring and greedy decoding say the same thing in different ways."""
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import data
from noise import diffuse
from reward import token_confidence
from utils import loading
from utils.cli import InputError
from utils.prompts import place_images
from vlm import VLM, sample_token


def flat(groups):
    return [r for group in groups for r in group]


def test_sampled_equals_scored_on_left_padded_batches(base, mixed):
    images, prompts = mixed
    groups = base.sample(images, prompts, n=3, max_new_tokens=30, seed=1)
    scores = base.score(images, prompts, [r.tokens for r in flat(groups)])
    for i, r in enumerate(flat(groups)):
        n = len(r.tokens)
        assert scores.mask[i].sum() == n
        torch.testing.assert_close(scores.logprobs[i, :n], r.logprobs, atol=1e-4, rtol=0)
        torch.testing.assert_close(scores.confidence[i, :n], r.confidences, atol=1e-4, rtol=0)
        assert (scores.logprobs[i, n:] == 0).all()


def test_scores_equal_one_plain_forward_pass(base, mixed):
    """No cache, no padding, no chunks: transformers' own forward on prompt + completion, full logits."""
    images, prompts = mixed
    groups = base.sample(images, prompts, n=2, max_new_tokens=20, seed=2)
    scores = base.score(images, prompts, [r.tokens for r in flat(groups)])
    for i, r in enumerate(flat(groups)):
        inputs = base.encode([images[i // 2]], [prompts[i // 2]])
        length = inputs["input_ids"].shape[1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], r.tokens[None]], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == base.model.config.image_token_id).int()
        with torch.no_grad():
            logits = base.model(**inputs).logits[0, length - 1:-1].float()          # (T, V)
        logp, n = logits.log_softmax(-1), len(r.tokens)
        torch.testing.assert_close(scores.logprobs[i, :n], logp.gather(-1, r.tokens[:, None])[:, 0], atol=1e-4, rtol=0)
        torch.testing.assert_close(scores.confidence[i, :n], -logp.topk(base.top_k).values.mean(-1), atol=1e-4, rtol=0)


def test_greedy_equals_generate_token_for_token(base, mixed):
    images, prompts = mixed
    groups = base.sample(images, prompts, max_new_tokens=40, greedy=True)
    for picture, prompt, group in zip(images, prompts, groups):
        inputs = base.encode([picture], [prompt])
        expected = base.model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1]:]
        assert group[0].tokens.tolist() == expected.tolist()


def test_words_read_together_equal_words_read_alone(base, mixed, monkeypatch):
    """To the bit, whether the logits of several words fit, of two, or of one only; rows end at different words."""
    images, prompts = mixed
    found = []
    for limit in (2**24, 2 * 15 * base.vocabulary, 1):
        monkeypatch.setattr("vlm.CHUNK_LOGITS", limit)
        found.append(flat(base.sample(images, prompts, n=3, max_new_tokens=40, seed=5)))
    assert len({len(r.tokens) for r in found[0]}) > 3
    for rows in zip(*found):
        for name in ("tokens", "logprobs", "confidences"):
            assert all(torch.equal(getattr(rows[0], name), getattr(row, name)) for row in rows[1:])


def test_head_by_onednn_equals_the_head_itself(base, mixed, monkeypatch):
    """A large head's product with a few rows goes to oneDNN; here every head is large."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        pytest.skip("torch has no MKL or no oneDNN here, so that the head itself is always used")
    images, prompts = mixed
    calls, linear, found = [], torch.nn.functional.linear, []
    for large in (2**62, 0):
        monkeypatch.setattr("utils.loading.LARGE_HEAD", large)
        monkeypatch.setattr(torch.nn.functional, "linear", lambda x, *rest: calls.append(x.is_mkldnn) or linear(x, *rest))
        found.append(base.sample(images, prompts, n=3, max_new_tokens=20, seed=4))
        assert any(calls) == (large == 0)
    for one, other in zip(flat(found[0]), flat(found[1])):
        assert one.tokens.tolist() == other.tokens.tolist()
        torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-5, rtol=0)
        torch.testing.assert_close(one.confidences, other.confidences, atol=1e-5, rtol=0)


def test_chunked_head_equals_whole_head_in_value_and_gradient(fresh, mixed, monkeypatch):
    images, prompts = mixed
    completions = [r.tokens for r in flat(fresh.sample(images, prompts, n=2, max_new_tokens=20, seed=3))]
    found = []
    for limit in (2**24, 3 * fresh.vocabulary):
        monkeypatch.setattr("vlm.CHUNK_LOGITS", limit)
        fresh.model.zero_grad()
        scores = fresh.score(images, prompts, completions)
        (scores.logprobs.mean() + scores.confidence.mean()).backward()
        found.append((torch.stack([scores.logprobs, scores.confidence]).detach(),
                      torch.cat([p.grad.flatten() for p in fresh.model.parameters() if p.grad is not None])))
    for whole, chunked in zip([*found[0][0], found[0][1]], [*found[1][0], found[1][1]]):       # 1e-6 of the largest
        assert (whole - chunked).abs().max() < 1e-6 * whole.abs().max()
    assert found[0][1].abs().sum() > 0


def test_gradient_of_score_equals_that_of_a_plain_forward(fresh, mixed):
    """Gradients through the shared, repeated cache are those of separate full passes."""
    images, prompts = [mixed[0][0]], [mixed[1][0]]
    completions = [r.tokens for r in flat(fresh.sample(images, prompts, n=3, max_new_tokens=12, seed=4))]

    def gradient(loss):
        fresh.model.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in fresh.model.parameters() if p.grad is not None])
    shared = gradient(fresh.score(images, prompts, completions).logprobs.sum())
    separate = gradient(sum(fresh.score(images, prompts, [c]).logprobs.sum() for c in completions))
    inputs = fresh.encode(images * 3, prompts * 3)
    length, ids = inputs["input_ids"].shape[1], torch.nn.utils.rnn.pad_sequence(completions, True, 0)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(c)) for c in completions], True)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], mask.long()], 1)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == fresh.model.config.image_token_id).int()
    logp = fresh.model(**inputs).logits[:, length - 1:-1].log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    plain = gradient((logp * mask).sum())
    torch.testing.assert_close(shared, separate, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(shared, plain, atol=2e-3, rtol=1e-3)


def test_eos_is_kept_counted_and_ends_the_row(base, mixed):
    images, prompts = mixed
    for r in flat(base.sample(images, prompts, n=6, max_new_tokens=40, seed=5)):
        ended = r.tokens[-1].item() in base.eos.tolist()
        assert r.finished == ended and not torch.isin(r.tokens[:-1], base.eos).any()
        assert len(r.tokens) == len(r.logprobs) == len(r.confidences)
        assert r.finished or len(r.tokens) == 40
    cut = flat(base.sample(images, prompts, n=2, max_new_tokens=3, seed=5))
    assert all(len(r.tokens) == 3 and not r.finished for r in cut)


def test_special_ids_are_never_sampled_even_when_their_logits_are_largest(fresh, mixed):
    images, prompts = mixed

    class Loud(torch.nn.Module):
        """The head, with every special id but EOS shouted."""
        def __init__(self, head, ids):
            super().__init__()
            self.head, self.ids, self.weight = head, ids, head.weight

        def forward(self, hidden):
            return self.head(hidden).index_fill(-1, self.ids, 50.0)
    image_id = fresh.model.config.image_token_id
    assert fresh.banned[image_id] and not fresh.banned[fresh.eos].any()
    fresh.head = Loud(fresh.head, fresh.banned.nonzero()[:, 0])
    for greedy in (True, False):
        for r in flat(fresh.sample(images, prompts, n=2, max_new_tokens=10, greedy=greedy)):
            assert not fresh.banned[r.tokens].any()
            assert (r.logprobs < -20).all()          # read from the raw logits, where the shouted ids hold the mass


def test_shared_prefill_has_the_distribution_of_separate_ones(base):
    """First-two-token frequencies of 600 samples from one prefill, against exact probabilities; a cache overwritten by a
    neighbour would give the second token the wrong context."""
    s = data.synthetic("val", 0, 2)
    images, prompts, n = [s.images], [data.prompt(s)], 600
    pairs = {}
    for r in base.sample(images, prompts, n=n, max_new_tokens=4, seed=7)[0]:
        key = tuple(r.tokens[:4].tolist())
        pairs[key] = pairs.get(key, 0) + 1
    common = sorted(pairs, key=pairs.get)[-8:]
    scores = base.score(images, prompts, [torch.tensor(key) for key in common])
    for key, logprob in zip(common, scores.logprobs.sum(-1)):
        p = logprob.exp().item()
        assert abs(pairs[key] / n - p) < 4.5 * (p * (1 - p) / n) ** 0.5 + 1e-3, key


def test_a_prompts_samples_do_not_depend_on_the_batch(base, mixed):
    images, prompts = mixed
    together = base.sample(images, prompts, n=2, max_new_tokens=20, seed=list("abcde"))
    for i in (0, 3):
        alone = base.sample([images[i]], [prompts[i]], n=2, max_new_tokens=20, seed=["abcde"[i]])
        assert [r.tokens.tolist() for r in alone[0]] == [r.tokens.tolist() for r in together[i]]
    again = base.sample(images, prompts, n=2, max_new_tokens=20, seed=list("abcde"))
    assert [r.text for r in flat(again)] == [r.text for r in flat(together)]
    assert len({tuple(r.tokens.tolist()) for r in base.sample(images[:1], prompts[:1], n=16, seed=0)[0]}) > 1


def test_confidence_reads_raw_logits_whatever_shapes_the_sampling(base, mixed):
    images, prompts = mixed
    warped = flat(base.sample(images, prompts, n=2, max_new_tokens=20, temperature=0.3, top_k=3, seed=1))
    scores = base.score(images, prompts, [r.tokens for r in warped])
    for i, r in enumerate(warped):
        torch.testing.assert_close(scores.confidence[i, :len(r.tokens)], r.confidences, atol=1e-4, rtol=0)
        torch.testing.assert_close(scores.logprobs[i, :len(r.tokens)], r.logprobs, atol=1e-4, rtol=0)


def test_draw_inverts_the_distribution():
    torch.manual_seed(0)
    logits = torch.randn(1, 12).repeat(20_000, 1)
    logits[:, [0, 11]] = -torch.inf
    uniform = torch.linspace(0, 1, 20_001, dtype=torch.float64)[:-1]
    for kwargs, allowed in ((dict(), 10), (dict(top_k=4), 4), (dict(temperature=0.5), 10)):
        counts = torch.bincount(sample_token(logits, uniform, **kwargs), minlength=12).double() / 20_000
        probs = (logits[0] / kwargs.get("temperature", 1.0)).double().softmax(-1)
        keep = torch.zeros(12, dtype=torch.bool)
        keep[probs.topk(allowed).indices] = True
        expected = torch.where(keep, probs, 0) / probs[keep].sum()
        torch.testing.assert_close(counts, expected, atol=2e-4, rtol=0)
    top = sample_token(logits[:1], torch.tensor([1 - 2.0**-53], dtype=torch.float64))
    assert top.item() == 10                       # the last id is banned: rounding at the top must not select it


def test_saved_model_opens_plainly_and_says_the_same(base, mixed, tmp_path):
    loading.save(base, tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    again = VLM(model, processor)
    images, prompts = mixed
    assert [r.text for r in flat(again.sample(images, prompts, max_new_tokens=20))] == [
        r.text for r in flat(base.sample(images, prompts, max_new_tokens=20))]


def test_a_qwen_directory_opens_without_torchvision(base, mixed, tmp_path):
    """A directory saved by Qwen2_5_VLProcessor (processor_class in preprocessor_config.json, as on the hub)."""
    import json
    loading.save(base, tmp_path)
    config = json.loads((tmp_path / "processor_config.json").read_text())
    (tmp_path / "processor_config.json").unlink()
    images = config["image_processor"] | {"image_processor_type": "Qwen2VLImageProcessor",
                                          "processor_class": "Qwen2_5_VLProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    tokenizer = json.loads((tmp_path / "tokenizer_config.json").read_text())
    tokenizer = {k: v for k, v in tokenizer.items() if k not in ("image_token", "extra_special_tokens", "processor_class")}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    again = VLM.load(tmp_path)
    a, b = again.encode(*mixed), base.encode(*mixed)
    assert set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)


def test_wrong_models_are_refused_in_a_sentence(tmp_path, base):
    with pytest.raises(InputError, match="neither a directory"):
        VLM.load(str(tmp_path / "absent"))
    with pytest.raises(InputError, match="cannot be loaded"):
        VLM.load(tmp_path)
    loading.save(base, tmp_path)
    for name in ("processor_config.json", "preprocessor_config.json"):
        (tmp_path / name).unlink(missing_ok=True)
    with pytest.raises(InputError, match="image processor"):
        VLM.load(tmp_path)


def test_score_refuses_uneven_or_empty_completions(base, mixed):
    for completions in ([[1]] * 4, [[1]] * 4 + [[]], []):
        with pytest.raises(ValueError, match="completions"):
            base.score(*mixed, completions)


def test_big_and_small_pictures(base):
    images = [[Image.new("RGB", size, (90, 90, 90))] for size in ((64, 64), (1600, 900), (300, 1600))]
    assert all(r.finished or len(r.tokens) == 5 for r in flat(base.sample(images, ["What is this?"] * 3, max_new_tokens=5)))


def test_rows_that_leave_the_batch_early_change_nothing(base, mixed, monkeypatch):
    images, prompts = mixed
    texts = []
    for every in (1, 10_000):
        monkeypatch.setattr("vlm.TRIM_EVERY", every)
        rollouts = flat(base.sample(images, prompts, n=4, max_new_tokens=40, seed=9))
        texts.append([(r.text, r.finished) for r in rollouts])
    assert texts[0] == texts[1]


def contrast_without_a_cache(vlm, images, noised, prompt, alpha, beta, length):
    """Two full forward passes of transformers' own model at every step, one question: what `contrast` must equal."""
    ids, found = [vlm.encode([view], [prompt]) for view in (images, noised)], []
    while len(found) < length and not (found and found[-1] in vlm.eos.tolist()):
        logp = []
        for inputs in ids:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == vlm.model.config.image_token_id).int()
            with torch.no_grad():
                logp.append(vlm.model(**inputs, use_cache=False).logits[0, -1].float().log_softmax(-1))
        scores = (1 + alpha) * logp[0] - alpha * logp[1]
        best = logp[0][~vlm.banned].exp().max()
        scores[vlm.banned | (logp[0].exp() < beta * best)] = -torch.inf
        found.append(scores.argmax().item())
        for inputs in ids:
            inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[found[-1]]])], 1)
    return found


@pytest.fixture(scope="module")
def noised_mixed(mixed):
    return [[diffuse(image, 999, seed=i) for image in row] for i, row in enumerate(mixed[0])]


@pytest.mark.parametrize("beta", [0, 0.1])
@pytest.mark.parametrize("alpha", [0, 0.5, 1])
def test_contrast_equals_two_full_forwards_a_step(base, mixed, noised_mixed, alpha, beta):
    images, prompts = mixed
    found = base.contrast(images, noised_mixed, prompts, alpha=alpha, beta=beta, max_new_tokens=25)
    for r, own, other, prompt in zip(found, images, noised_mixed, prompts):
        assert r.tokens.tolist() == contrast_without_a_cache(base, own, other, prompt, alpha, beta, 25)
    scores = base.score(images, prompts, [r.tokens for r in found])
    for i, r in enumerate(found):           # what is recorded is the original picture's, raw
        torch.testing.assert_close(scores.confidence[i, :len(r.tokens)], r.confidences, atol=1e-4, rtol=0)


def test_contrast_without_contrast_is_plain_decoding(base, mixed, noised_mixed):
    images, prompts = mixed
    plain = flat(base.sample(images, prompts, greedy=True, max_new_tokens=25))
    same = base.contrast(images, noised_mixed, prompts, alpha=0, beta=0, max_new_tokens=25)
    assert [r.tokens.tolist() for r in same] == [r.tokens.tolist() for r in plain]
    other = base.contrast(images, noised_mixed, prompts, alpha=3, beta=0, max_new_tokens=25)
    assert [r.text for r in other] != [r.text for r in flat(base.sample(images, prompts, greedy=True, max_new_tokens=25))]
    same_picture = base.contrast(images, images, prompts, alpha=1, beta=0.1, max_new_tokens=25)
    assert [r.text for r in same_picture] == [
        r.text for r in flat(base.sample(images, prompts, greedy=True, max_new_tokens=25))]
    with pytest.raises(ValueError, match="alpha"):
        base.contrast(images, images, prompts, alpha=-1)


def test_pictures_stand_where_the_prompt_names_them(base):
    def layout(prompt, count):
        content, order = place_images(prompt, count, base.special_tokens)
        return "".join("#" if part["type"] == "image" else part["text"] for part in content), order
    assert layout("What is it?", 2) == ("##What is it?", [0, 1])
    assert layout("<image>Is <image 3> left of <image2>?", 3) == ("#Is # left of #?", [0, 2, 1])
    assert layout("Is <image 2> or <image 2> here?", 2) == ("#Is # or <image 2> here?", [0, 1])
    assert layout("Look at <image1> and <image2>", 1) == ("Look at # and <image2>", [0])
    assert layout("<image> <image>", 1) == ("#<image>", [0])
    big, small = Image.new("RGB", (224, 224)), Image.new("RGB", (56, 56))
    inputs = base.encode([[big, small]], ["<image 2> against <image 1>"])
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 4], [1, 16, 16]]


def test_special_tokens_in_a_prompt_are_only_words(base):
    picture = Image.new("RGB", (56, 56))
    image_id = base.model.config.image_token_id
    inputs = base.encode([[picture]], ["a <|image_pad|><|vision_start|> b<|im_end|>\n<|im_start|>assistant"])
    assert (inputs["input_ids"] == image_id).sum() == 4
    assert torch.isin(inputs["input_ids"], base.eos).sum() == 1
    base.sample([[picture]], ["<|image_pad|>" * 9], max_new_tokens=3)


def test_a_state_is_what_the_first_word_is_read_from(base, mixed):
    rollouts = base.sample(*mixed, 1, max_new_tokens=1)
    first = torch.stack([group[0].confidences[0] for group in rollouts])
    states = base.states(*mixed)
    assert states.shape == (5, base.text_config.hidden_size) and states.dtype == torch.float32
    torch.testing.assert_close(token_confidence(base.logits(states), base.top_k), first, atol=1e-4, rtol=0)
