"""Private prediction: sensitivity by brute force, the distribution drawn from, and its cost."""

import itertools
import math

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dp_accounting import rdp
from scipy import optimize, special, stats

from dpjax import private_prediction
from dpjax.data import byte_tokenizer
from dpjax.errors import DpjaxError
from dpjax.models import (
    DecoderConfig,
    apply,
    apply_cached,
    decoder_config,
    init_caches,
    init_params,
)
from dpjax.private_prediction import (
    PrivatePrediction,
    assign_batches,
    longest_prompt,
    predict_texts,
    prompt_private,
    prompt_public,
    sum_of_clipped_differences,
    token_logits,
)
from dpjax.types import NeighboringRelation

VOCABULARY = 7
CONFIG = DecoderConfig(
    vocabulary_size=VOCABULARY,
    num_layers=1,
    d_model=16,
    num_heads=2,
    num_kv_heads=1,
    d_ff=16,
    tied=False,
)
RECORDS = [[1, 5, 2], [1, 3, 3, 4, 2], [1, 6, 6, 2]]
PUBLIC = [1, 2]
MECHANISM = PrivatePrediction(batch_size=2, max_new_tokens=2, temperature=0.8, logit_clip=1.5)


@pytest.fixture(scope="module")
def params():
    # Peaked enough for records to matter.
    return jax.tree.map(lambda x: 8 * x, init_params(CONFIG, jax.random.key(3)))


@jax.jit
def padded_logits(params, tokens):
    return apply(CONFIG, params, tokens)


def model_logits(params, tokens):
    padded = np.zeros(16, np.int32)
    padded[: len(tokens)] = tokens
    return np.asarray(padded_logits(params, padded)[len(tokens) - 1], np.float64)


def aggregated(params, mechanism, records, public, text, normalize_by=None):
    """float64, one record after another: the formula itself."""
    base = model_logits(params, public + text)
    total = np.zeros(VOCABULARY)
    for record in records:
        difference = model_logits(params, record + text) - base
        total += np.clip(difference, -mechanism.logit_clip, mechanism.logit_clip)
    return base + total / (normalize_by or mechanism.batch_size)


def predict(params, records, public, key, mechanism=MECHANISM, **settings):
    settings = {"max_prompt_tokens": 5, "microbatch_size": 2, **settings}
    return predict_texts(CONFIG, params, mechanism, records, public, key, **settings)


# What it costs


def renyi(p, q, alpha):
    if alpha == 1.0:
        return np.sum(p * np.log(p / q))
    return special.logsumexp(alpha * np.log(p) + (1 - alpha) * np.log(q)) / (alpha - 1)


def worst_renyi_over_alpha(mechanism, size):
    """Largest D_alpha / alpha over orders, base logits and what one record may do to them."""
    worst = 0.0
    grid = np.linspace(-3, 3, 13) if size == 2 else np.linspace(-3, 3, 5)
    for moves in itertools.product([-50.0, 0.0, 50.0], repeat=size):
        for base in itertools.product(grid, repeat=size - 1):
            public = np.array([0.0, *base])
            clipped = np.clip(moves, -mechanism.logit_clip, mechanism.logit_clip)
            p, q = (
                special.softmax((public + moved) / mechanism.temperature)
                for moved in (clipped / mechanism.batch_size, 0.0)
            )
            for alpha in (1.0, 1.5, 2.0, 4.0, 16.0, 64.0):
                worst = max(worst, *(renyi(*o, alpha) / alpha for o in ((p, q), (q, p))))
    return worst


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("settings", [(10, 1.0, 1.0), (2, 0.7, 0.9), (1, 1.0, 2.0)])
def test_a_draws_zcdp_covers_the_worst_pair_and_is_nearly_attained(settings, size):
    batch_size, temperature, clip = settings
    mechanism = PrivatePrediction(batch_size, 1, temperature, clip)
    worst = worst_renyi_over_alpha(mechanism, size)
    assert worst <= mechanism.zcdp_per_token * (1 + 1e-9)
    # Power: two thirds of the claimed rho is refuted where the range is not huge.
    assert worst > 0.667 * mechanism.zcdp_per_token


