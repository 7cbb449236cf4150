"""A report can be read by everybody: whole sentences, an n for every number, a caption for every
table, grey that is dark enough, and figures drawn for their width and described in words."""

import base64
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from helpers.run_folders import write_all
from ringfence.report.page import write_page
from ringfence.report.read import read_rows

AA = 4.5  # contrast of text on its background, WCAG 2
NAME = "kl_on_retain_rows-and-a-very-long-name-of-a-sweep-2026-11-30-lr1e-4_rank32"


class Tables(HTMLParser):
    """Captions, with the header cells and rows under each; texts of images; text without style."""

    def __init__(self, html):
        super().__init__()
        self.captions, self.headers, self.images, self.text = [], [], [], []
        self._inside = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        if tag in ("img", "meta", "source", "br", "link"):
            self.images += [dict(attributes)] if tag == "img" else []
            return
        self._inside.append(tag)
        if tag == "table":
            self.captions.append("")
        if tag == "th":
            self.headers.append(dict(attributes).get("scope"))

    def handle_endtag(self, tag):
        if tag not in ("strong", "b", "code", "small", "em"):
            self.text.append("\n")
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data):
        if "caption" in self._inside:
            self.captions[-1] += data
        if not {"style", "title", "pre"} & set(self._inside):
            self.text.append(data)


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    control, plain, guarded = write_all(tmp_path_factory.mktemp("runs"))
    long = guarded.rename(guarded.with_name(NAME))
    page = control.parent / "report.html"
    write_page(*read_rows([control, plain, long], control), page)
    return page.read_text("utf-8")


@pytest.fixture(scope="module")
def tables(html):
    return Tables(html)


def test_no_two_sentences_run_together(tables):
    for text in tables.text:
        assert not re.search(r"[a-z)][.,;:][A-Z][a-z]", text), text
    for before, after in pairwise(tables.text):  # over the borders of tags
        assert not (re.search(r"[.,;:]$", before) and re.match(r"[A-Za-z]", after)), (
            before[-40:],
            after[:40],
        )


def test_every_interval_has_its_n(html):
    start = html.index("The criteria, run by run")
    cells = re.findall(r"<td.*?</td>", html[start : html.index("</table>", start)], re.DOTALL)
    with_interval = [cell for cell in cells if re.search(r"\[[^]]*, [^]]*\]", cell)]
    assert len(with_interval) >= 12
    for cell in with_interval:
        assert "n = " in cell, cell


def test_model_rows_and_seeds_stand_above_all_numbers(html):
    assert (
        html.index("What was run")
        < html.index("Ship or hold")
        < html.index("The criteria, side by side")
    )
    top = html[html.index("What was run</caption>") : html.index("Ship or hold")]
    for title in ("model", "training rows", "seeds", "precision"):
        assert f'<th scope="col">{title}</th>' in top


def test_tables_have_captions_and_scopes(tables):
    assert len(tables.captions) >= 4
    assert all(caption.strip() for caption in tables.captions)
    assert tables.headers
    assert set(tables.headers) <= {"col", "row", "colgroup", "rowgroup"}


def luminance(colour):
    digits = colour if len(colour) == 6 else "".join(2 * digit for digit in colour[:3])
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    red, green, blue = [
        part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one, other):
    light, dark = sorted([luminance(one), luminance(other)], reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_text_is_dark_enough_on_every_background(html):
    assert contrast("000000", "ffffff") == pytest.approx(21)
    style = html[html.index("<style>") : html.index("</style>")]
    texts = set(re.findall(r"[{;\s]color: #([0-9a-f]{3,6})\b", style))
    grounds = set(re.findall(r"background: #([0-9a-f]{3,6})\b", style))
    assert {"57606a", "1d2229"} <= texts
    assert {"fdecea", "e9f5ec", "fff"} <= grounds
    for text in texts:
        for ground in grounds:
            assert contrast(text, ground) >= AA, (text, ground)


def test_figures_are_described_and_named_as_their_axes(html, tables):
    figures = [image for image in tables.images if image["src"].startswith("data:image/svg")]
    assert len(figures) == 3
    assert all(len(image["alt"]) > 40 for image in figures)
    pareto, domains, _ = (
        base64.b64decode(image["src"].split(",", 1)[1]).decode() for image in figures
    )
    for figure, image in zip((pareto, domains), figures):
        axis = "effect (shift minus sound" in " ".join(re.findall(r"<!-- (.*?) -->", figure))
        assert axis == ("effect" in image["alt"]), image["alt"]


def test_narrow_windows_have_figures_of_their_own(html):
    """Letters of a figure drawn for 1,100 pixels would be 6 pixels high in a window of 400."""
    narrow = re.findall(r'<source media="\(max-width: 800px\)" srcset="([^"]+)"', html)
    assert len(narrow) == 3
    for source in narrow:
        figure = base64.b64decode(source.split(",", 1)[1]).decode()
        assert float(re.search(r'<svg[^>]* width="([\d.]+)pt"', figure)[1]) * 4 / 3 < 450


def test_names_break_where_people_would_break_them(html):
    """A name of 75 letters widens no table: it may break behind its hyphens and underscores."""
    cells = re.findall(r"<t[hd].*?</t[hd]>", html, re.DOTALL)
    assert not any(NAME in cell for cell in cells)
    assert re.search(r"kl_(<wbr>|\u200b)on_(<wbr>|\u200b)retain", html)
