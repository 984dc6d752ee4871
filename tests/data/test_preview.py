"""What the preview shows is what a loader's worker makes of the same samples."""

from __future__ import annotations

import base64
import html.parser
import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.artifacts.dataset import prepare_command
from megatron_vlm.config.preview import PreviewConfig
from megatron_vlm.data.batch import IGNORE_INDEX, collate, collate_packed
from megatron_vlm.data.dataset import PreparedDataset
from megatron_vlm.data.loading.loader import ValidationLoader
from megatron_vlm.data.preview.page import page
from megatron_vlm.data.preview.show import show
from megatron_vlm.data.preview.text import describe, terminal
from megatron_vlm.data.preview.views import look, token_texts
from megatron_vlm.data.processing import Processing, load_processing
from tests.data.tiny_data import (
    asked,
    jpeg,
    llama_tokenizer,
    make_conversations,
    prepare,
    qwen_tokenizer,
    write_shards,
)
from tests.media import pixels as pixels_of

IMAGE_TOKENS = 25  # of the folder "bare"
SCRIPT = Path(__file__).parents[2] / "scripts" / "data" / "preview.py"
NASTY = "<script>alert(1)</script> & 'quotes'\n🐈‍⬛"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations in train and val; one of train is hostile to a page, one has no readable image."""
    root = tmp_path_factory.mktemp("talks")
    samples = make_conversations(24)
    hostile = {"messages": [{"role": "user", "content": NASTY}, {"role": "assistant", "content": NASTY}]}
    samples[0] = {"key": "00000", "json": json.dumps(hostile).encode()}
    samples[1]["0.jpg"] = b"not a picture"
    write_shards(root, samples, 3)
    prepare(prepare_command(str(root), "2,1,0"))
    return root


@pytest.fixture(scope="module")
def processing(folders: dict[str, Path], models: dict[str, ModelConfig]) -> Processing:
    return load_processing(str(folders["bare"]), models["bare"], seq_length=200, template="v1", lang="en")


@pytest.fixture(scope="module")
def shown(data: Path, folders: dict[str, Path]) -> dict[str, Any]:
    """The script's words for the first 16 samples as JSON, and a page of them."""
    flags = ["--data-path", str(data), "--tokenizer-load-dir", str(folders["bare"]), "--template", "v1"]
    flags += ["--lang", "en", "--seq-length", "200", "--samples", "16", "--fp32", "--tp", "2"]
    run = subprocess.run(
        [sys.executable, str(SCRIPT), *flags, "--json", "--html", str(data / "page.html")],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    values: dict[str, Any] = json.loads(run.stdout)
    return values


def test_ids_and_labels_are_the_loaders(shown: dict[str, Any], data: Path, processing: Processing) -> None:
    """The loader's worker reads, encodes and collates by itself."""
    loader = ValidationLoader(
        PreparedDataset.open(str(data)), processing, dp_rank=0, dp_size=1, micro_batch_size=1
    )
    try:
        rows = {row.keys[0]: row for row in loader}
    finally:
        loader.close()
    used = [view for view in shown["views"] if view["state"] == "used"]
    assert {view["key"] for view in used} == set(rows)
    for view in used:
        row = rows[view["key"]]
        assert view["input_ids"] == row.input_ids[0].tolist() and view["labels"] == row.labels[0].tolist()
        assert view["trained_tokens"] == sum(label != IGNORE_INDEX for label in view["labels"])
        assert [image["fed"] for image in view["images"]] == [[[3, 20, 20]]] * len(pixels_of(row))
        assert view["image_tokens"] == len(pixels_of(row)) * IMAGE_TOKENS
    states = {view["key"]: (view["state"], view["reason"]) for view in shown["views"]}
    assert states["00001"] == ("corrupt", "its image is in no format that PIL knows")
    assert states["00007"][0] == "dropped" and "2 image markers, but 1 images" in states["00007"][1]
    (seven,) = (view for view in shown["views"] if view["key"] == "00007")
    assert "Question 0 of 7?" in seven["written"]  # what it says can be looked at all the same
    cut = sum(view["truncated"] for view in used)
    assert cut and shown["samples"] == f"16: 14 used ({cut} cut off), 1 dropped, 1 corrupt"


def test_pieces_are_the_text_and_its_trained_part(shown: dict[str, Any], processing: Processing) -> None:
    tokenizer, image = processing.tokenizer, processing.image_token_id
    for view in shown["views"]:
        ids = view["input_ids"]
        assert sum(piece["tokens"] for piece in view["pieces"]) == len(ids) == view["tokens"]
        assert view["text"] == tokenizer.decode([token for token in ids if token != image])
        trained = "".join(piece["text"] for piece in view["pieces"] if piece["trained"])
        kept = [label for label in view["labels"] if label != IGNORE_INDEX]
        assert trained.replace(" ", "") == tokenizer.decode(kept).replace(" ", "")
        images = [piece["tokens"] for piece in view["pieces"] if piece["image"] is not None]
        assert images == [IMAGE_TOKENS] * len(view["images"])


class Reader(html.parser.HTMLParser):
    """Text, sources of images, and tags of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.sources, self.tags = "", list[str](), set[str]()

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        links = dict(attributes)
        assert "href" not in links
        self.sources += [source for name, source in attributes if name == "src" and source]


def test_the_page_holds_the_pictures_as_they_are_fed(
    shown: dict[str, Any], data: Path, folders: dict[str, Path]
) -> None:
    """Pixels equal those of transformers' processor; no other file is needed, and no text is markup."""
    reader = Reader()
    reader.feed((data / "page.html").read_text(encoding="utf-8"))
    assert "script" not in reader.tags and "link" not in reader.tags
    assert NASTY.replace("\n", "↵\n") in reader.text
    processor = transformers.AutoImageProcessor.from_pretrained(folders["bare"], backend="pil")
    samples = {str(sample["key"]): sample for sample in make_conversations(24)}
    used = [samples[view["key"]] for view in shown["views"] if view["images"]]
    pictures = [sample[name] for sample in used for name in ("0.jpg", "1.png") if name in sample]
    assert len(pictures) == len(reader.sources) > 4
    for source, picture in zip(reader.sources, pictures, strict=True):
        assert source.startswith("data:image/png;base64,")
        fed = np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))
        expected = processor(Image.open(io.BytesIO(picture)), do_rescale=False, do_normalize=False)
        assert np.array_equal(fed, np.asarray(expected["pixel_values"][0]).transpose(1, 2, 0))


