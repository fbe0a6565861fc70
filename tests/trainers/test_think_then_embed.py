"""Think-Then-Embed: a reasoner on the traces' cross-entropy, an embedder on the contrast alone, one after the other."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from rime_fast.cli import main
from rime_fast.data.records import Side
from rime_fast.data.templates import IM_END, get_template
from rime_fast.eval.embedder import RimeEmbedder
from rime_fast.eval.think import embed_thought, given_rewrites
from rime_fast.model.dual_mode import DualModeModel
from rime_fast.model.tiny import tiny_model, tiny_processor, tiny_tokenizer
from rime_fast.model.tokens import add_embedding_tokens
from rime_fast.recipe.joint import JointWeights
from rime_fast.trainers.config import RefineConfig, RimeConfig
from rime_fast.trainers.joint import RimeTrainer
from rime_fast.trainers.refine import RefineRLTrainer

TTE = get_template("tte")
SETTINGS = {"save_strategy": "no", "logging_steps": 1, "progress": "none", "warmup_steps": 0, "temperature": 0.1}


def traces(tiny, count):
    """The tiny task's pairs, with a trace on both sides."""

    def thought(side):
        return replace(side, rewrite=f"<think>{side.rewrite} it is</think>\nAnswer: {side.rewrite}")

    return [replace(pair, query=thought(pair.query), target=thought(pair.target)) for pair in tiny.pairs(count)]


