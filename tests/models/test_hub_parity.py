"""Checkpoints of every family, against the logits that `transformers` computes from them."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax.errors import DpjaxError
from dpjax.models import load_pretrained, save_pretrained, with_segments
from dpjax.models.families import read_hf_config

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")
import hub_models as hub  # noqa: E402

# Rounding reaches 5e-6; the smallest mistake below moves some logit by 100 times that.
TOLERANCE = 3e-5
VISIBLE = 5e-4
NAMES = list(hub.CONFIGS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A transformers model, its folder, what dpjax loads from it, tokens, and its logits."""

    @functools.cache
    def make(name, seed=0):
        folder = tmp_path_factory.mktemp("checkpoint")
        model = hub.random_model(name, seed)
        hub.save_checkpoint(model, folder)
        tokens = hub.random_tokens(seed)
        return model, folder, load_pretrained(folder), tokens, hub.logits_of(model, tokens)

    return make


def difference(config, params, tokens, expected):
    return np.abs(hub.our_logits(config, params, tokens) - expected).max()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(checkpoint, name, seed):
    model, _, ours, tokens, expected = checkpoint(name, seed)
    assert expected.std() > 0.5  # of a size at which the tolerance means something
    assert ours.config.segments == (ours.config.num_layers,)
    assert ours.config.vocabulary_size == model.config.vocab_size
    assert difference(ours.config, ours.params, tokens, expected) < TOLERANCE
    ids = (ours.tokenizer.pad_id, ours.tokenizer.bos_id, ours.tokenizer.eos_id)
    assert ids == (0, 1, 2)


def test_two_seeds_are_two_models(checkpoint):
    first, second = checkpoint("llama", 0)[4], checkpoint("llama", 1)[4]
    assert np.abs(first - second).max() > 0.5


WRONG = {
    "llama": [
        {"rope_theta": 8_000.0},
        {"norm_epsilon": 1e-5},
        {"query_scale": 0.34},
        {"embedding_scale": 1.02},
    ],
    "llama 3 positions": [{"rope_scaling": None}, {"rope_theta": 8_000.0}],
    "llama linear positions": [{"rope_scaling": None}, {"rope_theta": 1e4}],
    "qwen2": [{"rope_theta": 8_000.0}, {"norm_epsilon": 1e-4}],
    "qwen2 sliding": [{"sliding_window": 5}, {"sliding_window": 3}, {"local_layers": ()}],
    "qwen3": [{"rope_theta": 8_000.0}, {"norm_epsilon": 1e-4}],
    "gemma3": [
        {"rope_theta": 1e4},
        {"local_rope_theta": 8_000.0},
        {"sliding_window": 5},
        {"sliding_window": 3},
        {"local_layers": (False, True, False, False)},
        {"norm_epsilon": 1e-4},
        {"query_scale": None},
        {"embedding_scale": 1.0},
        {"activation": "swiglu"},
    ],
    "gemma3 linear positions": [{"rope_scaling": None}],
    "gpt2": [{"norm_epsilon": 1e-3}, {"activation": "gelu_exact"}],
    "gpt2 exact gelu": [{"activation": "gelu"}],
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_setting_would_be_seen(checkpoint, name):
    *_, ours, tokens, expected = checkpoint(name)
    for changes in WRONG[name]:
        wrong = dataclasses.replace(ours.config, **changes)
        seen = difference(wrong, ours.params, tokens, expected)
        # The two forms of GELU differ by less than 5e-4 anywhere.
        assert seen > (4 * TOLERANCE if "activation" in changes else VISIBLE), (changes, seen)


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_matters(checkpoint, name):
    """A bias or norm that is dropped, and a matrix that is 5% off, would be seen."""
    *_, ours, tokens, expected = checkpoint(name)
    noise = np.random.default_rng(7)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(ours.params)]
    assert len(paths) >= 11
    for chosen in paths:
        where = jax.tree_util.keystr(chosen, simple=True, separator="/")
        if where.endswith("attention/key/bias") and ours.config.positions == "learned":
            continue  # adds one number to all scores of a query: the softmax does not see it

        def change(path, leaf, chosen=chosen, where=where):
            if path != chosen:
                return leaf
            if where.endswith("bias"):
                return jnp.zeros_like(leaf)
            if where.endswith("scale"):
                return jnp.ones_like(leaf)
            return leaf * (1 + 0.05 * noise.standard_normal(leaf.shape, np.float32))

        params = jax.tree_util.tree_map_with_path(change, ours.params)
        assert difference(ours.config, params, tokens, expected) > VISIBLE, where


