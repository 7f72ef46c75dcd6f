"""Files of tensors that save a computation: sealed by a hash, and read whole or not at all."""

from __future__ import annotations

import hashlib
import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lpc_runner.base.files import is_refusal, write_cache
from lpc_runner.base.tensors import hash_of_tensors

_log = logging.getLogger(__name__)


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
        _log.warning("%s %s (%s); computing %s again", path, state, type(error).__name__, what)
        return None
    return tensors


def _seal(tensors: dict[str, Tensor], key: str) -> str:
    return hashlib.sha256((hash_of_tensors(tensors) + key).encode()).hexdigest()
