"""One update of each agent against its loss written in plain torch: signs, weights, gradients, learning rates.

pi is not the policy that acted, no coefficient is 0, and a quarter of training is over. The first step of Adam moves a
parameter by rate * g / (|g| + epsilon), so where it goes tells gradient and learning rate. What a loss is made of is
tested by hand in tests/ess_rl; iql, awac, td3_bc and bc are in test_offline_against_plain_torch.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.utils._pytree import tree_leaves, tree_map

from agents import AGENTS, OFFLINE_AGENTS
from ess_rl.gaussian import Gaussian
from ess_rl.hints import affinity_weight
from ess_rl.objectives import imitation, width_correction
from ess_rl.population import values_of

OBS, ACT, COUNT, PROGRESS = 3, 2, 24, 0.25
Loss = Callable[[Any, dict[str, Tensor], dict[str, Any]], Tensor]  # of parameters, minibatch and state


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def minibatch() -> dict[str, Tensor]:
    """Samples of a policy with other means and widths than the one that learns."""
    log_std = -0.8 + 0.2 * draw(1, COUNT, ACT)
    mean = 0.3 * draw(2, COUNT, ACT)
    return {
        "obs": draw(3, COUNT, OBS), "next_obs": draw(4, COUNT, OBS), "reward": draw(6, COUNT),
        "action": mean + log_std.exp() * draw(5, COUNT, ACT), "behavior_mean": mean, "behavior_log_std": log_std,
        "advantage": 1.0 + 2.0 * draw(7, COUNT), "value_target": 2.0 * draw(8, COUNT),
        "action_value": 2.0 * draw(16, COUNT),
        "terminated": torch.arange(COUNT) % 5 == 0, "noise": draw(10, COUNT, 2, ACT),
        "expert_obs": draw(11, COUNT, OBS), "expert_action": 0.5 * draw(12, COUNT, ACT),
        "prior_mean": 0.5 * draw(13, COUNT, ACT), "prior_variance": 0.1 * draw(14, COUNT, ACT).square(),
        "divergence_ahead": 0.3 * draw(15, COUNT), "step_weight": 0.9 ** torch.arange(COUNT),
        "proximal_log_prob": log_prob(Normal(mean, log_std.exp()), mean + log_std.exp() * draw(5, COUNT, ACT))
        + 0.3 * draw(17, COUNT),
        "hinted": torch.arange(COUNT) % 3 == 2,
    }  # fmt: skip


def net(layers: Any, x: Tensor, activation: Any = torch.tanh) -> Tensor:
    *hidden, last = layers.values()
    for layer in hidden:
        x = activation(x @ layer["weight"] + layer["bias"])
    return x @ last["weight"] + last["bias"]


def value(params: Any, obs: Tensor, name: str = "value") -> Tensor:
    return net(params[name], obs)[..., 0]


def policy(params: Any, obs: Tensor, name: str = "policy") -> Normal:
    mean = net(params[name]["mean"], obs)
    return Normal(mean, params[name]["log_std"].exp().expand_as(mean))


def acted(batch: dict[str, Tensor]) -> Normal:
    return Normal(batch["behavior_mean"], batch["behavior_log_std"].exp())


def log_prob(distribution: Normal, action: Tensor) -> Tensor:
    return distribution.log_prob(action).sum(-1)


def ratio(pi: Normal, batch: dict[str, Tensor]) -> Tensor:
    return (log_prob(pi, batch["action"]) - log_prob(acted(batch), batch["action"])).exp()


def ess(rho: Tensor) -> Tensor:
    return (rho.sum() ** 2 / (len(rho) * rho.square().sum())).detach()


def distance(one: Normal, other: Normal) -> Tensor:
    return kl_divergence(one, other).sum(-1).mean()


def standardized(x: Tensor) -> Tensor:
    return (x - x.mean()) / x.std()


def p3o(
    pi: Normal, batch: dict[str, Tensor], advantage: Tensor, pull: Tensor, e: Tensor | None = None, cap: Any = None
) -> Tensor:
    rho = ratio(pi, batch)
    e = ess(rho) if e is None else e
    cap = e if cap is None else torch.as_tensor(cap)
    assert (rho > cap).any() and (rho < cap).any()  # some samples are capped
    weight = torch.minimum(rho, cap).detach()
    return -(weight * advantage * log_prob(pi, batch["action"])).mean() + (1.0 - e) * pull


def clipped(pi: Normal, batch: dict[str, Tensor], advantage: Tensor, clip: float = 0.2) -> Tensor:
    rho = ratio(pi, batch)
    assert (rho > 1.0 + clip).any() and (rho < 1.0 - clip).any()
    return -torch.minimum(rho * advantage, rho.clamp(1.0 - clip, 1.0 + clip) * advantage).mean()


def of_value(params: Any, batch: dict[str, Tensor], pi: Normal) -> Tensor:
    """What all acting agents add: 0.7 times half the squared error, less 0.3 times the entropy."""
    value_loss = 0.5 * (value(params, batch["obs"]) - batch["value_target"]).square().mean()
    return 0.7 * value_loss - 0.3 * pi.entropy().sum(-1).mean()


def loss_of_ppo(params: Any, batch: dict[str, Tensor], state: dict[str, Any]) -> Tensor:
    pi = policy(params, batch["obs"])
    return clipped(pi, batch, standardized(batch["advantage"])) + of_value(params, batch, pi)


def of_relative(objective: str) -> Loss:
    """Objectives of `ppo` with the proximal policy p of the minibatch, or the weight of 0.4 of a penalty."""

    def loss(params: Any, batch: dict[str, Tensor], state: dict[str, Any]) -> Tensor:
        pi, a = policy(params, batch["obs"]), standardized(batch["advantage"])
        rho, center = ratio(pi, batch), (batch["proximal_log_prob"] - log_prob(acted(batch), batch["action"])).exp()
        r = rho / center
        if objective == "decoupled":
            found = -(center * torch.minimum(r * a, r.clamp(0.8, 1.2) * a)).mean()
        elif objective == "generalized":
            found = -torch.minimum(rho * a, torch.clamp(rho, center - 0.2, center + 0.2) * a).mean()
        elif objective == "band":
            found = -(rho.clamp(0.8, 1.2).detach() * a * log_prob(pi, batch["action"])).mean()
        elif objective == "kl":
            found = -(rho * a).mean() + 0.4 * distance(acted(batch), pi)
        else:
            found = -(rho * a).mean() + 0.4 * (rho - 1.0).square().mean()
        return found + of_value(params, batch, pi)

    return loss


def trusted(pi: Normal, batch: dict[str, Tensor]) -> Tensor:
    """Advantages with HINT's weight, whose formula is tested in tests/ess_rl."""
    a, log_ratio = standardized(batch["advantage"]), ratio(pi, batch).log()
    weight = affinity_weight(log_ratio.detach(), a, batch["hinted"], 0.5, act_dim=ACT)
    assert 0.05 < float(weight.amin()) < 0.95
    return weight * a


