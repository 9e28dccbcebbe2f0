"""Base: a pretrained model and its tokenizer, by hub id or local folder; never mutated."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from deltaloom.core.errors import InputError
from deltaloom.core.spec import Spec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer*", "vocab.*", "*.model", "*.tiktoken")
"""Patterns of the files of which a tokenizer has at least one."""
SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")
"""Patterns of what a model on the hub has beside its weights and its code."""
SAMPLES = 64
"""Places at which the fingerprint reads each weights file."""


class Base(Spec):
    """A pretrained causal language model, or with `labels` a sequence classifier."""

    model: str
    """Hub id or local folder."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the loaded weights; auto keeps the checkpoint's."""
    device: str = "auto"
    """auto takes CUDA when there is one; else cpu, cuda, cuda:1, mps, or balanced for a
    device map over all GPUs."""
    trust_remote_code: bool = False
    """Whether code that comes with the model may run."""
    quantization: Literal["int8", "nf4"] | None = None
    """Hold the weights of linear modules in fewer bits by bitsandbytes: int8 (LLM.int8, Dettmers et
    al. 2022) or nf4 with double quantisation (QLoRA, Dettmers et al. 2023). Only adapters can be
    tuned on it; merging still writes to the weights as they are stored."""
    labels: Annotated[tuple[str, ...], Field(min_length=2)] | None = None
    """Names of the classes of a sequence classifier, in the order of its outputs; a row's answer is
    one of them. None is a causal language model."""

    @property
    def folder(self) -> Path:
        """Local folder of the files; hub models are downloaded once into the hub's cache."""
        return self._fetched(["*.safetensors", *SMALL_FILES])

    @property
    def outline(self) -> Path:
        """As `folder`, but of a hub model config and tokenizer alone are downloaded."""
        return self._fetched(SMALL_FILES)

    def _fetched(self, patterns: Sequence[str]) -> Path:
        path = Path(self.model).expanduser()
        if path.is_dir():
            return path
        if self.model.startswith((".", "/", "~")) or self.model.count("/") > 1:
            raise InputError(f"{self.model}: no such folder; check the path")
        from huggingface_hub import snapshot_download

        code = ["*.py"] if self.trust_remote_code else []
        try:
            return Path(
                snapshot_download(
                    self.model, revision=self.revision, allow_patterns=[*patterns, *code]
                )
            )
        except Exception as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(
                f"{self.model}: neither a local folder nor a reachable hub model ({first})"
            ) from None

    def at_hand(self) -> Path | None:
        """Local folder of the files if no weights need to be downloaded for it, else None."""
        path = Path(self.model).expanduser()
        if path.is_dir():
            return path
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError

        try:
            found = snapshot_download(self.model, revision=self.revision, local_files_only=True)
        except (OSError, HFValidationError):  # not in the hub's cache, or no hub id
            return None
        # a look at the config alone leaves a folder in the cache, too
        return Path(found) if any(Path(found).glob("*.safetensors")) else None

    def check(self) -> None:
        """Raise InputError when config, weights (each shard) or tokenizer files are missing."""
        self._check_model()
        if not any(file for name in TOKENIZER_FILES for file in self.folder.glob(name)):
            raise InputError(
                f"{self.folder} has no tokenizer (no tokenizer.json in it); "
                "save the model's tokenizer there"
            )

    def _check_model(self) -> None:
        from deltaloom.core.tensors import TensorFolder

        TensorFolder(self.folder).close()
        if "quantization_config" in self.config():
            raise InputError(
                f"{self.folder / 'config.json'}: these weights are stored quantised; give the "
                "model they were made from, with quantization: nf4 or int8 if it shall be small"
            )

    def config(self) -> dict[str, Any]:
        """The model's `config.json`."""
        path = self.folder / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            adapter = (self.folder / "adapter_config.json").exists()
            remedy = "it is an adapter; merge it with form=model first" if adapter else ""
            raise InputError(
                f"{self.folder} has no config.json: {remedy or 'not a model folder'}"
            ) from None
        except json.JSONDecodeError as error:
            raise InputError(f"{path} line {error.lineno}: not JSON ({error.msg})") from None
        if not isinstance(config, dict):
            raise InputError(f"{path}: must be an object; copy or download it again")
        return config

    @property
    def max_length(self) -> int:
        """Longest context in tokens that the model was built for."""
        config = self.config()
        text = config.get("text_config", config)
        for key in ("max_position_embeddings", "n_positions", "max_seq_len"):
            if isinstance(text.get(key), int):
                return text[key]
        return 2048

    def fingerprint(self) -> str:
        """Sixteen hex digits naming these weights, equal wherever the same files lie.

        Reads each weights file's size, header and 64 samples of 4 KiB, so it costs the same for
        any model size; files that differ only between the samples share it.
        """
        files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            raise InputError(f"{self.folder} holds no .safetensors file; convert the weights first")
        state = hashlib.sha256()
        for file in files:
            size = file.stat().st_size
            state.update(f"{file.name} {size}\n".encode())
            with open(file, "rb") as handle:
                header = int.from_bytes(handle.read(8), "little")
                state.update(handle.read(min(header, size)))
                for k in range(SAMPLES):
                    handle.seek(size * k // SAMPLES)
                    state.update(handle.read(4096))
        return state.hexdigest()[:16]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, padding on the right, with some pad token set."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                self.folder, trust_remote_code=self.trust_remote_code
            )
        except (OSError, ValueError, KeyError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{self.folder}: the tokenizer does not load ({first})") from None
        if tokenizer.pad_token_id is None:
            # Padding is always masked, so any valid id will do.
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        tokenizer.padding_side = "right"
        return tokenizer

    def load(self, dtype: str | None = None, *, new_head: bool = False) -> PreTrainedModel:
        """The model in evaluation mode, on its device.

        `dtype` overrides the Base's and is for weights that will be changed, which a quantised
        base's cannot be. With `new_head` a classifier's head that the weights lack is
        made at random, for tuning or for an adapter that brings it. Raises InputError for a folder
        that is no whole model, and for weights asked to change that are quantised.
        """
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        self._check_model()
        device = self.resolved_device()
        quantised = self._quantised(device, dtype)
        kind = AutoModelForSequenceClassification if self.labels else AutoModelForCausalLM
        # A head of another number of classes is a RuntimeError.
        unfit = (OSError, ValueError, KeyError, *([RuntimeError] if self.labels else []))
        try:
            loaded: Any = kind.from_pretrained(
                self.folder,
                dtype=dtype or self.dtype,
                trust_remote_code=self.trust_remote_code,
                output_loading_info=True,
                **{"device_map": "balanced" if device == "balanced" else None, **quantised},
                **self._classes(),
            )
        except unfit as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{self.folder}: the model does not load ({first})") from None
        model, found = loaded
        missing = [*found["missing_keys"]]
        if new_head and self.labels:
            missing = [key for key in missing if key.startswith(f"{model.base_model_prefix}.")]
        if missing:
            # transformers would fill them with random numbers and go on.
            raise InputError(
                f"{self.folder}: the weights lack {min(missing)} "
                f"({len(missing)} tensors in all), so this is no whole "
                f"{type(model).__name__}; "
                + ("tune it first" if self.labels else "copy or download the model again")
            )
        if device != "balanced" and not quantised:
            model.to(device)  # pyright: ignore[reportArgumentType]
        return model.eval()

    def _quantised(self, device: str, dtype: str | None) -> dict[str, Any]:
        """What loading needs to be told of `quantization`."""
        if self.quantization is None:
            return {}
        if dtype is not None:
            self.refuse_change()
        if not find_spec("bitsandbytes"):
            raise InputError(
                f"quantization = {self.quantization} needs bitsandbytes: "
                "pip install 'deltaloom[quantized]' (or bitsandbytes)"
            )
        from transformers import BitsAndBytesConfig

        config = BitsAndBytesConfig(
            load_in_8bit=self.quantization == "int8",
            load_in_4bit=self.quantization == "nf4",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
        )
        place = device if device == "balanced" else {"": device}
        return {"quantization_config": config, "device_map": place}

    def refuse_change(self) -> None:
        """Raise InputError where the loaded weights cannot be changed, being quantised."""
        if self.quantization is not None:
            raise InputError(
                f"{self.model}: quantization = {self.quantization} leaves weights that cannot be "
                "changed; tune an adapter (lora, spiel, ...), or leave quantization out"
            )

    def _classes(self) -> dict[str, Any]:
        """What a classifier's config must say."""
        if not self.labels:
            return {}
        # Classifiers of decoders look for the last token that is no padding.
        padding = self.config().get("pad_token_id")
        return {
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: i for i, label in enumerate(self.labels)},
            "problem_type": "single_label_classification",
            "pad_token_id": self.tokenizer().pad_token_id if padding is None else padding,
        }

    def resolved_device(self) -> str:
        """The device name, with auto decided; raises InputError for one that is not there."""
        if self.device == "balanced":
            return self.device
        import torch

        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            first = str(error).splitlines()[0]
            raise InputError(
                f"base.device = {self.device}: cannot be used here ({first}); "
                "leave it out to take what there is"
            ) from None
        return self.device


def _named(value: Any) -> Any:
    return {"model": value} if isinstance(value, str) else value


BaseField = Annotated[Base, BeforeValidator(_named)]
"""A Base in settings: a mapping, or the model's name alone."""
