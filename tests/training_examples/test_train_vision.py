"""train_vision.py learns what each place of a scene shows; run_scenes.py trains on Scenes 2 with marked objects."""

import json
import sys

import numpy as np
import pytest
import torch
from transformers import CLIPVisionModel, RobertaConfig


datasets = pytest.importorskip("datasets")

from modeling_prismer import DataCollatorForPrismer, PrismerForConditionalGeneration  # noqa: E402
from modeling_prismer.processing.data import shorten_answers  # noqa: E402
from scenes import run_scenes, train_backbones, train_encoder, train_vision  # noqa: E402
from scenes.scenes import open_scenes  # noqa: E402
from scenes.train_vision import ATTRIBUTES, IGNORED, LabelledImages, PlaceReader, new_tower, targets_of  # noqa: E402
from training import save_model  # noqa: E402


FEW = {"train": 26, "validation": 2, "test": 2}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("scenes2"))


@pytest.fixture(scope="module")
def splits(data_dir):
    return open_scenes(data_dir, "scenes2", **FEW)


def test_targets_name_the_object_of_each_cell(splits):
    for row in splits["train"]:
        targets = targets_of(row)
        things = row["facts"]["objects"]
        clear = [thing for thing in things if thing["visible_share"] > 0.9 and thing["visible_pixels"] > 150]
        for thing in clear:
            column, line = (int(value * 16) for value in thing["center"])
            if thing["shape"] == "ring":  # its middle shows what is behind
                continue
            for name in ("shape", "color", "material", "size"):
                assert ATTRIBUTES[name][targets[name][line, column]] == thing[name]
            x, y, width, height = targets["numbers"][line, column, :4]
            left, top, right, bottom = np.array(thing["box"]) / 128
            np.testing.assert_allclose((x, y), ((left + right) / 2, (top + bottom) / 2), atol=1e-5)
            np.testing.assert_allclose((width, height), (right - left, bottom - top), atol=1e-5)
        assert targets["center"].sum() <= len(things) + len(row["facts"]["signs"])
        none = targets["shape"] == ATTRIBUTES["shape"].index("none")
        assert (targets["color"][none] == IGNORED).all() and 0.2 < none.mean() < 1


def test_gray_images_have_no_colors_and_mirrored_ones_mirrored_targets(splits, monkeypatch):
    row = splits["train"][0]
    plain = targets_of(row)
    monkeypatch.setattr(train_vision, "GRAY", 0.2)
    for draw, mirrored, gray in ((0.9, False, False), (0.4, True, False), (0.1, True, True)):
        monkeypatch.setattr(torch, "rand", lambda *size, draw=draw: torch.full(size, draw))
        batch = LabelledImages()([row])
        wanted = plain["shape"][:, ::-1] if mirrored else plain["shape"]
        np.testing.assert_array_equal(batch["shape"][0].numpy(), wanted)
        middle = plain["numbers"][:, ::-1, 0] if mirrored else plain["numbers"][..., 0]
        np.testing.assert_allclose(batch["numbers"][0, ..., 0], 1 - middle if mirrored else middle, atol=1e-6)
        assert (batch["color"] == IGNORED).all().item() is gray is batch["gray"].item()
        channels = batch["pixel_values"][0]
        same = torch.allclose(channels[0] * 0.2686 + 0.4815, channels[1] * 0.2613 + 0.4578, atol=1e-2)
        assert same is gray


def test_cells_of_a_large_patch_keep_their_place():
    reader = PlaceReader(new_tower(patch_size=16, width=32, layers=1))
    head = reader.heads.heads["center"]
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.arange(4))
    centers = reader.predict(torch.zeros(1, 3, 128, 128))["center"][0, :, :, 0]
    assert centers.shape == (16, 16)
    assert centers[:2, :2].tolist() == centers[6:8, 4:6].tolist() == [[0, 1], [2, 3]]


