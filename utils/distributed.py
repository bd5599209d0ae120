"""Many processes, one model: what each rank asks and computes, FSDP2, and a state for any number of ranks.

`shard` puts every repeated block of a model (decoder layers, vision blocks) and what is left over into FSDP2
units. One engine serves all cases, because a mesh may have two axes: (replicate, shard).

    --shard fsdp    one axis of all ranks: each holds a share of the weights, gradients and optimizer state,
    and gathers
                    the weights of a block when it computes there
    --shard none    every rank holds all, gradients are summed over ranks (what DDP does): a mesh of ranks x 1

Weights, gradients and optimizer state are fp32 where the computation is bf16, and so are the sums over ranks.
One process that computes in fp32 needs none of it: its `Policy` passes calls on.

Left out on purpose: tensor and pipeline parallelism; a model that fits one GPU, with what a rollout
needs beside it, does not need them.
"""
import os
import random
import signal
import sys
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from utils import cli, loading, lora, state_files
from utils.cli import InputError

GIB = 2**30
COMFORTABLE = 0.5       # of a device's memory: above it `--shard auto` shards the state of training
FLOAT16_SCALE = 2**12
LARGE = 1e9             # parameters: above it `--activation_checkpointing auto` is on
# A rank that is done with its share waits for the slowest one as long as this.
PATIENCE = timedelta(days=30)


def place():
    """(rank, world) from torchrun's environment; one process without it."""
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise InputError(f"RANK {rank!r} and WORLD_SIZE {world!r} in the environment do not go together: "
                         f"whole numbers, the "
                         "rank below the size, are expected; torchrun sets them")
    return int(rank), int(world)


def start_ranks():
    """(rank, world, device) of this process, which then can speak to the other ranks."""
    rank, world = place()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if world > 1 and missing:
        raise InputError(f"WORLD_SIZE is {world} in the environment, but {', '.join(missing)} is not there; "
                         f"start with "
                         "torchrun, which sets all, or unset WORLD_SIZE")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group(_backend(device), timeout=PATIENCE)
    return rank, world, device


def _backend(device):
    # gloo beside nccl: gathered objects, sums of numbers, and tensors that --offload keeps on the CPU
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def summed(values):
    """Sum a list of numbers over ranks -> list of floats."""
    tensor = torch.tensor(values,
                          dtype=torch.float64)          # on the CPU, where gloo reduces on any machine
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor.tolist()


@contextmanager
def stop_on_signals(*signals):
    """Inside, signals (SIGINT, SIGTERM and SIGHUP) ask for a stop instead of raising -> a StopRequest, which
    the loop looks at. SIGHUP stays ignored where it was (nohup), and a thread beside the main one hears no
    signal."""
    request = StopRequest()
    with cli.on_signals(signals or (signal.SIGINT, signal.SIGTERM, signal.SIGHUP), request.handle):
        yield request


class StopRequest:
    """Whether a signal has come. exit_code: 130 after Ctrl-C, 0 after those of a scheduler or a terminal."""

    def __init__(self):
        self.came, self.exit_code = False, 0

    def handle(self, number, _):
        self.came, self.exit_code = True, 130 if number == signal.SIGINT else self.exit_code

    def on_any_rank(self):
        """Whether one has come on any rank (bool). All ranks call it."""
        return summed([float(self.came)])[0] > 0

    def leave(self, step, progress):
        """End the program after a step that has been saved."""
        progress.close()
        if place()[0] == 0:
            print(f"stopped after step {step + 1}, saved; the same command goes on from here",
                  file=sys.stderr)
        raise SystemExit(self.exit_code)


def gathered(items):
    """Concatenate a list over ranks, in the order of ranks."""
    if not dist.is_initialized():
        return items
    items_by_rank = [None] * dist.get_world_size()
    dist.all_gather_object(items_by_rank, items)
    return [item for rank_items in items_by_rank for item in rank_items]


