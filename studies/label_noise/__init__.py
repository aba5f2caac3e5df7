"""Random and noisy labels: what no other example agrees with is not to be memorised.

``networks`` needs nothing but torch; the benchmark takes its ResNet-9 from there.
"""
