"""What holds for every entry of agents.AGENTS, in a population and alone; and from `test_ess_of_the_batch...` on, what
holds for one of them."""

import math
import shutil
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.utils import _pytree as pytree

from agents import AGENTS
from ess_rl import batches, behavior, gaussian, random
from ess_rl.contract import Agent
from ess_rl.errors import UsageError
from ess_rl.ess import effective_sample_size
from ess_rl.gaussian import Gaussian
from ess_rl.networks import value
from ess_rl.objectives import vargrad_trajectory_balance
from ess_rl.population import Population, members
from ess_rl.returns import Correction, corrected
from ess_rl.transitions import Transitions

OBS, ACT, N, T, MINIBATCH = 5, 2, 3, 8, 12
SEEDS = [11, 4, 7]
HYPER = {"learning_rate": [1e-3, 3e-3, 1e-3], "discount": [0.99, 0.9, 0.95]}


def build(name: str, **changes: Any) -> Agent:
    agent, config, _ = AGENTS[name]
    small = config(hidden=(8,), num_envs=N, rollout=T, epochs=1, minibatch=MINIBATCH)
    if has(name, "group"):
        changes = {"group": N, **changes}
    return agent(replace(small, **changes), OBS, ACT)


def collect(population: Population, iteration: int, columns: list[int] | None = None) -> Transitions:
    """A rollout [T, P, N] of the population's own policy in a world of random numbers.

    The world of member p is that of number columns[p], so that a member can meet the same one when it is alone.
    """
    columns = list(range(population.size)) if columns is None else columns
    seeds = random.fold_in(torch.tensor(columns), iteration)

    def draw(purpose: int, *shape: int) -> Tensor:  # [T, P, *shape]
        return random.normal(random.fold_in(seeds, purpose), (T, *shape)).transpose(0, 1)

    obs, next_obs, noise = 2.0 + 3.0 * draw(0, N, OBS), 2.0 + 3.0 * draw(1, N, OBS), draw(2, N, ACT)
    behavior, action = zip(*[population.act(o, e) for o, e in zip(obs, noise, strict=True)], strict=True)
    return Transitions(
        obs=obs,
        action=torch.stack(action),
        reward=5.0 * draw(3, N) + obs.sum(-1),
        terminated=draw(4, N) > 1.3,
        truncated=draw(5, N) > 1.3,
        next_obs=next_obs,
        behavior_mean=torch.stack([b.mean for b in behavior]),
        behavior_log_std=torch.stack([b.log_std for b in behavior]),
        version=torch.full((T, population.size, N), iteration),
    )


def prepared(population: Population, rollout: Transitions) -> dict[str, Tensor]:
    """Its samples, beside each a demonstration for an agent that imitates."""
    if hasattr(population.agent.config, "demonstrations"):
        one = torch.tensor(1)
        obs, action = 2.0 + 3.0 * random.normal(one, (40, OBS)), 0.5 * random.normal(one, (40, ACT))
        population.demonstrations = {"obs": obs, "action": action}
    data = population.prepare(rollout) | batches.demonstrated(population, T * N, 0)
    if getattr(population.agent.config, "hints", 0):
        data["hinted"] = rollout.obs[..., 0].transpose(0, 1).flatten(1) > 2.0  # some half of all
    return data


def indices(updates: int) -> list[Tensor]:
    """The samples of each update, alike for all members."""
    return [random.permutation(torch.tensor(i), T * N)[:MINIBATCH] for i in range(updates)]


def learn(population: Population, iterations: int = 2, updates: int = 2, columns: list[int] | None = None) -> list[Any]:
    """Observe once, then learn. -> everything that came out on the way"""
    population.observe(collect(population, 0, columns))
    seen = []
    for iteration in range(1, iterations):
        rollout = collect(population, iteration, columns)
        data = prepared(population, rollout)
        order = torch.stack(indices(updates)).unsqueeze(1).expand(-1, population.size, -1)
        epochs = []
        for index in order.split(2):
            epochs.append(population.epoch(data | population.refresh(rollout) if epochs else data, index))
        metrics = [{name: x[k] for name, x in epoch.items()} for epoch in epochs for k in range(len(epoch["ess"]))]
        population.observe(rollout)
        seen.append((data, metrics, population.state))
    return seen


def member(tree: Any, p: int) -> Any:
    return pytree.tree_map(lambda x: x[p : p + 1], tree)


def assert_close(one: Any, other: Any, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    torch.testing.assert_close(pytree.tree_leaves(one), pytree.tree_leaves(other), rtol=rtol, atol=atol)


compiles = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="compiling needs a C++ compiler"
)
every_agent = pytest.mark.parametrize("name", sorted(AGENTS))
NO_VALUE = {"tba_group"}  # they learn none


@every_agent
def test_each_member_is_the_agent_alone(name: str):
    together = learn(Population(build(name), SEEDS, HYPER), iterations=3)
    for p, seed in enumerate(SEEDS):
        alone = learn(Population(build(name), [seed], {n: [v[p]] for n, v in HYPER.items()}), 3, columns=[p])
        assert_close(member(together, p), alone)


@every_agent
def test_act_of_a_member_is_that_of_the_agent_alone(name: str):
    population = Population(build(name), SEEDS)
    population.observe(collect(population, 0))
    obs, noise = torch.randn(3, N, OBS), torch.randn(3, N, ACT)
    behavior, action = population.act(obs, noise)
    assert behavior.mean.shape == behavior.log_std.shape == action.shape == (3, N, ACT)
    for p in range(3):
        state = pytree.tree_map(lambda x, p=p: x[p], population.state)
        alone = population.agent.act(state, obs[p])
        assert_close(behavior.mean[p], alone.mean)
        assert_close(action[p], alone.sample(noise[p]))
    assert_close(population.policy(obs), behavior)


