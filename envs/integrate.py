"""One step of an ordinary differential equation, for environments whose dynamics are given as rates."""

from collections.abc import Callable

from torch import Tensor


def runge_kutta(rates: Callable[[Tensor], Tensor], state: Tensor, time_step: float) -> Tensor:
    """One step of the classical fourth-order method: its error over a fixed time falls with time_step^4.

    rates: the time derivative of a state, [B, S] -> [B, S], with the control held fixed.
    """
    first = rates(state)
    second = rates(state + 0.5 * time_step * first)
    third = rates(state + 0.5 * time_step * second)
    fourth = rates(state + time_step * third)
    return state + time_step / 6.0 * (first + 2.0 * second + 2.0 * third + fourth)
