"""Pictures of sequences: single trials beside spikes and truth, factors, inferred inputs, the gap decomposition."""

from __future__ import annotations

import io
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lpc_runner.base.files import write_atomically
from lpc_runner.base.presentation import COLOURS, picture_style
from lpc_runner.data.dataset import Split
from lpc_runner.data.sequences import COUNTS, SequenceDataset
from lpc_runner.evaluation.evaluator import evenly_spaced
from lpc_runner.evaluation.sequence_posterior import Means, linear_readout

*LINES, TRUTH, DATA = COLOURS
BLUE, ORANGE = LINES[:2]
DPI = 130
NUM_TRIALS, NUM_NEURONS, NUM_PATHS = 3, 4, 3


@dataclass(frozen=True)
class Trials:
    """Some trials and what was inferred of them: their numbers, x (n, T, N) as the model sees it, their extras."""

    index: list[int]
    means: Means
    x: Tensor
    extras: dict[str, Tensor]
    bin_seconds: float
    are_counts: bool

    @property
    def seconds(self) -> np.ndarray:
        """The middle of every bin."""
        return self.bin_seconds * (np.arange(self.x.shape[1]) + 0.5)

    def chosen(self, count: int) -> list[int]:
        """Positions of that many trials, evenly spaced."""
        return evenly_spaced(len(self.x), count).tolist()


def data_picture(split: Split, dataset: SequenceDataset, path: Path) -> None:
    """Training trials as they are: neurons by time."""
    chosen = evenly_spaced(len(split), NUM_TRIALS)
    values = dataset.to_model(split.values[chosen]).mT.numpy()
    are_counts = dataset.kind == COUNTS
    with figure_to(path, (13, 4.6)) as figure:
        axes = figure.subplots(1, len(values), sharey=True, squeeze=False)[0]
        # Most bins hold no spike and few more than two: without a ceiling, single ones would be too pale to see.
        high = 3 if are_counts else abs(values).max()
        low = 0 if are_counts else -high
        extent = (0, dataset.bin_seconds * dataset.shape[0], -0.5, dataset.shape[1] - 0.5)
        for axis, trial, number in zip(axes, values, chosen.tolist()):
            image = axis.imshow(
                trial, aspect="auto", origin="lower", extent=extent, vmin=low, vmax=high,
                cmap="Greys" if are_counts else "PuOr", interpolation="nearest",
            )  # fmt: skip
            axis.set(title=f"training trial {number}", xlabel="time (s)")
        axes[0].set_ylabel("neuron" if are_counts else "dimension")
        label = "spikes per bin (black: 3 or more)" if are_counts else "value"
        figure.colorbar(image, ax=axes, label=label, extend="max" if are_counts else "neither")


def rates_picture(trials: Trials, path: Path) -> None:
    """Inferred rates of single trials over what was observed, and the truth where it is known; in Hz for spikes."""
    chosen = trials.chosen(NUM_TRIALS)
    scale = 1 / trials.bin_seconds if trials.are_counts else 1.0
    rates = scale * _array(trials.means.rates)
    truth = scale * _array(trials.extras["rates"]) if "rates" in trials.extras else None
    shown = rates if truth is None else truth
    neurons = np.sort(np.argsort(-shown[chosen].var((0, 1)), kind="stable")[:NUM_NEURONS])  # those with most to follow
    x = _array(trials.x)
    with figure_to(path, (13, 2.3 * len(neurons) + 1)) as figure:
        axes = figure.subplots(len(neurons), len(chosen), sharex=True, sharey="row", squeeze=False)
        for row, neuron in zip(axes, neurons):
            highest = max(rates[chosen, :, neuron].max(), 0 if truth is None else truth[chosen, :, neuron].max())
            for axis, trial in zip(row, chosen):
                _observed(axis, trials, x[trial, :, neuron], highest)
                if truth is not None:
                    axis.plot(trials.seconds, truth[trial, :, neuron], color=TRUTH, label="truth", linewidth=1.6)
                axis.plot(trials.seconds, rates[trial, :, neuron], color=BLUE, label="inferred")
            row[0].set_ylabel(f"neuron {neuron}\n(Hz)" if trials.are_counts else f"dimension {neuron}")
        for axis, trial in zip(axes[0], chosen):
            axis.set_title(f"trial {trials.index[trial]}")
        for axis in axes[-1]:
            axis.set_xlabel("time (s)")
        _legend(figure, axes[0, 0])


