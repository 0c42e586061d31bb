"""The page's contents as HTML. Images are part of the HTML, so that nothing is written to disk."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import edits
import numpy as np
import torch
from images import data_uri, escape
from PIL import Image
from reader import Reader, Said
from sessions import Session

from modeling_prismer import ExpertSpec
from modeling_prismer.expert_spec import BACKGROUND
from modeling_prismer.processing.expert_labels import label_parts
from modeling_prismer.processing.experts import look_of
from modeling_prismer.processing.visualization import PALETTE, Drawing, draw_expert, value_color


SIZE = 384


def fit(image: Image.Image, size: int = SIZE) -> Image.Image:
    scale = size / max(image.size)
    return image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)


def percent(share: float) -> str:
    return "under 1 %" if 0 < share < 0.005 else f"{100 * share:.0f} %"


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
            else "Switched off: the model does not get this."
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


def turn_panel(question: str | None, versions: Sequence[tuple[str, str, Said | None]]) -> str:
    """
    Shows the answers to one question, or the captions, side by side: (title, note, answer) of each version of the
    inputs.
    """
    heading = "The caption" if question is None else escape(question)
    columns = "".join(_version(question is None, *version) for version in versions)
    return f'<section class="turn"><h2>{heading}</h2><div class="versions">{columns}</div></section>'


def _version(is_caption: bool, title: str, note: str, said: Said | None) -> str:
    head = f'<h3>{escape(title)}</h3><p class="quiet note">{escape(note)}</p>'
    if said is None:
        return f'<article class="version">{head}<p class="answer quiet">…</p></article>'
    sure = said.per_word if is_caption else said.probability
    meaning = "mean probability of a word" if is_caption else "probability"
    bar = f'<span class="bar" aria-hidden="true"><i style="width: {100 * sure:.1f}%"></i></span>'
    if is_caption:
        others = "".join(f"<li><span>{escape(other)}</span></li>" for other, _ in said.others[:2])
    else:
        others = "".join(
            f"<li><span>{escape(other) or '(nothing)'}</span><span>{percent(probability)}</span></li>"
            for other, probability in said.others
        )
    return (
        f'<article class="version">{head}<p class="answer">{escape(said.text) or "(nothing)"}</p>'
        f'<p class="chance">{bar}<span><b>{percent(sure)}</b> {meaning}</span></p>'
        + (f'<p class="quiet or">alternatives</p><ol class="others">{others}</ol>' if others else "")
        + "</article>"
    )


def answer_bar(question: str | None, versions: Sequence[tuple[str, str, Said | None]]) -> str:
    """The answers in one line, which stays visible next to the experts."""
    parts = "".join(
        f"<li><span>{escape(title)}</span> <b>{escape(said.text) if said else '…'}</b>"
        + (f" {percent(said.per_word if question is None else said.probability)}" if said else "")
        + "</li>"
        for title, _, said in versions
    )
    heading = "The caption" if question is None else escape(question)
    return f'<div class="answer-bar"><p>{heading}</p><ul>{parts}</ul></div>'


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
        f'<section class="looked"><h2>Attention</h2><p class="quiet">For “{escape(said.text)}”, {escape(which)}.'
        " Bright places got the attention of the text, directly or through the latents of the experts' maps. The "
        "shares sum to 100 %. Attention is a hint, not a proof.</p>"
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
    note = "The shares are a softmax of the mean log-probabilities of the labels' tokens."
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
