"""The shapes of what results files hold, line by line (see `schema.fault`)."""
from utils.schema import Each, of

COST = (float, None)                                        # None: unknown
SAMPLE = {"text": str, "answer": (str, None), "tokens": int, "finished": bool, "correct": (bool, None),
          "logprob": float, "confidence": Each(float)}
VOTES = Each([[str, float], ...])                           # {source: [[answer, share], ...]}
QUESTION = {"id": str, "question": str, "source": str, "meta": dict, "choices": ([str, ...], None),
            "gold": (str, [str, ...], None)}
LEDGER = {"tokens": COST, "forward_passes": COST, "expert_calls": COST, "expert_tokens": COST,
          "seconds": COST, "parts": Each(Each(COST)), "notes": list}
# results.jsonl of catts.py
RESULT = QUESTION | {"answer": (str, None), "confidence": float, "abstained": bool, "correct": (bool, None),
                     "order": [str, ...], "votes": VOTES, "ledger": LEDGER, "samples": [SAMPLE, ...]}
# votes.jsonl of eval.py
COLLECTED = QUESTION | {
    "samples": [SAMPLE, ...], "greedy": (SAMPLE, None), "cut_only": (SAMPLE, None),
    "expert": ({"answer": (str, None), "correct": (bool, None), "tokens": COST}, None),
    "by_n": Each({"votes": VOTES, "parts": Each(Each(COST)), "notes": list, "said": dict})}


def probe_row(answer, args, states):
    """probe.jsonl of eval.py. answer: a dataclass; args: its flags."""
    answers = [of(answer)] * args.probe_samples
    places = {region: {str(t): answers for t in args.t if t} for region in args.regions}
    return {"id": str, "found": {"clean": {"0": answers}} | places, "states": dict.fromkeys(states, str)}


def corruption_row(answer, args):
    """corruptions.jsonl of eval.py: as many answers for each corruption."""
    return {"id": str, "found": Each([of(answer)] * args.probe_samples)}
