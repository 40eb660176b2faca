"""Membership inference: scores from what a model says of a text's tokens. Higher = member."""

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpjax.auditing.curves import attack_result
from dpjax.auditing.results import AttackResult
from dpjax.auditing.scoring import TokenStatistics, score_examples, token_statistics
from dpjax.data import Dataset, Tokenizer
from dpjax.errors import DpjaxError
from dpjax.models import DecoderConfig, apply
from dpjax.types import LossFn, PyTree, RandomKey, TrainingData, require_key

ONE_DISTRIBUTION = "members and non-members are from one distribution (see distribution_check)"


def loss_score(stats: TokenStatistics) -> np.ndarray:
    """Mean log-probability of the counted tokens: float64[N].

    Source: Yeom et al. (2018).

    Example:
      >>> ones = np.ones((1, 2), np.float32)
      >>> loss_score(TokenStatistics(-ones, -ones, ones, np.array([[True, True]])))
      array([-1.])
    """
    return _mean(stats.log_probs, _counted(stats))


def zlib_score(stats: TokenStatistics, texts: Sequence[str]) -> np.ndarray:
    """Total log-probability for each byte that zlib needs: float64[N].

    Text that is plain to a compressor is plain to a model, seen or not.

    Args:
      texts: N, what the sequences spell.

    Source: Carlini et al. (2021), section 5.2.

    Example:
      >>> ones = np.ones((1, 2), np.float32)
      >>> zlib_score(TokenStatistics(-ones, -ones, ones, np.array([[True, True]])), ["ab"])
      array([-0.2])
    """
    mask = _counted(stats)
    if len(texts) != len(mask):
        raise DpjaxError(f"there are {len(texts)} texts for {len(mask)} sequences; give one each")
    sizes = np.array([len(zlib.compress(text.encode())) for text in texts], np.float64)
    return np.sum(np.where(mask, stats.log_probs, 0.0), axis=1, dtype=np.float64) / sizes


def min_k_score(stats: TokenStatistics, k: float = 0.2) -> np.ndarray:
    """Mean log-probability of the share ``k`` of tokens that are least likely: float64[N].

    Source: Shi et al. (2024), "Detecting pretraining data from large language models".

    Example:
      >>> values = np.array([[-5.0, -1.0, -1.0, -1.0]], np.float32)
      >>> mask = np.ones((1, 4), bool)
      >>> min_k_score(TokenStatistics(values, values, values, mask), 0.25)
      array([-5.])
    """
    return _lowest(stats.log_probs, _counted(stats), k)


def min_k_plus_plus_score(stats: TokenStatistics, k: float = 0.2) -> np.ndarray:
    """The same of log-probabilities standardised by the model's own distribution: float64[N].

    Source: Zhang et al. (2025), "Min-K%++", section 4.

    Example:
      >>> low, mask = np.array([[-5.0, -1.0]], np.float32), np.ones((1, 2), bool)
      >>> mean, stddev = np.full((1, 2), -2.0, np.float32), np.full((1, 2), 0.5, np.float32)
      >>> min_k_plus_plus_score(TokenStatistics(low, mean, stddev, mask), 0.5)
      array([-6.])
    """
    # A distribution that is all on one token has no spread; its token is what was expected.
    spread = np.maximum(stats.stddev.astype(np.float64), 1e-6)
    return _lowest((stats.log_probs - stats.mean) / spread, _counted(stats), k)


def reference_score(stats: TokenStatistics, reference: TokenStatistics) -> np.ndarray:
    """Mean log-probability minus that under a model that did not see the members: float64[N].

    Source: Carlini et al. (2021), section 5.2; Mireshghallah et al. (2022).
    """
    if stats.mask.shape != reference.mask.shape or np.any(stats.mask != reference.mask):
        raise DpjaxError("the reference scored other sequences; give it the same ones")
    return loss_score(stats) - loss_score(reference)


def neighbourhood_score(
    config: DecoderConfig,
    params: PyTree,
    dataset: Dataset,
    *,
    key: RandomKey,
    num_neighbours: int = 10,
    num_replaced: int = 3,
    proposal: tuple[DecoderConfig, PyTree] | None = None,
    top: int = 20,
    batch_size: int = 64,
    **scoring: Any,
) -> np.ndarray:
    """Mean log-probability of a sequence minus that of its neighbours: float64[N].

    Neighbours differ in a few counted tokens, drawn uniformly from the ``top`` likeliest in their
    place according to the proposal model.

    Args:
      proposal: (config, params) of a model with the same vocabulary; default the attacked one.
      num_neighbours: for each sequence.
      num_replaced: tokens replaced in each, or all that count if there are fewer.
      scoring: ``devices``, ``cache``, ``progress`` of `token_statistics`.

    Source: Mattern et al. (2023), with a causal model's proposals.
    """
    if num_neighbours < 1 or num_replaced < 1 or top < 2:
        raise DpjaxError(
            f"num_neighbours is {num_neighbours}, num_replaced {num_replaced}, top {top}; use at "
            "least 1, 1 and 2"
        )
    scoring |= {"batch_size": batch_size}
    own = loss_score(token_statistics(config, params, dataset, **scoring))
    total = np.zeros(len(dataset))
    for number in range(num_neighbours):
        neighbours = _neighbours(
            *(proposal or (config, params)),
            dataset,
            jax.random.fold_in(require_key(key), number),
            num_replaced,
            top,
            batch_size,
        )
        total += loss_score(token_statistics(config, params, neighbours, **scoring))
    return own - total / num_neighbours


