import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES

from modeling_prismer.processing.experts import (
    ExpertSuite,
    OpenVocabularyDetector,
    expert_from_dict,
    paint_boxes,
)
from modeling_prismer.processing.experts_processor import ExpertsProcessor
from modeling_prismer.processing.image_processing_prismer import PrismerImageProcessor

from .models import (
    detr,
    grounding_dino,
    omdet_turbo,
    original_grounding_dino,
    owlv2,
    owlvit,
    photograph,
    save,
)


NAMES = ["cat", "Traffic_Light", "hot dog", "cat", "e.g. a"]


FAMILIES = {
    "mm-grounding-dino": grounding_dino,  # LLMDet as well
    "grounding-dino": original_grounding_dino,
    "owlv2": owlv2,
    "owlvit": owlvit,
    "omdet-turbo": omdet_turbo,
}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return save(FAMILIES[request.param], tmp_path_factory.mktemp("open"))


@pytest.fixture(scope="module")
def grounding(tmp_path_factory):
    return save(grounding_dino, tmp_path_factory.mktemp("grounding"))


@pytest.fixture(scope="module")
def omdet(tmp_path_factory):
    return save(omdet_turbo, tmp_path_factory.mktemp("omdet"))


def test_every_family_of_transformers_is_tested():
    assert set(MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES) == set(FAMILIES)


def detector(folder, names=NAMES, **settings):
    return OpenVocabularyDetector(names, folder, **{"min_score": 0.0, "same_object": 1.0, **settings})


def test_a_label_has_instances_of_the_given_names(folder):
    (label,) = detector(folder)([photograph()])
    number = len(label["classes"])
    assert number > 0
    assert label["ids"].shape == (64, 96)
    assert set(np.unique(label["ids"])) <= {*range(number), 255}
    assert set(label["classes"]) <= {0, 1, 2, 4}  # the second cat is the first class


def test_boxes_and_scores_are_those_of_the_model(folder):
    image, names = photograph(), ["cat", "hot dog", "ant"]
    (found,) = find_one(detector(folder, names), image)
    processor, model = (
        AutoProcessor.from_pretrained(folder),
        AutoModelForZeroShotObjectDetection.from_pretrained(folder),
    )
    family = model.config.model_type
    text = {"omdet-turbo": names, "owl": [f"a photo of a {name}" for name in names]}
    length = {"omdet-turbo": {"max_length": 48}, "owl": {"padding": "max_length", "max_length": 24}}
    kind = "owl" if family.startswith("owl") else family
    inputs = processor(
        images=image, text=text.get(kind, "cat. hot dog. ant."), return_tensors="pt", **length.get(kind, {})
    )
    with torch.no_grad():
        outputs = model.eval()(**inputs)
    if family == "omdet-turbo":
        logits, pred_boxes = outputs.decoder_class_logits, outputs.decoder_coord_logits
    else:
        logits, pred_boxes = outputs.logits, outputs.pred_boxes
    scores = logits[0].sigmoid()
    if "grounding" in family:
        tokens = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
        stops = [0, *(place for place, token in enumerate(tokens) if token == ".")]
        scores = torch.stack([scores[:, a + 1 : b].mean(1) for a, b in zip(stops, stops[1:])], dim=1)
    expected, classes = scores.max(1)
    order = expected.argsort(descending=True)
    assert np.allclose(found.scores, expected[order], atol=1e-5)
    assert found.classes[:5].tolist() == classes[order][:5].tolist()
    side = torch.tensor([96, 96, 96, 96] if family == "owlv2" else [96, 64, 96, 64])  # OWLv2 pads to a square
    center, size = pred_boxes[0][order].split(2, dim=1)
    assert np.allclose(found.boxes, torch.cat([center - size / 2, center + size / 2], dim=1) * side, atol=1e-3)


