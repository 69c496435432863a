"""Side-by-side measurements. Each script prints what it measured, against what, and the ratio.

Run them from the root of the repository: ``python -m benchmarks.speed``.
"""
