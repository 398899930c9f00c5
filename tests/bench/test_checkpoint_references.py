"""Every layout that was recorded from its original code loads by itself and gives the original's features."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lmim_bench.bench.encoders import load_encoder

REFERENCES = Path(__file__).parents[1] / "checkpoints" / "references"


@pytest.mark.parametrize("name", sorted(path.stem for path in REFERENCES.glob("*.json")))
def test_features_are_those_of_the_original_code(name: str, layouts: ModuleType, tmp_path: Path) -> None:
    reference, layout = layouts.write(name, tmp_path)
    encoder: Any = load_encoder(reference)
    stated = {**encoder.spec.arch, **encoder.spec.model_dump(), **encoder.info.model_dump()}
    for field, value in layout.expect.items():
        found = stated[field]
        assert (list(found) if isinstance(found, tuple) else found) == value, field
    assert encoder.info.loaded_tensors == encoder.info.encoder_tensors > 0
    assert not encoder.info.random_weights
    compared = dict(layouts.differences(layout, encoder))
    assert compared
    assert max(compared.values()) <= layouts.tolerance(encoder), compared
