"""Does the model know when it does not know? Methods, metrics, scaling, the probe of the paper's Figure 1.

    python eval.py --model runs/cdrl --baseline tiny/base          # before and after: tables, report.html
    python eval.py --model runs/qwen7b --data MMStar.tsv --expert https://host/v1 --expert_model NAME

Two files are stored for each model, a line a question, resumable and split over torchrun's ranks: votes.jsonl
(samples, and every module's votes) and probe.jsonl (answers under noise). Every table is recomputed from
them: a row is measured, never inferred. Unanswered counts as wrong. Intervals are bootstrapped by question,
differences are paired. A file gets at least twice --samples answers a question, so that majority voting can
be held against CA-TTS at the same number of tokens.

Left out on purpose: an LLM as the judge; the rules of judge.py decide.
"""
import argparse
import math
import os
import re
import shlex
import sys
import zlib
from collections import defaultdict
from copy import copy
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import catts
import data
import noise
import policy as policies
from catts import Vote, rollout_record, sample_votes, share_of, tally, winner
from noise import MODES, ClipAttention, make_pair, make_pairs, parse_t
from utils import answering, baselines, cli, corruptions, metrics, report, results_file
from utils.cli import InputError
from utils.experts import Memo, batches_in_flight, sample_from
from utils.judge import accepts, extract_answer, is_correct
from utils.logs import training_log
from utils.metrics import calibrated
from utils.overlap import in_background, waited
from utils.replies import without_thoughts
from utils.report import draw_probe
from utils.tables import (
    CALIBRATED,
    ROUNDS,
    Outcome,
    abstention,
    against_majority,
    arrays,
    calibration,
    check_rows,
    columns_of,
    curves_of,
    groups_of,
    mark_incomplete,
    method_of,
    modules_of,
    paired,
    print_tables,
    resampled,
    scaling,
    stored_scales,
    summarise,
    summary_intervals,
    within_skills,
)
from vlm import VLM


def collector(controller, sizes, drawn):
    """-> a function: batch of samples -> rows for `run_resumable`, with all that the methods need.

    `drawn` samples a question; the votes of every module for the first n of them, for each n of `sizes`; the
    greedy answer, the one with the plausibility cut alone (alpha = 0), and the Expert's own.
    """
    vlm, settings, checker = controller.vlm, controller.settings, controller.checker
    length = {"max_new_tokens": settings.max_new_tokens}

    def collect(batch):
        pictures, prompts = [s.pictures() for s in batch], [data.prompt(s) for s in batch]
        expert, with_memo = Memo(controller.expert), copy(controller)
        with_memo.expert, requests = expert, list(zip(pictures, prompts))
        alone = in_background(expert.ask, requests) if expert.remote else None
        groups = yield from sample_from(
            vlm, pictures, prompts, drawn, temperature=settings.temperature, top_k=settings.top_k,
            seed=[f"{settings.seed} {s.id}" for s in batch], **length)
        greedy = yield from sample_from(vlm, pictures, prompts, greedy=True, **length)
        greedy = [group[0] for group in greedy]
        cut = checker.contrast(pictures, pictures, prompts, alpha=0, beta=settings.check_beta,
                               **length) if checker else None
        expert_replies = (yield from waited(alone)) if alone else expert.ask(requests)
        results_by_n = {}
        for n in sizes:
            results_by_n[n] = yield from with_memo.steps(batch, [group[:n] for group in groups])
        rows = []
        for i, sample in enumerate(batch):
            results, reply = {n: results[i] for n, results in results_by_n.items()}, expert_replies[i]
            row = results[max(sizes)].record(sample)
            row = {key: row[key] for key in ("id", "gold", "choices", "question", "source", "meta")}
            row |= {"samples": [rollout_record(r, sample, settings.window) for r in groups[i]],
                    "greedy": rollout_record(greedy[i], sample), "cut_only": rollout_record(cut[i], sample)
                    if cut else None}
            answer = extract_answer(without_thoughts(reply.text)[0], sample.choices)
            row["expert"] = {"answer": answer, "correct": accepts(answer, sample), "tokens": reply.tokens}
            if greedy[i].failure:
                results[max(sizes)].note_failure("base", greedy[i].failure)
            row["open"] = {who: why for r in results.values() for who, why in r.open.items()}
            row["open"] |= {"expert alone": reply.error} if reply.failed else {}
            row["by_n"] = {str(n): {"ran": list(votes), "votes": votes, "parts": r.ledger.parts,
                                    "notes": r.ledger.notes, "said": r.texts, "order": r.order}
                           for n, r in results.items() for votes in [r.by_source()]}
            rows.append(row)
        return rows
    return collect


