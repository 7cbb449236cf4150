"""Tiled losses equal the naive form, in values and gradients, alone and together; heads equal the
models' own logits."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers.models import tiny, with_lora
from helpers.rows import mixed_items
from ringfence.errors import ModelError
from ringfence.model import losses
from ringfence.model.losses import (
    CrossEntropy,
    Divergence,
    Head,
    LogitLoss,
    States,
    TopK,
    cross_entropy_sum,
    find_head,
    kl_sum,
    relative_drift,
    token_logprobs,
    top_k,
    weighted_sum,
)

pytestmark = pytest.mark.slow

N, D, V = 36, 16, 50
TILES = [1, 7, 9, 35, 36, 1000]  # 1, 9 and 36 divide the number of tokens


@pytest.fixture(params=TILES)
def tile_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(losses, "TILE_ELEMENTS", request.param * V)
    monkeypatch.setattr(losses, "BLOCK_ELEMENTS", 4 * V)
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
    # A loss is never used bare: the factor shows that the gradient which arrives from above is not
    # forgotten.
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
    assert_equal_with_gradients(
        cross_entropy_sum(head, hidden, target), expected, [hidden, *head.trainable]
    )


@pytest.mark.usefixtures("tile_rows")
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_kl_equals_the_naive_form(head: Head, direction: losses.Direction) -> None:
    student, reference, reference_head = (
        hidden_states(1),
        hidden_states(2),
        make_head("scaled", seed=5),
    )
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
    torch.testing.assert_close(
        reverse, kl_sum(other, two, head, one, "forward"), rtol=1e-5, atol=1e-5
    )
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
    torch.testing.assert_close(
        found, F.cross_entropy(head(hidden_states(1)), targets(), reduction="sum")
    )


@pytest.mark.usefixtures("tile_rows")
def test_values_without_gradient_are_the_same() -> None:
    head, hidden = make_head("softcap", 0), hidden_states(1)
    with torch.no_grad():
        silent = cross_entropy_sum(head, hidden, targets())
    assert not silent.requires_grad
    torch.testing.assert_close(
        silent, cross_entropy_sum(head, hidden, targets()).detach(), rtol=1e-6, atol=0
    )


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
    torch.testing.assert_close(
        found.logprobs_NK, expected.gather(1, found.token_ids_NK), rtol=1e-5, atol=1e-5
    )
    some = torch.arange(N) % 3 == 1
    assert torch.equal(found[some].token_ids_NK, found.token_ids_NK[some])
    assert torch.equal(found[some].logprobs_NK, found.logprobs_NK[some])
    none = top_k(head, hidden_states(1)[:0], 4)
    assert len(none) == 0
    assert none.token_ids_NK.shape == none.logprobs_NK.shape == (0, 4)


# -------------------------------------------------------- KL of the most probable tokens and a tail


EVERYWHERE = torch.ones(N, dtype=torch.bool)


def divergence_of(logits: Tensor, top: TopK, direction: losses.Direction) -> Tensor:
    """Of given logits: their head hands them on."""
    head = Head(nn.Linear(logits.shape[-1], logits.shape[-1], bias=False).requires_grad_(False))
    torch.nn.init.eye_(head.module.weight)
    everywhere = torch.ones(len(logits), dtype=torch.bool)
    return weighted_sum(head, logits, [(1.0, Divergence(everywhere, top, direction))])[0]


def naive_bucket_kl(logits: Tensor, top: TopK, direction: losses.Direction) -> Tensor:
    """Token by token in float64, over the listed tokens and one bucket with all others."""
    total = logits.new_zeros((), dtype=torch.float64)
    for row, ids, logq in zip(logits.double(), top.token_ids_NK.long(), top.logprobs_NK.double()):
        log_p = row.log_softmax(-1)
        listed = torch.zeros(len(row), dtype=torch.bool).index_fill(0, ids, True)
        p = [*log_p[ids].exp(), log_p[~listed].exp().sum()]
        q = [*logq.exp(), 1 - logq.exp().sum()]
        pairs = zip(p, q) if direction == "reverse" else zip(q, p)
        total = total + sum(a * (a / b).log() for a, b in pairs)
    return total


@pytest.mark.usefixtures("tile_rows")
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_top_k_kl_equals_the_naive_bucket_form(head: Head, direction: losses.Direction) -> None:
    student, top = hidden_states(1), top_k(make_head("scaled", seed=5), hidden_states(2), 6)
    top = TopK(top.token_ids_NK.int(), top.logprobs_NK)  # as a cache may keep them
    expected = naive_bucket_kl(naive_logits(head, student), top, direction).float()
    [found, [alone]] = weighted_sum(head, student, [(1.0, Divergence(EVERYWHERE, top, direction))])
    torch.testing.assert_close(alone, expected, rtol=1e-5, atol=1e-5)
    assert_equal_with_gradients(found, expected, [student, *head.trainable])


@pytest.mark.usefixtures("tile_rows")
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_top_k_of_the_whole_vocabulary_is_the_full_kl(
    head: Head, direction: losses.Direction
) -> None:
    student, reference_head = hidden_states(1), make_head("scaled", seed=5)
    expected = kl_sum(head, student, reference_head, hidden_states(2), direction)
    top = top_k(reference_head, hidden_states(2), V)
    [found, _] = weighted_sum(head, student, [(1.0, Divergence(EVERYWHERE, top, direction))])
    assert_equal_with_gradients(found, expected, [student, *head.trainable])


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_more_tokens_bring_the_bucket_kl_up_to_the_full_one(direction: losses.Direction) -> None:
    head, student = make_head("scaled", 0), hidden_states(1)
    values = [
        weighted_sum(
            head,
            student,
            [(1.0, Divergence(EVERYWHERE, top_k(head, hidden_states(2), k), direction))],
        )[0]
        for k in (1, 2, 8, 30, V - 1, V)
    ]
    assert values[0] > 0.1
    assert all(later >= sooner - 1e-4 for sooner, later in pairwise(values))
    torch.testing.assert_close(values[-1], kl_sum(head, student, head, hidden_states(2), direction))


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_without_the_tail_a_truncated_kl_is_negative_and_ours_is_not(
    direction: losses.Direction,
) -> None:
    """The two listed tokens lose, or win, half of their mass to the tail."""
    few, many = (
        torch.tensor([[0.25, 0.25, 0.25, 0.25]]).log(),
        torch.tensor([[0.48, 0.48, 0.02, 0.02]]).log(),
    )
    student, reference = (few, many) if direction == "reverse" else (many, few)
    top = TopK(torch.tensor([[0, 1]]), reference[:, :2])
    p, q = (
        (student[0, :2], top.logprobs_NK[0])
        if direction == "reverse"
        else (top.logprobs_NK[0], student[0, :2])
    )
    assert (p.exp() * (p - q)).sum() < -0.1
    assert divergence_of(student, top, direction) > 0.1


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize(
    ("student_tail", "reference_tail"), [(1e-12, 0.1), (0.3, 1e-5), (1e-9, 1e-5), (1e-30, 0.5)]
)
def test_a_tail_of_next_to_nothing_is_exact(
    student_tail: float, reference_tail: float, direction: losses.Direction
) -> None:
    """1 - (sum of the listed) would be rounding error for such students."""
    student = _with_tail(student_tail).float().requires_grad_()
    reference = _with_tail(reference_tail)
    top = TopK(torch.tensor([[0, 1]]), reference[:, :2].float())
    found, expected = (
        divergence_of(student, top, direction),
        naive_bucket_kl(student, top, direction).float(),
    )
    torch.testing.assert_close(
        found, expected, rtol=1e-2 if reference_tail < 1e-4 else 1e-5, atol=1e-5
    )
    # The derivative in a logit: p - q by bucket, shared within the tail by p; and p (log p/q - KL).
    p, q = (
        student.detach().double().exp()[0],
        torch.tensor([*reference[0, :2].exp(), reference_tail]).double(),
    )
    buckets = torch.stack([p[0], p[1], p[2:].sum()])
    if direction == "forward":
        slope = buckets - q
    else:
        slope = buckets * ((buckets / q).log() - (buckets * (buckets / q).log()).sum())
    slope = torch.cat([slope[:2], slope[2] * p[2:] / p[2:].sum()])
    [gradient] = torch.autograd.grad(found, student)
    torch.testing.assert_close(
        gradient[0], slope.float(), rtol=1e-2 if reference_tail < 1e-4 else 1e-5, atol=1e-6
    )


def _with_tail(mass: float) -> Tensor:
    """Log-probabilities of two listed tokens and three in the tail."""
    listed = torch.tensor([0.6, 0.4], dtype=torch.float64) * (1 - mass)
    return torch.cat([listed, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64) * mass])[
        None
    ].log()


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("student_tail", [0.3, 1e-30, 0.0])
def test_a_reference_without_any_tail_gives_finite_numbers(
    student_tail: float, direction: losses.Direction
) -> None:
    student = _with_tail(student_tail).float().clamp(min=-300).requires_grad_()
    logq = _with_tail(0.0)[:, :2].float()
    for rounded in (logq, logq + 1e-6):  # the listed may sum up to a little more than 1
        value = divergence_of(student, TopK(torch.tensor([[0, 1]]), rounded), direction)
        [gradient] = torch.autograd.grad(value, student)
        assert gradient.isfinite().all()
        assert value.isfinite()
        assert value > 0.1 if student_tail == 0.3 else abs(value) < 1e-4


# ---------------------------------------------------------------- several losses in one pass


MASKS = {
    "same": lambda at: (at >= 0, at >= 0, at >= 0),
    "overlapping": lambda at: (at % 2 == 0, at % 3 == 0, at < 20),
    "disjoint": lambda at: (at % 3 == 0, at % 3 == 1, at % 3 == 2),
    "one empty": lambda at: (at > 5, at < 0, at % 2 == 1),
    "within": lambda at: (at >= 0, at % 4 == 0, at % 8 == 0),
    "all empty": lambda at: (at < 0, at < 0, at < 0),
}


def three_losses(masks: tuple[Tensor, ...], other: Head) -> list[LogitLoss]:
    """A cross-entropy, a KL, and a KL of few tokens in the other direction."""
    ce, kl, short = masks
    top = top_k(other, hidden_states(3)[short.flatten()], 5)
    return [
        CrossEntropy(ce, targets()[ce.flatten()]),
        Divergence(kl, States(other, hidden_states(2)[kl.flatten()])),
        Divergence(short, top, "forward"),
    ]


def naive_three(masks: tuple[Tensor, ...], logits: Tensor, other: Head) -> list[Tensor]:
    ce, kl, short = masks
    log_p = logits.log_softmax(-1)
    log_q = naive_logits(other, hidden_states(2)).log_softmax(-1).detach()
    top = top_k(other, hidden_states(3), 5)
    zero = logits.sum() * 0
    return [
        zero - sum(log_p[n, targets()[n]] for n in range(N) if ce[n]),
        zero + naive_kl_sum(log_p[kl], log_q[kl]),
        zero + naive_bucket_kl(logits[short], top[short], "forward").float(),
    ]


@pytest.mark.usefixtures("tile_rows")
@pytest.mark.parametrize("name", MASKS)
def test_losses_together_are_the_weighted_sum_of_each_alone(name: str, head: Head) -> None:
    other, weights, hidden = make_head("scaled", seed=5), (0.25, 3.0, 0.5), hidden_states(1)
    masks = MASKS[name](torch.arange(N))
    shaped = tuple(mask.view(3, N // 3) for mask in masks)
    total, values = weighted_sum(
        head, hidden.view(3, N // 3, D), list(zip(weights, three_losses(shaped, other)))
    )
    naive = naive_three(masks, naive_logits(head, hidden), other)
    for value, alone in zip(values, naive, strict=True):
        assert not value.requires_grad
        torch.testing.assert_close(value, alone.detach(), rtol=1e-5, atol=1e-5)
    expected = sum(weight * alone for weight, alone in zip(weights, naive))
    if name == "all empty":
        assert total.item() == 0
        assert all(
            grad.abs().max() == 0 for grad in torch.autograd.grad(total, [hidden, *head.trainable])
        )
    else:
        assert_equal_with_gradients(total, expected, [hidden, *head.trainable])


@pytest.mark.parametrize("name", MASKS)
def test_students_logits_are_made_once_for_all_losses(name: str, tile_rows: int) -> None:
    head, other, seen = make_head("plain", 0), make_head("plain", 5), []
    masks = MASKS[name](torch.arange(N))
    together = list(zip((1.0, 1.0, 1.0), three_losses(masks, other)))
    head.module.register_forward_hook(lambda _m, _i, output: seen.append(len(output)))
    weighted_sum(head, hidden_states(1), together)
    assert sum(seen) == (masks[0] | masks[1] | masks[2]).sum()
    assert max(seen, default=0) <= tile_rows


class LargestTensor(TorchDispatchMode):
    """The most elements that any operation gave, in its forward and in its backward."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return output


