"""One HTML file that a data owner can read on a phone: the claim first, then the evidence."""

import copy
import html
import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dpjax.report.audit import ATTACK_COLUMNS, BOUND_COLUMNS, attack_rows, bound_rows
from dpjax.report.card import round_up
from dpjax.report.figures import Curve, epsilon_figure, loss_figure
from dpjax.report.files import validate_card, write_whole
from dpjax.report.inputs import VIEWS
from dpjax.report.style import STYLE


class TableData(NamedTuple):
    """A table of a report; numbers come formatted."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    covered: bool = False  # whether the privacy bound covers everything in it


class Sample(NamedTuple):
    """Text that a model generated."""

    model: str
    text: str
    prompt: str = ""
    covered: bool = False  # whether the privacy bound covers the model that wrote it


def write_report(
    card: dict[str, Any],
    curves: Sequence[Curve],
    path: str | os.PathLike,
    samples: Sequence[Sample] = (),
    tables: Sequence[TableData] = (),
    public: bool = False,
) -> None:
    """Writes `report_html` to one file, whole or not at all.

    Raises:
      DpjaxError: an invalid card, a malformed curve, or a folder that cannot be written.

    Example:
      >>> write_report({}, [], "report.html")
      Traceback (most recent call last):
      ...
      dpjax.errors.DpjaxError: the privacy card is invalid at its top level: 'accounting' is a \
required property; build it with dpjax.report.build_card
    """
    write_whole(path, report_html(card, curves, samples, tables, public))


def report_html(
    card: dict[str, Any],
    curves: Sequence[Curve] = (),
    samples: Sequence[Sample] = (),
    tables: Sequence[TableData] = (),
    public: bool = False,
) -> str:
    """A self-contained page: no network, no script, light and dark.

    Args:
      card: from `build_card` or `read_card`.
      curves: losses over iterations, without the points that are not finite; epsilon over
        iterations is in the card.
      samples: generated texts.
      tables: e.g. held-out losses of several models.
      public: leave out every curve, table, sample and utility number that the bound does not
        cover. Without it the page is for the data owner, and says so.

    Example:
      >>> report_html({"claim": {}})
      Traceback (most recent call last):
      ...
      dpjax.errors.DpjaxError: the privacy card is invalid at its top level: 'accounting' is a \
