"""Any server that speaks OpenAI's chat completions: many requests at once, retried, each reply as it comes.

The HTTP side (back-off with jitter, Retry-After) is the openai client's. Does not know what is asked, or why.
"""

import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from ..chat import Messages, tools_of
from ..console import console
from ..errors import ModelError


class EndpointConfig(BaseModel):
    """Where a server is, and how hard it may be asked."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    url: str = Field(pattern="^https?://", description="base URL, e.g. http://localhost:8000/v1")
    model: str = Field(description="the model's name on the server")
    key_env: str = Field("OPENAI_API_KEY", description="environment variable that holds the key, if one is needed")
    concurrency: int = Field(16, ge=1, description="requests under way at once")
    timeout: float = Field(60.0, gt=0, description="seconds to wait for one reply")
    attempts: int = Field(6, ge=1, description="tries of one request (429, 5xx, timeouts, cut connections)")


@dataclass(frozen=True)
class Request:
    """One chat completion to ask for; `top_logprobs` = alternatives wanted for each token, 0 = none."""

    messages: Messages
    temperature: float
    max_tokens: int
    seed: int | None = None
    top_logprobs: int = 0


@dataclass(frozen=True)
class Reply:
    """What came back.

    Attributes:
        text: the completion; None with `error`.
        finished: it ended by itself, not at the token limit.
        top: for each generated token, log-probability by token text; empty where the server gives none.
        error: why there is no text, after all attempts.
    """

    text: str | None
    finished: bool = False
    top: list[dict[str, float]] = field(default_factory=list)
    error: str | None = None


class Endpoint:
    """A server that answers chat completions.

    Raises:
        ModelError: the openai package is not installed.
    """

    def __init__(self, config: EndpointConfig) -> None:
        try:
            import openai  # noqa: F401
        except ImportError as error:
            raise ModelError(f"{config.url}: an endpoint needs openai: pip install 'ringfence[endpoint]'") from error
        self.config = config
        # What servers disagree about; settled by the first one that refuses it.
        self._limit = "max_tokens"
        self._logprobs = True

    @property
    def key(self) -> dict[str, Any]:
        """What its answers depend on, for the header of a table."""
        return {"url": self.config.url, "model": self.config.model}

    def ask(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        """Every request's one reply, as they come, each with the request's place.

        At most `config.concurrency` are under way. Closing the iterator cancels them. A request that gets no answer in
        `config.attempts` tries, or that the server refuses (400, 422), has a reply with an `error`.

        Raises:
            ModelError: no request can succeed: no server there, the key is not accepted, no such model or path.
        """
        from anyio.from_thread import start_blocking_portal

        arrived: SimpleQueue[tuple[int, Reply] | None] = SimpleQueue()
        # A loop in a thread of its own works in notebooks too; the portal cancels it when the iterator is closed.
        with start_blocking_portal() as portal:
            work = portal.start_task_soon(self._ask_all, requests, arrived.put)
            work.add_done_callback(lambda _: arrived.put(None))
            while (reply := arrived.get()) is not None:
                yield reply
            work.result()

    async def _ask_all(self, requests: Sequence[Request], arrived: Callable[[tuple[int, Reply]], None]) -> None:
        from anyio import create_task_group
        from openai import AsyncOpenAI

        left = iter(enumerate(requests))

        async def work_off(client: Any) -> None:
            for place, request in left:
                arrived((place, await self._ask(client, request)))

        key = os.environ.get(self.config.key_env, "").strip() or "none"
        try:
            async with (
                AsyncOpenAI(base_url=self.config.url, api_key=key, timeout=self.config.timeout) as client,
                create_task_group() as group,
            ):
                for _ in range(min(self.config.concurrency, len(requests))):
                    group.start_soon(work_off, client)
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _ask(self, client: Any, request: Request) -> Reply:
        import openai
        from anyio import sleep

        tries = 0
        while True:
            asked = self._arguments(request)
            retrying = client.with_options(max_retries=self.config.attempts - 1 - tries)
            try:
                raw = await retrying.chat.completions.with_raw_response.create(**asked)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                if self._adapt(asked, error.message):
                    continue
                return Reply(None, error=error.message)
            except openai.APIError as error:
                self._raise_if_lasting(error)
                return Reply(None, error=f"{error.message} (up to {self.config.attempts} tries)")
            try:
                return _read(raw.http_response.json())
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                tries += raw.retries_taken + 1
                if tries >= self.config.attempts:
                    return Reply(None, error=f"a reply that cannot be read: {error!r} ({tries} tries)")
            await sleep(min(0.25 * 2**tries, 8.0) * random.uniform(0.75, 1.0))  # as the client waits

    def _arguments(self, request: Request) -> dict[str, Any]:
        messages, tools = request.messages, tools_of(request.messages)
        arguments: dict[str, Any] = {
            "model": self.config.model,
            "messages": [{key: value for key, value in m.items() if key not in ("tools", "weight")} for m in messages],
            "temperature": request.temperature,
            self._limit: request.max_tokens,
        }
        if tools:
            arguments["tools"] = tools
        if request.seed is not None:
            arguments["seed"] = request.seed
        if request.top_logprobs and self._logprobs:
            arguments |= {"logprobs": True, "top_logprobs": request.top_logprobs}
        return arguments

    def _adapt(self, asked: dict[str, Any], message: str) -> bool:
        """Does without what a server refuses by name, from now on; False where it refuses something else."""
        if "logprobs" in asked and "logprobs" in message:
            if self._logprobs:
                console.print(f"{self.config.url}: does without log-probabilities from now on: {message}", markup=False)
            self._logprobs = False
        elif "max_tokens" in asked and "max_completion_tokens" in message:  # newer OpenAI models
            self._limit = "max_completion_tokens"
        else:
            return False
        return True

    def _raise_if_lasting(self, error: Any) -> None:
        """Stops at what every other request would meet as well."""
        status = getattr(error, "status_code", None)
        what = f"{self.config.url}: model {self.config.model!r}"
        if status in (401, 403):
            raise ModelError(f"{what}: {error.message} (the key is read from {self.config.key_env})") from error
        if status == 404:
            raise ModelError(f"{what}: {error.message} (accepted: a base URL such as ../v1, a model it has)") from error
        if error.code == "insufficient_quota":
            raise ModelError(f"{what}: {error.message}") from error
        # By name: the client's own HTTP library has changed once already.
        if type(error.__cause__).__name__ in ("ConnectError", "ConnectTimeout", "UnsupportedProtocol"):
            raise ModelError(f"{what}: no server can be reached there: {error.__cause__}") from error


def _read(completion: Any) -> Reply:
    """The reply in a completion's JSON; any error means that it is none."""
    choice = completion["choices"][0]
    text, reason = choice["message"]["content"], choice.get("finish_reason")
    if not isinstance(text, str) or (not text and reason not in ("stop", "length")):
        raise ValueError(f"no content, finish_reason {reason!r}")
    try:
        top = [_merged(token["top_logprobs"] or [token]) for token in (choice.get("logprobs") or {})["content"]]
    except (ValueError, LookupError, TypeError, AttributeError):
        top = []
    return Reply(text, reason == "stop", top)


def _merged(entries: list[dict[str, Any]]) -> dict[str, float]:
    """Log-probability by token text. Several tokens may have one text (`9` and the byte of `9`): they add up."""
    top: dict[str, float] = {}
    for entry in entries:
        if not entry["logprob"] < 0.01:  # NaN too
            raise ValueError(f"no log-probability: {entry['logprob']}")
        top[entry["token"]] = float(np.logaddexp(top.get(entry["token"], -np.inf), entry["logprob"]))
    return top
