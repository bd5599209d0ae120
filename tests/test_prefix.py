import pytest
import torch
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DynamicLayer

import data
from utils import shared_prefix
from vlm import VLM


@pytest.fixture(scope="module")
def base():
    return VLM.load("tiny/base")


def test_attention_to_a_shared_prompt_is_attention_to_copies_of_it():
    """Against softmax(q k) v over copied keys, on prompts padded to one length, while rows leave unevenly and words exceed
    the first memory."""
    torch.manual_seed(0)
    prompts, n, heads, repeat, length, width = 3, 4, 2, 3, 5, 8
    cache, mask = DynamicCache(), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    keys, values = torch.randn(2, prompts, heads, length, width)
    cache.layers = [DynamicLayer()]
    cache.layers[0].update(keys, values)
    shared = shared_prefix.SharedPrefix(cache, mask, n)
    keys, values = keys.repeat_interleave(n, 0), values.repeat_interleave(n, 0)
    mask, rows = mask.repeat_interleave(n, 0).bool(), torch.arange(prompts * n)
    leave = {0: [11], 3: [0, 5, 6], 20: [2, 3], 40: [0, 1]}               # 40: the first prompt goes whole
    for step in range(50):
        if step in leave:
            stay = torch.tensor([i for i in range(len(rows)) if i not in leave[step]])
            shared.batch_select_indices(stay)
            rows, keys, values, mask = rows[stay], keys[stay], values[stay], mask[stay]
        new = torch.randn(2, len(rows), heads, 1, width)
        layer, _ = shared.update(*new, 0)
        keys, values = torch.cat([keys, new[0]], 2), torch.cat([values, new[1]], 2)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        query = torch.randn(len(rows), heads * repeat, 1, width)
        found, _ = shared_prefix.attend(None, query, layer, layer, None, scaling=0.3)
        scores = 0.3 * query @ keys.repeat_interleave(repeat, 1).transpose(2, 3)
        weights = scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)
        wanted = (weights @ values.repeat_interleave(repeat, 1)).transpose(1, 2)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert shared.get_seq_length() == length + 50 and shared.layers[0].keys.shape[0] == 2


@pytest.mark.parametrize("n", [1, 5])
def test_samples_of_a_shared_prompt_are_those_of_copies(base, n):
    """Same words; log-probs and confidences to rounding; also with two views in lock step."""
    samples = [data.synthetic("val", 0, i) for i in range(5)]
    images, prompts = [s.images for s in samples], [data.prompt(s) for s in samples]

    def both(call):
        base.shares = True
        shared = call()
        base.shares = False
        copied = call()
        base.shares = True
        return zip(shared, copied, strict=True)
    calls = [lambda: sum(base.sample(images, prompts, n, max_new_tokens=60, seed=1), []),
             lambda: base.contrast(images, images[::-1], prompts, max_new_tokens=40)]
    for call in calls:
        for ours, theirs in both(call):
            assert ours.text == theirs.text and ours.finished == theirs.finished
            torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=2e-5, rtol=1e-5)
            torch.testing.assert_close(ours.confidences, theirs.confidences, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("wrong", ["raises", "lies"])
def test_a_class_that_attends_in_another_way_is_decoded_with_copies(base, wrong):
    def attend(module, query, *args, **kwargs):
        if wrong == "raises":
            raise NotImplementedError
        return torch.zeros_like(query).transpose(1, 2), None
    before = [m.config._attn_implementation for m in base.model.modules() if hasattr(m, "config")]
    AttentionInterface.register(shared_prefix.NAME, attend)
    try:
        other = VLM.load("tiny/base")
    finally:
        AttentionInterface.register(shared_prefix.NAME, shared_prefix.attend)
    assert base.shares and not other.shares
    assert [m.config._attn_implementation for m in other.model.modules() if hasattr(m, "config")] == before
    s = data.synthetic("val", 0, 1)
    ours, theirs = (vlm.sample([s.images], [data.prompt(s)], greedy=True)[0][0].text for vlm in (base, other))
    assert ours == theirs
