"""Files of tensors: what goes in comes out, and what is no such file is refused with words that help."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ess_rl import checkpoint
from ess_rl.errors import UsageError

TREE = {"params": {"policy": {"log_std": torch.tensor([0.5, -1.0])}}, "step": torch.tensor(3, dtype=torch.int64)}


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.safetensors"
    checkpoint.save(path, TREE, {"iteration": 7, "of": ["x"]})
    tree, info = checkpoint.load(path, TREE)
    assert info == checkpoint.info(path) == {"iteration": 7, "of": ["x"]}
    found, expected = checkpoint.flatten(tree), checkpoint.flatten(TREE)
    assert list(found) == list(expected) == ["params/policy/log_std", "step"]
    assert all(torch.equal(found[name], x) and found[name].dtype == x.dtype for name, x in expected.items())
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    first = path.read_bytes()
    checkpoint.save(path, TREE, {"iteration": 7, "of": ["x"]})
    assert path.read_bytes() == first


@pytest.mark.skipif(os.name == "nt", reason="there are no such modes there")
@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_who_may_read_other_files_of_a_run_may_read_this_one(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        checkpoint.save(tmp_path / "a.safetensors", TREE, {})
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(UsageError, match=r"a\.safetensors: no such checkpoint"):
        checkpoint.info(path)
    checkpoint.save(path, TREE, {})
    whole = path.read_bytes()
    for damaged in (b"", whole[:5], whole[:-1], b"\xff" * len(whole)):
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match=r"damaged or no checkpoint .*; remove it to continue from the one before"):
            checkpoint.info(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(UsageError, match="not a checkpoint of this suite"):
        checkpoint.info(path)


def test_what_cannot_be_opened_is_not_called_missing_or_damaged(tmp_path: Path) -> None:
    """Its remedy would be to remove a good file."""
    with pytest.raises(IsADirectoryError, match=tmp_path.name):
        checkpoint.info(tmp_path)


@pytest.mark.parametrize(
    ("like", "words"),
    [
        ({**TREE, "more": torch.zeros(1)}, "'more' is missing"),
        ({"step": TREE["step"]}, "'params/policy/log_std' is not known to this agent"),
        ({**TREE, "step": torch.zeros(2, dtype=torch.int64)}, r"'step' is \[\] torch.int64, expected \[2\]"),
        ({**TREE, "step": torch.tensor(3.0)}, r"'step' is \[\] torch.int64, expected \[\] torch.float32"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, like: dict, words: str) -> None:
    checkpoint.save(tmp_path / "a.safetensors", TREE, {})
    with pytest.raises(UsageError, match=words):
        checkpoint.load(tmp_path / "a.safetensors", like)
