"""Whether a model completes secrets that it may have seen in training."""

from collections.abc import Sequence

from dpjax.data import PlantedSecret, Tokenizer
from dpjax.generation import generate
from dpjax.models import DecoderConfig
from dpjax.types import PyTree


def completes_secrets(
    config: DecoderConfig,
    params: PyTree,
    tokenizer: Tokenizer,
    secrets: Sequence[PlantedSecret],
) -> list[bool]:
    """Whether greedy decoding from each secret's prefix spells the whole secret.

    The prompt is what the tokenizer makes of the text up to the secret, as far as it agrees with
    the encoding of the full text, so that the model is asked in the tokens it was trained on.
    Compare with the rate on held-out twins: a secret that can be guessed without having been seen
    proves no leak.

    Source: Carlini et al. (2023), "discoverable" memorisation with greedy decoding.

    Returns:
      One bool for each secret.
    """
    if not secrets:
        return []
    prompts, longest = [], 1
    for secret in secrets:
        full = [tokenizer.bos_id, *tokenizer.encode(secret.prefix + secret.secret)]
        before = [tokenizer.bos_id, *tokenizer.encode(secret.prefix)]
        agreed = 0
        while agreed < len(before) and before[agreed] == full[agreed]:
            agreed += 1
        prompts.append(full[:agreed])
        # Two tokens more than the secret needs: another split of the same text is a completion too.
        longest = max(longest, len(full) - agreed + 2)
    texts = generate(
        config,
        params,
        prompts,
        None,
        max_new_tokens=longest,
        temperature=0.0,
        stop_token=tokenizer.eos_id,
    )
    return [
        tokenizer.decode(prompt + text).startswith(secret.prefix + secret.secret)
        for prompt, text, secret in zip(prompts, texts, secrets, strict=True)
    ]
