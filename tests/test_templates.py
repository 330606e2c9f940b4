"""Rows, tokens and masks.

There is at most one BOS, masks cover exactly the response, and files are whole or refused.
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
from torch.nn.attention.flex_attention import create_mask
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from beyond_dpo import attention, scoring, templates
from beyond_dpo.jobs.generate import Engine
from beyond_dpo.machine import paths
from beyond_dpo.rows import epoch_order, prepare, read_rows, row_length, truncate, write_rows

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
    trainer = trainers.BpeTrainer(
        special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(TEXTS, trainer)
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=bos, eos_token="</s>", pad_token=pad
    )
    tokenizer.chat_template = template
    return tokenizer


BOS = 0
EOS = 1
USER = [{"role": "user", "content": "a good film"}]
ANSWERED = [*USER, {"role": "assistant", "content": "y"}]


def row(id="0", prompt=(0, 5, 6), **responses):
    return {
        "id": id,
        "prompt_ids": list(prompt),
        "responses": {name: list(ids) for name, ids in responses.items()},
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
    """A chat template with BOS and a tokenizer that adds its own is the classic double BOS."""
    ids = templates.render(build(adds_bos=adds_bos), prompt, "chat")
    assert ids[0] == BOS
    assert ids.count(BOS) == 1


def test_a_template_without_bos_is_left_alone():
    tokenizer = build(adds_bos=True, template=TEMPLATE.replace("{{ bos_token }}", ""))
    assert templates.render(tokenizer, USER, "chat").count(BOS) == 0


def test_a_tokenizer_without_bos_adds_none():
    tokenizer = build(bos=None)
    ids = templates.render(tokenizer, "a good film", "plain")
    assert ids == tokenizer("a good film")["input_ids"]
    assert BOS not in ids


def test_chat_text_is_the_template_with_the_generation_prompt():
    tokenizer = build()
    ids = templates.render(tokenizer, USER, "chat")
    assert tokenizer.decode(ids) == "<s>user: a good film\nassistant:"


def test_a_string_is_one_user_turn():
    tokenizer = build()
    ids = templates.render(tokenizer, "a good film", "chat")
    assert ids == templates.render(tokenizer, USER, "chat")


def test_chat_text_of_several_turns():
    tokenizer = build()
    turns = [{"role": "system", "content": "be kind"}, *USER]
    text = tokenizer.decode(templates.render(tokenizer, turns, "chat"))
    assert text == "<s>system: be kind\nuser: a good film\nassistant:"


def test_end_markup_in_a_response_does_not_end_it():
    tokenizer = build(adds_bos=True, template=None)
    ids = templates.encode_response(tokenizer, "good</s>film")
    assert ids.count(EOS) == 1
    assert ids[-1] == EOS
    assert tokenizer.decode(ids[:-1]) == "good</s>film"


def test_bos_markup_in_a_prompt_is_no_second_bos():
    tokenizer = build(adds_bos=True, template=None)
    assert templates.render(tokenizer, "<s>a film", "plain").count(BOS) == 1


@pytest.mark.parametrize("text", [" good", ""])
def test_response_ends_with_the_end_token_once(text):
    tokenizer = build(adds_bos=True, template=None)
    cut = templates.encode_response(tokenizer, text, end=False)
    assert tokenizer.decode(cut) == text
    assert templates.encode_response(tokenizer, text) == [*cut, EOS]


@pytest.mark.parametrize(
    "chat_template, prompt, template, error, message",
    [
        (TEMPLATE, "x", "zephyr", ValueError, "zephyr"),
        (TEMPLATE, USER, "plain", TypeError, "takes a string, got list"),
        (TEMPLATE, [], "chat", TypeError, "non-empty list"),
        (None, "x", "chat", ValueError, "no chat template"),
        (TEMPLATE, ANSWERED, "chat", ValueError, "assistant"),
        ("{{ bos_token }}" + TEMPLATE, "x", "chat", ValueError, "two BOS"),
    ],
)
def test_prompt_faults(chat_template, prompt, template, error, message):
    tokenizer = build(template=chat_template)
    with pytest.raises(error, match=message):
        templates.render(tokenizer, prompt, template)


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
    """Return a tokenizer whose chats end turns with a token that is not its end token."""
    tokenizer = build(template=template)
    start = AddedToken("<|im_start|>", special=True)
    end = AddedToken("<|im_end|>", special=True)
    tokenizer.add_tokens([start, end])
    return tokenizer


def sentencepiece(front: str = "", template: str | None = ZEPHYR):
    """Train a BPE on characters with ▁ for a blank, as Llama-2's and Mistral's.

    Their texts begin with one. front: "first" for one at the beginning only, else at the beginning
    of every text between special tokens.
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
    trainer = trainers.BpeTrainer(
        special_tokens=special,
        initial_alphabet=letters,
        max_token_length=6,
        show_progress=False,
    )
    core.train_from_iterator(TEXTS, trainer)
    if not front:
        core.pre_tokenizer = None
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        chat_template=template,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