def outcomes(row, n, settings):
    """One stored row -> {method: [Outcome, ...]}; several for pass@1, one each for the others.

    Every subset of the modules is recomputed from its own stored votes: InputError when a module's votes are
    gone. Where no module voted on n samples there are the methods that need none.
    """
    sample = data.Sample(row["id"], [], row["question"], row["gold"], row["choices"], row["source"],
                         row["meta"])
    drawn = row["samples"][:n]

    def single(said):
        return [Outcome(row["id"], math.exp(said["logprob"]), said["correct"], said["tokens"])]

    def voted(votes, tokens, calls=0):
        rows = tally(votes, taus, sample.choices)
        best = winner(rows)
        return [Outcome(row["id"], share_of(best, rows), best is not None and accepts(best.answer, sample),
                        tokens, calls)]

    def samples(**change):
        return sample_votes([s["answer"] for s in drawn], [s["confidence"][settings.reading] for s in drawn],
                            [math.exp(s["logprob"]) for s in drawn], replace(settings, **change))

    def counted(tokens):
        return math.nan if tokens is None else tokens           # a server that counts nothing

    taus = settings.taus()
    tokens = sum(s["tokens"] for s in drawn)
    found = {"pass@1": [outcome for s in drawn for outcome in single(s)], "greedy": single(row["greedy"])}
    if row["cut_only"]:
        found["greedy, cut only"] = single(row["cut_only"])
    found |= {f"majority@{n}": voted(samples(weight="equal"), tokens),
              f"weighted@{n}": voted(samples(), tokens),
              f"filtered@{n}": voted(samples(top_share=0.5), tokens),
              "expert alone": [Outcome(row["id"], float("nan"), row["expert"]["correct"],
                                       counted(row["expert"]["tokens"]), 1)]}
    if str(n) not in row["by_n"]:
        return found
    run = row["by_n"][str(n)]
    part = defaultdict(lambda: defaultdict(int),
                       {name: defaultdict(int, cost) for name, cost in run["parts"].items()})
    cost = {"voter": (counted(part["voter"]["expert_tokens"]), part["voter"]["expert_calls"]),
            "self_reflection": (counted(part["critic"]["expert_tokens"]) + part["self_reflection"]["tokens"],
                                part["critic"]["expert_calls"]),
            "self_check": (2 * part["self_check"]["tokens"], 0)}
    modules = modules_of(row, n)
    for size in range(1, len(modules) + 1):
        for subset in combinations(modules, size):
            for source in subset:
                if source not in run["votes"]:
                    raise InputError(f"question {row['id']!r}: the votes of {source} for {n} samples are "
                                     f"gone; collect again")
            votes = samples() + [Vote(source, *vote) for source in subset for vote in run["votes"][source]]
            # one module needs no Planner; of several it orders the calls, and is paid for it
            planned = [(counted(part["planner"]["expert_tokens"]),
                        part["planner"]["expert_calls"])] * (size > 1)
            more, calls = map(sum, zip(*(cost[source] for source in subset), *planned))
            found[f"{method_of(subset, row.get('incomplete'))}@{n}"] = voted(votes, tokens + more, calls)
            if subset == ("self_check",):
                check = run["votes"]["self_check"]
                found["greedy VCD"] = [Outcome(row["id"], float("nan"), bool(check)
                                               and accepts(check[0][0], sample),
                                               cost["self_check"][0])]
    return found


