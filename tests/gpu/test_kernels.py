"""Gates on the machine code of Triton's kernels as they are called for an H100, and the committed table of all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.gpu import kernels
from tests.gpu.kernels import Kernel, occupancy
from tests.ops.test_cuda_build import NVCC, loops, machine_code, product_loops

# Tiles that tensor cores fill; what a stage of their pipeline holds, from the tiles (triton_tiles.py, triton.py).
STAGE = {"forward_kernel": (3, 48 << 10), "dhidden_kernel": (4, 32 << 10), "statistics_kernel": (3, 24 << 10),
         "gradient_kernel": (3, 24 << 10), "dlogits_kernel": (4, 24 << 10), "dhead_kernel": (3, 48 << 10)}  # fmt: skip


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    return kernels.triton_kernels(tmp_path_factory.mktemp("code"))


def code_of(kernel: Kernel) -> list[tuple[str, str]]:
    found = machine_code(kernel.code)
    assert len(found) == 1, found.keys()
    return next(iter(found.values()))


@pytest.mark.slow
def test_what_the_loops_hold(compiled: list[Kernel]) -> None:
    """No local memory in a loop with products, nor stores to global memory in one that merges."""
    seen = set()
    for kernel in compiled:
        for loop in product_loops(code_of(kernel)):
            assert not [name for name in loop if name.startswith(("LDL", "STL"))], kernel
        for loop in loops(code_of(kernel)):
            if any(name.startswith("HGMMA") for name in loop) and not any("STG" in name for name in loop):
                seen.add(kernel.name)
                assert not [name for name in loop if name.startswith(("LDL", "STL"))], kernel
            if kernel.name == "merge_kernel":
                assert not [name for name in loop if name.startswith("STG")], kernel
    assert seen >= {"forward_kernel", "dlogits_kernel", "dhead_kernel", "dhidden_kernel", "gradient_kernel"}, seen


@pytest.mark.slow
def test_pipelines_have_their_stages(compiled: list[Kernel]) -> None:
    """Buffers in shared memory are as many as stages."""
    found = [kernel for kernel in compiled if kernel.operator in ("head", "contrast") and kernel.name in STAGE]
    assert {kernel.name for kernel in found} == set(STAGE)
    for kernel in found:
        stages, size = STAGE[kernel.name]
        assert kernel.shared >= stages * size, kernel
    wide = max(kernel.shared for kernel in found if kernel.name == "gradient_kernel")  # a margin takes the smaller tile
    assert wide >= 3 * (32 << 10)


@pytest.mark.slow
def test_rows_are_stored_wide(compiled: list[Kernel]) -> None:
    """No store of 2 bytes in the kernels that write rows of 16-bit logits or hidden states."""
    found = [kernel for kernel in compiled if kernel.name in ("row_gradient_kernel", "add_norm_kernel", "gated_kernel")]
    assert found
    for kernel in found:
        narrow = [name for name, _ in code_of(kernel) if re.match(r"STG\S*\.[US](8|16)\b", name)]
        assert not narrow, kernel


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="nvcc not found")
def test_the_table_is_the_kernels(tmp_path: Path) -> None:
    committed = kernels.PAGE.read_text(encoding="utf-8")
    if kernels.made_with() not in committed:
        pytest.skip(f"docs/kernels.md was made by other compilers than {kernels.made_with()}")
    assert kernels.page(tmp_path) == committed, "run python -m tests.gpu.kernels --write"


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "blocks"),
    [(256, 255, 0, 1), (256, 128, 0, 2), (256, 32, 0, 8), (128, 32, 100 << 10, 2), (32, 16, 0, 32), (512, 33, 0, 3)],
)
def test_occupancy(threads: int, registers: int, shared: int, blocks: int) -> None:
    """By hand: registers, shared memory, warps or blocks give out."""
    assert occupancy(threads, registers, shared) == (blocks, blocks * threads // 32)


def test_every_kernel_has_a_line() -> None:
    """The committed table names every kernel of the package, so that a new one is not forgotten."""
    text = kernels.PAGE.read_text(encoding="utf-8")
    package = kernels.ROOT / "rime_fast"
    names = [
        name
        for path in package.rglob("triton*.py")
        for name in re.findall(r"@triton\.jit\S*\ndef (\w+_kernel)\(", path.read_text())
    ]
    assert len(names) >= 15
    for name in names:
        assert f"`{name}`" in text, name
