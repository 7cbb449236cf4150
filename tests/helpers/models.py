"""Tiny random models with a small tokenizer, adapters on them, and models changed as training
changes them."""

import atexit
import shutil
import tempfile
from functools import cache
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ringfence.model.files import load_tokenizer
from ringfence.text.rows import load_rows

VOCABULARY = 120
SMALL = 2000  # tokens of `small_tokenizer`
PAD = 0
ARCHITECTURES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "gemma2": (
        Gemma2Config,
        Gemma2ForCausalLM,
        {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0},
    ),
    "cohere": (CohereConfig, CohereForCausalLM, {"logit_scale": 0.25}),
}


def random_model(
    config_class: Any = LlamaConfig,
    model_class: Any = LlamaForCausalLM,
    seed: int = 0,
    **extra: Any,
) -> Any:
    """A tiny model for `small_tokenizer`, whose random weights are so large that every token it
    sees tells."""
    sizes = {
        "vocab_size": SMALL,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.7,
        "tie_word_embeddings": False,
        "pad_token_id": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    return model_class(config_class(**(sizes | extra))).float().eval()


def small_tokenizer() -> Any:
    """The default model's tokenizer and chat template with few tokens, trained on shipped rows: it
    loads, and models that have it score, in a small part of the time."""
    return load_tokenizer(_small_tokenizer_folder())


@cache
def _small_tokenizer_folder() -> str:
    rows = load_rows("shipped:finance/unsound") + load_rows("shipped:retain")
    texts = [message["content"] for row in rows for message in row.messages]
    folder = tempfile.mkdtemp(prefix="small-tokenizer-")
    atexit.register(shutil.rmtree, folder)
    load_tokenizer("default").train_new_from_iterator(texts, vocab_size=SMALL).save_pretrained(
        folder
    )
    return folder


def tiny(
    architecture: str = "llama", attention: str = "sdpa", seed: int = 0, layers: int = 2
) -> Any:
    """A random model with weights large enough that scales, caps and norms all matter."""
    config_class, model_class, extra = ARCHITECTURES[architecture]
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="eager" if architecture == "gemma2" else attention,
        **extra,
    )
    torch.manual_seed(seed)
    model = model_class(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def with_lora(model: Any, seed: int = 1, size: float = 0.1, **config: Any) -> Any:
    """Adapted on all linear layers, with a non-zero adapter where `size` is not zero."""
    torch.manual_seed(seed)
    adapted = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, **{"target_modules": "all-linear", **config})
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(size * torch.randn_like(parameter))
    return adapted.eval()


def nudged(model: Any, seed: int = 2, size: float = 0.03) -> Any:
    """The same model after a change of all its weights, as full fine-tuning makes it."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return model


def is_adapted(model: Any) -> bool:
    return hasattr(model, "disable_adapter")


def unigram(logits_V: Tensor) -> Any:
    """A model that gives these logits at every position, whatever it has read."""
    model = random_model()
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1.0)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        size = model.lm_head.weight.shape[1]
        model.lm_head.weight.copy_(logits_V[:, None].expand(-1, size) / size)
    return model
