"""`hapo curriculum`: figures from the samples, a kill, what is refused; `hapo train` stage after stage, resumed."""

import json
import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hapo.assets import tiny_model_path
from hapo.cli import curriculum, main
from hapo.cli.arms import Arm, Recipe, parse_flags
from hapo.tasks import TaskConfig, load_task
from hapo.tasks.curriculum import in_stages
from hapo.tasks.semantic import semantic_entropy, stages
from tests.cli.small import flags, metrics, train

OPTIONS = {"train_size": 9, "eval_size": 4, "samples": 3, "per_device_eval_batch_size": 6, "temperature": 1.5}
FILES = ("curriculum.jsonl", "curriculum.json", "curriculum.png", "curriculum.svg")


def make(folder: Path, *words: str, **options: object) -> int:
    return main(["curriculum", *words, *flags(**{**OPTIONS, "output": folder, **options})])


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(curriculum, "PER_BLOCK", {"transformers": 4, "vllm": 4})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "curriculum"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curriculum, "PER_BLOCK", {"transformers": 4, "vllm": 4})
        assert make(folder) == 0
    return folder


def test_stages_and_entropies_are_those_of_the_samples(made):
    rows, task = lines(made / "curriculum.jsonl"), load_task(TaskConfig(train_size=9, eval_size=4), seed=42)
    files = sorted((made / "samples").iterdir())
    assert [len(lines(file)) for file in files] == [4, 4, 1]
    sampled = [line for file in files for line in lines(file)]
    entropies = [semantic_entropy(one["logps"], one["clusters"]) for one in sampled]
    places = stages(entropies, 2)
    assert [row["question"] for row in rows] == [task.train[i]["question"] for part in places for i in part]
    assert [row["stage"] for row in rows] == [1] * 5 + [2] * 4
    assert [row["semantic_entropy"] for row in rows] == sorted(entropies) and sum(entropies) > 0
    for one in sampled:
        assert one["answers"] == [a if (a := text.rpartition(";")[2]).isdigit() else None for text in one["texts"]]
    summary = json.loads((made / "curriculum.json").read_text())
    assert [part["problems"] for part in summary["stages"]] == [5, 4]
    assert (made / "curriculum.png").read_bytes().startswith(b"\x89PNG")


def test_the_log_prob_of_an_answer_is_that_of_all_its_tokens_at_the_temperature(made):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path())
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path(), dtype="float32")
    one = lines(made / "samples" / "000000.jsonl")[1]
    prompt = load_task(TaskConfig(train_size=9, eval_size=4), seed=42).train[1]["prompt"]
    for text, logp, tokens, truncated in zip(
        one["texts"], one["logps"], one["tokens"], one["truncated"], strict=True
    ):
        start = tokenizer(prompt, return_tensors="pt")["input_ids"]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * (not truncated)
        assert len(ids) == tokens
        whole = torch.cat([start, torch.tensor([ids])], 1)
        with torch.no_grad():
            logps = (model(whole).logits[0, start.shape[1] - 1 : -1].double() / 1.5).log_softmax(-1)
        assert logp == pytest.approx(logps[range(len(ids)), ids].sum().item(), abs=1e-4)


def test_a_killed_one_goes_on_and_ends_with_equal_bits(made, tmp_path, monkeypatch, capsys):
    begin, drawn = curriculum.start, []

    def killed(*args, **kwargs):
        draw = begin(*args, **kwargs)

        def twice(problems, *more, **named):
            if len(drawn) == 2:
                raise KeyboardInterrupt
            drawn.append(problems["question"])
            return draw(problems, *more, **named)

        return twice

    monkeypatch.setattr(curriculum, "start", killed)
    assert make(tmp_path / "c") == 130
    assert not (tmp_path / "c" / "curriculum.jsonl").exists()
    monkeypatch.setattr(curriculum, "start", begin)
    assert make(tmp_path / "c") == 0
    assert "8 problems of 9 sampled already" in capsys.readouterr().out
    for name in (*FILES, *(f"samples/00000{i}.jsonl" for i in range(3))):
        assert (tmp_path / "c" / name).read_bytes() == (made / name).read_bytes(), name


