"""Decoding many rollouts of one prompt: the keys and values of the prompt are kept once, and a step is one launch.

In a decode step the G rollouts of a prompt meet its keys as one [G, S] product, each rollout then meets its own
tokens, and one softmax runs over both. Against a cache expanded to G this reads and holds G times less prompt.

Scores and softmax are fp32; probabilities meet the values in the values' dtype, as in flash-attention.

A static cache has its whole room from the start, and the place of the next token is a tensor: a decode step is then the
same operations on the same memory every time, which a CUDA graph or a compiler can record. Otherwise a step touches
only the tokens there are.

A step takes a token for every row and gives its last hidden state and the next token's logits:

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
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rime_fast.engine import fused_decode
from rime_fast.model.packing import PackedLayout, packed_layout

DECODERS = ("auto", "eager", "graph", "compile")
_FIRST_CAPACITY = 64

Outputs = tuple[Tensor, Tensor]  # hidden [N, H], logits [N, V] fp32
_Recorded = tuple[tuple[Tensor, Tensor], Outputs, Callable[[], None]]


class PrefillRecorder:
    """Attention of a packed prompt batch that keeps each layer's keys and values [T, kv heads, D]."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.layout: PackedLayout = packed_layout(lengths, device)
        self.longest = self.layout.longest
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, dropout: float
    ) -> Tensor:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        self.keys[layer] = key[0].transpose(0, 1).to(value.dtype)
        self.values[layer] = value[0].transpose(0, 1)
        return self.layout.attention(module, query, key, value, scale=scale, dropout=dropout)


class DecodeCache:
    """The cache of B prompts x G rollouts; rows are ordered prompt by prompt, N = B * G.

    ``rows`` [N]: which rollout of the caller each row is; it shrinks as finished rollouts are dropped (``keep``).
    Before each forward of one token a row, ``next_step`` must be called. ``static``: see above.
    """

    def __init__(self, prefill: PrefillRecorder, group_size: int, max_steps: int, *, static: bool = False) -> None:
        lengths = prefill.layout.lengths
        device = prefill.layout.device
        self.prompts, self.group = len(lengths), group_size
        self.longest = prefill.longest + max_steps
        self.step, self.max_steps = -1, max_steps
        self.rows = torch.arange(self.prompts * group_size, device=device)
        # Prompts are right-padded to the longest: slots from a prompt's length on are closed to its rollouts.
        host = torch.tensor(lengths)
        slots = torch.arange(prefill.longest)
        index = (host.cumsum(0) - host)[:, None] + torch.minimum(slots, host[:, None] - 1)
        self.lengths = host.to(device, torch.int32, non_blocking=True)
        self.closed: Tensor | None = None
        if min(lengths) != max(lengths):
            self.closed = (slots >= host[:, None])[:, None, None].to(device, non_blocking=True)
        flat = index.flatten().to(device, non_blocking=True)
        shape = (self.prompts, prefill.longest)

        def blocks(rows: Tensor) -> Tensor:  # [T, kv heads, D] -> [B, kv heads, S, D]
            return rows.index_select(0, flat).unflatten(0, shape).transpose(1, 2).contiguous()

        self.prompt_keys = {layer: blocks(rows) for layer, rows in prefill.keys.items()}
        self.prompt_values = {layer: blocks(rows) for layer, rows in prefill.values.items()}
        self.static = static
        self.capacity = max_steps if static else min(max_steps, _FIRST_CAPACITY)
        self.slots = torch.arange(self.capacity, device=device)
        self.at = torch.full((1,), -1, device=device)  # the step, where the device reads it
        self.own_keys = {layer: self._room(rows) for layer, rows in prefill.keys.items()}
        self.own_values = {layer: self._room(rows) for layer, rows in prefill.values.items()}

    def _room(self, rows: Tensor) -> Tensor:
        return rows.new_zeros(len(self.rows), rows.shape[1], self.capacity, rows.shape[2])

    def next_step(self) -> None:
        """Make room for one more token in every row."""
        self.step += 1
        if self.static:
            self.at += 1
        if self.step < self.capacity:
            return
        more = min(self.max_steps, 2 * self.capacity) - self.capacity
        if more <= 0:
            raise ValueError(f"the cache was made for {self.max_steps} steps; one more was asked for")
        for own in (self.own_keys, self.own_values):
            for layer, x in own.items():
                own[layer] = torch.cat([x, x.new_zeros(*x.shape[:2], more, x.shape[3])], dim=2)
        self.capacity += more

    def keep(self, done: Sequence[bool]) -> Tensor | None:
        """Drop finished rows where that saves at least half of them; ``done`` [N] on the host.

        The rest stays rectangular, as many rollouts a prompt as the prompt with most unfinished ones has; prompts
        with fewer keep some finished rows as filling. Returns the kept positions among the rows before (device), for
        the caller's own per-row tensors, or None when nothing changed.
        """
        groups = [done[i : i + self.group] for i in range(0, len(done), self.group)]
        left = [self.group - sum(g) for g in groups]
        prompts = [b for b, n in enumerate(left) if n]
        group = max(left, default=0)
        if not prompts or 2 * len(prompts) * group > len(done):
            return None
        # sorted() puts False (unfinished) first.
        chosen = [
            b * self.group + g for b in prompts for g in sorted(range(self.group), key=lambda g: groups[b][g])[:group]
        ]
        device = self.rows.device
        kept = torch.tensor(chosen).to(device, non_blocking=True)
        kept_prompts = torch.tensor(prompts).to(device, non_blocking=True)
        for cache in (self.own_keys, self.own_values):
            for layer, x in cache.items():
                cache[layer] = x.index_select(0, kept)
        if len(prompts) < self.prompts:
            for cache in (self.prompt_keys, self.prompt_values):
                for layer, x in cache.items():
                    cache[layer] = x.index_select(0, kept_prompts)
            self.closed = None if self.closed is None else self.closed.index_select(0, kept_prompts)
            self.lengths = self.lengths.index_select(0, kept_prompts)
        self.rows = self.rows.index_select(0, kept)
        self.prompts, self.group = len(prompts), group
        return kept

    def attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, dropout: float
    ) -> Tensor:
        """Attend with one new token a row: query [N, heads, 1, D], key and value [N, kv heads, 1, D] -> [N, 1, heads,
        D]."""
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        n, heads, _, width = query.shape
        kv = key.shape[1]
        shared = heads // kv
        own_keys, own_values = self.own_keys[layer], self.own_values[layer]
        key, value = key.to(own_keys.dtype), value.to(own_values.dtype)
        if self.static:
            used_keys = own_keys.index_copy_(2, self.at, key)
            used_values = own_values.index_copy_(2, self.at, value)
        else:
            own_keys[:, :, self.step], own_values[:, :, self.step] = key[:, :, 0], value[:, :, 0]
            used_keys, used_values = own_keys[:, :, : self.step + 1], own_values[:, :, : self.step + 1]
        with torch.autocast(query.device.type, enabled=False):
            query = query.to(own_keys.dtype).view(n, kv, shared, width)
            scores_prompt = _scores(self._together(query), self.prompt_keys[layer])
            scores_own = self._together(_scores(query, used_keys))
            scale = width**-0.5 if scale is None else scale
            if self.closed is not None:
                scores_prompt = scores_prompt.masked_fill(self.closed, float("-inf"))
            if self.static:
                scores_own = scores_own.masked_fill(self.slots > self.at, float("-inf"))
            split = (scores_prompt.shape[-1], scores_own.shape[-1])
            prompt, own = (torch.cat([scores_prompt, scores_own], -1) * scale).softmax(-1).split(split, -1)
            out = self._apart(prompt.to(own_values.dtype) @ self.prompt_values[layer])
            out = out + self._apart(own.to(own_values.dtype)) @ used_values
        return out.reshape(n, 1, heads, width)

    def _together(self, rows: Tensor) -> Tensor:
        """[B * G, kv, shared, X] -> [B, kv, G * shared, X]: the rollouts of a prompt side by side."""
        return rows.unflatten(0, (self.prompts, self.group)).transpose(1, 2).flatten(2, 3)

    def _apart(self, rows: Tensor) -> Tensor:
        """[B, kv, G * shared, X] -> [B * G, kv, shared, X]."""
        return rows.unflatten(2, (self.group, -1)).transpose(1, 2).flatten(0, 1)


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """query [.., .., Q, D] @ key [.., .., S, D]^T with an fp32 result."""
    if query.dtype == torch.float32:
        return query @ key.mT
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        flat = torch.bmm(query.flatten(0, 1), key.flatten(0, 1).mT, out_dtype=torch.float32)
        return flat.unflatten(0, query.shape[:2])
    return query.float() @ key.float().mT


