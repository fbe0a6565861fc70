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

from rime_fast.data.archives import open_file
from rime_fast.data.records import DataError, Pair, Side, stable_hash

MANIFEST = "manifest.json"
PARTIAL = ".partial"
FORMAT = "rime-checkpoint/1"
MAY_CHANGE = "may change"  # among a run's facts: those that a resumed run may have other values of
UNKNOWN = "not known"  # a fact's value where a run cannot tell it: it is not compared
MENDED = ("data files",)  # facts of the data that may change: a picture that ended a run is put right
SAMPLED = 512  # rows of a larger data set that are read whole, with the beginnings of their files
HEAD = 4096  # bytes of a file that are its beginning


# --- the transaction -------------------------------------------------------------------------------------------------


def commit(partial: Path, final: Path, facts: Mapping[str, Any]) -> None:
    """Make the folder ``partial`` durable with its manifest, and give it its name; a folder of that name goes."""
    names = sorted(_files(partial))
    with ThreadPoolExecutor(8) as pool:
        entries = dict(zip(names, pool.map(lambda name: _entry(partial / name, sync=True), names), strict=True))
    made = 1 + max((_made(folder) or 0 for folder in checkpoints(final.parent)), default=0)
    whole = {"format": FORMAT, "made": made, "files": entries, "facts": dict(facts)}
    text = json.dumps(whole, indent=1, default=str)
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
        found = read_manifest(folder)["files"].items()
        entries = {name: (entry["size"], entry["blake2b"]) for name, entry in found}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} is damaged: {error}"
    if not entries:
        return f"its {MANIFEST} names no files"
    for name, (size, _) in entries.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, {size} were written"
    with ThreadPoolExecutor(8) as pool:
        now = pool.map(lambda name: _entry(folder / name), entries)
        for (name, (_, digest)), entry in zip(entries.items(), now, strict=True):
            if entry["blake2b"] != digest:
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
    """The folders checkpoint-N in the order in which they were made, those that cannot say when last.

    A run that went on from an older one leaves higher numbers behind, of a branch that was given up.
    """

    def order(folder: Path) -> tuple[bool, int, int]:
        made = _made(folder)
        return made is None, made or 0, int(folder.name.split("-")[1])

    found = (path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name))
    return sorted((path for path in found if path.is_dir()), key=order)


def _made(folder: Path) -> int | None:
    """Which commit of its run a checkpoint is, from 1; 0: of an older version; None: its manifest cannot be read."""
    try:
        return int(read_manifest(folder).get("made", 0))
    except (OSError, ValueError, TypeError):
        return None


def choose(wanted: str | bool | None, output_dir: Path, overwrite: bool) -> tuple[str | None, list[str]]:
    """Choose where a run begins: (the checkpoint to resume from, or None for a fresh start; lines for people).

    wanted: a checkpoint's folder; True or "last": the newest of ``output_dir`` that is whole; None or False: a fresh
    start. A fresh start and another folder's checkpoint want an unused ``output_dir``, or with ``overwrite`` take the
    place of what is there. Raises ValueError.
    """
    _clear(output_dir)
    held = checkpoints(output_dir)
    used = [*held, *output_dir.glob("model*.safetensors"), *output_dir.glob("adapter_model.safetensors")]
    lines: list[str] = []
    start: str | None = None
    if wanted is True or wanted == "last":
        found, left_out = newest(output_dir)
        lines = [f"{path} is left out: {why}" for path, why in left_out.items()]
        if found is not None:
            return str(found), [*lines, f"{output_dir}: resuming from {found}, step {step_of(found)}"]
        if left_out and not overwrite:
            remedy = "restore one, or set overwrite_output_dir to start afresh"
            raise ValueError("; ".join([*lines, f"no checkpoint of {str(output_dir)!r} is whole: {remedy}"]))
        lines.append(f"{output_dir}: no checkpoint there, a fresh start")
    elif wanted is not None and wanted is not False:
        path = Path(wanted)
        if not (path / "trainer_state.json").is_file():
            raise ValueError(f"{wanted} is no checkpoint: it has no trainer_state.json")
        if not (path / MANIFEST).is_file():
            lines.append(f"resuming from {path}, step {step_of(path)}; it has no {MANIFEST}: it cannot be verified")
        elif (why := fault(path)) is not None:
            raise ValueError(f"{wanted} is damaged: {why}")
        else:
            lines.append(f"resuming from {path}, step {step_of(path)}")
        start = str(path)
        if path.parent.resolve() == output_dir.resolve():
            return start, lines
    # From here on what output_dir holds, if anything, is another run.
    if used and not overwrite:
        resume = "resume it (resume_from_checkpoint: last), " if held else ""
        raise ValueError(
            f"output_dir {str(output_dir)!r} holds a run ({used[-1].name}); {resume}choose another folder, or set "
            "overwrite_output_dir"
        )
    for old in held:
        remove(old)
    return start, lines


