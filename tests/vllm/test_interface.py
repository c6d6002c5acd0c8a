"""The installed vLLM has what the script looks for in the releases that are not run here."""

import runpy
from pathlib import Path

import vllm

from hapo.versions import VLLM, minor

ROOT = Path(__file__).parents[2]


def test_the_installed_release_is_as_the_table_says():
    (release,) = [release for release in VLLM if minor(release.minor) == minor(vllm.__version__)]
    assert release.tested != "read"
    differences = runpy.run_path(str(ROOT / "scripts/vllm_interface.py"))["differences"]
    assert differences(Path(vllm.__file__).parents[1], release) == []
