"""The page: its layout and its events."""

import functools
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import drawings
import edits
import gradio as gr
import links
from checks import Refused, as_number, as_text
from endpoints import GUIDE
from images import MAX_BYTES, data_uri, escape, shown_size
from inputs import event_value, guarded
from PIL import Image
from reader import MAX_LABEL_LETTERS, MAX_LETTERS, Said, parse_labels
from readers import Readers
from sessions import MAX_TURNS, Session, Sessions
from suggestions import Examples, find_things, thing_at, words_at
from uploads import keep, open_upload


HERE = Path(__file__).parent
NO_OTHER = "no other checkpoint"
READING_AID = """
<h3>How to read the figures</h3>
<ul>
<li>Each panel measures one thing. Answers are the share of right ones: to all questions, or to those about relations
(such as “left of”), the nearest object and the word on a sign. Captions are measured by their likeness to reference
captions (CIDEr) and by the share of described objects that are true. Higher is better; in figures with rows, further
right is better.</li>
<li>Trained weights, time and memory are costs: less is better.</li>
<li>A full mark is the mean of two trainings, a white mark is one training, and the bar is the standard deviation. If
two bars overlap, the difference may be chance. A dashed line is the model without experts.</li>
<li>Most scales do not start at zero, and they differ between panels: read the numbers.</li>
</ul>
"""
VERSIONS = {"seen": "With all experts", "yours": "With your changes", "none": "Without experts"}
CHOICES = {"seen": "Unchanged", "off": "Off", "noise": "Noise", "edited": "Edited"}
NO_IMAGE = "Please choose an image first, under “Ask”."
# The findings of the study (docs/study.md) by figure, in the order of the page.
FINDINGS = {
    "number_of_experts": "None to six experts; each seed adds them in its own order. Two of them, detection and text, "
    "give most of the gain at any position in the order.",
    "single": "One expert alone: detection improves counts, shapes and nearest objects, text improves signs. The "
    "others gain less than a point.",
    "missing": "One of six experts missing: answers lose 4 points without detection or text, nothing without another.",
    "quality": "The outputs of the trained experts are as good as true labels. Maps of 8×8 blocks and words with a "
    "wrong letter still give half of the gain, but signs are no longer read.",
    "noise": "Labels of other images mislead the model in proportion to their share. Expert dropout does not help.",
    "freezing": "Answers are best with both backbones frozen. A short training of all weights makes CLIP forget.",
    "adaptation": "Adaptors, LoRA and DoRA answer equally well. A LoRA step takes 1.3 times as long, a DoRA step 1.9.",
    "resampler": "Answers are equally good without the resampler, but a step takes 3.2 times as long.",
    "transfer": "On scenes of another style all answers are worse, and the experts contribute as much as before.",
}
STOPPED = drawings.status(1, 1, "Stopped.")
PRIVATE: dict[str, Any] = {"api_visibility": "private"}  # events of the page; endpoints.py has the API
BUSY: dict[str, Any] = {**PRIVATE, "concurrency_id": "network", "show_progress": "hidden"}


