import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes

from ess_rl.errors import UsageError
from experiments import collection, figures, options, plan, records
from experiments.report import tables
from experiments.run import of_log


def test_metrics_are_cut_to_the_checkpoint_and_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    path, lines = tmp_path / "metrics.jsonl", [f'{{"iteration": {i}, "seconds": {1.5 * i}}}' for i in (1, 2, 3)]
    path.write_text("\n".join([*lines, '{"itera']))
    assert [row["iteration"] for row in records.metrics(tmp_path)] == [1, 2, 3]
    assert records.cut_metrics(tmp_path, 2) == 3.0
    assert path.read_text() == f"{lines[0]}\n{lines[1]}\n"
    path.write_text("\n".join(lines))  # the last one is whole but for its end
    assert records.cut_metrics(tmp_path, 3) == 4.5
    assert path.read_text() == "\n".join([*lines, ""])
    assert records.cut_metrics(tmp_path, 0) == 0.0 and path.read_text() == ""
    path.write_text(f'{{"itera\n{lines[1]}\n')
    with pytest.raises(UsageError, match="line 1 is damaged"):
        list(records.metrics(tmp_path))


def test_metrics_that_end_before_the_checkpoint_are_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "000000400.safetensors").touch()
    for found in ("", '{"iteration": 1, "seconds": 1.0}\n{"iteration": 3, "seconds": 2.0}\n'):
        (tmp_path / "metrics.jsonl").write_text(found)
        with pytest.raises(
            UsageError, match=rf"has {found.count('1,')} of the 3 iterations before .*000400.safetensors"
        ):
            records.cut_metrics(tmp_path, 3)
        assert (tmp_path / "metrics.jsonl").read_text() == found


@pytest.mark.parametrize("length", [10, 2**14, 2**16 + 3])
def test_the_last_line_is_found_however_long_lines_are(tmp_path: Path, length: int) -> None:
    lines = [json.dumps({"iteration": i, "x": "x" * length}) + "\n" for i in range(1, 4)]
    assert records.last_metrics(tmp_path) is None
    for number in range(4):
        (tmp_path / "metrics.jsonl").write_text("".join(lines[:number]) + '{"itera')
        assert (records.last_metrics(tmp_path) or {"iteration": 0})["iteration"] == number
    with open(tmp_path / "metrics.jsonl", "ab") as log:
        log.write(b"\xff\xfe{\n")  # no UTF-8
    assert records.last_metrics(tmp_path) is None


def test_this_folder_is_left_out_of_a_command_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert [records.from_here(f"{before}{tmp_path}/a") for before in ("", "--out=")] == ["a", "--out=a"]
    for word in (f"/mnt{tmp_path}/a", f"{tmp_path}s/a", "a"):
        assert records.from_here(word) == word


def test_what_a_kill_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    kept = ["config.json", "checkpoints/000000400.safetensors"]
    for name in [*kept, ".tmpA1b2", "result.json.part", "checkpoints/.tmpC3", "checkpoints/000000800.replay.part"]:
        (tmp_path / name).touch()
    records.drop_unfinished(tmp_path)
    found = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(found) == sorted(kept)


def test_of_two_that_begin_in_one_folder_one_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with records.new_run(out, overwrite=False):
        with (
            pytest.raises(UsageError, match="another process is training this run"),
            records.new_run(out, overwrite=True),
        ):
            pass
        records.write_json(out / "config.json", {"format": 1, **dict.fromkeys(records.REQUIRED)})
    with pytest.raises(UsageError, match="--overwrite replaces it"), records.new_run(out, overwrite=False):
        pass
    (out / "metrics.jsonl").touch()
    with records.new_run(out, overwrite=True):
        assert [path.name for path in out.iterdir()] == ["lock"]


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    records.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="Out of range"):
        records.write_json(path, {"a": float("nan")})  # no JSON at all, though Python would write it
    assert records.read_json(path) == {"a": 1}


def test_differences_to_one_method_by_hand(tmp_path: Path) -> None:
    """IQMs of 20 and 40; every run of one is above every run of the other. In another simulator both are alike."""
    low, high = [10.0, 19.0, 21.0, 30.0], [31.0, 39.0, 41.0, 60.0]
    one = write_run(tmp_path / "a", [0, 1, 2, 3], [*low, *high])
    other = write_run(tmp_path / "b", [0, 1, 2, 3], [*high, *high], backend="gymnasium")
    plain, less = tables.comparison([one, other], against="p3o learning_rate 0.001").split("\n\n")
    assert tables.comparison([one, other]) == plain
    head, _, *rows = less.splitlines()
    assert "IQM less p3o learning_rate 0.001" in head and "P(above p3o learning_rate 0.001)" in head
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[1] for row in cells] == ["p3o learning_rate 0.0001"] * 2
    assert cells[0][2] == "+20.00" and cells[0][4:] == ["1.00", "1.00 to 1.00"]
    assert cells[1][2] == "+0.00" and cells[1][4] == "0.50"
    with pytest.raises(UsageError, match=r"--against 'ppo': choose one of p3o learning_rate 0.0001; p3o learn"):
        tables.comparison([one], against="ppo")
    single = write_run(tmp_path / "c", [0], [1.0, 2.0])
    with pytest.raises(UsageError, match="needs at least two seeds of each method"):
        tables.comparison([single], against="p3o learning_rate 0.001")


