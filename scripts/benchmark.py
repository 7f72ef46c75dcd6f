"""Time Algorithm 1 as written, ours and a VAE: python scripts/benchmark.py --side 32 --steps 50 --batch 64"""

import argparse
import logging
import sys

import torch

from lpc_runner.benchmark import benchmark
from lpc_runner.models.conv import SIDES


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=32, choices=SIDES, help="pixels (default: 32)")
    parser.add_argument("--steps", type=positive, default=50, help="steps of the chain, T (default: 50)")
    parser.add_argument("--batch", type=positive, default=64, help="images per update (default: 64)")
    parser.add_argument("--rounds", type=positive, default=5, help="timed repetitions (default: 5)")
    parser.add_argument("--threads", type=positive, default=None, help="CPU threads (default: torch's)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch finds no CUDA device here")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    benchmark(arguments.side, arguments.steps, arguments.batch, arguments.rounds, device)


if __name__ == "__main__":
    main()
