"""One step of decoding: a token for every row in, its last hidden state and the next token's logits out.

    eager    operation by operation, as a model's forward runs
    graph    recorded once as a CUDA graph and replayed: one launch instead of thousands. Recorded anew when finished
             rows have been dropped (at most log2 N times in a phase), since a graph has fixed shapes and memory
    compile  the same step through ``torch.compile``, and recorded as a graph on CUDA. Compilation takes its time, again
             for other shapes; the code is kept for later phases of the process

graph and compile need a static cache. Drawing the token and the bookkeeping stay outside: they are few operations, they
run ahead of the device, and the random generator needs no care.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rime_fast.engine.decode_cache import DecodeCache

DECODERS = ("auto", "eager", "graph", "compile")

Outputs = tuple[Tensor, Tensor]  # hidden [N, H], logits [N, V] fp32


def choose_decoder(name: str, device: torch.device) -> str:
    """ "auto": graph on CUDA, eager elsewhere. Raises ValueError for an unknown name, and for graph without CUDA."""
    if name not in DECODERS:
        raise ValueError(f"decode is {name!r}; expected one of {', '.join(DECODERS)}")
    if name == "graph" and device.type != "cuda":
        raise ValueError(f"decode is 'graph' and the model is on {device.type}; CUDA graphs need a CUDA device")
    if name == "auto":
        return "graph" if device.type == "cuda" else "eager"
    return name


class DecodeStep:
    """Runs ``policy`` over ``cache``; ``decoder`` as ``choose_decoder`` gives it.

    hidden [N, H]: the last hidden state at each row's newest token, at first that of the prompts' last tokens. Valid
    until the next ``feed``, as ``logits``.
    """

    def __init__(self, policy: Any, cache: DecodeCache, decoder: str, hidden: Tensor, logits: Tensor) -> None:
        if decoder != "eager" and not cache.static:
            raise ValueError(f"decode is {decoder!r} over a cache that grows; expected a static one")
        self.policy, self.cache, self.hidden = policy, cache, hidden
        self._logits: Tensor | None = logits
        self.compiled = compiled_forward() if decoder == "compile" else None
        self.recording = decoder == "graph" or (decoder == "compile" and cache.rows.is_cuda)
        self.pool: Any = None
        self.recorded: tuple[tuple[Tensor, Tensor], Outputs, Callable[[], None]] | None = None

    def logits(self) -> Tensor:
        """Of each row's next token, [N, V] fp32."""
        if self._logits is None:
            self._logits = self.policy.lm_head(self.hidden).float()
        return self._logits

    def feed(self, token: Tensor, position: Tensor) -> Tensor:
        """The next token of every row and its position, [N] int64 each; returns ``hidden``."""
        self.cache.next_step()
        if self.recording:
            self.hidden, self._logits = self._replayed(token, position)
        elif self.compiled is not None:
            self.hidden, self._logits = self.compiled(self.policy, self.cache, token, position)
        else:
            self.hidden, self._logits = next_hidden(self.policy, self.cache, token, position), None
        return self.hidden

    def keep(self, kept: Tensor) -> None:
        """Go on with the rows ``kept`` of the cache; what was recorded is void."""
        self._logits = None if self._logits is None else self._logits.index_select(0, kept)
        self.hidden, self.recorded = self.hidden.index_select(0, kept), None

    def _replayed(self, token: Tensor, position: Tensor) -> Outputs:
        if self.recorded is None:
            return self._record(token, position)
        inputs, outputs, replay = self.recorded
        for memory, new in zip(inputs, (token, position), strict=True):
            memory.copy_(new)
        replay()
        return outputs

    def _record(self, token: Tensor, position: Tensor) -> Outputs:
        """Record the step and run it for the first time. Where that fails: a warning, and eager steps from here on."""
        inputs = (token.clone(), position.clone())
        run = self.compiled or forward

        def step() -> Outputs:
            return run(self.policy, self.cache, *inputs)

        try:
            if self.pool is None:
                self.pool = graph_pool()
            outputs, replay = record_graph(step, self.pool)
        except RuntimeError as error:
            warnings.warn(f"the decode step could not be recorded as a CUDA graph: {error}", stacklevel=2)
            self.recording = False
            return step()
        replay()
        self.recorded = (inputs, outputs, replay)
        return outputs


def next_hidden(policy: Any, cache: DecodeCache, token: Tensor, position: Tensor) -> Tensor:
    """The last hidden state at ``token`` [N, H]. Writes the cache at its present place: twice changes nothing."""
    embeds = policy.model.get_input_embeddings()(token[:, None])
    positions = position[None, :, None].expand(3, -1, 1)
    out = policy.model.language_model(
        input_ids=None, inputs_embeds=embeds, position_ids=positions, use_cache=False, rime_layout=cache
    )
    return out.last_hidden_state[:, 0]


def forward(policy: Any, cache: DecodeCache, token: Tensor, position: Tensor) -> Outputs:
    """``next_hidden`` and the logits of the token after it."""
    hidden = next_hidden(policy, cache, token, position)
    return hidden, policy.lm_head(hidden).float()


def compiled_forward() -> Callable[..., Outputs]:
    """``forward`` by torch.compile, of the same code object every time: later phases find what is compiled."""
    return torch.compile(forward)


def graph_pool() -> Any:
    """Memory for the graphs of one phase."""
    return torch.cuda.graph_pool_handle()


def record_graph(step: Callable[[], Outputs], pool: Any) -> tuple[Outputs, Callable[[], None]]:
    """``step`` as a CUDA graph: the fixed memory of its outputs, and a call that fills them anew.

    It runs once beforehand on a side stream, where libraries set themselves up and autocast fills its cache of
    weights: the graph reads that, and is replayed inside the same autocast block. Other threads (a DataLoader that pins
    memory) may call CUDA meanwhile.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        outputs = step()
    return outputs, graph.replay
