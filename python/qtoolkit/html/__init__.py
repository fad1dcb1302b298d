"""Reports as one HTML file each: tables and plots without anything from the network."""

from qtoolkit.html.page import Cell, figure, number, page, paragraph, table
from qtoolkit.html.plots import bars, histogram, points

__all__ = ["Cell", "bars", "figure", "histogram", "number", "page", "paragraph", "points", "table"]
