#!/usr/bin/env bash
# Tests and benchmarks that need a CUDA device; results and a log into the folder $1. Needs torch, triton and TRL.
set -uo pipefail
out=$1
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TRL_EXPERIMENTAL_SILENCE=1 HF_HUB_OFFLINE=1
python=${PYTHON:-python3}
"$python" -m pytest tests/gpu -q 2>&1 | tail -40
"$python" -m bench.kernels --output "$out/kernels.json"
# torch, and the kernels, which are opt-in.
HAPO_TRITON=0 "$python" -m bench.scoring --device cuda --output "$out/scoring_cuda_torch.json" 2>&1 | grep -v '^turn'
HAPO_TRITON=1 "$python" -m bench.scoring --device cuda --output "$out/scoring_cuda_triton.json" 2>&1 | grep -v '^turn'
"$python" -m bench.tensor_part --device cuda --work "read the inputs once" hapo dapo "plain torch" --output "$out/tensor_part_cuda.json" 2>&1 | grep -v '^turn'
