from __future__ import annotations

import logging
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from lmim_bench.bench.comparison import Ranking
from lmim_bench.reports.exhibits import Bars, Curve, Line, Scatter
from lmim_bench.reports.figures import draw_bars, draw_curve, draw_points, draw_ranks
from lmim_bench.reports.style import MARKERS, PAGE, colour, marker, style
from lmim_bench.reports.svg import to_svg

HOSTILE = [
    "</script><script>x</script>",
    '"><img src=x onerror=y>',
    r"$\frac{a}{b}$ &amp;",
    "漢字",
    "a\x00b",
    "l" * 99,
]


def curve_with(series=("s",), checkpoints=(0,), **kwargs):
    lines = tuple(
        Line(c, s, (1.0, 10.0, 100.0), (0.1, None, 0.3), (), ()) for c in checkpoints for s in series
    )
    fields = {
        "name": "k",
        "title": "T",
        "caption": "",
        "x_label": "k",
        "y_label": "accuracy (%)",
        "unit": "%",
    }
    return Curve(**({**fields, "log_x": True, "ticks": (), "lines": lines} | kwargs))


def bars_with(labels, checkpoints=1):
    values = {c: tuple((i * (c + 1) % 7) / 10 for i in range(len(labels))) for c in range(checkpoints)}
    return Bars("c", "T", "", "IoU (%)", "%", tuple(labels), values)


def svgs(draw, exhibit, labels, prefix="f"):
    """(heading, SVG) of each drawing, as the page has them."""
    with style(PAGE):
        return [
            (drawing.heading, to_svg(drawing, f"{prefix}-{i}", labels))
            for i, drawing in enumerate(draw(exhibit, labels))
        ]


def svgs_of_curve(curve, labels, prefix="f"):
    return [svg for _, svg in svgs(draw_curve, curve, labels, prefix)]


def svgs_of_bars(bars, labels):
    return svgs(draw_bars, bars, labels)


def texts(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter("text")]


def test_a_figure_brings_no_style_names_or_addresses_into_the_page():
    (svg,) = svgs_of_curve(curve_with(checkpoints=(0, 1)), ["a", "b"])
    root = ElementTree.fromstring(svg)
    assert {e.tag for e in root.iter()} <= {
        "svg", "defs", "g", "path", "text", "use", "clipPath", "rect", "title",
    }  # fmt: skip
    assert "http" not in svg
    assert "font-family" not in svg
    assert not re.search(r"#0[ab]000\d", svg)
    assert "var(--c1)" in svg
    assert (root.get("role"), root.get("aria-label")[:36]) == ("img", "T: accuracy (%) over k for a, b. The")


def test_references_resolve_within_their_own_figure():
    first, second = (svgs_of_curve(curve_with(), ["a"], prefix)[0] for prefix in ("f1", "f2"))
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in (first, second)]
    assert ids[0]
    assert not ids[0] & ids[1]
    for svg, own in zip((first, second), ids, strict=True):
        assert set(re.findall(r'(?:url\(|href=")#([^")]+)', svg)) == own


def test_the_same_figure_twice_is_the_same_text():
    assert svgs_of_curve(curve_with(), ["a"]) == svgs_of_curve(curve_with(), ["a"])


@pytest.mark.parametrize("name", HOSTILE)
def test_names_from_outside_stay_text(name, caplog):
    with caplog.at_level(logging.WARNING):
        (svg,) = svgs_of_curve(curve_with(title=name, x_label=name, y_label=name), [name])
        ((_, bars),) = svgs_of_bars(bars_with([name, "other"]), [name])
    assert not caplog.records
    shown = name.replace("\x00", "\ufffd")
    expected = shown if len(shown) < 27 else shown[:25] + "…"
    assert expected in texts(bars)
    assert shown[:39] in "".join(t[:39] for t in texts(svg) if t)
    for drawn in (svg, bars):
        assert {e.tag for e in ElementTree.fromstring(drawn).iter()} <= {
            "svg", "defs", "g", "path", "text", "use", "clipPath", "rect", "title"
        }  # fmt: skip


def test_percent_values_are_drawn_times_a_hundred_at_the_measured_positions():
    (svg,) = svgs_of_curve(curve_with(), ["a"])
    assert {"1", "10", "100", "15", "30"} <= set(texts(svg))


def test_many_positions_on_a_logarithmic_axis_are_powers_of_ten():
    grid = tuple(10.0**e for e in range(-6, 6))
    line = Line(0, "s", grid, tuple(0.1 for _ in grid), (), ())
    (svg,) = svgs_of_curve(curve_with(lines=(line,)), ["a"])
    # Every second one or every third, as the version of matplotlib has it.
    powers = ["10⁻⁶", "10⁻⁵", "10⁻⁴", "0.001", "0.01", "0.1", "1", "10", "100", "1000", "10⁴", "10⁵"]
    shown = [powers.index(text) for text in texts(svg) if text in powers]
    assert 4 <= len(shown) <= 7
    assert len({b - a for a, b in pairwise(sorted(shown))}) == 1
    assert "$" not in svg


def test_series_with_bands_do_not_share_a_panel_over_checkpoints():
    def lines(checkpoints):
        return tuple(Line(c, s, (1.0,), (0.5,), (0.4,), (0.6,)) for c in checkpoints for s in "xy")

    assert len(svgs_of_curve(curve_with(lines=lines([0])), ["a"])) == 1
    assert len(svgs_of_curve(curve_with(lines=lines([0, 1])), ["a", "b"])) == 2


def test_few_series_share_a_panel_and_many_get_their_own():
    assert len(svgs_of_curve(curve_with(series=("a", "b", "c")), ["x"])) == 1
    assert len(svgs_of_curve(curve_with(series=("a", "b", "c", "d")), ["x"])) == 4


