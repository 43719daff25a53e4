"""Questions with a prediction that was written before the runs. One file each: prediction, runs, judgment, figure."""

from __future__ import annotations

from experiments.studies import clip_sensitivity, staleness
from experiments.studies.study import Study

STUDIES: dict[str, Study] = {study.name: study for study in (clip_sensitivity.STUDY, staleness.STUDY)}
