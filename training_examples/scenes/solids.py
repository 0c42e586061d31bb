"""
Intersects many rays with a solid at once.

Each solid has its own frame around its center. Rays and points are float32 arrays (3, rays). A ray is
origin + t·direction; its direction can have any length.
"""

import numpy as np


NOWHERE = np.float32(np.inf)
LEAST = 1e-3  # ignores nearer hits, on the surface where the ray starts


def rotation(yaw: float = 0.0, tilt: float = 0.0) -> np.ndarray:
    """From the world to the frame of a solid that is tilted backwards (its top along y), then turned around z."""
    cosine, sine = np.cos(yaw), np.sin(yaw)
    around_z = np.array([[cosine, sine, 0], [-sine, cosine, 0], [0, 0, 1]])
    cosine, sine = np.cos(tilt), np.sin(tilt)
    around_x = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]])
    return (around_x @ around_z).astype(np.float32)


def dot(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The dot product of vectors (3, n). Much faster than a sum over such a short axis."""
    return one[0] * other[0] + one[1] * other[1] + one[2] * other[2]


class Solid:
    """
    Args:
        center: position in the world.
        frame: (3, 3) rotation from the world to the own frame; none by default.

    Attributes:
        reach (`float`): radius of a ball around the center that contains the solid.
    """

    reach = 0.0

    def __init__(self, center, frame: np.ndarray | None = None):
        self.center = np.asarray(center, np.float32)
        self.frame = np.eye(3, dtype=np.float32) if frame is None else frame

    def to_own(self, points: np.ndarray) -> np.ndarray:
        return self.frame @ (points - self.center[:, None])

    def hit(self, origin: np.ndarray, direction: np.ndarray) -> np.ndarray:
        """`t` of the first hit of each ray from outside, or infinity."""
        return self.own_hit(self.to_own(origin), self.frame @ direction)

    def normal(self, points: np.ndarray) -> np.ndarray:
        """The normals in the world, at points of the surface in the own frame."""
        return self.frame.T @ self.own_normal(points)

    def own_hit(self, origin: np.ndarray, direction: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def own_normal(self, points: np.ndarray) -> np.ndarray:
        raise NotImplementedError


class Plane(Solid):
    """The half space below z = 0 of its own frame."""

    reach = np.inf

    def own_hit(self, origin, direction):
        with np.errstate(divide="ignore", invalid="ignore"):
            t = -origin[2] / direction[2]
        return np.where((t > LEAST) & (direction[2] < 0), t, NOWHERE)

    def own_normal(self, points):
        normal = np.zeros_like(points)
        normal[2] = 1
        return normal


class Ball(Solid):
    def __init__(self, center, radius: float):
        super().__init__(center)
        self.radius = self.reach = radius

    def own_hit(self, origin, direction):
        a = dot(direction, direction)
        half_b = dot(origin, direction)
        c = dot(origin, origin) - self.radius**2
        root = half_b * half_b - a * c
        t = (-half_b - np.sqrt(np.maximum(root, 0))) / a
        return np.where((root > 0) & (t > LEAST), t, NOWHERE)

    def own_normal(self, points):
        return points / self.radius


class Box(Solid):
    def __init__(self, center, half_sides, frame=None):
        super().__init__(center, frame)
        self.half_sides = np.asarray(half_sides, np.float32)[:, None]
        self.reach = float(np.linalg.norm(self.half_sides))

    def own_hit(self, origin, direction):
        with np.errstate(divide="ignore", invalid="ignore"):
            inverse = 1 / direction
            low, high = (-self.half_sides - origin) * inverse, (self.half_sides - origin) * inverse
        near, far = np.minimum(low, high), np.maximum(low, high)
        enter = np.maximum(np.maximum(near[0], near[1]), near[2])
        leave = np.minimum(np.minimum(far[0], far[1]), far[2])
        return np.where((enter < leave) & (enter > LEAST), enter, NOWHERE)

    def own_normal(self, points):
        relative = points / self.half_sides
        axis = np.abs(relative).argmax(0)
        normal = np.zeros_like(points)
        columns = np.arange(points.shape[1])
        normal[axis, columns] = np.sign(relative[axis, columns])
        return normal


class Pyramid(Solid):
    """A pyramid on a square base with half side `half`, centered at half its height."""

    def __init__(self, center, half: float, height: float, frame=None):
        super().__init__(center, frame)
        self.reach = float(np.sqrt(2 * half**2 + height**2 / 4))
        length = np.hypot(height, half)
        out, up = height / length, half / length
        normals = [(out, 0, up), (-out, 0, up), (0, out, up), (0, -out, up), (0, 0, -1)]
        self.normals = np.array(normals, np.float32)
        self.offsets = np.array([up * height / 2] * 4 + [height / 2], np.float32)[:, None]

    def own_hit(self, origin, direction):
        along = self.normals @ direction  # (5, rays)
        with np.errstate(divide="ignore", invalid="ignore"):
            t = (self.offsets - self.normals @ origin) / along
        enter = np.where(along < 0, t, -NOWHERE).max(0)
        leave = np.where(along > 0, t, NOWHERE).min(0)
        return np.where((enter < leave) & (enter > LEAST), enter, NOWHERE)

    def own_normal(self, points):
        return self.normals[(self.normals @ points - self.offsets).argmax(0)].T


class Cylinder(Solid):
    """An upright cylinder."""

    def __init__(self, center, radius: float, height: float, frame=None):
        super().__init__(center, frame)
        self.radius, self.half = radius, height / 2
        self.reach = float(np.hypot(radius, self.half))

    def own_hit(self, origin, direction):
        a = direction[0] ** 2 + direction[1] ** 2 + 1e-12
        half_b = origin[0] * direction[0] + origin[1] * direction[1]
        root = half_b**2 - a * (origin[0] ** 2 + origin[1] ** 2 - self.radius**2)
        width = np.sqrt(np.maximum(root, 0))
        with np.errstate(divide="ignore", invalid="ignore"):
            low, high = (-self.half - origin[2]) / direction[2], (self.half - origin[2]) / direction[2]
        enter = np.maximum((-half_b - width) / a, np.minimum(low, high))
        leave = np.minimum((-half_b + width) / a, np.maximum(low, high))
        return np.where((root > 0) & (enter < leave) & (enter > LEAST), enter, NOWHERE)

    def own_normal(self, points):
        normal = points / (np.hypot(points[0], points[1]) + 1e-9)
        normal[2] = 0
        ends = np.abs(points[2]) > np.hypot(points[0], points[1]) - self.radius + self.half
        normal[:, ends] = 0
        normal[2, ends] = np.sign(points[2, ends])
        return normal


class Cone(Solid):
    """An upright cone, centered at half its height."""

    def __init__(self, center, radius: float, height: float, frame=None):
        super().__init__(center, frame)
        self.radius, self.height = radius, height
        self.reach = float(np.hypot(radius, height / 2))

    def own_hit(self, origin, direction):
        slope = (self.radius / self.height) ** 2
        down = self.height / 2 - origin[2]  # from the tip
        a = direction[0] ** 2 + direction[1] ** 2 - slope * direction[2] ** 2
        half_b = origin[0] * direction[0] + origin[1] * direction[1] + slope * down * direction[2]
        c = origin[0] ** 2 + origin[1] ** 2 - slope * down**2
        root = half_b**2 - a * c
        width = np.sqrt(np.maximum(root, 0))
        first = np.full(a.shape, NOWHERE)
        with np.errstate(divide="ignore", invalid="ignore"):
            for t in ((-half_b - width) / a, (-half_b + width) / a):
                z = origin[2] + t * direction[2]
                inside = (root > 0) & (np.abs(z) <= self.height / 2) & (t > LEAST) & (t < first)
                first = np.where(inside, t, first)
            t = (-self.height / 2 - origin[2]) / direction[2]
            x, y = origin[0] + t * direction[0], origin[1] + t * direction[1]
        return np.where((x**2 + y**2 <= self.radius**2) & (t > LEAST) & (t < first), t, first).astype(np.float32)

    def own_normal(self, points):
        length = np.hypot(self.radius, self.height)
        distance = np.hypot(points[0], points[1]) + 1e-9
        normal = points / distance * (self.height / length)
        normal[2] = self.radius / length
        # a point belongs to the base if the base is nearer than the slanted side
        above = points[2] + self.height / 2
        side = ((self.height / 2 - points[2]) * self.radius / self.height - distance) * self.height / length
        base = above < side
        normal[:, base] = 0
        normal[2, base] = -1
        return normal


class Ring(Solid):
    """A torus around its own z axis. Rays are followed in steps of the distance to the torus (sphere tracing)."""

    steps = 60

    def __init__(self, center, radius: float, thickness: float, frame=None):
        super().__init__(center, frame)
        self.radius, self.thickness = radius, thickness  # of the circle, of the tube
        self.reach = radius + thickness

    def distance(self, points: np.ndarray) -> np.ndarray:
        return np.hypot(np.hypot(points[0], points[1]) - self.radius, points[2]) - self.thickness

    def own_hit(self, origin, direction):
        length = np.sqrt(dot(direction, direction))
        unit = direction / length
        origin = np.broadcast_to(origin, unit.shape)
        half_b = dot(origin, unit)
        root = half_b**2 - dot(origin, origin) + self.reach**2
        t = np.full(unit.shape[1], NOWHERE)
        rays = np.flatnonzero((root > 0) & (half_b < self.reach))
        if not len(rays):
            return t
        origin, unit, length = origin[:, rays], unit[:, rays], length[rays]
        width = np.sqrt(root[rays])
        walked, end = np.maximum(-half_b[rays] - width, LEAST), -half_b[rays] + width
        walking = np.arange(len(rays))
        for _ in range(self.steps):
            step = self.distance(origin[:, walking] + walked[walking] * unit[:, walking])
            walked[walking] += step
            walking = walking[(step > 1e-4) & (walked[walking] < end[walking])]
            if not len(walking):
                break
        hit = (walked < end) & (self.distance(origin + walked * unit) < 1e-3)
        t[rays[hit]] = (walked / length)[hit]
        return t

    def own_normal(self, points):
        around = np.hypot(points[0], points[1]) + 1e-9
        normal = points * (1 - self.radius / around)
        normal[2] = points[2]
        return normal / np.maximum(np.sqrt(dot(normal, normal)), 1e-9)
