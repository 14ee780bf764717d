"""The model card that goes with a saved adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .handle import AdapterHandle


def model_card(adapter: AdapterHandle, description: Mapping[str, Any]) -> str:
    """Markdown with the Hub's YAML header: what the adapter is, what it fits and how to use it."""
    base = description["base_model"]
    config = description["config"]
    size = sum(parameter.numel() for parameter in adapter.parameters())
    header = ["---", "library_name: diffusers", "tags:", "- flatten-diffusion", "- linear-attention", "- diffusers"]
    if base["name_or_path"]:
        header += [f"base_model: {base['name_or_path']}", "base_model_relation: adapter"]
    settings = [f"| {name} | {_cell(value)} |" for name, value in config.items()]
    layers = [f"- `{name}`" for name in description["layers"]]
    origin = base["name_or_path"] or f"the {base['class']} with the fingerprint below"
    source = next((mixer.source for _, mixer in adapter.mixers()), "")
    return "\n".join(
        [
            *header,
            "---",
            "",
            "# Linear attention adapter",
            "",
            f"Replaces the softmax self-attention of {len(layers)} layers of {origin} by `{config['mixer']['name']}`"
            f"{f' ({source})' if source else ''}: time and memory grow linearly with the number of pixels. "
            f"{size:,} learned parameters; the base model's weights are not changed and not included.",
            "",
            "```python",
            "from flatten_diffusion import load_adapter, restore",
            "",
            'adapter = load_adapter(pipe, "this-folder-or-hub-id")',
            "with adapter.disabled():",
            "    ...  # the original model, bit for bit",
            "restore(pipe)",
            "```",
            "",
            "| setting | value |",
            "|---|---|",
            *settings,
            f"| base model | {base['class']} |",
            f"| fingerprint of its shapes | `{base['fingerprint']}` |",
            f"| written by | flatten_diffusion {description['flatten_diffusion_version']} |",
            "",
            "Converted layers:",
            "",
            *layers,
            "",
        ]
    )


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_cell(part)}" for name, part in value.items()) or "-"
    return "-" if value is None else str(value).replace("\n", " ").replace("|", "/")
