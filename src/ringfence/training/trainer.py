"""DefendedTrainer: transformers' Trainer with penalties of defenses added to the cross-entropy.

For all defenses together, a row passes once through the student and at most once through the
reference. Knows defenses only through their contract.
"""

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial, reduce
from operator import or_
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate.data_loader import prepare_data_loader
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ..defenses.base import Defense
from ..errors import DataError, DefenseError, RecipeError, first_line
from ..model.layers import causal_lm
from ..model.losses import CrossEntropy, LogitLoss, find_head, weighted_sum
from ..model.sharding import gathered, is_sharded, load_whole_again, note_trained, reshard
from ..model.taps import Layout, Needs, check_layout, forward
from ..runfolder.folder import begin_checkpoint, end_checkpoint
from ..runfolder.shapes import read_metrics
from ..text.batch import Batch, Bundle, collate
from ..text.roles import Role
from ..util.files import told_if_full, write_whole
from ..util.strict_json import check_shape, read_record
from .ranks import autocast_in_deepspeed, deepspeed_stage, largest, shard_on_cpu, wait
from .reference import Reference
from .reference_cache import ReferenceCache, wanted
from .stream import RankBatches, TrainStream

_CHECKPOINT = "delete its folder, and the run resumes from an earlier step, or starts again"


