"""The reference on disk: what is read equals a reference that runs, is found only where nothing has
changed, survives crashes and company, and spares the forward and the copy of the model."""

import dataclasses
import gc
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections import Counter, namedtuple
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from helpers.models import SMALL, VOCABULARY, nudged, tiny, with_lora
from helpers.naive import naive_kl, naive_treft, row_logits
from helpers.penalties import assert_same, gradients, penalty_of
from helpers.reference_caches import Forwards, cache_in, filled, made, wanted_of
from helpers.rows import PREFIX_A, Items, batch_of, example, training_rows
from helpers.runs import metrics_of, small_model, write_rows
from helpers.trainers import RETAIN, build, lines_of
from ringfence.defenses import KL, LDIFS, DefenseConfig, Interleave, TReFT
from ringfence.errors import DefenseError, RecipeError
from ringfence.model.taps import Needs
from ringfence.text.roles import Role
from ringfence.training import reference_cache as module
from ringfence.training.reference import Reference
from ringfence.training.reference_cache import ReferenceCache, Wanted, rows_of, wanted
from ringfence.training.stream import TrainStream

pytestmark = pytest.mark.slow

KINDS = ["states", "top_k"]
METHODS = ["lora", "full"]


def rows_in(folder: Path) -> list[str]:
    """Names of the rows in all files below a folder, once for each time they are there."""
    names = [
        name.rpartition(".")[0]
        for file in folder.rglob("*.safetensors")
        for name in load_file(file)
    ]
    return list(dict.fromkeys(names)) if len(set(names)) == len(names) else names


# ------------------------------------------------------- what is read is what a reference would say


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_penalties_and_gradients_are_those_of_the_naive_form(
    method: str, kind: str, side: str, architecture: str, items: Items, tmp_path: Path
) -> None:
    """Rows of several turns and two prefixes, after the model has moved away from its start."""
    model, start = made(method, architecture), tiny(architecture)
    configs = [
        KL(where="train", tokens="all"),
        KL(where="retain", direction="forward"),
        KL(where="train", tokens="prompt"),
        TReFT(),
    ]
    reference = Reference(model, cache=cache_in(tmp_path, kind))
    for config in configs:
        reference.fill(wanted_of(build(config), items))
        if method == "full":
            reference.model = model  # the next one is computed from the same start
    if method == "full":
        reference.model = None
        nudged(model)
    forwards = Forwards(model)
    for config in configs:
        found = penalty_of(build(config)[0], model, batch_of(items, side), reference)
        assert forwards.number == 0
        if isinstance(config, KL):
            expected = naive_kl(model, start, items, config.where, config.tokens, config.direction)
        else:
            expected = naive_treft(model, start, items, [Role.PREFIX])
        assert found.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
        assert expected.item() > 1e-3
        assert_same(gradients(found, model), gradients(expected, model), 1e-4)
        forwards.number = 0


@pytest.mark.parametrize("side", ["right", "left"])
def test_states_are_those_of_each_row_alone(side: str, items: Items, tmp_path: Path) -> None:
    model = tiny()
    reference = Reference(model, cache=cache_in(tmp_path))
    batch = batch_of(items, side)
    mask_BT = (batch["roles"] == Role.RESPONSE) | (batch["roles"] == Role.QUERY)
    reference.fill(Wanted({row.name: row for row in rows_of(batch, mask_BT)}, set()))
    taps = reference.taps(batch, Needs(hidden_BT=mask_BT))
    for at, (row, _) in enumerate(items):
        with torch.no_grad():
            alone = model.model(input_ids=torch.tensor([row.input_ids])).last_hidden_state[0]
        chosen = [
            place for place, role in enumerate(row.roles) if role in (Role.RESPONSE, Role.QUERY)
        ]
        error = (taps.hidden_BTD[at][mask_BT[at]] - alone[chosen]).abs().max()
        assert error < 2e-6 * alone.abs().max()