def sentencepiece_first(template):
    return sentencepiece("first", template)


EVERY_CHAT = (
    pytest.mark.parametrize("kind", [build, turned, sentencepiece, sentencepiece_first]),
    pytest.mark.parametrize("template", TEMPLATES),
    pytest.mark.parametrize("answer", ["the plot is thin", "I liked it. ", ""]),
    pytest.mark.parametrize("prompt", [{}, {"prompt": USER, "template": "chat"}]),
)


def for_every_chat(test):
    """Run a test for every kind of tokenizer, template, answer, with and without its prompt."""
    for parameters in EVERY_CHAT:
        test = parameters(test)
    return test


@for_every_chat
def test_prompt_and_response_are_the_tokens_of_the_whole_chat(kind, template, answer, prompt):
    """With blanks around an answer, and no mark of a text's beginning within one."""
    tokenizer = kind(template=TEMPLATES[template])
    prompt_ids = templates.render(tokenizer, USER, "chat")
    ids = prompt_ids + templates.encode_response(tokenizer, answer, **prompt)
    chat = [*USER, {"role": "assistant", "content": answer}]
    whole = tokenizer.apply_chat_template(chat, return_dict=False)
    if ids != whole[: len(ids)]:
        # This template ends no turn, so the tokenizer's end token does.
        begun = tokenizer.apply_chat_template(chat, return_dict=False, continue_final_message=True)
        assert ids == [*begun, EOS]
        assert EOS not in whole[len(prompt_ids) :]


@for_every_chat
def test_only_the_last_token_of_a_response_ends_it(kind, template, answer, prompt):
    tokenizer = kind(template=TEMPLATES[template])
    *ids, last = templates.encode_response(tokenizer, answer, **prompt)
    ends = templates.end_tokens(tokenizer)
    assert last in ends
    assert not set(ids) & set(ends)


@for_every_chat
def test_a_response_that_was_cut_is_the_beginning_of_the_whole(kind, template, answer, prompt):
    tokenizer = kind(template=TEMPLATES[template])
    ids = templates.encode_response(tokenizer, answer, **prompt)
    cut = templates.encode_response(tokenizer, answer, end=False, **prompt)
    assert cut == ids[: len(cut)]
    assert answer.strip() in tokenizer.decode(cut)


def test_a_turn_ends_as_its_template_ends_it():
    tokenizer = turned()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert templates.encode_response(tokenizer, "a film")[-1] == end != EOS
    assert templates.encode_response(tokenizer, "a film", template="plain")[-1] == EOS
    assert templates.end_tokens(tokenizer) == [EOS, end], "sampling stops at both"


