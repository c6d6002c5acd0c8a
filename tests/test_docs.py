"""The documentation says what the code does: names, pages, tables, cited tests and snippets."""

import ast
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from trl import GRPOConfig

import hapo
from hapo.cli.cards import REFERENCE, option_docs
from hapo.engines.records import RunRecords
from hapo.engines.trl.metrics import NAMES
from hapo.engines.trl.options import DECIDED_BY_METHOD, READ
from hapo.methods import options_of
from tests.examples import worked_batch
from tests.test_laws import GRADIENT_LIMITS, LIMITS

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src/hapo"
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
SNIPPET = re.compile(r"<!-- runs -->\n```python\n(.*?)```", re.DOTALL)
SNIPPETS = {f"{page.stem}-{i}": code for page in PAGES for i, code in enumerate(SNIPPET.findall(page.read_text()))}

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def definitions(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, Definition]]:
    """Public classes, functions and methods, with their dotted names."""
    for node in body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield f"{prefix}.{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from definitions(node.body, f"{prefix}.{node.name}")


def first_cells(markdown: str) -> set[str]:
    """What stands in backquotes in the first column of the tables."""
    return set(re.findall(r"^\| `([^`]+)` \|", markdown, re.MULTILINE))


def test_every_public_name_has_a_docstring():
    names = {
        name: ast.get_docstring(node)
        for file in SOURCE.rglob("*.py")
        for name, node in definitions(ast.parse(file.read_text()).body, str(file.relative_to(SOURCE)))
    }
    assert len(names) > 50
    assert [name for name, text in names.items() if not text] == []


@pytest.mark.parametrize("name", hapo.methods())
def test_every_option_of_a_method_has_a_docstring_under_it(name):
    options = options_of(name)
    assert {f.name for f in fields(options)} - set(option_docs(options)) == set()


def test_the_api_page_has_every_name_of_the_package():
    directives = set(re.findall(r"^::: (\S+)", (DOCS / "api.md").read_text(), re.MULTILINE))
    names = {n for n in hapo.__all__ if not n.startswith("__")}
    assert names - {d.rpartition(".")[2] for d in directives} == set()


@pytest.mark.parametrize("name", hapo.methods())
def test_every_method_has_a_page(name):
    page = (DOCS / "methods" / f"{name}.md").read_text()
    headings = [line[3:] for line in page.splitlines() if line.startswith("## ")]
    options = options_of(name)
    differs = f"What differs from {REFERENCE[options.kind].upper()}"
    sections = ["Equations", differs, "Options", "When to use it", "Paper and released code"]
    assert [h for h in headings if h in sections] == sections
    made = runpy.run_path(str(ROOT / "scripts/docs_from_code.py"))
    assert f"::: {options.__module__}.{options.__name__}\n" in made["api_of_methods"]() + "\n"
    assert f"methods/{name}.md" in [page for entry in made["navigation"]()[1:] for page in entry.values()]


def test_what_the_pages_leave_to_the_code_is_made():
    made = runpy.run_path(str(ROOT / "scripts/docs_from_code.py"))
    assert made["readme"]() in (ROOT / "README.md").read_text(), "run python scripts/docs_from_code.py"
    left = {comment for page in PAGES for comment in re.findall(r"<!-- made: .*? -->", page.read_text())}
    assert left == made["MADE"].keys()
    assert all(len(make().splitlines()) > 10 for make in made["MADE"].values())


def test_the_tables_of_limits_are_those_of_the_tests():
    page = (DOCS / "laws.md").read_text().partition("## Limits")[2].partition("\n## ")[0]
    first = [re.match(r"`(\w+)`", cells).group(1) for cells in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)]
    tested = [one[0] for one, *_ in [*LIMITS, *GRADIENT_LIMITS]]
    assert sorted(first) == sorted([*tested, "rloo"])


def test_cited_tests_exist():
    cited = {c for page in PAGES for c in re.findall(r"(tests/[\w/]+\.py)::(\w+)", page.read_text())}
    assert len(cited) > 20
    assert [(file, test) for file, test in cited if f"\ndef {test}(" not in (ROOT / file).read_text()] == []


