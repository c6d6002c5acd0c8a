"""Optimistic optimisers for games and saddle points: one gradient per step, taken at a point that looks ahead.

Liu et al., "Towards Better Understanding of Adaptive Gradient Algorithms in Generative Adversarial Nets", arXiv
1912.11940 (2020).
"""

from .oadagrad import OptimisticAdagrad
from .optimistic import Optimistic
from .osg import OptimisticSGD

__all__ = ["Optimistic", "OptimisticAdagrad", "OptimisticSGD"]
