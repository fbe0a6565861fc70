"""The benchmark suite of a source checkout; what a row means: docs/benchmarks.md.

    bench_*.py   the cases: shapes, bounds of our errors                 run_gpu.py   ``make gpu``
    lib/         step benchmarks, third-party peers, growth, plots, comparison of two result files
    scale/       a written model of a step on 8 to 512 GPUs              results/     committed rows, a folder a device
    compare.py, plot.py   ``python -m benchmarks.compare`` and ``python -m benchmarks.plot``

The three operators are measured by rime_fast/bench, which is also the tool behind ``rime-fast bench``.
"""
