"""The report as one HTML file: style, plots and text inline, no script and nothing to load."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import numpy as np

from experiments import references
from experiments.collection import Row, Task, span
from experiments.figures import CURVES
from experiments.report import aggregates, plots, text
from experiments.report.aggregates import Estimate, Profiles
from experiments.report.data import Band, GroupReport, Report, Summary
from experiments.report.plots import Line

LINES_UP_TO = 12  # methods in one plot; if there are more, those with the highest IQM, and the page says so
Numbered = tuple[Row, Summary, dict[str, Band]]

DEFINITIONS = {
    "Final return": "Undiscounted return of the mean action after training, averaged over evaluation episodes in "
    "environments of their own. One number a seed.",
    "IQM": "Interquartile mean over seeds, over tasks as well in an aggregate: the lowest and the highest quarter go.",
    "95 % interval": "Percentile interval of 2000 bootstrap resamples of the seeds within each task (500 for curves "
    "and profiles, point by point), from a fixed random seed. One seed has none.",
    "Normalized score": "(return - random) / (reference - random): 0 is the uniformly random policy, 1 the reference "
    "below. Neither is a bound.",
    "Median": "Over the tasks, of each task's mean.",
    "Optimality gap": "How far scores stay below 1 on average; what lies above counts as 1. Lower is better.",
    "Performance profile": "The share of runs, over all tasks, with a normalized score above each threshold.",
    "P(X > Y)": "How probably a seed of X beats a seed of Y on a task drawn at random; ties count half.",
    "ESS": "Effective sample size of a minibatch's policy ratios, between 1/n and 1; 1 on fresh data.",
}


def page(report: Report) -> str:
    """The whole page."""
    series = {label: number for number, label in enumerate(sorted(set(report.found.labels.values())))}
    sections = [("scores", "Scores", _scores(report, series))]
    for number, one in enumerate(report.groups):
        sections.append((f"group-{number}", text.group_title(one), _group(one, number, series)))
    sections += [
        ("curves", "Learning curves", _curves(report, series)),
        ("runs", "Runs", _runs(report)),
        ("commands", "Commands", _commands(report)),
        ("definitions", "Definitions and references", _definitions(report)),
    ]
    sections = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{name}">{escape(title)}</a>' for name, title, _ in sections)
    body = "".join(
        f'<section id="{name}"><h2>{escape(title)}</h2>{content}</section>' for name, title, content in sections
    )
    style = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(report.title)}: ess-rl report</title>'
        f"<style>{style}</style></head>\n<body><header>"
        f'<p class="eyebrow">ess-rl report</p><h1>{escape(report.title)}</h1>'
        f'<p class="lede">{escape(text.overview(report))}. {report.made}.</p>{_problems(report)}'
        f'<nav aria-label="Sections">{links}</nav></header>\n<main>{body}</main>\n'
        "<footer>Made by <code>ess-rl report</code> from the files of the runs alone.</footer></body></html>\n"
    )


def _problems(report: Report) -> str:
    if not report.found.problems:
        return '<p class="note">Problems: none found.</p>'
    items = "".join(f"<li>{escape(problem)}</li>" for problem in report.found.problems)
    return f'<section class="problems" aria-label="Problems"><h2>Problems</h2><ul>{items}</ul></section>'


def _scores(report: Report, series: dict[str, int]) -> str:
    head = [
        "agent",
        "seeds",
        "IQM",
        "95 % interval",
        "each seed",
        "mean",
        "min",
        "max",
        "normalized",
        text.steps_title(report),
    ]
    scales: dict[str, tuple[float, float]] = {}  # one per env: its backends and budgets can be compared by eye
    for row, summary in zip(report.found.rows, report.summaries, strict=True):
        low, high = scales.get(row.task.env, (summary.low, summary.high))
        scales[row.task.env] = (min(low, summary.low), max(high, summary.high))
    body = []
    for task, rows in _by_task(report).items():
        body.append(_task_head(task, len(head) + 2))
        body += [_score_line(row, summary, scales[task.env], series[row.label]) for row, summary, _ in rows]
    tables = [_scroll("Scores", _head([*head, "backend", "wall time"]), "".join(body))]
    for agent, names in report.found.differing.items():
        cells = text.settings_table(report.found.labels, agent, names)
        tables.append(f"<h3>Settings in which runs of {escape(agent)} differ</h3>")
        tables.append(_scroll(f"Settings of {agent}", _head(cells[0]), _lines(cells[1:], series)))
    return "".join([
        '<p class="note">Final return of each seed: a tick each, the dot is the interquartile mean, the bar its 95 % '
        "interval; one scale an env. Runs of another backend, budget or setting stand in rows of their own.</p>",
        *tables,
    ])  # fmt: skip


def _score_line(row: Row, summary: Summary, scale: tuple[float, float], series: int) -> str:
    iqm, interval, *others = text.numbers(summary)
    picture = plots.strip(row.finals, summary.iqm.value, summary.iqm.interval, *scale, series)
    cells = [
        _agent(row.label, series),
        f'<td class="number" title="seeds {span(row.seeds)}">{len(row.seeds)}</td>',
        f'<td class="number main">{iqm}</td><td class="number interval">{interval}</td><td>{picture}</td>',
        *(f'<td class="number">{cell}</td>' for cell in [*others, text.env_steps(row)]),
        f"<td>{escape(row.task.backend)}</td>",
        f'<td class="number">{text.wall_time(row)}</td>',
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _group(one: GroupReport, number: int, series: dict[str, int]) -> str:
    tasks = ", ".join(f"{task.name} ({task.backend})" for task in one.group.tasks)
    parts = [f'<p class="note">{escape(tasks)}; {text.seeds_of(one)}.</p>']
    if one.profiles is not None:
        title = escape(text.scores_title(one))
        parts += [f"<h3>{title}</h3>", _aggregates(one, series), _profiles(one.profiles, number, series)]
    if one.improvements:
        parts += ["<h3>Probability of improvement</h3>", _improvements(one, series)]
    parts += [f'<p class="note">Left out: {escape(line)}.</p>' for line in one.group.left_out]
    return "".join(parts)


def _aggregates(one: GroupReport, series: dict[str, int]) -> str:
    scales = {}
    for name in aggregates.STATISTICS:
        ends = [end for values in one.aggregates.values() for end in (values[name].interval or (values[name].value,))]
        scales[name] = (min(ends), max(ends))
    body = []
    for label, values in one.aggregates.items():
        cells = [_estimate(value, scales[name], series[label]) for name, value in values.items()]
        body.append(f"<tr>{_agent(label, series[label])}{''.join(cells)}</tr>")
    return _scroll("Normalized scores", _head(["agent", *aggregates.STATISTICS]), "".join(body))


def _improvements(one: GroupReport, series: dict[str, int]) -> str:
    body = []
    for (x, y), value in one.improvements.items():
        probability = _estimate(value, (0.0, 1.0), series[x], 0.5)
        body.append(f"<tr>{_agent(x, series[x])}<td>{_swatched(y, series[y])}</td>{probability}</tr>")
    note = ""
    if len(one.group.raw) > aggregates.PAIRS_UP_TO:
        best = escape(aggregates.best_of(one.group))
        note = f'<p class="note">Each against {best}, the highest IQM of {len(one.group.raw)}.</p>'
    return note + _scroll("Probability of improvement", _head(["X", "Y", "P(X > Y)"]), "".join(body))


def _estimate(value: Estimate, scale: tuple[float, float], series: int, mark: float | None = None) -> str:
    interval = ""
    if value.interval is not None:
        interval = f' <span class="interval">{value.interval[0]:.2f} to {value.interval[1]:.2f}</span>'
    picture = plots.strip((), value.value, value.interval, *scale, series, mark)
    return f'<td><span class="main">{value.value:.2f}</span>{interval}{picture}</td>'


def _profiles(profiles: Profiles, number: int, series: dict[str, int]) -> str:
    thresholds, shares = profiles
    lines = []
    for label in _shown(list(shares), {label: share.mean() for label, (share, _) in shares.items()}):
        share, interval = shares[label]
        low, high = interval or (None, None)
        lines.append(Line(label, series[label], thresholds, share, low, high))
    half = "; ".join(f"{one.label} {np.interp(1.0, one.x, one.y, right=0.0):.0%}" for one in lines)
    description = f"Performance profiles. Share of runs with a normalized score above 1: {half}"
    plot = plots.panel(f"profile-{number}", lines, x_label="normalized score", unit=True, description=description)
    caption = "Performance profile: share of runs with a score above the one on the axis, and its 95 % interval"
    figure = f'<figure class="single"><figcaption>{caption}</figcaption>{plot}</figure>'
    return _legend([line.label for line in lines], series) + figure


def _curves(report: Report, series: dict[str, int]) -> str:
    parts = []
    for task, rows in _by_task(report).items():
        drawn = [(row, summary, bands) for row, summary, bands in rows if bands]
        if not drawn:
            continue
        chosen = _shown([row.label for row, _, _ in drawn], {row.label: s.iqm.value for row, s, _ in drawn})
        drawn = [one for one in drawn if one[0].label in chosen]
        figures = [_curve(task, name, title, drawn, series) for name, title in CURVES]
        note = ""
        if len(drawn) < len(rows):
            note = f"Drawn: {len(drawn)} of {len(rows)}, the highest IQMs among those that logged curves."
            note = f'<p class="note">{note}</p>'
        parts.append(
            f'<div class="together"><h3 class="task">{_task(task)}</h3>'
            f"{_legend([row.label for row, _, _ in drawn], series)}{note}"
            f'<div class="plots">{"".join(figures)}</div></div>'
        )
    if not parts:
        return ""
    return (
        '<p class="note">Interquartile mean over the seeds and its 95 % interval, over the env steps of a seed. '
        "Returns are those of training episodes, with exploration noise.</p>" + "".join(parts)
    )


def _curve(task: Task, name: str, title: str, rows: Sequence[Numbered], series: dict[str, int]) -> str:
    lines = []
    if task.dataset and name == "return":
        title = "return of evaluations"  # no policy acts in training
    for row, _, bands in rows:
        if name in bands:
            band = bands[name]
            low, high = band.interval or (None, None)
            lines.append(Line(row.label, series[row.label], band.x, band.y, low, high))
    if not lines:
        return ""
    ends = "; ".join(f"{line.label} from {line.y[0]:.3g} to {line.y[-1]:.3g}" for line in lines)
    key = re.sub(r"[^A-Za-z0-9]+", "-", f"{task.name}-{task.backend}-{task.steps}-{name}")
    plot = plots.panel(
        key, lines, x_label=task.unit, unit=name in ("ess", "capped_fraction"),
        description=f"{title} on {task.name} over {task.unit}: {ends}",
    )  # fmt: skip
    return f"<figure><figcaption>{escape(title[0].upper() + title[1:])}</figcaption>{plot}</figure>"


def _runs(report: Report) -> str:
    cells = text.runs_table(report)
    parts = [_scroll("Runs", _head(cells[0]), _lines(cells[1:]), words=True)]
    if report.missing:
        items = "".join(f"<li>{escape(line)}</li>" for line in report.missing)
        parts.append(f"<h3>Missing</h3><ul>{items}</ul>")
    cells = text.origins(report.found.runs)
    parts += ["<h3>Versions and machines</h3>", _scroll("Versions", _head(cells[0]), _lines(cells[1:]), words=True)]
    return "".join(parts)


def _commands(report: Report) -> str:
    items = "".join(
        f"<li>{escape(name)}<code>{escape(line)}</code></li>" for name, line in text.commands(report.found.runs)
    )
    return (
        '<p class="note">Each line makes a run again, with every setting spelled out; equal to the last bit only '
        f'on the same machine with the same versions.</p><ul class="commands">{items}</ul>'
    )


def _definitions(report: Report) -> str:
    terms = "".join(f"<dt>{escape(term)}</dt><dd>{escape(meaning)}</dd>" for term, meaning in DEFINITIONS.items())
    cells = text.references_table(report.found)
    return (
        f'<dl>{terms}</dl><p class="note">After Agarwal et al. 2021, '
        '<a href="https://arxiv.org/abs/2108.13264">arXiv 2108.13264</a>.</p>'
        f"<h3>Reference returns, table version {escape(references.VERSION)}</h3>"
        f"{_scroll('Reference returns', _head(cells[0]), _lines(cells[1:]), words=True)}"
        f'<p class="note">Random: {escape(references.RANDOM_SOURCE)}.</p>'
    )


def _by_task(report: Report) -> dict[Task, list[Numbered]]:
    tasks: dict[Task, list[Numbered]] = {}
    for row, summary, bands in zip(report.found.rows, report.summaries, report.curves, strict=True):
        tasks.setdefault(row.task, []).append((row, summary, bands))
    return tasks


def _shown(labels: Sequence[str], worth: dict[str, float]) -> list[str]:
    """At most LINES_UP_TO of the labels, those worth most, in their original order."""
    best = sorted(labels, key=lambda label: -worth[label])[:LINES_UP_TO]
    return [label for label in labels if label in best]


def _legend(labels: Iterable[str], series: dict[str, int]) -> str:
    items = "".join(f"<li>{_swatched(label, series[label])}</li>" for label in labels)
    return f'<ul class="legend">{items}</ul>'


def _swatched(label: str, series: int) -> str:
    return f"{plots.swatch(series)}{escape(label)}"


def _agent(label: str, series: int) -> str:
    return f'<th scope="row">{_swatched(label, series)}</th>'


def _task_head(task: Task, columns: int) -> str:
    return f'<tr class="task"><th colspan="{columns}" scope="rowgroup">{_task(task)}</th></tr>'


def _task(task: Task) -> str:
    return f"{escape(task.name)} <small>{escape(task.backend)}, {task.steps:,} {task.unit}</small>"


def _head(names: Sequence[str]) -> str:
    words = (
        "IQM",
        "95 % interval",
        "mean",
        "min",
        "max",
        "normalized",
        "env steps",
        "updates",
        "env steps or updates",
        "seeds",
        "wall time",
    )
    numeric = words if "each seed" in names else ()
    cells = "".join(
        f'<th scope="col"{" class=number" if name in numeric else ""}>{escape(name)}</th>' for name in names
    )
    return f"<thead><tr>{cells}</tr></thead>"


def _lines(rows: Sequence[Sequence[str]], series: dict[str, int] | None = None) -> str:
    """Rows of plain cells; the first is the row's head, with its swatch if it is an agent."""
    made = []
    for first, *others in rows:
        head = _agent(first, series[first]) if series else f'<th scope="row">{escape(first)}</th>'
        made.append(f"<tr>{head}{''.join(f'<td>{escape(cell)}</td>' for cell in others)}</tr>")
    return "".join(made)


def _scroll(name: str, head: str, body: str, *, words: bool = False) -> str:
    """A table that scrolls by itself if it is wider than the screen."""
    kind = ' class="words"' if words else ""
    return (
        f'<div class="scroll" role="region" aria-label="{escape(name)}" tabindex="0">'
        f"<table{kind}>{head}<tbody>{body}</tbody></table></div>"
    )
