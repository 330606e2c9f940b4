"""Rows of preference data as token ids: on the disk, cut to length, in an epoch's order."""

import json
from pathlib import Path

from beyond_dpo.files import write_file

# WRPO's responses to a prompt, in the order that its losses take them
FUSED = ("source_chosen", "target_chosen", "rejected")


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write rows as JSONL, one {"id", "prompt_ids", "responses": {name: ids}} a line.

    The file appears whole or not at all. Raises ValueError, which names the row, for anything else.
    """
    lines = []
    for i, row in enumerate(rows):
        problem = _problem(row)
        if problem:
            raise ValueError(f"row {i}: {problem}")
        line = json.dumps(row, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        lines.append(line + "\n")
    content = "".join(lines)
    write_file(Path(path), content)


def read_rows(path: Path) -> list[dict]:
    """Read what `write_rows` wrote.

    Raises ValueError, which names file:line, for a line that is cut off or no row.
    """
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}:{number}: not a whole JSON line ({error.msg}); make the file again"
                ) from None
            problem = _problem(row)
            if problem:
                raise ValueError(f"{path}:{number}: {problem}")
            rows.append(row)
    return rows


def _problem(row) -> str | None:
    """Return why a value is no row, None if it is one."""
    if not isinstance(row, dict) or not isinstance(row.get("id"), str):
        return 'a row is an object with a string "id"'
    row_id = row["id"]
    responses = row.get("responses")
    if not isinstance(responses, dict):
        return f'row {row_id}: "responses" must be an object of name: token ids'
    token_lists = [("prompt_ids", row.get("prompt_ids")), *responses.items()]
    for name, ids in token_lists:
        if not _are_token_ids(ids):
            return f"row {row_id}: {name} must be a list of token ids (integers >= 0)"
    return None


def _are_token_ids(ids) -> bool:
    if not isinstance(ids, list):
        return False
    for token in ids:
        # True and False are instances of int too.
        if type(token) is not int or token < 0:
            return False
    return True


def truncate(
    prompt_ids: list[int],
    response_ids: list[int],
    *,
    max_prompt: int,
    max_length: int,
    bos_id: int | None = None,
    eos_id: int | list[int] | None = None,
) -> tuple[list[int], list[int]]:
    """Cut a prompt from the left to `max_prompt` tokens, its response to `max_length` together.

    The response is cut from the right. A leading `bos_id` stays in front of a cut prompt, and a
    closing `eos_id`, or one of several (see end_tokens), at the end of a cut response; pass None to
    keep neither. The prompt's cut does not depend on the response, so all responses of a row see
    the same prompt.
    Raises ValueError unless 0 < max_prompt < max_length. Cutting twice changes nothing more.
    """
    if not 0 < max_prompt < max_length:
        raise ValueError(f"need 0 < max_prompt < max_length, got {max_prompt} and {max_length}")
    if len(prompt_ids) > max_prompt:
        head = []
        if bos_id is not None and prompt_ids[0] == bos_id:
            head = [bos_id]
        kept = max_prompt - len(head)
        start = len(prompt_ids) - kept
        prompt_ids = head + prompt_ids[start:]
    room = max_length - len(prompt_ids)
    if len(response_ids) > room:
        ends = eos_id if isinstance(eos_id, list) else [eos_id]
        tail = []
        if response_ids[-1] in ends:
            tail = [response_ids[-1]]
        kept = room - len(tail)
        response_ids = response_ids[:kept] + tail
    return prompt_ids, response_ids


def prepare(rows: list[dict], names: list[str], **limits) -> tuple[list[dict], int]:
    """Return (rows with the named responses, truncated; how many rows were dropped).

    A row is dropped if its prompt or any named response is empty: a sum over no token is 0, which
    looks like data. Other responses are left out, other fields kept.

    limits: of `truncate`. Raises ValueError for a row that lacks a named response.
    """
    kept = []
    for row in rows:
        responses = row["responses"]
        for name in names:
            if name not in responses:
                raise ValueError(
                    f"row {row['id']} has no response {name!r}, only {sorted(responses)}"
                )
        prompt_ids = row["prompt_ids"]
        if not prompt_ids or not all(responses[name] for name in names):
            continue
        truncated = {}
        for name in names:
            # The prompt is cut alike, whatever the response.
            cut_prompt, cut_response = truncate(prompt_ids, responses[name], **limits)
            truncated[name] = cut_response
        kept.append({**row, "prompt_ids": cut_prompt, "responses": truncated})
    dropped = len(rows) - len(kept)
    return kept, dropped


def row_length(row: dict, names: list[str]) -> int:
    """Return how many tokens `pack` computes for a row: its prompt once, and named responses."""
    length = len(row["prompt_ids"])
    for name in names:
        length += len(row["responses"][name])
    return length


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """Return the order in which an epoch visits n rows, which depends on (seed, epoch) alone."""
    import torch  # another library's permutation would change every result

    # Not seed + epoch: seed 0 in epoch 1 is not to visit rows as seed 1 does in epoch 0.
    generator = torch.Generator()
    generator.manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(n, generator=generator)
    return order.tolist()
