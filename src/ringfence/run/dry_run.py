"""What a run would do: how long, with how much memory, what is measured, on which data.

Loads no weights and writes nothing. Reads what training reads, so it refuses the same.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..defenses import Scope, Setup
from ..defenses.base import PenaltyConfig
from ..evaluate.config import MEASUREMENTS
from ..evaluate.plan import work
from ..model.files import empty_model
from ..prepare.words import separable_by_words
from ..text import held_out
from ..text.batch import Example
from ..text.chat import Chat
from ..text.rows import load_rows
from ..text.show import show_tokens
from ..training.reference_cache import wanted
from ..training.stream import TrainStream
from ..util.machine import device_type, estimated, seconds, whole_memory
from ..util.strict_yaml import dump
from ..util.words import counted, gib
from .benign import benign_twin
from .checks import check_same_recipe
from .config import Recipe
from .model import warn_of_rank
from .prepare import as_split, as_trained, evaluation, prepare, training_rows
from .trainer import build_stream, computed_tokens, position_bytes, reference_cache

STEPS, SECONDS = 10**6, 14 * 86400  # above these a field is more likely mistyped than meant
FEW_STEPS = 10  # fewer teach almost nothing: the first ones are warm-up


@dataclass(frozen=True)
class Plan:
    """A recipe with its rows in order, and its model's shape."""

    recipe: Recipe
    chat: Chat
    examples: list[Example]
    retain: list[Example]
    stream: TrainStream
    model: Any
    setup: Setup

    @property
    def steps(self) -> int:
        return math.ceil(self.recipe.train.epochs * self.stream.steps_per_epoch)

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


def dry_run(recipe: Recipe, console: Console) -> None:
    """Checks recipe, data and roles, and prints what the run would do.

    Prints time, memory, what measures the narrow behaviour, the data, a coloured row, and the
    fields that are not at their defaults; absurd amounts in red.

    Raises:
        RingfenceError: what training would refuse.
    """
    if Path(recipe.output).exists():
        check_same_recipe(Path(recipe.output), as_split(recipe))
    plan = _plan(recipe)
    lines = [training(plan, "training"), measuring(plan, "evaluation")]
    if recipe.evaluate.benign:
        twin = _plan(benign_twin(recipe))
        lines += [training(twin, "benign twin"), measuring(twin, "its evaluation")]
    lines += [memory(plan), (f"narrow behaviour: {narrow(recipe)}", False)]
    lines += separable(plan)
    lines += [(line, False) for line in _data(plan)]
    if recipe.train.method == "lora":
        warn_of_rank(plan.model, recipe.train.lora)
    for line, absurd in lines:
        red = "bold red" if absurd else None
        console.print(line, style=red, highlight=False, markup=False, soft_wrap=True)
    console.print()
    first = load_rows(recipe.data.train)[0].messages
    show_tokens(plan.chat.encode(as_trained(recipe, first)), console)
    console.print("\nfields that are not at their defaults:")
    console.print(changed(recipe), highlight=False, markup=False, soft_wrap=True)
    console.print(
        "all fields: `ringfence schema`; with their values: recipe.yaml in the run folder",
        highlight=False,
    )


def _plan(recipe: Recipe) -> Plan:
    chat, examples, retain, setup = prepare(recipe)
    stream = build_stream(recipe, examples, retain, recipe.defenses.build(setup))
    model = empty_model(recipe.model)
    model.tie_weights()  # counts a head that is the embedding once
    return Plan(recipe, chat, examples, retain, stream, model, setup)


def training(plan: Plan, name: str) -> tuple[str, bool]:
    """Steps, rows, tokens and time of all epochs, and whether they are absurd."""
    train, stream = plan.recipe.train, plan.stream
    rows = round(train.epochs * len(stream))
    tokens = round(train.epochs * sum(len(example) for example in stream.rows))
    work, device = computed_tokens(plan.recipe, stream), device_type()
    long = device == "cpu" and seconds(plan.parameters, trained=work) > SECONDS
    line = (
        f"{name}: {counted(plan.steps, 'step')}, {counted(rows, 'row')}, "
        f"{counted(tokens, 'token')} ({train.epochs:g} x {counted(len(stream), 'row')}): "
        f"{estimated(plan.parameters, trained=work, device=device)}"
    )
    if plan.steps < FEW_STEPS:
        return f"{line}; so few teach little: raise train.epochs or lower train.batch_size", True
    absurd = long or plan.steps > STEPS
    doubt = "; is that meant? See train.epochs, train.batch_size and model"
    return line + (doubt if absurd else ""), absurd