def by_method(rows, n, settings):
    """Stored rows -> {method: list of Outcome over all questions}."""
    found = defaultdict(list)
    for row in rows:
        for method, some in outcomes(row, n, settings).items():
            found[method] += some
    return dict(found)


def methods_of(votes, settings, scales):
    """{model name: stored rows} -> {model name: `by_method`}. scales: {model name: a map of `stored_scales`};
    with one, `CALIBRATED` is pass@1 once more, its confidence c = sigmoid(slope * C + intercept): the
    probability that a run trained."""
    found = {}
    for name, rows in votes.items():
        found[name] = by_method(rows, settings.samples, settings)
        if scales.get(name):
            drawn = [(row["id"], s) for row in rows for s in row["samples"][:settings.samples]]
            c = calibrated([s["confidence"]["mean"] for _, s in drawn], scales[name])
            found[name][CALIBRATED] = [Outcome(i, p, s["correct"], s["tokens"]) for (i, s),
                                       p in zip(drawn, c.tolist())]
    return found


def headline_tables(probes, regions, t, scales):
    """Whether confidence says when the evidence is gone, and what a reading costs that needs no training ->
    "headline": {model, part: `baselines.headline_intervals`}, pooled and within skill; "free readouts":
    {model, readout: figures}.

    The noised answers are those at step t on the first region (key, where it was asked for).
    """
    tables = {"headline": {}, "free readouts": {}}
    for name, rows in probes.items():
        clean, noised = (probed(rows, regions[0], step) for step in (0, t))
        for part in ("all", *sorted({a.skill for a in clean if a.skill})):
            views = [columns_of([a for a in view if part in ("all", a.skill)]) for view in (clean, noised)]
            tables["headline"][f"{name}, {part}"] = baselines.headline_intervals(*views, scales[name], ROUNDS)
        states = {view: {row["id"]: baselines.unpacked(row["states"][view]) for row in rows}
                  for view in STATES}
        tables["free readouts"] |= {f"{name}, {readout}": row for readout, row in baselines.readouts(
            columns_of(clean), columns_of(noised), states).items()}
    return tables


def severity_table(rows, scale):
    """Rows of `corrupter` of one model -> {"corruption, region, severity": `baselines.severity_row`}."""
    clean = columns_of([Answer(**a) for row in rows for a in row["found"]["clean"]])
    names = [name for name in rows[0]["found"] if name != "clean"]
    return {name: baselines.severity_row(clean,
                                         columns_of([Answer(**a) for row in rows
                                                     for a in row["found"][name]]), scale)
            for name in names}


