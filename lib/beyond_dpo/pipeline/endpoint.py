"""Ask an OpenAI-compatible endpoint many things at once: each reply is kept as it comes, tokens and
cost are counted.

Its key is read from OPENAI_API_KEY by the client and is no argument; it enters no file, log or
error.
"""

import json
import logging
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from beyond_dpo.files import write_file
from beyond_dpo.pipeline import gather

log = logging.getLogger("beyond_dpo")
REAL_KEY = 16  # characters; a shorter key is a local server's placeholder, a word as others are
REFUSALS = (400, 413, 422)  # statuses that are about one request: it is not valid, or too long
TRANSIENT = (408, 409, 429)  # statuses that the client tries again, as it does 500 and above
UNKNOWN = 502  # the status of what is wrong where no status is told: tried again
STATUS_OF = {  # errors by the names that servers give them in a 200, as far as no retry mends them
    "bad_request": 400,
    "badrequesterror": 400,
    "content_filter": 400,
    "content_policy_violation": 400,
    "context_length_exceeded": 400,
    "invalid_request_error": 400,
    "authentication_error": 401,
    "invalid_api_key": 401,
    "insufficient_quota": 402,
    "permission_error": 403,
    "model_not_found": 404,
    "not_found_error": 404,
    "notfounderror": 404,
    "request_too_large": 413,
}


class EndpointError(RuntimeError):
    """Say what an endpoint answered instead of a reply; what came before is kept, so that a new run
    goes on.
    """


@dataclass(frozen=True)
class Endpoint:
    """Name a model behind an OpenAI-compatible API, and how it is asked; only the model's name
    belongs into a key.
    """

    model: str
    url: str = ""  # default: the client's own
    prices: tuple[float, float] | None = (
        None  # of a million prompt tokens and of a million completion tokens
    )
    at_once: int = 8  # requests
    # seconds, of one attempt: a judge that thinks, or a server without a GPU, takes minutes
    timeout: float = 600.0
    # after 408, 409, 429, 5xx (told by HTTP, or by an error in a 200), timeouts, lost connections
    # and
    # damaged replies; the wait doubles up to 8 s
    retries: int = 6


class Used(NamedTuple):
    """Count what was answered and refused, and the tokens by the endpoint's own count, earlier
    attempts included.

    A reply without a count adds no tokens: then they are a lower bound, and a warning says so.
    """

    replies: int
    refused: int
    prompt_tokens: int
    completion_tokens: int

    def cost(self, prices: tuple[float, float] | None) -> float | None:
        """Return what the tokens cost, in the currency of `prices` (per million tokens); None
        without prices.
        """
        return (
            prices and (self.prompt_tokens * prices[0] + self.completion_tokens * prices[1]) / 1e6
        )


class Kept(NamedTuple):
    """Hold what is kept of a reply: what `read` made of it, and [prompt tokens, completion tokens].

    A number that the endpoint does not tell is None; the list is empty where it tells none. It is
    None instead of a list for a refused request.
    """

    value: object
    tokens: list | None


class Trouble(NamedTuple):
    """Say what came instead of a reply: a status as of HTTP, in words, and whether no retry mends
    it.
    """

    status: int
    words: str
    final: bool


def ask(
    endpoint: Endpoint, requests: dict[str, dict], kept: Path, read: Callable
) -> tuple[dict, Used]:
    """Return ({id: what `read` made of its reply}, Used) of all requests; replies that `kept` holds
    are not asked for.

    requests: {id: arguments of chat.completions.create, but the model}. read(reply): the JSON value
    to keep of a ChatCompletion, each of whose choices has a message; None if the reply is of no
    use. read(None): the value of a request that the endpoint refuses (REFUSALS), or whose reply
    holds the key. kept: a JSONL file of [id, value, [prompt tokens, completion tokens]], one whole
    line a reply, null in the third place of what was refused, nothing in it where the endpoint does
    not count; half a line is left out. What an earlier run was refused, or could not
    use, is asked again: the endpoint may be mended since.
    Raises EndpointError once the retries are used up, and at once for what no retry mends (a wrong
    key or model). The tokens counted are the sum of the endpoint's own counts of these replies,
    however often a run was interrupted.
    """
    import openai

    found = _earlier(kept)
    lock = Lock()
    client = openai.OpenAI(base_url=endpoint.url or None, timeout=endpoint.timeout)

    def one(i: str) -> None:
        reply = _reply(client, endpoint, i, requests[i])
        value = read(reply)
        if reply is not None and _holds_key(value):
            log.warning("%s: left out the reply to %.60r, which holds the key", endpoint.model, i)
            reply = None
            value = read(None)
        tokens = None if reply is None else _tokens(reply)
        line = json.dumps([i, value, tokens])
        with lock, open(kept, "a", encoding="utf-8") as file:
            file.write(line + "\n")
        found[i] = Kept(*json.loads(line)[1:])  # as a later run will read it

    with ThreadPoolExecutor(endpoint.at_once) as pool:
        asked = [pool.submit(one, i) for i in requests if i not in found]
        try:
            for done in gather.watched(asked, f"asking {endpoint.model}"):
                done.result()
        except BaseException:  # an interrupt, too, ends the asking
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            client.close()
    used = _used(endpoint.model, [found[i].tokens for i in requests])
    return {i: found[i].value for i in requests}, used


