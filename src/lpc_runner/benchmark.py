"""Time per Langevin step and per update: Algorithm 1 as written, ours, and a VAE batch, in one run.

The variants take turns round by round, so that a machine that slows down slows all of them alike;
medians are compared.
"""

from __future__ import annotations

import logging
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lpc_runner.data.dataset import Batch
from lpc_runner.distributions import DiscretisedGaussian
from lpc_runner.inference.literal import literal_gradients
from lpc_runner.inference.objectives import Objective
from lpc_runner.inference.preconditioning import Adam as PerSample
from lpc_runner.inference.preconditioning import SharedAdam
from lpc_runner.inference.samplers import Langevin, NoSteps
from lpc_runner.inference.step_sizes import Constant
from lpc_runner.models.conv import Conv
from lpc_runner.training.distributed import SINGLE, Ranks
from lpc_runner.training.learner import Learner
from lpc_runner.training.optimizers import Adam
from lpc_runner.training.update import UpdateNoise

logger = logging.getLogger(__name__)
VAE = "VAE batch"
CHANNELS, LATENT_DIM = 3, 40


@dataclass
class Variant:
    """One way to make an update.

    num_steps: T, 0 without a chain. baseline: the variant it is compared with. times: s per update, by round.
    """

    name: str
    num_steps: int
    update: Callable[[int], None]
    baseline: str
    times: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Median over rounds of the time per update."""
        return statistics.median(self.times)


def learner_for(side: int, sampler: Any, objective: Objective, device: torch.device, ranks: Ranks = SINGLE) -> Learner:
    """The paper's convolutional model and encoder, of fixed random weights."""
    torch.manual_seed(0)
    model = Conv((CHANNELS, side, side), LATENT_DIM, 1.0, DiscretisedGaussian("learned", 0.1, 0.99), 0.3)
    optimizer = Adam(1e-4, [0.9, 0.999], 1e-8)
    return Learner(model.to(device), model.build_encoder().to(device), sampler, objective, optimizer, ranks)


def _ours(learner: Learner, batch: Batch, update: int) -> None:
    learner.apply(batch, learner.gradients(batch, 0, update, False))


def _literally(learner: Learner, batch: Batch, update: int) -> None:
    noise = UpdateNoise(0, update, (len(batch.x), LATENT_DIM), batch.x.device)
    model, encoder = learner.model, learner.encoder
    result = literal_gradients(
        model, encoder, learner.sampler, learner.objective, batch, noise=noise, start_from_prior=False
    )
    for parameter, gradient in zip([*model.parameters(), *encoder.parameters()], [*result.theta, *result.phi]):
        parameter.grad = gradient
    learner.theta_optimizer.step()
    learner.phi_optimizer.step()


def build_variants(side: int, num_steps: int, batch: int, device: torch.device) -> list[Variant]:
    """All that is compared, on images of random levels: time does not depend on what they show."""
    levels = torch.randint(256, (batch, CHANNELS, side, side), generator=torch.Generator().manual_seed(0))
    data = Batch((levels.float() / 127.5 - 1).to(device), torch.arange(batch, device=device))
    objectives = {"jeffreys": Objective(0.5, 0.5), "reverse": Objective(0.0, 1.0)}
    per_sample, shared = PerSample(0.25, 1e-8, None), SharedAdam(0.25, 1e-8, None)
    chains = {
        metric: Langevin(num_steps, "all", Constant(1e-3), preconditioner)
        for metric, preconditioner in (("adam", per_sample), ("adam_shared", shared))
    }

    def variant(name: str, make: Callable, metric: str, objective: str, baseline: str) -> Variant:
        learner = learner_for(side, chains[metric], objectives[objective], device)
        return Variant(name, num_steps, partial(make, learner, data), baseline)

    vae = learner_for(side, NoSteps(None, None), objectives["reverse"], device)
    return [
        variant("literal, jeffreys", _literally, "adam", "jeffreys", "literal, jeffreys"),
        variant("ours, jeffreys", _ours, "adam", "jeffreys", "literal, jeffreys"),
        variant("ours, jeffreys, adam_shared", _ours, "adam_shared", "jeffreys", "literal, jeffreys"),
        variant("literal, reverse", _literally, "adam", "reverse", "literal, reverse"),
        variant("ours, reverse", _ours, "adam", "reverse", "literal, reverse"),
        Variant(VAE, 0, partial(_ours, vae, data), VAE),
    ]


def measure(variants: list[Variant], rounds: int, device: torch.device) -> None:
    """Fill `times`: each round times every variant once (the VAE: mean of ten), after an untimed one."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for index in range(-1, rounds):
        for variant in variants:
            repeats = 1 if variant.num_steps else 10
            wait()
            start = time.perf_counter()
            for repeat in range(repeats):
                variant.update((index + 1) * repeats + repeat)
            wait()
            if index >= 0:
                variant.times.append((time.perf_counter() - start) / repeats)


def processor() -> str:
    """The processor's model in words."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def header(side: int, num_steps: int, batch: int, rounds: int, device: torch.device) -> str:
    """What the numbers depend on, in two lines."""
    card = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    machine = f"device {device.type}{card}; CPU {processor()}"
    versions = f"torch {torch.__version__}; threads {torch.get_num_threads()}"
    work = f"{CHANNELS}x{side}x{side} images, conv, batch {batch}, T = {num_steps}"
    return f"{machine}; {versions}\n{work}; median (min - max) of {rounds} rounds"


def tabulate(variants: list[Variant]) -> Table:
    """ms per step and per update, speed against the literal algorithm, cost in VAE batches."""
    by_name = {variant.name: variant for variant in variants}
    table = Table()
    table.add_column("variant")
    for column in ("ms / step", "ms / update", "min - max", "times faster than literal", "VAE batches"):
        table.add_column(column, justify="right")
    for variant in variants:
        chain = variant.num_steps > 0
        low, high = min(variant.times), max(variant.times)
        table.add_row(
            variant.name,
            f"{1e3 * variant.seconds / variant.num_steps:.2f}" if chain else "",
            f"{1e3 * variant.seconds:.1f}",
            f"{1e3 * low:.1f} - {1e3 * high:.1f}",
            f"{by_name[variant.baseline].seconds / variant.seconds:.2f}" if chain else "",
            f"{variant.seconds / by_name[VAE].seconds:.1f}",
        )
    return table


def benchmark(side: int, num_steps: int, batch: int, rounds: int, device: torch.device) -> None:
    """Measure all variants and print one table; ms per step is an update's time divided by T."""
    variants = build_variants(side, num_steps, batch, device)
    logger.info("%d variants, %d rounds and one to warm up", len(variants), rounds)
    measure(variants, rounds, device)
    console = Console()
    console.print(header(side, num_steps, batch, rounds, device), soft_wrap=True, highlight=False)
    console.print(tabulate(variants))
