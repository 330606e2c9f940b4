"""The one pass of the reference model over the pairs: `python -m beyond_dpo.jobs.reference
JOB.json`.

Everything a loss, a KL estimate or a dispersion weight needs of the reference is computed here
once, without β, loss or seed in its key; training then holds one model.
"""

import argparse
import json
from pathlib import Path

import torch

from beyond_dpo import events, templates
from beyond_dpo.files import write_file
from beyond_dpo.machine import launch
from beyond_dpo.precision import require_precision
from beyond_dpo.rows import prepare, read_rows
from beyond_dpo.scoring import load_scorer, score_rows


def main(path: str) -> None:
    """Score the rows of a job file: model, rows, names, limits, precision, micro_batch, out (a
    .safetensors file).
    """
    from safetensors.torch import save

    job = json.loads(Path(path).read_text(encoding="utf-8"))
    require_precision(job["precision"])
    rows, dropped = cut_rows(job)
    if not rows:
        why = f"{dropped} dropped, without prompt or response"
        raise ValueError(f"{job['rows']}: no row is left to score ({why})")
    if len({r["id"] for r in rows}) < len(rows):
        raise ValueError(
            f"{job['rows']}: rows share an id, so their scores could not be told apart"
        )
    scorer, pad = (
        load_scorer(job["model"], job["precision"]),
        templates.load_tokenizer(job["model"]).pad_token_id,
    )
    scores = score_rows(
        scorer, rows, job["names"], pad_id=pad, micro_batch=job["micro_batch"], tell=events.progress
    )
    about = {
        "ids": json.dumps([r["id"] for r in rows]),
        "names": json.dumps(job["names"]),
        "dropped": str(dropped),
    }
    write_file(Path(job["out"]), _sorted(save(scores, metadata=about)))


def cut_rows(job: dict) -> tuple[list[dict], int]:
    """Return a job's rows, cut to its limits (see rows.prepare), and how many were dropped.

    The model's own tokenizer says which tokens open a prompt and close a response.
    """
    tokenizer = templates.load_tokenizer(job["model"])
    return prepare(
        read_rows(job["rows"]),
        job["names"],
        max_prompt=job["limits"]["max_prompt"],
        max_length=job["limits"]["max_length"],
        bos_id=tokenizer.bos_token_id,
        eos_id=templates.end_tokens(tokenizer),
    )


def _sorted(content: bytes) -> bytes:
    """Return a safetensors file whose header stands in one order: the library writes metadata in
    another each time.
    """
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(
        json.loads(content[8:end]), sort_keys=True, separators=(",", ":"), ensure_ascii=False
    ).encode()
    return content[:8] + header.ljust(end - 8) + content[end:]


def load(path, rows: list[dict], names: list[str]) -> dict:
    """Return a reference file's logps (nats), tokens and entropies, each float32 (len(rows),
    len(names)), for `rows`.

    Raises ValueError if the file lacks a row or a response, or was made from responses of other
    lengths.
    """
    from safetensors import safe_open

    with safe_open(path, "pt") as f:
        ids, known = (json.loads(f.metadata()[k]) for k in ("ids", "names"))
        tensors = {k: f.get_tensor(k) for k in f.keys()}
    place = {row: i for i, row in enumerate(ids)}
    if missing := [n for n in names if n not in known] + [
        r["id"] for r in rows if r["id"] not in place
    ]:
        raise ValueError(
            f"{path} holds no {missing[0]!r} ({len(missing)} missing): it is of other rows; make "
            "it again"
        )
    columns = [known.index(n) for n in names]
    out = {k: v[[place[r["id"]] for r in rows]][:, columns] for k, v in tensors.items()}
    tokens = torch.tensor([[float(len(r["responses"][n])) for n in names] for r in rows])
    if differ := (out["tokens"] != tokens).any(1).nonzero()[:, 0].tolist():
        raise ValueError(
            f"{path}: row {rows[differ[0]]['id']} had responses of other lengths (other limits or "
            "data)"
        )
    return out


if __name__ == "__main__":
    name = "python -m beyond_dpo.jobs.reference"
    parser = argparse.ArgumentParser(prog=name, description=main.__doc__)
    parser.add_argument("job", help="the job file (JSON)")
    arguments = parser.parse_args()
    launch.follow_parent()
    main(arguments.job)
