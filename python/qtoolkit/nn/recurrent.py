"""Recurrent layers with int8 weights, whose inputs and states are quantized as they come.

Each step's products are ``qtoolkit.ops.linear_dynamic``; those of the inputs are computed for all
steps at once. Gates are float32. The equations are those of ``torch.nn.LSTM``, ``GRU`` and ``RNN``.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from qtoolkit.nn.linear import DynamicLinear


def _dynamic(weight: Tensor, bias: Tensor | None, name: str) -> DynamicLinear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return DynamicLinear.from_float(linear, name=name)


def _next_state(mode: str, x: Tensor, y: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The next hidden (before a projection) and cell state.

    Args:
        mode: ``"LSTM"``, ``"GRU"``, ``"RNN_TANH"`` or ``"RNN_RELU"``.
        x, y: the products of input and hidden state, ``[batch, gates * hidden_size]``.
        h, c: the states; only the LSTM has a cell state.
    """
    if mode == "LSTM":
        i, f, g, o = (x + y).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c
    if mode == "GRU":
        xr, xz, xn = x.chunk(3, 1)
        yr, yz, yn = y.chunk(3, 1)
        z = torch.sigmoid(xz + yz)
        n = torch.tanh(xn + torch.sigmoid(xr + yr) * yn)
        return n + z * (h - n), c
    if mode == "RNN_RELU":
        return torch.relu(x + y), c
    return torch.tanh(x + y), c


