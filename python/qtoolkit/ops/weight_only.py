"""Layers whose weight alone is codes, of 1 to 8 bits, and the packing of such codes.

A weight `[N, K]` is uint8 `codes` `[N, ceil(K * bits / 8)]`: each row is a little-endian stream in
which code j occupies the bits [j * bits, (j + 1) * bits), so of two 4-bit codes in a byte the first
is the low half. A row is cut into groups of `group_size` columns, the last one may be shorter, and

    value = (code - zero_point) * scale        or        value = table[code] * scale

with scale float32 `[N, ceil(K / group_size)]`, zero_point uint8 of the same shape or None, which
means 2^(bits - 1), and table float32 `[2^bits]`, beside which zero_point must be None.
"""

from math import gcd
from typing import Optional

import torch
from torch import Tensor
from torch.nn import functional

#: Elements of a weight that are float32 at a time.
_PANEL = 1 << 20
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _block(bits: int) -> tuple[int, int]:
    """Codes and bytes after which a stream's pattern repeats."""
    common = gcd(8, bits)
    return 8 // common, bits // common


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, got {bits}")


def packed_bytes(columns: int, bits: int) -> int:
    """Bytes of a row of that many codes."""
    return -(-columns * bits // 8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes `[N, K]` of any integer dtype, in [0, 2^bits), as streams, uint8
    `[N, ceil(K * bits / 8)]`; the bits beyond the last code are 0.

    Raises ValueError for another shape, bits outside [1, 8], or codes that do not fit.
    """
    _check_bits(bits)
    if codes.dim() != 2:
        raise ValueError(f"pack_codes: codes must be [N, K], got shape {list(codes.shape)}")
    if codes.numel() and not (int(codes.min()) >= 0 and int(codes.max()) < 1 << bits):
        raise ValueError(
            f"pack_codes: codes lie in [{int(codes.min())}, {int(codes.max())}], not in "
            f"[0, {(1 << bits) - 1}] as {bits} bits can hold"
        )
    rows, columns = codes.shape
    count, size = _block(bits)
    padded = functional.pad(codes.to(torch.uint8), (0, -columns % count))
    blocks = padded.reshape(rows, -1, count)
    packed = torch.zeros(rows, blocks.size(1), size, dtype=torch.uint8, device=codes.device)
    for j in range(count):
        byte, shift = divmod(j * bits, 8)
        packed[..., byte] |= blocks[..., j] << shift
        if shift + bits > 8:
            packed[..., byte + 1] |= blocks[..., j] >> (8 - shift)
    return packed.reshape(rows, -1)[:, : packed_bytes(columns, bits)].contiguous()


def unpack_codes(codes: Tensor, bits: int, columns: int) -> Tensor:
    """The first `columns` codes of each row of `pack_codes`'s result, uint8 `[N, columns]`.

    Raises ValueError for bits outside [1, 8], or where the rows are not of that many codes.
    """
    _check_bits(bits)
    if codes.dim() != 2 or codes.size(1) != packed_bytes(columns, bits):
        raise ValueError(
            f"unpack_codes: {columns} codes of {bits} bits need codes "
            f"[N, {packed_bytes(columns, bits)}], got shape {list(codes.shape)}"
        )
    if bits == 8:
        return codes
    count, size = _block(bits)
    rows = codes.size(0)
    blocks = functional.pad(codes, (0, -codes.size(1) % size)).reshape(rows, -1, size)
    parts = []
    for j in range(count):
        byte, shift = divmod(j * bits, 8)
        part = blocks[..., byte] >> shift
        if shift + bits > 8:
            part = part | (blocks[..., byte + 1] << (8 - shift))
        parts.append(part & ((1 << bits) - 1))
    return torch.stack(parts, dim=-1).reshape(rows, -1)[:, :columns]


def _centred(
    codes: Tensor,
    zero_point: Optional[Tensor],  # noqa: UP045
    bits: int,
    columns: int,
    group_size: int,
    table: Optional[Tensor],  # noqa: UP045
) -> Tensor:
    """Values without the scale, float32 `[N, columns]`."""
    unpacked = unpack_codes(codes, bits, columns)
    if table is not None:
        return table[unpacked.int()]
    if zero_point is None:
        return unpacked.float() - float(1 << (bits - 1))
    return unpacked.float() - _per_column(zero_point.float(), group_size, columns)


def _per_column(groups: Tensor, group_size: int, columns: int) -> Tensor:
    """What each group has, for each of its columns."""
    if groups.size(1) == 1:
        return groups
    return groups.repeat_interleave(group_size, dim=1)[:, :columns]


def dequantize_codes(
    codes: Tensor,
    scale: Tensor,
    zero_point: Optional[Tensor],  # noqa: UP045
    bits: int,
    columns: int,
    group_size: int,
    table: Optional[Tensor] = None,  # noqa: UP045
) -> Tensor:
    """The values of packed codes, float32 `[N, columns]`."""
    values = _centred(codes, zero_point, bits, columns, group_size, table)
    return values * _per_column(scale, group_size, columns)


def _check(
    operator: str,
    codes: Tensor,
    scale: Tensor,
    zero_point: Optional[Tensor],  # noqa: UP045
    bits: int,
    columns: int,
    group_size: int,
    table: Optional[Tensor],  # noqa: UP045
) -> None:
    _check_bits(bits)
    if group_size < 1:
        raise ValueError(f"{operator}: group_size must be at least 1, got {group_size}")
    for name, tensor, dtype in (
        ("codes", codes, torch.uint8),
        ("scale", scale, torch.float32),
        ("zero_point", zero_point, torch.uint8),
        ("table", table, torch.float32),
    ):
        if tensor is not None and tensor.dtype != dtype:
            raise TypeError(f"{operator}: {name} must be {dtype}, got {tensor.dtype}")
    if codes.dim() != 2 or codes.size(1) != packed_bytes(columns, bits):
        raise ValueError(
            f"{operator}: codes must be [N, {packed_bytes(columns, bits)}] for {columns} columns "
            f"of {bits} bits, got {list(codes.shape)}"
        )
    groups = [codes.size(0), -(-columns // group_size)]
    for name, tensor in (("scale", scale), ("zero_point", zero_point)):
        if tensor is not None and list(tensor.shape) != groups:
            raise ValueError(f"{operator}: {name} must be {groups}, got {list(tensor.shape)}")
    if table is not None and zero_point is not None:
        raise ValueError(f"{operator}: zero_point must be None beside a table")
    if table is not None and list(table.shape) != [1 << bits]:
        raise ValueError(f"{operator}: table must be [{1 << bits}], got {list(table.shape)}")


def linear_weight_only(
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Optional[Tensor],  # noqa: UP045
    bias: Optional[Tensor],  # noqa: UP045
    bits: int,
    group_size: int,
    table: Optional[Tensor] = None,  # noqa: UP045
    accumulate: str = "float32",
) -> Tensor:
    """The fully connected layer on float inputs with a weight of codes; see the module for these.

    input: float32, float16 or bfloat16 `[..., K]`; the result `[..., N]` has its dtype, 16-bit
    inputs being converted, computed in float32 and rounded once. bias: float32 `[N]`, or None.

    accumulate: "float32" for inputs as they are, which on CPU is one operator whose sums
    docs/numbers.md defines, the same bits on every CPU; "int8" for inputs rounded to int8 first,
    each group of each row with its own scale x_scale = max|x| / 127 (at least 2^-100),
    q = round_half_even(x * (1 / x_scale)). Then the sums of q * (code - zero_point) over a group
    are exact, and in float32, over the groups in order and from 0 on,

        y = fma(sum[g], scale[g] * x_scale[g], y)        and at last y + bias

    On CPU that is one operator with kernels for AVX-512 and AMX, if no table is given and a group
    holds a multiple of 32 bits; elsewhere the last bits may differ. With a table the products are
    float32. A group with NaN or infinity gives NaN there.

    The gradient is that of the input alone, as if it were not rounded. At most 2^20 weights are
    float32 at a time, in the gradient and elsewhere than on CPU.

    Raises TypeError for a wrong dtype, ValueError for a shape or option that does not fit.

    Sources: Frantar et al., "GPTQ" (2022), for weights of codes under float activations; Yao et
    al., "ZeroQuant" (2022), for rounded rows.
    """
    name = "linear_weight_only"
    if input.dtype not in _FLOATS:
        raise TypeError(f"{name}: input must be float32, float16 or bfloat16, got {input.dtype}")
    if input.dim() == 0:
        raise ValueError(f"{name}: input must be [..., K], got a tensor without dimensions")
    if accumulate not in ("float32", "int8"):
        raise ValueError(f'{name}: accumulate must be "float32" or "int8", got {accumulate!r}')
    _check(name, codes, scale, zero_point, bits, input.size(-1), group_size, table)
    if bias is not None and list(bias.shape) != [codes.size(0)]:
        raise ValueError(f"{name}: bias must be [{codes.size(0)}], got {list(bias.shape)}")
    return _linear(
        input, codes, scale, zero_point, bias, bits, group_size, table, accumulate == "int8"
    )


@torch.library.custom_op("qtoolkit_python::linear_weight_only", mutates_args=())
def _linear(
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Optional[Tensor],  # noqa: UP045
    bias: Optional[Tensor],  # noqa: UP045
    bits: int,
    group_size: int,
    table: Optional[Tensor],  # noqa: UP045
    rounded: bool,
) -> Tensor:
    if input.is_cpu:
        bias = None if bias is None else bias.float()
        if not rounded:
            return torch.ops.qtoolkit.linear_weight_only_exact(
                input, codes, scale, zero_point, bias, bits, group_size, table
            )
        if table is None and _has_kernel(bits, group_size):
            return torch.ops.qtoolkit.linear_weight_only(
                input, codes, scale, zero_point, bias, bits, group_size, None
            )
    columns = input.size(-1)
    x = input.reshape(-1, columns).float()
    y = x.new_empty(x.size(0), codes.size(0))
    for begin, end in _panels(codes.size(0), columns):
        zeros = None if zero_point is None else zero_point[begin:end]
        weight = _centred(codes[begin:end], zeros, bits, columns, group_size, table)
        if rounded:
            y[:, begin:end] = _group_sums(x, weight, scale[begin:end], group_size)
        else:
            weight *= _per_column(scale[begin:end], group_size, columns)
            torch.mm(x, weight.t(), out=y[:, begin:end])
    if bias is not None:
        y += bias
    return y.reshape(*input.shape[:-1], codes.size(0)).to(input.dtype)


def _has_kernel(bits: int, group_size: int) -> bool:
    kernel_bits = bits if bits in (1, 2, 4) else 8
    # Sums of a group of 8-bit codes stay in int32.
    return group_size * kernel_bits % 32 == 0 and group_size <= 1 << 16


def _panels(rows: int, columns: int) -> list[tuple[int, int]]:
    step = max(1, _PANEL // max(columns, 1))
    return [(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


def _round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes of rows as float32, and their scales; NaN for a row that is not finite."""
    largest = x.abs().amax(1, keepdim=True)
    scale = (largest / 127).clamp(min=2.0**-100)
    scale = torch.where(torch.isfinite(largest), scale, torch.nan)
    return torch.round(x * (1 / scale)), scale


def _group_sums(x: Tensor, weight: Tensor, scale: Tensor, group_size: int) -> Tensor:
    """Sums over each group, times the group's scales, added in order."""
    y = x.new_zeros(x.size(0), weight.size(0))
    for g in range(scale.size(1)):
        part = slice(g * group_size, (g + 1) * group_size)
        codes, x_scale = _round_rows(x[:, part])
        # Integer sums of up to 2^24 are exact in float32: 127 * 255 for each of 512 columns.
        wide = codes.double() if group_size > 512 else codes
        sums = (wide @ weight[:, part].to(wide.dtype).t()).float()
        # In double the product is exact, so the sum is rounded once, or almost.
        y = (sums.double() * (scale[:, g] * x_scale).double() + y.double()).float()
    return y


@_linear.register_fake
def _(
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Optional[Tensor],  # noqa: UP045
    bias: Optional[Tensor],  # noqa: UP045
    bits: int,
    group_size: int,
    table: Optional[Tensor],  # noqa: UP045
    rounded: bool,
) -> Tensor:
    return input.new_empty(*input.shape[:-1], codes.size(0))


@torch.library.custom_op("qtoolkit_python::linear_weight_only_backward", mutates_args=())
def _input_gradient(
    gradient: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Optional[Tensor],  # noqa: UP045
    bits: int,
    columns: int,
    group_size: int,
    table: Optional[Tensor],  # noqa: UP045
) -> Tensor:
    g = gradient.reshape(-1, codes.size(0)).float()
    result = g.new_zeros(g.size(0), columns)
    for begin, end in _panels(codes.size(0), columns):
        zeros = None if zero_point is None else zero_point[begin:end]
        weight = dequantize_codes(
            codes[begin:end], scale[begin:end], zeros, bits, columns, group_size, table
        )
        result.addmm_(g[:, begin:end], weight)
    return result.reshape(*gradient.shape[:-1], columns).to(gradient.dtype)


@_input_gradient.register_fake
def _(
    gradient: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Optional[Tensor],  # noqa: UP045
    bits: int,
    columns: int,
    group_size: int,
    table: Optional[Tensor],  # noqa: UP045
) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], columns)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    input, codes, scale, zero_point, _, bits, group_size, table, _ = inputs
    ctx.save_for_backward(codes, scale, zero_point, table)
    ctx.sizes = bits, input.size(-1), group_size


