"""RimeTrainer as a user meets it: drop-in, resumed to the bit, stopped by Ctrl-C, adapted, frozen, evaluated."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration, TrainerCallback, TrainingArguments

import rime_fast
from rime_fast.model.processor import RimeProcessor
from rime_fast.trainers.callbacks import InterruptCallback
from rime_fast.trainers.config import RimeConfig
from rime_fast.trainers.joint import RimeTrainer

QUIET = {
    "save_strategy": "no",
    "logging_steps": 1,
    "progress": "none",
    "per_device_train_batch_size": 4,
    "learning_rate": 5e-3,
    "warmup_steps": 0,
    "temperature": 0.1,
}


def trainer(tiny, folder, pairs=None, *, more=None, **settings) -> RimeTrainer:
    args = RimeConfig(output_dir=str(folder), **(QUIET | settings))
    processor = tiny.processor()
    return RimeTrainer(
        tiny.model(processor),
        args,
        tiny.pairs(16) if pairs is None else pairs,
        processing_class=processor,
        template=tiny.template,
        **(more or {}),
    )


def curve(run: RimeTrainer) -> list[dict[str, float]]:
    """The log without what a clock decides."""
    timed = ("per_second", "data_wait", "runtime", "total_flos", "train_loss")
    return [{k: v for k, v in entry.items() if not any(t in k for t in timed)} for entry in run.state.log_history]


def test_it_learns_and_logs_every_term(tiny, tmp_path):
    run = trainer(tiny, tmp_path, tiny.pairs(32), max_steps=25)
    run.train()
    first, last = run.state.log_history[0], run.state.log_history[-2]
    names = {f"{kind}/{q}-{k}" for kind in ("contrast", "hit@1") for q in ("disc", "gen") for k in ("disc", "gen")}
    names |= {"loss", "ce/query", "ce/target", "grad_norm", "samples_per_second", "tokens_per_second"}
    assert names <= set(last)
    assert last["loss"] < 0.6 * first["loss"]
    total = (
        first["ce/query"]
        + first["ce/target"]
        + first["contrast/disc-disc"]
        + first["contrast/gen-gen"]
        + 0.5 * first["contrast/gen-disc"]
        + 0.5 * first["contrast/disc-gen"]
    )
    assert math.isclose(first["loss"], total, rel_tol=1e-5)


def test_drop_in_by_path_saves_what_stock_transformers_loads(tiny, tmp_path):
    processor = tiny.processor()
    tiny.model(processor).save_pretrained(tmp_path / "start")
    processor.save_pretrained(tmp_path / "start")
    run = RimeTrainer(
        model=str(tmp_path / "start"),
        args=RimeConfig(output_dir=str(tmp_path / "out"), max_steps=2, **QUIET),
        train_dataset=tiny.pairs(8),
        template=tiny.template,
    )
    run.train()
    run.save_model(tmp_path / "final")
    stock = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "final")
    assert json.loads((tmp_path / "final" / "config.json").read_text())["architectures"] == [type(stock).__name__]
    saved = dict(run.model.state_dict())
    for name, tensor in stock.state_dict().items():
        assert torch.equal(tensor, saved[name]), name
    vocab = RimeProcessor.from_pretrained(tmp_path / "final").tokenizer.get_vocab()
    assert {"<disc_emb>", "<gen_emb>"} <= set(vocab)


@pytest.mark.parametrize("lora", [False, True])
def test_resume_reproduces_the_uninterrupted_run_to_the_bit(tiny, tmp_path, lora):
    """12 pairs, 4 a step: the checkpoint at step 5 lies inside the second epoch. LoRA's dropout draws numbers."""
    settings = {"max_steps": 9, "save_strategy": "steps", "save_steps": 5, "learnable_temperature": True, "seed": 3}
    settings["int8_weight"] = 0.5

    def fresh(folder: Path) -> RimeTrainer:
        more = {}
        if lora:
            from peft import LoraConfig

            more = {"peft_config": LoraConfig(r=2, lora_dropout=0.2, target_modules=["q_proj", "v_proj"])}
        return trainer(tiny, folder, tiny.pairs(12), more=more, **settings)

    straight = fresh(tmp_path / "a")
    straight.train()
    resumed = fresh(tmp_path / "b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-5"))
    assert curve(resumed)[:-1] == curve(straight)[:-1]
    for learnt in ("temperature", "int8_step"):
        assert len({entry[learnt] for entry in curve(straight)[:-1]}) == 9
    other = dict(resumed.model.named_parameters())
    for name, parameter in straight.model.named_parameters():
        assert torch.equal(parameter, other[name]), name


