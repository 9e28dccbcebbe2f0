"""Write the world of skills to a folder: a pretrained base, the files that ask, composed texts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaloom.core.atomic import new_folder, write_json, write_text
from deltaloom.lab import skills as world

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PRETRAINING = 28_000
"""Texts of no skill or one that the base reads once; more of them add nothing to the skills' own
rates (measured: .96 of full marks at k = 1)."""
HIDDEN, LAYERS, LR, BLOCK = 96, 3, 4e-3, 48
"""Of the base: 0.4M parameters."""


def write_skill_lab(
    folder: str | Path, seed: int = 0, *, rows: int = 12_000, texts: int = PRETRAINING
) -> dict[str, Path]:
    """Write everything and return the paths by name.

    `base`, a model that knows every skill alone; `skills`, `topics` and `wording` for `measure
    skillmix` and `select skillrich`; `pool`, `rows` composed texts of one, two and three skills,
    one in ten of which lacks one of its skills. `seed` draws weights, texts and pool. What is there
    already is left as it is.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = ("skills", "topics", "wording")
    paths = {name: folder / f"{name}.json" for name in names}
    for name, content in zip(names, contents(), strict=True):
        write_json(paths[name], content)
    paths |= {"pool": folder / "pool.jsonl", "base": folder / "base"}
    pool = world.compose([1, 2, 3], rows, seed, wrong=0.1)
    write_text(paths["pool"], "".join(json.dumps(row) + "\n" for row in pool))
    if not paths["base"].exists():
        with new_folder(paths["base"]) as scratch:
            _pretrained(seed, texts).save_pretrained(scratch)
            tokenizer().save_pretrained(scratch)
    return paths


def contents() -> tuple[Any, Any, Any]:
    """The files of skills, topics and wordings."""
    return world.skill_records(), world.topic_records(), world.wording()


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; no chat template: prompts are control tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate(world.vocabulary())}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", ids["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def _pretrained(seed: int, texts: int) -> Any:
    import torch
    from transformers import LlamaForCausalLM

    from deltaloom.lab.pretrain import fit, model_config, pack

    words = world.vocabulary()
    # Four of five texts show one skill, the fifth shows none.
    rows = world.compose([0, 1, 1, 1, 1], texts, seed + 1)
    said = [row["prompt"] + row["completion"] for row in rows]
    random.Random(seed).shuffle(said)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(model_config(HIDDEN, LAYERS, words))
    fit(model, pack(said, BLOCK, words), epochs=1, lr=LR, seed=seed)
    return model.eval()
