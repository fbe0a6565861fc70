"""RimeTrainer's step through the gradient cache: the contrast over a whole batch, the model over a part at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rime_fast.engine.grad_cache import Encoded, GradCache
from rime_fast.engine.grad_sync import GradSync, grad_sync
from rime_fast.engine.micro_batch import Batch
from rime_fast.engine.packed_encoder import PackedEncoder, Part, part_tokens
from rime_fast.recipe.joint import side_cross_entropy
from rime_fast.trainers.pair_loss import PairBatch, joint_metrics

if TYPE_CHECKING:
    from rime_fast.trainers.rime_trainer import RimeTrainer


class CachedTraining:
    """Takes the place of forward and backward in a training step (``micro_batch_tokens``)."""

    def __init__(self, trainer: RimeTrainer) -> None:
        args = trainer.args
        assert args.micro_batch_tokens is not None
        self.trainer, self.max_tokens = trainer, args.micro_batch_tokens
        self.cache = GradCache(keep_bytes=args.kept_graphs_gib * 2**30, cost=part_tokens)
        self._wrapped: nn.Module | None = None

    def step(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Forward and backward of one batch; the loss as ``Trainer.training_step`` returns it."""
        trainer = self.trainer
        args, group, world = trainer.args, trainer.group, max(trainer.args.world_size, 1)
        pairs = PairBatch.of(inputs, args, group)
        tau = args.temperature if trainer.temperature is None else trainer.temperature.value()
        metrics: dict[str, Tensor] = {}

        def token_loss(out: Any, part: Part, batch: Batch) -> dict[str, Tensor]:
            # a part's sequences ascend: its queries come first
            rows = sum(n for n, i in zip(batch["lengths"], part.sequences, strict=True) if i < pairs.n)
            found = side_cross_entropy(out.logp.detach(), rows, pairs.counts, world)  # type: ignore[arg-type]
            return {name.replace("_", "/"): value for name, value in found.items()}

        def contrast(rows: dict[str, Tensor]) -> Tensor:
            nothing = torch.zeros((), device=inputs["input_ids"].device)
            with trainer.compute_loss_context_manager():
                joint = pairs.joint(nothing, encoder.in_order(rows), args, tau, group)
            metrics.update(joint_metrics(joint, tau))
            return joint.total

        def encode(part: Part, scored: bool) -> Encoded:
            with trainer.compute_loss_context_manager():
                return encoder(part, scored)

        indexes = {f"{mode}_index": index for mode, index in pairs.pools.items()}
        encoder = PackedEncoder(
            model,
            pairs.model_inputs | indexes,
            self.max_tokens,
            modes=tuple(pairs.pools),
            metrics=token_loss,
            merge_size=trainer.collator.vision.merge_size,
            host_features=args.vision_features_on_host,
        )
        scale = 1.0 / trainer.current_gradient_accumulation_steps
        self.cache.sync = self._sync(model)
        done = self.cache.step(
            encoder.parts, encode=encode, loss=contrast, scale=scale, synchronise=trainer.accelerator.sync_gradients
        )
        trainer.observe(metrics | done.metrics, samples=pairs.n, tokens=inputs["input_ids"].shape[0])
        return done.loss * scale

    def _sync(self, model: nn.Module) -> GradSync:
        if self._wrapped is not model:
            accelerator = self.trainer.accelerator
            # transformers turns this division off for DeepSpeed; the scale above is the only one
            options = {"scale_wrt_gas": False} if hasattr(model, "zero_optimization_stage") else {}
            self._made = grad_sync(model, backward=lambda loss: accelerator.backward(loss, **options))
            self._wrapped = model
        return self._made
