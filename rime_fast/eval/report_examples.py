"""The report's page of examples: what was asked, what it was rewritten to, the first candidates found."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

LONGEST_TEXT = 600
BEFORE_AFTER = 4  # queries whose rewrites before and after stand on the first screen


def examples_html(phases: list[Mapping[str, Any]]) -> str:
    """Write the cards of the last phase that kept examples."""
    for phase in reversed(phases):
        examples = (phase.get("mutual") or {}).get("examples") or []
        if examples:
            hits = sum(example["ranks"][example["cell"]] == 1 for example in examples)
            note = (
                f"{len(examples)} queries evenly spaced over the set, not chosen by outcome: {phase['label']}, "
                f"{examples[0]['cell']}, {hits} with the right candidate first. The right one is marked green."
            )
            cards = "".join(_card(i, example) for i, example in enumerate(examples, 1))
            return f'<p class="note">{escape(note)}</p><div class="cards">{cards}</div>'
    return ""


def before_and_after_html(phases: list[Mapping[str, Any]]) -> str:
    """Show what the first and the last measured phase rewrote the same queries to; empty where only
    one was measured."""
    kept = [phase for phase in phases if (phase.get("mutual") or {}).get("examples")]
    if len(kept) < 2:
        return ""
    first, last = kept[0], kept[-1]
    rows: list[str] = []
    for a, b in zip(first["mutual"]["examples"], last["mutual"]["examples"], strict=False):
        same = (a["query"]["text"], a["query"]["images"]) == (b["query"]["text"], b["query"]["images"])
        if same and len(rows) < BEFORE_AFTER and a["query"].get("rewrite") is not None:
            cells = "".join(map(_written, (a, b)))
            query = f"{_pictures(a['query']['images'])} {_short(a['query']['text'])}"
            rows.append(f"<tr><td>{query}</td>{cells}</tr>")
    if not rows:
        return ""
    heads = "".join(f"<th>{escape(phase['label'])}</th>" for phase in (first, last))
    return (
        f'<div class="scroll"><table class="changes"><caption>The same queries, rewritten before and after</caption>'
        f"<thead><tr><th>query</th>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _written(example: Mapping[str, Any]) -> str:
    rank = example["ranks"][example["cell"]]
    return f"<td>{_short(example['query']['rewrite']) or '(empty)'} <small>rank {rank}</small></td>"


def _card(number: int, example: Mapping[str, Any]) -> str:
    query = example["query"]
    chips = "".join(
        f'<span class="chip {"good" if rank == 1 else "bad"}">{escape(name)}: rank {rank}</span>'
        for name, rank in example["ranks"].items()
    )
    rewrite = query.get("rewrite")
    block = (
        "" if rewrite is None else f'<div class="rewrite"><small>rewrite</small>{_short(rewrite) or "(empty)"}</div>'
    )
    found = "".join(_retrieved(candidate) for candidate in example["retrieved"])
    missed = ""
    if not any(candidate["correct"] for candidate in example["retrieved"]):
        right = ", ".join(_short(answer["text"]) or f"candidate {answer['row']}" for answer in example["answers"])
        missed = f'<div class="label" style="margin-top:6px">right: {right}</div>'
    return (
        f'<article class="card"><h3>#{number} {chips}</h3><div class="query">{_pictures(query["images"])}'
        f"<div>{_short(query['text'])}</div></div>{block}"
        f'<span class="label">first {len(example["retrieved"])} retrieved ({escape(example["cell"])})</span>'
        f'<ol class="retrieved">{found}</ol>{missed}</article>'
    )


def _retrieved(candidate: Mapping[str, Any]) -> str:
    mark, spoken = (' class="correct"', " (right)") if candidate["correct"] else ("", "")
    picture = "".join(f'<img alt="" src="{uri}">' for uri in candidate["images"][:1])
    text = _short(candidate["text"]) or ("" if picture else f"candidate {candidate['row']}")
    return (
        f'<li{mark}>{picture}<span class="what">{text}{spoken}</span>'
        f'<span class="score">{candidate["score"]:.3f}</span></li>'
    )


def _pictures(images: list[str]) -> str:
    if not images:
        return ""
    shown = "".join(f'<img alt="query image" class="small" src="{uri}">' for uri in images)
    return f'<div class="pictures">{shown}</div>'


def _short(text: str) -> str:
    return escape(text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} ...")
