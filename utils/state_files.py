"""The state of a training on disk: safetensors files and an index of rows. No pickle is written or read.

Each rank writes the rows that it holds, in files of at most FILE_BYTES. index.json says for every tensor its
dtype, its shape, and which file holds which rows. So any number of ranks reads what any number has written:
each takes the rows that it needs. Only the first dimension is ever split, which is how FSDP2 shards.
"""
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from utils.cli import parse_json

INDEX = "index.json"
FILE_BYTES = 2**30              # a file is gathered in the CPU's memory before it is written


def local(tensor):
    """This rank's rows of a tensor, without gradient."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def rows_of(tensor):
    """Rows of this rank's share; a number counts as one."""
    return local(tensor).shape[0] if tensor.ndim else 1


def starts(tensors, gathered, rank):
    """{name: (first row of this rank's share, whether every rank holds all rows)}. All ranks call it.

    gathered: function(list) -> the lists of all ranks, one after another."""
    by_rank = gathered([[rows_of(tensor) for tensor in tensors.values()]])
    places = {}
    for i, (name, tensor) in enumerate(tensors.items()):
        rows = [counts[i] for counts in by_rank]
        replicated = all(count == (tensor.shape[0] if tensor.ndim else 1) for count in rows)
        places[name] = (0 if replicated else sum(rows[:rank]), replicated)
    return places


def write(tensors, folder, places, rank, world):
    """Write this rank's share of {name: tensor or DTensor} -> [(name, file, first row, rows), ...].

    What all ranks hold is written by one of them, in turns. Raises OSError or SafetensorError."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces, batch, size = [], {}, 0

    def flush():
        nonlocal batch, size
        if batch:
            file = f"rank{rank}-{len({piece[1] for piece in pieces})}.safetensors"
            save_file(batch, folder / file)
            pieces.extend((name, file, places[name][0], rows_of(tensors[name])) for name in batch)
        batch, size = {}, 0

    for i, (name, tensor) in enumerate(tensors.items()):
        start, replicated = places[name]
        if (i % world if replicated else rank) != rank or not rows_of(tensor):
            continue
        share = local(tensor)
        if batch and size + share.nbytes > FILE_BYTES:
            flush()
        batch[name], size = share.cpu().contiguous(), size + share.nbytes
    flush()
    return pieces


def write_index(tensors, pieces, folder):
    """The index of what all ranks have written. pieces: of all ranks."""
    index = {name: {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape),
                    "pieces": []} for name, tensor in tensors.items()}
    for name, file, start, rows in pieces:
        index[name]["pieces"].append([file, start, rows])
    (folder / INDEX).write_text(json.dumps(index))


def read_index(folder):
    """{name: {"dtype", "shape", "pieces"}}. Raises OSError, or ValueError for another kind of file."""
    index = parse_json((folder / INDEX).read_text())
    if not isinstance(index, dict) or not all(isinstance(entry, dict) for entry in index.values()):
        raise ValueError(f"{INDEX} is no index")
    return index


@torch.no_grad()
def read(tensors, folder, places):
    """Fill this rank's share of {name: tensor or DTensor} in place. Raises OSError, KeyError, TypeError,
    ValueError or SafetensorError where the files are not those of such tensors."""
    index, files = read_index(folder), {}

    def opened(file):
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{INDEX} names the file {str(file)[:60]!r}")
        if file not in files:
            files[file] = safe_open(folder / file, "pt")
        return files[file]

    for name, tensor in tensors.items():
        entry, share, (start, _) = index[name], local(tensor), places[name]
        if [str(tensor.dtype), list(tensor.shape)] != [f"torch.{entry['dtype']}", entry["shape"]]:
            raise ValueError(f"{name} is {entry['dtype']} {entry['shape']} there, and {tensor.dtype} "
                             f"{list(tensor.shape)} here")
        end, missing = start + rows_of(tensor), rows_of(tensor)
        for file, first, rows in entry["pieces"]:
            low, high = max(start, first), min(end, first + rows)
            if low >= high:
                continue
            if tensor.ndim:
                share[low - start:high - start] = opened(file).get_slice(name)[low - first:high - first]
            else:
                share.copy_(opened(file).get_tensor(name))
            missing -= high - low
        if missing:
            raise ValueError(f"{missing} rows of {name} are in no file")


ERRORS = (OSError, KeyError, TypeError, ValueError, IndexError, RuntimeError, SafetensorError)
