"""What each rank of the grouped contrastive tests does; run by test_contrastive_group.py."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from rime_fast.ops import collectives as collective_module
from rime_fast.ops.contrastive import agreement, contrastive_loss, cpu
from rime_fast.ops.contrastive.agreement import GATHER_LIMIT
from tests.ops.contrastive_cases import RIME_TERMS, Case, make_case, relative, run
from tests.ops.error_rule import cancellation


def share(case: Case, rank: int, queries: list[int], keys: list[int]) -> Case:
    """The rows of one rank: ``queries`` and ``keys`` count those of every rank."""
    settings: dict[str, Any] = dict(case.settings)
    for name in ("labels", "query_ids", "key_ids"):
        if name in settings:
            counts = keys if name == "key_ids" else queries
            settings[name] = settings[name].split(counts)[rank]
    return Case(
        {m: v.split(queries)[rank] for m, v in case.queries.items()},
        {m: v.split(keys)[rank] for m, v in case.keys.items()},
        case.temperature,
        settings,
        case.terms,
    )


def check_against_one_process(
    case: Case, queries: list[int], keys: list[int], dtype: torch.dtype, backend: str
) -> None:
    """Loss, terms and accuracy on every rank, own rows of dq and dk, and the temperature's gradient summed."""
    rank, tolerance = dist.get_rank(), 1e-10 if dtype == torch.float64 else 2e-5
    whole = run(case, torch.float64, "reference")
    found = run(share(case, rank, queries, keys), dtype, backend, group=dist.group.WORLD)
    errors = {"loss": relative(found.out.loss, whole.out.loss)}
    for name, value in whole.out.per_term.items():
        errors[f"term {name}"] = relative(found.out.per_term[name], value)
        errors[f"accuracy {name}"] = abs(float(found.out.accuracy[name] - whole.out.accuracy[name]))
    for name, gradient in whole.gradients.items():
        if name == "temperature":
            total = found.gradients[name].clone()
            dist.all_reduce(total)
            errors[name] = relative(total, gradient) / cancellation(gradient, whole.temperature_terms)
        else:
            own = gradient.split(queries if name.startswith("queries") else keys)[rank]
            errors[name] = relative(found.gradients[name], own)
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= tolerance, f"{worst}: {errors[worst]:.2e} ({backend}, {dtype}, {case.settings.keys()})"


def equality(rank: int, world: int) -> None:
    """Unequal rows, labels on other ranks, all masks; gathered and ringed; every backend."""
    queries, keys = [3 + 2 * r for r in range(world)], [8 + world - r for r in range(world)]
    masked = make_case(sum(queries), sum(keys), 16, shuffled=True, ids=True, margin=0.1)
    one_way = make_case(sum(queries), sum(keys), 16, shuffled=True, symmetric=False)
    several = make_case(sum(queries), sum(keys), 16, positives=3, ids=True, margin=0.1)
    nested = replace(several, settings={**several.settings, "dims": [3, 8, 16], "dim_weights": [1.0, 0.5, 2.0]})
    for limit in ("8192", "0"):
        os.environ[GATHER_LIMIT] = limit
        for case in (masked, one_way, several, nested):
            check_against_one_process(case, queries, keys, torch.float64, "chunked")
            if limit != "0":
                check_against_one_process(case, queries, keys, torch.float64, "reference")
        for case in (masked, several):
            check_against_one_process(case, queries, keys, torch.float32, "chunked")
    os.environ.pop(GATHER_LIMIT)
    cold = make_case(sum(queries), sum(keys), 16, shuffled=True, temperature=0.004)  # the general kernels
    check_against_one_process(cold, queries, keys, torch.float32, "chunked")


def default_labels(rank: int, world: int) -> None:
    """Without labels, key i of the own rank is the positive; equal rows take the copy-free path."""
    torch.manual_seed(1)
    queries, keys = torch.randn(world, 5, 6).double(), torch.randn(world, 7, 6).double()
    labels = torch.cat([torch.arange(5) + 7 * r for r in range(world)])
    terms = [("a", "a", 1.0)]
    options: dict[str, Any] = {"terms": terms, "temperature": 0.5}
    own = contrastive_loss({"a": queries[rank]}, {"a": keys[rank]}, group=dist.group.WORLD, **options)
    whole = contrastive_loss({"a": queries.flatten(0, 1)}, {"a": keys.flatten(0, 1)}, labels=labels, **options)
    assert relative(own.loss, whole.loss) < 1e-12


