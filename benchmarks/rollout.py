"""G = 8 samples with confidence for a batch of questions: ours against transformers' `generate`.

    python benchmarks/rollout.py                    # the tiny model and a random Qwen2.5-VL with 151,936 words; minutes
    python benchmarks/rollout.py --rounds 1 --new_tokens 16

Contenders, all on the same prompts and pictures, each completion exactly --new_tokens long:
(a) generate(num_return_sequences=8, output_scores=True), then confidence from the stored scores, as the authors' release does;
(b) generate without scores, so without confidence; (c) generate with a logits processor that computes the confidence online.
Beside them: ours without the confidence, for what it costs, and two bounds that nobody who decodes with transformers' layers
can go below. "the layers alone": one forward pass a token with no attention in them, and nothing chosen. "the least": with them
what nobody can do without, each once and on memory that lies as it is liked best, so that its figures mean nothing: the prompts
and pictures are read; queries meet keys and weights meet values, those of a prompt once for all its samples, and those of each
sample's own words; a softmax; the vocabulary head; the distribution, a draw from it, its log-normaliser, its k largest.
First it is checked that greedy decoding gives the same tokens, ours and generate's.
"""
import argparse
import json

import torch
from common import (
    ROOT,
    VLM,
    at_least,
    big_vocabulary,
    data,
    endless,
    extra_memory,
    memory_of,
    picture,
    side_by_side,
    versions,
)
from transformers import AttentionInterface, LogitsProcessor, LogitsProcessorList
from transformers.masking_utils import AttentionMaskInterface

import reward
from reward import token_confidence
from utils import cli, shared_prefix

GROUP = 8
ROUNDS = {"tiny": 5, "151,936 words": 1}        # the models, and how many times --rounds
AttentionInterface.register("nothing", lambda module, query, *args, **kwargs: (query.transpose(1, 2), None))
for bare in ("nothing", "products"):
    AttentionMaskInterface.register(bare, lambda *args, **kwargs: None)


def contenders(vlm, images, prompts, new_tokens):
    """{name: function}; each returns confidences (B * G, T), None for (b)."""
    inputs = vlm.encode(images, prompts)
    kwargs = dict(max_new_tokens=new_tokens, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, num_return_sequences=GROUP,
                  return_dict_in_generate=True)

    def ours():
        groups = vlm.sample(images, prompts, GROUP, max_new_tokens=new_tokens)
        return torch.stack([r.confidences for group in groups for r in group])

    def silent():
        reward.token_confidence = lambda logits, *_: logits[..., 0]
        try:
            vlm.sample(images, prompts, GROUP, max_new_tokens=new_tokens)
        finally:
            reward.token_confidence = token_confidence

    @torch.inference_mode()
    def layers():
        decoder, rows = vlm.model.get_decoder(), len(prompts) * GROUP
        word = vlm.model.get_input_embeddings()(torch.full((rows, 1), 5))
        with shared_prefix.attention_of(decoder, "nothing"):
            for t in range(new_tokens - 1):
                decoder(inputs_embeds=word, position_ids=torch.full((3, rows, 1), t), use_cache=False)

    @torch.inference_mode()
    def least():
        decoder, rows, length = vlm.model.get_decoder(), len(prompts) * GROUP, inputs["input_ids"].shape[1]
        config, t = decoder.config, 0
        heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        prompt = torch.randn(len(prompts), heads, length, width)                                        # (B, H, L, d)
        answer_keys = torch.randn(rows, heads, new_tokens, width)                                               # (R, H, T, d)
        scores = torch.randn(rows, heads, config.num_attention_heads // heads, length + new_tokens)     # (R, H, r, L + T)
        uniform = torch.rand(rows, 1, dtype=torch.float64)

        def products(module, query, *args, **kwargs):
            shared, apart = query.view(len(prompts), heads, -1, width), query.view(rows, heads, -1, width)
            keys = answer_keys[:, :, :t + 1]
            to_prompt, to_own = shared @ prompt.transpose(2, 3), apart @ keys.transpose(2, 3)
            scores[..., :length + t + 1].softmax(-1)
            return (to_prompt @ prompt).view(rows, 1, -1, width) + (to_own @ keys).view(rows, 1, -1, width), None

        AttentionInterface.register("products", products)
        vlm.prefill(images, prompts)
        word = vlm.model.get_input_embeddings()(torch.full((rows, 1), 5))
        with shared_prefix.attention_of(decoder, "products"):
            for t in range(new_tokens - 1):
                hidden = decoder(inputs_embeds=word, position_ids=torch.full((3, rows, 1), t), use_cache=False)[0][:, -1]
                logits = vlm.logits(hidden)
                torch.searchsorted(logits.double().softmax(-1).cumsum(-1), uniform)
                token_confidence(logits, vlm.top_k, logits.logsumexp(-1))

    @torch.no_grad()
    def stored():
        out = vlm.model.generate(**inputs, **kwargs, output_scores=True)
        return token_confidence(torch.stack(out.scores, 1), vlm.top_k)

    @torch.no_grad()
    def plain():
        vlm.model.generate(**inputs, **kwargs)

    @torch.no_grad()
    def online():
        confidences = []

        class Confidence(LogitsProcessor):
            def __call__(self, input_ids, scores):
                confidences.append(token_confidence(scores, vlm.top_k))
                return scores
        vlm.model.generate(**inputs, **kwargs, logits_processor=LogitsProcessorList([Confidence()]))
        return torch.stack(confidences, 1)

    return {"ours": ours, "(a) generate, stored scores": stored, "(b) generate, no confidence": plain,
            "(c) generate, online processor": online, "ours, no confidence": silent, "the layers alone": layers,
            "the least": least}


def same_greedy(vlm, images, prompts, new_tokens):
    """Greedy tokens, ours and generate's, are the same; neither says what ours never says (an image placeholder)."""
    with torch.no_grad():
        inputs = vlm.encode(images, prompts)
        theirs = vlm.model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False,
                                    suppress_tokens=vlm.banned.nonzero()[:, 0].tolist())[:, inputs["input_ids"].shape[1]:]
    ours = torch.stack([group[0].tokens for group in vlm.sample(images, prompts, greedy=True, max_new_tokens=new_tokens)])
    return torch.equal(ours, theirs)


