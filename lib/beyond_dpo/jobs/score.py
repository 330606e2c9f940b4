"""Score response files with named rewards, in a process that keeps them (`launch.Worker`)."""

import json
from pathlib import Path

from beyond_dpo import scoring, templates
from beyond_dpo.files import write_file
from beyond_dpo.machine import launch, shards
from beyond_dpo.precision import require_precision
from beyond_dpo.rewards import chat, distinct_n, load, repetition


class Scorer:
    """Score response files with named rewards, and with the log-probability by the SFT model."""

    def __init__(self, precision: str = "bf16"):
        """Take the precision of the SFT models' passes.

        Raises ValueError for "bf16" on a CPU that would emulate it.
        """
        require_precision(precision)
        self.precision = precision
        self._reference = None  # the SFT model that was needed last
        self._reference_folder = ""

    def score(
        self,
        rewards: dict,
        target: str,
        prompts: str,
        responses: str,
        out: str,
        reference_prompts: int = 0,
        shard: int = 512,
        rank: int = 0,
        world: int = 1,
    ) -> dict | None:
        """Write a JSON line for each response.

        Its fields are id, sample, length, ended (whether it closes with an end token of the SFT
        model), each reward, repetition, logp and logp_sft.

        rewards: name -> {"kind": one of rewards.KINDS, …its arguments}. A reward reads prompt and
        response together, as its training texts are whole openings; a finished one with a chat
        template reads turns where the prompts have a "text" (one user's, or turns).
        target: the SFT model's folder. The calls of one process may name several. logp is the
        response file's. logp_sft is given for the first `reference_prompts` prompts (else null):
        logp − logp_sft estimates the KL to the SFT model in nats.
        shard, rank, world: as for Engine.generate(). Returns {"distinct_2"} of all responses
        together.
        """
        prompt_list = json.loads(Path(prompts).read_text(encoding="utf-8"))
        prompt_rows = {row["id"]: row for row in prompt_list}
        response_lines = Path(responses).read_text(encoding="utf-8").splitlines()
        response_rows = [json.loads(line) for line in response_lines]
        referenced = set(list(prompt_rows)[:reference_prompts])
        shard_of = {prompt: place // shard for place, prompt in enumerate(prompt_rows)}
        files = shards.parts(out, len(prompt_rows), shard)
        for number in shards.left(files, rank, world):
            shard_rows = [row for row in response_rows if shard_of[row["id"]] == number]
            entries = self._scored(target, rewards, prompt_rows, shard_rows, referenced)
            lines = [json.dumps(entry) + "\n" for entry in entries]
            write_file(files[number], "".join(lines))
        if world > 1:
            return None
        shards.merge(out, files)
        token_lists = [row["response_ids"] for row in response_rows]
        return {"distinct_2": round(distinct_n(token_lists), 4)}

    def _scored(
        self, target: str, rewards: dict, prompt_rows: dict, rows: list[dict], referenced: set
    ) -> list[dict]:
        """Return the entry of each response; prompt_rows: by id, referenced: ids with logp_sft."""
        tokenizer = templates.load_tokenizer(target)
        values = _rewards_of(rewards, tokenizer, prompt_rows, rows)
        logps_sft = self._logps_sft(target, prompt_rows, rows, referenced)
        ends = templates.model_end_tokens(target)
        entries = []
        for i, row in enumerate(rows):
            response = row["response_ids"]
            entry = {"id": row["id"], "sample": row["sample"], "length": len(response)}
            entry["ended"] = bool(response) and response[-1] in ends
            for name, scores in values.items():
                entry[name] = round(float(scores[i]), 5)
            entry["repetition"] = round(repetition(response), 5)
            entry["logp"] = row["logp"]
            entry["logp_sft"] = logps_sft.get(i)
            entries.append(entry)
        return entries

    def _logps_sft(
        self, target: str, prompt_rows: dict, rows: list[dict], referenced: set
    ) -> dict[int, float]:
        """Return {place in rows: log-probability by the SFT model} of the referenced responses."""
        pairs = {}
        for i, row in enumerate(rows):
            if row["id"] in referenced and row["response_ids"]:
                prompt = prompt_rows[row["id"]]["prompt_ids"]
                pairs[i] = {
                    "id": row["id"],
                    "prompt_ids": prompt,
                    "responses": {"response": row["response_ids"]},
                }
        if not pairs:
            return {}
        if self._reference_folder != target:
            self._reference = None  # there may be no room for two
            self._reference_folder = ""
            self._reference = scoring.load_scorer(target, self.precision)
            self._reference_folder = target
        pad_id = templates.load_tokenizer(target).pad_token_id
        scores = scoring.score_rows(
            self._reference, list(pairs.values()), ["response"], pad_id=pad_id
        )
        logps = scores["logps"][:, 0].tolist()
        return dict(zip(pairs, logps, strict=True))


def _rewards_of(rewards: dict, tokenizer, prompt_rows: dict, rows: list[dict]) -> dict:
    """Return {reward's name: a score per response}, of whole texts or of turns as it reads them."""
    texts = []
    for row in rows:
        tokens = prompt_rows[row["id"]]["prompt_ids"] + row["response_ids"]
        texts.append(tokenizer.decode(tokens, skip_special_tokens=True))
    chats = texts
    if all("text" in prompt for prompt in prompt_rows.values()):
        chats = []
        for row in rows:
            response = tokenizer.decode(row["response_ids"], skip_special_tokens=True)
            chats.append(chat(prompt_rows[row["id"]]["text"], response))
    values = {}
    for name, arguments in rewards.items():
        reward = load(**arguments)
        reads_turns = arguments["kind"] == "finished" and reward.tokenizer.chat_template
        values[name] = reward.score(chats if reads_turns else texts)
    return values


if __name__ == "__main__":
    launch.serve(Scorer)
