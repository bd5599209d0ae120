"""Attention of many samples to a prompt that is held once.

`generate` copies a prompt's keys and values for each of G samples and reads every copy at every token. Here the queries of a
prompt's samples are the rows of one matrix that meets the prompt's keys once (as in Hydragen, arXiv 2402.05099); each sample
keeps only the keys and values of its own words, in memory that grows by doubling. The result is that of full attention.

Written against what transformers offers all its models: a cache with layers, and an attention function found by name. A model
whose layers attend in another way (a sliding window, sinks, a soft cap) is decoded with copies; `VLM` finds that out by trying.
"""
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import AttentionMaskInterface

NAME = "shared_prefix"
ROOM = 32       # words of its own that a sample has memory for at first


@dataclass
class _Rows:
    """Where the rows of the batch are. n: samples a prompt; padded (B, 1, 1, L): True where a prompt is; slots (R,): each row's
    place in B x n, None: all places, in order. Apart, because a cache and layers that hold each other are freed late."""
    n: int
    padded: torch.Tensor
    slots: torch.Tensor | None = None


class SharedPrefix(DynamicCache):
    """A prefilled cache of B prompts, from now on read by n samples of each. mask (B, L): False where a prompt is padded."""

    def __init__(self, cache, mask, n):
        super().__init__()
        self.rows = _Rows(n, ~mask.bool()[:, None, None])
        self.layers = [_Layer(layer, self.rows) for layer in cache.layers]

    def batch_select_indices(self, rows):
        """Only these rows (ascending) stay; a prompt leaves with its last row."""
        own = self.rows
        places = rows if own.slots is None else own.slots[rows]
        prompts, which, counts = torch.unique_consecutive(places // own.n, return_inverse=True, return_counts=True)
        own.n = int(counts.max())
        first = counts.cumsum(0) - counts                                                     # (B,) each prompt's first row
        own.slots = None if len(rows) == len(prompts) * own.n else \
            which * own.n + torch.arange(len(rows), device=rows.device) - first[which]
        own.padded = own.padded[prompts]
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[prompts], layer.values[prompts]
            if layer.own is not None:       # None: these rows leave with their first word
                layer.own = [part[rows, :, :layer.length] for part in layer.own]


class _Layer(DynamicLayer):
    """keys, values (B, H, L, d) of the prompts; own: two (R, H, room, d), of each sample's words, `length` of them so far."""

    def __init__(self, layer, rows):
        super().__init__()
        self.rows, self.keys, self.values, self.is_initialized = rows, layer.keys, layer.values, True
        self.own, self.length = None, 0

    def update(self, keys, values, *args, **kwargs):
        """keys, values (R, H, 1, d) of the newest words -> this layer, which `attend` takes in place of both."""
        new = (keys, values)
        if self.own is None or self.length == self.own[0].shape[2]:
            room = max(ROOM, self.length)
            more = [part.new_empty(*part.shape[:2], room, part.shape[3]) for part in new]
            self.own = more if self.own is None else [torch.cat(parts, 2) for parts in zip(self.own, more)]
        for whole, part in zip(self.own, new):
            whole[:, :, self.length] = part[:, :, 0]
        self.length += 1
        return self, self

    def get_seq_length(self):
        return self.keys.shape[2] + self.length


def attend(module, query, layer, _, attention_mask=None, scaling=None, sliding_window=None, softcap=None, s_aux=None, **kwargs):
    """query (R, Hq, 1, d) -> attention to the prompt and to the row's own words (R, 1, Hq, d). An AttentionInterface."""
    if sliding_window is not None or softcap is not None or s_aux is not None:
        raise NotImplementedError("attention with a window, a soft cap or sinks")
    shared, (rows, _, _, width) = layer.rows, query.shape
    prompts, heads, length, _ = layer.keys.shape
    scaling = width**-0.5 if scaling is None else scaling
    own_keys, own_values = (part[:, :, :layer.length] for part in layer.own)                  # (R, H, t, d)
    q = query.reshape(rows, heads, -1, width) * scaling                                       # (R, H, r, d), r = Hq / H
    shape = (prompts, shared.n, heads, q.shape[2])

    def by_prompt(x):                                                                         # (R, H, r, .) -> (B, H, n r, .)
        if shared.slots is not None:
            x = x.new_zeros(prompts * shared.n, *x.shape[1:]).index_copy_(0, shared.slots, x)
        return x.view(*shape, -1).transpose(1, 2).reshape(prompts, heads, -1, x.shape[-1])

    def by_row(x):                                                                            # and back
        x = x.view(prompts, heads, shared.n, shape[3], -1).transpose(1, 2).reshape(-1, heads, shape[3], x.shape[-1])
        return x if shared.slots is None else x[shared.slots]

    to_prompt = (by_prompt(q) @ layer.keys.transpose(2, 3)).masked_fill(shared.padded, -torch.inf)
    scores = torch.cat([by_row(to_prompt), q @ own_keys.transpose(2, 3)], -1)                 # (R, H, r, L + t)
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    seen = by_row(by_prompt(weights[..., :length]) @ layer.values) + weights[..., length:] @ own_values
    return seen.reshape(rows, 1, -1, width), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)      # the cache knows where a prompt is padded


@contextmanager
def attention_of(decoder, name=NAME):
    """Within it the decoder's layers attend by the AttentionInterface of this name."""
    configs = {id(module.config): module.config for module in decoder.modules() if hasattr(module, "config")}.values()
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = name
    try:
        yield
    finally:
        for config, own in zip(configs, before):
            config._attn_implementation = own
