"""Weak and strong scaling of a run over gloo ranks on one machine: python -m benchmarks.ranks --ranks 1 2 --batch 32"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.report import processor
from benchmarks.variants import LATENT_DIM, Work, build_learner, images, ours
from lpc_runner.base.ranks import Ranks
from lpc_runner.base.tensors import keep_freed_memory
from lpc_runner.data.dataset import Batch
from lpc_runner.inference.objectives import WeightedKL
from lpc_runner.inference.preconditioning import Adam, SharedAdam
from lpc_runner.inference.samplers import Langevin
from lpc_runner.inference.step_sizes import Constant


def numbers_per_update(num_parameters: int, num_scalars: int, num_maxima: int, size: int) -> int:
    """Length of the vector that one update sums over `size` ranks: gradients, logged values, maxima, the stop flag.

    num_parameters: of θ and φ, and what parts of the sampler take from the chain (`fisher`: d).
    """
    return num_parameters + num_scalars + num_maxima * size + 1


def bytes_per_update(
    num_parameters: int, size: int, *, num_steps: int = 0, shared_dim: int = 0, item: int = 4, num_scalars: int = 8
) -> float:
    """Bytes that each rank sends per update, for an all_reduce that sends 2 (P - 1)/P of its vector (ring, tree).

    num_parameters: of θ and φ. num_steps, shared_dim: T and d where `adam_shared` averages d numbers per step, else 0.
    item: bytes of a number. num_scalars: logged values.
    """
    numbers = numbers_per_update(num_parameters, num_scalars, 1, size) + num_steps * shared_dim
    return 2 * (size - 1) / size * numbers * item


def measure(size: int, work: Work, rounds: int, shared: bool) -> tuple[float, int]:
    """Median seconds per update (the slowest rank's) of `size` one-thread processes; numbers in θ and φ.

    work.batch: of all ranks together. shared: `adam_shared`, which averages over the ranks at every step.
    """
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    processes = [
        context.Process(target=_rank, args=(rank, size, port, work, rounds, shared, answers)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0, "a rank failed; its traceback is above"
    found = [answers.get() for _ in processes]
    return max(seconds for seconds, _ in found), found[0][1]


def _rank(rank: int, size: int, port: int, work: Work, rounds: int, shared: bool, answers: Any) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in where.items()}
    ranks = Ranks.connect()
    metric = (SharedAdam if shared else Adam)(0.25, 1e-8, None)
    sampler = Langevin(work.num_steps, "all", Constant(1e-3), metric)
    device = torch.device("cpu")
    learner = build_learner(work, device, sampler, WeightedKL(0.5, 0.5), ranks=ranks)
    rows = ranks.rows(work.batch)
    batch = Batch(images(work, device)[rows], torch.arange(work.batch)[rows])
    times = []
    for update in range(rounds + 2):  # two to warm up
        start = time.perf_counter()
        ours(learner, batch, update)
        times.append(time.perf_counter() - start)
    assert learner.encoder is not None
    parameters = [*learner.model.parameters(), *learner.encoder.parameters()]
    answers.put((statistics.median(times[2:]), sum(parameter.numel() for parameter in parameters)))
    ranks.close()


def tabulate(sizes: list[int], side: int, num_steps: int, batch: int, rounds: int, shared: bool) -> Table:
    """Weak scaling: `batch` images per rank; strong: `batch` images in all. Efficiency against one rank."""
    table = Table()
    for column in ("scaling", "ranks", "batch", "ms / update", "images / s", "efficiency", "MB sent / update, rank"):
        table.add_column(column, justify="right")
    first: dict[str, float] = {}
    for name in ("weak", "strong"):
        for size in sizes:
            total = batch * size if name == "weak" else batch
            seconds, num_parameters = measure(size, Work(side, num_steps, total), rounds, shared)
            speed = total / seconds
            first.setdefault(name, speed / size)
            dim = LATENT_DIM if shared else 0
            sent = bytes_per_update(num_parameters, size, num_steps=num_steps, shared_dim=dim) / 1e6
            numbers = (f"{1e3 * seconds:.0f}", f"{speed:.1f}", f"{speed / size / first[name]:.2f}", f"{sent:.1f}")
            table.add_row(name, str(size), str(total), *numbers)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks (default: 1 2)")
    parser.add_argument("--side", type=int, default=32, help="pixels (default: 32)")
    parser.add_argument("--steps", type=int, default=50, help="steps of the chain, T (default: 50)")
    parser.add_argument("--batch", type=int, default=32, help="images per rank (weak) or in all (strong; default: 32)")
    parser.add_argument("--rounds", type=int, default=5, help="timed updates (default: 5)")
    parser.add_argument("--shared", action="store_true", help="preconditioning=adam_shared, which talks at every step")
    given = parser.parse_args()
    console = Console(width=110)
    console.print(f"CPU {processor()}; torch {torch.__version__}; one thread per rank; conv, T = {given.steps}")
    console.print(tabulate(given.ranks, given.side, given.steps, given.batch, given.rounds, given.shared))


if __name__ == "__main__":
    main()
