"""The command line of eval.py: its flags and what they imply, stored results, what the terminal shows."""
import argparse
import csv
import io
import math
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from utils import answering, baselines, cli, corruptions, distributed, findings, inputs, report, results_file
from utils.cli import InputError, names_in
from utils.cost import bounded_batch
from utils.logs import training_log
from utils.metrics import MIN_QUESTIONS
from utils.model_defaults import fill_in, source_flags
from utils.server import is_url
from utils.tables import (
    CALIBRATED,
    COSTS,
    HEADLINE,
    arrays,
    check_rows,
    labels_of,
    mark_incomplete,
    probe_tables,
    probed,
    severity_table,
    stored_scales,
    vote_tables,
)

PARTS = ("votes", "probe", "corruptions")
WRITTEN = ("tables.json", "threshold.json", "policy.json", "report.html")      # in the output folder
# What can be left out of the votes; the samples themselves (pass@1, majority, DeepConf) are always drawn.
METHODS = ("greedy", "cut", "expert", "modules")
# What shapes no stored row, and what shapes those of the probe and of the corruptions alone.
NOT_STORED = ("baseline", "target_risk", "corruptions", "only", "probe", "dry_run", "preset", "parts",
              "drawn", "defaults")
PROBE_FLAGS = ("regions", "t", "probe_samples")
PROBE_STORED = ("model", "model_name", "data", "data_seed", "split", "prompt", "clip", "clip_map", "mass",
                "seed", "max_new_tokens", "math_verify", *PROBE_FLAGS)


def make_parser(settings_class, modes, steps):
    """The flags of eval.py. modes: of noise.py; steps: noise steps of the probe."""
    parser = argparse.ArgumentParser(description="Methods, calibration, scaling and the probe, for one model "
                                                 "or two.")
    cli.add_sources(parser)
    answering.add_choices(parser)
    parser.add_argument("--baseline", help="a second model to hold it against")
    parser.add_argument("--only", choices=PARTS, help="measure this part alone; probe: is the model "
                                                      "overconfident, and does it know that it cannot see?")
    parser.add_argument("--probe", action=argparse.BooleanOptionalAction, default=True,
                        help="answers under noise")
    parser.add_argument("--methods", default=",".join(METHODS),
                        help="beside the samples, separated by commas; modules: CA-TTS and its subsets")
    parser.add_argument("--sizes", type=int, nargs="+",
                        help="numbers of samples for which every module votes; default 1 2 4 8 16 32 on the "
                             "built-in questions, else --samples alone")
    parser.add_argument("--regions", nargs="+", choices=modes,
                        help="of the probe; default key random inverse on the built-in questions, else key")
    parser.add_argument("--t", type=int, nargs="+",
                        help="noise steps of the probe; 0 is always run; default "
                             f"{' '.join(map(str, steps))} on the built-in questions, else the last")
    parser.add_argument("--probe_samples", type=int,
                        help="answers a question at each step of the probe; default 4 on the built-in "
                             "questions, else 1")
    parser.add_argument("--corruptions", nargs="*", choices=corruptions.NAMES,
                        help="severity curves under these, all where none is named: accuracy and confidence "
                             "at five severities, on the key region and everywhere; some times the probe's "
                             "time")
    parser.add_argument("--split", help="of a file that names one in each row; MMMU: validation, never with "
                                        "dev")
    parser.add_argument("--max_failed", type=float, default=0.05,
                        help="share of questions on which a server may fail before no row is called CA-TTS")
    parser.add_argument("--target_risk", type=float, default=0.1,
                        help="share of wrong answers that abstention aims at")
    parser.add_argument("--output", default="runs/eval", help="folder for what is measured")
    parser.add_argument("--json", action="store_true", help="print tables.json")
    cli.add_options(parser, settings_class)
    parser.set_defaults(max_new_tokens=None, batch_size=None)
    return parser


