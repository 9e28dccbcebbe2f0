"""Every merge method that mergekit also has, element by element beside it on the same tensors.

    python bench/parity_mergekit.py [--quick] [--peer-python PATH]

First the methods, as they stand here. Both merge random models (a base and models a small step from
it) in bfloat16 and float32. mergekit runs three times: in float64, which is the exact result of its
formula and bounds ours; in float32 with its output rounded to the models' dtype, as we work; and as
shipped, in the models' dtype. Distances are in units in the last place (ulp) of the largest of the
inputs at that element, in the models' dtype.
mergekit is given our order of equal elements and our random draws; rescaling of random choices,
where the formulas differ on purpose, is off. Where a choice is discrete (a sign, a threshold), a
rounding may turn it, and a small share may then be further away.

Then whole merges by mergekit's YAML (`_parity_yaml.py`), ours in the compatibility mode, which
rounds where mergekit rounds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import _parity_vocabulary
import _parity_yaml
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from deltaloom.core.registry import get
from deltaloom.merge._kernels import GROUP, draw
from deltaloom.merge._rules import _key

DTYPES = ("bfloat16", "float32")
MODELS = 5
STEP = 0.02
FAR = 4
"""The model whose step is 1: slerp takes a straight line between models that are near."""
SEED = 0
BEYOND = {"bfloat16": 1.0, "float32": 4.0}
"""Distances in ulp that count as the same."""
TURNED = 1e-3
"""Largest share of elements that a turned choice may put further away."""
TIED = 5e-3
"""The same for sce: variances of bfloat16 models are often equal, and float64 tells them apart by
its rounding."""

# name -> our method and settings, mergekit's method and parameters (lists are per input, the base
# first where there is one), models merged, whether the base is among mergekit's inputs, and
# the share of elements that may be further away
JOBS: dict[str, tuple] = {
    "linear": ("average", {"weights": [1, 2]}, "linear", {"weight": [1, 2]}, [1, 2], False, 0.0),
    "task_arithmetic": (
        "task_arithmetic", {"weights": [0.5, 0.7]},
        "task_arithmetic", {"weight": [0, 0.5, 0.7]}, [1, 2], True, 0.0,
    ),
    "ties": (
        "ties", {"density": 0.4}, "ties", {"density": 0.4, "weight": 1.0}, [1, 2, 3], True, TURNED,
    ),
    "dare_linear": (
        "dare_linear", {"density": 0.4, "rescale": False},
        "dare_linear", {"density": 0.4, "weight": 1.0, "rescale": False}, [1, 2], True, TURNED,
    ),
    "dare_ties": (
        "dare_ties", {"density": 0.4, "rescale": False},
        "dare_ties", {"density": 0.4, "weight": 1.0, "rescale": False}, [1, 2, 3], True, TURNED,
    ),
    "breadcrumbs": (
        "breadcrumbs", {"density": 0.6, "gamma": 0.1},
        "breadcrumbs", {"density": 0.6, "gamma": 0.1, "weight": 1.0}, [1, 2], True, TURNED,
    ),
    "breadcrumbs_ties": (
        "breadcrumbs_ties", {}, "breadcrumbs_ties", {"density": 0.9, "weight": 1.0},
        [1, 2, 3], True, TURNED,
    ),
    "della": (
        "della", {"rescale": False},
        "della", {"density": 0.5, "weight": 1.0, "rescale": False}, [1, 2, 3], True, TURNED,
    ),
    "della_linear": (
        "della_linear", {"density": 0.4, "epsilon": 0.3, "rescale": False}, "della_linear",
        {"density": 0.4, "epsilon": 0.3, "weight": 1.0, "rescale": False}, [1, 2], True, TURNED,
    ),
    "slerp": ("slerp", {"t": 0.3}, "slerp", {"t": 0.3}, [FAR], True, 0.0),
    "slerp of near models": ("slerp", {"t": 0.3}, "slerp", {"t": 0.3}, [3], True, 0.0),
    "nuslerp": (
        "nuslerp", {"weights": [1, 3]}, "nuslerp", {"weight": [1, 3]}, [1, 2], False, 0.0,
    ),
    "nuslerp of changes by row": (
        "nuslerp", {"weights": [1, 3], "origin": "base", "row_wise": True},
        "nuslerp", {"weight": [0, 1, 3], "nuslerp_flatten": False}, [1, 2], True, 0.0,
    ),
    "multislerp": (
        "multislerp", {"weights": [1, 2, 3]}, "multislerp", {"weight": [1, 2, 3]},
        [1, 2, 3], False, 0.0,
    ),
    "multislerp of changes": (
        "multislerp", {"weights": [1, 2, 3], "origin": "base"},
        "multislerp", {"weight": [0, 1, 2, 3]}, [1, 2, 3], True, 0.0,
    ),
    "karcher": ("karcher", {}, "karcher", {}, [1, 2, 3], False, 0.0),
    "model_stock": ("model_stock", {}, "model_stock", {}, [1, 2, 3], True, 0.0),
    "model_stock by row": (
        "model_stock", {"filter_wise": True}, "model_stock", {"filter_wise": True},
        [1, 2, 3], True, 0.0,
    ),
    "sce": ("sce", {"density": 0.3}, "sce", {"select_topk": 0.3}, [1, 2, 3], True, TIED),
    "nearswap": ("nearswap", {"t": 0.01}, "nearswap", {"t": 0.01}, [2], True, 0.0),
    "arcee_fusion": ("arcee_fusion", {}, "arcee_fusion", {}, [2], True, TURNED),
    "passthrough": (
        "passthrough", {"scale": 0.7}, "passthrough", {"scale": 0.7}, [2], False, 0.0,
    ),
}  # fmt: skip


def shapes(quick: bool) -> dict[str, tuple[int, ...]]:
    """A matrix, an embedding, a vector."""
    side = 64 if quick else 512
    return {
        "w.weight": (side, 3 * side // 4),
        "model.embed_tokens.weight": (2 * side, side // 2),
        "norm.weight": (side,),
    }


def make_models(folder: Path, quick: bool) -> None:
    """The models of every dtype, as folders of ours and as files for the peer.

    Changes share a part, as those of models tuned alike do: model stock needs acute angles.
    """
    for dtype in DTYPES:
        generator = torch.Generator().manual_seed(SEED)
        base, shared = (
            {n: torch.randn(s, generator=generator) for n, s in shapes(quick).items()}
            for _ in range(2)
        )
        for i in range(MODELS):
            tensors = {}
            for name, start in base.items():
                own = shared[name] + torch.randn(start.shape, generator=generator)
                tensors[name] = (start + (1.0 if i == FAR else STEP * (i > 0)) * own).to(
                    getattr(torch, dtype)
                )
            save_file(tensors, folder / f"{dtype}-{i}.safetensors")
            path = folder / f"{dtype}-{i}"
            path.mkdir()
            save_file(tensors, path / "model.safetensors", {"format": "pt"})


def draws(name: str, count: int) -> torch.Tensor:
    """Our random numbers (models, count) in [0, 1) for a tensor, as float64."""
    rows = []
    for place in range(MODELS - 1):
        words = np.empty((4, GROUP), np.uint64)
        parts = []
        for group in range(-(-count // (4 * GROUP))):
            draw(group, *_key(SEED, name, place), words)
            parts.append(words.ravel().copy())
        rows.append(np.concatenate(parts)[:count].astype(np.float64) / 2**32)
    return torch.from_numpy(np.stack(rows))


def peer(folder: Path, python: str, quick: bool) -> dict[str, torch.Tensor]:
    """mergekit's results by job, dtype of the models, dtype inside, and tensor."""
    jobs = [
        {
            "name": name,
            "method": method,
            "parameters": parameters,
            "places": [0, *places] if base else places,
            "base": 0 if base else None,
        }
        for name, (_, _, method, parameters, places, base, _) in JOBS.items()
    ]
    plan = {"jobs": jobs, "dtypes": DTYPES, "models": MODELS}
    (folder / "jobs.json").write_text(json.dumps(plan))
    tensors = {name: draws(name, int(np.prod(s))) for name, s in shapes(quick).items()}
    save_file(tensors, folder / "draws.safetensors")
    script = str(Path(__file__).with_name("_parity_peer.py"))
    subprocess.run([python, script, str(folder)], check=True)
    return load_file(folder / "theirs.safetensors")


