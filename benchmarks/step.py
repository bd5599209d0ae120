"""One GRPO step on the tiny model (sample, reward, learn, update): ours against TRL's `GRPOTrainer`.

    python -m venv .venv-trl && .venv-trl/bin/pip install -r requirements.txt trl     # the peer, in an environment of its own
    python benchmarks/step.py --peer .venv-trl/bin/python

The same questions, 16 a step x 8 completions of at most 64 tokens, temperature 1, no reference model, AdamW, fp32, the judge
of this repository as the reward. TRL runs with what is fastest for it here: no gradient checkpointing, no logging, all
completions of a step in one forward pass. Each contender trains in a process of its own, in turns; of each turn the first
two steps do not count. Medians over all the steps of all turns. Peak memory is that of the process, all it has loaded included.
"""
import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, VLM, at_least, data, program, versions

import train_cdrl
from utils import cli, distributed

QUESTIONS, GROUP, TOKENS, LR = 16, 8, 64, 1e-4
OURS = {"ours, grpo": "grpo", "ours, paper (two views)": "paper", "ours, ours (half with two views, both learn)": "ours"}


def ours(recipe, steps):
    """Seconds of each step, sampling and learning."""
    with tempfile.TemporaryDirectory() as folder:
        train_cdrl.train(train_cdrl.parse([
            "--recipe", recipe, "--steps", str(steps), "--batch_size", str(QUESTIONS), "--group_size", str(GROUP),
            "--max_new_tokens", str(TOKENS), "--lr", str(LR), "--eval_size", "0", "--save_every", "1000000", "--output",
            f"{folder}/run"]))
        rows = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    return [row["seconds/sample"] + row["seconds/learn"] for row in rows]


def trl(steps):
    """Seconds of each step of TRL, from the end of one to the end of the next."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    order = distributed.QuestionOrder(range(data.SIZES["train"]), QUESTIONS, 0)
    samples = [data.synthetic("train", 0, i) for step in range(steps) for i in order.indices(step)]
    rows = [{"prompt": [{"role": "user", "content": data.prompt(s)}], "image": s.images[0], "index": i}
            for i, s in enumerate(samples)]

    def right(completions, index, **_):
        return [train_cdrl.is_correct(completion[0]["content"] if isinstance(completion[0]["content"], str)
                                                 else completion[0]["content"][0]["text"], samples[i])
                for completion, i in zip(completions, index)]
    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())
    vlm = VLM.load(ROOT / "tiny" / "base")
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            folder, per_device_train_batch_size=QUESTIONS * GROUP, num_generations=GROUP, max_completion_length=TOKENS,
            max_steps=steps, learning_rate=LR, lr_scheduler_type="linear", beta=0.0, temperature=1.0, top_k=0, top_p=1.0,
            loss_type="dapo", scale_rewards="group", use_cpu=True, bf16=False, gradient_checkpointing=False,
            optim="adamw_torch", weight_decay=0.0, report_to="none", logging_strategy="no", save_strategy="no",
            disable_tqdm=True, shuffle_dataset=False, seed=0)
        trainer = GRPOTrainer(vlm.model, right, config, train_dataset=Dataset.from_list(rows), processing_class=vlm.processor,
                              callbacks=[Clock()])
        start = time.perf_counter()
        trainer.train()
    return [end - begin for begin, end in zip([start, *ends], ends)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peer", type=program, help="a Python that has TRL; without it ours alone is timed")
    parser.add_argument("--turns", type=at_least(1), default=3, help="how often each contender runs")
    parser.add_argument("--steps", type=at_least(3), default=7, help="steps of a turn, the first two for warming up")
    parser.add_argument("--only", choices=[*OURS, "trl"], help="run one contender, print the seconds of its steps")
    args = parser.parse_args()
    if args.only:
        seconds = trl(args.steps) if args.only == "trl" else ours(OURS[args.only], args.steps)
        print(json.dumps([seconds[2:], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))     # KiB on Linux
        return
    print(versions())
    names = [*OURS, *(["trl"] if args.peer else [])]
    seconds, peaks = {name: [] for name in names}, {name: [] for name in names}
    for _ in range(args.turns):
        for name in names:
            python = args.peer if name == "trl" else sys.executable
            done = subprocess.run([python, __file__, "--only", name, "--steps", str(args.steps)], capture_output=True,
                                  text=True)
            if done.returncode:
                raise SystemExit(f"{name} failed: {done.stderr.strip()[-600:]}")
            times, peak = json.loads(done.stdout.splitlines()[-1])
            seconds[name] += times
            peaks[name].append(peak)
    if args.peer:
        version = subprocess.run([args.peer, "-c", "import trl; print(trl.__version__)"], capture_output=True, text=True,
                               check=True)
        print(f"TRL {version.stdout.strip()}")
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"{QUESTIONS} questions x {GROUP} completions, median of {len(seconds[names[0]])} steps")
    print(cli.table({name: {"seconds": value, "ratio to ours, grpo": value / medians["ours, grpo"],
                             "peak MiB": statistics.median(peaks[name])} for name, value in medians.items()}))


if __name__ == "__main__":
    main()
