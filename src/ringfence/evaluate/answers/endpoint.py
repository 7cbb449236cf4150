"""Any server with OpenAI's chat completions: parallel requests, retries, replies as they come.

The HTTP side (back-off with jitter, Retry-After) is the openai client's. Does not know what is
asked or why.
"""

import os
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ...errors import HIDDEN, ModelError, credential_in, is_name_of_variable, one_line, redact
from ...text.roles import Messages, tools_of
from ...util.console import console
from ...util.strict_json import parse
from ...util.strict_yaml import Real, Whole
from .replies import Failure, NoReply, Reply, message_of, read_reply

# Seconds that the first request has alone, so that what a server refuses is learnt once.
AHEAD = 2.0
# Times, and tokens: the new limit after reasoning has used up the old one.
_MORE, _MORE_AT_LEAST = 4, 4096


class EndpointConfig(BaseModel):
    """Where a server is, and how many requests it may get."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    url: str = Field(description="base URL without a key, e.g. http://localhost:8000/v1")
    model: str = Field(min_length=1, description="the model's name on the server")
    key_env: str = Field(
        "OPENAI_API_KEY", description="environment variable that holds the key, if one is needed"
    )
    concurrency: Whole = Field(16, ge=1, le=4096, description="requests in flight at once")
    timeout: Real = Field(60.0, gt=0, le=86400, description="seconds to wait for one reply")
    attempts: Whole = Field(
        6, ge=1, le=100, description="tries of one request (429, 5xx, timeouts, cut connections)"
    )
    max_tokens: Whole | None = Field(
        None,
        ge=1,
        le=2**20,
        description="most tokens of one reply, reasoning included; default: what the task needs",
    )

    @field_validator("url")
    @classmethod
    def _without_credentials(cls, url: str) -> str:
        if credential := credential_in(url):
            raise ValueError(
                f"{redact(url)!r} holds {credential}; expected a URL without one: put the key into "
                "an environment variable and name that in key_env"
            )
        try:
            parts = urlsplit(url)
            well_formed = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # a port that is not a number
            well_formed = False
        if not well_formed or parts.fragment or re.search(r"\s", url):
            raise ValueError(
                f"expected a base URL such as http://localhost:8000/v1, found {redact(url)!r}"
            )
        return url

    @field_validator("key_env")
    @classmethod
    def _names_a_variable(cls, name: str) -> str:
        if not is_name_of_variable(name):
            raise ValueError(
                "expected the name of an environment variable (letters, digits, _), e.g. "
                "OPENAI_API_KEY; what was found is not shown, because it may be the key itself"
            )
        return name

    @field_validator("model")
    @classmethod
    def _is_no_key(cls, model: str) -> str:
        if redact(model) != model:
            raise ValueError(
                "expected the model's name on the server; what was found looks like a key"
            )
        return model


@dataclass(frozen=True)
class Request:
    """A request for one chat completion; `top_logprobs` = alternatives per token, 0 = none."""

    messages: Messages
    temperature: float
    max_tokens: int
    seed: int | None = None
    top_logprobs: int = 0


class Endpoint:
    """A server that answers chat completions.

    Raises:
        ModelError: the openai package is not installed.
    """

    def __init__(self, config: EndpointConfig) -> None:
        try:
            import openai  # noqa: F401
        except ImportError as error:
            raise ModelError(
                f"{config.url}: an endpoint needs openai: pip install 'ringfence[endpoint]'"
            ) from error
        self.config = config
        # Where servers differ; settled by the first reply.
        self._settled = False
        self._limit = "max_tokens"
        self._without: set[str] = set()
        self._least = 0  # token limit, after reasoning has used up a lower one

    @property
    def key(self) -> dict[str, Any]:
        """What its answers depend on, for the header of a table."""
        limit = {"max_tokens": self.config.max_tokens} if self.config.max_tokens else {}
        return {"url": self.config.url, "model": self.config.model, **limit}

    def ask(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        """The reply to every request, as they come, each with the request's place.

        At most `config.concurrency` are in flight. Closing the iterator cancels them. A request
        that gets no answer in `config.attempts` tries, or that the server refuses (400, 422), has a
        reply with an `error`. An optional parameter that the server refuses by name is left out of
        all later requests, and a token limit that reasoning uses up is raised once; both are
        reported on the console and in `Reply.adapted`.

        Raises:
            ModelError: no request can succeed: no server, the key is not accepted, no such model or
                path.
        """
        from anyio.from_thread import start_blocking_portal

        arrived: SimpleQueue[tuple[int, Reply] | None] = SimpleQueue()
        # A loop in its own thread works in notebooks too; the portal cancels it when the iterator
        # is closed.
        with start_blocking_portal() as portal:
            work = portal.start_task_soon(self._ask_all, requests, arrived.put)
            work.add_done_callback(lambda _: arrived.put(None))
            while (reply := arrived.get()) is not None:
                yield reply
            work.result()

    async def _ask_all(
        self, requests: Sequence[Request], arrived: Callable[[tuple[int, Reply]], None]
    ) -> None:
        from anyio import Event, create_task_group, move_on_after
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        left = iter(enumerate(requests))
        first_is_back = Event()

        async def work_off(client: Any, leads: bool) -> None:
            if not leads and not self._settled:
                with move_on_after(AHEAD):
                    await first_is_back.wait()
            for place, request in left:
                arrived((place, await self._ask(client, request)))
                self._settled = True
                first_is_back.set()

        base, query = split_query(self.config.url)
        timeout = self.config.timeout
        try:
            async with (
                # A redirect would turn a POST into another request.
                DefaultAsyncHttpxClient(follow_redirects=False, timeout=timeout) as http,
                AsyncOpenAI(
                    base_url=base,
                    default_query=query,
                    api_key=self._secret or "none",
                    timeout=timeout,
                    http_client=http,
                ) as client,
                create_task_group() as group,
            ):
                for number in range(min(self.config.concurrency, len(requests))):
                    group.start_soon(work_off, client, number == 0)
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    @property
    def _secret(self) -> str:
        return os.environ.get(self.config.key_env, "").strip()

    async def _ask(self, client: Any, request: Request) -> Reply:
        from anyio import sleep

        tries, limit = 0, max(self.config.max_tokens or request.max_tokens, self._least)
        raised = False
        while True:
            asked = self._arguments(request, limit)
            found = await self._try(client, asked, self.config.attempts - 1 - tries)
            if isinstance(found, Reply):
                if raised and limit > self._least:
                    self._tell(
                        f"allows replies {limit} tokens from now on, because reasoning used up "
                        "fewer (max_tokens)"
                    )
                    self._least = limit
                return replace(found, adapted=self._adapted(request, asked))
            if self._adapt(asked, found):
                continue
            if found.eaten and not raised:
                raised, limit = True, max(_MORE * limit, _MORE_AT_LEAST)
                continue
            self._raise_if_lasting(found)
            tries = min(tries + found.tries, self.config.attempts)
            if not found.passes or tries >= self.config.attempts:
                return Reply(None, error=found.words + (f" ({tries} tries)" if tries else ""))
            # As the client waits.
            await sleep(min(0.25 * 2**tries, 8.0) * random.uniform(0.75, 1.0))

    async def _try(self, client: Any, asked: dict[str, Any], retries: int) -> Reply | Failure:
        """One request, retried by the client if it gets no answer."""
        import openai

        retrying = client.with_options(max_retries=retries)
        try:
            raw = await retrying.chat.completions.with_raw_response.create(**asked)
        except openai.APIError as error:
            status = getattr(error, "status_code", None)
            passes = status is None or status in (408, 409, 429) or status >= 500
            tries, cause = self.config.attempts if passes else 0, type(error.__cause__).__name__
            return Failure(self._words(error), status, error.code, passes, tries, cause=cause)
        try:
            reply = read_reply(parse(raw.http_response.text, "reply", ModelError))
        except ModelError as error:
            said = raw.http_response.text.strip() or "nothing"
            found = Failure(
                f"a reply that cannot be read: {error}; the server sent: {said}", passes=True
            )
        except NoReply as error:
            found = error.failure
        else:
            return replace(reply, text=reply.text and self._hide(reply.text))
        tries = raw.retries_taken + 1 if found.passes else 0
        return replace(found, words=one_line(found.words, self._secret), tries=tries)

    def _words(self, error: Any) -> str:
        """A server's words with an error status, or why none answered."""
        words = error.message
        response = getattr(error, "response", None)
        if response is None:
            words += f" {error.__cause__}" if str(error.__cause__ or "") else ""
        elif "location" in response.headers and 300 <= error.status_code < 400:
            words += f" - redirects to {response.headers['location']}"
        elif " - " not in words:
            words += f" - {message_of(error.body) or response.reason_phrase}"
        return one_line(words, self._secret)

    def _hide(self, text: str) -> str:
        """A model's words without the key, which a server may echo."""
        return text.replace(self._secret, HIDDEN) if len(self._secret) > 3 else text

    def _arguments(self, request: Request, limit: int) -> dict[str, Any]:
        messages, tools = request.messages, tools_of(request.messages)
        arguments: dict[str, Any] = {
            "model": self.config.model,
            "messages": [
                {key: value for key, value in m.items() if key not in ("tools", "weight")}
                for m in messages
            ],
            "temperature": request.temperature,
            self._limit: limit,
        }
        if tools:
            arguments["tools"] = tools
        if request.seed is not None:
            arguments["seed"] = request.seed
        if request.top_logprobs:
            arguments |= {"logprobs": True, "top_logprobs": request.top_logprobs}
        return {name: value for name, value in arguments.items() if name not in self._without}

    def _adapted(self, request: Request, asked: dict[str, Any]) -> tuple[str, ...]:
        wanted = ["temperature", *(["seed"] if request.seed is not None else [])]
        wanted += ["logprobs"] if request.top_logprobs else []
        limit = asked.get(self._limit, request.max_tokens)
        more = [f"max_tokens {limit}"] if limit != request.max_tokens else []
        return (*(f"without {name}" for name in wanted if name not in asked), *more)

    def _adapt(self, asked: dict[str, Any], failure: Failure) -> bool:
        """From now on omits what a server refuses by name; False if it refuses something else."""
        words = failure.words
        if failure.status not in (400, 422):
            return False
        # Newer OpenAI models.
        if "max_tokens" in asked and (
            "max_completion_tokens" in words or _refuses(words, "max_tokens", asked["max_tokens"])
        ):
            if self._limit == "max_tokens":
                self._limit = "max_completion_tokens"
                self._tell(f"names the token limit max_completion_tokens from now on: {words}")
            return True
        optional = [name for name in _OPTIONAL if name in asked]
        refused = next((name for name in optional if _refuses(words, name, asked[name])), None)
        if refused is None:
            return False
        together = {"logprobs", "top_logprobs"} if "logprobs" in refused else {refused}
        if not together <= self._without:
            self._without |= together
            self._tell(f"does without {' and '.join(sorted(together))} from now on: {words}")
        return True

    def _tell(self, what: str) -> None:
        text = f"{self.config.url}: {self.config.model} {what}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _raise_if_lasting(self, failure: Failure) -> None:
        """Raises for a failure that every other request would meet as well."""
        what = f"{self.config.url}: model {self.config.model!r}: "
        status, words = failure.status, failure.words
        if failure.cause in _UNREACHABLE:
            raise ModelError(f"{what}no server can be reached: {words}")
        if status in (401, 403):
            unset = "" if self._secret else ", which is not set"
            raise ModelError(f"{what}{words} (the key is read from {self.config.key_env}{unset})")
        if status == 404:
            raise ModelError(f"{what}{words} (accepted: a base URL such as ../v1, a model it has)")
        if status is not None and 300 <= status < 400:
            raise ModelError(f"{what}{words} (redirects are not followed: name the server itself)")
        if failure.code == "insufficient_quota" or status == 402:
            raise ModelError(f"{what}{words}")


def split_query(url: str) -> tuple[str, dict[str, str]]:
    """A base URL without its query, and the query's parameters, which belong to every request."""
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    return urlunsplit(parts._replace(query="")), query


# By name: the client's own HTTP library has changed once already.
_UNREACHABLE = ("ConnectError", "ConnectTimeout", "UnsupportedProtocol", "LocalProtocolError")
_OPTIONAL = ("temperature", "seed", "top_logprobs", "logprobs")
_UNSUPPORTED = re.compile(
    r"un-?support|unknown|unrecogni[sz]ed|unexpected|extra (input|field)|forbidden|deprecated|"
    r"not\b.{0,20}\b(support|permit|allow|accept|compatib|recogni[sz]|available|implement)|"
    r"only the default|invalid (param|arg|field)|does ?n[o']t|cannot be (used|set|specified)",
    re.IGNORECASE,
)


def _refuses(words: str, name: str, value: Any) -> bool:
    """Whether a server's words refuse this parameter, not a user's value or a prompt's length."""
    if not re.search(rf"(?<![A-Za-z_]){name}(?![A-Za-z_])", words):
        return False
    if "logprobs" in name or (name == "temperature" and value == 0):
        return True
    return bool(_UNSUPPORTED.search(words)) and "context length" not in words
