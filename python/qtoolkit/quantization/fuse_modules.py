"""Fusing by names, as torch.ao's eager mode does it. Not needed: ``prepare`` fuses by itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval


class Fused(nn.Sequential):
    """Layers that are quantized as one."""


def _fused(name: str) -> type[Fused]:
    return type(name, (Fused,), {"__module__": __name__, "__doc__": "Layers quantized as one."})


ConvReLU1d = _fused("ConvReLU1d")
ConvReLU2d = _fused("ConvReLU2d")
ConvReLU3d = _fused("ConvReLU3d")
ConvBn1d = _fused("ConvBn1d")
ConvBn2d = _fused("ConvBn2d")
ConvBn3d = _fused("ConvBn3d")
ConvBnReLU1d = _fused("ConvBnReLU1d")
ConvBnReLU2d = _fused("ConvBnReLU2d")
ConvBnReLU3d = _fused("ConvBnReLU3d")
ConvTransposeBn = _fused("ConvTransposeBn")
LinearReLU = _fused("LinearReLU")
LinearBn1d = _fused("LinearBn1d")
LinearBnReLU1d = _fused("LinearBnReLU1d")
BNReLU2d = _fused("BNReLU2d")
BNReLU3d = _fused("BNReLU3d")

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_RELU = (nn.ReLU, nn.ReLU6)
# What can be fused, for training, and after the batch norm is folded (None: only the layer stays).
_SEQUENCES: list[tuple[tuple[Any, ...], type[Fused], type[Fused] | None]] = [
    ((nn.Conv1d, nn.BatchNorm1d, _RELU), ConvBnReLU1d, ConvReLU1d),
    ((nn.Conv2d, nn.BatchNorm2d, _RELU), ConvBnReLU2d, ConvReLU2d),
    ((nn.Conv3d, nn.BatchNorm3d, _RELU), ConvBnReLU3d, ConvReLU3d),
    ((nn.Conv1d, nn.BatchNorm1d), ConvBn1d, None),
    ((nn.Conv2d, nn.BatchNorm2d), ConvBn2d, None),
    ((nn.Conv3d, nn.BatchNorm3d), ConvBn3d, None),
    ((nn.Conv1d, _RELU), ConvReLU1d, ConvReLU1d),
    ((nn.Conv2d, _RELU), ConvReLU2d, ConvReLU2d),
    ((nn.Conv3d, _RELU), ConvReLU3d, ConvReLU3d),
    ((nn.Linear, nn.BatchNorm1d, _RELU), LinearBnReLU1d, LinearReLU),
    ((nn.Linear, nn.BatchNorm1d), LinearBn1d, None),
    ((nn.Linear, _RELU), LinearReLU, LinearReLU),
    ((nn.BatchNorm2d, _RELU), BNReLU2d, BNReLU2d),
    ((nn.BatchNorm3d, _RELU), BNReLU3d, BNReLU3d),
    ((nn.ConvTranspose1d, nn.BatchNorm1d), ConvTransposeBn, None),
    ((nn.ConvTranspose2d, nn.BatchNorm2d), ConvTransposeBn, None),
    ((nn.ConvTranspose3d, nn.BatchNorm3d), ConvTransposeBn, None),
]


def fuse_modules(
    model: nn.Module,
    modules_to_fuse: list[str] | list[list[str]],
    inplace: bool = False,
    fuser_func: Callable[..., Any] | None = None,
    fuse_custom_config_dict: dict[str, Any] | None = None,
) -> nn.Module:
    """Fuses sequences of layers of a model in evaluation mode; batch norms are folded.

    The first layer of each becomes the fused one, the others ``nn.Identity``.

    Args:
        model: the model.
        modules_to_fuse: names, such as ``[["conv1", "bn1", "relu1"], ["fc", "relu2"]]``, or those
            of one sequence. A sequence is a convolution or linear layer, batch norm, ReLU (either
            of the latter may be missing), or batch norm and ReLU.
        inplace: change the model itself.
        fuser_func, fuse_custom_config_dict: None; there are no others.

    Raises:
        ValueError: a layer is in training mode.
        NotImplementedError: the layers are no such sequence.
    """
    return _fuse_modules(
        model, modules_to_fuse, inplace, fuser_func, fuse_custom_config_dict, is_qat=False
    )


def fuse_modules_qat(
    model: nn.Module,
    modules_to_fuse: list[str] | list[list[str]],
    inplace: bool = False,
    fuser_func: Callable[..., Any] | None = None,
    fuse_custom_config_dict: dict[str, Any] | None = None,
) -> nn.Module:
    """``fuse_modules`` for a model in training mode: batch norms stay layers, and train.

    Raises:
        ValueError: a layer is in evaluation mode.
        NotImplementedError: the layers are no such sequence.
    """
    return _fuse_modules(
        model, modules_to_fuse, inplace, fuser_func, fuse_custom_config_dict, is_qat=True
    )


def _fuse_modules(
    model: nn.Module,
    modules_to_fuse: Any,
    inplace: bool,
    fuser_func: Any,
    fuse_custom_config_dict: Any,
    *,
    is_qat: bool,
) -> nn.Module:
    if fuser_func is not None or fuse_custom_config_dict:
        raise NotImplementedError(
            "fuse_modules: fuser_func and fuse_custom_config_dict must be None; qtoolkit's prepare "
            "fuses by graph patterns (CONTRIBUTING.md)"
        )
    model = model if inplace else copy.deepcopy(model)
    given = list(modules_to_fuse)
    for names in [given] if all(isinstance(name, str) for name in given) else given:
        _fuse_known(model, names, is_qat=is_qat)
    return model


def _fuse_known(model: nn.Module, names: list[str], *, is_qat: bool) -> None:
    layers = [model.get_submodule(name) for name in names]
    found = next(
        (
            (training, folded)
            for kinds, training, folded in _SEQUENCES
            if len(kinds) == len(layers)
            and all(isinstance(layer, kind) for layer, kind in zip(layers, kinds))
        ),
        None,
    )
    if found is None:
        kinds = [type(layer).__name__ for layer in layers]
        raise NotImplementedError(f"Cannot fuse modules: {kinds} ({', '.join(names)})")
    for name, layer in zip(names, layers):
        if layer.training != is_qat:
            function = "fuse_modules_qat" if is_qat else "fuse_modules"
            raise ValueError(
                f"{function}: {name} is in {'evaluation' if is_qat else 'training'} mode; call "
                f"model.{'train' if is_qat else 'eval'}() first"
            )
    training, folded = found
    result = training(*layers) if is_qat else _fold(layers, training, folded)
    for hook in layers[0]._forward_pre_hooks.values():
        result.register_forward_pre_hook(hook)
    for hook in layers[-1]._forward_hooks.values():
        result.register_forward_hook(hook)
    layers[0]._forward_pre_hooks.clear()
    layers[-1]._forward_hooks.clear()
    result.train(is_qat)
    if hasattr(layers[0], "qconfig"):
        result.qconfig = layers[0].qconfig
    model.set_submodule(names[0], result)
    for name in names[1:]:
        model.set_submodule(name, nn.Identity().train(is_qat))


def _fold(layers: list[nn.Module], training: type[Fused], folded: type[Fused] | None) -> nn.Module:
    first, second = layers[0], layers[1]
    if not isinstance(second, nn.modules.batchnorm._BatchNorm):
        return training(*layers)
    if isinstance(first, _TRANSPOSED) and first.groups > 1:
        return training(*layers)  # prepare folds it; torch's function knows no groups
    layer: nn.Module
    if isinstance(first, nn.Linear):
        layer = fuse_linear_bn_eval(first, second)
    else:
        layer = fuse_conv_bn_eval(first, second, isinstance(first, _TRANSPOSED))  # type: ignore
    return layer if folded is None else folded(layer, *layers[2:])
