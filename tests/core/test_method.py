"""The registry: a folder read without importing it, and entry points from other packages."""

import json
import subprocess
import sys
import textwrap

import pytest

from deltaloom.core import registry
from deltaloom.core.errors import InputError
from deltaloom.core.method import Method, Work
from deltaloom.core.registry import VERBS, Entry, get, methods, paper_of

HEAD = "from typing import final\nfrom deltaloom.core.method import Selector, Merger\n"


@pytest.fixture
def house(tmp_path, monkeypatch):
    """`house(name, code)` puts a file into the select room of a registry of its own."""
    room = tmp_path / "select"
    room.mkdir()
    monkeypatch.setattr(registry, "PACKAGE_ROOT", tmp_path)
    methods.cache_clear()

    def put(name, code):
        (room / name).write_text(textwrap.dedent(code), encoding="utf-8")
        methods.cache_clear()

    yield put
    methods.cache_clear()


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """`outside(points, code)` installs a package with entry points, as a dist-info folder."""
    made = []

    def install(points, code, name="loomplus"):
        root = tmp_path / f"site-{name}"
        info = root / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(points)
        (root / f"{name}.py").write_text(HEAD + textwrap.dedent(code))
        monkeypatch.syspath_prepend(str(root))
        made.append(name)
        methods.cache_clear()

    yield install
    for name in made:
        sys.modules.pop(name, None)
    methods.cache_clear()


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


# What is in the house.


def test_listing_imports_neither_torch_nor_any_method():
    listed, imported = python(
        "import json, sys; from deltaloom.core.registry import methods;"
        "listed = [[e.verb, e.name] for e in methods()];"
        "heavy = ('torch', 'transformers', 'peft', 'trl', 'datasets', 'numpy');"
        "rooms = tuple(f'deltaloom.{v}.' for v in ('select', 'tune', 'merge', 'measure'));"
        "print(json.dumps([listed, [m for m in sys.modules if m in heavy or m.startswith(rooms)]]))"
    )
    assert imported == []
    assert ["tune", "lora"] in listed
    assert ["select", "less"] in listed


def test_getting_one_imports_one():
    imported = python(
        "import json, sys; from deltaloom.core.registry import get; get('select', 'random').load();"
        "known = {m: m.rpartition('.') for m in sys.modules};"
        "print(json.dumps([m for m, (room, _, name) in known.items() if m == 'torch'"
        " or (room == 'deltaloom.select' and not name.startswith('_'))]))"
    )
    assert imported == ["deltaloom.select.random"]


@pytest.mark.parametrize("entry", methods(), ids=lambda entry: f"{entry.verb}-{entry.name}")
def test_every_entry_says_what_it_is_and_makes_one_final_class(entry):
    assert entry.summary
    assert entry.paper
    made = entry.make()
    assert isinstance(made, Method)
    assert made.verb == entry.verb
    assert type(made).__final__
    assert type(made).__module__ == entry.module
    for key, value in entry.preset.items():
        assert getattr(made, key) == value


def test_names_are_sorted_and_private_files_are_no_methods():
    for verb in VERBS:
        names = [entry.name for entry in methods(verb)]
        assert names == sorted({*names})
        assert not any(name.startswith("_") for name in names)
    assert [*methods()] == [entry for verb in VERBS for entry in methods(verb)]


def test_a_wrong_name_is_answered_with_a_close_one():
    with pytest.raises(InputError, match=r"no tune method 'lorra'; did you mean 'lora'?"):
        get("tune", "lorra")
    with pytest.raises(InputError, match=r"no select method 'zzzz'; known: .*less, .*random"):
        get("select", "zzzz")
    with pytest.raises(InputError, match=r"no verb 'tunes'; did you mean 'tune'?"):
        methods("tunes")


def test_wrong_settings_name_verb_method_and_key():
    with pytest.raises(InputError, match=r"^tune lora: unknown key 'ranc'"):
        get("tune", "lora").make({"ranc": 4})
    with pytest.raises(InputError, match=r"^tune lora: r = 0: .*greater than or equal to 1"):
        get("tune", "lora").make({"r": 0})


# How a file becomes an entry.


