"""Attention of many samples to a prompt whose keys and values are stored once.

`generate` copies a prompt's keys and values for each of G samples, and reads every copy at every token. Here
the queries of a prompt's samples are the rows of one matrix that meets the prompt's keys once (as in
Hydragen, arXiv 2402.05099). Each sample stores only the keys and values of its own words, in memory that
grows by doubling. The result equals full attention.

Written against what transformers offers all models: a cache with layers, and an attention function found by
name. A model whose layers attend differently (a sliding window, sinks, a soft cap) is decoded with copies;
`loading.check` tries.
"""
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import AttentionMaskInterface

from utils.caches import StateLayer, new_cache

NAME = "shared_prefix"
ROOM = 32       # words that a sample has memory for at first


def applies_to(config):
    """Whether a model with this text config has only plain layers, and layers with states."""
    types = {type(layer) for layer in new_cache(config).layers}
    return DynamicLayer in types and types <= {DynamicLayer, StateLayer}


@dataclass
class _Rows:
    """Which prompt each row of the batch belongs to. n: samples a prompt; padded (B, 1, 1, L): True where a
    prompt is padded; slots (R,): each row's index in B x n, None: all of them, in order. A separate object,
    because a cache and layers that hold each other are freed late."""
    n: int
    padded: torch.Tensor
    slots: torch.Tensor | None = None


class SharedPrefix(DynamicCache):
    """A prefilled cache of B prompts, read by n samples of each. mask (B, L): False where a prompt is
    padded."""

    def __init__(self, cache, mask, n):
        super().__init__()
        self.rows = _Rows(n, ~mask.bool()[:, None, None])
        self.layers = [_Layer(layer, self.rows) if type(layer) is DynamicLayer else layer
                       for layer in cache.layers]
        for layer in self._state_layers():          # states cannot be shared: every word changes them
            layer.batch_repeat_interleave(n)

    def _state_layers(self):
        return [layer for layer in self.layers if not isinstance(layer, _Layer)]

    def batch_select_indices(self, rows):
        """Only these rows (ascending) stay; a prompt leaves with its last row."""
        index = self.rows
        slots = rows if index.slots is None else index.slots[rows]
        prompts, which, counts = torch.unique_consecutive(slots // index.n, return_inverse=True,
                                                          return_counts=True)
        index.n = int(counts.max())
        first = counts.cumsum(0) - counts  # (B,) each prompt's first row
        index.slots = None if len(rows) == len(prompts) * index.n else \
            which * index.n + torch.arange(len(rows), device=rows.device) - first[which]
        index.padded = index.padded[prompts]
        for layer in self._state_layers():
            layer.batch_select_indices(rows)
        for layer in (layer for layer in self.layers if isinstance(layer, _Layer)):
            layer.keys, layer.values = layer.keys[prompts], layer.values[prompts]
            if layer.sample_kv is not None:         # None: no row has read a word yet
                layer.sample_kv = [tensor[rows, :, :layer.length] for tensor in layer.sample_kv]


class _Layer(DynamicLayer):
    """keys, values (B, H, L, d) of the prompts; sample_kv: keys and values (R, H, room, d) of each sample's
    words, of which the first `length` are set."""

    def __init__(self, layer, rows):
        super().__init__()
        self.rows, self.keys, self.values, self.is_initialized = rows, layer.keys, layer.values, True
        self.sample_kv, self.length = None, 0

    def update(self, keys, values, *args, **kwargs):
        """keys, values (R, H, 1, d) of the newest words -> this layer, twice: `attend` takes it in place of
        both."""
        newest = (keys, values)
        if self.sample_kv is None or self.length == self.sample_kv[0].shape[2]:
            room = max(ROOM, self.length)
            more = [tensor.new_empty(*tensor.shape[:2], room, tensor.shape[3]) for tensor in newest]
            self.sample_kv = more if self.sample_kv is None else [torch.cat(pair, 2)
                                                                  for pair in zip(self.sample_kv, more)]
        for stored, tensor in zip(self.sample_kv, newest):
            stored[:, :, self.length] = tensor[:, :, 0]
        self.length += 1
        return self, self

    def get_seq_length(self):
        return self.keys.shape[2] + self.length


def attend(module, query, layer, _, attention_mask=None, scaling=None, sliding_window=None, softcap=None,
           s_aux=None,
           **kwargs):
    """query (R, Hq, 1, d) -> attention to the prompt and to the row's words (R, 1, Hq, d). An
    AttentionInterface."""
    if sliding_window is not None or softcap is not None or s_aux is not None:
        raise NotImplementedError("attention with a window, a soft cap or sinks")
    shared, (rows, _, _, width) = layer.rows, query.shape
    prompts, heads, length, _ = layer.keys.shape
    scaling = width**-0.5 if scaling is None else scaling
    keys, values = (tensor[:, :, :layer.length] for tensor in layer.sample_kv)                # (R, H, t, d)
    q = query.reshape(rows, heads, -1,
                      width) * scaling                                       # (R, H, r, d), r = Hq / H
    shape = (prompts, shared.n, heads, q.shape[2])

    def by_prompt(x):  # (R, H, r, .) -> (B, H, n r, .)
        if shared.slots is not None:
            x = x.new_zeros(prompts * shared.n, *x.shape[1:]).index_copy_(0, shared.slots, x)
        return x.view(*shape, -1).transpose(1, 2).reshape(prompts, heads, -1, x.shape[-1])

    def by_row(x):                                                                            # and back
        x = x.view(prompts, heads, shared.n, shape[3], -1).transpose(1, 2).reshape(-1, heads, shape[3],
                                                                                   x.shape[-1])
        return x if shared.slots is None else x[shared.slots]

    to_prompt = (by_prompt(q) @ layer.keys.transpose(2, 3)).masked_fill(shared.padded, -torch.inf)
    scores = torch.cat([by_row(to_prompt), q @ keys.transpose(2, 3)],
                       -1)                     # (R, H, r, L + t)
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    output = by_row(by_prompt(weights[..., :length]) @ layer.values) + weights[..., length:] @ values
    return output.reshape(rows, 1, -1, width), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, lambda *args,
                                **kwargs: None)      # the cache knows where a prompt is padded


@contextmanager
def attention_of(decoder, name=NAME):
    """Inside, the decoder's layers use the AttentionInterface of this name."""
    configs = {id(module.config): module.config for module in decoder.modules()
               if hasattr(module, "config")}.values()
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = name
    try:
        yield
    finally:
        for config, original in zip(configs, before):
            config._attn_implementation = original
