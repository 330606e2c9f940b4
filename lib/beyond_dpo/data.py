"""Rows of preference data: text to token ids, rows on disk, truncation, batches.

The only place where templates and BOS are handled: every back-end receives token ids, never strings.
"""

import json
from functools import lru_cache
from pathlib import Path

import torch

from beyond_dpo import paths


@lru_cache(maxsize=8)
def load_tokenizer(path):
    """Load the tokenizer of a local model folder; where it has no pad token, pad with the end token.

    Masks never come from `== pad_id`, so pad and end may be one token (as in SmolLM2).
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(path))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _literal(tokenizer, text: str) -> list[int]:
    # A review that contains "</s>" is talking about it: split_special_tokens keeps such markup plain text.
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def render(tokenizer, prompt: str | list[dict], template: str) -> list[int]:
    """Turn one prompt into the token ids that a model continues.

    Args:
        prompt: text, or for "chat" also a list of {"role", "content"} turns that does not end with the assistant.
        template: "plain" (the text itself; markup in it stays text) or "chat" (the tokenizer's chat template).
    Raises:
        ValueError: unknown template, no chat template, an assistant turn at the end, or two BOS in front.
        TypeError: the prompt is not what the template takes.

    A BOS stands in front if the tokenizer puts one there by itself (plain), or its template does (chat), never two.
    """
    if template == "plain":
        if not isinstance(prompt, str):
            raise TypeError(f'template "plain" takes a string, got {type(prompt).__name__}; use "chat" for turns')
        front = tokenizer("a", add_special_tokens=True)["input_ids"][:1]  # a BOS, where the tokenizer adds one
        ids = front * (front == [tokenizer.bos_token_id]) + _literal(tokenizer, prompt)
    elif template == "chat":
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not isinstance(turns, list) or not turns or not all(isinstance(t, dict) for t in turns):
            raise TypeError(f'template "chat" takes a string or a non-empty list of turns, got {prompt!r:.80}')
        if turns[-1].get("role") == "assistant":
            raise ValueError("the prompt ends with an assistant turn, so there is nothing to answer: drop that turn")
        if not tokenizer.chat_template:
            raise ValueError(f'{tokenizer.name_or_path or "tokenizer"} has no chat template: use template="plain"')
        ids = list(tokenizer.apply_chat_template(turns, tokenize=True, add_generation_prompt=True, return_dict=False))
    else:
        raise ValueError(f'template must be "plain" or "chat", got {template!r}')
    if ids[:2] == [tokenizer.bos_token_id] * 2:
        raise ValueError("the rendered prompt starts with two BOS tokens: remove one from the chat template")
    return ids


def encode_response(tokenizer, text: str, *, end: bool = True) -> list[int]:
    """Turn a response into token ids without special tokens, closed by the end token unless `end` is False."""
    if end and tokenizer.eos_token_id is None:
        raise ValueError(f"{tokenizer.name_or_path or 'tokenizer'} has no end token: pass end=False")
    return _literal(tokenizer, text) + ([tokenizer.eos_token_id] if end else [])


def truncate(
    prompt_ids: list[int], response_ids: list[int], *,
    max_prompt: int, max_length: int, bos_id: int | None = None, eos_id: int | None = None,
) -> tuple[list[int], list[int]]:
    """Cut a prompt from the left to `max_prompt` tokens, and its response from the right to `max_length` together.

    A leading `bos_id` stays in front of a cut prompt, and a closing `eos_id` at the end of a cut response (pass None to
    keep neither). The prompt's cut does not depend on the response, so all responses of a row see the same prompt.
    Raises ValueError unless 0 < max_prompt < max_length. Cutting twice changes nothing more.
    """
    if not 0 < max_prompt < max_length:
        raise ValueError(f"need 0 < max_prompt < max_length, got {max_prompt} and {max_length}")
    if len(prompt_ids) > max_prompt:
        head = [bos_id] if bos_id is not None and prompt_ids[0] == bos_id else []
        prompt_ids = head + prompt_ids[len(prompt_ids) - max_prompt + len(head) :]
    room = max_length - len(prompt_ids)
    if len(response_ids) > room:
        tail = [eos_id] if eos_id is not None and response_ids[-1] == eos_id else []
        response_ids = response_ids[: room - len(tail)] + tail
    return prompt_ids, response_ids


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write rows as JSONL, one {"id", "prompt_ids", "responses": {name: ids}} a line; the file appears whole or not."""
    for i, row in enumerate(rows):
        if problem := _problem(row):
            raise ValueError(f"row {i}: {problem}")
    lines = [json.dumps(row, ensure_ascii=False, separators=(",", ":"), allow_nan=False) + "\n" for row in rows]
    paths.write(Path(path), "".join(lines))


def read_rows(path: Path) -> list[dict]:
    """Read what `write_rows` wrote; a line that is cut off or not a row raises ValueError with file:line."""
    rows = []
    with open(path, encoding="utf-8") as f:
        for n, line in enumerate(f, start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as e:
                raise ValueError(f"{path}:{n}: not a whole JSON line ({e.msg}); make the file again") from None
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


def prepare(rows: list[dict], names: list[str], **limits) -> tuple[list[dict], int]:
    """Truncate the named responses of every row by `limits` (see `truncate`); drop and count those without any token.

    A row is dropped if its prompt or any named response is empty: a sum over no token is 0, which looks like data.
    Other responses are left out, other fields kept. Returns (rows, dropped); a missing name raises ValueError.
    """
    kept = []
    for row in rows:
        if missing := [n for n in names if n not in row["responses"]]:
            raise ValueError(f"row {row['id']} has no response {missing[0]!r}, only {sorted(row['responses'])}")
        if not row["prompt_ids"] or not all(row["responses"][n] for n in names):
            continue
        cut = {n: truncate(row["prompt_ids"], row["responses"][n], **limits) for n in names}
        kept.append({**row, "prompt_ids": cut[names[0]][0], "responses": {n: r for n, (_, r) in cut.items()}})
    return kept, len(rows) - len(kept)


def length(row: dict, names: list[str]) -> int:
    """Return how many tokens `pack` computes for a row: its prompt once, and the named responses."""
    return len(row["prompt_ids"]) + sum(len(row["responses"][n]) for n in names)


def pack(rows: list[dict], names: list[str], pad_id: int, shared: bool = True) -> dict:
    """Lay the named responses of rows into one batch in which every prompt stands once.

    A row is its prompt and then its responses one after the other; each response sees the prompt and itself only, and
    its positions go on from the prompt's, so scores are those of each response alone. Rows share lines of about
    twice the longest row, each put on the line that is shortest yet, the longest first: little is padding (3 % where
    lines of one response each had 60 %), and attention, which grows with the line's length, stays cheap.

    shared: False for flash-attention, which knows no such masks: each response has its prompt to itself, all stand in
    one line, and positions that begin again say where a sequence ends; then there is no attention_mask.

    Returns input_ids and position_ids (lines, L) long; attention_mask (lines, 1, L, L) bool, True = is seen;
    labels (N,), the N response tokens, name-major (all of names[0] first, row by row); predictors (N,), where in
    `input_ids.flatten()` each is predicted; tokens (len(names) * B,), their number by response; ids, the B row ids.
    Masks come from lengths, never from `pad_id`, so pad may be the end token.
    Raises ValueError for a row without prompt, or without pad_id.
    """
    if pad_id is None:
        raise ValueError("pad_id is None: give the tokenizer a pad token (its end token will do)")
    if bad := [row["id"] for row in rows if not row["prompt_ids"]]:
        raise ValueError(f"rows {bad[:5]} have no prompt token, so nothing predicts their first response token")
    ids = [row["id"] for row in rows]
    if not shared:
        rows, names = [row | {"responses": {"": row["responses"][name]}} for name in names for row in rows], [""]
    lengths = [length(row, names) for row in rows]
    lines: list = [[] for _ in range(max(1, sum(lengths) // (2 * max(lengths))) if shared else 1)]
    for i in sorted(range(len(rows)), key=lambda i: (-lengths[i], i)):
        min(lines, key=lambda line: sum(lengths[j] for j in line)).append(i)
    width = max(sum(lengths[i] for i in line) for line in lines)

    shape = len(lines), width
    input_ids = torch.full(shape, pad_id, dtype=torch.long)
    position_ids = torch.zeros(shape, dtype=torch.long)
    row_of = torch.full(shape, -1)
    part_of = torch.zeros(shape, dtype=torch.long)  # 0: prompt, k: k-th response
    predictors: list = [None] * (len(names) * len(rows))
    for at, line in enumerate(lines):
        start = 0
        for i in line:
            prompt, said = rows[i]["prompt_ids"], [rows[i]["responses"][n] for n in names]
            here, ahead = slice(start, start + lengths[i]), len(prompt)
            input_ids[at, here] = torch.tensor([*prompt, *(t for one in said for t in one)])
            positions = [*range(ahead), *(ahead + t for one in said for t in range(len(one)))]
            position_ids[at, here] = torch.tensor(positions)
            row_of[at, here] = i
            part_of[at, here] = torch.arange(len(said) + 1).repeat_interleave(torch.tensor([ahead, *map(len, said)]))
            first = at * width + start + ahead
            for k, one in enumerate(said):  # the prompt's last token predicts the first, and so on in a chain
                chain = [at * width + start + ahead - 1, *range(first, first + len(one) - 1)]
                predictors[k * len(rows) + i] = chain[: len(one)]
                first += len(one)
            start += lengths[i]
    batch = {"input_ids": input_ids, "position_ids": position_ids, "ids": ids}
    if shared:
        seen = (part_of[:, None] == 0) | (part_of[:, :, None] == part_of[:, None])
        seen &= (row_of[:, :, None] == row_of[:, None]) & torch.ones(width, width, dtype=torch.bool).tril()
        batch["attention_mask"] = seen[:, None]
    answers = [row["responses"][name] for name in names for row in rows]
    return batch | {
        "labels": torch.tensor([t for said in answers for t in said], dtype=torch.long),
        "predictors": torch.tensor([t for where in predictors for t in where], dtype=torch.long),
        "tokens": torch.tensor([len(said) for said in answers])}  # fmt: skip


def order(n: int, seed: int, epoch: int) -> list[int]:
    """Return the order in which an epoch visits n rows: a permutation that depends on (seed, epoch) alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)  # not seed + epoch: (0, 1) is not (1, 0)
    return torch.randperm(n, generator=generator).tolist()
