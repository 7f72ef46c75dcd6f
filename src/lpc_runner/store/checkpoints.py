"""Tensors in files, verified by a SHA-256 when they are read: checkpoints, and caches of what can be computed again."""

from __future__ import annotations

import hashlib
import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lpc_runner.base.errors import UserError
from lpc_runner.base.files import is_refusal, write_atomically, write_cache
from lpc_runner.base.tensors import hash_of_tensors
from lpc_runner.store.runs import START_AGAIN, RunDirectory, checkpoint_files

logger = logging.getLogger(__name__)
KEPT = 2


def save_checkpoint(folder: Path, update: int, state: dict[str, Any]) -> Path:
    """Write `state` as the checkpoint after `update` updates, then delete all but the newest two."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"update-{update:09d}-{hashlib.sha256(content).hexdigest()}.pt"
    write_atomically(path, content)
    # The one just written counts as the newest: after a fall back, damaged files of later updates may lie beside it.
    others = [old for old in checkpoint_files(folder) if old.path != path]
    others.sort(key=lambda old: (old.update < update, old.update), reverse=True)
    for _, _, stale in others[KEPT - 1 :]:
        stale.unlink(missing_ok=True)
    return path


def load_checkpoint(folder: Path, device: torch.device | str = "cpu") -> dict[str, Any] | None:
    """The newest checkpoint whose content fits the hash in its name; None if the folder holds none.

    torch.load does not notice a flipped bit, so the hash is compared first. Raises UserError when checkpoints exist
    and none is whole: starting again from nothing must be the user's decision.
    """
    files = checkpoint_files(folder)
    for update, expected, path in files:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() == expected:
            return torch.load(io.BytesIO(content), map_location=device, weights_only=True)
        logger.warning("checkpoint %s is damaged (after update %d): falling back to the one before", path, update)
    if files:
        raise UserError(f"all {len(files)} checkpoints in {folder} are damaged; restore it, or {START_AGAIN}")
    return None


def require_checkpoint(run: RunDirectory, device: torch.device | str = "cpu", setting: str = "") -> dict[str, Any]:
    """`load_checkpoint` of a run that must have one; setting: by which it was named. Raises UserError (one line)."""
    state = load_checkpoint(run.checkpoints, device)
    if state is None:
        raise UserError(f"{setting}{run.path} has no checkpoint yet")
    return state


def write_sealed(path: Path, tensors: dict[str, Tensor], key: str) -> None:
    """Keep tensors in one file with a hash over their content and `key`."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
    np.savez(buffer, seal=_seal(tensors, key), **arrays)
    write_cache(path, buffer.getvalue())


def read_sealed(path: Path, key: str, what: str) -> dict[str, Tensor] | None:
    """The tensors kept under `key`; None, with a warning that `what` is computed again, if the file is not whole."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            tensors = {name: torch.from_numpy(archive[name]) for name in archive.files if name != "seal"}
            whole = str(archive["seal"]) == _seal(tensors, key)
        if not whole:
            raise ValueError("its hash does not fit its content")
    except Exception as error:  # zip, header and shape errors alike mean: compute it again
        state = "cannot be read" if is_refusal(error) else "is damaged"
        logger.warning("%s %s (%s); computing %s again", path, state, type(error).__name__, what)
        return None
    return tensors


def _seal(tensors: dict[str, Tensor], key: str) -> str:
    return hashlib.sha256((hash_of_tensors(tensors) + key).encode()).hexdigest()
