"""What a training run writes down: one line of metrics.jsonl a step, samples.jsonl, trimmed after a
resume."""
import json
import math
from functools import lru_cache
from pathlib import Path

import torch

from utils import cli
from utils.distributed import gathered, summed

# What a micro-batch adds up for the log: the loss and its pathwise part; KL and clipped ratios, and the
# tokens they are of.
LOSS_SUMS = ("loss", "pathwise", "kl", "clipped", "tokens")


def statistics(batches):
    """Every reward term, confidence, length and entropy of each view (dict of floats).

    Each mean is scaled so that averaging it over ranks gives the mean over all rollouts. Std, entropy and the
    word count are not means: they are already reduced over all ranks. batches: RolloutBatch of the original,
    and of the noised view.
    """
    stats = {}
    for batch in batches:
        rollouts = [r for group in batch.rollouts for r in group]
        total = sum(batch.rewards.values())
        c, logprobs = batch.confidence.double(), torch.cat([r.logprobs for r in rollouts]).double()
        count, c_sum, squares, tokens, logprob = summed([c.numel(), c.sum(), (c**2).sum(), len(logprobs),
                                                         logprobs.sum()])
        means = {"reward": total.mean(), **{name: term.mean() for name, term in batch.rewards.items()},
                 "confidence": batch.confidence.mean(),
                 "length": sum(len(r.tokens) for r in rollouts) / len(rollouts),
                 "truncated": sum(not r.finished for r in rollouts) / len(rollouts),
                 "zero_variance": batch.is_tied.float().mean(),
                 "distinct": sum(len({r.text for r in group}) / len(group)
                                 for group in batch.rollouts) / len(batch.rollouts),
                 "confidence_std": math.sqrt(max(0.0, squares - c_sum**2 / count) / max(1, count - 1)),
                 # minus the mean log-prob of the sampled tokens: an unbiased estimate of the policy's entropy
                 # per token
                 "entropy": -logprob / tokens,
                 "words": len(set(gathered(sorted({word for r in rollouts for word in r.text.split()}))))}
        stats |= {f"{batch.view}/{name}": float(value) for name, value in means.items()}
    if len(batches) > 1:
        original, noised = batches
        gap = (original.confidence - noised.confidence).mean(-1)                                    # (Q,)
        for name, chosen in (("gap", ~original.is_control), ("gap/controls", original.is_control)):
            total, ranks = summed([chosen.sum(), 1])
            if total:  # the mean over all ranks' questions, once the ranks' values are averaged
                stats[name] = float(gap[chosen].sum()) * ranks / total
        overlaps = [twin.overlap for pictures in noised.images for twin in pictures
                    if getattr(twin, "overlap", None) is not None]
        total, count, ranks = summed([sum(overlaps), len(overlaps), 1])
        if count:           # what the controls cover of the key region all the same
            stats["overlap/controls"] = total / count
    return stats


def log_row(step, batches, updates, lr):
    """One line of metrics.jsonl (dict): means over ranks and over the --mu updates."""
    stats = statistics(batches)
    *totals, ranks = summed([*stats.values(), 1])
    means = {name: total / ranks for name, total in zip(stats, totals)}
    sums = dict(zip(LOSS_SUMS, summed([sum(update[name] for update in updates) for name in LOSS_SUMS])))
    tokens = max(1.0, sums["tokens"])
    return {"step": step, **means, "loss": sums["loss"] / len(updates),
            "pathwise": sums["pathwise"] / len(updates),
            "kl": sums["kl"] / tokens, "clipped": sums["clipped"] / tokens,
            "grad_norm": sum(update["grad_norm"] for update in updates) / len(updates), "lr": lr}


def postfix(row):
    """What the progress bar shows of a line of metrics.jsonl (dict of str)."""
    return {"reward": f"{row['original/reward']:.2f}", "right": f"{row['original/outcome']:.2f}",
            "gap": f"{row.get('gap', math.nan):.2f}"}


