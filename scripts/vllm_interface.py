"""Whether released packages of vLLM have what `hapo.samplers.vllm` rests on, by their source: nothing is run.

    python scripts/vllm_interface.py               # every release of the table in hapo.versions, as pip finds it
    python scripts/vllm_interface.py 0.24.0        # one; its wheel is fetched without what it asks for
    python scripts/vllm_interface.py site-packages # an installed or unpacked one

Names and the order of arguments are compared, and what the wheel asks for. What happens behind the names (which
logits a processor is handed, in which order the stages stand) only a run shows: `make test-vllm`.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from hapo.versions import VLLM, VLLMRelease, minor

V1 = "vllm/v1/sample/logits_processor"
V2 = "vllm/v1/worker/gpu/sample/logits_processor"
GROUP = "vllm.logits_processors"
OURS = {"apply", "is_argmax_invariant", "update_state", "validate_params", "add_request", "__init__"}
"""What `AdaptiveTemperature` defines: another abstract method would keep it from being made."""

# File, what is looked up in it, and its names: the first arguments of a function, what a class or a module has.
BOTH = [
    (f"{V1}/__init__.py", "", "LogitsProcessor BatchUpdate MoveDirectionality"),
    (f"{V1}/interface.py", "LogitsProcessor.__init__", "self vllm_config device is_pin_memory"),
    (f"{V1}/interface.py", "LogitsProcessor.validate_params", "cls sampling_params"),
    (f"{V1}/interface.py", "LogitsProcessor.update_state", "self batch_update"),
    (f"{V1}/interface.py", "LogitsProcessor.is_argmax_invariant", "self"),
    (f"{V1}/interface.py", "LogitsProcessor.apply", "self logits"),
    (f"{V1}/interface.py", "BatchUpdate", "removed added moved"),
    (f"{V1}/interface.py", "MoveDirectionality", "UNIDIRECTIONAL SWAP"),
    ("vllm/sampling_params.py", "SamplingParams", "temperature extra_args sampling_type"),
    ("vllm/sampling_params.py", "SamplingType", "GREEDY"),
    ("vllm/utils/torch_utils.py", "async_tensor_h2d", "data device dtype"),
    ("vllm/v1/engine/input_processor.py", "InputProcessor", "vllm_config"),
    ("vllm/config/vllm.py", "VllmConfig", "model_config speculative_config use_v2_model_runner"),
    ("vllm/config/model.py", "ModelConfig", "is_diffusion logprobs_mode"),
]
SECOND = [
    (f"{V2}/__init__.py", "", "LogitsProcessor"),
    (f"{V2}/interface.py", "LogitsProcessor.__init__", "self vllm_config req_states"),
    (f"{V2}/interface.py", "LogitsProcessor.validate_params", "cls sampling_params"),
    (f"{V2}/interface.py", "LogitsProcessor.add_request", "self req_idx sampling_params"),
    (f"{V2}/interface.py", "LogitsProcessor.apply", "self logits ctx"),
    (f"{V2}/interface.py", "LogitsContext", "idx_mapping_np expanded_idx_mapping"),
    (f"{V2}/interface.py", "LogitsProcRequestState", "device"),
]


def differences(root: Path | zipfile.Path, release: VLLMRelease) -> list[str]:
    """What this package has otherwise than `hapo.samplers.vllm` and the table in `hapo.versions` say."""
    both = release.runners != "V1"
    found = [line for asked in [*BOTH, *(SECOND if both else ())] for line in missing(root, *asked)]
    for file in (f"{V1}/interface.py", f"{V2}/interface.py"):
        if (tree := parse(root, file)) is not None:
            more = abstract(look_up(tree, "LogitsProcessor")) - OURS
            found += [f"{file}: LogitsProcessor asks for {name}" for name in sorted(more)]
    if not both and (root / V2).exists():
        found.append(f"{V2}: is there, and the table says V1 only")
    for file in (f"{V1}/__init__.py", *([f"{V2}/loader.py"] if both else [])):
        if GROUP not in text(root, file):
            found.append(f"{file}: reads no entry points {GROUP}")
    # Up to 0.30 the choice of the runner looks at entry points.
    looks = f'group="{GROUP}"' in text(root, "vllm/config/vllm.py")
    if looks == both:
        found.append(f"vllm/config/vllm.py: entry points {'still' if looks else 'no longer'} decide on the runner")
    return found + pins(root, release)


def missing(root: Path | zipfile.Path, file: str, name: str, names: str) -> Iterator[str]:
    """What the file lacks of one line of the contract."""
    tree = parse(root, file)
    node = None if tree is None else look_up(tree, name)
    if node is None:
        yield f"{file}: no {name or 'such file'}"
        return
    wanted = names.split()
    if isinstance(node, ast.FunctionDef):
        arguments = [a.arg for a in [*node.args.posonlyargs, *node.args.args]]
        asked = arguments[len(wanted) : len(arguments) - len(node.args.defaults)]
        if arguments[: len(wanted)] != wanted or asked:
            yield f"{file}: {name}({', '.join(arguments)}), and not ({', '.join(wanted)})"
        return
    has = members(node)
    yield from (f"{file}: {name or 'the module'} has no {word}" for word in wanted if word not in has)


def text(root: Path | zipfile.Path, file: str) -> str:
    """Of a file; nothing where there is none."""
    path = root / file
    return path.read_text(encoding="utf-8") if path.exists() else ""


def parse(root: Path | zipfile.Path, file: str) -> ast.Module | None:
    """The file's tree; None where there is none."""
    return ast.parse(text(root, file)) if (root / file).exists() else None


