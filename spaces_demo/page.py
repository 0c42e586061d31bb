"""The page: what is where, and what happens when."""

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import drawings
import edits
import gradio as gr
import links
from checks import Refused, as_text
from inputs import event_value, guarded
from pictures import MAX_BYTES, data_uri, escape, open_picture
from PIL import Image
from reader import MAX_LABEL_LETTERS, MAX_LETTERS, Reader, parse_labels
from sessions import MAX_TURNS, Session, Sessions
from uploads import find_upload, keep


HERE = Path(__file__).parent
VERSIONS = {"seen": "With all experts", "yours": "With your changes", "none": "Without experts"}
CHOICES = {"seen": "As seen", "off": "Off", "noise": "Noise", "edited": "Edited"}
NO_PICTURE = "Please choose a picture first, under “Ask”."
# What came out of the study of the experts (docs/study.md), by figure, in the order in which they are shown.
FINDINGS = {
    "number_of_experts": "None to six experts, each seed in an order of its own. Most of the gain comes with two of "
    "them, detection and text, wherever they stand in the order.",
    "single": "One expert alone: detection helps with counts, shapes and what is nearest, text with signs; the others "
    "bring less than a point.",
    "missing": "One of six missing: without detection or without text answers lose 4 points, without another nothing.",
    "quality": "What the trained experts see is as good as true labels; blocks of 8×8 and a wrong letter in each word "
    "still give half of the gain, but no signs.",
    "noise": "Labels of other pictures mislead, in proportion; expert dropout does not help against it.",
    "freezing": "With both backbones frozen it answers best. So short a training of everything makes CLIP forget.",
    "adaptation": "Adaptors, LoRA and DoRA answer alike; LoRA takes 1.3 times as long for a step, DoRA 1.9 times.",
    "resampler": "Without the resampler answers are the same, but a step takes 3.2 times as long.",
    "transfer": "On scenes of another look all answers are worse, and experts bring as much as at home.",
}
STOPPED = drawings.status(1, 1, "Stopped.")
PRIVATE: dict[str, Any] = {"api_visibility": "private"}  # what the page itself does; programs have endpoints.py
BUSY: dict[str, Any] = {**PRIVATE, "concurrency_id": "network", "show_progress": "hidden"}


@dataclass
class Example:
    file: Path
    alt: str
    questions: list[str]


def load_examples(folder: Path, name: str = "") -> list[Example]:
    """The examples of a folder, or of its sub-folder that is called as the checkpoint."""
    own = folder / name
    folder = own if name and (own / "examples.json").is_file() else folder
    content = json.loads((folder / "examples.json").read_text(encoding="utf-8"))
    return [Example(folder / file, entry["alt"], entry["questions"]) for file, entry in content.items()]


def opened(payload: Any) -> Image.Image | None:
    """
    The picture of an image component, for events with `preprocess=False`: gradio would open it without bounds, and
    answer a broken one with a traceback.

    Raises:
        Refused: if it is no file that was uploaded, and as [`open_picture`] does.
    """
    path = payload.get("path") if isinstance(payload, dict) else None
    return None if not path else open_picture(find_upload(path, "picture"))


