"""GateRA's spec: the worked example, its checks, and the entropy of the gates."""

import math

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from hapo.adapters import GateRAConfig, gate_entropy, record_gates
from hapo.adapters.layer import gated_linear

BRANCHES = {"hira": {}, "lora": {"lora_alpha": 2}, "dora": {"lora_alpha": 2}}
X = torch.tensor([[1, 2], [-1, 0.5], [0, 0]], dtype=torch.float64)
VALID = torch.tensor([True, True, False])


class Net(nn.Module):
    def __init__(self, lin):
        super().__init__()
        self.lin = lin

    def forward(self, x):
        return self.lin(x)


def adapted(branch, lin=None, **options):
    """A net of the worked example's layer, and that layer."""
    if lin is None:
        lin = nn.Linear(2, 3, bias=False, dtype=torch.float64)
        lin.weight.data = torch.tensor([[0.5, -1], [2, 0.25], [1, 1]], dtype=torch.float64)
    options = {**BRANCHES[branch], **options}
    net = get_peft_model(Net(lin), GateRAConfig(r=1, branch=branch, target_modules=["lin"], **options))
    return net, net.base_model.model.lin


def fill(layer):
    """Put the worked example's adapter in."""
    gate = layer.gatera_gate["default"]
    for parameter, values in (
        (layer.gatera_A["default"], [[0.3, -0.2]]),
        (layer.gatera_B["default"], [[1], [-0.5], [0.4]]),
        (gate.weight, [[0.8, -0.6]]),
        (gate.bias, [0.1]),
    ):
        parameter.data = torch.tensor(values, dtype=torch.float64)


def approx(values):
    return pytest.approx(values, abs=1e-6)


@pytest.mark.parametrize(
    ("branch", "first", "second"),
    [
        ("hira", [-1.265943, 2.393611, 2.982978], [-1.013447, -1.790956, -0.543031]),
        ("lora", [-1.585111, 2.542556, 2.965955], [-1.215153, -1.767423, -0.586061]),
        ("dora", [-1.315953, 2.704264, 2.896663], [-1.035046, -1.825400, -0.573764]),
    ],
)
def test_worked_example(branch, first, second):
    net, layer = adapted(branch)
    assert torch.equal(net(X), layer.base_layer(X)), "B = 0 changes nothing, whatever the gate"
    fill(layer)
    with record_gates(net) as gates:
        y = net(X)
    z = gates.take()
    assert y[0].tolist() == approx(first) and y[1].tolist() == approx(second)
    assert torch.sigmoid(z).flatten().tolist() == approx([0.425557, 0.268941, 0.524979])
    entropies = [gate_entropy(z[i : i + 1], VALID[:1]).item() for i in range(3)]
    assert entropies == approx([0.682022, 0.582203, 0.691899])
    loss = gate_entropy(z, VALID)
    assert loss.item() == approx(0.632113)
    (slope,) = torch.autograd.grad(loss, z)
    assert slope.flatten().tolist() == approx([0.036669, 0.098306, 0])


def test_gradient_of_the_update_stays_under_its_bound():
    """dL/dP = g (delta x^T) * W0, seen through A = identity, so that P is B."""
    net, layer = adapted("hira")
    fill(layer)
    layer.gatera_B["default"].data = torch.zeros(3, 2, dtype=torch.float64)
    layer.gatera_A["default"].data = torch.eye(2, dtype=torch.float64)
    delta = torch.tensor([1, -2, 0.5], dtype=torch.float64)
    (net(X[0]) @ delta).backward()
    grad = layer.gatera_B["default"].grad
    assert grad.tolist() == [
        approx(row) for row in ([0.212779, -0.851115], [-1.702230, -0.425557], [0.212779, 0.425557])
    ]
    gate = torch.sigmoid(torch.tensor(0.8 - 1.2 + 0.1, dtype=torch.float64))
    bound = float(gate * layer.weight.abs().max() * delta.norm() * X[0].norm())
    assert float(grad.norm()) == approx(2.018596) and bound == approx(4.360667)


