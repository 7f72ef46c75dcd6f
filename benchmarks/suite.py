"""Everything there is to check and time on a CUDA device, in one short call: each stage in a process with a limit.

A stage that fails, hangs or runs out of time costs its own limit and nothing else; every number is kept as soon as it
is there. FOLDER gets results.json, benchmark.md, log.txt and one archive for each training run, eight files at most.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lpc_runner.base.files import write_atomically

# Seconds that a stage may take, in the order in which they run: what has to be believed before what is fast.
LIMITS = {
    "smoke": 60, "compare-32": 110, "tests": 110, "branches": 60, "fleet": 110, "profile": 40, "compare-64": 110,
    "accuracy": 30, "compiled": 120, "jax": 90, "growth": 60, "layouts": 80, "compare-28": 110, "tests-compiled": 240,
    "throughput": 120, "train": 420,
}  # fmt: skip
LEAST = 15.0  # seconds: with less left, a stage is named as not measured
GRACE = 6.0  # seconds between SIGTERM and SIGKILL


def run_suite(
    folder: Path, stages: Sequence[str] = (), seconds: float = 570.0, device: str = "cuda", more: Sequence[str] = ()
) -> dict[str, Any]:
    """Run the stages, all where none is named, and return what results.json holds.

    seconds: of the whole call. more: words for every stage (`benchmarks.stages`). A stage's results are its numbers,
    its exit code and its seconds; ended: it reached its limit.
    """
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as kept, (folder / "log.txt").open("a", encoding="utf-8") as log:
        for stage in stages or LIMITS:
            left = seconds - (time.monotonic() - started) - GRACE
            limit = min(LIMITS[stage], left)
            if limit < min(LEAST, LIMITS[stage]):
                results[stage] = {"not_measured": f"{left:.0f} s were left"}
            else:
                path = Path(kept) / f"{stage}.json"
                words = [stage, str(path), f"{limit:.1f}", device, str(folder.absolute()), *more]
                results[stage] = _one([sys.executable, "-m", "benchmarks.stages", *words], limit, log)
                if path.exists():
                    results[stage] |= json.loads(path.read_text(encoding="utf-8"))
            write_atomically(folder / "results.json", json.dumps(results, indent=1).encode())
            write_atomically(folder / "benchmark.md", markdown_of_suite(results).encode())
    return results


def _one(command: list[str], limit: float, log: Any) -> dict[str, Any]:
    """Run a stage, its lines to the terminal and the log; at its limit the whole group of processes is ended."""
    begun, ended = time.monotonic(), threading.Event()
    places = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    environment = {
        **os.environ,
        "PYTHONPATH": places,
        "PYTHONUNBUFFERED": "1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8", "errors": "replace"}
    process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)

    def end() -> None:
        ended.set()
        for number, grace in ((signal.SIGTERM, GRACE), (signal.SIGKILL, 0.0)):
            if process.poll() is None:
                os.killpg(process.pid, number)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(grace)

    timer = threading.Timer(limit, end)
    timer.start()
    try:
        with process:
            assert process.stdout is not None  # a pipe
            for line in process.stdout:
                log.write(line)
                log.flush()
                sys.stdout.write(line[:300])
                sys.stdout.flush()
    finally:
        timer.cancel()
    found = {"exit_code": process.returncode, "seconds": round(time.monotonic() - begun, 1)}
    return found | {"ended": True} if ended.is_set() else found


def failed(results: dict[str, Any]) -> list[str]:
    """Stages that left with an error."""
    return [stage for stage, found in results.items() if found.get("exit_code", 0) != 0]


def markdown_of_suite(results: dict[str, Any]) -> str:
    """Every stage's numbers, one line each, tables as they are."""
    lines = []
    for stage, found in results.items():
        lines += [f"## {stage}", ""]
        lines += [f"{value}\n" if name == "text" else f"- {name}: {value}" for name, value in found.items()]
        lines.append("")
    return "\n".join(lines)
