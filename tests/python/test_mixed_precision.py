"""Formats chosen within a budget."""

from __future__ import annotations

import itertools
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from networks import Block, Kinds, batches, settle, sqnr
from torch import Tensor, nn

import qtoolkit as qt
from qtoolkit import layer_costs
from qtoolkit.layer_simulation import Simulation

FORMATS = ("int8", "int4", "fp16")
SHAPE = (4, 2, 6, 6)


@pytest.fixture(scope="module")
def network() -> tuple[nn.Module, list[Tensor], qt.Sensitivity]:
    model = nn.Sequential(Block(2, 4, 1), Block(4, 4, 1), nn.Flatten(), nn.Linear(144, 5))
    model, data = settle(model, SHAPE), batches(SHAPE, 2)
    return model, data, qt.sensitivity(model, data, FORMATS, progress=False)


def choose(network: Any, budget: Any, formats: Any = FORMATS, **options: Any) -> qt.MixedPrecision:
    model, data, found = network
    options = {"sensitivities": found, **options}
    return qt.mixed_precision(model, data, budget, formats, progress=False, **options)


def own_costs(model: nn.Module) -> dict[tuple[str, str], float]:
    """Bytes of the layers of a model without batch norms to fold."""
    bits = {"int8": 8, "int4": 4, "fp16": 16}
    result = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            channels = layer.weight.shape[0]
            for key, width in bits.items():
                scales = 0 if key == "fp16" else 4 * channels
                # A convolution gets a bias from its batch norm.
                result[name, key] = layer.weight.numel() * width / 8 + scales + 4 * channels
    return result


@pytest.mark.parametrize("share", [0.2, 0.25, 0.3, 0.5])
def test_no_other_assignment_within_the_budget_has_a_lower_error(network, share):
    model, _, found = network
    costs = own_costs(model)
    limit = share * sum(4 * p.numel() for p in model.parameters())
    best = min(
        (
            sum(found.error(*pair) for pair in zip(found.layers, choice))
            for choice in itertools.product(FORMATS, repeat=len(found.layers))
            if sum(costs[pair] for pair in zip(found.layers, choice)) <= limit
        ),
        default=None,
    )
    assert best is not None
    mapping = choose(network, {"size": limit})
    assert sum(choice.error for choice in mapping.choices) == pytest.approx(best, rel=1e-4)
    spent = dict(mapping.costs)["size"]
    assert spent == sum(costs[pair] for pair in mapping.formats.items())
    assert spent <= limit


def test_the_mapping_quantizes_and_a_larger_budget_keeps_more(network):
    model, data, _ = network
    x = torch.cat(data)
    kept = []
    for size in (820, 1250, 1500):
        mapping = choose(network, {"size": size}, ("int8", "int4"))
        quantized = qt.quantize(model, data, mapping, progress=False)
        for name, chosen in mapping.formats.items():
            codes = quantized.get_submodule(name).weight
            steps = max(len(channel.unique()) for channel in codes)
            assert steps <= 15 or chosen == "int8"
        with torch.no_grad():
            kept.append(sqnr(model(x), quantized(x)))
    assert kept == sorted(kept)
    assert kept[2] > kept[0] + 10


def test_operations_on_bits_and_several_budgets(network):
    mapping = choose(network, {"bitops": 2_000_000, "size": 2_000})
    assert dict(mapping.costs)["bitops"] <= 2_000_000
    assert dict(mapping.costs)["size"] <= 2_000
    model, data, _ = network
    simulation = Simulation(qt.prepare(model, example_inputs=data[0]))
    products = {layer.name: layer.products() for layer in simulation.layers}
    assert products["0.conv1"] == 4 * 2 * 9 * 36
    assert products["3"] == 144 * 5


