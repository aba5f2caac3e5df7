"""The game: an expert by search, its states, and a server that plays. A program of its own.

``procgen2`` pins numpy < 2, so this package runs in an environment of its own, and imports neither
torch nor anything above it::

    export PYTHONPATH=studies/coinrun
    python -m game collect --train 0 64 400 700 ... --output data.npz
    python -m game play 0 1 2

**Levels** are those of the mode ``hard``, the game's own default: each has a background, walls and
a figure of its own. In ``easy`` all levels look alike, and there is nothing to learn wrongly. The
player's velocity is painted into a corner, so that a frame says all that an expert needs.

**Actions.** Of the game's 15 actions six do nothing here and three press down, which only drops
through crates. The other six are what the expert and all policies choose from, every four frames.

**The expert** sees the whole level by search. From the start, or any state found so far, it tries
all six actions for four frames, saves where each led (``get_state``), and goes on from the most
promising one (``set_state``): the one with the least delay, frames so far less the distance run at
full speed. States that nearly agree in position and speed count as one. Once the coin is found the
search goes on for a while, so that what remains is a graph of states around the fast ways to the
coin, with the frames V(s) that each still needs. Its policy is

    log π*(a | s) = -(frames to the coin that begin with a) / temperature + constant,

zero where an action dies or is not known to lead to the coin. Actions that are equally fast are
equally likely, so that the target says what matters in a state and what does not.
"""
