"""Figures of a report as files."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

from lmim_bench.bench.cli import cli
from lmim_bench.bench.types import Artefact

EVIL = "<img src=x onerror=y>$x_1$"


@pytest.fixture
def folder(tmp_path, result, write_run):
    def artefacts(shift):
        line = {"x": [1, 10], "series": {"s": [0.4, shift], EVIL: [0.1, 0.2]}, "x_label": "k", "y_label": "a"}
        cloud = {"x": [0.1, 0.2], "y": [0, shift], "group": [0, 1]}
        cloud |= {"groups": ["road", EVIL], "colours": ["#a01020", "#20a010"]}
        return (
            Artefact(name="over-k", kind="curve", title="Over k", data=line),
            Artefact(
                name="per/class", kind="bars", title="B", data={"labels": ["x", EVIL], "values": [0.1, 0.2]}
            ),
            Artefact(name="t-sne", kind="points", title="P", data=cloud),
        )

    results = [
        result(label, data=data, artefacts=artefacts(0.1 * i), info={"parameters": 10 ** (6 + i)})
        for i, label in enumerate((EVIL, "b"))
        for data in ("toy", "real")
    ]
    numbered = [made.model_copy(update={"cell": f"cell-{i}"}) for i, made in enumerate(results)]
    return write_run(tmp_path / "run", numbered)


def run(*arguments):
    return CliRunner().invoke(cli, [str(a) for a in arguments])


def test_every_figure_is_written_under_its_column_and_name(folder):
    found = run("figures", folder)
    assert found.exit_code == 0, found.output
    files = sorted(path.name for path in (folder / "figures").iterdir())
    assert found.output == f"figures  {len(files)} in {folder / 'figures'}\n"
    columns = [name.removesuffix("-over-k.svg") for name in files if name.endswith("-over-k.svg")]
    assert columns == ["knn-real", "knn-toy"]
    assert sum(name.startswith("knn-toy-per-class") for name in files) == 1
    assert {"knn-toy-against-parameters.svg", "knn-toy-t-sne-b.svg"} <= set(files)
    assert sum(name.startswith("knn-toy-t-sne--img-src") for name in files) == 1


def test_an_svg_is_text_on_paper_with_a_legend(folder):
    run("figures", folder)
    text = (folder / "figures/knn-toy-over-k.svg").read_text()
    words = [e.text for e in ElementTree.fromstring(text).iter("{http://www.w3.org/2000/svg}text")]
    assert words.count(EVIL) == 2, "the checkpoint and the series"
    assert {"b", "s", "k", "a (%)"} <= set(words)
    assert "var(" not in text
    assert "#0b000" not in text
    assert "#1d5fd0" in text
    assert "<dc:date>" not in text


def boxes_of(folder, names):
    """Of each figure its size and the boxes of its texts longer than numbers, in points."""
    from lmim_bench.reports import figure_files
    from lmim_bench.reports.model import read_report
    from lmim_bench.reports.style import PAPER, style

    report = read_report([folder])
    labels = [c.label for c in report.checkpoints]
    with style(PAPER):
        for name, drawing in figure_files._drawings(report, labels):
            figure_files._bytes(drawing, labels, "svg")
            figure, renderer = drawing.figure, FigureCanvasAgg(drawing.figure).get_renderer()
            figure.draw_without_rendering()
            texts = [t for t in figure.findobj(Text) if len(t.get_text()) > 12]
            names.append(name)
            yield figure.bbox, [(t.get_text(), t.get_window_extent(renderer)) for t in texts]


def test_no_text_is_cut_at_the_edge_however_long_its_names_are(tmp_path, result, write_run):
    label, names = "checkpoint latent-mim.vit_base_patch16_224.e800 " * 3, []
    curve = {"x": [1, 2], "series": {label: [0.1, 0.2], "b": [0.1, 0.3]}, "x_label": label, "y_label": label}
    cloud = {"x": [0, 1], "y": [0, 1], "group": [0, 1], "groups": [label, "b"], "colours": ["#a01020"] * 2}
    artefacts = (
        Artefact(name="k", kind="curve", title="K", data=curve),
        Artefact(name="c", kind="bars", title="C", data={"labels": ["x"], "values": [0.1], "y_label": label}),
        Artefact(name="t", kind="points", title="T", data=cloud),
    )
    results = [
        result(f"{label} {i}", artefacts=artefacts, info={"parameters": 10 ** (6 + i)}, protocol={label: k})
        for i in range(9)
        for k in range(2)
    ]
    numbered = [made.model_copy(update={"cell": f"cell-{i}"}) for i, made in enumerate(results)]
    for page, texts in boxes_of(write_run(tmp_path / "run", numbered), names):
        for text, box in texts:
            over = (page.x0 - box.x0, box.x1 - page.x1, page.y0 - box.y0, box.y1 - page.y1)
            assert max(over) < 3, (names[-1], text)
    assert {name.partition("-")[0] for name in names} == {"ranks", "knn"}
    assert len(set(names)) == len(names)


def test_points_are_named_by_their_heading_and_their_legend_by_groups_alone(folder):
    run("figures", folder)
    text = (folder / "figures/knn-toy-t-sne-b.svg").read_text()
    words = [e.text for e in ElementTree.fromstring(text).iter("{http://www.w3.org/2000/svg}text")]
    assert sorted(words) == sorted(["b", "road", EVIL])


@pytest.mark.parametrize(("form", "magic"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_the_same_results_give_the_same_bytes(folder, tmp_path, form, magic):
    for name in ("one", "two"):
        assert run("figures", folder, "--format", form, "--out", tmp_path / name).exit_code == 0
    first, second = (sorted((tmp_path / name).iterdir()) for name in ("one", "two"))
    assert [p.name for p in first] == [p.name for p in second]
    for one, two in zip(first, second, strict=True):
        assert one.read_bytes().startswith(magic)
        assert one.read_bytes() == two.read_bytes()
    if form == "png":
        with Image.open(first[0]) as image:
            assert image.size > (600, 400)


def test_a_folder_that_holds_no_run_is_refused(tmp_path):
    found = run("figures", tmp_path)
    assert found.exit_code == 2
    assert "Traceback" not in found.output
