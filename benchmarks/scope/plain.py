"""A scoped adapter without its scope."""

import json
import shutil
from pathlib import Path


def without_scope(adapter: Path, folder: Path) -> Path:
    """A copy that plain peft loads, and that acts everywhere."""
    shutil.copytree(adapter, folder, ignore=shutil.ignore_patterns("scope.*"))
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": "LORA"}))
    return folder
