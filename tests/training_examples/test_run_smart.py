"""run_smart.py trains and measures each reasoner on a few puzzles, with tiny backbones."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model, ResNetConfig, ResNetModel

from modeling_prismer import PrismerImageProcessor
from smart import run_smart, train_backbones
from smart.generate import write_puzzles
from smart.puzzles import Puzzle, find_puzzles
from smart.reasoner import ReasonerCollator, SmartReasoner, SmartReasonerConfig
from smart.rows import load_smart


STEMS = (
    '{"hidden_size": 32, "image_size": 32, "num_latents": 4, "resampler_layers": 1, "resampler_attention_heads": 2}'
)


@pytest.fixture(scope="module")
def puzzles(tmp_path_factory):
    """Twenty instances of each of our puzzles."""
    folder = tmp_path_factory.mktemp("puzzles")
    write_puzzles(folder, instances=20)
    return folder


@pytest.fixture(scope="module")
def backbones(tmp_path_factory, puzzles):
    """Folders with a tiny ResNet, a DINOv2 and a BERT."""
    folder = tmp_path_factory.mktemp("backbones")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ResNetModel(resnet).save_pretrained(folder / "resnet")
    PrismerImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "resnet")
    Dinov2Model(Dinov2Config(**sizes, image_size=32, patch_size=8)).save_pretrained(folder / "dinov2")
    tokenizer = train_backbones.train_tokenizer(load_smart(puzzles)["text"], folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    BertModel(BertConfig(**sizes, intermediate_size=32, vocab_size=len(tokenizer))).save_pretrained(folder / "bert")
    return folder


@pytest.fixture
def recipe(monkeypatch, cache, puzzles, tmp_path):
    """Runs the script, and returns its folder and results."""

    def run(reasoner, *arguments, out=tmp_path / "out"):
        shared = ["--reasoner", reasoner, "--data_dir", puzzles, "--output_dir", out, "--use_cpu"]
        shared += ["--disable_tqdm", "true", "--per_device_train_batch_size", 8, "--save_strategy", "no"]
        monkeypatch.setattr(sys, "argv", ["run_smart.py", *map(str, shared), *map(str, arguments)])
        run_smart.main()
        return out, json.loads((out / "smart_results.json").read_text())

    return run


@pytest.fixture
def heads(backbones):
    """Arguments for reasoners with heads."""
    both = ("--vision", backbones / "resnet", "--language", backbones / "bert", "--do_train", "--do_eval")
    fused = ("--vision", backbones / "dinov2", backbones / "dinov2", *both[2:])
    return {"baseline": both, "fused": fused}


def test_frequent_answers(recipe, puzzles):
    _, results = recipe("frequent", "--only", "counting", "--do_eval")
    train, test = load_smart(puzzles, only=["counting"]), load_smart(puzzles, part="test", only=["counting"])
    values = [value for (value,) in train["value"]]
    best = max(values, key=lambda value: (values.count(value), -values.index(value)))
    assert results["all"]["number"] == 3
    assert results["all"]["s_acc"] == pytest.approx(sum(value == [best] for value in test["value"]) / 3)


def test_baseline_learns_and_loads_again(recipe, heads):
    settings = ("--only", "order", "logic", "--epochs", 20, "--learning_rate", 3e-3)
    folder, results = recipe("baseline", *heads["baseline"], *settings)
    assert list(results) == ["reasoner", "scheme", "all", "logic", "order", "209", "210"]
    trained = json.loads((folder / "train_results.json").read_text())
    assert trained["epoch"] == 20 and trained["train_loss"] < 2  # of 27 and 5 values
    _, again = recipe("baseline", "--model", folder, "--only", "order", "logic", "--do_eval", out=folder / "again")
    assert again == results


def test_frozen_backbones_stay(recipe, heads, backbones):
    folder, _ = recipe("fused", *heads["fused"], "--only", "logic", "--epochs", 1, "--freeze")
    trained, dinov2 = load_file(folder / "model.safetensors"), load_file(backbones / "dinov2" / "model.safetensors")
    for index in range(2):
        assert all(torch.equal(trained[f"encoders.{index}.{name}"], weight) for name, weight in dinov2.items())
    folder, _ = recipe("baseline", *heads["baseline"], "--only", "logic", "--epochs", 1)  # only BERT is frozen
    trained, resnet = load_file(folder / "model.safetensors"), load_file(backbones / "resnet" / "model.safetensors")
    assert any(not torch.equal(trained[f"encoders.0.{name}"], weight) for name, weight in resnet.items())
    bert = load_file(backbones / "bert" / "model.safetensors")
    assert all(torch.equal(trained[f"language.{name}"], weight) for name, weight in bert.items())


def test_puzzles_share_heads_if_some_are_new(recipe, heads):
    folder, results = recipe("baseline", *heads["baseline"], "--scheme", "PS", "--epochs", 1)
    assert {"203", "208"} < results.keys() and "209" not in results and results["all"]["number"] == 6
    assert list(SmartReasoner.from_pretrained(folder).config.classes) == ["shared"]


@pytest.mark.parametrize(("option", "hidden"), [("--no_image", "image"), ("--no_question", "text")])
def test_hidden_inputs_are_the_same_for_all(recipe, heads, monkeypatch, option, hidden):
    seen = set()

    class Watching(ReasonerCollator):
        def __call__(self, rows):
            seen.update(row["image"].tobytes() if hidden == "image" else row["text"] for row in rows)
            return super().__call__(rows)

    monkeypatch.setattr(run_smart, "ReasonerCollator", Watching)
    recipe("baseline", *heads["baseline"], "--only", "logic", "counting", "--epochs", 1, option)
    assert len(seen) == 1


def test_prismer_generates_and_ranks(recipe, checkpoint):
    settings = ("--model", checkpoint, "--only", "math", "spatial", "--labels", "live", "--total_batch_size", 8)
    settings += ("--image_size", 32)  # the default is the paper's
    _, results = recipe("prismer", *settings, "--do_train", "--do_eval", "--max_steps", 2)
    assert results["math"]["number"] == 3 and 0 <= results["all"]["o_acc"] <= 1


def test_prismer_lm_generates_and_ranks(recipe, language, vision, suites):
    settings = ("--language", language, "--vision", vision, "--experts", suites["edges"], "--experts_config", STEMS)
    settings += ("--dtype", "float32", "--labels", "live", "--only", "measure", "--max_steps", 2)
    folder, results = recipe("prismer_lm", *settings, "--do_train", "--do_eval")
    assert results["208"]["number"] == 3 and 0 <= results["measure"]["o_acc"] <= 1
    assert (folder / "README.md").is_file()


def test_best_option_of_each_row_is_chosen(puzzles):
    """The ranking is over the options of a batch. Options of other rows do not count, though they rank first."""
    rows = load_smart(puzzles, part="test", only=["counting"])
    assert set(rows[0]["options"]) != set(rows[1]["options"])

    class Batch(list):
        def to(self, device):
            return self

    class Model:
        device = "cpu"

        def eval(self):
            return self

        def rank_candidates(self, k, texts, options):
            def rank(own):
                return sorted(range(k), key=lambda index: (texts[index] in own, texts[index] != own[3]))

            return SimpleNamespace(indices=torch.tensor([rank(own) for own in options]))

    trainer = SimpleNamespace(
        model=Model(),
        processing_class=SimpleNamespace(prepare_candidates=lambda texts: {"texts": Batch(texts)}),
        eval_collator=lambda batch: {"options": Batch(row["options"] for row in batch)},
        args=SimpleNamespace(eval_batch_size=2, disable_tqdm=True),
    )
    assert run_smart.choose_options(trainer, rows) == [3, 3, 3]


def test_an_empty_part_is_named(recipe, heads, monkeypatch):
    monkeypatch.setattr(run_smart, "make_reasoner", None)  # nothing is trained
    with pytest.raises(SystemExit, match="the test part of --scheme PS is empty; choose another --scheme, or more"):
        recipe("frequent", "--scheme", "PS", "--only", "counting", "--do_eval", "--no_image", "--no_question")
    with pytest.raises(SystemExit, match="the train part of --scheme IS is empty"):
        recipe("baseline", *heads["baseline"], "--max_instances", 1)


def test_an_empty_validation_is_left_out(recipe):
    _, results = recipe("frequent", "--only", "counting", "--do_eval", "--max_instances", 3)
    assert results["all"]["number"] == 1


def test_missing_arguments_are_named(recipe, monkeypatch):
    with pytest.raises(SystemExit, match="--predict_only: a reasoner is measured with --do_eval"):
        recipe("frequent", "--predict_only")
    with pytest.raises(SystemExit, match="no puzzle or kind 'music'; accepted are counting,"):
        recipe("frequent", "--only", "music", "--do_eval")
    monkeypatch.setattr(sys, "argv", ["run_smart.py", "--output_dir", "out", "--do_eval"])
    with pytest.raises(SystemExit, match="--data_dir is missing"):
        run_smart.main()


# ---- the network ----


@pytest.fixture
def reasoner(backbones):
    torch.manual_seed(0)
    vision = [str(backbones / "dinov2"), str(backbones / "resnet")]
    return SmartReasoner.from_backbones(vision, str(backbones / "bert"), {"5": 9, "18": 6}, ["18"]).eval()


def make_batch(puzzles, labels=None):
    torch.manual_seed(1)
    number = len(puzzles)
    batch = {name: torch.rand(number, 3, 32, 32) for name in ("pixel_values", "pixel_values_1")}
    batch |= {"input_ids": torch.randint(5, 30, (number, 7)), "attention_mask": torch.ones(number, 7).long()}
    return batch | {"puzzles": torch.tensor(puzzles)} | ({} if labels is None else {"labels": torch.tensor(labels)})


def test_features_lie_side_by_side(reasoner):
    pixels = torch.rand(2, 3, 32, 32)
    features = reasoner.encode_images([pixels, pixels])
    assert features.shape == (2, 16, 16 + 16)  # patches of DINOv2, and one place of the ResNet for all
    assert torch.allclose(features[:, 0, 16:], features[:, 5, 16:])
    own = reasoner.encoders[0](pixels).last_hidden_state[:, 1:]
    torch.testing.assert_close(features[..., :16], own, atol=1e-4, rtol=1e-4)  # the norm has not seen images yet


def test_patch_features_have_unit_variance(reasoner):
    pixels = [torch.rand(4, 3, 32, 32)] * 2
    features = reasoner.train().encode_images(pixels)[..., :16].flatten(0, 1)
    torch.testing.assert_close(features.mean(0), torch.zeros(16), atol=1e-4, rtol=0)
    torch.testing.assert_close(features.var(0), torch.ones(16), atol=0.05, rtol=0)
    with torch.no_grad():
        reasoner.encoders[0].layernorm.weight.mul_(0.1)
        reasoner.encoders[0].layernorm.bias.add_(5)
    other = reasoner.encode_images(pixels)[..., :16].flatten(0, 1)
    torch.testing.assert_close(other, features, atol=0.01, rtol=0)


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_encoders_keep_their_statistics(reasoner, frozen):
    reasoner.freeze_backbones(vision=frozen, language=True)
    before = {name: buffer.clone() for name, buffer in reasoner.encoders.named_buffers() if "running" in name}
    reasoner.train()(**make_batch([5, 18]))
    after = dict(reasoner.encoders.named_buffers())
    assert all(torch.equal(after[name], buffer) for name, buffer in before.items()) == frozen
    assert not reasoner.language.training and reasoner.fusion.training


def test_values_do_not_depend_on_the_batch(reasoner):
    batch = make_batch([5, 18, 5])
    together = reasoner(**batch).values
    assert together.shape == (3, 10) and (together[0, 1:] == -100).all() and (together[1] >= 0).all()
    for index in range(3):
        alone = reasoner(**{name: tensor[index : index + 1] for name, tensor in batch.items()}).values
        assert torch.equal(alone[0], together[index])


def test_padding_of_questions_leaves_no_trace(reasoner):
    ids, mask = torch.randint(5, 30, (2, 7)), torch.ones(2, 7).long()
    ids[1, 4:], mask[1, 4:] = 0, 0
    together = reasoner.encode_questions(ids, mask)
    torch.testing.assert_close(together[:1], reasoner.encode_questions(ids[:1], mask[:1]))
    torch.testing.assert_close(together[1:], reasoner.encode_questions(ids[1:, :4], mask[1:, :4]))


def test_loss_is_the_mean_over_instances(reasoner):
    labels = [[3] + [-100] * 9, [1, 0, 2] + [5] * 7, [20] + [-100] * 9]  # the head of 5 has no value 20
    batch = make_batch([5, 18, 5], labels)
    alone = [
        reasoner(**{name: tensor[index : index + 1] for name, tensor in batch.items()}).loss for index in range(3)
    ]
    assert alone[2] == 0
    torch.testing.assert_close(reasoner(**batch).loss, sum(alone) / 3)


def test_unknown_puzzle_is_named(reasoner):
    with pytest.raises(ValueError, match="no head for puzzle 6"):
        reasoner(**make_batch([6]))


def test_classes_reach_to_the_largest_value(puzzles):
    rows, known = load_smart(puzzles), find_puzzles(puzzles)
    classes = run_smart.count_classes(rows, known, shared=False)
    assert classes["209"] == 27 and classes["202"] == 1 + max(
        value for number, (value, *_) in zip(rows["puzzle"], rows["value"]) if number == 202
    )
    assert run_smart.count_classes(rows, known, shared=True) == {"shared": max(classes.values())}
    assert isinstance(known[209], Puzzle) and SmartReasonerConfig().classes == {}


def test_backbones_train(puzzles, backbones, tmp_path, monkeypatch):
    for name, value in {"WIDTH": 16, "LAYERS": 1, "HEADS": 2, "IMAGE_SIZE": 32}.items():
        monkeypatch.setattr(train_backbones, name, value)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    monkeypatch.setattr(train_backbones, "SIZES", sizes)
    command = ["train", "--data_dir", puzzles, "--output_dir", tmp_path, "--question_steps", 1, "--image_steps", 1]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    train_backbones.main()
    vision = [str(tmp_path / "siglip"), str(tmp_path / "dinov2")]
    fused = SmartReasoner.from_backbones(vision, str(tmp_path / "bert"), {"5": 9}, [])
    assert [settings["size"]["height"] for settings in fused.config.image_settings] == [32, 32]
    assert fused.encode_images([torch.rand(1, 3, 32, 32)] * 2).shape == (1, 4, 32)
    assert (tmp_path / "resnet" / "config.json").is_file()
