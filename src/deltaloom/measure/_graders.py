"""Who answers yes/no questions about images: the exact reader, a vision model, a server."""

from __future__ import annotations

import base64
import io
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from deltaloom.core.errors import InputError
from deltaloom.core.progress import progress
from deltaloom.measure._drawing import read
from deltaloom.measure._png import decode_png
from deltaloom.measure._scenes import Concept

if TYPE_CHECKING:
    from deltaloom.core.base import Base
    from deltaloom.core.run import Run
    from deltaloom.engine.chat import Chat

ANSWER = 'Respond "Yes" or "No".'
"""ConceptMix's request for an answer."""


@dataclass(frozen=True)
class Asked:
    """One question about one image."""

    id: str
    image: Path
    concept: Concept


Answers = list[bool | None]
"""Yes, no, or None where the grader gave no answer."""


class Grader(Protocol):
    """Whoever looks at images."""

    def grade(self, asked: Sequence[Asked], run: Run) -> Answers:
        """An answer to each question, in order."""
        ...


class Exact:
    """Reads the package's own drawings from their pixels; any other image has no answer."""

    def grade(self, asked: Sequence[Asked], run: Run) -> Answers:
        """Exact answers."""
        pictures: dict[Path, Any] = {}
        found: Answers = []
        for one in asked:
            if one.image not in pictures:
                try:
                    image = decode_png(one.image.read_bytes(), one.image)
                except InputError:  # a photograph, say: not ours to read
                    pictures[one.image] = None
                else:
                    pictures[one.image] = read(image)
            picture = pictures[one.image]
            found.append(None if picture is None else picture.answer(one.concept))
        return found


@dataclass
class Noisy:
    """Another grader, with answers turned around at random: a known error rate to find again."""

    grader: Grader
    noise: float

    def grade(self, asked: Sequence[Asked], run: Run) -> Answers:
        """The grader's answers, each turned with probability `noise` by the run's seed."""
        found = self.grader.grade(asked, run)
        turns = [random.Random(f"{run.seed} {one.id}").random() < self.noise for one in asked]
        return [
            None if answer is None else answer != turn
            for answer, turn in zip(found, turns, strict=True)
        ]


@dataclass
class ByServer:
    """A vision model behind a chat endpoint; answers are read from their first word."""

    chat: Chat

    def grade(self, asked: Sequence[Asked], run: Run) -> Answers:
        """Temperature 0, as ConceptMix; what begins with neither yes nor no is no answer."""
        talks = [[{"role": "user", "content": _parts(one)}] for one in asked]
        with progress("conceptmix answers", len(talks)) as advance:
            replies = self.chat.replies(talks, max_new_tokens=8, on_reply=lambda *_: advance(1))
        self.chat.spend(run, replies)
        return [None if one.text is None else yes_or_no(one.text) for one in replies]


class VisionModel:
    """An image-text-to-text model of transformers: whether yes or no is likelier to come next."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self._loaded: tuple[Any, Any, list[int], list[int]] | None = None

    def grade(self, asked: Sequence[Asked], run: Run) -> Answers:
        """One pass an image, with all its questions."""
        by_image: dict[Path, list[int]] = {}
        for number, one in enumerate(asked):
            by_image.setdefault(one.image, []).append(number)
        found: Answers = [None] * len(asked)
        with progress("conceptmix answers", len(asked)) as advance:
            for path, numbers in by_image.items():
                answers = self._look(path, [asked[i].concept.question() for i in numbers], run)
                for number, answer in zip(numbers, answers, strict=True):
                    found[number] = answer
                advance(len(numbers))
        return found

    def _look(self, path: Path, questions: list[str], run: Run) -> list[bool]:
        import torch
        from PIL import Image  # pyright: ignore[reportMissingImports]

        from deltaloom.engine.meter import count_forward

        model, processor, yes, no = self._load()
        with Image.open(io.BytesIO(path.read_bytes())) as file:
            image = file.convert("RGB")
        texts = [self._prompt(processor, f"{question} {ANSWER}") for question in questions]
        inputs = processor(
            text=texts, images=[[image]] * len(texts), padding=True, return_tensors="pt"
        ).to(model.device)
        with torch.inference_mode():
            logits = model(**inputs).logits  # (b, T, V)
        last = logits[:, -1].float().log_softmax(-1)
        count_forward(run, model, int(inputs["attention_mask"].sum()))
        return (last[:, yes].logsumexp(-1) > last[:, no].logsumexp(-1)).tolist()

    def _prompt(self, processor: Any, text: str) -> str:
        if processor.chat_template:
            content = [{"type": "image"}, {"type": "text", "text": text}]
            turn = [{"role": "user", "content": content}]
            return processor.apply_chat_template(turn, add_generation_prompt=True)
        return f"{processor.image_token}\n{text}\n"

    def _load(self) -> tuple[Any, Any, list[int], list[int]]:
        if self._loaded is None:
            self._loaded = self._open()
        return self._loaded

    def _open(self) -> tuple[Any, Any, list[int], list[int]]:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        folder = self.base.folder
        try:
            # Images are read with pillow.
            processor = AutoProcessor.from_pretrained(
                folder, trust_remote_code=self.base.trust_remote_code
            )
            model = AutoModelForImageTextToText.from_pretrained(
                folder,
                dtype=self.base.dtype,
                trust_remote_code=self.base.trust_remote_code,
            )
        except ImportError:
            raise InputError(
                "a vision model needs pillow: pip install 'deltaloom[images]'"
            ) from None
        except (OSError, ValueError, KeyError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{folder}: no vision model loads from it ({first})") from None
        processor.tokenizer.padding_side = "left"
        sides = []
        for words in (("Yes", "yes", " Yes", " yes"), ("No", "no", " No", " no")):
            ids = [
                processor.tokenizer(word, add_special_tokens=False)["input_ids"] for word in words
            ]
            sides.append({one[0] for one in ids if one})
        yes, no = (sorted(side - other) for side, other in (sides, sides[::-1]))
        if not yes or not no:
            raise InputError(f"{folder}: the tokenizer cannot tell yes from no by one token")
        model.to(self.base.resolved_device())  # pyright: ignore[reportArgumentType]
        return model.eval(), processor, yes, no


def yes_or_no(text: str) -> bool | None:
    """What an answer begins with."""
    found = re.match(r"\W*(yes|no)\b", text, re.IGNORECASE)
    return None if found is None else found[1].lower() == "yes"


def _parts(one: Asked) -> list[dict[str, Any]]:
    """An image and a question as parts of a message."""
    data = one.image.read_bytes()
    kind = "png" if data[:4] == b"\x89PNG" else "webp" if data[8:12] == b"WEBP" else "jpeg"
    url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": f"{one.concept.question()} {ANSWER}"},
    ]
