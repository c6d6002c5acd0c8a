#!/usr/bin/env bash
# statsmodels 0.15.0: multipletests makes Python collect garbage, all generations, in every call with method="holm", and
# with none of the other methods tried. Five p-values then take most of a second beside 3 million lists; gc.freeze()
# before the call keeps them out of it. Seen: 730 ms, and after gc.freeze() 0.0 ms.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "statsmodels==0.15.0" 2>&1 | { grep -v WARNING || true; }
"$folder/env/bin/python" -W ignore - <<'PY'
import gc
import time
from importlib.metadata import version
from statsmodels.stats.multitest import multipletests

full = []
gc.callbacks.append(lambda phase, info: full.append(1) if phase == "stop" and info["generation"] == 2 else None)
p = [0.01, 0.02, 0.03, 0.04, 0.5]


def collections(method):
    multipletests(p, method=method)  # what a first call imports is not counted
    full.clear()
    multipletests(p, method=method)
    return len(full)


counts = {method: collections(method) for method in ("holm", "holm-sidak", "bonferroni", "sidak", "simes-hochberg", "fdr_bh")}
print("statsmodels", version("statsmodels"), "full collections in a call:", counts)
heap = [[i] for i in range(3_000_000)]


def milliseconds():
    start = time.perf_counter()
    multipletests(p, method="holm")
    return 1000 * (time.perf_counter() - start)


beside = min(milliseconds() for _ in range(3))
gc.freeze()
frozen = min(milliseconds() for _ in range(3))
print(f"holm beside 3 million lists: {beside:.1f} ms, after gc.freeze(): {frozen:.1f} ms")
assert counts["holm"] == 1, "Holm's method collects no garbage any more"
assert counts["bonferroni"] == counts["fdr_bh"] == 0
assert beside > 5 * frozen
PY
