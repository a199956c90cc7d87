"""Endpoint, the client of OpenAI-compatible servers: requests, retries, error messages, answers that are kept."""

import os
import signal
import sys
import time
from threading import Thread

import pytest

from tests.support.chat_server import Fault, chat_server, completion
from trl_miso.evaluation.endpoint import Endpoint, Refused

pytest.importorskip("openai", reason="needs pip install 'trl-miso[eval]'")

KEY = "sk-secret-0123456789"
SLOW_DOWN = {"error": {"message": "slow down"}}


def user(text):
    return [{"role": "user", "content": text}]


@pytest.fixture
def server():
    with chat_server() as server:
        yield server


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def endpoint(server, **settings):
    return Endpoint("m", server.url, **({"max_tokens": 7, "max_retries": 1, "timeout": 5} | settings))


def test_request_and_answer(server):
    conversation = [{"role": "system", "content": "Be brief."}, *user("Why?")]
    assert endpoint(server).ask(conversation) == "answer to Why?"
    (request,) = server.requests
    assert request.body == {"model": "m", "messages": conversation, "temperature": 0, "max_tokens": 7}
    assert request.key == f"Bearer {KEY}" and request.path == "/v1/chat/completions"


def test_answers_are_numbered_and_yielded_as_they_come(server):
    server.faults["number 0"] = [Fault(delay=0.3)]
    answers = list(endpoint(server, concurrency=4).ask_all(user(f"number {at}") for at in range(12)))
    assert answers[-1] == (0, "answer to number 0")
    assert sorted(answers) == [(at, f"answer to number {at}") for at in range(12)]
    assert 2 <= server.most_at_once <= 4
    assert list(endpoint(server).ask_all([])) == []


def test_temporary_errors_are_retried(server):
    """After the time in Retry-After, which differs from the package's own half second."""
    server.faults = {
        "limited": [Fault(429, SLOW_DOWN, {"Retry-After": "0.1"})],
        "broken": [Fault(500, b"<html>", {"Retry-After": "0.1"})],
        "slow": [Fault(delay=2)],
    }
    asked = endpoint(server, timeout=0.3, concurrency=3)
    assert dict(asked.ask_all(map(user, server.faults))) == {
        at: f"answer to {text}" for at, text in enumerate(server.faults)
    }
    for text in ("limited", "broken"):
        first, second = (request.at for request in server.requests if request.text == text)
        assert 0.1 <= second - first < 0.35
    assert len(server.requests) == 6


BROKEN = {
    "limited": ([Fault(429, SLOW_DOWN, {"Retry-After": "0.01"})] * 2, "429 - .*slow down.*lower --concurrency"),
    "broken": ([Fault(500, b"", {"Retry-After": "0.01"})] * 2, "500.*try again later"),
    "slow": ([Fault(delay=2)] * 2, "timed out.*overloaded"),
    "not JSON": ([Fault(200, b'{"choices": [')], "JSONDecodeError.*speaks OpenAI's"),
    "a page": ([Fault(200, b"<html>", {"Content-Type": "text/html"})], "'<html>', which holds no message.*speaks"),
    "no choices": ([Fault(200, {"choices": []})], "choices=.*which holds no message.*speaks"),
    "nothing": ([Fault(200, {})], "which holds no message.*speaks"),
    "no text": ([Fault(200, completion(None, "length"))], "without text .finish_reason 'length'.*allow more"),
    "no such model": (
        [Fault(404, {"error": {"message": "what is m"}})],
        "404 - .*what is m.*--base_url, which usually ends",
    ),
    "not greedy": ([Fault(400, {"error": {"message": "no temperature"}})], "no temperature.*temperature 0"),
    "wrong key": ([Fault(401, {"error": {"message": f"{KEY} is wrong"}})], r"401 - .*\*\*\* is wrong.*OPENAI_API_KEY"),
    "long": ([Fault(400, {"error": {"message": "long" * 999}})], r"longlong\w+ \.\.\. from m at"),
}


@pytest.mark.parametrize(("faults", "message"), BROKEN.values(), ids=BROKEN)
def test_a_conversation_without_an_answer_raises_with_the_reason(server, faults, message):
    server.faults["Why?"] = list(faults)
    asked = endpoint(server, timeout=0.2 if "timed out" in message else 5)
    with pytest.raises(ValueError, match=f"^Got .*{message}") as error:
        asked.ask(user("Why?"))
    assert KEY not in str(error.value) and f"from m at {server.url}" in str(error.value)
    assert len(server.requests) == len(faults) and len(str(error.value)) < 800
    assert asked.ask(user("Why?")) == "answer to Why?"


def test_an_unreachable_server_is_an_error():
    with pytest.raises(
        ValueError, match=r"APIConnectionError.* at http://127\.0\.0\.1:9/v1/?, expected.*check that the server runs"
    ):
        Endpoint("m", "http://me:word@127.0.0.1:9/v1?token=x", max_tokens=1, max_retries=0).ask(user("a"))


PROXIES = [f"{name}_PROXY" for name in ("ALL", "HTTP", "HTTPS", "NO")]


