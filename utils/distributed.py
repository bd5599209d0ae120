"""Many processes, one model: ranks, FSDP2, and a state that any number of ranks can go on with.

`shard` puts every repeated block of a model (decoder layers, vision blocks) and what is left over into FSDP2 units. One
engine serves all cases, because a mesh may have two axes: (replicate, shard).

    --shard fsdp    one axis of all ranks: each holds a share of the weights, gradients and optimiser state, and gathers
                    the weights of a block when it computes there
    --shard none    every rank holds all, gradients are summed over ranks (what DDP does): a mesh of ranks x 1

Weights, gradients and optimiser state are fp32 where the computation is bf16, and so are the sums over ranks. One process
that computes in fp32 needs none of it: its `Policy` passes calls on.

Left out on purpose: tensor and pipeline parallelism; a model that fits one GPU, with what a rollout
needs beside it, does not need them.
"""
import os
import warnings
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from utils import cli
from utils.cli import InputError

GIB = 2**30
COMFORTABLE = 0.5       # of a device's memory: above it `--shard auto` shards the state of training
LARGE = 1e9             # parameters: above it `--activation_checkpointing auto` is on
# A rank that is done with its share waits for the slowest one as long as this.
PATIENCE = timedelta(days=30)


def place():
    """(rank, world) from torchrun's environment; one process without it."""
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise InputError(f"RANK {rank!r} and WORLD_SIZE {world!r} in the environment do not go together: whole numbers, the "
                         "rank below the size, are expected; torchrun sets them")
    return int(rank), int(world)


def start_ranks():
    """(rank, world, device) of this process, which then can speak to the other ranks."""
    rank, world = place()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if world > 1 and missing:
        raise InputError(f"WORLD_SIZE is {world} in the environment, but {', '.join(missing)} is not there; start with "
                         "torchrun, which sets all, or unset WORLD_SIZE")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group(_backend(device), timeout=PATIENCE)
    return rank, world, device


def _backend(device):
    # gloo beside nccl: gathered objects, and tensors that --offload keeps on the CPU
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def summed(values, device, largest=False):
    """Sum a list of numbers over ranks, or take the largest of each -> list of floats."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
    return tensor.tolist()


def gathered(items):
    """Concatenate a list over ranks, in the order of ranks."""
    if not dist.is_initialized():
        return items
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def blocks(model):
    """The repeated blocks of a model: the members of every list of two or more modules of one class, outermost lists
    only."""
    found, inside = [], set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1 and len({type(block) for block in module}) == 1 \
                and module not in inside:
            found += list(module)
            inside.update(inner for block in module for inner in block.modules())
    return found


class Policy(nn.Module):
    """The one module through which gradients flow: FSDP2's hooks sit on `forward`, and `VLM.score` speaks to parts of the
    model rather than to the whole. A `Policy` that is not sharded passes calls on and does nothing else."""

    def __init__(self, vlm):
        super().__init__()
        self.model, self._vlm = vlm.model, [vlm]            # in a list: a VLM is no module

    def forward(self, *args, **kwargs):
        return self._vlm[0].score(*args, **kwargs) if args else None

    def score(self, *args, **kwargs):
        """`VLM.score`, with gradient."""
        return self(*args, **kwargs)

    @property
    def units(self):
        """Its FSDP2 units (list; empty when it is not sharded)."""
        return [module for module in self.modules() if isinstance(module, FSDPModule)]

    @contextmanager
    def whole(self):
        """Inside, every rank holds all weights, so that rollouts need no communication and may differ in length."""
        for unit in self.units:
            unit.unshard()
            unit.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            for unit in self.units:
                unit.set_reshard_after_forward(True, recurse=False)
                unit.reshard()

    def sum_gradients(self, now):
        """Whether the next backward pass sums gradients over replicas; of several that accumulate only the last must."""
        for unit in self.units:
            unit.set_requires_all_reduce(now, recurse=False)


def shard(vlm, device, compute, spread, offload=False, trains=True):
    """Wrap a model that lies on `device` -> Policy.

    compute: dtype of the computation. spread: each rank keeps a share, else all of it. offload: weights, gradients and
    optimiser state stay in the CPU's memory between uses. trains: weights become fp32.
    """
    policy = Policy(vlm)
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world == 1 and not spread and not offload and compute == torch.float32:
        return policy.float()
    if not dist.is_initialized():               # one process that was not started by torchrun
        dist.init_process_group(_backend(device), store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(device.type, (world,) if spread else (world, 1),
                            mesh_dim_names=("shard",) if spread else ("replicate", "shard"))
    settings = dict(mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32),
                    offload_policy=CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy())
    for block in blocks(vlm.model):
        fully_shard(block, **settings)
    fully_shard(policy, **settings)
    if trains:
        policy.float()
    for unit in policy.units:                   # sums, not means: the loss is divided by the global count already
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    policy()                                    # the first unit that runs becomes the root
    policy.units[0].reshard()
    return policy


def adamw(parameters, lr):
    """AdamW over a policy's parameters, without weight decay. Fused on a GPU: else an update makes a second copy of the
    weights for a moment."""
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=parameters[0].device.type == "cuda")


def clip_gradients(parameters, largest):
    """Clip the gradient's norm, taken over all ranks' shares -> its value before (float)."""
    norm = nn.utils.clip_grad_norm_(parameters, largest)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def whole_state(policy, dtype):
    """Every weight in full, by its name in the model, in the CPU's memory of rank 0 -> dict ({} on other ranks). All ranks
    call it. A weight that two modules share (a head tied to the word embeddings) is there once, by its first name."""
    found = get_model_state_dict(policy.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    names, first = ({name for name, _ in policy.model.named_parameters(remove_duplicate=once)} for once in (False, True))
    # popped: two copies of one weight at a time
    return {name: found.pop(name).to(dtype) for name in list(found) if name not in names - first}


def _state(policy, optimiser):
    return {"model": get_model_state_dict(policy), "optimiser": get_optimizer_state_dict(policy, optimiser)}


def save_state(policy, optimiser, path):
    """Write the fp32 weights and the optimiser's state, each rank its share, by the names of parameters. All ranks call it."""
    with warnings.catch_warnings(action="ignore"):         # that one process is one process
        checkpoint.save(_state(policy, optimiser), checkpoint_id=path)


