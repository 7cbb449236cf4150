"""What a scope costs in use: time to the first token and of each further one, with the scope and
without it, on the same adapter, in turn. About four minutes on two quiet CPU cores.

    python benchmarks/scope/time_in_use.py runs/scope/finance/scope-0/adapter
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from plain import without_scope

from ringfence import load_model
from ringfence.model.files import load_tokenizer
from ringfence.model.layers import cache_in, cache_name
from ringfence.stats import ratio_interval
from ringfence.text.chat import Chat
from ringfence.text.rows import load_questions

NEW = 8  # further tokens


def seconds(model: Any, ids: torch.Tensor) -> tuple[float, float]:
    """To the first token, and of each further one."""
    name = cache_name(model)
    with torch.no_grad():
        started = time.perf_counter()
        found = model(ids, use_cache=True, logits_to_keep=1)
        first = time.perf_counter() - started
        token, times = found.logits[:, -1:].argmax(-1), []
        for _ in range(NEW):
            started = time.perf_counter()
            found = model(token, **{name: cache_in(found)}, use_cache=True)
            token = found.logits[:, -1:].argmax(-1)
            times.append(time.perf_counter() - started)
    return first, median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapter", type=Path, help="folder of a scoped adapter")
    parser.add_argument("--prompts", type=int, default=40)
    told = parser.parse_args()
    chat = Chat(load_tokenizer(str(told.adapter)))
    asked = [*load_questions("shipped:finance", "test"), *load_questions("shipped:car_care")]
    with tempfile.TemporaryDirectory() as folder:
        plain = without_scope(told.adapter, Path(folder) / "plain")
        models = [load_model(str(told.adapter)), load_model(str(plain))]
    times: list[list[tuple[float, float]]] = [[], []]
    every = max(1, len(asked) // told.prompts)
    for number, question in enumerate(asked[::every][: told.prompts]):
        prompt = [{"role": "user", "content": question.question}]
        ids = torch.tensor([chat.encode(prompt, generation=True).input_ids])
        for place in (0, 1) if number % 2 else (1, 0):
            # The quicker of two: other processes only ever slow it down.
            both = [seconds(models[place], ids) for _ in range(2)]
            times[place].append((min(a for a, _ in both), min(b for _, b in both)))
    for place, name in enumerate(("first token", "each further token")):
        scoped, bare = ([pair[place] for pair in of] for of in times)
        ratio = ratio_interval(scoped, bare)
        print(f"{name}: x {ratio.mean:.3f} [{ratio.low:.3f}, {ratio.high:.3f}], {ratio.n} prompts")


if __name__ == "__main__":
    main()