def ddp_scaling(rank: int, world: int) -> None:
    """The documented rule: under DDP's averaging, loss x world size gives the gradient of the global mean loss."""
    torch.manual_seed(2)
    inputs, targets = torch.randn(world * 4, 5), torch.randn(world * 4, 5)
    model, single = torch.nn.Linear(5, 3, bias=False), torch.nn.Linear(5, 3, bias=False)
    single.load_state_dict(model.state_dict())
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    rows = slice(4 * rank, 4 * rank + 4)
    out = wrapped(torch.cat([inputs[rows], targets[rows]]))
    options: dict[str, Any] = {"terms": [("a", "a", 1.0)], "temperature": 0.5}
    loss = contrastive_loss({"a": out[:4]}, {"a": out[4:]}, group=dist.group.WORLD, **options).loss
    (loss * world).backward()
    expected = contrastive_loss({"a": single(inputs)}, {"a": single(targets)}, **options).loss
    expected.backward()
    assert model.weight.grad is not None
    assert single.weight.grad is not None
    assert relative(loss, expected.detach()) < 1e-5
    assert relative(model.weight.grad, single.weight.grad) < 1e-5


def partly_frozen(rank: int, world: int) -> None:
    """Keys that train on one rank only: every rank still takes part in the exchange of dk."""
    torch.manual_seed(3)
    queries, keys = torch.randn(4, 3).requires_grad_(), torch.randn(4, 3, requires_grad=rank == 0)
    for limit in ("8192", "0"):
        os.environ[GATHER_LIMIT] = limit
        contrastive_loss({"a": queries}, {"a": keys}, terms=[("a", "a", 1.0)], group=dist.group.WORLD).loss.backward()
    os.environ.pop(GATHER_LIMIT)
    assert (keys.grad is not None) == (rank == 0)


def errors(rank: int, world: int) -> None:
    """Whatever is wrong on one rank is a ValueError with the same message on every rank, and the group lives on."""
    rows = torch.ones(3, 4)

    def fails(message: str, sides: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None, **changes: Any) -> None:
        queries, keys = sides or ({"disc": rows, "gen": rows}, {"disc": rows, "gen": rows})
        arguments = {"terms": RIME_TERMS, "group": dist.group.WORLD, **changes}
        with pytest.raises(ValueError, match=message):
            contrastive_loss(queries, keys, **arguments)

    last = rank == world - 1
    fails("terms differs between ranks", terms=RIME_TERMS[:2] if last else RIME_TERMS)
    narrow = {"disc": rows[:, :3], "gen": rows[:, :3]}
    fails("the embedding size D .* differs", sides=(narrow, narrow) if last else None)
    fails(f"on rank {world - 1} of the group: queries is empty", sides=({}, {}) if last else None)
    fails(f"labels on rank {world - 1} hold values", labels=torch.arange(3) + (99 if last else 0))
    fails("temperature differs", temperature=0.1 if last else 0.2)
    fails("temperature differs .*: 0.2.* on rank 0, 0.1", temperature=torch.tensor(0.1 if last else 0.2))
    fails("temperature is -0.2", temperature=torch.tensor(-0.2 if last else 0.2))
    fails("dims or dim_weights differs", dims=[2, 4] if last else [4])
    fails("margin differs", margin=0.1 if last else None)
    fails("symmetric differs", symmetric=last)
    fails("query_ids and key_ids", **({"query_ids": torch.arange(3), "key_ids": torch.arange(3)} if last else {}))
    fails("on rank 0 of the group: backend is", backend="nonsense" if rank == 0 else "auto")
    trained = {"disc": rows.clone().requires_grad_(), "gen": rows}
    fails("requires grad differs", sides=(trained, trained) if last else None)
    for bad in (float("nan"), float("inf")):
        broken = rows.clone()
        broken[2, 1] = bad
        for backend in ("chunked", "reference"):
            text = rf"on rank {world - 1} of the group: queries\['gen'\] holds NaN or Inf in row 2"
            sides = {"disc": rows, "gen": broken}, {"disc": rows, "gen": rows}
            fails(text, sides=sides if last else None, backend=backend)
            text = rf"on rank {world - 1} of the group: keys\['disc'\] holds NaN or Inf in row 2"
            sides = {"disc": rows, "gen": rows}, {"disc": broken, "gen": rows}
            fails(text, sides=sides if last else None, backend=backend)
    empty = {"disc": rows[:0], "gen": rows[:0]}
    fails(f"on rank {world - 1} of the group: queries.*has shape .0, 4.", sides=(empty, empty) if last else None)
    mixed = {"disc": rows, "gen": rows}, {"disc": rows, "gen": rows[:, :3]}
    fails(f"on rank {world - 1} of the group: term .* expected equal D", sides=mixed if last else None)
    fails("the number of positives a query", labels=torch.tensor([[0, 1]] * 3) if last else None)
    query = torch.randn(3, 4, requires_grad=True)
    loss = contrastive_loss({"d": query}, {"d": rows}, terms=[("d", "d", 1.0)], group=dist.group.WORLD).loss
    with pytest.raises(RuntimeError, match="no second derivative; use backend='reference'"):
        torch.autograd.grad(loss, query, create_graph=True)
    fails("got none in row 1", labels=torch.tensor([[0, 1], [-1, -1], [1, -1]]))
    fails(
        f"labels on rank {world - 1} hold values from -1 to 99; expected -1 <=",
        labels=torch.tensor([[0, 99 if last else 1], [1, -1], [2, -1]]),
    )
    fails("temperature is nan", temperature=torch.tensor(float("nan") if last else 1.0))


