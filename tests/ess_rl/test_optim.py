import pytest
import torch
from torch.utils import _pytree as pytree

from ess_rl.optim import (
    adam_init,
    adam_step,
    adam_steps,
    clip_by_global_norm,
    held_back,
    rmsprop_init,
    rmsprop_step,
)


def tree(seed: int, scale: float = 1.0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": scale * torch.randn(3, 4, generator=generator),
        "b": {"c": scale * torch.randn(5, generator=generator), "d": scale * torch.randn((), generator=generator)},
    }


def test_adam_equals_torch():
    params = tree(0)
    leaves = [leaf.clone().requires_grad_() for leaf in pytree.tree_leaves(params)]
    oracle = torch.optim.Adam(leaves, lr=1.0, eps=1e-5)
    state = adam_init(params)
    for step in range(20):
        learning_rate = 0.01 / (1 + step)
        grads = tree(step + 1, scale=10.0 ** (step % 7 - 5))  # small enough for epsilon to matter
        params, state = adam_step(params, grads, state, learning_rate)
        for leaf, gradient in zip(leaves, pytree.tree_leaves(grads), strict=True):
            leaf.grad = gradient
        oracle.param_groups[0]["lr"] = learning_rate
        oracle.step()
    assert state["step"] == 20.0
    for leaf, expected in zip(pytree.tree_leaves(params), leaves, strict=True):
        torch.testing.assert_close(leaf, expected.detach(), rtol=1e-5, atol=1e-6)


def test_networks_step_at_their_own_rates():
    params, grads = {"policy": tree(0), "value": tree(1)}, {"policy": tree(2), "value": tree(3)}
    optimizer = {name: adam_init(net) for name, net in params.items()}
    stepped, moments = adam_steps(params, grads, optimizer, {"value": 0.1, "policy": 0.0})
    torch.testing.assert_close(stepped["policy"], params["policy"], rtol=0.0, atol=0.0)
    alone = adam_step(params["value"], grads["value"], optimizer["value"], 0.1)
    torch.testing.assert_close((stepped["value"], moments["value"]), alone, rtol=0.0, atol=0.0)
    assert moments["policy"]["step"] == 1.0


def test_rmsprop_equals_torch():
    params = tree(0)
    leaves = [leaf.clone().requires_grad_() for leaf in pytree.tree_leaves(params)]
    oracle = torch.optim.RMSprop(leaves, lr=1.0, alpha=0.99, eps=1e-5)
    state = rmsprop_init(params)
    for step in range(20):
        learning_rate = 0.01 / (1 + step)
        grads = tree(step + 1, scale=10.0 ** (step % 7 - 5))
        params, state = rmsprop_step(params, grads, state, learning_rate)
        for leaf, gradient in zip(leaves, pytree.tree_leaves(grads), strict=True):
            leaf.grad = gradient
        oracle.param_groups[0]["lr"] = learning_rate
        oracle.step()
    for leaf, expected in zip(pytree.tree_leaves(params), leaves, strict=True):
        torch.testing.assert_close(leaf, expected.detach(), rtol=1e-5, atol=1e-6)


def test_adam_changes_nothing_in_place():
    params, grads = tree(0), tree(1)
    state = adam_init(params)
    before = pytree.tree_map(torch.clone, (params, grads, state))
    adam_step(params, grads, state, 0.1)
    torch.testing.assert_close((params, grads, state), before, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_clip_by_global_norm_equals_torch(scale: float):
    grads = tree(2, scale)
    leaves = [leaf.clone().requires_grad_() for leaf in pytree.tree_leaves(grads)]
    for leaf in leaves:
        leaf.grad = leaf.detach().clone()
    norm = torch.nn.utils.clip_grad_norm_(leaves, 0.5)
    clipped, mine = clip_by_global_norm(grads, torch.tensor(0.5))
    torch.testing.assert_close(mine, norm)
    for leaf, expected in zip(pytree.tree_leaves(clipped), leaves, strict=True):
        torch.testing.assert_close(leaf, expected.grad)


def test_clip_by_hand():
    # The joint norm of 3 and 4 is 5: for a norm of 1 each is divided by 5.
    clipped, norm = clip_by_global_norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}, 1.0)
    assert float(norm) == pytest.approx(5.0)
    assert [float(clipped["a"]), float(clipped["b"])] == pytest.approx([0.6, 0.8])
    zero, norm = clip_by_global_norm({"a": torch.zeros(3)}, 1.0)
    assert norm == 0.0
    assert not zero["a"].any()


@pytest.mark.parametrize(
    ("factor", "ratios", "keep_ess", "expected"),
    [
        # e = 4^2 / (2 * 10) = 0.8, and sqrt(log 0.7 / log 0.8) = 1.264
        (0.5, (1.0, 3.0), 0.7, 0.632),
        (0.9, (1.0, 3.0), 0.7, 1.0),  # never above the schedule
        # sqrt(log 0.9 / log 0.8) = 0.687
        (1.0, (1.0, 3.0), 0.9, 0.687),
        (1.0, (1.0, 3.0), 0.99, 1.0 / 1.5),  # the largest change at once
        (0.5, (2.0, 2.0), 0.9, 0.75),  # e = 1: nothing moved
        (0.5, (1.0, 3.0), 0.0, 0.75),  # no ESS to keep
        (0.012, (1.0, 3.0), 0.99, 0.01),
    ],
)
def test_held_back_by_hand(factor: float, ratios: tuple[float, float], keep_ess: float, expected: float):
    log_ratio = torch.log(torch.tensor(ratios))
    found = held_back(torch.tensor(factor), log_ratio, torch.tensor(keep_ess)).item()
    assert found == pytest.approx(expected, abs=1e-3)
