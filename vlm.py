"""A vision-language model: sample with confidence, contrast two pictures, score completions with gradient.

    vlm = VLM.load("Qwen/Qwen2.5-VL-3B-Instruct")
    rollouts = vlm.sample(images, prompts, n=8)              # list (B) of lists (8) of Rollout
    scores = vlm.score(images, prompts, completions)         # log-probs and confidence, with gradient

Works for any Hugging Face image-text-to-text model whose cache is a `DynamicCache`, with attention or linear
attention (`utils/caches.py`). One prefill reads a prompt and its pictures once. The G samples share its keys
and values (`utils/shared_prefix.py`). `score` prefills in the same way and reads the completions after copies
of the cache, so that sampled and scored log-probs agree to rounding.

Log-probs and confidence are read from the raw logits in fp32, before temperature, top-k and banned ids (paper
Eq. 3). No (B, T, V) tensor is kept: at most CHUNK_LOGITS logits are in memory at once.
"""
import inspect
import math
import random
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from reward import token_confidence, top_k_for
from utils import loading, lora, shared_prefix
from utils.caches import has_states, new_cache
from utils.loading import CHUNK_LOGITS, TRIM_EVERY
from utils.prompts import Inputs, Reading, place_images
from utils.sight import Sight


@dataclass
class Rollout:
    """One sampled completion.

    tokens (T,) int64, with EOS; logprobs (T,) in nats, of the raw logits at temperature 1; confidences (T,),
    Eq. 3 for each token; finished: it ended with EOS and was not cut at max_new_tokens; failure: why a server
    gave no words, None where it did."""
    text: str
    tokens: torch.Tensor
    logprobs: torch.Tensor
    confidences: torch.Tensor
    finished: bool
    failure: Exception | None = None


class Scores(NamedTuple):
    """logprobs, confidence (B, T) fp32, zero where padded; mask (B, T) bool, True on completion tokens."""
    logprobs: torch.Tensor
    confidence: torch.Tensor
    mask: torch.Tensor

    def split(self, sizes):
        """-> list of Scores with these numbers of rows."""
        return [Scores(*chunks) for chunks in zip(*(field.split(sizes) for field in self))]


@dataclass
class Prefill:
    """Prompts after one forward pass.

    cache: their keys and values; hidden (B, D) of the last token; mask (B, L); position (..., B, 1) of the
    last token, with a leading axis of 3 for multimodal rotary embeddings."""
    cache: DynamicCache
    hidden: torch.Tensor
    mask: torch.Tensor | None
    position: torch.Tensor

    def repeat(self, n):
        """Copy every prompt n times: samples cannot overwrite each other's keys."""
        self.cache.batch_repeat_interleave(n)
        self.hidden, self.mask = self.hidden.repeat_interleave(n, 0), self.mask.repeat_interleave(n, 0)
        self.position = self.position.repeat_interleave(n, -2)

    def share(self, n):
        """`repeat` without the copies, for decoding. From now on the cache holds the mask."""
        self.cache, self.mask = shared_prefix.SharedPrefix(self.cache, self.mask, n), None
        self.hidden = self.hidden.repeat_interleave(n, 0)
        self.position = self.position.repeat_interleave(n, -2)

    def select(self, rows):
        """Only these rows stay."""
        self.cache.batch_select_indices(rows)
        self.hidden, self.mask = self.hidden[rows], None if self.mask is None else self.mask[rows]
        self.position = self.position.index_select(-2, rows)


