"""The process that runs programs which nobody has read: a script, one JSON object a line in and out.

No import of hapo. The first line, ``{"seconds": ..., "memory": ..., "output": ..., "landlock": ...}``, sets it up.
Every further one, ``{"code": ..., "data": path}``, is answered by a ``result``: ``exit``, the exit status (minus a
signal's number), ``text``, the end of what the program printed and its error, and ``scores``, the bytes that it
gave back, in hex.

The libraries are loaded once. Each program then gets a process of its own, a copy of this one, which reads the
data, gives up what it does not need (`_confine`), and only then runs the program. This process itself reads no
data: its memory, of which each program has a copy, holds nothing but libraries. What comes back are files in
memory, read when the process has ended: they can say what they like, and are judged elsewhere.
"""

import gc
import json
import os
import random
import select
import signal
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [FOLDER, *(entry for entry in sys.path if entry != FOLDER)]
from _confine import Limits, confine, lacking  # noqa: E402

sys.path.remove(FOLDER)  # its names must not shadow others

PATIENCE = 6
"""Times its seconds of one core that a program may take by the clock."""

MODULES = (
    *("bz2", "ctypes", "decimal", "hashlib", "joblib", "lzma", "narwhals", "numpy.random", "scipy.optimize"),
    *("scipy.sparse.linalg", "scipy.stats", "socket", "threadpoolctl", "zlib"),
    *("sklearn.calibration", "sklearn.compose", "sklearn.datasets", "sklearn.decomposition"),
    *("sklearn.discriminant_analysis", "sklearn.ensemble", "sklearn.feature_selection"),
    *("sklearn.gaussian_process", "sklearn.impute", "sklearn.linear_model", "sklearn.metrics"),
    *("sklearn.model_selection", "sklearn.naive_bayes", "sklearn.neighbors", "sklearn.neural_network"),
    *("sklearn.pipeline", "sklearn.preprocessing", "sklearn.svm", "sklearn.tree"),
)
"""Loaded before any program: what most of them import, and what a library of the system is read for."""

PACKAGES = ("dateutil", "joblib", "narwhals", "numpy", "pandas", "scipy", "six", "sklearn", "threadpoolctl")
"""What a program can import beside the standard library, where scikit-learn has loaded it."""

MACHINE = ("/sys/devices/system/cpu", "/sys/fs/cgroup")
"""Where libraries read how many cores there are."""

SHOWN = 4000
"""Characters of its output that are handed on, the last ones."""

NAME = "<program>"


def readable() -> list[str]:
    """Files and folders that a program may read: the libraries, without the tables that scikit-learn brings.

    Those hold the labels that a program is to predict.
    """
    standard = Path(sysconfig.get_path("stdlib"))
    places = [p for p in standard.iterdir() if p.name not in ("site-packages", "dist-packages", "test")]
    for package in filter(sys.modules.get, PACKAGES):
        file = Path(sys.modules[package].__file__ or "")
        home = file.parent
        if package == "sklearn":
            places += [p for p in home.iterdir() if p.name != "datasets"]
            places += [p for p in (home / "datasets").iterdir() if p.is_file()]
        else:
            places.append(home if file.name == "__init__.py" else file)
        places += home.parent.glob(f"*{package.replace('sklearn', 'scikit_learn')}.libs")
    return [str(p) for p in (*places, *map(Path, MACHINE)) if p.exists()]


def run(code: str, data: str, limits: Limits, places: list[str] | None) -> dict[str, Any]:
    """Run a program in a process of its own and wait for its end."""
    files = [os.memfd_create(name) for name in ("output", "scores", "error")]
    child = os.fork()
    if child == 0:
        try:
            _be_program(code, data, limits, places, files)
        finally:
            os._exit(70)  # it went past its own end
    handle = os.pidfd_open(child)
    ended, _, _ = select.select([handle], [], [], PATIENCE * limits.seconds)
    if not ended:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    output, scores, error = (os.pread(file, limits.output, 0) for file in files)
    for file in (handle, *files):
        os.close(file)
    return {
        "exit": os.waitstatus_to_exitcode(status),
        "text": "\n".join(text.decode("utf-8", "replace")[-SHOWN:] for text in (output, error)),
        "scores": scores.hex(),
    }