def agreed(check, *arguments):
    """Run check(*arguments) on this rank -> its result. Where any rank's check raises InputError, all ranks
    raise the first rank's sentence: no rank is left waiting for one that refused."""
    result, fault = None, None
    try:
        result = check(*arguments)
    except InputError as error:
        fault = str(error)
    faults = [text for text in gathered([fault]) if text is not None]
    if fault is not None and fault != faults[0]:
        cli.warn(f"also: {fault}")
    if faults:
        raise InputError(faults[0])
    return result


class QuestionOrder:
    """The questions of each step: a fresh seeded permutation every epoch, dealt to the ranks in turn.

    It is a pure function of the step. A resumed run therefore neither replays nor skips a question.
    """

    def __init__(self, questions, batch_size, seed, rank=0, world=1):
        self.questions, self.batch_size, self.seed = questions, batch_size, seed
        self.rank, self.world = rank, world
        self.epoch, self.permutation = None, None

    def samples(self, step):
        """This rank's questions of a step (list of Sample).

        A question that occurs twice in the step (a file smaller than the batch) gets a second id. Its noise
        and its rollouts then differ from those of its first occurrence.
        """
        indices, samples = self.indices(step), []
        for place in range(self.rank, len(indices), self.world):
            sample, earlier = self.questions[indices[place]], indices[:place].count(indices[place])
            samples.append(replace(sample, id=f"{sample.id} again {earlier}") if earlier else sample)
        return samples

    def indices(self, step):
        """The step's indices into the questions, of all ranks (list of batch_size ints)."""
        indices = []
        for position in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, place = divmod(position, len(self.questions))
            if epoch != self.epoch:
                self.epoch, self.permutation = epoch, list(range(len(self.questions)))
                random.Random(f"order {self.seed} {epoch}").shuffle(self.permutation)
            indices.append(self.permutation[place])
        return indices


def replace_tied(samples, views, order, step, roll_out, attempts):
    """Dynamic sampling (DAPO, arXiv 2503.14476): a group whose answers all earn the same has no advantage.
    Draw other questions for those, at most `attempts` times -> samples, views, how many.

    views: RolloutBatch of each, with rewards; the first one decides. order: QuestionOrder. roll_out(samples,
    name) -> the views of other questions, with rewards; name seeds them. The questions of an attempt follow
    from seed, step, attempt and rank. A slot whose new group is tied, too, keeps its question.
    """
    replaced = 0
    for attempt in range(attempts):
        slots = views[0].is_tied.nonzero()[:, 0].tolist()
        if not slots:
            break
        draw = random.Random(f"resample {order.seed} {step} {attempt} {order.rank}")
        others = [order.questions[draw.randrange(len(order.questions))] for _ in slots]
        other_views = roll_out(others, f"{step} resample {attempt}")
        places = (~other_views[0].is_tied).nonzero()[:, 0].tolist()
        indices = list(range(len(samples)))
        for slot, place in zip(slots, places):
            indices[slot] = len(samples) + place
        replaced += len(places)
        views = [view.joined(other).select(indices) for view, other in zip(views, other_views)]
        samples = [[*samples, *others][i] for i in indices]
    return samples, views, replaced


def micro_batches(vlm, views, run):
    """Split a step's rollouts for the forward and backward passes -> list of (views, weight).

    views: RolloutBatch of each view whose words are scored. A pass holds at most --micro_batch questions,
    and as many as --micro_tokens allows. Completions of similar length share a pass, which is as wide as its
    longest row. All ranks get as many passes, because a sharded model needs all in each; the surplus ones
    have weight 0.
    """
    questions = range(len(views[0].prompts))
    longest = [max(len(r.tokens) for view in views for r in view.rollouts[q]) for q in questions]
    prompt_lengths = [max(vlm.prompt_length(view.images[q], view.prompts[q]) for view in views)
                      if run.micro_tokens else 0 for q in questions]
    group_size, passes = len(views[0].rollouts[0]), [[]]
    for q in sorted(questions, key=longest.__getitem__):
        candidate = [*passes[-1], q]
        rows = len(views) * len(candidate)
        tokens = rows * (max(prompt_lengths[i] for i in candidate) + group_size * longest[q])
        if passes[-1] and (len(candidate) > run.micro_batch or 0 < run.micro_tokens < tokens):
            passes.append([q])
        else:
            passes[-1] = candidate
    surplus = max(gathered([len(passes)])) - len(passes)
    weighted = [(sorted(indices), 1.0) for indices in passes] + [(sorted(passes[-1]), 0.0)] * surplus
    return [([view.select(indices) for view in views], weight) for indices, weight in weighted]


