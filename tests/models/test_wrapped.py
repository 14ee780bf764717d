"""The generic way: native processors with their product exchanged, and how a sequence divides."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0, JointAttnProcessor2_0
from torch import nn

from flatten_diffusion import AdapterConfig, linearize
from flatten_diffusion.mixers import count_tokens
from flatten_diffusion.models import LAYER, ConvertedLayer, TokenLayout, WrappedProcessor, attention, token_layout, wrap
from flatten_diffusion.models.attention import Split

from .tiny import stir
from .tiny_wrapped import JOINT, WRAPPED, build_wrapped, position_ids


def _softmax_alone(attn, query, key, value, mask, scale, softmax, exact=True):
    """A product that changes nothing: what is left is whether the native code around it is what it was."""
    return softmax(query, key, value, mask)


@pytest.mark.parametrize("name", WRAPPED)
def test_all_but_the_product_is_native_bit_for_bit(name, monkeypatch):
    tiny = build_wrapped(name)
    with torch.no_grad():
        native = tiny()
        linearize(tiny.model, AdapterConfig(include=tiny.include))
        monkeypatch.setattr(attention, "exchange", _softmax_alone)
        monkeypatch.setattr("flatten_diffusion.models.sana.exchange", _softmax_alone)
        ours = tiny()
    if name.startswith("sana"):  # written by hand
        torch.testing.assert_close(ours, native, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(ours, native)


def test_the_native_signature_is_kept_and_one_object_serves_all_layers_of_one_processor():
    tiny = build_wrapped("sd3")
    shared = JointAttnProcessor2_0()
    for module in tiny.model.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(shared)
    linearize(tiny.model)
    processors = {id(m.processor) for m in tiny.model.modules() if hasattr(m, "set_processor")}
    assert len(processors) == 1
    ours = tiny.model.transformer_blocks[0].attn.processor
    assert isinstance(ours, WrappedProcessor) and ours.native is shared
    assert inspect.signature(ours.__call__) == inspect.signature(shared.__call__)
    assert type(ours).__name__ == "WrappedJointAttnProcessor2_0"


def test_copies_and_pickles():
    ours = wrap(AttnProcessor2_0())
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is type(ours) and type(twin.native) is AttnProcessor2_0


def test_on_a_layer_without_a_mixer_the_native_code_runs():
    tiny = build_wrapped("sd3")
    with torch.no_grad():
        native = tiny()
        for module in tiny.model.modules():
            if hasattr(module, "set_processor"):
                module.set_processor(wrap(module.processor))
        assert torch.equal(tiny(), native)


class NoProduct:
    def __call__(self, attn, hidden_states):
        return attn.to_v(hidden_states)


class OneArgument:
    def __call__(self, *args):
        return torch.nn.functional.scaled_dot_product_attention(*args)


def _made_from_text():
    namespace = {}
    exec("class FromText:\n    def __call__(self, attn, x):\n        return x", namespace)
    return namespace["FromText"]()


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (NoProduct(), "NoProduct calls neither scaled_dot_product_attention nor dispatch_attention_fn"),
        (OneArgument(), "OneArgument: its __call__ does not take the attention module"),
        (_made_from_text(), "FromText: its source cannot be read"),
    ],
    ids=["no product", "one argument", "no source"],
)
def test_what_cannot_be_wrapped_says_why(processor, message):
    with pytest.raises(ValueError, match=message):
        wrap(processor)


def test_an_attention_backend_set_later_reaches_the_native_processor():
    tiny = build_wrapped("flux")
    linearize(tiny.model)
    processor = tiny.model.transformer_blocks[0].attn.processor
    if not hasattr(processor.native, "_attention_backend"):
        assert not hasattr(processor, "_attention_backend")
        pytest.skip("this diffusers has no attention backends")
    tiny.model.set_attention_backend("native")
    assert processor.native._attention_backend == processor._attention_backend is not None
    with torch.no_grad():
        assert tiny().isfinite().all()
    tiny.model.reset_attention_backend()


# ---- how a sequence divides ----


@pytest.mark.parametrize("last", [False, True])
def test_a_split_and_back(last):
    x = torch.arange(2 * 9 * 2).reshape(2, 9, 2)
    split = Split(6, last)
    picture, others = split.queries(x)
    assert picture.shape[1] == 6 and torch.equal(picture, x[:, 3:] if last else x[:, :6])
    assert torch.equal(split.together(picture, others), x)


def test_a_ragged_split_and_back():
    """Each sample's image after its own number of text tokens, padding behind."""
    x = torch.arange(3 * 8).reshape(3, 8, 1, 1)
    starts = torch.tensor([0, 2, 4])
    split = Split(4, last=True, starts=starts)
    picture, others = split.queries(x)
    for sample, start in enumerate(starts.tolist()):
        tokens = x[sample].flatten().tolist()
        assert picture[sample].flatten().tolist() == tokens[start : start + 4]
        assert others[sample].flatten().tolist() == tokens[:start] + tokens[start + 4 :]
    assert torch.equal(split.together(picture, others), x)
    mask = torch.rand(3, 1, 8, 8)
    rows = split.queries(mask, dim=-2)[0]
    assert torch.equal(rows[1, 0], mask[1, 0, 2:6])


