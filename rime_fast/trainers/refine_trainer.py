"""RefineRLTrainer: rewrites are sampled, scored against stable anchors, and reinforced, as a transformers Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from rime_fast.data.collate import Collator
from rime_fast.engine.anchor_bank import AnchorBank
from rime_fast.engine.rollout_backend import LocalBackend, RolloutBackend, Sampling
from rime_fast.recipe.group_rewards import OPPOSITE, Rewarder
from rime_fast.recipe.refine import policy_loss
from rime_fast.trainers.anchors import anchor_bank, discriminative_rows, item_ids
from rime_fast.trainers.base import DualModeTrainer
from rime_fast.trainers.config import RefineConfig
from rime_fast.trainers.policy_batch import (
    PolicyBatch,
    separate_policy_batch,
    shared_policy_batch,
    use_packed_attention,
)
from rime_fast.trainers.reference import Reference
from rime_fast.trainers.rollout_batch import (
    IndexedPairs,
    PromptBatches,
    RepeatedBatches,
    Replay,
    sampled_responses,
)
from rime_fast.trainers.setup import as_pairs, prepare_model, whole_parameters


class RefineRLTrainer(DualModeTrainer):
    """Refine-RL (recipe, 4): G rewrites per prompt, rewards to discriminative anchors, clipped policy loss, KL.

        RefineRLTrainer("runs/sft", RefineConfig(output_dir="runs/rl"), train_dataset="rl.json").train()

    Arguments as ``RimeTrainer``, and ``rollout_backend``: who decodes (default: the policy). The pairs need no
    rewrites. Start from a jointly trained model: its discriminative embeddings are the anchors, computed once for the
    whole set and kept in ``output_dir``. A step is: rollout, one reference forward, one policy forward whose g is
    scored and whose log-probs are reinforced, one backward; a prompt's rows stand once for its G rewrites.
    """

    title = "Refine-RL"
    args: RefineConfig

    def __init__(
        self,
        model: Any,
        args: RefineConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        processor: Any = None,
        template: Any = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        rollout_backend: RolloutBackend | None = None,
        **kwargs: Any,
    ) -> None:
        args = RefineConfig(output_dir="refine-output") if args is None else args
        if not isinstance(args, RefineConfig):
            raise TypeError(f"args is {type(args).__name__}; expected RefineConfig")
        model, processor, tokens = prepare_model(model, processing_class or processor, args, peft_config)
        if args.fsdp:
            raise ValueError("fsdp is set: rollouts need whole parameters; use one process, DDP or DeepSpeed ZeRO")
        _no_dropout(model)
        if args.shared_prefix:
            use_packed_attention(model)
        self.rollout_backend = rollout_backend or LocalBackend(args.rollout_batch)
        self.tokenizer, self.gen_id = processor.tokenizer, tokens.gen_id
        self.trained = ("query", "target") if args.trained_sides == "both" else (args.trained_sides,)
        chosen = args.template if template is None else template
        self.collator = Collator(processor, chosen, model.config, max_length=args.max_length, ids=False)

        self.args, self.bad_rows = args, 0
        train = self._opened(train_dataset, "train")
        evaluation: Any = self._opened(None if isinstance(eval_dataset, dict) else eval_dataset, "eval")
        if isinstance(eval_dataset, dict):
            evaluation = {name: self._opened(part, f"eval-{name}") for name, part in eval_dataset.items()}
        opposite = args.reward_mode == "anchor" and args.anchors == "policy" and len(self.trained) == 1
        super().__init__(
            model=model, args=args, train_dataset=train, eval_dataset=evaluation, processing_class=processor,
            callbacks=callbacks, data_collator=PromptBatches(self.collator, self.trained, opposite), **kwargs,
        )  # fmt: skip
        self.reference = Reference(self.model, args.reference, args.beta)
        self.banks: dict[tuple[str, str], AnchorBank] = {}
        self.replays: list[Replay] = []
        self.micro_step = 0
        self.resuming = False
        self.rewarder = Rewarder(args.reward_weights(), self.trained, args.num_generations)
        self.add_callback(_BanksAtStart(self))

    def _opened(self, source: Any, name: str) -> Any:
        pairs, bad = as_pairs(source, name, self.args, self.collator, rewrites=False)
        self.bad_rows += bad
        return None if pairs is None else IndexedPairs(pairs, name)

    # --- anchors -----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As ``RimeTrainer.train``; first the anchors are computed, or read back when the run is resumed."""
        self.resuming = bool(resume_from_checkpoint)  # from here on the weights may be a checkpoint's
        self.replays, self.micro_step = [], 0
        if not self._sharded:
            self.make_banks(self.model)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As transformers' ``evaluate``: rewards and lengths of sampled rewrites on the evaluation pairs.

        The anchors of a dataset that the trainer was not made with are the current model's.
        """
        if eval_dataset is not None and not isinstance(eval_dataset, (str, IndexedPairs)):
            eval_dataset = self._opened(eval_dataset, f"given-{len(self.banks)}")
        self.make_banks(self.model, eval_dataset if isinstance(eval_dataset, IndexedPairs) else None)
        return super().evaluate(eval_dataset, *args, **kwargs)

    @property
    def _sharded(self) -> bool:
        """Whether a wrapper owns the parameters: a forward before training begins is then impossible."""
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    def make_banks(self, model: Any, more: IndexedPairs | None = None) -> None:
        """Compute the anchors that are not there yet, with ``model`` as it is now."""
        if self.args.anchors != "sft" or self.args.reward_mode != "anchor":
            return
        many = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        for pairs in (self.train_dataset, *many.values(), more):
            if pairs is None:
                continue
            for side in {OPPOSITE[name] for name in self.trained} - {s for n, s in self.banks if n == pairs.name}:
                self.banks[pairs.name, side] = self._make_bank(model, pairs, side).to(self.args.device)

    def _make_bank(self, model: Any, pairs: IndexedPairs, side: str) -> AnchorBank:
        path = Path(str(self.args.output_dir)) / "anchors" / f"{pairs.name}-{side}.safetensors"
        if self.resuming and self._sharded and not path.is_file():
            raise ValueError(f"{path} is missing: the anchors of the start cannot be made from a resumed policy")
        batch = max(self.args.per_device_eval_batch_size, self.args.per_device_train_batch_size)

        def encode() -> Tensor:
            return discriminative_rows(model, pairs.pairs, side, self.collator, batch, self.args.device, self.group)

        policy, ids = self.accelerator.unwrap_model(self.model), item_ids(pairs.pairs, side)
        with self.clock.paused():
            return anchor_bank(path, policy, ids, side, encode, resuming=self.resuming, save=self.args.should_save,
                               group=self.group)  # fmt: skip

    # --- the step ----------------------------------------------------------------------------------------------------

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False,
                     num_items_in_batch: Any = None) -> Any:  # fmt: skip
        """Rollout, reference, policy forward, reward in place, policy loss (first update on a batch); or the policy
        forward and loss on stored rollouts (later updates)."""
        replay = self._stored(inputs)
        responses = self._roll_out(inputs) if replay is None else replay.responses
        batch = self._policy_batch(inputs, responses)
        temperature = self.args.sampling_temperature
        policy = self.accelerator.unwrap_model(self.model)
        ref_logp = self.reference.logp(policy, batch.inputs, temperature) if replay is None else replay.ref_logp
        out = model(**batch.inputs, pools=batch.pools if replay is None else {}, temperature=temperature)
        metrics: dict[str, Tensor] = {}
        if replay is None:
            disc = batch.per_rollout(out.embeddings["disc"].detach())
            advantages = self._score(inputs, disc, out.embeddings["gen"].detach(), responses, metrics)
            if self.model.training and self.args.num_iterations > 1:
                self.replays.append(Replay(responses, out.logp.detach(), ref_logp, advantages))
        else:
            advantages = replay.advantages
        mask = batch.inputs["targets"] >= 0
        loss, found = policy_loss(
            out.logp,
            None if replay is None else replay.old_logp,
            ref_logp,
            advantages,
            mask,
            row=batch.rows,
            n_tokens=self._global_tokens(mask),
            clip_low=self.args.epsilon,
            clip_high=self.args.epsilon_high,
            beta=self.args.beta,
            loss_type=self.args.loss_type,
            max_completion_length=self.args.max_completion_length,
        )
        metrics |= {"policy_loss" if name == "policy" else name: value for name, value in found.items()}
        self.observe(metrics, samples=len(responses), tokens=batch.inputs["input_ids"].shape[0])
        return (loss, out) if return_outputs else loss

    def _policy_batch(self, inputs: dict[str, Any], responses: list[list[int]]) -> PolicyBatch:
        if self.args.shared_prefix:
            return shared_policy_batch(inputs["prompts"], responses)
        return separate_policy_batch(self.collator, inputs["sides"], responses, self.args.device)

    def _roll_out(self, inputs: dict[str, Any]) -> list[list[int]]:
        """G sampled rewrites of every prompt of the batch, as token lists."""
        args = self.args
        sampling = Sampling(
            gen_id=self.gen_id, group_size=args.num_generations, max_new_tokens=args.max_completion_length,
            temperature=args.sampling_temperature, top_p=args.top_p, top_k=args.top_k,
            repetition_limit=args.repetition_limit, pad_id=self.tokenizer.pad_token_id or 0,
            suppress_ids=(self.collator.image_id, self.collator.video_id),
        )  # fmt: skip
        policy = self.accelerator.unwrap_model(self.model)
        with whole_parameters(policy), self.accelerator.autocast():
            self.rollout_backend.refresh(policy)
            return sampled_responses(
                self.rollout_backend.generate(policy, inputs["sides"], inputs["prompts"], sampling)
            )

    def _score(self, inputs: dict[str, Any], disc: Tensor, gen: Tensor, responses: list[list[int]],
               metrics: dict[str, Tensor]) -> Tensor:  # fmt: skip
        """Rewards and advantages [rows] fp32 of this step's g, written in place by the operator; fills ``metrics``."""
        texts = self.tokenizer.batch_decode(responses, skip_special_tokens=False)
        format_ok = [self.collator.template.parse_response(text).format_ok for text in texts]
        unfinished = sum(response[-1] != self.gen_id for response in responses)
        sums = self.sums if self.model.training else self.eval_sums
        sums.count(format_failed=len(format_ok) - sum(format_ok), unfinished=unfinished)
        anchors = None
        if self.args.reward_mode == "anchor":
            anchors = {
                side: self._anchors(inputs, side, disc)
                for side in {OPPOSITE[name] for name in self.trained}
            }  # fmt: skip
        lengths = torch.tensor([len(response) for response in responses]).to(gen.device, non_blocking=True)
        ok = torch.tensor(format_ok).to(gen.device, non_blocking=True)
        return self.rewarder(gen, disc, anchors, ok, lengths, metrics, self.group)

    def _anchors(self, inputs: dict[str, Any], side: str, disc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(anchors [A, D], positive [B], ids [A, 2]) of ``side`` for this batch."""
        index = inputs["index"]
        if self.args.anchors == "sft":
            bank = self.banks[inputs["split"], side]
            if self.args.negatives == "bank":
                return bank.anchors, index, bank.ids
            rows, ids = bank.anchors.index_select(0, index), bank.ids.index_select(0, index)
        else:
            count, ids = len(index), inputs["ids"]
            if "opposite" in inputs:
                rows = self.model_wrapped(**inputs["opposite"]).embeddings["disc"]
            else:
                block = 0 if side == "query" else count
                group = self.args.num_generations
                rows = disc.view(-1, group, disc.shape[1])[block : block + count, 0]
                ids = ids[count:] if side == "query" else ids[:count]
        start = 0
        if self.group is not None:
            start = dist.get_rank(self.group) * len(rows)
            rows, ids = _gathered(rows, self.group), _gathered(ids, self.group)
        return rows, torch.arange(start, start + len(index), device=rows.device), ids

    def _global_tokens(self, mask: Tensor) -> Tensor | None:
        """Scored tokens of all ranks over the ranks (gradients are averaged), where the loss divides by them."""
        if self.args.loss_type != "token_mean" or self.group is None:
            return None
        tokens = mask.sum().float()
        dist.all_reduce(tokens, group=self.group)
        return tokens.clamp(min=1) / self.args.world_size

    # --- several updates per rollout batch ---------------------------------------------------------------------------

    def _stored(self, inputs: dict[str, Any]) -> Replay | None:
        """The rollouts of this micro-batch if an earlier update has made them; None when they are to be made."""
        if not self.model.training or self.args.num_iterations == 1:
            return None
        per_step = self.args.gradient_accumulation_steps
        at = self.micro_step % (per_step * self.args.num_iterations)
        self.micro_step += 1
        if at < per_step:
            if at == 0:
                self.replays = []
            return None
        return self.replays[at % per_step]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.args.num_iterations == 1 or dataset is None:
            return super()._get_train_sampler(train_dataset)
        rows = self.args.train_batch_size * self.args.gradient_accumulation_steps * max(self.args.world_size, 1)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return RepeatedBatches(len(dataset), rows, self.args.num_iterations, seed)

    def _replay_file(self, folder: str, i: int) -> Path:
        return Path(folder) / f"rollouts-{self.args.process_index}-{i}.safetensors"

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        for i, replay in enumerate(self.replays):
            tensors = {name: tensor.cpu().contiguous() for name, tensor in replay.tensors().items()}
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_file(tensors, self._replay_file(output_dir, i))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.args.num_iterations > 1:
            per_step = self.args.gradient_accumulation_steps
            self.micro_step = self.state.global_step * per_step
            files = [self._replay_file(checkpoint, i) for i in range(per_step)]
            self.replays = [Replay.from_tensors(load_file(f), self.args.device) for f in files if f.exists()]


class _BanksAtStart(TrainerCallback):
    """Where a wrapper owns the parameters, the anchors need it in place: they are made when training begins."""

    def __init__(self, trainer: RefineRLTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.make_banks(self.trainer.model_wrapped)


def _no_dropout(model: nn.Module) -> None:
    """Switch dropout off: one forward serves the reward and the update, and the ratio to itself is exactly 1."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


def _gathered(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's rows, rank after rank (all hold as many)."""
    everyone = rows.new_empty(dist.get_world_size(group) * rows.shape[0], *rows.shape[1:])
    dist.all_gather_into_tensor(everyone, rows.contiguous(), group=group)
    return everyone
