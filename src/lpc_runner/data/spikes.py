"""The user's own sequences: spike counts or real-valued series in one NPZ or HDF5 file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from lpc_runner.base.errors import UserError
from lpc_runner.base.schema import NonNegativeInt, PositiveFloat, checked
from lpc_runner.data import nwb
from lpc_runner.data.dataset import Data, Split
from lpc_runner.data.files import Header, content_hash, file_state
from lpc_runner.data.sequence_files import as_counts, check_numbers, read_array, read_headers
from lpc_runner.data.sequences import COUNTS, SERIES, SequenceDataset, smallest_counts

# Keys of what is known beside the values, by part; the second spelling is that of the Neural Latents Benchmark.
_KNOWN = {
    "rates": (("train_rates", "valid_rates"),),
    "behaviour": (("train_behaviour", "valid_behaviour"), ("train_behavior", "eval_behavior")),
}
OPTIONAL = ("behaviour",)  # left out, with a line, where it does not fit the values


@dataclass(frozen=True)
class Layout:
    """Checked headers of a file. parts: keys of both splits. extras: keys by name. left_out: optional keys, why."""

    headers: dict[str, Header]
    parts: tuple[tuple[str, ...], tuple[str, ...]]
    extras: dict[str, tuple[str, str]]
    left_out: dict[tuple[str, ...], str]

    def shape(self, split: int) -> tuple[int, int, int]:
        """(trials, T, N) of the training (0) or validation (1) split."""
        first, *rest = (self.headers[key].shape for key in self.parts[split])
        return first[0], first[1], first[2] + sum(shape[2] for shape in rest)


def layout_of(
    path: Path, headers: dict[str, Header], columns: str, plain: tuple[str, str], held_out_keys: tuple
) -> Layout:
    """Headers checked against one another.

    columns: the last axis in words. plain, held_out_keys: the keys of both splits, or of their (held-in, held-out)
    neurons. Raises UserError naming file and key; an optional part that does not fit is left out.
    """
    try:
        parts = _parts(headers, plain, held_out_keys)
        for train, valid in zip(*parts):
            _require(_fault(train, headers[train], columns) or _fault(valid, headers[valid], columns))
            left, right = headers[train].shape, headers[valid].shape
            if left[1:] != right[1:]:
                hint = _trials_elsewhere(left, right)
                raise UserError(f"{valid} of shape {right} does not fit {train} of shape {left}{hint}")
        for first, *rest in parts:
            for key in rest:
                _require(_misfit(key, headers[key], headers[first]))
        return Layout(headers, parts, *_extras(headers, parts, columns))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _require(fault: str) -> None:
    if fault:
        raise UserError(fault)


def _parts(
    headers: dict[str, Header], plain: tuple[str, str], held_out_keys: tuple
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The keys of the training and of the validation split: one each, or held-in and held-out neurons."""
    present = ", ".join(sorted(headers)) or "none"
    if plain[0] in headers:
        parts = ((plain[0],), (plain[1],))
    elif held_out_keys and held_out_keys[0][0] in headers:
        parts = held_out_keys
    else:
        known = ", ".join(plain)
        if held_out_keys:
            known += " or " + ", ".join(key for keys in held_out_keys for key in keys)
        raise UserError(f"no key '{plain[0]}', found {present}; expected {known}")
    for key in (key for keys in parts for key in keys):
        if key not in headers:
            raise UserError(f"no key '{key}' beside '{parts[0][0]}', found {present}")
    return parts


