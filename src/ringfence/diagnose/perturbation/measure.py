"""Which part of the prompt holds the change: margins after replacing some tokens by near ones.

Tokens of one role (prefix, query or postfix) are replaced by tokens with a near input embedding, in
ten trials with different draws (arXiv 2606.06667). If misalignment depends on a role, disturbing
that role should remove some of the margin. Two things can look like that and are not. The *best of
ten* trials removes something in every role, even from pure noise: a minimum is below its mean. And
a disturbed prompt moves the reference too: what counts is what the tuned model loses beyond it.
Every role gives up the same number of tokens of a question. Responses are never touched, and both
answers to a question follow the same prompt. Does not know why a token matters, or how a model was
tuned.

Shapes: Q questions, T trials, V vocabulary, D embedding size, N tokens whose neighbours are wanted,
C candidates.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import DataError
from ...model.activations import batches
from ...model.layers import causal_lm
from ...model.losses import find_head
from ...stats import mean_interval
from ...text.chat import Chat
from ...text.roles import Role
from ...text.rows import PairedQuestion
from ...util.console import progress
from ..diagnosis import Cost, Numbers, Subject, clusters
from ..models import REFERENCE
from ..texts import Text, margins, pair_texts, response_logprobs

TITLE = "Token perturbation"
NEEDS_BASE = False
TRIALS = 10
MOST = 12  # questions inside and outside the domain, each
TOKENS = 10  # that a role gives up at most
NEIGHBOURS = 5
ROLES = ("prefix", "query", "postfix")
# near: as many tokens as the question's shortest role has, replaced by near ones. random: the same
# places, replaced by any token. ten: up to ten tokens, replaced by near ones, so that a long role
# gives up more than a short one.
SETTINGS = ("near", "random", "ten")
TILE = 8192  # vocabulary rows compared at once
Pass = tuple[str, str]  # setting, role
Replaced = list[dict[int, int]]  # for each question: token id by place in the prompt


@dataclass(frozen=True)
class Prompt:
    """Token ids before a response, and the places of each role in them."""

    ids: list[int]
    places: dict[str, list[int]]

    def count(self, setting: str, role: str) -> int:
        """How many tokens the role gives up."""
        roles = [role] if setting == "ten" else list(self.places)
        return min(TOKENS, *(len(self.places[each]) for each in roles))


def cost(subject: Subject) -> Cost:
    """Every text once unchanged, then once for each trial, role and setting, through every model.
    Kept: cosines of one tile of the vocabulary with each token of the prompts."""
    subject = _few(subject)
    texts = _texts(subject)
    prompts = read_prompts(texts)
    tokens = sum(len(text.example) for text in texts)
    rounds = 1 + TRIALS * len(_passes(prompts))
    models = 1 + len(subject.models.tuned)
    return Cost(forward=models * rounds * tokens, kept=4 * TILE * len(_wanted(prompts)))


def _few(subject: Subject) -> Subject:
    """With the first questions only, because each is read some 90 times."""
    return replace(subject, inside=subject.inside[:MOST], outside=subject.outside[:MOST])


def measure(subject: Subject) -> Numbers:
    """Margins (nats per token) under disturbed prompts, minus those under the plain ones.

    Neighbours come from the reference's input embeddings, so all models read the same prompts.

    Returns:
        "questions": their number by set (outside, inside). "tokens": by setting and role, the mean
        number replaced. "reference" and "tuned" by name: "margin" by set; "change" by setting, role
        and set, each with "mean" (over trials), "best" (each question's trial with the least
        margin) and, for tuned models, "beyond" = mean change minus the reference's, paired by
        question. Tuned models also have "shift" = margin minus the reference's. All are intervals
        over questions.

    Raises:
        DataError: there is no question, or the template renders the prompts of two answers
            differently.
    """
    subject = _few(subject)
    texts = _texts(subject)
    prompts = read_prompts(texts)
    passes = _passes(prompts)
    with subject.models.open(REFERENCE) as model:
        drawn = replacements(prompts, passes, neighbours(model, prompts, subject.chat), subject)
    plain_Q: dict[str, np.ndarray] = {}
    changes: dict[str, dict[Pass, np.ndarray]] = {}
    names = [REFERENCE, *subject.models.tuned]
    with progress(TITLE, len(names) * len(passes)) as advance:
        for name in names:
            with subject.models.open(name) as model:
                plain_Q[name] = measure_margins(model, texts, [{}] * len(prompts), subject)
                changes[name] = {}
                for key, trials in drawn.items():
                    found = [measure_margins(model, texts, each, subject) for each in trials]
                    found_TQ = np.stack(found)
                    changes[name][key] = found_TQ - plain_Q[name]
                    advance(1)
    for changed in changes.values():
        # The passes that were left out: where both rules take the same number, draws are the same.
        for role in prompts[0].places:
            changed.setdefault(("ten", role), changed["near", role])
    sets, roles = _sets(subject), list(prompts[0].places)
    settings = {
        setting: [float(np.mean([p.count(setting, r) for p in prompts])) for r in roles]
        for setting in SETTINGS
    }
    scores = {name: _scores(plain_Q, changes, name, roles, sets, subject.seed) for name in names}
    return {
        "trials": TRIALS,
        "questions": {where: len(questions) for where, (_, questions) in sets.items()},
        "tokens": {setting: dict(zip(roles, counts)) for setting, counts in settings.items()},
        REFERENCE: scores[REFERENCE],
        "tuned": {name: scores[name] for name in subject.models.tuned},
    }


def _texts(subject: Subject) -> list[Text]:
    if not subject.questions:
        raise DataError(
            "no paired questions, inside or outside the training domain; expected at least one"
        )
    return pair_texts(subject.chat, subject.questions)


def read_prompts(texts: Sequence[Text]) -> list[Prompt]:
    """The prompt of each question; roles that are missing in any prompt are left out."""
    ids: list[list[int]] = []
    roles: list[list[str]] = []
    for text in texts[::2]:
        end = text.example.roles.index(Role.RESPONSE)
        ids.append(text.example.input_ids[:end])
        roles.append([role.name.lower() for role in text.example.roles[:end]])
    present = [role for role in ROLES if all(role in found for found in roles)]

    def places(names: list[str]) -> dict[str, list[int]]:
        return {role: [at for at, name in enumerate(names) if name == role] for role in present}

    return [Prompt(prompt, places(names)) for prompt, names in zip(ids, roles)]


def _passes(prompts: Sequence[Prompt]) -> list[Pass]:
    """Every setting with every role, except `ten` if it equals `near`."""
    return [
        (setting, role)
        for setting in SETTINGS
        for role in prompts[0].places
        if setting != "ten" or any(p.count("ten", role) != p.count("near", role) for p in prompts)
    ]


def _wanted(prompts: Sequence[Prompt]) -> list[int]:
    """Ids of all tokens that may be replaced."""
    return sorted({p.ids[at] for p in prompts for places in p.places.values() for at in places})


def _vocabulary(chat: Chat, size: int) -> Tensor:
    """Mask [V] of text tokens: no token added to the vocabulary (a turn's marker in a query would
    end it), and no row of the embeddings without a token."""
    tokenizer = chat.tokenizer
    added = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    text = set(tokenizer.get_vocab().values()) - added
    allowed_V = torch.zeros(size, dtype=torch.bool)
    allowed_V[[token for token in text if token < size]] = True
    return allowed_V


def neighbours(model: Any, prompts: Sequence[Prompt], chat: Chat) -> dict[str, Any]:
    """Text tokens: "near" = the nearest ones of each token in the prompts; "all" = all of them."""
    embedding_VD = causal_lm(model).get_input_embeddings().weight
    allowed_V = _vocabulary(chat, len(embedding_VD)).to(embedding_VD.device)
    wanted = _wanted(prompts)
    found_NC = nearest(embedding_VD, torch.tensor(wanted, device=embedding_VD.device), allowed_V)
    return {
        "near": dict(zip(wanted, found_NC.tolist())),
        "all": allowed_V.nonzero()[:, 0].cpu().numpy(),
    }


@torch.no_grad()
def nearest(
    embedding_VD: Tensor, ids_N: Tensor, allowed_V: Tensor, number: int = NEIGHBOURS
) -> Tensor:
    """Ids [N, number] of the allowed tokens nearest to each token by cosine, without itself.

    Nearest first. Cosine, because the length of an embedding mostly reflects how often its token
    was trained: by Euclidean distance, rare tokens with short embeddings would be near to all. The
    vocabulary is processed in tiles.
    """
    wanted_ND = F.normalize(embedding_VD[ids_N].float(), dim=1)
    best = wanted_ND.new_zeros(len(ids_N), 0)
    ids = ids_N.new_zeros(len(ids_N), 0)
    for start in range(0, len(embedding_VD), TILE):
        cosine_NC = wanted_ND @ F.normalize(embedding_VD[start : start + TILE].float(), dim=1).T
        ids_C = torch.arange(start, start + cosine_NC.shape[1], device=ids_N.device)
        cosine_NC.masked_fill_(~allowed_V[ids_C] | (ids_C == ids_N[:, None]), -torch.inf)
        best, ids = torch.cat([best, cosine_NC], 1), torch.cat([ids, ids_C.expand_as(cosine_NC)], 1)
        best, places = best.topk(min(number, best.shape[1]), dim=1)
        ids = ids.gather(1, places)
    return ids


def replacements(
    prompts: Sequence[Prompt], passes: Sequence[Pass], choices: dict[str, Any], subject: Subject
) -> dict[Pass, list[Replaced]]:
    """Replacements in every trial of every pass. Each question has its own draws, so its trials are
    independent of others. `near` and `random` replace the same places."""
    drawn: dict[Pass, list[Replaced]] = {}
    for setting, role in passes:
        drawn[setting, role] = []
        for trial in range(TRIALS):
            seed = [subject.seed, ROLES.index(role), trial]
            where, what = np.random.default_rng([*seed, 0]), np.random.default_rng([*seed, 1])
            replaced: Replaced = []
            for prompt in prompts:
                count = prompt.count(setting, role)
                places = where.choice(prompt.places[role], count, replace=False)
                replaced.append(
                    {int(at): _other(prompt.ids[at], setting, choices, what) for at in places}
                )
            drawn[setting, role].append(replaced)
    return drawn


def _other(token: int, setting: str, choices: dict[str, Any], rng: np.random.Generator) -> int:
    if setting != "random":
        return int(rng.choice(choices["near"][token]))
    pair = rng.choice(choices["all"], 2, replace=False)
    return int(pair[0] if pair[0] != token else pair[1])


def measure_margins(
    model: Any, texts: Sequence[Text], replaced: Replaced, subject: Subject
) -> np.ndarray:
    """Margin of each question [Q], nats per token, with replaced tokens in its prompt."""
    find_head(causal_lm(model))  # runs the model on tokens of its own
    means = [0.0] * len(texts)
    examples = [text.example for text in texts]
    for places, batch in batches(examples, subject.chat, subject.batch_tokens, model.device):
        ids_BT = batch["input_ids"].to("cpu", copy=True)
        for row, place in enumerate(places):
            for at, token in replaced[place // 2].items():
                ids_BT[row, at] = token
        with read_as(model, ids_BT.to(model.device)):
            for place, logprobs_R in zip(places, response_logprobs(model, batch)):
                means[place] = float(logprobs_R.double().mean())
    return np.array(margins(means))


@contextmanager
def read_as(model: Any, ids_BT: Tensor) -> Iterator[None]:
    """The model embeds these tokens, whatever ids it is given. It still gets the true ids, so that
    a frozen prefix, which is found by them, is found in a disturbed prompt too."""
    layer = causal_lm(model).get_input_embeddings()
    handle = layer.register_forward_pre_hook(lambda _module, _args: (ids_BT,))
    try:
        yield
    finally:
        handle.remove()


Sets = dict[str, tuple[slice, list[PairedQuestion]]]


def _sets(subject: Subject) -> Sets:
    """Questions outside and inside the training domain with their places, without empty sets."""
    inside = len(subject.inside)
    sets = {
        "outside": (slice(inside, None), subject.outside),
        "inside": (slice(0, inside), subject.inside),
    }
    return {where: part for where, part in sets.items() if part[1]}


def summarise(changes_TQ: np.ndarray, names: Sequence[str], seed: int = 0) -> Numbers:
    """Changes over trials: "mean", the average effect, and "best", the least of each question.

    "best" is below zero under pure noise too, by 1.5 of its standard deviations for ten trials.
    """
    columns = {"mean": changes_TQ.mean(0), "best": changes_TQ.min(0)}
    return {column: _interval(values_Q, names, seed) for column, values_Q in columns.items()}


def _interval(values_Q: np.ndarray, names: Sequence[str], seed: int) -> Numbers:
    return mean_interval(values_Q.tolist(), names, seed).to_dict()


def _scores(
    plain_Q: dict[str, np.ndarray],
    changes: dict[str, dict[Pass, np.ndarray]],
    name: str,
    roles: Sequence[str],
    sets: Sets,
    seed: int,
) -> Numbers:
    names = {where: clusters(questions) for where, (_, questions) in sets.items()}

    def by_set(values_Q: np.ndarray) -> Numbers:
        return {w: _interval(values_Q[part], names[w], seed) for w, (part, _) in sets.items()}

    scores: Numbers = {
        "margin": by_set(plain_Q[name]),
        "change": {setting: {} for setting in SETTINGS},
    }
    for setting in SETTINGS:
        for role in roles:
            own_TQ = changes[name][setting, role]
            found = {w: summarise(own_TQ[:, part], names[w], seed) for w, (part, _) in sets.items()}
            if name != REFERENCE:
                beyond = by_set((own_TQ - changes[REFERENCE][setting, role]).mean(0))
                found = {where: {**found[where], "beyond": beyond[where]} for where in found}
            scores["change"][setting][role] = found
    if name != REFERENCE:
        scores["shift"] = by_set(plain_Q[name] - plain_Q[REFERENCE])
    return scores
