"""Backends give what the policy itself would: in parts, through vLLM's interface, and with loops cut."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from rime_fast.data.collate import Collator
from rime_fast.data.records import Side
from rime_fast.data.templates import get_template
from rime_fast.engine.rollout import LocalBackend, RolloutBackend, Sampling, generate_rollouts
from rime_fast.engine.rollout_buffer import RolloutBuffer
from rime_fast.engine.sampling import LoopGuard, cut_loops
from rime_fast.engine.vllm_backend import VllmBackend, checkpoint_weights
from rime_fast.model.dual_mode import DualModeModel
from rime_fast.model.shared_prefix import shared_prefix_batch
from rime_fast.model.tiny import FAMILIES, tiny_model, tiny_processor, tiny_tokenizer
from rime_fast.model.tokens import add_embedding_tokens
from rime_fast.model.vision_cache import VisionCache

TEMPLATE = get_template("rewrite", instruction="describe", system=None)


def picture(height, width, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def setting():
    return make_setting("qwen2_vl")


def make_setting(family):
    processor = tiny_processor(tiny_tokenizer(["red blue which one describe user assistant <rewrite> </rewrite>"]))
    model = tiny_model(family, tokenizer=processor.tokenizer, seed=3, init_std=0.15)
    model.config.tie_word_embeddings = True
    gen_id = add_embedding_tokens(model, processor.tokenizer).gen_id
    model = DualModeModel.from_model(model).eval()
    sides = [
        Side(text="which one", images=[picture(16, 24, 0), picture(8, 16, 1)], id="a"),
        Side(text="red", id="b"),
        Side(text="blue red which", images=[picture(16, 16, 2)], id="c"),
    ]
    collator = Collator(processor, TEMPLATE, model.config, ids=False)
    return SimpleNamespace(
        model=model, sides=sides, prompts=collator.collate_prompts(sides), gen_id=gen_id, collator=collator
    )


def greedy(setting, **more):
    return Sampling(**({"gen_id": setting.gen_id, "max_new_tokens": 12, "temperature": 0.0, "group_size": 2} | more))


def buffer_for(setting, sampling):
    return RolloutBuffer.make(
        prompts=len(setting.sides),
        group_size=sampling.group_size,
        hidden=64,
        device="cpu",
        max_tokens=sampling.max_new_tokens,
        pad_id=sampling.pad_id,
    )


def same(found, expected):
    for name in ("tokens", "lengths", "finished"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    torch.testing.assert_close(found.logp, expected.logp, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("at_once", [None, 1, 3, 4, 100])
def test_the_policy_decodes_in_parts(setting, at_once):
    backend: RolloutBackend = LocalBackend(at_once)
    sampling = greedy(setting)
    expected = generate_rollouts(setting.model, setting.prompts, **vars(sampling))
    same(backend.generate(setting.model, setting.sides, setting.prompts, sampling), expected)
    buffer = buffer_for(setting, sampling)
    same(backend.generate(setting.model, setting.sides, setting.prompts, sampling, buffer), expected)
    longest = expected.tokens.shape[1]
    assert torch.equal(buffer.tokens[:, :longest], expected.tokens)
    torch.testing.assert_close(buffer.gen_states, expected.gen_states)
    torch.testing.assert_close(buffer.disc_states, expected.disc_states)


@pytest.mark.parametrize("at_once", [None, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_frozen_tower_sees_every_image_once(family, at_once):
    """Prefill, reference and policy: the trunk runs once, and values and the mergers' gradients stay the same."""
    setting = make_setting(family)
    model, frozen = setting.model, setting.model.model.visual
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_("merger" in name)
    reference = copy.deepcopy(model).requires_grad_(False)
    sampling = greedy(setting)
    found, seen = [], []
    handles = [m.model.visual.blocks[0].register_forward_hook(lambda *_: seen.append(1)) for m in (model, reference)]
    for cache in (None, VisionCache(keep=True)):
        prompts = setting.prompts if cache is None else setting.prompts | {"vision_cache": cache}
        buffer = buffer_for(setting, sampling)
        rollout = LocalBackend(at_once).generate(model, setting.sides, prompts, sampling, buffer)
        batch = shared_prefix_batch(prompts, buffer.responses())
        with torch.no_grad():
            first = reference(**batch, pools={}).logp
        model.zero_grad()
        out = model(**batch)
        (out.logp.sum() + out.embeddings["gen"].square()[:, ::2].sum()).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append([rollout.tokens, first, out.logp.detach(), out.embeddings["gen"].detach(), gradients])
    for handle in handles:
        handle.remove()
    plain_calls = (2 if at_once else 1) + 2
    assert len(seen) == plain_calls + 1
    for plain, cached in zip(*found, strict=True):
        torch.testing.assert_close(cached, plain, rtol=1e-5, atol=1e-6)
    assert any("merger" in name for name in found[1][-1])


