from __future__ import annotations

import logging
import re
from xml.etree import ElementTree

import pytest

from lmim_bench.reports.exhibits import Bars, Curve, Line
from lmim_bench.reports.figures import draw_bars, draw_curve

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


def texts(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter("text")]


def test_a_figure_brings_no_style_names_or_addresses_into_the_page():
    (svg,) = draw_curve(curve_with(checkpoints=(0, 1)), ["a", "b"], "f")
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
    first, second = (draw_curve(curve_with(), ["a"], prefix)[0] for prefix in ("f1", "f2"))
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in (first, second)]
    assert ids[0]
    assert not ids[0] & ids[1]
    for svg, own in zip((first, second), ids, strict=True):
        assert set(re.findall(r'(?:url\(|href=")#([^")]+)', svg)) == own


def test_the_same_figure_twice_is_the_same_text():
    assert draw_curve(curve_with(), ["a"], "f") == draw_curve(curve_with(), ["a"], "f")


@pytest.mark.parametrize("name", HOSTILE)
def test_names_from_outside_stay_text(name, caplog):
    with caplog.at_level(logging.WARNING):
        (svg,) = draw_curve(curve_with(title=name, x_label=name, y_label=name), [name], "f")
        ((_, bars),) = draw_bars(bars_with([name, "other"]), [name], "f")
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
    (svg,) = draw_curve(curve_with(), ["a"], "f")
    assert {"1", "10", "100", "15", "30"} <= set(texts(svg))


def test_many_positions_on_a_logarithmic_axis_are_powers_of_ten():
    grid = tuple(10.0**e for e in range(-6, 6))
    line = Line(0, "s", grid, tuple(0.1 for _ in grid), (), ())
    (svg,) = draw_curve(curve_with(lines=(line,)), ["a"], "f")
    assert {"10⁻⁶", "10⁻⁴", "0.01", "1", "100", "10⁴"} <= set(texts(svg))
    assert "$" not in svg


def test_series_with_bands_do_not_share_a_panel_over_checkpoints():
    def lines(checkpoints):
        return tuple(Line(c, s, (1.0,), (0.5,), (0.4,), (0.6,)) for c in checkpoints for s in "xy")

    assert len(draw_curve(curve_with(lines=lines([0])), ["a"], "f")) == 1
    assert len(draw_curve(curve_with(lines=lines([0, 1])), ["a", "b"], "f")) == 2


def test_few_series_share_a_panel_and_many_get_their_own():
    assert len(draw_curve(curve_with(series=("a", "b", "c")), ["x"], "f")) == 1
    assert len(draw_curve(curve_with(series=("a", "b", "c", "d")), ["x"], "f")) == 4


def test_few_bars_are_all_shown():
    ((heading, svg),) = draw_bars(bars_with([f"c{i}" for i in range(30)]), ["a"], "f")
    assert heading == ""
    assert {f"c{i}" for i in range(30)} <= set(texts(svg))


def test_of_many_bars_the_extremes_are_shown():
    labels = [f"c{i}" for i in range(101)]
    one = Bars("c", "T", "", "", "%", tuple(labels), {0: tuple(i / 101 for i in range(101))})
    (top_name, top), (low_name, low) = draw_bars(one, ["a"], "f")
    assert (top_name, low_name) == ("15 highest", "15 lowest")
    assert [t for t in texts(top) if t in labels] == [f"c{i}" for i in range(100, 85, -1)]
    assert [t for t in texts(low) if t in labels] == [f"c{i}" for i in range(14, -1, -1)]


def test_of_many_bars_the_largest_differences_are_shown():
    labels = [f"c{i}" for i in range(101)]
    base = tuple(0.2 + i / 500 for i in range(101))
    other = tuple(v + (0.5 if i % 7 == 0 else 0.0) for i, v in enumerate(base))
    (name, svg), (low_name, _) = draw_bars(
        Bars("c", "T", "", "", "%", tuple(labels), {0: base, 3: other}), list("abcd"), "f"
    )
    assert (name, low_name) == ("15 with the largest differences", "15 with the lowest mean")
    assert {t for t in texts(svg) if t in labels} == {f"c{i}" for i in range(0, 101, 7)}
    assert "var(--c3)" in svg


def test_what_belongs_to_a_checkpoint_is_marked_and_named_on_hover():
    (svg,) = draw_curve(curve_with(checkpoints=(0, 3)), ["a", "b", "c", HOSTILE[0]], "f")
    marked = [e for e in ElementTree.fromstring(svg).iter() if "data-c" in e.attrib]
    assert {e.get("data-c") for e in marked} == {"0", "3"}
    assert {e.get("data-c"): e[0].text for e in marked} == {"0": "a", "3": HOSTILE[0]}
    ((_, svg),) = draw_bars(bars_with(["x", "y"], 2), ["a", "b"], "f")
    assert {e.get("data-c") for e in ElementTree.fromstring(svg).iter()} == {None, "0", "1"}
