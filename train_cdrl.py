"""CDRL: reinforcement learning that ties confidence to perception (paper 3.2), with GRPO written by hand.

    torchrun train_cdrl.py                         # the built-in model and questions, on two CPU cores
    torchrun train_cdrl.py --recipe paper          # our setting of the paper's objective; grpo: no confidence
    python train_cdrl.py --explain                 # one question's step in real numbers
    torchrun --nproc-per-node 8 train_cdrl.py --model Qwen/Qwen2.5-VL-7B-Instruct --lr 1e-6 \\
        --clip openai/clip-vit-large-patch14-336 --data train.jsonl --max_new_tokens 1024 --output runs/qwen7b

Read `train` at the bottom first: its loop is the method, one named call after the other. The parts stand
above it in the order in which they run: image pairs, rollouts, rewards, advantages, loss.

The run folder holds args.json, metrics.jsonl, samples.jsonl, checkpoints, before.json and after.json,
confidence.json, report.png, and the final model. The same command resumes a run that was stopped.

The gradient is exact (tests/test_exact.py, by enumeration) with --adv_norm loo, --pathwise 1, --mu 1 and
--kl_beta 0: before the division by the tokens, its expectation is the gradient of the expected rewards.
With --noised_policy 1 both views' answers are drawn from the policy. With 0, or where one view learns, the
noised answers are data: their probability is held, C' on them is not. --alpha, --beta, --calibration and
--controls choose the reward, and any value is exact. These are not: --cnorm group, whose reward holds the C
of the other answers; --adv_norm none, which scales the policy gradient by (G - 1) / G; std, which divides
each group by its own std, and the pathwise term by the batch's mean std, because a tied group's own is 0;
other weights, and clipping.

Left out of GRPO on purpose: a reference model unless --kl_beta is set (on-policy at T = 1 does not need it),
and stored old log-probs unless --mu is above 1. How a run is run (memory, ranks, checkpoints) is in `utils/`.
"""
import utils.early  # noqa: F401  # isort: skip
import random
import time
from dataclasses import dataclass, field, replace

import torch
from tqdm import tqdm

import data
import eval
import noise
from reward import (
    calibration_reward,
    confidence_reward,
    fit_confidence_map,
    format_reward,
    group_advantages,
    rollout_confidence,
    sequence_confidence,
)
from utils import checkpoint, cli, distributed, explain, locks, logs, lora, memory, preflight, report
from utils.cli import TINY, RunOptions, option
from utils.clip_files import count_parameters
from utils.contact_sheet import write_pairs
from utils.distributed import QuestionOrder, agreed, micro_batches, replace_tied
from utils.finite import FiniteSteps
from utils.held_out import HeldOutProbe, write_held_out
from utils.judge import is_correct
from utils.model_defaults import next_evaluation
from utils.prefetch import Ahead, open_pictures, reader_of
from vlm import VLM, load_model

MIN_DIVISOR = 0.1               # below it nearly all groups of a batch are tied
TIED = 1e-6                     # a standard deviation of rewards below it is rounding


