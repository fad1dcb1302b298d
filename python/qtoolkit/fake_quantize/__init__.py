"""Fake quantization: modules that simulate a quantized tensor while a model trains.

`TensorSpec.method` names how. A new method is one file with one `@register_fake_quantize("name")`
class, imported here.
"""

from qtoolkit.fake_quantize.base import ON_NONFINITE, FakeQuantize
from qtoolkit.fake_quantize.block_float import BlockFloatFakeQuantize
from qtoolkit.fake_quantize.floats import FloatFakeQuantize
from qtoolkit.fake_quantize.learned import LearnedFakeQuantize
from qtoolkit.fake_quantize.lsq import LSQFakeQuantize
from qtoolkit.fake_quantize.lsq_plus import LSQPlusFakeQuantize
from qtoolkit.fake_quantize.measured import MeasuredFakeQuantize
from qtoolkit.fake_quantize.observed import ObservedFakeQuantize
from qtoolkit.fake_quantize.pact import PACTFakeQuantize
from qtoolkit.fake_quantize.registry import (
    get_fake_quantize_class,
    make_fake_quantize,
    methods_for,
    register_fake_quantize,
    registered_methods,
)
from qtoolkit.fake_quantize.twn import TWNFakeQuantize
from qtoolkit.fake_quantize.xnor import XNORFakeQuantize

__all__ = [
    "ON_NONFINITE",
    "BlockFloatFakeQuantize",
    "FakeQuantize",
    "FloatFakeQuantize",
    "LSQFakeQuantize",
    "LSQPlusFakeQuantize",
    "LearnedFakeQuantize",
    "MeasuredFakeQuantize",
    "ObservedFakeQuantize",
    "PACTFakeQuantize",
    "TWNFakeQuantize",
    "XNORFakeQuantize",
    "get_fake_quantize_class",
    "make_fake_quantize",
    "methods_for",
    "register_fake_quantize",
    "registered_methods",
]
