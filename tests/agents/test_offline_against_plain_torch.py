"""A few updates of our offline agents and of the same methods written with torch's own modules, one beside the other.

From equal parameters, minibatches and noise; the gradients of an update are all taken before any of its steps.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal

from agents import OFFLINE_AGENTS
from ess_rl import normalizer, offline
from ess_rl.offline import OfflinePopulation
from ess_rl.transitions import Transitions

OBS, ACT, UPDATES = 3, 2, 5
RATE, DISCOUNT, TAU = 3e-3, 0.9, 0.1


def data(count: int = 60) -> Transitions:
    """Episodes of 10 steps, of which every second one terminates; some actions lie beyond the bounds."""
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=generator)

    number = torch.arange(count)
    last = number % 10 == 9
    return Transitions(
        obs=2.0 + 3.0 * draw(OBS), action=0.8 * draw(ACT), reward=draw(), next_obs=2.0 + 3.0 * draw(OBS),
        terminated=last & (number % 20 == 19), truncated=last & (number % 20 == 9),
        behavior_mean=torch.zeros(count, ACT), behavior_log_std=torch.zeros(count, ACT),
        version=torch.full((count,), -1),
    )  # fmt: skip


def sequential(layers: dict[str, Any]) -> nn.Sequential:
    """One of our networks, of a population of one, as torch's modules."""
    made: list[nn.Module] = []
    for layer in layers.values():
        linear = nn.Linear(*layer["weight"].shape[1:])
        with torch.no_grad():
            linear.weight.copy_(layer["weight"][0].T)
            linear.bias.copy_(layer["bias"][0])
        made += [linear, nn.ReLU()]
    return nn.Sequential(*made[:-1])


