"""An iteration can be recorded: it runs without the host, and collecting in turns equals collecting at once.

Tensors on torch's device "meta" have shapes but no contents. Any operation that would wait for the device, to read a
number, to branch on it, to copy it, fails on them; so what would run on the GPU is tested without one.
"""

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import envs
from agents import AGENTS, OFFLINE_AGENTS
from envs.grouped import GroupedVectorEnv
from envs.hinted import HintedVectorEnv
from envs.torch_vector import TorchVectorEnv
from ess_rl import loop, offline
from ess_rl.collect import collect, turns
from ess_rl.contract import InTurns, Step
from ess_rl.graphs import Graphs, Stopwatch
from ess_rl.offline import OfflinePopulation
from ess_rl.population import Population, move
from ess_rl.replay import Replay
from ess_rl.transitions import Transitions

META = torch.device("meta")
N, T = 4, 6
TORCH_ENVS = [name for name, entry in envs.ENVS.items() if entry.dynamics is not None]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Transfers(TorchDispatchMode):
    """Lists the operations that carry data between the host and the device.

    A Python number is a 0-dim host tensor here. As an operand it travels with the kernel launch; as a copy, it waits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        devices = {x.device.type for x in tensors}
        copies = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        if len(devices) > 1 and (copies or any(x.ndim > 0 and x.device.type == "cpu" for x in tensors)):
            self.found.append(str(func))
        return out


def sent(data: Any, *_: Any, **__: Any) -> Tensor:
    raise AssertionError(f"{data!r} is sent from the host: torch.full fills it in where it is needed")


def parts(agent: str, env_id: str, device: torch.device, members: int = 2, **settings: Any):
    shared = {"hidden": (8,), "num_envs": N, "rollout": T, "epochs": 2, "minibatch": 8}
    config = AGENTS[agent].config(**{**shared, **settings})
    entry = envs.ENVS[env_id]
    assert entry.dynamics is not None
    hints, clock = settings.get("hints", 0), {"max_episode_steps": 3 * T} if settings.get("hints") else {}
    make: Any = partial(HintedVectorEnv, group=hints, **clock) if hints else TorchVectorEnv
    if group := settings.get("group", 0):
        make = partial(GroupedVectorEnv, group=group, max_episode_steps=T)
    env = make(env_id, entry.dynamics(), members * N, device)
    population = Population(AGENTS[agent].agent(config, env.obs_dim, env.act_dim), range(members), device=device)
    if agent == "chord":
        obs, action = torch.ones(5, env.obs_dim, device=device), torch.ones(5, env.act_dim, device=device)
        population.demonstrations = {"obs": obs, "action": action}
    replay = Replay((1 + config.replay) * T, members, N, env.obs_dim, env.act_dim, device)
    return population, env, replay


@pytest.mark.parametrize(
    ("agent", "env_id", "settings"),
    [("p3o", env_id, {}) for env_id in TORCH_ENVS]
    + [
        ("ppo", "Pendulum-v1", {"objective": objective})
        for objective in ("clip", "decoupled", "generalized", "band", "kl", "variance")
    ]
    + [
        ("p3o_2019", "Pendulum-v1", {"replay": 3, "segments": 5, "warm_up": 2, "draw": "recency"}),
        ("p3o", "Pendulum-v1", {"replay": 2, "draw": "ess", "correction": "vtrace", "ess": "batch"}),
        ("p4o", "Pendulum-v1", {"replay": 1}),
        ("bpo", "Pendulum-v1", {"replay": 1}),
        ("dapo", "Pendulum-v1", {"replay": 1}),
        ("dapo", "Pendulum-v1", {"objective": "p3o", "divergence": "hellinger", "recursion": "released"}),
        ("tba", "Pendulum-v1", {"replay": 1}),
        ("tba", "Pendulum-v1", {"reference": "initial", "segment_length": 5}),
        ("tba", "Pendulum-v1", {"reference": "uniform", "lag": 1, "sync_interval": 2}),
        ("tba_group", "Pendulum-v1", {"group": 2, "replay": 1, "draw": "reward"}),
        ("p3o", "ess/MountainCarContinuousSparse-v0", {"hints": 2}),
        ("ppo", "ess/TwoLinkArmSparse-v0", {"hints": 4}),
        ("chord", "Pendulum-v1", {"phi": "mass", "replay": 1}),
        ("p3o_prior", "Pendulum-v1", {"prior": "gp"}),
        ("p3o_prior", "Pendulum-v1", {"prior": "ensemble", "replay": 1}),
        ("p3o", "Pendulum-v1", {"lag": 2, "rollout_precision": "fp8", "cap": 0.5, "pull": 0.0, "behavior_kl": "k3"}),
    ],
)
def test_an_iteration_asks_the_host_for_nothing(
    agent: str, env_id: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    waits: list[int] = []

    def to_host(found: dict[str, Tensor]) -> dict[str, Tensor]:
        assert all(x.device == META and x.shape == (2,) for x in found.values())
        waits.append(len(found))
        return {name: torch.full((2,), float(name != "broken"), dtype=torch.float64) for name in found}

    monkeypatch.setattr(loop, "_to_host", to_host)
    population, env, replay = parts(agent, env_id, META, minibatch=N * T, **settings)
    progress = loop.train(population, env, replay, iterations=4, reset_every=4)
    next(progress)  # includes the reset of all environments, which runs on the host
    monkeypatch.setattr(torch, "tensor", sent)  # on "meta" torch takes a shortcut that `Transfers` would not see
    monkeypatch.setattr(torch, "as_tensor", sent)
    with Transfers() as transfers:
        list(progress)
    assert transfers.found == []
    assert transfers.operations > 1000
    assert len(waits) == 4  # one wait per iteration


@pytest.mark.parametrize("agent", sorted(OFFLINE_AGENTS))
def test_updates_on_a_data_set_ask_the_host_for_nothing(agent: str, monkeypatch: pytest.MonkeyPatch):
    data = replace(
        Transitions.empty((20,), 3, 2, torch.device("cpu")).map(torch.zeros_like), truncated=torch.arange(20) == 19
    )
    made = OFFLINE_AGENTS[agent].agent(OFFLINE_AGENTS[agent].config(hidden=(8,), minibatch=4), 3, 2)
    prepared = OfflinePopulation(made, range(2)).prepare(data)  # may read values: it runs before the updates
    population = OfflinePopulation(made, range(2), device=META)
    columns, prepared = offline.samples(data, META), {name: x.to(META) for name, x in prepared.items()}
    population.updates(columns, 0, 1, 9, prepared)  # moves the state to its fixed place
    monkeypatch.setattr(torch, "tensor", sent)
    monkeypatch.setattr(torch, "as_tensor", sent)
    with Transfers() as transfers:
        population.updates(columns, 0, 3, 9, prepared)
    assert transfers.found == []
    assert transfers.operations > 100


def test_the_tensors_that_cannot_be_read_tell():
    """What the tests above rely on, for one way to wait for the device after another."""
    x = torch.ones(3, device=META)
    with pytest.raises(RuntimeError):
        bool(x.sum() > 0)
    with pytest.raises(RuntimeError):
        x.nonzero()
    with pytest.raises(NotImplementedError):
        x.cpu()
    with Transfers() as transfers:
        torch.zeros(3).to(META)
    assert transfers.found == ["aten._to_copy.default"]


def test_what_an_iteration_keeps_stays_where_it_is():
    """A recording holds addresses: state and replay must be written in place."""
    population, env, replay = parts("p3o", "Pendulum-v1", torch.device("cpu"))
    state = population.state
    kept = [x.data_ptr() for x in tree_leaves((state, replay.store))]
    before = copy.deepcopy(state)
    for _ in loop.train(population, env, replay, iterations=3, reset_every=3):
        assert population.state is state
        assert [x.data_ptr() for x in tree_leaves((population.state, replay.store))] == kept
    for name in ("params", "optimizer", "obs_stats", "progress"):
        changed = [
            not torch.equal(x, y) for x, y in zip(tree_leaves(state[name]), tree_leaves(before[name]), strict=True)
        ]
        assert any(changed), name


class InTwoTurns(TorchVectorEnv):
    """A torch environment as two halves that take turns, with a log of the order in which they were called."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.log: list[str] = []
        self.turns: list[Half] = [Half(self, k) for k in range(2)]

    def reset(self, seeds: Tensor) -> Tensor:
        return torch.stack([half.env.reset(seeds[k::2]) for k, half in enumerate(self.turns)], dim=1).flatten(0, 1)


