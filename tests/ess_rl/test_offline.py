"""The mathematics of offline learning: by hand, by known properties and against references."""

import math

import pytest
import torch

from ess_rl import behavior, offline
from ess_rl.ess import effective_sample_size
from ess_rl.gaussian import Gaussian
from ess_rl.networks import gaussian, gaussian_init, twin_q, twin_q_init
from ess_rl.objectives import advantage_weights, expectile_loss, td3_bc_weight
from ess_rl.optim import polyak
from ess_rl.returns import return_range


def test_exponential_weights_by_hand():
    advantage = torch.tensor([0.0, 2.0 * math.log(3.0), -2.0 * math.log(4.0), 50.0], requires_grad=True)
    weight = advantage_weights(advantage, 2.0, "exponential")  # 1, 3, 1/4 and, capped, 100
    torch.testing.assert_close(weight, torch.tensor([1.0, 3.0, 0.25, 100.0]))
    assert not weight.requires_grad


def test_weights_of_bad_actions_alone_have_an_ess():
    weight = advantage_weights(torch.tensor([-200.0, -300.0]), 1.0, "exponential")
    assert (weight > 0.0).all() and effective_sample_size(torch.log(weight)).item() == 1.0


def test_softmax_weights_by_hand():
    # exp of 0, ln 2, ln 5 are 1, 2, 5, their sum 8: shares 1/8, 2/8, 5/8, three times as much.
    weight = advantage_weights(torch.tensor([0.0, math.log(2.0), math.log(5.0)]), 1.0, "softmax")
    torch.testing.assert_close(weight, torch.tensor([0.375, 0.75, 1.875]))
    moved = advantage_weights(torch.tensor([7.0, 7.0 + math.log(2.0), 7.0 + math.log(5.0)]), 1.0, "softmax")
    torch.testing.assert_close(moved, weight)  # a constant in the advantage changes nothing
    two_columns = torch.tensor([[0.0, math.log(2.0)], [math.log(5.0), -math.inf]])  # the same and a fourth, of weight 0
    of_four = torch.tensor([[0.5, 1.0], [2.5, 0.0]])
    torch.testing.assert_close(advantage_weights(two_columns, 1.0, "softmax"), of_four)


def test_expectile_loss_by_hand():
    # Errors 2 and -1: (0.7 x 4 + 0.3 x 1) / 2 = 1.55; at 0.5 half of the mean square, 2.5 / 2.
    error = torch.tensor([2.0, -1.0])
    assert expectile_loss(error, 0.7).item() == pytest.approx(1.55)
    assert expectile_loss(error, 0.5).item() == pytest.approx(1.25)


def test_the_minimum_of_the_expectile_loss_is_the_expectile():
    # Of targets 0 and 1, v minimizes 0.3 v^2 + 0.7 (1 - v)^2: v = 0.7.
    grid = torch.linspace(0.0, 1.0, 101)
    loss = torch.stack([expectile_loss(torch.tensor([0.0, 1.0]) - v, 0.7) for v in grid])
    assert grid[loss.argmin()].item() == pytest.approx(0.7)


def test_the_weight_of_td3_bc_by_hand():
    q = torch.tensor([2.0, -6.0, 4.0], requires_grad=True)  # mean |Q| is 4
    assert td3_bc_weight(q, 2.5).item() == pytest.approx(0.625)
    assert not td3_bc_weight(q, 2.5).requires_grad


def test_polyak_by_hand():
    moved = polyak({"a": torch.tensor([0.0, 4.0])}, {"a": torch.tensor([1.0, 0.0])}, 0.25)
    torch.testing.assert_close(moved["a"], torch.tensor([0.25, 3.0]))


