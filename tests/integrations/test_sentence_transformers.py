"""FusedMultipleNegativesRankingLoss against sentence-transformers' own loss and under their own trainer."""

from __future__ import annotations

import copy
import math

import pytest
import torch

sentence_transformers = pytest.importorskip("sentence_transformers", minversion="6.0")

from rime_fast.integrations.sentence_transformers import FusedMultipleNegativesRankingLoss  # noqa: E402
from rime_fast.model.tiny import tiny_tokenizer  # noqa: E402
from tests.ranks import run_ranks  # noqa: E402

WORDS = ["red", "blue", "green", "black", "white", "round", "flat", "tall", "old", "new", "car", "house", "tree"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A two-layer BERT with dropout and a word tokenizer, made here."""
    from sentence_transformers import SentenceTransformer, models
    from transformers import BertConfig, BertModel

    folder = str(tmp_path_factory.mktemp("bert"))
    tokenizer = tiny_tokenizer([" ".join(WORDS)])
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(folder)
    word = models.Transformer(folder, max_seq_length=32)
    return SentenceTransformer(modules=[word, models.Pooling(32)], device="cpu")


def texts(count: int, seed: int = 0) -> list[str]:
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 9, (count,), generator=draw)
    return [" ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (int(n),), generator=draw)) for n in sizes]


def columns(model, count: int = 13, width: int = 3) -> list[dict]:
    return [model.preprocess(texts(count, seed)) for seed in range(width)]


def gradients(loss_class, model, features, dropout: bool = False, **options) -> tuple[float, dict]:
    model = copy.deepcopy(model).train(dropout)
    loss = loss_class(model, **options)
    torch.manual_seed(7)
    value = loss([dict(f) for f in features], None)
    (value * 3).backward()
    return float(value.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(ours, truth, bound) -> None:
    assert math.isclose(ours[0], truth[0], rel_tol=1e-5)
    assert ours[1].keys() == truth[1].keys()
    for name, want in truth[1].items():
        assert (ours[1][name] - want).norm() <= bound * want.norm() + 1e-6, name


OPTIONS = {
    "default": {},
    "scaled": {"scale": 50.0, "mini_batch_size": 3},
    "tokens": {"mini_batch_num_tokens": 24},
    "symmetric": {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
    "dot": {"similarity_fct": sentence_transformers.util.dot_score, "scale": 1.0},
    # computed by their own loss, a mini-batch of rows at a time, on our cache
    "joint": {"directions": ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")},
    "hardness": {"hardness_mode": "all_negatives", "hardness_strength": 3.0},
    "similarity": {"similarity_fct": sentence_transformers.util.euclidean_sim, "scale": 1.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_loss_and_gradients_equal_theirs(base, options):
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss as Theirs

    options = {"mini_batch_size": 5} | options
    width = 2 if options.get("partition_mode") else 3
    features = columns(base, width=width)
    for dropout in (False, True):
        truth = gradients(Theirs, base, features, dropout, **options)
        # kept graphs change what is encoded twice, not the numbers drawn
        for keep in (0.0, math.inf):
            ours = gradients(FusedMultipleNegativesRankingLoss, base, features, dropout, keep_bytes=keep, **options)
            assert_equal(ours, truth, 1e-4)


@pytest.mark.parametrize("options", [{}, OPTIONS["joint"]], ids=["fused", "theirs"])
def test_matryoshka_loss_trains_every_width(base, options):
    """It decorates ``calculate_loss``; so do others, and subclasses override it."""
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss as Theirs
    from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss

    def nested(make):
        return lambda model, **more: MatryoshkaLoss(model, make(model, **more), [32, 16, 4], [1.0, 2.0, 0.5])

    features, options = columns(base), {"mini_batch_size": 5} | options
    truth = gradients(nested(Theirs), base, features, **options)
    for keep in (0.0, math.inf):
        ours = gradients(nested(FusedMultipleNegativesRankingLoss), base, features, keep_bytes=keep, **options)
        assert_equal(ours, truth, 1e-4)
    widest = gradients(FusedMultipleNegativesRankingLoss, base, features, **options)
    assert not math.isclose(widest[0], truth[0], rel_tol=0.1)

    class Doubled(FusedMultipleNegativesRankingLoss):
        def calculate_loss(self, reps, labels=None, *, with_backward=False):
            loss = 2 * super().calculate_loss(reps, labels)
            if with_backward:
                loss.backward()
            return loss.detach() if with_backward else loss

    doubled = gradients(Doubled, base, features, mini_batch_size=5)
    plain = gradients(FusedMultipleNegativesRankingLoss, base, features, mini_batch_size=5)
    assert_equal((doubled[0] / 2, {name: value / 2 for name, value in doubled[1].items()}), plain, 1e-6)


@pytest.mark.parametrize("several", [False, True], ids=["pairs", "datasets with prompts and hard negatives"])
def test_their_trainer_gives_the_same_weights(base, tmp_path, several):
    """Accumulation, evaluation and the loss's config in the model card included."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss as Theirs

    data = Dataset.from_dict({"anchor": texts(24, 1), "positive": texts(24, 2)})
    more = {}
    if several:
        triplets = {"anchor": texts(16, 3), "positive": texts(16, 4), "negative": texts(16, 5)}
        data = {"pairs": data, "triplets": Dataset.from_dict(triplets)}
        more["prompts"] = {"pairs": {"anchor": "old "}, "triplets": {"anchor": "red car ", "positive": "tree "}}
    trained = []
    for make in (Theirs, FusedMultipleNegativesRankingLoss):
        model = copy.deepcopy(base)
        model.set_pooling_include_prompt(not several)
        args = SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            max_steps=3,
            learning_rate=1e-2,
            optim="sgd",
            save_strategy="no",
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=3,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            seed=3,
            **more,
        )
        trainer = SentenceTransformerTrainer(
            model=model, args=args, train_dataset=data, eval_dataset=data, loss=make(model, mini_batch_size=3)
        )
        trainer.train()
        logs = [next((v for k, v in entry.items() if k.endswith("loss")), None) for entry in trainer.state.log_history]
        trained.append((dict(model.named_parameters()), [loss for loss in logs if loss is not None]))
    (theirs, their_losses), (ours, our_losses) = trained
    assert our_losses == pytest.approx(their_losses, rel=1e-4)
    assert len(our_losses) == 5 + several  # three steps, an evaluation of each dataset, the mean
    for name, want in theirs.items():
        assert torch.allclose(ours[name], want, rtol=1e-4, atol=1e-6), name