class Products:
    """A `Recorder` of native products."""

    def __init__(self):
        self.found = []

    def native(self, output):
        self.found.append(output)

    def mixed(self, inputs):
        raise AssertionError("the layer is disabled")


@pytest.mark.parametrize("name", JOINT)
def test_rows_outside_the_image_are_native(name, monkeypatch):
    """Every layer by itself, so that its input is the native one."""
    tiny = build_wrapped(name)
    layers = linearize(tiny.model).layers
    for layer in layers:
        tiny = build_wrapped(name)
        adapter = linearize(tiny.model, AdapterConfig(include=[layer]))
        stir(adapter)
        state = getattr(tiny.model.get_submodule(layer), LAYER)
        if state.place == "alone":
            continue
        native, ours = Products(), []
        with torch.no_grad():
            state.record(native)
            with adapter.disabled():
                tiny()
            state.record(None)
            joint = attention._joint

            def watched(*args, joint=joint, ours=ours, state=state):
                output = joint(*args)
                ours.append((output, attention.split_of(state, output.shape[1], output.shape[1])))
                return output

            monkeypatch.setattr(attention, "_joint", watched)
            tiny()
            monkeypatch.undo()
        assert len(ours) == len(native.found) == (2 if name == "mochi" else 1)
        for (one, split), other in zip(ours, native.found, strict=True):
            assert split.picture == count_tokens(tiny.grid)
            mine, theirs = split.queries(one), split.queries(other)
            assert not torch.allclose(mine[0], theirs[0])
            torch.testing.assert_close(mine[1], theirs[1], rtol=1e-5, atol=1e-6, equal_nan=True)


# ---- masks, raggedness, several images ----


def _alone(inputs, sample, text):
    """One sample of a batch, its text cut to its own length."""
    return {name: value[sample : sample + 1] for name, value in inputs.items()} | text


@pytest.mark.parametrize("name", ["lumina2", "qwenimage", "zimage", "hunyuanvideo", "mochi", "prx", "chroma"])
def test_a_padded_sample_gives_what_it_gives_alone(name):
    tiny = build_wrapped(name)
    stir(linearize(tiny.model))
    x = tiny.inputs
    if name == "zimage":
        alone = {"x": x["x"][:1], "t": x["t"][:1], "cap_feats": x["cap_feats"][:1]}
        sample = 0
    else:
        sample = 1
        alone = {k: v[1:] if torch.is_tensor(v) and v.shape[:1] == (2,) else v for k, v in x.items()}
        alone["encoder_hidden_states"] = x["encoder_hidden_states"][1:, :5]
        if name == "chroma":
            alone["attention_mask"] = None
            alone["txt_ids"] = x["txt_ids"][:5]
        elif name == "qwenimage":
            alone |= {"img_shapes": x["img_shapes"][1:], "encoder_hidden_states_mask": None}
        elif name == "prx":
            alone["attention_mask"] = None
        else:
            alone["encoder_attention_mask"] = x["encoder_attention_mask"][1:, :5]
    with torch.no_grad():
        together = tiny().unflatten(0, (2, -1))[sample]
        torch.testing.assert_close(tiny.model(**alone)[0][0].flatten(), together, rtol=1e-4, atol=1e-5)


def test_what_padding_holds_does_not_matter():
    tiny = build_wrapped("qwenimage")
    stir(linearize(tiny.model))
    text = tiny.inputs["encoder_hidden_states"].clone()
    text[1, 5:] = 1e3 * torch.randn(2, 24)
    with torch.no_grad():
        torch.testing.assert_close(tiny(encoder_hidden_states=text), tiny(), rtol=1e-5, atol=1e-6)


def test_additive_key_padding_counts_as_bool_does():
    from flatten_diffusion.models.attention import _key_padding

    layer = ConvertedLayer("blocks.0.attn", None, 0)
    key = torch.zeros(2, 5, 3, 4)
    keep = torch.tensor([[True] * 5, [True, True, False, True, False]])
    for low in (float("-inf"), torch.finfo(torch.float32).min, -10000.0):
        for heads in (1, 3):
            mask = torch.zeros(2, heads, 1, 5).masked_fill(~keep[:, None, None], low)
            assert torch.equal(_key_padding(layer, mask, key), keep)
    assert torch.equal(_key_padding(layer, keep[:1, None, None], key), keep[:1].expand(2, 5))
    assert _key_padding(layer, torch.zeros(2, 1, 5, 5), key) is None
    assert _key_padding(layer, torch.zeros(5, 5), key) is None


