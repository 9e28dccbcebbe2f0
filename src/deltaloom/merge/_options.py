"""The flags of mergekit-yaml that change nothing here, and why; sizes as it writes them."""

from __future__ import annotations

SWITCHES = {
    "allow-crimes": "tensors must have equal names and shapes, whatever the architectures",
    "trust-remote-code": "no code of a model is run",
    "cuda": "the merge streams on the CPU",
    "low-cpu-memory": "memory does not grow with the models",
    "lazy-unpickle": "pickles are never read",
    "read-to-gpu": "the merge streams on the CPU",
    "multi-gpu": "the merge streams on the CPU",
    "gpu-rich": "the merge streams on the CPU",
    "async-write": "tensors are always written as they are merged",
    "clone-tensors": "a tensor may be used any number of times",
    "write-model-card": "no card is written; mergekit_config.yml is",
    "safe-serialization": "the output is always safetensors",
    "unsafe-truncate-embeddings": "tokenizer brings vocabularies together; rows are never cut",
}
VALUES = {
    "transformers-cache": "the hub's own cache is used (HF_HOME)",
    "lora-merge-cache": "adapters are merged as they stream",
    "lora-merge-dtype": "adapters are merged in float32",
    "device": "the merge streams on the CPU",
    "write-threads": "tensors are always written as they are merged",
}
"""The same with a value."""
UNITS = {"": 1, "K": 1000, "M": 1000**2, "B": 1000**3, "G": 1000**3}


def size(text: str) -> int:
    """Bytes, from text such as 500M or 5B; raises ValueError."""
    number, unit = text.rstrip("kKmMbBgG"), text[-1:].upper() if text[-1:].isalpha() else ""
    try:
        found = int(float(number) * UNITS[unit])
    except (ValueError, KeyError):
        found = 0
    if found < 1:
        raise ValueError(f"{text!r} is no size such as 500M or 5B")
    return found
