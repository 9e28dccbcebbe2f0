"""A hypernetwork, trained on the base with sampled tokenizers, makes rows of pieces' rows.

Paper: Minixhofer et al. 2024, "Zero-Shot Tokenizer Transfer" (NeurIPS, arXiv 2405.07883).

e_new = H(e(piece_1), ..., e(piece_k)), the pieces being the base's own tokens for the new token's
bytes. H is an encoder; it learns to give back the base's rows (identity), and then the base's
cross-entropy on text cut by tokenizers drawn anew for every step, with
near * mean |H(e) - e|^2 / mean |e| over tokens that are one piece. The new tokenizer is never seen.

Tokens that both tokenizers have get rows by H as well, special ones keep theirs.

Differs: pieces come from bytes as the base's tokenizer writes them, which is not made byte-level; a
token of which no piece is known gets the mean row; the text is one pool, whatever its languages.

Not covered: the authors' trained networks; attention between tokens, priors and biases of tokens,
language embeddings; tuning the whole model afterwards (take the result as the base of `tune full`);
moving a tuned relative with the network of its base.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, final

from pydantic import Field

from deltaloom.core.errors import InputError
from deltaloom.core.method import Sizes, Work
from deltaloom.transfer._embeddings import EmbeddingTransferrer

if TYPE_CHECKING:
    from torch import Tensor

    from deltaloom.core.base import Base
    from deltaloom.core.examples import Examples
    from deltaloom.core.run import Run
    from deltaloom.core.vocabulary import Vocabulary
    from deltaloom.transfer._hypernetwork_training import HyperTraining
    from deltaloom.transfer._move import Move

Count = Annotated[int, Field(ge=1)]
Some = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


@final
class Zett(EmbeddingTransferrer):
    """Rows by a network that has learned to make rows for tokenizers it has not seen."""

    needs = frozenset({"data"})
    keeps_shared = False
    trial: ClassVar[dict[str, Any]] = {
        "steps": 6,
        "identity_steps": 3,
        "warmup_steps": 1,
        "sampled_tokens": 300,
        "sampled_from": 8,
        "rows_per_step": 4,
        "row_tokens": 16,
        "layers": 1,
    }

    steps: Count = 200_000
    """Steps of training the network, the identity's among them (the authors' TinyLlama; a model of
    260K parameters does with hundreds)."""
    identity_steps: Some = 10_000
    """First steps, in which the network learns to give back the base's rows (the authors')."""
    identity_lr: Positive = 3e-4
    """Learning rate to which these rise (the authors')."""
    identity_tokens: Count = 16_384
    """Tokens of the base in each of these, at most (the authors')."""
    network_lr: Positive = 6e-5
    """Peak learning rate of the other steps; a tenth is left at the end (the authors')."""
    warmup_steps: Some = 10_000
    """Steps in which it rises (the authors')."""
    rows_per_step: Count = 128
    """Texts in a step (the authors')."""
    row_tokens: Annotated[int, Field(ge=2)] = 128
    """Tokens of each, the sampled tokenizer's, at most (the authors')."""
    sampled_tokens: Annotated[int, Field(ge=256)] = 32_768
    """Tokens of a sampled tokenizer, at most; every single byte is one (the authors')."""
    sampled_from: Count = 2048
    """Texts of which a tokenizer is sampled: those of the last steps (the authors')."""
    noise: Positive = 1e-5
    """Median deviation of the noise on a token's probability (the authors')."""
    noise_spread: Annotated[float, Field(ge=0)] = 4.0
    """Deviation of that deviation's logarithm (the authors')."""
    near: Annotated[float, Field(ge=0)] = 0.5
    """Weight of staying near the base's rows (the authors')."""
    pieces: Count = 7
    """Pieces of a token that are looked at; further ones are cut off (the authors')."""
    layers: Count = 3
    """Layers of the network (the authors')."""
    width: Count | None = None
    """Hidden dimensions of the network; None takes the base's (the authors')."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of the matrix products and of the frozen base; bfloat16 is for GPUs (the authors')."""

    def work(self, sizes: Sizes) -> Work:
        """The others' work and the base's passes; the network's own are not known here."""
        own = super().work(sizes)
        tokens = max(self.steps - self.identity_steps, 0) * self.rows_per_step * self.row_tokens
        return Work(
            forward_tokens=own.forward_tokens,
            adapter_tokens=own.adapter_tokens + float(tokens),
            memory_bytes=own.memory_bytes + sizes.weight_bytes,
            disk_bytes=own.disk_bytes + sizes.weight_bytes,
        )

    def steps_before_healing(self) -> int:
        """The network's."""
        return self.steps

    def rows(self, move: Move, table: Tensor, run: Run, data: Examples | None) -> Tensor:
        """Rows by the network, which is trained when the first table is asked for."""
        from safetensors.torch import load_file, save_file

        from deltaloom.core.atomic import new_file
        from deltaloom.transfer._move import means

        assert data is not None
        home = run.work / "hypernetwork"
        path = home / "rows.safetensors"
        forms = [tuple(form)[: self.pieces] for form in move.pieces]
        known = [place for place, form in enumerate(forms) if form]
        if not path.exists():
            training = self._training(move.source.base, move.source.vocabulary, data, run)
            training.train(run, home)
            made = training.predict([forms[place] for place in known])
            with new_file(path) as temporary:
                save_file({str(number): rows for number, rows in enumerate(made)}, temporary)
            run.note(new_tokens_without_pieces=len(forms) - len(known))
        found = means(table, move.pieces)
        found[known] = load_file(path)["1" if move.output else "0"]
        return found

    def _training(
        self, base: Base, vocabulary: Vocabulary, data: Examples, run: Run
    ) -> HyperTraining:
        import torch

        from deltaloom.transfer._hypernetwork_training import HyperSettings, HyperTraining
        from deltaloom.transfer._sampled_tokenizers import TokenizerSampler
        from deltaloom.transfer.focus import text_of

        texts = [text for row in data if (text := text_of(row)).strip()]
        if not texts:
            raise InputError(
                f"transfer zett: every row of {data.name} is blank; name rows with text in data="
            )
        model = base.load(dtype=self.precision)
        model.requires_grad_(False)
        sampler = TokenizerSampler(
            texts,
            run.seed,
            batch=self.rows_per_step,
            window=-(-self.sampled_from // self.rows_per_step),
            size=self.sampled_tokens,
            length=min(self.row_tokens, base.max_length),
            noise=self.noise,
            spread=self.noise_spread,
            leading_space=leads_with_space(base, vocabulary),
        )
        settings = HyperSettings(
            steps=self.steps,
            identity_steps=min(self.identity_steps, self.steps),
            identity_lr=self.identity_lr,
            identity_tokens=self.identity_tokens,
            lr=self.network_lr,
            warmup_steps=self.warmup_steps,
            near=self.near,
            pieces=self.pieces,
            precision=self.precision,
        )
        with torch.random.fork_rng():
            torch.manual_seed(run.seed)
            return HyperTraining(model, vocabulary, sampler, settings, self.width, self.layers)


def leads_with_space(base: Base, vocabulary: Vocabulary) -> bool:
    """Whether the base's tokenizer puts a space before a text's first word."""
    ids = base.tokenizer()("a", add_special_tokens=False)["input_ids"]
    return b"".join(vocabulary.tokens[number] or b"" for number in ids).startswith(b" ")