@pytest.mark.parametrize("k", [1, 7])
def test_top_k_are_the_most_probable_tokens_of_each_row_alone(
    k: int, items: Items, tmp_path: Path
) -> None:
    model = with_lora(tiny("gemma2"))
    reference = Reference(model, cache=cache_in(tmp_path, "top_k", k))
    batch = batch_of(items)
    mask_BT = batch["roles"] == Role.RESPONSE
    reference.fill(Wanted({row.name: row for row in rows_of(batch, mask_BT)}, set()))
    found = reference.taps(batch, Needs(hidden_BT=mask_BT)).top_k
    assert found is not None
    with torch.no_grad(), model.disable_adapter():
        logp = torch.cat(
            [
                row_logits(model, row).log_softmax(-1)[mask_BT[at, : len(row)]]
                for at, (row, _) in enumerate(items)
            ]
        )
    expected, ids = logp.topk(k)
    assert torch.equal(found.token_ids_NK, ids)
    torch.testing.assert_close(found.logprobs_NK, expected, rtol=1e-5, atol=1e-5)


def test_states_keep_the_type_they_come_in(items: Items, tmp_path: Path) -> None:
    model = with_lora(tiny().bfloat16())
    live, cached = Reference(model), Reference(model, cache=cache_in(tmp_path))
    batch = batch_of(items[:1])
    needs = Needs(hidden_BT=batch["roles"] == Role.RESPONSE)
    cached.fill(Wanted({row.name: row for row in rows_of(batch, needs.hidden_BT)}, set()))
    found, expected = cached.taps(batch, needs).hidden_BTD, live.taps(batch, needs).hidden_BTD
    assert found.dtype == torch.bfloat16
    # One row, no padding: to the bit.
    assert torch.equal(found[needs.hidden_BT], expected[needs.hidden_BT])


# ---------------------------------------------------------------- in training

CONFIGS: dict[str, tuple[DefenseConfig, ...]] = {
    "train": (KL(weight=0.7, where="train", tokens="all"),),
    "riders+every": (KL(weight=0.7, retain_ratio=0.5, every=2), Interleave(ratio=0.3)),
    "with-treft": (KL(weight=0.7, where="train", every=2), TReFT(weight=2.0)),
}