def _backward(ctx, gradient):  # type: ignore[no-untyped-def]
    codes, scale, zero_point, table = ctx.saved_tensors
    bits, columns, group_size = ctx.sizes
    x = _input_gradient(gradient, codes, scale, zero_point, bits, columns, group_size, table)
    return x, None, None, None, None, None, None, None, None


_linear.register_autograd(_backward, setup_context=_keep)


def embedding_weight_only(
    indices: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Optional[Tensor],  # noqa: UP045
    bits: int,
    columns: int,
    group_size: int,
    table: Optional[Tensor] = None,  # noqa: UP045
) -> Tensor:
    """Rows of a table of codes as float32 `[*indices.shape, columns]`; see the module for these.

    indices: int32 or int64 of any shape. Only the rows that are read are dequantized.

    Raises TypeError for a wrong dtype, ValueError for a shape that does not fit, IndexError for an
    index that is not in the table.
    """
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"embedding_weight_only: indices must be int32 or int64, got {indices.dtype}"
        )
    _check("embedding_weight_only", codes, scale, zero_point, bits, columns, group_size, table)
    flat = indices.reshape(-1)
    zeros = None if zero_point is None else functional.embedding(flat, zero_point)
    values = dequantize_codes(
        functional.embedding(flat, codes),
        functional.embedding(flat, scale),
        zeros,
        bits,
        columns,
        group_size,
        table,
    )
    return values.reshape(*indices.shape, columns)