def _observed(axis: Any, trials: Trials, values: np.ndarray, highest: float) -> None:
    """Spikes as marks below the axis, longer for more of them in a bin; real values as points."""
    if not trials.are_counts:
        axis.plot(trials.seconds, values, ".", color=DATA, markersize=4, label="observed")
        return
    filled = values > 0
    unit = 0.07 * highest
    floor = -0.04 * highest
    lengths = unit * np.minimum(values[filled], 4)
    axis.vlines(trials.seconds[filled], floor - lengths, floor, color=DATA, linewidth=2, label="spikes (longer: more)")


def factors_picture(trials: Trials, path: Path) -> None:
    """Factors along their first principal components; the true latents, where known, beside a linear readout."""
    factors = _array(trials.means.factors).astype(np.float64)
    centred = factors - factors.mean((0, 1))
    components = np.linalg.svd(centred.reshape(-1, centred.shape[2]), full_matrices=False)[2][:3]
    paths = centred @ components.T
    chosen = trials.chosen(NUM_PATHS)
    trial = chosen[len(chosen) // 2]
    shown, names = paths[trial], [f"component {number + 1}" for number in range(paths.shape[2])]
    truth, what = None, "principal components of factors"
    if "latents" in trials.extras:
        latents = trials.extras["latents"]
        truth, what = _array(latents[trial]), "latents read from factors"
        readout = linear_readout(trials.means.factors, latents)
        shown = _array(readout(trials.means.factors[trial]))
        names = [f"latent {number + 1}" for number in range(min(3, latents.shape[2]))]
    with figure_to(path, (13, 6)) as figure:
        left, right = figure.subfigures(1, 2, squeeze=False)[0]
        axis = left.subplots()
        for colour, number in zip(LINES, chosen):
            x, y = paths[number, :, 0], paths[number, :, 1] if paths.shape[2] > 1 else trials.seconds
            axis.plot(x, y, color=colour, linewidth=1.4)
            axis.plot(x[0], y[0], "o", color=colour, markersize=9)
        axis.set(xlabel="factors, principal component 1", ylabel="principal component 2")
        axis.set_title(f"{len(chosen)} trials, each from its dot")
        rows = right.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
        for dimension, (row, name) in enumerate(zip(rows, names)):
            if truth is not None:
                row.plot(trials.seconds, truth[:, dimension], color=TRUTH, linewidth=1.6, label="truth")
            row.plot(trials.seconds, shown[:, dimension], color=BLUE, label="inferred")
            row.set_ylabel(name)
        rows[0].set_title(f"trial {trials.index[trial]}: {what}")
        rows[-1].set_xlabel("time (s)")
        if truth is not None:
            _legend(right, rows[0])


def inputs_picture(trials: Trials, path: Path) -> None:
    """Inferred inputs of single trials and, averaged over trials around the pulse, their norm; the pulse is marked."""
    chosen = trials.chosen(NUM_TRIALS)
    assert trials.means.inputs is not None
    inputs = _array(trials.means.inputs)
    pulse = trials.extras["pulse_bin"].cpu().numpy() if "pulse_bin" in trials.extras else None
    aligned = None if pulse is None else _around(np.linalg.norm(inputs, axis=2), pulse, min(20, inputs.shape[1] // 4))
    with figure_to(path, (13, 4.4 if aligned is None else 7.6)) as figure:
        panels = figure.subfigures(1 if aligned is None else 2, 1, squeeze=False)[:, 0]
        axes = panels[0].subplots(1, len(chosen), sharey=True, squeeze=False)[0]
        for axis, trial in zip(axes, chosen):
            for dimension, colour in zip(range(inputs.shape[2]), LINES):
                axis.plot(trials.seconds, inputs[trial, :, dimension], color=colour, label=f"input {dimension + 1}")
            if pulse is not None:
                axis.axvline(trials.seconds[pulse[trial]], color=TRUTH, linestyle="--", label="pulse")
            axis.set(title=f"trial {trials.index[trial]}", xlabel="time (s)")
        axes[0].set_ylabel("inferred input (prior std 1)")
        _legend(panels[0], axes[0])
        if aligned is not None:
            _draw_around_pulse(panels[1].subplots(), aligned, 1000 * trials.bin_seconds)


def _around(values: np.ndarray, centre: np.ndarray, reach: int) -> np.ndarray | None:
    """values (n, T) from centre - reach to centre + reach, of the trials in which all of that exists; None: in none."""
    inside = np.flatnonzero((centre >= reach) & (centre < values.shape[1] - reach))
    window = np.arange(-reach, reach + 1)
    return values[inside[:, None], centre[inside, None] + window] if len(inside) else None


def _draw_around_pulse(axis: Any, aligned: np.ndarray, bin_milliseconds: float) -> None:
    reach = aligned.shape[1] // 2
    milliseconds = bin_milliseconds * np.arange(-reach, reach + 1)
    low, high = np.quantile(aligned, [0.1, 0.9], axis=0)
    axis.fill_between(milliseconds, low, high, color=BLUE, alpha=0.2, linewidth=0, label="80 % of trials")
    axis.plot(milliseconds, aligned.mean(0), color=BLUE, label=f"mean of {len(aligned)} trials")
    axis.axvline(0, color=TRUTH, linestyle="--", label="pulse")
    axis.set(xlabel="time from the pulse (ms)", ylabel="norm of inferred input")
    axis.legend(loc="upper right")


def gaps_picture(numbers: dict[str, float], path: Path) -> None:
    """The two parts of log p(x) - ELBO as bars, with the numbers they come from."""
    exact = "log_evidence" in numbers
    best = max(value for name, value in numbers.items() if name.endswith("_iwae") or name == "log_evidence")
    parts = [("amortisation gap", "amortisation_gap", ORANGE), ("approximation gap", "approximation_gap", BLUE)]
    parts = [part for part in parts if part[1] in numbers]
    with figure_to(path, (9.5, 1.5 + 1.1 * len(parts))) as figure:
        axis = figure.subplots()
        for place, (label, name, colour) in enumerate(parts):
            axis.barh(place, numbers[name], color=colour, height=0.6)
            right = max(numbers[name], 0)
            axis.annotate(f"{numbers[name]:.2f}", (right, place), (6, 0), textcoords="offset points", va="center")
            axis.text(-0.02, place, label, transform=axis.get_yaxis_transform(), ha="right", va="center")
        axis.axvline(0, color=TRUTH, linewidth=1)
        axis.set(yticks=[], xlabel="nats per trial")
        axis.spines["left"].set_visible(False)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        bound = "log p(x)" if exact else "IWAE"
        axis.set_title(f"{bound} {best:.1f}, best ELBO of a free q {numbers['free_elbo']:.1f}", loc="left")


def _array(values: Tensor) -> np.ndarray:
    return values.detach().cpu().float().numpy()


def _legend(figure: Any, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))


@contextmanager
def figure_to(path: Path, size: tuple[float, float]):
    """A figure in this module's style, written to `path` at the end, byte for byte the same for the same data."""
    from matplotlib.figure import Figure

    with picture_style(**{"axes.grid": False}):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())