class DefendedTrainer(Trainer):
    """Trains `model` on a stream with defenses.

    Args:
        model: a causal language model, plain or with a peft adapter.
        args: training arguments; `remove_unused_columns` must be off.
        stream: the rows in order.
        defenses: built defenses; penalties are token means over the whole optimiser step, as
            cross-entropy is.
        pad_id: token for padding.
        log_file: a line of JSON for every log; lines after the step from which a run resumes are
            dropped.
        layout: how batches are computed (see taps); ModelError if the model cannot.
        cache: holds the reference's states; filled before training.
    """

    # compute_loss divides by the token count of the whole step itself.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        stream: TrainStream,
        defenses: list[Defense],
        pad_id: int,
        log_file: Path,
        layout: Layout = "padded",
        cache: ReferenceCache | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            model,
            args,
            train_dataset=stream,
            data_collator=partial(_collate, stream, pad_id),
            **kwargs,
        )
        self.remove_callback(PrinterCallback)
        self.defenses = defenses
        self.log_file = log_file
        self.head = find_head(causal_lm(model))
        # ZeRO-3 would shard modules inside the head again after each tile.
        if deepspeed_stage() == 3 and [*self.head.module.children()]:
            raise RecipeError(
                "train.lora.targets: found an adapter on the head, which DeepSpeed ZeRO-3 cannot "
                "train; accepted: modules of the layers alone, or DDP, FSDP2, ZeRO-2"
            )
        self._set_layout(layout)
        self.cache, self._cache_filled = cache, False
        # FSDP2 shards a layer's weights in one type.
        autocast = torch.bfloat16 if args.bf16 and not self.is_fsdp_enabled else None
        has_penalty = any(defense.has_penalty for defense in defenses)
        self.reference = Reference(model, layout, cache, autocast) if has_penalty else None
        self.add_callback(_StepEnd(self._end_step))
        self._hooks = ExitStack()
        self._step_counts: dict[str, int] = {}
        self._step_sums: dict[str, Tensor] = {}
        self._log_sums: dict[str, float] = defaultdict(float)
        self._log_steps: dict[str, int] = defaultdict(int)
        self._started = time.monotonic()

    def _set_layout(self, layout: Layout) -> None:
        check_layout(cast(nn.Module, self.model), self.head, layout)
        self.layout = layout
        whole_rows = layout == "shared" and any(defense.whole_rows for defense in self.defenses)
        self.student_layout: Layout = "padded" if whole_rows else layout

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        shard_on_cpu(self.accelerator)
        autocast_in_deepspeed(self.accelerator, self.args.bf16)
        self.is_fsdp_enabled = getattr(self.accelerator.state, "fsdp_plugin", None) is not None

    # -------------------------------------------------------------- loss

    def compute_loss(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """Cross-entropy plus weighted penalties of a micro-batch: its part of the step's mean."""
        active = [defense for defense in self._due() if defense.count(inputs)]
        needs = reduce(or_, [defense.needs(inputs) for defense in active], Needs())
        # The reference comes first: hooks of defenses are for the student alone.
        sharded = is_sharded(self.model)
        note_trained(self.model)
        # With a sharded model all ranks must ask.
        asks = active or (sharded and self._due())
        with self._autocast():  # a frozen copy computes as the student does
            reference = self.reference.taps(inputs, needs) if self.reference and asks else None
        # A prefix is computed by a part of the model, which cannot run alone if it is sharded.
        givers = [] if sharded or self.layout == "packed" else self.defenses
        prefixes = (defense.cached_prefix(self.model, inputs, needs) for defense in givers)
        prefix = next((prefix for prefix in prefixes if prefix is not None), None)
        for defense in self.defenses:
            self._hooks.enter_context(defense.wrap(self.model, inputs))
        student = forward(model, self.head, inputs, needs, prefix, self.student_layout, self._hooks)
        # Until the backward pass is over: the gradient of a trained head needs it gathered.
        self._hooks.enter_context(gathered(self.head.module.parameters()))
        logit_losses: dict[str, LogitLoss] = {"ce": _cross_entropy(inputs)}
        penalties: dict[str, Tensor] = {}
        for defense in active:
            assert reference is not None
            logit_loss = defense.logit_loss(inputs, reference)
            if logit_loss is None:
                penalties[defense.name] = defense.penalty(student, reference, inputs)
            else:
                logit_losses[defense.name] = logit_loss
        factors = {"ce": 1.0} | {defense.name: defense.weight * defense.every for defense in active}
        shares = {name: factor / self._step_counts[name] for name, factor in factors.items()}
        weighted = [(shares[name], logit_loss) for name, logit_loss in logit_losses.items()]
        loss, sums = weighted_sum(self.head, student.hidden_BTD, weighted)
        for defense in active:
            if torch.is_grad_enabled() and not penalties.get(defense.name, loss).requires_grad:
                raise DefenseError(f"defenses.{defense.name}: its penalty has no gradient")
        for name, total in penalties.items():
            loss = loss + shares[name] * total
        for name, total in (penalties | dict(zip(logit_losses, sums))).items():
            self._step_sums[name] = self._step_sums[name] + total.detach() / self._step_counts[name]
        # Gradients are averaged over ranks, while the counts are sums over them.
        return loss * self.accelerator.num_processes

    def training_step(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Forward and backward; retain rows go first, on their own, so they share no memory."""
        loss = torch.zeros((), device=self.args.device)
        *first, last = self._passes(inputs)
        for part in first:
            with self.accelerator.no_sync(model):
                loss += self._forward_and_backward(model, part, *args, **kwargs)
        return loss + self._forward_and_backward(model, last, *args, **kwargs)

    def _passes(self, batch: Batch) -> list[Batch]:
        """The passes of a micro-batch: one with DeepSpeed, which counts them. With a sharded model
        all ranks have the same number."""
        if deepspeed_stage() is not None:
            return [batch]
        # Places, found once: each use of a mask would wait for the device.
        kinds = [rows_B.nonzero()[:, 0] for rows_B in (batch["retain"], ~batch["retain"])]
        parts = [_part(batch, rows_N) for rows_N in kinds if len(rows_N)]
        most = largest(len(parts), self.args.device) if is_sharded(self.model) else len(parts)
        return [_blank(batch)] * (most - len(parts)) + parts

    def _forward_and_backward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Hooks stay until the backward pass is over: checkpointed layers run again there."""
        with self._hooks:
            return super().training_step(*args, **kwargs)

    def _autocast(self) -> torch.autocast:
        """As the student computes. (accelerate's own context forgets that the model is sharded.)"""
        return torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16)

    def _due(self) -> list[Defense]:
        """Defenses whose penalty acts in this optimiser step."""
        return [d for d in self.defenses if d.has_penalty and self.state.global_step % d.every == 0]

    def _get_num_items_in_batch(
        self, batch_samples: list[Batch], device: torch.device
    ) -> Tensor | int | None:
        """Token counts of an optimiser step over micro-batches and ranks, the divisors of means."""
        due = self._due()
        counts = torch.zeros(1 + len(due), dtype=torch.long, device=device)
        for batch in batch_samples:
            counts += torch.tensor(
                [
                    int((batch["labels"][:, 1:] != -100).sum()),
                    *(defense.count(batch) for defense in due),
                ],
                device=device,
            )
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, "sum")
        self._step_counts = dict(zip(["ce", *(defense.name for defense in due)], counts.tolist()))
        for name, count in self._step_counts.items():
            if not count:
                raise DefenseError(
                    f"step {self.state.global_step}: no token in the batch for {name!r}: it would "
                    "be silently zero"
                )
        self._step_sums = {name: torch.zeros((), device=device) for name in self._step_counts}
        return counts[0]

    def _end_step(self) -> None:
        """After an optimiser step: means over its micro-batches and ranks, for defenses and log."""
        sums = torch.stack([self._step_sums[name].float() for name in self._step_counts])
        if self.args.world_size > 1:
            sums = self.accelerator.reduce(sums, "sum")
        means = dict(zip(self._step_counts, sums.tolist()))
        for name, mean in means.items():
            if not math.isfinite(mean):
                raise DefenseError(
                    f"step {self.state.global_step - 1}: {name!r} is {mean}; try a smaller "
                    "learning rate or fp32"
                )
            self._log_sums[name] += mean
            self._log_steps[name] += 1
        for defense in self.defenses:
            if defense.name in means:
                defense.observe(means[defense.name])
            defense.after_step(self.model, self.state.global_step)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The stream has its own order; ranks share each step's rows (accelerate would repeat some
        to even out the last step, so this loader claims to be for one process)."""
        stream = cast(TrainStream, self.train_dataset)
        rank, world = self.args.process_index, self.args.world_size
        batches = RankBatches(stream, self.args.train_batch_size, rank, world)
        loader: DataLoader[Any] = DataLoader(
            stream,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return prepare_data_loader(
            loader, self.args.device, num_processes=1, process_index=0, put_on_device=True
        )

    # -------------------------------------------------------------- records

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds each penalty's mean since the last log, and writes the line to the run's metrics."""
        if "loss" in logs and self._log_sums:
            for name, value in self._log_sums.items():
                logs[name] = round(value / self._log_steps[name], 6)
            for defense in self.defenses:
                if "weight" in defense.state_dict():
                    logs[f"{defense.name}_weight"] = defense.weight
            self._log_sums.clear()
            self._log_steps.clear()
        super().log(logs, start_time)
        if "loss" in logs and self.is_world_process_zero():
            line = {
                "step": self.state.global_step,
                **logs,
                "seconds": round(time.monotonic() - self._started, 2),
            }
            with self.log_file.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Trains, from a checkpoint folder if given; see transformers' Trainer."""
        step = 0
        self.start_defenses(resume_from_checkpoint)
        if resume_from_checkpoint:
            step = _global_step(Path(resume_from_checkpoint) / "trainer_state.json")
        self._started = time.monotonic()
        if self.is_world_process_zero():
            self._started -= _drop_lines_after(self.log_file, step)
        if self.reference and self.accelerator.is_fsdp2:
            self.reference.shard(self.accelerator)
        # Autocast takes inputs of any type; peft would copy each to fp32, autocast back to bf16.
        with disable_input_dtype_casting(cast(nn.Module, self.model), active=self.args.bf16):
            done = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        reshard(self.model)
        load_whole_again()
        return done

    def start_defenses(self, checkpoint: str | None) -> None:
        """Before any weight is trained or loaded."""
        self.fill_cache()
        for defense in self.defenses:
            defense.start(self.model)
        if checkpoint:
            file = Path(checkpoint) / "defenses.json"
            states = read_record(file, _CHECKPOINT)
            for defense in self.defenses:
                name, state = defense.name, states.get(defense.name)
                check_shape(dict[str, Any], state, str(file), _CHECKPOINT, (name,))
                try:
                    defense.load_state_dict(state)
                except (LookupError, TypeError, ValueError, AttributeError) as error:
                    found = f"{file}: {name}: not a state that it wrote ({first_line(error)})"
                    raise DataError(f"{found}; {_CHECKPOINT}") from error

    def fill_cache(self) -> None:
        """Once before training: computes what the run will request and the cache lacks."""
        if self.cache is None or self._cache_filled:
            return
        stream = cast(TrainStream, self.train_dataset)
        steps: float = self.args.max_steps
        if steps <= 0:
            steps = self.args.num_train_epochs * stream.steps_per_epoch
        asked = wanted(stream, math.ceil(steps))
        assert self.reference is not None
        with self._autocast():
            self.reference.fill(asked)
        self._cache_filled = True

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Marked as ours before it is written, as whole after; earlier ones are then deleted."""
        folder = Path(self.args.output_dir or "") / f"checkpoint-{self.state.global_step}"
        with told_if_full(folder.parent.parent):
            if self.is_world_process_zero():
                begin_checkpoint(folder)
            super()._save_checkpoint(model, trial)
            wait()  # other ranks write pieces of it
            if self.is_world_process_zero():
                end_checkpoint(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.is_world_process_zero():
            states = {defense.name: defense.state_dict() for defense in self.defenses}
            write_whole(Path(output_dir) / "defenses.json", json.dumps(states))


def _cross_entropy(batch: Batch) -> CrossEntropy:
    """On the positions that predict a labelled token."""
    target_BT = batch["labels"][:, 1:]
    chosen_BT = target_BT != -100
    return CrossEntropy(F.pad(chosen_BT, (0, 1)), target_BT[chosen_BT])


def _part(batch: Batch, rows_N: Tensor) -> Batch:
    """Some rows of a batch, no wider than they need."""
    part = {name: tensor[rows_N] for name, tensor in batch.items()}
    used_S = part["attention_mask"].any(0).nonzero()[:, 0]
    return {
        name: tensor[:, used_S] if tensor.dim() == 2 else tensor for name, tensor in part.items()
    }


def _collate(stream: TrainStream, pad_id: int, bundles: list[Bundle]) -> Batch:
    if bundles:
        return collate(bundles, pad_id)
    return _blank(collate([stream[0][:1]], pad_id))


def _blank(batch: Batch) -> Batch:
    """One row that counts for nothing: a rank without rows must run the model as others do."""
    row = {name: tensor[:1] for name, tensor in batch.items()}
    nothing = {
        "roles": torch.full_like(row["roles"], Role.PAD),
        "labels": torch.full_like(row["labels"], -100),
    }
    return row | nothing


class _StepEnd(TrainerCallback):
    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._act()


def _global_step(file: Path) -> int:
    state = read_record(file, _CHECKPOINT)
    check_shape(int, state.get("global_step"), str(file), _CHECKPOINT, ("global_step",))
    return int(state["global_step"])


def _drop_lines_after(log_file: Path, step: int) -> float:
    """Returns the seconds that the kept steps took."""
    again = "it was changed by hand: name another output, or delete the folder"
    lines = read_metrics(log_file, again) if log_file.is_file() else []
    kept = [line for line in lines if line["step"] <= step]
    write_whole(log_file, "".join(json.dumps(line) + "\n" for line in kept))
    return max((line.get("seconds", 0.0) for line in kept), default=0.0)