def test_omdet_turbo_finds_what_its_processor_finds(omdet):
    image, names = photograph(), ["cat", "hot dog", "ant"]
    (found,) = find_one(detector(omdet, names), image)
    processor, model = AutoProcessor.from_pretrained(omdet), AutoModelForZeroShotObjectDetection.from_pretrained(omdet)
    with torch.no_grad():
        outputs = model.eval()(**processor(image, text=names, max_length=48, return_tensors="pt"))
    (expected,) = processor.post_process_grounded_object_detection(
        outputs, threshold=0.0, nms_threshold=1.0, target_sizes=[(64, 96)], max_num_det=60
    )  # each query has a row for each name
    queries = outputs.decoder_class_logits[0].sigmoid()
    best = torch.isin(expected["scores"], queries.max(1).values)
    assert best.sum() == len(found.scores) == 20
    scores, order = expected["scores"][best].sort(descending=True)
    assert np.allclose(found.scores, scores, atol=1e-5)
    assert found.classes.tolist() == expected["labels"][best][order].tolist()
    boxes = np.clip(found.boxes, 0, (96, 64, 96, 64))
    assert np.allclose(boxes, expected["boxes"][best][order], atol=1e-3)


def test_omdet_turbo_reads_the_names_in_tasks(omdet):
    names = [f"thing {index}" for index in range(30)]
    expert = detector(omdet, names)
    expert.load()
    assert np.concatenate([prompt.classes for prompt in expert._prompts]).tolist() == list(range(30))
    for prompt in expert._prompts:
        (task,) = expert._tokenizer.batch_decode(prompt.inputs["tasks_input_ids"])
        last = names[prompt.classes[-1]].replace("thing ", "thing")
        assert "<|endoftext|>" in task and last.replace(" ", "") in task.replace(" ", "")  # nothing is cut off
        assert prompt.inputs["classes_structure"].tolist() == [len(prompt.classes)]
    assert len(expert._prompts) > 1
    with pytest.raises(ValueError, match="the name 'x{60}' has 61 tokens; the model reads at most 39"):
        detector(omdet, ["x" * 60]).load()


def test_omdet_turbo_forgets_its_texts_when_it_moves(omdet):
    expert = detector(omdet).to(dtype="bfloat16")
    expert([photograph()])
    assert expert.model.language_cache_class.cache and expert.model.language_cache_prompt.cache
    expert.to(dtype="float32")
    assert not expert.model.language_cache_class.cache and not expert.model.language_cache_prompt.cache
    assert len(expert([photograph()])[0]["classes"]) > 0


def find_one(expert, image):
    expert.load()
    with torch.inference_mode():
        return expert.find([image])


def test_many_names_are_read_in_parts_within_the_limit(grounding):
    names = [f"thing {index}" for index in range(722)]
    expert = detector(grounding, names)
    expert.load()
    classes = np.concatenate([prompt.classes for prompt in expert._prompts])
    assert classes.tolist() == list(range(722))
    assert max(prompt.inputs["input_ids"].shape[1] for prompt in expert._prompts) <= 40
    assert expert.description["num_classes"] == 722
    # every name can be found, and has the score that it has in its own text
    few = detector(grounding, [names[index] for index in expert._prompts[-1].classes])
    (last,) = find_one(few, photograph())
    expert._prompts = expert._prompts[-1:]
    (found,) = find_one(expert, photograph())
    assert np.array_equal(found.scores, last.scores)
    assert (found.classes - 722 + few.num_classes).tolist() == last.classes.tolist()


def test_a_name_that_is_too_long_is_refused(grounding):
    with pytest.raises(ValueError, match="the name 'x{60}' has 61 tokens; the model reads at most 38"):
        detector(grounding, ["cat", "x" * 60]).load()


def test_the_parts_of_the_names_are_merged(grounding):
    names = ["cat", "thing thirty four eight", "something else here", "dog"]
    expert = detector(grounding, names)
    expert.load()
    assert len(expert._prompts) > 1
    (together,) = find_one(expert, photograph())
    alone = []
    for prompt in expert._prompts:
        (part,) = find_one(detector(grounding, [names[index] for index in prompt.classes]), photograph())
        alone += list(zip(part.scores.tolist(), prompt.classes[part.classes].tolist()))
    assert sorted(zip(together.scores.tolist(), together.classes.tolist())) == sorted(alone)
    # the same object under two names counts once
    expert.same_object = 0.5
    (distinct,) = find_one(expert, photograph())
    assert 0 < len(distinct.scores) < len(together.scores)
    assert distinct.scores[0] == together.scores.max()
    (left, top, right, bottom), others = distinct.boxes[0], distinct.boxes[1:]
    sides = np.minimum((right, bottom), others[:, 2:]) - np.maximum((left, top), others[:, :2])
    common = np.clip(sides, 0, None).prod(1)
    areas = (right - left) * (bottom - top) + np.prod(others[:, 2:] - others[:, :2], axis=1)
    assert (common / (areas - common)).max() <= 0.5


