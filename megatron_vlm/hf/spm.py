"""A sentencepiece model as a fast tokenizer, checked against sentencepiece itself.

transformers 5 builds a Llama tokenizer from ``tokenizer.model`` by a fixed recipe: no normalizer, always
BPE. A unigram model, or one that normalizes its text, as most Japanese ones do, gets other tokens than it
was trained with. Here the recipe is the model's own.
"""

from __future__ import annotations

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
    "🙂🇯🇵 é ﬁ ½ кот 고양이 \u200b",
    "def f(x):\n    return {'a': [x] * 2}  # comment",
)


def fast_tokenizer(path: Path) -> tuple[Any, dict[str, str]]:
    """Convert a sentencepiece model.

    Control symbols become special tokens. Plain text gets the ids that sentencepiece gives it; around a
    symbol, text is tokenised as if it stood alone, as transformers has always done it.

    Returns:
        A ``tokenizers.Tokenizer`` without a post-processor, and the special tokens that the model names:
        ``bos_token``, ``eos_token``, ``unk_token`` and ``pad_token``, as far as it has them.

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
        reference = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    except Exception as error:  # protobuf's and sentencepiece's own types
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path}: not a sentencepiece model ({reason})") from None
    tokenizer = _convert(proto, path)
    for text in _probes(proto):
        expected, found = reference.encode(text), tokenizer.encode(text, add_special_tokens=False).ids
        if found != expected:
            raise ValueError(
                f"{path}: no tokenizer.json can stand for this sentencepiece model: {text!r} becomes "
                f"{found[:8]} instead of {expected[:8]}; give a folder that has a tokenizer.json"
            )
    spec = proto.trainer_spec
    ids = dict(bos_token=spec.bos_id, eos_token=spec.eos_id, unk_token=spec.unk_id, pad_token=spec.pad_id)
    return tokenizer, {name: proto.pieces[i].piece for name, i in ids.items() if 0 <= i < len(proto.pieces)}


def _convert(proto: Any, path: Path) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
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
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
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
    """Whether a symbol is found without being an added token: one character that normalizing leaves alone."""
    return len(piece) == 1 and (normalizer is None or normalizer.normalize_str(piece) == piece)


def _probes(proto: Any) -> list[str]:
    """Texts to compare on: fixed ones, and the model's own pieces in a row, each once."""
    pieces = [p.piece.replace(_SPACE, " ") for p in proto.pieces if p.type == _NORMAL]
    pieces = pieces[:: max(1, len(pieces) // _CHECKED_PIECES)]
    rows = ["".join(pieces[i : i + 20]) for i in range(0, len(pieces), 20)]
    symbols = [p.piece for p in proto.pieces if p.type == _USER_DEFINED and len(p.piece) > 1]
    return [text for text in (*_PROBES, *rows) if not any(symbol in text for symbol in symbols)]