class Half:
    def __init__(self, whole: InTwoTurns, number: int):
        self.whole, self.number = whole, number
        self.env = TorchVectorEnv(whole.env_id, whole.dynamics, whole.num_envs // 2)

    def send(self, action: Tensor) -> None:
        self.whole.log.append(f"send {self.number}")
        self.step = self.env.step(action)

    def receive(self) -> Step:
        self.whole.log.append(f"receive {self.number}")
        return self.step


def test_collecting_in_turns_is_collecting():
    population, whole, _ = parts("p3o", "Pendulum-v1", torch.device("cpu"))
    halved = InTwoTurns(whole.env_id, whole.dynamics, whole.num_envs)
    assert isinstance(halved, InTurns)
    assert not isinstance(whole, InTurns)
    seeds = loop.env_seeds(population.seed, N)
    rollout, obs = collect(population, whole, whole.reset(seeds), 210, iteration=3)
    in_turns, obs_in_turns = collect(population, halved, halved.reset(seeds), 210, iteration=3)
    # Equal except for rounding in the policy, which Pendulum's dynamics propagate: 210 steps, with a reset among them.
    torch.testing.assert_close(vars(in_turns), vars(rollout), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(obs_in_turns, obs, rtol=1e-3, atol=1e-3)
    assert rollout.truncated.any()
    # One half works while the other is served: at every step, the first is sent on before the second is received.
    assert halved.log[:6] == ["send 0", "send 1", "receive 0", "send 0", "receive 1", "send 1"]


def test_an_odd_number_of_environments_takes_no_turns():
    _, whole, _ = parts("p3o", "Pendulum-v1", torch.device("cpu"))
    halved = InTwoTurns(whole.env_id, whole.dynamics, 6)
    assert len(turns(halved, 3)) == 1  # two members of three: no half would hold as many of each
    assert len(turns(halved, 6)) == 2


def test_a_state_moves_whole_whatever_of_the_old_one_it_is_made_of():
    """Two leaves exchanged, one a part of another, one transposed, one unchanged, one new."""
    old = {name: torch.arange(4.0).view(2, 2) + 10.0 * i for i, name in enumerate("abcdef")}
    new = {"a": old["b"], "b": old["a"], "c": old["a"].flatten()[2:].expand(2, 2), "d": old["d"].T, "e": old["e"]}
    new["f"] = old["f"] + 1.0
    expected, places = {name: x.clone() for name, x in new.items()}, {name: x.data_ptr() for name, x in old.items()}
    move(new, old)
    assert all(torch.equal(old[name], x) for name, x in expected.items())
    assert {name: x.data_ptr() for name, x in old.items()} == places


def test_a_state_that_the_caller_gives_is_learned_from():
    """Replacing the state by a copy changes nothing: learning rates keep falling, and updates reach it."""
    ends = []
    for copies in (False, True):
        population, env, replay = parts("p3o", "Pendulum-v1", torch.device("cpu"))
        for _ in loop.train(population, env, replay, iterations=6, reset_every=6):
            if copies:
                population.state = copy.deepcopy(population.state)
        ends.append(population.state)
    torch.testing.assert_close(*ends, rtol=0.0, atol=0.0)


def test_on_the_cpu_nothing_is_recorded():
    graphs, calls = Graphs(torch.device("cpu")), []
    assert [graphs("x", lambda: calls.append(0) or len(calls)) for _ in range(4)] == [1, 2, 3, 4]


def test_a_stopwatch_has_a_time_for_each_lap():
    watch = Stopwatch(torch.device("cpu"))
    watch.begin()
    for name in ("a", "b"):
        watch.lap(name)
    assert list(watch.seconds()) == ["a", "b"]
    assert all(x >= 0.0 for x in watch.seconds().values())


@needs_cuda
@pytest.mark.parametrize("replay", [0, 2])
def test_recorded_is_eager(replay: int, monkeypatch: pytest.MonkeyPatch):
    """Equal except for the rounding of kernels that add in another order."""
    device = torch.device("cuda")
    recorded = parts("p3o", "Pendulum-v1", device, replay=replay)
    eager = parts("p3o", "Pendulum-v1", device, replay=replay)
    first = list(loop.train(*recorded, iterations=12, reset_every=6))
    monkeypatch.setattr(Graphs, "__call__", lambda self, name, function: function())
    second = list(loop.train(*eager, iterations=12, reset_every=6))
    torch.testing.assert_close(recorded[0].state, eager[0].state, rtol=1e-3, atol=1e-4)
    for p, q in zip(first, second, strict=True):
        torch.testing.assert_close(replace(p, seconds={}).metrics, q.metrics, rtol=1e-3, atol=1e-4)


@needs_cuda
@pytest.mark.parametrize("agent", sorted(OFFLINE_AGENTS))
def test_recorded_updates_on_a_data_set_are_those_of_the_cpu(agent: str):
    generator = torch.Generator().manual_seed(0)
    data = Transitions.empty((500,), 3, 2, torch.device("cpu")).map(torch.zeros_like)
    data = replace(
        data, truncated=torch.arange(500) % 50 == 49, reward=torch.randn(500, generator=generator),
        obs=torch.randn(500, 3, generator=generator), next_obs=torch.randn(500, 3, generator=generator),
        action=0.3 * torch.randn(500, 2, generator=generator),
    )  # fmt: skip
    states = []
    for device in ("cuda", "cpu"):
        made = OFFLINE_AGENTS[agent].agent(OFFLINE_AGENTS[agent].config(hidden=(8,), minibatch=16), 3, 2)
        population = OfflinePopulation(made, range(2), device=device)
        for _ in offline.train(population, data, updates=300, blocks=2):
            pass
        states.append([x.double().cpu() for x in tree_leaves(population.state["params"])])
    torch.testing.assert_close(*states, rtol=1e-2, atol=1e-3)


@needs_cuda
def test_memory_does_not_grow():
    population, env, replay = parts("p3o", "Pendulum-v1", torch.device("cuda"))
    held = []
    for p in loop.train(population, env, replay, iterations=1000, reset_every=100):
        if p.iteration in (20, 1000):
            held.append(torch.cuda.memory_allocated())
    assert held[1] <= held[0]