required property; build it with dpjax.report.build_card
    """
    validate_card(card)
    curves = [drawable for drawable in map(_finite, curves) if len(drawable.values)]
    if public:
        card = public_card(card)
        curves = [curve for curve in curves if curve.covered]
        samples = [sample for sample in samples if sample.covered]
        tables = [table for table in tables if table.covered]
    title = f"Privacy report: {card['training']['model_name']} on {card['data']['sources'][0]}"
    private = not public and bool(
        any(not item.covered for item in (*curves, *samples, *tables))
        or any(not entry["covered"] for entry in card["utility"])
    )
    parts = [
        _head(card, title),
        _owner_banner() if private else "",
        _claim(card),
        _hazards(card),
        _audit(card),
        _figures(card, curves),
        *(_table(table) for table in tables),
        _utility(card),
        _samples(samples),
        _conditions(card),
        _whole_card(card),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def public_card(card: dict[str, Any]) -> dict[str, Any]:
    """A copy without the utility numbers that the bound does not cover.

    Example:
      >>> public_card({"utility": [{"metric": "loss", "covered": False}], "hazards": []})
      {'utility': [], 'hazards': []}
    """
    published = copy.deepcopy(card)
    published["utility"] = [entry for entry in published["utility"] if entry["covered"]]
    published["hazards"] = [h for h in published["hazards"] if h["code"] != "utility_uncovered"]
    return published


def _finite(curve: Curve) -> Curve:
    """A diverged run has a report too: points that are not finite are left out."""
    values = np.asarray(curve.values, np.float64)
    if len(values) != len(curve.iterations):
        return curve  # refused, with its name, when it is drawn
    kept = np.isfinite(values)
    return curve._replace(iterations=np.asarray(curve.iterations)[kept], values=values[kept])


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _head(card: dict[str, Any], title: str) -> str:
    made = card["identity"]["created"].replace("T", " ").replace("+00:00", " UTC")
    return f"<header><p class='kicker'>{_text(made)}</p><h1>{_text(title)}</h1></header>"


def _owner_banner() -> str:
    return (
        "<aside class='banner'><strong>For the data owner only.</strong> Curves, tables, samples "
        "and utility numbers marked “not covered” were computed on private records without noise, "
        "or by a model trained without noise. The epsilon on this page does not cover them: do not "
        "publish this file.</aside>"
    )


def _claim(card: dict[str, Any]) -> str:
    claim, accounting = card["claim"], card["accounting"]
    promised = claim["epsilon"] is not None
    if promised:
        figure = f"ε = {round_up(claim['epsilon'])}"
        label = "Promise"
        if card["randomness"]["key_is_published"]:
            label = "Rehearsal, not a promise: the random key is published"
    else:
        figure, label = "No formal guarantee", "No promise"
    facts = [
        ("For whom", f"{claim['unit']}; per person: {claim['max_units_per_person_in_words']}"),
        ("Epsilon", claim["epsilon_in_words"]),
        ("Delta", f"{claim['delta']:g}, 1/n is {claim['one_over_n']:.2g}"),
        ("All runs", _total(claim["total"])),
        ("How", claim["mechanism"]),
        (
            "Iterations",
            f"{accounting['steps_executed']:,} of {accounting['steps_planned']:,} planned",
        ),
        ("Checked", card["audit"]["verdict"]),
    ]
    rows = "".join(f"<div><dt>{_text(k)}</dt><dd>{_text(v)}</dd></div>" for k, v in facts)
    return (
        f"<section class='claim {'kept' if promised else 'void'}'><p class='label'>{label}</p>"
        f"<p class='figure'>{_text(figure)}"
        + (f"<span> δ = {claim['delta']:g}</span>" if promised else "")
        + f"</p><p class='statement'>{_text(claim['statement'])}</p><dl>{rows}</dl></section>"
    )


def _total(total: dict[str, Any]) -> str:
    if total["epsilon"] is None:
        return str(total["words"])
    return f"epsilon {round_up(total['epsilon'])}: {total['words']}"


def _hazards(card: dict[str, Any]) -> str:
    if not card["hazards"]:
        return "<section><h2>Hazards</h2><p>None found by the code.</p></section>"
    items = "".join(
        f"<li class='{_text(h['severity'])}'><span class='tag'>{_text(h['severity'])}</span>"
        f"<span>{_text(h['text'])}</span></li>"
        for h in card["hazards"]
    )
    return f"<section><h2>Hazards</h2><ul class='hazards'>{items}</ul></section>"


def _audit(card: dict[str, Any]) -> str:
    audit = card["audit"]
    if not audit["performed"]:
        return ""
    seen = (
        f"{audit['num_canaries']:,} canaries ({audit['canary_kind']}), each in with probability "
        f"{audit['inclusion_probability']:g}; view {audit['threat_view']}: "
        f"{VIEWS[audit['threat_view']]}."
    )
    parts = [
        f"<section class='audit'><h2>Audit: {_text(audit['verdict'])}</h2>"
        f"<p>{_text(audit['words'])}</p><p>{_text(seen)}</p></section>",
        _small_table("Lower bounds on epsilon", BOUND_COLUMNS, bound_rows(audit)),
    ]
    if audit["attacks"]:
        parts.append(_small_table("Attacks", ATTACK_COLUMNS, attack_rows(audit)))
    return "".join(parts)


def _figures(card: dict[str, Any], curves: Sequence[Curve]) -> str:
    parts = []
    if curves:
        exposed = any(not curve.covered for curve in curves)
        parts.append(_figure("Loss", loss_figure(curves), exposed))
    spent = card["claim"]["epsilon_by_iteration"]
    if spent["iterations"]:
        lines = [Curve("RDP", spent["iterations"], spent["epsilon_rdp"])]
        if card["claim"]["epsilon_pld"] is not None:
            last = spent["iterations"][-1:]
            lines.append(Curve("PLD, at the end", last, [card["claim"]["epsilon_pld"]]))
        drawn = epsilon_figure(lines, card["training"]["target_epsilon"])
        parts.append(_figure("Privacy spent by this run", drawn, False))
    if not parts:
        return ""
    return f"<section><h2>Curves</h2><div class='figures'>{''.join(parts)}</div></section>"


def _figure(caption: str, drawn: str, exposed: bool) -> str:
    return f"<figure><figcaption>{_text(caption)}{_mark(not exposed)}</figcaption>{drawn}</figure>"


def _mark(covered: bool) -> str:
    return "" if covered else " <span class='exposed'>not covered</span>"


def _table(table: TableData) -> str:
    header = "".join(f"<th scope='col'>{_text(cell)}</th>" for cell in table.columns)
    body = "".join(
        "<tr>" + "".join(_cell(cell, i) for i, cell in enumerate(row)) + "</tr>"
        for row in table.rows
    )
    return (
        f"<section><h2>{_text(table.title)}{_mark(table.covered)}</h2><div class='scroll' "
        f"role='region' tabindex='0' aria-label='{_text(table.title)}'><table><thead><tr>{header}"
        f"</tr></thead><tbody>{body}</tbody></table></div></section>"
    )


def _cell(cell: str, index: int) -> str:
    text = _text(cell)
    return f"<th scope='row'>{text}</th>" if index == 0 else f"<td>{text}</td>"


def _utility(card: dict[str, Any]) -> str:
    if not card["utility"]:
        return ""
    rows = []
    for entry in card["utility"]:
        interval = "–"
        if entry["low"] is not None and entry["high"] is not None:
            interval = f"{entry['low']:.4g} to {entry['high']:.4g}"
        value = "not finite"
        if entry["value"] is not None:
            value = f"{entry['value']:.4g} {entry.get('unit', '')}".strip()
        name = " ".join(part for part in (entry.get("model", ""), entry["metric"]) if part)
        count = "–" if entry["n"] is None else f"{entry['n']:,}"
        rows.append((name, entry["split"], value, interval, count))
    covered = all(entry["covered"] for entry in card["utility"])
    header = ("Metric", "Split", "Value", "Interval", "n")
    return _table(TableData("Utility", header, rows, covered))


def _samples(samples: Sequence[Sample]) -> str:
    if not samples:
        return ""
    items = "".join(
        f"<article><h3>{_text(s.model)}{_mark(s.covered)}</h3>"
        f"<pre><b>{_text(s.prompt)}</b>{_text(s.text)}</pre></article>"
        for s in samples
    )
    return f"<section><h2>Generated text</h2>{items}</section>"


def _conditions(card: dict[str, Any]) -> str:
    claim, coverage = card["claim"], card["coverage"]
    lists = [
        ("Covered", coverage["data_accesses_covered"] or ["nothing"]),
        ("Not covered", coverage["not_covered"] or ["nothing known"]),
        ("Released", card["released"]["what"] or ["nothing"]),
        ("Trust", [card["setting"]["trust"], f"Cryptography: {card['setting']['cryptography']}."]),
        ("Randomness", [card["randomness"]["key_secrecy"]]),
    ]
    blocks = "".join(
        f"<div><h3>{_text(name)}</h3><ul>"
        + "".join(f"<li>{_text(item)}</li>" for item in items)
        + "</ul></div>"
        for name, items in lists
    )
    rows = [
        (
            f"{v['view']}: {v['meaning']}",
            "yes" if v["opened"] else "no",
            "yes" if v["covered"] else "no",
            v["words"],
        )
        for v in card["setting"]["threat_views"]
    ]
    tables = _small_table("Who could attack", ("What is seen", "Open", "Covered", "Why"), rows)
    if claim["groups"]:
        rows = [
            (f"{g['size']} together", _epsilon(g["epsilon"]), g["method"]) for g in claim["groups"]
        ]
        tables += _small_table("Several units together", ("Units", "Epsilon", "Method"), rows)
    if claim["privacy_profile"]:
        rows = [
            (f"{p['delta']:g}", _epsilon(p["epsilon_rdp"]), _epsilon(p["epsilon_pld"]))
            for p in claim["privacy_profile"]
        ]
        tables += _small_table("Privacy profile", ("Delta", "ε by RDP", "ε by PLD"), rows)
    return f"<section><h2>Conditions</h2><div class='grid'>{blocks}</div>{tables}</section>"


def _small_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    drawn = _table(TableData(title, columns, rows, covered=True))
    return drawn.replace("<h2>", "<h3>").replace("</h2>", "</h3>")


def _epsilon(value: float | None) -> str:
    return "no bound" if value is None else round_up(value)


def _whole_card(card: dict[str, Any]) -> str:
    shown = json.dumps(card, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    embedded = json.dumps(card, sort_keys=True, ensure_ascii=True, allow_nan=False)
    # "</script>" or "<!--" in a text must not end or change the script element.
    for character in "<>&":
        embedded = embedded.replace(character, f"\\u{ord(character):04x}")
    return (
        f"<details><summary>The whole privacy card</summary><pre>{_text(shown)}</pre></details>\n"
        f'<script type="application/json" id="privacy-card">{embedded}</script>'
    )
