"""What a task keeps through its context, as the report will find it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from rich.console import Console

from lmim_bench.bench.context import RunContext
from lmim_bench.bench.progress import Reporter
from lmim_bench.bench.types import Context


@pytest.fixture
def ctx(tmp_path: Path) -> RunContext:
    engine: Any = SimpleNamespace(encoder=SimpleNamespace(spec=None), device="cpu", batch_size=2)
    return RunContext(
        task="t",
        cell="c",
        reference="encoder.pth",
        engine=engine,
        data=cast("Any", None),
        banks={},
        seed=0,
        out=tmp_path,
        reporter=Reporter(Console(quiet=True)),
    )


def test_it_has_every_public_name_of_the_protocol(ctx: RunContext) -> None:
    public = {name for name in dir(Context) if not name.startswith("_")} | set(Context.__annotations__)
    assert public <= set(dir(ctx))


def test_features_are_kept_by_id_at_a_mean_square_of_one(ctx: RunContext, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(3, 40, size=(20, 5)).astype(np.float32)
    ids = [f"train/日本 {i}.png" for i in range(20)]
    ctx.save_features("f", rows, ids, "F", "Caption.")
    (artefact,) = ctx.artefacts
    assert (artefact.kind, artefact.title, artefact.caption) == ("features", "F", "Caption.")
    with np.load(tmp_path / artefact.files[0]) as kept:
        features, names = kept["features"], kept["ids"]
    assert names.tolist() == ids
    assert features.dtype == np.float16
    assert np.square(features.astype(float)).mean() == pytest.approx(1, rel=1e-3)
    ratio = features.astype(float) / rows
    assert ratio == pytest.approx(np.full(rows.shape, ratio[0, 0]), rel=2e-3)


def test_features_that_are_all_zero_are_kept(ctx: RunContext, tmp_path: Path) -> None:
    ctx.save_features("f", np.zeros((3, 2)), ["a", "b", "c"], "F")
    with np.load(tmp_path / ctx.artefacts[0].files[0]) as kept:
        assert not kept["features"].any()


def test_pictures_shrink_and_may_be_a_film_or_pairs_with_similarities(
    ctx: RunContext, tmp_path: Path
) -> None:
    pictures = [np.full((40, 80, 3), i, dtype=np.uint8) for i in range(4)]
    cosines = np.clip(np.random.default_rng(0).normal(0, 0.5, size=(2, 2, 3, 2, 3)), -1, 1)
    cosines = (cosines + cosines.transpose(0, 3, 4, 1, 2)) / 2
    ctx.save_image("plain", pictures[:1], "P", downscale=20)
    ctx.save_image("film", pictures, "F", sequence=True)
    ctx.save_image("pairs", pictures, "S", similarity=cosines)
    plain, film, pairs = ctx.artefacts
    assert (plain.data, film.data) == ({}, {"sequence": True})
    from PIL import Image

    with Image.open(tmp_path / plain.files[0]) as image:
        assert image.size == (20, 10)
    with np.load(tmp_path / pairs.data["similarity"]) as kept:
        assert kept["grid"].tolist() == [2, 3]
        found, (low, high) = kept["steps"], kept["range"].T[..., None]
    assert found.dtype == np.uint8
    expected = np.array(
        [[image[i, j] for i in range(6) for j in range(i + 1, 6)] for image in cosines.reshape(2, 6, 6)]
    )
    assert low + (high - low) * found / 255 == pytest.approx(expected, abs=2 / 255)
    assert found.min(axis=1).tolist() == [0, 0]
    assert found.max(axis=1).tolist() == [255, 255]


def test_a_file_cannot_leave_the_folder_of_its_cell(ctx: RunContext, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leaves"):
        ctx.save_file("../../x.txt", b"x")
    assert not (tmp_path / "x.txt").exists()
