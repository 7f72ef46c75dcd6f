"""One update: its random numbers, an objective's gradients made those of the global batch, and all of it captured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from lpc_runner.base.ranks import SINGLE
from lpc_runner.base.schema import declared
from lpc_runner.base.tensors import generator
from lpc_runner.inference.chain import Chain, ChainNoise
from lpc_runner.inference.context import Context
from lpc_runner.inference.engine import Blocked
from lpc_runner.inference.interfaces import Objective, Part, parts_of

Combine = Callable[..., tuple[list[Tensor], dict[str, Tensor], Tensor]]  # Ranks.combine
ALONE: Combine = partial(SINGLE.combine, stop=False)


@dataclass
class UpdateNoise:
    """Every random number of one update, named by (seed, update): warm start, prior start, and ξ(1) .. ξ(T).

    shape: (B, d) of the global batch; rows: the slice of it that this process works on.
    """

    seed: int
    update: int
    shape: tuple[int, int]
    device: torch.device | str
    dtype: torch.dtype = torch.float32
    rows: slice = field(default_factory=lambda: slice(None))

    def normal(self, stream: str, *more: int) -> Tensor:
        """N(0, I), this process's rows of (*more, B, d), for the named purpose."""
        source = generator(self.seed, stream, self.update, device=self.device)
        draw = torch.randn((*more, *self.shape), generator=source, device=self.device, dtype=self.dtype)
        return draw[..., self.rows, :]

    def chain(self) -> ChainNoise:
        """ξ(t) of the chain."""
        return ChainNoise(self.seed, self.update, self.shape, self.device, self.dtype, self.rows)

    def within(self, stream: str, *counters: int) -> UpdateNoise:
        """The numbers of a part of this update, apart from all others."""
        return replace(self, seed=generator(self.seed, stream, *counters).initial_seed())


@dataclass
class Combined:
    """One batch of all ranks: gradients are set on the parameters' .grad, values are on the device, not yet read.

    z: this rank's last latents, (B, d). chain: None where the objective has none. scalars: logged quantities, each a
    0-d tensor. finite: 0-d bool, whether every gradient is finite. num_evaluations: gradients of log p(x, z) of one
    example that this took, on all ranks. stop: 0-d, ranks that were signalled. contributions: what each of the
    sampler's `parts_of` took from the chain, averaged over the ranks. usable: 0-d bool, whether none of them objects.
    """

    z: Tensor
    chain: Chain | None
    scalars: dict[str, Tensor]
    finite: Tensor
    num_evaluations: int
    stop: Tensor
    contributions: list[dict[str, Tensor]] = field(default_factory=list)
    usable: Tensor | None = None

    def verdict(self) -> bool:
        """Whether to make the update; waits for the device, once."""
        return bool(self.finite if self.usable is None else self.finite & self.usable)

    def read(self) -> dict[str, float]:
        """The scalars as numbers, by one transfer from the device."""
        values = torch.stack([value.to(torch.float64) for value in self.scalars.values()])
        return dict(zip(self.scalars, values.tolist()))


def compute_gradients(objective: Objective, context: Context, combine: Combine = ALONE) -> Combined:
    """The objective's gradients of θ, then of φ, made those of the global batch and set on the parameters.

    combine: see Ranks.combine; one message, which whatever else is averaged over ranks has to join, as do the
    contributions of the sampler's parts.
    """
    own = objective.gradients(context)
    scalars = {name: value.detach() for name, value in own.scalars.items()}
    scalars |= {f"train/{name}": value.detach() for name, value in context.model.likelihood.scalars().items()}
    maxima = {name: value.detach() for name, value in own.maxima.items()}
    parts = [] if own.chain is None or context.sampler.num_steps == 0 else parts_of(context.sampler)
    contributions = [declared(part, Part, "contribution")(own.chain) for part in parts]
    values = [value for named in contributions for value in named.values()]
    gradients, scalars, stop = combine([*own.theta, *own.phi, *values], {**scalars, "z": own.z.sum()}, maxima)
    num_theta, num_gradients = len(own.theta), len(own.theta) + len(own.phi)
    theta, phi, averaged = gradients[:num_theta], gradients[num_theta:num_gradients], gradients[num_gradients:]
    rest = iter(averaged)
    contributions = [{name: next(rest) for name in named} for named in contributions]
    scalars["train/theta_gradient_norm"] = _set(context.theta, theta)
    norms = [scalars["train/theta_gradient_norm"]]
    if context.phi:
        scalars["train/encoder_gradient_norm"] = _set(context.phi, phi)
        norms.append(scalars["train/encoder_gradient_norm"])
    # A sum is finite only if every term is: one number answers for all gradients.
    sums = [value.sum().to(norms[0].dtype) for value in (scalars.pop("z"), *averaged)]
    finite = torch.isfinite(torch.stack([*norms, *sums]).sum()) & own.finite
    num_evaluations = own.num_evaluations * (context.noise.shape[0] // len(own.z))  # times the number of ranks
    verdicts = [declared(part, Part, "usable")(named) for part, named in zip(parts, contributions)]
    verdicts = [verdict for verdict in verdicts if verdict is not None]
    usable = torch.stack(verdicts).all() if verdicts else None
    return Combined(own.z, own.chain, scalars, finite, num_evaluations, stop, contributions, usable)


def step_encoder(optimizer: torch.optim.Optimizer | None, combine: Combine, gradients: Sequence[Tensor]) -> bool:
    """One step of φ alone along the mean gradient of all ranks; False, and no step, where it is not finite."""
    assert optimizer is not None, "an objective without an encoder has no steps of φ"
    gradients, _, _ = combine(gradients, {}, {})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    finite = bool(torch.isfinite(_set(parameters, gradients)))
    if finite:
        optimizer.step()
    return finite


def _set(parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Each parameter's .grad; returns the norm of all of them together, 0-d."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(gradients))))


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


class WholeUpdates:
    """Programs of a learner without a chain, by the shape of its batches."""

    def __init__(self, engine: Blocked) -> None:
        self.engine = engine
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
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]

        def steps() -> None:
            for optimizer in optimizers:
                optimizer.step()

        # Adam can be captured where its steps are one kernel; an encoder's optimiser of one's own need not be.
        fixed = all("capturable" in group and (group["fused"] or not group["params"][0].is_cuda) for group in groups)
        if not fixed or not self._stepped:
            steps()
            self._stepped = True  # each has made a step, and so has state and kernels
            return
        key = tuple(id(parameter.grad) for group in groups for parameter in group["params"])
        if key not in self._steps:
            before = [group["capturable"] for group in groups]
            try:
                for group in groups:
                    group["capturable"] = bool(group["fused"])
                self._steps[key] = self.engine.launcher(steps, warm=False)  # a run to warm up would be a step
            finally:
                for group, setting in zip(groups, before):
                    group["capturable"] = setting
        self._steps[key]()
