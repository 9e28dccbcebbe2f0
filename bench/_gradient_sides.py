"""One batch of per-example gradient features, made in each way, in turn with the plain floor.

    python bench/_gradient_sides.py [--dtype float32|bfloat16] [--device D] [--repeats N]

Prints one JSON object: for each side its seconds and the floor's beside them. Sides whose package
is missing are left out. `gradients.py` runs it and says what the figures mean.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from deltaloom.core.encoding import Encoded
from deltaloom.engine.gradients import TOKENS, per_example, sketched
from deltaloom.engine.preconditioning import Adam
from deltaloom.engine.projection import projection
from deltaloom.engine.train import collate

LENGTH = 128
"""Tokens of every row, all of them labelled."""
DIMENSION = 1024
INTERVAL = 16
"""Gradients that LESS stacks before it projects them."""
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
PER_MODULE = 4
"""Side of bergson's per-module images: 4 x 4 for each of 56 modules, 896 numbers in all."""

Side = Callable[[], "Tensor | None"]
"""Makes the batch's features (b, dim); the floor makes none."""


class Task:
    """A small Llama with LoRA on every linear layer, one batch of rows, and Adam's moments."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=256,
            num_hidden_layers=4,
            intermediate_size=688,
            vocab_size=4096,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=False,
        )
        lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
        self.model = get_peft_model(LlamaForCausalLM(config).to(dtype), lora).to(device).eval()
        self.model.to(dtype)  # as the product's pass has adapters: PEFT makes them float32
        self.device = device
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        with torch.no_grad():  # as after some training: B is zero at first, and A's gradient then
            for parameter in self.trained.values():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        self.size = sum(p.numel() for p in self.trained.values())
        count = TOKENS["cpu" if device.type == "cpu" else "other"] // LENGTH
        ids = torch.randint(0, config.vocab_size, (count, LENGTH)).tolist()
        self.rows = [Encoded(str(i), row, [1] * LENGTH) for i, row in enumerate(ids)]
        self.batch = {k: v.to(device) for k, v in collate(self.rows, 0).items()}
        exact = copy.deepcopy(self.model).float()
        self.whole = torch.cat([found for _, found in per_example(exact, self.rows, 0)])
        # What Adam's moments are averages of.
        self.m, self.v = self.named(self.whole.mean(0)), self.named(self.whole.square().mean(0))

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """(D,) as one tensor per parameter."""
        parts = flat.cpu().split([p.numel() for p in self.trained.values()])
        found = zip(self.trained.items(), parts, strict=True)
        return {name: part.view(parameter.shape) for (name, parameter), part in found}

    def flat(self, values: dict[str, Tensor]) -> Tensor:
        """(D,) of one tensor per parameter."""
        return torch.cat([values[name].flatten() for name in self.trained]).to(self.device)


def floor(task: Task) -> Side:
    """What training would take: the batch's mean loss forward and backward."""

    def side() -> None:
        task.model(**task.batch, use_cache=False).loss.backward()
        for parameter in task.trained.values():
            parameter.grad = None

    return side


def ours(task: Task) -> Side:
    """Adam's steps of all rows, sketched."""
    sketch = projection("sparse", DIMENSION, 0)
    adam = Adam(task.m, task.v, BETA1, BETA2, EPS)

    def side() -> Tensor:
        found = sketched(task.model, task.rows, 0, sketch, precondition=adam)
        return torch.cat([features for _, features in found])

    return side


def less(task: Task, project: Callable[[Tensor], Tensor]) -> Side:
    """LESS's procedure: rows one by one, Adam's step of the flat gradient, 16 projected at once."""
    m, v = task.flat(task.m), task.flat(task.v)
    ones = [
        {key: value[i : i + 1] for key, value in task.batch.items()} for i in range(len(task.rows))
    ]

    def side() -> Tensor:
        features, stack = [], []
        for one in ones:
            task.model(**one, use_cache=False).loss.backward()
            g = torch.cat([parameter.grad.flatten() for parameter in task.trained.values()]).float()
            for parameter in task.trained.values():
                parameter.grad = None
            first, second = BETA1 * m + (1 - BETA1) * g, BETA2 * v + (1 - BETA2) * g**2
            stack.append(first / torch.sqrt(second + EPS))
            if len(stack) == INTERVAL:
                features.append(project(torch.stack(stack).half()))
                stack = []
        return torch.cat(features)

    return side


def less_cached(task: Task) -> Side:
    """The same with the dense sign matrix kept: 640 MB at this size."""
    signs = torch.randint(0, 2, (task.size, DIMENSION), device=task.device).float() * 2 - 1
    return less(task, lambda stack: stack.float() @ signs)


def less_shipped(task: Task) -> Side:
    """The same with traker's projector that makes its matrix anew each time, as LESS without CUDA.

    In float32, where the authors have float16: CPUs multiply that slowly.
    """
    from trak.projectors import BasicProjector, ProjectionType

    projector = BasicProjector(
        task.size, DIMENSION, 0, ProjectionType.rademacher, task.device, 128, torch.float32
    )
    return less(task, lambda stack: projector.project(stack, model_id=0))