@lru_cache(1)
def tracker(kind, output):
    """Where a line of metrics.jsonl goes as well -> function(row). kind: "none", "tensorboard" or "wandb"."""
    if kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(str(output / "tensorboard"))

        def track(row):
            for name, value in row.items():
                writer.add_scalar(name, value, row["step"])
            writer.flush()
        return track
    if kind == "wandb":
        import wandb
        run = wandb.init(project="cdrl", name=output.name, dir=str(output), resume="allow", id=output.name,
                         config=cli.parse_json((output / "args.json").read_text()))
        return lambda row: run.log(row, step=row["step"])
    return lambda row: None


def write_step(output, row, samples, batches, args):
    """Append to metrics.jsonl (and --log), and to samples.jsonl all that rebuilds the step's first two
    questions by hand."""
    tracker(args.run.log, output)(row)
    with open(output / "metrics.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    with open(output / "samples.jsonl", "a") as file:
        for batch in batches:
            for q, sample in enumerate(samples[:2]):
                for g, rollout in enumerate(batch.rollouts[q]):
                    file.write(json.dumps({
                        "step": row["step"], "view": batch.view, "id": sample.id, "rollout": g,
                        "text": rollout.text,
                        "answer": sample.answer, "control": bool(batch.is_control[q]),
                        "confidence": float(batch.confidence[q, g]), "finished": rollout.finished,
                        "logprob": float(rollout.logprobs.mean()), "tokens": len(rollout.tokens),
                        **{name: float(term[q, g]) for name, term in batch.rewards.items()},
                        "advantage": float(batch.advantages[q, g])}) + "\n")


def _rows(path):
    """(line, row) of a log's lines that are whole: JSON objects with a step."""
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            row = cli.parse_json(line)
            if isinstance(row, dict) and type(row["step"]) is int:
                yield line, row
        except (ValueError, KeyError, RecursionError):
            pass


def training_log(folder):
    """The lines of a run folder's metrics.jsonl, an empty list where there is none. Lines that are torn, or
    that lack what the last one has, are left out and counted on stderr."""
    path = Path(folder) / "metrics.jsonl"
    rows = [row for _, row in _rows(path) if all(type(value) in (int, float) for value in row.values())]
    names = {name for name in (rows[-1] if rows else ()) if not name.startswith("gap")}
    complete = [row for row in rows if names <= row.keys()]
    lines = sum(bool(line.strip()) for line in path.read_text(errors="replace").splitlines()) if rows else 0
    if lines > len(complete):
        cli.warn(f"{path}: {lines - len(complete)} lines are damaged, and left out")
    return complete


def smoothed(points, most=60):
    """[(x, y), ...] -> at most so many means of neighbours."""
    size = math.ceil(len(points) / most)
    chunks = [points[i:i + size] for i in range(0, len(points), size)]
    return [tuple(sum(column) / len(chunk) for column in zip(*chunk)) for chunk in chunks]


def write_json(path, value):
    cli.write_atomically(path, json.dumps(value, indent=1))


def logged_steps(output):
    """Steps in a run folder's metrics.jsonl (int), torn lines apart."""
    return len({row["step"] for _, row in _rows(output / "metrics.jsonl")})


def trim_logs(output, step):
    """Drop the lines of steps that a resumed run will do again, and torn ones.

    Says on stderr where earlier steps are missing.
    """
    for path in output.glob("eval-*.json"):
        if path.stem[5:].isdecimal() and int(path.stem[5:]) > step:
            path.unlink()
    for path in (output / "metrics.jsonl", output / "samples.jsonl"):
        earlier = [(line + "\n", row["step"]) for line, row in _rows(path) if row["step"] < step]
        if lost := step - len({number for _, number in earlier}):
            cli.warn(f"{path} has lost {lost} of the {step} steps so far: it, and what is drawn from it, "
                     "goes on without them")
        cli.write_atomically(path, "".join(line for line, _ in earlier))