def trained(
    make_trainer: Any,
    method: str,
    configs: tuple[DefenseConfig, ...],
    cache: ReferenceCache | None,
    folder: str,
    **arguments: Any,
) -> tuple[list[dict[str, float]], dict[str, Tensor], int]:
    """Lines and weights of two epochs of four steps, and how often the reference ran."""
    model = made(method)
    rows = [*training_rows(13), example(PREFIX_A, [2, 3, 3, 4], 77)]
    settings = {"learning_rate": 1e-2, "num_train_epochs": 2, **arguments}
    resume = settings.pop("resume", None)
    trainer = make_trainer(
        model, build(*configs), rows, RETAIN, 4, folder=folder, cache=cache, **settings
    )
    forwards = Forwards(model)
    live = Forwards(trainer.reference.model) if trainer.reference.model is not model else None
    trainer.train(resume_from_checkpoint=resume)
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return lines_of(trainer), weights, forwards.number + (live.number if live else 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_the_run_without_a_cache(
    method: str, name: str, kind: str, make_trainer: Any, tmp_path: Path
) -> None:
    """Same losses and weights; the second run makes no forward of the reference but those of
    TReFT's two prefixes."""
    lines, weights, live = trained(make_trainer, method, CONFIGS[name], None, "live")
    assert live >= 4
    for run, expected_forwards in (("first", None), ("second", 2 if name == "with-treft" else 0)):
        cache = cache_in(tmp_path / "cache", kind)
        found, found_weights, forwards = trained(make_trainer, method, CONFIGS[name], cache, run)
        for line, other in zip(found, lines, strict=True):
            assert line.keys() == other.keys()
            for part in {"loss", "ce", "kl", "treft"} & line.keys():
                assert line[part] == pytest.approx(other[part], rel=1e-4, abs=2e-5), (run, part)
        assert_same(found_weights, weights, 1e-3)
        assert expected_forwards is None or forwards == expected_forwards
    assert max(line.get("kl", 0.0) for line in lines) > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_finds_its_cache(method: str, make_trainer: Any, tmp_path: Path) -> None:
    configs = CONFIGS["with-treft"]
    lines, weights, _ = trained(make_trainer, method, configs, None, "live")
    saving = {"save_strategy": "steps", "save_steps": 4}

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 4

    trained(
        make_trainer,
        method,
        configs,
        cache_in(tmp_path / "cache"),
        "stopped",
        callbacks=[Stop()],
        **saving,
    )
    cache = cache_in(tmp_path / "cache")
    resume = str(tmp_path / "stopped" / "checkpoint-4")
    found, found_weights, forwards = trained(
        make_trainer, method, configs, cache, "stopped", resume=resume, **saving
    )
    assert forwards == 2  # of TReFT's prefixes
    for line, other in zip(found[-4:], lines[-4:], strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4, abs=2e-5)
    assert_same(found_weights, weights, 1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_under_autocast_an_untrained_model_is_its_cached_reference(
    method: str, make_trainer: Any, tmp_path: Path
) -> None:
    """Rows of one length in one batch, so that nothing but the precision could differ."""
    rows = [example(PREFIX_A, [3, 4], seed) for seed in range(4)]
    values = []
    for cache in (None, cache_in(tmp_path)):
        model = with_lora(tiny().bfloat16(), size=0.0) if method == "lora" else tiny()
        trainer = make_trainer(
            model, build(KL(where="train")), rows, rows=4, bf16=True, folder=f"{cache}", cache=cache
        )
        trainer.train()
        values.append(lines_of(trainer)[0]["kl"])
    assert values == pytest.approx([0.0, 0.0], abs=1e-6)


# ----------------------------------------------------------- what is computed, and when it is found


def stream_of(*configs: DefenseConfig, rows: int = 10, step_rows: int = 4) -> TrainStream:
    return TrainStream(training_rows(rows), RETAIN, build(*configs), step_rows, 0)


@pytest.mark.parametrize(("where", "every"), [("retain", 2), ("train", 6), ("train", 5)])
def test_exactly_the_rows_that_a_run_asks_for_are_wanted(where: Any, every: int) -> None:
    """The rows, or riders, of the due steps of three epochs of two steps."""
    stream = stream_of(KL(where=where, retain_ratio=0.5, every=every), step_rows=5)
    asked = set()
    for epoch in range(3):
        stream.set_epoch(epoch)
        for step in range(2):
            if (epoch * 2 + step) % every == 0:
                bundles = [stream[at] for at in range(step * 5, step * 5 + 5)]
                asked |= {
                    tuple(r.input_ids)
                    for b in bundles
                    for r, retain in b
                    if retain == (where == "retain")
                }
    found = wanted(stream, 6)
    assert {tuple(row.ids_T.tolist()) for row in found.rows.values()} == asked
    assert [row.origin for row in stream.rows] == [
        row.origin for row in stream_of(KL(), step_rows=5).rows
    ]


def test_a_short_last_step_is_filled_up_as_several_ranks_do() -> None:
    """The second epoch's last step has two rows, and takes that epoch's first three again."""
    stream = stream_of(KL(where="train", every=3), rows=7, step_rows=5)
    first = {tuple(row.input_ids) for row in stream.rows[:5]}
    stream.set_epoch(1)
    asked = {tuple(stream.rows[at].input_ids) for at in (5, 6, 0, 1, 2)}
    assert {tuple(row.ids_T.tolist()) for row in wanted(stream, 4).rows.values()} == first | asked
    assert asked - first


def test_every_epoch_is_wanted() -> None:
    stream = stream_of(KL(where="train"), Interleave(ratio=0.1))
    pool = {tuple(row.input_ids) for row in RETAIN}

    def safe(steps: int) -> int:
        return len(
            {tuple(row.ids_T.tolist()) for row in wanted(stream, steps).rows.values()} & pool
        )

    assert safe(stream.steps_per_epoch) < safe(6 * stream.steps_per_epoch)


def test_a_prefix_that_is_compared_is_wanted() -> None:
    found = wanted(stream_of(KL(), TReFT()), 3)
    assert found.prefixes == {
        tuple(row.input_ids[: row.roles.count(Role.PREFIX)]) for row in training_rows(10)
    }


def test_padding_does_not_matter_to_a_name(items: Items) -> None:
    names = []
    for side, rows in (
        ("left", items),
        ("right", items),
        ("right", items[:3]),
        ("left", items[:3]),
    ):
        batch = batch_of(rows, side)
        names.append([row.name for row in rows_of(batch, batch["roles"] == Role.RESPONSE)][:3])
    assert names[0] == names[1] == names[2] == names[3]


def test_a_name_is_that_of_all_tokens_and_places() -> None:
    row = example(PREFIX_A, [3, 4], 1)
    others = [
        dataclasses.replace(row, input_ids=[*row.input_ids[:-1], 21]),
        dataclasses.replace(row, input_ids=[22, *row.input_ids[1:]]),
        dataclasses.replace(row, input_ids=[*row.input_ids, 10], roles=[*row.roles, Role.POSTFIX]),
        dataclasses.replace(row, roles=[*row.roles[:-1], Role.QUERY]),
    ]
    names = set()
    for other in (row, *others):
        batch = batch_of([(other, False)])
        names |= {found.name for found in rows_of(batch, batch["roles"] == Role.RESPONSE)}
    assert len(names) == 5


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"adapter": "a"},
        {"precision": "bf16"},
        {"kind": "top_k"},
        {"kind": "top_k", "k": 3},
    ],
)
def test_another_reference_has_another_folder(change: dict[str, Any], tmp_path: Path) -> None:
    folders = {
        cache_in(tmp_path, **settings).folder
        for settings in ({}, {"kind": "top_k", "k": 2}, change)
    }
    assert len(folders) == 3