@pytest.mark.parametrize("front", ["", "first"])
def test_a_plain_response_begins_as_it_does_within_the_text(front):
    """Alone it would get the mark of a text's beginning, a second blank."""
    tokenizer = sentencepiece(front, None)
    whole = "the plot is thin, the actors are good"
    wanted = tokenizer(whole)["input_ids"]
    for cut in (8, 11, 16, 17):
        prompt = whole[:cut]
        response = whole[cut:]
        ids = templates.encode_response(
            tokenizer, response, end=False, prompt=prompt, template="plain"
        )
        assert templates.render(tokenizer, prompt, "plain") + ids == wanted
        assert templates.encode_response(tokenizer, response, end=False) == ids, "after any text"


JOINED = "the prompt's tokens do not begin those of prompt and response"


def test_a_response_that_shares_a_token_with_its_prompt_is_refused():
    tokenizer = build()
    for prompt, response in [("a go", "od film"), ("a good ", "film")]:
        with pytest.raises(templates.RowError, match=JOINED):
            templates.encode_response(tokenizer, response, prompt=prompt, template="plain")


@pytest.mark.parametrize("header", ["assistant: ", "model:"])
def test_an_answer_that_does_not_follow_its_prompts_tokens_is_refused(header):
    """The blank joins the answer's first word; the other header is not that of an answer."""
    tokenizer = build(template=TEMPLATE.replace("assistant:{%", header + "{%"))
    with pytest.raises(templates.RowError, match=JOINED):
        templates.encode_response(tokenizer, "good", prompt=USER, template="chat")


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


@pytest.mark.parametrize(
    "kind, template", [(turned, CHATML), (turned, LLAMA2), (sentencepiece, ZEPHYR)]
)
def test_markup_in_an_answer_of_a_chat_stays_text(kind, template):
    tokenizer = kind(template=template)
    prompt_ids = templates.render(tokenizer, USER, "chat")
    plain = templates.encode_response(tokenizer, "a good film")
    marked = templates.encode_response(tokenizer, "a</s> good film")
    assert marked[-1] == plain[-1]
    assert marked.count(EOS) == plain.count(EOS) <= 1
    text = tokenizer.decode(prompt_ids + marked[:-1])
    assert text.rstrip().endswith("a</s> good film")
    begun = templates.render(tokenizer, USER, "chat", begun="a</s> good")
    assert EOS not in begun[len(prompt_ids) :]


def test_an_answer_that_has_begun_goes_on_right_there():
    tokenizer = turned()
    ids = templates.render(tokenizer, USER, "chat", begun="the plot is")
    assert tokenizer.decode(ids).endswith("<|im_start|>assistant\nthe plot is")
    prompt_ids = templates.render(tokenizer, USER, "chat")
    response_ids = templates.encode_response(tokenizer, "the plot is", end=False)
    assert ids == prompt_ids + response_ids


def test_a_plain_text_that_has_begun_goes_on_right_there():
    tokenizer = turned()
    ids = templates.render(tokenizer, "the plot", "plain", begun=" is")
    assert ids == templates.render(tokenizer, "the plot is", "plain")


def test_end_tokens_are_all_that_tokenizer_template_and_configs_name(tmp_path):
    """A line break that a config names as an end is none where a text holds it."""
    tokenizer = turned()
    line_break = tokenizer("\n")["input_ids"][0]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 7, "text_config": {"eos_token_id": 8}}')
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, line_break]}))
    loaded = templates.load_tokenizer(tmp_path)
    ends = [EOS, 9, line_break, 7, 8, end]
    assert templates.end_tokens(loaded) == ends
    assert templates.model_end_tokens(tmp_path) == ends
    ids = templates.encode_response(loaded, "a film\nI saw")
    assert loaded.decode(ids) == "a film\nI saw<|im_end|>"
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    without_tokenizer = templates.model_end_tokens(tmp_path)
    assert without_tokenizer == [9, line_break, 7, 8]


