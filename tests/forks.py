"""Processes for tests that kill them: imports everything once, then forks for each command line.

A line on standard input, {"argv": [...], "cwd": ..., "err": ...}, is answered with the process id, and when
that process has ended with its exit code, negative for a signal as in `subprocess`.
"""

from __future__ import annotations

import json
import os
import sys
import threading

import torch
import torch._dynamo  # what an optimiser imports
import torchvision.utils  # noqa: F401 (what pictures import)

import lpc_runner.runner.run  # noqa: F401 (what main imports when it needs it)
from lpc_runner.main import main


def child(order: dict) -> None:
    os.chdir(order["cwd"])
    error = os.open(order["err"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(error, 1)
    os.dup2(error, 2)
    sys.argv = ["lpc_runner", *order["argv"]]
    code = 0
    try:
        main()
    except SystemExit as leaving:
        code = leaving.code or 0
    except BaseException as error:
        os.write(2, repr(error).encode())
        code = 99
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def answer(**content) -> None:
    print(json.dumps(content), flush=True)


def await_end(pid: int) -> None:
    answer(ended=pid, code=os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    answer(ready=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            child(json.loads(line))
        answer(started=pid)
        threading.Thread(target=await_end, args=(pid,), daemon=True).start()
