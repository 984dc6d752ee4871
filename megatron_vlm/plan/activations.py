"""The activations of a pass through a part of the model: its memory beside weights, gradients and optimizer.

A part is described by a :class:`Block`: what it keeps for its backward pass, and the most that exists at
once while it runs. Blocks one after the other are a block again, so that a stage is built from layers. The
numbers follow what the modules in ``models/`` save, operation by operation; ``tests/plan/test_memory.py``
holds them against an allocator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Iterable, List, Optional, Tuple

from megatron_vlm.architecture.language import LanguageConfig
from megatron_vlm.architecture.layers import COLUMN, ROUTER, Linear, expert_weight, weights_of
from megatron_vlm.architecture.model import ModelConfig, padded_vocab_size
from megatron_vlm.architecture.parameters import EMBEDDING, OUTPUT_LAYER, PROJECTOR_NORM
from megatron_vlm.architecture.parts import connector, encoder_embedding
from megatron_vlm.architecture.train_modules import LANGUAGE, PROJECTOR, VISION

LOSS_CHUNK = {"cpu": 256, "cuda": 1024}  # tokens whose logits exist at once: CHUNK of models/loss.py
_FP32 = 4


@dataclass(frozen=True)
class Block:
    """Bytes of a part of the model for one micro batch, on one rank.

    Attributes:
        kept: from its forward pass to its backward pass.
        forward: at most during the forward pass, what is kept included.
        backward: at most during the backward pass, what is kept included.
        idle: at most during a forward pass without gradients, its output included.
    """

    kept: int = 0
    forward: int = 0
    backward: int = 0
    idle: int = 0


def in_a_row(blocks: Iterable[Block]) -> Block:
    """Return blocks one after the other, as one."""
    kept = forward = backward = idle = 0
    for block in blocks:
        forward = max(forward, kept + block.forward)
        backward = max(backward, kept + block.backward)
        idle = max(idle, block.idle)
        kept += block.kept
    return Block(kept, forward, backward, idle)


def recomputed(block: Block, given: int) -> Block:
    """Return a block that keeps only what it is given, ``given`` bytes, and runs again in the backward
    pass."""
    return Block(
        kept=given,
        forward=given + block.idle,
        backward=given + max(block.forward, block.backward),
        idle=block.idle,
    )


@dataclass(frozen=True)
class Shape:
    """The shape of a pass: what the model is run on, and how.

    Attributes:
        batch: rows of a micro batch: samples, or 1 where they are packed.
        sequence: tokens of each, those of the images included.
        images: of a micro batch; the largest, where they are cut.
        element: bytes of a weight, and of an activation.
        device: "cuda" or "cpu"; on a GPU norms and SwiGLU keep their inputs only.
        fused_norm: Transformer Engine's linears, with the norm inside.
        recompute: "none", "selective" or "full".
        recompute_layers: of each stage, with "full"; None for all.
    """

    batch: int
    sequence: int
    images: int
    tp: int
    sequence_parallel: bool
    element: int
    device: str
    fused_norm: bool
    recompute: str
    recompute_layers: Optional[int]

    @property
    def tokens(self) -> int:
        """Positions of a micro batch."""
        return self.batch * self.sequence

    @property
    def own_tokens(self) -> int:
        """Positions between the tensor parallel parts of a layer, on one rank."""
        return self.tokens // self.tp if self.sequence_parallel else self.tokens

    @property
    def new_gradient(self) -> int:
        """Bytes of each element of a weight's gradient between its making and its adding to the fp32 sum.

        On a CPU torch makes an fp32 copy of a bf16 gradient to add it.
        """
        return self.element + (_FP32 if self.device == "cpu" and self.element < _FP32 else 0)


Trains = Callable[[str], bool]


def stage_block(
    model: ModelConfig, shape: Shape, numbers: range, first: bool, last: bool, trains: Trains
) -> Block:
    """Return the block of one pipeline stage.

    Args:
        numbers: of its layers.
        first: it holds tower, projector and embedding.
        last: it holds the output layer.
        trains: whether a parameter is trained, by its name in checkpoints.
    """
    stream = shape.own_tokens * model.language.hidden_size * shape.element
    blocks: List[Block] = []
    flows = not first  # activations that another stage sent ask for gradients
    if first:
        blocks.append(_embedding(model, shape, trains(EMBEDDING)))
        tower, flows_out = _vision(model, shape, trains)
        blocks += tower
        flows = flows_out or trains(EMBEDDING)
    elif shape.device == "cpu" and shape.element < _FP32:
        blocks.append(Block(stream, stream, stream, stream))  # what was received; elsewhere the norm keeps it
    if shape.recompute != "none" and any(trains(f"{LANGUAGE}{name}") for name in _some_of(numbers)):
        flows = True
    layers, flows = _language_layers(model, shape, numbers, flows, trains)
    blocks += layers
    blocks.append(_loss(model, shape, flows, trains) if last else Block(stream, stream, 2 * stream, stream))
    return in_a_row(blocks)


def _some_of(numbers: range) -> List[str]:
    weights = ("self_attention.linear_qkv.weight", "mlp.linear_fc1.weight", expert_weight(0, "linear_fc1"))
    return [f"decoder.layers.{number}.{weight}" for number in numbers for weight in weights]


def _language_layers(
    model: ModelConfig, shape: Shape, numbers: range, flows: bool, trains: Trains
) -> Tuple[List[Block], bool]:
    stream = shape.own_tokens * model.language.hidden_size * shape.element
    blocks = []
    for index, number in enumerate(numbers):
        inputs = _inputs(f"{LANGUAGE}decoder.layers.{number}.", trains, model, shape, vision=False)
        layer, flows = _language_layer(model, shape, flows, inputs)
        full = shape.recompute == "full" and flows
        if full and (shape.recompute_layers is None or index < shape.recompute_layers):
            layer = recomputed(layer, stream)
        blocks.append(layer)
    return blocks, flows


@dataclass(frozen=True)
class _Inputs:
    """The bytes that a layer's linears keep for each element of their inputs; 0 where nothing is trained.

    Attributes:
        low: what adapters keep between A and B, as bytes for each position.
        norms: whether the norms are trained.
        router: as ``qkv``, of the one before experts, whose weights then are ``fc1`` and ``fc2``.
    """

    qkv: int
    proj: int
    fc1: int
    fc2: int
    low: int
    norms: bool
    router: int = 0

    @property
    def attention(self) -> bool:
        """Return whether something of the layer's first half is trained."""
        return bool(self.qkv or self.proj or self.norms)

    @property
    def mlp(self) -> bool:
        """Return whether something of the layer's second half is trained."""
        return bool(self.fc1 or self.fc2 or self.norms or self.router)


