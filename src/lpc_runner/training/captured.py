"""The whole update of an objective without a chain, on fixed tensors, so that a device can be given it as one graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lpc_runner.inference.context import Context
from lpc_runner.inference.engine import Blocked
from lpc_runner.training.update import Combined, UpdateNoise


@dataclass
class FixedNoise(UpdateNoise):
    """Random numbers in fixed tensors, one for every purpose that the first run asked for."""

    fixed: dict[tuple, Tensor] = field(default_factory=dict)

    def normal(self, stream: str, *more: int) -> Tensor:
        key = (stream, *more)
        if key not in self.fixed:
            self.fixed[key] = super().normal(stream, *more).clone()
        return self.fixed[key]

    def within(self, stream: str, *counters: int) -> UpdateNoise:
        raise RuntimeError("an objective with capturable = True takes its random numbers by noise.normal alone")

    def load(self, noise: UpdateNoise) -> None:
        """Those of another update."""
        for key, target in self.fixed.items():
            target.copy_(noise.normal(*key))


class GradientProgram:
    """Gradients of batches of one shape; calling it sets the parameters' .grad and returns what `compute` returns.

    The values are the engine's working memory until the next call. compute: Context -> Combined, without a question to
    the device.
    """

    def __init__(self, engine: Blocked, compute: Callable[[Context], Combined], context: Context) -> None:
        self.compute, self.parameters = compute, [*context.theta, *context.phi]
        values = {name: torch.clone(value) for name, value in vars(context.batch).items()}
        self.batch, self.noise = replace(context.batch, **values), FixedNoise(**vars(context.noise))
        self.context = replace(context, batch=self.batch, noise=self.noise)
        self.run()  # asks for all random numbers there are
        self.launch = engine.launcher(self.run)

    def run(self) -> None:
        """What is launched."""
        self.result = self.compute(self.context)
        self.gradients = [parameter.grad for parameter in self.parameters]

    def __call__(self, context: Context) -> Combined:
        for name, value in vars(context.batch).items():
            getattr(self.batch, name).copy_(value)
        self.noise.load(context.noise)
        self.launch()
        for parameter, gradient in zip(self.parameters, self.gradients):
            parameter.grad = gradient
        return self.result


def _may_be_captured(optimizer: torch.optim.Optimizer) -> bool:
    """Adam is, where its steps are one kernel; an encoder's optimiser of one's own need not be."""
    groups = optimizer.param_groups
    return all("capturable" in group and (group["fused"] or not group["params"][0].is_cuda) for group in groups)


def step_program(engine: Blocked, optimizers: list[torch.optim.Optimizer]) -> Callable[[], None]:
    """The optimisers' steps on gradients at fixed places, once each has made a step, and so has state and kernels."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]

    def steps() -> None:
        for optimizer in optimizers:
            optimizer.step()

    before = [group["capturable"] for group in groups]
    try:
        for group in groups:
            group["capturable"] = bool(group["fused"])
        return engine.launcher(steps, warm=False)  # a run to warm up would be a step
    finally:
        for group, setting in zip(groups, before):
            group["capturable"] = setting


class WholeUpdates:
    """Programs of a learner without a chain, by the shape of its batches."""

    def __init__(self, engine: Blocked) -> None:
        self.engine = engine
        self.clear()

    def clear(self) -> None:
        """Forget them: the optimisers' state or the parameters lie elsewhere now."""
        self._gradients: dict[tuple, GradientProgram] = {}
        self._steps: dict[tuple, Callable[[], None]] = {}
        self._stepped = False

    def gradients(self, compute: Callable[[Context], Combined], context: Context) -> Combined:
        """`compute(context)`."""
        key = tuple((name, value.shape, value.dtype) for name, value in vars(context.batch).items())
        if key not in self._gradients:
            self._gradients[key] = GradientProgram(self.engine, compute, context)
        return self._gradients[key](context)

    def step(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """One step of each, for gradients that `gradients` has set."""
        parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        if not self._stepped or not all(map(_may_be_captured, optimizers)):
            for optimizer in optimizers:
                optimizer.step()
            self._stepped = True
            return
        key = tuple(id(parameter.grad) for parameter in parameters)
        if key not in self._steps:
            self._steps[key] = step_program(self.engine, optimizers)
        self._steps[key]()
