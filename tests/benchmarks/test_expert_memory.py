"""The memory of experts is measured with models of the stated sizes."""

import json

import pytest
import torch

from benchmarks import expert_memory
from modeling_prismer.processing.experts import CannyEdges, ExpertSuite, NormalsFromDepth, PretrainedExpert
from modeling_prismer.processing.experts.architectures import ARCHITECTURES
from modeling_prismer.processing.experts.depth import DepthEstimator
from modeling_prismer.processing.experts.detection import ObjectDetector
from modeling_prismer.processing.experts.normal import NormalEstimator
from modeling_prismer.processing.experts.open_vocabulary import OpenVocabularyDetector
from modeling_prismer.processing.experts.segmentation import SemanticSegmentation, UniversalSegmentation


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
