"""megatron-core's optimizers: built, stepped, and saved in one form whatever their kind.

megatron-core has a plain, a mixed-precision and a distributed optimizer, each with a checkpoint form
of its own. Here every one of them is saved as whole tensors per parameter::

    optimizer.state.exp_avg.<parameter>       fp32
    optimizer.state.exp_avg_sq.<parameter>    fp32
    optimizer.state.param.<parameter>         fp32 master weight, where the weights aren't fp32

so that a run goes on at any layout, with or without the distributed optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.fp8_utils import is_float8tensor, post_all_gather_processing
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import FP32Optimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate, ParamWithNamePredicate
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import Float16Module, MegatronModule, param_is_not_shared

from megatron_vlm.parallel import cpu
from megatron_vlm.parallel.adam import use_in_megatron_core

_PREFIX = "optimizer.state"
MASTER_WEIGHTS = f"{_PREFIX}.param."


def wrap_model(
    chunks: Sequence[MegatronModule],
    distributed_optimizer: bool,
    overlap_grad_reduce: bool,
    overlap_param_gather: bool = False,
    fp8_param_gather: bool = False,
) -> list[DistributedDataParallel]:
    """Wrap this rank's model chunks for mixed precision and data parallelism.

    Gradients are summed, not averaged: the loss is divided by the global number of trained tokens.

    Args:
        distributed_optimizer: shard optimizer state over data parallel ranks (ZeRO 1).
        overlap_grad_reduce: reduce gradients while the backward pass runs.
        overlap_param_gather: gather updated weights while the next forward pass runs; needs both others.
            Whatever reads weights without running the modules calls :meth:`Optimizer.gather_weights` first.
        fp8_param_gather: weights that are FP8 in memory are gathered so; needs ``distributed_optimizer``.
    """
    config = chunks[0].config
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=distributed_optimizer,
        overlap_grad_reduce=overlap_grad_reduce,
        overlap_param_gather=overlap_param_gather,
        fp8_param_gather=fp8_param_gather,
    )
    return [
        DistributedDataParallel(config, ddp_config, Float16Module(config, chunk) if config.bf16 else chunk)
        for chunk in chunks
    ]


def _own_part(optimizer: DistributedOptimizer, parameter: torch.nn.Parameter) -> slice:
    """Return the elements of a parameter that this data-parallel rank updates; it has no gradient of the
    others."""
    if parameter not in optimizer.model_param_gbuf_map:
        return slice(0)
    part = optimizer._get_model_param_range_map(parameter)["param"]
    return slice(part.start, part.end)


def is_decayed(name: str, shape: Sequence[int]) -> bool:
    """Return whether AdamW decays a parameter: all but biases and norms, as in Megatron-LM."""
    return len(shape) > 1 and not name.endswith(".bias")


class Optimizer:
    """AdamW over the trainable parameters of a rank's wrapped model chunks.

    Parameters with the same ``train_entry`` share a learning rate, those without one have the first.
    Biases and norms aren't decayed.

    Args:
        models: from :func:`wrap_model`, with ``requires_grad`` already set.
        entries: number of learning rates.
    """

    def __init__(
        self,
        models: list[DistributedDataParallel],
        weight_decay: float,
        beta1: float,
        beta2: float,
        eps: float,
        clip_grad: float,
        entries: int = 1,
    ) -> None:
        use_in_megatron_core("cpu" if cpu.installed() else "cuda")
        self.config = OptimizerConfig(
            optimizer="adam",
            lr=0.0,  # set before each step
            min_lr=0.0,
            weight_decay=weight_decay,
            adam_beta1=beta1,
            adam_beta2=beta2,
            adam_eps=eps,
            clip_grad=clip_grad,
            bf16=models[0].config.bf16,
            params_dtype=models[0].config.params_dtype,
            use_distributed_optimizer=models[0].ddp_config.use_distributed_optimizer,
            overlap_param_gather=models[0].ddp_config.overlap_param_gather,
            fp8_recipe=models[0].config.fp8_recipe if models[0].config.fp8 else None,
        )
        self.models = models
        self.chained = get_megatron_optimizer(
            self.config, models, _overrides(entries), use_gloo_process_groups=False
        )
        # One, or more where parameters differ in the ranks that hold them, as experts' do.
        self.inner: list[Any] = list(self.chained.chained_optimizers)
        self._owners = {id(main): inner for inner in self.inner for main in _main_weights(inner)}
        for group in self.groups:
            group["weight_decay"] = weight_decay * group["wd_mult"]

    @property
    def has_master_weights(self) -> bool:
        """Return whether the weights aren't fp32, and the optimizer keeps a copy that is."""
        return self.config.bf16

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The parameter groups; the same list on every rank, though some are empty on some."""
        return [group for inner in self.inner for group in inner.optimizer.param_groups]

    def zero_grad(self) -> None:
        """Forget the gradients, those in the reduction buffers too."""
        for model in self.models:
            model.zero_grad_buffer()
        self.chained.zero_grad()

    def gradient_norm(self) -> float:
        """Return the global L2 norm of the reduced gradients, before clipping; a collective call."""
        self.chained.prepare_grads()
        return float(self.chained.get_grad_norm())

    def squared_gradients(self, groups: Sequence[Sequence[torch.nn.Parameter]]) -> torch.Tensor:
        """Return this rank's share of the squared L2 norm of each group's gradients.

        All ranks' shares add up to it.

        To be called between :meth:`gradient_norm` and :meth:`step`.

        Args:
            groups: trained parameters of this rank.

        Returns:
            float32 ``[groups]``.
        """
        squares = torch.zeros(len(groups), device=torch.cuda.current_device())
        for number, parameters in enumerate(groups):
            for parameter in parameters:
                if not param_is_not_shared(parameter) or not param_is_not_tensor_parallel_duplicate(
                    parameter
                ):
                    continue  # counted on another rank
                gradient = parameter.main_grad.flatten()  # type: ignore[attr-defined]
                if self._is_distributed:
                    part = _own_part(self._owner(parameter), parameter)
                    squares[number] += gradient[part].square().sum()
                else:
                    squares[number] += gradient.square().sum() / self._count_replicas(parameter)
        return squares

    def step(self, rates: Sequence[float], gradient_norm: float) -> None:
        """Clip the gradients and update the weights; a collective call.

        Args:
            rates: learning rate of each entry.
            gradient_norm: from :meth:`gradient_norm`, of the gradients that are there now.
        """
        for group in self.groups:
            group["lr"] = rates[group["entry"]]
        for inner in self.inner:
            parameters = inner.get_parameters()
            if self.config.clip_grad > 0 and parameters and math.isfinite(gradient_norm):
                clip_grad_by_total_norm_fp32(parameters, self.config.clip_grad, gradient_norm)
        self.chained.step_with_ready_grads()

    def gather_weights(self) -> None:
        """Finish what ``overlap_param_gather`` leaves to the next forward pass; a collective call."""
        if self.config.overlap_param_gather:
            self._gather()

    def _gather(self) -> None:
        for model in self.models:
            model.start_param_sync(force_sync=True)
        # megatron-core turns FP8 weights over for the backward pass when it gathers them, but not here.
        in_fp8 = [p for model in self.models for p in model.parameters() if is_float8tensor(p)]
        if in_fp8:
            post_all_gather_processing(in_fp8)

    def sharded_state(self, model_state: dict[str, Any], loading: bool = False) -> dict[Any, dict[str, Any]]:
        """Return the state as sharded tensors, to be saved or as a request to ``load``; a collective call.

        Args:
            model_state: sharded state dict of the same chunks, flat.
            loading: allocate the state first, and don't gather what will be overwritten.

        Returns:
            Nothing to save where :attr:`saves` is False.
        """
        for inner in self.inner:
            if loading or not inner.optimizer.state:
                inner.init_state_fn(inner.optimizer, self.config)
        entries = {id(entry.data): entry for entry in model_state.values()}
        sharded = {}
        for index, parameter in enumerate(self._parameters()):
            tensors: dict[str, Any] = self._tensors(parameter)
            if self._is_distributed and loading:
                tensors = {key: torch.empty(parameter.shape, dtype=torch.float32) for key in self._keys}
            elif self._is_distributed:
                tensors = {key: self._to_first(parameter, tensors.get(key)) for key in self._keys}
            if loading or self._saves(self._owner(parameter)):
                entry = entries[id(parameter)]
                sharded[index] = {key: _sharded_like(entry, key, tensors[key]) for key in self._keys}
        return sharded

    @property
    def saves(self) -> bool:
        """Return whether this rank hands state to a checkpoint and takes it from one.

        With the distributed optimizer the first data-parallel rank does, for all of them.
        """
        return any(map(self._saves, self.inner))

    def _saves(self, inner: Any) -> bool:
        return not self._is_distributed or inner.data_parallel_group.rank() == 0

    def load_sharded_state(self, loaded: dict[Any, dict[str, Any]], steps: int) -> None:
        """Take over what ``dist_checkpointing.load`` made of :meth:`sharded_state`; a collective call.

        The model's weights must be loaded already.

        Args:
            loaded: nothing where :attr:`saves` is False.
            steps: updates done when the state was saved.
        """
        for group in self.groups:
            group["step"] = steps
        for index, parameter in enumerate(self._parameters()):
            tensors, read = self._tensors(parameter), loaded.get(index, {})
            for key in self._keys:
                value = self._from_first(parameter, read.get(key)) if self._is_distributed else read[key]
                if key in tensors:
                    tensors[key].copy_(value)
        if self._is_distributed and self.models[0].ddp_config.fp8_param_gather:
            # The weights were saved as they are in FP8. Rounding those again could give others than
            # rounding the master weights, as the last step has.
            for inner in self.inner:
                inner._copy_main_params_to_model_params()
            self._gather()

    def master_weights(self) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
        """Yield this rank's fp32 master weights, each behind its parameter; with the distributed optimizer
        the part that this rank updates. None where the weights are fp32 themselves."""
        for parameter in self._parameters() if self.has_master_weights else ():
            main = getattr(parameter, "main_param", None)
            if main is not None:
                yield parameter, main.detach()

    @property
    def _is_distributed(self) -> bool:
        return isinstance(self.inner[0], DistributedOptimizer)

    def _owner(self, parameter: torch.nn.Parameter) -> Any:
        """Return the inner optimizer that updates a parameter."""
        if self._is_distributed:
            return next(
                inner
                for inner in self.inner
                if any(parameter in buffer.param_index_map for buffer in inner.buffers)
            )
        return self._owners[id(getattr(parameter, "main_param", parameter))]

    def _count_replicas(self, parameter: torch.nn.Parameter) -> int:
        """Return the number of ranks over which a parameter's gradient is reduced."""
        model = self.models[0]
        group = model.dp_cp_group if getattr(parameter, "allreduce", True) else model.expt_dp_group
        return int(group.size())

    @property
    def _keys(self) -> tuple[str, ...]:
        """The names of the tensors that are saved of a parameter; fp32 weights are their own master
        weights."""
        return ("param", "exp_avg", "exp_avg_sq") if self.has_master_weights else ("exp_avg", "exp_avg_sq")

    def _parameters(self) -> list[torch.nn.Parameter]:
        """Return this rank's trainable parameters, in the order of the sharded state."""
        if self._is_distributed:
            return [p for inner in self.inner for buffer in inner.buffers for p in buffer.param_index_map]
        return [p for model in self.models for p in model.parameters() if p.requires_grad]

    def _tensors(self, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        """Return this rank's state of a parameter; with the distributed optimizer the state of its part,
        flat, if any."""
        inner = self._owner(parameter)
        if self._is_distributed:
            if parameter not in inner.model_param_gbuf_map:
                return {}
            state = inner._get_main_param_and_optimizer_states(parameter)
        else:
            main = parameter if isinstance(inner, FP32Optimizer) else parameter.main_param  # type: ignore[attr-defined]
            state = {"param": main, **inner.optimizer.state[main]}
        return {key: state[key].detach() for key in self._keys}

    # megatron-core gathers a bucket at once, which can be all of a stage, on every rank's GPU and then in the
    # host's memory: a run that fits could end at its first save.

    def _to_first(self, parameter: torch.nn.Parameter, part: torch.Tensor | None) -> torch.Tensor | None:
        """Gather a tensor of a parameter's state, whole on the first data-parallel rank's CPU; a collective
        call.

        Args:
            part: this rank's; None if it has none.
        """
        inner = self._owner(parameter)
        whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        if part is not None:
            whole[_own_part(inner, parameter)] = part
        # As integers, since the others add zeros: -0.0 + 0.0 would be 0.0.
        dist.reduce(whole.view(torch.int32), group=inner.data_parallel_group, group_dst=0)
        return whole.view(parameter.shape).cpu() if self._saves(inner) else None

    def _from_first(self, parameter: torch.nn.Parameter, whole: torch.Tensor | None) -> torch.Tensor:
        """Return this rank's part of the tensor that :meth:`_to_first` made; a collective call."""
        sent = torch.empty(parameter.numel(), dtype=torch.float32, device=parameter.device)
        if whole is not None:
            sent.copy_(whole.flatten())
        inner = self._owner(parameter)
        dist.broadcast(sent, group=inner.data_parallel_group, group_src=0)
        return sent[_own_part(inner, parameter)]


def _main_weights(inner: Any) -> list[torch.Tensor]:
    """Return what an inner optimizer updates: fp32 weights, or the master weights of others."""
    return [main for group in inner.optimizer.param_groups for main in group["params"]]


def _overrides(entries: int) -> dict[ParamKey, Any]:
    """Return the settings that set megatron-core's parameter groups apart.

    The groups of all entries stand on all ranks, though a pipeline stage may have no parameter in some.
    """

    def undecayed(parameter: torch.nn.Parameter, name: str) -> bool:
        return not is_decayed(name, parameter.shape)

    def of_entry(entry: int, parameter: torch.nn.Parameter) -> bool:
        return getattr(parameter, "train_entry", 0) == entry

    overrides: dict[ParamKey, Any] = {
        ParamKey(with_name_predicate=ParamWithNamePredicate("undecayed", undecayed)): {"wd_mult": 0.0}
    }
    for entry in range(entries):
        key = ParamKey(predicate=ParamPredicate(f"entry {entry}", partial(of_entry, entry)))
        overrides[key] = {"entry": entry}
    return overrides


def _sharded_like(
    entry: ShardedTensor | ShardedTensorFactory, key: str, tensor: torch.Tensor
) -> ShardedTensor | ShardedTensorFactory:
    """Return ``tensor`` as a sharded tensor, cut as the parameter of ``entry`` is."""
    changes: dict[str, Any] = {"key": f"{_PREFIX}.{key}.{entry.key}", "data": tensor}
    if isinstance(entry, ShardedTensor):
        changes["dtype"] = tensor.dtype
    return replace(entry, **changes)
