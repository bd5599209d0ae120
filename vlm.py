"""A vision-language model that we can speak to: load, sample with confidence, contrast, score with gradient, save.

Any Hugging Face image-text-to-text model that keeps its keys and values in a `DynamicCache`: one prefill encodes the
prompt and its images once, the G samples share its keys and values (`shared_prefix.py`), and `score` prefills alike and
reads the completions from clones, so that sampled and re-scored log-probs agree to rounding.

Everything is read from the raw logits in fp32: before temperature, top-k, top-p and banned ids (paper Eq. 3). No
(B, T, V) tensor is ever kept: logits of several words only as far as they fit into CHUNK_LOGITS.
"""
import errno
import inspect
import math
import random
import re
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForImageTextToText, DynamicCache
from transformers.cache_utils import DynamicLayer

from reward import token_confidence, token_entropy, top_k_for
from utils import shared_prefix
from utils.cli import InputError, reason
from utils.loading import CHUNK_LOGITS, FEW_ROWS, LARGE_HEAD, TRIM_EVERY, load_processor, run_again


def load_model(path, device, compute):
    """A model keeps the dtype of its file until its weights become fp32, share by share."""
    return VLM.load(path, device, torch.float32 if compute == torch.float32 else "auto")




@dataclass
class Rollout:
    """One sampled completion. tokens (T,) int64, EOS included; logprobs (T,), at temperature 1 on raw logits, in nats;
    confidences (T,), Eq. 3 a token; finished: it ended by EOS and was not cut at max_new_tokens; entropies (T,) in nats,
    only when asked for; failure: why a server gave no words, None where it did."""
    text: str
    tokens: torch.Tensor
    logprobs: torch.Tensor
    confidences: torch.Tensor
    finished: bool
    entropies: torch.Tensor | None = None
    failure: Exception | None = None


class Scores(NamedTuple):
    """logprobs, confidence, entropy (B, T) fp32, zero where padded; mask (B, T) bool, True on completion tokens."""
    logprobs: torch.Tensor
    confidence: torch.Tensor
    entropy: torch.Tensor
    mask: torch.Tensor

    def split(self, sizes):
        """-> list of Scores, of so many rows each."""
        return [Scores(*parts) for parts in zip(*(value.split(sizes) for value in self))]


@dataclass
class _Prefill:
    """Prompts, read once. cache: keys and values; hidden (B, D) of the last token; mask (B, L); position (..., B, 1) of
    the last token, with a leading axis of 3 for multimodal rotary embeddings."""
    cache: DynamicCache
    hidden: torch.Tensor
    mask: torch.Tensor
    position: torch.Tensor

    def repeat(self, n):
        self.cache.batch_repeat_interleave(n)      # a copy: samples cannot overwrite each other's keys
        self.hidden, self.mask = self.hidden.repeat_interleave(n, 0), self.mask.repeat_interleave(n, 0)
        self.position = self.position.repeat_interleave(n, -2)

    def share(self, n):
        """`repeat` without the copy, for decoding. The cache knows the mask from now on."""
        self.cache, self.mask = shared_prefix.SharedPrefix(self.cache, self.mask, n), None
        self.hidden, self.position = self.hidden.repeat_interleave(n, 0), self.position.repeat_interleave(n, -2)

    def keep(self, rows):
        self.cache.batch_select_indices(rows)
        self.hidden, self.mask = self.hidden[rows], None if self.mask is None else self.mask[rows]
        self.position = self.position.index_select(-2, rows)