def blocks(model):
    """The repeated blocks of a model: the members of every list of two or more modules of one class,
    outermost lists only."""
    repeated, inside = [], set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1 and len({type(block)
                                                                          for block in module}) == 1 \
                and module not in inside:
            repeated += list(module)
            inside.update(inner for block in module for inner in block.modules())
    return repeated


class Policy(nn.Module):
    """The one module through which gradients flow: FSDP2's hooks sit on `forward`, and `VLM.score` speaks to
    parts of the model rather than to the whole. A `Policy` that is not sharded passes calls on and does
    nothing else."""

    def __init__(self, vlm):
        super().__init__()
        self.model, self._vlm = vlm.model, [vlm]            # in a list: a VLM is no module
        self.units = []                                     # its FSDP2 units; none when it is not sharded
        self.loss_scale = 1         # of the backward pass; gradients of float16 lie in its range then

    def forward(self, *args, **kwargs):
        return self._vlm[0].score(*args, **kwargs) if args else None

    def score(self, images, prompts, completions, *, temperature=1.0, inputs=None, rows=None):
        """`VLM.score`, with gradient. inputs: `VLM.encode` of these prompts and others, of which they are
        `rows` (indices)."""
        inputs = inputs and inputs.rows(rows)               # here: FSDP makes a plain dict of it on the way
        return self(images, prompts, completions, temperature=temperature, inputs=inputs)

    def encode(self, images, prompts):
        return self._vlm[0].encode(images, prompts)

    def sample(self, images, prompts, **settings):
        """`VLM.sample`, by all the weights."""
        with self.unsharded():
            return self._vlm[0].sample(images, prompts, **settings)

    @contextmanager
    def unsharded(self):
        """Inside, every rank holds all weights, so that rollouts need no communication and may differ in
        length."""
        for unit in self.units:
            unit.unshard()
            unit.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            for unit in self.units:
                unit.set_reshard_after_forward(True, recurse=False)
                unit.reshard()

    def backward(self, loss, is_last=True):
        """Add the gradient of a loss to that of the passes before. The last pass sums it over replicas."""
        for unit in self.units:
            unit.set_requires_all_reduce(is_last, recurse=False)
        (loss * self.loss_scale).backward()


def needs_fsdp(world, sharded, offload, compute, dtype):
    """Whether a model is wrapped. dtype: of the weights between steps; FSDP2 makes the copies in the
    computation's dtype."""
    return world > 1 or sharded or offload or compute != dtype


def shard(vlm, device, compute, sharded, offload=False, trains=True):
    """Wrap a model that lies on `device` -> Policy.

    compute: dtype of the computation. sharded: each rank keeps a share, else all of it. offload: weights,
    gradients and optimizer state stay in the CPU's memory between uses. trains: weights become fp32.
    """
    policy = Policy(vlm)
    policy.loss_scale = FLOAT16_SCALE if compute == torch.float16 else 1
    world = dist.get_world_size() if dist.is_initialized() else 1
    adapted = lora.is_adapted(vlm.model)
    if not needs_fsdp(world, sharded, offload, compute, vlm.model.dtype if adapted else torch.float32):
        return policy if adapted else policy.float()
    if not dist.is_initialized():               # one process that was not started by torchrun
        dist.init_process_group(_backend(device), store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(device.type, (world,) if sharded else (world, 1),
                            mesh_dim_names=("shard",) if sharded else ("replicate", "shard"))
    settings = dict(mesh=mesh,
                    mp_policy=MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32),
                    offload_policy=CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload
                    else OffloadPolicy())
    for block in blocks(vlm.model):
        fully_shard(block, **settings)
    fully_shard(policy, **settings)
    policy.units = [module for module in policy.modules() if isinstance(module, FSDPModule)]
    if trains and not adapted:                          # an adapter is fp32 already, its base stays as it is
        policy.float()
    for unit in policy.units:  # sums, not means: the loss is divided by the global count already
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    policy()                                    # the first unit that runs becomes the root
    policy.units[0].reshard()
    return policy



