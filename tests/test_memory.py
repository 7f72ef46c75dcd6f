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
def size():  # bytes that the process has from the system; not page faults, which some systems do not count
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[0]) * resource.getpagesize()
def given_back():
    layers = [torch.ones(2**19) for _ in range(8)]  # 2 MiB each, as a layer's activations
    at_work = size()
    layers.clear()
    return at_work - size()
def settled():
    for _ in range(3):
        given_back()
    return given_back()
for word in sys.argv[1:]:
    if word != "no":
        assert keep_freed_memory() == (word == "keep")
    print(settled())
"""


def given_back(*words: str, **variables: str) -> list[int]:
    """Bytes that a step has freed and the process no longer has, after each word."""
    command = [sys.executable, "-c", CHAIN, *words]
    kept = {name: value for name, value in environment().items() if name not in (*_VARIABLES, "LD_PRELOAD")}
    done = subprocess.run(command, env=kept | variables, capture_output=True, text=True, check=True)
    return [int(number) for number in done.stdout.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_steps_take_the_memory_that_the_steps_before_have_freed():
    # Left to itself, glibc moves its thresholds by what was freed before: some processes keep, others do not.
    fixed = {"MALLOC_TRIM_THRESHOLD_": "131072"}  # as they are at the start
    before, left_alone = given_back("no", "left alone", **fixed)
    assert before >= 16 * 2**20  # why there is something to do
    assert left_alone >= 16 * 2**20
    assert given_back("keep") == [0]
