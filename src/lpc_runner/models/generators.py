"""Generators of sequential models: x_t = cell(u_t, x_{t-1}) for t = 1 .. T, all of u at once.

Each has `initial_size` (the size of x_0), `forward(initial, inputs, num_steps)` -> x_1 .. x_T (B, T, state_dim), and
`step(state, inputs)`, one step of the recursion in elementary operations. `initial` is x_0 (B, initial_size), `inputs`
u_1 .. u_T (B, T, input_dim), or None for a generator built with input_dim = 0.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu}


def recursion(first: Tensor, drive: Tensor, transition: Tensor) -> Tensor:
    """x_1 .. x_T of x_t = A x_{t-1} + v_t, from x_0 (B, D), v (B, T, D) and A (D, D).

    A plain loop: on a CPU it takes .84 ms (B = 104, T = 50, D = 8, gradient included) and 2.96 (D = 64), the log2(T)
    products of a doubling scan 1.15 and 10.8.
    """
    states, state, transposed = [], first, transition.T
    for step in drive.unbind(1):
        state = torch.addmm(step, state, transposed)
        states.append(state)
    return torch.stack(states, 1)


class LinearDynamics(nn.Module):
    """x_t = A x_{t-1} + b + L u_t: a linear dynamical system where u_t is N(0, I) and its noise has variance L Lᵀ."""

    def __init__(self, state_dim: int, input_dim: int) -> None:
        super().__init__()
        self.initial_size = state_dim
        self.transition = nn.Linear(state_dim, state_dim)  # A and b
        self.input_map = nn.Linear(input_dim, state_dim, bias=False) if input_dim else None  # L
        # A slow decay whose stationary variance, 0.3²/(1 - 0.95²), is about that of x_0.
        self.transition.weight.data.copy_(0.95 * torch.eye(state_dim))
        nn.init.zeros_(self.transition.bias)
        if self.input_map is not None:
            nn.init.orthogonal_(self.input_map.weight, gain=0.3)

    def forward(self, initial: Tensor, inputs: Tensor | None, num_steps: int) -> Tensor:
        drive = self.transition.bias.expand(len(initial), num_steps, -1)
        if self.input_map is not None:
            drive = drive + self.input_map(inputs)
        return recursion(initial, drive, self.transition.weight)

    def step(self, state: Tensor, inputs: Tensor | None) -> Tensor:
        moved = self.transition(state)
        return moved if self.input_map is None else moved + self.input_map(inputs)


class Additive(nn.Module):
    """x_t = h(x_{t-1}) + L u_t, h(x) = x + W₂ g(W₁ x + b₁) + b₂: nonlinear dynamics with additive Gaussian noise."""

    def __init__(self, state_dim: int, input_dim: int, hidden_dim: int, nonlinearity: str) -> None:
        super().__init__()
        self.initial_size, self.activation = state_dim, ACTIVATIONS[nonlinearity]
        self.inner, self.outer = nn.Linear(state_dim, hidden_dim), nn.Linear(hidden_dim, state_dim)
        self.input_map = nn.Linear(input_dim, state_dim, bias=False) if input_dim else None  # L
        # Near the identity, and with small noise, whose variance adds up over time.
        nn.init.normal_(self.outer.weight, std=0.1 / hidden_dim**0.5)
        nn.init.zeros_(self.outer.bias)
        if self.input_map is not None:
            nn.init.orthogonal_(self.input_map.weight, gain=0.1)

    def forward(self, initial: Tensor, inputs: Tensor | None, num_steps: int) -> Tensor:
        noise = [0.0] * num_steps if self.input_map is None else self.input_map(inputs).unbind(1)
        states, state = [], initial
        for increment in noise:
            state = self._advance(state) + increment
            states.append(state)
        return torch.stack(states, 1)

    def step(self, state: Tensor, inputs: Tensor | None) -> Tensor:
        moved = self._advance(state)
        return moved if self.input_map is None else moved + self.input_map(inputs)

    def _advance(self, state: Tensor) -> Tensor:
        return state + self.outer(self.activation(self.inner(state)))


class Recurrent(nn.Module):
    """torch's recurrent networks over all of u in one call; x_t is the hidden state.

    vanilla: x_t = g(W u_t + U x_{t-1} + b), g tanh or relu. gru: torch applies the reset gate after U, tanh(W u_t + b +
    r ⊙ (U x_{t-1} + c)); the slides before, U (r ⊙ x_{t-1}). lstm: x_0 is hidden state and cell, (B, 2 state_dim).
    """

    def __init__(self, kind: str, state_dim: int, input_dim: int, nonlinearity: str) -> None:
        super().__init__()
        self.kind, self.activation = kind, ACTIVATIONS[nonlinearity]
        self.initial_size = 2 * state_dim if kind == "lstm" else state_dim
        self.input_dim = max(input_dim, 1)  # without inputs a constant 0 is fed, whose weights get no gradient
        if kind == "vanilla":
            self.network = nn.RNN(self.input_dim, state_dim, nonlinearity=nonlinearity, batch_first=True)
        else:
            cell = {"gru": nn.GRU, "lstm": nn.LSTM}[kind]
            self.network = cell(self.input_dim, state_dim, batch_first=True)

    def forward(self, initial: Tensor, inputs: Tensor | None, num_steps: int) -> Tensor:
        if inputs is None:
            inputs = initial.new_zeros(len(initial), num_steps, self.input_dim)
        first = initial[None]
        if self.kind == "lstm":
            first = tuple(part.contiguous() for part in first.chunk(2, dim=2))
        return self.network(inputs, first)[0]

    def train(self, mode: bool = True) -> Recurrent:
        # cuDNN differentiates recurrent networks in training mode only; without dropout the modes are the same.
        super().train(mode)
        self.network.train()
        return self

    def step(self, state: Tensor, inputs: Tensor | None) -> Tensor:
        if inputs is None:
            inputs = state.new_zeros(*state.shape[:-1], self.input_dim)
        hidden = state.chunk(2, dim=-1)[0] if self.kind == "lstm" else state
        input_weight, state_weight, input_bias, state_bias = self.network.parameters()
        of_input = F.linear(inputs, input_weight, input_bias)
        of_state = F.linear(hidden, state_weight, state_bias)
        if self.kind == "vanilla":
            return self.activation(of_input + of_state)
        if self.kind == "gru":
            (r_input, z_input, n_input), (r_state, z_state, n_state) = of_input.chunk(3, -1), of_state.chunk(3, -1)
            reset, keep = torch.sigmoid(r_input + r_state), torch.sigmoid(z_input + z_state)
            return (1 - keep) * torch.tanh(n_input + reset * n_state) + keep * hidden
        enter, forget, candidate, leave = (of_input + of_state).chunk(4, -1)
        cell = torch.sigmoid(forget) * state.chunk(2, dim=-1)[1] + torch.sigmoid(enter) * torch.tanh(candidate)
        return torch.cat([torch.sigmoid(leave) * torch.tanh(cell), cell], -1)


Generator = LinearDynamics | Additive | Recurrent


def build_generator(kind: str, state_dim: int, input_dim: int, hidden_dim: int, nonlinearity: str) -> Generator:
    """The generator of that name: linear, additive, vanilla, gru or lstm."""
    if kind == "linear":
        return LinearDynamics(state_dim, input_dim)
    if kind == "additive":
        return Additive(state_dim, input_dim, hidden_dim, nonlinearity)
    return Recurrent(kind, state_dim, input_dim, nonlinearity)
