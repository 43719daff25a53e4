"""A worker process, and the errors raised when it fails."""

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ess_rl.child import Child, Parent, close, peak_memory_mib
from ess_rl.errors import LostProcessError, UsageError


@pytest.fixture(autouse=True)
def found_by_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let child processes import this module by the name that it has here."""
    monkeypatch.syspath_prepend(Path(__file__).parents[len(__name__.split(".")) - 1])


class Unsendable(Exception):
    """Takes two arguments, but is pickled as if it took one."""

    def __init__(self, what: str, why: str):
        super().__init__(f"{what}: {why}")


def double(parent: Parent) -> None:
    while True:
        parent.tell((2 * parent.hear(), torch.get_num_threads()))


def fail(parent: Parent, error: Exception) -> None:
    raise error


def fail_unsendably(parent: Parent) -> None:
    raise Unsendable("a thing", "no reason")


def run_out(parent: Parent) -> None:
    raise EOFError("a file of its own has ended")


def leave(parent: Parent) -> None:
    os._exit(3)


def sleep(parent: Parent) -> None:
    time.sleep(0.5)
    parent.tell(None)


def hold(parent: Parent, mib: int) -> None:
    np.ones(mib * 2**17).sum()
    parent.tell(peak_memory_mib())


def begun(*arguments: Any, **options: Any) -> Child:
    return Child("the helper", *arguments, **options)


def test_it_is_asked_and_answers() -> None:
    child = begun(double, threads=3)
    for number in (2, 5):
        child.ask(number)
        assert child.answer() == (2 * number, 3)
    close([child])
    assert not multiprocessing.active_children()


def test_what_goes_wrong_there_is_raised_here_with_its_place() -> None:
    child = begun(fail, UsageError("no such thing"))
    with pytest.raises(UsageError, match="no such thing") as found:
        child.answer()
    assert "in fail" in found.value.__notes__[0]
    close([child])


def test_its_last_word_is_heard_by_who_was_about_to_speak() -> None:
    """The task is more than a pipe holds, and nobody reads it at the other end."""
    child = begun(fail, UsageError("no such thing"))
    with pytest.raises(UsageError, match="no such thing"):
        child.ask(np.zeros(10**6))
    close([child])


def test_an_error_that_cannot_be_sent_is_told_in_words() -> None:
    child = begun(fail_unsendably)
    with pytest.raises(RuntimeError, match="Unsendable: a thing: no reason"):
        child.answer()
    close([child])


def test_the_end_of_something_else_is_not_the_end_of_the_pipe() -> None:
    child = begun(run_out)
    with pytest.raises(EOFError, match="a file of its own has ended"):
        child.answer()
    close([child])


def test_its_loss_is_said() -> None:
    child = begun(leave)
    with pytest.raises(LostProcessError, match="the helper ended with status 3; 'ess-rl resume RUN' continues"):
        child.answer()
    close([child])


def test_many_end_at_the_same_time() -> None:
    children = [begun(sleep) for _ in range(3)]
    close(children)
    assert not multiprocessing.active_children()


def test_its_memory_is_its_own() -> None:
    """A child's peak memory does not depend on how much this process once held."""
    np.ones(600 * 2**17).sum()
    assert peak_memory_mib() > 600.0
    children = [begun(hold, mib) for mib in (1, 300)]
    small, large = (child.answer() for child in children)
    assert large - small == pytest.approx(300.0, abs=30.0)
    assert small < 500.0 and children[0].peak_memory_mib == pytest.approx(small, abs=1.0)
    close(children)