def test_small_ranges_attain_the_bound():
    mechanism = PrivatePrediction(10, 1, logit_clip=1.0)
    half = mechanism.sensitivity  # eta / 2, in units of the temperature
    p, q = (special.softmax([a, 0.0]) for a in (half, -half))
    assert renyi(p, q, 1.0) == pytest.approx(mechanism.zcdp_per_token, rel=0.01)


def test_the_pair_comes_from_the_code_that_draws():
    """The worst pair of the test above, through the functions that the draw uses."""
    mechanism = PrivatePrediction(4, 1, temperature=0.5, logit_clip=0.4)
    public = jnp.array([0.1, -0.1])  # the record tilts it to the other side
    record = jnp.array([[-9.0, 9.0]])
    drawn = []
    for is_absent in (False, True):
        total = sum_of_clipped_differences(record, public, jnp.array([is_absent]), 0.4)
        drawn.append(special.softmax(np.asarray(token_logits(mechanism, public, total), float)))
    found = renyi(*drawn, 1.0)
    assert 0.98 * mechanism.zcdp_per_token < found <= mechanism.zcdp_per_token * (1 + 1e-5)
    ratio = np.log(drawn[0] / drawn[1])
    assert np.ptp(ratio) == pytest.approx(2 * 0.4 / (4 * 0.5), rel=1e-5)  # eta


def concentrated_epsilon(rho, delta):
    """min over real alpha of the Renyi conversion of Canonne, Kamath and Steinke (2020)."""

    def at(log_alpha):
        alpha = 1 + math.exp(log_alpha)
        return (
            rho * alpha + math.log1p(-1 / alpha) - (math.log(delta) + math.log(alpha)) / (alpha - 1)
        )

    return optimize.minimize_scalar(at, bounds=(-4, 8), method="bounded").fun


@pytest.mark.parametrize("clip", [0.3, 1.0, 5.0])
def test_epsilon_is_that_of_the_summed_zcdp(clip):
    mechanism = PrivatePrediction(20, 50, temperature=0.9, logit_clip=clip)
    rho = 50 * clip**2 / (2 * 20**2 * 0.9**2)
    assert 50 * mechanism.zcdp_per_token == pytest.approx(rho)
    orders = np.array([*np.arange(1.01, 60, 0.01), *np.arange(60, 2000)])
    accountant = rdp.RdpAccountant(orders).compose(dp_accounting.ZCDpEvent(rho))
    found = mechanism.epsilon(1e-6)
    assert found == pytest.approx(accountant.get_epsilon(1e-6), rel=0.02)
    assert found == pytest.approx(concentrated_epsilon(rho, 1e-6), rel=0.02)
    assert found >= concentrated_epsilon(rho, 1e-6) * (1 - 1e-6)  # the optimum over all orders
    assert found < rho + 2 * math.sqrt(rho * math.log(1e6))  # Bun and Steinke (2016)
    for wrong in (2 / 3, 3 / 2):
        assert found != pytest.approx(concentrated_epsilon(wrong * rho, 1e-6), rel=0.05)


@pytest.mark.parametrize("target", [0.5, 3.0, 20.0])
def test_calibration_inverts_epsilon(target):
    made = PrivatePrediction(30, 80, 1.2, target_epsilon=target, target_delta=1e-6)
    assert target * 0.998 < made.epsilon(1e-6) <= target
    again = PrivatePrediction(30, 80, 1.2, logit_clip=made.logit_clip)
    assert again.dp_event == made.dp_event
    twice = PrivatePrediction(60, 80, 1.2, target_epsilon=target, target_delta=1e-6)
    assert twice.logit_clip == pytest.approx(2 * made.logit_clip)


