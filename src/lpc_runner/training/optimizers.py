"""Optimisers by the names of this project; each builds torch's own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import torch
from torch import Tensor

from lpc_runner.base.schema import PositiveFloat, at_least, checked

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

    def build_by_row(self, parameters: Iterable[Tensor], learning_rate: float) -> torch.optim.Optimizer:
        """The same for tables, every row of which belongs to one example; learning_rate: the tables' own."""
        return RowAdam(parameters, learning_rate, tuple(self.betas), self.eps)


def restore(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Moments and settings of a checkpoint, from whatever device; how a step is launched stays this device's way."""
    launched = ("fused", "foreach", "capturable")
    groups = [
        {**saved, **{key: own[key] for key in launched if key in own}}
        for saved, own in zip(state["param_groups"], optimizer.param_groups)
    ]
    optimizer.load_state_dict({**state, "param_groups": groups})


class RowAdam(torch.optim.Optimizer):
    """Adam on each row of a table by itself: a row whose gradient is 0 keeps still, with its moments and its count.

    torch's Adam moves every row at every step by its momentum, and its SparseAdam corrects the bias of all rows by
    one common count of steps. Here a row takes the path of an Adam that sees this row's batches only.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for table in group["params"]:
                self._step(table, self.state[table], group["lr"], *group["betas"], group["eps"])

    @staticmethod
    def _step(table: Tensor, state: dict[str, Tensor], lr: float, beta: float, beta_square: float, eps: float) -> None:
        if not state:
            state["count"] = table.new_zeros(len(table), *[1] * (table.ndim - 1))
            state["mean"], state["mean_square"] = torch.zeros_like(table), torch.zeros_like(table)
        rows = table.grad.flatten(1).any(1).nonzero().squeeze(1)
        gradient, count = table.grad[rows], state["count"][rows] + 1
        mean = torch.lerp(gradient, state["mean"][rows], beta)
        square = torch.lerp(gradient.square(), state["mean_square"][rows], beta_square)
        state["count"][rows], state["mean"][rows], state["mean_square"][rows] = count, mean, square
        scale = (square / (1 - beta_square**count)).sqrt() + eps
        table[rows] -= lr * mean / (1 - beta**count) / scale