def ours(folder: Path, name: str, dtype: str) -> dict[str, torch.Tensor]:
    """Our result of one job."""
    preset, settings, _, _, places, *_ = JOBS[name]
    method = get("merge", preset).make({**settings, "threads": 1})
    paths = [folder / f"{dtype}-{i}" for i in range(MODELS)]
    out = folder / "out" / dtype / name.replace(" ", "-")
    out.parent.mkdir(parents=True, exist_ok=True)
    method.merge_folders(paths[0], [paths[i] for i in places], out, seed=SEED)
    return load_file(out / "model.safetensors")


def ulp(folder: Path, dtype: str, places: list[int]) -> dict[str, torch.Tensor]:
    """The unit in the last place of the largest input, by tensor and element, float64."""
    models = [load_file(folder / f"{dtype}-{i}.safetensors") for i in (0, *places)]
    eps = torch.finfo(getattr(torch, dtype)).eps
    largest = {n: torch.stack([m[n].double().abs() for m in models]).amax(0) for n in models[0]}
    return {n: eps * 2 ** size.clamp(min=1e-30).log2().floor() for n, size in largest.items()}


def row(name: str, value: float, bound: float | None, unit: str) -> dict[str, object]:
    """One result; it holds when it is at most `bound`."""
    holds = bound is None or value <= bound
    return {"name": name, "value": round(value, 6), "bound": bound, "holds": holds, "unit": unit}


