"""What a precision costs: the error of log p(x, z) and of its drift against float64, at the same z and θ."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from benchmarks.variants import WAYS, Work, build_model, images
from lpc_runner.base.distributions import DiscretisedGaussian
from lpc_runner.inference.chain import FusedPotential
from lpc_runner.inference.engine import make_engine
from lpc_runner.models.conv import Conv

SPREAD = 0.5  # standard deviation of a trained decoder's output, about that of images
# Where training starts, and where it ends: first weights with any image, a fitted model with images from it.
CASES = ((False, 1.0), (True, 0.1), (True, 0.03))


def drift_errors(work: Work, device: torch.device) -> dict[str, list[dict[str, float]]]:
    """Per precision and case, at z ~ N(0, I), over the batch: median and largest error of ∇z log p(x|z) relative to its
    norm, and the largest error of log p(x, z) in nats.

    fitted: the images are drawn from the model at z, so that residuals are about σ, which its rounded mean then meets.
    The prior's part of the drift, -z, is exact at every precision and would only hide the error of the model's.
    """
    x, z = images(work, device), torch.randn(work.batch, build_model(work.side, device).latent_dim, device=device)
    found: dict[str, list[dict[str, float]]] = {}
    for fitted, sigma in CASES:
        model = build_model(work.side, device)
        assert isinstance(model.likelihood, DiscretisedGaussian)
        with torch.no_grad():
            model.likelihood.log_scale.fill_(sigma).log_()
        if fitted:
            x = _drawn(model, z, sigma)
        exact_value, exact_drift = _evaluated(copy.deepcopy(model).double(), x.double(), z.double(), "fp32", device)
        for precision in sorted({precision for _, precision in WAYS[device.type]}):
            value, drift = _evaluated(model, x, z, precision, device)
            error = (drift - exact_drift).norm(dim=1) / (exact_drift + z).norm(dim=1)
            found.setdefault(precision, []).append(
                {
                    "fitted": fitted,
                    "sigma": sigma,
                    "drift_median": float(error.median()),
                    "drift_largest": float(error.max()),
                    "log_joint_largest": float((value - exact_value).abs().max()),
                }
            )
    return found


@torch.no_grad()
def _drawn(model: Conv, z: Tensor, sigma: float) -> Tensor:
    """Images (B, C, side, side) from p(x|z), of 256 levels in [-1, 1]; scales the last layer to outputs of `SPREAD`."""
    factor = SPREAD / model.decode(z).std()
    for parameter in model.decoder[-1].parameters():
        parameter.mul_(factor)
    mean = model.decode(z)
    return ((mean + sigma * torch.randn_like(mean)).clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1


def _evaluated(model: Conv, x: Tensor, z: Tensor, precision: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    engine = make_engine("eager", precision, device)
    log_joint = engine.potential_of(model.log_joint)
    with engine.arithmetic():
        value, drift = FusedPotential(lambda z: log_joint(x, z), ())(z, accumulate=False)
    return value.double(), drift.double()


def markdown_of_errors(found: dict[str, list[dict[str, float]]]) -> str:
    """One row per precision and case."""
    lines = [
        "| precision | model | σ | relative error of ∇z log p(x given z), median | largest "
        "| of log p(x, z), nats, largest |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for precision, rows in found.items():
        for row in rows:
            numbers = (f"{row[name]:.1e}" for name in ("drift_median", "drift_largest", "log_joint_largest"))
            model = "its own images" if row["fitted"] else "first weights"
            lines.append(f"| {precision} | {model} | {row['sigma']} | " + " | ".join(numbers) + " |")
    return "\n".join(lines)
