"""The page's contents as HTML. Images are part of the HTML, so that nothing is written to disk."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import edits
import numpy as np
import torch
from images import data_uri, escape
from PIL import Image, ImageDraw
from reader import Reader, Said
from sessions import Session

from modeling_prismer import ExpertSpec
from modeling_prismer.expert_spec import BACKGROUND
from modeling_prismer.processing.expert_labels import label_parts
from modeling_prismer.processing.experts import look_of
from modeling_prismer.processing.visualization import PALETTE, Drawing, draw_expert, value_color


SIZE = 384
LEAST_SHARE = 0.005  # rounds to 1 %


def fit(image: Image.Image, size: int = SIZE) -> Image.Image:
    scale = size / max(image.size)
    return image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)


def percent(share: float) -> str:
    return "under 1 %" if 0 < share < LEAST_SHARE else f"{100 * share:.0f} %"


def figure(image: Image.Image, alt: str, caption: str = "", kind: str = "") -> str:
    caption = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure class="{kind}"><img src="{data_uri(image)}" alt="{escape(alt)}">{caption}</figure>'


# ---- experts ----


def drawn_label(reader: Reader, image: Image.Image, name: str, label: Any) -> Drawing:
    """Calls [`draw_expert`] with the checkpoint's names of classes."""
    return draw_expert(image, reader.specs[name], label, reader.class_names(name), SIZE)


def expert_card(
    reader: Reader, name: str, image: Image.Image, label: Any, note: str = "", failed: bool = False
) -> str:
    """The output of an expert, with its legend."""
    look = look_of(name)
    head = (
        f'<div class="card-head"><h3>{escape(look.title)}</h3><span class="quiet">{escape(note)}</span></div>'
        f'<p class="quiet explained">{escape(look.meaning)}</p>'
    )
    if label is None:
        said = (
            "This expert failed on the image. The model answers without it."
            if failed
            else "Switched off: the model answers without this."
        )
        ratio = f"aspect-ratio: {image.width} / {image.height}"
        return f'<div class="card">{head}<div class="missing" style="{ratio}"><p>{said}</p></div></div>'
    drawn = drawn_label(reader, image, name, label)
    legend = ""
    if drawn.scale:
        low, colors, high = drawn.scale
        steps = ", ".join(f"rgb({int(r)} {int(g)} {int(b)})" for r, g, b in colors)
        bar = f'<span class="scale" style="background: linear-gradient(to right, {steps})"></span>'
        legend = f'<p class="legend"><span>{low}</span>{bar}<span>{high}</span></p>'
    elif drawn.legend:
        shown = drawn.legend[:10]
        items = "".join(
            f'<li><i style="background: rgb{tuple(int(part) for part in color)}"></i>{escape(text)}</li>'
            for color, text in shown
        )
        more = len(drawn.legend) - len(shown)
        items += f"<li>and {more} more</li>" if more else ""
        legend = f'<ul class="legend">{items}</ul>'
    elif drawn.subtitle:
        legend = f'<p class="legend quiet">{escape(drawn.subtitle)}</p>'
    alt = f"{look.title}: {look.meaning or 'the output of this expert'}"
    if drawn.legend:
        alt += f"; {', '.join(text for _, text in drawn.legend[:10])}"
    return f'<div class="card">{head}{figure(drawn.image, alt)}{legend}</div>'


def waiting_card(reader: Reader, name: str) -> str:
    look = look_of(name)
    return (
        f'<div class="card"><div class="card-head"><h3>{escape(look.title)}</h3>'
        f'<span class="quiet">running …</span></div><p class="quiet explained">{escape(look.meaning)}</p>'
        '<div class="missing waiting"></div></div>'
    )


def status(done: int, total: int, text: str) -> str:
    bar = f'<progress max="{total}" value="{done}" aria-label="Progress"></progress>' if done < total else ""
    return f'<div class="status" role="status">{bar}<span>{escape(text)}</span></div>'


# ---- answers ----


def turn_panel(question: str | None, versions: Sequence[tuple[str, str, Said | None]], name: str = "") -> str:
    """
    Shows the answers to one question, or the captions, side by side: (title, note, answer) of each version of the
    inputs. `name` is the checkpoint's.
    """
    columns = "".join(_version(question is None, *version) for version in versions)
    return f'<section class="turn">{_heading(question, name)}<div class="versions">{columns}</div></section>'