def make_tables(votes, probes, settings, sizes, drawn, regions, ts, risk, scales):
    """Everything that is reported, from stored rows. votes, probes: {model name: rows}; sizes: where every
    module voted;
    drawn: samples a question; scales: see `methods_of`."""
    n, last, names = settings.samples, max(ts), list(votes)
    methods = methods_of(votes, settings, scales)
    first_row = votes[names[-1]][0]
    best = f"{method_of(modules_of(first_row, n), first_row.get('incomplete'))}@{n}"
    shown = list(dict.fromkeys(["pass@1", *([CALIBRATED] if scales[names[-1]] else []), f"majority@{n}",
                                best]))
    boots = {name: {method: resampled(some) for method, some in found.items()} for name,
             found in methods.items()}
    tables = {"methods": {name: {method: summarise(some, boots[name][method]) for method,
                                 some in found.items()}
                          for name, found in methods.items()}}
    if len(names) == 2:
        both = [method for method in methods[names[1]] if method in methods[names[0]]]
        tables["difference"] = {method: paired(*(methods[name][method] for name in names),
                                               [boots[name][method] for name in names]) for method in both}
    sampled = {2**i for i in range(drawn.bit_length())} | {*sizes, drawn}
    by_n = {name: {size: by_method(rows, size, settings) for size in sorted(sampled)} for name,
            rows in votes.items()}
    tables["against majority"] = {name: against_majority(found, n) for name, found in by_n.items()}
    tables["scaling"] = {name: scaling(found) for name, found in by_n.items()}
    tables["within"] = {}
    for name, rows in votes.items():
        labels = groups_of(rows)
        for label in sorted({label for some in labels.values() for label in some}):
            for method in shown:
                part = [o for o in methods[name][method] if label in labels[o.id]]
                row = summarise(part, resampled(part))
                tables["within"][f"{name}, {label}, {method}"] = {"n": len({o.id for o in part})} | {
                    key: row.get(key, math.nan) for key in ("accuracy", "auroc", "ece", "brier")}
    tables["calibration"] = {name: calibration(found, shown) for name, found in methods.items()}
    for heading, points in (("reliability", metrics.reliability_points),
                            ("risk and coverage", metrics.risk_coverage)):
        tables[heading] = {method: {name: points(*arrays(found[method])[1:]) for name,
                                    found in methods.items()
                                    if method in found} for method in shown if method != f"majority@{n}"
                                    or method == best}
    tables["abstention"] = {name: {"method": best} | abstention(found[best], risk) for name,
                            found in methods.items()
                            if best in found}
    tables["probe"] = {f"{name}, {region}, {part}": row for name, rows in probes.items() for region in regions
                       for part, row in within_skills(probed(rows, region, 0), probed(rows, region, last),
                                                            scales[name], summary_intervals).items()}
    tables |= headline_tables(probes, regions, last, scales)
    tables["curves"] = {name: {region: curves_of({t: probed(rows, region, t) for t in ts})
                               for region in regions}
                        for name, rows in probes.items()}
    return tables


def cases(rows, settings, samples, clip, method, number=12):
    """About a dozen questions of one model for the report -> list of dicts for `report.case`: three each
    where the method mends the majority, spoils it, where both fail and where both are right, and more of them
    where a kind has fewer."""
    n, taus, kinds = settings.samples, settings.taus(), defaultdict(list)
    for row in rows:
        found = outcomes(row, n, settings)
        kinds[(found[method][0].correct, found[f"majority@{n}"][0].correct)].append(row)
    kinds = [kinds[kind] for kind in ((True, False), (False, True), (False, False), (True, True))]
    picked = [row for some in kinds for row in some[:3]]
    picked += [row for some in kinds for row in some[3:]][:max(0, number - len(picked))]
    wanted, found = {row["id"] for row in picked}, []
    by_id = {sample.id: sample for sample in samples if sample.id in wanted}
    for row in picked:
        sample, pictures = by_id[row["id"]], by_id[row["id"]].pictures()
        noised = make_pair(pictures, sample.question, clip, parse_t(settings.noise_t), settings.region,
                           settings.mass,
                           f"{settings.seed} {sample.id}")
        table = tally([Vote(source, *vote) for source, some in row["by_n"][str(n)]["votes"].items()
                       for vote in some], taus,
                      sample.choices)
        best = winner(table)
        found.append({
            "images": [*pictures[:1], *noised[:1]], "question": data.ask(sample), "gold": sample.answer,
            "samples": [(s["text"], math.exp(s["logprob"]), s["correct"]) for s in row["samples"][:4]],
            "votes": {r.answer: {source: taus[source] * r.shares.get(source, 0.0) for source in taus} |
                      {"total": r.total}
                      for r in table}, "method": method, "verdict": best.answer if best else "nothing",
            "right": best is not None and accepts(best.answer, sample)})
    return found


