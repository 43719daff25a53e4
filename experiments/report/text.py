"""The report as text: Markdown, CSV, and the cells that the HTML page shares with them."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

from experiments import collection, configurations, records, references
from experiments.collection import Collection, Method, Row, Run
from experiments.report import aggregates
from experiments.report.aggregates import Estimate
from experiments.report.data import GroupReport, Report, Summary


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, aligned; the first row is the header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(rows[0]), rule, *(line(row) for row in rows[1:])])


def overview(report: Report) -> str:
    """One line that counts what the report contains."""
    states = [run.state for run in report.found.runs]
    rows = report.found.rows
    parts = [
        count(states.count("finished"), "finished run"),
        count(len({row.method for row in rows}), "agent"),
        count(len({row.task.name for row in rows}), "env"),
        count(sum(len(row.members) for row in rows), "seed") + " trained",
        count(len(report.found.problems), "problem"),
    ]
    if others := len(states) - states.count("finished"):
        parts.insert(1, count(others, "other folder"))
    return ", ".join(parts)


def markdown(report: Report) -> str:
    """The report without its plots."""
    parts = [f"# {report.title}", f"{overview(report)}. Made {report.made} by `ess-rl report`.", "## Problems"]
    parts.append("\n".join(f"- {problem}" for problem in report.found.problems) or "None found.")
    head = [
        "env",
        "backend",
        steps_title(report),
        "agent",
        "seeds",
        "IQM",
        "95 % interval",
        "mean",
        "min",
        "max",
        "normalized",
    ]
    body = [
        [row.task.name, row.task.backend, f"{env_steps(row)}", row.label, collection.span(row.seeds), *numbers(summary)]
        for row, summary in zip(report.found.rows, report.summaries, strict=True)
    ]
    parts += ["## Scores", table([[*head, "wall time"], *(
        [*cells, wall_time(row)] for cells, row in zip(body, report.found.rows, strict=True)
    )])]  # fmt: skip
    for agent, names in report.found.differing.items():
        parts += [
            f"Settings in which runs of {agent} differ:",
            table(settings_table(report.found.labels, agent, names)),
        ]
    for one in report.groups:
        parts += _markdown_group(one)
    parts += ["## Runs", table(runs_table(report))]
    if report.missing:
        parts += ["Missing:", "\n".join(f"- {line}" for line in report.missing)]
    parts += ["Made with:", table(origins(report.found.runs))]
    parts += ["## Commands", "```bash\n" + "\n".join(line for _, line in commands(report.found.runs)) + "\n```"]
    parts += ["## Reference returns", f"Table version {references.VERSION}. Random: {references.RANDOM_SOURCE}."]
    parts.append(table(references_table(report.found)))
    return "\n\n".join(parts) + "\n"


def runs_table(report: Report) -> list[list[str]]:
    """Rows of a table: every folder, whatever its state."""
    body = [
        [run.name, f"{run.state}: {run.detail}" if run.detail else run.state, duration(run.wall_seconds)]
        for run in report.found.runs
    ]
    return [["folder", "state", "wall time"], *body]


def references_table(found: Collection) -> list[list[str]]:
    """Rows of a table: the returns that each task's scores are normalized with."""
    body = []
    for name, own in sorted({(row.task.name, row.task.references) for row in found.rows if row.task.dataset}):
        ends = [f"{x:g}" for x in own] or ["-", "-"]
        body.append([name, *ends, "the data set's ref_min_score and ref_max_score" if own else "the set has none"])
    for env_id in sorted({row.task.env for row in found.rows if not row.task.dataset}):
        known = references.REFERENCES.get(env_id)
        if known is None:
            body.append([env_id, "-", "-", "not in the table"])
            continue
        reference = "-" if known.reference is None else f"{known.reference:g}"
        body.append([env_id, f"{known.random:g}", reference, known.source.format(env_id) or "no reference yet"])
    return [["env", "random", "reference", "reference from"], *body]


