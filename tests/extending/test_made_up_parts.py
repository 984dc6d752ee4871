"""A made-up connector and encoder work like those that are there, with no other line than their files.

The reference is transformers' LLaVA with plain torch modules in the places of projector and embeddings.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.architecture.parameters import stage_parameters
from megatron_vlm.artifacts.dataset import prepare_command
from megatron_vlm.config.run import RunConfig
from megatron_vlm.hf.convert import export_hf, import_hf
from megatron_vlm.plan.activations import Shape, stage_block
from megatron_vlm.plan.flops import Work, training_flops
from megatron_vlm.plan.memory import estimate
from tests.data.tiny_data import make_samples, prepare, write_shards
from tests.distributed import Pool
from tests.extending.connectors.bottleneck import NARROW
from tests.extending.folders import added
from tests.models.test_parity import LAYOUTS, Reference, check
from tests.tiny import build, save_llava, tiny_config
from tests.training.conftest import Trainable
from tests.training.test_layouts import layout_flags
from tests.training.test_run import metrics
from tests.workers import Layout, logits_and_gradients, train


class Embeddings(nn.Module):
    """CLIP's, with a register behind the class token."""

    def __init__(self, clips: Any) -> None:
        super().__init__()
        self.class_embedding, self.patch_embedding = clips.class_embedding, clips.patch_embedding
        positions, size = clips.position_embedding.weight.shape
        self.position_embedding = nn.Embedding(positions + 1, size)
        self.register = nn.Parameter(torch.randn(size))

    def forward(self, pixel_values: Tensor, **_: Any) -> Tensor:
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        front = torch.stack([self.class_embedding, self.register]).expand(len(patches), -1, -1)
        return torch.cat([front, patches], dim=1) + self.position_embedding.weight


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(inputs, NARROW), nn.Linear(NARROW, outputs)

    def forward(self, features: Tensor, *_: Any) -> Tensor:
        return self.up(nn.functional.gelu(self.down(features)))


def put_in(net: Any) -> Any:
    """Put the made-up parts into transformers' model."""
    tower, config = net.model.vision_tower, net.config
    tower.embeddings = Embeddings(tower.embeddings)
    net.model.multi_modal_projector = Bottleneck(
        config.vision_config.hidden_size, config.text_config.hidden_size
    )
    return net


def save(net: Any, folder: Path) -> Any:
    """Save a made-up model as a Hugging Face folder."""
    tensors = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    raw = json.loads(net.config.to_json_string(use_diff=False))
    raw["mm_projector_type"] = "bottleneck"
    raw["vision_config"]["model_type"] = "registers_vision_model"
    del raw["vision_config"]["hidden_act"]  # it is what the encoder's file says
    (folder / "config.json").write_text(json.dumps(raw))
    return net


def save_made_up(folder: Path, family: str = "") -> Any:
    """As ``save_tiny_llava``."""
    config = tiny_config()
    config.vision_config.hidden_act = "gelu_pytorch_tanh"
    torch.manual_seed(0)
    net = put_in(build(config).eval())
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0.0 if parameter.dim() > 1 else 0.1, 0.15)
    return save(net, folder)


@pytest.fixture(autouse=True, scope="module")
def _added() -> Iterator[None]:
    with added():
        yield


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, _added: None) -> Reference:
    return Reference("made-up", tmp_path_factory.mktemp("made-up"), save=save_made_up)


def made_up_logits_and_gradients(*args: Any) -> Any:
    with added():
        return logits_and_gradients(*args)


def train_made_up(argv: list[str]) -> None:
    with added():
        train(argv)


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_logits_and_gradients(reference: Reference, pool: Pool, sizes: Layout) -> None:
    assert reference.model.vision.family == "registers"
    assert reference.model.vision.activation == "gelu_pytorch_tanh"
    assert reference.model.projector.kind == "bottleneck"
    assert reference.model.tile_tokens == 5 * 5 + 1  # the register's feature too; LLaVA drops the first
    check(reference, pool, sizes, made_up_logits_and_gradients)


