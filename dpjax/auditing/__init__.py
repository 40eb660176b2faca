"""Measuring what a model gives away: attacks, canaries, and lower bounds on epsilon.

Attacks take scores or a ``(loss_fn, params)`` pair, never a trainer. Scores are higher for members.
"""

from dpjax.auditing.bounds import (
    Guesses,
    audit_coins,
    guess_coins,
    mechanism_family,
    one_run,
    one_run_gaussian,
    one_run_profile,
    rejects_trade_off,
)
from dpjax.auditing.canaries import (
    CanarySet,
    canary_losses,
    extend_vocabulary,
    natural_canaries,
    new_token_canaries,
    random_token_canaries,
    unused_token_ids,
)
from dpjax.auditing.curves import attack_result, auc, roc_curve, tpr_at_fpr
from dpjax.auditing.discoverable import (
    Extraction,
    discoverable,
    extraction_attacks,
    extraction_probability,
    queries_needed,
    suffix_log_probabilities,
)
from dpjax.auditing.exposure import (
    Exposure,
    exposure_by_rank,
    exposure_by_sampling,
    exposure_by_skew_normal,
    rank_space,
)
from dpjax.auditing.extraction import completes_secrets
from dpjax.auditing.gradient_canaries import (
    CanaryRows,
    canary_scores,
    dirac_directions,
    random_directions,
    with_gradient_canaries,
)
from dpjax.auditing.insertion import fair_coins, insert
from dpjax.auditing.lira import (
    leave_one_out_targets,
    lira_offline,
    lira_online,
    logit_confidence,
    rmia,
)
from dpjax.auditing.matching import Match, NearDuplicate, SuffixIndex, near_duplicates
from dpjax.auditing.membership import (
    distribution_check,
    loss_attacks,
    loss_score,
    membership_attacks,
    min_k_plus_plus_score,
    min_k_score,
    neighbourhood_score,
    reference_score,
    zlib_score,
)
from dpjax.auditing.pii_attacks import (
    Ranking,
    pii_extraction,
    pii_inference,
    pii_reconstruction,
    rank_candidates,
)
from dpjax.auditing.ranked_generation import RankedTexts, Verification, ranked_generation, verify
from dpjax.auditing.rates import rate_difference, rate_result, success_rate
from dpjax.auditing.results import AttackResult, EpsilonBound, Interval, verdict
from dpjax.auditing.scoring import TokenStatistics, score_examples, token_statistics
from dpjax.auditing.shadow import (
    ShadowModels,
    balanced_inclusion,
    score_shadow_models,
    train_shadow_models,
)
from dpjax.auditing.step import SCENARIOS, Scenario, StepAudit, audit_step, own_step
from dpjax.auditing.synthetic_text import (
    echo_canaries,
    ngram_scores,
    similarity_scores,
    synthetic_text_attacks,
)
from dpjax.auditing.two_samples import clopper_pearson, gaussian_dp

__all__ = [
    "SCENARIOS",
    "AttackResult",
    "CanaryRows",
    "CanarySet",
    "EpsilonBound",
    "Exposure",
    "Extraction",
    "Guesses",
    "Interval",
    "Match",
    "NearDuplicate",
    "RankedTexts",
    "Ranking",
    "Scenario",
    "ShadowModels",
    "StepAudit",
    "SuffixIndex",
    "TokenStatistics",
    "Verification",
    "attack_result",
    "auc",
    "audit_coins",
    "audit_step",
    "balanced_inclusion",
    "canary_losses",
    "canary_scores",
    "clopper_pearson",
    "completes_secrets",
    "dirac_directions",
    "discoverable",
    "distribution_check",
    "echo_canaries",
    "exposure_by_rank",
    "exposure_by_sampling",
    "exposure_by_skew_normal",
    "extend_vocabulary",
    "extraction_attacks",
    "extraction_probability",
    "fair_coins",
    "gaussian_dp",
    "guess_coins",
    "insert",
    "leave_one_out_targets",
    "lira_offline",
    "lira_online",
    "logit_confidence",
    "loss_attacks",
    "loss_score",
    "mechanism_family",
    "membership_attacks",
    "min_k_plus_plus_score",
    "min_k_score",
    "natural_canaries",
    "near_duplicates",
    "neighbourhood_score",
    "new_token_canaries",
    "ngram_scores",
    "one_run",
    "one_run_gaussian",
    "one_run_profile",
    "own_step",
    "pii_extraction",
    "pii_inference",
    "pii_reconstruction",
    "queries_needed",
    "random_directions",
    "random_token_canaries",
    "rank_candidates",
    "rank_space",
    "ranked_generation",
    "rate_difference",
    "rate_result",
    "reference_score",
    "rejects_trade_off",
    "rmia",
    "roc_curve",
    "score_examples",
    "score_shadow_models",
    "similarity_scores",
    "success_rate",
    "suffix_log_probabilities",
    "synthetic_text_attacks",
    "token_statistics",
    "tpr_at_fpr",
    "train_shadow_models",
    "unused_token_ids",
    "verdict",
    "verify",
    "with_gradient_canaries",
    "zlib_score",
]
