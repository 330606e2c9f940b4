"""Shards of work that is cut by prompts: any process can make any of them.

An interrupted run keeps the shards that it has.
"""

import json
import math
from pathlib import Path

from beyond_dpo.files import write_file


def parts(out: str | Path, prompts: int, size: int) -> list[Path]:
    """Return the file of each shard of `out`, one for every `size` prompts, and at least one.

    A dot in front of their names says that they are temporary.
    """
    out = Path(out)
    count = math.ceil(prompts / size)
    count = max(1, count)
    files = []
    for shard in range(count):
        name = f".{out.name}-{shard}of{count}"
        files.append(out.with_name(name))
    return files


def left(files: list[Path], rank: int, world: int) -> list[int]:
    """Return which shards the process `rank` of `world` still has to make."""
    missing = []
    for shard in range(rank, len(files), world):
        if not files[shard].exists():
            missing.append(shard)
    return missing


def merge(out: str | Path, files: list[Path]) -> list[dict]:
    """Write the rows of all shards to `out`, in the order of the prompts, and return the rows.

    The shards are deleted. Raises ValueError if one is missing.
    """
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise ValueError(
            f"{out}: {len(missing)} of {len(files)} shards are missing, such as {missing[0]}: run "
            "again"
        )
    out = Path(out)
    contents = [file.read_bytes() for file in files]
    write_file(out, b"".join(contents))
    for file in files:
        file.unlink()
    rows = []
    for line in out.read_text(encoding="utf-8").splitlines():
        rows.append(json.loads(line))
    return rows


def counted(rows: list[dict]) -> dict:
    """Return what a manifest says of responses: their number, and that of their tokens."""
    tokens = 0
    for row in rows:
        tokens += len(row["response_ids"])
    return {"responses": len(rows), "tokens": tokens}
