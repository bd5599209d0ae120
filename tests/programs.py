"""Programs that tests start: processes of their own, forked from one that has imported torch and transformers already. A new
interpreter takes seconds for that. What a program does is the same; one run a kind is still started as users start it."""
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["preloaded"])


def start_server():
    """The process that all programs are forked from."""
    path, os.environ["PYTHONPATH"] = os.environ.get("PYTHONPATH"), str(ROOT / "tests")      # where it finds `preloaded`
    multiprocessing.forkserver.ensure_running()
    os.environ.pop("PYTHONPATH") if path is None else os.environ.update(PYTHONPATH=path)


def _program(script, flags, folder, environment, printed):
    """What a forked process becomes: `python script flags` in a folder."""
    for number, path in zip((1, 2), printed):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[:] = [str(Path(script).parent), *environment.get("PYTHONPATH", "").split(os.pathsep),
                   *(path for path in sys.path if Path(path) not in (ROOT, ROOT / "tests"))]
    sys.argv = [str(script), *flags]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    runpy.run_path(str(script), run_name="__main__")


class Program:
    """A program on 0 ranks (plain) or more, under way. `returncode` is None until it has ended, then as of subprocess: that
    of the first rank that failed."""

    def __init__(self, script, *flags, ranks=0, cwd=ROOT, env=None):
        self.printed = [tempfile.mkstemp()[1] for _ in range(2)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        places = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": port} for rank in range(ranks)]
        script = Path(cwd, script)
        start_server()
        self.ranks = [CONTEXT.Process(target=_program, args=(script, [str(flag) for flag in flags], str(cwd),
                                                             (env or ENVIRONMENT) | place, self.printed))
                      for place in places or [{}]]
        for rank in self.ranks:
            rank.start()

    @property
    def returncode(self):
        codes = [rank.exitcode for rank in self.ranks]
        return next((code for code in codes if code), None if None in codes else 0)

    def poll(self):
        return self.returncode

    def kill(self):
        for rank in self.ranks:
            rank.kill()

    def wait(self, timeout=240):
        """-> subprocess.CompletedProcess. Ranks that do not end after one has failed are killed."""
        end, failed = time.monotonic() + timeout, None
        while any(rank.exitcode is None for rank in self.ranks):
            if self.returncode:
                failed = failed or time.monotonic()
                if time.monotonic() > failed + 20:
                    self.kill()
            if time.monotonic() > end:
                self.kill()
                raise subprocess.TimeoutExpired(str(self.ranks), timeout)
            time.sleep(0.02)
        stdout, stderr = (Path(path).read_text() for path in self.printed)
        for path in self.printed:
            os.unlink(path)
        return subprocess.CompletedProcess([], self.returncode, stdout, stderr)


def run(script, *flags, **kwargs):
    """`Program`, waited for."""
    return Program(script, *flags, **kwargs).wait()
