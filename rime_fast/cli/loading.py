"""Options of commands that load a trained model to embed with it, and the loading."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rime_fast.eval.embedder import RimeEmbedder


@dataclass
class EmbedderOptions:
    """How a model is loaded and run."""

    template: str = field(
        default="rewrite",
        metadata={
            "help": "'rewrite', 'cot' or 'tte': the one the model was trained with; `eval --suite` also 'ume-r1'."
        },
    )
    token_budget: int = field(default=16384, metadata={"help": "Tokens of a batch; less needs less memory."})
    max_new_tokens: int = field(
        default=512, metadata={"help": "Longest rewrite; one cut short is counted and reported."}
    )
    max_length: int | None = field(default=None, metadata={"help": "Longest prompt; a longer one is an error."})
    max_pixels: int | None = field(default=None, metadata={"help": "Shrink images to at most this many pixels."})
    max_image_pixels: int = field(
        default=89_478_485, metadata={"help": "An image of more pixels is an error; it is never decoded."}
    )
    image_root: str | None = field(
        default=None, metadata={"help": "Folder of relative image paths; default: the data file's own."}
    )
    allow_outside: bool = field(
        default=False,
        metadata={"help": "Open image paths that lead out of the image root (absolute ones, or by ..)."},
    )
    device: str | None = field(
        default=None, metadata={"help": "'cuda', 'cuda:1', 'cpu'; default: CUDA when there is one."}
    )
    dtype: str = field(
        default="auto",
        metadata={"help": "'auto' (the checkpoint's; float32 on a CPU), 'float32', 'bfloat16', 'float16'."},
    )
    attn_implementation: str = field(
        default="auto", metadata={"help": "'auto': flash-attention when installed (CUDA), else SDPA."}
    )


def load_embedder(path: str, options: EmbedderOptions) -> RimeEmbedder:
    """Load the embedder of the model at ``path`` (directory or hub name), for every command that embeds."""
    import torch

    from rime_fast.cli.bars import quiet
    from rime_fast.cli.options import UsageError
    from rime_fast.eval.embedder import RimeEmbedder

    dtypes: dict[str, Any] = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
    if options.dtype not in ("auto", *dtypes):
        raise UsageError(f"--dtype is {options.dtype!r}; expected auto, {', '.join(dtypes)}")
    quiet()
    return RimeEmbedder.from_pretrained(
        path,
        device=options.device,
        dtype=dtypes.get(options.dtype, "auto"),
        attn_implementation=options.attn_implementation,
        max_pixels=options.max_pixels,
        template=options.template,
        token_budget=options.token_budget,
        max_new_tokens=options.max_new_tokens,
        max_length=options.max_length,
        max_image_pixels=options.max_image_pixels,
    )
