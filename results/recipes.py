"""The recipes, measured: every row trained with several seeds and asked the same held-out questions.

    python results/recipes.py                                     # the headline rows x 3 seeds, the others x 1; resumes
    python results/recipes.py --rows grpo ours --seeds 1          # some of them
    python results/recipes.py --split val --rows base ours --seeds 1      # other questions; chooses the weights of the votes
    python results/recipes.py --jobs 2                            # two runs at a time, one thread each
    python results/recipes.py --rows base grpo ours --seeds 6 --question_seed 12 --vote_questions 0       # fresh questions

Each run is `train_cdrl.py` with the row's flags, then answers of the trained model to held-out questions, clean and with
noise on key, random and inverse regions, and the votes of CA-TTS. One record a run, results/recipes/SPLIT-ROW-SEED.json.gz (with
`--question_seed 10`: test10-ROW-SEED.json.gz), from which all tables and pictures are made; a run whose record is there, with the
same flags, base and Expert, is not repeated.
Models, answers and votes stay under runs/recipes (delete both when the code has changed).

Confidences: C (Eq. 3) ranks; c = sigmoid(aC + b) is the probability that training shapes, a and b those of the run, fitted on
the base's answers to training questions before the first step; p = exp(mean log-prob); for
CA-TTS the share of the winner. "mixed": over clean and noised answers together. "abstains": the share of answers with c below
one half. "CA-TTS, tuned" votes with the weights tau that `--split val` found best there, on average over its rows, and left
in results/recipes/taus.json.
"""
import argparse
import gzip
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data
import eval
import noise
import train_cdrl
from catts import SOURCES, Controller, Settings, Vote, tally
from tiny import questions
from utils import baselines, cli, distributed, logs, metrics, tables
from utils.checkpoint import FREE, settings_of
from utils.cli import InputError
from utils.experts import LocalExpert
from utils.judge import accepts
from utils.metrics import auroc, calibration_error, confidence_metrics
from utils.results_file import run_resumable
from utils.tables import HEADLINE as COLUMNS
from vlm import VLM

# row: flags of train_cdrl.py; None = not trained
ROWS = {
    "base": None,
    "grpo": "--recipe grpo",
    "paper": "--recipe paper",
    "ours": "",
    "paper, alpha 0": "--recipe paper --alpha 0",
    "paper, alpha .5, beta 1": "--recipe paper --alpha .5 --beta 1",
    "paper, Cnorm by range": "--recipe paper --cnorm range",
    "paper, lr 3e-4": "--recipe paper --lr 3e-4",
    "paper, pathwise": "--recipe paper --pathwise 1",
    "paper, Brier": "--recipe paper --calibration brier",
    # each of the five settings of `ours` taken back, then what else could be changed
    "ours, advantages by std": "--adv_norm std",
    "ours, linear": "--calibration linear",
    "ours, no pathwise": "--pathwise 0",
    "ours, no controls": "--controls 0",
    "ours, lr 1e-4": "--lr 1e-4",
    "ours, advantages by mean": "--adv_norm none",
    "ours, exact": "--pathwise 1",
    "ours, log": "--calibration log",
    "ours, no calibration": "--calibration none",
    "ours, alpha 0": "--alpha 0",
    "ours, one view learns": "--no-learn_noised",
    "ours, noised policy gradient": "--noised_policy 1",
    "ours, noise everywhere": "--region all --controls 0",
    "ours, random regions": "--region random --controls 0",
    "ours, 16 questions x 8": "--batch_size 16 --group_size 8",
    "hacked: the gap alone": "--calibration none --alpha 1 --beta 1 --controls 0",
}
HEADLINE = ("base", "grpo", "paper", "ours")
SEVERAL_SEEDS = (*HEADLINE, "ours, no controls")                # other rows are trained once
REGIONS = ("key", "random", "inverse")
SPLITS = ("val", "test")
NOISE_T, ANSWERS, NOISED_ANSWERS = 999, 8, 4
SIZES = [1, 2, 4, 8, 16]        # samples of the headline rows' scaling curves
TAUS = (0, 0.25, 0.5, 1, 2, 4, 8, 16, 32)     # weights to choose from, for each of Voter, Self-Reflection and Visual Self-Check
VOTERS = ("majority", "weighted", "CA-TTS", "CA-TTS, tuned")
STYLES = {"majority": ":", "CA-TTS": "--", "CA-TTS, tuned": "-"}        # of the scaling curves
LOGGED = ("gap", "gap/controls", "original/reward", "original/outcome", "original/perception", "original/calibration",
          "original/confidence", "original/entropy", "original/length", "original/words", "original/distinct",
          "noised/confidence", "noised/length", "noised/truncated")
