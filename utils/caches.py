"""The cache of any decoder that `vlm.py` can run: attention layers, and linear attention with states in place
of keys.

A linear-attention layer (Gated DeltaNet of Qwen3.5, short convolutions of LFM2) keeps no keys and values but
states of
fixed size: the last words of a convolution, and a matrix that sums up all words. Transformers' own layer
overwrites its states in place, which autograd refuses, and has no rows to repeat or select. `StateLayer`
replaces states and has rows.
"""
import copy

import torch
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionLayer

# dicts {index: tensor (B, ...) or None} of a linear-attention layer
STATES = ("conv_states", "recurrent_states")


class StateLayer(LinearAttentionLayer):
    """A linear-attention entry of the cache whose new states replace the old ones."""

    def update_conv_state(self, conv_states, state_idx=0, conv_kernel_size=None, **kwargs):
        """conv_states (B, C, T): the newest words' -> with those before, as the convolution needs them (B, C,
        K + T)."""
        if not self.has_previous_state[state_idx]:
            size = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size
            self.conv_kernel_size[state_idx] = size
            words = torch.nn.functional.pad(conv_states, (max(0, size - conv_states.shape[-1]), 0))
        else:
            words = torch.cat([self.conv_states[state_idx], conv_states], -1)
        # A copy: decoding word by word may write into it, and the convolution's backward pass needs `words`
        # as they are.
        self.conv_states[state_idx] = words[..., -self.conv_kernel_size[state_idx]:].clone()
        self.has_previous_state[state_idx] = self.is_conv_states_initialized[state_idx] = True
        return words

    def update_recurrent_state(self, recurrent_states, state_idx=0, **kwargs):
        """recurrent_states (B, ...): those after the newest word, which are kept."""
        self.recurrent_states[state_idx] = recurrent_states
        self.has_previous_state[state_idx] = self.is_recurrent_states_initialized[state_idx] = True
        return recurrent_states

    def _map(self, function):
        for name in STATES:
            setattr(self, name, {i: None if state is None else function(state)
                                 for i, state in getattr(self, name).items()})

    def batch_repeat_interleave(self, repeats):
        self._map(lambda state: state.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices):
        self._map(lambda state: state[indices])


def new_cache(config):
    """An empty cache for a model with this text config -> DynamicCache."""
    cache = DynamicCache(config=config)
    cache.layers = [StateLayer(layer.number_of_states) if type(layer) is LinearAttentionLayer else layer
                    for layer in cache.layers]
    return cache


def has_states(config):
    """Whether some layers of a model with this text config keep states in place of keys and values."""
    return any(type(layer) is StateLayer for layer in new_cache(config).layers)


def tensors_of(layer):
    """All tensors of one layer's cache -> {(attribute, key or None): tensor}."""
    tensors = {}
    for name, value in vars(layer).items():
        entries = value.items() if isinstance(value, dict) else [(None, value)]
        tensors |= {(name, key): entry for key, entry in entries if isinstance(entry, torch.Tensor)}
    return tensors


def with_tensors(layer, tensors):
    """A copy of one layer's cache, with these tensors in place of its own."""
    clone = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            setattr(clone, name, dict(value))
    for (name, key), tensor in tensors.items():
        if key is None:
            setattr(clone, name, tensor)
        else:
            getattr(clone, name)[key] = tensor
    return clone