@every_agent
def test_fresh_data_have_an_effective_sample_size_of_one(name: str):
    population = Population(build(name, learning_rate=1e-3), SEEDS)
    for iteration in range(3):
        rollout = collect(population, iteration)
        data = prepared(population, rollout)
        first, second = (population.update(data, index.expand(3, -1)) for index in indices(2))
        assert ((1.0 - first["ess"]).abs() < 1e-5).all()
        assert (first["behavior_kl"].abs() < 1e-5).all()
        assert (second["ess"] < 1.0).all()
        population.observe(rollout)


@pytest.mark.parametrize("name", sorted(AGENTS.keys() - NO_VALUE))
def test_the_value_behind_an_end_counts_after_a_truncation_only(name: str):
    population = Population(build(name), SEEDS)
    rollout = collect(population, 0)
    assert rollout.terminated.any()
    assert (rollout.truncated & ~rollout.terminated).any()

    def changed(where: Tensor) -> Tensor:
        """Which advantages move when next_obs does, [P, T * N]."""
        moved = torch.where(where[..., None], rollout.next_obs + 1.0, rollout.next_obs)
        before, after = (prepared(population, r)["advantage"] for r in (rollout, replace(rollout, next_obs=moved)))
        return ~torch.isclose(before, after)

    truncated = rollout.truncated & ~rollout.terminated
    assert not changed(rollout.terminated).any()
    assert changed(truncated)[truncated.transpose(0, 1).flatten(1)].all()


@every_agent
def test_metrics_are_finite_and_one_a_member(name: str):
    for _, metrics, state in learn(Population(build(name), SEEDS), iterations=3):
        for m in metrics:
            assert {"ess", "behavior_kl", "entropy", "loss", "grad_norm"} <= m.keys()
            assert ("value_loss" in m) == (name not in NO_VALUE)
            assert all(x.shape == (3,) and torch.isfinite(x).all() for x in m.values())
        assert all(torch.isfinite(x).all() for x in pytree.tree_leaves(state))


@every_agent
def test_no_function_changes_its_arguments(name: str):
    population = Population(build(name), SEEDS)
    rollout = collect(population, 0)
    data = prepared(population, rollout)
    state = population.state
    before = pytree.tree_map(torch.clone, (state, rollout, data))
    population.update(data, indices(1)[0].expand(3, -1))
    population.observe(rollout)
    assert_close((state, rollout, data), before, rtol=0.0, atol=0.0)
    assert population.state["params"] is not state["params"]


@every_agent
def test_equal_members_stay_equal_and_seeds_differ(name: str):
    *_, state = learn(Population(build(name), [5, 5, 6]), iterations=3, columns=[0, 0, 0])[-1]
    assert_close(member(state["params"], 0), member(state["params"], 1), rtol=0.0, atol=0.0)
    weight = state["params"]["policy"]["mean"]["0"]["weight"]
    assert not torch.allclose(weight[0], weight[2], atol=1e-2)


def float_fields() -> list[tuple[str, str]]:
    """All but those that the loop reads alone: see test_alternate.py."""
    return [
        (name, f.name)
        for name, entry in AGENTS.items()
        for f in fields(entry.config)
        if f.type in ("float", float) and f.name != "replayed_updates"
    ]


def has(name: str, field: str) -> bool:
    return field in {f.name for f in fields(AGENTS[name].config)}


@pytest.mark.parametrize(("name", "field"), float_fields())
def test_members_can_differ_in_every_float_of_the_config(name: str, field: str):
    # A high learning rate, so that ratios leave the clip range, and a gradient beyond max_grad_norm.
    objective: dict[str, Any] = {"objective": "kl"} if field == "target_kl" else {}
    if field == "hint_lambda":
        objective = {"hints": 1}
    if name == "chord":  # at half of training neither at the peak nor at the valley
        objective = {"mu_warm_up": 0.2, "mu_decay": 0.9, "mu_peak": 0.5}
    agent = build(name, learning_rate=0.05, max_grad_norm=0.1, **objective)
    value = getattr(agent.config, field)
    # A KL that these rates do not exceed, an ESS that they do not keep to, a step that no return is far from.
    others = {"target_kl": 10.0, "keep_ess": 0.99, "temperature": 3.0}
    other: float = others[field] if field in others else 0.5 * value + 0.01
    population = Population(agent, [3, 3, 3], {field: [value, other, value]})
    population.state["progress"] += 0.5
    *_, state = learn(population, iterations=3, updates=4, columns=[0, 0, 0])[-1]
    assert state["hyper"][field].tolist() == pytest.approx([value, other, value])
    differs = [not torch.equal(x[0], x[1]) for x in pytree.tree_leaves(state["params"])]
    assert any(differs), f"{field} changes nothing"
    # Of softplus and sigmoid some CPUs compute a vector's last numbers by another routine than those before them.
    tolerance = {"rtol": 1e-6, "atol": 1e-9} if name == "bpo" else {"rtol": 0.0, "atol": 0.0}
    assert_close(member(state["params"], 0), member(state["params"], 2), **tolerance)


