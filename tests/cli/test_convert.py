"""`hapo convert`: what it takes and writes; the forms themselves are in tests/insight/test_foreign.py."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from hapo.assets import tiny_model_path
from hapo.cli import main
from hapo.insight.run import Run


def test_a_dump_becomes_a_run(tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_model_path()))
    samples = []
    for answer, reward in (("3", 1.0), ("4", 0.0)):
        drawn = tokenizer(answer, add_special_tokens=False).input_ids
        prompt = tokenizer("1+2=", add_special_tokens=False).input_ids
        logps = {"rollout_log_probs": [-0.5] * len(drawn), "response_length": len(drawn)}
        samples.append({"group_index": 0, "tokens": prompt + drawn, "reward": reward, **logps})
    torch.save({"rollout_id": 3, "samples": samples}, tmp_path / "rollout_3.pt")
    given = [str(tmp_path), "--tokenizer", "tiny", "--output_dir", str(tmp_path / "run")]
    assert main(["convert", *given]) == 0
    assert "1 step: " in capsys.readouterr().out
    tokens = Run(tmp_path / "run").tokens(3)
    assert set(tokens["prompt"]) == {"1+2="}
    assert "".join(tokens[tokens["response"] == 1]["text"]) == "4"
    assert main(["convert", *given]) == 2  # a run is there
    assert "choose another output_dir" in capsys.readouterr().err


def test_a_folder_without_dumps(tmp_path, capsys):
    given = ["--tokenizer", "tiny", "--output_dir", str(tmp_path / "run")]
    assert main(["convert", str(tmp_path / "none"), *given]) == 2
    assert "is no folder" in capsys.readouterr().err
    assert main(["convert", str(tmp_path), *given]) == 1
    assert "neither prime-rl's token_exports" in capsys.readouterr().err


@pytest.mark.parametrize("tokenizer", ["no/such/tokenizer", "{empty}"])
def test_a_tokenizer_that_is_not_there_is_named(tokenizer, tmp_path, capsys):
    name = tokenizer.format(empty=tmp_path)
    assert main(["convert", str(tmp_path), "--tokenizer", name, "--output_dir", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert f"--tokenizer '{name}'" in said and "name a folder with a tokenizer" in said
    assert not (tmp_path / "run").exists()
