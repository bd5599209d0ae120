"""The run folder of a training: opened, saved to, resumed from, damage named in a sentence."""
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from utils import cli, distributed, loading
from utils.cli import InputError
from utils.logs import write_json
from utils.preflight import agreed

# A resumed run may change these; every other setting must be the same. (More steps go on with the lr of the
# longer run.)
FREE = ("output", "steps", "save_every", "keep", "resume", "shard", "offload", "micro_batch", "micro_tokens",
        "memory",
        "activation_checkpointing", "clip_cache", "allow_outside", "patience")

# `--resume from` may change these as well. With another batch size the order of the questions goes on
# elsewhere.
FREE_FROM_CHECKPOINT = ("lr", "batch_size", "max_grad_norm", "temperature", "mu", "clip_low", "clip_high",
                        "kl_beta")


def open_run(args, vlm, needs_before):
    """Rank 0 prepares the run folder -> (path, newest checkpoint or None) on every rank.

    A run with other settings, or of a file that has changed since, is moved aside. needs_before: a run that
    goes on must have the answers of the model before training.
    """
    def prepare_on_first_rank():
        if dist.is_initialized() and dist.get_rank():
            return None, None
        output, newest = prepare(args)
        loading.save_processor(vlm,
                               output)  # a class that cannot be saved fails now, not at its first checkpoint
        return output, newest
    output, newest = distributed.gathered([agreed(prepare_on_first_rank)])[0]
    if newest is not None and needs_before and not (output / "before.json").exists():
        raise InputError(f"{output} has lost before.json, the answers of the model before training; restore "
                         f"it, or start "
                         "again with --resume no")
    return output, newest


def prepare(args):
    """`open_run` without other ranks and the model."""
    output = Path(args.output)
    settings = settings_of(args) | {"data_checksum": 0 if args.data == "synthetic"
                                    else cli.checksum(Path(args.data))}
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {args.output!r} is a file; give a directory")
    # what a kill has left of the very first file is no run yet
    if output.is_dir() and any(path.name != "args.json.tmp" for path in output.iterdir()):
        try:
            old = dict(json.loads((output / "args.json").read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"--output {args.output!r} holds something that is not a run; choose another "
                             f"folder") from error
        # A key that one side lacks means its default: neither a new setting nor a removed one orphans a run.
        defaults = settings_of(type(args)())
        other = [key for key, value in settings.items() if key not in FREE
                 and old.get(key, defaults.get(key)) != value]
        done = checkpoints(output)
        longer = bool(done) and step_of(done[-1]) > args.steps
        if args.run.resume == "from":
            settings["history"] = _history(args, old, settings, other, done, longer)
        elif args.run.resume == "no" or other or longer:
            aside = next(p for i in range(1, 10**6)
                         if not (p := output.with_name(f"{output.name}-{i}")).exists())
            why = "more steps" if longer else "an earlier run"
            why = f"other settings ({', '.join(other)})" if other else why
            try:
                output.rename(aside)
            except OSError as error:
                raise InputError(f"--output {args.output!r} holds {why} and cannot be moved to {aside} "
                                 f"({error.strerror}); "
                                 "choose another folder") from error
            print(f"{args.output} held {why}: moved to {aside}")
        elif "history" in old:
            settings["history"] = old["history"]
    elif args.run.resume == "from":
        raise InputError(f"--resume from: {args.output!r} holds no run to go on with; leave the flag out")
    for torn in output.glob(".checkpoint-*.tmp"):  # of a kill while it was written; makes room, so first
        shutil.rmtree(torn, ignore_errors=True)
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "args.json", settings)
    except OSError as error:
        raise InputError(f"--output {args.output!r} cannot be written ({error.strerror}); choose another "
                         f"folder") from error
    done = checkpoints(output)
    if not (done and done[-1].name == f"checkpoint-{args.steps}"):
        for old in (output / "after.json",
                    *output.glob("model*.safetensors*")):    # of an earlier, shorter run in this folder
            old.unlink(missing_ok=True)
    return output, done[-1] if done else None


def settings_of(args):
    """All settings of a run, of the method and of how it is run, in one flat dict."""
    settings = asdict(args)
    return settings | settings.pop("run")


