"""Questions held out of training: drawn by picture, written to a file, and asked before, during and after."""
import base64
import json
import random
from dataclasses import asdict
from pathlib import Path

import numpy as np

from utils import cli, distributed, schema
from utils.cli import InputError
from utils.pictures import groups_by_picture

PROBE_SAMPLES = 4               # answers to each held-out question


def hold_out(samples, size, seed):
    """(training questions, at most `size` held-out ones). Questions that share a picture, by its content or
    by image_id, go to the same side. InputError where that leaves nothing to hold out."""
    groups = {}
    for i, group in enumerate(groups_by_picture(samples)):
        groups.setdefault(group, []).append(i)
    groups = list(groups.values())
    random.Random(f"hold out {seed}").shuffle(groups)
    chosen = []
    for group in groups:
        if len(chosen) + len(group) <= size:
            chosen += group
    if size and not chosen:
        raise InputError(f"none of {size} questions can be held out: the pictures are shared by too many "
                         f"questions, the fewest by "
                         f"{min(map(len, groups))}; raise --eval_size, or set it to 0")
    chosen = {*chosen}
    return [s for i, s in enumerate(samples) if i not in chosen], [s for i, s in enumerate(samples)
                                                                   if i in chosen]


def write_held_out(samples, path):
    """Held-out questions of a file as a .jsonl that `load` opens, with allow_outside: pictures stay where
    they are."""
    lines = []
    for s in samples:
        images = [base64.b64encode(image).decode() if isinstance(image, bytes)
                  else str(Path(image).absolute())
                  for image in s.images]
        fields = {"id": s.id, "image": images, "question": s.question, "answer": s.answer,
                  "choices": s.choices,
                  "source": s.source, "meta": s.meta}
        lines.append(cli.strict_json({key: value for key, value in fields.items() if value is not None}))
    cli.write_atomically(path, "".join(line + "\n" for line in lines))


class HeldOutProbe:
    """Asks the held-out questions on clean and on noised pictures, by all ranks: probe(path).

    ask: eval.probe; answer_class: eval.Answer. ts: the noise steps. samples: the held-out questions.
    """

    def __init__(self, ask, answer_class, ts, samples, vlm, policy, clip, args, order):
        self.ask, self.answer_class, self.ts, self.samples = ask, answer_class, ts, samples
        self.vlm, self.policy, self.clip, self.args, self.order = vlm, policy, clip, args, order

    def __call__(self, path, ts=()):
        """The model's answers at each noise step -> {t: list of Answer}, None without questions.

        They are stored at `path`, and read from there if the run was stopped after them. ts: instead of all.
        """
        if not self.samples:
            return None
        args, order = self.args, self.order
        ts = sorted({*(ts or self.ts), self.ts[-1]})
        if path.exists():
            return read_probe(path, self.answer_class, ts)
        rollouts = args.batch_size // order.world * args.group_size * (1 + args.uses_noised)       # of a step
        mine = [self.samples[i] for i in range(order.rank, len(self.samples), order.world)]
        with self.policy.unsharded():
            answers_by_t = distributed.agreed(lambda: self.ask(
                self.vlm, mine, self.clip, ts, args.region, args.mass, PROBE_SAMPLES, seed=args.seed,
                name=path.stem, max_new_tokens=args.max_new_tokens,
                batch_size=max(1, min(32, rollouts // PROBE_SAMPLES))))
        answers_by_t = {t: distributed.gathered(answers_by_t[t]) for t in ts}
        if order.rank == 0:
            cli.write_atomically(path, json.dumps({t: [asdict(a) for a in answers]
                                                   for t, answers in answers_by_t.items()}, indent=1))
        return answers_by_t

    def row(self, step, output):
        """What --eval_every adds to a step's line of metrics.jsonl (dict), at its own steps."""
        every = self.args.run.eval_every
        if not (self.samples and every and (step + 1) % every == 0):
            return {}
        return held_out_row(self(output / f"eval-{step + 1}.json", [0]))


def read_probe(path, answer_class, ts=()):
    """before.json or after.json of a run folder -> {t: list of answer_class}, t of `ts` among them.
    InputError where it is damaged."""
    try:
        stored = cli.parse_json(path.read_text())
        if words := schema.fault(stored, {str(t): [schema.of(answer_class), ...] for t in ts}):
            raise ValueError(words)
        if not all(stored.values()):
            raise ValueError("a noise step without answers")
        return {int(t): [answer_class(**answer) for answer in answers] for t, answers in stored.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}); restore it, or start again with "
                         f"--resume no") from error


def held_out_row(answers_by_t):
    """What --eval_every adds to a line of metrics.jsonl (dict): accuracy on clean and on noised pictures, and
    the gap of C between them. answers_by_t: {noise step: list of Answer}."""
    clean, noised = answers_by_t[0], answers_by_t[max(answers_by_t)]
    means = [[np.mean([getattr(a, name) for a in answers]) for answers in (clean, noised)]
             for name in ("correct", "confidence")]
    return {"held_out/accuracy": float(means[0][0]), "held_out/accuracy_noised": float(means[0][1]),
            "held_out/gap": float(means[1][0] - means[1][1])}
