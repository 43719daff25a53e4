"""Data sets in and out: what goes in comes back, and what is wrong is said in one line. All are made here, in small."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import numpy as np
import pytest
import torch
from gymnasium import spaces
from minari.data_collector.episode_buffer import EpisodeBuffer
from minari.dataset.minari_storage import MinariStorage

from envs import d4rl, minari_data, minari_env, minari_write
from envs.minari_write import Episode
from ess_rl import behavior
from ess_rl.errors import UsageError

QUICK = behavior.Config(hidden=(8,), max_updates=20, check_every=10, minibatch=16)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "sets"))
    return tmp_path / "sets"


def episode(steps: int, seed: int = 0, *, terminated: bool = False, obs_dim: int = 3, act_dim: int = 1) -> Episode:
    draw = np.random.default_rng(seed)
    last = np.arange(steps) == steps - 1
    return Episode(
        draw.normal(size=(steps + 1, obs_dim)).astype(np.float32),
        draw.normal(size=(steps, act_dim)).astype(np.float32),  # some beyond the bounds
        draw.normal(size=steps).astype(np.float32),
        last & terminated,
        last & (not terminated),
        draw.normal(size=(steps, act_dim)).astype(np.float32),
        draw.normal(size=(steps, act_dim)).astype(np.float32),
    )


def write_raw(
    name: str, buffers: list[EpisodeBuffer], obs_space: spaces.Space, action_space: spaces.Space, **metadata: Any
) -> None:
    """A set by Minari's own means, with whatever is in it."""
    folder = minari_data.root() / name / "data"
    folder.mkdir(parents=True)
    storage = MinariStorage.new(folder, obs_space, action_space)
    storage.update_episodes(buffers)
    storage.update_metadata({"dataset_id": name, "minari_version": "0.5.4", **metadata})


def buffer(steps: int = 4, **changes: Any) -> EpisodeBuffer:
    plain: dict[str, Any] = {
        "observations": np.zeros((steps + 1, 2), np.float32), "actions": np.zeros((steps, 1), np.float32),
        "rewards": np.zeros(steps), "terminations": np.zeros(steps, bool), "truncations": np.arange(steps) == steps - 1,
    }  # fmt: skip
    return EpisodeBuffer(**(plain | changes))


OBS, ACTION = spaces.Box(-np.inf, np.inf, (2,), np.float32), spaces.Box(-2.0, 6.0, (1,), np.float32)


def refusal(name: str) -> str:
    with pytest.raises(UsageError) as error:
        minari_data.load(name, fit=QUICK)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_written_comes_back_bit_for_bit():
    made = [episode(5, 0), episode(3, 1, terminated=True), episode(7, 2)]
    minari_write.write("ess/pendulum/made-v0", "Pendulum-v1", made, {"ref_min_score": -1200.0, "ref_max_score": -150.0})
    data = minari_data.load("ess/pendulum/made-v0")
    d = data.transitions
    for mine, name in [("action", "action"), ("reward", "reward"), ("terminated", "terminated")] + [
        (x, x) for x in ("truncated", "behavior_mean", "behavior_log_std")
    ]:
        expected = np.concatenate([getattr(one, mine) for one in made])
        assert np.array_equal(getattr(d, name).numpy(), expected), name
    assert np.array_equal(d.obs.numpy(), np.concatenate([one.obs[:-1] for one in made]))
    assert np.array_equal(d.next_obs.numpy(), np.concatenate([one.obs[1:] for one in made]))
    assert data.starts.tolist() == [0, 5, 8] and data.cut == 0 and data.recorded_behavior
    assert data.references == (-1200.0, -150.0) and d.version.tolist() == [-1] * 15
    goes_on = ~d.last[:-1]
    assert torch.equal(d.next_obs[:-1][goes_on], d.obs[1:][goes_on])  # the law of every source
    assert minari_env.task_of(data.metadata) == ("Pendulum-v1", {}, None)


