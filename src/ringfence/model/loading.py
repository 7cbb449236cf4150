"""Loads models and adapters on the best device, in the requested precision.

Does not know recipes, data or training.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError
from ..util.quiet import quiet_libraries
from .checked import ADAPTER_WEIGHTS, checked_load, loading, tensor_shapes
from .default import resolve
from .files import adapter_base, adapter_config, check_adapter
from .precision import Attention, Precision, device, settled
from .prefix import plain_lora_config, read_frozen_prefix, read_stored_prefix
from .scope import read_scope


@quiet_libraries()
def load_model(
    model: str,
    precision: Precision = "auto",
    attention: Attention | None = None,
    place: str | torch.device | None = None,
) -> Any:
    """A causal language model on the best device, in evaluation mode.

    Args:
        model: `default`, a local folder, a hub id, or the folder of a peft adapter (loaded on its
            base).
        precision: of the weights, including an adapter's; nf4 = the base in 4 bits (QLoRA), the
            rest in bf16; auto = see `settled`.
        attention: the implementation; None = the model's own choice.
        place: a device other than the best one.

    Raises:
        ModelError: it cannot be found or read, or nf4 is asked for without bitsandbytes.
    """
    from transformers import AutoModelForCausalLM

    source, precision = resolve(model), settled(precision)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    base = adapter_base(source)
    if base:
        check_adapter(source)
    start = resolve(base) if base else source
    options = {
        "dtype": dtype,
        "device_map": {"": place or device()},
        "attn_implementation": attention,
        "use_safetensors": True,
        **(_four_bits() if precision == "nf4" else {}),
    }
    loaded = checked_load(AutoModelForCausalLM.from_pretrained, start, model, "model", **options)
    for module in loaded.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # One forward in evaluation mode would pack a 4-bit weight for a kernel without a
            # gradient.
            module.support_avx512bf16_for_cpu = False
    if base:
        loaded = with_adapter(loaded, source)
        for name, parameter in loaded.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
    stored = read_stored_prefix(source)
    if stored:
        stored.attach(loaded)
    return loaded.eval()


def with_adapter(base: Any, folder: str, **options: Any) -> Any:
    """A loaded model with the adapter of a folder (see `check_adapter`), which acts only after its
    frozen prefix and inside its scope, if it has them.

    Raises:
        ModelError: the adapter was made for another model.
    """
    from peft import PeftModel

    frozen, saved = read_frozen_prefix(folder), read_scope(folder)

    def load() -> Any:
        config = plain_lora_config(adapter_config(folder)) if frozen or saved else None
        return PeftModel.from_pretrained(base, folder, config=config, **options)

    adapted = loading(load, folder, "adapter")
    _check_fit(adapted, folder)
    if frozen:
        frozen.attach(adapted)
    if saved:
        saved.probe.attach(adapted)
    return adapted


def _four_bits() -> dict[str, Any]:
    if not find_spec("bitsandbytes"):
        raise ModelError("precision nf4 needs bitsandbytes: pip install 'ringfence[qlora]'")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )
    return {"quantization_config": config}


def _check_fit(adapted: Any, folder: str) -> None:
    """peft loads what fits and silently skips the rest, so this checks both."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    wanted = {name for name in state if "lora_" in name}
    given = {name for name in tensor_shapes(Path(folder) / ADAPTER_WEIGHTS) if "lora_" in name}
    odd = sorted(wanted ^ given)
    if odd:
        kind = "lacks" if odd[0] in wanted else "holds"
        raise ModelError(
            f"{folder}: its adapter does not fit its base: {ADAPTER_WEIGHTS} {kind} {odd[0]} "
            f"({len(odd)} weights in all); it was made for another model, or with other "
            "target_modules"
        )
