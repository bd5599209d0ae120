"""Faults on purpose, over whole programs: kills, signals, second processes, small disks, touched files.

    python benchmarks/faults.py                                       # everything, an hour of one core
    python benchmarks/faults.py --kills 6 --pairs 4 --signals 4       # some minutes
    python benchmarks/faults.py --only touched --programs catts
    python benchmarks/fuzz.py                                         # fuzzed inputs

Each line that it prints is one measurement of results/reliability.md; --record appends it to a file. A kill
is SIGKILL at a random moment, then the same command, until it ends; the outputs must be those of a run that
nobody disturbed. One half of the kills comes after a random share of the CPU time that a run takes. The
other half comes right before a random one of its operations on the output's files (open, rename, remove,
mkdir): so all moments between two renames are met.

A program is a process of its own, forked from this one, which has imported torch and transformers already:
that saves 10 s of each run. From `main` on it is what the command does. --fresh starts new interpreters.
eval.py draws 20 resamples for an interval in place of 1,000. Exit code 1 where something was lost or let in.
"""
import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}      # no thread before a fork
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import matplotlib.pyplot  # noqa: E402, F401
import transformers  # noqa: E402, F401
from transformers import CLIPModel, Qwen2_5_VLForConditionalGeneration  # noqa: E402, F401

import catts  # noqa: E402
import eval  # noqa: E402
import train_cdrl  # noqa: E402
from utils import baselines, cli, tables  # noqa: E402

MAINS = {"train": train_cdrl.main, "catts": catts.main, "eval": lambda argv: cli.command("eval.py", lambda: eval.main(argv))}
TRAIN = ["train_cdrl.py", "--steps", "4", "--batch_size", "2", "--group_size", "2", "--eval_size", "2", "--max_new_tokens",
         "6", "--scale_questions", "2", "--save_every", "1", "--patience", "0"]
CATTS = ["catts.py", "--data", "synthetic", "--limit", "6", "--batch_size", "2", "--samples", "2", "--max_new_tokens", "6"]
EVAL = ["eval.py", "--limit", "4", "--batch_size", "2", "--samples", "2", "--sizes", "2", "--max_new_tokens", "6", "--t",
        "500", "--regions", "key", "--probe_samples", "1"]
PROGRAMS = {"train": TRAIN, "catts": CATTS, "eval": EVAL}
TICKS = os.sysconf("SC_CLK_TCK")
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "shutil.rmtree"}
failures = []
options = None


def report(name, good, words, **counts):
    print(f"{'ok  ' if good else 'FAIL'}  {name}: {words}", flush=True)
    if not good:
        failures.append(name)
    if options.record:
        with open(options.record, "a") as file:
            file.write(json.dumps({"what": name, "good": bool(good), "words": words, **counts,
                                   "seed": options.seed, "date": time.strftime("%Y-%m-%d")}) + "\n")


# ---- Programs in processes

def few_resamples():
    """Intervals of eval.py from 20 resamples: they are made of stored rows, after everything is written."""
    tables.ROUNDS = 20
    for function in (baselines.headline_intervals, tables.summary_intervals):
        function.__defaults__ = (None, 20, 0)


