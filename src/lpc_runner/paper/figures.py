"""Every picture of a study, in reading order: what is drawn follows from what its runs recorded."""

from __future__ import annotations

from collections.abc import Iterator

from lpc_runner.base.pictures import picture_style
from lpc_runner.paper.chain_figures import chain_pictures, trajectory_pictures
from lpc_runner.paper.quality_figures import grid_pictures, level_pictures, objective_pictures
from lpc_runner.paper.sweep_figures import sweep_pictures
from lpc_runner.study.budgets import curve_settings
from lpc_runner.study.curve_figures import compute_pictures, curve_pictures, metric_names
from lpc_runner.study.estimates import estimate_pictures
from lpc_runner.study.sequence_figures import sequence_pictures
from lpc_runner.study.study import Study
from lpc_runner.study.style import Picture


def study_pictures(study: Study, warnings: list[str]) -> Iterator[Picture]:
    """One by one, dataset by dataset; a figure whose data are not there is left out, damaged files are named."""
    with picture_style():
        for dataset in study.datasets:
            groups = study.of(dataset)
            yield from trajectory_pictures(dataset, groups, warnings)
            yield from objective_pictures(dataset, groups)
            yield from chain_pictures(dataset, groups, warnings)
            yield from sweep_pictures(dataset, groups)
            yield from grid_pictures(dataset, groups, warnings)
            yield from level_pictures(dataset, groups, warnings)
            yield from sequence_pictures(dataset, groups)
            yield from estimate_pictures(dataset, groups)
            settings = curve_settings(groups)
            for setting in settings:
                for metric in metric_names(groups, setting):
                    yield from curve_pictures(dataset, groups, metric, setting)
                yield from compute_pictures(dataset, groups, setting)
            yield from curve_pictures(dataset, groups, "train/elbo", None)
