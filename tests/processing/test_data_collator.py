"""DataCollatorForPrismer makes batches; its random choices depend on seed, epoch and row."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_prismer import DataCollatorForPrismer
from modeling_prismer.processing import JointAugmentation


def make_image(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 40, 3), dtype=np.uint8))


def rows(number=3, **columns):
    columns = {"suffix": [f"a dog {i}" for i in range(number)], **columns}
    return [
        {"image": make_image(i), "image_id": f"{i}.png", **{name: values[i] for name, values in columns.items()}}
        for i in range(number)
    ]


def depth_by_id(image_ids):
    return [{"depth": np.full((24, 40), int(image_id[0]), np.uint8)} for image_id in image_ids]


class Jitter:
    """Replaces the image by one random color, and keeps the labels."""

    def __call__(self, image, labels):
        value = torch.randint(256, ()).item()
        return Image.new("RGB", image.size, (value, value, value)), labels


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_batch_equals_the_output_of_the_processor(make_processor):
    processor = make_processor("vqa")
    data = rows(text=["is it a dog", "what is it", "how many"], suffix=["yes", "dog", "two"])
    batch = DataCollatorForPrismer(processor, labels_for=depth_by_id)(data)
    expected = processor(
        [row["image"] for row in data],
        text=[row["text"] for row in data],
        suffix=[row["suffix"] for row in data],
        expert_labels=depth_by_id([row["image_id"] for row in data]),
    )
    assert same(batch, dict(expected))


def test_labels_are_looked_up_by_image_id(make_processor):
    asked = []
    DataCollatorForPrismer(make_processor(), labels_for=lambda ids: asked.append(ids) or depth_by_id(ids))(rows())
    assert asked == [["0.png", "1.png", "2.png"]]


@pytest.mark.parametrize("labels_for", [None, lambda ids: None])
def test_live_experts_see_images_before_augmentation(make_processor, pretend_suite, labels_for):
    suite = pretend_suite("depth")

    def smaller(image, labels):
        return image.resize((10, 10)), labels

    DataCollatorForPrismer(make_processor(experts=suite), labels_for, augmentation=smaller)(rows())
    assert suite["depth"].seen == [[(40, 24)] * 3]


def test_augmentation_changes_image_and_labels_together(make_processor):
    def mirror(image, labels):
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), {"depth": labels["depth"][:, ::-1]}

    def ramp(ids):
        return [{"depth": np.tile(np.arange(40, dtype=np.uint8), (24, 1))} for _ in ids]

    plain = DataCollatorForPrismer(make_processor(), ramp)(rows())
    mirrored = DataCollatorForPrismer(make_processor(), ramp, augmentation=mirror)(rows())
    assert torch.allclose(mirrored["pixel_values"].flip(-1), plain["pixel_values"], atol=1e-5)
    assert mirrored["depth_values"][0, 0, 0, 0] > 0.99 and plain["depth_values"][0, 0, 0, 0] < -0.99


def test_random_choices_depend_on_the_row_only(make_processor):
    collator = DataCollatorForPrismer(make_processor(), depth_by_id, Jitter(), expert_dropout=0.5, seed=3)
    whole = collator(rows())
    torch.manual_seed(99)
    copy = pickle.loads(pickle.dumps(collator))
    for i in (2, 0, 1):
        alone = copy(rows()[i : i + 1])
        assert torch.equal(alone["pixel_values"][0], whole["pixel_values"][i])
        assert torch.equal(alone["expert_mask"][0], whole["expert_mask"][i])


def test_random_choices_change_with_epoch_seed_and_row(make_processor):
    processor = make_processor()
    collator = DataCollatorForPrismer(processor, depth_by_id, Jitter(), seed=3)
    first = collator(rows())["pixel_values"]
    assert len({float(image[0, 0, 0]) for image in first}) == 3
    collator.epoch = 1
    assert not torch.equal(collator(rows())["pixel_values"], first)
    collator.epoch = 0
    assert torch.equal(collator(rows())["pixel_values"], first)
    other = DataCollatorForPrismer(processor, depth_by_id, Jitter(), seed=4)
    assert not torch.equal(other(rows())["pixel_values"], first)


def test_rows_without_an_id_are_augmented_differently(make_processor):
    data = [{"image": make_image(0), "suffix": "a dog"} for _ in range(4)]
    batch = DataCollatorForPrismer(make_processor(), augmentation=Jitter())(data)
    assert len({float(image[0, 0, 0]) for image in batch["pixel_values"]}) > 1


def test_random_state_of_the_process_is_unchanged(make_processor):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    DataCollatorForPrismer(make_processor(), depth_by_id, Jitter(), expert_dropout=0.5)(rows())
    assert torch.equal(torch.rand(3), expected)


def epoch_seen_by_workers(collator, loader):
    collator.epoch += 1
    return torch.cat([batch["pixel_values"] for batch in loader])


def test_workers_of_a_data_loader_see_a_new_epoch(make_processor):
    collator = DataCollatorForPrismer(make_processor(), depth_by_id, Jitter())
    loader = torch.utils.data.DataLoader(
        rows(), batch_size=1, collate_fn=collator, num_workers=1, persistent_workers=True
    )
    first, second = (epoch_seen_by_workers(collator, loader) for _ in range(2))
    assert not torch.equal(first, second)
    expected = collator(rows())["pixel_values"]
    assert torch.equal(second, expected)


def test_expert_dropout_masks_experts_with_its_probability(make_processor):
    data = [{"image": make_image(0), "image_id": f"0.{i}", "suffix": "a dog"} for i in range(400)]
    collator = DataCollatorForPrismer(make_processor(), depth_by_id, expert_dropout=0.3)
    mask = torch.cat([collator(data[i : i + 100])["expert_mask"] for i in range(0, 400, 100)])
    assert 0.6 < mask[:, 0].float().mean() < 0.8
    assert not mask[:, 1:].any()  # missing experts stay missing


def test_dropped_experts_differ_within_a_sample(make_processor, pretend_suite):
    suite = pretend_suite("depth", "edge")
    data = [{"image": make_image(0), "image_id": str(i), "suffix": "a dog"} for i in range(50)]
    mask = DataCollatorForPrismer(make_processor(experts=suite), expert_dropout=0.5)(data)["expert_mask"]
    assert (mask[:, 0] != mask[:, 3]).any() and (mask[:, 0] == mask[:, 3]).any()


def test_texts_of_an_image_share_it(make_processor):
    data = rows(2, text=[["is it", "what"], ["how", "why"]], suffix=[["yes", "dog"], ["so", "no"]])
    batch = DataCollatorForPrismer(make_processor("vqa"), depth_by_id)(data)
    assert batch["pixel_values"].shape[0] == 2 and batch["input_ids"].shape[0] == batch["labels"].shape[0] == 4


def test_captions_of_an_image_share_the_default_prompt(make_processor):
    processor = make_processor("caption")
    data = rows(2, suffix=[["a dog", "two dogs"], ["a cat", "no cat"]])
    batch = DataCollatorForPrismer(processor, depth_by_id)(data)
    texts = processor.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert texts == [f"A picture of {caption}" for caption in ("a dog", "two dogs", "a cat", "no cat")]


def drawn_texts(processor, batch):
    labels = batch["labels"].masked_fill(batch["labels"] == -100, processor.tokenizer.pad_token_id)
    return [text.strip() for text in processor.batch_decode(labels, skip_special_tokens=True)]


def test_texts_are_drawn_with_their_answers_and_weights(make_processor):
    processor = make_processor("vqa")
    answers = ["Yes", "No", "Red", "Green", "Blue"]
    data = rows(1, text=[[f"q {i}" for i in range(5)]], suffix=[answers], weight=[[0.0, 1.0, 2.0, 3.0, 4.0]])
    collator = DataCollatorForPrismer(processor, depth_by_id, texts_per_image=3)
    seen = set()
    for epoch in range(12):
        collator.epoch = epoch
        batch = collator(data)
        texts = drawn_texts(processor, batch)
        assert len(set(texts)) == 3
        assert [answers.index(text) for text in texts] == batch["sample_weight"].tolist()
        seen.update(texts)
    assert seen == set(answers)


def test_texts_are_repeated_if_there_are_too_few(make_processor):
    processor = make_processor("vqa")
    data = rows(1, text=[["is it", "what"]], suffix=[["Yes", "Red"]])
    texts = drawn_texts(processor, DataCollatorForPrismer(processor, depth_by_id, texts_per_image=5)(data))
    assert len(texts) == 5 and {texts.count("Yes"), texts.count("Red")} == {2, 3}


def test_weights_become_sample_weight(make_processor):
    batch = DataCollatorForPrismer(make_processor(), depth_by_id)(rows(weight=[0.2, 1.0, 0.5]))
    assert batch["sample_weight"].dtype == torch.float32
    torch.testing.assert_close(batch["sample_weight"], torch.tensor([0.2, 1.0, 0.5]))


def test_batch_for_generation_has_only_the_prompt(make_processor):
    data = rows(weight=[1.0] * 3)
    batch = DataCollatorForPrismer(make_processor(), depth_by_id, with_suffix=False)(data)
    assert "labels" not in batch and "sample_weight" not in batch
    assert torch.equal(batch["input_ids"][0], batch["input_ids"][1])


def test_experts_can_be_chosen(make_processor, pretend_suite):
    suite = pretend_suite("depth", "edge")
    batch = DataCollatorForPrismer(make_processor(experts=suite), experts=["edge"])(rows())
    assert batch["expert_mask"].any(0).tolist() == [False, False, False, True, False, False]


def test_stored_and_live_labels_give_the_same_batch(make_processor, pretend_suite):
    processor = make_processor(experts=pretend_suite("depth", "edge"))
    labels = processor.run_experts([row["image"] for row in rows()])
    live = DataCollatorForPrismer(processor)(rows())
    stored = DataCollatorForPrismer(processor, lambda ids: labels)(rows())
    assert same(live, stored)


def test_image_that_cannot_be_read_is_named(make_processor):
    data = [*rows(1), {"image": b"no image", "image_id": "summer/beach.jpg", "suffix": "a dog"}]
    with pytest.raises(ValueError, match="summer/beach.jpg"):
        DataCollatorForPrismer(make_processor(), depth_by_id)(data)


@pytest.mark.parametrize(
    "label, message",
    [
        ({"depth": np.full((24, 40), np.nan)}, "depth label of 'b.png' has NaN or inf"),
        ({"depth": np.zeros((24, 40))}, "depth label of 'b.png' has float64 values; 8-bit integers"),
        ({"segmentation": np.zeros((24, 40))}, "segmentation label of 'b.png' has float64 ids; integers"),
        ({"detection": {"ids": np.zeros((24, 40), int)}}, "detection label of 'b.png' has no 'classes'"),
    ],
)
@pytest.mark.parametrize("augmentation", [None, Jitter()])
def test_sample_with_a_wrong_label_is_named(make_processor, label, message, augmentation):
    data = [{**row, "image_id": name} for row, name in zip(rows(3), ("a.png", "b.png", "c.png"))]
    collator = DataCollatorForPrismer(make_processor(), lambda ids: [{}, label, None], augmentation)
    with pytest.raises(ValueError, match=message):
        collator(data)


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8"])
def test_ids_of_every_integer_type_are_augmented_alike(image_processor, make_processor, dtype):
    ids = np.arange(24 * 40).reshape(24, 40) % 100

    def batch(ids):
        augmentation = JointAugmentation(image_processor.experts, size=(32, 32), expert_size=16)
        return DataCollatorForPrismer(make_processor(), lambda _: [{"segmentation": ids}], augmentation)(rows(1))

    background = -1 if dtype.startswith("int") else 255
    expected = batch(np.where(ids < 50, ids, 255).astype(np.uint8))
    assert same(batch(np.where(ids < 50, ids, background).astype(dtype)), expected)
    assert (expected["segmentation_ids"] == 255).any() and (expected["segmentation_ids"] < 50).any()


def test_added_token_is_learned(make_processor):
    processor = make_processor("vqa")
    processor.tokenizer.add_tokens(["[DEFECT]"])
    number = processor.tokenizer.convert_tokens_to_ids("[DEFECT]")
    data = rows(2, text=["what is it"] * 2, suffix=["[DEFECT]", "a [DEFECT]"])
    assert (DataCollatorForPrismer(processor, depth_by_id)(data)["labels"] == number).sum(1).tolist() == [1, 1]


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -1.0, "much", [1.0, float("nan")]])
def test_wrong_weight_is_named(make_processor, weight):
    collator = DataCollatorForPrismer(make_processor(), depth_by_id)
    with pytest.raises(ValueError, match="weight of '1.png' is .*; a number of at least 0 is needed"):
        collator(rows(weight=[1.0, weight, 1.0]))


def test_column_that_only_some_rows_have_is_named(make_processor):
    data = rows(3, suffix=["a dog", None, "a cat"])
    with pytest.raises(ValueError, match="2 of 3 rows have 'suffix'"):
        DataCollatorForPrismer(make_processor(), depth_by_id)(data)


@pytest.mark.parametrize(
    "argument, value", [("expert_dropout", 1.0), ("expert_dropout", -0.1), ("texts_per_image", 0)]
)
def test_arguments_out_of_range_are_refused(make_processor, argument, value):
    with pytest.raises(ValueError, match=f"{argument} is {value}"):
        DataCollatorForPrismer(make_processor(), **{argument: value})
