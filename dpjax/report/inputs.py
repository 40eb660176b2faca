"""What a run knows about itself that neither its mechanism nor its ledger can tell."""

import dataclasses
from typing import Any, Literal

from dpjax import accounting
from dpjax.errors import DpjaxError
from dpjax.ledger import Ledger
from dpjax.mechanism import DPSGD

OVERLAPS = ("none", "possible", "certain", "unknown")
VIEWS = {
    "S": "a server sees the update of a single client",
    "A": "someone sees every aggregate, or the model after every iteration",
    "W": "the final weights are public",
    "B": "only generated samples or logits are public",
    "Y": "only synthetic text is public",
}

_PREPROCESSING = ("step", "data_dependent", "private")
_PRETRAINING = ("name", "public", "overlap")
_UTILITY = ("metric", "split", "value", "low", "high", "n", "covered")
_UTILITY_OPTIONAL = ("model", "unit")


@dataclasses.dataclass(frozen=True)
class CardInputs:
    """Everything that `build_card` cannot read from the mechanism or the ledger.

    Attributes:
      mechanism: the frozen configuration of the run.
      ledger: the open ledger that holds the run, and every other run on the same records.
      run: the run's number in the ledger.
      delta: failure probability at which epsilon is stated, in (0, 1).
      unit: the unit of privacy after packing, in words, e.g. "one message".
      dataset_name: what the private records are called.
      dataset_size: number of units, i.e. rows that the sampler draws from.
      artifact_sha256: of the released parameters, hex.
      model_name: e.g. "nano".
      max_units_per_person: most units one person contributed; None if unknown.
      examples_per_record: most units one source record became; above 1, the unit is smaller than a
        record.
      dataset_size_is_public: whether ``dataset_size`` may be known.
      preprocessing: dicts with "step" (text), "data_dependent" (bool), "private" (bool: done with
        differential privacy and in the ledger).
      contribution_bounding: how ``max_units_per_person`` was enforced, in words.
      pretraining: dicts with "name" (text), "public" (bool), "overlap" (with the private records:
        "none", "possible", "certain", "unknown").
      num_parameters, num_trained_parameters: of the model; None if not counted.
      optimizer: in words, e.g. "adam(0.001)".
      released: what leaves the owner's hands.
      views: which threat views (letters of S, A, W, B, Y) the release opens.
      intended_use: in words.
      trust: who sees raw records, single updates and checkpoints, in words.
      model: where noise is added: "central" (whoever trains), "local" (each client, before anybody
        sees its update), "distributed" (clients together, under secure aggregation).
      cryptography: scheme, parameters, security bits and what it does not protect, in words.
      published_key: the seed was chosen by the user, so others can repeat the noise.
      precision: dtypes, e.g. "float32".
      devices: e.g. ("cpu x 2",); never a host name.
      config_sha256: of the whole configuration, hex; None if there is none.
      not_covered: what read private records outside the guarantee.
      trials_outside_ledger: runs on these records that the ledger does not hold; None if unknown.
      utility: dicts with "metric", "split", "value", "low", "high" (interval or None), "n",
        "covered" (whether epsilon covers the number), and optionally "model" and "unit". A number
        that is not finite is null on the card.
      audit: from `dpjax.report.audit_section`; None if nothing was audited.

    Raises:
      DpjaxError: an impossible value, with the value and the remedy.

    Example:
      >>> import tempfile
      >>> mechanism = DPSGD(1.0, 0.1, 100, noise_multiplier=2.0)
      >>> folder = tempfile.TemporaryDirectory()
      >>> with Ledger.open(f"{folder.name}/ledger.jsonl") as ledger:
      ...     inputs = CardInputs(mechanism, ledger, 0, 1e-5, "one message", "letters", 1000,
      ...                         "0" * 64, "nano")
      >>> inputs.max_units_per_person is None
      True
      >>> folder.cleanup()
    """

    mechanism: DPSGD
    ledger: Ledger
    run: int
    delta: float
    unit: str
    dataset_name: str
    dataset_size: int
    artifact_sha256: str
    model_name: str
    max_units_per_person: int | None = None
    examples_per_record: int = 1
    dataset_size_is_public: bool = False
    preprocessing: tuple[dict[str, Any], ...] = ()
    contribution_bounding: str = "none"
    pretraining: tuple[dict[str, Any], ...] = ()
    num_parameters: int | None = None
    num_trained_parameters: int | None = None
    optimizer: str = "not stated"
    released: tuple[str, ...] = ("final weights",)
    views: tuple[str, ...] = ("W", "B")
    intended_use: str = "not stated"
    trust: str = (
        "whoever runs the training sees the raw records, every gradient and the noise key; "
        "everyone else sees what is released"
    )
    model: Literal["central", "local", "distributed"] = "central"
    cryptography: str = "none: records and gradients are in the clear where training runs"
    published_key: bool = False
    precision: str = "float32"
    devices: tuple[str, ...] = ()
    config_sha256: str | None = None
    not_covered: tuple[str, ...] = (
        "evaluation on held-out records",
        "losses shown or logged while training",
    )
    trials_outside_ledger: int | None = None
    utility: tuple[dict[str, Any], ...] = ()
    audit: dict[str, Any] | None = None

    def __post_init__(self):
        accounting.check_delta(self.delta)
        for name in ("unit", "dataset_name", "model_name"):
            if not str(getattr(self, name)).strip():
                raise DpjaxError(f"{name} is empty; the card needs it in words")
        for name in ("dataset_size", "examples_per_record", "max_units_per_person"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DpjaxError(f"{name} is {value}; it must be at least 1")
        for name in ("artifact_sha256", "config_sha256"):
            _check_sha256(name, getattr(self, name))
        if self.model not in ("central", "local", "distributed"):
            raise DpjaxError(f"model is {self.model!r}; use central, local or distributed")
        for view in self.views:
            if view not in VIEWS:
                raise DpjaxError(f"views holds {view!r}; use letters of: {', '.join(VIEWS)}")
        for entry in self.preprocessing:
            _check_keys("preprocessing", entry, _PREPROCESSING)
        for entry in self.pretraining:
            _check_keys("pretraining", entry, _PRETRAINING)
            if entry["overlap"] not in OVERLAPS:
                raise DpjaxError(
                    f"the overlap of pretraining data {entry['name']!r} is {entry['overlap']!r}; "
                    f"use one of: {', '.join(OVERLAPS)}"
                )
        for entry in self.utility:
            _check_keys("utility", entry, _UTILITY, _UTILITY_OPTIONAL)


def _check_sha256(name: str, value: str | None) -> None:
    if value is None:
        return
    if len(value) != 64 or set(value) - set("0123456789abcdef"):
        raise DpjaxError(f"{name} is {value!r}; it must be 64 lower-case hexadecimal digits")


def _check_keys(
    name: str,
    entry: dict[str, Any],
    required: tuple[str, ...],
    optional: tuple[str, ...] = (),
) -> None:
    missing = [key for key in required if key not in entry]
    unknown = [key for key in entry if key not in required + optional]
    if missing or unknown:
        raise DpjaxError(
            f"an entry of {name} has the keys {sorted(entry)}; it needs exactly "
            f"{', '.join(required)}"
            + (f" (and may have {', '.join(optional)})" if optional else "")
        )
