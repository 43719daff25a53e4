import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ess_rl.ess import advantage_weighted_ess, effective_sample_size


def logs(*ratios: float) -> torch.Tensor:
    return torch.log(torch.tensor(ratios))


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ((1.0, 1.0, 2.0), 16.0 / 18.0),  # (1 + 1 + 2)^2 / (3 (1 + 1 + 4))
        ((1.0, 3.0), 16.0 / 20.0),  # 4^2 / (2 (1 + 9))
        ((0.5, 1.0, 1.5), 9.0 / 10.5),  # 3^2 / (3 (0.25 + 1 + 2.25))
        ((1.0, 0.0), 0.5),  # a ratio of 0 counts as a sample
        ((7.0,), 1.0),
    ],
)
def test_by_hand(ratios: tuple[float, ...], expected: float):
    assert float(effective_sample_size(logs(*ratios))) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 100, 4096])
@pytest.mark.parametrize("log_ratio", [0.0, 0.3, -5.1, 1e4, -1e4])
def test_equal_ratios_give_one(n: int, log_ratio: float):
    assert effective_sample_size(torch.full((n,), log_ratio)) == 1.0


@pytest.mark.parametrize("n", [2, 3, 7, 100, 4096])
def test_one_ratio_above_all_gives_one_over_n(n: int):
    log_ratio = torch.full((n,), -300.0)
    log_ratio[n // 2] = 0.0
    assert float(effective_sample_size(log_ratio)) == pytest.approx(1.0 / n, rel=1e-6)


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_scale_does_not_matter(scale: float):
    # Multiples of 1/64 stay exact in float32 when 1e4 is added, so the answer must be the same to the last bit.
    log_ratio = torch.randint(-128, 128, (500,), generator=torch.Generator().manual_seed(0)) / 64.0
    assert torch.equal(effective_sample_size(log_ratio + scale), effective_sample_size(log_ratio))


def test_bounds_hold_in_float32():
    generator = torch.Generator().manual_seed(1)
    for n in range(1, 300):
        nearly_equal = 1e-7 * torch.randn(n, 20, generator=generator) + torch.randn(20, generator=generator)
        wild = 30.0 * torch.randn(n, 20, generator=generator)
        for log_ratio in (nearly_equal, wild):
            ess = effective_sample_size(log_ratio, dim=0)
            assert (ess <= 1.0).all()
            assert (ess >= 1.0 / torch.tensor(float(n))).all()


def test_masked_elements_do_not_count_whatever_they_hold():
    log_ratio = torch.tensor([0.0, math.nan, math.log(3.0), math.inf, 50.0])
    mask = torch.tensor([True, False, True, False, False])
    assert float(effective_sample_size(log_ratio, mask)) == pytest.approx(0.8)  # as for the ratios 1 and 3


def test_dim_takes_each_slice_on_its_own():
    log_ratio = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(2))
    mask = torch.rand(4, 5, 6, generator=torch.Generator().manual_seed(3)) < 0.7
    over_one = effective_sample_size(log_ratio, mask, dim=1)
    over_two = effective_sample_size(log_ratio, mask, dim=(0, 2))
    assert over_one.shape == (4, 6)
    assert over_two.shape == (5,)
    torch.testing.assert_close(over_one[2, 3], effective_sample_size(log_ratio[2, :, 3], mask[2, :, 3]))
    torch.testing.assert_close(over_two[1], effective_sample_size(log_ratio[:, 1], mask[:, 1]))
    assert effective_sample_size(log_ratio).shape == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype):
    """The square of 300 is beyond float16, and bfloat16 has no number between 0.984 and 0.988."""
    log_ratio = (0.1 * torch.randn(300, generator=torch.Generator().manual_seed(0))).to(dtype)
    e = effective_sample_size(log_ratio)
    assert e.dtype == torch.float32 and e.item() == effective_sample_size(log_ratio.float()).item()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_ratio_that_counts_surfaces(bad: float):
    assert effective_sample_size(torch.tensor([0.0, bad, 1.0])).isnan()


