"""Command lines: bad input in one sentence, flags from dataclasses, tables, files written whole."""
import argparse
import errno
import json
import math
import os
import re
import signal
import stat
import sys
import threading
import urllib.parse
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path

# The built-in models: base, expert, clip.
TINY = Path(__file__).resolve().parents[1] / "tiny"


def names_in(text):
    """Words separated by commas -> list of str."""
    return [name.strip() for name in text.split(",") if name.strip()]


def printable(text):
    """One line that a terminal shows and does not obey: what a model said may hold escape sequences."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def add_sources(parser):
    """Flags that say where questions, models and the Expert come from; eval.py has the same."""
    parser.add_argument("--data", help="many questions: 'synthetic' (its test split) or a file")
    parser.add_argument("--limit", type=int, help="at most so many of them")
    parser.add_argument("--strict", action="store_true", help="a broken row of --data ends the run")
    parser.add_argument("--allow_outside", action="store_true",
                        help="pictures of --data may lie outside its folder")
    parser.add_argument("--data_seed", type=int, default=0, help="which built-in questions")
    parser.add_argument("--batch_size", type=int, default=16,
                        help="questions answered together; another number may "
                        "change the last digits")
    parser.add_argument("--model", default=str(TINY / "base"),
                        help="base: model directory, hub id, or URL of a server")
    for name in READING:
        flag = RunOptions.__dataclass_fields__[name]
        parser.add_argument(f"--{name}", type=flag.type, default=flag.default, help=flag.metadata["help"])
    parser.add_argument("--model_name", default="", help="the base model's name on its server (key: "
                                                         "MODEL_API_KEY)")
    parser.add_argument("--check_model", help="local model for Visual Self-Check when --model is a server")
    parser.add_argument("--clip", help="CLIPModel directory or hub id, finds the key regions; default: of a "
                                       "built-in --model the built-in one")
    parser.add_argument("--clip_map", default="auto", choices=("auto", "attention", "contribution"),
                        help="the map it makes; auto: attention for the built-in CLIP, contribution for any "
                             "other")
    parser.add_argument("--expert", help="'self' (the base plays the roles), directory, hub id, URL of a "
                                         "server, or 'none'; default: of a built-in --model the built-in one")
    parser.add_argument("--expert_model", default="", help="the Expert's name on its server (key: "
                                                           "EXPERT_API_KEY)")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds a server may take for a reply")
    parser.add_argument("--retries", type=int, default=4, help="how often a failed request is sent again")
    parser.add_argument("--patience", type=float, default=120.0,
                        help="longest wait in seconds that a server may ask for")
    parser.add_argument("--workers", type=int, default=8, help="requests to a server at the same time; "
                                                               "fewer after a 429")
    parser.add_argument("--cache", default="runs/cache", help="folder for servers' replies; '' = none")
    for who in ("expert", "model"):
        parser.add_argument(f"--{who}_body", metavar="JSON", help="fields added to each request, such as "
                            "'{\"enable_thinking\": false}'; null takes one out")
        parser.add_argument(f"--{who}_header", metavar="NAME=VALUE", action="append",
                            help="sent with each request; {key} "
                            "stands for the key; may be given several times")
    parser.add_argument("--thinking_tokens", type=int, default=4096, help="added to a reply's, where "
                        "a server's model thinks")
    parser.add_argument("--max_side", type=int, default=2048,
                        help="longer side, in pixels, of what a server sees; 0 = any")
    parser.add_argument("--expert_price", type=float, nargs=2, metavar=("IN", "OUT"),
                        help="of the Expert, for a million "
                        "tokens of prompts and of replies; the summary then gives money")
    parser.add_argument("--ask_above", type=int, default=1000,
                        help="calls of servers above which a run needs consent")
    parser.add_argument("--yes", action="store_true", help="consent to any number of calls")


READING = ("system", "max_pixels", "min_pixels")        # flags of every command


def check_sources(args):
    """Refuse flags of `add_sources` that cannot work. Raises InputError."""
    if args.batch_size < 1 or not 0 < args.timeout <= 1e6 or args.retries < 0:
        raise InputError(f"--batch_size {args.batch_size} and --timeout {args.timeout:g} must be above 0 (a "
                         f"time-out at most "
                         f"1e6), --retries {args.retries} not negative")
    if args.workers < 1 or not 0 <= args.patience <= 1e6 or args.max_side < 0 or args.thinking_tokens < 0:
        raise InputError(f"--workers {args.workers} must be at least 1; --patience {args.patience:g} (at "
                         f"most 1e6), --max_side {args.max_side} and --thinking_tokens "
                         f"{args.thinking_tokens} must not be negative")


def check_choices(choices):
    """Refuse options of a question that letters cannot name. choices: list of str, or None. Raises
    InputError."""
    if choices is not None and (not 2 <= len(choices) <= 26 or not all(choice.strip() for choice in choices)
                                or len(set(choices)) < len(choices)):
        raise InputError(f"--choices {' '.join(map(repr, choices))}: 2 to 26 different options are expected")


class InputError(ValueError):
    """Bad input from the user: one sentence that says what, its value, and what to do. Commands exit with
    code 2."""


class Stop(BaseException):
    """A scheduler (SIGTERM) or a closed terminal (SIGHUP) ends the program."""


def _raise_stop(number, _):
    raise Stop(signal.Signals(number).name)


@contextmanager
def on_signals(numbers, handler):
    """Inside, these signals call handler(number, frame). One that was ignored (nohup) stays ignored, and a
    thread beside the main one can set no handler."""
    previous = {}
    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, handler) for number in numbers
                    if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, earlier in previous.items():
            signal.signal(number, earlier)


class Terminal:
    """A stream that shows text and obeys none of it: control and formatting characters become blanks. Line
    ends and tabs stay, and the carriage return with which a progress bar begins.

    lost: error numbers after which the program goes on unseen: EIO, because its terminal was closed, and for
    stderr EPIPE."""

    def __init__(self, stream, lost):
        self.stream, self.lost = stream, lost

    def write(self, text):
        start = "\r" * text.startswith("\r")
        if not text.isprintable():
            text = start + "".join(c if c.isprintable() or c in "\n\t" else " " for c in text[len(start):])
        return self._if_seen(self.stream.write, text) or len(text)

    def flush(self):
        self._if_seen(self.stream.flush)

    def _if_seen(self, function, *args):
        try:
            return function(*args)
        except OSError as error:
            if error.errno not in self.lost:
                raise

    def __getattr__(self, name):
        return getattr(self.stream, name)


CURES = {errno.ENOSPC: "make room", errno.EDQUOT: "make room", errno.EFBIG: "make room",
         errno.ENAMETOOLONG: "give it a shorter name", errno.ENOENT: "put it back",
         errno.EACCES: "change its permissions", errno.EPERM: "change its permissions",
         errno.EROFS: "choose another place", errno.EISDIR: "give a file", errno.ENOTDIR: "give a folder"}


def command(name, function):
    """Run a command's main function: quiet libraries, a terminal that obeys no text, bad input as one
    sentence on stderr, ranks that part at the end.

    Exit codes: 0 done, or stopped by SIGTERM or SIGHUP with everything saved; 2 bad input, a full disk or a
    file that went away; 130 Ctrl-C; 141 the reader of a pipe went away; 1 a fault of this program.
    """
    import torch.distributed as dist
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # Replies, pictures and questions are nobody else's: files are 600, folders 700, unless the user shares
    # them.
    umask, streams = os.umask(0o077), (sys.stdout, sys.stderr)
    for stream in streams:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")            # a terminal that cannot show a character shows ?
    sys.stdout, sys.stderr = Terminal(streams[0], {errno.EIO}), Terminal(streams[1], {errno.EIO, errno.EPIPE})
    try:
        with on_signals((signal.SIGTERM, signal.SIGHUP), _raise_stop):
            result = function()
        sys.stdout.flush()
        return result
    except BrokenPipeError:             # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except InputError as error:
        raise _ended(f"{name}: {error}", 2) from None
    except OSError as error:
        if error.errno not in CURES:
            raise
        where = error.filename or "the disk of the output"
        raise _ended(f"{name}: {error.strerror}: {where}; {CURES[error.errno]}, and the same command goes on",
                     2) from None
    except Stop as error:
        raise _ended(f"{name}: stopped by {error}; what was written is saved, and the same command goes on "
                     f"from there", 0) from None
    except KeyboardInterrupt:
        raise _ended(f"{name}: stopped; the same command starts again", 130) from None
    finally:
        sys.stdout, sys.stderr = streams
        os.umask(umask)
        if dist.is_initialized():
            dist.destroy_process_group()


def _ended(sentence, code):
    """Print a last sentence -> the SystemExit. A terminal that was closed shows nothing."""
    try:
        warn(sentence)
    except OSError:
        pass
    return SystemExit(code)


def warn(text):
    """One line on stderr, whatever the text holds."""
    print(printable(text), file=sys.stderr)


def option(default, text, choices=None, *, least=None, above=None, most=None, below=None, bare=None):
    """A dataclass field that is also a command-line flag: its default, a sentence of help, what it may be.

    choices: the words it may be. least, most: bounds that are allowed values; above, below: bounds that are
    not. bare: the value of the flag without one.
    """
    bounds = {"least": least, "above": above, "most": most, "below": below}
    return field(default=default, metadata={"help": text, "choices": choices, "bounds": bounds, "bare": bare})


def check_bounds(settings):
    """Refuse a number outside the bounds of its `option`, and a float that is not finite. settings: a
    dataclass instance. Raises InputError, one sentence with flag, value and bounds."""
    for f in fields(settings):
        value, bounds = getattr(settings, f.name), f.metadata.get("bounds", {})
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"--{f.name} is {value}; a finite number is expected")
        least, above, most, below = (bounds.get(name) for name in ("least", "above", "most", "below"))
        if not ((least is None or value >= least) and (above is None or value > above)
                and (most is None or value <= most) and (below is None or value < below)):
            raise InputError(f"--{f.name} is {value}; {_expected(least, above, most, below)}")


def _expected(least, above, most, below):
    """Bounds in words (str)."""
    if most is None and below is None:
        return {(0, None): "it must not be negative"}.get((least, above)) or (
            f"it must be above {above}" if least is None else f"it must be at least {least}")
    high = f"at most {most}" if below is None else f"below {below}"
    if least is None and above is None:
        return f"it must be {high}"
    if above is None and below is None:
        return f"a number from {least} to {most} is expected"
    return f"a number {f'above {above}' if least is None else f'of at least {least}'} and {high} is expected"


@dataclass
class RunOptions:
    """How a training is run: memory, ranks, checkpoints. None of it changes the method; see also
    `checkpoint.FREE`."""
    resume: str = option("auto", "auto: go on where the run folder stopped; from: go on from its newest "
                                 "checkpoint with "
                         "another lr, steps or batch size; no: move an earlier run aside",
                         ("auto", "from", "no"))
    clip_cache: str = option("", "folder that keeps CLIP's maps for further epochs and runs; empty: none is "
                                 "kept")
    micro_batch: int = option(8, "questions a forward pass when learning; less saves memory, the gradient "
                                 "is the same", least=1)
    micro_tokens: int = option(0, "and at most so many tokens, prompts and all completions on each view, "
                                  "padding included; "
                               "0 = no limit", least=0)
    save_every: int = option(20, "steps between checkpoints", least=1)
    keep: int = option(2, "newest checkpoints that stay", least=1)
    allow_outside: bool = option(False, "pictures of --data may lie outside its folder")
    prompt: str = option("project", "form of an answer, which R_format pays: project: words, then one box; "
                                    "think: <think> and <answer> tags", ("project", "think"))
    system: str = option("", "a system prompt before each question")
    max_pixels: int = option(0, "larger pictures are shrunk to so many pixels, for any class of model; 0: "
                                "none is", least=0)
    min_pixels: int = option(0, "smaller pictures are enlarged to so many pixels; 0: none is", least=0)
    skip_broken: bool = option(False, "broken and overlong rows of --data are left out and counted; else "
                                      "they end the run")
    picture_threads: int = option(2, "threads that open the next step's pictures", least=1)
    eval_every: int = option(0, "steps between evaluations of the held-out questions, clean and noised; 0: "
                                "before and after alone", least=0)
    weights_every: int = option(0, "steps between copies of the weights alone, weights-STEP; 0: none",
                                least=0)
    keep_weights: int = option(3, "newest of them that stay", least=1)
    log: str = option("none", "metrics.jsonl also goes to tensorboard or wandb (optional packages)",
                      ("none", "tensorboard", "wandb"))
    eval_size: int = option(200, "held-out questions for the table before and after; 0 = no table", least=0)
    dtype: str = option("auto", "of the computation, auto: bfloat16 on a GPU, else float32; weights stay "
                                "float32 beside it",
                        ("auto", "float32", "bfloat16", "float16"))
    shard: str = option("auto", "fsdp: each rank holds a share of weights, gradients and optimizer state; "
                                "none: all of it; "
                        "auto: fsdp where all of it is over half of a GPU's memory", ("auto", "none", "fsdp"))
    offload: bool = option(False, "weights, gradients and optimizer state wait in the CPU's memory")
    activation_checkpointing: str = option("auto", "run each block again in the backward pass instead of "
                                                   "holding what it "
                                           "computed; auto: above 1e9 parameters", ("auto", "on", "off"))
    lora_rank: int = option(0, "rank of an adapter beside the frozen model's linear layers, which learns "
                               "alone; 0 = train all",
                            least=0)
    lora_alpha: float = option(32.0, "the adapter is scaled by lora_alpha / lora_rank", above=0)
    lora_target: str = option("language", "which linear layers get one: language, all (vision too), or "
                                          "names: q_proj,v_proj")
    merge: bool = option(False, "with --lora_rank: the final model is the merged weights, its adapter a "
                                "folder beside them")
    clip_map: str = option("auto", "CLIP's map: attention (the paper), contribution (for a CLIP not trained "
                                   "to point); auto: "
                           "attention for the built-in one alone", ("auto", "attention", "contribution"))
    patience: int = option(20, "steps in a row that teach nothing (none right, all cut off, all groups "
                               "tied) end the run; "
                           "0: never", least=0)
    explain: str = option("", "print one question's whole step in real numbers, and stop; an id, else one "
                              "of the first step",
                          bare="first")
    dry_run: bool = option(False, "print parameters, tokens and memory, and stop; refuses what cannot fit")
    memory: float = option(0.0, "GiB of a device for --dry_run and --shard auto; 0 = what the GPU says",
                           least=0)


def add_options(parser, settings):
    """One flag for each field of a dataclass made of `option`s."""
    for f in fields(settings):
        if "help" not in f.metadata:            # a group of settings with flags of its own
            continue
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        kind |= {"choices": f.metadata["choices"]} if f.metadata["choices"] else {}
        kind |= {"nargs": "?", "const": f.metadata["bare"]} if f.metadata.get("bare") else {}
        parser.add_argument(f"--{f.name}",
                            help=f"{f.metadata['help']} (default: {f.default!r})".replace("%", "%%"),
                            default=f.default if parser.argument_default is None else parser.argument_default,
                            **kind)


def parse_recipe(settings, recipes, argv=None):
    """Flags of two dataclasses, `settings` (the method) and RunOptions, its field `run` -> settings:
    defaults, then recipes[settings.recipe], then explicit flags."""
    parser = argparse.ArgumentParser(description="Train CDRL.", argument_default=argparse.SUPPRESS)
    add_options(parser, settings)
    add_options(parser, RunOptions)
    flags = vars(parser.parse_args(argv))
    run = RunOptions(**{f.name: flags.pop(f.name) for f in fields(RunOptions) if f.name in flags})
    return settings(**{**recipes[flags.get("recipe", settings.recipe)], **flags}, run=run)


def reason(error):
    """The first line of what an error says, its class where it says nothing, or not a word (str)."""
    message = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return message if " " in message else f"{type(error).__name__} {message}".strip()


def shown(path):
    """A model's directory as a user would type it, a hub id as it is, a URL without secrets."""
    return os.path.relpath(path) if os.path.isdir(path) else public_url(str(path))