def prepare(vlm, args, device, compute, world, trains=True):
    """What trains, what is sharded, what is computed twice -> (Policy, the choices in words).

    trains: false for a reference model, whose weights stay as they are.
    """
    for p in loading.vision_parameters(vlm) if args.freeze_vision else []:
        p.requires_grad_(False)
    if args.run.lora_rank:
        lora.add(vlm, args.run.lora_rank, args.run.lora_alpha, args.run.lora_target, args.model)
    sharded, gradient_checkpointing = choices(args, device, world, vlm)
    if gradient_checkpointing and trains:
        loading.checkpoint_activations(blocks(vlm.model), vlm.cache_name)
    policy = shard(vlm, device, compute, sharded, args.run.offload, trains)
    return policy, describe(compute, sharded, gradient_checkpointing, world)


def clip_gradients(policy, largest):
    """Divide gradients by the loss's scale and clip their norm, taken over all ranks' shares -> its value
    before (float)."""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    for p in parameters if policy.loss_scale != 1 else ():
        if p.grad is not None:
            p.grad.div_(policy.loss_scale)
    norm = nn.utils.clip_grad_norm_(parameters, largest)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def full_state_dict(policy, dtype, frozen=False):
    """Every weight in full, by its name in the model, in the CPU's memory of rank 0 -> dict ({} on other
    ranks). All ranks call it. A weight that two modules share (a head tied to the word embeddings) is there
    once, by its first name.
    frozen: of an adapted model all weights, else its adapter alone. An adapter is fp32 in any case."""
    adapter_only = lora.is_adapted(policy.model) and not frozen
    state = get_model_state_dict(policy.model, options=StateDictOptions(
        full_state_dict=True, cpu_offload=True, ignore_frozen_params=adapter_only))
    names, first = ({name for name, _ in policy.model.named_parameters(remove_duplicate=once)}
                    for once in (False, True))
    # popped: two copies of one weight at a time
    return {name: state.pop(name).to(torch.float32 if ".lora_" in name else dtype)
            for name in list(state) if name not in names - first}


def _state(policy, optimizer):
    """-> the state of both (dict of dicts), and of its tensors those that are stored, by name. A weight that
    two modules share is stored once, by its first name."""
    options = StateDictOptions(ignore_frozen_params=lora.is_adapted(policy.model))
    state = {"model": get_model_state_dict(policy, options=options),
             "optimizer": get_optimizer_state_dict(policy, optimizer)}
    names, first = ({name for name, _ in policy.named_parameters(remove_duplicate=once)}
                    for once in (False, True))
    tensors = {f"model.{name}": value for name, value in state["model"].items() if name not in names - first}
    for name, moments in state["optimizer"]["state"].items():
        tensors |= {f"optimizer.{name}.{moment}": value for moment, value in moments.items()}
    return state, tensors


def together(function):
    """function() on every rank -> its result. Where it fails on one, all raise that one's error: no rank is
    left waiting."""
    result, fault = None, None
    try:
        result = function()
    except torch.OutOfMemoryError:
        raise
    except state_files.ERRORS as error:
        fault = error
    faults = [text for text in gathered([fault and cli.reason(fault)]) if text]
    if fault is not None:
        raise fault
    if faults:
        raise OSError(faults[0])
    return result


def save_state(policy, optimizer, path):
    """Write the fp32 weights and the optimizer's state, each rank its share, by the names of parameters. All
    ranks call it; where one cannot write, all raise."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    _, tensors = _state(policy, optimizer)
    places = state_files.starts(tensors, gathered, rank)
    pieces = gathered(together(lambda: state_files.write(tensors, path, places, rank, world)))
    together(lambda: rank or state_files.write_index(tensors, pieces, path))


def checksums(path):
    """{name: CRC-32} of the files in a folder, in turns between the ranks, which share the file system. All
    ranks call it."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return dict(gathered([(file.name, cli.checksum(file)) for file in sorted(path.iterdir())[rank::world]]))


