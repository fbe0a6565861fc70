"""Rollouts: each prompt is read once, its G rewrites are decoded together, ``<gen_emb>``'s state comes with them; and
who decodes them: the policy itself, or a server that stands in for it (``rime_fast.engine.vllm_backend``).

A backend gives the tokens of G responses a prompt. Embeddings come from the update's own forward, so a backend that
knows nothing but text generation will do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rime_fast.data.records import Side
from rime_fast.engine.decode import DecodeCache, DecodeStep, PrefillRecorder, choose_decoder
from rime_fast.engine.packed_batch import PackedBatch
from rime_fast.engine.rollout_buffer import RolloutBuffer
from rime_fast.engine.sampling import LoopGuard, check_sampling, draw_tokens
from rime_fast.engine.wrappers import dual_mode_of, is_gathered
from rime_fast.model.compiled import is_compiled
from rime_fast.model.packing import PACKED_SDPA
from rime_fast.model.vision import vision_features

_PROMPT_KEYS = (
    "input_ids",
    "lengths",
    "position_ids",
    "mm_token_type_ids",
    "pixel_values",
    "image_grid_thw",
    "pixel_values_videos",
    "video_grid_thw",
    "image_grids",
    "video_grids",
    "vision_cache",
)


@dataclass(frozen=True)
class Sampling:
    """How rollouts are drawn; the fields are the arguments of ``generate_rollouts``."""

    gen_id: int
    max_new_tokens: int
    group_size: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_limit: int = 0
    stop_ids: tuple[int, ...] | None = None
    suppress_ids: tuple[int, ...] = ()
    pad_id: int = 0


@torch.no_grad()
def generate_rollouts(
    model: nn.Module,
    prompt_batch: dict[str, Any],
    *,
    gen_id: int,
    max_new_tokens: int,
    group_size: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    generator: torch.Generator | None = None,
    stop_ids: Sequence[int] | None = None,
    pad_id: int = 0,
    suppress_ids: Sequence[int] = (),
    repetition_limit: int = 0,
    check_every: int | None = None,
    out: RolloutBuffer | None = None,
    decode: str = "auto",
) -> RolloutBuffer:
    """Decode ``group_size`` responses to each prompt of a packed batch (see the collator), each up to ``<gen_emb>``.

    temperature 0 is greedy and equals transformers' ``generate`` token for token; top_p and top_k as there.
    ``stop_ids``: other tokens that end a response, unfinished; default the generation config's ends of sequence.
    ``suppress_ids``: tokens that are never drawn, such as the placeholders of images, which only a prompt may hold;
    ``logp`` stays that of the model itself.
    ``repetition_limit``: a response that says the same 1 to 16 tokens this many times in a row ends there, unfinished;
    0: off. What is drawn before that is untouched, so log-probabilities stay the policy's own.
    A response has at most ``max_new_tokens`` tokens, the stop token included.
    ``check_every``: the host asks every so many steps which rows are done (the only wait for the device), and drops
    them then; default 1 on the CPU, 8 elsewhere. It changes the draws, since dropped rows draw nothing, never the
    distribution. With a seeded ``generator`` on the model's device the result is reproducible.
    ``decode``: how a step runs: "eager", "graph" (a CUDA graph), "compile" (torch.compile), or "auto": graph on CUDA,
    eager elsewhere; see ``rime_fast.engine.decode``.
    ``out``: a buffer of as many prompts, this group size and pad id, on the model's device; it is cleared and written
    in place. What is returned are views of it up to the longest response; disc_states is None without disc_index.

    A ``vision_cache`` in the batch is filled (or used) by the prefill, so that a frozen tower runs once for rollout,
    reference and policy: ``VisionCache(keep=True)``. Where parameters are sharded the prefill leaves it alone.

    Responses are text: their positions go on from the prompt's last row, as in training. The model runs in eval mode
    and is left as it was. Where parameters are sharded call it in ``whole_parameters``.
    """
    check_sampling(temperature, top_p, top_k)
    _check_counts(group_size, max_new_tokens, gen_id, pad_id)
    policy = dual_mode_of(model)
    if stop_ids is None:
        stop_ids = _end_ids(policy)
    with (
        _decoding(policy),
        _layers_as_written(policy, decode),
        _frozen_weights_cast_once(policy, prompt_batch["input_ids"].device),
    ):
        if out is None:
            out = buffer_for(policy, prompt_batch, group_size, max_new_tokens, pad_id)
        else:
            _check_buffer(out, len(prompt_batch["lengths"]), group_size, max_new_tokens, pad_id)
        state = _prefill(policy, prompt_batch, out.clear(), max_new_tokens, decode)
        check_every = check_every or (1 if out.tokens.device.type == "cpu" else 8)
        stops = torch.tensor([gen_id, *stop_ids]).to(out.tokens.device, non_blocking=True)
        guard = LoopGuard(len(state.done), repetition_limit, stops.device) if repetition_limit else None
        never = torch.tensor(list(suppress_ids), dtype=torch.int64).to(stops.device, non_blocking=True)
        for step in range(max_new_tokens):
            logits = state.step.logits()
            allowed = logits.index_fill(1, never, float("-inf")) if suppress_ids else logits
            token = draw_tokens(allowed, temperature, top_p, top_k, generator)
            state.write(step, token, logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(dim=-1))
            state.feed(token)
            state.close(token, stops)
            if guard is not None:
                state.done = state.done | guard.looping(token)
            if (step + 1) % check_every == 0 and state.all_done(guard):
                break
    return state.rollout(gen_id, prompt_batch.get("disc_index") is not None)


def buffer_for(policy: nn.Module, prompts: dict[str, Any], group_size: int, cap: int, pad_id: int) -> RolloutBuffer:
    """Make a new buffer for G rollouts of each prompt, of at most ``cap`` tokens."""
    return RolloutBuffer.make(
        prompts=len(prompts["lengths"]),
        group_size=group_size,
        max_tokens=cap,
        hidden=dual_mode_of(policy).config.get_text_config().hidden_size,
        device=prompts["input_ids"].device,
        pad_id=pad_id,
    )


def _check_buffer(out: RolloutBuffer, prompts: int, group_size: int, cap: int, pad_id: int) -> None:
    found = (out.prompts, out.group_size, out.pad_id)
    if found != (prompts, group_size, pad_id) or out.max_tokens < cap:
        raise ValueError(
            f"out has {found[0]} prompts, group size {found[1]}, pad id {found[2]} and room for {out.max_tokens} "
            f"tokens; expected {prompts}, {group_size}, {pad_id} and at least {cap}"
        )


def _check_counts(group_size: int, max_new_tokens: int, gen_id: int, pad_id: int) -> None:
    if group_size < 1:
        raise ValueError(f"group_size is {group_size}; expected at least 1")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
    if pad_id == gen_id:
        raise ValueError(f"pad_id is {pad_id}, the same as gen_id; expected another token")


def _end_ids(policy: Any) -> list[int]:
    ends = policy.generation_config.eos_token_id
    if ends is None:
        return []
    return [int(ends)] if isinstance(ends, int) else [int(i) for i in ends]


@contextmanager
def _decoding(policy: Any) -> Iterator[None]:
    """Eval mode and packed SDPA for the text model, whatever serves training; restored afterwards."""
    training = [m for m in policy.modules() if m.training]
    config = policy.model.language_model.config
    attention = config._attn_implementation
    policy.eval()
    config._attn_implementation = PACKED_SDPA
    try:
        yield
    finally:
        config._attn_implementation = attention
        for module in training:
            module.training = True


def _layers_as_written(policy: Any, decode: str) -> AbstractContextManager[None]:
    """Leave layers that were compiled for training alone: a decode step has shapes and a cache of its own."""
    stays = decode == "compile" or not is_compiled(policy)
    return nullcontext() if stays else torch.compiler.set_stance("force_eager")


@contextmanager
def _frozen_weights_cast_once(policy: Any, device: torch.device) -> Iterator[None]:
    """Under autocast, keep the low-precision copies of the text model's frozen fp32 weights while decoding.

    Autocast keeps those of weights that require gradients; others it would cast again in every step, at four times the
    memory traffic of the step itself. No gradient is recorded here, so the flag means nothing else.
    """
    frozen: list[nn.Parameter] = []
    if torch.is_autocast_enabled(device.type):
        parts = (policy.model.language_model, policy.lm_head)
        known = {id(p): p for part in parts for p in part.parameters()}
        frozen = [p for p in known.values() if not p.requires_grad and p.dtype == torch.float32]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        if frozen:
            torch.clear_autocast_cache()  # the copies are of no use to a forward with gradients


@dataclass
class _State:
    """Decoding in flight. ``out`` has a row per rollout; the others have one per row still in the cache."""

    cache: DecodeCache
    step: DecodeStep
    position: Tensor  # [N], the position of the next token
    done: Tensor  # [N] bool
    out: RolloutBuffer

    def write(self, step: int, token: Tensor, logp: Tensor) -> None:
        rows, out = self.cache.rows, self.out
        out.tokens[rows, step] = torch.where(self.done, out.pad_id, token)
        out.logp[rows, step] = torch.where(self.done, 0.0, logp)
        out.lengths.index_add_(0, rows, (~self.done).to(out.lengths.dtype))

    def feed(self, token: Tensor) -> None:
        """One step of the language model; afterwards the step's ``hidden`` is the state AT ``token``."""
        self.step.feed(token, self.position)
        self.position = self.position + 1

    def close(self, token: Tensor, stops: Tensor) -> None:
        """Keep the state of every row that was still open; the last one kept is that of the row's last token."""
        rows, states = self.cache.rows, self.out.gen_states
        states[rows] = torch.where(self.done[:, None], states[rows], self.step.hidden.float())
        self.done = self.done | (token[:, None] == stops).any(dim=1)

    def all_done(self, guard: LoopGuard | None) -> bool:
        """The one place where the host waits: reads which rows are done, drops them from the cache."""
        done = self.done.tolist()
        if all(done):
            return True
        kept = self.cache.keep(done)
        if kept is not None:
            self.step.keep(kept)
            self.position, self.done = (x.index_select(0, kept) for x in (self.position, self.done))
            if guard is not None:
                guard.keep(kept)
        return False

    def rollout(self, gen_id: int, with_disc: bool) -> RolloutBuffer:
        out = self.out
        torch.eq(out.tokens.gather(1, out.lengths[:, None] - 1)[:, 0], gen_id, out=out.finished)
        return out.trimmed(int(out.lengths.max()), disc=with_disc)