def assert_same(net: nn.Sequential, layers: dict[str, Any]) -> None:
    for i, layer in layers.items():
        linear: Any = net[2 * int(i)]
        torch.testing.assert_close(linear.weight.T, layer["weight"][0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(linear.bias, layer["bias"][0], rtol=1e-4, atol=1e-6)


class Plain:
    """The networks of an agent as torch's modules, each with an Adam, and the minibatches that `ours` will see."""

    def __init__(self, name: str, **settings: Any):
        agent, config, _ = OFFLINE_AGENTS[name]
        given = settings if name == "bc" else {"discount": DISCOUNT, "tau": TAU, **settings}
        self.config = config(hidden=(7, 6), minibatch=16, learning_rate=RATE, **given)
        self.ours = OfflinePopulation(agent(self.config, OBS, ACT), [5])
        self.data = data()
        self.ours.describe(self.data)
        self.stats = offline.data_stats(self.data, torch.device("cpu"))
        params = self.ours.state["params"]
        self.policy = sequential(params["policy"].get("mean", params["policy"]))
        self.q = [sequential(layers) for layers in params.get("q", {}).values()]
        self.target_q = [sequential(layers) for layers in params.get("q", {}).values()]
        self.steps: list[torch.optim.Optimizer] = [self.adam(net.parameters()) for net in (self.policy, *self.q)]

    def adam(self, parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=RATE, eps=1e-5)

    def batch(self, number: int) -> dict[str, Tensor]:
        numbers = torch.tensor([number])
        index = offline.minibatch_index(self.ours.seed, numbers, len(self.data.reward), 16)[0, 0]
        found = {name: x[index] for name, x in offline.samples(self.data, "cpu").items()}
        found |= {name: normalizer.standardize(self.stats["obs"], found[name]) for name in ("obs", "next_obs")}
        noise = offline.update_noise(self.ours.seed, numbers, 16, ACT)[0, 0]
        return found | {"noise": noise[:, 0], "next_noise": noise[:, 1], "clipped": found["action"].clamp(-1, 1)}

    def step(self, loss: Tensor) -> None:
        for one in self.steps:
            one.zero_grad()
        loss.backward()
        for one in self.steps:
            one.step()

    def critic_loss(self, batch: dict[str, Tensor], next_value: Tensor, scale: float = 1.0) -> Tensor:
        goal = scale * batch["reward"] + DISCOUNT * (~batch["terminated"]).float() * next_value.detach()
        return torch.stack([F.mse_loss(q(batch["obs"], batch["clipped"]), goal) for q in self.critics(self.q)]).sum()

    @staticmethod
    def critics(nets: list[nn.Sequential]) -> list[Any]:
        return [lambda obs, action, net=net: net(torch.cat([obs, action], 1))[:, 0] for net in nets]

    def least(self, nets: list[nn.Sequential], obs: Tensor, action: Tensor) -> Tensor:
        return torch.stack([q(obs, action) for q in self.critics(nets)]).amin(0)

    @torch.no_grad()
    def follow(self, targets: list[nn.Sequential], nets: list[nn.Sequential]) -> None:
        for target, net in zip(targets, nets, strict=True):
            for old, new in zip(target.parameters(), net.parameters(), strict=True):
                old.mul_(1.0 - TAU).add_(new, alpha=TAU)

    def learn_ours(self) -> Any:
        columns = offline.samples(self.data, "cpu")
        for number in range(UPDATES):
            self.ours.updates(columns, number, 1, UPDATES)
        state = self.ours.state
        for mine, layers in zip(self.q, state["params"].get("q", {}).values(), strict=True):
            assert_same(mine, layers)
        return state


def test_bc_clones_by_maximum_likelihood():
    plain = Plain("bc")
    for number in range(UPDATES):
        batch = plain.batch(number)
        mean, log_std = plain.policy(batch["obs"]).chunk(2, 1)
        plain.step(-Normal(mean, log_std.clamp(-4.0, 2.0).exp()).log_prob(batch["action"]).sum(1).mean())
    assert_same(plain.policy, plain.learn_ours()["params"]["policy"])


@pytest.mark.parametrize("weights", ["exponential", "softmax"])
def test_awac_is_that_of_plain_torch(weights: str):
    plain = Plain("awac", weights=weights, temperature=0.7, return_range=5.0)
    scale = 5.0 / plain.stats["return_range"].item()
    log_std = nn.Parameter(torch.full((ACT,), -1.0))
    plain.steps.append(plain.adam([log_std]))
    for number in range(UPDATES):
        batch = plain.batch(number)
        std = log_std.exp().detach()
        with torch.no_grad():
            next_action = (plain.policy(batch["next_obs"]) + std * batch["next_noise"]).clamp(-1, 1)
            chosen = (plain.policy(batch["obs"]) + std * batch["noise"]).clamp(-1, 1)
            next_value = plain.least(plain.target_q, batch["next_obs"], next_action)
            value = plain.least(plain.q, batch["obs"], chosen)
            advantage = plain.least(plain.q, batch["obs"], batch["clipped"]) - value
            weight = (advantage / 0.7).exp().clamp(max=100.0)
            if weights == "softmax":
                weight = 16 * weight / weight.sum()
        likelihood = Normal(plain.policy(batch["obs"]), log_std.exp()).log_prob(batch["action"]).sum(1)
        plain.step(plain.critic_loss(batch, next_value, scale) - (weight * likelihood).mean())
        plain.follow(plain.target_q, plain.q)
    params = plain.learn_ours()["params"]["policy"]
    assert_same(plain.policy, params["mean"])
    torch.testing.assert_close(log_std, params["log_std"][0])


@pytest.mark.parametrize("imitates", ["clipped", "sampled"])
def test_iql_is_that_of_plain_torch(imitates: str):
    plain = Plain("iql", expectile=0.8, inverse_temperature=2.0, return_range=5.0, imitates=imitates)
    scale = 5.0 / plain.stats["return_range"].item()
    log_std, value = nn.Parameter(torch.full((ACT,), -1.0)), sequential(plain.ours.state["params"]["value"])
    policy_adam = plain.adam([*plain.policy.parameters(), log_std])
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(policy_adam, T_max=UPDATES)
    plain.steps = [policy_adam, *plain.steps[1:], plain.adam(value.parameters())]
    for number in range(UPDATES):
        batch = plain.batch(number)
        error = plain.least(plain.target_q, batch["obs"], batch["clipped"]).detach() - value(batch["obs"])[:, 0]
        value_loss = torch.where(error < 0, 0.2, 0.8) * error.square()
        weight = (2.0 * error.detach()).exp().clamp(max=100.0)
        action = batch["clipped" if imitates == "clipped" else "action"]
        likelihood = Normal(plain.policy(batch["obs"]).tanh(), log_std.exp()).log_prob(action).sum(1)
        loss = plain.critic_loss(batch, value(batch["next_obs"])[:, 0], scale)
        plain.step(loss + value_loss.mean() - (weight * likelihood).mean())
        falling.step()
        plain.follow(plain.target_q, plain.q)
    params = plain.learn_ours()["params"]
    assert_same(plain.policy, params["policy"]["mean"])
    assert_same(value, params["value"])
    torch.testing.assert_close(log_std, params["policy"]["log_std"][0])


def test_td3_bc_is_that_of_plain_torch():
    plain = Plain("td3_bc", alpha=2.0, policy_noise=0.4, noise_clip=0.3, policy_delay=2)
    target_policy = sequential(plain.ours.state["params"]["policy"])
    policy_adam, *critic_adams = plain.steps
    for number in range(UPDATES):
        batch = plain.batch(number)
        noise = (0.4 * batch["noise"]).clamp(-0.3, 0.3)
        next_action = (target_policy(batch["next_obs"]).tanh() + noise).clamp(-1, 1)
        next_value = plain.least(plain.target_q, batch["next_obs"], next_action)
        loss = plain.critic_loss(batch, next_value)
        moves = number % 2 == 1  # every second update
        if moves:
            chosen = plain.policy(batch["obs"]).tanh()
            q = plain.critics(plain.q)[0](batch["obs"], chosen)
            policy_loss = F.mse_loss(chosen, batch["clipped"]) - 2.0 * q.mean() / q.detach().abs().mean()
            policy_adam.zero_grad()
            policy_loss.backward()
        plain.steps = critic_adams
        plain.step(loss)
        if moves:
            policy_adam.step()
            plain.follow(plain.target_q, plain.q)
            plain.follow([target_policy], [plain.policy])
    state = plain.learn_ours()
    assert_same(plain.policy, state["params"]["policy"])
    assert_same(target_policy, state["target"]["policy"])
