"""LESS's variants and the cheap baselines on the lab; a small model selecting for a larger one.

    python bench/selection.py [--quick] [--seeds N] [--work DIR] [--small FOLDER]

Everything goes through `deltaloom run`. The lab part chooses 5 % of a seed's pool in every way and
tunes the base on each; beside the accuracy it tells which chosen rows help and which harm, from
the lab's own truth. The small model of the lab part is trained here with half the width and depth
(minutes; kept in the work folder). With DELTALOOM_ASSETS, the family part does the same for the
largest of four real story models with the gradients of the smallest.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from deltaloom.core.estimate import Estimate
from deltaloom.lab.files import write_lab

WARMUP = {"epochs": 1, "lr": 1e-3, "r": 8, "alpha": 16, "dropout": 0.0, "batch_size": 16}
"""The quickstart's, chosen on seeds below 20."""
LAB_TUNE = {"method": "lora", "epochs": 8, "lr": 3e-3, "batch_size": 16}
FAMILY_WARMUP = {"r": 8, "alpha": 16, "lr": 3e-3, "epochs": 1, "batch_size": 8, "max_length": 192}
FAMILY_TUNE = {"method": "lora", "lr": 1e-2, "epochs": 3, "batch_size": 8, "max_length": 192}
"""Those of the main job's bench, not chosen again for these models; one warm-up epoch."""
POOL = {"pool": 800, "target": 24, "validation": 4, "test": 200}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed of the lab on a small pool")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--work", type=Path, help="folder to keep and resume the runs in")
    parser.add_argument("--small", type=Path, help="weights of the lab's small model, if made")
    parser.add_argument("--part", choices=("lab", "family"), help="one part only")
    options = parser.parse_args()
    work = (options.work or Path(tempfile.mkdtemp(prefix="deltaloom-selection-"))).resolve()
    results = []
    if options.part != "family":
        results += lab(options, work / "lab")
    if options.part != "lab" and not options.quick and os.environ.get("DELTALOOM_ASSETS"):
        results += family(options, work / "family")
    if options.quick:  # small pools show that it runs, and nothing else
        results = [{**one, "bound": None, "holds": True} for one in results]
    print(json.dumps({"bench": "selection", "results": results}))


def lab(options: argparse.Namespace, work: Path) -> list[dict]:
    """Every arm on the lab, seeds from 20 as in `lab.py`."""
    small = small_model(work, options.small, quick=options.quick)
    seeds = range(20, 20 + (1 if options.quick else options.seeds))
    folders = []
    for seed in seeds:
        files = write_lab(work / f"seed{seed}/lab", seed, "small" if options.quick else "full")
        home = work / f"seed{seed}"
        pool, target = str(files["pool"]), str(files["target-birth"])
        arms = selections(pool, target, small, home, WARMUP)
        steps = [*arms, *tuned(arms, LAB_TUNE)]
        names = [f"tuned-{next(iter(one.values()))['name']}" for one in arms]
        task = str(files["test-birth"])
        steps.append({"measure": {"method": "choice", "name": "measured", "tasks": [task],
                                  "deltas": ["base", *names]}})  # fmt: skip
        run({"base": str(files["base"]), "seed": seed, "steps": steps}, home)
        folders.append(home)
    print_lab(folders)
    return judged(folders, "test-birth", higher=True)


def selections(pool: str, target: str, small: str, home: Path, warmup: dict) -> list[dict]:
    """One select step per arm; those that share a gradient pass share its folder."""

    def less(name: str, features: str, warmup: dict = warmup, **more: object) -> dict:
        kept = str(home / "features" / features)
        return {"method": "less", "name": name, "target": target, "warmup_fraction": 0.1,
                "warmup": warmup, "features": kept, **more}  # fmt: skip

    two = {**warmup, "epochs": 2}
    arms = [
        {"method": "random", "name": "random"},
        {"method": "lexical", "name": "lexical", "target": target},
        {"method": "rds", "name": "rds", "target": target},
        less("less", "own"),
        less("less-round-robin", "own", pick="round_robin"),
        less("less-two-checkpoints", "two", two),
        less("less-last-of-two", "two", two, checkpoints="last"),
        less("less-small-model", "small", proxy=small),
    ]
    return [{"select": {**arm, "pool": pool, "fraction": 0.05}} for arm in arms]


