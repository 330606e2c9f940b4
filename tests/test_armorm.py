"""ArmoRM on a tiny random checkpoint with the published tensor names, against its equations written
out per text.
"""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from beyond_dpo import armorm
from beyond_dpo.pipeline import assets
from beyond_dpo.rewards import Classifier

OBJECTIVES, HIDDEN = 5, 24
TEMPLATE = (  # Llama-3's, in short
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n"
    "' }}{% endif %}"
)


def turns(*said):
    return [
        {"role": role, "content": text}
        for role, text in zip(("user", "assistant") * 4, said, strict=False)
    ]


CHATS = [
    turns("Is it good?", "It is."),
    turns("Is it good?", "It is a long and dreary film that nobody needs, and yet I liked it."),
    turns("Hi", "Hello", "And the plot?", "There is none."),
    turns("Hi", "Hello", "And the plot?", "Thin, but the actors are good.", "The end?", "Sad."),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Write the checkpoint in two shards, and code of its own that must never run."""
    folder, source = tmp_path_factory.mktemp("armorm"), assets.model_dir("tiny")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]}
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    own = {
        "architectures": ["LlamaForRewardModelWithGating"],
        "num_objectives": OBJECTIVES,
        "gating_temperature": 3,
        "auto_map": {
            "AutoModelForSequenceClassification": "modeling_custom.LlamaForRewardModelWithGating"
        },
    }
    config = transformers.LlamaConfig.from_pretrained(source, vocab_size=len(tokenizer), **own)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = transformers.LlamaModel(config)
        tensors = {
            f"model.{name}": 3 * p.data if p.ndim == 2 else p.data
            for name, p in model.named_parameters()
        }
        sizes = [config.hidden_size, HIDDEN, HIDDEN, HIDDEN, OBJECTIVES]
        heads = {"regression_layer.weight": torch.randn(OBJECTIVES, sizes[0])}
        heads |= {
            "reward_transform_matrix": torch.randn(OBJECTIVES, OBJECTIVES),
            "gating.logit_scale": torch.tensor([1.7]),
        }
        for i in range(4):
            heads[f"gating.layers.{i}.weight"] = (
                1.5 * torch.randn(sizes[i + 1], sizes[i]) / sizes[i] ** 0.5
            )
            heads[f"gating.layers.{i}.bias"] = torch.randn(sizes[i + 1])
    write(folder, tensors, heads)
    config.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(saved | own))
    (folder / "modeling_custom.py").write_text(
        "raise SystemExit('code of the repository has run')\n"
    )
    return folder


def write(folder, *shards):
    names = [f"model-0000{i}-of-0000{len(shards)}.safetensors" for i in range(1, len(shards) + 1)]
    for name, tensors in zip(names, shards, strict=True):
        save_file(
            {key: value.contiguous() for key, value in tensors.items()},
            folder / name,
            metadata={"format": "pt"},
        )
    index = {key: name for name, tensors in zip(names, shards, strict=True) for key in tensors}
    text = json.dumps({"metadata": {"total_size": 0}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


def read(folder):
    first, second = sorted(folder.glob("*.safetensors"))
    return load_file(first), load_file(second)


def derived(folder, chat, temperature=3):
    """Return a chat's score by the paper's equations, and how far float32 may be from it.

    No batch, no padding, no code of ours. The score is a sum of products whose signs differ, so
    what float32 may be off does not depend on the score but on the sum of their sizes. Each product
    carries the errors of its factors: of a hidden state, after two layers, up to 8 rounding errors
    of 2^-24 were seen, in three instruction sets.
    """
    tensors, heads = (
        {key: value.double().numpy() for key, value in part.items()} for part in read(folder)
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    header = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    begin = [m.start() for m in re.finditer(re.escape(header), text)][-1] + len("<|eot_id|>")
    ids, asked = (
        tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, text[:begin])
    )
    assert (
        ids[: len(asked)] == asked
        and tokenizer.decode(asked[-1:]) == "<|eot_id|>"
        and ids.count(0) == 1
    )
    model = transformers.LlamaModel.from_pretrained(folder).double().eval()
    assert np.array_equal(
        model.embed_tokens.weight.detach().numpy(), tensors["model.embed_tokens.weight"]
    )
    with torch.no_grad():
        hidden = model(torch.tensor([ids])).last_hidden_state[0].numpy()
    gate = hidden[len(asked) - 1]
    for i in range(4):
        gate = heads[f"gating.layers.{i}.weight"] @ gate + heads[f"gating.layers.{i}.bias"]
        gate = np.maximum(gate, 0) if i < 3 else gate
    weights = np.exp((gate - np.max(gate)) / temperature)
    assert weights.min() > 0.01 * weights.max(), (
        "a gate that takes one objective alone shows little"
    )
    weights *= heads["gating.logit_scale"][0] / weights.sum()
    regression, transform = heads["regression_layer.weight"], heads["reward_transform_matrix"]
    rewards = regression @ hidden[-1]
    score = sum(
        weights[j] * sum(rewards[i] * transform[i, j] for i in range(OBJECTIVES))
        for j in range(OBJECTIVES)
    )
    sizes = (np.abs(regression) @ np.abs(hidden[-1])) @ np.abs(transform) @ weights
    return score, 8 * 2**-24 * sizes


def agree(scores, folder, chats, **how):
    """Check scores against the equations; return what these say."""
    wanted = [derived(folder, chat, **how) for chat in chats]
    for score, (exact, error) in zip(scores, wanted, strict=True):
        assert score == pytest.approx(exact, abs=error) and error < 2e-4
    return [exact for exact, _ in wanted]


@pytest.mark.parametrize("budget", [1, 60, 8192])
def test_scores_are_those_of_the_equations_alone_and_in_batches(checkpoint, budget):
    reward = Classifier(checkpoint, token_budget=budget)  # no trust_remote_code
    wanted = agree(reward.score(CHATS), checkpoint, CHATS)
    agree(reward.score(CHATS[::-1]), checkpoint, CHATS[::-1])
    assert np.ptp(wanted) > 0.5, "too alike to tell"


def test_the_gate_reads_the_end_of_the_last_prompt(checkpoint):
    """A prompt's own render ends there, whatever is answered and however many turns came before."""
    reward = Classifier(checkpoint)
    for chat in CHATS:
        ids = reward._ids(chat)
        prompt = reward.tokenizer.apply_chat_template(chat[:-1], return_dict=False)
        assert reward.model.prompt_end(ids) == len(prompt) - 1 and ids[: len(prompt)] == prompt
        assert (
            reward.tokenizer.decode(ids[len(prompt) - 1 : len(prompt) + 1])
            == "<|eot_id|><|start_header_id|>"
        )
    assert len({reward.model.prompt_end(reward._ids(chat)) for chat in CHATS[:2]}) == 1
    assert (
        reward.tokenizer.decode(reward.model.header)
        == "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_texts_without_the_header_are_refused(checkpoint):
    reward = Classifier(checkpoint, max_tokens=12)
    for text in ("A good film.", turns("Is it good?"), turns("a very long question " * 9, "Yes.")):
        with pytest.raises(
            ValueError, match="a text without a header of the assistant .or its prompt is cut."
        ):
            reward.score([text])


@pytest.mark.parametrize(
    "name",
    [
        "gating.layers.2.bias",
        "regression_layer.weight",
        "gating.logit_scale",
        "model.layers.1.mlp.up_proj.weight",
    ],
)
def test_missing_tensors_are_named(checkpoint, tmp_path, name):
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shards = read(checkpoint)
    for tensors in shards:
        tensors.pop(name, None)
    write(tmp_path, *shards)
    with pytest.raises(
        ValueError, match=rf"is no finished ArmoRM, it lacks \['{name.removeprefix('model.')}'\]"
    ):
        Classifier(tmp_path)


def test_a_template_without_a_header_is_refused(checkpoint):
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.chat_template = TEMPLATE.replace("{% if add_generation_prompt %}", "{% if false %}")
    with pytest.raises(ValueError, match="puts no header before an answer"):
        armorm.ArmoRM(checkpoint, tokenizer, torch.float32)


def test_a_checkpoint_in_bfloat16_keeps_its_heads_exact(checkpoint, tmp_path):
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    llama, heads = read(checkpoint)
    write(tmp_path, {key: value.bfloat16() for key, value in llama.items()}, heads)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    model = armorm.ArmoRM(tmp_path, tokenizer, torch.bfloat16)
    assert model.model.dtype == torch.bfloat16 and {p.dtype for p in model.mlp} == {torch.float32}
    ids = torch.tensor([tokenizer.apply_chat_template(CHATS[0], return_dict=False)])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert logits.dtype == torch.float32 and logits.shape == (1, 1)
    agree(Classifier(tmp_path).score(CHATS), tmp_path, CHATS)


def test_the_temperature_is_10_where_the_config_names_none(checkpoint, tmp_path):
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("gating_temperature") == 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    wanted = agree(Classifier(tmp_path).score(CHATS), checkpoint, CHATS, temperature=10)
    assert np.abs(Classifier(checkpoint).score(CHATS) - wanted).min() > 0.01


def test_other_models_are_not_taken_for_it(checkpoint):
    assert armorm.is_gated(checkpoint)
    assert not armorm.is_gated(assets.model_dir("tiny-encoder")) and not armorm.is_gated("org/name")
