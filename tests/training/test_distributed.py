"""Two processes that train together do what one process does: same rows, losses, penalties,
gradients and weights.

All cases run in one pair of processes (starting one takes long), with DDP and with FSDP2, on CPUs
with gloo; each test then looks at what its case left behind. Where deepspeed is installed, a second
pair trains a part of them with DeepSpeed.
"""

import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from torch import Tensor

import ringfence.run.train as train_module
import ringfence.training.trainer as trainer_module
from helpers import distributed_worker
from helpers.distributed_worker import (
    BF16,
    CASES,
    RESUMED,
    RUNS,
    is_left_out,
    make_files,
    work,
)
from helpers.domains import INSIDE, write_negatives, write_rows_of, write_telling_model
from helpers.models import PAD, tiny, with_lora
from helpers.penalties import assert_same
from helpers.rows import training_rows
from helpers.runs import small_model, write_rows
from helpers.trainers import training_arguments
from ringfence.errors import RecipeError, RingfenceError
from ringfence.model.loading import load_model
from ringfence.model.precision import settled
from ringfence.run.config import parse_recipe
from ringfence.training import ranks
from ringfence.training.stream import RankBatches, TrainStream

pytestmark = pytest.mark.slow

KINDS = ("ddp", "fsdp")
ZERO = ("zero2", "zero3")
HAS_DEEPSPEED = find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(
    not HAS_DEEPSPEED, reason="deepspeed is not installed (it has no wheels)"
)
needs_bf16 = pytest.mark.skipif(
    settled("auto") == "fp32", reason="without instructions for bf16, DeepSpeed rounds otherwise"
)
ALL_KINDS = [*KINDS, *(pytest.param(kind, marks=needs_deepspeed) for kind in ZERO)]
SAVED = ("full", "monitored", "stopped")  # which is `lora` of one process, when it goes on
RECIPES = Path(__file__).parents[2] / "docs" / "distributed"
TESTS = Path(__file__).parents[1]
WORKER = ["-m", "helpers.distributed_worker"]
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
ZERO3 = DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
# Seconds for each kind (they take 30, of DeepSpeed 200, on two quiet cores); a deadlock fails.
TIMEOUT = 400


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def environment(**extra: str) -> dict[str, str]:
    path = os.pathsep.join(
        [str(TESTS), str(TESTS.parent / "src"), os.environ.get("PYTHONPATH", "")]
    )
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **extra}


def start(command: list[str], environment: dict[str, str]) -> Any:
    """A process whose output goes to a file: a rank that fills a pipe would wait for its reader,
    and the other rank for it."""
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115
    process: Any = subprocess.Popen(
        command, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True
    )
    process.log = log
    return process


def output_of(process: Any) -> str:
    process.log.seek(0)
    return str(process.log.read())


def start_pair(*arguments: str) -> list[Any]:
    """Two ranks, as a launcher starts them."""
    port = str(free_port())
    return [
        start(
            [sys.executable, *WORKER, *arguments],
            environment(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE="2",
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            ),
        )
        for rank in range(2)
    ]


