"""Many short runs in one study under random kills: python scripts/soak.py --runs 200 --kills 12

Two commands pull from the study at once; all along the study one of them, drawn at random, is killed (SIGKILL) at a
random moment and started again. At the end every run has one result, no update is logged twice, and no run was begun
again after its end.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

SETTINGS = (
    "method=lpc_jeffreys",
    "device=cpu",
    "tracker=none",
    "num_threads=1",
    "model=mlp",
    "model.hidden=[16]",
    "model.latent_dim=4",
    "sampler.num_steps=3",
    "trainer.batch_size=16",
    "trainer.max_updates=60",
    "trainer.log_every=1",
    "trainer.checkpoint_seconds=0.05",
    "metrics.num_samples=40",
    "metrics.max_references=40",
    "study=soak",
)


def start(folder: Path, num_runs: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "lpc_runner", "-m", f"seed=range({num_runs})", *SETTINGS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    output = open(folder / "output.txt", "a", encoding="utf-8")  # noqa: SIM115 (the process writes to it)
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)


def examine(folder: Path, num_runs: int) -> list[str]:
    """What is wrong, one line each."""
    wrong = []
    runs = sorted((folder / "outputs" / "soak").iterdir())
    if len(runs) != num_runs:
        wrong.append(f"{len(runs)} runs instead of {num_runs}")
    seeds = [json.loads((run / "run.json").read_text(encoding="utf-8"))["keys"]["seed"] for run in runs]
    wrong += [f"seed {seed}: {seeds.count(seed)} runs" for seed in range(num_runs) if seeds.count(seed) != 1]
    for run in runs:
        result = json.loads((run / "result.json").read_text(encoding="utf-8")) if (run / "result.json").exists() else {}
        if result.get("status") != "finished":
            wrong.append(f"{run.name}: {result.get('status', 'no result')}")
            continue
        updates = [
            json.loads(line)["update"] for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        if updates != list(range(1, 61)):
            wrong.append(f"{run.name}: updates {updates}")
        ended = (run / "result.json").stat().st_mtime
        starts = [
            json.loads(line)["started"] for line in (run / "sessions.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        if datetime.fromisoformat(starts[-1]).timestamp() > ended + 1:
            wrong.append(f"{run.name}: begun again after its end")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--kills", type=int, default=12, help="how many kills before both commands are left alone")
    parser.add_argument("--seed", type=int, default=0, help="of the times of the kills")
    given = parser.parse_args()
    chance = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as name:
        folder, began = Path(name), time.monotonic()
        processes = [start(folder, given.runs) for _ in range(2)]
        results = lambda: len(list(folder.glob("outputs/runs/*/result.json")))

        def keep_both_running() -> None:
            for index, process in enumerate(processes):
                if process.poll() is not None and results() < given.runs:
                    processes[index] = start(folder, given.runs)

        kills = 0
        # At results, not at times: a command that is killed before it has read its plan tests nothing.
        for moment in sorted(chance.uniform(0, given.runs - 1) for _ in range(given.kills)):
            while results() < moment:
                time.sleep(0.2)
                keep_both_running()
            time.sleep(chance.uniform(0, 2))
            number = chance.randrange(2)
            if processes[number].poll() is None:
                processes[number].send_signal(signal.SIGKILL)
                processes[number].wait()
                kills += 1
        while any(process.poll() is None for process in processes) or results() < given.runs:
            time.sleep(1)
            keep_both_running()
        wrong = examine(folder, given.runs)
        begun = sum(
            len(path.read_text(encoding="utf-8").splitlines()) for path in folder.glob("outputs/runs/*/sessions.jsonl")
        )
        print(
            f"{given.runs} runs, {kills} kills, {begun} starts, {time.monotonic() - began:.0f} s: "
            f"{results()} results, {len(wrong)} wrong"
        )
        for line in wrong:
            print(line)
        sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
