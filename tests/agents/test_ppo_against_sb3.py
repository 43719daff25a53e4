"""One iteration of our PPO and one of Stable-Baselines3's, from equal parameters, moments of Adam and data."""

import copy
from typing import Any
from unittest import mock

import numpy as np
import torch
from stable_baselines3 import PPO as SB3
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnvWrapper, VecNormalize
from torch import Tensor

from agents.ppo import PPO, Config
from ess_rl import batches
from ess_rl.contract import Tree
from ess_rl.population import Population
from ess_rl.transitions import Transitions

N, T, EPOCHS = 4, 64, 3


class _Log(VecEnvWrapper):
    """Keeps what each step said, the last observation of an episode in place of the first of the next one."""

    def reset(self) -> Any:
        self.obs: Any = self.venv.reset()
        self.steps: list[Any] = []
        return self.obs.copy()

    def step_wait(self) -> Any:
        said: Any = self.venv.step_wait()
        obs, reward, done, infos = said
        next_obs, truncated = obs.copy(), np.array([info.get("TimeLimit.truncated", False) for info in infos])
        for i in np.flatnonzero(done):
            next_obs[i] = infos[i]["terminal_observation"]
        self.steps.append((self.obs, next_obs, reward.copy(), done & ~truncated, truncated))
        self.obs = obs.copy()
        return obs, reward, done, infos

    def columns(self) -> list[Tensor]:
        """Each of the five things a step says, [T, P=1, N, ...]."""
        columns = (torch.from_numpy(np.stack(x)).unsqueeze(1) for x in zip(*self.steps, strict=True))
        return [x.float() if x.is_floating_point() else x for x in columns]


def _ours(named: dict[str, Tensor]) -> dict[str, Tree]:
    """Tensors under SB3's names -> our tree, for a population of one."""

    def layers(*names: str) -> Tree:
        return {
            str(i): {"weight": named[f"{n}.weight"].T[None].clone(), "bias": named[f"{n}.bias"][None].clone()}
            for i, n in enumerate(names)
        }

    hidden = "mlp_extractor.{}_net.{}".format
    mean = layers(hidden("policy", 0), hidden("policy", 2), "action_net")
    return {
        "policy": {"mean": mean, "log_std": named["log_std"][None].clone()},
        "value": layers(hidden("value", 0), hidden("value", 2), "value_net"),
    }


def test_an_iteration_of_ppo_is_that_of_stable_baselines3():
    env = make_vec_env("Walker2d-v5", N, seed=3, env_kwargs={"max_episode_steps": 25})
    log = _Log(VecNormalize(env, training=False))  # mean 0, variance 1, as our statistics are at first: it only clips
    theirs = SB3(
        "MlpPolicy", log, n_steps=T, n_epochs=EPOCHS, batch_size=64, learning_rate=3e-4, seed=3, device="cpu",
        policy_kwargs={"log_std_init": -1.0},
    )  # fmt: skip
    _, callback = theirs._setup_learn(10_000)
    assert theirs.env is not None
    theirs.collect_rollouts(theirs.env, callback, theirs.rollout_buffer, T)
    theirs.train()  # so that Adam's moments are not zero below
    before = {name: x.clone() for name, x in theirs.policy.state_dict().items()}
    adam = copy.deepcopy(theirs.policy.optimizer.state_dict()["state"])
    log.steps.clear()
    theirs.collect_rollouts(theirs.env, callback, theirs.rollout_buffer, T)
    obs, next_obs, reward, terminated, truncated = log.columns()
    assert terminated.any() and truncated.any()

    # SB3's vf_coef 0.5 weighs the mean square; our value_coef weighs half of it.
    population = Population(PPO(Config(num_envs=N, rollout=T, value_coef=1.0), 17, 6), [0])
    state = population.state
    state["params"] = _ours(before)
    names = [name for name, _ in theirs.policy.named_parameters()]
    moments = {m: _ours({n: adam[i][m] for i, n in enumerate(names)}) for m in ("exp_avg", "exp_avg_sq")}
    for net in ("policy", "value"):
        step = adam[0]["step"].reshape(1).clone()
        state["optimizer"][net] = {"m": moments["exp_avg"][net], "v": moments["exp_avg_sq"][net], "step": step}
    behavior = population.policy(obs.transpose(0, 1).flatten(1, 2))  # [P=1, T * N, act_dim]
    b_mean, b_log_std = (x.view(1, T, N, -1).transpose(0, 1) for x in behavior)
    rollout = Transitions(
        obs=obs, next_obs=next_obs, reward=reward, terminated=terminated, truncated=truncated,
        action=torch.from_numpy(theirs.rollout_buffer.actions).unsqueeze(1),
        behavior_mean=b_mean, behavior_log_std=b_log_std,
        version=torch.zeros(T, 1, N, dtype=torch.int64),
    )  # fmt: skip
    data, _ = batches.prepare(population, [rollout])
    for ours, said in (("advantage", "advantages"), ("value_target", "returns")):
        torch.testing.assert_close(
            data[ours].view(T, N), torch.from_numpy(getattr(theirs.rollout_buffer, said)), rtol=1e-5, atol=1e-5
        )

    orders = [np.random.default_rng(epoch).permutation(N * T) for epoch in range(EPOCHS)]
    with mock.patch("numpy.random.permutation", side_effect=orders):
        theirs.train()
    for order in map(torch.from_numpy, orders):
        index = order % T * N + order // T  # SB3 lays a buffer out environment by environment, we step by step
        population.epoch(data, index.view(-1, 1, 64))
    moved = dict(theirs.policy.state_dict())
    torch.testing.assert_close(population.state["params"], _ours(moved), rtol=0, atol=1e-5)
    assert (moved["action_net.weight"] - before["action_net.weight"]).abs().max() > 1e-3