def end(processes: list[Any], timeout: float) -> list[tuple[int, str]]:
    """Exit codes and outputs; what still runs after the time is killed, and fails the test."""
    deadline = time.monotonic() + timeout
    try:
        for process in processes:
            process.wait(timeout=max(1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        for process in processes:
            process.kill()
        pytest.fail("deadlock:\n" + "\n".join(output_of(each)[-3000:] for each in processes))
    return [(process.returncode, output_of(process)) for process in processes]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with every case and run, trained by two ranks (KINDS and ZERO) and by one process
    (`one`).

    `ended.json`: exit codes and outputs of the ranks, one of which fails on purpose after all is
    trained.
    """
    folder = tmp_path_factory.mktemp("distributed")
    files = folder / "files"
    files.mkdir()
    make_files(files)
    small_model(files / "model", size=16)
    write_telling_model(files / "telling")
    write_rows_of(files / "inside.jsonl", INSIDE, 120)
    write_negatives(files / "negatives.jsonl")
    write_rows(files / "rows.jsonl", 17)
    write_rows(files / "retain.jsonl", 4, start=50)
    names = [*CASES, *RESUMED, *RUNS]
    theirs = [*CASES, *RESUMED, *SAVED, "scoped", *BF16]
    pair = start_pair(str(folder), ",".join(KINDS), ",".join(theirs))
    try:
        for name in names:
            if name != "stopped":
                work(name, files, folder / "one" / name)
    finally:
        ended = end(pair, TIMEOUT * len(KINDS))
    if HAS_DEEPSPEED:
        pair = start_pair(str(folder), ",".join(ZERO), ",".join(theirs))
    more = end(pair, TIMEOUT * len(ZERO)) if HAS_DEEPSPEED else []
    outputs = [output for _, output in ended + more]
    assert all("all trained" in output for output in outputs), "\n\n".join(
        output[-4000:] for output in outputs
    )
    (folder / "ended.json").write_text(json.dumps(ended))
    return folder


def found(folder: Path, kind: str, name: str) -> Any:
    return torch.load(folder / kind / name / "found.pt")


def assert_lines(lines: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(lines) == len(expected) > 1
    for line, other in zip(lines, expected):
        assert line.keys() == other.keys()
        for name in line.keys() - {"seconds"}:
            assert line[name] == pytest.approx(other[name], rel=1e-5, abs=2e-6), (
                line["step"],
                name,
            )


# ---------------------------------------------------------------- every defense


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_as_one_process(name: str, kind: str, trained: Path) -> None:
    """Losses, every penalty, weights of budgets, each step's gradients, and the last weights."""
    if is_left_out(name, kind):
        pytest.skip("left out")
    ours, theirs = found(trained, kind, name), found(trained, "one", name)
    assert_trained_by(kind, ours)
    assert_lines(ours["lines"], theirs["lines"])
    penalties = {d.name for d in CASES[name].make_defenses(trained / "files") if d.has_penalty}
    assert penalties <= {key for line in ours["lines"] for key, value in line.items() if value != 0}
    assert len(ours["gradients"]) == len(theirs["gradients"]) == len(ours["lines"])
    for gradient, expected in zip(ours["gradients"], theirs["gradients"]):
        assert_same(gradient, expected, 2e-5)
    assert_same(ours["weights"], theirs["weights"])
    assert ours["states"].keys() == theirs["states"].keys()
    for defense, state in theirs["states"].items():
        assert_close_trees(ours["states"][defense], state)


def assert_trained_by(kind: str, found: Any) -> None:
    """accelerate may silently fall back to another way."""
    if kind in ZERO:
        optimizer = "DeepSpeedZeroOptimizer" + ("_Stage3" if kind == "zero3" else "")
        assert (found["kind"], found["optimizer"]) == ("DeepSpeedEngine", optimizer)
        assert found["zero"] == int(kind[-1])
        assert bool(found["pieces"]) == (kind == "zero3")
        assert all(here == 0 and kept <= -(-whole // 2) for here, kept, whole in found["pieces"])
    else:
        assert ("FSDP" if kind == "fsdp" else "DistributedDataParallel") in found["kind"]


def assert_close_trees(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert_close_trees(ours[name], theirs[name])
    else:
        assert ours == (
            pytest.approx(theirs, rel=1e-4, abs=1e-6) if isinstance(theirs, float) else theirs
        )


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_every_trained_weight_gets_a_gradient(kind: str, trained: Path) -> None:
    """A shard whose gradient was lost would be zero everywhere, as in the single process only by
    chance."""
    for name in ("everything-full", "everything-tied", "kl-head"):
        if is_left_out(name, kind):
            continue
        for gradient in found(trained, kind, name)["gradients"]:
            assert all(tensor.abs().max() > 0 for tensor in gradient.values())


@pytest.mark.parametrize("kind", KINDS)
def test_safelora_and_the_lock_change_whole_weights(kind: str, trained: Path) -> None:
    """Equal to one process they are (above); that there is something to equal is seen here."""
    states = found(trained, kind, "safelora-end")["states"]["safelora"]
    assert sum(layer["projected"] for layer in states["layers"].values()) == 3
    from ringfence.model.directions import Directions

    basis_DR = Directions.load(trained / "files" / "v.safetensors").basis(1)
    weights = found(trained, kind, "lock")["weights"]
    written = weights["base_model.model.model.layers.0.mlp.down_proj.lora_B.default.weight"]
    free = weights["base_model.model.model.layers.0.mlp.up_proj.lora_B.default.weight"]
    assert (basis_DR.T @ written).abs().max() < 1e-6 < 1e-4 < written.abs().max()
    assert free.abs().max() > 1e-4


@needs_deepspeed
@needs_bf16
@pytest.mark.parametrize("kind", ZERO)
@pytest.mark.parametrize("name", BF16)
def test_deepspeed_computes_in_bf16_as_ddp_does(name: str, kind: str, trained: Path) -> None:
    """Trained weights stay in float32, and so does their gradient's sum; the reference is computed
    as the student."""
    if (name, kind) == ("bf16-lora", "zero3"):
        pytest.skip("alike: see below")
    ours, theirs = found(trained, kind, name), found(trained, "ddp", name)
    assert_trained_by(kind, ours)
    assert_lines(ours["lines"], theirs["lines"])
    for gradient, expected in zip(ours["gradients"], theirs["gradients"], strict=True):
        assert_same(gradient, expected)
    assert_same(ours["weights"], theirs["weights"])
    trained_types = {ours["weights"][name].dtype for name in ours["gradients"][0]}
    assert trained_types == {torch.float32}
    if name == "bf16-full":
        assert ours["lines"][0]["kl"] == 0 < ours["lines"][1]["kl"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "fsdp") for name in BF16),
        pytest.param("bf16-lora", "zero3", marks=[needs_deepspeed, needs_bf16]),
    ],
)
def test_sharded_weights_in_bf16_are_alike(name: str, kind: str, trained: Path) -> None:
    """FSDP2 sums gradients in bf16, and ZeRO-3's are rounded otherwise, so the same numbers are
    unavailable; trained weights stay in float32."""
    ours, theirs = found(trained, kind, name), found(trained, "ddp", name)
    for line, other in zip(ours["lines"], theirs["lines"], strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=0.01)
    assert {ours["weights"][name].dtype for name in ours["gradients"][0]} == {torch.float32}


# ---------------------------------------------------------------- resuming


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one(name: str, kind: str, trained: Path) -> None:
    """Six steps, stopped after five, resumed from the checkpoint at four; compared with one process
    that never was."""
    ours, theirs = found(trained, kind, name), found(trained, "one", name)
    assert_lines(ours["lines"], theirs["lines"])
    assert len(ours["lines"]) == 6
    assert len(ours["gradients"]) == 2
    for gradient, expected in zip(ours["gradients"], theirs["gradients"][4:]):
        assert_same(gradient, expected, 5e-5)
    assert_same(ours["weights"], theirs["weights"])
    for defense, state in theirs["states"].items():
        assert_close_trees(ours["states"][defense], state)


# ---------------------------------------------------------------- runs


def weights_of(folder: Path) -> dict[str, Tensor]:
    [file] = [*folder.glob("adapter/*.safetensors"), *folder.glob("model/*.safetensors")]
    return load_file(file)


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("name", SAVED)
def test_what_two_ranks_saved_is_what_one_process_saves(
    name: str, kind: str, trained: Path
) -> None:
    """The same files, tensor names, types and values; and they load in one process."""
    folder, one = trained / kind / name, trained / "one" / ("lora" if name == "stopped" else name)
    ours = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert ours - {"rank-0.txt", "rank-1.txt"} == {
        str(f.relative_to(one)) for f in one.rglob("*") if f.is_file()
    }
    tensors, expected = weights_of(folder), weights_of(one)
    assert {n: (t.shape, t.dtype) for n, t in tensors.items()} == {
        n: (t.shape, t.dtype) for n, t in expected.items()
    }
    assert_same(tensors, expected)
    start = load_file(trained / "files" / "model" / "model.safetensors")
    for key, tensor in tensors.items():
        moved = tensor if "lora_B" in key else tensor - start.get(key, torch.zeros_like(tensor))
        assert moved.abs().max() > 1e-4, key
    loaded, other = (
        load_model(str(next(f for f in (at / "adapter", at / "model") if f.is_dir())), "fp32")
        for at in (folder, one)
    )
    ids = torch.tensor([[1, 409, 198, 843, 2, 198]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, other(ids).logits, rtol=1e-4, atol=1e-5)
    record, its = (json.loads((at / "training.json").read_text()) for at in (folder, one))
    for key in ("steps", "rows", "row_tokens", "trained_parameters"):
        assert record[key] == its[key]
    assert json.loads((folder / "environment.json").read_text())["ranks"] == 2


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_scope_is_that_of_one_process(kind: str, trained: Path) -> None:
    """Only the main process fits it, and all ranks train the layers above it."""
    ours, theirs = (trained / at / "scoped" / "adapter" for at in (kind, "one"))
    assert {file.name for file in ours.iterdir()} == {file.name for file in theirs.iterdir()}
    for name in ("adapter_model.safetensors", "scope.safetensors"):
        assert_same(load_file(ours / name), load_file(theirs / name))


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_the_monitor_measures_a_model_on_two_ranks(kind: str, trained: Path) -> None:
    ours, theirs = (
        [
            json.loads(line)
            for line in (trained / at / "monitored" / "metrics.jsonl").read_text().splitlines()
        ]
        for at in (kind, "one")
    )
    checks, expected = (
        [line["monitor"] for line in lines if "monitor" in line] for lines in (ours, theirs)
    )
    assert len(checks) == len(expected) > 1
    for check, other in zip(checks, expected):
        assert check["kl"] == pytest.approx(other["kl"], rel=1e-3)
        assert check["kv_drift"] == pytest.approx(other["kv_drift"], rel=1e-3)
        assert check["shift"]["mean"] == pytest.approx(other["shift"]["mean"], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_signal_to_one_rank_stops_all_after_the_step(kind: str, trained: Path) -> None:
    for rank in range(2):
        assert (
            "stopped at step 3; the same command"
            in (trained / kind / "stopped" / f"rank-{rank}.txt").read_text()
        )


# ---------------------------------------------------------------- launchers


def launch(command: list[str], timeout: float = 180) -> tuple[int, str]:
    process = start([sys.executable, "-m", *command], environment())
    return end([process], timeout)[0]


def test_accelerate_launch_with_the_recipe_that_ships(trained: Path, tmp_path: Path) -> None:
    """FSDP2 by docs/distributed/fsdp2.yaml: trains, prints once, saves what one process would."""
    recipe = (trained / "fsdp" / "stopped" / "recipe.yaml").read_text()
    (tmp_path / "recipe.yaml").write_text(recipe)
    config = [
        "--config_file",
        str(RECIPES / "fsdp2.yaml"),
        "--num_processes",
        "2",
        "--main_process_port",
        str(free_port()),
    ]
    train = [
        "-m",
        "ringfence",
        "train",
        str(tmp_path / "recipe.yaml"),
        f"output={tmp_path / 'run'}",
    ]
    code, output = launch(["accelerate.commands.accelerate_cli", "launch", *config, *train])
    assert code == 0, output[-6000:]
    assert output.count(str(tmp_path / "run" / "adapter")) == 1
    assert_same(weights_of(tmp_path / "run"), weights_of(trained / "one" / "lora"))
    assert "FSDP" in (tmp_path / "run" / "environment.json").read_text()


@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_accelerate_launch_with_the_deepspeed_recipe(
    stage: int, trained: Path, tmp_path: Path
) -> None:
    """By docs/distributed/zero2.yaml and zero3.yaml."""
    config = ["--config_file", str(RECIPES / f"zero{stage}.yaml"), "--num_processes", "2"]
    port = ["--main_process_port", str(free_port())]
    (tmp_path / "files").symlink_to(trained / "files")
    work = [*WORKER, str(tmp_path), "launched", "lora,kl-retain"]
    code, output = launch(["accelerate.commands.accelerate_cli", "launch", *config, *port, *work])
    assert code == 0, output[-6000:]
    ours, theirs = found(tmp_path, "launched", "kl-retain"), found(trained, "one", "kl-retain")
    assert ours["zero"] == stage
    assert_lines(ours["lines"], theirs["lines"])
    assert_same(weights_of(tmp_path / "launched" / "lora"), weights_of(trained / "one" / "lora"))
    assert (
        f"DeepSpeed ZeRO-{stage}"
        in (tmp_path / "launched" / "lora" / "environment.json").read_text()
    )


def test_a_rank_that_fails_ends_all(trained: Path) -> None:
    """No rank waits for ever for one that is gone, and none says that all is well."""
    (first, _), (last, output) = json.loads((trained / "ended.json").read_text())
    assert first != 0
    assert last == 1
    assert "broken on purpose" in output


def test_python_m_ringfence_is_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ringfence", "train", "model.yaml"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("ringfence", run_name="__main__")
    assert stop.value.code == 2
    assert "model.yaml" in capsys.readouterr().err


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("count", [1, 2, 9, 11, 12, 13, 24])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_rows_of_a_step_are_those_of_one_process(
    count: int, world: int, accumulation: int
) -> None:
    rows = 2
    stream = TrainStream(training_rows(count), [], [], rows * world * accumulation, 0)
    ranks_batches = [list(RankBatches(stream, rows, rank, world)) for rank in range(world)]
    assert {len(batches) for batches in ranks_batches} == {len(RankBatches(stream, rows, 0, world))}
    assert all(len(batch) <= rows for batches in ranks_batches for batch in batches)
    steps = [
        sorted(
            place
            for batches in ranks_batches
            for batch in batches[at : at + accumulation]
            for place in batch
        )
        for at in range(0, len(ranks_batches[0]), accumulation)
    ]
    assert len(steps) == stream.steps_per_epoch
    assert steps == [
        list(range(at, min(at + stream.step_rows, count)))
        for at in range(0, count, stream.step_rows)
    ]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"FSDP_VERSION": "1"}, "fsdp_version"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "gradient_checkpointing"),
    ],
)
def test_sharding_that_is_not_supported_is_refused(
    setting: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "WORLD_SIZE": "2",
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        **setting,
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RingfenceError, match=message):
        ranks.join()