def _prefill(policy: Any, prompt_batch: dict[str, Any], out: RolloutBuffer, cap: int, decode: str) -> _State:
    """Read every prompt once, packed; then the state before the first token of every rollout."""
    prompt = {k: prompt_batch[k] for k in _PROMPT_KEYS if k in prompt_batch}
    if is_gathered(policy):
        # A rank without images does not fill its cache here, where no forward must be in step; later it must be.
        prompt.pop("vision_cache", None)
    lengths, device = prompt["lengths"], prompt["input_ids"].device
    decoder = choose_decoder(decode, device)
    recorder = PrefillRecorder(lengths, device)
    hidden = policy.encode_hidden(**prompt, layout=recorder)
    ends = (torch.tensor(lengths).cumsum(0) - 1).to(device, non_blocking=True)
    disc = prompt_batch.get("disc_index")
    if disc is not None:
        out.disc_states.copy_(hidden.index_select(0, disc))
    last = hidden.index_select(0, ends)
    position = prompt["position_ids"].amax(dim=0).index_select(0, ends) + 1
    start, first_logits, position = (
        x.repeat_interleave(out.group_size, dim=0) for x in (last, policy.lm_head(last).float(), position)
    )
    cache = DecodeCache(recorder, out.group_size, cap, static=decoder != "eager")
    return _State(
        cache=cache,
        step=DecodeStep(policy, cache, decoder, start, first_logits),
        position=position,
        done=torch.zeros(len(start), dtype=torch.bool, device=device),
        out=out,
    )