def _be_program(code: str, data: str, limits: Limits, places: list[str] | None, files: list[int]) -> None:
    """Become the process of a program, and end as it says."""
    import numpy as np

    os.setsid()
    output, scores, error = (os.dup2(file, 64 + i) for i, file in enumerate(files))
    for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), output, output, scores, error)):
        os.dup2(file, number)
    os.closerange(5, 1 << 16)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.stderr = sys.stdout
    with np.load(data, allow_pickle=False) as table:
        x_train, y_train, x_test = (table[name] for name in ("x_train", "y_train", "x_test"))
    random.seed(0)
    np.random.seed(0)
    confine(limits, places)
    try:
        names: dict[str, Any] = {"__name__": "program"}
        exec(compile(code, NAME, "exec"), names)
        if not callable(names.get("build_model")):
            raise NameError("the program defines no function build_model(x_train, y_train)")
        model = names["build_model"](x_train, y_train)
        if not hasattr(model, "predict_proba"):
            raise TypeError(f"build_model returned a {type(model).__name__}, which has no predict_proba")
        rows = len(x_test)
        answer = np.ascontiguousarray(model.predict_proba(x_test), dtype="<f8")
        if answer.ndim != 2 or len(answer) != rows:
            raise ValueError(f"predict_proba gave an array of shape {answer.shape} for {rows} rows")
        os.write(3, answer.tobytes())
        sys.stdout.flush()
        os._exit(0)
    except BaseException as fault:
        os.write(4, _told(fault, code).encode("utf-8", "backslashreplace"))
        sys.stdout.flush()
        os._exit(1)


def _told(error: BaseException, code: str) -> str:
    """The lines of the program that led to an error, and the error."""
    lines = code.split("\n")
    shown = []
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == NAME and frame.lineno and frame.lineno <= len(lines):
            shown.append(f"line {frame.lineno}: {lines[frame.lineno - 1].strip()}")
    return "\n".join([*shown[-5:], *(line.rstrip() for line in traceback.format_exception_only(error))])


def main() -> None:
    """Set up from the first line, then run programs until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C belongs to the trainer, which closes our input
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def reply(**message: Any) -> None:
        print(json.dumps(message), file=replies, flush=True)

    setup = json.loads(sys.stdin.readline())
    landlock = setup.pop("landlock")
    limits = Limits(**setup)
    if (reason := lacking(landlock=landlock)) is not None:
        reply(error=reason)
        return
    try:
        for module in MODULES:
            __import__(module)
        numpy = sys.modules["numpy"]
        numpy.linalg.svd(numpy.ones((64, 64)))  # some builds read their kernels at the first call
        places = readable() if landlock else None
        _try_out(limits, places)
        standard = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib")}
        standard |= {os.path.join(path, "lib-dynload") for path in standard}
        sys.path[:] = [path for path in sys.path if path in standard]  # other packages are not there
    except Exception as error:
        reply(error=f"{type(error).__name__}: {error}")
        return
    reply(result=None)
    gc.freeze()  # what no program needs to look through
    for line in sys.stdin:
        request = json.loads(line)
        reply(result=run(request["code"], request["data"], limits, places))


def _try_out(limits: Limits, places: list[str] | None) -> None:
    """Raise an error, unless a process that was confined here is."""
    told, child = os.memfd_create("told"), os.fork()
    if child == 0:
        refused = 0
        try:
            confine(limits, places)
            refused += _refused(os.fork)
            refused += _refused(lambda: os.kill(os.getppid(), 0))
            refused += _refused(lambda: __import__("socket").socket())
            refused += places is None or _refused(lambda: os.open(__file__, os.O_RDONLY))
        except Exception as error:
            os.write(told, f": {error}".encode())
        finally:
            os._exit(refused)
    refused = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    why = os.pread(told, 1000, 0).decode("utf-8", "replace")
    os.close(told)
    if refused != 4:
        raise OSError(f"a process cannot be confined here: {refused} of 4 tries to break out were refused{why}")


def _refused(act: Callable[[], object]) -> bool:
    try:
        act()
    except PermissionError:
        return True
    return False


if __name__ == "__main__":
    main()