def _inputs(prefix: str, trains: Trains, model: ModelConfig, shape: Shape, vision: bool) -> _Inputs:
    lora, a, low = model.lora, shape.element, 0
    adapted = () if lora is None else lora.vision_targets if vision else lora.language_targets

    def linear(place: str, *projections: str) -> int:
        nonlocal low
        own = [
            name
            for name in projections
            if name in adapted and trains(f"{prefix}{place}.adapters.{name}.lora_A.weight")
        ]
        if not own or lora is None:
            return a * trains(f"{prefix}{place}.weight")
        low += len(own) * lora.rank * a
        if lora.dropout == 0.0:
            return a
        # Each A has an input and a mask of its own; torch's mask on a CPU is of the input's type.
        return len(own) * (a + (1 if shape.device == "cuda" else a))

    if not vision and model.language.num_experts is not None:
        experts = range(model.language.num_experts)
        return _Inputs(
            qkv=linear("self_attention.linear_qkv", "q_proj", "k_proj", "v_proj"),
            proj=linear("self_attention.linear_proj", "o_proj", "out_proj"),
            fc1=a * any(trains(prefix + expert_weight(number, "linear_fc1")) for number in experts),
            fc2=a * any(trains(prefix + expert_weight(number, "linear_fc2")) for number in experts),
            low=low,
            norms=trains(f"{prefix}pre_mlp_layernorm.weight"),
            router=a * trains(prefix + ROUTER),
        )
    return _Inputs(
        qkv=linear("self_attention.linear_qkv", "q_proj", "k_proj", "v_proj"),
        proj=linear("self_attention.linear_proj", "o_proj", "out_proj"),
        fc1=linear("mlp.linear_fc1", "gate_proj", "up_proj", "fc1"),
        fc2=linear("mlp.linear_fc2", "down_proj", "fc2"),
        low=low,
        norms=trains(f"{prefix}mlp.linear_fc1.layer_norm_weight"),
    )


