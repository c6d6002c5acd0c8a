"""The verl engine: any `Method` as advantage estimator, policy loss and temperature rule of an unmodified verl.

Importing it registers the trainer mode, the estimator and the loss, each under the name "hapo".
"""

import sys

from ..version import require
from .config import refuse_half_set

require("verl")
refuse_half_set(sys.argv[1:])

from .estimator import estimate  # noqa: E402
from .loss import policy_loss  # noqa: E402
from .trainer import HAPOTrainerSync  # noqa: E402

__all__ = ["HAPOTrainerSync", "estimate", "policy_loss"]
