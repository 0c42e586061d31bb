"""Two processes give the results of one: loss, training, evaluation, labelling, sharding, files for accelerate."""

import json
import re
import shutil
from collections import Counter

import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from datasets import Dataset
from safetensors.torch import load_file

import modeling_prismer.modeling_prismer as modeling
from modeling_prismer import PrismerForConditionalGeneration
from modeling_prismer.processing.labels import LabelStore
from tests.modeling_prismer.tiny import tiny_model
from tests.training_examples import distributed_sharding, distributed_training
from tests.training_examples.distributed_launch import launch


STEP = {"rtol": 0, "atol": 2e-3}  # relative to the largest gradient; the order of float32 sums differs


@pytest.fixture(scope="module")
def two(tmp_path_factory, checkpoint, image_folder):
    """The folder that two processes wrote into."""
    folder = tmp_path_factory.mktemp("two")
    assert launch(distributed_training.in_two_processes, folder, checkpoint, image_folder, number=2) == [0, 0]
    return folder


@pytest.fixture(scope="module")
def facts(two):
    return [json.loads((two / f"facts_{process}.json").read_text()) for process in range(2)]


@pytest.fixture(scope="module")
def expected_gradients():
    """The gradients of the mean of the weighted losses, in one batch and without Trainer."""
    model = distributed_training.model_without_batch_statistics().train()
    model(**distributed_training.stacked(distributed_training.samples())).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The trainer and the losses of one process."""
    return distributed_training.training_run(tmp_path_factory.mktemp("one"), 4)


def assert_same_gradients(gradients, expected):
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(gradients[name] / scale, gradient / scale, **STEP)


# ---- the loss ----


@pytest.mark.parametrize(
    ("batch_size", "accumulated"), [(8, 1), (4, 2), (5, 2), (3, 3)], ids=["8", "4+4", "5+3", "3+3+2"]
)
def test_accumulated_gradients_equal_those_of_one_batch(tmp_path, expected_gradients, batch_size, accumulated):
    assert_same_gradients(distributed_training.gradients(tmp_path, batch_size, accumulated), expected_gradients)


@pytest.mark.parametrize("split", ["even", "accumulated", "uneven"])  # 4 | 4, 2+2 | 2+2, 5 | 3
def test_gradients_of_two_processes_equal_those_of_one_batch(two, expected_gradients, split):
    for process in range(2):
        assert_same_gradients(load_file(two / f"{split}_{process}.safetensors"), expected_gradients)


# ---- training ----


def test_two_processes_use_distributed_data_parallel(facts):
    for of_process in facts:
        assert of_process["processes"] == 2
        for run in ("plain", "checkpointing"):
            assert of_process[run]["wrapper"] == "DistributedDataParallel"
            assert not of_process[run]["find_unused_parameters"]
        assert of_process["checkpointing"]["checkpointing"] and not of_process["plain"]["checkpointing"]


@pytest.mark.parametrize("run", ["plain", "checkpointing"])
def test_two_processes_reach_the_loss_of_one(two, facts, one, run):
    """One of the processes has no depth maps; it must train the stem nevertheless."""
    trainer, notes = one
    assert len(notes.losses) == 4 and notes.losses[3] < notes.losses[1]
    weights = [load_file(two / f"{run}_{process}.safetensors") for process in range(2)]
    for process in range(2):
        assert facts[process][run]["losses"] == pytest.approx(notes.losses, rel=1e-4)
        for name, parameter in trainer.model.named_parameters():
            torch.testing.assert_close(weights[process][name], parameter.data, rtol=0, atol=1e-4)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_batch_statistics_stay_finite_without_an_expert(two, facts):
    start = dict(distributed_training.tiny_model().named_buffers())
    for process in range(2):
        buffers = load_file(two / f"buffers_{process}.safetensors")
        assert torch.isfinite(torch.tensor(facts[process]["batch_statistics"])).all()
        assert all(torch.isfinite(buffer).all() for buffer in buffers.values())
        name = "model.vision_model.expert_stems.depth.norms.0.running_mean"
        assert not torch.equal(buffers[name], start[name])


def test_processes_share_the_rows_of_a_stream(facts):
    batches = [of_process["stream"][0] for of_process in facts]
    assert batches[0] == [[0, 1], [4, 5], [8, 9]]
    assert batches[1] == [[2, 3], [6, 7], [10, 0]]  # padded
    assert facts[0]["stream"][1] == facts[1]["stream"][1] == 3


def test_shortest_share_of_a_stream_ends_the_epoch(facts):
    """Each process reads its own files of a stream: one has four batches, the other two."""
    for of_process in facts:
        assert of_process["files"][1] == 2 * 2  # steps, in two passes


# ---- evaluation ----


@pytest.mark.parametrize("way", ["generated", "ranked"])
def test_two_processes_predict_each_row_once_and_in_order(tmp_path, facts, checkpoint, image_folder, way):
    candidates = distributed_training.CANDIDATES if way == "ranked" else None
    expected = distributed_training.predict(tmp_path, checkpoint, image_folder, candidates)
    assert len(expected) == 11 and len(set(expected)) > 2
    for of_process in facts:
        assert of_process[way] == expected


# ---- a recipe ----


@pytest.mark.parametrize("part", ["train", "eval"])
def test_recipe_labels_each_image_once(two, image_folder, part):
    store = two / "answers" / "expert_labels" / part
    images = sorted(path.name for path in image_folder.glob("*.png"))
    assert sorted(LabelStore(store)) == images
    keys = Counter(key for file in store.glob("*.parquet") for key in Dataset.from_parquet(str(file))["key"])
    assert keys == Counter(images)
    assert len(list(store.glob("*.parquet"))) == 2  # one from each process


def test_recipe_writes_its_results_once(two):
    results = json.loads((two / "answers" / "all_results.json").read_text())
    assert 0 <= results["eval_vqa_accuracy"] <= 1 and results["epoch"] == 1
    assert (two / "answers" / "model.safetensors").is_file()


def facts_of(folder):
    return [json.loads((folder / f"facts_{process}.json").read_text()) for process in range(2)]


# ---- fully_shard of torch ----


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    launch(distributed_sharding.with_fully_shard, folder, number=2)
    return folder


@pytest.fixture(scope="module")
def unsharded():
    """The losses of two steps on all samples, and the weights after each step."""
    model = distributed_training.model_without_batch_statistics()
    optimizer = distributed_sharding.optimizer_of(model)
    losses, weights = [], []
    for _ in range(2):
        losses.append(distributed_sharding.step(model, optimizer, slice(None)))
        weights.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
    return losses, weights


def test_each_process_has_half_of_the_model(sharded):
    for facts in facts_of(sharded):
        assert facts["share"] == pytest.approx(0.5, abs=0.05)
        assert facts["parts"] == 1 + 2 + 3  # the model, vision layers, text layers


def test_sharded_steps_equal_those_of_the_whole_model(sharded, unsharded):
    losses, weights = unsharded
    of_processes = torch.tensor([facts["losses"] for facts in facts_of(sharded)])
    torch.testing.assert_close(of_processes.mean(dim=0), torch.tensor(losses), rtol=1e-5, atol=0)
    for name, expected in zip(("first", "second"), weights):
        torch.testing.assert_close(load_file(sharded / f"{name}.safetensors"), expected, rtol=0, atol=1e-5)


def test_training_resumes_exactly_from_a_sharded_checkpoint(sharded):
    expected, found = (load_file(sharded / f"{name}.safetensors") for name in ("second", "after_loading"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [facts["loss_after_loading"] for facts in facts_of(sharded)] == [
        facts["losses"][1] for facts in facts_of(sharded)
    ]


def test_sharded_checkpoint_loads_into_a_whole_model(sharded):
    model = tiny_model()
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=sharded / "sharded", no_dist=True)
    model.load_state_dict(state["model"])
    expected = load_file(sharded / "first.safetensors")
    assert all(torch.equal(parameter, expected[name]) for name, parameter in model.named_parameters())


def test_sharded_model_generates_and_ranks_like_the_whole(sharded):
    expected = distributed_sharding.answers(tiny_model())
    for facts in facts_of(sharded):
        assert facts["answers"]["generated"] == expected["generated"]
        assert facts["answers"]["ranked"] == expected["ranked"]


# ---- the recipes with FSDP2 of accelerate ----


@pytest.fixture(scope="module")
def recipes(tmp_path_factory, checkpoint, image_folder):
    folder = tmp_path_factory.mktemp("recipes")
    launch(distributed_sharding.with_recipes, folder, checkpoint, image_folder, number=2)
    return folder


def test_fsdp2_keeps_tied_embeddings_and_head_together(recipes):
    for facts in facts_of(recipes):
        assert facts["processes"] == 2
        vision = {f"model.vision_model.layers.{i}" for i in range(2)}
        text = {f"model.text_model.layers.{i}" for i in range(3)}
        words = {"model.text_model.embeddings.word_embeddings", "lm_head.decoder"}
        assert set(facts["sharded"]) == {""} | vision | text | words


def test_fsdp2_reaches_the_loss_of_one_process(tmp_path, recipes):
    expected = distributed_training.training_run(tmp_path, 4)[1].losses
    for facts in facts_of(recipes):
        assert facts["losses"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("way", ["generated", "ranked"])
def test_fsdp2_predictions_equal_those_of_one_process(tmp_path, recipes, checkpoint, image_folder, way):
    candidates = distributed_training.CANDIDATES if way == "ranked" else None
    expected = distributed_training.predict(tmp_path, checkpoint, image_folder, candidates)
    for facts in facts_of(recipes):
        assert facts[way] == expected


def test_fsdp2_in_bf16_reaches_about_the_same_loss(recipes):
    for facts in facts_of(recipes):
        assert facts["bf16_losses"] != facts["losses"]
        assert facts["bf16_losses"] == pytest.approx(facts["losses"], rel=0.02)


def test_fsdp2_saves_a_whole_model(recipes, checkpoint):
    model = PrismerForConditionalGeneration.from_pretrained(recipes / "captions")
    start = PrismerForConditionalGeneration.from_pretrained(checkpoint)
    changed = [not torch.equal(*pair) for pair in zip(model.parameters(), start.parameters())]
    assert any(changed) and not all(changed)  # frozen weights do not change
    published = PrismerForConditionalGeneration.from_pretrained(recipes / "published", dtype=torch.float16)
    assert all(torch.equal(*pair) for pair in zip(published.parameters(), model.half().parameters()))


def test_fsdp2_resumes_exactly_from_a_complete_checkpoint(tmp_path, recipes, checkpoint, image_folder):
    folder = tmp_path / "captions"
    folder.mkdir()
    shutil.copytree(recipes / "captions" / "checkpoint-1", folder / "checkpoint-1")
    (folder / "checkpoint-2").mkdir()  # an incomplete checkpoint of a killed process
    launch(distributed_sharding.resume_recipe, folder, checkpoint, image_folder, number=2)
    expected, found = (load_file(path / "model.safetensors") for path in (recipes / "captions", folder))
    # On the CPU, each process has its own batch statistics. On GPUs, SyncBatchNorm joins them.
    learned = [name for name in expected if ".running_" not in name]
    assert len(learned) > 150 and all(torch.equal(found[name], expected[name]) for name in learned)


# ---- files for accelerate ----

KINDS = {"ddp": DistributedType.MULTI_GPU, "fsdp2": DistributedType.FSDP, "deepspeed_zero2": DistributedType.DEEPSPEED}


def test_each_kind_has_a_file():
    assert {path.stem for path in distributed_sharding.CONFIGS.iterdir()} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_the_file(name):
    config = load_config_from_file(str(distributed_sharding.CONFIGS / f"{name}.yaml"))
    assert config.distributed_type == KINDS[name]
    assert config.mixed_precision == "bf16" and config.num_machines == 1


@pytest.mark.parametrize("name", KINDS)
def test_launch_options_override_the_file(name):
    options = (
        "--num_processes 16 --num_machines 2 --machine_rank 1 --main_process_ip 10.0.0.1 --main_process_port 29501"
    )
    args, environment = distributed_sharding.accelerate_launch(f"{name}.yaml", *options.split())
    assert (args.nnodes, args.nproc_per_node, args.node_rank) == ("2", "8", 1)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"


def test_fsdp2_file_names_existing_classes(monkeypatch):
    _, environment = distributed_sharding.accelerate_launch("fsdp2.yaml")
    for key in [key for key in environment if re.match("FSDP_|ACCELERATE_", key)]:
        monkeypatch.setenv(key, environment[key])
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward
    model = tiny_model(experts=[])
    for name in plugin.transformer_cls_names_to_wrap:
        assert any(isinstance(module, getattr(modeling, name)) for module in model.modules())


def test_deepspeed_file_uses_zero_2_in_bf16(monkeypatch):
    _, environment = distributed_sharding.accelerate_launch("deepspeed_zero2.yaml")
    assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
    for key in [key for key in environment if key.startswith("ACCELERATE_DEEPSPEED_")]:
        monkeypatch.setenv(key, environment[key])
    plugin = DeepSpeedPlugin()
    plugin.set_mixed_precision(environment["ACCELERATE_MIXED_PRECISION"])
    assert plugin.deepspeed_config["zero_optimization"]["stage"] == 2
    assert plugin.deepspeed_config["bf16"] == {"enabled": True}
    # taken from the command line
    assert plugin.deepspeed_config["gradient_accumulation_steps"] == "auto"
    assert plugin.deepspeed_config["gradient_clipping"] == "auto"


# ---- the recipes' arguments ----


def parsed(monkeypatch, tmp_path, *options):
    import training

    monkeypatch.setattr("sys.argv", ["run.py", "--output_dir", str(tmp_path), "--use_cpu", *options])
    return training.parse_arguments()


def test_recipes_do_not_search_unused_parameters(monkeypatch, tmp_path):
    _, training_args = parsed(monkeypatch, tmp_path, "--do_train", "--train_data", "images")
    assert training_args.ddp_find_unused_parameters is False


def test_fsdp_without_training_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(SystemExit):
        parsed(monkeypatch, tmp_path, "--do_eval", "--eval_data", "images")
    assert "ddp.yaml" in capsys.readouterr().err


# ---- several GPUs ----


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_batch_statistics_are_shared_by_all_gpus(tmp_path):
    launch(distributed_training.on_two_gpus, tmp_path, number=2)
    trainer, _ = distributed_training.training_run(tmp_path, 4, model=tiny_model())
    expected = {name: tensor for name, tensor in trainer.model.named_buffers() if ".running_" in name}
    for process in range(2):
        found = load_file(tmp_path / f"statistics_{process}.safetensors")
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-3)
