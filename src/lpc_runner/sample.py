"""`lpc-runner sample RUN_DIR --num 64`: draw images from a run, as a PNG grid or an .npz."""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np

from lpc_runner.base.errors import UserError
from lpc_runner.base.files import write_atomically
from lpc_runner.base.surroundings import wait_passively
from lpc_runner.main import one_line_errors


def sample(run_dir: str | Path, num: int, output: Path | None = None, seed: int = 0) -> Path:
    """Write `num` decoder means of z ~ p(z): .png a grid, .npz `images` uint8 (N, C, H, W); returns the path.

    Default output: RUN_DIR/samples/sample-<num>-seed<seed>-update<update>.png. Raises UserError for another ending,
    num below 1, a file that already exists, or a run on sequences.
    """
    if num < 1:
        raise UserError(f"--num must be an integer of at least 1, got {num}")
    if output is not None and output.suffix not in (".png", ".npz"):
        raise UserError(f"--output must end in .png or .npz, got {output}")
    if output is not None and output.exists():
        raise UserError(f"{output} exists already: name another file, or remove it")
    # These load torch, which the command has something to tell before.
    import torch

    from lpc_runner.base.tensors import exact_arithmetic
    from lpc_runner.evaluation.samples import sample_images, save_grid
    from lpc_runner.runner.in_python import load
    from lpc_runner.runner.run import set_up_torch

    run = load(run_dir)
    set_up_torch(run.experiment)
    kind = run.experiment.dataset.kind
    if kind != "images":
        raise UserError(f"{run_dir} is a run on {kind}: images alone can be drawn, its pictures are in samples/")
    path = output or run.directory.samples / f"sample-{num}-seed{seed}-update{run.update}.png"
    with exact_arithmetic():
        images = torch.cat(list(sample_images(run.model, num, seed))).cpu()
    if path.suffix == ".png":
        save_grid(images, path)
    else:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, images=images.numpy())
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, buffer.getvalue())
    return path


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="lpc-runner sample", description=__doc__)
    parser.add_argument("run_dir", help="outputs/<study>/<run>")
    parser.add_argument("--num", type=int, default=64, help="how many images")
    parser.add_argument("--seed", type=int, default=0, help="which images; a run's own grids use the run's seed")
    parser.add_argument("--output", type=Path, help="file.png (a grid) or file.npz (images uint8 (N, C, H, W))")
    args = parser.parse_args()
    wait_passively()
    with one_line_errors():
        print(f"written  {sample(args.run_dir, args.num, args.output, args.seed)}")


if __name__ == "__main__":
    main()
