"""CDRL: reinforcement learning that ties confidence to perception (paper 3.2), with GRPO written by hand.

    torchrun train_cdrl.py                                # the built-in model and questions; minutes on two CPU cores
    torchrun train_cdrl.py --recipe paper                 # the paper's objective; `grpo`: no confidence at all
    torchrun --nproc-per-node 8 train_cdrl.py --model Qwen/Qwen2.5-VL-7B-Instruct --lr 1e-6 \
        --clip openai/clip-vit-large-patch14-336 --data train.jsonl --max_new_tokens 1024 --output runs/qwen7b

One step: draw questions; noise their key regions; roll out G answers on the original and on the noised picture; read
confidences C and C'; reward; advantages within the group; clipped policy gradient, and the reward's gradient through the
confidence itself beside it (`--pathwise`). The run folder holds args.json, metrics.jsonl, samples.jsonl, checkpoints,
before.json and after.json, report.png, and the final model. The same command resumes a run that was stopped.

The defaults are the row `ours` of "The recipes" in results/README.md; how they were chosen is in the log there. `--recipe
paper` and `grpo` are the rows of that name.

Left out of GRPO on purpose: a reference model unless --kl_beta is set (the paper's T = 1 on-policy setting does not need
it), stored old log-probs unless --mu is above 1. On GPUs: bf16 with fp32 weights beside it; --shard fsdp, --offload and
--activation_checkpointing for models that do not fit, --dry_run to know before (`parallel.py`, `plan.py`).
"""
import argparse
import json
import math
import random
import signal
import sys
import time
from dataclasses import asdict, dataclass, field

import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import data
import eval
import noise
import reward
from data import open_data
from reward import KINDS, confidence_reward, group_advantages, measure_scale, outcomes, set_apart, token_values
from utils import cli, distributed, memory, metrics, tables
from utils.batches import Order, micro_batches, questions_of
from utils.checkpoint import load_checkpoint, open_run, save_checkpoint
from utils.cli import TINY, InputError, add_options, command, option
from utils.distributed import gathered, summed
from utils.logs import log_row, statistics, trim_log, write_json, write_step
from utils.report import draw_report
from vlm import VLM, load_model

PROBE_SAMPLES = 4               # answers to each held-out question, before and after
TIED = 0.1                      # a mean spread of rewards below it is that of a batch of ties