@every_agent
def test_the_learning_rate_falls_to_zero(name: str):
    final = {"final_learning_rate": 0.0} if has(name, "final_learning_rate") else {}
    population = Population(build(name, **final), SEEDS)
    data = prepared(population, collect(population, 0))
    population.state["progress"] = torch.ones(3)
    before = population.state["params"]
    population.update(data, indices(1)[0].expand(3, -1))
    assert_close(population.state["params"], before, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("name", [name for name in AGENTS if has(name, "final_learning_rate")])
def test_a_fraction_of_the_policys_learning_rate_is_kept(name: str):
    """At the end of training, 0.3 x 1e-2 is the policy's rate and 0 the value's, whatever it began with."""
    ends = []
    steady = {"mu_peak": 0.1, "mu_valley": 0.1} if name == "chord" else {}  # else another gradient at the end
    for rate, final, progress in [(1e-2, 0.3, 1.0), (3e-3, 0.9, 0.0)]:
        population = Population(build(name, learning_rate=rate, final_learning_rate=final, **steady), SEEDS)
        began, data = population.state["params"], prepared(population, collect(population, 0))
        population.state["progress"] += progress
        population.update(data, indices(1)[0].expand(3, -1))
        ends.append(population.state["params"])
        if name not in NO_VALUE:
            assert_close(began["value"], ends[0]["value"], rtol=0.0, atol=0.0)
    assert_close(ends[0]["policy"], ends[1]["policy"], rtol=1e-6, atol=1e-7)
    assert not torch.equal(began["policy"]["log_std"], ends[0]["policy"]["log_std"])


def test_ess_of_the_batch_is_that_of_the_epochs_samples_as_it_begins():
    population = Population(build("p3o", ess="batch", learning_rate=0.05), SEEDS)
    rollout = collect(population, 0)
    data = prepared(population, rollout)
    order = torch.stack(indices(2)).unsqueeze(1).expand(-1, 3, -1).contiguous()  # 12 samples of 24 in each of two
    pi = population.policy(rollout.obs.transpose(0, 1).flatten(1, 2))
    for epoch in range(3):
        b = Gaussian(data["behavior_mean"], data["behavior_log_std"])
        log_ratio = pi.log_prob(data["action"]) - b.log_prob(data["action"])
        drawn = order.transpose(0, 1).flatten(1)
        expected = effective_sample_size(log_ratio.gather(1, drawn), dim=1)
        metrics = population.epoch(data, order)
        assert_close(metrics["ess_batch"], expected.expand(2, -1))
        for k in range(2):
            assert epoch == 0 or not torch.equal(metrics["ess"][k], metrics["ess_batch"][k])
        assert (expected == 1.0).all() if epoch == 0 else (expected < 0.99).all()
        pi = population.policy(rollout.obs.transpose(0, 1).flatten(1, 2))
    assert "ess_batch" not in Population(build("p3o"), SEEDS).epoch(data, order)


def test_on_its_own_fresh_data_decoupled_ppo_is_ppo():
    ends = []
    for objective in ("clip", "decoupled"):
        population = Population(build("ppo", objective=objective, learning_rate=0.05), SEEDS)
        *_, state = learn(population, iterations=3, updates=4)[-1]
        ends.append(state["params"])
    assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-5)


def test_the_proximal_policy_of_ppo_is_the_one_that_the_iteration_began_with():
    """Not the behavior, which data of a lag or of a replay have from another policy."""
    population = Population(build("ppo", objective="decoupled"), SEEDS)
    rollout = collect(population, 0)
    population.observe(rollout)
    flat = [x.transpose(0, 1).flatten(1, 2) for x in (rollout.obs, rollout.action)]
    expected = population.policy(flat[0]).log_prob(flat[1])
    old = replace(rollout, behavior_mean=rollout.behavior_mean + 0.3)
    assert_close(population.prepare(old)["proximal_log_prob"], expected)


@pytest.mark.parametrize("name", [name for name in AGENTS if has(name, "correction")])
def test_targets_are_those_of_the_correction_with_what_was_seen_so_far(name: str):
    """Older data, after statistics have moved: written out, with observations and rewards normalized."""
    seen: list[Tensor] = []
    for correction in ("none", "vtrace", "retrace", "ess"):
        population = Population(build(name, correction=correction, log_std=-0.5), SEEDS)
        rollout = collect(population, 0)
        population.observe(rollout)
        rollout = replace(rollout, behavior_mean=rollout.behavior_mean + 0.3 * torch.exp(rollout.behavior_log_std))
        data, state = prepared(population, rollout), population.state

        def normalized(obs: Tensor, state: Any = state) -> Tensor:
            stats = state["obs_stats"]
            mean, std = (stats[key].float().view(3, 1, OBS) for key in ("mean", "var"))
            return ((obs - mean) / std.sqrt()).clamp(-10.0, 10.0)

        def values(obs: Tensor, state: Any = state) -> Tensor:
            found = vmap(value)(state["params"]["value"], normalized(obs).transpose(0, 1).flatten(1, 2))
            return found.unflatten(1, (T, N)).transpose(0, 1)

        pi = Gaussian(*map(torch.stack, zip(*[population.policy(obs) for obs in rollout.obs], strict=True)))
        b = Gaussian(rollout.behavior_mean, rollout.behavior_log_std)
        std = state["return_scale"]["var"].float().sqrt().view(3, 1)
        columns = (
            pi.log_prob(rollout.action) - b.log_prob(rollout.action),
            (rollout.reward / std).clamp(-10.0, 10.0),
            values(rollout.obs),
            values(rollout.next_obs),
            rollout.terminated,
            rollout.last,
        )
        how = {key: float(state["hyper"][key][0]) for key in ("discount", "lambda_")}
        each = [corrected(correction, *(x[:, p] for x in columns), **how) for p in range(len(SEEDS))]  # each its own e
        expected = [torch.stack(of, 1) for of in zip(*each, strict=True)]
        names = ["advantage", "value_target"] if "advantage" in data else ["value_target"]  # bpo has its own
        for key, wanted in zip(reversed(names), reversed(expected[-len(names) :]), strict=True):
            assert_close(data[key], wanted.transpose(0, 1).flatten(1), rtol=1e-3, atol=1e-3)
        seen.append(data["value_target"])
    assert all(not torch.allclose(x, y, rtol=1e-2) for i, x in enumerate(seen) for y in seen[:i])


def test_on_fresh_data_p4o_with_the_iterations_first_policy_is_p3o():
    ends = []
    for name, changes in (("p3o", {}), ("p4o", {"proximal": "iteration"})):
        population = Population(build(name, learning_rate=0.05, **changes), SEEDS)
        (_, metrics, _), (*_, state) = learn(population, iterations=3, updates=4)
        ends.append(state["params"])
        assert (metrics[-1]["ess"] < 0.95).all()
    assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-5)