def membership_attacks(
    config: DecoderConfig,
    params: PyTree,
    members: Dataset,
    non_members: Dataset,
    *,
    tokenizer: Tokenizer | None = None,
    reference: tuple[DecoderConfig, PyTree] | None = None,
    neighbour_key: RandomKey | None = None,
    k: float = 0.2,
    confidence: float = 0.95,
    assumptions: Sequence[str] = (ONE_DISTRIBUTION,),
    **scoring: Any,
) -> list[AttackResult]:
    """Every attack on one model that the arguments allow, in one call.

    Args:
      members, non_members: sequences of one length.
      tokenizer: adds the zlib attack, on the decoded sequences.
      reference: (config, params) of a model that saw none of the members; adds the reference
        attack. The model before fine-tuning is a good one.
      neighbour_key: adds the neighbourhood attack.
      k: share of tokens for Min-K% and Min-K%++.
      scoring: ``batch_size``, ``devices``, ``cache``, ``progress`` of `token_statistics`.

    Example:
      >>> from dpjax.data import Record, byte_tokenizer, dataset_from_records
      >>> from dpjax.models import decoder_config, init_params
      >>> texts = [[Record(f"{who} {i}") for i in range(4)] for who in ("in", "out")]
      >>> members, others = (dataset_from_records(t, byte_tokenizer(), 8) for t in texts)
      >>> config = decoder_config("nano", byte_tokenizer().vocabulary_size)
      >>> params = init_params(config, jax.random.key(0))
      >>> [r.attack for r in membership_attacks(config, params, members, others)]
      ['loss', 'min_k', 'min_k_plus_plus']
    """
    groups = (members, non_members)
    found = [token_statistics(config, params, data, **scoring) for data in groups]
    scores: dict[str, list[np.ndarray]] = {
        "loss": [loss_score(s) for s in found],
        "min_k": [min_k_score(s, k) for s in found],
        "min_k_plus_plus": [min_k_plus_plus_score(s, k) for s in found],
    }
    if tokenizer is not None:
        scores["zlib"] = [
            zlib_score(s, _decoded(data, tokenizer)) for s, data in zip(found, groups, strict=True)
        ]
    if reference is not None:
        base = [token_statistics(*reference, data, **scoring) for data in groups]
        scores["reference"] = [reference_score(s, b) for s, b in zip(found, base, strict=True)]
    if neighbour_key is not None:
        scores["neighbourhood"] = [
            neighbourhood_score(
                config,
                params,
                data,
                key=jax.random.fold_in(require_key(neighbour_key), i),
                proposal=reference,
                **scoring,
            )
            for i, data in enumerate(groups)
        ]
    return [
        attack_result(name, inside, outside, assumptions=assumptions, confidence=confidence)
        for name, (inside, outside) in scores.items()
    ]


def loss_attacks(
    loss_fn: LossFn,
    params: PyTree,
    members: TrainingData,
    non_members: TrainingData,
    *,
    reference: tuple[LossFn, PyTree] | None = None,
    confidence: float = 0.95,
    assumptions: Sequence[str] = (ONE_DISTRIBUTION,),
    **scoring: Any,
) -> list[AttackResult]:
    """Membership from the losses of any model, text or not, in one call.

    Args:
      loss_fn: ``loss_fn(params, example) -> scalar`` for one example.
      members, non_members: data sets of what ``loss_fn`` takes.
      reference: (loss_fn, params) of a model that saw none of the members; adds the attack by the
        difference of both losses, which does not mistake easy examples for members.
      scoring: ``batch_size``, ``devices``, ``cache``, ``cache_name``, ``progress`` of
        `score_examples`.

    Source: Yeom et al. (2018); Carlini et al. (2021), section 5.2, for the reference.

    Example:
      >>> from dpjax.data import ArrayDataset
      >>> data = [ArrayDataset({"x": np.arange(n, n + 3, dtype=np.float32)}) for n in (0, 3)]
      >>> found = loss_attacks(lambda w, e: (w - e["x"]) ** 2, jnp.float32(1.0), *data)
      >>> found[0].attack, found[0].metrics["auc"].value
      ('loss', 1.0)
    """
    groups = (members, non_members)
    own = [-score_examples(loss_fn, params, data, **scoring) for data in groups]
    scores = {"loss": own}
    if reference is not None:
        if scoring.get("cache_name"):  # another loss of equal parameters is no hit
            scoring["cache_name"] += ", reference"
        base = [-score_examples(*reference, data, **scoring) for data in groups]
        scores["reference"] = [s - b for s, b in zip(own, base, strict=True)]
    return [
        attack_result(name, inside, outside, assumptions=assumptions, confidence=confidence)
        for name, (inside, outside) in scores.items()
    ]


