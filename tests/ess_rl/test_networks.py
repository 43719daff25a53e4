import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import grad_and_value, vmap
from torch.utils import _pytree as pytree

from ess_rl.contract import Precision
from ess_rl.networks import (
    in_precision,
    mlp,
    mlp_init,
    orthogonal,
    policy,
    policy_init,
    product_in_parts,
    value,
    value_init,
)


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


def one_layer(*weight: float) -> dict:
    return {"0": {"weight": torch.tensor([weight]), "bias": torch.tensor([0.1] * len(weight))}}


def test_fp8_by_hand():
    # The largest weight is 1, so all are multiplied by 448: 134.4 lies between 128 and 144, the nearest is 128.
    # The largest input is 0.5, exact as 448; 0.03 becomes 26.88, between 26 and 28: 26.
    params = in_precision(one_layer(1.0, 0.3), "fp8")
    assert params["0"]["weight"].dtype == torch.float8_e4m3fn
    out = mlp(params, torch.tensor([[0.5], [0.03]]))
    small = 0.5 * 26.0 / 448.0
    expected = torch.tensor([[0.5, 0.5 * 128.0 / 448.0], [small, small * 128.0 / 448.0]]) + 0.1
    torch.testing.assert_close(out, expected)


def test_bf16_by_hand():
    # 8 significant bits: between 1 and 2 the steps are 1/128, and 1 + 1/256 goes to the even neighbor, 1.
    params = in_precision({"0": {"weight": torch.tensor([[1.0 + 1.0 / 256.0]]), "bias": torch.zeros(1)}}, "bf16")
    out = mlp(params, torch.tensor([[2.0]]))
    assert out.dtype == torch.bfloat16 and out.item() == 2.0


def test_lower_precision_is_further_off():
    hidden = (16, 16)
    params = policy_init(torch.tensor(0), 5, 3, hidden, log_std=-0.7)
    params["mean"]["2"]["weight"] = 100.0 * params["mean"]["2"]["weight"]  # it begins near zero
    obs = 3.0 * torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    exact = policy(params, obs)
    precisions: tuple[Precision, ...] = ("fp32", "fp16", "bf16", "fp8")
    off = [(policy(in_precision(params, p), obs).mean.float() - exact.mean).abs().mean().item() for p in precisions]
    assert off[0] == 0.0
    assert 0.0 < 4.0 * off[1] < off[2] and 4.0 * off[2] < off[3] < 0.2  # 11, 8 and 4 significant bits
    assert torch.equal(policy(in_precision(params, "fp8"), obs).log_std, exact.log_std)


def test_the_scale_of_fp8_is_a_members_own():
    params = torch.func.vmap(lambda seed: mlp_init(seed, (4, 6, 2), 1.0))(torch.arange(3))
    params["0"]["weight"][1] *= 100.0

    def low(params: dict, x: torch.Tensor) -> torch.Tensor:
        return mlp(in_precision(params, "fp8"), x)

    x = torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(1))
    together = vmap(low)(params, x)
    for p in range(3):
        torch.testing.assert_close(together[p], low(pytree.tree_map(lambda y, p=p: y[p], params), x[p]))


def test_a_product_in_parts_is_the_product_and_so_is_its_gradient():
    """Under `vmap`: three members, each with weights of its own."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4096, 5, dtype=torch.float64, generator=generator)
    weight = torch.randn(3, 5, 7, dtype=torch.float64, generator=generator)

    def loss(product: Any) -> Any:
        return vmap(grad_and_value(lambda w, x: product(x, w).tanh().sum()))(weight, x)

    torch.testing.assert_close(loss(product_in_parts), loss(torch.matmul), rtol=1e-12, atol=1e-12)
