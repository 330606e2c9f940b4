"""Rows of preference data as token ids: on the disk, cut to length, in an epoch's order."""

import json
from pathlib import Path

from beyond_dpo.files import write_file

# WRPO's responses to a prompt, in the order that its losses take them
FUSED = ("source_chosen", "target_chosen", "rejected")


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write rows as JSONL, one {"id", "prompt_ids", "responses": {name: ids}} a line; the file
    appears whole or not.
    """
    for i, row in enumerate(rows):
        if problem := _problem(row):
            raise ValueError(f"row {i}: {problem}")
    lines = [
        json.dumps(row, ensure_ascii=False, separators=(",", ":"), allow_nan=False) + "\n"
        for row in rows
    ]
    write_file(Path(path), "".join(lines))


def read_rows(path: Path) -> list[dict]:
    """Read what `write_rows` wrote; a line that is cut off or not a row raises ValueError with
    file:line.
    """
    rows = []
    with open(path, encoding="utf-8") as f:
        for n, line in enumerate(f, start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as e:
                raise ValueError(
                    f"{path}:{n}: not a whole JSON line ({e.msg}); make the file again"
                ) from None
            if problem := _problem(row):
                raise ValueError(f"{path}:{n}: {problem}")
            rows.append(row)
    return rows


def _problem(row) -> str | None:
    if not isinstance(row, dict) or not isinstance(row.get("id"), str):
        return 'a row is an object with a string "id"'
    if not isinstance(row.get("responses"), dict):
        return f'row {row["id"]}: "responses" must be an object of name: token ids'
    for name, ids in [("prompt_ids", row.get("prompt_ids")), *row["responses"].items()]:
        if not isinstance(ids, list) or not all(type(t) is int and t >= 0 for t in ids):
            return f"row {row['id']}: {name} must be a list of token ids (integers >= 0)"
    return None


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
        head = [bos_id] if bos_id is not None and prompt_ids[0] == bos_id else []
        prompt_ids = head + prompt_ids[len(prompt_ids) - max_prompt + len(head) :]
    room = max_length - len(prompt_ids)
    if len(response_ids) > room:
        ends = eos_id if isinstance(eos_id, list) else [eos_id]
        tail = response_ids[-1:] if response_ids[-1] in ends else []
        response_ids = response_ids[: room - len(tail)] + tail
    return prompt_ids, response_ids


def prepare(rows: list[dict], names: list[str], **limits) -> tuple[list[dict], int]:
    """Truncate the named responses of every row by `limits` (see `truncate`); drop and count those
    without any token.

    A row is dropped if its prompt or any named response is empty: a sum over no token is 0, which
    looks like data. Other responses are left out, other fields kept. Returns (rows, dropped); a
    missing name raises ValueError.
    """
    kept = []
    for row in rows:
        if missing := [n for n in names if n not in row["responses"]]:
            raise ValueError(
                f"row {row['id']} has no response {missing[0]!r}, only {sorted(row['responses'])}"
            )
        if not row["prompt_ids"] or not all(row["responses"][n] for n in names):
            continue
        cut = {n: truncate(row["prompt_ids"], row["responses"][n], **limits) for n in names}
        kept.append(
            {
                **row,
                "prompt_ids": cut[names[0]][0],
                "responses": {n: r for n, (_, r) in cut.items()},
            }
        )
    return kept, len(rows) - len(kept)


def row_length(row: dict, names: list[str]) -> int:
    """Return how many tokens `pack` computes for a row: its prompt once, and the named
    responses.
    """
    return len(row["prompt_ids"]) + sum(len(row["responses"][n]) for n in names)


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """Return the order in which an epoch visits n rows: a permutation that depends on (seed, epoch)
    alone.
    """
    import torch  # its permutation is in every result

    generator = torch.Generator().manual_seed(
        seed * 1_000_003 + epoch
    )  # not seed + epoch: (0, 1) is not (1, 0)
    return torch.randperm(n, generator=generator).tolist()