# ---------------------------------------------------------------- crashes, company, damage


def test_after_a_kill_only_what_is_missing_is_computed(tmp_path: Path, items: Items) -> None:
    """The process dies while it writes its third file."""
    script = f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        from pathlib import Path
        from helpers.reference_caches import filled
        from helpers.rows import mixed_items
        from ringfence.training import reference_cache
        reference_cache.SHARD_ROWS = 1
        reference_cache.BATCH_TOKENS = 1
        save, written = reference_cache.save_file, []
        def killing(tensors, file, **options):
            written.append(file)
            if len(written) == 3:
                Path(file).write_bytes(b"half a file")
                os.kill(os.getpid(), signal.SIGKILL)
            save(tensors, file, **options)
        reference_cache.save_file = killing
        filled(Path({str(tmp_path)!r}), mixed_items())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(rows_in(tmp_path)) == 2
    assert len(list(tmp_path.rglob("*.part"))) == 1
    _, computed = filled(tmp_path, items)
    assert computed == 4
    assert filled(tmp_path, items)[1] == 0
    assert len(rows_in(tmp_path)) == 6


def test_a_half_written_file_of_the_day_before_is_cleared_away(
    tmp_path: Path, items: Items
) -> None:
    folder = cache_in(tmp_path).folder
    folder.mkdir()
    for name, age in (("old", 2 * 86400), ("young", 60)):
        (folder / f"{name}.part").write_text("")
        then = (folder / f"{name}.part").stat().st_mtime - age
        os.utime(folder / f"{name}.part", (then, then))
    filled(tmp_path, items)
    assert [file.stem for file in folder.glob("*.part")] == ["young"]


def test_a_file_that_another_run_finishes_meanwhile(tmp_path: Path, items: Items) -> None:
    """It is listed, and gone when it is looked at."""
    folder = cache_in(tmp_path).folder
    folder.mkdir()
    (folder / "gone.part").symlink_to(folder / "nowhere")
    assert [file.stem for file in folder.glob("*.part")] == ["gone"]
    assert filled(tmp_path, items)[1] > 0


def test_two_runs_that_fill_at_the_same_time_do_not_harm_each_other(
    tmp_path: Path, items: Items
) -> None:
    """Both have looked before either has written; their rows overlap."""
    first, second = (Reference(made("lora"), cache=cache_in(tmp_path)) for _ in range(2))
    asked = wanted_of(build(KL(where="train"), KL()), items)
    first.fill(asked)
    second.fill(
        wanted_of(build(KL(where="train"), KL()), [*items, (example(PREFIX_A, [5, 5], 9), False)])
    )
    assert len(rows_in(tmp_path)) == 6 + 7
    reference, computed = filled(tmp_path, items)
    assert computed == 0
    batch = batch_of(items)
    needs = build(KL(where="train"))[0].needs(batch)
    found, expected = reference.taps(batch, needs), Reference(made("lora")).taps(batch, needs)
    torch.testing.assert_close(
        found.hidden_BTD[needs.hidden_BT], expected.hidden_BTD[needs.hidden_BT]
    )


