"""Nothing that a user has is deleted or written over unasked: every command, by the paths that it takes."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import hapo
from hapo.assets import tiny_model_path
from hapo.cli import compare, evaluate, main
from hapo.cli.arms import PLAN
from hapo.engines.records import WRITTEN, write_whole
from hapo.insight import report
from tests.cli.small import flags
from tests.insight.conftest import make_run


def hashes(folder: Path) -> dict[str, str]:
    """Every file below a folder, with its hash and its time; not what Python caches of modules."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.suffix not in (".lock", ".pyc")]
    return {
        str(file.relative_to(folder)): f"{hashlib.sha256(file.read_bytes()).hexdigest()} {file.stat().st_mtime_ns}"
        for file in files
    }


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working directory with a space in its name, and in it what a user may have."""
    folder = tmp_path / "a b"
    (folder / "model").mkdir(parents=True)
    monkeypatch.chdir(folder)
    for name in (
        "figures.json",
        "figures.parquet",
        "beside.parquet",
        "rule.json",
        "page.html",
        "model/config.json",
        "README.md",
    ):
        Path(name).write_text(f"mine: {name}")
    problem = json.dumps({"question": "1+2=", "answer": "3"})
    Path("problems.json").write_text(f"[{problem}]")
    Path("problems.jsonl").write_text(problem + "\n")
    Path("prompts.txt").write_text("1+2=\n")
    Path("recipe.yaml").write_text("model_name_or_path: tiny\n")
    make_run(Path("run"), "dapo", steps=2, tokens=False)
    make_run(Path("other run"), "dapo", steps=2, tokens=False, seed=1)
    return folder


@pytest.fixture
def quick(monkeypatch) -> None:
    """Pages without figures, and an evaluation without a model."""
    monkeypatch.setattr(report, "render", lambda template, **context: f"<html>{context['title']}</html>")
    for name in ("curves", "others", "token_figures"):
        monkeypatch.setattr(report, name, lambda runs: [])
    found = {"accuracy": 1.0}, [{"answer": "3"}]
    monkeypatch.setattr(evaluate, "_measure_task", lambda *args: found)
    monkeypatch.setattr(evaluate, "_measure_benchmarks", lambda *args: found)


EVAL = ["eval", "--samples", "1", "--output"]
CALIBRATE = ["calibrate", "--rule", "edt", "--output"]
REFUSED = {
    "eval: output is there": [*EVAL, "figures.json"],
    "eval: answers beside it are there": [*EVAL, "beside.json"],
    "eval: output is a set": [*EVAL, "problems.json", "--benchmarks", "problems.json", "--replace"],
    "eval: output is the data": [*EVAL, "problems.json", "--dataset", "../a b/problems.json", "--replace"],
    "eval: output is the data held out": [*EVAL, "problems.json", "--eval_file", "problems.json", "--replace"],
    "eval: output is of the model": [*EVAL, "model/config.json", "--model", "model", "--replace"],
    "eval: no such folder": [*EVAL, "absent/figures.json"],
    "eval: another kind of file": [*EVAL, "recipe.yaml", "--config", "recipe.yaml", "--replace"],
    "calibrate: output is there": [*CALIBRATE, "rule.json"],
    "calibrate: output is the prompts": [*CALIBRATE, "prompts.txt", "--prompts", "prompts.txt", "--replace"],
    "calibrate: output is of the model": [*CALIBRATE, "model/config.json", "--model", "model", "--replace"],
    "calibrate: output is a folder": [*CALIBRATE, "model", "--replace"],
    "calibrate: no such folder": [*CALIBRATE, "absent/rule.json"],
    "report: output is there": ["report", "run", "--output", "page.html"],
    "report: output is of the run": ["report", "run", "--output", "run/metrics.jsonl", "--replace"],
    "report: figures into a file": ["report", "run", "--png", "page.html", "--replace"],
    "report: no such folder": ["report", "run", "--output", "absent/page.html"],
    "train: into a run": ["train", "--output_dir", "run"],
    "train: into a folder with a card": ["train", "--output_dir", "."],
    "compare: into a run": ["compare", "--output_dir", "run"],
    "compare: runs into a run": ["compare", "--runs", "a=run", "--output_dir", "run"],
    "doctor: a run takes no output": ["doctor", "run", "--output", "page.html"],
    "methods: takes no path": ["methods", "page.html"],
}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("argv", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_in_the_way_is_refused_and_nothing_changes(argv, here, capsys):
    before = hashes(here)
    assert main(argv) == 2
    assert hashes(here) == before
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("name", WRITTEN)
def test_a_run_begins_in_no_folder_that_holds_a_file_of_such_a_name(name, here, capsys):
    folder = here / "new run"
    folder.mkdir()
    (folder / name).write_text("mine")
    (folder / "log.txt").write_text("of the shell that starts it")
    before = hashes(here)
    assert main(["train", "--output_dir", str(folder)]) == 2
    assert hashes(here) == before
    assert "choose another --output_dir" in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("argv", "written"),
    [
        ([*EVAL, "figures.json"], {"figures.json", "figures.parquet"}),
        ([*CALIBRATE, "rule.json"], {"rule.json"}),
        (["report", "run", "--output", "page.html"], {"page.html"}),
    ],
)
def test_a_flag_writes_over_what_is_there_and_nothing_else(argv, written, here):
    before = hashes(here)
    assert main([*argv, "--replace"]) == 0
    after = hashes(here)
    assert {name for name in after if after[name] != before.get(name)} == written


@pytest.mark.usefixtures("quick")
def test_a_page_of_the_same_runs_is_made_again_without_a_word_and_no_other(here, capsys):
    assert main(["report", "run"]) == main(["report", "run"]) == 0
    assert main(["report", "run", "other run"]) == main(["report", "other run", "run"]) == 0  # ./report.html
    shutil.move("run", "moved run")
    assert main(["report", "moved run"]) == 0
    (here / "other run/report.html").write_bytes((here / "moved run/report.html").read_bytes())
    with (here / "moved run/report.html").open("a") as page:
        page.write("<p>note</p>")
    before = hashes(here)
    for argv in (
        ["report", "other run"],
        ["report", "moved run"],
        ["report", "moved run", "--output", "report.html"],
    ):
        assert main(argv) == 2
        assert "--replace" in capsys.readouterr().err
    assert hashes(here) == before


@pytest.mark.usefixtures("quick")
def test_figures_of_the_same_runs_are_made_again_and_no_other(here, monkeypatch, capsys):
    figure = SimpleNamespace(name="reward", chart=1, drawn=lambda kind: kind.encode())
    monkeypatch.setattr(report, "curves", lambda runs: [figure])
    for _ in range(2):
        assert main(["report", "run", "--png", "figures of mine"]) == 0
    (here / "figures of mine/reward.svg").write_text("mine")
    before = hashes(here)
    assert main(["report", "other run", "--png", "figures of mine"]) == 2
    assert main(["report", "run", "--png", "figures of mine", "--format", "svg"]) == 2
    after = hashes(here)
    assert {name for name in after if after[name] != before.get(name)} <= {
        "run/report.html",
        "other run/report.html",
    }


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("argv", "code"),
    [
        ([*EVAL, "shut/figures.json"], 2),
        ([*CALIBRATE, "shut/rule.json"], 2),
        (["report", "run", "--output", "shut/page.html"], 1),
        (["report", "run", "--png", "shut"], 1),
        (["train", "--output_dir", "shut"], 1),
        (["compare", "--output_dir", "shut"], 1),
        (["compare", "--runs", "a=run", "--output_dir", "shut"], 1),
    ],
)
def test_a_folder_that_cannot_be_written_to_is_said_and_stays(argv, code, here, monkeypatch, capsys):
    (here / "shut").mkdir()
    (here / "shut/page.html.bak").write_text("mine")
    before, opened = hashes(here), Path.open

    def deny(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        if set(mode) & set("wxa") and "shut" in path.parts:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, mode, *args, **options)

    monkeypatch.setattr(Path, "open", deny)  # root may write everywhere
    monkeypatch.setattr(
        "tempfile.TemporaryFile", lambda **_: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    assert main(argv) == code
    assert "Permission denied" in capsys.readouterr().err
    after = hashes(here)
    assert {name: after[name] for name in before} == before


# -- hapo compare --------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """Which runs were trained, by stubs."""
    runs: list[str] = []

    def run_all(jobs: list[Any], *_: Any) -> bool:
        for job in jobs:
            if not job.done:
                job.folder.mkdir(parents=True, exist_ok=True)
                write_whole(job.folder / PLAN, json.dumps(job.plan))
                write_whole(job.folder / "finished.json", f"{{}} {len(runs)}")
                runs.append(f"{job.arm.label} {job.seed}")
        return True

    monkeypatch.setattr(compare, "run_all", run_all)
    monkeypatch.setattr(compare, "_conclude", lambda *args: None)
    return runs


REWARD = "def parity(prompts, completions, **columns):\n    return [0.0 for _ in completions]\n"


@pytest.fixture
def asked(here) -> Callable[..., int]:
    """`hapo compare` of a recipe with files of data and rewards, as the flags say."""
    rows = [json.dumps({"question": f"{a}+{b}=", "answer": str(a + b)}) for a in range(5) for b in range(5)]
    Path("data.jsonl").write_text("\n".join(rows) + "\n")
    Path("reward.py").write_text(REWARD)
    Path("recipe.yaml").write_text(
        "# of mine\nmodel_name_or_path: tiny\ndataset: data.jsonl\nrewards: reward.py:parity\neval_size: 5\n"
        "max_steps: 2\nlearning_rate: 1.0e-3\nmax_num_gen_batches: 2\nuse_cpu: true\nbf16: false\n"
        "activation_checkpointing: false\nnum_generations: 4\n"
    )

    def ask(*arms: str, output: str = "of mine", config: str = "recipe.yaml", **options: Any) -> int:
        more = [word for word in flags(**options) if word != "True"]
        seeds = ["--seeds", "1"] if "seeds" not in options else []
        return main(["compare", "--config", config, "--output_dir", output, *seeds, *more, "--arms", *arms])

    return ask


def test_a_comparison_is_known_again_wherever_it_lies_and_from_wherever_it_is_asked_for(
    here, asked, trained, monkeypatch
):
    assert asked("dapo") == 0 and trained == ["dapo 1"]
    Path("data.jsonl").write_text(Path("data.jsonl").read_text() + "\n")  # no row of it
    (here / "recipe.yaml").write_text("# noted\n" + (here / "recipe.yaml").read_text())
    before = hashes(here)
    assert asked("dapo", output=str(here / "of mine")) == 0
    assert asked("dapo", output="../a b/of mine", config=str(here / "recipe.yaml")) == 0
    assert hashes(here) == before
    (here / "elsewhere").mkdir()
    shutil.copy("data.jsonl", "elsewhere/renamed.jsonl")
    shutil.copy("reward.py", "elsewhere/mine.py")
    shutil.move("of mine", "elsewhere/moved")
    shutil.copytree(tiny_model_path(), "elsewhere/a copy of tiny")
    before = hashes(here)
    monkeypatch.chdir(here / "elsewhere")
    renamed = {"dataset": "renamed.jsonl", "rewards": here / "elsewhere/mine.py:parity", "model": "a copy of tiny"}
    assert asked("dapo", output="moved", config="../recipe.yaml", **renamed) == 0
    assert hashes(here) == before and trained == ["dapo 1"]


def test_arms_and_seeds_are_added_to_what_is_there(here, asked, trained, capsys):
    assert asked("dapo") == 0
    before = hashes(here)
    assert asked("dapo", "grpo", seeds=2) == 0
    assert trained == ["dapo 1", "grpo 1", "dapo 2", "grpo 2"]
    capsys.readouterr()
    before = hashes(here)
    assert asked("dapo", "grpo", "trl:dapo") == 2  # it would hold all arms to no dynamic sampling
    err = capsys.readouterr().err
    assert "2 finished runs, of mine/runs/dapo/seed-1 the first, with max_num_gen_batches: 2 there, 1 here" in err
    assert "(TRL's trainer has no dynamic sampling: max_num_gen_batches is 1 in every arm)" in err
    assert "Nothing was changed: choose another --output_dir, or train anew what differs with --replace" in err
    assert hashes(here) == before


CHANGED: dict[str, tuple[Callable[[], object], str]] = {
    "recipe": (lambda: change("recipe.yaml", "1.0e-3", "2.0e-3"), "learning_rate: 0.001 there, 0.002 here"),
    "a row of the data": (lambda: change("data.jsonl", '"8"', '"9"'), "data: '"),
    "reward": (lambda: change("reward.py", "0.0", "1.0"), "rewards: ['parity of "),
    "model": (lambda: change("model/config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'), "model: '"),
}


def change(file: str, old: str, new: str) -> None:
    text = Path(file).read_text()
    assert old in text
    Path(file).write_text(text.replace(old, new))


@pytest.mark.parametrize("changed", CHANGED)
def test_a_finished_run_that_differs_is_named_and_trained_anew_only_when_told(
    changed, here, asked, trained, capsys
):
    act, words = CHANGED[changed]
    shutil.copytree(tiny_model_path(), "model", dirs_exist_ok=True)
    asked = functools.partial(asked, model="model")
    assert asked("dapo") == 0
    act()
    before = hashes(here)
    assert asked("dapo") == 2
    assert f"1 finished run, of mine/runs/dapo/seed-1, with {words}" in capsys.readouterr().err
    assert hashes(here) == before and trained == ["dapo 1"]
    assert asked("dapo", replace=True) == 0
    assert "moved aside, to of mine/aside: 1 earlier run" in capsys.readouterr().out
    after = hashes(here)
    for name in ("plan.json", "finished.json"):
        assert after[f"of mine/aside/runs/dapo/seed-1.1/{name}"] == before[f"of mine/runs/dapo/seed-1/{name}"]
    assert trained == ["dapo 1", "dapo 1"]
    assert asked("dapo", replace=True) == 0 and hashes(here) == after  # it is what is asked for


def test_a_run_of_another_version_of_hapo_is_named_and_stays(here, asked, trained, monkeypatch, capsys):
    assert asked("dapo") == 0
    before, version = hashes(here), hapo.__version__
    monkeypatch.setattr(hapo, "__version__", "99.0")
    assert asked("dapo") == 2
    assert f"with hapo: '{version}' there, '99.0' here" in capsys.readouterr().err
    assert hashes(here) == before
    plan = here / "of mine/runs/dapo/seed-1" / PLAN
    plan.write_text(json.dumps({"arm": "dapo", "seed": 1, "recipe": ["--config", "/a/recipe.yaml"], "flags": {}}))
    before = hashes(here)
    assert asked("dapo") == 2
    assert "of an earlier hapo, which does not say what its data and model were" in capsys.readouterr().err
    assert hashes(here) == before and trained == ["dapo 1"]


@pytest.mark.parametrize("name", ["runs", "runs/dapo"])
@pytest.mark.parametrize("replace", [{}, {"replace": True}])
def test_a_file_where_a_folder_is_to_be_is_left(name, replace, here, asked, trained, capsys):
    (here / "of mine" / name).parent.mkdir(parents=True)
    (here / "of mine" / name).write_text("mine")
    before = hashes(here)
    assert asked("dapo", **replace) == 2
    assert f"of mine/{name} is there and no folder" in capsys.readouterr().err
    assert hashes(here) == before and trained == []


def test_a_stopped_try_is_moved_aside_and_what_is_no_run_is_refused(here, asked, trained, capsys):
    assert asked("dapo") == 0
    (here / "of mine/runs/dapo/seed-1/finished.json").unlink()
    (here / "of mine/runs/dapo/seed-1/notes.md").write_text("mine")
    (here / "of mine/runs/grpo/seed-1").mkdir(parents=True)
    (here / "of mine/runs/grpo/seed-1/notes.md").write_text("mine")
    before = hashes(here)
    assert asked("dapo", "grpo") == 2
    assert "of mine/runs/grpo/seed-1 is no run of a comparison" in capsys.readouterr().err
    assert hashes(here) == before
    assert asked("dapo") == 0 and trained == ["dapo 1", "dapo 1"]
    assert (here / "of mine/aside/runs/dapo/seed-1.1/notes.md").read_text() == "mine"
    assert asked("grpo", replace=True) == 0
    assert (here / "of mine/aside/runs/grpo/seed-1.1/notes.md").read_text() == "mine"


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("name", ["results.csv", "comparison.md", "figures/accuracy.svg", "made.json"])
def test_a_comparison_writes_over_no_file_of_its_users_and_says_so_before_it_trains(
    name, here, asked, trained, capsys
):
    (here / "of mine" / name).parent.mkdir(parents=True)
    (here / "of mine" / name).write_text("mine")
    before = hashes(here)
    assert asked("dapo") == 2
    assert f"of mine/{name} is there, and hapo did not write it" in capsys.readouterr().err
    assert hashes(here) == before and trained == []