def test_nothing_that_counts_has_no_answer():
    assert effective_sample_size(torch.zeros(3), torch.zeros(3, dtype=torch.bool)).isnan()
    assert effective_sample_size(torch.full((3,), -math.inf)).isnan()


@pytest.mark.parametrize("shift", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("act_dim", [1, 3])
def test_equals_the_closed_form_of_a_shifted_gaussian(shift: float, act_dim: int):
    # Equal sigma, mean shifted by `shift` sigma in each dimension: e = exp(-Delta^2), Delta^2 = act_dim shift^2.
    z = torch.randn(400_000, act_dim, generator=torch.Generator().manual_seed(4))
    log_ratio = (shift * z - 0.5 * shift**2).sum(-1)
    assert float(effective_sample_size(log_ratio)) == pytest.approx(math.exp(-act_dim * shift**2), rel=0.02)


def test_weighted_with_the_advantage_by_hand():
    # rho |A| = 2, 1, 0: (2 + 1)^2 / (3 (4 + 1)) = 0.6; the scale of A changes nothing.
    log_ratio, advantage = logs(1.0, 1.0, 2.0), torch.tensor([2.0, -1.0, 0.0])
    assert float(advantage_weighted_ess(log_ratio, advantage)) == pytest.approx(0.6)
    assert float(advantage_weighted_ess(log_ratio, 1e6 * advantage)) == pytest.approx(0.6)
    both = advantage_weighted_ess(torch.stack([log_ratio, log_ratio]), torch.stack([advantage, torch.ones(3)]), dim=1)
    assert both.tolist() == pytest.approx([0.6, 16.0 / 18.0])  # equal advantages: the plain ESS
    assert float(advantage_weighted_ess(log_ratio, torch.zeros(3))) == pytest.approx(16.0 / 18.0)


def test_weighted_with_normal_advantages_fresh_data_have_two_over_pi():
    advantage = torch.randn(400_000, generator=torch.Generator().manual_seed(5))
    assert float(advantage_weighted_ess(torch.zeros(400_000), advantage)) == pytest.approx(2.0 / math.pi, rel=0.01)


def test_no_gradient_passes():
    log_ratio = torch.randn(5, requires_grad=True)
    assert not effective_sample_size(log_ratio).requires_grad


PROCESS = """
import os, sys, torch
from torch import distributed as dist
from ess_rl.ess import effective_sample_size

rank, path = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
log_ratio = torch.arange(8.0).sin() + 100.0
mine = log_ratio[:5] if rank == 0 else log_ratio[5:]
unmasked = torch.ones(len(mine), dtype=torch.bool)
only_first = unmasked if rank == 0 else ~unmasked
broken = mine if rank == 0 else torch.full_like(mine, torch.nan)
columns = mine[:4].view(2, 2) if rank == 0 else torch.zeros(3, 2)
print(
    float(effective_sample_size(mine)),
    float(effective_sample_size(mine, only_first)),
    float(effective_sample_size(broken)),
    *effective_sample_size(columns, dim=0).tolist(),
)
sys.stdout.flush()
os._exit(0)  # Gloo's threads, seldom and under load, abort a process that ends beside them
"""


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without Gloo")
def test_two_processes_answer_for_the_pooled_batch(tmp_path: Path):
    command = [sys.executable, "-c", PROCESS]
    root = Path(__file__).parents[2]  # where the child finds ess_rl
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "meet")], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for rank in range(2)
    ]
    outputs = [p.communicate(timeout=120) for p in processes]
    assert [p.returncode for p in processes] == [0, 0], outputs
    first, second = ([float(x) for x in out.split()] for out, _ in outputs)

    log_ratio = torch.arange(8.0).sin() + 100.0
    columns = torch.cat([log_ratio[:4].view(2, 2), torch.zeros(3, 2)])
    expected = [
        float(effective_sample_size(log_ratio)),
        float(effective_sample_size(log_ratio[:5])),
        math.nan,
        *effective_sample_size(columns, dim=0).tolist(),
    ]
    assert first == pytest.approx(expected, rel=1e-6, nan_ok=True)
    assert second == pytest.approx(first, rel=0.0, nan_ok=True)