def test_terminal_view(data: Path, processing: Processing) -> None:
    dataset = PreparedDataset.open(str(data))
    (raw,) = dataset.pick(["00005"])
    view = look(dataset, processing, raw)
    plain = terminal(view, colored=False)
    assert plain.startswith("00005 of 000000.tar: ") and plain.count("⟦") == 3
    assert "[image 1: 25 tokens, 31×24 → 20×20]\n[image 2: 25 tokens, " in plain
    assert "⟦ Answer 2 of 5.</s>⟧" in plain and "\x1b" not in plain
    colored = terminal(view, colored=True)
    assert "\x1b[30;42m Answer 2 of 5.</s>\x1b[0m" in colored and "⟦" not in colored
    listed = terminal(view, colored=False, with_ids=True).splitlines()
    stars = [line for line in listed if line.startswith("    ") and " * " in line]
    assert len(stars) == view.num_trained
    assert sum("image 1" in line and line.startswith(" ") for line in listed) == 1
    hostile = raw.parts | {"json": b'{"messages": [{"role": "user", "content": "\\u001b[2J"}]}'}
    refused = terminal(look(dataset, processing, replace(raw, parts=hostile)), colored=True)
    assert "user: ␛[2J" in refused and "\x1b[2J" not in refused
    (raw,) = dataset.pick(["00001"])
    assert "corrupt: its image is in no format" in terminal(look(dataset, processing, raw), colored=False)


def test_no_text_is_markup(data: Path, processing: Processing) -> None:
    """What a sample says, its name and the reason for which it is dropped."""
    dataset = PreparedDataset.open(str(data))
    (raw,) = dataset.pick([0])
    unanswered = json.dumps({"messages": [{"role": "user", "content": NASTY}]}).encode()
    dropped = replace(raw, __key__="<q>", parts={"json": unanswered})
    broken = replace(raw, __key__="<kbd>", parts={"json": b'{"messages": [{"role": "<u>"}], "<s>": 0}'})
    reader = Reader()
    reader.feed(
        page([look(dataset, processing, one) for one in (raw, dropped, broken)], {"<em>": "<p>"}, 9, True)
    )
    assert not {"script", "q", "kbd", "u", "s", "em", "p"} & reader.tags
    for text in (NASTY, "<q>", "<kbd>", "has the role '<u>'", '"<s>": 0', "<em>", "<p>"):
        assert text in reader.text


def test_the_page_lists_ids_on_request(data: Path, processing: Processing) -> None:
    dataset = PreparedDataset.open(str(data))
    views = [look(dataset, processing, raw) for raw in dataset.pick([0, 4])]
    assert "token ids" not in page(views, {}, 200, with_ids=False)
    reader = Reader()
    reader.feed(page(views, {}, 200, with_ids=True))
    assert f"{processing.image_token_id} × {IMAGE_TOKENS}" in reader.text
    assert " ".join(map(str, views[0].sample.input_ids)) in " ".join(reader.text.split())


@pytest.mark.parametrize("make", [llama_tokenizer, qwen_tokenizer])
def test_tokentoken_texts_make_up_the_text(make: Any) -> None:
    """Also where a character takes several tokens."""
    tokenizer = make()
    for text in ("猫と🐈‍⬛ é", " two  spaces\n\n", "a</s> b", "🐕" * 5, "\N{REPLACEMENT CHARACTER}x"):
        ids = tokenizer(text)["input_ids"]
        texts = token_texts(ids, tokenizer, -1)
        assert len(texts) == len(ids) and "".join(texts) == tokenizer.decode(ids)
    cut = tokenizer("🐕")["input_ids"][:-1]
    assert "".join(token_texts(cut, tokenizer, -1)) == tokenizer.decode(cut)