def compare(folder: Path, theirs: dict[str, torch.Tensor]) -> list[dict[str, object]]:
    """Rows for every job and dtype."""
    results = []
    print("ulp from mergekit in float64: ours (largest, rms), mergekit as shipped (largest, rms);")
    print("share of elements in which ours and mergekit in float32 are not equal")
    print()
    for dtype in DTYPES:
        for name, (*_, places, _, most) in JOBS.items():
            unit = ulp(folder, dtype, places)
            mine = ours(folder, name, dtype)

            def distances(inside: str, other=None, mine=mine, name=name, dtype=dtype, unit=unit):
                parts = []
                for tensor, one in (other or mine).items():
                    wanted = theirs[f"{name}/{dtype}/{inside}/{tensor}"].double()
                    parts.append(((one.double() - wanted).abs() / unit[tensor]).flatten())
                return torch.cat(parts)

            shipped = {t: theirs[f"{name}/{dtype}/{dtype}/{t}"] for t in mine}
            away, theirs_away = distances("float64"), distances("float64", shipped)
            unequal = (distances("float32") > 0).double().mean().item()
            share = (away > BEYOND[dtype]).double().mean().item()
            errors = [
                f"{one.max().item():9.3g} {one.square().mean().sqrt().item():8.3g}"
                for one in (away, theirs_away)
            ]
            print(f"    {name:26s} {dtype:9s} {errors[0]}   {errors[1]}   {unequal:8.2%}")
            beyond = f"{name}, {dtype}: beyond {BEYOND[dtype]:g} ulp of mergekit in float64"
            results.append(row(beyond, share, most, "share"))
    return results


def whole_files(home: Path, python: str, quick: bool) -> list[dict[str, object]]:
    """Rows for merges by whole YAML files in the compatibility mode."""
    jobs = _parity_yaml.jobs(quick)
    _parity_yaml.make_models(home)
    _parity_yaml.peer(home, python, jobs)
    print()
    print("by YAML, in the compatibility mode: share of elements not equal to the bit, share more")
    print("than 1 ulp away, largest distance in ulp")
    print()
    results = []
    for name, unequal, beyond, worst in _parity_yaml.compare(home, jobs):
        print(f"    {name:45s} {unequal:9.4%} {beyond:9.4%} {worst:9.3g}")
        results.append(row(f"by YAML, {name}: not equal to the bit", unequal, 0.0, "share"))
    for name, unequal in _parity_vocabulary.compare(home / "words", python, quick):
        print(f"    {name:57s} {unequal:9.4%}")
        results.append(row(f"by YAML, {name}: not equal to the bit", unequal, 0.0, "share"))
    return results


def main() -> None:
    """Make the models, merge on both sides, compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small tensors")
    parser.add_argument("--peer-python", help="interpreter with mergekit 0.1.5")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    if options.peer_python and Path(options.peer_python).exists():
        with tempfile.TemporaryDirectory(prefix="bench-parity-") as place:
            folder = Path(place)
            make_models(folder, options.quick)
            results = compare(folder, peer(folder, options.peer_python, options.quick))
            results += whole_files(folder / "files", options.peer_python, options.quick)
    else:
        print("no --peer-python with mergekit: nothing is compared")
    print(json.dumps({"bench": "parity_mergekit", "results": results}))


if __name__ == "__main__":
    main()