def load_state(policy, optimizer, path):
    """The reverse, on any number of ranks, sharded or not: each reads its share. All ranks call it; where one
    cannot read, all raise."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    state, tensors = _state(policy, optimizer)
    # Adam has no state of a weight that never had a gradient (a layer whose output is not used): neither then
    # nor now.
    stored = together(lambda: state_files.read_index(path))
    moments = state["optimizer"]["state"]
    for name in [name for name in moments if f"optimizer.{name}.step" not in stored]:
        for moment in moments.pop(name):
            del tensors[f"optimizer.{name}.{moment}"]
    places = state_files.starts(tensors, gathered, rank)
    together(lambda: state_files.read(tensors, path, places))
    set_model_state_dict(policy, state["model"],
                         options=StateDictOptions(strict=not lora.is_adapted(policy.model)))
    set_optimizer_state_dict(policy, optimizer, state["optimizer"], options=StateDictOptions(strict=False))


def parameters(vlm, frozen_vision=False, lora_rank=0, lora_target="language"):
    """-> (all, those that train). With lora_rank: of a model that has no adapter yet, as if it had."""
    total = sum(p.numel() for p in vlm.model.parameters())
    if lora_rank or lora.is_adapted(vlm.model):
        adapter = sum(p.numel() for p in vlm.model.parameters()
                      if p.requires_grad) if lora.is_adapted(vlm.model) else \
            lora.count(vlm, lora_rank, lora_target)
        return total if lora.is_adapted(vlm.model) else total + adapter, adapter
    return total, total - (sum(p.numel() for p in loading.vision_parameters(vlm)) if frozen_vision else 0)


def device_memory(run, device):
    """GiB of a device; 0 where it is not known."""
    if run.memory:
        return run.memory
    return torch.cuda.get_device_properties(device).total_memory / GIB if device.type == "cuda" else 0.0


def state_bytes(total, trained, ranks, offload=False, frozen_size=4):
    """What a rank holds between steps: weights, gradients and Adam's two moments in fp32 -> bytes by part.
    frozen_size: bytes of a weight that does not train, which under an adapter keeps the dtype of its file."""
    where = "CPU" if offload else "device"
    weights = "weights, fp32" if frozen_size == 4 else "weights, the adapter's in fp32"
    return {(where, weights): (4 * trained + frozen_size * (total - trained)) / ranks,
            (where, "gradients, fp32"): 4 * trained / ranks,
            (where, "optimizer state, fp32"): 8 * trained / ranks}


def dtype_of(run, device):
    """The dtype of the computation."""
    if run.dtype != "auto":
        return getattr(torch, run.dtype)
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def choices(args, device, world, vlm):
    """What `--shard` and `--activation_checkpointing` come to for this model -> (sharded?, activation
    checkpointing?)."""
    total, trained = parameters(vlm, args.freeze_vision, args.run.lora_rank, args.run.lora_target)
    sharded, gradient_checkpointing = args.run.shard == "fsdp", args.run.activation_checkpointing == "on"
    if args.run.activation_checkpointing == "auto":
        gradient_checkpointing = total > LARGE
    if args.run.shard == "auto" and world > 1 and (memory := device_memory(args.run, device)):
        frozen_size = vlm.model.dtype.itemsize if args.run.lora_rank else 4
        sharded = sum(state_bytes(total, trained, 1,
                                  frozen_size=frozen_size).values()) > COMFORTABLE * memory * GIB
    return sharded, gradient_checkpointing


def describe(compute, sharded, gradient_checkpointing, world):
    """The choices of a run in words (str)."""
    words = [str(compute).removeprefix("torch."), f"{world} rank{'s' * (world > 1)}",
             "each with a share (fsdp)" if sharded else "each with the whole state"]
    return ", ".join(words + ["activation checkpointing"] * gradient_checkpointing)
