"""The model hub, and how not to wait for it: its reachability is checked once, and if it cannot be
reached, libraries read its cache. Does not know what a file means. Imports no torch.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Literal

from ..errors import ModelError, first_line

SECONDS = 8.0  # for the hub to answer, including the look-up of its name
_LOCAL = {
    "model": ("folder", "Name a local folder, or `default`", "hf download"),
    "data set": ("file", "Name a local file, or shipped rows", "hf download --repo-type dataset"),
}


@cache
def reachable() -> bool:
    """Whether the hub answers, whatever it says. One request; False if the user works offline."""
    from huggingface_hub import constants, get_session, is_offline_mode

    if is_offline_mode():
        return False
    answered: list[int] = []

    def ask() -> None:
        try:
            answered.append(get_session().head(constants.ENDPOINT, timeout=SECONDS / 2).status_code)
        except Exception:  # whatever a network, proxy or resolver raises means the same here
            return

    # In a thread, because the look-up of a name has no time limit.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(SECONDS)
    return bool(answered)


@contextmanager
def quick(source: str) -> Iterator[None]:
    """Within it, no library tries to fetch `source` from a hub that cannot be reached: each reads
    its cache at once."""
    from huggingface_hub import constants

    if Path(source).exists() or reachable():
        yield
        return
    # datasets keeps a copy.
    asked = [constants, *filter(None, [sys.modules.get("datasets.config")])]
    before = [module.HF_HUB_OFFLINE for module in asked]
    for module in asked:
        module.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module, value in zip(asked, before):
            module.HF_HUB_OFFLINE = value  # type: ignore[attr-defined]


def is_repository(name: str) -> bool:
    """Whether a name could be a hub id: `name` or `owner/name`."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def fetch(repository: str, file: str) -> Path | None:
    """A file of a hub repository, from the cache or the network; None if the repository has no such
    file.

    Raises:
        ModelError: there is no such repository, or the hub cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with quick(repository):
        try:
            return Path(huggingface_hub.hf_hub_download(repository, file))
        except LocalEntryNotFoundError as error:
            if _is_cached(repository):
                return None  # a fetched repository is complete in the cache
            raise ModelError(f"{repository}: {unreached()}") from error
        except EntryNotFoundError:
            return None
        except Exception as error:  # the hub raises many kinds; the user needs one sentence
            raise ModelError(
                f"{repository}: {file} is unavailable: {first_line(error)} (accepted: 'default', a "
                "local folder, a hub id)"
            ) from error


def unreached(kind: Literal["model", "data set"] = "model") -> str:
    """Why something on the hub is unavailable without a network, and what to do."""
    from huggingface_hub import constants

    place, otherwise, command = _LOCAL[kind]
    return (
        f"no such {place}, and not in the hub's cache; {constants.ENDPOINT} cannot be reached. "
        f"{otherwise}; or fetch it where there is a network (`{command}`), bring the hub's cache "
        "here, and set HF_HUB_OFFLINE=1"
    )


def _is_cached(repository: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return any(
        isinstance(try_to_load_from_cache(repository, file), str)
        for file in ("config.json", "tokenizer.json", "tokenizer_config.json")
    )
