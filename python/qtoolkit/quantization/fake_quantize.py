"""Fake-quantize modules by torch.ao's names and arguments, and functions for ``model.apply``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qtoolkit.fake_quantize import FakeQuantize as FakeQuantizeBase
from qtoolkit.fake_quantize import ObservedFakeQuantize
from qtoolkit.nn.qat.batch_norm import is_freezable
from qtoolkit.quantization.eager import later
from qtoolkit.quantization.observer import (
    FixedQParamsObserver,
    HistogramObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    ObserverBase,
    PartialFactory,
)


class FakeQuantize(ObservedFakeQuantize):
    """Quantizes and dequantizes in the range that an observer finds.

    Args:
        observer: the class of the observer, or a factory of it.
        quant_min, quant_max: the range of codes, see ``ObserverBase``.
        is_dynamic: False, as of the observers.
        observer_kwargs: arguments of the observer.
    """

    def __init__(
        self,
        observer: Any = MovingAverageMinMaxObserver,
        quant_min: int | None = None,
        quant_max: int | None = None,
        is_dynamic: bool = False,
        **observer_kwargs: Any,
    ) -> None:
        if quant_min is not None:
            observer_kwargs["quant_min"] = quant_min
        if quant_max is not None:
            observer_kwargs["quant_max"] = quant_max
        if is_dynamic:
            observer_kwargs["is_dynamic"] = True  # which raises
        made = observer(**observer_kwargs)
        super().__init__(made.spec)
        self.observer = made

    @classmethod
    def with_args(cls, **kwargs: Any) -> PartialFactory:
        """A factory of this class with these arguments."""
        return PartialFactory(cls, kwargs)

    @property
    def activation_post_process(self) -> ObserverBase:
        """The observer."""
        assert isinstance(self.observer, ObserverBase)
        return self.observer

    @property
    def dtype(self) -> torch.dtype:
        """The observer's."""
        return self.activation_post_process.dtype

    @property
    def qscheme(self) -> torch.qscheme:
        """The observer's."""
        return self.activation_post_process.qscheme

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale (float32) and zero point (int32), both ``[1]`` or ``[channels]``."""
        scale, zero_point = super().calculate_qparams()
        return scale.reshape(-1).clone(), zero_point.reshape(-1).clone()

    def disable_fake_quant(self) -> None:
        """Lets tensors pass unchanged."""
        self.enable_fake_quant(False)

    def enable_observer(self, enabled: bool = True) -> None:
        """Lets the range follow the data."""
        self.observing = enabled

    def disable_observer(self) -> None:
        """Keeps the range as it is."""
        self.enable_observer(False)


class FusedMovingAvgObsFakeQuantize(FakeQuantize):
    """``FakeQuantize``: moving average and quantization are one operator here anyway."""


class FixedQParamsFakeQuantize(FakeQuantize):
    """``FakeQuantize`` with a given scale and zero point; see ``FixedQParamsObserver``."""

    def __init__(self, observer: Any = FixedQParamsObserver, **observer_kwargs: Any) -> None:
        super().__init__(observer, **observer_kwargs)
        fixed = self.observer
        assert isinstance(fixed, FixedQParamsObserver)
        self.scale.copy_(fixed.scale.reshape(()))
        self.zero_point.copy_(fixed.zero_point.reshape(()))
        self.ready = True
        self.observing = False


def disable_fake_quant(module: nn.Module) -> None:
    """For ``model.apply``: lets tensors pass without rounding."""
    later(module, disable_fake_quant)
    if isinstance(module, FakeQuantizeBase):
        module.enable_fake_quant(False)


def enable_fake_quant(module: nn.Module) -> None:
    """For ``model.apply``: rounds again."""
    later(module, enable_fake_quant)
    if isinstance(module, FakeQuantizeBase):
        module.enable_fake_quant(True)


def disable_observer(module: nn.Module) -> None:
    """For ``model.apply``: keeps ranges as they are."""
    later(module, disable_observer)
    if isinstance(module, FakeQuantizeBase):
        module.freeze()


def enable_observer(module: nn.Module) -> None:
    """For ``model.apply``: lets ranges follow the data again."""
    later(module, enable_observer)
    if isinstance(module, FakeQuantizeBase):
        module.unfreeze()


def freeze_bn_stats(module: nn.Module) -> None:
    """For ``model.apply``: batch norms use their running statistics and leave them unchanged.

    It is ``torch.ao.nn.intrinsic.qat.freeze_bn_stats`` for models of this package.
    """
    later(module, freeze_bn_stats)
    if is_freezable(module):
        module.freeze(True)  # type: ignore[operator]


def update_bn_stats(module: nn.Module) -> None:
    """For ``model.apply``: batch norms use the statistics of the batch again."""
    later(module, update_bn_stats)
    if is_freezable(module):
        module.freeze(False)  # type: ignore[operator]


_ACTIVATION = {"quant_min": 0, "quant_max": 255, "dtype": torch.quint8}
_WEIGHT = {"quant_min": -128, "quant_max": 127, "dtype": torch.qint8}

default_fake_quant = FakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver,
    qscheme=torch.per_tensor_affine,
    reduce_range=True,
    **_ACTIVATION,
)
default_weight_fake_quant = FakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver,
    qscheme=torch.per_tensor_symmetric,
    reduce_range=False,
    **_WEIGHT,
)
default_per_channel_weight_fake_quant = FakeQuantize.with_args(
    observer=MovingAveragePerChannelMinMaxObserver,
    qscheme=torch.per_channel_symmetric,
    reduce_range=False,
    ch_axis=0,
    **_WEIGHT,
)
default_histogram_fake_quant = FakeQuantize.with_args(
    observer=HistogramObserver, qscheme=torch.per_tensor_affine, reduce_range=True, **_ACTIVATION
)
default_fused_act_fake_quant = FusedMovingAvgObsFakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver, **_ACTIVATION
)
default_fused_wt_fake_quant = FusedMovingAvgObsFakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver, qscheme=torch.per_tensor_symmetric, **_WEIGHT
)
default_fused_per_channel_wt_fake_quant = FusedMovingAvgObsFakeQuantize.with_args(
    observer=MovingAveragePerChannelMinMaxObserver, qscheme=torch.per_channel_symmetric, **_WEIGHT
)
fused_wt_fake_quant_range_neg_127_to_127 = default_fused_wt_fake_quant.with_args(quant_min=-127)
fused_per_channel_wt_fake_quant_range_neg_127_to_127 = (
    default_fused_per_channel_wt_fake_quant.with_args(quant_min=-127)
)
default_fixed_qparams_range_0to1_fake_quant = FixedQParamsFakeQuantize.with_args(
    observer=FixedQParamsObserver.with_args(scale=1.0 / 256.0, zero_point=0)
)
default_fixed_qparams_range_neg1to1_fake_quant = FixedQParamsFakeQuantize.with_args(
    observer=FixedQParamsObserver.with_args(scale=2.0 / 256.0, zero_point=128)
)
default_symmetric_fixed_qparams_fake_quant = default_fixed_qparams_range_neg1to1_fake_quant
default_affine_fixed_qparams_fake_quant = default_fixed_qparams_range_0to1_fake_quant
