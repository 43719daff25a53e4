"""What holds for every entry of agents.OFFLINE_AGENTS, in a population and alone."""

import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from agents import OFFLINE_AGENTS
from ess_rl import checkpoint, offline
from ess_rl.contract import OfflineAgent
from ess_rl.errors import NonFiniteError, UsageError
from ess_rl.offline import OfflinePopulation
from ess_rl.transitions import Transitions

OBS, ACT, COUNT = 3, 2, 400
SEEDS = [11, 4, 7]
every_agent = pytest.mark.parametrize("name", sorted(OFFLINE_AGENTS))


def bandit(count: int = COUNT) -> Transitions:
    """Each step ends its task: reward 4 - 20 |a - 0.4 s|^2 of its first two observations; b is N(0, 0.4^2)."""
    generator = torch.Generator().manual_seed(1)
    obs = torch.randn(count, OBS, generator=generator)
    action = 0.4 * torch.randn(count, ACT, generator=generator)
    ended = torch.ones(count, dtype=torch.bool)
    return Transitions(
        obs=obs, action=action, reward=4.0 - 20.0 * (action - 0.4 * obs[:, :ACT].clamp(-1, 1)).square().sum(-1),
        terminated=ended, truncated=~ended, next_obs=torch.randn(count, OBS, generator=generator),
        behavior_mean=torch.zeros(count, ACT), behavior_log_std=torch.full((count, ACT), math.log(0.4)),
        version=torch.full((count,), -1),
    )  # fmt: skip


@pytest.mark.parametrize("open_end", [0, 1])
def test_values_along_episodes_are_those_of_every_step(open_end: int):
    """Three episodes of 4, 1 and 7 steps; next_obs is the next step's obs but at their ends."""
    data = bandit(12)
    last = torch.zeros(12, dtype=torch.bool)
    last[[3, 4, 11]] = True
    next_obs = torch.where(last[:, None], data.next_obs, data.obs.roll(-1, 0))
    last[-1] = open_end < 1
    data = replace(data, terminated=last & False, truncated=last, next_obs=next_obs)

    def function(obs: torch.Tensor) -> torch.Tensor:
        return (obs * torch.tensor([1.0, 10.0, 100.0])).sum(-1)

    assert_equal(offline.values_along(function, data), (function(data.obs), function(data.next_obs)))


def build(name: str, **changes: Any) -> OfflineAgent:
    agent, config, _ = OFFLINE_AGENTS[name]
    return agent(config(**{"hidden": (8,), "minibatch": 16, **changes}), OBS, ACT)


def learn(population: OfflinePopulation, updates: int = 4, blocks: int = 2, data: Transitions | None = None) -> Any:
    return list(offline.train(population, data or bandit(), updates=updates, blocks=blocks))


def assert_equal(one: Any, other: Any, tolerance: float = 0.0) -> None:
    leaves = pytree.tree_leaves(one), pytree.tree_leaves(other)
    torch.testing.assert_close(*leaves, rtol=tolerance, atol=tolerance)


@every_agent
def test_each_member_is_the_agent_alone(name: str):
    together = OfflinePopulation(build(name), SEEDS, {"learning_rate": [1e-3, 3e-3, 1e-2]})
    learn(together)
    for p, seed in enumerate(SEEDS):
        alone = OfflinePopulation(build(name), [seed], {"learning_rate": [[1e-3, 3e-3, 1e-2][p]]})
        learn(alone)
        assert_equal(pytree.tree_map(lambda x, p=p: x[p : p + 1], together.state), alone.state, 1e-5)
        obs = torch.randn(4, OBS)
        mean = together.policy(obs.expand(3, -1, -1)).mean[p]
        one = together.agent.act(pytree.tree_map(lambda x, p=p: x[p], together.state), obs)
        assert_equal(mean, one.mean, 1e-5)
        assert one.log_std.shape == one.mean.shape == (4, ACT)


@every_agent
def test_metrics_are_finite_and_one_a_member(name: str):
    population = OfflinePopulation(build(name), SEEDS)
    progress = learn(population, updates=7, blocks=3)
    assert [(p.block, p.updates) for p in progress] == [(1, 2), (2, 4), (3, 7)]
    for p in progress:
        assert p.metrics and all(x.shape == (3,) and torch.isfinite(x).all() for x in p.metrics.values())
        if name != "td3_bc":  # whose policy has no density
            assert {"ess", "behavior_kl"} <= p.metrics.keys()
    assert population.state["progress"].tolist() == pytest.approx([6 / 7] * 3)


