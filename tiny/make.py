"""Build the offline default: `tiny/base`, `tiny/expert` (Qwen2.5-VL) and `tiny/clip` (CLIP), real classes at toy size.

    python tiny/make.py base            # also: expert, clip; each overwrites its directory, model card included

Base and expert are trained from scratch by next-token prediction on worked solutions of the built-in training questions
(split "train", seed 1000; `train_cdrl.py` draws with its own --seed, 0 by default), and on the prompts of the Expert's
roles. The base stops early and is small: it is meant to be only partly competent. All three are saved in half precision
and open with plain `from_pretrained`.
"""
import argparse
import json
import random
import sys
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    PaddleOCRVLProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
)

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import catts
import data
import eval
import noise
import train_cdrl
from tiny import questions
from utils import cli, judge, replies, tables
from utils.loading import load_processor
from vlm import VLM

SEED = 1000
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
           "<|image_pad|>", "<|video_pad|>"]


# ---------------------------------------------------------------------------------------------------------------------
# What is learned: (image, user turn, reply)

def wrong_answer(sample, rng):
    """A plausible answer that is not the gold one."""
    if sample.answer in questions.COLORS:
        return rng.choice([color for color in questions.COLORS if color != sample.answer])
    gold = int(sample.answer)
    return str(rng.choice([value for value in (gold - 2, gold - 1, gold + 1, gold + 2) if value >= 0]))


def named_cells(sample):
    """[("a1", "red circle"), ...], the whole board in raster order."""
    return [(questions.cell_name((r, c)), what) for r, row in enumerate(sample.meta["rows"])
            for c, what in enumerate(row.split(", "))]


def counted_out(sample):
    """A worked solution that, where it counts, says what stands in every cell and keeps count: place to thing is looked up
    all but without fail, thing to places is a cell or more off in four boards of ten (see results/log.md)."""
    if sample.meta["skill"] != "count":
        return sample.meta["solution"]
    wanted = dict(named_cells(sample))[sample.meta["solution"].split()[1].strip(",")]
    cells, count = [], 0
    for place, what in named_cells(sample):
        count += what == wanted
        cells.append(f"{place} {what} {count}" if what == wanted else f"{place} {what}")
    return f"See {', '.join(cells)}, total {count}. \\boxed{{{sample.answer}}}"


ROLES = ("voter", "critic", "reflect", "planner")


def critique_of(sample, answer):
    """What a Critic who knows the solution says about an answer, in one line (str)."""
    verdict = "correct" if answer == sample.answer else "wrong"
    solution = sample.meta["solution"].split(". \\boxed")[0]
    return f"{solution}. {answer} {verdict}"


def ballot(sample, rng, solution, held):
    """The Voter's last forms: 1 to 8 candidates, near misses and far ones, in one of twelve without the right one; after
    the worked solution each is judged on a line that begins as the prompt's does (in a row they got lost from three on).
    held: and with the answer that was worked out beside it, since a two-digit number was not found equal to one that stood
    further away."""
    gold, width = sample.answer, rng.choice((2, 4, 12))
    near = [str(max(0, int(gold) + by)) for by in range(-width, width + 1)] if gold not in questions.COLORS else []
    pool = near or list(questions.COLORS)
    pool = [value for value in dict.fromkeys(pool) if value != gold]
    candidates = rng.sample(pool, min(len(pool), rng.randint(0, 7)))
    if not candidates or rng.random() > 1 / 12:
        candidates.append(gold)
    rng.shuffle(candidates)
    judged = "\n".join(f"{i}: {answer} {f'for {gold} ' if held else ''}{'correct' if answer == gold else 'wrong'}"
                       for i, answer in enumerate(candidates, 1))
    even = int(100 / len(candidates) * (0.4 if gold in candidates else 1))
    rest = [even + (100 - even * len(candidates)) * (answer == gold) for answer in candidates]
    shown = solution.split(". \\boxed")[0]
    return data.voter_prompt(sample, candidates), f"{shown}.\n{judged}\n{json.dumps([value / 100 for value in rest])}"


