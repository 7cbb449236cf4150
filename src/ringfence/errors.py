"""One exception tree. Every message names the field or file and line, what was found and what is
accepted; keys and passwords are removed from it.

Every error of ringfence and every word of a server passes through here. Knows texts and the
environment; does not know who sends a request.
"""

import os
import re
from collections.abc import Iterable
from difflib import get_close_matches
from urllib.parse import parse_qsl, quote, urlsplit

LONGEST_LINE, MOST_LINES = 600, 12  # characters of a line, lines of a message


class RingfenceError(Exception):
    """Base of all errors that a user can fix. The command line prints its text and exits with 2.

    A message quotes what was found, which may be a key, terminal commands or a million letters:
    keys are removed here, unprintable characters are spelt out, and long texts are cut.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_plain(redact(message)))


class RecipeError(RingfenceError):
    """A recipe names an unknown field or holds a value that is not accepted."""


class DataError(RingfenceError):
    """A data file or one of its rows cannot be used."""


class ChatError(RingfenceError):
    """A conversation cannot be rendered, or its roles cannot be found."""


class ModelError(RingfenceError):
    """A model, tokenizer or adapter cannot be loaded or does not fit."""


class DefenseError(RingfenceError):
    """A defense cannot do its work: no token of its role, no layer seen, no gradient."""


def _plain(text: str) -> str:
    lines = [
        "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line) for line in text.split("\n")
    ]
    if len(lines) > MOST_LINES:
        lines = [*lines[: MOST_LINES - 1], f"... and {len(lines) - MOST_LINES + 1} more"]
    return "\n".join(
        line if len(line) <= LONGEST_LINE else f"{line[:450]} ... {line[-100:]}" for line in lines
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` if a known name is close to `name`, else the list of known names."""
    known = sorted(known)
    close = get_close_matches(name, known, n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else f" (accepted: {', '.join(known)})"


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line; its type if it says nothing."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


# ------------------------------------------------------------------ keys and passwords

HIDDEN = "[hidden]"
LONGEST = 300  # characters of a server's words

_SECRET_NAME = re.compile(
    r"key|token|sig|secret|pass|pwd|auth|cred|jwt|session|code", re.IGNORECASE
)
_SECRET_VARIABLE = re.compile(
    r"(^|_)(API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|PWD|CREDENTIALS?)$", re.IGNORECASE
)
# Shapes that only keys have.
_KEY = re.compile(
    r"\bsk-[\w-]{6,}"
    r"|\b(?:sk|pk|rk|gsk|xai|pplx|r8|nvapi|ghp|gho|ghs|glpat|hf|api_org)[-_](?:(?=[a-z_-]*\d)[\w-]{8,}|[a-z0-9]{16,})"
    r"|\bgithub_pat_\w{8,}|\bAIza[\w-]{20,}|\bAKIA[A-Z0-9]{12,}|\bxox[abprs]-[\w-]{8,}|\beyJ[\w-]{8,}\.[\w-]+(?:\.[\w-]*)?",
    re.IGNORECASE,
)
_SCHEME = re.compile(
    r"\b(Bearer|Basic)\s+(?:(?=\S*[\d+/=_])[\w.~+/=-]{6,}|[\w.~+/=-]{16,})", re.IGNORECASE
)
_USER = re.compile(r"\b([a-z][a-z0-9+.-]*://)[^\s'\"@]*@", re.IGNORECASE)
_QUERY = re.compile(r"([?&;#])([^\s?&=;#'\"]+)=([^\s&;#'\"]+)")
_NAMED = re.compile(
    r"(?<![A-Za-z0-9])((?:x-)?(?:api[_-]?key|apikey|access[_-]?token|auth[_-]?token|client[_-]?secret|authorization|"
    r"password|passwd|secret)['\"]?\s*[:=]\s*(?:(?:Bearer|Basic)\s+)?['\"]?)([^\s'\",;&}\])]+)",
    re.IGNORECASE,
)


def redact(text: str, *secrets: str) -> str:
    """The text without keys and passwords: the secrets given, values of environment variables such
    as `X_API_KEY`, and anything shaped like one (`user:password@` and `?key=...` in URLs,
    `Bearer ...`, `sk-...`, `hf_...`)."""
    known = {secret for secret in secrets if len(secret) > 3}
    known |= {
        value
        for name, value in os.environ.items()
        if len(value) > 7 and _SECRET_VARIABLE.search(name) and not _is_path(value)
    }
    for secret in sorted(known, key=len, reverse=True):
        for form in {secret, quote(secret, safe="")}:
            text = text.replace(form, HIDDEN)
    text = _USER.sub(rf"\1{HIDDEN}@", text)
    text = _QUERY.sub(_hide_secret, text)
    text = _NAMED.sub(rf"\1{HIDDEN}", text)
    text = _SCHEME.sub(rf"\1 {HIDDEN}", text)
    return _KEY.sub(HIDDEN, text)


def _hide_secret(found: re.Match[str]) -> str:
    is_secret = _is_secret(found[2], found[3])
    return f"{found[1]}{found[2]}={HIDDEN}" if is_secret else found[0]


def one_line(text: str, *secrets: str) -> str:
    """A server's words in one line of a sane length, without keys; of an HTML page only its
    text."""
    if re.search(r"<(!doctype|html|head|body)\b", text[:2000], re.IGNORECASE):
        text = re.sub(r"(?is)<(script|style)\b.*?(</\1>|$)|<[^>]*>", " ", text[:100_000])
    text = "".join(
        letter if letter.isprintable() else " " for letter in redact(text[:100_000], *secrets)
    )
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else text[:LONGEST].rstrip() + " ..."


def credential_in(url: str) -> str | None:
    """What in a URL is a key or password, in words; None if nothing is."""
    if "@" in url:
        return "a user or password"
    for name, value in parse_qsl(urlsplit(url).query, keep_blank_values=True):
        if _is_secret(name, value):
            return f"the parameter {redact(name)!r}"
    return "something shaped like a key" if redact(url) != url else None


def is_name_of_variable(text: str) -> bool:
    """Whether a text may be the name of an environment variable, and does not look like a key
    itself."""
    is_name = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,127}", text)
    if not is_name or _shape_of_key(text) or _KEY.search(text):
        return False
    return text in os.environ or text.upper() == text


def _is_path(value: str) -> bool:
    """The working directory in PWD, a file in GOOGLE_CREDENTIALS."""
    return value.startswith(("/", "~", ".")) and os.path.exists(value)


def _is_secret(name: str, value: str) -> bool:
    return bool(_SECRET_NAME.search(name) or _shape_of_key(value))


def _shape_of_key(text: str) -> bool:
    """A long run of letters and digits, which no word or date has."""
    runs = re.findall(r"[A-Za-z0-9]{16,}", text)
    return any(re.search(r"\d", run) and re.search(r"[A-Za-z]", run) for run in runs)
