"""The tables: which Megatron tensor holds which Hugging Face tensors.

One table per family serves both directions. Each row names the Megatron tensor, the Hugging Face
tensors with their shapes, the op between them, and the tensor-parallel cut. A Hugging Face tensor
that training never runs has a row too, without a Megatron name but with the reason: it travels
beside the weights, untouched.

Hugging Face names start with a placeholder, ``{tower}``, ``{projector}``, ``{newline}``, ``{text}`` or
``{head}``, since the prefixes on disk depend on the release that wrote them (:func:`detect_prefixes`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_vlm.architecture.language import LanguageConfig
from megatron_vlm.architecture.model import ModelConfig, ProjectorConfig, VisionConfig
from megatron_vlm.hf.tables.ops import (
    COLUMN,
    COPY,
    GATED,
    REPLICATED,
    ROW,
    Concatenate,
    MergeQKV,
    Op,
    PadVocabulary,
    Shape,
    ShardRule,
    Unsqueeze,
)

# First what hub checkpoints and save_pretrained write (transformers 5 drops the tower's level), then
# the names inside the running model, which trainers that save a bare state dict write. The first
# prefix that some name starts with is taken, so a longer one stands before its own beginning.
PREFIXES = {
    "tower": (
        "vision_tower.vision_model.",
        "vision_tower.",
        "model.vision_tower.vision_model.",
        "model.vision_tower.",
    ),
    "projector": ("multi_modal_projector.", "model.multi_modal_projector."),
    "newline": ("image_newline", "model.image_newline"),  # the whole name
    "text": ("language_model.model.", "model.language_model."),
    "head": ("language_model.lm_head.", "lm_head."),
}


@dataclass(frozen=True)
class Row:
    """One Megatron tensor and the Hugging Face tensors it is made of."""

    native: str
    hf: tuple[tuple[str, Shape], ...]
    op: Op = COPY
    shard: ShardRule = REPLICATED

    @property
    def native_shape(self) -> Shape:
        """Global shape of the Megatron tensor."""
        return self.op.native_shape([shape for _, shape in self.hf])


@dataclass(frozen=True)
class Carry:
    """Hugging Face tensors that training doesn't run.

    All of them are there, or, if ``optional``, none. ``check`` raises ValueError for values that
    make it wrong to leave them out.
    """

    hf: tuple[tuple[str, Shape], ...]
    reason: str
    optional: bool = False
    check: Callable[[str, Tensor], None] | None = None


@dataclass(frozen=True)
class Alias:
    """A Hugging Face tensor that repeats another one, where the writer didn't leave it out."""

    name: str
    of: str
    shape: Shape


@dataclass(frozen=True)
class Table:
    """All rows of a model."""

    rows: tuple[Row, ...]
    carries: tuple[Carry, ...]
    aliases: tuple[Alias, ...]


def detect_prefixes(names: Collection[str]) -> dict[str, str]:
    """The prefixes of a checkpoint, by part; a part that it lacks gets the first of :data:`PREFIXES`.

    Raises:
        ValueError: the names are of a state dict that ``save_pretrained`` would take apart.
    """
    for name in names:
        if name.endswith(".mlp.experts.gate_up_proj"):
            raise ValueError(
                f"{name} holds all experts, as the running model does; supported: expert by expert, "
                "block_sparse_moe.experts.0.w1.weight and so on, as save_pretrained writes them"
            )
    return {
        part: next((p for p in choices if any(n.startswith(p) for n in names)), choices[0])
        for part, choices in PREFIXES.items()
    }


def build_table(model: ModelConfig, padded_vocab_size: int, prefixes: dict[str, str]) -> Table:
    """The table of a model, with Hugging Face names as they are on disk.

    Args:
        model: the architecture.
        padded_vocab_size: rows of the Megatron embedding.
        prefixes: as :func:`detect_prefixes` returns.
    """
    entries = [
        *VISION_TABLES[model.vision.family](model.vision, model.num_vision_layers_run),
        *PROJECTOR_TABLES[model.projector.kind](model.projector, model.language.hidden_size),
        *projector_extras_table(model),
        *decoder_table(model.language, padded_vocab_size),
    ]

    def on_disk(hf: tuple[tuple[str, Shape], ...]) -> tuple[tuple[str, Shape], ...]:
        return tuple((name.format(**prefixes), shape) for name, shape in hf)

    return Table(
        rows=tuple(replace(e, hf=on_disk(e.hf)) for e in entries if isinstance(e, Row)),
        carries=tuple(replace(e, hf=on_disk(e.hf)) for e in entries if isinstance(e, Carry)),
        aliases=tuple(
            replace(e, name=e.name.format(**prefixes), of=e.of.format(**prefixes))
            for e in entries
            if isinstance(e, Alias)
        ),
    )