def parse(argv, settings_class, modes, steps, parse_t):
    """The flags of eval.py, with all that they imply -> (Namespace, settings). Raises InputError."""
    args = _implied(argv, settings_class, modes, steps, parse_t)
    args.defaults = _implied([], settings_class, modes, steps, parse_t)
    settings = settings_class(**{name: getattr(args, name) for name in settings_class.__dataclass_fields__})
    if args.baseline and os.path.realpath(args.baseline) == os.path.realpath(args.model):
        raise InputError(f"--baseline {args.baseline!r} is --model; name another model, or none")
    if args.only in ("probe", "corruptions") and is_url(args.model):
        raise InputError(f"--only {args.only}: it needs a model's own probabilities on noised pictures, and "
                         f"--model is a server; name a directory or a hub id")
    if not args.dry_run:
        inputs.open_folder(args.output, WRITTEN, data=args.data, abstain=args.abstain)
    return args, settings


def _implied(argv, settings_class, modes, steps, parse_t):
    """The flags with what they imply (Namespace)."""
    args = answering.parse_with_preset(make_parser(settings_class, modes, steps), argv)
    built_in = (args.data or "synthetic") == "synthetic"
    args.parts = [args.only] if args.only else ["votes", *(["probe"] if args.probe else [])]
    args.parts += ["corruptions"] if args.corruptions is not None and not args.only else []
    args.methods = names_in(args.methods)
    if not {*args.methods} <= {*METHODS}:
        raise InputError(f"--methods is {','.join(args.methods)!r}; some of {', '.join(METHODS)} are "
                         f"expected")
    if args.early_exit != "off":
        raise InputError(f"--early_exit is {args.early_exit!r}; here every module must vote, leave it off")
    if args.policy != "paper":
        raise InputError(f"--policy is {args.policy!r}; here every module must vote, and a new policy is "
                         f"fitted")
    no_clip = args.region == "all" and args.clip is None
    args.regions = args.regions or (["all"] if no_clip else ["key", "random", "inverse"] if built_in
                                    else ["key"])
    args.regions = [region for region in modes if region in args.regions]
    args.probe_samples = (4 if built_in else 1) if args.probe_samples is None else args.probe_samples
    args.t = sorted({0, *(parse_t(t)[0] for t in (args.t or (steps if built_in else steps[-1:])))})
    if "modules" not in args.methods or "votes" not in args.parts:
        args.modules = ""
        args.expert = args.expert or ("none" if "expert" not in args.methods or "votes" not in args.parts
                                      else None)
    is_probed = "probe" in args.parts and args.regions != ["all"] or "corruptions" in args.parts
    fill_in(args, needs_clip=is_probed and not is_url(args.model))
    args.methods = [method for method in args.methods if method != "expert" or args.expert != "none"]
    if args.probe_samples < 1 or not 0 < args.target_risk < 1 or not 0 <= args.max_failed <= 1:
        raise InputError(f"--probe_samples {args.probe_samples} must be at least 1, --target_risk "
                         f"{args.target_risk} between 0 and 1, --max_failed {args.max_failed} from 0 to 1")
    args.limit = 200 if built_in and args.limit is None else args.limit
    args.sizes = sorted({*(args.sizes or ([1, 2, 4, 8, 16, 32] if built_in else [])), args.samples})
    if args.sizes[0] < 1:
        raise InputError(f"--sizes {args.sizes[0]} must be at least 1")
    # The built-in questions get twice the samples, so that majority can be held against CA-TTS at equal cost.
    args.drawn = max(args.sizes[-1], *([2 * args.samples, args.samples + 8] if built_in else [0]))
    args.batch_size = bounded_batch(args.batch_size, max(args.drawn, args.probe_samples), args.max_new_tokens)
    return args


def model_names(args):
    """{name in the tables: path} of the baseline, where there is one, and the model."""
    paths = list(filter(None, (args.baseline, args.model)))
    public = [cli.public_url(path) for path in paths]
    names = [Path(path).name for path in public]
    return dict(zip(names if len({*names}) == len(paths) else public, paths))


def stored_settings(args, part, path):
    """(what the rows of a part are made with, the same by default), for `run_resumable`. path: of the
    model."""
    leave_out = {*NOT_STORED, *PROBE_FLAGS} if part == "votes" else {*vars(args)} - {*PROBE_STORED}
    return tuple(results_file.run_fingerprint(flags, leave_out, **changed)
                 for flags, changed in ((args, {"model": path}), (args.defaults, {})))


