"""Time and memory of the AND-mask's gradient, in all ways that exist: ``... benchmark --help``.

``models`` and ``peers`` hold networks and contestants, ``measuring`` and ``memory`` take their time
and memory, ``contest`` lets them run against each other. Those need nothing but torch, and the
scripts in ``benchmarks/`` use them too.
"""
