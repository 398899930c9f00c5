"""Similarities of patches, from the task that keeps them to the page."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from lmim_bench.bench.errors import DataError
from lmim_bench.bench.types import Artefact
from lmim_bench.reports.exhibits import Strip
from lmim_bench.reports.html import build_report
from lmim_bench.reports.similarity import BUDGET, load_similarities


def strip(folder, file="s.npz", pictures=4):
    return Strip(0, "", folder, tuple(f"{i}.png" for i in range(pictures)), file)


def write(folder, name="s.npz", count=2, side=2, dtype=np.uint8, top=0.5):
    patches = side * side
    steps = np.arange(count * patches * (patches - 1) // 2).reshape(count, -1) % 256
    ranges = [[-0.25, top]] * count
    np.savez(folder / name, grid=np.array([side, side]), steps=steps.astype(dtype), range=ranges)
    return steps


def test_each_image_has_the_upper_triangle_of_its_cosines(tmp_path):
    steps = write(tmp_path)
    found, problems, note = load_similarities([strip(tmp_path), strip(tmp_path, file="")])
    assert (problems, note) == ([], "")
    ((key, similar),) = found.items()
    assert key == (tmp_path, "s.npz")
    assert (similar.height, similar.width) == (2, 2)
    assert similar.ranges == ((-0.25, 0.5), (-0.25, 0.5))
    read = [np.frombuffer(base64.b64decode(pair), dtype=np.uint8) for pair in similar.pairs]
    assert np.array_equal(read, steps)


@pytest.mark.parametrize("wrong", [{"count": 3}, {"dtype": np.float32}, {"top": np.nan}])
def test_a_file_of_another_shape_is_named(tmp_path, wrong):
    write(tmp_path, **wrong)
    assert load_similarities([strip(tmp_path)]) == ({}, ["s.npz cannot be read as similarities"], "")


def test_a_file_that_is_missing_or_broken_is_named_and_one_outside_refused(tmp_path):
    (tmp_path / "b.npz").write_bytes(b"no archive")
    found, problems, _ = load_similarities([strip(tmp_path), strip(tmp_path, "b.npz")])
    assert (found, problems) == ({}, ["s.npz is missing", "b.npz cannot be read as similarities"])
    with pytest.raises(DataError, match="outside"):
        load_similarities([strip(tmp_path, "../s.npz")])


def test_beyond_the_budget_pictures_do_not_answer_and_the_page_says_so(
    tmp_path, monkeypatch, result, write_run
):
    side = 24
    write(tmp_path, count=1, side=side)
    each = 4 * (side**2 * (side**2 - 1) // 2) / 3
    many = [strip(tmp_path, pictures=2)] * (int(BUDGET / each) + 2)
    found, problems, note = load_similarities(many)
    assert len(found) == 1
    assert (problems, note) == (
        [],
        "Some pictures of patches do not answer to clicks, to keep this page light.",
    )
    monkeypatch.setattr("lmim_bench.reports.similarity.BUDGET", 0)
    write(tmp_path, "s.npz", count=1)
    picture = Artefact(
        name="p", kind="image", title="P", files=("a.png", "b.png"), data={"similarity": "s.npz"}
    )
    page = build_report(write_run(tmp_path, [result("a", artefacts=(picture,))])).read_text()
    assert note in page.partition('id="environment"')[2]
    assert "not as it should be" not in page


def test_the_page_survives_a_file_that_is_not_there(tmp_path, result, write_run):
    picture = Artefact(
        name="p", kind="image", title="P", files=("a.png", "b.png"), data={"similarity": "gone.npz"}
    )
    page = build_report(write_run(tmp_path / "run", [result("a", artefacts=(picture,))])).read_text()
    assert "gone.npz is missing" in page
    assert "data-similar=" not in page