def test_differences_over_all_tasks_by_hand(tmp_path: Path) -> None:
    """Normalized: 0.1 0.2 0.2 0.3 twice, IQM 0.2; 0.3 0.4 0.4 0.5 and 0.7 0.8 0.8 0.9, IQM (0.4 + 0.5 + 0.7 + 0.8) / 4
    = 0.6."""
    wide = write_run(tmp_path / "a", [0, 1, 2, 3], [10, 20, 20, 30, 30, 40, 40, 50], dataset="x/a-v0")
    narrow = write_run(tmp_path / "b", [0, 1, 2, 3], [1, 2, 2, 3, 7, 8, 8, 9], dataset="x/b-v0")
    for folder, high in ((wide, 100.0), (narrow, 10.0)):
        config = records.read_json(folder / "config.json")
        records.write_json(folder / "config.json", {**config, "references": [0.0, high]})
    against = "p3o learning_rate 0.001"

    def last(*runs: Path) -> list[str]:
        rows = tables.comparison(runs, against=against).split("\n\n")[1].splitlines()
        return [cell.strip() for cell in rows[-1].strip("|").split("|")]

    # Pairs on the one: one tied of 16 (30 and 30), 15 won; on the other all. (15.5 / 16 + 1) / 2.
    assert last(wide, narrow)[:3] == ["all 2, normalized", "p3o learning_rate 0.0001", "+0.400"]
    assert last(wide, narrow)[4] == "0.98"
    fewer = write_run(tmp_path / "c", [0, 1], [1, 2, 7, 8], dataset="x/b-v0")
    records.write_json(fewer / "config.json", {**records.read_json(fewer / "config.json"), "references": [0.0, 10.0]})
    assert last(wide, fewer)[0] == "Pendulum-v1 from x/b-v0"  # another number of seeds: nothing over all
    assert last(wide)[0] == "Pendulum-v1 from x/a-v0"


def test_runs_on_two_recordings_of_one_name_are_not_put_together(tmp_path: Path) -> None:
    for name, seeds in (("1111", [0, 1]), ("2222", [2, 3])):
        folder = write_run(tmp_path / name, seeds, [1.0, 2.0, 3.0, 4.0], dataset="x/a-v0")
        records.write_json(folder / "config.json", {**records.read_json(folder / "config.json"), "source": name})
    with pytest.raises(UsageError, match="x/a-v0 was recorded again between these runs"):
        tables.comparison([tmp_path / "1111", tmp_path / "2222"])
    found = collection.collect(tmp_path)
    assert found.rows == [] and found.problems[-1].startswith("x/a-v0: recorded again between its runs")
    for name in ("1111", "2222"):  # the same of what a run that acts learned from beside
        config = records.read_json(tmp_path / name / "config.json")
        config["config"]["replay_from"] = config.pop("dataset")
        records.write_json(tmp_path / name / "config.json", config)
        result = records.read_json(tmp_path / name / "result.json")
        records.write_json(tmp_path / name / "result.json", {k: x for k, x in result.items() if k != "dataset"})
    with pytest.raises(UsageError, match="x/a-v0 was recorded again between these runs"):
        tables.comparison([tmp_path / "1111", tmp_path / "2222"])
    assert collection.collect(tmp_path).rows == []
    config = records.read_config(tmp_path / "1111")
    records.write_json(tmp_path / "1111" / "config.json", {k: x for k, x in config.items() if k != "source"})
    assert "| p3o" in tables.comparison([tmp_path / "1111", tmp_path / "2222"])  # of unknown content: as if the same


