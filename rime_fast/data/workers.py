"""Worker processes of a DataLoader that outlive the signals of their group: schedulers and terminals signal all of it,
and a worker that died of that would end the run before its checkpoint."""

from __future__ import annotations

import copy
import multiprocessing
import os
import signal
import threading
from multiprocessing.context import BaseContext, ForkProcess, ForkServerProcess, SpawnProcess
from multiprocessing.process import BaseProcess

_SIGNALS = {signal.SIGTERM, signal.SIGINT}


def worker_context(workers: int, method: str | None) -> BaseContext | None:
    """Make what a DataLoader takes as ``multiprocessing_context``: its workers end by their parent's word alone.

    workers: its ``num_workers``; for 0, None, which is what it takes then. method: "fork", "spawn" or "forkserver";
    None for Python's own.
    """
    if workers == 0:
        return None
    method = method or multiprocessing.get_start_method()
    context = copy.copy(multiprocessing.get_context(method))
    context.Process = {"fork": _Forked, "spawn": _Spawned, "forkserver": _Served}[method]  # type: ignore[attr-defined]
    return context


class _Outliving(BaseProcess):
    """Has the signals blocked from its first moment on: a child begins with its parent's mask. Those that come to the
    parent meanwhile reach it afterwards."""

    def start(self) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # a fork server may be older than the first worker
        threading.Thread(target=_listen, daemon=True).start()
        super().run()


def _listen() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a child
    while signal.sigwaitinfo(_SIGNALS).si_pid != parent.pid:
        pass
    os._exit(0)


class _Forked(_Outliving, ForkProcess):
    pass


class _Spawned(_Outliving, SpawnProcess):
    pass


class _Served(_Outliving, ForkServerProcess):
    pass
