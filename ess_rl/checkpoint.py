"""Save a tree of tensors to one file and load it: safetensors with a JSON header. Loading executes no code."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ess_rl.contract import Tree
from ess_rl.errors import UsageError

FORMAT = "ess-rl checkpoint 1"


def flatten(tree: Tree, prefix: str = "") -> dict[str, Tensor]:
    """Flatten nested dictionaries into one, with names like "params/policy/log_std"."""
    flat: dict[str, Tensor] = {}
    for name, branch in tree.items():
        flat |= flatten(branch, f"{prefix}{name}/") if isinstance(branch, dict) else {f"{prefix}{name}": branch}
    return flat


def _unflatten(flat: dict[str, Tensor]) -> Tree:
    tree: Tree = {}
    for path, leaf in flat.items():
        *folders, name = path.split("/")
        branch = tree
        for folder in folders:
            branch = branch.setdefault(folder, {})
        branch[name] = leaf
    return tree


def save(path: Path, tree: Tree, info: dict[str, Any]) -> None:
    """Write `tree` and `info` (JSON) to `path`, by rename: a kill leaves the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.touch()
    mode = part.stat().st_mode  # as of any file here; safetensors leaves what only its owner can read
    tensors = {name: x.detach().cpu().contiguous() for name, x in flatten(tree).items()}
    # One entry: safetensors writes several in no fixed order, and equal states would give unequal files.
    try:
        save_file(tensors, part, metadata={FORMAT: json.dumps(info)})
    except SafetensorError as error:  # usually a full disk
        raise OSError(errno.EIO, f"cannot be written ({error})", str(path)) from None
    part.chmod(mode)
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def info(path: Path) -> dict[str, Any]:
    """Read the JSON that `save` wrote alongside the tensors, but not the tensors. Raises UsageError as `load` does."""
    return _read(path, tensors=False)[1]


def load(path: Path, like: Tree, device: torch.device | str = "cpu") -> tuple[Tree, dict[str, Any]]:
    """Read what `save` wrote. -> (tree, info)

    Args:
        like: a tree with the expected names, shapes and dtypes.

    Raises:
        UsageError: the file is missing, damaged, not a checkpoint of this suite, or does not fit `like`.
    """
    flat, said = _read(path, tensors=True)
    wanted = flatten(like)
    for name in sorted(wanted.keys() ^ flat.keys()):
        whose = "is missing" if name in wanted else "is not known to this agent"
        raise UsageError(f"{path}: does not fit the configuration: {name!r} {whose}")
    for name, x in wanted.items():
        if x.shape != flat[name].shape or x.dtype != flat[name].dtype:
            found, expected = f"{list(flat[name].shape)} {flat[name].dtype}", f"{list(x.shape)} {x.dtype}"
            raise UsageError(f"{path}: does not fit the configuration: {name!r} is {found}, expected {expected}")
    return _unflatten({name: flat[name].to(device) for name in wanted}), said


def _read(path: Path, *, tensors: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with open(path, "rb"):  # safetensors calls a file missing whatever keeps it from opening it
            pass
    except FileNotFoundError:
        raise UsageError(f"{path}: no such checkpoint") from None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            names = file.keys() if tensors else []
            flat = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise UsageError(
            f"{path}: damaged or no checkpoint ({error}); remove it to continue from the one before"
        ) from None
    if FORMAT not in metadata:
        raise UsageError(f"{path}: not a checkpoint of this suite, or of another version (no {FORMAT!r} in its header)")
    return flat, json.loads(metadata[FORMAT])
