"""What is compared: ways to make one update from the same images, in one process, taking turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, get_args

import torch

from benchmarks.floor import torchs_layers, wait
from benchmarks.literal import literal_gradients
from benchmarks.rivals import BETA, EPS, STEP_SIZE, jax_chain, torchebm_chain
from lpc_runner.base.distributions import DiscretisedGaussian
from lpc_runner.base.ranks import SINGLE, Ranks
from lpc_runner.data.dataset import Batch
from lpc_runner.inference.engine import EngineName, Precision, make_engine
from lpc_runner.inference.objectives import WeightedKL
from lpc_runner.inference.preconditioning import Adam as PerSample
from lpc_runner.inference.preconditioning import SharedAdam
from lpc_runner.inference.samplers import Langevin, NoSteps
from lpc_runner.inference.step_sizes import Constant
from lpc_runner.models.conv import Conv
from lpc_runner.training.learner import AdamOptimizer, Learner
from lpc_runner.training.update import UpdateNoise

VAE = "VAE batch"
CHANNELS, LATENT_DIM = 3, 40
# Engine and precision of every row of ours: what the device can do.
Way = tuple[EngineName, Precision]
WAYS: dict[str, tuple[Way, ...]] = {
    "cpu": (("eager", "fp32"), ("compiled", "fp32"), ("eager", "bf16")),
    "cuda": (
        ("eager", "fp32"),
        *(("cuda_graph", precision) for precision in get_args(Precision)),
        *(("compiled", precision) for precision in get_args(Precision)),
    ),
}


@dataclass(frozen=True)
class Work:
    """One size of the task: images of 3 x side x side, T steps, B images per update."""

    side: int
    num_steps: int
    batch: int


@dataclass
class Variant:
    """One way to make an update.

    num_steps: T, 0 without a chain. baseline: the variant it is compared with, '' for none. engine, precision: of ours.
    times: s per update, by round.
    """

    name: str
    num_steps: int
    update: Callable[[int], Any]
    baseline: str = ""
    engine: str = ""
    precision: Precision = "fp32"
    times: list[float] = field(default_factory=list)

    def quartiles(self) -> tuple[float, float, float]:
        """Of the time per update over rounds, s."""
        low, median, high = statistics.quantiles(self.times, n=4, method="inclusive")
        return low, median, high


def images(work: Work, device: torch.device) -> torch.Tensor:
    """Random levels: time does not depend on what images show."""
    levels = torch.randint(
        256, (work.batch, CHANNELS, work.side, work.side), generator=torch.Generator().manual_seed(0)
    )
    return (levels.float() / 127.5 - 1).to(device)


def build_model(side: int, device: torch.device) -> Conv:
    """The paper's network with the default's likelihood, at its first σ."""
    torch.manual_seed(0)
    return Conv((CHANNELS, side, side), LATENT_DIM, 1.0, DiscretisedGaussian("learned", 1.0, 0.99), 0.3).to(device)


def build_learner(
    work: Work,
    device: torch.device,
    sampler: Any,
    objective: WeightedKL,
    way: Way = ("eager", "fp32"),
    ranks: Ranks = SINGLE,
) -> Learner:
    """Fresh weights and optimisers; way: engine and precision."""
    model = build_model(work.side, device)
    encoder, optimizer = model.build_encoder().to(device), AdamOptimizer(1e-4, [0.9, 0.999], 1e-8)
    return Learner(model, encoder, sampler, objective, optimizer, ranks, make_engine(*way, device))


def ours(learner: Learner, batch: Batch, update: int) -> None:
    """One whole update."""
    learner.apply(batch, learner.gradients(batch, 0, update, False))


def literally(learner: Learner, batch: Batch, update: int) -> None:
    """The same by `benchmarks/literal.py` and torch's own layers."""
    noise = UpdateNoise(0, update, (len(batch.x), LATENT_DIM), batch.x.device)
    model, encoder, objective = learner.model, learner.encoder, learner.objective
    assert isinstance(model, Conv) and isinstance(objective, WeightedKL) and encoder is not None
    with learner.engine.arithmetic(), torchs_layers(model):
        result = literal_gradients(
            model, encoder, learner.sampler, objective, batch, noise=noise, start_from_prior=False
        )
    for parameter, gradient in zip([*model.parameters(), *encoder.parameters()], [*result.theta, *result.phi]):
        parameter.grad = gradient
    for optimizer in (learner.theta_optimizer, learner.phi_optimizer):
        assert optimizer is not None
        optimizer.step()


def chain(num_steps: int, theta_states: str = "all", every: int = 1, metric: type = PerSample) -> Langevin:
    """The sampler of all variants, but for what is named."""
    return Langevin(num_steps, theta_states, Constant(STEP_SIZE), metric(BETA, EPS, None), theta_every=every)


