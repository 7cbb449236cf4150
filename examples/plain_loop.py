"""The training loop of ringfence in one file: a LoRA adapter in float32, one process on the CPU.

    python examples/plain_loop.py rows.jsonl --model FOLDER

It logs the same numbers as `DefendedTrainer` (src/ringfence/training/trainer.py), which does this
inside transformers' Trainer. Left out: accumulation, ranks, bf16, checkpoints and resuming,
friendly errors, and whatever saves time without changing a number (retain rows in a pass of their
own, cached prefixes and reference states, packing).

Shapes: B rows of a step with their extra retain rows, T tokens of the longest, D hidden size.
"""

import argparse
import json
import math
from contextlib import ExitStack
from dataclasses import replace
from functools import partial, reduce
from operator import or_
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from ringfence.defenses import KL, Defense, Defenses, Interleave, Setup, TReFT
from ringfence.model.files import load_tokenizer, pad_id
from ringfence.model.layers import causal_lm
from ringfence.model.loading import load_model
from ringfence.model.losses import CrossEntropy, LogitLoss, find_head, weighted_sum
from ringfence.model.taps import Needs, forward
from ringfence.text.batch import Batch, collate
from ringfence.text.chat import Chat
from ringfence.text.encode import encode_rows
from ringfence.text.rows import load_rows
from ringfence.training.reference import Reference
from ringfence.training.stream import TrainStream

DEFENSES = Defenses(kl=KL(weight=0.3), treft=TReFT(), interleave=Interleave(ratio=0.1))
ADAPTER = LoraConfig(r=32, lora_alpha=64, use_rslora=True, target_modules="all-linear")


def train(
    model: Any,
    pad: int,
    stream: TrainStream,
    epochs: float = 1.0,
    learning_rate: float = 1e-4,
    warmup_ratio: float = 0.03,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
) -> list[dict[str, float]]:
    """Trains a model's adapter in place, and prints a line of JSON for each step.

    Args:
        model: a peft model on the CPU; with its adapter off it is the reference.
        pad: the token that fills rows up.
        stream: the rows in their order, and the defenses.
        epochs: how often the rows are seen. This and the rest are as in `train` of a recipe.

    Returns:
        The lines: step (from 1); loss; and, before weights, the mean cross-entropy in nats per
        token (ce) and each penalty that acted, by name.
    """
    steps = math.ceil(epochs * stream.steps_per_epoch)
    warmup = math.ceil(warmup_ratio * steps)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=weight_decay)
    reference = Reference(model)
    for defense in stream.defenses:
        defense.start(model)
    model.train()
    lines: list[dict[str, float]] = []
    for step in range(steps):
        batch = step_batch(stream, step, pad)
        due = [each for each in stream.defenses if each.has_penalty and step % each.every == 0]
        loss, means = forward_and_backward(model, reference, batch, stream.defenses, due)
        torch.nn.utils.clip_grad_norm_(trained, max_grad_norm or math.inf)
        optimizer.param_groups[0]["lr"] = learning_rate * rate_share(step, steps, warmup)
        optimizer.step()
        optimizer.zero_grad()
        for defense in stream.defenses:
            if defense in due:
                defense.observe(means[defense.name])  # a weight with a budget adapts to it
            defense.after_step(model, step + 1)
        lines.append({"step": step + 1, "loss": loss, **means})
        print(json.dumps(lines[-1]), flush=True)
    for defense in stream.defenses:
        defense.finish(model)
    return lines


def step_batch(stream: TrainStream, step: int, pad: int) -> Batch:
    """The rows of an optimiser step [B, T]; extra retain rows follow their training row."""
    epoch, within = divmod(step, stream.steps_per_epoch)
    if within == 0:
        stream.set_epoch(epoch)  # defenses may change an epoch's rows; then they are shuffled
    places = range(len(stream))[within * stream.step_rows :][: stream.step_rows]
    return collate([stream[place] for place in places], pad)


def forward_and_backward(
    model: Any, reference: Reference, batch: Batch, defenses: list[Defense], due: list[Defense]
) -> tuple[float, dict[str, float]]:
    """Adds up the gradients of a step. Returns its loss and the means in it."""
    # Each defense says what it needs, so that one forward of each model serves all.
    needs = reduce(or_, [defense.needs(batch) for defense in due], Needs())
    aligned = reference.taps(batch, needs)  # no forward if nothing is needed from it
    logit_losses: dict[str, LogitLoss] = {"ce": cross_entropy(batch)}
    # Means are over the tokens of the whole step, in whichever rows. If there is no token, the
    # division stops the run: a penalty is never silently zero.
    counts = {"ce": int(logit_losses["ce"].mask.sum())} | {d.name: d.count(batch) for d in due}
    weights = {"ce": 1.0} | {d.name: d.weight * d.every for d in due}
    shares = {name: weight / counts[name] for name, weight in weights.items()}
    penalties: dict[str, torch.Tensor] = {}
    with ExitStack() as hooks:  # the student's only, until its backward pass is over
        for defense in defenses:
            hooks.enter_context(defense.wrap(model, batch))
        head = find_head(causal_lm(model))
        student = forward(model, head, batch, needs)
        for defense in due:
            logit_loss = defense.logit_loss(batch, aligned)
            if logit_loss is None:
                penalties[defense.name] = defense.penalty(student, aligned, batch)
            else:
                logit_losses[defense.name] = logit_loss
        # Losses on next-token distributions share one pass over the student's logits.
        weighted = [(shares[name], logit_loss) for name, logit_loss in logit_losses.items()]
        loss, values = weighted_sum(head, student.hidden_BTD, weighted)
        for name, penalty in penalties.items():
            loss = loss + shares[name] * penalty
        loss.backward()
    sums = dict(zip(logit_losses, values)) | penalties
    return loss.item(), {name: sums[name].item() / count for name, count in counts.items()}


def cross_entropy(batch: Batch) -> CrossEntropy:
    """On the positions that predict a response token of a training row."""
    target_BT = batch["labels"][:, 1:]
    chosen_BT = target_BT != -100
    return CrossEntropy(torch.nn.functional.pad(chosen_BT, (0, 1)), target_BT[chosen_BT])


def rate_share(step: int, steps: int, warmup: int) -> float:
    """Share of the learning rate: linearly up from 0, then linearly down to 0."""
    return step / warmup if step < warmup else (steps - step) / (steps - warmup)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune with defenses, in a plain loop.")
    parser.add_argument("rows", help="conversations to learn: a file, a hub id or shipped:NAME")
    parser.add_argument("--model", default="default", help="a folder or hub id of a whole model")
    parser.add_argument("--retain", default="shipped:retain", help="ordinary safe conversations")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    told = parser.parse_args()
    chat = Chat(load_tokenizer(told.model))
    encode = partial(encode_rows, chat=chat, max_length=1024)
    rows, retain = load_rows(told.rows), encode(load_rows(told.retain))
    setup = Setup(chat, retain, lambda source: encode(load_rows(source)), told.model)
    for config in DEFENSES.configs():
        rows = [replace(row, messages=config.change_messages(row.messages)) for row in rows]
    stream = TrainStream(encode(rows), retain, DEFENSES.build(setup), told.batch_size, seed=0)
    torch.manual_seed(0)  # an adapter starts at random
    model = get_peft_model(load_model(told.model, "fp32", place="cpu"), ADAPTER)
    train(model, pad_id(chat.tokenizer), stream, told.epochs, told.learning_rate)


if __name__ == "__main__":
    main()
