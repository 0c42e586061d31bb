import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image


pytest.importorskip("gradio")

import drawings
from checks import Refused
from reader import Reader, parse_labels
from sessions import Session

from modeling_prismer import pretrained_path, sample_image


QUESTION = "What color is the shape?"


@pytest.fixture(scope="module")
def session(reader, shape):
    session = Session(image=shape)
    for seen in reader.look(shape):
        session.seen[seen.name], session.modes[seen.name] = seen.label, "seen"
    return session


def test_streamed_text_ends_with_the_answer(reader, session):
    assert list(reader.say(session.encoding("seen", reader), QUESTION))[-1] == "teal"


def test_caption_is_the_one_that_the_command_line_gives():
    path = pretrained_path()
    reader, image = Reader(path, "cpu"), sample_image("scene")
    encoding = reader.encode(image, {seen.name: seen.label for seen in reader.look(image)})
    steps = list(reader.say(encoding))
    inputs = reader.processor(image, task="caption")
    generated = reader.model.generate(**inputs)
    expected = reader.processor.post_process_generation(generated, inputs["input_ids"].shape[1], task="caption")
    assert steps[-1] == reader.explain(encoding).text == expected[0]
    assert len(steps) > 5 and steps[0] == "a"
    with pytest.raises(Refused, match="cannot write captions"):
        Reader(pretrained_path("prismer-easy-vqa"), "cpu").task_of(None)


def test_closing_the_stream_stops_the_network(reader, session):
    threads = threading.active_count()
    saying = reader.say(session.encoding("seen", reader), QUESTION)
    next(saying)
    saying.close()
    assert threading.active_count() == threads


def test_alternatives_are_less_probable_than_the_answer(reader, session):
    said = reader.explain(session.encoding("seen", reader), QUESTION)
    assert said.text == "teal" and 0.5 < said.probability <= 1
    probabilities = [probability for _, probability in said.others]
    assert probabilities == sorted(probabilities, reverse=True) and max(probabilities) < said.probability
    assert said.probability + sum(probabilities) <= 1 + 1e-5


def test_probability_is_that_of_the_network(reader, session):
    encoding = session.encoding("seen", reader)
    labels = {name: session.seen[name] for name in reader.specs}
    inputs = reader.processor(session.image, QUESTION, expert_labels=labels, suffix="teal")
    with torch.no_grad():
        logits = reader.model(**{name: tensor for name, tensor in inputs.items() if name != "labels"}).logits
    chosen = inputs["labels"][:, 1:] != -100
    log = logits[:, :-1].log_softmax(-1).gather(2, inputs["input_ids"][:, 1:, None])[..., 0][chosen].sum()
    assert reader.explain(encoding, QUESTION).probability == pytest.approx(log.exp().item(), rel=1e-3)


def test_attention_covers_the_image_and_present_experts(reader, session):
    said = reader.explain(session.encoding("seen", reader), "What shape is in the image?")
    total = said.looked.sum() + sum(each.sum() for each in said.looked_at_experts.values())
    assert said.looked.shape == (8, 8) and set(said.looked_at_experts) == {"edge", "ocr"}
    assert 0 < total <= 1 + 1e-5
    none = reader.explain(session.encoding("none", reader), "What shape is in the image?")
    assert sum(each.sum() for each in none.looked_at_experts.values()) == 0


def test_switched_experts_change_the_answer_and_restore_it(reader, session):
    question = "What shape is in the image?"
    sure = {}
    for modes in ({"edge": "seen", "ocr": "seen"}, {"edge": "off", "ocr": "off"}, {"edge": "noise", "ocr": "noise"}):
        session.modes.update(modes)
        sure[modes["edge"]] = reader.explain(session.encoding("yours", reader), question)
    session.modes.update({"edge": "seen", "ocr": "seen"})
    assert sure["seen"].text == "triangle"
    assert sure["off"].probability != sure["seen"].probability != sure["noise"].probability
    assert reader.explain(session.encoding("yours", reader), question).text == "triangle"


def test_image_is_encoded_once_for_all_questions(reader, session, monkeypatch):
    first = session.encoding("seen", reader)
    monkeypatch.setattr(reader, "encode", None)
    assert session.encoding("seen", reader) is first


def test_failing_expert_is_missing_and_the_others_run(reader, shape, monkeypatch):
    def fail(images, *others):
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(reader.live["edge"], "run", fail)
    seen = {each.name: each for each in reader.look(shape)}
    assert seen["edge"].failed and not seen["ocr"].failed
    labels = {name: each.label for name, each in seen.items()}
    assert reader.explain(reader.encode(shape, labels), QUESTION).text == "teal"
    card = drawings.expert_card(reader, "edge", shape, None, "failed", failed=True)
    assert "failed on the image" in card and "secret" not in card


@pytest.mark.parametrize(
    "question, reason",
    [("", "type a question"), ("?!", "type a question"), ("is it " * 20, "too long"), ("x" * 400, "too long")],
)
def test_too_long_or_empty_question_is_refused(reader, question, reason):
    with pytest.raises(Refused, match=reason):
        reader.prompt(reader.question_task, question)


@pytest.mark.parametrize("value", [5, {"a": 1}, ["a"], True, "\ud800"])
def test_input_that_is_not_a_text_is_named(reader, value):
    with pytest.raises(Refused, match="^question: "):
        reader.prompt(reader.question_task, value)
    with pytest.raises(Refused, match="^labels: "):
        parse_labels(value)


def test_labels_are_separated_by_commas_and_limited():
    assert parse_labels("red, green\nblue, red,") == ["red", "green", "blue"]
    for bad in ("", "one", ",".join(map(str, range(51))), "a, " + "b" * 61):
        with pytest.raises(Refused):
            parse_labels(bad)


def test_labels_are_ranked(reader, session):
    ranking = reader.rank(session.encoding("seen", reader), ["red", "teal", "blue"], QUESTION)
    assert ranking[0]["label"] == "teal"
    assert sum(row["share"] for row in ranking) == pytest.approx(1)


def test_html_in_a_question_is_escaped(reader, session):
    said = reader.explain(session.encoding("seen", reader), QUESTION)
    panel = drawings.turn_panel("<script>alert(1)</script>", [("With", "", said)])
    assert "<script" not in panel and "&lt;script&gt;" in panel


def test_every_image_has_an_alternative_text(reader, session):
    said = reader.explain(session.encoding("seen", reader), QUESTION)
    page = drawings.looked_panel(reader, session, session.seen, said, "")
    page += "".join(drawings.expert_card(reader, name, session.image, session.seen[name]) for name in session.seen)
    assert page.count("<img") == page.count('alt="') == 5
    assert 'alt=""' not in page


def test_spotlight_is_bright_where_weights_are_large():
    weights = torch.zeros(4, 4)
    weights[0, 0] = 1
    lit = drawings.spotlight(Image.new("RGB", (64, 64), (200, 100, 50)), weights)
    assert lit.getpixel((2, 2))[0] > 150 and lit.getpixel((60, 60))[0] < 60


def test_parallel_encodings_do_not_mix(reader, shape):
    labels = {seen.name: seen.label for seen in reader.look(shape)}
    alone = reader.encode(shape, labels).sources
    with ThreadPoolExecutor(8) as pool:
        together = [each.sources for each in pool.map(lambda _: reader.encode(shape, labels), range(8))]
    for sources in together:
        for name, source in alone.items():
            torch.testing.assert_close(sources[name], source)