HERE, RUNS = ROOT / "results" / "recipes", ROOT / "runs" / "recipes"
WEIGHTS = HERE / "taus.json"
NO_VOTES = {"methods": {}, "votes": {}, "right": {}, "scaling": {}, "against majority": {}}


def name_of(row, seed):
    return f"{row.replace(', ', '-').replace(': ', '-').replace(' ', '_')}-{seed}"


def same_settings(stored, wanted):
    """Whether a run with the stored settings is the wanted one. A setting that is newer than the run had its default in it; one
    that has gone since is not compared."""
    return wanted.items() <= (settings_of(train_cdrl.Args()) | stored).items()


# ---------------------------------------------------------------------------------------------------------------------
# One run -> its record

def train(row, seed, flags):
    """Train one run, unless it is there -> (model directory, folder for its answers, seconds of training)."""
    if ROWS[row] is None:
        (output := RUNS / "base").mkdir(parents=True, exist_ok=True)
        return ROOT / "tiny" / "base", output, 0.0
    output = RUNS / name_of(row, seed)
    wanted = [*ROWS[row].split(), *flags, "--seed", str(seed), "--eval_size", "0", "--output", str(output)]
    stored, seconds = output / "args.json", output / "seconds.json"
    if not (seconds.exists() and same_settings(json.loads(stored.read_text()), settings_of(train_cdrl.parse(wanted)))):
        start = time.time()
        if subprocess.run([sys.executable, str(ROOT / "train_cdrl.py"), *wanted], check=False).returncode:
            raise InputError(f"{row!r}, seed {seed}, did not train; the command was: train_cdrl.py {' '.join(wanted)}")
        for split in SPLITS:
            for old in output.glob(f"{split}*-*"):          # answers of a shorter run in this folder
                old.unlink()
        cli.write_atomically(seconds, json.dumps(time.time() - start))
    return output, output, json.loads(seconds.read_text())


def scale_of(seed, folder):
    """The map from C to a probability, fixed before the first step, by which a run's c is read: the one that it was trained
    with, or, where it was not trained, the one fitted on the base with this seed."""
    if trained_scale := tables.stored_scales([folder])[0]:
        return trained_scale
    file = RUNS / f"scale-{seed}.json"
    if not file.exists():
        args = train_cdrl.parse(["--seed", str(seed), "--eval_size", "0"])
        train_set, _ = data.open_data(args)
        order = distributed.QuestionOrder(train_set, args.batch_size, seed)
        clip = noise.ClipAttention.from_pretrained()
        cli.write_atomically(file, json.dumps(train_cdrl.fit_map_on_base(VLM.load(args.model), clip, order, args)))
    return json.loads(file.read_text())


def ask(path, samples, file):
    """Answers of a model on clean and on noised pictures -> {"clean" or region: list of Answer}, kept in a file."""
    if not file.exists():
        vlm, clip, mass = VLM.load(path), noise.ClipAttention.from_pretrained(), train_cdrl.Args.mass
        answers_by_view = {"clean": eval.answer(vlm, samples, [s.pictures() for s in samples], ANSWERS, max_new_tokens=64)}
        for region in REGIONS:
            answers_by_view[region] = eval.noised_answers(vlm, samples, clip, NOISE_T, region, mass, NOISED_ANSWERS, 0,
                                                 max_new_tokens=64)
        cli.write_atomically(file, json.dumps({key: [vars(a) for a in answers] for key, answers in answers_by_view.items()}))
    return {key: [eval.Answer(**a) for a in answers] for key, answers in json.loads(file.read_text()).items()}


