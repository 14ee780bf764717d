import pytest
import torch
from diffusers import UNet2DConditionModel

from flatten_diffusion import AdapterConfig, FocusedLinearConfig, linearize, restore
from flatten_diffusion.models.grid import GridCheckpoint

from .tiny import build, stir

CHECKPOINTED = ("sd15", "sdxl", "controlnet", "svd", "pixart")


def _gradients(adapter, loss):
    return torch.autograd.grad(loss, list(adapter.parameters()))


@pytest.mark.compatibility("Gradient checkpointing", "works", "several sizes before one backward pass")
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_two_aspect_ratios_before_one_backward_checkpointed(name):
    tiny = build(name)
    adapter = linearize(tiny.model)
    stir(adapter)
    tiny.model.train()
    wide, tall = tiny().square().sum(), tiny(**tiny.turned()).square().sum()
    expected = _gradients(adapter, wide + 2 * tall)
    tiny.model.enable_gradient_checkpointing()
    wide, tall = tiny().square().sum(), tiny(**tiny.turned()).square().sum()
    for ours, theirs in zip(_gradients(adapter, wide + 2 * tall), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * expected[0].abs().max().item())


def test_another_number_of_tokens_and_the_teacher_between_forward_and_backward():
    tiny = build("sd15")
    with torch.no_grad():
        native = tiny()
    adapter = linearize(tiny.model)
    stir(adapter)
    tiny.model.train()
    expected = _gradients(adapter, tiny().square().sum())
    tiny.model.enable_gradient_checkpointing()
    loss = tiny().square().sum()
    with torch.no_grad():
        tiny(sample=torch.randn(2, 4, 8, 8))
        with adapter.disabled():
            tiny()
    with adapter.disabled():  # the backward pass of an enabled forward pass, while disabled
        ours = _gradients(adapter, loss)
        with torch.no_grad():
            assert torch.equal(tiny(), native)  # and it stays disabled
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kernel_size", [0, 5])
def test_a_disabled_forward_pass_recomputes_disabled(kernel_size):
    tiny = build("pixart")
    tiny.model.train()
    sample = tiny.inputs["hidden_states"].requires_grad_()
    (expected,) = torch.autograd.grad(tiny().square().sum(), sample)
    adapter = linearize(tiny.model, AdapterConfig(mixer=FocusedLinearConfig(kernel_size=kernel_size)))
    tiny.model.enable_gradient_checkpointing()
    with adapter.disabled():
        loss = tiny().square().sum()
    (ours,) = torch.autograd.grad(loss, sample)
    assert torch.equal(ours, expected)


def test_reentrant_checkpointing_too():
    tiny = build("pixart")
    adapter = linearize(tiny.model)
    stir(adapter)
    tiny.model.train()
    tiny.inputs["hidden_states"].requires_grad_()

    def gradients():
        tiny.model.zero_grad()
        (tiny().square().sum() + 2 * tiny(**tiny.turned()).square().sum()).backward()
        return [parameter.grad.clone() for parameter in adapter.parameters()]

    expected = gradients()
    tiny.model.enable_gradient_checkpointing(
        lambda block, *args: torch.utils.checkpoint.checkpoint(block.__call__, *args, use_reentrant=True)
    )
    for a, b in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_restore_takes_the_wrapped_checkpointing_away():
    tiny = build("sd15")
    tiny.model.enable_gradient_checkpointing()
    checkpointed = [m for m in tiny.model.modules() if hasattr(m, "gradient_checkpointing")]
    functions = {module: module._gradient_checkpointing_func for module in checkpointed}
    linearize(tiny.model)
    tiny.model.train()
    tiny()
    assert any(isinstance(m._gradient_checkpointing_func, GridCheckpoint) for m in functions)
    restore(tiny.model)
    assert all(m._gradient_checkpointing_func is function for m, function in functions.items())


def test_a_layer_called_outside_its_model_does_not_guess():
    tiny = build("sd15")
    adapter = linearize(tiny.model)
    attn = tiny.model.get_submodule(adapter.layers[0])
    with torch.no_grad():
        for _ in range(2):  # before any pass, and after one
            with pytest.raises(RuntimeError, match="attn1: the token grid is unknown"):
                attn(torch.randn(1, 384, 16))
            tiny()


def test_tokens_that_do_not_fill_the_grid_are_named():
    tiny = build("sd15")
    adapter = linearize(tiny.model)
    attn = tiny.model.get_submodule(adapter.layers[0])
    handle = attn.register_forward_pre_hook(lambda module, args: (args[0][:, :25],))  # a token merger, say
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="attn1: 25 tokens do not fill the 16x24 grid"):
            tiny()
        handle.remove()
        assert tiny().isfinite().all()


@pytest.mark.parametrize("name", ["sd15", "pixart", "dit"])
def test_forward_called_directly_raises_or_is_right(name):
    """Hooks of the model itself do not run then; those of modules below it do."""
    tiny = build(name)
    stir(linearize(tiny.model))
    with torch.no_grad():
        expected = tiny()
        if name == "sd15":
            assert torch.equal(tiny.model.forward(**tiny.inputs, return_dict=False)[0].flatten(), expected)
            tiny(**tiny.turned())
            assert torch.equal(tiny.model.forward(**tiny.inputs, return_dict=False)[0].flatten(), expected)
        else:
            with pytest.raises(RuntimeError, match="call the whole model"):
                tiny.model.forward(**tiny.inputs)


@pytest.mark.parametrize("name", ["sd15", "pixart"])
def test_a_pass_that_fails_leaves_nothing_behind(name):
    tiny = build(name)
    adapter = linearize(tiny.model)
    handle = tiny.model.get_submodule(adapter.layers[-1]).register_forward_hook(lambda *_: 1 / 0)
    with torch.no_grad(), pytest.raises(ZeroDivisionError):
        tiny()
    handle.remove()
    assert all(layer.grid is None and layer.state.idle for _, layer, _ in adapter.converted_layers())


def test_the_convolution_runs_on_rows_and_columns_as_the_image_has_them():
    """With one-hot kernels the converted layer adds its values shifted by one row: compare with a shifted image."""
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("UpBlock2D",), cross_attention_dim=8,
        mid_block_type=None,
    ).eval()  # fmt: skip
    adapter = linearize(model, AdapterConfig(mixer=FocusedLinearConfig(kernel_size=3)))
    (name,) = adapter.layers
    attn = model.get_submodule(name)
    inputs, outputs = [], []
    attn.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    attn.register_forward_hook(lambda module, args, output: outputs.append(output))

    def run():
        with torch.no_grad():
            model(torch.randn(1, 4, 5, 9, generator=torch.Generator().manual_seed(3)), 1, torch.zeros(1, 2, 8))

    run()
    with torch.no_grad():
        attn.flatten_mixer.mixer.conv_weight[:, 0, 0, 1] = 1.0  # the neighbour one row above
    run()
    assert torch.equal(inputs[0], inputs[1])
    values = attn.to_v(inputs[0]).unflatten(1, (5, 9))
    above = torch.zeros_like(values)
    above[:, 1:] = values[:, :-1]
    expected = above.flatten(1, 2) @ attn.to_out[0].weight.T
    torch.testing.assert_close(outputs[1] - outputs[0], expected, rtol=1e-4, atol=1e-5)