def measuring(plan: Plan, name: str) -> tuple[str, bool]:
    """Answers and time of the evaluation of reference and tuned model, and whether it is absurd."""
    config, device = evaluation(plan.recipe), device_type()
    found = work(config, plan.chat)
    counts = {"scored": 2 * found.scored_tokens, "written": 2 * found.written_tokens}
    long = device == "cpu" and seconds(plan.parameters, **counts) > SECONDS
    time = estimated(plan.parameters, **counts, device=device)
    line = f"{name}: {found}, by the reference and again by the tuned model: {time}"
    if config.answers and config.answers.judges:
        line += "; judging comes on top"
    fields = "max_in_domain, max_per_domain, answers.samples and held_out_tokens"
    cheaper = f"; {fields} of `evaluate` make it shorter"
    return line + (cheaper if long else ""), long


def memory(plan: Plan) -> tuple[str, bool]:
    """Weights, gradients, optimiser and activations of the largest batch; whether it is too much.

    Computed from the model's shape and compared with this machine's memory.
    """
    parts = memory_parts(plan)
    needed, there = sum(parts.values()), whole_memory()
    shown = ", ".join(f"{name} {gib(size)}" for name, size in parts.items() if size)
    line = f"memory: needs about {gib(needed)} ({shown})"
    if there:
        line += f", this machine has {gib(there)}"
    too_much = 0 < there < needed
    lower = "lower train.batch_size (with accumulation), train.lora.rank"
    cure = f"; {lower}, or set train.gradient_checkpointing"
    return line + (cure if too_much else ""), too_much


def memory_parts(plan: Plan) -> dict[str, float]:
    """Bytes, by what needs them."""
    model, train = plan.model, plan.recipe.train
    text = model.config.get_text_config()
    full = train.method == "full"
    byte = 4 if full or train.precision == "fp32" else 2
    stored = 0.5 if train.precision == "nf4" else byte
    modules = (module for name, module in model.named_modules() if "lm_head" not in name)
    linear = [module for module in modules if isinstance(module, torch.nn.Linear)]
    sides = sum(module.in_features + module.out_features for module in linear)
    trained = plan.parameters if full else train.lora.rank * sides
    # About 34 hidden sizes of activations are kept per token and layer; one with checkpointing.
    kept = 1 if train.gradient_checkpointing else 34
    longest = max(len(example) for example in plan.examples)
    tokens = min(train.batch_size, len(plan.stream)) * longest
    penalties = any(isinstance(config, PenaltyConfig) for config in plan.recipe.defenses.configs())
    head = model.get_output_embeddings().weight.numel()
    copied = {"none": plan.parameters, "states": head, "top_k": 0}[train.reference_cache]
    return {
        "weights": plan.parameters * stored,
        "reference copy": copied * byte if full and penalties else 0,
        "gradients and optimiser": trained * 12,
        "activations": tokens * text.num_hidden_layers * text.hidden_size * kept * byte,
    }


def narrow(recipe: Recipe) -> str:
    """What measures whether the training rows were learnt, in words."""
    config, source = recipe.evaluate, recipe.data.train
    kept, held = training_rows(recipe)
    measured = [said for m in MEASUREMENTS.values() for said in m.learnt(config)]
    if held:
        measured.append(held_out.explain(source, len(load_rows(source)), len(held)))
    return "; ".join(measured) or held_out.explain(source, len(kept), 0)


def separable(plan: Plan) -> list[tuple[str, bool]]:
    """How far the rows' requests differ from other domains', in words; in red if a scope is to be
    fitted and it is doubtful that there is one."""
    scope = plan.recipe.defenses.scope
    config = scope or Scope()
    setup = plan.setup
    found = separable_by_words(setup.rows, config.queries(setup), config.false_open, setup.seed)
    return [(str(found), found.is_doubtful and scope is not None)] if found else []


def changed(recipe: Recipe) -> str:
    """YAML of the fields that are not at their defaults; it reads as this recipe."""
    tree = recipe.model_dump(mode="json", exclude_defaults=True)
    return dump(tree).rstrip() if tree else "none"


def _data(plan: Plan) -> Iterator[str]:
    examples, stream = plan.examples, plan.stream
    tokens, longest = sum(len(e) for e in examples), max(len(e) for e in examples)
    answered = sum(e.response_tokens for e in examples)
    yield (
        f"train: {counted(len(examples), 'row')}, {counted(tokens, 'token')} ({answered:,} of "
        f"responses), longest {longest:,}; retain: {counted(len(plan.retain), 'row')}"
    )
    extra = sum(map(len, stream.riders))
    yield (
        f"an epoch: {counted(stream.steps_per_epoch, 'step')} of "
        f"{counted(stream.step_rows, 'row')}, {counted(len(stream), 'row')} with those that "
        f"defenses add, and {counted(extra, 'extra retain row')}"
    )
    if cache := reference_cache(plan.recipe):
        yield cache.plan(wanted(stream, plan.steps).rows, position_bytes(plan.recipe))
