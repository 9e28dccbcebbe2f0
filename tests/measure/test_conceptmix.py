"""ConceptMix end to end: drawn and graded exactly, noisily, by servers, by real (tiny) models."""

import base64
import json

import numpy as np
import pytest
from chat_server import serving

from deltaloom.core.errors import InputError, WorkError
from deltaloom.core.estimate import Estimate
from deltaloom.core.run import Run
from deltaloom.measure._drawing import draw, laid_out, read, written
from deltaloom.measure._graders import yes_or_no
from deltaloom.measure._pictures import Words
from deltaloom.measure._png import decode_png, encode_png
from deltaloom.measure._scenes import sample_scene, vocabulary
from deltaloom.measure.conceptmix import ConceptMix
from deltaloom.recipe.execute import run_step
from deltaloom.recipe.parsing import parse_step

WORDS = vocabulary("drawn")


def scenes_of(method, seed=0):
    return {one.prompt(): one for one in method._scenes(seed)}


@pytest.fixture
def mixed(tmp_path, rows):
    """Measure without a base; gives the estimates, `conceptmix.json` and the folder."""

    def measured(name="run", model=None, tokenizer=None, **settings):
        method = ConceptMix.parse(settings, "conceptmix")
        with Run.open(tmp_path / name, {"steps": []}, {}, seed=0) as run:
            part = run.part("x--conceptmix")
            found = method.measure(model, tokenizer, rows(), part)
            report = json.loads((part.folder / "conceptmix.json").read_text())
            return found, report, part

    return measured


def test_the_renderer_has_full_marks(mixed):
    found, report, part = mixed(images="renderer", k=[1, 4], n=12)
    assert {name: (one.value, one.n) for name, one in found.items()} == {
        "": (1.0, 24), "k1": (1.0, 12), "k4": (1.0, 12),
    }  # fmt: skip
    assert report["k"]["4"]["concept_fraction"]["n"] == 60
    assert report["grader"] is None  # it cannot err
    asked = [json.loads(line) for line in (part.folder / "prompts.jsonl").read_text().splitlines()]
    assert len(asked[-1]["questions"]) == 5
    assert len(list((part.folder / "images").iterdir())) == 24


@pytest.mark.parametrize("noise", [0.05, 0.2])
def test_a_noisy_graders_noise_is_found(mixed, noise):
    found, report, _ = mixed(images="renderer", k=[1, 2, 3], n=40, noise=noise, audit=80)
    grader = report["grader"]
    for table in (grader["audit"], grader["against_exact"]):
        error = Estimate.from_json(table["error"])
        assert error.low <= noise <= error.high
        assert error.high - error.low < 0.12
    for side in ("sensitivity", "specificity"):
        found_side = grader["audit"][side]
        assert abs(found_side["value"] - (1 - noise)) < 3 * found_side["stderr"]
    assert found[""].high < 1.0  # as the noisy grader says
    fraction = Estimate.from_json(grader["corrected"]["concept_fraction"])
    assert fraction.low <= 1.0 <= fraction.high + 1e-9
    assert report["k"]["1"]["concept_fraction"]["high"] < 1.0
    assert grader["corrected"]["full_marks"]["high"] > 0.97


class Draughtsman:
    """A chat that draws the scene it is asked for, with every k-th object left out."""

    name = "draughtsman"

    def __init__(self, scenes, drop=()):
        self.scenes, self.drop = scenes, drop

    def replies(self, conversations, *, on_reply=None, **_):
        from deltaloom.engine.chat import Reply

        found = []
        for talk in conversations:
            prompt = talk[-1]["content"].strip().rpartition("Scene: ")[2]
            scene = self.scenes[prompt]
            lines = written(laid_out(scene)).split("\n")
            text = "Here it is:\n" + "\n".join(lines if scene.id not in self.drop else [])
            found.append(Reply(text))
        return found

    def spend(self, run, replies):
        return {}


def test_what_a_model_writes_is_drawn(tmp_path):
    scenes = [sample_scene(WORDS, 3, 0, i, lambda s: laid_out(s) is not None) for i in range(6)]
    chat = Draughtsman({one.prompt(): one for one in scenes}, drop={scenes[2].id})
    prompts = {one.id: one.prompt() for one in scenes}
    folder = tmp_path / "images"
    folder.mkdir()
    assert Words(chat, WORDS, 64).make(scenes, prompts, folder, None) == {}
    for scene in scenes:
        found = read(decode_png((folder / f"{scene.id}.png").read_bytes(), scene.id))
        assert all(map(found.answer, scene.concepts)) is (scene is not scenes[2])
    drawn = (tmp_path / "drawings.jsonl").read_text().splitlines()
    assert json.loads(drawn[2])["drawing"] == "Here it is:\n"


