"""Analytic bias correction: the shift of the mean, computed without data."""

from __future__ import annotations

from dataclasses import dataclass

from qtoolkit.algorithms.context import Context
from qtoolkit.algorithms.moments import expected_output, input_moments
from qtoolkit.algorithms.registry import AFTER, Algorithm, register_algorithm
from qtoolkit.nn.weights import dequantized


@register_algorithm("analytic_bias_correction")
@dataclass(frozen=True)
class AnalyticBiasCorrection(Algorithm):
    """Takes out of a layer's bias what rounding its weight adds to the mean of its output: the
    rounding errors times the mean of its inputs. That mean is the one of a normal distribution
    with the mean and variance of the batch norm before, clipped by the ReLU between; through
    additions, averages and layers without batch norm it is carried on.

    Layers whose inputs come from anything else, such as the first one, stay as they are. The
    empirical ``bias_correction`` is better where there is data; do not run both.

    Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction"
    (2019), section 4.2.1.
    """

    stage = AFTER

    def run(self, context: Context) -> None:
        graphs = {layer.graph for layer in context.layers}
        moments = {node: value for graph in graphs for node, value in input_moments(graph).items()}
        for layer, done in context.steps(
            context.layers, "analytic bias correction", len(context.layers)
        ):
            if done or layer.match.anchor not in moments:
                continue
            rounded = dequantized(layer.integer_weight(), layer.module)
            error = rounded - context.float_module(layer).weight.detach()
            shift = expected_output(layer.module, error, moments[layer.match.anchor][0])
            bias = layer.module.bias
            layer.set_bias(-shift if bias is None else bias.detach() - shift)
