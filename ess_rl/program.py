"""A pure function of trees of tensors as one compiled program, which loops call without asking whether it still fits.

torch.compile reads Python's bytecode, and asks at every call and of every tensor whether the program it made fits.
Our functions need neither: they are straight lines of tensor operations. So they are traced once for the shapes,
strides and types that come in (make_fx, which sees through vmap and gradients), Inductor makes the program, and within
a loop tensors go from call to call without being looked at. With one agent of 11,000 parameters on a CPU, an update
takes about two thirds of what torch.compile's takes, and acting a third.

The price: Inductor is called where torch.compile calls it, below Dynamo and AOTAutograd, by names that torch does not
promise to keep. Tried with torch 2.13; should one go, compiling fails loudly, and `--compile off` runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from ess_rl.contract import Tree

_Run = Callable[..., Sequence[Tensor]]  # leaves in, leaves out


class Program:
    """`function` of trees of tensors, called as it is or, if `compiled`, as one program for each kind of arguments.

    The function must be a straight line of tensor operations: no branch on what a tensor holds, no random numbers, no
    writing to its arguments. A tensor that it reads without being given it is a constant.
    """

    def __init__(self, function: Callable[..., Any], *, compiled: bool):
        self._function, self._compiled = function, compiled
        self._made: dict[tuple[Any, ...], list[tuple[TreeSpec, _Run, TreeSpec]]] = {}

    def __call__(self, *trees: Tree) -> Any:
        """function(*trees)"""
        if not self._compiled:
            return self._function(*trees)
        leaves, spec = tree_flatten(trees)
        run, made_of = self._fitting(leaves, spec)
        return tree_unflatten(run(*leaves), made_of)

    def held(self, *trees: Tree) -> Callable[..., Any]:
        """function(*trees, ...) of the other arguments alone, which are tensors; for many calls."""
        if not self._compiled:
            return partial(self._function, *trees)
        leaves, fitting = tree_flatten(trees)[0], {}

        def call(*tensors: Tensor) -> Any:
            kinds = _kinds(tensors)
            if kinds not in fitting:
                fitting[kinds] = self._fitting(*tree_flatten((*trees, *tensors)))
            run, made_of = fitting[kinds]
            return tree_unflatten(run(*leaves, *tensors), made_of)

        return call

    def scan(self, carry: Tree, fixed: tuple[Tree, ...], xs: Sequence[Tensor]) -> tuple[Tree, Tree]:
        """carry, y = function(carry, *fixed, *x) for each x = (xs[0][k], xs[1][k], ...). -> (carry, all y, stacked)

        jax.lax.scan as a loop of Python. xs are [K, ...] each, K >= 1; so are the leaves of what the y are stacked to.
        """
        steps, ys = list(zip(*(x.unbind(0) for x in xs), strict=True)), []
        if not self._compiled:
            for x in steps:
                carry, y = self._function(carry, *fixed, *x)
                ys.append(y)
            return carry, tree_map(lambda *y: torch.stack(y), *ys)
        steady, others = False, tree_flatten(fixed)[0]
        for x in steps:
            if not steady:
                run, made_of = self._fitting(*tree_flatten((carry, *fixed, *x)))
                given, as_given = tree_flatten(carry)
                result = run(*given, *others, *x)
                carry = tree_unflatten(result, made_of)[0]
                before, as_before = tree_flatten(carry)
                steady = as_before == as_given and _kinds(before) == _kinds(given)  # what it gives back, it can take
                if steady:
                    carry = given = None  # nothing holds the first state while others are made
            else:
                result = run(*before, *others, *x)
                before = result[: len(before)]
            ys.append(result[len(before) :])
        return tree_unflatten([*before, *map(torch.stack, zip(*ys, strict=True))], made_of)

    def _fitting(self, leaves: list[Tensor], spec: TreeSpec) -> tuple[_Run, TreeSpec]:
        """The program for arguments of these kinds, and the tree its results are the leaves of."""
        known = self._made.setdefault(_kinds(leaves), [])
        for made_for, run, made_of in known:
            if made_for == spec:
                return run, made_of
        run, made_of = _make(self._function, leaves, spec)
        known.append((spec, run, made_of))
        return run, made_of


def _kinds(leaves: Sequence[Tensor]) -> tuple[Any, ...]:
    """All that a program is made for, of each tensor."""
    return tuple((x.shape, x.stride(), x.dtype, x.device) for x in leaves)


def _make(function: Callable[..., Any], leaves: list[Tensor], spec: TreeSpec) -> tuple[_Run, TreeSpec]:
    # Two seconds of imports, which nobody needs who does not compile.
    from torch._inductor import config as inductor_config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes
    from torch._inductor.virtualized import V

    found: list[TreeSpec] = []

    def flat(*leaves: Tensor) -> list[Tensor]:
        result, made_of = tree_flatten(function(*tree_unflatten(leaves, spec)))
        found.append(made_of)
        return result

    # Traced with fake tensors: nothing is computed, and a large population does not hold what it would need
    # uncompiled. A tensor that comes in twice is two arguments: it may be two tensors another time.
    fake = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True, allow_non_fake_inputs=True)
    examples: list[Any] = [fake.from_tensor(x.detach()) for x in leaves]
    # What the asserts would check at every call is in `_kinds`: the strides of some 60 tensors, 6 % of a small update.
    options = inductor_config.patch(size_asserts=False)
    with tracing(TracingContext(fake)), V.set_fake_mode(fake), options:  # the cache on disk asks for this context
        graph = make_fx(functionalize(flat), select_decomp_table(), _allow_non_fake_inputs=True)(*examples)
        results = graph.graph.output_node()
        results.meta["user_visible_output_idxs"] = range(found[0].num_leaves)  # these keep their strides
        joint_graph_passes(graph)
        code: Any = compile_fx_inner(graph, examples, is_inference=True)

    return lambda *leaves: code(list(leaves)), found[0]