@pytest.mark.parametrize("name", NAMES)
def test_export_loads_in_transformers_from_any_segments(checkpoint, name, tmp_path):
    _, _, ours, tokens, expected = checkpoint(name)
    folder, layers = tmp_path / "whole", ours.config.num_layers
    save_pretrained(folder, ours)
    exported = hub.load_exported(folder)
    assert np.abs(hub.logits_of(exported, tokens) - expected).max() < TOLERANCE
    assert exported.config.pad_token_id == 0
    assert exported.generation_config.eos_token_id == 2
    for segments in ((), (1, layers - 1)):
        config, params = with_segments(ours.config, ours.params, segments)
        save_pretrained(tmp_path / "parts", ours._replace(config=config, params=params))
        for file in ("config.json", "model.safetensors"):
            assert (tmp_path / "parts" / file).read_bytes() == (folder / file).read_bytes()
    again = load_pretrained(folder)
    # The width of a head is always written, also where it follows from the others.
    width = ours.config.head_width if ours.config.positions == "rope" else None
    assert again.config == dataclasses.replace(ours.config, head_size=width)
    for one, other in zip(jax.tree.leaves(again.params), jax.tree.leaves(ours.params), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-7)  # Gemma's norms: +1, -1


@pytest.mark.parametrize("name", ["llama tied with biases", "qwen2 sliding", "gemma3", "gpt2"])
@pytest.mark.parametrize("segments", [(), (1, -1), (-1, 1)])
def test_segments_do_not_change_logits(checkpoint, name, segments):
    *_, ours, tokens, expected = checkpoint(name)
    layers = ours.config.num_layers
    segments = tuple(n % layers for n in segments)
    config, params = with_segments(ours.config, ours.params, segments)
    assert len(params["blocks"]) == (len(segments) or layers)
    assert difference(config, params, tokens, expected) < TOLERANCE


@pytest.mark.parametrize("name", ["llama 3 positions", "qwen2", "qwen3", "gemma3", "gpt2"])
def test_bfloat16_is_as_exact_as_in_transformers(checkpoint, name):
    """Error against float32 arithmetic with the same rounded weights, theirs and ours."""
    model, folder, *_ = checkpoint(name)
    tokens = hub.random_tokens(5)
    ours = load_pretrained(folder, dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(ours.params)} == {jnp.dtype("bfloat16")}
    narrow = hf.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager"
    ).eval()
    theirs = hub.logits_of(narrow, tokens)
    exact = hub.logits_of(narrow.float(), tokens)
    mine = hub.our_logits(ours.config, ours.params, tokens)
    assert mine.dtype == np.float32

    def rms(x):
        return float(np.sqrt(np.square(x).mean()))

    assert 0 < rms(theirs - exact) < 0.05 * exact.std()
    assert rms(mine - exact) < 2 * rms(theirs - exact)
    assert rms(mine - theirs) < 2.5 * rms(theirs - exact)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_bfloat16_export_returns_the_tensors_that_were_loaded(name, tmp_path):
    model = hub.random_model(name, 3).to(torch.bfloat16)
    hub.save_checkpoint(model, tmp_path / "original")
    ours = load_pretrained(tmp_path / "original", dtype="bfloat16")
    save_pretrained(tmp_path / "exported", ours)
    before, after = (
        safetensors_torch.load_file(tmp_path / folder / "model.safetensors")
        for folder in ("original", "exported")
    )
    assert before.keys() == after.keys()
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert not changed


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_sharded_checkpoint(checkpoint, name, tmp_path):
    model, _, ours, tokens, _ = checkpoint(name)
    hub.save_checkpoint(model, tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert not (tmp_path / "model.safetensors").exists()
    sharded = load_pretrained(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, sharded.params, ours.params)


def rewrite(folder, tensors=None, **changes):
    """Replaces tensors and settings of a checkpoint; None removes a setting."""
    if tensors is not None:
        safetensors_torch.save_file(tensors, folder / "model.safetensors")
    described = json.loads((folder / "config.json").read_text()) | changes
    described = {key: value for key, value in described.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(described))


def stored(folder):
    return safetensors_torch.load_file(folder / "model.safetensors")


def test_gpt2_without_prefix(checkpoint, tmp_path):
    """As `openai-community/gpt2` is stored, with the buffers that it still has."""
    model, _, ours, _, _ = checkpoint("gpt2")
    hub.save_checkpoint(model, tmp_path)
    tensors = {k.removeprefix("transformer."): v for k, v in stored(tmp_path).items()}
    assert "wte.weight" in tensors
    mask = torch.tril(torch.ones(1, 1, 64, 64))
    rewrite(tmp_path, tensors | {f"h.{n}.attn.bias": mask.clone() for n in range(3)})
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(tmp_path).params, ours.params)


