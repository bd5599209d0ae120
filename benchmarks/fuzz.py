"""Fuzzed inputs: texts for the judge, replies of the Expert, files of questions, pictures.

    python benchmarks/fuzz.py                                         # 100,000 of each kind, an hour of one core
    python benchmarks/fuzz.py --number 2000 --only judge,pictures
    python benchmarks/fuzz.py --first 20000 --number 20000 --record results/faults.jsonl

An input that raises another exception than the documented one, or takes above .1 s, is printed. Times are of
this process's CPU, so that a busy machine makes none slow. Input number n is the same whatever --first is.
Each line that it prints is one measurement of results/reliability.md. Exit code 1 where one was bad.
"""
import argparse
import contextlib
import io
import json
import os
import random
import sys
import tempfile
import time
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from PIL import Image, ImageDraw  # noqa: E402

import data  # noqa: E402
from utils import judge, replies  # noqa: E402
from utils.cli import InputError  # noqa: E402

SLOW = 0.1                      # seconds that one input may take
MEMORY = 200                    # MB that a process may grow


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


def fuzz(kind, make, first, number, seed):
    """One kind of inputs, numbers `first` to `first + number` -> its measurement (dict)."""
    slow, odd, worst, began_with = 0, {}, 0.0, None
    for i in range(first, first + number):
        run, documented, content = make(random.Random(f"{kind} {seed} {i}"))
        began_with = memory() if i == first + min(200, number - 1) else began_with
        began = time.process_time()
        try:
            run()
        except documented:
            pass
        except Exception as error:
            odd.setdefault(f"{type(error).__name__}: {str(error)[:80]}", (i, repr(content[:200])))
        seconds = time.process_time() - began
        slow += seconds > SLOW
        if seconds > max(worst, SLOW):
            print(f"      {kind} {i}: {seconds:.2f} s, {len(content):,} long, {content[:60]!r} .. {content[-30:]!r}", flush=True)
        worst = max(worst, seconds)
    for name, where in odd.items():
        print("     ", name, *where)
    return {"inputs": number, "first": first, "slow": slow, "worst": round(worst, 3), "other_exceptions": len(odd),
            "grown_mb": round(memory() - began_with)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--number", type=int, default=100_000, help="inputs of each kind")
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    parser.add_argument("--only", default="judge,replies,loaders,pictures")
    parser.add_argument("--record", help="file to which each measurement is appended, as a line of JSON")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    is_bad, stored = False, picture_files()
    with tempfile.TemporaryDirectory(prefix="cdrl-fuzz-") as folder:
        kinds = {"judge": judged, "replies": replied, "loaders": lambda rng: loaded(rng, Path(folder)),
                 "pictures": lambda rng: pictured(rng, stored)}
        for kind in args.only.split(","):
            row = fuzz(kind, kinds[kind], args.first, args.number, args.seed)
            good = not row["slow"] and not row["other_exceptions"] and row["grown_mb"] < MEMORY
            is_bad = is_bad or not good
            print(f"{'ok  ' if good else 'FAIL'}  fuzz, {kind}: {row}", flush=True)
            if args.record:
                with open(args.record, "a") as file:
                    file.write(json.dumps({"what": f"fuzz, {kind}", "good": good, **row, "seed": args.seed,
                                           "date": time.strftime("%Y-%m-%d")}) + "\n")
    sys.exit(is_bad)


if __name__ == "__main__":
    main()