def scores_csv(report: Report) -> str:
    """One line for each seed of each row, for other programs."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    head = ["env", "backend", "steps", "env_steps", "agent", "label", "seed", "final_return", "training_return"]
    writer.writerow([*head, "normalized_score", "in_aggregate", "folder", "dataset"])
    inside = {(label, task) for one in report.groups for label in one.group.normalized for task in one.group.scored}
    for row in report.found.rows:
        for (run, member), seed, final in zip(row.members, row.seeds, row.finals, strict=True):
            training = (run.result.get("training_return") or {member: None})[member]
            normalized = row.task.normalized(final)
            used = "yes" if (row.label, row.task) in inside else "no"
            writer.writerow([
                row.task.env, row.task.backend, row.task.steps, records.steps_of(run.result), row.method.agent,
                row.label, seed, final, "" if training is None else training,
                "" if normalized is None else f"{normalized:.6g}", used, run.name, row.task.dataset,
            ])  # fmt: skip
    return text.getvalue()


def settings_table(labels: Mapping[Method, str], agent: str, names: Sequence[str]) -> list[list[str]]:
    """Rows of a table: the settings that distinguish the methods of one agent."""
    methods = [method for method in labels if method.agent == agent]
    body = [[labels[method], *(collection.show(method, name) for name in names)] for method in methods]
    return [["agent", *(name.rstrip("_") for name in names)], *body]


def decimals(low: float, high: float) -> int:
    """Number of decimals to write for returns between these two."""
    return 0 if max(abs(low), abs(high)) >= 100 else 2


def numbers(summary: Summary) -> list[str]:
    """IQM, interval, mean, min, max, normalized IQM, as cells."""
    digits = decimals(summary.low, summary.high)
    low_high = "-"
    if summary.iqm.interval is not None:
        low_high = " to ".join(f"{end:.{digits}f}" for end in summary.iqm.interval)
    plain = [f"{x:.{digits}f}" for x in (summary.mean, summary.low, summary.high)]
    normalized = "-" if summary.normalized is None else f"{summary.normalized:.2f}"
    return [f"{summary.iqm.value:.{digits}f}", low_high, *plain, normalized]


def estimate(value: Estimate, digits: int = 2) -> str:
    """0.98 (0.91 to 1.04)"""
    if value.interval is None:
        return f"{value.value:.{digits}f}"
    return f"{value.value:.{digits}f} ({value.interval[0]:.{digits}f} to {value.interval[1]:.{digits}f})"


def steps_title(report: Report) -> str:
    """Unit of the steps of the report's rows: env steps, updates, or both."""
    return " or ".join(sorted({row.task.unit for row in report.found.rows})) or "env steps"


def env_steps(row: Row) -> str:
    """Env steps of a seed as trained: whole iterations, so slightly more than requested; on a data set, updates."""
    return " / ".join(f"{steps:,}" for steps in sorted({records.steps_of(run.result) for run in row.runs}))


def wall_time(row: Row) -> str:
    """Wall time of the runs that the row is from, with all their members."""
    known = [run.wall_seconds for run in row.runs]
    return duration(None if None in known else sum(seconds for seconds in known if seconds is not None))


def duration(seconds: float | None) -> str:
    """1 h 02 min, 14 min 41 s, or a dash if nothing was recorded."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"


def origins(runs: Sequence[Run]) -> list[list[str]]:
    """Rows of a table: machine, versions, commit, and the finished runs that were made with them."""
    made: dict[tuple[str, str, str], list[str]] = {}
    for run in runs:
        if run.state != "finished":
            continue
        machine, versions = run.config.get("machine", {}), run.config.get("versions", {})
        where = f"{machine.get('cores', '?')} cores of {machine.get('cpu', 'an unknown CPU')}, {run.config['device']}"
        having = ", ".join(f"{name} {version}" for name, version in versions.items())
        commit, plus, changes = (run.config.get("git_commit") or "unknown").partition("+")
        made.setdefault((where, having, commit[:12] + plus + changes), []).append(run.name)
    return [["machine", "versions", "commit", "runs"], *([*key, _some(names)] for key, names in made.items())]


def _some(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def commands(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """(folder, the command that repeats the run) of each finished run."""
    cannot = "# {}: its seeds or its sweep were chosen from Python, no command says them"
    return [
        (run.name, configurations.command(run.config) or cannot.format(run.name))
        for run in runs
        if run.state == "finished"
    ]


def improvement_table(one: GroupReport) -> list[list[str]]:
    """Rows of a table: P(X > Y) of each pair."""
    body = [[x, y, estimate(value)] for (x, y), value in one.improvements.items()]
    return [["X", "Y", "P(X > Y) (95 % interval)"], *body]


def aggregate_table(one: GroupReport) -> list[list[str]]:
    """Rows of a table: the statistics of normalized scores of each method."""
    body = [[label, *(estimate(value) for value in values.values())] for label, values in one.aggregates.items()]
    return [["agent", *aggregates.STATISTICS], *body]


def group_title(one: GroupReport) -> str:
    """Over 3 tasks, 1,000,000 env steps (or updates)"""
    return f"Over {count(len(one.group.tasks), 'task')}, {one.group.steps:,} {one.group.unit}"


def scores_title(one: GroupReport) -> str:
    """Normalized scores, and over which of the tasks if not all of them have a reference"""
    if one.group.scored == one.group.tasks:
        return "Normalized scores"
    return f"Normalized scores over {', '.join(task.name for task in one.group.scored)}"


def seeds_of(one: GroupReport) -> str:
    """Number of seeds that each method has on every task."""
    counts = {len(scores) for scores in one.group.raw.values()}
    return f"{' or '.join(map(str, sorted(counts)))} seed{'s' * (counts != {1})} each"


def _markdown_group(one: GroupReport) -> list[str]:
    tasks = ", ".join(f"{task.name} ({task.backend})" for task in one.group.tasks)
    parts = [f"## {group_title(one)}", f"{tasks}; {seeds_of(one)}."]
    if one.aggregates:
        parts += [f"{scores_title(one)}, reference table version {references.VERSION}:", table(aggregate_table(one))]
    if one.improvements:
        parts += ["Probability of improvement:", table(improvement_table(one))]
    parts += [f"Left out: {line}" for line in one.group.left_out]
    return parts


def count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
