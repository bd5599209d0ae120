"""Does the model know when it does not know? Metrics, and the probe of the paper's Figure 1.

    python eval.py --model runs/cdrl --baseline tiny/base     # the probe for both: table, probe.json, probe.png

The probe noises a region of each picture step by step and reads accuracy and confidence: a model that knows that it
cannot see loses confidence where it loses accuracy. Sampled at T = 1, n answers a question, each scored alone (pass@1).

Not here yet: the benchmarks, the voting methods and the HTML report.
"""
import argparse
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
from data import InputError, command
from noise import CLIP, MODES, ClipAttention, make_pair, parse_t
from reward import extract_answer, is_correct
from vlm import VLM

HERE = Path(__file__).resolve().parent
PROBE_STEPS = (0, 300, 500, 700, 850, 999)


# ---------------------------------------------------------------------------------------------------------------------
# Metrics of (confidence, correct)

def _tied(confidence, correct):
    """Correctness, most confident first, ties replaced by their mean: the expected value under a random order of ties."""
    order = np.argsort(-confidence, kind="stable")
    ranked, correct = confidence[order], correct[order]
    edges = np.flatnonzero(np.diff(ranked)) + 1
    return np.concatenate([np.full(len(part), part.mean()) for part in np.split(correct, edges)])


def auroc(confidence, correct):
    """P(a right answer is more confident than a wrong one), ties count half; nan when all are right or all wrong."""
    right, wrong = int(correct.sum()), int(len(correct) - correct.sum())
    if not right or not wrong:
        return float("nan")
    _, where, counts = np.unique(confidence, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[where]
    return float((ranks[correct == 1].sum() - right * (right + 1) / 2) / (right * wrong))


def average_precision_of_errors(confidence, correct):
    """AUPR with wrong answers as the positive class and low confidence as the score; nan when nothing is wrong."""
    errors = 1 - correct
    if not errors.sum():
        return float("nan")
    order = np.argsort(confidence, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(confidence[order])), len(order) - 1)     # one threshold a distinct value
    found = np.cumsum(errors[order])[ends]
    return float(np.sum(np.diff(found, prepend=0) / errors.sum() * found / (ends + 1)))


def calibration_error(confidence, correct, bins=15, mass=False):
    """ECE: mean |accuracy - confidence| over bins of equal width, (lower, upper] each, or of equal mass."""
    if mass:
        groups = np.array_split(np.argsort(confidence, kind="stable"), min(bins, len(confidence)))
    else:
        index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
        groups = [np.flatnonzero(index == b) for b in range(bins)]
    return float(sum(abs(correct[g].sum() - confidence[g].sum()) for g in groups) / len(confidence))


def metrics(confidence, correct, groups=None):
    """Everything about one list of answers -> dict of floats.

    confidence (N,) any real numbers, higher = surer; correct (N,) 0/1; groups (N,) labels: the same metrics within each
    under "groups". accuracy, auroc, aupr (errors), aurc, eaurc, accuracy at 50/80/90% coverage; ece, ece_mass and brier
    only when every confidence lies in [0, 1], else nan. Raises ValueError on empty, unequal or non-finite input.
    """
    confidence, correct = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if confidence.ndim != 1 or confidence.shape != correct.shape or not len(confidence):
        raise ValueError(f"confidence {confidence.shape} and correct {correct.shape}: two equally long lists are needed")
    if not np.isfinite(confidence).all() or not np.isin(correct, (0, 1)).all():
        raise ValueError("confidence must be finite and correct 0 or 1")
    kept = _tied(confidence, correct)
    counts = np.arange(1, len(kept) + 1)
    risk, best = 1 - np.cumsum(kept) / counts, 1 - np.cumsum(np.sort(correct)[::-1]) / counts
    is_probability = confidence.min() >= 0 and confidence.max() <= 1
    nan = float("nan")
    result = {
        "n": len(correct), "accuracy": float(correct.mean()), "auroc": auroc(confidence, correct),
        "ece": calibration_error(confidence, correct) if is_probability else nan,
        "ece_mass": calibration_error(confidence, correct, mass=True) if is_probability else nan,
        "brier": float(((confidence - correct) ** 2).mean()) if is_probability else nan,
        "aupr": average_precision_of_errors(confidence, correct),
        "aurc": float(risk.mean()), "eaurc": float(risk.mean() - best.mean()),
    }
    for coverage in (50, 80, 90):
        result[f"accuracy@{coverage}"] = float(kept[:max(1, round(coverage / 100 * len(kept)))].mean())
    if groups is not None:
        groups = np.asarray(groups)
        result["groups"] = {str(g): metrics(confidence[groups == g], correct[groups == g]) for g in np.unique(groups)}
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Answers and the probe