def loss_of_hinted_ppo(params: Any, batch: dict[str, Tensor], state: dict[str, Any]) -> Tensor:
    pi = policy(params, batch["obs"])
    return clipped(pi, batch, trusted(pi, batch)) + of_value(params, batch, pi)


def loss_of_hinted_p3o(params: Any, batch: dict[str, Tensor], state: dict[str, Any]) -> Tensor:
    pi = policy(params, batch["obs"])
    return p3o(pi, batch, trusted(pi, batch), distance(pi, acted(batch))) + of_value(params, batch, pi)


def of_p3o(pull: str = "closed_form", cap: Any = None, weight: float | None = None) -> Loss:
    """P3O with another KL, a cap of e^(1/d) ("ess_per_dim") or a number, or a fixed weight of the KL."""

    def loss(params: Any, batch: dict[str, Tensor], state: dict[str, Any]) -> Tensor:
        pi, b = policy(params, batch["obs"]), acted(batch)
        rho, a = ratio(pi, batch), standardized(batch["advantage"])
        to_b = {
            "closed_form": distance(pi, b),
            "reverse": distance(b, pi),
            "k3": (rho.log() + 1.0 / rho - 1.0).mean(),
        }[pull]
        limit = ess(rho) ** (1.0 / ACT) if cap == "ess_per_dim" else cap
        found = p3o(pi, batch, a, to_b, cap=limit)
        if weight is not None:
            found = found + (weight - (1.0 - ess(rho))) * to_b
        return found + of_value(params, batch, pi)

    return loss


