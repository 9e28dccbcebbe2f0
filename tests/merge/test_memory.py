"""A memory budget is kept whatever the method and the model's size, or refused before the work."""

import json
import subprocess
import sys
import tracemalloc

import folders
import pytest
import torch
from safetensors.torch import save_file
from test_compat import SETTINGS as COMPATIBLE
from test_compat import SHARED, rule_of

from deltaloom.core.errors import InputError
from deltaloom.core.registry import get
from deltaloom.core.sizes import parse_bytes
from deltaloom.core.tensors import TensorFolder
from deltaloom.merge._dialect import dialects
from deltaloom.merge._stream import merge_folders
from deltaloom.merge._streaming import Streaming

ROWS, COLUMNS = 1500, 512
"""Three megabytes of float32, and so well above what the blocks may take."""
SLACK = 400_000
"""Python objects: headers, names, the pool of threads."""
BUDGET = 6_000_000
STREAMING = [
    "average", "task_arithmetic", "ties", "dare_ties", "breadcrumbs", "della", "della_linear",
    "sce", "slerp", "nuslerp", "multislerp", "karcher", "model_stock", "nearswap", "arcee_fusion",
    "passthrough",
]  # fmt: skip
SETTINGS = {"sce": {"density": 0.5}, "nuslerp": {"row_wise": True}}
TWO = ("slerp", "nuslerp", "nearswap", "arcee_fusion")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and three models of one large tensor and a few small ones, in a few types."""
    home = tmp_path_factory.mktemp("models")
    shapes = {"large.weight": (ROWS, COLUMNS), "norm.weight": (COLUMNS,), "wide.weight": (70, 900)}
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(4):
        one = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        made.append({**one, "large.weight": one["large.weight"].bfloat16()})
        made[-1]["wide.weight"] = one["wide.weight"].double()
    return folders.write(home, made)


@pytest.fixture(scope="module")
def adapter(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    key = "base_model.model.large"
    a, b = torch.randn(16, COLUMNS), torch.randn(ROWS, 16)
    save_file(
        {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 16}))
    return folder


def peak(method, base, deltas, out):
    """Bytes that numpy and Python had allocated at most while the merge ran."""
    tracemalloc.start()
    method.merge_folders(base, deltas, out)
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found


def content(folder):
    return (folder / "model.safetensors").read_bytes()


def of(name, **more):
    return get("merge", name).make({**SETTINGS.get(name, {}), **more})


def test_every_streaming_method_is_here():
    from deltaloom.core.registry import methods

    whole = {"tsv", "iso_c"}
    known = {entry.name for entry in methods("merge") if issubclass(entry.load(), Streaming)}
    assert known - whole - {"dare_linear", "breadcrumbs_ties"} == {*STREAMING}


@pytest.mark.parametrize("name", STREAMING)
def test_what_is_allocated_stays_within_the_budget(tmp_path, models, name):
    base, *deltas = models
    deltas = deltas[:2] if name in TWO else deltas
    of(name).merge_folders(base, deltas, tmp_path / "free")  # compiles, and imports
    limited = of(name, memory=BUDGET)
    assert peak(limited, base, deltas, tmp_path / "out") <= BUDGET + SLACK
    assert content(tmp_path / "out") == content(tmp_path / "free")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", sorted(dialects()))
def test_so_it_does_where_steps_are_rounded_as_mergekits(tmp_path, models, method, dtype):
    base, *deltas = models
    each = COMPATIBLE.get(method, [{}] * 3)
    rule, *_ = rule_of(method, dtype, each, **SHARED.get(method, {}))
    deltas, budget = deltas[: len(each)], 200_000_000 if method == "karcher" else BUDGET
    merge_folders(base, deltas, rule, tmp_path / "free")  # compiles, and imports
    tracemalloc.start()
    merge_folders(base, deltas, rule, tmp_path / "out", memory=budget, threads=1)
    assert tracemalloc.get_traced_memory()[1] <= budget + SLACK
    tracemalloc.stop()
    assert content(tmp_path / "out") == content(tmp_path / "free")


def test_a_narrow_first_block_stays_within_the_budget_too(tmp_path):
    """The first is cut where the file has a round position, and the next is wider."""
    made = [{"large.weight": torch.randn(1500, 512).bfloat16()} for _ in range(7)]
    base, *deltas = folders.write(tmp_path, made)
    of("average").merge_folders(base, deltas, tmp_path / "free")
    assert peak(of("average", memory=BUDGET), base, deltas, tmp_path / "out") <= BUDGET + SLACK


def test_adapters_factors_count(tmp_path, models, adapter):
    base, one, *_ = models
    of("ties").merge_folders(base, [adapter, one], tmp_path / "free")
    limited = of("ties", memory=BUDGET)
    assert peak(limited, base, [adapter, one], tmp_path / "out") <= BUDGET + SLACK
    assert content(tmp_path / "out") == content(tmp_path / "free")


@pytest.mark.parametrize("name", ["tsv", "della"])
def test_what_stays_together_is_refused_by_name_before_anything_is_written(tmp_path, models, name):
    base, *deltas = models
    needed = (
        "'large.weight' of which no part" if name == "tsv" else "'wide.weight' of which no part"
    )
    small = 60_000 if name == "della" else BUDGET
    with pytest.raises(InputError, match=f"tensor {needed} can be merged alone takes"):
        of(name, memory=small).merge_folders(base, deltas, tmp_path / "out")
    assert [*tmp_path.iterdir()] == []


def test_the_bytes_that_a_refusal_names_are_enough(tmp_path, models):
    base, *deltas = models
    with pytest.raises(InputError) as caught:
        of("ties", memory=1000).merge_folders(base, deltas, tmp_path / "out")
    of("ties").merge_folders(base, deltas, tmp_path / "free")  # compiles, and imports
    named = int(str(caught.value).split("takes ")[1].split(" bytes")[0].replace(",", ""))
    limited = of("ties", memory=named)
    assert peak(limited, base, deltas, tmp_path / "out") <= named + SLACK


CHILD = """
import resource, sys
from deltaloom.core.registry import get
warm, base, one, two, out = sys.argv[1:]
made = get("merge", "ties").make({"memory": "8M"})
made.merge_folders(warm, [warm, warm], out + "-warm")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
made.merge_folders(base, [one, two], out)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_the_process_grows_by_no_more_than_the_budget(tmp_path, models):
    large = torch.randn(3000, 4000)  # 48 MB
    places = folders.write(tmp_path / "large", [{"w.weight": large + i} for i in range(3)])
    words = [str(models[0]), *map(str, places), str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *words], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) <= 8_000_000 + 4_000_000
    assert TensorFolder(tmp_path / "out").nbytes == 48_000_000