class VLM:
    """model: an image-text-to-text model; processor: its processor. Use `VLM.load`."""

    def __init__(self, model, processor):
        self.model, self.processor = model.eval(), processor       # eval: dropout would make score differ from sample
        self.tokenizer = processor.tokenizer
        self.tokenizer.padding_side = "left"
        self.backbone, self.head = getattr(model, "model", None), model.get_output_embeddings()
        if self.backbone is None or self.head is None:
            raise InputError(f"model class {type(model).__name__} cannot be used here: it is not a backbone with a head")
        self.text_config = model.config.get_text_config()
        self.vocabulary = self.head.weight.shape[0]
        self.top_k = top_k_for(self.vocabulary)
        self.eos = self._eos_ids()
        self.banned = self._banned_ids()
        special = {*self.tokenizer.all_special_tokens,
                   *(token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special)}
        self._special = re.compile("|".join(re.escape(token) for token in sorted(special, key=len, reverse=True)))
        # Whether prompts of one picture each that were encoded together are not encoded again, in parts or in another order.
        # Told by the pictures' identity: whoever sets this must not change a picture that was looked at.
        self.encodes_once, self._encoded = False, ((), (), {})
        # transformers 5.20 renamed past_key_values to cache.
        names = inspect.signature(self.backbone.forward).parameters
        self._cache_name = "cache" if "cache" in names else "past_key_values"
        # Whether samples read their prompt's keys and values in place (shared_prefix.py) or each a copy; `_check` tries it.
        self.shares = all(type(layer) is DynamicLayer for layer in DynamicCache(config=self.text_config).layers)

    @classmethod
    def load(cls, path, device=None, dtype=None, meta=False):
        """Open a directory or hub id. device: default CUDA where there is one; dtype: default bf16 there, fp32 on a CPU;
        "auto" is that of the file. meta: without weights, to
        encode prompts and count. Raises InputError, in a sentence, when there is no such model, it has no image processor,
        or its class cannot work here."""
        if meta:
            return cls._sketch(path)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or (torch.float32 if str(device) == "cpu" else torch.bfloat16)
        if not Path(path).is_dir() and (str(path).startswith((".", "/")) or str(path).count("/") != 1):
            raise InputError(f"model {str(path)!r} is neither a directory nor a hub id of the form owner/name")
        try:
            model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype)
        except (ImportError, OSError, ValueError, SafetensorError) as error:
            raise InputError(f"model {str(path)!r} cannot be loaded: {reason(error)}") from error
        for p in model.to(device).parameters():
            if p.device.type == "cpu":
                # Memory of its own: mapped from a file it may lie at odd addresses, for which kernels sum in another order.
                p.data = p.data.clone()
        vlm = cls(model, load_processor(path))
        vlm._check()
        return vlm

    @classmethod
    def _sketch(cls, path):
        """A VLM without weights, which encodes prompts."""
        try:
            with torch.device("meta"):
                model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(path))
        except (ImportError, OSError, ValueError) as error:
            raise InputError(f"model {str(path)!r} has no settings that can be read: {reason(error)}") from error
        vlm = cls(model, load_processor(path))
        try:
            vlm.trial()
        except Exception as error:
            raise vlm.refusal(error) from error
        with tempfile.TemporaryDirectory() as folder:               # what a checkpoint will do
            vlm.save_processor(folder)
        return vlm

    @torch.no_grad()
    def _check(self):
        """InputError for a class that is not what this file takes it for: prefill, repeated cache and head must give the
        same log-probs to what its own `generate` says about two pictures."""
        try:
            images, prompts, inputs = self.trial()
            said = self.model.generate(**inputs, max_new_tokens=3, do_sample=False, cache_implementation="dynamic",
                                       return_dict_in_generate=True, output_logits=True)
            tokens = said.sequences[:, inputs["input_ids"].shape[1]:]                              # (2, T)
            theirs = torch.stack(said.logits, 1).float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
            ours = self.score(images, prompts, tokens.repeat_interleave(2, 0)).logprobs[::2]
            alone = self.score(images[1:], prompts[1:], tokens[1:]).logprobs
            self.shares = self.shares and self._agrees(images, prompts, tokens, theirs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise self.refusal(error) from error
        for wanted, found, what in ((theirs, ours, "from a repeated cache are off from its own `generate`"),
                                    (alone, ours[1:], "of a prompt alone are off from those in a batch")):
            off = (wanted - found).abs().max().item()
            if not off < self._tolerance():                                         # not: nan is refused as well
                raise self.refusal(f"its log-probs {what} by {off:.2g}")

    def trial(self):
        """Two pictures, two prompts and what the model takes for them (images, prompts, inputs). InputError for a class that
        keeps more than keys and values, or looks past them: what can be told without its weights."""
        images = [[Image.new("RGB", (64, 64), "gray")], [Image.new("RGB", (120, 40), "red")]]
        prompts = ["What is this?", "What colour is it?"]
        if self.model.config.is_encoder_decoder:
            raise InputError("it is an encoder and a decoder, whose cross-attention looks at the prompt past the cache")
        for layer in DynamicCache(config=self.text_config).layers:
            if not hasattr(layer, "batch_repeat_interleave"):
                raise InputError(f"its cache holds more than keys and values ({type(layer).__name__})")
        inputs = self.encode(images, prompts)
        if any(value.ndim > 2 and value.shape[:2] == inputs["input_ids"].shape for value in inputs.values()):
            raise InputError("its tokens look at the pictures past the cache, by cross-attention")
        alone = self._positions(self.encode(images[1:], prompts[1:]))
        if not torch.equal(alone, self._positions(inputs)[..., 1:, -alone.shape[-1]:]):
            raise InputError("it gives a prompt other positions alone than in a batch")
        return images, prompts, inputs

    def refusal(self, why):
        """The InputError for a class that cannot work. why: words, or the error it failed with."""
        why = reason(why)
        if "no attribute 'video_processor'" in why:
            why = "its processor needs one for videos, even for pictures, which takes torchvision; pip install torchvision"
        return InputError(f"model class {type(self.model).__name__} cannot be used here: {why}")

    def _tolerance(self):
        return 1e-3 if self.model.dtype == torch.float32 else 0.5

    def _agrees(self, images, prompts, tokens, logprobs):
        """Whether these tokens (B, T), decoded from a shared prompt, have these log-probs (B, T)."""
        state, found = self._prefill(images, prompts), []
        state.share(2)
        try:
            with shared_prefix.attention_of(self.model.get_decoder()):
                for column in tokens.repeat_interleave(2, 0).unbind(1):
                    found.append(self._logits(state.hidden).log_softmax(-1).gather(-1, column[:, None]))
                    self._read(state, column)
        except torch.OutOfMemoryError:
            raise
        except Exception:       # a class of another kind may fail in any way; copies serve it
            return False
        return (torch.cat(found, 1)[::2] - logprobs).abs().max().item() < self._tolerance()

    def save(self, path, state=None):
        """Write the model and its processor in Hugging Face form. state: its weights by name, where the model itself holds
        only a share of them; of any dtype. OSError where it cannot be written."""
        try:
            self.model.save_pretrained(path, state_dict=state)
        except SafetensorError as error:
            code = re.search(r"os error (\d+)", str(error))
            raise OSError(int(code[1]) if code else errno.ENOSPC, reason(error), str(path)) from error
        if state is not None:               # transformers has written down the dtype of the model's own weights
            dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
            config = Path(path) / "config.json"
            config.write_text(re.sub(r'("(?:torch_)?dtype": )"\w+"', rf'\1"{dtype}"', config.read_text()))
        self.save_processor(path)

    def save_processor(self, path):
        """Write the processor. InputError for a class that cannot be written down."""
        try:
            self.processor.save_pretrained(path)
            # Where there is torchvision, a class opened here without its video processor finds settings for one in this file.
            self.processor.image_processor.save_pretrained(path)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise self.refusal(f"its processor cannot be saved ({error})") from error

    @property
    def device(self):
        weight = self.head.weight
        return torch.device("cpu") if weight.is_meta else weight.device

    @property
    def context(self):
        """The longest sequence, in tokens, that the model's positions allow (int)."""
        return self.text_config.max_position_embeddings

    def vision_parameters(self):
        """All that is neither the language model nor its head: the vision tower and what joins the two (list)."""
        language = {id(p) for part in (self.model.get_decoder(), self.head) for p in part.parameters()}
        return [p for p in self.model.parameters() if id(p) not in language]

    def checkpoint_activations(self, blocks):
        """From now on these blocks (modules) keep their inputs only and run again in the backward pass of `score`."""
        for block in blocks:
            block.forward = run_again(block, self._cache_name)

    def _eos_ids(self):
        ids = self.model.generation_config.eos_token_id
        ids = ids if isinstance(ids, list) else [ids if ids is not None else self.tokenizer.eos_token_id]
        return torch.tensor(ids, device=self.device)

    def _banned_ids(self):
        """(V,) bool, True on ids that must never be sampled: every special token but EOS, and rows of the head beyond
        the tokenizer. An image placeholder in a completion would break the next forward pass."""
        banned = torch.zeros(self.vocabulary, dtype=torch.bool, device=self.device)
        banned[len(self.tokenizer):] = True
        special = [i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special]
        named = [value if isinstance(value, (list, tuple)) else [value] for key, value in vars(self.model.config).items()
                 if key.endswith(("token_id", "token_ids", "token_index"))]
        config = [i for value in named for i in value if isinstance(i, int)]
        banned[[i for i in special + config + self.tokenizer.all_special_ids if i < self.vocabulary]] = True
        banned[self.eos] = False
        return banned

    # ------------------------------------------------------------------------------------------------------------------
    # Prompts in

    def encode(self, images, prompts):
        """User turns with their images -> left-padded model inputs (dict of tensors, input_ids (B, L)).

        A picture stands where the prompt first names it (`<image>`, `<image 2>`, `<image2>`), else in front. Special
        tokens in the prompt are taken out: a user's or an Expert's words cannot open an image or end the turn.
        """
        if self.encodes_once and (inputs := self._encoded_before(images, prompts)) is not None:
            return inputs
        texts, ordered = [], []
        for pictures, prompt in zip(images, prompts, strict=True):
            content, order = in_place(prompt, len(pictures))
            for part in content:
                if part["type"] == "text":
                    part["text"] = self._special.sub(" ", part["text"])
            ordered.append([pictures[i] for i in order])
            texts.append(self.processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False,
                                                            add_generation_prompt=True))
        bos = self.tokenizer.bos_token              # where the template has written it, the tokenizer must not once more
        try:
            inputs = self.processor(text=texts, images=ordered if any(ordered) else None, padding=True, return_tensors="pt",
                                    add_special_tokens=not (bos and texts[0].startswith(bos)))
        except ValueError as error:     # some classes know no prompt without a picture, or not beside others with one
            raise InputError(f"{type(self.processor).__name__} does not take these prompts: {error}") from error
        inputs = {key: value.to(self.device) for key, value in inputs.items()}
        if self.encodes_once:
            self._encoded = [[*pictures] for pictures in images], [*prompts], inputs
        return inputs

    def _encoded_before(self, images, prompts):
        """These prompts' rows of what `encode` made last, without columns of padding alone -> inputs, or None where they are
        not all in there or cannot be told apart."""
        before, said, inputs = self._encoded
        place = {(*map(id, pictures), prompt): b for b, (pictures, prompt) in enumerate(zip(before, said))}
        rows = [place.get((*map(id, pictures), prompt)) for pictures, prompt in zip(images, prompts)]
        if None in rows or any(len(pictures) != 1 for pictures in before):
            return None
        count, length = inputs["input_ids"].shape
        padded = length - int(inputs["attention_mask"][rows].sum(-1).max())
        grid, found = inputs.get("image_grid_thw"), {}
        sizes = [] if grid is None else grid.prod(-1).tolist()              # patches of each picture (Qwen)
        for key, value in inputs.items():
            if value.shape == (count, length):
                found[key] = value[rows, padded:]
            elif len(value) == count:
                found[key] = value[rows]
            elif len(value) == sum(sizes):
                own = value.split(sizes)
                found[key] = torch.cat([own[b] for b in rows])
            else:
                return None
        return found

    def prompt_length(self, images, prompt):
        """Tokens of one prompt, its images included (int)."""
        return self.encode([images], [prompt])["input_ids"].shape[1]

    def _positions(self, inputs):
        """Position ids of the prompts: (3, B, L) for multimodal rotary embeddings, else (B, L)."""
        if hasattr(self.backbone, "get_rope_index") and "image_grid_thw" in inputs:
            wanted = inspect.signature(self.backbone.get_rope_index).parameters
            return self.backbone.get_rope_index(**{key: inputs[key] for key in inputs if key in wanted})[0]
        return (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)

    def _forward(self, cache, part=None, **inputs):
        return (part or self.backbone)(**inputs, use_cache=True, **{self._cache_name: cache}).last_hidden_state

    def _prefill(self, images, prompts):
        inputs = self.encode(images, prompts)
        positions, cache = self._positions(inputs), DynamicCache(config=self.text_config)
        hidden = self._forward(cache, position_ids=positions, **inputs)         # (B, L, D)
        return _Prefill(cache, hidden[:, -1], inputs["attention_mask"], positions[..., -1:])

    def _read(self, state, token):
        """Each row of `state` reads its next token (R,)."""
        if state.mask is not None:
            state.mask = torch.cat([state.mask, state.mask.new_ones(len(token), 1)], 1)
        state.position = state.position + 1
        # A word has no picture that the backbone would look for; `_agrees` has tried its decoder alone.
        state.hidden = self._forward(state.cache, self.model.get_decoder() if self.shares else None, input_ids=token[:, None],
                                     attention_mask=state.mask, position_ids=state.position)[:, -1]

    # ------------------------------------------------------------------------------------------------------------------
    # Completions out

    @torch.no_grad()
    def sample(self, images, prompts, n=1, *, max_new_tokens=256, temperature=1.0, top_k=0, top_p=1.0, greedy=False,
               seed=0, first=0, entropy=False):
        """n completions for each of B prompts -> list (B) of lists (n) of Rollout.

        images: list (B) of lists of PIL images. temperature, top_k (0 = off), top_p (1 = off) shape what is drawn;
        log-probs and confidences are read from the raw logits. greedy: argmax (lowest id on a tie).
        seed: an int, or one for each prompt. The random numbers of a prompt are drawn before decoding starts, from its
        own seed: they do not depend on the other prompts of the batch, nor on how a batch is split over ranks.
        first: how many samples of this seed to pass over: 8 samples are 5 and then 3 with first = 5.
        """
        def choose(logits, uniform):
            allowed = logits.masked_fill(self.banned, -torch.inf)
            return allowed.argmax(-1) if greedy else draw(allowed, uniform, temperature, top_k, top_p)

        rollouts = self._decode([self._prefill(images, prompts)], choose, _seeds(seed, prompts), n, max_new_tokens, first,
                                entropy)
        return [rollouts[b * n:(b + 1) * n] for b in range(len(prompts))]

    @torch.no_grad()
    def contrast(self, images, noised, prompts, *, alpha=0.5, beta=0.1, max_new_tokens=256, greedy=True, seed=0):
        """Visual contrastive decoding (paper 3.3, Visual Self-Check; VCD, arXiv 2311.16922) -> list (B) of Rollout.

        Two caches, one on `images` and one on `noised` (lists (B) of lists of PIL images), read one shared text in lock
        step. The next token is the argmax of, or drawn from, (1 + alpha) log p(.|i) - alpha log p(.|i'), among tokens
        with p(.|i) >= beta * max p(.|i). alpha = 0 and beta = 0 is plain decoding on `images`. The rollout's log-probs
        and confidences are those of the original picture, raw. ValueError for alpha < 0 or beta outside [0, 1].
        """
        if alpha < 0 or not 0 <= beta <= 1:
            raise ValueError(f"alpha {alpha} must not be negative, and beta {beta} must lie in [0, 1]")

        def choose(logits, other, uniform):
            logp = logits.log_softmax(-1).masked_fill(self.banned, -torch.inf)
            scores = (1 + alpha) * logp - alpha * other.log_softmax(-1)
            if beta:
                scores = scores.masked_fill(logp < logp.amax(-1, keepdim=True) + math.log(beta), -torch.inf)
            return scores.argmax(-1) if greedy else draw(scores, uniform)

        states = [self._prefill(view, prompts) for view in (images, noised)]
        return self._decode(states, choose, _seeds(seed, prompts), 1, max_new_tokens)

    def _decode(self, states, choose, seeds, n, max_new_tokens, first=0, entropy=False):
        """The decoding loop: n completions for each prompt of `states` (one prefill a view, one shared text), flat list.

        choose(logits of each view (R, V) raw, uniform (R,)) -> tokens (R,). What is recorded is read from the first view.
        """
        for state in states:
            state.share(n) if self.shares else state.repeat(n)
        with shared_prefix.attention_of(self.model.get_decoder()) if self.shares else nullcontext():
            return self._rollouts(states, choose, seeds, n, max_new_tokens, first, entropy)

    def _rollouts(self, states, choose, seeds, n, max_new_tokens, first, entropy):
        total = len(seeds) * n
        uniform = torch.stack([torch.rand(first + n, max_new_tokens, generator=_generator(s), dtype=torch.float64)[first:]
                               for s in seeds]).view(total, max_new_tokens).to(self.device)      # (B*n, T)
        tokens = torch.full((total, max_new_tokens), -1, device=self.device)                      # (B*n, T), -1 = none
        logprobs = torch.zeros(total, max_new_tokens, device=self.device)
        confidences = torch.zeros(total, max_new_tokens, device=self.device)
        entropies = torch.zeros(total, max_new_tokens, device=self.device) if entropy else None
        rows = torch.arange(total, device=self.device)              # the rows still in the batch
        ended = torch.zeros(total, dtype=torch.bool, device=self.device)
        unrecorded = []                     # (tokens (R,), logits (R, V)) of the newest words

        def record(t, ended):
            """Record the words up to t and what their logits say, several at once: a call for each costs more than its
            arithmetic. -> which rows have ended by now (R,)"""
            said, logits = (torch.stack(part, 1) if len(part) > 1 else part[0][:, None] for part in zip(*unrecorded))
            words = slice(t + 1 - len(unrecorded), t + 1)                                           # P of them
            eos = torch.isin(said, self.eos)                                                    # (R, P)
            tokens[rows, words] = said.masked_fill(ended[:, None] | (eos.cumsum(1) > eos), -1)
            normaliser = logits.logsumexp(-1)                                                   # (R, P), one walk for both
            logprobs[rows, words] = logits.gather(-1, said[..., None])[..., 0] - normaliser
            confidences[rows, words] = token_confidence(logits, self.top_k, normaliser)
            if entropy:
                entropies[rows, words] = token_entropy(logits, normaliser)
            unrecorded.clear()
            return ended | eos.any(1)

        with torch.inference_mode():        # less work an operation than no_grad; what is returned was made outside
            for t in range(max_new_tokens):
                views = [self._logits(state.hidden) for state in states]            # (R, V) each, raw
                token = choose(*views, uniform[:, t])
                unrecorded.append((token, views[0]))
                looks = t % TRIM_EVERY == TRIM_EVERY - 1 or t == max_new_tokens - 1 or len(rows) <= TRIM_EVERY
                if looks or (len(unrecorded) + 1) * views[0].numel() > CHUNK_LOGITS:
                    ended = record(t, ended)
                if looks:
                    alive = (~ended).nonzero()[:, 0]
                    if len(alive) == 0:
                        break
                    if len(alive) < len(rows):
                        for state in states:
                            state.keep(alive)
                        rows, token, ended, uniform = rows[alive], token[alive], ended[alive], uniform[alive]
                if t < max_new_tokens - 1:
                    for state in states:
                        self._read(state, token)

        lengths = (tokens >= 0).sum(-1).tolist()
        tokens, logprobs, confidences = tokens.cpu(), logprobs.cpu(), confidences.cpu()
        eos = set(self.eos.tolist())
        rollouts = []
        for row, length in enumerate(lengths):
            ids = tokens[row, :length]
            rollouts.append(Rollout(self.tokenizer.decode(ids, skip_special_tokens=True), ids, logprobs[row, :length],
                                    confidences[row, :length], int(ids[-1]) in eos,
                                    entropies[row, :length].cpu() if entropy else None))
        return rollouts

    def score(self, images, prompts, completions, *, temperature=1.0):
        """Log-probs, confidence and entropy of given completions, with gradient -> Scores, (B*n, T) each.

        completions: B*n lists of token ids, n after each other for each of the B prompts (n = 1: one each), which are
        read once. temperature divides the logits of `logprobs` alone; confidence and entropy stay raw.
        Positions and prompts are those of `sample`; the vocabulary head sees completion tokens only, in chunks
        whose logits are recomputed in the backward pass where one chunk is not enough.
        """
        n, rest = divmod(len(completions), len(prompts))
        if rest or not n or not all(len(ids) for ids in completions):
            raise ValueError(f"{len(completions)} completions, some perhaps empty, for {len(prompts)} prompts; the same "
                             "number, none empty, is needed for each")
        state = self._prefill(images, prompts)
        state.repeat(n)
        ids = torch.nn.utils.rnn.pad_sequence([torch.as_tensor(c) for c in completions], batch_first=True,
                                              padding_value=-1).to(self.device)                    # (B*n, T)
        mask, width = ids >= 0, ids.shape[1]
        hidden = state.hidden[:, None]                                                             # (B*n, 1, D)
        # Made even where every completion is one word, whose last is not needed: ranks that share a model gather its weights at
        # each pass, and must make as many.
        read = max(1, width - 1)
        after = self._forward(state.cache, input_ids=ids[:, :read].clamp(min=0),
                              attention_mask=torch.cat([state.mask, mask[:, :read].long()], 1),
                              position_ids=state.position + torch.arange(1, read + 1, device=self.device))
        hidden = torch.cat([hidden, after], 1)[:, :width]                                          # (B*n, T, D)
        rows, targets = hidden[mask], ids[mask]                                                    # (N, D), (N,)
        size = max(1, CHUNK_LOGITS // self.vocabulary)
        parts = [(checkpoint(self._head_scores, h, y, temperature, use_reentrant=False) if len(rows) > size
                  else self._head_scores(h, y, temperature)) for h, y in zip(rows.split(size), targets.split(size))]
        fields = [torch.zeros(ids.shape, device=self.device).masked_scatter(mask, torch.cat(part))
                  for part in zip(*parts)]
        return Scores(*fields, mask)

    def _logits(self, hidden):
        """(N, D) -> (N, V) in fp32, capped where the model caps them (Gemma)."""
        logits, cap = self._head(hidden).float(), getattr(self.text_config, "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits

    def _head(self, hidden):
        """The vocabulary head, (N, D) -> (N, V). MKL takes up to twice as long as oneDNN for a few rows and a real vocabulary
        (`benchmarks/rollout.py`), and torch asks oneDNN only where a tensor lies in its layout."""
        weight = self.head.weight
        if (len(hidden) in FEW_ROWS and weight.numel() >= LARGE_HEAD and not torch.is_grad_enabled()
                and weight.device.type == "cpu" and weight.dtype == torch.float32 and type(self.head) is torch.nn.Linear
                and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
            return torch.nn.functional.linear(hidden.to_mkldnn(), weight, self.head.bias).to_dense()
        return self.head(hidden)

    def _head_scores(self, hidden, targets, temperature):
        """(N, D), (N,) -> log-prob of the target, confidence, entropy, (N,) each."""
        logits = self._logits(hidden)                                                              # (N, V)
        normaliser = logits.logsumexp(-1)                                                          # (N,)
        picked = logits.gather(-1, targets[:, None])[:, 0] / temperature
        picked = picked - (normaliser if temperature == 1 else (logits / temperature).logsumexp(-1))
        return picked, token_confidence(logits, self.top_k, normaliser), token_entropy(logits, normaliser)


def in_place(prompt, count):
    """A prompt and its number of pictures -> (content of a chat message, order of the pictures in it).

    `<image>` is the next picture that has not been named, `<image 2>` and `<image2>` the second; a picture stands at its
    first mention, those never named stand in front, and tags of pictures that do not exist stay text.
    """
    pieces, order = [], []
    for part in re.split(r"(<image ?\d{0,3}>)", prompt):
        number = re.fullmatch(r"<image ?(\d{0,3})>", part)
        if number:
            index = int(number[1]) - 1 if number[1] else next((i for i in range(count) if i not in order), -1)
            if 0 <= index < count and index not in order:
                order.append(index)
                pieces.append({"type": "image"})
                continue
        if part.strip():
            pieces.append({"type": "text", "text": part})
    front = [i for i in range(count) if i not in order]
    return [{"type": "image"} for _ in front] + pieces, front + order


def _seeds(seed, prompts):
    """One seed for each prompt, from an int or from a list of them."""
    return seed if isinstance(seed, (list, tuple)) else [f"{seed} {b}" for b in range(len(prompts))]


def _generator(seed):
    """A CPU generator from any seed; a string is hashed, so that neighbouring seeds share nothing."""
    return torch.Generator().manual_seed(random.Random(str(seed)).getrandbits(63))


def draw(logits, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """One token a row by inverting the cumulative distribution at a given uniform number.

    logits (R, V), -inf where banned; uniform (R,) float64 in [0, 1) -> (R,) int64. Summed in float64: in float32 the
    tail of a 152k vocabulary is lost, and rounding could select a banned last id.
    """
    if temperature != 1:
        logits = logits / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probs = logits.double().softmax(-1)
    if top_p < 1:
        ordered, order = probs.sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p              # the first token always stays
        probs = probs.scatter(-1, order, ordered.masked_fill(beyond, 0.0))
    cumulative = probs.cumsum(-1)
    token = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return token.clamp(max=logits.shape[-1] - 1)        # nan logits point past the end; whoever reads the scores sees them
