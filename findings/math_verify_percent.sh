#!/usr/bin/env bash
# math-verify 0.9.0 judges "50%" by the ANTLR release that happens to be installed: with 4.13.2 it equals 0.5, with
# 4.9.3 (which hydra and omegaconf ask for) it does not, and "50 %" as a gold answer is no expression at all.
# math-verify allows both releases, so two environments with the same math-verify score one answer differently.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for antlr in 4.13.2 4.9.3; do
    python3 -m venv "$folder/$antlr"
    "$folder/$antlr/bin/pip" install --quiet "math-verify==0.9.0" "latex2sympy2_extended==1.11.0" "sympy==1.14.0" \
        "antlr4-python3-runtime==$antlr" 2>&1 | { grep -v WARNING || true; }
    "$folder/$antlr/bin/python" - <<'PY'
from importlib.metadata import version
from math_verify import parse, verify
gold, answer = parse("0.5"), parse(r"\boxed{50\%}")
print(f"math-verify {version('math-verify')}, antlr {version('antlr4-python3-runtime')}:",
      f"answer 50% for gold 0.5: {verify(gold, answer)}; gold '50%' parses to {parse('50%')}")
PY
done | tee "$folder/seen"
