"""Log-probs and confidence with gradient, for 8 x 512 completion tokens at 151,936 words: chunks against full logits.

    python benchmarks/score.py                         # needs about 12 GB for the peer
    python benchmarks/score.py --tokens 64 --rounds 1

ours: `VLM.score`: the head sees completion tokens only, in chunks whose logits are recomputed in the backward pass.
peer: one forward pass of the whole model over prompt and completion, logits (B, L, V), log_softmax, the same three numbers.
Both end in the gradient of the same scalar; it is checked that values and gradients agree.
"""
import argparse
import json

import torch
from common import at_least, big_vocabulary, extra_memory, memory_of, picture, side_by_side, versions

from reward import token_confidence
from utils import cli

GROUP = 8


def contenders(vlm, new_tokens):
    """{name: function}; each leaves gradients and returns (2, B, T): log-probs, confidence."""
    images, prompts = [[picture()]], ["How many red circles are there?"]
    # words only: the special ids, an image placeholder among them, are lower
    ids = torch.randint(20, 400, (GROUP, new_tokens), generator=torch.Generator().manual_seed(0))

    def finish(values):
        vlm.model.zero_grad()
        (values[0].mean() + values[1].mean()).backward()
        return torch.stack([v.detach() for v in values])

    def ours():
        scores = vlm.score(images, prompts, list(ids))
        return finish((scores.logprobs, scores.confidence))

    def peer():
        inputs = vlm.encode(images * GROUP, prompts * GROUP)
        length = inputs["input_ids"].shape[1]
        extended = {**inputs, "input_ids": torch.cat([inputs["input_ids"], ids], 1),
                    "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(ids)], 1)}
        if "mm_token_type_ids" in inputs:
            extended["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(ids)], 1)
        logits = vlm.model(**extended).logits.float()[:, length - 1:-1]                            # (B, T, V)
        picked = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        return finish((picked, token_confidence(logits, vlm.top_k)))

    return {"ours": ours, "full logits": peer}


def agree(vlm, runs):
    """The largest difference of values, and of gradients relative to their largest entry."""
    values, gradients = [], []
    for run in runs.values():
        values.append(run())
        gradients.append(torch.cat([p.grad.flatten() for p in vlm.model.parameters() if p.grad is not None]))
    return ((values[0] - values[1]).abs().max().item(),
            ((gradients[0] - gradients[1]).abs().max() / gradients[1].abs().max()).item())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=at_least(1), default=5, help="medians are over so many, after a warm-up")
    parser.add_argument("--tokens", type=at_least(1), default=512, help="length of every completion")
    parser.add_argument("--only", choices=["ours", "full logits"],
                        help="run one contender once and print what it adds to memory")
    args = parser.parse_args()
    vlm = big_vocabulary()
    runs = contenders(vlm, args.tokens)
    if args.only:
        print(json.dumps(extra_memory(runs[args.only])))
        return
    print(versions())
    print("{} x {} tokens; ours against full logits: values differ by {:.1e}, gradients by {:.1e} of the largest".format(
        GROUP, args.tokens, *agree(vlm, runs)))
    seconds = side_by_side(runs, args.rounds)
    print(cli.table({run: {"seconds": value, "ratio to ours": value / seconds["ours"], "extra MiB": float(memory_of(
        __file__, "--only", run, "--tokens", str(args.tokens)))} for run, value in seconds.items()}))


if __name__ == "__main__":
    main()
