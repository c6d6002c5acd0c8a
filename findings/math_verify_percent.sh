#!/usr/bin/env bash
# math-verify 0.9.0 judges "50%" by the ANTLR release that happens to be installed: for the gold answer 0.5 it is right
# with 4.13.2, and wrong with 4.9.3, which hydra and omegaconf ask for. math-verify allows both, so that two environments
# with the same math-verify score one answer differently. Seen: True and False, as below.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for antlr in 4.13.2 4.9.3; do
    python3 -m venv "$folder/$antlr"
    "$folder/$antlr/bin/pip" install --quiet "math-verify==0.9.0" "latex2sympy2_extended==1.11.0" "sympy==1.14.0" \
        "antlr4-python3-runtime==$antlr" 2>&1 | { grep -v WARNING || true; }
    "$folder/$antlr/bin/python" - <<'PY' | tee -a "$folder/seen"
from importlib.metadata import version
from math_verify import parse, verify
right = verify(parse("0.5"), parse(r"\boxed{50\%}"))
print(f"math-verify {version('math-verify')}, antlr {version('antlr4-python3-runtime')}: 50% for gold 0.5: {right}")
PY
done
grep -q "antlr 4.13.2: 50% for gold 0.5: True" "$folder/seen"
grep -q "antlr 4.9.3: 50% for gold 0.5: False" "$folder/seen"
