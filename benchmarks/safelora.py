"""SafeLoRA at the shapes of Qwen2.5-7B, on random weights: seconds per layer and peak memory.

    python benchmarks/safelora.py --layers 2

Writes base and reference weights (bfloat16, one file per layer) and a rank-32 adapter of all linear
layers to a temporary folder, and projects the adapter like `ringfence project`. The published
algorithm, which makes C = V V^T and C B A, runs on one smaller matrix; its cost at these shapes is
computed from its operation counts.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import torch
from safetensors.torch import save_file

from ringfence.model.projection import ProjectionRule, project_adapter, project_matrix

HIDDEN, WIDE, KEYS, LAYERS_7B, RANK = 3584, 18944, 512, 28, 32
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (WIDE, HIDDEN),
    "mlp.up_proj": (WIDE, HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDE),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--layers", type=int, default=2, help="layers to write and project; a 7B model has 28"
    )
    parser.add_argument("--projector", choices=["scaled", "exact"], default="scaled")
    parser.add_argument(
        "--dense",
        type=int,
        default=2048,
        help="width of the matrix for the dense algorithm; 0: none",
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # Another process writes them, so that its memory is not counted here.
        given = (Path(folder), arguments.layers)
        writer = get_context("spawn").Process(target=write_models, args=given)
        writer.start()
        writer.join()
        before = peak_gib()
        start, busy = time.perf_counter(), time.process_time()
        rule = ProjectionRule(threshold=1.0, projector=arguments.projector)
        base, reference = f"{folder}/base", f"{folder}/reference"
        project_adapter(Path(folder, "adapter"), Path(folder, "out"), base, reference, rule)
        seconds = (time.perf_counter() - start) / arguments.layers
        busy = (time.process_time() - busy) / arguments.layers
    print(
        f"projector {arguments.projector}, {arguments.layers} layers, {torch.get_num_threads()} "
        "threads"
    )
    print(
        f"factored: {seconds:.2f} s a layer ({busy:.2f} s of processor time), so "
        f"{seconds * LAYERS_7B:.0f} s ({busy * LAYERS_7B:.0f} s) for {LAYERS_7B} layers "
        "(extrapolated)"
    )
    print(f"peak memory: {peak_gib():.2f} GiB ({before:.2f} GiB before the projection began)")
    if arguments.projector == "scaled":
        describe_dense()
        if arguments.dense:
            time_dense(arguments.dense)


def write_models(folder: Path, layers: int) -> None:
    """Random weights; reference = base + a change of a tenth of its size."""
    generator = torch.Generator().manual_seed(0)
    where: dict[str, str] = {}
    adapter = {}
    for model in ("base", "reference", "adapter"):
        (folder / model).mkdir()
    for layer in range(layers):
        base, reference = {}, {}
        for name, (out, into) in SHAPES.items():
            key = f"model.layers.{layer}.{name}"
            weight = 0.02 * torch.randn(out, into, generator=generator, dtype=torch.bfloat16)
            base[f"{key}.weight"] = weight
            change = torch.randn(out, into, generator=generator, dtype=torch.bfloat16)
            reference[f"{key}.weight"] = weight + 0.002 * change
            stem = f"base_model.model.{key}"
            adapter[f"{stem}.lora_A.weight"] = torch.randn(RANK, into, generator=generator)
            adapter[f"{stem}.lora_B.weight"] = torch.randn(out, RANK, generator=generator)
        file = f"model-{layer:05}.safetensors"
        save_file(base, folder / "base" / file)
        save_file(reference, folder / "reference" / file)
        where.update(dict.fromkeys(base, file))
    for model in ("base", "reference"):
        (folder / model / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": where})
        )
    save_file(adapter, folder / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "base_model_name_or_path": str(folder / "reference")}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))


def describe_dense() -> None:
    """Multiply-adds of one layer and bytes of all C of the model, from the shapes."""
    factored = sum(2 * out * into * RANK for out, into in SHAPES.values())
    # V V^T, then C times the dense dW.
    dense = sum(
        out * out * into + out * into * RANK + out * out * into for out, into in SHAPES.values()
    )
    stored = sum(out * out for out, _ in SHAPES.values()) * LAYERS_7B
    print(
        f"a layer's multiply-adds: factored {factored / 1e9:.0f} G, dense {dense / 1e9:.0f} G; all "
        f"C of {LAYERS_7B} layers: {stored * 2 / 2**30:.0f} GiB in 16 bits, "
        f"{stored * 4 / 2**30:.0f} GiB in 32"
    )


def time_dense(width: int) -> None:
    """Both algorithms on one random square matrix."""
    difference, a, b = torch.randn(width, width), torch.randn(RANK, width), torch.randn(width, RANK)
    start = time.perf_counter()
    c = difference @ difference.T / difference.norm()
    update = b @ a
    torch.cosine_similarity((c @ update).flatten(), update.flatten(), dim=0)
    expected = c @ b
    middle = time.perf_counter()
    found = project_matrix(b, difference)
    end = time.perf_counter()
    worst = (found - expected).abs().max() / expected.abs().max()
    print(
        f"one {width} x {width} matrix: dense {middle - start:.3f} s, factored product "
        f"{end - middle:.4f} s, largest difference {worst:.1e} of the largest entry"
    )


def peak_gib() -> float:
    """Largest resident set of this process so far (getrusage counts KiB, bytes on macOS)."""
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


if __name__ == "__main__":
    main()