def start(tiny, folder, count=8):
    pairs = traces(tiny, count)
    sides = [side for pair in pairs for side in (pair.query, pair.target)]
    processor = tiny_processor(tiny_tokenizer([TTE.render_prompt(s) + TTE.render_response(s) for s in sides]))
    sizes = {"hidden": 64, "layers": 2, "vision_hidden": 16, "vision_layers": 2, "init_std": 0.1}
    model = DualModeModel.from_model(tiny_model("qwen2_vl", tokenizer=processor.tokenizer, seed=0, **sizes))
    add_embedding_tokens(model, processor.tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return pairs


def train(model, folder, pairs, objective, **settings):
    args = RimeConfig(
        output_dir=str(folder), objective=objective, template="tte", per_device_train_batch_size=len(pairs),
        **(SETTINGS | settings),
    )  # fmt: skip
    run = RimeTrainer(str(model), args, pairs)
    run.train()
    run.save_model(folder)
    return run.state.log_history[:-1]


def test_the_read_out_is_the_last_token_of_the_chat(tiny, tmp_path):
    pairs = start(tiny, tmp_path)
    embedder = RimeEmbedder.from_pretrained(tmp_path, template="tte")
    collator = embedder.collator
    batch = collator.collate_pairs(pairs)
    assert "disc_index" not in batch
    ends = torch.tensor(batch["lengths"]).cumsum(0) - 1
    assert torch.equal(batch["gen_index"], ends)
    assert (batch["input_ids"][ends] == collator.encoder.tokenizer.convert_tokens_to_ids(IM_END)).all()
    assert batch["targets"][ends - 1].tolist() == batch["input_ids"][ends].tolist()  # and it is learned to end there
    text = TTE.render_prompt(pairs[0].query) + TTE.render_response(pairs[0].query)
    assert "_emb>" not in text
    rows = embedder.encode_rewritten([pairs[0].query], [pairs[0].query.rewrite])
    states = embedder.model(**collator.collate_sides([pairs[0].query])).embeddings["gen"]
    torch.testing.assert_close(rows, states.detach(), rtol=1e-5, atol=1e-5)


def test_a_reasoner_and_an_embedder(tiny, tmp_path, capsys):
    """TTE_t: traces are data. TTE_s: the trained reasoner's. Saved, loaded, evaluated by retrieval, and by command."""
    pairs = start(tiny, tmp_path / "start")
    log = train(tmp_path / "start", tmp_path / "reasoner", pairs, "sft", max_steps=60, learning_rate=5e-3)
    assert not any(name.startswith(("contrast", "hit")) for name in log[-1])
    assert log[-1]["ce/query"] < 0.2 * log[0]["ce/query"]
    log = train(tmp_path / "start", tmp_path / "embedder", pairs, "contrastive", max_steps=25, learning_rate=3e-3)
    assert {name for name in log[-1] if name.startswith(("contrast", "ce"))} == {"contrast/gen-gen"}
    reasoner = RimeEmbedder.from_pretrained(tmp_path / "reasoner", template="tte", max_new_tokens=24)
    embedder = RimeEmbedder.from_pretrained(tmp_path / "embedder", template="tte")
    assert embedder.modes == ("gen",)
    sides = [[getattr(pair, name) for pair in pairs] for name in ("query", "target")]
    of_data = [embed_thought(embedder, side, given_rewrites([s.rewrite for s in side])).embeddings for side in sides]
    thoughts = [reasoner.encode_items([replace(s, rewrite=None) for s in side], "gen") for side in sides]
    of_reasoner = [embed_thought(embedder, side, thought) for side, thought in zip(sides, thoughts, strict=True)]
    assert all(thoughts[1].well_formed)
    assert thoughts[1].rewrites == [side.rewrite for side in sides[1]]
    assert of_reasoner[0].seconds > thoughts[0].seconds
    for queries, targets in (of_data, [one.embeddings for one in of_reasoner]):
        hits = (queries @ targets.T).argmax(1) == torch.arange(len(pairs))
        assert hits.float().mean() > 0.8
    items = tmp_path / "items.jsonl"
    rows = [{"text": side.text, "id": side.id, "rewrite": side.rewrite} for side in sides[1]]
    items.write_text("\n".join(map(json.dumps, rows)))
    words = ["embed", "--model", tmp_path / "embedder", "--data", items, "--mode", "gen", "--template", "tte"]
    words += ["--max_new_tokens", "24"]
    for name, wanted in (("data", of_data[1]), (tmp_path / "reasoner", of_reasoner[1].embeddings)):
        assert main([*map(str, words), "--reasoner", str(name), "--output_dir", str(tmp_path / "out")]) == 0
        found = load_file(tmp_path / "out" / "embeddings.safetensors")["gen"]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    written = [json.loads(line) for line in (tmp_path / "out" / "items.jsonl").read_text().splitlines()]
    assert [line["rewrite"] for line in written] == thoughts[1].rewrites


def test_what_a_template_without_disc_cannot_do(tiny, tmp_path):
    start(tiny, tmp_path)
    embedder = RimeEmbedder.from_pretrained(tmp_path, template="tte")
    for mode in ("disc", "both"):
        with pytest.raises(ValueError, match="template 'tte' has no disc embedding"):
            embedder.encode_items(["red"], mode)
    with pytest.raises(ValueError, match="rewrites has 0 entries for 1 items"):
        embed_thought(embedder, ["red"], given_rewrites([]))
    with pytest.raises(ValueError, match=r"Refine-RL's anchors"):
        RefineConfig(output_dir=str(tmp_path), template="tte")
    with pytest.raises(ValueError, match="'tte' has none"):
        RimeConfig(output_dir=str(tmp_path), template="tte", latent_tokens=2)
    with pytest.raises(ValueError, match="objective is 'both'"):
        RimeConfig(output_dir=str(tmp_path), objective="both")
    with pytest.raises(ValueError, match="template 'tte' has no <disc_emb>; set disc_weight"):
        RimeTrainer(str(tmp_path), RimeConfig(output_dir=str(tmp_path)), traces(tiny, 4), template=TTE)
    with pytest.raises(ValueError, match="'tte' has no discriminative embedding"):
        TTE.render_disc(Side(text="red"))


def test_objectives_leave_out_what_they_do_not_train():
    given = JointWeights(same_item=0.5, latent=1.0, latent_ce=1.0)
    assert given.of("joint") == given
    assert given.of("sft").modes() == ()
    assert given.of("sft").ce_query == 1
    assert not given.of("contrastive").scores_tokens()
    assert given.of("contrastive").modes() == ("disc", "gen", "latent")
    assert JointWeights().of("joint", with_disc=False).modes() == ("gen",)


@pytest.mark.parametrize(
    ("text", "ok", "rewrite"),
    [
        (f"<think>why</think>\nAnswer: it{IM_END}", True, "<think>why</think>\nAnswer: it"),
        (f"Answer: it{IM_END}", False, "Answer: it"),
        ("<think>why</think>\nAnswer: it", False, "<think>why</think>\nAnswer: it"),
        (f"<think>why</think>\n {IM_END}", False, "<think>why</think>"),
        (f"<think>a<think>b</think> c{IM_END}", False, "<think>a<think>b</think> c"),
    ],
)
def test_a_trace_has_a_form(text, ok, rewrite):
    assert TTE.parse_response(text) == (rewrite, ok)


@pytest.mark.parametrize("head", ["self:1", "qformer:4x2", "attention:4", "latent:8"])
def test_a_head_on_the_frozen_reasoner(head, tiny, tmp_path):
    """TTE_u: trained on cached states, saved, loaded; one rollout whose states feed the head, as good as a second
    pass over what it wrote; retrieval of the training pairs."""
    pairs = start(tiny, tmp_path / "start")
    train(tmp_path / "start", tmp_path / "reasoner", pairs, "sft", max_steps=60, learning_rate=5e-3)
    more = {"head": head, "freeze_backbone": True, "head_lr": 5e-3, "state_cache": str(tmp_path / "states")}
    log = train(tmp_path / "reasoner", tmp_path / "unified", pairs, "contrastive", max_steps=40, **more)
    assert {name for name in log[-1] if name.startswith(("contrast", "ce"))} == {"contrast/gen-gen"}
    assert log[-1]["contrast/gen-gen"] < 0.5 * log[0]["contrast/gen-gen"]
    kept = list((tmp_path / "states").iterdir())
    assert len(kept) == len({(pair.target.text, pair.target.rewrite) for pair in pairs}) + len(pairs)
    embedder = RimeEmbedder.from_pretrained(tmp_path / "unified", template="tte", max_new_tokens=24)
    reasoner = RimeEmbedder.from_pretrained(tmp_path / "reasoner", template="tte", max_new_tokens=24)
    found = []
    for name in ("query", "target"):
        sides = [replace(getattr(pair, name), rewrite=None) for pair in pairs]
        made, said = (one.encode_items(sides, "gen") for one in (embedder, reasoner))
        assert made.rewrites == said.rewrites
        again = embed_thought(embedder, sides, made).embeddings
        good = torch.tensor(made.well_formed)
        torch.testing.assert_close(made.embeddings[good], again[good], rtol=1e-4, atol=1e-4)
        found.append(made.embeddings)
    hits = (found[0] @ found[1].T).argmax(1) == torch.arange(len(pairs))
    assert hits.float().mean() > 0.6


def test_what_a_head_needs(tiny, tmp_path):
    start(tiny, tmp_path)
    settings = {"output_dir": str(tmp_path), "template": "tte"}
    with pytest.raises(ValueError, match="set freeze_backbone"):
        RimeConfig(**settings, head="self:1", objective="contrastive")
    with pytest.raises(ValueError, match="is trained by 'contrastive'"):
        RimeConfig(**settings, head="self:1", freeze_backbone=True)
    with pytest.raises(ValueError, match=r"head_lr is 0\.1, but there is no head"):
        RimeConfig(**settings, head_lr=0.1)
    args = RimeConfig(**settings, head="self:9", freeze_backbone=True, objective="contrastive", progress="none")
    with pytest.raises(ValueError, match="head is 'self:9'; the model has 2 layers"):
        RimeTrainer(str(tmp_path), args, traces(tiny, 4))


def test_a_model_with_a_head_is_trained_by_its_head_alone(tiny, tmp_path):
    """Anything else would train the state below, while mode gen reads the head."""
    pairs = start(tiny, tmp_path / "start", 4)
    more = {"head": "self:1", "freeze_backbone": True, "max_steps": 1}
    train(tmp_path / "start", tmp_path / "unified", pairs, "contrastive", **more)
    train(tmp_path / "unified", tmp_path / "more", pairs, "contrastive", **more)
    with pytest.raises(ValueError, match=r"the model has a head \('self:1'\)"):
        train(tmp_path / "unified", tmp_path / "none", pairs, "contrastive", max_steps=1)
    with pytest.raises(ValueError, match=r"the model has a head \('self:1'\)"):
        RefineRLTrainer(str(tmp_path / "unified"), RefineConfig(output_dir=str(tmp_path / "rl")), pairs)
