"""The report: one JSON file and one HTML file that needs nothing beside it.

``write_report(directory, report)`` takes a plain dict (everything but ``title`` may be left out):

    title: str
    lead: str                        one paragraph under the title
    facts: {name: str | number}      model, data, seed, machine ...: one line of the head
    phases: [{"name": "sft", "label": "Joint training",
              "mutual": MutualResult.to_dict(),       tables, heat map, accuracy against tokens, examples
              "log_history": [...]}]                  trainer_state.json's: curves
    points: [{"label": "CoT", "tokens": 61.0, "accuracy": 0.81}]     more points of accuracy against tokens
    figures: [{"title": str, "image": data URI, "alt": str, "width": pixels, "note": str}]
    tables: [{"title": str, "columns": [str], "rows": [[...]], "note": str}]
    warnings: [str]                  shown at the top
    extra: {...}                     written to the JSON's top level as it is

``report.json`` holds the same without ``extra``'s wrapping; pictures (data URIs) stay in the HTML only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from functools import partial
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from rime_fast import __version__
from rime_fast.eval import curves, plots
from rime_fast.eval.report_examples import before_and_after_html, examples_html

KEYS = ("title", "lead", "facts", "phases", "points", "figures", "tables", "warnings", "extra")
COLUMNS = (
    ("hit@1", "hit@1", "{:.3f}"),
    ("mrr", "MRR", "{:.3f}"),
    ("ndcg@10", "nDCG@10", "{:.3f}"),
    ("query_tokens", "tokens / query", "{:.1f}"),
    ("target_tokens", "tokens / target", "{:.1f}"),
    ("query_seconds", "s / query", "{:.2g}"),
    ("target_seconds", "s / target", "{:.2g}"),
)


def write_report(directory: str | Path, report: Mapping[str, Any]) -> tuple[Path, Path]:
    """Write ``report.json`` and ``report.html`` into ``directory`` (made if absent); returns both paths.

    Raises ValueError for an unknown key or a missing title.
    """
    unknown = set(report) - set(KEYS)
    if unknown or not report.get("title"):
        raise ValueError(f"report has keys {sorted(report)}; expected 'title' and any of {', '.join(KEYS)}")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    json_path, html_path = directory / "report.json", directory / "report.html"
    plain = {key: value for key, value in report.items() if key != "extra"} | dict(report.get("extra", {}))
    json_path.write_text(json.dumps(_plain(plain), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    html_path.write_text(render_html(report), encoding="utf-8")
    return json_path, html_path


def render_html(report: Mapping[str, Any]) -> str:
    """The HTML page of ``report`` (see the module's head)."""
    phases = list(report.get("phases", []))
    sections = [
        ("mutual", "Mutual retrieval", _mutual_section(phases)),
        ("cost", "Accuracy against decoded tokens", _cost_section(phases, report.get("points", []))),
        ("training", "Training", _training_section(phases)),
        ("refine", "Refine-RL", _refine_section(phases)),
        *((f"figure-{i}", one["title"], _figure(one)) for i, one in enumerate(report.get("figures", []))),
        *((f"table-{i}", table["title"], _extra_table(table)) for i, table in enumerate(report.get("tables", []))),
        ("examples", "Examples", examples_html(phases)),
    ]
    sections = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{name}">{escape(title)}</a>' for name, title, _ in sections)
    body = [f'<div class="warning">{escape(text)}</div>' for text in [*report.get("warnings", []), *_counted(phases)]]
    body.append(_tiles(phases))
    body.append(before_and_after_html(phases))
    body += [f'<section id="{name}"><h2>{escape(title)}</h2>{html}</section>' for name, title, html in sections]
    lead = report.get("lead")
    template = Template(files("rime_fast.eval").joinpath("report.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(str(report["title"])),
        lead=f'<p class="lead">{escape(lead)}</p>' if lead else "",
        facts=_facts(report.get("facts", {})),
        navigation=f"<nav>{links}</nav>" if len(sections) > 1 else "",
        body="\n".join(body),
        version=escape(__version__),
        created=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _facts(facts: Mapping[str, Any]) -> str:
    if not facts:
        return ""
    pairs = (f"<div><dt>{escape(str(k))}</dt><dd>{escape(_number(v))}</dd></div>" for k, v in facts.items())
    return f'<dl class="facts">{"".join(pairs)}</dl>'


def _tiles(phases: list[Mapping[str, Any]]) -> str:
    """The headline: each cell and the rewrite's length, from the first measured phase to the last."""
    measured = [phase for phase in phases if phase.get("mutual")]
    if not measured:
        return ""
    first, last = measured[0]["mutual"], measured[-1]["mutual"]
    label = escape(" → ".join(dict.fromkeys(phase["label"] for phase in (measured[0], measured[-1]))))

    def change(before: float, now: float, form: str) -> str:
        shown = f"{now:{form}}"
        return shown if first is last else f"<small>{before:{form}} →</small> {shown}"

    tiles = [
        (change(first["cells"].get(name, cell)["hit@1"], cell["hit@1"], ".1%"), f"hit@1 {name}")
        for name, cell in last["cells"].items()
    ]
    if "gen" in last["cost"]:
        before = first["cost"]["gen"]["query_tokens"] if "gen" in first["cost"] else 0.0
        tiles.append((change(before, last["cost"]["gen"]["query_tokens"], ".1f"), "decoded tokens a query"))
    tiles.append((f"{last['n_queries']:,}", f"queries, {_pool(last)}"))
    shown = "".join(f'<div class="tile"><b>{a}</b><span>{escape(b)}</span></div>' for a, b in tiles)
    return f'<div class="tiles" aria-label="{label}">{shown}</div><p class="under">{label}</p>'


def _pool(mutual: Mapping[str, Any]) -> str:
    if mutual["mean_pool"] == mutual["n_candidates"]:
        return f"{mutual['n_candidates']:,} candidates each"
    return f"{mutual['mean_pool']:,.0f} candidates each on average"


def _mutual_section(phases: list[Mapping[str, Any]]) -> str:
    measured = {phase["label"]: phase["mutual"]["cells"] for phase in phases if phase.get("mutual")}
    if not measured:
        return ""
    spoken = f"hit@1 of every query mode and target mode: {_spoken(measured)}"
    image = _plot(partial(plots.mutual_heat_maps, measured), spoken, width=310 * len(measured) + 50)
    return (
        '<p class="note">hit@1 for each query mode (rows) against each target mode (columns). Where the modes '
        "share one space, an index of cheap disc embeddings serves gen queries.</p>"
        + image
        + "".join(_cells_table(label, cells) for label, cells in measured.items())
    )


def _spoken(measured: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    return "; ".join(
        f"{label}: " + ", ".join(f"{name} {cell['hit@1']:.3f}" for name, cell in cells.items())
        for label, cells in measured.items()
    )


def _cells_table(label: str, cells: Mapping[str, Mapping[str, float]]) -> str:
    columns = [column for column in COLUMNS if any(column[0] in cell for cell in cells.values())]
    best = {key: max(cell[key] for cell in cells.values()) for key, _, _ in columns[:3]}
    head = "".join(f"<th>{title}</th>" for _, title, _ in columns)
    rows = []
    for name, cell in cells.items():
        fields = "".join(
            f"<td{' class=top' if key in best and cell[key] == best[key] else ''}>{form.format(cell[key])}</td>"
            for key, _, form in columns
        )
        rows.append(f"<tr><td>{escape(name)}</td>{fields}</tr>")
    return (
        f'<div class="scroll"><table><caption>{escape(label)}</caption>'
        f"<thead><tr><th>query-target</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cost_section(phases: list[Mapping[str, Any]], more: list[Mapping[str, Any]]) -> str:
    points = []
    for phase in phases:
        for name, cell in (phase.get("mutual") or {"cells": {}})["cells"].items():
            tokens = cell["query_tokens"] + cell["target_tokens"]
            points.append({"group": phase["label"], "cell": name, "tokens": tokens, "accuracy": cell["hit@1"]})
    points += [{"group": p["label"], "tokens": p["tokens"], "accuracy": p["accuracy"]} for p in more]
    if len(points) < 2:
        return ""
    spoken = "; ".join(f"{p['group']} {p.get('cell', '')} {p['tokens']:.1f} tokens {p['accuracy']:.3f}" for p in points)
    return _plot(partial(plots.accuracy_against_tokens, points), spoken, width=800)


def _training_section(phases: list[Mapping[str, Any]]) -> str:
    parts = []
    for phase in phases:
        panels = curves.training_panels(phase.get("log_history") or [])
        if panels:
            names = ", ".join(panel.title for panel in panels)
            parts.append(
                f"<h3>{escape(phase['label'])}</h3>" + _plot(partial(plots.line_panels, panels), names, _width(panels))
            )
    return "".join(parts)


def _refine_section(phases: list[Mapping[str, Any]]) -> str:
    parts = []
    for phase in phases:
        panels = curves.refine_panels(phase.get("log_history") or [])
        if panels:
            names = ", ".join(panel.title for panel in panels)
            parts.append(_plot(partial(plots.line_panels, panels), names, _width(panels)))
    return "".join(parts)


def _figure(figure: Mapping[str, Any]) -> str:
    return _note(figure) + _image(figure["image"], figure["alt"], figure.get("width", 1000))


def _note(part: Mapping[str, Any]) -> str:
    return f'<p class="note">{escape(part["note"])}</p>' if part.get("note") else ""


def _extra_table(table: Mapping[str, Any]) -> str:
    head = "".join(f"<th>{escape(str(column))}</th>" for column in table["columns"])
    rows = "".join("<tr>" + "".join(f"<td>{escape(_number(v))}</td>" for v in row) + "</tr>" for row in table["rows"])
    return f'{_note(table)}<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _counted(phases: list[Mapping[str, Any]]) -> list[str]:
    """One line a phase that had generations without <gen_emb> or with a broken form."""
    lines = []
    for phase in phases:
        mutual = phase.get("mutual") or {}
        missing, broken = sum(mutual.get("missing_gen", {}).values()), sum(mutual.get("format_errors", {}).values())
        total = mutual.get("n_queries", 0) + mutual.get("n_candidates", 0)
        parts = [f"{missing:,} never reached <gen_emb> (their last state stood in)"] if missing else []
        parts += [f"{broken:,} do not have the template's form"] if broken else []
        if parts:
            lines.append(f"{phase['label']}: of {total:,} generations {' and '.join(parts)}.")
    return lines


def _plot(draw: Callable[[bool], str], alt: str, width: int = 1000) -> str:
    """``draw(narrow)`` gives the picture's data URI; telephones get the narrow one."""
    wide = _image(draw(False), alt, width)
    return f'<picture><source media="(max-width: 700px)" srcset="{draw(True)}">{wide}</picture>'


def _image(data_uri: str, alt: str, width: int) -> str:
    return f'<img class="plot" style="width:{width}px" alt="{escape(alt)}" src="{data_uri}">'


def _width(panels: list[plots.Panel]) -> int:
    return 1000 if len(panels) > 1 else 560


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _plain(value: Any) -> Any:
    """JSON's own types; NaN and infinity become null, pictures a remark."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str) and value.startswith("data:image/"):
        return "(in report.html)"
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if hasattr(value, "item"):
        return _plain(value.item())
    raise TypeError(f"report holds a {type(value).__name__}; expected numbers, strings, lists and dicts")
