"""Rows, tokens and masks: at most one BOS, masks that cover exactly the response, files that are
whole or refused.
"""

import datetime
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from beyond_dpo import scoring, templates
from beyond_dpo.jobs.generate import Engine
from beyond_dpo.machine import paths
from beyond_dpo.rows import epoch_order, prepare, read_rows, truncate, write_rows

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TEXTS = [
    "a good film",
    "a bad film",
    "I saw this film twice and liked it",
    "the plot is thin, the actors are good",
]


def build(
    *,
    adds_bos: bool = False,
    pad: str = "<pad>",
    bos: str | None = "<s>",
    template: str | None = TEMPLATE,
):
    """Train a byte-level BPE on four sentences: ids 0, 1, 2 are <s>, </s>, <pad>."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<pad>"]
    core.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=bos, eos_token="</s>", pad_token=pad
    )
    tokenizer.chat_template = template
    return tokenizer


BOS, EOS = 0, 1
USER = [{"role": "user", "content": "a good film"}]


def row(id="0", prompt=(0, 5, 6), **responses):
    return {
        "id": id,
        "prompt_ids": list(prompt),
        "responses": {k: list(v) for k, v in responses.items()},
    }


# --- text to ids


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("pad", ["<pad>", "</s>"])
def test_plain_prompt_has_the_bos_that_the_tokenizer_adds(adds_bos, pad):
    tokenizer = build(adds_bos=adds_bos, pad=pad)
    ids = templates.render(tokenizer, "a good film", "plain")
    assert ids == tokenizer("a good film")["input_ids"]
    assert ids.count(BOS) == int(adds_bos)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a good film"


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("prompt", [USER, "a good film"])
def test_a_template_with_bos_puts_exactly_one(adds_bos, prompt):
    """A chat template with BOS and a tokenizer that adds one of its own is the classic double
    BOS.
    """
    ids = templates.render(build(adds_bos=adds_bos), prompt, "chat")
    assert ids[0] == BOS and ids.count(BOS) == 1


def test_a_template_without_bos_is_left_alone():
    tokenizer = build(adds_bos=True, template=TEMPLATE.replace("{{ bos_token }}", ""))
    assert templates.render(tokenizer, USER, "chat").count(BOS) == 0


def test_a_tokenizer_without_bos_adds_none():
    ids = templates.render(build(bos=None), "a good film", "plain")
    assert ids == build(bos=None)("a good film")["input_ids"] and BOS not in ids


def test_chat_text_is_the_template_with_the_generation_prompt():
    tokenizer = build()
    ids = templates.render(tokenizer, USER, "chat")
    assert tokenizer.decode(ids) == "<s>user: a good film\nassistant:"
    assert ids == templates.render(tokenizer, "a good film", "chat")  # a string is one user turn
    turns = [{"role": "system", "content": "be kind"}, *USER]
    text = tokenizer.decode(templates.render(tokenizer, turns, "chat"))
    assert text == "<s>system: be kind\nuser: a good film\nassistant:"


def test_markup_in_a_text_stays_text():
    """ "</s>" in a review must not become the end token, and "<s>" in front must not become a
    second BOS.
    """
    tokenizer = build(adds_bos=True, template=None)
    ids = templates.encode_response(tokenizer, "good</s>film")
    assert ids.count(EOS) == 1 and ids[-1] == EOS and tokenizer.decode(ids[:-1]) == "good</s>film"
    assert templates.render(tokenizer, "<s>a film", "plain").count(BOS) == 1


def test_response_ends_with_the_end_token_once():
    tokenizer = build(adds_bos=True, template=None)
    with_end, without = (
        templates.encode_response(tokenizer, " good", end=end) for end in (True, False)
    )
    assert with_end == without + [EOS] and BOS not in with_end
    assert (
        templates.encode_response(tokenizer, "") == [EOS]
        and templates.encode_response(tokenizer, "", end=False) == []
    )


@pytest.mark.parametrize(
    "make, error, says",
    [
        (lambda: templates.render(build(), "x", "zephyr"), ValueError, "zephyr"),
        (lambda: templates.render(build(), USER, "plain"), TypeError, "takes a string, got list"),
        (lambda: templates.render(build(), [], "chat"), TypeError, "non-empty list"),
        (
            lambda: templates.render(build(template=None), "x", "chat"),
            ValueError,
            "no chat template",
        ),
        (
            lambda: templates.render(
                build(), [*USER, {"role": "assistant", "content": "y"}], "chat"
            ),
            ValueError,
            "assistant",
        ),
        (
            lambda: templates.render(build(template="{{ bos_token }}" + TEMPLATE), "x", "chat"),
            ValueError,
            "two BOS",
        ),
    ],
)
def test_prompt_faults(make, error, says):
    with pytest.raises(error, match=says):
        make()


# --- a response is what it adds to its prompt

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LLAMA2 = (  # an answer stands between blanks
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim "
    "}} [/INST]"
    "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
THINKING = CHATML.replace(
    "{{ m.content }}", "{% if m.role == 'assistant' %}<t></t>\n{% endif %}{{ m.content }}"
)
TEMPLATES = {
    "text": TEMPLATE,
    "chatml": CHATML,
    "zephyr": ZEPHYR,
    "llama-2": LLAMA2,
    "thinking": THINKING,
}


def turned(template=CHATML):
    """Return a tokenizer whose chats end turns with a token of their own, which is not its end
    token.
    """
    tokenizer = build(template=template)
    tokenizer.add_tokens(
        [AddedToken(name, special=True) for name in ("<|im_start|>", "<|im_end|>")]
    )
    return tokenizer


def sentencepiece(front: str = "", template: str | None = ZEPHYR):
    """Train a BPE on characters with ▁ for a blank, as Llama-2's and Mistral's, whose texts begin
    with one.

    front: "first" for one at the beginning only, else at the beginning of every text between
    special tokens.
    """
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    blanks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    if front:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=front)
    else:
        core.normalizer = normalizers.Sequence(blanks)
    letters = [*map(chr, range(33, 127)), "▁", "\n"]
    special = ["<s>", "</s>", "<pad>", "<unk>"]
    core.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            special_tokens=special,
            initial_alphabet=letters,
            max_token_length=6,
            show_progress=False,
        ),
    )
    if not front:
        core.pre_tokenizer = None
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    options = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, **options)


@pytest.mark.parametrize(
    "kind", [build, turned, sentencepiece, lambda template: sentencepiece("first", template)]
)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("answer", ["the plot is thin", "I liked it. ", ""])
def test_prompt_and_response_are_the_tokens_of_the_whole_chat(kind, template, answer):
    """The turn's own end token, blanks around an answer, and no mark of a text's beginning within
    one.
    """
    tokenizer = kind(template=TEMPLATES[template])
    prompt = templates.render(tokenizer, USER, "chat")
    chat = [*USER, {"role": "assistant", "content": answer}]
    whole = tokenizer.apply_chat_template(chat, return_dict=False)
    for given in ({}, {"prompt": USER, "template": "chat"}):
        ids = templates.encode_response(tokenizer, answer, **given)
        ours = prompt + ids
        if (
            ours != whole[: len(ours)]
        ):  # this template ends no turn: then the tokenizer's end token does
            begun = tokenizer.apply_chat_template(
                chat, return_dict=False, continue_final_message=True
            )
            assert ours == [*begun, EOS] and EOS not in whole[len(prompt) :]
        assert ids[-1] in templates.end_tokens(tokenizer) and not set(ids[:-1]) & set(
            templates.end_tokens(tokenizer)
        )
        cut = templates.encode_response(tokenizer, answer, end=False, **given)
        assert cut == ids[: len(cut)] and answer.strip() in tokenizer.decode(cut)


def test_a_turn_ends_as_its_template_ends_it():
    tokenizer = turned()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert templates.encode_response(tokenizer, "a film")[-1] == end != EOS
    assert templates.encode_response(tokenizer, "a film", template="plain")[-1] == EOS
    assert templates.end_tokens(tokenizer) == [EOS, end], "sampling stops at both"


@pytest.mark.parametrize("front", ["", "first"])
def test_a_plain_response_begins_as_it_does_within_the_text(front):
    """Alone it would get the mark that such a tokenizer puts at the beginning of a text: a second
    blank.
    """
    tokenizer = sentencepiece(front, None)
    whole = "the plot is thin, the actors are good"
    wanted = tokenizer(whole)["input_ids"]
    for cut in (8, 11, 16, 17):
        prompt, response = whole[:cut], whole[cut:]
        ids = templates.encode_response(
            tokenizer, response, end=False, prompt=prompt, template="plain"
        )
        assert templates.render(tokenizer, prompt, "plain") + ids == wanted
        assert templates.encode_response(tokenizer, response, end=False) == ids, "after any text"


def test_a_response_that_shares_a_token_with_its_prompt_is_refused():
    tokenizer = build(template=TEMPLATE.replace("assistant:{%", "assistant: {%"))
    for prompt, response in [("a go", "od film"), ("a good ", "film")]:
        with pytest.raises(
            templates.RowError,
            match="the prompt's tokens do not begin those of prompt and response",
        ):
            templates.encode_response(tokenizer, response, prompt=prompt, template="plain")
    with pytest.raises(
        templates.RowError, match="the prompt's tokens do not begin"
    ):  # "assistant: " and "good"
        templates.encode_response(tokenizer, "good", prompt=USER, template="chat")
    other = build(template=TEMPLATE.replace("assistant:{%", "model:{%"))
    with pytest.raises(templates.RowError, match="the prompt's tokens do not begin"):
        templates.encode_response(other, "good")


CONTINUATIONS = [
    "good film",
    " good",
    "od film",
    "\n\nI saw",
    "  twice",
    "'s",
    "1990",
    ".",
    "a",
    "\n",
    "",
]


@pytest.mark.parametrize("text", CONTINUATIONS)
def test_byte_level_tokens_are_those_of_the_text_alone(text):
    """As of SmolLM2 and the tiny model: what was computed from them stays."""
    tokenizer = build(adds_bos=True)
    alone = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert templates.encode_response(tokenizer, text, template="plain") == [*alone, EOS]


def test_markup_in_an_answer_of_a_chat_stays_text():
    for tokenizer in (turned(), turned(LLAMA2), sentencepiece()):
        prompt = templates.render(tokenizer, USER, "chat")
        plain, marked = (
            templates.encode_response(tokenizer, text)
            for text in ("a good film", "a</s> good film")
        )
        assert marked[-1] == plain[-1] and marked.count(EOS) == plain.count(EOS) <= 1
        assert tokenizer.decode(prompt + marked[:-1]).rstrip().endswith("a</s> good film")
        assert (
            templates.render(tokenizer, USER, "chat", begun="a</s> good")[len(prompt) :].count(EOS)
            == 0
        )


def test_an_answer_that_has_begun_goes_on_right_there():
    tokenizer = turned()
    ids = templates.render(tokenizer, USER, "chat", begun="the plot is")
    assert tokenizer.decode(ids).endswith("<|im_start|>assistant\nthe plot is")
    assert ids == templates.render(tokenizer, USER, "chat") + templates.encode_response(
        tokenizer, "the plot is", end=False
    )
    assert templates.render(tokenizer, "the plot", "plain", begun=" is") == templates.render(
        tokenizer, "the plot is", "plain"
    )


def test_end_tokens_are_all_that_tokenizer_template_and_configs_name(tmp_path):
    """A line break that a config names as an end is none where a text holds it."""
    tokenizer = turned()
    line, end = tokenizer("\n")["input_ids"][0], tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 7, "text_config": {"eos_token_id": 8}}')
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, line]}))
    loaded = templates.load_tokenizer(tmp_path)
    assert (
        templates.end_tokens(loaded)
        == templates.model_end_tokens(tmp_path)
        == [EOS, 9, line, 7, 8, end]
    )
    ids = templates.encode_response(loaded, "a film\nI saw")
    assert loaded.decode(ids) == "a film\nI saw<|im_end|>"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    assert templates.model_end_tokens(tmp_path) == [9, line, 7, 8], (
        "what a model without a tokenizer has"
    )


def test_sampling_stops_where_training_closes_a_response(tmp_path, tiny):
    """A model that has learnt to end at once, with the token that its tokenizer names and its
    config does not.
    """
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    tokenizer = templates.load_tokenizer(tiny)
    end = tokenizer.pad_token_id
    other = AutoTokenizer.from_pretrained(folder)
    other.eos_token, other.chat_template = other.pad_token, None
    other.save_pretrained(folder)
    weights = {
        name: torch.zeros_like(tensor)
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    weights["model.norm.weight"] += 1
    weights["model.embed_tokens.weight"][:, 0] = 5
    weights["model.embed_tokens.weight"][end, 0] = 50
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "prompts.json").write_text('[{"id": "a", "prompt_ids": [10, 11, 12]}]')
    how = {"backend": "transformers", "max_tokens": 8, "max_model_len": 64, "dtype": "float32"}
    Engine(str(folder), how).generate(
        str(tmp_path / "prompts.json"), str(tmp_path / "said.jsonl"), 1, 0
    )
    said = json.loads((tmp_path / "said.jsonl").read_text())["response_ids"]
    assert (
        said == [end] == templates.encode_response(templates.load_tokenizer(folder), "a film")[-1:]
    )
    assert (
        json.loads((folder / "config.json").read_text())["eos_token_id"]
        == tokenizer.eos_token_id
        != end
    )


def test_without_any_end_token_a_response_cannot_be_closed():
    tokenizer = build(template=None)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no end token: pass end=False"):
        templates.encode_response(tokenizer, "a film")
    assert templates.encode_response(tokenizer, "a film", end=False)


# --- what reaches a chat template


def test_fields_that_are_none_do_not_reach_a_template():
    """Through Arrow every turn has the fields of all turns."""
    named = (
        "{% for m in messages %}{{ m.role }}{% if m.name is defined %} ({{ m.name }}){% endif %}: "
    )
    named += "{{ m.content }}\n{% endfor %}"
    called = (
        "{% for m in messages %}{% for c in m.calls %}{{ c | tojson }}{% endfor %}{{ m.content "
        "}}{% endfor %}"
    )
    turns = [{"role": "user", "content": "a", "name": None, "calls": [{"f": "x", "y": None}]}]
    turns += [{"role": "user", "content": "b", "name": "bob", "calls": None}]
    tokenizer = build(template=named)
    assert (
        tokenizer.decode(templates.render(tokenizer, turns, "chat")) == "user: a\nuser (bob): b\n"
    )
    tokenizer = build(template=called)
    assert tokenizer.decode(templates.render(tokenizer, turns, "chat")) == '{"f": "x"}ab'
    assert turns[0]["name"] is None, "the caller's turns are untouched"


def test_a_template_writes_the_same_date_on_any_day(monkeypatch):
    today = (
        "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }} {% endif %}{{ "
        "messages[0].content }}"
    )
    tokenizer, said = build(template=today), []
    for day in (1, 2):

        class Day(datetime.datetime):
            @classmethod
            def now(cls, tz=None, day=day):
                return cls(2031, 1, day)

        monkeypatch.setattr(chat_template_utils, "datetime", Day)
        said.append(tokenizer.decode(templates.render(tokenizer, "a film", "chat")))
    assert said == ["26 Jul 2024 a film"] * 2


def test_turns_that_a_template_refuses_are_named():
    refuse = "{{ raise_exception('System role not supported') }}"
    strict = "{% if messages[0].role == 'system' %}" + refuse + "{% endif %}" + TEMPLATE
    turns = [{"role": "system", "content": "be kind"}, *USER]
    with pytest.raises(
        templates.RowError, match=r"refuses it \(System role not supported\): .*'be kind'"
    ) as refused:
        templates.render(build(template=strict), turns, "chat")
    assert refused.value.reason == "the chat template refuses it (System role not supported)"
    with pytest.raises(templates.RowError, match="can only concatenate"):
        templates.render(
            build(template="{{ 'a' + messages[0].content }}"),
            [{"role": "user", "content": 3}],
            "chat",
        )


def test_loaded_tokenizer_pads_with_the_end_token_if_it_has_no_pad(tmp_path):
    tokenizer = build(adds_bos=True)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    loaded = templates.load_tokenizer(tmp_path)
    assert loaded.pad_token_id == loaded.eos_token_id == EOS
    assert templates.load_tokenizer(tmp_path) is loaded
    assert templates.render(loaded, "a film", "plain") == templates.render(
        tokenizer, "a film", "plain"
    )


SMOLLM2 = sorted(p for p in paths.CACHE.glob("smollm2-*") if p.is_dir())


@pytest.mark.skipif(not SMOLLM2, reason="the SmolLM2 asset has not been unpacked on this machine")
def test_smollm2():
    """pad == eos == <|im_end|>, the template opens with a default system turn, and nothing adds a
    BOS to plain text.
    """
    tokenizer = templates.load_tokenizer(SMOLLM2[0])
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token_id == tokenizer.eos_token_id
    chat = templates.render(tokenizer, "Is it good?", "chat")
    text = tokenizer.decode(chat)
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_start|>user\nIs it good?<|im_end|>\n<|im_start|>assistant\n")
    plain = templates.render(tokenizer, "This film", "plain")
    assert tokenizer.decode(plain) == "This film"
    assert templates.end_tokens(tokenizer) == [tokenizer.eos_token_id], (
        "all that name an end token agree"
    )
    turns = [{"role": "user", "content": "Is it good?"}, {"role": "assistant", "content": "It is."}]
    whole = chat + templates.encode_response(tokenizer, "It is.", prompt=turns[:1], template="chat")
    assert whole == tokenizer.apply_chat_template(turns, return_dict=False)[:-1], (
        "but for a line break"
    )
    ids = templates.encode_response(tokenizer, " is good.", template="plain")
    assert ids == [*tokenizer(" is good.")["input_ids"], tokenizer.eos_token_id]
    batch = scoring.pack([row(prompt=chat, chosen=ids)], ["chosen"], tokenizer.pad_token_id)
    assert batch["labels"].tolist() == ids and batch["input_ids"].tolist() == [chat + ids]


# --- truncation


@pytest.mark.parametrize(
    "prompt, response, want_prompt, want_response",
    [
        ([0, 10, 11], [20, 1], [0, 10, 11], [20, 1]),  # fits: untouched
        ([0, 10, 11, 12, 13], [20, 1], [0, 11, 12, 13], [20, 1]),  # prompt keeps BOS and its end
        ([9, 10, 11, 12, 13], [20, 1], [10, 11, 12, 13], [20, 1]),  # no BOS: the last four
        (
            [0, 10],
            [20, 21, 22, 23, 24, 1],
            [0, 10],
            [20, 21, 22, 23, 1],
        ),  # cut response keeps its end token
        (
            [0, 10],
            [20, 21, 22, 23, 24, 25],
            [0, 10],
            [20, 21, 22, 23, 24],
        ),  # it had none: none is invented
        ([0, 10, 11, 12, 13], [20, 21, 22, 23, 1], [0, 11, 12, 13], [20, 21, 1]),  # both
    ],
)
def test_truncate_by_hand(prompt, response, want_prompt, want_response):
    """max_prompt 4, max_length 7: at most 4 prompt tokens, the response gets what is left of 7."""
    limits = {"max_prompt": 4, "max_length": 7, "bos_id": 0, "eos_id": 1}
    got = truncate(prompt, response, **limits)
    assert got == (want_prompt, want_response)
    assert truncate(*got, **limits) == got


def test_truncate_edges():
    assert truncate([0, 5, 6], [7, 8, 1], max_prompt=1, max_length=2, bos_id=0, eos_id=1) == (
        [0],
        [1],
    )
    assert truncate([4, 5, 6], [7, 8, 9], max_prompt=1, max_length=2, bos_id=0, eos_id=1) == (
        [6],
        [7],
    )
    assert truncate([0, 5, 6], [7, 8, 1], max_prompt=2, max_length=4) == (
        [5, 6],
        [7, 8],
    )  # no ids given
    ends = {"max_prompt": 1, "max_length": 3, "eos_id": [1, 9]}
    assert truncate([5], [7, 8, 9], **ends) == ([5], [7, 9]), "one of several end tokens"
    assert truncate([5], [7, 8, 6], **ends) == ([5], [7, 8])
    with pytest.raises(ValueError, match="max_prompt < max_length"):
        truncate([0], [1], max_prompt=4, max_length=4)


def test_prepare_drops_and_counts_rows_without_tokens():
    rows = [
        row("a", chosen=[7, 1], rejected=[8, 1]),
        row("b", chosen=[], rejected=[8, 1]),
        row("c", chosen=[7, 1], rejected=[]),
        row("d", prompt=[], chosen=[7, 1], rejected=[8, 1]),
    ]
    kept, dropped = prepare(rows, ["chosen", "rejected"], max_prompt=8, max_length=16)
    assert [r["id"] for r in kept] == ["a"] and dropped == 3
    kept, dropped = prepare(
        rows, ["chosen"], max_prompt=8, max_length=16
    )  # an unnamed response drops nothing
    assert (
        [r["id"] for r in kept] == ["a", "c"]
        and dropped == 2
        and list(kept[0]["responses"]) == ["chosen"]
    )


def test_prepare_cuts_all_responses_of_a_row_behind_the_same_prompt():
    rows = [
        {**row(prompt=[0, *range(10, 20)], chosen=range(30, 60), rejected=[8, 1]), "weight": 2.0}
    ]
    (got,), dropped = prepare(
        rows, ["chosen", "rejected"], max_prompt=4, max_length=9, bos_id=0, eos_id=1
    )
    assert got == {
        **row(prompt=[0, 17, 18, 19], chosen=range(30, 35), rejected=[8, 1]),
        "weight": 2.0,
    }
    assert dropped == 0 and len(rows[0]["prompt_ids"]) == 11  # the caller's row is untouched


def test_prepare_names_a_missing_response():
    with pytest.raises(
        ValueError, match=r"row 0 has no response 'source_chosen', only \['chosen', 'rejected'\]"
    ):
        prepare([row(chosen=[1], rejected=[1])], ["source_chosen"], max_prompt=4, max_length=8)


# --- batches


def test_pack_by_hand():
    """Rows of 4, 3, 3, 3 and 3 tokens: 16 // (2 × 4) is two lines, each row goes to the shorter.
    pad == eos == 1.
    """
    rows = [
        row("a", [0], chosen=[6], rejected=[9, 1]),
        row("b", [5, 4], chosen=[7], rejected=[]),
        row("c", [3], chosen=[1], rejected=[9]),
        row("d", [2], chosen=[8, 1], rejected=[]),
        row("e", [0], chosen=[], rejected=[8, 1]),
    ]
    batch = scoring.pack(rows, ["chosen", "rejected"], pad_id=1)
    assert batch["input_ids"].tolist() == [[0, 6, 9, 1, 2, 8, 1, 1, 1], [5, 4, 7, 3, 1, 9, 0, 8, 1]]
    assert batch["position_ids"].tolist() == [
        [0, 1, 1, 2, 0, 1, 2, 0, 0],
        [0, 1, 2, 0, 1, 1, 0, 1, 2],
    ]
    seen = [
        "1........ 11....... 1.1...... 1.11..... ....1.... ....11... ....111.. .......1. .......11",
        "1........ 11....... 111...... ...1..... ...11.... ...1.1... ......1.. ......11. ......111",
    ]
    want = [[[[x == "1" for x in position] for position in line.split()]] for line in seen]
    assert batch["attention_mask"].tolist() == want
    assert batch["labels"].tolist() == [
        6,
        7,
        1,
        8,
        1,
        9,
        1,
        9,
        8,
        1,
    ]  # all chosen, then all rejected
    assert batch["predictors"].tolist() == [0, 10, 12, 4, 5, 0, 2, 12, 15, 16]
    assert batch["tokens"].tolist() == [1, 1, 1, 2, 0, 2, 0, 1, 0, 2] and batch["ids"] == list(
        "abcde"
    )
    assert all(
        batch[k].dtype == torch.long
        for k in ("input_ids", "position_ids", "labels", "predictors", "tokens")
    )
    assert batch["attention_mask"].dtype == torch.bool


def test_pack_does_not_depend_on_the_pad_token_and_wastes_little():
    rows = []
    for i in range(19):
        rows.append(row(str(i), range(1, 2 + i), one=range(3), two=range(i + 1), three=[1]))
    names = ["one", "two", "three"]
    a, b = scoring.pack(rows, names, pad_id=1), scoring.pack(rows, names, pad_id=2)
    differ = {k for k in a if k != "ids" and not torch.equal(a[k], b[k])}
    assert differ == {"input_ids"}
    needed = sum(len(r["prompt_ids"]) + sum(map(len, r["responses"].values())) for r in rows)
    assert needed <= a["input_ids"].numel() < 1.1 * needed and len(a["input_ids"]) > 1
    assert a["attention_mask"].any(-1).all(), (
        "a position that sees nothing would be NaN, and its gradient too"
    )
    with pytest.raises(ValueError, match="pad_id is None"):
        scoring.pack(rows, names, None)
    with pytest.raises(ValueError, match="'e'.*no prompt"):
        scoring.pack([*rows, row("e", [], one=[1], two=[1], three=[1])], names, 1)


def test_order_is_a_permutation_that_only_seed_and_epoch_change():
    torch.manual_seed(1)
    a = epoch_order(50, seed=0, epoch=1)
    torch.manual_seed(2)  # the global generator plays no part
    assert epoch_order(50, seed=0, epoch=1) == a and sorted(a) == list(range(50))
    others = [epoch_order(50, seed=s, epoch=e) for s, e in [(0, 0), (1, 0), (1, 1), (0, 2)]]
    assert all(o != a for o in others) and others[0] != others[1]


# --- files


def test_rows_survive_the_disk(tmp_path):
    rows = [
        {**row("é-1", chosen=[7, 1], rejected=[8, 1]), "weight": 0.25},
        row("2", source_chosen=[3]),
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows(tmp_path / "rows.jsonl") == rows
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [row(chosen=[1])])
    with pytest.raises(ValueError, match="row 1: row x: chosen must be a list of token ids"):
        write_rows(path, [row("y", chosen=[2]), row("x", chosen=[1.5])])
    assert read_rows(path) == [row(chosen=[1])]
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_cut_off_file_is_refused_with_its_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [row("a", chosen=[7, 1]), row("b", chosen=[7, 1])])
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: not a whole JSON line"):
        read_rows(path)


@pytest.mark.parametrize(
    "broken, says",
    [
        ([1], '"id"'),
        ({"id": 3, "prompt_ids": [], "responses": {}}, '"id"'),
        ({"id": "a", "prompt_ids": [0]}, '"responses" must be an object'),
        ({"id": "a", "responses": {"chosen": [1]}}, "prompt_ids must be a list"),
        ({"id": "a", "prompt_ids": [0], "responses": {"chosen": "text"}}, "chosen must be a list"),
        ({"id": "a", "prompt_ids": [0], "responses": {"chosen": [True]}}, "chosen must be a list"),
        ({"id": "a", "prompt_ids": [-1], "responses": {}}, "prompt_ids must be a list"),
    ],
)
def test_lines_that_are_no_rows_are_refused(tmp_path, broken, says):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row(chosen=[1])) + "\n" + json.dumps(broken) + "\n")
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: .*{says}"):
        read_rows(path)
