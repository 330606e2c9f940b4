"""Ask an OpenAI-compatible endpoint many things at once; keep each reply, count tokens and cost.

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
    """Say what an endpoint answered instead of a reply.

    What came before is kept, so that a new run goes on.
    """


@dataclass(frozen=True)
class Endpoint:
    """Name a model behind an OpenAI-compatible API, and how it is asked.

    Only the model's name belongs into a key.

    prices: of a million prompt tokens and of a million completion tokens.
    timeout: seconds of one attempt; a judge that thinks, or a server without a GPU, takes minutes.
    retries: after 408, 409, 429, 5xx (told by HTTP, or by an error in a 200), timeouts, lost
    connections and damaged replies; the wait doubles up to 8 s.
    """

    model: str
    url: str = ""  # default: the client's own
    prices: tuple[float, float] | None = None
    at_once: int = 8  # requests
    timeout: float = 600.0
    retries: int = 6


class Used(NamedTuple):
    """Count what was answered and refused, and the tokens by the endpoint's own count.

    Tokens of earlier attempts are included. A reply without a count adds no tokens: then they are a
    lower bound, and a warning says so.
    """

    replies: int
    refused: int
    prompt_tokens: int
    completion_tokens: int

    def cost(self, prices: tuple[float, float] | None) -> float | None:
        """Return what the tokens cost, in the currency of `prices`; None without prices.

        prices: per million prompt tokens and per million completion tokens.
        """
        if prices is None:
            return None
        prompt_price, completion_price = prices
        cost = self.prompt_tokens * prompt_price + self.completion_tokens * completion_price
        return cost / 1e6


class Kept(NamedTuple):
    """Hold what is kept of a reply: what `read` made of it, and [prompt tokens, completion tokens].

    A number that the endpoint does not tell is None; the list is empty where it tells none. It is
    None instead of a list for a refused request.
    """

    value: object
    tokens: list | None


class Trouble(NamedTuple):
    """Say what came instead of a reply: a status as of HTTP, and a description of it.

    final: whether no retry mends it.
    """

    status: int
    description: str
    final: bool


def ask(
    endpoint: Endpoint, requests: dict[str, dict], kept: Path, read: Callable
) -> tuple[dict, Used]:
    """Return ({id: what `read` made of its reply}, Used) of all requests.

    requests: {id: arguments of chat.completions.create, but the model}. read(reply): the JSON value
    to keep of a ChatCompletion, each of whose choices has a message; None if the reply is of no
    use. read(None): the value of a request that the endpoint refuses (REFUSALS), or whose reply
    holds the key. kept: a JSONL file of [id, value, [prompt tokens, completion tokens]], one whole
    line a reply, null in the third place of what was refused, nothing in it where the endpoint does
    not count; half a line is left out. Replies that it holds are not asked for, but what an earlier
    run was refused, or could not use, is: the endpoint may be mended since.
    Raises EndpointError once the retries are used up, and at once for what no retry mends (a wrong
    key or model). The tokens counted are the sum of the endpoint's own counts of these replies,
    however often a run was interrupted.
    """
    import openai

    replies = _earlier(kept)
    lock = Lock()
    client = openai.OpenAI(base_url=endpoint.url or None, timeout=endpoint.timeout)

    def ask_and_keep(i: str) -> None:
        value, tokens = _value(client, endpoint, i, requests[i], read)
        line = json.dumps([i, value, tokens])
        with lock, open(kept, "a", encoding="utf-8") as file:
            file.write(line + "\n")
        replies[i] = Kept(*json.loads(line)[1:])  # as a later run will read it

    with ThreadPoolExecutor(endpoint.at_once) as pool:
        pending = [pool.submit(ask_and_keep, i) for i in requests if i not in replies]
        try:
            for done in gather.watched(pending, f"asking {endpoint.model}"):
                done.result()
        except BaseException:  # an interrupt, too, ends the asking
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            client.close()
    used = _used(endpoint.model, [replies[i].tokens for i in requests])
    values = {i: replies[i].value for i in requests}
    return values, used


def _value(client, endpoint: Endpoint, i: str, request: dict, read: Callable) -> tuple:
    """Return (what `read` makes of the reply to a request, its tokens); see Kept for both.

    A reply that holds the key is left out, as one that the endpoint refuses.
    """
    reply = _reply(client, endpoint, i, request)
    if reply is None:
        return read(None), None
    value = read(reply)
    if _holds_key(value):
        log.warning("%s: left out the reply to %.60r, which holds the key", endpoint.model, i)
        return read(None), None
    return value, _tokens(reply)


def _earlier(kept: Path) -> dict[str, Kept]:
    """Return an earlier run's useful replies by id, and leave only them in its file.

    Half a line of a killed process, or of a full disk and with another one behind it, is left out.
    """
    lines = kept.read_bytes().split(b"\n") if kept.exists() else []
    replies = {}
    for line in lines:
        with suppress(ValueError):
            i, value, *tokens = json.loads(line)
            replies[i] = Kept(value, tokens[0] if tokens else [])
    useful = {i: reply for i, reply in replies.items() if None not in reply}
    useful_lines = [json.dumps([i, *reply]) + "\n" for i, reply in useful.items()]
    write_file(kept, "".join(useful_lines))
    return useful


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
        description = _clean(trouble.description)
        if trouble.status in REFUSALS:
            log.warning("%s refused %.60r: %s", endpoint.model, i, description)
            return None
        if trouble.final:
            break
        log.info("%s: %s", endpoint.model, description)
    raise EndpointError(f"{endpoint.model}: {description}")


def _attempt(client, model: str, request: dict) -> tuple:
    """Return (ChatCompletion, None), or (None, Trouble) where no useful one came."""
    import openai

    try:
        reply = client.chat.completions.create(model=model, **request)
    except openai.APIStatusError as error:  # the client has tried it again where that helps
        description = f"{type(error).__name__}: {error}"
        if description.endswith(str(error.status_code)):  # the client reads no message in the body
            description = f"{description} - {error.response.text:.300}"
        return None, Trouble(error.status_code, description, final=True)
    except openai.OpenAIError as error:
        return None, Trouble(UNKNOWN, f"{type(error).__name__}: {error}", final=True)
    except ValueError as error:  # a body that is no JSON, or half of one
        return None, Trouble(UNKNOWN, f"{type(error).__name__}: {error}", final=False)
    trouble = _trouble(reply)
    if trouble is not None:
        return None, trouble
    return reply, None


def _trouble(reply) -> Trouble | None:
    """Return what is wrong with the body of a 200, None if all its choices can be read.

    The client checks no types: a reply may be of any kind, and lack anything.
    """
    choices = getattr(reply, "choices", None)
    if not isinstance(choices, list) or not choices:
        error = getattr(reply, "error", None)
        if error:
            return _trouble_of_error(error)
        body = reply.to_json(indent=None) if hasattr(reply, "to_json") else str(reply)
        return Trouble(UNKNOWN, f"replied without choices: {body:.300}", final=False)
    for choice in choices:
        error = getattr(choice, "error", None)
        if error:
            return _trouble_of_error(error)
        message = getattr(choice, "message", None)
        content = getattr(message, "content", 0)  # 0: there is none, which is no text
        if not isinstance(content, str | None):
            description = f"replied with a choice without a message: {choice!s:.300}"
            return Trouble(UNKNOWN, description, final=False)
    return None


def _trouble_of_error(error) -> Trouble:
    """Read the error that a server put into a 200: its status is a number, a name, or not there."""
    status = UNKNOWN
    fields = error if isinstance(error, dict) else {}
    for name in ("type", "status", "code"):
        value = str(fields.get(name)).lower()
        if value.isdigit() and 400 <= int(value) < 600:
            status = int(value)
        else:
            status = STATUS_OF.get(value, status)
    final = status < 500 and status not in TRANSIENT
    return Trouble(status, f"replied with an error: {error!s:.300}", final)


def _tokens(reply) -> list[int | None]:
    """Return the endpoint's [prompt tokens, completion tokens], [] if it counts neither."""
    usage = getattr(reply, "usage", None)
    counts = []
    for name in ("prompt_tokens", "completion_tokens"):
        count = getattr(usage, name, None)
        counts.append(count if isinstance(count, int) else None)
    return [] if counts == [None, None] else counts