def test_no_tensor_is_larger_than_a_tile(tile_rows: int) -> None:
    head, other, hidden = make_head("frozen", 0), make_head("frozen", 5), hidden_states(1)
    together = list(zip((1.0, 2.0, 3.0), three_losses((EVERYWHERE,) * 3, other)))
    with LargestTensor() as largest:
        weighted_sum(head, hidden, together)[0].backward()
    assert hidden.grad is not None
    assert min(tile_rows, N) * V <= largest.elements <= max(min(tile_rows, N) * V, N * D, V * D)


@pytest.mark.usefixtures("tile_rows")
def test_losses_without_gradient_have_the_same_values(head: Head) -> None:
    masks = MASKS["overlapping"](torch.arange(N))
    together = list(zip((0.5, 2.0, 1.0), three_losses(masks, make_head("plain", 5))))
    total, values = weighted_sum(head, hidden_states(1), together)
    with torch.no_grad():
        silent, silent_values = weighted_sum(head, hidden_states(1), together)
    assert total.requires_grad
    assert not silent.requires_grad
    torch.testing.assert_close(
        [silent, *silent_values], [total.detach(), *values], rtol=1e-6, atol=0
    )


def test_a_head_alone_may_train() -> None:
    head, hidden = make_head("bias", 0), hidden_states(1).detach()
    expected = F.cross_entropy(naive_logits(head, hidden), targets(), reduction="sum")
    assert_equal_with_gradients(
        cross_entropy_sum(head, hidden, targets()), expected, head.trainable
    )
    frozen = make_head("frozen", 0)
    assert not cross_entropy_sum(frozen, hidden, targets()).requires_grad