def refusal_panel(question: str | None, name: str, reason: str) -> str:
    """Says why a checkpoint has no answer."""
    said = f'<article class="version"><p class="quiet">{escape(reason)}</p></article>'
    return f'<section class="turn">{_heading(question, name)}<div class="versions">{said}</div></section>'


def _heading(question: str | None, name: str) -> str:
    heading = "Caption" if question is None else escape(question)
    return f"<h2>{heading}</h2>" + (f'<p class="quiet checkpoint">{escape(name)}</p>' if name else "")


def _version(is_caption: bool, title: str, note: str, said: Said | None) -> str:
    head = f'<h3>{escape(title)}</h3><p class="quiet note">{escape(note)}</p>'
    if said is None:
        return f'<article class="version">{head}<p class="answer quiet">…</p></article>'
    sure = said.per_word if is_caption else said.probability
    meaning = "sure of each word, on average" if is_caption else "sure"
    bar = f'<span class="bar" aria-hidden="true"><i style="width: {100 * sure:.1f}%"></i></span>'
    likely = said.others[:2] if is_caption else [pair for pair in said.others if pair[1] >= LEAST_SHARE]
    others = "".join(
        f"<li><span>{escape(other) or '(nothing)'}</span>"
        + ("" if is_caption else f"<span>{percent(probability)}</span>")
        + "</li>"
        for other, probability in likely
    )
    if said.others and not likely:
        others = "<li>each under 1 %</li>"
    return (
        f'<article class="version">{head}<p class="answer">{escape(said.text) or "(nothing)"}</p>'
        f'<p class="chance">{bar}<span><b>{percent(sure)}</b> {meaning}</span></p>'
        + (f'<p class="quiet or">Other answers</p><ol class="others">{others}</ol>' if others else "")
        + "</article>"
    )


def effect(question: str | None, yours: Said | None, seen: Said | None) -> str:
    """The answer after a change to an expert, and the one before it. It stands at the expert's switch."""
    if yours is None or seen is None:
        return '<p class="effect quiet">Answering …</p>'

    def part(title: str, said: Said) -> str:
        sure = said.per_word if question is None else said.probability
        return f"<span>{title}</span> <b>{escape(said.text) or '(nothing)'}</b> <span>{percent(sure)}</span>"

    heading = "Caption" if question is None else escape(question)
    return (
        f'<div class="effect"><p class="quiet">{heading}</p><p>{part("now", yours)}</p>'
        f"<p>{part('with all experts', seen)}</p></div>"
    )


def pointed_panel(
    image: Image.Image,
    place: tuple[float, float],
    box: Sequence[float] | None,
    said: Sequence[tuple[str, str]],
    note: str,
    questions: Sequence[str],
) -> str:
    """
    Shows what the experts say about a place of the image (between 0 and 1), marked in a small copy of it, and
    questions about the object there.
    """
    small = fit(image, 160)
    draw = ImageDraw.Draw(small)
    if box is not None:
        corners = [side * length for side, length in zip(box, small.size * 2)]
        draw.rectangle(corners, outline="white", width=4)
        draw.rectangle(corners, outline="#0b7285", width=2)
    x, y = (part * length for part, length in zip(place, small.size))
    for radius, color in ((6, "white"), (4, "#0b7285")):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
    items = "".join(f"<li><span>{escape(title)}</span> <b>{escape(words)}</b></li>" for title, words in said)
    listed = f"<ul>{items}</ul>" if items else '<p class="quiet">No expert says anything about this place.</p>'
    return (
        f'<section class="pointed">{figure(small, "Your image with the place that you clicked")}'
        f'<div><h2>At this place</h2>{listed}<p class="quiet">{escape(note)}</p>{chips(questions)}</div></section>'
    )


def chips(questions: Sequence[str]) -> str:
    """Buttons that ask a question."""
    made = "".join(f'<button type="button" data-question="{escape(q)}">{escape(q)}</button>' for q in questions)
    return f'<div class="chips">{made}</div>' if made else ""


