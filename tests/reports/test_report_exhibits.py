from __future__ import annotations

from pathlib import Path

import pytest

from lmim_bench.bench.results import RunFile
from lmim_bench.bench.types import Artefact
from lmim_bench.reports.exhibits import collect
from lmim_bench.reports.model import make_report

HERE = Path("run")


def exhibits_of(*results):
    report = make_report([(RunFile(command="run", limited=False, results=results), HERE)])
    return collect(report.columns[0])


def curve_of(y, x=(1, 2), **data):
    payload = {"x": list(x), "series": {"s": list(y)}, "x_label": "k", "y_label": "accuracy"} | data
    return Artefact(name="k", kind="curve", title="T", data=payload)


def bars_of(labels, values, **data):
    return Artefact(
        name="c", kind="bars", title="T", data={"labels": labels, "values": values, "y_label": "IoU"} | data
    )


def points_of(x, **data):
    plain = {"x": x, "y": x, "group": [0] * len(x), "groups": ["road", "tree"]}
    plain |= {"colours": ["#ff0000", "#00ff00"]}
    return Artefact(name="t", kind="points", title="T", data=plain | data)


def test_curves_of_one_name_are_overlaid(result):
    (curve,) = exhibits_of(
        result("a", artefacts=(curve_of([0.1, 0.2]),)), result("b", artefacts=(curve_of([0.3, 0.4]),))
    ).curves
    assert [(line.checkpoint, line.y) for line in curve.lines] == [(0, (0.1, 0.2)), (1, (0.3, 0.4))]
    assert (curve.unit, curve.y_label, curve.log_x) == ("%", "accuracy (%)", False)


def test_seeds_become_a_mean_with_a_band(result):
    (curve,) = exhibits_of(
        result(seed=0, artefacts=(curve_of([0.1, None]),)), result(seed=1, artefacts=(curve_of([0.3, 0.4]),))
    ).curves
    (line,) = curve.lines
    assert line.y == pytest.approx((0.2, 0.4))
    assert (line.low, line.high) == ((0.1, 0.4), (0.3, 0.4))


def test_a_given_band_is_drawn(result):
    artefact = curve_of([0.2, 0.3], low={"s": [0.1, 0.2]}, high={"s": [0.3, 0.5]})
    (line,) = exhibits_of(result(artefacts=(artefact,))).curves[0].lines
    assert (line.low, line.high) == ((0.1, 0.2), (0.3, 0.5))


@pytest.mark.parametrize(
    ("data", "unit"),
    [({}, "%"), ({"unit": ""}, ""), ({"unit": "%"}, "%"), ({"series": {"s": [3.0, 900]}}, "")],
)
def test_the_unit_is_given_or_follows_from_the_values(result, data, unit):
    assert exhibits_of(result(artefacts=(curve_of([0.1, 0.2], **data),))).curves[0].unit == unit


def test_positions_may_be_names(result):
    (curve,) = exhibits_of(result(artefacts=(curve_of([0.1, 0.2], x=("last", "last 4"), log_x=True),))).curves
    assert (curve.ticks, curve.lines[0].x, curve.log_x) == (("last", "last 4"), (0.0, 1.0), False)


def test_a_zero_has_no_place_on_a_logarithmic_axis(result):
    assert not exhibits_of(result(artefacts=(curve_of([0.1, 0.2], x=(0, 1), log_x=True),))).curves[0].log_x


def test_bars_are_joined_by_label_with_gaps(result):
    (bars,) = exhibits_of(
        result("a", artefacts=(bars_of(["x", "y"], [0.1, 0.2]),)),
        result("b", artefacts=(bars_of(["y", "z"], [0.6, None]),)),
    ).bars
    assert bars.labels == ("x", "y", "z")
    assert bars.values == {0: (0.1, 0.2, None), 1: (None, 0.6, None)}
    assert bars.spread(1) == pytest.approx(0.4)
    assert (bars.mean(1), bars.mean(2)) == (pytest.approx(0.4), 0.0)


@pytest.mark.parametrize(
    "artefact",
    [
        curve_of([0.1]),
        curve_of([]),
        curve_of([0.1, "much"]),
        curve_of([0.1, 0.2], series=None),
        curve_of([0.1, 0.2], x=([1], [2])),
        Artefact(name="k", kind="curve", title="T"),
        bars_of(["x"], [0.1, 0.2]),
        bars_of(["x", "x"], [0.1, 0.2]),
        bars_of(None, None),
        points_of([0.1], y=[0.1, 0.2]),
        points_of([]),
        points_of([float("nan")]),
        points_of([0.1], group=[2]),
        points_of([0.1], colours=["red", "#123456"]),
        points_of([0.1], colours=["#123456"]),
    ],
)
def test_malformed_data_is_left_out_and_named(result, artefact):
    shown = exhibits_of(
        result("good", artefacts=(curve_of([0.1, 0.2]),)), result("bad", artefacts=(artefact,))
    )
    assert [len(c.lines) for c in shown.curves] == [1]
    assert not shown.bars
    assert not shown.points
    (problem,) = shown.problems
    assert problem.startswith("bad--knn--toy--s0: ")


def test_points_of_the_first_seed_share_the_groups_of_all_checkpoints(result):
    (scatter,) = exhibits_of(
        result("a", seed=0, artefacts=(points_of([0.1, 0.2], group=[0, 1]),)),
        result("a", seed=1, artefacts=(points_of([0.7]),)),
        result("b", artefacts=(points_of([0.3], groups=["sky", "road"], colours=["#0000ff", "#abcdef"]),)),
    ).points
    assert (scatter.groups, scatter.colours) == (("road", "tree", "sky"), ("#ff0000", "#00ff00", "#0000ff"))
    assert scatter.clouds == {0: ((0.1, 0.1, 0), (0.2, 0.2, 1)), 1: ((0.3, 0.3, 2),)}


def test_galleries_join_checkpoints_and_show_the_first_seed(result):
    def picture(file):
        return (Artefact(name="g", kind="image", title="G", caption=file, files=(file,)),)

    (gallery,) = exhibits_of(
        result("a", seed=0, artefacts=picture("a0.png")),
        result("a", seed=1, artefacts=picture("a1.png")),
        result("b", seed=0, artefacts=picture("b0.png")),
    ).galleries
    assert [(s.checkpoint, s.caption, s.files, s.folder) for s in gallery.strips] == [
        (0, "a0.png", ("a0.png",), HERE),
        (1, "b0.png", ("b0.png",), HERE),
    ]
    assert (gallery.title, gallery.caption) == ("G", "")


def test_titles_that_differ_stand_with_their_strips(result):
    def picture(title):
        return (Artefact(name="strip-best", kind="image", title=title, caption="Masks.", files=("x.png",)),)

    (gallery,) = exhibits_of(
        result("a", artefacts=picture("bear, J&F 70")), result("b", artefacts=picture("dog, J&F 80"))
    ).galleries
    assert (gallery.title, gallery.caption) == ("Strip best", "Masks.")
    assert [s.caption for s in gallery.strips] == ["bear, J&F 70", "dog, J&F 80"]
