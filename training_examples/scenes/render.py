"""
A small ray-caster. It renders the image of a scene, and finds the part of the scene at each pixel.

Each ray is intersected with every part of the scene that it can reach. One soft light with shadows and an ambient
light, darker in corners, light the scene. Shiny objects mirror the ground and the walls.
"""

import math
from dataclasses import dataclass

import numpy as np

from .lettering import board_texture, text_box
from .patterns import flat_color, striped_color
from .scene import Camera, Room, Scene, Sign, Surface, Thing, hsv
from .solids import Ball, Box, Cone, Cylinder, Plane, Pyramid, Ring, Solid, dot, rotation


CLASSES = (
    "floor",
    "wall",
    "table",
    "stand",
    "sign",
    "picture",
    "ball",
    "cube",
    "cylinder",
    "cone",
    "ring",
    "pyramid",
)


@dataclass
class Part:
    """A solid with its class and its surface."""

    solid: Solid
    label: str  # one of CLASSES
    surface: Surface
    thing: int | None = None
    sign: int | None = None
    board: bool = False  # whether it is the part of a sign with the word
    shades: bool = True  # whether it casts a shadow


@dataclass
class View:
    """
    The surfaces that the rays of an image hit. Arrays are (height, width) unless stated otherwise.

    Attributes:
        depth: depth along the camera's axis.
        part: index of the part in `parts`.
        normal: (height, width, 3) unit normal: right, up, towards the camera.
        whole: (parts,) number of pixels that each part would have if nothing were in front of it.
        touches_border: (parts,) whether each part reaches the border of the image, visible or not.
        parts: the parts of the scene.
    """

    depth: np.ndarray
    part: np.ndarray
    normal: np.ndarray
    whole: np.ndarray
    touches_border: np.ndarray
    parts: list[Part]

    def mask(self, thing: int | None = None, sign: int | None = None) -> np.ndarray:
        """The mask of the visible part of an object, or of the board of a sign."""
        chosen = [
            number
            for number, part in enumerate(self.parts)
            if (thing is not None and part.thing == thing) or (sign is not None and part.sign == sign and part.board)
        ]
        return np.isin(self.part, chosen)


def look(scene: Scene, size: int) -> View:
    """The view of a scene, from one ray through the middle of each pixel."""
    parts = make_parts(scene)
    depth, part, whole, touches, _ = _trace(scene.camera, parts, size)
    points, normals = _surface_points(scene.camera, parts, depth, part)
    axes = (scene.camera.axes * np.array([[1], [1], [-1]])).astype(np.float32)
    normal = (axes @ normals).T.reshape(size, size, 3)
    return View(depth, part, normal, whole, touches, parts)


def render(scene: Scene, size: int, samples: int = 2) -> np.ndarray:
    """The image of a scene, uint8 (size, size, 3), from `samples`² rays per pixel."""
    parts = make_parts(scene)
    rays = size * samples
    depth, part, _, _, directions = _trace(scene.camera, parts, rays)
    points, normals = _surface_points(scene.camera, parts, depth, part)
    directions = directions.reshape(3, -1)
    directions = directions / np.sqrt(dot(directions, directions))

    color = np.zeros_like(points)
    gloss = np.zeros(points.shape[1], np.float32)
    glare = np.zeros(points.shape[1], np.float32)
    shiny = []
    for number, members in _members(parts, part):
        color[:, members] = _albedo(scene, parts[number], points[:, members], normals[:, members])
        material = parts[number].surface.pattern
        gloss[members] = {"matte": 0.04, "shiny": 0.3}.get(material, 0.0)
        if material == "shiny":
            shiny.append(members)
            glare[members] = _glare(parts[number], points[:, members], normals[:, members])

    light, towards = scene.light, scene.light.direction.astype(np.float32)
    lit = np.maximum(towards @ normals, 0)
    lit *= _unshadowed(scene, parts, points, normals, lit, samples)
    hemisphere = 0.72 + 0.28 * normals[2]
    ambient = hemisphere * _openness(parts, part, points, normals)
    key, sky = light.color.astype(np.float32)[:, None], light.sky.astype(np.float32)[:, None]
    shaded = color * (key * lit + sky * ambient)

    halfway = towards[:, None] - directions
    halfway /= np.sqrt(dot(halfway, halfway))
    shine = np.maximum(dot(halfway, normals), 0) ** 24
    shaded += key * gloss * shine * (lit > 0)
    if shiny:
        members = np.concatenate(shiny)
        mirrored = _mirrored(scene, points[:, members], normals[:, members], directions[:, members])
        tint = 0.06 + 0.94 * color[:, members]
        mirrored = mirrored + 1.1 * glare[members]
        # mirrors less where little ambient light arrives
        shaded[:, members] = 0.38 * shaded[:, members] + 1.1 * tint * mirrored * (0.35 + 0.65 * ambient[members])
        spark = np.maximum(dot(halfway[:, members], normals[:, members]), 0) ** 90
        shaded[:, members] += 1.4 * key * spark * (lit[members] > 0)

    shaded = shaded.reshape(3, rays, rays)
    offsets = [(row, column) for row in range(samples) for column in range(samples)]
    pixels = sum(shaded[:, row::samples, column::samples] for row, column in offsets) / len(offsets)
    pixels = np.where(pixels > 0.8, 0.8 + 0.2 * (1 - np.exp(-(pixels - 0.8) / 0.2)), pixels)  # highlights keep color
    return (np.maximum(pixels, 0) ** (1 / 2.2) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0)