class VLM:
    """model: an image-text-to-text model; processor: its processor. Use `VLM.load`."""

    def __init__(self, model, processor):
        # eval: with dropout, score would differ from sample
        self.model, self.processor = model.eval(), processor
        self.tokenizer, self.sight = processor.tokenizer, Sight(processor)
        self.tokenizer.padding_side, self.reading = "left", Reading()
        self.backbone, self.head = getattr(model, "model", None), model.get_output_embeddings()
        if self.backbone is None or self.head is None:
            raise loading.refusal(model, "it is not a backbone with a head")
        self.text_config = model.config.get_text_config()
        self.vocabulary = self.head.weight.shape[0]
        self.top_k = top_k_for(self.vocabulary)
        self.eos = loading.eos_ids(model, self.tokenizer, processor.apply_chat_template).to(self.device)
        self.banned = loading.banned_ids(model, self.tokenizer, self.eos)
        self.special_tokens = loading.special_token_pattern(self.tokenizer)
        # transformers 5.20 renamed past_key_values to cache.
        parameters = inspect.signature(self.backbone.forward).parameters
        self.cache_name = "cache" if "cache" in parameters else "past_key_values"
        # A layer with states needs more than one word at a time for its backward pass.
        self.min_words = 2 if has_states(self.text_config) else 1
        self.logit_factor = 1.0                                 # measured by `loading.check`
        # Do samples read their prompt's keys and values in place? `loading.check` tries it.
        self.shares_prefix = shared_prefix.applies_to(self.text_config)

    @classmethod
    def load(cls, path, device=None, dtype=None, meta=False):
        """Open a directory or a hub id -> VLM.

        device: CUDA where there is one, unless named. dtype: bf16 there and fp32 on a CPU, unless named;
        "auto" is that of the file. meta: without weights, to encode prompts and count. InputError, in a
        sentence, for a path without a model, a model without an image processor, or a class that cannot work
        here."""
        if meta:
            vlm = cls(*loading.open_meta(lora.base_of(path) or path))
            loading.check_meta(vlm)
            return vlm
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or (torch.float32 if str(device) == "cpu" else torch.bfloat16)
        base = lora.base_of(path)                   # an adapter's folder names the model that it belongs to
        if base is not None:
            vlm = cls.load(base, device, dtype)
            with loading.opening("adapter", path):
                lora.merge_into(vlm.model, path)
            return vlm
        vlm = cls(*loading.open_model(path, device, dtype))
        loading.check(vlm)
        return vlm

    def read_as(self, options):
        """Prompts from now on with --system, --max_pixels and --min_pixels of these options -> itself."""
        self.reading = Reading(options.system, options.max_pixels, options.min_pixels)
        self.reading.check(self.processor)
        return self

    @property
    def device(self):
        weight = self.head.weight
        return torch.device("cpu") if weight.is_meta else weight.device

    @property
    def context(self):
        """The longest sequence, in tokens, that the model's positions allow (int)."""
        return self.text_config.max_position_embeddings

    # --------------------------------------------------------------------------------------------------------
    # Prompts in

    def encode(self, images, prompts):
        """User turns with their pictures -> Inputs, left-padded, input_ids (B, L).

        images: list (B) of lists of PIL images. A picture stands where the prompt first names it (`<image>`,
        `<image 2>`, `<image2>`), else in front. Special tokens in a prompt become spaces. InputError where
        the processor refuses the prompts.
        """
        texts, ordered, reading = [], [], self.reading
        for pictures, prompt in zip(images, prompts, strict=True):
            content, order = place_images(prompt, len(pictures), self.special_tokens)
            ordered.append([reading.picture(pictures[i]) for i in order])
            texts.append(self.processor.apply_chat_template(
                reading.turns(content), tokenize=False, add_generation_prompt=True))
        bos = self.tokenizer.bos_token              # not once more where the template has written it
        inputs = self.sight(texts, ordered, add_special_tokens=not (bos and texts[0].startswith(bos)))
        return Inputs({name: value.to(self.device) for name, value in inputs.items()},
                      all(len(pictures) == 1 for pictures in images))

    def prompt_length(self, images, prompt):
        """Tokens of one prompt, its pictures included (int)."""
        return self.encode([images], [prompt])["input_ids"].shape[1]

    def _forward(self, cache, module=None, **inputs):
        module = module or self.backbone
        return module(**inputs, use_cache=True, **{self.cache_name: cache}).last_hidden_state

    def prefill(self, images, prompts, inputs=None):
        """One forward pass over the prompts -> Prefill. inputs: of `encode`, else made here."""
        inputs = self.encode(images, prompts) if inputs is None else inputs
        # FSDP may have changed the dtype since `encode`.
        inputs = loading.cast_pixels(inputs, self.head.weight.dtype)
        positions, cache = loading.position_ids(self.model, inputs), new_cache(self.text_config)
        hidden = self._forward(cache, position_ids=positions, **inputs)                          # (B, L, D)
        return Prefill(cache, hidden[:, -1], inputs["attention_mask"], positions[..., -1:])

    def read(self, state, token):
        """Each row of `state` (Prefill) reads its next token (R,)."""
        if state.mask is not None:
            state.mask = torch.cat([state.mask, state.mask.new_ones(len(token), 1)], 1)
        state.position = state.position + 1
        # The decoder alone where prompts are shared: the backbone would look for pictures.
        decoder = self.model.get_decoder() if self.shares_prefix else None
        state.hidden = self._forward(state.cache, decoder, input_ids=token[:, None],
                                     attention_mask=state.mask, position_ids=state.position)[:, -1]

    def logits(self, hidden):
        """(N, D) -> (N, V) in fp32, scaled (Granite) and capped (Gemma) where the model does so."""
        logits = loading.apply_head(self.head, hidden).float()
        if self.logit_factor != 1:
            logits = logits * self.logit_factor
        cap = getattr(self.text_config, "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits

    @torch.no_grad()
    def states(self, images, prompts):
        """The last hidden state of each of B prompts, before the first word -> (B, D) fp32 on the CPU."""
        return self.prefill(images, prompts).hidden.float().cpu()

    # --------------------------------------------------------------------------------------------------------
    # Completions out

    @torch.no_grad()
    def sample(self, images, prompts, n=1, *, max_new_tokens=256, temperature=1.0, top_k=0, greedy=False,
               seed=0, first=0, inputs=None):
        """n completions for each of B prompts -> list (B) of lists (n) of Rollout.

        images: list (B) of lists of PIL images. temperature and top_k (0 = off) shape what is drawn;
        log-probs and confidences come from the raw logits. greedy: argmax (lowest id on a tie). seed: an int
        or a string, or one for each prompt. A prompt's random numbers are drawn before decoding, from its own
        seed: they depend neither on the other prompts of the batch nor on the number of ranks. first: how
        many samples of this seed to pass over, so that 8 samples are 5 and then 3 with first = 5. inputs:
        what `encode` made of these prompts, where it is at hand.
        """
        def choose(logits, uniform):
            allowed = logits.masked_fill(self.banned, -torch.inf)
            return allowed.argmax(-1) if greedy else sample_token(allowed, uniform, temperature, top_k)

        seeds = seed if isinstance(seed, list | tuple) else [f"{seed} {b}" for b in range(len(prompts))]
        uniform = [torch.rand(first + n, max_new_tokens, generator=generator(s), dtype=torch.float64)[first:]
                   for s in seeds]
        uniform = torch.cat(uniform).to(self.device)                                                # (B*n, T)
        rollouts = self._decode([self.prefill(images, prompts, inputs)], choose, n, max_new_tokens, uniform)
        return [rollouts[b * n:(b + 1) * n] for b in range(len(prompts))]

    @torch.no_grad()
    def contrast(self, images, noised, prompts, *, alpha=0.5, beta=0.1, max_new_tokens=256):
        """Visual contrastive decoding (Eq. 9, Visual Self-Check; VCD, arXiv 2311.16922) -> B Rollouts.

        Two caches, one on `images` and one on `noised` (lists (B) of lists of PIL images), read one shared
        text in lock step. The next token is the argmax of (1 + alpha) log p(.|i) - alpha log p(.|i'), among
        tokens with p(.|i) >= beta * max p(.|i). alpha = 0 and beta = 0 is greedy decoding on `images`. The
        rollout's log-probs and confidences are those of the original picture, raw. ValueError for alpha < 0
        or beta outside [0, 1].
        """
        if alpha < 0 or not 0 <= beta <= 1:
            raise ValueError(f"alpha {alpha} must not be negative, and beta {beta} must lie in [0, 1]")

        def choose(logits, noised_logits, _):
            logprobs = logits.log_softmax(-1).masked_fill(self.banned, -torch.inf)
            scores = (1 + alpha) * logprobs - alpha * noised_logits.log_softmax(-1)
            if beta:
                scores = scores.masked_fill(logprobs < logprobs.amax(-1, keepdim=True) + math.log(beta),
                                            -torch.inf)
            return scores.argmax(-1)

        states = [self.prefill(view, prompts) for view in (images, noised)]
        nothing_drawn = torch.zeros(len(prompts), max_new_tokens, device=self.device)
        return self._decode(states, choose, 1, max_new_tokens, nothing_drawn)

    def _decode(self, states, choose, n, max_new_tokens, uniform):
        """n completions for each prompt of `states` (one Prefill a view, one shared text) -> B*n Rollouts.

        choose(logits of each view (R, V) raw, uniform (R,)) -> tokens (R,). The first view's are recorded.
        """
        for state in states:
            state.share(n) if self.shares_prefix else state.repeat(n)
        with shared_prefix.attention_of(self.model.get_decoder()) if self.shares_prefix else nullcontext():
            fields = self._decoding_loop(states, choose, max_new_tokens, uniform)
        tokens, logprobs, confidences = (field.cpu() for field in fields)
        eos, rollouts = set(self.eos.tolist()), []
        for row, length in enumerate((tokens >= 0).sum(-1).tolist()):
            ids = tokens[row, :length]
            rollouts.append(Rollout(self.tokenizer.decode(ids, skip_special_tokens=True), ids,
                                    logprobs[row, :length], confidences[row, :length], int(ids[-1]) in eos))
        return rollouts

    def _decoding_loop(self, states, choose, max_new_tokens, uniform):
        """-> tokens (R, T), -1 after the end; logprobs, confidences (R, T)."""
        total = len(states[0].hidden)
        tokens = torch.full((total, max_new_tokens), -1, device=self.device)             # (R, T), -1 = none
        logprobs, confidences = torch.zeros(2, total, max_new_tokens, device=self.device)
        rows = torch.arange(total, device=self.device)              # the rows still in the batch
        ended = torch.zeros(total, dtype=torch.bool, device=self.device)
        pending = []  # (tokens (R,), logits (R, V)) of the newest words, not recorded yet

        def record(t, ended):
            """Record the P pending words, which end at position t -> which rows have ended (R,).

            Several words at once: a call for each costs more than its arithmetic."""
            words, logits = (torch.stack(steps, 1) if len(steps) > 1 else steps[0][:, None]
                             for steps in zip(*pending))
            at = slice(t + 1 - len(pending), t + 1)
            eos = torch.isin(words, self.eos)                                                       # (R, P)
            tokens[rows, at] = words.masked_fill(ended[:, None] | (eos.cumsum(1) > eos), -1)
            normalizer = logits.logsumexp(-1)                                                       # (R, P)
            logprobs[rows, at] = logits.gather(-1, words[..., None])[..., 0] - normalizer
            confidences[rows, at] = token_confidence(logits, self.top_k, normalizer)
            pending.clear()
            return ended | eos.any(1)

        # less work an operation than no_grad; the tensors above are made outside
        with torch.inference_mode():
            for t in range(max_new_tokens):
                views = [self.logits(state.hidden) for state in states]                # (R, V) each, raw
                token = choose(*views, uniform[:, t])
                pending.append((token, views[0]))
                trims = t % TRIM_EVERY == TRIM_EVERY - 1 or t == max_new_tokens - 1 or len(rows) <= TRIM_EVERY
                if trims or (len(pending) + 1) * views[0].numel() > CHUNK_LOGITS:
                    ended = record(t, ended)
                if trims:
                    alive = (~ended).nonzero()[:, 0]
                    if len(alive) == 0:
                        break
                    if len(alive) < len(rows):
                        for state in states:
                            state.select(alive)
                        rows, token, ended, uniform = rows[alive], token[alive], ended[alive], uniform[alive]
                if t < max_new_tokens - 1:
                    for state in states:
                        self.read(state, token)
        return tokens, logprobs, confidences

    def score(self, images, prompts, completions, *, temperature=1.0, inputs=None):
        """Log-probs and confidence of given completions, with gradient -> Scores, (B*n, T) each.

        completions: B*n lists of token ids, n in a row for each of the B prompts (n = 1: one each). A prompt
        is read once. temperature divides the logits of `logprobs` only; confidence stays raw. inputs: what
        `encode` made of these prompts, where it is at hand. The head sees completion tokens only, in chunks;
        with more than one chunk, logits are computed again in the backward pass. ValueError for uneven or
        empty completions.
        """
        n, rest = divmod(len(completions), len(prompts))
        if rest or not n or not all(len(ids) for ids in completions):
            raise ValueError(f"{len(completions)} completions, perhaps empty ones, for {len(prompts)} "
                             "prompts; the same number, none empty, is needed for each")
        state = self.prefill(images, prompts, inputs)
        state.repeat(n)
        ids = torch.nn.utils.rnn.pad_sequence([torch.as_tensor(c) for c in completions], batch_first=True,
                                              padding_value=-1).to(self.device)                     # (B*n, T)
        mask, width = ids >= 0, ids.shape[1]
        # At least one word, even where no completion has a second: ranks that share a model gather its
        # weights at each pass, and must make the same number of passes.
        read = max(self.min_words, width - 1)
        words = torch.nn.functional.pad(ids, (0, read - width), value=-1)                       # (B*n, read)
        after = self._forward(state.cache, input_ids=words.clamp(min=0),
                              attention_mask=torch.cat([state.mask, (words >= 0).long()], 1),
                              position_ids=state.position + torch.arange(1, read + 1, device=self.device))
        hidden = torch.cat([state.hidden[:, None], after], 1)[:, :width]                         # (B*n, T, D)
        rows, targets = hidden[mask], ids[mask]                                              # (N, D), (N,)
        size = max(1, CHUNK_LOGITS // self.vocabulary)
        chunks = [checkpoint(self._head_scores, h, y, temperature, use_reentrant=False) if len(rows) > size
                  else self._head_scores(h, y, temperature)
                  for h, y in zip(rows.split(size), targets.split(size))]
        fields = [torch.zeros(ids.shape, device=self.device).masked_scatter(mask, torch.cat(field))
                  for field in zip(*chunks)]
        return Scores(*fields, mask)

    def _head_scores(self, hidden, targets, temperature):
        """(N, D), (N,) -> log-prob of the target and confidence, (N,) each."""
        logits = self.logits(hidden)                                                                # (N, V)
        normalizer = logits.logsumexp(-1)                                                           # (N,)
        logprobs = logits.gather(-1, targets[:, None])[:, 0] / temperature
        logprobs = logprobs - (normalizer if temperature == 1 else (logits / temperature).logsumexp(-1))
        return logprobs, token_confidence(logits, self.top_k, normalizer)


def load_model(path, device, compute, run):
    """A model for training keeps the dtype of its file until its weights become fp32, one shard at a time ->
    VLM that reads prompts as `run` (RunOptions) says."""
    return VLM.load(path, device, torch.float32 if compute == torch.float32 else "auto").read_as(run)


def generator(seed):
    """A CPU generator from any seed (hashed: neighbours share nothing), or the seed itself if it is one."""
    if isinstance(seed, torch.Generator):
        return seed
    return torch.Generator().manual_seed(random.Random(str(seed)).getrandbits(63))


def sample_token(logits, uniform, temperature=1.0, top_k=0):
    """One token a row, by inverting the cumulative distribution at a given uniform number.

    logits (R, V), -inf where banned; uniform (R,) float64 in [0, 1) -> (R,) int64. Summed in float64: in
    float32 the tail of a 152k vocabulary is lost, and rounding could select a banned last id.
    """
    if temperature != 1:
        logits = logits / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    cumulative = logits.double().softmax(-1).cumsum(-1)
    token = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]
    # nan logits point past the end; the scores then show the nan
    return token.clamp(max=logits.shape[-1] - 1)
