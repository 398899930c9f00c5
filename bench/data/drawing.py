"""Drawing for the embedded scenes: shapes as implicit functions, textures, light, and compositing.

Lengths are in units of the picture's height, so the same scene can be drawn at any size. A shape is a
function f(u, v) of object coordinates, negative inside; a pixel belongs to an object exactly where f is
negative at its centre, and its edge is anti-aliased with the gradient of f.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..types import Array

Plane = Array
"""One number a pixel, float32 (H, W)."""
Field = Callable[[Plane, Plane], Plane]


def _ball(u: Plane, v: Plane) -> Plane:
    return np.hypot(u, v) - 0.82


def _ring(u: Plane, v: Plane) -> Plane:
    return np.abs(np.hypot(u, v) - 0.68) - 0.27


def _star(u: Plane, v: Plane) -> Plane:
    radius, turn = np.hypot(u, v), np.arctan2(v, u)
    wave = np.abs(np.mod(turn * 5 / (2 * np.pi), 1.0) - 0.5) * 2  # 1 at the tips, 0 between them
    return radius - (0.52 + 0.5 * wave**1.25)


def _moon(u: Plane, v: Plane) -> Plane:
    return np.maximum(np.hypot(u, v) - 0.98, 0.76 - np.hypot(u - 0.5, v))


def _cross(u: Plane, v: Plane) -> Plane:
    across, along = np.minimum(np.abs(u), np.abs(v)), np.maximum(np.abs(u), np.abs(v))
    return np.maximum(across - 0.33, along - 0.95)


def _leaf(u: Plane, v: Plane) -> Plane:
    return np.hypot(u, np.abs(v) + 0.5) - 1.12


SHAPES: dict[str, Field] = {
    "ball": _ball,
    "ring": _ring,
    "star": _star,
    "moon": _moon,
    "cross": _cross,
    "leaf": _leaf,
}


def _stripes(u: Plane, v: Plane) -> Plane:
    return np.sin(19.0 * u)


def _dots(u: Plane, v: Plane) -> Plane:
    a, b, c = 16.0 * u, 16.0 * (-0.5 * u + 0.866 * v), 16.0 * (-0.5 * u - 0.866 * v)
    return (np.cos(a) + np.cos(b) + np.cos(c)) / 1.5 - 0.45


def _checks(u: Plane, v: Plane) -> Plane:
    return 2.2 * np.sin(12.0 * u) * np.sin(12.0 * v)


def _zigzag(u: Plane, v: Plane) -> Plane:
    fold = np.abs(np.mod(v * 3.0, 1.0) - 0.5) * 2
    return np.sin(17.0 * u + 3.4 * fold)


def _rings(u: Plane, v: Plane) -> Plane:
    return np.sin(20.0 * np.hypot(u, v))


def _marble(u: Plane, v: Plane) -> Plane:
    bent = u + 0.16 * np.sin(5.3 * v + 1.0) + 0.09 * np.sin(11.0 * (u + v))
    return np.sin(9.5 * bent) + 0.8 * np.sin(12.5 * v + 3.0 * np.sin(4.6 * bent))


TEXTURES: dict[str, Field] = {
    "striped": _stripes,
    "dotted": _dots,
    "checked": _checks,
    "zigzag": _zigzag,
    "ringed": _rings,
    "marbled": _marble,
}


@dataclass(frozen=True)
class Thing:
    """One object: where it is, how it is turned, bent, painted. Angles in radians.

    Attributes:
        label: what its pixels are called in the label map.
        shape, texture: keys of ``SHAPES`` and ``TEXTURES``; no texture means plainly painted.
        centre: (x, y).
        radius: half the extent, about.
        angle, squash: rotation; ratio of the axes.
        colours: the two colours (2, 3), linear in 0..1.
        grain: rotation, frequency factor and the two offsets of the texture against the object.
        bend: amplitudes and phases (3, 2) of a smooth warp; the texture bends with the shape.
    """

    label: int
    shape: str
    texture: str | None
    centre: tuple[float, float]
    radius: float
    angle: float
    squash: float
    colours: NDArray[np.float32]
    grain: tuple[float, float, float, float]
    bend: NDArray[np.float32]


def grid(height: int, width: int) -> tuple[Plane, Plane]:
    """x and y of the pixel centres, in units of the height."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    return (x + np.float32(0.5)) / np.float32(height), (y + np.float32(0.5)) / np.float32(height)