def test_sampling_stops_where_training_closes_a_response(tmp_path, tiny):
    """A model ends at once, with the token that its tokenizer names and its config does not."""
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.pad_token_id
    config = json.loads((folder / "config.json").read_text())
    assert config["eos_token_id"] != end
    tokenizer.eos_token = tokenizer.pad_token
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    for tensor in weights.values():
        tensor.zero_()
    weights["model.norm.weight"] += 1
    weights["model.embed_tokens.weight"][:, 0] = 5
    weights["model.embed_tokens.weight"][end, 0] = 50
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    prompts = tmp_path / "prompts.json"
    prompts.write_text('[{"id": "a", "prompt_ids": [10, 11, 12]}]')
    out = tmp_path / "responses.jsonl"
    decoding = {"backend": "transformers", "max_tokens": 8, "max_model_len": 64, "dtype": "float32"}
    Engine(str(folder), decoding).generate(str(prompts), str(out), 1, 0)
    assert json.loads(out.read_text())["response_ids"] == [end]
    response_ids = templates.encode_response(templates.load_tokenizer(folder), "a film")
    assert response_ids[-1] == end


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
        "{% for m in messages %}"
        "{{ m.role }}{% if m.name is defined %} ({{ m.name }}){% endif %}: {{ m.content }}\n"
        "{% endfor %}"
    )
    turns = [
        {"role": "user", "content": "a", "name": None},
        {"role": "user", "content": "b", "name": "bob"},
    ]
    tokenizer = build(template=named)
    ids = templates.render(tokenizer, turns, "chat")
    assert tokenizer.decode(ids) == "user: a\nuser (bob): b\n"
    assert turns[0]["name"] is None, "the caller's turns are untouched"


def test_fields_within_fields_that_are_none_do_not_reach_a_template():
    called = (
        "{% for m in messages %}"
        "{% for c in m.calls %}{{ c | tojson }}{% endfor %}{{ m.content }}"
        "{% endfor %}"
    )
    turns = [
        {"role": "user", "content": "a", "calls": [{"f": "x", "y": None}]},
        {"role": "user", "content": "b", "calls": None},
    ]
    tokenizer = build(template=called)
    ids = templates.render(tokenizer, turns, "chat")
    assert tokenizer.decode(ids) == '{"f": "x"}ab'


def test_a_template_writes_the_same_date_on_any_day(monkeypatch):
    class NewYear(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 1, 1)

    monkeypatch.setattr(chat_template_utils, "datetime", NewYear)
    today = (
        "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }} {% endif %}"
        "{{ messages[0].content }}"
    )
    tokenizer = build(template=today)
    ids = templates.render(tokenizer, "a film", "chat")
    assert tokenizer.decode(ids) == "26 Jul 2024 a film"


def test_turns_that_a_template_refuses_are_named():
    refuse = "{{ raise_exception('System role not supported') }}"
    strict = "{% if messages[0].role == 'system' %}" + refuse + "{% endif %}" + TEMPLATE
    turns = [{"role": "system", "content": "be kind"}, *USER]
    message = r"refuses it \(System role not supported\): .*'be kind'"
    with pytest.raises(templates.RowError, match=message) as refused:
        templates.render(build(template=strict), turns, "chat")
    assert refused.value.reason == "the chat template refuses it (System role not supported)"


def test_turns_on_which_a_template_fails_are_refused():
    tokenizer = build(template="{{ 'a' + messages[0].content }}")
    turns = [{"role": "user", "content": 3}]
    with pytest.raises(templates.RowError, match="can only concatenate"):
        templates.render(tokenizer, turns, "chat")


def test_loaded_tokenizer_pads_with_the_end_token_if_it_has_no_pad(tmp_path):
    tokenizer = build(adds_bos=True)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    loaded = templates.load_tokenizer(tmp_path)
    assert loaded.pad_token_id == loaded.eos_token_id == EOS
    assert templates.load_tokenizer(tmp_path) is loaded
    ids = templates.render(loaded, "a film", "plain")
    assert ids == templates.render(tokenizer, "a film", "plain")


SMOLLM2 = sorted(p for p in paths.CACHE.glob("smollm2-*") if p.is_dir())


