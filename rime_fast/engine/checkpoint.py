"""Checkpoints as transactions, and what tells one run from another.

A checkpoint is written into a partial folder beside its place, synced to the disk with a manifest (every file's size
and BLAKE2b digest, and the run's facts), and renamed when it is complete: a folder named checkpoint-N is whole, or was
damaged afterwards, which ``fault`` sees. Older ones are removed only after that.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers.trainer_utils import rotate_checkpoints

from rime_fast.data.records import Pair, stable_hash

MANIFEST = "manifest.json"
PARTIAL = ".partial"
FORMAT = "rime-checkpoint/1"
MAY_CHANGE = "may change"  # among a run's facts: those that a resumed run may have other values of
SAMPLED = 512  # rows of a larger data set that its fingerprint reads


# --- the transaction -------------------------------------------------------------------------------------------------


def commit(partial: Path, final: Path, facts: Mapping[str, Any]) -> None:
    """Make the folder ``partial`` durable with its manifest, and give it its name; a folder of that name goes."""
    names = sorted(_files(partial))
    with ThreadPoolExecutor(8) as pool:
        entries = dict(zip(names, pool.map(lambda name: _entry(partial / name, sync=True), names), strict=True))
    text = json.dumps({"format": FORMAT, "files": entries, "facts": dict(facts)}, indent=1, default=str)
    with (partial / MANIFEST).open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    for folder in {(partial / name).parent for name in names} | {partial}:
        _sync_folder(folder)
    old = partial.with_name(f"{final.name}.old")
    if final.exists():
        os.replace(final, old)
    os.replace(partial, final)
    _sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def fault(folder: Path) -> str | None:
    """Say why a checkpoint cannot be trusted; None: every file is there, with the bytes that were written."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return f"it has no {MANIFEST} (half-written, or of an older version)"
    try:
        entries = read_manifest(folder)["files"]
    except (ValueError, KeyError) as error:
        return f"its {MANIFEST} is damaged: {error}"
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["size"]:
            return f"{name} has {path.stat().st_size} bytes, {entry['size']} were written"
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda name: _entry(folder / name), entries)
        for (name, entry), now in zip(entries.items(), found, strict=True):
            if now["blake2b"] != entry["blake2b"]:
                return f"the bytes of {name} are not those that were written"
    return None


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; raises ValueError where it is none."""
    found = json.loads((folder / MANIFEST).read_text())
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{folder / MANIFEST} is not of format {FORMAT}")
    return found


def newest(output_dir: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint of a run that verifies, and why later ones were left out."""
    left_out: dict[Path, str] = {}
    for folder in reversed(checkpoints(output_dir)):
        why = fault(folder)
        if why is None:
            return folder, left_out
        left_out[folder] = why
    return None, left_out


def checkpoints(output_dir: Path) -> list[Path]:
    """The folders checkpoint-N, by N."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=lambda path: int(path.name.split("-")[1]))


def choose(wanted: str | bool | None, output_dir: Path, overwrite: bool) -> tuple[str | None, list[str]]:
    """Choose where a run begins: (the checkpoint to resume from, or None for a fresh start; lines for people).

    wanted: a checkpoint's folder; True or "last": the newest of ``output_dir`` that is whole; None or False: a fresh
    start, into an unused folder, or with ``overwrite`` in place of what is there. Raises ValueError.
    """
    held = checkpoints(output_dir)
    if wanted is None or wanted is False:
        used = [*held, *output_dir.glob("model*.safetensors"), *output_dir.glob("adapter_model.safetensors")]
        if used and not overwrite:
            raise ValueError(
                f"output_dir {str(output_dir)!r} holds a run ({used[-1].name}); resume it "
                "(resume_from_checkpoint=True), choose another folder, or pass overwrite_output_dir=True"
            )
        for old in held:
            remove(old)
        return None, []
    if wanted is True or wanted == "last":
        found, left_out = newest(output_dir)
        lines = [f"{path} is left out: {why}" for path, why in left_out.items()]
        if found is None and left_out:
            raise ValueError("; ".join([*lines, f"no checkpoint of {str(output_dir)!r} is whole: name one to take it"]))
        say = "no checkpoint there, a fresh start" if found is None else f"resuming from {found}, step {step_of(found)}"
        return None if found is None else str(found), [*lines, f"{output_dir}: {say}"]
    path = Path(wanted)
    if not (path / "trainer_state.json").is_file():
        raise ValueError(f"{wanted} is no checkpoint: it has no trainer_state.json")
    if not (path / MANIFEST).is_file():
        return str(path), [f"resuming from {path}, step {step_of(path)}; it has no {MANIFEST}: it cannot be verified"]
    if (why := fault(path)) is not None:
        raise ValueError(f"{wanted} is damaged: {why}")
    return str(path), [f"resuming from {path}, step {step_of(path)}"]


def step_of(folder: Path) -> int:
    """Read the step that a checkpoint was made after."""
    return int(json.loads((folder / "trainer_state.json").read_text())["global_step"])


def choose_together(
    wanted: str | bool | None, output_dir: str, overwrite: bool, group: dist.ProcessGroup | None
) -> tuple[str | None, list[str]]:
    """Let the first rank of ``group`` ``choose`` for all of them; the lines are for that rank to tell. Raises on every
    rank what ``choose`` raises."""
    found: list[Any] = [None, [], None]
    if group is None or dist.get_rank(group) == 0:
        try:
            found[:2] = choose(wanted, Path(output_dir), overwrite)
        except ValueError as error:
            found[2] = str(error)
    if group is not None:
        dist.broadcast_object_list(found, src=0, group=group)
    if found[2] is not None:
        raise ValueError(found[2])
    return found[0], found[1]


def check_trust(folder: str, output_dir: str) -> None:
    """Raise ValueError for a checkpoint that this run's folder does not hold and that loading would unpickle.

    DeepSpeed's state and torch.distributed.checkpoint's metadata are pickles: whoever wrote them decides what code runs
    here. Everything else in a checkpoint is safetensors, JSON, or read by torch with ``weights_only``.
    """
    path = Path(folder).resolve()
    if path.parent == Path(output_dir).resolve():
        return
    pickled = sorted([*path.glob("global_step*/*.pt"), *path.rglob(".metadata")])
    if pickled:
        raise ValueError(
            f"{folder} holds pickles ({pickled[0].relative_to(path)}), which run code when they are loaded, and lies "
            f"outside of output_dir {output_dir!r}: pass trust_checkpoint=True if you know who wrote it"
        )


def check_writable(output_dir: str) -> None:
    """Raise ValueError where nothing can be saved into ``output_dir``."""
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise ValueError(f"output_dir {output_dir!r} cannot be written: {error}") from error


def place_best(state: Any, partial: Path, run: Path, write: bool) -> None:
    """A trainer's state names the best checkpoint by where it will lie, on every rank; one of them writes it."""
    best = state.best_model_checkpoint
    if best is not None and Path(best).parent == partial:
        state.best_model_checkpoint = str(run / Path(best).name)
        if write:
            state.save_to_json(str(partial / Path(best).name / "trainer_state.json"))


