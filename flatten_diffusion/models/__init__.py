"""The diffusers side: which layers of a model can be converted, their token grids, and the processors."""

from .crossover import AUTO, CrossoverHook, known_ratio, place_of, remove_crossover_hook, softmax_below_on, stays_here
from .families import Finding, survey
from .grid import GridHook, remove_hooks
from .layer import LAYER, MIXER, ConvertedLayer, Reading, native_processor
from .processor import FocusedLinearAttnProcessor
from .projections import Projection, find_projection, heads_of, inner_dim_of
from .rebind import ReboundProcessor, rebind
from .rows import FAMILIES, REFUSED, Family

__all__ = [
    "AUTO",
    "FAMILIES",
    "LAYER",
    "MIXER",
    "REFUSED",
    "ConvertedLayer",
    "CrossoverHook",
    "Family",
    "Finding",
    "FocusedLinearAttnProcessor",
    "GridHook",
    "Projection",
    "Reading",
    "ReboundProcessor",
    "find_projection",
    "heads_of",
    "inner_dim_of",
    "known_ratio",
    "native_processor",
    "place_of",
    "rebind",
    "remove_crossover_hook",
    "remove_hooks",
    "softmax_below_on",
    "stays_here",
    "survey",
]
