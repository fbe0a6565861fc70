"""A written model of a training step on 8 to 512 GPUs: FLOP, bytes, network bytes, seconds and memory per part.

    shapes.py    a model's sizes and parameter counts, from a transformers config
    work.py      FLOP of each part
    network.py   bytes that leave a rank, and the seconds they take over NVLink and InfiniBand
    memory.py    bytes a rank holds
    joint.py     the joint-training step          refine.py    the Refine-RL step
    hardware.py  a GPU node by its published figures, and what is ASSUMED to be achieved of them
    report.py    ``python -m benchmarks.scale``: tables, JSON, curves

What it counts is checked against counted FLOP, counted network bytes and measured memory (tests/bench). Seconds are
NOT measurements: they are counts divided by assumed rates, to see which part grows into the largest one and when.
"""
