"""The run folder of a training: opened, saved to, resumed from, damage named in a sentence."""
import base64
import math
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from utils import cli, distributed, inputs, loading, locks, lora, state_files
from utils.cli import InputError
from utils.distributed import agreed
from utils.logs import logged_steps, write_json

# A resumed run may change these; every other setting must be the same. (More steps go on with the lr of the
# longer run.)
FREE = ("output", "steps", "save_every", "keep", "resume", "shard", "offload", "micro_batch", "micro_tokens",
        "memory",
        "activation_checkpointing", "clip_cache", "allow_outside", "patience", "picture_threads",
        "eval_every", "weights_every", "keep_weights", "log")

# `--resume from` may change these as well. With another batch size the order of the questions goes on
# elsewhere.
FREE_FROM_CHECKPOINT = ("lr", "batch_size", "max_grad_norm", "temperature", "mu", "clip_low", "clip_high",
                        "kl_beta")


TRAINING = "training.json"              # of a checkpoint: step, map from C to c, random states, checksums


def open_run(args, vlm, needs_before):
    """Rank 0 prepares the run folder -> (path, newest checkpoint or None) on every rank.

    A run with other settings, or of a file that has changed since, is moved aside. needs_before: a run that
    goes on must have the answers of the model before training.
    """
    def prepare_on_first_rank():
        if dist.is_initialized() and dist.get_rank():
            return None, None
        locks.hold(args.output)
        output, newest = prepare(args)
        # a class that cannot be saved fails now, not at its first checkpoint
        loading.save_processor(vlm, output)
        return output, newest
    output, newest = distributed.gathered([agreed(prepare_on_first_rank)])[0]
    if newest is not None and needs_before and not (output / "before.json").exists():
        raise InputError(f"{output} has lost before.json, the answers of the model before training; restore "
                         f"it, or start "
                         "again with --resume no")
    return output, newest


