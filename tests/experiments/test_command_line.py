"""The program as a user meets it: what it answers to good and to bad input, and that it can be killed."""

import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from agents import AGENTS, OFFLINE_AGENTS, VARIANTS
from ess_rl.errors import LostProcessError
from experiments import __main__, records
from experiments import run as experiments_run
from experiments.datasets import commands

SMALL = ["--num-envs", "4", "--rollout", "64", "--epochs", "2", "--minibatch", "64", "--hidden", "8", "8"]
QUICK = [*SMALL, "--compile", "off", "--episodes", "2"]


def apart(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess:
    """The program as it is, a process of its own: seconds, for it imports torch."""
    return subprocess.run(
        [sys.executable, "-m", "experiments", *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(),
    )


def ess_rl(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess:
    """The same in this process, which has imported torch already."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ess-rl", *map(str, words)])
        patch.chdir(cwd)
        try:
            __main__.main()
        except SystemExit as ended:
            status = int(ended.code or 0)
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


def environment() -> dict[str, str]:
    root = Path(__file__).parents[2]
    return {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}


def refused(*words: str | Path, cwd: Path) -> str:
    return the_line(ess_rl(*words, cwd=cwd))


def the_line(done: subprocess.CompletedProcess) -> str:
    """The one line of a refusal."""
    assert done.returncode == 2, done
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run: two seeds times two clip ranges."""
    folder = tmp_path_factory.mktemp("finished")
    done = ess_rl(
        "train", "ppo", "--env", "Pendulum-v1", "--clip", "0.1", "0.3", "--seeds", "2", "--seed0", "5",
        "--steps", "6000", "--checkpoints", "2", "--out", "run", *QUICK, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_a_run_leaves_its_files(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    assert result["agent"] == "ppo" and result["env"] == "Pendulum-v1" and result["backend"] == "torch"
    assert result["seeds"] == [5, 6, 5, 6]
    assert result["sweep"] == {"clip": [0.1, 0.1, 0.3, 0.3]}
    assert result["env_steps"] == 6144  # 24 iterations of 4 x 64, the first number of them that is not below 6000
    assert len(result["final_return"]) == len(result["training_return"]) == 4
    assert all(-2000 < score < 0 for score in result["final_return"])
    assert result["steps_per_second"] > 0 and result["versions"]["torch"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == list(range(1, 25))
    assert {"return_sum", "episodes", "ess", "behavior_kl", "clipped_fraction", "log_ratio_max"} <= rows[-1].keys()
    assert all(len(row["ess"]) == 4 for row in rows[1:])
    # An episode is 200 steps of 4 environments; a fresh start every 13 iterations (832 steps) leaves room for 4.
    assert sum(row["episodes"][0] for row in rows) == 4 * (4 + 3)
    assert (run / "curve.png").stat().st_size > 10_000
    assert any((run / "tensorboard").iterdir())
    assert len(list((run / "checkpoints").glob("*.safetensors"))) == 2


def test_evaluation_repeats_the_final_one(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    done = ess_rl("evaluate", run, "--episodes", "2", cwd=run.parent)
    assert done.returncode == 0, done.stderr
    for score in result["final_return"]:
        assert f"{score:.1f}" in done.stdout
    other = ess_rl("evaluate", run, "--episodes", "2", "--seed", "1", cwd=run.parent)
    assert f"{result['final_return'][0]:.1f}" not in other.stdout
    assert "--episodes 0: must be at least 1" in refused("evaluate", run, "--episodes", "0", cwd=run.parent)
    assert "different numbers from 0" in refused("evaluate", run, "--seed", str(2**64), cwd=run.parent)
    assert "--steps 0: must be at least 1" in refused("play", run, "--steps", "0", cwd=run.parent)
    older = shutil.copytree(run, run.parent / "older")
    config = json.loads((older / "config.json").read_text())
    del config["config"]["target_kl"]  # as of a version whose agent had no such number
    (older / "config.json").write_text(json.dumps(config))
    assert "no 'target_kl', which ppo has by now: evaluate it with" in refused("evaluate", older, cwd=run.parent)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is a file on a full disk on Linux alone")
def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*_: object) -> None:
        with open("/dev/full", "w") as file:
            file.write("a row of metrics")

    monkeypatch.setattr(experiments_run, "log", write)
    how = ["--env", "Pendulum-v1", "--steps", "1024", "--out", "run", *QUICK]
    line = refused("train", "ppo", *how, cwd=tmp_path)
    assert line.startswith("ess-rl: the disk is full: make room, then 'ess-rl resume RUN' continues a run")


def test_compare_and_lists(run: Path) -> None:
    (run.parent / "study.json").write_text("{}")  # DIR/* names it too
    done = ess_rl("compare", run, "study.json", "--out", "picture.png", cwd=run.parent)
    assert "ppo clip 0.1" in done.stdout and "ppo clip 0.3" in done.stdout and "95 % interval" in done.stdout
    assert (run.parent / "picture.png").exists()
    listed = ess_rl("agents", cwd=run.parent).stdout
    assert {*AGENTS, *OFFLINE_AGENTS} <= {line.split(" ")[0] for line in listed.splitlines()}
    assert all(f"\n{variant} " in listed for variant in VARIANTS)
    assert "HalfCheetah-v5" in ess_rl("envs", cwd=run.parent).stdout
    assert "ess-rl envs takes no arguments: leave out ess-rl agents" in refused(
        "envs", "ess-rl", "agents", cwd=run.parent
    )
    assert "resume" in ess_rl(cwd=run.parent).stdout


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_other_methods_that_are_listed_are_options(variant: str, tmp_path: Path) -> None:
    words = variant.replace(" G", " 4").split()
    assert "HalfCheeta-v5" in refused("train", *words, "--env", "HalfCheeta-v5", cwd=tmp_path)


def test_resuming_a_finished_run_changes_nothing(run: Path) -> None:
    before = (run / "result.json").read_bytes()
    done = ess_rl("resume", run, cwd=run.parent)
    assert done.returncode == 0 and "is finished" in done.stdout
    assert (run / "result.json").read_bytes() == before


def test_bad_names_get_the_nearest_ones(tmp_path: Path) -> None:
    assert "did you mean train" in the_line(apart("trian", cwd=tmp_path))
    assert "did you mean ppo" in refused("train", "pppo", "--env", "Pendulum-v1", cwd=tmp_path)
    assert "Pendulum-v1" in refused("train", "ppo", "--env", "Pendulun-v1", *QUICK, cwd=tmp_path)
    assert "name an agent" in refused("train", cwd=tmp_path)
    done = ess_rl("train", "ppo", "--env", "Pendulum-v1", "--stepz", "10", cwd=tmp_path)
    assert done.returncode == 2 and "--steps" in done.stderr
    assert not list(tmp_path.iterdir())


def test_bad_values_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    def no(*words: str) -> str:
        return refused(*words, cwd=tmp_path)

    train = ["train", "p3o", "--env", "Pendulum-v1", "--out", "run", "--compile", "off"]
    assert "Discrete" in no("train", "p3o", "--env", "CartPole-v1", "--out", "run")
    assert "does not divide" in no(*train, "--minibatch", "100")
    assert "raise --steps" in no(*train, "--steps", "2048")
    assert "--seeds -1: must be at least 1" in no(*train, "--seeds", "-1")
    assert "--log-std nan: must be a finite number" in no(*train, "--log-std", "nan")
    assert "--cap -1: must be above 0" in no(*train, "--cap", "-1")
    assert "--lambda 0.95 0.95: equal values" in no(*train, "--lambda", "0.95", "0.95")
    assert "no_such_module cannot be imported" in no("train", "p3o", "--env", "no_such_module:X-v0")
    bounded = ["train", "bpo", "--env", "Pendulum-v1", "--out", "run", "--compile", "off", "--clip"]
    assert "clip 1.5: must lie between 0 and 1" in no(*bounded, "0.3", "1.5")
    assert "give --env ID beside it" in no("train", "p3o", "--dataset", "ess/hopper/medium-v0")
    assert "at least 1" in no(*train, "--seeds", "0")
    assert "at least 1" in no(*train, "--num-envs", "0")
    assert "from 0 to" in no(*train, "--seed0", "-3")
    assert "finite number" in no(*train, "--learning-rate", "nan")
    assert "finite number" in no(*train, "--discount", "0.9", "inf")
    assert "twice" in no(*train, "--discount", "0.99", "0.99")
    assert "--hidden" in no(*train, "--hidden", "0")
    assert "at least 2" in no(*train, "--minibatch", "1")
    assert "CUDA" in no(*train, "--device", "cuda")
    assert "--replay -1: must be 0 or more" in no(*train, "--replay", "-1")
    assert "--save-replay -1: must be 0 or more" in no(*train, "--save-replay", "-1")
    assert "nor a run folder that holds replay.safetensors" in no(*train, "--replay", "1", "--replay-from", "nowhere")
    assert "--lag -2: must be 0 or more" in no(*train, "--lag", "-2")
    assert "--sync-interval 0: must be at least 1" in no(*train, "--sync-interval", "0")
    assert "--behavior-temperature 0: must be above 0" in no(*train, "--behavior-temperature", "1", "0")
    assert "--keep-ess 1.1: must be from 0 to below 1" in no(*train, "--keep-ess", "1.1")
    assert "backend" in no(*train, "--backend", "envpool")
    assert "Pendulum-v1 has no hint states to start from; those that can" in no(*train, "--hints", "8")
    assert "cannot be staggered" in no(*train, "--starts", "staggered", "--backend", "gymnasium")
    groups = ["train", "tba_group", "--out", "run", "--compile", "off", "--env"]
    assert "Reacher-v5 (backend" in (said := no(*groups, "Reacher-v5")) and "those that can, in torch: Pend" in said
    assert "may end an episode before its time limit" in no(*groups, "ess/Acrobot-v0")
    arm = no(*groups, "ess/TwoLinkArm-v0")
    assert "rollout 200: with groups it must be a whole episode, of 100 steps for ess/TwoLinkArm-v0" in arm
    assert "groups of 5 do not divide 16 environments" in no(*groups, "Pendulum-v1", "--group", "5")
    assert "it takes at least 2, and a divisor" in no(*groups, "Pendulum-v1", "--group", "1")
    assert "tba_group cannot learn from a data set" in no(*groups, "Pendulum-v1", "--dataset", "ess/pendulum/any-v0")
    car = ["train", "ppo", "--env", "ess/MountainCarContinuousSparse-v0", "--out", "run", "--compile", "off"]
    assert "groups of 5 do not divide 16 environments" in no(*car, "--hints", "5")
    assert "staggered starts would separate the environments of a group" in no(
        *car, "--hints", "8", "--starts", "staggered"
    )
    assert "hints 8 with replay 2: replayed steps are not marked" in no(*car, "--hints", "8", "--replay", "2")
    assert "--hints -1: must be 0 or more" in no(*car, "--hints", "-1")
    assert "--hint-lambda -1: must be 0 or more" in no(*car, "--hint-lambda", "-1")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_refused(run: Path, tmp_path: Path) -> None:
    train = ["train", "p3o", "--env", "Pendulum-v1", "--steps", "1000", *QUICK]
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    assert "--overwrite" in refused(*train, "--out", copy, cwd=tmp_path)
    assert (copy / "result.json").read_bytes() == (run / "result.json").read_bytes()
    assert ess_rl(*train, "--out", copy, "--overwrite", cwd=tmp_path).returncode == 0
    assert json.loads((copy / "result.json").read_text())["agent"] == "p3o"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    (tmp_path / "mine" / "config.json").write_text('{"name": "somebody else\'s"}')
    assert "holds no run" in refused(*train, "--out", tmp_path / "mine", "--overwrite", cwd=tmp_path)
    assert (tmp_path / "mine" / "thesis.txt").exists()
    (tmp_path / "begun").mkdir()  # a start that was cut short, while it copied what the run begins with
    for name in ("replay-from.safetensors.part", "demonstrations.safetensors.part.part", ".tmp1234"):
        (tmp_path / "begun" / name).write_bytes(b"half")
    assert ess_rl(*train, "--out", tmp_path / "begun", cwd=tmp_path).returncode == 0
    (copy / "notes.txt").write_text("kept")
    assert ess_rl(*train, "--out", copy, "--overwrite", cwd=tmp_path).returncode == 0
    assert (copy / "notes.txt").exists()


def test_a_run_that_is_being_trained_is_left_alone(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    with records.alone(tmp_path / "run"):
        assert "another process" in refused("resume", "run", cwd=tmp_path)
        train = ["train", "p3o", "--env", "Pendulum-v1", "--out", "run", "--overwrite", *QUICK]
        assert "another process" in refused(*train, cwd=tmp_path)
    assert (tmp_path / "run" / "result.json").exists()
    assert ess_rl("resume", "run", cwd=tmp_path).returncode == 0


def test_places_that_cannot_be_are_one_line(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "no such run folder" in refused("resume", "file", cwd=tmp_path)
    assert "file" in refused("evaluate", "file", cwd=tmp_path)
    assert "must end in .png" in refused("compare", run, "--out", "curves.txt", cwd=tmp_path)
    assert "is a run folder, and no place" in refused("study", "ablations", "--quick", "--out", run, cwd=tmp_path)
    assert "lies in the run folder" in refused("publish", run, run / "published", cwd=tmp_path)
    assert "file is a file, and no run folder" in refused("compare", "file", cwd=tmp_path)
    assert ess_rl("publish", run, "published", cwd=tmp_path).returncode == 0
    assert ess_rl("resume", "published", cwd=tmp_path).returncode == 0  # which leaves a lock there
    assert ess_rl("publish", run, "published", cwd=tmp_path).returncode == 0
    assert "published/result.json trains it again" in refused("evaluate", "published", cwd=tmp_path)
    (tmp_path / "published" / "report.md").write_text("notes of somebody")
    assert "was not written by 'ess-rl report'" in refused("report", "published", cwd=tmp_path)
    assert (tmp_path / "published" / "report.md").read_text() == "notes of somebody"


def test_damaged_files_are_refused(run: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        shutil.copytree(run, tmp_path / name)
        (tmp_path / name / "result.json").unlink()
        return tmp_path / name

    cut = copy("cut")
    newest = max((cut / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:-100])
    line = refused("resume", cut, cwd=tmp_path)
    assert newest.name in line and "damaged" in line and "remove it" in line
    newest.unlink()
    assert ess_rl("resume", cut, cwd=tmp_path).returncode == 0  # the remedy works

    foreign = copy("foreign")
    config = json.loads((foreign / "config.json").read_text())
    config["seeds"] = [7, 8, 7, 8]
    (foreign / "config.json").write_text(json.dumps(config))
    assert "another run" in refused("resume", foreign, cwd=tmp_path)

    misfit = copy("misfit")
    config = json.loads((misfit / "config.json").read_text())
    config["config"]["hidden"] = [16, 16]
    (misfit / "config.json").write_text(json.dumps(config))
    assert "does not fit the configuration" in refused("resume", misfit, cwd=tmp_path)
    config["config"]["clipp"] = 0.2
    (misfit / "config.json").write_text(json.dumps(config))
    assert "does not fit this version" in refused("resume", misfit, cwd=tmp_path)
    (misfit / "config.json").write_text("{")
    assert "not valid JSON" in refused("resume", misfit, cwd=tmp_path)
    assert "no such file" in refused("evaluate", tmp_path / "nothing", cwd=tmp_path)


def test_a_run_killed_anywhere_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """SIGKILL before the first checkpoint, of iteration 13, and after it: every number but the clock is as without."""
    words = [
        "train", "p3o", "--env", "Pendulum-v1", "--seeds", "2", "--steps", "8000", "--checkpoints", "6", *QUICK,
    ]  # fmt: skip
    assert apart(*words, "--out", "whole", cwd=tmp_path).returncode == 0
    dice, killed = random.Random(0), tmp_path / "killed"
    command = [*words, "--out", "killed"]
    for iteration in (3, 9, 18):
        process = subprocess.Popen(
            [sys.executable, "-m", "experiments", *command],
            cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment(),
        )  # fmt: skip
        deadline = time.monotonic() + 300
        while process.poll() is None and _iterations(killed) < iteration and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(dice.uniform(0.0, 0.3))
        assert process.stderr is not None
        assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert _iterations(killed) >= iteration
        command = ["resume", "killed"]
    done = apart(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("whole", "killed"):
        assert (tmp_path / name / "result.json").exists()
    newest = [max((tmp_path / name / "checkpoints").iterdir()) for name in ("whole", "killed")]
    assert newest[0].name == newest[1].name and newest[0].read_bytes() == newest[1].read_bytes()
    for mine, other in zip(*(_rows(tmp_path / name) for name in ("whole", "killed")), strict=True):
        assert mine == other
    scores = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "killed")]
    assert scores[0]["final_return"] == scores[1]["final_return"]
    assert scores[0]["training_return"] == scores[1]["training_return"]


def _iterations(run: Path) -> int:
    row = records.last_metrics(run)
    return row["iteration"] if row else 0


def _rows(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in ("seconds", "phases")} for row in rows]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    ],
)
def test_too_little_memory_is_one_line(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(arguments: list[str]) -> None:
        raise error

    monkeypatch.setitem(__main__.COMMANDS, "agents", fails)
    done = ess_rl("agents", cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("ess-rl: out of memory (") and "'ess-rl resume RUN' continues a run" in done.stderr
    error = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        ess_rl("agents", cwd=tmp_path)


def test_a_lost_process_exits_with_a_status_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(arguments: list[str]) -> None:
        raise LostProcessError("the process that collects was ended by signal 9; 'ess-rl resume RUN' continues")

    monkeypatch.setitem(__main__.COMMANDS, "agents", fails)
    done = ess_rl("agents", cwd=tmp_path)
    assert done.returncode == 4
    assert done.stderr == "ess-rl: the process that collects was ended by signal 9; 'ess-rl resume RUN' continues\n"


def test_a_package_that_stands_before_ours_is_named(tmp_path: Path) -> None:
    (tmp_path / "envs").mkdir()
    (tmp_path / "envs" / "__init__.py").touch()
    command = [sys.executable, "-c", "from experiments.__main__ import main; main()", "agents"]
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f"the package 'envs' is not the suite's but another one, {tmp_path / 'envs'}" in done.stderr


COMMANDS_WITH_OPTIONS = [
    ["quickstart"], ["train", "p3o"], ["train", "iql"], ["train", "sb3-ppo"], ["train", "d3rlpy-iql"], ["resume"],
    ["evaluate"], ["play"], ["compare"], ["report"], ["publish"], ["benchmark"], ["study"], ["throughput"],
    ["throughput", "--dataset", "ess/x-v0"], ["gpu"], *(["dataset", name] for name in commands.COMMANDS),
]  # fmt: skip


@pytest.mark.parametrize("words", COMMANDS_WITH_OPTIONS, ids=" ".join)
def test_help_says_something_of_every_option(words: list[str], tmp_path: Path):
    said = ess_rl(*words, "--help", cwd=tmp_path)
    assert said.returncode == 0, said
    text = " ".join(re.sub("[╭╮╰╯│─]", " ", said.stdout).split())
    options = re.split(r" (?=--(?!no-)[a-z])", text.partition("show this help message and exit")[2])[1:]
    assert options or words in (["dataset", "list"], ["dataset", "score"]), text
    for option in options:
        told = re.sub(r"--\S+|\{[^}]*\}|\[[^]]*\]|\(default.*|\(required.*", " ", option)
        assert re.search(r"[a-z]{2}", told), option
