"""The lists of layers and functions that a file may hold."""

from __future__ import annotations

import json

import pytest

import qtoolkit as qt
from qtoolkit.nn.base import SAVED
from qtoolkit.saving import allowed, layers


def test_every_quantized_module_can_be_saved():
    classes = [
        value
        for value in vars(qt.nn).values()
        if isinstance(value, type) and issubclass(value, qt.nn.QuantizedModule)
    ]
    missing = [cls.__name__ for cls in classes if SAVED.get(cls.__name__, (None,))[0] is not cls]
    assert missing == ["QuantizedModule"]


ARGUMENTS = {
    "AdaptiveAvgPool1d": [2], "AdaptiveAvgPool2d": [(2, None)], "AdaptiveAvgPool3d": [2],
    "AdaptiveMaxPool1d": [2], "AdaptiveMaxPool2d": [2, True], "AdaptiveMaxPool3d": [2],
    "AvgPool1d": [2], "AvgPool2d": [2, 1, 1, True, False, 3], "AvgPool3d": [2],
    "BatchNorm1d": [3], "BatchNorm2d": [3, 1e-3, None, False], "BatchNorm3d": [3],
    "Bilinear": [2, 3, 4], "ChannelShuffle": [2], "CircularPad1d": [1], "CircularPad2d": [1],
    "CircularPad3d": [1], "ConstantPad1d": [1, 2.0], "ConstantPad2d": [1, 2.0],
    "ConstantPad3d": [1, 2.0], "Conv1d": [2, 4, 3], "Conv2d": [2, 4, (3, 1), 2, "valid", 1, 2],
    "Conv3d": [2, 4, 3], "ConvTranspose1d": [2, 4, 3],
    "ConvTranspose2d": [2, 4, 3, 2, 1, 1, 2, False], "ConvTranspose3d": [2, 4, 3],
    "Embedding": [5, 3, 1], "EmbeddingBag": [5, 3], "Fold": [4, 2], "GRU": [3, 2, 2],
    "GroupNorm": [2, 4], "Hardtanh": [-2.0, 3.0], "InstanceNorm1d": [3],
    "InstanceNorm2d": [3, 1e-4, 0.2, True, True], "InstanceNorm3d": [3],
    "LayerNorm": [[3, 2], 1e-3, True, False], "LPPool1d": [2, 3], "LPPool2d": [2, 3],
    "LSTM": [3, 2, 2, True, True, 0.1, True, 1], "Linear": [3, 2, False],
    "LocalResponseNorm": [2], "MaxPool1d": [2], "MaxPool2d": [2, 1, 1, 1, True, True],
    "MaxPool3d": [2], "MultiheadAttention": [4, 2, 0.1, True, True, True, 3, 2, True],
    "NonDynamicallyQuantizableLinear": [3, 2], "PReLU": [3, 0.1], "PixelShuffle": [2],
    "PixelUnshuffle": [2], "RMSNorm": [3], "RNN": [3, 2, 1, "relu"], "ReflectionPad1d": [1],
    "ReflectionPad2d": [1], "ReflectionPad3d": [1], "ReplicationPad1d": [1],
    "ReplicationPad2d": [(1, 2, 0, 1)], "ReplicationPad3d": [1], "Threshold": [0.1, 2.0],
    "Unflatten": [1, (2, 2)], "Unfold": [2], "Upsample": [None, 2.0, "bilinear", True],
    "UpsamplingBilinear2d": [None, 2], "UpsamplingNearest2d": [4], "ZeroPad1d": [1],
    "ZeroPad2d": [1], "ZeroPad3d": [1],
}  # fmt: skip
OWN_ARGUMENTS = {
    "Cat": [1], "GlobalAvgPool2d": [True], "Mean": [[1], False], "Pad": ["reflect"],
    "StochasticDepth": [0.1, "row"], "Sum": [[1], False],
    "UpsampleBilinear2d": ["bilinear", [2.0, 2.0], True],
    "UpsampleNearest2d": ["nearest", None], "WithNumber": ["sub", 3.0],
}  # fmt: skip


@pytest.mark.parametrize("name", allowed.LAYERS)
def test_float_layers_are_made_again_from_their_options(name):
    leaf = name.rpartition(".")[2]
    table = OWN_ARGUMENTS if name.startswith("qtoolkit.nn.functional") else ARGUMENTS
    layer = allowed.LAYERS[name](*table.get(leaf, [])).eval()
    options = json.loads(json.dumps(layers.float_options(layer)))
    count = len(list(layer.parameters()))
    again = layers.make_float(allowed.LAYERS[name], options, count)
    assert repr(again) == repr(layer)
    assert layers.float_options(again) == layers.float_options(layer)
    shapes = {key: value.shape for key, value in layer.state_dict().items()}
    assert {key: value.shape for key, value in again.state_dict().items()} == shapes


def test_names_and_functions_are_each_others_reverse():
    for name, function in allowed._FUNCTIONS.items():
        found = allowed.name_of(function)
        assert found is not None
        assert allowed.function_of(found) is function, name
    assert allowed.function_of("os.system") is None
