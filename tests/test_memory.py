"""Freed memory stays with the process: nobody counts on the clock, the system says how large the process is."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
from conftest import environment

from lpc_runner.base.tensors import _VARIABLES

CHAIN = """
import resource, sys, torch
from lpc_runner.base.tensors import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory() == (len(sys.argv) == 2)
def size():  # bytes that the process has from the system; not page faults, which some systems do not count
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[0]) * resource.getpagesize()
def given_back():
    layers = [torch.ones(2**19) for _ in range(8)]  # 2 MiB each, as a layer's activations
    at_work = size()
    layers.clear()
    return at_work - size()
for _ in range(3):
    given_back()
print(given_back())
"""


def given_back(*words: str, **variables: str) -> int:
    """Bytes that a step has freed and the process no longer has."""
    command = [sys.executable, "-c", CHAIN, *words]
    kept = {name: value for name, value in environment().items() if name not in (*_VARIABLES, "LD_PRELOAD")}
    done = subprocess.run(command, env=kept | variables, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_steps_take_the_memory_that_the_steps_before_have_freed():
    # Left to itself, glibc moves its thresholds by what was freed before: some processes keep, others do not.
    fixed = {"MALLOC_TRIM_THRESHOLD_": "131072"}  # as they are at the start
    assert given_back("no", **fixed) >= 16 * 2**20  # why there is something to do
    assert given_back("keep", "left alone", **fixed) >= 16 * 2**20
    assert given_back("keep") == 0
