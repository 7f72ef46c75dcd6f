"""Stateless random numbers: every draw is named by (seed, stream, counters), so nothing needs to be saved to resume."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, stream: str, *counters: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator for one named draw.

    seed: the run's seed. stream: what the numbers are for ("chain", "batches", ...). counters: position in that
    stream, e.g. the update. Streams of different names or counters are independent (seeded from a SHA-256).
    """
    name = "/".join(map(str, (seed, stream, *counters)))
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
