import dataclasses
import html.parser
import json
import math
import re
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, FOUND, ROOT, ahead

import catts
import data
import eval
from utils import baselines, findings, metrics, report, results_file, tables
from utils.cli import InputError
from utils.experts import LocalExpert
from utils.metrics import confidence_metrics
from vlm import VLM


def naive_auroc(confidence, correct):
    pairs = [(a, b) for a, ra in zip(confidence, correct) if ra for b, rb in zip(confidence, correct) if not rb]
    return np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs])


def naive_ece(confidence, correct, bins=15):
    total = 0.0
    for b in range(bins):
        inside = [(c, r) for c, r in zip(confidence, correct)
                  if b / bins < c <= (b + 1) / bins or (b == 0 and c == 0)]
        if inside:
            total += abs(np.mean([r for _, r in inside]) - np.mean([c for c, _ in inside])) * len(inside)
    return total / len(confidence)


def naive_aurc(confidence, correct, rounds=4000):
    """Risk at each coverage, averaged over random orders of ties."""
    rng, confidence, correct, found = np.random.default_rng(0), np.array(confidence), np.array(correct), []
    for _ in range(rounds):
        order = np.lexsort((rng.random(len(confidence)), -confidence))
        found.append(np.mean(1 - np.cumsum(correct[order]) / np.arange(1, len(correct) + 1)))
    return np.mean(found)


@pytest.mark.parametrize("seed, digits", [(0, 6), (1, 1), (2, 0)])
def test_metrics_equal_their_definitions_ties_included(seed, digits):
    rng = np.random.default_rng(seed)
    correct = rng.integers(0, 2, 80)
    confidence = np.clip(0.5 * correct + rng.random(80) * 0.6, 0, 1).round(digits)
    found = confidence_metrics(confidence, correct)
    assert found["auroc"] == pytest.approx(naive_auroc(confidence, correct))
    assert found["ece"] == pytest.approx(naive_ece(confidence, correct))
    assert found["brier"] == pytest.approx(np.mean((confidence - correct) ** 2))
    assert found["aurc"] == pytest.approx(naive_aurc(confidence, correct), abs=5e-3)
    assert found["eaurc"] >= -1e-12


def test_by_hand():
    found = confidence_metrics([0.9, 0.8, 0.3, 0.1], [1, 0, 1, 0])
    assert found["auroc"] == 0.75 and found["accuracy"] == 0.5 and found["accuracy@50"] == 0.5
    assert found["aurc"] == pytest.approx(np.mean([0, 1 / 2, 1 / 3, 1 / 2]))
    # errors by rising confidence: 0.1 wrong (1/1), 0.3 right, 0.8 wrong (2/3)
    assert found["aupr"] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    perfect = confidence_metrics([1.0, 1.0, 0.0], [1, 1, 0])
    assert perfect["ece"] == perfect["brier"] == perfect["eaurc"] == 0 and perfect["auroc"] == 1


def test_one_class_one_answer_and_other_scales():
    right = confidence_metrics([0.2], [1])
    assert np.isnan(right["auroc"]) and np.isnan(right["aupr"]) and right["ece"] == pytest.approx(0.8)
    nats = confidence_metrics([12.0, 3.0], [1, 0])
    assert nats["auroc"] == 1 and np.isnan(nats["ece"]) and np.isnan(nats["brier"])


def test_ranking_metrics_ignore_monotone_maps_and_groups_are_separate():
    rng = np.random.default_rng(3)
    confidence, correct, groups = rng.random(60), rng.integers(0, 2, 60), np.repeat(["a", "b", "c"], 20)
    a, b = confidence_metrics(confidence, correct, groups), confidence_metrics(np.exp(5 * confidence), correct)
    assert all(a[key] == pytest.approx(b[key]) for key in ("auroc", "aupr", "aurc", "accuracy@80"))
    for g in "abc":
        assert a["groups"][g] == confidence_metrics(confidence[groups == g], correct[groups == g])


@pytest.mark.parametrize("confidence, correct", [([], []), ([0.1], [1, 0]), ([float("nan")], [1]), ([0.5], [0.5])])
def test_bad_lists_are_refused(confidence, correct):
    with pytest.raises(ValueError):
        confidence_metrics(confidence, correct)


