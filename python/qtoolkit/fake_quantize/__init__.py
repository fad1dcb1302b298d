"""Fake quantization: modules that simulate a quantized tensor while a model trains.

`TensorSpec.method` names how. A new method is one file with one `@register_fake_quantize("name")`
class, imported here.
"""

from qtoolkit.fake_quantize.base import ON_NONFINITE, FakeQuantize
from qtoolkit.fake_quantize.observed import ObservedFakeQuantize
from qtoolkit.fake_quantize.registry import (
    get_fake_quantize_class,
    make_fake_quantize,
    methods_for,
    register_fake_quantize,
    registered_methods,
)

__all__ = [
    "ON_NONFINITE",
    "FakeQuantize",
    "ObservedFakeQuantize",
    "get_fake_quantize_class",
    "make_fake_quantize",
    "methods_for",
    "register_fake_quantize",
    "registered_methods",
]
