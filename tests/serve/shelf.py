"""A tiny base and a delta of every kind for the tests of serving, and what each answers alone."""

import warnings

import torch
from tiny import WORDS, base_in

from deltaloom.core.base import Base
from deltaloom.core.delta import load
from deltaloom.engine.generate import generate_greedily

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LOW_RANK = {
    "lora": {"target_modules": ALL},
    "wide": {"r": 5, "lora_alpha": 2, "target_modules": ["q_proj", "down_proj"]},
    "rslora": {"r": 3, "use_rslora": True, "rank_pattern": {"v_proj": 1}, "target_modules": ALL},
    "dora": {"use_dora": True, "target_modules": ["v_proj", "up_proj"]},
    "head": {"target_modules": ["lm_head"]},
}
PROMPTS = {"prompt": "PromptTuningConfig", "prefix": "PrefixTuningConfig"}
ALONE = ("whole", "saved", "dense", "sparse")
KINDS = (*LOW_RANK, *PROMPTS, *ALONE)


def shelf_in(folder, kinds=KINDS, **config):
    """A base in `folder/base` and deltas of it in folders of their kind's name."""
    shape = {"max_position_embeddings": 128, "tie_word_embeddings": False}
    base_in(folder / "base", **{**shape, **config})
    base = Base(model=str(folder / "base"))
    for seed, kind in enumerate(kinds):
        _delta_in(folder / kind, kind, base, seed)
    return folder


def _delta_in(folder, kind, base, seed):
    import peft

    generator = torch.Generator().manual_seed(seed)
    model = base.load()
    if kind in ("whole", "dense", "sparse"):
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "layers.1" in name:
                    weight += torch.randn(weight.shape, generator=generator) * 0.2
        if kind == "whole":
            model.save_pretrained(folder)
            base.tokenizer().save_pretrained(folder)
            return
        model.save_pretrained(folder.with_name(f"{kind}-model"))
        delta = load(folder.with_name(f"{kind}-model"), base)
        if kind == "sparse":
            from deltaloom.core.deltas.extraction import extract

            delta = extract(delta, "sparse", density=0.5).delta
        delta.save(folder)
        return
    if kind in PROMPTS:
        settings = getattr(peft, PROMPTS[kind])(num_virtual_tokens=3, task_type="CAUSAL_LM")
    else:
        own = LOW_RANK.get(kind, {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]})
        settings = peft.LoraConfig(**{"r": 2, "lora_alpha": 3, "task_type": "CAUSAL_LM", **own})
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(model, settings)
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                scale = 0.05 if "magnitude" in name else 0.6
                weight += torch.randn(weight.shape, generator=generator) * scale
        model.save_pretrained(folder)


def alone(folder, kind):
    """The model that answers for `kind` when nothing is batched: PEFT's, or the changed base."""
    base = Base(model=str(folder / "base"))
    if kind == "base":
        return base.load()
    if kind == "whole":
        return Base(model=str(folder / kind)).load()
    return load(folder / kind, base).apply(base)


def answers(folder, kind, prompts, new, stop=()):
    """Each prompt's continuation by itself."""
    model, tokenizer = alone(folder, kind), Base(model=str(folder / "base")).tokenizer()
    return [generate_greedily(model, tokenizer, [one], new, stop)[0] for one in prompts]


def texts(count, seed=0):
    """Prompts of unequal length."""
    generator = torch.Generator().manual_seed(seed)
    words = [word for word in WORDS.split() if word.isalpha()]
    lengths = torch.randint(1, 14, (count,), generator=generator).tolist()
    return [
        " ".join(words[k] for k in torch.randint(0, len(words), (n,), generator=generator).tolist())
        for n in lengths
    ]
