"""verl on CPUs: a platform, and a rollout with transformers, for smoke runs and tests. No part of a real run.

`VERL_USE_EXTERNAL_MODULES=hapo.verl_cpu`, `trainer.device=cpu`, and
`actor_rollout_ref.rollout.name=transformers`; `recipes/verl/smoke_cpu.sh` has the rest.
"""

import os

# Read by verl when it first asks for its platform, and when it chooses an engine: those of FSDP say "cuda" and run
# on CPUs as well.
os.environ.setdefault("VERL_PLATFORM", "cpu")
os.environ.setdefault("VERL_ENGINE_DEVICE", "cuda")