def loss_of_p3o(params: Any, batch: dict[str, Tensor], state: dict[str, Any]) -> Tensor:
    pi = policy(params, batch["obs"])
    loss = p3o(pi, batch, standardized(batch["advantage"]), distance(pi, acted(batch)))
    return loss + of_value(params, batch, pi)


def loss_of_p4o(params: Any, batch: dict[str, Tensor], state: dict[str, Any]) -> Tensor:
    pi, p = policy(params, batch["obs"]), policy({"policy": state["proximal"]}, batch["obs"])
    e_b = ess(ratio(pi, batch))
    e_p = ess((log_prob(pi, batch["action"]) - log_prob(p, batch["action"])).exp())
    share = (1.0 - e_b) / (2.0 - e_b - e_p)
    to_mixture = share * distance(pi, acted(batch)) + (1.0 - share) * distance(pi, p)
    loss = p3o(pi, batch, standardized(batch["advantage"]), to_mixture, torch.minimum(e_b, e_p))
    return loss + of_value(params, batch, pi)


def loss_of_bpo(params: Any, batch: dict[str, Tensor], state: dict[str, Any]) -> Tensor:
    pi, q = policy(params, batch["obs"]), batch["action_value"]
    v, u = (value(params, batch["obs"], name) for name in ("value", "median"))
    goal = 0.8 + 0.4 * torch.sigmoid((q - u) / 0.5).detach()
    pinball = 0.4 * ((1.0 + (q - u).exp()).log() - 0.5 * (q - u)).mean()
    return ((ratio(pi, batch) - goal).abs() * (q - v).abs().detach()).mean() + pinball + of_value(params, batch, pi)


def loss_of_dapo(params: Any, batch: dict[str, Tensor], state: dict[str, Any]) -> Tensor:
    pi = policy(params, batch["obs"])
    cost = (ratio(pi, batch).log() + batch["divergence_ahead"]).detach()
    return clipped(pi, batch, standardized(batch["advantage"]) - 0.6 * cost) + of_value(params, batch, pi)


def loss_of_p3o_da(params: Any, batch: dict[str, Tensor], state: dict[str, Any]) -> Tensor:
    pi = policy(params, batch["obs"])
    rho = ratio(pi, batch)
    cost = (rho.log() + batch["divergence_ahead"]).detach()
    return p3o(pi, batch, standardized(batch["advantage"]), (rho * cost).mean()) + of_value(params, batch, pi)


def loss_of_tba_group(params: Any, batch: dict[str, Tensor], state: dict[str, Any]) -> Tensor:
    return -(batch["step_weight"] * batch["advantage"] * log_prob(policy(params, batch["obs"]), batch["action"])).mean()


def loss_of_chord(params: Any, batch: dict[str, Tensor], state: dict[str, Any]) -> Tensor:
    """A quarter of training is half of the fall: mu = 0.1 + (0.9 - 0.1) / 2 = 0.5."""
    pi = policy(params, batch["obs"])
    imitation = -log_prob(policy(params, batch["expert_obs"]), batch["expert_action"]).mean()
    loss = 0.5 * clipped(pi, batch, standardized(batch["advantage"])) + 0.5 * imitation
    return loss + of_value(params, batch, pi)


def loss_of_p3o_chord(params: Any, batch: dict[str, Tensor], state: dict[str, Any]) -> Tensor:
    pi = policy(params, batch["obs"])
    imitation = -log_prob(policy(params, batch["expert_obs"]), batch["expert_action"]).mean()
    found = p3o(pi, batch, standardized(batch["advantage"]), distance(pi, acted(batch)))
    return 0.5 * found + 0.5 * imitation + of_value(params, batch, pi)


def of_mass(width: Any) -> Loss:
    """CHORD's weights u (1 - u), whose formula is tested in tests/ess_rl."""

    def loss(params: Any, batch: dict[str, Tensor], state: dict[str, Any]) -> Tensor:
        pi, on_expert = policy(params, batch["obs"]), policy(params, batch["expert_obs"])
        as_ours = Gaussian(on_expert.mean, on_expert.stddev.log())
        found, *_ = imitation(as_ours, batch["expert_action"], phi="mass", width=width)
        return 0.5 * clipped(pi, batch, standardized(batch["advantage"])) + 0.5 * found + of_value(params, batch, pi)

    return loss


