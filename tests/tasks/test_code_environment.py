"""The code environment: what a program earns, and what no program can do."""

import inspect
import os
import textwrap
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split

from hapo.tasks.environments import Environment, code, tool_of
from hapo.tasks.environments.code import CodeEnvironment

GOOD = """
def build_model(x_train, y_train):
    from sklearn.linear_model import LogisticRegression
    return LogisticRegression(max_iter=200).fit(x_train, y_train)
"""

CONSTANT = """
class Model:
    def predict_proba(self, x):
        return np.full((len(x), 3), 1 / 3)
"""


@pytest.fixture(scope="module")
def environment():
    return CodeEnvironment(seconds=1)


def tried(environment, text, table="iris"):
    """The answer to one program."""
    environment.reset(table=table)
    return environment.run(text)


def inside(body):
    """A program that does this before it trains."""
    return "import os, sys\nimport numpy as np\ndef build_model(x_train, y_train):\n" + textwrap.indent(
        textwrap.dedent(body) + "\n" + "from sklearn.dummy import DummyClassifier\n"
        "return DummyClassifier().fit(x_train, y_train)",
        "    ",
    )


def test_the_reward_is_the_mean_auc_of_five_halves(environment):
    x, y = load_iris(return_X_y=True)
    aucs = []
    for seed in range(5):
        a, b, c, d = train_test_split(x, y, test_size=0.5, random_state=seed, stratify=y)
        scores = LogisticRegression(max_iter=200).fit(a, c).predict_proba(b)
        aucs.append(roc_auc_score(d, scores, multi_class="ovr"))
    assert "ROC-AUC" in tried(environment, f"Here it is:\n```python{GOOD}```\nGood luck.")
    assert environment.reward == pytest.approx(np.mean(aucs), abs=1e-9)
    assert (environment.done, environment.get_reward()) == (True, environment.reward)
    with pytest.raises(RuntimeError, match="call reset"):
        environment.run(GOOD)


def test_two_classes_are_scored_by_the_second_and_many_tables_are_known(environment):
    for table in ("breast_cancer", "wine"):
        tried(environment, GOOD.replace("200", "50"), table)
        assert 0.9 < environment.reward <= 1
    with pytest.raises(ValueError, match="no table 'titanic': choose from breast_cancer, digits, iris, wine"):
        environment.reset(table="titanic")


def test_an_error_is_told_costs_one_and_leaves_five_tries(environment):
    environment.reset(table="iris")
    assert environment.get_reward() == -1
    for turn in range(1, 6):
        told = environment.run(f"x = 1\ny = x / {turn - turn}\n")
        assert "line 2: y = x / 0\nZeroDivisionError: division by zero" in told
        assert (environment.reward, environment.done) == (-1, turn == 5)
    environment.reset(table="iris")
    environment.run("no Python")
    assert "ROC-AUC" in environment.run(GOOD)
    assert environment.done


def test_the_same_program_earns_the_same(environment):
    by_chance = inside("import random\nx_train = x_train + np.random.normal(size=x_train.shape) * random.random()")
    by_chance = by_chance.replace(
        "from sklearn.dummy import DummyClassifier", "from sklearn.svm import SVC"
    ).replace("DummyClassifier()", "SVC(probability=True)")
    rewards = set()
    for _ in range(2):
        tried(environment, by_chance)
        rewards.add(environment.reward)
    assert len(rewards) == 1
    assert rewards.pop() > 0.6


def test_an_error_is_told_alike_by_another_worker(environment):
    text = "raise ValueError(object())"
    told = tried(environment, text)
    environment._runner.worker.close()
    assert tried(environment, text) == told
    assert "ValueError: <object object at 0x...>" in told


def test_it_has_what_an_environment_has(environment):
    assert isinstance(environment, Environment)
    assert tool_of(environment).__name__ == "run"
    assert "Args:" in inspect.getdoc(CodeEnvironment.run)
    kind, train, held_out = code.load(1, 5, 3)
    assert kind is CodeEnvironment
    assert (train["table"], held_out["table"]) == (
        ["digits", "iris", "wine", "breast_cancer", "digits"],
        ["breast_cancer", "digits", "iris"],
    )
    assert "iris: 150 rows, 4 columns (sepal length (cm)," in train["prompt"][1][0]["content"]
    _, text, _ = code.load_text(1, 2, 1)
    assert text["prompt"][1] == train["prompt"][1][0]["content"]
    assert environment.reset(**train[1]) is None


