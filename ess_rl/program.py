"""A pure function of tensor trees as one compiled program, which loops call without checking whether it still fits.

torch.compile analyzes Python bytecode, and checks every tensor at every call to see whether the compiled program fits.
Our functions need neither: they are straight-line sequences of tensor operations. So they are traced once for the
shapes, strides and dtypes of their inputs (by make_fx, which sees through vmap and gradients), Inductor compiles the
result, and within a loop tensors pass from call to call unchecked. With one agent of 11,000 parameters on a CPU, an
update takes about two thirds of the time it takes with torch.compile, and acting a third.

The price: Inductor is called where torch.compile calls it, below Dynamo and AOTAutograd, by names that torch does not
promise to keep. Tested with torch 2.13; if one of them disappears, compiling fails loudly, and `--compile off` works.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functionalize
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from ess_rl.contract import Tree

_Run = Callable[..., Sequence[Tensor]]  # leaves in, leaves out


class Program:
    """`function` of tensor trees, called as it is or, if `compiled`, as one program for each kind of arguments.

    The function must be a straight-line sequence of tensor operations: no branch on a tensor's values, no random
    numbers, no writing to its arguments. A tensor that it reads but does not take as an argument is a constant.
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
        """`function` with `trees` bound as its first arguments, for many calls; the others must be tensors."""
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
        """carry, y = function(carry, *fixed, *x) for each x = (xs[0][k], xs[1][k], ...). -> (carry, stacked y)

        jax.lax.scan as a Python loop. Each of xs is [K, ...], K >= 1; so is each leaf of the stacked y.
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
                steady = as_before == as_given and _kinds(before) == _kinds(given)  # its output carry fits its input
                if steady:
                    carry = given = None  # so as not to hold the first state while others are made
            else:
                result = run(*before, *others, *x)
                before = result[: len(before)]
            ys.append(result[len(before) :])
        return tree_unflatten([*before, *map(torch.stack, zip(*ys, strict=True))], made_of)

    def _fitting(self, leaves: list[Tensor], spec: TreeSpec) -> tuple[_Run, TreeSpec]:
        """The program for arguments of these kinds, and the tree structure of its results."""
        known = self._made.setdefault(_kinds(leaves), [])
        for made_for, run, made_of in known:
            if made_for == spec:
                return run, made_of
        run, made_of = _make(self._function, leaves, spec)
        known.append((spec, run, made_of))
        return run, made_of


def _kinds(leaves: Sequence[Tensor]) -> tuple[Any, ...]:
    """Everything about each tensor that a program is specialized to."""
    return tuple((x.shape, x.stride(), x.dtype, x.device) for x in leaves)


def _make(function: Callable[..., Any], leaves: list[Tensor], spec: TreeSpec) -> tuple[_Run, TreeSpec]:
    # Seconds of imports, needed only for compiling.
    from torch._guards import TracingContext, tracing
    from torch._inductor import config as inductor_config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    found: list[TreeSpec] = []

    def flat(*leaves: Tensor) -> list[Tensor]:
        result, made_of = tree_flatten(function(*tree_unflatten(leaves, spec)))
        found.append(made_of)
        return result

    # Traced with fake tensors: nothing is computed, and a large population does not hold the memory it would need
    # uncompiled. A tensor passed twice counts as two arguments: at another call these may be two tensors.
    fake = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True, allow_non_fake_inputs=True)
    examples: list[Any] = [fake.from_tensor(x.detach()) for x in leaves]
    # `_kinds` covers what the asserts would check at every call: the strides of some 60 tensors, 6 % of a small update.
    # Programs are made for a number of threads, which Inductor's cache on disk takes into account only if it is named.
    options = inductor_config.patch({"size_asserts": False, "cpp.threads": torch.get_num_threads()})
    with tracing(TracingContext(fake)), V.set_fake_mode(fake), options:  # the on-disk cache needs this context
        graph = make_fx(functionalize(flat), select_decomp_table(), _allow_non_fake_inputs=True)(*examples)
        results = graph.graph.output_node()
        results.meta["user_visible_output_idxs"] = range(found[0].num_leaves)  # these keep their strides
        joint_graph_passes(graph)
        code: Any = compile_fx_inner(graph, examples, is_inference=True)

    return lambda *leaves: code(list(leaves)), found[0]