def votes_of(path, samples, file, sizes):
    """What every module of CA-TTS votes, kept in a file -> list of rows, one a question."""
    settings = Settings(samples=ANSWERS)
    expert = LocalExpert(VLM.load(ROOT / "tiny" / "expert"), Settings.expert_tokens)
    controller = Controller(VLM.load(path), expert, noise.ClipAttention.from_pretrained(), settings)
    frame = {"model": str(path), "sizes": sizes}
    drawn = max(sizes[-1], 2 * ANSWERS)
    return list(run_resumable(eval.collector(controller, sizes, drawn), samples, file, frame, 50,
                            f"votes of {Path(path).name}").values())


def weighed(rows, n, taus):
    """`by_method` with other weights {tau1, tau2, tau3} -> list of Outcome of CA-TTS; a module of weight 0 does not run."""
    settings = Settings(samples=ANSWERS, **taus)
    modules = [source for source, tau in settings.taus().items() if source in tables.LETTER and tau]
    return eval.by_method(rows, n, settings)[f"{tables.method_of(modules)}@{n}"]


def choose_taus(voted, samples):
    """{model: rows of its votes} on samples -> the weights of TAUS with the highest accuracy, on average over models."""
    def table(row):
        by_source = row["by_n"][str(ANSWERS)]["votes"]
        votes = [Vote(source, *vote) for source, of_source in by_source.items() for vote in of_source]
        answers = tally(votes, Settings().taus(), row["choices"])
        return (np.array([[a.shares.get(source, 0) for source in SOURCES] for a in answers]),         # (answers, sources)
                [accepts(a.answer, by_id[row["id"]]) for a in answers])

    def accuracy(taus):
        return np.mean([[right[np.argmax(shares @ (1, *taus))] if right else False for shares, right in tables]
                        for tables in voted])

    by_id = {sample.id: sample for sample in samples}
    voted = [[table(row) for row in rows] for rows in voted.values()]
    return dict(zip(("tau1", "tau2", "tau3"), max(product(TAUS, repeat=3), key=accuracy)))


def voted_columns(rows, sizes, taus):
    """Rows of votes -> metrics of every method with N = 8, pooled and (of those that vote) within skill, accuracy against N,
    and CA-TTS against majority voting at the same tokens; with taus, CA-TTS by those weights beside it."""
    by_n = {n: eval.by_method(rows, n, Settings(samples=ANSWERS)) for n in sorted({*sizes, 2 * ANSWERS})}
    for n in sizes if taus else ():
        by_n[n][f"CA-TTS, tuned@{n}"] = weighed(rows, n, taus)
    methods = {name: tables.method_row(outcomes) for name, outcomes in by_n[ANSWERS].items()}
    voting = {name: by_n[ANSWERS][f"{name}@{ANSWERS}"] for name in VOTERS if f"{name}@{ANSWERS}" in by_n[ANSWERS]}
    skill = {row["id"]: row["meta"]["skill"] for row in rows}

    def figures(outcomes):
        ids, share, right = tables.arrays(outcomes)
        return tables.method_row(outcomes) | {"ece mapped": calibration_error(metrics.cross_fitted(ids, share, right), right)}

    votes = {group: {name: figures([o for o in outcomes if group in ("all", skill[o.id])])
                     for name, outcomes in voting.items()} for group in ("all", *questions.SKILLS)}
    against = tables.against_majority(by_n, ANSWERS)
    return {"methods": methods, "votes": votes,
            "right": {name: [int(o.correct) for o in outcomes] for name, outcomes in voting.items()},
            "scaling": tables.scaling(by_n) if len(sizes) > 1 else {},
            "against majority": {name.split("@")[0]: row for name, row in against.items() if name.startswith("CA-TTS")}}


