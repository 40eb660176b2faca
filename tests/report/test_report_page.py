"""The page is one safe, self-contained file that says the important things first."""

import copy
import html.parser
import json
import re
import xml.etree.ElementTree

import matplotlib
import numpy as np
import pytest

from dpjax.auditing.rates import rate_result
from dpjax.auditing.results import EpsilonBound
from dpjax.errors import DpjaxError
from dpjax.report import (
    Curve,
    Sample,
    TableData,
    audit_section,
    epsilon_figure,
    loss_figure,
    report_html,
    write_report,
)

EVIL = "</script><script>alert('x')</script><!-- & \" 一条 $x_1$"
CURVES = [
    Curve("private", np.arange(100), 4.0 - 0.01 * np.arange(100)),
    Curve("private", [0, 50, 99], [4.0, 3.6, 3.2], "held out"),
    Curve("not private", [0, 99], [4.0, 2.5], "held out"),
]
TABLES = [TableData("Held-out loss", ("Model", "Loss"), [("start", "4.00"), ("private", "3.20")])]
SAMPLES = [Sample("private", "hello there", covered=True), Sample("not private", "card 4929")]
BOUNDS = [
    EpsilonBound("one_run", 1.234, 5.78, 1e-5, 0.95, "fixed before", 1000, 100, 80),
    EpsilonBound("gaussian_dp", 3.0, 29.2, 1e-5, 0.95, "paid", 1000, assumption="all is Gaussian"),
]
VOID = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}


