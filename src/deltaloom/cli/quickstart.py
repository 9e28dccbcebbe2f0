"""`deltaloom quickstart`: the lab's data, one shipped recipe, one report."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from deltaloom.core.progress import say


def quickstart(out: Path, seed: int, overrides: dict[str, Any]) -> dict[str, Any]:
    """Write the lab to `out/lab`, run the recipe in `out/quickstart`, write `out/report.html`."""
    from deltaloom.lab.files import write_lab
    from deltaloom.recipe.execute import run_recipe
    from deltaloom.recipe.parsing import parse_recipe
    from deltaloom.report.page import write_report

    paths = {**write_lab(out / "lab", seed), "features": out / "features"}
    say(f"lab written to {paths['base'].parent}")
    recipe = parse_recipe(lab_recipe(paths, seed), "quickstart", overrides)
    record = run_recipe(recipe, out / "quickstart")
    write_report([out / "quickstart"], out / "report.html")
    return record


def lab_recipe(paths: dict[str, Path], seed: int) -> dict[str, Any]:
    """The shipped recipe with the lab's files in place of their `lab:` names."""
    text = resources.files("deltaloom.lab").joinpath("quickstart.yaml").read_text("utf-8")

    def place(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: place(one) for key, one in value.items()}
        if isinstance(value, list):
            return [place(one) for one in value]
        if isinstance(value, str) and value.startswith("lab:"):
            return str(paths[value.removeprefix("lab:")])
        return value

    return {**place(yaml.safe_load(text)), "seed": seed}