def columns(answers_by_view, scale):
    """Answers by view -> one row of numbers."""
    views = {view: tables.columns_of(answers) for view, answers in answers_by_view.items()}
    clean, key = views["clean"], views["key"]
    c, p, right = clean["confidence"], clean["probability"], clean["correct"].astype(float)
    mean = {view: float(view_columns["confidence"].mean()) for view, view_columns in views.items()}
    by_p, by_c, ranked = (confidence_metrics(x, right) for x in (p, metrics.calibrated(c, scale), c))
    c_clean, blind = metrics.calibrated(c, scale), metrics.calibrated(key["confidence"], scale)
    head = {name: value for name, value in baselines.headline(clean, key, scale).items()
            if name.startswith(("AUROC mixed", "AUROC within")) or name.endswith(("platt", "isotonic"))}
    return {**tables.headroom(answers_by_view["clean"]), "C": mean["clean"],
            **{f"gap {region}": mean["clean"] - mean[region] for region in REGIONS},
            "AUROC": ranked["auroc"], "ECE c": by_c["ece"], "Brier c": by_c["brier"],
            "AUROC p": by_p["auroc"], "ECE p": by_p["ece"], "Brier p": by_p["brier"],
            "ECE mapped": calibration_error(metrics.cross_fitted(clean["id"], c, right), right), "AURC": ranked["aurc"],
            "accuracy@80": ranked["accuracy@80"], "abstains": float((c_clean < 0.5).mean()),
            "noised": float(key["correct"].mean()), **head,
            "accuracy@80, noised": confidence_metrics(key["confidence"], key["correct"])["accuracy@80"],
            "abstains, noised": float((blind < 0.5).mean()),
            "entropy": -float(np.log(p).mean()), "length": float(clean["length"].mean()),
            "words": len({word for a in answers_by_view["clean"] for word in a.text.split()})}


def questions_name(args):
    """The name of a set of questions: its split, and its seed where that is not 0."""
    return f"{args.split}{args.question_seed or ''}"


def votes_name(args):
    return f"{questions_name(args)}-{args.vote_questions}-votes.jsonl"


def record_of(row, seed, args, samples):
    """One run, made or read -> its record (dict)."""
    file = HERE / f"{questions_name(args)}-{name_of(row, seed)}.json.gz"
    sizes, voters = SIZES if row in HEADLINE and args.split == "test" else [ANSWERS], samples[:args.vote_questions]
    taus = json.loads(WEIGHTS.read_text()) if args.split == "test" and WEIGHTS.exists() else None
    settings = settings_of(train_cdrl.parse([*(ROWS[row] or "").split(), *args.flags.split()]))     # today's defaults included
    loose = {"model", "clip", *FREE} - {"steps"}
    settings = {key: value for key, value in settings.items() if key not in loose}
    frame = {"seed": seed, "questions": len(samples), "voted": len(voters), "taus": taus,
             **{name: f"{cli.checksum(ROOT / 'tiny' / name):08x}" for name in ("base", "expert")}}
    if file.exists():
        old = json.loads(gzip.decompress(file.read_bytes()))
        if frame.items() <= old.items() and same_settings(old["settings"], settings):
            return old
    path, folder, seconds = train(row, seed, args.flags.split())
    answers_by_view, scale = ask(path, samples, folder / f"{questions_name(args)}-{args.questions}.json"), scale_of(seed, folder)
    skills = {"all": answers_by_view} | {
        skill: {view: [a for a in answers if a.skill == skill] for view, answers in answers_by_view.items()}
        for skill in questions.SKILLS}
    clean, key = tables.columns_of(answers_by_view["clean"]), tables.columns_of(answers_by_view["key"])
    views = {view: tables.grouped(answers) for view, answers in answers_by_view.items()}
    mean = {view: np.array([np.mean([a.confidence for a in group]) for group in groups]) for view, groups in views.items()}
    log = logs.training_log(folder)
    record = frame | {
        "settings": settings, "seconds": seconds, "scale": scale, **{skill: columns(answers, scale) for skill, answers in skills.items()},
        **(voted_columns(votes_of(path, voters, folder / votes_name(args), sizes), sizes, taus) if voters else NO_VOTES),
        "log": {key: [round(float(np.mean([step[key] for step in log[i:i + 10] if key in step] or [np.nan])), 4)
                      for i in range(0, len(log), 10)] for key in LOGGED if any(key in step for step in log)},
        "answers": {"id": clean["id"].tolist(), "C": clean["confidence"].round(4).tolist(),
                    "p": clean["probability"].round(4).tolist(), "correct": clean["correct"].astype(int).tolist()},
        "noised answers": {"C": key["confidence"].round(4).tolist(), "p": key["probability"].round(4).tolist(),
                           "correct": key["correct"].astype(int).tolist()},
        "of a question": {"skill": [group[0].skill for group in views["clean"]],
                          f"majority@{ANSWERS}": [int(right) for right in tables.majorities(answers_by_view["clean"])],
                          **{f"gap {region}": (mean["clean"] - mean[region]).round(4).tolist() for region in REGIONS}}}
    text = cli.strict_json(record)
    file.with_suffix(".tmp").write_bytes(gzip.compress(text.encode(), mtime=0))
    os.replace(file.with_suffix(".tmp"), file)
    return json.loads(text)


