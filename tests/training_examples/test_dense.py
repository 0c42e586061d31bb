"""Dense tasks: readers on small files in the published layouts, measures against their definitions, and Δm."""

import json

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from sklearn.metrics import jaccard_score

from dense.measures import MaxF, MeanAngle, MeanIoU, Result, Rmse, delta_m
from dense.multi_task_data import PART_OF, open_multi_task_data


HEIGHT, WIDTH = 6, 8


def save_png(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def structs(rows, names):
    """MATLAB's array of structs, 1×n."""
    array = np.empty((1, len(rows)), dtype=[(name, object) for name in names])
    for i, row in enumerate(rows):
        array[0, i] = row
    return array


def annotation(objects):
    """The annotation of PASCAL-Part: objects of (class, number of the class, mask, parts of (name, mask))."""
    rows = [
        (name, number, mask, structs(parts, ("part_name", "mask")) if parts else np.zeros((0, 0)))
        for name, number, mask, parts in objects
    ]
    things = structs(rows, ("class", "class_ind", "mask", "parts"))
    return {"anno": structs([("image", things)], ("imname", "objects"))}


def block(top, left):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[top : top + 2, left : left + 2] = 1
    return mask


@pytest.fixture
def pascal(tmp_path):
    """Two images: a person in front of a wall, and one without a person."""
    for split, name in (("train", "first"), ("val", "second")):
        path = tmp_path / f"ImageSets/Context/{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name}\n")
    labels = np.zeros((HEIGHT, WIDTH), np.uint16)
    labels[:, 4:] = 427  # wall
    normals = np.full((HEIGHT, WIDTH, 3), 127, np.uint8)
    normals[..., 2] = 255
    semantic = np.full((HEIGHT, WIDTH), 255, np.uint8)
    semantic[:2] = 15
    saliency = np.zeros((HEIGHT, WIDTH), np.uint8)
    saliency[0] = 200
    person = ("person", 15, np.ones((HEIGHT, WIDTH)), [("hair", block(0, 0)), ("torso", block(2, 0))])
    dog = ("dog", 12, np.ones((HEIGHT, WIDTH)), [("torso", block(0, 4))])
    second = ("person", 15, block(4, 6), [("lfoot", block(4, 6))])
    for name, source, objects in (("first", "VOC12", [person, dog, second]), ("second", "pascal-context", [dog])):
        save_png(tmp_path / f"JPEGImages/{name}.jpg", np.zeros((HEIGHT, WIDTH, 3), np.uint8))
        save_png(tmp_path / f"semseg/{source}/{name}.png", semantic)
        save_png(tmp_path / f"sal_distill/{name}.png", saliency)
        save_png(tmp_path / f"normals_distill/{name}.png", normals)
        for folder, content in (("human_parts", annotation(objects)), ("pascal-context/trainval", None)):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            savemat(tmp_path / folder / f"{name}.mat", content or {"LabelMap": labels})
    (tmp_path / "json").mkdir()
    (tmp_path / "json/nyu_classes.json").write_text(json.dumps(["wall", "unknown", "blinds"]))
    (tmp_path / "json/context_classes.json").write_text(
        json.dumps({"wall": 427, "unknown": 1, "tvmonitor": 2, "sky": 3})
    )
    return tmp_path


@pytest.fixture
def nyud(tmp_path):
    (tmp_path / "gt_sets").mkdir()
    (tmp_path / "gt_sets/train.txt").write_text("0001\n0002\n")
    (tmp_path / "depth").mkdir()
    for name in ("0001", "0002"):
        save_png(tmp_path / f"images/{name}.png", np.full((HEIGHT, WIDTH, 3), 9, np.uint8))
        classes = np.zeros((HEIGHT, WIDTH), np.uint8)
        classes[0, :3] = 1, 40, 0
        save_png(tmp_path / f"segmentation/{name}.png", classes)
        normals = np.full((HEIGHT, WIDTH, 3), 127, np.uint8)
        normals[0, 0] = 255, 127, 127
        save_png(tmp_path / f"normals/{name}.png", normals)
        edges = np.zeros((HEIGHT, WIDTH), np.uint8)
        edges[2] = 255
        save_png(tmp_path / f"edge/{name}.png", edges)
        depth = np.full((HEIGHT, WIDTH), 2.5)
        depth[0, :3] = np.nan, np.inf, -np.inf
        np.save(tmp_path / f"depth/{name}.npy", depth)
    return tmp_path


