"""Observers by torch.ao's names and arguments; the statistics are those of qtoolkit.observers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qtoolkit import observers, ops
from qtoolkit.formats import FORMATS
from qtoolkit.qconfig import TensorSpec
from qtoolkit.quantization.errors import UnsupportedError

_SIGNED = {torch.qint8, torch.int8}
_UNSIGNED = {torch.quint8, torch.uint8}
_FLOATS = {torch.float16, torch.bfloat16}
_SYMMETRIC = {torch.per_tensor_symmetric, torch.per_channel_symmetric}
_FLOAT_QPARAMS = torch.per_channel_affine_float_qparams
_PER_CHANNEL = {torch.per_channel_affine, torch.per_channel_symmetric, _FLOAT_QPARAMS}


class PartialFactory:
    """What ``with_args`` returns: makes an observer when it is called."""

    def __init__(self, make: Callable[..., Any], keywords: dict[str, Any]) -> None:
        self.p = partial(make, **keywords)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.p(*args, **kwargs)

    def with_args(self, **kwargs: Any) -> PartialFactory:
        """The same with more arguments, or others."""
        return PartialFactory(self.p.func, {**self.p.keywords, **kwargs})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PartialFactory) and (
            (self.p.func, self.p.keywords) == (other.p.func, other.p.keywords)
        )

    def __hash__(self) -> int:
        return hash((self.p.func, tuple(sorted(map(str, self.p.keywords.items())))))

    def __repr__(self) -> str:
        arguments = ", ".join(f"{key}={value}" for key, value in self.p.keywords.items())
        return f"{getattr(self.p.func, '__name__', self.p.func)}.with_args({arguments})"


class _WithArgs:
    """Gives a class ``with_args``."""

    @classmethod
    def with_args(cls, **kwargs: Any) -> PartialFactory:
        """A factory of this class with these arguments."""
        return PartialFactory(cls, kwargs)


def format_name(dtype: torch.dtype, quant_min: int | None, quant_max: int | None) -> str:
    """The number format for a dtype of torch.ao and a range of codes.

    A range of 7 bits (``reduce_range``), which spares kernels that saturate, is that of 8 bits: no
    kernel here saturates.

    Raises:
        UnsupportedError: there is none.
    """
    if dtype not in _SIGNED | _UNSIGNED:
        advice = (
            "; there are no float16 layers here: use PyTorch's model.half(), or qtoolkit's float "
            'formats, qt.TensorSpec("fp16", method="float"), in training'
            if dtype in _FLOATS
            else ""
        )
        raise UnsupportedError(
            f"dtype must be torch.quint8, qint8, uint8 or int8, got {dtype}{advice}"
        )
    sign = "int" if dtype in _SIGNED else "uint"
    if quant_min is None or quant_max is None:
        return f"{sign}8"
    reduced = quant_max - quant_min == 127
    name = f"{sign}{8 if reduced else (quant_max - quant_min).bit_length()}"
    known = FORMATS.get(name)
    if known is None:
        raise UnsupportedError(f"no format has the codes {quant_min}..{quant_max} of {dtype}")
    low, high = known.quant_range(False)
    if not reduced and not (low <= quant_min <= low + 1 and quant_max == high):
        raise UnsupportedError(
            f"no format has the codes {quant_min}..{quant_max} of {dtype}; the nearest is {name} "
            f"with {low}..{high}"
        )
    return name


class ObserverBase(_WithArgs, observers.Observer):
    """Base of the observers by torch.ao's names; an instance of ``qtoolkit.observers.Observer``.

    Args:
        dtype: torch.quint8, qint8, uint8 or int8.
        qscheme: torch.per_tensor_affine, per_tensor_symmetric, per_channel_affine or
            per_channel_symmetric.
        reduce_range: accepted, without effect: all 8 bits are used, as no kernel saturates.
        quant_min, quant_max: the range of codes; fewer bits than 7 choose such a format.
        ch_axis: channel dimension of the observers per channel.
        eps: accepted, without effect: the least scale that torch.ao's kernels take; these take all.
        factory_kwargs: accepted, without effect: an observer is where its model is.
        is_dynamic: False; see ``PlaceholderObserver``.

    Raises:
        UnsupportedError: there is no such format, or ``is_dynamic``.
    """

    _observer = "minmax"
    _dtype = torch.quint8
    _qscheme: torch.qscheme = torch.per_tensor_affine
    _options: ClassVar[dict[str, float]] = {}  # with their defaults

    def __init__(
        self,
        dtype: torch.dtype | None = None,
        qscheme: torch.qscheme | None = None,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        *,
        ch_axis: int = 0,
        factory_kwargs: Any = None,
        eps: float | None = None,
        is_dynamic: bool = False,
        **options: Any,
    ) -> None:
        unknown = [name for name in options if name not in self._options]
        if unknown:
            raise TypeError(f"{type(self).__name__} got unknown arguments {unknown}")
        dtype = self._dtype if dtype is None else dtype
        qscheme = self._qscheme if qscheme is None else qscheme
        per_channel = qscheme in _PER_CHANNEL
        if per_channel != (self._qscheme in _PER_CHANNEL):
            raise UnsupportedError(f"{type(self).__name__} has no {qscheme}")
        if is_dynamic:
            raise UnsupportedError(
                f"{type(self).__name__} has no is_dynamic: use PlaceholderObserver.with_args("
                "dtype=torch.quint8, is_dynamic=True), and quantize_dynamic or convert"
            )
        spec = TensorSpec(
            format_name(dtype, quant_min, quant_max),
            "per_channel" if per_channel else "per_tensor",
            axis=ch_axis,
            symmetric=qscheme in _SYMMETRIC,
            observer=self._observer,
            observer_options=tuple(
                (name, value) for name, value in options.items() if value != self._options[name]
            ),
        )
        super().__init__(spec, **options)
        self.dtype = dtype
        self.qscheme = qscheme
        self.reduce_range = reduce_range
        self.is_dynamic = False
        self.ch_axis = ch_axis

    @classmethod
    def options_of(cls) -> tuple[str, ...]:
        """The names of the options that are this class's own, such as ``bins``."""
        return tuple(cls._options)

    @property
    def quant_min(self) -> int:
        """The lowest code."""
        return self.spec.quant_min

    @property
    def quant_max(self) -> int:
        """The highest code."""
        return self.spec.quant_max

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale (float32) and zero point (int32), both ``[1]`` or ``[channels]``."""
        scale, zero_point = super().calculate_qparams()
        return scale.reshape(-1), zero_point.reshape(-1)

    def reset_min_max_vals(self) -> None:
        """Forgets all data."""
        self.reset()


UniformQuantizationObserverBase = ObserverBase


class MinMaxObserver(ObserverBase, observers.MinMaxObserver):
    """The least and greatest value of all tensors seen."""


class MovingAverageMinMaxObserver(ObserverBase, observers.MovingAverageMinMaxObserver):
    """A moving average of the least and greatest value of each tensor.

    Args:
        averaging_constant: weight of the newest tensor, here the first argument.
    """

    _observer = "moving_average"
    _options: ClassVar[dict[str, float]] = {"averaging_constant": 0.01}

    def __init__(self, averaging_constant: float = 0.01, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, averaging_constant=averaging_constant, **kwargs)


class HistogramObserver(ObserverBase, observers.HistogramObserver):
    """The range of least squared error over a histogram of all tensors seen.

    Args:
        bins: number of bins, here the first argument.
        upsample_rate: torch.ao's default; counts move to wider bins in 16 parts.

    Raises:
        UnsupportedError: another ``upsample_rate``.
    """

    _observer = "histogram"
    _options: ClassVar[dict[str, float]] = {"bins": 2048}

    def __init__(
        self, bins: int = 2048, *args: Any, upsample_rate: int = 16, **kwargs: Any
    ) -> None:
        if upsample_rate != 16:
            raise UnsupportedError(f"HistogramObserver has no upsample_rate of {upsample_rate}")
        super().__init__(*args, bins=bins, **kwargs)


class PerChannelMinMaxObserver(ObserverBase, observers.PerChannelMinMaxObserver):
    """The least and greatest value of each channel of all tensors seen.

    Args:
        ch_axis: the channel dimension, here the first argument.
    """

    _observer = "per_channel_minmax"
    _qscheme = torch.per_channel_affine

    def __init__(self, ch_axis: int = 0, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, ch_axis=ch_axis, **kwargs)


class MovingAveragePerChannelMinMaxObserver(PerChannelMinMaxObserver):
    """A moving average of the least and greatest value of each channel.

    Args:
        averaging_constant: weight of the newest tensor, here the first argument.
    """

    def __init__(
        self, averaging_constant: float = 0.01, ch_axis: int = 0, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(ch_axis, *args, **kwargs)
        self.averaging_constant = averaging_constant

    def observe(self, x: Tensor) -> None:
        """Moves each channel's range towards that of x."""
        if not self.calibrated():
            super().observe(x)
            return
        bounds = self._checked(*ops.min_max_per_channel(x, self.spec.axis))
        for running, batch in zip((self.min_val, self.max_val), bounds):
            running += self.averaging_constant * (batch - running)