def fit_policy(rows, settings, sources, path):
    """Fit what evidence to buy on stored votes, and keep it in policy.json -> its tables and frontier
    (str)."""
    def judge(answer, row):
        return accepts(answer, data.Sample(row["id"], [], row["question"], row["gold"], row["choices"]))
    try:
        policy = policies.fit_on_votes(rows, settings, judge, sources)
    except InputError as error:                 # too few questions
        return f"not fitted: {error}"
    policy.save(path)
    shown = ("accuracy", "ece", "auroc", "calls", "tokens")
    frontier = {f"rate {point['rate']:.2f}": {key: point[key] for key in shown}
                for point in policy.frontier[::4]}
    return f"{policy.tables()}\n\nits frontier, cross-fitted\n{cli.table(frontier)}"


def main(argv=None):
    parser = argparse.ArgumentParser(description="Methods, calibration, scaling and the probe, for one "
                                                 "model or two.")
    cli.add_sources(parser)
    parser.add_argument("--baseline", help="a second model to hold it against")
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of samples for which every module "
                                                             "votes; default "
                        "1 2 4 8 16 32 on the built-in questions, else --samples alone")
    parser.add_argument("--regions", nargs="+", default=["key", "random", "inverse"], choices=MODES,
                        help="of the probe")
    parser.add_argument("--t", type=int, nargs="+", default=list(PROBE_STEPS),
                        help="noise steps of the probe; 0 is always run")
    parser.add_argument("--probe_samples", type=int, default=4,
                        help="answers a question at each step of the probe")
    parser.add_argument("--corruptions", nargs="*", choices=corruptions.NAMES,
                        help="severity curves under these, all where "
                        "none is named: accuracy and confidence at five severities, on the key region and "
                        "everywhere; takes "
                        "some times as long as the probe")
    parser.add_argument("--max_failed", type=float, default=0.05,
                        help="share of questions on which a server may fail before no row is called CA-TTS")
    parser.add_argument("--target_risk", type=float, default=0.1,
                        help="share of wrong answers that abstention aims at")
    parser.add_argument("--output", default="runs/eval", help="folder for what is measured")
    parser.add_argument("--json", action="store_true", help="print tables.json")
    cli.add_options(parser, catts.Settings)
    parser.set_defaults(batch_size=50)
    args = parser.parse_args(argv)
    settings = catts.Settings(**{name: getattr(args, name) for name in catts.Settings.__dataclass_fields__})
    if settings.early_exit != "off":
        raise InputError(f"--early_exit is {settings.early_exit!r}; here every module must vote, leave it "
                         "off")
    if settings.policy != "paper":
        raise InputError(f"--policy is {settings.policy!r}; here every module must vote, and a new policy "
                         f"is fitted")
    if args.probe_samples < 1 or not 0 < args.target_risk < 1 or not 0 <= args.max_failed <= 1:
        raise InputError(f"--probe_samples {args.probe_samples} must be at least 1, --target_risk "
                         f"{args.target_risk} between 0 and 1, --max_failed {args.max_failed} from 0 to 1")
    if args.baseline and os.path.realpath(args.baseline) == os.path.realpath(args.model):
        raise InputError(f"--baseline {args.baseline!r} is --model; name another model, or none")
    built_in = (args.data or "synthetic") == "synthetic"
    args.limit = 200 if built_in and args.limit is None else args.limit
    args.sizes = sorted({*(args.sizes or ([1, 2, 4, 8, 16, 32] if built_in else [])), settings.samples})
    if args.sizes[0] < 1:
        raise InputError(f"--sizes {args.sizes[0]} must be at least 1")
    drawn = max(args.sizes[-1], 2 * settings.samples, settings.samples +
                8)        # what CA-TTS costs, in samples
    args.t = ts = sorted({0, *(parse_t(t)[0] for t in args.t)})
    args.regions = [region for region in MODES if region in args.regions]
    output, samples = Path(args.output), data.load(args.data or "synthetic", "test", args.limit,
                                                   args.data_seed, args.strict,
                                                   answered=True, allow_outside=args.allow_outside)
    paths = list(filter(None, (args.baseline, args.model)))
    public = [cli.public_url(path) for path in paths]
    names = [Path(path).name for path in public]
    names = names if len({*names}) == len(paths) else public
    votes, probes, corrupted = {}, {}, {}
    for name, path in zip(names, paths):
        controller = catts.build(args, settings, path)
        folder = output / re.sub(r"[^\w.-]+", "_", name)
        frame = results_file.run_fingerprint(args, ("baseline", "target_risk", "corruptions"), model=path)
        defaults = results_file.run_fingerprint(parser.parse_args([]),
                                                ("baseline", "target_risk", "corruptions"))
        answering.ask_consent(args, samples, controller, folder / "votes.jsonl", sizes=args.sizes)
        votes[name] = results_file.run_resumable(
            collector(controller, args.sizes, drawn), samples, folder / "votes.jsonl", frame, args.batch_size,
            f"{name}: votes", args.strict, defaults,
            batches_in_flight(args.batch_size, controller.vlm, controller.expert))
        if isinstance(controller.vlm, VLM):
            probes[name] = results_file.run_resumable(
                prober(controller.vlm, controller.clip, args.regions, ts, settings.mass, args.probe_samples,
                             settings.seed, max_new_tokens=settings.max_new_tokens),
                samples, folder / "probe.jsonl", frame | {"states": list(STATES)}, args.batch_size,
                f"{name}: probe",
                args.strict, defaults)
            if args.corruptions is not None:
                kinds = args.corruptions or corruptions.NAMES
                corrupted[name] = results_file.run_resumable(
                    corrupter(controller.vlm, controller.clip, kinds, settings.mass, args.probe_samples,
                              settings.seed,
                              max_new_tokens=settings.max_new_tokens),
                    samples, folder / "corruptions.jsonl", frame | {"corruptions": list(kinds)},
                    args.batch_size,
                    f"{name}: corruptions", args.strict, defaults)
    if votes[names[0]] is None:             # not the first rank
        return
    ids = [s.id for s in samples]
    votes, probes, corrupted = ({name: [rows[i] for i in ids if i in rows] for name, rows in found.items()}
                                for found in (votes, probes, corrupted))
    if not all(votes.values()):
        raise InputError(f"no question of {args.data!r} could be answered; every picture is broken")
    expected = [catts.SOURCE[m] for m in controller.modules if m != "self_check"
                or controller.checker is not None]
    for rows in votes.values():
        check_rows(rows, args.sizes, drawn, expected)
        mark_incomplete(rows, args.max_failed)
    failures = {name: results_file.failures(rows) for name, rows in votes.items()}
    scales = dict(zip(names, stored_scales(paths)))
    tables = make_tables(votes, probes, settings, args.sizes, drawn, args.regions, ts, args.target_risk,
                         scales)
    if corrupted:
        tables["severity"] = {f"{name}, {row}": figures for name, rows in corrupted.items()
                              for row, figures in severity_table(rows, scales[name]).items()}
    kept, left_out = len(votes[names[-1]]), len(ids) - len(votes[names[-1]]) + getattr(samples, "broken", 0)
    source = args.data or "the built-in test split"
    about = (f"{kept} questions of {source}{f' ({left_out} left out)' if left_out else ''}, "
             f"N = {settings.samples}, noise at t = {max(ts)}, seed {settings.seed}; "
             f"{' and '.join(map(cli.shown, paths))}; "
             f"Expert {cli.shown(args.expert)}; torch {torch.__version__}.")
    about += "".join(f" {name}: c = sigmoid({scale['slope']:.3g} C {scale['intercept']:+.3g}), fixed before "
                     f"the training began."
                     for name, scale in scales.items() if scale)
    cli.write_atomically(output / "tables.json", cli.strict_json({"about": about, **tables}, indent=1))
    threshold = tables["abstention"][names[-1]] | {"settings": results_file.threshold_settings(settings),
                                                   "sources": results_file.source_fingerprint(args)}
    cli.write_atomically(output / "threshold.json", cli.strict_json(threshold, indent=1))
    closed = [row for row in votes[names[-1]] if not results_file.is_open(row)]
    policy_text = fit_policy(closed, settings, results_file.source_fingerprint(args),
                             output / "policy.json")
    clip = controller.clip or ClipAttention.from_pretrained(args.clip, kind=args.clip_map)
    (output / "report.html").write_text(report.build(
        tables, cases(votes[names[-1]], settings, samples, clip, threshold["method"]),
        {name: training_log(path) for name, path in zip(names, paths)}, about), encoding="utf-8")
    if probes:
        draw_probe(output / "probe.png", {f"{name}, {region}": {t: probed(rows, region, t) for t in ts}
                                          for name, rows in probes.items() for region in args.regions})
    if args.json:
        print(cli.strict_json(tables))
    else:
        print_tables(tables, about, failures, drawn)
        print(f"\nThe policy (catts.py --policy {output}/policy.json)\n{policy_text}")
    if any(failures.values()):
        print("; ".join(filter(None, failures.values())), file=sys.stderr)
        raise SystemExit(results_file.STILL_OPEN)
    if args.json:
        return
    print(f"\nwrote {output}/: report.html, tables.json, threshold.json, probe.png and the stored votes; "
          "the page and tables.json hold every interval")
    changed = [f"--{key} {shlex.quote(str(value))}" for key,
               value in results_file.threshold_settings(settings).items()
               if value != getattr(catts.Settings, key)]
    changed += [f"--{key} {shlex.quote(cli.public_url(getattr(args, key)))}"
                for key in ("expert", "expert_model", "clip", "check_model")
                if getattr(args, key) != parser.get_default(key)]
    print("next: " + " ".join(["python catts.py tiny/example.png \"How many red crosses are there?\" --model",
                               cli.shown(args.model), *changed, f"--abstain {output}/threshold.json"]))