def publish(partial: Path, final: Path, facts: Mapping[str, Any], limit: int | None, best: str | None) -> None:
    """Commit the checkpoint of ``final``'s name that lies in ``partial``, and remove older ones above ``limit``."""
    commit(partial / final.name, final, facts)
    remove(partial)
    rotate_checkpoints(str(final.parent), limit, best, use_mtime=True)


def remove(folder: Path) -> None:
    """Delete a checkpoint: renamed first, so that an interruption leaves no half of it under its name."""
    if folder.is_symlink():  # what it leads to is somebody else's
        folder.unlink()
    if not folder.exists():
        return
    gone = folder.with_name(f".{folder.name.lstrip('.')}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def _files(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        if path.is_file() and path.name != MANIFEST:
            yield str(path.relative_to(folder))


def _entry(path: Path, sync: bool = False) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.blake2b(digest_size=16)
        while block := file.read(1 << 22):
            digest.update(block)
        if sync:
            os.fsync(file.fileno())
        return {"size": file.tell(), "blake2b": digest.hexdigest()}


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- what tells one run from another ---------------------------------------------------------------------------------


def data_facts(dataset: Any, rows: bool = True) -> dict[str, Any]:
    """Facts that tell a training set from another: its length, and with ``rows`` a digest of its rows in order: of all,
    or of evenly spaced ones."""
    pairs = getattr(dataset, "pairs", dataset)
    if pairs is None or not hasattr(pairs, "__len__"):
        return {}
    count = len(pairs)
    if not rows:
        return {"data rows": count}
    step = max(1, count // SAMPLED)
    digest = hashlib.blake2b(digest_size=16)
    for i in range(0, count, step):
        row = pairs[i]
        if not isinstance(row, Pair):
            return {"data rows": count}
        for side in (row.query, row.target, *row.negatives):
            digest.update(f"{stable_hash(side)} {stable_hash(replace(side, id=None))} {side.rewrite};".encode())
    return {"data rows": count, "data": digest.hexdigest()}


def facts_of(folder: str | Path | None) -> dict[str, Any] | None:
    """Read what the run was that made a checkpoint; None where that is not known."""
    if folder is None or not (Path(folder) / MANIFEST).is_file():
        return None
    return read_manifest(Path(folder))["facts"]


def compare(folder: str, now: Mapping[str, Any], accept: bool) -> str:
    """Say what to tell of a checkpoint whose run was another one ("" for nothing). Raises ValueError unless
    ``accept``.

    now: this run's facts; those under MAY_CHANGE take effect, and are only told.
    """
    made, steps = re.fullmatch(r"checkpoint-(\d+)", Path(folder).name), now.get(MAY_CHANGE, {}).get("max_steps", 0)
    if made and 0 < steps < int(made[1]):
        raise ValueError(
            f"{made[0]} is after the last of {steps} steps; expected more max_steps, or an older checkpoint"
        )
    before = facts_of(folder)
    if before is None:
        return ""
    free = differences(before.get(MAY_CHANGE, {}), now.get(MAY_CHANGE, {}))
    changed = differences({**before, MAY_CHANGE: None}, {**now, MAY_CHANGE: None})
    if changed and not accept:
        raise ValueError(
            f"{folder} was made by a run that differs: {_named(changed)}. Resume with what it had, or pass "
            "accept_changes=True to go on with the new values"
        )
    lines = [f"{folder} was made by a run that differs, and goes on: {_named(changed)}"] if changed else []
    return "\n".join([*lines, f"going on with {_named(free)}"] if free else lines)


def _named(changed: Mapping[str, str]) -> str:
    return "; ".join(f"{name} {change}" for name, change in changed.items())


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """List every fact that is not the same as name -> "old -> new" (compared as JSON writes them)."""
    old, new = (json.loads(json.dumps(dict(facts), default=str)) for facts in (before, now))
    names = sorted(old.keys() | new.keys())
    return {name: f"{old.get(name)!r} -> {new.get(name)!r}" for name in names if old.get(name) != new.get(name)}
