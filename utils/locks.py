"""One program an output: a lock of the operating system, which a kill frees.

`.NAME.lock` lies beside the output and says who holds it. The first rank holds it for all ranks of a run.
The file is removed at the end, and after a kill it stays, unlocked. A file system without locks (some
network ones) is named on stderr, and the program goes on.
"""
import errno
import fcntl
import functools
import json
import os
import socket
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from utils import cli
from utils.cli import InputError

CANNOT_LOCK = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY}
_held = {}                  # {path of the lock file: its open descriptor}


def lock_file(output):
    """Where the lock of a file or folder lies: beside it, or in it where its parent cannot be written."""
    real = Path(os.path.realpath(output))
    if real.is_dir() and not os.access(real.parent, os.W_OK):
        return real / ".lock"
    # a name may have 255 bytes
    return real.with_name(f".{os.fsencode(real.name)[:200].decode(errors='replace')}.lock")


def hold(output):
    """Lock an output for this process, until `release` or its end. Again in the same process: nothing.

    Raises InputError that names the holder, or says why no lock can be made there."""
    path = lock_file(output)
    if path in _held:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        number = _locked(path)
    except BlockingIOError as error:
        raise InputError(f"{cli.printable(str(output))} is being written by {_holder(path)}; wait for it, "
                         f"stop it, or choose another --output") from error
    except OSError as error:
        if error.errno not in CANNOT_LOCK:
            raise InputError(f"--output {str(output)!r} cannot be written ({error.strerror}); choose another "
                             "place") from error
        cli.warn(f"the file system of {output} cannot lock ({error.strerror}); start no second program on "
                 "this output while this one runs")
        return
    before = _read(path)
    if before.get("host", socket.gethostname()) != socket.gethostname():
        cli.warn(f"{output}: {_words(before)} held it and has not released it. If it still runs, stop this "
                 "program: the file system may lock on one machine only")
    record = {"pid": os.getpid(), "host": socket.gethostname(), "command": Path(sys.argv[0]).name,
              "since": time.strftime("%Y-%m-%d %H:%M:%S %Z")}
    try:
        os.ftruncate(number, 0)
        os.pwrite(number, json.dumps(record).encode(), 0)
    except OSError:                         # a full disk: it is locked all the same, by somebody unnamed
        pass
    _held[path] = number


def _locked(path):
    """Open and lock a file -> its descriptor. Raises BlockingIOError where another process holds it."""
    while True:
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(number), os.stat(path)):
                return number
        except FileNotFoundError:           # the holder has removed it between our two calls
            pass
        except OSError:
            os.close(number)
            raise
        os.close(number)


def _read(path):
    try:
        return dict(cli.parse_json(path.read_bytes()[:10_000]))
    except (OSError, ValueError, TypeError):
        return {}


def _words(record):
    return cli.printable(f"process {record.get('pid', '?')} ({record.get('command', '?')}) on host "
                         f"{record.get('host', '?')}")


def _holder(path):
    """Who holds a lock, in words. Its record is written a moment after it was locked."""
    for _ in range(20):
        if record := _read(path):
            return f"{_words(record)} since {cli.printable(str(record.get('since', '?')))}"
        time.sleep(0.05)
    return "another process"


def release(kept=()):
    """Free the locks that this process holds, but those of `kept` (paths of lock files)."""
    for path in [path for path in _held if path not in kept]:
        try:
            path.unlink(missing_ok=True)        # before it is freed: nobody else can hold it meanwhile
        except OSError:                         # a read-only or vanished folder
            pass
        os.close(_held.pop(path))


@contextmanager
def held(output):
    """`hold` an output inside; locks that were held before stay."""
    before = set(_held)
    hold(output)
    try:
        yield
    finally:
        release(before)


def released_after(function):
    """A function that frees the locks which it took, however it ends."""
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        before = set(_held)
        try:
            return function(*args, **kwargs)
        finally:
            release(before)
    return wrapper
