"""Freed memory stays with the process: nobody counts on the clock, the system counts page faults."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
from conftest import environment

CHAIN = """
import resource, sys, torch
from lpc_runner.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory() == (len(sys.argv) == 2)
def step():
    layers = [torch.ones(2**19) for _ in range(8)]  # 2 MiB each, as a layer's activations
    return sum(float(layer[0]) for layer in layers)
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(*words: str, **variables: str) -> int:
    command = [sys.executable, "-c", CHAIN, *words]
    done = subprocess.run(command, env=environment() | variables, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_steps_take_the_memory_that_the_steps_before_have_freed():
    kept = page_faults("keep") + 1
    assert page_faults("no") > 20 * kept  # why there is something to do
    assert page_faults("keep", "left alone", MALLOC_TRIM_THRESHOLD_="131072") > 20 * kept