def test_links_between_files_lead_somewhere():
    links = [
        (page.name, target)
        for page in PAGES
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert links == []


def test_the_trl_page_has_every_refused_option_and_every_metric():
    page = (DOCS / "trl_reference.md").read_text()
    theirs = {f.name for f in fields(GRPOConfig)}
    assert {*DECIDED_BY_METHOD, *READ} <= theirs and not DECIDED_BY_METHOD.keys() & READ.keys()
    assert set(NAMES.values()) - first_cells(page) == set()
    files = [SOURCE / "engines/metrics.py", *(SOURCE / "engines/trl").glob("*.py")]
    engine = "".join(file.read_text() for file in files)
    logged = re.findall(r'(?<!_)metrics\[f?"([\w/]+)', engine)  # of an f-string, what stands before the name
    assert len(logged) > 5
    assert [name for name in logged if f"| `{name}" not in page] == []


def test_the_records_page_has_every_column(tmp_path):
    method = hapo.method("hapo", filter_groups=False).replace(select=lambda batch: batch.mask)
    batch = worked_batch()
    batch = batch.replace(sampler_logp=batch.old_logp, entropy=batch.old_entropy, token_reward=batch.old_logp)
    batch = method.prepare(batch)
    ids = torch.zeros(batch.mask.shape, dtype=torch.long)
    records = RunRecords(tmp_path)
    texts = [["a"] * batch.mask.shape[1]] * len(batch)
    temperature = torch.ones(batch.mask.shape)
    records.add_tokens(
        1,
        1,
        batch,
        method.loss(batch).tokens
        | dict.fromkeys(("gate", "staleness", "unmasked", "confidence"), torch.full(batch.mask.shape, 0.5)),
        mask=batch.mask,
        response=torch.arange(len(batch)),
        responses=len(batch),
        ids=ids,
        texts=texts,
        prompts=["p"] * len(batch),
        temperature=temperature,
        said=texts,
    )
    records.write_tokens(1)
    (file,) = (tmp_path / "tokens").iterdir()
    section = (DOCS / "run_records.md").read_text().partition("## Columns")[2]
    assert first_cells(section) == set(pq.read_schema(file).names)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Folder of the snippets after all have run, and the exit code of each."""
    folder = tmp_path_factory.mktemp("snippets")
    for name, code in SNIPPETS.items():
        (folder / f"{name}.py").write_text(code)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = [sys.executable, "-m", "tests.snippets", str(folder)]
    done = subprocess.run(run, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads(done.stdout)


@pytest.mark.xdist_group("snippets")
@pytest.mark.parametrize("name", SNIPPETS)
def test_snippets_run(name, ran):
    folder, codes = ran
    assert codes[name] == 0, (folder / f"{name}.txt").read_text()[-3000:]


@pytest.mark.xdist_group("snippets")
def test_every_page_with_a_runnable_snippet_is_run(ran):
    marked = sum(page.read_text().count("<!-- runs -->") for page in PAGES)
    assert marked == len(ran[1]) >= 7


def test_the_readme_is_for_a_newcomer():
    """One line, an installation by line 5, a script that runs by line 25, a picture before the tables, 800 words."""
    text = (ROOT / "README.md").read_text()
    script = SNIPPET.search(text)
    assert len(text.split()) <= 800
    assert "pip install" in "".join(text.splitlines()[:5])
    assert text[: script.end()].count("\n") < 25
    assert script.end() < text.index("\n![") < text.index("\n|")


def test_the_template_of_a_method_runs_as_the_guide_says(tmp_path):
    """The guide's steps on a copy of the package: the file, the test, the card."""
    template, guide = DOCS / "method_template.py", (DOCS / "adding_a_method_reference.md").read_text()
    assert f"```python\n{template.read_text()}```" in guide
    shutil.copytree(SOURCE, tmp_path / "hapo")
    shutil.copy(template, tmp_path / "hapo/methods/my_method.py")
    (its_test,) = re.findall(r"```python\n(import pytest\n.*?)```", guide, re.DOTALL)
    (tmp_path / "test_my_method.py").write_text(its_test)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    chosen = "test_my_method or (my_method and (test_mask or test_a_law_is_broken))"
    laws = [str(ROOT / "tests/test_laws.py"), "-k", chosen, "--rootdir", str(ROOT)]
    for arguments in (
        ["pytest", "-q", "-p", "no:cacheprovider", "test_my_method.py", *laws],
        ["hapo.cli", "methods", "my_method"],
    ):
        run = [sys.executable, "-m", *arguments]
        done = subprocess.run(run, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
