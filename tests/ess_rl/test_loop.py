"""The loop, on a world of random numbers in which episodes end in both ways and often."""

import copy
import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from agents import dapo, tba_group
from agents.p3o import P3O, Config
from ess_rl import random
from ess_rl.batches import draw_weights, order, prepare
from ess_rl.collect import collect
from ess_rl.contract import Draw, Precision, Step, VectorEnv
from ess_rl.errors import NonFiniteError, UsageError
from ess_rl.ess import effective_sample_size
from ess_rl.gaussian import Gaussian, kl
from ess_rl.loop import Progress, env_seeds, evaluate, train
from ess_rl.population import Population
from ess_rl.replay import Replay
from ess_rl.transitions import Transitions

OBS, ACT, N, T = 3, 2, 4, 6
CPU = torch.device("cpu")
CONFIG = Config(hidden=(8,), num_envs=N, rollout=T, epochs=2, minibatch=8, learning_rate=1e-2)
SEEDS = [3, 8]


class RandomWorld:
    """Environment i is a function of its seed, its clock and its actions. A step in five ends an episode."""

    env_id, backend, obs_dim, act_dim, device = "RandomWorld-v0", "torch", OBS, ACT, CPU
    action_range = ((-1.0, 1.0),) * ACT
    max_episode_steps: int | None = None
    staggered = False

    def __init__(self, num_envs: int):
        self.num_envs = num_envs
        self.log: list[Step | None] = []  # the steps taken; None stands for a reset of all
        self.actions: list[Tensor] = []

    def reset(self, seeds: Tensor) -> Tensor:
        assert seeds.shape == (self.num_envs,)
        self.seeds, self.clock = seeds, 0
        self.obs = random.normal(seeds, (OBS,))
        self.log.append(None)
        return self.obs

    def step(self, action: Tensor) -> Step:
        self.clock += 1
        keys = random.fold_in(self.seeds, self.clock)
        chance = random.uniform(keys, (2,))
        next_obs = 0.9 * self.obs + 0.3 * torch.tanh(action).sum(-1, keepdim=True) + 0.1 * random.normal(keys, (OBS,))
        terminated, truncated = chance[:, 0] < 0.1, (chance[:, 0] >= 0.1) & (chance[:, 1] < 0.1)
        fresh = random.normal(random.fold_in(keys, 1), (OBS,))
        self.obs = torch.where((terminated | truncated)[:, None], fresh, next_obs)
        step = Step(self.obs, next_obs, self.reward(next_obs), terminated, truncated)
        self.log.append(step)
        self.actions.append(action)
        return step

    def reward(self, next_obs: Tensor) -> Tensor:
        return next_obs.sum(-1)

    def close(self) -> None: ...


class Staggered(RandomWorld):
    staggered = True


def build(seeds: list[int] = SEEDS, env: type[RandomWorld] = RandomWorld, **changes: Any):
    population = Population(P3O(replace(CONFIG, **changes), OBS, ACT), seeds)
    return population, env(N * len(seeds)), Replay(T * (1 + changes.get("replay", 0)), len(seeds), N, OBS, ACT, "cpu")


def run(parts: tuple, **arguments: Any) -> list[Progress]:
    return list(train(*parts, **arguments))


def test_the_world_keeps_the_contract():
    env = RandomWorld(2)
    assert isinstance(env, VectorEnv)


def test_collect_obeys_the_law_and_records_the_density_that_acted():
    population, env, _ = build()
    start = env.reset(env_seeds(population.seed, N))
    rollout, obs = collect(population, env, start, 50, iteration=7)
    assert torch.equal(rollout.obs[0].flatten(0, 1), start)
    assert torch.equal(obs, env.obs)

    chained = (rollout.next_obs[:-1] == rollout.obs[1:]).all(-1)
    assert torch.equal(chained, ~rollout.last[:-1])
    assert rollout.terminated.any()
    assert rollout.truncated.any()

    torch.testing.assert_close(rollout.action.flatten(1, 2), torch.stack(env.actions), rtol=0.0, atol=0.0)
    torch.testing.assert_close(
        rollout.reward.flatten(1, 2), torch.stack([s.reward for s in env.log if s]), rtol=0.0, atol=0.0
    )
    for t in (0, 49):
        pi = population.policy(rollout.obs[t])
        torch.testing.assert_close(rollout.behavior_mean[t], pi.mean)
        torch.testing.assert_close(rollout.behavior_log_std[t], pi.log_std)
    assert (rollout.version == 7).all()

    # The actions are as far from the mean as standard normal noise says, in 50 * 2 * 4 * 2 draws.
    z = (rollout.action - rollout.behavior_mean) * torch.exp(-rollout.behavior_log_std)
    assert abs(z.mean()) < 5.0 / math.sqrt(z.numel())
    assert abs(z.square().mean() - 1.0) < 5.0 * math.sqrt(2.0 / z.numel())