@dataclass
class Args:
    """The settings of the method, by default the paper's; RECIPES holds what each recipe changes."""
    # What is trained, on what, where it goes
    model: str = option(str(TINY / "base"), "model directory or hub id")
    clip: str = option(noise.CLIP, "CLIPModel directory or hub id, finds the key regions")
    data: str = option("synthetic", "'synthetic' or a file of questions, of which a share is held out")
    output: str = option("", "run folder; default runs/cdrl, or runs/RECIPE for another recipe")
    recipe: str = option("ours", "a group of settings; an explicit flag wins", ("ours", "paper", "grpo"))
    seed: int = option(0, "decides questions, noise and samples")
    # Scale
    steps: int = option(500, "optimizer steps", least=1)
    batch_size: int = option(32, "questions a step, over all ranks", least=1)
    group_size: int = option(4, "rollouts a question on each view, G (the paper: 4 pairs)")
    max_new_tokens: int = option(64, "longest completion", least=1)
    # Optimization (GRPO; DAPO's clipping)
    lr: float = option(1e-4, "of AdamW after 5 steps; it falls to 0. 1e-6 suits a 7B model", above=0)
    max_grad_norm: float = option(1.0, "the gradient's norm is clipped here", above=0)
    temperature: float = option(1.0, "of sampling; the log-probs of the loss are divided alike", above=0)
    mu: int = option(1, "updates on the same rollouts", least=1)
    resample: int = option(0, "times that other questions are drawn for groups with equal rewards (DAPO)",
                           least=0)
    clip_low: float = option(0.2, "the probability ratio is clipped below 1 - clip_low", least=0, most=1)
    clip_high: float = option(0.28, "and above 1 + clip_high", least=0)
    adv_norm: str = option("std", "reward minus the group's mean, divided by its std (std, GRPO) or not "
                           "(none, Dr. GRPO), or minus the mean of the others (loo)", ("std", "none", "loo"))
    kl_beta: float = option(0.0, "weight of the KL to the starting model (k3); 0 loads no reference", least=0)
    freeze_vision: bool = option(False, "train the language model and its head only")
    # Image pairs (paper 3.2.1)
    noise_t: str = option("999", "diffusion step 0 to 1000, or a range such as 500-999 to draw from")
    region: str = option("key", "where the noise goes", noise.MODES)
    mass: float = option(0.5, "share of CLIP's attention that the key region holds", above=0, most=1)
    controls: float = option(0.0, "share of the pairs whose noise spares the evidence; no perception term "
                             "there: C should fall with the evidence, not with noise", least=0, most=1)
    # Reward (paper Eq. 4)
    alpha: float = option(0.2, "weight of the perception term tanh(beta (C - C')); 0 = no term", least=0)
    beta: float = option(0.5, "slope of the tanh, per nat", above=0)
    cnorm: str = option("group", "scale of C in the linear term: min-max of the group, or the base's "
                        "5th-95th percentile", ("group", "range"))
    calibration: str = option("linear", "calibration term: the paper's linear one, a proper score of "
                              "c = sigmoid(aC + b), or none", ("linear", "brier", "log", "none"))
    scale_questions: int = option(256, "questions whose answers by the base give the map from C to c",
                                  least=1)
    pathwise: float = option(0.0, "weight of the reward's own gradient, through C and C'; 0 = the paper, "
                             "1 = exact with --adv_norm loo", least=0)
    learn_noised: bool = option(True, "it also flows through the noised answers' own calibration term")
    noised_policy: float = option(0.0, "weight of a policy gradient on the noised answers", least=0)
    run: RunOptions = field(default_factory=RunOptions)         # how it is run: utils/cli.py

    @property
    def noised_learns(self):
        """Whether the noised answers have a reward and a gradient of their own."""
        return self.learn_noised and (self.pathwise > 0 or self.noised_policy > 0)

    @property
    def uses_noised(self):
        """Whether pictures are noised: for the perception term, or because the noised answers learn."""
        return self.alpha > 0 or self.noised_learns


RECIPES = {
    "paper": {},
    "grpo": dict(alpha=0.0, calibration="none", lr=3e-4),
    "ours": dict(adv_norm="loo", calibration="brier", pathwise=3.5, controls=0.4, lr=3e-4),
}


def parse(argv=None):
    """Command line -> Args: defaults, then the recipe, then explicit flags."""
    args = cli.parse_recipe(Args, RECIPES, argv)
    args.output = args.output or f"runs/{'cdrl' if args.recipe == 'ours' else args.recipe}"
    return args


def check(args, world):
    """Refuse settings that cannot work, each in one sentence."""
    preflight.check_settings(args, world)
    noise.parse_t(args.noise_t)


# ------------------------------------------------------------------------------------------------------------
# I. Image pairs (paper 3.2.1). II. Rollouts on both views. III. Confidence (Eq. 3)