@pytest.fixture(scope="module")
def backbones(data_dir, splits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbones")
    numbers = [part for name, number in FEW.items() for part in (f"--{name}", number)]
    command = ["train", "--data_dir", data_dir, "--data_config", "scenes2", "--output_dir", folder, *numbers]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(train_vision, "new_tower", lambda patch_size, *sizes: new_tower(8, *sizes))
        command += ["--clip", "facts", "--clip_epochs", 1, "--roberta_epochs", 0.02]
        command += ["--width", 32, "--vision_layers", 1, "--text_layers", 2]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        train_backbones.main()
    return folder


def test_the_tower_and_its_accuracy(backbones, splits):
    tower = CLIPVisionModel.from_pretrained(backbones / "clip")
    assert (tower.config.patch_size, tower.config.hidden_size, tower.config.num_hidden_layers) == (8, 32, 1)
    roberta = RobertaConfig.from_pretrained(backbones / "roberta")
    assert (roberta.hidden_size, roberta.num_hidden_layers) == (32, 2)
    shares = train_vision.accuracy_of_tower(PlaceReader(tower), splits["validation"])
    assert shares.keys() == ATTRIBUTES.keys() and all(0 <= share <= 1 for share in shares.values())


@pytest.fixture(scope="module")
def coarse_backbones(backbones, tmp_path_factory):
    """As `backbones`, with patches of 16 pixels, one for each latent."""
    folder = tmp_path_factory.mktemp("coarse")
    for part in ("roberta", "tokenizer"):
        (folder / part).symlink_to(backbones / part)
    new_tower(16, 32, 1).save_pretrained(folder / "clip")
    return folder


def encoder_command(data_dir, backbones, output_dir):
    numbers = [f"--{name}_scenes={number}" for name, number in FEW.items()]
    command = ["train_encoder", "--data_dir", data_dir, "--data_config", "scenes2", "--backbones", backbones, *numbers]
    command += ["--suite", "true", "--labels", "true", "--do_train", "--max_steps", 2, "--max_eval_rows", 1]
    return [*map(str, command), "--per_device_train_batch_size", "4", "--output_dir", str(output_dir)]


def test_the_encoder_learns_what_places_show(data_dir, coarse_backbones, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", encoder_command(data_dir, coarse_backbones, tmp_path))
    train_encoder.main()
    said = capsys.readouterr().out
    results = json.loads((tmp_path / "encoder_results.json").read_text())
    assert results.keys() == {"like the training", "held out"} and "held out {" in said
    assert all(list(own) == list(train_encoder.SITES) for own in results.values())
    assert results["held out"]["latents"].keys() == train_encoder.TARGETS.keys()
    model = PrismerForConditionalGeneration.from_pretrained(tmp_path)
    torch.manual_seed(0)
    fresh, _ = run_scenes.from_backbones(coarse_backbones, model.config.experts)
    tower = {name for name, _ in fresh.named_parameters() if ".vision_model.layers." in name and "adaptor" not in name}
    state = fresh.state_dict()
    assert tower and all(model.get_parameter(name).equal(state[name]) for name in tower)
    assert not (model.model.vision_model.layers[0].adaptor.up_proj.weight == 0).all()
    assert json.loads((tmp_path / "processor_config.json").read_text())


def test_the_encoder_reads_words_from_its_labels(data_dir, splits, coarse_backbones):
    model, processor = run_scenes.from_backbones(coarse_backbones, run_scenes.DESCRIPTIONS)
    collator = DataCollatorForPrismer(processor, run_scenes.TrueLabels(*splits.values()), with_suffix=False)
    batch = train_encoder.LabelledScenes(collator)([splits["train"][place] for place in range(4)])
    words = {train_encoder.WORDS[index] for index in batch["targets"]["word"].unique().tolist() if index >= 0}
    assert words and words <= {word for place in range(4) for word in splits["train"][place]["ocr_words"]}
    assert "input_ids" not in batch and batch["ocr_features"].shape[0] == 4
    reader = train_encoder.EncoderReader(model)
    loss = reader(**batch).loss
    loss.backward()
    assert loss.isfinite() and model.model.vision_model.expert_stems["ocr"].projection.weight.grad.abs().sum() > 0
    assert not any(name.startswith("encoder.text") or "lm_head" in name for name in reader.state_dict())


def test_latents_start_as_places(coarse_backbones, backbones):
    model, _ = run_scenes.from_backbones(coarse_backbones, run_scenes.DESCRIPTIONS, resampler_attention_heads=1)
    train_encoder.look_at_places(model)
    encoder = model.model.vision_model
    positions, layer = encoder.embeddings.position_embedding, encoder.resampler.layers[0]
    tokens = positions.repeat(2, 1)[None] + 0.1 * torch.randn(1, 128, 32, generator=torch.Generator().manual_seed(0))
    latents = layer.latents_layer_norm(encoder.resampler.latents[None])
    keys = torch.cat([layer.tokens_layer_norm(tokens), latents], dim=1)
    scores = layer.latent_attn.q_proj(latents) @ layer.latent_attn.k_proj(keys).transpose(1, 2)
    weights = (scores * layer.latent_attn.scaling).softmax(-1)[0]
    own = weights[:, :64].diagonal() + weights[:, 64:128].diagonal()  # both tokens of the place
    assert own.mean() > 0.8 and weights[:, 128:].diagonal().mean() < 0.05

    model, _ = run_scenes.from_backbones(backbones, run_scenes.DESCRIPTIONS)  # 256 patches
    with pytest.raises(ValueError, match="64 latents for 256 patches; each place needs one"):
        train_encoder.look_at_places(model)


def test_half_of_the_training_scenes_have_a_mark(splits):
    labels_for = run_scenes.WithMarks(run_scenes.TrueLabels(*splits.values()), splits)
    ids = splits["train"]["image_id"][:4]
    assert ["regions" in labels for labels in labels_for(ids)] == [True, False, True, False]
    assert all("regions" in labels and "depth" in labels for labels in labels_for(splits["test"]["image_id"][:]))
    rows = run_scenes.training_rows(splits["train"])
    asked = [any("the marked object" in text for text in row["text"]) for row in rows]
    assert not any(asked[1::2]) and sum(asked[::2]) > 10


def test_lists_name_objects_and_signs_in_order(splits):
    rows = run_scenes.training_rows(splits["train"], "lists")
    for row, scene in zip(rows, splits["train"], strict=True):
        texts = dict(zip(row["text"], row["suffix"], strict=True))
        pairs = [sorted(thing[name] for name in run_scenes.ATTRIBUTES) for thing in scene["facts"]["objects"]]
        mixed = [said for text, said in zip(row["text"], row["suffix"]) if text == "In any order"]
        assert len(set(mixed)) == run_scenes.RANDOM_LISTS
        assert all(sorted(name.split()) in pairs for said in mixed for name in said.split(", "))
        things = sorted(scene["facts"]["objects"], key=lambda thing: thing["center"][0])
        first = things[0]
        assert texts["From left to right"].startswith(
            f"{first['size']} {first['material']} {first['color']} {first['shape']}"
        )
        assert texts["From right to left"].split(", ")[0].endswith(things[-1]["shape"])
        near = min(things, key=lambda thing: thing["distance"])
        assert texts["From near to far"].split(", ")[0].endswith(f"{near['color']} {near['shape']}")
        assert all(len(text.split()) <= 20 for text in row["suffix"])
        said = texts["Signs from left to right"]
        assert sorted(said.split(", ")) == (sorted(scene["ocr_words"]) or ["none"])
    objects = run_scenes.training_rows(splits["train"], "objects")
    assert objects["suffix"][:] == [suffix[:4] for suffix in rows["suffix"]]


def test_lists_fit_into_the_answers_of_a_prismer(backbones, splits):
    model, processor = run_scenes.from_backbones(backbones, [])
    rows = run_scenes.training_rows(splits["train"], "lists")
    assert shorten_answers(rows, processor, model.config.text_config) is rows


def test_interrupted_saving_leaves_no_model(tmp_path, monkeypatch):
    tower = new_tower(patch_size=16, width=32, layers=1)
    save_model(tower, tmp_path / "clip")
    save_model(tower, tmp_path / "clip")
    assert CLIPVisionModel.from_pretrained(tmp_path / "clip").config.hidden_size == 32

    def stop(folder):
        folder.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(tower, "save_pretrained", stop)
    with pytest.raises(KeyboardInterrupt):
        save_model(tower, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def run(monkeypatch, data_dir, backbones, output_dir, *arguments):
    command = ["run", "--data_dir", data_dir, "--data_config", "scenes2", "--backbones", backbones, *arguments]
    command += ["--freeze", "vision", "--do_train", "--output_dir", output_dir]
    command += ["--per_device_train_batch_size", 2, "--dataloader_num_workers", 0]
    command += [part for name, number in FEW.items() for part in (f"--{name}_scenes", number)]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    run_scenes.main()


def test_frozen_patches_are_not_trained(backbones, data_dir, tmp_path, monkeypatch):
    arguments = ("--suite", "none", "--texts", "lists", "--freeze_patches", "--max_steps", 2)
    run(monkeypatch, data_dir, backbones, tmp_path, *arguments)
    tower = CLIPVisionModel.from_pretrained(backbones / "clip")
    tower = getattr(tower, "vision_model", tower)
    encoder = PrismerForConditionalGeneration.from_pretrained(tmp_path).model.vision_model
    torch.testing.assert_close(encoder.embeddings.patch_embedding.weight, tower.embeddings.patch_embedding.weight)
    torch.testing.assert_close(encoder.pre_layernorm.bias, tower.pre_layrnorm.bias)


def test_a_model_of_scenes_2_is_trained_and_evaluated(backbones, data_dir, tmp_path, monkeypatch):
    arguments = ("--suite", "true", "--labels", "true", "--do_eval", "--max_steps", 1)
    run(monkeypatch, data_dir, backbones, tmp_path, *arguments)
    results = json.loads((tmp_path / "scenes_results.json").read_text())
    assert {"marked", "two steps", "same", "not"} <= results["held_out"]["answers"].keys()
    model = PrismerForConditionalGeneration.from_pretrained(tmp_path)
    assert model.config.expert_names[-1] == "regions"


def test_an_encoder_without_experts_is_refused(data_dir, coarse_backbones, tmp_path, monkeypatch):
    command = encoder_command(data_dir, coarse_backbones, tmp_path)
    command[command.index("--suite") + 1] = "none"
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="--suite none: there are no experts to learn from"):
        train_encoder.main()