def test_the_range_of_returns_by_hand():
    # Episodes 1 + 2 = 3, 5 and -1 + 0 + 2 = 1: from 1 to 5.
    reward = torch.tensor([1.0, 2.0, 5.0, -1.0, 0.0, 2.0])
    last = torch.tensor([False, True, True, False, False, True])
    assert return_range(reward, last).item() == 4.0
    assert return_range(torch.ones(4), torch.tensor([False, True, False, True])).item() == 0.0  # all equal
    almost = torch.tensor([0.1] * 3 + [0.1 + 1e-8, 0.1, 0.1], dtype=torch.float64)
    assert return_range(almost, torch.tensor([False, False, True] * 2)).item() == 0.0  # 3e-8 of 0.3: rounding


def test_rewards_are_scaled_to_the_range_that_is_asked_for():
    stats = {"return_range": torch.tensor(4.0)}
    assert [offline.reward_scale(stats, torch.tensor(target)).item() for target in (10.0, 0.0)] == [2.5, 1.0]
    stats = {"return_range": torch.tensor(0.0)}  # one episode, or equal ones
    assert offline.reward_scale(stats, torch.tensor(1000.0)).item() == 1.0


def test_twin_critics_differ_and_the_floor_holds():
    q = twin_q_init(torch.tensor(3), 4, 2, (8,))
    one, other = twin_q(q, torch.randn(5, 4), torch.randn(5, 2))
    assert one.shape == other.shape == (5,) and not torch.allclose(one, other)
    net = gaussian_init(torch.tensor(3), 4, 2, (8,))
    b = gaussian(net, torch.randn(5, 4), torch.tensor(0.5))  # its initial log_std is near 0
    assert b.mean.shape == (5, 2) and (b.log_std == 0.5).all()


def test_minibatches_are_functions_of_seed_and_number():
    seed = torch.tensor([3, 4])
    index = offline.minibatch_index(seed, torch.arange(7), 10, 500)
    assert index.shape == (7, 2, 500) and set(index.unique().tolist()) == set(range(10))
    assert torch.equal(offline.minibatch_index(seed, torch.arange(5, 7), 10, 500), index[5:])
    assert torch.equal(offline.minibatch_index(seed[1:], torch.arange(7), 10, 500), index[:, 1:])
    noise = offline.update_noise(seed, torch.arange(7), 400, 3)
    assert noise.shape == (7, 2, 400, 2, 3) and abs(noise.mean().item()) < 0.02 and abs(noise.std().item() - 1) < 0.02
    assert torch.equal(offline.update_noise(seed, torch.arange(4, 7), 400, 3), noise[4:])


def known_behavior(count: int = 3000) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """obs, actions of N(tanh(s), 0.3^2), ends of episodes of 30 steps"""
    generator = torch.Generator().manual_seed(0)
    obs = torch.randn(count, 1, generator=generator)
    action = torch.tanh(obs) + 0.3 * torch.randn(count, 1, generator=generator)
    return obs, action, torch.arange(count) % 30 == 29


def test_a_behavior_model_finds_the_gaussian_that_acted():
    obs, action, last = known_behavior()
    config = behavior.Config(hidden=(16,), max_updates=400, check_every=50, learning_rate=1e-2, minibatch=128)
    model = behavior.fit(obs, action, last, seeds=(0, 1), config=config)
    # The best possible: the entropy of N(., 0.3^2), 0.5 ln(2 pi e) + ln 0.3 = 0.215 nats.
    assert (model.held_out_nll - 0.215).abs().max() < 0.12
    grid = torch.linspace(-1.5, 1.5, 11)[:, None]
    b = model(grid)
    assert (b.mean - torch.tanh(grid)).abs().max() < 0.15
    assert (b.log_std - math.log(0.3)).abs().max() < 0.3
    again = behavior.fit(obs, action, last, seeds=(1,), config=config)
    torch.testing.assert_close(again.held_out_nll[0], model.held_out_nll[1], rtol=1e-3, atol=1e-3)
    held = model.held_out.view(-1, 30)
    assert held.float().mean() == pytest.approx(0.1) and (held.all(1) | ~held.any(1)).all()  # whole episodes


