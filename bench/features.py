"""The feature store: each image passes through the encoder once, whatever number of tasks need it.

The features of a split are a bank (see banks.py) that is named by weights and spec, data, view, precision and
the versions of what computes it. With ``keep_pixels`` the decoded images are a bank too, of the view alone.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .banks import PIXELS, BankStore
from .config import Precision
from .engine import Engine
from .environment import environment
from .errors import DataError, TaskError
from .names import digest
from .progress import Reporter
from .room import amount
from .types import Array, Column, Dataset, EncoderSpec, FeatureBank, Features, ImageSplit, Tap, View

if TYPE_CHECKING:
    from .data.loading import Batch

FEATURES_VERSION = 2
"""Raised where a change of this code changes features: of an encoder, a view, a decoder."""
_DECODED_BY = ("pillow", "simplejpeg")
_COMPUTED_BY = ("torch", "timm", *_DECODED_BY)
_TRIES = 3
_LONG = 30.0
"""Seconds of waiting for images from which on it is said what would shorten them."""


@dataclass
class FeatureStore:
    """The cache of feature banks below one folder, bounded in size."""

    root: Path
    max_bytes: int
    workers: int = 0
    skip_broken: bool = False
    keep_pixels: bool = False

    def bank(
        self,
        engine: Engine,
        data: Dataset,
        split_name: str,
        view: View,
        columns: Sequence[Column],
        reporter: Reporter,
    ) -> tuple[FeatureBank, tuple[str, ...]]:
        """The bank that holds these columns, extracted in one pass over the images where it is not there.

        Returns:
            The bank, and the ids of the broken images that were left out.

        Raises:
            DataError: a broken image (unless ``skip_broken``), no image, or no room on the disk.
            TaskError: a column that the encoder does not have.
        """
        split = data.splits[split_name]
        encoder = engine.encoder
        key = bank_key(
            encoder.fingerprint, encoder.spec, data, split_name, view, engine.precision, engine.device
        )
        for _ in range(_TRIES):
            missing = self.missing(key, columns)
            if missing:
                self._extracted(engine, data, split_name, view, missing, key, reporter)
            found = self._banks.read(key, [column.id for column in columns])
            refused = found.meta["skipped"] if found and not missing and not self.skip_broken else ()
            if _sound(split, refused):
                # Mended since, with as many bytes; or it was the disk that failed then.
                for stale in (key, pixels_key(data, split_name, view)):
                    self._banks.forget(stale)
                continue
            if found is not None:
                break
        else:
            raise DataError(
                f"{data.name}/{split_name} does not read twice the same, or {self.root} is too small for it; "
                "look at the disk, or raise --cache-size"
            )
        skipped = tuple(found.meta["skipped"])
        if skipped and not self.skip_broken:
            raise DataError(
                f"{data.name}/{split_name}: {skipped[0]} is broken; mend it, or leave {len(skipped)} "
                "broken image(s) out with --skip-broken"
            )
        labels = None if split.labels is None else np.asarray(split.labels)[found.index]
        bank = FeatureBank(
            columns=found.columns,
            ids=[split.ids[i] for i in found.index],
            labels=labels,
            index=found.index,
            fingerprint=key,
            images_per_second=found.meta.get("images_per_second")
            if found.meta.get("machine") == _machine(engine)
            else None,
        )
        return bank, skipped

    def missing(self, key: str, columns: Sequence[Column]) -> list[Column]:
        """The columns that a bank does not hold yet."""
        missing = set(self._banks.missing(key, [column.id for column in columns]))
        return [column for column in dict.fromkeys(columns) if column.id in missing]

    def keeps(self, data: Dataset, split_name: str, view: View) -> bool:
        """Whether the decoded pixels of a split through a view are in the cache."""
        return not self._banks.missing(pixels_key(data, split_name, view), [PIXELS])

    @cached_property
    def _banks(self) -> BankStore:
        return BankStore(self.root, self.max_bytes)

    def _extracted(self, *what: Any) -> None:
        from .data.workers import KILLED, says_killed

        try:
            self._extract(*what)
            return
        except RuntimeError as error:
            if not says_killed(error):
                raise
        raise DataError(KILLED)  # out here, as in workers.py

    def _extract(
        self,
        engine: Engine,
        data: Dataset,
        split_name: str,
        view: View,
        columns: Sequence[Column],
        key: str,
        reporter: Reporter,
    ) -> None:
        from .data.views import normalise

        split = data.splits[split_name]
        if not len(split):
            raise DataError(f"the split {split_name!r} of {data.name} holds no image")
        taps = tuple(dict.fromkeys(c.tap for c in columns))
        decoding = not self.keeps(data, split_name, view)
        broken: list[str] = []
        laps = _Laps()
        flight: _Flight | None = None
        kept = "" if decoding else " of kept pixels"
        title = f"features of {data.name}/{split_name} at {view.size} px{kept}"
        what = f"the features {', '.join(column.id for column in columns)}"
        mend = "free some, or set --cache-dir to a larger disk"
        with (
            self._banks.adding(key, len(split), what, mend) as rows,
            closing(self.batches(engine, data, split_name, view)) as batches,
        ):
            with reporter.progress(len(split), title) as bar:
                for positions, pixels, failed in laps.waiting_for(batches):
                    broken += failed
                    bar.advance(len(positions) + len(failed))
                    if not len(positions):
                        continue
                    images = normalise(pixels, view)
                    # While a GPU computes these, those of the batch before are written.
                    flight, landed = _Flight(engine, positions, images, taps, columns), flight
                    if landed is not None:
                        rows.write(landed.positions, laps.landed(landed))
                if flight is None:
                    raise DataError(f"every image of {data.name}/{split_name} is broken, first {broken[0]}")
                rows.write(flight.positions, laps.landed(flight))
            meta = {
                "encoder": engine.encoder.fingerprint,
                "source": engine.encoder.info.source,
                **_description(data, split_name, view),
                "precision": engine.precision,
                "images_per_second": laps.rate,
                "machine": _machine(engine),
            }
            rows.publish(broken, meta)
        if decoding and not self.keep_pixels and laps.waited > max(_LONG, laps.seconds / 2):
            reporter.line(self._what_would_help(laps, view.pixel_bytes * len(split)))

    def _what_would_help(self, laps: _Laps, needed: int) -> str:
        more = "" if needed < self.max_bytes else " and a larger --cache-size"
        return (
            f"  {laps.waited:.0f} of {laps.seconds:.0f} s went into reading images; --keep-pixels{more} "
            f"keeps them decoded for the next checkpoint, in {amount(needed)}"
        )

    def batches(self, engine: Engine, data: Dataset, split_name: str, view: View) -> Generator[Batch]:
        """The images of a split: as they were kept, else decoded, and kept where that is asked for."""
        from .data.kept import keeping, open_kept, read_kept
        from .data.loading import iterate_batches

        split, size = data.splits[split_name], engine.batch_for(view.size, view.size)
        key = pixels_key(data, split_name, view)
        found = open_kept(self._banks, key, self.skip_broken)
        if found is not None:
            yield from read_kept(found, len(split), size, engine.device)
            return
        decoded = iterate_batches(split, view, size, self.workers, self.skip_broken, engine.device)
        if not self.keep_pixels:
            yield from decoded
            return
        what = f"the pixels of {data.name}/{split_name}"
        mend = "free some, set --cache-dir to a larger disk, or leave --keep-pixels out"
        with self._banks.adding(key, len(split), what, mend) as rows:
            yield from keeping(decoded, rows, _description(data, split_name, view))


class _Flight:
    """The columns of a batch on their way from the encoder to memory."""

    def __init__(
        self, engine: Engine, positions: Array, images: Any, taps: Sequence[Tap], columns: Sequence[Column]
    ) -> None:
        self._begun = engine.moment()
        self._launched = engine.launch(images, taps).asked()
        found = self._launched.features
        self._values = {c: _values(c, found[c.tap]).to("cpu", non_blocking=True) for c in columns}
        self._ended = engine.moment()
        self.positions = positions

    def land(self) -> dict[str, Array]:
        """The values, once they are there. Raises TaskError where features are not finite."""
        self._ended.wait()
        self._launched.checked()
        return {column.id: values.numpy() for column, values in self._values.items()}

    @property
    def seconds(self) -> float:
        """How long the encoder took, once landed."""
        return self._ended.seconds_since(self._begun)


class _Laps:
    """How fast batches were encoded, and how long they were waited for.

    Attributes:
        waited: seconds that went into reading images.
        seconds: of the whole pass.
    """

    def __init__(self) -> None:
        self._begun = time.perf_counter()
        self._laps: list[tuple[int, float]] = []
        self.waited = self.seconds = 0.0

    def waiting_for(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches."""
        begun = time.perf_counter()
        for batch in batches:
            self.waited += time.perf_counter() - begun
            yield batch
            begun = time.perf_counter()

    def landed(self, flight: _Flight) -> dict[str, Array]:
        """The values of a batch, once they are there."""
        values = flight.land()
        self._laps.append((len(flight.positions), flight.seconds))
        self.seconds = time.perf_counter() - self._begun
        return values

    @property
    def rate(self) -> float:
        """Images a second; the first batch warms up, and counts only if alone."""
        laps = self._laps[1:] or self._laps
        return round(sum(n for n, _ in laps) / sum(s for _, s in laps), 2)