def test_others_read_what_we_write():
    import minari
    from minari.namespace import list_local_namespaces

    minari_write.write("ess/pendulum/made-v0", "Pendulum-v1", [episode(5)], {"description": "five steps"})
    data = minari.load_dataset("ess/pendulum/made-v0")
    one = data[0]
    # Actions as the environment got them: clipped, and from [-1, 1] to Pendulum's +-2.
    assert np.allclose(one.actions, 2.0 * np.clip(episode(5).action, -1.0, 1.0))
    assert data.action_space.contains(one.actions[0]) and one.infos.keys() >= {"behavior_mean", "behavior_log_std"}
    assert data.env_spec is not None and data.env_spec.id == "Pendulum-v1"
    assert "ess/pendulum" in list_local_namespaces()


def test_actions_are_scaled_and_ends_kept_apart():
    actions = np.array([[-2.0], [2.0], [6.0], [4.0]], np.float32)  # of [-2, 6]: -1, 0, 1, 0.5
    ends = {"terminations": np.array([0, 0, 0, 1], bool), "truncations": np.zeros(4, bool)}
    write_raw("a-v0", [buffer(actions=actions, **ends), buffer(truncations=np.zeros(4, bool))], OBS, ACTION)
    data = minari_data.load("a-v0", fit=QUICK)
    assert data.transitions.action[:4, 0].tolist() == [-1.0, 0.0, 1.0, 0.5]
    assert data.transitions.terminated.nonzero().tolist() == [[3]]
    assert data.transitions.truncated.nonzero().tolist() == [[7]] and data.cut == 1  # the flag that was missing
    assert minari_env.task_of(data.metadata) is None


def test_a_fitted_model_stands_in_for_an_unrecorded_behavior(monkeypatch: pytest.MonkeyPatch):
    write_raw("a-v0", [buffer(), buffer(), buffer()], OBS, ACTION)
    said: list[str] = []
    data = minari_data.load("a-v0", fit=QUICK, say=said.append)
    assert not data.recorded_behavior and data.transitions.behavior_mean.shape == (12, 1)
    assert len(said) == 3 and "nats; its std is at the floor in 0.0% of the states" in said[2]
    monkeypatch.setattr(behavior, "fit", lambda *_, **__: pytest.fail("fitted twice"))
    again = minari_data.load("a-v0", fit=QUICK, say=said.append)
    assert len(said) == 3 and torch.equal(again.transitions.behavior_mean, data.transitions.behavior_mean)
    unfitted = minari_data.load("a-v0", fit=dataclasses.replace(QUICK, max_updates=9), needs_behavior=False)
    assert unfitted.transitions.behavior_mean.isnan().all() and not unfitted.recorded_behavior


def test_columns_of_one_number_a_step_lose_their_second_axis():
    """[T, 1], as a replay buffer may have them: broadcast against [T] they would give targets of [T, T]."""
    columns: dict[str, Any] = {name: np.zeros((4, 1), bool) for name in ("terminations", "truncations")}
    columns["rewards"] = np.arange(4.0)[:, None]
    write_raw("a-v0", [buffer(**columns)], OBS, ACTION)
    data = minari_data.load("a-v0", fit=QUICK, needs_behavior=False).transitions
    assert data.reward.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert data.terminated.shape == (4,) and data.truncated.tolist() == [False, False, False, True]


def test_another_folder_among_the_sets_is_named(home: Path):
    (home / ".half" / "written" / "data").mkdir(parents=True)
    assert minari_data.local() == {}
    (home / "hopper-backup" / "data").mkdir(parents=True)
    for function in (minari_data.local, lambda: minari_data.metadata_of("ess/nothere-v0")):
        with pytest.raises(UsageError, match=r"hopper-backup is not named as a data set, NAME-v0: rename it, or"):
            function()


