"""The report, over the published runs and over made-up folders with everything that can be wrong with them."""

import csv
import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tyro
from cycler import cycler
from matplotlib import rc_context

from ess_rl.errors import UsageError
from experiments import collection, configurations, options, records, references
from experiments.figures import learning_curves, read_curves
from experiments.report import aggregates, data, pages, picture, text

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "experiments" / "results"
PPO: dict[str, Any] = {"clip": 0.2, "learning_rate": 3e-4, "hidden": [64, 64], "num_envs": 16, "rollout": 128}


def make_run(
    folder: Path,
    env: str = "Hopper-v5",
    seeds: tuple[int, ...] = (0, 1, 2),
    finals: list[float] | None = None,
    *,
    agent: str = "ppo",
    backend: str = "envpool",
    steps: int = 100_000,
    sweep: dict[str, list[float]] | None = None,
    settings: dict[str, Any] | None = None,
    finished: bool = True,
) -> Path:
    """A run folder as `ess-rl train` leaves it, with three lines of metrics."""
    folder.mkdir(parents=True)
    shared = {"agent": agent, "env": env, "backend": backend, "seeds": list(seeds), "sweep": sweep or {}}
    shared |= {"device": "cpu", "compiled": False}
    config = {"format": 1, **shared, "steps": steps, "episodes": 20, "config": PPO | (settings or {})}
    records.write_json(folder / "config.json", config | {"iterations": 10, "reset_every": 4})
    with open(folder / "metrics.jsonl", "w") as log:
        for number in (1, 2, 3):
            members = [0.1 * number + 0.01 * seed for seed in seeds]
            row = {"env_steps": steps * number // 3, "episodes": [2] * len(seeds), "return_sum": members}
            row |= {} if number == 1 else {"ess": members, "behavior_kl": members, "clipped_fraction": members}
            records.append_line(log, {"iteration": number, **row})
    if finished:
        scores = finals or [1000.0 + 100.0 * seed for seed in seeds]
        times = {"training_seconds": 90.0, "compile_seconds": 10.0}
        result = {"format": 1, **shared, "env_steps": steps, "final_return": scores, **times}
        records.write_json(folder / "result.json", result)
    return folder


class Page(HTMLParser):
    """What the tests ask of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.ids += [found["id"] or ""] if "id" in found else []
        self.loads += [value or "" for name, value in attrs if name in ("src", "srcset", "data")]
        if tag == "link":
            self.loads.append(found.get("href") or "")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """report.html of twenty published seeds of P3O and PPO on three tasks, and SB3 beside them, by the command.

    In a process that must not import torch.
    """
    root = tmp_path_factory.mktemp("published")
    out = root / "report.html"
    for env in ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5"):
        for folder, agents in (("mujoco", ("p3o", "ppo", "sb3-ppo")), ("mujoco-more", ("p3o", "ppo"))):
            for agent in agents:
                shutil.copytree(PUBLISHED / folder / f"{agent}-{env}", root / folder / f"{agent}-{env}")
    code = (
        "import sys; from experiments.__main__ import main; "
        f"sys.argv = ['ess-rl', 'report', {str(root)!r}, '--out', {str(out)!r}]; main(); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False", "the report imported torch"
    files = [out, out.with_suffix(".md"), out.with_name("scores.csv"), out.with_suffix(".png")]
    assert done.stdout.splitlines()[1:5] == list(map(str, files))
    return out


def test_published_numbers(published: Path) -> None:
    text = published.with_suffix(".md").read_text()
    assert re.search(r"HalfCheetah-v5 +\| envpool +\| 1,003,520 +\| p3o +\| 60 to 79 +\| 6481 +\| 6044 to 6812", text)
    assert re.search(r"HalfCheetah-v5 +\| gymnasium +\| 1,001,472 +\| sb3-ppo +\| 0 to 2 ", text)
    assert "## Over 3 tasks, 1,000,000 env steps" in text and "20 seeds each" in text
    assert "| ppo   | 1.01 (" in text  # its first ten seeds are the reference
    assert "## Over 2 tasks, 1,000,000 env steps" in text  # SB3, on its own backend
    assert (
        "sb3-ppo on Walker2d-v5 (gymnasium, 1,000,000 env steps): seeds 0 to 9, on its other tasks 0 to 2; left" in text
    )
    assert "ess-rl train ppo --env Hopper-v5 --seeds 10 --seed0 0 --steps 1000000 " in text
    rows = list(csv.DictReader(io.StringIO(published.with_name("scores.csv").read_text())))
    left_out = [row for row in rows if row["in_aggregate"] != "yes"]
    assert len(rows) == 2 * 3 * 20 + 3 + 3 + 10
    assert [(row["agent"], row["env"]) for row in left_out] == [("sb3-ppo", "Walker2d-v5")] * 10
    best = max((row for row in rows if row["env"] == "Hopper-v5"), key=lambda row: float(row["final_return"]))
    assert (best["agent"], best["seed"]) == ("p3o", "66")


def test_page_is_one_file_that_needs_nothing(published: Path) -> None:
    text = published.read_text()
    page = Page(text)
    assert page.loads == ["data:,"] and "@import" not in text and "url(http" not in text
    assert "script" not in page.tags
    assert len(page.ids) == len(set(page.ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', text)) <= set(page.ids)
    assert text.count('class="plot"') == 2 + 3 * 4 == text.count("<title id=")  # two profiles; return, ESS, KL, capped
    assert "return of training episodes on Hopper-v5 over env steps: p3o from" in text


def test_the_picture_has_a_panel_of_all_tasks_and_one_of_each(published: Path, tmp_path: Path) -> None:
    assert published.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert published.with_suffix(".png").stat().st_size > 10_000
    report = data.build(published.parent)
    panels = picture._panels(report, report.groups[0])
    assert list(panels) == ["3 tasks, normalized", "HalfCheetah-v5", "Hopper-v5", "Walker2d-v5"]
    assert panels["Hopper-v5"]["p3o"].value == pytest.approx(3038, abs=0.5)  # 2520 to 3240, in the README
    assert panels["Hopper-v5"]["p3o"].interval == pytest.approx((2520, 3240), abs=0.5)
    for number in range(picture.METHODS_UP_TO + 2):  # on a task without a reference: no first panel
        make_run(tmp_path / str(number), env="LunarLanderContinuous-v3", settings={"clip": 0.1 + number})
    many = data.build(tmp_path)
    assert list(picture._panels(many, *many.groups)) == ["LunarLanderContinuous-v3"]
    lines = pages.write(tmp_path).splitlines()
    assert lines[-1] == str(tmp_path / "report.png") and (tmp_path / "report.png").stat().st_size > 10_000


def test_references_are_the_published_results() -> None:
    for env, folder in {
        "HalfCheetah-v5": "mujoco", "Hopper-v5": "mujoco", "Walker2d-v5": "mujoco", "Swimmer-v5": "mujoco",
        "Reacher-v5": "mujoco", "InvertedDoublePendulum-v5": "mujoco", "InvertedPendulum-v5": "mujoco",
        "Pendulum-v1": "classic",
    }.items():  # fmt: skip
        result = json.loads((PUBLISHED / folder / f"ppo-{env}" / "result.json").read_text())
        iqm = float(np.sort(result["final_return"])[2:8].mean())
        assert references.REFERENCES[env].reference == pytest.approx(iqm, abs=0.051)
        assert references.normalized(env, iqm) == pytest.approx(1.0, abs=1e-3)
    assert references.normalized("Hopper-v5", references.REFERENCES["Hopper-v5"].random) == 0.0
    assert references.normalized("Humanoid-v5", 0.0) is None and references.normalized("unknown", 0.0) is None


def test_random_returns_are_of_the_first_episodes_and_repeat() -> None:
    returns, backend = references.random_returns("ess/CartPole-v0", episodes=4)
    assert backend == "torch" and len(returns) == 4 and all(0 < x <= 500 for x in returns)
    assert returns == references.random_returns("ess/CartPole-v0", episodes=4)[0]


def test_every_env_has_a_random_return() -> None:
    import envs

    assert set(references.REFERENCES) == set(envs.ENVS)


def test_bad_folders_are_named_and_change_no_number(tmp_path: Path) -> None:
    for env in ("Hopper-v5", "Walker2d-v5", "HalfCheetah-v5"):
        make_run(tmp_path / f"ppo-{env}", env)
        make_run(tmp_path / f"p3o-{env}", env, agent="p3o")
    clean = data.build(tmp_path)
    assert clean.found.problems == [] and len(clean.groups) == 1

    torn = make_run(tmp_path / "torn", "HalfCheetah-v5", (7, 8))
    (torn / "result.json").write_text((torn / "result.json").read_text()[:200])
    nan = make_run(tmp_path / "nan", "HalfCheetah-v5", (5, 6))
    (nan / "result.json").write_text((nan / "result.json").read_text().replace("1500.0", "NaN"))
    mixed = make_run(tmp_path / "mixed", "HalfCheetah-v5", (3, 4))
    shutil.copy(tmp_path / "ppo-Hopper-v5" / "result.json", mixed)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"a": 1}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("")
    make_run(tmp_path / "now", "HalfCheetah-v5", (9,), finished=False)
    old = make_run(tmp_path / "old", "HalfCheetah-v5", (10,), finished=False)
    for file in old.iterdir():
        os.utime(file, (time.time() - 7200, time.time() - 7200))

    made = data.build(tmp_path)
    problems = "\n".join(made.found.problems)
    assert "torn: result.json: not valid JSON" in problems
    assert "nan: result.json: the final return of seed 5 is nan, not a finite number" in problems
    assert "mixed: result.json: its 'env' is not that of config.json" in problems
    assert "foreign: config.json: not the configuration of a run" in problems
    assert "empty: config.json: not valid JSON" in problems
    assert "now: no result (running; 100,000 of 100,000 env steps, last written 0 min ago)" in problems
    assert "old: no result (stopped; 100,000 of 100,000 env steps, last written 2 h ago)" in problems
    assert made.summaries == clean.summaries and made.groups[0].aggregates == clean.groups[0].aggregates
    states = {run.name: run.state for run in made.found.runs}
    assert (states["torn"], states["now"], states["old"]) == ("damaged", "running", "stopped")
    assert "torn" in text.markdown(made)


def test_repeated_seeds_are_counted_once_and_left_out_of_aggregates(tmp_path: Path) -> None:
    for env in ("Hopper-v5", "Walker2d-v5", "HalfCheetah-v5"):
        make_run(tmp_path / f"a-ppo-{env}", env)
        make_run(tmp_path / f"a-p3o-{env}", env, agent="p3o")
    make_run(tmp_path / "b-ppo-Hopper-v5", "Hopper-v5", (1, 2, 3), [9000.0, 9000.0, 1300.0])
    made = data.build(tmp_path)
    (problem,) = (line for line in made.found.problems if "again" in line)
    assert "ppo on Hopper-v5 (envpool, 100,000 env steps): seed 1, 2 in a-ppo-Hopper-v5" in problem
    row = next(row for row in made.found.rows if row.label == "ppo" and row.task.env == "Hopper-v5")
    assert row.finals == [1000.0, 1100.0, 1200.0, 1300.0]
    (one,) = made.groups
    assert [task.env for task in one.group.tasks] == ["HalfCheetah-v5", "Walker2d-v5"]
    assert one.group.left_out == ["p3o on Hopper-v5 (envpool, 100,000 env steps): not run by every agent of this group"]


def test_other_seeds_and_missing_references_stay_out(tmp_path: Path) -> None:
    for agent in ("ppo", "p3o"):
        for env in ("Hopper-v5", "Walker2d-v5", "HumanoidStandup-v5"):
            make_run(tmp_path / f"{agent}-{env}", env, agent=agent)
    make_run(tmp_path / "few", "HalfCheetah-v5", (0, 1))
    make_run(tmp_path / "one", "ess/LQR-v0", (0,))
    made = data.build(tmp_path)
    problems = "\n".join(made.found.problems)
    assert "ppo on HalfCheetah-v5 (envpool, 100,000 env steps): seeds 0, 1, on its other tasks 0 to 2" in problems
    assert (
        "for HumanoidStandup-v5, ess/LQR-v0: no normalized score" in problems and "one seed has no interval" in problems
    )
    (one,) = made.groups
    assert [task.env for task in one.group.scored] == ["Hopper-v5", "Walker2d-v5"]
    assert one.group.normalized["ppo"].shape == (3, 2) and one.group.raw["ppo"].shape == (3, 3)
    # By hand: 1000, 1100 and 1200 on both tasks, normalized; the lowest and the highest of the six go.
    scores = sorted(
        references.normalized(env, x) or 0.0 for env in ("Hopper-v5", "Walker2d-v5") for x in (1e3, 1.1e3, 1.2e3)
    )
    assert one.aggregates["ppo"]["IQM"].value == pytest.approx(sum(scores[1:5]) / 4)
    assert one.improvements[("p3o", "ppo")].value == 0.5
    lqr = next(i for i, row in enumerate(made.found.rows) if row.task.env == "ess/LQR-v0")
    assert made.summaries[lqr].iqm.interval is None
    assert "| 1000 | -  " in text.markdown(made)


def test_backends_budgets_and_settings_are_rows_of_their_own(tmp_path: Path) -> None:
    make_run(tmp_path / "a", sweep={"clip": [0.1, 0.1, 0.3, 0.3]}, seeds=(0, 1, 0, 1), finals=[1.0, 2.0, 3.0, 4.0])
    make_run(tmp_path / "b", seeds=(2, 3), settings={"clip": 0.3}, finals=[5.0, 6.0])
    make_run(tmp_path / "c", backend="gymnasium", settings={"clip": 0.1})
    make_run(tmp_path / "d", steps=200_000, settings={"clip": 0.1})
    rows = {(str(row.task), row.label): row.finals for row in collection.collect(tmp_path).rows}
    hopper = "Hopper-v5 (envpool, 100,000 env steps)"
    assert rows[hopper, "ppo clip 0.1"] == [1.0, 2.0]
    assert rows[hopper, "ppo clip 0.3"] == [3.0, 4.0, 5.0, 6.0]  # one setting, from two folders
    assert {task for task, _ in rows} == {
        hopper, "Hopper-v5 (gymnasium, 100,000 env steps)", "Hopper-v5 (envpool, 200,000 env steps)",
    }  # fmt: skip
    assert len(rows) == 4


def test_one_env_on_two_backends_is_not_counted_twice(tmp_path: Path) -> None:
    for agent in ("ppo", "p3o"):
        for backend in ("envpool", "gymnasium"):
            make_run(tmp_path / f"{agent}-{backend}", agent=agent, backend=backend)
    groups = aggregates.groups(collection.collect(tmp_path))
    assert [[str(task) for task in group.tasks] for group in groups] == [
        ["Hopper-v5 (envpool, 100,000 env steps)"],
        ["Hopper-v5 (gymnasium, 100,000 env steps)"],
    ]


def test_methods_that_differ_in_much_get_letters_and_a_table(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", settings={"clip": 0.1, "rollout": 256, "hidden": [8], "new": None})
    found = collection.collect(tmp_path)
    assert sorted(found.labels.values()) == ["ppo (a)", "ppo (b)"]
    table = text.settings_table(found.labels, "ppo", found.differing["ppo"])
    assert table[0] == ["agent", "clip", "hidden", "new", "rollout"]
    assert sorted(row[1:] for row in table[1:]) == [["0.1", "8", "None", "256"], ["0.2", "64 64", "-", "128"]]


def test_a_method_is_named_by_what_sets_it_apart_from_most(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", settings={"clip": 0.1})
    make_run(tmp_path / "c", settings={"rollout": 256, "hidden": [8]})
    assert set(collection.collect(tmp_path).labels.values()) == {"ppo", "ppo clip 0.1", "ppo hidden 8, rollout 256"}


def test_runs_of_earlier_versions_are_the_same_method(tmp_path: Path) -> None:
    make_run(tmp_path / "a", seeds=(0, 1))
    make_run(tmp_path / "b", seeds=(2, 3), settings={"final_learning_rate": 0.0, "value_learning_rate": 3e-4})
    (row,) = collection.collect(tmp_path).rows
    assert row.seeds == [0, 1, 2, 3]


@pytest.mark.parametrize("run", ["mujoco/p3o-Hopper-v5", "classic/ppo-Pendulum-v1", "first/p3o-Walker2d-v5"])
def test_the_command_makes_the_same_configuration(run: str) -> None:
    from agents import AGENTS

    config = records.read_config(PUBLISHED / run)
    line = configurations.command(config)
    assert line is not None
    words = shlex.split(line)
    assert words[:3] == ["ess-rl", "train", config["agent"]]
    entry = AGENTS[config["agent"]]
    chosen = tyro.cli(options.of_agent(entry.config), args=words[3:])
    settings, sweep = options.split(entry.config, chosen)
    asked = {name: list(x) if isinstance(x, tuple) else x for name, x in settings.items()}
    assert not sweep and config["config"].items() <= asked.items()
    assert (chosen.env, chosen.steps, chosen.seeds, chosen.seed0) == (
        config["env"], config["steps"], len(config["seeds"]), config["seeds"][0],
    )  # fmt: skip
    assert (chosen.backend, chosen.compile, chosen.checkpoints) == (config["backend"], "on", 10)


def test_commands_of_sweeps_and_what_no_command_can_say(tmp_path: Path) -> None:
    config = records.read_config(make_run(tmp_path / "a", seeds=(4, 5, 4, 5), sweep={"clip": [0.1, 0.1, 0.3, 0.3]}))
    line = configurations.command(config)
    assert line is not None and "--seeds 2 --seed0 4" in line and "--clip 0.1 0.3" in line
    assert configurations.command(config | {"seeds": [4, 9, 4, 9]}) is None
    assert configurations.command(config | {"sweep": {"clip": [0.1, 0.2, 0.3, 0.4]}}) is None


def test_many_methods_are_compared_with_the_best(tmp_path: Path) -> None:
    for number in range(10):
        make_run(tmp_path / str(number), settings={"clip": 0.1 + number}, finals=[number, number + 1.0, number + 2.0])
    (group,) = aggregates.groups(collection.collect(tmp_path))
    pairs = aggregates.improvements(group)
    assert len(pairs) == 9 and {y for _, y in pairs} == {"ppo clip 9.1"}
    assert pairs["ppo clip 0.1", "ppo clip 9.1"].value == 0.0
    assert pairs["ppo clip 8.1", "ppo clip 9.1"].value == pytest.approx(2 / 9)  # 8 9 10 against 9 10 11: 1 won, 2 tied


def test_curves_have_the_capped_fraction_and_damage_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a" / "run")
    values = read_curves(run).values
    assert np.isnan(values["capped_fraction"][0]).all() and values["capped_fraction"][1, 2] == pytest.approx(0.22)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([lines[0][:20], *lines[1:]]))
    (run.parent / "published").mkdir()
    shutil.copy(PUBLISHED / "mujoco" / "p3o-Hopper-v5" / "config.json", run.parent / "published")
    shutil.copy(PUBLISHED / "mujoco" / "p3o-Hopper-v5" / "result.json", run.parent / "published")
    (run.parent / "published" / "curves.csv").write_text("env_steps,member,return,ess,behavior_kl\n100,0,1,1,0\n")
    problems = "\n".join(data.build(tmp_path / "a").found.problems)
    assert "run: no curves, metrics.jsonl: line 1 is damaged" in problems
    assert "published: no curves, curves.csv: not the curves of 10 members" in problems


def test_a_picture_of_more_methods_than_colors(tmp_path: Path) -> None:
    sweep = {"clip": [0.1 * (1 + i) for i in range(11)]}
    run = make_run(tmp_path / "run", seeds=(0,) * 11, sweep=sweep)
    with rc_context({"axes.prop_cycle": cycler(color=["red"])}):
        learning_curves([run], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").exists()


def test_a_profile_ends_at_0_though_all_scores_are_below_it(tmp_path: Path) -> None:
    for number, agent in enumerate(("ppo", "p3o")):
        make_run(tmp_path / agent, agent=agent, finals=[-900.0 + number, -500.0, -200.0])  # a random policy has 18
    (group,) = aggregates.groups(collection.collect(tmp_path))
    profiles = aggregates.profiles(group)
    assert profiles is not None
    thresholds, made = profiles
    assert thresholds[-1] > max(scores.max() for scores in group.normalized.values())
    assert all(share[0] > 0.0 and share[-1] == 0.0 for share, _ in made.values())


def test_names_from_files_are_escaped(tmp_path: Path) -> None:
    make_run(tmp_path / "a", agent="<script>alert(1)</script>")
    lines = pages.write(tmp_path).splitlines()
    assert lines[0].startswith("1 finished run, 1 agent, 1 env, 3 seeds trained, ")
    assert lines[-1].endswith("scores.csv") and not (tmp_path / "report.png").exists()  # one alone gives no picture
    page = Page((tmp_path / "report.html").read_text())
    assert "script" not in page.tags
    again = pages.write(tmp_path)  # its own files do not disturb it
    assert "1 finished run" in again


def test_bad_calls_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such directory"):
        pages.write(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="holds no run folder"):
        pages.write(tmp_path)
    make_run(tmp_path / "a")
    with pytest.raises(UsageError, match=r"ends in \.html"):
        pages.write(tmp_path, tmp_path / "report.pdf")
    (tmp_path / "report.png").write_bytes(b"my own figure")
    with pytest.raises(UsageError, match=r"report\.png was not written by 'ess-rl report'"):
        pages.write(tmp_path)
    assert (tmp_path / "report.png").read_bytes() == b"my own figure" and not (tmp_path / "report.html").exists()


def test_browser_draws_it_offline(published: Path, tmp_path: Path) -> None:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next((found for name in names if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no chromium binary was found: the page was not rendered")
    probe = (
        "<script>addEventListener('load', () => {"
        " const sizes = [...document.querySelectorAll('svg.plot, svg.strip')].map(x => x.getBoundingClientRect());"
        " const wide = document.documentElement.scrollWidth > innerWidth;"
        " document.body.dataset.probe = JSON.stringify({plots: sizes.length, wide,"
        " empty: sizes.filter(x => !(x.width > 50 && x.height > 10)).length}); });</script></body>"
    )
    page = tmp_path / "probe.html"
    page.write_text(published.read_text().replace("</body>", probe))
    for width in ("1280", "500"):  # 500 is the narrowest window that a headless chromium makes
        done = subprocess.run(
            [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
             f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND",
             "--enable-logging=stderr", f"--window-size={width},1000", "--dump-dom", page.as_uri()],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert "CONSOLE" not in done.stderr, done.stderr
        found = re.search(r'data-probe="([^"]+)"', done.stdout)
        assert found, done.stderr
        seen = json.loads(found.group(1).replace("&quot;", '"'))
        assert seen["plots"] >= 10 and seen["empty"] == 0 and not seen["wide"]


def test_each_aggregate_has_its_name_by_hand():
    """All scores in order: 0 2 4 6 20 20, of which one goes at either end; means of the tasks: 1, 5, 20; below 1: the
    zero alone."""
    found = aggregates.aggregate(np.array([[0.0, 4.0, 20.0], [2.0, 6.0, 20.0]]))
    values = {"IQM": 8.0, "median": 5.0, "mean": 26.0 / 3.0, "optimality gap": 1.0 / 6.0}
    assert {name: one.value for name, one in found.items()} == pytest.approx(values)
    for one in found.values():
        low, high = one.interval or (math.nan, math.nan)
        assert low <= one.value <= high