def text_corners(scene: Scene, number: int) -> np.ndarray:
    """Corners of a sign's word in image widths, (4, 2), clockwise from the top of the first letter."""
    sign = scene.signs[number]
    left, top, right, bottom = text_box(sign.text)
    across = np.array([left, right, right, left]) - 0.5
    down = np.array([top, top, bottom, bottom]) - 0.5
    own = np.stack([across * sign.width, np.full(4, -BOARD_THICKNESS / 2), -down * sign.height], axis=1)
    return scene.camera.project(own @ rotation(sign.yaw, sign.tilt) + sign.center)[:, :2]


# ---- parts of a scene ----

BOARD_THICKNESS = 0.06


def make_parts(scene: Scene) -> list[Part]:
    parts = _room_parts(scene.room)
    for number, thing in enumerate(scene.things):
        if thing.stand is not None:
            half = 0.82 * thing.radius
            center = (thing.x, thing.y, thing.z / 2)
            parts.append(Part(Box(center, (half, half, thing.z / 2), rotation(scene.room.yaw)), "stand", thing.stand))
        parts.append(Part(_thing_solid(thing), thing.shape, thing.surface, thing=number))
    for number, sign in enumerate(scene.signs):
        parts += _sign_parts(sign, number)
    return parts


def _room_parts(room: Room) -> list[Part]:
    frame = rotation(room.yaw)
    along, across = frame[0], frame[1]
    floor = (0, 0, room.floor_height)
    toward = np.stack([along, np.array([0, 0, 1]), -across]).astype(np.float32)  # own z points out of the wall
    outward = -math.copysign(1, room.side)
    sideways = np.stack([across, np.array([0, 0, 1]), outward * along]).astype(np.float32)
    parts = [
        Part(Plane(floor, frame), "floor", room.floor, shades=False),
        Part(Plane(room.back * across + floor, toward), "wall", room.wall, shades=False),
        Part(Plane(room.side * along + floor, sideways), "wall", room.wall, shades=False),
    ]
    for place, height, half_width, half_height, surface in room.pictures:
        center = place * along + (room.back - 0.03) * across + np.array([0, 0, height])
        frame_surface = Surface("plain", hsv(30, 0.3, 0.35), hsv(30, 0.3, 0.3))
        parts.append(Part(Box(center, (half_width + 0.07, 0.03, half_height + 0.07), frame), "picture", frame_surface))
        center = center - 0.02 * across
        parts.append(Part(Box(center, (half_width, 0.03, half_height), frame), "picture", surface, shades=False))
    if room.table is not None:
        width, depth = room.table_size
        parts.append(Part(Box((0, 0, -0.09), (width, depth, 0.09), frame), "table", room.table))
        for x, y in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
            foot = (x * (width - 0.2), y * (depth - 0.2), 0)
            center = foot @ frame + np.array([0, 0, (room.floor_height - 0.18) / 2])
            half = (-room.floor_height - 0.18) / 2
            parts.append(Part(Box(center, (0.11, 0.11, half), frame), "table", room.table))
    return parts