def test_a_set_that_changed_is_flattened_again():
    minari_write.write("a-v0", "Pendulum-v1", [episode(5, 0)], {})
    first = minari_data.load("a-v0")
    with pytest.raises(UsageError, match="exists already"):
        minari_write.write("a-v0", "Pendulum-v1", [episode(5, 1)], {})
    minari_write.write("a-v0", "Pendulum-v1", [episode(5, 1)], {}, overwrite=True)
    second = minari_data.load("a-v0")
    assert first.source != second.source and not torch.equal(first.transitions.obs, second.transitions.obs)
    assert list(minari_data.local()) == ["a-v0"]  # the cache is hidden from Minari
    kept = list((minari_data.root() / minari_data.CACHE).iterdir())
    assert [path.name for path in kept] == [f"a-v0-{second.source}"]  # of what it held before, nothing stays


def test_sets_of_like_names_keep_what_is_cached_of_each():
    for name in ("mine/sub/x-v0", "mine/sub-x-v0"):
        minari_write.write(name, "Pendulum-v1", [episode(5, 0)], {})
        minari_data.load(name)
    assert len(list((minari_data.root() / minari_data.CACHE).iterdir())) == 2


def test_files_that_stay_are_read_once_for_their_hash(monkeypatch: pytest.MonkeyPatch):
    minari_write.write("a-v0", "Pendulum-v1", [episode(5, 0)], {})
    first = minari_data.load("a-v0")
    with monkeypatch.context() as blind:
        blind.setattr(minari_data.hashlib, "file_digest", lambda *_: pytest.fail("read again"))
        assert minari_data.load("a-v0").source == minari_data._cached("a-v0", False, print)[1] == first.source
    path = minari_data.root() / "a-v0" / "data" / "metadata.json"
    path.write_text(path.read_text() + " ")
    assert minari_data.load("a-v0").source != first.source


def test_observations_of_dictionaries_are_flattened_by_name():
    space = spaces.Dict(
        {"goal": spaces.Box(-1.0, 1.0, (2,)), "at": spaces.Tuple([spaces.Box(-1.0, 1.0, ()), spaces.Discrete(3)])}
    )
    values = [space.sample() for _ in range(5)]
    observations = {
        "goal": np.stack([v["goal"] for v in values]),
        "at": (np.stack([v["at"][0] for v in values]), np.stack([v["at"][1] for v in values])),
    }
    write_raw("a-v0", [buffer(observations=observations)], space, ACTION)
    data = minari_data.load("a-v0", fit=QUICK)
    assert data.obs_names == ("at/0/0", "at/1/is 0", "at/1/is 1", "at/1/is 2", "goal/0", "goal/1")
    expected = np.stack(
        [np.asarray(spaces.flatten(space, v)) for v in values]
    )  # Gymnasium's own order, which environments have
    assert np.allclose(data.transitions.obs.numpy(), expected[:-1])
    assert np.allclose(data.transitions.next_obs.numpy(), expected[1:])