def checksums(path):
    """{name: CRC-32} of the files in a folder, in turns between the ranks, which share the file system. All ranks call it."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return dict(gathered([(file.name, cli.checksum(file)) for file in sorted(path.iterdir())[rank::world]]))


def load_state(policy, optimiser, path):
    """The reverse, on any number of ranks, sharded or not: each reads its share. All ranks call it."""
    state = _state(policy, optimiser)
    # Adam has no state of a weight that never had a gradient (a layer whose output is not used): neither then nor now.
    stored = checkpoint.FileSystemReader(path).read_metadata().state_dict_metadata
    moments = state["optimiser"]["state"]
    for name in [name for name in moments if f"optimiser.state.{name}.step" not in stored]:
        del moments[name]
    with warnings.catch_warnings(action="ignore"):
        checkpoint.load(state, checkpoint_id=path)
    set_model_state_dict(policy, state["model"])
    set_optimizer_state_dict(policy, optimiser, state["optimiser"], options=StateDictOptions(strict=False))


def parameters(vlm, frozen_vision=False):
    """-> (all, those that train)."""
    total = sum(p.numel() for p in vlm.model.parameters())
    return total, total - (sum(p.numel() for p in vlm.vision_parameters()) if frozen_vision else 0)


def device_memory(args, device):
    """GiB of a device; 0 where it is not known."""
    if args.memory:
        return args.memory
    return torch.cuda.get_device_properties(device).total_memory / GIB if device.type == "cuda" else 0.0


def state_bytes(total, trained, ranks, offload=False):
    """What a rank holds between steps: weights, gradients and Adam's two moments in fp32 -> bytes by part."""
    where = "CPU" if offload else "device"
    return {(where, "weights, fp32"): 4 * total / ranks, (where, "gradients, fp32"): 4 * trained / ranks,
            (where, "optimiser state, fp32"): 8 * trained / ranks}


def dtype_of(args, device):
    """The dtype of the computation."""
    if args.dtype != "auto":
        return getattr(torch, args.dtype)
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def choices(args, device, world, vlm):
    """What `--shard` and `--activation_checkpointing` come to for this model -> (sharded?, activation checkpointing?)."""
    total, trained = parameters(vlm, args.freeze_vision)
    spread, again = args.shard == "fsdp", args.activation_checkpointing == "on"
    if args.activation_checkpointing == "auto":
        again = total > LARGE
    if args.shard == "auto" and world > 1 and (memory := device_memory(args, device)):
        spread = sum(state_bytes(total, trained, 1).values()) > COMFORTABLE * memory * GIB
    return spread, again


def describe(compute, spread, again, world):
    return (f"{str(compute).removeprefix('torch.')}, {world} rank{'s' * (world > 1)}, "
            f"{'each with a share (fsdp)' if spread else 'each with the whole state'}{', activation checkpointing' * again}")