@pytest.fixture
def smollm2():
    if not SMOLLM2:
        pytest.skip("the SmolLM2 asset has not been unpacked on this machine")
    return templates.load_tokenizer(SMOLLM2[0])


def test_smollm2_has_one_end_token_which_is_its_pad_token(smollm2):
    assert smollm2.eos_token == "<|im_end|>"
    assert smollm2.pad_token_id == smollm2.eos_token_id
    assert templates.end_tokens(smollm2) == [smollm2.eos_token_id]


def test_smollm2_opens_a_chat_with_a_default_system_turn(smollm2):
    text = smollm2.decode(templates.render(smollm2, "Is it good?", "chat"))
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_start|>user\nIs it good?<|im_end|>\n<|im_start|>assistant\n")


def test_smollm2_adds_no_bos_to_plain_text(smollm2):
    ids = templates.render(smollm2, "This film", "plain")
    assert smollm2.decode(ids) == "This film"


def test_smollm2_prompt_and_response_are_the_whole_chat(smollm2):
    question = [{"role": "user", "content": "Is it good?"}]
    turns = [*question, {"role": "assistant", "content": "It is."}]
    prompt_ids = templates.render(smollm2, question, "chat")
    ids = templates.encode_response(smollm2, "It is.", prompt=question, template="chat")
    *whole, line_break = smollm2.apply_chat_template(turns, return_dict=False)
    assert prompt_ids + ids == whole
    assert smollm2.decode(line_break) == "\n"


def test_smollm2_end_token_of_a_response_is_no_padding(smollm2):
    prompt_ids = templates.render(smollm2, "Is it good?", "chat")
    ids = templates.encode_response(smollm2, " is good.", template="plain")
    assert ids == [*smollm2(" is good.")["input_ids"], smollm2.eos_token_id]
    rows = [row(prompt=prompt_ids, chosen=ids)]
    batch = scoring.pack(rows, ["chosen"], smollm2.pad_token_id)
    assert batch["labels"].tolist() == ids
    assert batch["input_ids"].tolist() == [prompt_ids + ids]


# --- truncation


@pytest.mark.parametrize(
    "prompt, response, wanted_prompt, wanted_response",
    [
        pytest.param([0, 10, 11], [20, 1], [0, 10, 11], [20, 1], id="fits"),
        pytest.param(
            [0, 10, 11, 12, 13], [20, 1], [0, 11, 12, 13], [20, 1], id="prompt keeps BOS and end"
        ),
        pytest.param(
            [9, 10, 11, 12, 13], [20, 1], [10, 11, 12, 13], [20, 1], id="prompt without BOS"
        ),
        pytest.param(
            [0, 10],
            [20, 21, 22, 23, 24, 1],
            [0, 10],
            [20, 21, 22, 23, 1],
            id="response keeps its end token",
        ),
        pytest.param(
            [0, 10],
            [20, 21, 22, 23, 24, 25],
            [0, 10],
            [20, 21, 22, 23, 24],
            id="no end token is invented",
        ),
        pytest.param(
            [0, 10, 11, 12, 13], [20, 21, 22, 23, 1], [0, 11, 12, 13], [20, 21, 1], id="both"
        ),
    ],
)
def test_truncate_by_hand(prompt, response, wanted_prompt, wanted_response):
    """max_prompt 4, max_length 7: at most 4 prompt tokens, the response gets what is left of 7."""
    limits = {"max_prompt": 4, "max_length": 7, "bos_id": 0, "eos_id": 1}
    prompt, response = truncate(prompt, response, **limits)
    assert prompt == wanted_prompt
    assert response == wanted_response
    assert truncate(prompt, response, **limits) == (prompt, response)


@pytest.mark.parametrize(
    "prompt, response, wanted", [([0, 5, 6], [7, 8, 1], ([0], [1])), ([4, 5], [7, 8], ([5], [7]))]
)
def test_truncate_to_one_token_each(prompt, response, wanted):
    limits = {"max_prompt": 1, "max_length": 2, "bos_id": 0, "eos_id": 1}
    assert truncate(prompt, response, **limits) == wanted