def test_a_map_that_nothing_could_be_fitted_on_has_no_calibration_error():
    """Two questions of one half: no map from the other half, so every mapped confidence is nan, and so is its error."""
    ids = [name for name in map(str, range(20)) if metrics.first_half([name])[0]][:2]
    confidence, correct = np.array([0.5, 0.9]), np.array([0.0, 1.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        errors = baselines.free_maps(ids, confidence, correct)
    assert {*errors} == {"platt", "isotonic"} and all(map(math.isnan, errors.values()))
    row = tables.abstention([tables.Outcome(name, 0.9, True, 1) for name in ids], 0.1)
    assert "too few questions" in findings.abstention_finding(row, "m")


def test_against_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed; it checks auroc and aupr")
    rng = np.random.default_rng(0)
    confidence, correct = rng.random(300).round(2), rng.integers(0, 2, 300)
    found = confidence_metrics(confidence, correct)
    assert found["auroc"] == pytest.approx(sklearn.roc_auc_score(correct, confidence), abs=1e-9)
    assert found["aupr"] == pytest.approx(sklearn.average_precision_score(1 - correct, -confidence), abs=1e-9)


@pytest.mark.parametrize("edges", [False, True])
def test_against_torchmetrics(edges):
    calibration = pytest.importorskip("torchmetrics.functional.classification",
                                      reason="torchmetrics is not installed; it checks the calibration error")
    rng = np.random.default_rng(1)
    confidence = rng.integers(0, 2, 200).astype(float) if edges else rng.random(200)
    correct = rng.integers(0, 2, 200)
    theirs = calibration.binary_calibration_error(torch.tensor(confidence), torch.tensor(correct), n_bins=15, norm="l1")
    assert confidence_metrics(confidence, correct)["ece"] == pytest.approx(theirs.item(), abs=1e-6)
    theirs = calibration.binary_auroc(torch.tensor(confidence), torch.tensor(correct))
    assert confidence_metrics(confidence, correct)["auroc"] == pytest.approx(theirs.item(), abs=1e-6)


def test_headroom_counts_votes_and_hits():
    def answers(name, *texts):
        return [eval.Answer(name, "", "", f"so \\boxed{{{t}}}", t == "1", 0, 0, 0, 0, True) for t in texts]
    found = tables.headroom([*answers("a", "1", "1", "2", "3"), *answers("b", "2", "2", "1", "1"),
                                 *answers("c", "4", "5", "6", "7")])
    assert found == {"pass@1": 4 / 12, "majority@4": 1 / 3, "pass@4": 2 / 3}


def test_the_probe_at_t_0_is_the_clean_picture(base, clip):
    samples = list(data.load("synthetic", "test", 6))
    found = eval.probe(base, samples, clip, (0, 999), n=2, seed=1, max_new_tokens=40)
    plain = eval.answer(base, samples, [s.images for s in samples], 2, seed="1 0", max_new_tokens=40)
    assert found[0] == plain and found[999] != plain and len(found[999]) == 12


SMALL = ["--limit", "6", "--samples", "4", "--sizes", "2", "4", "--t", "999", "--probe_samples", "2", "--max_new_tokens", "40",
         "--expert_tokens", "40", "--batch_size", "3", "--corruptions", "fog"]


tables.ROUNDS = 50          # of the bootstrap


def evaluated(output):
    """One small run of the command, the Expert as the baseline, in a process of its own: its folder."""
    flags = [*SMALL, "--baseline", str(ROOT / "tiny" / "expert"), "--output", str(output)]
    code = f"import eval; from utils import tables; tables.ROUNDS = 50; eval.main({flags})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True,
                   env=ENVIRONMENT, capture_output=True)
    return output


@ahead
def measured(folder):
    return evaluated(folder / "whole")


@ahead
def cut_off(folder):
    """A run of which a kill has left a part, and again the same command."""
    shutil.copytree(FOUND["measured"].result(), folder / "cut")
    for kind in ("votes", "probe", "corruptions"):
        path = folder / "cut" / "base" / f"{kind}.jsonl"
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[:3]))
        path.with_name(f"{kind}.jsonl.rank0").write_text(lines[3] + lines[4][:40])
    (folder / "cut" / "tables.json").unlink()
    return evaluated(folder / "cut")