@pytest.mark.parametrize("name", ["gpt2", "smollm2", "gemma3"])
def test_tied_checkpoint_that_also_stores_its_head(checkpoint, name, tmp_path):
    model, _, ours, _, _ = checkpoint(name)
    hub.save_checkpoint(model, tmp_path)
    rewrite(tmp_path, stored(tmp_path) | {"lm_head.weight": model.lm_head.weight.detach().clone()})
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(tmp_path).params, ours.params)


def test_gpt2_with_its_own_head(tmp_path):
    torch.manual_seed(4)
    config = hf.GPT2Config(**hub.GPT2, tie_word_embeddings=False, attn_implementation="eager")
    model = hf.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 0.3)
    hub.save_checkpoint(model, tmp_path / "theirs")
    ours, tokens = load_pretrained(tmp_path / "theirs"), hub.random_tokens()
    expected = hub.logits_of(model, tokens)
    assert not ours.config.tied
    assert difference(ours.config, ours.params, tokens, expected) < TOLERANCE
    save_pretrained(tmp_path / "ours", ours)
    exported = hub.logits_of(hub.load_exported(tmp_path / "ours"), tokens)
    assert np.abs(exported - expected).max() < TOLERANCE


def test_older_spelling_of_rotary_settings(checkpoint):
    model, folder, ours, *_ = checkpoint("llama 3 positions")
    newer = json.loads((folder / "config.json").read_text())
    stretch = dict(newer.pop("rope_parameters"))
    theta = stretch.pop("rope_theta")
    kind = stretch.pop("rope_type")
    assert read_hf_config({**newer, "rope_theta": theta}, "x")[1].rope_scaling is None
    for name in ("type", "rope_type"):
        older = {**newer, "rope_theta": theta, "rope_scaling": {**stretch, name: kind}}
        assert "rope_parameters" not in older
        assert read_hf_config(older, "x")[1] == dataclasses.replace(ours.config, dtype="float32")
    moved = read_hf_config({**newer, "rope_theta": 54321.0, "rope_scaling": None}, "x")[1]
    assert moved.rope_theta == 54321.0


def test_older_spelling_of_gemma(checkpoint):
    folder, ours = checkpoint("gemma3 linear positions")[1:3]
    newer = json.loads((folder / "config.json").read_text())
    newer["rope_parameters"]["full_attention"]["rope_theta"] = 777777.0
    newer["rope_parameters"]["sliding_attention"]["rope_theta"] = 7777.0
    newer["layer_types"] = [
        "full_attention" if (n + 1) % 3 == 0 else "sliding_attention" for n in range(4)
    ]
    expected = read_hf_config(newer, "x")[1]
    assert expected.local_layers == (True, True, False, True)
    assert (expected.rope_theta, expected.local_rope_theta) == (777777.0, 7777.0)
    assert expected.rope_scaling.factor == 8.0
    dropped = ("rope_parameters", "layer_types", "_sliding_window_pattern")
    older = {key: value for key, value in newer.items() if key not in dropped} | {
        "rope_theta": 777777.0,
        "rope_local_base_freq": 7777.0,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window_pattern": 3,
    }
    assert read_hf_config(older, "x")[1] == expected
    del older["sliding_window_pattern"]  # every sixth is then full: none of these four
    assert read_hf_config(older, "x")[1].local_layers == (True,) * 4