def lesson(sample, rng, share, describe=0.0, roles=ROLES, late=False, lines=""):
    """One (user turn, reply). share: of lessons spent on `roles`, drawn evenly; describe: the share that lists the board
    in a random order, place before thing or thing before place: a dozen look-ups a reply, from which a small text model
    learns soonest to find its way among the image tokens; late: as in `practise_roles`, where the Voter works the answer
    out and judges each of 1 to 5 candidates in words before its list, the Critic names the answer that it judges, and
    the base takes over what the critique found without working it out again; lines: "" or the form of its `ballot`: "plain",
    "held", or "counted": held, and both it and plain answers count as in `counted_out`. A critique never does: the base, to
    whom it is shown, was taught on short ones and takes a list of all cells for noise."""
    solution = counted_out(sample) if lines == "counted" else sample.meta["solution"]
    if rng.random() < describe:
        cells = named_cells(sample)
        rng.shuffle(cells)
        if rng.random() < 0.3:
            return "What is where?", "See " + ", ".join(f"{place} {what}" for place, what in cells)
        return "Where is what?", "See " + ", ".join(f"{what} {place}" for place, what in cells if what != "none")
    role = rng.choice(roles) if rng.random() < share else "answer"
    current = sample.answer if rng.random() < 0.5 else wrong_answer(sample, rng)
    shown = sample.meta["solution"].split(". \\boxed")[0]
    verdict = "correct" if current == sample.answer else "wrong"
    critique = critique_of(sample, current) if late else f"{shown}. {verdict}"
    if role == "voter" and lines:
        return ballot(sample, rng, solution, lines != "plain")
    if role == "voter":
        others = (wrong_answer(sample, rng) for _ in range(rng.randint(0, 4) if late else rng.randint(1, 3)))
        candidates = list(dict.fromkeys([sample.answer, *others]))
        rng.shuffle(candidates)
        rest = [int(100 / len(candidates) * 0.4)] * len(candidates)
        rest[candidates.index(sample.answer)] += 100 - sum(rest)
        shares = json.dumps([value / 100 for value in rest])
        judged = ", ".join(f"{answer} {'correct' if answer == sample.answer else 'wrong'}" for answer in candidates)
        return data.voter_prompt(sample, candidates), f"{shown}. {judged}\n{shares}" if late else shares
    if role == "critic":
        return data.critic_prompt(sample, current), critique
    if role == "reflect":
        answer = f"{sample.answer} correct. \\boxed{{{sample.answer}}}" if late else solution
        return data.reflect_prompt(sample, current, critique), answer
    if role == "planner":
        # What the skill suggests: counting profits from a second look, arithmetic from a critique.
        first = {"count": 2, "chart": 2, "digits": 1, "spatial": 0}[sample.meta["skill"]]
        return data.planner_prompt(sample), json.dumps([data.MODULES[(first + i) % 3] for i in range(3)])
    return data.prompt(sample), solution


# ---------------------------------------------------------------------------------------------------------------------
# Processor and models

def build_processor(vocabulary=480):
    """Byte-level BPE learned from the lessons (any text can be encoded), Qwen's special tokens and image processor.

    The processor class is one of transformers' own that handles images only: `Qwen2_5_VLProcessor` insists on a video
    processor, which needs torchvision.
    """
    rng = random.Random(SEED)
    corpus = []
    for index in range(4000):
        sample = data.synthetic("train", SEED, index)
        corpus += [*lesson(sample, rng, 0.5, 0.2), *lesson(sample, rng, 0.0)]
    tokenizer = Tokenizer(models.BPE())
    # Digits one by one, so that numbers are read and added digit by digit; the cells' names whole; with leading blank.
    words = Regex(r" ?\b[a-d][1-4]\b| ?\d| ?\p{L}+| ?[^\s\p{L}\d]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left",
        chat_template=CHAT_TEMPLATE, model_max_length=4096,
        extra_special_tokens={"image_token": "<|image_pad|>", "vision_start": "<|vision_start|>",
                              "vision_end": "<|vision_end|>", "im_start": "<|im_start|>",
                              "vision_pad": "<|vision_pad|>", "video_pad": "<|video_pad|>"})
    images = Qwen2VLImageProcessor(patch_size=14, merge_size=2, temporal_patch_size=2, min_pixels=56 * 56,
                                   max_pixels=224 * 224)
    return PaddleOCRVLProcessor(images, fast, chat_template=CHAT_TEMPLATE)