def test_truncate_without_ids_to_keep():
    assert truncate([0, 5, 6], [7, 8, 1], max_prompt=2, max_length=4) == ([5, 6], [7, 8])


@pytest.mark.parametrize("response, wanted", [([7, 8, 9], [7, 9]), ([7, 8, 6], [7, 8])])
def test_truncate_keeps_one_of_several_end_tokens(response, wanted):
    cut = truncate([5], response, max_prompt=1, max_length=3, eos_id=[1, 9])
    assert cut == ([5], wanted)


def test_truncate_refuses_limits_without_room_for_a_response():
    with pytest.raises(ValueError, match="max_prompt < max_length"):
        truncate([0], [1], max_prompt=4, max_length=4)


ROWS_WITHOUT_TOKENS = [
    row("a", chosen=[7, 1], rejected=[8, 1]),
    row("b", chosen=[], rejected=[8, 1]),
    row("c", chosen=[7, 1], rejected=[]),
    row("d", prompt=[], chosen=[7, 1], rejected=[8, 1]),
]


@pytest.mark.parametrize(
    "names, wanted_ids, wanted_dropped",
    [(["chosen", "rejected"], ["a"], 3), (["chosen"], ["a", "c"], 2)],
)
def test_prepare_drops_and_counts_rows_without_tokens(names, wanted_ids, wanted_dropped):
    """A response that is not named drops nothing, and is left out."""
    rows, dropped = prepare(ROWS_WITHOUT_TOKENS, names, max_prompt=8, max_length=16)
    assert [kept["id"] for kept in rows] == wanted_ids
    assert dropped == wanted_dropped
    assert list(rows[0]["responses"]) == names


def test_prepare_cuts_all_responses_of_a_row_behind_the_same_prompt():
    original = row(prompt=[0, *range(10, 20)], chosen=range(30, 60), rejected=[8, 1])
    original["weight"] = 2.0
    limits = {"max_prompt": 4, "max_length": 9, "bos_id": 0, "eos_id": 1}
    rows, dropped = prepare([original], ["chosen", "rejected"], **limits)
    wanted = row(prompt=[0, 17, 18, 19], chosen=range(30, 35), rejected=[8, 1])
    wanted["weight"] = 2.0
    assert rows == [wanted]
    assert dropped == 0
    assert len(original["prompt_ids"]) == 11, "the caller's row is untouched"


def test_prepare_names_a_missing_response():
    message = r"row 0 has no response 'source_chosen', only \['chosen', 'rejected'\]"
    rows = [row(chosen=[1], rejected=[1])]
    with pytest.raises(ValueError, match=message):
        prepare(rows, ["source_chosen"], max_prompt=4, max_length=8)


# --- batches


@pytest.fixture
def packed():
    """Return a batch of rows of 4, 3, 3, 3 and 3 tokens, with pad == eos == 1.

    16 // (2 × 4) is two lines, and each row goes to the shorter one.
    """
    rows = [
        row("a", [0], chosen=[6], rejected=[9, 1]),
        row("b", [5, 4], chosen=[7], rejected=[]),
        row("c", [3], chosen=[1], rejected=[9]),
        row("d", [2], chosen=[8, 1], rejected=[]),
        row("e", [0], chosen=[], rejected=[8, 1]),
    ]
    return scoring.pack(rows, ["chosen", "rejected"], pad_id=1)


def test_packed_tokens_by_hand(packed):
    assert packed["ids"] == ["a", "b", "c", "d", "e"]
    assert packed["input_ids"].tolist() == [
        [0, 6, 9, 1, 2, 8, 1, 1, 1],
        [5, 4, 7, 3, 1, 9, 0, 8, 1],
    ]
    assert packed["position_ids"].tolist() == [
        [0, 1, 1, 2, 0, 1, 2, 0, 0],
        [0, 1, 2, 0, 1, 1, 0, 1, 2],
    ]


