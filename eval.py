"""Does the model know when it does not know? Methods, metrics, scaling, the probe of the paper's Figure 1.

    python eval.py --model runs/cdrl --baseline tiny/base          # before and after: tables, report.html
    python eval.py --only probe --model M --data mine.jsonl        # is it overconfident? in words
    python eval.py --model runs/qwen7b --data MMStar.tsv --dry_run # what it would cost

Two files are stored for each model, a line a question, resumable and split over torchrun's ranks: votes.jsonl
(samples, and every module's votes) and probe.jsonl (answers under noise). Every table is recomputed from
them: a row is measured, never inferred. Unanswered counts as wrong. Intervals are bootstrapped by question,
differences are paired. results.jsonl has each method's answers with the question's subsets.

Left out on purpose: an LLM as the judge; the rules of judge.py decide.
"""
import utils.early  # noqa: F401  # isort: skip
import math
import zlib
from collections import defaultdict
from copy import copy
from dataclasses import asdict, replace
from itertools import combinations

from PIL import Image
from tqdm import tqdm

import catts
import data
import noise
import policy as policies
from catts import Vote, rollout_record, sample_votes, share_of, tally, winner
from noise import MODES, make_pairs, parse_t
from utils import answering, cli, corruptions, cost, distributed, evaluation, locks, results_file, stored
from utils.baselines import packed
from utils.cli import InputError
from utils.contact_sheet import write_pairs
from utils.experts import Memo, batches_in_flight, sample_from
from utils.judge import accepts, extract_answer, is_correct
from utils.metrics import calibrated
from utils.overlap import in_background, waited
from utils.replies import without_thoughts
from utils.tables import CALIBRATED, STATES, Answer, Outcome, method_of, modules_of
from vlm import VLM

PROBE_STEPS = (0, 300, 500, 700, 850, 999)

# ---- The methods, from stored votes

