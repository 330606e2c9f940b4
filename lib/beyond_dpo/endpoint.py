"""Ask an OpenAI-compatible endpoint many things at once: each reply is kept as it comes, tokens and cost are counted.

Its key is read from OPENAI_API_KEY by the client and is no argument; it enters no file, log or error.
"""

import json
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from beyond_dpo import gather, paths

log = logging.getLogger("beyond_dpo")


class EndpointError(RuntimeError):
    """Say what an endpoint answered instead of a reply; what came before is kept, so that a new run goes on."""


@dataclass(frozen=True)
class Endpoint:
    """Name a model behind an OpenAI-compatible API, and how it is asked; only the model's name belongs into a key."""

    model: str
    url: str = ""  # default: the client's own
    prices: tuple[float, float] | None = None  # of a million prompt tokens and of a million completion tokens
    at_once: int = 8  # requests
    timeout: float = 120.0  # seconds, of one attempt
    retries: int = 6  # after 408, 409, 429, 5xx, timeouts and lost connections; the wait doubles up to 8 s


class Used(NamedTuple):
    """Count what was answered and refused, and the tokens by the endpoint's own count, earlier attempts included."""

    replies: int
    refused: int
    prompt_tokens: int
    completion_tokens: int

    def cost(self, prices: tuple[float, float] | None) -> float | None:
        """Return what the tokens cost, in the currency of `prices` (per million tokens); None without prices."""
        return prices and (self.prompt_tokens * prices[0] + self.completion_tokens * prices[1]) / 1e6


def ask(endpoint: Endpoint, requests: dict[str, dict], kept: Path, read: Callable) -> tuple[dict, Used]:
    """Return ({id: what `read` made of its reply}, Used) of all requests; those that `kept` holds are not asked again.

    requests: {id: arguments of chat.completions.create, but the model}. read(reply): the JSON value to keep of a
    ChatCompletion, or of None, which stands for a request that the endpoint refuses (HTTP 400). kept: a JSONL file of
    [id, value, [prompt tokens, completion tokens]], one whole line a reply, null in the third place of what was
    refused, nothing in it where the endpoint does not count; half a line is left out.
    Raises EndpointError once the retries are used up, and at once for what no retry mends (a wrong key or model). The
    tokens counted are the sum of the endpoint's own counts, however often a run was interrupted.
    """
    import openai

    found, lock = {}, Lock()
    for line in kept.read_bytes().split(b"\n") if kept.exists() else ():
        with suppress(ValueError):  # half a line of a killed process, or of a full disk and another one behind it
            i, value, *used = json.loads(line)
            found[i] = (value, *used)
    paths.write(kept, "".join(json.dumps([i, *entry]) + "\n" for i, entry in found.items()))
    how = {"max_retries": endpoint.retries, "timeout": endpoint.timeout}
    client = openai.OpenAI(base_url=endpoint.url or None, **how)

    def one(i: str) -> None:
        try:
            reply = client.chat.completions.create(model=endpoint.model, **requests[i])
            if not getattr(reply, "choices", None):
                raise EndpointError(f"{endpoint.model} replied without choices: {_clean(str(reply)):.300}")
        except openai.BadRequestError as refusal:
            log.warning("%s refused %.60r: %s", endpoint.model, i, _clean(str(refusal)))
            reply = None
        except (openai.OpenAIError, ValueError) as error:  # ValueError: a reply that is no JSON
            raise EndpointError(f"{endpoint.model}: {_clean(f'{type(error).__name__}: {error}')}") from None
        usage = getattr(reply, "usage", None)
        count = [usage.prompt_tokens, usage.completion_tokens] if usage else reply and []
        line = _clean(json.dumps([i, read(reply), count]))
        with lock, open(kept, "a", encoding="utf-8") as file:
            file.write(line + "\n")
        found[i] = tuple(json.loads(line)[1:])  # as a later run will read it

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
    counts = [found[i][1] for i in requests if len(found[i]) > 1]
    tokens = [sum(count[k] for count in counts if count) for k in (0, 1)]
    used = Used(len(requests) - counts.count(None), counts.count(None), *tokens)
    log.info("%s: %s", endpoint.model, used)
    return {i: found[i][0] for i in requests}, used


def _clean(text: str) -> str:
    """Return a text without the key: an endpoint may send back what it was sent."""
    key = os.environ.get("OPENAI_API_KEY")
    return text.replace(key, "<OPENAI_API_KEY>") if key else text
