"""CKA between checkpoints from the features that cells kept."""

from __future__ import annotations

import numpy as np
import pytest

from lmim_bench.bench.errors import DataError
from lmim_bench.bench.types import Artefact
from lmim_bench.reports.html import build_report
from lmim_bench.reports.model import read_report
from lmim_bench.reports.resemblance import resemblances


def kept(folder, label, rows, ids):
    file = f"artefacts/{label}/features.npz"
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    np.savez(folder / file, features=rows, ids=np.array(ids))
    return Artefact(name="features", kind="features", title="Likeness", caption="CKA.", files=(file,))


@pytest.fixture
def folder(tmp_path, result, write_run):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(40, 6))
    turned = 3 * rows @ np.linalg.qr(rng.normal(size=(6, 6)))[0] + 1
    ids = [f"{i}.png" for i in range(40)]
    order = rng.permutation(40)[:30]
    root = tmp_path / "run"
    sets = {
        "a": (rows, ids),
        "turned": (turned[order], [ids[i] for i in order]),
        "other": (rng.normal(size=(40, 3)), ids),
    }
    results = [result(name, artefacts=(kept(root, name, *found),)) for name, found in sets.items()]
    return write_run(root, [*results, result("none")], pictures=False)


def test_checkpoints_are_compared_over_the_images_that_all_have(folder):
    (column,) = read_report([folder]).columns
    (found,), problems = resemblances(column)
    assert problems == []
    assert (found.checkpoints, found.images) == ((0, 1, 2), 30)
    assert np.diagonal(found.values) == pytest.approx(1)
    assert found.values[0, 1] == pytest.approx(1)
    assert abs(found.values[0, 2]) < 0.2
    page = build_report(folder).read_text()
    assert "Likeness" in page
    assert "Over 30 images." in page
    assert "not as it should be" not in page


def test_a_file_that_is_missing_or_broken_is_named(folder):
    (folder / "artefacts/a/features.npz").unlink()
    (folder / "artefacts/other/features.npz").write_bytes(b"no archive")
    (column,) = read_report([folder]).columns
    found, problems = resemblances(column)
    assert found == []
    assert problems == [
        "artefacts/a/features.npz is missing",
        "artefacts/other/features.npz cannot be read as features",
    ]
    assert "artefacts/a/features.npz is missing" in build_report(folder).read_text()


def test_a_file_outside_of_the_run_folder_ends_the_report(tmp_path, result, write_run):
    artefact = Artefact(name="f", kind="features", title="f", files=("../../secret.npz",))
    run = write_run(tmp_path / "run", [result("a", artefacts=(artefact,))], pictures=False)
    with pytest.raises(DataError, match="outside"):
        build_report(run)
