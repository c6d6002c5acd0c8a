#!/usr/bin/env bash
# reasoning-gym 0.1.25: the score of spell_backward can exceed 1, by float rounding: the right word followed by other
# text earns 1.0000000000000002 for words of 9 letters, so that "score >= 1" takes it for right. Seen: {9: 1.0000000000000002}.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "reasoning-gym==0.1.25" 2>&1 | { grep -v WARNING || true; }
"$folder/env/bin/python" -W ignore - <<'PY'
from importlib.metadata import version
import reasoning_gym
data = reasoning_gym.create_dataset("spell_backward", size=400, seed=1)
found = {}
for entry in data:
    found.setdefault(len(entry["answer"]), data.score_answer(entry["answer"] + " or so", entry))
above = {n: score for n, score in sorted(found.items()) if score > 1}
print("reasoning-gym", version("reasoning-gym"), "scores above 1 by length of the word:", above)
assert above, "the score is never above 1 any more"
PY
