"""Each method of quantizing weights against a slow reference, and the grids against the formats."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from qtoolkit import ops
from qtoolkit.formats import FORMATS
from qtoolkit.weight_only import Inputs, make_weight_method
from qtoolkit.weight_only.gptq import inverse_factor
from qtoolkit.weight_only.grid import Grid, choose_range, code_matrix, grouped, make_grid
from qtoolkit.weight_only.method import Result, output_error

INTEGERS = ["int8", "int4", "int3", "int2"]
BOTH = list(itertools.product(INTEGERS, (True, False)))


def weight(rows: int = 12, columns: int = 48) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.1


def inputs(columns: int = 48, rows: int = 200) -> tuple[Tensor, Inputs]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, columns, generator=generator)
    x = x @ torch.randn(columns, columns, generator=generator) / columns**0.5
    x = x * torch.logspace(-1, 0.7, columns)[torch.randperm(columns, generator=generator)]
    return x, Inputs(x.T @ x / rows, x.abs().mean(0), rows)


def squared(w: Tensor, coded: object) -> float:
    return float((coded.dequantized() - w).double().square().sum())


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
def test_block_floats_without_a_search_are_those_of_training(format):
    fmt, w = FORMATS[format], weight()
    args = fmt.block_size, fmt.mantissa_bits, fmt.min_exponent, fmt.max_value, fmt.scale_format
    expected = ops.fake_quantize_block_float(w, None, *args)
    coded = code_matrix(make_grid(format, None), w, search=False)
    torch.testing.assert_close(coded.dequantized(), expected, rtol=1e-6, atol=0)


def test_halves_go_to_the_even_mantissa():
    grid = make_grid("mxfp4", None)
    x = torch.tensor([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -5.0, 6.0]])
    levels = grid.levels(grid.codes(x, torch.ones(1, 1), None), None)
    fmt = FORMATS["mxfp4"]
    args = fmt.mantissa_bits, fmt.min_exponent, fmt.max_value
    assert torch.equal(levels, ops.fake_quantize_float(x, torch.tensor([1.0]), None, *args))


def test_fp8_is_that_of_torch():
    w = weight()
    coded = code_matrix(make_grid("fp8", 48), w, search=False)
    scale = w.abs().amax(1, keepdim=True) / 448
    expected = (w / scale).to(torch.float8_e4m3fn).float() * scale
    torch.testing.assert_close(coded.dequantized(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("format", "symmetric"), BOTH)
def test_rounding_is_the_affine_rule_over_the_whole_range(format, symmetric):
    bits, w = int(format[3:]), weight()
    coded = code_matrix(make_grid(format, 16, symmetric), w, search=False)
    for row, g in itertools.product(range(12), range(3)):
        group = w[row, g * 16 : g * 16 + 16]
        low, high = min(0.0, float(group.min())), max(0.0, float(group.max()))
        levels = (1 << bits) - 1
        scale = (high - low) / levels
        zero = round(-low / scale)
        if symmetric:
            scale, zero = max(-low, high) / (levels // 2), 1 << (bits - 1)
        expected = torch.clamp(torch.round(group / scale) + zero, 0, levels)
        part = coded.codes[row, g * 16 : g * 16 + 16].float()
        assert int((part - expected).abs().max()) <= (1 if bits == 8 else 0)
        assert float(coded.scale[row, g]) == pytest.approx(scale, rel=1e-5)


@pytest.mark.parametrize("format", ["int4", "int3", "int2", "ternary", "nf4"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_search_finds_what_trying_all_scales_finds(format, weighted):
    w = weight(4, 16)
    importance = torch.linspace(0.1, 3, 16)[None].repeat(4, 1) if weighted else None
    grid = make_grid(format, 16, symmetric=None if format in ("ternary", "nf4") else True)

    def error(scale: Tensor) -> Tensor:
        d = grid.levels(grid.codes(w, scale, None), None) * scale - w
        return (d * d * (1 if importance is None else importance)).sum(1)

    largest = w.abs().amax(1, keepdim=True)
    steps = torch.linspace(0.002, 2, 2000) / (1 if format in ("nf4", "ternary") else grid.middle)
    best = torch.stack([error(largest * step) for step in steps]).amin(0)
    found = error(choose_range(grid, w, importance)[0])
    whole = error(choose_range(grid, w, importance, search=False)[0])
    assert (found <= whole * 1.0001).all()
    assert float((found / best).mean()) < 1.12


def test_binary_scales_are_mean_magnitudes():
    w = weight()
    coded = code_matrix(make_grid("binary", 16), w)
    torch.testing.assert_close(coded.scale, w.abs().reshape(12, 3, 16).mean(2))
    assert torch.equal(coded.dequantized().sign(), w.sign())


@pytest.mark.parametrize("format", ["int4", "ternary", "binary", "nf4"])
def test_a_short_last_group_counts_only_what_it_has(format):
    w = weight(5, 21)
    grid = make_grid(format, 16)
    whole = code_matrix(grid, w)
    last = code_matrix(make_grid(format, 5), w[:, 16:])
    torch.testing.assert_close(whole.scale[:, 1:], last.scale)
    assert torch.equal(whole.codes[:, 16:], last.codes)
    assert grouped(w, 16).shape == (10, 16)


def slow_fit(w: Tensor, values: Tensor, grid: Grid, h: Tensor) -> Tensor:
    """Values whose groups are scaled, row by row, to the least error of the outputs."""
    if grid.format.block_size:
        return values
    h = h.double() + torch.eye(len(h)) * 0.01 * h.double().diagonal().mean()
    root = torch.linalg.cholesky(h).T
    result = values.double().clone()
    parts = torch.arange(w.size(1)).split(grid.group_size)
    for row in range(len(w)):
        seen = torch.stack([root[:, part] @ result[row, part] for part in parts], 1)
        factors = torch.linalg.lstsq(seen, (root @ w[row].double())[:, None]).solution[:, 0]
        if bool((factors > 0).all()):
            for part, factor in zip(parts, factors):
                result[row, part] *= factor
    return result.float()


def slow_gptq(w: Tensor, grid: Grid, h: Tensor, damping: float, act_order: bool) -> Tensor:
    """Optimal brain quantization: the inverse Hessian of the columns that are left, each time."""
    start, largest = w, float(w.abs().max())
    w, h = w.double().clone(), h.double()
    plain = h.diagonal().float()
    damped = h + torch.eye(len(h)) * damping * h.diagonal().mean()
    parts = [part.tolist() for part in torch.arange(len(h)).split(grid.group_size)]
    if act_order:
        parts = [sorted(part, key=lambda c: -float(plain[c])) for part in parts]
        parts.sort(key=lambda part: -float(plain[part].mean()))
    importance = plain + plain.mean() * 1e-4
    result = torch.zeros_like(w)
    left = [column for part in parts for column in part]
    for part in parts:
        ranges = code_matrix(grid, w[:, part].float(), importance[part], of_tensor=largest)
        scale, zero = ranges.scale, ranges.zero_point
        for column in part:
            code = grid.codes(w[:, column : column + 1].float(), scale, zero)
            result[:, column] = (grid.levels(code, zero) * scale)[:, 0].double()
            inverse = torch.linalg.inv(damped[left][:, left])
            at = left.index(column)
            error = (w[:, column] - result[:, column]) / inverse[at, at]
            w[:, left] -= error[:, None] * inverse[at]
            left.remove(column)
    return slow_fit(start, result.float(), grid, h)


@pytest.mark.parametrize("format", ["int4", "int2", "ternary", "binary", "nf4", "nvfp4"])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_is_optimal_brain_quantization_column_by_column(format, act_order):
    w, (_, known) = weight(), inputs()
    grid = make_grid(format, None if format == "nvfp4" else 16)
    method = make_weight_method("gptq", {"act_order": act_order, "block": 20})
    found = method.quantize([w], grid, known)[0].dequantized()
    expected = slow_gptq(w, grid, known.hessian, 0.01, act_order)
    wanted = output_error(w, expected, known)
    assert output_error(w, found, known) == pytest.approx(wanted, rel=1e-3)
    assert float((found - expected).abs().gt(1e-5).float().mean()) < 0.01
    rounded = make_weight_method("rtn").quantize([w], grid, None)[0].dequantized()
    assert output_error(w, found, known) < 0.9 * output_error(w, rounded, known)


def test_gptq_in_blocks_of_any_size_is_the_same():
    w, (_, known) = weight(), inputs()
    grid = make_grid("int3", 16)
    results = [
        make_weight_method("gptq", {"block": block}).quantize([w], grid, known)[0].coded.codes
        for block in (1, 7, 48, 128)
    ]
    for other in results[1:]:
        assert float((other != results[0]).float().mean()) < 0.005


def test_the_factor_is_that_of_the_inverse():
    _, known = inputs()
    h = known.hessian.double()
    factor = inverse_factor(known.hessian, 0.01)
    inverse = torch.linalg.inv(h + torch.eye(48) * 0.01 * h.diagonal().mean())
    torch.testing.assert_close(factor.T @ factor, inverse)
    assert torch.equal(factor, factor.triu())


def test_singular_hessians_are_damped_and_those_that_are_not_finite_named():
    for h in (torch.zeros(8, 8), torch.ones(8, 8), torch.full((8, 8), 1e30)):
        assert torch.isfinite(inverse_factor(h, 1e-12)).all()
    with pytest.raises(ValueError, match="no finite second moments"):
        inverse_factor(torch.full((8, 8), torch.nan), 0.01)


@pytest.mark.parametrize("format", [*INTEGERS, "ternary", "binary"])
def test_awq_is_the_best_of_its_grid_of_factors(format):
    first, (x, known) = weight(), inputs()
    weights = [first, weight(8) * 0.5]
    grid = make_grid(format, 16)
    magnitude = x.abs().mean(0)
    groups = torch.cat(weights).reshape(-1, 3, 16).abs()
    relative = (groups / groups.amax(2, keepdim=True)).mean(0).reshape(-1)

    def outputs_error(values: list[Tensor]) -> float:
        return sum(
            float(((x.double() @ (v - w).double().T) ** 2).mean(0).sum())
            for v, w in zip(values, weights)
        )

    importance = (x * x).mean(0)
    importance = importance + importance.mean() * 1e-4
    found = [code_matrix(grid, w).dequantized() for w in weights]
    best, factor = outputs_error(found), torch.ones(48)
    for i, dual in itertools.product(range(5), (False, True)):
        alpha = i / 5
        s = magnitude**alpha / (relative ** (1 - alpha) if dual else 1)
        s = s / (s.max() * s.min()).sqrt()
        values = [code_matrix(grid, w * s, importance / s**2).dequantized() / s for w in weights]
        if outputs_error(values) < best:
            best, found, factor = outputs_error(values), values, 1 / s
    h = known.hessian * factor * factor[:, None]
    found = [slow_fit(w / factor, v / factor, grid, h) * factor for w, v in zip(weights, found)]
    assert outputs_error(found) < best
    best = outputs_error(found)
    results = make_weight_method("awq", {"steps": 5}).quantize(weights, grid, known)
    assert outputs_error([r.dequantized() for r in results]) == pytest.approx(best, rel=1e-3)
    assert results[0].input_factor is None or torch.equal(
        results[0].input_factor, results[1].input_factor
    )


def slow_hqq(w: Tensor, scale: float, zero: float | None, bits: int) -> float:
    """One group in float64, a weight at a time; the least sum of |error|^0.7 that is met."""
    beta, least = 1.0, float("inf")
    values = w.double().tolist()
    middle = 1 << (bits - 1)
    for _ in range(21):
        z = middle if zero is None else zero
        codes = [min(max(round(v / scale) + z, 0), 2 * middle - 1) for v in values]
        errors = [v / scale - (c - z) for v, c in zip(values, codes)]
        least = min(least, sum(abs(e * scale) ** 0.7 for e in errors))
        targets = []
        for v, e in zip(values, errors):
            size = max(abs(e) - 0.7 / beta * max(abs(e), 1e-6) ** -0.3, 0.0)
            targets.append(v - (size if e > 0 else -size) * scale)
        if zero is not None:
            mean = sum(c - t / scale for c, t in zip(codes, targets)) / len(values)
            zero = z = min(max(round(mean), 0), 2 * middle - 1)
        power = sum((c - z) ** 2 for c in codes)
        new = sum(t * (c - z) for t, c in zip(targets, codes)) / max(power, 1e-30)
        scale = new if new > 0 else scale
        beta *= 1.05
    return least


@pytest.mark.parametrize(("format", "symmetric"), BOTH)
def test_hqq_is_its_reference_and_lowers_its_norm(format, symmetric):
    w = weight(6, 32)
    w[0, 3] = 1.0
    grid = make_grid(format, 16, symmetric)
    start = code_matrix(grid, w)
    found: Result = make_weight_method("hqq").quantize([w], grid, None)[0]
    norm = (found.dequantized() - w).abs().double().pow(0.7).reshape(6, 2, 16).sum(2)
    before = (start.dequantized() - w).abs().double().pow(0.7).reshape(6, 2, 16).sum(2)
    assert (norm <= before * (1 + 1e-4)).all()
    assert float(norm.sum()) < float(before.sum())
    expected = torch.tensor([
        [
            slow_hqq(
                w[row, g * 16 : g * 16 + 16],
                float(start.scale[row, g]),
                None if symmetric else int(start.zero_point[row, g]),
                grid.bits,
            )
            for g in range(2)
        ]
        for row in range(6)
    ])  # fmt: skip
    # A rounding that falls the other way leads elsewhere, to a norm that is as good.
    assert float(norm.sum()) == pytest.approx(float(expected.sum()), rel=0.01)
    assert float((norm / expected - 1).abs().lt(1e-3).float().mean()) > 0.7