def parse_json(text):
    """JSON text or bytes -> value. ValueError for all that is none, and for what is nested too deep."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def json_object(flag, text):
    """A flag's JSON object -> dict, empty without the flag. Raises InputError."""
    try:
        value = parse_json(text) if text else {}
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise InputError(f"{flag} {text!r} is no JSON object; give one such as '{{\"seed\": 1}}'")
    return value


def headers_in(flag, pairs):
    """["NAME=VALUE", ...] -> {name: value}. Raises InputError, which does not repeat the value: it may be a
    secret."""
    for pair in pairs or []:
        if not pair.partition("=")[0] or "=" not in pair:
            raise InputError(f"{flag} {pair.partition('=')[0][:20]!r}... is not of the form NAME=VALUE")
    return dict(pair.split("=", 1) for pair in pairs or [])


PUBLIC = ("api-version", "version", "alt",
          "region")      # what a URL's query may show; all else may be a secret


TOKEN = re.compile(r"(?=.*\d)(sk|pk|hf|gsk|xai|nvapi|ghp|pat|tok|token|key|secret)[-_][\w-]{6,}|"
                   r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)


def secrets_in_path(path):
    """The segments of a URL's path that look like a token, or follow "token", "key" and their like (list)."""
    segments, secrets = path.split("/"), []
    for before, segment in zip(["", *segments], segments):
        pieces = re.split(r"[-_.:~]", urllib.parse.unquote(segment))
        is_random = any(len(p) >= 32 or len(p) >= 16 and re.search(r"\d", p) and re.search("[A-Za-z]", p)
                        for p in pieces)
        if segment and (is_random or TOKEN.match(segment) or re.fullmatch(
                r"(api|access)?[-_]?(key|token|secret|auth)s?", before, re.IGNORECASE)):
            secrets.append(segment)
    return secrets