def setting(name):
    """-> vlm, images, prompts."""
    if name == "tiny":
        samples = [data.synthetic("val", 0, i) for i in range(8)]
        return endless(VLM.load(ROOT / "tiny" / "base")), [s.images for s in samples], [data.prompt(s) for s in samples]
    return endless(big_vocabulary()), [[picture()]], ["How many red circles are there?"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=at_least(1), default=5, help="medians are over so many, after a warm-up; five times "
                        "as many of the tiny model, whose rollouts of a second are soon disturbed")
    parser.add_argument("--models", nargs="+", default=list(ROUNDS), choices=list(ROUNDS))
    parser.add_argument("--new_tokens", type=at_least(1), default=128, help="length of every completion")
    parser.add_argument("--only", nargs=2, metavar=("SETTING", "CONTENDER"), help="print what one run adds to memory")
    args = parser.parse_args()
    if args.only:
        if args.only[0] not in ROUNDS:
            parser.error(f"--only {args.only[0]}: one of {', '.join(ROUNDS)} is expected")
        runs = contenders(*setting(args.only[0]), args.new_tokens)
        if args.only[1] not in runs:
            parser.error(f"--only {args.only[0]} {args.only[1]!r}: one of {', '.join(runs)} is expected")
        print(json.dumps(extra_memory(runs[args.only[1]])))
        return
    print(versions())
    for name in args.models:
        vlm, images, prompts = setting(name)
        runs = contenders(vlm, images, prompts, args.new_tokens)
        print(f"\n{name}: {len(prompts)} questions x {GROUP} x {args.new_tokens} tokens; greedy tokens equal: "
              f"{same_greedy(vlm, images, prompts, args.new_tokens)}")
        seconds = side_by_side(runs, args.rounds * ROUNDS[name])
        print(cli.table({run: {"seconds": value, "ratio to ours": value / seconds["ours"], "extra MiB": float(memory_of(
            __file__, "--only", name, run, "--new_tokens", str(args.new_tokens)))} for run, value in seconds.items()}))


if __name__ == "__main__":
    main()
