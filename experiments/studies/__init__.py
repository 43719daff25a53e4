"""Questions with a prediction written before the runs. One file per study: prediction, runs, judgment, figure."""

from __future__ import annotations

from experiments.studies import (
    ablations,
    asynchrony,
    balance,
    beside_d3rlpy,
    clip_sensitivity,
    collapsing_prior,
    correction,
    divergence,
    equal_iterations,
    ess_against_age,
    family,
    few_updates,
    hints,
    interleaving,
    iteration_length,
    offline_to_online,
    precision,
    predictors,
    replay_depth,
    sample_efficiency,
    staleness,
    temperature,
)
from experiments.studies.study import Study

STUDIES: dict[str, Study] = {
    module.STUDY.name: module.STUDY
    for module in (
        clip_sensitivity,
        staleness,
        iteration_length,
        equal_iterations,
        correction,
        replay_depth,
        temperature,
        precision,
        ablations,
        ess_against_age,
        sample_efficiency,
        family,
        interleaving,
        divergence,
        balance,
        asynchrony,
        hints,
        predictors,
        collapsing_prior,
        few_updates,
        beside_d3rlpy,
        offline_to_online,
    )
}