def distribution_check(
    member_texts: Sequence[str],
    non_member_texts: Sequence[str],
    *,
    seed: int,
    confidence: float = 0.95,
) -> AttackResult:
    """Whether words alone tell members from non-members: then membership results are void.

    A bag-of-words logistic regression that never sees the model, scored on held-out folds. Its AUC
    should not be above 0.5 with this confidence; ``details["passed"]`` says whether it keeps to it.

    Raises:
      DpjaxError: fewer than 10 texts on a side, or no scikit-learn.

    Source: Duan et al. (2024); Das et al. (2025), "Blind baselines beat membership inference".

    Example:
      >>> same = [f"the {w} sat" for w in "abcdefghijklmnopqrst"]
      >>> distribution_check(same[:10], same[10:], seed=0).details["passed"]
      True
    """
    try:
        from sklearn.feature_extraction.text import CountVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedKFold, cross_val_predict
        from sklearn.pipeline import make_pipeline
    except ImportError:
        raise DpjaxError(
            "scikit-learn is not installed; install it with: pip install 'dpjax[auditing]'"
        ) from None
    count = min(len(member_texts), len(non_member_texts))
    if count < 10:
        raise DpjaxError(f"there are {count} texts on one side; give at least 10 on each")
    texts = [*member_texts, *non_member_texts]
    labels = np.arange(len(texts)) < len(member_texts)
    model = make_pipeline(
        CountVectorizer(token_pattern=r"(?u)\w+|[^\w\s]", binary=True),
        LogisticRegression(max_iter=2000),
    )
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    drawn = cross_val_predict(model, texts, labels, cv=folds, method="predict_proba")
    scores = np.asarray(drawn)[:, 1]
    result = attack_result(
        "bag of words, without the model",
        scores[labels],
        scores[~labels],
        confidence=confidence,
        assumptions=("it should fail: where it does not, membership results are void",),
    )
    passed = result.metrics["auc"].low <= 0.5
    result.details["passed"] = bool(passed)
    return result


def _counted(stats: TokenStatistics) -> np.ndarray:
    empty = int(np.sum(~np.any(stats.mask, axis=1)))
    if empty:
        raise DpjaxError(f"{empty} sequences have no token that counts; leave them out")
    return stats.mask


def _mean(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.sum(np.where(mask, values, 0.0), axis=1, dtype=np.float64) / mask.sum(axis=1)


def _lowest(values: np.ndarray, mask: np.ndarray, k: float) -> np.ndarray:
    if not 0 < k <= 1:
        raise DpjaxError(f"k is {k}; it is a share of the tokens in (0, 1], e.g. 0.2")
    # As in the published code: at least one token, and the share rounded down.
    counts = np.maximum(1, np.floor(k * mask.sum(axis=1) + 1e-9)).astype(np.int64)
    ranked = np.sort(np.where(mask, values.astype(np.float64), np.inf), axis=1)
    kept = np.arange(ranked.shape[1])[None] < counts[:, None]
    return np.sum(np.where(kept, ranked, 0.0), axis=1) / counts


def _decoded(data: Dataset, tokenizer: Tokenizer) -> list[str]:
    return [
        tokenizer.decode(row[mask].tolist())
        for row, mask in zip(data.tokens, data.loss_mask, strict=True)
    ]


def _neighbours(
    config: DecoderConfig,
    params: PyTree,
    dataset: Dataset,
    key: RandomKey,
    num_replaced: int,
    top: int,
    batch_size: int,
) -> Dataset:
    """The data set with a few counted tokens of each row replaced."""
    propose = _proposals(config, top, num_replaced)
    rows = []
    for start in range(0, len(dataset), batch_size):
        wanted = np.arange(start, start + batch_size)
        inside = wanted < len(dataset)
        batch = dataset.take(np.where(inside, wanted, start))
        keys = jax.random.split(jax.random.fold_in(key, start), batch_size)
        rows.append(np.asarray(propose(params, batch, keys))[inside])
    return Dataset(np.concatenate(rows), dataset.loss_mask, dataset.user_ids)


def _proposals(config: DecoderConfig, top: int, num_replaced: int) -> Callable:
    top = min(top, config.vocabulary_size)

    def one(params, tokens, mask, key):
        logits = apply(config, params, tokens[:-1])
        where_key, what_key = jax.random.split(key)
        # The places with the largest draws, of those that count.
        draws = jnp.where(mask[1:], jax.random.uniform(where_key, (len(tokens) - 1,)), -1.0)
        edge = jnp.sort(draws)[-min(num_replaced, len(tokens) - 1)]
        replaced = (draws >= edge) & (draws >= 0)
        _, likely = jax.lax.top_k(logits, top)
        chosen = jax.random.randint(what_key, (len(tokens) - 1,), 0, top)
        drawn = jnp.take_along_axis(likely, chosen[:, None], axis=1)[:, 0].astype(tokens.dtype)
        return tokens.at[1:].set(jnp.where(replaced, drawn, tokens[1:]))

    return jax.jit(
        lambda params, batch, keys: jax.vmap(one, (None, 0, 0, 0))(
            params, batch["tokens"], batch["loss_mask"], keys
        )
    )