class Child:
    """One rank of a program. code: None while it runs, else its exit code, or minus the signal that ended it."""

    def __init__(self, program, output, settings, limit, fatal, more):
        self.top, self.limit, self.fatal, self.code = str(output.parent), limit, fatal, None
        self.words_file, self.argv = tempfile.TemporaryFile(), [*PROGRAMS[program], "--output", str(output), *more]
        if options.fresh:
            self.pid = subprocess.Popen([sys.executable, *self.argv], cwd=ROOT, stdout=self.words_file,
                                        stderr=subprocess.STDOUT, env=os.environ | settings,
                                        preexec_fn=self._set_limit).pid
            return
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            code = 1
            try:
                for number in (1, 2):
                    os.dup2(self.words_file.fileno(), number)
                os.environ.update(settings)
                os.chdir(ROOT)
                self._set_limit()
                sys.argv, self.events = self.argv, 0
                sys.addaudithook(self._count)
                MAINS[program](self.argv[1:])
                code = 0
            except SystemExit as error:
                code = error.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os.write(self.words_file.fileno(), f"\n[{self.events} operations on files]\n".encode())
                os._exit(code)

    def _set_limit(self):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self.limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.limit))

    def _count(self, event, args):
        """Count operations on the output's folder; SIGKILL right before number `fatal`."""
        if event in EVENTS and any(self.top in os.fsdecode(arg) for arg in args if isinstance(arg, (str, bytes, Path))):
            self.events += 1
            if self.events == self.fatal:
                os.write(self.words_file.fileno(), f"\n[killed before {event}]\n".encode())
                os.kill(os.getpid(), signal.SIGKILL)

    def running(self):
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is None

    def seconds(self):
        """CPU time up to now, of a running process."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def signal(self, number):
        if self.running():
            os.kill(self.pid, number)

    def wait(self):
        """-> (exit code, what it said)."""
        while self.running():
            time.sleep(0.005)
        self.words_file.seek(0)
        return self.code, self.words_file.read().decode(errors="replace")


def start(program, output, ranks=1, limit=None, fatal=None, more=()):
    """Start a program on one process or several -> list of Child. limit: bytes that a file may have. fatal:
    the number of the operation on files before which the first rank dies."""
    port = str(random.randrange(20_000, 60_000))
    settings = [{"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "MASTER_ADDR": "localhost",
                 "MASTER_PORT": port} if ranks > 1 else {} for rank in range(ranks)]
    return [Child(program, output, one, limit, None if rank else fatal, more) for rank, one in enumerate(settings)]


def reach(child, seconds):
    """Wait until a child has used so much CPU time, or has ended -> whether it still runs."""
    while child.running() and child.seconds() < seconds:
        time.sleep(0.003)
    return child.running()


def ended(children):
    """Wait -> (exit code of the first rank, its words). Ranks whose first one was killed are killed, as
    torchrun does."""
    result = children[0].wait()
    for child in children[1:]:
        if result[0] < 0:
            child.signal(signal.SIGKILL)
        code, words = child.wait()
        if result[0] >= 0 and code:             # why the first one failed, too
            result = result[0] or code, f"{result[1]}\n[another rank ended with {code}]\n{words}"
    return result


def place(program, folder, name):
    return folder / name / ("results.jsonl" if program == "catts" else "out")


def outputs(program, output):
    """What a run has made, without times."""
    def rows(path):
        without = [json.loads(line) for line in path.read_text().splitlines()]
        for row in without:
            for key in [key for key in row if key.startswith("seconds")]:
                del row[key]
            row.get("ledger", {}).pop("seconds", None)
        return without
    if program == "catts":
        return rows(output)
    if program == "train":
        return [rows(output / "metrics.jsonl"), (output / "samples.jsonl").read_text(), (output / "after.json").read_text(),
                (output / "model.safetensors").read_bytes()]
    stored = sorted(output.rglob("*.jsonl"))
    return [[rows(path) for path in stored], (output / "tables.json").read_text()]


def undisturbed(program, folder, ranks=1):
    """-> (outputs, CPU seconds of the first rank, its operations on files)."""
    output = place(program, folder, f"{program}-{ranks}")
    children, seconds = start(program, output, ranks), 0.0
    while children[0].running():
        seconds = children[0].seconds()
        time.sleep(0.01)
    code, words = ended(children)
    assert code == 0, words[-3000:]
    counted = re.search(r"\[(\d+) operations", words)
    return outputs(program, output), seconds, int(counted[1]) if counted else 0


# ---- The faults

def stage(program, output):
    """How far a killed run had come, from its files -> (words, whether a file was half written)."""
    log = {"train": "metrics.jsonl", "eval": "votes.jsonl"}
    paths = [output.parent] if program == "catts" else [output]
    names = [path for folder in paths if folder.exists() for path in folder.rglob("*")]
    rows = [path for path in names if path.name.startswith("results.jsonl" if program == "catts" else log[program])
            and not path.name.endswith(("json", "tmp"))]
    count = sum(path.read_bytes().count(b"\n") for path in rows if path.is_file())
    is_written = any(path.name in ("after.json", "tables.json") for path in names)
    return "at the end" if is_written else f"{count} rows" if count else "before the first row", \
        any(path.name.endswith(".tmp") for path in names)


def kills(number, folder, rng):
    """Random SIGKILLs, a sixth of them on two ranks."""
    for program in PROGRAMS:
        for ranks, wanted in ((1, number - number // 6), (2, number // 6)):
            if not wanted:
                continue
            expected, seconds, operations = undisturbed(program, folder, ranks)
            killed = different = attempts = half_written = 0
            stages, before = Counter(), Counter()
            while killed < wanted:
                attempts += 1
                output = place(program, folder, f"{program}-{ranks}-{attempts}")
                while True:
                    by_time = rng.random() < 0.5 or not operations
                    fatal = None if by_time or killed == wanted else rng.randint(1, operations)
                    children = start(program, output, ranks, fatal=fatal)
                    if by_time and killed < wanted and reach(children[0], rng.uniform(0, 1) * seconds):
                        for child in children:
                            child.signal(signal.SIGKILL)
                    code, words = ended(children)
                    if code != -signal.SIGKILL:
                        break
                    killed += 1
                    came, torn = stage(program, output)
                    stages[came] += 1
                    half_written += torn
                    before["a random time" if by_time else re.search(r"killed before ([\w.]+)", words)[1]] += 1
                if code or outputs(program, output) != expected:
                    different += 1
                    print(words[-1500:])
                shutil.rmtree(output.parent)
            report(f"kills, {program}, {ranks} rank{'s' * (ranks > 1)}", not different,
                   f"{killed} SIGKILLs over {attempts} runs of {seconds:.1f} s of CPU, {different} with other outputs; "
                   f"{half_written} left a half-written file",
                   kills=killed, runs=attempts, different=different, half_written=half_written,
                   stages=dict(sorted(stages.items())), before=dict(before))


def signals(number, folder, rng):
    """SIGTERM or SIGHUP after a random share of a run: exit code 0, and the same command goes on."""
    for program in PROGRAMS:
        expected, seconds, _ = undisturbed(program, folder)
        wrong, stages, late = 0, Counter(), 0
        for i in range(number):
            output = place(program, folder, f"{program}-signal-{i}")
            [child] = start(program, output)
            if reach(child, rng.uniform(0.02, 1) * seconds):
                child.signal(rng.choice([signal.SIGTERM, signal.SIGHUP]))
            else:
                late += 1
            code, words = child.wait()
            stages[stage(program, output)[0]] += 1
            again, more = ended(start(program, output))
            if code or again or "Traceback" in words or outputs(program, output) != expected:
                wrong += 1
                print(code, again, words[-1500:], more[-1500:])
            shutil.rmtree(output.parent)
        report(f"SIGTERM and SIGHUP, {program}", not wrong, f"{number} signals, {late} after the end, {wrong} wrong",
               signals=number, wrong=wrong, stages=dict(sorted(stages.items())))


def pairs(number, folder, rng):
    """A second process on a running output, after a random share of the first one's time."""
    for program in PROGRAMS:
        expected, seconds, _ = undisturbed(program, folder)
        refused = late = wrong = 0
        for i in range(number):
            output = place(program, folder, f"{program}-pair-{i}")
            [first] = start(program, output)
            reach(first, rng.uniform(0, 0.7) * seconds)
            second = start(program, output)
            codes, words = zip(ended([first]), ended(second))
            if sorted(codes) == [0, 2] and "is being written by process" in words[codes.index(2)]:
                refused += 1
            elif codes == (0, 0):           # the first had ended before the second came to its lock
                late += 1
            else:
                wrong += 1
                print(codes, *(text[-800:] for text in words))
            wrong += outputs(program, output) != expected
            shutil.rmtree(output.parent)
        report(f"two processes, {program}", not wrong,
               f"{number} pairs: {refused} refused, {late} came after the end, {wrong} wrong",
               pairs=number, refused=refused, late=late, wrong=wrong)


