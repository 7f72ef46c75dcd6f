"""Studies on disk as the runner leaves them, with numbers that a test chooses."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

FACTS = {"num_samples": 500, "num_references": 400, "k": 5, "reference": "train", "extractor_hash": "abc"}
VAE = {"sampler": "none", "objective": "reverse", "preconditioning": "none"}
LPC = {
    "sampler": "langevin",
    "objective": "jeffreys",
    "preconditioning": "adam",
    "step_size": 0.1,
    "beta": 0.25,
}
PAPER_LPC = LPC | {"num_steps": 300, "num_epochs": 15, "learning_rate": 0.001, "batch_size": 64}


class Builder:
    """Runs on disk as the runner leaves them."""

    def __init__(self, outputs: Path) -> None:
        self.outputs, self.study = outputs, outputs / "study"
        self.study.mkdir(parents=True)

    def run(self, name, settings, seed=0, *, dataset="digits", rows=(), config="", samples=None, **result):
        """`settings` are keys; metrics=None leaves the run unfinished; rows are those of metrics.jsonl.

        shape: of an example; device: as a session names it; traces: log_joint and drift_norm (T, B) by update.
        """
        folder = self.outputs / "runs" / name
        (folder / "samples").mkdir(parents=True)
        keys = {"dataset": dataset, "model": "conv", "seed": seed, "num_epochs": 15} | settings
        groups = ("dataset", "model", "sampler", "objective", "preconditioning")
        choices = {key: keys[key] for key in groups} | {"step_size": "constant", "experiment": name}
        described = {"name": name, "hash": name, "choices": choices, "keys": keys, "studies": ["study"]}
        described |= {"data_shape": list(result.pop("shape", (1, 28, 28)))}
        if device := result.pop("device", None):
            (folder / "sessions.jsonl").write_text(json.dumps({"device": device}) + "\n")
        for update, (log_joint, drift_norm) in result.pop("traces", {}).items():
            (folder / "traces").mkdir(exist_ok=True)
            np.savez(folder / "traces" / f"update-{update:09d}.npz", log_joint=log_joint, drift_norm=drift_norm)
        (folder / "run.json").write_text(json.dumps(described))
        (folder / "config.yaml").write_text(config)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if result.get("metrics") is not None:
            extractor = result.pop("extractor", "random_conv")
            facts = FACTS | {"extractor": extractor} | result.pop("measurement", {})
            full = {"status": "finished", "measurement": facts, "num_updates": 100, "num_epochs": 15.0}
            full |= {"train_seconds": 10.0, "gradient_evaluations": 6400, "diverged_at": None, "error": None}
            (folder / "result.json").write_text(json.dumps(full | result))
        if samples is not None:
            import matplotlib.image

            matplotlib.image.imsave(folder / "samples" / "final.png", samples)
        (self.study / name).symlink_to(os.path.relpath(folder, self.study))
        return folder


def measured(update, seconds, fd, samples=500, evaluations=0):
    """A row of metrics.jsonl written after a measurement."""
    spent = {"time/train_seconds": seconds, "train/gradient_evaluations": evaluations}
    return {"update": update, "epoch": update / 10, "eval/fd_random_conv": fd, "eval/num_samples": samples} | spent


def trajectories(folder, names=("map", "langevin"), number=5, num_steps=6, points=9):
    """trajectories.npz with chains that go straight from (2, 1) to (0, 0) over a valley around the end."""
    positions = np.linspace(-1.0, 3.0, points)
    first, second = np.meshgrid(positions, positions, indexing="ij")
    arrays = {"images": np.full((number, 1, 4, 4), 128, dtype=np.uint8)}
    for name in names:
        path = np.linspace([2.0, 1.0], [0.0, 0.0], num_steps + 1)
        arrays |= {
            f"{name}_coordinates": np.repeat(path[:, None], number, axis=1),
            f"{name}_explained": np.tile([0.9, 0.1], (number, 1)),
            f"{name}_grid": np.tile(positions, (number, 2, 1)),
            f"{name}_potential": np.tile(first**2 + 10 * second**2, (number, 1, 1)),
            f"{name}_log_joint": np.zeros((num_steps + 1, number)),
        }
    np.savez(folder / "trajectories.npz", **arrays)
    return arrays