def collector(controller, sizes, drawn, methods=evaluation.METHODS):
    """-> a function: batch of samples -> rows for `run_resumable`, with all that the methods need.

    `drawn` samples a question; the votes of every module for the first n of them, for each n of `sizes`; of
    `methods` the greedy answer, the one with the plausibility cut alone (alpha = 0), and the Expert's alone.
    """
    vlm, settings, checker = controller.vlm, controller.settings, controller.checker
    length = {"max_new_tokens": settings.max_new_tokens}

    def collect(batch):
        pictures, prompts = [s.pictures() for s in batch], [data.prompt(s) for s in batch]
        expert, with_memo = Memo(controller.expert), copy(controller)
        step = len(batch) / (len(sizes) + 2)                # of the progress bar
        with_memo.expert, requests = expert, list(zip(pictures, prompts))
        asked = in_background(expert.ask, requests) if "expert" in methods and expert.remote else None
        groups = yield from sample_from(
            vlm, pictures, prompts, drawn, temperature=settings.temperature, top_k=settings.top_k,
            seed=[f"{settings.seed} {s.id}" for s in batch], **length)
        results_file.advance(step)
        greedy, cut, replies = [[None] * len(batch) for _ in range(3)]
        if "greedy" in methods:
            greedy = yield from sample_from(vlm, pictures, prompts, greedy=True, **length)
            greedy = [group[0] for group in greedy]
        if "cut" in methods and checker:
            cut = checker.contrast(pictures, pictures, prompts, alpha=0, beta=settings.check_beta, **length)
        if "expert" in methods:
            replies = (yield from waited(asked)) if asked else expert.ask(requests)
        results_file.advance(step)
        results_by_n = {}
        for n in sizes:
            results_by_n[n] = yield from with_memo.steps(batch, [group[:n] for group in groups])
            results_file.advance(step)
        rows = []
        for i, sample in enumerate(batch):
            results, reply = {n: results[i] for n, results in results_by_n.items()}, replies[i]
            row = results[max(sizes)].record(sample)
            columns = ("id", "images", "gold", "choices", "question", "source", "meta")
            row = {key: row[key] for key in columns}
            row |= {"samples": [rollout_record(r, sample, settings.window) for r in groups[i]],
                    "expert": None}
            row |= {name: rollout and rollout_record(rollout, sample)
                    for name, rollout in (("greedy", greedy[i]), ("cut_only", cut[i]))}
            if greedy[i] and greedy[i].failure:
                results[max(sizes)].note_failure("base", greedy[i].failure)
            row["open"] = {who: why for r in results.values() for who, why in r.open.items()}
            if reply:
                answer = extract_answer(without_thoughts(reply.text)[0], sample.choices)
                row["expert"] = {"answer": answer, "correct": accepts(answer, sample), "tokens": reply.tokens,
                                 "probability": reply.probability}
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
    drawn, taus = row["samples"][:n], settings.taus()
    tokens = sum(s["tokens"] for s in drawn)
    cut = sum(not s["finished"] for s in drawn) / len(drawn)

    def single(answers):
        return [Outcome(row["id"], math.exp(answer["logprob"]), answer["correct"], answer["tokens"],
                        cut=float(not answer["finished"])) for answer in answers if answer]

    def voted(votes, tokens, calls=0):
        rows = tally(votes, taus, sample.choices)
        best = winner(rows)
        return [Outcome(row["id"], share_of(best, rows), best is not None and accepts(best.answer, sample),
                        tokens, calls, cut)]

    def unrated(correct, tokens, calls=0):
        return [Outcome(row["id"], math.nan, correct, tokens, calls)]

    def counted(tokens):
        return math.nan if tokens is None else tokens           # a server that counts nothing

    def samples(**change):
        return sample_votes([s["answer"] for s in drawn], [s["confidence"][settings.reading] for s in drawn],
                            [math.exp(s["logprob"]) for s in drawn], replace(settings, **change))

    methods = {"pass@1": single(drawn), "greedy": single([row["greedy"]]),
               "greedy, cut only": single([row["cut_only"]]),
               f"majority@{n}": voted(samples(weight="equal", top_share=1.0), tokens),
               f"weighted@{n}": voted(samples(), tokens),
               f"filtered@{n}": voted(samples(top_share=0.5), tokens)}
    if row["expert"]:
        methods["expert alone"] = unrated(row["expert"]["correct"], counted(row["expert"]["tokens"]), 1)
    methods = {name: results for name, results in methods.items() if results}
    if str(n) not in row["by_n"]:
        return methods
    run = row["by_n"][str(n)]
    parts = defaultdict(lambda: defaultdict(int),
                        {name: defaultdict(int, costs) for name, costs in run["parts"].items()})
    critic = counted(parts["critic"]["expert_tokens"])
    price = {"voter": (counted(parts["voter"]["expert_tokens"]), parts["voter"]["expert_calls"]),
             "self_reflection": (critic + parts["self_reflection"]["tokens"],
                                 parts["critic"]["expert_calls"]),
             "self_check": (2 * parts["self_check"]["tokens"], 0)}
    modules = modules_of(row, n)
    for size in range(1, len(modules) + 1):
        for subset in combinations(modules, size):
            for source in subset:
                if source not in run["votes"]:
                    raise InputError(f"question {row['id']!r}: the votes of {source} for {n} samples are "
                                     f"gone; collect again")
            votes = samples() + [Vote(source, *vote) for source in subset for vote in run["votes"][source]]
            # one module needs no Planner; of several it orders the calls, and is paid for it
            planned = [(counted(parts["planner"]["expert_tokens"]),
                        parts["planner"]["expert_calls"])] * (size > 1)
            more, calls = map(sum, zip(*(price[source] for source in subset), *planned))
            methods[f"{method_of(subset, row.get('incomplete'))}@{n}"] = voted(votes, tokens + more, calls)
            if subset == ("self_check",):
                check = run["votes"]["self_check"]
                methods["greedy VCD"] = unrated(bool(check) and accepts(check[0][0], sample),
                                                price["self_check"][0])
    return methods


def by_method(rows, n, settings, scale=None):
    """Stored rows -> {method: list of Outcome over all questions}. scale: a map of `stored_scales`; with it
    `CALIBRATED` is pass@1 once more, its confidence c = sigmoid(slope * C + intercept)."""
    methods = defaultdict(list)
    for row in rows:
        for method, results in outcomes(row, n, settings).items():
            methods[method] += results
    if scale:
        c = calibrated([s["confidence"]["mean"] for row in rows for s in row["samples"][:n]], scale)
        methods[CALIBRATED] = [replace(o, confidence=p) for o, p in zip(methods["pass@1"], c.tolist())]
    return dict(methods)


