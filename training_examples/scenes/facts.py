"""The facts of a scene as plain data. Questions, captions and their checks are made from them."""

from typing import Any

import numpy as np

from .render import View, text_corners
from .scene import Scene


# Each object, and each board of a sign, must show at least this much.
LEAST_PIXELS = 0.004  # share of the image
LEAST_SHARE = 0.55  # share of the object
LEAST_SHARE_OF_BOARD = 0.985

# Smaller differences are not called left or right, in front or behind, nearer or farther.
MARGIN_SIDE = 0.09  # in image widths
MARGIN_DEPTH = 0.55
MARGIN_DISTANCE = 0.5


def is_clear(scene: Scene, view: View) -> bool:
    """Whether every object is visible enough for questions, and every sign can be read."""
    size = view.depth.shape[0]
    for number, part in enumerate(view.parts):
        if part.thing is None and not part.board:
            continue
        seen, whole = int((view.part == number).sum()), int(view.whole[number])
        if view.touches_border[number] or seen < LEAST_PIXELS * size**2:
            return False
        if seen < whole * (LEAST_SHARE_OF_BOARD if part.board else LEAST_SHARE):
            return False
    return True


def describe(scene: Scene, view: View) -> dict[str, Any]:
    """
    Args:
        scene (`Scene`): the scene.
        view (`View`): the view of the scene, at the size of the image.

    Returns:
        `dict` with

        - `place`: `"table"` or `"room"`.
        - `objects`: a dict for each object. `shape`, `color`, `material`, `size` and `on_stand` describe it.
          `position` (x, y, z) is its middle in the scene; `depth` (along the camera's axis) and `distance` (from the
          camera) belong to its middle. `center` (x, y, in image widths), `box` (left, top, right, bottom in pixels),
          `visible_pixels` and `visible_share` belong to its visible part.
        - `signs`: a dict for each sign with `word` and `on_wall`; `position`, `center`, `depth`, `distance` and `box`
          of its board, as above; and the `corners` of its word in pixels, clockwise from the top of the first letter.
    """
    size = view.depth.shape[0]
    objects = []
    for number, thing in enumerate(scene.things):
        whole = next(int(view.whole[k]) for k, part in enumerate(view.parts) if part.thing == number)
        mask = view.mask(thing=number)
        objects.append(
            {
                "shape": thing.shape,
                "color": thing.color,
                "material": thing.material,
                "size": thing.size,
                "on_stand": thing.stand is not None,
                "visible_pixels": int(mask.sum()),
                "visible_share": float(mask.sum() / max(1, whole)),
                **_place(scene, thing.center, mask, size),
            }
        )
    signs = []
    for number, sign in enumerate(scene.signs):
        signs.append(
            {
                "word": sign.word,
                "on_wall": sign.on_wall,
                "corners": (text_corners(scene, number) * size).tolist(),
                **_place(scene, sign.center, view.mask(sign=number), size),
            }
        )
    return {"place": "room" if scene.room.table is None else "table", "objects": objects, "signs": signs}


def _place(scene: Scene, center: np.ndarray, mask: np.ndarray, size: int) -> dict[str, Any]:
    rows, columns = np.nonzero(mask)
    return {
        "position": [float(value) for value in center],
        "center": [float((columns.mean() + 0.5) / size), float((rows.mean() + 0.5) / size)],
        "depth": float(scene.camera.project(center)[0, 2]),
        "distance": float(np.linalg.norm(center - scene.camera.position)),
        "box": [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1],
    }


# ---- relations, with their margins ----


def is_left(one: dict, other: dict) -> bool:
    """Whether one object or sign is clearly to the left of another in the image."""
    return other["center"][0] - one["center"][0] > MARGIN_SIDE


def is_in_front(one: dict, other: dict) -> bool:
    """Whether one is clearly closer to the camera's side of the room, both on the ground and by depth."""
    return (
        other["position"][1] - one["position"][1] > MARGIN_DEPTH and other["depth"] - one["depth"] > MARGIN_DEPTH / 2
    )


def is_nearer(one: dict, other: dict) -> bool:
    """Whether one is clearly nearer to the camera, both in a straight line and on the ground."""
    return other["distance"] - one["distance"] > MARGIN_DISTANCE and other["position"][1] > one["position"][1]


def ground_distance(one: dict, other: dict) -> float:
    return float(np.hypot(*(np.subtract(one["position"][:2], other["position"][:2]))))


def nearest_to_camera(objects: list[dict]) -> dict | None:
    """The object that is clearly nearer than all others, or `None`."""
    return _first_by(objects, is_nearer)


def farthest_from_camera(objects: list[dict]) -> dict | None:
    return _first_by(objects, lambda one, other: is_nearer(other, one))


def nearest_to_sign(objects: list[dict], sign: dict) -> dict | None:
    """The object that is clearly nearest to the sign on the ground, or `None`."""

    def closer(one: dict, other: dict) -> bool:
        near, far = ground_distance(one, sign), ground_distance(other, sign)
        return far - near > MARGIN_DISTANCE and far > 1.3 * near

    return None if sign["on_wall"] else _first_by(objects, closer)


def _first_by(objects: list[dict], comes_before) -> dict | None:
    for one in objects:
        if len(objects) > 1 and all(one is other or comes_before(one, other) for other in objects):
            return one
    return None