@pytest.mark.parametrize("proxy", ["socks5://me:word@127.0.0.1:9", "http://me:word@a:b", "me:word"])
def test_an_unusable_proxy_is_named(proxy, monkeypatch):
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(
        ValueError, match=r"^Got \w+ for a client.* proxies set by ALL_PROXY, expected .*Fix: "
    ) as error:
        Endpoint("m", "http://127.0.0.1:9/v1", max_tokens=1)
    assert "word" not in str(error.value)


def test_a_proxy_in_use_is_named_if_the_connection_fails(monkeypatch):
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("http_proxy", "http://me:word@127.0.0.1:9")
    with pytest.raises(ValueError, match=r"APIConnectionError.* A proxy is set \(HTTP_PROXY\): .*NO_PROXY") as error:
        Endpoint("m", "http://server.test/v1", max_tokens=1, max_retries=0).ask(user("a"))
    assert "word" not in str(error.value)


@pytest.mark.parametrize("address", ["127.0.0.1:9/v1", "localhost", "ftp://a"])
def test_an_address_without_a_scheme_is_refused_at_once(address, monkeypatch):
    with pytest.raises(ValueError, match="without http:// or https://.*Fix: "):
        Endpoint("m", address, max_tokens=1)
    monkeypatch.setenv("OPENAI_BASE_URL", address)
    with pytest.raises(ValueError, match="without http:// or https://.*Fix: "):
        Endpoint("m", max_tokens=1)


def test_after_a_failure_nothing_is_sent_and_answers_under_way_are_kept(server):
    server.faults = {"number 1": [Fault(401, {"error": {"message": "no"}})], "number 0": [Fault(delay=0.3)]}
    answers = dict(endpoint(server, concurrency=2).ask_all(user(f"number {at}") for at in range(50)))
    assert answers.pop(0) == "answer to number 0"
    assert isinstance(answers.pop(1), ValueError)
    assert not answers and len(server.requests) == 2


def test_one_refusal_stops_no_others_but_twenty_in_a_row_do(server):
    no = Fault(400, {"error": {"message": "no"}})
    server.faults = {"number 1": [no] * 11}
    answers = dict(endpoint(server, concurrency=1).ask_all(user(f"number {at}") for at in range(50)))
    refused = [at for at, answer in answers.items() if isinstance(answer, Refused)]
    assert len(answers) == 50 and refused == [1, *range(10, 20)]
    server.faults = {"number": [no] * 99}
    assert len(list(endpoint(server, concurrency=1).ask_all(user(f"number {at}") for at in range(50)))) == 20


def test_a_refusal_is_an_answer(server):
    server.faults["Why?"] = [Fault(200, completion(None, refusal="I would rather not."))]
    assert endpoint(server).ask(user("Why?")) == "I would rather not."


def test_models_that_reject_max_tokens_get_max_completion_tokens(server):
    error = {"message": "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."}
    server.faults["a"] = [Fault(400, {"error": error | {"param": "max_tokens", "code": "unsupported_parameter"}})]
    asked = endpoint(server)
    assert asked.ask(user("a")) == "answer to a"
    assert asked.ask(user("b")) == "answer to b"
    limits = [request.body.keys() - {"model", "messages", "temperature"} for request in server.requests]
    assert limits == [{"max_tokens"}, {"max_completion_tokens"}, {"max_completion_tokens"}]
    assert server.requests[-1].body["max_completion_tokens"] == 7


def test_keys(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")  # as read from a file
    endpoint(server).ask(user("a"))
    assert server.requests[-1].key == f"Bearer {KEY}"
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\x1bsecret")
    with pytest.raises(
        ValueError, match="Got an OPENAI_API_KEY with characters that a key cannot have.*Fix: "
    ) as error:
        endpoint(server)
    assert "secret" not in str(error.value)
    monkeypatch.delenv("OPENAI_API_KEY")
    endpoint(server).ask(user("a"))
    assert server.requests[-1].key == "Bearer no-key"
    with pytest.raises(ValueError, match="Got no OPENAI_API_KEY.*Fix: .*--base_url"):
        Endpoint("m", max_tokens=1)
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    assert Endpoint("m", max_tokens=1).ask(user("a")) == "answer to a" and server.requests[-1].key == "Bearer no-key"
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert Endpoint("m", max_tokens=1).ask(user("a")) == "answer to a"


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r"Got no package 'openai'.*Fix: pip install 'trl-miso\[eval\]'"):
        Endpoint("m", max_tokens=1)


def test_an_interrupt_ends_requests_at_once(server):
    """Ctrl-C while requests are under way that would take another ten seconds."""
    server.faults["number"] = [Fault(delay=10)] * 2
    begun = time.monotonic()

    def interrupt():
        while len(server.requests) < 2 and time.monotonic() < begun + 5:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest's workers ignore SIGINT
    Thread(target=interrupt).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            list(endpoint(server, timeout=60, concurrency=2).ask_all(user(f"number {at}") for at in range(4)))
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(server.requests) == 2 and time.monotonic() < begun + 5