def public_url(url):
    """A URL as it may be printed and stored: without user:password@, its query's values and its path's tokens
    hidden. Other words stay as they are."""
    try:
        address = urllib.parse.urlsplit(url.strip() if "://" in url else f"//{url.strip()}")
        tokens = secrets_in_path(address.path) if "://" in url or re.search("[.:]", address.netloc) else []
        if not address.query and "@" not in address.netloc and not tokens:
            return url
        path = "/".join("..." if segment in tokens else segment for segment in address.path.split("/"))
        query = "&".join(pair if pair.partition("=")[0].lower() in PUBLIC else pair.partition("=")[0] + "=..."
                         for pair in address.query.split("&") if pair)
        public = urllib.parse.urlunsplit(address._replace(netloc=address.netloc.rpartition("@")[2], path=path,
                                                        query=query, fragment=""))
        return public if "://" in url else public.removeprefix("//")
    except ValueError:
        return re.sub(r"//[^/@]*@|\?.*", "//", url)


def public_args(argv):
    """A command's arguments as they may be printed: URLs without secrets, headers without values (list)."""
    public = []
    for before, arg in zip(["", *argv], argv):
        flag, _, value = arg.rpartition("=") if arg.startswith("--") and "=" in arg else ("", "", arg)
        if re.match("--(expert|model)_h", before) or re.match("--(expert|model)_h", flag):
            public.append(re.sub(r"(header\w*=)?([^=]*)=.*", r"\1\2=...", arg, flags=re.DOTALL))
        elif re.match("--(expert|model|baseline)", before) or "://" in value:
            head = re.match(r"(--\w+=)?", arg)[0]
            public.append(head + public_url(arg[len(head):]))
        else:
            public.append(arg)
    return public


