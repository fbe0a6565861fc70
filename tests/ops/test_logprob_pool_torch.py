"""The log-prob operator inside torch: opcheck, compile, gradcheck, autocast, retained graphs, backends."""

from __future__ import annotations

import pytest
import torch

from rime_fast.ops.logprob_pool import fused_linear_ce, fused_logprob_pool, problem
from rime_fast.ops.logprob_pool.problem import Needs, Options
from tests.ops.logprob_cases import Case, relative


def _operator_arguments(case: Case, options: bool) -> tuple:
    leaves, t = case.leaves(), case.tensors
    starts, ends = torch.cat([t["last"], t["starts"]]), torch.cat([t["last"] + 1, t["ends"]])
    head = leaves["hidden"], leaves["lm_head"], t["targets"]
    cap = torch.tensor(3.0) if options else None
    numbers = Options("chunked", entropy=options, needs=Needs(True, True, options, True)).encode()
    return (*head, starts, ends, leaves.get("bias"), leaves["temperature"], cap), t["token_weight"], numbers


@pytest.mark.parametrize("options", [False, True])
def test_opcheck(options: bool) -> None:
    tensors, weight, numbers = _operator_arguments(Case(13, 8, 30, bias=options), options)
    torch.library.opcheck(torch.ops.rime_fast.logprob_pool.default, (*tensors, numbers, ""))
    torch.library.opcheck(torch.ops.rime_fast.linear_ce.default, (*tensors, weight, numbers, ""))
    with torch.no_grad():
        found = torch.ops.rime_fast.linear_ce(*tensors, weight, numbers, "")
    args = list(found[6:]), torch.tensor(0.3), found[4] * 2, tensors[3:5], found[4:6], numbers
    torch.library.opcheck(torch.ops.rime_fast.scale_gradients_.default, args)


def _objective(hidden, lm_head, bias, temperature, targets, weight, last, starts, ends):
    pools = {"last": last, "mean": (starts, ends)}
    loss, out = fused_linear_ce(
        hidden, lm_head, targets, token_weight=weight, pools=pools, bias=bias, temperature=temperature, softcap=9.0
    )
    scored = fused_logprob_pool(hidden, lm_head, targets, pools=pools, bias=bias, temperature=temperature, entropy=True)
    total = 0.3 * loss + (scored.logp**2).sum() + scored.entropy.sum()
    return total + out.embeddings["last"].sum() + (scored.embeddings["mean"] ** 3).sum()


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_as_one_graph(compiler: str) -> None:
    case = Case(13, 8, 30)
    t = case.tensors
    rest = t["targets"], t["token_weight"], t["last"], t["starts"], t["ends"]
    compiled = torch.compile(_objective, fullgraph=True, backend=compiler)
    results = []
    for function in (_objective, compiled):
        leaves = case.leaves()
        args = [leaves[n] for n in ("hidden", "lm_head", "bias", "temperature")]
        value = function(*args, *rest)
        results.append((value, *torch.autograd.grad(value, args)))
    for expected, found in zip(*results, strict=True):
        assert relative(found, expected) < 1e-6


def test_compiled_checks_raise() -> None:
    """Values inside tensors fail as asynchronous assertions, as they do on a GPU: nothing is read by the host."""
    compiled = torch.compile(fused_logprob_pool, fullgraph=True, backend="aot_eager")
    hidden, lm_head, targets = torch.randn(3, 8), torch.randn(30, 8), torch.tensor([1, 29, 2])
    for change, message in (
        ({"targets": torch.tensor([1, 30, 2])}, "targets: expected values in"),
        ({"pools": {"disc": torch.tensor([0, 3])}}, r"pools\['disc'\]: expected values in"),
        ({"pools": {"mean": (torch.tensor([2]), torch.tensor([2]))}}, r"pools\['mean'\]: expected starts < ends"),
        ({"temperature": torch.tensor(0.0)}, "temperature: expected a value above 0"),
        ({"max_scored": 2}, "max_scored: more than 2 rows"),
    ):
        with pytest.raises(RuntimeError, match=message):
            compiled(**({"hidden": hidden, "lm_head": lm_head, "targets": targets} | change))
    with pytest.raises(ValueError, match="temperature: expected a finite number above 0"):
        fused_logprob_pool(hidden, lm_head, targets, temperature=-1.0)


