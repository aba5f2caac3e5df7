"""One page of all that studies left in a folder.

``python -m studies report`` reads summaries and records and writes one HTML file, which holds
its figures and needs no other file, and no network.
"""

from .cli import main

__all__ = ["main"]
