"""A node by its published figures, and the assumptions that turn counts into seconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """Published peak figures of one GPU and its node; nothing here was measured.

    flops: dense bf16 FLOP/s. hbm, nvlink, nic: bytes/s of one GPU; the last two in one direction.
    """

    name: str
    flops: float
    hbm: float
    memory: float
    nvlink: float
    nic: float
    gpus_per_node: int
    source: str


# Data sheets: 989 TFLOP/s bf16 dense, 3.35 TB/s HBM3, 80 GB, NVLink 900 GB/s both directions together; DGX H100:
# 8 x 400 Gb/s InfiniBand a node for 8 GPUs.
H100 = Hardware(
    name="H100 SXM",
    flops=989e12,
    hbm=3.35e12,
    memory=80e9,
    nvlink=450e9,
    nic=50e9,
    gpus_per_node=8,
    source="NVIDIA H100 and DGX H100 data sheets",
)


@dataclass(frozen=True)
class Assumptions:
    """Fractions of the published peaks that are assumed to be reached, and latencies. None was measured here.

    matmul, attention: of ``flops``. hbm: of the memory bandwidth. network: of NVLink and InfiniBand.
    overlap: share of the communication that can hide behind computation and does.
    collective_s, hop_s: seconds every collective costs, and every node-to-node step of its ring.
    decode_kernels, launch_s: kernels a layer of a decode step launches one after the other without CUDA graphs, and the
        host's seconds for each.
    """

    matmul: float = 0.6
    attention: float = 0.4
    hbm: float = 0.8
    network: float = 0.75
    overlap: float = 1.0
    collective_s: float = 20e-6
    hop_s: float = 3e-6
    decode_kernels: int = 20
    launch_s: float = 4e-6

    def __post_init__(self) -> None:
        for name in ("matmul", "attention", "hbm", "network"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise ValueError(f"{name} is {value}; expected a fraction of the peak, 0 < {name} <= 1")
        if not 0 <= self.overlap <= 1:
            raise ValueError(f"overlap is {self.overlap}; expected 0 <= overlap <= 1")
