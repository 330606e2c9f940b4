"""Score response files with named rewards, in a process that keeps them loaded
(`launch.Worker`).
"""

import json
from pathlib import Path

from beyond_dpo import scoring, templates
from beyond_dpo.files import write_file
from beyond_dpo.machine import launch, shards
from beyond_dpo.precision import require_precision
from beyond_dpo.rewards import chat, distinct_n, load, repetition


class Scorer:
    """Score response files with named rewards, and the log-probability of each response by
    `target`, the SFT model.
    """

    def __init__(self, target: str, precision: str = "bf16"):
        """Take the SFT model's folder, and the precision of its pass.

        Raises ValueError for "bf16" on a CPU that would emulate it.
        """
        require_precision(precision)
        self.target, self.precision, self._reference = target, precision, None

    def score(
        self,
        rewards: dict,
        prompts: str,
        responses: str,
        out: str,
        reference_prompts: int = 0,
        shard: int = 512,
        rank: int = 0,
        world: int = 1,
    ) -> dict | None:
        """Write one JSON line per response: id, sample, length, each reward, repetition, logp, and
        logp_sft.

        rewards: name -> {"kind": "bag_of_words" | "classifier" | "finished" | "vader", …arguments}.
        A reward reads prompt and response together, as its training texts are whole openings; a
        finished one with a chat template reads turns where the prompts have a "text" (one user's,
        or turns). logp_sft is given for the first `reference_prompts` prompts (else null): logp −
        logp_sft estimates the KL to the SFT model in nats.
        shard, rank, world: as for Engine.generate(). Returns {"distinct_2"} of all responses
        together.
        """
        asked = {r["id"]: r for r in json.loads(Path(prompts).read_text(encoding="utf-8"))}
        lines = [
            json.loads(line) for line in Path(responses).read_text(encoding="utf-8").splitlines()
        ]
        place, files = (
            {name: i // shard for i, name in enumerate(asked)},
            shards.parts(out, len(asked), shard),
        )
        referenced = set(list(asked)[:reference_prompts])
        for k in shards.left(files, rank, world):
            part = self._scored(
                rewards, asked, [r for r in lines if place[r["id"]] == k], referenced
            )
            write_file(files[k], "".join(json.dumps(entry) + "\n" for entry in part))
        if world > 1:
            return None
        shards.merge(out, files)
        return {"distinct_2": round(distinct_n([r["response_ids"] for r in lines]), 4)}

    def _scored(self, rewards: dict, asked: dict, lines: list[dict], referenced: set) -> list[dict]:
        tokenizer = templates.load_tokenizer(self.target)
        whole = [asked[r["id"]]["prompt_ids"] + r["response_ids"] for r in lines]
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in whole]
        chats, table = texts, {}
        if all("text" in row for row in asked.values()):
            said = [tokenizer.decode(r["response_ids"], skip_special_tokens=True) for r in lines]
            chats = [
                chat(asked[r["id"]]["text"], answer) for r, answer in zip(lines, said, strict=True)
            ]
        for name, given in rewards.items():
            spoken = given["kind"] == "finished" and load(**given).tokenizer.chat_template
            table[name] = load(**given).score(chats if spoken else texts)
        rows, logps, scored = {}, {}, []
        for i, r in enumerate(lines):
            if r["id"] in referenced and r["response_ids"]:
                prompt = asked[r["id"]]["prompt_ids"]
                rows[i] = {
                    "id": r["id"],
                    "prompt_ids": prompt,
                    "responses": {"said": r["response_ids"]},
                }
        if rows:
            self._reference = self._reference or scoring.load_scorer(self.target, self.precision)
            found = scoring.score_rows(
                self._reference, [*rows.values()], ["said"], pad_id=tokenizer.pad_token_id
            )
            logps = dict(zip(rows, found["logps"][:, 0].tolist(), strict=True))
        for i, r in enumerate(lines):
            said = r["response_ids"]
            entry = {"id": r["id"], "sample": r["sample"], "length": len(said)}
            entry |= {name: round(float(scores[i]), 5) for name, scores in table.items()}
            entry |= {
                "repetition": round(repetition(said), 5),
                "logp": r["logp"],
                "logp_sft": logps.get(i),
            }
            scored.append(entry)
        return scored


if __name__ == "__main__":
    launch.serve(Scorer)
