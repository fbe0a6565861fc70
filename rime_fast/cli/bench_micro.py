"""``rime-fast bench logprob``, ``contrastive``, ``reward``: one operator at a shape of the user's, beside its peers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from runpy import run_path
from typing import Any

from rime_fast.cli.bench import BENCHMARKS
from rime_fast.cli.command import Command
from rime_fast.cli.options import Group, UsageError
from rime_fast.cli.values import build

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "half": "float16"}
NAMES = ("float32", "float16", "bfloat16")
PEERS = BENCHMARKS / "lib" / "peers.py"


@dataclass
class MicroOptions:
    """How one operator is measured."""

    device: str = field(default="auto", metadata={"help": "cpu, cuda, or auto: cuda where there is one."})
    dtype: str = field(
        default="auto",
        metadata={"help": "bf16, fp16 or fp32; auto: bf16 on a GPU (rewards: fp32), fp32 on a CPU."},
    )
    rounds: int = field(default=7, metadata={"help": "Timed calls of each implementation, interleaved."})
    seconds: float = field(default=120.0, metadata={"help": "Leave rounds out that would pass this time limit."})
    output: str | None = field(default=None, metadata={"help": "Also write the rows, and the ceilings, to this JSON."})


def micro(op: str, values: dict[str, Any]) -> int:
    """Measure, print the table and the choice of backend."""
    options = build(MicroOptions, values)
    if options.rounds < 1:
        raise UsageError(f"--rounds is {options.rounds}; expected at least 1")
    dtype_given = DTYPES.get(options.dtype, options.dtype)
    if dtype_given not in (*NAMES, "auto"):
        raise UsageError(f"--dtype is {options.dtype!r}; expected bf16, fp16, fp32 or auto")
    if options.device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device is {options.device!r}; expected cpu, cuda or auto")

    from importlib import import_module

    import torch

    from rime_fast.bench import ceiling
    from rime_fast.bench.harness import Results, environment
    from rime_fast.bench.table import print_rows
    from rime_fast.ops.dispatch import explain

    module = import_module(f"rime_fast.bench.{op}")
    shape = build(module.Shape, values)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device here (rime-fast doctor says why)")
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    name = dtype_given
    if name == "auto":
        name = "bfloat16" if device == "cuda" and op != "reward" else "float32"
    dtype = getattr(torch, name)

    results = Results(device=device, seconds=options.seconds)
    taken = explain(op, device, dtype)  # an impossible RIME_FAST_BACKEND ends here
    where = environment(device)
    print(f"{where['device']}, torch {where['torch']}, {where['threads']} threads, {name}")
    module.measure(shape, device, dtype, results, options.rounds, **third_party(op, shape))
    print_rows(results.rows, results.skipped)
    print(f"\nauto takes {taken.backend}: {taken.why}")
    for other, reason in taken.others.items():
        print(f"  not {other}: {reason}")
    if options.output:
        ceiling.measure(ceiling.SHAPES[device][0], device, dtype, results)
        results.write(Path(options.output))
        print(f"rows: {options.output}")
    return 0


def third_party(op: str, shape: Any) -> dict[str, Any]:
    """Find other packages' forms for ``peers=`` of the measurement; they come with a source
    checkout (benchmarks/lib)."""
    found = run_path(str(PEERS)).get(op) if PEERS.is_file() else None
    return {"peers": found(shape)} if found else {}


def _command(op: str, text: str, examples: tuple[tuple[str, str], ...]) -> Command:
    return Command(
        name=f"bench {op}",
        text=f"{text} The floor is the bare matrix products of the same shape; a peer that is not installed or cannot "
        "run here is named with the reason (packages other than torch are measured in a source checkout). Says which "
        "backend auto takes, and why.",
        examples=examples,
        run=lambda values: micro(op, values),
        groups=(
            Group("Shape", f"rime_fast.bench.{op}", "Shape"),
            Group("Measurement", "rime_fast.cli.bench_micro", "MicroOptions"),
        ),
    )


LOGPROB = _command(
    "logprob",
    "Times loss and gradients of the language-model head (fused_linear_ce, fused_logprob_pool) beside eager torch, "
    "F.linear_cross_entropy, TRL, Liger and cut-cross-entropy.",
    (
        (
            "a 7B head on a GPU, 9 of 10 tokens not scored",
            "rime-fast bench logprob --hidden 3584 --vocab 152064 --tokens 8192 --ignored 0.9 --dtype bf16",
        ),
        ("small enough for a CPU", "rime-fast bench logprob --hidden 256 --vocab 32000 --tokens 1024"),
    ),
)
CONTRASTIVE = _command(
    "contrastive",
    "Times loss and gradients of contrastive_loss beside eager torch, open_clip's form, sentence-transformers' cached "
    "form and Inf-CL.",
    (
        ("all four terms of the recipe on a GPU", "rime-fast bench contrastive --pairs 65536 --width 1536 --terms 4"),
        ("small enough for a CPU", "rime-fast bench contrastive --pairs 2048 --width 256"),
    ),
)
REWARD = _command(
    "reward",
    "Times score_rewrites_ (rewards and advantages of a group of rollouts against an anchor bank) beside eager torch.",
    (
        ("a bank of a million anchors on a GPU", "rime-fast bench reward --items 64 --group 8 --anchors 1000000"),
        ("small enough for a CPU", "rime-fast bench reward --items 32 --anchors 16384 --width 256"),
    ),
)
