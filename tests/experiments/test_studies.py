"""Studies: what they run, that their judgments follow from the numbers, and that a quick one goes through."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents import AGENTS, OFFLINE_AGENTS
from ess_rl.errors import UsageError
from experiments import __main__, plan, records, references, statistics, suites
from experiments.peers import d3rlpy, sb3
from experiments.studies import (
    STUDIES,
    ablations,
    asynchrony,
    balance,
    beside_d3rlpy,
    clip_sensitivity,
    collapsing_prior,
    correction,
    divergence,
    ess_against_age,
    family,
    few_updates,
    interleaving,
    iteration_length,
    learning_curves,
    offline_to_online,
    precision,
    predictors,
    replay_depth,
    sample_efficiency,
    staleness,
    study,
    temperature,
)
from experiments.studies import hints as study_hints

SPREAD = np.array([-30.0, -20.0, -10.0, -5.0, 0.0, 0.0, 5.0, 10.0, 20.0, 30.0])


def clips(p3o: float, ppo: dict[float, float]) -> study.Outcome:
    rows = {("ppo", f"ppo clip {clip!r}"): SPREAD + level for clip, level in ppo.items()}
    return {("p3o", "p3o"): SPREAD + p3o, **rows}


def test_the_difference_of_two_iqms_by_hand():
    # Two of eight scores go at either end: the IQM of 1 .. 8 is 4.5, that of the same scores and 100 is 104.5.
    one, other = np.arange(1.0, 9.0), np.arange(101.0, 109.0)
    found = study.difference(one, other)
    assert found.value == -100.0
    assert -106.0 < found.low < -100.0 < found.high < -94.0
    assert str(study.Estimate(-3.2, -10.4, 4.0)) == "-3 [-10, +4]"


@pytest.mark.parametrize(
    ("p3o", "ppo", "word"),
    [
        (1000.0, {0.1: 700.0, 0.2: 990.0, 0.4: 600.0}, "supported"),
        (1000.0, {0.1: 700.0, 0.2: 990.0, 0.4: 995.0}, "undecided"),  # one clip alone is clearly worse
        (1000.0, {0.1: 700.0, 0.2: 1005.0, 0.4: 600.0}, "undecided"),  # the best clip is ahead, within the noise
        (1000.0, {0.1: 700.0, 0.2: 1100.0, 0.4: 600.0}, "refuted"),
    ],
)
def test_the_verdict_on_clip_sensitivity(p3o: float, ppo: dict[float, float], word: str):
    verdict = clip_sensitivity.judge(clips(p3o, ppo))
    assert verdict.word == word
    assert f"best clip: ppo clip {max(ppo, key=lambda clip: ppo[clip])!r}" in verdict.sentences[-1]


def lags(levels: dict[str, tuple[float, float]]) -> study.Outcome:
    """Levels at lag 0 and at lag 16."""
    outcome = {}
    for name, pair in levels.items():
        for lag, level in zip((0, 16), pair, strict=True):
            outcome[f"{name.split()[0]} lag {lag}", name] = SPREAD + level
    return outcome


@pytest.mark.parametrize(
    ("levels", "word"),
    [
        ({"p3o": (1000, 900), "ppo clip 0.1": (800, 890), "ppo clip 0.4": (1000, 500)}, "supported"),
        ({"p3o": (1000, 900), "ppo clip 0.1": (990, 890), "ppo clip 0.4": (1000, 500)}, "undecided"),  # 0.1 keeps up
        ({"p3o": (1000, 900), "ppo clip 0.1": (800, 890), "ppo clip 0.4": (1000, 800)}, "undecided"),  # nobody loses
        ({"p3o": (1000, 700), "ppo clip 0.1": (800, 890), "ppo clip 0.4": (1000, 500)}, "refuted"),
    ],
)
def test_the_verdict_on_staleness(levels: dict[str, tuple[float, float]], word: str):
    verdict = staleness.judge(lags(levels))
    assert verdict.word == word
    assert any(s.startswith("p3o keeps ") for s in verdict.sentences)


def test_what_seems_clear_once_need_not_in_many_comparisons():
    """One difference of some 2.5 standard errors is clear alone, and not as the largest of eighteen."""
    x = np.random.default_rng(2).normal(size=10)
    one, other = x + 1.35, x[::-1].copy()
    alone, among = study.difference(one, other), study.difference(one, other, comparisons=18)
    assert among.value == alone.value and among.low < 0.0 < alone.low < alone.high < among.high
    levels = {"p3o": (1000.0, 900.0), "ppo clip 0.4": (900.0, 500.0)} | {
        f"ppo clip 0.{i}": (800.0, 500.0) for i in (1, 2)
    }
    outcome = {key: finals - SPREAD + 10.0 * x for key, finals in lags(levels).items()}
    outcome["ppo lag 0", "ppo clip 0.4"] = 1000.0 + 10.0 * (x + 1.15)  # 12 [2, 21] alone, [-2, 25] of six
    assert staleness.judge(outcome).word != "refuted"


def test_what_is_kept_by_hand():
    # IQMs of 45 and 90 (of 10 .. 80 and of 20 .. 160, two of eight left out at either end): a half.
    one = np.arange(10.0, 81.0, 10.0)
    found = study.kept(one, 2.0 * one)
    assert found.value == 50.0
    assert 10.0 < found.low < 50.0 < found.high < 200.0


def corrections(**levels: float) -> study.Outcome:
    """On two tasks, and none at 1000 on both; the second task has all at 1000."""
    rows = {label: levels.get(label, 1000.0) for label in ("fresh", *correction.CORRECTIONS)}
    first = {(f"A-v0 {label}", "p3o"): SPREAD + level for label, level in rows.items()}
    return first | {(f"B-v0 {label}", "p3o"): SPREAD + 1000.0 for label in rows}


@pytest.mark.parametrize(
    ("levels", "word"),
    [
        ({"vtrace": 800.0}, "supported"),
        ({"vtrace": 998.0}, "undecided"),
        ({"vtrace": 800.0, "retrace": 1100.0}, "refuted"),
        ({"ess": 1100.0}, "refuted"),
    ],
)
def test_the_verdict_on_correction(levels: dict[str, float], word: str):
    assert correction.judge(corrections(**levels)).word == word


def depths(**with_old_data: float) -> study.Outcome:
    """All at 1000 with fresh data alone."""
    names = {"p3o": "p3o", "narrow": "ppo clip 0.2", "wide": "ppo clip 0.6"}
    fresh = {("replay 0", name): SPREAD + 1000.0 for name in names.values()}
    return fresh | {("replay 12", names[key]): SPREAD + level for key, level in with_old_data.items()}


@pytest.mark.parametrize(
    ("levels", "word"),
    [
        ({"p3o": 900.0, "narrow": 300.0, "wide": 600.0}, "supported"),
        ({"p3o": 900.0, "narrow": 300.0, "wide": 700.0}, "undecided"),
        ({"p3o": 900.0, "narrow": 300.0, "wide": 800.0}, "refuted"),
        ({"p3o": 700.0, "narrow": 300.0, "wide": 600.0}, "refuted"),
        ({"p3o": 800.0, "narrow": 300.0, "wide": 600.0}, "undecided"),  # of 80 %, its interval has both sides
    ],
)
def test_the_verdict_on_replay_depth(levels: dict[str, float], word: str):
    verdict = replay_depth.judge(depths(**levels))
    assert verdict.word == word
    assert verdict.sentences[-1] == "best clip with old data: ppo clip 0.6"


def temperatures(p3o: dict[float, float]) -> study.Outcome:
    levels = {t: p3o.get(t, 1000.0) for t in temperature.TEMPERATURES}
    rows = {("p3o", f"p3o behavior_temperature {t!r}"): SPREAD + level for t, level in levels.items()}
    ppo = {("ppo", f"ppo behavior_temperature {t!r} clip {clip!r}"): SPREAD + 900.0 + 100.0 * clip
           for t in levels for clip in temperature.CLIPS}  # fmt: skip
    return rows | ppo


@pytest.mark.parametrize(
    ("p3o", "word"),
    [
        ({0.6: 300.0, 0.8: 900.0}, "supported"),
        ({0.6: 700.0}, "undecided"),
        ({0.6: 900.0}, "refuted"),  # it does not fail where it must
        ({0.6: 300.0, 1.2: 500.0}, "refuted"),
        ({0.6: 300.0, 0.8: 500.0}, "refuted"),
        ({0.6: 300.0, 0.8: 800.0}, "undecided"),  # of 80 %, its interval has both sides
    ],
)
def test_the_verdict_on_temperature(p3o: dict[float, float], word: str):
    verdict = temperature.judge(temperatures(p3o))
    assert verdict.word == word
    assert "T = 1.5: P3O less the best clip (ppo clip 0.6): +40 [" in verdict.sentences[-1]


def precisions(fp8: float, clip: float = 800.0) -> study.Outcome:
    outcome = {}
    for name in precision.PRECISIONS:
        outcome[name, "p3o"] = SPREAD + (fp8 if name == "fp8" else 1000.0)
        outcome[name, "ppo clip 0.1"] = SPREAD + clip
        outcome[name, "ppo clip 0.2"] = SPREAD + 100.0
    return outcome


@pytest.mark.parametrize(
    ("fp8", "clip", "word"),
    [(900.0, 800.0, "supported"), (800.0, 700.0, "undecided"), (500.0, 400.0, "refuted"), (900.0, 1100.0, "refuted")],
)
def test_the_verdict_on_precision(fp8: float, clip: float, word: str):
    assert precision.judge(precisions(fp8, clip)).word == word


def parts_of_p3o(**levels: float) -> study.Outcome:
    found = {label: levels.get(label.replace(" ", "_"), 1000.0) for label in ablations.VARIANTS}
    return {(label, "p3o"): SPREAD + level for label, level in found.items()}


@pytest.mark.parametrize(
    ("levels", "word"),
    [
        ({"cap_alone": 700.0, "KL_k3": 600.0}, "supported"),
        ({"cap_alone": 700.0}, "undecided"),
        ({"cap_alone": 700.0, "KL_k3": 600.0, "cap_1": 1200.0}, "refuted"),
    ],
)
def test_the_verdict_on_ablations(levels: dict[str, float], word: str):
    assert ablations.judge(parts_of_p3o(**levels)).word == word


def ages(*levels: float) -> study.Outcome:
    return {("p3o", "p3o"): 1e-4 * SPREAD[:, None] + np.array(levels)}


@pytest.mark.parametrize(
    ("levels", "word"),
    [((1.0, 0.8, 0.5), "supported"), ((1.0, 0.8, 0.8), "undecided"), ((1.0, 0.5, 0.8), "refuted")],
)
def test_the_verdict_on_ess_against_age(levels: tuple[float, ...], word: str):
    assert ess_against_age.judge(ages(*levels)).word == word


def after_less(*levels: float) -> study.Outcome:
    """On task k P3O with replay ends at `levels[k]`, with fresh data alone at 80; PPO at 100."""
    outcome = {}
    for number, level in enumerate(levels):
        of_arm = {"replay": level, "fresh": 80.0, "ppo": 100.0}
        outcome |= {(f"{number} {arm}", "label"): 0.1 * SPREAD + end for arm, end in of_arm.items()}
    return outcome


@pytest.mark.parametrize(
    ("levels", "word"),
    [
        ((120.0, 101.0, 50.0, 60.0), "supported"),
        ((120.0, 99.5, 50.0, 60.0), "undecided"),  # the second is within the noise
        ((120.0, 50.0, 50.0, 60.0), "refuted"),
    ],
)
def test_the_verdict_on_sample_efficiency(levels: tuple[float, ...], word: str):
    verdict = sample_efficiency.judge(after_less(*levels))
    assert verdict.word == word
    assert any(line.startswith("0: with replay less fresh data alone: +40 [+3") for line in verdict.sentences)


def test_when_a_curve_reaches_the_end_of_another():
    """PPO's curve ends at 100; six of ten seeds of the other are there from the first point on, four never."""
    ppo = 0.1 * SPREAD[:, None] + np.linspace(10.0, 100.0, 10)
    third = 0.1 * SPREAD[:, None] + np.where(np.arange(10) < 2, 50.0, 150.0)
    assert learning_curves.reached(third, ppo) == study.Estimate(30.0, 30.0, 30.0)
    assert learning_curves.reached(0.0 * third, ppo) == study.Estimate(np.inf, np.inf, np.inf)
    split = np.where(np.arange(10)[:, None] < 6, 150.0, 50.0) * np.ones(10)
    found = learning_curves.reached(split, ppo)
    assert found.low == 10.0 and found.high == np.inf


