"""Pictures and pages: report.png of a training run, report.html of an evaluation."""
import base64
import html
import io
import math

import numpy as np

from utils import cli
from utils.baselines import by_figure
from utils.logs import smoothed, training_log
from utils.metrics import (
    MIN_QUESTIONS,
    auroc,
    calibrated,
    calibration_error,
    reliability_points,
    risk_coverage,
)
from utils.tables import COSTS, HEADLINE, before_after, within_skills


def draw_probe(path, named):
    """probe.png: accuracy, token probability and C against noise. named: {label: {t: list of Answer}}."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4))
    for axis, field, ylabel in zip(axes, ("correct", "token_probability", "confidence"),
                                   ("accuracy", "mean token probability", "confidence C")):
        plot_probe(axis, named, field, ylabel)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def plot_probe(axis, named, field, ylabel):
    """A field of the answers against the noise step. named: {label: {t: list of Answer}}."""
    for label, by_t in named.items():
        axis.plot(list(by_t), [np.mean([getattr(a, field) for a in answers]) for answers in by_t.values()],
                  marker="o", markersize=4, label=label)
    axis.set(xlabel="noise step t", ylabel=ylabel)
    if field != "confidence":
        axis.set_ylim(0, 1)         # accuracy and probability on one scale: what falls, and what does not
    axis.legend(fontsize=8)


COLORS = ("--a", "--b", "--c", "--d", "--e", "--f")
STYLE = """
:root{--bg:#fff;--fg:#1d2330;--soft:#6b7280;--line:#d7dbe2;--card:#f6f7f9;--good:#137a4b;--bad:#b3261e;
--a:#2563eb;--b:#d9480f;--c:#0f9d58;--d:#9333ea;--e:#b8860b;--f:#64748b}
@media(prefers-color-scheme:dark){:root{--bg:#14171d;--fg:#e6e9ef;--soft:#9aa3b2;--line:#343b48;
--card:#1c212a;--good:#5bd08f;--bad:#ff8a80;--a:#6ea8ff;--b:#ff9a5c;--c:#58d68d;--d:#c792ea;--e:#e6c35c;
--f:#a3b0c2}}
body{background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,sans-serif;max-width:1120px;
margin:2rem auto;padding:0 1rem;overflow-wrap:break-word}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.2rem;border-bottom:1px solid var(--line)}
p,figcaption{color:var(--soft)}.finding{color:var(--fg);font-size:1.1rem;margin:.5rem 0}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:13px}
td,th{padding:.25rem .5rem;text-align:right;border-bottom:1px solid var(--line);vertical-align:top}
td{white-space:nowrap}th{color:var(--soft);font-weight:600;max-width:6.5rem}
td:first-child{white-space:normal;min-width:8rem;max-width:17rem}
td:first-child,th:first-child{text-align:left}td small{display:block;font-size:10.5px;color:var(--soft)}
.row{display:flex;flex-wrap:wrap;gap:1rem;align-items:flex-start}
figure{margin:0;flex:0 1 352px;min-width:300px}figcaption{font-size:13px}.l{white-space:nowrap}
svg{width:100%;height:auto}svg text{fill:var(--soft);font:11px system-ui,sans-serif}
svg .t{fill:var(--fg);font-size:12px}
.case{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.8rem;margin:.8rem 0;
display:flex;gap:1rem;flex-wrap:wrap;align-items:flex-start}
.case img{width:150px;height:auto;border-radius:4px}.case>div{flex:1 1 300px;min-width:0}
.case ul{margin:.3rem 0;padding-left:1.1rem;font-size:13px}.yes{color:var(--good)}.no{color:var(--bad)}
code{font-size:12px;white-space:pre-wrap}
"""


def ticks(low, high, count=4):
    """Round numbers that cover [low, high] -> list of floats."""
    step = 10 ** math.floor(math.log10(max(high - low, 1e-9) / count))
    step *= min((m for m in (1, 2, 2.5, 5, 10) if (high - low) / (m * step) <= count), default=10)
    first = math.floor(low / step + 1e-9)
    return [round(step * i, 10) for i in range(first, math.ceil(high / step - 1e-9) + 1)]


def chart(series, title, xlabel, ylabel, log=False, diagonal=False, caption="", xlim=None, ylim=None):
    """Lines with points. series: {label: [(x, y) or (x, y, low, high), ...]} -> HTML figure; nan points are left out."""
    series = {label: [p for p in points if all(math.isfinite(v) for v in p)] for label, points in series.items()}
    series = {label: points for label, points in series.items() if points}
    if not series:
        return ""
    xs = [p[0] for points in series.values() for p in points]
    ys = [v for points in series.values() for p in points for v in p[1:]]
    xticks = sorted(set(xs)) if log else ticks(*(xlim or (min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1)))
    yticks = ticks(*(ylim or (min(ys), max(ys) if max(ys) > min(ys) else min(ys) + 1)))
    left, top, width, height = 54, 26, 300, 190

    def x_of(x):
        low, high = (math.log(xticks[0]), math.log(xticks[-1])) if log else (xticks[0], xticks[-1])
        return left + width * ((math.log(x) if log else x) - low) / max(high - low, 1e-9)

    def y_of(y):
        return top + height * (1 - (y - yticks[0]) / (yticks[-1] - yticks[0]))

    elements = [f'<text class="t" x="{left}" y="14">{html.escape(title)}</text>']
    for y in yticks:
        elements.append(f'<line x1="{left}" x2="{left + width}" y1="{y_of(y):.1f}" y2="{y_of(y):.1f}" stroke="var(--line)"/>'
                     f'<text x="{left - 6}" y="{y_of(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in xticks:
        elements.append(f'<text x="{x_of(x):.1f}" y="{top + height + 16}" text-anchor="middle">{x:g}</text>')
    elements.append(f'<text x="{left + width / 2}" y="{top + height + 32}" text-anchor="middle">{html.escape(xlabel)}</text>'
                 f'<text transform="translate(11 {top + height / 2}) rotate(-90)" text-anchor="middle">'
                 f"{html.escape(ylabel)}</text>")
    if diagonal:
        low, high = max(xticks[0], yticks[0]), min(xticks[-1], yticks[-1])
        elements.append(f'<line x1="{x_of(low):.1f}" y1="{y_of(low):.1f}" x2="{x_of(high):.1f}" y2="{y_of(high):.1f}" '
                     'stroke="var(--soft)" stroke-dasharray="4 4"/>')
    legend = []
    for (label, points), color in zip(series.items(), COLORS * 3):
        path = " ".join(f"{x_of(p[0]):.1f},{y_of(p[1]):.1f}" for p in points)
        elements.append(f'<polyline points="{path}" fill="none" stroke="var({color})" stroke-width="1.8"/>')
        for p in points:
            if len(p) == 4:
                elements.append(f'<line x1="{x_of(p[0]):.1f}" x2="{x_of(p[0]):.1f}" y1="{y_of(p[2]):.1f}" y2="{y_of(p[3]):.1f}" '
                             f'stroke="var({color})" stroke-opacity=".45"/>')
            elements.append(f'<circle cx="{x_of(p[0]):.1f}" cy="{y_of(p[1]):.1f}" r="2.6" fill="var({color})">'
                         f"<title>{html.escape(label)}: {p[0]:g}, {p[1]:.3f}</title></circle>")
        legend.append(f'<span class="l"><span style="color:var({color})">&#9679;</span> {html.escape(label)}</span>')
    return (f'<figure><svg viewBox="0 0 {left + width + 20} {top + height + 38}" role="img" '
            f'aria-label="{html.escape(title)}">{"".join(elements)}</svg><figcaption>{" &nbsp; ".join(legend)}'
            f"{'<br>' + html.escape(caption) if caption else ''}</figcaption></figure>")


SIGNED = {"over"}               # columns whose numbers are printed with their sign


def columns_in_order(rows):
    """The columns of all rows, each behind the one that it follows in its own row, numbers rising."""
    columns = []
    for row in rows:
        position = 0
        for column in row:
            if column not in columns:
                columns.insert(position, column)
            position = columns.index(column) + 1
    sizes = sorted((column for column in columns if column.isdigit()), key=int)
    return [sizes.pop(0) if column.isdigit() else column for column in columns]


def table(rows, intervals=True):
    """{row name: {column: number, text or (value, low, high)}} -> HTML table, an interval under its value.

    intervals: False where there are too few questions for them. Numbers that nobody measured are dashes.
    """
    def number(value, column):
        if not math.isfinite(value):
            return "&ndash;"
        return f"{value:+.3f}" if column in SIGNED else f"{value:.3f}"

    def cell(value, column):
        if isinstance(value, (tuple, list)):
            known = intervals and all(map(math.isfinite, value))
            ends = f"<small>{value[1]:.3f} to {value[2]:.3f}</small>" if known else ""
            return number(value[0], column) + ends
        return number(value, column) if isinstance(value, float) else html.escape(str(value))
    columns = columns_in_order(rows.values())
    head = "".join(f"<th>{html.escape(str(column))}</th>" for column in ["", *columns])
    body = "".join(f"<tr><td>{html.escape(name)}</td>"
                   f"{''.join(f'<td>{cell(row.get(c, math.nan), c)}</td>' for c in columns)}</tr>"
                   for name, row in rows.items())
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def picture(image, width=300):
    """A PIL image as an <img> with its data inside."""
    image = image.convert("RGB")
    if image.width > width:
        image = image.resize((width, max(1, round(image.height * width / image.width))))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def case(images, question, gold, samples, votes, method, verdict, right):
    """One question: its picture, its noised twin, what was sampled, who voted for what, the verdict."""
    def mark(ok):
        return '<span class="yes">right</span>' if ok else '<span class="no">wrong</span>'
    answers = "".join(f"<li><code>{html.escape(text[:160])}</code> {mark(ok)}, p {p:.2f}</li>"
                      for text, p, ok in samples)
    return (f'<div class="case">{"".join(map(picture, images))}<div><b>{html.escape(question[:600])}</b><br>'
            f"gold {html.escape(str(gold))}; {html.escape(method)} says {html.escape(verdict)} &mdash; "
            f"{mark(right)}<ul>{answers}</ul>{table(votes)}</div></div>")


def points_of(heading, tables):
    """The charts of "reliability" or "risk and coverage", one a method."""
    xlabel, ylabel = {"reliability": ("confidence", "accuracy")}.get(heading, ("coverage", "risk"))
    return [chart(by_model, method, xlabel, ylabel, diagonal=heading == "reliability", xlim=(0, 1),
                  ylim=(0, 1)) for method, by_model in tables[heading].items()]


def probe_charts(curves):
    """Accuracy, token probability and C against the noise step, a line a model and region."""
    fields = {"correct": "accuracy", "token_probability": "mean token probability",
              "confidence": "confidence C"}
    lines = [(f"{name}, {region}", fields) for name, regions in curves.items()
             for region, fields in regions.items()]
    return [chart({label: [(float(t), *triple) for t, triple in values[field].items()]
                   for label, values in lines}, title, "noise step t", title,
                  ylim=None if field == "confidence" else (0, 1)) for field, title in fields.items()]


def scaling_charts(scaling):
    """Accuracy against N and against tokens, for each model."""
    charts = []
    for name, rows in scaling.items():
        lines = {method: [(size, cost, rows[method][size]) for size, cost in rows[method]["tokens"].items()]
                 for method in ("majority", "weighted", "CA-TTS") if method in rows}
        charts += [chart({method: [(int(size), *triple) for size, _, triple in points]
                          for method, points in lines.items()}, f"{name}: accuracy against N", "samples N",
                         "accuracy", log=True),
                   chart({method: sorted((cost, triple[0]) for _, cost, triple in points)
                          for method, points in lines.items()}, f"{name}: accuracy against cost",
                         "tokens a question", "accuracy")]
    return charts


def training_charts(logs):
    """The terms of the reward over steps. logs: {model name: lines of its run's metrics.jsonl}."""
    terms = ("reward", "perception", "calibration", "outcome", "format")
    return [chart({term: smoothed([(row["step"], row[f"{view}/{term}"]) for row in steps]) for term in terms},
                  f"{name}: {view} view", "step", "mean reward")
            for name, steps in logs.items() for view in ("original", "noised")
            if steps and f"{view}/reward" in steps[0]]


def headline(tables):
    """The page in a few numbers: accuracy by method, how well one answer's confidence ranks and is
    calibrated, the gap."""
    rows = {}
    for name, methods in tables.get("methods", {}).items():
        one = methods.get("pass@1, c", methods["pass@1"])
        best = {method: row["accuracy"] for method, row in methods.items()
                if method.startswith(("majority", "CA-TTS"))}
        rows[name] = {"pass@1": methods["pass@1"]["accuracy"], **best, "over": one["over"],
                      "AUROC, one answer": one["auroc"], "ECE, one answer": one["ece"], "cut": one["cut"]}
        for region in ("key", "random"):
            if row := tables.get("probe", {}).get(f"{name}, {region}, all"):
                rows[name][f"C - C', {region}"] = row["gap"]
    return rows


PROBE = ("pass@1", "pass@1 noised", "C", "gap", "AUROC", "ECE", "Brier", "ECE c", "cut")


def build(tables, cases, logs, lead):
    """report.html (str): the answer in words and the pictures first, the tables below.

    tables: what `vote_tables` and `probe_tables` return, "severity" too; cases: arguments of `case`; logs:
    {model name: lines of its run's metrics.jsonl}; lead: the sentence under the title.
    """
    intervals = min(tables.get("questions", {"": 0}).values()) >= MIN_QUESTIONS
    sections, methods = [], tables.get("methods", {})

    def add(heading, note, *content, present=True):
        if present:
            sections.append((heading, note, content))

    def rows_of(rows):
        return table(rows, intervals)

    sentences = [f"{name}: {text}" for name, text in tables.get("findings", {}).items()]
    sentences += tables.get("notes", [])
    add("In short", "", *(f'<p class="finding">{html.escape(text)}</p>' for text in sentences))
    add("The probe: does confidence follow perception?", "Noise on the region where the evidence lies, and on "
        "controls of the same area.", row(probe_charts(tables.get("curves", {}))), present="probe" in tables)
    if methods:
        add("Reliability", "Bins of equal mass; below the diagonal it is overconfident.",
            row(points_of("reliability", tables)))
        add("Risk and coverage", "The share of wrong answers among the most confident ones.",
            row(points_of("risk and coverage", tables)))
        add("Scaling", "Accuracy against the number of samples, and against tokens.",
            row(scaling_charts(tables["scaling"])), present=any(tables["scaling"].values()))
    add("Training", "Each term of the reward, by view.", row(training_charts(logs)),
        present=bool(training_charts(logs)))
    add("Cases", "Picture, noised twin, samples, votes, verdict: where the votes mend the majority, where they "
        "spoil it, where both fail, and where both are right.", *(case(**one) for one in cases),
        present=bool(cases))
    add("In numbers", "over: mean confidence minus accuracy of one answer; cut: answers that met the limit of "
        "tokens; C - C': how far confidence falls when the evidence, or as large a part elsewhere, is noised.",
        rows_of(headline(tables)), present=bool(methods))
    for name, rows in methods.items():
        main = {method: {key: row[key] for key in (*HEADLINE, *COSTS)}
                for method, row in rows.items()}
        further = {method: {key: value for key, value in row.items() if key not in main[method]}
                   for method, row in rows.items()}
        add(f"Methods: {name}", "Value and 95% interval, clustered by question. over: mean confidence minus "
            "accuracy. Tokens: generated, a contrasted one counting twice, the Expert's included.",
            rows_of(main), f"<details><summary>Further metrics</summary>{rows_of(further)}</details>")
        add(f"Against majority voting: {name}", "At the same N, and at the same tokens: majority's accuracy "
            "between the two measured N whose cost is nearest.", rows_of(tables["against majority"][name]))
    if "difference" in tables:
        add(f"Difference: {' minus '.join(reversed(list(methods)))}", "Paired by question.",
            rows_of(tables["difference"]))
    if methods:
        add("Calibration", "As it is, and after a map fitted on the other half of the questions.",
            rows_of(_flat(tables["calibration"])))
        slopes = {name: {key: value for key, value in row.items() if key != "tokens"}
                  for name, row in _flat(tables["scaling"]).items()}
        add("Scaling", "Slope: points of accuracy per log2 N.", rows_of(slopes), present=bool(slopes))
        add("Abstention", "A threshold fitted on half of the questions, tried on the other half. risk: errors "
            "among the answered.", rows_of(tables["abstention"]))
        add("Within subsets", "Pooled numbers lie.", rows_of(tables["within"]))
    if "probe" in tables:
        main, further = ({name: {key: value for key, value in row.items() if (key in PROBE) == shown}
                          for name, row in tables["probe"].items()} for shown in (True, False))
        add("The probe", "Clean pictures, and the noisiest step.", rows_of(main),
            f"<details><summary>Further columns</summary>{rows_of(further)}</details>")
        add("Does confidence say when the evidence is gone?", "Mixed: over the answers to clean and to noised "
            "pictures together. Platt, isotonic: after a map fitted on the other half of the questions. Below, "
            "readouts of the hidden state, fitted on the other half as well.",
            rows_of(by_figure(tables["headline"])), rows_of(tables["free readouts"]))
    add("Severity", "Corruptions on the key region and on the whole picture, five severities each.",
        rows_of(tables.get("severity", {})), present="severity" in tables)
    return page("Does it know when it does not know?", lead, sections)


def _flat(by_model):
    """{model: {method: row}} -> {"model, method": row}."""
    return {f"{name}, {method}": row for name, rows in by_model.items() for method, row in rows.items()}


def row(charts):
    """Charts side by side, as many as fit."""
    return f'<div class="row">{"".join(charts)}</div>' if charts else ""


def page(title, lead, sections):
    """sections: [(heading, note, [HTML, ...]), ...] -> the whole page (str)."""
    body = "".join(f"<h2>{html.escape(heading)}</h2><p>{html.escape(note)}</p>{''.join(content)}"
                   for heading, note, content in sections)
    return (f'<!doctype html><html lang="en"><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width">'
            f'<meta name="color-scheme" content="light dark"><title>{html.escape(title)}</title>'
            f"<style>{STYLE}</style><h1>{html.escape(title)}</h1><p>{html.escape(lead)}</p>{body}</html>")


SHORT_RUN = 100                 # steps; a figure of a shorter run says so


def draw_report(output, before, after, confidence_map, args, t):
    """report.png of a training run: what it did to accuracy and confidence. Each title says the finding in words.

    before, after: {noise step: list of Answer} on held-out questions. confidence_map: from C to c. t: the noise step
    of training.
    """
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    log = training_log(output)
    models = {"before": before, "after": after}
    c = {when: calibrated([a.confidence for a in answers[0]], confidence_map) for when, answers in models.items()}
    correct = {when: np.array([a.correct for a in answers[0]], float) for when, answers in models.items()}
    figure, axes = pyplot.subplots(2, 3, figsize=(15, 8.6))
    draw_reliability(axes[0, 0], c, correct)
    draw_risk(axes[0, 1], c, correct)
    draw_gap(axes[0, 2], models, log, t)
    for axis, field, ylabel in ((axes[1, 0], "correct", "accuracy"), (axes[1, 1], "confidence", "confidence C")):
        plot_probe(axis, models, field, ylabel)
    axes[1, 0].set_title(f"held-out accuracy {correct['before'].mean():.2f} before, {correct['after'].mean():.2f} after")
    axes[1, 1].set_title("confidence against the noise step")
    draw_rewards(axes[1, 2], log)
    short = f", A SHORT RUN OF {len(log)} STEPS" if len(log) < SHORT_RUN else f", {len(log)} steps"
    figure.suptitle(f"recipe {args.recipe}{short}; noise on the {args.region} region of held-out questions")
    figure.tight_layout()
    figure.savefig(output / "report.png", dpi=110)
    pyplot.close(figure)


def draw_reliability(axis, c, correct):
    """Reliability of c before and after. c, correct: {when: (N,)}."""
    axis.plot([0, 1], [0, 1], color="0.7", linewidth=1, zorder=0)
    errors = {when: calibration_error(c[when], correct[when]) for when in c}
    for when in c:
        axis.plot(*zip(*reliability_points(c[when], correct[when])), marker="o", markersize=4,
                  label=f"{when}, ECE {errors[when]:.3f}")
    axis.set(xlabel="stated confidence c", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), title=reliability_title(errors))
    axis.legend(fontsize=8)


def reliability_title(errors):
    """The finding about calibration in words (str). errors: {"before": ECE, "after": ECE}."""
    better = errors["after"] < errors["before"] - 0.005
    return ("what it states is nearer to the truth" if better else
            "what it states is no nearer to the truth")


def draw_risk(axis, c, correct):
    """Share of wrong answers against the share that is answered, most confident first."""
    areas = {when: auroc(c[when], correct[when]) for when in c}
    for when in c:
        axis.plot(*zip(*risk_coverage(c[when], correct[when])), label=f"{when}, AUROC {areas[when]:.3f}")
    better = areas["after"] > areas["before"] + 0.005
    axis.set(xlabel="coverage", ylabel="risk", xlim=(0, 1), ylim=(0, None),
             title=f"confidence tells right from wrong {'better' if better else 'no better'} than before")
    axis.legend(fontsize=8)


def gap_title(before, after):
    """The finding under noise in words (str). before, after: C on clean minus C on noised pictures, in nats."""
    if after > before + 0.1 and after > 1.5 * before:
        return f"under noise it now says so: C falls by {after:.2f} (before {before:.2f})"
    return f"under noise it still does not say so: C falls by {after:.2f} (before {before:.2f})"


def draw_gap(axis, models, log, t):
    """C on clean pictures minus C on noised ones: while training, on the key region and on controls, and held out."""
    gaps = {when: np.mean([a.confidence for a in answers[0]]) - np.mean([a.confidence for a in answers[t]])
            for when, answers in models.items()}
    for key, label in (("gap", "training, key region"), ("gap/controls", "training, controls: the evidence is spared")):
        if points := [(row["step"], row[key]) for row in log if key in row]:
            axis.plot(*zip(*smoothed(points)), label=label)
    for when, style in (("before", ":"), ("after", "--")):
        axis.axhline(gaps[when], color="0.4", linestyle=style, linewidth=1, label=f"held out, {when}: {gaps[when]:.2f}")
    axis.set(xlabel="step", ylabel="gap C - C'")
    axis.set_title(gap_title(gaps["before"], gaps["after"]), fontsize=10)
    axis.legend(fontsize=8)


def draw_rewards(axis, log):
    """The reward terms of the original view over steps."""
    for term in ("outcome", "format", "calibration", "perception"):
        if points := [(row["step"], row[f"original/{term}"]) for row in log if f"original/{term}" in row]:
            axis.plot(*zip(*smoothed(points)), label=term)
    axis.set(xlabel="step", ylabel="mean reward", title="reward terms on original pictures")
    axis.legend(fontsize=8)


def finish_run(output, before, after, confidence_map, args, t):
    """The end of a training run: report.png, and the table before and after on the terminal -> its rows.

    before, after: {noise step: list of Answer}. t: the noise step of the table's noised column.
    """
    if before is None:                      # no questions were held out
        return None
    draw_report(output, before, after, confidence_map, args, t)
    rows = before_after(*(within_skills(answers[0], answers[t], confidence_map)
                          for answers in (before, after)))
    questions = {answer.id for answer in before[0]}
    print(f"\n{len(questions)} held-out questions x {len(before[0]) // len(questions)} answers; "
          f"noised = t {t} on the {args.region} region")
    print(cli.table(rows))
    print(f"\nwrote {output}/: the model, metrics.jsonl, samples.jsonl, report.png")
    return rows
