"""Faults on purpose: kills, second processes, small disks, touched files, fuzzed inputs.

    python benchmarks/faults.py                                       # everything, some hours
    python benchmarks/faults.py --kills 6 --pairs 4 --fuzz 2000       # a quarter of an hour
    python benchmarks/faults.py --only fuzz,touched

Each line that it prints is one measurement of results/reliability.md. A kill is SIGKILL after a random time,
then the same command, until it ends; the outputs must be those of a run that nobody disturbed. Times of
fuzzed inputs are of this process's CPU, so that a busy machine makes none slow. Exit code 1 where something
was lost, let in, or took longer than .1 s.
"""
import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from PIL import Image, ImageDraw  # noqa: E402

import data  # noqa: E402
from utils import judge  # noqa: E402
from utils.cli import InputError  # noqa: E402

SLOW = 0.1                      # seconds that one input may take
PORT = 29_400
TRAIN = ["train_cdrl.py", "--steps", "6", "--batch_size", "4", "--group_size", "2", "--eval_size", "2", "--max_new_tokens",
         "12", "--scale_questions", "4", "--save_every", "1", "--patience", "0"]
CATTS = ["catts.py", "--data", "synthetic", "--limit", "8", "--batch_size", "2", "--samples", "2", "--max_new_tokens", "12"]
EVAL = ["eval.py", "--limit", "4", "--batch_size", "2", "--samples", "2", "--sizes", "2", "--max_new_tokens", "12", "--t",
        "500", "--regions", "key", "--probe_samples", "1"]
PROGRAMS = {"train": TRAIN, "catts": CATTS, "eval": EVAL}
failures = []


def report(name, good, words):
    print(f"{'ok  ' if good else 'FAIL'}  {name}: {words}", flush=True)
    if not good:
        failures.append(name)


# ---- Whole programs

def start(program, output, ranks=1, limit=None, more=()):
    """Start a program on one process or several -> list of Popen. limit: bytes that a file may have."""
    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    global PORT
    PORT += 1
    commands = [sys.executable, *PROGRAMS[program], "--output", str(output), *more]
    rank_settings = [{"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "MASTER_ADDR": "localhost",
                      "MASTER_PORT": str(PORT)} if ranks > 1 else {} for rank in range(ranks)]
    return [subprocess.Popen(commands, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                             preexec_fn=small_files if limit else None,
                             env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **settings})
            for settings in rank_settings]


def ended(processes):
    """Wait -> (exit code of the first rank, its words)."""
    words = [process.communicate()[0] for process in processes]
    return processes[0].returncode, words[0]


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


def undisturbed(program, folder, ranks):
    output = place(program, folder, f"{program}-{ranks}")
    began = time.monotonic()
    code, words = ended(start(program, output, ranks))
    assert code == 0, words[-3000:]
    return outputs(program, output), time.monotonic() - began


