"""Hugging Face folders, one prepared dataset and its loaders, shared by the tests of the data pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.artifacts.dataset import prepare_command
from megatron_vlm.data.dataset import PreparedDataset
from megatron_vlm.data.loading.loader import TrainLoader
from megatron_vlm.data.processing import Processing, load_processing
from tests.data.tiny_data import FOLDERS, MICRO_BATCH, hf_folder, make_samples, prepare, write_shards


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Hugging Face LLaVA folders (without weights) as transformers writes them, by name."""
    root = tmp_path_factory.mktemp("hf")
    return {name: hf_folder(name, root) for name in FOLDERS}


@pytest.fixture(scope="session")
def models(folders: dict[str, Path]) -> dict[str, ModelConfig]:
    return {name: ModelConfig.from_hf_dir(str(folder)) for name, folder in folders.items()}


@pytest.fixture(scope="session")
def dataset_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 training and 20 validation samples in 7 shards, prepared as documented."""
    root = tmp_path_factory.mktemp("data set")  # with a space, as paths may have
    write_shards(root, make_samples(140), 7)
    prepare(prepare_command(str(root), ratio="6,1,0"))
    return root


@pytest.fixture
def open_loader() -> Iterator[Callable[..., TrainLoader]]:
    """``TrainLoader``, of one rank unless told otherwise; closed at the end."""
    made: list[TrainLoader] = []

    def make(data: Any, processing: Any, data_workers: int, **options: Any) -> TrainLoader:
        given = {"dp_rank": 0, "dp_size": 1, **options}
        made.append(TrainLoader(data, processing, data_workers=data_workers, **given))
        return made[-1]

    yield make
    for loader in made:
        loader.close()


@pytest.fixture(scope="session")
def dataset(dataset_dir: Path) -> PreparedDataset:
    return PreparedDataset.open(str(dataset_dir))


@pytest.fixture(scope="session")
def processing(folders: dict[str, Path], models: dict[str, ModelConfig]) -> Processing:
    return load_processing(str(folders["llava"]), models["llava"], seq_length=120)


@pytest.fixture
def make_loader(open_loader: Any, dataset: PreparedDataset, processing: Processing) -> Any:
    def make(data_workers: int, dp_rank: int = 0, dp_size: int = 1, **options: Any) -> TrainLoader:
        given = {
            "shuffle_buffer_size": 16,
            "max_corrupt_rate": 0.5,
            "micro_batch_size": MICRO_BATCH,
            **options,
        }
        data, process = given.pop("dataset", dataset), given.pop("processing", processing)
        loader: TrainLoader = open_loader(
            data, process, data_workers, dp_rank=dp_rank, dp_size=dp_size, **given
        )
        return loader

    return make
