"""An OpenAI-compatible server: one conversation, or many at once, answered greedily."""

import asyncio
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

Conversation = Sequence[Mapping[str, str]]

# By the class of the package's error; the first that fits.
_FIXES = {
    "AuthenticationError": "set OPENAI_API_KEY to a key of this server.",
    "PermissionDeniedError": "set OPENAI_API_KEY to a key that may ask this model.",
    "NotFoundError": "correct the model's name, or --base_url, which mostly ends in /v1.",
    "RateLimitError": "ask fewer at once (--concurrency), or later, or see to the account's quota.",
    "APITimeoutError": "ask fewer at once (--concurrency), or see whether the server is overloaded.",
    "APIConnectionError": "see that the server runs, and correct --base_url.",
    "BadRequestError": "ask a model that takes this request: these messages, temperature 0 and a limit of tokens.",
    "APIError": "the server says why; try again later.",
}

# Of conversations: after so many that were refused in a row, no other is asked: it is not their words.
_GIVE_UP = 20


class Refused(ValueError):
    """The server will not answer this conversation (400), as where a filter dislikes its words; it may answer others."""


class Endpoint:
    """A model behind `chat/completions`, asked at temperature 0 through the `openai` package.

    What may pass (429, 408, 409, 5xx, lost connections, time-outs) is tried again by the package, after the time that Retry-After
    says (a longer one than a minute may end it) or with back-off. The key is OPENAI_API_KEY's; a server given by `base_url`, or
    OPENAI_BASE_URL, may need none.

    Args:
        base_url: Of the server; None for the package's own (OPENAI_BASE_URL, or api.openai.com).
        max_tokens: Limit of an answer, sent as `max_completion_tokens` to models that take no `max_tokens`.
        concurrency: Conversations at once.
        timeout: Seconds for one answer.
        max_retries: How often one conversation is tried again.

    Raises:
        ValueError: If the package is not installed, there is no key, or the address or a proxy's cannot be used.
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
    ) -> None:
        try:
            import openai
        except ImportError as error:
            raise ValueError("Got no package 'openai', expected it. Fix: pip install 'trl-miso[eval]'.") from error
        self._openai = openai
        self._model = model
        self._key = _key(base_url)
        self._settings: dict[str, Any] = {"base_url": base_url, "timeout": timeout, "max_retries": max_retries}
        _check_address(base_url)
        self._client()  # what cannot be made is said now: others may be asked for hours before
        self._max_tokens = max_tokens
        self._limit = "max_tokens"
        self._concurrency = concurrency

    def ask(self, conversation: Conversation) -> str:
        """The answer to one conversation.

        Raises:
            ValueError: If there is none; the message says why, and never the key.
        """
        ((_, answer),) = self.ask_all([conversation])
        if isinstance(answer, ValueError):
            raise answer
        return answer

    def ask_all(self, conversations: Iterable[Conversation]) -> Iterator[tuple[int, str | ValueError]]:
        """The answers as they come, each with the number, from 0, of its conversation.

        A conversation that stays without answer has a ValueError in its place. From then on no other is asked (if it is a `Refused`, only
        after 20 in a row), but those that are under way are still waited for and yielded: they may have been paid for.
        """
        waiting = enumerate(conversations)
        asked: dict[asyncio.Task[str | ValueError], int] = {}
        failed, refused = False, 0
        with asyncio.Runner() as runner:
            client = self._client()
            try:
                while True:
                    while not failed and len(asked) < self._concurrency and (following := next(waiting, None)):
                        task = runner.get_loop().create_task(self._answer(client, following[1]))
                        asked[task] = following[0]
                    if not asked:
                        return
                    done, _ = runner.run(asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED))
                    for task in done:
                        answer = task.result()
                        refused = refused + 1 if isinstance(answer, Refused) else 0
                        failed |= refused >= _GIVE_UP or isinstance(answer, ValueError) and not refused
                        yield asked.pop(task), answer
            finally:
                runner.run(client.close())

    def _client(self) -> Any:
        try:
            return self._openai.AsyncOpenAI(api_key=self._key, **self._settings)
        except Exception as error:  # of the package beneath, which reads the proxies
            proxies = f"the proxies that {_proxies()} name{'s' * (',' not in _proxies())}" if _proxies() else "no proxy"
            raise ValueError(
                f"Got {type(error).__name__} for a client of the server, with {proxies}, expected one. Fix: correct the server's address or "
                "these variables; proxies with socks:// need pip install 'httpx[socks]'."
            ) from error

    async def _answer(self, client: Any, conversation: Conversation) -> str | ValueError:
        limit = self._limit
        try:
            completion = await client.chat.completions.create(
                model=self._model, messages=conversation, temperature=0, **{limit: self._max_tokens}
            )
        except self._openai.BadRequestError as error:
            # OpenAI's newer models take the one name, most other servers the other.
            if limit == "max_tokens" and "max_completion_tokens" in str(error):
                self._limit = "max_completion_tokens"
                return await self._answer(client, conversation)
            return self._error(client, error)
        except (self._openai.APIError, ValueError) as error:  # ValueError: JSON that is none
            return self._error(client, error)
        try:
            choice = completion.choices[0]
            text = choice.message.content if choice.message.content is not None else choice.message.refusal
        except (AttributeError, IndexError, TypeError):
            return self._error(client, f"{completion!r}, which holds no message")
        if not isinstance(text, str):
            return self._error(client, f"a message without text (finish_reason {choice.finish_reason!r})")
        return text

    def _error(self, client: Any, got: Exception | str) -> ValueError:
        """What the CLI prints, without key."""
        kind = Refused if isinstance(got, self._openai.BadRequestError) else ValueError
        fix = (
            "see that the server speaks OpenAI's chat/completions; if the tokens were used up by thinking, allow more."
        )
        if isinstance(got, Exception):
            names = [each.__name__ for each in type(got).__mro__]
            fix = next((_FIXES[name] for name in names if name in _FIXES), fix)
            if names[0] in ("APIConnectionError", "APITimeoutError") and _proxies():
                fix += f" A proxy is set ({_proxies()}): name the server's host in NO_PROXY if it is to be reached without."
            cause = f" ({got.__cause__})" if got.__cause__ and str(got.__cause__) else ""
            got = f"{names[0]}: {got}{cause}"
        said = " ".join(got.replace(self._key, "***").split())
        said = said if len(said) <= 500 else said[:500] + " ..."
        server = client.base_url.copy_with(username=None, password=None, query=None)
        return kind(f"Got {said} from {self._model} at {server}, expected an answer. Fix: {fix}")


def _proxies() -> str:
    """The names of the variables that set a proxy, never their values."""
    names = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")
    return ", ".join(name for name in names if os.environ.get(name) or os.environ.get(name.lower()))


def _check_address(base_url: str | None) -> None:
    address = base_url or os.environ.get("OPENAI_BASE_URL")
    if address and not address.lower().startswith(("http://", "https://")):
        raise ValueError(
            "Got a server's address without http:// or https://, expected one of them. Fix: put it in front."
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
            "Got an OPENAI_API_KEY with characters that no key has, expected printable ASCII. Fix: copy the key again."
        )
    return key or "no-key"
