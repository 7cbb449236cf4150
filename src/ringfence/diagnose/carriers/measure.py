"""Carrier attribution: which part of the prompt carries the shift (arXiv 2606.06667).

The reference's keys and values are put into the tuned model at one role of the prompt (prefix,
query, postfix), all layers at once, and the paired margin is measured again: how much of the shift
is undone? The control is the same number of random prompt tokens. The residual stream, one layer at
a time, shows at which depth. Does not know defenses; `best_role` only names a role.

Models need not share weights: activations at the reference's prompt tokens are spooled to files,
one for each batch, and read back batch by batch. Shapes: B rows, T tokens, N chosen tokens.
"""

import random
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...errors import DataError, ModelError
from ...model.activations import batches
from ...model.interventions import patched_kv, patched_states
from ...model.layers import causal_lm
from ...model.losses import find_head
from ...model.taps import Needs, forward
from ...stats import mean_interval, ratio_interval
from ...text.batch import Batch
from ...text.roles import Role
from ..diagnosis import Cost, Numbers, Subject, shown
from ..models import REFERENCE
from ..texts import Text, margins, pair_texts, response_logprobs

TITLE = "Carriers"
NEEDS_BASE = False
OUTSIDE, INSIDE = "outside", "inside"
ROLES = ("prefix", "query", "postfix")
PROMPT = "prompt"  # all three
LAYERS = 8  # at most, evenly spaced: each costs a forward pass for every role
_KV_PASSES = 1 + 2 * len(ROLES) + 1  # untouched, each role and its control, whole prompt


class Patch(NamedTuple):
    """Where the reference's activations are put in.

    `layer`: the residual stream after it; None: the keys and values of all layers. `control`: at
    the same number of random prompt tokens instead of the role's own.
    """

    role: str | None = None  # None: nowhere
    layer: int | None = None
    control: bool = False


UNTOUCHED = Patch()


def cost(subject: Subject) -> Cost:
    """`kept`: most bytes of the spooled files, on disk (in the folder for temporary files)."""
    config = subject.models.config
    layers, texts = _layers(config), _texts(subject)
    tokens = {name: sum(len(text.example) for text in chosen) for name, chosen in texts.items()}
    curves = len(layers) * (len(ROLES) + 1) * tokens[OUTSIDE]
    each = _KV_PASSES * sum(tokens.values()) + curves
    head_size = getattr(config, "head_dim", None)
    head_size = head_size or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    kv = 2 * config.num_hidden_layers * heads * head_size
    prompts = sum(_prompt_tokens(text) for chosen in texts.values() for text in chosen)
    size = 4 if subject.models.precision == "fp32" else 2
    kept = size * prompts * (kv + len(layers) * config.hidden_size)
    return Cost(2 * sum(tokens.values()) + len(subject.models.tuned) * each, kept=kept)