@dataclass
class RolloutBatch:
    """A step's rollouts on one view of the pictures, and what they earned: Q questions, G rollouts each."""
    view: str                                    # "original" or "noised"
    images: list                                 # Q lists of PIL images
    prompts: list                                # Q prompts
    rollouts: list                               # Q lists of G Rollouts
    confidence: torch.Tensor                     # (Q, G) C, or C' on the noised view
    correct: torch.Tensor                        # (Q, G) R_out
    is_control: torch.Tensor                     # (Q,) bool: the pair's noise spares the evidence
    inputs: dict | None                          # `VLM.encode` of both views' prompts
    rows: list                                   # Q places of this view's prompts in `inputs`
    policy_weight: float                         # of its policy gradient; 0 = none
    rewards: dict = field(default_factory=dict)  # each reward term by name, (Q, G)
    advantages: torch.Tensor | None = None       # (Q, G)
    advantage_divisor: float = 1.0               # what they were divided by, batch mean
    old_logprobs: torch.Tensor | None = None     # (Q*G, T), of the first of --mu updates

    @property
    def has_pictures(self):
        """(Q, 1) bool. A question without one has no noised twin: its noised answers teach nothing."""
        return torch.tensor([[bool(pictures)] for pictures in self.images])

    @property
    def is_tied(self):
        """(Q,) bool: all answers of the group earned the same, so that none has an advantage."""
        return sum(self.rewards.values()).std(-1) < TIED

    def select(self, questions):
        """The same for some of the questions (a list of indices)."""
        fields = {name: [value[q] for q in questions] if isinstance(value, list) else value[questions]
                  for name, value in vars(self).items() if isinstance(value, list | torch.Tensor)}
        return replace(self, **fields, rewards={name: term[questions] for name, term in self.rewards.items()})

    def joined(self, other):
        """Both batches' questions. Their prompts, encoded apart, are encoded again when they are scored."""
        fields = {name: value + getattr(other, name) if isinstance(value, list)
                  else torch.cat([value, getattr(other, name)])
                  for name, value in vars(self).items() if isinstance(value, list | torch.Tensor)}
        return replace(self, **fields, inputs=None, rewards={
            name: torch.cat([term, other.rewards[name]]) for name, term in self.rewards.items()})


def make_image_pairs(images, samples, clip, name, args):
    """Noise each question's pictures where the evidence is -> Q lists of pictures, is_control (Q,) bool.

    Controls have the noise on a random region of the same area. A question without a picture counts as one.
    None where no term needs noised pictures. name: of the step, in seeds.
    """
    if not args.uses_noised:
        return None, torch.zeros(len(samples), dtype=torch.bool)
    seeds = [f"{args.seed} {name} {s.id}" for s in samples]
    is_control = [not pictures or random.Random(f"control {seed}").random() < args.controls
                  for pictures, seed in zip(images, seeds)]
    regions = ["random" if control else args.region for control in is_control]
    noised_images = noise.make_pairs(images, [s.question for s in samples], clip, noise.parse_t(args.noise_t),
                                     regions, args.mass, seeds)
    return noised_images, torch.tensor(is_control)


def prepare_step(vlm, clip, samples, name, args):
    """The questions, their pictures, the noised ones, which are controls, and both views encoded (tuple).

    It depends on nothing that is learned: a thread calls it while the step before runs (`Ahead`).
    """
    samples, images = open_pictures(samples, args.run.picture_threads, args.run.skip_broken)
    noised_images, is_control = make_image_pairs(images, samples, clip, name, args)
    prompts = [data.prompt(s) for s in samples]
    inputs = vlm.encode(images + (noised_images or []), prompts * (1 if noised_images is None else 2))
    return samples, images, noised_images, is_control, inputs


def roll_out(policy, samples, images, noised_images, is_control, inputs, name, args):
    """G answers to each question on its picture, and on its noised twin -> RolloutBatch of each view (list).

    Both views are sampled in one batch. C is read from the raw logits while sampling. policy: a Policy or a
    VLM. inputs: both views' prompts, encoded, or None.
    """
    pictures = {"original": images} | ({} if noised_images is None else {"noised": noised_images})
    prompts, seeds = [data.prompt(s) for s in samples], [f"{args.seed} {name} {s.id}" for s in samples]
    all_images, all_prompts = [p for view in pictures.values() for p in view], prompts * len(pictures)
    inputs = inputs or policy.encode(all_images, all_prompts)   # once, for sampling and for learning
    groups = policy.sample(all_images, all_prompts, inputs=inputs, n=args.group_size,
                           seed=(seeds + [f"{seed} noised" for seed in seeds])[:len(all_prompts)],
                           max_new_tokens=args.max_new_tokens, temperature=args.temperature)
    views = []
    for view, images in pictures.items():
        rows = [len(views) * len(samples) + q for q in range(len(samples))]
        rollouts = [groups[row] for row in rows]
        correct = torch.tensor([[float(is_correct(r.text, s)) for r in group]
                                for s, group in zip(samples, rollouts)])                              # (Q, G)
        policy_weight = 1.0 if view == "original" else args.noised_policy * args.noised_learns
        views.append(RolloutBatch(view, images, prompts, rollouts, rollout_confidence(rollouts), correct,
                                  is_control, inputs, rows, policy_weight))
    return views


# ------------------------------------------------------------------------------------------------------------
# IV. Rewards (Eq. 4 and 3.2.2). V. Advantages

