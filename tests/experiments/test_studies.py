"""Studies: what they run, that their judgments follow from the numbers, and that a quick one goes through."""

from pathlib import Path

import numpy as np
import pytest

from ess_rl.errors import UsageError
from experiments import records
from experiments.studies import STUDIES, clip_sensitivity, staleness, study

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
    assert str(study.Difference(-3.2, -10.4, 4.0)) == "-3 [-10, +4]"


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


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("quick", [True, False])
def test_jobs_have_folders_of_their_own(name: str, quick: bool):
    jobs = STUDIES[name].jobs(quick)
    assert len({job.name for job in jobs}) == len(jobs)
    assert all(len(job.seeds) >= 10 for job in jobs) or quick
    assert len({(job.env, job.steps, tuple(job.seeds)) for job in jobs}) == 1  # equal terms for all


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
    assert (out / "p3o-Pendulum-v1" / "result.json").stat().st_mtime_ns == before


def test_staleness_draws(tmp_path: Path):
    staleness.draw(lags({"p3o": (10, 9), "ppo clip 0.1": (8, 9), "band": (1, 2)}), tmp_path / "study.png")
    assert (tmp_path / "study.png").stat().st_size > 10_000


def test_an_unknown_study_is_refused():
    with pytest.raises(UsageError, match="unknown study 'clip': choose one of clip-sensitivity, staleness"):
        study.find(STUDIES, "clip")
