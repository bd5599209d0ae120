"""What commands do when they answer questions: open the models that flags name, ask for consent, print.

The root's classes come as arguments.
"""
import argparse
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from utils import cli, cost, distributed, inputs, judge, results_file, stored
from utils.cli import InputError
from utils.experts import LocalExpert, ServerExpert, ServerVLM, batches_in_flight
from utils.model_defaults import source_flags
from utils.prompts import PROMPTS
from utils.results_file import STILL_OPEN, is_open
from utils.server import Server, is_url

# Settings by name; a flag beside --preset counts.
# paper (arXiv 2603.12149): 8 samples at T = 1, top-k 40, mean C as the weight (3.3, Eq. 5); VCD's alpha = .5
# and beta = .1 for Visual Self-Check; tau1 = tau2 = tau3 = .5 (Eq. 6-9). These are the defaults.
# deepconf (arXiv 2508.15260): offline voting of its Section 3.2, as facebookresearch/deepconf releases it.
# The lowest 10% of the windows' means (`bottom`, 3.1) weigh a vote, and the top 90% of the samples vote.
# T = .6 as for its DeepSeek-8B. It has 512 samples, windows of 2048 tokens, top-p .95; here 8, 32, no top-p.
PRESETS = {
    "paper": {"samples": 8, "temperature": 1.0, "top_k": 40, "reading": "mean", "weight": "confidence",
              "top_share": 1.0, "check_alpha": 0.5, "check_beta": 0.1, "tau1": 0.5, "tau2": 0.5, "tau3": 0.5},
    "deepconf": {"samples": 8, "temperature": 0.6, "top_k": 0, "reading": "bottom", "weight": "confidence",
                 "top_share": 0.9, "modules": ""}}


def add_choices(parser):
    """Flags of eval.py and catts.py alike: wording, presets, the judge, and what it would cost."""
    parser.add_argument("--prompt", default="project", choices=PROMPTS,
                        help="project: think, then one box; bare: the question alone; official: the "
                             "benchmark's own hint")
    parser.add_argument("--preset", choices=PRESETS, help="settings of a paper; flags beside it count")
    parser.add_argument("--math_verify", action="store_true", default=None,
                        help="let the package math-verify accept answers that the rules refuse")
    parser.add_argument("--dry_run", action="store_true",
                        help="print generations, tokens, Expert calls and hours by part, and stop")


def question_parser(settings_class):
    """The flags of catts.py. settings_class: its Settings."""
    parser = argparse.ArgumentParser(description="CA-TTS: answer with samples, an Expert, and votes.")
    parser.add_argument("image", nargs="?", help="a picture")
    parser.add_argument("question", nargs="?", help="a question about it")
    parser.add_argument("--choices", nargs="+", help="options of a multiple-choice question")
    parser.add_argument("--output", default="runs/catts/results.jsonl", help="file for the results of --data")
    parser.add_argument("--json", action="store_true", help="print the result, or the means, as JSON")
    cli.add_sources(parser)
    add_choices(parser)
    cli.add_options(parser, settings_class)
    parser.set_defaults(max_new_tokens=None)
    return parser


def question_of(args, sample_class):
    """The one question of a command line (data.Sample), None with --data. Raises InputError."""
    if (args.data is None) == (args.image is None) or (args.image is None) != (args.question is None):
        raise InputError("give either IMAGE and \"QUESTION\", or --data FILE")
    cli.check_choices(args.choices)
    if not args.image:
        return None
    if not args.question.strip():
        raise InputError("the question is empty; give the words that ask for something in the picture")
    sample = sample_class(Path(args.image).name, [args.image], args.question.strip(), None, args.choices)
    sample.pictures()                              # a broken one is refused before a model is loaded
    return sample


def parse_with_preset(parser, argv):
    """Parse flags; those of --preset are defaults -> Namespace. The judge does as --math_verify says, whose
    value becomes the package's version."""
    preset = parser.parse_args(argv).preset
    parser.set_defaults(**PRESETS.get(preset, {}))
    args = parser.parse_args(argv)
    try:
        args.math_verify = judge.use_math_verify(bool(args.math_verify))
    except ImportError as error:
        raise InputError(f"--math_verify: {error}") from None
    return args