def _extras(
    headers: dict[str, Header], parts: tuple, columns: str
) -> tuple[dict[str, tuple[str, str]], dict[tuple[str, ...], str]]:
    """Keys by name of what is known beside the values; optional keys that do not fit, with the reason."""
    extras, left_out = {}, {}
    num_columns = sum(headers[key].shape[2] for key in parts[0])
    for name, spellings in _KNOWN.items():
        for pair in spellings:
            present = [key for key in pair if key in headers]
            if len(present) == 1:
                missing = next(key for key in pair if key not in headers)
                faults = [f"'{present[0]}' without '{missing}': give both or none"]
            else:
                faults = [
                    _fault(key, headers[key], columns)
                    or _misfit(key, headers[key], headers[keys[0]])
                    or (_narrow(key, headers[key], num_columns, columns) if name == "rates" else "")
                    for key, keys in zip(present, parts)
                ]
            fault = next(filter(None, faults), "")
            if fault and name not in OPTIONAL:
                raise UserError(fault)
            if fault:
                left_out[tuple(present)] = fault
            elif present:
                extras[name] = pair
    return extras, left_out


def _fault(key: str, header: Header, columns: str) -> str:
    if header.fault:
        return f"{key} {header.fault}"
    if len(header.shape) != 3:
        hint = f": x.reshape(trials, time, {columns}) cuts one recording into trials" if len(header.shape) == 2 else ""
        return f"{key} must have shape (trials, time, {columns}), got {header.shape}{hint}"
    if 0 in header.shape:
        axis = ("trials", "time bins", columns)[header.shape.index(0)]
        return f"{key} has no {axis}, its shape is {header.shape}"
    return ""


def _misfit(key: str, header: Header, values: Header) -> str:
    """Whether trials and bins differ from those of the values."""
    if header.shape[:2] == values.shape[:2]:
        return ""
    return f"{key} must have {values.shape[0]} trials of {values.shape[1]} bins, got {header.shape}"


def _narrow(key: str, header: Header, num_columns: int, columns: str) -> str:
    return "" if header.shape[2] == num_columns else f"{key} has {header.shape[2]} {columns}, the data {num_columns}"


def _trials_elsewhere(left: tuple[int, ...], right: tuple[int, ...]) -> str:
    """A hint where the two splits differ in the length of another axis than the first."""
    differing = [axis for axis in range(3) if left[axis] != right[axis]]
    if len(differing) != 1:
        return ""
    return f" (if axis {differing[0]} is that of trials, np.moveaxis(x, {differing[0]}, 0) makes it the first)"


_MAX_NAMED = 8  # keys that are not read, in a line
# Keys left out, with the reason, by the state of a file that was read: each cell of a sweep asks.
_LEFT_OUT: dict[tuple, dict[tuple[str, ...], str]] = {}