def _earlier(kept: Path) -> dict[str, Kept]:
    """Return an earlier run's replies by id, as far as they are of use, and leave only them in its
    file.
    """
    found = {}
    for line in kept.read_bytes().split(b"\n") if kept.exists() else ():
        with suppress(
            ValueError
        ):  # half a line of a killed process, or of a full disk and another one behind it
            i, value, *tokens = json.loads(line)
            found[i] = Kept(value, tokens[0] if tokens else [])
    found = {i: reply for i, reply in found.items() if None not in reply}
    write_file(kept, "".join(json.dumps([i, *reply]) + "\n" for i, reply in found.items()))
    return found


def _reply(client, endpoint: Endpoint, i: str, request: dict):
    """Return the ChatCompletion that answers a request, None where the endpoint refuses it.

    The client itself tries again what HTTP tells it to; an error in a 200, or a damaged body, is
    tried again here. Raises EndpointError.
    """
    for attempt in range(endpoint.retries + 1):
        if attempt:
            time.sleep(min(0.5 * 2 ** (attempt - 1), 8))
        patient = client.with_options(max_retries=endpoint.retries - attempt)
        reply, trouble = _attempt(patient, endpoint.model, request)
        if trouble is None:
            return reply
        if trouble.status in REFUSALS:
            log.warning("%s refused %.60r: %s", endpoint.model, i, _clean(trouble.words))
            return None
        if trouble.final:
            break
        log.info("%s: %s", endpoint.model, _clean(trouble.words))
    raise EndpointError(f"{endpoint.model}: {_clean(trouble.words)}")


def _attempt(client, model: str, request: dict) -> tuple:
    """Return (ChatCompletion, None), or (None, Trouble) where no useful one came."""
    import openai

    try:
        reply = client.chat.completions.create(model=model, **request)
    except openai.APIStatusError as error:  # the client has tried it again where that helps
        words = f"{type(error).__name__}: {error}"
        if words.endswith(str(error.status_code)):  # the client reads no message in the body
            words = f"{words} - {error.response.text:.300}"
        return None, Trouble(error.status_code, words, final=True)
    except openai.OpenAIError as error:
        return None, Trouble(UNKNOWN, f"{type(error).__name__}: {error}", final=True)
    except ValueError as error:  # a body that is no JSON, or half of one
        return None, Trouble(UNKNOWN, f"{type(error).__name__}: {error}", final=False)
    trouble = _wrong(reply)
    return (reply, None) if trouble is None else (None, trouble)


def _wrong(reply) -> Trouble | None:
    """Return what is wrong with the body of a 200, None if all its choices can be read.

    The client checks no types: a reply may be of any kind, and lack anything.
    """
    choices = getattr(reply, "choices", None)
    if not isinstance(choices, list) or not choices:
        if error := getattr(reply, "error", None):
            return _told(error)
        body = reply.to_json(indent=None) if hasattr(reply, "to_json") else str(reply)
        return Trouble(UNKNOWN, f"replied without choices: {body:.300}", final=False)
    for choice in choices:
        if error := getattr(choice, "error", None):
            return _told(error)
        message = getattr(choice, "message", None)
        if not isinstance(getattr(message, "content", 0), str | None):
            words = f"replied with a choice without a message: {choice!s:.300}"
            return Trouble(UNKNOWN, words, final=False)
    return None


def _told(error) -> Trouble:
    """Read the error that a server put into a 200: its status is a number or a name, or not
    told.
    """
    status = UNKNOWN
    for name in ("type", "status", "code") if isinstance(error, dict) else ():
        value = str(error.get(name)).lower()
        if value.isdigit() and 400 <= int(value) < 600:
            status = int(value)
        else:
            status = STATUS_OF.get(value, status)
    final = status < 500 and status not in TRANSIENT
    return Trouble(status, f"replied with an error: {error!s:.300}", final)


def _tokens(reply) -> list[int | None]:
    """Return [prompt tokens, completion tokens] as the endpoint counts them, [] if it counts
    neither.
    """
    usage = getattr(reply, "usage", None)
    counts = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
    counts = [count if isinstance(count, int) else None for count in counts]
    return [] if counts == [None, None] else counts


def _used(model: str, tokens: list[list | None]) -> Used:
    """Sum up what an endpoint counted for each request; None stands for a refusal."""
    counted = [counts for counts in tokens if counts is not None]
    incomplete = sum(not counts or None in counts for counts in counted)
    if incomplete:
        log.warning(
            "%s does not count all tokens of %d of %d replies", model, incomplete, len(counted)
        )
    sums = [sum(counts[k] or 0 for counts in counted if counts) for k in (0, 1)]
    used = Used(len(counted), len(tokens) - len(counted), *sums)
    log.info("%s: %s", model, used)
    return used


def _holds_key(value) -> bool:
    """Return whether a value to be kept holds the key: an endpoint may send back what it was
    sent.
    """
    key = os.environ.get("OPENAI_API_KEY") or ""
    written = json.dumps(key, ensure_ascii=False)[1:-1]
    return len(key) >= REAL_KEY and written in json.dumps(value, ensure_ascii=False)


def _clean(text: str) -> str:
    """Return an error's text without the key; a placeholder's is only taken out where it is a
    word.
    """
    key = os.environ.get("OPENAI_API_KEY")
    if not key:
        return text
    pattern = re.escape(key) if len(key) >= REAL_KEY else rf"(?<!\w){re.escape(key)}(?!\w)"
    return re.sub(pattern, "<OPENAI_API_KEY>", text)
