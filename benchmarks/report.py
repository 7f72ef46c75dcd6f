"""The benchmark's stages and what they leave: one Markdown table and one JSON file per stage, and the terminal."""

from __future__ import annotations

import json
import logging
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.floor import floor_seconds, measured_rates, work_of_a_step
from benchmarks.scaling import peak_memory, time_of
from benchmarks.variants import Way, Work, build_model, build_variants, images, measure, rows_of
from lpc_runner.inference.engine import Precision
from lpc_runner.store.environment import git_commit

logger = logging.getLogger(__name__)


def processor() -> str:
    """The processor's model in words."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {processor()}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "commit": git_commit(),
        "command": " ".join(["python", *sys.argv]),
    }


def compare(work: Work, rounds: int, device: torch.device, engines: tuple[str, ...]) -> dict[str, Any]:
    """The side-by-side table of one size, with the floor of each precision."""
    variants, skipped = build_variants(work, device, engines)
    logger.info("%s: %d variants, %d rounds and one to warm up", work, len(variants), rounds)
    for line in skipped:
        logger.info("%s", line)
    measure(variants, rounds, device)
    rows, model, x = rows_of(variants), build_model(work.side, device), images(work, device)
    floors = {}
    precisions: set[Precision] = {variant.precision for variant in variants if variant.engine}
    for precision in precisions:
        rates, done = measured_rates(device, precision), work_of_a_step(model, x, precision)
        floors[precision] = {"ms_per_step": 1e3 * floor_seconds(done, rates), "rates": rates, "work": done}
    for row in rows:
        chain = row["engine"] and row["ms_per_step"] and "less work" not in row["variant"]
        row["share_of_floor"] = floors[row["precision"]]["ms_per_step"] / row["ms_per_step"] if chain else None
    return {"work": asdict(work), "rounds": rounds, "rows": rows, "floor": floors, "not_measured": skipped}


def growth(work: Work, device: torch.device, way: Way, steps: tuple[int, ...]) -> dict[str, Any]:
    """Memory against T; time against T, batch and image side, about `work`."""
    logger.info("growth about %s", work)
    by_steps = [Work(work.side, num_steps, work.batch) for num_steps in steps]
    by_batch = [Work(work.side, work.num_steps, batch) for batch in (16, 64, 256)]
    by_side = [Work(side, work.num_steps, work.batch) for side in (28, 32, 64)]
    return {
        "way": way,
        "memory_mib": {sized.num_steps: peak_memory(sized, device, way) for sized in by_steps},
        "ms_by_steps": {sized.num_steps: time_of(sized, device, way) for sized in by_steps},
        "ms_by_batch": {sized.batch: time_of(sized, device, way) for sized in by_batch},
        "ms_by_side": {sized.side: time_of(sized, device, way) for sized in by_side},
    }


def markdown_of(result: dict[str, Any]) -> str:
    """The table of `compare` as Markdown."""
    work = result["work"]

    def number(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:,.{digits}f}"

    lines = [
        f"3x{work['side']}x{work['side']} images, `model=conv`, batch {work['batch']}, T = {work['num_steps']}; median "
        f"and quartiles of {result['rounds']} rounds in which the variants take turns, ratios paired by round.",
        "",
        "| variant | engine | precision | ms per step | ms per update | quartiles | faster than literal | VAE batches "
        "| share of the floor |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        low, high = row["quartiles_ms"]
        share = "" if row["share_of_floor"] is None else f"{row['share_of_floor']:.1%}"
        cells = (
            row["variant"], row["engine"], row["precision"] if row["engine"] else "fp32",
            number(row["ms_per_step"], 3), number(row["ms_per_update"], 1), f"{low:,.1f}-{high:,.1f}",
            number(row["times_faster_than_literal"], 2), number(row["vae_batches"], 1), share,
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    for precision, floor in sorted(result["floor"].items()):
        rates, done = floor["rates"], floor["work"]
        lines += [
            "",
            f"Floor, {precision}: {floor['ms_per_step']:.3f} ms per step, the longer of {done['flops'] / 1e9:.2f} "
            f"GFLOP at {rates['flops'] / 1e9:,.0f} GFLOP/s (square matrix product) and {done['bytes'] / 1e6:.1f} MB at "
            f"{rates['bytes'] / 1e9:,.1f} GB/s (copy).",
        ]
    return "\n".join([*lines, *(f"\n{line}" for line in result["not_measured"])])


def markdown_of_growth(result: dict[str, Any]) -> str:
    """The numbers of `growth` as Markdown."""
    names = {
        "memory_mib": "largest memory, MiB, by T",
        "ms_by_steps": "ms per update by T",
        "ms_by_batch": "ms per update by batch",
        "ms_by_side": "ms per update by side",
    }
    rows = [
        f"| {title} | " + ", ".join(f"{key}: {value:,.1f}" for key, value in result[name].items()) + " |"
        for name, title in names.items()
    ]
    return "\n".join([f"Engine {result['way'][0]}, {result['way'][1]}.", "", "| | |", "|---|---|", *rows])


def markdown_of_profile(result: dict[str, Any]) -> str:
    """Shares of kernel classes, largest first."""
    ordered = sorted(result["shares"].items(), key=lambda item: -item[1])
    rows = [f"| {kind} | {share:.1%} |" for kind, share in ordered]
    return "\n".join(["| kernel class | share of time |", "|---|--:|", *rows])


def markdown_of_machine(facts: dict[str, Any]) -> str:
    """Hardware, versions, command."""
    return "; ".join(f"{name}: {value}" for name, value in facts.items() if value is not None)


def show(text: str) -> None:
    """To the terminal, as it is."""
    Console().print(text, soft_wrap=True, highlight=False, markup=False)


class Folder:
    """Where stages leave their results, each as soon as it is done: NAME.json and a chapter of benchmark.md."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path, facts = path, machine(device)
        path.mkdir(parents=True, exist_ok=True)
        (path / "machine.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
        (path / "benchmark.md").write_text(f"{markdown_of_machine(facts)}\n", encoding="utf-8")

    def keep(self, name: str, result: dict[str, Any], text: str) -> None:
        """One stage."""
        (self.path / f"{name}.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
        with (self.path / "benchmark.md").open("a", encoding="utf-8") as file:
            file.write(f"\n## {name}\n\n{text}\n")
        show(f"\n{name}\n{text}")
