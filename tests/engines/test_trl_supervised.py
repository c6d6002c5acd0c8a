"""SupervisedTrainer: TRL's own numbers where they are right, and what the core computes, however a batch is cut."""

import gc
import tempfile
from collections.abc import Iterator
from functools import cache

import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from trl import SFTConfig, SFTTrainer

import hapo
from hapo.adapters import record_gates
from hapo.insight.run import Run
from hapo.parts.rank import expected_rank, target_rank
from hapo.parts.reduce import sequence_mean
from hapo.trl import HAPOConfig, SupervisedConfig, SupervisedTrainer
from tests.engines import tiny
from tests.engines.supervised_run import CPU, TEXTS, data, run
from tests.two_ranks import LAYOUTS, SUPERVISED, gated, trl_pairs


@pytest.fixture(autouse=True, scope="module")
def _little_to_collect() -> Iterator[None]:
    """Every run of transformers' trainer collects garbage: most of its time, unless what is here already is left out."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def close(a, b, tolerance=1e-6):
    assert a.keys() == b.keys() and a
    assert max(x.abs().max() for x in a.values()) > 1e-3, "a gradient of zero shows nothing"
    for name, x in a.items():
        torch.testing.assert_close(x, b[name], rtol=0, atol=tolerance)


@cache
def core(method: str, **options):
    """Loss and gradient by plain logits of each text alone, over the targets of all."""
    net = tiny.model()
    rows = [tiny.tokenizer()(text + "<eos>")["input_ids"] for text in TEXTS]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
    logits = net(input_ids=ids, attention_mask=mask.long()).logits[:, :-1]
    targets, log_p = ids[:, 1:], logits.log_softmax(-1)
    batch = hapo.TokenBatch(
        mask=mask[:, 1:],
        logp=log_p.gather(-1, targets[..., None])[..., 0],
        entropy=-(log_p.exp() * log_p).sum(-1).detach(),
        rank=target_rank(logits.detach(), targets),
        expected_rank=expected_rank(logits.detach()),
    )
    loss = hapo.method(method, **options).loss(batch).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in net.named_parameters()}


@pytest.mark.parametrize(("ours", "theirs"), [pytest.param(*both, id=label) for label, *both in trl_pairs(rows=8)])
def test_sft_and_dft_are_trl_s_nll_and_dft(ours, theirs, tmp_path):
    loss, gradient, _ = run(tmp_path, **ours)
    loss_of_trl, gradient_of_trl, _ = run(tmp_path, **theirs)
    assert loss == pytest.approx(loss_of_trl, abs=1e-6)
    close(gradient, gradient_of_trl)


@pytest.mark.xdist_group("two_ranks")
@pytest.mark.parametrize("label", [label for label, *_ in trl_pairs(rows=4)])
def test_sft_and_dft_are_trl_s_on_two_ranks(label, two_ranks):
    """Loss and gradient; packed rows are no multiple of the ranks, and both trainers repeat the same ones."""
    close(*(load_file(two_ranks / f"{label}-{side}.safetensors") for side in ("ours", "trl")))


EXACT = {"estimator": "exact", "base_weight": 1}


@pytest.mark.parametrize(
    ("name", "options", "layout", "accumulation"),
    [
        ("sft", {}, "padded", 4),
        ("chord_phi", {}, "packed", 4),
        ("ranktuner", {}, "padding_free", 4),
        ("ranktuner", EXACT, "padded", 1),
        ("ranktuner", EXACT, "padded", 4),
        ("ranktuner", EXACT, "packed", 1),
        ("ranktuner", EXACT, "padding_free", 1),
    ],
)
def test_the_gradient_is_the_core_s_however_the_batch_is_cut(name, options, layout, accumulation, tmp_path):
    expected, gradient_of_core = core(name, **options)
    cut = {"rows": 8 // accumulation, "accumulation": accumulation, **LAYOUTS[layout]}
    loss, gradient, _ = run(tmp_path, method=name, method_options=options, **cut)
    assert loss == pytest.approx(expected, abs=1e-5)
    close(gradient, gradient_of_core, 2e-6)


@pytest.mark.xdist_group("two_ranks")
@pytest.mark.parametrize("name", ["sft", "ranktuner"])
def test_the_gradient_does_not_depend_on_the_ranks(name, two_ranks):
    options = SUPERVISED[name].get("method_options", {})
    close(load_file(two_ranks / f"{name}.safetensors"), core(name, **options)[1], 2e-6)


@pytest.mark.xdist_group("two_ranks")
def test_two_ranks_record_the_targets_that_one_does(two_ranks, tmp_path):
    """Each in a file of its own, with numbers that do not meet; the figures are of all targets of both."""
    run(tmp_path, **SUPERVISED["ranktuner"])
    alone, both = Run(tmp_path), Run(two_ranks / "supervised")
    files = sorted((both.folder / "tokens").iterdir())
    assert [file.name for file in files] == ["step-000001-0.parquet", "step-000001-1.parquet"]
    assert [set(pd.read_parquet(file)["response"]) for file in files] == [{0, 2, 4, 6}, {1, 3, 5, 7}]
    own, tokens = (some.tokens(1).astype({"text": str, "prompt": str}) for some in (alone, both))
    assert len(tokens) == len(own) == sum(map(len, TEXTS))  # the first token is none, the end is one
    by_text = [
        {"".join(row["text"]): row.drop(columns=["response", "group"]) for _, row in table.groupby("response")}
        for table in (own, tokens)
    ]
    assert by_text[0].keys() == by_text[1].keys() and len(by_text[0]) == len(TEXTS)
    for text, row in by_text[0].items():
        pd.testing.assert_frame_equal(
            row.reset_index(drop=True), by_text[1][text].reset_index(drop=True), rtol=0, atol=1e-5
        )
    for line in (alone.metrics.iloc[0], both.metrics.iloc[0]):
        assert line["weight"] == pytest.approx(own["weight"].mean(), abs=1e-5)
        assert line["num_tokens"] == len(own) + len(TEXTS)  # with the first ones
    assert both.manifest["processes"] == 2 and both.manifest["kind"] == "supervised"


def test_trl_s_nll_depends_on_the_split_where_a_model_takes_no_token_counts_and_ours_does_not(tmp_path):
    """`accepts_loss_kwargs = False`, as several models of transformers have it: TRL takes the mean of the means."""

    def net():
        made = tiny.model()
        made.accepts_loss_kwargs = False
        return made

    expected, gradient_of_core = core("sft")
    losses = {}
    for kind in (SFTTrainer, SupervisedTrainer):
        for accumulation in (1, 4):
            cut = {"rows": 8 // accumulation, "accumulation": accumulation}
            losses[kind, accumulation], gradient, _ = run(tmp_path, kind, net=net(), **cut)
            if kind is SupervisedTrainer:
                close(gradient, gradient_of_core, 2e-6)
    assert losses[SFTTrainer, 1] == pytest.approx(expected, abs=1e-5)
    assert abs(losses[SFTTrainer, 4] - expected) > 0.02  # of about 5 nats
    for accumulation in (1, 4):
        assert losses[SupervisedTrainer, accumulation] == pytest.approx(expected, abs=1e-5)


def test_completions_alone_metrics_and_evaluation_are_trl_s(tmp_path):
    figures = []
    for kind in (SFTTrainer, SupervisedTrainer):
        given = {"dataset": data("completion"), "eval_dataset": data("completion")}
        loss, gradient, trainer = run(tmp_path, kind, rows=2, accumulation=4, **given)
        figures.append((gradient, {"loss": loss, **trainer.state.log_history[0], **trainer.evaluate()}))
    (trls, theirs), (ours, mine) = figures
    close(ours, trls)
    for name in ("loss", "entropy", "mean_token_accuracy", "num_tokens", "eval_loss", "eval_entropy"):
        assert mine[name] == pytest.approx(theirs[name], abs=1e-6), name


def test_ranks_leave_the_metrics_of_trl_as_they_are_and_add_the_weight(tmp_path):
    _, _, plain = run(tmp_path, SFTTrainer)
    _, _, trainer = run(tmp_path, method="ranktuner", eval_dataset=data())
    theirs, mine = plain.state.log_history[0], {**trainer.state.log_history[0], **trainer.evaluate()}
    for name in ("entropy", "mean_token_accuracy", "num_tokens"):
        assert mine[name] == pytest.approx(theirs[name], abs=1e-6), name
    assert 0 < mine["weight"] < 1 and mine["eval_weight"] == pytest.approx(mine["weight"], abs=1e-6)


def test_adapters_are_trained_by_ranks(tmp_path):
    """A fresh LoRA changes nothing: the loss is the core's, and the adapters alone get a gradient."""
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    loss, gradient, _ = run(tmp_path, method="ranktuner", peft_config=lora)
    assert loss == pytest.approx(core("ranktuner")[0], abs=1e-5)
    assert all("lora" in name for name in gradient) and any(x.any() for x in gradient.values())


