"""A hierarchy of latents: every level of z is drawn given those above it, and x given all of them or the lowest."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lpc_runner.base.distributions import DiagonalGaussian
from lpc_runner.base.likelihoods import Likelihood
from lpc_runner.base.schema import PositiveFloat, PositiveInt, checked
from lpc_runner.data.dataset import Batch
from lpc_runner.models.conv import SIDES, table_2_decoder, table_2_encoder
from lpc_runner.models.dense import ACTIVATIONS, network
from lpc_runner.models.latent import Encoder, LatentVariableModel

MAP_SIDES = (1, 4, 8)  # of the maps that a level may have
REACHED = {1: 0, 4: 5, 8: 7}  # layers of Table 2's decoder before the map of that side
WIDTH = 64  # its channels at 4x4 and 8x8
TOP_FEATURES = 256  # and before its 4x4 map
UNIT_SCALE = math.log(math.e - 1)  # softplus of it is 1

# (level from 0 for the lowest, what the levels above it say or None at the top) -> e of that level
Draw = Callable[[int, Tensor | None], Tensor]


class Hierarchical(LatentVariableModel):
    """z_L = e_L, z_l = m_l(z above) + s_l(z above) ⊙ e_l, p(x | z_1 .. z_L): the model's flat z is e = (e_1 .. e_L).

    So p(e) = N(0, I), and all that reads log p(x, e) serves a hierarchy as it is. Level 1 is next to x. s_l = softplus,
    1 where the network's output is 0.

    levels: width of z_1, z_2 .., numbers or, with maps, channels. maps: null for dense levels; else the side of each
    level's map, 1, 4 or 8, falling from level 1 up, inside the paper's networks (Table 2). hidden: as of model=mlp,
    from the levels to x. between: hidden widths of each m_l, s_l, and of a top-down encoder's level. Both, and
    activation, are of dense levels. skip: whether x and every level read all levels above; else the next one alone.
    encoder: `factorised`, a diagonal Gaussian over e, or `top_down`, q(e_l | x, z above). One level is model=mlp, or
    model=conv with one 1x1 map, for either encoder. Raises ValueError where levels and maps do not fit.
    """

    @checked
    def __init__(
        self,
        data_shape: tuple[int, ...],
        levels: list[PositiveInt],
        maps: list[PositiveInt] | None,
        likelihood: Likelihood,
        variance_beta: PositiveFloat,
        hidden: list[PositiveInt],
        between: list[PositiveInt],
        activation: Literal["silu", "tanh", "relu"],
        skip: bool,
        encoder: Literal["factorised", "top_down"],
    ) -> None:
        if not levels:
            raise ValueError("levels must have a width for at least one level, got []")
        if maps is not None:
            _check_maps(maps, levels, data_shape)
        sides = [1] * len(levels) if maps is None else maps
        sizes = [width * side**2 for width, side in zip(levels, sides)]
        super().__init__(sum(sizes), 1.0, likelihood)
        self.levels, self.maps, self.skip, self.encoder, self.variance_beta = levels, maps, skip, encoder, variance_beta
        self.factorised_q = encoder == "factorised" or len(levels) == 1
        ends = [0, *accumulate(sizes)]
        self.blocks = {f"level_{number}": slice(*ends) for number, ends in enumerate(pairwise(ends), 1)}
        ladder = (
            _Dense(data_shape, levels, hidden, between, activation, skip)
            if maps is None
            else _Maps(data_shape, levels, maps, skip)
        )
        self.ladder = ladder  # no module: its layers are the model's, the decoder's under the names of mlp and conv
        self.decoder, self.above, self.into = ladder.decoder, ladder.above, ladder.into

    def descend(self, draw: Draw) -> tuple[list[Tensor], Tensor]:
        """z_1 .. z_L, and what x reads of them, where draw gives e from the top level down."""
        latents, stream = [], None
        for level in reversed(range(len(self.levels))):
            z = draw(level, stream)
            if stream is not None:
                mean, raw = self.above[level](stream).chunk(2, dim=1)
                z = mean + F.softplus(raw + UNIT_SCALE) * z
            stream = self.ladder.join(level, stream, z)
            latents.insert(0, z)
        assert stream is not None  # there is at least one level
        return latents, stream

    def split(self, e: Tensor) -> list[Tensor]:
        """e_1 .. e_L, (B, width) or (B, channels, side, side), of flat e (B, latent_dim)."""
        parts = [e[:, block] for block in self.blocks.values()]
        if self.maps is None:
            return parts
        shapes = [(width, side, side) for width, side in zip(self.levels, self.maps)]
        return [part.unflatten(1, shape) for part, shape in zip(parts, shapes)]

    def predict(self, z: Tensor) -> Tensor:
        parts = self.split(z)
        return self.ladder.read(self.descend(lambda level, _: parts[level])[1])

    def build_encoder(self) -> nn.Module:
        return self.ladder.build_encoder(self)


def _check_maps(maps: list[int], levels: list[int], data_shape: tuple[int, ...]) -> None:
    if len(maps) != len(levels):
        raise ValueError(f"maps must have one side for each level, {len(levels)} in all, got {maps}")
    if any(side not in MAP_SIDES for side in maps) or any(low <= high for low, high in pairwise(maps)):
        raise ValueError(f"maps must be sides of {list(MAP_SIDES)} that fall from level 1 up, as [8, 4, 1], got {maps}")
    if len(data_shape) != 3 or data_shape[1:] not in [(side, side) for side in SIDES]:
        size = "x".join(map(str, data_shape[1:]))
        raise ValueError(f"maps are of square images of {SIDES} pixels, got {size} (model.maps=null: any image)")


class _Dense:
    """Dense levels: what x or a level reads is the levels above it side by side, or the next one."""

    def __init__(
        self,
        data_shape: tuple[int, ...],
        levels: list[int],
        hidden: list[int],
        between: list[int],
        activation: str,
        skip: bool,
    ) -> None:
        self.hidden, self.between, self.activation, self.skip = hidden, between, activation, skip
        self.data_dim = math.prod(data_shape)
        self.streams = [sum(levels[level:]) if skip else levels[level] for level in range(len(levels))]
        sizes = [self.streams[0], *hidden, self.data_dim]
        self.decoder = nn.Sequential(*network(sizes, activation), nn.Unflatten(1, tuple(data_shape)))
        self.above = nn.ModuleList(
            nn.Sequential(*network([stream, *between, 2 * width], activation))
            for width, stream in zip(levels, self.streams[1:])
        )
        self.into = nn.ModuleList()

    def join(self, level: int, stream: Tensor | None, z: Tensor) -> Tensor:
        return z if stream is None or not self.skip else torch.cat([z, stream], 1)

    def read(self, stream: Tensor) -> Tensor:
        return self.decoder(stream)

    def build_encoder(self, model: Hierarchical) -> nn.Module:
        sizes = [self.data_dim, *reversed(self.hidden)]
        if model.factorised_q:
            layers = network([*sizes, 2 * model.latent_dim], self.activation)
            return Encoder(nn.Sequential(nn.Flatten(), *layers), model.variance_beta)
        last = [ACTIVATIONS[self.activation]()] if self.hidden else []
        trunk = nn.Sequential(nn.Flatten(), *network(sizes, self.activation), *last)
        ins = [sizes[-1] + stream for stream in self.streams[1:]]
        heads = [network([size, *self.between, 2 * width], self.activation) for size, width in zip(ins, model.levels)]
        heads.append([nn.Linear(sizes[-1], 2 * model.levels[-1])])
        return TopDown(model, nn.ModuleList([trunk]), heads)


class _Maps:
    """Levels inside the paper's decoder: a level is added to its map of that side or, without skip, takes its place."""

    def __init__(self, data_shape: tuple[int, ...], levels: list[int], maps: list[int], skip: bool) -> None:
        (self.channels, self.side, _), self.maps, self.skip = data_shape, maps, skip
        layers = table_2_decoder(levels[-1], self.channels, self.side)[REACHED[maps[-1]] :]
        self.decoder = layers.to(memory_format=torch.channels_last)
        self.above = nn.ModuleList(nn.Conv2d(WIDTH, 2 * width, 1) for width in levels[:-1])
        self.into = nn.ModuleList(nn.Conv2d(width, WIDTH, 1) for width, side in zip(levels, maps) if side > 1)

    def _through(self, stream: Tensor, start: int, end: int | None) -> Tensor:
        """Through the decoder's layers start .. end, counted as in Table 2."""
        first = REACHED[self.maps[-1]]
        for layer in list(self.decoder)[start - first : None if end is None else end - first]:
            stream = layer(stream)
        return stream

    def join(self, level: int, stream: Tensor | None, z: Tensor) -> Tensor:
        """The map on which the next level is, with what this one adds."""
        side = self.maps[level]
        if side == 1:
            joined = z.flatten(1)
        elif stream is None or not self.skip:
            joined = self.into[level](z)
        else:
            joined = stream + self.into[level](z)
        return joined if level == 0 else self._through(joined, REACHED[side], REACHED[self.maps[level - 1]])

    def read(self, stream: Tensor) -> Tensor:
        return self._through(stream, REACHED[self.maps[0]], None)

    def build_encoder(self, model: Hierarchical) -> nn.Module:
        if self.maps == [1]:
            body = table_2_encoder(model.latent_dim, self.channels, self.side).to(memory_format=torch.channels_last)
            return Encoder(body, model.variance_beta)
        trunk = _bottom_up(self.channels, self.side, self.maps)
        reads = 0 if model.factorised_q else WIDTH  # of the levels above, beside the features of x
        heads = [
            [nn.Conv2d(WIDTH + reads, WIDTH, 1), nn.SiLU(), nn.Conv2d(WIDTH, 2 * width, 1)]
            for width in model.levels[:-1]
        ]
        heads.append([nn.Conv2d(TOP_FEATURES if self.maps[-1] == 1 else WIDTH, 2 * model.levels[-1], 1)])
        return (Levelwise if model.factorised_q else TopDown)(model, trunk, heads)


