"""Opens models and saves them: processors without torchvision, checks of a class, ids, positions.

`check` compares a model with its own `generate` when it is loaded. A class that works differently from what
`vlm.py` assumes is refused by name, in a sentence, before anything is computed with it.
"""
import copy
import errno
import os
import re
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from PIL import Image
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint
from transformers import (
    PROCESSOR_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    ImageProcessingMixin,
    ProcessorMixin,
)
from transformers.modeling_outputs import BaseModelOutput

from utils import lora, shared_prefix
from utils.caches import new_cache, tensors_of, with_tensors
from utils.cli import InputError, parse_json, reason

# Rows that have ended leave the batch every so many tokens. Looking costs a synchronisation on a GPU.
TRIM_EVERY = 8
# Logits of one chunk of the vocabulary head, or of the words recorded together: 64 MiB in fp32.
CHUNK_LOGITS = 2**24
ATTENTION = 2**28           # CLIP's attention weights in memory at once, 1 GiB: two pictures of ViT-L/14-336
# A head with so many weights is applied to so few rows by oneDNN on a CPU (`apply_head`).
LARGE_HEAD, FEW_ROWS = 2**24, range(4, 33)


def largest(values, k, width=128):
    """The k largest of (..., V), in falling order -> (..., k), equal to `topk`.

    `topk` walks over a real vocabulary several times. The k largest lie in the k chunks of `width` with the
    highest maxima, so that one walk for the maxima is enough.
    """
    chunks = values.shape[-1] // width
    if chunks < 8 * k:
        return values.topk(k).values
    chunked = values[..., :chunks * width].unflatten(-1, (chunks, width))           # (..., chunks, width)
    best = chunked.detach().amax(-1).topk(k).indices[..., None]                                 # (..., k, 1)
    candidates = chunked.gather(-2,
                                best.expand(*best.shape[:-1],
                                            width)).flatten(-2)                # (..., k * width)
    return torch.cat([candidates, values[..., chunks * width:]], -1).topk(k).values


# Of every `from_pretrained`: no code of a model's folder runs, and nobody is asked whether it may.
SAFE = {"trust_remote_code": False}


def check_folder(path):
    """InputError for a model's folder whose weights are pickles alone: nothing here reads one. A folder with
    code of its own is opened by the class of this library, or refused by it."""
    folder = Path(path)
    if not folder.is_dir():
        return
    pickles = sorted(file.name for pattern in ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
                     for file in folder.glob(pattern))
    if pickles and not any(folder.glob("*.safetensors")):
        raise InputError(f"model {str(path)!r} holds its weights as a pickle ({pickles[0]}), which may hold "
                         "code and is not read; convert it to safetensors (save_pretrained of transformers "
                         "writes them) where you trust it")
    for name in ("config.json", "generation_config.json"):
        _check_settings(path, folder / name)


def _check_settings(path, file):
    """InputError for settings that are no JSON object, or that name code to fetch (kernels of a hub id)."""
    try:
        settings = parse_json(file.read_text(errors="replace")) if file.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"model {str(path)!r}: {file.name} cannot be read ({reason(error)}); fetch it "
                         "again") from error
    if not isinstance(settings, dict):
        raise InputError(f"model {str(path)!r}: {file.name} is no JSON object; fetch it again")
    todo = [settings]                       # those of the text and of the vision model are inside
    while todo:
        for name, value in todo.pop().items():
            if isinstance(value, dict):
                todo.append(value)
            if ("attn_implementation" in name or "experts_implementation" in name) and "/" in str(value):
                raise InputError(f"model {str(path)!r}: {file.name} asks for the code of "
                                 f"{str(value)[:60]!r} ({name}), which is not run; remove that line")


@contextmanager
def opening(what, path):
    """Inside, a folder or hub id is opened by transformers; what that raises leaves as an InputError."""
    check_folder(path)
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:              # a torn file, or one that somebody has edited, raises any kind
        why = reason(error)
        if "custom code" in why:
            why = "it needs code of its own, which is not run; use a model that transformers knows"
        other = "; --clip names another" if what == "CLIP model" else ""
        raise InputError(f"{what} {str(path)!r} cannot be loaded: {why}{other}") from error