def test_the_proximal_policy_is_that_of_the_epochs_beginning():
    population = Population(build("p4o", learning_rate=0.05), SEEDS)
    population.observe(collect(population, 0))
    data = population.prepare(collect(population, 1))
    order = torch.stack(indices(2)).unsqueeze(1).expand(-1, 3, -1).contiguous()
    for epoch in range(3):
        began = population.state["params"]["policy"]
        metrics = population.epoch(data, order)
        assert_close(population.state["proximal"], began, rtol=0.0, atol=0.0)
        assert_close(metrics["ess_proximal"][0], torch.ones(3))
        assert (metrics["ess_proximal"][1] < 1.0 - 1e-5).all()
        assert ((metrics["behavior_share"][0] > 0.999).all()) == (epoch > 0)  # alone, unless both are fresh


def test_bpo_learns_a_mean_and_a_median():
    """Of returns in one state that are 9 with probability 1/3, else 0. The median is smoothed: sigmoid(Q - U) is 1/2 in
    the mean where (2 sigmoid(-U) + sigmoid(9 - U)) / 3 = 1/2; sigmoid(9 - U) is 1, so sigmoid(-U) = 1/4, U = log 3."""
    rates = {"learning_rate": 0.0, "value_learning_rate": 0.05, "max_grad_norm": 100.0}
    population = Population(build("bpo", **rates), SEEDS)
    data = population.prepare(collect(population, 0))
    data["obs"] = torch.zeros_like(data["obs"])
    data["value_target"] = torch.where(torch.arange(T * N) % 3 == 0, 9.0, 0.0).expand(len(SEEDS), -1).contiguous()
    data["action_value"] = data["value_target"].clone()
    index = torch.arange(T * N).expand(len(SEEDS), -1)
    for _ in range(400):
        metrics = population.update(data, index)
    params, obs = population.state["params"], torch.zeros(len(SEEDS), OBS)
    mean, median = (vmap(value)(params[name], obs) for name in ("value", "median"))
    assert_close(mean, torch.full((3,), 3.0), rtol=0.0, atol=0.05)
    assert_close(median, torch.full((3,), math.log(3.0)), rtol=0.0, atol=0.01)
    assert_close(metrics["above_median"], torch.full((3,), 1.0 / 3.0))


@pytest.mark.parametrize("correction", ["none", "vtrace", "retrace", "ess"])
def test_the_action_value_of_bpo_has_no_ratio_of_its_own_action_in_it(correction: Correction):
    """An action that the policy has all but given up, at the end of an episode: its return is its reward. V-trace's
    value target lies at the value still, for it is the state's."""
    population = Population(build("bpo", correction=correction), SEEDS)
    rollout = collect(population, 0)
    rollout.terminated[:] = True
    rollout.reward.clamp_(-1.0, 1.0)  # the scale of rewards has a bound
    rollout.behavior_mean[:] = rollout.action
    rollout.behavior_log_std[:] = -9.0
    data = population.prepare(rollout)
    reward = rollout.reward.transpose(0, 1).flatten(1)
    assert (data["log_ratio"] < -3.0).all()
    assert_close(data["action_value"], reward, rtol=1e-4, atol=1e-5)
    at_the_reward = torch.allclose(data["value_target"], reward, rtol=1e-4, atol=1e-5)
    assert at_the_reward == (correction != "vtrace")


@pytest.mark.parametrize("discount", [1.0, 0.9])
def test_an_epoch_of_groups_has_the_gradient_of_vargrad(discount: float):
    """Shuffled steps that carry the advantage of their trajectory, T to each, and beta / 2 for the loss's scale."""
    population = Population(
        build("tba_group", reference="initial", discount=discount, learning_rate=0.05, beta=0.2), SEEDS
    )
    learn(population, iterations=3)
    state, rollout = population.state, collect(population, 3)
    data = population.prepare(rollout)
    discounts = discount ** torch.arange(float(T))[:, None, None]
    scale = torch.sqrt(state["return_scale"]["var"]).float()  # [P]; no reward is beyond 10 of it
    assert (rollout.reward.abs().amax((0, 2)) < 10.0 * scale).all()
    total = (discounts * rollout.reward / scale[:, None]).sum(0)  # [P, N], one group of N

    def log_prob(params: Any) -> Tensor:
        acting = {**state, "params": {"policy": params}}
        pi = vmap(population.agent.act, in_dims=(0, 1), out_dims=1)(acting, rollout.obs)
        return pi.log_prob(rollout.action)

    def vargrad(params: Any) -> Tensor:
        of_trajectories = [(discounts * log_prob(p)).sum(0) for p in (params, state["reference"])]
        losses = [
            vargrad_trajectory_balance(one, reference, reward, beta=0.2)[0]
            for one, reference, reward in zip(*of_trajectories, total, strict=True)
        ]
        return torch.stack(losses).sum()

    def of_steps(params: Any) -> Tensor:
        weight = data["advantage"].unflatten(1, (T, N)).transpose(0, 1) * discounts  # [T, P, N]
        return -(weight * log_prob(params)).mean((0, 2)).sum()

    expected = pytree.tree_map(lambda x: 0.1 * x / T, grad(vargrad)(state["params"]["policy"]))
    assert_close(grad(of_steps)(state["params"]["policy"]), expected, rtol=1e-4, atol=1e-6)
    assert torch.isclose(data["advantage"].unflatten(1, (T, N))[:, 0].sum(1), torch.zeros(3), atol=1e-4).all()
    metrics = population.epoch(data, torch.arange(T * N).expand(1, 3, -1))
    assert_close(metrics["imbalance"][0].sum(), 0.2**2 * vargrad(state["params"]["policy"]))


