"""The command ``rime-fast``. Light on purpose: help and wrong options answer without importing torch.

Exit codes: 0 done, 1 failed (a data file with bad rows, an error while running), 2 wrong use, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from io import TextIOWrapper

from rime_fast import __version__
from rime_fast.cli.command import Command
from rime_fast.cli.options import UsageError, suggestion

# words typed -> (module, or module:NAME where it is not COMMAND; one line for the overview)
COMMANDS = {
    "train": ("train", "joint training: rewrites, both embeddings, Cross-Mode Alignment"),
    "refine": ("refine", "Refine-RL: reinforce rewrites against stable discriminative anchors"),
    "eval": ("evaluate", "the 2 x 2 table of mutual retrieval; report.json and report.html"),
    "eval suites": ("eval_suites:LIST", "the benchmarks that eval knows: MMEB-V2, MMEB-V1, MRMR, UVRB, BEIR folders"),
    "embed": ("embed", "embed a file of items; safetensors and JSONL"),
    "index": ("index", "an index of embeddings: exact, or FAISS"),
    "search": ("search", "the nearest items of a text or a picture; a page with thumbnails"),
    "merge": ("merge", "the weighted mean of trained models"),
    "export": ("export", "a folder for sentence-transformers and vLLM; compare their vectors with ours"),
    "serve": ("serve", "an OpenAI-style embedding server: modes, batching, limits"),
    "rewrite": ("rewrite", "fill the rewrites of pairs by a teacher: in process, vLLM or a server"),
    "mine": ("mine", "hard negatives for pairs: exact top-k, filtered against false ones"),
    "data check": ("data_check", "name file, row and field of every bad row; write the good ones"),
    "demo": ("demo", "the whole recipe on a small real task, from random weights to a report"),
    "doctor": ("doctor", "what is active here, what is missing, what that costs"),
    "bench": ("bench", "the benchmark suite (in a source checkout)"),
    "bench logprob": ("bench_micro:LOGPROB", "the head's log-probabilities and gradients beside their peers"),
    "bench contrastive": ("bench_micro:CONTRASTIVE", "the contrastive loss beside its peers"),
    "bench reward": ("bench_micro:REWARD", "rewards and advantages beside their peers"),
}
# words of `rime-fast bench` of earlier releases -> the module of a source checkout that does this now
MOVED = {"scale": "benchmarks.scale", "--compare": "benchmarks.compare", "--plot": "benchmarks.plot"}
DEBUG = "RIME_FAST_DEBUG"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):  # a path or an id may hold what the terminal cannot show
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"rime-fast {__version__}")
        return 0
    name, rest = _command(words)

    def found() -> int:
        for word in rest if name == "bench" else ():
            if moved := MOVED.get(word.partition("=")[0]):
                raise UsageError(f"{word} is a command of the source checkout now: python -m {moved} --help")
        if name not in COMMANDS:
            known = dict.fromkeys(command.split()[0] for command in COMMANDS)
            raise UsageError(f"no such command{suggestion(name, known, 'rime-fast ')}")
        return load(name).main(rest)

    return guarded(f"rime-fast {name}", found)


def guarded(name: str, call: Callable[[], int]) -> int:
    """The exit code of ``call``; what it raises is one line on stderr that begins with ``name``."""
    try:
        return call()
    except UsageError as error:
        return _fail(name, str(error), 2)
    except KeyboardInterrupt:
        return _fail(name, "interrupted", 130)
    except BrokenPipeError:  # the reader of our output has left: `rime-fast ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get(DEBUG):
            raise
        return _fail(name, f"{_kind(error)}{error}\n({DEBUG}=1 shows the traceback)", 1)


def load(name: str) -> Command:
    """The command of that name in COMMANDS."""
    module, _, attribute = COMMANDS[name][0].partition(":")
    return getattr(import_module(f"rime_fast.cli.{module}"), attribute or "COMMAND")


def overview() -> str:
    """The help of ``rime-fast`` alone."""
    lines = [f"  {name:<19}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            f"rime-fast {__version__}: training and serving of rewrite-driven multimodal embeddings (RIME)",
            "",
            "rime-fast COMMAND [options]          rime-fast COMMAND --help teaches one command",
            "",
            *lines,
            "",
            "A run from data to report:",
            "  rime-fast data check pairs.jsonl",
            "  rime-fast train --model Qwen/Qwen2-VL-2B-Instruct --train_data pairs.jsonl --output_dir runs/sft",
            "  rime-fast refine --model runs/sft --train_data pairs.jsonl --output_dir runs/refine",
            "  rime-fast eval --model runs/refine --data test.json --output_dir runs/eval",
        ]
    )


def _command(words: list[str]) -> tuple[str, list[str]]:
    two = " ".join(words[:2])
    if two in COMMANDS:
        return two, words[2:]
    if words[0] == "data" and (len(words) == 1 or words[1].startswith("-")):
        return "data check", words[1:] or ["--help"]
    return words[0], words[1:]


def _kind(error: Exception) -> str:
    """The error's class, unless its message speaks for itself (ValueError and its like are written for users)."""
    return "" if isinstance(error, (ValueError, TypeError, OSError)) else f"{type(error).__name__}: "


def _fail(name: str, message: str, code: int) -> int:
    print(f"{name}: {message}", file=sys.stderr)
    return code
