"""The ``dpjax`` command: subcommands over the library's own frozen configurations."""

import contextlib
import dataclasses
import io
import logging
import sys
from typing import Annotated, Literal

import tyro

from dpjax.errors import DpjaxError
from dpjax.runs.audit import AuditConfig
from dpjax.runs.config import TrainConfig
from dpjax.runs.demo import DemoConfig
from dpjax.runs.federation import FederateConfig
from dpjax.runs.predict import PredictConfig
from dpjax.runs.synthesize import SynthesizeConfig


@dataclasses.dataclass(frozen=True)
class ResumeConfig:
    """Continue a run that was stopped or killed; it ends bitwise as if it had not been."""

    run: tyro.conf.Positional[str]
    """Run folder."""


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Write text with a model; one text appears as it is written."""

    model: tyro.conf.Positional[str]
    """Model folder, a run folder with one in it, or a pretrained model as for `dpjax train`."""
    prompt: str = ""
    """Text to continue."""
    num_samples: int = 3
    """Texts to draw."""
    max_new_tokens: int = 64
    """Tokens per text."""
    temperature: float = 0.8
    """0 is greedy."""
    top_k: int | None = None
    """Keep the k likeliest tokens."""
    top_p: float | None = 0.95
    """Keep the likeliest tokens that together have this probability."""
    seed: int | None = None
    """Default: fresh."""


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Write a model in Hugging Face's format, for transformers and vLLM."""

    model: tyro.conf.Positional[str]
    """Model folder, or a run folder with one in it."""
    output: str
    """Folder to write."""
    adapter: bool = False
    """Only the LoRA matrices, as a PEFT adapter (default: merged into the whole model)."""
    base: str | None = None
    """With --adapter: folder or hub id of the model that it goes with."""


@dataclasses.dataclass(frozen=True)
class RecordsConfig:
    """Invent labelled records with personal data in them, to try things on: nobody is real."""

    domain: Literal["medical", "financial", "support"]
    """Clinical notes, complaints about a bank, or customer-service dialogues."""
    output: str
    """jsonl file to write: text, user, label, and where the personal data stands."""
    num_records: int = 2000
    """How many."""
    locale: Literal["en_US", "zh_CN"] = "en_US"
    """Language."""
    seed: int = 0
    """Equal seeds give equal records."""


@dataclasses.dataclass(frozen=True)
class CardConfig:
    """Rebuild and show the privacy card of a run."""

    run: tyro.conf.Positional[str]
    """Run folder."""
    public: bool = False
    """Write report-public.html, without curves, samples and utility numbers that epsilon does not
    cover."""


@dataclasses.dataclass(frozen=True)
class EpsilonConfig:
    """Epsilon of DP-SGD, by RDP and PLD."""

    noise_multiplier: float
    """Noise stddev / sensitivity."""
    sampling_probability: float
    """Of one record in one iteration."""
    iterations: int
    """Noisy updates."""
    delta: float
    """Failure probability."""
    sampling: Annotated[str, tyro.conf.arg(metavar="NAME")] = "poisson"
    """poisson, truncated_poisson, fixed_size or shuffled."""
    population: int | None = None
    """Number of records; needed by all but poisson."""
    truncated_batch_size: int | None = None
    """Cap for truncated_poisson."""


@dataclasses.dataclass(frozen=True)
class CalibrateConfig:
    """Noise multiplier for a budget."""

    target_epsilon: float
    """Budget in nats."""
    target_delta: float
    """Failure probability."""
    sampling_probability: float
    """Of one record in one iteration."""
    iterations: int
    """Noisy updates."""
    sampling: Annotated[str, tyro.conf.arg(metavar="NAME")] = "poisson"
    """poisson, truncated_poisson, fixed_size or shuffled."""
    population: int | None = None
    """Number of records; needed by all but poisson."""
    truncated_batch_size: int | None = None
    """Cap for truncated_poisson."""


_COMMANDS = {
    "demo": DemoConfig,
    "train": TrainConfig,
    "federate": FederateConfig,
    "resume": ResumeConfig,
    "generate": GenerateConfig,
    "synthesize": SynthesizeConfig,
    "predict": PredictConfig,
    "export": ExportConfig,
    "records": RecordsConfig,
    "audit": AuditConfig,
    "card": CardConfig,
    "epsilon": EpsilonConfig,
    "calibrate": CalibrateConfig,
}


def _parse(arguments: list[str]):
    """Arguments to a configuration; tyro's boxed error becomes one line."""
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.extras.subcommand_cli_from_dict(
                _COMMANDS,
                args=arguments,
                prog="dpjax",
                description="Train language models on private data, and prove how private.",
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise DpjaxError(_one_line(captured.getvalue(), arguments)) from None


def _one_line(boxed: str, arguments: list[str]) -> str:
    """The substance of a boxed message, before its first rule."""
    words: list[str] = []
    for number, line in enumerate(boxed.splitlines()):
        text = line.strip("│╭╮╰╯ ")
        # A terminal without Unicode gets hyphens, and the title on a line of its own.
        is_rule = text.startswith("─") or (text != "" and not text.strip("-"))
        if is_rule and number <= 1:
            words = []  # the box's title
        elif is_rule and words:
            break
        elif text and not is_rule:
            words.append(text)
    message = " ".join(words) or "the arguments are not understood"
    # tyro's name for the place where a subcommand's own options hang.
    message = message.replace("Error parsing __tyro-dummy-inner__.", "--")
    suggestion = boxed.partition("Perhaps you meant:")[2].split()
    hint = next((f"; did you mean {word}?" for word in suggestion if word.startswith("--")), "")
    command = arguments[0] if arguments and arguments[0] in _COMMANDS else ""
    return f"{message}{hint}; see `{' '.join(filter(None, ['dpjax', command]))} --help`"


def _run(config: object) -> None:
    # Imported per command: `dpjax --help` should not wait for what it does not use.
    from dpjax.runs import commands

    match config:
        case DemoConfig():
            from dpjax.runs.demo import demo

            demo(config)
        case TrainConfig():
            commands.train(config)
        case FederateConfig():
            commands.federate(config)
        case ResumeConfig(run):
            commands.resume(run)
        case GenerateConfig():
            commands.generate_text(
                config.model,
                config.prompt,
                config.num_samples,
                config.seed,
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
            )
        case SynthesizeConfig():
            from dpjax.runs.synthesize import synthesize

            synthesize(config)
        case PredictConfig():
            from dpjax.runs.predict import predict

            predict(config)
        case AuditConfig():
            from dpjax.runs.audit import audit

            audit(config)
        case ExportConfig():
            commands.export(config.model, config.output, config.adapter, config.base)
        case RecordsConfig():
            commands.invent_records(**dataclasses.asdict(config))
        case CardConfig(run, public):
            commands.card(run, public)
        case EpsilonConfig() | CalibrateConfig():
            commands.account(**dataclasses.asdict(config))


def main() -> None:
    """Entry point of the ``dpjax`` command. Bad input: one line on stderr and exit code 2."""
    # The storage library leaves failed background tasks behind, whose tracebacks would follow the
    # one line that says what happened.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    try:
        _run(_parse(sys.argv[1:]))
    except DpjaxError as error:
        print(f"dpjax: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        name = f" {error.filename}" if error.filename else ""
        print(f"dpjax: {error.strerror or error}{name}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("dpjax: stopped; continue with `dpjax resume RUN`", file=sys.stderr)
        sys.exit(130)
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()


if __name__ == "__main__":
    main()