def add_rewards(views, confidence_map, args):
    """Fill in each view's reward terms. The perception term of a pair is in the rewards of both views."""
    original = views[0]
    c_noised = views[1].confidence if len(views) > 1 else None
    perception, calibration = confidence_reward(original.confidence, c_noised, original.correct,
                                                original.is_control, confidence_map, args)
    for view in views:
        if view is not original:
            calibration = calibration_reward(c_noised, view.correct, confidence_map, args) * view.has_pictures
        formats = torch.tensor([[format_reward(r.text, r.finished) for r in group]
                                for group in view.rollouts])                                          # (Q, G)
        view.rewards = {"perception": perception, "calibration": calibration, "outcome": view.correct,
                        "format": formats}


def add_advantages(views, adv_norm):
    """Fill in each view's advantages, and what divided them on average over all ranks."""
    for view in views:
        view.advantages, divisor = group_advantages(sum(view.rewards.values()), adv_norm)
        if view is not views[0]:
            view.advantages = view.advantages * view.has_pictures
        total, groups = distributed.summed([divisor.sum(), len(divisor)])
        view.advantage_divisor = max(MIN_DIVISOR, total / groups)


# ------------------------------------------------------------------------------------------------------------
# VI. Loss and update

def policy_loss(logprobs, old_logprobs, ref_logprobs, advantages, args):
    """-min(ratio A, clip(ratio) A) + kl_beta KL, per token -> (B, T), which ratios were clipped, KL.

    logprobs (B, T) three times, advantages (B, 1). KL(policy || reference) by k3: exp(d) - d - 1 >= 0 with
    d = reference - policy; 0 without a reference.
    """
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    difference = torch.zeros_like(logprobs) if ref_logprobs is None else ref_logprobs - logprobs
    kl = difference.exp() - difference - 1
    return loss + args.kl_beta * kl, (ratio != clipped).float(), kl


def cdrl_loss(policy, reference, views, confidence_map, num_loss_tokens, args):
    """The loss of one micro-batch -> scalar with gradient, and sums for the log (dict).

    Policy gradient: GRPO on the original's rollouts, and times --noised_policy on the noised ones'. Pathwise:
    --pathwise times the gradient of the confidence reward itself, through C and C'. Each reward term counts
    once: perception, calibration, outcome and format of the original answers, and of the noised ones, where
    they learn, all but perception.
    """
    images, prompts = [p for view in views for p in view.images], [p for view in views for p in view.prompts]
    completions = [r.tokens for view in views for group in view.rollouts for r in group]
    sizes = [view.confidence.numel() for view in views]
    how = {"temperature": args.temperature, "inputs": views[0].inputs,
           "rows": [row for view in views for row in view.rows]}
    scores = policy.score(images, prompts, completions, **how).split(sizes)      # both views in one pass
    ref_logprobs = [None] * len(views)
    if reference is not None:
        with torch.no_grad():
            ref_logprobs = reference.score(images, prompts, completions, **how).logprobs.split(sizes)
    loss, sums = 0.0, dict.fromkeys(logs.LOSS_SUMS, 0.0)

    # ---- the clipped policy gradient of GRPO
    for view, score, ref in zip(views, scores, ref_logprobs):
        if not view.policy_weight:
            continue
        if view.old_logprobs is None:                       # the first update: ratio 1, with gradient
            view.old_logprobs = score.logprobs.detach()
        advantages = view.advantages.reshape(-1, 1).to(score.logprobs.device)                    # (Q*G, 1)
        per_token, clipped, kl = policy_loss(score.logprobs, view.old_logprobs, ref, advantages, args)
        loss = loss + view.policy_weight * (per_token * score.mask).sum() / num_loss_tokens
        for name, tokens in (("kl", kl.detach()), ("clipped", clipped), ("tokens", 1.0)):
            sums[name] += (tokens * score.mask).sum()

    # ---- the reward's own gradient, through C and C'
    if args.pathwise:
        c = [sequence_confidence(score.confidence, score.mask).view_as(view.confidence)
             for view, score in zip(views, scores)]                                          # (Q, G) each
        original, c_noised = views[0], c[1] if len(views) > 1 else None
        terms = confidence_reward(c[0], c_noised, original.correct.to(c[0].device), original.is_control,
                                  confidence_map, args)
        pathwise = -args.pathwise * (sum(terms) / original.advantage_divisor).sum() / num_loss_tokens
        if args.noised_learns:
            noised = views[1]
            term = calibration_reward(c_noised, noised.correct.to(c_noised.device), confidence_map, args)
            term = term * noised.has_pictures.to(term.device)
            pathwise = pathwise - args.pathwise * (term / noised.advantage_divisor).sum() / num_loss_tokens
        loss, sums["pathwise"] = loss + pathwise, pathwise.detach()
    return loss, sums | {"loss": loss.detach()}


