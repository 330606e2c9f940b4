"""Log-probabilities and entropies of given responses: many packed into one batch, each prompt
computed once.
"""

import math
import re
from collections.abc import Callable
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from beyond_dpo.rows import row_length

ATTENTION_CAP = re.compile(
    "att.*(soft_?cap|logits?_cap)"
)  # in a config: attention scores are capped by tanh
CHUNK = 2048  # response tokens whose logits exist at one time (2048 × 49,152 floats are 0.4 GB)


def pack(rows: list[dict], names: list[str], pad_id: int, shared: bool = True) -> dict:
    """Lay the named responses of rows into one batch in which every prompt stands once.

    A row is its prompt and then its responses one after the other; each response sees the prompt
    and itself only, and its positions go on from the prompt's, so scores are those of each response
    alone. Rows share lines of about twice the longest row, each put on the line that is shortest
    yet, the longest first: little is padding (3 % where lines of one response each had 60 %), and
    attention, which grows with the line's length, stays cheap.

    shared: False for flash-attention, which knows no such masks: each response has its prompt to
    itself, all stand in one line, and positions that begin again say where a sequence ends; then
    there is no attention_mask.

    Returns input_ids and position_ids (lines, L) long; attention_mask (lines, 1, L, L) bool, True =
    is seen;
    labels (N,), the N response tokens, name-major (all of names[0] first, row by row); predictors
    (N,), where in `input_ids.flatten()` each is predicted; tokens (len(names) * B,), their number
    by response; ids, the B row ids. Masks come from lengths, never from `pad_id`, so pad may be the
    end token.
    Raises ValueError for a row without prompt, or without pad_id.
    """
    if pad_id is None:
        raise ValueError("pad_id is None: give the tokenizer a pad token (its end token will do)")
    if bad := [row["id"] for row in rows if not row["prompt_ids"]]:
        raise ValueError(
            f"rows {bad[:5]} have no prompt token, so nothing predicts their first response token"
        )
    ids = [row["id"] for row in rows]
    if not shared:
        rows, names = (
            [row | {"responses": {"": row["responses"][name]}} for name in names for row in rows],
            [""],
        )
    lengths = [row_length(row, names) for row in rows]
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
            part_of[at, here] = torch.arange(len(said) + 1).repeat_interleave(
                torch.tensor([ahead, *map(len, said)])
            )
            first = at * width + start + ahead
            for k, one in enumerate(
                said
            ):  # the prompt's last token predicts the first, and so on in a chain
                chain = [at * width + start + ahead - 1, *range(first, first + len(one) - 1)]
                predictors[k * len(rows) + i] = chain[: len(one)]
                first += len(one)
            start += lengths[i]
    batch = {"input_ids": input_ids, "position_ids": position_ids, "ids": ids}
    if shared:
        seen = (part_of[:, None] == 0) | (part_of[:, :, None] == part_of[:, None])
        seen &= (row_of[:, :, None] == row_of[:, None]) & torch.ones(
            width, width, dtype=torch.bool
        ).tril()
        batch["attention_mask"] = seen[:, None]
    answers = [row["responses"][name] for name in names for row in rows]
    return batch | {
        "labels": torch.tensor([t for said in answers for t in said], dtype=torch.long),
        "predictors": torch.tensor([t for where in predictors for t in where], dtype=torch.long),
        "tokens": torch.tensor([len(said) for said in answers]),
    }


def attention(precision: str, wanted: str = "auto") -> str:
    """Return the attention to ask transformers for: `wanted`, or flash-attention on a GPU where it
    is installed.

    Else, and for precision "fp32", which it does not know, PyTorch's scaled-dot-product attention.
    Raises ImportError for a flash-attention that is not there.
    """
    from transformers.utils import is_flash_attn_2_available

    there = torch.cuda.is_available() and is_flash_attn_2_available() and precision == "bf16"
    if wanted == "flash_attention_2" and not there:
        raise ImportError(
            "flash_attention_2 needs a GPU, precision bf16 and `pip install flash-attn`; sdpa "
            "needs none"
        )
    return ("flash_attention_2" if there else "sdpa") if wanted == "auto" else wanted


def caps_attention(config) -> bool:
    """Tell whether a model caps its attention scores, as Gemma-2 does: s ← c · tanh(s / c)."""
    return any(value for name, value in config.to_dict().items() if ATTENTION_CAP.match(name))


def compute_caps(model) -> None:
    """Take a transformers model that caps its attention scores from sdpa, which leaves the cap out,
    to eager.
    """
    if (
        caps_attention(model.config.get_text_config())
        and model.config._attn_implementation == "sdpa"
    ):
        model.set_attn_implementation("eager")


