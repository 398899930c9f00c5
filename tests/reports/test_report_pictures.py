from __future__ import annotations

import base64
import io

import pytest
from PIL import Image

from lmim_bench.bench.errors import DataError
from lmim_bench.reports.pictures import load_album


def decoded(uri):
    head, _, body = uri.partition(",")
    return head, base64.b64decode(body)


def test_small_pictures_are_embedded_as_they_are(tmp_path, png):
    (tmp_path / "a.png").write_bytes(png())
    album = load_album([(tmp_path, "a.png")])
    picture = album.pictures[tmp_path, "a.png"]
    assert decoded(picture.uri) == ("data:image/png;base64", png())
    assert (picture.width, picture.height, album.note) == (24, 16, "")


def test_beyond_the_budget_pictures_are_encoded_again_and_the_page_says_so(tmp_path, png):
    files = [f"{i}.png" for i in range(4)]
    for i, file in enumerate(files):
        (tmp_path / file).write_bytes(png(300, 200, seed=i))
    total = sum((tmp_path / f).stat().st_size for f in files)
    album = load_album([(tmp_path, f) for f in files], budget=total // 2)
    parts = [decoded(p.uri) for p in album.pictures.values()]
    assert {head for head, _ in parts} == {"data:image/webp;base64"}
    assert sum(len(body) for _, body in parts) <= total // 2
    assert "quality" in album.note
    assert Image.open(io.BytesIO(parts[0][1])).size[0] <= 300
    assert [(p.width, p.height) for p in album.pictures.values()] == [(300, 200)] * 4


def test_what_does_not_fit_is_left_out_by_order_and_counted(tmp_path, png):
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(png(300, 200, seed=i))
    album = load_album([(tmp_path, f"{i}.png") for i in range(6)], budget=12_000)
    there = [bool(album.pictures[tmp_path, f"{i}.png"].uri) for i in range(6)]
    assert there == sorted(there, reverse=True)
    assert 0 < sum(there) < 6
    assert f"{6 - sum(there)} of 6 are left out" in album.note


def test_a_missing_or_broken_picture_has_a_reason(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    Image.new("RGB", (4, 4)).save(tmp_path / "jpeg.png", "JPEG")
    album = load_album([(tmp_path, f) for f in ("missing.png", "broken.png", "jpeg.png")])
    assert [p.problem for p in album.pictures.values()] == [
        "is missing",
        "cannot be read as a PNG",
        "cannot be read as a PNG",
    ]
    assert not any(p.uri for p in album.pictures.values())


@pytest.mark.parametrize("file", ["../secret.png", "/etc/hostname", "a/../../secret.png"])
def test_a_picture_outside_of_the_run_folder_is_refused(tmp_path, png, file):
    (tmp_path / "secret.png").write_bytes(png())
    (tmp_path / "run").mkdir()
    with pytest.raises(DataError, match="outside"):
        load_album([(tmp_path / "run", file)])


def test_a_link_out_of_the_run_folder_is_refused(tmp_path, png):
    (tmp_path / "secret.png").write_bytes(png())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataError, match="outside"):
        load_album([(tmp_path / "run", "a.png")])
