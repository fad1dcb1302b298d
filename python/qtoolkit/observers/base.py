"""The base class of observers and the rule from a range to scale and zero point."""

from __future__ import annotations

import warnings
from typing import ClassVar

import torch
from torch import Tensor

from qtoolkit.formats import get_format
from qtoolkit.observers.state import QuantizationState
from qtoolkit.qconfig import TensorSpec

# The inverse of a scale, and its products with others, must be finite.
_SMALLEST = 2.0**-100
_EPS = torch.finfo(torch.float32).eps
_FLOAT_MAX = torch.finfo(torch.float32).max
# Dtypes that the operators read as they are; others are converted first.
_OBSERVED = (torch.float32, torch.float16, torch.bfloat16)


def _valid(scale: Tensor) -> Tensor:
    """Epsilon for an empty range, else the scale, kept where it and its inverse are normal."""
    return torch.where(scale == 0, _EPS, scale.clamp(_SMALLEST, _FLOAT_MAX))


def range_to_qparams(min_val: Tensor, max_val: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point for values between min_val and max_val (float32, same shape).

    Affine: the range is widened to include 0, scale = (max - min) / (quant_max - quant_min),
    zero_point = quant_min - round(min / scale). Symmetric: scale = max(|min|, |max|) divided by
    half the number of steps, with the format's middle code as zero point. A range of zero gives
    float32's epsilon as scale. Reads no value on the
    host: NaN gives NaN.

    Returns:
        scale (float32) and zero_point (int32) of min_val's shape.
    """
    quant_min, quant_max = spec.quant_min, spec.quant_max
    low, high = min_val.clamp(max=0.0), max_val.clamp(min=0.0)
    if spec.symmetric:
        scale = _valid(torch.maximum(-low, high) / ((quant_max - quant_min) / 2))
        middle = get_format(spec.format).symmetric_zero_point()
        return scale, torch.full_like(scale, middle, dtype=torch.int32)
    scale = _valid((high - low) / float(quant_max - quant_min))
    zero_point = (quant_min - torch.round(low / scale)).clamp(quant_min, quant_max)
    return scale, zero_point.to(torch.int32)


def _before_relu(x: Tensor, residual: Tensor) -> Tensor:
    """x, but where relu(x + residual) is 0 the greatest value of which that holds, up to 0."""
    values = residual.detach().neg().clamp_(max=0)
    if values.shape != x.shape or values.dtype != x.dtype:
        return torch.maximum(x, values)
    return torch.maximum(x, values, out=values)  # fresh memory costs more than the arithmetic


class Observer(QuantizationState):
    """Records statistics of the tensors that pass and chooses scale and zero point from them.

    A subclass implements `observe`, keeps its state in buffers (`min_val` and `max_val` here,
    float32), and may override `value_range`, `merge_states` and `reset`. It is registered with
    `@register_observer(name)`.

    Args:
        spec: how the tensor is quantized; the class's own default when absent.
        name: the module that the tensor belongs to, for error messages.

    Attributes:
        enabled: False while frozen; saved in the state dict.
        pinned: what ``pin`` decided, or None; not saved in the state dict.
        on_nonfinite: "error", or "skip": then tensors that hold NaN or Inf leave the statistics as
            they are, with one warning that names the observer.
    """

    granularities: ClassVar[tuple[str, ...]] = ("per_tensor",)
    options: ClassVar[tuple[str, ...]] = ()  # attributes that observers to be merged share
    flags = ("enabled",)

    min_val: Tensor
    max_val: Tensor

    def __init__(self, spec: TensorSpec | None = None, *, name: str = "") -> None:
        super().__init__()
        self.spec = self.default_spec() if spec is None else spec
        self.name = name
        self.enabled = True
        self.on_nonfinite = "error"
        self.pinned: tuple[Tensor, Tensor] | None = None
        self._warned = False
        if self.spec.granularity not in self.granularities:
            raise ValueError(
                f"{type(self).__name__}{self._for_name()} is for granularity "
                f"{' or '.join(self.granularities)}, not {self.spec.granularity}"
            )
        shape = (0,) if "min_val" in self.resizable else ()
        self.register_buffer("min_val", torch.full(shape, float("inf")))
        self.register_buffer("max_val", torch.full(shape, float("-inf")))

    @classmethod
    def default_spec(cls) -> TensorSpec:
        """The spec of an observer that is made without one."""
        raise NotImplementedError

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Records x unless frozen, and returns it unchanged.

        Args:
            x: floating point, any shape; statistics are taken in float32.
            residual: what will be added to x, where a ReLU follows. Whatever lies below both zero
                and -residual gives the same result, and is recorded as the larger of x and the
                lesser of these. See ``graph.patterns.branch``.

        Raises:
            TypeError: x is not a floating-point tensor.
            ValueError: x is empty, or holds NaN or Inf and `on_nonfinite` is "error". On an
                accelerator, and in compiled code, NaN and Inf are recorded and reported by
                `calculate_qparams`, as a check here would wait for the device.
        """
        if not self.enabled:
            return x
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = f"a {x.dtype} tensor" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"observer{self._for_name()}: needs a float tensor, got {kind}")
        if x.numel() == 0:
            raise ValueError(
                f"observer{self._for_name()}: got an empty tensor of shape {tuple(x.shape)}; "
                "calibrate with batches that are not empty"
            )
        with torch.no_grad():
            recorded = x.detach() if residual is None else _before_relu(x.detach(), residual)
            self.observe(recorded if x.dtype in _OBSERVED else recorded.to(torch.float32))
        return x

    def observe(self, x: Tensor) -> None:
        """Updates the statistics with x: float32, float16 or bfloat16, of any strides, not empty,
        without gradient."""
        raise NotImplementedError

    def value_range(self) -> tuple[Tensor, Tensor]:
        """The least and greatest value that the quantized tensor should represent."""
        return self.min_val, self.max_val

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale (float32) and zero point (int32): 0-dim per tensor, [channels] per channel.

        Raises:
            RuntimeError: nothing has been observed.
            ValueError: the values observed held NaN or Inf.
        """
        if self.pinned is not None:
            return self.pinned
        if not self.calibrated():
            raise RuntimeError(
                f"observer{self._for_name()} has seen no data: run qt.calibrate(prepared, loader) "
                "on batches that reach this module"
            )
        self.check_finite(self.min_val, self.max_val)
        return range_to_qparams(*self.value_range(), self.spec)

    def pin(self, scale: Tensor, zero_point: Tensor) -> None:
        """Decides what ``calculate_qparams`` returns from now on, whatever was observed."""
        self.pinned = scale, zero_point

    def calculate_qparams_unchecked(self) -> tuple[Tensor, Tensor]:
        """`calculate_qparams` without the checks, which wait for an accelerator."""
        return range_to_qparams(*self.value_range(), self.spec)

    def calibrated(self) -> bool:
        """Whether any data has been observed."""
        return self.min_val.numel() > 0 and not bool(
            ((self.min_val == float("inf")) & (self.max_val == float("-inf"))).all()
        )

    def check_finite(self, min_val: Tensor, max_val: Tensor) -> None:
        """Raises ValueError that names this observer if a bound is NaN or Inf."""
        if not bool((torch.isfinite(min_val) & torch.isfinite(max_val)).all()):
            raise ValueError(
                f"observer{self._for_name()}: the data holds NaN or Inf; check the input of this "
                "module (a NaN in the batch, or an overflow in a layer before it)"
            )

    def freeze(self) -> None:
        """Stops recording; what was recorded stays."""
        self.enabled = False

    def unfreeze(self) -> None:
        """Records again."""
        self.enabled = True

    def settings(self) -> dict[str, object]:
        """What observers must have alike to be merged: the spec and `options`."""
        return {"spec": self.spec, **{name: getattr(self, name) for name in self.options}}

    @torch.no_grad()
    def merge(self, other: Observer) -> None:
        """Takes in what another observer has seen, which is not changed.

        The state becomes what `merge_states` makes of both. For observers of all data that is the
        state of one that saw everything, a histogram with its counts moved to the common bins; the
        merged moving average is the mean of both.

        Raises:
            TypeError: the other one is of another class.
            ValueError: it has other settings, or saw data with other channels or groups.
        """
        if type(other) is not type(self):
            raise TypeError(
                f"observer{self._for_name()}: a {type(self).__name__} cannot merge "
                f"{type(other).__name__}"
            )
        theirs = other.settings()
        for name, value in self.settings().items():
            if value != theirs[name]:
                raise ValueError(
                    f"observer{self._for_name()}: cannot merge another {name}: this one has "
                    f"{value}, the other {theirs[name]}"
                )
        if not other.calibrated():
            return
        states = {name: (own, getattr(other, name).to(own)) for name, own in self.named_buffers()}
        if not self.calibrated():
            for own, new in states.values():
                own.resize_(new.shape).copy_(new)
            return
        for own, new in states.values():
            if own.shape != new.shape:
                raise ValueError(
                    f"observer{self._for_name()}: cannot merge data of another shape: this one has "
                    f"ranges of shape {list(own.shape)}, the other {list(new.shape)}"
                )
        stacked = {name: torch.stack(pair).unsqueeze(1) for name, pair in states.items()}
        for name, merged in self.merge_states(stacked).items():
            states[name][0].copy_(merged[0])

    @classmethod
    def merge_states(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state of observers that saw the data of several; see `qtoolkit.distributed`.

        Args:
            state: each buffer of several observers on all ranks, [ranks, observers, *shape]. A rank
                on which an observer saw nothing has the state that `reset` leaves.

        Returns:
            Each buffer merged, [observers, *shape]: a function of `state` alone, so that all ranks
            get the same bits.
        """
        return {"min_val": state["min_val"].amin(0), "max_val": state["max_val"].amax(0)}

    def reset(self) -> None:
        """Forgets all data."""
        self.min_val.fill_(float("inf"))
        self.max_val.fill_(float("-inf"))

    def extra_repr(self) -> str:
        """Shows the format, and the range if it is one number a side."""
        text = f"{self.spec.format}, {self.spec.granularity}"
        if self.min_val.dim() == 0 and self.calibrated():
            text += f", min={self.min_val.item():.6g}, max={self.max_val.item():.6g}"
        return text

    def _for_name(self) -> str:
        return f" {self.name!r}" if self.name else ""

    def _checked(self, min_val: Tensor, max_val: Tensor) -> tuple[Tensor, Tensor]:
        """The bounds of a batch, or (Inf, -Inf) for those of data to skip.

        Checked where that costs no synchronisation and no graph break.
        """
        readable = min_val.device.type == "cpu" and not torch.compiler.is_compiling()
        if self.on_nonfinite == "error":
            if readable:
                self.check_finite(min_val, max_val)
            return min_val, max_val
        finite = torch.isfinite(min_val) & torch.isfinite(max_val)
        if readable and bool(finite.all()):
            return min_val, max_val
        if readable and not self._warned:
            self._warned = True
            warnings.warn(
                f"observer{self._for_name()}: the data holds NaN or Inf and is skipped",
                stacklevel=2,
            )
        return (
            torch.where(finite, min_val, float("inf")),
            torch.where(finite, max_val, float("-inf")),
        )

    def _widen_each(self, min_val: Tensor, max_val: Tensor, what: str) -> None:
        """Widens ranges of the data's shape, which the first batch gives; `what` names them."""
        if self.min_val.numel() == 0:
            self.min_val.resize_(min_val.shape).copy_(min_val)
            self.max_val.resize_(max_val.shape).copy_(max_val)
            return
        if min_val.shape != self.min_val.shape:
            raise ValueError(
                f"observer{self._for_name()}: got {what} {list(min_val.shape)} where earlier "
                f"tensors had {list(self.min_val.shape)}"
            )
        self.min_val.copy_(torch.minimum(self.min_val, min_val))
        self.max_val.copy_(torch.maximum(self.max_val, max_val))