@dataclass
class Answer:
    """One sampled answer. confidence: C (Eq. 3, mean); probability: exp of the mean log-prob, in (0, 1];
    token_probability: mean probability of the sampled tokens (the paper's Figure 1)."""
    id: str
    skill: str
    level: str
    text: str
    correct: bool
    confidence: float
    probability: float
    token_probability: float
    length: int
    finished: bool


def answer(vlm, samples, images, n=4, *, seed=0, batch_size=32, progress=None, **sampling):
    """n sampled answers for each question about given images (lists of PIL images) -> list of Answer, in order."""
    answers = []
    for start in range(0, len(samples), batch_size):
        part = samples[start:start + batch_size]
        rollouts = vlm.sample(images[start:start + batch_size], [data.prompt(s) for s in part], n, seed=[
            f"{seed} {s.id}" for s in part], **sampling)
        for sample, group in zip(part, rollouts):
            for r in group:
                answers.append(Answer(
                    sample.id, str(sample.meta.get("skill", "")), str(sample.meta.get("level", "")), r.text,
                    is_correct(r.text, sample), r.confidences.mean().item(), r.logprobs.mean().exp().item(),
                    r.logprobs.exp().mean().item(), len(r.tokens), r.finished))
        if progress is not None:
            progress.update(len(part))
    return answers


def probe(vlm, samples, clip, ts=PROBE_STEPS, mode="key", mass=0.5, n=4, seed=0, name="", **sampling):
    """Answers on the same questions at each noise step t (paper Figure 1) -> {t: list of Answer}."""
    samples = list(samples)
    with tqdm(total=len(samples) * len(ts), desc=f"probe {name}".strip(), unit="question", leave=False) as progress:
        found = {}
        for t in ts:
            images = [make_pair(s.pictures(), s.question, clip, (t, t), mode if t else "all", mass, f"{seed} {s.id}")
                      for s in samples]
            found[t] = answer(vlm, samples, images, n, seed=f"{seed} {t}", progress=progress, **sampling)
    return found


def summary(clean, noised):
    """The before/after columns for one model from its answers on clean and on noised pictures -> dict of floats.

    auroc is that of C; ece and brier are those of the sequence probability exp(mean log-prob), without any fitted map.
    gap: mean C on clean pictures minus mean C on noised ones.
    """
    def mean(answers, field):
        return float(np.mean([getattr(a, field) for a in answers]))
    correct = [a.correct for a in clean]
    by_probability = metrics([a.probability for a in clean], correct)
    confidence = mean(clean, "confidence")
    return {"pass@1": mean(clean, "correct"), "pass@1 noised": mean(noised, "correct"),
            "token prob": mean(clean, "token_probability"), "token prob noised": mean(noised, "token_probability"),
            "C": confidence, "gap": confidence - mean(noised, "confidence"),
            "AUROC": metrics([a.confidence for a in clean], correct)["auroc"],
            "ECE": by_probability["ece"], "Brier": by_probability["brier"], "length": mean(clean, "length")}


def summaries(clean, noised):
    """`summary` pooled ("all") and within each skill (pooled numbers lie) -> {name: dict}."""
    skills = sorted({a.skill for a in clean if a.skill})
    return {"all": summary(clean, noised),
            **{skill: summary([a for a in clean if a.skill == skill], [a for a in noised if a.skill == skill])
               for skill in skills}}


def headroom(answers):
    """What sampling leaves to gain, from all n answers of each question -> {"pass@1", "majority@n", "pass@n"}.

    majority: the most frequent extracted answer (the first of those that tie), an unanswered one counting as wrong.
    """
    by_id = {}
    for a in answers:
        by_id.setdefault(a.id, []).append(a)
    n, majority, best = len(answers) // len(by_id), [], []
    for group in by_id.values():
        found = [extract_answer(a.text) for a in group]
        majority.append(group[found.index(Counter(found).most_common(1)[0][0])].correct)
        best.append(any(a.correct for a in group))
    return {"pass@1": float(np.mean([a.correct for a in answers])), f"majority@{n}": float(np.mean(majority)),
            f"pass@{n}": float(np.mean(best))}


def table(rows):
    """{row name: {column: number}} -> text with aligned columns."""
    columns = list(next(iter(rows.values())))
    lines = [["", *columns]] + [[name, *(f"{row[c]:.3f}" if isinstance(row[c], float) else str(row[c]) for c in columns)]
                                for name, row in rows.items()]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths)))
                     for line in lines)


