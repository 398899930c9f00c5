"""What a checkpoint is, for results and reports; remembered as long as its file does not change.

Opening a file reads and hashes all of it, which a run whose cells are all scored has no other need for.
"""

from __future__ import annotations

import hashlib
import json
import platform
from contextlib import suppress
from importlib.metadata import entry_points, version
from pathlib import Path

from .atomic import read_json, write_json
from .errors import DataError
from .references import ENTRY_POINT_GROUP, RANDOM, TIMM, split_reference
from .results import CheckpointRecord

_BESIDE = ("config.json", "preprocessor_config.json", "processor_config.json", "open_clip_config.json")
"""Files in the same folder that have a say in what is loaded."""


def checkpoint_record(label: str, reference: str, cache: Path) -> CheckpointRecord:
    """The record of a checkpoint; of one that was opened before and is the same, without opening it.

    The same is a file of the same path, size, inode and times of change, or a name that stands for random
    weights, opened by the same code on the same machine. One that was changed all the same shows when it is
    loaded to be scored: its weights have another fingerprint.

    Args:
        label: how the run calls it.
        reference: see ``encoders``.
        cache: the cache folder.

    Raises:
        LmimBenchError: it cannot be loaded.
    """
    source = split_reference(reference.removeprefix(RANDOM))[0]
    remembered = cache / "records" / f"{_state(reference, source)}.json" if _decided(source) else None
    if remembered:
        with suppress(DataError):  # none yet, damaged, or not for this user to read
            return read_json(remembered, CheckpointRecord).model_copy(update={"label": label})

    from .cost import encoder_flops
    from .encoders import load_encoder

    encoder = load_encoder(reference)
    record = CheckpointRecord(
        label=label,
        reference=reference,
        fingerprint=encoder.fingerprint,
        spec=encoder.spec,
        info=encoder.info,
        flops=encoder_flops(encoder),
    )
    if remembered:
        with suppress(OSError):  # a cache that cannot be written costs time, never the run
            write_json(remembered, record.model_dump(mode="json"))
    return record


def _decided(source: str) -> bool:
    """Whether a single file, or this code alone, decides what is loaded."""
    if source.startswith(TIMM):
        return source.count(":") == 1  # not :pretrained, which others may replace
    # An index (.json) names other files, and a folder holds them.
    return Path(source).is_file() and not source.endswith(".json")


def _state(reference: str, source: str) -> str:
    """A hash of all that decides what a reference to such a source loads."""
    path = Path(source).resolve()
    files = [path, *(path.parent / name for name in _BESIDE)]
    code = sorted(Path(__file__).parent.rglob("*.py"))
    packages = [[name, version(name)] for name in ("torch", "timm")]
    packages += [
        [entry.value, entry.dist.version if entry.dist else ""]
        for entry in entry_points(group=ENTRY_POINT_GROUP)
    ]
    known = [reference, platform.node(), packages, [_stat(file) for file in (*files, *code)]]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:32]


def _stat(file: Path) -> list[str | int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return [str(file), found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]