def disks(folder):
    """Files that may not grow beyond some size, at many sizes; then the same command with room."""
    for program in PROGRAMS:
        expected, *_ = undisturbed(program, folder)
        wrong, sizes, codes = 0, [2_000, 20_000, 200_000, 1_000_000, 4_000_000, 6_000_000], Counter()
        for size in sizes:
            output = place(program, folder, f"{program}-{size}")
            code, words = ended(start(program, output, limit=size))
            codes[code] += 1
            again, more = ended(start(program, output))
            if code not in (0, 2) or "Traceback" in words or again or outputs(program, output) != expected:
                wrong += 1
                print(size, code, again, words[-1000:], more[-1000:])
        report(f"small disks, {program}", not wrong, f"{len(sizes)} sizes, {codes[2]} refused, {wrong} wrong",
               sizes=len(sizes), refused=codes[2], wrong=wrong)


TOUCHES = {"empty": b"", "torn": None, "text": b"nope", "other bytes": b"\xff\x00\xfe" * 50, "a list": b"[1]", "null": b"null",
           "no fields": b"{}\n", "wrong kinds": b'{"id": 5, "step": "x", "ledger": 3}\n',
           "deep": b"[" * 100_000, "huge": b'{"id": "q", "step": ' + b"9" * 5000 + b"}\n", "nan": b'{"step": NaN, "id": NaN}\n'}


