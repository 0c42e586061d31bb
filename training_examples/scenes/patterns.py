"""Patterns of surfaces: computes their colors at many points at once."""

from functools import lru_cache

import numpy as np

from .scene import Surface


@lru_cache(maxsize=64)
def _table(seed: int) -> np.ndarray:
    """(64, 64) random numbers in 0..1."""
    return np.random.default_rng(seed).random((64, 64), dtype=np.float32)


def noise(seed: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Smooth random values in 0..1, which change over distances of 1 in u and v."""
    table = _table(seed)
    column, row = np.floor(u), np.floor(v)
    right, down = u - column, v - row
    right, down = right * right * (3 - 2 * right), down * down * (3 - 2 * down)
    column, row = column.astype(np.int64) & 63, row.astype(np.int64) & 63
    next_column, next_row = (column + 1) & 63, (row + 1) & 63
    above = table[row, column] * (1 - right) + table[row, next_column] * right
    below = table[next_row, column] * (1 - right) + table[next_row, next_column] * right
    return above * (1 - down) + below * down


def _each(seed: int, number: np.ndarray) -> np.ndarray:
    """A random value in 0..1 for each integer."""
    return _table(seed).reshape(-1)[number.astype(np.int64) * 7 & 4095]


def _share(surface: Surface, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The share of the second color, 0..1."""
    u, v, seed, pattern = u / surface.scale, v / surface.scale, surface.seed, surface.pattern
    if pattern == "checker":
        return ((np.floor(u / 0.8) + np.floor(v / 0.8)) % 2).astype(np.float32)
    if pattern == "planks":
        row = np.floor(v / 0.55)
        gap = (v / 0.55 - row < 0.06) | ((u / 2.6 + _each(seed, row)) % 1 < 0.012)
        return np.where(gap, 1.6, 0.75 * _each(seed, row + 3 * np.floor(u / 2.6 + _each(seed, row))))
    if pattern == "tiles":
        return np.where((u / 0.9 % 1 < 0.07) | (v / 0.9 % 1 < 0.07), 1.2, 0.25 * noise(seed, u, v))
    if pattern == "speckle":
        return 0.8 * (noise(seed, u * 15, v * 15) > 0.68)
    if pattern == "rug":
        inside = np.maximum(np.abs(u) / 2.7, np.abs(v) / 1.9)
        stripes = (u / 0.36 % 1 < 0.5) * 0.6 + 0.5
        return np.where(inside > 1, 0.0, np.where(inside > 0.9, 1.6, stripes))
    if pattern == "grain":
        return 1.1 * noise(seed, u * 0.7, v * 9 + 0.8 * noise(seed + 1, u * 0.9, v * 0.9))
    if pattern == "stripes":
        return (u / 0.5 % 1 < 0.4).astype(np.float32)
    if pattern == "dots":
        row = np.floor(v / 0.45)
        x, y = (u / 0.45 + 0.5 * (row % 2)) % 1 - 0.5, v / 0.45 % 1 - 0.5
        return (x * x + y * y < 0.06).astype(np.float32)
    if pattern == "panels":
        return np.where(u / 0.7 % 1 < 0.06, 1.4, 0.15 * noise(seed, u, v))
    if pattern == "waves":
        return (np.sin(u * 4 + 1.2 * np.sin(v * 2.2)) > 0.1) * 1.0
    if pattern == "triangles":
        return ((u / 0.9 % 1) > (v / 0.9 % 1)) * 1.0
    if pattern == "grid":
        return ((u / 0.45 % 1 < 0.16) | (v / 0.45 % 1 < 0.16)) * 1.0
    if pattern == "marble":
        wave = noise(seed, u * 0.9, v * 0.9) + 0.5 * noise(seed, u * 2.3, v * 2.3)
        return np.abs(np.sin(wave * 7)) ** 3 * 1.3
    if pattern == "bricks":
        row = np.floor(v / 0.32)
        along = u / 0.8 + 0.5 * (row % 2)
        gap = (v / 0.32 - row < 0.16) | (along % 1 < 0.07)
        return np.where(gap, 1.5, 0.6 * _each(seed, np.floor(along) + 5 * row))
    if pattern == "zigzag":
        return ((v + 0.25 * np.abs(u / 0.5 % 2 - 1)) / 0.4 % 1 < 0.4) * 1.0
    if pattern == "plain":
        return 0.35 * noise(seed, u * 0.8, v * 0.8)
    raise ValueError(f"unknown pattern '{pattern}'")


def flat_color(surface: Surface, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Linear RGB (3, points) of a flat surface at its coordinates `u` and `v`."""
    share = _share(surface, u, v).astype(np.float32)
    color, second = np.array([surface.color, surface.second], np.float32)[:, :, None]
    return np.maximum(color + (second - color) * share, 0)


def striped_color(surface: Surface, points: np.ndarray, radius: float) -> np.ndarray:
    """Linear RGB (3, points) with wavy dark stripes. The points (3, points) are in the object's own frame."""
    x, y, z = points / radius
    bend = noise(surface.seed, x * 1.3 + 20, y * 1.3 + 20) + 0.5 * noise(surface.seed, x * 2 + 9, z + 9)
    wave = np.sin((z * 2.1 + 0.7 * x + 0.3 * bend) * 2 * np.pi / surface.scale)
    share = np.clip(0.5 + 2.0 * wave, 0, 1)
    color = np.array(surface.color, np.float32)[:, None]
    return color * (1 - 0.74 * share)
