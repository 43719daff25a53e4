"""`envs.make`: which backend is chosen, and each mistake as one line with its remedy."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

import envs
from envs.spaces import BoxAction
from ess_rl.errors import UsageError

needs_envpool = pytest.mark.skipif(importlib.util.find_spec("envpool") is None, reason="EnvPool is not installed")


def complaint(*arguments: Any, **options: Any) -> str:
    """The text of the UsageError that `make` raises, after a look at its form."""
    with pytest.raises(UsageError) as caught:
        envs.make(*arguments, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


class Recorder(gymnasium.Env):
    """Takes a 2 x 2 action, shows (elapsed steps, 1 + elapsed steps) in a buffer it reuses, ends after three steps."""

    def __init__(self, low: float = 0.0, high: float = 10.0, as_box: bool = False) -> None:
        self.action_space = gymnasium.spaces.Box(low, high, (2, 2), np.float32)
        row = gymnasium.spaces.Box(-np.inf, np.inf, (1, 1), np.float64)
        box = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
        self.observation_space = box if as_box else gymnasium.spaces.Dict({"a": row, "b": row})
        self.actions: list[np.ndarray] = []
        self._buffer = np.zeros(2)
        self._obs = self._buffer if as_box else {"a": self._buffer[:1, None], "b": self._buffer[1:, None]}

    def _observe(self, elapsed: int) -> Any:
        self._buffer[:] = (elapsed, 1 + elapsed)
        return self._obs

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.elapsed = 0
        return self._observe(0), {}

    def step(self, action: np.ndarray) -> Any:
        self.actions.append(action.copy())
        self.elapsed += 1
        return self._observe(self.elapsed), 0.5, self.elapsed == 3, False, {}


@pytest.fixture
def recorder_id() -> Iterator[str]:
    env_id = "EssRlRecorder-v0"
    gymnasium.register(env_id, entry_point=lambda **options: Recorder(**options))
    yield env_id
    del gymnasium.registry[env_id]


class TestChoice:
    def test_auto_prefers_torch(self) -> None:
        assert envs.make("Pendulum-v1", 1).backend == "torch"
        assert envs.backends_of("Pendulum-v1") == ("torch", "gymnasium")

    @needs_envpool
    def test_auto_prefers_envpool_to_gymnasium(self) -> None:
        assert envs.make("Swimmer-v5", 1).backend == "envpool"

    def test_auto_without_envpool_is_gymnasium(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(envs, "_envpool_installed", lambda: False)
        assert envs.make("Swimmer-v5", 1).backend == "gymnasium"

    def test_an_id_outside_the_list_is_gymnasium(self, recorder_id: str) -> None:
        assert envs.make(recorder_id, 1).backend == "gymnasium"

    def test_import_loads_no_simulator(self) -> None:
        code = "import sys, envs; print([m for m in ('gymnasium', 'envpool', 'mujoco', 'warp') if m in sys.modules])"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"

    def test_every_task_of_the_list_is_registered(self) -> None:
        assert len(envs.ENVS) == 20
        for env_id, entry in envs.ENVS.items():
            assert "gymnasium" in envs.backends_of(env_id)
            assert entry.description
            assert "\n" not in entry.description


class TestMistakes:
    @pytest.mark.parametrize(
        ("typed", "meant"),
        [
            ("halfcheeta", "HalfCheetah-v5"),
            ("HalfCheetah-v9", "HalfCheetah-v5"),
            ("Pendulum", "Pendulum-v1"),
            ("LunarLanderContinous-v3", "LunarLanderContinuous-v3"),  # only Gymnasium knows it
        ],
    )
    def test_unknown_environment(self, typed: str, meant: str) -> None:
        assert f"unknown environment {typed!r}; did you mean {meant}" in complaint(typed, 1)

    def test_unknown_environment_like_no_other(self) -> None:
        assert "'ess-rl envs' lists" in complaint("qqqqqqqq", 1)

    def test_unknown_backend(self) -> None:
        assert complaint("Pendulum-v1", 1, backend="cuda") == (
            "unknown backend 'cuda': choose one of auto, torch, envpool, gymnasium, warp"
        )

    def test_discrete_actions(self) -> None:
        text = complaint("CartPole-v1", 1)
        assert "CartPole-v1 has the action space Discrete(2)" in text
        assert "Gaussian over real-valued Box" in text

    def test_infinite_bounds(self, recorder_id: str) -> None:
        assert "infinite bounds" in complaint(recorder_id, 1, high=np.inf)
        most = np.finfo(np.float32).max  # finite, but the width of this Box is not
        with pytest.raises(UsageError, match="infinite bounds"):
            BoxAction("Task-v0", gymnasium.spaces.Box(-most, most, (2,), np.float32))

    def test_the_remedy_for_infinite_bounds(self, recorder_id: str) -> None:
        from gymnasium.wrappers import TransformAction

        inner = gymnasium.make(recorder_id, high=np.inf)
        finite = gymnasium.spaces.Box(-1.0, 1.0, inner.action_space.shape)  # type: ignore[arg-type]
        assert BoxAction("Task-v0", TransformAction(inner, lambda x: 3.0 * x, finite).action_space).act_dim

    def test_integer_box(self) -> None:
        with pytest.raises(UsageError, match="real-valued Box"):
            BoxAction("Task-v0", gymnasium.spaces.Box(0, 5, (2,), np.int64))

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_actions_stay_in_the_box(self, dtype: Any) -> None:
        """Also where rounding in float32 passes a bound: 0.4 is 0.4000000059604645 there."""
        drawn = np.random.default_rng(0).integers(-50, 50, (200, 2)) / 10.0
        for low, high in (*drawn[drawn[:, 0] < drawn[:, 1]], (-0.4, 0.4)):
            box = gymnasium.spaces.Box(low, high, (1,), dtype)
            to_simulator = BoxAction("Task-v0", box)
            for action in to_simulator(torch.tensor([[-1.0], [0.3], [1.0], [7.0]])):
                assert box.contains(action), (box, action)

    @pytest.mark.parametrize("num_envs", [0, -3])
    def test_no_environments(self, num_envs: int) -> None:
        assert complaint("Pendulum-v1", num_envs) == f"num_envs is {num_envs}; at least 1 environment is needed"

    def test_envpool_is_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(envs, "_envpool_installed", lambda: False)
        assert "pip install -e '.[envpool]' in the project's folder" in complaint("Hopper-v5", 1, backend="envpool")

    def test_warp_is_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(envs, "_warp_installed", lambda: False)
        assert complaint("Hopper-v5", 1, backend="warp").endswith(
            "is not installed: pip install -e '.[warp]' in the project's folder"
        )

    def test_backend_without_the_task(self) -> None:
        assert complaint("Pendulum-v1", 1, backend="envpool").endswith("Pendulum-v1: use torch or gymnasium")
        assert complaint("Hopper-v5", 1, backend="torch").endswith("Hopper-v5: use envpool or gymnasium or warp")
        assert complaint("Pusher-v5", 1, backend="warp").endswith("Pusher-v5: use envpool or gymnasium")

    def test_missing_dependency(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "Box2D", None)  # `import Box2D` fails, installed or not
        for name in [name for name in sys.modules if name.startswith("gymnasium.envs.box2d")]:
            monkeypatch.delitem(sys.modules, name)
        assert 'pip install "gymnasium[box2d]"' in complaint("LunarLanderContinuous-v3", 1)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_no_cuda_device(self) -> None:
        assert "torch finds no CUDA device" in complaint("Pendulum-v1", 1, device="cuda")

    @pytest.mark.parametrize("backend", ["gymnasium", pytest.param("envpool", marks=needs_envpool)])
    def test_unknown_option(self, backend: str) -> None:
        assert "frobnicate" in complaint("Hopper-v5", 1, backend=backend, frobnicate=1)
        assert "frobnicate" in complaint("Pendulum-v1", 1, frobnicate=1)


class TestGymnasiumAdapter:
    def test_actions_are_clipped_then_scaled(self, recorder_id: str) -> None:
        env: Any = envs.make(recorder_id, 1)
        assert (env.act_dim, env.obs_dim, env.max_episode_steps) == (4, 2, None)
        env.reset(torch.tensor([0]))
        env.step(torch.tensor([[-5.0, -1.0, 0.5, 7.0]]))
        recorder = env._envs.envs[0].unwrapped
        assert recorder.actions[0].dtype == np.float32
        assert recorder.actions[0].tolist() == [[0.0, 0.0], [7.5, 10.0]]

    @pytest.mark.parametrize("as_box", [True, False])
    def test_next_obs_survives_a_buffer_that_the_task_reuses(self, recorder_id: str, as_box: bool) -> None:
        env = envs.make(recorder_id, 2, as_box=as_box)
        assert env.reset(torch.tensor([0, 1])).tolist() == [[0.0, 1.0]] * 2
        steps = [env.step(torch.zeros(2, 4)) for _ in range(4)]
        assert [step.next_obs[1].tolist() for step in steps] == [[1.0, 2.0], [2.0, 3.0], [3.0, 4.0], [1.0, 2.0]]
        assert [step.obs[1].tolist() for step in steps] == [[1.0, 2.0], [2.0, 3.0], [0.0, 1.0], [1.0, 2.0]]
        assert [step.terminated.tolist() for step in steps] == [[False] * 2, [False] * 2, [True] * 2, [False] * 2]

    def test_seeds_are_those_of_gymnasium(self) -> None:
        env = envs.make("Pendulum-v1", 2, backend="gymnasium")
        obs = env.reset(torch.tensor([3, 2**40 + 4]))
        for index, seed in enumerate((3, 4)):
            np.testing.assert_array_equal(obs[index].numpy(), gymnasium.make("Pendulum-v1").reset(seed=seed)[0])


def in_a_new_process(code: str, **environment: str) -> str:
    """What `code` prints where MUJOCO_GL and DISPLAY are unset, but for `environment`."""
    clean = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "MUJOCO_GL")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=clean | environment
    )
    return done.stdout.strip()


DRAW = """
import torch, envs
from ess_rl.contract import VectorEnv
from ess_rl.errors import UsageError
try:
    env = envs.render_env({env_id!r})
