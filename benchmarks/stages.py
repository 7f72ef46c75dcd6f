"""`python -m benchmarks.stages STAGE FILE SECONDS DEVICE OUT [quick] [SETTINGS]`: one stage of the suite.

Each number is printed and kept in FILE as soon as it is there; a failure is a result like any other. After a failed
capture a process is not to be trusted, so it ends there. quick: the smallest sizes, for a test of the suite itself.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.accuracy import drift_errors, markdown_of_errors
from benchmarks.deferred import deferred_bound, markdown_of_deferred
from benchmarks.floor import measured_rates, wait
from benchmarks.rivals import jax_chain
from benchmarks.scaling import profile
from benchmarks.throughput import markdown_of_throughput, throughput
from benchmarks.training import train
from benchmarks.variants import WAYS, Way, Work, build_learner, build_model, build_variants, chain, images, rows_of
from benchmarks.variants import ours as one_update
from lpc_runner.base.bins import log_bin_probability
from lpc_runner.base.tensors import keep_freed_memory
from lpc_runner.data.dataset import Batch
from lpc_runner.inference.engine import EngineName, Precision
from lpc_runner.inference.objectives import WeightedKL

# Relative difference of logged values after two updates of 40 steps, captured or compiled against the loop.
CLOSE = {"fp32": 1e-2, "tf32": 5e-2, "bf16": 5e-2}


class Stage:
    """Where a stage keeps its numbers and how long it has."""

    def __init__(self, path: Path, seconds: float, device: torch.device, out: Path, quick: bool, words: list[str]):
        self.path, self.seconds, self.device, self.out, self.quick, self.words = (
            path,
            seconds,
            device,
            out,
            quick,
            words,
        )
        self.begun, self.kept = time.monotonic(), {}
        # Of ours: what the device captures, or else the loop.
        self.captured: EngineName = "cuda_graph" if device.type == "cuda" else "eager"
        self.ways = WAYS[device.type]

    def left(self) -> float:
        """Seconds until the limit."""
        return self.seconds - (time.monotonic() - self.begun)

    def work(self, side: int, num_steps: int, batch: int = 64) -> Work:
        """That size, or the smallest."""
        return Work(28, 3, 2) if self.quick else Work(side, num_steps, batch)

    def keep(self, name: str, value: Any) -> None:
        """One number, or several, of this stage."""
        self.kept[name] = value
        self.path.write_text(json.dumps(self.kept, indent=1), encoding="utf-8")
        print(f"{name}: {value}" if name != "text" else value, flush=True)

    def attempt(self, name: str, work: Callable[[], Any], seconds: float = 8.0) -> None:
        """Do it if so many seconds are left; an error is kept in the place of the number."""
        if self.left() < seconds:
            self.keep(name, f"not measured: {self.left():.0f} s were left")
            return
        try:
            work()
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
            self.keep(name, f"failed: {reason}")
            traceback.print_exc(limit=-8)
            if "captur" in reason.lower() or "CUDA error" in reason:
                sys.exit(3)

    def timed(self, name: str, update: Callable[[int], Any], num_steps: int, rounds: int = 5) -> None:
        """First call, and median, least and largest ms of later updates."""

        def once(number: int) -> float:
            wait(self.device)
            start = time.perf_counter()
            update(number)
            wait(self.device)
            return time.perf_counter() - start

        first, times = once(0), []
        while len(times) < rounds and (len(times) < 2 or sum(times) < self.seconds / 4):
            times.append(1e3 * once(len(times) + 1))
        middle = statistics.median(times)
        row = {"first_s": first, "ms": middle, "least_ms": min(times), "largest_ms": max(times), "rounds": len(times)}
        self.keep(name, row | {"us_per_step": 1e3 * middle / max(num_steps, 1)})


def _learner(stage: Stage, work: Work, way: Way) -> tuple[Any, Batch]:
    data = Batch(images(work, stage.device), torch.arange(work.batch, device=stage.device))
    return build_learner(work, stage.device, chain(work.num_steps), WeightedKL(0.5, 0.5), way), data


def _same(stage: Stage, side: int, way: Way) -> None:
    """Two updates by the loop and by an engine: logged numbers agree. A zero gradient would show."""
    work, seen = stage.work(side, 40), []
    for engine in ("eager", way[0]):
        learner, data = _learner(stage, work, (engine, way[1]))
        for update in range(2):
            gradients = learner.gradients(data, 0, update, update == 0)
            learner.apply(data, gradients)
        seen.append({name: float(value) for name, value in gradients.scalars.items()})
        finite = bool(gradients.finite)
    worst = max((abs(a - seen[1][name]) / (abs(a) + 1e-3), name) for name, a in seen[0].items())
    stage.keep(f"{' '.join(way)}, {side} pixels, equals the loop", finite and worst[0] < CLOSE[way[1]])
    stage.keep(f"{' '.join(way)}, {side} pixels, largest difference", worst)


def _likelihood_off(device: torch.device) -> float:
    """Largest difference of log P and its slope from float64 on a CPU, over 1 + |value|: core, tails and end bins."""
    x = (torch.arange(256)[:, None] / 127.5 - 1).expand(256, 200)
    mean, found = x + torch.linspace(-6, 6, 200), []
    for place, dtype in ((device, torch.float32), (torch.device("cpu"), torch.float64)):
        at, log_scale = mean.to(place, dtype).requires_grad_(), torch.full((), math.log(0.1), device=place)
        value = log_bin_probability(x.to(place, dtype), at, log_scale.to(dtype))
        found.append(torch.stack([value.detach(), *torch.autograd.grad(value.sum(), at)]).cpu().double())
    return float(((found[0] - found[1]).abs() / (1 + found[1].abs())).max())


def smoke(stage: Stage) -> None:
    """The device, its rates, the likelihood's kernel, and captured = loop."""
    stage.keep("machine", report.machine(stage.device))
    start = time.perf_counter()
    difference = _likelihood_off(stage.device)
    stage.keep("the likelihood's kernel is right", [difference < 1e-4, difference, time.perf_counter() - start])
    precisions: set[Precision] = {precision for _, precision in stage.ways}
    for precision in sorted(precisions):
        stage.attempt(
            f"rates {precision}",
            lambda precision=precision: stage.keep(f"rates {precision}", measured_rates(stage.device, precision)),
        )
        for side in (28, 32, 64):
            way: Way = (stage.captured, precision)
            stage.attempt(f"{way} {side}", partial(_same, stage, side, way))


