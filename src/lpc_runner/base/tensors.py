"""Named random draws, arithmetic that repeats, fixed weights, hashes of tensors, and memory kept once it was freed."""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor


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


@contextmanager
def products_in(precision: Literal["ieee", "tf32"]) -> Iterator[None]:
    """Inside, CUDA's matrix products, convolutions and recurrent networks are exact float32, or TF32."""
    cudnn: Any = torch.backends.cudnn  # Any: torch puts an object in place of the module that type checkers read
    parts = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
    before = [part.fp32_precision for part in parts]
    try:
        for part in parts:
            part.fp32_precision = precision
        yield
    finally:
        for part, setting in zip(parts, before):
            part.fp32_precision = setting


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Full float32 and fixed algorithms on CUDA: TF32 keeps 10 bits of mantissa, which changes nearest neighbours."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    try:
        cudnn.deterministic, cudnn.benchmark = True, False
        with products_in("ieee"):
            yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


def hash_of_tensors(tensors: dict[str, Tensor]) -> str:
    """Hex SHA-256 over names, shapes, dtypes and contents, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.reshape(-1).numpy().data)  # hashlib reads flat buffers only
    return digest.hexdigest()


def he_uniform(shape: tuple[int, ...], stream: str) -> Tensor:
    """Weights (out, in, ...) from U(-b, b), b = √(6 / fan_in) (He et al. 2015), by name and always the same.

    Uniform, not normal: its bits agree between machines, those of the logarithm inside a normal draw need
    not.
    """
    bound = math.sqrt(6 / math.prod(shape[1:]))
    return (torch.rand(shape, generator=generator(0, stream)) * 2 - 1) * bound


def to_unit(images: Tensor, device: torch.device | str) -> Tensor:
    """uint8 (B, C, H, W) to float32 in [-1, 1]."""
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"features are taken of uint8 images (B, C, H, W), got {images.dtype} {tuple(images.shape)}")
    return images.to(device).float() / 127.5 - 1


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # as mallopt(3) numbers them
# By which a user sets the same of glibc.
_VARIABLES = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")
LARGEST_BLOCK = 32 * 2**20  # bytes: the most that every glibc accepts; larger blocks, as of datasets, are returned
KEPT = 2**30  # bytes of free memory at the heap's end


def keep_freed_memory() -> bool:
    """Have malloc keep freed blocks of up to 32 MiB in this process; returns whether it does.

    Every step of a chain frees and takes the same megabytes. Returned to the system, they are mapped again by page:
    1,000 to 2,500 page faults a step at 32 pixels and batch 64 (docs/benchmarks.md). The largest resident set is the
    same. With another allocator, or where one of glibc's own variables is set, nothing changes.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _VARIABLES):
        return False
    malloc = ctypes.CDLL(None).mallopt
    return bool(malloc(_MMAP_THRESHOLD, LARGEST_BLOCK) and malloc(_TRIM_THRESHOLD, KEPT))
