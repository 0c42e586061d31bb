"""Result files have the format of the servers, are complete, and are written in one step."""

import json

import numpy as np
import pytest
import torch

from training_examples.result_files import write_caption_results, write_vqa_results


WRITERS = pytest.mark.parametrize(
    ("write", "id_name", "text_name"),
    [(write_caption_results, "image_id", "caption"), (write_vqa_results, "question_id", "answer")],
)


@WRITERS
def test_rows_have_keys_of_the_servers_and_keep_their_order(tmp_path, write, id_name, text_name):
    path = write(tmp_path / "new" / "results.json", [42, 7], ["yes", "a café"])
    assert json.loads(path.read_text()) == [
        {id_name: 42, text_name: "yes"},
        {id_name: 7, text_name: "a café"},
    ]


def test_coco_api_reads_the_captions(tmp_path, capsys):
    COCO = pytest.importorskip("pycocotools.coco").COCO
    # two rows of captions_val2014_fakecap_results.json, the example of the COCO API
    example = [
        {"image_id": 391895, "caption": "Man riding a motor bike on a dirt road on the countryside."},
        {"image_id": 522418, "caption": "A woman wearing a net on her head cutting a cake. "},
    ]
    annotations = {"images": [{"id": row["image_id"]} for row in example], "annotations": [], "info": {}}
    (tmp_path / "annotations.json").write_text(json.dumps(annotations))
    path = write_caption_results(
        tmp_path / "results.json", [row["image_id"] for row in example], [row["caption"] for row in example]
    )
    assert json.loads(path.read_text()) == example
    read = COCO(tmp_path / "annotations.json").loadRes(str(path))
    assert read.imgToAnns[522418][0]["caption"] == example[1]["caption"]


@pytest.mark.parametrize(
    ("ids", "written"),
    [
        (np.array([3, 4]), [3, 4]),
        (torch.tensor([3, 4]), [3, 4]),
        (["391895", "4"], [391895, 4]),
        (["cats/1.png", "007"], ["cats/1.png", "007"]),
    ],
)
def test_numeric_ids_are_written_as_numbers(tmp_path, ids, written):
    path = write_vqa_results(tmp_path / "results.json", ids, ["yes", "no"])
    assert [row["question_id"] for row in json.loads(path.read_text())] == written


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ids": [1, 2, 3]}, ValueError, "There are 3 {id}s and 2 {text}s"),
        ({"ids": [5, "5"]}, ValueError, "Each {id} must occur once; 1 occur more often: 5"),
        ({"ids": [1, 2.0]}, TypeError, "{id} is 2.0; it must be an integer or a str"),
        ({"ids": [1, None]}, TypeError, "{id} is None; it must be"),
        ({"ids": [1, True]}, TypeError, "{id} is True; it must be"),
        ({"texts": ["yes", None]}, TypeError, "The {text} of {id} 2 is None; it must be a str"),
        ({"expected_ids": [1, 2, 3]}, ValueError, "differ from expected_ids: 1 are missing: 3, 0 do not belong"),
        ({"expected_ids": [1]}, ValueError, "0 are missing, 1 do not belong: 2"),
    ],
)
@WRITERS
def test_bad_results_leave_the_file_unchanged(tmp_path, write, id_name, text_name, arguments, error, message):
    path = tmp_path / "results.json"
    path.write_text("before")
    arguments = {"ids": [1, 2], "texts": ["yes", "no"], "expected_ids": None} | arguments
    with pytest.raises(error, match=message.format(id=id_name, text=text_name)):
        write(path, arguments["ids"], arguments["texts"], arguments["expected_ids"])
    assert path.read_text() == "before"


def test_expected_ids_can_have_any_order_and_form(tmp_path):
    path = write_vqa_results(tmp_path / "results.json", [1, 2], ["yes", "no"], expected_ids=iter(["2", "1"]))
    assert len(json.loads(path.read_text())) == 2


def test_interrupted_writing_keeps_the_old_file(tmp_path, monkeypatch):
    path = write_vqa_results(tmp_path / "results.json", [1], ["yes"])
    before = path.read_text()

    def fail(content, file):
        file.write("[{")
        raise KeyboardInterrupt

    monkeypatch.setattr(json, "dump", fail)
    with pytest.raises(KeyboardInterrupt):
        write_vqa_results(path, [1], ["no"])
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]