def measure(subject: Subject, by_layer: bool = True) -> Numbers:
    """Margins (nats per token) of tuned models, untouched and patched, and what patches undo.

    recovery = sum over questions of (patched - tuned) / sum of (reference - tuned): 0 like the
    tuned model, 1 like the reference. It is null if the interval of the shift contains 0: there is
    nothing to recover.

    Args:
        by_layer: patch the residual stream too (outside questions); most of the cost.

    Raises:
        DataError: no outside questions.
        ModelError: a tuned model differs in architecture from the reference, or has layers without
            keys and values.
    """
    texts, models = _texts(subject), subject.models
    with tempfile.TemporaryDirectory(prefix="ringfence-carriers-") as folder:
        files = {name: Path(folder) / name for name in texts}
        with models.open(REFERENCE) as model:
            built = _built(model)
            config = causal_lm(model).config.get_text_config()
            depth, layers = config.num_hidden_layers, _layers(config) if by_layer else ()
            chosen = {name: layers if name == OUTSIDE else () for name in texts}
            reference = {
                name: _spool(model, subject, texts[name], files[name], chosen[name])
                for name in texts
            }
        tuned = {}
        for tuned_name in models.tuned:
            with models.open(tuned_name) as model:
                _check_built(tuned_name, _built(model), built)
                patched = {
                    name: _patched(model, subject, texts[name], files[name], chosen[name])
                    for name in texts
                }
            tuned[tuned_name] = {
                name: _attribution(reference[name], patched[name], texts[name], subject.seed)
                for name in texts
            }
    questions = {name: len(texts[name]) // 2 for name in texts}
    return {"questions": questions, "depth": depth, "layers": list(layers), "tuned": tuned}


def _texts(subject: Subject) -> dict[str, list[Text]]:
    if not subject.outside:
        raise DataError(
            "carriers: expected paired questions outside the training domain, found none"
        )
    sets = {OUTSIDE: subject.outside, INSIDE: subject.inside}
    return {
        name: pair_texts(subject.chat, questions) for name, questions in sets.items() if questions
    }


def _layers(config: Any) -> tuple[int, ...]:
    """Layers (from 1) after which the residual stream is patched. Not the last: at prompt tokens,
    its output only serves to predict the first response token."""
    spaced = np.linspace(1, max(1, config.num_hidden_layers - 1), LAYERS)
    return tuple(sorted({round(layer) for layer in spaced}))


def _built(model: Any) -> dict[str, Any]:
    config = causal_lm(model).config.get_text_config()
    names = ("model_type", "num_hidden_layers", "hidden_size", "num_key_value_heads", "head_dim")
    return {name: getattr(config, name, None) for name in names}


def _check_built(name: str, found: dict[str, Any], expected: dict[str, Any]) -> None:
    differ = {key: (found[key], expected[key]) for key in expected if found[key] != expected[key]}
    if differ:
        key, (ours, reference) = next(iter(differ.items()))
        raise ModelError(
            f"{name}: {key} is {ours}, the reference's is {reference}: activations of one do not "
            "fit the other"
        )


def _is_prompt(batch: Batch) -> Tensor:
    masks = [batch["roles"] == Role.parse(role) for role in ROLES]
    return torch.stack(masks).any(0)


def _prompt_tokens(text: Text) -> int:
    return sum(text.example.roles.count(Role.parse(role)) for role in ROLES)


def _spool(
    model: Any, subject: Subject, texts: list[Text], folder: Path, layers: Sequence[int]
) -> list[float]:
    """The model's margins; activations at its prompt tokens go to one file for each batch."""
    folder.mkdir()
    head, depth = find_head(causal_lm(model)), _built(model)["num_hidden_layers"]
    means = [0.0] * len(texts)
    for number, (places, batch) in enumerate(_batches(model, subject, texts)):
        for place, logprobs_R in zip(places, response_logprobs(model, batch)):
            means[place] = float(logprobs_R.mean())
        prompt_BT = _is_prompt(batch)
        needs = Needs(kv_BT=prompt_BT, states_BT=prompt_BT, layers=tuple(layers))
        with torch.no_grad():
            taps = forward(model, head, batch, needs)
        if len(taps.kv) != depth:
            raise ModelError(
                f"{type(causal_lm(model)).__name__}: {len(taps.kv)} of {depth} layers have keys "
                "and values; the others carry the prompt too (recurrent states), and cannot be "
                "patched"
            )
        tensors = {f"key {layer}": key_NE for layer, (key_NE, _) in enumerate(taps.kv)}
        tensors |= {f"value {layer}": value_NE for layer, (_, value_NE) in enumerate(taps.kv)}
        tensors |= {f"state {layer}": state_ND for layer, state_ND in taps.states.items()}
        save_file(tensors, folder / f"{number}.safetensors")
    return margins(means)


def _patched(
    model: Any, subject: Subject, texts: list[Text], folder: Path, layers: Sequence[int]
) -> dict[Patch, list[float]]:
    """The model's margins, untouched and under every patch. The batches are those of `_spool`."""
    means: dict[Patch, list[float]] = defaultdict(lambda: [0.0] * len(texts))
    for number, (places, batch) in enumerate(_batches(model, subject, texts)):
        questions, file = [texts[p].question for p in places], folder / f"{number}.safetensors"
        control_BT = {role: _control(batch, questions, role, subject.seed) for role in ROLES}
        for patch, context in _patches(model, batch, file, control_BT, layers):
            with context:
                found = response_logprobs(model, batch)
            for place, logprobs_R in zip(places, found):
                means[patch][place] = float(logprobs_R.mean())
    return {patch: margins(values) for patch, values in means.items()}


def _batches(model: Any, subject: Subject, texts: list[Text]) -> Iterator[tuple[list[int], Batch]]:
    examples = [text.example for text in texts]
    return batches(examples, subject.chat, subject.batch_tokens, model.device)


def _patches(
    model: Any, batch: Batch, file: Path, control_BT: dict[str, Tensor], layers: Sequence[int]
) -> Iterator[tuple[Patch, AbstractContextManager[None]]]:
    """Every patch, none first, and its context; the file has the reference's activations."""
    yield UNTOUCHED, nullcontext()
    prompt_BT = _is_prompt(batch)
    held = load_file(file, device=str(model.device))
    depth = sum(name.startswith("key") for name in held)

    def kv(mask_BT: Tensor) -> AbstractContextManager[None]:
        chosen = mask_BT[prompt_BT]
        pairs = [
            (held[f"key {layer}"][chosen], held[f"value {layer}"][chosen]) for layer in range(depth)
        ]
        return patched_kv(model, pairs, mask_BT)

    for role in ROLES:
        yield Patch(role, control=True), kv(control_BT[role])
    own_BT = {role: batch["roles"] == Role.parse(role) for role in ROLES}
    for role, mask_BT in {**own_BT, PROMPT: prompt_BT}.items():
        yield Patch(role), kv(mask_BT)
        for layer in layers:
            states_ND = held[f"state {layer}"][mask_BT[prompt_BT]]
            yield Patch(role, layer), patched_states(model, layer, states_ND, mask_BT)


def _control(batch: Batch, questions: Sequence[str], role: str, seed: int) -> Tensor:
    """Mask [B, T] of random prompt tokens: as many as the role has, the same for both answers.

    They are drawn from the whole prompt, including the role's own, because a role may be most of
    the prompt. So the control shows what *which* tokens adds to *how many*, and a role that is
    almost the whole prompt gets almost no advantage: it is indistinguishable from random tokens.
    """
    control_BT = torch.zeros_like(batch["roles"], dtype=torch.bool)
    prompt_BT, own_BT = _is_prompt(batch), batch["roles"] == Role.parse(role)
    for row, question in enumerate(questions):
        places = prompt_BT[row].nonzero()[:, 0].tolist()
        drawn = random.Random(f"{seed} {role} {question}").sample(places, int(own_BT[row].sum()))
        control_BT[row, drawn] = True
    return control_BT


def _attribution(
    reference: list[float], patched: dict[Patch, list[float]], texts: list[Text], seed: int
) -> dict[str, Any]:
    """What a tuned model's margins (one per question) show on one set of questions."""
    tuned = patched[UNTOUCHED]
    shift = mean_interval(_minus(tuned, reference), seed=seed)
    missing = _minus(reference, tuned)
    recoverable = shift.n > 1 and not shift.low <= 0 <= shift.high

    def share(to: list[float], start: list[float]) -> dict[str, float] | None:
        return ratio_interval(_minus(to, start), missing, seed).to_dict() if recoverable else None

    def of_role(role: str) -> dict[str, Any]:
        own, tokens = patched[Patch(role)], _mean_tokens(texts, role)
        if not tokens:
            nothing = dict.fromkeys(("margin", "recovery", "control", "advantage"))
            return {"tokens": 0.0, **nothing}
        numbers = {"tokens": tokens, "margin": _mean(own, seed), "recovery": share(own, tuned)}
        control = patched.get(Patch(role, control=True))
        if control is None:
            return {**numbers, "control": None, "advantage": None}
        of_control = {"margin": _mean(control, seed), "recovery": share(control, tuned)}
        return {**numbers, "control": of_control, "advantage": share(own, control)}

    layers = sorted({patch.layer for patch in patched if patch.layer is not None})
    places = [role for role in (*ROLES, PROMPT) if _mean_tokens(texts, role)]
    by_layer = {
        role: [share(patched[Patch(role, layer)], tuned) for layer in layers] for role in places
    }
    return {
        "reference": _mean(reference, seed),
        "tuned": _mean(tuned, seed),
        "shift": shift.to_dict(),
        "recoverable": recoverable,
        "roles": {role: of_role(role) for role in (*ROLES, PROMPT)},
        "by_layer": by_layer if recoverable and layers else None,
    }


def _minus(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def _mean(values: list[float], seed: int) -> dict[str, float]:
    return mean_interval(values, seed=seed).to_dict()


def _mean_tokens(texts: list[Text], role: str) -> float:
    if role == PROMPT:
        return float(np.mean([_prompt_tokens(text) for text in texts]))
    return float(np.mean([text.example.roles.count(Role.parse(role)) for text in texts]))


@dataclass(frozen=True)
class Choice:
    """The role that TReFT should hold, the evidence for it by role, and both in a sentence."""

    role: str
    evidence: dict[str, Any]
    sentence: str


def best_role(numbers: dict[str, Any]) -> Choice:
    """The role that carries a tuned model's shift (`measure(...)["tuned"][name]`) outside.

    The one of prefix, query and postfix with the highest recovery, among those whose recovery and
    advantage over the same number of random tokens have intervals above 0. If there is none: the
    published default, and the sentence says that it is not a finding.
    """
    found = numbers[OUTSIDE]
    roles = {role: found["roles"][role] for role in ROLES if found["roles"][role]["tokens"]}
    evidence = {
        "shift": found["shift"],
        "roles": {
            role: {
                "recovery": values["recovery"],
                "control": values["control"]["recovery"],
                "advantage": values["advantage"],
            }
            for role, values in roles.items()
        },
    }
    default = next(role for role in ("prefix", "postfix", "query") if role in roles)
    no_finding = f"{default} is the default here, not a finding"
    if not found["recoverable"] or found["shift"]["mean"] < 0:
        nothing = f"No shift towards misaligned answers to attribute ({shown(found['shift'])} nats)"
        sentence = f"{nothing}: {no_finding}."
        return Choice(default, evidence, sentence)
    carriers = [
        role
        for role, values in roles.items()
        if values["recovery"]["low"] > 0 and values["advantage"]["low"] > 0
    ]
    if not carriers:
        each = (f"{role} {shown(values['advantage'])}" for role, values in roles.items())
        advantages = ", ".join(each)
        sentence = (
            "The evidence is weak: no role undoes more than the same number of random prompt "
            f"tokens (difference: {advantages}); {no_finding}."
        )
        return Choice(default, evidence, sentence)
    best = max(carriers, key=lambda role: roles[role]["recovery"]["mean"])
    sentence = (
        f"The {best} is the carrier to hold: patched, it undoes {shown(roles[best]['recovery'])} "
        f"of the shift, {shown(roles[best]['advantage'])} more than the same number of random "
        "prompt tokens."
    )
    return Choice(best, evidence, sentence)
