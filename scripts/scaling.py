"""Weak and strong scaling over gloo ranks on this machine: python scripts/scaling.py --ranks 1 2 --batch 32"""

import argparse

import torch
from rich.console import Console

from lpc_runner.benchmark.ranks import tabulate
from lpc_runner.benchmark.report import processor


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
