"""What it saves to keep freed memory (`base/tensors.py`): an update in a process of its own, with and without."""

from __future__ import annotations

import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from benchmarks.floor import median_seconds
from benchmarks.scaling import update_of
from benchmarks.variants import Work, literally, ours
from lpc_runner.base.tensors import keep_freed_memory

_UPDATES = {"literal": literally, "ours": ours}


def _alone(work: Work, name: str, kept: bool, num_threads: int) -> float:
    torch.set_num_threads(num_threads)
    if kept and not keep_freed_memory():
        raise RuntimeError("another C library than glibc, or glibc's variables are set: there is nothing to compare")
    device = torch.device("cpu")
    return median_seconds(update_of(work, device, ("eager", "fp32"), _UPDATES[name]), device, 3)


def kept_memory(work: Work, rounds: int) -> dict[str, Any]:
    """ms per step of a Jeffreys update by variant and round; the variants take turns, every other round backwards."""
    variants = [(name, kept) for name in _UPDATES for kept in (False, True)]
    times: dict[tuple[str, bool], list[float]] = {variant: [] for variant in variants}
    for index in range(rounds):
        for name, kept in variants if index % 2 else reversed(variants):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                seconds = pool.submit(_alone, work, name, kept, torch.get_num_threads()).result()
            times[name, kept].append(1e3 * seconds / work.num_steps)
    base = times["literal", False]
    rows = []
    for (name, kept), found in times.items():
        low, middle, high = statistics.quantiles(found, n=4, method="inclusive")
        ratio = statistics.median(slow / fast for slow, fast in zip(base, found))
        rows.append({"variant": name, "kept": kept, "ms_per_step": middle, "quartiles_ms": [low, high], "ratio": ratio})
    return {"work": vars(work), "rounds": rounds, "rows": rows}


def markdown_of_kept(result: dict[str, Any]) -> str:
    """The table of `kept_memory`."""
    work = result["work"]
    lines = [
        f"3x{work['side']}x{work['side']} images, batch {work['batch']}, T = {work['num_steps']}, fp32, each in "
        f"a process of its own; {result['rounds']} rounds, ratios paired by round.",
        "",
        "| Jeffreys update | freed memory | ms per step | quartiles | faster than literal, as it comes |",
        "|---|---|--:|--:|--:|",
    ]
    for row in result["rows"]:
        low, high = row["quartiles_ms"]
        where = "kept" if row["kept"] else "as glibc does"
        lines.append(
            f"| {row['variant']} | {where} | {row['ms_per_step']:.1f} | {low:.1f}-{high:.1f} | {row['ratio']:.2f} |"
        )
    return "\n".join(lines)