# ---- readers


def test_pascal_context_has_five_tasks(pascal):
    data = open_multi_task_data(pascal, "pascal_context")
    assert len(data) == 1 and [task.name for task in data.tasks] == [
        *("semantic", "parts", "saliency", "normals", "edges")
    ]
    sample = data[0]
    assert sample.name == "first" and sample.image.size == (WIDTH, HEIGHT)
    assert sample.maps["semantic"][:2].tolist() == [[15] * WIDTH] * 2 and (sample.maps["semantic"][2:] == 255).all()
    assert sample.maps["saliency"].sum() == WIDTH


def test_parts_are_those_of_all_persons(pascal):
    expected = block(0, 0) * 1 + block(2, 0) * 2 + block(4, 6) * 6  # the dog's torso is none
    assert np.array_equal(open_multi_task_data(pascal, "pascal_context")[0].maps["parts"], expected)
    assert not open_multi_task_data(pascal, "pascal_context", "val")[0].maps["parts"].any()
    assert set(PART_OF.values()) == set(range(1, 7)) and len(PART_OF) == 24


def test_edges_are_the_borders_of_labels(pascal):
    edges = open_multi_task_data(pascal, "pascal_context")[0].maps["edges"]
    assert edges[:, 3].all() and edges.sum() == HEIGHT


