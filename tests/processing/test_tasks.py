"""A task is one object: register it, and processor, collator and network work with it."""

from unittest import mock

import pytest
import torch
from transformers import AutoProcessor

from modeling_prismer import TASKS, DataCollatorForPrismer, PrismerProcessor, Task, register_task
from modeling_prismer.processing.tasks import capitalize, find_task, lower_case, trim_end, unchanged


@pytest.fixture(autouse=True)
def registry():
    with mock.patch.dict(TASKS):
        yield


def where_is(phrase, keep=None):
    return f"Where is the {lower_case(phrase.strip(), keep)}?"


@pytest.fixture
def pointing():
    """A task with a template for the prompt, cleaning and limits of its own."""
    return register_task(
        Task(
            "pointing",
            clean_prompt=where_is,
            clean_suffix=lambda text, keep: text.replace("_", " "),
            write_suffix=capitalize,
            read_suffix=lower_case,
            max_prompt_tokens=40,
            prompt_column="phrase",
            suffix_column="place",
        )
    )


# ---- a task of your own ----


def test_own_task_is_trained_by_processor_and_collator(pointing, make_processor, image):
    processor = make_processor("pointing")
    rows = [{"image": image, "text": f" {color} CIRCLE ", "suffix": "Top_LEFT"} for color in ("red", "Blue")]
    batch = DataCollatorForPrismer(processor)(rows)
    texts = processor.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert texts == ["Where is the red circle? Top left", "Where is the blue circle? Top left"]
    learned = batch["labels"][0][batch["labels"][0] != -100]
    assert processor.decode(learned) == " Top left</s>"


def test_own_task_asks_ranks_and_reads_answers(pointing, make_processor, image):
    processor = make_processor("pointing")
    asked = processor(image, "red CIRCLE")
    assert processor.decode(asked["input_ids"][0]) == "<s>Where is the red circle?"
    candidate = processor.prepare_candidates(["top LEFT"])["candidate_ids"][0]
    assert processor.decode(candidate) == " Top left</s>"
    generated = torch.cat([asked["input_ids"], candidate[None]], dim=1)
    assert processor.post_process_generation(generated, asked["input_ids"].shape[1]) == ["top left"]
    with pytest.raises(ValueError, match="text is missing: the task 'pointing' needs a phrase for each image"):
        processor(image)


def test_own_task_keeps_added_tokens(pointing, make_processor, image):
    processor = make_processor("pointing")
    processor.tokenizer.add_tokens(["[X1]"])
    number = processor.tokenizer.convert_tokens_to_ids("[X1]")
    inputs = processor(image, "RED [X1]", suffix="Near [X1]")
    assert (inputs["input_ids"] == number).sum() == 2


def test_limits_of_own_task_hold(make_processor, image):
    register_task(Task("short", max_prompt_tokens=6))
    register_task(Task("both", max_prompt_tokens=6, max_tokens=8))
    text, suffix = "zzqx " * 10, "zzqx " * 10
    processor = make_processor("short")
    assert processor(image, text)["input_ids"].shape == (1, 6)
    assert processor(image, text, suffix=suffix, task="both")["input_ids"].shape == (1, 8)
    whole = processor(image, text, suffix=suffix)
    assert whole["labels"].ne(-100).sum() == len(processor.prepare_candidates([suffix])["candidate_ids"][0])


def test_own_prompt_tells_its_task_from_others(image_processor, tokenizer, image):
    register_task(Task("mood", prompt="The mood (in short) is"))
    processor = PrismerProcessor(image_processor, tokenizer, task="vqa", tasks=["vqa", "mood"])
    texts = ["the  MOOD (in short) is calm", "is it calm", "the mood (in short) is it?"]
    rows = processor.batch_decode(processor(image, texts)["input_ids"], skip_special_tokens=True)
    assert rows == ["The mood (in short) is calm", "Is it calm?", "The mood  in short  is it?"]
    assert processor.task_for(None) == "mood"


# ---- the registry ----


@pytest.mark.parametrize("load", [PrismerProcessor.from_pretrained, AutoProcessor.from_pretrained])
def test_checkpoint_of_unregistered_task_names_the_task(pointing, make_processor, tmp_path, load):
    make_processor("pointing").save_pretrained(tmp_path)
    assert load(tmp_path).task == "pointing"
    del TASKS["pointing"]
    with pytest.raises(ValueError, match=r"task is 'pointing'; accepted are 'caption', .*register_task\(.*'pointing'"):
        load(tmp_path)


def test_name_clash_is_refused(pointing):
    assert register_task(pointing) is pointing
    with pytest.raises(ValueError, match="a task 'pointing' is registered already; .* pass exist_ok=True"):
        register_task(Task("pointing"))
    other = register_task(Task("pointing"), exist_ok=True)
    assert find_task("pointing") is other
    with pytest.raises(TypeError, match="task is a str; register_task needs a Task"):
        register_task("pointing")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": " "}, "name is ' '; a task needs a name"),
        ({"name": "a", "prompt": " "}, "the prompt of the task 'a' is white space"),
        ({"name": "a", "max_prompt_tokens": 0}, "max_prompt_tokens of the task 'a' is 0; at least 3"),
        ({"name": "a", "max_tokens": 2}, "max_tokens of the task 'a' is 2; at least 3"),
    ],
)
def test_wrong_arguments_of_a_task_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Task(**arguments)


def test_plain_task_changes_no_text():
    task = Task("plain", prompt="It is")
    assert (task.clean_prompt, task.clean_suffix, task.write_suffix, task.read_suffix) == (
        *(trim_end, unchanged),
        *(unchanged, unchanged),
    )
    assert trim_end("A b  ") == "A b" and unchanged("A b  ") == "A b  "


def test_tasks_of_the_paper_are_registered():
    tasks = list(TASKS.values())[:4]  # others may register their own
    assert [task.name for task in tasks] == ["caption", "vqa", "classification", "zero_shot_caption"]
    columns = [("caption",), ("question", "answer"), ("class",), ("caption",)]
    assert [task.columns for task in tasks] == columns
    assert [task.is_ranked for task in tasks] == [False, False, True, False]
    assert [task.num_ranked for task in tasks] == [None, 16, 32, None]
