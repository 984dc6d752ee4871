"""The way of media through a model: an encoder's inputs, and the places of its features in the text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor, device, nn

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.data.batch import to_device
from megatron_vlm.models.transformer_configs import TransformerConfigs


class Index(Protocol):
    """The index by which a connector makes features of the encoder's."""

    def to(self, device: device) -> Any:
        """Return the index with its tensors on a device."""


@dataclass(frozen=True)
class FeatureOrder:
    """The features that a microbatch's items of one kind become, worked out on the CPU.

    Attributes:
        features: how many there are.
        index: how the connector makes them of the encoder's features; None: they are these, as they are.
        places: int64 ``[features]``: among the placeholders, in the order in which the connector gives the
            features; None: one after the other.
        made_of: where the number of features comes from, for messages, such as ``x 3 features =``.
    """

    features: int
    index: Index | None = None
    places: Tensor | None = None
    made_of: str = "with"


@dataclass(frozen=True)
class Placed:
    """The media of one kind in a microbatch, as the first stage takes them.

    Attributes:
        inputs: what the encoder takes, by name.
        positions: int64 ``[2, features]``: batch and sequence index of each feature's placeholder, in the
            order in which the connector gives the features.
        index: as :class:`FeatureOrder` has it.
    """

    inputs: Mapping[str, Tensor]
    positions: Tensor
    index: Any = None

    def to(self, device: device) -> Placed:
        """Return the media on a device."""
        return Placed(
            {name: to_device(tensor, device) for name, tensor in self.inputs.items()},
            to_device(self.positions, device),
            None if self.index is None else self.index.to(device),
        )


class Modality(ABC):
    """One kind of media in a model: its modules, and the way through them.

    Attributes:
        kind: its name in :data:`megatron_vlm.data.media.kinds.KINDS`.
        modules: the names of its modules in the model, in the model's order.
        token_id: the placeholder that a feature takes the place of.
    """

    kind: ClassVar[str]
    modules: ClassVar[tuple[str, ...]]
    token_id: int

    @classmethod
    @abstractmethod
    def of(cls, model: ModelConfig) -> Modality | None:
        """Return the modality of a model; None where the model doesn't take the kind."""

    @abstractmethod
    def build(self, configs: TransformerConfigs, impl: str) -> dict[str, nn.Module]:
        """Return the modules by name.

        Args:
            impl: layer spec, ``"local"`` or ``"transformer_engine"``.
        """

    @abstractmethod
    def order(self, sizes: Tensor) -> FeatureOrder:
        """Return which features items of some sizes become.

        Args:
            sizes: int64 ``[items, numbers]``, on the CPU.
        """

    @abstractmethod
    def encode(self, modules: nn.Module, inputs: Mapping[str, Tensor], index: Any) -> Tensor:
        """Return a microbatch's features, ``[features, hidden]``.

        Args:
            modules: the model, which has the modality's by their names.
            inputs: what the encoder takes, by name.
            index: as :meth:`order` gave it, on the inputs' device.
        """

    @abstractmethod
    def blank(self, like: Tensor) -> dict[str, Tensor]:
        """Return the smallest input that the encoder takes, of a tensor's type and on its device."""

    def unused(self, modules: nn.Module, like: Tensor) -> Tensor:
        """Return a scalar that every parameter of the modules has a part in, from the blank input."""
        return self.encode(modules, self.blank(like), None).sum()

    def place(self, input_ids: Tensor, sizes: Tensor, inputs: Mapping[str, Tensor] | None = None) -> Placed:
        """Return where the features of a microbatch's items go.

        Args:
            input_ids: ``[b, s]``, best on the CPU: the result's size depends on the data.
            sizes: of the items, as for :meth:`order`.
            inputs: what the encoder takes, where this rank has it.

        Raises:
            ValueError: placeholders and features differ in number.
        """
        order = self.order(sizes)
        positions = (input_ids == self.token_id).nonzero().t().contiguous()
        if positions.shape[1] != order.features:
            raise ValueError(
                f"{positions.shape[1]} {self.kind} tokens in the text but {len(sizes)} {self.kind}s "
                f"{order.made_of} {order.features}; the tokenizer and the model must agree on the "
                f"{self.kind} token ({self.token_id}) and on its count per {self.kind}"
            )
        if order.places is not None:
            positions = positions[:, order.places]
        return Placed(inputs or {}, positions, order.index)
