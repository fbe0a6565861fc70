"""Training on a mixture: every published layout into a step, blocks, a resume, figures of each set."""

from __future__ import annotations

import json

import pytest
import torch

from rime_fast.data.formats import write_pairs
from rime_fast.data.images import stored_image
from rime_fast.data.records import Pair, Side
from rime_fast.trainers.config import RimeConfig
from rime_fast.trainers.joint import RimeTrainer
from tests.data.test_published import colpali, hound, mmeb

DISC_ONLY = {"ce_query_weight": 0, "ce_target_weight": 0, "gen_weight": 0, "cross_weight": 0}


def config(folder, **options):
    values = {"output_dir": str(folder), "max_steps": 3, "logging_steps": 1, "progress": "none", "save_strategy": "no"}
    return RimeConfig(**{**values, "learning_rate": 1e-3, "per_device_train_batch_size": 8, **options})


def trainer(tiny, args, source, **options):
    processor = tiny.processor()
    torch.manual_seed(0)
    return RimeTrainer(tiny.model(processor), args, source, processor=processor, template=tiny.template, **options)


@pytest.fixture
def sets(tiny, tmp_path):
    """Two files of pairs with rewrites, as entries of a mixture."""
    entries = []
    for i, (name, count) in enumerate((("first", 12), ("second", 20))):
        pairs = tiny.pairs(count, negatives=1, seed=i)
        for pair in pairs:
            pair.query.id = f"{name} {pair.query.id}"  # equal ids would be one item
        write_pairs(tmp_path / f"{name}.parquet", pairs)
        entries.append({"path": str(tmp_path / f"{name}.parquet"), "name": name, "weight": i + 1})
    return entries


def parameters(made):
    return {name: value.detach().clone() for name, value in made.model.named_parameters()}


def test_a_mixture_logs_each_set_and_goes_on_to_the_bit(tiny, sets, tmp_path):
    args = {"block": 4, "max_steps": 4, "gradient_accumulation_steps": 2}
    whole = trainer(tiny, config(tmp_path / "a", **args), sets)
    whole.train()
    logs = [entry for entry in whole.state.log_history if "loss" in entry]
    last = logs[-1]
    read = [last["set/first/rows"], last["set/second/rows"]]
    assert sum(read) == 4 * 16
    assert last["set/second/passes"] == read[1] / 20
    for name in ("first", "second"):
        found = [entry for entry in logs if f"set/{name}/loss" in entry]
        assert found
        assert all(0 <= entry[f"set/{name}/hit@1"] <= 1 and entry[f"set/{name}/loss"] > 0 for entry in found)
    assert {entry["step"] for entry in logs} == {1, 2, 3, 4}

    half = config(tmp_path / "b", **args, save_strategy="steps", save_steps=2)
    trainer(tiny, half, sets).train()
    again = trainer(tiny, half, sets)
    drawn = []
    collate = again.data_collator
    again.data_collator = lambda pairs: drawn.append([pair.id for pair in pairs]) or collate(pairs)
    again.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    assert len(drawn) == 4  # nothing before the checkpoint was put together again
    expected = parameters(whole)
    assert all(torch.equal(value, expected[name]) for name, value in parameters(again).items())


def test_blocks_are_contrasts_of_their_own_when_asked(tiny, sets, tmp_path):
    options = {"block": 4, "hard_negatives": 1}
    made = trainer(tiny, config(tmp_path, contrast_scope="block", **options), sets)
    plain = trainer(tiny, config(tmp_path, **options), sets)
    pairs = [made.train_dataset[place] for place in made.mixture.sampler.step(0)[0]]
    contrast = [
        _contrast(trainer_, batch) for trainer_, batch in ((made, pairs), (plain, pairs[:4]), (plain, pairs[4:]))
    ]
    assert contrast[0] == pytest.approx((contrast[1] + contrast[2]) / 2, rel=1e-5)
    assert contrast[0] != _contrast(plain, pairs)
    made.args.max_steps = 1
    made.train()