PROBE_STEPS = (0, 300, 500, 700, 850, 999)
STATES = ("clean", "noised", "blank")               # on which pictures a frozen model's hidden state is read


@dataclass
class Answer:
    """One sampled answer. confidence: C (Eq. 3, mean); probability: exp of the mean log-prob, in (0, 1];
    token_probability: mean probability of the sampled tokens (the paper's Figure 1)."""
    id: str
    skill: str
    level: str
    text: str
    correct: bool
    confidence: float
    probability: float
    token_probability: float
    length: int
    finished: bool


def answer(vlm, samples, images, n=4, *, seed=0, batch_size=32, progress=None, **sampling):
    """n sampled answers for each question about given images (lists of PIL images) -> list of Answer, in
    order."""
    answers = []
    for start in range(0, len(samples), batch_size):
        part = samples[start:start + batch_size]
        rollouts = vlm.sample(images[start:start + batch_size], [data.prompt(s) for s in part], n, seed=[
            f"{seed} {s.id}" for s in part], **sampling)
        for sample, group in zip(part, rollouts):
            for r in group:
                answers.append(Answer(
                    sample.id, str(sample.meta.get("skill", "")), str(sample.meta.get("level", "")), r.text,
                    is_correct(r.text, sample), r.confidences.mean().item(), r.logprobs.mean().exp().item(),
                    r.logprobs.exp().mean().item(), len(r.tokens), r.finished))
        if progress is not None:
            progress.update(len(part))
    return answers


