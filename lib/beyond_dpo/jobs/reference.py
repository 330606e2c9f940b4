"""The reference job: the one pass of the reference model over the pairs.

    python -m beyond_dpo.jobs.reference JOB.json

Everything that a loss, a KL estimate or a dispersion weight needs of the reference is computed here
once, without β, loss or seed in its key. Training then holds one model.
"""

import argparse
import json
from pathlib import Path

from beyond_dpo import events, templates
from beyond_dpo.files import write_file
from beyond_dpo.machine import launch
from beyond_dpo.precision import require_precision
from beyond_dpo.rows import read_rows
from beyond_dpo.scoring import load_scorer, score_rows


def main(path: str) -> None:
    """Score the rows of a job file.

    It holds: model, rows, names, limits, precision, micro_batch, out (a .safetensors file).
    """
    from safetensors.torch import save

    job = json.loads(Path(path).read_text(encoding="utf-8"))
    names = job["names"]
    require_precision(job["precision"])
    tokenizer = templates.load_tokenizer(job["model"])
    rows, dropped = templates.cut_rows(tokenizer, read_rows(job["rows"]), names, job["limits"])
    ids = [row["id"] for row in rows]
    if not rows:
        raise ValueError(
            f"{job['rows']}: no row is left to score ({dropped} dropped, without prompt or "
            "response)"
        )
    if len(set(ids)) < len(ids):
        raise ValueError(
            f"{job['rows']}: rows share an id, so their scores could not be told apart"
        )
    scorer = load_scorer(job["model"], job["precision"])
    scores = score_rows(
        scorer,
        rows,
        names,
        pad_id=tokenizer.pad_token_id,
        micro_batch=job["micro_batch"],
        tell=events.progress,
    )
    metadata = {"ids": json.dumps(ids), "names": json.dumps(names), "dropped": str(dropped)}
    content = save(scores, metadata=metadata)
    write_file(Path(job["out"]), _sorted(content))


def _sorted(content: bytes) -> bytes:
    """Return a safetensors file with its header sorted.

    The library writes the metadata in another order each time, so that equal scores would have
    unequal files.
    """
    # the length of the header in 8 bytes, the header, the tensors
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    padded = text.encode().ljust(end - 8)
    return content[:8] + padded + content[end:]


def load(path, rows: list[dict], names: list[str]) -> dict:
    """Return a reference file's scores of `rows`: logps (nats), tokens and entropies.

    Each is float32 (len(rows), len(names)). Raises ValueError if the file lacks a row or a
    response, or was made from responses of other lengths.
    """
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    known_names = json.loads(metadata["names"])
    index_of = {row_id: i for i, row_id in enumerate(json.loads(metadata["ids"]))}
    missing = [name for name in names if name not in known_names]
    missing += [row["id"] for row in rows if row["id"] not in index_of]
    if missing:
        raise ValueError(
            f"{path} holds no {missing[0]!r} ({len(missing)} missing): it is of other rows; make "
            "it again"
        )
    columns = [known_names.index(name) for name in names]
    indices = [index_of[row["id"]] for row in rows]
    scores = {key: tensor[indices][:, columns] for key, tensor in tensors.items()}
    for row, lengths in zip(rows, scores["tokens"].tolist(), strict=True):
        if lengths != [len(row["responses"][name]) for name in names]:
            raise ValueError(
                f"{path}: row {row['id']} had responses of other lengths (other limits or data)"
            )
    return scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m beyond_dpo.jobs.reference",
        description=main.__doc__,
    )
    parser.add_argument("job", help="the job file (JSON)")
    arguments = parser.parse_args()
    launch.follow_parent()
    main(arguments.job)
