"""The user's own sequences: spike counts or real-valued series in one NPZ or HDF5 file."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
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

# Keys of what is known beside the values, of both splits; the last are those of the Neural Latents Benchmark.
_KNOWN = (
    ("rates", ("train_rates", "valid_rates")),
    ("behaviour", ("train_behaviour", "valid_behaviour")),
    ("behaviour", ("train_behavior", "eval_behavior")),
)
_OPTIONAL = ("behaviour",)  # left out, with a line, where it does not fit the values
Parts = tuple[tuple[str, ...], tuple[str, ...]]
_MAX_NAMED = 8  # keys that are not read, in a line
# Keys left out, with the reason, by the state of a file that was read: each cell of a sweep asks.
_LEFT_OUT: dict[tuple, dict[tuple[str, ...], str]] = {}


@dataclass
class Layout:
    """Checked headers of a file. parts: keys of both splits. extras: keys by name. left_out: optional keys, why.

    columns: the last axis in words. Whatever is checked raises UserError naming the key.
    """

    headers: dict[str, Header]
    columns: str
    parts: Parts
    extras: dict[str, tuple[str, str]] = field(default_factory=dict)
    left_out: dict[tuple[str, ...], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in chain(*self.parts):
            if key not in self.headers:
                found = ", ".join(sorted(self.headers))
                raise UserError(f"no key '{key}' beside '{self.parts[0][0]}', found {found}")
        for first, *rest in self.parts:
            for key in (first, *rest):
                self._require_fit(key, first)
        for train, valid in zip(*self.parts):
            left, right = self.headers[train].shape, self.headers[valid].shape
            if left[1:] != right[1:]:
                hint = _trials_elsewhere(left, right)
                raise UserError(f"{valid} of shape {right} does not fit {train} of shape {left}{hint}")
        for name, pair in _KNOWN:
            present = tuple(key for key in pair if key in self.headers)
            try:
                if len(present) == 1:
                    missing = pair[1] if present[0] == pair[0] else pair[0]
                    raise UserError(f"'{present[0]}' without '{missing}': give both or none")
                for split, key in enumerate(present):
                    self._require_fit(key, self.parts[split][0], self.shape(0)[2] if name == "rates" else None)
                if present:
                    self.extras[name] = pair
            except UserError as error:
                if name not in _OPTIONAL:
                    raise
                self.left_out[present] = str(error)

    def shape(self, split: int) -> tuple[int, int, int]:
        """(trials, T, N) of the training (0) or validation (1) split."""
        first, *rest = (self.headers[key].shape for key in self.parts[split])
        return first[0], first[1], first[2] + sum(shape[2] for shape in rest)

    def _require_fit(self, key: str, like: str, width: int | None = None) -> None:
        """Raise UserError unless an array has three axes, trials and bins of another, and that many columns."""
        shape, columns, fault = self.headers[key].shape, self.columns, self.headers[key].fault
        if fault:
            raise UserError(f"{key} {fault}")
        if len(shape) != 3:
            hint = f": x.reshape(trials, time, {columns}) cuts one recording into trials" if len(shape) == 2 else ""
            raise UserError(f"{key} must have shape (trials, time, {columns}), got {shape}{hint}")
        if 0 in shape:
            axis = ("trials", "time bins", columns)[shape.index(0)]
            raise UserError(f"{key} has no {axis}, its shape is {shape}")
        trials, bins = self.headers[like].shape[:2]
        if shape[:2] != (trials, bins):
            raise UserError(f"{key} must have {trials} trials of {bins} bins, got {shape}")
        if width is not None and shape[2] != width:
            raise UserError(f"{key} has {shape[2]} {columns}, the data {width}")


def _trials_elsewhere(left: tuple[int, ...], right: tuple[int, ...]) -> str:
    """A hint where the two splits differ in the length of another axis than the first."""
    differing = [axis for axis in range(3) if left[axis] != right[axis]]
    if len(differing) != 1:
        return ""
    return f" (if axis {differing[0]} is that of trials, np.moveaxis(x, {differing[0]}, 0) makes it the first)"


class SequenceFile(SequenceDataset):
    """What spike counts and series in a file have in common.

    path: the file. num_held_out: how many of the last neurons to hold out; null: as many as the file says.
    bin_seconds: for the axes of pictures.
    """

    columns: ClassVar[str]  # what the last axis is, in words
    # Each the keys of the two splits: one of the values, or two of held-in and held-out neurons.
    layouts: ClassVar[tuple[Parts, ...]]

    @checked
    def __init__(self, path: str, num_held_out: NonNegativeInt | None, bin_seconds: PositiveFloat) -> None:
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
        keys = list(chain(*layout.parts))
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
                extras[0][name], extras[1][name] = (torch.from_numpy(self._extra(key)) for key in pair)
            except UserError as error:
                if name not in _OPTIONAL:
                    raise
                left_out[pair] = str(error).removeprefix(f"{self._path}: ")
        train, test = (
            Split(torch.from_numpy(self._values(keys)), extras=known) for keys, known in zip(layout.parts, extras)
        )
        _LEFT_OUT[state] = left_out
        return Data(train, test)

    def _state(self) -> tuple:
        return (self.name, *file_state(self._path))

    def _file_headers(self) -> dict[str, Header]:
        return read_headers(self._path)

    def _read(self, key: str) -> np.ndarray:
        return read_array(self._path, key)

    def _real(self, key: str) -> np.ndarray:
        values = self._read(key)
        check_numbers(self._path, key, values)
        return values.astype(np.float32)

    def _values(self, keys: tuple[str, ...]) -> np.ndarray:
        """Of one split (trials, T, N), as stored; held-in neurons first."""
        return np.concatenate([self._real(key) for key in keys], axis=2)

    def _extra(self, key: str) -> np.ndarray:
        values = self._real(key)
        if self.kind == COUNTS and key.endswith("_rates") and (values < 0).any():
            raise UserError(f"{self._path}: {key} must be expected counts per bin, found {values.min()}")
        return values

    def _layout(self) -> Layout:
        headers = self._file_headers()
        present = [keys for keys in self.layouts if keys[0][0] in headers]
        try:
            if not present:
                found = ", ".join(sorted(headers)) or "none"
                known = " or ".join(", ".join(chain(*keys)) for keys in self.layouts)
                raise UserError(f"no key '{self.layouts[0][0][0]}', found {found}; expected {known}")
            return Layout(headers, self.columns, present[0])
        except UserError as error:
            raise UserError(f"{self._path}: {error}") from None


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
    layouts = (
        (("train_spikes",), ("valid_spikes",)),
        (("train_spikes_heldin", "train_spikes_heldout"), ("eval_spikes_heldin", "eval_spikes_heldout")),
    )

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

    def _values(self, keys: tuple[str, ...]) -> np.ndarray:
        values = np.concatenate([as_counts(self._path, key, self._read(key)) for key in keys], axis=2)
        silent = np.flatnonzero(~values.any((0, 1)))
        if len(silent) and keys[0].startswith("train_"):
            named = ", ".join(map(str, silent[:5])) + (", ..." if len(silent) > 5 else "")
            neurons = "neuron" if len(silent) == 1 else "neurons"
            raise UserError(f"{self._path}: no spike in any training trial of {neurons} {named}: leave them out")
        return smallest_counts(values)


class Series(SequenceFile):
    """Real-valued series `train_series`, `valid_series` (trials, time, dimensions), finite numbers of any dtype.

    Optional: `train_behaviour`, `valid_behaviour`. Raises UserError for what is not finite.
    """

    name = "series"
    kind = SERIES
    columns = "dimensions"
    layouts = ((("train_series",), ("valid_series",)),)
