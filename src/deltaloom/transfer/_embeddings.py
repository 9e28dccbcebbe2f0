"""What moving to another tokenizer has in common: all but the rows of tokens that are new."""

from __future__ import annotations

import shutil
from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from deltaloom.core.delta import Delta, load
from deltaloom.core.errors import InputError
from deltaloom.core.method import Sizes, Work
from deltaloom.core.progress import say
from deltaloom.transfer._healing import Healing

if TYPE_CHECKING:
    from torch import Tensor

    from deltaloom.core.base import Base
    from deltaloom.core.deltas.vocab import Vocab
    from deltaloom.core.examples import Examples
    from deltaloom.core.run import Run
    from deltaloom.transfer._move import Move


TOKENIZER = "tokenizer"
"""Folder of the new tokenizer in the scratch."""


class EmbeddingTransferrer(Healing):
    """Abstract: rows of tokens that both tokenizers have are copied, a method makes the others."""

    uses = frozenset({"data"})
    keeps_shared: ClassVar[bool] = True
    """Whether they are; the method makes those as well if not."""

    @abstractmethod
    def rows(self, move: Move, table: Tensor, run: Run, data: Examples | None) -> Tensor:
        """Rows of `move.new`, float32, (n, d), for one of the base's tables (rows, d)."""

    def work(self, sizes: Sizes) -> Work:
        """The tables twice in float32, at most the whole model; and what healing takes."""
        healing = self.healing_work(sizes)
        memory = 2.0 * sizes.weight_bytes + healing.memory_bytes
        return Work(
            forward_tokens=healing.forward_tokens,
            adapter_tokens=healing.adapter_tokens,
            memory_bytes=memory,
            disk_bytes=2.0 * sizes.weight_bytes + healing.disk_bytes,
        )

    def transfer(
        self,
        base: Base,
        tokenizer: Path,
        run: Run,
        *,
        donor: Base | None = None,
        data: Examples | None = None,
    ) -> Delta:
        """Move `base`; writes a model folder to `run.folder` and returns its Vocab Delta."""
        self.check_data(data)
        made = run.work / "made"
        if not (made / "delta.json").exists():  # the file that is written last
            shutil.rmtree(made, ignore_errors=True)
            try:
                self._make(base, tokenizer, run, donor, data).write_model(made)
            except InputError:
                shutil.rmtree(run.work)  # bad input leaves nothing behind
                raise
        result = self.heal_model(base, made, data, run)
        run.publish(result)
        return load(run.folder, base)

    def _make(
        self, base: Base, tokenizer: Path, run: Run, donor: Base | None, data: Examples | None
    ) -> Vocab:
        from deltaloom.core.deltas.vocab import Vocab
        from deltaloom.core.vocabulary import Vocabulary
        from deltaloom.transfer._move import Move, Side

        source = Side.read(base)
        files = dress(base, tokenizer, run.work / TOKENIZER)
        target = Vocabulary.read(files)
        if "eos" in source.vocabulary.roles and not {"eos", "sep"} & target.roles.keys():
            say(
                f"{tokenizer} names no token that ends a text, so the moved model cannot end one; "
                "name it (eos_token) in the tokenizer_config.json there, if it has one"
            )
        giver = Side.read(donor) if donor is not None else None
        tables: dict[str, Tensor] = {}
        for place, name in enumerate(source.names):
            if place and source.tied:
                tables[name] = tables[source.names[0]].clone()
                continue
            move = Move(source, target, place > 0, giver, self.keeps_shared)
            tables[name] = self._table(move, run, data)
        return Vocab(base, files, tables)

    def _table(self, move: Move, run: Run, data: Examples | None) -> Tensor:
        import torch

        table = move.source.table(move.output)
        # The mean is what numbers without a token get, and special tokens that nobody knows.
        made = table.mean(0).repeat(len(move.target), 1)
        ours = torch.tensor(list(move.shared), dtype=torch.long)
        made[ours] = table[torch.tensor(list(move.shared.values()), dtype=torch.long)]
        known = [number for number in move.shared if move.target.tokens[number] is not None]
        if not move.output:
            new = sum(number not in move.shared for number in move.new)
            run.note(
                tokens=len(move.target),
                shared_tokens=len(known),
                special_tokens_by_role=len(move.shared) - len(known),
                new_tokens=new,
            )
            say(f"{len(known)} tokens are shared, {new} are new")
        if move.new:
            rows = self.rows(move, table, run, data)
            if not torch.isfinite(rows).all():
                raise InputError(
                    f"{move.source.base.model}: the rows made for new tokens are not finite; "
                    "check the embeddings of the base and the donor for NaN and infinity"
                )
            made[torch.tensor(move.new)] = rows
        return made


def dress(base: Base, tokenizer: Path, out: Path) -> Path:
    """Write the new tokenizer to `out`, with the base's chat template where it has one.

    The template's own special tokens are added where they lack, and its end of a turn stays the
    tokenizer's end, as the base has learned to write it.
    """
    from deltaloom.core.vocabulary import Vocabulary, load_tokenizer

    new: Any = load_tokenizer(tokenizer)
    own: Any = load_tokenizer(base.folder, trust_remote_code=base.trust_remote_code)
    template = own.chat_template
    if template:
        text = template if isinstance(template, str) else "".join(template.values())
        special = Vocabulary.of(own, str(base.folder)).special
        written = [one for _, one in sorted(special.items()) if one in text]
        known = new.get_vocab()
        new.add_tokens([one for one in written if one not in known], special_tokens=True)
        if own.eos_token in written:
            new.eos_token = own.eos_token
        new.chat_template = template
    shutil.rmtree(out, ignore_errors=True)
    new.save_pretrained(out)
    return out
