"""What each layer costs in each format: bytes, operations on bits, and time."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qtoolkit.graph.modules import called_module
from qtoolkit.layer_formats import bits_of
from qtoolkit.layer_simulation import SimulatedLayer, Simulation
from qtoolkit.layer_times import timed_calls, wait_for
from qtoolkit.nn.base import QuantizedModule
from qtoolkit.nn.kernels import activation_without_kernel, weight_without_kernel
from qtoolkit.qconfig import QConfig, QConfigMapping
from qtoolkit.workflow import calibrate, convert, prepare

UNITS = {"size": "bytes", "bitops": "operations on bits for a sample", "latency_ms": "ms"}
_RUNS = 5


@dataclass(frozen=True)
class Costs:
    """Costs of one kind.

    Attributes:
        of: by layer and format.
        fixed: what all else costs, whatever is chosen.
    """

    of: dict[tuple[str, str], float]
    fixed: float


def _bits(qconfig: QConfig | None) -> tuple[int, int]:
    """Of a weight and an activation."""
    if qconfig is None:
        return 32, 32
    return bits_of(qconfig.weight), bits_of(qconfig.activation)


def sizes(
    simulation: Simulation, layers: list[SimulatedLayer], formats: dict[str, QConfig | None]
) -> Costs:
    """Bytes of weights, their scales and biases; a weight of 4 bits counts half a byte."""
    of = {}
    own = 0
    for layer in layers:
        bias = 4 * layer.channels if layer.module.bias is not None else 0
        own += 4 * layer.weights + bias
        for name, qconfig in formats.items():
            weight_bits, _ = _bits(qconfig)
            scales = 4 * layer.channels if weight_bits <= 8 else 0
            of[layer.name, name] = layer.weights * weight_bits / 8 + scales + bias
    observers = set(simulation.observers())
    tensors = {
        id(tensor): tensor
        for module in simulation.model.modules()
        if module not in observers
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    }
    whole = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return Costs(of, max(whole - own, 0))


def bit_operations(layers: list[SimulatedLayer], formats: dict[str, QConfig | None]) -> Costs:
    """Products of one sample, each times the bits of its weight and of its activation."""
    of = {}
    for layer in layers:
        for name, qconfig in formats.items():
            weight_bits, activation_bits = _bits(qconfig)
            of[layer.name, name] = float(layer.products() * weight_bits * activation_bits)
    return Costs(of, 0.0)


def latencies(
    model: nn.Module,
    mapping: QConfigMapping,
    simulation: Simulation,
    layers: list[SimulatedLayer],
    formats: dict[str, QConfig | None],
    batches: list[tuple[Any, ...]],
) -> Costs:
    """Milliseconds for the first batch, measured here: of a layer in a format with an integer
    kernel that of its quantized module, else that of the float modules."""
    prepared = calibrate(prepare(model, mapping, batches[0]), batches, progress=False)
    quantized = convert(prepared)
    integer: dict[nn.Module, str] = {
        module: module.source
        for module in quantized.modules()
        if isinstance(module, QuantizedModule)
    }
    integer_ms, whole = _measure(quantized, integer, batches[0])
    floats: dict[nn.Module, str] = {}
    for layer in layers:
        for node in layer.match.nodes:
            module = called_module(node, layer.graph)
            if module is not None:
                floats[module] = layer.name
    float_ms, _ = _measure(simulation.model, floats, batches[0])
    of = {}
    for layer in layers:
        for name, qconfig in formats.items():
            measured = integer_ms if _has_kernel(qconfig) else float_ms
            of[layer.name, name] = measured.get(layer.name, float_ms.get(layer.name, 0.0))
    chosen = sum(integer_ms.get(layer.name, 0.0) for layer in layers)
    return Costs(of, max(whole - chosen, 0.0))


def _has_kernel(qconfig: QConfig | None) -> bool:
    if qconfig is None or qconfig.activation is None or qconfig.weight is None:
        return False
    return (
        activation_without_kernel(qconfig.activation) is None
        and weight_without_kernel(qconfig.weight) is None
    )


def _measure(
    model: nn.Module, owners: dict[nn.Module, str], inputs: tuple[Any, ...]
) -> tuple[dict[str, float], float]:
    """Medians over some runs: of each owner of modules, and of the whole model, in ms."""
    spent: dict[str, float] = {}

    def took(module: nn.Module, ms: float) -> None:
        spent[owners[module]] = spent.get(owners[module], 0.0) + ms

    samples: dict[str, list[float]] = {}
    whole = []
    with torch.no_grad():
        wait_for(model(*inputs))  # packs weights
        with timed_calls(owners, took):
            for _ in range(_RUNS):
                spent.clear()
                start = time.perf_counter()
                wait_for(model(*inputs))
                whole.append((time.perf_counter() - start) * 1e3)
                for name, ms in spent.items():
                    samples.setdefault(name, []).append(ms)
    return {name: statistics.median(t) for name, t in samples.items()}, statistics.median(whole)
