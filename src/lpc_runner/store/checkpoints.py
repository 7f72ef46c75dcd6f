"""Checkpoints that are whole or passed over: atomic writes, the content's SHA-256 in the name, the last two kept."""

from __future__ import annotations

import hashlib
import io
import logging
from pathlib import Path
from typing import Any

import torch

from lpc_runner.base.files import write_atomically
from lpc_runner.store.runs import checkpoint_files, lost

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
    found = checkpoint_files(folder)
    for update, expected, path in found:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() == expected:
            return torch.load(io.BytesIO(content), map_location=device, weights_only=True)
        logger.warning("checkpoint %s is damaged (after update %d): falling back to the one before", path, update)
    if found:
        raise lost(f"all {len(found)} checkpoints in {folder} are damaged")
    return None