# How each checkpoint is made; the base is stopped early on purpose.
RECIPES = {"base": dict(see_steps=300, steps=2600, weights=(1.5, 0.58, 0.53, 0.62)),
           "expert": dict(see_steps=300, steps=3000), "clip": dict(steps=2800)}
LAST = {"base": [dict(steps=500, share=0.75, roles=("reflect",) * 7 + ("voter", "critic", "planner"),
                      weights=(1.5, 0.58, 0.53, 0.62))],
        "expert": [dict(steps=1300, share=0.92, roles=("voter",) * 6 + ("critic",) * 4 + ("planner",)),
                   dict(steps=2500, share=0.6, roles=("voter",) * 6 + ("critic",) * 4 + ("planner",), lines="plain",
                        weights=(2.2, 0.6, 0.7, 1.0)),
                   dict(steps=1000, share=0.75, roles=("voter",) * 7 + ("critic",) * 4 + ("planner",), lines="held",
                        weights=(2.2, 0.6, 0.7, 1.0)),
                   dict(steps=800, share=0.8, roles=("voter",) * 6 + ("critic",) * 4 + ("planner",), lines="counted",
                        weights=(2.6, 0.45, 0.5, 0.8))]}
SHAPE = {"base": dict(vision=96, text=128, layers=3), "expert": dict(vision=128, text=192, layers=4)}


def build_model(processor, vision, text, layers):
    """A random Qwen2.5-VL of the given widths. Init std 0.06: at 0.02 a small ViT does not start learning."""
    ids = processor.tokenizer.convert_tokens_to_ids
    heads = text // 32
    config = Qwen2_5_VLConfig(
        text_config=dict(vocab_size=len(processor.tokenizer), hidden_size=text, intermediate_size=3 * text,
                         num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads // 2,
                         max_position_embeddings=4096, tie_word_embeddings=True, initializer_range=0.06,
                         bos_token_id=None, eos_token_id=ids("<|im_end|>"), pad_token_id=ids("<|endoftext|>"),
                         rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}),
        vision_config=dict(depth=layers, hidden_size=vision, intermediate_size=2 * vision, num_heads=vision // 32,
                           patch_size=14, spatial_merge_size=2, temporal_patch_size=2, window_size=112,
                           out_hidden_size=text, fullatt_block_indexes=list(range(layers)), initializer_range=0.06),
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True, initializer_range=0.06)
    model = Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():
        # Image tokens of the size of word embeddings, or the text model's layers cannot move them.
        model.model.visual.merger.mlp[-1].weight.mul_(0.03)
    model.generation_config.eos_token_id = ids("<|im_end|>")
    model.generation_config.pad_token_id = ids("<|endoftext|>")
    return model