def test_what_restarts_environments_more_often_is_another_method(tmp_path: Path) -> None:
    """The ten of runs that do not say are the default, and two of a name are nobody's."""
    for name, seeds, more in (("a", [0, 1], {}), ("b", [2, 3], {"checkpoints": 10}), ("c", [4, 5], {"checkpoints": 1})):
        folder = write_run(tmp_path / name, seeds, [1.0, 2.0, 3.0, 4.0], replay_from="")
        config = records.read_json(folder / "config.json")
        records.write_json(folder / "config.json", {**config, "iterations": 20, **more})
    methods = {row.label: len(row.members) for row in collection.collect(tmp_path).rows}
    assert sorted(methods.values()) == [2, 2, 4, 4] and sum("checkpoints 1," in name for name in methods) == 2
    write_run(tmp_path / "d", [6, 7], [1.0, 2.0, 3.0, 4.0], replay_from="x/a-v0")
    shown = {collection.show(row.method, "replay_from") for row in collection.collect(tmp_path).rows}
    assert shown == {"none", "x/a-v0"}


def test_commands_are_recorded_as_given_in_this_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["ess-rl", "resume", str(tmp_path / "runs" / "a"), f"--out={tmp_path}/b", "--x", "/c"]
    )
    assert records.origin()["command"] == ["ess-rl", "resume", "runs/a", "--out=b", "--x", "/c"]


def test_training_return_and_seconds_by_hand(tmp_path: Path) -> None:
    # Steps 10, 20, ..., 100: only the last row lies beyond 90. Member 1 finished no episode in it.
    rows = [{"env_steps": 10 * i, "return_sum": [float(i), 5.0], "episodes": [1, 1]} for i in range(1, 10)]
    rows.append({"env_steps": 100, "return_sum": [30.0, 0.0], "episodes": [4, 0]})
    with open(tmp_path / "metrics.jsonl", "w") as file:
        for i, row in enumerate(rows, start=1):
            records.append_line(file, {"iteration": i, "phases": {"collect": 0.5, "update": float(i)}, **row})
    assert of_log(tmp_path) == {"training_return": [7.5, None], "seconds": {"collect": 5.0, "update": 55.0}}


def write_run(
    folder: Path, seeds: list[int], finals: list[float], backend: str = "torch", dataset: str = "", **settings: Any
) -> Path:
    """Two learning rates, each with these seeds."""
    task: dict[str, Any] = {"agent": "p3o", "env": "Pendulum-v1", "backend": backend, "seeds": seeds * 2}
    task |= {"dataset": dataset} if dataset else {}
    task["sweep"] = {"learning_rate": [1e-3] * len(seeds) + [1e-4] * len(seeds)}
    folder.mkdir()
    rest = {"format": records.FORMAT, "steps": 1000, "episodes": 2, "device": "cpu", "compiled": False}
    records.write_json(folder / "config.json", {**task, **rest, "config": {"learning_rate": 1.0, **settings}})
    returns = {"final_return": finals, "training_return": [1.0] * len(seeds) + [None] * len(seeds)}
    records.write_json(folder / "result.json", {**task, **returns, "env_steps": 1000, "steps_per_second": 10.0})
    return folder