def accumulate_gradients(policy, reference, micro_batches, confidence_map, num_loss_tokens, args):
    """Forward and backward over the micro-batches of one update -> sums for the log (dict of floats)."""
    totals = dict.fromkeys(logs.LOSS_SUMS, 0.0)
    for number, (views, weight) in enumerate(micro_batches, 1):
        loss, sums = cdrl_loss(policy, reference, views, confidence_map, num_loss_tokens, args)
        policy.backward(loss * weight, is_last=number == len(micro_batches))
        totals = {name: totals[name] + float(sums[name]) * weight for name in totals}
    return totals


# ------------------------------------------------------------------------------------------------------------
# Before and after the loop

def fit_map_on_base(policy, clip, order, args):
    """Roll out the base model on both views of the first steps' questions and fit the map from C to c
    (dict)."""
    pairs = Args(**{**vars(args), "alpha": 1.0, "controls": 0.0})
    measured, steps = [], range(max(1, args.scale_questions // args.batch_size))
    for step in tqdm(steps, desc="base confidence", unit="batch", leave=False, disable=order.rank > 0):
        name = f"scale {step}"
        batch = agreed(prepare_step, policy, clip, order.samples(step), name, pairs)
        views = roll_out(policy, *batch, name, pairs)
        measured.append(torch.stack([torch.stack([view.confidence, view.correct]) for view in views]))
    return fit_confidence_map(*torch.cat(distributed.gathered(measured), 2).flatten(2))       # (2, 2, N)


def finish(vlm, policy, compute, probe, before, output, confidence_map, args):
    """Save the final model, probe it again, write report.png and the table -> its rows (rank 0) or None."""
    after = probe(output / "after.json")
    checkpoint.save_model(output, vlm, policy, compute, args.run.merge)
    if probe.order.rank:
        return None
    logs.write_json(output / "confidence.json", confidence_map)
    rows = report.finish_run(output, before, after, confidence_map, args, probe.ts[-1])
    print(f"next: {next_evaluation(output, args)}")
    return rows


@locks.released_after
def train(args):
    """The whole run -> the table's rows (rank 0) or None."""
    rank, world = distributed.place()
    check(args, world)
    if args.run.dry_run:
        return None if rank else memory.dry_run(args, VLM.load(args.model, meta=True).read_as(args.run),
                                                count_parameters(args.clip),
                                                data.open_data(args)[0], data.prompt, world)
    device = distributed.start_ranks()[2]
    torch.manual_seed(args.seed)
    # What one rank refuses all refuse together, before anything is moved or written.
    train_set, held_out = agreed(lambda: data.open_data(args))
    order = QuestionOrder(train_set, args.batch_size, args.seed, rank, world)
    clip = agreed(noise.ClipAttention.from_pretrained, args.clip, device, args.run.clip_map,
                  args.run.clip_cache)
    compute = distributed.dtype_of(args.run, device)
    vlm = agreed(load_model, args.model, device, compute, args.run)
    if args.run.explain:
        stages = (fit_map_on_base, prepare_step, roll_out, add_rewards, add_advantages, cdrl_loss)
        policy = distributed.shard(vlm, device, compute, sharded=False)
        return explain.print_step(args, vlm, policy, clip, order, held_out, stages)
    sound = agreed(lambda: preflight.check_run(vlm, train_set, held_out, order, args, data.prompt))
    preflight.leave_out(sound, train_set, held_out, args)
    output, newest = checkpoint.open_run(args, vlm, needs_before=bool(held_out))
    if rank == 0 and held_out and args.data != "synthetic":
        write_held_out(held_out, output / "heldout.jsonl")     # for eval.py: questions not trained on
    if rank == 0 and args.uses_noised:
        write_pairs(output, train_set, lambda *pair: make_image_pairs(*pair, clip, 0, args)[0])
    policy, choices = distributed.prepare(vlm, args, device, compute, world)
    reference = None
    if args.kl_beta:
        reference = lora.Frozen(policy) if args.run.lora_rank else distributed.prepare(
            load_model(args.model, device, compute, args.run), args, device, compute, world, trains=False)[0]
    parameters = [p for p in policy.parameters() if p.requires_grad]
    # Fused on a GPU: else an update makes a second copy of the weights for a moment.
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0,
                                  fused=parameters[0].device.type == "cuda")
    probe = HeldOutProbe(eval.probe, eval.Answer, sorted({*eval.PROBE_STEPS, noise.parse_t(args.noise_t)[1]}),
                         held_out, vlm, policy, clip, args, order)
    before = probe(output / "before.json")
    if newest is None:
        start, confidence_map = 0, fit_map_on_base(policy, clip, order, args)
    else:
        start, confidence_map = checkpoint.load_checkpoint(newest, policy, optimizer)
    if rank == 0:
        logs.trim_logs(output, start)
        print(f"{args.recipe}: {cli.shown(args.model)}, {sum(p.numel() for p in parameters):,} parameters "
              f"on {device}, {choices}, steps {start} to {args.steps}")

    def roll_out_others(others, name):                  # I to IV, for --resample
        views = roll_out(policy, *prepare_step(vlm, clip, others, name, args), name, args)
        add_rewards(views, confidence_map, args)
        return views

    hopeless, is_finite = preflight.HopelessTraining(args.run.patience), FiniteSteps(args)
    progress = tqdm(range(start, args.steps), initial=start, total=args.steps, desc="step", disable=rank > 0)
    reader = reader_of(vlm)
    pairs = Ahead(lambda step: prepare_step(reader, clip, order.samples(step), step, args), args.steps)
    with distributed.stop_on_signals() as stop, pairs:
        for step in progress:
            lr = args.lr * min(1.0, (step + 1) / 5) * (1 - step / args.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            clock = time.perf_counter()
            # ---- I. image pairs: i, and i' with the evidence noised; made while the step before ran
            samples, images, noised_images, is_control, inputs = pairs(step)
            # ---- II. rollouts y on i and y' on i'; III. their confidences C and C' (Eq. 3)
            views = roll_out(policy, samples, images, noised_images, is_control, inputs, step, args)
            # ---- IV. rewards (Eq. 4, 3.2.2)
            add_rewards(views, confidence_map, args)
            if args.resample:
                samples, views, resampled = replace_tied(samples, views, order, step, roll_out_others,
                                                         args.resample)
            # ---- V. advantages within the group
            add_advantages(views, args.adv_norm)
            sampled = time.perf_counter()
            # ---- VI. loss and update. The noised words are scored only where a gradient reaches them.
            scores_noised = args.noised_learns or args.pathwise > 0 and args.alpha > 0
            passes = micro_batches(vlm, views if scores_noised else views[:1], args.run)
            tokens = sum(len(r.tokens) for view in (views if args.noised_learns else views[:1])
                         for group in view.rollouts for r in group)
            num_loss_tokens = max(1.0, distributed.summed([tokens])[0])
            updates = []
            for _ in range(args.mu):
                updates.append(accumulate_gradients(policy, reference, passes, confidence_map,
                                                    num_loss_tokens, args))
                updates[-1]["grad_norm"] = distributed.clip_gradients(policy, args.max_grad_norm)
                if is_finite(step, samples, views, passes, updates[-1]):
                    optimizer.step()
                optimizer.zero_grad()               # frees their memory for the next rollouts
            # ---- VII. log and save
            checkpoint.save_weights(output, vlm, policy, step + 1, args.run, compute)
            seconds = {"seconds/sample": sampled - clock, "seconds/learn": time.perf_counter() - sampled,
                       "seconds/pictures_share": pairs.waited / (time.perf_counter() - clock)}
            row = logs.log_row(step, views, updates, lr) | seconds | {"skipped": is_finite.skipped}
            if args.resample:
                row["resampled"] = distributed.summed([resampled])[0]
            row |= probe.row(step, output)
            if rank == 0:
                logs.write_step(output, row, samples, views, args)
                progress.set_postfix(logs.postfix(row))
            stopped = stop.on_any_rank()
            due = (step + 1) % args.run.save_every == 0 or step + 1 == args.steps
            if due and not is_finite.in_a_row or stopped:
                checkpoint.save_checkpoint(output, vlm, policy, optimizer, step + 1, confidence_map,
                                           args.run.keep, compute)
            if stopped:
                break
            hopeless(row, None if rank else progress)
        if stop.on_any_rank():              # also of a signal during the last save
            stop.leave(step, progress)
    return finish(vlm, policy, compute, probe, before, output, confidence_map, args)


def main(argv=None):
    cli.command("train_cdrl.py", lambda: train(parse(argv)))


if __name__ == "__main__":
    main()
