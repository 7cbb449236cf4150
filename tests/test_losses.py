"""Tiled losses equal the naive form, in values and gradients; heads equal the models' own logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conftest import mixed_items, tiny, with_lora
from ringfence import losses
from ringfence.errors import ModelError
from ringfence.losses import Head, cross_entropy_sum, find_head, kl_sum, token_logprobs, top_k

N, D, V = 36, 16, 50
TILES = [1, 7, 9, 35, 36, 1000]  # 1, 9 and 36 divide the number of tokens


@pytest.fixture(params=TILES)
def tile_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(losses, "TILE_ELEMENTS", request.param * V)
    return int(request.param)


@pytest.fixture(params=["plain", "bias", "scaled", "softcap", "frozen"])
def head(request: pytest.FixtureRequest) -> Head:
    return make_head(request.param, seed=0)


def make_head(kind: str, seed: int) -> Head:
    torch.manual_seed(seed)
    module = nn.Linear(D, V, bias=kind == "bias").requires_grad_(kind != "frozen")
    module.weight.data.mul_(4)
    return Head(module, 0.4 if kind == "scaled" else 1.0, 2.5 if kind == "softcap" else None)


def naive_logits(head: Head, hidden: Tensor) -> Tensor:
    logits = F.linear(hidden, head.module.weight, head.module.bias) * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def naive_kl_sum(log_p: Tensor, log_q: Tensor) -> Tensor:
    return sum((log_p[n].exp() * (log_p[n] - log_q[n])).sum() for n in range(len(log_p)))


def hidden_states(seed: int) -> Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def targets() -> Tensor:
    return torch.randint(V, (N,), generator=torch.Generator().manual_seed(9))


def assert_equal_with_gradients(found: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # A loss is never used bare: the factor shows that the gradient which arrives from above is not forgotten.
    found_grads = torch.autograd.grad(0.37 * found, inputs)
    expected_grads = torch.autograd.grad(0.37 * expected, inputs)
    for ours, naive in zip(found_grads, expected_grads):
        assert naive.abs().max() > 0
        torch.testing.assert_close(ours, naive, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("tile_rows")
def test_cross_entropy_equals_the_naive_form(head: Head) -> None:
    hidden, target = hidden_states(1), targets()
    log_p = naive_logits(head, hidden).log_softmax(-1)
    expected = -sum(log_p[n, target[n]] for n in range(N))
    assert_equal_with_gradients(cross_entropy_sum(head, hidden, target), expected, [hidden, *head.trainable])


@pytest.mark.usefixtures("tile_rows")
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_kl_equals_the_naive_form(head: Head, direction: losses.Direction) -> None:
    student, reference, reference_head = hidden_states(1), hidden_states(2), make_head("scaled", seed=5)
    log_p = naive_logits(head, student).log_softmax(-1)
    log_q = naive_logits(reference_head, reference).log_softmax(-1).detach()
    expected = naive_kl_sum(log_p, log_q) if direction == "reverse" else naive_kl_sum(log_q, log_p)
    found = kl_sum(head, student, reference_head, reference, direction)
    assert_equal_with_gradients(found, expected, [student, *head.trainable])


def test_the_reference_gets_no_gradient() -> None:
    student, reference, head, reference_head = (
        hidden_states(1),
        hidden_states(2),
        make_head("plain", 0),
        make_head("plain", 1),
    )
    kl_sum(head, student, reference_head, reference).backward()
    assert reference.grad is None
    assert reference_head.module.weight.grad is None
    assert student.grad is not None


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_kl_is_never_negative_and_zero_for_equal_models(direction: losses.Direction) -> None:
    head = make_head("plain", 0)
    for seed in range(20):
        near = hidden_states(seed) + 10.0 ** -(seed % 5) * hidden_states(seed + 100)
        assert kl_sum(head, near, head, hidden_states(seed), direction) >= -1e-5
    equal = hidden_states(1)
    value = kl_sum(head, equal, head, equal.detach().clone(), direction)
    assert abs(value.item()) < 1e-6
    assert torch.autograd.grad(value, equal)[0].abs().max() < 1e-5
    assert kl_sum(head, hidden_states(1), head, hidden_states(2), direction) > 1


@pytest.mark.usefixtures("tile_rows")
def test_directions_are_each_others_mirror() -> None:
    head, other = make_head("plain", 0), make_head("plain", 1)
    one, two = hidden_states(1), hidden_states(2)
    reverse = kl_sum(head, one, other, two, "reverse")
    torch.testing.assert_close(reverse, kl_sum(other, two, head, one, "forward"), rtol=1e-5, atol=1e-5)
    assert abs(reverse - kl_sum(head, one, other, two, "forward")) > 1e-2


def test_no_more_logits_live_than_a_tile(tile_rows: int) -> None:
    head, seen = make_head("plain", 0), []
    head.module.register_forward_hook(lambda _m, _i, output: seen.append(len(output)))
    cross_entropy_sum(head, hidden_states(1), targets())
    assert max(seen) <= tile_rows
    assert sum(seen) == N


def test_a_tile_has_at_least_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "TILE_ELEMENTS", V // 2)
    head = make_head("plain", 0)
    found = cross_entropy_sum(head, hidden_states(1), targets())
    torch.testing.assert_close(found, F.cross_entropy(head(hidden_states(1)), targets(), reduction="sum"))


@pytest.mark.usefixtures("tile_rows")
def test_values_without_gradient_are_the_same() -> None:
    head, hidden = make_head("softcap", 0), hidden_states(1)
    with torch.no_grad():
        silent = cross_entropy_sum(head, hidden, targets())
    assert not silent.requires_grad
    torch.testing.assert_close(silent, cross_entropy_sum(head, hidden, targets()).detach(), rtol=1e-6, atol=0)


def test_no_tokens_give_zero_and_a_zero_gradient() -> None:
    head, hidden = make_head("plain", 0), hidden_states(1)
    none = torch.zeros(N, dtype=torch.bool)
    for total in (
        cross_entropy_sum(head, hidden[none], targets()[none]),
        kl_sum(head, hidden[none], head, hidden[none]),
    ):
        assert total.item() == 0
        assert torch.autograd.grad(total, hidden)[0].abs().max() == 0


@pytest.mark.usefixtures("tile_rows")
def test_token_logprobs_equal_the_naive_form(head: Head) -> None:
    expected = naive_logits(head, hidden_states(1)).log_softmax(-1)[torch.arange(N), targets()]
    found = token_logprobs(head, hidden_states(1), targets())
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-5)
    assert token_logprobs(head, hidden_states(1)[:0], targets()[:0]).shape == (0,)


@pytest.mark.usefixtures("tile_rows")
def test_top_k_are_the_largest_of_the_naive_form(head: Head) -> None:
    expected = naive_logits(head, hidden_states(1)).log_softmax(-1).detach()
    found = top_k(head, hidden_states(1), 4)
    assert not found.logprobs_NK.requires_grad
    torch.testing.assert_close(
        found.logprobs_NK, expected.sort(-1, descending=True).values[:, :4], rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(found.logprobs_NK, expected.gather(1, found.token_ids_NK), rtol=1e-5, atol=1e-5)
    some = torch.arange(N) % 3 == 1
    assert torch.equal(found[some].token_ids_NK, found.token_ids_NK[some])
    assert torch.equal(found[some].logprobs_NK, found.logprobs_NK[some])
    none = top_k(head, hidden_states(1)[:0], 4)
    assert len(none) == 0
    assert none.token_ids_NK.shape == none.logprobs_NK.shape == (0, 4)


# ---------------------------------------------------------------- heads of models


def test_head_equals_the_models_logits(architecture: str) -> None:
    model = tiny(architecture)
    output = model(torch.tensor([mixed_items()[1][0].input_ids]), output_hidden_states=True)
    head = find_head(model)
    torch.testing.assert_close(head(output.hidden_states[-1]), output.logits, rtol=1e-5, atol=1e-5)
    assert head.vocabulary == output.logits.shape[-1]


def test_scale_and_cap_are_really_at_work() -> None:
    """Without them the heads of these two models would be wrong, so the test above can fail."""
    for architecture in ("gemma2", "cohere"):
        model = tiny(architecture)
        output = model(torch.tensor([[1, 30, 40, 50]]), output_hidden_states=True)
        assert (model.lm_head(output.hidden_states[-1]) - output.logits).abs().max() > 0.1


def _doubled(logits: Tensor) -> Tensor:
    return 2 * logits


def _shifted(logits: Tensor) -> Tensor:
    return logits + torch.arange(logits.shape[-1])


def _hidden_cap(logits: Tensor) -> Tensor:
    return 2 * torch.tanh(logits / 2)


@pytest.mark.parametrize("change", [_doubled, _shifted, _hidden_cap])
def test_find_head_refuses_a_model_whose_logits_are_something_else(change) -> None:
    model = tiny("llama")
    plain = model.forward

    def forward(*args, **kwargs):
        output = plain(*args, **kwargs)
        output.logits = change(output.logits)
        return output

    model.forward = forward
    with pytest.raises(ModelError, match="LlamaForCausalLM"):
        find_head(model)


def test_find_head_refuses_a_scale_under_another_name() -> None:
    model = tiny("cohere")
    model.config.logit_scale = None  # the model keeps what it read when it was made
    with pytest.raises(ModelError, match="CohereForCausalLM"):
        find_head(model)


@pytest.mark.parametrize("training", [True, False])
def test_find_head_leaves_the_mode_and_the_gradients_alone(training: bool) -> None:
    model = with_lora(tiny("llama")).train(training).get_base_model()
    find_head(model)
    assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())