def cases(rows, settings, samples, clip, method):
    """About a dozen questions of one model for the report -> list of dicts for `report.case`."""
    n, taus, shown = settings.samples, settings.taus(), []

    def verdicts(row):
        results = outcomes(row, n, settings)
        return results[method][0].correct, results[f"majority@{n}"][0].correct

    picked = evaluation.typical_rows(rows, verdicts)
    ids = {row["id"] for row in picked}
    by_id = {sample.id: sample for sample in samples if sample.id in ids}
    for row in picked:
        sample, pictures = by_id[row["id"]], by_id[row["id"]].pictures()
        noised = []
        if clip or settings.region == "all":
            noised, = make_pairs([pictures], [sample.question], clip, parse_t(settings.noise_t),
                                 [settings.region], settings.mass, [f"{settings.seed} {sample.id}"])
        votes = row["by_n"][str(n)]["votes"].items()
        table = tally([Vote(source, *vote) for source, given in votes for vote in given], taus,
                      sample.choices)
        best = winner(table)
        shown.append({
            "images": [*pictures[:1], *noised[:1]], "question": data.ask(sample), "gold": sample.answer,
            "samples": [(s["text"], math.exp(s["logprob"]), s["correct"]) for s in row["samples"][:4]],
            "votes": {r.answer: {source: taus[source] * r.shares.get(source, 0.0) for source in taus} |
                      {"total": r.total} for r in table},
            "method": method, "verdict": best.answer if best else "nothing",
            "right": best is not None and accepts(best.answer, sample)})
    return shown


# ---- The probe: answers under noise (paper Figure 1)

def answer(vlm, samples, images, n=4, *, seed=0, batch_size=32, progress=None, **sampling):
    """n sampled answers for each question about given images (lists of PIL images) -> list of Answer, in
    order."""
    answers = []
    for start in range(0, len(samples), batch_size):
        batch = samples[start:start + batch_size]
        rollouts = vlm.sample(images[start:start + batch_size], [data.prompt(s) for s in batch], n,
                              seed=[f"{seed} {s.id}" for s in batch], **sampling)
        for sample, group in zip(batch, rollouts):
            for r in group:
                answers.append(Answer(
                    sample.id, str(sample.meta.get("skill", "")), str(sample.meta.get("level", "")), r.text,
                    is_correct(r.text, sample), r.confidences.mean().item(), r.logprobs.mean().exp().item(),
                    r.logprobs.exp().mean().item(), len(r.tokens), r.finished))
        if progress is not None:
            progress.update(len(batch))
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
        views = [("clean", 0)] + [(region, t) for region in regions for t in ts if t]
        for region, t in views:
            results_file.advance(len(batch) / (len(views) + 1))
            for a in noised_answers(vlm, batch, clip, t, region, mass, n, seed, **sampling):
                rows[a.id]["found"][region].setdefault(str(t), []).append(asdict(a))
        pictures, prompts = [s.pictures() for s in batch], [data.prompt(s) for s in batch]
        noised = make_pairs(pictures, [s.question for s in batch], clip, (max(ts),) * 2,
                            [regions[0]] * len(batch), mass, [f"{seed} {s.id}" for s in batch])
        blank = [[Image.new("RGB", image.size) for image in images] for images in pictures]
        for name, images in zip(STATES, (pictures, noised, blank)):
            for sample, state in zip(batch, vlm.states(images, prompts)):
                rows[sample.id].setdefault("states", {})[name] = packed(state)
        return list(rows.values())
    return collect


