import copy
import inspect
import pickle

import pytest
import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnAddedKVProcessor2_0,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
)

from flatten_diffusion import FocusedLinearAttnProcessor

from .tiny import CONVERTIBLE, build

TAILS = {
    "plain": {"query_dim": 24, "heads": 3, "dim_head": 8},
    "bias": {"query_dim": 24, "heads": 3, "dim_head": 8, "bias": True, "out_bias": False, "upcast_attention": True},
    "wide": {"query_dim": 20, "heads": 2, "dim_head": 12},
    "picture": {
        "query_dim": 24,
        "heads": 3,
        "dim_head": 8,
        "bias": True,
        "norm_num_groups": 4,
        "residual_connection": True,
        "rescale_output_factor": 1.7,
        "eps": 1e-6,
    },
    "spatial": {"query_dim": 32, "heads": 2, "dim_head": 16, "spatial_norm_dim": 5, "residual_connection": True},
    "layer_norm": {"query_dim": 24, "heads": 3, "dim_head": 8, "qk_norm": "layer_norm"},
    "rms_norm": {"query_dim": 24, "heads": 3, "dim_head": 8, "qk_norm": "rms_norm"},
}


def _attention(**kwargs):
    torch.manual_seed(0)
    attn = Attention(**kwargs).double().eval()
    for parameter in attn.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return attn


def _input(name, attn):
    torch.manual_seed(1)
    four = name in ("picture", "spatial")
    x = torch.randn(2, attn.query_dim, 5, 7) if four else torch.randn(2, 35, attn.query_dim)
    return x.double(), torch.randn(2, 5, 5, 7).double() if name == "spatial" else None


class _QuadraticFocused:
    """The focused product as an explicit N x N matrix of weights, inside diffusers' own native code."""

    def __init__(self, power):
        self.power = power

    def __call__(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs):
        assert attn_mask is None
        heads, width = query.shape[1], query.shape[-1]

        def focus(x):
            x = x.transpose(1, 2).flatten(2).clamp(min=0) + 1e-6
            y = x.pow(self.power)
            y = y * (x.pow(2).sum(-1, keepdim=True) / y.pow(2).sum(-1, keepdim=True)).sqrt()
            return y.unflatten(-1, (heads, width)).transpose(1, 2)

        weights = focus(query) @ focus(key).transpose(-1, -2) / key.shape[2]
        return weights / (weights.sum(-1, keepdim=True) + 1e-6) @ value


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("name", TAILS)
def test_self_attention_against_the_native_code_with_its_product_exchanged(name, fused, monkeypatch):
    attn = _attention(**TAILS[name])
    if fused:
        attn.fuse_projections()
    x, temb = _input(name, attn)
    attn.set_processor(FocusedLinearAttnProcessor(focusing_factor=2.0))
    ours = attn(x, temb=temb)
    attn.set_processor(FusedAttnProcessor2_0() if fused else AttnProcessor2_0())
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", _QuadraticFocused(2.0))
    torch.testing.assert_close(ours, attn(x, temb=temb), rtol=1e-9, atol=1e-9)


def test_the_context_may_be_the_input_itself():
    attn = _attention(**TAILS["plain"])
    attn.set_processor(FocusedLinearAttnProcessor())
    x, _ = _input("plain", attn)
    assert torch.equal(attn(x, encoder_hidden_states=x), attn(x))
    attn = _attention(**TAILS["plain"], norm_num_groups=4)  # native: the group norm reaches the query only
    attn.set_processor(FocusedLinearAttnProcessor())
    ours = attn(x, encoder_hidden_states=x)
    attn.set_processor(AttnProcessor2_0())
    assert torch.equal(ours, attn(x, encoder_hidden_states=x))


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("call", ["cross", "masked", "cross masked"])
def test_other_calls_are_native_bit_for_bit(call, fused):
    attn = _attention(query_dim=24, heads=3, dim_head=8, cross_attention_dim=24 if fused else None)
    native = FusedAttnProcessor2_0() if fused else AttnProcessor2_0()
    if fused:
        attn.fuse_projections()
    x = torch.randn(2, 35, 24).double()
    context = torch.randn(2, 35, 24).double() if "cross" in call or fused else None
    mask = torch.randn(2, 1, 35).double() if "masked" in call else None
    attn.set_processor(FocusedLinearAttnProcessor())
    ours = attn(x, encoder_hidden_states=context, attention_mask=mask)
    attn.set_processor(native)
    assert torch.equal(ours, attn(x, encoder_hidden_states=context, attention_mask=mask))


def test_layers_with_another_native_processor_keep_it():
    x = torch.randn(2, 16, 4, 6)
    added = Attention(
        query_dim=16, heads=2, dim_head=8, added_kv_proj_dim=12, norm_num_groups=4, bias=True,
        processor=AttnAddedKVProcessor2_0(),
    )  # fmt: skip
    context = torch.randn(2, 7, 12)
    native = added(x, encoder_hidden_states=context)
    added.set_processor(FocusedLinearAttnProcessor())
    assert torch.equal(added(x, encoder_hidden_states=context), native)

    unscaled = Attention(query_dim=16, heads=2, dim_head=8, scale_qk=False)
    assert type(unscaled.processor) is AttnProcessor
    tokens = x.flatten(2).transpose(1, 2)
    native = unscaled(tokens)
    unscaled.set_processor(FocusedLinearAttnProcessor())
    assert torch.equal(unscaled(tokens), native)