def loss_of_p3o_prior(params: Any, batch: dict[str, Tensor], state: dict[str, Any]) -> Tensor:
    nets = params["policy"]
    pi = Normal(net(nets["mean"], batch["obs"]), (-1.0 + net(nets["log_std"], batch["obs"])).exp())
    prior = Normal(batch["prior_mean"], (0.4**2 + batch["prior_variance"]).sqrt())
    loss = p3o(pi, batch, standardized(batch["advantage"]), distance(pi, acted(batch)))
    to_prior = distance(prior, pi) if "reverse" in state else distance(pi, prior)
    return loss + 0.6 * to_prior + of_value(params, batch, pi)


def reverse(loss: Loss) -> Loss:
    """The same loss, told that its KL goes the other way."""
    return lambda params, batch, state: loss(params, batch, {**state, "reverse": True})


def loss_of_p3o_2019(params: Any, batch: dict[str, Tensor], state: dict[str, Any]) -> Tensor:
    """The pull is KL(b || pi), the value's error is whole, and an update on replayed data has no entropy bonus."""
    pi = policy(params, batch["obs"])
    pull = distance(pi, acted(batch)) if "reverse" in state else distance(acted(batch), pi)  # of its code, of the paper
    loss = p3o(pi, batch, standardized(batch["advantage"]), pull)
    loss = loss + 0.7 * (value(params, batch["obs"]) - batch["value_target"]).square().mean()
    return loss - (0.0 if "age" in batch else 0.3) * pi.entropy().sum(-1).mean()


def gaussian(params: Any, obs: Tensor) -> Normal:
    mean, log_std = net(params["policy"], obs, torch.relu).chunk(2, -1)
    return Normal(mean, log_std.exp())


def loss_of_awr(params: Any, batch: dict[str, Tensor], state: dict[str, Any]) -> Tensor:
    mean = net(params["policy"]["mean"], batch["obs"], torch.relu)
    weight = (batch["advantage"] / 0.8).exp().clamp(max=5.0)
    assert (weight == 5.0).any() and (weight < 5.0).any()
    error = net(params["value"], batch["obs"], torch.relu)[:, 0] - batch["value_target"]
    likelihood = log_prob(Normal(mean, params["policy"]["log_std"].exp()), batch["action"])
    return 0.5 * error.square().mean() - (weight * likelihood).mean()


def loss_of_p3o_offline(params: Any, batch: dict[str, Tensor], state: dict[str, Any]) -> Tensor:
    pi = gaussian(params, batch["obs"])
    error = net(params["value"], batch["obs"], torch.relu)[:, 0] - batch["value_target"]
    pull = distance(pi, acted(batch))
    return 0.5 * error.square().mean() + p3o(pi, batch, standardized(batch["advantage"]), pull)


def loss_of_cloning(params: Any, batch: dict[str, Tensor], state: dict[str, Any]) -> Tensor:
    error = net(params["value"], batch["obs"], torch.relu)[:, 0] - batch["value_target"]
    return 0.5 * error.square().mean() - log_prob(gaussian(params, batch["obs"]), batch["action"]).mean()


def loss_of_brac(params: Any, batch: dict[str, Tensor], state: dict[str, Any]) -> Tensor:
    def qs(nets: Any, obs: Tensor, action: Tensor) -> Tensor:
        return torch.stack([net(nets[k], torch.cat([obs, action], 1), torch.relu)[:, 0] for k in "12"])

    pi, obs = gaussian(params, batch["obs"]), batch["obs"]
    pair = (acted(batch), pi) if "reverse" in state else (pi, acted(batch))
    with torch.no_grad():
        then = gaussian(params, batch["next_obs"])
        next_action = (then.mean + then.stddev * batch["noise"][:, 1]).clamp(-1, 1)
        next_q = qs(state["target_q"], batch["next_obs"], next_action).amin(0)
        goal = batch["reward"] - 0.3 * kl_divergence(*pair).sum(-1)
        goal = goal + 0.9 * (~batch["terminated"]) * next_q
    critic = (qs(params["q"], obs, batch["action"].clamp(-1, 1)) - goal).square().mean(1).sum()
    fixed = tree_map(Tensor.detach, params["q"])
    chosen = qs(fixed, obs, (pi.mean + pi.stddev * batch["noise"][:, 0]).clamp(-1, 1)).amin(0)
    return critic + 0.3 * distance(*pair) - chosen.mean()


