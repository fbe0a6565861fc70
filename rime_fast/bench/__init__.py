"""Benchmarks of the three operators, behind ``rime-fast bench OPERATOR``; what a row means: docs/benchmarks.md.

``logprob``, ``contrastive`` and ``reward`` have the same parts: ``Shape`` (its fields are the command's options), one
small function a form that torch itself has, ``floor`` and ``measure(shape, device, dtype, results, rounds)``, the first
two with ``peers=`` besides. The suite of a source checkout (benchmarks/) adds third-party peers, tables of shapes,
whole steps, plots and the comparison of two runs.
"""