@pytest.mark.parametrize(
    ("text", "number"), [("256M", 256_000_000), ("1.5g", 1_500_000_000), ("7", 7), ("2KB", 2000)]
)
def test_sizes_as_people_write_them(text, number):
    assert parse_bytes(text) == number
    assert get("merge", "ties").make({"memory": text}).memory == number  # pyright: ignore


@pytest.mark.parametrize("text", ["lots", "5X", "0", "-1M"])
def test_no_sizes(text):
    with pytest.raises(InputError, match="memory"):
        get("merge", "ties").make({"memory": text})


def test_mergekits_command_takes_it_as_a_flag(tmp_path, models):
    from deltaloom.cli.main import app

    base, one, two, _ = models
    config = tmp_path / "c.yml"
    listed = "".join(f"  - {{model: {path}, parameters: {{weight: 1}}}}\n" for path in (one, two))
    config.write_text(f"merge_method: ties\nbase_model: {base}\nmodels:\n{listed}")
    for words, name in (([], "free"), (["--max-memory", "6M"], "limited")):
        app(["mergekit", str(config), str(tmp_path / name), *words], standalone_mode=False)
    assert content(tmp_path / "free") == content(tmp_path / "limited")
    with pytest.raises(InputError, match=r"tensor 'wide.weight' takes 294,912 bytes"):
        app(
            ["mergekit", str(config), str(tmp_path / "no"), "--max-memory", "1K"],
            standalone_mode=False,
        )
    assert not (tmp_path / "no").exists()
