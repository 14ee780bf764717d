"""The diffusers side: which layers of a model can be converted, their token grids, and the processors."""

from .architectures import ARCHITECTURES, REFUSED, Architecture
from .attention import split_of
from .attention_layers import LayerInfo, find_attention_layers
from .autotune import AUTO, AutotuneHook, Kind, known_ratio, softmax_below_on, stays_here
from .grid import EndHook, GridHook, GuardHook, remove_hooks
from .layer import LAYER, MIXER, ConvertedLayer, Recorder, TokenLayout, native_processor
from .processor import AdapterAttnProcessor, FocusedLinearAttnProcessor
from .projections import Projection, find_projection, heads_of, inner_dim_of
from .proportional import proportional_attention
from .wrapped import WrappedProcessor, wrap

__all__ = [
    "ARCHITECTURES",
    "AUTO",
    "LAYER",
    "MIXER",
    "REFUSED",
    "AdapterAttnProcessor",
    "Architecture",
    "AutotuneHook",
    "ConvertedLayer",
    "EndHook",
    "FocusedLinearAttnProcessor",
    "GridHook",
    "GuardHook",
    "Kind",
    "LayerInfo",
    "Projection",
    "Recorder",
    "TokenLayout",
    "WrappedProcessor",
    "find_attention_layers",
    "find_projection",
    "heads_of",
    "inner_dim_of",
    "known_ratio",
    "native_processor",
    "proportional_attention",
    "remove_hooks",
    "softmax_below_on",
    "split_of",
    "stays_here",
    "wrap",
]
