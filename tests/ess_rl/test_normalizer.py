from dataclasses import replace

import pytest
import torch

from ess_rl import normalizer
from ess_rl.transitions import Transitions

CPU = torch.device("cpu")


def test_update_in_pieces_equals_the_whole():
    x = 1e3 + torch.randn(100, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stats = normalizer.init((3,), CPU)
    for piece in x.split([1, 7, 42, 50]):
        stats = normalizer.update(stats, piece)
    assert stats["count"] == 400.0
    torch.testing.assert_close(stats["mean"], x.mean((0, 1)), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(stats["var"], x.var((0, 1), correction=0), rtol=1e-9, atol=0.0)


def test_statistics_of_a_whole_data_set_are_an_update_from_nothing():
    x = 1e3 + torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    for name, value in normalizer.update(normalizer.init((3,), CPU), x).items():
        assert torch.equal(normalizer.of_data(x)[name], value)


def test_a_long_count_still_moves():
    # A float32 count would stop at 2^24.
    stats = normalizer.update({**normalizer.init((1,), CPU), "count": torch.tensor(2.0**24).double()}, torch.ones(1, 1))
    assert stats["count"] == 2.0**24 + 1.0
    assert stats["mean"] > 0.0


def test_standardize():
    x = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0)) * 5.0 + 2.0
    y = normalizer.standardize(normalizer.update(normalizer.init((3,), CPU), x), x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.mean(0), torch.zeros(3), rtol=0.0, atol=1e-5)
    torch.testing.assert_close(y.std(0, correction=0), torch.ones(3), rtol=1e-5, atol=0.0)


def test_standardize_before_any_data_and_beyond_the_clip():
    stats = normalizer.init((2,), CPU)
    torch.testing.assert_close(normalizer.standardize(stats, torch.tensor([0.5, -1e6])), torch.tensor([0.5, -10.0]))


def test_a_constant_observation_is_zero():
    x = torch.full((50, 1), 3.25)
    stats = normalizer.update(normalizer.init((1,), CPU), x)
    assert not normalizer.standardize(stats, x).any()


@pytest.mark.parametrize("value", [0.0, 0.3, -7.3, 1000.1])
def test_a_constant_minibatch_is_zero(value: float):
    for size in (64, 128, 2048):  # their mean is off by rounding error, another one for each
        assert not normalizer.standardize_batch(torch.full((size,), value)).any()


def test_standardize_batch_by_hand():
    # Mean 2, std sqrt((4 + 0 + 4) / (3 - 1)) = 2. A spread that is small beside the mean still counts.
    x = torch.tensor([0.0, 2.0, 4.0])
    torch.testing.assert_close(normalizer.standardize_batch(x), torch.tensor([-1.0, 0.0, 1.0]))
    torch.testing.assert_close(normalizer.standardize_batch(4096.0 + x / 64), torch.tensor([-1.0, 0.0, 1.0]))
    assert normalizer.standardize_batch(torch.tensor([1.0, torch.nan])).isnan().all()


@pytest.mark.parametrize("discount", [0.9, torch.tensor(0.9)])
def test_return_scale_equals_a_loop_over_two_rollouts(discount: float | torch.Tensor):
    generator = torch.Generator().manual_seed(0)
    reward = torch.randn(2, 15, 4, generator=generator)
    last = torch.rand(2, 15, 4, generator=generator) < 0.2
    last[0, -1] = torch.tensor([True, False, True, False])  # at the seam, with and without an end

    scale, seen, running = normalizer.return_scale_init(4, CPU), [], torch.zeros(4, dtype=torch.float64)
    for part in range(2):
        scale = normalizer.return_scale_update(scale, reward[part], last[part], discount)
        for t in range(15):
            running = reward[part, t] + float(discount) * running
            seen.append(running)
            running = torch.where(last[part, t], 0.0, running)
        torch.testing.assert_close(scale["running"], running, rtol=1e-10, atol=1e-10)
    assert scale["count"] == 120.0
    torch.testing.assert_close(scale["mean"], torch.stack(seen).mean(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(scale["var"], torch.stack(seen).var(correction=0), rtol=1e-10, atol=0.0)


def test_scale_reward_by_hand():
    scale = {**normalizer.return_scale_init(1, CPU), "var": torch.tensor(4.0).double()}
    # 3 / 2, and 100 / 2 beyond the clip
    torch.testing.assert_close(normalizer.scale_reward(scale, torch.tensor([3.0, 100.0])), torch.tensor([1.5, 10.0]))


def test_what_a_rollout_gives_to_an_agents_state_by_hand():
    """One environment, a discount of 0.5, rewards 1 and 1: the running returns are 1 and 1.5, but 1 and 1 if the first
    step is the last of an episode, also of one that is merely cut off."""
    for truncated, mean, var in ((False, 1.25, 0.0625), (True, 1.0, 0.0)):
        rollout = replace(
            Transitions.empty((2, 1), 1, 1, CPU),
            obs=torch.tensor([[[2.0]], [[4.0]]]), next_obs=torch.tensor([[[4.0]], [[9.0]]]),
            reward=torch.ones(2, 1), terminated=torch.zeros(2, 1, dtype=torch.bool),
            truncated=torch.tensor([[truncated], [False]]),
        )  # fmt: skip
        state = {
            "hyper": {"discount": torch.tensor(0.5)},
            "obs_stats": normalizer.init((1,), CPU),
            "return_scale": normalizer.return_scale_init(1, CPU),
        }
        found = normalizer.seen(state, rollout)
        assert found["obs_stats"]["mean"].tolist() == [3.0] and found["obs_stats"]["var"].tolist() == [1.0]
        assert (float(found["return_scale"]["mean"]), float(found["return_scale"]["var"])) == (mean, var)