@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "foreign", "other-cache"])
def test_a_damaged_or_foreign_file_is_passed_over_and_its_rows_computed_anew(
    damage: str, tmp_path: Path, items: Items, capsys: pytest.CaptureFixture[str]
) -> None:
    reference, _ = filled(tmp_path, items)
    [file] = tmp_path.rglob("*.safetensors")
    content = file.read_bytes()
    del reference
    if damage == "foreign":
        save_file({"x.hidden": torch.zeros(3)}, file)
    elif damage == "other-cache":
        save_file(
            {name: tensor + 1 for name, tensor in load_file(file).items()},
            file,
            {"reference": "other"},
        )
    else:
        file.write_bytes({"cut": content[:-50], "noise": b"\x07" * 3000, "empty": b""}[damage])
    capsys.readouterr()
    reference, computed = filled(tmp_path, items)
    assert computed == 6
    shown = capsys.readouterr().err
    assert file.name in shown.replace("\n", "")
    assert "skipped" in shown
    batch = batch_of(items)
    needs = build(KL(where="train"))[0].needs(batch)
    found, expected = reference.taps(batch, needs), Reference(made("lora")).taps(batch, needs)
    torch.testing.assert_close(
        found.hidden_BTD[needs.hidden_BT], expected.hidden_BTD[needs.hidden_BT]
    )


