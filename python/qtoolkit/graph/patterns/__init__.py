"""The layers that can be quantized; one file for each kind.

The order of the imports is the order of precedence.
"""

# isort: off
from qtoolkit.graph.patterns import (
    conv,
    conv_transpose,
    linear,
    matmul,
    add,
    mul,
    cat,
    batch_norm,
    relu,
    lookup,
    avg_pool,
    mean,
    upsample,
    normalization,
)

# isort: on
from qtoolkit.graph.patterns.registry import (
    AsModule,
    Match,
    Pattern,
    pattern_of,
    patterns,
    register_pattern,
)

__all__ = [
    "AsModule",
    "Match",
    "Pattern",
    "add",
    "avg_pool",
    "batch_norm",
    "cat",
    "conv",
    "conv_transpose",
    "linear",
    "lookup",
    "matmul",
    "mean",
    "mul",
    "normalization",
    "pattern_of",
    "patterns",
    "register_pattern",
    "relu",
    "upsample",
]