@pytest.mark.parametrize("reference", ["iteration", "initial"])
def test_the_reference_of_groups_is_that_of_the_iteration_or_the_first(reference: str):
    """In an iteration's first epoch the one costs nothing, whatever beta is; later, and with the other, it does."""
    found = []
    for beta in (0.0, 0.5):
        population = Population(build("tba_group", reference=reference, beta=beta, learning_rate=0.05), SEEDS)
        population.observe(collect(population, 0))
        for iteration in (1, 2):
            rollout = collect(population, iteration)
            data = population.prepare(rollout)
            if iteration == 1:  # with equal advantages, so that both betas learn alike
                data["advantage"] = rollout.reward.transpose(0, 1).flatten(1)
                population.epoch(data, torch.stack(indices(2)).unsqueeze(1).expand(-1, 3, -1))
                later = population.refresh(rollout)["advantage"]
            population.observe(rollout)
        found.append((data["advantage"], later))
    (second, later), (second_with_beta, later_with_beta) = found
    assert torch.allclose(second, second_with_beta, atol=1e-5) == (reference == "iteration")
    assert not torch.allclose(later, later_with_beta, atol=1e-2)


def test_dapo_whose_divergence_costs_nothing_is_ppo():
    ends = []
    for name, changes in (("ppo", {}), ("dapo", {"divergence_coef": 0.0, "correction": "none"})):
        population = Population(build(name, learning_rate=0.05, **changes), SEEDS)
        *_, state = learn(population, iterations=3, updates=4)[-1]
        ends.append(state["params"])
    assert_close(ends[0], ends[1])


def test_the_first_update_of_dapo_is_ppos_and_the_second_is_not():
    ppo, dapo = (Population(build(name, learning_rate=0.05), SEEDS) for name in ("ppo", "dapo"))
    data = [one.prepare(collect(one, 0)) for one in (ppo, dapo)]
    assert_close(data[1]["divergence_ahead"], torch.zeros(3, T * N))
    for first, index in zip((True, False), indices(2), strict=True):
        metrics = [one.update(x, index.expand(3, -1)) for one, x in zip((ppo, dapo), data, strict=True)]
        assert torch.allclose(metrics[0]["loss"], metrics[1]["loss"], rtol=1e-4, atol=1e-5) == first
        assert (metrics[1]["divergence"].abs() < 1e-5).all() == first


def test_the_divergence_ahead_is_that_of_the_policy_as_it_is():
    """V_t = min(1, rho_t) log rho_t + 0.9 min(0.7, rho_t) V_{t+1}, cut where an episode ends."""
    population = Population(build("dapo", learning_rate=0.05, discount=0.9, c_bar=0.7), SEEDS)
    rollout = collect(population, 0)
    data = population.prepare(rollout)
    for index in indices(3):
        population.update(data, index.expand(3, -1))
    pi = [population.policy(obs) for obs in rollout.obs]
    pi = Gaussian(torch.stack([p.mean for p in pi]), torch.stack([p.log_std for p in pi]))
    b = Gaussian(rollout.behavior_mean, rollout.behavior_log_std)
    log_ratio = pi.log_prob(rollout.action) - b.log_prob(rollout.action)  # [T, P, N]
    ahead, value = [], torch.zeros(3, N)
    for t in reversed(range(T)):
        ahead.insert(0, 0.9 * value * ~rollout.last[t])
        ratio = log_ratio[t].exp()
        value = ratio.clamp(max=1.0) * log_ratio[t] + ratio.clamp(max=0.7) * ahead[0]
    refreshed = population.refresh(rollout)
    assert refreshed.keys() == {"divergence_ahead"}
    assert_close(refreshed["divergence_ahead"], torch.stack(ahead).transpose(0, 1).flatten(1))
    assert refreshed["divergence_ahead"].abs().max() > 0.01


def test_the_weight_of_the_kl_adapts_to_its_target():
    """Section 4 of PPO's paper: doubled above 1.5 times the target, halved below the target / 1.5, else left."""
    population = Population(build("ppo", objective="kl", target_kl=0.02), SEEDS)
    rollout, state = collect(population, 0), population.state
    population.observe(rollout)
    assert population.state["kl_coef"].tolist() == [1.0] * 3  # nothing has been learned yet, nothing says it is small
    population.state = state
    state["optimizer"]["policy"]["step"] += 1.0
    pi = [population.policy(obs) for obs in rollout.obs]
    mean, log_std = torch.stack([p.mean for p in pi]), torch.stack([p.log_std for p in pi])
    for kl, factor in [(0.031, 2.0), (0.029, 1.0), (0.0134, 1.0), (0.0132, 0.5)]:
        # Equal widths, means x deviations apart in one of the actions: KL = x^2 / 2.
        shift = torch.tensor([1.0, 0.0]) * torch.exp(log_std) * math.sqrt(2.0 * kl)
        population.state = state
        population.observe(replace(rollout, behavior_mean=mean + shift, behavior_log_std=log_std))
        assert population.state["kl_coef"].tolist() == [factor] * 3


def test_the_weight_of_the_variance_adapts_to_the_square_of_the_clip():
    """As the KL's, where every ratio is the same distance from 1: the root of what is to be reached."""
    population = Population(build("ppo", objective="variance", clip=0.1), SEEDS)
    rollout, state = collect(population, 0), population.state
    state["optimizer"]["policy"]["step"] += 1.0
    pi = [population.policy(obs) for obs in rollout.obs]
    log_std = torch.stack([p.log_std for p in pi])
    mean = torch.stack([p.mean for p in pi])
    # One dimension, equal widths, b's mean at h deviations, the action at y: log pi - log b = h^2 / 2 - y h.
    for reached, factor in [(0.016, 2.0), (0.014, 1.0), (0.0068, 1.0), (0.0065, 0.5)]:
        h, ratio = 0.5, 1.0 + math.sqrt(reached)
        y = (h * h / 2.0 - math.log(ratio)) / h
        first = torch.tensor([1.0, 0.0]) * torch.exp(log_std)
        record = replace(rollout, behavior_mean=mean + h * first, behavior_log_std=log_std, action=mean + y * first)
        population.state = state
        population.observe(record)
        assert population.state["kl_coef"].tolist() == [factor] * 3


