"""CA-TTS for each question: ours against a straightforward pipeline that runs every call from scratch.

    python benchmarks/catts.py                        # 40 built-in questions, minutes
    python benchmarks/catts.py --questions 8 --rounds 1
    python benchmarks/catts.py --latency 0.2 1        # an Expert behind a server, seconds a reply

from scratch: one question after the other; each of the 8 samples, each role of the Expert and each side of the contrast
encodes picture and prompt for itself. ours, off: all modules, questions in batches, samples share a prefill. ours, exact:
lossless early exit beside it. The answers must be the same; those that are not are counted.

--latency: wall time of a run against its bound: the larger of the base alone (an Expert that answers at once), and
calls x latency / workers.
"""
import argparse
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from common import ROOT, VLM, at_least, data, extra_memory, memory_of, side_by_side, versions

import noise
from catts import Controller, Settings
from data import MODULES
from utils import cli
from utils.experts import LocalExpert, ServerExpert, batches_in_flight
from utils.overlap import answer_batches
from utils.server import Server
from vlm import generator

BATCH = 16
CONTENDERS = {"ours, exact": {"early_exit": "exact"}, "ours, off": {}, "from scratch": {}}


class Scratch(VLM):
    """Every completion from a prefill of its own, one at a time; the same words, since each has random numbers of its own."""

    def sample(self, images, prompts, n=1, *, seed=0, **how):
        seeds = seed if isinstance(seed, list | tuple) else [f"{seed} {b}" for b in range(len(prompts))]
        streams = [generator(s) for s in seeds]             # each sample takes the next numbers of its prompt's stream
        return [[super(Scratch, self).sample([pictures], [prompt], 1, seed=[stream], **how)[0][0] for _ in range(n)]
                for pictures, prompt, stream in zip(images, prompts, streams, strict=True)]


def build(kind, **settings):
    vlm, expert = ((Scratch if kind == "from scratch" else VLM).load(ROOT / "tiny" / name) for name in ("base", "expert"))
    return Controller(vlm, LocalExpert(expert, Settings.expert_tokens), noise.ClipAttention.from_pretrained(),
                      Settings(**settings))


class Slow(BaseHTTPRequestHandler):
    """An Expert that takes `server.latency` seconds for any reply."""

    def do_POST(self):
        prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"][-1]["text"]
        time.sleep(self.server.latency)
        text = "Look again."
        if "JSON list of names" in prompt:
            text = json.dumps(MODULES)
        elif "JSON list of probabilities" in prompt:
            text = json.dumps([1] + [0] * (sum(line[:1].isdigit() for line in prompt.split("\n")) - 1))
        reply = json.dumps({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}).encode()
        self.server.calls += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_):
        pass


def overlap(samples, latencies, rounds):
    """Print the wall time of API-bound runs against their bound."""
    server, vlm, clip = ThreadingHTTPServer(("127.0.0.1", 0), Slow), VLM.load(ROOT / "tiny" / "base"), (
        noise.ClipAttention.from_pretrained())
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    rows = {}

    def seconds(latency):
        server.latency, server.calls, times = latency, 0, []
        for _ in range(rounds):
            expert = ServerExpert(Server(f"http://127.0.0.1:{server.server_address[1]}/v1", "slow"))
            controller = Controller(vlm, expert, clip, Settings())
            batches = (samples[i:i + BATCH] for i in range(0, len(samples), BATCH))
            start = time.perf_counter()
            for _ in answer_batches(controller.steps, batches, batches_in_flight(BATCH, vlm, expert)):
                pass
            times.append(time.perf_counter() - start)
        return sorted(times)[len(times) // 2], server.calls / rounds, expert.server.workers

    seconds(0.0)                                            # a warm-up
    alone, _, _ = seconds(0.0)
    for latency in latencies:
        wall, calls, workers = seconds(latency)
        bound = max(alone, calls * latency / workers)
        rows[f"{len(samples)} questions, {latency:g} s"] = {
            "calls": calls, "base alone": alone, "calls x latency / workers": calls * latency / workers,
            "seconds": wall,
            "ratio to bound": wall / bound}
    print(cli.table(rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--questions", type=at_least(1), default=40)
    parser.add_argument("--rounds", type=at_least(1), default=5, help="medians are over so many, after a warm-up")
    parser.add_argument("--latency", type=float, nargs="+", help="measure the overlap of base and Expert "
                                                                 "instead")
    parser.add_argument("--only", choices=list(CONTENDERS), help="run one contender once and print what it adds to memory")
    args = parser.parse_args()
    samples = list(data.load("synthetic", "val", args.questions))
    if args.latency:
        print(versions())
        return overlap(samples, args.latency, args.rounds)
    controllers = {name: build(name, **how) for name, how in CONTENDERS.items()}
    results = {}

    def run(name):
        size = 1 if name == "from scratch" else BATCH
        results[name] = [r for i in range(0, len(samples), size) for r in controllers[name].answer_all(samples[i:i + size])]
    if args.only:
        print(json.dumps(extra_memory(lambda: run(args.only))))
        return
    encoded = dict.fromkeys(controllers, 0)
    for name, controller in controllers.items():
        for vlm in (controller.vlm, controller.expert.vlm):
            def counted(images, prompts, inputs=None, name=name, prefill=vlm.prefill):
                encoded[name] += sum(map(len, images))
                return prefill(images, prompts, inputs)
            vlm.prefill = counted
    seconds = side_by_side({name: lambda name=name: run(name) for name in controllers}, args.rounds)
    print(versions())
    print(f"{len(samples)} questions, N = 8; a question, median of {args.rounds} rounds")
    answers = [r.answer for r in results["from scratch"]]
    print(cli.table({name: {
        "seconds": value / len(samples), "ratio to exact": value / seconds["ours, exact"],
        "tokens": sum(r.ledger.tokens + r.ledger.expert_tokens for r in results[name]) / len(samples),
        "pictures encoded": encoded[name] / len(samples) / (args.rounds + 1),
        "expert calls": sum(r.ledger.expert_calls for r in results[name]) / len(samples),
        "other answers": sum(r.answer != answer for r, answer in zip(results[name], answers)),
        "extra MiB": float(memory_of(__file__, "--only", name, "--questions", str(args.questions)))}
        for name, value in seconds.items()}))


if __name__ == "__main__":
    sys.exit(main())
