"""What a result was made with: package versions and the machine, for every JSON and report."""

from __future__ import annotations

import importlib.metadata
import platform
from datetime import datetime, timezone

import torch

from flatten_diffusion.models.timing import device_name

_PACKAGES = ("flatten-diffusion", "torch", "diffusers", "transformers", "accelerate", "numpy", "pillow")


def package_versions() -> dict[str, str]:
    """Versions of the packages that results depend on; those not installed are left out."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def environment(device: torch.device) -> dict[str, object]:
    """Versions, device name, thread count and the time, in UTC."""
    return {
        "versions": package_versions(),
        "device": str(device),
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