class Subset(Sequence):
    """Some of a set of samples, each made when it is asked for."""

    def __init__(self, samples, indices):
        self.samples, self.indices, self.broken = samples, indices, getattr(samples, "broken", 0)

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self.samples[i] for i in self.indices[index]]
        return self.samples[self.indices[index]]


def of_split(samples, split):
    """The samples of one split. Of a file with MMMU's dev and validation questions the latter, unless `split`
    names another: the two are never pooled. Raises InputError."""
    splits = [labels_of({"id": s.id, "meta": s.meta, "choices": s.choices}).get("split") for s in samples]
    names = sorted({*splits} - {None})
    if split is None and {"dev", "validation"} <= {*names}:
        split = "validation"
        if distributed.place()[0] == 0:
            print(f"{splits.count('dev')} questions of split dev are left out; --split dev takes these")
    if split is None:
        return samples
    if split not in names:
        raise InputError(f"--split {split!r}: no question is of it; the file has "
                         f"{', '.join(names) or 'none'}")
    return Subset(samples, [i for i, name in enumerate(splits) if name == split])


def model_folder(args, name):
    """Where the rows of a model are stored (Path)."""
    return Path(args.output) / re.sub(r"[^\w.-]+", "_", name)


def write_results(path, rows, methods, about):
    """results.jsonl: a question a line, with its subsets and what each method made of it. Beside it
    results.csv, a line an answer of a method, for a spreadsheet.

    rows: stored votes; methods: {method: list of Outcome}; about: what the row was made with (dict).
    """
    by_id = {row["id"]: {} for row in rows}
    for method, outcomes in methods.items():
        for outcome in outcomes:
            fields = asdict(outcome)
            by_id[fields.pop("id")].setdefault(method, []).append(fields)
    lines = [cli.strict_json({"id": row["id"], "images": row.get("images"), "gold": row["gold"],
                              "subsets": labels_of(row), "methods": by_id[row["id"]], **about})
             for row in rows]
    cli.write_atomically(path, "".join(line + "\n" for line in lines))
    flat = [{"id": row["id"], "images": " ".join(map(str, row.get("images") or ())), "gold": row["gold"],
             **about, **labels_of(row), "method": method, **fields}
            for row in rows for method, results in by_id[row["id"]].items() for fields in results]
    text = io.StringIO()
    writer = csv.DictWriter(text, dict.fromkeys(key for line in flat for key in line), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _cell(value) for key, value in line.items()} for line in flat)
    cli.write_atomically(path.with_suffix(".csv"), "\ufeff" + text.getvalue())      # Excel asks for the mark


def _cell(value):
    """A cell: empty for nan. No spreadsheet takes it for a formula: text like one gets an apostrophe."""
    if value != value:
        return ""
    return f"'{value}" if isinstance(value, str) and re.match(r"[=+@\t\r]|-(?!\.?\d)", value) else value


def describe_run(args, settings, samples, num_rows, scales):
    """One line under each title (str): questions, noise, models, seeds, versions."""
    left_out = len(samples) - num_rows + getattr(samples, "broken", 0)
    split = f", split {args.split}" if args.split else ""
    missing = f" ({left_out} left out)" if left_out else ""
    models = " and ".join(map(cli.shown, model_names(args).values()))
    about = (f"{num_rows} questions of {args.data or 'the built-in test split'}{split}{missing}, "
             f"N = {settings.samples}, noise at t = {max(args.t)}, seed {settings.seed}, "
             f"prompt {args.prompt}, at most {settings.max_new_tokens} tokens; {models}; "
             f"Expert {cli.shown(args.expert)}; "
             f"{f'math-verify {args.math_verify}; ' if args.math_verify else ''}torch {torch.__version__}.")
    return about + "".join(
        f" {name}: c = sigmoid({scale['slope']:.3g} C {scale['intercept']:+.3g}), fixed before the training "
        f"began." for name, scale in scales.items() if scale)