@every_agent
def test_a_run_cut_in_two_is_the_whole_run(name: str, tmp_path: Any):
    """The second half goes on from a file, in another population. An update changes no state it was given."""
    whole, first = (OfflinePopulation(build(name), SEEDS) for _ in range(2))
    began = whole.state
    before = pytree.tree_map(torch.clone, began["params"])
    learn(whole, updates=8, blocks=4)
    assert_equal(began["params"], before)
    for done in offline.train(first, bandit(), updates=8, blocks=4):
        if done.block == 2:
            break
    checkpoint.save(tmp_path / "state.safetensors", first.state, {})
    second = OfflinePopulation(build(name), SEEDS)
    second.state, _ = checkpoint.load(tmp_path / "state.safetensors", second.state)
    list(offline.train(second, bandit(), updates=8, blocks=4, start=2))
    assert_equal(second.state, whole.state)


@every_agent
def test_the_state_keeps_its_strides(name: str):
    population = OfflinePopulation(build(name), SEEDS[:1])
    population.describe(bandit())
    before = [x.stride() for x in pytree.tree_leaves(population.state)]
    learn(population)
    assert [x.stride() for x in pytree.tree_leaves(population.state)] == before


# What the data of the bandit cannot show, and why: every step ends its task, so nothing is bootstrapped.
SILENT = {"discount", "lambda_", "tau", "policy_noise", "noise_clip"}


@pytest.mark.parametrize(
    ("name", "field"),
    [(name, f.name) for name, e in OFFLINE_AGENTS.items() for f in fields(e.config) if f.type in ("float", float)],
)
def test_members_can_differ_in_every_float_of_the_config(name: str, field: str):
    agent = build(name, learning_rate=0.03, **({"max_grad_norm": 0.05} if name == "p3o_offline" else {}))
    value: float = getattr(agent.config, field)
    others = {"log_std_floor": 0.5, "return_range": 7.0, "cloning": 0.8, "max_weight": 1.1}
    other: float = others[field] if field in others else 0.5 * value + 0.01
    data = bandit()
    if field in SILENT:
        ended = torch.arange(COUNT) % 5 == 4
        data = replace(data, terminated=ended & False, truncated=ended)
    population = OfflinePopulation(agent, [3, 3, 3], {field: [value, other, value]})
    learn(population, updates=8, data=data)
    leaves = pytree.tree_leaves({name: population.state[name] for name in population.state if name != "hyper"})
    assert any(not torch.equal(x[0], x[1]) for x in leaves), f"{field} changes nothing"
    assert all(torch.equal(x[0], x[2]) for x in leaves)


@every_agent
def test_a_critic_leads_to_better_actions_than_the_behavior(name: str):
    """On the bandit the best action is 0.4 s and the behavior's is 0: cloning stays there, the others find it."""
    settings: dict[str, Any] = {"hidden": (32,), "minibatch": 64, "learning_rate": 1e-2}
    fast = {"policy_learning_rate": 1e-2}
    settings |= {"p3o_offline": {**fast, "pull": 0.1, "cap": 1.0}, "brac": {**fast, "return_range": 30.0}}.get(name, {})
    population = OfflinePopulation(build(name, **settings), [5])
    data = bandit(2000)
    learn(population, updates=250, blocks=1, data=data)
    best = 0.4 * data.obs[:, :ACT].clamp(-1, 1)
    distance = (population.policy(data.obs[None]).mean[0] - best).square().mean() / best.square().mean()
    assert (distance > 0.8) if name == "bc" else (distance < 0.7), distance


