"""The mixer in a process group takes its maps along; how tokens are split is tested with the operator."""

import pytest
import torch
import torch.distributed as dist

from flatten_diffusion.mixers import MixerSpec, create_mixer

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


def test_feature_maps_in_a_group(tmp_path):
    torch.manual_seed(0)
    mixer = create_mixer("focused_linear", MixerSpec(heads=3, head_dim=5, kernel_size=3), dtype=torch.float64)
    query, key, value = torch.randn(3, 2, 21, 3, 5, dtype=torch.float64).unbind(0)
    unmapped = mixer(query, key, value, (3, 7))
    mixer.add_feature_maps()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_(std=0.5)
    expected = mixer(query, key, value, (3, 7))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mixer.group = dist.group.WORLD
        torch.testing.assert_close(mixer(query, key, value, (3, 7)), expected, rtol=1e-12, atol=1e-12)
        with torch.no_grad():
            mixer.key_map.bias += 1
        changed = mixer(query, key, value, (3, 7))
    finally:
        dist.destroy_process_group()
    assert not torch.allclose(changed, expected) and not torch.allclose(unmapped, expected)