def _language_layer(model: ModelConfig, shape: Shape, flows: bool, inputs: _Inputs) -> Tuple[Block, bool]:
    language, a = model.language, shape.element
    hidden, ffn = language.hidden_size, language.ffn_hidden_size // shape.tp
    query = language.num_attention_heads * language.head_dim // shape.tp
    key = language.num_key_value_heads * language.head_dim // shape.tp
    n, own = shape.tokens, shape.own_tokens
    stream, fused_qkv = own * hidden * a, n * (query + 2 * key) * a

    norm = _rms_norm(shape, hidden, inputs.norms)
    repeated = query > key and not shape.fused_norm
    # Values are a part of the fused output, which stays as long as they do; unless they are repeated.
    values = 2 * n * query * a if repeated else fused_qkv + n * key * a
    rotary = 4 * shape.sequence * language.head_dim * a
    scores = n * language.num_attention_heads // shape.tp * _FP32
    attention = norm + own * hidden * inputs.qkv + 2 * n * query * a + values + rotary + scores
    attention += n * query * (inputs.proj if inputs.proj > a else 0) + n * inputs.low // 2
    if language.qk_norm and shape.device == "cpu" and a < _FP32:
        attention += n * (query + key) * _FP32 * (1 + inputs.norms)
    elif language.qk_norm:
        attention += n * query * a * (query > key) + fused_qkv * repeated
        attention += n * (query + key) * a * inputs.norms * (shape.device == "cpu")
    products = 2 if shape.device == "cuda" else 4  # of the MLP's width: fused SwiGLU keeps its input alone
    mlp = norm + own * hidden * inputs.fc1 + n * ffn * (products * a + inputs.fc2) + n * inputs.low // 2

    attention_flows = flows or inputs.attention
    attention_block = Block(
        kept=attention * attention_flows,
        forward=attention + 2 * stream + n * query * a,
        backward=max(
            attention + 2 * stream + n * (3 * query + 2 * key) * a,
            norm
            + 3 * stream
            + fused_qkv
            + hidden * (query + 2 * key) * shape.new_gradient * bool(inputs.qkv),
        ),
        idle=2 * stream + n * (3 * query + 2 * key) * a,
    )
    mlp_flows = attention_flows or inputs.mlp
    mlp_block = Block(
        kept=mlp * mlp_flows,
        forward=mlp + 2 * stream,
        backward=max(
            mlp + 2 * stream + 2 * n * ffn * a,
            mlp + 2 * stream + n * ffn * a + hidden * ffn * shape.new_gradient * bool(inputs.fc2),
            norm + 3 * stream + 2 * n * ffn * a + 2 * hidden * ffn * shape.new_gradient * bool(inputs.fc1),
        ),
        idle=2 * stream + 4 * n * ffn * a,
    )
    if language.num_experts is not None:
        mlp, mlp_block = _experts(language, shape, inputs, norm, mlp_flows)
    if shape.recompute == "selective" and mlp_flows:
        outside = 0 if shape.fused_norm and language.num_experts is None else norm
        inner = recomputed(
            Block(mlp - outside, mlp_block.forward, mlp_block.backward, mlp_block.idle), stream
        )
        mlp_block = Block(outside + inner.kept, inner.forward, inner.backward, inner.idle)
    halves = [
        half if on else Block(0, half.idle, 0, half.idle)
        for half, on in ((attention_block, attention_flows), (mlp_block, mlp_flows))
    ]
    return in_a_row(halves), mlp_flows


