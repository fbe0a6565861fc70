"""`make soak`: training killed with SIGKILL at random moments and resumed, again and again.

A chain is one run that is killed up to four times, resumed each time with resume_from_checkpoint="last", and then left
to end: its final model must be the bytes of a run that was never killed, and no resume may be refused. A moment is a
share of the run's processor time, or one within the writing of a checkpoint. One parent has imported everything and
forks each run, so that a kill costs about a second. The state file is kept after every chain: the same command goes on
where it was, until --kills are done.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

from tests.soak.runs import KINDS, Kind, digest, prepare

LIMIT = 300.0  # seconds without an end: a run that hangs
TICK = 0.004


@dataclass
class Process:
    """The ranks of one run. The parent reaps them, so a pid is this run's until then."""

    folder: Path
    pids: list[int] = field(default_factory=list)
    ended: dict[int, int] = field(default_factory=dict)

    def start(self, kind: Kind, start: Path) -> Process:
        for mark in (*self.folder.glob("done*"), *self.folder.glob("store*")):
            mark.unlink()
        for rank in range(kind.ranks):
            self.pids.append(_fork(lambda rank=rank: _rank(kind, start, self.folder, rank)))  # type: ignore[misc]
        return self

    @property
    def done(self) -> bool:
        return all((self.folder / f"done{rank}").exists() for rank in range(len(self.pids)))

    def failed(self) -> bool:
        """A rank ended by itself without being done."""
        for pid in self.pids:
            if pid not in self.ended:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.ended[pid] = status
        return bool(self.ended) and not self.done

    def processor_seconds(self) -> float:
        fields = Path(f"/proc/{self.pids[0]}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def kill(self, apart: float = 0.0) -> None:
        """All ranks, the first of them ``apart`` seconds before the others."""
        for pid in self.pids:
            if pid not in self.ended:
                os.kill(pid, signal.SIGKILL)
                time.sleep(apart if pid == self.pids[0] else 0.0)
        for pid in self.pids:
            if pid not in self.ended:
                self.ended[pid] = os.waitpid(pid, 0)[1]


def _fork(work: Callable[[], None]) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _rank(kind: Kind, start: Path, folder: Path, rank: int) -> None:
    """One rank's whole life: its words go to the log, and it waits to be ended, as peers may need it till then."""
    log = os.open(folder / f"log{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import torch

    torch.set_num_threads(1)
    if kind.ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(kind.ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
        store = f"file://{folder}/store"
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=kind.ranks)
    kind.work(start, folder)
    (folder / f"done{rank}").touch()
    while True:
        time.sleep(1)


def _wait(run: Process, until: Callable[[], bool] | None) -> str:
    """ "killed" at the moment ``until`` says; else "done", "failed" or "hangs"."""
    begin = time.monotonic()
    while True:
        if run.done:
            run.kill()
            return "done"
        if run.failed():
            run.kill()
            return "failed"
        if until is not None and until():
            run.kill(random.choice([0.0, 0.0, 0.05]) if len(run.pids) > 1 else 0.0)
            return "killed"
        if time.monotonic() - begin > LIMIT:
            run.kill()
            return "hangs"
        time.sleep(TICK)


class Moment:
    """When a run is killed: at a share of its processor time, or a little after it began to write."""

    def __init__(self, rng: random.Random, run: Process, kind: Kind, whole: float) -> None:
        self.run, self.pattern = run, str(kind.partial)
        self.saving = kind.always_saving or rng.random() < 0.4
        self.share = rng.random() * whole
        self.skip, self.delay = rng.randrange(3), rng.random() ** 2 * 0.3
        self.inside, self.at = False, 0.0

    def __call__(self) -> bool:
        if not self.saving:
            return self.run.processor_seconds() >= self.share
        if self.at:
            return time.monotonic() >= self.at
        inside = any(True for _ in self.run.folder.glob(self.pattern))
        if inside and not self.inside:  # it has just begun
            if self.skip == 0:
                self.at = time.monotonic() + self.delay
            self.skip -= 1
        self.inside = inside
        return False


def chain(name: str, seed: int, root: Path, baseline: dict[str, Any], kills: int) -> dict[str, Any]:
    """One run killed up to ``kills`` times: how often and where, and what became of it."""
    rng, kind, folder = random.Random(f"{name} {seed}"), KINDS[name], root / f"{name}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    found: dict[str, Any] = {"kind": name, "seed": seed, "kills": 0, "saving": 0, "end": "same"}
    for last in [False] * kills + [True]:
        run = Process(folder).start(kind, root)
        moment = None if last else Moment(rng, run, kind, baseline["seconds"])
        end = _wait(run, moment)
        if end == "killed":
            found["kills"] += 1
            partial = list(folder.glob(kind.partial))
            found["saving"] += bool(partial)
            for path in partial:  # as if the next run began minutes later: orphans of that age are removed
                os.utime(path, (time.time() - 120,) * 2)
        elif end != "done":
            return found | {"end": end, "log": (folder / "log0.txt").read_text()[-2000:]}
        if end == "done":
            break
    if digest(folder / kind.result) != baseline["digest"]:
        return found | {"end": "another model"}
    left = [str(path) for path in folder.glob(kind.partial)]
    if left:
        return found | {"end": f"left behind: {left}"}
    shutil.rmtree(folder)
    return found


def whole_run(name: str, root: Path) -> dict[str, Any]:
    """The run that nobody kills: its result and processor time."""
    folder = root / f"{name}-whole"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run = Process(folder).start(KINDS[name], root)
    seconds = [0.0]

    def watch() -> bool:
        seconds[0] = max(seconds[0], run.processor_seconds())
        return False

    if (end := _wait(run, watch)) != "done":
        raise SystemExit(f"the run of {name} that nobody killed {end}:\n{(folder / 'log0.txt').read_text()[-3000:]}")
    return {"seconds": seconds[0], "digest": digest(folder / KINDS[name].result)}


def table(chains: list[dict[str, Any]]) -> str:
    lines = ["| kind | kills | while writing | final models | bitwise the same | refused or failed |"]
    lines.append("|---|---|---|---|---|---|")
    for name in KINDS:
        own = [one for one in chains if one["kind"] == name]
        if own:
            kills, saving = sum(one["kills"] for one in own), sum(one["saving"] for one in own)
            same, bad = (sum(one["end"] in ends for one in own) for ends in (("same",), ("failed", "hangs")))
            lines.append(f"| {name} | {kills} | {saving} | {len(own)} | {same} | {bad} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="how many in all, those of the state file included")
    parser.add_argument("--minutes", type=float, default=30, help="how long this command goes on")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"), help="runs and the state file")
    args = parser.parse_args()
    root, begin = args.folder.resolve(), time.monotonic()
    root.mkdir(parents=True, exist_ok=True)
    state_file = root / "state.json"
    state = json.loads(state_file.read_text()) if state_file.exists() else {"whole": {}, "chains": []}
    # DeepSpeed compiles an extension at its first start; a kill then would leave its lock behind for everybody.
    os.environ["TORCH_EXTENSIONS_DIR"] = str(root / "extensions")
    if not (root / "pairs.jsonl").exists():
        assert os.waitpid(_fork(lambda: prepare(root, args.kinds)), 0)[1] == 0
    while (killed := sum(one["kills"] for one in state["chains"])) < args.kills:
        if time.monotonic() - begin > 60 * args.minutes:
            break
        counts = {name: sum(one["kills"] for one in state["chains"] if one["kind"] == name) for name in args.kinds}
        name = min(args.kinds, key=counts.__getitem__)
        if name not in state["whole"]:
            state["whole"][name] = whole_run(name, root)
        seed = sum(one["kind"] == name for one in state["chains"])
        found = chain(name, seed, root, state["whole"][name], min(4, args.kills - killed))
        state["chains"].append(found)
        state_file.with_suffix(".new").write_text(json.dumps(state, indent=1))
        os.replace(state_file.with_suffix(".new"), state_file)
        print(f"{killed + found['kills']} kills; {name} {seed}: {found['kills']}, {found['end']}", flush=True)
    print(table(state["chains"]))
    bad = [one for one in state["chains"] if one["end"] != "same"]
    for one in bad:
        print(f"\n{one['kind']} {one['seed']}: {one['end']}\n{one.get('log', '')}")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
