"""The specs of every fake-quantize method, for the tests of several files."""

from __future__ import annotations

import torch
from networks import digits
from torch import nn
from torch.nn import functional

from qtoolkit.qconfig import QConfig, QConfigMapping, TensorSpec

A8 = TensorSpec(observer="moving_average")
W8 = TensorSpec("int8", "per_channel", symmetric=True, observer="per_channel_minmax")


def activation(format: str, **options) -> TensorSpec:
    return TensorSpec(format, **{"observer": "moving_average", **options})


def weight(format: str, **options) -> TensorSpec:
    options = {"granularity": "per_channel", "observer": "per_channel_minmax", **options}
    return TensorSpec(format, **{"symmetric": True, **options})


def mapping_of(activation: TensorSpec, weight: TensorSpec) -> QConfigMapping:
    return QConfigMapping().set_global(QConfig(activation, weight))


#: One mapping for each method, in the roles and granularities that it has.
MAPPINGS = {
    "observed": mapping_of(activation("uint4"), weight("int4")),
    "observed per group": mapping_of(
        A8, weight("int4", granularity="per_group", group_size=16, observer="per_group_minmax")
    ),
    "lsq": mapping_of(activation("uint4", method="lsq"), weight("int4", method="lsq")),
    "lsq per tensor": mapping_of(
        activation("int4", method="lsq", symmetric=True),
        weight("int4", method="lsq", granularity="per_tensor", symmetric=False),
    ),
    "lsq ternary": mapping_of(A8, weight("ternary", method="lsq")),
    "lsq+": mapping_of(
        activation("uint4", method="lsq+", observer="histogram"), weight("int4", method="lsq+")
    ),
    "pact": mapping_of(activation("uint4", method="pact"), weight("int4", method="lsq")),
    "twn": mapping_of(A8, weight("ternary", method="twn")),
    "twn per tensor": mapping_of(A8, weight("ternary", method="twn", granularity="per_tensor")),
    "xnor": mapping_of(A8, weight("binary", method="xnor")),
    "fp8": mapping_of(activation("fp8_e4m3", method="float"), weight("fp8_e5m2", method="float")),
    "bf16": mapping_of(
        activation("bf16", method="float"),
        weight("bf16", method="float", granularity="per_tensor"),
    ),
    "mxfp4": mapping_of(
        activation("mxfp8", method="block_float"),
        weight("mxfp4", method="block_float", granularity="per_tensor"),
    ),
    "nvfp4": mapping_of(
        activation("nvfp4", method="block_float"),
        weight("nvfp4", method="block_float", granularity="per_tensor", observer="minmax"),
    ),
}
#: Those that the integer kernels compute.
INTEGER = [
    name for name in MAPPINGS if name not in ("observed per group", "fp8", "bf16", "mxfp4", "nvfp4")
]


def train_steps(model: nn.Module, steps: int, rate: float = 0.01) -> list[float]:
    """SGD with momentum on the first digits; returns the losses."""
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    losses = []
    for x, y in digits()[0][:steps]:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
