"""Runs that one process trains together (hydra/launcher=fleet), and one alone: updates a second of all of them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

import lpc_runner
from lpc_runner.inference.engine import Precision
from lpc_runner.tracking.tracker import Sink

WARM = 3  # updates before the clock counts: captures, and what libraries load at first use


class Clock(Sink):
    """tracker._target_=benchmarks.fleet.Clock: when each update of each run was made."""

    times: ClassVar[dict[str, list[float]]] = {}

    def __init__(self, run_id: str) -> None:
        self.own = self.times.setdefault(run_id, [])

    def log(self, update: int, epoch: float, values: Mapping[str, float]) -> None:
        """Note the time, values aside."""
        self.own.append(time.perf_counter())


def rate(times: Sequence[Sequence[float]], warm: int) -> float:
    """Updates a second while every run is past `warm` updates and none has ended."""
    begun, ended = max(own[warm] for own in times), min(own[-1] for own in times)
    return sum(begun < made <= ended for own in times for made in own) / (ended - begun)


def updates_per_second(number: int, device: torch.device, precision: Precision, quick: bool) -> float:
    """Of `number` runs of the paper's method and network, batch 64, T = 300, 32 pixels; quick: of tiny ones."""
    words = ["model=conv", "sampler.num_steps=300", "trainer.batch_size=64", f"trainer.max_updates={WARM + 17}"]
    if quick:
        words = ["model=mlp", "model.hidden=[4]", "sampler.num_steps=2", "trainer.batch_size=8"]
        words += [f"trainer.max_updates={WARM + 2}"]
    words += ["tuned.method=null", "objective=jeffreys", "trainer.log_every=1", "traces.updates=[]"]
    words += ["traces.num_chains=0", "metrics.every_epochs=0", "metrics.num_samples=16", "metrics.max_references=16"]
    words += ["tracker=none", f"tracker._target_={__name__}.Clock", f"device={device}", f"precision={precision}"]
    together = ["hydra/launcher=fleet", f"runs_per_gpu={number}"] if number > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        shape = (1, 28, 28) if quick else (3, 32, 32)
        images = np.random.default_rng(0).integers(0, 256, (64 if quick else 1024, *shape), dtype=np.uint8)
        np.savez(Path(folder) / "images.npz", images=images)
        words += ["dataset=arrays", f"dataset.train={folder}/images.npz", f"output_dir={folder}/out"]
        Clock.times.clear()
        lpc_runner.run(["-m", f"seed=range({number})", *words, f"data_dir={folder}", *together])
    return rate(list(Clock.times.values()), WARM)