def encode(processor, lessons, images):
    """Lessons -> model inputs with labels on the replies (EOS included, padding excluded)."""
    tokenizer = processor.tokenizer
    prompts, texts = [], []
    for user, reply in lessons:
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": user}]}]
        prompts.append(processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        texts.append(reply + tokenizer.eos_token)
    inputs = processor(text=[p + t for p, t in zip(prompts, texts)], images=images, return_tensors="pt", padding=True)
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, text in enumerate(texts):
        reply = tokenizer(text, add_special_tokens=False)["input_ids"]
        labels[row, -len(reply):] = torch.tensor(reply)    # left padding: the reply ends the row
    return inputs, labels


def see(model, processor, steps, rng, batch_size=64, lr=1e-3):
    """First stage: each merged patch learns to say what stands in its cell, and the cell's name, in the language model's
    own word embeddings. A small ViT that starts from text alone needs hours to begin to see, and the text model as long
    to find out that its image tokens mean anything."""
    embedding = model.get_input_embeddings()
    parameters = [*model.model.visual.parameters(), *embedding.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    words = lru_cache(None)(lambda text: processor.tokenizer(text)["input_ids"])
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100, 2.5 * (1 - step / steps))
        samples = [data.synthetic("train", SEED, rng.randrange(10**9)) for _ in range(batch_size)]
        inputs = processor.image_processor([s.images[0] for s in samples], return_tensors="pt")
        cells = model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output   # (B*16, D)
        # x 10: logits of the usual size from features of the size of word embeddings
        logp = (10 * cells @ embedding.weight.T).log_softmax(-1)                                              # (B*16, V)
        named = [words(f" {name} {what}") for s in samples for name, what in named_cells(s)]
        loss = -torch.stack([logp[i, ids].mean() for i, ids in enumerate(named)]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if (step + 1) % 50 == 0:
            is_named = [set(logp[i].topk(len(ids)).indices.tolist()) == set(ids) for i, ids in enumerate(named) if len(ids) > 2]
            print(f"see {step + 1} loss {loss.item():.3f} cells named right {np.mean(is_named):.2f}", flush=True)


def study(model, processor, optimiser, samples, lessons):
    """One optimisation step on a batch of lessons -> its loss (float)."""
    inputs, labels = encode(processor, lessons, [s.images[0] for s in samples])
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad()
    return loss.item()


def draw(rng, weights, size):
    """Training questions, the skills drawn by weight (list of Sample)."""
    return [data.synthetic("train", SEED, rng.randrange(10**9) * 4 + rng.choices(range(4), weights)[0]) for _ in range(size)]


def warm_up(name, see_steps, steps, weights=(1, 1, 1, 1), batch_size=32, lr=2e-3, share=0.3):
    """The first stages of base or expert. weights: how often each skill is drawn; share: of the roles' lessons at the end
    (they come in gradually, as the describing lessons leave)."""
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    processor = build_processor()
    model = build_model(processor, **SHAPE[name])
    print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(processor.tokenizer)} tokens")
    see(model, processor, see_steps, rng)
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    start = time.time()
    for step in range(steps):
        done = step / steps
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100, 2.5 * (1 - done))
        samples = draw(rng, weights, batch_size)
        # First look-ups by the dozen on a vision tower that stands still, then questions, then roles as well.
        model.model.visual.requires_grad_(done > 0.2)
        lessons = [lesson(s, rng, share * min(1, 2 * done), 0.9 if done < 0.15 else 0.25 * (1 - done)) for s in samples]
        loss = study(model, processor, optimiser, samples, lessons)
        if (step + 1) % 100 == 0:
            print(f"step {step + 1} loss {loss:.3f} {time.time() - start:.0f}s", flush=True)
        if (step + 1) % 500 == 0:
            save(model, processor, HERE / name)
    save(model, processor, HERE / name)


def practise_roles(name, stage, steps, roles, weights=(1, 1, 1, 1), share=0.9, lines="", batch_size=32, lr=1e-3):
    """A last stage, from the saved checkpoint: a share of the lessons is roles, in the `late` form. The Expert practises its
    own three, and in later stages counting, which it did worst, and ballots in lines, at the end with every cell written
    out; the base above all to take over what a critique has seen. weights: of the skills, as in `warm_up`; lines: see
    `lesson`."""
    torch.manual_seed(SEED)
    rng = random.Random(f"roles {SEED}{f' {stage}' if stage else ''}")
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(HERE / name, dtype=torch.float32).train()
    processor = load_processor(HERE / name)
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 50, 1.5 * (1 - step / steps))
        samples = draw(rng, weights, batch_size)
        loss = study(model, processor, optimiser, samples, [lesson(s, rng, share, roles=roles, late=True,
                                                                 lines=lines) for s in samples])
        if (step + 1) % 50 == 0:
            print(f"roles {step + 1} loss {loss:.3f}", flush=True)
    save(model, processor, HERE / name)


