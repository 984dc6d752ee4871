"""The demo's own parts: its data, its tokenizer and its verdict. The pipeline between them is `make demo`."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

DIGITS = Path(__file__).parents[2] / "examples/digits"


@pytest.fixture(autouse=True)
def _import_from_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DIGITS)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DIGITS)
        import make_dataset

        patch.setattr(sys, "argv", ["make_dataset.py", "--save-dir", str(folder)])
        make_dataset.main()
    return folder


def test_dataset(dataset: Path) -> None:
    from evaluate import read_shards

    digits = load_digits()
    train = read_shards(dataset, "train-*.tar")
    held_out = read_shards(dataset, "held-out-*.tar")
    for sample in [*train, *held_out]:
        assert sample.answer == str(digits.target[int(sample.key) % len(digits.target)])
    seen = {int(sample.key) % len(digits.target) for sample in train}
    unseen = {int(sample.key) for sample in held_out}
    assert len(held_out) == len(unseen) == 297
    assert seen | unseen == set(range(len(digits.target)))
    assert not seen & unseen, "a held-out digit is trained on"
    assert len({sample.key for sample in train}) == len(train) == 6000

    # The picture is the digit: scaled down again, it is the nearest of all digits. JPEG and rounding
    # cost a few grey values, two digits differ by dozens.
    for sample in held_out[:50]:
        small = np.asarray(sample.image.convert("L").resize((8, 8), Image.Resampling.BOX)) / 255 * 16
        distances = np.abs(digits.images - small).sum(axis=(1, 2))
        assert distances.argmin() == int(sample.key)


def test_tokenizer_writes_any_text() -> None:
    from make_models import make_tokenizer

    tokenizer = make_tokenizer()
    text = "USER: これは何ですか。 🐈\nASSISTANT: 7"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    digits = [tokenizer(f" {digit}", add_special_tokens=False)["input_ids"] for digit in range(10)]
    assert all(len(ids) == 1 for ids in digits)


@pytest.mark.parametrize("wrong, passes", [(8, True), (9, False)])
def test_verdict(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: int, passes: bool
) -> None:
    """289 of 297 are 97.3 %, 288 are 96.97 %."""
    import contact_sheet
    import evaluate

    def generate(directory: Path, samples: list[evaluate.Sample], batch_size: int) -> list[str]:
        return ["?"] * wrong + [sample.answer for sample in samples[wrong:]]

    monkeypatch.setattr(evaluate, "generate", generate)
    answers, metrics, picture = (tmp_path / name for name in ("p.json", "metrics.jsonl", "sheet.png"))
    arguments = ["--hf-dir", "unused", "--data-path", str(dataset), "--predictions", str(answers)]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments, "--expect", "0.97"])
    if passes:
        evaluate.main()
    else:
        with pytest.raises(SystemExit, match="below the expected 97"):
            evaluate.main()
    rows = json.loads(answers.read_text())
    assert [row["prediction"] == row["answer"] for row in rows] == [False] * wrong + [True] * (297 - wrong)

    metrics.write_text("".join(json.dumps({"iteration": i, "loss": 1 / i}) + "\n" for i in range(1, 9)))
    arguments = ["--predictions", str(answers), "--data-path", str(dataset), "--metrics", str(metrics)]
    monkeypatch.setattr(sys, "argv", ["contact_sheet.py", *arguments, "--output", str(picture)])
    contact_sheet.main()
    with Image.open(picture) as image:
        assert image.width > 1000
