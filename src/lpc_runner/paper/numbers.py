"""What the paper reports, as data: U. Zahid, Q. Guo, Z. Fountas, "Sample as you Infer", ICML 2024.

Datasets carry this project's names. Every name says which table or figure it repeats; bars and curves
without printed numbers (Figures 2 to 8) are here as claims only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

DATASETS = {"celeba64": "CelebA", "svhn": "SVHN", "cifar10": "CIFAR10"}

# Table 1: samples and features behind FID, density and coverage.
NUM_SAMPLES = 50_000
EXTRACTOR = "inception"
METRICS = ("fid", "density", "coverage")


class Row(NamedTuple):
    """A row of Table 1 for one dataset: FID, density, coverage after num_epochs."""

    dataset: str
    method: str
    num_epochs: int
    fid: float
    density: float
    coverage: float


TABLE_1 = (
    Row("celeba64", "LPC jeffreys", 15, 97.49, 0.54, 0.13),
    Row("celeba64", "VAE", 15, 90.63, 0.10, 0.08),
    Row("celeba64", "VAE", 50, 82.09, 0.16, 0.12),
    Row("svhn", "LPC jeffreys", 15, 39.64, 0.33, 0.42),
    Row("svhn", "VAE", 15, 53.88, 0.60, 0.39),
    Row("svhn", "VAE", 50, 44.76, 0.65, 0.48),
    Row("cifar10", "LPC jeffreys", 15, 113.29, 0.63, 0.13),
    Row("cifar10", "VAE", 15, 183.21, 0.06, 0.03),
    Row("cifar10", "VAE", 50, 145.87, 0.14, 0.06),
)

# Table 3: what every run of the paper uses, and what it chooses by FID for each dataset.
COMMON = {"model": "conv", "batch_size": 64}
LPC_COMMON = {"learning_rate": 1e-3, "num_steps": 300}
TABLE_3 = {
    "celeba64": {
        "VAE": {"learning_rate": 8e-4},
        "LPC": {"step_size": 0.1, "preconditioning": "adam", "beta": 0.25},
    },
    "svhn": {
        "VAE": {"learning_rate": 1e-3},
        "LPC": {"step_size": 1e-3, "preconditioning": "none"},
    },
    "cifar10": {
        "VAE": {"learning_rate": 1e-3},
        "LPC": {"step_size": 0.1, "preconditioning": "adam", "beta": 0.25},
    },
}


class Cost(NamedTuple):
    """Time of LPC in multiples of a VAE's, per batch and end to end (15 epochs, the VAE's 50)."""

    per_batch: float
    end_to_end: float


TABLE_4 = {"LPC reverse": Cost(24, 7), "LPC jeffreys": Cost(36, 11)}
TABLE_4_HARDWARE = "a GPU of 24 GB and 83 TFLOPS"


class Claim(NamedTuple):
    """A statement of the paper that an experiment can answer."""

    id: str
    source: str
    text: str


CLAIMS = (
    Claim(
        "table1-fid",
        "Table 1",
        "LPC after 15 epochs has a lower FID than a VAE after 50 on SVHN and CIFAR10.",
    ),
    Claim(
        "table1-density-coverage",
        "Table 1",
        "LPC after 15 epochs has higher density and coverage than a VAE after 50 on CelebA and CIFAR10.",
    ),
    Claim("fig2-warm-start", "Figure 2", "Reverse KL and Jeffreys have a lower FID than no warm start."),
    Claim("fig2-jeffreys", "Figure 2", "Jeffreys has the lowest FID of the three objectives."),
    Claim("fig2-forward", "Figure 2", "Forward KL alone diverges after its first epoch."),
    Claim(
        "fig3-forward",
        "Figures 3 and 7",
        "Forward KL starts chains far from the mode: a long first phase is dominated by drift.",
    ),
    Claim("fig4-robust", "Figure 4", "The larger beta, the less a large step size harms FID."),
    Claim(
        "fig4-small-step",
        "Figure 4",
        "At step size 0.001 no preconditioning has an FID as low as any beta, or lower.",
    ),
    Claim("fig5-sharp", "Figures 5A and 9", "Samples of LPC are sharper than those of a VAE."),
    Claim("fig5-fast", "Figure 5B", "LPC converges in fewer epochs than a VAE, in some cases in three."),
    Claim(
        "table4-batch",
        "Table 4",
        "A batch of LPC takes 24 times (reverse KL) and 36 times (Jeffreys) as long as a VAE's.",
    ),
    Claim(
        "table4-end",
        "Table 4",
        "End to end LPC takes 7 times (reverse KL) and 11 times (Jeffreys) as long as a VAE.",
    ),
)


def tuned(dataset: str, method: str) -> dict[str, Any] | None:
    """The values of Table 3 for one of the paper's datasets, None for others."""
    return TABLE_3[dataset]["VAE" if method == "VAE" else "LPC"] if dataset in TABLE_3 else None


def has(properties: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether all these settings of the paper are among a group's properties."""
    return all(same(properties.get(key), value) for key, value in settings.items())


def find_row(dataset: str, method: str, properties: Mapping[str, Any]) -> Row | None:
    """The row of Table 1 that was made with these settings, None where the paper has none."""
    for row in TABLE_1:
        common = COMMON if method == "VAE" else COMMON | LPC_COMMON
        settings = common | {"num_epochs": row.num_epochs} | (tuned(dataset, method) or {})
        if (row.dataset, row.method) == (dataset, method) and has(properties, settings):
            return row
    return None


def same(ours: Any, paper: Any) -> bool:
    """Whether a setting of ours has the paper's value, numbers up to rounding."""
    if isinstance(ours, int | float) and isinstance(paper, int | float):
        return math.isclose(ours, paper, rel_tol=1e-9)
    return ours == paper
