"""Label propagation by nearest neighbours in feature space, inside a spatial window.

Each token of a frame takes the labels of its k most similar tokens among all context frames jointly,
weighted by a softmax over those k similarities (Jabri et al. 2020; Caron et al. 2021,
``eval_video_segmentation.py``). The soft labels are pushed on as they are.

The published scripts fill a dense (targets x all context tokens) matrix, mask it and threshold it. Here a
tile of targets meets only the rectangle of context tokens that its windows cover, and the k best are taken
by index. Beside the features, memory holds the pairs of one tile, at most ``_TILE_PAIRS``, no more again of
masks of windows, and a copy of the context's columns that a tile can reach. The result is the same; only
among exactly equal similarities at the k-th place the scripts keep all, and this keeps k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

WindowShape = Literal["square", "circle", "none"]
Rectangle = tuple[slice, slice]
"""Rows and columns of a grid."""

_TILE_SIDE = {"cpu": 8, "cuda": 24}
_TILE_PAIRS = 1 << 25
"""Most target-context pairs held at once (128 MiB of float32)."""
_ROUNDING = 1e-5


def propagate(
    queries: Tensor,
    keys: Tensor,
    labels: Tensor,
    *,
    window: WindowShape = "square",
    radius: float = 12,
    topk: int = 5,
    temperature: float = 0.1,
    unwindowed: int = 0,
    masks: Masks | None = None,
) -> Tensor:
    """Soft labels of one frame from those of its context frames.

    Args:
        queries: features of the frame, L2-normalised, (h, w, D).
        keys: features of the context frames, L2-normalised, (n, h, w, D).
        labels: soft labels of the context frames, (n, h, w, C).
        window: which context tokens a token may look at: those with row and column at most ``radius``
            away (``square``), those at Euclidean distance at most ``radius`` (``circle``), or all.
        radius: in tokens; 0 stands for no window, as in DINO's script.
        topk: neighbours a token, over all context frames together.
        temperature: divides the similarities before the softmax.
        unwindowed: so many context frames from the first are looked at whole.
        masks: those of earlier frames, with the same grid and window.

    Returns:
        Soft labels (h, w, C).
    """
    height, width, _ = queries.shape
    reach = None if window == "none" or radius == 0 else radius
    device = queries.device
    masks = Masks() if masks is None else masks

    def make(targets: Rectangle, keys: Rectangle) -> Tensor:
        return _outside(targets, keys, window, reach or 0, device)

    out = torch.empty((height, width, labels.shape[-1]), dtype=labels.dtype, device=labels.device)
    side = _tile_side(height, width, len(keys), None if unwindowed else reach, device.type)
    for columns in _cut(width, side):
        # One copy for all the tiles of a column of them, whose rows of keys then lie in one piece.
        across = _around(columns, reach, width)
        strip, strip_labels = (part[unwindowed:, :, across].contiguous() for part in (keys, labels))
        for rows in _cut(height, side):
            target = queries[rows, columns].flatten(0, 1)
            found = []
            if unwindowed:
                found.append(_best(target, keys[:unwindowed], labels[:unwindowed], topk))
            if len(strip):
                down = _around(rows, reach, height)
                outside = None
                if reach is not None:
                    outside = masks.kept((rows, columns), (down, across), make)
                found.append(_best(target, strip[:, down], strip_labels[:, down], topk, outside))
            values, picked = _merge(found, topk)
            weights = torch.softmax(values / temperature, dim=1)
            mixed = torch.bmm(weights[:, None], picked)[:, 0]
            out[rows, columns] = mixed.view(rows.stop - rows.start, columns.stop - columns.start, -1)
        del strip, strip_labels  # or the next ones would be made beside them
    return out


class Masks:
    """Which keys lie outside the windows of each tile, kept for the frames to come as far as they fit."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, ...], Tensor] = {}
        self._room = _TILE_PAIRS

    def kept(
        self, targets: Rectangle, keys: Rectangle, make: Callable[[Rectangle, Rectangle], Tensor]
    ) -> Tensor:
        """What ``make`` gives; tiles that see their surroundings alike share one."""
        alike = tuple(
            place
            for t, k in zip(targets, keys, strict=True)
            for place in (t.start - k.start, t.stop - k.start, k.stop - k.start)
        )
        if alike in self._kept:
            return self._kept[alike]
        made = make(targets, keys)
        if made.numel() <= self._room:
            self._kept[alike] = made
            self._room -= made.numel()
        return made


