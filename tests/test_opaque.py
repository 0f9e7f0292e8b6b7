"""Operators that PyTorch cannot look into: who meets the operator, and that everyone else gets the same without it."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from models.operators.opaque import opaque

X = torch.linspace(-1.5, 2, 6, dtype=torch.float64)


class Subclass(torch.Tensor):
    pass


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        return operator(*arguments, **(keywords or {}))


@opaque("infty_diff_tests::square")
def square(x: torch.Tensor) -> torch.Tensor:
    return x * x


@opaque("infty_diff_tests::cube")
def cube(x: torch.Tensor, factor: float) -> torch.Tensor:
    return factor * x**3


@opaque("infty_diff_tests::total")
def total(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(parts).sum(0)


for made in (square, cube):
    made.register_fake(lambda x, *_: torch.empty_like(x))


def _save(ctx, inputs, output):
    x, ctx.factor = inputs
    ctx.save_for_backward(x)


cube.register_autograd(lambda ctx, dout: (3 * ctx.factor * dout * ctx.saved_tensors[0] ** 2, None), _save)


@pytest.fixture
def met(monkeypatch):
    """The calls that go to operators."""
    calls = []
    for made in (square, cube, total):
        monkeypatch.setattr(made, "overload", lambda *a, f=made.overload: calls.append(a) or f(*a))
    return calls


def test_plain_calls_go_past_the_dispatcher(met):
    x, parameter = X.clone().requires_grad_(), torch.nn.Parameter(X.clone())
    assert torch.equal(square(X), X * X) and torch.equal(total([X, X]), 2 * X)
    with torch.no_grad():
        assert torch.equal(square(parameter), X * X)
    for leaf in (x, parameter):
        assert torch.equal(torch.autograd.grad(cube(leaf, 2.0).sum(), leaf)[0], 6 * X**2)
    with torch.inference_mode():
        assert cube(X, 1.0).is_inference()
    assert torch.autograd.gradcheck(lambda x: cube(x, 2.0), x) and torch.autograd.gradgradcheck(
        lambda x: cube(x, 2.0), x
    )
    assert not met


@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:.*torch.jit.trace:FutureWarning")
def test_whoever_watches_meets_the_operator(met):
    with FakeTensorMode() as mode:
        assert square(mode.from_tensor(X)).shape == X.shape
    assert square(X.to("meta")).is_meta
    with Watching():
        assert torch.equal(square(X), X * X)
    assert torch.equal(square(X.as_subclass(Subclass)).as_subclass(torch.Tensor), X * X)
    assert torch.equal(total([X, X.as_subclass(Subclass)]).as_subclass(torch.Tensor), 2 * X)
    assert torch.equal(torch.func.vmap(square)(X), X * X)
    assert len(met) == 6
    traced = torch.jit.trace(lambda x: square(x), X, check_trace=False)
    assert torch.equal(traced(2 * X), 4 * X * X) and "infty_diff_tests::square" in str(traced.graph)


def test_compiles_whole():
    whole = torch.compile(lambda x: cube(square(x), 2.0), fullgraph=True, backend="aot_eager")
    assert torch.equal(whole(X), cube(square(X), 2.0))


def test_a_missing_gradient_is_an_error():
    x = X.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"infty_diff_tests.square.* no autograd formula was registered"):
        square(x).sum().backward()


def test_a_gradient_of_a_gradient_that_is_not_there_is_an_error():
    triton_norm_mlp = pytest.importorskip("models.operators.pointwise.triton_norm_mlp")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, gamma = torch.randn(1, 3, 16, device=device, requires_grad=True), torch.ones(16, device=device)
    out = triton_norm_mlp.norm_modulate(x, gamma, gamma)
    dx = torch.autograd.grad(out.square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"norm_affine_backward.* no autograd formula was registered"):
        torch.autograd.grad(dx.sum(), x)