class RecurrentLayer(nn.Module):
    """One direction of one layer.

    Attributes:
        mode: see ``_next_state``.
        input, hidden: the products of input and hidden state.
        projection: of an LSTM's hidden state, or None.
    """

    def __init__(
        self, mode: str, input: nn.Module, hidden: nn.Module, projection: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.mode = mode
        self.input = input
        self.hidden = hidden
        self.projection = projection

    def forward(
        self, x: Tensor, batch_sizes: list[int], h: Tensor, c: Tensor, reverse: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Runs over a sequence.

        Args:
            x: ``[sum(batch_sizes), input_size]``, the rows of each step after those of the last.
            batch_sizes: rows of each step, falling.
            h, c: the states before, ``[batch, ...]``.
            reverse: begin with the last step.

        Returns:
            The hidden states of all steps, in the order of x, and the states after.
        """
        gates = self.input(x)
        steps = len(batch_sizes)
        outputs: list[Tensor] = []
        end = 0 if not reverse else gates.size(0)
        for index in range(steps):
            size = batch_sizes[steps - 1 - index if reverse else index]
            start = end - size if reverse else end
            end = start if reverse else end + size
            now, cell = h[:size], c[:size]
            now, cell = _next_state(
                self.mode, gates[start : start + size], self.hidden(now), now, cell
            )
            if self.projection is not None:
                now = self.projection(now)
            outputs.append(now)
            # Sequences that are over, or have not begun from behind, keep their state.
            h = now if size == h.size(0) else torch.cat([now, h[size:]])
            c = cell if size == c.size(0) else torch.cat([cell, c[size:]])
        if reverse:
            outputs.reverse()
        return torch.cat(outputs), h, c


class _Recurrent(nn.Module):
    """What the three kinds share; see ``DynamicLSTM``."""

    # Class attributes without annotations: torch.jit.script cannot read annotations that are
    # strings.
    _kind = cast("type[Any]", nn.RNNBase)

    def __init__(self, layers: list[RecurrentLayer], like: nn.RNNBase) -> None:
        super().__init__()
        self.mode = like.mode
        self.input_size = like.input_size
        self.hidden_size = like.hidden_size
        self.num_layers = like.num_layers
        self.bias = like.bias
        self.batch_first = like.batch_first
        self.dropout = float(like.dropout)
        self.bidirectional = like.bidirectional
        self.proj_size = like.proj_size
        self.layers = nn.ModuleList(layers)

    @classmethod
    def from_float(cls, rnn: nn.RNNBase, *, name: str = "") -> Any:
        """The layer for a float one, which is not changed.

        Args:
            rnn: ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN``; float32, float16 or bfloat16.
            name: its name, for error messages.

        Raises:
            TypeError: ``rnn`` is of another class or dtype.
            ValueError: a value is NaN or infinite.
        """
        name = name or cls._kind.__name__
        if not isinstance(rnn, cls._kind):
            raise TypeError(
                f"{name} must be a torch.nn.{cls._kind.__name__}, got {type(rnn).__name__}"
            )
        layers = []
        for layer in range(rnn.num_layers):
            for suffix in ("", "_reverse")[: 2 if rnn.bidirectional else 1]:
                end = f"_l{layer}{suffix}"

                def part(kind: str, end: str = end) -> DynamicLinear:
                    bias = getattr(rnn, f"bias_{kind}{end}", None)
                    return _dynamic(
                        getattr(rnn, f"weight_{kind}{end}"), bias, f"{name}.weight_{kind}{end}"
                    )

                projection = part("hr") if rnn.proj_size else None
                layers.append(RecurrentLayer(rnn.mode, part("ih"), part("hh"), projection))
        return cls(layers, rnn)

    def flatten_parameters(self) -> None:
        """Does nothing; ``nn.LSTM`` has it."""

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}"
        return f"{text}, batch_first={self.batch_first}, bidirectional={self.bidirectional}"

    def _run(
        self, x: Tensor, batch_sizes: list[int], h: Tensor, c: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All layers over ``[sum(batch_sizes), input_size]``, with states ``[layers *
        directions, batch, ...]``."""
        if x.size(1) != self.input_size:
            raise RuntimeError(
                f"input must have {self.input_size} features, as the layer has, got {x.size(1)}"
            )
        outputs: list[Tensor] = []
        hidden: list[Tensor] = []
        cells: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            reverse = self.bidirectional and index % 2 == 1
            y, last, cell = layer(x, batch_sizes, h[index], c[index], reverse)
            outputs.append(y)
            hidden.append(last)
            cells.append(cell)
            if reverse or not self.bidirectional:
                x = torch.cat(outputs, 1)
                outputs = []
                if self.dropout > 0.0 and index + 1 < len(self.layers):
                    x = functional.dropout(x, self.dropout, self.training)
        return x, torch.stack(hidden), torch.stack(cells)

    def _zeros(self, x: Tensor, batch: int, size: int) -> Tensor:
        directions = 2 if self.bidirectional else 1
        return torch.zeros(
            self.num_layers * directions, batch, size, dtype=x.dtype, device=x.device
        )

    def _output_size(self) -> int:
        return self.proj_size if self.proj_size > 0 else self.hidden_size

    def _run_padded(
        self, x: Tensor, h: Tensor | None, c: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same for ``[steps, batch, input_size]`` (or batch first), states absent or given."""
        if self.batch_first:
            x = x.transpose(0, 1)
        steps, batch = x.size(0), x.size(1)
        h = self._zeros(x, batch, self._output_size()) if h is None else h
        c = self._zeros(x, batch, self.hidden_size) if c is None else c
        y, h, c = self._run(x.reshape(steps * batch, x.size(2)), [batch] * steps, h, c)
        y = y.reshape(steps, batch, y.size(1))
        return y.transpose(0, 1) if self.batch_first else y, h, c

    def _run_any(
        self, x: Tensor, h: Tensor | None, c: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same, also for one sequence ``[steps, input_size]`` without a batch."""
        if x.dim() == 3:
            return self._run_padded(x, h, c)
        if x.dim() != 2:
            raise RuntimeError(f"input must have 2 or 3 dimensions, got {x.dim()}")
        axis = 0 if self.batch_first else 1
        y, h, c = self._run_padded(
            x.unsqueeze(axis),
            None if h is None else h.unsqueeze(1),
            None if c is None else c.unsqueeze(1),
        )
        return y.squeeze(axis), h.squeeze(1), c.squeeze(1)

    def _run_packed(self, packed: Any, h: Tensor | None, c: Tensor | None) -> Any:
        """The same for a ``PackedSequence``."""
        sizes = packed.batch_sizes.tolist()
        order, back = packed.sorted_indices, packed.unsorted_indices

        def sort(state: Tensor | None, size: int) -> Tensor:
            if state is None:
                return self._zeros(packed.data, sizes[0], size)
            return state if order is None else state.index_select(1, order)

        data, h, c = self._run(
            packed.data, sizes, sort(h, self._output_size()), sort(c, self.hidden_size)
        )
        if back is not None:
            h, c = h.index_select(1, back), c.index_select(1, back)
        return PackedSequence(data, packed.batch_sizes, order, back), h, c


class DynamicLSTM(_Recurrent):
    """``nn.LSTM`` with int8 weights, on float rows that are quantized one by one as they come; see
    ``DynamicLinear``. No calibration, no gradient; on CPU.

    Takes and gives what ``nn.LSTM`` does: padded batches, single sequences, and, in Python, a
    ``PackedSequence``.
    """

    _kind = cast("type[Any]", nn.LSTM)

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h: Tensor | None = None
        c: Tensor | None = None
        if hx is not None:
            h, c = hx
        if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript skips what is inside)
            if isinstance(input, PackedSequence):
                output, h, c = self._run_packed(input, h, c)
                return output, (h, c)
        output, last, cell = self._run_any(input, h, c)
        return output, (last, cell)


class DynamicGRU(_Recurrent):
    """``nn.GRU`` with int8 weights; see ``DynamicLSTM``."""

    _kind = cast("type[Any]", nn.GRU)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript skips what is inside)
            if isinstance(input, PackedSequence):
                return self._run_packed(input, hx, None)[:2]
        output, h, _ = self._run_any(input, hx, None)
        return output, h


class DynamicRNN(DynamicGRU):
    """``nn.RNN`` with int8 weights; see ``DynamicLSTM``."""

    _kind = cast("type[Any]", nn.RNN)


class _RecurrentCell(nn.Module):
    """What the three cells share; see ``DynamicLSTMCell``."""

    _kind = cast("type[Any]", nn.RNNCellBase)

    def __init__(self, mode: str, input: nn.Module, hidden: nn.Module, like: Any) -> None:
        super().__init__()
        self.mode = mode
        self.input = input
        self.hidden = hidden
        self.input_size = like.input_size
        self.hidden_size = like.hidden_size
        self.bias = like.bias

    @classmethod
    def from_float(cls, cell: nn.RNNCellBase, *, name: str = "") -> Any:
        """The cell for a float one, which is not changed; see ``DynamicLSTM.from_float``."""
        name = name or cls._kind.__name__
        if not isinstance(cell, cls._kind):
            raise TypeError(
                f"{name} must be a torch.nn.{cls._kind.__name__}, got {type(cell).__name__}"
            )
        modes = {nn.LSTMCell: "LSTM", nn.GRUCell: "GRU"}
        mode = next((mode for kind, mode in modes.items() if isinstance(cell, kind)), "")
        mode = mode or f"RNN_{str(cell.nonlinearity).upper()}"
        parts = [
            _dynamic(getattr(cell, f"weight_{k}"), getattr(cell, f"bias_{k}"), f"{name}.weight_{k}")
            for k in ("ih", "hh")
        ]
        return cls(mode, parts[0], parts[1], cell)

    def _step(self, x: Tensor, h: Tensor | None, c: Tensor | None) -> tuple[Tensor, Tensor]:
        """The next states of ``[batch, input_size]``, or of ``[input_size]`` alone."""
        alone = x.dim() == 1
        x = x.unsqueeze(0) if alone else x
        zeros = torch.zeros(x.size(0), self.hidden_size, dtype=x.dtype, device=x.device)
        h = zeros if h is None else h.reshape(zeros.shape)
        c = zeros if c is None else c.reshape(zeros.shape)
        h, c = _next_state(self.mode, self.input(x), self.hidden(h), h, c)
        if alone:
            return h.squeeze(0), c.squeeze(0)
        return h, c

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, {self.mode}"


class DynamicLSTMCell(_RecurrentCell):
    """``nn.LSTMCell`` with int8 weights; see ``DynamicLSTM``."""

    _kind = cast("type[Any]", nn.LSTMCell)

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        h: Tensor | None = None
        c: Tensor | None = None
        if hx is not None:
            h, c = hx
        return self._step(input, h, c)


class DynamicGRUCell(_RecurrentCell):
    """``nn.GRUCell`` with int8 weights; see ``DynamicLSTM``."""

    _kind = cast("type[Any]", nn.GRUCell)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return self._step(input, hx, None)[0]


class DynamicRNNCell(DynamicGRUCell):
    """``nn.RNNCell`` with int8 weights; see ``DynamicLSTM``."""

    _kind = cast("type[Any]", nn.RNNCell)