class Page:
    """
    Args:
        readers ([`Readers`]): the checkpoint, and others to compare it with.
        sessions ([`Sessions`]): the sessions of the visitors.
        examples ([`Examples`]): the images that visitors can choose, and questions.
        study (`Path`): the folder with the figures of the study, which need not exist.
    """

    def __init__(self, readers: Readers, sessions: Sessions, examples: Examples, study: Path):
        self.readers, self.reader = readers, readers.main
        self.sessions, self.examples, self.study = sessions, examples, study
        self.names = list(self.reader.specs)
        self.cards: dict[str, gr.HTML] = {}
        self.switches: dict[str, gr.Radio] = {}
        self.effects: dict[str, gr.HTML] = {}
        self.edit_buttons: dict[str, gr.Button] = {}

    # ---- layout ----

    def build(self) -> None:
        """Builds the page inside a `gr.Blocks`."""
        gr.HTML(
            '<div class="masthead"><h1>Prismer: see through the experts</h1><p>'
            + (
                "Expert models look at your image first. A small network reads the image and what they found, and "
                'answers. <span class="more">Switch experts off or edit what they found, and see how the answer '
                "changes.</span>"
                if self.names
                else "A small network reads your image and answers. This checkpoint has no experts."
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
        with gr.Row(equal_height=False, elem_id="top"):
            with gr.Column(scale=5, min_width=300):
                self.image = gr.Image(
                    label="Your image",
                    sources=["upload", "webcam", "clipboard"],
                    height=400,
                    buttons=[],
                    placeholder=f"Drop an image here, or click to choose one\n(up to {MAX_BYTES // 1024**2} MB)",
                    elem_id="image",
                )
                self.pointed = gr.HTML("", js_on_load=_chips_script("question"), elem_id="pointed")
            with gr.Column(scale=6, min_width=300):
                self.warning = gr.HTML(visible=False, elem_id="warning")
                self.chat = gr.Chatbot(
                    label="Answers",
                    height=None,
                    min_height=120,
                    max_height=280,
                    buttons=[],
                    feedback_options=None,
                    elem_id="chat",
                    placeholder="Choose an image, and the model describes it or answers questions about it.",
                    render_markdown=False,
                    allow_file_downloads=False,
                )
                with gr.Row(elem_id="progress"):
                    self.status = gr.HTML(drawings.status(1, 1, ""), elem_id="status")
                    self.stop = gr.Button("Stop", variant="secondary", size="sm", elem_id="stop")
                with gr.Row(visible=self.reader.question_task is not None, elem_id="asking"):
                    self.question = gr.Textbox(
                        label="Your question",
                        placeholder="What color is …?",
                        max_length=2 * MAX_LETTERS,
                        lines=1,
                        max_lines=1,
                        scale=5,
                        min_width=180,
                        elem_id="question",
                    )
                    self.ask = gr.Button("Ask", variant="primary", scale=1, min_width=80, elem_id="ask")
                self.suggestions = gr.HTML("", js_on_load=_chips_script("question"), elem_id="suggestions")
        self.thumbs = gr.HTML(self._thumbs(), js_on_load=_chips_script("name"), elem_id="examples")
        with gr.Row(equal_height=False, elem_id="answers"):
            self.result = gr.HTML("", elem_id="result")
            self.compared = gr.HTML("", visible=False, elem_id="compared")
        with gr.Row(elem_id="tools"):
            self.other = gr.Dropdown(
                [(NO_OTHER, ""), *((name, name) for name in self.readers.others)],
                value="",
                label="Compare with",
                visible=bool(self.readers.others),
                filterable=False,
                elem_id="other",
            )
            self.share = gr.Button("Make a link to this", size="sm", elem_id="share", visible=False)
        self.link = gr.Textbox(
            label="A link to this image, these questions and changes",
            info="The link contains everything, with a smaller image. The server stores nothing.",
            visible=False,
            interactive=False,
            max_lines=1,
            buttons=["copy"],
            elem_id="link",
        )
        self.looked = gr.HTML("", elem_id="looked")
        with gr.Column(visible=False) as self.after:
            if self.names:
                gr.HTML(
                    '<h2 class="section-title">Output of each expert</h2><p class="quiet">Switch an expert off, '
                    "replace its output by noise, or edit it. The new answer then appears below it.</p>"
                )
                self.restore_all = gr.Button("Restore all experts", size="sm", elem_id="restore")
                with gr.Row(elem_classes="cards"):
                    for name in self.names:
                        with gr.Column(elem_classes="expert", min_width=200):
                            self.cards[name] = gr.HTML(elem_id=f"card-{name}")
                            self.switches[name] = gr.Radio(
                                _choices(False),
                                value="seen",
                                label=f"{self.reader.title(name)}: input of the model",
                                elem_id=f"switch-{name}",
                            )
                            self.effects[name] = gr.HTML("", elem_id=f"effect-{name}")
                            self.edit_buttons[name] = gr.Button(
                                f"Edit {self.reader.title(name).lower()}",
                                size="sm",
                                elem_id=f"edit-{name}",
                                visible=edits.tool_for(self.reader.specs[name]) != "none",
                            )
                with gr.Column(visible=False, elem_id="editor") as self.editor_place:
                    self.editor = gr.HTML(
                        "",
                        html_template=(HERE / "editor.html").read_text(encoding="utf-8"),
                        js_on_load=(HERE / "editor.js").read_text(encoding="utf-8"),
                        apply_default_css=False,
                    )
                    self.close_editor = gr.Button("Close the editor", size="sm", elem_id="close")
        self.fragment = gr.Textbox(label="link", visible=False, max_length=links.MAX_LINK)

    def _build_classify(self, tab: gr.Tab) -> None:
        with gr.Row():
            with gr.Column(scale=2, min_width=220):
                self.thumbnail = gr.HTML(f'<p class="quiet">{NO_IMAGE}</p>')
            with gr.Column(scale=5, min_width=300):
                self.labels = gr.Textbox(
                    label="Your labels",
                    info="Separated by commas.",
                    value=self.examples.classification([]).get("labels", "red, green, blue, yellow"),
                    max_length=MAX_LABEL_LETTERS,
                    elem_id="labels",
                )
                self.class_prompt = gr.Textbox(
                    label="The question" if self.reader.question_task else "The text before the label",
                    value=self.reader.ranking_task.prompt
                    or self.examples.classification([]).get("question", "What color is it?"),
                    max_length=2 * MAX_LETTERS,
                )
                self.rank = gr.Button("Rank the labels", variant="primary", elem_id="rank")
        self.ranking = gr.HTML("", elem_id="ranking")
        tab.select(guarded(self._thumbnail), None, self.thumbnail, **PRIVATE, queue=False, show_progress="hidden")

    def _build_study(self) -> None:
        figures = [self.study / f"{name}.png" for name in FINDINGS if (self.study / f"{name}.png").is_file()]
        if not figures:
            gr.HTML(
                "<h2>The contribution of each expert</h2><p>The study has not been run for this version. Its figures "
                "would appear here.</p>"
            )
            return
        gr.HTML(
            '<h2>The contribution of each expert</h2><p class="quiet">46 short trainings on rendered scenes, two of '
            f"each kind. docs/study.md in the repository has the tables.</p>{READING_AID}",
            elem_id="reading-aid",
        )
        for file in figures:
            title = f"Figure of the study: {file.stem.replace('_', ' ')}"
            with Image.open(file) as image:
                gr.HTML(drawings.figure(image.convert("RGB"), title, escape(FINDINGS[file.stem]), "study"))

    def _build_programs(self) -> None:
        gr.Markdown(GUIDE)

    def _thumbs(self) -> str:
        made = []
        for example in self.examples.images.values():
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
            self.compared,
            self.looked,
            self.pointed,
            self.after,
            self.share,
            self.labels,
            self.class_prompt,
        ]
        experts = [*self.cards.values(), *self.switches.values(), *self.effects.values()]
        editor = [self.editor_place] if self.names else []
        everything = [*shown, *experts, *editor, self.link]
        stoppable = self._stoppable

        # `always_last`, because gradio sends an empty image right before one that is pasted or taken by the camera
        took = stoppable(self._take_image)
        self.image.input(took, self.image, everything, preprocess=False, trigger_mode="always_last", **BUSY)
        self.image.clear(guarded(self._forget), None, everything, **PRIVATE, queue=False)
        self.thumbs.click(stoppable(self._take_example), None, [self.image, *everything], **BUSY)
        self.image.select(guarded(self._point), None, self.pointed, **PRIVATE, queue=False, show_progress="hidden")
        answer = [self.status, self.chat, self.result, self.compared, self.looked]
        asked = [*answer, self.question]
        for trigger in (self.question.submit, self.ask.click):
            trigger(stoppable(self._ask), self.question, asked, **BUSY)
        for place in (self.suggestions, self.pointed):
            place.click(stoppable(self._ask_suggested), None, asked, **BUSY)
        self.other.input(
            stoppable(self._choose_other), self.other, answer, preprocess=False, trigger_mode="always_last", **BUSY
        )
        self.rank.click(guarded(self._rank), [self.labels, self.class_prompt], self.ranking, **BUSY)

        again = [*answer, *self.effects.values()]
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
            outputs = [*answer, *experts]
            self.editor.edit(stoppable(self._edit), None, outputs, trigger_mode="always_last", **BUSY)
            self.editor.reset(stoppable(self._reset), None, outputs, trigger_mode="always_last", **BUSY)
            self.close_editor.click(lambda: gr.update(visible=False), None, self.editor_place, **PRIVATE, queue=False)
            self.restore_all.click(stoppable(self._restore_all), None, [*outputs, *editor], **BUSY)

        self.stop.click(guarded(self._stop), None, self.status, **PRIVATE, queue=False)
        self.chat.clear(
            guarded(self._clear_chat), None, [self.result, self.compared, self.looked], **PRIVATE, queue=False
        )
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
            [self.image, *everything],
            js="() => location.hash.slice(1)",
            **BUSY,
        )
        blocks.unload(self._leave)

    # ---- event handlers ----

    def _session(self, request: gr.Request) -> Session:
        if not request.session_hash:  # without it, several visitors would share a session
            raise Refused("session_hash: the key of a session is needed.")
        return self.sessions[request.session_hash]

    def _with_image(self, request: gr.Request) -> Session:
        session = self._session(request)
        if session.image is None:
            raise Refused("Please choose an image first. (An image is deleted after half an hour without use.)")
        return session

    def _leave(self, request: gr.Request) -> None:
        self.sessions.forget(request.session_hash or "")

    def _clear_chat(self, request: gr.Request) -> tuple[str, dict, str]:
        self._session(request).turns.clear()
        return "", gr.update(value="", visible=False), ""

    def _stoppable(self, function: Callable) -> Callable:
        """
        A guarded generator that ends after the current step if its visitor presses Stop, and ends without output if
        they remove the image. gradio's `cancels` sometimes shows "Error" in place of the answer. After an error, the
        page shows that nothing runs.
        """

        @functools.wraps(function)
        def steps(*args: Any) -> Iterator[Any]:
            request = next(arg for arg in args if isinstance(arg, gr.Request))
            session = guarded(self._session)(request)
            session.stopped = False
            try:
                with closing(guarded(function)(*args)) as running:
                    for step in running:
                        if session.forgotten:  # gradio sends the last output once more
                            yield {self.status: drawings.status(1, 1, "")}
                            return
                        yield step
                        if session.stopped:
                            yield {self.status: STOPPED}
                            return
            except gr.Error:
                yield {self.status: drawings.status(1, 1, ""), self.chat: _messages(session.turns)}
                raise
            finally:
                self.sessions.weigh(request.session_hash or "")

        return steps

    def _stop(self, request: gr.Request) -> str:
        self._session(request).stopped = True
        return STOPPED

    def _nothing(self) -> dict:
        """The page without an image."""
        empty: dict = {
            self.status: drawings.status(1, 1, ""),
            self.warning: gr.update(visible=False),
            self.chat: [],
            self.suggestions: "",
            self.result: "",
            self.compared: gr.update(value="", visible=False),
            self.looked: "",
            self.pointed: "",
            self.after: gr.update(visible=False),
            self.share: gr.update(visible=False),
            self.link: gr.update(visible=False, value=""),
        }
        if self.names:
            empty[self.editor_place] = gr.update(visible=False)
        for name in self.names:
            empty[self.cards[name]] = drawings.waiting_card(self.reader, name)
            empty[self.switches[name]] = gr.update(choices=_choices(False), value="seen", interactive=True)
            empty[self.effects[name]] = ""
        return empty

    def _forget(self, request: gr.Request) -> dict:
        self.sessions.forget(request.session_hash or "")
        return self._nothing()

    def _take_image(self, payload: Any, request: gr.Request) -> Iterator[dict]:
        self._session(request).take(None)
        image = open_upload(payload)
        if image is None:
            yield self._nothing()
            return
        self._session(request).take(image, upload=payload["path"])
        self._session(request).shown_size = shown_size(payload["path"])
        yield from self._look(self._session(request))

    def _take_example(self, request: gr.Request, event: gr.EventData) -> Iterator[dict]:
        session = self._session(request)
        yield self._show(session, None, event_value(event, "name"))
        yield from self._look(session)

    def _show(self, session: Session, image: Image.Image | None, example: Any = None) -> dict:
        """Starts a session with an image, or with an example, and shows the image on the page."""
        if image is None:
            name = as_text(example, "example", MAX_LETTERS)
            if name not in self.examples.images:
                raise Refused(f"example: this name is unknown; known are: {', '.join(self.examples.images)}.")
            with Image.open(self.examples.images[name].file) as file:
                image = file.convert("RGB")
        session.take(image, example, upload=keep(image))
        session.shown_size = image.size
        return {self.image: session.upload}

    def _open_link(self, link: str | None, request: gr.Request) -> Iterator[dict]:
        if not link:
            yield {self.status: drawings.status(1, 1, "")}
            return
        found = links.from_link(link, self.reader)
        session = self._session(request)
        yield self._show(session, found["image"], found["example"])
        modes, session.edits = found["modes"], found["edits"]
        yield from self._look(session, modes)
        for question in found["questions"]:
            yield from self._answer(session, question)

    def _look(self, session: Session, modes: dict[str, str] | None = None) -> Iterator[dict]:
        """Runs the experts and shows each output as it comes. Then writes the caption."""
        total = len(self.names) + 1
        yield {
            **self._nothing(),
            self.status: drawings.status(0, total, "Running the experts …"),
            self.after: gr.update(visible=True),
            self.share: gr.update(visible=True),
        }
        steps = self.reader.look(session.image)
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
                failed = f"The expert for {title.lower()} failed on this image. The model answers without it."
                gr.Warning(escape(failed))  # gradio shows it as HTML
            yield {self.cards[name]: self._card(session, name), self.switches[name]: self._switch_value(session, name)}
        yield {self.status: drawings.status(total - 1, total, "Encoding …")}
        encoding = session.encoding("seen", self.reader)
        limit = self.reader.usual_distance
        if limit is not None and encoding.distance > limit:
            text = (
                f"This image is unlike the training images of the checkpoint (distance {encoding.distance:.0f}; "
                f"up to {limit:.0f} is usual), so its answers may make no sense."
            )
            yield {self.warning: gr.update(value=drawings.warning(text), visible=True)}
        yield self._suggest(session)
        if self.reader.caption_task:
            yield from self._answer(session, None)
        else:
            yield {self.status: drawings.status(1, 1, "Ready. Ask a question.")}

    def _suggest(self, session: Session) -> dict:
        """Questions and labels that fit the image."""
        if self.reader.question_task is None:
            return {self.suggestions: ""}
        things = find_things(self.reader, session.seen)
        chosen = self.examples.classification(things)
        shown = {self.suggestions: drawings.chips(self.examples.questions(session.source, things))}
        return shown | ({self.labels: chosen["labels"], self.class_prompt: chosen["question"]} if chosen else {})

    def _answer(
        self, session: Session, text: str | None, is_new: bool = True
    ) -> Generator[dict, None, dict[str, Said]]:
        """
        Streams the answer, then shows the versions side by side and the attention of the model. Returns the answers by
        version.
        """
        self.reader.prompt(self.reader.task_of(text), text)  # raises an error for a question that cannot be read
        before = [turn for turn in session.turns] if is_new else session.turns[:-1]
        encoding = session.encoding("yours", self.reader)
        said = ""
        yield {self.chat: _messages([*before, (text, "…")]), self.status: drawings.status(0, 2, "Answering …")}
        for said in self.reader.say(encoding, text):
            yield {self.chat: _messages([*before, (text, said or "…")])}
        session.turns = [*before, (text, said or "(nothing)")][-MAX_TURNS:]
        yield {self.chat: _messages(session.turns), self.status: drawings.status(1, 2, "Comparing …")}

        notes = {"seen": "their unchanged output", "yours": self._changes(session), "none": "the image alone"}
        titles = {version: (VERSIONS[version], note) for version, note in notes.items()}
        if not self.names:
            titles["seen"] = ("The answer", "this checkpoint has no experts")
        which = self._versions(session)
        found: dict[str, Said] = {}
        name = self.reader.name if self.readers.others else ""
        for version in sorted(which, key=["yours", "seen", "none"].index):
            found[version] = self.reader.explain(session.encoding(version, self.reader), text)
            versions = [(*titles[each], found.get(each)) for each in which]
            yield {self.result: drawings.turn_panel(text, versions, name)}
        shown = found["yours" if session.changed else "seen"]
        if shown.looked is not None:
            labels = {name: session.label(name, self.reader) for name in self.names}
            note = "with your changes" if session.changed else "with all experts" if self.names else "from the image"
            yield {self.looked: drawings.looked_panel(self.reader, session, labels, shown, note)}
        yield from self._compare(session, text)
        yield {self.status: drawings.status(1, 1, "Done.")}
        return found

    # ---- another checkpoint ----

    def _choose_other(self, name: str | None, request: gr.Request) -> Iterator[dict]:
        session = self._session(request)
        name = as_text(name or "", "checkpoint", MAX_LETTERS)
        if name and name not in self.readers.others:
            raise Refused(f"checkpoint: this must be one of {', '.join(self.readers.others)}.")
        session.other = name or None
        if session.turns:
            yield from self._compare(session, session.turns[-1][0])
            yield {self.status: drawings.status(1, 1, "Done.")}

    def _compare(self, session: Session, text: str | None) -> Iterator[dict]:
        """Shows the answer of the other checkpoint beside that of this one. It uses its own experts."""
        if session.other is None:
            yield {self.compared: gr.update(value="", visible=False)}
            return
        name = session.other
        yield {self.status: drawings.status(0, 2, f"{name}: running …")}
        reader = self.readers[name]
        try:
            reader.prompt(reader.task_of(text), text)
        except Refused as error:
            yield {self.compared: gr.update(value=drawings.refusal_panel(text, name, str(error)), visible=True)}
            return
        other = session.compared.get(name)
        if other is None:
            other = Session(image=session.image)
            for seen in reader.look(session.image):
                other.seen[seen.name], other.modes[seen.name] = seen.label, "seen"
                yield {self.status: drawings.status(1, 2, f"{name}: {reader.title(seen.name).lower()} …")}
            session.compared = {name: other}
        titles = {"seen": ("With all experts", "its own experts"), "none": (VERSIONS["none"], "the image alone")}
        which = ["seen", "none"] if reader.specs else ["seen"]
        found: dict[str, Said] = {}
        for version in which:
            found[version] = reader.explain(other.encoding(version, reader), text)
            versions = [(*titles[each], found.get(each)) for each in which]
            yield {self.compared: gr.update(value=drawings.turn_panel(text, versions, name), visible=True)}

    # ---- a place of the image ----

    def _point(self, request: gr.Request, event: gr.EventData) -> str:
        """Shows what the experts say about the place of a click, and questions about the object there."""
        session = self._with_image(request)
        try:
            x, y = (as_number(each) / side for each, side in zip(event_value(event, "index"), session.shown_size))
        except (TypeError, ValueError):
            raise Refused("place: two numbers are needed, x and y in pixels.") from None
        x, y = min(max(x, 0.0), 1.0), min(max(y, 0.0), 1.0)
        things = find_things(self.reader, session.seen)
        thing = thing_at(things, x, y)
        number = Counter(each.name for each in things)[thing.name] if thing else 0
        questions = self.examples.questions_about(thing.name, number) if thing and self.reader.question_task else []
        if number > 1:
            note = (
                f"The experts found {number} objects of this kind, so “the {thing.name}” would not name one of them."
            )
        elif questions:
            note = "The model reads words, not places. These questions name the object:"
        else:
            note = "The model reads words, not places, and no object is known here to ask about."
        return drawings.pointed_panel(
            session.image, (x, y), thing and thing.box, words_at(self.reader, session.seen, x, y), note, questions
        )

    # ---- questions ----

    def _versions(self, session: Session) -> list[str]:
        """Returns the versions that are shown side by side, by the names of `Session.encoding`."""
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
        session = self._with_image(request)
        question = as_text("" if question is None else question, "question", 2 * MAX_LETTERS).strip()
        self.reader.prompt(self.reader.task_of(question), question)
        yield {self.question: ""}
        yield from self._answer(session, question)

    def _ask_suggested(self, request: gr.Request, event: gr.EventData) -> Iterator[dict]:
        yield from self._ask(event_value(event, "question"), request)

    def _again(self, session: Session, name: str | None = None) -> Iterator[dict]:
        """Computes the last answer again, and shows it below the expert that was changed."""
        if not session.turns:
            return
        text, _ = session.turns[-1]
        yield {
            effect: drawings.effect(text, None, None) if each == name else "" for each, effect in self.effects.items()
        }
        found = yield from self._answer(session, text, is_new=False)
        if name is not None:
            effect = drawings.effect(text, found["yours"], found["seen"]) if session.changed else ""
            yield {self.effects[name]: effect}

    # ---- experts ----

    def _card(self, session: Session, name: str) -> str:
        note, failed = session.notes.get(name, ("", False))
        mode = session.modes.get(name, "seen")
        note = {"seen": note, "off": "off", "noise": "noise", "edited": "edited by you"}[mode]
        label = session.label(name, self.reader)
        return drawings.expert_card(self.reader, name, session.image, label, note, failed and mode == "seen")

    def _switch_value(self, session: Session, name: str) -> dict:
        return gr.update(choices=_choices(name in session.edits), value=session.modes.get(name, "seen"))

    def _switch(self, name: str) -> Callable:
        def switch(mode: str, request: gr.Request) -> Iterator[dict]:
            session = self._with_image(request)
            session.set_mode(name, mode)
            yield {self.cards[name]: self._card(session, name)}
            yield from self._again(session, name)

        return switch

    def _restore_all(self, request: gr.Request) -> Iterator[dict]:
        session = self._with_image(request)
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
            session = self._with_image(request)
            tool = edits.tool_for(self.reader.specs[name])
            if tool == "none":
                raise Refused(edits.NOT_EDITED.format(name))
            if tool == "words":
                self.reader.encode_words(["word"])  # raises its error now rather than after the first change
            return gr.update(visible=True), drawings.editor_value(self.reader, session, name)

        return open_editor

    def _edit(self, request: gr.Request, event: gr.EventData) -> Iterator[dict]:
        session = self._with_image(request)
        name = self._looked(session, event)
        session.edits[name] = edits.check_edit(event_value(event, "edit"), self.reader.specs[name])
        session.set_mode(name, "edited")
        yield from self._changed(session, name)

    def _reset(self, request: gr.Request, event: gr.EventData) -> Iterator[dict]:
        session = self._with_image(request)
        name = self._looked(session, event)
        session.edits.pop(name, None)
        session.set_mode(name, "seen")
        yield from self._changed(session, name)

    def _looked(self, session: Session, event: gr.EventData) -> str:
        """Returns the name of the expert that an event is about."""
        name = as_text(event_value(event, "name"), "name of the expert", MAX_LETTERS)
        if name not in session.seen:
            raise Refused(f"name of the expert: this must be one of {', '.join(session.seen) or 'none'}.")
        return name

    def _changed(self, session: Session, name: str) -> Iterator[dict]:
        yield {self.cards[name]: self._card(session, name), self.switches[name]: self._switch_value(session, name)}
        yield from self._again(session, name)

    # ---- the other tabs, and the link ----

    def _thumbnail(self, request: gr.Request) -> str:
        session = self._session(request)
        if session.image is None:
            return f'<p class="quiet">{NO_IMAGE}</p>'
        note = self._changes(session)
        note = f"With your changes: {note}" if note else ""
        return drawings.figure(drawings.fit(session.image, 240), "Your image", escape(note), "thumbnail")

    def _rank(self, text: str, prompt: str, request: gr.Request) -> str:
        session = self._session(request)
        if session.image is None:
            raise Refused(NO_IMAGE)
        labels = parse_labels(text)
        rankings = [
            (
                VERSIONS[version] if self.names else "Your labels",
                self.reader.rank(session.encoding(version, self.reader), labels, prompt),
            )
            for version in self._versions(session)
        ]
        return drawings.ranking_panel(rankings)

    def _share(self, request: gr.Request) -> dict:
        session = self._with_image(request)
        return gr.update(value="#" + links.to_link(session), visible=True)


def _choices(edited: bool) -> list[tuple[str, str]]:
    return [(title, mode) for mode, title in CHOICES.items() if edited or mode != "edited"]


def _messages(turns: list[tuple[str | None, str]]) -> list[dict[str, str]]:
    """Messages for the chat, which shows them as HTML."""
    messages = []
    for text, said in turns:
        if text is not None:
            messages.append({"role": "user", "content": escape(text)})
        messages.append({"role": "assistant", "content": escape(said)})
    return messages


def _chips_script(data: str) -> str:
    """A script that turns clicks on the buttons of an HTML component into the event "click" with the button's data."""
    return (
        "element.addEventListener('click', (event) => { const button = event.target.closest('button'); "
        f"if (button) trigger('click', {{ {data}: button.dataset.{data} }}); }});"
    )