def collectives(rank: int, world: int) -> None:
    """One gather of keys and one scatter of dk whatever the number of terms, modes and tiles; small rest."""
    case = share(make_case(8 * world, 8 * world, 4, ids=True, margin=0.1), rank, [8] * world, [8] * world)
    short = share(make_case(8 * world, 8 * world, 4), rank, [8] * world, [8] * world)
    with pytest.MonkeyPatch.context() as patch:
        counts: Counter[str] = Counter()

        def count(module: Any, name: str) -> None:
            inner = getattr(module, name)

            def counted(*args: Any, **kwargs: Any) -> Any:
                counts[name] += 1
                return inner(*args, **kwargs)

            patch.setattr(module, name, counted)

        count(collective_module, "all_gather_single")
        count(collective_module, "reduce_scatter_single")
        count(dist, "all_reduce")
        count(dist, "batch_isend_irecv")
        for one, rest in ((short, (0, 3)), (case, (1, 4))):
            for terms in (RIME_TERMS[:1], RIME_TERMS):
                for tile in ((512, 2048), (3, 5)):
                    patch.setattr(cpu, "TILE", tile)
                    counts.clear()
                    run(replace(one, terms=terms), torch.float32, "chunked", group=dist.group.WORLD)
                    ids, reduced = rest  # one more gather for ids; maxima, sums and totals (and the margin's limits)
                    assert counts == {"all_gather_single": 2 + ids, "reduce_scatter_single": 1, "all_reduce": reduced}


def words_only_where_records_differ(rank: int, world: int) -> None:
    """The first collective is the same whatever a rank was given or remembers; the long exchange is for trouble."""
    rows, sizes, exchanged = torch.ones(3, 4), [], []
    gather, exchange = collective_module.all_gather_single, agreement._exchange

    def gathered(out: Tensor, values: Tensor, **more: Any) -> None:
        sizes.append(tuple(values.shape))
        gather(out, values, **more)

    def worded(*arguments: Any) -> list[str]:
        exchanged.append(rank)
        return exchange(*arguments)

    several = torch.tensor([[0, -1], [1, 2], [2, 0]])
    calls: list[dict[str, Any]] = [{}, {}, {"labels": several}, {"temperature": torch.tensor(0.1, requires_grad=True)}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collective_module, "all_gather_single", gathered)
        patch.setattr(agreement, "_exchange", worded)
        for call in calls:
            contrastive_loss({"a": rows}, {"a": rows}, terms=[("a", "a", 1.0)], group=dist.group.WORLD, **call)
        assert not exchanged
        del sizes[:]
        changed = {"margin": 0.1} if rank == 0 else {}  # rank 0 alone leaves what every rank did before
        with pytest.raises(ValueError, match="margin differs"):
            contrastive_loss({"a": rows}, {"a": rows}, terms=[("a", "a", 1.0)], group=dist.group.WORLD, **changed)
    assert exchanged == [rank]
    assert sizes == [(1, len(agreement.FIELDS)), (1, agreement.EXPLANATION_BYTES)]
    huge = torch.full((3, 4), 1e30)  # its norm overflows, its rows are finite: nothing is wrong after all
    contrastive_loss({"a": huge}, {"a": rows}, terms=[("a", "a", 1.0)], temperature=1e38, group=dist.group.WORLD)


def thousand_pairs(rank: int, world: int) -> None:
    """1,024 pairs on all ranks are 1,024 pairs on one, gathered and ringed."""
    case, counts = make_case(1024, 1024, 8, temperature=0.02, peaked=True), [1024 // world] * world
    case.terms = [("disc", "disc", 1.0), ("gen", "disc", 0.5)]
    for limit in ("8192", "0"):
        os.environ[GATHER_LIMIT] = limit
        check_against_one_process(case, counts, counts, torch.float64, "chunked")
    os.environ.pop(GATHER_LIMIT)


SCENARIOS = {
    f.__name__: f
    for f in (
        equality,
        default_labels,
        ddp_scaling,
        partly_frozen,
        errors,
        collectives,
        words_only_where_records_differ,
        thousand_pairs,
    )
}


def run_scenarios(rank: int, world: int, *names: str) -> None:
    for name in names:
        SCENARIOS[name](rank, world)