def tuned(arms: list[dict], settings: dict) -> list[dict]:
    """One tune step per select step."""
    names = [one["select"]["name"] for one in arms]
    return [{"tune": {**settings, "name": f"tuned-{name}", "data": name}} for name in names]


def small_model(work: Path, weights: Path | None, *, quick: bool) -> str:
    """A folder with a lab model of half the width and depth, trained on the lab's corpus."""
    from safetensors.torch import load_file
    from transformers import LlamaForCausalLM

    from deltaloom.lab.pretrain import model_config, pretrain
    from deltaloom.lab.tokenizer import build_tokenizer

    folder = work / "small"
    if not (folder / "config.json").exists():
        if weights is None:
            texts = {"texts": 200} if quick else {}
            weights = pretrain(work / "small-weights", **texts, hidden=64, layers=2)
        model = LlamaForCausalLM(model_config(64, 2))
        model.load_state_dict({k: v.float() for k, v in load_file(weights).items()})
        build_tokenizer().save_pretrained(folder)
        model.save_pretrained(folder)
    return str(folder)


def family(options: argparse.Namespace, work: Path) -> list[dict]:
    """storyfam-S's gradients choose for storyfam-L; targets as in the main job's bench."""
    from _data import build, read_sources

    assets = Path(os.environ["DELTALOOM_ASSETS"]).resolve()
    large, small = (str(assets / "models" / f"storyfam-{size}") for size in "LS")
    sources = read_sources(assets)
    folders = []
    for seed in range(options.seeds):
        home = work / f"seed{seed}"
        build(assets, sources, home / "data", seed, POOL)
        pool, target = (str(home / f"data/{name}.jsonl") for name in ("pool", "target_trec"))
        own = {"method": "less", "pool": pool, "target": target, "fraction": 0.05,
               "warmup_fraction": 0.1, "warmup": FAMILY_WARMUP}  # fmt: skip
        arms = [
            {"select": {"method": "random", "name": "random", "pool": pool, "fraction": 0.05}},
            {"select": {**own, "name": "less"}},
            {"select": {**own, "name": "less-small-model", "proxy": small}},
        ]
        steps = [*arms, *tuned(arms, FAMILY_TUNE)]
        names = [f"tuned-{one['select']['name']}" for one in arms]
        steps.append({"measure": {"method": "loss", "name": "measured", "deltas": names,
                                  "tasks": [str(home / "data/test_trec.jsonl")]}})  # fmt: skip
        run({"base": large, "seed": seed, "steps": steps}, home)
        folders.append(home)
    print("\n## A small model selects for a larger one of its family\n")
    print("| rows | TREC loss, nats per token | by seed | selection CPU s |\n|---|---|---|---|")
    for name in names:
        found = [estimate(folder, name, "test_trec") for folder in folders]
        print(f"| {name} | {interval(found)} | {by_seed(found)} | "
              f"{seconds(folders, name.removeprefix('tuned-')):.0f} |")  # fmt: skip
    return judged(folders, "test_trec", higher=False)


def run(content: dict, home: Path) -> None:
    """`deltaloom run` in a process of its own, one thread, resumed where it stopped."""
    home.mkdir(parents=True, exist_ok=True)
    file = home / "recipe.yaml"
    file.write_text(json.dumps(content, indent=1), encoding="utf-8")  # JSON is YAML
    command = [sys.executable, "-m", "deltaloom", "run", str(file), f"out={home / 'run'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}"
        )


def estimate(home: Path, arm: str, task: str) -> Estimate:
    path = home / "run/measured" / f"{arm}--{task}" / "estimate.json"
    return Estimate.from_json(path.read_text(encoding="utf-8"))


def seconds(folders: list[Path], step: str) -> float:
    """CPU seconds of one step, mean over seeds."""
    ledgers = [json.loads((home / "run" / step / "run.json").read_text()) for home in folders]
    return sum(one["cost"]["cpu_seconds"] for one in ledgers) / len(ledgers)


