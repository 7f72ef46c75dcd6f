"""How threads wait for one another: asleep, because on a machine with other work a thread that spins takes its turn."""

from __future__ import annotations

import os
import sys

# By which a user tells the OpenMP of GNU or of LLVM and Intel the same.
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def wait_passively() -> bool:
    """Have torch's threads sleep between two parallel loops; returns whether they will.

    OpenMP reads its variables when torch is loaded, so that a command has to call this before; workers inherit them.
    Later, or where the user has set one of these variables, nothing changes. What it saves and costs:
    docs/benchmarks.md.
    """
    if "torch" in sys.modules or any(name in os.environ for name in VARIABLES):
        return False
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    return True