# ---------------------------------------------------------------------------------------------------------------------
# CLIP: where is what the question asks about?

def build_clip():
    """A random CLIPModel with 8 x 8 patches, its tokenizer and its image processor."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # CLIPModel pools at the highest token id when the EOS id is 2, a relic; any other id pools at EOS.
    special = ["<|pad|>", "<|startoftext|>", "<|unused|>", "<|endoftext|>"]
    corpus = [data.ask(data.synthetic("train", SEED, index)) for index in range(2000)]
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=360, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>", special_tokens=[("<|startoftext|>", 1), ("<|endoftext|>", 3)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|startoftext|>", eos_token="<|endoftext|>",
                                   pad_token="<|pad|>", model_max_length=77)
    side = questions.CELL * questions.GRID
    images = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    config = CLIPConfig(
        text_config=dict(vocab_size=len(fast), hidden_size=96, intermediate_size=192, num_hidden_layers=2,
                         num_attention_heads=4, max_position_embeddings=77, bos_token_id=1, eos_token_id=3,
                         pad_token_id=0, projection_dim=96),
        vision_config=dict(hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
                           image_size=side, patch_size=14, projection_dim=96),
        projection_dim=96)
    config._attn_implementation = "eager"         # attention weights are trained on, sdpa does not return them
    return CLIPModel(config), images, fast


def evidence_patches(sample, patch=14):
    """(P,) float: 1 on the patches that hold the evidence of a built-in question."""
    side = questions.CELL * questions.GRID // patch
    grid = torch.zeros(side, side)
    for left, top, right, bottom in sample.meta["evidence"]:
        grid[top // patch:bottom // patch, left // patch:right // patch] = 1
    return grid.flatten()


def warm_up_clip(name, steps, batch_size=64, lr=1e-3):
    """Contrastive learning of (picture, question), and two dense losses against the evidence's patches: the similarity
    of patch and question, and the map that `noise.ClipAttention` makes of similarity and class-token attention."""
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    model, images, tokenizer = build_clip()
    print(f"clip: {sum(p.numel() for p in model.parameters()):,} parameters")
    scale, bias = torch.nn.Parameter(torch.tensor(10.0)), torch.nn.Parameter(torch.tensor(-2.0))
    parameters = [*model.parameters(), scale, bias]
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    start = time.time()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100, 2.5 * (1 - step / steps))
        samples = [data.synthetic("train", SEED, rng.randrange(10**9)) for _ in range(batch_size)]
        pixels = images([s.images[0] for s in samples], return_tensors="pt")["pixel_values"]
        text = tokenizer([s.question for s in samples], padding=True, padding_side="right", return_tensors="pt")
        vision = model.vision_model(pixels, output_attentions=True)
        patches = model.visual_projection(model.vision_model.post_layernorm(vision.last_hidden_state[:, 1:]))
        queries = model.text_projection(model.text_model(input_ids=text["input_ids"], attention_mask=text["attention_mask"])
                                      .pooler_output)
        pooled = model.visual_projection(vision.pooler_output)
        logits = model.logit_scale.exp() * torch.nn.functional.normalize(pooled, dim=-1) @ torch.nn.functional.normalize(
            queries, dim=-1).T
        target = torch.arange(batch_size)
        contrastive = (torch.nn.functional.cross_entropy(logits, target)
                       + torch.nn.functional.cross_entropy(logits.T, target)) / 2
        similarity = torch.cosine_similarity(patches, queries[:, None], dim=-1)                       # (B, P)
        evidence = torch.stack([evidence_patches(s) for s in samples])                              # (B, P)
        dense = torch.nn.functional.binary_cross_entropy_with_logits(scale * similarity + bias, evidence)
        low, high = similarity.amin(-1, keepdim=True), similarity.amax(-1, keepdim=True)
        weights = vision.attentions[-1][:, :, 0, 1:].mean(1) * (similarity - low) / (high - low).clamp(min=1e-9)
        share = weights / weights.sum(-1, keepdim=True)
        mass = (share * evidence).sum(-1)
        # Cross-entropy to the evidence spread evenly: the map must cover all of it, not one telling corner.
        cover = -(evidence * (share + 1e-6).log()).sum(-1) / evidence.sum(-1)
        loss = 0.3 * contrastive + dense + cover.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1} contrastive {contrastive.item():.2f} dense {dense.item():.3f} evidence mass "
                  f"{mass.mean().item():.3f} {time.time() - start:.0f}s", flush=True)
    save_clip(model, images, tokenizer)


def save_clip(model, images, tokenizer):
    half = {key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    for piece, options in ((model, {"state_dict": half}), (images, {}), (tokenizer, {})):
        piece.save_pretrained(HERE / "clip", **options)


def save(model, processor, directory):
    half = {key: value.to(torch.bfloat16) for key, value in model.state_dict().items()}
    model.save_pretrained(directory, state_dict=half)
    processor.save_pretrained(directory)


# ---------------------------------------------------------------------------------------------------------------------
# Model cards, measured

CARD = """# tiny/{name}