@pytest.mark.parametrize("name", [*CONVERTIBLE, "unclip"])
def test_one_object_on_every_layer_of_a_model(name):
    tiny = build(name)
    layers = [m for m in tiny.model.modules() if isinstance(m, Attention)]
    with torch.no_grad():
        native = tiny()
        one = FocusedLinearAttnProcessor()
        if hasattr(tiny.model, "set_attn_processor"):
            tiny.model.set_attn_processor(one)
        else:
            for attn in layers:
                attn.set_processor(one)
        focused = tiny()
        # A threshold above every size sends each call through the pass-through.
        for attn in layers:
            attn.set_processor(FocusedLinearAttnProcessor(min_tokens=10**6))
        assert torch.equal(tiny(), native)
    assert focused.isfinite().all()
    assert torch.equal(focused, native) == (name == "unclip")


def test_min_tokens_counts_the_tokens_of_the_call():
    attn = _attention(**TAILS["picture"])
    results = {}
    for minimum in (0, 35, 36):
        attn.set_processor(FocusedLinearAttnProcessor(min_tokens=minimum))
        results[minimum] = attn(_input("picture", attn)[0])
    attn.set_processor(AttnProcessor2_0())
    assert torch.equal(results[36], attn(_input("picture", attn)[0]))
    assert torch.equal(results[35], results[0]) and not torch.equal(results[35], results[36])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite_and_in_its_dtype(dtype):
    attn = _attention(query_dim=24, heads=3, dim_head=8).to(dtype)
    torch.nn.init.eye_(attn.to_q.weight), torch.nn.init.eye_(attn.to_k.weight), torch.nn.init.eye_(attn.to_v.weight)
    torch.nn.init.eye_(attn.to_out[0].weight)
    attn.set_processor(FocusedLinearAttnProcessor())
    out = attn((torch.randn(2, 35, 24) * 1e4).to(dtype))
    assert out.dtype == dtype and out.isfinite().all() and out.abs().max() > 100


def test_the_signature_keeps_every_keyword_that_the_native_one_takes():
    native = inspect.signature(AttnProcessor2_0.__call__).parameters
    ours = inspect.signature(FocusedLinearAttnProcessor.__call__).parameters
    assert [name for name in ours if name in native] == list(native)
    assert [ours[name].kind for name in native] == [native[name].kind for name in native]


def test_attention_of_another_kind_raises():
    attn = _attention(**TAILS["plain"])
    attn.set_processor(FocusedLinearAttnProcessor())
    with pytest.raises(NotImplementedError, match="rotary"):
        attn(torch.randn(2, 35, 24).double(), image_rotary_emb=torch.randn(35, 8))
    joint = Attention(query_dim=24, heads=3, dim_head=8, added_kv_proj_dim=24, context_pre_only=False)
    joint.set_processor(FocusedLinearAttnProcessor())
    with pytest.raises(NotImplementedError, match="joint"):
        joint(torch.randn(2, 35, 24), encoder_hidden_states=torch.randn(2, 7, 24))
    with pytest.raises(TypeError, match="Linear"):
        FocusedLinearAttnProcessor()(torch.nn.Linear(2, 2), torch.randn(1, 2, 2))


@pytest.mark.parametrize(
    "settings",
    [{}, {"focusing_factor": 1.5}, {"min_tokens": 36}, {"min_tokens": "auto"}, {"backend": "reference"},
     {"focusing_factor": 2.0, "min_tokens": 3, "backend": "eager"}],
)  # fmt: skip
def test_made_anew_copied_or_pickled_it_keeps_its_settings(settings):
    """`load_ip_adapter` makes every processor anew as `type(processor)()`."""
    ours = FocusedLinearAttnProcessor(**settings)
    for twin in (type(ours)(), copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), type(type(ours)())()):
        assert isinstance(twin, FocusedLinearAttnProcessor) and type(twin).__name__ == "FocusedLinearAttnProcessor"
        assert (twin.focusing_factor, twin.min_tokens, twin.backend) == (
            settings.get("focusing_factor", 3.0), settings.get("min_tokens", 0), settings.get("backend", "auto")
        )  # fmt: skip
    other = type(ours)(focusing_factor=4.0)  # one setting given, the others kept
    assert other.focusing_factor == 4.0 and other.min_tokens == ours.min_tokens and other.backend == ours.backend
    plain = FocusedLinearAttnProcessor()
    assert (plain.focusing_factor, plain.min_tokens, plain.backend) == (3.0, 0, "auto")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"focusing_factor": 0}, "focusing_factor"), ({"min_tokens": -1}, "min_tokens"), ({"backend": "x"}, "backend")],
)
def test_bad_arguments_raise_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        FocusedLinearAttnProcessor(**arguments)
