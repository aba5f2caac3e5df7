"""Behavioural cloning on CoinRun levels: a study of the temporal AND-mask."""

from .study import CoinRun

main = CoinRun().main
