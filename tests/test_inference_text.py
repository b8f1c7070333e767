"""Ids to text as they come: characters over several tokens, stop texts, end-of-text tokens."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models

from cola_megatron.inference.text_stream import TextStream, following


def decode_bytes(token_ids: list[int]) -> str:
    """A byte-level tokenizer without merges."""
    return bytes(token_ids).decode("utf-8", errors="replace")


def pieces(text: str | bytes, lengths: list[int], **options) -> tuple[list[str], TextStream]:
    """What the stream hands out when the bytes come in parts of these lengths, and the rest at the end."""
    stream = TextStream(decode_bytes, **options)
    data, handed = text.encode() if isinstance(text, str) else text, []
    for length in lengths:
        if stream.finish_reason is not None:
            break
        handed.append(stream.add(list(data[:length])))
        data = data[length:]
    if stream.finish_reason is None:
        handed.append(stream.add(list(data)))
    if stream.finish_reason is None:
        handed.append(stream.end())
    return handed, stream


def test_a_character_is_handed_out_when_all_of_its_bytes_are_there():
    handed, stream = pieces("aé€😀z", [2, 1, 2, 1, 3])
    assert handed == ["a", "é", "", "€", "", "😀z", ""]
    assert stream.text == "aé€😀z" and stream.finish_reason == "length"


def test_bytes_that_are_no_text_come_out_at_the_end():
    handed, stream = pieces(b"ab\xff\xff\xff\xff\xe2\x82", [4])
    assert "".join(handed) == stream.text == decode_bytes(list(b"ab\xff\xff\xff\xff\xe2\x82"))


@pytest.mark.parametrize("seed", range(20))
def test_pieces_join_to_the_text_however_it_is_cut(seed):
    chooser = random.Random(seed)
    text = "".join(chooser.choice("ab \né€😀") for _ in range(40))
    lengths = [chooser.randint(0, 5) for _ in range(60)]
    handed, _ = pieces(text, lengths)
    assert "".join(handed) == text
    stop = chooser.choice(["b", "ab", "a\n", "€😀", "bab"])
    handed, stream = pieces(text, lengths, stop=[stop])
    assert "".join(handed) == text.split(stop)[0]
    assert stream.finish_reason == ("stop" if stop in text else "length")


def test_what_may_begin_a_stop_text_is_held_back():
    handed, stream = pieces("one\ntwo\n\nthree", [4, 4, 1], stop=["\n\n"])
    assert handed == ["one", "\ntwo", ""]
    assert stream.text == "one\ntwo" and stream.finish_reason == "stop"
    assert pieces("one\n", [4], stop=["\n\n"])[0] == ["one", "", "\n"]


def test_the_first_of_several_stop_texts_ends_the_sample():
    assert pieces("a stop b end", [], stop=["end", "stop"])[1].text == "a "


def test_an_end_of_text_token_ends_the_sample_before_it():
    handed, stream = pieces("abcde", [2], end_of_text=[ord("d")])
    assert handed == ["ab", "c"] and stream.finish_reason == "end_of_text"
    assert stream.token_ids == list(b"abc")
    assert pieces("a.bd", [], stop=["."], end_of_text=[ord("d")])[1].finish_reason == "stop"
    with pytest.raises(ValueError, match="has ended"):
        stream.add([1])


def test_a_preview_follows_what_was_handed_out():
    stream = TextStream(decode_bytes, stop=["END"])
    stream.add(list(b"now E"))
    assert stream.text == "now " and stream.preview(list(b"ND?")) == "END?"
    assert stream.text == "now "


# ---- text that follows other text ----------------------------------------------------------------------------------

WORDS = ["\u2581the", "\u2581prior", "\u2581writes", "s", "ly", ".", *(f"<0x{byte:02X}>" for byte in "é€".encode())]


@pytest.fixture(scope="module")
def llama_like():
    """Words with their space before them, single bytes, and a decoder that drops the first space of all."""
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(WORDS)}, merges=[]))
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return lambda token_ids: tokenizer.decode(token_ids, skip_special_tokens=False)


def test_a_continuation_is_what_decoding_all_ids_at_once_gives_beyond_the_prompt(llama_like):
    chooser, lost = random.Random(0), 0
    for _ in range(200):
        ids = [chooser.randrange(6) for _ in range(chooser.randrange(2, 20))]
        cut = chooser.randrange(1, len(ids))
        whole, prompt = llama_like(ids), llama_like(ids[:cut])
        assert prompt + following(llama_like, ids[:cut])(ids[cut:]) == whole
        lost += prompt + llama_like(ids[cut:]) != whole
    assert lost > 50
    assert following(llama_like, [])([0, 1]) == "the prior"


def test_a_character_over_the_border_belongs_to_the_continuation(llama_like):
    euro = [WORDS.index(f"<0x{byte:02X}>") for byte in "€".encode()]
    after = following(llama_like, [0, *euro[:1]])
    assert after(euro[1:]) == "€" and after([*euro[1:], 1]) == "€ prior" and after([]) == ""


def test_streams_and_stop_texts_have_the_space_too(llama_like):
    stream = TextStream(following(llama_like, [0]), stop=[" writes"])
    assert [stream.add([1]), stream.add([1, 3]), stream.add([2, 5])] == [" prior", " priors", ""]
    assert stream.finish_reason == "stop"