def touched(number, folder, rng):
    """Files of an output, damaged in many ways; then the same command: done, or one sentence. number: so
    many of all of them, drawn; 0 = all."""
    for program in PROGRAMS:
        undisturbed(program, folder)
        output = place(program, folder, f"{program}-1")
        top = output.parent
        files = sorted(path for path in top.rglob("*") if path.is_file() and path.suffix not in (".png", ".html", ".txt"))
        cases = [(path, kind) for path in files for kind in TOUCHES]
        cases = rng.sample(cases, min(number, len(cases))) if number else cases
        wrong, codes = 0, Counter()
        for path, kind in cases:
            copy = folder / "touched"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(top, copy)
            target = copy / path.relative_to(top)
            stored = path.read_bytes()
            target.write_bytes(stored[:len(stored) // 2] if TOUCHES[kind] is None else TOUCHES[kind])
            code, words = ended(start(program, copy / output.relative_to(top)))
            codes[code] += 1
            if code not in (0, 2) or "Traceback" in words:
                wrong += 1
                print(path.relative_to(top), kind, code, words[-900:])
        report(f"touched files, {program}", not wrong, f"{len(cases)} touches of {len(files)} files: {codes[0]} went on, "
               f"{codes[2]} named it, {wrong} wrong", touches=len(cases), went_on=codes[0], named=codes[2], wrong=wrong)


def main():
    global options
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="of each program, a sixth on two ranks")
    parser.add_argument("--pairs", type=int, default=40, help="of each program")
    parser.add_argument("--signals", type=int, default=20, help="of each program")
    parser.add_argument("--touches", type=int, default=0, help="of each program; 0 = every file in every way")
    parser.add_argument("--only", default="kills,signals,pairs,disks,touched")
    parser.add_argument("--programs", default="train,catts,eval")
    parser.add_argument("--fresh", action="store_true", help="new interpreters, not forked ones; kills by time alone")
    parser.add_argument("--record", help="file to which each measurement is appended, as a line of JSON")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    for name in set(PROGRAMS) - set(options.programs.split(",")):
        del PROGRAMS[name]
    few_resamples()
    rng = random.Random(options.seed)
    parts = {"kills": lambda folder: kills(options.kills, folder, rng),
             "signals": lambda folder: signals(options.signals, folder, rng),
             "pairs": lambda folder: pairs(options.pairs, folder, rng), "disks": disks,
             "touched": lambda folder: touched(options.touches, folder, rng)}
    for name in options.only.split(","):
        with tempfile.TemporaryDirectory(prefix="cdrl-faults-") as folder:
            parts[name](Path(folder).resolve())
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