@dataclass
class Models:
    """base: a VLM or a ServerVLM. expert: something with `ask`, None = the base. checker: a VLM or None."""
    base: object
    expert: object
    clip: object
    checker: object


def load_models(args, expert_tokens, model, vlm_class, rollout_class, clip_class):
    """The Models that the flags of `cli.add_sources` name. model: in place of --model. Raises InputError."""
    cli.check_sources(args)

    def server(url, name, flag):
        key = os.environ.get(f"{flag.upper()}_API_KEY") or None
        return Server(url, name, key, args.timeout, args.retries, args.cache, flag=flag, workers=args.workers,
                      patience=args.patience, max_side=args.max_side, thinking_tokens=args.thinking_tokens,
                      body=cli.json_object(f"--{flag}_body", getattr(args, f"{flag}_body")),
                      headers=cli.headers_in(f"--{flag}_header", getattr(args, f"{flag}_header")))

    distributed.start_ranks()                      # before a model is loaded: each rank to a GPU of its own
    clip, expert = args.clip and clip_class.from_pretrained(args.clip, kind=args.clip_map), None
    if is_url(model):
        if flags := [f"--{name}" for name in cli.READING if getattr(args, name)]:
            raise InputError(f"{' and '.join(flags)}: for a model that is loaded here, and --model is a "
                             f"server; leave it out")
        base = ServerVLM(server(model, args.model_name, "model"), rollout_class)
    else:
        base = vlm_class.load(model).read_as(args)
    if is_url(args.expert):
        expert = ServerExpert(server(args.expert, args.expert_model, "expert"), expert_tokens)
    elif args.expert not in ("self", "none", model):
        expert = LocalExpert(vlm_class.load(args.expert), expert_tokens)
    checker = vlm_class.load(args.check_model).read_as(args) if args.check_model else None
    return Models(base, expert, clip, checker)


def show_answer(result, record, args, candidates, taus):
    """Print one result, or with --json its record. candidates: None under a fitted policy. Exits with
    STILL_OPEN where a server failed."""
    if args.json:
        print(cli.strict_json(record))
    elif candidates is None:
        print(results_file.describe_purchases(result, args.choices))
    else:
        print(results_file.describe(result, candidates, args.choices, taus))
        model = "" if args.model == str(cli.TINY / "base") else f" --model {cli.shown(args.model)}"
        print(f"next: python catts.py --data questions.jsonl --output results.jsonl{model}"
              f"{source_flags(args)}        # many questions")
    if result.open:
        cli.warn(f"open: {'; '.join(result.open.values())}")
        raise SystemExit(STILL_OPEN)


def show_cost(samples, prompt, args, controller, name=None, drawn=None, parts=None):
    """--dry_run: what one model's run would cost, at the speed of the first batch's samples.

    prompt: function of a sample -> its prompt. drawn: samples a question. parts: {name: `cost.Part`}, by
    default those of CA-TTS.
    """
    settings, batch = controller.settings, samples[:args.batch_size]
    name, drawn = name or cli.shown(args.model), drawn or settings.samples
    parts = parts or {"samples": cost.Part(drawn)} | cost.module_parts(
        controller.modules, has_checker=controller.checker is not None,
        planner=settings.order in ("planner", "informed"))
    def draw(count, **length):
        return controller.vlm.sample(
            [s.pictures() for s in batch[:count]], [prompt(s) for s in batch[:count]], drawn,
            temperature=settings.temperature, top_k=settings.top_k,
            **{"max_new_tokens": settings.max_new_tokens} | length)
    is_local = not getattr(controller.expert, "remote", False) and not isinstance(controller.vlm, ServerVLM)
    speed = cost.measure(draw, len(batch))
    rows = cost.table(parts, len(samples), speed, settings.max_new_tokens, settings.expert_tokens,
                      distributed.place()[1], is_local)
    if distributed.place()[0] == 0:
        cost.show(f"{name}, {len(samples)} questions", rows, speed, len(batch), is_local)