class SequenceFile(SequenceDataset):
    """What spike counts and series in a file have in common.

    path: the file. num_held_out: how many of the last neurons to hold out; null: as many as the file says.
    bin_seconds: for the axes of pictures.
    """

    plain: ClassVar[tuple[str, str]]  # keys of the two splits
    columns: ClassVar[str]  # what the last axis is, in words
    held_out_keys: ClassVar[tuple[tuple[str, str], ...]] = ()  # keys of (held-in, held-out) neurons of the two splits

    def __init__(self, path: str, num_held_out: int | None, bin_seconds: float) -> None:
        self._path, self._num_held_out, self.bin_seconds = Path(path).expanduser(), num_held_out, bin_seconds

    @property
    def shape(self) -> tuple[int, ...]:
        """(T, N) from the headers, all neurons. Raises UserError if the file is missing or wrong."""
        return self._layout().shape(0)[1:]

    @property
    def num_train(self) -> int:
        """Training trials, from the headers. Raises UserError if the file is missing or wrong."""
        return self._layout().shape(0)[0]

    @property
    def num_held_out(self) -> int:
        """Last neurons that are held out: as chosen, or those of the file's own held-out keys. Raises UserError."""
        layout = self._layout()
        keys, headers = layout.parts[0], layout.headers
        own = headers[keys[1]].shape[2] if len(keys) == 2 else 0
        if self._num_held_out is None:
            return own
        if own:
            raise UserError(f"{self._path}: {keys[1]} says which neurons are held out: leave out dataset.num_held_out")
        count = headers[keys[0]].shape[2]
        if self._num_held_out >= count:
            raise UserError(f"{self._path}: dataset.num_held_out must be below its {count} neurons")
        return self._num_held_out

    def identity(self) -> dict[str, object]:
        """Kind, SHA-256 of the file, neurons held out; no path. Raises UserError if the file is missing."""
        self._layout()
        return {"name": self.name, "file": content_hash(self._path), "num_held_out": self.num_held_out}

    def account(self) -> list[str]:
        """What is taken for trials, time and neurons, what is left out and why. Raises UserError as `prepare`."""
        self.prepare()
        layout, path = self._layout(), self._path
        (num_train, num_bins, width), (num_valid, *_) = layout.shape(0), layout.shape(1)
        keys = [key for keys in layout.parts for key in keys]
        held_out = f" ({self.num_held_out} held out)" if self.num_held_out else ""
        notes = dict.fromkeys(layout.headers[key].note for key in keys if layout.headers[key].note)
        lines = [
            f"{path}: {num_train:,} trials to train on and {num_valid:,} to measure on, of {num_bins:,} time bins and "
            f"{width:,} {self.columns}{held_out}: {', '.join(keys)} (trials, time, {self.columns})"
            + "".join(f", {note}" for note in notes)
        ]
        left_out = layout.left_out | _LEFT_OUT[self._state()]
        lines += [f"{path}: {', '.join(keys)} left out: {why}" for keys, why in left_out.items()]
        used = {*keys, *(key for pair in (*left_out, *layout.extras.values()) for key in pair)}
        if others := sorted(set(layout.headers) - used):
            more = f" and {len(others) - _MAX_NAMED} more" if len(others) > _MAX_NAMED else ""
            lines.append(f"{path}: not read: {', '.join(others[:_MAX_NAMED])}{more}")
        return lines

    def prepare(self) -> None:
        """Read and check everything once. Raises UserError naming the file, key, trial and neuron at fault."""
        self._layout()
        if self._state() not in _LEFT_OUT:
            self.load()

    def load(self) -> Data:
        """Read and check both splits. Raises UserError naming the file, key, trial and neuron at fault."""
        layout, state = self._layout(), self._state()
        left_out: dict[tuple[str, ...], str] = {}
        extras: tuple[dict, dict] = ({}, {})
        for name, pair in layout.extras.items():
            try:
                read = [self._extra(key) for key in pair]
            except UserError as error:
                if name not in OPTIONAL:
                    raise
                left_out[pair] = str(error).removeprefix(f"{self._path}: ")
                continue
            for split, values in zip(extras, read):
                split[name] = values
        splits = []
        for keys, known in zip(layout.parts, extras):
            values = np.concatenate([self._values(key) for key in keys], axis=2)
            splits.append(Split(self._stored(values), extras=known))
        self._check_train(splits[0])
        _LEFT_OUT[state] = left_out
        return Data(*splits)

    def _state(self) -> tuple:
        return (self.name, *file_state(self._path))

    def _file_headers(self) -> dict[str, Header]:
        return read_headers(self._path)

    def _read(self, key: str) -> np.ndarray:
        return read_array(self._path, key)

    def _values(self, key: str) -> np.ndarray:
        raise NotImplementedError

    def _stored(self, values: np.ndarray) -> torch.Tensor:
        raise NotImplementedError

    def _check_train(self, train: Split) -> None:
        """Whatever training needs of its split beyond sound values."""

    def _extra(self, key: str) -> torch.Tensor:
        values = self._read(key)
        check_numbers(self._path, key, values)
        if self.kind == COUNTS and key.endswith("_rates") and (values < 0).any():
            raise UserError(f"{self._path}: {key} must be expected counts per bin, found {values.min()}")
        return torch.from_numpy(values.astype(np.float32))

    def _layout(self) -> Layout:
        return layout_of(self._path, self._file_headers(), self.columns, self.plain, self.held_out_keys)