def _stays_softmax(tiny, why, **changes):
    """The pass is native bit for bit, and the report says why."""
    with torch.no_grad():
        native = tiny(**changes)
        adapter = linearize(tiny.model)
        adapter.add_deltas(("q", "out"), 2)
        stir(adapter)
        assert torch.equal(tiny(**changes), native)
        assert all(why in row.reason for row in adapter.report().converted)
        tiny()
        assert not any("in the last pass" in row.reason for row in adapter.report())
        adapter.merge()
        tiny()
        with pytest.raises(RuntimeError, match="stays softmax in this pass .* call unmerge"):
            tiny(**changes)


def test_a_mask_that_differs_between_image_tokens_keeps_softmax():
    tiny = build_wrapped("omnigen")
    mask = tiny.inputs["attention_mask"].clone()
    mask[0, 20, 30] = 0
    _stays_softmax(tiny, "softmax in the last pass: its attention_mask differs", attention_mask=mask)


def test_a_text_mask_that_diffusers_gets_wrong_keeps_softmax():
    tiny = build_wrapped("cogview4")
    _stays_softmax(tiny, "instead of masking", attention_mask=torch.ones(2, 7))


def test_images_of_different_sizes_in_one_batch_keep_softmax():
    tiny = build_wrapped("qwenimage")
    shapes = [[(1, 4, 6)], [(1, 6, 4)]]
    if "img_shapes" not in inspect.signature(tiny.model.forward).parameters:
        pytest.skip("this diffusers has no img_shapes")
    reading = token_layout.image_shapes(tiny.model, shapes)
    assert reading.softmax == "images of different sizes in one batch"
    tiny = build_wrapped("zimage")
    pictures = [tiny.inputs["x"][0], tiny.inputs["x"][1].transpose(-1, -2).contiguous()]
    _stays_softmax(tiny, "images of different sizes in one batch", x=pictures)


def test_a_mask_that_no_row_of_the_table_foresees_keeps_softmax_and_refuses_deltas():
    tiny = build_wrapped("flux")
    adapter = linearize(tiny.model)
    stir(adapter)
    attn = tiny.model.single_transformer_blocks[0].attn
    hidden = torch.randn(2, 31, 32)
    mask = torch.rand(2, 1, 31, 31) > 0.5
    mask |= torch.eye(31, dtype=torch.bool)
    with torch.no_grad():
        tiny()
        with adapter.disabled():
            native = attn(hidden, attention_mask=mask)
        assert torch.equal(attn(hidden, attention_mask=mask), native)
        row = next(row for row in adapter.report() if row.name.startswith("single"))
        assert "softmax in the last pass: its mask is no key padding" in row.reason
        adapter.add_deltas(("q",), 2)
        with pytest.raises(RuntimeError, match=r"single_transformer_blocks.0.attn: this call needs softmax \(its mask"):
            attn(hidden, attention_mask=mask)


@pytest.mark.parametrize("name", ["flux", "flux2", "qwenimage"])
def test_reference_images_are_images_of_their_own(name):
    tiny = build_wrapped(name)
    adapter = linearize(tiny.model)
    stir(adapter)
    channels = tiny.inputs["hidden_states"].shape[-1]
    changes = {"hidden_states": torch.cat([tiny.inputs["hidden_states"], torch.randn(2, 9, channels)], dim=1)}
    if name == "qwenimage":
        changes["img_shapes"] = [[(1, 4, 6), (1, 3, 3)]] * 2
    else:
        columns = tiny.inputs["img_ids"].shape[1]
        reference = position_ids(3, 3, picture=1, columns=columns)
        changes["img_ids"] = torch.cat([tiny.inputs["img_ids"], reference])
    with torch.no_grad():
        assert tiny(**changes).isfinite().all()
        assert {row.grid for row in adapter.report().converted} == {((1, 4, 6), (1, 3, 3))}
    assert "4 x 6 + 3 x 3" in str(adapter.report())