def _thing_solid(thing: Thing) -> Solid:
    center, radius, frame = thing.center, thing.radius, rotation(thing.yaw)
    if thing.shape == "ball":
        return Ball(center, radius)
    if thing.shape == "cube":
        return Box(center, (0.8 * radius,) * 3, frame)
    if thing.shape == "cylinder":
        return Cylinder(center, 0.75 * radius, 1.7 * radius, frame)
    if thing.shape == "cone":
        return Cone(center, 0.95 * radius, 1.9 * radius, frame)
    if thing.shape == "pyramid":
        return Pyramid(center, 0.9 * radius, 1.7 * radius, frame)
    return Ring(center, 0.75 * radius, 0.28 * radius, rotation(thing.yaw, math.pi / 2 if thing.upright else 0))


def _sign_parts(sign: Sign, number: int) -> list[Part]:
    frame = rotation(sign.yaw, sign.tilt)
    board = Surface("board", sign.board, sign.ink)
    half = (sign.width / 2, BOARD_THICKNESS / 2, sign.height / 2)
    parts = [Part(Box(sign.center, half, frame), "sign", board, sign=number, board=True)]
    if not sign.on_wall:
        post = Surface("plain", hsv(30, 0.2, 0.42), hsv(30, 0.2, 0.36))
        back = np.array([0, BOARD_THICKNESS, 0]) @ frame
        x, y = sign.x + back[0], sign.y + back[1]
        parts.append(Part(Cylinder((x, y, sign.z / 2), 0.055, sign.z), "sign", post, sign=number))
        parts.append(Part(Cylinder((x, y, 0.03), 0.3, 0.06), "sign", post, sign=number))
    return parts


# ---- rays ----


def _trace(camera: Camera, parts: list[Part], rays: int):
    """Depth and part per ray of a square grid; `whole` and `touches_border`; directions (3, rays, rays) of depth 1."""
    axes, origin = camera.axes.astype(np.float32), camera.position.astype(np.float32)[:, None]
    across = (((np.arange(rays) + 0.5) / rays - 0.5) / camera.focal_length).astype(np.float32)
    directions = axes[2][:, None, None] + axes[0][:, None, None] * across + axes[1][:, None, None] * -across[:, None]
    depth = np.full((rays, rays), np.float32(np.inf))
    part = np.full((rays, rays), -1, np.int16)
    whole, touches = np.zeros(len(parts), np.int64), np.zeros(len(parts), bool)
    for number, each in enumerate(parts):
        top, bottom, left, right = _window(camera, each.solid, rays)
        if top >= bottom or left >= right:
            continue
        window = (slice(top, bottom), slice(left, right))
        toward = directions[(slice(None), *window)]
        t = each.solid.hit(origin, toward.reshape(3, -1)).reshape(toward.shape[1:])
        seen = np.isfinite(t)
        whole[number] = seen.sum()
        touches[number] = (
            (top == 0 and seen[0].any())
            or (left == 0 and seen[:, 0].any())
            or (bottom == rays and seen[-1].any())
            or (right == rays and seen[:, -1].any())
        )
        nearer = t < depth[window]
        depth[window] = np.where(nearer, t, depth[window])
        part[window] = np.where(nearer, number, part[window])
    return depth, part, whole, touches, directions


def _window(camera: Camera, solid: Solid, rays: int) -> tuple[int, int, int, int]:
    """The rows and columns of rays that may hit a solid: top, bottom, left, right."""
    if not np.isfinite(solid.reach):
        return 0, rays, 0, rays
    x, y, z = camera.axes @ (solid.center - camera.position)
    if z - solid.reach < 0.1:
        return 0, rays, 0, rays
    corners = np.array([[sign * solid.reach, d * solid.reach] for sign in (-1, 1) for d in (-1, 1)])
    columns = 0.5 + camera.focal_length * (x + corners[:, 0]) / (z + corners[:, 1])
    rows = 0.5 - camera.focal_length * (y + corners[:, 0]) / (z + corners[:, 1])
    limits = [rows.min(), rows.max(), columns.min(), columns.max()]
    low_high = [math.floor(limit * rays) + (number % 2) for number, limit in enumerate(limits)]
    return tuple(min(rays, max(0, limit)) for limit in low_high)


