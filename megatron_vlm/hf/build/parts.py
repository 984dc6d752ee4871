"""The tensors of a LLaVA that is put together: what each will be, and how it is read from where it is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.hf.formats.folder import HFFolder, TensorInfo, cast
from megatron_vlm.hf.formats.streaming import check_finite, same_bits
from megatron_vlm.hf.mm_projector import MMProjector
from megatron_vlm.hf.tables.model import build_table
from megatron_vlm.hf.tables.table import ON_THE_HUB, PREFIXES, Carry, Row, fixed_tensors

# What the tensors of a text model or a tower begin with, alone or in a larger model, and one that each has.
_TEXT_PREFIXES, _EMBEDDING = (*PREFIXES["text"], "model.", ""), "embed_tokens.weight"
_TOWER_PREFIXES, _PATCHES = (*PREFIXES["tower"], "vision_model.", ""), "embeddings.patch_embedding.weight"
_BUFFERS = ("position_ids", "rotary_emb.inv_freq")  # of old releases, computed from the config
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Source:
    """A tensor of the new model."""

    info: TensorInfo
    read: Callable[[], Tensor]


Sources = dict[str, Source]


@dataclass(frozen=True)
class Vocabulary:
    """The rows of an embedding or a head, of which some are new.

    Attributes:
        rows: that there are.
        size: rows that there will be.
        known: rows that belong to a token, ascending.
        new: rows that mean nothing yet, ascending, those from ``rows`` on included.
    """

    rows: int
    size: int
    known: tuple[int, ...]
    new: tuple[int, ...]

    def extend(self, tensor: Tensor) -> Tensor:
        """Extend ``[rows, hidden]`` to ``[size, hidden]``, with the mean of the rows ``known`` in the rows
        ``new``.

        The mean is taken in float64 and rounded to float32, then to the tensor's dtype.
        """
        result = tensor.new_empty(self.size, *tensor.shape[1:])
        result[: self.rows] = tensor
        total = torch.zeros(tensor.shape[1:], dtype=torch.float64)
        for some in torch.tensor(self.known).split(_ROWS_AT_ONCE):
            total += tensor[some].double().sum(0)
        result[list(self.new)] = (total / len(self.known)).float().to(result.dtype)
        return result


class Part:
    """A text model or a tower among a folder's weights.

    Args:
        flag: what the user gave, for messages.
        weights: the folder's.
        kind: ``text`` or ``tower``.

    Raises:
        ValueError: there is none in the folder, or something else beside a text model.
    """

    def __init__(self, flag: str, weights: HFFolder, kind: str) -> None:
        self.flag, self.weights, self.target = flag, weights, ON_THE_HUB[kind]
        prefixes, probe = {
            "text": (_TEXT_PREFIXES, _EMBEDDING),
            "tower": (_TOWER_PREFIXES, _PATCHES),
        }[kind]
        found = next((prefix for prefix in prefixes if prefix + probe in weights.tensors), None)
        if found is None:
            what = "language model" if kind == "text" else "vision tower"
            raise ValueError(f"{flag}: no {what} in its weights, which have no {probe}")
        self.prefix = found
        self.head = next((p + "weight" for p in PREFIXES["head"] if p + "weight" in weights.tensors), None)
        alone = found in ("model.", "")  # else it is a LLaVA's
        for name in weights.tensors if kind == "text" and alone else ():
            if not name.startswith(found) and name != self.head:
                raise ValueError(f"{flag}: {name} is no part of a language model")

    def __iter__(self) -> Iterator[TensorInfo]:
        """Yield the part's tensors in the order that they are stored in, without buffers."""
        for infos in self.weights.files.values():
            for info in infos:
                if info.name.startswith(self.prefix) and not info.name.endswith(_BUFFERS):
                    yield info

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that loses nothing of any tensor."""
        dtypes = (info.dtype for info in self if info.dtype.is_floating_point)
        return functools.reduce(torch.promote_types, dtypes)

    def holds(self, name: str) -> bool:
        """Return whether the part has a tensor of this name behind its prefix."""
        return self.prefix + name in self.weights.tensors

    def sources(self, dtype: torch.dtype) -> Sources:
        """Return the tensors of the part, but for the head."""
        return dict(
            self._source(info.name, self.target + info.name.removeprefix(self.prefix), dtype)
            for info in self
            if info.name != self.head
        )

    def text_sources(self, dtype: torch.dtype, tied: bool, vocabulary: Vocabulary) -> Sources:
        """Return the tensors of a language model, with the vocabulary that it will have.

        Raises:
            ValueError: there is no head, or one that is tied and differs, or another number of rows.
        """
        found, embedding, own = self.sources(dtype), self.prefix + _EMBEDDING, self.head
        if tied and own is not None and not same_bits(self.weights.read(own), self.weights.read(embedding)):
            raise ValueError(
                f"{self.flag}: {own} differs from the embedding, but config.json ties them; set "
                "tie_word_embeddings to false"
            )
        names = [self.target + _EMBEDDING]
        if not tied:
            if own is None:
                raise ValueError(f"{self.flag}: lm_head.weight is missing; give a causal language model")
            names.append(ON_THE_HUB["head"] + "weight")
            found.update([self._source(own, names[1], dtype)])
        for name in names:
            found[name] = self._extended(found[name], vocabulary)
        return found

    def _source(self, name: str, target: str, dtype: torch.dtype) -> tuple[str, Source]:
        info = self.weights.tensors[name]
        stored = dtype if info.dtype.is_floating_point else info.dtype

        def read() -> Tensor:
            tensor = self.weights.read(name)
            check_finite(name, tensor)
            return cast(name, tensor, stored)

        return target, Source(TensorInfo(target, stored, info.shape), read)

    def _extended(self, source: Source, vocabulary: Vocabulary) -> Source:
        name, (rows, *rest) = source.info.name, source.info.shape
        if rows != vocabulary.rows:
            raise ValueError(
                f"{self.flag}: {name} has {rows} rows, config.json says vocab_size {vocabulary.rows}"
            )
        info = TensorInfo(name, source.info.dtype, (vocabulary.size, *rest))
        return Source(info, lambda: vocabulary.extend(source.read()))


def projector_sources(
    model: ModelConfig, dtype: torch.dtype, seed: int, trained: MMProjector | None
) -> Sources:
    """Return a projector from a file, or one as LLaVA's starts, by torch's own initialisation.

    What the table says always has one value, such as the identity behind ``linear``, has that;
    ``image_newline``, where images are cut, is normal with variance 1 / hidden size.

    Raises:
        ValueError: the one given is not for this model.
    """
    table, prefix = build_table(model, model.language.vocab_size, ON_THE_HUB), ON_THE_HUB["projector"]
    entries: list[Row | Carry] = [*table.rows, *table.carries]
    shapes = {name: shape for entry in entries for name, shape in entry.hf if name.startswith(prefix)}
    named: dict[str, Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in dict.fromkeys(name.rpartition(".")[0] for name in shapes):
            outer, inner = shapes[f"{layer}.weight"]
            linear = torch.nn.Linear(inner, outer, bias=f"{layer}.bias" in shapes)
            named.update((f"{layer}.{own}", tensor) for own, tensor in linear.state_dict().items())
        newline = torch.randn(model.language.hidden_size) / model.language.hidden_size**0.5
    named.update((name, make()) for name, make in fixed_tensors(table).items())
    if model.anyres is not None:
        named[ON_THE_HUB["newline"]] = newline
    if trained is not None:
        named.update(trained.fit(model).named(ON_THE_HUB))
    found = {}
    for name, tensor in named.items():
        info = TensorInfo(name, dtype, tuple(tensor.shape))
        found[name] = Source(info, functools.partial(cast, name, tensor, dtype))
    return found


def check_sources(sources: Sources, model: ModelConfig, text: Part, tower: Part) -> None:
    """Check that the tensors are those of the model that the config describes.

    Raises:
        ValueError: one is missing, has another shape, or is none of them.
    """
    table = build_table(model, model.language.vocab_size, ON_THE_HUB)
    allowed = table.shapes
    for name in [name for name in table.required if name not in sources] or sources:
        part = tower if name.startswith(tower.target) else text
        own = f"{part.flag}: {name.removeprefix(part.target)}"
        if name not in sources:
            raise ValueError(f"{own} is missing in its weights")
        if name not in allowed:
            raise ValueError(f"{own} is no part of the model that its config.json describes")
        if sources[name].info.shape != allowed[name]:
            found = list(sources[name].info.shape)
            raise ValueError(f"{own} has shape {found}; config.json implies {list(allowed[name])}")
