"""How cost grows, and where a step's time goes.

    python -m venv .venv-spy && .venv-spy/bin/pip install py-spy
    python benchmarks/growth.py --spy .venv-spy/bin/py-spy           # minutes
    python benchmarks/growth.py --rounds 1 --only profile

growth: seconds of 8 samples with confidence, and of scoring them with gradient, on a random Qwen2.5-VL with 151,936 words,
while one of group size, picture, vocabulary and completion length changes. profile: a step of `--recipe ours` on the tiny
model, by phase. "Python": the time in which the interpreter's lock is held, which operators of torch give back, sampled from
outside by py-spy (the system must let one process look into another); part of it lies in the pictures' rows as well.
"""
import argparse
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from common import (
    ROOT,
    VLM,
    VOCABULARY,
    at_least,
    big_vocabulary,
    data,
    endless,
    picture,
    program,
    side_by_side,
    versions,
)

import noise
import train_cdrl
from utils import cli, distributed

POINTS = {"group size": (4, 8, 16), "picture": (224, 448, 672), "vocabulary": (VOCABULARY // 4, VOCABULARY // 2, VOCABULARY),
          "new tokens": (32, 64, 128)}
USUAL = {"group size": 8, "picture": 448, "vocabulary": VOCABULARY, "new tokens": 64}
RATE, WATCHED = 400, 30         # looks a second, seconds
PYTHON = {"Python": "step (", "Python, inside the model's forward": "VLM._forward (",
          "Python, pictures: key regions and noise": "make_pairs (",
          "Python, pictures and prompts: pre-processing": "VLM.encode (", "Python, decoding": "VLM._decoding_loop (",
          "Python, learning": "accumulate_gradients (train_cdrl"}     # row: what is in its stacks; some lie in others


def growth(rounds):
    rows, models = {}, {}
    for name, values in POINTS.items():
        for value in values:
            at = USUAL | {name: value}
            words = at["vocabulary"]
            if words not in models:
                models.clear()                              # one at a time: they are large
                models[words] = endless(big_vocabulary(words=words))
            vlm, images, prompts = models[words], [[picture(at["picture"])]], ["How many red circles are there?"]

            def sample(vlm=vlm, images=images, prompts=prompts, at=at):
                return vlm.sample(images, prompts, at["group size"], max_new_tokens=at["new tokens"])
            words_said = [r.tokens for r in sample()[0]]

            def score(vlm=vlm, images=images, prompts=prompts, said=words_said):
                vlm.model.zero_grad()
                vlm.score(images, prompts, said).logprobs.sum().backward()
            seconds = side_by_side({"sample": sample, "score": score}, rounds)
            rows[f"{name} {value:,}"] = {"sample, s": seconds["sample"], "score, s": seconds["score"]}
    return rows


def profile(rounds, spy):
    """Seconds of the phases of a step, medians; the first step warms up."""
    args = train_cdrl.parse([])
    vlm, clip = VLM.load(ROOT / "tiny" / "base"), noise.ClipAttention.from_pretrained()
    policy = distributed.Policy(vlm)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-5)
    confidence_map, spent = {"lo": 8.0, "hi": 14.0, "slope": 0.9, "intercept": -10.0}, {}

    def timed(owner, name, label):
        original = getattr(owner, name)

        def wrapper(*arguments, **named):
            start = time.perf_counter()
            try:
                return original(*arguments, **named)
            finally:
                spent[label] = spent.get(label, 0.0) + time.perf_counter() - start
        setattr(owner, name, wrapper)
    timed(noise, "make_pairs", "pictures: key regions and noise")
    timed(vlm, "encode", "pictures and prompts: pre-processing")
    timed(train_cdrl, "is_correct", "judge")

    def step(number):
        samples = [data.synthetic("train", 0, number * args.batch_size + i) for i in range(args.batch_size)]
        spent.clear()
        start = time.perf_counter()
        views = train_cdrl.roll_out(vlm, *train_cdrl.prepare_step(vlm, clip, samples, number, args), number, args)
        train_cdrl.add_rewards(views, confidence_map, args)
        train_cdrl.add_advantages(views, args.adv_norm)
        rolled = time.perf_counter()
        passes = distributed.micro_batches(vlm, views, args.run)
        num_loss_tokens = sum(len(r.tokens) for view in views for group in view.rollouts for r in group)
        optimizer.zero_grad()
        train_cdrl.accumulate_gradients(policy, None, passes, confidence_map, num_loss_tokens, args)
        distributed.clip_gradients(policy, 1.0)
        optimizer.step()
        return {"the step": time.perf_counter() - start, "rolling out": rolled - start} | spent
    steps = [step(i) for i in range(rounds + 1)][1:]
    rows = {name: statistics.median(one[name] for one in steps) for name in steps[0]}
    rows["learning and update"] = rows["the step"] - rows["rolling out"]
    if spy:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "stacks.txt"
            watch = subprocess.Popen([spy, "record", "--pid", str(os.getpid()), "--gil", "--format", "raw", "--rate", str(RATE),
                                      "--duration", str(WATCHED), "--output", file], stdout=subprocess.DEVNULL)
            while watch.poll() is None:
                step(0)
            if watch.returncode:
                raise SystemExit(f"{spy} ended with {watch.returncode}; it must be allowed to look into this process")
            stacks = [line.rsplit(" ", 1) for line in file.read_text().splitlines()]
        for name, frame in PYTHON.items():
            rows[name] = rows["the step"] * sum(int(count) for stack, count in stacks if frame in stack) / (RATE * WATCHED)
    return {name: {"seconds": value, "share": value / rows["the step"]} for name, value in rows.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=at_least(1), default=5, help="medians are over so many, after a warm-up")
    parser.add_argument("--spy", type=program, help="the program py-spy; without it there is no row for Python")
    parser.add_argument("--only", choices=["growth", "profile"])
    args = parser.parse_args()
    print(versions())
    if args.only != "profile":
        print(f"\none question, {', '.join(f'{name} {value:,}' for name, value in USUAL.items())}, but for what is named")
        print(cli.table(growth(args.rounds)))
    if args.only != "growth":
        print("\na step of --recipe ours on the tiny model")
        print(cli.table(profile(args.rounds, args.spy)))


if __name__ == "__main__":
    main()
