"""Cards on disk: validated when they are written, and again when they are read."""

import functools
import importlib.resources
import json
import math
import os
import pathlib
import tempfile
from typing import Any

import jsonschema

from dpjax.errors import DpjaxError


@functools.cache
def card_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a card, from the package.

    Example:
      >>> sorted(card_schema()["required"])[:3]
      ['accounting', 'audit', 'claim']
    """
    source = importlib.resources.files("dpjax.report").joinpath("card_schema.json")
    return json.loads(source.read_text(encoding="utf-8"))


def validate_card(card: Any) -> None:
    """Refuses whatever is not a privacy card.

    Beyond the schema it checks what a schema cannot: that numbers are finite and that iterations
    beyond the plan carry no epsilon, whatever the card says of itself.

    Raises:
      DpjaxError: the first defect, with the field's name.

    Example:
      >>> validate_card({"identity": {}})
      Traceback (most recent call last):
      ...
      dpjax.errors.DpjaxError: the privacy card is invalid at its top level: 'accounting' is a \
required property; build it with dpjax.report.build_card
    """
    not_finite = _not_finite(card, "")
    if not_finite is not None:
        raise _invalid(not_finite, "the number is not finite")
    validator = jsonschema.Draft202012Validator(card_schema())
    errors = sorted(validator.iter_errors(card), key=lambda error: (len(error.path), error.message))
    if errors:
        reason = errors[0].message.splitlines()[0]
        reason = reason if len(reason) <= 200 else reason[:200] + "..."
        raise _invalid(".".join(str(part) for part in errors[0].path), reason)
    ran, planned = (
        card["accounting"]["steps_executed"],
        card["accounting"]["steps_planned"],
    )
    if card["accounting"]["steps_within_plan"] != (ran <= planned):
        raise _invalid("accounting.steps_within_plan", f"{ran} of {planned} planned iterations ran")
    ran_counts = sum(entry["count"] for entry in card["accounting"]["sampling_actual"])
    if ran_counts != ran:
        raise _invalid("accounting.steps_executed", f"it is {ran}, but {ran_counts} releases count")
    claim = card["claim"]
    if claim["delta_below_one_over_n"] != (claim["delta"] < claim["one_over_n"]):
        raise _invalid("claim.delta_below_one_over_n", "it contradicts delta and one_over_n")


def _invalid(where: str, reason: str) -> DpjaxError:
    place = where or "its top level"
    return DpjaxError(
        f"the privacy card is invalid at {place}: {reason}; build it with dpjax.report.build_card"
    )


def _not_finite(value: Any, where: str) -> str | None:
    """Path of the first NaN or infinity."""
    children: list[tuple[str, Any]] = []
    if isinstance(value, float) and not math.isfinite(value):
        return where
    if isinstance(value, dict):
        children = [(str(key), child) for key, child in value.items()]
    elif isinstance(value, (list, tuple)):
        children = [(str(index), child) for index, child in enumerate(value)]
    for name, child in children:
        found = _not_finite(child, f"{where}.{name}" if where else name)
        if found is not None:
            return found
    return None


def write_card(card: dict[str, Any], path: str | os.PathLike) -> None:
    """Validates a card and writes it as sorted, indented UTF-8 JSON, whole or not at all.

    Raises:
      DpjaxError: an invalid card, or a folder that cannot be written.

    Example:
      >>> write_card({}, "card.json")
      Traceback (most recent call last):
      ...
      dpjax.errors.DpjaxError: the privacy card is invalid at its top level: 'accounting' is a \
required property; build it with dpjax.report.build_card
    """
    validate_card(card)
    text = json.dumps(card, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_whole(path, text + "\n")


def read_card(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a card and checks it.

    Raises:
      DpjaxError: a missing, unreadable or invalid file.

    Example:
      >>> read_card("nowhere/card.json")
      Traceback (most recent call last):
      ...
      dpjax.errors.DpjaxError: privacy card nowhere/card.json does not exist; give the card.json \
of a finished run
    """
    path = pathlib.Path(path)
    try:
        card = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise DpjaxError(
            f"privacy card {path} does not exist; give the card.json of a finished run"
        ) from None
    except OSError as error:
        raise DpjaxError(
            f"privacy card {path} cannot be read ({error.strerror}); check the path"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DpjaxError(
            f"privacy card {path} is corrupt ({error}); build it again from the run's ledger"
        ) from None
    try:
        validate_card(card)
    except DpjaxError as error:
        raise DpjaxError(f"{path}: {error}") from None
    return card


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def write_whole(path: str | os.PathLike, text: str) -> None:
    """Writes UTF-8 text to a new file and puts it in the place of the old one."""
    path = pathlib.Path(path)
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            pathlib.Path(temporary).unlink(missing_ok=True)
        raise DpjaxError(
            f"{path} cannot be written ({error.strerror}); check the folder and the disk"
        ) from None
