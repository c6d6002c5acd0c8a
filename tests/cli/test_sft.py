"""`hapo sft`: from demonstrations to a model, its records, a kill and what it goes on with; and what it refuses."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hapo.cli import main
from hapo.insight.run import Run
from hapo.trl import SupervisedTrainer
from tests.cli import small

OPTIONS = {
    "train_size": 40,
    "eval_size": 6,
    "per_device_train_batch_size": 8,
    "max_steps": 5,
    "save_steps": 3,
    "logging_steps": 2,
    "record_tokens_every": 2,
    "evaluate_every": 2,
    "max_completion_length": 8,
    "report": False,
}


def sft(folder: Path, **options) -> list[str]:
    return ["sft", *small.flags(**{**OPTIONS, "output_dir": folder, **options})]


def left(run: Path) -> tuple[list[dict], list[dict], str]:
    """What a run logged, without times, what it measured, and a hash of its weights."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    untimed = [
        {k: v for k, v in line.items() if not any(word in k for word in ("seconds", "runtime", "per_second"))}
        for line in lines
        if "loss" in line or "eval_loss" in line
    ]
    measured = [{k: v for k, v in m.items() if k not in ("seconds", "took")} for m in small.evaluations(run)]
    return untimed, measured, hashlib.sha256((run / "model/model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft") / "run"
    assert main(sft(folder)) == 0
    return folder


def test_a_run_measures_loss_and_accuracy_before_during_and_after(whole):
    run = Run(whole)
    losses = run.held_out_loss()
    assert losses["step"].tolist() == [0, 2, 4, 5]
    assert losses["eval_loss"].iloc[-1] < losses["eval_loss"].iloc[0]
    assert run.evaluations["how"].tolist() == ["greedy", "sampled"] * 4
    assert run.finished is not None and run.finished["steps"] == 5
    assert run.config["method"] == "ranktuner" and run.config["model_name_or_path"] == "tiny" and run.supervised
    assert "eos_token" not in run.config
    assert run.rollouts == [1, 2, 4] and run.tokens(4)["weight"].between(0, 1).all()
    assert run.tokens(1)["prompt"].str.fullmatch(r"\d{3}\+\d{3}=").all()


def test_the_model_card_says_what_the_model_learnt_and_where_its_weights_are(whole):
    card = ModelCard.load(whole / "README.md")
    loss = Run(whole).held_out_loss()["eval_loss"].iloc[-1]
    for fact in (
        "| base model | `tiny`, the small model that hapo brings |",
        "| training demonstrations | 40 |",
        f"| held-out loss | {loss:.4f} nats per target, after step 5 |",
        "| held out, greedy |",
        "method: ranktuner\n",
        "eprint = {2602.01745}",
        'from_pretrained("model")',
    ):
        assert fact in card.text
    assert "rewards" not in card.text and str(whole.parent) not in card.content


@pytest.mark.parametrize("at", [3, 4])
def test_a_killed_run_goes_on_with_equal_bits(at, whole, tmp_path, monkeypatch, capsys):
    """Killed within the step after a checkpoint, or later; the checkpoint lies between two lines of the log."""
    step = SupervisedTrainer.training_step

    def kill(trainer, *args, **kwargs):
        if trainer.state.global_step == at:
            raise RuntimeError("killed")
        return step(trainer, *args, **kwargs)

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(SupervisedTrainer, "training_step", kill)
        assert main(sft(folder)) == 1
    assert f"checkpoint-3 is saved; resume with: hapo sft --resume {folder}" in capsys.readouterr().err
    assert main(["sft", "--resume", str(folder)]) == 0
    assert left(folder) == left(whole)


def test_a_finished_run_says_so_and_is_prolonged(whole, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    assert main(["sft", "--resume", str(folder)]) == 0
    assert f"to prolong it: hapo sft --resume {folder} --max_steps 10" in capsys.readouterr().out
    assert main(["sft", "--resume", str(folder), "--max_steps", "6"]) == 0
    assert Run(folder).held_out_loss()["step"].tolist()[-1] == 6


def test_doctor_and_report_know_the_run(whole, tmp_path, capsys):
    assert main(["report", str(whole), "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "ranktuner on addition" in page and "held-out loss" in page and "Rank against expected rank" in page
    assert main(["doctor", str(whole), "--json"]) in (0, 3)
    assert "demonstrations_unfinished" not in capsys.readouterr().out


def test_text_alone_has_no_accuracy(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": f"{i}+{i}={2 * i}"}) + "\n" for i in range(10, 40)))
    options = {"dataset": file, "model": "tiny", "method": "dft", "train_size": 20, "use_cpu": True, "bf16": False}
    options["activation_checkpointing"] = False
    folder = tmp_path / "run"
    assert main(sft(folder, max_steps=1, **options)) == 0
    assert not (folder / "evaluations.jsonl").exists() and len(Run(folder).held_out_loss()) == 2


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ({"method": "hapo"}, 2, "method 'hapo' is a policy method: .*HAPOTrainer"),
        ({"method": "ranktunner"}, 2, "did you mean 'ranktuner'"),
        ({"mehtod": "sft"}, 2, "unknown flag --mehtod; did you mean --method"),
        ({"evaluate_every": 0}, 2, "evaluate_every must be at least 1, got 0"),
        ({"temperature": 0}, 2, "temperature must be positive"),
        ({"dataset": "reasoning_gym:chain_sum"}, 1, "has no demonstrations"),
        ({"run_records": False}, 2, "run_records cannot be off: `hapo sft`"),
        ({"record_tokens_rows": 0}, 2, "record_tokens_rows must be at least 1, got 0"),
        ({"config": "demo"}, 2, "demo: unknown option 'max_num_gen_batches'"),
    ],
)
def test_what_is_refused(options, code, message, tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(sft(folder, **options)) == code
    assert re.search(message, capsys.readouterr().err)
    assert not (folder / "config.yaml").exists()


def test_a_folder_of_another_run_is_refused(whole, tmp_path, capsys):
    assert main(sft(whole)) == 2
    assert f"go on with `hapo sft --resume {whole}`" in capsys.readouterr().err
    (tmp_path / "README.md").write_text("mine")
    assert main(sft(tmp_path)) == 2
    assert (
        "would write over README.md" in capsys.readouterr().err and (tmp_path / "README.md").read_text() == "mine"
    )