{what} Built by `python tiny/make.py {name}` (seed {seed}, {recipe}; CPU, fp32); the script says how.
Meant for offline runs, tests and teaching: it knows the built-in pictures and nothing else.

{how}

```
{table}
```
"""
WHAT = {"base": "A Qwen2_5_VLForConditionalGeneration of 1.2 million parameters, stored in bf16: the model that CDRL trains.",
        "expert": "A Qwen2_5_VLForConditionalGeneration of 3.0 million parameters, stored in bf16: the Expert of CA-TTS.",
        "clip": "A CLIPModel of 0.5 million parameters, stored in fp16: it finds the key regions."}
HOW_ROLES = """The same questions, greedy. alone: its own answer is right; on ballot: one of those in the base's 8 samples is;
Voter: of those ballots, the share in which its highest probability goes to a right answer; Critic: its verdict on the
first of them is right."""
HOW_LANGUAGE = """240 questions of the built-in `val` split, 8 answers each at T = 1; the last two columns under noise, t = 999,
on the key region (attention mass {mass:g}) and on a random region of the same area."""
HOW_CLIP = """240 questions of the built-in `val` split: the share of the question-guided map that lies on the evidence, and
the evidence's share of the picture."""


def roles_of(model, samples):
    """How well the Expert plays its roles -> {skill: columns}, see HOW_ROLES."""
    base, pictures = VLM.load(HERE / "base"), [s.images for s in samples]
    groups = base.sample(pictures, [data.prompt(s) for s in samples], n=8, max_new_tokens=64)
    answers = [list(dict.fromkeys(a for r in group if (a := judge.extract_answer(r.text)) is not None)) or ["none"]
               for group in groups]

    def says(prompts):
        return [r.text for r, in model.sample(pictures, prompts, greedy=True)]
    verdicts = {"alone": [judge.is_correct(text, s) for text, s in zip(says([data.prompt(s) for s in samples]), samples)],
             "on ballot": [any(judge.accepts(a, s) for a in ballot) for ballot, s in zip(answers, samples)]}
    ballots = says([data.voter_prompt(s, ballot) for s, ballot in zip(samples, answers)])
    critiques = says([data.critic_prompt(s, ballot[0]) for s, ballot in zip(samples, answers)])
    verdicts["Voter"] = []
    for text, ballot, s in zip(ballots, answers, samples):
        try:
            verdicts["Voter"].append(judge.accepts(ballot[int(np.argmax(replies.parse_probabilities(text, len(ballot))))], s))
        except ValueError:
            verdicts["Voter"].append(False)
    verdicts["Critic"] = [text.strip().endswith("correct") == judge.accepts(ballot[0], s)
                       for text, ballot, s in zip(critiques, answers, samples)]
    columns = {key: np.array(values, float) for key, values in verdicts.items()}
    skills = np.array([s.meta["skill"] for s in samples])
    columns["Voter"][columns["on ballot"] == 0] = np.nan
    return {skill: {key: float(np.nanmean(values[(skills == skill) | (skill == "all")])) for key, values in columns.items()}
            for skill in ("all", *questions.SKILLS)}


