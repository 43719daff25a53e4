"""Mistakes of a caller that torch would accept silently."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from agents import AGENTS, OFFLINE_AGENTS
from ess_rl import diagnostics, objectives, returns
from ess_rl.errors import UsageError
from ess_rl.ess import advantage_weighted_ess, effective_sample_size
from ess_rl.gaussian import Gaussian, kl
from ess_rl.networks import in_precision
from ess_rl.offline import OfflinePopulation
from ess_rl.population import Population

N = 4
ROW, COLUMN = torch.zeros(N), torch.zeros(N, 1)
FLAG = torch.zeros(3, N, dtype=torch.bool)
STEP = torch.zeros(3, N)
DISCOUNTS: Any = {"discount": 0.9, "lambda_": 0.9}
BALANCE: Any = {"beta": 1.0, "discount": 0.9}

# In each call all arguments are right except one, whose shape broadcasts.
BROADCASTS: dict[str, Callable[[], Any]] = {
    "p3o": lambda: objectives.p3o(ROW, COLUMN, ROW, ROW),
    "p3o, kl": lambda: objectives.p3o(ROW, ROW, ROW, COLUMN),
    "p4o": lambda: objectives.p4o(ROW, ROW, ROW, ROW, proximal_log_prob=COLUMN, proximal_kl=ROW),
    "ppo_clip": lambda: objectives.ppo_clip(ROW, ROW, COLUMN, clip=0.2),
    "ppo_decoupled": lambda: objectives.ppo_decoupled(ROW, ROW, ROW, proximal_log_prob=COLUMN, clip=0.2),
    "ppo_generalized": lambda: objectives.ppo_generalized(ROW, ROW, ROW, proximal_log_prob=COLUMN, clip=0.2),
    "ppo_variance": lambda: objectives.ppo_variance(ROW, ROW, COLUMN, coefficient=1.0),
    "ppo_band": lambda: objectives.ppo_band(ROW, COLUMN, ROW, clip=0.2),
    "ppo_kl": lambda: objectives.ppo_kl(ROW, ROW, ROW, COLUMN, kl_coef=1.0),
    "bpo": lambda: objectives.bpo(ROW, ROW, ROW, COLUMN, clip=0.2, temperature=1.0),
    "balance": lambda: objectives.subtrajectory_balance(STEP, STEP, STEP[:, :1], STEP, STEP, ~FLAG, **BALANCE),
    "vargrad": lambda: objectives.vargrad_trajectory_balance(ROW, ROW, COLUMN, beta=1.0),
    "ess": lambda: effective_sample_size(STEP, FLAG[:, :1]),
    "ess, weighted": lambda: advantage_weighted_ess(ROW, COLUMN),
    "gae": lambda: returns.gae(STEP, STEP[..., None], STEP, FLAG, FLAG, **DISCOUNTS),
    "vtrace": lambda: returns.vtrace(STEP[:, :1], STEP, STEP, STEP, FLAG, FLAG, **DISCOUNTS),
    "retrace": lambda: returns.retrace(STEP, STEP, STEP, STEP[:1], FLAG, FLAG, **DISCOUNTS),
    "divergence_ahead": lambda: returns.divergence_ahead(STEP, STEP[:, :1], FLAG, discount=0.9),
    "return_range": lambda: returns.return_range(STEP, FLAG[:, :1]),
    "affinity": lambda: diagnostics.affinity(ROW, COLUMN, 0.2),
    "share": lambda: diagnostics.share(COLUMN, ROW > 0.0),
}


@pytest.mark.parametrize("name", BROADCASTS)
def test_samples_are_not_paired_with_others(name: str):
    with pytest.raises(ValueError, match=r"shapes differ: .*\[.*\], .*\[.*\]; give all"):
        BROADCASTS[name]()


def test_an_action_has_the_dimensions_of_the_mean():
    """With one dimension [4] would pair each of four means [4, 1] with all four actions."""
    one = Gaussian(COLUMN, COLUMN)
    for function in (
        lambda: one.log_prob(ROW),
        lambda: kl(one, Gaussian(ROW, ROW)),
        lambda: objectives.expert_mass(one, ROW),
        lambda: objectives.imitation(one, ROW),
    ):
        with pytest.raises(ValueError, match=r"actions \[4\] of a Gaussian of \[4, 1\]: give \[\.\.\., act_dim\]"):
            function()


def test_a_width_has_the_dimensions_of_the_mean():
    wrong = Gaussian(COLUMN, ROW)
    for function in (lambda: wrong.log_prob(COLUMN), wrong.entropy, lambda: kl(Gaussian(COLUMN, COLUMN), wrong)):
        with pytest.raises(ValueError, match=r"log_std \[4\] of a Gaussian of \[4, 1\]: give \[act_dim\]"):
            function()


@pytest.mark.parametrize("kind", [torch.uint8, torch.int64, torch.float32])
def test_an_end_is_no_number(kind: torch.dtype):
    """~1 is -2: an int flag for the end of an episode would carry the sum on, doubled."""
    for ends in ((FLAG.to(kind), FLAG), (FLAG, FLAG.to(kind))):
        with pytest.raises(ValueError, match=rf"{kind}, not bool: give (terminated|last)\.bool\(\)"):
            returns.gae(STEP, STEP, STEP, *ends, **DISCOUNTS)
    with pytest.raises(ValueError, match=r"mask is .*, not bool"):
        effective_sample_size(ROW, torch.ones(N).to(kind))
    with pytest.raises(ValueError, match=r"last is .*, not bool"):
        returns.return_range(STEP, FLAG.to(kind))


def test_no_samples_have_no_ess():
    with pytest.raises(ValueError, match=r"log_ratio \[3, 0\]: no samples"):
        effective_sample_size(torch.zeros(3, 0))


WORDS = [
    ("ppo", {"objective": "cliped"}, "objective 'cliped': choose one of clip, decoupled"),
    ("p3o", {"behavior_kl": "closedform"}, "behavior_kl 'closedform': choose one of closed_form, reverse, k3"),
    ("p3o", {"cap": "none"}, "cap 'none': choose one of ess, ess_per_dim"),
    ("p3o", {"draw": "recent"}, "draw 'recent'"),
    ("p3o", {"rollout_precision": "float32"}, "rollout_precision 'float32': choose one of fp32"),
    ("awac", {"weights": "exponental"}, "weights 'exponental'"),
]


@pytest.mark.parametrize(("name", "changes", "message"), WORDS)
def test_a_misspelt_choice_is_no_other_choice(name: str, changes: dict[str, Any], message: str):
    entry, made = (AGENTS[name], Population) if name in AGENTS else (OFFLINE_AGENTS[name], OfflinePopulation)
    with pytest.raises(UsageError, match=message):
        made(entry.agent(replace(entry.config(), **changes), 3, 1), [0])


def test_the_same_of_functions():
    with pytest.raises(ValueError, match="choose one of exponential, softmax"):
        objectives.advantage_weights(ROW, 1.0, "exponental")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="phi is 'one' or 'mass'"):
        objectives.imitation(Gaussian(COLUMN, COLUMN), COLUMN, phi="Mass")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="choose one of fp32, bf16"):
        in_precision({"weight": COLUMN}, "fp64")  # pyright: ignore[reportArgumentType]


def test_a_population_has_members():
    with pytest.raises(UsageError, match="no seeds"):
        Population(AGENTS["p3o"].agent(AGENTS["p3o"].config(), 3, 1), [])