def _bottom_up(channels: int, side: int, maps: list[int]) -> nn.ModuleList:
    """Layers from x to features of each level's side, level 1 first: the decoder's maps in reverse."""
    last = {28: nn.Conv2d(32, 32, 3, 1, 2), 32: nn.Conv2d(32, 32, 3, 1, 1), 64: nn.Conv2d(32, 32, 4, 2, 1)}[side]
    stages = {
        8: [nn.Conv2d(channels, 32, 4, 2, 1), nn.SiLU(), last, nn.SiLU(), nn.Conv2d(32, WIDTH, 4, 2, 1), nn.SiLU()],
        4: [nn.Conv2d(WIDTH, WIDTH, 4, 2, 1), nn.SiLU()],
        1: [nn.Conv2d(WIDTH, TOP_FEATURES, 4), nn.SiLU()],
    }
    parts, layers = nn.ModuleList(), []
    for reached, stage in stages.items():
        layers += stage
        if reached in maps:
            parts.append(nn.Sequential(*layers).to(memory_format=torch.channels_last))
            layers = []
    return parts


class _ByLevel(nn.Module):
    """Features of x from the bottom up, and a head for every level, from them and the levels above."""

    def __init__(self, model: Hierarchical, trunk: nn.ModuleList, heads: list[list[nn.Module]]) -> None:
        super().__init__()
        self.trunk, self.heads = trunk, nn.ModuleList(nn.Sequential(*layers) for layers in heads)
        self.variance_beta = model.variance_beta

    def features(self, x: Tensor) -> list[Tensor]:
        """What each level's head reads of x, level 1 first; one for all levels where they are dense."""
        features = []
        for part in self.trunk:
            x = part(x)
            features.append(x)
        return features if len(features) == len(self.heads) else features * len(self.heads)

    def head(self, level: int, features: Tensor, stream: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and variance of e at a level, in its shape."""
        read = features if stream is None else torch.cat([features, stream], 1)
        mean, raw = self.heads[level](read).chunk(2, dim=1)
        return mean, F.softplus(raw, beta=self.variance_beta)


class Levelwise(_ByLevel):
    """q(e|x) = Π_l q(e_l | x), a diagonal Gaussian: every level's map from the features of its own side."""

    def forward(self, batch: Batch) -> DiagonalGaussian:
        parts = [self.head(level, features, None) for level, features in enumerate(self.features(batch.x))]
        return DiagonalGaussian(*(torch.cat([part[which].flatten(1) for part in parts], 1) for which in (0, 1)))


class TopDown(_ByLevel):
    """q(e|x) = Π_l q(e_l | x, z above), z by the model's own m and s, whose parameters are not this encoder's."""

    def __init__(self, model: Hierarchical, trunk: nn.ModuleList, heads: list[list[nn.Module]]) -> None:
        super().__init__(model, trunk, heads)
        self.descend, self.split = model.descend, model.split  # methods, so that no module holds the model's layers

    def forward(self, batch: Batch) -> TopDownGaussian:
        return TopDownGaussian(self, tuple(self.features(batch.x)))


@dataclass(frozen=True)
class TopDownGaussian:
    """q(e|x) = Π_l N(e_l; μ_l, σ_l²) with μ_l, σ_l of x and the levels above: not factorised, but drawn level by level.

    features: of x, level 1 first. It answers as DiagonalGaussian does, but for the KL, which has no closed form: that
    of `at(z)` for z ~ q is, in the mean, KL(q ‖ p). mean and variance are those along the path of means.
    """

    encoder: TopDown
    features: tuple[Tensor, ...]

    def _walk(self, draw: Callable[[int, Tensor, Tensor], Tensor]) -> tuple[Tensor, DiagonalGaussian]:
        """e (B, d), given by draw(level, mean, variance) from the top down, and the distributions along the way."""
        drawn, means, variances = [], [], []

        def draw_at(level: int, stream: Tensor | None) -> Tensor:
            mean, variance = self.encoder.head(level, self.features[level], stream)
            e = draw(level, mean, variance)
            for kept, value in ((drawn, e), (means, mean), (variances, variance)):
                kept.insert(0, value.flatten(1))
            return e

        self.encoder.descend(draw_at)
        e, mean, variance = (torch.cat(parts, 1) for parts in (drawn, means, variances))
        return e, DiagonalGaussian(mean, variance)

    def at(self, z: Tensor) -> DiagonalGaussian:
        """The distribution of each e_l given the levels above it in z (B, d)."""
        parts = self.encoder.split(z)
        return self._walk(lambda level, mean, variance: parts[level])[1]

    @cached_property
    def _central(self) -> DiagonalGaussian:
        return self._walk(lambda level, mean, variance: mean)[1]

    @property
    def mean(self) -> Tensor:
        """(B, d): each level's mean, given the means above it."""
        return self._central.mean

    @property
    def variance(self) -> Tensor:
        """(B, d): each level's variance, given the means above it."""
        return self._central.variance

    def rsample(self, noise: Tensor) -> Tensor:
        """μ_l + σ_l ⊙ noise_l from the top down, (B, d), differentiable through all levels; noise ~ N(0, I) (B, d)."""
        parts = self.encoder.split(noise)
        return self._walk(lambda level, mean, variance: mean + variance.sqrt() * parts[level])[0]

    def log_prob(self, z: Tensor) -> Tensor:
        """log q(z|x) in nats, (B,)."""
        return self.at(z).log_prob(z)

    def repeat(self, count: int) -> TopDownGaussian:
        """q of `count` copies of the batch, one after another: (count B, d)."""
        repeated = (part.repeat(count, *[1] * (part.ndim - 1)) for part in self.features)
        return TopDownGaussian(self.encoder, tuple(repeated))