# What each position of the two lines sees: a row of the mask for each.
SEEN = [
    """
    1........
    11.......
    1.1......
    1.11.....
    ....1....
    ....11...
    ....111..
    .......1.
    .......11
    """,
    """
    1........
    11.......
    111......
    ...1.....
    ...11....
    ...1.1...
    ......1..
    ......11.
    ......111
    """,
]


@pytest.mark.parametrize("line", [0, 1])
def test_packed_mask_by_hand(packed, line):
    wanted = []
    for marks in SEEN[line].split():
        wanted.append([mark == "1" for mark in marks])
    seen = attention.visible(packed["row_of_token"], packed["part_of_token"])
    assert seen.dtype == torch.bool
    assert seen[line, 0].tolist() == wanted


@pytest.mark.parametrize("multiple", [1, 4])
def test_blocks_see_what_the_mask_says(uneven_rows, multiple):
    """What flex-attention is told is what sdpa is told."""
    batch = scoring.pack(uneven_rows, NAMES, pad_id=1, multiple=multiple)
    wanted = attention.visible(batch["row_of_token"], batch["part_of_token"])
    blocks = attention.visible_blocks(batch["row_of_token"], batch["part_of_token"])
    lines, width = batch["input_ids"].shape
    assert blocks.shape == (lines, 1, width, width)
    found = create_mask(blocks.mask_mod, lines, 1, width, width, device="cpu")
    assert torch.equal(found, wanted)


def test_blocks_that_see_nothing_are_skipped():
    """Two rows of 3 × 128 tokens in a line of six blocks.

    A prompt sees itself, a response it and itself: five blocks a row, none of them the other's.
    """
    rows = []
    for name in "ab":
        rows.append(row(name, range(128), chosen=range(128), rejected=range(128)))
    batch = scoring.pack(rows, ["chosen", "rejected"], pad_id=1, multiple=128)
    assert batch["input_ids"].shape == (1, 768)
    blocks = attention.visible_blocks(batch["row_of_token"], batch["part_of_token"])
    of_a_row = [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    wanted = torch.block_diag(torch.tensor(of_a_row), torch.tensor(of_a_row))
    assert torch.equal(blocks.to_dense()[0, 0].long(), wanted)


@pytest.mark.parametrize("multiple", [1, 5, 128])
def test_lines_are_filled_up_to_a_multiple(uneven_rows, multiple):
    narrow = scoring.pack(uneven_rows, NAMES, pad_id=1)
    wide = scoring.pack(uneven_rows, NAMES, pad_id=1, multiple=multiple)
    lines, width = wide["input_ids"].shape
    assert width % multiple == 0
    assert 0 <= width - narrow["input_ids"].shape[1] < multiple
    assert len(narrow["input_ids"]) == lines
    for name in ("labels", "tokens"):
        assert torch.equal(narrow[name], wide[name])
    # what predicts a token is the same token, wherever it stands
    for name in ("input_ids", "position_ids"):
        narrow_tokens = narrow[name].flatten()[narrow["predictors"]]
        assert torch.equal(narrow_tokens, wide[name].flatten()[wide["predictors"]])


def test_packed_responses_by_hand(packed):
    """All chosen responses come first, then all rejected ones."""
    assert packed["tokens"].tolist() == [1, 1, 1, 2, 0, 2, 0, 1, 0, 2]
    assert packed["labels"].tolist() == [6, 7, 1, 8, 1, 9, 1, 9, 8, 1]
    assert packed["predictors"].tolist() == [0, 10, 12, 4, 5, 0, 2, 12, 15, 16]


def test_packed_dtypes(packed):
    of_positions = ("input_ids", "position_ids", "row_of_token", "part_of_token")
    for name in (*of_positions, "labels", "predictors", "tokens"):
        assert packed[name].dtype == torch.long


NAMES = ["one", "two", "three"]


@pytest.fixture
def uneven_rows():
    """Return 19 rows of different lengths with three responses each."""
    rows = []
    for i in range(19):
        prompt = range(1, 2 + i)
        rows.append(row(str(i), prompt, one=range(3), two=range(i + 1), three=[1]))
    return rows


def test_pack_does_not_depend_on_the_pad_token(uneven_rows):
    first = scoring.pack(uneven_rows, NAMES, pad_id=1)
    second = scoring.pack(uneven_rows, NAMES, pad_id=2)
    assert not torch.equal(first.pop("input_ids"), second.pop("input_ids"))
    assert first.pop("ids") == second.pop("ids")
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_pack_wastes_little(uneven_rows):
    batch = scoring.pack(uneven_rows, NAMES, pad_id=1)
    needed = sum(row_length(uneven, NAMES) for uneven in uneven_rows)
    assert len(batch["input_ids"]) > 1
    assert needed <= batch["input_ids"].numel() < 1.1 * needed


def test_every_packed_position_sees_something(uneven_rows):
    """One that sees nothing would be NaN, and its gradient too."""
    batch = scoring.pack(uneven_rows, NAMES, pad_id=1)
    seen = attention.visible(batch["row_of_token"], batch["part_of_token"])
    assert seen.any(-1).all()


def test_pack_refuses_a_missing_pad_token(uneven_rows):
    with pytest.raises(ValueError, match="pad_id is None"):
        scoring.pack(uneven_rows, NAMES, None)


def test_pack_refuses_a_row_without_prompt(uneven_rows):
    bare = row("e", [], one=[1], two=[1], three=[1])
    with pytest.raises(ValueError, match="'e'.*no prompt"):
        scoring.pack([*uneven_rows, bare], NAMES, 1)


def test_order_is_a_permutation_that_the_global_generator_does_not_change():
    torch.manual_seed(1)
    order = epoch_order(50, seed=0, epoch=1)
    torch.manual_seed(2)
    assert epoch_order(50, seed=0, epoch=1) == order
    assert sorted(order) == list(range(50))


def test_seed_and_epoch_change_the_order():
    orders = set()
    for seed, epoch in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]:
        order = epoch_order(50, seed=seed, epoch=epoch)
        orders.add(tuple(order))
    assert len(orders) == 5


