"""The weighted mean of checkpoints of one model ("model soup"): of two phases, two seeds, two mixtures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from rime_fast.model.card import read_facts, write_card
from rime_fast.model.dual_mode import DualModeModel
from rime_fast.model.processor import RimeProcessor


def merge_models(models: Sequence[tuple[str, float]], output_dir: str | Path) -> Path:
    """Write the weighted mean of trained models into ``output_dir``, with the first one's processor and settings.

    models: (directory or hub name, weight > 0); weights are divided by their sum; an adapter's folder counts as its
    merged model. Means are taken in fp32 and rounded once to the first one's dtype. All models are in host memory at
    a time. Raises ValueError for a single model, for models whose parameters or tokens differ, and for a folder that
    is one of the models'.
    """
    if len(models) < 2:
        raise ValueError(f"models has {len(models)} entries; expected at least two to merge")
    if wrong := [weight for _, weight in models if not 0 < weight < float("inf")]:
        raise ValueError(f"models has weight {wrong[0]}; expected finite numbers above 0")
    output = Path(output_dir)
    if output.resolve() in [Path(name).resolve() for name, _ in models]:
        raise ValueError(f"output_dir is {output}, one of the models; expected a folder of its own")
    names, weights = [name for name, _ in models], torch.tensor([weight for _, weight in models])
    processors = [RimeProcessor.from_pretrained(name) for name in names]
    loaded = [DualModeModel.from_pretrained(name, dtype="auto") for name in names]
    parameters = [dict(model.named_parameters()) for model in loaded]  # type: ignore[attr-defined]
    for name, processor, found in zip(names[1:], processors[1:], parameters[1:], strict=True):
        if processor.tokenizer.get_vocab() != processors[0].tokenizer.get_vocab():
            raise ValueError(f"{name} has other tokens than {names[0]}; expected models of one vocabulary")
        for key in parameters[0].keys() | found.keys():
            shapes = [list(one[key].shape) if key in one else "missing" for one in (parameters[0], found)]
            if shapes[0] != shapes[1]:
                raise ValueError(f"{key} is {shapes[0]} in {names[0]} and {shapes[1]} in {name}; expected equal models")
    shares = (weights / weights.sum()).tolist()
    with torch.no_grad():
        for key, into in parameters[0].items():
            total = torch.zeros_like(into, dtype=torch.float32)
            for share, found in zip(shares, parameters, strict=True):
                total.add_(found[key].float(), alpha=share)
            into.copy_(total)
    loaded[0].save_pretrained(output)
    processors[0].save_pretrained(output)
    merged = {f"share of {name}": share for name, share in zip(names, shares, strict=True)}
    facts = read_facts(names[0]) | {"title": "merged", "settings": merged, "results": {}}
    write_card(output, facts)
    return output
