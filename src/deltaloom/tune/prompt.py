"""Tune virtual tokens before a frozen model: soft prompts and prefixes, begun well (SPoT).

Paper: Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning" (arXiv
2104.08691); prefixes from Li and Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for
Generation" (arXiv 2101.00190); `library` from Vu et al. 2022, "SPoT: Better Frozen Model Adaptation
through Soft Prompt Transfer" (arXiv 2110.07904).

A soft prompt P (k, d) stands before the embedded input: only P is trained, on log p(y | P, x). A
prefix stands before the keys and values of every layer instead. SPoT: the task's prompt p after a
few steps is compared with each source's s, cos(mean_i p_i, mean_j s_j) or the mean over i, j of
cos(p_i, s_j); training begins from the nearest source, or from sum_s a_s s over the nearest, with
a_s their similarities over their sum.

Differs: AdamW and a schedule where Lester et al. take Adafactor at a constant rate. A prefix is
trained itself, begun from the keys and values of real tokens; the paper trains an MLP that makes
it. SPoT's source is compared by its final prompt, as that is what a folder holds; the paper takes
an early checkpoint. For the best of several sources the paper tunes from each and keeps the best on
development data; here the one of least loss on the rows, before tuning, is taken. Sources that are
not similar (cosine below 0) have no weight in the mean.

Not covered: the prefix's MLP; mixtures of source tasks tuned as one; ensembles of prompts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, final

from pydantic import BeforeValidator, Field, model_validator

from deltaloom.core.delta import Delta, load
from deltaloom.core.errors import InputError
from deltaloom.core.method import Evaluation, Sizes, Work
from deltaloom.core.places import PLACE
from deltaloom.tune._gradient import Count, GradientTuner, Positive, rows_for, train

if TYPE_CHECKING:
    from torch import Tensor

    from deltaloom.core.base import Base
    from deltaloom.core.examples import Examples
    from deltaloom.core.run import Run
    from deltaloom.tune._spot import Retrieved

KINDS = {"prompt": "PROMPT_TUNING", "prefix": "PREFIX_TUNING"}
"""PEFT's names."""
LR = {"prompt": 3e-2, "prefix": 1e-2}
"""Of PEFT's examples of prompt tuning and of prefix tuning, with AdamW."""
BEGINNINGS = ("text", "labels", "start", "library")
"""Settings of which one at most may be given."""


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Names = Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1)]


