"""Whether a model will run on this machine, said before anything is loaded: one check a line, with what fixes it.

The checks of MindIE's are in `mindie.doctor`, which puts all of them in order.
"""
