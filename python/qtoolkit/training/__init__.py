"""What helps to train a model that ``prepare_qat`` made: switches, a schedule, distillation."""

from qtoolkit.training.control import (
    disable_fake_quant,
    enable_fake_quant,
    freeze_bn,
    freeze_observers,
)
from qtoolkit.training.distillation import distillation_loss
from qtoolkit.training.schedule import QATSchedule

__all__ = [
    "QATSchedule",
    "disable_fake_quant",
    "distillation_loss",
    "enable_fake_quant",
    "freeze_bn",
    "freeze_observers",
]