def test_the_event_is_of_every_token_under_add_or_remove_one():
    assert MECHANISM.dp_event == dp_accounting.SelfComposedDpEvent(
        dp_accounting.ZCDpEvent(MECHANISM.zcdp_per_token), 2
    )
    assert MECHANISM.neighboring_relation is NeighboringRelation.ADD_OR_REMOVE_ONE


# Sensitivity


def test_one_record_moves_real_logits_by_at_most_the_sensitivity(params):
    """Added, removed or zeroed out, at every token of a text; and clipping makes it tight."""
    text, largest = [4, 0, 6, 1], 0.0
    for length in range(len(text) + 1):
        prefix = text[:length]
        public = jnp.array(model_logits(params, PUBLIC + prefix), jnp.float32)
        rows = [model_logits(params, r + prefix) for r in RECORDS]

        def code(rows, public=public):
            rows = jnp.array(rows, jnp.float32).reshape(-1, VOCABULARY)
            total = sum_of_clipped_differences(
                rows, public, jnp.zeros(len(rows), bool), MECHANISM.logit_clip
            )
            return np.asarray(token_logits(MECHANISM, public, total)) * MECHANISM.temperature

        whole = code(rows)
        wanted = aggregated(params, MECHANISM, RECORDS, PUBLIC, prefix)
        np.testing.assert_allclose(whole, wanted, atol=1e-5)
        for left_out in range(len(rows)):
            removed = code(rows[:left_out] + rows[left_out + 1 :])
            zeroed = code([*rows[:left_out], np.asarray(public), *rows[left_out + 1 :]])
            np.testing.assert_allclose(removed, zeroed, atol=1e-5)
            largest = max(largest, np.abs(whole - removed).max())
            assert np.abs(whole - removed).max() <= MECHANISM.sensitivity * (1 + 1e-5)
        # A hostile record, far outside of what models say.
        hostile = code([*rows, np.where(np.arange(VOCABULARY) % 2, 1e30, -1e30)])
        np.testing.assert_allclose(np.abs(hostile - whole), MECHANISM.sensitivity, rtol=1e-4)
    assert largest > 0.999 * MECHANISM.sensitivity


def test_the_normaliser_is_public():
    public, rows = jnp.zeros(VOCABULARY), jnp.ones((6, VOCABULARY)) * jnp.arange(7.0)[None]
    moved = []
    for count in (1, 2, 6):
        total = sum_of_clipped_differences(rows[:count], public, jnp.zeros(count, bool), 1.5)
        moved.append(np.asarray(token_logits(MECHANISM, public, total)))
    np.testing.assert_allclose(moved[1], 2 * moved[0], rtol=1e-6)
    np.testing.assert_allclose(moved[2], 6 * moved[0], rtol=1e-6)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_padding_and_logits_that_are_not_finite_add_exactly_nothing(bad):
    key = jax.random.key(0)
    public, rows = jax.random.normal(key, (7,)), 3 * jax.random.normal(key, (4, 7))
    present = jnp.zeros(4, bool)
    spoilt = rows.at[1, 3].set(bad)
    without = sum_of_clipped_differences(rows, public, present.at[1].set(True), 1.0)
    assert np.array_equal(without, sum_of_clipped_differences(spoilt, public, present, 1.0))
    padded = sum_of_clipped_differences(spoilt, public, present.at[1].set(True), 1.0)
    assert np.array_equal(without, padded)
    nobody = sum_of_clipped_differences(rows, public, ~present, 1.0)
    assert np.array_equal(nobody, np.zeros(7))


def test_bfloat16_logits_are_summed_in_float32():
    rows = jnp.full((300, 2), 1.0, jnp.bfloat16)
    total = sum_of_clipped_differences(rows, jnp.zeros(2, jnp.bfloat16), jnp.zeros(300, bool), 1.0)
    assert total.dtype == jnp.float32 and np.array_equal(total, [300.0, 300.0])