def test_boxes_are_painted_as_those_of_other_detectors(folder):
    expert, image = detector(folder, same_object=0.7), photograph()
    depth = np.tile(np.arange(96, dtype=np.uint8), (64, 1))
    (label,) = expert([image], depth=[depth])
    (found,) = find_one(expert, image)
    ids, kept = paint_boxes(found.boxes, found.scores, image.size, depth)
    assert np.array_equal(label["ids"], ids)
    assert label["classes"] == found.classes[kept].tolist()
    assert expert.uses == ("depth",)


def test_only_sure_boxes_are_kept(folder):
    (found,) = find_one(detector(folder), photograph())
    score = float(np.median(found.scores))
    (sure,) = find_one(detector(folder, min_score=score), photograph())
    assert 0 < len(sure.scores) < len(found.scores)
    assert sure.scores.min() >= score
    assert OpenVocabularyDetector().min_score == 0.5  # as for the published labels


def test_a_batch_of_mixed_sizes_equals_one_by_one(folder):
    expert = detector(folder)
    images = [photograph(size, seed) for seed, size in enumerate([(96, 64), (64, 96), (96, 64), (30, 40)])]
    for image, label in zip(images, expert(images)):
        (alone,) = expert([image])
        assert label["ids"].shape == (image.height, image.width)
        assert sorted(label["classes"]) == sorted(alone["classes"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_it_runs_in_half_precision(folder, dtype):
    (label,) = detector(folder).to(dtype=dtype)([photograph()])
    assert len(label["classes"]) > 0


def test_names_are_saved_and_restored_with_the_suite(folder, tmp_path):
    expert = detector(folder)
    assert json.loads(json.dumps(expert.to_dict()))["class_names"] == NAMES
    assert expert_from_dict(expert.to_dict()).class_names == NAMES
    ExpertSuite([expert]).save_pretrained(tmp_path)
    restored = ExpertSuite.from_pretrained(tmp_path)
    assert restored.class_names == {"detection": NAMES}
    image = photograph()
    assert np.array_equal(restored([image])[0]["detection"]["ids"], expert([image])[0]["ids"])


def test_other_names_can_be_set_after_loading(folder):
    expert = detector(folder)
    expert([photograph()])
    expert.class_names = ["only this"]
    assert set(expert([photograph()])[0]["classes"]) == {0}
    assert expert.num_classes == 1


@pytest.mark.parametrize("names", [[], "cat", ["cat", " "], ["cat", 5], ["."]])
def test_names_that_are_none_are_refused(names):
    with pytest.raises(ValueError, match="class_names is .*; a list of names, none of them empty, is needed"):
        OpenVocabularyDetector(names)


def test_by_default_it_finds_the_objects_of_coco():
    expert = OpenVocabularyDetector()
    assert (expert.num_classes, expert.class_names[0], expert.class_names[-1]) == (80, "person", "toothbrush")
    assert not expert.is_loaded


def test_a_processor_gives_the_names_of_its_configuration():
    processor = object.__new__(ExpertsProcessor)  # without a tokenizer
    experts = [{"name": "detection", "kind": "label", "channels": 64, "num_classes": 2, "instances": True}]
    processor.image_processor = PrismerImageProcessor(experts=[{**experts[0], "class_names": ["lamp", "sofa"]}])
    processor.experts = [OpenVocabularyDetector()]
    assert processor.experts["detection"].class_names == ["lamp", "sofa"]
    assert processor.experts.descriptions == experts
    processor.experts = [OpenVocabularyDetector(["cat", "dog"])]
    assert processor.experts["detection"].class_names == ["cat", "dog"]
    processor.experts = None


def test_a_detector_without_names_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is of the family detr; accepted are grounding-dino, mm-grounding-dino, owl"):
        detector(save(detr, tmp_path)).load()
