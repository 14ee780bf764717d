"""The site shows the pictures of eval/results, which pages name by their path in the checkout."""

from pathlib import Path

from mkdocs.structure.files import File, Files

_RESULTS = Path(__file__).parents[1] / "eval" / "results"


def on_files(files: Files, config: object) -> Files:
    """Add every picture of eval/results under results/."""
    for picture in sorted(_RESULTS.glob("*.png")):
        files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))  # type: ignore[arg-type]
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Point to them there."""
    return markdown.replace("](../eval/results/", "](results/")