def test_tokens_that_the_public_logits_exclude_are_not_looked_at():
    public = jnp.array([0.0, -jnp.inf, 1.0])
    rows = jnp.array([[2.0, 5.0, 1.0], [2.0, -jnp.inf, 0.0]])
    total = sum_of_clipped_differences(rows, public, jnp.zeros(2, bool), 1.0)
    np.testing.assert_allclose(total, [2.0, 0.0, -1.0])
    assert token_logits(MECHANISM, public, total)[1] == -np.inf


def test_a_records_logits_do_not_depend_on_its_neighbours_or_place(params):
    """Bit for bit, in a chunk of one shape."""

    def logits(rows):
        prompts, lengths = np.zeros((4, 5), np.int32), np.array([len(r) for r in rows], np.int32)
        for row, prompt in zip(prompts, rows, strict=True):
            row[: len(prompt)] = prompt
        one = lambda t, n: apply_cached(CONFIG, params, t, init_caches(CONFIG, 5), 0, n - 1)[0]  # noqa: E731
        return np.asarray(jax.jit(jax.vmap(one))(prompts, lengths))

    first = logits([RECORDS[0], RECORDS[1], [1], [1]])[0]
    last = logits([RECORDS[2], [1], [1], RECORDS[0]])[3]
    assert np.array_equal(first, last)


# What is drawn


def joint_counts(texts):
    counts = np.zeros((VOCABULARY, VOCABULARY))
    for text in texts:
        counts[tuple(text)] += 1
    return counts.ravel()


def joint_distribution(params, mechanism, records, **changes):
    first = aggregated(params, mechanism, records, PUBLIC, [], **changes)
    p = special.softmax(first / mechanism.temperature)
    rows = [aggregated(params, mechanism, records, PUBLIC, [t], **changes) for t in range(7)]
    return (p[:, None] * special.softmax(np.array(rows) / mechanism.temperature, axis=1)).ravel()


def chi_square_p_value(counts, distribution):
    expected = counts.sum() * distribution
    rare = expected < 5
    found = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    return stats.chisquare(found, wanted * found.sum() / wanted.sum()).pvalue


@pytest.fixture(scope="module")
def drawn(params):
    draws = 2000
    key = jax.random.key(11)
    return joint_counts(predict(params, [RECORDS] * draws, [PUBLIC] * draws, key))


def test_two_tokens_follow_the_mechanisms_distribution(params, drawn):
    right = joint_distribution(params, MECHANISM, RECORDS)
    assert chi_square_p_value(drawn, right) > 1e-3
    # Power: the realised batch size, no records, another clip and temperature are all refuted.
    other = PrivatePrediction(2, 2, temperature=0.8, logit_clip=1.5 * 2 / 3)
    hot = PrivatePrediction(2, 2, temperature=0.8 * 3 / 2, logit_clip=1.5)
    for wrong in (
        joint_distribution(params, MECHANISM, RECORDS, normalize_by=3),
        joint_distribution(params, MECHANISM, []),
        joint_distribution(params, MECHANISM, RECORDS[:2]),
        joint_distribution(params, other, RECORDS),
        joint_distribution(params, hot, RECORDS),
    ):
        assert chi_square_p_value(drawn, wrong) < 1e-6


def test_an_empty_batch_draws_from_the_public_prompt(params, drawn):
    draws = 1000
    texts = predict(params, [[]] * draws, [PUBLIC] * draws, jax.random.key(2))
    public = joint_distribution(params, MECHANISM, [])
    assert chi_square_p_value(joint_counts(texts), public) > 1e-3
    assert chi_square_p_value(drawn, public) < 1e-6


def test_a_long_text_equals_one_forward_pass_after_another(params):
    """At a temperature that leaves no chance, through many chunks and cached tokens."""
    mechanism = PrivatePrediction(1, 8, temperature=1e-3, logit_clip=2.0)
    text: list[int] = []
    for _ in range(8):
        text.append(int(np.argmax(aggregated(params, mechanism, RECORDS, PUBLIC, text))))
    key = jax.random.key(0)
    for size in (1, 2):
        found = predict(params, [RECORDS], [PUBLIC], key, mechanism, microbatch_size=size)
        assert found == [text]
    assert text != predict(params, [[]], [PUBLIC], key, mechanism)[0]


