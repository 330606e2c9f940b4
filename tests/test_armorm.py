"""ArmoRM on a tiny random checkpoint with the published tensor names.

It is compared with its equations, written out for each text.
"""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from beyond_dpo import armorm
from beyond_dpo.pipeline import assets
from beyond_dpo.rewards import Classifier

OBJECTIVES = 5
HIDDEN = 24
LAYERS = 4  # of the gate
INDEX = "model.safetensors.index.json"
END_OF_TURN = "<|eot_id|>"
ANSWER_HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"
TEMPLATE = (  # Llama-3's, in short
    "{{ bos_token }}"
    "{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)


def turns(*texts):
    """Return the turns of a chat that the user begins."""
    chat = []
    for i, text in enumerate(texts):
        role = "assistant" if i % 2 else "user"
        chat.append({"role": role, "content": text})
    return chat


CHATS = [
    turns("Is it good?", "It is."),
    turns("Is it good?", "It is a long and dreary film that nobody needs, and yet I liked it."),
    turns("Hi", "Hello", "And the plot?", "There is none."),
    turns("Hi", "Hello", "And the plot?", "Thin, but the actors are good.", "The end?", "Sad."),
]


def random_tensors(llama_config):
    """Return the tensors of a random Llama and of random heads."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = transformers.LlamaModel(llama_config)
        llama = {}
        for name, parameter in model.named_parameters():
            gain = 3 if parameter.ndim == 2 else 1
            llama[f"model.{name}"] = gain * parameter.data
        sizes = [llama_config.hidden_size, HIDDEN, HIDDEN, HIDDEN, OBJECTIVES]
        heads = {
            "regression_layer.weight": torch.randn(OBJECTIVES, sizes[0]),
            "reward_transform_matrix": torch.randn(OBJECTIVES, OBJECTIVES),
            "gating.logit_scale": torch.tensor([1.7]),
        }
        for layer in range(LAYERS):
            inputs = sizes[layer]
            outputs = sizes[layer + 1]
            weight = torch.randn(outputs, inputs)
            heads[f"gating.layers.{layer}.weight"] = 1.5 * weight / inputs**0.5
            heads[f"gating.layers.{layer}.bias"] = torch.randn(outputs)
    return llama, heads


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Write the checkpoint in two shards, and code of its own that must never run."""
    folder = tmp_path_factory.mktemp("armorm")
    source = assets.model_dir("tiny")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    special = ["<|start_header_id|>", "<|end_header_id|>", END_OF_TURN]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    architecture = "LlamaForRewardModelWithGating"
    settings = {
        "architectures": [architecture],
        "num_objectives": OBJECTIVES,
        "gating_temperature": 3,
        "auto_map": {"AutoModelForSequenceClassification": f"modeling_custom.{architecture}"},
    }
    llama_config = transformers.LlamaConfig.from_pretrained(
        source, vocab_size=len(tokenizer), **settings
    )
    llama, heads = random_tensors(llama_config)
    write(folder, llama, heads)
    llama_config.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(saved | settings))
    code = "raise SystemExit('code of the repository has run')\n"
    (folder / "modeling_custom.py").write_text(code)
    return folder


def write(folder, *shards):
    index = {}
    for number, tensors in enumerate(shards, start=1):
        file = f"model-0000{number}-of-0000{len(shards)}.safetensors"
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    text = json.dumps({"metadata": {"total_size": 0}, "weight_map": index})
    (folder / INDEX).write_text(text)


@pytest.fixture
def copy(checkpoint, tmp_path):
    """Return a copy of the checkpoint."""
    return shutil.copytree(checkpoint, tmp_path / "copy")


def read(folder):
    first, second = sorted(folder.glob("*.safetensors"))
    return load_file(first), load_file(second)


def prompt_and_whole(tokenizer, chat):
    """Return the token ids of the last prompt, up to its end of turn, and of the whole chat."""
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    last_header = text.rindex(END_OF_TURN + ANSWER_HEADER)
    prompt = text[: last_header + len(END_OF_TURN)]
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids[: len(prompt_ids)] == prompt_ids
    assert tokenizer.decode(prompt_ids[-1:]) == END_OF_TURN
    assert ids.count(0) == 1, "one BOS"
    return prompt_ids, ids


def in_float64(tensors):
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}


@torch.no_grad()
def by_equations(folder, chat, temperature=3):
    """Return a chat's score by the paper's equations, and how far float32 may be from it.

    No batch, no padding, no code of ours. The score is a sum of products whose signs differ, so
    what float32 may be off does not depend on the score but on the sum of their sizes. Each product
    carries the errors of its factors: of a hidden state, after two layers, up to 8 rounding errors
    of 2^-24 were seen, in three instruction sets.
    """
    llama, heads = map(in_float64, read(folder))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompt_ids, ids = prompt_and_whole(tokenizer, chat)
    model = transformers.LlamaModel.from_pretrained(folder).double().eval()
    embeddings = model.embed_tokens.weight.numpy()
    assert np.array_equal(embeddings, llama["model.embed_tokens.weight"])
    hidden = model(torch.tensor([ids])).last_hidden_state[0].numpy()
    gate = hidden[len(prompt_ids) - 1]
    for layer in range(LAYERS):
        if layer > 0:
            gate = np.maximum(gate, 0)
        weight = heads[f"gating.layers.{layer}.weight"]
        gate = weight @ gate + heads[f"gating.layers.{layer}.bias"]
    weights = np.exp((gate - np.max(gate)) / temperature)
    assert weights.min() > 0.01 * weights.max(), "a gate for one objective alone shows little"
    weights *= heads["gating.logit_scale"][0] / weights.sum()
    regression = heads["regression_layer.weight"]
    transform = heads["reward_transform_matrix"]
    rewards = regression @ hidden[-1]
    score = 0.0
    for i in range(OBJECTIVES):
        for j in range(OBJECTIVES):
            score += rewards[i] * transform[i, j] * weights[j]
    sizes = (np.abs(regression) @ np.abs(hidden[-1])) @ np.abs(transform) @ weights
    return score, 8 * 2**-24 * sizes


