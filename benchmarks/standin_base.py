"""A stand-in for the pre-trained model that the embedded one was made from, for SafeLoRA without a
hub.

All weights of the embedded model are trained further, as a plain language model on the texts of the
shipped retain rows without chat template, which takes it some way back from a chat model. So what
SafeLoRA finds between the two is not what alignment changed; a figure made with it shows that the
method runs, not what it is worth.
"""

from pathlib import Path

import torch

from ringfence.model.files import load_tokenizer
from ringfence.model.loading import load_model
from ringfence.text.rows import load_rows

EPOCHS, BATCH, LEARNING_RATE = 2, 8, 2e-5


def make_standin(folder: Path) -> None:
    """Trains it and writes it to `folder`."""
    model, tokenizer = load_model("default", "fp32").train(), load_tokenizer("default")
    texts = [
        "\n".join(message["content"] for message in row.messages)
        for row in load_rows("shipped:retain")
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    torch.manual_seed(0)
    for _ in range(EPOCHS):
        for places in torch.randperm(len(texts)).split(BATCH):
            batch = tokenizer(
                [texts[place] for place in places],
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=256,
            )
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**batch, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"stand-in base: loss {loss.item():.3f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    make_standin(Path("runs/defenses/standin-base"))
