"""Weights of codes as GPTQ's and AWQ's checkpoints hold them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qtoolkit.nn.weight_only import PackedWeight
from qtoolkit.ops import pack_codes, unpack_codes
from qtoolkit.saving.container import require

# Where AWQ keeps eight neighbours in 32 bits: the first, third, ... and then the others.
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
    good = tuple(tensor.shape) == shape and (dtype is None or tensor.dtype == dtype)
    require(
        good,
        f"{name} must be {dtype or 'float'} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}",
    )


def _stream(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes `[rows, count]` of little-endian streams in int32 words `[rows, words]`."""
    packed = words.contiguous().view(torch.uint8)
    return unpack_codes(packed[:, : -(-count * bits // 8)].contiguous(), bits, count)


def read_gptq(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None,
    bits: int,
    *,
    zeros_minus_one: bool = True,
) -> tuple[PackedWeight, Tensor | None]:
    """A weight of a GPTQ checkpoint, and the order of the input's columns, or None if it is theirs.

    Layout: AutoGPTQ's and GPTQModel's ``qlinear``.

    Args:
        qweight: int32 ``[K * bits / 32, N]``; down each column a stream of K codes.
        qzeros: int32 ``[groups, N * bits / 32]``; along each row a stream of N zero points.
        scales: float ``[groups, N]``.
        g_idx: the group of each input, int32 ``[K]``; None: neighbours.
        bits: 2, 3, 4 or 8.
        zeros_minus_one: the first version of the format, whose zero points are one less.

    Raises:
        InvalidFileError: shapes do not fit, or groups are of different sizes.
    """
    require(bits in (2, 3, 4, 8), f"GPTQ weights have 2, 3, 4 or 8 bits, not {bits}")
    require(qweight.dim() == 2, "qweight must have two dimensions")
    rows = qweight.size(1)
    columns = qweight.size(0) * 32 // bits
    groups = scales.size(0)
    _check("qweight", qweight, (columns * bits // 32, rows), torch.int32)
    _check("qzeros", qzeros, (groups, rows * bits // 32), torch.int32)
    _check("scales", scales, (groups, rows), None)
    codes = _stream(qweight.t(), bits, columns)
    zeros = _stream(qzeros, bits, rows).t().int() + int(zeros_minus_one)
    order = None
    if g_idx is None:
        require(columns % groups == 0, "groups of different sizes need g_idx")
        size = columns // groups
    else:
        _check("g_idx", g_idx, (columns,), g_idx.dtype)
        size = max(1, int((g_idx == 0).sum()))
        order = torch.argsort(g_idx.long(), stable=True)
        expected = torch.arange(columns, device=g_idx.device) // size
        require(torch.equal(g_idx.long()[order], expected), f"g_idx has not groups of {size}")
        order = None if torch.equal(order, torch.arange(columns)) else order
    if order is not None:
        codes = codes[:, order]
    return _packed(codes, scales, zeros, bits, size), order


def read_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> PackedWeight:
    """A 4-bit weight of an AWQ checkpoint, in AutoAWQ's ``gemm`` layout.

    Args:
        qweight: int32 ``[K, N / 8]``, eight neighbours in the order 0, 2, 4, 6, 1, 3, 5, 7.
        qzeros: int32 ``[groups, N / 8]``, so too.
        scales: float ``[groups, N]``.

    Raises:
        InvalidFileError: shapes do not fit.
    """
    require(qweight.dim() == 2, "qweight must have two dimensions")
    columns, rows = qweight.size(0), qweight.size(1) * 8
    groups = scales.size(0)
    _check("qweight", qweight, (columns, rows // 8), torch.int32)
    _check("qzeros", qzeros, (groups, rows // 8), torch.int32)
    _check("scales", scales, (groups, rows), None)
    order = list(_AWQ_ORDER)

    def matrix(words: Tensor) -> Tensor:
        codes = _stream(words, 4, rows).reshape(words.size(0), -1, 8)
        return codes[..., order].reshape(words.size(0), rows).t()

    require(columns % groups == 0, f"{columns} columns cannot be {groups} groups of one size")
    size = columns // groups
    return _packed(matrix(qweight), scales, matrix(qzeros).int(), 4, size)


def _packed(codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, size: int) -> PackedWeight:
    return PackedWeight(
        f"int{bits}",
        bits,
        size,
        codes.size(1),
        pack_codes(codes, bits),
        scales.t().float().contiguous(),
        zeros.to(torch.uint8).contiguous(),
    )


def read_layer(
    tensors: dict[str, Tensor], config: dict[str, Any]
) -> tuple[PackedWeight, Tensor | None]:
    """A layer's weight and input order from its tensors by short name.

    Args:
        tensors: ``qweight``, ``qzeros``, ``scales`` and perhaps ``g_idx``.
        config: ``quantization_config`` of a model's ``config.json``.

    Raises:
        InvalidFileError: a tensor is missing or does not fit, or the method is another.
    """
    lost = [key for key in ("qweight", "qzeros", "scales") if key not in tensors]
    require(not lost, f"it lacks {lost}")
    method = config.get("quant_method")
    qweight, qzeros, scales = (tensors[key] for key in ("qweight", "qzeros", "scales"))
    if method == "awq":
        version = str(config.get("version", "gemm")).lower()
        require(version == "gemm", f"AWQ's layout {version!r} is not known, only gemm")
        return read_awq(qweight, qzeros, scales), None
    require(method == "gptq", f"weights of {method!r} are not known, only gptq and awq")
    first = config.get("checkpoint_format", "gptq") != "gptq_v2"
    bits: Any = config.get("bits")
    require(type(bits) is int, "quantization_config must give bits")
    return read_gptq(qweight, qzeros, scales, tensors.get("g_idx"), bits, zeros_minus_one=first)
