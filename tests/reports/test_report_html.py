from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from lmim_bench.bench.errors import DataError
from lmim_bench.bench.results import DataRecord
from lmim_bench.bench.types import Artefact
from lmim_bench.reports.html import build_report, prose

EVIL = '<img src=x onerror="alert(1)">'
SCRIPT = "</script><script>alert(2)</script>"
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Elements with their attributes, the visible text, and whether every element is closed in order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.words, self.open, self.unbalanced = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


@pytest.fixture
def full_run(tmp_path, result, score, write_run):
    """Several checkpoints, tasks, data sets and seeds; failures; hostile names; artefacts of all kinds."""

    def artefacts(label, shift):
        safe = re.sub(r"\W", "_", label)
        curve = {"x": [1, 10], "series": {"weighted": [0.4 + shift, 0.5], SCRIPT: [0.3, 0.4]}, "log_x": True}
        bars = {"labels": [f"class {i}" for i in range(99)] + [EVIL, SCRIPT], "values": [shift] * 101}
        return (
            Artefact(
                name="k", kind="curve", title="Over k", data=curve | {"x_label": "k", "y_label": "accuracy"}
            ),
            Artefact(name="c", kind="bars", title="By class", data=bars | {"y_label": "accuracy (%)"}),
            Artefact(
                name="g", kind="image", title="Gallery", caption=SCRIPT, files=(f"artefacts/{safe}/1.png",)
            ),
        )

    skipped = DataRecord(
        name="toy",
        kind="classification",
        fingerprint="toy-hash",
        counts={"val": 9},
        skipped=(SCRIPT,),
        classes=(EVIL,),
    )
    labels = ["mae", "lmim", EVIL]
    results = []
    for i, label in enumerate(labels):
        for seed in (0, 1):
            scores = (
                score("top1@k=20", 0.5 + 0.1 * i + 0.01 * seed, chance=0.1, detail={"C": EVIL}),
                score("nll", 1.0),
            )
            results.append(
                result(
                    label,
                    seed=seed,
                    scores=scores,
                    artefacts=artefacts(label, 0.1 * i),
                    record=skipped,
                    info={"dropped": {EVIL: SCRIPT}},
                )
            )
        results.append(result(label, data="other", overrides=("k",), notes=(f"note {SCRIPT}",)))
    results.append(result("mae", "vos", headline="jf", error=f"no frames in {EVIL}"))
    results.append(
        result("random", "vos", headline="jf", error="out of memory", info={"random_weights": True})
    )
    results.append(
        result(
            "lmim", "vos", headline="jf", scores=(score("jf", 0.6, None),), info={"dropped": {EVIL: SCRIPT}}
        )
    )
    return write_run(tmp_path / "run", results)


@pytest.fixture
def page(full_run):
    return Page(build_report(full_run).read_text(encoding="utf-8"))


def test_the_page_is_well_formed_with_landmarks_and_a_title(page):
    assert not page.unbalanced
    assert not page.open
    names = [tag for tag, _ in page.elements]
    assert names.count("main") == names.count("nav") == names.count("h1") == 1
    assert names[: names.index("body")].count("title") == 1
    assert page.all("html") == [{"lang": "en"}]


def test_ids_are_unique_and_every_link_leads_somewhere(page):
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    targets = {a["href"] for a in page.all("a")} | {attrs["href"] for attrs in page.all("use")}
    assert targets
    assert {target.removeprefix("#") for target in targets} <= set(ids)


