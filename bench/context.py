"""What the runner hands to a task: the only way from a task to data, encoder, randomness and report."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .atomic import atomic_write, plain_json
from .engine import Engine
from .names import slug
from .progress import Reporter
from .types import Array, Artefact, Dataset, FeatureBank, Features, PosInterpolation, Progress, Tap

if TYPE_CHECKING:
    import torch


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """A generator that depends on the seed and the purpose alone, never on what ran before."""
    words = hashlib.sha256(json.dumps([seed, *purpose]).encode()).digest()
    return np.random.default_rng(np.frombuffer(words, dtype=np.uint32))


class RunContext:
    """The ``Context`` of one cell."""

    def __init__(
        self,
        *,
        task: str,
        cell: str,
        reference: str,
        engine: Engine,
        data: Dataset,
        banks: Mapping[str, FeatureBank],
        seed: int,
        out: Path,
        reporter: Reporter,
    ) -> None:
        self.spec = engine.encoder.spec
        self.reference = reference
        self.data = data
        self.seed = seed
        self.device = engine.device
        self.batch_size = engine.batch_size
        self.artefacts: list[Artefact] = []
        self.notes: list[str] = []
        self._task = task
        self._engine = engine
        self._banks = banks
        self._out = out
        self._folder = Path("artefacts") / cell
        self._reporter = reporter

    def bank(self, split: str) -> FeatureBank:
        """The features that the task asked for, of one split."""
        return self._banks[split]

    def encode(
        self, images: torch.Tensor, tap: Tap, pos_interpolation: PosInterpolation | None = None
    ) -> Features:
        """Features of already normalised images, in fp32 on the run's device."""
        library = getattr(self._engine.encoder, "positions_of", None)
        if library and pos_interpolation not in (None, self.spec.pos_interpolation):
            self.note(
                f"positions of other sizes are resampled as {library} does it, not by the rule "
                f"{pos_interpolation!r}: the model takes no other"
            )
            pos_interpolation = None
        return self._engine.encode(images, (tap,), pos_interpolation)[tap]

    def rng(self, *purpose: str | int) -> np.random.Generator:
        """A generator derived from (seed, task, purpose)."""
        return generator(self.seed, self._task, *purpose)

    def progress(self, total: int, label: str) -> AbstractContextManager[Progress]:
        """Report work of ``total`` steps."""
        return self._reporter.progress(total, f"{self._task}: {label}")

    def note(self, text: str) -> None:
        """A remark that belongs beside the score."""
        if text not in self.notes:
            self.notes.append(text)

    def save_image(
        self,
        name: str,
        images: Sequence[Array],
        title: str,
        caption: str = "",
        downscale: int = 320,
        sequence: bool = False,
        similarity: Array | None = None,
    ) -> None:
        """Keep pictures, uint8 RGB (H, W, 3), as PNG; the longer side is at most ``downscale``."""
        from PIL import Image

        files = []
        for i, array in enumerate(images):
            if np.ndim(array) != 3:
                raise ValueError(
                    f"{name}: pictures are a list of (H, W, 3), and one of shape {np.shape(array)} is there"
                )
            picture = Image.fromarray(np.ascontiguousarray(array))
            picture.thumbnail((downscale, downscale), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            # A harder compression takes three times as long, for 3% of the bytes of a photograph.
            picture.save(buffer, format="PNG", compress_level=1)
            files.append(self._write(f"{slug(name)}-{i}.png", buffer.getvalue()))
        data: dict[str, Any] = {"sequence": True} if sequence else {}
        if similarity is not None:
            data["similarity"] = self._similarity(name, similarity)
        self.artefacts.append(
            Artefact(name=name, kind="image", title=title, caption=caption, files=tuple(files), data=data)
        )

    def save_data(
        self,
        name: str,
        kind: Literal["curve", "bars", "points"],
        title: str,
        data: dict[str, Any],
        caption: str = "",
    ) -> None:
        """Keep numbers for the report to draw; numpy scalars and arrays become plain JSON."""
        plain = json.loads(json.dumps(data, default=plain_json, allow_nan=False))
        self.artefacts.append(Artefact(name=name, kind=kind, title=title, caption=caption, data=plain))

    def save_features(
        self, name: str, features: Array, ids: Sequence[str], title: str, caption: str = ""
    ) -> None:
        """Keep features (N, D) of some images, in half precision at a mean square of 1."""
        rows = np.asarray(features, dtype=np.float64)
        scale = np.sqrt(np.square(rows).mean()) or 1.0
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer, features=(rows / scale).astype(np.float16), ids=np.array(list(ids), dtype=np.str_)
        )
        file = self._write(f"{slug(name)}.npz", buffer.getvalue())
        self.artefacts.append(
            Artefact(name=name, kind="features", title=title, caption=caption, files=(file,))
        )

    def _similarity(self, name: str, cosines: Array) -> str:
        """Cosines (n, h, w, h, w) of each pair of different patches once, in 255 steps of each image's range:
        those of a collapsed encoder differ by little.
        """
        count, height, width = cosines.shape[:3]
        upper = np.triu_indices(height * width, 1)
        pairs = cosines.reshape(count, height * width, -1)[:, upper[0], upper[1]]
        low, high = pairs.min(axis=1), pairs.max(axis=1)
        steps = (pairs - low[:, None]) / np.maximum(high - low, 1e-12)[:, None]
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            grid=np.array([height, width]),
            range=np.stack([low, high], axis=1).astype(np.float64),
            steps=(255 * steps).round().astype(np.uint8),
        )
        return self._write(f"{slug(name)}.npz", buffer.getvalue())

    def save_file(self, relative: str, content: bytes) -> None:
        """Keep a file of the task's own below the cell's artefact folder."""
        self._write(relative, content)

    def _write(self, relative: str, content: bytes) -> str:
        target = (self._out / self._folder / relative).resolve()
        if not target.is_relative_to((self._out / self._folder).resolve()):
            raise ValueError(f"{relative} leaves the artefact folder")
        with atomic_write(target, "wb") as stream:
            stream.write(content)
        return (self._folder / relative).as_posix()
