#!/usr/bin/env bash
# With pytest 9.2.0, `--dist loadgroup` of pytest-xdist 3.8.0 no longer keeps the tests of a group on one worker, and says
# nothing: xdist writes the group into `_nodeid` of an item, and pytest 9.2 makes the node id from elsewhere. A fixture
# of session scope that a group shares is then made once on each worker. With pytest 9.1.1 the group stays together.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/test_group.py" <<'PY'
import pytest


@pytest.mark.xdist_group("one")
@pytest.mark.parametrize("i", range(8))
def test_it(i): ...
PY
workers() {  # of pytest $1: how many of the two ran tests of the group
    python3 -m venv "$folder/$1"
    "$folder/$1/bin/pip" install --quiet "pytest==$1" "pytest-xdist==3.8.0" 2>&1 | { grep -v WARNING || true; } >&2
    (cd "$folder" && "$folder/$1/bin/python" -m pytest -n 2 --dist loadgroup -v -p no:cacheprovider test_group.py) |
        grep PASSED | grep -o 'gw[01]' | sort -u | wc -l
}
before=$(workers 9.1.1) after=$(workers 9.2.0)
echo "pytest-xdist 3.8.0: workers that ran the group, pytest 9.1.1: $before, pytest 9.2.0: $after"
[ "$before" -eq 1 ] && [ "$after" -eq 2 ]
