"""Chains of several learners as parallel branches of one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.variants import Work, build_learner, chain, images
from lpc_runner.inference.engine import Blocked, Captures, Precision, _Program
from lpc_runner.inference.objectives import WeightedKL


def branched(work: Work, precision: Precision, number: int, device: torch.device) -> Callable[[], None]:
    """A replay of `number` learners' blocks of min(T, 32) steps, forked from one stream and joined again."""
    blocks = []
    for _ in range(number):
        learner = build_learner(work, device, chain(work.num_steps), WeightedKL(0.5, 0.5), ("eager", precision))
        engine, x = Blocked(precision, device), images(work, device)
        start = learner.sampler.init(torch.randn(work.batch, learner.model.latent_dim, device=device), None)
        theta = list(learner.model.parameters())
        program = _Program(engine, learner.model.log_joint, (x,), learner.sampler, theta)
        program.build(start)
        blocks.append(program.blocks[program.length])
    streams = [torch.cuda.Stream(device) for _ in blocks]

    def everything() -> None:
        main = torch.cuda.current_stream()
        for block, stream in zip(blocks, streams):
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                block()
        for stream in streams:
            main.wait_stream(stream)

    with engine.arithmetic():
        return Captures(device)(everything)
