"""Runs the snippets of the documentation, each by itself, after one import of what is not ours.

    python -m tests.snippets FOLDER        FOLDER/NAME.py -> FOLDER/NAME/ to work in, FOLDER/NAME.txt, what it printed

Each snippet runs in a process of its own, forked from one that has imported the libraries and nothing of hapo: so a
name that another snippet imports, a file that it writes or a seed that it sets is not there. Prints a JSON object of
exit codes.
"""

import json
import os
import sys
import traceback
from pathlib import Path

import datasets  # noqa: F401
import torch  # noqa: F401
import transformers
import trl

_ = transformers.AutoModelForCausalLM, transformers.AutoTokenizer, trl.GRPOTrainer, trl.GRPOConfig  # lazy modules


def run(script: Path) -> int:
    """The exit code of a script in a child process."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        work = script.with_suffix("")
        work.mkdir()
        os.chdir(work)
        printed = os.open(script.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        exec(compile(script.read_text(), script.name, "exec"), {"__name__": "__main__"})
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    assert not any(name.partition(".")[0] == "hapo" for name in sys.modules)
    print(json.dumps({script.stem: run(script) for script in sorted(Path(sys.argv[1]).resolve().glob("*.py"))}))
