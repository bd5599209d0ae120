"""What goes with a model: for a built-in one the built-in CLIP, Expert and answer length, else asked for."""
import shlex
from pathlib import Path

from utils.cli import READING, TINY, InputError, names_in, parse_json, public_url, shown
from utils.server import is_url

CLIP = "openai/clip-vit-large-patch14-336"      # the usual one of real models
MAX_NEW_TOKENS = 1024                           # room for "think step by step"
BUILT_IN_TOKENS = 64
HEARS_EXPERT = {"self_consistency", "self_reflection"}


def is_built_in(model):
    """Whether a model directory holds a built-in model, or one that was trained from it: it has the same
    vocabulary."""
    def vocabulary(folder):
        config = parse_json((Path(folder) / "config.json").read_text())
        return config.get("text_config", config).get("vocab_size")
    try:
        return vocabulary(model) == vocabulary(TINY / "base")
    except (OSError, ValueError, AttributeError):
        return False            # a hub id, the URL of a server, or no model at all


def fill_in(args, needs_clip=False):
    """Fill in --clip, --expert and --max_new_tokens by what --model is. args: Namespace of the flags.

    needs_clip: something beside Visual Self-Check looks for key regions. --expert none leaves out the modules
    that hear an Expert. Raises InputError, one sentence that names what is missing with its usual value.
    """
    modules, missing = names_in(args.modules), []
    built_in = is_built_in(args.model)
    if args.expert == "none" or args.expert is None and not {*modules} & HEARS_EXPERT:
        args.modules = ",".join(module for module in modules if module not in HEARS_EXPERT)
        args.expert = "none"
    elif args.expert is None and built_in:
        args.expert = str(TINY / "expert")
    elif args.expert is None:
        missing.append("--expert self (or a directory, hub id or URL; none leaves it out)")
    checks = not is_url(args.model) or args.check_model
    needs_clip = needs_clip or "self_check" in modules and checks and args.region != "all"
    if args.clip is None and needs_clip:
        args.clip = str(TINY / "clip") if built_in else None
        if not built_in:
            missing.insert(0, f"--clip {CLIP} (or --region all, which needs none)")
    if args.max_new_tokens is None:
        args.max_new_tokens = BUILT_IN_TOKENS
        if not built_in:
            missing.append(f"--max_new_tokens {MAX_NEW_TOKENS}")
    if missing:
        raise InputError(f"--model {args.model!r} is no built-in model; say what goes with it: "
                         f"{', '.join(missing)}")


def next_evaluation(output, args):
    """The command that evaluates a training run, complete and as it is typed (str).

    output: the run's folder. args: of the training (model, data, clip, max_new_tokens). Of a file its
    held-out questions are evaluated; without any, the file itself.
    """
    words = ["--model", str(output), "--baseline", shown(args.model)]
    if (output / "heldout.jsonl").exists():
        words += ["--data", str(output / "heldout.jsonl"), "--allow_outside"]
    elif args.data != "synthetic":
        words += ["--data", str(args.data)] + ["--allow_outside"] * args.run.allow_outside
    for name in READING:                    # how the training put its prompts and pictures
        if value := getattr(args.run, name):
            words += [f"--{name}", str(value)]
    if args.run.prompt != "project":
        words += ["--prompt", args.run.prompt]
    built_in = is_built_in(args.model)
    if not built_in:
        words += ["--expert", "self"]
    if not built_in or Path(args.clip).resolve() != TINY / "clip":
        words += ["--clip", shown(args.clip)]
    if not built_in or args.max_new_tokens != BUILT_IN_TOKENS:
        words += ["--max_new_tokens", str(args.max_new_tokens)]
    return shlex.join(["python", "eval.py", *words])


def source_flags(args, tokens=True):
    """The flags that a model that is not built in cannot do without (str)."""
    keys = ("clip", "expert", "expert_model", "check_model", "model_name")
    flags = {key: public_url(getattr(args, key)) for key in keys
             if getattr(args, key) not in (None, "", "none")}
    if is_built_in(args.model):
        flags = {key: value for key, value in flags.items() if not Path(value).is_relative_to(TINY)}
    elif tokens:
        flags["max_new_tokens"] = args.max_new_tokens
    return "".join(f" --{key} {shlex.quote(str(value))}" for key, value in flags.items())