def test_a_vision_cache_of_other_pixels_is_refused(setting):
    for parameter in setting.model.model.visual.parameters():
        parameter.requires_grad_(False)
    cache = VisionCache(keep=True)
    generate_rollouts(setting.model, setting.prompts | {"vision_cache": cache}, gen_id=setting.gen_id, max_new_tokens=2)
    other = setting.collator.collate_prompts(setting.sides[2:])
    with pytest.raises(ValueError, match="the vision cache holds"):
        generate_rollouts(setting.model, other | {"vision_cache": cache}, gen_id=setting.gen_id, max_new_tokens=2)


def test_settings_of_the_local_backend_are_checked():
    with pytest.raises(ValueError, match="at_once is 0"):
        LocalBackend(0)
    with pytest.raises(ValueError, match="check_every is 0"):
        LocalBackend(check_every=0)


class StandIn:
    """vLLM's ``LLM`` as far as the backend uses it: its own weights, text and images in, completions out."""

    def __init__(self, setting):
        self.setting, self.cache_resets, self.seen = setting, 0, []
        self.model = tiny_model("qwen2_vl", tokenizer=setting.collator.encoder.tokenizer, seed=8, init_std=0.15)
        self.model = DualModeModel.from_model(self.model).eval()
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=self.load))
        worker = SimpleNamespace(model_runner=runner)
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))

    def load(self, weights):
        missing = self.model.load_state_dict(dict(weights), strict=False).missing_keys
        assert set(missing) <= {"lm_head.weight"}

    def reset_prefix_cache(self):
        self.cache_resets += 1

    def generate(self, requests, *, sampling_params, use_tqdm):
        self.seen.append((requests, sampling_params))
        p = sampling_params
        assert p.logprobs == 0
        assert p.ignore_eos
        rollout = generate_rollouts(
            self.model,
            self.setting.prompts,
            gen_id=p.stop_token_ids[0],
            stop_ids=p.stop_token_ids[1:],
            group_size=p.n,
            max_new_tokens=p.max_tokens,
            temperature=p.temperature,
            top_p=p.top_p,
            top_k=p.top_k,
            suppress_ids=list(p.logit_bias or ()),
        )
        answers = []
        for b in range(len(requests)):
            outputs = []
            for row in range(b * p.n, (b + 1) * p.n):
                ids = rollout.tokens[row, : rollout.lengths[row]].tolist()
                scores = rollout.logp[row, : len(ids)].tolist()
                steps = [{i: SimpleNamespace(logprob=x)} for i, x in zip(ids, scores, strict=True)]
                outputs.append(SimpleNamespace(token_ids=ids, logprobs=steps))
            answers.append(SimpleNamespace(outputs=outputs))
        return answers


def test_vllm_gets_the_weights_and_gives_the_samples(setting):
    engine = StandIn(setting)
    backend: RolloutBackend = VllmBackend(engine, TEMPLATE, SimpleNamespace)
    sampling = greedy(setting, suppress_ids=(setting.collator.image_id,))
    expected = LocalBackend().generate(setting.model, setting.sides, setting.prompts, sampling)
    before = backend.generate(setting.model, setting.sides, setting.prompts, sampling)
    assert not torch.equal(before.tokens, expected.tokens)  # other weights
    backend.refresh(setting.model)
    assert engine.cache_resets == 1
    same(backend.generate(setting.model, setting.sides, setting.prompts, sampling), expected)
    buffer = buffer_for(setting, sampling)
    found = backend.generate(setting.model, setting.sides, setting.prompts, sampling, buffer)
    longest = found.tokens.shape[1]
    assert torch.equal(buffer.tokens[:, :longest], expected.tokens)
    assert torch.equal(buffer.finished, expected.finished)
    assert torch.equal(buffer.lengths, expected.lengths)
    torch.testing.assert_close(buffer.logp[:, :longest], expected.logp, rtol=1e-5, atol=1e-5)
    requests, parameters = engine.seen[-1]
    assert [len(r.get("multi_modal_data", {}).get("image", [])) for r in requests] == [2, 0, 1]
    assert all(r["prompt"] == TEMPLATE.render_prompt(s) for r, s in zip(requests, setting.sides, strict=True))
    assert parameters.stop_token_ids[0] == setting.gen_id
    assert parameters.logit_bias == {setting.collator.image_id: -100.0}