def test_options_may_change_between_compiled_calls() -> None:
    """Numbers and sizes that change become symbols; the graph stays one and the results those of plain calls."""

    def objective(hidden, lm_head, targets, temperature, softcap):
        found = fused_logprob_pool(hidden, lm_head, targets, temperature=temperature, softcap=softcap)
        return fused_linear_ce(hidden, lm_head, targets, temperature=temperature)[0] + (found.logp**2).sum()

    compiled, lm_head = torch.compile(objective, fullgraph=True, backend="aot_eager"), torch.randn(30, 8)
    for rows, temperature, softcap in ((5, 0.7, 3.0), (5, 0.8, 3.0), (9, 0.9, 4.0), (11, 1.1, 5.0), (11, 1, None)):
        results = []
        for function in (objective, compiled):
            hidden, head = torch.randn(rows, 8, generator=torch.Generator().manual_seed(1)), lm_head.clone()
            hidden.requires_grad_(), head.requires_grad_()
            value = function(hidden, head, torch.arange(rows), temperature, softcap)
            results.append(torch.autograd.grad(value, (hidden, head)))
        for expected, found in zip(*results, strict=True):
            assert relative(found, expected) < 1e-6


def test_the_graph_names_the_code_that_made_it() -> None:
    """Compiled graphs kept on disk by an older version of the backward must not be taken for this one's."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    hidden, lm_head, targets = torch.randn(3, 8, requires_grad=True), torch.randn(30, 8), torch.tensor([1, 2, 3])
    torch.compile(lambda: fused_logprob_pool(hidden, lm_head, targets).logp, backend=keep)()
    torch.compile(lambda: fused_linear_ce(hidden, lm_head, targets)[0], backend=keep)()
    assert len(graphs) == 2
    assert all(str(problem.REVISION) in code for code in graphs)
    assert problem._digest() == problem.REVISION


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck_of_the_reference(softcap: float | None) -> None:
    case = Case(5, 4, 7, softcap=softcap)
    leaves = case.leaves(torch.float64)

    def outputs(*values):
        given = dict(zip(leaves, values, strict=True))
        out = fused_logprob_pool(
            given["hidden"],
            given["lm_head"],
            case.tensors["targets"],
            entropy=True,
            **case.options(given, backend="reference"),
        )
        return out.logp, out.entropy, *out.embeddings.values()

    assert torch.autograd.gradcheck(outputs, tuple(leaves.values()))
    assert torch.autograd.gradgradcheck(outputs, tuple(leaves.values()))


@pytest.mark.parametrize("function", [fused_linear_ce, fused_logprob_pool])
def test_second_derivative_is_refused_by_name(function) -> None:
    """Never a wrong number: the reference has it (above), the fused backends say so."""
    hidden, lm_head, targets = torch.randn(5, 8, requires_grad=True), torch.randn(30, 8), torch.randint(0, 30, (5,))
    found = function(hidden, lm_head, targets, backend="chunked")
    value = found[0] if function is fused_linear_ce else found.logp.sum()
    (first,) = torch.autograd.grad(value, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use backend='reference'"):
        torch.autograd.grad((first**2).sum(), hidden)


def test_retained_graph_gives_the_same_gradient_again() -> None:
    """The first pass scales the made gradients in place; the second must not see that."""
    case = Case(20, 8, 30)
    leaves, t = case.leaves(), case.tensors
    loss, _ = fused_linear_ce(leaves["hidden"], leaves["lm_head"], t["targets"], **case.options(leaves))
    passes = [torch.autograd.grad(loss * 0.25, list(leaves.values()), retain_graph=True) for _ in range(3)]
    for again in passes[1:]:
        for found, expected in zip(again, passes[0], strict=True):
            assert relative(found, expected) < 1e-5


def test_gradient_through_logp_of_the_loss_call() -> None:
    case = Case(20, 8, 30)
    results = []
    for backend in ("chunked", "reference"):
        leaves, t = case.leaves(), case.tensors
        loss, out = fused_linear_ce(
            leaves["hidden"], leaves["lm_head"], t["targets"], entropy=True, **case.options(leaves, backend=backend)
        )
        total = 0.5 * loss + (out.logp * t["token_weight"]).sum() + (out.entropy * t["grad_entropy"]).sum()
        results.append(torch.autograd.grad(total, list(leaves.values())))
    for found, expected in zip(*results, strict=True):
        assert relative(found, expected) < 1e-5


def test_tied_head_and_embedding() -> None:
    """The head is also the input embedding: both gradients meet in one parameter."""
    weight = torch.randn(30, 8, requires_grad=True)
    tokens, targets = torch.randint(0, 30, (12,)), torch.randint(0, 30, (12,))
    loss, _ = fused_linear_ce(torch.tanh(weight[tokens]), weight, targets)
    expected = torch.nn.functional.cross_entropy(torch.tanh(weight[tokens]) @ weight.t(), targets, reduction="sum")
    found, truth = torch.autograd.grad(loss, weight)[0], torch.autograd.grad(expected, weight)[0]
    assert relative(found, truth) < 1e-5


def test_autocast_casts_the_operands() -> None:
    case = Case(20, 16, 30)
    half = Case(20, 16, 30, torch.bfloat16)
    half.tensors = case.tensors | {n: case.tensors[n].bfloat16() for n in ("hidden", "lm_head")}
    expected = half.run("chunked")
    with torch.autocast("cpu", torch.bfloat16):
        found = case.run("chunked")
    assert torch.equal(found["logp"], expected["logp"])
    assert found["d_lm_head"].dtype == torch.float32
    assert relative(found["d_hidden"], expected["d_hidden"]) < 1e-6


def test_fp16_gradients_survive_until_the_loss_scale() -> None:
    """A weight of 1e-9 underflows in fp16; the loss scaler's factor arrives only in the backward."""
    hidden, lm_head = torch.randn(9, 16).half().requires_grad_(), torch.randn(30, 16).half().requires_grad_()
    weight = torch.full((9,), 1e-9)
    loss, _ = fused_linear_ce(hidden, lm_head, torch.randint(0, 30, (9,)), token_weight=weight)
    grads = torch.autograd.grad(loss * 1e9, (hidden, lm_head))
    assert all(g.dtype == torch.float16 and (g != 0).any(dim=1).all() for g in grads)


def test_environment_and_explicit_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    args = torch.randn(3, 8), torch.randn(30, 8), torch.randint(0, 30, (3,))
    with pytest.raises(ValueError, match="backend='cuda' cannot run here"):
        fused_logprob_pool(*args, backend="cuda")
    with pytest.raises(ValueError, match=r"chunked.*fp64"):
        fused_logprob_pool(args[0].double(), args[1].double(), args[2], backend="chunked")
    assert fused_logprob_pool(args[0].double(), args[1].double(), args[2]).logp.dtype == torch.float64
    monkeypatch.setenv("RIME_FAST_BACKEND", "logprob=reference")
    hidden = args[0].clone().requires_grad_()
    assert "Rime" not in type(fused_logprob_pool(hidden, *args[1:]).logp.grad_fn).__name__
    monkeypatch.setenv("RIME_FAST_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="RIME_FAST_BACKEND for logprob is 'nonsense'"):
        fused_logprob_pool(*args)