# ---------------------------------------------------------------------------------------------------------------------
# Records -> tables and pictures

def arrays(record):
    """-> ids, correct (N,), {"C", "p", "c": (N,)} of a record's answers to clean pictures."""
    answers = {key: np.array(values) for key, values in record["answers"].items()}
    return answers["id"], answers["correct"].astype(float), {
        "C": answers["C"], "p": answers["p"], "c": metrics.calibrated(answers["C"], record["scale"])}


def by_question(record):
    """-> {name: (Q, ...)}: correct, C, p, c (Q, 8) of the answers; skill, majority, gaps (Q,); whether each way of voting was
    right (Q,), nan for questions without votes."""
    _, right, value = arrays(record)
    count = len(record["of a question"]["skill"])
    arrays_by_name = {name: values.reshape(count, -1) for name, values in {"correct": right, **value}.items()}
    arrays_by_name |= {name: np.array(values) for name, values in record["of a question"].items()}
    arrays_by_name |= {f"noised {name}": np.array(values, float).reshape(count, -1)
              for name, values in record.get("noised answers", {}).items()}
    for name, values in record["right"].items():
        if name.startswith("CA-TTS"):
            arrays_by_name[f"{name}@{ANSWERS}"] = np.array(values + [np.nan] * (count - len(values)))
    return arrays_by_name


def compared(q):
    """`by_question` of some questions -> the statistics that get intervals. "within": the mean over the skills, AUROC over
    those that have right and wrong answers."""
    right, c, p, rank = (q[name].ravel() for name in ("correct", "c", "p", "C"))
    ranked = confidence_metrics(rank, right)
    within = []
    for skill in questions.SKILLS:
        of_skill = {name: q[name][q["skill"] == skill].ravel() for name in ("correct", "c", "C")}
        within.append((auroc(of_skill["C"], of_skill["correct"]), calibration_error(of_skill["c"], of_skill["correct"])))
    within = np.nanmean(within, 0)
    statistics = {"pass@1": right.mean(), **{name: np.nanmean(q[name]) for name in q if "@" in name or name.startswith("gap")},
             "AUROC": ranked["auroc"], "AUROC within": within[0], "AURC": ranked["aurc"],
             "ECE c": calibration_error(c, right), "ECE c within": within[1], "Brier c": ((c - right)**2).mean(),
             "AUROC p": auroc(p, right), "ECE p": calibration_error(p, right), "Brier p": ((p - right)**2).mean()}
    for name in ("C", "p"):
        if f"noised {name}" in q:
            statistics[f"AUROC mixed, {name}"] = baselines.auroc_over_views(
                (q[name].ravel(), right), (q[f"noised {name}"].ravel(), q["noised correct"].ravel()))
        higher = 0.5 + 0.5 * np.sign(q[name][:, :, None] - q[name][:, None])                        # (Q, 8, 8)
        pairs = q["correct"][:, :, None] > q["correct"][:, None]
        statistics[f"AUROC within questions, {name}"] = higher[pairs].mean()
    if "AUROC mixed, C" in statistics:
        statistics["AUROC mixed, the better"] = max(statistics["AUROC mixed, C"], statistics["AUROC mixed, p"])
    return {name: float(value) for name, value in statistics.items()}


