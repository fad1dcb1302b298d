"""Packed codes, and layers whose weight alone is codes."""

from __future__ import annotations

import pytest
import torch
from op_reference import forced_path
from torch import Tensor
from torch.nn import functional

from qtoolkit import _C, ops


def random_weight(
    rows: int, columns: int, bits: int, group_size: int, *, zeros: bool = False, table: bool = False
) -> dict:
    generator = torch.Generator().manual_seed(bits * 1000 + columns)
    groups = -(-columns // group_size)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator)
    zero_point = torch.randint(0, 1 << bits, (rows, groups), generator=generator)
    return {
        "codes": ops.pack_codes(codes, bits),
        "scale": torch.rand(rows, groups, generator=generator) * 0.1 + 0.01,
        "zero_point": zero_point.to(torch.uint8) if zeros else None,
        "bits": bits,
        "group_size": group_size,
        "table": torch.randn(1 << bits, generator=generator) if table else None,
    }


def slow_weight(weight: dict, columns: int) -> Tensor:
    """One code at a time, by the definition."""
    bits, codes = weight["bits"], weight["codes"]
    result = torch.zeros(codes.size(0), columns)
    for row in range(codes.size(0)):
        stream = int.from_bytes(bytes(codes[row].tolist()), "little")
        for j in range(columns):
            code = stream >> (j * bits) & ((1 << bits) - 1)
            group = j // weight["group_size"]
            scale = weight["scale"][row, group]
            if weight["table"] is not None:
                result[row, j] = weight["table"][code] * scale
            else:
                zero = 1 << (bits - 1)
                if weight["zero_point"] is not None:
                    zero = int(weight["zero_point"][row, group])
                result[row, j] = (code - zero) * scale
    return result


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 7, 16, 37])
def test_packing_is_a_little_endian_stream_and_is_undone(bits, columns):
    codes = torch.randint(0, 1 << bits, (3, columns), generator=torch.Generator().manual_seed(bits))
    packed = ops.pack_codes(codes, bits)
    assert packed.shape == (3, -(-columns * bits // 8))
    for row in range(3):
        stream = sum(int(code) << (j * bits) for j, code in enumerate(codes[row]))
        assert bytes(packed[row].tolist()) == stream.to_bytes(packed.size(1), "little")
    assert torch.equal(ops.unpack_codes(packed, bits, columns).long(), codes)


def test_the_first_of_two_4_bit_codes_is_the_low_half():
    assert ops.pack_codes(torch.tensor([[1, 2, 3]]), 4).tolist() == [[0x21, 0x03]]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("kind", ["symmetric", "zeros", "table"])
def test_linear_is_that_of_the_dequantized_weight(bits, kind):
    columns = 21
    weight = random_weight(5, columns, bits, 8, zeros=kind == "zeros", table=kind == "table")
    real = slow_weight(weight, columns)
    assert torch.equal(ops.dequantize_codes(columns=columns, **weight), real)
    x, bias = torch.randn(2, 3, columns), torch.randn(5)
    y = ops.linear_weight_only(x, bias=bias, **weight)
    assert torch.equal(y.flatten(0, 1), exact_linear(x.flatten(0, 1), real, bias))
    half = ops.linear_weight_only(x.bfloat16(), bias=bias, **weight)
    rows = x.bfloat16().float().flatten(0, 1)
    assert torch.equal(half.flatten(0, 1), exact_linear(rows, real, bias).bfloat16())


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c of float32, rounded once. In float64 the product is exact; the sum's error tells
    how to round it to odd, which float32 cannot take for a tie."""
    product, c = a.double() * b.double(), c.double()
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    bits = total.view(torch.int64) - ((error != 0) & ((error > 0) != (total > 0))).long()
    return torch.where(error != 0, bits | 1, bits).view(torch.float64).float()


def rounded_linear(x: Tensor, weight: dict, bias: Tensor | None) -> Tensor:
    """accumulate="int8" by its definition."""
    bits, group_size, columns = weight["bits"], weight["group_size"], x.size(-1)
    codes = ops.unpack_codes(weight["codes"], bits, columns).long()
    y = torch.zeros(x.size(0), codes.size(0))
    for g in range(weight["scale"].size(1)):
        part = slice(g * group_size, (g + 1) * group_size)
        x_scale = (x[:, part].abs().amax(1, keepdim=True) / 127).clamp(min=2.0**-100)
        q = torch.round(x[:, part] * (1 / x_scale)).long()
        zeros = weight["zero_point"]
        zero = 1 << (bits - 1) if zeros is None else zeros[:, g : g + 1].long()
        sums = (q @ (codes[:, part] - zero).T).float()
        y = fma(sums, weight["scale"][:, g] * x_scale, y)
    return y if bias is None else y + bias


@pytest.mark.parametrize(("bits", "group_size"), [(4, 8), (3, 21), (8, 600)])
def test_int8_sums_are_exact_within_a_group(bits, group_size):
    columns = 700 if group_size == 600 else 21
    weight = random_weight(4, columns, bits, group_size, zeros=True)
    x = torch.randn(3, columns)
    y = ops.linear_weight_only(x, bias=None, accumulate="int8", **weight)
    assert torch.equal(y, rounded_linear(x, weight, None))


@pytest.mark.parametrize("path", _C.kernel_paths("multiply_groups"))
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_path_gives_the_definitions_bits(bits, path):
    # Few rows and many, whole groups and parts, more channels than a block and a rest.
    shapes = ((1, 256, 128, 21), (3, 300, 64, 21), (5, 77, 32, 21), (37, 520, 512, 21))
    more = ((150, 64, 32, 100), (20, 2304, 128, 70), (70, 1100, 1024, 40))
    for rows, columns, group_size, channels in (*shapes, *more):
        for zeros in (False, True):
            weight = random_weight(channels, columns, bits, group_size, zeros=zeros)
            x = torch.randn(rows, columns) * torch.logspace(-6, 6, rows).unsqueeze(1)
            bias = torch.randn(channels)
            with forced_path("multiply_groups", path):
                y = ops.linear_weight_only(x, bias=bias, accumulate="int8", **weight)
            assert torch.equal(y, rounded_linear(x, weight, bias))


def exact_linear(x: Tensor, real: Tensor, bias: Tensor | None) -> Tensor:
    """accumulate="float32" by its definition: 16 lanes of runs of 8."""
    pad = (0, -x.size(1) % 128)
    rows = functional.pad(x, pad).reshape(x.size(0), 1, -1, 16, 8)
    numbers = functional.pad(real, pad).reshape(1, real.size(0), -1, 16, 8)
    lanes = torch.zeros(x.size(0), real.size(0), 16)
    for block in range(rows.size(2)):
        for i in range(8):
            lanes = fma(rows[:, :, block, :, i], numbers[:, :, block, :, i], lanes)
    while lanes.size(-1) > 1:
        first, second = lanes.chunk(2, -1)
        lanes = first + second
    return lanes[..., 0] if bias is None else lanes[..., 0] + bias


# Rows, columns, group, channels: one row and many, parts of blocks, groups and panels, and groups
# that are more than a block, parts of one, whole runs and neither.
EXACT_SHAPES = (
    (1, 640, 128, 21),
    (1, 300, 32, 5),
    (2, 200, 256, 9),
    (3, 130, 24, 7),
    (7, 277, 21, 3),
    (50, 650, 64, 10),
)


@pytest.mark.parametrize("path", _C.kernel_paths("multiply_floats"))
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_path_gives_the_definitions_bits_for_inputs_as_they_are(bits, path):
    for rows, columns, group_size, channels in EXACT_SHAPES:
        for kind in ("symmetric", "zeros", "table"):
            weight = random_weight(
                channels, columns, bits, group_size, zeros=kind == "zeros", table=kind == "table"
            )
            x = torch.randn(rows, columns) * torch.logspace(-6, 6, rows).unsqueeze(1)
            bias = torch.randn(channels)
            with forced_path("multiply_floats", path):
                y = ops.linear_weight_only(x, bias=bias, **weight)
            real = ops.dequantize_codes(columns=columns, **weight)
            assert torch.equal(y, exact_linear(x, real, bias))


@pytest.mark.parametrize("path", _C.kernel_paths("multiply_floats"))
def test_inputs_that_are_not_finite_stay_in_their_rows(path):
    weight = random_weight(9, 256, 4, 128)
    x = torch.randn(3, 256)
    x[1, 200] = torch.inf
    with forced_path("multiply_floats", path):
        y = ops.linear_weight_only(x, bias=None, **weight)
    real = ops.dequantize_codes(columns=256, **weight)
    assert torch.equal(y[::2], exact_linear(x[::2], real, None))
    assert not torch.isfinite(y[1]).any()


@pytest.mark.parametrize("path", _C.kernel_paths("multiply_groups"))
def test_zero_points_far_from_the_codes(path):
    weight = random_weight(70, 256, 4, 128, zeros=True)
    weight["zero_point"][3, 1], weight["zero_point"][69, 0] = 255, 129
    x = torch.randn(20, 256)
    with forced_path("multiply_groups", path):
        y = ops.linear_weight_only(x, bias=None, accumulate="int8", **weight)
    assert torch.equal(y, rounded_linear(x, weight, None))


def test_the_operator_is_checked_and_takes_tables():
    weight = random_weight(18, 64, 4, 32)
    table = torch.randint(-128, 128, (16,), dtype=torch.int8)
    x = torch.randn(19, 64)
    args = (x, weight["codes"], weight["scale"], None, None, 4, 32, table)
    torch.library.opcheck(torch.ops.qtoolkit.linear_weight_only.default, args)
    y = torch.ops.qtoolkit.linear_weight_only(*args)
    weight["table"] = table.float()
    real = ops.dequantize_codes(columns=64, **weight)
    error = (x @ real.T - y).norm() / y.norm()
    assert error < 0.01
    with pytest.raises(ValueError, match=r"group_size must be a multiple of 8 for codes of 4 bits"):
        torch.ops.qtoolkit.linear_weight_only(*args[:6], 12, None)
    with pytest.raises(ValueError, match="ceil\\(in_features"):
        torch.ops.qtoolkit.linear_weight_only(x[:, :50], *args[1:])


def test_rows_of_zeros_and_rows_that_are_not_finite():
    weight = random_weight(3, 16, 4, 8)
    x = torch.zeros(3, 16)
    x[1, 2], x[2, 3] = torch.nan, torch.inf
    bias = torch.tensor([1.0, 2.0, 3.0])
    for accumulate in ("int8", "float32"):
        y = ops.linear_weight_only(x, bias=bias, accumulate=accumulate, **weight)
        assert torch.equal(y[0], bias)
        assert not torch.isfinite(y[1:]).any()


def test_weights_of_more_than_a_panel():
    weight = random_weight(700, 2048, 4, 128)
    x = torch.randn(2, 2048, requires_grad=True)
    real = ops.dequantize_codes(columns=2048, **weight)
    y = ops.linear_weight_only(x, bias=None, **weight)
    assert torch.equal(y, exact_linear(x.detach(), real, None))
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(2, 700) @ real)


@pytest.mark.parametrize("accumulate", ["float32", "int8"])
def test_codes_that_move_to_huge_pages_stay_the_same(accumulate):
    weight = random_weight(2200, 4096, 4, 128)
    assert weight["codes"].nbytes > 1 << 22
    few = {**weight, "codes": weight["codes"][:8].clone(), "scale": weight["scale"][:8].clone()}
    kept, x = weight["codes"].clone(), torch.randn(2, 4096)
    expected = ops.linear_weight_only(x, bias=None, accumulate=accumulate, **few)
    for _ in range(2):  # the first call moves them
        y = ops.linear_weight_only(x, bias=None, accumulate=accumulate, **weight)
        assert torch.equal(y[:, :8], expected)
        assert torch.equal(weight["codes"], kept)


def test_no_rows_and_one_row():
    weight = random_weight(3, 16, 4, 8)
    assert ops.linear_weight_only(torch.zeros(0, 16), bias=None, **weight).shape == (0, 3)
    assert ops.linear_weight_only(torch.zeros(16), bias=None, **weight).shape == (3,)


@pytest.mark.parametrize("accumulate", ["float32", "int8"])
def test_compiled_in_one_graph(accumulate):
    weight = random_weight(3, 16, 4, 8, zeros=True)

    def function(x: Tensor) -> Tensor:
        return ops.linear_weight_only(x * 2, bias=None, accumulate=accumulate, **weight)

    x = torch.randn(4, 16)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), function(x))


def test_embedding_reads_rows():
    weight = random_weight(6, 21, 3, 8, zeros=True)
    indices = torch.tensor([[5, 0], [2, 2]])
    rows = ops.embedding_weight_only(indices, columns=21, **weight)
    assert torch.equal(rows, slow_weight(weight, 21)[indices])
    with pytest.raises(IndexError):
        ops.embedding_weight_only(torch.tensor([6]), columns=21, **weight)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.zeros(2, 15)}, ValueError, r"codes must be \[N, 8\] for 15 columns"),
        ({"input": torch.zeros(2, 16).int()}, TypeError, "input must be float32"),
        ({"codes": torch.zeros(3, 8)}, TypeError, "codes must be torch.uint8"),
        ({"scale": torch.ones(3, 3)}, ValueError, r"scale must be \[3, 2\]"),
        ({"bits": 9}, ValueError, "bits must be 1 to 8"),
        ({"group_size": 0}, ValueError, "group_size must be at least 1"),
        ({"table": torch.zeros(8)}, ValueError, r"table must be \[16\]"),
        ({"bias": torch.zeros(2)}, ValueError, r"bias must be \[3\]"),
        ({"accumulate": "int4"}, ValueError, "accumulate must be"),
    ],
)
def test_bad_input_is_named(change, error, message):
    if "input" in change and change["input"].size(1) == 15:
        change = {**change, "codes": torch.zeros(3, 7, dtype=torch.uint8)}
    arguments = {"input": torch.zeros(2, 16), "bias": None, **random_weight(3, 16, 4, 8)}
    with pytest.raises(error, match=message):
        ops.linear_weight_only(**{**arguments, **change})


def test_codes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"codes lie in \[0, 16\], not in \[0, 15\]"):
        ops.pack_codes(torch.tensor([[0, 16]]), 4)


@pytest.mark.parametrize("rounded", [False, True])
def test_opcheck(rounded):
    weight = random_weight(3, 16, 4, 8, zeros=True)
    x = torch.randn(2, 16, requires_grad=True)
    operator = torch.ops.qtoolkit_python.linear_weight_only.default
    torch.library.opcheck(operator, (x, *list(weight.values())[:3], None, 4, 8, None, rounded))