def sentences_of(tables, args):
    """The findings in words: abstention's target, answers that were cut off -> list of str."""
    notes = [findings.abstention_finding(row, f"{name}, {row['method']}")
             for name, row in tables.get("abstention", {}).items()]
    shares = {name: rows["pass@1"]["cut"] for name, rows in tables.get("methods", {}).items()}
    for row, figures in tables.get("probe", {}).items():
        shares.setdefault(row.split(",")[0], figures["cut"][0])
    return notes + list(filter(None, (findings.cut_off_finding(name, cut, args.max_new_tokens)
                                      for name, cut in shares.items())))


def show(tables, about, args, policy_text):
    """Print the findings in words, then the tables."""
    print(f"\n{about}")
    for text in [f"{name}: {text}" for name, text in tables["findings"].items()] + tables["notes"]:
        print(text)
    intervals = min(tables.get("questions", {"": 0}).values()) >= MIN_QUESTIONS
    for name, rows in tables.get("methods", {}).items():
        columns = (*HEADLINE, *COSTS)
        print(f"\n{name}: methods; over: mean confidence minus accuracy; cut: answers that met the limit")
        print(cli.table({method: {key: row.get(key, math.nan) for key in columns}
                         for method, row in rows.items()}, intervals=False))
        print(f"\n{name}: against majority voting at the same N and at the same tokens")
        print(cli.table(tables["against majority"][name], intervals))
        if any(math.isnan(row["majority, same tokens"]) for row in tables["against majority"][name].values()):
            print(f"nan: more tokens than majority@{args.drawn}; a larger --sizes draws more samples")
    if "abstention" in tables:
        print("\nAbstention; risk: errors among the answered")
        print(cli.table({name: {key: value for key, value in row.items() if key != "method"}
                         for name, row in tables["abstention"].items()}, intervals))
    if "probe" in tables:
        print("\nThe probe")
        print(cli.table(tables["probe"], intervals=False))
        print("\nHeadline; mixed: over clean and noised answers together; Platt, isotonic: mapped on the "
              "other half's answers")
        print(cli.table(baselines.by_figure({name.removesuffix(", all"): row for name, row
                                             in tables["headline"].items() if name.endswith(", all")})))
        print("\nReadouts of the frozen model, fitted on the other half of the questions")
        print(cli.table(tables["free readouts"]))
    if "severity" in tables:
        print("\nSeverity; mixed: over clean and corrupted answers together")
        print(cli.table(tables["severity"]))
    if policy_text:
        print(f"\nThe policy (catts.py --policy {args.output}/policy.json)\n{policy_text}")


def keep_policy(path, fit_policy, *inputs):
    """Store what fit_policy(*inputs) returns -> its tables, and every fourth point of its frontier (str)."""
    try:
        policy = fit_policy(*inputs)
    except InputError as error:                 # too few questions
        return f"not fitted: {error}"
    policy.save(path)
    columns = ("accuracy", "ece", "auroc", "calls", "tokens")
    frontier = {f"rate {point['rate']:.2f}": {key: point[key] for key in columns}
                for point in policy.frontier[::4]}
    return f"{policy.tables()}\n\nits frontier, cross-fitted\n{cli.table(frontier)}"


def typical_rows(rows, verdicts, number=12):
    """About `number` of the stored rows: three each where a method mends the majority, spoils it, where both
    fail and where both are right, and more of them where a kind has fewer. verdicts: row -> (whether the
    method is right, whether the majority is)."""
    kinds = {(True, False): [], (False, True): [], (False, False): [], (True, True): []}
    for row in rows:
        kinds[verdicts(row)].append(row)
    picked = [row for kind in kinds.values() for row in kind[:3]]
    return picked + [row for kind in kinds.values() for row in kind[3:]][:max(0, number - len(picked))]


def next_command(args, settings, defaults):
    """The next command one would want, complete (str). defaults: settings of a fresh run."""
    if "votes" not in args.parts:
        return (f"python eval.py --model {shlex.quote(cli.shown(args.model))}"
                f"{f' --data {shlex.quote(args.data)}' if args.data else ''}{source_flags(args)} "
                f"--output {shlex.quote(args.output)}        # every method")
    changed = [f"--{key} {shlex.quote(str(value))}" for key, value
               in results_file.threshold_settings(settings).items() if value != getattr(defaults, key)]
    return (f"python catts.py tiny/example.png \"How many red crosses are there?\" --model "
            f"{shlex.quote(cli.shown(args.model))}{source_flags(args, tokens=False)} {' '.join(changed)} "
            f"--abstain {args.output}/threshold.json")


