"""FakeQuantize: quantizes and dequantizes in float, for training with quantization."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from qtoolkit import ops
from qtoolkit.fake_quantize.registry import get_fake_quantize_class, methods_for
from qtoolkit.formats import get_format
from qtoolkit.observers import Observer, make_observer
from qtoolkit.observers.state import EXTRA_STATE, QuantizationState
from qtoolkit.qconfig import TensorSpec

ON_NONFINITE = ("skip", "error")


class FakeQuantize(QuantizationState):
    """Rounds a tensor to the values that its quantized form can hold, and defines the gradient.

    `FakeQuantize(spec)` makes an instance of the class that is registered as `spec.method`; see
    `qtoolkit.fake_quantize`. A subclass implements `_observe` and `_quantize`.

    Args:
        spec: how the tensor is quantized.
        name: the module that the tensor belongs to, for error messages.
        is_weight: whether the tensor is a weight; per-channel and per-group tensors are, when not
            given.

    Attributes:
        observer: the observer that `spec` names, None where the method needs none.
        scale, zero_point: float32 and int32 (float32 where it is learned), 0-dim or [1] per
            tensor, [channels] per channel; parameters where the method learns them, else buffers.
        observing: False while frozen.
        fake_quantizing: False while tensors pass through unchanged.
        ready: whether scale and zero point hold values from data.
            The three flags and the spec are saved in the state dict.
        on_nonfinite: what NaN or Inf in data that is measured does: "error" raises ValueError that
            names the module; with "skip" the statistics stay as they are, and a warning names the
            module once. Not checked on an accelerator and in compiled code, as that would wait for
            the device: there "skip" is silent and "error" shows up in `calculate_qparams`.
    """

    kinds: ClassVar[tuple[str, ...]] = ("integer",)
    """Kinds of formats that the method quantizes to."""
    granularities: ClassVar[tuple[str, ...]] = ("per_tensor", "per_channel")
    roles: ClassVar[tuple[str, ...]] = ("activation", "weight")
    """What the method is for."""

    flags = ("observing", "fake_quantizing", "ready")
    resizable: ClassVar[tuple[str, ...]] = ("scale", "zero_point")

    scale: Tensor
    zero_point: Tensor
    _seen: Tensor

    def __new__(cls, spec: TensorSpec | None = None, *args: Any, **kwargs: Any) -> FakeQuantize:
        # A pickle and a deepcopy name the class and give no spec.
        chosen = cls
        if cls is FakeQuantize and spec is not None:
            chosen = get_fake_quantize_class(spec.method)
        return super().__new__(chosen)

    def __init__(self, spec: TensorSpec, name: str = "", *, is_weight: bool | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.is_weight = spec.granularity != "per_tensor" if is_weight is None else is_weight
        problem = self.problem_as(spec, "weight" if self.is_weight else "activation")
        if problem is not None and is_weight is not None:
            raise ValueError(f"FakeQuantize of {name!r}: {problem}, got {spec}")
        self.observer: Observer | None = None
        if self.uses_observer(spec):
            self.observer = make_observer(spec, name)
        self._name = name
        self._warned = False
        self.observing = True
        self.fake_quantizing = True
        self._ready = False
        self.on_nonfinite = "error"
        # Averaged copies of a model hold its buffers and not its attributes.
        self.register_buffer("_seen", torch.zeros(()), persistent=False)

    @classmethod
    def uses_observer(cls, spec: TensorSpec) -> bool:
        """Whether `spec.observer` chooses, or begins, the range."""
        return False

    @classmethod
    def problem(cls, spec: TensorSpec) -> str | None:
        """Why the method cannot quantize as a spec says, with what to use, or None."""
        kind = get_format(spec.format).kind
        if kind not in cls.kinds:
            return (
                f"quantizes to {' and '.join(cls.kinds)} formats, and {spec.format} is "
                f"{kind}: use method {' or '.join(map(repr, methods_for(kind)))}"
            )
        if spec.granularity not in cls.granularities:
            return f"is for granularity {' or '.join(cls.granularities)}, not {spec.granularity}"
        return None

    @classmethod
    def problem_as(cls, spec: TensorSpec, role: str) -> str | None:
        """Why the method is not for an "activation" or a "weight" of a spec, or None."""
        if role not in cls.roles:
            return f"method {spec.method!r} is for {' and '.join(f'{r}s' for r in cls.roles)}"
        if role == "activation" and spec.granularity != "per_tensor":
            return "activations are quantized per tensor"
        return None

    @property
    def ready(self) -> bool:
        """Whether scale and zero point hold values from data."""
        if not self._ready and bool(self._seen):
            self._ready = True
        return self._ready

    @ready.setter
    def ready(self, value: bool) -> None:
        if value != self._ready:
            self._ready = value
            self._seen.fill_(float(value))

    @property
    def name(self) -> str:
        """The module that the tensor belongs to."""
        return self._name

    @name.setter
    def name(self, value: str) -> None:
        self._name = value
        if self.observer is not None:
            self.observer.name = value

    @property
    def on_nonfinite(self) -> str:
        """What NaN or Inf in the data does, "skip" or "error"."""
        return self._on_nonfinite

    @on_nonfinite.setter
    def on_nonfinite(self, value: str) -> None:
        if value not in ON_NONFINITE:
            raise ValueError(f"on_nonfinite must be one of {ON_NONFINITE}, got {value!r}")
        self._on_nonfinite = value
        if self.observer is not None:
            self.observer.on_nonfinite = value

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantizes x, a floating-point tensor of any shape; returns its shape and dtype.

        Raises:
            RuntimeError: a tensor that was never observed is used in eval mode or frozen.
            TypeError, ValueError: for a tensor that cannot be observed.
        """
        follows = self.follows_data()
        # What a call quantizes with is not read from the buffers: those change in place at the
        # next call, which may come before the gradient of this one.
        parameters = self._observe(x) if follows else self._known()
        if not self.fake_quantizing:
            return x
        if follows and not self._ready:
            return x  # all that came so far was NaN or Inf
        self.check_ready()
        return self._quantize(x, *parameters)

    def follows_data(self) -> bool:
        """Whether a call now takes notice of its tensor.

        A backward that computes activations again (activation checkpointing) has shown them before.
        """
        recomputing = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        return self.observing and (self.training or self.is_weight) and not recomputing

    def allocate(self, x: Tensor) -> None:
        """Gives parameters and buffers the shapes that they have for tensors like x.

        Optimizers, averaged copies and sharding rely on shapes that do not change later.
        """

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale (float32) and zero point (int32): 0-dim per tensor, [channels] per channel.

        Raises:
            RuntimeError: nothing has been observed.
            ValueError: the data held NaN or Inf.
        """
        self.check_ready()
        scale, zero_point = self._qparams()
        if not bool((torch.isfinite(scale) & torch.isfinite(zero_point)).all()):
            raise ValueError(self._nonfinite_message())
        return scale, zero_point

    def code_format(self) -> tuple[Tensor, Tensor, tuple[int, int]] | None:
        """Scale, int32 zero point and range of the codes that the values of the last call are.

        None where they are no codes per tensor or per output channel. Reads no value on the host.
        """
        codes = get_format(self.spec.format).has_codes and self.spec.granularity != "per_group"
        if not codes or self.spec.axis != 0 or not self.ready or not self.fake_quantizing:
            return None
        return *self._qparams(), (self.spec.quant_min, self.spec.quant_max)

    def integer_codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A weight as codes: the very values that `forward` gives in evaluation, undivided.

        Args:
            x: float32, output channels first.

        Returns:
            codes (int8, shaped like x) and scale (float32 [channels]).

        Raises:
            ValueError: the weight's codes need a zero point.
        """
        scale, zero_point = self.calculate_qparams()
        if bool((zero_point != 0).any()):
            raise ValueError(
                f"integer kernels need a weight with zero point 0, got {self.spec} for "
                f"{self.name!r}"
            )
        channels = x.shape[0]
        scale = scale.reshape(-1).expand(channels).contiguous()
        zeros = torch.zeros(channels, dtype=torch.int32, device=x.device)
        low, high = self.spec.quant_min, self.spec.quant_max
        codes = ops.quantize_per_channel(
            x.detach().float().contiguous(), scale, zeros, 0, low, high
        )
        return codes, scale

    def freeze(self) -> None:
        """Keeps scale and zero point as they are from now on; learned ones get no gradient."""
        self.observing = False

    def unfreeze(self) -> None:
        """Lets scale and zero point follow the data, or learn, again."""
        self.observing = True

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Switches quantization on, or off: then tensors are observed and pass unchanged."""
        self.fake_quantizing = enabled

    def extra_repr(self) -> str:
        """Shows what is quantized, and the flags that differ from their defaults."""
        parts = [self.spec.format, self.spec.granularity]
        if self.spec.method != "observed":
            parts.append(self.spec.method)
        if self.is_weight:
            parts.append("weight")
        if not self.observing:
            parts.append("frozen")
        if not self.fake_quantizing:
            parts.append("fake quantization off")
        return ", ".join(parts)

    def check_ready(self) -> None:
        """Raises RuntimeError that names the module if nothing has been observed."""
        if not self.ready:
            of = f" of {self.name!r}" if self.name else ""
            raise RuntimeError(
                f"FakeQuantize{of} has seen no data: run a batch in training mode (model.train()), "
                "or qt.calibrate(prepared, loader), or load a checkpoint of the prepared model"
            )

    def check_measured(self) -> None:
        """Raises ValueError that names the module if all its data so far was skipped as NaN or
        Inf."""
        warned = self._warned or (self.observer is not None and self.observer._warned)
        if warned and not self.ready:
            raise ValueError(self._nonfinite_message())

    # What a method implements.

    def _observe(self, x: Tensor) -> tuple[Tensor, ...]:
        """Takes notice of x, sets `ready` and returns what to quantize x with."""
        raise NotImplementedError

    def _known(self) -> tuple[Tensor, ...]:
        """What the last call quantized with."""
        return self.scale, self.zero_point

    def _quantize(self, x: Tensor, *parameters: Tensor) -> Tensor:
        """Fake-quantizes x with what `_observe` or `_known` gave."""
        raise NotImplementedError

    def _qparams(self) -> tuple[Tensor, Tensor]:
        return self.scale, self.zero_point

    # State.

    def get_extra_state(self) -> Tensor:
        """The flags, then the spec as JSON: uint8 [flags + characters]."""
        spec = torch.frombuffer(bytearray(self.spec.to_json().encode()), dtype=torch.uint8)
        return torch.cat([super().get_extra_state(), spec])

    def set_extra_state(self, state: Tensor) -> None:
        """Restores the flags."""
        super().set_extra_state(state[: len(self.flags)])

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        state = state_dict.get(prefix + EXTRA_STATE)
        if isinstance(state, Tensor):
            self._check_same_spec(state, prefix)
        for name in self.resizable:
            # A tensor of no elements waits for its shape.
            shapes = [
                tuple(tensor.shape)
                for tensor in (state_dict.get(prefix + name), getattr(self, name, None))
                if isinstance(tensor, Tensor) and tensor.numel()
            ]
            if len(set(shapes)) > 1:
                raise ValueError(
                    f"the checkpoint is of another model: {prefix}{name} has shape {shapes[0]} "
                    f"there and {shapes[1]} here"
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _check_same_spec(self, state: Tensor, prefix: str) -> None:
        text = bytes(state[len(self.flags) :].tolist())
        if not text:
            return  # written before specs were saved
        try:
            spec = TensorSpec.from_json(text.decode())
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{prefix[:-1] or type(self).__name__}: expected {len(self.flags)} flags and a "
                f"TensorSpec in the state, got {state.numel()} bytes ({error})"
            ) from error
        if spec != self.spec:
            raise ValueError(
                f"the checkpoint is of another mapping: {prefix[:-1] or self.name!r} is {spec} "
                f"there and {self.spec} here; prepare the model with the mapping that it was "
                "trained with"
            )

    # Data that is not finite.

    def _nonfinite_message(self) -> str:
        of = f" {self.name!r}" if self.name else ""
        advice = (
            "lower the learning rate, or look for NaN in the gradients"
            if self.is_weight
            else "check the input of this module (a NaN in the batch, or an overflow in a layer "
            "before it)"
        )
        return f"fake-quantize{of}: the data holds NaN or Inf; {advice}"

    def _accepts(self, x: Tensor) -> bool:
        """Whether x is finite; if not, raises or warns as `on_nonfinite` says. Waits for x."""
        if x.numel() and all(bool(torch.isfinite(bound)) for bound in ops.min_max(x)):
            return True
        if self.on_nonfinite == "error":
            raise ValueError(self._nonfinite_message())
        if not self._warned:
            self._warned = True
            warnings.warn(f"{self._nonfinite_message()}. It is skipped.", stacklevel=2)
        return False
