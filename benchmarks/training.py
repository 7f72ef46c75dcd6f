"""Training runs under a limit: whatever happens, their newest checkpoints come back in one archive each."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

METHODS = ("lpc_jeffreys", "vae", "lpc_reverse")
PACKED_EVERY = 60.0  # seconds: whoever ends the call early leaves checkpoints of at most this age
SAVING = 12.0  # seconds before the limit at which a run is told to save


def pack(runs: Path, out: Path) -> list[Path]:
    """One archive per run folder, with the newest of its checkpoints alone."""
    packed = []
    for run in sorted(runs.glob("*")):
        newest = sorted((run / "checkpoints").glob("*.pt"))[-1:]
        path = out / f"run-{run.name[:60]}.tar.gz"
        with tarfile.open(path, "w:gz", compresslevel=1) as archive:
            for file in sorted(run.rglob("*")):
                if file.is_file() and (file.suffix != ".pt" or file in newest):
                    archive.add(file, arcname=f"{run.name}/{file.relative_to(run)}")
        packed.append(path)
    return packed


def train(stage: Any) -> None:
    """METHODS one after the other on the stage's settings, as long as there is time; stage: `benchmarks.stages.Stage`.

    A run that is cut is told to save, and its archive goes on elsewhere by the same command.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that what follows `finally` runs
    with tempfile.TemporaryDirectory() as folder:
        place, process = Path(folder), None
        settings = [*stage.words, f"device={stage.device}", f"output_dir={folder}", "tracker=none"]
        try:
            for method in METHODS:
                if stage.left() < 2 * SAVING:
                    stage.keep(method, f"not started: {stage.left():.0f} s were left")
                    continue
                words = [sys.executable, "-m", "lpc_runner", f"method={method}", *settings]
                begun = packed = time.monotonic()
                process = subprocess.Popen(words, start_new_session=True)
                while process.poll() is None and stage.left() > SAVING:
                    time.sleep(0.2)
                    if time.monotonic() - packed > PACKED_EVERY:
                        pack(place / "runs", stage.out)
                        packed = time.monotonic()
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGTERM)
                    process.wait(SAVING)
                found = {"exit_code": process.returncode, "seconds": round(time.monotonic() - begun, 1)}
                stage.keep(method, found)
        finally:
            if process is not None and process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            pack(place / "runs", stage.out)
