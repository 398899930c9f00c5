"""The drawing primitives put together: what a picture of the embedded data sets shows.

Twelve classes are pairs of a shape and a texture, chosen so that each of six shapes occurs with two
textures and each of six textures on two shapes: neither alone tells the class. Colour leans towards the
class without telling it; place, size, tilt, background and light say nothing about it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .drawing import SHAPES, TEXTURES, Plane, Thing, draw, grid, oklch

VERSION = 1
"""Raised with every change of a pixel; it seeds the pictures and names their folder in the cache."""

_SHAPES, _TEXTURES = tuple(SHAPES), tuple(TEXTURES)
PAIRS: tuple[tuple[str, str], ...] = tuple(
    (shape, _TEXTURES[(i + step) % len(_TEXTURES)]) for i, shape in enumerate(_SHAPES) for step in (0, 1)
)
"""(shape, texture) of each class."""
CLASSES: tuple[str, ...] = tuple(f"{texture}-{shape}" for shape, texture in PAIRS)

SIDE = 128
SEGMENTATION_SIDE = 160
FRAME = (192, 256)
FRAMES = 16
TYPICAL, HUE_SPREAD = 0.8, 0.04
"""Share of the objects whose colour is typical of the class, and how far it varies, in turns of hue."""

Picture = NDArray[np.uint8]
Labels = NDArray[np.uint8]


def generator(*key: str | int) -> np.random.Generator:
    """The random generator of one picture: its key is what the picture is, never how many came before."""
    words = [int.from_bytes(part.encode(), "little") if isinstance(part, str) else part for part in key]
    return np.random.default_rng(np.random.SeedSequence([VERSION, *words]))


# ------------------------------------------------------------------------------------------- composition


def _colours(rng: np.random.Generator, hue: float | None = None) -> NDArray[np.float32]:
    """Two colours that differ in lightness and mostly in hue; which one is the lighter is random."""
    hue = rng.random() if hue is None else hue
    other = hue + rng.choice([0.0, 0.08, -0.08, 0.33, 0.5])
    dark = oklch(rng.uniform(0.34, 0.56), rng.uniform(0.05, 0.15), hue)
    light = oklch(rng.uniform(0.76, 0.93), rng.uniform(0.03, 0.12), other)
    return np.stack([dark, light] if rng.random() < 0.5 else [light, dark])


def _typical_hue(rng: np.random.Generator, category: int, share: float) -> float | None:
    """Like real things, classes lean towards a colour: most objects are near its hue, the others anywhere."""
    hue = category / len(PAIRS) + float(rng.normal(0, HUE_SPREAD))
    return hue if rng.random() < share else None


def make_thing(
    rng: np.random.Generator,
    label: int,
    category: int,
    centre: tuple[float, float],
    radius: float,
    typical: float = TYPICAL,
) -> Thing:
    """An object of a class with everything else random; ``typical`` is the share of typical colours."""
    shape, texture = PAIRS[category]
    drift = 0.35 if texture == "ringed" else 2.0  # rings far from their centre would pass for stripes
    bend = np.stack([rng.uniform(0, 0.12, 3), rng.uniform(0, 2 * np.pi, 3)], axis=1).astype(np.float32)
    return Thing(
        label=label,
        shape=shape,
        texture=texture,
        centre=centre,
        radius=radius,
        angle=float(rng.normal(0, 0.3)),
        squash=float(np.exp(rng.uniform(-0.14, 0.14))),
        colours=_colours(rng, _typical_hue(rng, category, typical)),
        grain=(
            float(rng.normal(0, 0.15)),
            rng.uniform(0.9, 1.15),
            rng.uniform(-drift, drift),
            rng.uniform(-drift, drift),
        ),
        bend=bend,
    )


def _noise(rng: np.random.Generator, x: Plane, y: Plane, cells: float, waves: int = 6) -> Plane:
    """Smooth random relief over the plane, about -1..1, features of 1/cells of the height."""
    turns, phases = rng.uniform(0, 2 * np.pi, waves), rng.uniform(0, 2 * np.pi, waves)
    rates = 2 * np.pi * cells * np.exp(rng.uniform(-0.5, 0.5, waves))
    total = np.zeros_like(x)
    for turn, phase, rate in zip(turns, phases, rates, strict=True):
        total += np.sin(
            (x * np.float32(np.cos(turn)) + y * np.float32(np.sin(turn))) * np.float32(rate)
            + np.float32(phase)
        )
    return total / np.float32(np.sqrt(waves))


def background(rng: np.random.Generator, x: Plane, y: Plane) -> NDArray[np.float32]:
    """A lit, textured ground in muted colours, float (H, W, 3)."""
    hue = rng.random()
    low = oklch(rng.uniform(0.3, 0.62), rng.uniform(0.01, 0.08), hue)
    high = oklch(rng.uniform(0.6, 0.88), rng.uniform(0.01, 0.07), hue + rng.uniform(-0.2, 0.2))
    pattern = TEXTURES[_TEXTURES[rng.integers(len(_TEXTURES))]]
    turn, scale = rng.uniform(0, 2 * np.pi), rng.uniform(2.2, 4.5)
    cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    bent = np.float32(0.05) * _noise(rng, x, y, 2.0)
    weave = np.tanh(
        pattern(
            (x * cos + y * sin + bent) * np.float32(scale), (y * cos - x * sin + bent) * np.float32(scale)
        )
    )
    relief = np.float32(0.55) * _noise(rng, x, y, 1.2) + np.float32(0.2) * _noise(rng, x, y, 7.0)
    mix = np.clip(0.5 + 0.3 * relief + rng.uniform(0.05, 0.3) * weave, 0, 1)[..., None]
    return (low * mix + high * (1 - mix)).astype(np.float32)


def _light(rng: np.random.Generator) -> tuple[float, float]:
    turn = rng.uniform(0, 2 * np.pi)
    return float(np.cos(turn)), float(np.sin(turn))


def _expose(
    rng: np.random.Generator,
    canvas: NDArray[np.float32],
    x: Plane,
    y: Plane,
    light: tuple[float, float],
    gain: float,
) -> Picture:
    """What a camera makes of it: uneven light, a cast of colour, grain."""
    slope = (x - x.mean()) * np.float32(light[0]) + (y - y.mean()) * np.float32(light[1])
    cast = rng.uniform(0.92, 1.08, 3).astype(np.float32)
    lit = canvas * (np.float32(gain) * (1 + np.float32(0.28) * slope)[..., None] * cast)
    lit += np.float32(0.018) * rng.standard_normal(canvas.shape, dtype=np.float32)
    picture: Picture = (np.clip(lit, 0, 1) * 255 + 0.5).astype(np.uint8)
    return picture


def classification_scene(rng: np.random.Generator, category: int, side: int = SIDE) -> tuple[Picture, Labels]:
    """One dominant object of a class among small plain clutter: (H, W, 3), and its exact mask (H, W)."""
    x, y = grid(side, side)
    light = _light(rng)
    canvas, labels = background(rng, x, y), np.zeros((side, side), np.uint8)
    for _ in range(rng.integers(1, 5)):
        spot = (float(rng.uniform(0, 1)), float(rng.uniform(0, 1)))
        clutter = make_thing(rng, 0, int(rng.integers(len(PAIRS))), spot, rng.uniform(0.05, 0.11))
        draw(canvas, labels, replace(clutter, texture=None), x, y, light)
    radius = rng.uniform(0.28, 0.42)
    centre = tuple(rng.uniform(0.38, 0.62, 2).tolist())
    draw(canvas, labels, make_thing(rng, 1, category, (centre[0], centre[1]), radius), x, y, light)
    return _expose(rng, canvas, x, y, light, rng.uniform(0.85, 1.15)), labels


def segmentation_scene(rng: np.random.Generator, side: int = SEGMENTATION_SIDE) -> tuple[Picture, Labels]:
    """Three to five objects that may overlap, and the class of each pixel: 0 background, 1..12.

    Every object has a colour near its class's: a patch shows no shape, so texture alone would leave two
    classes that no clustering of patches could tell apart.
    """
    x, y = grid(side, side)
    light = _light(rng)
    canvas, labels = background(rng, x, y), np.zeros((side, side), np.uint8)
    for spot in _spread(rng, int(rng.integers(3, 6)), 1.0):
        category, radius = int(rng.integers(len(PAIRS))), rng.uniform(0.17, 0.3)
        thing = make_thing(rng, category + 1, category, spot, radius, typical=1.0)
        draw(canvas, labels, thing, x, y, light)
    return _expose(rng, canvas, x, y, light, rng.uniform(0.85, 1.15)), labels


def _spread(rng: np.random.Generator, n: int, width: float) -> list[tuple[float, float]]:
    """n places in a picture of height 1 that keep some distance (the best of a few random draws)."""
    best, most = np.zeros((n, 2)), -1.0
    for _ in range(12):
        spots = rng.uniform((0.14 * width, 0.14), (0.86 * width, 0.86), (n, 2))
        gaps = np.hypot(*(spots[:, None] - spots[None]).transpose(2, 0, 1)) + np.eye(n) * 9
        if gaps.min() > most:
            best, most = spots, float(gaps.min())
    return [(float(a), float(b)) for a, b in best]


class _Track(NamedTuple):
    """How one object of a video moves, all as functions of time 0..1."""

    thing: Thing
    end: tuple[float, float]
    sway: float
    spin: float
    pulse: tuple[float, float]
    flex: float

    def at(self, time: float) -> Thing:
        eased = time * time * (3 - 2 * time) * 0.5 + time * 0.5
        (x0, y0), (x1, y1) = self.thing.centre, self.end
        side = self.sway * float(np.sin(np.pi * time))
        grown = float(np.exp(self.pulse[0] * np.sin(2 * np.pi * time + self.pulse[1])))
        bend = self.thing.bend.copy()
        bend[:, 1] += np.float32(self.flex * time)
        return replace(
            self.thing,
            centre=(x0 + (x1 - x0) * eased - (y1 - y0) * side, y0 + (y1 - y0) * eased + (x1 - x0) * side),
            angle=self.thing.angle + self.spin * time,
            radius=self.thing.radius * grown,
            bend=bend,
        )


def video_scene(
    rng: np.random.Generator, frames: int = FRAMES, size: tuple[int, int] = FRAME
) -> list[tuple[Picture, Labels]]:
    """Two or three objects of alike colours that change places, passing before each other, and turn, grow and
    bend, over a ground that pans while the light changes; each frame with its map of objects, 1..K.
    """
    x, y = grid(*size)
    n, hue, light = int(rng.integers(2, 4)), rng.random(), _light(rng)
    starts = _spread(rng, n, size[1] / size[0])
    tracks = []
    for i, category in enumerate(rng.choice(len(PAIRS), n, replace=False).tolist()):
        thing = make_thing(rng, i + 1, category, starts[i], rng.uniform(0.15, 0.24))
        thing = replace(thing, colours=_colours(rng, hue + float(rng.normal(0, 0.04))))
        tracks.append(
            _Track(
                thing,
                end=starts[(i + 1) % n],
                sway=float(rng.uniform(-0.25, 0.25)),
                spin=float(rng.uniform(-2.2, 2.2)),
                pulse=(float(rng.uniform(0.05, 0.2)), float(rng.uniform(0, 2 * np.pi))),
                flex=float(rng.uniform(2, 5)),
            )
        )
    pan, sweep, gain = rng.uniform(-0.3, 0.3, 2), rng.uniform(0, 2 * np.pi), rng.uniform(0.92, 1.05)
    ground = int(rng.integers(2**31))
    shots = []
    for frame in range(frames):
        time = frame / max(1, frames - 1)
        dx, dy = (np.float32(value * time) for value in pan)
        canvas, labels = background(np.random.default_rng(ground), x + dx, y + dy), np.zeros(size, np.uint8)
        for track in tracks:
            draw(canvas, labels, track.at(time), x, y, light)
        brightness = float(gain * (1 + 0.15 * np.sin(2 * np.pi * time + sweep)))
        shots.append((_expose(rng, canvas, x, y, light, brightness), labels))
    return shots
