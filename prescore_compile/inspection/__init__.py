"""Look at what was done to a model: as data, text, HTML and for other viewers."""

from .inspection import Inspection, graph_diff

__all__ = ["Inspection", "graph_diff"]
