import copy
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_prismer.processing.experts import CannyEdges, Expert, ExpertError, expert_from_dict


class Warmth(Expert):
    """A user's own expert: how red each pixel is, times a gain that its one weight holds."""

    type = "test_warmth"
    name, kind, channels = "warmth", "dense", 1
    model_id, license, size_in_bytes = "me/warmth", "mit", 4

    def __init__(self, gain=1.0):
        self.gain = gain
        self.loads = 0

    def load_model(self):
        self.loads += 1
        model = torch.nn.Conv2d(1, 1, 1, bias=False)
        torch.nn.init.constant_(model.weight, self.gain)
        return model.train()

    def run(self, images):
        red = [torch.from_numpy(np.array(image)[None, ..., 0]).to(self.model.weight.dtype) for image in images]
        return [self.model(pixels)[0].clamp(0, 255).byte() for pixels in red]


class Fussy(Expert):
    """Refuses images with a red first pixel, and batches of more than `most` images."""

    type = "test_fussy"
    name, kind, channels = "fussy", "dense", 1

    def __init__(self, most=8):
        self.most = most

    def run(self, images):
        if len(images) > self.most:
            raise MemoryError("too many")
        if any(image.getpixel((0, 0)) == (255, 0, 0) for image in images):
            raise ValueError("red")
        return [np.zeros((image.height, image.width), np.uint8) for image in images]


def blank_images(number, size=(6, 4)):
    return [Image.new("RGB", size, (10 * index, 0, 0)) for index in range(number)]


def test_a_custom_expert_runs_in_batches():
    expert = Warmth(gain=2.0)
    expert.batch_size = 2
    maps = expert(blank_images(5))
    assert [m[0, 0] for m in maps] == [0, 20, 40, 60, 80]
    assert all(m.shape == (4, 6) and m.dtype == np.uint8 for m in maps)
    assert expert.description == {"name": "warmth", "kind": "dense", "channels": 1}
    assert expert.num_images == 5
    assert expert.seconds > 0


def test_batches_are_no_larger_than_batch_size():
    sizes = []

    class Counting(Expert):
        name, kind, channels = "counting", "dense", 1
        batch_size = 3

        def run(self, images):
            sizes.append(len(images))
            return [np.zeros((4, 6), np.uint8) for _ in images]

    assert len(Counting()(blank_images(7))) == 7
    assert sizes == [3, 3, 1]


def test_weights_load_once_on_first_use_and_are_frozen():
    expert = Warmth()
    assert expert.model is None
    expert(blank_images(1))
    expert(blank_images(1))
    assert expert.loads == 1
    assert not expert.model.training
    assert not any(parameter.requires_grad for parameter in expert.model.parameters())
    expert.unload()
    assert expert.model is None
    expert(blank_images(1))
    assert expert.loads == 2


def test_experts_run_in_inference_mode():
    modes = []

    class Watching(Expert):
        name, kind, channels = "watching", "dense", 1

        def run(self, images):
            modes.append(torch.is_inference_mode_enabled())
            return [None]

    with torch.enable_grad():
        assert Watching()(blank_images(1)) == [None]
    assert modes == [True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_an_expert_can_be_moved_before_it_is_loaded(dtype):
    before, after = Warmth().to(dtype=dtype), Warmth()
    before.load()
    after.load()
    after.to("cpu", dtype)
    assert before.model.weight.dtype == after.model.weight.dtype == torch.bfloat16


def test_images_of_other_modes_become_rgb():
    assert Warmth()([Image.new("L", (2, 2), 7), Image.new("P", (2, 2))])[0].tolist() == [[7, 7], [7, 7]]


@pytest.mark.parametrize("images", [Image.new("RGB", (2, 2)), ["cat.jpg"], [np.zeros((2, 2, 3), np.uint8)]])
def test_only_lists_of_pil_images_are_accepted(images):
    with pytest.raises(TypeError, match="'warmth' takes a list of PIL images"):
        Warmth()(images)


def test_no_images_give_no_labels():
    assert Warmth()([]) == []


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_ids_of_an_expert_may_have_any_integer_type(dtype):
    ids = torch.tensor([[0, 1, -1]])

    class Classes(Expert):
        name, kind, channels, num_classes = "classes", "label", 8, 2

        def run(self, images):
            return [ids.to(dtype), {"ids": ids.to(dtype).numpy()}]

    bare, mapping = Classes()(blank_images(2, size=(3, 1)))
    for found in (bare, mapping["ids"]):
        assert found.dtype == np.uint8 and found.tolist() == [[0, 1, 255]]


def test_ids_of_another_type_are_refused():
    class Scores(Expert):
        name, kind, channels, num_classes = "scores", "label", 8, 2

        def run(self, images):
            return [np.zeros((1, 3), np.float32)]

    with pytest.raises(ExpertError, match="a label has float32 ids; integers are accepted"):
        Scores()(blank_images(1, size=(3, 1)))


def test_a_failure_names_the_expert_and_the_image():
    images = blank_images(5)
    images[3] = Image.new("RGB", (6, 4), "red")
    expert = Fussy()
    expert.batch_size = 2
    with pytest.raises(ExpertError, match=r"expert 'fussy' failed on image 3 \(6×4, RGB\): ValueError: red") as info:
        expert(images)
    assert (info.value.expert, info.value.image_index) == ("fussy", 3)
    assert isinstance(info.value.__cause__, ValueError)
    assert pickle.loads(pickle.dumps(info.value)).image_index == 3


def test_a_failure_of_only_the_batch_names_the_batch():
    with pytest.raises(ExpertError, match="images 0 to 2 together, though on none of them alone: MemoryError") as info:
        Fussy(most=1)(blank_images(3))
    assert info.value.image_index is None


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (np.zeros((4, 6)), "values of type float64"),
        (np.zeros((6, 4), np.uint8), r"shape \(6, 4\); needed is uint8 of shape \(4, 6\)"),
        (np.zeros((4, 6, 3), np.uint8), r"\(4, 6, 3\)"),
        ({"ids": np.zeros((4, 6), np.uint8)}, "a label without 'values'; it has ids"),
    ],
)
def test_a_label_that_does_not_fit_the_description_is_refused(label, message):
    class Wrong(Expert):
        name, kind, channels = "wrong", "dense", 1

        def run(self, images):
            return [label]

    with pytest.raises(ExpertError, match=message):
        Wrong()(blank_images(1))


