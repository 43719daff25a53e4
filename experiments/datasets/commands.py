"""The commands of `ess-rl dataset`: each returns the text to print."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from envs import minari_data, minari_env
from ess_rl.errors import UsageError
from experiments import records
from experiments.datasets import recording
from experiments.report.text import table

Positional = tyro.conf.Positional


def list_sets() -> str:
    """List the local data sets: ess-rl dataset list"""
    rows = [["data set", "env", "steps", "episodes", "MB", "references"]]
    for name, metadata in minari_data.local().items():
        spec = minari_env.spec_text(metadata)
        low, high = metadata.get("ref_min_score"), metadata.get("ref_max_score")
        rows.append([
            name, minari_env.id_in(spec) or "-", f"{int(metadata['total_steps']):,}",
            f"{int(metadata['total_episodes']):,}", f"{metadata.get('dataset_size', 0):.1f}",
            "-" if low is None or high is None else f"{low:g} to {high:g}",
        ])  # fmt: skip
    if len(rows) == 1:
        return f"no data sets in {minari_data.root()}: record one, or train with --download"
    return f"{table(rows)}\nin {minari_data.root()}"


def show(dataset_id: Positional[str], trust_env_spec: bool = False) -> str:
    """Show what a data set says about itself: ess-rl dataset show ID

    Args:
        dataset_id: name of the data set.
        trust_env_spec: import the code that the set's env spec names, if it recorded no spaces.
    """
    data = minari_data.load(dataset_id, trust=trust_env_spec, needs_behavior=False, say=print)
    lines = [f"{dataset_id}: {len(data.transitions.reward):,} steps in {len(data.starts):,} episodes"]
    lines.append(f"observations: {len(data.obs_names)} numbers: {', '.join(data.obs_names[:12])}")
    lines[-1] += " ..." if len(data.obs_names) > 12 else ""
    lines.append(f"actions: {data.transitions.action.shape[1]} numbers, scaled to [-1, 1]")
    lines.append(f"behavior: {'recorded' if data.recorded_behavior else 'not recorded, a fitted model stands in'}")
    hidden = ("observation_space", "action_space", "env_spec", "eval_env_spec")
    lines += [f"{name}: {value}" for name, value in data.metadata.items() if name not in hidden]
    lines.append(f"env: {minari_env.id_in(minari_env.spec_text(data.metadata)) or 'not named'}")
    return "\n".join(lines)


def audit(dataset_id: Positional[str], model_updates: int = 3000, trust_env_spec: bool = False) -> str:
    """Look for problems in a data set, and fit a behavior model to it: ess-rl dataset audit ID

    Args:
        dataset_id: name of the data set.
        model_updates: maximum number of updates of the behavior models.
        trust_env_spec: import the code that the set's env spec names, if it recorded no spaces.
    """
    from experiments.datasets import audit

    records.check_positive({"model_updates": model_updates})
    data = minari_data.load(dataset_id, trust=trust_env_spec, needs_behavior=False, say=print)
    return audit.audit(data, model_updates)


def score(dataset_id: Positional[str], runs: Positional[tuple[Path, ...]]) -> str:
    """Normalize final returns of runs by a set's reference returns: ess-rl dataset score ID RUN [RUN ...]

    0 is the set's ref_min_score and 1 its ref_max_score, as in Minari (D4RL's tables multiply by 100).

    Args:
        dataset_id: the data set whose references to use.
        runs: finished run folders, of anything trained in this set's task.
    """
    from experiments import offline_run, statistics

    metadata = minari_data.metadata_of(dataset_id)
    ends = minari_data.references_of(metadata)
    if ends is None:
        raise UsageError(
            f"{dataset_id} lacks ref_min_score or ref_max_score, or they are equal, so there is no normalized score: "
            "'ess-rl dataset record' takes --ref-min and --ref-max"
        )
    low, high = ends
    env_id = minari_env.id_in(minari_env.spec_text(metadata))
    if not runs:
        raise UsageError("name at least one run folder")
    rows = [["run", "learned from", "seeds", "return", "normalized score", "min", "max"]]
    for folder in runs:
        result = records.read_result(folder)
        task, options = result["env"], records.read_config(folder).get("env_options", {})
        if not minari_env.is_of(metadata, task, options):
            where = f"{task} with {options}" if options else task
            raise UsageError(
                f"{folder} was evaluated in {where}, {dataset_id} is of {env_id}, or of other options of it"
            )
        for label, group in records.groups(result).items():
            returns = np.array([result["final_return"][member] for member in group])
            scores: Any = offline_run.normalized((low, high), returns.tolist())
            rows.append([
                f"{folder} {label}" if len(records.groups(result)) > 1 else str(folder),
                result.get("dataset") or "acting", str(len(group)), f"{statistics.iqm(returns[:, None]):.1f}",
                f"{statistics.iqm(np.array(scores)[:, None]):.3f}", f"{min(scores):.3f}", f"{max(scores):.3f}",
            ])  # fmt: skip
    return f"{table(rows)}\n0 is a return of {low:g}, 1 of {high:g}; IQM over the seeds, of the last policy"


def import_d4rl(
    file: Positional[Path], *, id: str, env: str, ref_min: float | None = None, ref_max: float | None = None,
    overwrite: bool = False,
) -> str:  # fmt: skip
    """Convert a local D4RL HDF5 file to a Minari data set: ess-rl dataset import-d4rl FILE --id ID --env ENV

    Args:
        file: with observations, actions, rewards, terminals and, if there are any, timeouts and next_observations.
        id: name of the new set.
        env: the task it was recorded in, under its current name.
        ref_min: return whose normalized score is 0.
        ref_max: return whose normalized score is 1.
        overwrite: replace the set of that name.
    """
    from envs import d4rl

    recording.check_references(ref_min, ref_max)
    references = {"ref_min_score": ref_min, "ref_max_score": ref_max}
    return d4rl.import_file(file, id, env, {k: v for k, v in references.items() if v is not None}, overwrite=overwrite)


COMMANDS: dict[str, Callable[..., str]] = {
    "list": list_sets,
    "show": show,
    "audit": audit,
    "record": recording.record,
    "score": score,
    "import-d4rl": import_d4rl,
}