# --- who decodes -----------------------------------------------------------------------------------------------------


class RolloutBackend(Protocol):
    """Generates responses with the policy's current weights."""

    def refresh(self, policy: nn.Module) -> None:
        """Tell the backend that the policy's weights are whole on this rank and may have changed
        since the last call."""

    def generate(
        self,
        policy: nn.Module,
        sides: Sequence[Side],
        prompts: dict[str, Any],
        sampling: Sampling,
        out: RolloutBuffer | None = None,
    ) -> RolloutBuffer:
        """Generate G responses to each of the B prompts: ``sides`` and the packed batch ``prompts`` of the same
        prompts.

        Tokens, lengths, logp and finished will do, in tensors of its own or written into ``out``, a buffer for them.
        """


class LocalBackend:
    """The policy decodes by itself.

    at_once: rollouts decoded together (memory); None: all. decode, check_every: see ``generate_rollouts``.
    """

    def __init__(self, at_once: int | None = None, *, decode: str = "auto", check_every: int | None = None) -> None:
        if at_once is not None and at_once < 1:
            raise ValueError(f"at_once is {at_once}; expected a positive number of rollouts")
        if check_every is not None and check_every < 1:
            raise ValueError(f"check_every is {check_every}; expected a positive number of steps")
        self.at_once, self.options = at_once, {"decode": decode, "check_every": check_every}

    def refresh(self, policy: nn.Module) -> None:
        """Do nothing: the policy is the sampler."""

    def generate(
        self,
        policy: nn.Module,
        sides: Sequence[Side],
        prompts: dict[str, Any],
        sampling: Sampling,
        out: RolloutBuffer | None = None,
    ) -> RolloutBuffer:
        """Generate as ``RolloutBackend`` says; a prompt's G rollouts are never decoded apart. ``out`` gets
        ``gen_states``, too, and ``disc_states`` where the prompts have a ``disc_index``."""
        options = vars(sampling) | self.options
        count, group = len(prompts["lengths"]), sampling.group_size
        step = count if self.at_once is None else max(1, self.at_once // group)
        if step >= count:
            return generate_rollouts(policy, prompts, out=out, **options)
        if out is None:
            out = buffer_for(policy, prompts, group, sampling.max_new_tokens, sampling.pad_id)
        _see_once(policy, prompts)
        packed, longest = PackedBatch(prompts, dual_mode_of(policy).model.visual.spatial_merge_size), 0
        for first in range(0, count, step):
            chosen = range(first, min(count, first + step))
            into = out.part(first, len(chosen))
            rollout = generate_rollouts(policy, packed.take(chosen), out=into, **options)
            longest = max(longest, rollout.tokens.shape[1])
        return out.trimmed(longest, disc=prompts.get("disc_index") is not None)


@torch.no_grad()
def _see_once(policy: nn.Module, prompts: dict[str, Any]) -> None:
    """Fill the batch's vision cache, which parts of the batch then take their share of."""
    cache, model = prompts.get("vision_cache"), dual_mode_of(policy)
    pixels = [prompts[name] for name in ("pixel_values", "pixel_values_videos") if name in prompts]
    if cache is None or cache.filled or not pixels or is_gathered(model):
        return
    grids = [*prompts.get("image_grids", ()), *prompts.get("video_grids", ())]
    vision_features(model.model.visual, torch.cat(pixels), grids, cache)
