"""Files that are written: each in one piece, and none over what somebody else wrote or changed.

A file is known again by its content, never by its name. A page carries the hash of itself in its last line; beside
tables and figures, which cannot, lies `made.json` with their hashes. Both say of what they were made, so that what
is made of other runs is not taken for an older state of the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

MADE = "made.json"
"""Hashes of the files that hapo wrote into a folder; each before its file, so that a crash leaves none unknown."""

SEAL = re.compile(rb"<!-- made by hapo of ([^ ]*), (\w{64}) -->\n", re.ASCII)

REMEDY = "move it, name another place, or replace it (--replace)"


def write_whole(file: Path, data: str | bytes) -> None:
    """Write a file in one piece: whoever reads it, also after a crash, sees the old content or the new.

    Of a link, the file that it leads to is written.

    Raises:
        OSError: it cannot be written there; the old content stays.
    """
    file = file.resolve()
    partial = file.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        with partial.open("xb") as out:  # never a file that is there
            out.write(data.encode() if isinstance(data, str) else data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def remembered(name: str, key: str, make: Callable[[], str]) -> str:
    """What `make` returns: from the user's cache, where it lies under this key and whole, else made and put there.

    A file of another user, or that everybody may write to, is not taken: what is in it may be run in a page.

    Args:
        name: of the file in `$XDG_CACHE_HOME/hapo`, or `~/.cache/hapo`.
        key: one line, another one for whatever else the text depends on.
        make: what takes seconds.
    """
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        file = (Path(given) if given else Path.home() / ".cache") / "hapo" / name
    except RuntimeError:  # no home
        return make()
    with suppress(OSError, UnicodeError), file.open("rb") as there:
        found = os.fstat(there.fileno())
        head, _, kept = there.read().partition(b"\n")
        ours = not hasattr(os, "getuid") or (found.st_uid == os.getuid() and not found.st_mode & 0o002)
        if ours and head.decode() == f"{key} {hashlib.sha256(kept).hexdigest()}":
            return kept.decode()
    made = make()
    with suppress(OSError):  # a cache that cannot be written to is no error
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_whole(file, f"{key} {hashlib.sha256(made.encode()).hexdigest()}\n{made}")
    return made


def check_free(*files: Path, inputs: Iterable[Path] = (), replace: bool = False) -> None:
    """Find out before any work whether files that a user named may be written.

    Args:
        files: that are to be written.
        inputs: files that are read, which are not even replaced; those that do not exist do not count.
        replace: whether files that are there may be written over.

    Raises:
        FileExistsError: one is there already, or is an input.
        OSError: one cannot be written, with the reason.
    """
    read = [one for one in inputs if one.exists()]
    for file in files:
        if file.exists() and any(os.path.samefile(file, one) for one in read):
            raise FileExistsError(f"output {file} is a file that this command reads: name another")
        if os.path.lexists(file) and not file.is_file():
            raise FileExistsError(f"output {file} is there, and no plain file: name another")
        if file.is_file() and not replace:
            raise FileExistsError(f"output {file} is there already: {REMEDY}")
        try:
            probe = file.resolve().with_name(f".{secrets.token_hex(8)}.partial")
            probe.open("xb").close()
            probe.unlink()
        except OSError as error:
            raise OSError(f"output {file} cannot be written: {error.strerror}") from error


def check_page(file: Path, of: str, replace: bool = False) -> None:
    """Find out whether a page that is made of `of` may be written.

    Raises:
        FileExistsError: a file is there that is no such page as it was written, and `replace` is not set.
    """
    if not os.path.lexists(file):
        return
    if not file.is_file():
        raise FileExistsError(f"{file} is there and no plain file: name another")
    seal = None if replace else _seal(file.read_bytes())
    if not replace and seal is None:
        raise FileExistsError(f"{file} is there, and hapo did not write it or it was changed since: {REMEDY}")
    if not replace and seal != of:
        raise FileExistsError(f"{file} is the page of other runs: {REMEDY}")


def write_page(file: Path, page: str, of: str, replace: bool = False) -> None:
    """Write an HTML page that `check_page` knows again.

    Raises:
        FileExistsError: see `check_page`.
        OSError: it cannot be written there.
    """
    check_page(file, of, replace)
    body = page if page.endswith("\n") else page + "\n"
    write_whole(file, f"{body}<!-- made by hapo of {of}, {_hash(of.encode() + body.encode())} -->\n")


def check_made(folder: Path, names: Iterable[str], of: str, replace: bool = False) -> None:
    """Find out whether files in a folder that are made of `of` may be written.

    Raises:
        FileExistsError: one is there that is not as hapo wrote it, or was made of something else, and `replace` is
            not set.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise FileExistsError(f"{folder} is there and no folder: name another")
    made = _made(folder, replace)
    for name in names:
        file = folder / name
        if not os.path.lexists(file):
            continue
        if not file.is_file():
            raise FileExistsError(f"{file} is there and no plain file: name another folder")
        if replace:
            continue
        if _hash(file.read_bytes()) not in made["files"].get(name, []):
            raise FileExistsError(f"{file} is there, and hapo did not write it or it was changed since: {REMEDY}")
        if made["of"] != of:
            raise FileExistsError(f"{file} is made of other runs: {REMEDY}")


def write_made(folder: Path, files: Mapping[str, str | bytes], of: str, replace: bool = False) -> None:
    """Write files, name in the folder -> content, that `check_made` knows again; the folder is made if need be.

    Raises:
        FileExistsError: see `check_made`; nothing is written.
        OSError: one cannot be written.
    """
    check_made(folder, files, of, replace)
    folder.mkdir(parents=True, exist_ok=True)
    made = _made(folder, replace)
    known: dict[str, list[str]] = dict(made["files"]) if made["of"] == of else {}
    for name, data in files.items():
        there = _hash((folder / name).read_bytes()) if (folder / name).is_file() else ""
        known[name] = [_hash(data.encode() if isinstance(data, str) else data)]
        known[name] += [there] * (there in made["files"].get(name, []))  # until it is written over
    write_whole(folder / MADE, json.dumps({"made_by": "hapo", "of": of, "files": known}, indent=2) + "\n")
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_whole(folder / name, data)


def content_hash(files: Iterable[Path]) -> str:
    """SHA-256 over names and contents of files, in the order of their names, without those that are missing."""
    digest = hashlib.sha256()
    for file in sorted((file for file in files if file.is_file()), key=lambda file: file.name):
        digest.update(f"{file.name}\n{file_hash(file)}\n".encode())
    return digest.hexdigest()


def file_hash(file: Path) -> str:
    """SHA-256 of a file's content."""
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _seal(data: bytes) -> str | None:
    """What a page says it is made of, if it is still what was written."""
    body, line = data[: (cut := data[:-1].rfind(b"\n") + 1)], data[cut:]
    found = SEAL.fullmatch(line)
    if found is None or _hash(found[1] + body) != found[2].decode():
        return None
    return found[1].decode()


def _made(folder: Path, replace: bool) -> dict[str, Any]:
    file = folder / MADE
    empty: dict[str, Any] = {"of": None, "files": {}}
    if not os.path.lexists(file):
        return empty
    try:
        found = json.loads(file.read_bytes())
        if found["made_by"] == "hapo" and isinstance(found["of"], str) and isinstance(found["files"], dict):
            return {"of": found["of"], "files": found["files"]}
    except (OSError, ValueError, TypeError, KeyError):
        pass
    if replace and file.is_file():
        return empty
    raise FileExistsError(f"{file} is there, and hapo did not write it: {REMEDY}")