def test_removing_a_record_touches_the_text_of_its_batch_alone(params):
    """What makes any number of texts cost as much as one."""
    records = [[1, a, b, 2] for a in range(7) for b in range(4)]
    batches = assign_batches([str(r) for r in records], 4, seed=1)
    mechanism = PrivatePrediction(2, 12, logit_clip=20.0)

    def texts(left_out=None):
        prompts = [
            [r for i, r in enumerate(records) if batches[i] == b and i != left_out]
            for b in range(4)
        ]
        return predict(
            params, prompts, [PUBLIC] * 4, jax.random.key(6), mechanism, microbatch_size=4
        )

    whole, touched = texts(), 0
    for left_out in range(0, 28, 3):
        for batch, (a, b) in enumerate(zip(whole, texts(left_out), strict=True)):
            assert a == b or batch == batches[left_out]
            touched += a != b
    assert touched >= 2


def test_padding_and_other_texts_change_nothing(params):
    """The same text whatever room the largest batch and the longest prompt make."""
    mechanism = PrivatePrediction(2, 12, logit_clip=1.5)
    key = jax.random.key(4)
    alone = predict(params, [RECORDS], [PUBLIC], key, mechanism)[0]
    beside = predict(params, [RECORDS, RECORDS * 3], [PUBLIC] * 2, key, mechanism)
    assert beside[0] == alone
    assert predict(params, [RECORDS], [PUBLIC], key, mechanism, max_prompt_tokens=9)[0] == alone
    assert predict(params, [RECORDS], [PUBLIC], key, mechanism, microbatch_size=8)[0] == alone
    assert predict(params, [RECORDS[::-1]], [PUBLIC], key, mechanism)[0] == alone


def test_a_record_with_nan_logits_counts_as_removed(params):
    mechanism = PrivatePrediction(2, 12, logit_clip=1.5, public_top_k=6)
    # Only contexts with token 5 read its embedding; it is never drawn in this test's texts.
    table = params["embedding"]["embedding"].at[5].set(jnp.nan)
    spoilt = {**params, "embedding": {**params["embedding"], "embedding": table}}
    kernel = params["head"]["kernel"].at[:, 5].set(0.0)
    spoilt = {**spoilt, "head": {**params["head"], "kernel": kernel}}
    checked = 0
    for seed in range(8):
        key = jax.random.key(seed)
        try:
            found = predict(spoilt, [RECORDS], [PUBLIC], key, mechanism)  # RECORDS[0] has a 5
        except DpjaxError:  # 5 was drawn, and the public prompt has it as well
            continue
        assert found == predict(spoilt, [RECORDS[1:]], [PUBLIC], key, mechanism)
        checked += 1
    assert checked >= 2


def test_public_logits_that_are_not_finite_are_refused(params):
    table = params["embedding"]["embedding"].at[2].set(jnp.nan)
    spoilt = {**params, "embedding": {**params["embedding"], "embedding": table}}
    with pytest.raises(DpjaxError, match="public logits of text 0 are not finite"):
        predict(spoilt, [RECORDS], [PUBLIC], jax.random.key(0))


def test_a_stop_token_ends_a_text_and_costs_as_much(params):
    mechanism = PrivatePrediction(2, 12, logit_clip=1.5)
    key = jax.random.key(1)
    free = predict(params, [RECORDS], [PUBLIC], key, mechanism)[0]
    assert len(free) == 12
    stop = free[5]
    cut = predict(params, [RECORDS], [PUBLIC], key, mechanism, stop_token=stop)[0]
    assert cut == free[: free.index(stop)]
    both = predict(params, [RECORDS], [PUBLIC], key, mechanism, stop_token=[free[0], stop])[0]
    assert both == []
    assert mechanism.dp_event.count == 12


