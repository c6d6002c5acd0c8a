"""Does a run of the demo keep its promise? Exit code 0 if held-out sampled accuracy rose by 20 points.

python scripts/check_demo.py RUN
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

PROMISE = 0.20
LONGEST = 4 * 60.0
"""Seconds that training may take on two cores."""


def main() -> int:
    """Print the figures and compare them with the promise."""
    run = Path(sys.argv[1])
    measured = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    before, after = (next(m for m in order if m["how"] == "sampled") for order in (measured, measured[::-1]))
    seconds = json.loads((run / "finished.json").read_text())["seconds"]
    rise = after["mean"] - before["mean"]
    print(
        f"demo: {before['mean']:.1%} -> {after['mean']:.1%} sampled on {after['problems']} held-out problems "
        f"({100 * rise:+.1f} points, after [{after['low']:.1%}, {after['high']:.1%}]), trained for {seconds:.0f} s"
    )
    kept = rise >= PROMISE and after["problems"] >= 500 and seconds <= LONGEST
    if not kept:
        print(f"the promise is +{PROMISE:.0%} on >= 500 problems in <= {LONGEST:.0f} s", file=sys.stderr)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
