import math

import pytest
import torch
from torch import nn
from torch.func import vmap
from torch.utils import _pytree as pytree

from ess_rl.networks import mlp, mlp_init, orthogonal, policy, policy_init, value, value_init


@pytest.mark.parametrize(("rows", "columns"), [(5, 5), (8, 3), (3, 8), (1, 4), (4, 1)])
def test_orthogonal(rows: int, columns: int):
    weight = orthogonal(torch.tensor(0), rows, columns, gain=3.0)
    assert weight.shape == (rows, columns)
    gram = weight.mT @ weight if rows >= columns else weight @ weight.mT
    torch.testing.assert_close(gram, 9.0 * torch.eye(min(rows, columns)), rtol=0.0, atol=1e-5)


def test_orthogonal_prefers_no_direction():
    # An entry of a uniformly drawn 3 x 3 rotation has mean 0 and variance 1/3; 4000 seeds.
    weight = orthogonal(torch.arange(4000), 3, 3, gain=1.0)
    assert weight.mean(0).abs().max() < 5.0 * math.sqrt(1.0 / 3.0 / 4000)
    torch.testing.assert_close(weight.square().mean(0), torch.full((3, 3), 1.0 / 3.0), rtol=0.0, atol=0.025)


def test_mlp_init_gains_and_zero_biases():
    params = mlp_init(torch.tensor(0), (10, 8, 6, 2), last_gain=0.01)
    assert {i: tuple(layer["weight"].shape) for i, layer in params.items()} == {"0": (10, 8), "1": (8, 6), "2": (6, 2)}
    for i, gain in (("0", math.sqrt(2.0)), ("1", math.sqrt(2.0)), ("2", 0.01)):
        singular_values = torch.linalg.svdvals(params[i]["weight"])
        torch.testing.assert_close(singular_values, torch.full_like(singular_values, gain))
        assert not params[i]["bias"].any()


def test_mlp_equals_torch():
    params = mlp_init(torch.tensor(1), (4, 8, 3), last_gain=1.0)
    params["0"]["bias"] += 0.3
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    for layer, i in ((network[0], "0"), (network[2], "1")):
        assert isinstance(layer, nn.Linear)
        layer.weight.data, layer.bias.data = params[i]["weight"].mT, params[i]["bias"]
    x = torch.randn(5, 6, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mlp(params, x), network(x))


@pytest.mark.parametrize("leading", [(), (7,), (2, 7)])
@pytest.mark.parametrize("hidden", [(), (8,), (8, 8)])
def test_shapes(leading: tuple[int, ...], hidden: tuple[int, ...]):
    seed, obs = torch.tensor(2), torch.ones(*leading, 5)
    pi = policy(policy_init(seed, 5, 3, hidden, log_std=-0.7), obs)
    assert pi.mean.shape == pi.log_std.shape == (*leading, 3)
    assert (pi.log_std == -0.7).all()
    assert value(value_init(seed, 5, hidden), obs).shape == leading


def test_a_policy_begins_near_zero_and_layers_differ():
    params = policy_init(torch.tensor(3), 6, 2, (6, 6), log_std=0.0)
    assert policy(params, torch.randn(100, 6)).mean.abs().max() < 0.05
    assert not torch.equal(params["mean"]["0"]["weight"], params["mean"]["1"]["weight"])


def test_vmap_over_seeds_gives_the_members_alone():
    seeds, log_std = torch.tensor([4, 5, 6]), torch.tensor([-1.0, -0.5, 0.0])
    together = vmap(lambda s, x: policy_init(s, 5, 2, (8,), x))(seeds, log_std)
    obs = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
    pi = vmap(policy)(together, obs)
    for p in range(3):
        alone = policy_init(seeds[p], 5, 2, (8,), log_std[p])
        torch.testing.assert_close(pytree.tree_map(lambda x, p=p: x[p], together), alone)
        torch.testing.assert_close(pi.mean[p], policy(alone, obs[p]).mean)
    assert not torch.allclose(together["mean"]["0"]["weight"][0], together["mean"]["0"]["weight"][1])