@dataclass
class Args:
    """Every setting of a run. The defaults are the recipe `ours`; RECIPES holds what the others change."""
    # What is trained, on what, where it goes
    model: str = option(str(TINY / "base"), "model directory or hub id")
    clip: str = option(noise.CLIP, "CLIPModel directory or hub id, finds the key regions")
    clip_cache: str = option("", "folder that keeps its maps for further epochs and runs; empty: none is kept")
    data: str = option("synthetic", "'synthetic' or a .jsonl file; a share of a file is held out for the table")
    output: str = option("", "run folder; default runs/cdrl, or runs/RECIPE for another recipe")
    recipe: str = option("ours", "a group of settings; an explicit flag wins", ("ours", "paper", "grpo"))
    resume: str = option("auto", "auto: go on where the run folder stopped; no: move an earlier run aside", ("auto", "no"))
    seed: int = option(0, "decides questions, noise and samples")
    # Scale
    steps: int = option(500, "optimisation steps")
    batch_size: int = option(32, "questions a step, over all ranks")
    group_size: int = option(4, "rollouts a question on each view, G (the paper: 4 pairs)")
    micro_batch: int = option(8, "questions a forward pass when learning; less saves memory, the gradient is the same")
    micro_tokens: int = option(0, "and at most so many tokens, prompts and all completions on each view, padding "
                               "included; 0 = no limit")
    max_new_tokens: int = option(64, "longest completion")
    save_every: int = option(20, "steps between checkpoints")
    keep: int = option(2, "newest checkpoints that stay")
    eval_size: int = option(200, "held-out questions for the table before and after; 0 = no table")
    # Memory and ranks
    dtype: str = option("auto", "of the computation, auto: bfloat16 on a GPU, else float32; weights stay float32 beside it",
                        ("auto", "float32", "bfloat16"))
    shard: str = option("auto", "fsdp: each rank holds a share of weights, gradients and optimiser state; none: all of it; "
                        "auto: fsdp where all of it is over half of a GPU's memory", ("auto", "none", "fsdp"))
    offload: bool = option(False, "weights, gradients and optimiser state wait in the CPU's memory")
    activation_checkpointing: str = option("auto", "run each block again in the backward pass instead of holding what it "
                                           "computed; auto: above 1e9 parameters", ("auto", "on", "off"))
    freeze_vision: bool = option(False, "train the language model and its head only")
    dry_run: bool = option(False, "print parameters, tokens and memory, and stop; refuses what cannot fit")
    memory: float = option(0.0, "GiB of a device for --dry_run and --shard auto; 0 = what the GPU says")
    # Optimisation (paper 3.2; DAPO, Dr. GRPO for the alternatives)
    lr: float = option(3e-4, "learning rate of AdamW, reached after 5 steps; 1e-6 suits a 7B model")
    lr_schedule: str = option("linear", "linear: it falls to 0 over --steps; constant", ("linear", "constant"))
    max_grad_norm: float = option(1.0, "gradient norm is clipped here")
    temperature: float = option(1.0, "of sampling; the log-probs of the loss are divided alike")
    mu: int = option(1, "updates on the same rollouts")
    clip_low: float = option(0.2, "the probability ratio is clipped below 1 - clip_low")
    clip_high: float = option(0.28, "and above 1 + clip_high")
    adv_norm: str = option("none", "divide advantages by the group's std, or not (Dr. GRPO)", ("std", "none"))
    loss_norm: str = option("token", "mean over the batch's tokens (DAPO), or over sequences", ("token", "sequence"))
    truncated: str = option("keep", "completions cut at max_new_tokens: keep them in the loss, or mask", ("keep", "mask"))
    kl_beta: float = option(0.0, "weight of the KL to the starting model (k3); 0 loads no reference")
    # Image pairs (paper 3.2.1)
    noise_t: str = option("999", "diffusion step 0 to 1000, or a range such as 500-999 to draw from")
    region: str = option("key", "where the noise goes", noise.MODES)
    mass: float = option(0.5, "share of CLIP's attention that the key region holds")
    pairs: float = option(0.5, "share of a step's questions, rounded up, that are asked on a noised picture as well; 1 = the "
                          "paper")
    controls: float = option(0.3, "share of those whose noise goes on a random region of the same area instead: no "
                             "perception term there, so that C learns to fall with the evidence, not with noise")
    reflect: float = option(0.0, "share of questions asked with an earlier answer and a critique of it, right or wrong, no "
                            "perception term there, so that Self-Reflection is not unlearned")
    text_guidance: bool = option(True, "the question guides CLIP's attention")
    noised: str = option("rollout", "C' from rollouts on the noised picture (paper), or from scoring the same words there",
                         ("rollout", "rescore"))
    # Reward (paper Eq. 4)
    confidence: str = option("topk", "C of the perception term: Eq. 3, or mean log-prob, or minus mean entropy", KINDS)
    judged: str = option("topk", "the confidence that the calibration term judges", KINDS)
    alpha: float = option(0.12, "weight of the perception term tanh(beta (C - C')); 0 = no term")
    beta: float = option(0.5, "its steepness, per nat")
    cnorm: str = option("range", "scale of C in the linear term: the base's 5th-95th percentile, or the group's min-max",
                        ("range", "group"))
    calibration: str = option("log", "calibration term: the paper's linear one, a proper score of a probability, none",
                              ("linear", "brier", "log", "none"))
    probability: str = option("sigmoid", "that probability: sigmoid(aC + b), fitted on the base once; exp(C), of logprob "
                              "or entropy", ("sigmoid", "exp"))
    scale_questions: int = option(256, "of the first steps; the base's answers to them on both views give the scale of C and "
                                  "that map; from few, its slope is a matter of luck")
    steepness: float = option(1.6, "that map is made so many times steeper, about c = .5: the model has to move C less, and "
                              "flattens less of what it samples from, to say the same; 1 = as fitted")
    learn_noised: bool = option(True, "rollouts on the noised picture get a reward and a gradient of their own")
    noised_policy: float = option(0.0, "weight of their policy gradient beside the original's; 0: they teach through their "
                                  "confidence alone, since a policy gradient there teaches to guess")
    pathwise: float = option(3.5, "weight of the gradient through C itself; 1 = exact with --adv_norm none, 0 = the paper")
    within: float = option(4.0, "in the calibration term's part of that gradient, what sets an answer's C apart from the other "
                           "answers' to its question weighs so many times more; 1 = exact")


