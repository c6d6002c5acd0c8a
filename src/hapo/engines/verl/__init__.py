"""The verl engine: any `Method` as advantage estimator, policy loss and temperature rule of an unmodified verl.

Importing it registers the trainer mode, the estimator and the loss, each under the name "hapo", and the reward
manager "hapo_tokens". Without TransferQueue there is no trainer mode to register: `hapo.verl_main` needs none.
"""

import sys
from importlib.util import find_spec

from ..version import require
from .config import program_of, refuse_half_set

require("verl")
refuse_half_set(sys.argv[1:], program_of(sys.orig_argv))

from .estimator import estimate  # noqa: E402
from .loss import policy_loss  # noqa: E402
from .ray_trainer import HAPORayTrainer  # noqa: E402
from .rewards import TokenRewardManager  # noqa: E402

if find_spec("transfer_queue") is not None:
    from .trainer import HAPOTrainerSync  # noqa: F401

__all__ = ["HAPORayTrainer", "TokenRewardManager", "estimate", "policy_loss"]