def methods(**at_the_longest_lag: float) -> study.Outcome:
    """Half way to the reference on each task for all, or at lag 16 what is said."""
    outcome = {}
    for env in family.TASKS:
        known = references.REFERENCES[env]
        for lag in family.LAGS:
            for name in family.METHODS:
                share = at_the_longest_lag.get(name, 0.5) if lag == 16 else 0.5
                assert known.reference is not None
                level = known.random + share * (known.reference - known.random)
                outcome[f"{env} {name} lag {lag}", "label"] = SPREAD + level
    return outcome


@pytest.mark.parametrize(
    ("levels", "word"),
    [
        ({"PPO": 0.3, "band": 0.2}, "supported"),
        ({"PPO": 0.3}, "undecided"),
        ({"band": 0.3, "KL": 0.3}, "undecided"),
        ({"PPO": 0.3, "band": 0.2, "P4O": 0.7}, "refuted"),
        ({"PPO": 0.3, "band": 0.2, family.PAPER: 0.7}, "supported"),
    ],
)
def test_the_verdict_on_the_family(
    levels: dict[str, float], word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    some = ("P3O", family.PAPER, "PPO", "band", "KL", "P4O")  # the more comparisons, the more resamples
    monkeypatch.setattr(family, "METHODS", {name: family.METHODS[name] for name in some})
    outcome = methods(**levels)
    verdict = family.judge(outcome)
    assert verdict.word == word
    assert "lag 0: P3O's normalized IQM is 0.50" in verdict.sentences
    assert "| P3O | 0.50 [0.50, 0.50] | 0.50 [0.50, 0.50] | 0.50 [0.50, 0.50] |" in family.levels(outcome)
    family.draw(outcome, tmp_path / "study.png")
    assert (tmp_path / "study.png").stat().st_size > 1000


def normalized_outcome(levels: dict[str, float]) -> study.Outcome:
    """Labels of Pendulum-v1 jobs -> returns at these normalized levels, with little spread."""
    known = references.REFERENCES["Pendulum-v1"]
    assert known.reference is not None
    scale = known.reference - known.random
    return {(name, name): known.random + scale * (level + SPREAD / 10_000) for name, level in levels.items()}


@pytest.mark.parametrize(
    ("tba", "uncorrected", "word"),
    [
        (0.99, 0.7, "supported"),
        (0.99, 0.9, "refuted"),  # what takes old data for fresh loses little
        (0.9, 0.7, "refuted"),
        (0.95, 0.7, "undecided"),
    ],
)
def test_the_verdict_on_balance(tba: float, uncorrected: float, word: str):
    levels = {"TBA lag 1": 1.0, "P3O lag 1": 1.0, "uncorrected lag 1": 1.0}
    levels |= {"TBA lag 16": tba, "P3O lag 16": 0.9, "uncorrected lag 16": uncorrected}
    verdict = balance.judge(normalized_outcome(levels))
    assert verdict.word == word
    assert "P3O: 1.00 at lag 1, 0.90 at lag 16; keeps 90 [90, 90] %" in verdict.sentences


def test_a_share_of_nothing_decides_nothing():
    levels = {"TBA lag 1": 1.0, "uncorrected lag 1": -0.2, "TBA lag 16": 0.99, "uncorrected lag 16": -0.3}
    verdict = balance.judge(normalized_outcome(levels))
    assert verdict.word == "undecided"
    assert "uncorrected: -0.20 at lag 1, -0.30 at lag 16; has nothing to keep" in verdict.sentences


def divergences(**reused: float) -> study.Outcome:
    """All at half of the way on both tasks, but what is said of replayed data."""
    outcome = {}
    for env in divergence.TASKS:
        known = references.REFERENCES[env]
        assert known.reference is not None
        for replay in divergence.REPLAYS:
            for name in divergence.METHODS:
                share = reused.get(name.replace(" ", "_").replace("-", "_"), 0.5) if replay else 0.5
                level = known.random + (known.reference - known.random) * (share + SPREAD / 10_000)
                outcome[f"{env} {name} replay {replay}", "label"] = level
    return outcome


@pytest.mark.parametrize(
    ("levels", "word"),
    [
        ({"multi_step": 0.7, "one_step": 0.6}, "supported"),
        ({"multi_step": 0.7, "one_step": 0.5}, "undecided"),  # the one-step form gains nothing
        ({"multi_step": 0.6, "one_step": 0.6}, "refuted"),
    ],
)
def test_the_verdict_on_divergence(levels: dict[str, float], word: str):
    outcome = divergences(**levels)
    verdict = divergence.judge(outcome)
    assert verdict.word == word
    if word == "supported":  # not where one of them is apart from the others on fresh data
        apart = {key: 0.9 * finals if "one step replay 0" in key[0] else finals for key, finals in outcome.items()}
        assert divergence.judge(apart).word == "undecided"
    assert "replay 0: multi-step less PPO, in hundredths: +0 [-0, +0]" in verdict.sentences


def collected(**when: tuple[float, float]) -> study.Outcome:
    """Synchronous curves end at 100; the others pass that after a share of their steps, which take a share of the time.

    The share of the time is the middle one of three rounds.
    """
    rising, outcome = 0.1 * SPREAD[:, None] + np.linspace(10.0, 100.0, 10), {}
    for env in asynchrony.TASKS:
        for agent in asynchrony.METHODS:
            share, pace = when.get(agent, (1.0, 0.8))
            there = 0.1 * SPREAD[:, None] + np.where(np.arange(1, 11) < 10.0 * share, 50.0, 150.0)
            outcome[f"{env} {agent} synchronous", agent] = np.broadcast_to(rising, (10, 10))
            outcome[f"{env} {agent} asynchronous", agent] = there
            outcome[f"{env} {agent} pace", ""] = np.array([pace, 0.1, 3.0])
    return outcome


@pytest.mark.parametrize(
    ("when", "word"),
    [
        ({"ppo": (2.0, 0.8)}, "supported"),  # one never gets there
        ({"ppo": (2.0, 0.8), "tba": (1.0, 1.0)}, "refuted"),  # and one is there at the same time, which is not less
        ({"ppo": (0.4, 2.6), "tba": (1.0, 1.2)}, "refuted"),
        ({"ppo": (0.4, 2.4), "p3o": (0.9, 1.0)}, "supported"),
    ],
)
def test_the_verdict_on_asynchrony(when: dict[str, tuple[float, float]], word: str):
    verdict = asynchrony.judge(collected(**when))
    assert verdict.word == word
    share, pace = when["ppo"]
    ends = "inf [inf, inf]" if share > 1.0 else f"{100 * share * pace:.0f} [{100 * share * pace:.0f}, "
    middle = f"HalfCheetah-v5, ppo: an iteration takes {100 * pace:.0f} (10 to 300) % of the synchronous one's time"
    assert any(one.startswith(middle) and f"after {ends}" in one for one in verdict.sentences)


def interleavings(end_of_fixed: float, tasks_early: int) -> study.Outcome:
    """A2C ends at 100; P3O is there at once or at the end."""
    outcome = {}
    rise = np.linspace(10.0, 100.0, 10)
    for number, env in enumerate(interleaving.TASKS):
        early = number < tasks_early
        for name in interleaving.METHODS:
            end = end_of_fixed if name == "fixed" else 100.0
            shape = np.full(10, 100.0) if name == "P3O 2019" and early else rise * end / 100.0
            outcome[f"{env} {name}", "label"] = np.broadcast_to(shape, (10, 10))
    return outcome


@pytest.mark.parametrize(
    ("fixed", "early", "word"),
    [(60.0, 2, "supported"), (100.0, 2, "undecided"), (60.0, 1, "refuted"), (140.0, 3, "refuted")],
)
def test_the_verdict_on_interleaving(fixed: float, early: int, word: str):
    verdict = interleaving.judge(interleavings(fixed, early))
    assert verdict.word == word
    assert "HalfCheetah-v5: A2C's end is reached at 10 [10, 10] % of the steps" in verdict.sentences


def hinted(hints: float, by_affinity: float, plain: float) -> study.Outcome:
    """Shares of episodes that reach the goal, alike for all seeds but one."""
    level = {"PPO": plain, "P3O": plain, "PPO with hints": hints}
    return {
        (f"{env} {name}", "label"): np.array([0.0] + [level.get(name, by_affinity)] * 19)
        for env in study_hints.TASKS
        for name in study_hints.METHODS
    }


@pytest.mark.parametrize(
    ("levels", "word"),
    [
        ((1.0, 1.0, 0.3), "supported"),
        ((0.82, 0.9, 0.3), "undecided"),  # one seed of twenty without success: 0.78 with hints
        ((1.0, 0.5, 0.3), "refuted"),
        ((1.0, 1.0, 1.0), "refuted"),  # nobody needs a hint
    ],
)
def test_the_verdict_on_hints(levels: tuple[float, float, float], word: str):
    outcome = hinted(*levels)
    verdict = study_hints.judge(outcome)
    assert verdict.word == word
    if word == "supported":  # also where PPO alone reaches one of the two goals
        one = {key: np.ones(20) if key[0] == f"{study_hints.TASKS[0]} PPO" else of for key, of in outcome.items()}
        assert study_hints.judge(one).word == "supported"
    assert any(s.startswith("ess/TwoLinkArmSparse-v0, PPO: ") for s in verdict.sentences)


def foretold(ess: float, affinity: float, kl: float, spread: float = 0.01) -> study.Outcome:
    """Rank correlations of ten seeds in two jobs, of opposite signs in these."""
    noise = spread * np.linspace(-1.0, 1.0, 10)
    rho = np.stack([level + noise for level in (ess, 0.0, affinity, kl)], axis=1)
    return {("P3O lag 1", "p3o"): rho, ("PPO lag 4", "ppo"): -rho}


@pytest.mark.parametrize(
    ("rho", "word"),
    [
        (foretold(0.3, 0.1, -0.2), "supported"),  # a KL that falls with the gain foretells as well as one that rises
        (foretold(0.1, -0.3, 0.2), "supported"),
        (foretold(0.3, 0.1, 0.27), "refuted"),
        (foretold(0.2, 0.2, -0.4), "refuted"),
        (foretold(0.3, 0.1, 0.2, spread=2.0), "undecided"),
        (foretold(0.0, 0.0, 0.0), "undecided"),  # nothing foretells anything
    ],
)
def test_the_verdict_on_predictors(rho: study.Outcome, word: str):
    assert predictors.judge(rho).word == word


@pytest.mark.parametrize("lag", [1, 3])
def test_predictors_are_held_against_the_gain_that_follows(tmp_path: Path, lag: int):
    """Two members: updates of iteration i first act in iteration i + 1 + lag. Each column foretells in its own way."""
    config = {"format": records.FORMAT, **dict.fromkeys(records.REQUIRED, ""), "seeds": [0, 1], "sweep": {}}
    records.write_json(tmp_path / "config.json", {**config, "config": {"lag": lag}})
    gains = np.random.default_rng(0).normal(size=40)  # from each of iterations 1 ... 40 to the next
    returns = np.cumsum([10.0, *gains])
    other = np.random.default_rng(1).normal(size=41)  # of nothing
    with open(tmp_path / "metrics.jsonl", "w") as log:
        for i, value in enumerate(returns):
            row: dict[str, object] = {"episodes": [2, 1], "return_sum": [2.0 * value, -value]}
            if i > 0:
                gained = gains[i + lag] if i + lag < len(gains) else 0.0
                values = (gained, -gained, np.exp(gained), other[i])
                row |= {name: [x, x] for name, x in zip(predictors.PREDICTORS, values, strict=True)}
            records.append_line(log, {"iteration": i + 1, **row})
    one, two = predictors.correlations(tmp_path, [0, 1])
    np.testing.assert_allclose(one[:3], [1.0, -1.0, 1.0])
    np.testing.assert_allclose(two, -one)
    assert abs(one[3]) < 0.5


def test_a_trend_that_all_share_foretells_nothing():
    n = np.arange(500.0)
    noise = np.random.default_rng(0).normal(size=(2, 500))
    x, y = n + 30.0 * noise[0], -n + 30.0 * noise[1]
    assert statistics.rank_correlation(x, y) < -0.9
    assert abs(predictors._given(x, y, n)) < 0.1
    assert predictors._given(n, y, n) == 0.0  # which is the number itself: nothing is left
    ranks = {"x": [1, 2, 3, 4, 5], "y": [2, 1, 3, 5, 4], "z": [1, 3, 2, 5, 4]}
    x, y, z = (np.array(v, dtype=np.float64) for v in ranks.values())
    xy, xz, yz = 0.8, 0.8, 0.7  # 1 - 6 sum d^2 / (5 * 24): 4, 4 and 6 are the sums
    assert predictors._given(x, y, z) == pytest.approx((xy - xz * yz) / ((1 - xz**2) * (1 - yz**2)) ** 0.5)


def priors(slope: float = -2.0, **at_the_smallest: float) -> study.Outcome:
    """All at -200 at the largest sigma_0; at the smallest the network at -800, the others as before, or as is said."""
    outcome: dict[tuple[str, str], study.Finals] = {("no prior", "p3o_prior"): SPREAD - 250.0}
    for arm in collapsing_prior.ARMS:
        end = at_the_smallest.get(arm.split(",")[-1].split()[0], -800.0 if arm == "network" else -200.0)
        for sigma, level in ((1.0, -200.0), (0.01, end)):
            outcome[arm, f"p3o_prior prior_std {sigma!r}"] = SPREAD + level
    sigmas, scale = np.array(collapsing_prior.SIGMAS), np.linspace(1.0, 3.0, 10)[:, None]
    norms = {label: scale * sigmas ** (slope if flat else 0.0) for label, flat in collapsing_prior.SLOPES.items()}
    norms[collapsing_prior.FLOORED] = scale * np.maximum(sigmas, collapsing_prior.FLOOR) ** slope
    return outcome | {(collapsing_prior.GRADIENT, label): x for label, x in norms.items()}


@pytest.mark.parametrize(
    ("levels", "word", "why"),
    [
        ({}, "supported", "against the prediction: nothing; open: nothing"),
        ({"slope": -1.5}, "refuted", "the slope of KL(pi || b), the slope of P3O"),
        ({"network": -195.0}, "undecided", "open: one network, ensemble over the network"),
        ({"network": -100.0}, "refuted", "one network, which does not fail, ensemble below the network"),
        ({"Gaussian": -700.0}, "refuted", "Gaussian process, which fails; open: nothing"),
        ({"reverse": -700.0}, "refuted", "network, reverse KL, which fails; open: nothing"),
        ({"ensemble": -800.0}, "refuted", "ensemble, which fails; open: ensemble over the network"),
    ],
)
def test_the_verdict_on_collapsing_priors(levels: dict[str, float], word: str, why: str):
    verdict = collapsing_prior.judge(priors(**levels))
    assert verdict.word == word and why in verdict.sentences[-1]
    assert "gradient of KL(b || pi): slope +0.00 [+0.00, +0.00], predicted +0" in verdict.sentences
    # From sigma_0 = 1 to a floor of 0.1: 10^2, or 10^1.5.
    expected = 32 if "slope" in levels else 100
    assert any(s.endswith(f"sigma_0 at least 0.1: at 0.01 {expected} times that at 1") for s in verdict.sentences)


def test_the_gradient_of_a_kl_by_its_law():
    """Two networks are as far apart whatever sigma_0 is; the least of them has the law to itself.

    From 0.03 to 0.01 the gradient of KL(pi || b) grows 9 times, that of KL(b || pi), whose variance and distance are
    those of the means by then, stays.
    """
    norms = {label: x for (_, label), x in collapsing_prior.gradients(quick=True).items()}
    last = {label: x[:, -1] / x[:, -2] for label, x in norms.items()}
    np.testing.assert_allclose(last["KL(pi || b)"], 9.0, rtol=0.01)
    np.testing.assert_allclose(last["KL(b || pi)"], 1.0, rtol=0.01)
    np.testing.assert_allclose(last["P3O"], 9.0, rtol=0.1)
    assert (last[collapsing_prior.FLOORED] == 1.0).all()
    np.testing.assert_allclose(collapsing_prior.slopes(np.array(collapsing_prior.SIGMAS)[None] ** -1.3), -1.3)


def onward(*tasks: tuple[int, float]) -> study.Outcome:
    """On each task the data's return is 50 and scratch ends at 100.

    Old replay passes that at the given one of 20 points, having fallen to the given return on the way.
    """
    outcome: dict[tuple[str, str], study.Finals] = {}
    for number, (point, low) in enumerate(tasks):
        env = f"T{number}"
        old = np.concatenate([[10.0, 60.0, low], np.full(17, 80.0)])
        old[point - 1 :] = 120.0 if point else old[-1]
        arms = {"scratch": np.linspace(5.0, 100.0, 20), "old replay": old, "imitation": np.full(20, 60.0)}
        for label, of in arms.items():
            name = f"{env} {label}" if len(tasks) > 1 else label
            outcome[name, "p3o"] = 0.01 * SPREAD[:, None] + of
        outcome[env, offline_to_online.DATA] = np.array([[50.0]])
    return outcome


@pytest.mark.parametrize(
    ("tasks", "word", "why"),
    [
        (((8, 70.0), (9, 48.0)), "supported", "against the prediction: nothing"),
        (((8, 70.0),), "supported", "against the prediction: nothing"),
        (((8, 70.0), (12, 70.0)), "refuted", "T1: too late"),
        (((8, 70.0), (9, 30.0)), "refuted", "T1: falls too far"),
        (((8, 70.0), (9, 45.0)), "undecided", "open: T1: how far it falls"),
    ],
)
def test_the_verdict_on_offline_to_online(tasks: tuple[tuple[int, float], ...], word: str, why: str, tmp_path: Path):
    outcome = onward(*tasks)
    verdict = offline_to_online.judge(outcome)
    assert verdict.word == word and why in verdict.sentences[-1]
    found = verdict.sentences[0]
    assert found.startswith("T0, old replay: the end of scratch at 40 [40, 40] % of the steps; 10 of 10 seeds reach")
    assert "T0, imitation: the end of scratch at inf [inf, inf] %" in verdict.sentences[1]
    offline_to_online.draw(outcome, tmp_path / "study.png")
    assert (tmp_path / "study.png").stat().st_size > 5_000


def test_how_far_a_seed_falls_counts_from_where_it_reached_the_data():
    """Data of -200: from -150 to -260 is 30 % of them below; a seed that never gets there has no fall."""
    curves = np.array([[np.nan, -900.0, -150.0, -260.0, -100.0], [np.nan, -900.0, -800.0, -700.0, -201.0]])
    falls = offline_to_online.lowest(curves, -200.0)
    assert falls[0] == pytest.approx(-30.0) and np.isnan(falls[1])


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("quick", [True, False])
def test_jobs_have_folders_of_their_own(name: str, quick: bool):
    jobs = STUDIES[name].jobs(quick)
    assert len({job.name for job in jobs}) == len(jobs)
    assert all(len(job.seeds) >= 10 for job in jobs) or quick
    assert len({tuple(job.seeds) for job in jobs}) == 1  # equal terms for all
    assert len({job.steps for job in jobs}) == 1 or name == "sample-efficiency"  # whose question unequal ones are
    of_task = [sorted(job.label for job in jobs if job.env == env) for env in {job.env for job in jobs}]
    assert all(labels == of_task[0] for labels in of_task)


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("quick", [True, False])
def test_the_numbers_of_every_job_are_such_as_a_run_takes(name: str, quick: bool):
    known: dict[str, Any] = {**AGENTS, **OFFLINE_AGENTS, **sb3.PEERS, **d3rlpy.PEERS}
    for job in STUDIES[name].jobs(quick):
        plan.check_numbers(known[job.agent].config(**job.settings), job.sweep)


def test_a_quick_study_goes_through(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "study"
    assert study.carry_out(STUDIES["clip-sensitivity"], out, jobs=2, quick=True) == []
    record = records.read_json(out / "study.json")
    assert record["quick"] and record["prediction"] == STUDIES["clip-sensitivity"].prediction
    assert record["verdict"]["word"] in ("supported", "refuted", "undecided")
    assert list(record["scores"]) == [
        "p3o | p3o",
        *(f"ppo | ppo clip {clip!r}" for clip in clip_sensitivity.CLIPS[::2]),
    ]
    assert all(len(one["final_return"]) == 2 for one in record["scores"].values())
    assert (out / "study.png").stat().st_size > 10_000
    said = capsys.readouterr().out
    assert "prediction: P3O's IQM is not below" in said and "(a quick study: this says nothing)" in said
    before = (out / "p3o-Pendulum-v1" / "result.json").stat().st_mtime_ns
    assert study.carry_out(STUDIES["clip-sensitivity"], out, quick=True) == []  # nothing is trained again
    runs = ["p3o-Pendulum-v1", "ppo-Pendulum-v1"]
    assert study.publish(out, tmp_path / "published") == ["study.json", "study.png", *runs]
    assert records.read_json(tmp_path / "published" / "study.json") == records.read_json(out / "study.json")
    assert all((tmp_path / "published" / run / "curves.csv").exists() for run in runs)
    with pytest.raises(UsageError, match="lies in the run folder"):
        study.publish(out, out / runs[0])
    for name, change in (("study.json", {"question": "another"}), (f"{runs[1]}/config.json", {"episodes": 7})):
        records.write_json(out / name, records.read_json(out / name) | change)
    with pytest.raises(UsageError, match="ppo-Pendulum-v1 holds another run, of episodes 2, not 7"):
        study.publish(out, tmp_path / "published")
    published = records.read_json(tmp_path / "published" / "study.json")
    assert published["question"] != "another"  # nothing was replaced
    assert (out / "p3o-Pendulum-v1" / "result.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("own", "short", "word"),
    [
        ((900, 600, 300), (900, 750, 605, 300), "supported"),
        ((900, 600, 595), (900, 605, 605, 600), "undecided"),  # no lag at which it is ahead
        ((900, 600, 300), (900, 750, 750, 300), "refuted"),  # equally old data, and yet ahead
        ((900, 600, 300), (700, 750, 605, 300), "refuted"),  # behind on fresh data
    ],
)
def test_the_verdict_on_iteration_length(own: tuple[int, ...], short: tuple[int, ...], word: str, tmp_path: Path):
    levels = {"p3o": zip((0, 1, 2), own, strict=True), "p3o short": zip((0, 1, 2, 4), short, strict=True)}
    outcome = {(f"{name} lag {lag}", ""): SPREAD + x for name, pairs in levels.items() for lag, x in pairs}
    verdict = iteration_length.judge(outcome)
    assert verdict.word == word
    assert len([s for s in verdict.sentences if "equally old" in s]) == 2
    iteration_length.draw(outcome, tmp_path / "study.png")


def offline(**levels: float) -> study.Outcome:
    """On both tasks: 1000 if nothing else is said."""
    return {
        (f"{env} {agent}", agent): SPREAD + levels.get(agent, 1000.0)
        for env, _ in suites.SMALL_SETS.values()
        for agent in few_updates.AGENTS
    }


@pytest.mark.parametrize(
    ("levels", "word"),
    [
        ({"p3o_offline": 1100.0, "awr": 1100.0}, "supported"),
        ({"p3o_offline": 1100.0, "bc": 1090.0}, "undecided"),
        ({"p3o_offline": 1100.0, "awr": 1200.0}, "refuted"),
        ({"p3o_offline": 1100.0, "iql": 1200.0}, "refuted"),
    ],
)
def test_the_verdict_on_few_updates(levels: dict[str, float], word: str):
    verdict = few_updates.judge(offline(**levels))
    assert verdict.word == word
    assert any(s.startswith("Hopper-v5 p3o_offline less awr: ") for s in verdict.sentences)


def beside_d3rlpy_outcome(**apart: float) -> study.Outcome:
    """On both tasks d3rlpy's agents at 1000, and ours so far from them."""
    return {
        (f"{env} {name}", name): SPREAD + 1000.0 + shift
        for env, _ in suites.SMALL_SETS.values()
        for agent in beside_d3rlpy.AGENTS
        for name, shift in ((agent, apart.get(agent, 0.0)), (f"d3rlpy-{agent}", 0.0))
    }


@pytest.mark.parametrize(
    ("apart", "word", "within"),
    [
        ({}, "supported", 8),
        ({"iql": 13.0}, "supported", 6),  # outside of d3rlpy's interval on two tasks, and not clearly apart
        ({"iql": 13.0, "bc": -13.0}, "undecided", 4),
        ({"awac": 100.0}, "refuted", 6),
        ({"awac": -100.0}, "refuted", 6),
    ],
)
def test_the_verdict_beside_d3rlpy(apart: dict[str, float], word: str, within: int):
    verdict = beside_d3rlpy.judge(beside_d3rlpy_outcome(**apart))
    assert verdict.word == word
    assert verdict.sentences[-1].endswith(f"{within} within d3rlpy's own")


def test_staleness_draws(tmp_path: Path):
    staleness.draw(lags({"p3o": (10, 9), "ppo clip 0.1": (8, 9), "band": (1, 2)}), tmp_path / "study.png")
    assert (tmp_path / "study.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("name", "outcome"),
    [
        ("correction", corrections()),
        ("replay-depth", depths(p3o=900.0, narrow=300.0, wide=600.0)),
        ("temperature", temperatures({})),
        ("precision", precisions(900.0)),
        ("ablations", parts_of_p3o()),
        ("ess-against-age", ages(1.0, 0.8, 0.5)),
        ("sample-efficiency", after_less(120.0, 50.0)),
        ("balance", normalized_outcome({f"{name} lag {lag}": 1.0 for name in balance.METHODS for lag in (1, 16)})),
        ("divergence", divergences()),
        ("interleaving", interleavings(60.0, 2)),
        ("asynchrony", collected(ppo=(2.0, 40.0))),
        ("hints", hinted(1.0, 0.9, 0.3)),
        ("predictors", foretold(0.3, 0.1, 0.2)),
        ("collapsing-prior", priors()),
        ("few-updates", offline()),
        ("beside-d3rlpy", beside_d3rlpy_outcome()),
    ],
)
def test_the_others_draw(tmp_path: Path, name: str, outcome: study.Outcome):
    STUDIES[name].draw(outcome, tmp_path / "study.png")
    assert (tmp_path / "study.png").stat().st_size > 5_000


def test_what_is_read_from_runs(tmp_path: Path):
    """ESS by age over the last half of four iterations, and returns over a tenth of the budget, without gaps."""
    config = {"format": records.FORMAT, **dict.fromkeys(records.REQUIRED, ""), "seeds": [0, 1], "sweep": {}}
    records.write_json(tmp_path / "config.json", {**config, "config": {"replay": 1}})
    with open(tmp_path / "metrics.jsonl", "w") as log:
        for number in range(1, 21):
            row = {"env_steps": number, "episodes": [0 if number == 1 else 1, 1], "return_sum": [number, -number]}
            aged = {"ess_first": [1.0, 1.0], "ess_age_1": [0.5 + 0.01 * number, 0.2]} if number > 1 else {}
            records.append_line(log, {"iteration": number, **row, **aged})
    # The mean of 0.61 .. 0.70 is 0.655.
    np.testing.assert_allclose(ess_against_age.by_age(tmp_path, [1, 0]), [[1.0, 0.2], [1.0, 0.655]])
    found = learning_curves.curves(tmp_path, [0, 1])  # 20 points: a tenth of them are two
    assert np.isnan(found[:, 0]).all()
    assert found[:, 1].tolist() == [2.0, -1.5] and found[:, -1].tolist() == [19.5, -19.5]
    assert study._as_json(found[:, :2]) == [[None, 2.0], [None, -1.5]]


@pytest.mark.parametrize("file", ["metrics.jsonl", "curves.csv"])
def test_points_of_a_curve_are_at_equal_steps(tmp_path: Path, file: str):
    """123 iterations do not divide into 50 stretches; in a published run the first may be longer than the last."""
    config = {"format": records.FORMAT, **dict.fromkeys(records.REQUIRED, ""), "seeds": [0], "sweep": {}}
    records.write_json(tmp_path / "config.json", config)
    with open(tmp_path / file, "w") as out:
        if file == "metrics.jsonl":
            for n in range(1, 124):
                records.append_line(out, {"iteration": n, "env_steps": 64 * n, "episodes": [1], "return_sum": [n]})
        else:
            out.write("env_steps,member,return,ess,behavior_kl\n")
            for part in np.array_split(np.arange(1, 124), 50):
                out.write(f"{64 * part[-1]},0,{part.mean()},,\n")
    (found,) = learning_curves.curves(tmp_path, [0])
    assert np.isnan(found[:4]).all()
    # At share k / 50 of training the last tenth is that up to iteration 2.46 k, with a mean of 2.46 k - 6.15 + 0.5.
    np.testing.assert_allclose(found[4:], 2.46 * np.arange(5, 51) - 5.65, atol=0.5)
    late = np.where(found >= 61.5, 1.0, 0.0)[None]  # from half of the budget on, and the 5.65 iterations after it
    assert abs(learning_curves.reached(late, np.ones((1, 50))).value - 54.6) <= 2.0


def test_studies_are_listed(capsys: pytest.CaptureFixture[str]):
    __main__.study([])
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(STUDIES)
    assert all(line.endswith("?") for line in listed)


def test_an_unknown_study_is_refused():
    with pytest.raises(UsageError, match="unknown study 'clip'; did you mean clip-sensitivity"):
        __main__.study(["clip"])


def test_what_is_published_has_the_prediction_of_the_code_and_the_pages_quote_it():
    root = Path(__file__).parents[2] / "experiments"
    pages = " ".join((root / page).read_text() for page in ("README.md", "OFFLINE.md"))
    pages = " ".join(pages.split())
    judged = [name for name in STUDIES if (root / "results" / "studies" / name / "study.json").exists()]
    assert judged
    for name in judged:
        prediction = STUDIES[name].prediction
        assert json.loads((root / "results" / "studies" / name / "study.json").read_text())["prediction"] == prediction
        assert f"{prediction} Verdict:" in pages, name
    table = (root / "results" / "studies" / "family" / "table.md").read_text()
    assert table in (root.parent / "README.md").read_text()


def _published() -> list[Path]:
    return sorted((Path(__file__).parents[2] / "experiments" / "results" / "studies").glob("*/study.json"))


@pytest.mark.parametrize("path", _published(), ids=lambda path: path.parent.name)
def test_a_published_verdict_is_that_of_its_scores(path: Path):
    """Judged again from study.json: neither statistics nor judges have changed what is on the pages."""
    record, outcome = json.loads(path.read_text()), {}
    for key, found in (record["scores"] | record.get("computed", {})).items():
        values = next(value for name, value in found.items() if name != "iqm")
        job, _, members = key.partition(" | ")
        outcome[job, members] = np.array(values, np.float64)  # null: nothing was measured
    verdict = STUDIES[record["study"]].judge(outcome)
    assert verdict.word == record["verdict"]["word"]
    one, other = (" ".join(of).replace("-0.00", "+0.00") for of in (verdict.sentences, record["verdict"]["sentences"]))
    assert one == other