def corrupter(vlm, clip, names, mass, n, seed, **sampling):
    """-> a function: batch of samples -> rows for `run_resumable`: {"id", "found": {"clean" or "corruption,
    region, severity": [Answer, ...]}}, on the key region and on the whole picture, at five severities."""
    def collect(batch):
        rows = {s.id: {"id": s.id, "found": {}} for s in batch}
        pictures = [s.pictures() for s in batch]
        maps = clip.maps([(image, s.question) for s, images in zip(batch, pictures) for image in images])
        keys = [[noise.region(next(maps), mass, "key") for _ in images] for images in pictures]
        everywhere = [[None] * len(images) for images in pictures]

        def corrupted(name, severity, masks):
            return [[corruptions.corrupt(image, name, severity, noise.NoisedPicture, mask=mask,
                                         seed=zlib.crc32(f"{seed} {s.id} {i}".encode()))
                     for i, (image, mask) in enumerate(zip(images, image_masks))]
                    for s, images, image_masks in zip(batch, pictures, masks)]

        for place, masks in (("key", keys), ("all", everywhere)):
            for name in names:
                for severity in corruptions.SEVERITIES:
                    label = f"{name}, {place}, {severity}"
                    for a in answer(vlm, batch, corrupted(name, severity, masks), n, seed=f"{seed} {label}",
                                    **sampling):
                        rows[a.id]["found"].setdefault(label, []).append(asdict(a))
        for a in answer(vlm, batch, pictures, n, seed=seed, **sampling):
            rows[a.id]["found"].setdefault("clean", []).append(asdict(a))
        return list(rows.values())
    return collect


# ---- The command

def fit_policy(rows, settings, sources):
    """What evidence to buy, fitted on stored votes (policy.Policy). InputError on too few questions."""
    def judged(answer, row):
        return accepts(answer, data.Sample(row["id"], [], row["question"], row["gold"], row["choices"]))
    return policies.fit_on_votes(rows, settings, judged, sources)


def measure(name, controller, samples, args, settings):
    """Everything that is asked of one model, stored in its folder -> {part: {id: row}}; None on other ranks
    than the first."""
    folder = evaluation.model_folder(args, name)
    sampling = {"max_new_tokens": settings.max_new_tokens}
    probing = (settings.mass, args.probe_samples, settings.seed)
    kinds = args.corruptions or corruptions.NAMES
    vlm, clip = controller.vlm, controller.clip
    collectors = {
        "votes": (lambda: collector(controller, args.sizes, args.drawn, args.methods), {}, stored.COLLECTED),
        "probe": (lambda: prober(vlm, clip, args.regions, args.t, *probing, **sampling),
                  {"states": list(STATES)}, stored.probe_row(Answer, args, STATES)),
        "corruptions": (lambda: corrupter(vlm, clip, kinds, *probing, **sampling),
                        {"corruptions": list(kinds)}, stored.corruption_row(Answer, args))}
    rows = {}
    for part in args.parts:
        if part == "votes" or isinstance(vlm, VLM):             # a server answers, and shows no logits
            collect, more, shape = collectors[part]
            frame, defaults = evaluation.stored_settings(args, part, evaluation.model_names(args)[name])
            path, in_flight = folder / f"{part}.jsonl", 1
            if part == "probe" and clip is not None and distributed.place()[0] == 0:
                write_pairs(folder, samples, lambda images, some: make_pairs(
                    images, [s.question for s in some], clip, (max(args.t),) * 2,
                    [args.regions[0]] * len(some), settings.mass, [f"{settings.seed} {s.id}" for s in some]))
            if part == "votes":
                answering.ask_consent(args, samples, controller, path, sizes=args.sizes)
                in_flight = batches_in_flight(args.batch_size, vlm, controller.expert)
            rows[part] = results_file.run_resumable(
                collect(), samples, path, frame | more, args.batch_size, f"{name}: {part}", args.strict,
                defaults, in_flight, shape)
    return rows


@locks.released_after
def main(argv=None):
    args, settings = evaluation.parse(argv, catts.Settings, MODES, PROBE_STEPS, parse_t)
    samples = evaluation.of_split(data.load(args.data or "synthetic", "test", args.limit, args.data_seed,
                                            args.strict, answered=True, allow_outside=args.allow_outside,
                                            wording=args.prompt), args.split)
    models, measured = evaluation.model_names(args), {}
    for name, path in models.items():
        controller = catts.build(args, settings, path)
        if args.dry_run:
            parts = cost.eval_parts(args, controller.modules, controller.checker is not None)
            answering.show_cost(samples, data.prompt, args, controller, name, args.drawn, parts)
        else:
            measured[name] = measure(name, controller, samples, args, settings)
    if args.dry_run or distributed.place()[0]:
        return
    evaluation.write_report(measured, controller, samples, args, settings, by_method, fit_policy, cases)


if __name__ == "__main__":
    cli.command("eval.py", main)