@contextmanager
def disk_errors(path):
    """What the writers of weights and tokenizers raise on a full disk leaves as an OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:              # tokenizers raises a plain Exception
        code = re.search(r"os error (\d+)", str(error))
        if code is None and not isinstance(error, SafetensorError):
            raise
        number = int(code[1]) if code else errno.ENOSPC
        raise OSError(number, os.strerror(number), str(path)) from error


class _ImagesOnly(ProcessorMixin):
    """A base put behind a processor's class that removes its video processor, which needs torchvision."""

    def __init__(self, *args, **kwargs):
        by_name = {**dict(zip(super().get_attributes(), args)), **kwargs}
        super().__init__(**{name: value for name, value in by_name.items() if "video" not in name})

    @property
    def video_processor(self):
        """Some classes read their settings from it when they are made (MiniCPM-V)."""
        return self.image_processor

    @classmethod
    def get_attributes(cls):
        return [name for name in super().get_attributes() if "video" not in name]

    @classmethod
    def from_args_and_dict(cls, args, *rest, **kwargs):
        by_name = dict(zip(cls.get_attributes(), args))         # each class has its own order of parts
        return super().from_args_and_dict([by_name.get(name) for name in super().get_attributes()], *rest,
                                          **kwargs)


def torchvision_advice():
    """The torchvision that fits this torch (2.0 goes with 0.15, 2.1 with 0.16, ...), in words (str)."""
    minor = int(torch.__version__.split(".")[1]) + 15
    return f'pip install "torchvision==0.{minor}.*" from the index that torch came from'


def load_processor(path):
    """AutoProcessor. Where it insists on a video processor, which needs torchvision: the same class without
    one."""
    blind = InputError(f"model {str(path)!r} has no image processor that can be opened; a vision-language "
                       f"model with "
                       "preprocessor_config.json or processor_config.json is needed")
    if Path(path).is_dir() and not list(Path(path).glob("*processor_config.json")):
        raise blind                 # transformers would take its class's defaults, which are not this model's
    broken = (AttributeError, ImportError, KeyError, OSError, RecursionError, TypeError, ValueError)

    def cannot_open(what, error, class_name):
        why = reason(error)
        if re.search("torchvision|video_processor", str(error), re.IGNORECASE):
            why = f"{class_name} needs torchvision; {torchvision_advice()}, or use another model"
        return InputError(f"model {str(path)!r} has {what} that cannot be opened here: {why}")
    try:
        processor = AutoProcessor.from_pretrained(path, **SAFE)
        if hasattr(processor, "image_processor"):
            return processor
    except broken:
        pass        # the attempts below say what is missing, in a sentence
    try:
        AutoImageProcessor.from_pretrained(path, **SAFE)
    except broken as error:
        raise (cannot_open("an image processor", error, "its class") if "torchvision" in str(error)
               else blind) from error
    class_name = None
    try:
        # The class that the files name may differ from the one that belongs to the model's class (Pixtral).
        class_name = ProcessorMixin.get_processor_dict(path)[0].get("processor_class") or \
            ImageProcessingMixin.get_image_processor_dict(path)[0].get("processor_class")
        processor_cls = getattr(transformers, class_name) if class_name else \
            PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(path, **SAFE))]
        # `save_pretrained` writes the name of the class down: it keeps its name.
        return type(processor_cls.__name__, (processor_cls, _ImagesOnly), {}).from_pretrained(path, **SAFE)
    except broken as error:
        raise cannot_open("a processor", error, class_name or "its class") from error


# ------------------------------------------------------------------------------------------------------------
# Does a class work here?

def open_model(path, device, dtype):
    """A directory or hub id -> (model on the device, processor). Raises InputError."""
    if not Path(path).is_dir() and (str(path).startswith((".", "/")) or str(path).count("/") != 1):
        raise InputError(f"model {str(path)!r} is neither a directory nor a hub id of the form owner/name")
    with opening("model", path):
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, use_safetensors=True, **SAFE)
    for p in model.to(device).parameters():
        if p.device.type == "cpu":
            # A weight mapped from a file may lie at an odd address, where kernels sum in another order.
            p.data = p.data.clone()
    with opening("model", path):
        return model, load_processor(path)


def open_meta(path):
    """`open_model` without weights, on the meta device. Of an adapter's folder: the base that it names."""
    while base := lora.base_of(path):
        path = base
    with opening("model", path), torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(path, **SAFE))
    return model, load_processor(path)


def check_meta(vlm):
    """What can be checked without weights: a forward pass, and writing the processor."""
    try:
        trial(vlm)
    except Exception as error:
        raise refusal(vlm.model, error) from error
    with tempfile.TemporaryDirectory() as folder:
        save_processor(vlm, folder)


