"""Stateless random numbers: every draw is named by (seed, stream, counters), so nothing needs to be saved to resume."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def generator(seed: int, stream: str, *counters: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator for one named draw.

    seed: the run's seed. stream: what the numbers are for ("chain", "batches", ...). counters: position in that
    stream, e.g. the update. Streams of different names or counters are seeded by a SHA-256 of them; a CPU's
    generator keeps 32 bits of it, so that among 10^5 streams about one pair is alike.
    """
    name = "/".join(map(str, (seed, stream, *counters)))
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@contextmanager
def seeded_layers(seed: int, stream: str) -> Iterator[None]:
    """Layers built inside initialise themselves from the named draw; torch's global generator is put back after."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, stream).initial_seed())
        yield