def noised_answers(vlm, samples, clip, t, mode, mass, n, seed, progress=None, **sampling):
    """Answers to the same questions on pictures noised at step t on a region -> list of Answer."""
    images = make_pairs([s.pictures() for s in samples], [s.question for s in samples], clip, (t, t),
                        [mode if t else "all"] * len(samples), mass, [f"{seed} {s.id}" for s in samples])
    return answer(vlm, samples, images, n, seed=f"{seed} {t}", progress=progress, **sampling)


def probe(vlm, samples, clip, ts=PROBE_STEPS, mode="key", mass=0.5, n=4, seed=0, name="", **sampling):
    """Answers on the same questions at each noise step t (paper Figure 1) -> {t: list of Answer}."""
    samples = list(samples)
    with tqdm(total=len(samples) * len(ts), desc=f"probe {name}".strip(), unit="question",
              leave=False) as progress:
        return {t: noised_answers(vlm, samples, clip, t, mode, mass, n, seed, progress, **sampling)
                for t in ts}


def prober(vlm, clip, regions, ts, mass, n, seed, **sampling):
    """-> a function: batch of samples -> rows for `run_resumable`: {"id", "found": {region: {t: [Answer,
    ...]}}, "states": {of STATES: the question's hidden state, packed}}, noised at the last step on the first
    region."""
    def collect(batch):
        rows = {s.id: {"id": s.id, "found": {region: {} for region in ("clean", *regions)}} for s in batch}
        for region, t in [("clean", 0)] + [(region, t) for region in regions for t in ts if t]:
            for a in noised_answers(vlm, batch, clip, t, region, mass, n, seed, **sampling):
                rows[a.id]["found"][region].setdefault(str(t), []).append(asdict(a))
        pictures, prompts = [s.pictures() for s in batch], [data.prompt(s) for s in batch]
        noised = make_pairs(pictures, [s.question for s in batch], clip, (max(ts),) * 2,
                            [regions[0]] * len(batch), mass,
                            [f"{seed} {s.id}" for s in batch])
        blank = [[Image.new("RGB", image.size) for image in some] for some in pictures]
        for name, images in zip(STATES, (pictures, noised, blank)):
            for sample, state in zip(batch, vlm.states(images, prompts)):
                rows[sample.id].setdefault("states", {})[name] = baselines.packed(state)
        return list(rows.values())
    return collect


