#!/usr/bin/env bash
# ruff's rule UP037 takes the quotes off a jaxtyping shape that reads as a name and a comment: "B #T" (T may be 1)
# becomes B, a name that nobody defined, and a comment. With `from __future__ import annotations` nothing complains,
# jaxtyping checks nothing there any more, and "B T", which is no expression, is left alone. The fix is called safe.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "ruff==0.17.6" 2>&1 | { grep -v WARNING || true; }
cat > "$folder/shapes.py" <<'PY'
from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def masked(x: Float[Tensor, "B #T"], mask: Float[Tensor, "B T"]) -> None: ...
PY
"$folder/env/bin/ruff" --version
"$folder/env/bin/ruff" check --quiet --isolated --select UP037 --fix "$folder/shapes.py" || true
cat "$folder/shapes.py"
if grep -q '"B #T"' "$folder/shapes.py"; then echo "the shape keeps its quotes now" >&2; exit 1; fi
grep -q 'B #T' "$folder/shapes.py" && grep -q '"B T"' "$folder/shapes.py"
