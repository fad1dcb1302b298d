"""QConfig of torch.ao: factories of observers, and the default ones."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import torch
from torch import nn

from qtoolkit.quantization import fake_quantize as fq
from qtoolkit.quantization import observer as ob


class QConfig(namedtuple("QConfig", ["activation", "weight"])):
    """How a layer's activations and weight are quantized, as observers or fake-quantize modules.

    Args:
        activation, weight: classes, or factories such as ``MinMaxObserver.with_args(dtype=...)``;
            those of torch.ao are taken as well.
    """

    __slots__ = ()

    def __new__(cls, activation: Any, weight: Any) -> QConfig:
        if isinstance(activation, nn.Module) or isinstance(weight, nn.Module):
            raise ValueError(
                "QConfig received an observer; pass its class, or MyObserver.with_args(x=1) for "
                "other arguments"
            )
        return super().__new__(cls, activation, weight)


QConfigAny = QConfig | None

default_qconfig = QConfig(ob.default_observer, ob.default_weight_observer)
default_debug_qconfig = QConfig(ob.default_debug_observer, ob.default_weight_observer)
default_per_channel_qconfig = QConfig(ob.default_observer, ob.default_per_channel_weight_observer)
default_dynamic_qconfig = QConfig(ob.default_dynamic_quant_observer, ob.default_weight_observer)
per_channel_dynamic_qconfig = QConfig(
    ob.default_dynamic_quant_observer, ob.default_per_channel_weight_observer
)
float16_dynamic_qconfig = QConfig(
    ob.PlaceholderObserver.with_args(dtype=torch.float16, is_dynamic=True),
    ob.PlaceholderObserver.with_args(dtype=torch.float16),
)
float16_static_qconfig = QConfig(
    ob.PlaceholderObserver.with_args(dtype=torch.float16),
    ob.PlaceholderObserver.with_args(dtype=torch.float16),
)
float_qparams_weight_only_qconfig = QConfig(
    ob.default_placeholder_observer, ob.default_float_qparams_observer
)
default_qat_qconfig = QConfig(fq.default_fake_quant, fq.default_weight_fake_quant)
default_qat_qconfig_v2 = QConfig(fq.default_fused_act_fake_quant, fq.default_fused_wt_fake_quant)
default_weight_only_qconfig = QConfig(nn.Identity, fq.default_weight_fake_quant)
default_activation_only_qconfig = QConfig(fq.default_fake_quant, nn.Identity)
default_reuse_input_qconfig = QConfig(ob.default_reuse_input_observer, ob.NoopObserver)

_SIGNED_ACTIVATION = {"dtype": torch.qint8, "reduce_range": False}
default_symmetric_qnnpack_qconfig = QConfig(
    ob.HistogramObserver.with_args(**_SIGNED_ACTIVATION), ob.weight_observer_range_neg_127_to_127
)
default_per_channel_symmetric_qnnpack_qconfig = QConfig(
    ob.HistogramObserver.with_args(**_SIGNED_ACTIVATION),
    ob.per_channel_weight_observer_range_neg_127_to_127,
)
_SIGNED_FAKE_QUANT = fq.FusedMovingAvgObsFakeQuantize.with_args(
    observer=ob.MovingAverageMinMaxObserver,
    quant_min=-128,
    quant_max=127,
    dtype=torch.qint8,
    reduce_range=False,
)
default_symmetric_qnnpack_qat_qconfig = QConfig(
    _SIGNED_FAKE_QUANT, fq.fused_wt_fake_quant_range_neg_127_to_127
)
default_per_channel_symmetric_qnnpack_qat_qconfig = QConfig(
    _SIGNED_FAKE_QUANT, fq.fused_per_channel_wt_fake_quant_range_neg_127_to_127
)

BACKENDS = ("fbgemm", "x86", "qnnpack", "onednn")


def _check(backend: str, version: int, known: tuple[int, ...], function: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"{function}: unknown backend {backend!r}; use one of {BACKENDS}")
    if version not in known:
        raise ValueError(f"{function}: unknown version {version}; use one of {known}")


def get_default_qconfig(backend: str = "x86", version: int = 0) -> QConfig:
    """The default for post-training quantization.

    Args:
        backend: "x86", "fbgemm", "onednn" (weights per channel) or "qnnpack" (per tensor). The
            kernels that run are the same.
        version: 0.

    Raises:
        ValueError: another backend or version.
    """
    _check(backend, version, (0,), "get_default_qconfig")
    activation = ob.HistogramObserver.with_args(reduce_range=backend in ("fbgemm", "x86"))
    if backend == "qnnpack":
        return QConfig(activation, ob.default_weight_observer)
    return QConfig(activation, ob.default_per_channel_weight_observer)


def get_default_qat_qconfig(backend: str = "x86", version: int | None = 1) -> QConfig:
    """The default for quantization-aware training; see ``get_default_qconfig``.

    Args:
        backend: as there.
        version: 0 or 1, which are the same here.

    Raises:
        ValueError: another backend or version.
    """
    version = 1 if version is None else version
    _check(backend, version, (0, 1), "get_default_qat_qconfig")
    activation = fq.FusedMovingAvgObsFakeQuantize.with_args(
        observer=ob.MovingAverageMinMaxObserver,
        quant_min=0,
        quant_max=255,
        reduce_range=backend in ("fbgemm", "x86"),
    )
    if backend == "qnnpack":
        return QConfig(activation, fq.default_fused_wt_fake_quant)
    return QConfig(activation, fq.default_fused_per_channel_wt_fake_quant)


def get_default_qconfig_dict(backend: str = "x86", version: int = 0) -> dict[str, Any]:
    """``get_default_qconfig`` in the form that ``prepare_fx`` took earlier."""
    return {"": get_default_qconfig(backend, version)}


def get_default_qat_qconfig_dict(backend: str = "x86", version: int = 1) -> dict[str, Any]:
    """``get_default_qat_qconfig`` in the form that ``prepare_qat_fx`` took earlier."""
    return {"": get_default_qat_qconfig(backend, version)}