def resampled(records, rounds=1000):
    """{row: [record of a seed]} -> {row: [(`compared`, {statistic: (rounds,)}) of a seed]}; the same questions for all."""
    drawn = {}
    for row, records_of_row in records.items():
        for record in records_of_row:
            q, rng = by_question(record), np.random.default_rng(0)
            count = len(q["skill"])
            boot = [compared({name: v[g] for name, v in q.items()}) for g in rng.integers(count, size=(rounds, count))]
            drawn.setdefault(row, []).append((compared(q), {name: np.array([b[name] for b in boot]) for name in boot[0]}))
    return drawn


def with_interval(drawn, minus=None):
    """A row of `resampled`, or two -> {statistic: (mean over seeds, low, high)} of drawn, or of drawn minus the other, paired
    by question; where one has fewer seeds, of those that both have. The intervals are of questions and of seeds."""
    table = {}
    pairs = list(zip(drawn, minus or drawn))
    for name in (name for name in pairs[0][0][0] if all(name in other[0] for _, other in pairs)):
        value = [mine[0][name] - (other[0][name] if minus else 0) for mine, other in pairs]
        boot = [mine[1][name] - (other[1][name] if minus else 0) for mine, other in pairs]
        table[name] = baselines.interval_over_seeds(value, np.array(boot))
    return table


def bounds(record):
    """What bounds the AUROC of C: how it ranks the answers to one question, how its mean ranks questions, and how an oracle
    would that knows which share of a question's other answers is right."""
    ids, right, value = arrays(record)
    c, groups = value["C"], metrics.clusters(ids)
    mean, others, within, pairs = np.empty_like(c), np.empty_like(c), [], []
    for group in groups:
        mean[group], others[group] = c[group].mean(), (right[group].sum() - right[group]) / (len(group) - 1)
        if 0 < right[group].sum() < len(group):
            within.append(auroc(c[group], right[group]))
            pairs.append(right[group].sum() * (1 - right[group]).sum())
    return {"AUROC": auroc(c, right), "within questions": float(np.average(within, weights=pairs)),
            "the questions' mean C": auroc(mean, right), "oracle": auroc(others, right)}


def mean_of(records, *path):
    """The mean over seeds of a number that lies at `path` in each record; nan where one has none."""
    values = []
    for record in records:
        for key in path:
            record = record.get(key, {})
        record = record[0] if isinstance(record, list | tuple) else record      # a value before its interval
        values.append(np.nan if record in ({}, None) else record)
    return float(np.mean(values))


def headline_of(records):
    return {row: records_of_row for row, records_of_row in records.items() if row in HEADLINE and records_of_row[0]["scaling"]}


