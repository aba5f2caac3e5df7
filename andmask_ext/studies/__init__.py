"""The paper's experiments, as small programs: ``python -m andmask_ext --help`` lists them.

They need numpy, matplotlib and tqdm (``pip install andmask_ext[studies]``), which the rest of the
package does without.
"""
