"""The diffusers side: which layers of a model can be converted, their token grids, and the processors."""

from .attention import split_of
from .autotune import AUTO, AutotuneHook, Kind, known_ratio, softmax_below_on, stays_here
from .families import Finding, survey
from .grid import EndHook, GridHook, GuardHook, remove_hooks
from .layer import LAYER, MIXER, ConvertedLayer, Reading, Recorder, native_processor
from .processor import AdapterAttnProcessor, FocusedLinearAttnProcessor
from .projections import Projection, find_projection, heads_of, inner_dim_of
from .rows import FAMILIES, REFUSED, Family
from .wrapped import WrappedProcessor, wrap

__all__ = [
    "AUTO",
    "FAMILIES",
    "LAYER",
    "MIXER",
    "REFUSED",
    "AdapterAttnProcessor",
    "AutotuneHook",
    "ConvertedLayer",
    "EndHook",
    "Family",
    "Finding",
    "FocusedLinearAttnProcessor",
    "GridHook",
    "GuardHook",
    "Kind",
    "Projection",
    "Reading",
    "Recorder",
    "WrappedProcessor",
    "find_projection",
    "heads_of",
    "inner_dim_of",
    "known_ratio",
    "native_processor",
    "remove_hooks",
    "softmax_below_on",
    "split_of",
    "stays_here",
    "survey",
    "wrap",
]