def stored(folder, name="base", kind="votes"):
    return [json.loads(line) for line in (folder / name / f"{kind}.jsonl").read_text().splitlines()]


def test_every_figure_follows_from_what_is_stored(measured):
    tables, rows = json.loads((measured / "tables.json").read_text()), stored(measured)
    right = [s["correct"] for row in rows for s in row["samples"][:4]]
    assert tables["methods"]["base"]["pass@1"]["accuracy"][0] == np.mean(right)
    assert tables["methods"]["base"]["greedy"]["accuracy"][0] == np.mean([row["greedy"]["correct"] for row in rows])
    probe = stored(measured, kind="probe")
    curve = {t: triple[0] for t, triple in tables["curves"]["base"]["key"]["correct"].items()}
    assert curve["0"] == np.mean([a["correct"] for row in probe for a in row["found"]["clean"]["0"]])
    assert curve["999"] == np.mean([a["correct"] for row in probe for a in row["found"]["key"]["999"]])
    views = [[a for row in probe for a in row["found"][view][t]] for view, t in (("clean", "0"), ("key", "999"))]
    c, right = ([a[field] for view in views for a in view] for field in ("confidence", "correct"))
    assert tables["headline"]["base, all"]["AUROC mixed, C"][0] == pytest.approx(metrics.auroc(np.array(c), np.array(right)))
    assert {"base, P(IK)", "expert, BICR"} <= tables["free readouts"].keys()
    foggy = stored(measured, kind="corruptions")
    assert foggy[0]["found"].keys() == {"clean", *(f"fog, {place}, {s}" for place in ("key", "all") for s in range(1, 6))}
    assert tables["severity"]["base, fog, all, 5"]["accuracy"] == np.mean([a["correct"] for row in foggy
                                                                           for a in row["found"]["fog, all, 5"]])
    assert tables["scaling"]["base"]["majority"]["4"][0] == tables["methods"]["base"]["majority@4"]["accuracy"][0]
    assert set(tables["difference"]) == set(tables["methods"]["base"]) and (measured / "probe.png").stat().st_size > 10_000


def test_recomputed_votes_are_those_of_the_controller(measured, base, clip):
    """A table row from stored votes equals the controller's own answer with the same modules."""
    settings = catts.Settings(samples=4, max_new_tokens=40, expert_tokens=40)
    expert = LocalExpert(VLM.load(ROOT / "tiny" / "expert"), 40)
    samples, rows = list(data.load("synthetic", "test", 6)), stored(measured)
    for name, modules in (("CA-TTS@4", settings.modules), ("+VR@4", "self_consistency,self_reflection"), ("+C@4", "self_check"),
                          ("weighted@4", "")):
        control = catts.Controller(base, expert, clip, dataclasses.replace(settings, modules=modules))
        for row, result in zip(rows, control.answer_all(samples)):
            (outcome,) = eval.outcomes(row, 4, settings)[name]
            assert outcome.correct == result.correct and outcome.confidence == pytest.approx(result.confidence, abs=1e-5)
            contrasted = result.ledger.parts.get("self_check", {}).get("tokens", 0)          # a contrasted token counts twice
            assert outcome.calls == result.ledger.expert_calls
            assert outcome.tokens == result.ledger.tokens + result.ledger.expert_tokens + contrasted


def test_the_calibrated_confidence_is_the_stored_map_of_c(measured, tmp_path):
    """The row "pass@1, c" ranks as C does, and its probabilities are those of the run's confidence.json; of the base, by the
    map as it was before it was made steeper."""
    rows, settings = stored(measured), catts.Settings(samples=4)
    (tmp_path / "confidence.json").write_text(json.dumps({"slope": 1.5, "intercept": -18., "steepness": 2., "judged": "topk"}))
    scales = dict(zip(("base", "run"), tables.stored_scales([ROOT / "tiny" / "base", tmp_path])))
    c = np.array([s["confidence"]["mean"] for row in rows for s in row["samples"][:4]])
    for name, slope, intercept in (("run", 1.5, -18), ("base", 0.75, -9)):
        found = eval.by_method(rows, settings.samples, settings, scales[name])
        ids, confidence, correct = tables.arrays(found[tables.CALIBRATED])
        assert (ids, list(correct)) == (tables.arrays(found["pass@1"])[0], list(tables.arrays(found["pass@1"])[2]))
        np.testing.assert_allclose(confidence, 1 / (1 + np.exp(-intercept - slope * c)), atol=1e-6)
    assert tables.stored_scales([ROOT / "tiny" / "base"]) == [None]


