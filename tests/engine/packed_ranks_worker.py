"""What each rank of the packed gradient cache's tests does: vision-language models over DDP, FSDP2 and ZeRO.

A rank may have images of several sizes, videos, or nothing but text; ranks have unequal numbers of micro-batches.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rime_fast.engine.grad_cache import GradCache
from rime_fast.engine.packed_batch import PackedBatch, PackedEncoder, part_tokens
from rime_fast.engine.wrappers import grad_sync
from rime_fast.model.dual_mode import DualModeModel
from rime_fast.model.tiny import tiny_model
from rime_fast.model.tiny_batch import tiny_batch
from rime_fast.ops.contrastive import contrastive_loss

TERMS = [("disc", "disc", 1.0), ("gen", "gen", 1.0), ("gen", "disc", 0.5), ("disc", "gen", 0.5)]
# query and target of each pair
PAIRS = [
    ([3, ("image", 4, 6), 8], [12]),
    ([2, ("image", 4, 4), 3, ("image", 8, 4), 6], [5, ("image", 6, 4), 4]),
    ([9, 7], [17]),
    ([4, ("video", 2, 4, 4), 9], [21]),
    ([2, ("image", 4, 4), 2, ("video", 3, 4, 6), 5], [3, ("video", 1, 4, 4), 3]),
    ([7, 3], [6]),
]
# Which pairs a rank has. The last of two ranks has one micro-batch, of text; so has the third of four.
SHARES = {1: [[0, 1, 2, 3, 4, 5]], 2: [[0, 1, 2, 3, 4], [5]], 4: [[0, 2], [1, 4], [5], [3]]}
TOKENS = 30


def make(family: str, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """The model, and the batch of all ranks."""
    model = tiny_model(
        family, vocab_size=160, seed=1, init_std=0.12, hidden=32, layers=3, vision_hidden=16, dtype=dtype
    )
    batch = tiny_batch(model.config, [query for query, _ in PAIRS] + [target for _, target in PAIRS])
    for key in ("pixel_values", "pixel_values_videos"):
        batch[key] = batch[key].to(dtype)
    draw = torch.Generator().manual_seed(2)
    batch["token_weight"] = torch.rand(batch["targets"].shape, generator=draw) * (batch["targets"] >= 0) / 20
    return DualModeModel.from_model(model).train(), batch


def contrast(rows: dict[str, Tensor], group: object = None) -> Tensor:
    n = rows["disc"].shape[0] // 2
    queries, keys = ({m: x[part] for m, x in rows.items()} for part in (slice(n), slice(n, None)))
    return contrastive_loss(queries, keys, terms=TERMS, temperature=0.1, group=group, backend="reference").loss


class Case:
    """The model, this rank's share, and what one process with the whole batch computes (fp64)."""

    def __init__(self, family: str = "qwen2_vl", dtype: torch.dtype = torch.float64) -> None:
        self.model, batch = make(family, dtype)
        wide, whole = make(family, torch.float64)
        wide.load_state_dict(self.model.state_dict())
        whole = whole | {k: x.double() for k, x in batch.items() if k.startswith("pixel")}
        out = wide(**whole, logprob_backend="reference")
        loss = out.loss + contrast(out.embeddings)
        loss.backward()
        self.loss, self.truth = float(loss.detach()), {name: p.grad for name, p in wide.named_parameters()}
        own = SHARES[dist.get_world_size()][dist.get_rank()]
        self.batch = PackedBatch(batch).take([*own, *(i + len(PAIRS) for i in own)])

    def step(self, model: nn.Module, sync: Any, keep: float = 0.0) -> float:
        """One step of this rank; the global loss. keep: tokens whose graphs are kept beside the last micro-batch's."""
        world = dist.get_world_size()
        batch = self.batch | {"token_weight": self.batch["token_weight"] * world}
        encoder = PackedEncoder(model, batch, TOKENS, logprob_backend="reference")

        def loss(rows: dict[str, Tensor]) -> Tensor:
            value = contrast(encoder.in_order(rows), dist.group.WORLD)
            return value * world - value.detach() * (world - 1)

        cache = GradCache(encoder, loss, sync=sync, keep_bytes=keep, cost=part_tokens)
        cache.bytes_per_cost = 1.0
        total = cache.step(encoder.parts).loss / world
        dist.all_reduce(total)
        return float(total)

    def check(self, found: dict[str, Tensor | None], loss: float, bound: float) -> None:
        """Every trained parameter's gradient and the loss against the one process."""
        assert abs(loss - self.loss) <= 10 * bound * self.loss, (loss, self.loss)
        compared = 0
        for name, gradient in found.items():
            if gradient is not None:
                error = float((gradient.double() - self.truth[name]).norm() / self.truth[name].norm())
                assert error <= bound, f"{name}: {error:.1e}"
                compared += 1
        assert compared > 20


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """Whole gradients by the stock names; they are cleared."""
    found = {}
    for name, p in model.named_parameters():
        gradient = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        found[name.removeprefix("module.")] = gradient
        p.grad = None
    return found