except UsageError as error:
    print("UsageError", error)
else:
    assert isinstance(env, VectorEnv) and env.num_envs == 1
    first = env.render()
    for _ in range(5):
        step = env.step(torch.ones(1, env.act_dim))
    print(first.dtype, first.shape[2], first.std() > 1.0, (env.render() != first).any(), env.fps > 0, step.obs.shape[0])
"""


class TestRendering:
    @pytest.mark.parametrize(
        ("env_id", "remedy"),
        [
            ("Pendulum-v1", "pip install -e '.[video]'"),
            ("Hopper-v5", "apt-get install libegl1"),
        ],
    )
    def test_frames_or_the_remedy(self, env_id: str, remedy: str) -> None:
        pytest.importorskip("mujoco")
        printed = in_a_new_process(DRAW.format(env_id=env_id)).splitlines()[-1]
        if printed.startswith("UsageError"):
            assert remedy in printed
        else:
            assert printed == "uint8 3 True True True 1"

    def test_without_pygame(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pygame", None)
        with pytest.raises(UsageError, match=r"Pendulum-v1 cannot be drawn, try `pip install -e '.\[video\]'` in"):
            envs.render_env("Pendulum-v1")

    def test_without_a_graphics_library(self) -> None:
        pytest.importorskip("mujoco")
        hide = "import sys\nsys.modules['mujoco.egl'] = None\n"  # as if libegl1 were missing
        look = "import os\nprint('MUJOCO_GL' in os.environ)"
        printed = in_a_new_process(hide + DRAW.format(env_id="Hopper-v5") + look).splitlines()
        assert printed[-2].startswith("UsageError Hopper-v5 cannot be drawn, try `apt-get install libegl1`")
        assert printed[-1] == "False"  # what was set in vain is unset

    def test_unknown_environment(self) -> None:
        with pytest.raises(UsageError, match="did you mean Hopper-v5"):
            envs.render_env("Hoper-v5")


def test_an_id_may_name_the_module_that_registers_it():
    env = envs.make("gymnasium.envs.classic_control:MountainCarContinuous-v0", 2)
    assert env.backend == "gymnasium" and env.reset(torch.arange(2)).shape == (2, 2)
    env.close()
    with pytest.raises(UsageError, match="the module no_such_module_at_all cannot be imported"):
        envs.make("no_such_module_at_all:Pendulum-v1", 1)


def test_the_range_of_actions_is_the_simulators() -> None:
    for backend in ("gymnasium", "torch"):
        assert envs.make("Pendulum-v1", 1, backend=backend).action_range == [(-2.0, 2.0)]
    assert list(envs.make("Hopper-v5", 1, backend="gymnasium").action_range) == [(-1.0, 1.0)] * 3