def test_conversion_both_ways(reference: Reference, tmp_path: Path) -> None:
    folder = Path(reference.checkpoint).parents[1]
    before = load_file(folder / "hf" / "model.safetensors")
    assert "model.vision_tower.embeddings.register" in before
    after = load_file(export_hf(folder / "megatron", tmp_path / "back") / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_parameters(reference: Reference, tmp_path: Path) -> None:
    """Of the parts that run, as many as torch's modules have."""
    net = save_made_up(tmp_path)
    model = reference.model
    for block in net.model.vision_tower.encoder.layers[model.num_vision_layers_run :]:
        block.requires_grad_(False)
    net.model.vision_tower.post_layernorm.requires_grad_(False)
    expected = sum(p.numel() for p in net.parameters() if p.requires_grad)
    (stage,) = stage_parameters(model, 1, [model.language.num_layers], vocab_divisible_by=1)
    assert sum(parameter.size for parameter in stage) == expected


def test_operations(reference: Reference, tmp_path: Path) -> None:
    """As torch counts those of tower and projector, forward and backward."""
    net, model = save_made_up(tmp_path), reference.model
    tower, projector = net.model.vision_tower, net.model.multi_modal_projector
    net.set_attn_implementation("eager")
    for block in tower.encoder.layers[model.num_vision_layers_run :]:
        block.forward = lambda hidden_states, *args, **kwargs: hidden_states
    with FlopCounterMode(display=False) as counter:
        states = tower(torch.randn(3, 3, 20, 20), output_hidden_states=True).hidden_states
        projector(states[model.num_vision_layers_run][:, 1:]).sum().backward()
    flops = training_flops(model, Work(0, 0, 0, 3), lambda name: name.startswith("vision_"))
    assert flops.vision + flops.projector == counter.get_total_flops() > 0


def test_activation_memory(reference: Reference) -> None:
    """Between a bottleneck and a linear lies what autograd keeps between the bottleneck's two linears."""
    inputs, hidden = reference.model.projector.input_size, reference.model.language.hidden_size
    projector, features = Bottleneck(inputs, hidden), torch.randn(2 * 26, inputs)  # of two images
    there = {tensor.untyped_storage().data_ptr() for tensor in (*projector.parameters(), features)}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = projector(features)
    assert output.requires_grad and kept
    shape = Shape(2, 64, 2, 1, False, 4, "cpu", False, "none", None)
    blocks = [
        stage_block(model, shape, range(2), True, True, lambda name: True)
        for model in (reference.model, with_linear(reference.model))
    ]
    assert blocks[0].kept - blocks[1].kept == sum(kept.values())


def with_linear(model: ModelConfig) -> ModelConfig:
    values = model.to_dict()
    values["projector"].update(kind="linear", activation="linear")
    return ModelConfig.from_dict(values)


def test_plan_and_training(pool: Pool, tmp_path: Path) -> None:
    """At TP 2 x PP 2 a run learns, and its losses are those of one rank."""
    save_llava(tmp_path / "hf", tie_word_embeddings=False)
    net = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf")
    save(put_in(net), tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "megatron", tp=1, pp=1)
    data = tmp_path / "data"
    write_shards(data, make_samples(70), 5)
    prepare(prepare_command(str(data), "1,0,0"))
    trainable = Trainable(tmp_path / "megatron", tmp_path / "hf", data, data)
    losses = []
    for layout in (Layout(), Layout(tp=2, pp=2)):
        flags = ["--train-modules", "all", "--train-iters", "8", *layout_flags(layout)]
        argv = trainable.flags(tmp_path, str(layout), *flags)
        pool.run(layout.world, train_made_up, argv)
        losses.append([line["loss"] for line in metrics(tmp_path / str(layout))])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0][-1] < losses[0][0]
    model = ModelConfig.from_hf_dir(str(tmp_path / "hf"))
    stages = estimate(RunConfig.from_flags(argv), model, world_size=4)
    sizes = stage_parameters(model, 2, [1, 1])
    assert stages[0].weights == 4 * sum(parameter.size for parameter in sizes[0])
