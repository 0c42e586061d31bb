"""
Draws the contents of a scene at random.

A large object is about 1.3 units high. x points right, y away from the camera, z up. Objects stand on z = 0, which is
the floor of a room or the top of a table. The camera looks along y, from above. All numbers come from one random
generator, so that a scene depends on its seed alone.
"""

import colorsys
import math
from dataclasses import dataclass, replace

import numpy as np

from .lettering import board_size
from .words import WORDS


COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SHAPES = ("ball", "cube", "cylinder", "cone", "ring", "pyramid")
MATERIALS = ("matte", "shiny", "striped")
SIZES = ("small", "large")

# Pairs that never appear in images or texts of training and validation: each color once, each shape at least once.
HELD_OUT = (
    ("red", "cone"),
    ("orange", "ring"),
    ("yellow", "cube"),
    ("green", "ball"),
    ("cyan", "pyramid"),
    ("blue", "cylinder"),
    ("purple", "cone"),
    ("pink", "cube"),
)

RADII = {"small": (0.34, 0.39), "large": (0.60, 0.68)}


@dataclass(frozen=True)
class Domain:
    """The appearance of a data set. Names, sizes and questions do not depend on it."""

    # hue in degrees, saturation, value
    shades: dict[str, tuple[float, float, float]]
    floors: tuple[str, ...]
    walls: tuple[str, ...]
    ground_hues: tuple[float, float] = (20.0, 45.0)  # degrees; of floors and tables
    ground_values: tuple[float, float] = (0.45, 0.85)
    wall_hues: tuple[float, float] = (0.0, 360.0)
    wall_values: tuple[float, float] = (0.7, 0.95)
    wall_saturations: tuple[float, float] = (0.03, 0.16)
    pitch: tuple[float, float] = (23.0, 36.0)  # degrees
    field_of_view: tuple[float, float] = (40.0, 47.0)  # degrees
    warmth: tuple[float, float] = (-0.06, 0.10)  # of the light
    elevation: tuple[float, float] = (38.0, 65.0)  # of the light, degrees


SCENES = Domain(
    shades={
        "red": (357, 0.86, 0.82),
        "orange": (29, 0.92, 0.98),
        "yellow": (53, 0.88, 0.98),
        "green": (130, 0.75, 0.62),
        "cyan": (181, 0.72, 0.86),
        "blue": (222, 0.82, 0.82),
        "purple": (276, 0.68, 0.66),
        "pink": (335, 0.42, 0.98),
    },
    floors=("checker", "planks", "plain", "tiles", "speckle", "rug"),
    walls=("plain", "stripes", "dots", "panels"),
)

SHIFTED = Domain(
    shades={
        "red": (8, 0.70, 0.68),
        "orange": (33, 0.72, 0.90),
        "yellow": (60, 0.62, 0.92),
        "green": (108, 0.58, 0.72),
        "cyan": (188, 0.50, 0.96),
        "blue": (212, 0.62, 0.94),
        "purple": (284, 0.48, 0.78),
        "pink": (322, 0.55, 0.95),
    },
    floors=("waves", "triangles", "grid", "marble"),
    walls=("bricks", "waves", "zigzag"),
    ground_hues=(90.0, 240.0),
    ground_values=(0.25, 0.6),
    wall_values=(0.45, 0.75),
    wall_saturations=(0.10, 0.25),
    pitch=(19.0, 30.0),
    field_of_view=(48.0, 54.0),
    warmth=(-0.16, -0.08),
    elevation=(28.0, 45.0),
)

# the look of Scenes, with the cameras and lights of both domains
COMPOSITION = replace(
    SCENES,
    pitch=(SHIFTED.pitch[0], SCENES.pitch[1]),
    field_of_view=(SCENES.field_of_view[0], SHIFTED.field_of_view[1]),
    warmth=(SHIFTED.warmth[0], SCENES.warmth[1]),
    elevation=(SHIFTED.elevation[0], SCENES.elevation[1]),
)