def test_p3o_offline_clones_first_and_its_batch_says_how_far_to_leave_the_data():
    """While it clones, advantages do not matter; then the ESS ends lower the weaker the pull is."""
    agent = build("p3o_offline", cloning=0.99, minibatch=64)
    rewards = []
    for sign in (1.0, -1.0):
        population = OfflinePopulation(agent, [5])
        learn(population, updates=20, data=replace(bandit(), reward=sign * bandit().reward))
        rewards.append(population.state["params"]["policy"])
    assert_equal(*rewards)
    ends = {}
    for pull in ("ess", 0.0):
        agent = build("p3o_offline", hidden=(32,), minibatch=64, policy_learning_rate=1e-2, pull=pull)
        ends[pull] = learn(OfflinePopulation(agent, [5]), updates=200, blocks=10, data=bandit(2000))[-1].metrics["ess"]
    assert ends["ess"].item() > ends[0.0].item() + 0.05


def test_softmax_weights_of_awac_are_a_variant():
    ends = []
    for weights in ("exponential", "softmax"):
        population = OfflinePopulation(build("awac", weights=weights, learning_rate=0.01), SEEDS)
        learn(population, updates=6)
        ends.append(population.state["params"]["policy"]["mean"]["0"]["weight"])
    assert not torch.allclose(ends[0], ends[1])


def test_updates_leave_a_state_that_is_held_as_it_was_given():
    population, data = OfflinePopulation(build("awac"), SEEDS), bandit()
    population.describe(data)
    before = population.state
    copy = pytree.tree_map(torch.clone, before)
    columns = offline.samples(data, "cpu")
    for number in range(2):
        population.updates(columns, number, 1, 4)
    assert_equal(before, copy)
    after = pytree.tree_map(torch.clone, population.state)
    population.state = before  # from there again, to the same end
    population.updates(columns, 0, 2, 4)
    assert_equal(population.state, after)
    held = population.state
    for number in range(5):  # other data, where the freed ones lay perhaps
        columns = {name: x.clone() for name, x in offline.samples(data, "cpu").items()}
        population.updates(columns, number, 1, 4)
        assert_equal(held, after)
        held, after = population.state, pytree.tree_map(torch.clone, population.state)


def test_the_policy_of_td3_bc_moves_every_second_update():
    population = OfflinePopulation(build("td3_bc"), SEEDS)
    data, seen = bandit(), []
    population.describe(data)
    for number in range(4):
        population.updates(offline.samples(data, "cpu"), number, 1, 4)
        seen.append(population.state["params"]["policy"]["0"]["weight"].clone())
    assert torch.equal(seen[1], seen[2]) and not torch.equal(seen[0], seen[1]) and not torch.equal(seen[2], seen[3])


def test_a_policy_that_would_never_move_is_refused():
    with pytest.raises(UsageError, match="policy_delay 0: the policy moves once in that many updates: 1 or more"):
        build("td3_bc", policy_delay=0)


def test_a_loss_that_is_no_number_stops_the_run():
    data = bandit()
    data.reward[:] = torch.inf
    with pytest.raises(NonFiniteError, match=r"non-finite .* in member 0 \(seed 11\) in updates 1 to 2"):
        learn(OfflinePopulation(build("iql"), SEEDS), data=data)


def two_episodes(name: str, **settings: Any) -> tuple[OfflinePopulation, Transitions]:
    """Discount 0.5, lambda 1; V is 2 everywhere; rewards are left as they are.

    The first is cut by its clock after rewards 1, 2: R = 2 + 0.5 V = 3, then 1 + 0.5 * 3 = 2.5. The second ends its
    task with reward 4: R = 4. R - V = 0.5, 1, 2.
    """
    data = bandit(3)
    data = replace(
        data,
        reward=torch.tensor([1.0, 2.0, 4.0]),
        terminated=torch.tensor([False, False, True]),
        truncated=torch.tensor([False, True, False]),
    )
    population = OfflinePopulation(build(name, discount=0.5, lambda_=1.0, return_range=0.0, **settings), [5, 6])
    value = pytree.tree_map(torch.zeros_like, population.state["params"]["value"])
    value["1"]["bias"] += 2.0
    population.state["params"]["value"] = value
    return population, data