def test_a_module_whose_votes_are_gone_has_no_row(measured):
    row = stored(measured)[0]
    del row["by_n"]["4"]["votes"]["self_check"]
    with pytest.raises(InputError, match="votes of self_check .* gone"):
        eval.outcomes(row, 4, catts.Settings(samples=4))


DAMAGE = {"no votes of self_check for 4": lambda row: row["by_n"]["4"]["votes"].pop("self_check"),
          "no cost of self_reflection for 2": lambda row: row["by_n"]["2"]["parts"].pop("critic"),
          "other modules": lambda row: row["by_n"]["2"]["ran"].remove("self_check"),
          "no votes of voter for 2": lambda row: row["by_n"]["2"].update(
              notes=[], votes=row["by_n"]["2"]["votes"] | {"voter": []}),
          "11 samples, not 12": lambda row: row["samples"].pop(), "no 'greedy'": lambda row: row.pop("greedy"),
          "no '4'": lambda row: row["by_n"].pop("4")}


@pytest.mark.parametrize("said", DAMAGE)
def test_a_damaged_row_is_named_and_never_averaged_over(measured, said):
    rows = stored(measured)
    tables.check_rows(rows, [2, 4], 12, list(tables.LETTER))
    DAMAGE[said](rows[3])
    with pytest.raises(InputError, match=f"{rows[3]['id']}.*{said}.*remove its line"):
        tables.check_rows(rows, [2, 4], 12, list(tables.LETTER))
    everywhere = stored(measured)
    for row in everywhere:
        row["by_n"]["4"]["ran"].remove("voter")
    with pytest.raises(InputError, match="other modules than voter"):
        tables.check_rows(everywhere, [2, 4], 12, list(tables.LETTER))


def test_stored_votes_of_other_weights_or_another_file_are_refused(measured, tmp_path):
    """Same paths, other content: what is stored is not what the command would measure."""
    shutil.copytree(ROOT / "tiny" / "base", tmp_path / "base")
    (tmp_path / "q.jsonl").write_text(json.dumps({"id": "a", "image": str(ROOT / "tiny" / "example.png"), "question": "Red?",
                                                  "answer": "1"}))
    argv = ["--samples", "2", "--t", "999", "--regions", "key", "--probe_samples", "1", "--max_new_tokens", "8", "--allow_outside",
            "--expert_tokens", "8", "--data", str(tmp_path / "q.jsonl"), "--model", str(tmp_path / "base"),
            "--output", str(tmp_path / "out")]
    eval.main(argv)
    eval.main(argv)
    (tmp_path / "q.jsonl").write_text((tmp_path / "q.jsonl").read_text().replace("Red?", "Blue?"))
    with pytest.raises(InputError, match="other settings .data."):
        eval.main(argv)
    (tmp_path / "q.jsonl").write_text((tmp_path / "q.jsonl").read_text().replace("Blue?", "Red?"))
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(InputError, match="other settings .model."):
        eval.main(argv)


def test_a_threshold_belongs_to_the_settings_it_was_fitted_under(measured):
    file = str(measured / "threshold.json")
    fitted = catts.Settings(samples=4, max_new_tokens=40, expert_tokens=40, abstain=file)
    assert results_file.read_threshold(fitted) is not None
    with pytest.raises(InputError, match="fitted with samples 4, this run has samples 8"):
        results_file.read_threshold(dataclasses.replace(fitted, samples=8))
    with pytest.raises(InputError, match="fitted with model .*, this run has model expert"):
        catts.run([str(ROOT / "tiny" / "example.png"), "Red?", "--samples", "4", "--max_new_tokens", "40", "--expert_tokens",
                   "40", "--abstain", file, "--model", str(ROOT / "tiny" / "expert")])


