"""What a checkpoint is, for results and reports; remembered as long as its file does not change.

Opening a file reads and hashes all of it, which a run whose cells are all scored has no other need for.
"""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import entry_points, version
from pathlib import Path

from .references import ENTRY_POINT_GROUP, split_reference
from .results import CheckpointRecord, read_json, write_json

_BESIDE = ("config.json",)
"""Files in the same folder that have a say in what is loaded."""


def checkpoint_record(label: str, reference: str, cache: Path) -> CheckpointRecord:
    """The record of a checkpoint; of a file that was opened before and is the same, without opening it.

    The same is a file of the same path, size, inode and times of change, opened by the same code. One that
    was changed all the same shows when it is loaded to be scored: its weights have another fingerprint.

    Args:
        label: how the run calls it.
        reference: see ``encoders``.
        cache: the cache folder.

    Raises:
        LmimBenchError: it cannot be loaded.
    """
    path = Path(split_reference(reference)[0])
    # An index (.json) names other files, and a folder holds them.
    alone = path.is_file() and path.suffix != ".json"
    remembered = cache / "records" / f"{_state(reference, path)}.json" if alone else None
    if remembered and remembered.is_file():
        record = read_json(remembered, CheckpointRecord)
        return record.model_copy(update={"label": label})

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
        write_json(remembered, record.model_dump(mode="json"))
    return record


def _state(reference: str, path: Path) -> str:
    """A hash of all that decides what a reference to a file loads."""
    files = [path.resolve(), *(path.resolve().parent / name for name in _BESIDE)]
    code = sorted(Path(__file__).parent.rglob("*.py"))
    packages = [[name, version(name)] for name in ("torch", "timm")]
    packages += [
        [entry.value, entry.dist.version if entry.dist else ""]
        for entry in entry_points(group=ENTRY_POINT_GROUP)
    ]
    known = [reference, packages, [_stat(file) for file in (*files, *code)]]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:32]


def _stat(file: Path) -> list[str | int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return [str(file), found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]
