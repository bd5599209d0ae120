"""The folder of a training run: what is in it, how it is written so that a kill at any moment leaves it usable, its report.

    args.json  metrics.jsonl  samples.jsonl  before.json  after.json  confidence.json  report.png  the final model
    checkpoint-STEP/    the model in Hugging Face form; state/: fp32 weights and optimiser, each rank's share; training.pt: the
                        step, which is also the position in the data, the scale of C, each rank's random state, checksums
"""
import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

import data
import parallel
import probe
from data import InputError
from report import smoothed

# A resumed run may change these; every other setting must be the same. (More steps go on with the lr of the longer run.)
FREE = ("output", "steps", "save_every", "keep", "resume", "shard", "offload", "micro_batch", "micro_tokens", "memory",
        "activation_checkpointing", "clip_cache")


def write_json(path, value):
    data.write_atomically(path, json.dumps(value, indent=1))


def open_run(args):
    """Prepare the run folder -> (path, newest checkpoint or None). A run with other settings, or of a file that has changed
    since, is moved aside."""
    output = Path(args.output)
    settings = asdict(args) | {"data_checksum": 0 if args.data == "synthetic" else data.checksum(Path(args.data))}
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
    state, random_states = parallel.whole_state(policy, dtype), parallel.gathered([torch.get_rng_state()])
    spoilt = [name for name, weight in state.items() if not weight.isfinite().all()]
    if spoilt:
        raise InputError(f"{spoilt[0]} is not finite after step {step}; lower --lr or the reward's weights, the "
                         f"checkpoints in {data.shown(output)} are from before it")
    try:
        if main_rank:
            temporary.mkdir(exist_ok=True)              # another rank's writer may be first
        parallel.save_state(policy, optimiser, temporary / "state")
        sums = parallel.checksums(temporary / "state")
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
        raise InputError(f"{data.shown(final)} cannot be written ({data.reason(cause)}); is the disk full? The checkpoints "
                         "before it are whole, and the same command goes on from there") from error
    parallel.gathered([None])                   # no rank goes on, or leaves, before it is there


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
        if parallel.checksums(checkpoint / "state") != found["checksums"]:
            raise ValueError("other bytes than were written")
        parallel.load_state(policy, optimiser, checkpoint / "state")
    except torch.OutOfMemoryError:
        raise
    except (Exception, CheckpointException) as error:       # a torn file raises many kinds, that one is no Exception
        earlier = [path.name for path in checkpoints(checkpoint.parent) if step_of(path) < step_of(checkpoint)]
        then = (f"remove it, and the same command goes on from {earlier[-1]}" if earlier else
                "there is none before it, so start again with --resume no")
        raise InputError(f"{data.shown(checkpoint)} is damaged ({data.reason(error)}); {then}") from error
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.set_rng_state(found["rng"][rank % len(found["rng"])])
    return found["step"], found["scale"]


def trim_log(path, step):
    """Drop the lines of steps that a resumed run will do again, and torn ones. Says on stderr where earlier ones are lost."""
    kept, seen = [], set()
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            if (number := json.loads(line)["step"]) < step:
                kept.append(line + "\n")
                seen.add(number)
        except (json.JSONDecodeError, KeyError, TypeError):
            pass
    if lost := step - len(seen):
        print(f"{path} has lost {lost} of the {step} steps so far: it, and what is drawn from it, goes on without them",
              file=sys.stderr)
    data.write_atomically(path, "".join(kept))


def draw_report(output, before, after, args):
    """report.png: reward and gap over steps; reliability; accuracy and confidence against noise, before and after."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    log = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    figure, axes = pyplot.subplots(2, 3, figsize=(14, 8))
    for axis, key, color in ((axes[0, 0], "original/reward", "tab:blue"), (axes[0, 0], "original/outcome", "tab:orange"),
                             (axes[0, 0], "noised/reward", "tab:green"), (axes[0, 1], "gap", "tab:green")):
        points = [(row["step"], row[key]) for row in log if key in row]
        if points:
            axis.plot(*zip(*points), color=color, alpha=0.25)
            axis.plot(*zip(*smoothed(points)), color=color, label=key)
    axes[0, 0].set(xlabel="step", title="Reward")
    axes[0, 0].legend(fontsize=8)
    axes[0, 1].set(xlabel="step", title="Gap C - C' while training")
    probe.plot_reliability(axes[0, 2], {"before": before[0], "after": after[0]})
    named = {"before": before, "after": after}
    for axis, name, label in ((axes[1, 0], "correct", "accuracy"), (axes[1, 1], "token_probability", "mean token probability"),
                              (axes[1, 2], "confidence", "confidence C")):
        probe.plot_probe(axis, named, name, label)
    figure.suptitle(f"{args.recipe}, {len(log)} steps; below: noise on the {args.region} region of held-out questions")
    figure.tight_layout()
    figure.savefig(output / "report.png", dpi=110)
    pyplot.close(figure)