class Reader(html.parser.HTMLParser):
    """Checks that tags nest, and collects what matters."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.links = [], [], [], []
        self.texts, self.scripts = [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attributes = dict(attrs)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [
            value
            for name, value in attrs
            if name in ("href", "src", "xlink:href") and not value.startswith("#")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.scripts if "script" in self.open else self.texts).append(data)


def test_page_is_self_contained_and_well_formed(private_card):
    text = report_html(private_card, CURVES, SAMPLES, TABLES)
    page = Reader(text)
    assert page.links == []
    assert "@import" not in text and "url(http" not in text
    assert len(page.ids) == len(set(page.ids))
    assert page.tags.count("script") == 1 and page.tags.count("svg") == 2
    assert json.loads(page.scripts[0]) == private_card
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text


def test_claim_comes_before_everything_else(private_card):
    text = report_html(private_card, CURVES, SAMPLES, TABLES)
    order = [
        text.index(private_card["claim"]["statement"]),
        text.index("Hazards</h2>"),
        text.index("<svg"),
        text.index("Held-out loss"),
        text.index("hello there"),
        text.index("<details>"),
    ]
    assert order == sorted(order)


def test_everything_is_escaped(private_card):
    card = copy.deepcopy(private_card)
    card["claim"]["unit"] = card["data"]["sources"][0] = EVIL
    card["hazards"] = [{"code": "x", "severity": "note", "text": EVIL}]
    card["utility"] = [
        {
            "metric": EVIL,
            "split": EVIL,
            "value": 1.0,
            "low": None,
            "high": None,
            "n": None,
            "covered": True,
        }
    ]
    curves = [Curve(EVIL, [0, 1], [1.0, 2.0])]
    tables = [TableData(EVIL, (EVIL, "b"), [(EVIL, EVIL)])]
    text = report_html(card, curves, [Sample(EVIL, EVIL, EVIL)], tables)
    page = Reader(text)
    assert page.tags.count("script") == 1 and "alert" not in "".join(page.scripts[1:])
    assert "<script>" not in text and "<!--" not in text
    assert json.loads(page.scripts[0]) == card
    assert EVIL in "".join(page.texts)


def test_owner_banner_and_public_page(private_card):
    card = copy.deepcopy(private_card)
    number = {"split": "test", "value": 3.25, "low": 3.0, "high": 3.5, "n": 9}
    card["utility"] = [{**number, "metric": "secret loss", "covered": False}]
    card["hazards"] = [{"code": "utility_uncovered", "severity": "note", "text": "one number"}]
    owner = report_html(card, CURVES, SAMPLES, TABLES)
    assert "For the data owner only" in owner and "does not cover them" in owner
    public = report_html(card, CURVES, SAMPLES, TABLES, public=True)
    assert "For the data owner only" not in public
    for private in ("secret loss", "card 4929", "3.20", "Loss against", "one number"):
        assert private in owner and private not in public
    for kept in ("hello there", "Epsilon against", card["claim"]["statement"]):
        assert kept in owner and kept in public
    assert card["utility"] and card["hazards"], "the card itself is left as it was"


def test_nothing_private_needs_no_banner(private_card):
    assert "For the data owner only" not in report_html(private_card)


def test_a_void_card_says_so_in_words(void_card):
    text = report_html(void_card, CURVES[:1])
    assert "No formal guarantee" in text and "ε =" not in text
    assert "Epsilon against" not in text


def test_a_published_key_is_no_promise(private_card):
    card = copy.deepcopy(private_card)
    card["randomness"]["key_is_published"] = True
    assert "Rehearsal, not a promise" in report_html(card)


def test_a_diverged_or_empty_run_has_a_page_too(private_card):
    card = copy.deepcopy(private_card)
    number = {"metric": "loss", "split": "test", "value": None, "low": None, "high": None}
    card["utility"] = [{**number, "n": None, "covered": False}]
    curves = [Curve("a", [0, 1, 2], [4.0, 3.0, float("nan")]), Curve("b", [], [])]
    text = report_html(card, curves)
    assert "a, training, ends at 3.00" in text and "b, training" not in text
    assert "not finite" in text
    with pytest.raises(DpjaxError, match="2 iterations and 1 values"):
        report_html(card, [Curve("c", [0, 1], [1.0])])


def test_writing(private_card, tmp_path):
    path = tmp_path / "deep" / "report.html"
    write_report(private_card, CURVES, path, SAMPLES, TABLES)
    assert path.read_text(encoding="utf-8") == report_html(private_card, CURVES, SAMPLES, TABLES)
    with pytest.raises(DpjaxError, match="cannot be written"):
        write_report(private_card, (), path / "report.html")
    with pytest.raises(DpjaxError, match="invalid"):
        write_report({}, (), path)


def test_figures_are_xml_with_alternative_text():
    loss = loss_figure(CURVES)
    spent = epsilon_figure([Curve("RDP", [0, 99], [0.0, 1.5])], target_epsilon=2.0)
    for svg, axis in ((loss, "Loss (nats per token)"), (spent, "Epsilon spent (nats)")):
        root = xml.etree.ElementTree.fromstring(svg)
        assert root.get("role") == "img" and root.get("aria-label")
        space = {"s": "http://www.w3.org/2000/svg"}
        assert root.find("s:title", space).text and root.find("s:desc", space).text
        texts = ["".join(node.itertext()).strip() for node in root.iterfind(".//s:text", space)]
        assert axis in texts and "Iterations" in texts
        assert root.get("viewBox") and not root.get("width")
        assert not re.search(r"#(000000|010203|ffffff)", svg), "colours follow the page"
        assert "currentColor" in svg
    assert "not private, held out, ends at 2.50" in loss
    assert "budget 2" in spent


def test_figures_repeat_and_leave_no_global_state():
    before = dict(matplotlib.rcParams)
    assert loss_figure(CURVES) == loss_figure(CURVES)
    assert dict(matplotlib.rcParams) == before


def test_running_mean_of_a_line_is_the_line():
    from dpjax.report.figures import _running_mean

    iterations, means = _running_mean(np.arange(100), np.arange(100.0))
    assert len(iterations) == len(means) == 96 and iterations[-1] == 99
    np.testing.assert_allclose(means, iterations - 2.0)


@pytest.mark.parametrize(
    ("curves", "fragment"),
    [
        ([], "no curve"),
        ([Curve("a", [0, 1], [1.0])], "2 iterations and 1 values"),
        ([Curve("a", [], [])], "at least one"),
        ([Curve("a", [0], [float("nan")])], "not finite"),
    ],
)
def test_bad_curves_get_one_line(curves, fragment):
    for draw in (loss_figure, epsilon_figure):
        with pytest.raises(DpjaxError, match=fragment):
            draw(curves)


def test_audit_stands_with_intervals_ceilings_and_assumptions(private_card):
    attack = rate_result("greedy", [True] * 9 + [False], [True] + [False] * 9,
                         assumptions=("the prompt is known <b>",))  # fmt: skip
    card = copy.deepcopy(private_card)
    claimed = card["claim"]["epsilon"]
    card["audit"] = audit_section(
        BOUNDS, [attack], claimed_epsilon=claimed, threat_view="W", canary_kind="random tokens",
        num_canaries=1000, inclusion_probability=0.5, seeds=(3,),
    )  # fmt: skip
    page = report_html(card)
    assert "<h2>Audit: FALSIFIED</h2>" in page  # 1.234 against a claim below it
    assert claimed < 1.23 and "at least 1.23" in page and "at most 5.78" in page
    for cell in ("29.20", "all is Gaussian", "80 of 100", "the prompt is known &lt;b&gt;"):
        assert cell in page, cell
    low, high = attack.metrics["extra_rate"].low, attack.metrics["extra_rate"].high
    assert f"{low:.3g} to {high:.3g}" in page and "extra rate" in page and "rate on twins" in page
    assert "the final weights are public" in page


def test_every_threat_view_is_on_the_page(private_card, void_card):
    for card in (private_card, void_card):
        page = report_html(card)
        assert "Who could attack" in page
        for view in card["setting"]["threat_views"]:
            row = f"{view['view']}: {view['meaning']}</th><td>{'yes' if view['opened'] else 'no'}"
            assert f"{row}</td><td>{'yes' if view['covered'] else 'no'}</td>" in page
    assert "no formal guarantee</td>" in page
