"""Stubs by torch.ao's names, and the replacement of its own ones."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from qtoolkit.nn.stubs import DeQuantStub, FloatFunctional, QuantStub

__all__ = [
    "DeQuantStub",
    "FloatFunctional",
    "QuantStub",
    "QuantWrapper",
    "add_quant_dequant",
    "replace_foreign_stubs",
]


class QuantWrapper(nn.Module):
    """A module between a QuantStub and a DeQuantStub.

    Args:
        module: takes and gives one tensor.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        qconfig = getattr(module, "qconfig", None)
        self.quant = QuantStub(qconfig)
        self.dequant = DeQuantStub(qconfig)
        self.module = module
        self.train(module.training)

    def forward(self, X: Tensor) -> Tensor:  # noqa: N803  (the name that torch.ao has)
        return self.dequant(self.module(self.quant(X)))


def add_quant_dequant(module: nn.Module) -> nn.Module:
    """Wraps every leaf module that has a qconfig in a QuantWrapper; changes and returns the
    module, or the wrapper that takes its place."""
    if not list(module.children()) and getattr(module, "qconfig", None):
        return QuantWrapper(module)
    for name, child in module.named_children():
        module._modules[name] = add_quant_dequant(child)
    return module


# By the names of torch.ao's classes, so that nothing here needs torch.ao.
_OURS: dict[str, type[nn.Module]] = {
    "torch.ao.quantization.stubs.QuantStub": QuantStub,
    "torch.ao.quantization.stubs.DeQuantStub": DeQuantStub,
    "torch.ao.nn.quantized.modules.functional_modules.FloatFunctional": FloatFunctional,
}


def replace_foreign_stubs(model: nn.Module) -> nn.Module:
    """Puts the stubs of this package in the place of torch.ao's; changes and returns the model."""
    made: dict[int, nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            kind: Any = type(child)
            cls = _OURS.get(f"{kind.__module__}.{kind.__qualname__}")
            if child is None or cls is None:
                continue
            if id(child) not in made:
                ours = made[id(child)] = cls().train(child.training)
                if "qconfig" in child.__dict__:
                    ours.qconfig = child.qconfig
            parent._modules[name] = made[id(child)]
    return model