def corrupter(vlm, clip, names, mass, n, seed, **sampling):
    """-> a function: batch of samples -> rows for `run_resumable`: {"id", "found": {"clean" or "corruption,
    region, severity": [Answer, ...]}}, on the key region and on the whole picture, at five severities."""
    def collect(batch):
        rows = {s.id: {"id": s.id, "found": {}} for s in batch}
        pictures = [s.pictures() for s in batch]
        maps = clip.maps([(image, s.question) for s, some in zip(batch, pictures) for image in some])
        keys = [[noise.region(next(maps), mass, "key") for _ in some] for some in pictures]
        for place, masks in (("key", keys), ("all", [[None] * len(some) for some in pictures])):
            for name in names:
                for severity in corruptions.SEVERITIES:
                    images = [[corruptions.corrupt(image, name, severity, noise.NoisedPicture, mask=mask,
                                                   seed=zlib.crc32(
                        f"{seed} {s.id} {i}".encode())) for i, (image, mask) in enumerate(zip(some, own))]
                        for s, some, own in zip(batch, pictures, masks)]
                    label = f"{name}, {place}, {severity}"
                    for a in answer(vlm, batch, images, n, seed=f"{seed} {label}", **sampling):
                        rows[a.id]["found"].setdefault(label, []).append(asdict(a))
        for a in answer(vlm, batch, pictures, n, seed=seed, **sampling):
            rows[a.id]["found"].setdefault("clean", []).append(asdict(a))
        return list(rows.values())
    return collect


def probed(rows, region, t):
    """Rows of `prober` -> list of Answer on a region at step t."""
    region, t = (region, t) if t else ("clean", 0)
    return [Answer(**a) for row in rows for a in row["found"][region][str(t)]]


if __name__ == "__main__":
    cli.command("eval.py", main)