def test_few_bars_are_all_shown():
    ((heading, svg),) = svgs_of_bars(bars_with([f"c{i}" for i in range(30)]), ["a"])
    assert heading == ""
    assert {f"c{i}" for i in range(30)} <= set(texts(svg))


def test_of_many_bars_the_extremes_are_shown():
    labels = [f"c{i}" for i in range(101)]
    one = Bars("c", "T", "", "", "%", tuple(labels), {0: tuple(i / 101 for i in range(101))})
    (top_name, top), (low_name, low) = svgs_of_bars(one, ["a"])
    assert (top_name, low_name) == ("15 highest", "15 lowest")
    assert [t for t in texts(top) if t in labels] == [f"c{i}" for i in range(100, 85, -1)]
    assert [t for t in texts(low) if t in labels] == [f"c{i}" for i in range(14, -1, -1)]


def test_of_many_bars_the_largest_differences_are_shown():
    labels = [f"c{i}" for i in range(101)]
    base = tuple(0.2 + i / 500 for i in range(101))
    other = tuple(v + (0.5 if i % 7 == 0 else 0.0) for i, v in enumerate(base))
    (name, svg), (low_name, _) = svgs_of_bars(
        Bars("c", "T", "", "", "%", tuple(labels), {0: base, 3: other}), list("abcd")
    )
    assert (name, low_name) == ("15 with the largest differences", "15 with the lowest mean")
    assert {t for t in texts(svg) if t in labels} == {f"c{i}" for i in range(0, 101, 7)}
    assert "var(--c3)" in svg


def test_what_belongs_to_a_checkpoint_is_marked_and_named_on_hover():
    (svg,) = svgs_of_curve(curve_with(checkpoints=(0, 3)), ["a", "b", "c", HOSTILE[0]])
    marked = [e for e in ElementTree.fromstring(svg).iter() if "data-c" in e.attrib]
    assert {e.get("data-c") for e in marked} == {"0", "3"}
    assert {e.get("data-c"): e[0].text for e in marked} == {"0": "a", "3": HOSTILE[0]}
    ((_, svg),) = svgs_of_bars(bars_with(["x", "y"], 2), ["a", "b"])
    assert {e.get("data-c") for e in ElementTree.fromstring(svg).iter()} == {None, "0", "1"}


def test_colour_and_marker_together_tell_64_checkpoints_apart():
    with style(PAGE):
        assert len({(colour(i), marker(i)) for i in range(64)}) == 64
        assert [marker(i) for i in range(8)] == list(MARKERS)
    ((_, svg),) = svgs_of_bars(bars_with(["x", "y"], 10), [f"e{i}" for i in range(10)])
    shapes = {e.get("data-c"): e.find(".//path").get("d") for e in groups_of(svg)}
    assert shapes["1"] == shapes["8"]
    assert len(set(shapes.values())) == len(MARKERS)


def groups_of(svg):
    return [e for e in ElementTree.fromstring(svg).iter("g") if "data-c" in e.attrib]


def test_dots_of_one_value_lie_one_above_the_other():
    with style(PAGE):
        drawings = {
            n: draw_bars(
                Bars("c", "T", "", "", "", ("x", "y"), dict.fromkeys(range(n), (0.5, 0.5))), "abcdefghij"
            )
            for n in (2, 10)
        }
    for count, (drawing,) in drawings.items():
        figure = drawing.figure
        figure.draw_without_rendering()
        (axes,) = figure.axes
        heights = sorted(
            axes.transData.transform((0.5, y))[1] for line in axes.lines for y in line.get_ydata()
        )
        assert len(heights) == 2 * count
        assert min(b - a for a, b in pairwise(heights)) > 3  # points, of dots that are 5.5 wide
        wide = {line.get_markersize() for line in axes.lines}
        assert min(wide) == 5.5
        assert max(wide) < 2 * 5.5  # of a star, which fills less of its size
        assert heights[count] - heights[count - 1] > 1.5 * (heights[1] - heights[0])


def test_a_long_line_has_some_markers():
    x = tuple(map(float, range(80)))
    (svg,) = svgs_of_curve(curve_with(log_x=False, lines=(Line(0, "s", x, x, (), ()),)), ["a"])
    (group,) = groups_of(svg)
    assert 7 <= len(list(group.iter("use"))) <= 10


def test_ranks_are_hidden_whole_and_count_in_words():
    ranking = Ranking((1.0, 2.0, 3.0), None, None, 1, 1)
    with style(PAGE):
        svg = to_svg(draw_ranks(ranking, ["best", "middle", "last"]), "r", ["best", "middle", "last"])
    own = [e for e in groups_of(svg) if e.get("data-c") == "0"]
    assert len(own) == 3, "stem, marker and text"
    assert sum("best  1.00" in "".join(e.itertext()) for e in own) == 1
    assert "average rank over 1 column of 1 data set; 1 is the best" in texts(svg)


def test_points_have_a_panel_a_checkpoint_and_the_colours_of_their_groups():
    clouds = {0: ((0.0, 0.1, 0), (0.5, -0.2, 1)), 2: ((1.0, 1.0, 1),)}
    scatter = Scatter("t", "T", "Caption.", ("road", HOSTILE[0]), ("#a01020", "#20a010"), clouds)
    found = svgs(draw_points, scatter, ["a", "b", HOSTILE[1]])
    assert [heading for heading, _ in found] == ["a", HOSTILE[1]]
    assert ("#a01020" in found[0][1], "#20a010" in found[0][1]) == (True, True)
    assert ("#a01020" in found[1][1], "#20a010" in found[1][1]) == (False, True)
    assert ElementTree.fromstring(found[1][1]).get("aria-label") == f"T of {HOSTILE[1]}: 1 points. Caption."