def test_an_untrained_model_has_no_marks(mixed, tiny):
    found, report, part = mixed(
        model=tiny.model, tokenizer=tiny.tokenizer, k=[1], n=4, max_new_tokens=8
    )
    assert found[""].value == 0.0
    assert report["categories"]["object"]["value"] == 0.0
    assert (part.folder / "drawings.jsonl").exists()


def painted(scene):
    return base64.b64encode(encode_png(draw(laid_out(scene)))).decode()


def test_images_and_answers_from_servers(mixed):
    """A server that paints and one that looks; faults on both sides are asked again or missing."""
    settings = {"images": "endpoint", "k": [2], "n": 10, "audit": 12}
    scenes = scenes_of(ConceptMix.parse({"images": "renderer", "k": [2], "n": 10}, "c"))
    by_question = {}
    refused = next(iter(scenes))

    def look(messages, body):
        image, question = messages[-1]["content"]
        data = base64.b64decode(image["image_url"]["url"].partition(",")[2])
        picture = read(decode_png(data, "sent"))
        text = question["text"]
        if text.startswith("Is the image in sepia"):
            return "I would rather not say."
        by_question[text] = by_question.get(text, 0) + 1
        return "Yes." if any(picture.answer(c) for c in concepts_of(text)) else "No, it is not."

    with serving(lambda _, body: painted(scenes[body["prompt"]])) as painter, serving(look) as eye:
        fast = {"backoff": 0.01, "timeout": 5}
        settings["source"] = {"url": painter.url, "model": "painter", **fast}
        settings["grader"] = {"url": eye.url, "model": "eye", **fast}
        painter.faults = {refused: [400], list(scenes)[1]: [429, 500]}
        found, report, part = mixed(**settings)
        painted_once = len(painter.bodies)
        silent = sum(
            any(c.question().startswith("Is the image in sepia") for c in one.concepts)
            for prompt, one in scenes.items()
            if prompt != refused
        )
        assert (found[""].value, found[""].missing) == (1.0, 1 + silent)
        assert found[""].n == 9 - silent
        assert painted_once == 12  # ten, and twice again for one of them
        error = report["grader"]["audit"]["error"]
        assert error["value"] == error["low"] == 0.0 < error["high"]
        # What is there is not painted again; the refused one is asked for once more.
        mixed(**settings)
        assert len(painter.bodies) == painted_once + 1
    rows = [json.loads(line) for line in (part.folder / "answers.jsonl").read_text().splitlines()]
    assert next(row for row in rows if row["id"] == scenes[refused].id)["answers"] == [True] * 3


def concepts_of(text):
    """The concepts that a question may be about."""
    from deltaloom.measure._scenes import Concept

    nouns = WORDS["object"]
    made = [Concept("object", noun) for noun in nouns]
    for category in ("color", "number", "shape", "size", "texture"):
        made += [Concept(category, v, (n,)) for v in WORDS[category] for n in nouns]
    made += [Concept("style", v) for v in WORDS["style"]]
    made += [Concept("spatial", v, (a, b)) for v in WORDS["spatial"] for a in nouns for b in nouns]
    return [one for one in made if text.startswith(one.question())]


def test_a_writer_writes_the_prompts(mixed):
    with serving(lambda messages, body: "  A picture,\nas wanted. ") as server:
        server.faults = {}
        _, _, part = mixed(images="renderer", k=[1], n=3, writer={"url": server.url, "model": "w"})
        assert '"color"' in server.bodies[0]["messages"][0]["content"] or len(server.bodies) == 3
    rows = [json.loads(line) for line in (part.folder / "prompts.jsonl").read_text().splitlines()]
    assert {row["prompt"] for row in rows} == {"A picture, as wanted."}


