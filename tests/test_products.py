import pytest
import torch
from language_models import tiny_llama
from multiplied import Multiplied
from torch.nn import functional

from safekern import products
from safekern.products import in_float32, multiplies_slowly

EPSILON = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(autouse=True)
def slow(monkeypatch):
    monkeypatch.setattr(products, "multiplies_slowly", lambda dtype: dtype in EPSILON)


def test_what_is_not_known_is_not_slow():
    assert not any(multiplies_slowly(dtype) for dtype in (torch.float32, torch.float64, torch.int8))


@pytest.mark.parametrize("wanted", ["input weight bias", "input", "weight", "bias"])
@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize("shape", [(9, 37), (2, 5, 37), (0, 37), (37,)])
def test_linear_rounds_once(shape, dtype, wanted):
    torch.manual_seed(0)
    values = {"input": torch.randn(shape), "weight": torch.randn(11, 37), "bias": torch.randn(11)}
    given = {name: value.to(dtype).requires_grad_(name in wanted.split()) for name, value in values.items()}
    exact = {name: value.detach().double().requires_grad_(value.requires_grad) for name, value in given.items()}
    with in_float32(), Multiplied() as multiplied:
        found = functional.linear(*given.values())
    many = len(shape) > 1 and shape[0] > 0
    assert multiplied.dtypes == ({torch.float32} if many else multiplied.dtypes - {torch.float32})
    expected = functional.linear(**exact)
    weights = torch.randn(expected.shape).to(dtype)
    (found * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    assert found.dtype == dtype and found.shape == expected.shape
    if many:
        pairs = [(found, expected), *((given[name].grad, exact[name].grad) for name in wanted.split())]
        for one, true in pairs:
            assert one.dtype == dtype
            # Sums in fp32 of what cancels out are off by little more than they round to.
            assert ((one.double() - true).abs() <= EPSILON[dtype] * 1.01 * true.abs() + 1e-5).all()
    assert all((given[name].grad is None) == (name not in wanted.split()) for name in given)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_a_layer_keeps_what_it_needs_and_no_copies(first, frozen):
    layer, values = torch.nn.Linear(37, 11, dtype=torch.bfloat16), torch.randn(9, 37).bfloat16()
    layer.weight.requires_grad_(not frozen)
    values.requires_grad_(not first)
    with in_float32():
        kept = layer(values).grad_fn.saved_tensors
    addresses = [one if one is None else one.data_ptr() for one in kept]
    assert addresses == [None if frozen else values.data_ptr(), None if first else layer.weight.data_ptr()]


def test_a_layer_has_second_derivatives():
    layer, values = torch.nn.Linear(37, 11, dtype=torch.bfloat16), torch.randn(9, 37).bfloat16().requires_grad_()
    with in_float32():
        (grad,) = torch.autograd.grad(layer(values).square().sum(), values, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), values)
    matrix = layer.weight.detach().double()
    torch.testing.assert_close(second.double(), (2 * matrix.T @ matrix).sum(0).expand(9, 37), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize("masked", ["causal", "mask", "bias"])
def test_attention(dtype, masked):
    torch.manual_seed(0)
    given = [torch.randn(2, 3, 12, 8).to(dtype).requires_grad_() for _ in range(3)]
    exact = [value.detach().double().requires_grad_() for value in given]
    mask = {"mask": torch.ones(12, 12, dtype=torch.bool).tril(), "bias": torch.randn(12, 12).to(dtype)}.get(masked)
    options = {"is_causal": masked == "causal", "scale": 0.3}
    with in_float32(), Multiplied() as multiplied:
        found = functional.scaled_dot_product_attention(*given, attn_mask=mask, **options)
    wide = mask.double() if masked == "bias" else mask
    expected = functional.scaled_dot_product_attention(*exact, attn_mask=wide, **options)
    assert multiplied.dtypes == {torch.float32} and found.dtype == dtype
    found.sum().backward()
    expected.sum().backward()
    for one, true in [(found, expected), *((a.grad, b.grad) for a, b in zip(given, exact, strict=True))]:
        assert (one.double() - true).norm() <= 2 * EPSILON[dtype] * true.norm()


def test_a_model_is_as_exact_as_without():
    def outcome(dtype, quick):
        model = tiny_llama().to(dtype)
        forward = in_float32()(model.forward) if quick else model.forward
        with Multiplied() as multiplied:
            logits = forward(torch.arange(60).view(3, 20), use_cache=False).logits
            logits.float().square().mean().backward()
        return [logits.detach().float(), *(param.grad.float() for param in model.parameters())], multiplied.dtypes

    exact, _ = outcome(torch.float32, False)
    native, of_native = outcome(torch.bfloat16, False)
    found, of_found = outcome(torch.bfloat16, True)
    assert (of_native, of_found) == ({torch.bfloat16}, {torch.float32})
    for one, other, true in zip(native, found, exact, strict=True):
        assert 0.5 < (other - true).norm() / (one - true).norm() < 2


def test_what_is_left_alone(monkeypatch):
    layer, values = torch.nn.Linear(37, 11, dtype=torch.bfloat16), torch.randn(9, 37).bfloat16()

    def multiplied(layer, values, context=in_float32):
        with torch.no_grad(), context(), Multiplied() as noted:
            layer(values)
        return noted.dtypes

    assert multiplied(layer, values) == {torch.float32}
    # Few rows, other types, autocast.
    assert multiplied(layer, values[:7]) == {torch.bfloat16}
    assert multiplied(layer.double(), values.double()) == {torch.float64}
    with torch.autocast("cpu", torch.bfloat16):
        assert multiplied(layer.bfloat16(), values) == {torch.bfloat16}
    with in_float32(), pytest.raises(RuntimeError, match="dtype"):
        layer.float()(values)
    # A weight of one dimension, and names.
    assert multiplied(lambda x: functional.linear(x, x[0]), values) <= {torch.bfloat16}
    assert multiplied(lambda x: functional.linear(input=x, weight=x), values) == {torch.bfloat16}
    queries = values.view(1, 1, 9, 37)
    mask = torch.ones(9, 9, dtype=torch.bool)
    named = {"query": queries, "key": queries, "value": queries}
    for order in ({"attn_mask": mask, **named}, {**named, "attn_mask": mask}):
        with in_float32():
            assert functional.scaled_dot_product_attention(**order).dtype == torch.bfloat16
    monkeypatch.setattr(products, "multiplies_slowly", lambda dtype: False)
    assert multiplied(layer.bfloat16(), values) == {torch.bfloat16}
