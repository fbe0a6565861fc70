"""Benchmark suites as published: MMEB-V2, MMEB-V1, MRMR, UVRB, and any folder in BEIR's form.

    suite = load_suite("mmeb-v2", root, protocol="ume-r1")
    data = suite.tasks["MSR-VTT"].load()
    result = evaluate_suite(embedder, suite, modes=("disc", "gen"), output_dir="runs/mmeb-v2")

Layouts, protocols and what each suite needs on disk: docs/eval.md.
"""

from __future__ import annotations

from pathlib import Path

from rime_fast.eval.suites.beir import load_beir, load_uvrb
from rime_fast.eval.suites.mmeb import load_v1, load_v2
from rime_fast.eval.suites.mrmr import load_mrmr
from rime_fast.eval.suites.protocol import PROTOCOLS, Protocol, get_protocol, suite_template
from rime_fast.eval.suites.result import SuiteResult, TaskResult
from rime_fast.eval.suites.run import evaluate_suite
from rime_fast.eval.suites.tasks import Suite, Task, TaskData, TaskScore

__all__ = [
    "PROTOCOLS",
    "SUITES",
    "Protocol",
    "Suite",
    "SuiteResult",
    "Task",
    "TaskData",
    "TaskResult",
    "TaskScore",
    "evaluate_suite",
    "get_protocol",
    "load_suite",
    "suite_template",
]

# name -> its loader, one line about it
SUITES = {
    "mmeb-v2": (load_v2, "36 image, 18 video, 24 document tasks; hit@1, nDCG@5"),
    "mmeb-v1": (load_v1, "36 image tasks; precision@1"),
    "mrmr": (load_mrmr, "5 sets of reasoning-intensive multimodal retrieval; nDCG@10"),
    "uvrb": (load_uvrb, "16 sets of video retrieval; R@1, R@10, P@1"),
    "beir": (load_beir, "any folder with corpus, queries and qrels; nDCG@10"),
}


def load_suite(
    name: str,
    root: str | Path,
    protocol: str | Protocol = "ume-r1",
    *,
    frames: int | None = None,
    download: bool = False,
) -> Suite:
    """A suite whose data lies below ``root``; nothing is read before a task's ``load``.

    protocol: "ume-r1", "vlm2vec", "plain" (docs/eval.md) or a Protocol. frames: of a video, instead of the protocol's.
    download: whether a table that is not on this disk may be fetched from the hub. Raises ValueError for an unknown
    suite or protocol, and for a root that is no folder.
    """
    if name not in SUITES:
        raise ValueError(f"suite is {name!r}; expected one of {', '.join(SUITES)}")
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"root is {root}; expected a folder")
    return SUITES[name][0](root, get_protocol(protocol, **({} if frames is None else {"frames": frames})), download)