@pytest.mark.parametrize("branch", BRANCHES)
def test_outputs_are_affine_in_the_gate_between_base_and_ungated(branch):
    net, layer = adapted(branch)
    fill(layer)
    gate = layer.gatera_gate["default"]
    gate.weight.data.zero_()

    def at(g):
        gate.bias.data.fill_(math.log(g / (1 - g)) if 0 < g < 1 else math.copysign(1000, g - 0.5))
        return net(X).detach()

    p, s, w = layer.gatera_B["default"] @ layer.gatera_A["default"], 2, layer.weight
    dora = w.norm(dim=1, keepdim=True) / (w + s * p).norm(dim=1, keepdim=True) * (w + s * p)
    ungated = {"hira": w + p * w, "lora": w + s * p, "dora": dora}[branch]
    torch.testing.assert_close(at(1), X @ ungated.T.detach())
    assert torch.equal(at(0), X @ w.T)
    torch.testing.assert_close(at(0.3), 0.7 * at(0) + 0.3 * at(1))


@pytest.mark.parametrize("branch", BRANCHES)
def test_gradients_are_those_of_finite_differences(branch):
    """Task and gate loss, of all parameters but where a row norm, which is detached, moves."""
    torch.manual_seed(0)
    lin = nn.Linear(3, 4, dtype=torch.float64)
    net, layer = adapted(branch, lin, init_weights=False)
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 5) < 0.7
    norms = layer._row_norms("default") if branch == "dora" else None
    if norms is not None:
        layer._row_norms = lambda _: norms
    parameters = [p for p in net.parameters() if p.requires_grad]
    assert len(parameters) == (5 if branch == "dora" else 4)

    def loss(x, *values):
        named = dict(zip((n for n, p in net.named_parameters() if p.requires_grad), values, strict=True))
        with record_gates(net) as gates:
            y = torch.func.functional_call(net, named, x)
        return y.square().sum() + gates.entropy(mask)

    assert torch.autograd.gradcheck(loss, (x, *parameters))


def test_equal_tokens_get_equal_outputs_whatever_stands_beside_them():
    net, layer = adapted("hira")
    fill(layer)
    other = torch.cat([torch.randn(4, 2, dtype=torch.float64), X[:1]])
    assert net(other)[-1].tolist() == approx(net(X)[0].tolist())


def test_bias_and_transposed_weights():
    torch.manual_seed(0)
    plain, turned = nn.Linear(2, 3, dtype=torch.float64), Conv1D(3, 2).double()
    turned.weight.data, turned.bias.data = plain.weight.data.T.clone(), plain.bias.data
    for branch in BRANCHES:
        outputs = []
        for lin in (plain, turned):
            net, layer = adapted(branch, lin)
            fill(layer)
            outputs.append(net(X))
        torch.testing.assert_close(*outputs)


def test_dropout_leaves_the_gate_alone():
    torch.manual_seed(0)
    for branch in BRANCHES:
        net, layer = adapted(branch, dropout=0.5)
        fill(layer)
        with record_gates(net) as gates:
            noisy = net.train()(X)
        z = gates.take()
        with record_gates(net) as gates:
            net.eval()(X)
        assert torch.equal(z, gates.take())
        assert not torch.equal(noisy, net(X))


# -- the entropy ---------------------------------------------------------------------------------------------


def test_entropy_lies_between_zero_and_ln_2():
    z = torch.linspace(-30, 30, 61, dtype=torch.float64).unsqueeze(1).requires_grad_()
    one = torch.ones(1, dtype=torch.bool)
    values = torch.stack([gate_entropy(row, one[0]) for row in z])
    assert values.min() > 0 and values[30] == values.max() and values[30].item() == approx(math.log(2))
    g = torch.sigmoid(z.detach()[20:41]).flatten()
    torch.testing.assert_close(values.detach()[20:41], -g * g.log() - (1 - g) * (1 - g).log())
    (slope,) = torch.autograd.grad(values.sum(), z)
    assert torch.equal(slope.sign(), -z.detach().sign())