def _used(model: str, tokens: list[list | None]) -> Used:
    """Sum up what an endpoint counted for each request; None stands for a refusal."""
    answered = [counts for counts in tokens if counts is not None]
    refused = len(tokens) - len(answered)
    counted = [counts for counts in answered if counts]
    complete = [counts for counts in counted if None not in counts]
    incomplete = len(answered) - len(complete)
    if incomplete:
        log.warning(
            "%s does not count all tokens of %d of %d replies", model, incomplete, len(answered)
        )
    prompt_tokens = sum(prompt or 0 for prompt, _ in counted)
    completion_tokens = sum(completion or 0 for _, completion in counted)
    used = Used(len(answered), refused, prompt_tokens, completion_tokens)
    log.info("%s: %s", model, used)
    return used


def _holds_key(value) -> bool:
    """Return whether a value holds the key: an endpoint may send back what it was sent."""
    key = os.environ.get("OPENAI_API_KEY") or ""
    written = json.dumps(key, ensure_ascii=False)[1:-1]
    return len(key) >= REAL_KEY and written in json.dumps(value, ensure_ascii=False)


def _clean(text: str) -> str:
    """Return an error's text without the key.

    A key that is a placeholder is only taken out where it is a whole word.
    """
    key = os.environ.get("OPENAI_API_KEY")
    if not key:
        return text
    pattern = re.escape(key)
    if len(key) < REAL_KEY:
        pattern = rf"(?<!\w){pattern}(?!\w)"
    return re.sub(pattern, "<OPENAI_API_KEY>", text)
