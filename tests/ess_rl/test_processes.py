"""Two processes over Gloo learn the same as one process with all their environments."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from ess_rl import batches, random

# Run by both processes, and here for the single one that they are compared with.
SCRIPT = '''
import os
import shutil
import sys
from dataclasses import replace
import torch
from torch import distributed as dist
import envs
from agents import AGENTS
from torch.func import vmap
from ess_rl import behavior, loop, normalizer, processes, random
from ess_rl.errors import NonFiniteError
from ess_rl.ess import effective_sample_size
from ess_rl.normalizer import standardize_batch
from ess_rl.optim import gradient
from ess_rl.population import Population
from ess_rl.program import Program
from ess_rl.replay import Replay

T, N, SEEDS, ITERATIONS, RESET = 16, 4, [3, 8], 5, 3
COMMON = dict(num_envs=N, rollout=T, epochs=2, minibatch=16, hidden=(8,), learning_rate=1e-2)
VARIANTS = {
    "p3o": ("p3o", {}),
    "ppo": ("ppo", {}),
    "old data": ("p3o", dict(replay=1, lag=1, draw="ess", correction="vtrace", keep_ess=0.81)),
    "p4o": ("p4o", dict(replay=1)),
    "bpo": ("bpo", dict(replay=1)),
    "dapo": ("dapo", dict(objective="p3o", replay=1)),
    "tba": ("tba", dict(replay=1, reference="initial")),
    "tba_group": ("tba_group", dict(group=2, replay=1)),
    "chord": ("chord", dict(replay=1, phi="mass", mu_peak=0.5)),
    "ppo kl": ("ppo", dict(objective="kl", correction="ess", replay=1)),
}

class Broken:
    def __init__(self, env):
        self.env, self.steps = env, 0

    def __getattr__(self, name):
        return getattr(self.env, name)

    def step(self, action):
        step = self.env.step(action)
        self.steps += 1
        if self.steps == T + 3:
            step.reward[1] = torch.nan
        return step

def learn(variant, broken=False):
    name, changes = VARIANTS[variant]
    config = AGENTS[name].config(**COMMON | changes)
    config = replace(config, num_envs=N // processes.world_size(), minibatch=config.minibatch // processes.world_size())
    count, group = len(SEEDS) * config.num_envs, changes.get("group", 0)
    if group:
        env = envs.make_grouped("ess/LQR-v0", count, group, max_episode_steps=T)
    else:
        env = envs.make("ess/LQR-v0", count, backend="torch", max_episode_steps=20)
    env = Broken(env) if broken else env
    population = Population(AGENTS[name].agent(config, env.obs_dim, env.act_dim), SEEDS)
    if name == "chord":
        one = torch.tensor(1)
        shown = {"obs": random.normal(one, (9, env.obs_dim)), "action": 0.3 * random.normal(one, (9, env.act_dim))}
        population.demonstrations = shown
    replay = Replay((1 + config.replay) * T, len(SEEDS), config.num_envs, env.obs_dim, env.act_dim, "cpu")
    done = list(loop.train(population, env, replay, iterations=ITERATIONS, reset_every=RESET))
    for one in done:
        one.seconds.clear()
    state = population.state
    state["return_scale"]["running"] = processes.gathered(state["return_scale"]["running"], 1)
    return {"progress": [vars(one) for one in done], "state": state}

def batch_numbers(x):
    """Whatever the processes are asked for, of every row."""

    def of_row(x):
        def loss_function(p):
            e = effective_sample_size(p.detach() * x)
            return (e * p * standardize_batch(x)).square().mean(), {"ess": e, "max": processes.all_max(x.max())}

        return gradient(loss_function, x.new_ones(())), normalizer.update(normalizer.init((), x.device), x)

    return vmap(of_row)(x)

if __name__ == "__main__":
    rank, meet, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    found = {v: learn(v) for v in VARIANTS}
    if rank == 0:  # alone, as where a run is planned: it must not wait for the other
        obs, last = torch.arange(20.0).view(10, 2), torch.arange(10) % 5 == 4
        behavior.fit(obs, obs[:, :1].sin(), last, config=behavior.Config(hidden=(4,), minibatch=4, max_updates=2))
    x = torch.arange(12.0).view(3, 4).sin() * (1 + rank)
    found["eager"] = batch_numbers(x)
    found["compiled"] = Program(batch_numbers, compiled=shutil.which("g++") is not None)(x)
    try:
        learn("p3o", broken=rank == 1)
        said = None
    except NonFiniteError as error:
        said = str(error)
    torch.save((found, said), out)
    os._exit(0)  # Gloo's threads, seldom and under load, abort a process that ends beside them
'''

ORDER = batches.order


def order_of_two(seeds: torch.Tensor, config: Any, weights: torch.Tensor) -> torch.Tensor:
    """The minibatches of two processes, half of each from either process, as indices into all samples."""
    from dataclasses import replace

    half, parts = replace(config, num_envs=config.num_envs // 2, minibatch=config.minibatch // 2), []
    for rank in range(2):
        own = ORDER(random.fold_in(seeds, rank), half, weights[:, ::2])  # of samples [age, T, N / 2]
        step, env = own // half.num_envs, own % half.num_envs
        parts.append((step * config.num_envs + rank * half.num_envs + env).unflatten(1, (-1, half.minibatch)))
    return torch.cat(parts, dim=2).flatten(1)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without Gloo")
def test_two_processes_learn_what_one_does_with_the_whole_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = [tmp_path / str(rank) for rank in range(2)]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(rank), str(tmp_path / "meet"), str(files[rank])],
            cwd=Path(__file__).parents[2],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    whole: dict[str, Any] = {"__name__": "one"}
    exec(SCRIPT, whole)
    monkeypatch.setattr(batches, "order", order_of_two)
    expected = {variant: whole["learn"](variant) for variant in whole["VARIANTS"]}
    errors = [process.communicate(timeout=600)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
    (first, said), (second, said_too) = (torch.load(file) for file in files)
    torch.testing.assert_close(tree_leaves(first["compiled"]), tree_leaves(first["eager"]))
    x = torch.arange(12.0).view(3, 4).sin()
    pooled = whole["batch_numbers"](torch.cat([x, 2 * x], dim=1))
    torch.testing.assert_close(tree_leaves(first["eager"]), tree_leaves(pooled))
    for variant, alone in expected.items():
        found = first[variant]
        for got, wanted in zip(found["progress"], alone["progress"], strict=True):
            assert got["env_steps"] == wanted["env_steps"] and got["metrics"].keys() == wanted["metrics"].keys()
            torch.testing.assert_close(tree_leaves(got), tree_leaves(wanted), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(tree_leaves(found["state"]), tree_leaves(alone["state"]), rtol=1e-3, atol=1e-4)
        assert sum(int(p["episodes"].sum()) for p in found["progress"]) > 0
    # Not only up to rounding: both processes must hold exactly the same.
    for one, other in zip(tree_leaves(first), tree_leaves(second), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    # Environment 1 of the second process is number 3 of member 0. Both stop, and the first names what it has not seen.
    assert said == said_too and "non-finite reward in member 0 (seed 3), environment 3, step 2 of iteration 2" in said
