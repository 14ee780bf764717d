"""The diffusers side: which layers of a model can be converted, their token grids, and the processors."""

from .families import FAMILIES, Family, Finding, survey
from .grid import GridHook, remove_hooks
from .layer import LAYER, MIXER, ConvertedLayer, native_processor
from .processor import FocusedLinearAttnProcessor

__all__ = [
    "FAMILIES",
    "LAYER",
    "MIXER",
    "ConvertedLayer",
    "Family",
    "Finding",
    "FocusedLinearAttnProcessor",
    "GridHook",
    "native_processor",
    "remove_hooks",
    "survey",
]
