"""Time Algorithm 1 as written, ours by engine and precision, other packages, a VAE and the floor, side by side.

python -m benchmarks --side 32 --steps 50 --batch 64    one table
python -m benchmarks --growth                           memory against T; time against T, batch and side
python -m benchmarks --profile                          where an update's time goes, by kernel class
python -m benchmarks --accuracy                         error of each precision; what deferring could save
python -m benchmarks --kept-memory                      what it saves to keep freed memory
python -m benchmarks --waits 0,4                        threads that sleep or spin, beside 0 and 4 busy processes
python -m benchmarks --throughput 1,2                   runs per hour with so many runs at once
python -m benchmarks --cuda-suite FOLDER --seconds 290 --stages smoke,compare-32,tests
                                                               checks and all of this on a CUDA device, each stage
                                                               in a process with a limit; the stages: --help
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.accuracy import drift_errors, markdown_of_errors
from benchmarks.deferred import deferred_bound, markdown_of_deferred
from benchmarks.kept import kept_memory, markdown_of_kept
from benchmarks.scaling import profile
from benchmarks.suite import LIMITS, failed, run_suite
from benchmarks.throughput import markdown_of_throughput, throughput
from benchmarks.variants import Work
from benchmarks.waits import markdown_of_waits, waits
from lpc_runner.base.tensors import keep_freed_memory
from lpc_runner.models.conv import SIDES


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def stages_of(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in LIMITS]:
        raise argparse.ArgumentTypeError(f"no stage is called {unknown[0]!r}: {', '.join(LIMITS)}")
    return names


def several(text: str) -> int:
    if (value := positive(text)) < 2:  # quartiles
        raise argparse.ArgumentTypeError(f"must be at least 2, got {text}")
    return value


def measured(arguments: argparse.Namespace, device: torch.device) -> tuple[str, dict[Any, Any], str]:
    """Name, numbers and Markdown of the one stage that was asked for."""
    work = Work(arguments.side, arguments.steps, arguments.batch)
    way = ("cuda_graph" if device.type == "cuda" else "eager", "fp32")
    if arguments.growth:
        steps = (work.num_steps, 4 * work.num_steps, 16 * work.num_steps)
        name, result = "growth", report.growth(work, device, way, steps)
        text = report.markdown_of_growth(result)
    elif arguments.profile:
        name, result = "profile", profile(work, device, way)
        text = report.markdown_of_profile(result)
    elif arguments.accuracy:
        name, result = "accuracy", {"errors": drift_errors(work, device), "deferred": deferred_bound(work, device)}
        text = f"{markdown_of_errors(result['errors'])}\n\n{markdown_of_deferred(result['deferred'])}"
    elif arguments.kept_memory:
        name, result = "kept-memory", kept_memory(work, arguments.rounds)
        text = markdown_of_kept(result)
    elif arguments.waits:
        name, result = "waits", waits(work, arguments.rounds, [int(number) for number in arguments.waits.split(",")])
        text = markdown_of_waits(result)
    elif arguments.throughput:
        numbers = [positive(number) for number in arguments.throughput.split(",")]
        name, result = "throughput", throughput(numbers, arguments.device)
        text = markdown_of_throughput(result)
    else:
        engines = tuple(arguments.engines.split(","))
        name, result = f"compare-{work.side}", report.compare(work, arguments.rounds, device, engines)
        text = report.markdown_of(result)
    return name, result, text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=32, choices=SIDES, help="pixels (default: 32)")
    parser.add_argument("--steps", type=positive, default=50, help="steps of the chain, T (default: 50)")
    parser.add_argument("--batch", type=positive, default=64, help="images per update (default: 64)")
    parser.add_argument("--rounds", type=several, default=5, help="timed repetitions, at least 2 (default: 5)")
    parser.add_argument("--threads", type=positive, default=None, help="CPU threads (default: torch's)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")
    parser.add_argument("--engines", default="eager,compiled,cuda_graph", help="of ours (default: all there are)")
    parser.add_argument("--out", type=Path, default=None, help="folder for JSON and Markdown (default: none)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--growth", action="store_true", help="memory against T; time against T, batch and side")
    what.add_argument("--profile", action="store_true", help="time by kernel class")
    what.add_argument("--accuracy", action="store_true", help="precisions against float64; deferred weight gradients")
    what.add_argument("--kept-memory", action="store_true", help="with freed memory kept, and given back (CPU)")
    what.add_argument("--waits", metavar="N,M", help="threads asleep or spinning, beside N, M busy processes (CPU)")
    what.add_argument("--throughput", metavar="N,M", help="runs per hour with N, M runs at once")
    what.add_argument("--cuda-suite", type=Path, metavar="FOLDER", help="check and time everything on a CUDA device")
    parser.add_argument("--stages", type=stages_of, default=(), help=f"of the CUDA suite: {','.join(LIMITS)}")
    parser.add_argument("--seconds", type=positive, default=570, help="of the CUDA suite in all (default: 570)")
    parser.add_argument("--settings", default="", help="of the suite's training runs: 'dataset=cifar10 data_dir=...'")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if (arguments.device == "cuda" or arguments.cuda_suite) and not torch.cuda.is_available():
        sys.exit("torch finds no CUDA device here")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    keep_freed_memory()  # as every run does; it serves the other packages too
    if arguments.cuda_suite:
        words = arguments.settings.split()
        wrong = failed(run_suite(arguments.cuda_suite, arguments.stages, arguments.seconds, more=words))
        sys.exit(f"failed: {', '.join(wrong)} (log.txt has what they said)" if wrong else 0)
    device = torch.device(arguments.device)
    name, result, text = measured(arguments, device)
    if arguments.out is not None:
        report.Folder(arguments.out, device).keep(name, result, text)
    else:
        report.show(f"{report.markdown_of_machine(report.machine(device))}\n\n{text}")


if __name__ == "__main__":
    main()
