"""``rime-fast eval --mteb TASK ...``: tasks of mteb."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rime_fast.cli.command import model_exists, required
from rime_fast.cli.loading import EmbedderOptions, load_embedder
from rime_fast.cli.options import UsageError
from rime_fast.cli.values import build


def run_mteb(values: dict[str, Any], tasks: list[str], modes: list[str], download: bool) -> int:
    """Evaluate each model on tasks of mteb; its result files go to output_dir/mteb, a report beside them."""
    required(values, "model")
    model_exists(*values["model"])
    if not download:  # read when the hub's client and `datasets` are imported, which nothing has done yet
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import mteb
    except ImportError as error:
        raise UsageError(f"--mteb needs the extra: pip install 'rime-fast[mteb]' ({error})") from None
    from rime_fast.cli.eval_options import EvalOptions
    from rime_fast.eval.report import write_report
    from rime_fast.integrations.mteb import RimeMtebEncoder

    options, loading = build(EvalOptions, values), build(EmbedderOptions, values)
    try:
        chosen = list(mteb.get_tasks(tasks=tasks))
    except KeyError as error:
        raise UsageError(f"--mteb: {error.args[0] if error.args else error}") from None
    metrics = {task.metadata.name: task.metadata.main_score for task in chosen}
    home = Path(options.output_dir)
    rows = []
    for path in options.model:
        embedder = load_embedder(path, loading)
        for mode in modes:
            encoder: Any = RimeMtebEncoder(embedder, mode=mode, name=f"local/{Path(path).name or path}")
            cache = mteb.ResultCache(cache_path=home / "mteb")
            results = mteb.evaluate(encoder, chosen, cache=cache, show_progress_bar=False)
            for one in results.task_results:
                rows.append([path, mode, one.task_name, metrics[one.task_name], f"{100 * one.get_score():.2f}"])
                print(f"{path:<24} {mode:<5} {one.task_name:<40} {rows[-1][3]:<16} {rows[-1][4]:>7}")
        del embedder
    table = {"title": "Tasks", "columns": ["model", "mode", "task", "metric", "score, %"], "rows": rows}
    facts = {"model": ", ".join(options.model), "mteb": mteb.__version__, "template": loading.template}
    report = {"title": options.title or "mteb", "facts": facts, "tables": [table]}
    written = write_report(home, report)
    print(f"report: {written[1]}\nresults: {home / 'mteb'}")
    return 0
