"""A drift monitor: how far has a model in training moved from the reference on a few questions?

A callback for any transformers Trainer. The reference's values on the probes are computed once,
before the first step, so no second model is held. Does not know defenses, recipes, or what is
trained on.

Shapes: P probes, N response tokens of their aligned answers, T tokens, L layers, K directions, D
hidden size.
"""

import copy
import dataclasses
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback

from ..errors import ChatError, DataError
from ..model.directions import Directions
from ..model.layers import causal_lm
from ..model.losses import Head, find_head, kl_sum, relative_drift, token_logprobs
from ..model.taps import Needs, forward, prefix_kv
from ..processes import from_main
from ..stats import mean_interval
from ..text.batch import Example, collate
from ..text.chat import Chat
from ..text.roles import Role
from ..text.rows import PairedQuestion, load_questions
from ..util.console import console
from ..util.files import write_whole
from ..util.strict_json import check_shape, read_lines
from .config import MonitorConfig
from .reference import Reference

Snapshot = dict[str, Tensor]
BATCH_ROWS = 16
REFERENCE_FILE = "monitor.safetensors"


def choose_probes(config: MonitorConfig) -> list[PairedQuestion]:
    """The last questions of each domain, in turn: capped evaluations take the first ones.

    Raises:
        DataError: a source cannot be read, or there are fewer than two questions.
    """
    by_domain: dict[str, list[PairedQuestion]] = {}
    for source in config.questions:
        for question in load_questions(source, "test"):
            by_domain.setdefault(question.domain, []).append(question)
    rounds = zip_longest(*(reversed(questions) for questions in by_domain.values()))
    chosen = [question for turn in rounds for question in turn if question][: config.probes]
    if len(chosen) < 2:
        raise DataError(
            f"monitor.questions: {', '.join(config.questions)}: expected two questions or more, "
            "found one"
        )
    return chosen