@cache
def whole_gates():
    """Log and gradient of a step over all texts at once, with the entropy of the gates in the loss."""
    folder = tempfile.mkdtemp()
    loss, gradient, trainer = run(folder, method="dft", net=gated(), eval_dataset=data())
    return loss, gradient, {**trainer.state.log_history[0], **trainer.evaluate()}


def test_the_entropy_of_gates_is_added_over_the_targets_of_the_step():
    """Against plain logits of each text alone; the evaluation logs it, and its loss is the method's."""
    net, loss, entropies, gates = gated(), [], [], []
    for text in TEXTS:
        ids = torch.tensor([tiny.tokenizer()(text + "<eos>")["input_ids"]])
        with record_gates(net) as found:
            log_p = net(input_ids=ids).logits[0, :-1].log_softmax(-1)
        logp = log_p.gather(-1, ids[0, 1:, None])[:, 0]
        loss.append(-logp.exp().detach() * logp)
        p = found.take()[0, :-1].sigmoid()
        entropies.append(-(p * p.log() + (1 - p) * (-p).log1p()))
        gates.append(p.detach())
    own, entropy, mean = (torch.cat(x).mean() for x in (loss, entropies, gates))
    (own + 0.5 * entropy).backward()
    logged_loss, gradient, log = whole_gates()
    close(gradient, {n: p.grad for n, p in net.named_parameters() if p.grad is not None}, 2e-6)
    assert log["gate_entropy"] == pytest.approx(entropy.item(), abs=1e-5)
    assert log["gate/mean"] == pytest.approx(mean.item(), abs=1e-5)
    assert log["gate/layer_01"] == pytest.approx(torch.cat(gates)[:, 5:].mean().item(), abs=1e-5)
    assert logged_loss == pytest.approx((own + 0.5 * entropy).item(), abs=1e-5)
    assert log["eval_loss"] == pytest.approx(own.item(), abs=1e-5)
    assert log["eval_gate_entropy"] == pytest.approx(entropy.item(), abs=1e-5)