def trial(vlm):
    """Two pictures and two prompts, encoded -> (images, prompts, inputs). Says on stderr where the chat
    template opens no turn for the answer.

    InputError for a class whose settings or inputs show that it cannot work here; no weight is needed."""
    images = [[Image.new("RGB", (64, 64), "gray")], [Image.new("RGB", (120, 40), "red")]]
    prompts = ["What is this?", "What colour is it?"]
    if vlm.model.config.is_encoder_decoder:
        raise InputError("it is an encoder and a decoder, whose cross-attention looks at the prompt past "
                         "the cache")
    for layer in new_cache(vlm.text_config).layers:
        if not hasattr(layer, "batch_repeat_interleave"):
            raise InputError(f"its cache holds more than keys, values and states ({type(layer).__name__})")
    inputs = vlm.encode(images, prompts)
    if any(value.ndim > 2 and value.shape[:2] == inputs["input_ids"].shape for value in inputs.values()):
        raise InputError("its tokens look at the pictures past the cache, by cross-attention")
    alone = position_ids(vlm.model, vlm.encode(images[1:], prompts[1:]))
    if not torch.equal(alone, position_ids(vlm.model, inputs)[..., 1:, -alone.shape[-1]:]):
        raise InputError("it gives a prompt other positions alone than in a batch")
    turn = vlm.reading.turns([{"type": "text", "text": "?"}])
    opened, closed = (vlm.processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=opens)
                      for opens in (True, False))
    if opened == closed:
        print(f"the chat template of {type(vlm.model).__name__} has no generation prompt: the model opens "
              f"its own turn, after {closed[-20:]!r}; if it was trained otherwise, mend the template",
              file=sys.stderr)
    return images, prompts, inputs


@torch.no_grad()
def check(vlm):
    """Compare the log-probs of prefill, repeated cache and head with those of the model's own `generate`, on
    two pictures.

    InputError for a class that differs. Decides whether samples share their prompt (`vlm.shares_prefix`)."""
    try:
        images, prompts, inputs = trial(vlm)
        inputs = cast_pixels(inputs, vlm.head.weight.dtype)
        outputs = vlm.model.generate(**inputs, max_new_tokens=3, do_sample=False,
                                     cache_implementation="dynamic",
                                     return_dict_in_generate=True, output_logits=True)
        tokens = outputs.sequences[:, inputs["input_ids"].shape[1]:]                           # (2, T)
        logprobs = torch.stack(outputs.logits, 1).float().log_softmax(-1)                      # (2, T, V)
        expected = logprobs.gather(-1, tokens[..., None])[..., 0]                              # (2, T)
        trials = []  # (error, factor, scores)
        for factor in logit_factors(vlm.text_config):
            vlm.logit_factor = factor
            scored = vlm.score(images, prompts, tokens.repeat_interleave(2, 0)).logprobs[::2]
            trials.append(((expected - scored).abs().max().item(), factor, scored))
        _, vlm.logit_factor, scored = min(trials, key=lambda trial: trial[0])
        alone = vlm.score(images[1:], prompts[1:], tokens[1:]).logprobs
        vlm.shares_prefix = vlm.shares_prefix and _decodes_shared(vlm, images, prompts, tokens, expected)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise refusal(vlm.model, error) from error
    for wanted, logprobs, what in ((expected, scored,
                                    "from a repeated cache are off from its own `generate`"),
                                   (alone, scored[1:], "of a prompt alone are off from those in a batch")):
        off = (wanted - logprobs).abs().max().item()
        if not off < tolerance(vlm.model):  # not: nan is refused as well
            raise refusal(vlm.model, f"its log-probs {what} by {off:.2g}; rounding explains at most "
                                     f"{tolerance(vlm.model):g} in "
                                     f"{str(vlm.model.dtype).removeprefix('torch.')}")


def _decodes_shared(vlm, images, prompts, tokens, expected):
    """Whether these tokens (B, T), decoded after a shared prompt, have the expected log-probs (B, T)."""
    state, logprobs = vlm.prefill(images, prompts), []
    state.share(2)
    try:
        with shared_prefix.attention_of(vlm.model.get_decoder()):
            for column in tokens.repeat_interleave(2, 0).unbind(1):
                logprobs.append(vlm.logits(state.hidden).log_softmax(-1).gather(-1, column[:, None]))
                vlm.read(state, column)
    except torch.OutOfMemoryError:
        raise
    except Exception:       # another kind of attention may fail in any way; it is decoded with copies
        return False
    return (torch.cat(logprobs, 1)[::2] - expected).abs().max().item() < tolerance(vlm.model)


def tolerance(model):
    """How far two ways to compute a log-prob may be apart, in nats (float).

    In half precision rounding may send a token between two experts to the other one, which changes its
    log-probs more."""
    if model.dtype == torch.float32:
        return 1e-3
    return 2.0 if experts(model.config.get_text_config())[0] > 1 else 0.5