def over_seeds(values: list[float]) -> Estimate:
    """The mean of one value a seed, with Student's t interval: pools and tests differ by seed."""
    return Estimate.from_items({f"seed {k}": v for k, v in enumerate(values)}, metric="mean")


def interval(found: list[Estimate]) -> str:
    one = found[0] if len(found) == 1 else over_seeds([each.value for each in found])
    return f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]"


def difference(a: list[Estimate], b: list[Estimate]) -> Estimate:
    """a minus b, paired within seeds."""
    return over_seeds([x.value - y.value for x, y in zip(a, b, strict=True)])


def by_seed(found: list[Estimate]) -> str:
    return ", ".join(f"{one.value:.2f}" for one in found)


def shares(folders: list[Path], step: str) -> tuple[float, float]:
    """Shares of the chosen rows that help with the target and that harm, by the lab's truth."""
    helped = harmed = total = 0
    for home in folders:
        truth = {}
        for line in (home / "lab/truth.jsonl").read_text().splitlines():
            found = json.loads(line)
            truth[found["id"]] = found
        for line in (home / "run" / step / "selected.jsonl").read_text().splitlines():
            row = truth[json.loads(line)["id"]]
            helped, harmed = helped + ("birth" in row["helps"]), harmed + row["harmful"]
            total += 1
    return helped / total, harmed / total


def print_lab(folders: list[Path]) -> None:
    """Accuracy by arm, and what each selection took."""
    steps = json.loads((folders[0] / "recipe.yaml").read_text())["steps"]
    arms = [one["select"]["name"] for one in steps if "select" in one]
    print("## The lab\n")
    print("| rows | accuracy | by seed | helpful | harmful | selection CPU s |")
    print("|---|---|---|---|---|---|")
    base = [estimate(home, "base", "test-birth") for home in folders]
    print(f"| none | {interval(base)} | {by_seed(base)} | | | 0 |")
    for arm in arms:
        found = [estimate(home, f"tuned-{arm}", "test-birth") for home in folders]
        help_share, harm_share = shares(folders, arm)
        print(f"| {arm} | {interval(found)} | {by_seed(found)} | {help_share:.2f} | "
              f"{harm_share:.2f} | {seconds(folders, arm):.0f} |")  # fmt: skip


def judged(folders: list[Path], task: str, *, higher: bool) -> list[dict]:
    """Every arm against random rows; the small model's gain as a share of the own model's."""
    if len(folders) < 2:
        return []
    path = folders[0] / "run/measured"
    arms = sorted(p.name.partition("--")[0] for p in path.glob("tuned-*"))
    by_arm = {arm: [estimate(home, arm, task) for home in folders] for arm in arms}
    random = by_arm.pop("tuned-random")
    claims = {"tuned-less"} | ({"tuned-less-small-model"} if not higher else set())
    results, gains = [], {}
    print("\n| difference to random rows | value | 95 % interval |\n|---|---|---|")
    for arm, found in by_arm.items():
        gap = difference(found, random)
        gains[arm] = gap.value
        print(f"| {arm} | {gap.value:+.3f} | [{gap.low:+.3f}, {gap.high:+.3f}] |")
        worst = gap.low if higher else gap.high
        bound = None if arm not in claims else "> 0" if higher else "< 0"
        holds = True if bound is None else worst > 0 if higher else worst < 0
        what = "lower" if higher else "upper"
        results.append({
            "name": f"{arm} minus tuned-random on {task}: {what} end over {len(folders)} seeds",
            "value": round(worst, 4), "bound": bound, "holds": holds,
            "unit": "accuracy" if higher else "nats per token"})  # fmt: skip
    share = gains["tuned-less-small-model"] / gains["tuned-less"]
    bound = None if higher else "> 0.5"
    results.append({"name": f"the small model's gain on {task} over the own model's",
                    "value": round(share, 3), "bound": bound,
                    "holds": bound is None or share > 0.5, "unit": "ratio of means"})  # fmt: skip
    return results


if __name__ == "__main__":
    main()
