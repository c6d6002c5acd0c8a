"""TRL's asynchronous trainer with the stages of a `Method`.

Apart from the rest of the engine, since importing it takes TRL's experimental code, and vLLM where that is
installed.
"""

import warnings

with warnings.catch_warnings():
    # TRL warns that its code may move; the engine accepts the release that it was tested with, and no other.
    warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")
    from .config import AsyncHAPOConfig
    from .trainer import AsyncHAPOTrainer
    from .weights import DiskWeightTransfer
    from .worker import WholeGroupSample

__all__ = ["AsyncHAPOConfig", "AsyncHAPOTrainer", "DiskWeightTransfer", "WholeGroupSample"]