def _experts(
    language: LanguageConfig, shape: Shape, inputs: _Inputs, norm: int, flows: bool
) -> Tuple[int, Block]:
    """Return what a mixture of experts keeps, and the block: each token is there as often as it has
    experts."""
    a, hidden, ffn = shape.element, language.hidden_size, language.ffn_hidden_size // shape.tp
    assert language.num_experts is not None and language.experts_per_token is not None
    n, copies = shape.tokens, shape.tokens * language.experts_per_token
    stream, whole, routed = shape.own_tokens * hidden * a, n * hidden * a, copies * hidden * a
    one = copies // language.num_experts
    products = 2 if shape.device == "cuda" else 5  # on a CPU the one with the router's weights, too
    routing = n * language.num_experts * 2 * _FP32 + copies * (8 + 2 * _FP32)
    kept = norm + routing + n * hidden * inputs.router
    kept += copies * (hidden * inputs.fc1 + ffn * (products * a + inputs.fc2))
    gradient = 2 * hidden * ffn * shape.new_gradient * bool(inputs.fc1)
    return kept, Block(
        kept=kept * flows,
        forward=kept + stream + 2 * routed + whole * (not inputs.router),
        backward=max(
            kept + stream + whole + routed + one * ffn * 3 * a,
            norm + stream + 2 * routed + whole + one * ffn * 3 * a + gradient,
        ),
        idle=2 * stream + whole + 3 * routed + one * ffn * 5 * a,
    )


def _rms_norm(shape: Shape, hidden: int, trained: bool) -> int:
    """Return the bytes that an RMSNorm keeps, its output left out: that belongs to what comes next.

    torch has no fused one for CPUs: there it keeps its input in fp32, and what the weight multiplies.
    """
    if shape.device == "cuda":
        return shape.own_tokens * (hidden * shape.element + _FP32)
    return shape.own_tokens * _FP32 * (hidden * (1 + trained) + 1)


def _vision(model: ModelConfig, shape: Shape, trains: Trains) -> Tuple[List[Block], bool]:
    vision, a = model.vision, shape.element
    n = shape.images * model.image_tiles * vision.sequence_length
    hidden, ffn = vision.hidden_size, vision.ffn_hidden_size // shape.tp
    stream, inner = n * hidden * a, n * hidden // shape.tp * a
    heads = n * vision.num_attention_heads // shape.tp * _FP32
    wide = n * ffn * a
    flows = any(trains(weight.name) for weight in weights_of(encoder_embedding(model), VISION))
    blocks = [Block(0, 3 * stream, 3 * stream, 3 * stream)]
    for number in range(model.num_vision_layers_run):
        inputs = _inputs(f"{VISION}decoder.layers.{number}.", trains, model, shape, vision=True)
        flows = flows or inputs.attention or inputs.mlp
        idle = 3 * stream + max(5 * inner, 3 * wide)
        if not flows:
            blocks.append(Block(0, idle, 0, idle))
            continue
        attention = stream + n * hidden * inputs.qkv + 4 * inner + heads + n * inputs.low
        keeps = 2 if vision.activation == "quick_gelu" else 1
        mlp = stream + n * hidden * inputs.fc1 + wide * keeps + n * ffn * inputs.fc2
        mlp_block = Block(mlp, mlp + 2 * stream, mlp + 2 * stream + 2 * wide, idle)
        if shape.recompute == "selective":
            mlp_block = recomputed(mlp_block, stream * (1 if shape.fused_norm else 2))
        layer = in_a_row(
            [Block(attention, attention + 2 * stream, attention + 2 * stream + 4 * inner, idle), mlp_block]
        )
        if shape.recompute == "full" and (shape.recompute_layers is None or number < shape.recompute_layers):
            layer = recomputed(layer, stream)
        blocks.append(layer)
    projector, flows = _projector(model, shape, flows, trains)
    return [*blocks, projector], flows


