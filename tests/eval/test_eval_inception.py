"""The FID network: the published one cannot be downloaded here, so its known counts, shapes and pools stand for it."""

from __future__ import annotations

import io
import pickle
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from flatten_diffusion.files import sha256_of
from flatten_eval.errors import InputError
from flatten_eval.features import inception as module
from flatten_eval.features import is_published_fid, load_extractor
from flatten_eval.features.inception_network import InceptionV3

from .pieces import draw

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network() -> InceptionV3:
    torch.manual_seed(0)
    net = InceptionV3().eval()
    for name, buffer in net.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
        elif name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
    return net


@pytest.fixture
def weights(network: InceptionV3, tmp_path: Path) -> Path:
    path = tmp_path / "inception.safetensors"
    save_file(network.state_dict(), path)
    return path


def test_counts_are_those_of_the_published_network(network: InceptionV3) -> None:
    classifier = 2048 * 1008 + 1008
    # 21,785,568 is Inception-v3 without its classifier: 94 convolutions, each with a batch norm.
    assert sum(p.numel() for p in network.parameters()) - classifier == 21_785_568
    assert sum(isinstance(m, torch.nn.Conv2d) for m in network.modules()) == 94
    assert len(network.state_dict()) == 94 * 6 + 2
    # The published file of 95,628,359 bytes is these tensors in float32 and under 0.2 % of pickle.
    size = sum(t.numel() * t.element_size() for t in network.state_dict().values())
    assert 0 < 95_628_359 - size < 0.002 * size


@torch.no_grad()
def test_shapes_along_the_way_are_those_of_the_paper(network: InceptionV3) -> None:
    seen: dict[str, tuple[int, ...]] = {}
    hooks = [
        child.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: tuple(out.shape[1:])}))
        for name, child in network.named_children()
    ]
    features = network(torch.randn(1, 3, 299, 299))
    for hook in hooks:
        hook.remove()
    assert features.shape == (1, 2048)
    assert seen["Conv2d_1a_3x3"] == (32, 149, 149) and seen["Conv2d_4a_3x3"] == (192, 71, 71)
    assert seen["Mixed_5b"] == (256, 35, 35) and seen["Mixed_5d"] == (288, 35, 35)
    assert seen["Mixed_6a"] == (768, 17, 17) and seen["Mixed_6e"] == (768, 17, 17)
    assert seen["Mixed_7a"] == (1280, 8, 8) and seen["Mixed_7c"] == (2048, 8, 8)


@torch.no_grad()
def test_pools_of_the_2015_graph(network: InceptionV3) -> None:
    ones = torch.ones(1, 1280, 8, 8)
    tail = network.Mixed_7b(ones)[:, -192:]
    expected = network.Mixed_7b.branch_pool(ones)  # the average of ones is one only when padding does not count
    torch.testing.assert_close(tail, expected)
    x = torch.randn(1, 2048, 8, 8)
    expected = network.Mixed_7c.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1))
    torch.testing.assert_close(network.Mixed_7c(x)[:, -192:], expected)


@pytest.mark.parametrize(("mode", "offset", "scale"), [("clean", 128, 128), ("legacy-pytorch", 127.5, 127.5)])
def test_extractor_scales_as_its_resizer_was_published(
    network: InceptionV3, weights: Path, mode: Any, offset: float, scale: float
) -> None:
    extractor = load_extractor("inception", device=CPU, weights=weights, weights_sha256=sha256_of(weights), resize=mode)
    prepared = extractor.prepare(draw(0, 40, 60))
    with torch.no_grad():
        expected = network((prepared[None] - offset) / scale)
    torch.testing.assert_close(extractor.extract(prepared[None]), expected, rtol=1e-4, atol=1e-5)
    assert not is_published_fid(extractor.identity)


def test_pth_safetensors_and_torchscript_load_alike(network: InceptionV3, weights: Path, tmp_path: Path) -> None:
    torch.save(network.state_dict(), tmp_path / "w.pth")
    old = {key: value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old.pth")

    class Published(torch.nn.Module):
        """As the distributed archive: `layers` after its own resizing."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = network

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.layers(image) * 0

    torch.jit.trace(Published(), torch.zeros(1, 3, 299, 299)).save(str(tmp_path / "w.pt"))
    image = torch.randn(1, 3, 299, 299)
    with torch.no_grad():
        expected = network(image)
        for path in (weights, tmp_path / "w.pth", tmp_path / "old.pth", tmp_path / "w.pt"):
            torch.testing.assert_close(module.load_network(path)(image), expected)


def test_unknown_weights_are_refused_with_both_checksums(weights: Path) -> None:
    with pytest.raises(InputError, match=f"sha256 is {sha256_of(weights)}, expected 6726825d"):
        load_extractor("inception", device=CPU, weights=weights)
    with pytest.raises(InputError, match="expected " + "0" * 64):
        load_extractor("inception", device=CPU, weights=weights, weights_sha256="0" * 64)


def test_only_published_weights_are_called_fid(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PUBLISHED_SHA256", frozenset({sha256_of(weights)}))
    monkeypatch.setattr("flatten_eval.features.PUBLISHED_SHA256", frozenset({sha256_of(weights)}))
    assert is_published_fid(load_extractor("inception", device=CPU, weights=weights).identity)


def test_other_layouts_and_pickled_code_are_refused(network: InceptionV3, tmp_path: Path) -> None:
    state = dict(network.state_dict())
    path = tmp_path / "w.pth"
    torch.save({key: value for key, value in state.items() if key != "fc.bias"}, path)
    with pytest.raises(InputError, match="lacks fc.bias"):
        module.load_network(path)
    torch.save(state | {"fc.bias": torch.zeros(1000)}, path)
    with pytest.raises(InputError, match="another shape for fc.bias"):
        module.load_network(path)
    path.write_bytes(pickle.dumps(print))
    with pytest.raises(InputError, match="neither TorchScript nor"):
        module.load_network(path)
    broken = tmp_path / "w.safetensors"
    broken.write_bytes(b"not safetensors at all")
    with pytest.raises(InputError, match="damaged safetensors"):
        module.load_network(broken)


def test_download_is_checked_and_never_half_written(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="--offline is set"):
        module.published_weights(offline=True)

    class Response(io.BytesIO):
        headers: dict[str, str] = {}

    monkeypatch.setattr(urllib.request, "urlopen", lambda *_a, **_k: Response(b"half a file"))
    with pytest.raises(InputError, match="downloaded file has sha256"):
        module.published_weights(offline=False)
    assert list(module.cache_folder().iterdir()) == []

    def refuse(*_arguments: object, **_options: object) -> None:
        raise OSError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(InputError, match="download failed .no route."):
        module.published_weights(offline=False)
