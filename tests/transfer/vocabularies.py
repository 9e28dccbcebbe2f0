"""Small tokenizers of unlike kinds over the same words, and models that have them."""

from pathlib import Path

import torch

WORDS = "the cat sat on a mat and then cats ate at the mat's end"


def byte_level(folder: Path, merges: list[tuple[str, str]], **roles) -> Path:
    """Byte-level BPE with every byte and some merges; `Ġ` is a space."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = list(dict.fromkeys(roles.values()))
    tokens = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += ["".join(pair) for pair in merges]
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=inner, **roles).save_pretrained(folder)
    return folder


def sentence_piece(folder: Path, pieces: list[str], **roles) -> Path:
    """Unigram with `▁` for spaces and byte fallbacks."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<unk>", *(one for one in roles.values() if one != "<unk>")]
    tokens = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    scored = [(token, -float(len(tokens) - len(token))) for token in tokens]
    inner = Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=True))
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", **roles)
    tokenizer.save_pretrained(folder)
    return folder


def model(folder: Path, *, seed: int = 0, tied: bool = True, hidden: int = 16, **config) -> Path:
    """A random Llama for the tokenizer that is in the folder."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    settings = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **config,
    )
    LlamaForCausalLM(settings).save_pretrained(folder)
    return folder


OLD = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("a", "t"), ("Ġ", "m"), ("c", "at")]


def old(folder: Path, **how) -> Path:
    """A byte-level model."""
    byte_level(folder, OLD, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    return model(folder, **how)


def new(folder: Path, **how) -> Path:
    """A SentencePiece model: other alphabet, other specials, some of the same tokens."""
    pieces = ["▁the", "at", "▁m", "▁", "t", "h", "e", "a", "▁mat", "cats", "é"]
    sentence_piece(folder, pieces, bos_token="<begin>", eos_token="<end>")
    return model(folder, **how)
