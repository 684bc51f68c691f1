"""Studies of the papers' claims at small scale. Each module is one experiment; `make experiments` runs them all.

`python -m train.experiments.NAME` writes `benchmarks/results/NAME.{json,md,png}`. Parts that the JSON holds already,
with the same settings, are not run again (`--fresh` runs them).
"""