@pytest.mark.usefixtures("tile_rows")
def test_autocast_rounds_the_logits_as_it_does_in_the_naive_form(head: Head) -> None:
    other, hidden, reference = make_head("plain", 5), hidden_states(1), hidden_states(2)
    with torch.autocast("cpu", torch.bfloat16):
        together = [
            (1.0, CrossEntropy(EVERYWHERE, targets())),
            (1.0, Divergence(EVERYWHERE, States(other, reference))),
        ]
        total, values = weighted_sum(head, hidden, together)
        logits, then = naive_logits(head, hidden).float(), naive_logits(other, reference).float()
    assert total.dtype == torch.float32
    naive = [
        F.cross_entropy(logits, targets(), reduction="sum"),
        naive_kl_sum(logits.log_softmax(-1), then.log_softmax(-1)),
    ]
    if (
        head.scale == 1 and head.softcap is None
    ):  # the naive form would round what stands behind them, too
        # A CPU without instructions for bf16 adds up the product of one row by another kernel.
        tolerance = 1e-5 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else 5e-4
        expected = [value.detach() for value in naive]
        torch.testing.assert_close(list(values), expected, rtol=tolerance, atol=tolerance)
    inputs = [hidden, *head.trainable]
    for ours, theirs in zip(
        torch.autograd.grad(total, inputs), torch.autograd.grad(sum(naive), inputs)
    ):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 2e-2 * theirs.norm()


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


def test_a_token_without_keys_has_not_drifted() -> None:
    """All that a model makes of a padding token's embedding is zero; 0 / 0 would stop a run."""
    now, then = torch.tensor([[0.0, 0.0], [3.0, 5.0]]), torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert relative_drift(now, then).tolist() == pytest.approx([0.0, 1 / 25])
