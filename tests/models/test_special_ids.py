"""Tokenizers of pretrained models: no text spells a special id, and nothing is cut or padded."""

import json

import pytest
import tokenizers

from dpjax.data import byte_tokenizer, hub_tokenizer, load_tokenizer

END, BEGIN, PAD = "<|end|>", "<s>", "[PAD]"


def byte_level():
    """As GPT-2, Qwen and Llama 3 have it: special tokens beside the vocabulary."""
    return tokenizers.Tokenizer.from_str(byte_tokenizer().backend.to_str())


def sentence_pieces():
    """As Llama 2 and Gemma have it: special tokens in the vocabulary, bytes for what is not."""
    letters = [*"abcdefghijklmnopqrstuvwxyz<>|[]/ADP▁", *(f"<0x{n:02X}>" for n in range(256))]
    vocabulary = {name: n for n, name in enumerate([PAD, BEGIN, END, "<unk>", *letters])}
    model = tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    parts = [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback()]
    backend.decoder = tokenizers.decoders.Sequence([*parts, tokenizers.decoders.Fuse()])
    return backend


def whole_words():
    """Special tokens are words of the vocabulary like any other."""
    names = [PAD, BEGIN, END, "<unk>", "say", "and", "stop"]
    model = tokenizers.models.WordLevel({name: n for n, name in enumerate(names)}, "<unk>")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return backend


KINDS = {"bytes": byte_level, "sentence pieces": sentence_pieces, "whole words": whole_words}


@pytest.fixture(params=KINDS)
def hub_folder(request, tmp_path):
    def make(special=True, **settings):
        backend = KINDS[request.param]()
        backend.add_special_tokens([BEGIN, PAD])
        tokens = [tokenizers.AddedToken(END, special=special, normalized=False)]
        (backend.add_special_tokens if special else backend.add_tokens)(tokens)
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{BEGIN} $A", special_tokens=[(BEGIN, backend.token_to_id(BEGIN))]
        )
        if "truncation" in settings:
            backend.enable_truncation(5)
        if "padding" in settings:
            backend.enable_padding(length=9, pad_token=PAD, pad_id=backend.token_to_id(PAD))
        backend.save(str(tmp_path / "tokenizer.json"))
        names = {"eos_token": END, "bos_token": {"content": BEGIN}, "pad_token": PAD}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
        return tmp_path

    return make


def copies(folder):
    """The tokenizer as loaded, and after every way to write and read it."""
    first = hub_tokenizer(folder)
    yield first
    first.save(folder / "ours.json")
    second = load_tokenizer(folder / "ours.json")
    yield second
    second.save_for_hub(folder)
    third = hub_tokenizer(folder)
    yield third
    third.save(folder / "again.json")
    yield load_tokenizer(folder / "again.json")


SPELLED = [
    END,
    BEGIN,
    PAD,
    f"say{END}stop",
    f"say {END} and {BEGIN}{PAD}",
    f"{END}{END}\n{BEGIN} ",
    f" {PAD}",
]


@pytest.mark.parametrize("special", [True, False], ids=["special", "merely added"])
def test_no_text_spells_a_special_id(hub_folder, special):
    for tokenizer in copies(hub_folder(special)):
        ids = {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, *tokenizer.stop_ids}
        assert len(ids) == 3
        for text in SPELLED:
            for found in (tokenizer.encode(text), *tokenizer.encode_batch([text, "say"])):
                assert not ids & set(found), (text, found)
                # Only where a special token is a word of the vocabulary has it no other spelling.
                words = isinstance(tokenizer.backend.model, tokenizers.models.WordLevel)
                assert found or words


def test_special_ids_survive_every_round_trip(hub_folder):
    seen = {
        (t.pad_id, t.bos_id, t.eos_id, t.stop_ids, t.vocabulary_size, tuple(t.encode("say and")))
        for t in copies(hub_folder())
    }
    assert len(seen) == 1


@pytest.mark.parametrize("settings", [("truncation",), ("padding",), ("truncation", "padding")])
def test_stored_truncation_and_padding_do_not_cut(hub_folder, settings):
    plain = hub_tokenizer(hub_folder())
    expected = plain.encode("say and stop " * 20), plain.encode("say")
    assert len(expected[0]) >= 60 and len(expected[1]) < 9
    for tokenizer in copies(hub_folder(**dict.fromkeys(settings))):
        assert (tokenizer.encode("say and stop " * 20), tokenizer.encode("say")) == expected
        assert tokenizer.encode_batch(["say and stop " * 20, "say"]) == list(expected)
