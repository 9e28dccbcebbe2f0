"""What the documentation shows, runs."""

import re
import sys
from pathlib import Path

import pytest
import yaml

from deltaloom import methods, testing
from deltaloom.recipe.parsing import parse_recipe

ROOT = Path(__file__).parents[1]


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The worked example as a package of its own, with its entry point."""
    text = (ROOT / "docs" / "adding_a_method.md").read_text()
    code = next(block for block in blocks(text, "python") if "class Longest" in block)
    package, info = tmp_path / "mypackage", tmp_path / "mypackage-1.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text("")
    (package / "longest.py").write_text(code)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mypackage\nVersion: 1\n")
    (point,) = [block for block in blocks(text, "toml") if "entry-points" in block]
    name, value = re.search(r'(\w+) = "(.+)"', point).groups()
    (info / "entry_points.txt").write_text(f"[deltaloom.select]\n{name} = {value}\n")
    monkeypatch.syspath_prepend(tmp_path)
    methods.cache_clear()
    yield testing.entry("select", "longest")
    methods.cache_clear()
    for module in ("mypackage", "mypackage.longest"):
        sys.modules.pop(module, None)


@pytest.mark.parametrize("check", testing.CHECKS, ids=lambda check: check.__name__)
def test_the_worked_example_passes_the_suite(check, example, tmp_path):
    check(example, tmp_path / "work")


def test_the_worked_example_keeps_the_longest(example, tmp_path):
    (tmp_path / "work").mkdir()
    testing.run(example, tmp_path / "work" / "out", count=3)
    from deltaloom import Examples

    pool = Examples.read(testing.inputs("select")["pool"])
    longest = sorted((len(row.response.split()) for row in pool), reverse=True)[:3]
    chosen = Examples.read(tmp_path / "work" / "out")
    assert [len(row.response.split()) for row in chosen] == longest


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


@pytest.mark.parametrize("path", ["README.md", "docs/index.md", "docs/recipes.md"])
def test_recipes_in_the_docs_parse(path):
    recipes = [yaml.safe_load(one) for one in blocks((ROOT / path).read_text(), "yaml")]
    recipes = [one for one in recipes if isinstance(one, dict) and "steps" in one]
    assert recipes
    for recipe in recipes:
        parse_recipe(recipe, path)


def test_shipped_recipes_parse():
    found = sorted((ROOT / "recipes").glob("*.yaml"))
    assert found
    for path in found:
        parse_recipe(yaml.safe_load(path.read_text()), path.name)


def test_the_table_of_methods_is_complete():
    text = (ROOT / "README.md").read_text()
    for entry in methods():
        assert f"| `{entry.verb} {entry.name}` |" in text