@final
class PromptTuning(GradientTuner):
    """Prompt and prefix tuning; the result is a PEFT adapter folder."""

    form: Literal["prompt", "prefix"] = "prompt"
    """`prompt` puts virtual tokens before the input, `prefix` before every layer's keys and
    values."""
    lr: Positive | None = None
    """Peak learning rate. None takes that of PEFT's examples: 3e-2 for a prompt, 1e-2 for a
    prefix."""
    virtual_tokens: Count = 20
    """Length k (Lester et al., section 3.2: beyond 20 the gains are marginal)."""
    common: Count = 5000
    """A prompt begins as random tokens out of the vocabulary's first so many that are not special
    (Lester et al.: the 5,000 most common; vocabularies are sorted so, more or less)."""
    text: str | None = None
    """Begin as this text's tokens, repeated or cut to the length (as PEFT does)."""
    labels: Names | None = None
    """Begin as these class labels, a label of several tokens as their mean, and the rest as random
    tokens (Lester et al.'s best)."""
    start: Annotated[str | None, PLACE] = None
    """Begin as the prompt in this folder, of the same base, form and length."""
    library: Annotated[Names | None, PLACE] = None
    """Begin as SPoT finds in these folders: prompts, or folders that hold prompts. Tune sources and
    target with one seed, as the beginning shows in what a prompt becomes."""
    embedding_steps: Count = 100
    """Optimizer steps, at a constant rate, to the prompt by which sources are found (ours; SPoT
    takes 10,000 of 262,144)."""
    similarity: Literal["average", "token"] = "average"
    """Cosine of the prompts' averages, or the average cosine of their tokens."""
    retrieve: Literal["best", "mean"] = "best"
    """Of the nearest sources, the one of least loss or the mean weighted by similarity."""
    top: Count = 1
    """How many sources are nearest."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        given = [name for name in BEGINNINGS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are two beginnings; keep one")
        if len(self.labels or ()) > self.virtual_tokens:
            raise ValueError(
                f"virtual_tokens = {self.virtual_tokens} is too short for {len(self.labels or ())} "
                "labels"
            )
        if self.form == "prefix" and self.gradient_checkpointing:
            raise ValueError(
                "gradient_checkpointing would lose a prefix, which is held in the cache that it "
                "turns off; use micro_batch to save memory"
            )
        return self

    def work(self, sizes: Sizes) -> Work:
        """The base with longer rows; the prompt itself is small."""
        row = sizes.row_tokens + self.virtual_tokens
        trial = self.embedding_steps * min(self.batch_size, sizes.rows) if self.library else 0
        return Work(
            adapter_tokens=(self.epochs * sizes.rows + trial) * row,
            memory_bytes=sizes.weight_bytes,
        )

    def tune(
        self, base: Base, data: Examples, run: Run, *, evaluation: Evaluation | None = None
    ) -> Delta:
        """Tune `base`; writes an adapter folder to `run.folder` and returns its Prompt."""
        from deltaloom.tune.lora import save_adapter

        if not len(data):
            raise InputError(f"{data.name}: holds no rows to tune on")
        room = base.max_length - self.virtual_tokens
        if room < 2:
            raise InputError(
                f"virtual_tokens = {self.virtual_tokens} leave no room for rows in the context of "
                f"{base.max_length} tokens"
            )
        fitting = self.model_copy(update={"max_length": min(self.max_length or room, room)})
        prompt = fitting.beginning(base, data, run)
        model = self.attach(base, run.seed, prompt)
        settings = self.train_settings(self.lr or LR[self.form], trainable="adapter")
        model = train(model, base, data, run, fitting, settings, evaluation)
        result = run.work / "result"
        save_adapter(model, result, base, "prompt")
        run.publish(result)
        return load(run.folder, base)

    def attach(self, base: Base, seed: int, prompt: Tensor | None = None) -> Any:
        """`base` loaded, with `prompt` (k, d), or with what `seed` and the settings begin with.

        Raises InputError for a prompt that does not fit the base.
        """
        import torch
        from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
        from transformers import set_seed

        set_seed(seed)
        model: Any = base.load()
        if prompt is None:
            prompt = self._tokens(model, base.tokenizer(), seed)
            if self.form == "prefix":
                prompt = _keys_and_values(model, prompt)
        config = {"prompt": PromptTuningConfig, "prefix": PrefixTuningConfig}[self.form](
            task_type="CAUSAL_LM", num_virtual_tokens=self.virtual_tokens
        )
        model = get_peft_model(model, config)
        weight = prompt_of(model)
        if weight.shape != prompt.shape:
            raise InputError(
                f"the prompt to begin with is {prompt.shape[1]} wide, one for {base.model} is "
                f"{weight.shape[1]}; take one that was tuned from this base"
            )
        with torch.no_grad():
            weight.copy_(prompt)
        return model.train()

    def beginning(self, base: Base, data: Examples, run: Run) -> Tensor | None:
        """The prompt that `start` or `library` says; None where the settings alone decide."""
        from deltaloom.tune import _spot

        kind = KINDS[self.form]
        if self.start is not None:
            return _spot.read_prompt("start", self.start, base, kind, self.virtual_tokens)
        if self.library is None:
            return None
        sources = _spot.read_library(self.library, base, kind, self.virtual_tokens)
        found = _spot.kept(
            run.work / "retrieved", lambda: self._retrieved(base, data, run, sources)
        )
        run.note(retrieved=found.record)
        return found.prompt

    def _tokens(self, model: Any, tokenizer: Any, seed: int) -> Tensor:
        """Embeddings (k, h) of the text, of the labels and random tokens, or of those alone."""
        import torch

        length, embed = self.virtual_tokens, model.get_input_embeddings()

        def rows(ids: list[int]) -> Tensor:
            with torch.no_grad():
                return embed(torch.tensor(ids, device=embed.weight.device)).float()

        if self.text is not None:
            ids = _ids(self.text, tokenizer, "text")
            return rows((ids * (length // len(ids) + 1))[:length])
        special = {*tokenizer.all_special_ids}
        size = min(len(tokenizer), embed.num_embeddings)
        known = [token for token in range(size) if token not in special][: self.common]
        labels = [rows(_ids(one, tokenizer, "labels")).mean(0) for one in self.labels or ()]
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(len(known), (length,), generator=generator).tolist()
        tokens = rows([known[i] for i in drawn])
        for place, label in enumerate(labels):
            tokens[place] = label
        return tokens

    def _retrieved(
        self, base: Base, data: Examples, run: Run, sources: dict[str, Tensor]
    ) -> Retrieved:
        """Tune a few steps on the rows, and begin from the sources that are like the outcome."""
        from math import ceil

        import torch

        from deltaloom.engine.forward import padding_token
        from deltaloom.engine.train import fit
        from deltaloom.tune import _spot

        tokenizer: Any = base.tokenizer()
        pad = padding_token(tokenizer)
        rows = rows_for(base, tokenizer, data, self.max_length, run)
        model = self.attach(base, run.seed)
        weight = prompt_of(model)
        for name, source in sources.items():
            if source.shape != weight.shape:
                raise InputError(
                    f"library: {name} is of another base; take prompts of {base.model}"
                )
        batches = ceil(len(rows) / self.batch_size)
        settings = self.train_settings(
            self.lr or LR[self.form],
            trainable="adapter",
            schedule="constant_with_warmup",
            # Half a step less, so that rounding up gives these very steps.
            epochs=(self.embedding_steps - 0.5) / batches,
        )
        fit(model, rows, pad, settings, run, folder="embedding")
        task = weight.detach().cpu().clone()
        model.eval()

        def loss(prompt: Tensor) -> float:
            with torch.no_grad():
                weight.copy_(prompt)
            return _loss(model, rows, pad, run)

        return _spot.retrieve(
            task, sources, by=self.similarity, how=self.retrieve, top=self.top, loss=loss
        )


def prompt_of(model: Any) -> Tensor:
    """The trained parameter (k, d) of a model with a prompt or prefix."""
    return model.prompt_encoder[model.active_adapter].embedding.weight


def _ids(text: str, tokenizer: Any, key: str) -> list[int]:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise InputError(f"{key}: {text!r} has no tokens")
    return ids


def _keys_and_values(model: Any, tokens: Tensor) -> Tensor:
    """What every layer keeps of the embedded `tokens` (k, h), as PEFT lays out a prefix (k, d)."""
    import torch
    from peft.tuners.cartridge.utils import prompt_embeddings_from_past_key_values

    with torch.no_grad():
        found = model(inputs_embeds=tokens[None].to(model.dtype), use_cache=True)
    cache = found["cache"] if "cache" in found else found["past_key_values"]
    return prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=len(tokens)).float()


def _loss(model: Any, rows: list[Any], pad_id: int, run: Run) -> float:
    """Mean cross-entropy of all response tokens."""
    from deltaloom.engine.forward import token_logprobs
    from deltaloom.engine.meter import count_forward

    found = token_logprobs(model, [(row.input_ids, row.response_mask) for row in rows], pad_id)
    count_forward(run, model, sum(len(row.input_ids) for row in rows))
    return -sum(float(one.sum()) for one in found) / sum(len(one) for one in found)
