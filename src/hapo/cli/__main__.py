"""`python -m hapo.cli`, for launchers: `torchrun --nproc_per_node 2 -m hapo.cli train ...`."""

import sys

from . import main

sys.exit(main())
