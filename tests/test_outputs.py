"""Files that are written whole, and over nothing that hapo did not write."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hapo
from hapo.outputs import MADE, check_free, check_made, check_page, remembered, write_made, write_page, write_whole

KILLED = """
import os, signal, sys
from pathlib import Path
from hapo.outputs import write_made, write_page, write_whole

name, left = sys.argv[1], int(sys.argv[2])
act = getattr(os, name)

def count(*args):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return act(*args)

setattr(os, name, count)
"""


def killed_at(call: str, after: int, code: str, folder: Path) -> bool:
    """Run code in a process that is killed at a call of the system, the first `after` ones done; was it?"""
    run = [sys.executable, "-c", KILLED + code, call, str(after)]
    ended = subprocess.run(run, cwd=folder, capture_output=True, text=True)
    assert ended.returncode in (0, -9), ended.stderr
    return ended.returncode == -9


def visible(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.iterdir() if file.suffix != ".partial"}


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_kill_while_a_file_is_written_leaves_the_old_one(call, tmp_path):
    (tmp_path / "file").write_text("old")
    assert killed_at(call, 0, "write_whole(Path('file'), 'new')", tmp_path)
    assert visible(tmp_path) == {"file": "old"}
    assert not killed_at(call, 1, "write_whole(Path('file'), 'new')", tmp_path)
    assert visible(tmp_path) == {"file": "new"}


def test_a_kill_between_files_that_belong_together_leaves_each_whole_and_known(tmp_path):
    write_made(tmp_path, {"a": "old a", "b": "old b"}, "runs")
    for after in range(4):
        killed = killed_at(
            "replace", after, f"write_made(Path(), dict(a='{after} a', b='{after} b'), 'runs')", tmp_path
        )
        assert killed == (after < 3)  # the hashes, then each file
        found = visible(tmp_path)
        assert {found["a"][2:], found["b"][2:]} <= {"a", "b", "d a", "d b"}
        check_made(tmp_path, ["a", "b"], "runs")
    assert found["a"] == "3 a"


def test_what_cannot_be_written_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("old")
    monkeypatch.setattr(os, "replace", lambda *files: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_whole(tmp_path / "file", "new")
    assert visible(tmp_path) == {"file": "old"} and len(list(tmp_path.iterdir())) == 1


def test_of_a_link_the_file_is_written(tmp_path):
    (tmp_path / "link").symlink_to("file")
    write_whole(tmp_path / "link", b"\x00")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == b"\x00"


def test_a_page_is_known_again_wherever_it_lies_until_it_is_changed(tmp_path):
    page = tmp_path / "page.html"
    for text in ("<html>1</html>", "<html>2</html>\n"):
        write_page(page, text, "a" * 64)
    assert page.read_text().startswith("<html>2</html>\n<!-- made by hapo of aaa")
    page.rename(tmp_path / "other.html")
    check_page(tmp_path / "other.html", "a" * 64)
    with pytest.raises(FileExistsError, match=r"is the page of other runs: .*--replace"):
        write_page(tmp_path / "other.html", "3", "b" * 64)
    for changed in (
        "mine",
        "",
        page_with(tmp_path / "other.html", "2", "3"),
        page_with(tmp_path / "other.html", "aaa", "bbb"),
    ):
        page.write_text(changed)
        with pytest.raises(FileExistsError, match="hapo did not write it or it was changed since"):
            write_page(page, "3", "a" * 64)
        assert page.read_text() == changed
    write_page(page, "3", "b" * 64, replace=True)
    check_page(page, "b" * 64)
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileExistsError, match="no plain file"):
        write_page(tmp_path / "folder", "3", "b" * 64, replace=True)


def page_with(page: Path, old: str, new: str) -> str:
    return page.read_text().replace(old, new, 1)


def test_files_of_a_folder_are_known_again_until_one_is_changed(tmp_path):
    folder = tmp_path / "a b"
    write_made(folder, {"table.csv": "1", "figures/x.svg": b"1"}, "runs")
    write_made(folder.rename(tmp_path / "moved"), {"table.csv": "2"}, "runs")
    folder = tmp_path / "moved"
    check_made(folder, ["table.csv", "figures/x.svg", "absent"], "runs")
    with pytest.raises(FileExistsError, match="is made of other runs"):
        write_made(folder, {"table.csv": "3"}, "other")
    (folder / "notes.md").write_text("mine")
    for name, text in (("notes.md", "mine"), ("table.csv", "2 and a note")):
        (folder / name).write_text(text)
        with pytest.raises(FileExistsError, match=f"{name} is there, and hapo did not write it"):
            write_made(folder, {"figures/x.svg": b"2", name: "3"}, "runs")
        assert (folder / name).read_text() == text and (folder / "figures/x.svg").read_bytes() == b"1"
    write_made(folder, {"table.csv": "3"}, "other", replace=True)
    check_made(folder, ["table.csv"], "other")
    with pytest.raises(FileExistsError, match="x.svg is there"):
        check_made(folder, ["figures/x.svg"], "other")


@pytest.mark.parametrize("text", ["mine", "[]", '{"made_by": "me", "of": "runs", "files": {}}'])
def test_hashes_that_somebody_else_wrote_are_left(text, tmp_path):
    (tmp_path / MADE).write_text(text)
    with pytest.raises(FileExistsError, match=r"made.json is there, and hapo did not write it"):
        write_made(tmp_path, {"table.csv": "1"}, "runs")
    assert visible(tmp_path) == {MADE: text}


def test_a_file_that_a_user_named_is_written_over_only_when_told_and_never_an_input(tmp_path):
    output, folder = tmp_path / "a b.json", tmp_path / "folder"
    folder.mkdir()
    check_free(output, inputs=[tmp_path / "absent"])
    assert not list(tmp_path.glob("*.*"))
    output.write_text("mine")
    with pytest.raises(FileExistsError, match=r"is there already: .*--replace"):
        check_free(tmp_path / "free", output)
    check_free(output, replace=True)
    os.link(output, tmp_path / "hard.jsonl")
    (tmp_path / "soft.jsonl").symlink_to(output)
    for read in ("a b.json", "hard.jsonl", "soft.jsonl", "folder/../a b.json"):
        with pytest.raises(FileExistsError, match="is a file that this command reads"):
            check_free(output, inputs=[tmp_path / read], replace=True)
    with pytest.raises(FileExistsError, match="no plain file"):
        check_free(folder, replace=True)
    with pytest.raises(OSError, match="cannot be written: No such file"):
        check_free(tmp_path / "absent/file")
    assert output.read_text() == "mine" and not list(tmp_path.glob(".*"))


def test_nothing_of_the_library_writes_a_file_in_another_way():
    """Left out: what lies in a folder of the library's own (the cache of cards, checkpoints, tokens of a run)."""
    own = {
        "outputs.py",
        "cli/cards.py",
        "engines/records.py",
        "engines/trl/checkpoint.py",
    }
    source = Path(hapo.__file__).parent
    calls = re.compile(
        r"\.write_(text|bytes)\(|\.to_(csv|parquet|json)\((?!index=False\))|write_table\((?!.*(, table,|, buffer\)))|os\.replace\(|\bopen\(.*[\"'][wax]"
    )
    found = {
        f"{file.relative_to(source)}: {line.strip()}"
        for file in source.rglob("*.py")
        if str(file.relative_to(source)) not in own
        for line in file.read_text().splitlines()
        if calls.search(line)
    }
    assert found == set()


def test_a_text_is_made_once_for_each_key_and_anew_where_it_was_cut_short(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    texts = iter(["one\nline", "two", "three\r\n"])

    def make():
        return next(texts)

    assert [remembered("kept.js", "v1", make) for _ in range(2)] == ["one\nline"] * 2
    assert remembered("kept.js", "v2", make) == "two"
    file = tmp_path / "hapo/kept.js"
    file.write_bytes(file.read_bytes()[:-1])
    assert [remembered("kept.js", "v2", make) for _ in range(2)] == ["three\r\n"] * 2