RECIPES = {
    "ours": {},
    "paper": dict(alpha=0.5, beta=1.0, cnorm="group", calibration="linear", learn_noised=False, noised_policy=1.0,
                  pathwise=0.0, within=1.0, pairs=1.0, controls=0.0, adv_norm="std", lr=1e-4, steepness=1.0),
    "grpo": dict(alpha=0.0, calibration="none", learn_noised=False, pathwise=0.0, within=1.0, pairs=1.0,
                 controls=0.0, adv_norm="std", steepness=1.0),
}


def parse(argv=None):
    """Command line -> Args: defaults, then the recipe, then explicit flags."""
    parser = argparse.ArgumentParser(description="Train CDRL.", argument_default=argparse.SUPPRESS)
    add_options(parser, Args)
    given = vars(parser.parse_args(argv))
    recipe = given.get("recipe", Args.recipe)
    args = Args(**{**RECIPES[recipe], **given})
    args.output = args.output or f"runs/{'cdrl' if recipe == 'ours' else recipe}"
    return args


def check(args, world):
    """Refuse settings that cannot work, each in one sentence."""
    for name, value in asdict(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"--{name} is {value}; a finite number is expected")
    if abs(args.seed) >= 2**63:
        raise InputError(f"--seed is {args.seed}; it must fit into 64 bits")
    if args.clip_low > 1:
        raise InputError(f"--clip_low is {args.clip_low}; the ratio's lower bound 1 - clip_low must not be negative")
    for name in ("steps", "batch_size", "micro_batch", "max_new_tokens", "save_every", "keep", "mu", "scale_questions"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    for name in ("lr", "temperature", "beta", "max_grad_norm", "steepness", "pairs"):
        if not getattr(args, name) > 0:
            raise InputError(f"--{name} is {getattr(args, name)}; it must be above 0")
    for name in ("alpha", "kl_beta", "pathwise", "within", "noised_policy", "eval_size", "clip_low", "clip_high",
                 "micro_tokens", "memory"):
        if not getattr(args, name) >= 0:
            raise InputError(f"--{name} is {getattr(args, name)}; it must not be negative")
    if args.group_size < 2:
        raise InputError(f"--group_size is {args.group_size}; a group needs at least 2 rollouts to compare")
    if args.batch_size % world:
        raise InputError(f"--batch_size {args.batch_size} does not divide over {world} ranks; use a multiple of {world}")
    if needs_noised(args) and twins_of(args.pairs, args.batch_size) < world:
        raise InputError(f"--pairs {args.pairs:g} of --batch_size {args.batch_size} leaves some of the {world} ranks without a "
                         "noised question; raise either")
    if args.lr > 1e30:
        raise InputError(f"--lr is {args.lr:g}; AdamW moves every weight by about as much a step, 1e-6 suits a 7B model")
    if not 0 < args.mass <= 1:
        raise InputError(f"--mass is {args.mass}; a number above 0 and at most 1 is expected")
    for name in ("pairs", "controls", "reflect"):
        if not 0 <= getattr(args, name) <= 1:
            raise InputError(f"--{name} is {getattr(args, name)}; a share from 0 to 1 is expected")
    if args.probability == "exp" and args.judged == "topk" and args.calibration in ("brier", "log"):
        raise InputError("--probability exp of --judged topk is no probability; judge logprob or entropy, or use sigmoid")
    if args.learn_noised and args.noised == "rescore":
        raise InputError("--noised rescore has no rollouts on the noised picture to learn from; add --no-learn_noised")
    noise.parse_t(args.noise_t)


def check_prompts(vlm, samples, max_new_tokens, progress, reflect=False):
    """Before training: the questions' pictures open, every prompt and its completion fit the model's context. Else
    InputError that names the question: a truncated prompt would cut image tokens."""
    for sample in tqdm(samples, desc="checking questions", unit="question", leave=False, disable=not progress or not samples):
        text = with_critique(sample, data.golds(sample)[0]) if reflect else data.prompt(sample)
        length = vlm.prompt_length(sample.pictures(), text)
        if length + max_new_tokens > vlm.context:
            raise InputError(f"question {sample.id!r} takes {length} tokens and --max_new_tokens {max_new_tokens} more, but "
                             f"the model's context is {vlm.context}; shorten it, shrink its images, or remove it")


def rollout_confidence(groups, kind):
    """Q lists of G rollouts -> C (Q, G), paper Eq. 3: the mean over generated tokens, EOS included."""
    flat = [r for group in groups for r in group]
    values = pad_sequence([token_values(r, kind) for r in flat], batch_first=True)              # (Q*G, T)
    mask = pad_sequence([torch.ones(len(r.tokens)) for r in flat], batch_first=True).bool()
    return reward.sequence_confidence(values, mask).view(len(groups), -1)


def scored_confidence(scores, args, group_size):
    """Scores (Q*G, T) -> the confidences of --confidence and of --judged, (Q, G) each, with gradient."""
    return tuple(reward.sequence_confidence(token_values(scores, kind), scores.mask).view(-1, group_size)
                 for kind in (args.confidence, args.judged))


@dataclass
class View:
    """One side of the image pairs in a step: Q questions, G rollouts each, and what they earned. The noised one's are the
    first of the original's (`--pairs`)."""
    name: str                       # "original" or "noised"
    images: list                    # Q lists of PIL images
    rollouts: list                  # Q lists of G Rollouts (the original's words when --noised rescore)
    confidence: torch.Tensor        # (Q, G), of --confidence
    judged: torch.Tensor            # (Q, G), of --judged
    correct: torch.Tensor           # (Q, G)
    learns: bool                    # it has a policy gradient
    control: torch.Tensor           # bool, pairs without a perception term (--controls, --reflect); the same for both views
    terms: dict = field(default_factory=dict)        # reward terms by name, (Q, G) each
    advantages: torch.Tensor | None = None           # (Q, G)
    spread: float = 1.0             # the mean, over the batch's groups, of what advantages were divided by
    old_logprobs: dict = field(default_factory=dict)         # by first question of the micro-batch, for mu > 1


def policy_loss(logprobs, old_logprobs, advantages, clip_low, clip_high):
    """-min(ratio A, clip(ratio) A) per token: (B, T), (B, T), (B, 1) -> (B, T), and the share of clipped ratios (B, T)."""
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio * advantages, clipped * advantages), (ratio != clipped).float()


