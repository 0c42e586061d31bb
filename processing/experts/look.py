"""`ExpertLook` says how people see an expert's labels: title, colours, legend."""

from dataclasses import dataclass


Color = tuple[int, int, int]  # red, green, blue, 0 to 255


@dataclass(frozen=True)
class ExpertLook:
    """
    How the labels of an expert are shown to people: in panels, in the Space and in its editor. A class of experts has
    it as the attribute `look`. It then holds for every expert of that `name`, also where only a label store or a
    checkpoint names the expert. How a map is drawn follows from its `kind` and `channels`.

    Args:
        title (`str`): a heading such as `"Surface normals"`.
        meaning (`str`, *optional*): what the map tells, to follow the title: `"which way each surface faces"`.
        ends (`tuple[str, str]`, *optional*, defaults to `("low", "high")`):
            The meaning of the values 0 and 255 of a map with one channel.
        is_grey (`bool`, *optional*, defaults to `False`):
            Draw a map with one channel as it is, in grey. By default its values are stretched over a colour map.
        legend (`tuple[tuple[Color, str], ...]`, *optional*):
            Colours of a map with three channels and their meanings, such as `((255, 128, 128), "x")`.
        paints (`tuple[tuple[str, int | Color], ...]`, *optional*):
            Names and values that an editor offers for a dense map. By default the two `ends`.

    Example:

    ```python
    >>> import numpy as np
    >>> from modeling_prismer.processing.experts import Expert, ExpertLook
    >>> from modeling_prismer.processing.visualization import draw_expert

    >>> class Heat(Expert):
    ...     name, kind, channels = "heat", "dense", 1
    ...     look = ExpertLook("Temperature", "how warm everything is", ends=("cold", "warm"))

    >>> drawing = draw_expert(image, "heat", np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) // 16)
    >>> drawing.title, drawing.scale[0], drawing.scale[2]
    ('Temperature', 'cold', 'warm')
    ```
    """

    title: str
    meaning: str = ""
    ends: tuple[str, str] = ("low", "high")
    is_grey: bool = False
    legend: tuple[tuple[Color, str], ...] = ()
    paints: tuple[tuple[str, int | Color], ...] = ()