def _sound(split: ImageSplit, ids: Sequence[str]) -> bool:
    """Whether one of these images, which were broken, can be read."""
    places = {one: i for i, one in enumerate(split.ids)}
    for one in ids:
        with suppress(DataError):
            split.image(places[one])
            return True
    return False


def _machine(engine: Engine) -> str:
    """What the speed of an encoder depends on beside the encoder."""
    return f"{platform.node()}, {environment(engine.device, engine.precision).device}"


@cache
def _versions(packages: tuple[str, ...]) -> list[str]:
    return [f"{name} {version(name)}" for name in packages]


def bank_key(
    encoder: str,
    spec: EncoderSpec,
    data: Dataset,
    split_name: str,
    view: View,
    precision: Precision,
    device: str,
) -> str:
    """The name of a bank: a hash of all that decides its content, ``encoder`` being its fingerprint."""
    library = ("transformers",) if spec.family == "transformers" else ()
    identity: dict[str, Any] = {
        "encoder": encoder,
        "data": data.fingerprint,
        "split": split_name,
        "view": asdict(view),
        "precision": precision,
        "device": device.split(":")[0],
        "version": FEATURES_VERSION,
        "computed by": _versions(_COMPUTED_BY + library),
    }
    return digest(identity)


def pixels_key(data: Dataset, split_name: str, view: View) -> str:
    """The name of the bank of a split's decoded pixels: all that decides them, which no encoder does."""
    identity: dict[str, Any] = {
        "pixels": data.fingerprint,
        "split": split_name,
        "view": [view.mode, view.size, view.resize, view.interpolation],
        "version": FEATURES_VERSION,
        "computed by": _versions(_DECODED_BY),
    }
    return digest(identity)


def _description(data: Dataset, split_name: str, view: View) -> dict[str, Any]:
    return {
        "data": data.name,
        "data_fingerprint": data.fingerprint,
        "split": split_name,
        "view": asdict(view),
    }


def bank_bytes(columns: Iterable[Column], view: View, spec: EncoderSpec) -> int:
    """Bytes that the features of an image take in a bank."""
    return 4 * sum(column.numbers(view, spec) for column in columns)


def merge_requests(
    requests: Sequence[tuple[str, View, Column]],
) -> dict[tuple[str, View], tuple[Column, ...]]:
    """All columns wanted of each (split, view), so that one pass serves every task."""
    merged: dict[tuple[str, View], dict[Column, None]] = {}
    for split, view, column in requests:
        merged.setdefault((split, view), {})[column] = None
    return {key: tuple(columns) for key, columns in merged.items()}


def _values(column: Column, features: Features) -> Any:
    value = {"cls": features.cls, "mean": features.mean, "patches": features.patches}[column.kind]
    if value is None:
        raise TaskError("this encoder has no class token; use pooling=mean")
    return value