def experts(config):
    """(experts of a layer, experts that a token passes) of a text config; (1, 1) for a dense model."""
    def setting(*names):
        return next((value for name in names if (value := getattr(config, name, None))), 1)
    return (setting("num_experts", "num_local_experts", "n_routed_experts"),
            setting("num_experts_per_tok", "top_k_experts"))


def active_parameters(model):
    """Parameters that a token passes (int): all of a dense model, of an MoE those of its share of experts."""
    count, used = experts(model.config.get_text_config())
    routed = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    return sum(p.numel() for p in model.parameters()) - routed + routed * used // count


def refusal(model, why):
    """The InputError for a class that cannot work here. why: words, or the error that it failed with."""
    why = reason(why)
    if "no attribute 'video_processor'" in why:
        why = ("its processor needs one for videos, even for pictures, which takes torchvision; "
               + torchvision_advice())
    return InputError(f"model class {type(model).__name__} cannot be used here: {why}")


# ------------------------------------------------------------------------------------------------------------
# What differs between classes

def backbone_of(model):
    """The part of a model below its head, called with inputs by name -> outputs with `last_hidden_state`.
    InputError for a class without a head."""
    if model.get_output_embeddings() is None:
        raise refusal(model, "it has no vocabulary head")
    backbone = getattr(model, "model", None)
    return Headless(model) if backbone is None else backbone


class Headless:
    """The backbone of a class that has none by itself (Llama 4): the whole model, of which what the
    head reads is returned. The head itself sees the last word only."""

    def __init__(self, model):
        self.model, self.forward = model, model.forward         # whose arguments are looked at

    def __call__(self, **inputs):
        read = []

        def keep(_, args):
            read.append(args[0])
            return (args[0][:, -1:],)
        hook = self.model.get_output_embeddings().register_forward_pre_hook(keep)
        try:
            self.model(**inputs)
        finally:
            hook.remove()
        return BaseModelOutput(last_hidden_state=read[0])


def eos_ids(model, tokenizer, template_of=None):
    """The ids that end a completion -> (E,) int64: those of generation_config, the tokenizer's, the
    template's end of turn.

    A checkpoint often names only one of them, and a model that may not sample what its template ends turns
    with never stops.
    template_of: the processor's `apply_chat_template`."""
    ids = model.generation_config.eos_token_id
    ids = [*ids] if isinstance(ids, list) else [ids]
    ids += [tokenizer.eos_token_id, end_of_turn(tokenizer, template_of)]
    if odd := [i for i in ids if i is not None and type(i) is not int]:
        raise refusal(model, f"its eos_token_id {str(odd[0])[:40]!r} is no whole number")
    return torch.tensor(list(dict.fromkeys(i for i in ids if i is not None)))


def end_of_turn(tokenizer, template_of):
    """The special token that a chat template writes after an assistant's words -> its id, or None."""
    try:
        turns = [{"role": role, "content": [{"type": "text", "text": text}]}
                 for role, text in (("user", "a"), ("assistant", "@@"))]
        tail = template_of(turns, tokenize=False).rpartition("@@")[2].lstrip()
    except Exception:           # templates fail in any way on roles that they do not know
        return None
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next((special[token] for token in sorted(special, key=len, reverse=True)
                 if tail.startswith(token)), None)


def banned_ids(model, tokenizer, eos):
    """Ids that must never be sampled -> (V,) bool: all special tokens but EOS, and rows of the head beyond
    the tokenizer. A picture's placeholder in a completion would break the next forward pass."""
    banned = torch.zeros(model.get_output_embeddings().weight.shape[0], dtype=torch.bool, device=eos.device)
    banned[len(tokenizer):] = True
    special = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
    settings = [value if isinstance(value, list | tuple) else [value] for name,
                value in vars(model.config).items()
                if name.endswith(("token_id", "token_ids", "token_index"))]
    from_settings = [i for value in settings for i in value if isinstance(i, int)]
    banned[[i for i in special + from_settings + tokenizer.all_special_ids if i < len(banned)]] = True
    banned[eos] = False
    return banned


def special_token_pattern(tokenizer):
    """A regular expression that matches every special token's text."""
    texts = {*tokenizer.all_special_tokens,
             *(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)}
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)))


