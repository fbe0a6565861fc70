"""What ``train`` and ``refine`` share: options to a trainer, the run, what is left in the output folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from rime_fast.cli.bars import quiet
from rime_fast.cli.command import model_exists
from rime_fast.cli.options import Group, UsageError
from rime_fast.cli.values import build
from rime_fast.model.card import write_card

LORA_TARGETS = r".*language_model\.layers\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
# The part of transformers' TrainingArguments that a first run needs; --help_all shows the rest.
COMMON = (
    "num_train_epochs",
    "max_steps",
    "gradient_accumulation_steps",
    "learning_rate",
    "weight_decay",
    "max_grad_norm",
    "bf16",
    "use_liger_kernel",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "eval_strategy",
    "eval_steps",
    "dataloader_num_workers",
    "seed",
    "run_name",
)


@dataclass
class TrainingOptions:
    """What is trained on what."""

    model: str = field(metadata={"help": "Directory or hub name of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL."})
    train_data: list[Any] = field(
        metadata={
            "help": "Pairs: files or folders of any format of docs/data.md; several join. In YAML also a list of sets "
            "{path, format, name, weight, max_rows, image_root}: a mixture."
        }
    )
    output_dir: str = field(default="runs/out", metadata={"help": "Folder of the model, checkpoints and report."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "'last' (the newest whole checkpoint of output_dir, if any) or one's folder."}
    )
    eval_data: str | None = field(
        default=None, metadata={"help": "Pairs for the evaluation loss (at eval_strategy's times, else at the end)."}
    )
    lora_rank: int = field(default=0, metadata={"help": "Train a LoRA of this rank; 0 trains the model itself."})
    lora_alpha: int = field(default=64, metadata={"help": "LoRA's alpha. [known, Think-Then-Embed: r 16, alpha 64]"})
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA's dropout."})
    lora_targets: str = field(
        default=LORA_TARGETS,
        metadata={"help": "Regular expression of the layers; default: attention and MLP of the language model."},
    )
    lora_dora: bool = field(
        default=False, metadata={"help": "DoRA: a magnitude beside the LoRA's direction. [known, Think-Then-Embed]"}
    )
    lora_rslora: bool = field(default=False, metadata={"help": "Scale by alpha / sqrt(rank) (rsLoRA). [ours, off]"})
    lora_modules_to_save: list[str] = field(
        default_factory=list,
        metadata={"help": "Modules trained whole and saved with the adapter: merger, embed_tokens. [ours: none]"},
    )
    lora_init: str | None = field(
        default=None,
        metadata={"help": "peft's init_lora_weights: 'gaussian' [known, Think-Then-Embed], 'pissa', ..."},
    )
    lora_4bit: bool = field(
        default=False,
        metadata={
            "help": "QLoRA: the language model in 4 bits (nf4, twice quantised, bf16; bitsandbytes). [ours, off]"
        },
    )
    report: bool = field(default=True, metadata={"help": "Write report.html with the curves at the end."})


def _data_name(source: Any) -> str:
    """A path, or what a set of a mixture is called."""
    return str(source.get("name") or source["path"]) if isinstance(source, dict) else str(source)


def groups(config: str, title: str, *parts: Group) -> tuple[Group, ...]:
    """The option groups of a trainer whose config class is ``config``, made of ``parts`` besides its own fields."""
    return (
        Group("Model and data", "rime_fast.cli.training", "TrainingOptions"),
        Group(title, "rime_fast.trainers.config", config),
        *parts,
        Group("Input, model loading, logging", "rime_fast.trainers.config", "CommonConfig"),
        Group("Training", "transformers.training_args", "TrainingArguments", only=COMMON),
    )


MORE = (Group("all of transformers' TrainingArguments", "transformers.training_args", "TrainingArguments"),)


def run_training(values: dict[str, Any], trainer_class: Any, config_class: Any, label: str) -> int:
    """Build config and trainer, train (or resume), save the model, its processor, the state and the report."""
    options = build(TrainingOptions, values)
    model_exists(options.model)
    args = build(config_class, values | {"output_dir": options.output_dir})
    _lora_goes_together(options)
    quiet()
    trainer = trainer_class(
        model=_in_4_bits(options, args) if options.lora_4bit else options.model,
        args=args,
        train_dataset=options.train_data,
        eval_dataset=options.eval_data,
        peft_config=_lora(options) if options.lora_rank else None,
    )
    trainer.again = "--resume_from_checkpoint {}".format
    trainer.train(resume_from_checkpoint=options.resume_from_checkpoint)
    if options.eval_data and args.eval_strategy == "no":
        trainer.evaluate()
    save_outputs(trainer, options, args, label)
    return 0


def _lora_goes_together(options: TrainingOptions) -> None:
    chosen = ("lora_dora", "lora_rslora", "lora_init", "lora_modules_to_save", "lora_4bit")
    if options.lora_rank == 0 and (stray := [name for name in chosen if getattr(options, name)]):
        raise UsageError(f"--{stray[0]} goes with --lora_rank; expected a rank above 0")


def _lora(options: TrainingOptions) -> Any:
    try:
        from peft import LoraConfig
    except ImportError:
        raise UsageError("--lora_rank needs peft; pip install 'rime-fast[peft]'") from None
    return LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=options.lora_targets,
        init_lora_weights=True if options.lora_init is None else cast(Any, options.lora_init),
        use_dora=options.lora_dora,
        use_rslora=options.lora_rslora,
        modules_to_save=options.lora_modules_to_save or None,
        task_type="CAUSAL_LM",
    )


def _in_4_bits(options: TrainingOptions, args: Any) -> Any:
    """The base model of QLoRA. The head, which is scored by its weight, and the vision tower stay whole."""
    if args.deepspeed or args.fsdp:
        raise UsageError("--lora_4bit goes without DeepSpeed and FSDP: weights of 4 bits are not sharded")
    if find_spec("bitsandbytes") is None:
        raise UsageError("--lora_4bit needs bitsandbytes; pip install bitsandbytes")
    import torch
    from transformers import BitsAndBytesConfig

    from rime_fast.model.dual_mode import DualModeModel

    chosen = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", "visual"],
    )
    return DualModeModel.from_pretrained(
        options.model,
        attn_implementation=args.attn_implementation,
        dtype=torch.bfloat16,
        quantization_config=chosen,
    )


def save_outputs(trainer: Any, options: TrainingOptions, args: Any, label: str) -> None:
    """Model and processor as a plain checkpoint (a LoRA merged in, itself under adapter/), state, report."""
    directory = Path(args.output_dir)
    # Trainer's own push would save an adapter's shards over the merged model
    pushes = args.push_to_hub and not (options.lora_rank and (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled))
    if options.lora_rank:
        trainer.save_model(str(directory / "adapter"), _internal_call=True)
        if trainer.is_world_process_zero():
            for name in ("adapter_config.json", "adapter_model.safetensors"):  # pushed from a checkpoint before
                (directory / name).unlink(missing_ok=True)
            card = trainer.facts()
            merged = _merged(trainer, directory / "adapter", anew=options.lora_4bit)
            merged.save_pretrained(directory)
            trainer.processing_class.save_pretrained(directory)
            write_card(directory, card)
            if pushes:
                trainer.model = merged
            elif args.push_to_hub:
                print(f"not pushed; when the run has ended: hf upload {trainer.hub_model_id} {directory}")
    else:
        trainer.save_model(str(directory), _internal_call=True)
    trainer.save_state()
    if trainer.is_world_process_zero():
        print(f"model: {directory}")
        if options.report:
            from rime_fast.eval.report import write_report

            phase = {"name": label.lower(), "label": label, "log_history": trainer.state.log_history}
            facts = {
                "model": options.model,
                "data": ", ".join(map(_data_name, options.train_data)),
                "steps": trainer.state.global_step,
            }
            report = {"title": f"{label}: {directory.name}", "facts": facts | {"seed": args.seed}, "phases": [phase]}
            print(f"report: {write_report(directory, report)[1]}")
    if pushes:
        trainer.push_to_hub(commit_message="Model save")


def _merged(trainer: Any, adapter: Path, *, anew: bool) -> Any:
    """The trained model with its adapter merged in: on this rank; read anew where ranks share the parameters, or the
    base is in 4 bits."""
    if not (anew or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        return trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from rime_fast.model.dual_mode import DualModeModel
    from rime_fast.trainers.setup import loading_dtype

    unset_hf_deepspeed_config()  # or ZeRO-3 would have every rank take part in the loading
    return DualModeModel.from_pretrained(adapter, dtype=loading_dtype(trainer.args))
