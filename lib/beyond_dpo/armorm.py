"""ArmoRM (arXiv 2406.12845) without its repository's code: a Llama rates 19 objectives, and a gate
weighs them.

score = g(x) · (r(x, y) T): r the regression layer at the text's last token, T the transform that
takes verbosity out, g a softmax over an MLP at the prompt's last token, right before the header of
the assistant's last turn.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import safe_open
from torch.nn import Parameter, ParameterList
from transformers import LlamaConfig, LlamaModel


def is_gated(folder) -> bool:
    """Return whether a model folder holds ArmoRM, or one built as it is."""
    path = Path(folder, "config.json")
    return path.is_file() and "ForRewardModelWithGating" in str(
        json.loads(path.read_bytes()).get("architectures")
    )


class ArmoRM(torch.nn.Module):
    """The reward model of a folder, to be called as any sequence classifier; only safetensors are
    read.

    dtype: of the Llama ("auto": the checkpoint's); the heads are float32. Where the gate reads
    comes from the chat template of `tokenizer`. Raises ValueError for missing tensors, and for a
    template without a header.
    """

    def __init__(self, folder, tokenizer, dtype: torch.dtype | str):
        super().__init__()
        self.config = LlamaConfig.from_pretrained(folder, num_labels=1)
        options = {
            "config": self.config,
            "dtype": dtype,
            "use_safetensors": True,
            "output_loading_info": True,
        }
        self.model, loaded = LlamaModel.from_pretrained(folder, **options)
        heads = {}
        for file in Path(folder).glob("*.safetensors"):
            with safe_open(file, "pt") as tensors:
                heads |= {
                    n: tensors.get_tensor(n).float()
                    for n in tensors.keys()
                    if not n.startswith("model.")
                }
        layers = range(getattr(self.config, "gating_n_hidden", 3) + 1)
        mlp = [f"gating.layers.{i}.{part}" for i in layers for part in ("weight", "bias")]
        names = [*mlp, "regression_layer.weight", "reward_transform_matrix", "gating.logit_scale"]
        if missing := [
            *sorted(loaded["missing_keys"]),
            *(name for name in names if name not in heads),
        ]:
            raise ValueError(f"{folder} is no finished ArmoRM, it lacks {missing[:3]}")
        self.mlp = ParameterList(heads[name] for name in mlp)
        self.regression, self.transform, self.scale = (
            Parameter(heads[name]) for name in names[len(mlp) :]
        )
        self.temperature = getattr(self.config, "gating_temperature", 10)
        turns = [{"role": "user", "content": "a"}]
        asked, answering = (
            tokenizer.apply_chat_template(turns, add_generation_prompt=header, return_dict=False)
            for header in (False, True)
        )
        if len(asked) == len(answering) or answering[: len(asked)] != asked:
            raise ValueError(
                f"{folder}: its chat template puts no header before an answer, where the gate reads"
            )
        self.header = answering[len(asked) - 1 :]  # from the prompt's last token on

    @property
    def device(self) -> torch.device:
        return self.model.device

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        """Return .logits (texts, 1) float32 of texts (texts, L) that are padded on the right.

        Raises ValueError for a text without a header of the assistant: it scores chats, whose
        prompt fits.
        """
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        rows, ends = torch.arange(len(input_ids), device=self.device), attention_mask.sum(1) - 1
        gate = hidden[rows, [self.asked(ids) for ids in input_ids.tolist()]].float()
        for i in range(0, len(self.mlp), 2):
            gate = torch.nn.functional.linear(
                gate.relu() if i else gate, self.mlp[i], self.mlp[i + 1]
            )
        gate = (gate / self.temperature).softmax(-1) * self.scale
        rewards = hidden[rows, ends].float() @ self.regression.T @ self.transform
        return SimpleNamespace(logits=(gate * rewards).sum(-1, keepdim=True))

    def asked(self, ids: list[int]) -> int:
        """Return where the last prompt ends in a chat's token ids: the last place at which the
        header begins.
        """
        size = len(self.header)
        for start in range(len(ids) - size, -1, -1):
            if ids[start : start + size] == self.header:
                return start
        raise ValueError(
            "a text without a header of the assistant (or its prompt is cut): ArmoRM scores chat "
            "turns"
        )
