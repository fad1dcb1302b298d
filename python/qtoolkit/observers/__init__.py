"""Observers: modules that look at tensors and choose the scale and zero point for them.

Called on a tensor, an observer returns it unchanged and records its statistics;
`calculate_qparams()` turns them into scale and zero point. A new observer is one file with one
`@register_observer("name")` class, imported here.
"""

from qtoolkit.observers.base import Observer
from qtoolkit.observers.entropy import EntropyObserver
from qtoolkit.observers.histogram import HistogramObserver
from qtoolkit.observers.minmax import MinMaxObserver
from qtoolkit.observers.moving_average import MovingAverageMinMaxObserver
from qtoolkit.observers.mse import MSEObserver
from qtoolkit.observers.per_channel import PerChannelMinMaxObserver
from qtoolkit.observers.per_channel_mse import PerChannelMSEObserver
from qtoolkit.observers.per_group import PerGroupMinMaxObserver
from qtoolkit.observers.percentile import PercentileObserver
from qtoolkit.observers.registry import (
    get_observer_class,
    make_observer,
    register_observer,
    registered_observers,
)

__all__ = [
    "EntropyObserver",
    "HistogramObserver",
    "MSEObserver",
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "Observer",
    "PerChannelMSEObserver",
    "PerChannelMinMaxObserver",
    "PerGroupMinMaxObserver",
    "PercentileObserver",
    "get_observer_class",
    "make_observer",
    "register_observer",
    "registered_observers",
]
