"""What a program reads: told apart by content, and never what it writes."""
import os
from functools import lru_cache
from pathlib import Path

from utils import cli, distributed, locks, lora
from utils.cli import InputError

KINDS = ("*.safetensors", "*.bin", "*config.json", "*token*", "chat_template*")
UNKNOWN = ""                # the fingerprint of what is not on this disk


def files_of(path):
    """The files that make an input: itself, or a model directory's weights and settings, or the tables of a
    folder of questions -> sorted list."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        return []
    kinds = KINDS if any(path.glob("*config.json")) else ("*.jsonl", "*.json", "*.csv", "*.tsv", "*.parquet")
    return sorted({file for kind in kinds for file in path.glob(kind) if file.is_file()})


def stamp(path):
    """(name, size, times, inode) of an input's files: what changes whenever their content does -> list."""
    stats = [(file.name, file.stat()) for file in files_of(Path(path))]
    return [[name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for name, s in stats]


@lru_cache(64)
def _checksum(files, _stamps):
    return cli.checksum_of([Path(file) for file in files])


def fingerprint(path):
    """The content of a file or model directory (int), or the commit of a hub id in the cache (str). UNKNOWN
    for anything else. Of an adapter's folder it is that of its base as well."""
    folder = Path(path)
    if files := files_of(folder):
        base = lora.base_of(path)
        files += files_of(Path(base)) if base else []
        return _checksum(tuple(map(str, files)), str([stamp(file) for file in files]))
    if folder.exists() or str(path).count("/") != 1:
        return UNKNOWN
    from huggingface_hub import try_to_load_from_cache
    try:
        stored = try_to_load_from_cache(str(path), "config.json")
    except ValueError:                      # no name that a hub id can have
        return UNKNOWN
    return Path(stored).parent.name if isinstance(stored, str) else UNKNOWN


def fingerprints(stored, **paths):
    """{"NAME_checksum": fingerprint} of inputs, and "stamps" for the next time.

    stored: what a run has kept of them. Where the stamp of an input is the same, its content is not read
    again: 15 GB take a while."""
    stamps, checksums = stored.get("stamps"), {}
    stamps = stamps if isinstance(stamps, dict) else {}
    current = {name: [str(path), stamp(path)] for name, path in paths.items()}
    for name, path in paths.items():
        key = f"{name}_checksum"
        same = current[name][1] and stamps.get(name) == current[name] and key in stored
        checksums[key] = stored[key] if same and not lora.base_of(path) else fingerprint(path)
    return checksums | {"stamps": current}


def open_folder(output, names, **paths):
    """Lock a folder for files of these names, on the first rank. InputError where one of them is an input."""
    for name in names:
        refuse_as_output(Path(output) / name, **paths)
    if distributed.place()[0] == 0:
        locks.hold(output)


def refuse_as_output(output, **paths):
    """InputError where an output is one of the inputs, or a folder that holds one. paths: {flag: path or
    None}. Links, of both kinds, count as what they lead to."""
    real = Path(os.path.realpath(output))
    for flag, path in paths.items():
        if not path or not os.path.exists(path):
            continue
        source = Path(os.path.realpath(path))
        if source == real or real.is_dir() and source.is_relative_to(real) \
                or real.exists() and os.path.samefile(real, source):
            raise InputError(f"--output {str(output)!r} is or holds --{flag} {str(path)!r}, which would be "
                             "overwritten; choose another --output")
