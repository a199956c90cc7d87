"""Client of an OpenAI-compatible server: greedy answers to one conversation, or to many at once."""

import asyncio
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

Conversation = Sequence[Mapping[str, str]]

# Fix per error class of the `openai` package. The first class in the order of inheritance counts.
_FIXES = {
    "AuthenticationError": "set OPENAI_API_KEY to a key of this server.",
    "PermissionDeniedError": "set OPENAI_API_KEY to a key that may ask this model.",
    "NotFoundError": "correct the model's name, or --base_url, which usually ends in /v1.",
    "RateLimitError": "lower --concurrency, try again later, or check the account's quota.",
    "APITimeoutError": "lower --concurrency, or check whether the server is overloaded.",
    "APIConnectionError": "check that the server runs, and correct --base_url.",
    "BadRequestError": "use a model that accepts this request: these messages, temperature 0, a token limit, and the form of the answer, if "
    "one is asked for.",
    "APIError": "see the server's message; try again later.",
}

# After this many refusals in a row no other conversation is sent: the cause is not the words of one conversation.
_MAX_REFUSALS_IN_A_ROW = 20


class Refused(ValueError):
    """The server refuses this conversation (status 400), for example because of a content filter. It may answer others."""


class Endpoint:
    """A model behind `chat/completions`, asked at temperature 0 through the `openai` package.

    The package retries temporary errors (429, 408, 409, 5xx, lost connections, time-outs), after the time in Retry-After (more than a
    minute may end the retries) or with back-off. The key is that of OPENAI_API_KEY. A server given by `base_url` or OPENAI_BASE_URL
    may need none.

    Args:
        model: The server's name for the model.
        base_url: Address of the server (default: OPENAI_BASE_URL, or api.openai.com).
        max_tokens: Limit per answer, sent as `max_completion_tokens` to models that do not accept `max_tokens`.
        concurrency: Number of requests at once.
        timeout: Limit per answer, in seconds.
        max_retries: Number of retries per conversation.
        response_format: Form of the answers, such as a JSON schema, sent as it is.

    Raises:
        ImportError: If the `openai` package is not installed.
        ValueError: If there is no key, or the server's or a proxy's address cannot be used.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        *,
        max_tokens: int,
        concurrency: int = 16,
        timeout: float = 600,
        max_retries: int = 6,
        response_format: dict[str, Any] | None = None,
    ) -> None:
        try:
            import openai
        except ImportError as error:
            raise ImportError(
                "Got no package 'openai', expected it for an OpenAI-compatible server. Fix: pip install 'trl-miso[eval]'."
            ) from error
        self._openai = openai
        self._model = model
        self._key = _key(base_url)
        self._settings: dict[str, Any] = {"base_url": base_url, "timeout": timeout, "max_retries": max_retries}
        _check_address(base_url)
        self._client()  # fail now rather than after hours: responses of a model may be awaited before the first question
        self._max_tokens = max_tokens
        self._form = {} if response_format is None else {"response_format": response_format}
        self._limit_name = "max_tokens"
        self._concurrency = concurrency

    def ask(self, conversation: Conversation) -> str:
        """Return the answer to one conversation.

        Raises:
            ValueError: If there is no answer. The message gives the reason, and never contains the key.
        """
        ((_, answer),) = self.ask_all([conversation])
        if isinstance(answer, ValueError):
            raise answer
        return answer

    def ask_all(self, conversations: Iterable[Conversation]) -> Iterator[tuple[int, str | ValueError]]:
        """Yield (number from 0, answer) per conversation, as answers come.

        The answer to a conversation that failed is a ValueError. After a failure no other conversation is sent (after a `Refused`: only
        if 20 were refused in a row), but answers under way are awaited and yielded, since they may have been paid for.
        """
        waiting = enumerate(conversations)
        pending: dict[asyncio.Task[str | ValueError], int] = {}
        failed, refused_in_a_row = False, 0
        with asyncio.Runner() as runner:
            client = self._client()
            try:
                while True:
                    while not failed and len(pending) < self._concurrency:
                        following = next(waiting, None)
                        if following is None:
                            break
                        number, conversation = following
                        pending[runner.get_loop().create_task(self._answer(client, conversation))] = number
                    if not pending:
                        return
                    done, _ = runner.run(asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED))
                    for task in done:
                        answer = task.result()
                        if isinstance(answer, Refused):
                            refused_in_a_row += 1
                            failed |= refused_in_a_row >= _MAX_REFUSALS_IN_A_ROW
                        else:
                            refused_in_a_row = 0
                            failed |= isinstance(answer, ValueError)
                        yield pending.pop(task), answer
            finally:
                runner.run(client.close())

    def _client(self) -> Any:
        try:
            return self._openai.AsyncOpenAI(api_key=self._key, **self._settings)
        except Exception as error:  # httpx, which reads the proxies' variables, raises errors of many kinds
            variables = _proxy_variables()
            proxies = f"proxies set by {variables}" if variables else "no proxy set"
            raise ValueError(
                f"Got {type(error).__name__} for a client of the server, with {proxies}, expected a client. Fix: correct the server's address "
                "or these variables. Proxies with socks:// need pip install 'httpx[socks]'."
            ) from error

    async def _answer(self, client: Any, conversation: Conversation) -> str | ValueError:
        limit_name = self._limit_name
        try:
            completion = await client.chat.completions.create(
                model=self._model, messages=conversation, temperature=0, **self._form, **{limit_name: self._max_tokens}
            )
        except self._openai.BadRequestError as error:
            # OpenAI's newer models accept max_completion_tokens only, most other servers max_tokens only.
            if limit_name == "max_tokens" and "max_completion_tokens" in str(error):
                self._limit_name = "max_completion_tokens"
                return await self._answer(client, conversation)
            return self._error(client, error)
        except (self._openai.APIError, ValueError) as error:  # ValueError: the answer is not JSON
            return self._error(client, error)
        try:
            choice = completion.choices[0]
            text = choice.message.content
            if text is None:
                text = choice.message.refusal  # a refusal in words is an answer
        except (AttributeError, IndexError, TypeError):
            return self._error(client, f"{completion!r}, which holds no message")
        if not isinstance(text, str):
            return self._error(client, f"a message without text (finish_reason {choice.finish_reason!r})")
        return text

    def _error(self, client: Any, got: Exception | str) -> ValueError:
        """Describe the failure in one line, with a fix and without the key."""
        kind = Refused if isinstance(got, self._openai.BadRequestError) else ValueError
        fix = "check that the server speaks OpenAI's chat/completions; if thinking used up the tokens, allow more."
        if isinstance(got, Exception):
            names = [each.__name__ for each in type(got).__mro__]
            fix = next((_FIXES[name] for name in names if name in _FIXES), fix)
            if names[0] in ("APIConnectionError", "APITimeoutError") and _proxy_variables():
                fix += (
                    f" A proxy is set ({_proxy_variables()}): add the server's host to NO_PROXY to reach it directly."
                )
            cause = f" ({got.__cause__})" if got.__cause__ and str(got.__cause__) else ""
            got = f"{names[0]}: {got}{cause}"
        message = " ".join(got.replace(self._key, "***").split())
        if len(message) > 500:
            message = message[:500] + " ..."
        server = client.base_url.copy_with(username=None, password=None, query=None)
        return kind(f"Got {message} from {self._model} at {server}, expected an answer. Fix: {fix}")


def _proxy_variables() -> str:
    """List the environment variables that set a proxy, without their values."""
    names = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")
    return ", ".join(name for name in names if os.environ.get(name) or os.environ.get(name.lower()))


def _check_address(base_url: str | None) -> None:
    address = base_url or os.environ.get("OPENAI_BASE_URL")
    if address and not address.lower().startswith(("http://", "https://")):
        raise ValueError(
            "Got a server's address without http:// or https://, expected one of these. Fix: put it in front of the address."
        )


def _key(base_url: str | None) -> str:
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key and not (base_url or os.environ.get("OPENAI_BASE_URL")):
        raise ValueError(
            "Got no OPENAI_API_KEY in the environment, expected the server's key. Fix: export it, or give --base_url for a server "
            "that needs none."
        )
    if not (key.isascii() and key.isprintable()):
        raise ValueError(
            "Got an OPENAI_API_KEY with characters that a key cannot have, expected printable ASCII. Fix: copy the key again."
        )
    return key or "no-key"