def look_up(tree: ast.AST, name: str) -> ast.AST | None:
    """The class or function with this dotted name; the tree itself for no name."""
    node: ast.AST | None = tree
    for word in filter(None, name.split(".")):
        inside = [n for n in getattr(node, "body", ()) if getattr(n, "name", None) == word]
        node = inside[-1] if inside else None
    return node


def members(node: ast.AST) -> set[str]:
    """Names that a class or module defines, imports, or gives to `self`."""
    found: set[str] = set()
    for n in ast.walk(node):
        if isinstance(n, ast.FunctionDef | ast.ClassDef):
            found.add(n.name)
        elif isinstance(n, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in n.names}
        elif isinstance(n, ast.Assign | ast.AnnAssign):
            for target in n.targets if isinstance(n, ast.Assign) else [n.target]:
                of_self = isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self"
                if isinstance(target, ast.Name) or of_self:
                    found.add(target.id if isinstance(target, ast.Name) else target.attr)
    return found


def abstract(node: ast.AST | None) -> set[str]:
    """Names of a class's abstract methods."""
    return {
        n.name
        for n in getattr(node, "body", ())
        if isinstance(n, ast.FunctionDef) and any(ast.unparse(d) == "abstractmethod" for d in n.decorator_list)
    }


def pins(root: Path | zipfile.Path, release: VLLMRelease) -> list[str]:
    """Where the package asks for other releases than the table says; a CPU build names its build of torch."""
    (metadata,) = [f for f in root.iterdir() if re.match(r"vllm(_cpu)?-[\d.]+.*\.dist-info", f.name)]
    lines = (metadata / "METADATA").read_text(encoding="utf-8").splitlines()
    found = []
    for package, told in (("torch", release.torch), ("transformers", release.transformers)):
        asked = [re.match(rf"Requires-Dist: {package}([<>=!][^;]*)", line) for line in lines]
        first = next(match[1].strip().replace("+cpu", "") for match in asked if match)
        if {normal(part) for part in first.split(",")} != {normal(part) for part in told.split(",")}:
            found.append(f"asks for {package}{first}, and the table says {told}")
    return found


def normal(part: str) -> str:
    """A bound without zeros at its end: `<5.18` of `<5.18.0`."""
    return re.sub(r"(\.0)+$", "", part.strip())


def fetch(version: str, folder: Path) -> zipfile.Path:
    """The wheel of a release, as pip finds it for this machine."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*command, "--dest", str(folder), f"vllm=={version}"], check=True)
    (wheel,) = folder.glob("vllm-*.whl")
    return zipfile.Path(wheel)


def main(given: list[str]) -> int:
    """Print a line a release, and what differs; the exit code says whether anything does."""
    failed = 0
    for word in given or [f"{release.minor}.*" for release in VLLM]:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(word) if Path(word).is_dir() else fetch(word, Path(folder))
            (info,) = [f.name for f in root.iterdir() if re.match(r"vllm(_cpu)?-[\d.]+.*\.dist-info", f.name)]
            version = info.split("-")[1].removesuffix(".dist")
            release = next((r for r in VLLM if minor(r.minor) == minor(version)), None)
            found = ["not in the table of hapo.versions"] if release is None else differences(root, release)
            facts = len(BOTH) + len(SECOND) * (release is not None and release.runners != "V1")
            print(f"vLLM {version}:", f"{len(found)} differences" if found else f"as expected ({facts} places)")
            print(*(f"  {line}" for line in found), sep="\n", end="\n" if found else "")
            failed += bool(found)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