@pytest.mark.parametrize("correction", ["none", "vtrace", "retrace", "ess"])
def test_p3o_offline_has_the_behaviors_returns_until_it_leaves_it(correction: str):
    """By hand; then the second action becomes half as likely, which by V-trace halves what is learned of it.

    Its delta is 2 + 0.5 * 2 - 2 = 1, that of the step before 1 + 0.5 * 2 - 2 = 0: V-trace's targets are 2 + 0.5 = 2.5
    and 2 + 0 + 0.5 * 0.5 = 2.25. Its advantages are 1, and 0 + 0.5 * 0.5 = 0.25.
    """
    population, data = two_episodes("p3o_offline", correction=correction)
    pi = population.policy(data.obs.expand(2, -1, -1))
    data = replace(data, behavior_mean=pi.mean[0], behavior_log_std=pi.log_std[0].expand(3, ACT).clone())
    found = population.prepare(data)
    assert found["value_target"][0].tolist() == pytest.approx([2.5, 3.0, 4.0], abs=1e-5)
    assert found["advantage"][0].tolist() == pytest.approx([0.5, 1.0, 2.0], abs=1e-5)
    if correction == "vtrace":
        # log pi - log b = -log 2 at the second action: b's mean is where the action is, pi's further off.
        width = torch.exp(data.behavior_log_std)
        away = math.sqrt(2.0 * math.log(2.0)) * width * torch.tensor([1.0, 0.0])
        mean, action = data.behavior_mean.clone(), data.action.clone()
        action[1] = pi.mean[0, 1] + away[1]
        mean[1] = action[1]
        found = population.prepare(replace(data, behavior_mean=mean, action=action))
        assert found["value_target"][0].tolist() == pytest.approx([2.25, 2.5, 4.0], abs=1e-4)
        assert found["advantage"][0].tolist() == pytest.approx([0.25, 1.0, 2.0], abs=1e-4)


def test_awr_regresses_on_returns_of_whole_episodes():
    """By hand: A = R - V = 0.5, 1, 2: mean 7 / 6, squares of the differences 16 / 36, 1 / 36, 25 / 36."""
    population, data = two_episodes("awr")
    found = population.prepare(data)
    assert found["value_target"].tolist() == [[2.5, 3.0, 4.0]] * 2
    std = math.sqrt(42 / 36 / 2)
    expected = torch.tensor([-4 / 6, -1 / 6, 5 / 6]) / std
    torch.testing.assert_close(found["advantage"], expected.expand(2, -1))


def test_what_is_asked_of_all_data_is_asked_anew_in_each_stretch():
    """With a discount of 0 lambda-returns are rewards at any time; else they follow the value."""
    ended = torch.arange(COUNT) % 5 == 4
    data, targets = replace(bandit(), terminated=ended & False, truncated=ended), {}
    for discount in (0.0, 0.9):
        population = OfflinePopulation(build("awr", discount=discount, return_range=0.0, learning_rate=0.01), SEEDS)
        population.describe(data)
        before = population.prepare(data)["value_target"]
        learn(population, updates=8, data=data)
        targets[discount] = before, population.prepare(data)["value_target"]
    assert_equal(targets[0.0][1], data.reward.expand(3, -1), 1e-4)
    assert torch.isclose(*targets[0.9]).float().mean() < 0.05


def test_a_penalty_of_brac_keeps_to_the_behavior():
    """The larger alpha, the nearer; its value penalty is what its critics lose by it, alpha D."""
    ends, q = {}, {}
    for alpha, penalty in [(0.1, "value"), (30.0, "value"), (30.0, "policy")]:
        agent = build("brac", alpha=alpha, penalty=penalty, hidden=(32,), minibatch=64, learning_rate=1e-2,
                      policy_learning_rate=1e-2, return_range=0.0, cloning=0.5)  # fmt: skip
        metrics = learn(OfflinePopulation(agent, [5]), updates=200, blocks=4, data=bandit(2000))[-1].metrics
        ends[alpha, penalty], q[penalty] = metrics["behavior_kl"].item(), metrics["q"].item()
    assert ends[30.0, "value"] < 0.3 * ends[0.1, "value"]
    assert q["value"] < q["policy"]


def test_cloning_of_brac_does_not_look_at_rewards():
    rewards = []
    for sign in (1.0, -1.0):
        population = OfflinePopulation(build("brac", cloning=0.99), [5])
        learn(population, updates=20, data=replace(bandit(), reward=sign * bandit().reward))
        rewards.append(population.state["params"]["policy"])
    assert_equal(*rewards)
