"""A sentencepiece model as a fast tokenizer, checked against transformers, or sentencepiece itself.

transformers 5 builds a Llama tokenizer from ``tokenizer.model`` by a fixed recipe, always BPE. That is taken
where it cuts text into the pieces that sentencepiece cuts it into. A unigram model, as most Japanese ones
are, gets other pieces than it was trained with: there the recipe is the model's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_UNIGRAM, _BPE = 1, 2  # of sentencepiece's TrainerSpec.ModelType
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # of its SentencePiece.Type
_SPACE = "▁"
_CHECKED_PIECES = 2000
# What conversions get wrong: spaces, line ends, wide and compatibility characters, bytes.
_PROBES = (
    "Which digit is this? Describe the image, 12345.67 times!",
    "これは何の画像ですか。カタカナ、漢字、ＡＢＣ、①②、㍻、ﾊﾝｶｸ。",
    " begins with one space, has  two   or three, and ends with one ",
    "one line\nanother\n\n\tthird\u3000fourth",
    "spaces \n at the \n  ends of  \nlines",
    "🙂🇯🇵 é ﬁ ½ кот 고양이 \u200b",
    "def f(x):\n    return {'a': [x] * 2}  # comment",
)
# The same around special tokens, A and B: whether text after one gets a space of its own is a setting.
_CONVERSATIONS = (
    "AUSER: B\nHi ASSISTANT: Hello!BUSER: Count A B ASSISTANT: これは",
    "B\nB xA",
    "  two Bthree  spaces   A   four  B",
)


@dataclass(frozen=True)
class Converted:
    """A sentencepiece model as a fast tokenizer, and the one that it is compared with.

    Attributes:
        tokenizer: a ``tokenizers.Tokenizer``; what its post-processor adds is to be replaced.
        named: the special tokens that the model names: ``bos_token``, ``eos_token``, ``unk_token`` and
            ``pad_token``, as far as it has them.
        expected: the ids of a text, by the reference.
        conversations: texts to compare on, with special tokens in them.
    """

    tokenizer: Any
    named: dict[str, str]
    expected: Callable[[str], list[int]]
    conversations: list[str]

    def check(self, encode: Callable[[str], list[int]]) -> None:
        """Compare a tokenizer's ids of conversations with those that it should give.

        Raises:
            ValueError: it differs.
        """
        for text in self.conversations:
            expected, found = self.expected(text), encode(text)
            if found != expected:
                raise ValueError(
                    f"no tokenizer.json can stand for this sentencepiece model: {text!r} becomes "
                    f"{found[:8]} instead of {expected[:8]}; give a folder that has a tokenizer.json"
                )


def fast_tokenizer(path: Path, settings: dict[str, Any]) -> Converted:
    """Convert a sentencepiece model; its control symbols become special tokens.

    transformers' own tokenizer of the folder is taken if it cuts normalised text as sentencepiece does. If
    not, text that stands alone gets the ids that sentencepiece gives it, and so does text after a special
    token, where a Llama tokenizer without ``legacy`` puts no space of its own before it.

    Args:
        path: the model, in the folder of its tokenizer.
        settings: the folder's ``tokenizer_config.json``.

    Raises:
        ValueError: it isn't a sentencepiece model, or can't be converted exactly.
        ModuleNotFoundError: sentencepiece is not installed.
    """
    import sentencepiece

    try:
        from sentencepiece.sentencepiece_model_pb2 import ModelProto
    except Exception:  # it wants a newer protobuf than there is, as in NVIDIA's image
        from transformers.utils.sentencepiece_model_pb2_new import ModelProto

    proto = ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
        proto.normalizer_spec.add_dummy_prefix &= settings.get("add_prefix_space") is not False
        reference = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    except Exception as error:  # protobuf's and sentencepiece's own types
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path}: not a sentencepiece model ({reason})") from None
    spec = proto.trainer_spec
    ids = dict(bos_token=spec.bos_id, eos_token=spec.eos_id, unk_token=spec.unk_id, pad_token=spec.pad_id)
    named = {name: proto.pieces[i].piece for name, i in ids.items() if 0 <= i < len(proto.pieces)}
    symbols = [piece.piece for piece in proto.pieces if piece.type == _CONTROL]
    probes = _probes(proto)
    conversations = [
        text.replace("A", first).replace("B", second)
        for text in _CONVERSATIONS
        for first, second in ([(symbols[0], symbols[-1]), (symbols[-1], symbols[0])] if symbols else [])
    ]

    for tokenizer in _transformers_own(path.parent, settings):
        encode = _encoder(tokenizer)
        if all(encode(text) == reference.encode(text) for text in _normalised(reference, probes)):
            return Converted(tokenizer.backend_tokenizer, named, encode, conversations)

    only_first = proto.normalizer_spec.add_dummy_prefix and is_llama(settings) and not settings.get("legacy")
    expected = _by_sentencepiece(proto, reference, symbols, only_first)
    converted = Converted(_convert(proto, path, only_first), named, expected, [*probes, *conversations])
    try:
        converted.check(lambda text: list(converted.tokenizer.encode(text, add_special_tokens=False).ids))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return converted


def is_llama(settings: dict[str, Any]) -> bool:
    """Return whether a folder's ``tokenizer_config.json`` names a Llama tokenizer, or none."""
    return "Llama" in (settings.get("tokenizer_class") or "Llama")


