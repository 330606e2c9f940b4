"""Log-probabilities and entropies of given responses, and the one pass of the reference model over the pairs.

Everything a loss, a KL estimate or a dispersion weight needs of the reference is computed here once, without β, loss or
seed in its key; training then holds one model. `python -m beyond_dpo.reference CONFIG.json` is the job itself.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

from beyond_dpo import data, launch

CHUNK = 2048  # response tokens whose logits exist at one time (2048 × 49,152 floats are 0.4 GB)


class ResponseScorer(torch.nn.Module):
    """Wrap a causal language model so that `forward` scores responses; logits exist for response positions only.

    forward(input_ids, attention_mask, response_mask, entropy=False), each (rows, length), returns a dict of (rows,)
    float32: `logps`, the sum over response tokens of ln p in nats; `tokens`, their number; with `entropy` also
    `entropies`, the mean over response tokens of the entropy of p divided by ln |V|, in 0…1.
    A row without response tokens gets logps 0 and entropy NaN. precision "bf16" autocasts; log-sum-exp stays float32.
    """

    def __init__(self, model, precision: str = "fp32", chunk: int = CHUNK):
        super().__init__()
        if precision not in ("bf16", "fp32"):
            raise ValueError(f"precision must be bf16 or fp32, got {precision!r}")
        self.model, self.bf16, self.chunk = model, precision == "bf16", chunk

    def forward(self, input_ids, attention_mask, response_mask, entropy: bool = False) -> dict:
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=self.bf16):
            decoder = self.model.get_decoder()
            hidden = decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        predicts = response_mask[:, 1:]  # position t-1 predicts token t
        hidden, labels = hidden[:, :-1][predicts], input_ids[:, 1:][predicts]
        pieces = []
        for h, y in zip(hidden.split(self.chunk), labels.split(self.chunk), strict=True):
            again = len(labels) > self.chunk and torch.is_grad_enabled()  # one chunk's logits may stay, many may not
            pieces.append(
                checkpoint(self._tokens, h, y, entropy, use_reentrant=False) if again else self._tokens(h, y, entropy)
            )
        rows = predicts.nonzero()[:, 0]
        zeros = torch.zeros(len(input_ids), device=rows.device)
        sums = [zeros.index_add(0, rows, torch.cat(p)) for p in zip(*pieces, strict=True)]
        tokens = predicts.sum(1).float()
        out = {"logps": sums[0], "tokens": tokens}
        return out | {"entropies": sums[1] / tokens / math.log(self.model.config.vocab_size)} if entropy else out

    def _tokens(self, hidden, labels, entropy: bool) -> tuple[torch.Tensor, ...]:
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.model.get_output_embeddings()(hidden)
        logits = logits.float()
        if cap := getattr(self.model.config, "final_logit_softcapping", None):
            logits = cap * torch.tanh(logits / cap)
        normaliser = logits.logsumexp(-1)
        logps = logits.gather(-1, labels[:, None])[:, 0] - normaliser
        if not entropy:
            return (logps,)
        return logps, normaliser - (logits * (logits - normaliser[:, None]).exp()).sum(-1)  # H = ln Z - E[logit]


def by_length(rows: list[dict], names: list[str], size: int) -> list[list[int]]:
    """Group row indices into batches of `size` rows of similar length, longest first (out of memory shows at once)."""
    longest = [len(r["prompt_ids"]) + max(len(r["responses"][n]) for n in names) for r in rows]
    order = sorted(range(len(rows)), key=lambda i: (-longest[i], i))
    return [order[i : i + size] for i in range(0, len(order), size)]


@torch.no_grad()
def score_rows(
    model, rows: list[dict], names: list[str], *, pad_id: int, precision: str, micro_batch: int = 16
) -> dict:
    """Return {"logps", "tokens", "entropies"}, each float32 (len(rows), len(names)) on the CPU, in `rows`' order."""
    scorer = ResponseScorer(model, precision).eval()
    device = next(model.parameters()).device
    out = {k: torch.full((len(rows), len(names)), float("nan")) for k in ("logps", "tokens", "entropies")}
    done = 0
    for batch in by_length(rows, names, micro_batch):
        tensors = data.collate([rows[i] for i in batch], names, pad_id)
        tensors.pop("ids")
        scores = scorer(**{k: v.to(device) for k, v in tensors.items()}, entropy=True)
        for k, v in scores.items():
            out[k][batch] = v.view(len(names), len(batch)).T.float().cpu()
        done += len(batch)
        launch.progress(done, len(rows))
    if not out["logps"].isfinite().all():
        bad = [rows[i]["id"] for i in (~out["logps"].isfinite()).any(1).nonzero()[:5, 0].tolist()]
        raise ValueError(f"the reference's log-probabilities are not finite for rows {bad}")
    return out


def main(path: str) -> None:
    """Score the rows of a job file: model, rows, names, limits, precision, micro_batch, out (a .safetensors file)."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    launch.follow_parent()
    job = json.loads(Path(path).read_text())
    tokenizer = data.load_tokenizer(job["model"])
    rows, dropped = data.prepare(data.read_rows(job["rows"]), job["names"], **job["limits"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).to(device)
    arguments = {"pad_id": tokenizer.pad_token_id, "precision": job["precision"], "micro_batch": job["micro_batch"]}
    scores = score_rows(model, rows, job["names"], **arguments)
    ids = json.dumps([r["id"] for r in rows])
    partial = job["out"] + ".partial"
    save_file(scores, partial, metadata={"ids": ids, "names": json.dumps(job["names"]), "dropped": str(dropped)})
    os.replace(partial, job["out"])


def load(path) -> tuple[dict, dict]:
    """Return (row id -> index, tensors) of a reference file."""
    from safetensors import safe_open

    with safe_open(path, "pt") as f:
        ids = json.loads(f.metadata()["ids"])
        return {row: i for i, row in enumerate(ids)}, {k: f.get_tensor(k) for k in f.keys()}


if __name__ == "__main__":
    main(sys.argv[1])