def test_public_top_k_is_the_public_prompts(params):
    mechanism = PrivatePrediction(2, 1, logit_clip=50.0, public_top_k=2)
    allowed = set(np.argsort(model_logits(params, PUBLIC))[-2:].tolist())
    texts = predict(params, [RECORDS] * 60, [PUBLIC] * 60, jax.random.key(5), mechanism)
    assert {token for text in texts for token in text} <= allowed
    # Power: without the cut the records bring others in.
    free = PrivatePrediction(2, 1, logit_clip=50.0)
    texts = predict(params, [RECORDS] * 60, [PUBLIC] * 60, jax.random.key(5), free)
    assert not {token for text in texts for token in text} <= allowed


def test_keys_decide_texts_and_every_text_and_token_has_its_own():
    flat = init_params(CONFIG, jax.random.key(3))  # nearly uniform: chance decides
    mechanism = PrivatePrediction(2, 8, logit_clip=0.1)

    def texts(seed, count):
        return np.array(
            predict(flat, [[]] * count, [PUBLIC] * count, jax.random.key(seed), mechanism)
        )

    found = texts(0, 300)
    assert np.array_equal(found, texts(0, 300))
    assert np.array_equal(found[:5], texts(0, 5))  # a text does not depend on how many follow
    other = texts(1, 300)
    # Equal tokens at the same place of: another key's text, the next text, the next token.
    for a, b in ((found, other), (found[1:], found[:-1]), (found[:, 1:], found[:, :-1])):
        agreement, chance = np.mean(a == b), 1 / VOCABULARY
        assert abs(agreement - chance) < 5 * math.sqrt(chance / a.size) + 0.02  # not quite uniform


def test_one_compilation_for_all_texts(params):
    mechanism = PrivatePrediction(3, 3, logit_clip=1.25)
    before = private_prediction._write._cache_size()
    batches = [RECORDS, [], RECORDS[:1], RECORDS * 2]
    predict(params, batches, [PUBLIC, [1], PUBLIC, [1, 2, 3]], jax.random.key(0), mechanism)
    assert private_prediction._write._cache_size() == before + 1


def test_other_architectures():
    config = decoder_config("nano", 300)  # several layers, scanned or not as the preset says
    params = init_params(config, jax.random.key(0))
    mechanism = PrivatePrediction(2, 4, logit_clip=1.0)
    texts = predict_texts(
        config,
        params,
        mechanism,
        [[[1, 2], [7]], []],
        [[1], [2]],
        jax.random.key(1),
        max_prompt_tokens=4,
    )
    assert [len(text) for text in texts] == [4, 4]
    assert (
        predict_texts(config, params, mechanism, [], [], jax.random.key(1), max_prompt_tokens=4)
        == []
    )


# Batches and prompts


@pytest.mark.parametrize("kind", [str, int])
def test_a_record_stays_where_it_is_when_others_come_and_go(kind):
    records = [kind(i) for i in range(3000)]
    batches = assign_batches(records, 10, seed=3)
    kept = np.arange(3000) % 7 != 0
    fewer = assign_batches([r for r, k in zip(records, kept, strict=True) if k], 10, seed=3)
    assert np.array_equal(batches[kept], fewer)
    assert np.array_equal(batches[::-1], assign_batches(records[::-1], 10, seed=3))
    sizes = np.bincount(batches, minlength=10)
    assert stats.chisquare(sizes).pvalue > 1e-3 and sizes.min() != sizes.max()
    other = assign_batches(records, 10, seed=4)
    table = stats.contingency.crosstab(batches, other).count
    assert stats.chi2_contingency(table).pvalue > 1e-3
    assert batches.dtype == np.int64


def test_duplicates_share_a_batch_and_types_do_not_mix():
    batches = assign_batches(["a", "b", "a", "\ud800"], 1000, seed=0)
    assert batches[0] == batches[2] != batches[1]
    assert assign_batches(["7"], 10**6, 0) != assign_batches([7], 10**6, 0)
    assert np.array_equal(assign_batches([7, 8], 99, 0), assign_batches(np.array([7, 8]), 99, 0))