def kl_k3(logprobs, reference):
    """KL(policy || reference) by the k3 estimator, per token: exp(d) - d - 1 >= 0 with d = reference - policy."""
    difference = reference - logprobs
    return difference.exp() - difference - 1


def weights_of(mask, args):
    """What a token, and its sequence's confidence, weigh before the division by the batch: (B, T) and (B,).

    token: 1 each. sequence: 1/length, so that each sequence counts once. The policy gradient of a sequence's reward then
    carries this weight on each log-prob; the pathwise term of the same reward carries it once.
    """
    per_sequence = 1 / mask.sum(-1).clamp(min=1) if args.loss_norm == "sequence" else torch.ones(len(mask), device=mask.device)
    return mask * per_sequence[:, None], per_sequence


def used_mask(rollouts, args):
    """Which rollouts the loss uses, flat list -> (B,) bool."""
    return torch.tensor([r.finished or args.truncated == "keep" for r in rollouts])


def batch_weight(views, args, device):
    """The divisor of the loss, summed over ranks: tokens (token mean) or sequences (sequence mean) that learn."""
    total = 0
    for view in views:
        flat = [r for group in view.rollouts for r in group]
        if view.learns:
            used = used_mask(flat, args).tolist()
            total += sum((len(r.tokens) if args.loss_norm == "token" else 1) for r, u in zip(flat, used) if u)
    return max(1.0, summed([total], device)[0])