def test_noise_is_new_in_each_iteration_and_alike_in_the_same():
    actions = []
    for iteration in (0, 0, 1):
        population, env, _ = build()
        rollout, _ = collect(population, env, env.reset(env_seeds(population.seed, N)), T, iteration)
        actions.append(rollout.action)
    assert torch.equal(actions[0], actions[1])
    assert not torch.isclose(actions[0], actions[2]).any()


def test_environment_seeds_belong_to_the_member():
    together = env_seeds(torch.tensor([3, 8]), N)
    assert together.unique().numel() == 2 * N
    assert torch.equal(together[N:], env_seeds(torch.tensor([8]), N))
    assert not torch.isin(env_seeds(torch.tensor([4, 9]), N), together).any()


def test_episodes_are_counted_as_a_plain_loop_counts_them():
    parts = build()
    progress = run(parts, iterations=6, reset_every=4)
    log, episodes, return_sum = parts[1].log, [], []
    for step in log:
        if step is None:
            running, steps = [0.0] * 8, 0
            continue
        if steps % T == 0:
            episodes.append([0, 0])
            return_sum.append([0.0, 0.0])
        for i in range(8):
            running[i] += float(step.reward[i])
            if step.terminated[i] or step.truncated[i]:
                episodes[-1][i // N] += 1
                return_sum[-1][i // N] += running[i]
                running[i] = 0.0
        steps += 1
    assert [p.episodes.tolist() for p in progress] == episodes
    assert sum(map(sum, episodes)) > 20
    for p, expected in zip(progress, return_sum, strict=True):
        assert p.return_sum.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert [p.iteration for p in progress] == [1, 2, 3, 4, 5, 6]
    assert [p.env_steps for p in progress] == [T * N * i for i in range(1, 7)]


def test_the_first_iteration_only_observes():
    population, env, replay = build()
    before = copy.deepcopy(population.state)
    progress = train(population, env, replay, iterations=2, reset_every=2)
    assert next(progress).metrics == {}
    torch.testing.assert_close(population.state["params"], before["params"], rtol=0.0, atol=0.0)
    assert (population.state["obs_stats"]["count"] == T * N).all()
    metrics = next(progress).metrics
    assert (metrics["ess"] < 1.0).all()
    assert (1.0 - metrics["ess_first"]).abs().max() < 1e-5
    assert all(x.shape == (2,) for x in metrics.values())
    assert (population.state["obs_stats"]["count"] == 2 * T * N).all()
    assert (population.state["optimizer"]["policy"]["step"] == 2 * T * N / 8).all()


def test_episodes_of_clocks_that_were_ahead_are_not_counted():
    """Not counted: each environment's first end after a reset, whichever iteration it falls in."""
    found = []
    for staggered in (False, True):
        population, env, replay = build()
        env.staggered = staggered
        found.append((run((population, env, replay), iterations=6, reset_every=3), env.log))
    (plain, _), (cut, log) = found
    count, total = torch.zeros(6, 2, dtype=torch.int64), torch.zeros(6, 2, dtype=torch.float64)
    first, sums = torch.ones(2 * N, dtype=torch.bool), torch.zeros(2 * N, dtype=torch.float64)
    steps = 0
    for step in log:
        if step is None:
            first, sums = torch.ones_like(first), torch.zeros_like(sums)
            continue
        sums += step.reward
        ended = step.terminated | step.truncated
        count[steps // T] += (ended & first).view(2, N).sum(1)
        total[steps // T] += torch.where(ended & first, sums, 0.0).view(2, N).sum(1)
        sums, first, steps = torch.where(ended, 0.0, sums), first & ~ended, steps + 1
    assert count.sum() > N
    for iteration, (one, other) in enumerate(zip(plain, cut, strict=True)):
        assert torch.equal(other.episodes, one.episodes - count[iteration])
        torch.testing.assert_close(other.return_sum, one.return_sum - total[iteration])


def test_every_sample_is_used_once_an_epoch():
    population, env, replay = build()
    seen: list[Tensor] = []
    epoch = population.epoch

    def spy(data: dict[str, Tensor], indices: Tensor):
        seen.extend(indices)
        return epoch(data, indices)

    population.epoch = spy
    run((population, env, replay), iterations=3, reset_every=3)
    epochs = torch.cat(seen, dim=1).unflatten(1, (2 * 2, T * N))  # two epochs of iterations 2 and 3
    assert (epochs.sort(-1).values == torch.arange(T * N)).all()
    assert epochs.flatten(0, 1).unique(dim=0).shape[0] == 2 * 2 * 2  # a different order for each member, each time


@pytest.mark.parametrize("draw", ["uniform", "recency", "ess", "reward"])
def test_replayed_rollouts_are_drawn_from(draw: Draw):
    """With two older rollouts, an epoch is still one rollout's worth of samples, each used once."""
    population, env, replay = build(replay=2, draw=draw)
    seen: list[Tensor] = []
    learn = population.epoch

    def spy(data: dict[str, Tensor], indices: Tensor):
        assert data["obs"].shape == (2, 3 * T * N, OBS)
        seen.extend(indices)
        return learn(data, indices)

    population.epoch = spy
    progress = run((population, env, replay), iterations=5, reset_every=5)
    per_epoch = T * N // CONFIG.minibatch
    for iteration, p in enumerate(progress[1:], start=1):
        held = min(iteration + 1, 3)  # rollouts, the fresh one included
        ages = [name for name in p.metrics if name.startswith("ess_age_")]
        assert ages == [f"ess_age_{age}" for age in range(1, held)]
        assert all(((p.metrics[name] > 0.0) & (p.metrics[name] < 1.0)).all() for name in ages)
        assert (p.metrics["ess_first"] > 1.0 - 1e-5).all()
        for _ in range(CONFIG.epochs):
            epoch = torch.cat(seen[:per_epoch], dim=1)  # [P, T * N]
            del seen[:per_epoch]
            assert all(len(member.unique()) == T * N for member in epoch)
            assert epoch.max() < held * T * N
            assert ((epoch // (T * N)).unique() == torch.arange(held)).all()
    assert not seen


def test_draw_weights_by_hand():
    """Two rollouts of 3 steps, two members, two environments of each."""
    rollouts = [Transitions.empty((3, 2, 2), OBS, ACT, CPU) for _ in range(2)]
    ess = torch.tensor([[1.0, 0.25], [1.0, 0.5]])

    def weights(draw: Draw, group: int = 0) -> list[Any]:
        config = CONFIG if not group else tba_group.Config(group=group)
        found = draw_weights(replace(config, draw=draw), rollouts, ess)
        found = found.view(2, 2, 3, 2)  # member, rollout, step, environment
        assert (found == found[:, :, :1]).all()  # all steps of a trajectory have the same weight
        return found[:, :, 0].tolist()

    assert weights("uniform") == [[[1.0, 1.0], [1.0, 1.0]]] * 2
    assert weights("recency") == [[[1.0, 1.0], [0.5, 0.5]]] * 2
    assert weights("ess") == [[[1.0, 1.0], [0.25, 0.25]], [[1.0, 1.0], [0.5, 0.5]]]
    assert weights("reward") == [[[1.0, 1.0], [1.0, 1.0]]] * 2  # all rewards are equal
    pay = torch.tensor([[[1.0, 1.0], [1.0, 5.0]], [[2.0, 4.0], [2.0, 4.0]]])  # member, rollout, environment
    for k, rollout in enumerate(rollouts):
        rollout.reward[1] = 3.0 * pay[:, k]  # one of three steps
    # 1 1 1 5: mean 2, deviation sqrt(3); 2 4 2 4: mean 3, deviation 1.
    low, high = math.exp(-1.0 / math.sqrt(3.0)), math.exp(math.sqrt(3.0))
    down, up = math.exp(-1.0), math.exp(1.0)
    expected = [[[low, low], [low, high]], [[down, up], [down, up]]]
    torch.testing.assert_close(torch.tensor(weights("reward")), torch.tensor(expected))
    # Minus the mean of the pair: 0 0 -2 2, deviation sqrt(2); -1 1 -1 1.
    down_2, up_2 = math.exp(-math.sqrt(2.0)), math.exp(math.sqrt(2.0))
    expected = [[[1.0, 1.0], [down_2, up_2]], [[down, up], [down, up]]]
    torch.testing.assert_close(torch.tensor(weights("reward", group=2)), torch.tensor(expected))


@pytest.mark.parametrize("replay", [0, 2])
def test_diagnostics_are_of_the_fresh_rollout_after_its_updates(replay: int):
    population, env, ring = build(replay=replay)
    observe, policies = population.observe, []

    def spy(rollout: Transitions) -> None:
        policies.append(Gaussian(*map(torch.stack, zip(*[population.policy(obs) for obs in rollout.obs], strict=True))))
        observe(rollout)

    population.observe = spy
    *_, last = run((population, env, ring), iterations=4, reset_every=4)
    rollout, pi = ring.latest(T), policies[-1]
    b = Gaussian(rollout.behavior_mean, rollout.behavior_log_std)
    log_ratio = pi.log_prob(rollout.action) - b.log_prob(rollout.action)  # [T, P, N]
    torch.testing.assert_close(last.metrics["ess_end"], effective_sample_size(log_ratio, dim=(0, 2)))
    torch.testing.assert_close(last.metrics["ess_end_per_dim"], last.metrics["ess_end"] ** (1.0 / ACT))
    torch.testing.assert_close(last.metrics["behavior_kl_end"], kl(pi, b).mean((0, 2)), rtol=1e-4, atol=1e-6)
    # Of 24 samples: the first (1 % are 0.24), the 12th, and the 24th (99 % are 23.76).
    in_order = log_ratio.transpose(0, 1).flatten(1).sort(1).values
    for name, k in (("log_ratio_q01", 0), ("log_ratio_q50", 11), ("log_ratio_q99", 23)):
        torch.testing.assert_close(last.metrics[name], in_order[:, k], rtol=1e-4, atol=1e-5)
    assert (last.metrics["ess_end_advantage"] < 1.0).all()
    assert ((last.metrics["affinity_end"] > 0.0) & (last.metrics["affinity_end"] < 1.0)).all()
    assert ("replayed_share" in last.metrics) == (replay > 0)


def test_the_share_of_replayed_data_by_hand():
    """A rate of 0 and no cap: weights are ratios. Advantages of the fresh rollout are ten times the others'."""
    population, env, ring = build(replay=1, learning_rate=0.0, cap=1e6, epochs=1, minibatch=T * N)
    run((population, env, ring), iterations=2, reset_every=2)
    data, _ = prepare(population, ring.rollouts(T, 2))
    assert data["age"][:, : T * N].eq(0.0).all() and data["age"][:, T * N :].eq(1.0).all()
    data["advantage"][:, : T * N : 2], data["advantage"][:, 1 : T * N : 2] = 10.0, -10.0
    data["advantage"][:, T * N :: 2], data["advantage"][:, T * N + 1 :: 2] = 1.0, -1.0
    for name in ("behavior_mean", "behavior_log_std", "action", "obs"):
        data[name][:, 1:] = data[name][:, :1]  # all samples are equal, and so are their ratios
    index = torch.arange(2 * T * N).expand(2, -1)
    assert population.update(data, index)["replayed_share"].tolist() == pytest.approx([1.0 / 11.0] * 2, rel=1e-4)
    assert population.update(data, index[:, : T * N])["replayed_share"].tolist() == [0.0, 0.0]


def test_samples_of_older_rollouts_are_prepared_under_the_present_policy():
    population, env, replay = build(replay=1)
    run((population, env, replay), iterations=3, reset_every=3)
    rollouts = replay.rollouts(T, 2)
    data, ess = prepare(population, rollouts)
    for age, rollout in enumerate(rollouts):
        alone = population.prepare(rollout)
        log_ratio = alone.pop("log_ratio")
        pi = population.policy(rollout.obs.transpose(0, 1).flatten(1, 2))
        b = Gaussian(*(x.transpose(0, 1).flatten(1, 2) for x in (rollout.behavior_mean, rollout.behavior_log_std)))
        action = rollout.action.transpose(0, 1).flatten(1, 2)
        torch.testing.assert_close(log_ratio, pi.log_prob(action) - b.log_prob(action))
        torch.testing.assert_close(ess[:, age], effective_sample_size(log_ratio, dim=1))
        for name, x in alone.items():
            torch.testing.assert_close(data[name][:, age * T * N : (age + 1) * T * N], x)
        assert (data["age"][:, age * T * N : (age + 1) * T * N] == age).all()


def test_what_an_agent_makes_anew_is_made_as_each_epoch_begins():
    config = dapo.Config(hidden=(8,), num_envs=N, rollout=T, epochs=3, minibatch=8, learning_rate=1e-2, replay=1)
    population = Population(dapo.DAPO(config, OBS, ACT), SEEDS)
    ring, epoch, seen = Replay(2 * T, 2, N, OBS, ACT, "cpu"), population.epoch, []

    def spy(data: dict[str, Tensor], indices: Tensor) -> dict[str, Tensor]:
        present = [population.refresh(rollout)["divergence_ahead"] for rollout in ring.rollouts(T, 2)]
        torch.testing.assert_close(data["divergence_ahead"], torch.cat(present, dim=1))
        seen.append(data)
        return epoch(data, indices)

    population.epoch = spy
    run((population, RandomWorld(2 * N), ring), iterations=4, reset_every=4)
    assert len(seen) == 3 * 3
    for one, next_one in itertools.pairwise(seen[:3]):
        assert not torch.allclose(one["divergence_ahead"], next_one["divergence_ahead"])
        assert all(torch.equal(one[name], next_one[name]) for name in one if name != "divergence_ahead")


@pytest.mark.parametrize(("lag", "sync_interval"), [(1, 1), (3, 1), (0, 2), (1, 3)])
def test_the_policy_of_some_iterations_ago_acts(lag: int, sync_interval: int):
    population, env, replay = build(lag=lag, sync_interval=sync_interval)
    policies = [copy.deepcopy(population.state)]  # at the start of each iteration
    for iteration, p in enumerate(train(population, env, replay, iterations=6, reset_every=6)):
        rollout, present = replay.latest(T), population.state
        synced = iteration - iteration % sync_interval
        population.state = policies[max(synced - lag, 0)]
        pi = population.policy(rollout.obs[2])
        torch.testing.assert_close(rollout.behavior_mean[2], pi.mean)
        torch.testing.assert_close(rollout.behavior_log_std[2], pi.log_std)
        population.state = present
        policies.append(copy.deepcopy(present))
        if iteration > max(synced - lag, 0):
            assert (p.metrics["ess_first"] < 1.0 - 1e-5).all()  # statistics and parameters have changed since
    assert len(population.behind) == lag + (sync_interval > 1)


def test_the_behavior_is_wider_by_its_temperature_and_an_evaluation_is_not():
    population, env, _ = build(behavior_temperature=1.5)
    seeds = env_seeds(population.seed, N)
    rollout, _ = collect(population, env, env.reset(seeds), T, 0)
    pi = population.policy(rollout.obs[3])
    torch.testing.assert_close(rollout.behavior_log_std[3], pi.log_std + math.log(1.5))
    torch.testing.assert_close(rollout.behavior_mean[3], pi.mean)
    z = (rollout.action - rollout.behavior_mean) * torch.exp(-rollout.behavior_log_std)
    plain, env, _ = build()
    same_noise, _ = collect(plain, env, env.reset(seeds), T, 0)
    expected = (same_noise.action - same_noise.behavior_mean) * torch.exp(-same_noise.behavior_log_std)
    torch.testing.assert_close(z[0], expected[0], rtol=1e-4, atol=1e-5)
    # e of a policy narrower by T in both of 2 dimensions: per dimension sqrt(2 T^2 - 1) / T^2 = 0.8315.
    progress = run((*build(list(range(40)), behavior_temperature=1.5),), iterations=2, reset_every=2)
    assert progress[-1].metrics["ess_first"].mean() == pytest.approx(0.8315**2, abs=0.05)


@pytest.mark.parametrize(("precision", "at_least"), [("fp16", -1.0), ("bf16", 1e-7), ("fp8", 1e-5)])
def test_a_network_of_low_precision_acts_and_is_recorded(precision: Precision, at_least: float):
    population, env, _ = parts = build(rollout_precision=precision)
    assert not population.on_policy
    progress = run(parts, iterations=4, reset_every=4)
    lost = 1.0 - progress[-1].metrics["ess_first"]
    assert (lost > at_least).all() and (lost < 0.1).all()
    rollout, _ = collect(population, env, env.reset(env_seeds(population.seed, N)), T, 4)
    pi = population.policy(rollout.obs[2])  # as in an evaluation
    assert rollout.behavior_mean.dtype == torch.float32
    assert 0.0 < (rollout.behavior_mean[2] - pi.mean).abs().max() < 0.1
    # The action is drawn from the recorded behavior, with the same noise as in fp32.
    z = (rollout.action - rollout.behavior_mean) * torch.exp(-rollout.behavior_log_std)
    seeds = random.fold_in(random.fold_in(population.seed, 1), 4)
    torch.testing.assert_close(z, random.normal(seeds, (T, N, ACT)).transpose(0, 1), rtol=1e-4, atol=1e-4)


def test_a_behavior_that_was_recorded_wrongly_is_noticed():
    class Shifted(P3O):
        def act(self, state: Any, obs: Tensor) -> Gaussian:
            pi = super().act(state, obs)
            return Gaussian(pi.mean, pi.log_std + 0.1)

    _, env, replay = build()
    population = Population(Shifted(CONFIG, OBS, ACT), SEEDS)
    with pytest.raises(
        ValueError, match=r"effective sample size of fresh data is 0\.9\d+ before the first update, not 1"
    ):
        run((population, env, replay), iterations=2, reset_every=2)


def test_a_policy_that_float32_cannot_tell_from_itself_ends_no_run_that_is_under_way():
    """With a standard deviation of e^-16, 1.1e-7, a mean rounded by 6e-8 is half a standard deviation away."""

    class Rounded(P3O):
        def act(self, state: Any, obs: Tensor) -> Gaussian:
            pi = super().act(state, obs)
            return Gaussian(pi.mean + 6e-8, pi.log_std)

    def parts():
        return Population(Rounded(replace(CONFIG, log_std=-16.0), OBS, ACT), SEEDS), *build()[1:]

    progress = run(parts(), iterations=14, reset_every=2, start=12)
    assert (progress[-1].metrics["ess_first"] < 0.9).all()
    with pytest.raises(ValueError, match="before the first update, not 1"):
        run(parts(), iterations=2, reset_every=2)


@pytest.mark.parametrize("start", [2, 4])
@pytest.mark.parametrize(
    "changes", [{}, {"replay": 2}, {"lag": 3}, {"sync_interval": 3}, {"lag": 1, "sync_interval": 3}]
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(start: int, changes: dict[str, Any]):
    whole = build(**changes)
    progress = []
    for p in train(*whole, iterations=6, reset_every=2):
        progress.append(p)
        if p.iteration == start:
            state, held = copy.deepcopy(whole[0].state), copy.deepcopy(whole[2].state())
            behind = copy.deepcopy(whole[0].behind)

    resumed = build(**changes)
    resumed[0].state, resumed[0].behind = state, behind
    if "replay" in changes:
        resumed[2].load(held)
    again = run(resumed, iterations=6, reset_every=2, start=start)
    torch.testing.assert_close(resumed[0].state, whole[0].state, rtol=0.0, atol=0.0)
    for p, q in zip(progress[start:], again, strict=True):
        assert (p.iteration, p.env_steps) == (q.iteration, q.env_steps)
        torch.testing.assert_close(
            (p.metrics, p.episodes, p.return_sum), (q.metrics, q.episodes, q.return_sum), rtol=0.0, atol=0.0
        )


def test_a_member_learns_the_same_without_its_neighbor():
    together, alone = build(), build([8])
    last_together = run(together, iterations=4, reset_every=4)[-1]
    last_alone = run(alone, iterations=4, reset_every=4)[-1]
    assert last_together.episodes[1] == last_alone.episodes[0]
    torch.testing.assert_close(
        together[0].state["params"]["policy"]["log_std"][1], alone[0].state["params"]["policy"]["log_std"][0],
        rtol=1e-3, atol=1e-4,
    )  # fmt: skip


def test_an_episode_cut_by_a_reset_is_truncated():
    for reset_every, iterations, cut in ((1, 2, True), (2, 4, True), (4, 3, False)):
        _, env, replay = parts = build(list(range(10)))
        run(parts, iterations=iterations, reset_every=reset_every)
        rollout, step = replay.latest(T), env.log[-1]
        assert step is not None
        assert step.terminated.any()
        assert step.truncated.any()
        assert torch.equal(rollout.terminated[-1].flatten(), step.terminated)
        assert torch.equal(rollout.truncated[-1].flatten(), ~step.terminated if cut else step.truncated)


def test_each_reset_begins_other_episodes():
    parts, given = build(), []
    reset = parts[1].reset
    parts[1].reset = lambda seeds: given.append(seeds) or reset(seeds)
    run(parts, iterations=6, reset_every=2)
    assert len(given) == 3 and torch.cat(given).unique().numel() == 3 * len(SEEDS) * N


def test_metrics_are_means_over_all_updates_of_an_iteration():
    population, env, ring = build()
    epoch, seen = population.epoch, []

    def spy(data: dict[str, Tensor], indices: Tensor) -> Any:
        seen.append(epoch(data, indices))
        return seen[-1]

    population.epoch = spy
    *_, last = run((population, env, ring), iterations=3, reset_every=3)
    ess = torch.cat([metrics["ess"] for metrics in seen[-CONFIG.epochs :]])
    assert ess.shape == (CONFIG.epochs * N * T // CONFIG.minibatch, len(SEEDS))
    torch.testing.assert_close(last.metrics["ess"], ess.mean(0))
    assert not torch.allclose(ess[: len(ess) // 2].mean(0), ess.mean(0), rtol=1e-3)


def test_samples_are_drawn_as_the_option_says():
    """Of two rollouts, the older one has no weight: all that is drawn is the fresh one, unless draws are uniform."""
    weights = torch.cat([torch.ones(2, N * T), torch.zeros(2, N * T)], 1).double()
    for draw in ("recency", "ess", "reward"):
        drawn = order(torch.tensor([1, 2]), replace(CONFIG, draw=draw), weights)
        assert torch.equal(drawn.sort(1).values, torch.arange(N * T).expand(2, -1))
    assert (order(torch.tensor([1, 2]), CONFIG, weights) >= N * T).any()


class BrokenWorld(RandomWorld):
    """Environment 5, which is number 1 of member 1, breaks at the fourth step of its second rollout."""

    bad = math.nan

    def reward(self, next_obs: Tensor) -> Tensor:
        reward = next_obs.sum(-1)
        return torch.where(torch.arange(self.num_envs) == 5, self.bad, reward) if self.clock == T + 4 else reward


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_is_no_number_stops_the_run_and_is_named(bad: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(BrokenWorld, "bad", bad)
    with pytest.raises(NonFiniteError) as caught:
        run(build(env=BrokenWorld), iterations=3, reset_every=3)
    text = str(caught.value)
    for part in ("RandomWorld-v0", "reward", "member 1 (seed 8)", "iteration 2", "step 3", "environment 1"):
        assert part in text


def test_an_observation_is_named_before_the_action_it_spoils(monkeypatch: pytest.MonkeyPatch):
    """NaN in next_obs and obs of step 3: the result of the dynamics is named before the action computed from it."""

    class Spoiling(RandomWorld):
        def step(self, action: Tensor) -> Step:
            step = super().step(action)
            if len(self.actions) == T + 4:  # step 3 of iteration 2
                step.next_obs[5] = math.nan
                self.obs[5] = math.nan
            return step

    with pytest.raises(NonFiniteError, match=r"next observation in member 1 \(seed 8\), environment 1, step 3"):
        run(build(env=Spoiling), iterations=3, reset_every=3)


def test_parameters_that_are_no_numbers_stop_the_run():
    population, env, replay = build()
    population.state["params"]["value"]["0"]["weight"][0] = math.nan
    with pytest.raises(NonFiniteError, match=r"member 0 \(seed 3\) in the updates of iteration 2 on RandomWorld-v0"):
        run((population, env, replay), iterations=2, reset_every=2)


def test_refusals():
    config = tba_group.Config(hidden=(8,), num_envs=N, rollout=T, minibatch=8, group=2)
    population = Population(tba_group.TBAGroup(config, OBS, ACT), SEEDS)
    with pytest.raises(UsageError, match=r"group 2: RandomWorld-v0 was not made so; envs\.make_grouped"):
        run((population, RandomWorld(N * 2), Replay(T, 2, N, OBS, ACT, CPU)), iterations=1, reset_every=1)
    with pytest.raises(UsageError, match="minibatch 7 does not divide the 24 samples"):
        run(build(minibatch=7), iterations=1, reset_every=1)
    with pytest.raises(ValueError, match="start=3 is not a multiple of reset_every=2"):
        run(build(), iterations=4, reset_every=2, start=3)
    population, env, replay = build()
    with pytest.raises(ValueError, match="has 6 environments; 2 members of num_envs 4 need 8"):
        run((population, RandomWorld(6), replay), iterations=1, reset_every=1)
    with pytest.raises(ValueError, match="has 3 environments: give a multiple of the 2 members"):
        evaluate(population, RandomWorld(3))
    with pytest.raises(ValueError, match="a replay of 8 steps cannot hold 1 whole rollouts of 6 steps, and no part"):
        run((population, env, Replay(8, 2, N, OBS, ACT, "cpu")), iterations=1, reset_every=1)
    with pytest.raises(ValueError, match="a replay on meta for a population on cpu"):
        run((population, env, Replay(T, 2, N, OBS, ACT, "meta")), iterations=1, reset_every=1)
    with pytest.raises(UsageError, match=r"starts staggered: RandomWorld-v0 was not made so; envs\.make\("):
        run(build(starts="staggered"), iterations=1, reset_every=1)
    with pytest.raises(ValueError, match="RandomWorld-v0 is staggered, so its first episodes are short"):
        evaluate(population, Staggered(N * 2))
    _, env, replay = build()
    with pytest.raises(ValueError, match="a replay of 6 steps cannot hold 3 whole rollouts of 6 steps"):
        run((Population(P3O(replace(CONFIG, replay=2), OBS, ACT), SEEDS), env, replay), iterations=1, reset_every=1)


class Countdown(RandomWorld):
    """Environment i pays 1 per step and ends its first episode at step i + 1; later steps all pay 100 and all end."""

    def step(self, action: Tensor) -> Step:
        self.clock += 1
        number = torch.arange(self.num_envs) + 1
        zeros = torch.zeros(self.num_envs, dtype=torch.bool)
        reward = torch.where(self.clock <= number, 1.0, 100.0)
        ended = self.clock >= number
        return Step(self.obs, self.obs, reward, ended & (number % 2 == 0), ended & (number % 2 == 1) | zeros)


def test_evaluate_counts_the_first_episode_of_each_environment_and_no_other():
    population, env, _ = build(env=Countdown)
    before = copy.deepcopy(population.state)
    returns = evaluate(population, env)
    assert returns.dtype == torch.float64
    assert returns.tolist() == [[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]
    torch.testing.assert_close(population.state, before, rtol=0.0, atol=0.0)


def test_evaluate_takes_the_mean_action_and_seeds_of_its_own():
    population, env, _ = build()
    evaluate(population, env)
    seeds = env.seeds
    obs = random.normal(seeds, (OBS,)).view(2, N, OBS)
    torch.testing.assert_close(env.actions[0].view(2, N, ACT), population.policy(obs).mean)
    training = random.fold_in(random.fold_in(population.seed, 0), 0)  # purpose 0: environments, at iteration 0
    assert not torch.isin(env_seeds(training, N), seeds).any()
    evaluate(population, env, seed=1)
    assert not torch.isin(env.seeds, seeds).any()
    alone, env, _ = build([8])
    evaluate(alone, env)
    assert torch.equal(env.seeds, seeds[N:])


def test_evaluate_takes_as_many_steps_as_an_episode_may_have():
    population, env, _ = build(env=Countdown)
    env.max_episode_steps = 8  # of the eighth and last environment
    assert evaluate(population, env).flatten().tolist() == [float(i + 1) for i in range(8)]
    env.max_episode_steps = 3
    with pytest.raises(UsageError, match="5 episodes did not end within 3 steps"):
        evaluate(population, env)


def test_evaluate_refuses_episodes_without_end():
    with pytest.raises(UsageError, match="RandomWorld-v0: 5 episodes did not end within 3 steps"):
        evaluate(*build(env=Countdown)[:2], max_steps=3)
