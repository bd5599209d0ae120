"""What test_models.py starts on two ranks that share the weights: the gradient of each model, against that of one process.

    two_ranks.py OUTPUT FOLDER...       # writes {folder's name: |difference| / |gradient|}

The first rank's prompt has no picture, so that it needs the vision tower for nothing but the others.
"""
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from families import IMAGES, PROMPTS

from utils import distributed
from vlm import VLM

COMPLETIONS = [torch.tensor(ids) for ids in ([40, 50, 60], [45], [50, 41], [42, 43, 44, 45])]
ROWS = [2], [0, 1, 3]


def loss(policy, rows):
    images, prompts, completions = ([values[i] for i in rows] for values in (IMAGES, PROMPTS, COMPLETIONS))
    return -policy.score(images, prompts, completions).logprobs.sum()


def difference(path):
    """Of the gradient on two ranks from that of one process, by norm (float)."""
    alone, shared = distributed.Policy(VLM.load(path, "cpu")), VLM.load(path, "cpu")
    loss(alone, range(4)).backward()
    policy = distributed.shard(shared, torch.device("cpu"), torch.float32, True)
    policy.backward(loss(policy, ROWS[dist.get_rank()]))
    off, size = 0.0, 0.0
    for one, two in zip(alone.parameters(), policy.parameters(), strict=True):
        expected = torch.zeros_like(one) if one.grad is None else one.grad
        gradient = torch.zeros_like(one) if two.grad is None else two.grad.full_tensor()
        off, size = off + (gradient - expected).square().sum(), size + expected.square().sum()
    return float((off / size).sqrt())


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    differences = {}
    for path in sys.argv[2:]:
        differences[Path(path).name] = difference(path)
        if dist.get_rank() == 0:
            Path(sys.argv[1]).write_text(json.dumps(differences))
    dist.destroy_process_group()