def test_what_cannot_be_used_is_refused_in_one_line(home: Path):
    minari_write.write("ess/here-v0", "Pendulum-v1", [episode(2)], {})
    missing = refusal("mujoco/hopper/medium-v0")
    assert "ess/here-v0" in missing and "--download" in missing
    assert "not a name of a data set" in refusal("../etc/passwd")
    write_raw("discrete-v0", [buffer(actions=np.zeros(4, int))], OBS, spaces.Discrete(2))
    assert "Discrete(2)" in refusal("discrete-v0")
    write_raw("empty-v0", [buffer()], OBS, ACTION)
    with h5py.File(home / "empty-v0" / "data" / "main_data.hdf5", "a") as file:
        for name in ("rewards", "terminations", "truncations", "actions"):
            del file[f"episode_0/{name}"]
            file[f"episode_0/{name}"] = np.zeros((0, 1) if name == "actions" else 0)
    assert "episode 0 has no step" in refusal("empty-v0")
    rewards = np.array([0.0, 0.0, np.nan, 0.0])
    write_raw("nan-v0", [buffer(), buffer(rewards=rewards)], OBS, ACTION)
    assert "reward is not a finite number in episode 1, step 2" in refusal("nan-v0")
    short = buffer(observations=np.zeros((4, 2), np.float32))
    write_raw("short-v0", [short], OBS, ACTION)
    assert "4 steps and 4 observations" in refusal("short-v0")
    write_raw("wide-v0", [buffer()], OBS, spaces.Box(-np.inf, np.inf, (1,), np.float32))
    assert "bounds" in refusal("wide-v0")
    (home / "here-v0" / "data").mkdir(parents=True)
    (home / "here-v0" / "data" / "metadata.json").write_text(json.dumps({"observation_space": "", "action_space": ""}))
    assert "cannot be read" in refusal("here-v0")
    (home / "here-v0" / "data" / "metadata.json").write_text('{"observation_space": ')
    assert "cannot be read: its metadata.json is damaged" in refusal("here-v0")
    one = buffer(
        observations=np.zeros((2, 2), np.float32), actions=np.zeros((1, 1), np.float32), rewards=np.zeros(1),
        terminations=np.ones(1, bool), truncations=np.zeros(1, bool),
    )  # fmt: skip
    write_raw("single-v0", [one], OBS, ACTION)
    assert "no model of it can be fitted: 1 transitions" in refusal("single-v0")


def spec_of(**changes: Any) -> dict[str, Any]:
    return {"dataset_id": "x-v0", "env_spec": json.dumps(json.loads(gymnasium.spec("Hopper-v5").to_json()) | changes)}


def test_an_env_spec_imports_nothing_that_is_not_registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "evil.py").write_text("import pathlib; pathlib.Path('imported').touch()")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    wrapper = {"name": "W", "entry_point": "evil:W", "kwargs": {}}
    bad = [
        spec_of(id="Evil-v0", entry_point="evil:Env"),
        spec_of(id="evil:Hopper-v5"),
        spec_of(additional_wrappers=[wrapper]),
    ]
    for metadata in bad:
        with pytest.raises(UsageError, match="--trust-env-spec"):
            minari_env.task_of(metadata)
        assert not minari_env.is_safe(metadata)
    # What is registered under the id is what is made, whatever the spec says, and Minari is not let near it.
    other = spec_of(entry_point="evil:Env")
    assert minari_env.task_of(other) == ("Hopper-v5", {}, None) and not minari_env.is_safe(other)
    assert minari_env.is_safe(spec_of())
    assert minari_env.task_of(spec_of(max_episode_steps=50, kwargs={"frame_skip": 2})) == (
        "Hopper-v5", {"frame_skip": 2, "max_episode_steps": 50}, None,
    )  # fmt: skip
    trusted = minari_env.task_of(bad[0], trust=True)
    assert trusted is not None and trusted.env_id == "trusted/Evil-v0" and trusted.env_id in gymnasium.registry
    with pytest.raises(UsageError, match="cannot be read"):
        minari_env.task_of({"env_spec": "{"})
    assert not (tmp_path / "imported").exists()


def test_a_set_without_spaces_is_not_made_by_unknown_code(home: Path):
    write_raw("a-v0", [buffer()], OBS, ACTION)
    path = home / "a-v0" / "data" / "metadata.json"
    metadata = json.loads(path.read_text()) | spec_of(id="Evil-v0", entry_point="evil:Env")
    path.write_text(json.dumps({key: value for key, value in metadata.items() if not key.endswith("space")}))
    assert "recorded no spaces" in refusal("a-v0")
    assert not any(minari_env.is_safe({"env_spec": text}) for text in ("nonsense", "{}", "[]"))


def test_a_download_without_internet_says_so(monkeypatch: pytest.MonkeyPatch):
    import minari

    def unreachable(dataset_id: str) -> None:
        raise ConnectionError("no\nroute to host")

    monkeypatch.setattr(minari, "download_dataset", unreachable)
    with pytest.raises(
        UsageError, match=r"ess/nowhere-v0 cannot be downloaded, is there internet\? \(ConnectionError: no"
    ):
        minari_data.download("ess/nowhere-v0")