def looked_panel(reader: Reader, session: Session, labels: Mapping[str, Any], said: Said, which: str) -> str:
    """Shows the attention: the image and each expert's map, bright where the model attended, dim elsewhere."""
    shares = {"": said.looked.sum().item()}
    shares |= {
        name: looked.sum().item() for name, looked in said.looked_at_experts.items() if labels.get(name) is not None
    }
    total = sum(shares.values()) or 1.0
    figures = []
    for name, share in shares.items():
        share /= total
        if name:
            base = drawn_label(reader, session.image, name, labels[name]).image
            title, weights = reader.title(name), said.looked_at_experts[name]
        else:
            base, title, weights = fit(session.image), "The image", said.looked
        caption = f"<b>{escape(title)}</b><span>{percent(share)}</span>"
        alt = f"{title}, bright where the model attended: {percent(share)} of its attention"
        figures.append(figure(spotlight(base.convert("RGB"), weights), alt, caption))
    return (
        f'<section class="looked"><h2>Attention</h2><p class="quiet">Attention shows where the model looked; it is '
        f"not an explanation. Bright places got more of it for “{escape(said.text)}”, {escape(which)}. The shares sum "
        "to 100 %.</p>"
        f'<div class="strip">{"".join(figures)}</div></section>'
    )


def spotlight(image: Image.Image, weights: torch.Tensor) -> Image.Image:
    """The image, bright where the weights (height, width) are large, grey and dim where they are small."""
    values = weights.float().numpy()
    values = np.clip(values / max(float(np.quantile(values, 0.98)), 1e-12), 0, 1)
    mask = Image.fromarray((255 * values).astype(np.uint8)).resize(image.size, Image.Resampling.BICUBIC)
    dim = image.convert("L").point(lambda value: round(0.3 * value)).convert("RGB")
    return Image.composite(image, dim, mask)


def ranking_panel(rankings: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> str:
    """Ranked labels, with one column for each version of the inputs."""
    columns = []
    for title, ranking in rankings:
        rows = "".join(
            f'<li><span class="label">{escape(row["label"])}</span>'
            f'<span class="bar" aria-hidden="true"><i style="width: {100 * row["share"]:.1f}%"></i></span>'
            f'<span class="number">{percent(row["share"])}</span></li>'
            for row in ranking
        )
        columns.append(f'<article class="version"><h3>{escape(title)}</h3><ol class="ranking">{rows}</ol></article>')
    note = "The model compares your labels with each other only, so the shares always sum to 100 %, even if none fits."
    return f'<section class="turn"><div class="versions">{"".join(columns)}</div><p class="quiet">{note}</p></section>'


def warning(text: str) -> str:
    return f'<div class="warning" role="alert"><b>Unfamiliar image.</b> {escape(text)}</div>'


# ---- the editor ----


def editor_value(reader: Reader, session: Session, name: str) -> str:
    """The editor's data, as JSON for editor.js."""
    spec, label = reader.specs[name], session.seen.get(name)
    tool = edits.tool_for(spec)
    edit = session.edits.get(name)
    content: dict[str, Any] = {"name": name, "title": reader.title(name), "tool": tool}
    names = reader.class_names(name)
    if tool == "paint":
        base = fit(session.image)
        if label is not None:
            base = drawn_label(reader, session.image, name, label).image
        content |= {"image": data_uri(base), "values": _paints(spec, names, label)}
        content["strokes"] = edit["strokes"] if edit else []
    else:
        content |= {"image": data_uri(fit(session.image)), "classes": names}
        content["boxes"] = edit["boxes"] if edit else edits.boxes_of(label)
        content["original"] = edits.boxes_of(label)
    return json.dumps(content)


def _paints(spec: ExpertSpec, names: list[str], label: Any) -> list[dict[str, Any]]:
    """The values to paint with: name, value, colour."""
    if spec.is_label:
        areas = np.zeros(256)
        if label is not None:
            areas = np.bincount(np.ravel(label_parts(label, is_dense=False)["ids"]), minlength=256)
        order = [int(index) for index in np.argsort(-areas[:BACKGROUND], kind="stable") if index < len(names)]
        colors = {index: PALETTE[place % len(PALETTE)] for place, index in enumerate(order)}
        chosen = [{"label": names[index], "value": index, "color": _css(colors[index])} for index in order]
        return [*chosen, {"label": "nothing", "value": BACKGROUND, "color": "#777777"}]
    look = look_of(spec.name)
    paints = look.paints or ((look.ends[1], 255), (look.ends[0], 0))
    if spec.channels > 1:
        paints = look.paints or tuple((str(value), (value,) * spec.channels) for value in (255, 0))
    return [{"label": text, "value": value, "color": _css(value_color(value, look))} for text, value in paints]


def _css(color: Sequence[int]) -> str:
    return "#" + "".join(f"{int(part):02x}" for part in color)
