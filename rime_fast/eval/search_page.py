"""A page of search results: each query, what was found, with pictures; one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

LONGEST_TEXT = 300
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body {{ margin: 0 auto; max-width: 1080px; padding: 24px 16px 48px; background: #f5f7fa; color: #1f2733;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }}
h1 {{ font-size: 24px; margin: 0 0 4px; }} .facts, .soft {{ color: #5b6776; font-size: 13px; overflow-wrap: anywhere; }}
article {{ background: #fff; border: 1px solid #e1e6ec; border-radius: 10px; padding: 14px 16px; margin-top: 16px; }}
.query {{ display: flex; gap: 12px; align-items: center; font-weight: 600; overflow-wrap: anywhere; }}
.query img {{ max-height: 96px; max-width: 45%; border-radius: 4px; }}
.rewrite {{ margin: 8px 0 0; padding: 4px 10px; border-left: 3px solid #0072b2; background: #f5f7fa;
  font: 13px ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }}
ol {{ list-style: none; margin: 12px 0 0; padding: 0; display: grid; gap: 10px;
  grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); }}
li {{ border: 1px solid #e1e6ec; border-radius: 8px; padding: 8px; font-size: 13px; overflow-wrap: anywhere; }}
li img {{ display: block; width: 100%; height: 120px; object-fit: contain; background: #f5f7fa; border-radius: 4px; }}
</style></head><body><h1>{title}</h1><div class="facts">{facts}</div>
{body}
</body></html>
"""


def write_search_page(
    path: str | Path, results: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], title: str = "Search"
) -> Path:
    """Write the page; returns its path.

    results: per query {"text", "images": data URIs, "rewrite": str or None, "margin": float, "retrieved": [{"row",
    "text", "images": data URIs, "score"}, ...]}. facts: name -> value, shown in the head.
    """
    shown = " · ".join(f"{escape(str(name))}: {escape(str(value))}" for name, value in facts.items())
    body = "\n".join(_query(result) for result in results)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    page = _PAGE.format(title=escape(title), facts=shown, body=body)
    path.write_text(page, encoding="utf-8", errors="backslashreplace")  # half a surrogate is no UTF-8
    return path


def _query(result: Mapping[str, Any]) -> str:
    pictures = "".join(f'<img alt="query" src="{uri}">' for uri in result["images"])
    rewrite = "" if result["rewrite"] is None else f'<div class="rewrite">{_short(result["rewrite"])}</div>'
    found = "".join(_found(place, one) for place, one in enumerate(result["retrieved"], 1))
    return (
        f'<article><div class="query">{pictures}<div>{_short(result["text"])}</div></div>{rewrite}'
        f'<div class="soft">margin of the first place: {result["margin"]:.3f}</div><ol>{found}</ol></article>'
    )


def _found(place: int, one: Mapping[str, Any]) -> str:
    picture = "".join(f'<img alt="" src="{uri}">' for uri in one["images"][:1])
    under = f"{place}. {one['score']:.3f}, row {one['row']}"
    return f'<li>{picture}<div>{_short(one["text"])}</div><div class="soft">{under}</div></li>'


def _short(text: str) -> str:
    return escape(text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} ...")