def test_summary_and_paper_are_those_of_the_docstring(house):
    house(
        "nearest.py",
        '''
        """Choose the nearest
        rows.

        Paper: Someone 2024, "Near
        and far".

        More.
        """
        ''',
    )
    entry = get("select", "nearest")
    assert entry.summary == "Choose the nearest rows."
    assert entry.paper == 'Someone 2024, "Near and far".'
    assert entry.module == "deltaloom.select.nearest"
    assert paper_of("nothing here") == ""


@pytest.mark.parametrize("annotation", ["", ": dict[str, dict]"])
def test_a_table_gives_one_entry_a_row(house, annotation):
    house(
        "family.py",
        f'''
        """A family."""
        PRESETS{annotation} = {{
            "one": {{"summary": "First", "paper": "P1", "k": 1}},
            "two": {{"summary": "Second", "paper": "P2", "k": 2}},
        }}
        ''',
    )
    assert methods("select") == (
        Entry("select", "one", "First", "P1", "deltaloom.select.family", {"k": 1}),
        Entry("select", "two", "Second", "P2", "deltaloom.select.family", {"k": 2}),
    )


@pytest.mark.parametrize(("classes", "count"), [("", 0), ("class A(Selector): 'a'\n" * 2, 1)])
def test_a_file_defines_exactly_one_method(tmp_path, monkeypatch, classes, count):
    (tmp_path / "loomfile.py").write_text(HEAD + classes + classes.replace("A(", "B("))
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = Entry("select", "x", "", "", "loomfile")
    with pytest.raises(InputError, match=f"must define one method class and defines {count * 2}"):
        entry.load()
    sys.modules.pop("loomfile", None)


# Other packages.

NEAREST = """
    @final
    class Nearest(Selector):
        k: int = 3

        def work(self, sizes):
            return None

        def select(self, pool, run, *, target, base):
            return None

    @final
    class Mean(Merger):
        pass

    number = 5
"""


def test_an_outside_method_joins_through_its_entry_point(outside):
    outside("[deltaloom.select]\nloom_nearest = loomplus:Nearest\n", NEAREST)
    entry = get("select", "loom_nearest")
    assert entry.summary == "from loomplus"
    assert "loomplus" not in sys.modules
    assert entry.make({"k": 5}).k == 5
    with pytest.raises(InputError, match="select loom_nearest: unknown key 'kk'"):
        entry.make({"kk": 5})


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("loomplus:Farthest", "loomplus:Farthest does not import .*remove the package"),
        ("loomminus:Nearest", "loomminus:Nearest does not import .*remove the package"),
        ("loomplus:number", "loomplus:number is no select method"),
        ("loomplus:Mean", "loomplus:Mean is no select method"),
    ],
)
def test_a_broken_entry_point_is_named(outside, value, said):
    outside(f"[deltaloom.select]\nloom_nearest = {value}\n", NEAREST)
    with pytest.raises(InputError, match=f"^select loom_nearest: {said}"):
        get("select", "loom_nearest").make()


def test_a_module_with_a_method_of_another_verb_is_named(outside):
    code = "class Mean(Merger): 'A mean.'\n"
    outside("[deltaloom.select]\nloom_mean = loommean\n", code, name="loommean")
    with pytest.raises(InputError, match=r"^select loom_mean: loommean is no select method"):
        get("select", "loom_mean").load()


def test_an_outside_method_takes_nobodys_name(outside):
    outside("[deltaloom.select]\nrandom = loomplus:Nearest\n", NEAREST)
    with pytest.raises(
        InputError,
        match=r"deltaloom.select.random and loomplus both bring a select method 'random'",
    ):
        get("select", "random")
    assert get("select", "less").name == "less"


def test_work_in_flops():
    work = Work(forward_tokens=1, adapter_tokens=10, full_tokens=100)
    assert work.flops(7) == (2 * 1 + 4 * 10 + 6 * 100) * 7


def test_a_method_without_its_verb_cannot_be_made(outside):
    outside("[deltaloom.merge]\nloom_mean = loomplus:Mean\n", NEAREST)
    with pytest.raises(TypeError, match="abstract"):
        get("merge", "loom_mean").make()
