"""The check of the token that ends an answer, without which some runs can't begin."""

from __future__ import annotations

from pathlib import Path

from megatron_vlm.artifacts.end_tokens import end_tokens
from megatron_vlm.artifacts.mixture import MixtureConfig, is_mixture
from megatron_vlm.data.processing import Processing


def describe_ends(data_path: str, processing: Processing, hf_folder: Path) -> str:
    """Check that the model learns where an answer ends, and that an exported model stops there.

    Args:
        data_path: dataset or mixture; a mixture's datasets may have templates of their own.
        processing: as the run's flags say.
        hf_folder: the Hugging Face files that the run's checkpoints carry on.

    Returns:
        What ends an answer, a line for each template and for what was found on the way.

    Raises:
        ValueError: an end token is missing, not trained, or at the end of prompts; or the folder doesn't tell
            what generation stops at.
    """
    template = processing.template
    line = template.check_end()
    named = {token: processing.tokenizer.convert_ids_to_tokens(token) for token in end_tokens(hf_folder)}
    listed = ", ".join(
        f"{text!r} ({token})"
        for token, text in named.items()
        if token != template.end_token_id and text is not None  # a number that no token has never comes
    )
    if listed and template.end_token_id is not None:
        line += f"; an exported model stops at {listed} too, as its files say"
    lines = [line]
    sources = MixtureConfig.load(data_path).of_split("train") if is_mixture(data_path) else ()
    for source in sources:
        try:
            own = processing.varied(**source.options).template
            if own.name != template.name:
                lines.append(f"dataset {source.name}: {own.check_end()}")
        except ValueError as error:
            raise ValueError(f"--data-path {data_path}: dataset {source.name}: {error}") from None
    if template.appended:
        put = " ".join(processing.tokenizer.convert_ids_to_tokens(template.appended))
        lines.append(f"the tokenizer puts {put} behind every text; here and in an exported model it doesn't")
    return "\n".join(lines)