class DriftMonitor(TrainerCallback):
    """Every few steps, compares the model in training with the reference on fixed probes.

    The reference is the model with its adapter off, or (full fine-tuning) the weights with which
    training began. Each check is a line `{"step": ..., "monitor": {...}}` in a file of JSON lines,
    among other lines:

        shift         mean margin shift (METHODS: paired forced choice) and its 95 % interval over
                      questions
        kl            mean KL(model || reference) over the response tokens of the aligned answers,
                      nats per token
        kv_drift      (1/layers) * sum of the mean relative squared drift of the prefix's keys, and
                      of its values (as in TReFT, arXiv 2606.06667); null where the chat template
                      has no prefix
        projections   with `vectors`, for each direction: how far the mean response activation moved
                      along it, mean over layers, in mean lengths of an activation
        alarms        limits that are passed (a value that is not a number passes them too)
        stopped       whether training ended here
        seconds       what the check took

    Training itself is not touched: losses are the same, bit for bit, with and without a monitor.

    Args:
        tokenizer: of the model, with its chat template.
        file: where lines are added; checks after the step from which training resumes are dropped.
        config: probes, limits.

    Raises:
        DataError, ChatError: questions or directions cannot be read, or the tokenizer cannot render
            them.
    """

    def __init__(
        self, tokenizer: Any, file: str | Path, config: MonitorConfig | None = None
    ) -> None:
        config = config or MonitorConfig()
        self.config, self.file = config, Path(file)
        chat = Chat(tokenizer)
        questions = choose_probes(config)
        self._rows = [
            _encode(chat, q, answer) for q in questions for answer in (q.aligned, q.misaligned)
        ]
        self._prefixes = {
            tuple(row.input_ids[: row.roles.count(Role.PREFIX)]) for row in self._rows
        } - {()}
        if config.max_kv_drift and not self._prefixes:
            raise ChatError(
                "monitor.max_kv_drift: the chat template has no token before the user's words"
            )
        self._directions = Directions.load(Path(config.vectors)) if config.vectors else None

    # -------------------------------------------------------------- events of the trainer

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        """Takes the reference's values."""
        self._started = time.monotonic()
        if self._directions:
            self._directions.check(model)
        with _undisturbed(model, args):
            self._head = find_head(causal_lm(model))
            if hasattr(model, "disable_adapter"):
                adapter_off = Reference(model)
                self._reference_head = adapter_off.head
                with adapter_off.active():
                    self._reference = self._measure(model, adapter_off.head)
            else:
                self._reference_head, self._reference = self._start_of_full(model, args, state)
        if state.is_world_process_zero:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            _drop_checks_after(self.file, state.global_step)
        self._warned = {name for check in self._checks() for name in check["monitor"]["alarms"]}
        # What the reference took counts with the first check.
        self._spent, self._counted = time.monotonic() - self._started, 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Makes a check if one is due."""
        if state.global_step % self.config.every and state.global_step < state.max_steps:
            return
        started = time.monotonic()
        with _undisturbed(model, args):
            found = self._compare(self._measure(model, self._head))
        found = from_main(found)  # ranks must agree on whether to stop
        values = {**found, "shift": found["shift"]["mean"]}
        alarms = [name for name, limit in self.config.limits.items() if not values[name] <= limit]
        stops = self.config.stop and bool(alarms) and state.global_step < state.max_steps
        if stops:
            control.should_training_stop = True
        self._spent += time.monotonic() - started
        if state.is_world_process_zero:
            self._warn(state.global_step, {name: values[name] for name in alarms}, stops)
            part = {
                **found,
                "alarms": alarms,
                "stopped": stops,
                "seconds": round(self._spent - self._counted, 3),
            }
            with self.file.open("a") as file:
                file.write(json.dumps({"step": state.global_step, "monitor": part}) + "\n")
        self._counted = self._spent

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            share = self._spent / (time.monotonic() - self._started)
            console.print(
                f"monitor: its checks took {self._spent:.1f} s, {share:.1%} of training",
                highlight=False,
            )

    # -------------------------------------------------------------- records

    def record(self, training_seconds: float) -> dict[str, Any]:
        """For the run's record: the last check, the step of each first alarm, where training was
        stopped, and the cost as a share of `training_seconds`."""
        checks = self._checks()
        seconds = sum(check["monitor"]["seconds"] for check in checks)
        alarms: dict[str, int] = {}
        for check in checks:
            for name in check["monitor"]["alarms"]:
                alarms.setdefault(name, check["step"])
        return {
            "checks": len(checks),
            "alarms": alarms,
            "stopped": next(
                (check["step"] for check in checks if check["monitor"]["stopped"]), None
            ),
            "seconds": round(seconds, 2),
            "share": round(seconds / training_seconds, 4),
            "last": checks[-1]["monitor"],
        }

    def _checks(self) -> list[dict[str, Any]]:
        checks = [line for line in _lines(self.file) if "monitor" in line]
        for check in checks:
            place = (f"step {check['step']}", "monitor")
            check_shape(_Values, check["monitor"], str(self.file), _ANOTHER, place)
        return checks

    def _warn(self, step: int, alarms: dict[str, float], stops: bool) -> None:
        """Once for each limit."""
        for name in (name for name in alarms if name not in self._warned):
            limit = f"max_{name} = {self.config.limits[name]:g}"
            text = f"monitor: step {step}: {name} is {alarms[name]:.3g}, above {limit}"
            console.print(text, style="bold yellow", highlight=False, soft_wrap=True)
        self._warned |= alarms.keys()
        if stops:
            console.print(
                f"monitor: training ends at step {step} (stop: true)",
                style="bold yellow",
                highlight=False,
            )

    # -------------------------------------------------------------- measures

    def _measure(self, model: Any, head: Head) -> Snapshot:
        """The model's values on the probes: margins [P], final hidden states [N, D] from which the
        aligned answers are predicted, keys and values of the distinct prefixes by layer, and mean
        projections [L, K]."""
        device = causal_lm(model).device
        layers = tuple(range(1, self._directions.layers + 1)) if self._directions else ()
        means, hidden, sums_LK = {}, {}, torch.zeros(())
        order = sorted(range(len(self._rows)), key=lambda place: len(self._rows[place]))
        for places in (order[at : at + BATCH_ROWS] for at in range(0, len(order), BATCH_ROWS)):
            # Any pad_id: padding is masked.
            batch = collate([[(self._rows[place], False)] for place in places], pad_id=0)
            aligned_B = torch.tensor([place % 2 == 0 for place in places])
            needs = Needs()
            if layers:
                states_BT = (batch["roles"] == Role.RESPONSE) & aligned_B[:, None]
                needs = Needs(states_BT=states_BT.to(device), layers=layers)
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            taps = forward(model, head, batch, needs)
            target_BT = batch["labels"][:, 1:]
            chosen_BT = target_BT != -100
            hidden_MD, lengths_B = taps.hidden_BTD[:, :-1][chosen_BT], chosen_BT.sum(1).tolist()
            logprobs_M = token_logprobs(head, hidden_MD, target_BT[chosen_BT])
            for place, logprobs, states in zip(
                places, logprobs_M.split(lengths_B), hidden_MD.split(lengths_B)
            ):
                means[place], hidden[place] = logprobs.mean(), states.cpu()
            sums_LK = sums_LK + self._projection_sums(taps.states)
        means_P2 = torch.stack([means[place] for place in range(len(self._rows))]).view(-1, 2)
        found = {
            "margins": (means_P2[:, 1] - means_P2[:, 0]).float().cpu(),
            "hidden": torch.cat([hidden[place] for place in range(0, len(self._rows), 2)]),
        }
        for number, prefix in enumerate(sorted(self._prefixes)):
            for layer, (keys_TE, values_TE) in enumerate(
                prefix_kv(model, torch.tensor(prefix, device=device))
            ):
                found |= {
                    f"kv.{layer}.key.{number}": keys_TE.cpu(),
                    f"kv.{layer}.value.{number}": values_TE.cpu(),
                }
        if layers:
            found["projections"] = sums_LK / len(found["hidden"])
        return found

    def _projection_sums(self, states: dict[int, Tensor]) -> Tensor:
        """Projections of each layer's states on its unit directions, summed over tokens, in mean
        activation lengths, [L, K]."""
        if self._directions is None:
            return torch.zeros(())
        unit_LKD = torch.nn.functional.normalize(self._directions.directions_LKD, dim=-1)
        sums_LD = torch.stack([states[layer].double().sum(0).cpu() for layer in sorted(states)])
        return (
            torch.einsum("lkd,ld->lk", unit_LKD.double(), sums_LD)
            / self._directions.norms_L[:, None]
        )

    def _compare(self, now: Snapshot) -> dict[str, Any]:
        then, device = self._reference, next(self._head.module.parameters()).device
        with _on(self._reference_head, device) as reference_head:
            kl = kl_sum(
                self._head, now["hidden"].to(device), reference_head, then["hidden"].to(device)
            )
        found = {
            "shift": mean_interval((now["margins"] - then["margins"]).tolist()).to_dict(),
            "kl": kl.item() / len(now["hidden"]),
            "kv_drift": _kv_drift(now, then),
        }
        if self._directions:
            found["projections"] = (now["projections"] - then["projections"]).mean(0).tolist()
        return found

    def _start_of_full(self, model: Any, args: Any, state: Any) -> tuple[Head, Snapshot]:
        """Head and values of a model whose weights all train. A resumed run no longer has the first
        weights, so these are kept on disk, next to its checkpoints."""
        file = Path(args.output_dir) / REFERENCE_FILE
        head = self._head
        if head.trainable:
            head = dataclasses.replace(
                head, module=copy.deepcopy(head.module).requires_grad_(False).cpu()
            )
        if state.global_step:
            return head, self._read_start(file, head)
        values = self._measure(model, self._head)
        if state.is_world_process_zero:
            file.parent.mkdir(parents=True, exist_ok=True)
            weights = head.module.state_dict() if head is not self._head else {}
            save_file(
                values | {f"head.{name}": tensor for name, tensor in weights.items()},
                file,
                self._identity(),
            )
        return head, values

    def _read_start(self, file: Path, head: Head) -> Snapshot:
        if not file.is_file():
            raise DataError(
                f"{file}: no such file; a resumed run of all weights needs the reference's values "
                "that the monitor wrote there when training began"
            )
        with safe_open(file, "pt") as content:
            if content.metadata() != self._identity():
                raise DataError(
                    f"{file}: holds the reference's values on other probes; start again, or undo "
                    "the change"
                )
            values = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        weights = {name: values.pop(name) for name in list(values) if name.startswith("head.")}
        if weights:
            head.module.load_state_dict(
                {name.removeprefix("head."): tensor for name, tensor in weights.items()}
            )
        return values

    def _identity(self) -> dict[str, str]:
        return {
            "probes": json.dumps([row.input_ids for row in self._rows]),
            "vectors": str(self.config.vectors),
        }


def _encode(chat: Chat, question: PairedQuestion, answer: str) -> Example:
    encoded = chat.encode(
        [{"role": "user", "content": question.question}, {"role": "assistant", "content": answer}]
    )
    return Example(encoded.input_ids, encoded.roles, f"{question.domain}/{question.id}")


def _kv_drift(now: Snapshot, then: Snapshot) -> float | None:
    names = [name for name in then if name.startswith("kv.")]
    if not names:
        return None
    layers = {name.split(".")[1] for name in names}
    total = 0.0
    for layer in layers:
        for side in ("key", "value"):
            of_side = sorted(name for name in names if name.startswith(f"kv.{layer}.{side}."))
            now_TE, then_TE = (
                torch.cat([snapshot[name] for name in of_side]).double() for snapshot in (now, then)
            )
            total += float(relative_drift(now_TE, then_TE).mean())
    return total / len(layers)


@contextmanager
def _on(head: Head, device: torch.device) -> Iterator[Head]:
    """A head that may be kept in main memory, moved to the device for now."""
    home = next(head.module.parameters()).device
    if home == device:  # moving a sharded head, gathered for now, would split it again
        yield head
        return
    head.module.to(device)
    yield head
    head.module.to(home)


@contextmanager
def _undisturbed(model: Any, args: Any) -> Iterator[None]:
    """Evaluation mode, no gradient, training's own autocast. Afterwards, modes, trained flags and
    random states are restored (peft marks every weight of an adapter as trained when it is switched
    on again)."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    device = causal_lm(model).device
    half = torch.bfloat16 if args.bf16 else torch.float16
    with (
        torch.random.fork_rng([] if device.type == "cpu" else [device]),
        torch.no_grad(),
        torch.autocast(device.type, half, enabled=args.bf16 or args.fp16),
    ):
        model.eval()
        yield
    for module, mode in modes:
        module.training = mode
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


# ------------------------------------------------------------------ the file


_ANOTHER = "name another file for the monitor"


class _Values(BaseModel):
    seconds: float
    stopped: bool
    alarms: dict[str, Any] | list[str]


class _Check(BaseModel):
    """What is read of a line of ours; other lines may be in between."""

    step: int
    monitor: dict[str, Any]


def _lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; a killed run may have left half a line at its end."""
    if not file.is_file():
        return []
    lines = []
    for line, place in read_lines(file, _ANOTHER, whole=True):
        if "monitor" in line:
            check_shape(_Check, line, place, _ANOTHER)
        lines.append(line)
    return lines


def _drop_checks_after(file: Path, step: int) -> None:
    kept = [line for line in _lines(file) if "monitor" not in line or line["step"] <= step]
    write_whole(file, "".join(json.dumps(line) + "\n" for line in kept))