def ranks(rank: int, world: int, folder: str) -> None:
    """Gradients under DDP, theirs and ours, the candidates of both ranks gathered or not; equal and averaged."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss as Theirs
    from torch.nn.parallel import DistributedDataParallel

    base = SentenceTransformer(folder, device="cpu").eval()
    features = [base.preprocess(texts(7, 10 * rank + seed)) for seed in range(3)]
    for options in OPTIONS.values():
        for gathered in (False, True):
            found = []
            for make in (Theirs, FusedMultipleNegativesRankingLoss):
                model = copy.deepcopy(base)
                loss = make(model, gather_across_devices=gathered, **({"mini_batch_size": 3} | options))
                loss.model = DistributedDataParallel(model, find_unused_parameters=True)  # as their trainer does
                value = loss([dict(f) for f in features[: 2 if options.get("partition_mode") else 3]], None)
                value.backward()
                torch.distributed.all_reduce(value.detach())
                grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
                found.append((float(value.detach()) / world, grads))
            assert_equal(found[1], found[0], 1e-4)


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_under_ddp(base, tmp_path):
    base.save(str(tmp_path))
    run_ranks(ranks, 2, str(tmp_path))


def test_wrong_arguments_are_errors(base):
    make = FusedMultipleNegativesRankingLoss
    with pytest.raises(ValueError, match="directions"):
        make(base, directions=("query_to_doc", "sideways"))
    with pytest.raises(ValueError, match="keep_bytes is -1"):
        make(base, keep_bytes=-1)
    with pytest.raises(ValueError, match="1 columns"):
        make(base)(columns(base, width=1), None)
