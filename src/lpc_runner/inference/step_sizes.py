"""Step sizes γ(t) along one chain, t = 1 .. T: a number, or one per coordinate, (1, d) (`interfaces.StepSize`)."""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from torch import Tensor

from lpc_runner.base.schema import NonNegativeInt, PositiveFloat, between, checked
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
    """γ = start (value/start)^min(v/num_visits, 1), v = n/updates_per_epoch: visits of an example by update n.

    updates_per_epoch: of the run, 0 where a batch is larger than the data. γ is the same along a chain; a 0-d tensor on
    the device, changed in place, so that a captured chain reads it.
    """

    constant_along_chain = True

    @checked
    def __init__(
        self, start: PositiveFloat, value: PositiveFloat, num_visits: PositiveFloat, updates_per_epoch: NonNegativeInt
    ) -> None:
        self.start, self.value, self.falling = start, value, max(num_visits * updates_per_epoch, 1.0)
        self.made = 0  # n
        self.size = torch.full((), start, dtype=torch.float64)

    def after(self, made: int) -> float:
        """γ after so many updates."""
        return self.start * (self.value / self.start) ** min(made / self.falling, 1.0)

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


class Adapted(StepSize):
    """One γ for all chains, after every update moved towards a target acceptance a*, the same along a chain.

    Dual averaging (Hoffman and Gelman 2014, section 3.2.1): log γ = log μ - sqrt(n)/0.15 H after n updates,
    H = (1 - w) H + w (a* - a), w = 1/(n + 10), a the acceptance of the update. Their 0.05 is for single trajectories
    and overshoots with means over chains and steps. μ = start at first; once a has been on both sides of a*, μ = γ and
    n = 0, so that nothing of a wrong start is left.
    start: γ of the first update. target: a*; null: the sampler's `target_acceptance`. What is learned does not come
    from chains that γ throws off: an update with a < a*/10, or of numbers that are not finite, moves γ alone, at most
    MAX_PASSED times in a row.

    γ is a 0-d tensor on the device, changed in place, so that a captured chain reads it.
    """

    constant_along_chain = True
    needs_acceptance = True
    GAIN, DELAY, MAX_PASSED = 0.15, 10, 100

    @checked
    def __init__(self, start: PositiveFloat, target: Annotated[float, between(0, 1)] | None) -> None:
        self.start, self.target = start, target
        self.made, self.passed = 0, 0  # updates; those passed over since the last that was learned from
        names = ("count", "shortfall", "centre", "side")  # n, H, log μ, the sign of a* - a so far and 0 once it changed
        self.average = {name: torch.zeros((), dtype=torch.float64) for name in names}
        self.average["centre"].fill_(math.log(start))
        self.size = torch.full((), start, dtype=torch.float64)
        self.used = self.size.clone()

    def bind(self, model: Any, device: torch.device) -> None:
        self.average = {name: value.to(device) for name, value in self.average.items()}
        self.size, self.used = self.size.to(device), self.used.to(device)

    def __call__(self, t: int | Tensor) -> Tensor:
        return self.size

    def contribution(self, chain: Any) -> dict[str, Tensor]:
        """a, and a*."""
        target = chain.target_acceptance if self.target is None else self.target
        return {"acceptance": chain.acceptance, "target": torch.full_like(chain.acceptance, target)}

    def usable(self, averaged: dict[str, Tensor]) -> Tensor:
        return averaged["acceptance"] >= averaged["target"] / 10

    def observe(self, averaged: dict[str, Tensor]) -> None:
        self.passed = 0
        self._move(averaged["acceptance"], averaged["target"])

    def pass_over(self, averaged: dict[str, Tensor], finite: Tensor) -> bool:
        self.passed += 1
        self._move(averaged["acceptance"] * finite, averaged["target"])
        return self.passed <= self.MAX_PASSED

    def _move(self, acceptance: Tensor, target: Tensor) -> None:
        self.used.copy_(self.size)
        error, kept = (target - acceptance).to(self.size), self.average
        if self.made == 0:
            kept["side"].copy_(error.sign())
        self.made += 1
        crossed = kept["side"] * error < 0
        kept["centre"].copy_(torch.where(crossed, self.size.log(), kept["centre"]))
        for name in ("count", "shortfall", "side"):
            kept[name].masked_fill_(crossed, 0.0)
        kept["count"] += 1
        kept["shortfall"].lerp_(error, 1 / (kept["count"] + self.DELAY))
        self.size.copy_((kept["centre"] - kept["count"].sqrt() / self.GAIN * kept["shortfall"]).exp())

    def scalars(self) -> dict[str, Tensor]:
        """γ of the update that was made."""
        return {"chain/step_size": self.used.clone()}

    def state_dict(self) -> dict[str, Any]:
        return {"made": self.made, "passed": self.passed, "size": self.size, "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.made, self.passed = state["made"], state["passed"]
        self.size.copy_(state["size"])
        for name, value in self.average.items():
            value.copy_(state["average"][name])


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
