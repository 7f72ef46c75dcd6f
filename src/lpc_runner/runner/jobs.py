"""What a command hands to its jobs, whether they run here or in a launcher's workers, and what they hand back.

The cells of a sweep are planned before Hydra starts any, and a job takes its cell from that plan. Sweepers that search
(Optuna, Ax, Nevergrad) propose a run given those before it: a job plans that one itself and notes it for the command.
Jobs that share the GPUs of a machine lease slots by file locks: a process that dies, however, gives its slot back.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from omegaconf import DictConfig

from lpc_runner.base.errors import UserError
from lpc_runner.base.files import plain_name, write_atomically
from lpc_runner.base.surroundings import environment
from lpc_runner.config.compose import Cell, choices_of, resolved, starts_workers_here
from lpc_runner.config.options import as_dict
from lpc_runner.runner.plan import Planned, plan

logger = logging.getLogger(__name__)

_PLAN = "LPC_RUNNER_PLAN"  # environment variable with the path of the sweep's plan, which launchers pass on
_FOLDER = "LPC_RUNNER_PROPOSED"  # environment variable with the folder that jobs note their cells in, for launchers
INTERVAL = 0.5  # seconds between two looks for a free slot


@contextmanager
def frozen(cells: list[Cell], write: bool = True) -> Iterator[None]:
    """Keep a sweep's cells in a file that its jobs read, today or when a cluster starts them: what was checked is run.

    Without it a job composes its configuration again from conf/, which may have been edited meanwhile.
    """
    if len(cells) == 1:
        with environment({_PLAN: None}):  # of a sweep whose job started this command
            yield
        return
    content = json.dumps([_record(cell) for cell in cells], indent=1)
    folder = Path(cells[0].cfg.output_dir).absolute() / ".sweeps"
    path = folder / f"plan-{hashlib.sha256(content.encode()).hexdigest()[:16]}.json"
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    with environment({_PLAN: str(path)}):
        yield


def cell_of_job(cfg: DictConfig, hydra_cfg: DictConfig) -> Cell:
    """The cell that Hydra hands to a job: of a sweep, as it was planned. Raises UserError if the plan is lost."""
    path = os.environ.get(_PLAN)
    if path is None:
        return resolved(cfg, choices_of(hydra_cfg), list(hydra_cfg.overrides.task))
    try:
        records = json.loads(Path(path).read_text(encoding="utf-8"))
        # Not by their number: shuffle() gives Hydra another order than it gave the plan.
        given = list(hydra_cfg.overrides.task)
        return _cell_of(next(record for record in records if record["overrides"] == given))
    except (FileNotFoundError, ValueError, LookupError, TypeError, StopIteration):
        raise UserError(f"{path}, this sweep's plan, is gone or damaged; the same command writes it anew") from None


def _record(cell: Cell) -> dict[str, Any]:
    return {"overrides": cell.overrides, "choices": cell.choices, "cfg": as_dict(cell.cfg, resolve=True)}


def _cell_of(record: dict[str, Any]) -> Cell:
    return Cell(DictConfig(record["cfg"]), record["choices"], tuple(record["overrides"]))


@contextmanager
def proposing(output_dir: str) -> Iterator[Path]:
    """Jobs started within it belong to a searching sweeper; they write their cells into the folder that it yields."""
    above = Path(output_dir).absolute() / ".sweeps"
    above.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="proposed-", dir=above) as folder, environment({_FOLDER: folder}):
        yield Path(folder)


def is_proposed() -> bool:
    """Whether this process runs a job of a sweeper that searches."""
    return _FOLDER in os.environ


def note_proposed(cell: Cell, number: int) -> None:
    """Write the cell of the sweep's job `number`, from 0, for the command, which reports all runs at the end."""
    write_atomically(Path(os.environ[_FOLDER]) / f"{number:06d}.json", json.dumps(_record(cell)))


def proposed_runs(folder: Path) -> list[Planned]:
    """Every run that was proposed and planned, once, in the order of proposal."""
    runs = [plan(_cell_of(json.loads(path.read_text(encoding="utf-8")))) for path in sorted(folder.glob("*.json"))]
    return list({run.directory.name: run for run in runs}.values())


@contextmanager
def leased(planned: Planned, hydra_cfg: DictConfig) -> Iterator[None]:
    """A GPU slot for a run that shares this machine with others of its sweep; nothing on a CPU or under a scheduler."""
    device = planned.experiment.device
    alone = not starts_workers_here(hydra_cfg.launcher._target_) or device.type != "cuda" or device.index is not None
    if alone or planned.directory.state() == "done":
        yield
        return
    with gpu_slot(visible_gpus(torch.cuda.device_count()), planned.cell.cfg.runs_per_gpu) as index:
        logger.info("%s takes GPU %d", planned.directory.name, index)
        torch.cuda.set_device(index)
        planned.experiment.device = torch.device("cuda", index)
        yield


def visible_gpus(count: int) -> list[str]:
    """Names of this process's GPUs 0 .. count - 1, each the same for all processes of the machine."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(count)]
    return [plain_name(name.strip()) for name in names[:count]]


@contextmanager
def gpu_slot(names: list[str], slots_per_gpu: int, folder: Path | None = None) -> Iterator[int]:
    """Hold one slot; yields the GPU's index in `names`, the emptiest one's first. Waits until a slot is free.

    folder: of the slots, by default one of this user on this machine: each host has GPUs of its own.
    """
    folder = folder or Path(tempfile.gettempdir()) / f"lpc_runner-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    while (slot := _first_free(names, slots_per_gpu, folder)) is None:
        time.sleep(INTERVAL)
    index, lock = slot
    try:
        yield index
    finally:
        lock.release()


def _first_free(names: list[str], slots_per_gpu: int, folder: Path) -> tuple[int, FileLock] | None:
    for slot in range(slots_per_gpu):  # a second run on a GPU only when every GPU has one
        for index, name in enumerate(names):
            lock = FileLock(folder / f"{name}-{slot}.lock")
            with suppress(Timeout):
                lock.acquire(timeout=0)
                return index, lock
    return None