ACTING = {"value_coef": 0.7, "entropy_coef": 0.3}
LEFT = 1.0 - PROGRESS
# name: (agent, what of its config is not the default, loss, learning rates after a quarter of training)
CASES: dict[str, tuple[str, dict[str, Any], Loss, dict[str, float]]] = {
    "ppo": ("ppo", ACTING, loss_of_ppo, {"policy": LEFT, "value": 2.0 * LEFT}),
    **{
        f"ppo {name}": ("ppo", {"objective": name, **ACTING}, of_relative(name), {"policy": LEFT, "value": 2.0 * LEFT})
        for name in ("decoupled", "generalized", "band", "kl", "variance")
    },
    "ppo with hints": (
        "ppo",
        {"hints": 2, "hint_lambda": 0.5, **ACTING},
        loss_of_hinted_ppo,
        {"policy": LEFT, "value": 2.0 * LEFT},
    ),
    "p3o": ("p3o", ACTING, loss_of_p3o, {"policy": 0.5 * LEFT, "value": 2.0 * LEFT}),  # half of it is held back
    **{
        f"p3o {' '.join(f'{key} {x}' for key, x in changes.items())}": (
            "p3o",
            {**changes, **ACTING},
            loss,
            {"policy": 0.5 * LEFT, "value": 2.0 * LEFT},
        )
        for changes, loss in (
            ({"behavior_kl": "reverse"}, of_p3o("reverse")),
            ({"behavior_kl": "k3"}, of_p3o("k3")),
            ({"cap": 0.5}, of_p3o(cap=0.5)),
            ({"cap": "ess_per_dim"}, of_p3o(cap="ess_per_dim")),
            ({"pull": 0.3}, of_p3o(weight=0.3)),
            ({"hints": 2, "hint_lambda": 0.5}, loss_of_hinted_p3o),
        )
    },
    "p4o": ("p4o", {"mixture_kl": "convex", **ACTING}, loss_of_p4o, {"policy": 0.5 * LEFT, "value": 2.0 * LEFT}),
    "bpo": (
        "bpo",
        {"clip": 0.2, "temperature": 0.5, "median_coef": 0.4, **ACTING},
        loss_of_bpo,
        {"policy": LEFT, "value": 2.0 * LEFT, "median": 2.0 * LEFT},
    ),
    "dapo": ("dapo", {"divergence_coef": 0.6, **ACTING}, loss_of_dapo, {"policy": LEFT, "value": 2.0 * LEFT}),
    "p3o-da": ("dapo", {"objective": "p3o", **ACTING}, loss_of_p3o_da, {"policy": LEFT, "value": 2.0 * LEFT}),
    "tba_group": ("tba_group", {}, loss_of_tba_group, {"policy": LEFT}),
    "chord": ("chord", {"mu_valley": 0.1, **ACTING}, loss_of_chord, {"policy": LEFT, "value": 2.0 * LEFT}),
    "chord p3o": (
        "chord",
        {"objective": "p3o", "mu_valley": 0.1, **ACTING},
        loss_of_p3o_chord,
        {"policy": LEFT, "value": 2.0 * LEFT},
    ),
    **{
        f"chord {name}": (
            "chord",
            {"phi": "mass", "width": name, "mu_valley": 0.1, **ACTING},
            of_mass(width),
            {"policy": LEFT, "value": 2.0 * LEFT},
        )
        for name, width in (("corrected", width_correction(ACT)), ("fixed", "fixed"), ("plain", 1.0))
    },
    "p3o_prior": (
        "p3o_prior",
        {"prior": "mle", "prior_std": 0.4, "prior_coef": 0.6, **ACTING},
        loss_of_p3o_prior,
        {"policy": LEFT, "value": 2.0 * LEFT},
    ),
    "p3o_prior reverse": (
        "p3o_prior",
        {"prior": "mle", "prior_std": 0.4, "prior_coef": 0.6, "prior_kl": "reverse", **ACTING},
        reverse(loss_of_p3o_prior),
        {"policy": LEFT, "value": 2.0 * LEFT},
    ),
    "p3o_2019 closed form": (
        "p3o_2019",
        {"details": "shared", "behavior_kl": "closed_form", **ACTING},
        reverse(loss_of_p3o_2019),
        {"policy": LEFT, "value": LEFT},
    ),
    "brac reverse": (
        "brac",
        {"alpha": 0.3, "return_range": 0.0, "discount": 0.9, "behavior_kl": "reverse"},
        reverse(loss_of_brac),
        {"policy": 2.0, "q": 1.0},
    ),
    "p3o_2019": ("p3o_2019", {"details": "shared", **ACTING}, loss_of_p3o_2019, {"policy": LEFT, "value": LEFT}),
    "p3o_2019 replayed": (
        "p3o_2019",
        {"details": "shared", **ACTING},
        loss_of_p3o_2019,
        {"policy": LEFT, "value": LEFT},
    ),
    "awr": ("awr", {"temperature": 0.8, "max_weight": 5.0}, loss_of_awr, {"policy": 1.0, "value": 1.0}),
    # (1 - progress) / (1 - cloning) of the policy's is left
    "p3o_offline": ("p3o_offline", {"cloning": 0.2}, loss_of_p3o_offline, {"policy": 2.0 * 0.9375, "value": 1.0}),
    "p3o_offline clones": ("p3o_offline", {"cloning": 0.5}, loss_of_cloning, {"policy": 1.0, "value": 1.0}),
    "brac": (
        "brac",
        {"alpha": 0.3, "return_range": 0.0, "discount": 0.9},
        loss_of_brac,
        {"policy": 2.0, "q": 1.0},
    ),
}
RATE = 1e-3