def make_tables(records):
    """-> {title: rows for `data.table`}."""
    tables = {}
    for skill in ("all", *questions.SKILLS):
        tables[f"{skill}: mean over the seeds in brackets"] = {
            f"{row} ({len(of_row)})": {**{name: mean_of(of_row, skill, name) for name in of_row[0][skill]},
                                      **({"seconds": mean_of(of_row, "seconds")} if skill == "all" else {})}
            for row, of_row in records.items()}
    bound = {row: [bounds(record) for record in of_row] for row, of_row in records.items()}
    tables["what bounds the AUROC of C"] = {row: {name: mean_of(of_row, name) for name in of_row[0]}
                                            for row, of_row in bound.items()}
    tables["standard deviation over seeds"] = {
        row: {name: float(np.std([mean_of([r], "all", name) for r in of_row], ddof=1)) for name in of_row[0]["all"]}
        for row, of_row in records.items() if len(of_row) > 1} or {"-": {"-": 0}}
    voted = {row: of_row for row, of_row in records.items() if of_row[0]["votes"]}
    tables[f"votes, N = {ANSWERS}; the confidence is the winner's share"] = {
        f"{row}, {name}": {key: mean_of(of_row, "methods", f"{name}@{ANSWERS}", key) for key in (*COLUMNS, "tokens")}
        for row, of_row in voted.items() for name in VOTERS if f"{name}@{ANSWERS}" in of_row[0]["methods"]}
    headline = headline_of(records)
    tables[f"votes within skill, N = {ANSWERS}; ece mapped: after a map fitted on the other half of the questions"] = {
        f"{row}, {name}, {skill}": {key: mean_of(of_row, "votes", skill, name, key)
                                   for key in (*COLUMNS, "ece mapped")}
        for row, of_row in (headline or voted).items() for name in of_row[0]["votes"]["all"] if name.startswith("CA-TTS")
        for skill in ("all", *questions.SKILLS)}
    if headline:
        tables["scaling: points of accuracy per log2 N"] = {
            row: {name: mean_of(of_row, "scaling", name, "slope") for name in VOTERS if name in of_row[0]["scaling"]}
            for row, of_row in headline.items()}
        tables[f"CA-TTS, N = {ANSWERS}, against majority at the same N and at the same tokens"] = {
            f"{row}, {name}": {key: mean_of(of_row, "against majority", name, key) for key in of_row[0]["against majority"][name]}
            for row, of_row in headline.items() for name in of_row[0]["against majority"]}
        tables["four ways: neither, training, CA-TTS, both"] = {
            row: {method: mean_of(of_row, "methods", method, "accuracy")
                  for method in ("pass@1", *(f"{name}@{ANSWERS}" for name in VOTERS)) if method in of_row[0]["methods"]}
            for row, of_row in headline.items()}
    drawn = resampled(records)
    tables["mean over seeds, 95% interval of the questions"] = {row: with_interval(drawn[row]) for row in headline or records}
    if "ours" in records and len(records) > 1:
        tables["ours minus each row: mean over seeds, 95% interval paired by question"] = {
            row: with_interval(drawn["ours"], of_other) for row, of_other in drawn.items() if row != "ours"}
    return {title: rows for title, rows in tables.items() if rows}