def write_report(measured, controller, samples, args, settings, by_method, fit_policy, cases):
    """Every table, figure and file of eval.py from what is stored. Exits with STILL_OPEN where a server
    failed.

    measured: {model name: {part: {id: row}}}. by_method, fit_policy, cases: functions of eval.py.
    """
    output, models = Path(args.output), model_names(args)
    ids = [s.id for s in samples]
    votes, probes, corrupted = (
        {name: [rows[part][i] for i in ids if i in rows[part]] for name, rows in measured.items()
         if part in rows} for part in PARTS)
    counts = [len(rows) for rows in [*votes.values(), *probes.values(), *corrupted.values()]]
    if not all(counts):
        raise InputError(f"no question of {args.data!r} could be answered; every picture is broken")
    scales = dict(zip(models, stored_scales(models.values())))
    tables, method, policy_text, shown_cases = {"findings": {}}, None, "", []
    if votes:
        sources = [results_file.SOURCE[module] for module in controller.modules
                   if module != "self_check" or controller.checker]
        for rows in votes.values():
            check_rows(rows, args.sizes, args.drawn, sources)
            mark_incomplete(rows, args.max_failed)
        methods = {name: by_method(rows, settings.samples, settings, scales[name])
                   for name, rows in votes.items()}
        sizes = sorted({2**i for i in range(args.drawn.bit_length())} | {*args.sizes, args.drawn})
        by_n = {name: {n: by_method(rows, n, settings) for n in sizes} for name, rows in votes.items()}
        tables |= vote_tables(votes, methods, by_n, settings.samples, args.target_risk,
                              [name for name, scale in scales.items() if scale])
        last = list(votes)[-1]
        method = tables["abstention"][last]["method"]
        for name, rows in votes.items():
            write_results(model_folder(args, name) / "results.jsonl", rows, methods[name], {"model": name})
            one = methods[name].get(CALIBRATED, methods[name]["pass@1"])
            ids_of, confidence, correct = arrays(one)
            tables["findings"][name] = findings.finding({"id": ids_of, "probability": confidence,
                                                         "correct": correct})
        threshold = tables["abstention"][last] | {"settings": results_file.threshold_settings(settings),
                                                  "sources": results_file.source_fingerprint(args)}
        cli.write_atomically(output / "threshold.json", cli.strict_json(threshold, indent=1))
        closed = [row for row in votes[last] if not results_file.is_open(row)]
        policy_text = keep_policy(output / "policy.json", fit_policy, closed, settings,
                                  results_file.source_fingerprint(args))
        shown_cases = cases(votes[last], settings, samples, controller.clip, method)
    if probes:
        probed_tables = probe_tables(probes, args.regions, args.t, scales)
        tables |= probed_tables | {"findings": tables["findings"] | probed_tables["findings"]}
        report.draw_probe(output / "probe.png", {f"{name}, {region}": {t: probed(rows, region, t)
                                                                       for t in args.t}
                                                 for name, rows in probes.items() for region in args.regions})
    if corrupted:
        tables["severity"] = {f"{name}, {row}": figures for name, rows in corrupted.items()
                              for row, figures in severity_table(rows, scales[name]).items()}
    failures = list(filter(None, map(results_file.failures, votes.values())))
    about = describe_run(args, settings, samples, counts[-1], scales)
    tables["notes"] = failures + sentences_of(tables, args)
    cli.write_atomically(output / "tables.json", cli.strict_json({"about": about, **tables}, indent=1))
    logs = {name: training_log(path) for name, path in models.items()}
    page = report.build(tables, shown_cases, logs, about)
    cli.write_atomically(output / "report.html", page)
    if args.json:
        print(cli.strict_json(tables))
    else:
        show(tables, about, args, policy_text)
    if failures:
        print("; ".join(failures), file=sys.stderr)
        raise SystemExit(results_file.STILL_OPEN)
    if args.json:
        return
    print(f"\nwrote {output}/: report.html, tables.json and what was measured; the page and tables.json hold "
          f"every interval")
    print(f"next: {next_command(args, settings, type(settings)())}")