# --- files


def test_rows_survive_the_disk(tmp_path):
    weighted = row("é-1", chosen=[7, 1], rejected=[8, 1])
    weighted["weight"] = 0.25
    rows = [weighted, row("2", source_chosen=[3])]
    path = tmp_path / "rows.jsonl"
    write_rows(path, rows)
    assert read_rows(path) == rows
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [row(chosen=[1])])
    with pytest.raises(ValueError, match="row 1: row x: chosen must be a list of token ids"):
        write_rows(path, [row("y", chosen=[2]), row("x", chosen=[1.5])])
    assert read_rows(path) == [row(chosen=[1])]
    assert list(tmp_path.iterdir()) == [path]


def test_a_cut_off_file_is_refused_with_its_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [row("a", chosen=[7, 1]), row("b", chosen=[7, 1])])
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: not a whole JSON line"):
        read_rows(path)


@pytest.mark.parametrize(
    "value, message",
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
def test_lines_that_are_no_rows_are_refused(tmp_path, value, message):
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(row(chosen=[1])), json.dumps(value)]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: .*{message}"):
        read_rows(path)


def test_rows_are_cut_by_the_tokens_of_a_models_own_tokenizer(tiny):
    """The model's BOS stays in front of a cut prompt, its end token closes a cut response."""
    row = {"id": "long", "prompt_ids": [0, 5, 6, 7, 8], "responses": {"chosen": [9, 10, 11, 12, 1]}}
    tokenizer = templates.load_tokenizer(tiny)
    limits = {"max_prompt": 3, "max_length": 6}
    (cut,), dropped = templates.cut_rows(tokenizer, [row], ["chosen"], limits)
    assert cut["prompt_ids"] == [0, 7, 8]
    assert cut["responses"]["chosen"] == [9, 10, 1]
    assert dropped == 0
