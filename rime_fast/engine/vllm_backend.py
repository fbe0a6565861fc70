"""vLLM as the decoder of rollouts (``pip install "rime-fast[vllm]"``).

The engine lives in this process, beside the policy; before each rollout phase it gets the policy's weights under their
checkpoint names. It renders and processes images by itself from the same text and PIL images as the collator. Its
log-probabilities are those of the raw model (vLLM's default ``logprobs_mode="raw_logprobs"``).

Without ``<gen_emb>`` states: the update's own forward makes them anyway.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rime_fast.data.records import Side, load_image
from rime_fast.data.templates import Template
from rime_fast.engine.rollout import Sampling
from rime_fast.engine.rollout_buffer import RolloutBuffer
from rime_fast.engine.sampling import cut_loops
from rime_fast.engine.wrappers import dual_mode_of

# vLLM clamps a logit's bias to this.
_NEVER = -100.0


class VllmBackend:
    """A ``RolloutBackend`` over a ``vllm.LLM``.

    llm: the engine, made from a checkpoint of the policy's architecture and vocabulary. template: the trainer's own.
    sampling_params: ``vllm.SamplingParams``; given in tests, imported otherwise (ImportError says what to install).
    """

    def __init__(self, llm: Any, template: Template, sampling_params: Any = None) -> None:
        if sampling_params is None:
            try:
                from vllm import SamplingParams
            except ImportError as error:
                raise ImportError('VllmBackend needs vLLM: pip install "rime-fast[vllm]"') from error
            sampling_params = SamplingParams
        self.llm, self.template, self.sampling_params = llm, template, sampling_params

    def refresh(self, policy: nn.Module) -> None:
        """Load the policy's weights into the engine and forget the keys and values of the old ones."""
        engine = self.llm.llm_engine.model_executor.driver_worker.model_runner.model
        engine.load_weights(checkpoint_weights(policy))
        self.llm.reset_prefix_cache()

    def generate(
        self,
        policy: nn.Module,
        sides: Sequence[Side],
        prompts: dict[str, Any],
        sampling: Sampling,
        out: RolloutBuffer | None = None,
    ) -> RolloutBuffer:
        """Generate as ``RolloutBackend`` says. Raises ValueError for a side with a video, which is not passed on to
        vLLM."""
        stops = sampling.stop_ids
        if stops is None:
            ends = dual_mode_of(policy).generation_config.eos_token_id
            stops = () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)
        parameters = self.sampling_params(
            n=sampling.group_size,
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            stop_token_ids=[sampling.gen_id, *stops],
            ignore_eos=True,  # the stops above are all there are
            logit_bias=dict.fromkeys(sampling.suppress_ids, _NEVER) or None,
            logprobs=0,  # of the sampled token alone
            skip_special_tokens=False,
            detokenize=False,
        )
        requests = [self._request(side) for side in sides]
        answers = self.llm.generate(requests, sampling_params=parameters, use_tqdm=False)
        completions = [completion for answer in answers for completion in answer.outputs]
        if len(completions) != len(sides) * sampling.group_size:
            raise ValueError(
                f"vLLM gave {len(completions)} responses; expected {sampling.group_size} for each of {len(sides)} sides"
            )
        found = _as_tensors(completions, sampling, prompts["input_ids"].device)
        if out is not None:
            out.take(found)
        return found

    def _request(self, side: Side) -> dict[str, Any]:
        if side.videos:
            raise ValueError(f"{side.name}: it has a video; VllmBackend takes text and images, use LocalBackend")
        request: dict[str, Any] = {"prompt": self.template.render_prompt(side)}
        if side.images:
            request["multi_modal_data"] = {"image": [load_image(source) for source in side.images]}
        return request


def checkpoint_weights(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Give (name, tensor) of every parameter as the stock checkpoint names it; an adapter's weights come merged in.

    The policy's parameters must be whole (gathered).
    """
    adapted: Any = policy if hasattr(policy, "merge_adapter") else None
    if adapted is not None:
        adapted.merge_adapter()
    try:
        for name, parameter in dual_mode_of(policy).named_parameters():
            if ".lora_" in name or ".original_module." in name or ".base_layer.lora" in name:
                continue
            name = name.replace(".base_layer", "").replace(".modules_to_save.default", "")
            yield name, parameter.detach()
    finally:
        if adapted is not None:
            adapted.unmerge_adapter()


def _as_tensors(completions: Sequence[Any], sampling: Sampling, device: torch.device) -> RolloutBuffer:
    longest = max(len(completion.token_ids) for completion in completions)
    tokens = torch.full((len(completions), longest), sampling.pad_id)
    logp = torch.zeros(len(completions), longest)
    for row, completion in enumerate(completions):
        ids = list(completion.token_ids)
        scores = [step[i].logprob for i, step in zip(ids, completion.logprobs, strict=True)]
        tokens[row, : len(ids)] = torch.tensor(ids)
        logp[row, : len(ids)] = torch.tensor(scores)
    lengths = torch.tensor([len(completion.token_ids) for completion in completions])
    tokens, lengths = cut_loops(tokens, lengths, sampling.repetition_limit, sampling.pad_id)
    logp = logp.masked_fill(torch.arange(longest) >= lengths[:, None], 0.0)
    finished = tokens.gather(1, lengths[:, None] - 1)[:, 0] == sampling.gen_id
    tokens, lengths, logp, finished = (x.to(device, non_blocking=True) for x in (tokens, lengths, logp, finished))
    return RolloutBuffer(tokens, lengths, logp, finished, group_size=sampling.group_size, pad_id=sampling.pad_id)