def test_a_folder_of_images(mixed, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    made = list(scenes_of(ConceptMix.parse({"images": "renderer", "k": [2], "n": 4}, "c")).values())
    for one in made[:2]:
        (folder / f"{one.id}.png").write_bytes(encode_png(draw(laid_out(one))))
    other = np.random.default_rng(0).integers(0, 256, (96, 96, 3)).astype(np.uint8)
    (folder / f"{made[2].id}.png").write_bytes(encode_png(other))  # not ours to read
    found, _, part = mixed(images="folder", source=str(folder), k=[2], n=4)
    assert (found[""].value, found[""].n, found[""].missing) == (1.0, 2, 2)
    assert "has no k2-0003.png" in (part.folder / "answers.jsonl").read_text()
    for path in folder.iterdir():
        path.write_bytes(encode_png(other))
    with pytest.raises(WorkError, match=r"no image could be graded"):
        mixed("again", images="folder", source=str(folder), k=[2], n=4)


def test_as_a_step_the_label_is_the_source(tmp_path):
    values = {"method": "conceptmix", "images": "renderer", "k": [1, 2], "n": 3}
    record = run_step(parse_step("measure", values, "step"), tmp_path / "out")
    assert sorted(record["results"]["estimates"]) == [
        "renderer/conceptmix.k1/full_marks",
        "renderer/conceptmix.k2/full_marks",
        "renderer/conceptmix/full_marks",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"images": "pipeline"}, "'source' do not go together"),
        ({"images": "endpoint", "source": "folder"}, "http://host/v1#model"),
        ({"images": "renderer", "noise": 0.7}, "noise"),
        ({"images": "renderer", "concepts": "everyday"}, "'dog' cannot be drawn"),
        ({"images": "folder", "source": "/absent/folder"}, "no such folder of images"),
    ],
)
def test_what_is_refused(settings, message, mixed):
    with pytest.raises(InputError, match=message):
        mixed(k=[1], n=2, **settings)


@pytest.mark.parametrize(
    ("text", "answer"),
    [("Yes", True), (" no.", False), ("**No**", False), ("Yesterday", None), ("", None)],
)
def test_yes_or_no(text, answer):
    assert yes_or_no(text) is answer


def test_a_pipeline_of_diffusers_paints(mixed, tmp_path):
    """Random weights: plumbing, resumption and bytes, not quality."""
    diffusers = pytest.importorskip("diffusers")
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary += [f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz.,"]
    tokenizer = CLIPTokenizer(
        vocab={word: i for i, word in enumerate(vocabulary)}, merges=[], model_max_length=32
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary) + 4, hidden_size=32, intermediate_size=32,
            num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32,
            bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 32), layers_per_block=1, cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet,
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(tmp_path / "pipeline")

    def look(messages, body):
        image = messages[-1]["content"][0]["image_url"]["url"]
        assert decode_png(base64.b64decode(image.partition(",")[2]), "sent").shape[2] == 3
        return "No"

    with serving(look) as eye:
        settings = {
            "images": "pipeline", "source": str(tmp_path / "pipeline"), "k": [1], "n": 2,
            "steps": 2, "concepts": "everyday", "audit": 0,
            "grader": {"url": eye.url, "model": "eye"},
        }  # fmt: skip
        found, _, part = mixed(**settings)
        assert (found[""].value, found[""].n) == (0.0, 2)
        paths = sorted((part.folder / "images").iterdir())
        first = [path.read_bytes() for path in paths]
        paths[1].unlink()
        mixed(**settings)
    assert [path.read_bytes() for path in paths] == first
    assert first[0] != first[1]


def test_a_vision_model_answers(mixed, tmp_path):
    """A tiny LLaVA of random weights, against its own logits."""
    pil = pytest.importorskip("PIL.Image")
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    texts = "Yes No yes no Is the Does image contain a an Are there exactly have of shape in style"
    words = ["<unk>", "</s>", "<pad>", "<image>", *texts.split(), *WORDS["object"], *WORDS["color"]]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", eos_token="</s>", pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        image_size=24, patch_size=12,
    )  # fmt: skip
    language = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, initializer_range=0.5,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=language, image_token_index=3,
                         image_seq_length=4)  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}
        ),
        tokenizer=tokenizer,
        patch_size=12,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    model.save_pretrained(tmp_path / "llava")
    processor.save_pretrained(tmp_path / "llava")
    found, report, part = mixed(
        images="renderer", k=[2], n=3, audit=4, grader=str(tmp_path / "llava")
    )
    assert found[""].n == 3
    assert 0 < report["grader"]["audit"]["error"]["value"] <= 1
    rows = [json.loads(line) for line in (part.folder / "answers.jsonl").read_text().splitlines()]
    asked = [json.loads(line) for line in (part.folder / "prompts.jsonl").read_text().splitlines()]
    for row, about in zip(rows, asked, strict=True):
        image = pil.open(part.folder / "images" / f"{row['id']}.png").convert("RGB")
        for question, answer in zip(about["questions"], row["answers"], strict=True):
            prompt = f'<image>\n{question} Respond "Yes" or "No".\n'
            inputs = processor(text=prompt, images=image, return_tensors="pt")
            with torch.no_grad():
                last = model(**inputs).logits[0, -1].double().exp()
            yes, no = (
                sum(last[words.index(w)] for w in pair) for pair in (("Yes", "yes"), ("No", "no"))
            )
            assert answer is bool(yes > no)