DOMAINS = {"scenes": SCENES, "shifted": SHIFTED, "scenes2": COMPOSITION}


@dataclass(frozen=True)
class Surface:
    """The appearance of a surface: a pattern of two colors (linear RGB), and the seed of its irregularities."""

    pattern: str
    color: tuple[float, float, float]
    second: tuple[float, float, float] = (0.0, 0.0, 0.0)
    scale: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Thing:
    """An object that questions can ask about."""

    shape: str
    color: str
    material: str
    size: str
    radius: float
    x: float
    y: float
    z: float  # lowest point: 0, or the height of its stand
    yaw: float
    upright: bool  # whether a ring stands like a wheel
    surface: Surface
    stand: Surface | None = None

    @property
    def height(self) -> float:
        if self.shape == "ring":
            return 2.06 * self.radius if self.upright else 0.56 * self.radius
        return {"ball": 2.0, "cube": 1.6, "cylinder": 1.7, "cone": 1.9, "pyramid": 1.7}[self.shape] * self.radius

    @property
    def center(self) -> np.ndarray:
        return np.array([self.x, self.y, self.z + self.height / 2])


@dataclass(frozen=True)
class Sign:
    """A board with a word, on a post or on the back wall."""

    word: str
    text: str  # the word in upper case or capitalized
    x: float
    y: float
    z: float  # middle of the board
    width: float
    height: float
    letter_height: float
    yaw: float
    tilt: float  # backwards
    on_wall: bool
    board: tuple[float, float, float]
    ink: tuple[float, float, float]

    @property
    def center(self) -> np.ndarray:
        return np.array([self.x, self.y, self.z])


@dataclass(frozen=True)
class Camera:
    position: np.ndarray
    pitch: float  # downwards, radians
    field_of_view: float  # radians

    @property
    def axes(self) -> np.ndarray:
        """Right, up and forward as rows."""
        sine, cosine = math.sin(self.pitch), math.cos(self.pitch)
        return np.array([[1, 0, 0], [0, sine, cosine], [0, cosine, -sine]])

    @property
    def focal_length(self) -> float:
        """In image widths."""
        return 0.5 / math.tan(self.field_of_view / 2)

    def project(self, points: np.ndarray) -> np.ndarray:
        """Projects world points (n, 3) to (n, 3): x and y in image widths from the top left corner, and depth."""
        seen = (np.atleast_2d(points) - self.position) @ self.axes.T
        depth = np.maximum(seen[:, 2:], 1e-6)
        place = 0.5 + self.focal_length * seen[:, :2] * [1, -1] / depth
        return np.concatenate([place, seen[:, 2:]], axis=1)


@dataclass(frozen=True)
class Room:
    """The surroundings: a floor, two walls, and optionally a table that everything stands on."""

    yaw: float
    floor: Surface
    wall: Surface
    back: float  # distance of the back wall from the middle
    side: float  # distance of the side wall; negative if it is on the left
    table: Surface | None = None
    table_size: tuple[float, float] = (2.6, 2.1)  # half sides
    # on the back wall: position along it, height, half width, half height, surface
    pictures: tuple[tuple[float, float, float, float, Surface], ...] = ()

    @property
    def floor_height(self) -> float:
        return 0.0 if self.table is None else -2.2


@dataclass(frozen=True)
class Light:
    direction: np.ndarray  # towards the light
    color: np.ndarray
    sky: np.ndarray  # color of the ambient light
    softness: float


@dataclass(frozen=True)
class Scene:
    camera: Camera
    room: Room
    light: Light
    things: tuple[Thing, ...]
    signs: tuple[Sign, ...]
    domain: str = "scenes"
    held_out: bool = False


def to_linear(color) -> tuple[float, float, float]:
    """Converts sRGB in 0..1 to linear RGB."""
    return tuple(float(value) ** 2.2 for value in color)


def hsv(hue: float, saturation: float, value: float) -> tuple[float, float, float]:
    """Converts HSV to linear RGB; the hue is in degrees."""
    return to_linear(colorsys.hsv_to_rgb(hue / 360 % 1, min(1, max(0, saturation)), min(1, max(0, value))))


