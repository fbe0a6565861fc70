"""Contrastive loss over several embedding modes at once, over one process or a group (operators.md, B)."""

from rime_fast.ops.contrastive.op import ContrastiveOutput, contrastive_loss

__all__ = ["ContrastiveOutput", "contrastive_loss"]
