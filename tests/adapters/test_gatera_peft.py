"""GateRA as PEFT drives it: wrap, save, load, switch, refuse."""

import inspect
import subprocess
import sys

import peft
import pytest
import torch
from peft import HiraConfig, PeftModel, convert_to_lora, get_peft_model
from torch import nn
from transformers import DynamicCache, LlamaForCausalLM, LlamaForSequenceClassification, Trainer, TrainingArguments

from hapo.adapters import GateRAConfig, add_gate_loss, record_gates
from hapo.adapters.layer import GatedLinear
from hapo.adapters.model import register
from tests.engines import tiny

IDS = torch.tensor([[0, 0, 5, 7, 9, 11], [4, 6, 8, 10, 12, 14]])
MASK = (IDS != 0).long()
LABELS = IDS.masked_fill(IDS == 0, -100)
BRANCHES = ("hira", "lora", "dora")


def adapted(branch="hira", net=None, seed=1, **options):
    net = tiny.model() if net is None else net
    torch.manual_seed(seed)
    options = {"r": 4, "task_type": "CAUSAL_LM", "gate_std": 0.5, "init_weights": False, **options}
    return get_peft_model(net, GateRAConfig(branch=branch, **options)).eval()


def logits(model, ids=IDS, mask=MASK, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **kwargs).logits


def gated_layers(model):
    return [m for m in model.modules() if isinstance(m, GatedLinear)]


def test_the_papers_modules_are_the_default():
    model = adapted()
    names = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, GatedLinear)}
    assert names == {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"} and len(gated_layers(model)) == 10
    with pytest.raises(ValueError, match="Sequential has no q_proj.*target_modules"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), GateRAConfig())


def test_with_open_gates_it_is_peft_s_hira():
    ours, theirs = (
        adapted(),
        get_peft_model(tiny.model(), HiraConfig(r=4, target_modules=["q_proj", "up_proj"])).eval(),
    )
    ours = adapted(target_modules=["q_proj", "up_proj"])
    state = ours.state_dict()
    theirs.load_state_dict({k.replace("gatera_", "hira_"): v for k, v in state.items() if "gate." not in k})
    for layer in gated_layers(ours):
        layer.gatera_gate["default"].weight.data.zero_()
        layer.gatera_gate["default"].bias.data.fill_(1000)
    assert torch.equal(logits(ours), logits(theirs))


LOAD = """
import sys, torch
from peft import PeftModel
from transformers import LlamaForCausalLM

folder = sys.argv[1]
expected, inputs = torch.load(folder + "/expected.pt")
base = folder + "/base"
try:
    PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), folder + "/hira")
    raise SystemExit("PEFT alone opened the adapter")
except KeyError as error:
    assert error.args == ("GATERA",)

from hapo.cli.adapted import know_adapter

know_adapter(base)
assert "hapo.adapters" not in sys.modules
know_adapter(folder + "/hira")  # what `hapo eval` does: import hapo.adapters

for branch, (logits, generated) in expected.items():
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), folder + "/" + branch)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits)
    assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False), generated)
"""


def test_save_and_load_in_a_new_process(tmp_path):
    tiny.model().save_pretrained(tmp_path / "base")
    expected, inputs = {}, {"input_ids": IDS, "attention_mask": MASK}
    for branch in BRANCHES:
        model = adapted(branch, rank_pattern={"q_proj": 2}, modules_to_save=["norm"])
        model.base_model.model.model.norm.modules_to_save["default"].weight.data.mul_(1.1)
        model.save_pretrained(tmp_path / branch)
        expected[branch] = logits(model), model.generate(**inputs, max_new_tokens=5, do_sample=False)
    torch.save((expected, inputs), tmp_path / "expected.pt")
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(("dtype", "low_cpu_mem_usage"), [(torch.bfloat16, False), (torch.float32, True)])
def test_loading_keeps_every_bit(dtype, low_cpu_mem_usage, tmp_path):
    model = adapted("dora", tiny.model().to(dtype))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    for p in model.parameters():
        if p.requires_grad:  # values that bf16 has not
            p.data += 1e-4 * torch.randn_like(p)
    found = logits(model)
    assert found.dtype == dtype and found.isfinite().all()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.model().to(dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(again), found)