@dataclass(frozen=True)
class Plan:
    """The contents of a scene without positions. Drawn first and kept, so that crowded scenes do not become rarer."""

    kinds: tuple[tuple[str, str, str, str], ...]  # shape, color, material, size of each object
    words: tuple[str, ...]  # on the signs
    table: bool
    domain: str = "scenes"
    held_out: bool = False


def plan_scene(random: np.random.Generator, domain: str = "scenes", held_out: bool = False) -> Plan:
    """
    Draws the contents of a scene.

    Args:
        random (`np.random.Generator`): the source of all random numbers.
        domain (`str`, *optional*, defaults to `"scenes"`): a key of `DOMAINS`.
        held_out (`bool`, *optional*, defaults to `False`):
            Whether at least one object has a color and a shape of `HELD_OUT`. If `False`, no object has.
    """
    if domain == "scenes2":
        return _plan_composition(random, domain, held_out)
    number = int(random.choice([3, 4, 5, 6, 7], p=[0.14, 0.27, 0.29, 0.2, 0.1]))
    signs = int(random.choice([0, 1, 2], p=[0.1, 0.75, 0.15]))
    return Plan(
        kinds=tuple(_kinds(random, number, held_out)),
        words=tuple(str(word) for word in random.choice(WORDS, size=signs, replace=False)),
        table=bool(random.random() < 0.45),
        domain=domain,
        held_out=held_out,
    )


GROUPS = (4, 9)  # objects with a common attribute, so that counts up to 9 occur
CROWD = 7  # with so many objects, most are small


def _plan_composition(random: np.random.Generator, domain: str, held_out: bool) -> Plan:
    """
    As [`plan_scene`], for Scenes 2: each allowed pair of color and shape is equally frequent, half of the scenes have
    a group of 4 to 9 objects with a common attribute, and there are up to three signs.
    """
    pairs = [(color, shape) for color in COLORS for shape in SHAPES if held_out or (color, shape) not in HELD_OUT]
    group, kinds = int(random.integers(GROUPS[0], GROUPS[1] + 1)) if random.random() < 0.5 else 0, []
    number = group + int(random.integers(0, 2)) if group else int(random.integers(3, 8))
    common = int(random.integers(4)) if group else None  # shape, color, material or size
    color, shape = pairs[random.integers(len(pairs))]
    size = "small" if group > 5 else str(random.choice(SIZES))
    shared = (shape, color, str(random.choice(MATERIALS)), size)
    while len(kinds) < number:
        color, shape = pairs[random.integers(len(pairs))]
        small = random.random() < (0.85 if number >= CROWD else 0.5)
        kind = [shape, color, str(random.choice(MATERIALS)), "small" if small else "large"]
        if common is not None and len(kinds) < group:
            kind[common] = shared[common]
        if held_out and not kinds:
            kind[1], kind[0] = HELD_OUT[random.integers(len(HELD_OUT))]
        if held_out or (kind[1], kind[0]) not in HELD_OUT:
            kinds.append(tuple(kind))
    signs = int(random.choice([0, 1, 2, 3], p=[0.12, 0.5, 0.26, 0.12])) if number < CROWD else int(random.integers(2))
    return Plan(
        kinds=tuple(kinds[k] for k in random.permutation(number)),
        words=tuple(str(word) for word in random.choice(WORDS, size=signs, replace=False)),
        table=bool(random.random() < 0.45),
        domain=domain,
        held_out=held_out,
    )


def propose_scene(random: np.random.Generator, plan: Plan) -> Scene | None:
    """
    Draws positions for the contents of a scene. The caller checks whether everything is visible enough.

    Returns:
        `Scene`, or `None` if the objects do not fit.
    """
    looks = DOMAINS[plan.domain]
    camera = _camera(random, looks)
    room = _room(random, looks, plan.table)
    signs = _signs(random, camera, room, plan.words)
    if signs is None:
        return None
    taken = [_Taken(sign.x, sign.y, 0.0 if sign.on_wall else 0.3, _outline(camera, sign)) for sign in signs]
    things = []
    for kind in plan.kinds:
        thing = _place(random, looks, kind, camera, room, taken)
        if thing is None:
            return None
        things.append(thing)
    return Scene(camera, room, _light(random, looks), tuple(things), tuple(signs), plan.domain, plan.held_out)


