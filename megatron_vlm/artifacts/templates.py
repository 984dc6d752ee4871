"""The chat templates by name, and which tokens a tokenizer needs for each."""

from __future__ import annotations

from typing import Collection, Dict, Optional, Tuple

_START, _END = "a start token (bos_token)", "an end token (eos_token)"
# What a template writes and a tokenizer must know as a token of its own, lest it falls to pieces.
_NEEDED: Dict[str, Tuple[str, ...]] = {
    "chat": (),
    "plain": (),
    "v1": (_END,),
    "vicuna": (_END,),
    "llama_2": (_START, _END),
    "llama_3": (_START, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "qwen": ("<|im_start|>", "<|im_end|>"),
    "mistral": (_START, _END),
    "gemma": (_START, "<start_of_turn>", "<end_of_turn>"),
    "llm_jp": (_START, _END),
}
TEMPLATES = tuple(_NEEDED)


def unfit(name: str, tokens: Collection[str], bos: Optional[str], eos: Optional[str]) -> str:
    """Return why a tokenizer can't be used with a template, and which it can be used with; empty if it can.

    Args:
        name: one of :data:`TEMPLATES`.
        tokens: texts of the tokens that the tokenizer never splits.
        bos, eos: its start and end token, if it has them.
    """
    known = {*tokens, *([_START] if bos else []), *([_END] if eos else [])}
    missing = [token for token in _NEEDED[name] if token not in known]
    if not missing:
        return ""
    fitting = [other for other in TEMPLATES if other != "chat" and known.issuperset(_NEEDED[other])]
    return (
        f"--template {name}: the tokenizer lacks {', '.join(missing)}; templates that fit it are "
        f"{', '.join(fitting)}"
    )
