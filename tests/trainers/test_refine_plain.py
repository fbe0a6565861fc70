"""The trainer's loss against the recipe written down plainly: a forward a rollout, full logits, Python loops, fp64."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
import torch.nn.functional as F

from rime_fast.data.records import stable_hash
from rime_fast.engine.wrappers import dual_mode_of
from rime_fast.trainers.config import RefineConfig
from rime_fast.trainers.refine import RefineRLTrainer

G, CAP, PAIRS = 3, 6, 2
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


def trainer(tiny, folder, lora=False, **settings):
    args = RefineConfig(
        output_dir=str(folder),
        save_strategy="no",
        progress="none",
        per_device_train_batch_size=PAIRS,
        seed=1,
        num_generations=G,
        max_completion_length=CAP,
        **settings,
    )
    processor = tiny.processor()
    config = None
    if lora:
        from peft import LoraConfig

        config = LoraConfig(**LORA)
    run = RefineRLTrainer(
        tiny.model(processor),
        args,
        tiny.pairs(5),
        processing_class=processor,
        template=tiny.template,
        peft_config=config,
    )
    run.model.double()
    if run.reference.copy is not None:
        run.reference.copy.double()
        torch.manual_seed(5)
        with torch.no_grad():  # the policy has moved away from its reference
            for parameter in run.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.02 * torch.randn_like(parameter))
    run.make_banks(run.model)
    run.model.train()
    run.current_gradient_accumulation_steps = 1
    return run


@torch.no_grad()
def read(run, model, side, response):
    """(log-probabilities of the response's tokens, g, d, entropies) from one sequence by itself."""
    base = dual_mode_of(model)
    batch = run.collator.collate_responses([side], [response])
    hidden = base.encode_hidden(
        **{
            k: v
            for k, v in batch.items()
            if k in ("input_ids", "lengths", "position_ids", "mm_token_type_ids", "pixel_values", "image_grid_thw")
        }
    )
    n, prompt = batch["lengths"][0], batch["prompt_lengths"][0]
    logits = hidden[prompt - 1 : n - 1] @ base.lm_head.weight.T / run.args.sampling_temperature
    every = logits.log_softmax(-1)
    logp = every[range(len(response)), response]
    entropy = -(every.exp() * every).sum(-1)
    disc = int(batch["disc_index"][0])
    return logp.tolist(), F.normalize(hidden[n - 1], dim=0), F.normalize(hidden[disc], dim=0), entropy.tolist()


def plain_rewards(run, names, sides, rollouts, found):
    """[prompts][G]: recipe section 4, ours or UME-R1's."""
    args, pairs, rewards = run.args, [run.train_dataset.pairs[i] for i in range(5)], []
    for place, (name, item) in enumerate(names):
        other = "target" if name == "query" else "query"
        rewards.append([])
        for g in range(G):
            row = place * G + g
            text = run.processing_class.tokenizer.decode(rollouts[row], skip_special_tokens=False)
            form = float(run.collator.template.parse_response(text).format_ok)
            _, gen, disc, _ = found[row]
            if args.reward_mode == "ume_r1":
                others = {
                    i: [float(gen @ found[p * G + h][1]) for h in range(G)]
                    for p, (n, i) in enumerate(names)
                    if n == other
                }
                ranked = sorted((s for values in others.values() for s in values), reverse=True)
                hits = sum(s >= ranked[G - 1] for s in others[item]) / G
                rest = [s for i, values in others.items() if i != item for s in values]
                rewards[-1].append(form + hits * (statistics.fmean(others[item]) - statistics.fmean(rest)))
                continue
            anchors = [run.banks["train", other].anchors[i].double() for i in range(5)]
            own, words = anchors[item], stable_hash(getattr(pairs[item], other))
            rest = [float(gen @ a) for i, a in enumerate(anchors) if stable_hash(getattr(pairs[i], other)) != words]
            s = float(gen @ own)
            rank = 1 + sum(r > s for r in rest)
            over = max(0, len(rollouts[row]) - args.length_limit) / args.length_limit
            rewards[-1].append(
                form
                + (s - statistics.fmean(rest)) / math.log2(1 + rank)
                + s
                - float(disc @ own)
                - args.length_weight * over
            )
    return rewards


def plain_loss(run, inputs, rollouts, old=None, rewards_from=None):
    """(loss, kl, ratio, clip fraction, log-probabilities) over the batch's prompts."""
    args, index = run.args, inputs["rows"]
    names = [(name, i) for name in run.trained for i in index]
    sides = inputs["sides"]
    found = [read(run, run.model, sides[row // G], rollouts[row]) for row in range(len(rollouts))]
    rewards = plain_rewards(run, names, sides, rollouts, rewards_from or found)
    total = kl = ratios = clipped = 0.0
    tokens = sum(map(len, rollouts))
    for row, (logp, *_) in enumerate(found):
        group = rewards[row // G]
        spread = statistics.stdev(group) + 1e-4 if args.scale_rewards else 1.0
        advantage = (group[row % G] - statistics.fmean(group)) / spread
        ref = None
        if args.beta:
            with run.reference.model(run.policy) as model:
                ref = read(run, model, sides[row // G], rollouts[row])[0]
        for t, value in enumerate(logp):
            ratio = 1.0 if old is None else math.exp(value - old[row][t])
            inside = min(max(ratio, 1 - args.epsilon), 1 + args.epsilon_high)
            total -= min(ratio * advantage, inside * advantage)
            ratios, clipped = ratios + ratio, clipped + (inside * advantage < ratio * advantage)
            if ref is not None:
                k3 = math.exp(ref[t] - value) - (ref[t] - value) - 1
                total, kl = total + args.beta * k3, kl + k3
    shares = tokens if args.loss_type == "token_mean" else len(rollouts) * args.max_completion_length
    return total / shares, kl / tokens, ratios / tokens, clipped / tokens, [x[0] for x in found], found


def compare(run, loss, plain):
    metrics = run.sums.drain(torch.device("cpu"))
    assert float(loss) == pytest.approx(plain[0], rel=2e-5, abs=2e-6)
    assert metrics["ratio"] == pytest.approx(plain[2], rel=1e-5)
    assert metrics["clip_fraction"] == pytest.approx(plain[3], abs=1e-6)
    entropies = [value for *_, row in plain[5] for value in row]
    assert metrics["entropy"] == pytest.approx(statistics.fmean(entropies), rel=1e-5)
    if run.args.beta:
        assert metrics["kl"] == pytest.approx(plain[1], rel=1e-4)
        assert plain[1] > 1e-4
    else:
        assert "kl" not in metrics or metrics["kl"] == 0.0
    return metrics


@pytest.mark.parametrize(
    ("settings", "lora"),
    [
        ({}, False),
        ({"trained_sides": "query", "loss_type": "token_mean", "length_limit": 2.0}, False),
        ({"trained_sides": "target", "loss_type": "dr_grpo", "scale_rewards": False, "beta": 0.0}, False),
        ({"reward_mode": "ume_r1"}, False),
        ({"sampling_temperature": 0.7, "loss_type": "token_mean"}, True),
    ],
    ids=str,
)
def test_loss_and_metrics(tiny, tmp_path, settings, lora):
    run = trainer(tiny, tmp_path, lora, **({"beta": 0.2} | settings))
    assert run.reference.kind == ("adapter" if lora else "none" if settings.get("beta") == 0 else "copy")
    inputs = run._prepare_inputs(next(iter(run.get_train_dataloader())))
    drawn = run.generator.generate(run.policy, inputs["sides"], inputs["prompts"])
    run.generator.generate = lambda *_: drawn
    loss = run.training_step(run.model, inputs)
    compare(run, loss, plain_loss(run, inputs, drawn.rewrites))


def test_a_second_update_clips_and_keeps_the_rollouts_rewards(tiny, tmp_path):
    """Old log-probabilities are the first update's; rewards are of the g that sampled, not of the moved policy's."""
    run = trainer(tiny, tmp_path, num_iterations=2, beta=0.2)
    inputs = run._prepare_inputs(next(iter(run.get_train_dataloader())))
    drawn = run.generator.generate(run.policy, inputs["sides"], inputs["prompts"])
    run.generator.generate = lambda *_: drawn
    first = run.training_step(run.model, inputs)
    plain = plain_loss(run, inputs, drawn.rewrites)
    metrics = compare(run, first, plain)
    assert metrics["ratio"] == 1.0
    with torch.no_grad():
        for parameter in run.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.03 * torch.randn_like(parameter))
    second = run.training_step(run.model, inputs)
    again = plain_loss(run, inputs, drawn.rewrites, old=plain[4], rewards_from=plain[5])
    assert again[3] > 0.05  # clipping is active
    assert compare(run, second, again)["clip_fraction"] > 0.05
