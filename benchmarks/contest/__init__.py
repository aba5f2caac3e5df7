"""Time and memory of the AND-mask's gradient, in all ways that exist: one study.

``python -m benchmarks.contest --help``. ``models`` and ``peers`` hold networks and contestants,
``contest`` lets them run against each other; the ``bench_*.py`` use them too.
"""
