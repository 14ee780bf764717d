"""Guidance that skips or replaces attention: honoured, native while disabled, or refused with the remedy."""

from __future__ import annotations

import diffusers
import pytest
import torch

from flatten_diffusion import AdapterConfig, linearize, restore

from ..distill.tiny import tiny_pipeline
from ..models.tiny import build, stir
from ..models.tiny_wrapped import build_wrapped

if not hasattr(diffusers.hooks, "LayerSkipConfig"):
    pytest.skip("this diffusers has no layer skipping", allow_module_level=True)
apply_layer_skip, HookRegistry = diffusers.hooks.apply_layer_skip, diffusers.hooks.HookRegistry
LayerSkipConfig = diffusers.hooks.LayerSkipConfig


def _unhook(model: torch.nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "_diffusers_hook"):
            HookRegistry.check_if_exists_or_initialize(module).remove_hook("layer_skip_hook", recurse=False)


# Other models fail natively: diffusers does not know their processors, or the outputs' shapes.
@pytest.mark.compatibility(
    "Guiders that skip layers", "works", "skipped attention and skipped scores, as diffusers does them"
)
@pytest.mark.parametrize(
    ("name", "scores"),
    [("pixart", False), ("pixart", True), ("cogview4", False), ("cogview4", True), ("qwenimage", True)],
)
def test_skipped_attention_is_skipped_converted_too(name: str, scores: bool) -> None:
    """With every layer skipped, nothing of attention is left: converted and native are one."""
    tiny = build(name) if name == "pixart" else build_wrapped(name)
    stack = next(n for n in ("transformer_blocks", "blocks") if hasattr(tiny.model, n))
    blocks = list(range(len(getattr(tiny.model, stack))))
    config = LayerSkipConfig(blocks, fqn=stack, skip_attention=not scores, skip_attention_scores=scores, skip_ff=False)
    with torch.no_grad():
        plain = tiny()
        apply_layer_skip(tiny.model, config)
        native = tiny()
        _unhook(tiny.model)
        assert not torch.allclose(native, plain)
        adapter = linearize(tiny.model)
        converted = tiny()
        apply_layer_skip(tiny.model, config)
        skipped = tiny()
        with adapter.disabled():
            assert torch.equal(tiny(), native)
        _unhook(tiny.model)
        assert torch.equal(tiny(), converted)
    torch.testing.assert_close(skipped, native, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(skipped, converted)


@pytest.mark.compatibility(
    "PAG pipelines", "order matters", "convert with the perturbed layers in `exclude`; else the next call says so"
)
def test_processors_that_guidance_puts_on_layers() -> None:
    base = tiny_pipeline()
    pipeline = diffusers.StableDiffusionPAGPipeline(
        **{name: part for name, part in base.components.items() if name != "image_encoder"},
        requires_safety_checker=False,
        pag_applied_layers=["down_blocks.0"],
    )
    pipeline.set_progress_bar_config(disable=True)

    def draw() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 2, "output_type": "pt", "guidance_scale": 2.0, "pag_scale": 2.0}
        return pipeline("a red circle", height=32, width=32, generator=generator, **options).images

    native = draw()
    adapter = linearize(pipeline.unet)
    stir(adapter)
    with adapter.disabled():
        assert torch.equal(draw(), native)
    with pytest.raises(RuntimeError, match="replaced by PAG.*`exclude`"):
        draw()
    restore(pipeline.unet)
    assert torch.equal(draw(), native)
    linearize(pipeline.unet, AdapterConfig(exclude=("down_blocks.0.*",)))
    assert not torch.equal(draw(), native)
