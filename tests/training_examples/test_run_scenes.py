"""run_scenes.py trains on the backbones of train_backbones.py, with true labels, without experts, and blind."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import CLIPModel, RobertaTokenizer, TrainingArguments

from modeling_prismer import PrismerForConditionalGeneration, PrismerImageProcessor, PrismerProcessor
from modeling_prismer.familiarity import Familiarity
from scenes import run_scenes, train_backbones
from scenes.scenes import Scenes


def run(script, data_dir, output_dir, *arguments):
    few = {"train": 26, "validation": 2, "test": 2}  # Familiarity needs more scenes than features for the covariance
    command = [script.__name__, "--data_dir", data_dir, "--output_dir", output_dir, *arguments]
    for split, number in few.items():
        command += [f"--{split}_scenes" if script is run_scenes else f"--{split}", number]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        script.main()
    return output_dir


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("scenes")


@pytest.fixture(scope="module")
def backbones(data_dir, tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in {"WIDTH": 24, "HEAD_WIDTH": 12, "VISION_LAYERS": 1, "TEXT_LAYERS": 1}.items():
            monkeypatch.setattr(train_backbones, name, value)
        folder = tmp_path_factory.mktemp("backbones")
        return run(train_backbones, data_dir, folder, "--clip_epochs", 1, "--roberta_epochs", 1)


def test_region_has_the_patches_with_most_of_its_object():
    shares = train_backbones.patches_of([12, 32, 48, 47]).view(8, 8)
    assert shares.nonzero().tolist() == [[2, 1], [2, 2]]  # a quarter of a patch on the left does not count
    torch.testing.assert_close(shares[2, 1:3], torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(train_backbones.patches_of([100, 100, 128, 128]).sum(), torch.tensor(1.0))


def test_regions_have_the_phrases_of_their_objects(backbones, data_dir, tmp_path):
    tokenizer = RobertaTokenizer.from_pretrained(backbones / "tokenizer")
    rows = list(Scenes(cache_dir=data_dir, train=26, validation=2, test=2).as_dataset(split="train").select(range(4)))
    batch = train_backbones.CaptionedImages(tokenizer)(rows)
    things = [(i, thing) for i, row in enumerate(rows) for thing in row["facts"]["objects"]]
    things = [(i, thing) for i, thing in things if thing["visible_share"] > 0.5]
    assert batch["region_images"].tolist() == [i for i, _ in things]
    said = tokenizer.batch_decode(batch["phrase_input_ids"].clamp(max=len(tokenizer) - 1), skip_special_tokens=True)
    for (_, thing), index in zip(things, batch["region_phrases"], strict=True):
        assert f"{thing['size']} {thing['material']} {thing['color']} {thing['shape']}" in said[index]
    clip = CLIPModel.from_pretrained(backbones / "clip")
    trainer = train_backbones.ClipTrainer(clip, TrainingArguments(tmp_path, use_cpu=True, report_to="none"))
    loss = trainer.compute_loss(clip, batch)
    batch["region_phrases"] = (batch["region_phrases"] + 1) % len(said)
    assert loss != trainer.compute_loss(clip, batch)


def test_weakened_layers_of_clip_add_little(backbones):
    clip = CLIPModel.from_pretrained(backbones / "clip-strong").vision_model.eval()
    pixel_values = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))

    def added():
        states = clip(pixel_values, output_hidden_states=True).hidden_states
        return (states[-1] - states[0]).std().item()

    before = added()
    train_backbones.weaken_branches(SimpleNamespace(vision_model=clip))
    assert 0.1 * before < added() < 0.3 * before
    assert CLIPModel.from_pretrained(backbones / "clip").config.vision_config.num_hidden_layers == 1


def test_sign_questions_have_two_other_texts_and_more_weight(data_dir):
    scenes = Scenes(cache_dir=data_dir, train=26, validation=2, test=2)
    scenes.download_and_prepare()
    scenes = scenes.as_dataset(split="train")
    rows = run_scenes.training_rows(scenes, "signs")
    said = {row["image_id"]: [q["answer"] for q in row["questions"] if q["type"] == "sign"] for row in scenes}
    assert rows["image_id"][:] == [image_id for image_id, answers in said.items() if answers]
    assert 0 < len(rows) < len(scenes)
    for row in rows:
        assert row["suffix"][0] in said[row["image_id"]] and row["text"][0].startswith(("What does the", "What word"))
        assert row["weight"] == [3, 1, 1] and len(row["text"]) == len(row["suffix"]) == len(row["task"]) == 3
    all_rows = run_scenes.training_rows(scenes)
    assert all_rows["image_id"][:] == scenes["image_id"][:]
    assert [len(texts) for texts in all_rows["text"]] == [len(questions) + 5 for questions in scenes["questions"]]


def test_a_batch_has_captions_alone_or_questions_alone(backbones, data_dir):
    scenes = Scenes(cache_dir=data_dir, train=26, validation=2, test=2)
    scenes.download_and_prepare()
    rows = run_scenes.training_rows(scenes.as_dataset(split="train"))
    tokenizer = RobertaTokenizer.from_pretrained(backbones / "tokenizer")
    image_processor = PrismerImageProcessor(size={"height": 16, "width": 16})
    processor = PrismerProcessor(image_processor, tokenizer, task="vqa", tasks=["caption", "vqa"])
    collator = run_scenes.OneTaskPerBatch(processor, run_scenes.no_labels, texts_per_image=7)
    kinds = []
    for epoch in range(6):
        collator.epoch = epoch
        for start in range(0, 26, 2):
            batch = collator([rows[start], rows[start + 1]])
            texts = tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
            captions = [text.startswith("A picture of") for text in texts]
            assert len(set(captions)) == 1 and len(texts) == (10 if captions[0] else 14)
            kinds.append(captions[0])
    assert 0.05 < sum(kinds) / len(kinds) < 0.4
    again = collator([rows[start], rows[start + 1]])
    assert torch.equal(again["input_ids"], batch["input_ids"])


@pytest.mark.parametrize(
    "way, experts",
    [
        (("--suite", "true", "--labels", "true"), 6),
        (("--suite", "none"), 0),
        (("--blind",), 0),
        (("--suite", "none", "--texts", "signs"), 0),
    ],
)
def test_every_variant_is_trained_and_evaluated(backbones, data_dir, tmp_path, way, experts):
    arguments = ("--backbones", backbones, "--do_train", "--do_eval", "--max_steps", 1, "--dataloader_num_workers", 0)
    run(run_scenes, data_dir, tmp_path, *arguments, "--per_device_train_batch_size", 4, *way)
    results = json.loads((tmp_path / "scenes_results.json").read_text())
    assert results.keys() == {"validation", "test", "held_out"}
    assert {"all", "color", "relation", "sign"} <= results["test"]["answers"].keys()
    assert results["test"]["captions"].keys() == {"cider", "exact_attributes", "objects"}
    model = PrismerForConditionalGeneration.from_pretrained(tmp_path)
    processor = PrismerProcessor.from_pretrained(tmp_path)
    assert len(model.config.experts) == experts
    assert processor.tasks == ["caption", "vqa"] and processor.task == "vqa"


def test_published_model_has_a_familiarity(backbones, data_dir, tmp_path):
    arguments = ("--backbones", backbones, "--suite", "true", "--labels", "true", "--do_train", "--max_steps", 1)
    arguments += ("--per_device_train_batch_size", 4, "--dataloader_num_workers", 0)
    run(run_scenes, data_dir, tmp_path / "run", *arguments, "--publish_to", tmp_path / "published")
    model = PrismerForConditionalGeneration.from_pretrained(tmp_path / "published", dtype="float32")
    familiarity = Familiarity.from_pretrained(tmp_path / "published")
    width = model.config.vision_config.hidden_size
    assert familiarity.mean.shape == (width,) and 0 < familiarity.limit < float("inf")
    assert familiarity.distance(familiarity.mean[None] + 100).item() > familiarity.limit


def test_photographs_are_unfamiliar(backbones, data_dir, tmp_path):
    arguments = ("--backbones", backbones, "--do_train", "--max_steps", 1, "--per_device_train_batch_size", 4)
    run(run_scenes, data_dir, tmp_path / "run", *arguments, "--publish_to", tmp_path / "published")
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for name, color in (("a.png", (255, 0, 255)), ("b.jpg", (0, 255, 0))):
        Image.new("RGB", (40, 30), color).save(photographs / name)
    (photographs / "text.txt").write_text("not an image")
    arguments = ("--model", tmp_path / "published", "--do_eval", "--photographs", photographs)
    run(run_scenes, data_dir, tmp_path / "evaluation", *arguments)
    found = json.loads((tmp_path / "evaluation" / "scenes_results.json").read_text())["familiarity"]
    assert found["photographs"]["warned"] == 1.0 and found["photographs"]["nearest"] > found["limit"]
    assert found["test"].keys() == found["photographs"].keys() == {"warned", "nearest", "median", "farthest"}


def test_unknown_texts_argument_is_refused(backbones, data_dir, tmp_path):
    with pytest.raises(SystemExit, match="--texts is 'words'; accepted are all, signs"):
        run(run_scenes, data_dir, tmp_path, "--backbones", backbones, "--do_train", "--texts", "words")


@pytest.mark.parametrize("arguments", [(), ("--backbones", "nowhere")])
def test_new_model_without_backbones_is_refused(arguments, data_dir, tmp_path):
    with pytest.raises(SystemExit, match="a new model needs the output folder of scenes/train_backbones.py"):
        run(run_scenes, data_dir, tmp_path, "--do_train", "--max_steps", 1, *arguments)
