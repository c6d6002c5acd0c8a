"""What every run of a comparison imports: loaded once, by the process that the runs are forked from.

Nothing that this module leaves is looked at by the garbage collection of a run, which would copy its memory.
"""

import gc

import scipy.stats  # noqa: F401  imported late elsewhere, so that a command starts without it

from . import one_run  # noqa: F401

gc.collect()
gc.freeze()