def strict_json(value, **how):
    """json.dumps without NaN and Infinity, which are no JSON: null stands for them."""
    def finite(x):
        if isinstance(x, dict):
            return {key: finite(item) for key, item in x.items()}
        if isinstance(x, (list, tuple)):
            return [finite(item) for item in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x
    return json.dumps(finite(value), allow_nan=False, **how)


def write_atomically(path, text):
    """Write a file by one rename: a kill leaves the old one or the new one. A link is followed, and a file
    keeps its permissions."""
    path = Path(os.path.realpath(path))
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            if path.is_file():
                os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)           # a full disk
        raise
    os.replace(temporary, path)


def checksum(path):
    """CRC-32 of a file's content, or of a model directory's weights and settings (int)."""
    kinds = ("*.safetensors", "*.bin", "*config.json", "*token*", "chat_template*")
    files = [path] if path.is_file() else sorted({file for kind in kinds for file in path.glob(kind)
                                                  if file.is_file()})
    return checksum_of(files)


def checksum_of(files):
    """CRC-32 of the contents of files, one after another (int)."""
    total = 0
    for file in files:
        with open(file, "rb") as stream:
            while block := stream.read(2**24):
                total = zlib.crc32(block, total)
    return total


def table(rows, intervals=True):
    """{row name: {column: number, or (value, low, high)}} -> text with aligned columns."""
    def shown(value):
        if isinstance(value, tuple):
            ends = f" [{value[1]:.3f}, {value[2]:.3f}]" if intervals and math.isfinite(value[0]) else ""
            return f"{value[0]:.3f}{ends}"
        return f"{value:.3f}" if isinstance(value, float) else str(value)
    columns = list(next(iter(rows.values())))
    lines = [["", *columns]] + [[name, *(shown(row[c]) for c in columns)] for name, row in rows.items()]
    lines = [[printable(cell) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i,
                               (cell, w) in enumerate(zip(line, widths)))
                     for line in lines)
