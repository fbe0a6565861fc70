"""Which implementation of an operator runs: one table per operator, one rule for all.

Every operator owns a ``BackendTable``: backend name -> a probe that returns None when the backend can serve the call
or the reason why it cannot. ``backend="auto"`` takes the first that can, in the table's order for the device; an
explicit choice that cannot serve is an error that gives the reason. The environment variable ``RIME_FAST_BACKEND``
replaces "auto": either one name for all operators (``RIME_FAST_BACKEND=reference``) or a list
(``RIME_FAST_BACKEND=contrastive=triton,reward=chunked``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module

import torch

BACKENDS = ("auto", "reference", "chunked", "triton", "cuda")
ENVIRONMENT = "RIME_FAST_BACKEND"

TABLES = {  # operator -> the module with its TABLE
    "logprob": "rime_fast.ops.logprob_pool.op",
    "contrastive": "rime_fast.ops.contrastive.op",
    "reward": "rime_fast.ops.reward.op",
}

Probe = Callable[[torch.Tensor], "str | None"]


@dataclass(frozen=True)
class Explanation:
    """Why a backend runs. backend: what "auto" takes. why: the rule that took it. others: backend -> why it was not
    taken."""

    backend: str
    why: str
    others: Mapping[str, str]


@dataclass(frozen=True)
class BackendTable:
    """The backends of one operator.

    op: the operator's short name, as in the environment variable (logprob, contrastive, reward).
    probes: backend name -> probe(tensor); the tensor stands for the call (its device and dtype).
    order: device type ("cpu", "cuda") -> backend names, the preferred one first.
    """

    op: str
    probes: Mapping[str, Probe]
    order: Mapping[str, tuple[str, ...]]

    def choose(self, backend: str, tensor: torch.Tensor) -> str:
        """Choose the backend that will run for ``tensor``.

        Raises ValueError if ``backend`` (or the environment's choice) is unknown or cannot serve the call.
        """
        source = "backend"
        if backend == "auto":
            override = _from_environment(self.op)
            if override is not None:
                backend, source = override, f"{ENVIRONMENT} for {self.op}"
        if backend not in BACKENDS:
            raise ValueError(f"{source} is {backend!r}; expected one of {', '.join(BACKENDS)}")
        if backend != "auto":
            reason = self.why_not(backend, tensor)
            if reason is not None:
                raise ValueError(f"{source}={backend!r} cannot run here: {reason}")
            return backend
        reasons = []
        for name in self.order.get(tensor.device.type, ("reference",)):
            reason = self.why_not(name, tensor)
            if reason is None:
                return name
            reasons.append(f"{name}: {reason}")
        raise ValueError(f"no backend of {self.op} can run on {tensor.device.type}: {'; '.join(reasons)}")

    def why_not(self, backend: str, tensor: torch.Tensor) -> str | None:
        """The reason ``backend`` cannot serve ``tensor``, or None when it can."""
        probe = self.probes.get(backend)
        return f"{self.op} has no {backend} backend" if probe is None else probe(tensor)

    def explain(self, tensor: torch.Tensor) -> Explanation:
        """Say what "auto" takes for ``tensor``, and why. Raises ValueError where ``choose`` does."""
        backend = self.choose("auto", tensor)
        kind = tensor.device.type
        order = self.order.get(kind, ("reference",))
        others = {}
        for name in (name for name in ("cuda", "triton", "chunked", "reference") if name != backend):
            reason = self.why_not(name, tensor)
            others[name] = reason or (f"{backend} comes first" if name in order else f"not chosen on {kind}")
        if _from_environment(self.op) not in (None, "auto"):
            return Explanation(backend, f"{ENVIRONMENT} asks for it", others)
        return Explanation(backend, f"the first that can serve, in the order {', '.join(order)} of {kind}", others)


def explain(op: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Explanation:
    """Say what "auto" takes for operator ``op`` (logprob, contrastive, reward) on such tensors, and why."""
    table: BackendTable = import_module(TABLES[op]).TABLE
    return table.explain(torch.empty(1, device=device, dtype=dtype))


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[None]:
    """Make the tensor's CUDA device the current one inside a block: Triton launches on the current device and its
    stream, wherever the tensors lie, and a custom operator sets none."""
    # Not initialised: no tensor is really there (tracing).
    return torch.cuda.device(tensor.device) if tensor.is_cuda and torch.cuda.is_initialized() else nullcontext()


@torch.compiler.assume_constant_result
def memory_of(device: int) -> int:
    """The bytes that a GPU has, not those that are free, so that the same call takes the same way there."""
    return int(torch.cuda.get_device_properties(device).total_memory)


def interpreted() -> bool:
    """Whether Triton's CPU interpreter runs the kernels (the variable is read when triton is imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_why_not(tensor: torch.Tensor) -> str | None:
    """The reason Triton cannot serve a call on the tensor's device, or None."""
    if not tensor.is_cuda and not (interpreted() and tensor.device.type == "cpu"):
        return f"it needs CUDA tensors (or TRITON_INTERPRET=1 for the CPU), got {tensor.device.type}"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return None


def tf32_allowed() -> bool:
    """Whether torch's fp32 products on CUDA may run in TF32, by whichever of its two switches it was set.

    Reading the old one (``allow_tf32``) is an error once the new one was used.
    """
    switch = torch.backends.cuda.matmul
    if hasattr(switch, "fp32_precision"):
        if switch.fp32_precision == "tf32":
            return True
        if switch.fp32_precision == "ieee":
            return False
    return bool(switch.allow_tf32)


def _from_environment(op: str) -> str | None:
    value = os.environ.get(ENVIRONMENT, "").strip()
    if not value or value == "auto":
        return None
    if "=" not in value:
        return value
    chosen = {}
    for part in value.split(","):
        name, equals, backend = (word.strip() for word in part.partition("="))
        if name not in (*TABLES, op) or not equals:
            raise ValueError(f"{ENVIRONMENT} has {part.strip()!r}; expected OPERATOR=BACKEND of {', '.join(TABLES)}")
        chosen[name] = backend
    return chosen.get(op)