def test_an_untouched_adapter_changes_nothing_in_bf16_either():
    base = logits(tiny.model().bfloat16())
    for branch in BRANCHES:
        assert torch.equal(logits(adapted(branch, tiny.model().bfloat16(), init_weights=True)), base)


@pytest.mark.parametrize("branch", BRANCHES)
def test_a_cache_changes_nothing(branch):
    """Gates act in prefill and in decoding, token by token."""
    model = adapted(branch)
    whole = logits(model)
    cache = DynamicCache(config=model.config)
    name = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
    parts = []
    for columns in [slice(0, 3), *(slice(t, t + 1) for t in range(3, IDS.shape[1]))]:
        options = {name: cache, "use_cache": True}
        parts.append(logits(model, IDS[:, columns], MASK[:, : columns.stop], **options))
    shown = MASK.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[shown], whole[shown], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(whole[shown], logits(tiny.model().eval())[shown], atol=0.1)


def test_several_adapters():
    model = adapted()
    first = logits(model)
    torch.manual_seed(5)
    model.add_adapter("other", GateRAConfig(r=2, branch="lora", init_weights=False, target_modules=["q_proj"]))
    assert torch.equal(logits(model), first)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".other" in n)
    model.set_adapter("other")
    second = logits(model)
    assert not torch.equal(second, first)
    assert all(p.requires_grad == (".other" in n) for n, p in model.named_parameters())
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny.model().eval()))
    model.base_model.set_adapter(["default", "other"])
    with torch.no_grad(), record_gates(model) as gates:
        both = logits(model)
    assert not torch.equal(both, first) and not torch.equal(both, second)
    assert gates.take().shape == (*IDS.shape, 12)
    assert [n for n in gates.names if n.endswith("/other")] == [
        f"model.layers.{i}.self_attn.q_proj/other" for i in (0, 1)
    ]
    with pytest.raises(ValueError, match="set_adapter, not adapter_names"):
        logits(model, adapter_names=["default", "other"])
    model.base_model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(logits(model), first) and set(model.peft_config) == {"default"}
    assert torch.equal(logits(model.unload()), logits(tiny.model().eval()))


def test_tied_embeddings():
    model = adapted(net=tiny.model(tie_word_embeddings=True))
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is embedding.weight and not head.weight.requires_grad
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model = adapted(net=tiny.model(tie_word_embeddings=True), target_modules=["lm_head"])
    logits(model)
    assert model.base_model.model.lm_head.weight is model.get_input_embeddings().weight


def test_what_depends_on_the_token_cannot_be_merged():
    model = adapted()
    before = logits(model)
    for merge in (model.merge_and_unload, model.merge_adapter, gated_layers(model)[0].merge):
        with pytest.raises(ValueError, match="cannot be merged.*depend on the token"):
            merge()
    assert not model.supports_lora_conversion()
    with pytest.raises(TypeError, match="cannot be converted to LoRA"):
        convert_to_lora(model, rank=4)
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)