def test_prompts_have_public_lengths():
    tokenizer = byte_tokenizer()
    bound = longest_prompt(tokenizer, 10)
    short, long = (prompt_private(tokenizer, r, 10) for r in ("ab", "a record of many bytes"))
    assert len(short) == bound - 8 and len(long) == bound
    wanted = "Here is a text:\na record o\nHere is another of the same kind:\n"
    assert tokenizer.decode(long) == wanted
    assert long[0] == prompt_public(tokenizer)[0] == tokenizer.bos_id
    # Braces in a record are text.
    assert "{record}" in tokenizer.decode(prompt_private(tokenizer, "{record}", 10))


# What it refuses


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 2.5}, "batch_size is 2.5"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": 0.0}, "temperature is 0.0; the random draw is what protects"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"logit_clip": 0.0}, "logit_clip is 0.0"),
        ({"logit_clip": math.inf}, "logit_clip is inf"),
        ({"logit_clip": None}, "give either logit_clip or both targets"),
        ({"target_epsilon": 1.0}, "give either logit_clip or both targets"),
        ({"logit_clip": None, "target_epsilon": 1.0}, "target_delta is None; give either"),
        ({"logit_clip": None, "target_epsilon": -1.0, "target_delta": 0.1}, "target_epsilon is -1"),
        ({"public_top_k": 0}, "public_top_k is 0"),
    ],
)
def test_bad_settings_are_one_line(settings, words):
    with pytest.raises(DpjaxError, match=words) as caught:
        PrivatePrediction(**{"batch_size": 2, "max_new_tokens": 3, "logit_clip": 1.0, **settings})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"public": []}, "1 batches and 0 public prompts"),
        ({"public": [[]]}, "public prompt of text 0 has 0 tokens"),
        ({"records": [[[1] * 6]]}, "private prompt of text 0 has 6 tokens, not 1 to"),
        ({"records": [[[99]]]}, "private prompt of text 0 has a token outside the vocabulary of 7"),
        ({"public": [[-1]]}, "public prompt of text 0 has a token outside"),
        ({"key": None}, "key is None"),
        ({"microbatch_size": 0}, "microbatch_size is 0"),
    ],
)
def test_bad_prompts_are_one_line_without_content(params, changes, words):
    call = {"records": [RECORDS], "public": [PUBLIC], "key": jax.random.key(0), **changes}
    with pytest.raises(DpjaxError, match=words) as caught:
        predict(params, **call)
    assert "\n" not in str(caught.value) and "99" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: MECHANISM.epsilon(1e-6, "pld"), "accountant is 'pld'.*use 'rdp'"),
        (lambda: MECHANISM.epsilon(2.0), "delta is 2.0"),
        (lambda: assign_batches(["a"], 0, 1), "num_batches is 0"),
        (lambda: assign_batches([1.5], 2, 1), "a record is a float"),
        (lambda: prompt_private(byte_tokenizer(), "a", 3, "no place"), "exactly once"),
        (lambda: longest_prompt(byte_tokenizer(), 0), "max_record_tokens is 0"),
    ],
)
def test_other_refusals_are_one_line(call, words):
    with pytest.raises(DpjaxError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_learned_positions_are_not_overrun():
    config = DecoderConfig(**{**CONFIG.__dict__, "positions": "learned", "max_positions": 6})
    params = init_params(config, jax.random.key(0))
    with pytest.raises(DpjaxError, match="beyond the model's 6 positions"):
        predict_texts(
            config, params, MECHANISM, [[]], [[1]], jax.random.key(0), max_prompt_tokens=5
        )
    texts = predict_texts(
        config, params, MECHANISM, [[[1, 2]]], [[1]], jax.random.key(0), max_prompt_tokens=4
    )
    assert len(texts[0]) == 2
