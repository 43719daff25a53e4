"""Conversion of D4RL's HDF5 files, flat arrays with episode ends marked, to Minari data sets of episodes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs import minari_write
from envs.minari_write import Episode
from ess_rl.errors import UsageError

_NEEDED = ("observations", "actions", "rewards", "terminals")


def import_file(file: Path, dataset_id: str, env_id: str, metadata: Mapping[str, Any], *, overwrite: bool) -> str:
    """Read a file and write it as a data set. -> text to print

    D4RL has one observation per step. If the file has no next_observations, the observation that an episode's last step
    reached is unknown: unless that step terminated, it is left out, and the step before it becomes the last, truncated.
    If the file has no timeouts, an episode that did not terminate ends where the next row's observation differs from
    the one reached; if it has neither, at the task's time limit.

    Raises:
        UsageError: the file is missing or not HDF5, or lacks a column, or its columns have unequal lengths, or
            observations or actions of other sizes than the task's, or nothing tells where its episodes end.
    """
    columns = _read(file)
    minari_write.check_name(dataset_id, overwrite=overwrite)
    obs_space, space = minari_write.spaces_of(env_id)
    sizes = {"observations": obs_space.shape, "next_observations": obs_space.shape, "actions": space.shape}
    for name, shape in sizes.items():
        if name in columns and columns[name].shape[1:] != shape:
            found = f"{list(columns[name].shape[1:])} numbers, {env_id} {list(shape)}"
            raise UsageError(f"{file}: a row of {name!r} has {found}: name the task that the file is of")
    half_range, center = 0.5 * (space.high - space.low), 0.5 * (space.high + space.low)
    columns["actions"] = (columns["actions"] - center) / half_range
    episodes = list(_episodes(columns, _cuts(file, columns, minari_write.spec_of(env_id).max_episode_steps, env_id)))
    if not episodes:
        raise UsageError(f"{file} has no whole episode")
    about = {"algorithm_name": "unknown (D4RL)", "description": f"imported by ess-rl from {file.name}, format of D4RL"}
    minari_write.write(dataset_id, env_id, episodes, about | dict(metadata), overwrite=overwrite)
    steps = sum(len(episode.reward) for episode in episodes)
    left = len(columns["rewards"]) - steps
    return (
        f"{dataset_id}: {steps:,} steps in {len(episodes):,} episodes ({left:,} steps with an unknown outcome left out)"
    )


def _read(file: Path) -> dict[str, NDArray[Any]]:
    import h5py

    try:
        with h5py.File(file, "r") as opened:
            names = [name for name in (*_NEEDED, "timeouts", "next_observations") if name in opened]
            columns = {name: np.asarray(opened[name]) for name in names}
    except FileNotFoundError:
        raise UsageError(f"{file}: no such file") from None
    except OSError as error:
        raise UsageError(f"{file}: not an HDF5 file ({' '.join(str(error).split())})") from None
    for name in _NEEDED:
        if name not in columns:
            raise UsageError(f"{file} has no {name!r}: not a file of D4RL's format")
    for name, column in columns.items():
        if column.shape[:1] != columns["rewards"].shape[:1]:
            rows, of_rewards = (x.shape[0] if x.ndim else "no" for x in (column, columns["rewards"]))
            raise UsageError(f"{file}: {name!r} has {rows} rows, 'rewards' {of_rewards}: the file is damaged")
    return columns


def _cuts(file: Path, columns: dict[str, NDArray[Any]], limit: int | None, env_id: str) -> NDArray[np.bool_]:
    """Mask [N] of the rows after which an episode ends although it did not terminate."""
    terminal = columns["terminals"].astype(bool).ravel()
    if "timeouts" in columns:
        return columns["timeouts"].astype(bool).ravel()
    cut = np.zeros_like(terminal)
    if "next_observations" in columns:
        cut[:-1] = (columns["next_observations"][:-1] != columns["observations"][1:]).any(1) & ~terminal[:-1]
        return cut
    if limit is None:
        raise UsageError(
            f"{file} has neither 'timeouts' nor 'next_observations', and {env_id} no time limit: nothing tells where "
            "its episodes end"
        )
    length = 0
    for row, ended in enumerate(terminal):
        length += 1
        cut[row] = length == limit and not ended
        length = 0 if ended or cut[row] else length
    return cut


def _episodes(columns: dict[str, NDArray[Any]], cut: NDArray[np.bool_]) -> Iterator[Episode]:
    terminal = columns["terminals"].astype(bool).ravel()
    reached = columns.get("next_observations")
    ends = np.flatnonzero(terminal | cut) + 1
    if len(ends) == 0 or ends[-1] < len(terminal):
        ends = np.append(ends, len(terminal))
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        obs, stop = columns["observations"][begin:end], end
        ended = bool(terminal[end - 1])
        if reached is not None:
            obs = np.concatenate([obs, reached[end - 1 : end]])
        elif ended:
            obs = np.concatenate([obs, obs[-1:]])  # after a terminated step: its value is zero, whatever it is
        else:
            stop = end - 1  # obs[stop] is what the step before reached
        if stop == begin:
            continue
        length = stop - begin
        last = np.arange(length) == length - 1
        yield Episode(
            obs[: length + 1],
            columns["actions"][begin:stop],
            columns["rewards"][begin:stop].ravel(),
            last & ended,
            last & (not ended),
        )