class FixedQParamsObserver(MinMaxObserver):
    """Scale and zero point that are given.

    In a model qtoolkit chooses them for sigmoid, tanh and softmax from the data, as for any layer;
    these apply where the observer is called by itself.

    Args:
        scale, zero_point: what ``calculate_qparams`` returns.
    """

    def __init__(
        self,
        scale: float,
        zero_point: int,
        dtype: torch.dtype = torch.quint8,
        qscheme: torch.qscheme = torch.per_tensor_affine,
        quant_min: int = 0,
        quant_max: int = 255,
        is_dynamic: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(dtype, qscheme, False, quant_min, quant_max, is_dynamic=is_dynamic)
        self.scale = torch.tensor([float(scale)])
        self.zero_point = torch.tensor([int(zero_point)], dtype=torch.int32)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """The given scale and zero point."""
        return self.scale, self.zero_point


class _Passing(_WithArgs, nn.Module):
    """Looks at nothing, and says only what a tensor shall become."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        custom_op_name: str = "",
        compute_dtype: torch.dtype | None = None,
        quant_min: int | None = None,
        quant_max: int | None = None,
        qscheme: torch.qscheme | None = None,
        eps: float | None = None,
        is_dynamic: bool = False,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.is_dynamic = is_dynamic or compute_dtype is not None

    def forward(self, x: Tensor) -> Tensor:
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Raises RuntimeError: it has seen nothing."""
        raise RuntimeError(f"{type(self).__name__} observes nothing, so it has no scale")


class PlaceholderObserver(_Passing):
    """Stands for a tensor that is quantized as it comes (``is_dynamic``) or stays in float."""


class NoopObserver(_Passing):
    """Stands for a tensor that stays in float."""


class ReuseInputObserver(_Passing):
    """Stands for a tensor that has its input's scale; qtoolkit finds these itself."""


class RecordingObserver(_Passing):
    """Keeps every tensor that passes."""

    def __init__(self, dtype: torch.dtype = torch.quint8, **kwargs: Any) -> None:
        super().__init__(dtype)
        self.tensor_val: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.tensor_val.append(x.clone())
        return x

    def get_tensor_value(self) -> list[Tensor]:
        """The tensors."""
        return self.tensor_val


default_observer = MinMaxObserver.with_args(quant_min=0, quant_max=127)
default_placeholder_observer = PlaceholderObserver
default_debug_observer = RecordingObserver
default_weight_observer = MinMaxObserver.with_args(
    dtype=torch.qint8, qscheme=torch.per_tensor_symmetric
)
weight_observer_range_neg_127_to_127 = default_weight_observer.with_args(
    quant_min=-127, quant_max=127
)
default_histogram_observer = HistogramObserver.with_args(quant_min=0, quant_max=127)
default_per_channel_weight_observer = PerChannelMinMaxObserver.with_args(
    dtype=torch.qint8, qscheme=torch.per_channel_symmetric
)
per_channel_weight_observer_range_neg_127_to_127 = default_per_channel_weight_observer.with_args(
    quant_min=-127, quant_max=127
)
default_dynamic_quant_observer = PlaceholderObserver.with_args(
    dtype=torch.quint8, quant_min=0, quant_max=255, is_dynamic=True
)
default_float_qparams_observer = PerChannelMinMaxObserver.with_args(
    dtype=torch.quint8, qscheme=_FLOAT_QPARAMS
)
default_fixed_qparams_range_0to1_observer = FixedQParamsObserver.with_args(
    scale=1.0 / 256.0, zero_point=0
)
default_fixed_qparams_range_neg1to1_observer = FixedQParamsObserver.with_args(
    scale=2.0 / 256.0, zero_point=128
)
default_symmetric_fixed_qparams_observer = default_fixed_qparams_range_neg1to1_observer
default_affine_fixed_qparams_observer = default_fixed_qparams_range_0to1_observer
default_reuse_input_observer = ReuseInputObserver
