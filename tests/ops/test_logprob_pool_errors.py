"""Bad input of the log-prob operator: every mistake is a named error, never a wrong number."""

from __future__ import annotations

import math

import pytest
import torch

from rime_fast.ops.logprob_pool import fused_linear_ce, fused_logprob_pool

T, H, V = 5, 8, 11


def _good() -> dict:
    return {"hidden": torch.randn(T, H), "lm_head": torch.randn(V, H), "targets": torch.randint(0, V, (T,))}


def _index(*values: int) -> torch.Tensor:
    return torch.tensor(values)


BAD = [
    ({"hidden": torch.randn(2, T, H)}, ValueError, r"hidden: expected shape \[T, H\], got a float32 tensor"),
    ({"hidden": torch.zeros(T, H, dtype=torch.int64)}, TypeError, "hidden: expected dtype bfloat16"),
    ({"hidden": [[1.0]]}, TypeError, "hidden: expected a tensor, got list"),
    ({"lm_head": torch.randn(V, H + 1)}, ValueError, r"lm_head: expected shape \[V, 8\]"),
    ({"lm_head": torch.randn(V, H).bfloat16()}, TypeError, r"lm_head: expected the dtype of hidden \(float32\)"),
    ({"lm_head": torch.randn(V, H, device="meta")}, ValueError, "lm_head: expected device cpu"),
    ({"lm_head": torch.randn(0, H)}, ValueError, "lm_head: expected V >= 1"),
    ({"targets": torch.zeros(T - 1, dtype=torch.long)}, ValueError, r"targets: expected shape \[5\]"),
    ({"targets": torch.zeros(T)}, TypeError, "targets: expected dtype int64, int32"),
    ({"targets": _index(0, 1, V, 2, 3)}, ValueError, r"targets: expected values in \[0, 11\).*got 11 at row 2"),
    ({"targets": _index(0, -1, 0, 2, 3)}, ValueError, "got -1 at row 1"),
    ({"bias": torch.randn(V - 1)}, ValueError, r"bias: expected shape \[11\]"),
    ({"bias": torch.zeros(V, dtype=torch.long)}, TypeError, "bias: expected dtype"),
    ({"temperature": 0.0}, ValueError, "temperature: expected a finite number above 0, got 0.0"),
    ({"temperature": math.nan}, ValueError, "temperature: expected a finite number above 0"),
    ({"temperature": torch.tensor(-1.0)}, ValueError, "temperature: expected a value above 0"),
    ({"temperature": torch.ones(1)}, ValueError, r"temperature: expected shape \[\]"),
    ({"temperature": "1"}, TypeError, "temperature: expected a number or a 0-d tensor"),
    ({"softcap": 0.0}, ValueError, "softcap: expected a finite number above 0"),
    ({"softcap": -3}, ValueError, "softcap: expected a finite number above 0"),
    ({"softcap": torch.ones(())}, TypeError, "softcap: expected a number"),
    ({"ignore_index": 1.5}, TypeError, "ignore_index: expected an int"),
    ({"entropy": 1}, TypeError, "entropy: expected a bool"),
    ({"normalize": None}, TypeError, "normalize: expected a bool"),
    ({"backend": "fast"}, ValueError, "backend is 'fast'"),
    ({"pools": [_index(1)]}, TypeError, "pools: expected a dict"),
    ({"pools": {"disc": _index(T)}}, ValueError, r"pools\['disc'\]: expected values in \[0, 5\), got 5 at position 0"),
    ({"pools": {"disc": _index(0, -1)}}, ValueError, "got -1 at position 1"),
    ({"pools": {"disc": torch.zeros(2)}}, TypeError, r"pools\['disc'\]: expected dtype int64"),
    ({"pools": {"disc": torch.zeros(2, 2, dtype=torch.long)}}, ValueError, r"pools\['disc'\]: expected shape \[N\]"),
    ({"pools": {"m": (_index(0), _index(1, 2))}}, ValueError, r"pools\['m'\] ends: expected shape \[1\]"),
    ({"pools": {"m": (_index(0), _index(T + 1))}}, ValueError, r"pools\['m'\] ends: expected values in \[1, 6\)"),
    ({"pools": {"m": (_index(2), _index(2))}}, ValueError, r"pools\['m'\]: expected starts < ends"),
    ({"pools": {"m": (_index(2),)}}, ValueError, r"pools\['m'\]: expected \(starts, ends\), got 1 entries"),
    ({"max_scored": -1}, ValueError, "max_scored: expected a number of rows, got -1"),
    ({"max_scored": 4}, ValueError, "max_scored: more than 4 rows of targets are scored"),
    ({"max_scored": 5.0}, TypeError, "max_scored: expected an int"),
    ({"vocab_group": "world"}, TypeError, "vocab_group: expected a torch.distributed ProcessGroup, got str"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD)
def test_bad_argument(change: dict, kind: type[Exception], message: str) -> None:
    for function in (fused_logprob_pool, fused_linear_ce):
        with pytest.raises(kind, match=message):
            function(**(_good() | change))


def test_bad_token_weight() -> None:
    for weight, kind, message in (
        (torch.ones(T + 1), ValueError, r"token_weight: expected shape \[5\]"),
        (torch.ones(T, dtype=torch.long), TypeError, "token_weight: expected dtype"),
        (1.0, TypeError, "token_weight: expected a tensor, got float"),
    ):
        with pytest.raises(kind, match=message):
            fused_linear_ce(**_good(), token_weight=weight)


def test_other_ignore_index_and_int32() -> None:
    good = _good()
    good["targets"][2] = 0
    plain = fused_logprob_pool(**good)
    other = fused_logprob_pool(**(good | {"targets": good["targets"].int()}), ignore_index=0)
    keep = good["targets"] != 0
    assert torch.equal(plain.logp[keep], other.logp[keep])
    assert not other.logp[~keep].any()
    assert (~keep).any()
