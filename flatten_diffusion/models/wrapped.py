"""The generic way to convert: a native processor run as it is, with only its attention product exchanged.

Every diffusers processor ends in `F.scaled_dot_product_attention` or `dispatch_attention_fn`, after projections,
query-key norms and rotary embeddings of its own. Its `__call__` is compiled again from its source with those two calls
led to `attention` and the attention module handed along; everything else stays the native code, in the native module's
own namespace, so nothing is patched and nothing of a family needs to be written twice.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import torch

from .attention import heads_first_product, tokens_first_product
from .guiders import register_like
from .layer import LAYER, MIXER, ConvertedLayer
from .projections import SeenAttention
from .sana import sana_attention, sana_video_attention

_PRODUCTS = {
    "scaled_dot_product_attention": "_flatten_heads_first",
    "dispatch_attention_fn": "_flatten_tokens_first",
}

_HAND_WRITTEN: dict[str, Callable[..., Any]] = {
    "SanaLinearAttnProcessor2_0": sana_attention,
    "SanaLinearAttnProcessor3_0": sana_video_attention,
}
"""(native processor, attention module, its arguments) -> its output, for classes that call no product."""
_CLASSES: dict[type, type[WrappedProcessor]] = {}
"""One class per native class, made at its first conversion."""


class WrappedProcessor:
    """A native processor whose attention product is that of the layer's mixer; made by `wrap`.

    It holds no state of a layer: one object serves every layer that ran `native`. Layers without a mixer, disabled
    layers and calls below `min_tokens` run `native` itself, bit for bit.

    Attributes:
        native: the processor that was replaced.
    """

    native_class: type = object

    def __init__(self, native: Any = None) -> None:
        # diffusers makes processors anew without arguments (`load_ip_adapter`).
        self.native = type(self).native_class() if native is None else native

    def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        """Made for each native class by `wrap`, with its signature."""
        raise NotImplementedError("Make a WrappedProcessor by wrap().")

    def __reduce__(self) -> tuple[Callable[[Any], WrappedProcessor], tuple[Any]]:
        return wrap, (self.native,)

    # `set_attention_backend` and context parallelism look for these two on the processor.
    @property
    def _attention_backend(self) -> Any:
        return self.native._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.native._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        return self.native._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        self.native._parallel_config = config


def wrap(native: Any) -> WrappedProcessor:
    """A processor that does what `native` does, its product exchanged.

    Raises:
        ValueError: the class's `__call__` has no readable source, or calls neither of the two products.
    """
    native_class = type(native)
    if native_class not in _CLASSES:
        _CLASSES[native_class] = made = _make_class(native_class)
        register_like(made, native_class)
    return _CLASSES[native_class](native)


def _make_class(native_class: type) -> type[WrappedProcessor]:
    with_product = _HAND_WRITTEN.get(native_class.__name__) or recompiled(
        native_class, heads_first_product, tokens_first_product
    )

    def __call__(self: WrappedProcessor, attn: Any, *args: Any, **kwargs: Any) -> Any:
        layer: ConvertedLayer | None = getattr(attn, LAYER, None)
        hidden_states = _first(args, kwargs)
        if layer is None or not layer.intercepts(hidden_states):
            return self.native(attn, *args, **kwargs)
        if layer.stays_softmax(hidden_states.shape[1]) is not None:
            return with_product(self.native, attn, *args, **kwargs)
        mixer = getattr(attn, MIXER)
        deltas = {} if layer.merged else mixer.deltas
        if len(deltas) > 0 or "hidden_states" in mixer.needs:
            return with_product(self.native, SeenAttention(attn, deltas, hidden_states), *args, **kwargs)
        return with_product(self.native, attn, *args, **kwargs)

    # Attention modules filter keyword arguments by this signature: without it, masks and rotary embeddings are lost.
    __call__.__signature__ = inspect.signature(native_class.__call__)  # type: ignore[attr-defined]
    return type(
        f"Wrapped{native_class.__name__}", (WrappedProcessor,), {"__call__": __call__, "native_class": native_class}
    )


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states of a processor's call: its first argument in every diffusers processor."""
    hidden_states: torch.Tensor = args[0] if len(args) > 0 else kwargs["hidden_states"]
    return hidden_states


class _LeadToProduct(ast.NodeTransformer):
    """Turns `F.scaled_dot_product_attention(query, ...)` into `_flatten_heads_first(attn, query, ...)`, and so on."""

    def __init__(self, attn: str) -> None:
        self.attn = attn
        self.found = 0

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        function = node.func
        name = getattr(function, "attr", None) or getattr(function, "id", None)
        if name in _PRODUCTS:
            self.found += 1
            node.func = ast.copy_location(ast.Name(_PRODUCTS[name], ast.Load()), function)
            node.args.insert(0, ast.copy_location(ast.Name(self.attn, ast.Load()), function))
        return node


def recompiled(
    native_class: type, heads_first: Callable[..., Any], tokens_first: Callable[..., Any]
) -> Callable[..., Any]:
    """`native_class.__call__` with its product exchanged; an unbound function of the same arguments.

    Args:
        native_class: of the processor.
        heads_first: in place of `F.scaled_dot_product_attention`, with the attention module before its arguments.
        tokens_first: in place of `dispatch_attention_fn`, likewise.

    Raises:
        ValueError: the class's `__call__` has no readable source, or calls neither of the two products.
    """
    function: Any = native_class.__call__
    name = native_class.__name__
    try:
        lines, first_line = inspect.getsourcelines(function)
        filename = inspect.getsourcefile(function) or f"<{name}>"
    except (OSError, TypeError) as error:
        raise ValueError(f"{name}: its source cannot be read, and conversion starts from it ({error}).") from error
    (definition,) = ast.parse(textwrap.dedent("".join(lines))).body
    if not isinstance(definition, ast.FunctionDef) or function.__code__.co_freevars:
        raise ValueError(f"{name}: its __call__ is no plain function, and conversion starts from it.")
    arguments = definition.args.posonlyargs + definition.args.args
    if len(arguments) < 2:
        raise ValueError(f"{name}: its __call__ does not take the attention module as its first argument.")
    for argument in ast.walk(definition.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    definition.returns = None
    rewrite = _LeadToProduct(arguments[1].arg)
    rewrite.visit(definition)
    if rewrite.found == 0:
        raise ValueError(f"{name} calls neither scaled_dot_product_attention nor dispatch_attention_fn itself.")
    # A function around it gives it the products as closure cells and leaves the module's namespace as it is.
    outer = ast.parse(f"def make({', '.join(_PRODUCTS.values())}):\n    return {definition.name}").body[0]
    assert isinstance(outer, ast.FunctionDef)
    outer.body.insert(0, definition)
    module = ast.increment_lineno(ast.fix_missing_locations(ast.Module([outer], [])), first_line - 1)
    namespace: dict[str, Any] = {}
    exec(compile(module, filename, "exec"), function.__globals__, namespace)
    made: Callable[..., Any] = namespace["make"](heads_first, tokens_first)
    return made