def test_ids_that_are_no_image():
    ids = position_ids(4, 6)
    assert token_layout._grid_from_ids(ids) == (4, 6)
    assert token_layout._grid_from_ids(ids + torch.tensor([1, 7, 9])) == (4, 6)  # references may be moved
    assert token_layout._grid_from_ids(torch.cat([ids, ids])) == ((1, 4, 6), (1, 4, 6))
    assert token_layout._grid_from_ids(position_ids(1, 1)) == (1, 1)
    assert token_layout._grid_from_ids(position_ids(5, 1)) == (5, 1)
    assert token_layout._grid_from_ids(torch.cat([ids, ids + torch.tensor([0, 10, 0])])) == ((1, 4, 6), (1, 4, 6))
    for cut in (ids[:-2], ids[:-7], position_ids(257, 300).bfloat16()[:-1]):
        with pytest.raises(ValueError, match="img_ids do not run through whole images row by row, as far as"):
            token_layout._grid_from_ids(cut)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("step", [1, 0.5, 0.3])
@pytest.mark.parametrize("size", [(257, 257), (512, 512), (300, 257), (2, 700), (512, 2), (1, 300)])
def test_rounded_ids_of_large_images(size, step, dtype):
    """4,112 and 8,192 pixels a side are 257 and 512 tokens; bfloat16 has no 257."""
    ids = (position_ids(*size) * torch.tensor([1, step, step])).to(dtype)
    assert token_layout._grid_from_ids(ids) == size
    assert token_layout._agree(ids, size).item()
    assert not token_layout._agree(ids, (size[0] * size[1], 1)).item()
    if size[0] > 1:
        assert not token_layout._agree(ids, (1, size[0] * size[1])).item()


def test_rounded_ids_of_several_images():
    ids = torch.cat([position_ids(257, 300), position_ids(128, 200, picture=1) + torch.tensor([0, 0, 300])])
    assert token_layout._grid_from_ids(ids.bfloat16()) == ((1, 257, 300), (1, 128, 200))
    far = position_ids(64, 64, picture=1) + torch.tensor([0, 700, 900])
    assert token_layout._grid_from_ids(far.bfloat16()) == (64, 64)


def test_ids_rounded_beyond_telling_raise():
    """One column of 300 rows: where two rows have one id, nothing says that they are not two columns."""
    with pytest.raises(ValueError, match="as far as bfloat16 tells: pass the ids that the pipeline makes, in float32"):
        token_layout._grid_from_ids(position_ids(300, 1).bfloat16())


@pytest.mark.parametrize("name", ["flux", "flux2", "chroma"])
def test_rounded_ids_give_what_the_exact_grid_gives(name):
    """An image 258 tokens wide."""
    tiny = build_wrapped(name)
    columns = tiny.inputs["img_ids"].shape[1]
    adapter = linearize(tiny.model)
    ids = position_ids(2, 258, columns=columns).bfloat16()
    changes = {"hidden_states": torch.randn(2, 516, 4), "img_ids": ids.float()}
    if name == "chroma":
        changes["attention_mask"] = torch.ones(2, 523, dtype=torch.bool)
    with torch.no_grad():
        tiny(**changes)
    assert {row.grid for row in adapter.report().converted} == {(2, 258)}


def test_tokens_that_do_not_fit_are_named():
    tiny = build_wrapped("wan")
    linearize(tiny.model)
    attn = tiny.model.blocks[0].attn1
    with pytest.raises(RuntimeError, match="blocks.0.attn1: the token grid is unknown"):
        attn(torch.randn(1, 48, 24))
    getattr(attn, LAYER).begin(TokenLayout((2, 4, 6)))
    with torch.no_grad(), pytest.raises(RuntimeError, match="blocks.0.attn1: 50 tokens do not fill the 2x4x6 grid"):
        attn(torch.randn(1, 50, 24))
    joint = build_wrapped("sd3")
    linearize(joint.model)
    with pytest.raises(RuntimeError, match="which tokens are the image's is unknown: call the whole model"):
        joint.model.transformer_blocks[0].attn(torch.randn(1, 24, 16), torch.randn(1, 7, 16))


def test_mochi_has_no_set_processor_and_is_found_all_the_same():
    tiny = build_wrapped("mochi")
    attn = tiny.model.transformer_blocks[0].attn1
    assert not hasattr(attn, "set_processor")
    before = attn.processor
    adapter = linearize(tiny.model)
    assert isinstance(attn.processor, WrappedProcessor) and attn.processor.native is before
    assert len(adapter.layers) == 2


@pytest.mark.compatibility("Context parallelism", "refused", "of diffusers' processors")
def test_a_processor_with_context_parallelism_is_refused():
    attn = nn.Module()
    setattr(attn, LAYER, ConvertedLayer("blocks.0.attn", None, 0))
    x = torch.randn(1, 4, 2, 8)
    with pytest.raises(RuntimeError, match="blocks.0.attn: context parallelism splits the tokens"):
        attention.tokens_first_product(attn, x, x, x, parallel_config=object())
