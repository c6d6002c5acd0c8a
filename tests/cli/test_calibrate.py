"""`hapo calibrate`: the rule that it writes, and what it refuses before any work."""

from __future__ import annotations

import json
import re

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from hapo.assets import tiny_model_path
from hapo.cli import main
from hapo.methods import TemperatureOptions
from hapo.samplers.calibration import calibrate
from hapo.samplers.rule import TemperatureRule, rule_options
from tests.cli.small import flags

PROMPTS = ["347+586=", "1+2=", "12+34="]


def run(tmp_path, **options) -> int:
    options = {"model": "tiny", "prompts": tmp_path / "p.txt", "output": tmp_path / "rule.json", **options}
    return main(["calibrate", *flags(**{k: v for k, v in options.items() if v is not None})])


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "p.txt").write_text("\n\n".join(PROMPTS) + "\n")
    return tmp_path


def test_the_file_is_the_rule_with_the_statistics_of_the_function(prompts, capsys):
    small = {"max_new_tokens": 12, "batch_size": 2, "seed": 3}
    assert run(prompts, rule="zscore", tau=0.2, rho=0.7, temperature=0.8, limit=2, device="cpu", **small) == 0
    path = tiny_model_path()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    stats = calibrate(model, tokenizer, PROMPTS[:2], t_base=0.8, rho=0.7, **small)
    rule = TemperatureRule.load(prompts / "rule.json")
    assert rule.options == TemperatureOptions(rule="zscore", tau=0.2, rho=0.7)
    assert rule.to_args() == TemperatureRule(rule.options, stats).to_args()
    out = capsys.readouterr().out
    assert f"2 prompts, {stats.tokens} tokens at temperature 0.8" in out
    assert f"pivot {stats.pivot:.4f}, sigma {stats.sigma:.4f}" in out
    assert f"{100 * stats.floored:.1f} % of the tokens floored" in out


def test_jsonl_holds_the_same_prompts(prompts):
    rows = [json.dumps({"prompt": p, "answer": "1"}) for p in PROMPTS]
    (prompts / "p.jsonl").write_text("\n".join(rows))
    files = [prompts / "text.json", prompts / "lines.json"]
    for name, file in zip(("p.txt", "p.jsonl"), files, strict=True):
        assert run(prompts, prompts=prompts / name, output=file, max_new_tokens=4) == 0
    assert files[0].read_text() == files[1].read_text()


@pytest.mark.parametrize(
    "options", [{"rule": "edt", "theta": 0.3}, {"rule": "dynatemp", "tau": 0.4, "vocabulary": 99}]
)
def test_a_rule_without_statistics_loads_nothing(tmp_path, capsys, options):
    assert run(tmp_path, model=None, prompts=None, **options) == 0
    assert f"the rule {options['rule']!r} reads no statistics: nothing was calibrated" in capsys.readouterr().out
    assert TemperatureRule.load(tmp_path / "rule.json") == TemperatureRule(rule_options(options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "absent/rule.json"}, "output absent/rule.json cannot be written: No such file"),
        ({"output": "."}, "output . is there, and no plain file: name another"),
        ({"model": None}, "name a --model and a file of --prompts"),
        ({"prompts": "absent.txt"}, "the prompts cannot be read: .*absent.txt"),
        ({"prompts": "p.parquet"}, "must be a .txt file .* got p.parquet"),
        ({"prompts": "empty.txt"}, "empty.txt holds no prompts"),
        ({"prompts": "words.jsonl"}, "words.jsonl, line 2 is no JSON"),
        ({"prompts": "other.jsonl"}, 'other.jsonl, line 1 must have a "prompt"'),
        ({"tau": 1.5}, "tau must be in .* got 1.5"),
        ({"rule": "dynatemp"}, "vocabulary must be a whole number > 1 with the rule 'dynatemp'"),
    ],
)
def test_refused_before_anything_is_loaded(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    (tmp_path / "p.txt").write_text("1+2=")
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "words.jsonl").write_text('{"prompt": "1+2="}\n1+2=\n')
    (tmp_path / "other.jsonl").write_text('{"question": "1+2="}\n')
    assert run(tmp_path, **options) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "rule.json").exists()


@pytest.mark.parametrize(
    "option", [{"temperature": 0}, {"batch_size": 0}, {"limit": 0}, {"rule": "linear"}, {"tau": "x"}]
)
def test_numbers_out_of_range_are_wrong_usage(prompts, option):
    with pytest.raises(SystemExit, match="2"):
        run(prompts, **option)