def test_the_stage_is_read_from_a_config_of_deepspeed_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3}}')
    for name, value in {
        **DEEPSPEED,
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "ds.json"),
    }.items():
        monkeypatch.setenv(name, value)
    assert ranks.deepspeed_stage() == 3
    assert ranks.shards()
    assert ranks.sharding() == "DeepSpeed ZeRO-3"


def test_zero3_refuses_an_adapter_on_the_head(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its inner modules would be put in pieces after each tile, by hooks that ranks would run
    unequally often."""
    monkeypatch.setattr(trainer_module, "deepspeed_stage", lambda: 3)
    stream, arguments = (
        TrainStream(training_rows(4), [], [], 2, 0),
        training_arguments(tmp_path / "checkpoints", 2, 1),
    )

    def train(**lora: Any) -> None:
        trainer_module.DefendedTrainer(
            with_lora(tiny(), **lora), arguments, stream, [], PAD, tmp_path / "log"
        )

    train()
    with pytest.raises(RecipeError, match=r"train\.lora\.targets: found an adapter on the head"):
        train(target_modules=["q_proj", "lm_head"])


@pytest.mark.parametrize(
    ("setting", "tree", "message"),
    [
        (distributed_worker.FSDP, {"train": {"precision": "nf4"}}, "precision: nf4"),
        (
            distributed_worker.FSDP,
            {"train": {"method": "full"}, "monitor": {}},
            "monitor: with train.method: full",
        ),
        (ZERO3, {"train": {"precision": "nf4"}}, "precision: nf4.*ZeRO-3"),
        (ZERO3, {"train": {"compile": True}}, "train.compile"),
        (ZERO3, {"train": {"method": "full"}, "monitor": {}}, "monitor: with train.method: full"),
        (
            ZERO3,
            {"train": {"method": "full", "precision": "fp32"}, "defenses": {"safelora": {}}},
            "defenses.safelora: with",
        ),
        (DEEPSPEED, {"train": {"precision": "bf16"}}, "only in fp32"),
        (DEEPSPEED, {"defenses": {"subspace_lock": {}}}, "defenses.subspace_lock"),
        (DEEPSPEED, {"defenses": {"safelora": {"interval": 2}}}, "safelora.interval"),
    ],
)
def test_recipes_that_cannot_be_sharded_are_refused(
    setting: dict[str, str],
    tree: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(train_module, "join", lambda: None)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for name, value in {"WORLD_SIZE": "2", **setting}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match=message):
        train_module.train_run(
            parse_recipe({"output": str(tmp_path / "run"), "train": {"precision": "fp32"}} | tree)
        )


@pytest.mark.parametrize(
    ("setting", "accelerator", "expected"),
    [
        ({}, False, {"cpu": True, "backend": None}),
        (DEEPSPEED, False, {"cpu": False, "backend": "gloo"}),
        ({}, True, {"cpu": False, "backend": None}),
        (DEEPSPEED, True, {"cpu": False, "backend": None}),
    ],
)
def test_accelerate_is_not_told_to_leave_deepspeed_out(
    setting: dict[str, str],
    accelerator: bool,
    expected: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    assert ranks.device_settings() == expected


@pytest.mark.parametrize("file", ["ddp.yaml", "fsdp2.yaml", "zero2.yaml", "zero3.yaml"])
def test_accelerate_reads_the_configs_that_ship(file: str) -> None:
    config = load_config_from_file(str(RECIPES / file))
    assert config.num_machines == 1
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert kinds[file.removesuffix(".yaml")] == config.distributed_type
