"""A mixture's part of a joint run: its loader, and the figures of each set for the log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from rime_fast.data.mixture import MixtureDataset, MixtureSampler
from rime_fast.data.workers import worker_context


class MixtureRun:
    """The sampler of one rank, and per-set sums that stay on the device until they are logged.

    The global batch (``per_device_train_batch_size`` x ranks x accumulation rows) depends on the data seed and the step
    alone; see mixture.py. args: the run's RimeConfig.
    """

    def __init__(self, dataset: MixtureDataset, args: Any) -> None:
        ranks, accumulation = max(args.world_size, 1), args.gradient_accumulation_steps
        contrast = args.per_device_train_batch_size * ranks
        if args.contrast_scope == "block" and args.block % ranks:
            raise ValueError(f"block is {args.block}; with contrast_scope='block' expected a multiple of {ranks} ranks")
        self.dataset, self.args = dataset, args
        self.sampler = MixtureSampler(
            dataset,
            contrast * accumulation,
            block=args.block,
            seed=args.seed if args.data_seed is None else args.data_seed,
            rank=args.process_index,
            ranks=ranks,
            accumulation=accumulation,
        )
        self.sums = torch.zeros(len(dataset.labels), 3, device=args.device)

    def loader(self, dataset: Any, collate: Callable[[list[Any]], Any]) -> DataLoader[Any]:
        """This rank's micro-steps of the mixture, or what wraps it; not to be sharded again."""
        args = self.args
        return DataLoader(
            dataset,
            batch_sampler=self.sampler,
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=worker_context(
                args.dataloader_num_workers, args.dataloader_multiprocessing_context
            ),
        )

    def drain(self, step: int, group: dist.ProcessGroup | None) -> dict[str, float]:
        """Give the log its figures: loss and hit@1 of each set since the last call, its rows and
        passes since step 0."""
        if group is not None:
            dist.all_reduce(self.sums, group=group)
        batches, logs = self.sampler.batches, {}
        rows = batches.before(step) * batches.block
        for label, size, read, (loss, hits, count) in zip(
            self.dataset.labels, self.dataset.sizes.tolist(), rows.tolist(), self.sums.tolist(), strict=True
        ):
            logs[f"set/{label}/rows"], logs[f"set/{label}/passes"] = read, read / size
            if count:
                logs[f"set/{label}/loss"], logs[f"set/{label}/hit@1"] = loss / count, hits / count
        self.sums.zero_()
        return logs
