"""What the pictures of a training run say."""
import json

import pytest

from eval import Answer
from train_cdrl import parse
from utils import report


def answers(confidence, right):
    """20 questions, of which the first `right` are answered rightly, with more confidence."""
    return [Answer(f"q{i}", "count", "1", "text", i < right, confidence + (i < right), 0.9, 0.9, 5, True)
            for i in range(20)]


def run_folder(tmp_path, steps):
    row = {"gap": 0.3, "gap/controls": 0.1, **{f"original/{term}": 0.5 for term in (
        "outcome", "format", "calibration", "perception")}}
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps({"step": step, **row}) for step in range(steps)))
    return tmp_path


@pytest.mark.parametrize("after, says", [(2.0, "it now says so"), (0.3, "still does not say so"), (-1.0, "still does not say so")])
def test_the_title_under_noise_follows_the_gap(after, says):
    assert says in report.gap_title(0.3, after) and f"{after:.2f}" in report.gap_title(0.3, after)


def test_the_title_of_reliability_follows_the_error():
    assert "is nearer" in report.reliability_title({"before": 0.2, "after": 0.05})
    assert "no nearer" in report.reliability_title({"before": 0.05, "after": 0.2})


@pytest.mark.parametrize("steps, short", [(3, True), (150, False)])
def test_the_picture_is_written_and_a_short_run_is_marked(tmp_path, monkeypatch, steps, short):
    from matplotlib.figure import Figure
    titles = []
    draw = Figure.suptitle
    monkeypatch.setattr(Figure, "suptitle", lambda self, text, **how: titles.append(text) or draw(self, text, **how))
    before, after = {0: answers(11, 10), 999: answers(11, 3)}, {0: answers(12, 12), 999: answers(9, 3)}
    report.draw_report(run_folder(tmp_path, steps), before, after, {"slope": 1.0, "intercept": -12.0}, parse([]), 999)
    assert (tmp_path / "report.png").stat().st_size > 10_000
    assert ("A SHORT RUN" in titles[0]) == short
