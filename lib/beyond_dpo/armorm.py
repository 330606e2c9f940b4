"""ArmoRM (arXiv 2406.12845) without its repository's code.

A Llama rates 19 objectives, and a gate weighs them: score = g(x) · (r(x, y) T). r is the regression
layer at the text's last token, T the transform that takes verbosity out, and g a softmax over an
MLP at the prompt's last token, right before the header of the assistant's last turn.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import Parameter, ParameterList
from torch.nn.functional import linear
from transformers import LlamaConfig, LlamaModel

REGRESSION = "regression_layer.weight"
TRANSFORM = "reward_transform_matrix"
SCALE = "gating.logit_scale"


def is_gated(folder: str | Path) -> bool:
    """Return whether a model folder holds ArmoRM, or one built as it is."""
    file = Path(folder, "config.json")
    if not file.is_file():
        return False
    architectures = json.loads(file.read_bytes()).get("architectures")
    return "ForRewardModelWithGating" in str(architectures)


class ArmoRM(torch.nn.Module):
    """The reward model of a folder, to be called as any sequence classifier.

    Only safetensors are read. The heads are float32.

    Args:
        folder: of the model.
        tokenizer: its chat template says where the gate reads.
        dtype: of the Llama; "auto" is the checkpoint's.
    Raises:
        ValueError: tensors are missing, or the template puts no header before an answer.
    """

    def __init__(self, folder: str | Path, tokenizer, dtype: torch.dtype | str):
        super().__init__()
        self.config = LlamaConfig.from_pretrained(folder, num_labels=1)
        self.temperature = getattr(self.config, "gating_temperature", 10)
        self.model, report = LlamaModel.from_pretrained(
            folder,
            config=self.config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
        )
        heads = _read_heads(Path(folder))
        mlp_names = []
        for layer in range(getattr(self.config, "gating_n_hidden", 3) + 1):
            mlp_names.append(f"gating.layers.{layer}.weight")
            mlp_names.append(f"gating.layers.{layer}.bias")
        names = [*mlp_names, REGRESSION, TRANSFORM, SCALE]
        missing = sorted(report["missing_keys"])
        missing += [name for name in names if name not in heads]
        if missing:
            raise ValueError(f"{folder} is no finished ArmoRM, it lacks {missing[:3]}")
        self.mlp = ParameterList(heads[name] for name in mlp_names)
        self.regression = Parameter(heads[REGRESSION])
        self.transform = Parameter(heads[TRANSFORM])
        self.scale = Parameter(heads[SCALE])
        self.header = _answer_header(tokenizer)
        if not self.header:
            raise ValueError(
                f"{folder}: its chat template puts no header before an answer, where the gate reads"
            )

    @property
    def device(self) -> torch.device:
        return self.model.device

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        """Return .logits (texts, 1) float32 of texts (texts, L) that are padded on the right.

        Raises ValueError for a text without a header of the assistant: it scores chats, whose
        prompt fits.
        """
        output = self.model(input_ids=input_ids, attention_mask=attention_mask)
        hidden = output.last_hidden_state
        texts = torch.arange(len(input_ids), device=self.device)
        text_ends = attention_mask.sum(1) - 1
        prompt_ends = [self.prompt_end(ids) for ids in input_ids.tolist()]
        hidden_of_prompt = hidden[texts, prompt_ends].float()
        hidden_of_text = hidden[texts, text_ends].float()
        weights = self._gate(hidden_of_prompt)
        ratings = hidden_of_text @ self.regression.T
        rewards = ratings @ self.transform
        scores = (weights * rewards).sum(-1, keepdim=True)
        return SimpleNamespace(logits=scores)

    def _gate(self, hidden: Tensor) -> Tensor:
        """Return the weight of each objective, (texts, objectives), from the prompts' last states.

        hidden: (texts, hidden size).
        """
        layers = list(zip(self.mlp[::2], self.mlp[1::2], strict=True))
        weight, bias = layers[0]
        logits = linear(hidden, weight, bias)
        for weight, bias in layers[1:]:
            logits = linear(logits.relu(), weight, bias)
        tempered = logits / self.temperature
        return self.scale * tempered.softmax(-1)

    def prompt_end(self, ids: list[int]) -> int:
        """Return the index of the last prompt's last token in a chat's token ids.

        That is the last place at which the header begins. Raises ValueError if there is none.
        """
        size = len(self.header)
        for start in range(len(ids) - size, -1, -1):
            if ids[start : start + size] == self.header:
                return start
        raise ValueError(
            "a text without a header of the assistant (or its prompt is cut): ArmoRM scores chat "
            "turns"
        )


def _read_heads(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a folder that are not the Llama's, in float32."""
    heads = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                if not name.startswith("model."):
                    heads[name] = tensors.get_tensor(name).float()
    return heads


def _answer_header(tokenizer) -> list[int]:
    """Return a prompt's last token and those that a chat template writes before an answer to it.

    Empty if it writes none.
    """
    turns = [{"role": "user", "content": "a"}]
    prompt = tokenizer.apply_chat_template(turns, return_dict=False)
    with_header = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_dict=False
    )
    begins_alike = with_header[: len(prompt)] == prompt
    if len(with_header) == len(prompt) or not begins_alike:
        return []
    return with_header[len(prompt) - 1 :]