Entries = Iterator["Row | Carry | Alias"]


def clip_table(c: VisionConfig, layers_run: int) -> Entries:
    """transformers ``CLIPVisionModel``; megatron-core ``CLIPViTModel``."""
    h, p = c.hidden_size, c.patch_size
    m, t = "vision_model.", "{tower}"
    yield Row(m + "class_token", ((t + "embeddings.class_embedding", (h,)),), Unsqueeze(2))
    yield Row(m + "conv1.weight", ((t + "embeddings.patch_embedding.weight", (h, c.num_channels, p, p)),))
    yield Row(m + "position_embeddings.weight", (_positions(c),))
    for name in ("weight", "bias"):
        # transformers spells it so.
        yield Row(m + f"ln_pre.{name}", ((t + f"pre_layrnorm.{name}", (h,)),))
    yield from _tower_layers(c, layers_run)
    yield _post_layernorm(c)
    yield _position_ids(c)


def siglip_table(c: VisionConfig, layers_run: int) -> Entries:
    """transformers ``SiglipVisionModel``; megatron-core ``CLIPViTModel``, subtype siglip."""
    h, f, p = c.hidden_size, c.ffn_hidden_size, c.patch_size
    m, t = "vision_model.", "{tower}"
    yield Row(m + "conv1.weight", ((t + "embeddings.patch_embedding.weight", (h, c.num_channels, p, p)),))
    yield Row(m + "conv1.bias", ((t + "embeddings.patch_embedding.bias", (h,)),))
    yield Row(m + "position_embeddings.weight", (_positions(c),))
    yield from _tower_layers(c, layers_run)
    yield _post_layernorm(c)
    head = {
        "probe": (1, 1, h),
        "attention.in_proj_weight": (3 * h, h),
        "attention.in_proj_bias": (3 * h,),
        "attention.out_proj.weight": (h, h),
        "attention.out_proj.bias": (h,),
        "layernorm.weight": (h,),
        "layernorm.bias": (h,),
        "mlp.fc1.weight": (f, h),
        "mlp.fc1.bias": (f,),
        "mlp.fc2.weight": (h, f),
        "mlp.fc2.bias": (h,),
    }
    yield Carry(
        tuple((t + f"head.{name}", shape) for name, shape in head.items()),
        "LLaVA takes the patches' features, not the pooled one",
        optional=True,  # vision_use_head
    )
    yield _position_ids(c)


def mlp2x_gelu_table(c: ProjectorConfig, hidden_size: int) -> Entries:
    """transformers ``LlavaMultiModalProjector``; megatron-core ``MultimodalProjector`` of type mlp."""
    m, t = "vision_projection.encoder.", "{projector}"
    yield Row(m + "linear_fc1.weight", ((t + "linear_1.weight", (hidden_size, c.input_size)),), COPY, COLUMN)
    yield Row(m + "linear_fc2.weight", ((t + "linear_2.weight", (hidden_size, hidden_size)),), COPY, ROW)
    if c.bias:
        yield Row(m + "linear_fc1.bias", ((t + "linear_1.bias", (hidden_size,)),), COPY, COLUMN)
        yield Row(m + "linear_fc2.bias", ((t + "linear_2.bias", (hidden_size,)),))


def linear_table(c: ProjectorConfig, hidden_size: int) -> Entries:
    """One affine map; transformers stores it with the identity behind it (see ``ProjectorConfig``)."""
    m, t = "vision_projection.encoder.", "{projector}"
    yield Row(m + "weight", ((t + "linear_1.weight", (hidden_size, c.input_size)),), COPY, COLUMN)
    identity: list[tuple[str, Shape]] = [(t + "linear_2.weight", (hidden_size, hidden_size))]
    if c.bias:
        yield Row(m + "bias", ((t + "linear_1.bias", (hidden_size,)),), COPY, COLUMN)
        identity.append((t + "linear_2.bias", (hidden_size,)))
    yield Carry(tuple(identity), "the identity", check=_check_identity)