def _projector(model: ModelConfig, shape: Shape, flows: bool, trains: Trains) -> Tuple[Block, bool]:
    """Return the connector: linears one after the other, with an activation between each two."""
    a = shape.element
    tiles = shape.images * model.image_tiles
    positions, n = tiles * model.vision.sequence_length, tiles * model.tile_tokens
    features, out = positions * model.projector.input_size * a, n * model.language.hidden_size * a
    kept = widest = 0
    if model.projector.norm_epsilon is not None:
        flows = flows or trains(PROJECTOR_NORM)
        kept += features * flows  # what it normalises
    linears = [layer for layer in connector(model) if isinstance(layer, Linear)]
    given = features
    for number, linear in enumerate(linears):
        weight = trains(f"{PROJECTOR}{linear.name}.weight")
        trained = weight or trains(f"{PROJECTOR}{linear.name}.bias")
        kept += given * (weight if number else trained)
        flows = flows or trained
        if number < len(linears) - 1:
            given = n * linear.outputs * a // (shape.tp if linear.cut == COLUMN else 1)
            widest = max(widest, given)
            kept += given * flows  # what is activated
    packed = 2 * out * (model.anyres is not None)  # tiles' features put together as images
    peak = kept + features + 2 * widest + 2 * out + packed
    return Block(kept * flows, peak, (kept + 2 * out + 2 * widest) * flows, peak), flows


def _embedding(model: ModelConfig, shape: Shape, trained: bool) -> Block:
    stream = shape.tokens * model.language.hidden_size * shape.element
    rows = padded_vocab_size(model.language.vocab_size, shape.tp) // shape.tp
    gradient = rows * model.language.hidden_size * shape.new_gradient if trained else 0
    return Block(0, 2 * stream, 2 * stream + gradient, 2 * stream)


def _loss(model: ModelConfig, shape: Shape, flows: bool, trains: Trains) -> Block:
    """Return the last norm, the output layer and the cross entropy, as ``models/loss.py`` has them:
    gradients are made with the loss, from the logits of some tokens at a time. All of the text counts as
    trained."""
    language, a = model.language, shape.element
    hidden = language.hidden_size
    columns = padded_vocab_size(language.vocab_size, shape.tp) // shape.tp
    output = EMBEDDING if language.tie_word_embeddings else OUTPUT_LAYER
    trained = shape.batch * model.text_tokens(shape.sequence)
    norm = _rms_norm(shape, hidden, trains(f"{LANGUAGE}decoder.final_layernorm.weight")) * flows
    normed = shape.own_tokens * hidden * a + shape.tokens * hidden * a * shape.sequence_parallel
    rows = trained * hidden * a
    table = columns * hidden * trains(output)
    kept = norm + rows * flows + table * _FP32
    # The last chunk's logits and their gradient are there while the next ones are made; fp32 needs no copy.
    chunk = min(trained, LOSS_CHUNK[shape.device]) * columns
    last = chunk * (_FP32 if a == _FP32 else _FP32 + a)
    logits = last * (2 if trained > LOSS_CHUNK[shape.device] else 1)
    product = table * shape.new_gradient if a < _FP32 else 0
    forward = kept + normed + rows + max(logits, last + product)
    backward = kept + rows + (table * a if a < _FP32 else 0) + shape.tokens * hidden * a
    return Block(kept, forward, backward, forward - kept)
