"""Compiled or not, a program equals its function; compiled, similar calls share a program and others get their own."""

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from ess_rl.program import Program

compiles = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="compiling needs a C++ compiler"
)
both = pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=compiles)])


def less(tree: dict[str, Tensor], x: Tensor) -> dict[str, Any]:
    return {"less": tree["a"] - 2.0 * tree["b"], "both": (tree["a"] + x, x)}


def check(program: Program, tree: dict[str, Tensor], x: Tensor) -> None:
    for found in (program(tree, x), program.held(tree)(x)):
        assert torch.equal(found["less"], tree["a"] - 2.0 * tree["b"])
        assert torch.equal(found["both"][0], tree["a"] + x) and torch.equal(found["both"][1], x)


@both
def test_arguments_of_every_kind(compiled: bool):
    program = Program(less, compiled=compiled)
    a, b = torch.arange(6.0).view(2, 3), torch.arange(6.0, 12.0).view(2, 3)
    check(program, {"a": a, "b": b}, a)  # one tensor in two places
    check(program, {"a": a, "b": b}, b)  # ... and two tensors the next time
    check(program, {"b": b, "a": a}, b)  # the same leaves in another order
    check(program, {"a": a.T.contiguous().T, "b": b}, b)  # other strides
    check(program, {"a": a.double(), "b": b.double()}, b.double())
    check(program, {"a": a[:, :1].expand(2, 3), "b": b}, torch.tensor(3.0).expand(2, 3))
    if compiled:
        assert sum(map(len, program._made.values())) == 5  # the first two share one


@compiles
def test_what_is_held_fits_other_arguments_too():
    program = Program(less, compiled=True)
    tree = {"a": torch.ones(3), "b": torch.zeros(3)}
    call = program.held(tree)
    for x in (torch.zeros(3), torch.zeros(2, 3), torch.ones(3)):
        assert torch.equal(call(x)["both"][0], tree["a"] + x)


@both
def test_scan_by_hand(compiled: bool):
    """A running sum and the number of steps; each step also gives twice the sum so far and less the one before."""

    def step(carry: dict[str, Tensor], factor: Tensor, x: Tensor, y: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        total = carry["sum"] + x * y
        return {"sum": total, "steps": carry["steps"] + 1}, factor * total

    program = Program(step, compiled=compiled)
    start = {"sum": torch.zeros(2), "steps": torch.tensor(0)}
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    carry, seen = program.scan(start, (torch.tensor(2.0),), (x, torch.tensor([1.0, 10.0, 100.0])))
    assert carry["sum"].tolist() == [531.0, 642.0] and carry["steps"] == 3  # 1 + 30 + 500, 2 + 40 + 600
    assert seen.tolist() == [[2.0, 4.0], [62.0, 84.0], [1062.0, 1284.0]]
    assert start["sum"].tolist() == [0.0, 0.0] and start["steps"] == 0


@both
def test_scan_where_the_carry_changes_its_kind(compiled: bool):
    """[2, 1] in float32 and an expanded tensor become [2, 3] in float64; the last two steps share one program."""

    def step(carry: tuple[Tensor, Tensor], x: Tensor) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
        wide = carry[0] + x.double()
        return (wide, carry[1] + 1.0), {"sum": wide.sum() + carry[1].sum()}

    program = Program(step, compiled=compiled)
    start = torch.ones(2, 1), torch.zeros(1).expand(4)
    (wide, count), seen = program.scan(start, (), (torch.ones(3, 2, 3),))
    assert wide.dtype == torch.float64 and wide.tolist() == [[4.0] * 3] * 2 and count.tolist() == [3.0] * 4
    assert seen["sum"].tolist() == [12.0, 22.0, 32.0]  # 6 (k + 1) + 4 (k - 1) of step k = 1, 2, 3
    if compiled:
        assert len(program._made) == 2


@both
def test_scan_where_the_carry_changes_its_tree(compiled: bool):
    """The keys swap places at every step, with leaves of equal kinds; one key exists only from the first step on."""

    def swap(carry: dict[str, Tensor], x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return {name: carry[name] * (2.0 if name == "b" else 1.0) + x for name in reversed(carry)}, carry["a"]

    def gain(carry: dict[str, Tensor], x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return {"a": carry["a"] + x, "n": carry.get("n", torch.zeros(2)) + 1.0}, carry["a"]

    start, x = {"a": torch.zeros(2), "b": torch.ones(2)}, torch.ones(4, 2)
    carry, seen = Program(swap, compiled=compiled).scan(start, (), (x,))
    assert carry["a"].tolist() == [4.0, 4.0] and carry["b"].tolist() == [31.0, 31.0]  # 1, 3, 7, 15, 31
    assert seen[:, 0].tolist() == [0.0, 1.0, 2.0, 3.0]
    carry, seen = Program(gain, compiled=compiled).scan({"a": torch.zeros(2)}, (), (x,))
    assert carry["a"].tolist() == [4.0, 4.0] and carry["n"].tolist() == [4.0, 4.0]
    assert seen[:, 0].tolist() == [0.0, 1.0, 2.0, 3.0]


@both
def test_a_tensor_that_is_not_an_argument_is_a_constant(compiled: bool):
    offset = torch.tensor([1.0, 2.0])
    program = Program(lambda x: x + offset + torch.tensor(0.5), compiled=compiled)
    for x in (torch.zeros(2), torch.ones(2)):
        assert torch.equal(program(x), x + torch.tensor([1.5, 2.5]))


@compiles
def test_a_branch_on_data_is_refused():
    def branch(x: Tensor) -> Tensor:
        return x if x.sum() > 0.0 else -x

    with pytest.raises(Exception, match=r"data-dependent|tracing tensor"):
        Program(branch, compiled=True)(torch.ones(3))
