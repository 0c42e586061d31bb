"""The memory of experts is measured with models of the stated sizes."""

import json

import pytest
import torch

from benchmarks import expert_memory
from modeling_prismer.processing.experts import (
    CannyEdges,
    ExpertSuite,
    NormalsFromDepth,
    PretrainedExpert,
    open_vocabulary,
)
from modeling_prismer.processing.experts.architectures import ARCHITECTURES
from modeling_prismer.processing.experts.depth import DepthEstimator
from modeling_prismer.processing.experts.detection import ObjectDetector
from modeling_prismer.processing.experts.normal import NormalEstimator
from modeling_prismer.processing.experts.open_vocabulary import OpenVocabularyDetector
from modeling_prismer.processing.experts.segmentation import SemanticSegmentation, UniversalSegmentation
from tests.processing.experts import models


KNOWN = {
    name: known.size_in_bytes
    for expert in (
        DepthEstimator,
        NormalEstimator,
        UniversalSegmentation,
        SemanticSegmentation,
        ObjectDetector,
        OpenVocabularyDetector,
    )
    for name, known in expert.known_models.items()
}


@pytest.mark.parametrize("model_id", ARCHITECTURES)
def test_models_have_the_stated_size(model_id):
    with torch.device("meta"):
        model, _ = ARCHITECTURES[model_id]()
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert size == pytest.approx(KNOWN[model_id], rel=0.02)


@pytest.mark.parametrize("suite", ["published", "fast", "commercial"])
def test_every_model_of_a_suite_can_be_measured(suite):
    experts = ExpertSuite.from_name(suite).values()
    assert {expert.model_id for expert in experts if isinstance(expert, PretrainedExpert)} <= ARCHITECTURES.keys()


def test_peak_memory_is_measured_for_several_batch_sizes(monkeypatch, tmp_path, capsys):
    suite = ExpertSuite([CannyEdges(), NormalsFromDepth()])
    monkeypatch.setattr(ExpertSuite, "from_name", lambda name: suite)
    monkeypatch.setattr("sys.argv", ["expert_memory.py", "--image_size", "64", "--out", str(tmp_path)])
    expert_memory.main()
    edge, normal = json.loads((tmp_path / "result.json").read_text())
    assert edge["peaks"]["single"]["1"] > 64 * 64 * 4 and normal["peaks"]["single"]["32"] > 64 * 64 * 3 * 4
    assert "| edge: CannyEdges | 0.0 M | 0 MB | 32, the default |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("expert", "make"),
    [
        (DepthEstimator, models.depth_anything),
        (NormalEstimator, models.tipsv2),
        (UniversalSegmentation, models.eomt),
        (UniversalSegmentation, models.mask2former),
        (ObjectDetector, models.dfine),
        (OpenVocabularyDetector, models.grounding_dino),
    ],
)
def test_counts_without_computing_are_those_of_a_real_run(expert, make, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "tiny", make)
    monkeypatch.setattr(expert, "batch_size", 2)  # the only one that is measured, in one precision
    monkeypatch.setattr(expert, "half_on_cuda", False)
    monkeypatch.setattr(open_vocabulary, "coco_names", lambda: ["cat", "dog"])  # one prompt
    real, fake = (expert_memory.measure(expert(model_id="tiny"), 96, device, []) for device in ("cpu", "fake"))
    assert real["weights"]["single"] == fake["weights"]["single"]
    assert fake["peaks"]["single"] == pytest.approx(real["peaks"]["single"], rel=0.15)
    assert fake["peaks"]["single"][2] > 1.1 * fake["weights"]["single"]


def test_half_precision_needs_less_memory(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "tiny", models.depth_anything)
    monkeypatch.setattr(DepthEstimator, "batch_size", 2)
    result = expert_memory.measure(DepthEstimator(model_id="tiny"), 96, "fake", [])
    assert result["weights"]["half"] < 0.8 * result["weights"]["single"]
    assert result["peaks"]["half"][2] < 0.8 * result["peaks"]["single"][2]


def test_nothing_is_computed(monkeypatch):
    """A network whose weights no machine has."""

    class Huge(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(1, 3, 1, 1))

        def forward(self, pixels):
            return pixels[:, :, :1] * self.weight.expand(1, 3, 1, 2**40).contiguous()

    expert = NormalsFromDepth()
    expert.model, expert.is_loaded = Huge(), True
    expert.run = lambda images, depth: expert.model(torch.zeros(1, 3, 2, 1)).numpy()
    peak = expert_memory.peak_bytes(expert, [expert_memory.Image.new("RGB", (8, 8))], "fake")
    assert peak > 2 * 3 * 4 * 2**40


def test_network_that_reads_values_is_named():
    class Reading(torch.nn.Module):
        def forward(self, pixels):
            return pixels[: int(pixels.sum())]

    expert = NormalsFromDepth()
    expert.model, expert.is_loaded = Reading(), True
    expert.run = lambda images, depth: expert.model(torch.ones(4))
    with pytest.raises(ValueError, match="NormalsFromDepth: the network reads values of its tensors; count it with"):
        expert_memory.peak_bytes(expert, [expert_memory.Image.new("RGB", (8, 8))], "fake")


def test_table_says_what_fits_into_4_gb():
    def result(peak):
        sizes = {"weights": {"half": 10**9}, "peaks": {"single": {1: peak}, "half": {1: peak}}}
        return {"expert": "an expert", "parameters": 1, "batch": 1, "half_on_cuda": True, **sizes}

    lines = expert_memory.table([result(3 * 10**9), result(2 * 10**9)]).splitlines()
    assert lines[-2:] == [
        "- one expert at a time: 3,000 MB at most, which fits",
        "- all experts loaded: 4,000 MB at most, which does not fit",
    ]
