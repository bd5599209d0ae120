"""The run folder of a training: opened, saved to, resumed from, damage named in a sentence."""
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from utils import cli, distributed
from utils.cli import InputError
from utils.logs import write_json

# A resumed run may change these; every other setting must be the same. (More steps go on with the lr of the longer run.)
FREE = ("output", "steps", "save_every", "keep", "resume", "shard", "offload", "micro_batch", "micro_tokens", "memory",
        "activation_checkpointing", "clip_cache")


def open_run(args):
    """Prepare the run folder -> (path, newest checkpoint or None). A run with other settings, or of a file that has changed
    since, is moved aside."""
    output = Path(args.output)
    settings = asdict(args) | {"data_checksum": 0 if args.data == "synthetic" else cli.checksum(Path(args.data))}
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {args.output!r} is a file; give a directory")
    # what a kill has left of the very first file is no run yet
    if output.is_dir() and any(path.name != "args.json.tmp" for path in output.iterdir()):
        try:
            old = dict(json.loads((output / "args.json").read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"--output {args.output!r} holds something that is not a run; choose another folder") from error
        other = [key for key, value in settings.items() if key not in FREE and old.get(key) != value]
        done = checkpoints(output)
        longer = bool(done) and step_of(done[-1]) > args.steps
        if args.resume == "no" or other or longer:
            aside = next(p for i in range(1, 10**6) if not (p := output.with_name(f"{output.name}-{i}")).exists())
            why = f"other settings ({', '.join(other)})" if other else "more steps" if longer else "an earlier run"
            try:
                output.rename(aside)
            except OSError as error:
                raise InputError(f"--output {args.output!r} holds {why} and cannot be moved to {aside} ({error.strerror}); "
                                 "choose another folder") from error
            print(f"{args.output} held {why}: moved to {aside}")
    for torn in output.glob(".checkpoint-*.tmp"):                   # of a kill while it was written; makes room, so first
        shutil.rmtree(torn, ignore_errors=True)
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "args.json", settings)
    except OSError as error:
        raise InputError(f"--output {args.output!r} cannot be written ({error.strerror}); choose another folder") from error
    done = checkpoints(output)
    if not (done and done[-1].name == f"checkpoint-{args.steps}"):
        for old in (output / "after.json", *output.glob("model*.safetensors*")):    # of an earlier, shorter run in this folder
            old.unlink(missing_ok=True)
    return output, done[-1] if done else None


def step_of(checkpoint):
    return int(checkpoint.name.split("-")[-1])


def checkpoints(output):
    """Complete checkpoints, oldest first."""
    return sorted((path for path in output.glob("checkpoint-*") if path.is_dir() and path.name.split("-")[-1].isdigit()),
                  key=step_of)


def save_checkpoint(output, vlm, policy, optimiser, step, scale, keep, dtype):
    """checkpoint-STEP: everything goes into a hidden folder, to the disk, and then one rename makes it the newest. All ranks
    call it; they share the file system."""
    final, temporary = output / f"checkpoint-{step}", output / f".checkpoint-{step}.tmp"
    main_rank = not dist.is_initialized() or dist.get_rank() == 0
    state, random_states = distributed.whole_state(policy, dtype), distributed.gathered([torch.get_rng_state()])
    spoilt = [name for name, weight in state.items() if not weight.isfinite().all()]
    if spoilt:
        raise InputError(f"{spoilt[0]} is not finite after step {step}; lower --lr or the reward's weights, the "
                         f"checkpoints in {cli.shown(output)} are from before it")
    try:
        if main_rank:
            temporary.mkdir(exist_ok=True)              # another rank's writer may be first
        distributed.save_state(policy, optimiser, temporary / "state")
        sums = distributed.checksums(temporary / "state")
        if main_rank:
            vlm.save(temporary, state)
            torch.save({"step": step, "scale": scale, "rng": random_states, "checksums": sums}, temporary / "training.pt")
            for path in (*temporary.rglob("*"), temporary, *output.glob("*.jsonl")):
                _to_disk(path)
            shutil.rmtree(final, ignore_errors=True)
            os.rename(temporary, final)
            _to_disk(output)
            for old in checkpoints(output)[:-keep]:
                shutil.rmtree(old)
    except torch.OutOfMemoryError:
        raise
    except (OSError, RuntimeError, CheckpointException) as error:           # a full disk raises each of them
        if main_rank:
            shutil.rmtree(temporary, ignore_errors=True)
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        raise InputError(f"{cli.shown(final)} cannot be written ({cli.reason(cause)}); is the disk full? The checkpoints "
                         "before it are whole, and the same command goes on from there") from error
    distributed.gathered([None])                   # no rank goes on, or leaves, before it is there


def _to_disk(path):
    """fsync a file or a folder."""
    number = os.open(path, os.O_RDONLY)
    os.fsync(number)
    os.close(number)


def load_checkpoint(checkpoint, policy, optimiser):
    """-> (step, scale). Fills in weights and optimiser, on any number of ranks, and this rank's random state. InputError, in a
    sentence, for one that has been damaged since it was written."""
    try:
        found = torch.load(checkpoint / "training.pt", weights_only=True)
        if distributed.checksums(checkpoint / "state") != found["checksums"]:
            raise ValueError("other bytes than were written")
        distributed.load_state(policy, optimiser, checkpoint / "state")
    except torch.OutOfMemoryError:
        raise
    except (Exception, CheckpointException) as error:       # a torn file raises many kinds, that one is no Exception
        earlier = [path.name for path in checkpoints(checkpoint.parent) if step_of(path) < step_of(checkpoint)]
        then = (f"remove it, and the same command goes on from {earlier[-1]}" if earlier else
                "there is none before it, so start again with --resume no")
        raise InputError(f"{cli.shown(checkpoint)} is damaged ({cli.reason(error)}); {then}") from error
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.set_rng_state(found["rng"][rank % len(found["rng"])])
    return found["step"], found["scale"]
