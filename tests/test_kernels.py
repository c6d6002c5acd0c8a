"""Where the Triton kernels act, and that a first use is compared; what they compute is tested in tests/vllm and
tests/gpu."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from hapo import head, kernels
from hapo.kernels import plain
from hapo.scoring import score_hidden

N, V = 9, 50


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """As in a new process, without HAPO_TRITON."""
    monkeypatch.delenv("HAPO_TRITON", raising=False)
    monkeypatch.setattr(kernels, "_compared", set())
    for cached in (kernels._wanted, kernels._installed):
        cached.cache_clear()
    yield
    for cached in (kernels._wanted, kernels._installed):
        cached.cache_clear()


def tensor_on(device: str, dtype: torch.dtype = torch.float32) -> SimpleNamespace:
    return SimpleNamespace(is_cuda=device == "cuda", element_size=torch.empty(0, dtype=dtype).element_size)


@pytest.mark.parametrize(
    ("device", "dtype", "environment", "use"),
    [
        ("cuda", torch.float32, None, False),
        ("cuda", torch.float32, "0", False),
        ("cuda", torch.float32, "1", True),
        ("cuda", torch.bfloat16, "1", True),
        ("cuda", torch.float64, "1", False),
        ("cpu", torch.float32, "1", False),
    ],
)
def test_kernels_act_on_cuda_where_they_are_asked_for(monkeypatch, device, dtype, environment, use):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    if environment is not None:
        monkeypatch.setenv("HAPO_TRITON", environment)
    assert kernels.use_triton(tensor_on(device, dtype)) is use


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("value", ["", "true", "2"])
def test_another_value_is_refused(monkeypatch, value, device):
    monkeypatch.setenv("HAPO_TRITON", value)
    with pytest.raises(ValueError, match=f"HAPO_TRITON is '{value}': set it to 1 .* to 0 or not at all for torch"):
        kernels.use_triton(tensor_on(device))


def test_kernels_that_are_asked_for_and_missing_are_no_silent_torch(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert kernels.use_triton(tensor_on("cuda")) is False
    kernels._wanted.cache_clear()
    monkeypatch.setenv("HAPO_TRITON", "1")
    assert kernels.use_triton(tensor_on("cpu")) is False
    with pytest.raises(ImportError, match="triton is not installed: install it .*unset HAPO_TRITON"):
        kernels.use_triton(tensor_on("cuda"))


def kernel(change=lambda x: x, dtype=torch.float32, zero=False):
    """A stand-in kernel that doubles a matrix in place and changes the result; and how often torch was asked."""
    start = torch.linspace(-3, 7, N * V).reshape(N, V).to(dtype) * (not zero)
    x, asked = start.clone(), []

    def launch():
        x.copy_(change(2 * x))

    def expected(few):
        asked.append(len(x[few]))
        assert few.stop - 1 in range(N)[few]  # the last row is among them
        return (2 * x[few].float(),)

    def use():
        x.copy_(start)
        kernels.checked("stand-in", launch, lambda few: (x[few],), expected, N, x)

    return use, asked, x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_right_kernel_is_compared_once(dtype):
    use, asked, x = kernel(dtype=dtype)
    before = x.clone()
    state = torch.get_rng_state()
    use()
    use()
    assert asked == [3] and torch.equal(x, 2 * before)
    assert torch.equal(torch.get_rng_state(), state)


def test_each_form_of_a_kernel_is_compared():
    for dtype in (torch.float32, torch.bfloat16):
        use, asked, _ = kernel(dtype=dtype)
        use()
        assert asked
    wrong, _, _ = kernel(lambda x: x + 1)
    wrong()  # the same form as the first, which was right
    other = torch.zeros(N, V + 1)
    with pytest.raises(RuntimeError, match="51 tokens"):
        kernels.checked("stand-in", int, lambda few: (other[few],), lambda few: (1 + other[few],), N, other)


def spoil_the_last_row(x):
    x[-1] = 9
    return x


def nan(x):
    x[-1, 3] = torch.nan
    return x


@pytest.mark.parametrize("change", [lambda x: 1.001 * x, lambda x: x.roll(1, 1), spoil_the_last_row, nan])
def test_a_wrong_kernel_stops_the_run_each_time(change):
    use, asked, _ = kernel(change)
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match="'stand-in' differs from torch by up to .* on cpu .*unset HAPO_TRITON"
        ):
            use()
    assert len(asked) == 2


def test_the_largest_difference_is_named():
    use, _, _ = kernel(lambda x: x + 0.25)
    with pytest.raises(RuntimeError, match="by up to 0.25 on cpu"):
        use()


def test_zeros_show_nothing():
    use, asked, _ = kernel(zero=True)
    use()
    use()
    assert len(asked) == 2


def test_no_rows_launch_nothing():
    kernels.checked("stand-in", pytest.fail, pytest.fail, pytest.fail, 0, torch.zeros(0, V))


def test_masked_vocabulary_and_nan_agree_where_they_stand():
    x = torch.tensor([[0.0, -torch.inf, 1.0], [torch.nan, 2.0, 3.0]])
    kernels.checked("stand-in", int, lambda few: (x[few],), lambda few: (x[few].clone(),), 2, x)
    y = x.clone()
    y[0, 1] = -1e30
    with pytest.raises(RuntimeError, match="by up to inf"):
        kernels.checked("stand-in", int, lambda few: (y[few],), lambda few: (x[few],), 2, x, "other")


def test_half_precision_gradients_near_zero_may_be_rounded_to_zero():
    want = torch.full((2, 3), 2e-8)
    out = torch.zeros(2, 3, dtype=torch.float16)
    kernels.checked("stand-in", int, lambda few: (out[few],), lambda few: (want[few],), 2, want)


# The scoring path of the kernels, with stand-ins in torch.


def scored(softcap=None):
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=g).requires_grad_() for shape in ((N, 8), (V, 8), (V,))]
    tokens = torch.randint(0, V, (N,), generator=g)
    found = score_hidden(
        leaves[0], leaves[1], tokens, bias=leaves[2], t_base=0.7, factor=lambda h: 1 + 0.1 * h, chunk_tokens=4,
        softcap=softcap,
    )  # fmt: skip
    (found.logp.sum() + 0.3 * found.entropy.square().sum()).backward()
    return [found.logp, found.entropy, found.sampler_logp, *(x.grad for x in leaves)]


def stand_ins(monkeypatch, scores=lambda x: x, gradient=lambda x: x):
    """`hapo.kernels.plain` where the kernels would be, changed; each use compared with it unchanged."""

    def checked_scores(logits, tokens, scale=None):
        out = torch.empty(3, len(logits))
        kernels.checked(
            "scores", lambda: out.copy_(scores(torch.stack(plain.scores(logits, tokens, scale)))),
            lambda few: tuple(out[:, few]),
            lambda few: plain.scores(logits[few], tokens[few], None if scale is None else scale[few]),
            len(logits), logits, scale is not None,
        )  # fmt: skip
        return tuple(out)

    def checked_gradient(logits, tokens, normaliser, entropy, a, b, out):
        args = (logits, tokens, normaliser, entropy, a, b)
        kernels.checked(
            "gradient", lambda: out.copy_(gradient(plain.gradient(*args))), lambda few: (out[few],),
            lambda few: (plain.gradient(*(x[few] for x in args)),), len(logits), logits,
        )  # fmt: skip

    module = SimpleNamespace(scores=checked_scores, gradient=checked_gradient)
    monkeypatch.setattr(head, "_kernels", lambda like: module)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_kernels_path_of_scoring_computes_what_torch_does(monkeypatch, softcap):
    """And so `plain` is the torch path, to rounding."""
    want = scored(softcap)
    stand_ins(monkeypatch)
    for found, x in zip(scored(softcap), want, strict=True):
        torch.testing.assert_close(found, x, atol=1e-5, rtol=1e-5)
    assert {key[0] for key in kernels._compared} == {"scores", "gradient"}


@pytest.mark.parametrize("wrong", ["scores", "gradient"])
def test_scoring_stops_at_a_wrong_kernel(monkeypatch, wrong):
    stand_ins(monkeypatch, **{wrong: lambda x: x + 1e-2})
    with pytest.raises(RuntimeError, match=f"the Triton kernel '{wrong}' differs"):
        scored()


def test_plain_takes_masked_vocabulary_and_offsets():
    logits = torch.tensor([[1000.0, 1001.0, -torch.inf], [-torch.inf, 0.5, -torch.inf]])
    tokens, scale = torch.tensor([1, 1]), torch.tensor([2.0, 0.5])
    logp, entropy, normaliser = plain.scores(logits, tokens, scale)
    exact = torch.distributions.Categorical(logits=logits[:1, :2].double() * 2)
    torch.testing.assert_close(logp.double(), torch.tensor([exact.logits[0, 1], 0.0]).double())
    torch.testing.assert_close(entropy.double(), torch.cat([exact.entropy(), torch.zeros(1)]).double())
    assert normaliser.tolist() == pytest.approx([2002 + 0.126928, 0.25])
    gradient = plain.gradient(logits, tokens, logits.logsumexp(-1), entropy, torch.ones(2), torch.ones(2))
    assert gradient.isfinite().all() and (gradient[:, 2] == 0).all()