class Linear4bit(nn.Linear):
    """As bitsandbytes' layer is: a linear layer whose weight is of integers."""

    def __init__(self):
        super().__init__(2, 2)
        self.weight = nn.Parameter(torch.zeros(2, 1, dtype=torch.uint8), requires_grad=False)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Linear4bit(), "does not adapt quantised layers .*Linear4bit"),
        (nn.Embedding(3, 2), "linear layers, not Embedding"),
        (nn.Conv1d(2, 2, 1), "linear layers, not Conv1d"),
    ],
)
def test_other_layers_are_refused(layer, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(nn.Sequential(layer), GateRAConfig(target_modules=["0"]))


@pytest.mark.parametrize(
    "options",
    [{"r": 0}, {"branch": "ia3"}, {"lora_alpha": 8}, {"dropout": 1.0}, {"gate_std": -1}, {"entropy_weight": -0.1}],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        GateRAConfig(**options)


def test_another_release_of_peft_is_refused(monkeypatch):
    monkeypatch.setattr(peft, "__version__", "0.22.0")
    with pytest.raises(ImportError, match=r'refuses 0.22.0.*pip install "peft==0.21'):
        register()


# -- the loss of the gates -----------------------------------------------------------------------------------


def double(**config):
    """A tiny Llama that computes in float64 throughout; its own norms go through float32."""
    net = tiny.model(**config).double()
    for name in [name for name, _ in net.named_modules() if name.endswith("norm")]:
        net.set_submodule(name, nn.RMSNorm(32, eps=1e-6, dtype=torch.float64))
    return net


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def losses(model, ids=IDS, mask=MASK, tokens=None):
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with record_gates(model) as gates:
        output = model(input_ids=ids, attention_mask=mask, position_ids=positions)
    share = output.logits.double()[mask.bool()].square().sum() / (tokens or mask.sum())
    return share + gates.entropy(mask.bool(), tokens)


def assert_equal_gradients(found, expected, tolerance=1e-10):
    assert found.keys() == expected.keys() and len(found) > 30
    assert any("gatera_gate" in n and g.abs().max() > 1e-4 for n, g in expected.items())
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, atol=tolerance, rtol=tolerance, msg=name)


@pytest.mark.parametrize("branch", BRANCHES)
def test_gradients_do_not_change_with_the_split_the_padding_or_checkpointing(branch):
    model = adapted(branch, double())
    expected = gradients(model, losses(model))
    tokens = int(MASK.sum())
    parts = [losses(model, IDS[:1, 2:], MASK[:1, 2:], tokens), losses(model, IDS[1:], MASK[1:], tokens)]
    assert_equal_gradients(gradients(model, sum(parts)), expected)
    model.train()
    model.activation_checkpointing_enable()
    assert_equal_gradients(gradients(model, losses(model)), expected)


def test_the_gates_loss_is_that_of_finite_differences():
    """Through all the layers below a gate, with nothing detached."""
    model = adapted(net=double())
    expected = gradients(model, losses(model))
    generator = torch.Generator().manual_seed(3)
    direction = {n: torch.randn(g.shape, generator=generator, dtype=g.dtype) for n, g in expected.items()}
    slope = sum((expected[n] * d).sum() for n, d in direction.items())
    values, step = [], 1e-5
    for sign in (1, -2):
        with torch.no_grad():
            for n, p in model.named_parameters():
                p += sign * step * direction.get(n, 0)
            values.append(losses(model))
    assert float((values[0] - values[1]) / (2 * step)) == pytest.approx(float(slope), rel=1e-7)


def test_reentrant_checkpointing_trains_and_its_gate_loss_is_refused():
    model = adapted(net=double())

    def task(model):
        return model(input_ids=IDS, attention_mask=MASK).logits[MASK.bool()].square().mean()

    expected = gradients(model, task(model))
    model.train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    assert_equal_gradients(gradients(model, task(model)), expected)
    with pytest.raises(RuntimeError, match='"use_reentrant": False'):
        losses(model)
    assert all(layer.record is None for layer in gated_layers(model))


def test_what_cannot_be_recorded_is_said():
    model = adapted()
    with record_gates(model) as gates:
        logits(model)
        with pytest.raises(RuntimeError, match="model.layers.0.self_attn.q_proj ran twice"):
            logits(model)
    with record_gates(model) as gates, model.disable_adapter():
        logits(model)
    with pytest.raises(RuntimeError, match="no gate was read"):
        gates.take()
    net = get_peft_model(
        nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}), GateRAConfig(target_modules=["a", "b"])
    )
    with record_gates(net) as gates:
        net.base_model.model["a"](torch.zeros(3, 2)), net.base_model.model["b"](torch.zeros(1, 2))
    with pytest.raises(RuntimeError, match="different arrangements"):
        gates.take()


