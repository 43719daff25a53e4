"""PPO as single-file implementations write it: modules, torch.optim.Adam and a Python loop, one seed, nothing compiled.

It exists to be measured (`ess-rl throughput`) and to check our own: from equal parameters and data both make the same
update. The environments and the details are those of `agents.ppo`, so the remaining differences are `vmap`,
`torch.compile` and targets without a loop over time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from agents.ppo import Config
from ess_rl import normalizer
from ess_rl.contract import Tree, VectorEnv


class ActorCritic(nn.Module):
    """Two tanh networks and a log_std parameter."""

    def __init__(self, config: Config, obs_dim: int, act_dim: int):
        super().__init__()
        self.mean = _mlp(obs_dim, config.hidden, act_dim, 0.01)
        self.value = _mlp(obs_dim, config.hidden, 1, 1.0)
        self.log_std = nn.Parameter(torch.full((act_dim,), config.log_std))

    def policy(self, obs: Tensor) -> Normal:
        """The policy at normalized obs [n, obs_dim]."""
        return Normal(self.mean(obs), self.log_std.exp())


def _mlp(obs_dim: int, hidden: tuple[int, ...], out: int, last_gain: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, size in enumerate((*hidden, out)):
        layer = nn.Linear((obs_dim, *hidden)[i], size)
        nn.init.orthogonal_(layer.weight, 2.0**0.5 if i < len(hidden) else last_gain)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def train(env: VectorEnv, config: Config, seed: int = 0) -> Iterator[int]:
    """Run PPO iterations endlessly; each yields the env steps it took."""
    torch.manual_seed(seed)
    device, (steps, num_envs) = env.device, (config.rollout, env.num_envs)
    net = ActorCritic(config, env.obs_dim, env.act_dim).to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=config.learning_rate, eps=1e-5)
    stats, scale = normalizer.init((env.obs_dim,), device), normalizer.return_scale_init(num_envs, device)
    raw = env.reset(torch.arange(num_envs, device=device))
    while True:
        obs, raw_obs, next_obs = (torch.zeros(steps, num_envs, env.obs_dim, device=device) for _ in range(3))
        action = torch.zeros(steps, num_envs, env.act_dim, device=device)
        log_prob, value, reward = (torch.zeros(steps, num_envs, device=device) for _ in range(3))
        terminated, last = (torch.zeros(steps, num_envs, dtype=torch.bool, device=device) for _ in range(2))
        with torch.no_grad():
            for t in range(steps):
                raw_obs[t], obs[t] = raw, normalizer.standardize(stats, raw)
                pi = net.policy(obs[t])
                action[t] = pi.sample()
                log_prob[t], value[t] = pi.log_prob(action[t]).sum(-1), net.value(obs[t]).squeeze(-1)
                step = env.step(action[t])
                next_obs[t] = normalizer.standardize(stats, step.next_obs)
                reward[t] = step.reward
                terminated[t], last[t] = step.terminated, step.terminated | step.truncated
                raw = step.obs
            scaled, next_value = normalizer.scale_reward(scale, reward), net.value(next_obs).squeeze(-1)
            advantage, following = torch.zeros_like(reward), torch.zeros_like(reward[0])
            for t in reversed(range(steps)):
                delta = scaled[t] + config.discount * ~terminated[t] * next_value[t] - value[t]
                following = advantage[t] = delta + config.discount * config.lambda_ * ~last[t] * following
        samples = {
            "obs": obs, "action": action, "log_prob": log_prob,
            "advantage": advantage, "value_target": advantage + value,
        }  # fmt: skip
        data = {name: x.flatten(0, 1) for name, x in samples.items()}
        for _ in range(config.epochs):
            for index in torch.randperm(steps * num_envs, device=device).split(config.minibatch):
                update(net, optimizer, config, {name: x[index] for name, x in data.items()})
        stats = normalizer.update(stats, raw_obs)
        scale = normalizer.return_scale_update(scale, reward, last, config.discount)
        yield steps * num_envs


def update(net: ActorCritic, optimizer: torch.optim.Optimizer, config: Config, batch: Tree) -> None:
    """One gradient step of clipped PPO on a minibatch."""
    advantage = (batch["advantage"] - batch["advantage"].mean()) / (batch["advantage"].std() + 1e-8)
    ratio = torch.exp(net.policy(batch["obs"]).log_prob(batch["action"]).sum(-1) - batch["log_prob"])
    clipped = torch.clamp(ratio, 1.0 - config.clip, 1.0 + config.clip)
    policy_loss = -torch.min(ratio * advantage, clipped * advantage).mean()
    value_loss = 0.5 * (net.value(batch["obs"]).squeeze(-1) - batch["value_target"]).square().mean()
    optimizer.zero_grad()
    (policy_loss + config.value_coef * value_loss).backward()
    nn.utils.clip_grad_norm_(net.parameters(), config.max_grad_norm)
    optimizer.step()
