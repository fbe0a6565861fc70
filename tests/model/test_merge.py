"""``rime-fast merge``: means of every parameter, and refusals that name what differs."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from rime_fast import RimeEmbedder, cli
from rime_fast.model.tiny import tiny_model, tiny_processor, tiny_tokenizer
from rime_fast.model.tokens import add_embedding_tokens


def save(folder, seed: int, words: str = "red blue", hidden: int = 32, dtype: torch.dtype = torch.float32) -> str:
    torch.manual_seed(seed)
    processor = tiny_processor(tiny_tokenizer([words]))
    model = tiny_model("qwen2_vl", tokenizer=processor.tokenizer, hidden=hidden, layers=1)
    add_embedding_tokens(model, processor.tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.to(dtype).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def test_the_mean_of_two(tmp_path, capsys):
    a, b = save(tmp_path / "a", 0), save(tmp_path / "b", 1)
    assert cli.main(["merge", f"{a}:3", f"{b}:1", "--output_dir", str(tmp_path / "ab")]) == 0
    assert f"0.750 {a}" in capsys.readouterr().out
    one, two, both = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b", "ab"))
    assert one.keys() == both.keys()
    for name, value in both.items():
        torch.testing.assert_close(value, 0.75 * one[name] + 0.25 * two[name])
    assert RimeEmbedder.from_pretrained(tmp_path / "ab").encode("red").shape == (1, 32)
    assert "merged" in (tmp_path / "ab" / "README.md").read_text()


def test_a_merged_narrow_model_is_rounded_once(tmp_path):
    a, b = (save(tmp_path / name, seed, dtype=torch.bfloat16) for seed, name in enumerate("ab"))
    assert cli.main(["merge", a, b, "--output_dir", str(tmp_path / "ab")]) == 0
    one, two, both = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b", "ab"))
    for name, value in both.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, ((one[name].double() + two[name].double()) / 2).to(torch.bfloat16))


def test_what_cannot_be_merged_is_named(tmp_path, capsys):
    a, wide = save(tmp_path / "a", 0), save(tmp_path / "wide", 1, hidden=48)
    other = save(tmp_path / "other", 1, words="green tall")

    def fails(words: list[str], code: int, message: str) -> None:
        assert cli.main(["merge", *words]) == code
        assert message in capsys.readouterr().err

    out = ["--output_dir", str(tmp_path / "out")]
    fails([f"{a}:0.5", f"{wide}:0.5", *out], 1, "expected equal models")
    fails([a, other, *out], 1, "has other tokens than")
    fails([a, *out], 1, "expected at least two to merge")
    fails([a, f"{wide}:x", *out], 2, "has weight 'x'; expected NAME:WEIGHT")
    fails([a, f"{wide}:0", *out], 2, "expected NAME:WEIGHT")
    fails([a, wide, "--output_dir", a], 1, "one of the models")
    fails([a, str(tmp_path / "none"), *out], 2, "no such directory")
    assert not (tmp_path / "out").exists()