def test_a_comparison_reads_files_without_torch(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", [0, 1], [1.0, 3.0, 10.0, 10.0])
    rows = tables.comparison([first]).splitlines()
    assert "p3o learning_rate 0.001" in rows[2] and "| 2.00 " in rows[2]  # IQM of 1 and 3
    assert "p3o learning_rate 0.0001" in rows[3] and "10.00 to 10.00" in rows[3]
    code = (
        "import sys; from pathlib import Path; from experiments.report import tables; "
        f"tables.comparison([Path({str(first)!r})]); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "False", done.stderr


def test_runs_that_differ_in_their_seeds_alone_are_one_row(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", [0, 1], [1.0, 3.0, 10.0, 10.0])
    second = write_run(tmp_path / "b", [2, 3], [5.0, 99.0, 10.0, 10.0])
    rows = tables.comparison([first, second]).splitlines()
    assert len(rows) == 4 and rows[2].split("|")[5:7] == [
        " 4     ",
        " 4.00  ",
    ]  # the IQM of 1, 3, 5, 99 is that of 3, 5
    with pytest.raises(UsageError, match="share seeds"):
        tables.comparison([first, first])
    elsewhere = write_run(tmp_path / "c", [0, 1], [1.0, 3.0, 10.0, 10.0], "gymnasium")
    assert len(tables.comparison([first, elsewhere]).splitlines()) == 6


def test_methods_named_by_letters_are_explained_below_the_table(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", [0], [1.0, 2.0])
    second = write_run(tmp_path / "b", [0], [3.0, 4.0], clip=0.1, rollout=256)  # three settings apart, of four methods
    scores, letters = tables.comparison([first, second]).split("\n\n")
    assert [row.split("|")[2].strip() for row in scores.splitlines()[2:]] == [f"p3o ({x})" for x in "dcba"]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in letters.splitlines()]
    assert rows[0] == ["agent", "clip", "learning_rate", "rollout"]
    assert rows[2] == ["p3o (a)", "0.1", "0.0001", "256"] and rows[5] == ["p3o (d)", "-", "0.001", "-"]


def test_a_picture_draws_them_as_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, list[float]]] = []
    for name, seeds, values, backend in [
        ("a", [0, 1], [1.0, 3.0, 9.0, 9.0], "torch"),
        ("b", [2], [8.0, 0.0], "torch"),
        ("c", [3], [7.0, 7.0], "gymnasium"),
    ]:
        run = write_run(tmp_path / name, seeds, values, backend)
        rows = [f"{steps},{m},{steps * x},,\n" for steps in (10, 20) for m, x in enumerate(values)]
        (run / "curves.csv").write_text("env_steps,member,return,ess,behavior_kl\n" + "".join(rows))

    true_plot = Axes.plot

    def plot(axis: Axes, x: Any, y: Any, label: str = "", **style: Any) -> None:
        drawn.extend([(label, list(y))] if label and len(y) else [])
        true_plot(axis, x, y, label=label, **style)

    monkeypatch.setattr(Axes, "plot", plot)
    figures.learning_curves([tmp_path / "a", tmp_path / "b"], tmp_path / "curves.png")
    assert drawn == [  # the means of 1, 3, 8 and of 9, 9, 0, times the steps
        ("p3o learning_rate 0.001 (3 seeds)", [40.0, 80.0]),
        ("p3o learning_rate 0.0001 (3 seeds)", [60.0, 120.0]),
    ]
    drawn.clear()
    figures.learning_curves([tmp_path / "a", tmp_path / "c"], tmp_path / "curves.png")
    assert [label for label, _ in drawn] == [
        f"p3o learning_rate {rate}, {where} seed{s})"
        for where, s in (("torch (2", "s"), ("gymnasium (1", "")) for rate in ("0.001", "0.0001")
    ]  # fmt: skip


def test_a_place_that_holds_something_else_is_not_published_to(tmp_path: Path) -> None:
    place = tmp_path / "published"
    for _ in range(2):  # what was published there may be published again
        records.prepare_published(place, ("a", "b"))
        (place / "a").write_text("")
    with pytest.raises(
        UsageError, match=r"published holds other files than what is to be published \(a\): choose another"
    ):
        records.prepare_published(place, ("b",))
    for name in "cde":
        (place / name).write_text("")
    with pytest.raises(UsageError, match=r"published \(c, d, e\)"):
        records.prepare_published(place, ("a",))
    with pytest.raises(UsageError, match=r"published \(a, c, d \.\.\.\)"):
        records.prepare_published(place, ())
    with pytest.raises(UsageError, match="is a file"):
        records.prepare_published(place / "a", ())


def test_options_come_from_the_config_and_its_remarks() -> None:
    from agents import AGENTS, OFFLINE_AGENTS

    for entry in (AGENTS | OFFLINE_AGENTS).values():
        assert all(options.remarks(entry.config).values()), "every field of a Config has its remark"
    for entry in AGENTS.values():
        kind = options.of_agent(entry.config)
        settings, sweep = options.split(entry.config, kind(env="Pendulum-v1"))
        assert entry.config(**settings) == entry.config() and not sweep
        settings, sweep = options.split(entry.config, kind(env="Pendulum-v1", learning_rate=(1e-3, 1e-4)))
        assert sweep == {"learning_rate": (1e-3, 1e-4)}


@dataclasses.dataclass(frozen=True)
class Own:
    """Of an agent of a user's own, which has some of the fields that the agents here have, and lacks others."""

    target_kl: float = 0.02  # of something of its own
    ess: str = "batch"  # the same
    segments: int = 4  # the same
    width: float = 1.0  # the same
    gp_points: int = 7  # the same


@dataclasses.dataclass(frozen=True)
class Splitting:
    split: float = 0.5


def test_an_agent_of_ones_own_may_have_fields_by_known_names() -> None:
    config = Own(target_kl=0.1, ess="minibatch", segments=8, width=0.5, gp_points=9)
    plan.check_acting(config, {"target_kl": [0.1, 0.2]})
    with pytest.raises(
        UsageError, match=r"Splitting: 'split' is the name of an option of every run: give the field an"
    ):
        options.of_agent(Splitting)


def test_published_results_are_whole() -> None:
    """Each published run can be read, and compared with itself; those of our own agents have ten seeds or more."""
    folder = Path(__file__).parents[2] / "experiments" / "results"
    runs = sorted(folder.rglob("result.json"))
    for path in runs:
        result = json.loads(path.read_text())
        assert len(result["seeds"]) == len(result["final_return"])
        assert len(set(result["seeds"])) >= 10 or result["agent"].startswith("sb3-"), path
        assert tables.comparison([path.parent])