def test_other_stages_are_made_of_the_samples_that_are_there(made, tmp_path, monkeypatch):
    assert make(tmp_path) == 0
    monkeypatch.setattr(curriculum, "start", lambda *_: pytest.fail("it samples"))
    assert make(tmp_path, stages=3, weight="count") == 0
    rows = lines(tmp_path / "curriculum.jsonl")
    assert [row["stage"] for row in rows] == [1] * 3 + [2] * 3 + [3] * 3
    counts = (0.0, 0.636514, 1.098612)  # of 3 samples: all alike, two, none
    assert all(min(abs(row["semantic_entropy"] - x) for x in counts) < 1e-6 for row in rows)


def test_files_of_others_are_left_alone(made, tmp_path, capsys):
    (tmp_path / "curriculum.jsonl").write_text("mine")
    assert make(tmp_path) == 2
    assert "hapo did not write it" in capsys.readouterr().err
    assert (tmp_path / "curriculum.jsonl").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1
    assert make(made, samples=2) == 2  # another curriculum
    assert "is made of other runs" in capsys.readouterr().err
    assert make(tmp_path, "--replace") == 0
    assert (tmp_path / "curriculum.jsonl").read_bytes() == (made / "curriculum.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 1}, "samples must be at least 2, for one answer differs from none, got 1"),
        ({"stages": 0}, "stages must be at least 1, got 0"),
        ({"stages": 10}, "9 problems cannot make 10 stages"),
        ({"problems": 0}, "problems must be at least 1, got 0"),
        ({"problems": 10}, "problems is 10, but addition has 9 training problems"),
        ({"temperature": 0.0}, "at temperature 0 all samples of a problem are the same"),
        ({"top_p": 0.9}, r"top_p=0.9, top_k=0: the entropy is one of the policy itself"),
        ({"curriculum": "x.jsonl"}, "curriculum is what this command makes"),
        ({"vllm_options": "{}"}, "vllm_options goes with --engine vllm"),
        ({"max_completion_length": 2, "temperature": 0.1}, "no sample of any problem gives an answer"),
    ],
)
def test_refusals(options, message, tmp_path, capsys):
    assert make(tmp_path / "c", **options) in (1, 2)
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_problems_without_any_answer(made, tmp_path, capsys):
    """Their samples are clusters of their own; or they are dropped, or refused."""
    rows = lines(made / "curriculum.jsonl")
    silent = [row for row in rows if row["no_answer"] == 3]
    words = f"{len(silent)} of 9 problems: no sample gives an answer (the first: "
    assert silent and all(row["clusters"] == 3 and row["semantic_entropy"] > 0 for row in silent)
    assert make(tmp_path) == 0
    assert words in (out := capsys.readouterr().out) and "each sample counts as an answer of its own" in out
    assert make(tmp_path, on_no_answer="drop") == 0
    assert f"{words}" in (out := capsys.readouterr().out) and "dropped" in out
    kept = lines(tmp_path / "curriculum.jsonl")
    assert [row["question"] for row in kept] == [row["question"] for row in rows if row not in silent]
    assert make(tmp_path, on_no_answer="raise") == 1
    assert f"{words}" in capsys.readouterr().err


