"""The same PTQ and QAT through torch.ao.quantization (FX), for comparison."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import platform
import warnings
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.data import DataLoader

X86 = platform.machine().lower() in ("x86_64", "amd64")


def why_missing() -> str | None:
    """Why torch.ao.quantization cannot be used here, None if it can."""
    try:
        found = importlib.util.find_spec("torch.ao.quantization.quantize_fx")
    except ModuleNotFoundError:
        found = None
    if found is None:
        return f"PyTorch {torch.__version__} has no torch.ao.quantization"
    if engine() not in torch.backends.quantized.supported_engines:
        return f"this PyTorch has no quantized engine {engine()}"
    return None


def engine() -> str:
    return "x86" if X86 else "qnnpack"


def _script(converted: nn.Module, example: torch.Tensor) -> torch.jit.ScriptModule:
    return torch.jit.freeze(torch.jit.trace(converted.eval(), example))


def ptq(
    model: nn.Module, loader: DataLoader, max_batches: int, backend: str | None = None
) -> torch.jit.ScriptModule:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    backend = backend or engine()
    torch.backends.quantized.engine = backend
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        example = next(iter(loader))[0][:1]
        mapping = get_default_qconfig_mapping(backend)
        prepared = prepare_fx(copy.deepcopy(model).eval(), mapping, (example,))
        with torch.inference_mode():
            for images, _ in itertools.islice(loader, max_batches):
                prepared(images)
        return _script(convert_fx(prepared), example)


def qat(
    model: nn.Module, example: torch.Tensor, fine_tune: Callable[[nn.Module, Callable], None]
) -> torch.jit.ScriptModule:
    """`fine_tune(prepared, freeze)` trains and calls freeze() when ranges and batch norm stop."""
    from torch.ao.nn.intrinsic.qat import freeze_bn_stats
    from torch.ao.quantization import disable_observer, get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

    torch.backends.quantized.engine = engine()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mapping = get_default_qat_qconfig_mapping(engine())
        prepared = prepare_qat_fx(copy.deepcopy(model).train(), mapping, (example,))

        def freeze() -> None:
            prepared.apply(disable_observer)
            prepared.apply(freeze_bn_stats)

        fine_tune(prepared, freeze)
        return _script(convert_fx(prepared.eval()), example)
