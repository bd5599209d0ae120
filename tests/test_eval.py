import json

import numpy as np
import pytest

import data
import eval as evaluation
from data import InputError
from eval import metrics


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
    found = metrics(confidence, correct)
    assert found["auroc"] == pytest.approx(naive_auroc(confidence, correct))
    assert found["ece"] == pytest.approx(naive_ece(confidence, correct))
    assert found["brier"] == pytest.approx(np.mean((confidence - correct) ** 2))
    assert found["aurc"] == pytest.approx(naive_aurc(confidence, correct), abs=5e-3)
    assert found["eaurc"] >= -1e-12


def test_by_hand():
    found = metrics([0.9, 0.8, 0.3, 0.1], [1, 0, 1, 0])
    assert found["auroc"] == 0.75 and found["accuracy"] == 0.5 and found["accuracy@50"] == 0.5
    assert found["aurc"] == pytest.approx(np.mean([0, 1 / 2, 1 / 3, 1 / 2]))
    # errors by rising confidence: 0.1 wrong (1/1), 0.3 right, 0.8 wrong (2/3)
    assert found["aupr"] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    perfect = metrics([1.0, 1.0, 0.0], [1, 1, 0])
    assert perfect["ece"] == perfect["brier"] == perfect["eaurc"] == 0 and perfect["auroc"] == 1


def test_one_class_one_answer_and_other_scales():
    right = metrics([0.2], [1])
    assert np.isnan(right["auroc"]) and np.isnan(right["aupr"]) and right["ece"] == pytest.approx(0.8)
    nats = metrics([12.0, 3.0], [1, 0])
    assert nats["auroc"] == 1 and np.isnan(nats["ece"]) and np.isnan(nats["brier"])


def test_ranking_metrics_ignore_monotone_maps_and_groups_are_separate():
    rng = np.random.default_rng(3)
    confidence, correct, groups = rng.random(60), rng.integers(0, 2, 60), np.repeat(["a", "b", "c"], 20)
    a, b = metrics(confidence, correct, groups), metrics(np.exp(5 * confidence), correct)
    assert all(a[key] == pytest.approx(b[key]) for key in ("auroc", "aupr", "aurc", "accuracy@80"))
    for g in "abc":
        assert a["groups"][g] == metrics(confidence[groups == g], correct[groups == g])


@pytest.mark.parametrize("confidence, correct", [([], []), ([0.1], [1, 0]), ([float("nan")], [1]), ([0.5], [0.5])])
def test_bad_lists_are_refused(confidence, correct):
    with pytest.raises(ValueError):
        metrics(confidence, correct)


def test_against_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed; it checks auroc and aupr")
    rng = np.random.default_rng(0)
    confidence, correct = rng.random(300).round(2), rng.integers(0, 2, 300)
    found = metrics(confidence, correct)
    assert found["auroc"] == pytest.approx(sklearn.roc_auc_score(correct, confidence), abs=1e-9)
    assert found["aupr"] == pytest.approx(sklearn.average_precision_score(1 - correct, -confidence), abs=1e-9)


def test_headroom_counts_votes_and_hits():
    def answers(name, *texts):
        return [evaluation.Answer(name, "", "", f"so \\boxed{{{t}}}", t == "1", 0, 0, 0, 0, True) for t in texts]
    found = evaluation.headroom([*answers("a", "1", "1", "2", "3"), *answers("b", "2", "2", "1", "1"),
                                 *answers("c", "4", "5", "6", "7")])
    assert found == {"pass@1": 4 / 12, "majority@4": 1 / 3, "pass@4": 2 / 3}


def test_the_probe_at_t_0_is_the_clean_picture(base, clip):
    samples = list(data.load("synthetic", "test", 6))
    found = evaluation.probe(base, samples, clip, (0, 999), n=2, seed=1, max_new_tokens=40)
    plain = evaluation.answer(base, samples, [s.images for s in samples], 2, seed="1 0", max_new_tokens=40)
    assert found[0] == plain and found[999] != plain and len(found[999]) == 12


def test_command_writes_figures_that_follow_from_its_answers(tmp_path, capsys):
    argv = ["--limit", "6", "--samples", "2", "--t", "999", "--max_new_tokens", "40", "--output", str(tmp_path)]
    evaluation.main(argv)
    record = json.loads((tmp_path / "probe.json").read_text())
    (path, by_t), = record["answers"].items()
    assert record["summary"][f"{path}, all"]["pass@1"] == np.mean([a["correct"] for a in by_t["0"]])
    assert (tmp_path / "probe.png").stat().st_size > 10_000 and "next: python eval.py" in capsys.readouterr().out
    for bad in (["--mass", "0"], ["--data", "no.jsonl"], ["--model", str(tmp_path / "none")], ["--t", "2000"],
                ["--limit", "0"]):
        with pytest.raises(InputError):
            evaluation.main([*argv, *bad])