class Press(TrainerCallback):
    """Ctrl-C during step 3."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def signals():
    """SIGINT as a terminal has it (a shell's background job starts with it ignored); both as they were afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_ctrl_c_saves_a_checkpoint_and_the_run_goes_on_from_it(tiny, tmp_path, capsys, monkeypatch, signals):
    straight = trainer(tiny, tmp_path / "a", max_steps=6)
    straight.train()
    stopped = trainer(tiny, tmp_path / "b", max_steps=6, more={"callbacks": [Press()]})
    with pytest.raises(SystemExit) as ending:
        stopped.train()
    assert ending.value.code == 130
    assert f"checkpoint: {tmp_path / 'b' / 'checkpoint-3'}" in capsys.readouterr().out
    os.kill(os.getpid(), signal.SIGINT)  # the second of a pair that a launcher sends: counts as the first
    monkeypatch.setattr(InterruptCallback, "PATIENCE", 0.0)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    again = trainer(tiny, tmp_path / "b", max_steps=6)
    again.train(resume_from_checkpoint=True)
    assert curve(again)[:-1] == curve(straight)[:-1]


def test_frozen_vision_keeps_the_tower_and_trains_the_merger(tiny, tmp_path):
    run = trainer(tiny, tmp_path, max_steps=2)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.train()
    for name, parameter in run.model.named_parameters():
        frozen = "visual" in name and "merger" not in name
        assert parameter.requires_grad != frozen, name
        assert torch.equal(parameter, before[name]) == frozen, name


def test_whole_model_trains_when_asked(tiny, tmp_path):
    run = trainer(tiny, tmp_path, max_steps=1, freeze_vision=False)
    assert all(p.requires_grad for p in run.model.parameters())
    before = run.model.model.visual.patch_embed.proj.weight.detach().clone()
    run.train()
    assert not torch.equal(run.model.model.visual.patch_embed.proj.weight, before)


def test_gradient_checkpointing_changes_no_number(tiny, tmp_path):
    plain, checkpointed = (trainer(tiny, tmp_path, max_steps=3, gradient_checkpointing=on) for on in (False, True))
    plain.train()
    checkpointed.train()
    for a, b in zip(curve(plain)[:-1], curve(checkpointed)[:-1], strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_lora_trains_and_saves_an_adapter(tiny, tmp_path):
    from peft import LoraConfig

    run = trainer(tiny, tmp_path / "run", max_steps=2, more={"peft_config": LoraConfig(r=2, target_modules=["q_proj"])})
    assert {n.split(".")[-3] for n, p in run.model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    run.train()
    run.save_model(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_gradient_accumulation_is_the_mean_of_its_micro_batches(tiny, tmp_path):
    """Two micro-batches of 4 with equally many tokens in one step log the mean of what each gives alone."""
    pairs = tiny.pairs(8)
    for pair in pairs:
        pair.query.rewrite = pair.target.rewrite = "red blue"
    settings = {"train_sampling_strategy": "sequential", "max_steps": 1, "learning_rate": 0.0}
    both = trainer(tiny, tmp_path, pairs, gradient_accumulation_steps=2, **settings)
    both.train()
    alone = []
    for part in (pairs[:4], pairs[4:]):
        run = trainer(tiny, tmp_path, part, **settings)
        run.train()
        alone.append(run.state.log_history[0]["loss"])
    assert math.isclose(both.state.log_history[0]["loss"], sum(alone) / 2, rel_tol=1e-6)


def test_evaluation_reports_every_term_and_leaves_training_alone(tiny, tmp_path):
    plain = trainer(tiny, tmp_path, max_steps=4)
    plain.train()
    run = trainer(
        tiny,
        tmp_path,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=4,
        more={"eval_dataset": tiny.pairs(8, seed=5)},
    )
    run.train()
    logged = [entry for entry in run.state.log_history if "eval_loss" in entry]
    assert len(logged) == 2
    assert {"eval_hit@1/gen-gen", "eval_ce/query", "eval_contrast/disc-disc"} <= set(logged[0])
    assert [e for e in curve(run) if "loss" in e] == [e for e in curve(plain) if "loss" in e]


def test_terms_of_an_evaluation_are_means_over_samples(tiny, tmp_path):
    """As its loss is: a last batch of one pair, whose hit@1 is 1 for want of another, counts as one pair."""
    alone = {"disc_weight": 0.0, "cross_weight": 0.0, "ce_query_weight": 0.0, "ce_target_weight": 0.0}
    evaluation = {"eval_dataset": tiny.pairs(5, seed=5)}
    run = trainer(tiny, tmp_path, per_device_eval_batch_size=4, more=evaluation, **alone)
    found = run.evaluate()
    assert found["eval_contrast/gen-gen"] == pytest.approx(found["eval_loss"], rel=1e-5)
    whole = trainer(tiny, tmp_path, per_device_eval_batch_size=4, more={"eval_dataset": tiny.pairs(4, seed=5)}, **alone)
    assert found["eval_hit@1/gen-gen"] == pytest.approx((4 * whole.evaluate()["eval_hit@1/gen-gen"] + 1) / 5)


def test_hard_negatives_join_the_keys(tiny, tmp_path):
    losses = {}
    for count in (None, 0, 1):
        run = trainer(tiny, tmp_path, tiny.pairs(8, negatives=2), max_steps=1, hard_negatives=count, learning_rate=0.0)
        run.train()
        losses[count] = run.state.log_history[0]
    for term in ("contrast/gen-gen", "contrast/disc-disc", "contrast/gen-disc"):
        assert losses[0][term] < losses[1][term] < losses[None][term]
    assert losses[0]["ce/target"] == pytest.approx(losses[None]["ce/target"], rel=1e-5)


def test_switches_change_the_loss_as_named(tiny, tmp_path):
    def first(**settings) -> dict[str, float]:
        run = trainer(tiny, tmp_path, max_steps=1, learning_rate=0.0, **settings)
        run.train()
        return run.state.log_history[0]

    plain, no_cma = first(), first(cross_weight=0.0)
    assert "contrast/gen-disc" not in no_cma
    assert no_cma["contrast/gen-gen"] == plain["contrast/gen-gen"]
    only_disc = first(ce_query_weight=0, ce_target_weight=0, gen_weight=0, cross_weight=0)
    assert only_disc["loss"] == pytest.approx(plain["contrast/disc-disc"], rel=1e-6)
    assert "ce/query" not in only_disc
    assert "contrast/same-query" in first(same_item_weight=0.5)
    assert first(symmetric=False)["contrast/gen-gen"] != plain["contrast/gen-gen"]
    stopped = first(detach_disc_in_cross=True)
    assert stopped["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    assert stopped["grad_norm"] != plain["grad_norm"]


def test_a_step_reads_nothing_back_to_the_host(tiny, tmp_path, monkeypatch):
    run = trainer(tiny, tmp_path, max_steps=1)
    batch = run._prepare_inputs(run.data_collator(tiny.pairs(4)))
    run.compute_loss(run.model, batch)  # what is derived from image sizes is kept

    own = tuple(str(Path(rime_fast.__file__).parent / folder) for folder in ("trainers", "recipe", "model"))
    seen = []
    for name in ("item", "tolist", "nonzero", "__float__", "__int__", "__bool__", "cpu", "numpy"):
        stock = getattr(torch.Tensor, name)

        def spy(self, *args, _stock=stock, _name=name, **kwargs):
            # the operators' CPU backends may look at values, ours above them may not
            caller = sys._getframe(1).f_code.co_filename
            if caller.startswith(own):
                seen.append((_name, caller))
            return _stock(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, spy)
    run.compute_loss(run.model, batch)
    # the one look that is made on the CPU only: do image tokens and features match
    assert [name for name, caller in seen if not caller.endswith("dual_mode.py")] == []
    assert {name for name, _ in seen} <= {"__bool__"}


def test_wrong_arguments_are_named(tiny, tmp_path):
    processor = tiny.processor()
    model = tiny.model(processor)
    with pytest.raises(TypeError, match="args is TrainingArguments; expected RimeConfig"):
        RimeTrainer(model, TrainingArguments(output_dir=str(tmp_path)))
    with pytest.raises(ValueError, match="names no directory to load a processor from"):
        RimeTrainer(model, RimeConfig(output_dir=str(tmp_path)), tiny.pairs(4))
    with pytest.raises(TypeError, match="model is int"):
        RimeTrainer(3, RimeConfig(output_dir=str(tmp_path)))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="train_dataset is int"):
        trainer(tiny, tmp_path, 3)
    with pytest.raises(ValueError, match="without image_processor"):
        RimeTrainer(
            model,
            RimeConfig(output_dir=str(tmp_path)),
            tiny.pairs(4),
            processing_class=type("T", (), {"tokenizer": processor.tokenizer})(),
        )


def test_bad_rows_stop_before_step_one_or_are_skipped_and_counted(tiny, tmp_path):
    rows = [
        {"query": {"text": f"which {i}", "rewrite": f"red {i}"}, "target": {"text": "x", "rewrite": f"tall {i}"}}
        for i in range(8)
    ]
    rows[2]["target"]["rewrite"] = " "
    rows[5]["query"]["image"] = "nowhere.png"
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"pairs.jsonl, row 3, target.rewrite.*\n.*row 6, query.images\[0\]: missing"):
        trainer(tiny, tmp_path / "run", str(file))
    run = trainer(tiny, tmp_path / "run", str(file), on_bad_row="skip", max_steps=1)
    assert (run.bad_rows, len(run.train_dataset)) == (2, 6)
    run.train()
    twice = trainer(tiny, tmp_path / "run", [str(file), file], on_bad_row="skip", max_steps=1)
    assert (twice.bad_rows, len(twice.train_dataset)) == (4, 12)
    twice.train()


def test_rows_of_a_datasets_table_train(tiny, tmp_path):
    import datasets

    table = datasets.Dataset.from_list(
        [
            {"query": {"text": f"which {i}", "rewrite": f"red {i}"}, "target": {"text": f"{i}", "rewrite": f"tall {i}"}}
            for i in range(8)
        ]
    )
    run = trainer(tiny, tmp_path, table, max_steps=2)
    run.train()
    assert len(run.state.log_history) == 3


def test_a_template_with_filler_needs_no_rewrites(tiny, tmp_path):
    pairs = tiny.pairs(4)
    for pair in pairs:
        pair.query.rewrite = pair.target.rewrite = None
    with pytest.raises(ValueError, match="missing rewrite"):
        trainer(tiny, tmp_path, pairs)
    processor = tiny.processor()
    args = RimeConfig(output_dir=str(tmp_path), max_steps=1, **QUIET)
    RimeTrainer(
        tiny.model(processor),
        args,
        pairs,
        processing_class=processor,
        template=replace(tiny.template, filler="flat flat"),
    ).train()


def test_a_file_without_rewrites_trains_the_discriminative_mode(tiny, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(f'{{"query": {{"text": "red {i}"}}, "target": {{"text": "red {i}"}}}}\n' for i in range(4)))
    off = {"ce_query_weight": 0.0, "ce_target_weight": 0.0, "gen_weight": 0.0, "cross_weight": 0.0}
    args = RimeConfig(
        output_dir=str(tmp_path / "run"), max_steps=1, per_device_train_batch_size=2, progress="none", use_cpu=True,
        save_strategy="no", **off,
    )  # fmt: skip
    processor = tiny.processor()
    run = RimeTrainer(tiny.model(processor), args, str(file), processing_class=processor, template=tiny.template)
    run.train()
    assert run.state.global_step == 1