def test_a_run_that_was_cut_off_ends_in_the_same_tables(measured, cut_off):
    whole, again = ([float(x) for x in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", (folder / "tables.json").read_text())]
                    for folder in (measured, cut_off))
    assert whole == pytest.approx(again, abs=1e-5)


def test_the_page_is_self_contained(measured):
    page = (measured / "report.html").read_text()
    assert page.count("<svg") >= 9 and 0 < 2 * page.count('class="case"') == page.count("data:image/png;base64,")
    assert not re.search(r'(?:src|href)=(?!"data:)|@import|url\(|<script', page) and "prefers-color-scheme:dark" in page
    html.parser.HTMLParser().feed(page)
    assert "<script>alert" not in report.page("<script>alert(1)</script>", "", [])


def test_bad_arguments(tmp_path):
    for bad in (["--mass", "0"], ["--data", "no.jsonl"], ["--model", str(tmp_path / "none")], ["--t", "2000"], ["--limit", "0"],
                ["--early_exit", "exact"], ["--target_risk", "2"], ["--sizes", "0"]):
        with pytest.raises(InputError):
            eval.main([*SMALL, "--output", str(tmp_path), *bad])


def test_broken_rows_are_named_and_left_out(tmp_path, capsys):
    from PIL import Image
    Image.new("RGB", (60, 60)).save(tmp_path / "a.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    rows = [{"id": f"q{i}", "image": "bad.png" if i == 1 else "a.png", "question": "" if i == 2 else "What is it?",
             "answer": "1"} for i in range(4)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = [*SMALL, "--data", str(tmp_path / "q.jsonl"), "--output", str(tmp_path / "out")]
    eval.main(argv)
    assert [row["id"] for row in stored(tmp_path / "out")] == ["q0", "q3"]
    said = capsys.readouterr().err
    assert "q1" in said and "'q2' is empty" in said
    with pytest.raises(InputError, match="2 broken rows, each .* named above"):
        eval.main([*argv, "--strict"])
    assert "question 'q1': image" in (said := capsys.readouterr().err) and "'q2' is empty" in said


# ---- Intervals, maps, thresholds

def test_bootstrap_resamples_whole_questions():
    """Eight copies of each answer: the interval is that of the questions, not of eight times as many answers."""
    rng = np.random.default_rng(0)
    correct = rng.integers(0, 2, 60).astype(float)
    ids = [f"q{i}" for i in range(60)]
    def mean(_, right):
        return {"accuracy": right.mean()}
    one = metrics.bootstrap(ids, correct, correct, mean, 2000)["accuracy"]
    many = metrics.bootstrap(*(np.repeat(x, 8) for x in (ids, correct, correct)), mean, 2000)["accuracy"]
    assert np.allclose(one, many)
    assert one.std() == pytest.approx((correct.var() / 60) ** 0.5, rel=0.1)
    low, high = metrics.interval(one)
    assert low < correct.mean() < high
    assert metrics.mean_interval(ids, correct, 2000) == pytest.approx((correct.mean(), low, high))
    assert metrics.mean_interval(np.repeat(ids, 8), np.repeat(correct, 8), 2000) == pytest.approx((correct.mean(), low, high))


def test_paired_differences_cancel_what_is_shared():
    rng = np.random.default_rng(1)
    base = rng.random(200) < 0.5
    first = [tables.Outcome(f"q{i}", 0.5, bool(c), 1) for i, c in enumerate(base)]
    second = [tables.Outcome(f"q{i}", 0.5, bool(c) or i % 20 == 0, 1) for i, c in enumerate(base)]
    found = tables.paired(first, second, [tables.resampled(first), tables.resampled(second)])["accuracy"]
    assert found[0] == pytest.approx(np.mean([o.correct for o in second]) - base.mean()) and 0 < found[1] < found[2] < 0.08


def test_isotonic_and_platt_maps():
    rng = np.random.default_rng(2)
    confidence = rng.random(4000)
    correct = (rng.random(4000) < confidence**2).astype(float)
    ids = [f"q{i}" for i in range(4000)]
    assert metrics.calibration_error(confidence, correct) > 0.1
    for kind, bound in (("isotonic", 0.04), ("platt", 0.06)):
        assert metrics.calibration_error(metrics.cross_fitted(ids, confidence, correct, kind), correct) < bound
    fitted = metrics.fit_isotonic(np.array([1.0, 2, 3, 4]), np.array([0.0, 1, 0, 1]))
    assert fitted(np.array([0.0, 1, 2, 3, 4, 9])).tolist() == [0, 0, 0.5, 0.5, 1, 1]
    isotonic = pytest.importorskip("sklearn.isotonic")
    theirs = isotonic.IsotonicRegression(out_of_bounds="clip").fit(confidence, correct).predict(confidence)
    assert np.allclose(metrics.fit_isotonic(confidence, correct)(confidence), theirs, atol=1e-6)


def test_threshold_and_slope_by_hand():
    confidence, correct = np.array([0.9, 0.8, 0.7, 0.6, 0.5]), np.array([1.0, 1, 0, 1, 0])
    assert metrics.threshold_for(confidence, correct, 0.25) == (0.6, 0.8, 0.25)
    assert metrics.threshold_for(confidence, correct, 0.1) == (0.8, 0.4, 0.0)
    assert metrics.threshold_for(confidence, 0 * correct, 0.1)[:2] == (math.inf, 0.0)
    sizes = np.array([1, 2, 4, 8])
    assert tables.slope(0.5 + 0.03 * np.log2(sizes), sizes) == pytest.approx(0.03)


def test_equal_cost_interpolates_between_measured_sizes():
    def some(tokens, *right):
        return [tables.Outcome(f"q{i}", 0.5, bool(r), tokens) for i, r in enumerate(right)]
    by_n = {8: {"majority@8": some(100, 1, 1, 0, 0), "CA-TTS@8": some(200, 1, 1, 1, 0)},
            16: {"majority@16": some(400, 1, 0, 1, 1)}}
    row = tables.against_majority(by_n, 8)["CA-TTS@8"]
    assert row["majority, same tokens"] == pytest.approx((0.5 + 0.75) / 2) and row["minus it"][0] == pytest.approx(0.125)
    assert row["minus majority, same N"][0] == 0.25 and row["minus majority, same N"][1] == 0
    for tokens, expected in ((100, 0.5), (400, 0.75), (900, math.nan)):
        by_n[8]["CA-TTS@8"] = some(tokens, 1, 1, 1, 0)
        found = tables.against_majority(by_n, 8)["CA-TTS@8"]
        assert found["majority, same tokens"] == pytest.approx(expected, nan_ok=True)


def test_intervals_of_the_probe_hold_its_values(monkeypatch):
    monkeypatch.setattr(tables, "ROUNDS", 1000)
    rng = np.random.default_rng(0)
    clean, noised = ([eval.Answer(f"q{i // 4}", "a" if i < 80 else "b", "", "", bool(rng.random() < p), rng.normal(p), p, p, 9,
                                   True) for i in range(160)] for p in (0.8, 0.3))
    plain, rows = tables.within_skills(clean, noised), tables.within_skills(clean, noised, None, tables.summary_intervals)
    for part in ("all", "a", "b"):
        assert {name: triple[0] for name, triple in rows[part].items()} == pytest.approx(plain[part])
        assert all(low <= value <= high for value, low, high in map(rows[part].get, ("pass@1", "gap", "C", "AUROC")))
    means = np.array([[a.confidence for a in view] for view in (clean, noised)]).reshape(2, 40, 4).mean(-1)
    spread = (means[0] - means[1]).std() / 40**0.5
    assert (rows["all"]["gap"][2] - rows["all"]["gap"][1]) / 3.92 == pytest.approx(spread, rel=0.15)


def test_charts_hold_every_point():
    drawn = report.chart({"a": [(1, 0.5), (2, float("nan")), (4, 0.25, 0.2, 0.3)]}, "T & U", "x", "y", log=True)
    assert drawn.count("<circle") == 2 and "T &amp; U" in drawn and report.chart({"a": []}, "t", "x", "y") == ""
    assert report.ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1] and report.ticks(12.1, 13.4)[0] <= 12.1
    assert "&ndash;" in report.table({"r": {"a": float("nan"), "b": (0.5, 0.4, 0.6)}})