def draw(records, folder):
    """recipes.png: reliability of c, risk and coverage (seeds pooled), AUROC within skill, gap by region, scaling, four ways.
    hacking.png: what the logs of the rows that game the reward look like beside honest ones (seed 0)."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(2, 3, figsize=(19, 13), height_ratios=(1, 1.5))      # the lower left one names every row
    headline, skills = {row: records[row] for row in HEADLINE if row in records}, ("all", *questions.SKILLS)
    axes[0, 0].plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for i, (row, of_row) in enumerate(headline.items()):
        triples = [arrays(record) for record in of_row]
        pooled = zip(*((right, v["c"], v["C"]) for _, right, v in triples))
        right, c, rank = (np.concatenate(values) for values in pooled)
        axes[0, 0].plot(*zip(*metrics.reliability_points(c, right)), marker="o",
                        label=f"{row}, ECE {mean_of(of_row, 'all', 'ECE c'):.3f}")
        axes[0, 1].plot(*zip(*metrics.risk_coverage(rank, right)), label=f"{row}, AURC {mean_of(of_row, 'all', 'AURC'):.3f}")
        axes[0, 2].bar(np.arange(5) + 0.2 * i - 0.3, [mean_of(of_row, skill, "AUROC") for skill in skills], 0.18, label=row)
        for name in (name for name in STYLES if name in of_row[0]["scaling"]):
            axes[1, 1].plot(SIZES, [mean_of(of_row, "scaling", name, str(n)) for n in SIZES], STYLES[name], marker="o",
                            markersize=4, color=f"C{i}", label=f"{row}, {name}")
        ways = [way for way in ("pass@1", "majority@8", "CA-TTS@8", "CA-TTS, tuned@8") if way in of_row[0]["methods"]]
        heights = [mean_of(of_row, "methods", way, "accuracy") for way in ways]
        axes[1, 2].bar(np.arange(len(ways)) + 0.2 * i - 0.3, heights, 0.18, label=row)
    for i, region in enumerate(REGIONS):
        axes[1, 0].barh(np.arange(len(records)) + 0.27 * (i - 1), [mean_of(of_row, "all", f"gap {region}")
                                                                  for of_row in records.values()], 0.25, label=region)
    axes[0, 0].set(xlabel="c", ylabel="accuracy", title="Reliability of c", xlim=(0, 1), ylim=(0, 1))
    axes[0, 1].set(xlabel="coverage, highest C first", ylabel="share of wrong answers", title="Risk and coverage")
    axes[0, 2].set(title="AUROC of C, pooled and within skill", xticks=range(5), xticklabels=skills, ylim=(0.5, 1))
    axes[1, 0].set(xlabel="C - C', nats", yticks=range(len(records)), yticklabels=records, title="Gap under noise, by region")
    axes[1, 0].tick_params("y", labelsize=9)
    axes[1, 0].invert_yaxis()
    axes[1, 1].set(xlabel="samples N", ylabel="accuracy", xscale="log", title="Scaling", ylim=(0.3, None))
    axes[1, 1].set_xticks(SIZES, SIZES)
    axes[1, 2].set(title="Accuracy", xticks=range(len(ways)), xticklabels=ways, ylim=(0.4, 1))
    for axis in axes.flat:
        axis.legend(fontsize=8, ncols=2 if axis is axes[1, 1] else 1)
    figure.tight_layout()
    figure.savefig(folder / "recipes.png", dpi=100)
    pyplot.close(figure)
    figure, axes = pyplot.subplots(1, 4, figsize=(19, 4.5))
    for row in (row for row in records if row in ("grpo", "paper", "ours", "ours, no calibration")
                or row.startswith("hacked")):
        for axis, key in zip(axes, ("gap", "original/outcome", "original/confidence", "original/words")):
            values = records[row][0]["log"].get(key, [])
            axis.plot(10 * np.arange(len(values)), values, label=row)
    titles = "gap C - C', nats", "share of right rollouts", "C on original pictures", "different words a step"
    for axis, title in zip(axes, titles):
        axis.set(xlabel="step", title=title)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(folder / "hacking.png", dpi=100)
    pyplot.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS, help="of the table")
    parser.add_argument("--seeds", type=int, default=3, help="of training, of the rows that have several; the questions are the same")
    parser.add_argument("--split", default="test", choices=SPLITS, help="val: to choose on; test: to report on")
    parser.add_argument("--questions", type=int, default=500, help="held-out questions")
    parser.add_argument("--question_seed", type=int, default=0, help="another draws other questions of the split")
    parser.add_argument("--vote_questions", type=int, default=300, help="the first of them, for CA-TTS; 0: no votes")
    parser.add_argument("--flags", default="", help="flags added to every training run, for trials")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; above 1 each has one thread")
    args = parser.parse_args()
    samples = list(data.load("synthetic", args.split, args.questions, args.question_seed))
    HERE.mkdir(exist_ok=True)
    RUNS.mkdir(parents=True, exist_ok=True)
    wanted = [(row, seed) for seed in range(args.seeds) for row in args.rows
              if not seed or row in SEVERAL_SEEDS]
    records = defaultdict(list)
    if args.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = "1"                                         # read by the children as they start
        with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
            made = list(pool.map(record_of, *zip(*wanted), *([same] * len(wanted) for same in (args, samples))))
    else:
        made = [record_of(row, seed, args, samples) for row, seed in wanted]
    for (row, _), record in zip(wanted, made):
        records[row].append(record)
    tables = make_tables(records)
    text = "\n".join(f"\n{title}\n{cli.table(rows)}" for title, rows in tables.items())
    print(text)
    if args.split == "val":
        runs = {row: train(row, 0, args.flags.split()) for row in args.rows}
        voters = samples[:args.vote_questions]
        taus = choose_taus({row: votes_of(path, voters, folder / votes_name(args), [ANSWERS])
                            for row, (path, folder, _) in runs.items()}, voters)
        print(f"\nthe best weights of the votes on these questions: {taus}")
        cli.write_atomically(WEIGHTS, json.dumps(taus))
    else:
        seeds = "" if args.seeds == 3 else f"-seeds{args.seeds}"
        cli.write_atomically(HERE / f"tables{args.question_seed or ''}{seeds}.txt", text + "\n")
        if not args.question_seed:
            draw(records, ROOT / "results")
    print(f"\nwrote {HERE.relative_to(ROOT)}/\nnext: python eval.py --model {cli.shown(RUNS / 'ours-0')} --baseline tiny/base")


if __name__ == "__main__":
    cli.command("recipes.py", main)
