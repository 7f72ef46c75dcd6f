"""Slots on this machine's GPUs, leased by file locks: whoever dies, in whatever way, gives its slot back."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lpc_runner.base.files import plain_name

INTERVAL = 0.5  # seconds between two looks for a free slot


def lease_folder() -> Path:
    """Where this user's slots are locked: never a network folder, for every host has GPUs of its own."""
    return Path(tempfile.gettempdir()) / f"lpc_runner-gpus-{os.getuid()}"


def visible_gpus(count: int) -> list[str]:
    """Names of the GPUs 0 .. count - 1 of this process that mean the same GPU to every process of the machine."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(count)]
    return [plain_name(name.strip()) for name in names[:count]]


@contextmanager
def gpu_slot(names: list[str], slots_per_gpu: int, folder: Path | None = None) -> Iterator[int]:
    """Hold one slot; yields the GPU's index in `names`, the emptiest one's first. Waits until a slot is free."""
    folder = folder or lease_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    while (lock := _first_free(names, slots_per_gpu, folder)) is None:
        time.sleep(INTERVAL)
    index, held = lock
    try:
        yield index
    finally:
        held.release()


def _first_free(names: list[str], slots_per_gpu: int, folder: Path) -> tuple[int, FileLock] | None:
    for slot in range(slots_per_gpu):  # a second run on a GPU only when every GPU has one
        for index, name in enumerate(names):
            lock = FileLock(folder / f"{name}-{slot}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            return index, lock
    return None