def test_products_of_strided_grouped_and_transposed_layers():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, 2, groups=2), nn.ConvTranspose2d(8, 6, 3, 2))
    simulation = Simulation(qt.prepare(model, example_inputs=torch.randn(3, 4, 9, 9)))
    assert [layer.products() for layer in simulation.layers] == [8 * 2 * 9 * 16, 8 * 6 * 9 * 16]


def test_latency_is_measured_and_a_generous_budget_takes_the_most_accurate(network):
    mapping = choose(network, {"latency_ms": 1e4})
    assert set(mapping.formats.values()) == {"fp16"}
    assert all(dict(choice.costs)["latency_ms"] > 0 for choice in mapping.choices)


def test_the_table_says_what_was_chosen_and_a_changed_mapping_has_none(network):
    mapping = choose(network, {"size": 1_000})
    lines = str(mapping).splitlines()
    assert [line.split()[:2] for line in lines[1:-2]] == [
        [name, chosen] for name, chosen in mapping.formats.items()
    ]
    assert lines[-1].split() == ["budget", "1,000"]
    changed = mapping.set_module_name("3", None)
    assert type(changed) is qt.QConfigMapping
    assert qt.QConfigMapping.from_json(mapping.to_json()).set_module_name("3", None) == changed


def test_an_impossible_budget_says_the_least_that_can_be_reached(network):
    model, _, found = network
    costs = own_costs(model)
    least = sum(min(costs[name, key] for key in FORMATS) for name in found.layers)
    with pytest.raises(
        ValueError, match=rf"the least that int8, int4, fp16 can reach is {least:g}"
    ):
        choose(network, {"size": least - 1})
    # The smallest layer is smaller without scales.
    assert choose(network, {"size": least}).formats["0.downsample.0"] == "fp16"


def test_budgets_that_exclude_each_other(network, monkeypatch):
    def opposite(layers: Any, formats: Any) -> layer_costs.Costs:
        order = {"int4": 3.0, "int8": 2.0, "fp16": 1.0}
        return layer_costs.Costs({(x.name, f): order[f] for x in layers for f in formats}, 0.0)

    monkeypatch.setattr(sys.modules["qtoolkit.mixed_precision"], "bit_operations", opposite)
    with pytest.raises(ValueError, match="meets all budgets together"):
        choose(network, {"size": 820, "bitops": 6.5})


def test_a_solver_without_solution_is_an_error(network, monkeypatch):
    def gives_up(*_: Any, **__: Any) -> SimpleNamespace:
        return SimpleNamespace(x=None, status=1, message="time limit reached")

    monkeypatch.setattr("scipy.optimize.milp", gives_up)
    with pytest.raises(RuntimeError, match="found no solution: time limit reached"):
        choose(network, {"size": 2_000})


def test_without_scipy_the_error_says_what_to_install(network, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match=r"pip install 'qtoolkit\[mixed-precision\]'"):
        choose(network, {"size": 2_000})


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "needs a budget"),
        (3, "needs a budget"),
        ({"bytes": 3}, r"unknown budget 'bytes': use size, bitops, latency_ms"),
        ({"size": -1}, "'size' must be a positive number, got -1"),
        ({"size": float("nan")}, "must be a positive number, got nan"),
    ],
)
def test_budgets_that_make_no_sense(network, budget, message):
    with pytest.raises(ValueError, match=message):
        choose(network, budget)


def test_sensitivities_of_other_formats_are_refused(network):
    with pytest.raises(ValueError, match="'int2'; they have int8, int4, fp16"):
        choose(network, {"size": 2_000}, ("int8", "int2"))


def test_sensitivities_are_measured_where_none_are_given():
    model, data = settle(Kinds(), (4, 3, 24, 24)), batches((4, 3, 24, 24), 1)
    mapping = qt.mixed_precision(
        model, [{"x": x} for x in data], {"size": 15_000}, ("int8", "int4"), progress=False
    )
    assert {"stem", "fc1", "fc2", "same", "grouped", "depthwise"} == set(mapping.formats)
