"""Step sizes γ(t) along one chain, t = 1 .. T: a number, or one per coordinate, (1, d) (`interfaces.StepSize`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lpc_runner.inference.interfaces import StepSize
from lpc_runner.schema import PositiveFloat, checked


class Constant(StepSize):
    """γ(t) = value, as in the paper."""

    @checked
    def __init__(self, value: PositiveFloat) -> None:
        self.value = value

    def __call__(self, t: int | Tensor) -> float | Tensor:
        return self.value


class Polynomial(StepSize):
    """γ(t) = value (1 + (t - 1)/offset)^-power (Welling and Teh 2011), decaying after `offset` steps."""

    @checked
    def __init__(self, value: PositiveFloat, offset: PositiveFloat, power: PositiveFloat) -> None:
        self.value, self.offset, self.power = value, offset, power

    def __call__(self, t: int | Tensor) -> float | Tensor:
        return self.value * (1 + (t - 1) / self.offset) ** -self.power


class Blocks(StepSize):
    """γ(t) = its own constant in every named block of z.

    values: step size by the name of the block. `bind` tells where the blocks lie, before the first chain.
    """

    @checked
    def __init__(self, values: dict[str, PositiveFloat]) -> None:
        self.values, self.per_coordinate = values, None

    def bind(self, model: Any, device: torch.device) -> None:
        """model.blocks: coordinates of z by name, in all z. Raises ValueError unless the names are the same."""
        blocks = model.blocks
        if set(blocks) != set(self.values):
            known = ", ".join(blocks) if blocks else "no blocks: step_size=constant"
            raise ValueError(f"values must name each block of z ({known}), got {', '.join(self.values)}")
        sizes = torch.empty(1, max(block.stop for block in blocks.values()), device=device)
        for name, block in blocks.items():
            sizes[:, block] = self.values[name]
        self.per_coordinate = sizes

    def __call__(self, t: int | Tensor) -> Tensor:
        assert self.per_coordinate is not None, "bind comes first"
        return self.per_coordinate
