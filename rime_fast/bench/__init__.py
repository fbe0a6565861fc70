"""Benchmarks of the operators beside their peers and their floors; what a row means: docs/benchmarks.md.

``logprob``, ``contrastive`` and ``reward`` have the same parts: ``Shape`` (its fields are the options of
``rime-fast bench logprob`` and so on), ``SHAPES`` (tiny, cpu, cuda), one small function a peer, ``floor`` and
``measure(shape, device, dtype, results, rounds)``. The pytest cases in benchmarks/ are thin layers over them.
"""
