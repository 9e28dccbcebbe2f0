"""Where images of scenes come from: drawn here, written by the model, a pipeline, a server, files.

Every image is a PNG file `images/ID.png` in the run's folder, written whole; what is there is not
made again. A scene without an image has a sentence that says why.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from deltaloom.core.atomic import write_bytes
from deltaloom.core.errors import InputError
from deltaloom.core.progress import progress
from deltaloom.core.spec import digest
from deltaloom.engine.endpoint import Endpoint, EndpointChat, Unreadable
from deltaloom.measure._drawing import draw, laid_out, parse_drawing
from deltaloom.measure._png import encode_png
from deltaloom.measure._scenes import Scene, Vocabulary

if TYPE_CHECKING:
    from deltaloom.core.run import Run
    from deltaloom.engine.chat import Chat, Reply

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
ASK = """Draw a scene on a grid of four columns, A to D from left to right, and four rows, 1 to 4 \
from top to bottom. Write one line for each object: the cell, a colon, and words for what is there.
objects: {object}
colors: {color}
shapes: {shape}
sizes: {size}
textures: {texture}
A style is a line of its own, one of: {style}.

Scene: An image in sepia style of two red houses and a tiny glass tree. The houses are \
above the tree.
style: sepia
A1: red house
B1: red house
A3: tiny glass tree