class Page:
    """
    Args:
        reader ([`Reader`]): the checkpoint.
        sessions ([`Sessions`]): what the page remembers of its visitors.
        examples (`list[Example]`): pictures to begin with.
        study (`Path`): the folder with the figures of the experts' study, if it has been run.
    """

    def __init__(self, reader: Reader, sessions: Sessions, examples: list[Example], study: Path):
        self.reader, self.sessions, self.study = reader, sessions, study
        self.examples = {example.file.name: example for example in examples}
        self.names = list(reader.specs)
        self.cards: dict[str, gr.HTML] = {}
        self.switches: dict[str, gr.Radio] = {}
        self.edit_buttons: dict[str, gr.Button] = {}

    # ---- layout ----

    def build(self) -> None:
        """Lays the page out, inside a `gr.Blocks`."""
        gr.HTML(
            '<div class="masthead"><h1>Prismer: see through the experts</h1><p>'
            + (
                "Frozen expert models look at your picture first; a small network answers from the picture and from "
                "what they saw. Switch experts off, replace them by noise or change what they saw, and watch the "
                "answer follow."
                if self.names
                else "A small network looks at your picture and answers. This checkpoint works without experts."
            )
            + "</p></div>"
        )
        with gr.Tabs():
            with gr.Tab("Ask", id="ask"):
                self._build_ask()
            with gr.Tab("Classify", id="classify") as classify:
                self._build_classify(classify)
            with gr.Tab("Study", id="study"):
                self._build_study()
            with gr.Tab("API", id="programs"):
                self._build_programs()
        self._connect()

    def _build_ask(self) -> None:
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=300):
                self.picture = gr.Image(
                    label="Your picture",
                    sources=["upload", "webcam", "clipboard"],
                    height=360,
                    buttons=[],
                    placeholder=f"Drop a picture here, or click to choose one\n(up to {MAX_BYTES // 1024**2} MB)",
                    elem_id="picture",
                )
                self.thumbs = gr.HTML(self._thumbs(), js_on_load=_chips_script("name"), elem_id="examples")
                self.status = gr.HTML(drawings.status(1, 1, ""), elem_id="status")
                self.share = gr.Button("Make a link to this", size="sm", elem_id="share", visible=False)
                self.link = gr.Textbox(
                    label="A link to this picture, these questions and changes",
                    info="Everything is in the link itself, the picture made smaller. We keep nothing.",
                    visible=False,
                    interactive=False,
                    max_lines=1,
                    buttons=["copy"],
                    elem_id="link",
                )
            with gr.Column(scale=6, min_width=300):
                self.warning = gr.HTML(visible=False, elem_id="warning")
                self.chat = gr.Chatbot(
                    label="What it says",
                    height=360,
                    buttons=[],
                    feedback_options=None,
                    elem_id="chat",
                    placeholder="Choose a picture, and the model tells you about it.",
                    render_markdown=False,
                    allow_file_downloads=False,
                )
                self.suggestions = gr.HTML("", js_on_load=_chips_script("question"), elem_id="suggestions")
                with gr.Row(visible="vqa" in self.reader.tasks):
                    self.question = gr.Textbox(
                        label="Your question",
                        placeholder="What color is …?",
                        max_length=2 * MAX_LETTERS,
                        lines=1,
                        max_lines=1,
                        scale=5,
                        elem_id="question",
                    )
                    with gr.Column(scale=1, min_width=110):
                        self.ask = gr.Button("Ask", variant="primary", elem_id="ask")
                        self.stop = gr.Button("Stop", variant="secondary", elem_id="stop")
        self.result = gr.HTML("", elem_id="result")
        self.looked = gr.HTML("", elem_id="looked")
        with gr.Column(visible=False) as self.after:
            if self.names:
                gr.HTML(
                    '<h2 class="section-title">What each expert saw</h2><p class="quiet">Switch one off, give the '
                    "model noise in its place, or change what it saw: the last answer is worked out anew.</p>"
                )
                self.restore_all = gr.Button("All experts as they saw it", size="sm", elem_id="restore")
                with gr.Row(elem_classes="cards"):
                    for name in self.names:
                        with gr.Column(elem_classes="expert", min_width=200):
                            self.cards[name] = gr.HTML(elem_id=f"card-{name}")
                            self.switches[name] = gr.Radio(
                                _choices(False),
                                value="seen",
                                label=f"{self.reader.title(name)}: what the model gets",
                                elem_id=f"switch-{name}",
                            )
                            self.edit_buttons[name] = gr.Button(
                                f"Change {self.reader.title(name).lower()}", size="sm", elem_id=f"edit-{name}"
                            )
                with gr.Column(visible=False, elem_id="editor") as self.editor_place:
                    self.editor = gr.HTML(
                        "",
                        html_template=(HERE / "editor.html").read_text(encoding="utf-8"),
                        js_on_load=(HERE / "editor.js").read_text(encoding="utf-8"),
                        apply_default_css=False,
                    )
                    self.close_editor = gr.Button("Close the editor", size="sm", elem_id="close")
            self.bar = gr.HTML("", elem_id="bar", visible=bool(self.names))
        self.fragment = gr.Textbox(label="link", visible=False, max_length=links.MAX_LINK)

    def _build_classify(self, tab: gr.Tab) -> None:
        with gr.Row():
            with gr.Column(scale=2, min_width=220):
                self.thumbnail = gr.HTML(f'<p class="quiet">{NO_PICTURE}</p>')
            with gr.Column(scale=5, min_width=300):
                self.labels = gr.Textbox(
                    label="Your labels",
                    info="Divided by commas.",
                    value="red, green, blue, yellow",
                    max_length=MAX_LABEL_LETTERS,
                )
                self.class_prompt = gr.Textbox(
                    label="The question they answer" if "vqa" in self.reader.tasks else "What comes before the label",
                    value="What color is it?" if "vqa" in self.reader.tasks else "A picture of",
                    max_length=2 * MAX_LETTERS,
                )
                self.rank = gr.Button("Rank the labels", variant="primary", elem_id="rank")
        self.ranking = gr.HTML("", elem_id="ranking")
        tab.select(guarded(self._thumbnail), None, self.thumbnail, **PRIVATE, queue=False, show_progress="hidden")

    def _build_study(self) -> None:
        figures = [self.study / f"{name}.png" for name in FINDINGS if (self.study / f"{name}.png").is_file()]
        if not figures:
            gr.HTML(
                "<h2>What each expert is worth</h2><p>The study of the experts has not been run for this version, "
                "so there are no figures to show. Once it has, they appear here.</p>"
            )
            return
        gr.HTML(
            '<h2>What each expert is worth</h2><p class="quiet">46 short trainings on scenes, two seeds of each: full '
            "marks are means, bars standard deviations, white marks the seeds. docs/study.md in the repository "
            "has the tables.</p>"
        )
        for file in figures:
            title = f"Figure of the study: {file.stem.replace('_', ' ')}"
            with Image.open(file) as image:
                gr.HTML(drawings.figure(image.convert("RGB"), title, escape(FINDINGS[file.stem]), "study"))

    def _build_programs(self) -> None:
        from endpoints import GUIDE

        gr.Markdown(GUIDE)

    def _thumbs(self) -> str:
        made = []
        for example in self.examples.values():
            with Image.open(example.file) as image:
                small = drawings.fit(image.convert("RGB"), 160)
            made.append(
                f'<button type="button" data-name="{escape(example.file.name)}" '
                f'aria-label="Example: {escape(example.alt)}">'
                f'<img src="{data_uri(small)}" alt=""></button>'
            )
        return f'<p class="quiet">Or an example:</p><div class="chips thumbs">{"".join(made)}</div>'

    # ---- events ----

    def _connect(self) -> None:
        shown = [
            self.status,
            self.warning,
            self.chat,
            self.suggestions,
            self.result,
            self.looked,
            self.bar,
            self.after,
            self.share,
        ]
        experts = [*self.cards.values(), *self.switches.values()]
        editor = [self.editor_place] if self.names else []
        everything = [*shown, *experts, *editor, self.link]
        stoppable = self._stoppable

        # the last of them: a picture that is pasted or taken by the camera comes right after an empty one
        took = stoppable(self._take_picture)
        self.picture.input(took, self.picture, everything, preprocess=False, trigger_mode="always_last", **BUSY)
        self.picture.clear(guarded(self._forget), None, everything, **PRIVATE, queue=False)
        self.thumbs.click(stoppable(self._take_example), None, [self.picture, *everything], **BUSY)

        asked = [self.status, self.chat, self.question, self.result, self.looked, self.bar]
        for trigger in (self.question.submit, self.ask.click):
            trigger(stoppable(self._ask), self.question, asked, **BUSY)
        self.suggestions.click(stoppable(self._ask_suggested), None, asked, **BUSY)
        self.rank.click(guarded(self._rank), [self.labels, self.class_prompt], self.ranking, **BUSY)

        again = [self.status, self.chat, self.result, self.looked, self.bar]
        for name in self.names:
            outputs = [*again, self.cards[name], self.switches[name]]
            self.switches[name].input(
                stoppable(self._switch(name)),
                self.switches[name],
                outputs,
                preprocess=False,
                trigger_mode="always_last",
                **BUSY,
            )
            self.edit_buttons[name].click(
                guarded(self._open_editor(name)),
                None,
                [self.editor_place, self.editor],
                **PRIVATE,
                show_progress="hidden",
            )
        if self.names:
            outputs = [*again, *experts]
            self.editor.edit(stoppable(self._edit), None, outputs, trigger_mode="always_last", **BUSY)
            self.editor.reset(stoppable(self._reset), None, outputs, trigger_mode="always_last", **BUSY)
            self.close_editor.click(lambda: gr.update(visible=False), None, self.editor_place, **PRIVATE, queue=False)
            self.restore_all.click(stoppable(self._restore_all), None, [*outputs, *editor], **BUSY)

        self.stop.click(guarded(self._stop), None, self.status, **PRIVATE, queue=False)
        self.chat.clear(guarded(self._clear_chat), None, [self.result, self.looked], **PRIVATE, queue=False)
        self.share.click(guarded(self._share), None, self.link, **PRIVATE, show_progress="hidden").then(
            None,
            self.link,
            self.link,
            js="(link) => link ? location.href.split('#')[0] + '#' + link.split('#').pop() : ''",
            **PRIVATE,
        )
        blocks = gr.context.Context.root_block
        blocks.load(
            stoppable(self._open_link),
            self.fragment,
            [self.picture, *everything],
            js="() => location.hash.slice(1)",
            **BUSY,
        )
        blocks.unload(self._leave)

    # ---- what happens ----

    def _session(self, request: gr.Request) -> Session:
        if not request.session_hash:  # or all who send none would share one
            raise Refused("session_hash: the name of a session is needed.")
        return self.sessions[request.session_hash]

    def _with_picture(self, request: gr.Request) -> Session:
        session = self._session(request)
        if session.picture is None:
            raise Refused("Please choose a picture first. (After half an hour of rest, a picture is forgotten.)")
        return session

    def _leave(self, request: gr.Request) -> None:
        self.sessions.forget(request.session_hash or "")

    def _clear_chat(self, request: gr.Request) -> tuple[str, str]:
        self._session(request).turns.clear()
        return "", ""

    def _stoppable(self, function: Callable) -> Callable:
        """
        A guarded generator that ends with the step during which its visitor presses Stop, or without a trace when they
        take the picture away. Gradio's own way, `cancels`, now and then leaves "Error" where the answer would stand.
        """

        @functools.wraps(function)
        def steps(*args: Any) -> Iterator[Any]:
            request = next(arg for arg in args if isinstance(arg, gr.Request))
            session = guarded(self._session)(request)
            session.stopped = False
            try:
                with closing(guarded(function)(*args)) as running:
                    for step in running:
                        if session.forgotten:  # gradio sends what came last once more
                            yield {self.status: drawings.status(1, 1, "")}
                            return
                        yield step
                        if session.stopped:
                            yield {self.status: STOPPED}
                            return
            finally:
                self.sessions.weigh(request.session_hash or "")

        return steps

    def _stop(self, request: gr.Request) -> str:
        self._session(request).stopped = True
        return STOPPED

    def _nothing(self) -> dict:
        """The page without a picture."""
        empty: dict = {
            self.status: drawings.status(1, 1, ""),
            self.warning: gr.update(visible=False),
            self.chat: [],
            self.suggestions: "",
            self.result: "",
            self.looked: "",
            self.bar: "",
            self.after: gr.update(visible=False),
            self.share: gr.update(visible=False),
            self.link: gr.update(visible=False, value=""),
        }
        if self.names:
            empty[self.editor_place] = gr.update(visible=False)
        for name in self.names:
            empty[self.cards[name]] = drawings.waiting_card(self.reader, name)
            empty[self.switches[name]] = gr.update(choices=_choices(False), value="seen", interactive=True)
        return empty

    def _forget(self, request: gr.Request) -> dict:
        self.sessions.forget(request.session_hash or "")
        return self._nothing()

    def _take_picture(self, payload: Any, request: gr.Request) -> Iterator[dict]:
        self._session(request).take(None)
        picture = opened(payload)
        if picture is None:
            yield self._nothing()
            return
        self._session(request).take(picture, upload=payload["path"])
        yield from self._look(self._session(request))

    def _take_example(self, request: gr.Request, event: gr.EventData) -> Iterator[dict]:
        session = self._session(request)
        yield self._show(session, None, event_value(event, "name"))
        yield from self._look(session)

    def _show(self, session: Session, picture: Image.Image | None, example: Any = None) -> dict:
        """Takes a picture, or that of an example, and shows it where visitors' own are."""
        if picture is None:
            name = as_text(example, "example", MAX_LETTERS)
            if name not in self.examples:
                raise Refused(f"example: there is none of this name; there are: {', '.join(self.examples)}.")
            with Image.open(self.examples[name].file) as image:
                picture = image.convert("RGB")
        session.take(picture, example, upload=keep(picture))
        return {self.picture: session.upload}

    def _open_link(self, link: str | None, request: gr.Request) -> Iterator[dict]:
        if not link:
            yield {self.status: drawings.status(1, 1, "")}
            return
        found = links.from_link(link, self.reader)
        session = self._session(request)
        yield self._show(session, found["picture"], found["example"])
        modes, session.edits = found["modes"], found["edits"]
        yield from self._look(session, modes)
        for question in found["questions"]:
            yield from self._answer(session, "vqa", question)

    def _look(self, session: Session, modes: dict[str, str] | None = None) -> Iterator[dict]:
        """Runs the experts, shows each as it comes, then says the caption."""
        total = len(self.names) + 1
        source = self.examples.get(session.source or "")
        yield {
            **self._nothing(),
            self.status: drawings.status(0, total, "Looking …"),
            self.after: gr.update(visible=True),
            self.share: gr.update(visible=True),
        }
        steps = self.reader.look(session.picture)
        for number, name in enumerate(self.names):
            title = self.reader.title(name)
            yield {self.status: drawings.status(number, total, f"{title}: expert {number + 1} of {len(self.names)}")}
            seen = next(steps)
            session.seen[seen.name], session.modes[seen.name] = seen.label, "seen"
            if modes and name in modes:
                session.set_mode(name, modes[name])
            note = f"{seen.seconds:.2f} s" if not seen.failed else "failed"
            session.notes[name] = (note, seen.failed)
            if seen.failed:
                failed = f"The expert for {title.lower()} could not read this picture. The model goes on without it."
                gr.Warning(escape(failed))  # gradio shows it as HTML
            yield {self.cards[name]: self._card(session, name), self.switches[name]: self._switch_value(session, name)}
        yield {self.status: drawings.status(total - 1, total, "Putting it together")}
        encoding = session.encoding("seen", self.reader)
        limit = self.reader.usual_distance
        if limit is not None and encoding.distance > limit:
            text = (
                f"This picture is unlike those that the checkpoint was trained on (distance {encoding.distance:.0f}; "
                f"up to {limit:.0f} is usual), so what it says may mean nothing."
            )
            yield {self.warning: gr.update(value=drawings.warning(text), visible=True)}
        questions = source.questions if source and "vqa" in self.reader.tasks else []
        chips = "".join(f'<button type="button" data-question="{escape(q)}">{escape(q)}</button>' for q in questions)
        yield {self.suggestions: f'<div class="chips">{chips}</div>' if chips else ""}
        if "caption" in self.reader.tasks:
            yield from self._answer(session, "caption", None)
        else:
            yield {self.status: drawings.status(1, 1, "Ready. Ask a question.")}

    def _answer(self, session: Session, task: str, text: str | None, is_new: bool = True) -> Iterator[dict]:
        """Says it word by word, then shows the versions side by side and where the model looked."""
        self.reader.prompt(task, text)  # refuses a question that cannot be read
        before = [turn for turn in session.turns] if is_new else session.turns[:-1]
        encoding = session.encoding("yours", self.reader)
        said = ""
        yield {self.chat: _messages([*before, (task, text, "…")]), self.status: drawings.status(0, 2, "Answering …")}
        for said in self.reader.say(encoding, task, text):
            yield {self.chat: _messages([*before, (task, text, said or "…")])}
        session.turns = [*before, (task, text, said or "(nothing)")][-MAX_TURNS:]
        yield {self.chat: _messages(session.turns), self.status: drawings.status(1, 2, "Comparing …")}

        notes = {"seen": "as they saw it", "yours": self._changes(session), "none": "the picture alone"}
        titles = {version: (VERSIONS[version], note) for version, note in notes.items()}
        if not self.names:
            titles["seen"] = ("The answer", "this checkpoint has no experts")
        which = self._versions(session)
        found: dict[str, Any] = {}
        for version in sorted(which, key=["yours", "seen", "none"].index):
            found[version] = self.reader.explain(session.encoding(version, self.reader), task, text)
            versions = [(*titles[each], found.get(each)) for each in which]
            yield {
                self.result: drawings.turn_panel((task, text), versions),
                self.bar: drawings.answer_bar((task, text), versions),
            }
        shown = "yours" if session.changed else "seen"
        labels = {name: session.label(name, self.reader) for name in self.names}
        note = "with your changes" if session.changed else "with all experts" if self.names else "from the picture"
        yield {
            self.looked: drawings.looked_panel(self.reader, session, labels, found[shown], note),
            self.status: drawings.status(1, 1, "Done."),
        }

    def _versions(self, session: Session) -> list[str]:
        """What is shown side by side, as `Session.encoding` names it."""
        if not self.names:
            return ["seen"]
        return ["seen", "yours", "none"] if session.changed else ["seen", "none"]

    def _changes(self, session: Session) -> str:
        said = {"off": "off", "noise": "noise", "edited": "changed"}
        parts = [
            f"{self.reader.title(name).lower()} {said[mode]}" for name, mode in session.modes.items() if mode in said
        ]
        return ", ".join(parts)

    def _ask(self, question: str | None, request: gr.Request) -> Iterator[dict]:
        session = self._with_picture(request)
        self.reader.prompt("vqa", question)
        yield {self.question: ""}
        yield from self._answer(session, "vqa", question.strip())  # type: ignore[union-attr]

    def _ask_suggested(self, request: gr.Request, event: gr.EventData) -> Iterator[dict]:
        yield from self._ask(event_value(event, "question"), request)

    def _again(self, session: Session) -> Iterator[dict]:
        """The last answer, anew."""
        if session.turns:
            task, text, _ = session.turns[-1]
            yield from self._answer(session, task, text, is_new=False)

    # ---- experts ----

    def _card(self, session: Session, name: str) -> str:
        note, failed = session.notes.get(name, ("", False))
        mode = session.modes.get(name, "seen")
        note = {"seen": note, "off": "off", "noise": "noise", "edited": "changed by you"}[mode]
        label = session.label(name, self.reader)
        return drawings.expert_card(self.reader, name, session.picture, label, note, failed and mode == "seen")

    def _switch_value(self, session: Session, name: str) -> dict:
        return gr.update(choices=_choices(name in session.edits), value=session.modes.get(name, "seen"))

    def _switch(self, name: str) -> Callable:
        def switch(mode: str, request: gr.Request) -> Iterator[dict]:
            session = self._with_picture(request)
            session.set_mode(name, mode)
            yield {self.cards[name]: self._card(session, name)}
            yield from self._again(session)

        return switch

    def _restore_all(self, request: gr.Request) -> Iterator[dict]:
        session = self._with_picture(request)
        session.modes = dict.fromkeys(session.seen, "seen")
        session.edits.clear()
        yield {self.editor_place: gr.update(visible=False)} | {
            part: value
            for name in session.seen
            for part, value in (
                (self.cards[name], self._card(session, name)),
                (self.switches[name], self._switch_value(session, name)),
            )
        }
        yield from self._again(session)

    def _open_editor(self, name: str) -> Callable:
        def open_editor(request: gr.Request) -> tuple:
            session = self._with_picture(request)
            if edits.tool_for(self.reader.specs[name]) == "words":
                self.reader.encode_words(["word"])  # refused here rather than after the first change
            return gr.update(visible=True), drawings.editor_value(self.reader, session, name)

        return open_editor

    def _edit(self, request: gr.Request, event: gr.EventData) -> Iterator[dict]:
        session = self._with_picture(request)
        name = self._looked(session, event)
        session.edits[name] = edits.check_edit(event_value(event, "edit"), self.reader.specs[name])
        session.set_mode(name, "edited")
        yield from self._changed(session, name)

    def _reset(self, request: gr.Request, event: gr.EventData) -> Iterator[dict]:
        session = self._with_picture(request)
        name = self._looked(session, event)
        session.edits.pop(name, None)
        session.set_mode(name, "seen")
        yield from self._changed(session, name)

    def _looked(self, session: Session, event: gr.EventData) -> str:
        """The name of the expert that an event is about."""
        name = as_text(event_value(event, "name"), "name of the expert", MAX_LETTERS)
        if name not in session.seen:
            raise Refused(f"name of the expert: {', '.join(session.seen) or 'none'} have looked at your picture.")
        return name

    def _changed(self, session: Session, name: str) -> Iterator[dict]:
        yield {self.cards[name]: self._card(session, name), self.switches[name]: self._switch_value(session, name)}
        yield from self._again(session)

    # ---- the other tabs, and the link ----

    def _thumbnail(self, request: gr.Request) -> str:
        session = self._session(request)
        if session.picture is None:
            return f'<p class="quiet">{NO_PICTURE}</p>'
        note = self._changes(session)
        note = f"With your changes: {note}" if note else ""
        return drawings.figure(drawings.fit(session.picture, 240), "Your picture", escape(note), "thumbnail")

    def _rank(self, text: str, prompt: str, request: gr.Request) -> str:
        session = self._session(request)
        if session.picture is None:
            raise Refused(NO_PICTURE)
        labels = parse_labels(text)
        task = "vqa" if "vqa" in self.reader.tasks else self.reader.processor.task
        rankings = [
            (
                VERSIONS[version] if self.names else "Your labels",
                self.reader.rank(session.encoding(version, self.reader), labels, task, prompt),
            )
            for version in self._versions(session)
        ]
        return drawings.ranking_panel(rankings)

    def _share(self, request: gr.Request) -> dict:
        session = self._with_picture(request)
        return gr.update(value="#" + links.to_link(session), visible=True)


def _choices(edited: bool) -> list[tuple[str, str]]:
    return [(title, mode) for mode, title in CHOICES.items() if edited or mode != "edited"]


def _messages(turns: list[tuple[str, str | None, str]]) -> list[dict[str, str]]:
    """For the chat, which shows its messages as HTML."""
    messages = []
    for task, text, said in turns:
        if task == "vqa":
            messages.append({"role": "user", "content": escape(text or "")})
        messages.append({"role": "assistant", "content": escape(said)})
    return messages


def _chips_script(data: str) -> str:
    """Clicks on the buttons of an HTML component, as the event "click" with the button's data."""
    return (
        "element.addEventListener('click', (event) => { const button = event.target.closest('button'); "
        f"if (button) trigger('click', {{ {data}: button.dataset.{data} }}); }});"
    )