def cast_pixels(inputs, dtype):
    """Model inputs by name, pixels in this dtype: not every class casts them itself -> dict."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def position_ids(model, inputs):
    """Position ids of the prompts, by the method that the model's own `generate` uses -> (B, L), or (A, B, L)
    with A axes for multimodal rotary embeddings."""
    return model._prepare_position_ids_for_generation(inputs["input_ids"], dict(inputs))


def logit_factors(config):
    """What a class with this text config may multiply its logits by (list of float); `check` finds out which
    it is."""
    scaling = getattr(config, "logits_scaling",
                      None) or 1.0            # Granite divides by it, HyperCLOVA X multiplies
    others = [getattr(config, name, None) or 1.0 for name in ("output_multiplier", "logit_scale")]
    return list(dict.fromkeys([1.0, 1.0 / scaling, scaling, *others]))


def apply_head(head, hidden):
    """The vocabulary head, (N, D) -> (N, V).

    For a few rows and a real vocabulary MKL takes up to twice as long as oneDNN (`benchmarks/rollout.py`),
    and torch asks oneDNN only for tensors in its layout."""
    weight = head.weight
    if (len(hidden) in FEW_ROWS and weight.numel() >= LARGE_HEAD and not torch.is_grad_enabled()
            and weight.device.type == "cpu" and weight.dtype == torch.float32
            and type(head) is torch.nn.Linear
            and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return torch.nn.functional.linear(hidden.to_mkldnn(), weight, head.bias).to_dense()
    return head(hidden)


def vision_parameters(vlm):
    """The vision tower and what joins it to the language model (list): all but the language model and its
    head."""
    language = {id(p) for module in (vlm.model.get_decoder(), vlm.head) for p in module.parameters()}
    return [p for p in vlm.model.parameters() if id(p) not in language]


# ------------------------------------------------------------------------------------------------------------
# Saving

def save(vlm, path, state=None):
    """Write the model and its processor in Hugging Face form; of an adapted model the adapter alone, unless
    `state` holds merged weights. OSError where it cannot be written.

    state: the weights by name, of any dtype, where the model itself holds only a shard of them."""
    with disk_errors(path):
        if lora.is_adapted(vlm.model) and (state is None or any(".lora_" in name for name in state)):
            lora.save(vlm.model, path, state)
            return save_processor(vlm, path)
        vlm.model.save_pretrained(path, state_dict=state)
    if state is not None:               # transformers has written the dtype of the model's own weights
        dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
        config = Path(path) / "config.json"
        config.write_text(re.sub(r'("(?:torch_)?dtype": )"\w+"', rf'\1"{dtype}"', config.read_text()))
    save_processor(vlm, path)


def save_processor(vlm, path):
    """Write the processor. InputError for a class that cannot be written."""
    try:
        with disk_errors(path):
            vlm.processor.save_pretrained(path)
            # With torchvision, a class opened here without its video processor looks for that one's settings
            # in this file.
            vlm.processor.image_processor.save_pretrained(path)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise refusal(vlm.model, f"its processor cannot be saved ({error})") from error


# ------------------------------------------------------------------------------------------------------------
# Activation checkpointing

def checkpoint_activations(blocks, cache_name):
    """These blocks (modules) keep only their inputs, and run once more in the backward pass of `VLM.score`.

    cache_name: the argument by which a block gets the cache (`VLM.cache_name`)."""
    for block in blocks:
        block.forward = _checkpointed(block, cache_name)


def _checkpointed(block, cache_name):
    """A forward for `block` that keeps its inputs and runs the original one again in the backward pass.

    A decoder layer reads and extends its entry of the cache. The second run must find the entry as it was,
    and must not extend it twice. Each run therefore works on a copy of the entry; the copy's tensors (keys
    and values, or states) leave as outputs, with gradient.
    """
    forward = block.forward
    index = next((module.layer_idx for module in block.modules() if hasattr(module, "layer_idx")), None)

    def checkpointed(*args, **kwargs):
        cache = kwargs.get(cache_name)
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if cache is None:
            return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        before, after = cache.layers[index], []
        tensors = tensors_of(before)

        def run(count, *values):
            layer, scratch = with_tensors(before, dict(zip(tensors, values[:count]))), copy.copy(cache)
            scratch.layers = list(cache.layers)
            scratch.layers[index] = layer
            out = forward(*values[count:], **{**kwargs, cache_name: scratch})
            after.append(layer)
            return out, *tensors_of(layer).values()
        out, *values = checkpoint(run, len(tensors), *tensors.values(), *args, use_reentrant=False,
                                  preserve_rng_state=False)
        cache.layers[index] = with_tensors(after[0], dict(zip(tensors_of(after[0]), values)))
        return out
    return checkpointed