def test_an_adapter_reaches_vllm_merged(setting):
    from peft import LoraConfig, get_peft_model

    stock = {name: p.detach().clone() for name, p in setting.model.named_parameters()}
    policy = get_peft_model(setting.model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    sent = {key: value.clone() for key, value in checkpoint_weights(policy)}
    assert sent.keys() == stock.keys()
    assert (sent[name] - stock[name]).abs().max() > 1e-4
    layer = policy.get_base_model().model.language_model.layers[0].self_attn.q_proj
    torch.testing.assert_close(sent[name], stock[name] + layer.get_delta_weight("default"))
    torch.testing.assert_close(layer.base_layer.weight, stock[name])  # taken out again


def test_vllm_errors_are_named(setting):
    backend = VllmBackend(StandIn(setting), TEMPLATE, SimpleNamespace)
    film = Side(text="red", video=[picture(8, 8, 0)] * 2, id="film")
    with pytest.raises(ValueError, match="side 'film': it has a video"):
        backend.generate(setting.model, [film], setting.prompts, greedy(setting))
    backend.llm.generate = lambda requests, **k: [SimpleNamespace(outputs=[None] * 3)] * 2
    with pytest.raises(ValueError, match="vLLM gave 6 responses"):
        backend.generate(setting.model, setting.sides[:2], setting.prompts, greedy(setting))


def loops_at(tokens, limit):
    """By definition: the first length at which some period stands ``limit`` times at the end."""
    for end in range(1, len(tokens) + 1):
        for period in range(1, LoopGuard.PERIODS + 1):
            block = tokens[end - period : end]
            if end >= period * limit and tokens[end - period * limit : end] == block * limit:
                return end
    return len(tokens)


@pytest.mark.parametrize("limit", [2, 3, 5])
def test_loops_are_cut_where_they_are_complete(limit):
    draw = torch.Generator().manual_seed(limit)
    rows = torch.randint(0, 3, (40, 60), generator=draw)
    rows[0] = torch.arange(60)
    rows[1] = torch.arange(60) % 16
    rows[2] = torch.arange(60) % 17  # longer than any period looked for
    lengths = torch.randint(1, 61, (40,), generator=draw)
    lengths[:3] = 60
    tokens, cut = cut_loops(rows, lengths, limit, 99)
    expected = [loops_at(row[:n], limit) for row, n in zip(rows.tolist(), lengths.tolist(), strict=True)]
    assert cut.tolist() == expected
    assert min(expected) < 60 == expected[0] == expected[2]
    assert all((tokens[i, n:] == 99).all() for i, n in enumerate(expected))
    assert cut_loops(rows, lengths, 0, 99)[1] is lengths
    with pytest.raises(ValueError, match="repetition_limit is 1"):
        LoopGuard(2, 1, rows.device)


def test_a_looping_rollout_ends_early_and_unfinished(setting):
    free = generate_rollouts(
        setting.model, setting.prompts, gen_id=setting.gen_id, max_new_tokens=60, temperature=0.0, stop_ids=[]
    )
    expected = cut_loops(free.tokens, free.lengths, 4, 0)
    assert (expected[1] < 60).any()  # greedy decoding of a random model does loop
    guarded = generate_rollouts(
        setting.model,
        setting.prompts,
        gen_id=setting.gen_id,
        max_new_tokens=60,
        temperature=0.0,
        stop_ids=[],
        repetition_limit=4,
    )
    assert torch.equal(guarded.lengths, expected[1])
    longest = guarded.tokens.shape[1]
    assert torch.equal(guarded.tokens, expected[0][:, :longest])
    assert not guarded.finished[expected[1] < free.lengths].any()
