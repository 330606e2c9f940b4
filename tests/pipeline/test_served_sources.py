"""A rehearsal of profile paper: the sources are models behind two servers, or cut into shards."""

import json
import threading
from http.server import ThreadingHTTPServer

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import conftest
from beyond_dpo.pipeline import config, sources, stages, wrpo
from beyond_dpo.rows import read_rows

ASK = "Go on with this film review: {prompt}"


class TinyServer(ThreadingHTTPServer):
    """An OpenAI-compatible server of a random model of two layers, which samples what it replies.

    seed: of its weights and of its sampling. asked: the requests that came.
    """

    def __init__(self, folder, seed: int):
        super().__init__(("127.0.0.1", 0), Completions)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        torch.manual_seed(seed)
        for parameter in self.model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        self.lock = threading.Lock()
        self.asked = []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def sampled(self, request: dict) -> list[dict]:
        """Return the choices of a reply."""
        with self.lock:
            self.asked.append(request)
            inputs = self.tokenizer.apply_chat_template(
                request["messages"], add_generation_prompt=True, return_tensors="pt"
            )
            responses = self.model.generate(
                **inputs,
                do_sample=True,
                temperature=request["temperature"],
                top_p=request["top_p"],
                max_new_tokens=request["max_tokens"],
                num_return_sequences=request["n"],
                pad_token_id=self.tokenizer.pad_token_id,
            )
        choices = []
        for number, ids in enumerate(responses[:, inputs["input_ids"].shape[1] :]):
            ended = self.tokenizer.eos_token_id in ids
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            choice = {"index": number, "message": {"role": "assistant", "content": text}}
            choices.append(choice | {"finish_reason": "stop" if ended else "length"})
        return choices


class Completions(conftest.Handler):
    def do_POST(self):
        request = json.loads(self.body())
        if self.path != "/v1/chat/completions":
            self.answer(404, b"{}")
            return
        choices = self.server.sampled(request)
        reply = {"id": "1", "object": "chat.completion", "created": 1, "model": request["model"]}
        self.answer(200, json.dumps(reply | {"choices": choices}).encode())


@pytest.fixture(scope="module")
def served(store, tiny):
    """Start two servers; yield them by the names of their models."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", conftest.KEY)
        servers = {"first": TinyServer(tiny, 1), "second": TinyServer(tiny, 2)}
        yield servers
        for server in servers.values():
            server.shutdown()
            server.server_close()


@pytest.fixture(scope="module")
def cfg(served):
    """Return the configuration whose sources are the two servers."""
    known = {}
    for name, server in served.items():
        known[name] = {"kind": "endpoint", "ref": name, "url": server.url, "ask": ASK}
    return config.load(
        "wrpo",
        "smoke",
        known_sources=known,
        sources=list(known),
        source_sets=[],
        seeds=[0],
        objectives={"dpo": {"beta": 0.1}},
    )


def test_each_server_is_asked_every_prompt_once_for_all_samples(served, cfg):
    for name, server in served.items():
        answered = sources.answers(cfg, name)
        assert answered.manifest["facts"] == {"responses": 16 * 3, "unanswered": 0}
        texts = [request["messages"][0]["content"] for request in server.asked]
        assert len(set(texts)) == len(texts) == 15  # two prompts are one text
        assert all(text.startswith("Go on with this film review: ") for text in texts)
        request = server.asked[0]
        assert (request["model"], request["n"]) == (name, 3)
        assert request["max_tokens"] == cfg.sampling.max_tokens == 16


def test_what_the_servers_say_is_fused_and_learnt(served, cfg):
    """From the replies to a trained model, without a stand-in for any step."""
    wins = wrpo.fusion(cfg, cfg.sources).manifest["facts"]["wins"]
    assert set(wins) == set(served)
    assert sum(wins.values()) == 16
    base = wrpo.target_sft(cfg, cfg.sources)
    quadruples = read_rows(wrpo.quadruples(cfg, cfg.sources, base).get() / "pairs.jsonl")
    assert len(quadruples) > 4
    replies = {}
    for name in served:
        for line in stages.json_lines(sources.answers(cfg, name).get() / "responses.jsonl"):
            replies.setdefault(line["id"], []).append(line["response_ids"])
    for row in quadruples:
        assert row["responses"]["source_chosen"] in replies[row["id"]]
    model = wrpo.fused(cfg)
    steps = stages.json_lines(model.get() / "log.jsonl")
    assert [name for name in config.FUSED if f"{name}_reward" not in steps[-1]] == []
    assert (model.get() / "model.safetensors").stat().st_size > 10_000


def plan_of_sources(monkeypatch, experiment=""):
    """Return what a dry run says of the sources of profile paper."""
    monkeypatch.setenv("COMPUTE", "plan")
    paper = config.load("wrpo", "paper", experiment)
    said = []
    for name in paper.sources:
        answered = sources.answers(paper, name)
        said += [result.does for result in answered.upstream.values() if result.stage == "answers"]
    assert len(said) == len(paper.sources) == 10
    return paper, said


def test_a_dry_run_says_how_each_of_the_papers_sources_would_be_served(monkeypatch):
    paper, said = plan_of_sources(monkeypatch, "served")
    addresses = set()
    for name, line in zip(paper.sources, said, strict=True):
        source = paper.known_sources[name]
        assert source.kind == "endpoint"
        addresses.add(source.url)
        command = f"to serve it there: vllm serve {source.ref}"
        assert line == f"source {name}: endpoint {source.ref} at {source.url}; {command}"
    assert len(addresses) == 10


def test_a_dry_run_says_which_command_samples_the_papers_sources_in_shards(monkeypatch):
    monkeypatch.setenv("BEYOND_DPO_ENGINES", "16")
    monkeypatch.setenv("BEYOND_DPO_TENSOR_PARALLEL", "8")
    monkeypatch.setenv("BEYOND_DPO_LAUNCHER", "srun")
    paper, said = plan_of_sources(monkeypatch)
    assert paper.sampling.shard == 512
    for name, line in zip(paper.sources, said, strict=True):
        assert line.startswith(f"source {name}: model {paper.known_sources[name].ref}: ")
        assert "shards of 512 prompts on 16 vllm engines: srun --ntasks 16 " in line
        assert "beyond_dpo.machine.spread {job}" in line


def test_the_same_ten_are_asked_whether_served_or_sampled():
    here = config.load("wrpo", "paper")
    served = config.load("wrpo", "paper", "served")
    assert served.sources == here.sources
    for name in here.sources:
        assert served.known_sources[name].ref == here.known_sources[name].ref
        assert served.known_sources[name].ask == here.known_sources[name].ask == "{prompt}"
