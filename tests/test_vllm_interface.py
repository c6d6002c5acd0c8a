"""scripts/vllm_interface.py: a vLLM that moved is told from one that did not, by its source."""

import runpy
from dataclasses import replace
from pathlib import Path

import pytest

from hapo.versions import VLLM

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "scripts/vllm_interface.py"))
V1, V2 = SCRIPT["V1"], SCRIPT["V2"]

# Both interfaces, with nothing in them but what is looked for.
FILES = {
    f"{V1}/__init__.py": """
from .interface import BatchUpdate, LogitsProcessor, MoveDirectionality
LOGITSPROCS_GROUP = "vllm.logits_processors"
""",
    f"{V1}/interface.py": """
class MoveDirectionality:
    UNIDIRECTIONAL = 1
    SWAP = 2
class BatchUpdate:
    removed: list
    added: list
    moved: list
class LogitsProcessor:
    @classmethod
    def validate_params(cls, sampling_params): ...
    @abstractmethod
    def __init__(self, vllm_config, device, is_pin_memory): ...
    @abstractmethod
    def apply(self, logits): ...
    @abstractmethod
    def is_argmax_invariant(self): ...
    @abstractmethod
    def update_state(self, batch_update): ...
""",
    f"{V2}/__init__.py": "from .interface import LogitsProcessor",
    f"{V2}/loader.py": 'GROUP = "vllm.logits_processors"',
    f"{V2}/interface.py": """
class LogitsProcRequestState:
    device: int
class LogitsContext:
    idx_mapping_np: int
    expanded_idx_mapping: int
class LogitsProcessor:
    def __init__(self, vllm_config, req_states): ...
    @classmethod
    def validate_params(cls, sampling_params): ...
    def add_request(self, req_idx, sampling_params): ...
    @abstractmethod
    def apply(self, logits, ctx): ...
""",
    "vllm/sampling_params.py": """
class SamplingType:
    GREEDY = 0
class SamplingParams:
    temperature: float
    extra_args: dict
    def sampling_type(self): ...
""",
    "vllm/utils/torch_utils.py": "def async_tensor_h2d(data, device=None, dtype=None, out=None): ...",
    "vllm/v1/engine/input_processor.py": """
class InputProcessor:
    def __init__(self, vllm_config):
        self.vllm_config = vllm_config
""",
    "vllm/config/vllm.py": """
class VllmConfig:
    model_config: int
    speculative_config: int
    def use_v2_model_runner(self): ...
""",
    "vllm/config/model.py": """
class ModelConfig:
    logprobs_mode: str
    def is_diffusion(self): ...
""",
    "vllm-0.32.0.dist-info/METADATA": "Requires-Dist: torch==2.13.0\nRequires-Dist: transformers<5.20.0,>=5.16.1\n",
}
BOTH = next(release for release in VLLM if release.minor == "0.32")


def differences(root, files=FILES, release=BOTH):
    for name, source in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(source)
    return SCRIPT["differences"](root, release)


def test_what_is_looked_for_is_found(tmp_path):
    assert differences(tmp_path) == []


def test_a_release_with_runner_v1_only(tmp_path):
    """It has no second interface, and looks at entry points when it chooses the runner."""
    choice = 'entry_points(group="vllm.logits_processors")'
    first = {name: source for name, source in FILES.items() if V2 not in name}
    older = replace(BOTH, runners="V1")
    (line,) = differences(tmp_path / "choice", first, older)
    assert "entry points no longer decide" in line
    assert (
        differences(tmp_path, first | {"vllm/config/vllm.py": FILES["vllm/config/vllm.py"] + choice}, older) == []
    )
    found = differences(tmp_path, FILES, older)  # on top of what lies there
    assert any("the table says V1 only" in line for line in found)


@pytest.mark.parametrize(
    ("file", "old", "new", "told"),
    [
        (
            f"{V1}/interface.py",
            "device, is_pin",
            "states, is_pin",
            "__init__(self, vllm_config, states, is_pin_memory)",
        ),
        (
            f"{V1}/interface.py",
            "apply(self, logits)",
            "apply(self, logits, step)",
            "apply(self, logits, step), and not",
        ),
        (f"{V1}/interface.py", "    moved: list\n", "", "BatchUpdate has no moved"),
        (f"{V1}/interface.py", "class BatchUpdate", "class Update", "no BatchUpdate"),
        (f"{V1}/__init__.py", "vllm.logits", "vllm.more", "reads no entry points"),
        (f"{V2}/interface.py", "    idx_mapping_np: int\n", "", "LogitsContext has no idx_mapping_np"),
        (
            f"{V2}/interface.py",
            "def add_request",
            "@abstractmethod\n    def reset(self): ...\n    def add_request",
            "asks for reset",
        ),
        ("vllm/config/vllm.py", "    speculative_config: int\n", "", "VllmConfig has no speculative_config"),
        (
            "vllm/v1/engine/input_processor.py",
            "self.vllm_config",
            "self.config",
            "InputProcessor has no vllm_config",
        ),
        ("vllm-0.32.0.dist-info/METADATA", "5.20.0", "5.21.0", "transformers<5.21.0,>=5.16.1, and the table says"),
    ],
)
def test_what_moved_is_told(tmp_path, file, old, new, told):
    assert old in FILES[file]
    found = differences(tmp_path, FILES | {file: FILES[file].replace(old, new, 1)})
    assert any(told in line for line in found), found


def test_a_missing_file_is_told(tmp_path):
    files = {name: source for name, source in FILES.items() if name != "vllm/utils/torch_utils.py"}
    assert differences(tmp_path, files) == ["vllm/utils/torch_utils.py: no async_tensor_h2d"]
