"""One token a word: the tokenizer of the lab's models, with a chat template that marks answers."""

from typing import TYPE_CHECKING

from deltaloom.lab import corpus, tasks, world

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
SPECIAL = (PAD, BOS, EOS, UNKNOWN, *ROLES)

# The generation markers tell trainers which tokens are the assistant's own.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ ' <|assistant|> ' }}"
    "{% generation %}{{ message['content'].strip() + ' ' + eos_token }}{% endgeneration %}"
    "{% else %}"
    "{{ ' <|' + message['role'] + '|> ' + message['content'].strip() }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ' <|assistant|> ' }}{% endif %}"
)


def vocabulary() -> list[str]:
    """Every token in the order of its id: special, then pretraining words, then task words."""
    known = _words(world.texts() + corpus.texts())
    return [*SPECIAL, *known, *sorted(set(_words(tasks.texts())) - set(known))]


def _words(texts: list[str]) -> list[str]:
    words = {word for text in texts for word in text.split()}
    return sorted(word for word in words if not word.startswith("{"))


def build_tokenizer() -> "PreTrainedTokenizerFast":
    """The word-level tokenizer, ready to save with `save_pretrained`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate(vocabulary())}
    backend = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B:1",
        special_tokens=[(BOS, ids[BOS])],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        extra_special_tokens=list(ROLES),
        model_max_length=256,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
