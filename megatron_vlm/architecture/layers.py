"""The layers that parts of a model are described with: the tensors of each, and its products.

A part yields its layers once, in the order of its forward pass. Counts of parameters and of operations are
loops over them. Names are those that checkpoints have, without the prefix of the part or the layer's number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Iterable, Iterator, Optional, Sequence, Tuple, Union

COLUMN, ROW = "column", "row"  # a linear is cut along its output or along its input features
ROUTER = "mlp.router.weight"


def expert_weight(number: int, linear: str) -> str:
    """Return the name of an expert's weight."""
    return f"mlp.experts.local_experts.{number}.{linear}.weight"


@dataclass(frozen=True)
class Weight:
    """A tensor of a layer.

    Attributes:
        shape: of all ranks' parts together.
        cut: it is dealt to the tensor parallel ranks; else each holds all of it.
    """

    name: str
    shape: Tuple[int, ...]
    cut: bool = False

    def size(self, tp: int) -> int:
        """Return the elements that one rank holds."""
        return prod(self.shape) // (tp if self.cut else 1)


@dataclass(frozen=True)
class Amount:
    """The amount that a part works on.

    Attributes:
        rows: positions that go through its linears.
        pairs: of a query and a key that it may see.
    """

    rows: int
    pairs: int = 0


# A weight's name, or None for attention; operations forward.
Product = Tuple[Optional[str], int]
# Products one after the other, and beside each other on one input, as a linear and its LoRA adapters.
Step = Sequence[Sequence[Product]]


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter beside a linear, for one of the projections that the linear is made of.

    B is cut where the linear's output is, A where its input is; the other is whole on every rank.
    """

    name: str
    rank: int
    inputs: int
    outputs: int
    cut: Optional[str]

    def weights(self) -> Iterator[Weight]:
        """Yield A and B."""
        yield Weight(f"{self.name}.lora_A.weight", (self.rank, self.inputs), self.cut == ROW)
        yield Weight(f"{self.name}.lora_B.weight", (self.outputs, self.rank), self.cut == COLUMN)

    def products(self, rows: int) -> Sequence[Product]:
        """Return the products with A and with B."""
        return [(weight.name, 2 * rows * prod(weight.shape)) for weight in self.weights()]


@dataclass(frozen=True)
class Linear:
    """An affine map, or several of one input as one.

    Attributes:
        cut: :data:`COLUMN`, :data:`ROW`, or None where each rank holds all of it.
        adapters: beside it.
    """

    name: str
    inputs: int
    outputs: int
    cut: Optional[str] = None
    bias: bool = False
    adapters: Tuple[Adapter, ...] = ()

    def weights(self) -> Iterator[Weight]:
        """Yield its tensors. A bias that is added to sums over ranks is whole on each."""
        yield Weight(f"{self.name}.weight", (self.outputs, self.inputs), self.cut is not None)
        if self.bias:
            yield Weight(f"{self.name}.bias", (self.outputs,), self.cut == COLUMN)
        for adapter in self.adapters:
            yield from adapter.weights()

    def step(self, amount: Amount) -> Step:
        """Return the layer's products."""
        whole = 2 * amount.rows * self.inputs * self.outputs
        return [[(f"{self.name}.weight", whole)], *(a.products(amount.rows) for a in self.adapters)]

    def adapted(self, rank: int, targets: Sequence[str], **projections: int) -> Linear:
        """Return the layer with an adapter for each of its projections that is among ``targets``.

        Args:
            projections: output features by Hugging Face's name.
        """
        adapters = tuple(
            Adapter(f"{self.name}.adapters.{name}", rank, self.inputs, outputs, self.cut)
            for name, outputs in projections.items()
            if name in targets
        )
        return replace(self, adapters=adapters)


@dataclass(frozen=True)
class Convolution:
    """A convolution whose windows do not overlap: a linear over the pixels of each patch."""

    name: str
    shape: Tuple[int, ...]  # of its weight: output channels, input channels, height, width
    patches: int  # of an input
    positions: int  # of an input in the layers behind it
    bias: bool = False

    def weights(self) -> Iterator[Weight]:
        """Yield its tensors."""
        yield Weight(f"{self.name}.weight", self.shape)
        if self.bias:
            yield Weight(f"{self.name}.bias", self.shape[:1])

    def step(self, amount: Amount) -> Step:
        """Return the convolution's product."""
        patches = amount.rows // self.positions * self.patches
        return [[(f"{self.name}.weight", 2 * patches * prod(self.shape))]]


@dataclass(frozen=True)
class Trained:
    """Tensors that are multiplied with no matrix: of norms, learned positions, tokens of a part's own.

    Gradients have to reach them where they are trained.
    """

    tensors: Tuple[Weight, ...]

    def weights(self) -> Iterator[Weight]:
        """Yield its tensors."""
        yield from self.tensors

    def step(self, amount: Amount) -> Step:
        """Return no operations, under the name of the first tensor."""
        return [[(self.tensors[0].name, 0)]]


def norm(name: str, size: int, bias: bool = False) -> Trained:
    """Return a norm.

    Args:
        name: of its tensors, up to ``weight`` and ``bias``.
    """
    names = ("weight", "bias") if bias else ("weight",)
    return Trained(tuple(Weight(f"{name}{which}", (size,)) for which in names))


def vector(name: str, *shape: int) -> Trained:
    """Return one tensor that is multiplied with no matrix."""
    return Trained((Weight(name, shape),))


@dataclass(frozen=True)
class Attention:
    """The products of attention: queries with keys, then weights with values.

    Attributes:
        width: features of all query heads.
    """

    width: int

    def weights(self) -> Iterator[Weight]:
        """Yield nothing: attention has no tensors."""
        return iter(())

    def step(self, amount: Amount) -> Step:
        """Return attention's two products as one."""
        return [[(None, 4 * amount.pairs * self.width)]]


@dataclass(frozen=True)
class Experts:
    """A router, and the gated MLPs that it sends tokens to."""

    count: int
    per_token: int
    hidden: int
    ffn: int

    def weights(self) -> Iterator[Weight]:
        """Yield the router's tensor and those of all experts."""
        yield Weight(ROUTER, (self.count, self.hidden))
        for number in range(self.count):
            yield Weight(expert_weight(number, "linear_fc1"), (2 * self.ffn, self.hidden), cut=True)
            yield Weight(expert_weight(number, "linear_fc2"), (self.hidden, self.ffn), cut=True)

    def step(self, amount: Amount) -> Step:
        """Return all products, as if each expert worked on as many tokens: together it is all the same."""
        tokens, product = amount.rows * self.per_token, self.hidden * self.ffn
        shares = [(tokens + number) // self.count for number in range(self.count)]
        return [
            [(ROUTER, 2 * amount.rows * self.hidden * self.count)],
            *(
                [
                    (expert_weight(number, "linear_fc1"), 4 * share * product),
                    (expert_weight(number, "linear_fc2"), 2 * share * product),
                ]
                for number, share in enumerate(shares)
            ),
        ]


Layer = Union[Linear, Convolution, Trained, Attention, Experts]


def named(prefix: str, step: Step) -> Step:
    """Return a layer's products with ``prefix`` before the names."""
    return [
        [(name if name is None else prefix + name, count) for name, count in products] for products in step
    ]


def weights_of(layers: Iterable[Layer], prefix: str = "") -> Iterator[Weight]:
    """Yield the tensors of layers, with ``prefix`` before their names."""
    for layer in layers:
        for weight in layer.weights():
            yield replace(weight, name=prefix + weight.name)