def test_rows_in_stages(tmp_path, caplog):
    file = tmp_path / "c.jsonl"

    def write(*stages: object) -> str:
        rows = [{"question": q, "answer": "1", "stage": s} for q, s in zip("aab", stages, strict=True)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(file)

    data = [{"question": q, "answer": "1"} for q in "bacaa"]
    with caplog.at_level(logging.WARNING):
        found = in_stages(data, write(1, 2, 3))
    assert [(row["question"], row["stage"]) for row in found] == [("b", 3), ("a", 1), ("a", 2), ("a", 2)]
    assert "left out 1 of 5 training problems" in caplog.text
    for wrong in ("1", 1.0, None, True):
        with pytest.raises(ValueError, match="row 2: stage must be a whole number"):
            in_stages(data, write(1, wrong, 3))
    with pytest.raises(ValueError, match="has none of the 1 training problems"):
        in_stages([{"question": "z", "answer": "1"}], write(1, 2, 3))
    with pytest.raises(ValueError, match="have a column 'stage'"):
        in_stages([row | {"stage": 1} for row in data], write(1, 2, 3))
    file.write_text('{"question": "a", "stage": 1}\n')
    with pytest.raises(ValueError, match="a curriculum has the columns question, answer and stage"):
        in_stages(data, str(file))


SEEN = '''
import json, os

def watch(prompts, completions, question, stage, trainer_state=None, **columns):
    """Training alone knows the state."""
    if trainer_state is not None:
        with open(os.environ["SEEN"], "a") as out:
            print(json.dumps([trainer_state.global_step, question, stage]), file=out)
    return [0.0] * len(prompts)
'''


def test_training_takes_stage_after_stage_and_a_resumed_run_has_equal_bits(tmp_path, monkeypatch):
    """Stopped inside of the second rollout batch, of the first stage; with dynamic sampling."""
    rows = load_task(TaskConfig(train_size=32, eval_size=6), seed=42).train
    level = {row["question"]: 1 + (place % 2) for place, row in enumerate(rows)}
    staged = [
        {"question": row["question"], "answer": row["answer"], "stage": level[row["question"]]} for row in rows
    ]
    file = tmp_path / "curriculum.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in staged))
    (tmp_path / "watch.py").write_text(SEEN)
    options = {"curriculum": file, "max_steps": 8, "evaluate": False}
    seen = {}
    for name, act in (("whole", "0"), ("stopped", "1")):
        monkeypatch.setenv("ACT", act)
        monkeypatch.setenv("SEEN", str(tmp_path / f"{name}.jsonl"))
        words = train(tmp_path / name, **options)
        at = words.index("--rewards")
        words[at + 2 : at + 2] = [f"{tmp_path / 'watch.py'}:watch"]
        assert main(words) == (130 if act == "1" else 0)
        if act == "1":
            monkeypatch.setenv("ACT", "0")
            assert main(["train", "--resume", str(tmp_path / name)]) == 0
        seen[name] = [
            tuple(map(json.dumps, json.loads(x))) for x in (tmp_path / f"{name}.jsonl").read_text().splitlines()
        ]
    by_step = {json.loads(step): {*json.loads(stages)} for step, _, stages in seen["whole"]}
    assert by_step == {0: {1}, 2: {1}, 4: {2}, 6: {2}}
    assert set(seen["stopped"]) == set(seen["whole"])
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")
    assert (tmp_path / "stopped/model/model.safetensors").read_bytes() == (
        tmp_path / "whole/model/model.safetensors"
    ).read_bytes()
    assert any(len(json.loads(stages)) != 16 for _, _, stages in seen["whole"])  # fresh prompts, of their stage
    assert main(["train", "--resume", str(tmp_path / "whole"), "--max_steps", "12"]) == 2


def test_arms_of_a_comparison_may_differ_in_the_order_of_the_stages(made, tmp_path, capsys):
    recipe = Recipe({"use_cpu": True, "bf16": False, "activation_checkpointing": False}, [])
    for name in ("none", "-stage"):
        arm = Arm(f"grpo:stage_column={name}")
        assert parse_flags(recipe, arm.flags)[1].stage_column == name
    words = flags(
        train_size=9,
        eval_size=4,
        curriculum=made / "curriculum.jsonl",
        output_dir=tmp_path / "c",
        seeds=2,
        task_seed=42,
    )
    assert main(["compare", "--arms", "grpo", "trl:grpo", *words]) == 2
    assert "TRL's trainer takes prompts in no order of stages" in capsys.readouterr().err