def before_after(before, after):
    """Two `summaries` interleaved, pooled and within skill, for `table`."""
    return {f"{skill}, {when}": rows[skill] for skill in before for when, rows in (("before", before), ("after", after))}


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

def plot_reliability(axis, named, bins=10):
    """Reliability diagram of the sequence probability. named: {label: list of Answer}."""
    axis.plot([0, 1], [0, 1], color="0.7", linewidth=1, zorder=0)
    for label, answers in named.items():
        p, correct = (np.array([getattr(a, field) for a in answers], float) for field in ("probability", "correct"))
        order = np.argsort(p)
        points = [(p[g].mean(), correct[g].mean()) for g in np.array_split(order, min(bins, len(p)))]
        axis.plot(*zip(*points), marker="o", markersize=4, label=f"{label}, ECE {calibration_error(p, correct):.2f}")
    axis.set(xlabel="sequence probability", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), title="Reliability")
    axis.legend(fontsize=8)


def plot_probe(axis, named, field, ylabel):
    """A field of the answers against the noise step. named: {label: {t: list of Answer}}."""
    for label, by_t in named.items():
        axis.plot(list(by_t), [np.mean([getattr(a, field) for a in answers]) for answers in by_t.values()],
                  marker="o", markersize=4, label=label)
    axis.set(xlabel="noise step t", ylabel=ylabel)
    if field != "confidence":
        axis.set_ylim(0, 1)         # accuracy and probability on one scale: what falls, and what does not
    axis.legend(fontsize=8)


def load_questions(source, limit, split="test"):
    """Held-out questions, each with an answer. Raises InputError."""
    samples = list(data.load(source, split, limit))
    missing = [s.id for s in samples if s.answer is None]
    if missing:
        raise InputError(f"question {missing[0]!r} of {source!r} has no answer ({len(missing)} such); evaluation needs one")
    return samples


def main(argv=None):
    parser = argparse.ArgumentParser(description="Accuracy and confidence against noise, for one model or two.")
    parser.add_argument("--model", default=str(HERE / "tiny" / "base"), help="model directory or hub id")
    parser.add_argument("--baseline", help="a second model to hold it against")
    parser.add_argument("--clip", default=CLIP, help="CLIPModel directory or hub id")
    parser.add_argument("--data", default="synthetic", help="'synthetic' (its test split) or a .jsonl file")
    parser.add_argument("--limit", type=int, default=200, help="at most so many questions")
    parser.add_argument("--samples", type=int, default=4, help="answers a question")
    parser.add_argument("--region", default="key", choices=MODES, help="where the noise goes")
    parser.add_argument("--mass", type=float, default=0.5, help="share of the attention that the key region holds")
    parser.add_argument("--t", type=int, nargs="+", default=list(PROBE_STEPS), help="noise steps; 0 is always run")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="runs/probe", help="directory for probe.json and probe.png")
    args = parser.parse_args(argv)
    if not 0 < args.mass <= 1:
        raise InputError(f"--mass is {args.mass}; a number above 0 and at most 1 is expected")
    ts = sorted({0, *(parse_t(t)[0] for t in args.t)})
    samples, clip = load_questions(args.data, args.limit), ClipAttention.from_pretrained(args.clip)
    named = {}
    for path in filter(None, (args.baseline, args.model)):
        named[path] = probe(VLM.load(path), samples, clip, ts, args.region, args.mass, args.samples, args.seed, path,
                            max_new_tokens=args.max_new_tokens)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    rows = {f"{path}, {skill}": row for path, by_t in named.items()
            for skill, row in summaries(by_t[0], by_t[ts[-1]]).items()}
    record = {"args": vars(args), "torch": torch.__version__, "summary": rows,
              "answers": {path: {t: [asdict(a) for a in answers] for t, answers in by_t.items()}
                          for path, by_t in named.items()}}
    (output / "probe.json").write_text(json.dumps(record))
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, 4, figsize=(17, 4))
    for axis, field, ylabel in zip(axes, ("correct", "token_probability", "confidence"),
                                   ("accuracy", "mean token probability", "confidence C")):
        plot_probe(axis, named, field, ylabel)
    plot_reliability(axes[3], {path: by_t[0] for path, by_t in named.items()})
    figure.tight_layout()
    figure.savefig(output / "probe.png", dpi=110)
    pyplot.close(figure)
    print(f"noised = t {ts[-1]} on region {args.region!r}; {len(samples)} questions x {args.samples} answers")
    print(table(rows))
    print(f"wrote {output / 'probe.json'} and {output / 'probe.png'}\n"
          f"next: python eval.py --model {args.model} --region random      # the control: same area, elsewhere")


if __name__ == "__main__":
    command("eval.py", main)