def test_another_number_of_labels_than_images_is_refused():
    class Short(Expert):
        name, kind, channels = "short", "label", 64

        def run(self, images):
            return []

    with pytest.raises(ExpertError, match="run returned 0 labels for 1 images"):
        Short()(blank_images(1))


def test_descriptions_have_the_fields_of_the_config():
    class Objects(Expert):
        name, kind, channels, num_classes, instances = "detection", "label", 64, 80, True

    assert Objects().description == {
        "name": "detection",
        "kind": "label",
        "channels": 64,
        "num_classes": 80,
        "instances": True,
    }


def test_a_description_in_json_restores_the_expert():
    expert = Warmth(gain=3.0)
    expert.name, expert.batch_size = "heat", 4
    description = json.loads(json.dumps(expert.to_dict()))
    assert description == {"type": "test_warmth", "name": "heat", "batch_size": 4, "gain": 3.0}
    restored = expert_from_dict(description)
    assert isinstance(restored, Warmth)
    assert restored.to_dict() == description


def test_copies_and_pickles_carry_settings_without_the_model():
    expert = Warmth(gain=3.0)
    expert.load()
    for other in (copy.deepcopy(expert), pickle.loads(pickle.dumps(expert))):
        assert other.gain == 3.0
        assert other.model is None
        assert not other.is_loaded
    assert expert.is_loaded


def test_unknown_types_and_settings_are_refused_by_name():
    with pytest.raises(ValueError, match="type is 'sobel'; known are .*canny.*dexined.*rapidocr"):
        expert_from_dict({"type": "sobel"})
    with pytest.raises(ValueError, match="'test_warmth' has no setting gian; it has gain"):
        expert_from_dict({"type": "test_warmth", "gian": 2})


def test_two_classes_cannot_share_a_type():
    with pytest.raises(ValueError, match="the type 'canny' of .*Other is already that of CannyEdges"):

        class Other(Expert):
            type = "canny"

    assert isinstance(expert_from_dict({"type": "canny"}), CannyEdges)


def test_a_class_that_cannot_be_saved_is_a_clear_error():
    class Nameless(Expert):
        name, kind, channels = "nameless", "dense", 1

    class Forgetful(Warmth):
        type = "test_forgetful"

        def __init__(self, gain):
            pass

    with pytest.raises(ValueError, match="give the class a `type`"):
        Nameless().to_dict()
    with pytest.raises(ValueError, match="its setting 'gain' is not kept"):
        Forgetful(1.0).to_dict()


@pytest.mark.parametrize("kind", sorted(Expert.registry))
def test_every_expert_states_licence_size_and_source(kind):
    expert = Expert.registry[kind]
    if not kind.startswith("test_"):
        assert expert.license
        assert expert.source
        assert (expert.size_in_bytes > 0) == (expert.model_id is not None)