def build_variants(
    work: Work, device: torch.device, engines: Sequence[str], others: Sequence[str] = ("torchebm", "JAX")
) -> tuple[list[Variant], list[str]]:
    """Every row that this machine can run, and a line for each that it cannot.

    engines: which of ours. others: which packages beside it; JAX in exact float32, on CUDA, where XLA by itself takes
    TF32, in both.
    """
    data = Batch(images(work, device), torch.arange(work.batch, device=device))
    jeffreys, reverse = WeightedKL(0.5, 0.5), WeightedKL(0.0, 1.0)

    def variant(name, make, objective=jeffreys, baseline="literal, jeffreys", way=("eager", "fp32"), **more) -> Variant:
        learner = build_learner(work, device, chain(work.num_steps, **more), objective, way)
        return Variant(name, work.num_steps, partial(make, learner, data), baseline, *way)

    ways = [way for way in WAYS[device.type] if way[0] in engines]
    auto: Way = ("cuda_graph" if device.type == "cuda" else "eager", "fp32")
    auto = auto if auto in ways else ways[0]
    variants = [
        variant("literal, jeffreys", literally),
        variant("literal, reverse", literally, reverse, "literal, reverse"),
        *(variant("ours, jeffreys", ours, way=way) for way in ways),
        variant("ours, reverse", ours, reverse, "literal, reverse", auto),
        variant("ours, jeffreys, adam_shared", ours, way=auto, metric=SharedAdam),
        variant("ours, jeffreys, theta_every=4 (less work)", ours, way=auto, every=4),
        variant("ours, jeffreys, theta_states=last (less work)", ours, way=auto, theta_states="last"),
    ]
    # Captured where the chains are, so that equal seconds compare methods and not launches.
    for name, way in {VAE: auto, f"{VAE}, launched by Python": ("eager", "fp32")}.items():
        if way != auto or name == VAE:
            vae = build_learner(work, device, NoSteps(None, None), reverse, way)
            variants.append(Variant(name, 0, partial(ours, vae, data), engine=way[0]))
    skipped = []
    makers: list[tuple[str, Callable[..., Any]]] = [("torchebm {}, z alone, no θ (less work)", torchebm_chain)]
    makers.append(("JAX {} jit(scan), chain with θ, no encoder (less work)", jax_chain))
    if device.type == "cuda":
        makers.append(("JAX {} in TF32, the same", lambda *arguments: jax_chain(*arguments, precision="tensorfloat32")))
    for name, make in makers:
        if not name.startswith(tuple(others)):
            continue
        try:
            update, version = make(build_model(work.side, device), data.x, work.num_steps)
        except (ImportError, RuntimeError) as error:
            skipped.append(f"{name.format('').split(',')[0].strip()}: not measured: {str(error).splitlines()[0]}")
            continue
        variants.append(Variant(name.format(version), work.num_steps, update, "literal, jeffreys"))
    return variants, skipped


def measure(variants: list[Variant], rounds: int, device: torch.device) -> None:
    """Fill `times`: each round times every variant once (the VAE: mean of ten), every other round backwards.

    One untimed round comes first, in which code is compiled and graphs are captured.
    """
    for index in range(-1, rounds):
        for variant in variants if index % 2 else reversed(variants):
            repeats = 1 if variant.num_steps else 10
            wait(device)
            start = time.perf_counter()
            for repeat in range(repeats):
                variant.update((index + 1) * repeats + repeat)
            wait(device)
            if index >= 0:
                variant.times.append((time.perf_counter() - start) / repeats)


def ratio(slow: Variant, fast: Variant) -> float:
    """Median over rounds of slow / fast, each pair from the same round."""
    return statistics.median(a / b for a, b in zip(slow.times, fast.times))


def rows_of(variants: list[Variant]) -> list[dict[str, Any]]:
    """What was measured, one dictionary per variant: ms per step and update, quartiles, paired ratios."""
    by_name = {variant.name: variant for variant in variants}
    rows = []
    for variant in variants:
        low, middle, high = (1e3 * value for value in variant.quartiles())
        base = by_name.get(variant.baseline)
        rows.append(
            {
                "variant": variant.name,
                "engine": variant.engine,
                "precision": variant.precision,
                "ms_per_step": middle / variant.num_steps if variant.num_steps else None,
                "ms_per_update": middle,
                "quartiles_ms": [low, high],
                "times_faster_than_literal": ratio(base, variant) if base else None,
                "vae_batches": ratio(variant, by_name[VAE]),
            }
        )
    return rows
