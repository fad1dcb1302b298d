"""torch.ao's dynamic quantization by classes and names."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import nn

from qtoolkit import dynamic
from qtoolkit.dynamic import replace_layers
from qtoolkit.graph.report import Report, get_report, set_report
from qtoolkit.quantization.errors import UnsupportedError
from qtoolkit.quantization.translate import is_table, spec_of

_RECURRENT = (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)
_DEFAULT = {
    torch.qint8: {nn.Linear, *_RECURRENT},
    torch.quint8: {nn.Embedding, nn.EmbeddingBag},
}
_LAYERS, _TABLES = "layers", "tables"


def quantize_dynamic(
    model: nn.Module,
    qconfig_spec: Any = None,
    dtype: torch.dtype = torch.qint8,
    mapping: Any = None,
    inplace: bool = False,
) -> nn.Module:
    """A model whose layers have weights of 8 bits and quantize each row of their input as it comes;
    see ``qtoolkit.quantize_dynamic``. Needs no data.

    Args:
        model: the float model.
        qconfig_spec: a set of classes and names of modules; a dict from these to QConfigs (None
            leaves them in float); or None for all linear and recurrent layers (torch.qint8), or all
            embeddings (torch.quint8). A name or class applies to what the module holds, too.
        dtype: torch.qint8, or torch.quint8 for embeddings.
        mapping: None; ``qtoolkit.nn`` has one class for each kind.
        inplace: change the model itself.

    Raises:
        UnsupportedError: another dtype, or a mapping.
        ValueError: a name is no module's; a weight holds NaN or infinity.
    """
    if mapping is not None:
        raise UnsupportedError("quantize_dynamic: mapping must be None")
    if get_report(model) is not None:
        raise ValueError("quantize_dynamic: this model is prepared or converted already")
    spec = _spec(qconfig_spec, dtype)
    names = {name for name, _ in model.named_modules()}
    unknown = [key for key in spec if isinstance(key, str) and key not in names]
    if unknown:
        raise ValueError(f"quantize_dynamic: the model has no modules {unknown}")
    if isinstance(model, dynamic.DYNAMIC_LAYERS) and _chosen(model, spec):
        return dynamic.quantize_dynamic(model, types=dynamic.DYNAMIC_LAYERS)
    result = (model if inplace else copy.deepcopy(model)).eval()
    chosen = _chosen(result, spec)
    report = Report(converted=True)
    report.floats += replace_layers(result, chosen)
    if len(report.floats) == len(chosen):
        reasons = "; ".join(f"{f.name}: {f.reason}" for f in report.floats[:3]) or "it has none"
        warnings.warn(f"quantize_dynamic: no layer was quantized ({reasons})", stacklevel=2)
    set_report(result, report)
    return result


def replace_dynamic(converted: nn.Module, names: list[str]) -> None:
    """Quantizes layers of a converted model dynamically, in place, where they are still float."""
    here = dict(converted.named_modules())
    floats = replace_layers(
        converted, [name for name in names if isinstance(here.get(name), dynamic.DYNAMIC_LAYERS)]
    )
    report = get_report(converted)
    assert report is not None
    report.floats = [f for f in report.floats if f.name not in names] + floats


def _spec(given: Any, dtype: torch.dtype) -> dict[Any, str | None]:
    """By class or name, what is quantized: layers, or tables of embeddings; None for neither."""
    if isinstance(given, dict):
        return {key: _kind_of(qconfig, key) for key, qconfig in given.items()}
    if dtype not in _DEFAULT:
        raise UnsupportedError(
            f"quantize_dynamic: dtype must be torch.qint8, or torch.quint8 for embeddings, got "
            f"{dtype}; for half the bytes use PyTorch's model.half(), for 4 bits "
            "qtoolkit.quantize_weights"
        )
    kind = _TABLES if dtype == torch.quint8 else _LAYERS
    return dict.fromkeys(_DEFAULT[dtype] if given is None else given, kind)


def _kind_of(qconfig: Any, key: Any) -> str | None:
    if qconfig is None:
        return None
    where = f"qconfig of {getattr(key, '__name__', key)}"
    spec_of(qconfig.activation, f"{where}: activation")
    weight = spec_of(qconfig.weight, f"{where}: weight")
    if weight is None:
        return None
    return _TABLES if weight.format.startswith("uint") else _LAYERS


def _chosen(model: nn.Module, spec: dict[Any, str | None]) -> list[str]:
    """The layers that are quantized: a module's own setting, or that of what holds it."""
    inherited: dict[str, str | None] = {}
    names = []
    for name, module in model.named_modules():
        outer = inherited.get(name.rpartition(".")[0]) if name else None
        kind = spec.get(name, spec.get(type(module), outer))
        if "qconfig" in module.__dict__:
            kind = _kind_of(module.qconfig, name)
        inherited[name] = kind
        wanted = _TABLES if is_table(module) else _LAYERS
        if isinstance(module, dynamic.DYNAMIC_LAYERS) and kind == wanted:
            names.append(name)
    return names
