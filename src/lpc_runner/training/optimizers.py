"""Optimisers by the names of this project; each builds torch's own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import torch
from torch import Tensor

from lpc_runner.schema import PositiveFloat, at_least, checked

Decay = Annotated[float, at_least(0)]


class Adam:
    """Adam (Kingma and Ba 2015) with weight decay 0: `build` gives a torch optimiser for θ or for φ.

    learning_rate: for both θ and φ. betas: decay of first and second moment. eps: added to the denominator.
    """

    @checked
    def __init__(self, learning_rate: PositiveFloat, betas: list[Decay], eps: PositiveFloat) -> None:
        if len(betas) != 2 or max(betas) >= 1:
            raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
        self.learning_rate, self.betas, self.eps = learning_rate, betas, eps

    def build(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        """A fresh optimiser over `parameters`; on CUDA one kernel for all of them."""
        parameters = list(parameters)
        fused = all(parameter.is_cuda for parameter in parameters) or None
        return torch.optim.Adam(parameters, lr=self.learning_rate, betas=tuple(self.betas), eps=self.eps, fused=fused)