def test_p3o_holds_its_learning_rate_back_by_the_ess():
    """From far too large a rate iterations come to end near the ESS asked for; a small one stays on its schedule."""
    ended: dict[float, list[float]] = {}
    for rate in (4e-3, 5e-2):
        population = Population(build("p3o", learning_rate=rate, keep_ess=0.81), SEEDS)
        for iteration in range(30):
            rollout = collect(population, iteration)
            data = prepared(population, rollout)
            for index in indices(3):
                population.update(data, index.expand(3, -1))
            pi = population.policy(rollout.obs.transpose(0, 1).flatten(1, 2))
            b = Gaussian(*(x.transpose(0, 1).flatten(1, 2) for x in (rollout.behavior_mean, rollout.behavior_log_std)))
            action = rollout.action.transpose(0, 1).flatten(1, 2)
            e = effective_sample_size(pi.log_prob(action) - b.log_prob(action), dim=1)
            ended.setdefault(rate, []).append(e.mean().item())
            population.observe(rollout)
        if rate == 4e-3:
            assert population.state["rate_factor"].tolist() == [1.0] * 3
    assert min(ended[4e-3]) > 0.9 and ended[5e-2][0] < 0.6
    assert sum(ended[5e-2][20:]) / 10 == pytest.approx(0.81, abs=0.06)


def test_the_learning_rate_follows_the_ess_by_hand():
    """The updates should leave 0.81.

    A log e of 1.21 times that asks for 1 / 1.1 of the rate, one of 2.5 times for 1 / 1.58: 1 / 1.5 is the most; one of
    1 / 1.21 times for 1.1. Half of the log ratios are s, half are -s: e = (e^s + e^-s)^2 / (2 (e^2s + e^-2s)) =
    (1 + 1 / cosh(2 s)) / 2.
    """
    population = Population(build("p3o", keep_ess=0.81), SEEDS)
    rollout, state = collect(population, 0), population.state
    pi = [population.policy(obs) for obs in rollout.obs]
    mean, log_std = torch.stack([p.mean for p in pi]), torch.stack([p.log_std for p in pi])
    first = torch.tensor([1.0, 0.0]) * torch.exp(log_std)  # one standard deviation, of the first action alone
    sign = (torch.arange(T * N).view(T, 1, N, 1) % 2) * 2.0 - 1.0
    net = state["params"]["policy"]
    last = net["mean"]["1"]
    off = torch.exp(net["log_std"]) * torch.tensor([1.0, 0.0])
    shifted = {**net, "mean": {**net["mean"], "1": {**last, "bias": last["bias"] + off}}}
    for before, times, after in [
        (0.5, 1.0, 0.5),
        (0.5, 1.21, 0.5 / 1.1),
        (0.6, 2.5, 0.4),
        (0.5, 1.0 / 1.21, 0.55),
        (0.5, 0.0, 0.75),
        (0.8, 0.0, 1.0),
    ]:
        e = 0.81**times
        s = 0.5 * math.acosh(1.0 / (2.0 * e - 1.0))
        # The policy before stood one deviation off, so the log ratio of an action x deviations off is 1/2 - x. What the
        # behavior was does not matter.
        record = replace(rollout, action=mean + (0.5 + s * sign) * first)
        population.state = {**state, "before": shifted, "rate_factor": torch.full((3,), before)}
        population.observe(record)
        assert_close(population.state["rate_factor"], torch.full((3,), after), rtol=1e-3, atol=0.0)
    # After over before, and not the inverse: a ratio of 4 in 6 of 24 samples, else 1, has
    # e = (6 x 4 + 18)^2 / (24 (6 x 16 + 18)) = 0.6447, and a factor of (log 0.81 / log 0.6447)^(1/2) = 0.6928.
    x = torch.where(torch.arange(T * N).view(T, 1, N, 1) % 4 == 0, 0.5 - math.log(4.0), 0.5)
    population.state = {**state, "before": shifted, "rate_factor": torch.full((3,), 0.5)}
    population.observe(replace(rollout, action=mean + x * first))
    assert_close(population.state["rate_factor"], torch.full((3,), 0.3464), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("prior", ["mle", "ensemble", "gp"])
def test_a_prior_is_what_its_nets_or_points_say(prior: str):
    """By hand from the means of the networks: of one the variance is 0, of five theirs. A gp of nothing: N(0, 1)."""
    population = Population(build("p3o_prior", prior=prior, prior_std=0.2), SEEDS)
    rollout = collect(population, 0)
    data = population.prepare(rollout)
    obs = rollout.obs.transpose(0, 1).flatten(1, 2)
    for p in range(3):
        if prior == "gp":
            mean, variance = torch.zeros(T * N, ACT), torch.ones(T * N, ACT)
        else:
            nets = pytree.tree_map(lambda x, p=p: x[p], population.state["prior"])
            each = [behavior.predict(pytree.tree_map(lambda x, k=k: x[k], nets), obs[p], torch.tensor(-4.0)).mean
                    for k in range({"mle": 1, "ensemble": 5}[prior])]  # fmt: skip
            mean, variance = torch.stack(each).mean(0), torch.stack(each).var(0, correction=0)
        assert_close(data["prior_mean"][p], mean)
        assert_close(data["prior_variance"][p], variance)
    pi = population.policy(obs)
    pi_0 = Gaussian(data["prior_mean"], 0.5 * torch.log(0.2**2 + data["prior_variance"]))
    everything = torch.arange(T * N).expand(3, -1)
    assert_close(population.update(data, everything)["prior_kl"], gaussian.kl(pi, pi_0).mean(1), rtol=1e-4)


def test_a_prior_that_costs_much_is_what_the_policy_becomes():
    """And one that costs nothing does not matter: two of them end alike."""
    ends = []
    for prior in ("mle", "gp"):
        population = Population(build("p3o_prior", prior=prior, prior_coef=0.0, learning_rate=0.05), SEEDS)
        *_, state = learn(population, iterations=3, updates=4)[-1]
        ends.append(state["params"])
    assert_close(*ends, rtol=0.0, atol=0.0)
    # A process that has seen nothing: N(0, 0.75^2 + 1).
    population = Population(build("p3o_prior", prior_coef=100.0, prior_std=0.75, learning_rate=0.02), SEEDS)
    learn(population, iterations=20, updates=4)
    pi = population.policy(2.0 + 3.0 * torch.randn(3, 50, OBS))
    assert pi.mean.abs().mean() < 0.1 and (pi.log_std - math.log(1.25)).abs().mean() < 0.1


@pytest.mark.parametrize(("objective", "like"), [("clip", "ppo"), ("p3o", "p3o")])
def test_chord_that_imitates_nothing_is_the_agent_whose_objective_it_has(objective: str, like: str):
    ends, rates = [], {"learning_rate": 1e-2, "value_learning_rate": 1e-2, "final_learning_rate": 0.0}
    silent = {"objective": objective, "mu_peak": 0.0, "mu_valley": 0.0}
    for name, changes in (("chord", silent), (like, {"keep_ess": 0.0} if like == "p3o" else {})):
        *_, state = learn(Population(build(name, **rates, **changes), SEEDS), iterations=3, updates=4)[-1]
        ends.append(state["params"])
    assert_close(*ends, rtol=1e-4, atol=1e-5)


def test_mu_of_chord_rises_falls_and_stays():
    """Warm up for a fifth, fall for two fifths: at 0.1 half of the peak, at 0.4 half way between peak and valley."""
    for settings, expected in [
        ({"mu_warm_up": 0.2, "mu_decay": 0.4}, {0.0: 0.0, 0.1: 0.4, 0.2: 0.8, 0.4: 0.5, 0.6: 0.2, 1.0: 0.2}),
        ({"mu_warm_up": 0.0, "mu_decay": 0.4}, {0.0: 0.8, 0.2: 0.5, 0.4: 0.2}),
        ({"mu_warm_up": 0.2, "mu_decay": 0.0}, {0.1: 0.4, 0.19: 0.76, 0.2: 0.2, 0.5: 0.2}),
    ]:
        population = Population(build("chord", mu_peak=0.8, mu_valley=0.2, **settings), SEEDS)
        data = prepared(population, collect(population, 0))
        for progress, mu in expected.items():
            population.state["progress"] = torch.full((3,), progress)
            assert population.update(data, indices(1)[0].expand(3, -1))["mu"].tolist() == pytest.approx([mu] * 3)


def test_advantages_of_tba_are_gae_of_the_segments():
    """Where its reference is the policy itself, nothing is charged. In a world whose next_obs are true ones."""
    rollout = collect(Population(build("ppo"), SEEDS), 0)
    follows = torch.cat([torch.where(rollout.last[:-1, ..., None], rollout.next_obs[:-1], rollout.obs[1:])])
    rollout = replace(rollout, next_obs=torch.cat([follows, rollout.next_obs[-1:]]))
    ppo, tba = (prepared(Population(build(name), SEEDS), rollout) for name in ("ppo", "tba"))
    assert_close(tba["advantage"], ppo["advantage"], rtol=1e-4, atol=1e-4)
    short = prepared(Population(build("tba", segment_length=2), SEEDS), rollout)
    assert not torch.allclose(short["advantage"], ppo["advantage"], rtol=1e-2)


@pytest.mark.parametrize("reference", ["iteration", "initial", "uniform"])
def test_the_reference_of_tba_is_what_it_says(reference: str):
    """After updates: the policy as it is by then, the first one by present statistics, or of density 1 everywhere."""
    population = Population(build("tba", reference=reference, learning_rate=0.05, segment_length=1), SEEDS)
    began = population.state["params"]["policy"]
    learn(population, iterations=3)
    present = population.state["params"]["policy"]
    rollout = collect(population, 3)
    found = population.prepare(rollout)["reference_log_prob"].unflatten(1, (T, N)).squeeze(-1)  # [P, T, N]
    for net, which in ((began, "initial"), (present, "iteration")):
        population.state = {**population.state, "params": {**population.state["params"], "policy": net}}
        pi = population.policy(rollout.obs.transpose(0, 1).flatten(1, 2))
        expected = pi.log_prob(rollout.action.transpose(0, 1).flatten(1, 2)).unflatten(1, (T, N))
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4) == (which == reference)
    assert bool((found == 0.0).all()) == (reference == "uniform")


