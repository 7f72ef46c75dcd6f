"""Step sizes γ(t) along one chain, t = 1 .. T: a number, or one per coordinate, (1, d) (`interfaces.StepSize`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lpc_runner.base.schema import PositiveFloat, PositiveInt, checked
from lpc_runner.inference.interfaces import StepSize


class Constant(StepSize):
    """γ(t) = value, as in the paper."""

    constant_along_chain = True

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


class Annealed(StepSize):
    """γ = start (value/start)^min(n/num_updates, 1) after n updates: from `start` to `value`, the same along a chain.

    γ is a 0-d tensor on the device, changed in place, so that a captured chain reads it.
    """

    constant_along_chain = True

    @checked
    def __init__(self, start: PositiveFloat, value: PositiveFloat, num_updates: PositiveInt) -> None:
        self.start, self.value, self.num_updates = start, value, num_updates
        self.made = 0  # n
        self.size = torch.full((), start, dtype=torch.float64)

    def after(self, made: int) -> float:
        """γ after so many updates."""
        return self.start * (self.value / self.start) ** min(made / self.num_updates, 1.0)

    def bind(self, model: Any, device: torch.device) -> None:
        self.size = self.size.to(device)

    def __call__(self, t: int | Tensor) -> Tensor:
        return self.size

    def observe(self, averaged: dict[str, Tensor]) -> None:
        self.load_state_dict({"made": self.made + 1})

    def scalars(self) -> dict[str, Tensor]:
        """γ of the update that was made."""
        return {"chain/step_size": torch.full_like(self.size, self.after(self.made - 1))}

    def state_dict(self) -> dict[str, int]:
        return {"made": self.made}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.made = state["made"]
        self.size.fill_(self.after(self.made))


class Blocks(StepSize):
    """γ(t) = its own constant in every named block of z.

    values: step size by the name of the block. `bind` tells where the blocks lie, before the first chain.
    """

    constant_along_chain = True

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