def tests(stage: Stage, select: str = "not compiled") -> None:
    """The tests marked cuda."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-vv",
        "-p",
        "no:cacheprovider",
        "-m",
        "cuda",
        "-k",
        select,
        "--tb=short",
    ]
    done = subprocess.run([*command, "tests/test_engine.py", *stage.words], check=False)
    stage.keep("pytest", done.returncode)
    if done.returncode:
        sys.exit(1)


def compare(stage: Stage, side: int) -> None:
    """Every variant of one size, one after the other, what matters most first; JAX has a process of its own."""
    work = stage.work(side, 300)
    engines = tuple(dict.fromkeys(engine for engine, _ in stage.ways if engine != "compiled"))
    variants, skipped = build_variants(work, stage.device, engines, others=() if stage.quick else ("torchebm",))
    for line in skipped:
        stage.keep(line.partition(":")[0], line)
    order = sorted(variants, key=lambda variant: variant.engine != stage.captured)
    for variant in order:
        name = f"{variant.name}, {variant.engine} {variant.precision}"

        def time_it(variant=variant, name=name) -> None:
            stage.timed(name, variant.update, variant.num_steps, 2 if variant.name.startswith("literal") else 5)
            variant.times = [stage.kept[name]["ms"] / 1e3] * 2

        stage.attempt(name, time_it)
    measured = [variant for variant in variants if variant.times]
    if len(measured) == len(variants):
        stage.keep("rows", rows_of(measured))


def compiled(stage: Stage) -> None:
    """Compiled = loop, then its times."""
    for side in (32, 64):
        for engine, precision in (way for way in stage.ways if way[0] == "compiled"):
            way = (engine, precision)

            def one(side=side, way=way) -> None:
                _same(stage, side, way)
                work = stage.work(side, 300)
                learner, data = _learner(stage, work, way)
                update = partial(one_update, learner, data)
                stage.timed(f"{' '.join(way)}, {side} pixels", update, work.num_steps)

            stage.attempt(f"{' '.join(way)}, {side} pixels", one, 25.0 if not stage.quick else 0.0)


def jax(stage: Stage) -> None:
    """Exact float32 and TF32, which is XLA's default on a card that has it."""
    for precision in ("float32", "tensorfloat32"):
        for side in (32, 64):

            def one(precision=precision, side=side) -> None:
                work = stage.work(side, 300)
                model, x = build_model(work.side, stage.device), images(work, stage.device)
                update, version = jax_chain(model, x, work.num_steps, precision)
                stage.timed(f"JAX {version} {precision}, {side} pixels", update, work.num_steps, 4)

            stage.attempt(f"JAX {precision}, {side} pixels", one, 20.0 if not stage.quick else 0.0)


def layouts(stage: Stage) -> None:
    """Cheap changes to what is captured: the layouts of x and of the weights, cuDNN's own search."""
    cases: tuple[tuple[int, Precision], ...] = ((32, "fp32"), (64, "fp32"))
    if stage.device.type != "cpu":
        cases = ((32, "fp32"), (32, "tf32"), (64, "tf32"), (32, "bf16"))
    for side, precision in cases:
        for last, contiguous, search in ((0, 0, 0), (1, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 1)):
            words = [word for word, on in (("x last", last), ("contiguous", contiguous), ("search", search)) if on]
            name = f"{side} pixels {precision}, {', '.join(words) or 'as it is'}"

            way: Way = (stage.captured, precision)

            def one(side=side, way: Way = way, last=last, contiguous=contiguous, search=search, name=name) -> None:
                work = stage.work(side, 96)
                learner, data = _learner(stage, work, way)
                if contiguous:
                    for module in (learner.model, learner.encoder):
                        module.to(memory_format=torch.contiguous_format)
                if last:
                    data.x.data = data.x.contiguous(memory_format=torch.channels_last)
                with torch.backends.cudnn.flags(benchmark=bool(search)):
                    stage.timed(name, partial(one_update, learner, data), work.num_steps, 4)

            stage.attempt(name, one)


