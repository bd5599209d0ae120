"""What a run costs, before it is spent: generations, tokens, Expert calls and hours, by part."""
import math
import time
from dataclasses import dataclass

from utils import cli
from utils.tables import STATES

BATCH_TOKENS = 2**17            # new tokens of a batch, if every answer is as long as it may be
BATCH_QUESTIONS = 50


def bounded_batch(batch_size, sequences, max_new_tokens):
    """Questions a batch (int): --batch_size, or by default as many as keep within BATCH_TOKENS.

    sequences: answers drawn at once for a question.
    """
    if batch_size is not None:
        return batch_size
    return max(1, min(BATCH_QUESTIONS, BATCH_TOKENS // (sequences * max_new_tokens)))


@dataclass
class Part:
    """What one part of a run costs for each question. generations: answers of the base model; prompts: with
    pictures that it reads for these; views: passes a token (2 where it contrasts, which also reads two
    prompts); calls: of the Expert, at most."""
    generations: float = 0.0
    views: int = 1
    calls: float = 0.0
    prompts: float = 1.0


@dataclass
class Speed:
    """Of the first batch. length: mean tokens of an answer; rate: tokens a second once prompts are read;
    prompt: seconds to read one; cut: share of the answers that met the limit."""
    length: float
    rate: float
    prompt: float = 0.0
    cut: float = 0.0


def module_parts(modules, sizes=(1,), has_checker=True, planner=False):
    """{name: Part} of CA-TTS's modules, each run on `sizes` numbers of samples."""
    runs = len(sizes)
    parts = {"self_consistency": Part(calls=runs), "self_reflection": Part(runs, calls=runs, prompts=runs),
             "self_check": Part(1 if has_checker else 0, views=2)}
    return {module: parts[module] for module in modules} | ({"planner": Part(calls=runs)} if planner else {})


def eval_parts(args, modules, has_checker=True):
    """{name: Part} of one model of eval.py. args: Namespace of its flags."""
    parts = {}
    if "votes" in args.parts:
        parts["samples"] = Part(args.drawn)
        parts |= {name: Part(1) for name in ("greedy", "cut") if name in args.methods}
        parts |= {"expert alone": Part(calls=1)} if "expert" in args.methods else {}
        parts |= module_parts(modules, args.sizes, has_checker, args.order in ("planner", "informed"))
    if "probe" in args.parts:
        views = 1 + len(args.regions) * sum(t > 0 for t in args.t)
        parts["probe"] = Part(args.probe_samples * views, prompts=views + len(STATES))
    if "corruptions" in args.parts:
        views = 1 + 2 * 5 * (len(args.corruptions) or 5)
        parts["corruptions"] = Part(args.probe_samples * views, prompts=views)
    return parts


def measure(draw, num_questions):
    """Time a batch, after one question that warms the device up -> Speed. draw: function of a number of
    questions and, by name, max_new_tokens -> lists of Rollouts."""
    draw(1)
    start = time.perf_counter()
    draw(None, max_new_tokens=1)                    # hardly more than the prompts
    prompts = time.perf_counter() - start
    start = time.perf_counter()
    rollouts = [rollout for group in draw(None) for rollout in group]
    seconds = time.perf_counter() - start
    tokens = sum(len(rollout.tokens) for rollout in rollouts)
    decoding = max(seconds - prompts, seconds / 100)
    return Speed(tokens / len(rollouts), tokens / decoding, prompts / num_questions,
                 sum(not rollout.finished for rollout in rollouts) / len(rollouts))


def table(parts, num_questions, speed, max_new_tokens, expert_tokens, ranks=1, local_expert=False):
    """{part: row} for `cli.table`, and their sum: whole run of one model.

    speed: of `measure`. tokens: expected, as generated; at most: with every answer as long as allowed. hours:
    prompts and tokens on `ranks` devices. The Expert's tokens are at most its limit a call; a local Expert's
    count in the hours, as if it were as fast as the base.
    """
    rows = {}
    for name, part in parts.items():
        generations, calls = round(num_questions * part.generations), round(num_questions * part.calls)
        prompts = num_questions * part.prompts * part.views if generations else 0
        seconds = prompts * speed.prompt + generations * part.views * speed.length / speed.rate
        if local_expert:
            seconds += calls * (speed.prompt + expert_tokens / speed.rate)
        rows[name] = {"generations": generations, "tokens": round(generations * speed.length),
                      "at most": generations * max_new_tokens, "Expert calls": calls,
                      "Expert tokens, at most": calls * expert_tokens, "hours": seconds / 3600 / ranks}
    rows["all"] = {column: sum(row[column] for row in rows.values()) for column in next(iter(rows.values()))}
    return rows


def show(title, rows, speed, batch_size, local_expert):
    """Print the costs of one model."""
    print(f"\n{title}: measured on the first batch of {batch_size}: {speed.length:.0f} tokens an answer, "
          f"{speed.rate:.0f} tokens a second, {speed.prompt:.2g} seconds a prompt, {speed.cut:.0%} cut off "
          f"at the limit")
    shown = {name: row | {"hours": float(f"{row['hours']:.3g}")} for name, row in rows.items()}
    print(cli.table(shown))
    calls = rows["all"]["Expert calls"]
    rest = (f", the Expert's {calls} calls included, each as long as it may be" if local_expert else
            f", and what {calls} calls of the Expert take")
    print(f"about {_duration(rows['all']['hours'])}{rest if calls else ''}")


def _duration(hours):
    """Hours in words (str)."""
    if hours >= 1:
        return f"{hours:.1f} hours"
    return f"{max(1, math.ceil(hours * 60))} minutes"
