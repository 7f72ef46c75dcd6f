"""Arrays in a user's NPZ, HDF5 or MATLAB file: headers first, then the content, with every fault in one line."""

from __future__ import annotations

import math
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from lpc_runner.base.errors import UserError
from lpc_runner.data import hdf5
from lpc_runner.data.files import Header, damage_named, no_npz, npz_header

_MAX_COMPRESSION = 1100  # deflate, the usual filter of these formats, cannot exceed 1032
_MAX_INT = np.iinfo(np.int32).max
_MAX_FLOAT = float(np.finfo(np.float32).max)
# MATLAB's classes that hold real numbers.
_MATLAB = {"double": "f8", "single": "f4", "logical": "u1"} | {
    f"{sign}int{bits}": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
}


def read_headers(path: Path) -> dict[str, Header]:
    """dtype and shape of every array in the file, by key; no array is read.

    In an HDF5 file the keys are those of the root or, where it holds nothing but one group, of that group. Raises
    UserError for a missing, alien or damaged file. An array that cannot be used carries its `fault`.
    """
    kind, size = _format(path), path.stat().st_size
    with damage_named(path):
        headers = {"npz": _npz_headers, "hdf5": _hdf5_headers, "matlab": _matlab_headers}[kind](path)
    return {key: replace(header, fault=header.fault or _fault(header, size)) for key, header in headers.items()}


def read_array(path: Path, key: str) -> np.ndarray:
    """One array, after `read_headers` has found it sound. Raises UserError naming a damaged file."""
    kind = _format(path)
    with damage_named(path):
        if kind == "hdf5":
            with hdf5.opened(path) as file:
                return hdf5.read(file, key)
        if kind == "matlab":
            from scipy.io import loadmat

            return np.ascontiguousarray(loadmat(path, variable_names=[key])[key])
        with zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as member:
            return np.lib.format.read_array(member, allow_pickle=False)


def _format(path: Path) -> str:
    if not path.is_file():
        raise UserError(
            f"{path}: no such file, expected .npz, .h5 or .mat with arrays of shape (trials, time, neurons)"
        )
    with damage_named(path):
        if hdf5.is_hdf5(path):
            return "hdf5"
        with open(path, "rb") as file:
            start = file.read(128)
        if start[124:128] in (b"\x00\x01IM", b"\x01\x00MI"):
            return "matlab"
        if zipfile.is_zipfile(path):
            return "npz"
    raise UserError(f"{path}: {no_npz(path) or 'neither .npz nor HDF5 nor MATLAB, or cut short'}")


def _npz_headers(path: Path) -> dict[str, Header]:
    with zipfile.ZipFile(path) as file:
        keys = [name.removesuffix(".npy") for name in file.namelist() if name.endswith(".npy")]
        return {key: npz_header(file, key) for key in keys}


def _hdf5_headers(path: Path) -> dict[str, Header]:
    with hdf5.opened(path) as file:
        return hdf5.headers(file)


def _matlab_headers(path: Path) -> dict[str, Header]:
    from scipy.io import whosmat

    return {key: Header(np.dtype(_MATLAB.get(kind, object)), tuple(shape)) for key, shape, kind in whosmat(path)}


def _fault(header: Header, file_size: int) -> str:
    """Why no reader should ask for such an array."""
    if header.dtype.hasobject:
        return "holds no numbers but objects (often trials of unequal length: cut them to one length and stack them)"
    if header.dtype.kind not in "biuf":
        return f"holds no numbers but {header.dtype}"
    if math.prod(header.shape) * header.dtype.itemsize > _MAX_COMPRESSION * file_size:
        return f"claims shape {header.shape}, more than a file of {file_size:,} bytes can hold"
    return ""


# Content --------------------------------------------------------------------------------------------------


def check_numbers(path: Path, key: str, values: np.ndarray) -> None:
    """Raise UserError naming trial, bin and neuron of the first value (trials, T, N) that float32 cannot hold."""
    if values.dtype.kind != "f":
        return
    finite = "every value must be finite"
    missing = np.isnan(values)
    if missing.any():
        _refuse(path, key, values, missing, finite + _padding(missing))
    _refuse(path, key, values, np.isinf(values), finite)
    if values.dtype.itemsize > 4:
        _refuse(path, key, values, np.abs(values) > _MAX_FLOAT, "float32 ends at 3.4e38: give the data in another unit")


def _padding(missing: np.ndarray) -> str:
    """What to do where missing (trials, T, N) are the ends of trials."""
    lasting = np.asarray(missing.all(2))
    lengths = np.where(lasting.any(1), lasting.argmax(1), missing.shape[1])
    is_padding = np.array_equal(lasting, np.arange(missing.shape[1]) >= lengths[:, None])
    if not is_padding or not np.array_equal(missing.any(2), lasting):
        return ""
    return (
        f" (trials of unequal length, padded: cut all to one length, [:, :{lengths.min()}] is the shortest's, "
        "or leave the short ones out)"
    )


def as_counts(path: Path, key: str, values: np.ndarray) -> np.ndarray:
    """The same values as int32 (trials, T, N). Raises UserError naming the first that is no count."""
    check_numbers(path, key, values)
    if values.dtype.kind in "if":
        _refuse(path, key, values, values < 0, "spike counts cannot be negative")
    if values.dtype.kind == "f":
        rounded = values != np.floor(values)
        _refuse(path, key, values, rounded, "spike counts must be whole numbers (real-valued data: dataset=series)")
    _refuse(path, key, values, values > _MAX_INT, f"spike counts must be at most {_MAX_INT:,}")
    return values.astype(np.int32)


def _refuse(path: Path, key: str, values: np.ndarray, wrong: np.ndarray, rule: str) -> None:
    if not wrong.any():
        return
    trial, time, neuron = (int(index) for index in np.unravel_index(int(wrong.argmax()), wrong.shape))
    count = int(wrong.sum())
    others = f" and {count - 1:,} more" if count > 1 else ""
    raise UserError(
        f"{path}: {key} has {values[trial, time, neuron]} at trial {trial}, bin {time}, neuron {neuron}{others}: {rule}"
    )
