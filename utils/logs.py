"""What a training run writes down: one line of metrics.jsonl a step, samples.jsonl, trimmed after a resume."""
import json
import math
import sys
from pathlib import Path

import torch

from utils import cli
from utils.distributed import gathered, summed


def statistics(views, device="cpu"):
    """Every reward term, confidence, length and entropy, per view (dict of floats). Means over this rank's rollouts, each
    weighed so that the ranks' mean is that over all rollouts; what is no mean over rollouts (std, entropy, words) is that of
    all ranks' here."""
    stats = {}
    for view in views:
        flat = [r for group in view.rollouts for r in group]
        total = sum(view.terms.values())
        c, logprobs = view.confidence.double(), torch.cat([r.logprobs for r in flat]).double()
        count, c_sum, squares, tokens, logprob, ranks = summed(
            [c.numel(), c.sum(), (c**2).sum(), len(logprobs), logprobs.sum(), 1], device)
        share = c.numel() * ranks / count                   # not 1 where ranks have unlike numbers of noised twins
        means = {"reward": total.mean(), **{name: term.mean() for name, term in view.terms.items()},
                 "confidence": view.confidence.mean(),
                 "length": sum(len(r.tokens) for r in flat) / len(flat),
                 "truncated": sum(not r.finished for r in flat) / len(flat),
                 "zero_variance": (total.std(-1) < 1e-6).float().mean(),
                 "distinct": sum(len({r.text for r in group}) / len(group) for group in view.rollouts) / len(view.rollouts)}
        row = {name: value * share for name, value in means.items()}
        row |= {"confidence_std": math.sqrt(max(0.0, squares - c_sum**2 / count) / max(1, count - 1)),
                # minus the mean log-prob of what was sampled: an unbiased estimate of the policy's entropy a token
                "entropy": -logprob / tokens,
                "words": len(set(gathered(sorted({word for r in flat for word in r.text.split()}))))}
        stats |= {f"{view.name}/{name}": float(value) for name, value in row.items()}
    if len(views) > 1:
        gap = (views[0].confidence[:len(views[1].confidence)] - views[1].confidence).mean(-1)               # (P,)
        for name, chosen in (("gap", ~views[0].control), ("gap/controls", views[0].control)):
            total, ranks = summed([chosen.sum(), 1], device)
            if total:                   # the mean over all ranks' questions, once the ranks' values are averaged
                stats[name] = float(gap[chosen].sum()) * ranks / total
    return stats


def log_row(step, stats, updates, lr, device, world):
    """One line of metrics.jsonl: means over ranks and over the mu updates."""
    keys = list(stats)
    means = dict(zip(keys, [v / world for v in summed([stats[k] for k in keys], device)]))
    sums = {key: sum(u[key] for u in updates) for key in ("loss", "pathwise", "kl", "clipped", "tokens")}
    sums = dict(zip(sums, summed(list(sums.values()), device)))
    tokens = max(1.0, sums["tokens"])
    return {"step": step, **means, "loss": sums["loss"] / len(updates), "pathwise": sums["pathwise"] / len(updates),
            "kl": sums["kl"] / tokens, "clipped": sums["clipped"] / tokens,
            "grad_norm": sum(u["grad_norm"] for u in updates) / len(updates), "lr": lr}


def write_step(output, row, samples, views):
    """Append to metrics.jsonl, and the first two questions' first rollouts with their terms to samples.jsonl."""
    with open(output / "metrics.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    with open(output / "samples.jsonl", "a") as file:
        for view in views:
            for q, sample in enumerate(samples[:min(2, len(view.rollouts))]):
                terms = {name: float(term[q, 0]) for name, term in view.terms.items()}
                record = {"step": row["step"], "view": view.name, "id": sample.id, "text": view.rollouts[q][0].text,
                          "answer": sample.answer, "confidence": float(view.confidence[q, 0]), **terms}
                file.write(json.dumps(record) + "\n")


def training_log(folder):
    """The lines of a run folder's metrics.jsonl, an empty list where there is none."""
    log = Path(folder) / "metrics.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines() if line.strip()] if log.is_file() else []


def smoothed(points, most=60):
    """[(x, y), ...] -> at most so many means of neighbours."""
    size = math.ceil(len(points) / most)
    parts = [points[i:i + size] for i in range(0, len(points), size)]
    return [tuple(sum(column) / len(part) for column in zip(*part)) for part in parts]


def write_json(path, value):
    cli.write_atomically(path, json.dumps(value, indent=1))


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
    cli.write_atomically(path, "".join(kept))