def choose_decoder(name: str, device: torch.device) -> str:
    """Resolve the setting ``decoder``: "auto" is graph on CUDA, eager elsewhere. Raises ValueError for an unknown name,
    and for graph without CUDA."""
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
        self.recorded: _Recorded | None = None
        self.void: _Recorded | None = None

    def logits(self) -> Tensor:
        """Make the logits of each row's next token, [N, V] fp32."""
        if self._logits is None:
            self._logits = self.policy.lm_head(self.hidden).float()
        return self._logits

    def feed(self, token: Tensor, position: Tensor) -> Tensor:
        """Take the next token of every row and its position, [N] int64 each; returns ``hidden``."""
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
        self.hidden = self.hidden.index_select(0, kept)
        # The old graph lives until there is a new one: a memory pool that no graph uses is gone.
        self.void, self.recorded = self.recorded or self.void, None

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
        self.recorded, self.void = (inputs, outputs, replay), None
        return outputs


def next_hidden(policy: Any, cache: DecodeCache, token: Tensor, position: Tensor) -> Tensor:
    """Compute the last hidden state at ``token`` [N, H]. Writes the cache at its present place:
    twice changes nothing."""
    text_model = policy.model.language_model
    if fused_decode.why_not(text_model, cache) is None:
        embeds = policy.model.get_input_embeddings()(token)
        return fused_decode.next_hidden(text_model, cache, embeds, position)
    embeds = policy.model.get_input_embeddings()(token[:, None])
    positions = position[None, :, None].expand(3, -1, 1)
    out = text_model(input_ids=None, inputs_embeds=embeds, position_ids=positions, use_cache=False, rime_layout=cache)
    return out.last_hidden_state[:, 0]


def forward(policy: Any, cache: DecodeCache, token: Tensor, position: Tensor) -> Outputs:
    """Compute ``next_hidden`` and the logits of the token after it."""
    hidden = next_hidden(policy, cache, token, position)
    return hidden, policy.lm_head(hidden).float()


def compiled_forward() -> Callable[..., Outputs]:
    """Run ``forward`` by torch.compile, of the same code object every time: later phases find what is compiled."""
    return torch.compile(forward)


def graph_pool() -> Any:
    """The memory that the graphs of one phase share."""
    return torch.cuda.graph_pool_handle()


def record_graph(step: Callable[[], Outputs], pool: Any) -> tuple[Outputs, Callable[[], None]]:
    """Record ``step`` as a CUDA graph: the fixed memory of its outputs, and a call that fills them anew.

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
