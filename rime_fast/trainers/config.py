"""Settings of the two trainers: transformers' TrainingArguments plus the recipe's own.

Defaults follow the recipe. In the help texts [known] marks what is published (the source is named) and [ours] what the
RIME paper does not publish: a documented choice of this project, not the authors' setting.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass, replace

import torch
from transformers import TrainingArguments

from rime_fast.engine.launch import deepspeed_config, other_accelerator, shard_checkpoints, start_alone, tell_deepspeed
from rime_fast.ops.reward import RewardWeights
from rime_fast.recipe import settings as parts
from rime_fast.recipe.joint import JointWeights
from rime_fast.recipe.refine import LOSS_TYPES
from rime_fast.recipe.settings import check_stock, in_range, one_of, option

ON_BAD_ROW = ON_NONFINITE = ("stop", "skip")
PROGRESS = ("rich", "plain", "none")
SIDES = ("both", "query", "target")
ANCHORS = ("sft", "policy")
REFERENCES = ("auto", "adapter", "copy", "none")
STORAGE = ("device", "host", "sharded")
# Refine-RL's settings that are at least this
AT_LEAST = {"num_generations": 1, "max_completion_length": 2, "top_k": 0, "epsilon_high": 0, "beta": 0}
AT_LEAST |= {"num_iterations": 1, "refill_degenerate": 0, "micro_batch_tokens": 1, "rollout_batch": 1}


@dataclass
class CommonConfig(TrainingArguments):
    """The settings that both trainers share: model, data, logging. Works as it is on a CPU and on a GPU."""

    template: str = option(
        "rewrite",
        "Prompt and response format: 'rewrite' (<rewrite>TEXT</rewrite>, [ours]), 'cot' (<think>..</think><answer>.., "
        "[known, UME-R1]) or 'tte' (a reasoning trace, no embedding tokens, [known, Think-Then-Embed]).",
    )
    max_length: int | None = option(
        12288, "Longest sequence in tokens, prompt and response; a longer row is a bad row. [known, UME-R1]"
    )
    max_pixels: int | None = option(
        None, "Images are shrunk to at most this many pixels. None keeps the processor's own limit. UME-R1: 2,359,296."
    )
    image_root: str | None = option(None, "Folder of relative image paths; None: the data file's own folder.")
    allow_outside: bool = option(
        False, "Open image paths that lead out of the image root (absolute ones, or by ..). For trusted files."
    )
    allow_urls: bool = option(False, "Open image paths like https:// and s3:// (by fsspec).")
    max_image_pixels: int = option(89_478_485, "An image of more pixels is a bad row; it is never decoded.")
    video_frames: int | None = option(
        None, "Frames taken of each video file, evenly; None: video_fps a second. [known, VLM2Vec-V2: 8]"
    )
    video_fps: float = option(2.0, "Frames a second taken of video files, and the rate of frame lists. [ours: Qwen's]")
    max_video_frames: int = option(64, "Most frames taken of a video file. [ours: Qwen3-VL-Embedding's]")
    check_data: bool = option(
        True,
        "Look at every row before step 1 (no image is decoded). Off for rows made on the fly; a resumed run then "
        "compares a part of a file's or list's rows only.",
    )
    on_bad_row: str = option(
        "stop",
        "Data with bad rows: 'stop' before step 1 with the list, or 'skip' and count them. A row that breaks later (an "
        "image's data): stop with a checkpoint, or count it and take the next good row in its place.",
    )
    on_nonfinite: str = option(
        "stop",
        "A step whose loss or gradient is not finite: 'stop' before the optimizer takes it, with step, rows and terms; "
        "or 'skip' and count it.",
    )
    overwrite_output_dir: bool = option(
        False, "Train into an output_dir that holds a run; its checkpoints are removed when training begins."
    )
    accept_changes: bool = option(
        False, "Resume although data, settings or model differ from the checkpoint's; the differences are named."
    )
    trust_checkpoint: bool = option(
        False, "Resume from pickles (DeepSpeed's, sharded ones) that lie outside of output_dir: they can run any code."
    )
    async_save: bool = option(
        False, "FSDP2: each rank writes its shards of a checkpoint while training goes on; the final model is whole."
    )
    freeze_vision: bool = option(True, "Freeze the vision tower, train the merger and the LLM. [known, UME-R1]")
    attn_implementation: str = option(
        "auto", "'auto': flash-attention when installed (CUDA), else SDPA. Used when the model is a path."
    )
    model_dtype: str = option(
        "auto",
        "Dtype a model path is loaded in: 'auto' (float32, so that the optimizer's weights are; autocast computes "
        "in bf16 where bf16=True), 'float32', 'bfloat16', 'float16'.",
    )
    progress: str = option(
        "rich", "'rich': bar with loss terms, samples/s, tokens/s, ETA; 'plain': a line a log; 'none'."
    )

    # TrainingArguments' own, with the recipe's or this trainer's defaults, or words of what they do here
    deepspeed: dict | str | None = option(  # noqa: RUF009
        None, "DeepSpeed: 'zero1', 'zero2' or 'zero3' of the package, a JSON file, or a mapping. Start it by torchrun."
    )
    fsdp: bool | None = option(None, "FSDP2 spreads the model over the ranks; by torchrun.")  # type: ignore[assignment]
    gradient_checkpointing: bool = option(False, "Compute activations anew in the backward: less memory, more time.")
    lr_scheduler_type: str = option("cosine", "[known, UME-R1: cosine]")
    warmup_steps: float = option(0.03, "Steps, or below 1 the share of all steps. [known, UME-R1: 3 %]")
    logging_steps: float = option(10, "Metrics gather on the device and are read only at these steps.")
    logging_nan_inf_filter: bool = option(False, "Off: it reads the loss back every step, and hides a NaN.")
    remove_unused_columns: bool = option(False, "Must stay off: the collator reads raw rows.")
    report_to: None | str | list[str] = option(  # noqa: RUF009, RUF036 (HfArgumentParser wants None first)
        "none", "'tensorboard', 'wandb', ...: transformers' loggers get every metric."
    )

    def __post_init__(self) -> None:
        if not self.use_cpu and not torch.cuda.is_available() and not other_accelerator():
            self.use_cpu = True
        if getattr(self, "activation_checkpointing", False) is None:  # its later name; transformers warns of ours
            self.activation_checkpointing = self.gradient_checkpointing
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns is True; this trainer's collator needs the raw rows, leave it off")
        one_of("on_bad_row", self.on_bad_row, ON_BAD_ROW)
        one_of("on_nonfinite", self.on_nonfinite, ON_NONFINITE)
        one_of("progress", self.progress, PROGRESS)
        check_stock(self)
        for name, value, off in (
            ("neftune_noise_alpha", self.neftune_noise_alpha, None),
            ("label_smoothing_factor", self.label_smoothing_factor, 0.0),
        ):
            if value != off:
                raise ValueError(f"{name} is {value!r}; the losses of these trainers know nothing of it, leave it out")
        if self.train_sampling_strategy == "group_by_length":
            raise ValueError(
                "train_sampling_strategy is 'group_by_length'; packed batches need no equal lengths, and a contrast "
                "wants mixed ones: expected 'random' or 'sequential'"
            )
        if self.on_nonfinite == "skip" and (self.deepspeed or self.fp16):
            raise ValueError(
                "on_nonfinite is 'skip', but DeepSpeed and fp16's loss scale take or leave a step by themselves; "
                "expected 'stop' there"
            )
        one_of("model_dtype", self.model_dtype, ("auto", "float32", "bfloat16", "float16"))
        if self.max_length is not None:
            in_range("max_length", self.max_length, 8)
        if self.max_pixels is not None:
            in_range("max_pixels", self.max_pixels, 1)
        in_range("max_image_pixels", self.max_image_pixels, 1)
        in_range("video_fps", self.video_fps, 0, open_low=True)
        in_range("max_video_frames", self.max_video_frames, 1)
        if self.video_frames is not None:
            in_range("video_frames", self.video_frames, 1)
        if self.use_liger_kernel:
            if self.use_cpu:
                raise ValueError("use_liger_kernel is True; Liger's kernels need a CUDA device, this run is on the CPU")
            # RMSNorm, RoPE and SwiGLU only: the cross-entropy is our own operator's
            own = {"cross_entropy": False, "fused_linear_cross_entropy": False}
            self.liger_kernel_config = {**(self.liger_kernel_config or {}), **own}
        if self.deepspeed:
            self.deepspeed = deepspeed_config(self.deepspeed)
            if line := start_alone():
                print(line, file=sys.stderr)
        # our own bar replaces tqdm's; transformers' printer is replaced as well (trainers/callbacks.py)
        self.disable_tqdm = True
        super().__post_init__()
        if self.deepspeed:
            tell_deepspeed()
        if self.async_save:
            shard_checkpoints(self.fsdp_plugin_args, self.hub_strategy if self.push_to_hub else None)
        if self.use_cpu:
            self.dataloader_pin_memory = False


@dataclass
class RimeConfig(
    parts.ObjectiveSettings, parts.LatentSettings, parts.DistillSettings, parts.ContrastSettings, CommonConfig
):
    """The settings of joint training (SFT): cross-entropy on both sides, contrast in both modes, Cross-Mode Alignment.

    The batch of a step (all ranks) is the set of in-batch negatives: make it as large as memory allows.
    """

    ce_query_weight: float = option(1.0, "Next-token loss of the query's rewrite. [known: 1]")
    ce_target_weight: float = option(1.0, "Next-token loss of the target's rewrite. [known: 1]")
    disc_weight: float = option(1.0, "Contrast d-d, discriminative mode. [known, UME-R1: 1]")
    gen_weight: float = option(1.0, "Contrast g-g, generative mode. [known, UME-R1: 1]")
    cross_weight: float = option(
        1.0, "Cross-Mode Alignment: half g-d, half d-g; 0: off. [known: idea; ours: form, weight]"
    )
    same_item_weight: float = option(0.0, "Contrast of g against d of the same side, half per side. [ours, off]")

    block: int = option(
        0,
        "Of a mixture (train_data as a list of sets): rows of one set that stand together in the global batch; 0 mixes "
        "row by row. Divides the pairs of one contrast. [known, VLM2Vec-V2 and Think-Then-Embed: 512]",
    )
    contrast_scope: str = option(
        "global",
        "Which pairs are each other's negatives: 'global' all of one contrast, 'block' those of one of its blocks.",
    )
    contrastive_batch_size: int | None = option(
        None,
        "Pairs in one contrast, all ranks together: any number, through the gradient cache. Sets "
        "per_device_train_batch_size to each rank's share. None: what the ranks' batches add up to. [ours]",
    )
    micro_batch_tokens: int | None = option(
        None,
        "Tokens that go through the model at a time (gradient cache); the batch may be larger. None: the whole "
        "batch, or 16384 where contrastive_batch_size is set. [ours]",
    )
    kept_graphs_gib: float = option(
        0.0,
        "Memory (GiB a rank) for graphs that the gradient cache keeps from its first pass, so that these "
        "micro-batches are not encoded twice. 0: only the last one's, which costs nothing. [ours]",
    )
    peak_tflops: float | None = option(
        None,
        "Dense TFLOP/s of one device in the dtype of training, which MFU and HFU are shares of. None: known for "
        "A100, H100, H200, B200, L40S in bf16; elsewhere neither is logged. [ours]",
    )
    vision_features_on_host: bool = option(
        False,
        "Keep a frozen vision tower's features in (pinned) host memory between the gradient cache's passes. [ours]",
    )

    learning_rate: float = option(5e-5, "Peak learning rate. [known, UME-R1: 5e-5]")
    per_device_train_batch_size: int = option(8, "Pairs per device and step.")

    def __post_init__(self) -> None:
        if self.template == "tte" and self.latent_tokens:
            raise ValueError("latent_tokens stand behind <disc_emb>; template 'tte' has none")
        self.check_objective()
        self.check_latents()
        self.check_distillation()
        self.weights()  # raises, naming the weight
        self.check_contrast()
        in_range("block", self.block, 0)
        one_of("contrast_scope", self.contrast_scope, ("global", "block"))
        if self.contrast_scope == "block" and not self.block:
            raise ValueError("contrast_scope is 'block' and block is 0; set how many rows a block has")
        for name in ("learnable_temperature", "int8_weight") if self.fp16 else ():
            if getattr(self, name):
                raise ValueError(f"{name} with fp16=True: the loss scale would distort it; use bf16")
        in_range("kept_graphs_gib", self.kept_graphs_gib, 0, endless=True)
        if self.peak_tflops is not None:
            in_range("peak_tflops", self.peak_tflops, 0, open_low=True)
        if self.micro_batch_tokens is not None:
            in_range("micro_batch_tokens", self.micro_batch_tokens, 1)
        super().__post_init__()
        if self.contrastive_batch_size is not None:
            self._share_contrast()
        if not any(vars(self.weights()).values()):
            raise ValueError("all loss weights are 0; nothing would be trained")

    def _share_contrast(self) -> None:
        ranks = max(self.world_size, 1)
        in_range("contrastive_batch_size", self.contrastive_batch_size, ranks)
        assert self.contrastive_batch_size is not None
        share, rest = divmod(self.contrastive_batch_size, ranks)
        if rest:
            raise ValueError(
                f"contrastive_batch_size is {self.contrastive_batch_size}; expected a multiple of the {ranks} ranks"
            )
        self.per_device_train_batch_size = share
        if self.micro_batch_tokens is None:
            self.micro_batch_tokens = 16384

    def weights(self) -> JointWeights:
        """The loss weights as the recipe takes them; those that the objective or the template leaves out are 0."""
        given = JointWeights(
            ce_query=self.ce_query_weight,
            ce_target=self.ce_target_weight,
            disc=self.disc_weight,
            gen=self.gen_weight,
            cross=self.cross_weight,
            same_item=self.same_item_weight,
            latent=self.latent_weight if self.latent_tokens else 0.0,
            latent_ce=self.latent_ce_weight if self.latent_tokens else 0.0,
        )
        return given.of(self.objective, with_disc=self.template != "tte" and self.head is None)


@dataclass
class RefineConfig(CommonConfig):
    """The settings of Refine-RL: rewrites are sampled, scored against stable discriminative anchors, and reinforced
    (recipe, 4)."""

    trained_sides: str = option(
        "both", "Sides whose rewrites are trained: 'both' [known, UME-R1], 'query' or 'target'."
    )
    num_generations: int = option(8, "G, rewrites sampled per prompt. [known, UME-R1: 8]")
    max_completion_length: int = option(
        512, "Longest rewrite in tokens, <gen_emb> included. [ours: 512; UME-R1's CoT: 2,048]"
    )
    sampling_temperature: float = option(1.0, "Of the rollouts. [known, UME-R1: 1]")
    top_p: float = option(1.0, "Nucleus of the rollouts; 1: off. [ours]")
    top_k: int = option(0, "Top-k of the rollouts; 0: off. [ours]")
    rollout_batch: int | None = option(None, "Sequences decoded at once (memory); None: all of the step's.")
    repetition_limit: int = option(
        0, "A rewrite that says the same 1-16 tokens this often in a row ends there; 0: off. [ours]"
    )
    shared_prefix: bool = option(
        True, "Score a prompt and its G rewrites as P + G R rows; False: as G whole sequences. [ours]"
    )
    micro_batch_tokens: int | None = option(
        None,
        "Rows (a prompt's tokens and its rewrites') that go through the policy at a time; a step's prompts may be "
        "more, gradients stay the same. None: the whole batch in one forward. [ours]",
    )
    refill_degenerate: int = option(
        0, "How often groups whose rewards are all equal are drawn again; 0: only counted. [ours]"
    )

    anchors: str = option(
        "sft",
        "Discriminative embeddings the rewrites are scored against: 'sft', of the model as it was at the start, "
        "computed once for the whole set and kept; 'policy', of the current weights, every step. [ours: 'sft']",
    )
    anchor_bank: str | None = option(
        None,
        "Bank of the training set made by `rime-fast embed --anchors` with this model: its folder, or one side's "
        "file. None: made at the start, into output_dir/anchors. [ours]",
    )
    anchor_dims: int | None = option(
        None,
        "Width at which rewrites and anchors are compared: their first so many numbers, normalised again (Matryoshka). "
        "None: all. [ours]",
    )
    bank_storage: str = option(
        "device",
        "Where the bank lies: 'device'; 'host', page-locked memory from which it streams to a GPU (a memory map on "
        "the CPU); 'sharded', a part on each rank. [ours]",
    )
    anchor_pool: str = option(
        "bank", "Anchors a rewrite competes with: 'bank', all of the training set; 'batch', the step's. [ours]"
    )
    reward_mode: str = option(
        "anchor",
        "'anchor': our reward to discriminative anchors [ours]. 'ume_r1': the G generated embeddings of the other "
        "side are the anchors, hits of the own group in the top G [known, UME-R1]; needs trained_sides='both'.",
    )
    format_weight: float = option(1.0, "w_fmt, reward of a well-formed rewrite.")
    rank_weight: float = option(1.0, "w_rank, of f(rank) x (s+ - neg).")
    refine_weight: float = option(1.0, "w_refine, of how much g is closer to the anchor than d was. [ours]")
    length_weight: float = option(0.1, "w_len, of tokens beyond length_limit. [ours]")
    length_limit: float = option(128.0, "L0: rewrite tokens that cost nothing. [ours]")
    rank_reward: str = option("1/log2(1+rank)", "f: 'hit', '1/rank' or '1/log2(1+rank)'.")
    hit_k: int = option(1, "k of f = 'hit' and of the logged hit rate.")
    negative_reduction: str = option("mean", "neg: 'mean', 'softmax' (temperature 0.5) or 'max'.")
    negatives: str | None = option(None, "Old name of anchor_pool, for one release.")
    negative: str | None = option(None, "Old name of negative_reduction, for one release.")
    scale_rewards: bool = option(True, "Divide advantages by the group's std. [known, GRPO]; False with Dr.GRPO.")

    loss_type: str = option(
        "ume_r1", "'ume_r1': token sums / max_completion_length [known]; 'token_mean': DAPO [known]; 'dr_grpo' [known]."
    )
    epsilon: float = option(0.2, "Lower clip of the ratio. [known, PPO; the value ours]")
    epsilon_high: float = option(0.28, "Upper clip of the ratio. [known, DAPO; the value ours]")
    beta: float = option(0.04, "Weight of the KL to the reference; 0 runs none. [known]")
    reference: str = option(
        "auto",
        "Reference of the KL: 'adapter' (the LoRA switched off), 'copy' (a frozen copy), 'none' (only with "
        "beta=0); 'auto' takes the adapter where there is one (but not pissa's, which changes the weights below), a "
        "copy where beta > 0.",
    )
    num_iterations: int = option(
        1,
        "Updates per rollout batch. 1: the forward of the update also gives g for the reward, and the ratio is "
        "exactly 1. More: old log-probs are stored and clipping is active.",
    )

    learning_rate: float = option(1e-6, "Peak learning rate. [known, UME-R1: 1e-6]")
    per_device_train_batch_size: int = option(8, "Pairs per device and step.")

    def __post_init__(self) -> None:
        if self.template == "tte":
            raise ValueError("template is 'tte', which has no <disc_emb>; Refine-RL's anchors are its embeddings")
        self._take_old_name("negatives", "anchor_pool")
        self._take_old_name("negative", "negative_reduction")
        one_of("trained_sides", self.trained_sides, SIDES)
        one_of("anchors", self.anchors, ANCHORS)
        one_of("anchor_pool", self.anchor_pool, ("bank", "batch"))
        one_of("reward_mode", self.reward_mode, ("anchor", "ume_r1"))
        one_of("loss_type", self.loss_type, LOSS_TYPES)
        one_of("reference", self.reference, REFERENCES)
        one_of("bank_storage", self.bank_storage, STORAGE)
        for name, low in AT_LEAST.items():
            if getattr(self, name) is not None or name not in ("micro_batch_tokens", "rollout_batch"):
                in_range(name, getattr(self, name), low, endless=name == "epsilon_high")
        if self.anchor_dims is not None:
            in_range("anchor_dims", self.anchor_dims, 1)
        in_range("sampling_temperature", self.sampling_temperature, 0, open_low=True)
        in_range("top_p", self.top_p, 0, 1, open_low=True)
        in_range("epsilon", self.epsilon, 0, 1)
        if self.repetition_limit != 0:
            in_range("repetition_limit", self.repetition_limit, 2)
        if self.num_generations == 1 and self.scale_rewards:
            raise ValueError("num_generations is 1: a group of one has no advantage; use at least 2")
        if self.reward_mode == "ume_r1" and self.trained_sides != "both":
            raise ValueError("reward_mode='ume_r1' scores each side against the other's rewrites: trained_sides='both'")
        if self.reference == "none" and self.beta > 0:
            raise ValueError(f"reference='none' with beta={self.beta}: the KL needs a reference, or beta=0")
        if self.anchor_bank is not None and (self.anchors != "sft" or self.reward_mode != "anchor"):
            raise ValueError(
                "anchor_bank is set, but the reward uses no bank: expected anchors='sft', "
                f"reward_mode='anchor', got {self.anchors!r}, {self.reward_mode!r}"
            )
        if self.refill_degenerate:
            self._check_refill()
        if self.anchors == "policy" and self.anchor_pool == "bank":
            self.anchor_pool = "batch"  # the current policy's anchors exist for the batch only
        super().__post_init__()
        self.reward_weights()  # raises, naming the weight

    def _take_old_name(self, old: str, new: str) -> None:
        value = getattr(self, old)
        if value is None:
            return
        warnings.warn(f"{old} is now called {new}; the old name will go", FutureWarning, stacklevel=4)
        default = type(self).__dataclass_fields__[new].default
        if getattr(self, new) not in (default, value):
            raise ValueError(f"{old} is {value!r} and {new}, its new name, {getattr(self, new)!r}; give {new} alone")
        setattr(self, new, value)
        setattr(self, old, None)

    def _check_refill(self) -> None:
        if self.num_generations == 1:
            raise ValueError("refill_degenerate is set, but num_generations is 1: every group of one is degenerate")
        if self.reward_mode == "ume_r1" or (self.bank_storage == "sharded" and self.world_size > 1):
            raise ValueError(
                f"refill_degenerate is {self.refill_degenerate}, but each rank refills by itself and these rewards "
                "need all ranks: expected reward_mode='anchor' and bank_storage 'device' or 'host'"
            )

    def reward_weights(self) -> RewardWeights:
        """The reward's switches as the operator takes them."""
        if self.reward_mode == "ume_r1":
            base = RewardWeights.ume_r1(self.num_generations, w_fmt=self.format_weight)
            return replace(base, w_rank=self.rank_weight, normalize_std=self.scale_rewards)
        return RewardWeights(
            w_fmt=self.format_weight,
            w_rank=self.rank_weight,
            w_refine=self.refine_weight,
            w_len=self.length_weight,
            rank_reward=self.rank_reward,
            hit_k=self.hit_k,
            negative=self.negative_reduction,
            length_limit=self.length_limit,
            normalize_std=self.scale_rewards,
        )
