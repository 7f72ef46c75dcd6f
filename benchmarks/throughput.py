"""Runs per hour of a sweep of small runs, with one or several of them at once on one device."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

NUM_RUNS = 4
# The small siblings' runs on digits, without their measuring: what shares the device is training.
SETTINGS = ("experiment=small", "hydra.mode=MULTIRUN", "tracker=none", "metrics.every_epochs=0", "num_threads=1")
SETTINGS += ("metrics.extractor=random_conv", f"seed=range({NUM_RUNS})", "trainer.max_updates=264")


def throughput(at_once: Sequence[int], device: str) -> dict[int, float]:
    """Runs per hour, by how many run at once: NUM_RUNS runs of 264 updates, start-up and final metrics included.

    Raises RuntimeError with the sweep's last line if it fails.
    """
    found = {}
    for number in at_once:
        command = [sys.executable, "-m", "lpc_runner", *SETTINGS, f"device={device}"]
        command += ["hydra/launcher=parallel", f"hydra.launcher.n_jobs={number}", f"runs_per_gpu={number}"]
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            done = subprocess.run(
                command,
                cwd=folder,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                check=False,
            )
            seconds = time.perf_counter() - start
        if done.returncode:
            raise RuntimeError(f"the sweep failed: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
        found[number] = 3600 * NUM_RUNS / seconds
    return found


def markdown_of_throughput(found: dict[int, float]) -> str:
    """One row per number of runs at once."""
    first = next(iter(found.values()))
    rows = [f"| {number} | {rate:,.0f} | {rate / first:.2f} |" for number, rate in found.items()]
    return "\n".join(["| runs at once | runs per hour | ratio |", "|--:|--:|--:|", *rows])
