"""The report: one JSON file and one HTML file that needs nothing beside it.

``write_report(directory, report)`` takes a plain dict (everything but ``title`` may be left out):

    title: str
    lead: str                        one paragraph under the title
    facts: {name: str | number}      model, data, seed, machine ...: one line of the head
    phases: [{"name": "sft", "label": "Joint training",
              "mutual": MutualResult.to_dict(),       tables, heat map, accuracy against tokens, examples
              "log_history": [...]}]                  trainer_state.json's: curves
    points: [{"label": "CoT", "tokens": 61.0, "accuracy": 0.81}]     more points of accuracy against tokens
    figures: [{"title": str, "image": data URI, "alt": str, "width": pixels, "note": str,
               "narrow": data URI}]              the picture for telephones
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
    html_path.write_text(render_html(report), encoding="utf-8", errors="backslashreplace")
    return json_path, html_path


def render_html(report: Mapping[str, Any]) -> str:
    """The HTML page of ``report`` (see the module's head)."""
    phases = list(report.get("phases", []))
    sections = [
        ("mutual", "Mutual retrieval", _mutual_section(phases)),
        ("cost", "Accuracy against decoded tokens", _cost_section(phases, report.get("points", []))),
        ("rewrites", "What the rewrites give", _rewrites_section(phases)),
        ("budget", "What decoding some queries gives", _budget_section(phases)),
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


def _rewrites_section(phases: list[Mapping[str, Any]]) -> str:
    """Scores of the same queries with their own rewrites, others', none, and their teacher's."""
    measured = {phase["label"]: phase["mutual"]["sensitivity"] for phase in _measured(phases, "sensitivity")}
    if not measured:
        return ""
    metric = next(iter(measured.values()))["metric"]
    kinds = dict.fromkeys(kind for one in measured.values() for kind in one["rewrites"])
    groups = {
        kind: {label: one["rewrites"][kind]["score"] for label, one in measured.items() if kind in one["rewrites"]}
        for kind in kinds
    }
    rows, remarks = [], []
    for label, one in measured.items():
        for kind, row in one["rewrites"].items():
            loss = "" if kind == "own" else f"{row['loss']:.3f} ± {row['error']:.3f}"
            rows.append([label, kind, f"{row['score']:.3f}", loss, f"{row['cosine']:.3f}"])
        remark = f"{label}: two queries with their own rewrites have a mean cosine of {one['unrelated']:.3f}"
        remark += f"; {one['unswapped']:,} had no other rewrite to swap with" if one["unswapped"] else ""
        remarks.append(remark + ("; swapping costs nothing: the rewrite is decoration" if one["decoration"] else ""))
    note = (
        "The same queries read with their own rewrite, another query's, none, and their teacher's where the data has "
        "one, against the index of disc embeddings. Loss: against the own rewrite, with its standard error; cosine: "
        f"with the embedding of the own rewrite. {'. '.join(remarks)}."
    )
    spoken = "; ".join(f"{kind}: " + ", ".join(f"{k} {v:.3f}" for k, v in own.items()) for kind, own in groups.items())
    table = {"columns": ["model", "rewrite", metric, "loss", "cosine"], "rows": rows, "note": note}
    return _extra_table(table) + _image(plots.group_bars(groups, metric), f"{metric} by rewrite: {spoken}", 560)


def _budget_section(phases: list[Mapping[str, Any]]) -> str:
    """Accuracy and tokens against the share of queries that decode."""
    curves = {phase["label"]: phase["mutual"]["budget"] for phase in _measured(phases, "budget")}
    if not curves:
        return ""
    rows = []
    for label, curve in curves.items():
        for name, k in (("disc alone", 0), ("ringed", curve["knee"]), ("all", len(curve["shares"]) - 1)):
            if k is not None:
                shown = [f"{curve['shares'][k]:.0%}", f"{curve['scores'][k]:.3f}", f"{curve['tokens'][k]:.1f}"]
                rows.append([label, name, *shown, f"{curve['thresholds'][k]:.4g}"])
    metric = next(iter(curves.values()))["metric"]
    columns = ["model", "point", "decoded", metric, "tokens / query", "threshold"]
    note = (
        "Queries whose first two places in the index of disc embeddings lie closest go to mode gen first. Ringed: the "
        "point furthest above what queries taken at random give (dotted), the threshold for mode auto on such data."
    )
    table = {"columns": columns, "rows": rows, "note": note}
    spoken = "; ".join(f"{label}: " + ", ".join(map("{:.3f}".format, one["scores"])) for label, one in curves.items())
    return _extra_table(table) + _plot(partial(plots.budget_panels, curves), f"{metric} by share: {spoken}", 900)


def _measured(phases: list[Mapping[str, Any]], figure: str) -> list[Mapping[str, Any]]:
    return [phase for phase in phases if (phase.get("mutual") or {}).get(figure)]


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
    wide = _image(figure["image"], figure["alt"], figure.get("width", 1000))
    return _note(figure) + (_picture(wide, figure["narrow"]) if "narrow" in figure else wide)


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
    return _picture(_image(draw(False), alt, width), draw(True))


def _picture(wide: str, narrow: str) -> str:
    return f'<picture><source media="(max-width: 700px)" srcset="{narrow}">{wide}</picture>'


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