def branches(stage: Stage) -> None:
    """R learners' chains as parallel branches of one graph: what one device gives when a batch leaves it idle."""
    from benchmarks.branches import branched

    cases: tuple[tuple[int, Precision, int], ...] = (
        (32, "tf32", 1), (32, "tf32", 4), (32, "tf32", 8), (32, "fp32", 1), (32, "fp32", 4), (64, "tf32", 1),
        (64, "tf32", 4), (32, "bf16", 4),
    )  # fmt: skip
    for side, precision, number in cases:
        if stage.device.type != "cuda":
            stage.keep("branches", "not measured: graphs need a CUDA device")
            return
        name = f"{side} pixels {precision}, R = {number}"

        def one(side=side, precision: Precision = precision, number=number, name=name) -> None:
            replay = branched(stage.work(side, 32), precision, number, stage.device)
            stage.timed(name, lambda _: [replay() for _ in range(8)], 8 * 32 * number)

        stage.attempt(name, one)


def fleets(stage: Stage) -> None:
    """R runs trained together by one process (hydra/launcher=fleet) against one alone: updates a second in all."""
    from benchmarks.fleet import updates_per_second

    precisions: tuple[Precision, ...] = ("tf32", "fp32") if stage.device.type == "cuda" else ("fp32",)
    for precision in precisions:
        alone = f"32 pixels {precision}, one run alone, updates a second"
        for number in (1, 2) if stage.quick else (1, 4, 8):
            name = alone if number == 1 else f"32 pixels {precision}, R = {number}, updates a second"

            def one(precision: Precision = precision, number=number, name=name, alone=alone) -> None:
                rate = updates_per_second(number, stage.device, precision, stage.quick)
                stage.keep(name, rate)
                if number > 1 and isinstance(stage.kept[alone], float):
                    stage.keep(f"32 pixels {precision}, R = {number}, times one run alone", rate / stage.kept[alone])

            stage.attempt(name, one, 15.0 if not stage.quick else 0.0)


def examine(stage: Stage) -> None:
    """Precisions against float64; what deferred weight gradients could save."""
    errors = drift_errors(stage.work(32, 1), stage.device)
    stage.keep("errors", errors)
    found = deferred_bound(stage.work(32, 1), stage.device)
    stage.keep("deferred", found)
    stage.keep("text", f"{markdown_of_errors(errors)}\n\n{markdown_of_deferred(found)}")


def profiled(stage: Stage) -> None:
    """Share of each kernel class."""
    precisions: set[Precision] = {precision for engine, precision in stage.ways if engine == stage.captured}
    for precision in sorted(precisions):
        for side in (32, 64):
            name = f"{side} pixels {precision}"
            work = partial(profile, stage.work(side, 64), stage.device, (stage.captured, precision))
            stage.attempt(name, lambda name=name, work=work: stage.keep(name, work()))


def grown(stage: Stage) -> None:
    """Memory against T, time against T, batch and side."""
    steps = (1, 2, 3) if stage.quick else (32, 320, 3200)
    result = report.growth(stage.work(32, 300), stage.device, (stage.captured, "fp32"), steps)
    stage.keep("growth", result)
    stage.keep("text", report.markdown_of_growth(result))


def shared(stage: Stage) -> None:
    """Runs per hour with several at once."""
    result = throughput((1, 2, 4), str(stage.device))
    stage.keep("runs per hour", result)
    stage.keep("text", markdown_of_throughput(result))


STAGES: dict[str, Callable[[Stage], None]] = {
    "smoke": smoke,
    "tests": tests,
    "tests-compiled": lambda stage: tests(stage, "compiled"),
    **{f"compare-{side}": partial(compare, side=side) for side in (28, 32, 64)},
    "compiled": compiled,
    "jax": jax,
    "layouts": layouts,
    "branches": branches,
    "fleet": fleets,
    "accuracy": examine,
    "profile": profiled,
    "growth": grown,
    "throughput": shared,
    "train": train,
}


def main() -> None:
    """One stage, as the suite starts it."""
    name, path, seconds, device, out, *words = sys.argv[1:]
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or JAX takes three quarters of the memory
    keep_freed_memory()
    quick = words[:1] == ["quick"]
    stage = Stage(Path(path), float(seconds), torch.device(device), Path(out), quick, words[1:] if quick else words)
    STAGES[name](stage)


if __name__ == "__main__":
    main()
