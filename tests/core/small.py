"""Small tokenizers and adapters for the tests of core, made on the spot."""

import torch

CORPUS = [
    "ab abc bca cab aab abba the cat sat. on a mat, and the bat sat on the cat.",
    "user assistant system: hello there? yes no.\n\nab ab abab the the cat",
] * 4
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|start|>", "<|sep|>", "<|end|>"]

SEPARATED = (
    "{% for m in messages %}<|start|>{{ m.role }}<|sep|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|sep|>{% endif %}"
)
SEPARATED_MARKED = (
    "{%- for m in messages -%}<|start|>{{ m.role }}<|sep|>{%- if m.role == 'assistant' -%}"
    "{%- generation -%}{{ m.content }}<|end|>{%- endgeneration -%}"
    "{%- else -%}{{ m.content }}<|end|>{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|start|>assistant<|sep|>{%- endif -%}"
)
LINES = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def wrapped(inner, **names):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def byte_level(template=None, **names):
    """Byte-level BPE without a splitting pattern, so that merges cross every border."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(CORPUS, trainer)
    found = wrapped(inner, **{"eos_token": "</s>", "pad_token": "<pad>", **names})
    found.chat_template = template
    return found


def metaspace(eos=False, template=None):
    """As Llama's: a space before every text, `<s>` in front, and `</s>` behind when asked."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    inner.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=SPECIAL, show_progress=False)
    inner.train_from_iterator(CORPUS, trainer)
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if eos else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    found = wrapped(inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    found.chat_template = template
    return found


def word_level(words, eos="</s>"):
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *words])}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrapped(inner, unk_token="<unk>", pad_token="<pad>", eos_token=eos)


def adapter_in(folder, base, seed=0, scale=0.3, **config):
    """A PEFT LoRA adapter with random factors, saved as PEFT saves it."""
    import warnings

    from peft import LoraConfig, get_peft_model

    settings = {"task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 3, "target_modules": ["q_proj"]}
    model = get_peft_model(base.load(), LoraConfig(**{**settings, **config}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def logits(model):
    """What the model says to a fixed batch, (2, 5, V), on the CPU."""
    ids = torch.tensor([[1, 4, 7, 9, 11], [1, 20, 3, 5, 22]])
    with torch.no_grad():
        return model(input_ids=ids.to(next(model.parameters()).device)).logits.cpu()