def trak(task: Task) -> Side:
    """`TRAKer.featurize` of the plain gradients, batched by vmap, with the same projector."""
    from trak import TRAKer
    from trak.modelout_functions import AbstractModelOutput
    from trak.projectors import BasicProjector, ProjectionType

    class Output(AbstractModelOutput):
        def __init__(self) -> None:
            pass

        @staticmethod
        def get_output(model, weights, buffers, ids, labels):
            logits = torch.func.functional_call(
                model, (weights, buffers), (), {"input_ids": ids[None], "use_cache": False}
            ).logits
            return torch.nn.functional.cross_entropy(logits[0, :-1].float(), labels[1:])

        @staticmethod
        def get_out_to_loss_grad(model, weights, buffers, batch):
            return torch.ones(len(batch[0]), 1)

    folder = tempfile.TemporaryDirectory()
    count, visits = len(task.rows), 200
    tracer = TRAKer(
        task.model,
        Output(),
        train_set_size=visits * count,
        save_dir=folder.name,
        device=str(task.device),
        projector=BasicProjector(
            task.size, DIMENSION, 0, ProjectionType.rademacher, task.device, 128, torch.float32
        ),
        grad_wrt=list(task.trained),
        use_half_precision=False,
        logging_level=logging.ERROR,
    )
    tracer.load_checkpoint(task.model.state_dict(), model_id=0)

    def side() -> Tensor:
        _ = folder  # lives as long as the side
        last = tracer._last_ind
        tracer.featurize((task.batch["input_ids"], task.batch["labels"]), num_samples=count)
        return torch.as_tensor(tracer.saver.current_store["grads"][last : last + count]).clone()

    return side


def bergson(task: Task, target: str, dimension: int) -> Side:
    """bergson's collector of the plain gradients, set up as its worker does, kept in memory."""
    from bergson.collector.collector import CollectorComputer
    from bergson.collector.in_memory_collector import InMemoryCollector
    from bergson.config.config import IndexConfig
    from bergson.gradients import GradientProcessor
    from bergson.utils.peft import detect_peft_modules
    from datasets import Dataset

    logging.disable(logging.INFO)
    folder = tempfile.TemporaryDirectory()
    config = IndexConfig(
        run_path=f"{folder.name}/run",
        projection_dim=dimension,
        projection_target=target,
        loss_reduction="mean",
    )
    config.partial_run_path.mkdir()
    data = Dataset.from_dict({"input_ids": [row.input_ids for row in task.rows]})
    processor = GradientProcessor(projection_dim=dimension, projection_target=target)
    modules = detect_peft_modules(task.model)
    embeddings = task.model.get_input_embeddings()

    def side() -> Tensor:
        _ = folder
        task.model.requires_grad_(False)
        embeddings.requires_grad_(True)
        collector = InMemoryCollector(
            model=task.model.base_model,
            data=data,
            cfg=config,
            processor=processor,
            target_modules=modules,
        )
        computer = CollectorComputer(
            task.model, data, collector=collector, batches=[list(range(len(data)))], cfg=config
        )
        computer.run_with_collector_hooks()
        embeddings.requires_grad_(False)
        for parameter in task.trained.values():
            parameter.requires_grad_(True)
        return torch.cat([part.flatten(1) for part in collector.gradients.values()], dim=1)

    return side


def sides(task: Task) -> dict[str, tuple[Side, bool]]:
    """Name -> the side and whether its features are Adam's; the plain gradient's otherwise."""
    found = {"ours": (ours(task), True), "LESS, matrix kept": (less_cached(task), True)}
    if importlib.util.find_spec("trak"):
        found["LESS as shipped"] = less_shipped(task), True
        if task.model.dtype != torch.float32:
            single = Task(torch.float32, task.device)
            found["LESS as shipped, float32"] = less_shipped(single), True
        if task.model.dtype == torch.float32:
            found["traker"] = trak(task), False
    if importlib.util.find_spec("bergson") and task.model.dtype == torch.float32:
        found["bergson, global"] = bergson(task, "global", DIMENSION), False
        found["bergson, per module"] = bergson(task, "per_module", PER_MODULE), False
    return found


def cosines(features: Tensor) -> Tensor:
    """(b, d) -> every pair's cosine."""
    unit = torch.nn.functional.normalize(features.double().cpu(), dim=1)
    above = torch.triu_indices(len(unit), len(unit), 1)
    return (unit @ unit.T)[above[0], above[1]]


def errors(task: Task, found: dict[str, tuple[Side, bool]]) -> dict[str, float]:
    """Side -> root mean square error of the rows' cosines, against the unprojected gradients."""
    m, v, g = task.flat(task.m), task.flat(task.v), task.whole
    steps = (BETA1 * m + (1 - BETA1) * g) / (BETA2 * v + (1 - BETA2) * g**2 + EPS).sqrt()
    exact = {True: cosines(steps), False: cosines(g)}
    return {
        name: float((cosines(side()) - exact[adam]).square().mean().sqrt())
        for name, (side, adam) in found.items()
    }


def seconds(side: Side, device: torch.device) -> float:
    """CPU seconds of one call; on a GPU, wall seconds until it is done."""
    if device.type == "cpu":
        before = time.process_time()
        side()
        return time.process_time() - before
    torch.cuda.synchronize()
    before = time.perf_counter()
    side()
    torch.cuda.synchronize()
    return time.perf_counter() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    task = Task(getattr(torch, options.dtype), torch.device(options.device))
    plain, found = floor(task), sides(task)
    plain()
    wrong = errors(task, found)  # also a warm-up of every side
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
    for visit in range(options.repeats):
        for name, (side, _) in found.items():
            # The tightest claim is ours, and it is quick: looked at more often.
            for again in range(4 if name == "ours" else 1):
                pair = [seconds(one, task.device) for one in _turn([plain, side], visit + again)]
                times[name].append(tuple(_turn(pair, visit + again)))
    print(json.dumps({"rows": len(task.rows), "size": task.size, "errors": wrong, "times": times}))


def _turn(pair: list, number: int) -> list:
    """The pair, at odd numbers the other way round."""
    return pair[::-1] if number % 2 else pair


if __name__ == "__main__":
    main()