def prepare(args):
    """`open_run` without other ranks and the model."""
    output = Path(os.path.realpath(args.output)) if os.path.islink(args.output) else Path(args.output)
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {args.output!r} is a file; give a directory")
    sources = {"model": args.model, "clip": args.clip, "data": "" if args.data == "synthetic" else args.data}
    inputs.refuse_as_output(args.output, **sources)
    old = _stored_settings(output)
    settings = settings_of(args) | inputs.fingerprints(old or {}, **sources)
    settings["data_checksum"] = settings["data_checksum"] or 0
    if old is not None:
        # A key that one side lacks means its default: neither a new setting nor a removed one orphans a run.
        # An older run has kept no checksum of its models.
        defaults = settings_of(type(args)()) | {name: value for name, value in settings.items()
                                                if name.endswith("_checksum") or name == "stamps"}
        other = [key for key, value in settings.items() if key not in (*FREE, "stamps")
                 and old.get(key, defaults.get(key)) != value]
        done = checkpoints(output)
        longer = bool(done) and step_of(done[-1]) > args.steps
        lost = not done and _lost_steps(output, old)
        if args.run.resume == "from":
            settings["history"] = _history(args, old, settings, other, done, longer)
        elif args.run.resume == "no" or other or longer or lost:
            why = ("more steps" if longer else f"{lost} steps whose checkpoints are gone" if lost
                   else "an earlier run")
            _move_aside(output, f"other settings ({', '.join(other)})" if other else why, args)
        elif not done and _final_model(output):
            raise InputError(f"--output {args.output!r} is a finished run whose checkpoints are gone; its "
                             "model and logs stay as they are. To train again, add --resume no, which moves "
                             "it aside, or choose another folder")
        elif isinstance(old.get("history"), list):
            settings["history"] = old["history"]
    elif args.run.resume == "from":
        raise InputError(f"--resume from: {args.output!r} holds no run to go on with; leave the flag out")
    for replaced in output.glob(".checkpoint-*.old.tmp"):              # a kill between two renames
        if not (final := output / replaced.name[1:-len(".old.tmp")]).exists():
            os.rename(replaced, final)
    for torn in output.glob(".checkpoint-*.tmp"):  # of a kill while it was written; makes room, so first
        shutil.rmtree(torn, ignore_errors=True)
    done = checkpoints(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not (done and done[-1].name == f"checkpoint-{args.steps}"):
            _keep_shorter_run(output, old)
        write_json(output / "args.json", settings)
    except OSError as error:
        raise InputError(f"--output {args.output!r} cannot be written ({error.strerror}); choose another "
                         f"folder") from error
    return output, done[-1] if done else None


def _stored_settings(output):
    """The settings in a run folder (dict), None where there is no run yet. InputError for another folder."""
    # what a kill has left of the very first file is no run yet
    if not output.is_dir() or all(path.name in ("args.json.tmp", ".lock") for path in output.iterdir()):
        return None
    try:
        return dict(cli.parse_json((output / "args.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"--output {str(output)!r} holds something that is not a run; choose another "
                         f"folder") from error


def _move_aside(output, why, args):
    """Rename a run folder to the next free name."""
    aside = next(p for i in range(1, 10**6) if not (p := output.with_name(f"{output.name}-{i}")).exists())
    try:
        output.rename(aside)
    except OSError as error:
        raise InputError(f"--output {args.output!r} holds {why} and cannot be moved to {aside} "
                         f"({error.strerror}); "
                         "choose another folder") from error
    print(cli.printable(f"{args.output} held {why}: moved to {aside}"))


def _final_model(output):
    """The weights of the final model in a run folder (list)."""
    return [*output.glob("model*.safetensors*"), *output.glob("adapter_model.safetensors")]


def _lost_steps(output, old):
    """Steps in the log of an unfinished run that were in a checkpoint once (int). No more than --save_every
    is a run that was killed before its first one."""
    if _final_model(output):
        return 0
    every = old.get("save_every")
    steps = logged_steps(output)
    return steps if isinstance(every, int) and steps > every else 0


def _keep_shorter_run(output, old):
    """Move what a run of fewer steps has finished into a folder of its own, before this one goes on from
    it."""
    if not _final_model(output) and not (output / "after.json").exists():
        return
    steps = (old or {}).get("steps")
    folder = output / f"finished-{steps if isinstance(steps, int) else 0}"
    folder.mkdir(exist_ok=True)
    for pattern in ("*.json", "*.jinja", "*.txt", "*.model"):          # what opens it
        for path in output.glob(pattern):
            if path.name not in ("args.json", "before.json", "after.json"):
                shutil.copy2(path, folder)
    for name in ("after.json", "confidence.json", "report.png", "adapter", "adapter_config.json"):
        if (output / name).exists():
            os.replace(output / name, folder / name)
    for path in _final_model(output):                                  # last: they say that it was finished
        os.replace(path, folder / path.name)
    print(cli.printable(f"{output}: the model so far is kept in {folder}"))


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
    def finish():
        if not main_rank:
            return
        loading.save(vlm, temporary, state)
        write_json(temporary / TRAINING, {"step": step, "scale": confidence_map, "checksums": sums, "rng": [
            base64.b64encode(random_state.numpy().tobytes()).decode() for random_state in random_states]})
        for path in (*temporary.rglob("*"), temporary, *output.glob("*.jsonl")):
            _to_disk(path)
        if final.exists():                          # never without one of the two
            os.rename(final, output / f".checkpoint-{step}.old.tmp")
        os.rename(temporary, final)
        _to_disk(output)
        for old in (output / f".checkpoint-{step}.old.tmp", *checkpoints(output)[:-keep]):
            if not old.is_symlink():                # the user has moved it to another disk
                shutil.rmtree(old, ignore_errors=True)

    try:
        if main_rank:
            temporary.mkdir(exist_ok=True)              # another rank's writer may be first
        distributed.save_state(policy, optimizer, temporary / "state")
        sums = distributed.checksums(temporary / "state")
        distributed.together(finish)
    except torch.OutOfMemoryError:
        raise
    except state_files.ERRORS as error:             # a full disk raises many kinds
        if main_rank:
            shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(f"{cli.shown(final)} cannot be written ({cli.reason(error)}); is the disk full? "
                         f"The checkpoints "
                         "before it are whole, and the same command goes on from there") from error


def save_weights(output, vlm, policy, step, run, dtype):
    """weights-STEP, a model that `VLM.load` opens, every --weights_every steps; the newest --keep_weights of
    them stay. All ranks call it."""
    if not run.weights_every or step % run.weights_every:
        return
    state = distributed.full_state_dict(policy, dtype)

    def write():
        if dist.is_initialized() and dist.get_rank():
            return
        final, temporary = output / f"weights-{step}", output / f".weights-{step}.tmp"
        loading.save(vlm, temporary, state)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)
        saved = sorted(output.glob("weights-*"), key=step_of)
        for old in saved[:-run.keep_weights]:
            shutil.rmtree(old, ignore_errors=True)
    try:
        distributed.together(write)
    except OSError as error:
        raise InputError(f"{cli.shown(output / f'weights-{step}')} cannot be written ({cli.reason(error)}); "
                         f"is the disk full? The same command goes on from the newest checkpoint") from error


def save_model(output, vlm, policy, dtype, merge):
    """Write the final model: of an adapted one the adapter, or with merge both. All ranks call it."""
    state = distributed.full_state_dict(policy, dtype)
    merged = distributed.full_state_dict(policy, dtype, frozen=True) if merge else None
    if distributed.place()[0]:
        return
    if merge:
        loading.save(vlm, output / "adapter", state)
        state = lora.merged_state(vlm.model, merged)
    loading.save(vlm, output, state)


def _to_disk(path):
    """fsync a file or a folder."""
    number = os.open(path, os.O_RDONLY)
    os.fsync(number)
    os.close(number)


def load_checkpoint(checkpoint, policy, optimizer):
    """Fill in weights, optimizer and this rank's random state, on any number of ranks -> (step, map from C to
    c).

    InputError, in a sentence, for a checkpoint that has been damaged since it was written. Nothing in it is
    run: it holds JSON and safetensors.
    """
    earlier = [path.name for path in checkpoints(checkpoint.parent) if step_of(path) < step_of(checkpoint)]
    then = (f"remove it, and the same command goes on from {earlier[-1]}" if earlier else
            "there is none before it, so start again with --resume no")
    if (checkpoint / "training.pt").exists():
        raise InputError(f"{cli.shown(checkpoint)} was written by an earlier version, in pickles, which are "
                         f"not read; {then}")
    rank = dist.get_rank() if dist.is_initialized() else 0
    try:
        stored = _read_training(checkpoint)
        if distributed.checksums(checkpoint / "state") != stored["checksums"]:
            raise ValueError("other bytes than were written")
        distributed.load_state(policy, optimizer, checkpoint / "state")
        torch.set_rng_state(stored["rng"][rank % len(stored["rng"])])
    except torch.OutOfMemoryError:
        raise
    except Exception as error:                      # a torn file raises many kinds
        raise InputError(f"{cli.shown(checkpoint)} is damaged ({cli.reason(error)}); {then}") from error
    return stored["step"], stored["scale"]


def _read_training(checkpoint):
    """training.json of a checkpoint (dict), random states as tensors. Raises OSError, KeyError, TypeError or
    ValueError."""
    stored = cli.parse_json((checkpoint / TRAINING).read_text())
    if stored["step"] != step_of(checkpoint):
        raise ValueError(f"{TRAINING} is of step {str(stored['step'])[:20]}")
    for name, value in dict(stored["scale"]).items():
        if not math.isfinite(value):
            raise ValueError(f"{TRAINING} has the {name[:20]} {value}")
    stored["rng"] = [torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
                     for text in stored["rng"]]
    return stored