class Propagator:
    """Propagates the labels of a first frame through a video, frame by frame.

    Features are normalised once, when a frame enters, and kept in a ring of the frames that can still be
    looked at.

    Args:
        features: of the first frame, (h, w, D), not normalised.
        labels: of the first frame, one-hot or soft, (h, w, C).
        context: how many preceding frames are looked at.
        first_frame: the first frame is looked at from every frame, beside the preceding ones.
        first_frame_window: the window also holds for the first frame.
        window, radius, topk, temperature: see ``propagate``.
    """

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        *,
        context: int = 7,
        first_frame: bool = True,
        first_frame_window: bool = True,
        window: WindowShape = "square",
        radius: float = 12,
        topk: int = 5,
        temperature: float = 0.1,
    ) -> None:
        if not first_frame and context < 1:
            raise ValueError("without the first frame, at least one preceding frame must be looked at")
        self._pinned = int(first_frame)
        self._unwindowed = int(first_frame and not first_frame_window)
        self._window: WindowShape = window
        self._radius, self._topk, self._temperature = radius, topk, temperature
        self._keys = features.new_empty((self._pinned + context, *features.shape), dtype=torch.float32)
        self._labels = labels.new_empty((self._pinned + context, *labels.shape), dtype=torch.float32)
        self._keys[0] = F.normalize(features.float(), dim=-1)
        self._labels[0] = labels
        self._masks = Masks()
        self._filled = 1
        self._next = 1 % len(self._keys)

    def step(self, features: Tensor) -> Tensor:
        """Soft labels (h, w, C) of the next frame, given its features (h, w, D)."""
        queries = F.normalize(features.float(), dim=-1)
        labels = propagate(
            queries,
            self._keys[: self._filled],
            self._labels[: self._filled],
            window=self._window,
            radius=self._radius,
            topk=self._topk,
            temperature=self._temperature,
            unwindowed=self._unwindowed,
            masks=self._masks,
        )
        if len(self._keys) > self._pinned:
            self._keys[self._next], self._labels[self._next] = queries, labels
            self._filled = max(self._filled, self._next + 1)
            self._next = self._next + 1 if self._next + 1 < len(self._keys) else self._pinned
        return labels


def harden(soft: Tensor, scale: int = 1, normalise: bool = True) -> Tensor:
    """The strongest label of every pixel.

    Args:
        soft: soft labels (h, w, C).
        scale: soft labels are enlarged bilinearly by this factor first.
        normalise: every label's map is stretched to 0..1 over the frame first (DINO's ``norm_mask``), which
            lets small and faint objects win. A label that is 0 everywhere stays 0.

    Returns:
        Index of the label, uint8 (h * scale, w * scale); the first one among equals.
    """
    maps = soft.permute(2, 0, 1).contiguous()
    if scale > 1:
        maps = F.interpolate(maps[None], scale_factor=float(scale), mode="bilinear", align_corners=False)[0]
    if normalise:
        low, high = (bound(dim=(1, 2), keepdim=True) for bound in (maps.amin, maps.amax))
        # Sums of weights are 1 up to rounding, which must not be stretched.
        flat = high - low <= _ROUNDING * high
        stretched = (maps - low) / (high - low).masked_fill_(flat, 1)
        maps = torch.where(flat, (high > 0).to(maps.dtype), stretched)
    return maps.max(dim=0).indices.to(torch.uint8)  # over 20 times as fast as argmax, on a CPU


def _best(
    target: Tensor, keys: Tensor, labels: Tensor, topk: int, outside: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k largest similarities in each of n frames (t, n * k), and the labels there (t, n * k, C).

    -inf stands where there are fewer inside the window.
    """
    keys, labels = keys.flatten(1, 2), labels.flatten(1, 2)
    similarity = torch.bmm(target.expand(len(keys), -1, -1), keys.transpose(1, 2))  # (n, t, h * w)
    if outside is not None:
        similarity += outside
    values, index = similarity.topk(min(topk, similarity.shape[2]), dim=2)
    picked = labels[torch.arange(len(keys), device=index.device)[:, None, None], index]
    return values.transpose(0, 1).flatten(1), picked.transpose(0, 1).flatten(1, 2)


def _merge(found: list[tuple[Tensor, Tensor]], topk: int) -> tuple[Tensor, Tensor]:
    """The k largest of all (t, k), and the labels there (t, k, C)."""
    values = torch.cat([value for value, _ in found], dim=1)
    labels = torch.cat([label for _, label in found], dim=1)
    values, order = values.topk(min(topk, values.shape[1]), dim=1)
    return values, labels.gather(1, order[..., None].expand(-1, -1, labels.shape[-1]))


def _tile_side(height: int, width: int, frames: int, reach: float | None, device: str) -> int:
    """Side of the tiles, so small that the pairs of one with ``frames`` frames fit the bound."""
    side = _TILE_SIDE.get(device, _TILE_SIDE["cuda"])
    covered = height * width
    if reach is not None:
        covered = min(height, side + 2 * int(reach)) * min(width, side + 2 * int(reach))
    return max(1, min(side, int((_TILE_PAIRS / (frames * covered)) ** 0.5)))


def _cut(length: int, side: int) -> Iterator[slice]:
    """As few parts as the side allows, alike in size: none is left over that is much smaller."""
    parts = -(-length // side)
    size = -(-length // parts)
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _around(targets: slice, reach: float | None, length: int) -> slice:
    if reach is None:
        return slice(0, length)
    return slice(max(0, targets.start - int(reach)), min(length, targets.stop + int(reach)))


def _outside(
    targets: Rectangle, keys: Rectangle, window: WindowShape, radius: float, device: torch.device
) -> Tensor:
    """-inf for the keys of a rectangle outside the window of each target of a tile, 0 inside, (t, keys).

    Added to the similarities it is six times as fast as a mask that fills them, on a CPU.
    """
    down, across = (
        torch.arange(t.start, t.stop, device=device)[:, None] - torch.arange(k.start, k.stop, device=device)
        for t, k in zip(targets, keys, strict=True)
    )
    down, across = down[:, None, :, None], across[None, :, None, :]
    if window == "square":
        outside = (down.abs() > radius) | (across.abs() > radius)
    else:
        outside = down.square() + across.square() > radius * radius
    outside = outside.flatten(2).flatten(0, 1)
    return torch.zeros(outside.shape, device=device).masked_fill_(outside, -torch.inf)
