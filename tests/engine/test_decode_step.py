"""A decode step recorded or compiled gives what it gives operation by operation.

A CUDA graph replays the same operations on the same memory; ``traced`` does that on the CPU, so that anything a step
would take from the host (its number, a shape) shows as a wrong token.
"""

from __future__ import annotations

import warnings
from itertools import pairwise

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import rime_fast.engine.decode as decode_step
from rime_fast.engine.decode import DecodeCache, DecodeStep, PrefillRecorder, choose_decoder
from rime_fast.engine.rollout import generate_rollouts
from rime_fast.model.dual_mode import DualModeModel
from rime_fast.model.tiny import FAMILIES, tiny_model
from rime_fast.model.tiny_batch import tiny_batch

VOCAB = 96
PROMPTS = [
    [3, ("image", 4, 6), 9],
    [12],
    [2, ("image", 4, 4), 2, ("image", 8, 4), 14],
    [2, ("video", 2, 4, 4), 16],
]
# Stop tokens at which these greedy responses end early, so that rows are dropped while decoding.
OPTIONS = {"gen_id": 20, "max_new_tokens": 60, "group_size": 4, "temperature": 0.0, "stop_ids": [21, 30, 31, 32]}


def dual(family="qwen2_vl", **sizes):
    return DualModeModel.from_model(tiny_model(family, vocab_size=VOCAB, seed=0, init_std=0.15, **sizes)).eval()


def same(found, expected):
    for name in ("tokens", "lengths", "finished"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    torch.testing.assert_close(found.logp, expected.logp, rtol=0, atol=1e-5)
    error = (found.gen_states - expected.gen_states).norm() / expected.gen_states.norm()
    assert float(error) < 1e-5


@pytest.fixture
def graphs(monkeypatch):
    """The CUDA recorder's stand-in; the list has the number of rows of every recording."""
    recorded = []

    def traced(step, pool):
        graph = make_fx(step)()
        outputs = tuple(x.clone() for x in graph())
        recorded.append(len(outputs[0]))

        def replay():
            for memory, new in zip(outputs, graph(), strict=True):
                memory.copy_(new)

        return outputs, replay

    monkeypatch.setattr(decode_step, "record_graph", traced)
    monkeypatch.setattr(decode_step, "graph_pool", lambda: None)
    monkeypatch.setattr("rime_fast.engine.rollout.choose_decoder", lambda name, device: name)
    return recorded


@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_steps_give_the_same_tokens(family, graphs):
    model = dual(family)
    batch = tiny_batch(model.config, PROMPTS, seed=2)
    options = OPTIONS | {"gen_id": VOCAB, "stop_ids": [], "max_new_tokens": 24}
    expected = generate_rollouts(model, batch, **options, decode="eager")
    same(generate_rollouts(model, batch, **options, decode="graph", check_every=8), expected)
    assert graphs == [16]


def test_dropped_rows_make_a_new_recording(graphs):
    model = dual(layers=1)
    batch = tiny_batch(model.config, PROMPTS, seed=2)
    expected = generate_rollouts(model, batch, **OPTIONS, decode="eager")
    same(generate_rollouts(model, batch, **OPTIONS, decode="graph", check_every=8), expected)
    assert graphs[0] == 16
    assert 1 < len(graphs) <= 4
    assert all(2 * after <= before for before, after in pairwise(graphs))


def test_sampling_over_replayed_steps_is_reproducible(graphs):
    model = dual(layers=1)
    batch = tiny_batch(model.config, PROMPTS, seed=2)

    def run(decode):
        options = OPTIONS | {"temperature": 1.0, "max_new_tokens": 12, "check_every": 8, "decode": decode}
        return generate_rollouts(model, batch, **options, generator=torch.Generator().manual_seed(4))

    same(run("graph"), run("eager"))


def test_a_step_that_cannot_be_recorded_runs_all_the_same(graphs, monkeypatch):
    def refuse(step, pool):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(decode_step, "record_graph", refuse)
    model = dual()
    batch = tiny_batch(model.config, PROMPTS, seed=2)
    with pytest.warns(UserWarning, match="could not be recorded") as caught:
        found = generate_rollouts(model, batch, **OPTIONS, decode="graph")
    assert len(caught) == 1
    same(found, generate_rollouts(model, batch, **OPTIONS))


def compiled(monkeypatch, backend):
    torch.compiler.reset()
    function = torch.compile(decode_step.forward, backend=backend, fullgraph=True)
    monkeypatch.setattr(decode_step, "compiled_forward", lambda: function)


def compiled_equals_eager(model, *many_prompts, **more):
    for prompts in many_prompts:
        batch = tiny_batch(model.config, prompts, seed=2)
        expected = generate_rollouts(model, batch, **OPTIONS | more)
        same(generate_rollouts(model, batch, **OPTIONS | more, decode="compile"), expected)


def test_the_step_compiles_as_one_graph(monkeypatch):
    """Dynamo takes the whole step without a break, and what it took in runs for later tokens and later phases."""
    compiled(monkeypatch, "eager")
    compiled_equals_eager(dual(layers=1), PROMPTS[:1], PROMPTS[:1], max_new_tokens=6, stop_ids=[])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_inductor_gives_the_same_tokens(family, monkeypatch):
    compiled(monkeypatch, "inductor")
    compiled_equals_eager(dual(family), PROMPTS, PROMPTS[:2])


def test_names_are_checked():
    cpu = torch.device("cpu")
    assert [choose_decoder(name, cpu) for name in ("auto", "eager", "compile")] == ["eager", "eager", "compile"]
    assert choose_decoder("auto", torch.device("cuda")) == "graph"
    with pytest.raises(ValueError, match="decode is 'fast'"):
        choose_decoder("fast", cpu)
    with pytest.raises(ValueError, match="CUDA graphs need a CUDA device"):
        choose_decoder("graph", cpu)
    model = dual()
    batch = tiny_batch(model.config, PROMPTS[1:2], seed=2)
    recorder = PrefillRecorder(batch["lengths"], cpu)
    names = ("input_ids", "lengths", "position_ids", "mm_token_type_ids")
    with torch.no_grad():
        hidden = model.encode_hidden(**{name: batch[name] for name in names}, layout=recorder)
    with pytest.raises(ValueError, match="over a cache that grows"):
        DecodeStep(model, DecodeCache(recorder, 1, 4), "graph", hidden[-1:], hidden[-1:])


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


class TestGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("family", FAMILIES)
    def test_graphs_give_the_eager_tokens(self, family):
        model = dual(family).cuda()
        batch = {
            k: v.cuda() if isinstance(v, torch.Tensor) else v
            for k, v in tiny_batch(model.config, PROMPTS, seed=2).items()
        }
        for amp in (False, True):
            with torch.autocast("cuda", torch.bfloat16, enabled=amp), warnings.catch_warnings():
                warnings.simplefilter("error")  # a step that could not be recorded
                graph = generate_rollouts(model, batch, **OPTIONS, decode="graph")
                eager = generate_rollouts(model, batch, **OPTIONS, decode="eager", check_every=8)
            assert (graph.tokens == eager.tokens).float().mean() > (0.8 if amp else 0.999)
            if not amp:
                torch.testing.assert_close(graph.gen_states, eager.gen_states, rtol=0, atol=1e-3)