class ResponseScorer(torch.nn.Module):
    """Wrap a causal language model so that `forward` scores responses; logits exist for response
    positions only.

    forward takes what pack returns (without ids), and entropy=False. It returns a dict of
    (responses,) float32: `logps`, the sum over response tokens of ln p in nats; `tokens`, their
    number; with `entropy` also
    `entropies`, the mean over response tokens of the entropy of p divided by ln |V|, in 0…1.
    A response without tokens gets logps 0 and entropy NaN. precision "bf16" autocasts, the softmax
    stays float32.
    A model that caps its attention scores is taken from sdpa, which leaves the cap out in silence,
    to eager attention. Raises ValueError for a model that scores packed responses otherwise than
    alone (its layers do not follow the mask, or its logits are not its head's), and for a sequence
    longer than the model's attention window.
    """

    def __init__(self, model, precision: str = "fp32", chunk: int = CHUNK):
        super().__init__()
        if precision not in ("bf16", "fp32"):
            raise ValueError(f"precision must be bf16 or fp32, got {precision!r}")
        self.config = model.config.get_text_config()
        self.window = getattr(self.config, "sliding_window", None) or math.inf
        compute_caps(model)
        # flash-attention knows neither float32 nor a mask in which several responses see one prompt
        self.shared = getattr(model.config, "_attn_implementation", "") != "flash_attention_2"
        self.model, self.bf16, self.chunk = model, not self.shared, chunk
        self._check(0.01 if self.shared else 0.03)
        self.bf16 = precision == "bf16"

    @torch.no_grad()
    def _check(self, tolerance: float) -> None:
        """Score four short responses packed and alone: a recurrent or otherwise masked model would
        differ.
        """
        training, device = self.model.training, next(self.model.parameters()).device
        self.eval()
        ids = [t % self.config.vocab_size for t in range(5, 15)]
        row = {"id": "", "prompt_ids": ids[:4], "responses": {"a": ids[4:7], "b": ids[7:]}}
        packed = self.score([row, row], ["a", "b"], 0)["logps"]
        for said, found in ((ids[4:7], packed[:2]), (ids[7:], packed[2:])):
            with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                logits = (
                    self.model(torch.tensor([ids[:4] + said], device=device))
                    .logits[0, 3:-1]
                    .float()
                )
            alone = (
                logits.log_softmax(-1).gather(-1, torch.tensor(said, device=device)[:, None]).sum()
            )
            if ((found - alone).abs() > tolerance * alone.abs()).any():
                raise ValueError(
                    f"{self.config.model_type} models score packed responses otherwise than alone "
                    f"({found.tolist()} and {float(alone)} nats): not supported"
                )
        self.train(training)

    def score(self, rows: list[dict], names: list[str], pad_id: int, entropy: bool = False) -> dict:
        """Return forward() of rows that are packed into one batch."""
        device = next(self.model.parameters()).device
        batch = {
            k: v.to(device) for k, v in pack(rows, names, pad_id, self.shared).items() if k != "ids"
        }
        return self(**batch, entropy=entropy)

    def forward(
        self,
        input_ids,
        position_ids,
        labels,
        predictors,
        tokens,
        attention_mask=None,
        entropy=False,
    ) -> dict:
        if input_ids.shape[1] > self.window and position_ids.max() >= self.window:
            raise ValueError(
                f"a sequence is longer than the model's attention window of {self.window} tokens"
            )
        dtype, unseen = torch.bfloat16 if self.bf16 else next(self.model.parameters()).dtype, None
        if (
            attention_mask is not None
        ):  # added to the scores, which every attention but flash-attention understands
            unseen = torch.zeros(attention_mask.shape, dtype=dtype, device=input_ids.device)
            unseen = unseen.masked_fill(~attention_mask, -math.inf)
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=self.bf16):
            inputs = {
                "input_ids": input_ids,
                "position_ids": position_ids,
                "attention_mask": unseen,
            }
            hidden = self.model.get_decoder()(**inputs, use_cache=False).last_hidden_state
        hidden, score = hidden.flatten(0, 1)[predictors], self._tokens
        parts = [(start, start + self.chunk) for start in range(0, max(1, len(labels)), self.chunk)]
        if (
            torch.distributed.is_initialized()
        ):  # under ZeRO-3 all processes must call the head equally often
            most = torch.tensor(len(parts), device=labels.device)
            torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
            parts += [(0, 0)] * (int(most) - len(parts))
        if len(parts) > 1 and torch.is_grad_enabled():  # one chunk's logits may stay, many may not
            score = partial(checkpoint, self._tokens, use_reentrant=False)
        pieces = [score(hidden[start:end], labels[start:end], entropy) for start, end in parts]
        cuts = tokens.tolist()
        sums = [
            torch.stack([x.sum() for x in torch.cat(p).split(cuts)])
            for p in zip(*pieces, strict=True)
        ]
        tokens = tokens.float()
        return {"logps": sums[0], "tokens": tokens} | (
            {"entropies": sums[1] / tokens} if entropy else {}
        )

    def _tokens(self, hidden, labels, entropy: bool) -> tuple[torch.Tensor, ...]:
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.model.get_output_embeddings()(hidden)
        logits = logits.float()
        if cap := getattr(self.config, "final_logit_softcapping", None):
            logits = cap * torch.tanh(logits / cap)
        logps = logits.log_softmax(-1)
        picked = logps.gather(-1, labels[:, None])[:, 0]
        if not entropy:
            return (picked,)
        return picked, -(logps.exp() * logps).sum(-1) / math.log(logits.shape[-1])