def learn(policy, reference, views, prompts, parts, scale, divisor, args, device="cpu"):
    """Accumulate the gradient of one update over micro-batches `parts` of questions -> sums of statistics (dict of floats).
    Every rank makes as many passes as the one with the most, because a pass of a sharded model needs all ranks: what a rank
    does beyond its own parts weighs nothing.

    Policy gradient of the views that learn (the noised one's weighs --noised_policy), and w times d R_conf / d theta through
    C and C' (--pathwise). With --adv_norm none, w = 1 and --noised_policy 1 that is the exact gradient of the expected reward.
    With std, advantages are divided by their own group's std, which vanishes where all rewards are equal; the pathwise term,
    which does not, is divided by the batch's mean, or by TIED where nearly all groups are ties.
    """
    stats = dict.fromkeys(("loss", "pathwise", "kl", "clipped", "tokens"), 0.0)
    passes = int(summed([len(parts)], device, largest=True)[0])
    for number in range(passes):
        part = sorted(parts[min(number, len(parts) - 1)])           # those with a noised view come first
        policy.sum_gradients(number == passes - 1)
        loss, confidences, judged, weights, counts = 0.0, {}, {}, {}, dict.fromkeys(stats, 0.0)
        seen = [(view, some) for view in views if (some := [q for q in part if q < len(view.images)])]
        rollouts = [[r for q in some for r in view.rollouts[q]] for view, some in seen]
        asked = [view.images[q] for view, some in seen for q in some], [prompts[q] for _, some in seen for q in some]
        completions, sizes = [r.tokens for flat in rollouts for r in flat], [len(flat) for flat in rollouts]
        both = policy.score(*asked, completions, temperature=args.temperature).split(sizes)           # all views in one pass
        anchors = [None] * len(seen)
        if reference is not None:
            with torch.no_grad():
                anchors = reference.score(*asked, completions, temperature=args.temperature).split(sizes)
        for (view, some), flat, scores, anchor in zip(seen, rollouts, both, anchors):
            used = used_mask(flat, args).to(device)
            token_weights, weights[view.name] = weights_of(scores.mask & used[:, None], args)
            weights[view.name] = weights[view.name] * used
            confidences[view.name], judged[view.name] = scored_confidence(scores, args, args.group_size)
            if not view.learns:
                continue
            old = view.old_logprobs.setdefault(part[0], scores.logprobs.detach())    # mu = 1: ratio 1, with gradient
            advantages = view.advantages[some].reshape(-1, 1).to(device)
            per_token, clipped = policy_loss(scores.logprobs, old, advantages, args.clip_low, args.clip_high)
            if anchor is not None:
                kl = kl_k3(scores.logprobs, anchor.logprobs)
                per_token = per_token + args.kl_beta * kl
                counts["kl"] += (kl.detach() * scores.mask).sum()
            share = 1.0 if view.name == "original" else args.noised_policy
            loss = loss + share * (per_token * token_weights).sum() / divisor
            counts["clipped"] += (clipped * scores.mask).sum()
            counts["tokens"] += scores.mask.sum()
        if args.pathwise:
            for view, some in ((view, some) for view, some in seen if view.learns):
                own = judged[view.name]
                if view.name == "original":             # on a noised picture what is right is luck
                    own = set_apart(own, args.within)
                paired = [q for q in part if q < len(view.control)]
                terms = confidence_reward(confidences["original"], confidences.get("noised"), view.control[paired], own,
                                          view.correct[some].to(device), scale, args)
                value = sum(terms) / view.spread
                pathwise = -args.pathwise * (value * weights[view.name].view_as(value)).sum() / divisor
                loss, counts["pathwise"] = loss + pathwise, counts["pathwise"] + pathwise.detach()
        counts["loss"] = loss.detach()
        real = float(number < len(parts))
        (loss * real).backward()
        for name, count in counts.items():
            stats[name] += float(count) * real
    return stats


def run_probe(vlm, held_out, clip, args, rank, world, name):
    """The held-out probe before or after training, questions split over ranks -> {t: list of Answer}."""
    t = noise.parse_t(args.noise_t)[1]
    ts = sorted({*eval.PROBE_STEPS, t})
    mine = [held_out[i] for i in range(rank, len(held_out), world)]
    found = eval.probe(vlm, mine, clip, ts, args.region, args.mass, PROBE_SAMPLES, seed=args.seed, name=name,
                        max_new_tokens=args.max_new_tokens, batch_size=probed(args, world))
    return {t: gathered(found[t]) for t in ts}