def _clear(output_dir: Path) -> None:
    """Remove what an interrupted save or removal left; a checkpoint that was to be replaced gets its name back."""
    for old in (output_dir / PARTIAL).glob("checkpoint-*.old"):
        if not (place := output_dir / old.name.removesuffix(".old")).exists():
            os.replace(old, place)
    for left in (output_dir / PARTIAL, *output_dir.glob(".checkpoint-*.gone")):
        _delete(left)


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
    here. Everything else in a checkpoint is safetensors, JSON, or read by torch with ``weights_only``. DeepSpeed takes
    what its file ``latest`` names, so that file alone counts.
    """
    path = Path(folder).resolve()
    if path.parent == Path(output_dir).resolve():
        return
    pickled = sorted([*path.glob("global_step*/*"), *path.glob("latest"), *path.rglob(".metadata")])
    if pickled:
        raise ValueError(
            f"{folder} holds pickles, or leads to them ({pickled[0].relative_to(path)}): they run code when they are "
            f"loaded, and it lies outside of output_dir {output_dir!r}: set trust_checkpoint if you know who wrote it"
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
    if limit is None or limit <= 0:
        return
    kept = {Path(folder).resolve() for folder in (final, best) if folder is not None}
    others = [folder for folder in checkpoints(final.parent) if folder.resolve() not in kept]
    others.sort(key=lambda folder: _made(folder) is not None)  # damaged ones go first, then the oldest
    for folder in others[: max(0, len(others) - max(0, limit - len(kept)))]:
        remove(folder)


def remove(folder: Path) -> None:
    """Delete a checkpoint: renamed first, so that an interruption leaves no half of it under its name."""
    if folder.is_symlink() or not folder.is_dir():
        _delete(folder)
        return
    gone = folder.with_name(f".{folder.name.lstrip('.')}.gone")
    _delete(gone)
    os.replace(folder, gone)
    _delete(gone)


def _delete(path: Path) -> None:
    """Delete a folder, a file or a link, if there is one; what a link leads to is somebody else's."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


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
    """Facts that tell a training set from another, in order: how many rows; "data digest", of every row, where the
    check before step 1 has read them all; "data", of all or of evenly spaced rows and the pixels that they hold; "data
    files", of the beginnings of these rows' images and videos; the sets of a mixture.

    rows: False for rows that were not checked: those made on the fly need not be the same twice and are not read.
    """
    pairs = getattr(dataset, "pairs", dataset)
    if pairs is None or not hasattr(pairs, "__len__"):
        return {}
    facts: dict[str, Any] = {"data rows": len(pairs), "data": UNKNOWN, "data files": UNKNOWN, "data digest": UNKNOWN}
    hashes: list[Any] = [getattr(part, "hashes", None) for part in _parts(pairs)]
    if not any(part is None for part in hashes):
        facts["data digest"] = hashlib.blake2b(b"".join(part.tobytes() for part in hashes), digest_size=16).hexdigest()
    if hasattr(pairs, "labels"):
        shares = (pairs.weights / pairs.weights.sum()).tolist()
        sets = zip(pairs.labels, pairs.sizes.tolist(), shares, strict=True)
        facts["mixture"] = {
            label: {"place": place, "rows": size, "share": round(share, 12)}
            for place, (label, size, share) in enumerate(sets)
        }
    if not rows and not all(_settled(part) for part in _parts(pairs)):
        return facts
    digest, files = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
    for i in range(0, len(pairs), max(1, len(pairs) // SAMPLED)):
        try:
            row = pairs[i]
        except DataError:
            digest.update(b"bad;")
            continue
        if not isinstance(row, Pair):
            return facts
        for side in (row.query, row.target, *row.negatives):
            digest.update(f"{stable_hash(side)} {stable_hash(replace(side, id=None))} {side.rewrite};".encode())
        for side in (row.query, row.target, *row.positives, *row.negatives):
            for path in _paths(side):
                files.update(_beginning(path))
    return facts | {"data": digest.hexdigest(), "data files": files.hexdigest()}


def _parts(pairs: Any) -> list[Any]:
    """The datasets that a joined one or a mixture is made of, else the dataset itself."""
    return list(getattr(pairs, "sets", None) or getattr(pairs, "datasets", None) or [pairs])


def _settled(pairs: Any) -> bool:
    """Whether rows are those of a file or a list, the same whenever they are read."""
    source = getattr(pairs, "source", pairs)
    of_file = hasattr(source, "key") and source.key() is not None
    return of_file or isinstance(getattr(source, "source", source), (list, tuple))


def _paths(side: Side) -> Iterator[str]:
    videos = [video.source for video in side.videos]
    frames = [frame for video in videos if not isinstance(video, str) for frame in video]
    for source in (*side.images, *frames, *(video for video in videos if isinstance(video, str))):
        path = source.get("path") if isinstance(source, dict) and source.get("bytes") is None else source
        if isinstance(path, (str, os.PathLike)):
            yield os.fspath(path)


def _beginning(path: str) -> bytes:
    """Size and first bytes of a file; nothing of what is none (a folder, a pipe, a member of an archive, a URL)."""
    try:
        with open_file(path) as file:
            return f"{os.fstat(file.fileno()).st_size} ".encode() + file.read(HEAD)
    except OSError:
        return b"none"


def facts_of(folder: str | Path | None) -> dict[str, Any] | None:
    """Read what the run was that made a checkpoint; None where that is not known."""
    if folder is None or not (Path(folder) / MANIFEST).is_file():
        return None
    return read_manifest(Path(folder))["facts"]


def compare(folder: str, now: Mapping[str, Any], accept: bool) -> str:
    """Say what to tell of a checkpoint whose run was another one ("" for nothing). Raises ValueError unless
    ``accept``.

    now: this run's facts; those under MAY_CHANGE take effect, and are only told. A fact that the checkpoint lacks (an
    older version wrote it), or that either run calls UNKNOWN, is not compared, and told.
    """
    before = facts_of(folder)
    if before is None:
        return ""
    old, new = before.get(MAY_CHANGE, {}), now.get(MAY_CHANGE, {})
    both = {name for name in old.keys() & new.keys() if UNKNOWN not in (old[name], new[name])}
    free = differences({name: old[name] for name in both}, {name: new[name] for name in both})
    known = {name: before.get(name, UNKNOWN) for name in now.keys() | before.keys()}
    unknown = sorted(name for name in known if UNKNOWN in (known[name], now.get(name)) and known[name] != now.get(name))
    left_out: dict[str, Any] = dict.fromkeys([MAY_CHANGE, *unknown])
    changed = differences(known | left_out, {**now, **left_out})
    if changed and not accept:
        raise ValueError(
            f"{folder} was made by a run that differs: {_named(changed)}. Resume with what it had, or set "
            "accept_changes to go on with the new values"
        )
    lines = [f"{folder} was made by a run that differs, and goes on: {_named(changed)}"] if changed else []
    lines += [f"not known of both runs, so not compared: {', '.join(unknown)}"] if unknown else []
    return "\n".join([*lines, f"going on with {_named(free)}"] if free else lines)


def _named(changed: Mapping[str, str]) -> str:
    return "; ".join(f"{name} {change}" for name, change in changed.items())


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """List every fact that is not the same as name -> "old -> new" (compared as JSON writes them); a fact that both
    have parts of, by its parts."""
    old, new = (json.loads(json.dumps(dict(facts), default=str)) for facts in (before, now))
    found: dict[str, str] = {}
    for name in sorted(old.keys() | new.keys()):
        was, is_now = old.get(name), new.get(name)
        if isinstance(was, dict) and isinstance(is_now, dict):
            found |= {f"{name}.{part}": change for part, change in differences(was, is_now).items()}
        elif was != is_now:
            found[name] = f"{_short(was)} -> {_short(is_now)}"
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


def has_optimizer(folder: str) -> bool:
    """Whether a checkpoint holds an optimizer's state and a scheduler's, in any of the forms that are written."""
    path = Path(folder)
    whole = bool([*path.glob("optimizer*")]) and (path / "scheduler.pt").is_file()
    return whole or bool([*path.glob("global_step*")])