@dataclass(frozen=True)
class _Taken:
    """Occupied ground, a disc of radius `reach`, and a box in the image: left, top, right, bottom in image widths."""

    x: float
    y: float
    reach: float
    outline: tuple[float, float, float, float]


def _outline(camera: Camera, item: Thing | Sign) -> tuple[float, float, float, float]:
    """The approximate box of an object, or of a sign's board, in the image."""
    x, y, depth = camera.project(item.center)[0]
    if isinstance(item, Sign):
        half_width, half_height = item.width / 2, item.height / 2
    else:
        half_width, half_height = 0.8 * item.radius, max(0.4 * item.radius, 0.42 * item.height)
    half_width, half_height = (camera.focal_length * half / depth for half in (half_width, half_height))
    return x - half_width, y - half_height, x + half_width, y + half_height


def _shared(one: tuple, other: tuple) -> float:
    """The area that two outlines share, relative to the smaller one."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    areas = [(each[2] - each[0]) * (each[3] - each[1]) for each in (one, other)]
    return max(0.0, width) * max(0.0, height) / min(areas)


def _camera(random: np.random.Generator, looks: Domain) -> Camera:
    pitch, view = math.radians(random.uniform(*looks.pitch)), math.radians(random.uniform(*looks.field_of_view))
    # at this distance the same area of ground fills the image
    distance = 2.55 / math.tan(view / 2) * random.uniform(0.94, 1.06)
    target = np.array([random.uniform(-0.15, 0.15), random.uniform(-0.1, 0.1), random.uniform(0.25, 0.45)])
    return Camera(target - distance * np.array([0, math.cos(pitch), -math.sin(pitch)]), pitch, view)


def _ground(random: np.random.Generator, looks: Domain, patterns: tuple[str, ...]) -> Surface:
    """A floor or a table: two similar colors of low saturation."""
    hue, saturation = random.uniform(*looks.ground_hues), random.uniform(0.05, 0.35)
    value = random.uniform(*looks.ground_values)
    contrast = random.uniform(0.68, 0.88)
    if random.random() < 0.5:
        saturation *= 0.3
    return Surface(
        pattern=str(random.choice(patterns)),
        color=hsv(hue, saturation, value),
        second=hsv(hue + random.uniform(-12, 12), saturation, value * contrast),
        scale=random.uniform(0.8, 1.25),
        seed=int(random.integers(2**31)),
    )


def _room(random: np.random.Generator, looks: Domain, on_table: bool) -> Room:
    hue, saturation = random.uniform(*looks.wall_hues), random.uniform(*looks.wall_saturations)
    value = random.uniform(*looks.wall_values)
    wall = Surface(
        pattern=str(random.choice(looks.walls)),
        color=hsv(hue, saturation, value),
        second=hsv(hue + random.uniform(-25, 25), saturation * 1.2, value * random.uniform(0.8, 0.92)),
        scale=random.uniform(0.8, 1.25),
        seed=int(random.integers(2**31)),
    )
    floor = _ground(random, looks, tuple(name for name in looks.floors if not (on_table and name == "rug")))
    table = None
    if on_table:
        table = _ground(random, looks, ("grain", "plain", "speckle"))
    back = random.uniform(2.9, 4.2) + (0.8 if on_table else 0.0)
    pictures = []
    for _ in range(int(random.integers(0, 3))):
        picture = Surface(
            pattern=str(random.choice(["stripes", "dots", "panels", "checker"])),
            color=hsv(random.uniform(0, 360), 0.18, random.uniform(0.7, 0.95)),
            second=hsv(random.uniform(0, 360), 0.22, random.uniform(0.4, 0.7)),
            scale=0.5,
            seed=int(random.integers(2**31)),
        )
        half = random.uniform(0.4, 0.7), random.uniform(0.3, 0.5)
        height = random.uniform(0.75, 1.35) - (1.0 if on_table else 0.0)
        along = random.uniform(-3.5, 3.5)
        if all(abs(along - other[0]) > half[0] + other[2] + 0.3 for other in pictures):
            pictures.append((along, height, *half, picture))
    return Room(
        yaw=math.radians(random.uniform(-22, 22)),
        floor=floor,
        wall=wall,
        back=back,
        side=random.choice([-1, 1]) * random.uniform(3.6, 5.5),
        table=table,
        table_size=(random.uniform(2.5, 2.9), random.uniform(2.0, 2.4)),
        pictures=tuple(pictures),
    )


def _light(random: np.random.Generator, looks: Domain) -> Light:
    # from the left or right on the camera's side, so that visible surfaces are mostly lit
    azimuth = math.radians(random.uniform(20, 75)) * random.choice([-1, 1])
    elevation = math.radians(random.uniform(*looks.elevation))
    warmth = random.uniform(*looks.warmth)
    direction = np.array(
        [
            math.sin(azimuth) * math.cos(elevation),
            -math.cos(azimuth) * math.cos(elevation),
            math.sin(elevation),
        ]
    )
    color = np.array([1 + warmth, 1 + 0.25 * warmth, 1 - warmth]) * random.uniform(0.68, 0.9)
    sky = np.array([1 - 0.4 * warmth, 1, 1 + 0.4 * warmth]) * random.uniform(0.36, 0.5)
    return Light(direction, color, sky, random.uniform(0.05, 0.14))


def _kinds(random: np.random.Generator, number: int, held_out: bool) -> list[tuple[str, str, str, str]]:
    """Shape, color, material and size of each object: at least three kinds, often with repeated shapes or colors."""
    shape, color = str(random.choice(SHAPES)), str(random.choice(COLORS))
    repeated_shape = 0.5 if random.random() < 0.5 else 0.0
    repeated_color = 0.5 if random.random() < 0.4 else 0.0
    kinds = []
    while len(kinds) < number or len({kind[:2] for kind in kinds}) < 3:
        if len(kinds) == number:
            kinds.clear()
        pair = (
            color if random.random() < repeated_color else str(random.choice(COLORS)),
            shape if random.random() < repeated_shape else str(random.choice(SHAPES)),
        )
        if not held_out and pair in HELD_OUT:
            continue
        if held_out and (not kinds or random.random() < 0.2):
            pair = HELD_OUT[random.integers(len(HELD_OUT))]
        kinds.append((pair[1], pair[0], str(random.choice(MATERIALS)), str(random.choice(SIZES))))
    return kinds


def _free_ground(random: np.random.Generator, room: Room, reach: float) -> tuple[float, float]:
    """A place on the ground in view of the camera, at least `reach` from the edge of the table."""
    while True:
        y = random.uniform(-1.75, 1.9)
        x = random.uniform(-1, 1) * (1.75 + 0.28 * (y + 1.75) - 0.3 * reach)
        if room.table is None:
            return x, y
        cosine, sine = math.cos(room.yaw), math.sin(room.yaw)
        along, across = cosine * x + sine * y, -sine * x + cosine * y
        if abs(along) < room.table_size[0] - reach - 0.1 and abs(across) < room.table_size[1] - reach - 0.1:
            return x, y


def _place(
    random: np.random.Generator,
    looks: Domain,
    kind: tuple[str, str, str, str],
    camera: Camera,
    room: Room,
    taken: list[_Taken],
) -> Thing | None:
    """The object at a free place, which is added to `taken`; `None` if there is no free place."""
    shape, color, material, size = kind
    hue, saturation, value = looks.shades[color]
    rgb = hsv(hue + random.uniform(-4, 4), saturation * random.uniform(0.9, 1.06), value * random.uniform(0.92, 1.04))
    radius = random.uniform(*RADII[size])
    stand, stand_height = None, 0.0
    if random.random() < 0.25:
        stand = Surface("plain", hsv(random.uniform(20, 50), random.uniform(0, 0.12), random.uniform(0.55, 0.92)))
        stand_height = random.uniform(0.35, 0.95)
    surface = Surface(material, rgb, scale=random.uniform(0.85, 1.2), seed=int(random.integers(2**31)))
    upright = bool(shape == "ring" and random.random() < 0.5)
    if shape == "ring":  # so that the hole of an upright ring is visible
        yaw = math.radians(random.uniform(-40, 40))
    else:
        yaw = math.radians(random.uniform(0, 90))
    for _ in range(80):
        x, y = _free_ground(random, room, radius)
        if any(math.hypot(x - other.x, y - other.y) < 0.98 * (radius + other.reach) + 0.12 for other in taken):
            continue
        thing = Thing(shape, color, material, size, radius, x, y, stand_height, yaw, upright, surface, stand)
        outline = _outline(camera, thing)
        if min(outline) < 0.01 or max(outline) > 0.99:
            continue
        if all(_shared(outline, other.outline) < (0.35 if other.reach > 0.3 else 0.05) for other in taken):
            taken.append(_Taken(x, y, radius, outline))
            return thing
    return None


BOARDS = (  # board and ink, sRGB
    ((0.96, 0.96, 0.94), (0.08, 0.08, 0.10)),
    ((0.13, 0.13, 0.15), (0.97, 0.97, 0.95)),
    ((0.93, 0.88, 0.76), (0.22, 0.12, 0.06)),
    ((0.36, 0.25, 0.18), (0.98, 0.95, 0.88)),
)


def _signs(random: np.random.Generator, camera: Camera, room: Room, words: tuple[str, ...]) -> list[Sign] | None:
    """Signs with these words, inside the image and apart from each other; `None` if they do not fit."""
    boards = random.choice(len(BOARDS), size=len(words), replace=False)
    signs: list[Sign] = []
    for word, board in zip(words, boards):
        on_wall = bool(random.random() < 0.2 and not any(sign.on_wall for sign in signs))
        for _ in range(20):
            sign = _sign(random, camera, room, word, on_wall, int(board))
            outline = _outline(camera, sign)
            inside = min(outline) > 0.02 and max(outline) < 0.98
            if inside and not any(_shared(outline, _outline(camera, other)) for other in signs):
                signs.append(sign)
                break
        else:
            return None
    return signs


def _sign(random: np.random.Generator, camera: Camera, room: Room, word: str, on_wall: bool, board: int) -> Sign:
    text = word.upper() if random.random() < 0.65 else word.capitalize()
    letters = random.uniform(0.062, 0.086)  # letter height in image heights
    tilt = math.radians(random.uniform(4, 16))
    if on_wall:
        along = random.uniform(-1.6, 1.6)
        cosine, sine = math.cos(room.yaw), math.sin(room.yaw)
        back = room.back - 0.06
        x, y = cosine * along - sine * back, sine * along + cosine * back
        yaw, tilt, z = room.yaw, 0.0, random.uniform(0.6, 1.2) - (0.8 if room.table else 0.0)
    else:
        x, y = _free_ground(random, room, 0.3)
        y = 0.5 * y + 0.6 if random.random() < 0.6 else y  # further back, where it hides less
        yaw = math.radians(random.uniform(-14, 14)) - 0.35 * math.atan2(x, y - camera.position[1])
        z = random.uniform(0.75, 1.3)
    depth = camera.project(np.array([[x, y, z]]))[0, 2]
    # corrects the letters for the pitch of the camera
    letter_height = letters * depth / camera.focal_length / math.cos(camera.pitch - tilt)
    width, height = board_size(text, letter_height)
    if not on_wall:
        z = max(z, height / 2 + 0.08)
    colors = tuple(to_linear(color) for color in BOARDS[board])
    return Sign(word, text, x, y, z, width, height, letter_height, yaw, tilt, on_wall, *colors)
