"""Log-probabilities and entropies of given responses.

Many responses are packed into one batch, in which each prompt is computed once.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, distributed
from torch.utils.checkpoint import checkpoint

from beyond_dpo import attention
from beyond_dpo.rows import row_length

log = logging.getLogger("beyond_dpo.scoring")
# Response tokens whose logits exist at one time (2048 × 49,152 floats are 0.4 GB).
CHUNK = 2048
FLEX_BLOCK = 128  # tokens: flex-attention looks at whole blocks of them


@dataclass
class _Line:
    """The tokens of one line of a batch, each with its position and what it belongs to."""

    input_ids: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)  # the row's index
    parts: list[int] = field(default_factory=list)  # 0: the row's prompt, k: its k-th response
    # {(k, sequence): where in the line each token of its k-th response is predicted}
    predictors: dict[tuple[int, int], list[int]] = field(default_factory=dict)

    def append(self, tokens: list[int], first_position: int, row: int, part: int) -> int:
        """Add tokens; return where in the line they begin."""
        start = len(self.input_ids)
        for position, token in enumerate(tokens, start=first_position):
            self.input_ids.append(token)
            self.position_ids.append(position)
            self.rows.append(row)
            self.parts.append(part)
        return start


def pack(
    rows: list[dict], names: list[str], pad_id: int, shared: bool = True, multiple: int = 1
) -> dict:
    """Lay the named responses of rows into one batch in which every prompt stands once.

    A row is its prompt and then its responses, one after the other. Each response sees the prompt
    and itself only, and its positions go on from the prompt's, so its score is that of the response
    alone. Rows share lines of about twice the longest row, so that little is padding (3 % where
    lines of one response each had 60 %), and attention, whose cost grows with the line's length,
    stays cheap. Masks come from lengths, never from `pad_id`, so pad may be the end token.

    Args:
        rows: B rows, see rows.write_rows().
        names: of the responses to score.
        pad_id: fills the lines.
        shared: False for flash-attention, which knows no such masks. Then each response has its
            prompt to itself, all stand in one line, and positions that begin again say where a
            sequence ends.
        multiple: L is filled up to a multiple of it.
    Returns:
        input_ids, position_ids: (lines, L).
        row_of_token, part_of_token: (lines, L), for attention.visible(); absent if not shared.
        labels: (N,) the response tokens, name-major: all of names[0] first, row by row.
        predictors: (N,) where in `input_ids.flatten()` each of them is predicted.
        tokens: (len(names) * B,) the number of tokens of each response.
        ids: the ids of the B rows.
    Raises:
        ValueError: a row has no prompt, or pad_id is None.
    """
    if pad_id is None:
        raise ValueError("pad_id is None: give the tokenizer a pad token (its end token will do)")
    without_prompt = [row["id"] for row in rows if not row["prompt_ids"]]
    if without_prompt:
        raise ValueError(
            f"rows {without_prompt[:5]} have no prompt token, so nothing predicts their first "
            "response token"
        )
    sequences = _sequences(rows, names, shared)
    lengths = [sum(map(len, sequence)) for sequence in sequences]
    count = 1
    if shared:
        longest = max(lengths)
        count = max(1, sum(lengths) // (2 * longest))
    lines = _lay_out(sequences, _distribute(lengths, count))
    longest_line = max(len(line.input_ids) for line in lines)
    width = math.ceil(longest_line / multiple) * multiple
    responses = [row["responses"][name] for name in names for row in rows]
    tokens = [len(response) for response in responses]
    labels = [token for response in responses for token in response]
    batch = {
        "input_ids": _pad([line.input_ids for line in lines], pad_id, width),
        "position_ids": _pad([line.position_ids for line in lines], 0, width),
        "ids": [row["id"] for row in rows],
        "labels": torch.tensor(labels, dtype=torch.long),
        "predictors": torch.tensor(_predictors(lines, width), dtype=torch.long),
        "tokens": torch.tensor(tokens),
    }
    if shared:
        batch["row_of_token"] = _pad([line.rows for line in lines], -1, width)
        batch["part_of_token"] = _pad([line.parts for line in lines], 0, width)
    return batch


def _sequences(rows: list[dict], names: list[str], shared: bool) -> list[list[list[int]]]:
    """Return prompts with their responses, each with all of its own or, if not shared, with one."""
    sequences = []
    if shared:
        for row in rows:
            responses = [row["responses"][name] for name in names]
            sequences.append([row["prompt_ids"], *responses])
        return sequences
    for name in names:
        for row in rows:
            sequences.append([row["prompt_ids"], row["responses"][name]])
    return sequences


def _distribute(lengths: list[int], count: int) -> list[list[int]]:
    """Return the sequences of each of `count` lines: the longest first, each on the shortest line.

    lengths: of the sequences, in tokens.
    """
    members: list[list[int]] = [[] for _ in range(count)]
    widths = [0] * count
    for i in _longest_first(lengths):
        smallest_width = min(widths)
        shortest = widths.index(smallest_width)
        members[shortest].append(i)
        widths[shortest] += lengths[i]
    return members


def _longest_first(lengths: list[int]) -> list[int]:
    """Return the indices of lengths in descending order; of equal ones the first comes first."""
    indices = range(len(lengths))
    return sorted(indices, key=lambda i: -lengths[i])


def _lay_out(sequences: list[list[list[int]]], members: list[list[int]]) -> list[_Line]:
    """Return the lines of a batch.

    members: the sequences of each line, by their index.
    """
    lines = []
    for indices in members:
        line = _Line()
        for i in indices:
            prompt, *responses = sequences[i]
            line.append(prompt, 0, i, part=0)
            last_of_prompt = len(line.input_ids) - 1
            for part, response in enumerate(responses, start=1):
                start = line.append(response, len(prompt), i, part)
                # The prompt's last token predicts the first one, which predicts the second.
                chain = [last_of_prompt, *range(start, start + len(response))]
                line.predictors[part, i] = chain[: len(response)]
        lines.append(line)
    return lines


def _predictors(lines: list[_Line], width: int) -> list[int]:
    """Return where in the flat batch each response token is predicted, all first parts first."""
    offsets = {}  # {(part, sequence): its offsets in the flat batch}
    for number, line in enumerate(lines):
        for key, offsets_in_line in line.predictors.items():
            offsets[key] = [number * width + offset for offset in offsets_in_line]
    flat = []
    for key in sorted(offsets):
        flat += offsets[key]
    return flat


def _pad(lines: list[list[int]], value: int, width: int) -> Tensor:
    """Return lines of different lengths as a (lines, width) tensor, filled up on the right."""
    padded = torch.full((len(lines), width), value)
    for number, line in enumerate(lines):
        padded[number, : len(line)] = torch.tensor(line)
    return padded


class ResponseScorer(torch.nn.Module):
    """Wrap a causal language model so that `forward` scores responses.

    Logits exist for response positions only, and for `chunk` of them at a time. precision "bf16"
    autocasts, but the softmax stays float32. A model that caps its attention scores is switched
    from sdpa, which leaves the cap out in silence, to eager attention.

    Raises ValueError for a model that scores packed responses otherwise than alone, as its layers
    do not follow the mask, or its logits are not its head's.
    """

    def __init__(self, model, precision: str = "fp32", chunk: int = CHUNK):
        super().__init__()
        if precision not in ("bf16", "fp32"):
            raise ValueError(f"precision must be bf16 or fp32, got {precision!r}")
        self.model = model
        self.chunk = chunk
        self.config = model.config.get_text_config()
        self.window = getattr(self.config, "sliding_window", None) or math.inf
        attention.use_one_that_caps(model)
        implementation = getattr(model.config, "_attn_implementation", "")
        self.flex = implementation == attention.FLEX
        # flash-attention knows neither float32 nor a mask in which several responses see a prompt.
        self.shared = implementation != attention.FLASH
        # These two are checked in what they will compute in, the others more strictly.
        self.bf16 = precision == "bf16" and implementation in (attention.FLASH, attention.FLEX)
        self._check(0.03 if self.bf16 else 0.01)
        self.bf16 = precision == "bf16"

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def _check(self, relative_tolerance: float) -> None:
        """Raise ValueError if short responses have other scores packed than alone.

        Those of a recurrent or otherwise masked model do, and those of a model that its attention
        does not serve: alone, the attention is eager.
        """
        training = self.model.training
        implementation = self.model.config._attn_implementation
        self.eval()
        ids = [i % self.config.vocab_size for i in range(5, 15)]
        prompt = ids[:4]
        responses = {"a": ids[4:7], "b": ids[7:]}
        row = {"id": "", "prompt_ids": prompt, "responses": responses}
        names = list(responses)
        try:
            scores = self.score([row, row], names, pad_id=0)
            self.model.set_attn_implementation("eager")
            alone = []
            for response in responses.values():
                logps = _sequence_logps(self.model, prompt + response)
                alone.append(logps[-len(response) :].sum())
        finally:
            self.model.set_attn_implementation(implementation)
            self.train(training)
        packed = scores["logps"].view(2, 2)
        expected = torch.stack(alone).unsqueeze(1)
        error = (packed - expected).abs()
        if (error > relative_tolerance * expected.abs()).any():
            raise ValueError(
                f"{self.config.model_type} models score packed responses otherwise than alone "
                f"({packed.tolist()} and {expected.tolist()} nats): not supported"
            )

    def score(self, rows: list[dict], names: list[str], pad_id: int, entropy: bool = False) -> dict:
        """Return forward() of rows that are packed into one batch."""
        batch = self.pack(rows, names, pad_id)
        del batch["ids"]
        return self(**to_device(batch, self._device), entropy=entropy)

    def pack(self, rows: list[dict], names: list[str], pad_id: int) -> dict:
        """Return the batch of rows, pack(), in the layout that the model's attention wants.

        Raises ValueError as pack(), and for a sequence longer than the model's attention window.
        """
        multiple = FLEX_BLOCK if self.flex else 1
        batch = pack(rows, names, pad_id, self.shared, multiple)
        if batch["position_ids"].max() >= self.window:
            raise ValueError(
                f"a sequence is longer than the model's attention window of {self.window} tokens"
            )
        return batch

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        predictors: Tensor,
        tokens: Tensor,
        row_of_token: Tensor | None = None,
        part_of_token: Tensor | None = None,
        entropy: bool = False,
    ) -> dict[str, Tensor]:
        """Score the responses of a batch, which is what self.pack() returns without its ids.

        `tokens` may stay in the main memory: the program then need not wait for the GPU.

        Returns:
            logps: (responses,) float32, the sum of ln p over a response's tokens, in nats; 0
                without tokens.
            tokens: (responses,) float32, their number.
            entropies: (responses,) float32 in 0…1, only if `entropy`: the mean over a response's
                tokens of the entropy of p divided by ln |V|; NaN without tokens.
        """
        mask = self._mask(row_of_token, part_of_token)
        hidden = self._hidden(input_ids, position_ids, mask)
        hidden = hidden.flatten(0, 1)[predictors]
        score_tokens = self._score_tokens
        chunks = self._chunks(labels)
        # The logits of one chunk may stay in memory for the backward pass, those of many may not.
        if len(chunks) > 1 and torch.is_grad_enabled():
            score_tokens = partial(checkpoint, self._score_tokens, use_reentrant=False)
        logps = []
        entropies = []
        for chunk in chunks:
            chunk_logps, chunk_entropies = score_tokens(hidden[chunk], labels[chunk], entropy)
            logps.append(chunk_logps)
            entropies.append(chunk_entropies)
        lengths = tokens.tolist()
        tokens = tokens.to(hidden.device, torch.float32, non_blocking=True)
        scores = {"logps": _sum_by_response(logps, lengths), "tokens": tokens}
        if entropy:
            scores["entropies"] = _sum_by_response(entropies, lengths) / tokens
        return scores

    def _mask(self, row_of_token: Tensor | None, part_of_token: Tensor | None):
        """Return the mask that the model's attention takes; flash-attention takes none."""
        if row_of_token is None:
            return None
        if self.flex:
            return attention.visible_blocks(row_of_token, part_of_token)
        # What is added to the scores is a mask that sdpa and eager attention know.
        dtype = next(self.model.parameters()).dtype
        if self.bf16:
            dtype = torch.bfloat16
        is_seen = attention.visible(row_of_token, part_of_token)
        zeros = torch.zeros(is_seen.shape, dtype=dtype, device=is_seen.device)
        return zeros.masked_fill(~is_seen, -math.inf)

    def _hidden(self, input_ids, position_ids, attention_mask) -> Tensor:
        """Return the decoder's last hidden states, (lines, L, hidden size)."""
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=self.bf16):
            output = self.model.get_decoder()(
                input_ids=input_ids,
                position_ids=position_ids,
                attention_mask=attention_mask,
                use_cache=False,
            )
        return output.last_hidden_state

    def compile_scores(self, backend: str = "inductor") -> None:
        """Let torch.compile fuse what turns hidden states into log-probabilities."""
        self._score_tokens = torch.compile(self._score_tokens, dynamic=True, backend=backend)

    def _chunks(self, labels: Tensor) -> list[slice]:
        """Return the parts of the response tokens whose logits are computed together.

        Where several processes train (under ZeRO-3) all must call the head equally often, so some
        get empty parts.
        """
        count = math.ceil(len(labels) / self.chunk)
        count = max(1, count)
        if distributed.is_initialized() and distributed.get_world_size() > 1:
            largest = torch.tensor(count, device=labels.device)
            distributed.all_reduce(largest, distributed.ReduceOp.MAX)
            count = int(largest)
        starts = range(0, count * self.chunk, self.chunk)
        return [slice(start, start + self.chunk) for start in starts]

    def _score_tokens(
        self, hidden: Tensor, labels: Tensor, entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return ln p of each label and, if `entropy`, the entropy of p divided by ln |V|."""
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=self.bf16):
            head = self.model.get_output_embeddings()
            logits = head(hidden)
        logits = logits.float()
        cap = getattr(self.config, "final_logit_softcapping", None)
        if cap:
            logits = cap * torch.tanh(logits / cap)
        logps = logits.log_softmax(-1)
        label_logps = _logps_of(labels, logps)
        if not entropy:
            return label_logps, None
        probabilities = logps.exp()
        entropies = -(probabilities * logps).sum(-1)
        vocabulary_size = logits.shape[-1]
        return label_logps, entropies / math.log(vocabulary_size)


def _logps_of(labels: Tensor, logps: Tensor) -> Tensor:
    """Return ln p of the labels, (n,), from that of all tokens, (n, vocabulary)."""
    return logps.gather(-1, labels.unsqueeze(1)).squeeze(1)


def _sequence_logps(model, ids: list[int]) -> Tensor:
    """Return ln p of each token but the first, (len(ids) - 1,), as the model itself computes it."""
    device = next(model.parameters()).device
    input_ids = torch.tensor([ids], device=device)
    output = model(input_ids, use_cache=False)
    logits = output.logits[0, :-1]
    logps = logits.float().log_softmax(-1)
    labels = input_ids[0, 1:]
    return _logps_of(labels, logps)


def _sum_by_response(chunks: list[Tensor], lengths: list[int]) -> Tensor:
    """Return the sum over each response's tokens of values that lie in chunks one after another.

    lengths: of the responses.
    """
    values = torch.cat(chunks)
    by_response = values.split(lengths)
    sums = [part.sum() for part in by_response]
    return torch.stack(sums)


def to_device(batch: dict[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """Return what pack() made, without its ids, on a device; `tokens` stays where it is.

    The copies of pinned memory go on while the program does.
    """
    moved = dict(batch)
    for name, value in batch.items():
        if name != "tokens":
            moved[name] = value.to(device, non_blocking=True)
    return moved


def load_scorer(
    folder: str, precision: str = "fp32", dtype: torch.dtype = torch.float32
) -> ResponseScorer:
    """Return the scorer of a model folder, on the accelerator if there is one.

    dtype: of the weights.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(folder, "eager", dtype)
    return build_scorer(model.to(device), precision)


def build_scorer(model, precision: str, wanted: str = "auto") -> ResponseScorer:
    """Return the scorer of a model on its device, with the attention that attention.apply() gives.

    Where "auto" gives flex-attention and that fails on this machine, sdpa takes its place. Raises
    what apply() and ResponseScorer() raise.
    """
    attention.apply(model, precision, wanted)
    try:
        return ResponseScorer(model, precision)
    except Exception as error:
        uses_flex = model.config._attn_implementation == attention.FLEX
        if wanted != "auto" or not uses_flex:
            raise
        log.warning("flex-attention fails here, sdpa takes its place: %s", error)
        model.set_attn_implementation("sdpa")
        return ResponseScorer(model, precision)


def load_model(folder: str, implementation: str, dtype: torch.dtype, tensors: dict | None = None):
    """Return the causal language model of a folder with its own weights, or with other ones.

    The names of weights in memory may differ from those in files (a mixture's experts are one
    tensor, GPT-NeoX's head has another name). transformers itself converts them here, ties what is
    tied, and casts to `dtype`.

    Args:
        folder: the model's.
        implementation: of its attention.
        dtype: of its weights.
        tensors: the other weights, by the names that the folder's files have.
    Raises:
        ValueError: the model lacks a tensor, which transformers would draw at random.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {
        "dtype": dtype,
        "attn_implementation": implementation,
        "output_loading_info": True,
    }
    if tensors is None:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, use_safetensors=True, **options
        )
    else:
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        model, report = type(empty).from_pretrained(
            None, config=empty.config, state_dict=tensors, **options
        )
    mismatched = [name for name, *_ in report["mismatched_keys"]]
    missing = sorted([*report["missing_keys"], *mismatched])
    if missing:
        raise ValueError(
            f"{folder}: no {missing[0]} for the model ({len(missing)} missing): its weights are "
            "not whole"
        )
    return model


@torch.no_grad()
def plain_logps(
    folder: str, tensors: dict, sequences: list[list[int]], dtype: torch.dtype
) -> list[float]:
    """Return ln p (nats) of each sequence given its first token.

    The model is that of the folder with `tensors` as its weights. This is the independent
    computation by which others are judged: transformers on the processor, eager attention, one
    sequence at a time and all of its logits. Raises as load_model().
    """
    model = load_model(folder, "eager", dtype, tensors).eval()
    scores = []
    for ids in sequences:
        logps = _sequence_logps(model, ids)
        scores.append(float(logps.sum()))
    return scores


@torch.no_grad()
def score_rows(
    scorer: ResponseScorer,
    rows: list[dict],
    names: list[str],
    *,
    pad_id: int,
    micro_batch: int = 64,
    tell: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """Return the scores of rows in their order, each float32 (len(rows), len(names)) on the CPU.

    They are logps, tokens and entropies, as ResponseScorer.forward() has them.

    micro_batch: rows in one batch. tell: called with (rows done, rows in all) after each batch.
    Raises ValueError for log-probabilities that are not finite.
    """
    scorer.eval()
    shape = (len(rows), len(names))
    table = {
        "logps": torch.full(shape, math.nan),
        "tokens": torch.full(shape, math.nan),
        "entropies": torch.full(shape, math.nan),
    }
    # Similar lengths together, the longest first: too little memory shows at once.
    lengths = [row_length(row, names) for row in rows]
    order = _longest_first(lengths)
    for start in range(0, len(rows), micro_batch):
        batch = order[start : start + micro_batch]
        scores = scorer.score([rows[i] for i in batch], names, pad_id, entropy=True)
        for score, values in scores.items():
            by_name = values.view(len(names), len(batch))
            table[score][batch] = by_name.T.float().cpu()
        if tell:
            tell(start + len(batch), len(rows))
    finite = table["logps"].isfinite().all(1)
    if not finite.all():
        ids = [row["id"] for row, is_finite in zip(rows, finite, strict=True) if not is_finite]
        raise ValueError(
            f"the log-probabilities of rows {ids[:5]} are not finite (packed, one spoils its line)"
        )
    return table
