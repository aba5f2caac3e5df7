"""The paper's experiments, as small programs: ``python -m studies --help`` lists them.

They need more packages than the library: ``pip install --no-build-isolation '.[studies]'``.
"""
