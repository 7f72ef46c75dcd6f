"""What it saves and costs to let threads sleep while they wait, with and without other work."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.floor import median_seconds
from benchmarks.scaling import update_of
from benchmarks.variants import Work
from lpc_runner.base.surroundings import VARIABLES
from lpc_runner.base.tensors import keep_freed_memory

POLICIES = {"spinning": {}, "asleep": {"OMP_WAIT_POLICY": "PASSIVE"}}


def _update(work: Work, num_threads: int) -> float:
    """s per Jeffreys update."""
    torch.set_num_threads(num_threads)
    keep_freed_memory()
    device = torch.device("cpu")
    return median_seconds(update_of(work, device, ("eager", "fp32")), device, 3)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """For processes started within: `values` and no other variable about waiting."""
    before = {name: os.environ.pop(name) for name in VARIABLES if name in os.environ}
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            del os.environ[name]
        os.environ.update(before)


def _compute() -> None:
    """Other work: one thread that never waits."""
    while True:
        pass


@contextmanager
def _other_work(count: int) -> Iterator[None]:
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=_compute, daemon=True) for _ in range(count)]
    for process in others:
        process.start()
    try:
        yield
    finally:
        for process in others:
            process.kill()
            process.join()


def waits(work: Work, rounds: int, others: Sequence[int]) -> dict[str, Any]:
    """ms per update by policy, number of other busy processes, and round; the policies take turns within a round.

    Each update is in a process of its own, for OpenMP reads its variables once. load: the machine's load average over
    one minute at the start, which says whether it was idle.
    """
    load, rows = os.getloadavg()[0], []
    for count in others:
        times: dict[str, list[float]] = {policy: [] for policy in POLICIES}
        with _other_work(count):
            for index in range(rounds):
                for policy in POLICIES if index % 2 else reversed(POLICIES):
                    with _environment(POLICIES[policy]):
                        pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
                        with pool:
                            seconds = pool.submit(_update, work, torch.get_num_threads()).result()
                    times[policy].append(1e3 * seconds)
        pairs = [asleep / spinning for spinning, asleep in zip(times["spinning"], times["asleep"])]
        row = {policy: statistics.quantiles(found, n=4, method="inclusive") for policy, found in times.items()}
        rows.append({"others": count, "quartiles_ms": row, "asleep_over_spinning": statistics.median(pairs)})
    return {"work": vars(work), "rounds": rounds, "load": load, "measured": time.strftime("%Y-%m-%d"), "rows": rows}


def markdown_of_waits(result: dict[str, Any]) -> str:
    """The table of `waits`."""
    work = result["work"]
    lines = [
        f"3x{work['side']}x{work['side']} images, batch {work['batch']}, T = {work['num_steps']}, fp32, each update "
        f"in a process of its own, {result['rounds']} rounds; load average at the start {result['load']:.1f}.",
        "",
        "| other busy processes | spinning: ms per update | asleep: ms per update | asleep / spinning, paired |",
        "|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        spinning, asleep = (
            f"{middle:.0f} ({low:.0f}-{high:.0f})" for low, middle, high in map(row["quartiles_ms"].get, POLICIES)
        )
        lines.append(f"| {row['others']} | {spinning} | {asleep} | {row['asleep_over_spinning']:.2f} |")
    return "\n".join(lines)