class Spikes(SequenceFile):
    """Spike counts `train_spikes`, `valid_spikes` (trials, time, neurons), whole numbers of any dtype.

    Optional: `train_rates`, `valid_rates` (expected counts per bin), `train_behaviour`, `valid_behaviour`
    (trials, time, dimensions). Files of the Neural Latents Benchmark: `train_spikes_heldin`, `train_spikes_heldout`,
    `eval_spikes_heldin`, `eval_spikes_heldout`, all four, optional `train_behavior`, `eval_behavior`; other keys,
    such as those of forward prediction, are not read. Raises UserError for negative, fractional or missing counts and
    for neurons without a spike in the training split.

    A path that ends in .nwb: the units' spikes, in bins of bin_seconds from each trial's start on; trial_seconds: how
    many seconds of a trial, null where all are of one length (`read_nwb`).
    """

    name = "spikes"
    kind = COUNTS
    columns = "neurons"
    plain = ("train_spikes", "valid_spikes")
    held_out_keys = (("train_spikes_heldin", "train_spikes_heldout"), ("eval_spikes_heldin", "eval_spikes_heldout"))

    @checked
    def __init__(
        self,
        path: str,
        num_held_out: NonNegativeInt | None,
        bin_seconds: PositiveFloat,
        trial_seconds: PositiveFloat | None = None,
    ) -> None:
        super().__init__(path, num_held_out, bin_seconds)
        self._is_nwb, self._trial_seconds = self._path.suffix.lower() == ".nwb", trial_seconds
        if trial_seconds is not None and not self._is_nwb:
            raise ValueError("trial_seconds is for .nwb files, whose trials are cut from a recording")

    def identity(self) -> dict[str, object]:
        """Kind, SHA-256 of the file, neurons held out; of NWB also how it is binned. Raises UserError."""
        if not self._is_nwb:
            return super().identity()
        binning = {"version": nwb.VERSION, "bin_seconds": self.bin_seconds, "trial_seconds": self._trial_seconds}
        return super().identity() | {"binning": binning}

    def account(self) -> list[str]:
        """What is taken for trials, time and neurons, what is left out and why. Raises UserError as `prepare`."""
        return super().account() + (list(self._binned()[1]) if self._is_nwb else [])

    def _binned(self) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
        return nwb.read_nwb(self._path, self.bin_seconds, self._trial_seconds)

    def _state(self) -> tuple:
        return (*super()._state(), self.bin_seconds, self._trial_seconds)

    def _file_headers(self) -> dict[str, Header]:
        if not self._is_nwb:
            return super()._file_headers()
        note = f"in bins of {self.bin_seconds:g} s from start_time on"
        return {key: Header(array.dtype, array.shape, note=note) for key, array in self._binned()[0].items()}

    def _read(self, key: str) -> np.ndarray:
        return self._binned()[0][key] if self._is_nwb else super()._read(key)

    def _values(self, key: str) -> np.ndarray:
        return as_counts(self._path, key, self._read(key))

    def _stored(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(smallest_counts(values))

    def _check_train(self, train: Split) -> None:
        silent = (train.values.amax((0, 1)) == 0).nonzero()[:, 0].tolist()
        if silent:
            named = ", ".join(map(str, silent[:5])) + (", ..." if len(silent) > 5 else "")
            neurons = "neuron" if len(silent) == 1 else "neurons"
            raise UserError(f"{self._path}: no spike in any training trial of {neurons} {named}: leave them out")


class Series(SequenceFile):
    """Real-valued series `train_series`, `valid_series` (trials, time, dimensions), finite numbers of any dtype.

    Optional: `train_behaviour`, `valid_behaviour`. Raises UserError for what is not finite.
    """

    name = "series"
    kind = SERIES
    columns = "dimensions"
    plain = ("train_series", "valid_series")

    @checked
    def __init__(self, path: str, num_held_out: NonNegativeInt | None, bin_seconds: PositiveFloat) -> None:
        super().__init__(path, num_held_out, bin_seconds)

    def _values(self, key: str) -> np.ndarray:
        values = self._read(key)
        check_numbers(self._path, key, values)
        return values.astype(np.float32)

    def _stored(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values)