def test_older_spelling_of_qwen2_windows(checkpoint):
    _, folder, ours, *_ = checkpoint("qwen2 sliding")
    newer = json.loads((folder / "config.json").read_text())
    theta = newer.pop("rope_parameters")["rope_theta"]
    del newer["layer_types"]
    assert newer["max_window_layers"] == 1
    older = {**newer, "rope_theta": theta, "rope_scaling": None}
    assert read_hf_config(older, "x")[1] == ours.config
    assert ours.config.local_layers == (False, True, True)
    off = read_hf_config({**older, "use_sliding_window": False}, "x")[1]
    assert off.local_layers == () and off.sliding_window is None


def test_scaled_local_layers_are_computed_or_refused():
    """Both kinds of layers stretched: what is not computed must not load without a word."""
    linear = {"rope_type": "linear", "factor": 8.0}
    config = hub.gemma(
        rope_parameters={
            "full_attention": {**linear, "rope_theta": 1e6},
            "sliding_attention": {**linear, "factor": 4.0, "rope_theta": 1e4},
        }
    )
    with pytest.raises(DpjaxError, match="rotary"):
        read_hf_config(json.loads(config.to_json_string()), "x")


def test_multimodal_gemma_by_renaming(checkpoint, tmp_path):
    model, _, ours, _, _ = checkpoint("gemma3")
    hub.save_checkpoint(model, tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())
    plain = stored(tmp_path)
    extra = torch.ones(3, 4)
    for start in ("model.language_model.", "language_model.model."):
        tensors = {k.replace("model.", start, 1): v for k, v in plain.items()}
        tensors |= {
            "model.vision_tower.x.weight": extra,
            "model.multi_modal_projector.y": extra + 1,
        }
        safetensors_torch.save_file(tensors, tmp_path / "model.safetensors")
        described = {"model_type": "gemma3", "text_config": text, "vision_config": {}}
        (tmp_path / "config.json").write_text(json.dumps({**described, "eos_token_id": [2]}))
        multimodal = load_pretrained(tmp_path)
        assert multimodal.config == ours.config
        jax.tree.map(np.testing.assert_array_equal, multimodal.params, ours.params)


def test_multimodal_gemma_as_transformers_stores_it(tmp_path):
    """A text_config as stored names only what differs from the defaults of transformers."""
    torch.manual_seed(6)
    text = hub.gemma()
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = hf.Gemma3Config(
        text_config=text.to_dict(),
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=96,
    )
    config._attn_implementation = "eager"
    model = hf.Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    hub.write_tokenizer(tmp_path)
    tokens = hub.random_tokens(vocabulary=96)
    expected = hub.logits_of(model, tokens)
    ours = load_pretrained(tmp_path)
    assert difference(ours.config, ours.params, tokens, expected) < TOLERANCE


def test_multimodal_gemma_4b_config_as_published():
    """google/gemma-3-4b-it's config.json leaves out what Gemma3TextConfig has by default."""
    published = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
    }
    full = hf.Gemma3TextConfig(**published["text_config"])
    family, config = read_hf_config(published, "gemma-3-4b-it")
    assert family == "gemma3"
    found = (config.vocabulary_size, config.num_heads, config.num_kv_heads, config.head_width)
    assert found == (full.vocab_size, full.num_attention_heads, full.num_key_value_heads, 256)
    assert found[0] == 262208
    assert sum(config.local_layers) == full.layer_types.count("sliding_attention") == 29
