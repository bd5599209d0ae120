"""Signals while Python itself is loaded: torch and transformers take seconds, and nothing has begun yet.

Imported first of all by the programs. In a process that only imports them it changes nothing. `cli.command`
takes over as soon as it runs.
"""
import os
import signal
import sys

PROGRAMS = ("train_cdrl.py", "catts.py", "eval.py")
STOPS = (signal.SIGTERM, signal.SIGHUP)


def _stop(number, _):
    name = signal.Signals(number).name
    try:
        os.write(2, f"{os.path.basename(sys.argv[0])}: stopped by {name} before it began; what was saved is "
                    f"as it was, the same command starts again\n".encode())
    except OSError:                         # its terminal was closed
        pass
    os._exit(0)


if os.path.basename(sys.argv[0]) in PROGRAMS:
    for _number in STOPS:
        if signal.getsignal(_number) != signal.SIG_IGN:             # nohup
            signal.signal(_number, _stop)
