"""Step sizes γ(t) along one chain, t = 1 .. T: an integer, or a 0-d float64 tensor (see preconditioning)."""

from __future__ import annotations

from torch import Tensor

from lpc_runner.schema import PositiveFloat, checked


class Constant:
    """γ(t) = value, as in the paper."""

    @checked
    def __init__(self, value: PositiveFloat) -> None:
        self.value = value

    def __call__(self, t: int | Tensor) -> float | Tensor:
        return self.value


class Polynomial:
    """γ(t) = value (1 + (t - 1)/offset)^-power (Welling and Teh 2011), decaying after `offset` steps."""

    @checked
    def __init__(self, value: PositiveFloat, offset: PositiveFloat, power: PositiveFloat) -> None:
        self.value, self.offset, self.power = value, offset, power

    def __call__(self, t: int | Tensor) -> float | Tensor:
        return self.value * (1 + (t - 1) / self.offset) ** -self.power