def write_card(name, count=240):
    """Measure a checkpoint on the val split, skill by skill, and write its README.md."""
    samples = list(data.load("synthetic", "val", count))
    clip, mass = noise.ClipAttention.from_pretrained(HERE / "clip"), train_cdrl.Args.mass
    skills = {"all": samples, **{skill: [s for s in samples if s.meta["skill"] == skill] for skill in questions.SKILLS}}
    if name == "clip":
        overlaps = {s.id: on_evidence(clip.map(s.images[0], s.question), s) for s in samples}
        rows = {skill: {"map on evidence": float(np.mean([overlaps[s.id][0] for s in of_skill])),
                        "area of evidence": float(np.mean([overlaps[s.id][1] for s in of_skill]))} for skill, of_skill in skills.items()}
    else:
        model = VLM.load(HERE / name)
        longest = train_cdrl.Args.max_new_tokens if name == "base" else catts.Settings.expert_tokens
        clean = eval.answer(model, samples, [s.images for s in samples], 8, max_new_tokens=longest)
        noised = {mode: eval.probe(model, samples, clip, (999,), mode, mass, 8, max_new_tokens=longest)[999]
                  for mode in ("key", "random")}
        rows = {}
        for skill, of_skill in skills.items():
            ids = {s.id for s in of_skill}
            rows[skill] = tables.headroom([a for a in clean if a.id in ids]) | {
                f"pass@1, {mode}": float(np.mean([a.correct for a in answers if a.id in ids]))
                for mode, answers in noised.items()}
    how = HOW_CLIP if name == "clip" else HOW_LANGUAGE.format(mass=mass)
    text = cli.table(rows)
    if name == "expert":
        text += f"\n```\n\n{HOW_ROLES}\n\n```\n{cli.table(roles_of(model, samples))}"
    (HERE / name / "README.md").write_text(CARD.format(
        name=name, what=WHAT[name], seed=SEED, how=how, table=text,
        recipe=", ".join(f"{key} {value}" for key, value in RECIPES[name].items())
        + "".join(f"; then {stage['steps']} steps of roles" for stage in LAST.get(name, []))))
    print((HERE / name / "README.md").read_text())


def on_evidence(attention, sample):
    """(share of the map on the evidence, the evidence's share of the area)."""
    inside = np.zeros(attention.shape, bool)
    for left, top, right, bottom in sample.meta["evidence"]:
        inside[top:bottom, left:right] = True
    return attention[inside].sum(), inside.mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("--card", action="store_true", help="measure the checkpoint that is there; train nothing")
    parser.add_argument("--roles", type=int, metavar="STAGE", help="only the last stages, from this one on (0 to 3), from the "
                        "checkpoint that is there")
    args = parser.parse_args()
    stages = LAST.get(args.name, [])
    if args.roles is not None and not 0 <= args.roles < len(stages):
        raise cli.InputError(f"--roles is {args.roles}; {args.name} has {len(stages)} such stages, counted from 0")
    if not args.card:
        if args.roles is None:
            (warm_up_clip if args.name == "clip" else warm_up)(args.name, **RECIPES[args.name])
        for stage, settings in list(enumerate(stages))[args.roles or 0:]:
            practise_roles(args.name, stage, **settings)
    write_card(args.name)


if __name__ == "__main__":
    cli.command("tiny/make.py", main)