def _members(parts: list[Part], part: np.ndarray):
    """Each visible part, with the indices of its rays."""
    flat = part.reshape(-1)
    order = np.argsort(flat, kind="stable")
    numbers, starts = np.unique(flat[order], return_index=True)
    for number, members in zip(numbers, np.split(order, starts[1:])):
        if number >= 0:
            yield int(number), members


def _surface_points(camera: Camera, parts: list[Part], depth: np.ndarray, part: np.ndarray):
    """Points and normals in the world, (3, rays)."""
    rays = depth.shape[0]
    across = (((np.arange(rays) + 0.5) / rays - 0.5) / camera.focal_length).astype(np.float32)
    seen = np.stack([np.broadcast_to(across, depth.shape), np.broadcast_to(-across[:, None], depth.shape)])
    seen = np.concatenate([seen * depth, depth[None]]).reshape(3, -1)
    points = camera.axes.T.astype(np.float32) @ seen + camera.position.astype(np.float32)[:, None]
    normals = np.zeros_like(points)
    for number, members in _members(parts, part):
        solid = parts[number].solid
        normals[:, members] = solid.normal(solid.to_own(points[:, members]))
    return points, normals


# ---- light ----


def _albedo(scene: Scene, part: Part, points: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """The color of the surface without light, linear RGB (3, points)."""
    surface, solid = part.surface, part.solid
    own = solid.to_own(points)
    if surface.pattern in ("matte", "shiny"):
        return np.broadcast_to(np.array(surface.color, np.float32)[:, None], points.shape)
    if surface.pattern == "striped":
        return striped_color(surface, own, scene.things[part.thing].radius)
    if surface.pattern == "board":
        return _board_color(scene, part, own)
    if part.label == "picture":
        return flat_color(surface, own[0], own[2])
    return flat_color(surface, own[0], own[1])


def _board_color(scene: Scene, part: Part, own: np.ndarray) -> np.ndarray:
    sign = scene.signs[part.sign]
    texture = board_texture(sign.text, 44)
    height, width = texture.shape
    column = np.clip((own[0] / sign.width + 0.5) * width - 0.5, 0, width - 1.001)
    row = np.clip((0.5 - own[2] / sign.height) * height - 0.5, 0, height - 1.001)
    left, top = column.astype(int), row.astype(int)
    x, y = column - left, row - top
    ink = (texture[top, left] * (1 - x) + texture[top, left + 1] * x) * (1 - y)
    ink += (texture[top + 1, left] * (1 - x) + texture[top + 1, left + 1] * x) * y
    edge = np.maximum(np.abs(own[0]) - sign.width / 2, np.abs(own[2]) - sign.height / 2) > -0.02
    ink = np.where(own[1] < 0, np.maximum(ink, 0.5 * edge), 0)
    board, letters = np.array(sign.board, np.float32)[:, None], np.array(sign.ink, np.float32)[:, None]
    return board + (letters - board) * ink


def _unshadowed(
    scene: Scene, parts: list[Part], points: np.ndarray, normals: np.ndarray, lit: np.ndarray, samples: int
) -> np.ndarray:
    """1 where the light reaches a point, else 0. Each ray of a pixel tests another point of the light."""
    rays = round(math.sqrt(points.shape[1]))
    grid = np.arange(rays * rays).reshape(rays, rays)
    reaches = np.ones(points.shape[1], np.float32)
    direction = scene.light.direction
    side = np.cross(direction, [0, 0, 1])
    side /= np.linalg.norm(side)
    other = np.cross(direction, side)
    casters = [part for part in parts if part.shades]
    centers = np.stack([part.solid.center for part in casters])
    reach = np.array([[part.solid.reach] for part in casters], np.float32)
    number = 0
    for row in range(samples):
        for column in range(samples):
            # a spiral over the light's disc
            distance = scene.light.softness * math.sqrt((number + 0.5) / samples**2)
            angle = number * 2.39996
            number += 1
            towards = direction + distance * (math.cos(angle) * side + math.sin(angle) * other)
            towards = (towards / np.linalg.norm(towards)).astype(np.float32)[:, None]
            members = grid[row::samples, column::samples].reshape(-1)
            members = members[lit[members] > 0]
            start = points[:, members] + 0.004 * normals[:, members]
            # squared distance from each center to each ray
            squared = dot(start, start) - 2 * (centers @ start) + (centers**2).sum(1, keepdims=True)
            along = centers @ towards - (towards.T @ start)
            passes = (squared - along**2 < reach**2) & (along > -reach)
            dark = np.zeros(len(members), bool)
            for part, passing in zip(casters, passes):
                near = np.flatnonzero(passing & ~dark)
                if len(near):
                    direction_of_each = np.broadcast_to(towards, (3, len(near)))
                    dark[near] = np.isfinite(part.solid.hit(start[:, near], direction_of_each))
            reaches[members[dark]] = 0
    return reaches


def _openness(parts: list[Part], part: np.ndarray, points: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """The share of ambient light that reaches a point, 0..1. Objects hide a part of it as if they were balls."""
    openness = np.ones(points.shape[1], np.float32)
    flat = part.reshape(-1)
    far = dot(points, points)
    for number, each in enumerate(parts):
        if each.thing is None and each.label not in ("stand", "sign") or each.board:
            continue
        radius = min(each.solid.reach, 0.9) * 0.8
        center = each.solid.center
        squared = far - 2 * (center @ points) + center @ center
        near = np.flatnonzero((squared < (3.5 * radius) ** 2) & (flat != number))
        if not len(near):
            continue
        squared = np.maximum(squared[near], radius**2)
        facing = np.maximum(dot(center[:, None] - points[:, near], normals[:, near]), 0) / np.sqrt(squared)
        openness[near] *= 1 - 0.85 * facing * radius**2 / squared
    return openness


def _glare(part: Part, points: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """
    A soft reflection of a bright window, (points,) in 0..1: slanted on flat sides, upright on a cylinder. Without it,
    these solids would hardly look shiny.
    """
    if isinstance(part.solid, Cylinder):
        return np.clip(1.5 - np.abs(normals[0] + 0.3) / 0.14, 0, 1) * (np.abs(normals[2]) < 0.5)
    if not isinstance(part.solid, Box | Pyramid):
        return np.zeros(points.shape[1], np.float32)
    x, y, z = part.solid.to_own(points) / part.solid.reach
    return np.clip(1.6 - np.abs(0.8 * (x - y) + z - 0.12) / 0.12, 0, 1)


def _mirrored(scene: Scene, points: np.ndarray, normals: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """The light that shiny objects mirror: the pattern of the ground, and walls on all sides with bright windows."""
    room = scene.room
    away = directions - 2 * dot(directions, normals) * normals
    wall = np.array(room.wall.color, np.float32)[:, None]
    # walls only 4 units from the middle, so that the mirror image changes along a flat side
    with np.errstate(divide="ignore"):
        to_wall = ((np.copysign(4, away[:2]) - points[:2]) / away[:2]).min(0)
    hit = points + np.minimum(to_wall, 20) * away
    height = np.clip(hit[2] / 3.5, 0, 1)
    color = wall * (0.12 + 0.5 * height) + 0.35 * height**2
    side = np.where(np.abs(hit[0]) > np.abs(hit[1]), hit[1], hit[0])
    window = (side / 2.2 % 1 < 0.55) & (hit[2] > 1.0) & (hit[2] < 3.6)
    color = np.where(window, 1.5, color)
    down = np.flatnonzero(away[2] < -0.02)
    distance = points[2, down] / -away[2, down]
    down = down[distance < to_wall[down]]
    if len(down):
        hit = points[:, down] + points[2, down] / -away[2, down] * away[:, down]
        own = rotation(room.yaw) @ hit
        color[:, down] = 0.5 * flat_color(room.table or room.floor, own[0], own[1])
    return color
