"""Write ``keys.json``: what modules of Transformer Engine are called in state dicts, and how large they are.

    python -m tests.te.record

For each family, our model and upstream's (Megatron-LM's ``LLaVAModel`` with megatron-core's own specs), both
with Transformer Engine: each tensor's name with its shape at TP 1 and at TP 2, and the names of the
``_extra_state``. Nothing of the project's tables and key maps is used but the model itself.

Needs Transformer Engine's Python on PYTHONPATH. Without a GPU :mod:`tests.te.stub` stands in for its C++
library, which makes no difference for names and shapes; ``made_with`` says which it was. Ranks exchange
nothing while a model is built, so one process is each of them in turn.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_vlm.architecture.model import ModelConfig, padded_vocab_size
from tests.tiny import ALL, tiny_config

FILE = Path(__file__).with_name("keys.json")
# What can differ in names and shapes: towers, biases, norms of queries and keys, tied embeddings, experts.
FAMILIES = (
    "clip-llama",
    "siglip-qwen2",
    "siglip-llama-biases",
    "clip-qwen3-tied",
    "clip-mixtral",
    "clip-llama-linear",
)
NOT_UPSTREAM = ("clip-llama-linear",)  # upstream adds the bias of its linear projector on one rank only
EXTRA = "_extra_state"


def model_of(family: str) -> ModelConfig:
    """A family of :mod:`tests.tiny` with two layers of each kind."""
    config = tiny_config(**ALL[family]).to_dict()
    config["text_config"]["num_hidden_layers"] = 2
    config["text_config"].pop("layer_types", None)
    return ModelConfig.from_hf(config)


def main() -> None:
    """Record every family, and say so."""
    gpu = torch.cuda.is_available()
    if not gpu:
        from tests.te import stub

        stub.install()
    import megatron.core
    import transformer_engine

    recorded: dict[str, Any] = {
        "made_by": "python -m tests.te.record",
        "made_with": {
            "transformer_engine": transformer_engine.__version__,
            "megatron_core": megatron.core.__version__,
            "torch": torch.__version__,
            "library": "CUDA" if gpu else "tests/te/stub.py",
        },
        "entries": "name: [shape at TP 1, shape on each rank at TP 2]",
        "families": {},
    }
    for family in FAMILIES:
        recorded["families"][family] = {
            kind: _both_sizes(family, kind)
            for kind in ("ours", "upstream")
            if kind == "ours" or family not in NOT_UPSTREAM
        }
    FILE.write_text(_dump(recorded) + "\n", encoding="utf-8")
    print(f"{FILE}: {len(FAMILIES)} families")


def _both_sizes(family: str, kind: str) -> dict[str, Any]:
    whole, (first, second) = _build(family, kind, 1)[0], _build(family, kind, 2)
    assert first == second and list(first) == list(whole)
    return {
        "tensors": {name: [whole[name], first[name]] for name in whole if not name.endswith(EXTRA)},
        "extra_state": [name for name in whole if name.endswith(EXTRA)],
    }


def _build(family: str, kind: str, tp: int) -> list[dict[str, list[int] | None]]:
    """Names and shapes of a model's state dict on each of ``tp`` ranks."""
    from megatron_vlm import parallel
    from megatron_vlm.models.transformer_configs import transformer_configs
    from megatron_vlm.models.vlm import VisionLanguageModel
    from tests.hf import upstream

    model, found = model_of(family), []
    for rank in range(tp):
        dist.init_process_group("fake", rank=rank, world_size=tp, store=FakeStore())
        layout = parallel.initialize(tp=tp)
        if kind == "ours":
            configs = transformer_configs(model, layout)
            chunk: Any = VisionLanguageModel(model, configs, layout, "transformer_engine", 8)
        else:
            padded = padded_vocab_size(model.language.vocab_size, tp, 8)
            chunk = upstream.build(model, layout, None, padded, 0, engine=True)
        state = chunk.state_dict()
        found.append({name: None if name.endswith(EXTRA) else list(t.shape) for name, t in state.items()})
        parallel.finalize()
    return found


def _dump(recorded: dict[str, Any]) -> str:
    """JSON with a tensor a line."""
    text = json.dumps(recorded, indent=1)
    return re.sub(r"\[[\d\s,\[\]]*\]", lambda shapes: re.sub(r"\s", "", shapes[0]), text)


if __name__ == "__main__":
    main()