def load_scorer(
    folder: str, precision: str = "fp32", dtype: torch.dtype = torch.float32
) -> ResponseScorer:
    """Return the scorer of a model folder: weights in `dtype`, on the accelerator if there is
    one.
    """
    model = load_model(folder, attention(precision), dtype)
    return ResponseScorer(model.to("cuda" if torch.cuda.is_available() else "cpu"), precision)


def load_model(folder: str, implementation: str, dtype: torch.dtype, tensors: dict | None = None):
    """Return the causal language model of a folder with its own weights, or with other ones.

    implementation: of its attention. tensors: the other weights, by the names that the folder's
    files have. The names in memory may differ (a mixture's experts are one tensor, GPT-NeoX's head
    has another name): transformers itself converts them here, ties what is tied, and casts to
    `dtype`. Raises ValueError if the model lacks a tensor then, which transformers would draw at
    random.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    how = {"dtype": dtype, "attn_implementation": implementation, "output_loading_info": True}
    if tensors is None:
        model, report = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, **how)
    else:
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        model, report = type(empty).from_pretrained(
            None, config=empty.config, state_dict=tensors, **how
        )
    if missing := sorted(
        [*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])]
    ):
        raise ValueError(
            f"{folder}: no {missing[0]} for the model ({len(missing)} missing): its weights are "
            "not whole"
        )
    return model


@torch.no_grad()
def plain_logps(
    folder: str, tensors: dict, sequences: list[list[int]], dtype: torch.dtype
) -> list[float]:
    """Return ln p (nats) of each sequence given its first token, under `tensors` in the model of a
    folder.

    The independent computation by which others are judged: transformers on the processor, eager
    attention, one sequence at a time and all of its logits. Raises as load_model().
    """
    model = load_model(folder, "eager", dtype, tensors).eval()
    scores = []
    for ids in sequences:
        logps = model(torch.tensor([ids]), use_cache=False).logits[0, :-1].float().log_softmax(-1)
        scores.append(float(logps.gather(-1, torch.tensor(ids[1:])[:, None]).sum()))
    return scores


@torch.no_grad()
def score_rows(
    scorer: ResponseScorer,
    rows: list[dict],
    names: list,
    *,
    pad_id: int,
    micro_batch: int = 64,
    tell: Callable[[int, int], None] | None = None,
) -> dict:
    """Return logps, tokens and entropies of `rows` in their order, each float32 (len(rows),
    len(names)) on the CPU.

    tell: called with (rows done, rows in all) after each batch.
    """
    scorer.eval()
    out = {
        k: torch.full((len(rows), len(names)), float("nan"))
        for k in ("logps", "tokens", "entropies")
    }
    # similar lengths together, the longest first: too little memory shows at once
    order = sorted(range(len(rows)), key=lambda i: -row_length(rows[i], names))
    for start in range(0, len(rows), micro_batch):
        batch = order[start : start + micro_batch]
        for k, v in scorer.score([rows[i] for i in batch], names, pad_id, entropy=True).items():
            out[k][batch] = v.view(len(names), len(batch)).T.float().cpu()
        if tell:
            tell(start + len(batch), len(rows))
    if not out["logps"].isfinite().all():
        bad = [rows[i]["id"] for i in (~out["logps"].isfinite()).any(1).nonzero()[:5, 0].tolist()]
        raise ValueError(
            f"the log-probabilities of rows {bad} are not finite (packed, one spoils its line)"
        )
    return out
