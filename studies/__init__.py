"""The paper's experiments, as small programs: ``python -m studies --help`` lists them.

They need numpy, matplotlib and tqdm (``pip install -e '.[studies]'``) beside the library.
"""