def test_nothing_is_loaded_from_anywhere(page):
    for tag, attrs in page.elements:
        for name in ("src", "href", "srcset", "data", "poster", "action"):
            if name in attrs:
                assert attrs[name].startswith(("data:", "#")), (tag, name)
        assert "url(" not in attrs.get("style", "")
        assert not any(name.startswith("on") for name in attrs), (tag, attrs)
    assert [set(attrs) for attrs in page.all("script")] == [set()]
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert re.fullmatch(
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-[^']+'; "
        "base-uri 'none'; form-action 'none'",
        policy,
    )


def test_the_policy_admits_the_script_of_the_page(full_run):
    import base64
    import hashlib

    text = build_report(full_run).read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert digest in Page(text).all("meta")[3]["content"]


def test_every_picture_is_embedded_and_described(page):
    pictures = page.all("img")
    assert len(pictures) == 3
    assert all(p["src"].startswith("data:image/png;base64,") and p["alt"].strip() for p in pictures)
    assert any(EVIL in p["alt"] for p in pictures)
    assert all(a.get("aria-label") for a in page.all("svg"))


def test_hostile_names_are_shown_as_text(page):
    assert page.text.count(EVIL) > 10
    assert page.text.count(SCRIPT) > 5
    assert f"note {SCRIPT}" in page.text


def test_every_failure_is_shown_with_its_reason(page):
    assert f"no frames in {EVIL}" in page.text
    assert "out of memory" in page.text
    assert "2 cells failed." in page.text


def test_scores_are_shown_with_interval_chance_and_standing(page):
    assert "70.5 ★ [68.5, 72.5] mean of 2 seeds" in page.text
    assert "60.5 [58.5, 62.5]" in page.text
    assert "chance 10.0" in page.text
    assert "seed 1: 51.0 [50.0, 52.0]" in page.text
    assert "60.0 no interval" in page.text


def test_provenance_is_shown(page):
    for words in (
        "150 of 150 of the encoder",
        "21.7 M",
        "lmim-bench run --tasks all",
        "toy-hash",
        "1 image",
        "f" * 64,
    ):
        assert words in page.text
    assert "1, 20 set" in page.text
    assert "random has random weights" in page.text
    assert "1 entry of the file not used" in page.text


def test_a_limited_run_is_watermarked(tmp_path, result, write_run):
    folder = write_run(tmp_path / "run", [result(limit=50)], limited=True)
    assert "LIMITED RUN: at most 50 images a split" in Page(build_report(folder).read_text()).text
    whole = write_run(tmp_path / "whole", [result()])
    assert "LIMITED" not in build_report(whole).read_text()


def test_the_same_run_gives_the_same_bytes(full_run, tmp_path):
    first = build_report(full_run, tmp_path / "a.html").read_bytes()
    assert first == build_report(full_run, tmp_path / "b.html").read_bytes()
    assert str(tmp_path).encode() not in first


def test_a_missing_picture_is_named_on_the_page(tmp_path, result, write_run):
    artefact = Artefact(name="g", kind="image", title="G", files=("artefacts/gone.png",))
    folder = write_run(tmp_path, [result(artefacts=(artefact,))], pictures=False)
    text = Page(build_report(folder).read_text()).text
    assert text.count("artefacts/gone.png is missing") == 2
    assert "not as it should be" in text


def test_a_picture_outside_of_the_folder_ends_the_report(tmp_path, result, write_run):
    artefact = Artefact(name="g", kind="image", title="G", files=("../x.png",))
    folder = write_run(tmp_path / "run", [result(artefacts=(artefact,))])
    with pytest.raises(DataError, match="outside"):
        build_report(folder)
    assert not (folder / "report.html").exists()


def test_runs_are_shown_side_by_side(tmp_path, result, write_run):
    folders = [write_run(tmp_path / label, [result(label)]) for label in ("a", "b")]
    path = build_report(folders, tmp_path / "both.html")
    assert path == tmp_path / "both.html"
    assert "2 checkpoints on 1 task" in Page(path.read_text()).text


@pytest.mark.parametrize(("others", "folded"), [(3, 0), (4, 3)])
def test_of_many_comparisons_what_is_not_clear_is_folded(tmp_path, result, score, write_run, others, folded):
    rates = {"base": 0.5, "far": 0.9} | {f"near{i}": 0.5 for i in range(others - 1)}
    results = [result(label, scores=(score("top1@k=20", rate),)) for label, rate in rates.items()]
    folder = write_run(tmp_path / "run", results)
    (folder / "items").mkdir()
    for made, rate in zip(results, rates.values(), strict=True):
        np.savez(folder / "items" / f"{made.cell}.npz", **{"top1@k=20": np.arange(100) < 100 * rate})
    text = Page(build_report(folder).read_text()).text
    assert text.count("Nothing clear in 1 column") == folded
    assert text.count("are not told apart: 0.0 points") == others - 1
    assert "Not clear in" not in text  # the far one has nothing to fold
    assert "far is better than base by 40.0 points" in text


def test_an_empty_run_still_has_a_page(tmp_path, write_run):
    assert "No cell has been scored yet." in Page(build_report(write_run(tmp_path, [])).read_text()).text


def test_control_characters_of_outside_text_do_not_reach_the_page(tmp_path, result, write_run):
    text = build_report(write_run(tmp_path, [result("a\x1bb", notes=("x\x00y",))])).read_text()
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", text)


def test_reports_never_import_torch():
    code = (
        "import sys, lmim_bench.reports.html, lmim_bench.reports.text;"
        "assert not {'torch', 'matplotlib', 'jinja2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_documentation_becomes_paragraphs_and_preformatted_blocks():
    text = "Two lines\nof ``code`` & <b>.\n\nSteps:\n    1. one\n    2. two\n\n1. listed\n2. again"
    assert prose(text) == [
        ("p", "Two lines of <code>code</code> &amp; &lt;b&gt;."),
        ("pre", "Steps:\n    1. one\n    2. two"),
        ("pre", "1. listed\n2. again"),
    ]
    assert prose("") == []


def test_the_lead_counts_all_columns_and_joins_those_alike(tmp_path, result, score, write_run):
    best = {"knn": "a", "linear": "b", "vos": "c"}
    results = [
        result(label, task, scores=(score("top1@k=20", 0.9 if best[task] == label else 0.1),))
        for task in best
        for label in "abc"
    ]
    results.append(result("a", "few_shot"))
    text = Page(build_report(write_run(tmp_path / "run", results)).read_text()).text
    assert "a, b and c are each best in 1 of 4 columns." in text
    text = Page(build_report(write_run(tmp_path / "one", results[:3])).read_text()).text
    assert "a is best in 1 of 1 column." in text


def test_the_key_explains_only_the_marks_that_are_there(tmp_path, result, write_run):
    apart = [result("a"), result("b", "linear")]
    page = build_report(write_run(tmp_path / "run", apart)).read_text()
    key = page.partition('class="key"')[2].partition("</p>")[0]
    assert "★" not in key
    assert "≈" not in key
    assert "Shade" in key


def test_a_column_that_only_failed_has_the_title_of_its_metric(tmp_path, result, write_run):
    page = build_report(write_run(tmp_path / "run", [result("a", error="gone"), result("b", error="gone")]))
    head = page.read_text().partition('class="metric"')[2].partition("</span>\n")[0]
    assert head.startswith('>Top-1 accuracy<span class="muted"> (%)</span> <code>k=20</code>')


def test_checkpoints_beyond_the_colours_have_other_shapes(tmp_path, result, write_run):
    page = build_report(write_run(tmp_path / "run", [result(f"e{i}") for i in range(10)])).read_text()
    who = page.partition('class="who"')[2].partition("</ul>")[0]
    swatches = re.findall(r'class="swatch (m\d)" style="--c:var\((--c\d)\)"', who)
    assert len(set(swatches)) == len(swatches) == 10


def test_a_task_tells_what_it_measures_without_letting_markup_in(tmp_path, result, write_run):
    summary = f"Finds neighbours.\n\n    deviation ``{EVIL}``"
    page = Page(build_report(write_run(tmp_path, [result(task_summary=summary)])).read_text())
    assert "Finds neighbours. What exactly is measured" in page.text
    assert f"deviation {EVIL}" in page.text
    assert not page.all("img")


def test_a_warning_about_a_checkpoint_stands_above_the_summary(result, write_run, tmp_path):
    hostile = "WARNING: <b>it has collapsed</b>"
    twice = result("naive", info={"notes": (hostile, "a note")}, notes=("WARNING: and more", hostile))
    write_run(tmp_path, [twice, result("fine")])
    page = build_report(tmp_path).read_text(encoding="utf-8")
    warning = page.index("<bdi>naive</bdi>: &lt;b&gt;it has collapsed")
    assert page.index("Before you read the numbers") < warning < page.index('id="summary"')


def test_a_diagnosis_has_a_section_but_no_column_and_no_verdict(tmp_path, result, write_run):
    results = [result(label) for label in ("a", "b")]
    results += [result(label, task="diagnose", scored=False) for label in ("a", "b")]
    page = build_report(write_run(tmp_path / "run", results)).read_text()
    assert page.count("The diagnose task") >= 1
    summary = page.partition('id="summary"')[2].partition("</section>")[0]
    assert "The knn task" in summary
    assert "The diagnose task" not in summary
    compared = page.partition('id="comparison"')[2].partition("</section>")[0]
    assert "knn" in compared
    assert "diagnose" not in compared
