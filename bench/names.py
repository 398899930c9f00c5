"""Names that are made: of files, of cells, and hashes that tell two identities apart."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any


def slug(text: str) -> str:
    """A file name for any text: plain characters, and a short hash wherever something was replaced."""
    plain = re.sub(r"[^A-Za-z0-9._+#-]+", "-", text).strip("-.")[:60]
    if plain == text:
        return plain
    return f"{plain or 'x'}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def cell_id(label: str, task: str, data: str, seed: int) -> str:
    """The id of a cell, which is also the name of its files."""
    return f"{slug(label)}--{slug(task)}--{slug(data)}--s{seed}"


def digest(identity: Mapping[str, Any]) -> str:
    """A hash of JSON-able fields that does not depend on their order."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