def answer_questions(answer_batch, samples, args, defaults, argv, controller):
    """The questions of --data into --output, and their means as a table or as JSON. Exits with STILL_OPEN
    where a server failed. args, defaults: Namespaces of flags; argv: the command's words."""
    inputs.refuse_as_output(args.output, data=args.data, policy=args.policy, abstain=args.abstain)
    # The threshold itself: the content of its file may change between a run and its continuation.
    fingerprint, default_fingerprint = (
        results_file.run_fingerprint(flags, ("image", "question", "choices", "preset", "dry_run"),
                                     abstain=str(value))
        for flags, value in ((args, controller.threshold), (defaults, None)))
    ask_consent(args, samples, controller, args.output)
    results = results_file.run_resumable(
        answer_batch, samples, args.output, fingerprint, args.batch_size, strict=args.strict,
        defaults=default_fingerprint, shape=stored.RESULT,
        in_flight=batches_in_flight(args.batch_size, controller.vlm, controller.expert))
    if results is None:                     # not the first rank
        return
    rows = [results[name] for name in sorted({s.id for s in samples} & set(results))]
    results_file.print_means(rows, samples, args)
    if sentence := results_file.failures(rows):
        cli.warn(sentence)
        raise SystemExit(STILL_OPEN)
    if args.early_exit == "off" and args.policy == "paper" and not args.json:
        exact = Path(args.output).with_name("exact.jsonl")
        words = shlex.join([*cli.public_args(argv), "--early_exit", "exact", "--output", str(exact)])
        print(f"next: python catts.py {words}        # the same answers, cheaper")


# ---- What servers will be asked

def calls_a_question(controller):
    """{"Expert" or "base": (calls of its server for one question at most, longest reply in tokens)}."""
    calls, settings, modules = {}, controller.settings, controller.modules
    roles = {"self_consistency", "voter", "self_reflection", "expert"}
    if getattr(controller.expert, "remote", False):
        planned = settings.order in ("planner", "informed")
        calls["Expert"] = (len(roles & {*modules}) + planned, settings.expert_tokens)
    if isinstance(controller.vlm, ServerVLM):
        calls["base"] = (1 + ("self_reflection" in modules), settings.max_new_tokens * settings.samples)
    return calls


def ask_consent(args, samples, controller, output, sizes=()):
    """Say how many calls of servers a run will make, and ask above --ask_above. InputError where nobody says
    yes.

    output: file whose answered questions are not counted. sizes: numbers of samples for which eval.py runs
    every module; there is one call more, for the answer of the Expert, or the greedy one of the base.
    """
    calls = calls_a_question(controller)
    if sizes:
        calls = {who: (count * len(sizes) + 1, reply) for who, (count, reply) in calls.items()}
    answered = results_file.read_results(Path(output)) if Path(output).is_file() else {}
    done = {key for key, row in answered.items() if not is_open(row)}
    left = sum(sample.id not in done for sample in samples)
    total = left * sum(count for count, _ in calls.values())
    if not total:
        return
    prompt = _prompt_tokens(samples, args.max_side)
    replies = {who: left * count * reply for who, (count, reply) in calls.items()}
    words = "; ".join(f"{who}: up to {left * count:,} calls, some {left * count * prompt:,.0f} tokens of "
                      f"prompts, at most {replies[who]:,} of replies"
                      for who, (count, _) in calls.items() if count)
    if args.expert_price and calls.get("Expert"):
        money = (args.expert_price[0] * left * calls["Expert"][0] * prompt +
                 args.expert_price[1] * replies["Expert"]) / 1e6
        words += f"; at most {money:.2f} at --expert_price"
    if os.environ.get("RANK", "0") == "0":
        cli.warn(f"{left} questions by servers. {words}")
    if total <= args.ask_above or args.yes:
        return
    if sys.stdin is not None and sys.stdin.isatty():
        print("Go on? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() in ("y", "yes"):
            return
    raise InputError(f"{total:,} calls of servers are more than --ask_above {args.ask_above:,}; add --yes, "
                     f"or lower --limit")


def _prompt_tokens(samples, max_side):
    """Of a call, from the first questions (float): one for each 28 x 28 pixels, some 200 for words."""
    try:
        sizes = [picture.size for sample in samples[:8] for picture in sample.pictures()]
    except InputError:                  # a broken picture is another one's to report
        sizes = []
    scales = [min(1.0, max_side / max(size)) if max_side else 1.0 for size in sizes]
    pixels = sum(width * height * scale**2 for (width, height), scale in zip(sizes, scales))
    return 200 + pixels / 784 / max(1, len(samples[:8]))