def begun(name: str, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """An agent and its state after a quarter of training, every weight and bias of which is somewhere."""
    registered = AGENTS.get(name) or OFFLINE_AGENTS[name]
    known = registered.config.__dataclass_fields__
    rates = {"learning_rate": RATE, "value_learning_rate": 2.0 * RATE, "policy_learning_rate": 2.0 * RATE}
    others = {"final_learning_rate": 0.0, "max_grad_norm": 1e6}
    given = {key: x for key, x in {"hidden": (6, 5), **rates, **others}.items() if key in known}
    config = registered.config(**given | settings)
    agent = registered.agent(config, OBS, ACT)
    hyper = {key: torch.tensor(x[0]) for key, x in values_of(config, {}, 1).items()}
    state = agent.init(torch.tensor(3), hyper)
    leaves = iter(range(100, 200))
    moved = tree_map(lambda x: x + 0.2 * draw(next(leaves), *x.shape), state["params"])
    state = {**state, "params": moved, "progress": torch.tensor(PROGRESS)}
    apart = {
        "proximal": lambda: tree_map(lambda x: x + 0.2 * draw(next(leaves), *x.shape), moved["policy"]),
        "target_q": lambda: tree_map(lambda x: x + 0.2 * draw(next(leaves), *x.shape), moved["q"]),
        "rate_factor": lambda: torch.tensor(0.5),
        "kl_coef": lambda: torch.tensor(0.4),
    }
    return agent, {**state, **{key: make() for key, make in apart.items() if key in state}}


def plain_gradient(loss: Loss, batch: dict[str, Tensor], state: dict[str, Any]) -> Any:
    params = tree_map(lambda x: x.clone().requires_grad_(), state["params"])
    leaves = tree_leaves(params)
    found = iter(torch.autograd.grad(loss(params, batch, state), leaves, allow_unused=True))
    return tree_map(lambda x: torch.zeros_like(x) if (g := next(found)) is None else g, params)


def assert_moved(state: dict[str, Any], new: dict[str, Any], gradient: Any, rates: dict[str, float]) -> None:
    """Each network by a first step of Adam along -gradient."""
    assert rates.keys() == state["params"].keys()
    optimizer = new["optimizer"]
    moments = optimizer["m"] if "m" in optimizer else {name: optimizer[name]["m"] for name in rates}  # of all, of each
    for name, rate in rates.items():
        found = tree_map(lambda m: 10.0 * m, moments[name])
        torch.testing.assert_close(found, gradient[name], rtol=1e-3, atol=2e-6)
        expected = tree_map(
            lambda x, g, rate=rate: x - RATE * rate * g / (g.abs() + 1e-5), state["params"][name], gradient[name]
        )
        for got, wanted, g in zip(*map(tree_leaves, (new["params"][name], expected, gradient[name])), strict=True):
            sure = g.abs() > 1e-4  # where rounding does not decide
            torch.testing.assert_close(got[sure], wanted[sure], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_an_update_follows_the_loss_as_it_is_written(case: str):
    name, settings, loss, rates = CASES[case]
    agent, state = begun(name, settings)
    batch = minibatch() | ({"age": torch.ones(COUNT)} if "replayed" in case else {})
    new, metrics = agent.update(state, batch)
    assert all(torch.isfinite(x).all() for x in metrics.values())
    assert_moved(state, new, plain_gradient(loss, batch, state), rates)


def test_every_agent_that_acts_has_its_loss_here():
    assert {name for name, *_ in CASES.values()} | {"tba"} >= AGENTS.keys()


def test_trajectory_balance_follows_the_squared_residuals():
    """delta_j = V(s_0) - discount^j V(s_j) + sum_{i < j} discount^i (beta log(pi / pi_ref) + tau log pi - r), weighted
    as the lambda-return is; the policy's part of the gradient is that of half its square, over beta + tau."""
    beta, tau, discount, lambda_, length = 0.2, 0.3, 0.9, 0.6, 3
    agent, state = begun("tba", {"beta": beta, "discount": discount, "lambda_": lambda_, "segment_length": 3, **ACTING})
    lengths = [1 + n % length for n in range(COUNT)]
    batch = {
        "obs": draw(1, COUNT, length, OBS), "action": 0.5 * draw(2, COUNT, length, ACT),
        "reference_log_prob": draw(3, COUNT, length), "reward": draw(4, COUNT, length),
        "end_value": draw(5, COUNT, length), "within": torch.arange(length) < torch.tensor(lengths)[:, None],
        "behavior_mean": torch.zeros(COUNT, ACT), "behavior_log_std": torch.zeros(COUNT, ACT),
    }  # fmt: skip

    def loss(params: Any, batch: dict[str, Tensor], state: dict[str, Any]) -> Tensor:
        likelihood = log_prob(policy(params, batch["obs"]), batch["action"])
        charge = beta * (likelihood - batch["reference_log_prob"]) + tau * likelihood - batch["reward"]
        total = torch.zeros(())
        for n, steps in enumerate(lengths):
            for j in range(1, steps + 1):
                weight = lambda_ ** (j - 1) * (1.0 if j == steps else 1.0 - lambda_)
                paid = sum((discount**i * charge[n, i] for i in range(j)), start=torch.zeros(()))
                delta = value(params, batch["obs"][n, 0]) - discount**j * batch["end_value"][n, j - 1] + paid
                total = total + weight * delta.square() / 2
        return total / COUNT

    new, _ = agent.update(state, batch)
    gradient = plain_gradient(loss, batch, state)
    gradient = {
        "policy": tree_map(lambda g: g / (beta + tau), gradient["policy"]),
        "value": tree_map(lambda g: 0.7 * g, gradient["value"]),
    }
    assert_moved(state, new, gradient, {"policy": LEFT, "value": 2.0 * LEFT})


def test_p3o_of_2019_descends_by_rmsprop_as_published():
    """Advantages as they are; the first step moves a parameter by rate * g / (sqrt(0.01) |g| + epsilon)."""
    agent, state = begun("p3o_2019", ACTING)
    batch = minibatch()

    def loss(params: Any, batch: dict[str, Tensor], state: dict[str, Any]) -> Tensor:
        pi = policy(params, batch["obs"])
        found = p3o(pi, batch, batch["advantage"], distance(acted(batch), pi)) - 0.3 * pi.entropy().sum(-1).mean()
        return found + 0.7 * (value(params, batch["obs"]) - batch["value_target"]).square().mean()

    new, _ = agent.update(state, batch)
    gradient = plain_gradient(loss, batch, state)
    for name in ("policy", "value"):
        for before, after, g in zip(
            *map(tree_leaves, (state["params"][name], new["params"][name], gradient[name])), strict=True
        ):
            sure = g.abs() > 1e-3
            step = RATE * LEFT * g / (0.1 * g.abs() + 1e-5)
            torch.testing.assert_close((before - after)[sure], step[sure], rtol=1e-3, atol=1e-6)