BROKEN = {
    "no function": ("x = 1", "defines no function build_model"),
    "syntax": ("def build_model(:", "SyntaxError"),
    "nothing": ("", "defines no function build_model"),
    "null byte": ("x = '\0'", "null bytes"),
    "a lone surrogate": ("x = '\ud800'", "surrogates not allowed"),
    "unicode printed": ("print('\u4e2d\U0001f600' + chr(0xD800))\n1/0", "中😀\\ud800"),
    "bytes that are no text": (r"import os; os.write(1, b'\xff\xfe\x00'); 1/0", "ZeroDivisionError"),
    "no classifier": ("def build_model(x, y): return 3", "returned a int, which has no predict_proba"),
    "not finite": (
        "import numpy as np" + CONSTANT.replace("1 / 3", "np.nan") + "build_model = lambda x, y: Model()",
        "not finite",
    ),
    "too few classes": (
        "import numpy as np" + CONSTANT.replace(", 3)", ", 2)") + "build_model = lambda x, y: Model()",
        "gave 150 numbers for 75 rows of 3 classes",
    ),
    "columns for rows": (
        "import numpy as np"
        + CONSTANT.replace("(len(x), 3)", "(3, len(x))")
        + "build_model = lambda x, y: Model()",
        "of shape (3, 75) for 75 rows",
    ),
    "one long row": (
        "import numpy as np"
        + CONSTANT.replace("(len(x), 3)", "len(x) * 3")
        + "build_model = lambda x, y: Model()",
        "of shape (225,) for 75 rows",
    ),
    "no numbers": (
        CONSTANT.replace("np.full((len(x), 3), 1 / 3)", "['a']") + "build_model = lambda x, y: Model()",
        "ValueError",
    ),
    "sys.exit": ("import sys; sys.exit(0)", "SystemExit"),
    "os._exit": ("import os; os._exit(0)", "gave 0 numbers"),
    "another status": ("import os; os._exit(7)", "ended with status 7"),
    "the status of a failure, and nothing said": ("import os; os._exit(1)", "ended with status 1"),
    "an error that cannot be told": (
        "class E(Exception):\n    def __str__(self): raise SystemExit\nraise E",
        "raise E",
    ),
    "segmentation fault": ("import ctypes; ctypes.string_at(0)", "signal 11"),
    "abort": ("import os; os.abort()", "signal 6"),
    "recursion": ("def f(): f()\nf()", "RecursionError"),
    "endless recursion": (
        "import sys; sys.setrecursionlimit(10**9)\nclass A:\n    def __repr__(self): return repr(self)\nrepr(A())",
        "signal 11",
    ),
    "other libraries": ("import torch", "No module named 'torch'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_program_is_told_what_is_wrong(environment, name):
    text, told = BROKEN[name]
    assert told in tried(environment, text)
    assert (environment.reward, environment.done) == (-1, False)


HOSTILE = {
    "endless loop": ("while True: pass", "took more than 1 s"),
    "endless loop that no signal ends": (
        "import signal\nfor s in (signal.SIGXCPU, signal.SIGTERM): signal.signal(s, signal.SIG_IGN)\nwhile 1: pass",
        "took more than 1 s",
    ),
    "sleep": ("import time; time.sleep(1000)", "took more than 1 s"),
    "memory": ("import mmap\nx = []\nwhile True: x.append(mmap.mmap(-1, 1 << 26))", "Cannot allocate memory"),
    "memory at once": ("np.ones(1 << 34)", "MemoryError"),
    "forks": ("while True: os.fork()", "Operation not permitted"),
    "a process that stays": (
        "if os.fork() == 0:\n    os.setsid()\n    os.fork()\n    while True: pass",
        "Operation not permitted",
    ),
    "threads": (
        "import threading\nwhile True: threading.Thread(target=lambda: 1).start()",
        "can't start new thread",
    ),
    "another program": ("os.execv('/bin/sh', ['sh', '-c', 'touch {out}/new'])", "Operation not permitted"),
    "a shell": ("import subprocess; subprocess.run('touch {out}/new', shell=True)", "Operation not permitted"),
    "a new file": ("open('{out}/new', 'w')", "Read-only file system"),
    "a file here": ("open('new', 'w')", "Read-only file system"),
    "a file of others": ("open('{out}/kept', 'a')", "Read-only file system"),
    "emptied while it is read": ("os.open('{out}/kept', os.O_RDONLY | os.O_TRUNC)", "Read-only file system"),
    "a library changed": ("open(np.__file__, 'r+')", "Read-only file system"),
    "read": ("open('{out}/kept').read()", "Permission denied"),
    "the users": ("open('/etc/passwd').read()", "Permission denied"),
    "everything removed": (
        "import shutil\nos.chdir('{out}')\nshutil.rmtree('{out}')\n",
        "Operation not permitted",
    ),
    "one file removed": ("os.remove('{out}/kept')", "Operation not permitted"),
    "renamed": ("os.rename('{out}/kept', '{out}/new')", "Operation not permitted"),
    "linked": ("os.symlink('{out}/kept', '{out}/new')", "Operation not permitted"),
    "rights changed": ("os.chmod('{out}/kept', 0)", "Operation not permitted"),
    "times changed": ("os.utime('{out}/kept', (0, 0))", "Operation not permitted"),
    "truncated": ("os.truncate('{out}/kept', 0)", "Operation not permitted"),
    "a folder": ("os.mkdir('{out}/new')", "Operation not permitted"),
    "the network": ("import socket; socket.create_connection(('127.0.0.1', 1))", "Operation not permitted"),
    "a name server": ("import urllib.request as r; r.urlopen('http://example.com')", "failure in name resolution"),
    "the parent killed": ("os.kill(os.getppid(), 9)", "Operation not permitted"),
    "the group killed": ("os.killpg(0, 9)", "Operation not permitted"),
    "all killed": ("os.kill(-1, 9)", "Operation not permitted"),
    "the parent's memory": ("open(f'/proc/{{os.getppid()}}/mem', 'rb').read()", "Permission denied"),
    "traced": (
        "import ctypes; libc = ctypes.CDLL(None, use_errno=True)\n"
        "assert libc.ptrace(16, os.getppid(), 0, 0) == -1\n"
        "raise OSError(ctypes.get_errno(), 'ptrace')",
        "[Errno 1] ptrace",
    ),
    "limits raised": (
        "import resource; resource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY,) * 2)",
        "not allowed to raise maximum limit",
    ),
    "a call by number": (
        "import ctypes, platform; libc = ctypes.CDLL(None, use_errno=True)\n"
        "assert libc.syscall(425, 8, 0) == -1  # io_uring_setup\n"
        "raise OSError(ctypes.get_errno(), 'io_uring')",
        "[Errno 1] io_uring",
    ),
    "endless output": ("while True: print('x' * 1000)", "File too large"),
    "endless output without a line": ("while True: os.write(1, b'x' * 65536)", "File too large"),
    "all closed": ("os.closerange(0, 100)\n1/0", "ended with status"),
    "the secrets of the trainer": (
        "raise ValueError(os.environ.get('HF_TOKEN', 'nothing there'))",
        "nothing there",
    ),
    "the labels in scikit-learn": ("from sklearn.datasets import load_iris; load_iris()", "Permission denied"),
    "the labels in its tests": (
        "import sklearn; os.listdir(os.path.join(os.path.dirname(sklearn.__file__), 'datasets', 'tests'))",
        "Permission denied",
    ),
    "the labels in the environment": ("from hapo.tasks.environments import code", "No module named 'hapo'"),
    "the data of the other splits": ("open('{data}').read()", "Permission denied"),
}


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outside")
    (folder / "kept").write_text("kept")
    return folder


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_ends_and_changes_nothing(environment, outside, name, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    body, told = HOSTILE[name]
    environment.reset(table="iris")
    before, worker, here = state(outside), process_of(environment), set(os.listdir())
    answer = environment.run(inside(body.format(out=outside, data=environment._splits[1].file)))
    assert told in answer
    assert len(answer) < 1200
    assert (environment.reward, environment.done) == (-1, False)
    assert state(outside) == before
    assert set(os.listdir()) == here
    assert process_of(environment) == worker  # it was not ended, and it has no child left
    assert children_of(worker) == []


def state(folder):
    return {
        p.name: (p.stat().st_mode, p.stat().st_mtime_ns, p.stat().st_uid, p.read_bytes()) for p in folder.iterdir()
    }


def process_of(environment):
    return environment._runner.worker._process.pid


def children_of(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


CHEATS = {
    "the score replaced": inside(
        "import sklearn.metrics, sklearn.metrics._ranking as r\n"
        "r.roc_auc_score = sklearn.metrics.roc_auc_score = lambda *a, **k: 1.0"
    ),
    "a result made up": inside("os.write(3, np.zeros((75, 3)).tobytes()); os._exit(0)"),
    "a reply made up": inside('print(\'{"result": {"exit": 0, "scores": ""}, "reward": 1.0}\')'),
    "labels found in memory": inside(
        """
        import gc
        held = [o for o in gc.get_objects() if isinstance(o, np.ndarray)]
        held += [v for o in gc.get_objects() if isinstance(o, dict) for v in list(o.values())]
        labels = [a for a in held if isinstance(a, np.ndarray) and a.dtype.kind in "iu" and a.shape == (75,)]
        labels = [a for a in labels if set(a.tolist()) == {0, 1, 2} and not np.array_equal(a, y_train)]
        if labels:
            class Model:
                def predict_proba(self, x): return np.eye(3)[labels[0]]
            return Model()
        """
    ),
}


@pytest.mark.parametrize("name", CHEATS)
def test_no_program_has_a_reward_that_it_did_not_earn(environment, name):
    """Each predicts a constant in the end, which is worth one half."""
    assert "ROC-AUC 0.5000" in tried(environment, CHEATS[name])


def test_the_splits_of_a_table_never_share_a_process(environment):
    """What a program keeps of the labels of one split is gone in the next."""
    keeps = inside(
        "import sys\nassert not hasattr(sys.modules['sklearn'], 'kept')\nsys.modules['sklearn'].kept = y_train"
    )
    assert "ROC-AUC 0.5000" in tried(environment, keeps)


def test_in_a_container_files_are_read_and_all_else_is_refused(outside):
    environment = CodeEnvironment(seconds=1, isolation="container")
    assert "ROC-AUC" in tried(environment, inside(f"assert open('{outside}/kept').read() == 'kept'"))
    for name in ("emptied while it is read", "a file of others", "one file removed", "the network", "forks"):
        body, told = HOSTILE[name]
        assert told in tried(environment, inside(body.format(out=outside)))
    assert (outside / "kept").read_text() == "kept"
    environment._runner.worker.close()


def test_where_nothing_confines_a_program_none_is_run(monkeypatch):
    from hapo.tasks.environments import _confine

    monkeypatch.setattr(_confine, "lacking", lambda landlock: "this kernel has no Landlock" if landlock else None)
    code._runner.cache_clear()
    with pytest.raises(RuntimeError, match=r"no Landlock\. Train on Linux 5\.13 .*isolation='container'"):
        CodeEnvironment()
    CodeEnvironment(isolation="container")
    monkeypatch.setattr(code.sys, "platform", "darwin")
    code._runner.cache_clear()
    with pytest.raises(RuntimeError, match="cannot be confined on darwin"):
        CodeEnvironment(isolation="container")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_turns": 0}, "max_turns must be at least 1, got 0"),
        ({"seconds": 0}, "seconds must be at least 1, got 0"),
        ({"memory": 1000}, "memory must be at least 1073741824, got 1000"),
        ({"seconds": 2.5}, "seconds must be a whole number, got 2.5"),
        ({"max_turns": "2"}, "max_turns must be a whole number, got '2'"),
        ({"isolation": "none"}, "isolation must be 'kernel' or 'container', got 'none'"),
    ],
)
def test_limits_that_cannot_be_kept_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CodeEnvironment(**options)