@pytest.mark.parametrize("far", [1000.0, math.inf])
def test_saturated_gates_are_finite(far):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        z = torch.tensor([[far], [-far]], dtype=dtype, requires_grad=True)
        loss = gate_entropy(z, torch.tensor([True, True]))
        loss.backward()
        assert loss.item() == 0 and z.grad.tolist() == [[0], [0]]


def test_padding_changes_nothing_and_gets_no_gradient():
    torch.manual_seed(0)
    z = torch.randn(2, 4, 3, dtype=torch.float64)
    mask = torch.tensor([[True, True, False, False], [True, False, False, False]])
    garbage = z.clone()
    garbage[~mask] = torch.tensor([math.nan, math.inf, -math.inf], dtype=torch.float64)
    garbage.requires_grad_()
    loss = gate_entropy(garbage, mask)
    assert torch.equal(loss, gate_entropy(z, mask))
    loss.backward()
    assert not garbage.grad[~mask].any() and garbage.grad[mask].all()


def test_an_empty_mask_gives_zero():
    z = torch.randn(2, 3, requires_grad=True)
    for tokens in (None, 0, 5):
        loss = gate_entropy(z, torch.zeros(2, dtype=torch.bool), tokens)
        loss.backward()
        assert loss.item() == 0 and not z.grad.any()


def test_shares_of_a_step_add_up_to_its_mean():
    torch.manual_seed(0)
    z, mask = torch.randn(6, 4, 3, dtype=torch.float64), torch.rand(6, 4) < 0.5
    tokens = int(mask.sum())
    shares = [gate_entropy(z[i : i + 2], mask[i : i + 2], tokens) for i in (0, 2, 4)]
    torch.testing.assert_close(sum(shares), gate_entropy(z, mask))


# -- the paper's figures -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "with_gates", "without"),
    [
        ({"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}, 0.7123, 0.7002),
        ({"intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000}, 0.8384, 0.8256),
    ],
    ids=["LLaMA-3-8B", "LLaMA-2-7B"],
)
def test_share_of_trained_parameters(sizes, with_gates, without):
    heads = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**heads, **sizes, tie_word_embeddings=False))
    model = get_peft_model(model, GateRAConfig())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    gates = sum(p.numel() for name, p in model.named_parameters() if "gatera_gate" in name)
    assert round(100 * trained / total, 4) == with_gates
    assert round(100 * (trained - gates) / (total - gates), 4) == without


def test_the_gated_product_is_that_of_plain_autograd():
    torch.manual_seed(0)
    x, w, g = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 4), (5, 4), (2, 3, 1)))
    torch.testing.assert_close(gated_linear(x, w, g), g * (x @ w.T))
    assert torch.autograd.gradcheck(gated_linear, (x, w, g))
    assert torch.autograd.gradgradcheck(gated_linear, (x, w, g))
    for part in (x, w, g):  # and where one of them alone has a gradient
        inputs = [p if p is part else p.detach() for p in (x, w, g)]
        (found,) = torch.autograd.grad(gated_linear(*inputs).square().sum(), part)
        (plain,) = torch.autograd.grad((inputs[2] * (inputs[0] @ inputs[1].T)).square().sum(), part)
        torch.testing.assert_close(found, plain)


def test_autocast_leaves_the_gate_in_float32():
    for branch in BRANCHES:
        torch.manual_seed(0)
        net, _ = adapted(branch, nn.Linear(64, 64), init_weights=False)
        x = torch.randn(8, 64)
        with record_gates(net) as gates:
            plain = net(x)
        z = gates.take()
        with torch.autocast("cpu", torch.bfloat16), record_gates(net) as gates:
            y = net(x)
        assert torch.equal(gates.take(), z)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), plain, atol=0.1, rtol=0.05)
        y.float().square().sum().backward()
        assert all(p.grad.isfinite().all() and p.grad.any() for p in net.parameters() if p.requires_grad)