Scene: {prompt}
"""
"""What a language model is asked when it is to draw in words."""


class Pictures(Protocol):
    """A source of images."""

    def make(
        self, scenes: Sequence[Scene], prompts: Mapping[str, str], folder: Path, run: Run
    ) -> dict[str, str]:
        """Put an image of every scene into `folder`; gives back why one is missing, by id."""
        ...


class Renderer:
    """The scene drawn as it is: what every question wants is there."""

    def make(
        self, scenes: Sequence[Scene], prompts: Mapping[str, str], folder: Path, run: Run
    ) -> dict[str, str]:
        """Draw every scene."""
        missing = {}
        for scene in scenes:
            picture = laid_out(scene)
            if picture is None:
                missing[scene.id] = "the scene has no layout"
            else:
                write_bytes(folder / f"{scene.id}.png", encode_png(draw(picture)))
        return missing


@dataclass
class Words:
    """A language model that writes what is in which cell (`parse_drawing`); drawn here."""

    chat: Chat
    words: Vocabulary
    max_new_tokens: int

    def make(
        self, scenes: Sequence[Scene], prompts: Mapping[str, str], folder: Path, run: Run
    ) -> dict[str, str]:
        """Ask for every scene and draw what can be read; unreadable lines draw nothing."""
        listed = {name: ", ".join(found) for name, found in self.words.items()}
        talks = [
            [{"role": "user", "content": ASK.format(prompt=prompts[one.id], **listed)}]
            for one in scenes
        ]
        with progress("conceptmix drawings", len(talks)) as advance:
            replies = self.chat.replies(
                talks, max_new_tokens=self.max_new_tokens, on_reply=lambda *_: advance(1)
            )
        self.chat.spend(run, replies)
        missing, texts = {}, {}
        for scene, reply in zip(scenes, replies, strict=True):
            if reply.text is None:
                missing[scene.id] = reply.failure or "no answer"
                continue
            # A model without an end of its own goes on with a scene of its own.
            texts[scene.id] = reply.text.split("\nScene:")[0]
            picture = parse_drawing(texts[scene.id], self.words)
            write_bytes(folder / f"{scene.id}.png", encode_png(draw(picture)))
        lines = [json.dumps({"id": k, "drawing": v}, ensure_ascii=False) for k, v in texts.items()]
        write_bytes(folder.parent / "drawings.jsonl", "".join(f"{x}\n" for x in lines).encode())
        return missing


@dataclass
class Pipeline:
    """A text-to-image pipeline of diffusers."""

    source: str
    steps: int | None

    def make(
        self, scenes: Sequence[Scene], prompts: Mapping[str, str], folder: Path, run: Run
    ) -> dict[str, str]:
        """Sample one image for each prompt; its noise is decided by the run's seed and its id."""
        left = [one for one in scenes if not (folder / f"{one.id}.png").exists()]
        pipeline = self._load() if left else None
        with progress("conceptmix images", len(left)) as advance:
            for scene in left:
                image = self._image(pipeline, prompts[scene.id], f"{run.seed} {scene.id}")
                scratch = folder / f".{scene.id}.png"
                image.convert("RGB").save(scratch, format="PNG")
                scratch.rename(folder / f"{scene.id}.png")
                advance(1)
        return {}

    def _load(self) -> Any:
        try:
            import torch
            from diffusers import DiffusionPipeline  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise InputError(
                "images=pipeline needs diffusers: pip install 'deltaloom[images]'"
            ) from None
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            pipeline = DiffusionPipeline.from_pretrained(self.source, use_safetensors=True)
        except (OSError, ValueError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{self.source}: the pipeline does not load ({first})") from None
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(device)

    def _image(self, pipeline: Any, prompt: str, name: str) -> Any:
        import torch

        generator = torch.Generator("cpu").manual_seed(int(digest(name)[:15], 16))
        steps = {} if self.steps is None else {"num_inference_steps": self.steps}
        return pipeline(prompt=prompt, generator=generator, **steps).images[0]


@dataclass
class Server:
    """An OpenAI-compatible `/images/generations` address that answers with base64."""

    endpoint: Endpoint

    def make(
        self, scenes: Sequence[Scene], prompts: Mapping[str, str], folder: Path, run: Run
    ) -> dict[str, str]:
        """Ask for every image that is not there."""
        client, missing = EndpointChat(self.endpoint), dict[str, str]()
        left = [one for one in scenes if not (folder / f"{one.id}.png").exists()]
        bodies = [self._body(prompts[one.id]) for one in left]
        calls = [partial(client.ask, body, "/images/generations", _image_in) for body in bodies]
        with progress("conceptmix images", len(left)) as advance:

            def arrived(i: int, reply: Reply) -> None:
                name = left[i].id
                if reply.text is None:
                    missing[name] = reply.failure or "no answer"
                else:
                    write_bytes(folder / f"{name}.png", base64.b64decode(reply.text))
                run.spend(endpoint_calls=1.0)
                advance(1)

            client.ask_all(calls, arrived)
        return missing

    def _body(self, prompt: str) -> dict[str, Any]:
        model = self.endpoint.model
        return {"model": model, "prompt": prompt, "n": 1, "response_format": "b64_json"}


@dataclass
class Files:
    """Images made elsewhere, called by the scenes' ids."""

    source: Path

    def make(
        self, scenes: Sequence[Scene], prompts: Mapping[str, str], folder: Path, run: Run
    ) -> dict[str, str]:
        """Copy what is there; InputError where nothing is."""
        if not self.source.is_dir():
            raise InputError(f"{self.source}: no such folder of images")
        missing = {}
        for scene in scenes:
            found = [self.source / f"{scene.id}{suffix}" for suffix in SUFFIXES]
            path = next((one for one in found if one.is_file()), None)
            if path is None:
                missing[scene.id] = f"{self.source} has no {scene.id}.png"
            else:
                # Kept under one name; graders look at the bytes, not at the suffix.
                write_bytes(folder / f"{scene.id}.png", path.read_bytes())
        if len(missing) == len(scenes):
            raise InputError(
                f"{self.source} has no image of any scene; call them {scenes[0].id}.png and so on "
                "(prompts.jsonl of the run has the ids)"
            )
        return missing


def _image_in(answer: bytes) -> Reply:
    """A Reply whose text is the image in base64."""
    from deltaloom.engine.chat import Reply

    try:
        document = json.loads(answer)
    except ValueError:
        raise Unreadable(f"the answer is no whole JSON ({len(answer)} bytes)") from None
    try:
        text = document["data"][0]["b64_json"]
        base64.b64decode(text, validate=True)
    except (KeyError, IndexError, TypeError, binascii.Error):
        raise Unreadable("the answer holds no image in base64 (data[0].b64_json)") from None
    return Reply(text)