def test_samples_are_picked_by_number_and_name(data: Path) -> None:
    dataset = PreparedDataset.open(str(data))
    assert [raw.__key__ for raw in dataset.pick([15, 0])] == ["00015", "00000"]
    assert [raw.__key__ for raw in dataset.pick(["00020"])] == ["00020"]  # of val
    with pytest.raises(ValueError, match="there is no sample 00099"):
        list(dataset.pick(["00099"]))


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "--data-path is missing"),
        (["--data-path", "{data}"], "--tokenizer-load-dir is missing"),
        (
            ["--data-path", "{data}", "--tokenizer-load-dir", "{hf}", "--skip", "16"],
            "--skip 16: the train split",
        ),
        (["--data-path", "{data}", "--tokenizer-load-dir", "{hf}", "--template", "gemma"], "tokenizer lacks"),
        (["--data-path", "{data}/none", "--tokenizer-load-dir", "{hf}"], "no such folder"),
        (["--data-path", "{data}", "--megatron-load-dir", "{data}"], "{data}"),
    ],
)
def test_errors_are_one_line(flags: list[str], message: str, data: Path, folders: dict[str, Path]) -> None:
    flags = [flag.format(data=data, hf=folders["bare"]) for flag in flags]
    with pytest.raises(ValueError, match=re.escape(message.format(data=data))) as error:
        show(PreviewConfig.from_flags(flags))
    assert "\n" not in str(error.value)


def test_the_scripts_exit_code_for_a_users_error() -> None:
    run = subprocess.run([sys.executable, str(SCRIPT), "--sampels", "3"], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("error: unknown flag --sampels") and run.stderr.count("\n") == 1


def test_an_image_that_is_cut_is_shown_in_its_tiles(data: Path, tmp_path: Path) -> None:
    """As LLaVA-1.6 cuts it: tiles equal transformers' processor's, and so does the number of placeholders."""
    pinpoints = [[20, 40], [40, 20], [40, 40]]
    tokenizer = llama_tokenizer()
    processor = transformers.LlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size={"shortest_edge": 20}, crop_size={"height": 20, "width": 20}, image_grid_pinpoints=pinpoints
        ),
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    tower = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=20, patch_size=4)
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**tower),
        text_config=transformers.LlamaConfig(vocab_size=512, hidden_size=32, num_attention_heads=4),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
    )
    config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    made = load_processing(
        str(tmp_path), ModelConfig.from_hf_dir(str(tmp_path)), seq_length=600, template="v1"
    )
    dataset = PreparedDataset.open(str(data))
    (raw,) = dataset.pick(["00005"])
    view = look(dataset, made, raw)
    assert len(view.pictures) == 2
    for picture, name in zip(view.pictures, ("0.jpg", "1.png"), strict=True):
        image = Image.open(io.BytesIO(raw.parts[name]))
        expected = processor(images=image, text="<image>", add_special_tokens=False)
        assert picture.tokens == len(expected["input_ids"][0])
        fed = processor.image_processor(image, do_rescale=False, do_normalize=False)["pixel_values"][0]
        assert len(picture.tiles) == len(fed) == 1 + picture.grid[0] * picture.grid[1]
        assert all(np.array_equal(tile, array) for tile, array in zip(picture.tiles, fed, strict=True))
    reader = Reader()
    reader.feed(page([view], {}, 600, with_ids=False))
    assert len(reader.sources) == sum(len(picture.tiles) for picture in view.pictures)
    assert "31×24 → 20×20 and 2×2 tiles" in reader.text


@pytest.mark.parametrize("join", [collate, collate_packed])
def test_the_first_sample_in_a_runs_log(processing: Processing, join: Any) -> None:
    """As the tokenizer decodes it whole, spaces between trained and other text among it."""
    tokenizer = processing.tokenizer
    samples = [
        processing.encode(key, asked("What\x1b[2J?", "A cat."), {"image": [jpeg(1)] * (key == "a")})
        for key in ("a", "b")
    ]
    for order in (samples, samples[::-1]):  # the first sample padded, and not
        microbatch = join(order, processing.pad_token_id)
        text = describe(microbatch, tokenizer, processing.image_token_id)
        ids, labels = order[0].input_ids, order[0].labels
        head, _, shown = text.partition("): ")
        trained = [label for label in labels if label != IGNORE_INDEX]
        assert head == f"{order[0].key} ({len(ids)} tokens, {len(trained)} trained"
        whole = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        image = IMAGE_TOKENS * "<image>"
        assert shown.replace("⟦", "").replace("⟧", "") == whole.replace(
            image, f"<image>×{IMAGE_TOKENS}"
        ).replace("\x1b", "␛")
        assert shown.endswith("ASSISTANT:⟦ A cat.</s>⟧") and shown.count("⟦") == 1