def kills(number, folder, rng):
    """Random SIGKILLs, a sixth of them on two ranks."""
    for program in PROGRAMS:
        for ranks, wanted in ((1, number - number // 6), (2, number // 6)):
            if not wanted:
                continue
            expected, seconds = undisturbed(program, folder, ranks)
            killed = different = attempts = 0
            while killed < wanted:
                attempts += 1
                output = place(program, folder, f"{program}-{ranks}-{attempts}")
                while True:
                    processes = start(program, output, ranks)
                    deadline = time.monotonic() + rng.uniform(0.1, 1.1) * seconds
                    while killed < wanted and time.monotonic() < deadline and any(p.poll() is None for p in processes):
                        time.sleep(0.02)
                    if killed < wanted and all(p.poll() is None for p in processes):
                        for process in processes:
                            process.kill()
                        killed += 1
                        ended(processes)
                        continue
                    code, words = ended(processes)
                    break
                if code or outputs(program, output) != expected:
                    different += 1
                    print(words[-1500:])
                shutil.rmtree(output.parent)
            report(f"kills, {program}, {ranks} rank{'s' * (ranks > 1)}", not different,
                   f"{killed} SIGKILLs over {attempts} runs of {seconds:.0f} s, {different} with other outputs")


def pairs(number, folder, rng):
    """A second process on a running output, after a random time."""
    for program in PROGRAMS:
        expected, seconds = undisturbed(program, folder, 1)
        refused = late = wrong = 0
        for i in range(number):
            output = place(program, folder, f"{program}-pair-{i}")
            first = start(program, output)
            time.sleep(rng.uniform(0, 0.3) * seconds)
            second = start(program, output)
            codes, words = zip(ended(first), ended(second))
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
               f"{number} pairs: {refused} refused, {late} came after the end, {wrong} wrong")


def disks(folder):
    """Files that may not grow beyond some size, at many sizes; then the same command with room."""
    for program in PROGRAMS:
        expected, _ = undisturbed(program, folder, 1)
        wrong, sizes = 0, [50, 2_000, 20_000, 200_000, 1_000_000, 4_000_000, 6_000_000]
        for size in sizes:
            output = place(program, folder, f"{program}-{size}")
            code, words = ended(start(program, output, limit=size))
            good = code in (0, 2) and "Traceback" not in words
            code, more = ended(start(program, output))
            if not good or code or outputs(program, output) != expected:
                wrong += 1
                print(size, words[-1000:], more[-1000:])
        report(f"small disks, {program}", not wrong, f"{len(sizes)} sizes, {wrong} wrong")


TOUCHES = {"empty": b"", "torn": None, "text": b"nope", "other bytes": b"\xff\x00\xfe" * 50, "a list": b"[1]", "null": b"null",
           "no fields": b"{}\n", "wrong kinds": b'{"id": 5, "step": "x", "ledger": 3}\n'}


def touched(folder):
    """Every file of an output, damaged in every way; then the same command: done, or one sentence."""
    for program in PROGRAMS:
        undisturbed(program, folder, 1)
        output = place(program, folder, f"{program}-1")
        top = output.parent
        files = sorted(path for path in top.rglob("*") if path.is_file() and path.suffix not in (".png", ".html", ".txt"))
        wrong = tried = 0
        for path in files:
            for kind, content in TOUCHES.items():
                copy = folder / "touched"
                shutil.rmtree(copy, ignore_errors=True)
                shutil.copytree(top, copy)
                target = copy / path.relative_to(top)
                target.write_bytes(path.read_bytes()[:path.stat().st_size // 2] if content is None else content)
                code, words = ended(start(program, copy / output.relative_to(top)))
                tried += 1
                if code not in (0, 2) or "Traceback" in words:
                    wrong += 1
                    print(path.relative_to(top), kind, code, words[-700:])
        report(f"touched files, {program}", not wrong, f"{len(files)} files x {len(TOUCHES)}, {wrong} of {tried} wrong")


# ---- Fuzzed inputs

PIECES = [r"\boxed{", "}", "{", "**", "(A)", "B.", "the answer is ", "Answer: ", "答案是", "7", "1/2", r"\frac{1}{2}", "-", "=", ",",
          ";", " and ", " or ", "not ", "x", "\n", " ", "\t", "$", r"\(", r"\)", "[", "]", "(", ")", "%", "°", "red", "3.14", "1e9",
          "²", "√", "\\", "'", '"', "would be ", "wait, ", ".", "?", "!", "^", "_", "±", "∈", "≤", "|", "<|im_end|>", "π", "\u202e",
          "\x1b[2J", "\ud800", "9" * 40, "text{", "begin{", "sqrt[3]{", "and", "A", "AB'", "  ", "```json", "```", ":", "\u00a0"]


def words_of(rng, longest=400):
    """A text of pieces: some short, some long, some one piece many times."""
    kind = rng.random()
    if kind < 0.15:
        unit = "".join(rng.choices(PIECES, k=rng.randint(1, 3)))
        return rng.choice(PIECES) + unit * rng.randint(1, 20_000 // len(unit)) + rng.choice(PIECES)
    return "".join(rng.choices(PIECES, k=rng.randint(1, longest if kind > 0.9 else 30)))


def judged(rng):
    sample = data.Sample("q", [], "?", rng.choice(["7", "B", "1/2", words_of(rng, 20)[:100] or "x"]),
                         rng.choice([None, ["red", "blue", "7"], [words_of(rng, 5)[:60] or "a", "b"]]))
    text = words_of(rng)
    def run():
        judge.is_correct(text, sample)
        judge.equivalent(text[:900], sample.answer, sample.choices)
    return run, (), text


def replied(rng):
    from utils import experts
    try:
        from utils import replies
    except ImportError:
        replies = experts
    kind = rng.random()
    if kind < 0.5:
        text = json.dumps(rng.choice([[0.1, 0.9], [1, "x"], [], {"a": 1}, [1e400], [True, 1], [["a"]], "x"]))
        blanks = [rng.choice(" \n\t") * rng.randint(0, 5000) for _ in range(4)]
        text = "".join((blanks[0], rng.choice(["", "```", "```json", "so: "]), blanks[1], text, blanks[2],
                        rng.choice(["", "```", "`", "["]), blanks[3], rng.choice(["", "x"])))
    else:
        text = words_of(rng)
    def run():
        for parse in (lambda: replies.parse_probabilities(text, 2), lambda: replies.parse_order(text, data.MODULES),
                      lambda: replies.parse_critique(text)):
            with contextlib.suppress(ValueError):
                parse()
    return run, (), text


def loaded(rng, folder):
    def cell():
        return rng.choice([words_of(rng, 4)[:200], 5, None, [], ["a"], {"a": 1}, True, 1e308, "a.png", "../a.png", "7", ""])
    keys = ["id", "question", "answer", "image", "choices", "options", "A", "B", "index", "hint", "meta", "metadata", "precision",
            "messages", "conversations", "unit", "extra_info", "problem", "solution", "image_1", "label", "reward_model"]
    rows = [{**({"id": str(i), "question": "q?", "answer": "7"} if rng.random() < 0.7 else {}),
             **{rng.choice(keys): cell() for _ in range(rng.randint(0, 5))}} for i in range(rng.randint(1, 4))]
    suffix = rng.choice([".jsonl", ".json", ".csv", ".tsv", ".parquet"])
    if suffix in (".jsonl", ".json"):
        content = "\n".join(map(json.dumps, rows)) if suffix == ".jsonl" else json.dumps(rows)
        content = content.encode(errors="replace")
    elif suffix == ".parquet":
        content = b"PAR1" + rng.randbytes(rng.randint(0, 200)) + b"PAR1"
    else:
        mark = "," if suffix == ".csv" else "\t"
        names = rng.sample(keys, rng.randint(1, 6))
        content = "\n".join(mark.join(line) for line in [names] + [[str(cell()) for _ in range(rng.randint(0, 7))] for _ in rows])
        content = content.encode(errors="replace")
    content = bytearray(content)
    for _ in range(rng.choice([0, 0, 1, 5])):
        if content:
            content[rng.randrange(len(content))] = rng.randrange(256)
    path = folder / f"fuzz{suffix}"
    path.write_bytes(content)
    def run():
        with contextlib.redirect_stderr(io.StringIO()):
            for sample in data.load(str(path), strict=rng.random() < 0.5, answered=rng.random() < 0.5):
                data.prompt(sample)
    return run, (InputError,), bytes(content)


def picture_files():
    """One small picture in every format that is written here -> list of bytes."""
    image = Image.new("RGB", (40, 30), "white")
    ImageDraw.Draw(image).ellipse((5, 5, 30, 25), fill="red")
    stored = []
    for kind, mode in (("PNG", "RGB"), ("PNG", "P"), ("PNG", "I;16"), ("JPEG", "RGB"), ("JPEG", "CMYK"), ("GIF", "P"),
                       ("WEBP", "RGB"), ("TIFF", "RGB"), ("TIFF", "F"), ("BMP", "RGB"), ("PPM", "RGB"), ("TGA", "RGB"),
                       ("ICO", "RGB"), ("PCX", "RGB"), ("JPEG2000", "RGB"), ("AVIF", "RGB")):
        with contextlib.suppress(Exception):            # a Pillow without that format
            converted = image.convert("I").convert(mode) if mode == "I;16" else image.convert(mode)
            converted.save(buffer := io.BytesIO(), kind)
            stored.append(buffer.getvalue())
    for kind, side, options in (("PNG", 7000, {}), ("GIF", 7000, {}), ("WEBP", 7000, {"lossless": True}), ("JPEG2000", 7000, {}),
                                ("TIFF", 1500, {"compression": "tiff_deflate"}), ("JPEG", 1500, {"progressive": True})):
        with contextlib.suppress(Exception):            # few bytes that claim many pixels
            Image.new("L", (side, side)).save(buffer := io.BytesIO(), kind, **options)
            stored.append(buffer.getvalue())
    frames = [Image.new("P", (1000, 1000), i) for i in range(30)]
    frames[0].save(buffer := io.BytesIO(), "GIF", save_all=True, append_images=frames[1:])
    return [*stored, buffer.getvalue()]


def with_sums(content):
    """A PNG with the check sums that its chunks need; other files as they are."""
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return content
    out, at = bytearray(content), 8
    while at + 12 <= len(out) and (length := int.from_bytes(out[at:at + 4], "big")) <= len(out) - at - 12:
        out[at + 8 + length:at + 12 + length] = zlib.crc32(out[at + 4:at + 8 + length]).to_bytes(4, "big")
        at += 12 + length
    return bytes(out)


def pictured(rng, stored):
    content = bytearray(rng.choice(stored))
    for _ in range(rng.choice([1, 1, 3, 20])):
        at = rng.randrange(min(len(content), 200) if rng.random() < 0.7 else len(content))
        content[at:at + rng.choice([1, 1, 2, 4])] = rng.choice([bytes([rng.randrange(256)]), b"\xff\xff\xff\x7f", b"\0\0"])
    if rng.random() < 0.1:
        del content[rng.randrange(len(content)):]
    if rng.random() < 0.3:                              # another width or height where one may stand
        width, big = rng.choice([40, 30]), rng.choice([0, 1, 65535, 16383, 8000, 2**24 - 1])
        for size, order in ((2, "big"), (2, "little"), (4, "big"), (4, "little")):
            if (at := content.find(width.to_bytes(size, order))) >= 0 and big < 256**size:
                content[at:at + size] = big.to_bytes(size, order)
                break
    content = with_sums(bytes(content))
    sample = data.Sample("q", [content], "?")
    return sample.pictures, (InputError,), content


def memory():
    """MB that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def fuzz(number, folder, seed):
    stored = picture_files()
    kinds = {"judge": judged, "replies": replied, "loaders": lambda rng: loaded(rng, folder),
             "pictures": lambda rng: pictured(rng, stored)}
    for kind, make in kinds.items():
        rng, slow, odd, worst, first = random.Random(f"{kind} {seed}"), 0, {}, 0.0, None
        for i in range(number):
            run, documented, shown = make(rng)
            first = memory() if i == min(200, number - 1) else first
            began = time.process_time()
            try:
                run()
            except documented:
                pass
            except Exception as error:
                name = f"{type(error).__name__}: {str(error)[:80]}"
                odd.setdefault(name, (i, repr(shown[:200])))
            took = time.process_time() - began
            slow += took > SLOW
            if took > max(worst, SLOW):
                print(f"      {kind} {i}: {took:.2f} s, {len(shown):,} long, {shown[:60]!r} .. {shown[-30:]!r}", flush=True)
            worst = max(worst, took)
        grown = memory() - first
        report(f"fuzz, {kind}", not slow and not odd and grown < 200,
               f"{number:,} inputs, {slow} above {SLOW} s (worst {worst:.2f} s), {len(odd)} kinds of other exceptions, "
               f"{grown:.0f} MB more at the end")
        for name, where in odd.items():
            print("     ", name, *where)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="of each program, a sixth on two ranks")
    parser.add_argument("--pairs", type=int, default=40, help="of each program")
    parser.add_argument("--fuzz", type=int, default=100_000, help="inputs of each kind")
    parser.add_argument("--only", default="kills,pairs,disks,touched,fuzz")
    parser.add_argument("--programs", default="train,catts,eval")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    for name in set(PROGRAMS) - set(args.programs.split(",")):
        del PROGRAMS[name]
    rng = random.Random(args.seed)
    parts = {"kills": lambda folder: kills(args.kills, folder, rng), "pairs": lambda folder: pairs(args.pairs, folder, rng),
             "disks": disks, "touched": touched, "fuzz": lambda folder: fuzz(args.fuzz, folder, args.seed)}
    for name in args.only.split(","):
        with tempfile.TemporaryDirectory(prefix="cdrl-faults-") as folder:
            parts[name](Path(folder))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