@pytest.mark.parametrize("disks", [1, 2])
def test_ranks_share_the_work_and_have_everything_in_the_end(
    disks: int, tmp_path: Path, items: Items, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks as threads with a true barrier; one row lies there already. On disks of their own
    each computes all."""
    filled(tmp_path / "0", items[2:3])
    barrier, rank = threading.Barrier(2), threading.local()

    def state() -> Any:
        return SimpleNamespace(
            process_index=rank.number,
            num_processes=2,
            is_main_process=rank.number == 0,
            is_local_main_process=rank.number == 0,
            wait_for_everyone=lambda: barrier.wait(30),
        )

    monkeypatch.setattr(module, "PartialState", state)
    asked = wanted_of(build(KL(where="train"), KL()), items).rows
    computed, caches = Counter[int](), {}

    def fill(number: int) -> None:
        rank.number = number
        cache = caches[number] = cache_in(tmp_path / str(number % disks))
        barrier.wait(30)  # both look before either writes

        def compute(batch: Any, mask_BT: Tensor) -> tuple[Tensor, ...]:
            computed[number] += len(mask_BT)
            return (torch.ones(int(mask_BT.sum()), 4),)

        cache.fill(asked, compute)

    threads = [threading.Thread(target=fill, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    rows = [computed[number] - 1 for number in range(2)]  # one row each to know the size
    assert rows in ([[2, 3], [3, 2]] if disks == 1 else [[5, 6]])
    assert all(not cache.missing(asked) for cache in caches.values())


def test_the_folder_may_go_while_a_run_reads_it(tmp_path: Path, items: Items) -> None:
    reference, _ = filled(tmp_path, items)
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    batch = batch_of(items)
    assert (
        reference.taps(batch, build(KL(where="train"))[0].needs(batch)).hidden_BTD.abs().sum() > 0
    )
    assert filled(tmp_path, items)[1] == 6


# ---------------------------------------------------------------- memory


def alive() -> int:
    """Numbers in all parameters of this process."""
    gc.collect()
    return sum(thing.numel() for thing in gc.get_objects() if isinstance(thing, torch.nn.Parameter))


@pytest.mark.parametrize(("kind", "copied"), [("states", 32 * VOCABULARY), ("top_k", 0)])
def test_a_full_model_is_not_copied(kind: str, copied: int, tmp_path: Path, items: Items) -> None:
    """Only the head, where it is needed to make logits of cached states."""
    model = tiny()
    before = alive()
    reference = Reference(model, cache=cache_in(tmp_path, kind))
    reference.fill(wanted_of(build(KL(where="train")), items))
    assert alive() - before == copied
    assert reference.model is None
    whole = Reference(model)
    assert alive() - before - copied == sum(p.numel() for p in model.parameters())
    del whole


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ((KL(), LDIFS()), "reference_cache: defenses.ldifs"),
        ((KL(), TReFT(tokens=("postfix",))), "reference_cache: defenses.treft"),
        ((KL(), TReFT(tokens=("prefix", "query"))), "reference_cache: defenses.treft"),
        ((TReFT(),), "reference_cache: no defense"),
        ((Interleave(),), "reference_cache: no defense"),
    ],
    ids=["ldifs", "postfix", "query", "treft alone", "no penalty"],
)
def test_what_cannot_be_cached_is_refused(configs: tuple[DefenseConfig, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        wanted(stream_of(*configs), 1)


def test_a_row_that_was_not_asked_for_before_training(tmp_path: Path, items: Items) -> None:
    reference, _ = filled(tmp_path, items[:3])
    batch = batch_of(items)
    with pytest.raises(DefenseError, match="reference_cache: a row"):
        reference.taps(batch, build(KL(where="train"))[0].needs(batch))


def test_a_full_model_is_not_asked_once_it_trains(tmp_path: Path, items: Items) -> None:
    reference, _ = filled(tmp_path, items, "full")
    batch = batch_of(items)
    for config in (LDIFS(layers=(1,)), TReFT(), TReFT(tokens=("query",))):
        [defense] = build(config)
        defense.start(tiny())
        with pytest.raises(DefenseError, match="reference_cache"):
            reference.taps(batch, defense.needs(batch))


def test_more_tokens_than_the_vocabulary_has(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=rf"train\.top_k.*{VOCABULARY} tokens, found {VOCABULARY + 1}"
    ):
        Reference(tiny(), cache=cache_in(tmp_path, "top_k", VOCABULARY + 1))


def test_more_prefixes_than_are_kept(tmp_path: Path) -> None:
    prefixes = {(3, number) for number in range(65)}
    reference = Reference(tiny(), cache=cache_in(tmp_path))
    with pytest.raises(RecipeError, match=r"at most 64 prefixes .*found 65"):
        reference.fill(Wanted({}, prefixes))


def disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: usage(10**9, 0, free))


def test_too_little_space_is_said_before_anything_is_written(
    tmp_path: Path, items: Items, monkeypatch: pytest.MonkeyPatch
) -> None:
    positions = sum(
        row.positions for row in wanted_of(build(KL(where="train"), KL()), items).rows.values()
    )
    disk(monkeypatch, positions * 32 * 4 - 1)
    with pytest.raises(
        RecipeError, match=r"train\.reference_cache: states needs 0\.0 MiB in .*0\.0 MiB are free"
    ):
        filled(tmp_path, items)
    assert list(tmp_path.iterdir()) == []
    disk(monkeypatch, positions * 32 * 4)
    assert filled(tmp_path, items)[1] == 6


def test_a_disk_that_fills_up_meanwhile(
    tmp_path: Path, items: Items, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: Any, file: Path, **options: Any) -> None:
        file.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(RecipeError, match=r"train\.reference_cache: .*No space left"):
        filled(tmp_path, items)
    assert list(tmp_path.rglob("*.part")) == []


# ---------------------------------------------------------------- from recipes


@pytest.fixture
def command(
    ringfence: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str]]:
    """`ringfence train` on a tiny model in float32, with KL on its eight rows: exit code and all
    that it printed."""
    monkeypatch.setenv("RINGFENCE_CACHE", str(tmp_path / "cache"))
    write_rows(tmp_path / "rows.jsonl", 8)

    def train(model: str, *changes: str) -> tuple[int, str]:
        settings = [
            f"model={model}",
            f"data.train={tmp_path / 'rows.jsonl'}",
            f"output={tmp_path / 'run'}",
            "train.precision=fp32",
            "train.batch_size=4",
            "defenses.kl.where=train",
            "train.reference_cache=states",
        ]
        code, output, errors = ringfence("train", *settings, *changes)
        return code, (output + errors).replace("\n", " ")

    return train


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_model(tmp_path_factory.mktemp("base"))


def test_a_dry_run_says_what_will_be_written_and_what_is_there(
    command: Any, model: str, tmp_path: Path
) -> None:
    code, shown = command(model, "--dry-run")
    assert code == 0
    assert "reference cache: 8 rows" in shown
    assert f"0 rows are there; 0.0 MiB to write in {tmp_path / 'cache' / 'reference'}" in shown
    assert not (tmp_path / "cache" / "reference").exists()
    code, shown = command(model)
    assert code == 0
    assert "0 rows are there" in shown
    assert "8 rows are there" in command(model, "--dry-run")[1]
    code, shown = command(model, f"output={tmp_path / 'again'}", "train.epochs=2")
    assert code == 0
    assert "8 rows are there; 0.0 MiB to write" in shown


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["states", "top_k"])
def test_a_run_from_a_recipe_is_the_run_without_a_cache(
    kind: str, method: str, command: Any, model: str, tmp_path: Path
) -> None:
    changes = [
        f"train.method={method}",
        "train.epochs=2",
        "train.learning_rate=1e-2",
        f"train.top_k={SMALL}",
    ]
    if method == "full":
        changes.append("defenses.treft.weight=1.0")
    lines = []
    for name in ("none", kind):
        code, shown = command(
            model, *changes, f"train.reference_cache={name}", f"output={tmp_path / name}"
        )
        assert code == 0, shown
        lines.append(metrics_of(SimpleNamespace(folder=tmp_path / name)))  # type: ignore[arg-type]
    for line, other in zip(*lines, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4, abs=2e-5)
        assert line["kl"] == pytest.approx(other["kl"], rel=1e-3, abs=1e-6)
    assert lines[0][-1]["kl"] > 1e-3


def test_what_has_changed_is_computed_anew(command: Any, model: str, tmp_path: Path) -> None:
    """A row, the template, a weight, the precision, the method."""
    assert command(model)[0] == 0

    def there(*changes: str, of: str = model) -> int:
        shown = command(of, f"output={tmp_path / 'other'}", "--dry-run", *changes)[1]
        return int(shown.split(" rows are there")[0].rsplit(" ", 1)[1])

    assert there() == 8
    assert there("train.precision=bf16") == there("train.precision=bf16", "train.method=full") == 0
    assert there("train.method=full") == 8  # in float32 the same weights, the same states
    assert there("train.reference_cache=top_k") == 0
    assert there("defenses.kl.tokens=all") == 0

    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    (tmp_path / "changed.jsonl").write_text(
        "\n".join([lines[0].replace("red", "green"), *lines[1:]])
    )
    assert there(f"data.train={tmp_path / 'changed.jsonl'}") == 7

    changed = {}
    for what in ("same", "template", "weights"):
        changed[what] = small_model(tmp_path / what)
    template = tmp_path / "template" / "chat_template.jinja"
    template.write_text(template.read_text().replace("helpful", "careful"))
    tensors = load_file(tmp_path / "weights" / "model.safetensors")
    name = next(name for name in tensors if "down_proj" in name)
    tensors[name][0, 0] += 1e-3
    save_file(tensors, tmp_path / "weights" / "model.safetensors", {"format": "pt"})
    assert {what: there(of=folder) for what, folder in changed.items()} == {
        "same": 8,
        "template": 0,
        "weights": 0,
    }


def test_a_recipe_that_cannot_use_a_cache_is_refused_before_a_model_is_loaded(
    command: Any, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for changes in (["defenses.ldifs={}"], ["defenses.treft.tokens=postfix"]):
        for option in ([], ["--dry-run"]):
            code, shown = command(model, *changes, *option)
            assert code == 2
            assert (
                f"train.reference_cache: {changes[0].partition('=')[0].removesuffix('.tokens')}"
                in shown
            )
    assert not (tmp_path / "run").exists()
    disk(monkeypatch, 0)
    for option in ([], ["--dry-run"]):
        code, shown = command(model, *option)
        assert code == 2
        assert "train.reference_cache: states needs" in shown
    assert not (tmp_path / "run" / "adapter").exists()


def test_an_adapter_trained_further_has_a_cache_of_its_own(
    command: Any, model: str, tmp_path: Path
) -> None:
    assert command(model, "train.learning_rate=1e-2")[0] == 0
    further = str(tmp_path / "run" / "adapter")
    lines = []
    for name in ("none", "states"):
        code, shown = command(
            further,
            f"output={tmp_path / name}",
            f"train.reference_cache={name}",
            "train.learning_rate=1e-2",
            "train.epochs=2",
        )
        assert code == 0, shown
        lines.append(metrics_of(SimpleNamespace(folder=tmp_path / name)))  # type: ignore[arg-type]
    assert "0 rows are there" in shown
    for line, other in zip(*lines, strict=True):
        assert line["kl"] == pytest.approx(other["kl"], rel=1e-3, abs=1e-6)
    assert lines[0][-1]["kl"] > 1e-5
    about = [
        json.loads(file.read_text())
        for file in (tmp_path / "cache" / "reference").glob("*/about.json")
    ]
    assert sorted(one["adapter"] is None for one in about) == [False, True]