def test_a_set_that_could_not_be_replaced_is_still_there(home: Path, monkeypatch: pytest.MonkeyPatch):
    minari_write.write("ess/made-v0", "Pendulum-v1", [episode(5)], {})
    before, rename = minari_data.load("ess/made-v0").transitions, Path.rename

    def fails(self: Path, target: Path) -> Path:
        if self.parent.name.startswith(".recording-") and self.name == "data":  # the new one, to its place
            raise OSError("disk full")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fails)
        with pytest.raises(OSError, match="disk full"):
            minari_write.write("ess/made-v0", "Pendulum-v1", [episode(3)], {}, overwrite=True)
    assert list(home.glob(".recording-*")) == [] and list(minari_data.local()) == ["ess/made-v0"]
    assert torch.equal(minari_data.load("ess/made-v0").transitions.obs, before.obs)
    # Killed at that moment instead: the next that is written brings it back.
    left = home / f"{minari_write._PART}{2**22 + 1}"  # beyond the largest number of a process
    (left / "old" / "ess").mkdir(parents=True)
    (home / "ess" / "made-v0").rename(left / "old" / "ess" / "made-v0")
    with pytest.raises(UsageError, match="exists already"):
        minari_write.write("ess/made-v0", "Pendulum-v1", [episode(3)], {})
    assert torch.equal(minari_data.load("ess/made-v0").transitions.obs, before.obs)


def test_a_behavior_is_recorded_where_the_sampled_actions_are():
    """Else the density at a bound, where an action was clipped, would be taken as that of the action."""
    acted = {"behavior_mean": np.zeros((4, 1), np.float32), "behavior_log_std": np.zeros((4, 1), np.float32)}
    inside, at_bound = np.full((4, 1), 4.0, np.float32), np.array([[4.0], [6.0], [4.0], [4.0]], np.float32)
    sampled = {"sampled_action": np.full((4, 1), 1.5, np.float32)}
    write_raw("a-v0", [buffer(infos=acted, actions=inside)], OBS, ACTION)
    write_raw("b-v0", [buffer(infos=acted, actions=inside), buffer(infos=acted, actions=at_bound)], OBS, ACTION)
    write_raw("c-v0", [buffer(infos=acted | sampled, actions=at_bound), buffer(actions=inside)], OBS, ACTION)
    a, b, c = (minari_data.load(name, fit=QUICK) for name in ("a-v0", "b-v0", "c-v0"))
    assert [x.recorded_behavior for x in (a, b, c)] == [True, False, False]
    assert a.transitions.action[:, 0].tolist() == [0.5] * 4  # 4 of [-2, 6]
    assert c.transitions.action[:, 0].tolist() == [0.5, 1.0, 0.5, 0.5] + [0.5] * 4  # all as the environment saw them


