"""Adapters, merged and as PEFT reads them; and which parameters a tuning trains."""

import dataclasses
import functools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax.errors import DpjaxError
from dpjax.models import (
    LoRA,
    add_lora,
    combine,
    count_parameters,
    language_model_loss,
    load_pretrained,
    merge_lora,
    partition,
    prepare_tuning,
    save_pretrained,
    tuned_loss,
    with_segments,
)
from dpjax.models.config import ALL_TARGETS

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
safetensors_torch = pytest.importorskip("safetensors.torch")
import hub_models as hub  # noqa: E402

FAMILIES = ["llama", "qwen2", "qwen3", "gemma3", "gpt2"]
TOLERANCE = 1e-4
# What an adapter of `adapted` does to the logits is at least this.
EFFECT = 0.3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A transformers model, its folder, what dpjax loads from it, and tokens."""

    @functools.cache
    def make(name):
        folder = tmp_path_factory.mktemp("checkpoint")
        model = hub.random_model(name, 11)
        hub.save_checkpoint(model, folder)
        return model, folder, load_pretrained(folder), hub.random_tokens(11)

    return make


def present_targets(config):
    return tuple(t for t in ALL_TARGETS if t != "gate" or config.is_gated)


def adapted(model, lora, seed=0):
    """The model with adapters whose matrices are all random."""
    config, params = add_lora(model.config, model.params, lora, jax.random.key(seed))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not name.endswith(("lora_a", "lora_b")):
            return leaf
        return jnp.asarray(0.15 * rng.standard_normal(leaf.shape), leaf.dtype)

    params = jax.tree_util.tree_map_with_path(draw, params)
    return model._replace(config=config, params=params)


def gap(one, other):
    return np.abs(one - other).max()


def logits(model, tokens):
    return hub.our_logits(model.config, model.params, tokens)


@pytest.mark.parametrize("name", FAMILIES)
def test_fresh_adapters_change_nothing(checkpoint, name):
    _, _, ours, tokens = checkpoint(name)
    config, params = add_lora(
        ours.config, ours.params, LoRA(3, targets=present_targets(ours.config)), jax.random.key(1)
    )
    fresh = ours._replace(config=config, params=params)
    np.testing.assert_array_equal(logits(fresh, tokens), logits(ours, tokens))
    by_name = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    first = {key: leaf for key, leaf in by_name.items() if key.endswith("lora_a")}
    assert len(first) == len(present_targets(ours.config))
    for key, leaf in first.items():
        assert not np.any(by_name[key.replace("lora_a", "lora_b")])
        bound = leaf.shape[-2] ** -0.5
        assert 0.8 * bound < np.abs(leaf).max() <= bound, key
        # Layers are drawn apart.
        assert gap(np.asarray(leaf[0]), np.asarray(leaf[1])) > 0.5 * bound, key
    across = [np.asarray(leaf).ravel()[:50] for leaf in first.values()]
    assert len({x.tobytes() for x in across}) == len(across)


@pytest.mark.parametrize("name", FAMILIES)
def test_merged_model_computes_what_the_adapted_one_does(checkpoint, name, tmp_path):
    _, _, ours, tokens = checkpoint(name)
    lora = LoRA(3, alpha=4.0, targets=present_targets(ours.config))
    with_lora = adapted(ours, lora)
    expected = logits(with_lora, tokens)
    assert gap(expected, logits(ours, tokens)) > EFFECT
    config, params = merge_lora(with_lora.config, with_lora.params)
    assert config == ours.config
    assert jax.tree.structure(params) == jax.tree.structure(ours.params)
    merged = ours._replace(config=config, params=params)
    assert gap(logits(merged, tokens), expected) < TOLERANCE
    again, twice = merge_lora(config, params)
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, twice, params)
    save_pretrained(tmp_path, with_lora)
    exported = hub.load_exported(tmp_path)
    assert gap(hub.logits_of(exported, tokens), expected) < TOLERANCE
    # Another scaling is another model.
    other = dataclasses.replace(with_lora.config, lora=dataclasses.replace(lora, alpha=3.5))
    assert gap(hub.our_logits(other, with_lora.params, tokens), expected) > 100 * TOLERANCE


def peft_logits(base, adapter, tokens):
    """`base` is read anew: PEFT puts its modules into the model that it is given."""
    model = hub.load_exported(base)
    # What peft reads of transformers is on its way out there; no other warning is let through.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    return hub.logits_of(peft.PeftModel.from_pretrained(model, adapter).eval(), tokens)


ADAPTERS = {
    "llama": [LoRA(4), LoRA(3, alpha=7.5, targets=("query", "down"))],
    "qwen3": [LoRA(4), LoRA(2, alpha=1.0, targets=("key", "value", "gate"))],
    "gemma3": [LoRA(4), LoRA(5, alpha=2.0, targets=("out", "up"))],
    # Query, key and value are one matrix there; the others keep their rank beside its larger one.
    "gpt2": [LoRA(4), LoRA(3, alpha=7.5, targets=("out", "up", "down", "value", "key"))],
}


@pytest.mark.parametrize("which", [0, 1], ids=["default alpha", "own alpha"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_computes_what_the_adapted_model_does(checkpoint, name, which, tmp_path):
    _, base, ours, tokens = checkpoint(name)
    with_lora = adapted(ours, ADAPTERS[name][which], seed=which)
    # Adapters are exported from any grouping of the layers.
    layers = ours.config.num_layers
    config, params = with_segments(with_lora.config, with_lora.params, (1, layers - 1))
    grouped = with_lora._replace(config=config, params=params)
    save_pretrained(tmp_path, grouped, adapter=True, base=str(base))
    assert not (tmp_path / "model.safetensors").exists()
    described = json.loads((tmp_path / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(base)
    expected = logits(with_lora, tokens)
    assert gap(expected, logits(ours, tokens)) > EFFECT
    assert gap(peft_logits(base, tmp_path, tokens), expected) < TOLERANCE


@pytest.mark.parametrize("targets", [("out",), ("down",), ("up",), ("out", "up")])
def test_peft_wraps_only_the_targets_of_gpt2(checkpoint, targets, tmp_path):
    """Attention and feed-forward both have a c_proj: naming one must not wrap the other."""
    _, base, ours, tokens = checkpoint("gpt2")
    with_lora = adapted(ours, LoRA(4, targets=targets))
    save_pretrained(tmp_path, with_lora, adapter=True, base=str(base))
    found = peft_logits(base, tmp_path, tokens)  # PEFT warns of adapters without matrices
    assert gap(found, logits(with_lora, tokens)) < TOLERANCE


def test_adapter_file_holds_the_adapters_and_nothing_else(checkpoint, tmp_path):
    _, base, ours, _ = checkpoint("llama")
    with_lora = adapted(ours, LoRA(2, targets=("query", "up")))
    save_pretrained(tmp_path, with_lora, adapter=True)
    tensors = safetensors_torch.load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * ours.config.num_layers
    first = tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert tuple(first.shape) == (2, 32)
    total = sum(t.numel() for t in tensors.values())
    assert total == count_parameters(with_lora.params) - count_parameters(ours.params)


def one_line(caught):
    message = str(caught.value)
    assert "\n" not in message and len(message) < 300, message
    return message


def test_ranks_of_a_fused_matrix_add_up(checkpoint, tmp_path):
    with_lora = adapted(checkpoint("gpt2")[2], LoRA(2, targets=("query", "value", "up")))
    save_pretrained(tmp_path, with_lora, adapter=True)
    described = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (described["r"], described["lora_alpha"]) == (4, 8.0)
    assert described["rank_pattern"] == {"mlp.c_fc": 2}
    assert described["alpha_pattern"] == {"mlp.c_fc": 4.0}
    tensors = safetensors_torch.load_file(tmp_path / "adapter_model.safetensors")
    second = tensors["base_model.model.transformer.h.1.attn.c_attn.lora_B.weight"].numpy()
    reached = second.reshape(3, 32, 4).any(1)
    assert reached.tolist() == [[True, True, False, False], [False] * 4, [False, False, True, True]]


def test_adapter_requests_that_make_no_sense(checkpoint, tmp_path):
    ours, gpt2 = checkpoint("llama")[2], checkpoint("gpt2")[2]
    with pytest.raises(DpjaxError, match="no adapter to export"):
        save_pretrained(tmp_path, ours, adapter=True)
    with pytest.raises(DpjaxError, match="none of them"):
        add_lora(gpt2.config, gpt2.params, LoRA(2, targets=("gate",)), jax.random.key(0))
    with_lora = adapted(ours, LoRA(2))
    with pytest.raises(DpjaxError, match="adapters already"):
        add_lora(with_lora.config, with_lora.params, LoRA(2), jax.random.key(0))


def names_of(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def example(tokens):
    return {"tokens": jnp.asarray(tokens), "loss_mask": jnp.ones(len(tokens), bool)}


_gradient = jax.jit(jax.grad(lambda params, loss, row: loss(params, row)))


def gradient(loss, params, row):
    return _gradient(params, jax.tree_util.Partial(loss), row)


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_bias_tuning_trains_biases_alone(checkpoint, name):
    _, _, ours, tokens = checkpoint(name)
    config, trainable, frozen = prepare_tuning(ours.config, ours.params, "bias")
    assert config == ours.config
    trained = names_of(trainable)
    assert trained == [n for n in names_of(ours.params) if n.endswith("/bias")]
    assert len(trained) == {"gpt2": 6 + 2 + 1, "qwen2": 3}[name]
    assert not any(n.endswith("/bias") for n in names_of(frozen))
    assert_same(combine(trainable, frozen), ours.params)
    row = example(tokens)
    whole = gradient(language_model_loss(config), ours.params, row)
    part = gradient(tuned_loss(config, frozen), trainable, row)
    wanted, _ = partition(whole, lambda path: path.endswith("/bias"))
    assert jax.tree.structure(part) == jax.tree.structure(trainable)
    for found, expected in zip(jax.tree.leaves(part), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    # A step on the biases lowers the loss and leaves everything else as it was.
    joined = combine(jax.tree.map(lambda x, g: x - 0.1 * g, trainable, part), frozen)
    same = dict(zip(names_of(joined), jax.tree.leaves(joined), strict=True))
    for path, leaf in zip(names_of(frozen), jax.tree.leaves(frozen), strict=True):
        np.testing.assert_array_equal(same[path], leaf)
    loss = jax.jit(language_model_loss(config))
    assert loss(joined, row) < loss(ours.params, row) - 1e-4


def test_no_biases_to_train_in_llama(checkpoint):
    ours = checkpoint("llama")[2]
    with pytest.raises(DpjaxError) as caught:
        prepare_tuning(ours.config, ours.params, "bias")
    message = one_line(caught)
    assert "'bias'" in message and "no biases" in message and "lora" in message


@pytest.mark.parametrize(
    ("name", "last", "stacked"),
    [("llama", 1, True), ("gemma3", 2, True), ("gemma3", 1, False), ("gpt2", 3, True)],
)
def test_last_layers_tuning_is_full_training_restricted(checkpoint, name, last, stacked):
    _, _, ours, tokens = checkpoint(name)
    layers = ours.config.num_layers
    start, params = with_segments(ours.config, ours.params, (layers,) if stacked else ())
    config, trainable, frozen = prepare_tuning(start, params, "last_layers", last_layers=last)
    joined = combine(trainable, frozen)
    expected = hub.our_logits(ours.config, ours.params, tokens)
    assert gap(hub.our_logits(config, joined, tokens), expected) < 2e-5
    row = example(tokens)
    part = gradient(tuned_loss(config, frozen), trainable, row)
    whole = gradient(language_model_loss(ours.config), ours.params, row)
    # Full gradients, regrouped and cut down to the last layers by hand.
    _, apart = with_segments(ours.config, whole, ())
    _, found = with_segments(config, zeros_for_none(part, joined), ())
    found_names = [
        n for n, x in zip(names_of(found), jax.tree.leaves(found), strict=True) if x.any()
    ]
    kept = tuple(f"blocks/{n}/" for n in range(layers - last, layers))
    wanted = [n for n in names_of(apart) if n.startswith((*kept, "final_norm/", "head/"))]
    zero = [n for n in wanted if n not in found_names]
    assert all(n.endswith("key/bias") for n in zero)  # to which the softmax is blind
    assert set(found_names) <= set(wanted)
    assert ("head/kernel" in wanted) == (not ours.config.tied)
    theirs = dict(zip(names_of(apart), jax.tree.leaves(apart), strict=True))
    mine = dict(zip(names_of(found), jax.tree.leaves(found), strict=True))
    for path in wanted:
        np.testing.assert_allclose(mine[path], theirs[path], rtol=2e-4, atol=2e-6, err_msg=path)


def zeros_for_none(part, like):
    return jax.tree.map(
        lambda g, x: jnp.zeros_like(x) if g is None else g, part, like, is_leaf=lambda x: x is None
    )


@pytest.mark.parametrize("last", [0, 4, -1])
def test_last_layers_must_exist(checkpoint, last):
    ours = checkpoint("llama")[2]
    with pytest.raises(DpjaxError) as caught:
        prepare_tuning(ours.config, ours.params, "last_layers", last_layers=last)
    assert f"last_layers is {last}" in one_line(caught)


def test_lora_tuning_trains_adapters_alone(checkpoint):
    _, _, ours, tokens = checkpoint("gemma3")
    config, trainable, frozen = prepare_tuning(
        ours.config, ours.params, "lora", lora=LoRA(2, targets=("key", "up")), key=jax.random.key(3)
    )
    assert all(n.endswith(("/lora_a", "/lora_b")) for n in names_of(trainable))
    assert len(names_of(trainable)) == 4
    joined = combine(trainable, frozen)
    assert names_of(frozen) == names_of(ours.params)
    part = gradient(tuned_loss(config, frozen), trainable, example(tokens))
    whole, _ = partition(
        gradient(language_model_loss(config), joined, example(tokens)),
        lambda path: path.endswith(("lora_a", "lora_b")),
    )
    for found, expected in zip(jax.tree.leaves(part), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    moving = {
        n: bool(np.any(x)) for n, x in zip(names_of(part), jax.tree.leaves(part), strict=True)
    }
    # With B = 0 the loss is flat in A, and not in B.
    assert all(seen == n.endswith("lora_b") for n, seen in moving.items())


def test_full_tuning_trains_everything(checkpoint):
    ours = checkpoint("qwen3")[2]
    config, trainable, frozen = prepare_tuning(ours.config, ours.params, "full")
    assert not jax.tree.leaves(frozen)
    assert_same(combine(trainable, frozen), ours.params)


@pytest.mark.parametrize("part", ["kernel", "attention", "blocks/0", "nothing", ""])
def test_combine_reverses_partition(checkpoint, part):
    params = checkpoint("gemma3")[2].params
    chosen, others = partition(params, lambda path: part in path)
    assert_same(combine(chosen, others), params)
    assert_same(combine(others, chosen), params)
    assert sorted(names_of(chosen) + names_of(others)) == sorted(names_of(params))
    assert names_of(chosen) == [n for n in names_of(params) if part in n]
