"""How memory and time grow with T, batch and image side, and where the time goes."""

from __future__ import annotations

import multiprocessing
import re
import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from benchmarks.floor import median_seconds, wait
from benchmarks.variants import Way, Work, build_learner, chain, images, ours
from lpc_runner.base.tensors import keep_freed_memory
from lpc_runner.data.dataset import Batch
from lpc_runner.inference.objectives import WeightedKL

# Kernel classes by what a kernel or operator is called; the first that fits counts.
CLASSES = {
    "likelihood and element-wise": r"elementwise|vectorized|triton_poi|triton_per|silu|erfc|aten::(mul|add|sub|div|neg|"
    r"exp|log|pow|where|sqrt|abs|square|clamp|lerp|gt|lt|reciprocal|maximum|_foreach)",
    "convolution": r"conv|cudnn|dgrad|wgrad|fprop|implicit|mkldnn",
    "matrix product": r"gemm|matmul|aten::(mm|addmm|bmm)|cutlass",
    "reduction": r"reduce|triton_red|aten::(sum|mean|norm|linalg_vector_norm|max)|cub::",
    "copy and fill": r"copy|fill|memcpy|memset|cat|aten::(zero_|stack|contiguous|clone)",
    "random numbers": r"normal|philox|distribution",
    "optimiser": r"adam",
}


def update_of(work: Work, device: torch.device, way: Way, make: Callable = ours) -> Callable[..., Any]:
    """A Jeffreys update of fresh weights, by its number; make: `ours` or `literally`."""
    data = Batch(images(work, device), torch.arange(work.batch, device=device))
    learner = build_learner(work, device, chain(work.num_steps), WeightedKL(0.5, 0.5), way)
    return lambda number=0: make(learner, data, number)


def time_of(work: Work, device: torch.device, way: Way, rounds: int = 3) -> float:
    """Median ms per Jeffreys update."""
    return 1e3 * median_seconds(update_of(work, device, way), device, rounds)


def _peak_on_cpu(work: Work, num_threads: int) -> float:
    torch.set_num_threads(num_threads)
    keep_freed_memory()
    update = update_of(work, torch.device("cpu"), ("eager", "fp32"))
    update(0)
    update(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def peak_memory(work: Work, device: torch.device, way: Way) -> float:
    """MiB: on CUDA, the most that two updates allocated, graphs included; on a CPU, a fresh process's largest set."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(device)
        torch.cuda.reset_peak_memory_stats(device)
        update = update_of(work, device, way)
        update(0)
        update(1)
        wait(device)
        return (torch.cuda.max_memory_reserved(device) - before) / 2**20
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_on_cpu, work, torch.get_num_threads()).result()


def profile(work: Work, device: torch.device, way: Way) -> dict[str, Any]:
    """Share of each kernel class in one update's time on the device, and the five longest kernels."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    update = update_of(work, device, way)
    update(0)
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with record(activities=activities) as recorded:
        update(1)
        wait(device)
    spent: dict[str, float] = {}
    for event in recorded.key_averages():
        own = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        if own > 0 and not (on_cuda and event.key.startswith(("aten::", "cuda"))):
            spent[event.key] = spent.get(event.key, 0.0) + own
    total = sum(spent.values())
    shares: dict[str, float] = {}
    for name, own in spent.items():
        found = (kind for kind, pattern in CLASSES.items() if re.search(pattern, name, re.IGNORECASE))
        kind = next(found, "other")
        shares[kind] = shares.get(kind, 0.0) + own / total
    longest = sorted(spent, key=spent.__getitem__, reverse=True)[:5]
    return {"shares": shares, "longest": {name[:80]: spent[name] / total for name in longest}, "total_ms": total / 1e3}