def _transformers_own(folder: Path, settings: dict[str, Any]) -> Iterator[Any]:
    """Yield the tokenizers that transformers makes of a folder: what it takes the folder for, and a
    Llama's."""
    from transformers import AutoTokenizer, LlamaTokenizer

    for kind in (AutoTokenizer, *([LlamaTokenizer] if is_llama(settings) else [])):
        try:
            tokenizer = kind.from_pretrained(folder, trust_remote_code=False)
        except Exception:  # what it can't read is converted here
            continue
        if tokenizer.is_fast:
            yield tokenizer


def _encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    return lambda text: list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _normalised(reference: Any, texts: list[str]) -> list[str]:
    """Return the texts as sentencepiece sees them, without spaces around them."""
    return [reference.normalize(text).replace(_SPACE, " ").strip(" ") for text in texts]


def _by_sentencepiece(
    proto: Any, reference: Any, symbols: list[str], only_first: bool
) -> Callable[[str], list[int]]:
    """Return the ids of a text by sentencepiece: special tokens, and what stands between them.

    Args:
        only_first: only text that begins the whole gets a space before it, unless it begins with one.
    """
    import sentencepiece

    bare, loose = type(proto)(), type(proto)()
    for copy in (bare, loose):
        copy.CopyFrom(proto)
        copy.normalizer_spec.add_dummy_prefix = False
    loose.normalizer_spec.remove_extra_whitespaces = False
    unprefixed, spaced = (
        sentencepiece.SentencePieceProcessor(model_proto=copy.SerializeToString()) for copy in (bare, loose)
    )
    strips = proto.normalizer_spec.remove_extra_whitespaces

    def part(text: str, begins: bool) -> list[int]:
        own_space = spaced.normalize(text).startswith(_SPACE)
        prefixed = not only_first or (strips if own_space else begins)
        found: list[int] = (reference if prefixed else unprefixed).encode(text)
        return found

    def expected(text: str) -> list[int]:
        ids: list[int] = []
        between = re.split(f"({'|'.join(map(re.escape, symbols))})", text) if symbols else [text]
        for i, piece in enumerate(between):
            ids += [reference.piece_to_id(piece)] if i % 2 else part(piece, i == 0)
        return ids

    return expected


def _convert(proto: Any, path: Path, only_first: bool) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers.convert_slow_tokenizer import generate_merges

    spec, rules = proto.trainer_spec, proto.normalizer_spec
    scores = [(piece.piece, piece.score) for piece in proto.pieces]
    model: Any
    if spec.model_type == _UNIGRAM:
        model = models.Unigram(scores, unk_id=spec.unk_id, byte_fallback=spec.byte_fallback)
    elif spec.model_type == _BPE:
        ids = {piece: i for i, (piece, _) in enumerate(scores)}
        whole = {piece.piece for piece in proto.pieces if piece.type != _NORMAL}  # never made by a merge
        merges = generate_merges(ids, scores, skip_tokens=whole)
        model = models.BPE(
            ids, merges, unk_token=spec.unk_piece, fuse_unk=True, byte_fallback=spec.byte_fallback
        )
    else:
        raise ValueError(f"{path}: a sentencepiece model of words or characters; supported: unigram and BPE")
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        # Text after a special token keeps one space before it where it gets none of its own.
        steps += [normalizers.Strip(left=not only_first), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix and not only_first:
        steps.append(normalizers.Prepend(" "))
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    if only_first:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="first", split=False)
    pieces = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(pieces + [decoders.Strip(" ", 1, 0)] * rules.add_dummy_prefix)
    before = normalizers.Sequence(steps[:1]) if rules.precompiled_charsmap else None
    symbols = [
        AddedToken(piece.piece, normalized=False, special=piece.type == _CONTROL)
        for piece in proto.pieces
        if piece.type in (_CONTROL, _USER_DEFINED) and not _is_plain(piece.piece, before)
    ]
    tokenizer.add_tokens(symbols)
    return tokenizer


def _is_plain(piece: str, normalizer: Any) -> bool:
    """Return whether a symbol is found without being an added token: one character that normalizing leaves
    alone."""
    return len(piece) == 1 and (normalizer is None or normalizer.normalize_str(piece) == piece)


def _probes(proto: Any) -> list[str]:
    """Return the texts to compare on: fixed ones, and the model's own pieces in a row, each once."""
    pieces = [p.piece.replace(_SPACE, " ") for p in proto.pieces if p.type == _NORMAL]
    pieces = pieces[:: max(1, len(pieces) // _CHECKED_PIECES)]
    rows = ["".join(pieces[i : i + 20]) for i in range(0, len(pieces), 20)]
    symbols = [p.piece for p in proto.pieces if p.type == _USER_DEFINED and len(p.piece) > 1]
    return [text for text in (*_PROBES, *rows) if not any(symbol in text for symbol in symbols)]