def test_the_uniform_reference_of_tba_is_an_entropy_bonus():
    """As in PCL: what beta 0 and a bonus for the entropy give."""
    rollout = collect(Population(build("ppo"), SEEDS), 0)
    ways = ({"reference": "uniform", "beta": 0.2}, {"beta": 0.0, "entropy_coef": 0.2})
    one, other = (prepared(Population(build("tba", **way), SEEDS), rollout)["advantage"] for way in ways)
    assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_segment_without_a_step_is_refused():
    with pytest.raises(UsageError, match="segment_length 0: a segment has at least 1 step"):
        build("tba", segment_length=0)


def test_a_width_that_would_be_cut_is_refused():
    for log_std in (-7.0, 2.0):
        config = AGENTS["p3o_prior"].config(log_std=log_std)
        with pytest.raises(UsageError, match=f"log_std {log_std:g}: must lie between -7 and 1"):
            AGENTS["p3o_prior"].agent(config, 3, 1)


@pytest.mark.parametrize("name", ["p3o", "p3o_2019"])
def test_the_kl_that_is_logged_is_the_same_whichever_pulls(name: str):
    """With a pull of weight 0 the runs are equal, whatever KL it has."""
    found = {}
    for which in ("closed_form", "reverse"):
        population = Population(build(name, learning_rate=0.05, pull=0.0, behavior_kl=which), SEEDS)
        found[which] = learn(population, iterations=2, updates=4)[-1][1][-1]
    assert_close(found["reverse"]["behavior_kl"], found["closed_form"]["behavior_kl"])
    assert not torch.allclose(found["reverse"]["pull_kl"], found["reverse"]["behavior_kl"], rtol=1e-3)
    assert "pull_kl" not in found["closed_form"]