@pytest.mark.parametrize(("layout", "accumulation"), [("padded", 4), ("packed", 4), ("padding_free", 1)])
def test_the_entropy_of_gates_does_not_depend_on_the_split(layout, accumulation, tmp_path):
    loss, gradient, log = whole_gates()
    cut = {"rows": 8 // accumulation, "accumulation": accumulation, **LAYOUTS[layout]}
    loss2, gradient2, trainer = run(tmp_path, method="dft", net=gated(), **cut)
    close(gradient2, gradient, 2e-6)
    assert loss2 == pytest.approx(loss, abs=1e-5)
    for name in ("gate_entropy", "gate/mean", "gate/layer_00", "weight"):
        assert trainer.state.log_history[0][name] == pytest.approx(log[name], abs=1e-5), name


@pytest.mark.xdist_group("two_ranks")
def test_the_entropy_of_gates_does_not_depend_on_the_ranks(two_ranks):
    close(load_file(two_ranks / "gates.safetensors"), whole_gates()[1], 2e-6)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # TRL's
def test_gates_that_checkpointing_cuts_off_are_refused(tmp_path):
    options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(RuntimeError, match="entropy_weight=0"):
        run(tmp_path, net=gated(), **options)
    kept = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
    _, gradient, _ = run(tmp_path, method="ranktuner", net=gated(), **kept)
    close(gradient, run(tmp_path, method="ranktuner", net=gated())[1])


@pytest.mark.parametrize("name", ["sft", "ranktuner"])
def test_a_batch_without_targets_has_loss_0(name, tmp_path):
    rows = {"input_ids": [[3, 4, 5]] * 4, "labels": [[-100] * 3] * 4}
    made = {"dataset": Dataset.from_dict(rows), "dataset_kwargs": {"skip_prepare_dataset": True}}
    loss, gradient, _ = run(tmp_path, method=name, rows=4, **made)
    assert loss == 0 and not any(x.any() for x in gradient.values())


def test_a_method_of_one_s_own_is_taken_as_an_object(tmp_path):
    half = hapo.method("sft").replace(name="half", weight=lambda batch: torch.full_like(batch.logp, 0.5))
    loss, _, _ = run(tmp_path, method_object=half)
    assert loss == pytest.approx(core("sft")[0] / 2, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "grpo"}, "method 'grpo' is a policy method: .*HAPOTrainer"),
        ({"method": "rantuner"}, "did you mean 'ranktuner'"),
        ({"method_options": "exact"}, "method_options must be a mapping"),
        ({"loss_type": "dft"}, 'the method decides the loss; choose method="dft"'),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 cannot be honoured"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices=False cannot be honoured"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SupervisedConfig("unused", **CPU, **options)


def test_loss_type_may_say_what_the_method_does(tmp_path):
    loss, _, trainer = run(tmp_path, method="dft", loss_type="dft")
    assert loss == pytest.approx(core("dft")[0], abs=1e-5) and trainer.method.name == "dft"


def test_what_a_trainer_cannot_take_is_refused():
    args = SupervisedConfig("unused", **CPU)
    with pytest.raises(TypeError, match="method must be a Supervised, got Method"):
        SupervisedTrainer(tiny.model(), args, method=hapo.method("grpo"))
    with pytest.raises(TypeError, match="args must be a SupervisedConfig, got SFTConfig"):
        SupervisedTrainer(tiny.model(), SFTConfig("unused", **CPU))
    with pytest.raises(ValueError, match="reduces by sequence_mean"):
        SupervisedTrainer(tiny.model(), args, method=hapo.method("sft").replace(reduce=sequence_mean))
    with pytest.raises(ValueError, match="compute_loss_func cannot be honoured"):
        SupervisedTrainer(tiny.model(), args, compute_loss_func=torch.nn.functional.mse_loss)


def test_the_policy_engine_refuses_a_supervised_method():
    with pytest.raises(ValueError, match="method 'ranktuner' is a supervised method: .*SupervisedTrainer"):
        HAPOConfig("unused", **CPU, method="ranktuner")
