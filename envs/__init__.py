"""Environments: the only folder that knows simulators. `make` builds any of them as an `ess_rl.contract.VectorEnv`.

env = envs.make("HalfCheetah-v5", num_envs=16)
obs = env.reset(torch.arange(16))
step = env.step(action)  # actions in [-1, 1]
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from envs.acrobot import Acrobot
from envs.cart_pole import CartPole
from envs.cart_pole_swing_up import CartPoleSwingUp
from envs.grouped import GroupedVectorEnv
from envs.hinted import HintedVectorEnv
from envs.lqr import LQR
from envs.mountain_car import MountainCarContinuous
from envs.mountain_car_sparse import MountainCarContinuousSparse
from envs.pendulum import Pendulum
from envs.torch_vector import Dynamics, TorchVectorEnv
from envs.two_link_arm import TwoLinkArm
from envs.two_link_arm_sparse import TwoLinkArmSparse
from ess_rl.contract import VectorEnv, option
from ess_rl.errors import UsageError

if TYPE_CHECKING:
    from envs.gymnasium_vector import RenderEnv

Grouped = TypeVar("Grouped", bound=GroupedVectorEnv)

__all__ = [
    "BACKENDS",
    "ENVS",
    "Entry",
    "backends_of",
    "make",
    "make_for",
    "make_grouped",
    "make_hinted",
    "make_torch",
    "render_env",
]

BACKENDS = ("torch", "envpool", "gymnasium", "warp")  # "auto" takes the first one it can, never "warp"


@dataclass(frozen=True)
class Entry:
    """A task as this suite describes it."""

    description: str
    dynamics: Callable[..., Dynamics] | None = None  # our own equations in torch, if any
    in_envpool: bool = False
    in_warp: bool = False  # on mujoco_warp, defined in `mujoco_tasks`


ENVS: dict[str, Entry] = {
    "Pendulum-v1": Entry("swing a rod up and hold it, 200 steps", dynamics=Pendulum),
    "MountainCarContinuous-v0": Entry(
        "rock a weak car out of a valley, sparse reward, 999 steps", dynamics=MountainCarContinuous
    ),
    "ess/MountainCarContinuousSparse-v0": Entry(
        "the same car, rewarded only at the goal, 999 steps", dynamics=MountainCarContinuousSparse
    ),
    "ess/CartPole-v0": Entry("keep a pole upright on a cart, 500 steps", dynamics=CartPole),
    "ess/CartPoleSwingUp-v0": Entry("swing that pole up first, 500 steps", dynamics=CartPoleSwingUp),
    "ess/Acrobot-v0": Entry("swing a two-link arm up by its elbow, 500 steps", dynamics=Acrobot),
    "ess/TwoLinkArm-v0": Entry("reach a random point with a planar arm, 100 steps", dynamics=TwoLinkArm),
    "ess/TwoLinkArmSparse-v0": Entry(
        "the same arm, rewarded only for touching it, 100 steps", dynamics=TwoLinkArmSparse
    ),
    "ess/LQR-v0": Entry("bring a mass to rest at quadratic cost: values in closed form, 200 steps", dynamics=LQR),
    "Ant-v5": Entry("a four-legged walker, 8 motors, observes contact forces", in_envpool=True, in_warp=True),
    "HalfCheetah-v5": Entry("a planar runner, 6 motors, never falls", in_envpool=True, in_warp=True),
    "Hopper-v5": Entry("a planar one-legged jumper, 3 motors, ends when it falls", in_envpool=True, in_warp=True),
    "Humanoid-v5": Entry("a body of 17 motors learns to walk, ends when it falls", in_envpool=True, in_warp=True),
    "HumanoidStandup-v5": Entry("the same body, lying, learns to stand up", in_envpool=True),
    "InvertedDoublePendulum-v5": Entry("balance two linked poles on a cart", in_envpool=True, in_warp=True),
    "InvertedPendulum-v5": Entry("balance one pole on a cart", in_envpool=True, in_warp=True),
    "Pusher-v5": Entry("an arm of 7 motors pushes a cylinder to its goal, 100 steps", in_envpool=True),
    "Reacher-v5": Entry("a planar arm of 2 motors reaches a random point, 50 steps", in_envpool=True, in_warp=True),
    "Swimmer-v5": Entry("a three-link swimmer in a viscous fluid, 2 motors", in_envpool=True, in_warp=True),
    "Walker2d-v5": Entry("a planar two-legged walker, 6 motors, ends when it falls", in_envpool=True, in_warp=True),
}  # Gymnasium's other continuous tasks work too: `make` takes any id that Gymnasium knows.


def backends_of(env_id: str) -> tuple[str, ...]:
    """Backends that know this task, installed or not; empty if none does."""
    entry = ENVS.get(env_id, Entry(""))
    known = {
        "torch": entry.dynamics is not None,
        "envpool": entry.in_envpool,
        "gymnasium": _in_gymnasium(env_id),
        "warp": entry.in_warp,
    }
    return tuple(backend for backend in BACKENDS if known[backend])


def make(
    env_id: str, num_envs: int, *, backend: str = "auto", device: torch.device | str = "cpu", **options: Any
) -> VectorEnv:
    """Make `num_envs` copies of a task as one `VectorEnv`.

    backend: "torch" (our own equations), "envpool", "gymnasium", or "auto": the first of these that has the task and
        is installed. The result's `backend` names the choice. "warp", the MuJoCo tasks on mujoco_warp, is used only on
        request: physics in float32 is a different benchmark.
    device: where a torch or warp environment lives. The other two simulate on the CPU, and their `device` says so.
    options: `staggered` (all but gymnasium): the clocks of the first episodes after a reset are ahead by random times
        (`envs.clocks`). torch: `dtype`, `max_episode_steps` and the constants of the equations; envpool: `num_threads`,
        `halves`, `max_episode_steps` and EnvPool's options of the task; gymnasium: what `gymnasium.make` takes; warp:
        `max_episode_steps` and the fields of the task in `envs.mujoco_tasks`.

    Raises UsageError if the task, the backend or an option does not exist or is not for Gaussian policies.
    """
    if num_envs < 1:
        raise UsageError(f"num_envs is {num_envs}; at least 1 environment is needed")
    chosen = _choose_backend(env_id, backend)
    if chosen == "torch":
        return make_torch(env_id, num_envs, device, **options)
    if chosen == "envpool":
        from envs.envpool_vector import EnvPoolVectorEnv

        return EnvPoolVectorEnv(env_id, num_envs, **options)
    if chosen == "warp":
        _check_device(env_id, device)
        from envs.mujoco_warp_vector import MujocoWarpVectorEnv

        return MujocoWarpVectorEnv(env_id, num_envs, device, **options)
    from envs.gymnasium_vector import GymnasiumVectorEnv

    if options.pop("staggered", False):
        raise UsageError(f"{env_id} (backend gymnasium) cannot be staggered: its copies keep their own clocks")
    return GymnasiumVectorEnv(env_id, num_envs, **options)


def make_for(config: Any, env_id: str, num_envs: int, **options: Any) -> VectorEnv:
    """Like `make`, with the staggered starts, hints or groups that an agent's Config asks for.

    Raises UsageError if the task cannot have them, too.
    """
    if option(config, "starts") == "staggered":
        options["staggered"] = True
    if hints := option(config, "hints"):
        return make_hinted(env_id, num_envs, hints, **options)
    if group := option(config, "group"):
        return make_grouped(env_id, num_envs, group, **options)
    return make(env_id, num_envs, **options)


def make_torch(env_id: str, num_envs: int, device: torch.device | str = "cpu", **options: Any) -> TorchVectorEnv:
    """Like `make` with the backend "torch", but typed as the class it returns, with `dynamics` and `state`."""
    _choose_backend(env_id, "torch")
    dynamics = ENVS[env_id].dynamics
    assert dynamics is not None
    _check_device(env_id, device)
    of_vector = {name: options.pop(name) for name in ("dtype", "max_episode_steps", "staggered") if name in options}
    try:
        equations = dynamics(**options)
    except TypeError as error:
        raise UsageError(f"{env_id} (torch) refuses the options {sorted(options)}: {error}") from error
    return TorchVectorEnv(env_id, equations, num_envs, torch.device(device), **of_vector)


def make_grouped(
    env_id: str, num_envs: int, group: int, *, backend: str = "auto", device: torch.device | str = "cpu", **options: Any
) -> GroupedVectorEnv:
    """Like `make_torch`, in groups of `group` environments that start every episode in the same state, together.

    Raises UsageError if the task does not allow this, or if the groups would not all have that size.
    """
    able = [name for name, entry in ENVS.items() if entry.dynamics is not None and not entry.dynamics().terminates]
    could = f"; those that can, in torch: {', '.join(able)}"
    if (chosen := _choose_backend(env_id, backend)) != "torch":
        raise UsageError(f"{env_id} (backend {chosen}) cannot begin the episodes of a group in one state{could}")
    if env_id not in able:
        raise UsageError(
            f"{env_id} may end an episode before its time limit, and a group's must all last equally long{could}"
        )
    return _in_groups(GroupedVectorEnv, make_torch(env_id, num_envs, device, **options), group)


def make_hinted(
    env_id: str, num_envs: int, group: int, *, backend: str = "auto", device: torch.device | str = "cpu", **options: Any
) -> HintedVectorEnv:
    """Like `make_torch`, for training with hints: in groups of `group` environments (`envs.hinted`).

    Raises UsageError if the task has no hints, or if the groups would not all have that size.
    """
    able = [name for name, entry in ENVS.items() if hasattr(entry.dynamics, "hint_state")]
    could = f"; those that can, in torch: {', '.join(able)}"
    if (chosen := _choose_backend(env_id, backend)) != "torch":
        raise UsageError(f"{env_id} (backend {chosen}) cannot start from hints{could}")
    if env_id not in able:
        raise UsageError(f"{env_id} has no hint states to start from{could}")
    return _in_groups(HintedVectorEnv, make_torch(env_id, num_envs, device, **options), group)


def _in_groups(kind: type[Grouped], plain: TorchVectorEnv, group: int) -> Grouped:
    if group < 1 or plain.num_envs % group:
        raise UsageError(f"groups of {group} do not divide {plain.num_envs} environments: choose a divisor")
    if plain.staggered:
        raise UsageError("staggered starts would separate the environments of a group: leave out one of the two")
    how = {"dtype": plain.dtype, "max_episode_steps": plain.max_episode_steps}
    return kind(plain.env_id, plain.dynamics, plain.num_envs, plain.device, group=group, **how)


def render_env(env_id: str, **options: Any) -> RenderEnv:
    """Make one copy of a task through Gymnasium, with `.render()` -> uint8 [height, width, 3] and `.fps`."""
    _choose_backend(env_id, "gymnasium")
    if env_id.startswith("ess/"):
        raise UsageError(f"{env_id} cannot be drawn: only Gymnasium's own tasks are, and these equations are ours")
    from envs import gymnasium_vector

    return gymnasium_vector.render_env(env_id, **options)


def _choose_backend(env_id: str, backend: str) -> str:
    """Return the backend to use, or raise a UsageError that says why there is none."""
    if backend not in ("auto", *BACKENDS):
        raise UsageError(f"unknown backend {backend!r}: choose one of auto, {', '.join(BACKENDS)}")
    having = backends_of(env_id)
    if not having:
        raise UsageError(f"unknown environment {env_id!r}{_nearest(env_id)}")
    if backend == "auto":
        return next(name for name in having if name != "envpool" or _envpool_installed())
    if backend not in having:
        raise UsageError(f"backend {backend!r} does not have {env_id}: use {' or '.join(having)}")
    if backend == "envpool" and not _envpool_installed():
        raise UsageError("backend 'envpool' is not installed: pip install -e '.[envpool]' in the project's folder")
    if backend == "warp" and not _warp_installed():
        raise UsageError("backend 'warp' is not installed: pip install -e '.[warp]' in the project's folder")
    return backend


def _check_device(env_id: str, device: torch.device | str) -> None:
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {str(device)!r} is asked for {env_id}, but torch finds no CUDA device: use 'cpu'")


def _envpool_installed() -> bool:
    return importlib.util.find_spec("envpool") is not None


def _warp_installed() -> bool:
    return importlib.util.find_spec("mujoco_warp") is not None


def _in_gymnasium(env_id: str) -> bool:
    """Return whether Gymnasium knows the id. "module:id" imports the module first, as gymnasium.make does.

    Raises UsageError if that module cannot be imported.
    """
    import gymnasium

    module, _, name = env_id.rpartition(":")
    if name.startswith("ess/"):
        importlib.import_module("envs.gymnasium_export")
    if module:
        try:
            importlib.import_module(module)
        except (ImportError, TypeError, ValueError) as error:  # the last two: not a valid module name
            raise UsageError(f"{env_id}: the module {module} cannot be imported: {error}") from error
    try:
        gymnasium.spec(name)
    except (gymnasium.error.Error, ImportError):
        return False
    return True


def _nearest(env_id: str) -> str:
    """Format `; did you mean ...?` with similarly spelled names, ignoring case, each in its newest version."""
    import gymnasium
    from gymnasium.envs.registration import EnvSpec

    newest: dict[tuple[str | None, str], EnvSpec] = {}
    for spec in gymnasium.registry.values():
        key = (spec.namespace, spec.name)
        if key not in newest or (spec.version or 0) > (newest[key].version or 0):
            newest[key] = spec
    names = {name.lower(): name for name in (*(spec.id for spec in newest.values()), *ENVS)}
    module, colon, name = env_id.rpartition(":")
    close = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)
    meant = ", ".join(module + colon + names[name] for name in close)
    return f"; did you mean {meant}?" if close else "; 'ess-rl envs' lists some"