VARIANTS: dict[str, list[dict[str, Any]]] = {
    "p3o": [
        {"cap": 0.5},
        {"ess": "batch"},
        {"cap": "ess_per_dim"},
        {"pull": 0.0},
        {"behavior_kl": "k3"},
        {"behavior_kl": "reverse"},
    ],
    "p3o_2019": [
        {"cap": 1.0},
        {"cap": "ess_per_dim"},
        {"pull": 0.5},
        {"behavior_kl": "closed_form"},
        {"details": "shared"},
    ],
    "ppo": [
        {"objective": "decoupled", "clip": 0.1},
        {"objective": "generalized", "lag": 1},
        {"objective": "band"},
        {"objective": "kl"},
        {"objective": "variance"},
    ],
    "bpo": [{"clip": 0.05}, {"temperature": 1.0}],
    "p4o": [{"proximal": "iteration"}, {"mixture_kl": "convex"}, {"mixture_kl": "k3"}],
    "dapo": [
        {"objective": "p3o"},
        {"divergence": "reverse_kl"},
        {"divergence": "hellinger"},
        {"recursion": "released"},
        {"objective": "p3o", "c_bar": 0.0},
    ],
    "tba": [{"reference": "initial"}, {"reference": "uniform"}, {"segment_length": 1}, {"lambda_": 1.0}],
    "chord": [{"objective": "p3o"}, {"phi": "mass", "mu_peak": 0.5}],
    "p3o_prior": [{"prior": "mle"}, {"prior": "ensemble"}, {"prior_kl": "reverse"}],
}


@pytest.mark.parametrize(("name", "changes"), [(name, changes) for name, of in VARIANTS.items() for changes in of])
def test_variants_run_and_differ(name: str, changes: dict[str, Any]):
    *_, variant = learn(Population(build(name, learning_rate=0.05, **changes), SEEDS), iterations=3, updates=4)[-1]
    *_, plain = learn(Population(build(name, learning_rate=0.05), SEEDS), iterations=3, updates=4)[-1]
    weights = [state["params"]["policy"]["mean"]["0"]["weight"] for state in (variant, plain)]
    assert torch.isfinite(weights[0]).all()
    assert not torch.allclose(weights[0], weights[1])


def test_a_field_that_is_no_float_is_refused():
    with pytest.raises(UsageError, match=r"cannot differ in 'minibatch'; they can in .*learning_rate"):
        Population(build("p3o"), SEEDS, {"minibatch": [1, 2, 3]})


def test_members_are_the_product_of_the_sweep_and_the_seeds():
    assert members([0, 1], {"clip": [0.1, 0.2], "discount": [0.9]}) == [
        {"clip": 0.1, "discount": 0.9, "seed": 0},
        {"clip": 0.1, "discount": 0.9, "seed": 1},
        {"clip": 0.2, "discount": 0.9, "seed": 0},
        {"clip": 0.2, "discount": 0.9, "seed": 1},
    ]
    assert members([3], {}) == [{"seed": 3}]


@every_agent
@pytest.mark.parametrize("seeds", [SEEDS[:1], SEEDS])
def test_the_state_keeps_its_strides(name: str, seeds: list[int]):
    """A program is made for the strides it meets: a state that changed them would cost a second one."""
    population = Population(build(name), seeds)
    before = [x.stride() for x in pytree.tree_leaves(population.state)]
    learn(population, columns=list(range(len(seeds))))
    assert [x.stride() for x in pytree.tree_leaves(population.state)] == before


def test_acting_takes_one_thread(monkeypatch: pytest.MonkeyPatch):
    found, threads = [], torch.get_num_threads()
    population = Population(build("p3o"), SEEDS)
    inner = population._act._function
    monkeypatch.setattr(population._act, "_function", lambda *x: (found.append(torch.get_num_threads()), inner(*x))[1])
    torch.set_num_threads(2)
    try:
        population.act(torch.zeros(len(SEEDS), N, OBS), torch.zeros(len(SEEDS), N, ACT))
        assert found == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("minibatch", "threads"), [(MINIBATCH, 1), (2_000_000, 2)])
def test_a_small_update_takes_one_thread(monkeypatch: pytest.MonkeyPatch, minibatch: int, threads: int):
    found, before = [], torch.get_num_threads()
    population = Population(build("p3o"), SEEDS)
    monkeypatch.setattr(population._update, "_function", lambda s, *_: (s, found.append(torch.get_num_threads()) or {}))
    torch.set_num_threads(2)
    try:
        population.update({}, torch.zeros(1, 1, dtype=torch.int64).expand(len(SEEDS), minibatch))
        assert found == [threads] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@compiles
def test_compiled_equals_eager():
    compiled, eager = (Population(build("p3o"), SEEDS[:2], compiled=c) for c in (True, False))
    assert_close(learn(compiled), learn(eager), rtol=1e-4, atol=1e-4)


@compiles
def test_acting_in_fp8_compiles():
    """The same rounding: a tenth of its step would be some 1e-3."""
    compiled, eager = (Population(build("ppo", rollout_precision="fp8"), SEEDS[:2], compiled=c) for c in (True, False))
    obs, noise = 3.0 * torch.randn(2, N, OBS), torch.randn(2, N, ACT)
    assert_close(compiled.act(obs, noise), eager.act(obs, noise), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=compiles)])
def test_an_epoch_is_one_update_after_the_other(compiled: bool):
    """Also for two populations in turn."""
    pairs = [[Population(build("p3o"), SEEDS[:k], compiled=compiled) for _ in range(2)] for k in (1, 2)]
    data = [prepared(one, collect(one, 0)) for one, _ in pairs]
    order = [torch.stack([i.expand(one.size, -1) for i in indices(3)]) for one, _ in pairs]
    for _ in range(2):
        for (one, other), samples, index in zip(pairs, data, order, strict=True):
            together = one.epoch(samples, index)
            for k, i in enumerate(index):
                alone = other.update(samples, i)
                assert_close({name: x[k] for name, x in together.items()}, alone, rtol=0.0, atol=0.0)
            assert_close(one.state, other.state, rtol=0.0, atol=0.0)