def check_scores(scores, folder, chats, temperature=3):
    """Check scores against the equations; return what these say."""
    exact_scores = []
    for score, chat in zip(scores, chats, strict=True):
        exact, error = by_equations(folder, chat, temperature)
        assert error < 2e-4
        assert score == pytest.approx(exact, abs=error)
        exact_scores.append(exact)
    return exact_scores


@pytest.mark.parametrize("budget", [1, 60, 8192])
@pytest.mark.parametrize("chats", [CHATS, CHATS[::-1]], ids=["forwards", "backwards"])
def test_scores_are_those_of_the_equations_alone_and_in_batches(checkpoint, budget, chats):
    """trust_remote_code is not needed."""
    reward = Classifier(checkpoint, token_budget=budget)
    exact_scores = check_scores(reward.score(chats), checkpoint, chats)
    assert np.ptp(exact_scores) > 0.5, "too alike to tell"


@pytest.mark.parametrize("chat", CHATS)
def test_the_gate_reads_the_end_of_the_last_prompt(checkpoint, chat):
    """A prompt's own render ends there, whatever is answered and however many turns came before."""
    reward = Classifier(checkpoint)
    prompt_ids = reward.tokenizer.apply_chat_template(chat[:-1], return_dict=False)
    ids = reward._ids(chat)
    assert ids[: len(prompt_ids)] == prompt_ids
    end = reward.model.prompt_end(ids)
    assert end == len(prompt_ids) - 1
    assert reward.tokenizer.decode(ids[end : end + 2]) == "<|eot_id|><|start_header_id|>"


def test_the_gate_does_not_read_the_answer(checkpoint):
    reward = Classifier(checkpoint)
    assert CHATS[0][0] == CHATS[1][0]
    first_end = reward.model.prompt_end(reward._ids(CHATS[0]))
    second_end = reward.model.prompt_end(reward._ids(CHATS[1]))
    assert first_end == second_end


def test_the_header_begins_with_the_prompts_last_token(checkpoint):
    reward = Classifier(checkpoint)
    assert reward.tokenizer.decode(reward.model.header) == END_OF_TURN + ANSWER_HEADER


@pytest.mark.parametrize(
    "text",
    ["A good film.", turns("Is it good?"), turns("a very long question " * 9, "Yes.")],
    ids=["no chat", "no answer", "cut"],
)
def test_texts_without_the_header_are_refused(checkpoint, text):
    reward = Classifier(checkpoint, max_tokens=12)
    message = "a text without a header of the assistant .or its prompt is cut."
    with pytest.raises(ValueError, match=message):
        reward.score([text])


@pytest.mark.parametrize(
    "name, message",
    [
        ("gating.layers.2.bias", r"\['gating.layers.2.bias'\]"),
        ("regression_layer.weight", r"\['regression_layer.weight'\]"),
        ("gating.logit_scale", r"\['gating.logit_scale'\]"),
        ("model.layers.1.mlp.up_proj.weight", r"\['layers.1.mlp.up_proj.weight'\]"),
    ],
)
def test_missing_tensors_are_named(copy, name, message):
    shards = read(copy)
    for tensors in shards:
        tensors.pop(name, None)
    write(copy, *shards)
    with pytest.raises(ValueError, match=f"is no finished ArmoRM, it lacks {message}"):
        Classifier(copy)


def test_a_template_without_a_header_is_refused(checkpoint):
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.chat_template = TEMPLATE.replace("{% if add_generation_prompt %}", "{% if false %}")
    with pytest.raises(ValueError, match="puts no header before an answer"):
        armorm.ArmoRM(checkpoint, tokenizer, torch.float32)


@pytest.fixture
def in_bfloat16(copy):
    """Return a copy of the checkpoint whose Llama is stored in bfloat16."""
    llama, heads = read(copy)
    rounded = {name: tensor.bfloat16() for name, tensor in llama.items()}
    write(copy, rounded, heads)
    return copy


def test_a_model_in_bfloat16_has_heads_and_scores_in_float32(in_bfloat16):
    tokenizer = transformers.AutoTokenizer.from_pretrained(in_bfloat16)
    model = armorm.ArmoRM(in_bfloat16, tokenizer, torch.bfloat16)
    assert model.model.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.mlp} == {torch.float32}
    ids = torch.tensor([tokenizer.apply_chat_template(CHATS[0], return_dict=False)])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert logits.dtype == torch.float32
    assert logits.shape == (1, 1)


def test_a_checkpoint_in_bfloat16_keeps_its_heads_exact(in_bfloat16):
    scores = Classifier(in_bfloat16).score(CHATS)
    check_scores(scores, in_bfloat16, CHATS)


def test_the_temperature_is_10_where_the_config_names_none(checkpoint, copy):
    settings = json.loads((copy / "config.json").read_text())
    assert settings.pop("gating_temperature") == 3
    (copy / "config.json").write_text(json.dumps(settings))
    scores = Classifier(copy).score(CHATS)
    check_scores(scores, checkpoint, CHATS, temperature=10)
    difference = np.abs(Classifier(checkpoint).score(CHATS) - scores)
    assert difference.min() > 0.01


def test_it_is_known_by_its_architecture(checkpoint):
    assert armorm.is_gated(checkpoint)


def test_other_models_are_not_taken_for_it():
    assert not armorm.is_gated(assets.model_dir("tiny-encoder"))
    assert not armorm.is_gated("org/name")
