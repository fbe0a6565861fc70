"""The report on rewrites: lengths, rejects by reason, and the leak check."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rime_fast.data.cache import replacing
from rime_fast.data.sources import write_rows
from rime_fast.prepare.content import plain, report_path
from rime_fast.prepare.ledger import Ledger
from rime_fast.prepare.rewrite_work import Work

_WORD = re.compile(r"\w+")


def write_report(work: Work, ledger: Ledger, output: Path) -> dict[str, Any]:
    """Write ``OUTPUT.rejects.jsonl`` and ``OUTPUT.report.json``; nothing in them depends on interruptions."""
    rejects: list[dict[str, Any]] = []
    lengths: dict[str, list[tuple[int, int]]] = {name: [] for name in work.options.sides}
    reasons, first = Counter[str](), Counter[str]()
    twins = {twin for _, twin in work.twins}
    asked = retried = 0
    for number, key in enumerate(work.keys):
        index, slot, with_truth = work.places[number]
        if key in twins and not with_truth:
            continue  # of the leak check
        entry, asked = ledger[key], asked + 1
        last = entry["tries"][-1]
        retried += len(entry["tries"]) > 1
        first.update([_kind(entry["tries"][0]["reason"])] if entry["tries"][0]["reason"] else [])
        name = _name(work, index, slot)
        if entry["rewrite"]:
            lengths[name].append((len(entry["rewrite"].split()), last["tokens"]))
            continue
        reasons[_kind(last["reason"])] += 1
        place = {"file": work.reading.rows.name, "row": work.reading.rows.number(index), "side": name}
        texts = [{"text": one["text"], "reason": one["reason"]} for one in entry["tries"]]
        rejects.append({**place, "reason": last["reason"], "tries": texts})
    rejects.sort(key=lambda one: (one["row"], one["side"] != "query"))
    write_rows(output.with_name(f"{output.name}.rejects.jsonl"), rejects)
    report = {
        "job": work.job,
        "teacher": work.teacher,
        "rows": len(work.reading.rows) - len(work.bad),
        "bad_rows": len(work.bad),
        "sides": len(work.slots),
        "sides_with_a_rewrite_before": work.kept,
        "unique_sides": asked,
        "accepted": asked - len(rejects),
        "accepted_at_the_second_try": retried - sum(len(one["tries"]) > 1 for one in rejects),
        "rejected": dict(reasons.most_common()),
        "rejected_at_the_first_try": dict(first.most_common()),
        "lengths": {name: _lengths(found) for name, found in lengths.items()},
        "leak": _leak(work, ledger),
    }
    with replacing(report_path(output)) as stream:
        stream.write(json.dumps(report, indent=1, ensure_ascii=True) + "\n")
    return report


def _kind(reason: str) -> str:
    """What a server says about a request is no kind of its own."""
    return reason.partition(":")[0]


def _name(work: Work, index: int, slot: int) -> str:
    pair, _ = work.reading.pair(index)
    return work.sides(pair)[slot][0]


def _lengths(found: list[tuple[int, int]]) -> dict[str, Any]:
    shown: dict[str, Any] = {"rewrites": len(found)}
    for name, values in zip(("words", "tokens"), zip(*found, strict=True), strict=False):
        row = np.array(values)
        quantiles = {f"p{q}": int(np.percentile(row, q, method="lower")) for q in (1, 50, 90, 99)}
        shown[name] = {"mean": round(float(row.mean()), 2), **quantiles, "max": int(row.max())}
    return shown


# --- the leak check --------------------------------------------------------------------------------------------------


def _leak(work: Work, ledger: Ledger) -> dict[str, Any] | None:
    """How much better a query's rewrite is for having seen the truth: what training will see, and inference will not.

    Over the queries that were asked both ways and accepted both times: the share whose rewrite holds the answer's text,
    and hit@1 of the rewrites among these queries' answers, by the words they share (cosine of tf-idf).
    """
    if not work.twins:
        return None
    number = {key: i for i, key in enumerate(work.keys)}
    both: list[list[str]] = [[], []]
    answers, accepted = [], [0, 0]
    for keys in work.twins:
        rewrites = [ledger[key]["rewrite"] for key in keys]
        accepted = [count + bool(rewrite) for count, rewrite in zip(accepted, rewrites, strict=True)]
        pair, _ = work.reading.pair(work.places[number[keys[0]]][0])
        text = pair.target.text or pair.target.rewrite or ""
        if all(rewrites) and text.strip():
            answers.append(plain(text))
            for found, rewrite in zip(both, rewrites, strict=True):
                found.append(plain(rewrite))
    named = ("with_truth", "without_truth")
    shares: dict[str, Any] = {
        "queries": len(work.twins),
        "accepted": dict(zip(named, accepted, strict=True)),
        "compared": len(answers),
    }
    if answers:
        for name, rewrites in zip(named, both, strict=True):
            holds = [f" {answer} " in f" {rewrite} " for answer, rewrite in zip(answers, rewrites, strict=True)]
            shares[name] = {
                "holds_the_answer": round(sum(holds) / len(answers), 4),
                "hit@1": round(_hits(rewrites, answers), 4),
                "words": round(sum(len(one.split()) for one in rewrites) / len(answers), 2),
            }
        shares["hit@1_gained"] = round(shares[named[0]]["hit@1"] - shares[named[1]]["hit@1"], 4)
    return shares


def _hits(rewrites: Sequence[str], answers: Sequence[str]) -> float:
    """Share of the rewrites whose own answer is strictly the nearest of all different answers."""
    candidates = sorted(set(answers))
    bags = [Counter(_WORD.findall(text)) for text in candidates]
    seen = Counter(word for bag in bags for word in bag)
    weight = {word: math.log((1 + len(bags)) / count) for word, count in seen.items()}
    by_word: dict[str, list[tuple[int, float]]] = {}
    for i, bag in enumerate(bags):
        norm = math.sqrt(sum((count * weight[word]) ** 2 for word, count in bag.items())) or 1.0
        for word, count in bag.items():
            by_word.setdefault(word, []).append((i, count * weight[word] / norm))
    place = {text: i for i, text in enumerate(candidates)}
    hits = 0
    for rewrite, answer in zip(rewrites, answers, strict=True):
        scores = np.zeros(len(candidates))
        for word, count in Counter(_WORD.findall(rewrite)).items():
            for i, value in by_word.get(word, ()):
                scores[i] += count * weight[word] * value
        own = scores[place[answer]]
        hits += bool(own > 0 and (np.delete(scores, place[answer]) < own).all())
    return hits / len(answers)