def test_a_killed_writer_leaves_no_half_set(home: Path):
    script = (
        "import os, signal\nfrom envs import minari_write\nfrom tests.envs.test_minari_data import episode\n"
        "def some():\n    for i in range(150):\n        yield episode(5, i)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "minari_write.write('ess/half-v0', 'Pendulum-v1', some(), {})\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
    assert done.returncode == -9
    assert minari_data.local() == {} and not (home / "ess" / "half-v0").exists()
    assert len(list(home.glob(".recording-*"))) == 1  # hidden from Minari

    def fails() -> Any:
        yield episode(5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        minari_write.write("ess/half-v0", "Pendulum-v1", fails(), {})
    assert list(home.glob(".recording-*")) == [] and minari_data.local() == {}  # both are gone


def test_d4rl_files_without_timeouts_are_cut_at_the_time_limit(tmp_path: Path):
    """401 steps of 200 at most, of which the 100th terminated: 100, 200, 101, and the last two lose their last one."""
    gymnasium.register("Endless-v0", "gymnasium.envs.classic_control.pendulum:PendulumEnv")
    path, terminal = tmp_path / "a.hdf5", np.arange(401) == 99
    with h5py.File(path, "w") as file:
        for name, column in {"observations": np.zeros((401, 3)), "actions": np.zeros((401, 1))}.items():
            file[name] = column.astype(np.float32)
        file["rewards"], file["terminals"] = np.zeros(401, np.float32), terminal
    said = d4rl.import_file(path, "d4rl/cut-v0", "Pendulum-v1", {}, overwrite=False)
    assert said == "d4rl/cut-v0: 399 steps in 3 episodes (2 steps with an unknown outcome left out)"
    assert minari_data.load("d4rl/cut-v0", fit=QUICK).starts.tolist() == [0, 100, 299]
    with pytest.raises(UsageError, match="Endless-v0 no time limit: nothing tells where its episodes end"):
        d4rl.import_file(path, "d4rl/cut-v1", "Endless-v0", {}, overwrite=False)
    del gymnasium.registry["Endless-v0"]


class Parts(gymnasium.Env):
    """Its observations are a dictionary whose keys are in no order."""

    observation_space = spaces.Dict([("position", spaces.Box(-1.0, 1.0, (2,))), ("angle", spaces.Box(-9.0, 9.0, (1,)))])
    action_space = spaces.Box(-1.0, 1.0, (1,))


def test_another_order_of_observations_is_refused():
    gymnasium.register("Parts-v0", f"{__name__}:Parts", max_episode_steps=10)
    there = ("angle/0", "position/0", "position/1")
    order = "a-v0 has its observations in the order angle, position, Parts-v0 in the order position, angle"
    with pytest.raises(UsageError, match=order):
        minari_data.check_order("a-v0", there, "Parts-v0", {}, pytest.fail)
    minari_data.check_order("a-v0", (*there[1:], there[0]), "Parts-v0", {}, pytest.fail)
    del gymnasium.registry["Parts-v0"]
    said: list[str] = []
    minari_data.check_order("a-v0", there, "Pendulum-v1", {}, said.append)
    assert said == [
        "warning: a-v0 has the observations angle, position; Pendulum-v1 does not name its own: they are taken to be "
        "in the same, alphabetical, order"
    ]


def test_which_task_a_set_is_of():
    """How it was drawn is no matter, its gravity and its time limit are."""
    spec = json.loads(gymnasium.spec("Pendulum-v1").to_json())

    def metadata(**changes: Any) -> dict[str, Any]:
        return {"env_spec": json.dumps(spec | changes)}

    drawn, heavy = metadata(kwargs={"render_mode": "human"}), metadata(kwargs={"g": 5.0})
    assert minari_env.task_of(drawn) == ("Pendulum-v1", {}, None) and minari_env.is_of(drawn, "Pendulum-v1", {})
    assert minari_env.is_of(heavy, "Pendulum-v1", {"g": 5.0}) and not minari_env.is_of(heavy, "Pendulum-v1", {})
    wrapped = metadata(additional_wrappers=[{"name": "TransformReward", "entry_point": "a:B", "kwargs": {}}])
    assert not minari_env.is_of(wrapped, "Pendulum-v1", {})  # its returns may be of another scale
    assert not minari_env.is_of(drawn, "Hopper-v5", {}) and minari_env.is_of({}, "Hopper-v5", {})
    assert minari_env.task_of(metadata(max_episode_steps=None)) == ("Pendulum-v1", {"max_episode_steps": -1}, None)


@pytest.mark.parametrize("ends", [(1.0, 1.0), (math.nan, 1.0), (None, 1.0), ("low", 1.0), (-math.inf, 0.0)])
def test_references_that_are_none(ends: tuple[Any, Any]):
    assert minari_data.references_of({"ref_min_score": ends[0], "ref_max_score": ends[1]}) is None


def test_d4rl_files_become_episodes(tmp_path: Path):
    """Six steps: 0 and 1 end in a timeout, 2 and 3 terminate, 4 and 5 just stop."""
    path = tmp_path / "hopper.hdf5"
    obs = np.arange(6.0, dtype=np.float32)[:, None] * np.ones(3, np.float32)
    columns: dict[str, Any] = {
        "observations": obs, "actions": np.full((6, 1), 2.0, np.float32), "rewards": np.arange(6.0),
        "terminals": np.array([0, 0, 0, 1, 0, 0], bool), "timeouts": np.array([0, 1, 0, 0, 0, 0], bool),
    }  # fmt: skip
    with h5py.File(path, "w") as file:
        for name, column in columns.items():
            file[name] = column
    said = d4rl.import_file(path, "d4rl/pendulum-v0", "Pendulum-v1", {"ref_min_score": -1.0}, overwrite=False)
    # Where step 1 and step 5 led is not in the file: they are left out, and the steps before them are the last.
    assert said == "d4rl/pendulum-v0: 4 steps in 3 episodes (2 steps with an unknown outcome left out)"
    d = minari_data.load("d4rl/pendulum-v0", fit=QUICK).transitions
    assert d.obs[:, 0].tolist() == [0.0, 2.0, 3.0, 4.0] and d.next_obs[:, 0].tolist() == [1.0, 3.0, 3.0, 5.0]
    assert d.terminated.tolist() == [False, False, True, False] and d.truncated.tolist() == [True, False, False, True]
    assert d.action[:, 0].tolist() == [1.0] * 4  # 2 of Pendulum's [-2, 2]
    with h5py.File(path, "a") as file:
        file["next_observations"] = obs + 1.0
    said = d4rl.import_file(path, "d4rl/pendulum-v1", "Pendulum-v1", {}, overwrite=False)
    assert "6 steps in 3 episodes (0 steps" in said
    d = minari_data.load("d4rl/pendulum-v1", fit=QUICK).transitions
    assert d.next_obs[:, 0].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    with h5py.File(path, "a") as file:
        del file["timeouts"], file["next_observations"]
        file["next_observations"] = np.where(
            np.arange(6)[:, None] == 1, 9.0, obs + 1.0
        )  # the third row begins elsewhere
    said = d4rl.import_file(path, "d4rl/pendulum-v2", "Pendulum-v1", {}, overwrite=False)
    d = minari_data.load("d4rl/pendulum-v2", fit=QUICK).transitions
    assert said.startswith("d4rl/pendulum-v2: 6 steps in 3 episodes (0 ")
    assert d.truncated.tolist() == [False, True, False, False, False, True] and d.terminated.nonzero().tolist() == [[3]]
    (tmp_path / "text").write_text("no")
    with pytest.raises(UsageError, match="not an HDF5 file"):
        d4rl.import_file(tmp_path / "text", "d4rl/b-v0", "Pendulum-v1", {}, overwrite=False)
    with pytest.raises(UsageError, match=r"a row of 'observations' has \[3\] numbers, Hopper-v5 \[11\]"):
        d4rl.import_file(path, "d4rl/b-v0", "Hopper-v5", {}, overwrite=False)
    for name, column, said in (
        ("actions", np.zeros((6, 3)), r"a row of 'actions' has \[3\] numbers, Pendulum-v1 \[1\]"),
        ("timeouts", np.zeros(5, bool), "'timeouts' has 5 rows, 'rewards' 6"),
        ("next_observations", obs[:4], "'next_observations' has 4 rows, 'rewards' 6"),
    ):
        with h5py.File(tmp_path / "other.hdf5", "w") as file:
            for key, x in (columns | {name: column}).items():
                file[key] = x
        with pytest.raises(UsageError, match=said):
            d4rl.import_file(tmp_path / "other.hdf5", "d4rl/b-v0", "Pendulum-v1", {}, overwrite=False)
    with h5py.File(path, "a") as file:
        del file["terminals"]
    with pytest.raises(UsageError, match="has no 'terminals'"):
        d4rl.import_file(path, "d4rl/b-v0", "Pendulum-v1", {}, overwrite=False)