def _contrast(made, pairs):
    batch = made.data_collator(pairs)
    with torch.no_grad():
        encoder, loss, _ = made._batch(made.model.eval(), batch, None)
        return float(loss(encoder(encoder.parts[0], True).embeddings))


def test_every_published_layout_reaches_a_training_step(tiny, tmp_path):
    for name in ("mmeb", "colpali", "hound", "visrag"):
        (tmp_path / name).mkdir()
    pages, _, _ = colpali(tmp_path / "colpali")
    page = stored_image(tiny.pairs(1)[0].query.images[0])
    rows = [{"query": f"q {i}", "image": page, "source": "s"} for i in range(3)]
    from rime_fast.data.sources import write_rows

    write_rows(tmp_path / "visrag" / "a.parquet", rows)
    videos = {"path": str(hound(tmp_path / "hound")), "image_root": str(tmp_path / "hound" / "frames")}
    source = [
        {"path": str(mmeb(tmp_path / "mmeb")), "name": "mmeb"},
        {"path": str(pages), "name": "colpali"},
        {"path": str(tmp_path / "visrag"), "name": "visrag"},
        {**videos, "name": "video"},
        {**videos, "name": "video-back", "format": "llava-hound-video"},
    ]
    args = config(tmp_path / "out", **DISC_ONLY, block=4, max_steps=2, on_bad_row="skip", video_frames=4, seed=1)
    made = trainer(tiny, args, source)
    assert made.bad_rows == 1  # MMEB's row with an empty side
    assert made.train_dataset.sizes.tolist() == [3, 4, 3, 2, 2]
    batch = made.data_collator([part[0] for part in made.train_dataset.sets])
    assert "targets" not in batch
    assert {"pixel_values", "pixel_values_videos"} <= set(batch)
    before = parameters(made)
    made.train()
    assert any(not torch.equal(value, before[name]) for name, value in parameters(made).items())
    assert all("contrast/disc-disc" in entry for entry in made.state.log_history if "loss" in entry)


def test_several_right_answers_are_no_negatives(tiny, tmp_path):
    """One query with five targets in a batch: only the row of another query counts."""
    query = Side("which one", rewrite="red")
    pairs = [Pair(query, Side(f"red {i}", rewrite="red")) for i in range(5)]
    pairs.append(Pair(Side("which user", rewrite="blue"), Side("blue", rewrite="blue")))
    file = tmp_path / "pairs.jsonl"
    write_pairs(file, pairs)
    made = trainer(tiny, config(tmp_path), str(file))
    alone = _contrast(made, [pairs[0], pairs[5]])
    assert _contrast(made, pairs[:5]) == 0.0
    assert alone > 0
    same = trainer(tiny, config(tmp_path, mask_false_negatives=False), str(file))
    assert _contrast(same, pairs[:5]) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 3}, "block is 3; expected a divisor of the 8 rows of one contrast"),
        ({"contrast_scope": "block"}, "contrast_scope is 'block' and block is 0"),
        ({"contrast_scope": "all"}, "contrast_scope is 'all'"),
        ({"block": -1}, "block is -1"),
    ],
)
def test_impossible_blocks_are_refused(tiny, sets, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(tiny, config(tmp_path, **options), sets)


def test_blocks_want_sets(tiny, tmp_path):
    with pytest.raises(ValueError, match="it is for a mixture"):
        trainer(tiny, config(tmp_path, block=4), tiny.pairs(8))


def test_paths_out_of_the_root_stop_before_step_one(tiny, tmp_path):
    row = {"query": {"text": "a", "rewrite": "r", "image": "/etc/x.png"}, "target": {"text": "t", "rewrite": "s"}}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"row 1, query.image: .* outside of image_root"):
        trainer(tiny, config(tmp_path), str(tmp_path / "a.jsonl"))
    with pytest.raises(ValueError, match=r"row 1, query.images\[0\]: missing image"):
        trainer(tiny, config(tmp_path, allow_outside=True), str(tmp_path / "a.jsonl"))
