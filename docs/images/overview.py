"""Draws overview.svg: how an image becomes text. Run it again after a change: python docs/images/overview.py"""

from pathlib import Path


FROZEN, TRAINED, PLAIN = "#cfe3f7", "#ffdca8", "#f3f4f6"
INK, LINE = "#1f2937", "#6b7280"
parts = []


def box(x, y, width, height, fill, *lines, size=15, dashed=False):
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    parts.append(
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{fill}" stroke="{LINE}"{dash}/>'
    )
    top = y + height / 2 - (len(lines) - 1) * 0.6 * size
    for i, line in enumerate(lines):
        weight = ' font-weight="600"' if i == 0 else ""
        step = size if i == 0 else size - 2
        parts.append(
            f'<text x="{x + width / 2}" y="{top + i * 1.25 * size}" font-size="{step}"{weight} '
            f'text-anchor="middle" dy="0.35em">{line}</text>'
        )


def arrow(x1, y1, x2, y2):
    parts.append(f'<path d="M{x1} {y1} L{x2} {y2}" stroke="{LINE}" stroke-width="2" marker-end="url(#head)"/>')


box(20, 150, 110, 70, PLAIN, "image")
for i, name in enumerate(("depth", "normals", "segmentation", "edges", "detection", "text (OCR)")):
    y = 20 + i * 58
    box(180, y, 130, 44, FROZEN, name)
    arrow(130, 185, 178, y + 22)
    box(355, y, 90, 44, TRAINED, "stem")
    arrow(310, y + 22, 353, y + 22)
    arrow(445, y + 22, 493, 195)
parts.append(f'<path d="M75 220 L75 400 L560 400" fill="none" stroke="{LINE}" stroke-width="2"/>')
parts.append(
    f'<path d="M560 400 L655 400 L655 297" fill="none" stroke="{LINE}" stroke-width="2" marker-end="url(#head)"/>'
)
parts.append('<text x="330" y="390" font-size="13" text-anchor="middle">patches of the image</text>')
box(495, 150, 110, 90, TRAINED, "resampler", "64 latents")
arrow(605, 195, 638, 195)
box(640, 100, 150, 195, FROZEN, "", "", "", "", "")
parts.append('<text x="715" y="130" font-size="15" font-weight="600" text-anchor="middle">CLIP ViT</text>')
parts.append('<text x="715" y="152" font-size="13" text-anchor="middle">frozen layers</text>')
box(660, 180, 110, 40, TRAINED, "adaptors", size=14)
arrow(790, 195, 828, 195)
box(830, 100, 160, 195, FROZEN, "", "", "", "", "")
parts.append('<text x="910" y="130" font-size="15" font-weight="600" text-anchor="middle">RoBERTa</text>')
parts.append('<text x="910" y="152" font-size="13" text-anchor="middle">frozen layers, causal</text>')
box(842, 172, 136, 40, TRAINED, "cross-attention", size=14)
box(842, 226, 136, 40, TRAINED, "adaptors", size=14)
arrow(990, 195, 1028, 195)
box(1030, 150, 130, 90, PLAIN, "text", "caption, answer,", "class")
box(830, 350, 160, 44, PLAIN, "prompt, question", size=14)
arrow(910, 350, 910, 297)
box(1030, 300, 22, 22, FROZEN, "")
parts.append('<text x="1062" y="312" font-size="13" dy="0.35em">frozen</text>')
box(1030, 334, 22, 22, TRAINED, "")
parts.append('<text x="1062" y="346" font-size="13" dy="0.35em">trained</text>')

svg = (
    f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1180 420" font-family="DejaVu Sans, Arial, sans-serif" \
fill="{INK}" role="img" aria-label="An image and the maps of six frozen experts go through a vision encoder to text">
<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">\
<path d="M0 0 L10 5 L0 10 z" fill="{LINE}"/></marker></defs>
<rect width="1180" height="420" fill="#ffffff"/>
"""
    + "\n".join(parts)
    + "\n</svg>\n"
)
Path(__file__).with_suffix(".svg").write_text(svg)