def test_the_model_is_the_best_that_held_out_episodes_saw():
    """At so high a rate they do not agree with what came later."""
    obs, action, last = known_behavior(600)
    config = behavior.Config(hidden=(8,), max_updates=200, check_every=10, patience=3, learning_rate=0.1, minibatch=32)
    model = behavior.fit(obs, action, last, seeds=(0, 1, 2), config=config)
    means, log_stds = model.members(obs[model.held_out])
    for k, said in enumerate(model.held_out_nll):
        found = -Gaussian(means[k], log_stds[k]).log_prob(action[model.held_out]).mean()
        torch.testing.assert_close(found, said, rtol=1e-4, atol=1e-4)


def test_the_width_of_an_ensemble_has_its_disagreement_in_it():
    """Means of -1 and 1, both with a variance of 1/4: a mixture with mean 0 and variance 1/4 + 1."""
    model = behavior.fit(
        torch.zeros(4, 1), torch.zeros(4, 1), torch.ones(4, dtype=torch.bool), seeds=(0, 1),
        config=behavior.Config(hidden=(2,), max_updates=0),
    )  # fmt: skip
    layers = model.params["net"]
    layers["1"] = {
        "weight": torch.zeros_like(layers["1"]["weight"]),
        "bias": torch.tensor([[-1.0, math.log(0.5)], [1.0, math.log(0.5)]]),
    }
    found = model(torch.zeros(3, 1))
    torch.testing.assert_close(found.mean, torch.zeros(3, 1))
    torch.testing.assert_close(found.log_std, torch.full((3, 1), 0.5 * math.log(1.25)))


def test_a_model_is_what_it_is_alone_though_others_learn_longer():
    """With a patience of one check, the first check without gain stops a model, whatever the others do."""
    obs, action, last = known_behavior(600)
    config = behavior.Config(hidden=(8,), max_updates=400, check_every=10, patience=1, learning_rate=1e-2, minibatch=32)
    seeds = tuple(range(6))
    together, alone = (
        behavior.fit(obs, action, last, seeds=seeds, config=config),
        [behavior.fit(obs, action, last, seeds=(seed,), config=config) for seed in seeds],
    )
    assert len({model.updates for model in alone}) > 1 and together.updates == max(model.updates for model in alone)
    own = torch.cat([model.held_out_nll for model in alone])
    torch.testing.assert_close(together.held_out_nll, own, rtol=1e-4, atol=1e-5)


def test_the_floor_is_counted_and_its_effect_reported():
    obs, action, last = known_behavior(600)
    config = behavior.Config(hidden=(8,), max_updates=150, check_every=50, learning_rate=1e-2, minibatch=128)
    model = behavior.fit(obs, action, last, seeds=(0, 1), config=config)
    low, high = behavior.floor_report(model, obs, action, None, (-5.0, 1.0))
    assert low["floored"] == 0.0 and high["floored"] == 1.0 and behavior.floored(model, obs, 1.0) == 1.0
    assert high["nll"] > low["nll"] + 0.5  # a Gaussian that is too wide fits worse
    assert high["ess"] > low["ess"] and high["kl"] < low["kl"]  # and two such models agree more
    assert {"ess", "kl"} <= behavior.floor_report(model, obs, action, model(obs), (-4.0,))[0].keys()
    own = behavior.floor_report(model, obs, action, model(obs, -4.0), (-4.0,))[0]
    assert own["ess"] == pytest.approx(1.0, abs=1e-5) and own["kl"] == pytest.approx(0.0, abs=1e-5)


def test_a_model_needs_two_transitions():
    with pytest.raises(ValueError, match="1 transitions"):
        behavior.fit(torch.zeros(1, 2), torch.zeros(1, 1), torch.ones(1, dtype=torch.bool))


def test_one_episode_is_judged_by_its_end():
    held = behavior.held_out_episodes(torch.arange(20) == 19, 0.1)
    assert held.tolist() == [False] * 18 + [True] * 2


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("length", [2, 20])  # ten episodes, one
def test_some_steps_are_held_out_and_some_are_not(share: float, length: int):
    held = behavior.held_out_episodes(torch.arange(20) % length == length - 1, share)
    assert held.any() and not held.all()