def _history(args, old, settings, changed, done, longer):
    """What `--resume from` changes, after what earlier ones did -> list for args.json. InputError where it
    cannot go on."""
    fixed = [key for key in changed if key not in FREE_FROM_CHECKPOINT]
    if fixed or longer or not done:
        free = ", ".join(("steps", *FREE_FROM_CHECKPOINT))
        why = (f"cannot change {', '.join(fixed)}; it may change {free}" if fixed else
               f"cannot go back to --steps {args.steps}" if longer
               else f"finds no checkpoint in {args.output!r}")
        raise InputError(f"--resume from {why}; choose another --output")
    step = step_of(done[-1])
    changes = {key: [old.get(key), settings[key]] for key in ("steps", *changed)
               if old.get(key) != settings[key]}
    listed = ", ".join(f"{key} {before} -> {after}" for key,
                       (before, after) in changes.items()) or "nothing changed"
    print(f"{args.output}: goes on from step {step} with {listed}")
    return [*old.get("history", []), {"step": step, "changes": changes}]


def step_of(checkpoint):
    return int(checkpoint.name.split("-")[-1])


def checkpoints(output):
    """Complete checkpoints, oldest first."""
    return sorted((path for path in output.glob("checkpoint-*") if path.is_dir()
                   and path.name.split("-")[-1].isdigit()),
                  key=step_of)


def save_checkpoint(output, vlm, policy, optimizer, step, confidence_map, keep, dtype):
    """checkpoint-STEP: everything goes into a hidden folder, to the disk, and then one rename makes it the
    newest. All ranks call it; they share the file system."""
    final, temporary = output / f"checkpoint-{step}", output / f".checkpoint-{step}.tmp"
    main_rank = not dist.is_initialized() or dist.get_rank() == 0
    state, random_states = distributed.full_state_dict(policy,
                                                       dtype), distributed.gathered([torch.get_rng_state()])
    spoilt = [name for name, weight in state.items() if not weight.isfinite().all()]
    if spoilt:
        raise InputError(f"{spoilt[0]} is not finite after step {step}; lower --lr or the reward's weights; "
                         f"the same "
                         f"command with a lower --lr and --resume from goes on from the newest checkpoint in "
                         f"{cli.shown(output)}")
    try:
        if main_rank:
            temporary.mkdir(exist_ok=True)              # another rank's writer may be first
        distributed.save_state(policy, optimizer, temporary / "state")
        sums = distributed.checksums(temporary / "state")
        if main_rank:
            loading.save(vlm, temporary, state)
            torch.save({"step": step, "scale": confidence_map, "rng": random_states, "checksums": sums},
                       temporary / "training.pt")
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
        raise InputError(f"{cli.shown(final)} cannot be written ({cli.reason(cause)}); is the disk full? "
                         f"The checkpoints "
                         "before it are whole, and the same command goes on from there") from error
    distributed.gathered([None])                   # no rank goes on, or leaves, before it is there


def _to_disk(path):
    """fsync a file or a folder."""
    number = os.open(path, os.O_RDONLY)
    os.fsync(number)
    os.close(number)


def load_checkpoint(checkpoint, policy, optimizer):
    """Fill in weights, optimizer and this rank's random state, on any number of ranks -> (step, map from C to
    c).

    InputError, in a sentence, for a checkpoint that has been damaged since it was written.
    """
    try:
        stored = torch.load(checkpoint / "training.pt", weights_only=True)
        if distributed.checksums(checkpoint / "state") != stored["checksums"]:
            raise ValueError("other bytes than were written")
        distributed.load_state(policy, optimizer, checkpoint / "state")
    except torch.OutOfMemoryError:
        raise
    # a torn file raises many kinds, that one is no Exception
    except (Exception, CheckpointException) as error:
        earlier = [path.name for path in checkpoints(checkpoint.parent)
                   if step_of(path) < step_of(checkpoint)]
        then = (f"remove it, and the same command goes on from {earlier[-1]}" if earlier else
                "there is none before it, so start again with --resume no")
        raise InputError(f"{cli.shown(checkpoint)} is damaged ({cli.reason(error)}); {then}") from error
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.set_rng_state(stored["rng"][rank % len(stored["rng"])])
    return stored["step"], stored["scale"]
