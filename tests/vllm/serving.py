"""vLLM's OpenAI server with the tiny model, on CPU."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hapo.assets import tiny_model_path

V2 = Path(__file__).with_name("interpreted_server.py")


@contextmanager
def serving(log: Path, *flags: str, runner_v2: bool = False, **env: str) -> Iterator[str]:
    """The address of a server that is up, with these flags and variables; what it prints goes to `log`.

    `runner_v2`: its engine has Model Runner V2, by Triton's interpreter.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    program = [str(V2)] if runner_v2 else ["-m", "vllm.entrypoints.openai.api_server"]
    command = [sys.executable, *program, "--model", str(tiny_model_path())]
    command += ["--dtype=float32", "--enforce-eager", "--max-model-len=64", "--max-num-seqs=16"]
    command += ["--logprobs-mode=processed_logprobs", "--host=127.0.0.1", f"--port={port}", *flags]
    with log.open("w") as out:
        server = subprocess.Popen(
            command,
            env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", **env},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1200):  # seconds on a free machine, minutes on one with other work
            assert server.poll() is None, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(url + "/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        server.wait(30)