class Rows(torch.utils.data.Dataset):
    """Sequences of different lengths."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        g = torch.Generator().manual_seed(i)
        ids = torch.randint(2, 20, (3 + i,), generator=g)
        pad = torch.zeros(10 - len(ids), dtype=torch.long)
        mask = torch.cat([torch.ones_like(ids), pad])
        labels = torch.cat([ids, pad - 100])
        return {"input_ids": torch.cat([ids, pad]), "attention_mask": mask, "labels": labels}


def trainer_gradients(folder, size, weight, compute_loss_func=None, **options):
    model = adapted(net=double(), entropy_weight=weight)
    add_gate_loss(model)
    args = TrainingArguments(
        str(folder), max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, use_cpu=True,
        report_to="none", save_strategy="no", max_grad_norm=0, learning_rate=0.0, disable_tqdm=True,
        dataloader_pin_memory=False, label_names=["labels"], **options,
    )  # fmt: skip
    found = {}

    class Keep(Trainer):
        def create_optimizer(self, *a, **k):
            optimizer = super().create_optimizer(*a, **k)
            optimizer.register_step_pre_hook(
                lambda *_: found.update(
                    {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
                )
            )
            return optimizer

    Keep(model, args, train_dataset=Rows(), compute_loss_func=compute_loss_func).train()
    return found


def test_one_line_gives_a_plain_trainer_the_loss(tmp_path):
    without, whole = (trainer_gradients(tmp_path, 8, weight) for weight in (0.0, 0.7))
    split = trainer_gradients(tmp_path, 2, 0.7)
    checkpointed = trainer_gradients(tmp_path, 2, 0.7, activation_checkpointing=True)
    assert_equal_gradients(split, whole, 1e-6)  # the model's own loss is float32
    assert_equal_gradients(checkpointed, whole, 1e-6)
    model = adapted(net=double())
    batch = {k: torch.stack([row[k] for row in map(Rows().__getitem__, range(8))]) for k in Rows()[0]}
    with record_gates(model) as gates:
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    predicts = torch.nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1))
    own = gradients(model, 0.7 * gates.entropy(predicts))
    added = {n: whole[n] - without[n] for n in whole}
    assert_equal_gradients({n: added[n] for n in own}, own, 1e-6)


@pytest.mark.parametrize("how", ["smoothed", "own"])
def test_a_trainer_that_takes_the_labels_away_is_refused(tmp_path, how):
    options = (
        {"label_smoothing_factor": 0.1} if how == "smoothed" else {"compute_loss_func": lambda o, *_: o[0].sum()}
    )
    with pytest.raises(ValueError, match="no labels reach the model"):
        trainer_gradients(tmp_path, 8, 0.7, **options)


def test_the_added_loss_is_for_training_with_labels_of_tokens():
    model = adapted()
    add_gate_loss(model)
    inputs = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}
    plain = model(**inputs).loss
    assert model.train()(**inputs).loss > plain
    assert model(**inputs, return_dict=False)[0] > plain
    with torch.no_grad():
        assert "loss" not in model(input_ids=IDS)
    with pytest.raises(ValueError, match="SFTTrainer makes its loss itself"):
        model(**inputs, fused_lm_head=True)
    classifier = adapted(net=LlamaForSequenceClassification(tiny.model().config), task_type="SEQ_CLS").train()
    add_gate_loss(classifier)
    with pytest.raises(ValueError, match="labels of tokens are needed"):
        classifier(input_ids=IDS, attention_mask=MASK, labels=torch.tensor([0, 1]))
    model.active_peft_config.entropy_weight = 0.0
    assert torch.equal(model(**inputs).loss, plain)