def projector_extras_table(model: ModelConfig) -> Entries:
    """The vector behind each row of features, where images are cut into tiles, and ViP-LLaVA's norm."""
    if model.projector.norm_epsilon is not None:
        for name in ("weight", "bias"):
            norm = (f"{{projector}}projector_layernorm.{name}", (model.projector.input_size,))
            yield Row(f"vision_projection.norm.{name}", (norm,))
    if model.anyres is not None:
        yield Row("vision_projection.image_newline", (("{newline}", (model.language.hidden_size,)),))


def decoder_table(c: LanguageConfig, padded_vocab_size: int) -> Entries:
    """transformers ``LlamaForCausalLM``, Mistral, Mixtral, Qwen2 and Qwen3; megatron-core ``GPTModel``.

    They differ in biases, in Qwen3's norms of queries and keys and in Mixtral's experts: the config tells.
    """
    h = c.hidden_size
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    merge = MergeQKV(c.num_attention_heads, c.num_key_value_heads)
    pad = PadVocabulary(c.vocab_size, padded_vocab_size)
    embedding, head = "{text}embed_tokens.weight", "{head}weight"
    yield Row(
        "language_model.embedding.word_embeddings.weight", ((embedding, (c.vocab_size, h)),), pad, COLUMN
    )
    for i in range(c.num_layers):
        m, t = f"language_model.decoder.layers.{i}.", f"{{text}}layers.{i}."
        attention = t + "self_attn."
        yield Row(m + "self_attention.linear_qkv.layer_norm_weight", ((t + "input_layernorm.weight", (h,)),))
        yield Row(
            m + "self_attention.linear_qkv.weight",
            (
                (attention + "q_proj.weight", (queries, h)),
                (attention + "k_proj.weight", (keys, h)),
                (attention + "v_proj.weight", (keys, h)),
            ),
            merge,
            COLUMN,
        )
        if c.qkv_bias:
            yield Row(
                m + "self_attention.linear_qkv.bias",
                (
                    (attention + "q_proj.bias", (queries,)),
                    (attention + "k_proj.bias", (keys,)),
                    (attention + "v_proj.bias", (keys,)),
                ),
                merge,
                COLUMN,
            )
        if c.qk_norm:
            for x in "qk":
                norm = (attention + f"{x}_norm.weight", (c.head_dim,))
                yield Row(m + f"self_attention.{x}_layernorm.weight", (norm,))
        yield Row(
            m + "self_attention.linear_proj.weight", ((attention + "o_proj.weight", (h, queries)),), COPY, ROW
        )
        if c.attention_output_bias:
            yield Row(m + "self_attention.linear_proj.bias", ((attention + "o_proj.bias", (h,)),))
        yield from _expert_rows(c, m, t) if c.num_experts else _mlp_rows(c, m, t)
        yield Carry(
            ((attention + "rotary_emb.inv_freq", (c.head_dim // 2,)),),
            "a buffer of old releases, computed from the config",
            optional=True,
        )
    yield Row("language_model.decoder.final_layernorm.weight", (("{text}norm.weight", (h,)),))
    if c.tie_word_embeddings:
        yield Alias(head, embedding, (c.vocab_size, h))
    else:
        yield Row("language_model.output_layer.weight", ((head, (c.vocab_size, h)),), pad, COLUMN)


def _mlp_rows(c: LanguageConfig, m: str, t: str) -> Entries:
    """A layer's gated MLP and the norm before it; ``m`` and ``t`` begin the names of either side."""
    h, f, mlp = c.hidden_size, c.ffn_hidden_size, t + "mlp."
    yield Row(m + "mlp.linear_fc1.layer_norm_weight", ((t + "post_attention_layernorm.weight", (h,)),))
    yield Row(
        m + "mlp.linear_fc1.weight",
        ((mlp + "gate_proj.weight", (f, h)), (mlp + "up_proj.weight", (f, h))),
        Concatenate(2),
        GATED,
    )
    yield Row(m + "mlp.linear_fc2.weight", ((mlp + "down_proj.weight", (h, f)),), COPY, ROW)
    if c.mlp_bias:
        yield Row(
            m + "mlp.linear_fc1.bias",
            ((mlp + "gate_proj.bias", (f,)), (mlp + "up_proj.bias", (f,))),
            Concatenate(2),
            GATED,
        )
        yield Row(m + "mlp.linear_fc2.bias", ((mlp + "down_proj.bias", (h,)),))


def _expert_rows(c: LanguageConfig, m: str, t: str) -> Entries:
    """Mixtral's router and experts: w1 is the gate, w3 up, w2 down. transformers 5 writes these names too."""
    h, f, moe = c.hidden_size, c.ffn_hidden_size, t + "block_sparse_moe."
    assert c.num_experts is not None
    yield Row(m + "pre_mlp_layernorm.weight", ((t + "post_attention_layernorm.weight", (h,)),))
    yield Row(m + "mlp.router.weight", ((moe + "gate.weight", (c.num_experts, h)),))
    for i in range(c.num_experts):
        expert, theirs = m + f"mlp.experts.local_experts.{i}.", moe + f"experts.{i}."
        yield Row(
            expert + "linear_fc1.weight",
            ((theirs + "w1.weight", (f, h)), (theirs + "w3.weight", (f, h))),
            Concatenate(2),
            GATED,
        )
        yield Row(expert + "linear_fc2.weight", ((theirs + "w2.weight", (h, f)),), COPY, ROW)


def _tower_layers(c: VisionConfig, layers_run: int) -> Entries:
    """CLIP's and SigLIP's blocks, which are the same; those from ``layers_run`` on are carried."""
    h, f = c.hidden_size, c.ffn_hidden_size
    merge = MergeQKV(c.num_attention_heads, c.num_attention_heads)
    for i in range(c.num_layers):
        m, t = f"vision_model.decoder.layers.{i}.", f"{{tower}}encoder.layers.{i}."
        attention, mlp = t + "self_attn.", t + "mlp."
        rows = [
            Row(m + "self_attention.linear_qkv.layer_norm_weight", ((t + "layer_norm1.weight", (h,)),)),
            Row(m + "self_attention.linear_qkv.layer_norm_bias", ((t + "layer_norm1.bias", (h,)),)),
            Row(
                m + "self_attention.linear_qkv.weight",
                tuple((attention + f"{x}_proj.weight", (h, h)) for x in "qkv"),
                merge,
                COLUMN,
            ),
            Row(
                m + "self_attention.linear_qkv.bias",
                tuple((attention + f"{x}_proj.bias", (h,)) for x in "qkv"),
                merge,
                COLUMN,
            ),
            Row(
                m + "self_attention.linear_proj.weight", ((attention + "out_proj.weight", (h, h)),), COPY, ROW
            ),
            Row(m + "self_attention.linear_proj.bias", ((attention + "out_proj.bias", (h,)),)),
            Row(m + "mlp.linear_fc1.layer_norm_weight", ((t + "layer_norm2.weight", (h,)),)),
            Row(m + "mlp.linear_fc1.layer_norm_bias", ((t + "layer_norm2.bias", (h,)),)),
            Row(m + "mlp.linear_fc1.weight", ((mlp + "fc1.weight", (f, h)),), COPY, COLUMN),
            Row(m + "mlp.linear_fc1.bias", ((mlp + "fc1.bias", (f,)),), COPY, COLUMN),
            Row(m + "mlp.linear_fc2.weight", ((mlp + "fc2.weight", (h, f)),), COPY, ROW),
            Row(m + "mlp.linear_fc2.bias", ((mlp + "fc2.bias", (h,)),)),
        ]
        if i < layers_run:
            yield from rows
        else:
            yield Carry(
                tuple(pair for row in rows for pair in row.hf), "a block behind the last feature layer"
            )


def _positions(c: VisionConfig) -> tuple[str, Shape]:
    return "{tower}embeddings.position_embedding.weight", (c.sequence_length, c.hidden_size)


def _post_layernorm(c: VisionConfig) -> Carry:
    return Carry(
        tuple(("{tower}post_layernorm." + name, (c.hidden_size,)) for name in ("weight", "bias")),
        "behind the last feature layer: LLaVA takes hidden states from before it",
    )


def _position_ids(c: VisionConfig) -> Carry:
    return Carry(
        (("{tower}embeddings.position_ids", (1, c.sequence_length)),),
        "a buffer of old releases, 0 to the number of positions",
        optional=True,
    )


def _check_identity(name: str, tensor: Tensor) -> None:
    expected = torch.eye(len(tensor)) if tensor.dim() == 2 else torch.zeros(len(tensor))
    if not torch.equal(tensor.float(), expected):
        raise ValueError(
            f"{name} is not the identity (zero for a bias), as mm_projector_type 'linear' in config.json "
            "promises; remove that key if the projector has two trained layers"
        )


VISION_TABLES = {"clip": clip_table, "siglip": siglip_table}
PROJECTOR_TABLES = {"mlp2x_gelu": mlp2x_gelu_table, "linear": linear_table}
