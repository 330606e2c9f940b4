"""Shards of work that is cut by prompts: any process can make any of them, and an interrupted run
keeps what it has.
"""

import json
from pathlib import Path

from beyond_dpo.files import write_file


def parts(out: str | Path, prompts: int, size: int) -> list[Path]:
    """Return the file of each shard of `out`, one for every `size` prompts; a dot in front says
    they are temporary.
    """
    out, count = Path(out), max(1, -(-prompts // size))
    return [out.with_name(f".{out.name}-{k}of{count}") for k in range(count)]


def left(files: list[Path], rank: int, world: int) -> list[int]:
    """Return which shards the process `rank` of `world` still has to make."""
    return [k for k in range(rank, len(files), world) if not files[k].exists()]


def merge(out: str | Path, files: list[Path]) -> list[dict]:
    """Write the rows of all shards in the order of the prompts as `out`, delete the shards, and
    return the rows.

    Raises ValueError if one is missing.
    """
    if missing := [file.name for file in files if not file.exists()]:
        raise ValueError(
            f"{out}: {len(missing)} of {len(files)} shards are missing, such as {missing[0]}: run "
            "again"
        )
    write_file(Path(out), b"".join(file.read_bytes() for file in files))
    for file in files:
        file.unlink()
    return [json.loads(line) for line in Path(out).read_text(encoding="utf-8").splitlines()]


def counted(rows: list[dict]) -> dict:
    """Return what a manifest says of responses: their number, and that of their tokens."""
    return {"responses": len(rows), "tokens": sum(len(row["response_ids"]) for row in rows)}