def probed(args, world):
    """How many questions the probe asks at once: with no more rollouts than a step with noised twins has (int)."""
    return max(1, min(32, int(args.batch_size // world * args.group_size * (1 + args.pairs)) // PROBE_SAMPLES))


def load_or(path, make, rank):
    """A probe stored in the run folder, or made now and stored."""
    if path.exists():
        try:
            return {int(t): [eval.Answer(**a) for a in answers] for t, answers in json.loads(path.read_text()).items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise InputError(f"{path} is damaged ({error}); restore it, or start again with --resume no") from error
    found = make()
    if rank == 0:
        write_json(path, {t: [asdict(a) for a in answers] for t, answers in found.items()})
    return found


def needs_noised(args):
    """Whether the noised view is used at all: by the perception term, or because it learns."""
    return bool(args.alpha) or args.learn_noised


def twins_of(pairs, questions, rank=0, world=1):
    """How many of a step's questions have a noised twin, of those that this rank asks (int). They are the first ones of all
    ranks' questions, which are dealt out: no number of ranks changes which."""
    return len(range(rank, math.ceil(pairs * questions - 1e-9), world))


def with_critique(sample, answer):
    """The prompt of Self-Reflection, with the words of a Critic who knows the solution."""
    return data.reflect_prompt(sample, answer, data.critique(sample, answer))


def asked(samples, step, args):
    """The prompts of a step, and which of them show a critique (Q,) bool. Half of the earlier answers are right, the others
    those of another question."""
    prompts, reflects = [], []
    # of all ranks, in the batch's order, which ranks have dealt out: a question is asked the same on any number of them
    dealt = gathered([data.golds(s)[0] for s in samples]) if args.reflect else []
    answers = [answer for i in range(len(samples)) for answer in dealt[i::len(samples)]]
    for s in samples:
        rng = random.Random(f"reflect {args.seed} {step} {s.id}")
        reflects.append(rng.random() < args.reflect)
        if reflects[-1]:
            answer = data.golds(s)[0] if rng.random() < 0.5 else rng.choice(answers)
            prompts.append(with_critique(s, answer))
        else:
            prompts.append(data.prompt(s))
    return prompts, torch.tensor(reflects)


def roll_out(vlm, clip, samples, step, args):
    """Image pairs, rollouts on each view, confidences -> views (original first), prompts."""
    prompts, reflects = asked(samples, step, args)
    images, seeds = [s.pictures() for s in samples], [f"{args.seed} {step} {s.id}" for s in samples]
    # ---- I. image pairs (paper 3.2.1), of the first questions: they come in a random order
    rank, world = distributed.place()
    some = twins_of(args.pairs, len(samples) * world, rank, world)
    twins = samples[:some] if needs_noised(args) else []
    control = torch.tensor([random.Random(f"control {args.seed} {step} {s.id}").random() < args.controls for s in twins],
                           dtype=torch.bool)
    control |= reflects[:len(twins)]        # with a critique the answer is known without the picture
    regions = ["random" if spared else args.region for spared in control]
    noised = noise.make_pairs(images[:some], [s.question for s in twins], clip, noise.parse_t(args.noise_t), regions, args.mass,
                              seeds[:some], args.text_guidance) if twins else None
    # ---- II. rollouts: y_j on i, y'_j on i', in one batch; III. confidences (Eq. 3), online while sampling
    paired = noised is not None and args.noised == "rollout"
    again = twins if paired else []
    rollouts = vlm.sample(images + (noised if paired else []), prompts + prompts[:len(again)], n=args.group_size,
                          seed=seeds + [f"{seed} noised" for seed in seeds[:len(again)]],
                          max_new_tokens=args.max_new_tokens, temperature=args.temperature,
                          entropy="entropy" in (args.confidence, args.judged))
    groups, others = rollouts[:len(samples)], rollouts[len(samples):] if paired else rollouts[:len(twins)]
    views = [View("original", images, groups, rollout_confidence(groups, args.confidence),
                  rollout_confidence(groups, args.judged), outcomes(groups, samples), True, control)]
    if noised is not None:
        if paired:
            confidences = rollout_confidence(others, args.confidence), rollout_confidence(others, args.judged)
        else:
            with torch.no_grad():
                scores = vlm.score(noised, prompts[:some], [r.tokens for group in others for r in group])
            confidences = (c.cpu() for c in scored_confidence(scores, args, args.group_size))
        views.append(View("noised", noised, others, *confidences, outcomes(others, twins), args.learn_noised, control))
    return views, prompts


def learners(views, args):
    """The views whose words must be scored with gradient: those with a policy gradient, and the noised one when the
    pathwise term reaches the parameters through C'."""
    return [view for view in views if view.learns or (args.pathwise and args.alpha)]


def reward_views(views, scale, args, device="cpu"):
    """Fill in each view's reward terms (Eq. 4 and 3.2.2) and advantages."""
    c, c_other = views[0].confidence, views[1].confidence if len(views) > 1 else None
    for view in views:
        perception, calibration = confidence_reward(c, c_other, view.control, view.judged, view.correct, scale, args)
        formats = torch.tensor([[reward.format_reward(r.text, r.finished) for r in group] for group in view.rollouts])
        view.terms = {"perception": perception, "calibration": calibration, "outcome": view.correct, "format": formats}
        view.advantages, spread = group_advantages(sum(view.terms.values()), args.adv_norm)
        total, groups = summed([spread.sum(), len(spread)], device)
        view.spread = max(TIED, total / groups)


def train(args):
    """The whole run -> the table's rows (rank 0) or None."""
    if args.dry_run:
        rank, world = distributed.place()
        check(args, world)
        noised = twins_of(args.pairs, args.batch_size) if needs_noised(args) else 0
        if rank:
            return None
        return memory.dry_run(args, VLM.load(args.model, meta=True), noise.ClipAttention.count(args.clip),
                              open_data(args)[0], data.prompt, noised, world)
    rank, world, device = distributed.start_ranks()
    check(args, world)
    main_rank = rank == 0
    torch.manual_seed(args.seed)
    train_set, held_out = open_data(args)
    order = Order(len(train_set), args.batch_size, args.seed)
    output, checkpoint = None, None
    clip = noise.ClipAttention.from_pretrained(args.clip, device, cache=args.clip_cache)
    compute = distributed.dtype_of(args, device)
    vlm = load_model(args.model, device, compute)
    spread, again = distributed.choices(args, device, world, vlm)
    # Built-in questions are made, not read, and alike in length: the first stand for all.
    wanted = (range(len(train_set)) if isinstance(train_set, list)
              else sorted({i for s in range(min(args.steps, 16)) for i in order(s)}))
    check_prompts(vlm, [train_set[i] for i in list(wanted)[rank::world]], args.max_new_tokens, main_rank, args.reflect > 0)
    check_prompts(vlm, [held_out[i] for i in range(rank, len(held_out), world)], args.max_new_tokens, main_rank)
    if main_rank:
        output, checkpoint = open_run(args)
        vlm.save_processor(output)                      # a class that cannot be saved fails now, not at its first checkpoint
    output, checkpoint = gathered([(output, checkpoint)])[0]
    if checkpoint is not None:
        if held_out and not (output / "before.json").exists():
            raise InputError(f"{output} has lost before.json, the answers of the model before training; restore it, or start "
                             "again with --resume no")
    if args.freeze_vision:
        for p in vlm.vision_parameters():
            p.requires_grad_(False)
    if again:
        vlm.checkpoint_activations(distributed.blocks(vlm.model))
    policy = distributed.shard(vlm, device, compute, spread, args.offload)
    reference = distributed.shard(load_model(args.model, device, compute), device, compute, spread, args.offload,
                               trains=False) if args.kl_beta else None
    parameters = [p for p in policy.parameters() if p.requires_grad]
    optimiser = distributed.adamw(parameters, args.lr)
    with policy.whole():
        before = load_or(output / "before.json", lambda: run_probe(vlm, held_out, clip, args, rank, world, "before"), rank) \
            if held_out else None
        if checkpoint is None:
            start, scale = 0, base_scale(vlm, clip, train_set, order, args, rank, world)
    if checkpoint is not None:
        start, scale = load_checkpoint(checkpoint, policy, optimiser)
    if main_rank:
        for log in ("metrics.jsonl", "samples.jsonl"):
            trim_log(output / log, start)
        count = sum(p.numel() for p in parameters)
        print(f"{args.recipe}: {cli.shown(args.model)}, {count:,} parameters on {device}, "
              f"{distributed.describe(compute, spread, again, world)}, steps {start} to {args.steps}")

    vlm.encodes_once = True             # a step learns from the prompts that it has sampled from
    stop, step = [], start - 1
    previous = {s: signal.signal(s, lambda *_: stop.append(True)) for s in (signal.SIGINT, signal.SIGTERM)}
    progress = tqdm(range(start, args.steps), initial=start, total=args.steps, desc="step", disable=not main_rank)
    try:
        for step in progress:
            for group in optimiser.param_groups:
                group["lr"] = args.lr * min(1.0, (step + 1) / 5)
                group["lr"] *= 1 - step / args.steps if args.lr_schedule == "linear" else 1.0
            samples = questions_of(train_set, order, step, rank, world)
            clock = time.perf_counter()
            with policy.whole():
                views, prompts = roll_out(vlm, clip, samples, step, args)              # I - III
            reward_views(views, scale, args, device)                                        # IV, V: rewards, advantages
            sampled = time.perf_counter()
            used, updates = learners(views, args), []
            parts = micro_batches(vlm, used, prompts, args)
            divisor = batch_weight(used, args, device)
            for _ in range(args.mu):                                                   # VI. loss and update
                updates.append(learn(policy, reference, used, prompts, parts, scale, divisor, args, device))
                updates[-1]["grad_norm"] = distributed.clip_gradients(parameters, args.max_grad_norm)
                if not math.isfinite(updates[-1]["grad_norm"]):
                    raise InputError(f"the gradient of step {step} is not finite; lower --lr ({args.lr:g}) or the reward's "
                                     f"weights, the checkpoints in {output} are from before it")
                optimiser.step()
                optimiser.zero_grad()               # their memory is free while rolling out
            learned = time.perf_counter()
            row = log_row(step, statistics(views, device), updates, group["lr"], device, world)    # VII. log
            row |= {"seconds/sample": sampled - clock, "seconds/learn": learned - sampled}
            if main_rank:
                write_step(output, row, samples, views)
                progress.set_postfix(reward=f"{row['original/reward']:.2f}", right=f"{row['original/outcome']:.2f}",
                                     gap=f"{row.get('gap', float('nan')):.2f}")
            halted = summed([float(bool(stop))], device)[0] > 0
            if (step + 1) % args.save_every == 0 or step + 1 == args.steps or halted:
                save_checkpoint(output, vlm, policy, optimiser, step + 1, scale, args.keep, compute)
            if halted:
                break
        if summed([float(bool(stop))], device)[0]:              # also of a signal during the last save
            progress.close()
            if main_rank:
                print(f"stopped after step {step + 1}, saved; the same command goes on from here", file=sys.stderr)
            raise SystemExit(130)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return finish(vlm, policy, compute, clip, held_out, before, output, scale, args, rank, world)


def base_scale(vlm, clip, train_set, order, args, rank=0, world=1):
    """Roll out the base model on the questions of the first steps, split over ranks, to measure its confidence
    (`measure_scale`)."""
    pair = Args(**{**asdict(args), "alpha": 1.0, "noised": "rollout", "pairs": 1.0, "controls": 0.0, "reflect": 0.0})
    found = []
    for step in range(max(1, args.scale_questions // args.batch_size)):
        views, _ = roll_out(vlm, clip, questions_of(train_set, order, step, rank, world), f"scale {step}", pair)
        found.append(torch.stack([torch.stack([view.judged, view.correct]) for view in views]))       # (2, 2, Q, G)
    return measure_scale(*torch.cat(gathered(found), 2).flatten(2), args.steepness)


def finish(vlm, policy, compute, clip, held_out, before, output, scale, args, rank, world):
    """Save the final model, run the probe again, write report.png and the table."""
    with policy.whole():
        after = load_or(output / "after.json", lambda: run_probe(vlm, held_out, clip, args, rank, world, "after"), rank) \
            if held_out else None
    state = distributed.whole_state(policy, compute)
    if rank:
        return None
    vlm.save(output, state)
    write_json(output / "confidence.json", scale | {"judged": args.judged})
    rows = None
    if held_out:
        draw_report(output, before, after, args)
        t = noise.parse_t(args.noise_t)[1]
        maps = (metrics.as_fitted(scale), scale) if args.judged == "topk" else (None, None)
        rows = tables.before_after(*(tables.within_skills(found[0], found[t], known)
                                    for found, known in zip((before, after), maps)))
        print(f"\n{len(held_out)} held-out questions x {PROBE_SAMPLES} answers; noised = t {t} on the {args.region} region")
        print(cli.table(rows))
        print(f"\nwrote {output}/: the model, metrics.jsonl, samples.jsonl, report.png")
    print(f"next: python eval.py --model {output} --baseline {cli.shown(args.model)}")
    return rows


def main(argv=None):
    try:
        command("train_cdrl.py", lambda: train(parse(argv)))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
