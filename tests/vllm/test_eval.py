"""`hapo eval --engine vllm` gives the figures and the answers of transformers."""

import json
import subprocess
import sys

import pyarrow.parquet as pq

from hapo.cli import main


def evaluate(folder, engine, *flags):
    """The command, and what it wrote; with vLLM in a process of its own."""
    output = folder / f"{engine}.json"
    argv = ["--model", "tiny", "--benchmarks", "addition", "--problems", "64", "--max_completion_length", "32"]
    argv += ["--per_device_eval_batch_size", "32", "--engine", engine, "--output", str(output), *flags]
    if engine == "vllm":
        subprocess.run([sys.executable, "-m", "hapo.cli", "eval", *argv], check=True, capture_output=True)
    else:
        assert not main(["eval", *argv])
    return json.loads(output.read_text()), pq.read_table(output.with_suffix(".parquet")).to_pylist()


def test_greedy_answers_are_those_of_transformers(tmp_path):
    """Text, tokens with the end of sequence, and score of every answer to 64 problems."""
    greedy = ["--temperature", "0", "--samples", "1"]
    options = ["--vllm_options", '{"enforce_eager": true, "max_model_len": 64}']
    figures, rows = evaluate(tmp_path, "vllm", *greedy, *options)
    expected, expected_rows = evaluate(tmp_path, "transformers", *greedy)
    assert rows == expected_rows
    assert figures["sets"] == expected["sets"]
    assert 0.2 < figures["sets"]["addition"]["avg"]["mean"] < 0.8
    assert figures["weights"] == expected["weights"]