def freeze_trunk(model: Any) -> None:
    for name, p in model.model.visual.named_parameters():
        p.requires_grad_("merger" in name)


def ddp(family: str = "qwen2_vl") -> None:
    """A trained tower, a frozen one; checkpointed layers."""
    case = Case(family)
    for frozen, checkpointed in ((False, False), (True, True)):
        model = copy.deepcopy(case.model)
        if frozen:
            freeze_trunk(model)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        wrapped = DistributedDataParallel(model)
        for keep in (0, 40, math.inf):
            loss = case.step(wrapped, grad_sync(wrapped), keep)
            case.check(gradients(wrapped), loss, 1e-10)


def lora() -> None:
    """Under DDP, with dropout: the replayed passes give the plain step's gradients to the bit."""
    from peft import LoraConfig, get_peft_model

    case = Case()
    torch.manual_seed(4)  # the same adapter on every rank
    config = LoraConfig(
        r=4, lora_dropout=0.3, target_modules=["q_proj", "v_proj"], init_lora_weights=False, modules_to_save=["merger"]
    )
    model = get_peft_model(case.model, config).train()
    wrapped = DistributedDataParallel(model)
    case.step(wrapped, grad_sync(wrapped))  # DDP lays out its buckets anew after this one: other orders of summation
    gradients(wrapped)
    found = []
    for keep, seed in ((math.inf, 0), (0, 0), (40, 0), (0, 1)):
        torch.manual_seed(100 * seed + dist.get_rank())
        case.step(wrapped, grad_sync(wrapped), keep)
        found.append({name: gradient for name, gradient in gradients(wrapped).items() if gradient is not None})
    plain, *replayed, other = found
    assert len(plain) > 8
    for name, want in plain.items():
        assert all(torch.equal(again[name], want) for again in replayed), name
    assert any((other[name] - want).norm() > 1e-3 * want.norm() for name, want in plain.items())


def fsdp2(family: str = "qwen2_vl") -> None:
    """A unit for each layer of the language model and each block of the tower; a trained tower, a frozen one."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    case = Case(family)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for frozen in (False, True):
        model = copy.deepcopy(case.model)
        if frozen:
            freeze_trunk(model)
        for part in (*model.model.visual.blocks, *model.model.language_model.layers, model):
            fully_shard(part, mesh=mesh)
        for keep in (0, 40, math.inf):
            loss = case.step(model, grad_sync(model), keep)
            case.check(gradients(model), loss, 1e-10)


def zero(stage: int) -> None:
    """DeepSpeed (fp32), a trained tower and a frozen one."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    case = Case(dtype=torch.float32)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    for frozen in (False, True):
        model = copy.deepcopy(case.model)
        if frozen:
            freeze_trunk(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        for keep in (0, 40):
            loss = case.step(engine, grad_sync(engine), keep)
            found = {
                name.removeprefix("module."): safe_get_full_grad(p) if p.requires_grad else None
                for name, p in engine.named_parameters()
            }
            case.check(found, loss, 1e-5)
            engine.step()


SCENARIOS: dict[str, Callable[[], None]] = {
    "ddp": ddp,
    "lora": lora,
    "fsdp2": fsdp2,
    "ddp_windows": lambda: ddp("qwen2_5_vl"),
    "fsdp2_deepstack": lambda: fsdp2("qwen3_vl"),
    "zero1": lambda: zero(1),
    "zero2": lambda: zero(2),
    "zero3": lambda: zero(3),
}


def run_packed(rank: int, world: int, *names: str) -> None:
    for name in names:
        SCENARIOS[name]()
