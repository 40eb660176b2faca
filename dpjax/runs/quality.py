"""How good synthetic records are, beside the private ones. Everything here is for their owner."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Table

from dpjax.data import Record
from dpjax.evaluation import embed_texts
from dpjax.quality import (
    compare_statistics,
    count_copies,
    divergence,
    downstream_accuracy,
    text_statistics,
)
from dpjax.runs.finish import Finished

_EMBEDDED = 1000  # texts of each side that are embedded


def measure(done: Finished, synthetic: Sequence[Record]) -> dict[str, Any]:
    """Compares synthetic records with those trained on and those held out.

    Not covered by any epsilon: it reads both.

    Returns:
      JSON-compatible numbers: ``downstream`` (labelled records only), ``divergence``,
      ``statistics``, ``copies``.
    """
    from dpjax.runs.synthesize import real_records

    training, held_out = real_records(done.run)
    texts = [record.text for record in synthetic]
    real, unseen = ([r.text for r in part] for part in (training, held_out))
    found: dict[str, Any] = {"covered_by_epsilon": False, "records": len(texts)}
    if done.run.config.labels:
        labels, real_labels, unseen_labels = (
            [str(r.label) for r in part] for part in (synthetic, training, held_out)
        )
        found["downstream"] = {
            "trained on synthetic": _plain(
                downstream_accuracy(texts, labels, unseen, unseen_labels)
            ),
            "trained on real": _plain(
                downstream_accuracy(real, real_labels, unseen, unseen_labels)
            ),
        }
    start, tokenizer = done.run.start, done.run.start.tokenizer
    length = done.run.config.sequence_length
    vectors = [
        embed_texts(start.config, start.params, tokenizer, part[:_EMBEDDED], length)
        for part in (unseen, texts, real)
    ]
    if min(map(len, vectors)) >= 4:
        found["divergence"] = {
            "synthetic": divergence(vectors[0], vectors[1]).mauve,
            "real records trained on": divergence(vectors[0], vectors[2]).mauve,
        }
    found["statistics"] = {
        "synthetic": _plain(text_statistics(texts)),
        "real": _plain(text_statistics(unseen)),
        "difference": _plain(compare_statistics(unseen, texts)),
    }
    found["copies"] = {
        "of records trained on": _plain(count_copies(texts, real)),
        "of records held out": _plain(count_copies(texts, unseen)),
    }
    return found


def _plain(value: Any) -> Any:
    """NamedTuples and arrays as JSON has them."""
    if hasattr(value, "_asdict"):
        return {name: _plain(part) for name, part in value._asdict().items()}
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, tuple | list) else value


def quality_table(found: dict[str, Any]) -> Table:
    """The main numbers, for the terminal."""
    table = Table("quality (private: not covered by epsilon)", "synthetic", "real")
    if "downstream" in found:
        accuracies = found["downstream"]
        table.add_row(
            "classifier accuracy on held-out records",
            *(
                _share(accuracies[f"trained on {name}"]["accuracy"])
                for name in ("synthetic", "real")
            ),
        )
    if "divergence" in found:
        scores = found["divergence"]
        table.add_row(
            "MAUVE-like score against held-out records",
            f"{scores['synthetic']:.3f}",
            f"{scores['real records trained on']:.3f}",
        )
    copies = found["copies"]
    table.add_row(
        "copies of training records, exact / near", *(_copies(copies["of records trained on"]), "-")
    )
    table.add_row(
        "the same for held-out records (chance)", *(_copies(copies["of records held out"]), "-")
    )
    return table


def _share(value: float) -> str:
    return f"{100 * value:.1f}%"


def _copies(found: dict[str, Any]) -> str:
    return f"{found['exact']} / {found['near']}"