def object_coordinates(thing: Thing, x: Plane, y: Plane) -> tuple[Plane, Plane]:
    """Where a point of the picture lies on the object, in units of its radius, its bend undone."""
    dx, dy = x - np.float32(thing.centre[0]), y - np.float32(thing.centre[1])
    cos, sin = np.float32(np.cos(thing.angle)), np.float32(np.sin(thing.angle))
    u = (dx * cos + dy * sin) / np.float32(thing.radius * thing.squash)
    v = (dy * cos - dx * sin) / np.float32(thing.radius / thing.squash)
    (a, p), (b, q), (c, r) = thing.bend
    return u + a * np.sin(2.2 * v + p) + c * np.sin(1.3 * u + r), v + b * np.sin(2.0 * u + q)


def inside(thing: Thing, x: Plane, y: Plane) -> Plane:
    """The implicit function of the object: negative inside, zero at its edge."""
    return SHAPES[thing.shape](*object_coordinates(thing, x, y))


def _step(f: Plane, width: float) -> Plane:
    """A smooth step of f from 1 (negative) to 0, ``width`` pixels wide."""
    down, across = np.gradient(f)
    slope = np.maximum(np.hypot(down, across), np.float32(1e-4))
    step: Plane = np.clip(np.float32(0.5) - f / (slope * np.float32(width)), 0, 1)
    return step


def paint(thing: Thing, u: Plane, v: Plane) -> Array:
    """The unlit colour of the object's surface, (H, W, 3)."""
    if thing.texture is None:
        return np.full((*u.shape, 3), thing.colours[0], np.float32)
    turn, scale, s, t = (np.float32(value) for value in thing.grain)
    cos, sin = np.cos(turn), np.sin(turn)
    pattern = TEXTURES[thing.texture]((u * cos + v * sin) * scale + s, (v * cos - u * sin) * scale + t)
    mix = _step(pattern, 1.6)[..., None]
    painted: Array = thing.colours[0] * mix + thing.colours[1] * (1 - mix)
    return painted


def draw(
    canvas: NDArray[np.float32],
    labels: NDArray[np.uint8],
    thing: Thing,
    x: Plane,
    y: Plane,
    light: tuple[float, float],
) -> None:
    """Draw an object over the canvas (H, W, 3), with its shadow, and its label over the label map, in place.

    ``light`` is the direction that the light comes from, in the picture's plane.
    """
    height = canvas.shape[0]
    reach = thing.radius * max(thing.squash, 1 / thing.squash) * 1.45 + 0.03
    rows = slice(
        max(0, int((thing.centre[1] - reach) * height)), max(0, int((thing.centre[1] + reach) * height) + 1)
    )
    cols = slice(
        max(0, int((thing.centre[0] - reach) * height)), max(0, int((thing.centre[0] + reach) * height) + 1)
    )
    if min(canvas[rows, cols].shape[:2]) < 2:
        return
    x, y, under = x[rows, cols], y[rows, cols], canvas[rows, cols]
    u, v = object_coordinates(thing, x, y)
    f = SHAPES[thing.shape](u, v)
    cover = _step(f, 1.0)[..., None]

    offset = np.float32(0.1 * thing.radius)
    fall = inside(thing, x + np.float32(light[0]) * offset, y + np.float32(light[1]) * offset)
    shade = np.float32(0.42) / (1 + np.exp(np.clip(fall * np.float32(9.0), -30, 30)))
    under = under * (1 - shade[..., None] * (1 - cover))

    # Lit as a dome: bright towards the light, dark away from it, and a darker rim where the edge turns away.
    bulge_x, bulge_y = (x - thing.centre[0]) / thing.radius, (y - thing.centre[1]) / thing.radius
    facing = bulge_x * light[0] + bulge_y * light[1]
    rim = np.clip(-f / 0.22, 0, 1)
    lit = (0.94 + 0.24 * facing) * (0.72 + 0.28 * np.sqrt(rim))
    gleam = 0.2 * np.exp(-((bulge_x - 0.42 * light[0]) ** 2 + (bulge_y - 0.42 * light[1]) ** 2) / 0.09) * rim
    surface = paint(thing, u, v) * lit[..., None] + gleam[..., None]
    canvas[rows, cols] = under * (1 - cover) + surface * cover
    labels[rows, cols][f < 0] = thing.label


def oklch(lightness: float, chroma: float, hue: float) -> NDArray[np.float32]:
    """sRGB (3,), clipped to 0..1, of a colour given in OKLCH: perceived lightness 0..1, chroma, hue in turns.

    The matrices are those of Ottosson's "A perceptual color space for image processing" (2020).
    """
    a, b = chroma * np.cos(2 * np.pi * hue), chroma * np.sin(2 * np.pi * hue)
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    mid = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = np.array(
        [
            4.0767416621 * long - 3.3077115913 * mid + 0.2309699292 * short,
            -1.2684380046 * long + 2.6097574011 * mid - 0.3413193965 * short,
            -0.0041960863 * long - 0.7034186147 * mid + 1.7076147010 * short,
        ]
    ).clip(0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return encoded.astype(np.float32)