def test_normals_of_pascal_are_known_in_indoor_classes(pascal):
    normals = open_multi_task_data(pascal, "pascal_context")[0].maps["normals"]
    assert not normals[:, :4].any()
    np.testing.assert_allclose(np.linalg.norm(normals[:, 4:], axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose(normals[0, 4], [0, 0, 1], atol=0.01)


def test_nyud_has_four_tasks(nyud):
    data = open_multi_task_data(nyud, "nyud")
    assert len(data) == 2 and [sample.name for sample in data[:]] == ["0001", "0002"]
    maps = data[1].maps
    assert maps.keys() == {"semantic", "depth", "normals", "edges"}
    assert maps["semantic"][0, :4].tolist() == [0, 39, 255, 255]
    assert not maps["depth"][0, :3].any() and maps["depth"][1, 1] == 2.5 and maps["depth"].dtype == np.float32
    np.testing.assert_allclose(maps["normals"][0, 0], [1, 0, 0], atol=0.01)
    assert not maps["normals"][1, 1].any()  # of length zero: not known
    assert maps["edges"][2].all() and maps["edges"].sum() == WIDTH


def test_only_the_wanted_tasks_are_read(nyud):
    for path in nyud.glob("normals/*"):
        path.unlink()
    data = open_multi_task_data(nyud, "nyud", tasks=["depth"])
    assert data[0].maps.keys() == {"depth"}
    with pytest.raises(FileNotFoundError, match="has no normals/0001.png"):
        open_multi_task_data(nyud, "nyud")[0]


def test_faults_are_named(nyud, pascal):
    with pytest.raises(ValueError, match="no layout 'coco'; there are pascal_context, nyud"):
        open_multi_task_data(nyud, "coco")
    with pytest.raises(ValueError, match="no task 'parts'; there are semantic, depth"):
        open_multi_task_data(nyud, "nyud", tasks=["parts"])
    with pytest.raises(FileNotFoundError, match="has no gt_sets/val.txt"):
        open_multi_task_data(nyud, "nyud", "val")
    save_png(nyud / "edge/0001.png", np.zeros((3, 4), np.uint8))
    with pytest.raises(ValueError, match="0001: the map of 'edges' has 4×3 pixels; its image has 8×6"):
        open_multi_task_data(nyud, "nyud")[0]
    savemat(pascal / "human_parts/first.mat", annotation([("person", 15, block(0, 0), [("wing", block(0, 0))])]))
    with pytest.raises(ValueError, match="first: a person has the unknown part 'wing'"):
        open_multi_task_data(pascal, "pascal_context")[0]


def test_pickled_depth_is_not_loaded(nyud):
    np.save(nyud / "depth/0001.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        open_multi_task_data(nyud, "nyud", tasks=["depth"])[0]


# ---- measures


def test_mean_iou_is_the_mean_jaccard_index():
    random = np.random.default_rng(0)
    truth, predicted = random.integers(0, 5, (2, 3, 10, 12))
    truth[truth == 3], predicted[predicted == 3] = 255, 4  # class 3 is nowhere
    measure = MeanIoU(6)
    for own, true in zip(predicted, truth):
        measure.add(own, true)
    kept = truth != 255
    assert measure.result() == pytest.approx(
        jaccard_score(truth[kept], predicted[kept], average="macro", labels=[0, 1, 2, 4])
    )
    assert np.isnan(MeanIoU(2).result())


def test_classes_that_do_not_exist_are_named():
    right = np.array([[0, 1], [1, 255]])
    MeanIoU(2).add(np.array([[0, 1], [1, 7]]), right)  # the last pixel is not measured
    with pytest.raises(ValueError, match="predicted has the class 7; accepted are 0 to 1"):
        MeanIoU(2).add(np.array([[0, 7], [1, 1]]), right)
    with pytest.raises(ValueError, match="true has the class 5; accepted are 0 to 1, and 255"):
        MeanIoU(2).add(np.zeros((2, 2), int), np.array([[0, 5], [1, 1]]))


def test_max_f_finds_the_best_threshold():
    true = np.array([[1, 1, 0, 0, 255]])
    measure = MaxF()
    measure.add(np.array([[0.9, 0.4, 0.6, 0.1, 0.99]]), true)
    precision, recall = 1.0, 0.5  # above 0.6; from 0.4 on, they are 2/3 and 1
    other = 1.3 * (2 / 3) / (0.3 * 2 / 3 + 1)
    assert measure.result() == pytest.approx(max(1.3 * precision * recall / (0.3 * precision + recall), other))
    measure = MaxF(beta_squared=1.0)
    measure.add(np.array([[0.9, 0.4, 0.6, 0.1, 0.99]]), true)
    assert measure.result() == pytest.approx(0.8)
    assert np.isnan(MaxF().result())


def test_mean_angle_is_in_degrees_over_known_normals():
    true = np.array([[[0, 0, 2.0], [0, 0, 1], [0, 0, 0]]])
    predicted = np.array([[[0, 0, 5.0], [0, 3, 0], [1, 0, 0]]])
    measure = MeanAngle()
    measure.add(predicted, true)
    assert measure.result() == pytest.approx(45)


def test_rmse_leaves_out_unknown_depth():
    measure = Rmse(least=0.0)
    measure.add(np.array([[2.0, 4.0, 9.0]]), np.array([[1.0, 1.0, 0.0]]))
    measure.add(np.array([[3.0]]), np.array([[np.nan]]))
    assert measure.result() == pytest.approx((10 / 2) ** 0.5)


def test_measures_refuse_other_shapes():
    with pytest.raises(ValueError, match=r"has the shape \(2, 2\); the true one has \(2, 3\)"):
        MeanIoU(2).add(np.zeros((2, 2), int), np.zeros((2, 3), int))


@pytest.mark.parametrize("layout", ["pascal_context", "nyud"])
def test_perfect_maps_have_the_best_results(layout, request):
    data = open_multi_task_data(request.getfixturevalue(layout.split("_")[0]), layout)
    expected = {"semantic": 1, "parts": 1, "saliency": 1, "normals": 0, "depth": 0}
    for task in data.tasks:
        if task.new_measure is not None:
            measure, true = task.new_measure(), data[0].maps[task.name]
            measure.add(np.where(true == 255, 0, true) if task.is_classes else true, true)
            assert measure.result() == pytest.approx(expected[task.name], abs=1e-4)
            assert measure.lower_is_better == (expected[task.name] == 0)


def test_delta_m_is_the_mean_signed_gain():
    single = {"semantic": Result(0.5, False), "depth": Result(0.4, True)}
    multi = {"semantic": Result(0.6, False), "depth": Result(0.5, True)}
    assert delta_m(multi, single) == pytest.approx((20 - 25) / 2)
    assert delta_m(single, single) == 0
    with pytest.raises(ValueError, match="single-task models semantic; the same ones are needed"):
        delta_m(multi, {"semantic": single["semantic"]})
