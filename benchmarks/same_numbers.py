"""Compare two trees of this project bit for bit: ``make same-numbers REF=<commit>``.

Small cases run with the code of a commit and with that of this checkout, uncommitted changes included: the
same interpreter, one model and one dataset, which the commit's code has made. Code that only moved gives the
same numbers to the last bit: losses, gradient norms, token counts, generated tokens, converted weights,
predicted memory. Each tree is a folder of its own, and only its scripts are run, so it may be of any age that
has their flags. The exit code is 0 if all is the same, 1 if not.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from benchmarks.compare import processor

CHECKOUT = Path(__file__).resolve().parents[1]
ITERATIONS = 20
SAVED_AT = 10  # where the other tree goes on
# Keys of metrics.jsonl that a clock or the machine has a part in.
_MEASURED = re.compile(
    r"(tokens|images)_per_second|tflops_per_gpu.*|mfu.*|peak_memory_gib|(iteration_|data_)?seconds(_left)?|gpu_hours"
)

Values = Mapping[str, Any]  # what is compared, by names that say where it is from


@dataclass(frozen=True)
class Tree:
    """A copy of the project's files.

    Attributes:
        commit: what it is a copy of, for the report.
    """

    folder: Path
    commit: str

    def run(self, *command: object) -> subprocess.CompletedProcess[str]:
        """Run Python on this tree's code, on one thread of the CPU; what fails ends this process too."""
        environment = {name: value for name, value in os.environ.items() if name != "MEGATRON_VLM_SITE"}
        environment |= {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(self.folder),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        arguments = [sys.executable, *map(str, command)]
        ended = subprocess.run(arguments, cwd=self.folder, env=environment, capture_output=True, text=True)
        if ended.returncode:
            shown = shlex.join(arguments)[:2000]
            sys.exit(
                f"error: {shown} of {self.commit} ended with {ended.returncode}:\n{ended.stderr[-4000:]}"
            )
        return ended

    def call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call a function, which imports all that it needs, in a process of this tree's code."""
        source = f"from __future__ import annotations\n\n{inspect.getsource(function)}"
        self.run("-c", f"{source}\n{function.__name__}(*{arguments!r})")


@dataclass(frozen=True)
class Case:
    """Something that both trees do.

    Attributes:
        what: what is compared.
        collect: called with the reference, this tree, the inputs and an empty folder; returns both's values.
    """

    name: str
    what: str
    collect: Callable[[Tree, Tree, Path, Path], tuple[Values, Values]]
    slow: bool = False


def make_inputs(folder: str, families: Sequence[str]) -> None:
    """Make models, datasets and questions with the tests' helpers of the tree that this runs in.

    Two LLaVAs that can be trained, ``llava`` and ``llava_next``, each as ``<name>/hf`` and
    ``<name>/megatron``; ``towers/<family>`` to convert; ``questions`` of which some have no image and some
    images are damaged, ``conversations``, a mixture of both, and ``asked.jsonl`` with two pictures.
    """
    import json
    import runpy
    import subprocess
    import sys
    from pathlib import Path

    from tests.data.tiny_data import jpeg, make_conversations, make_samples, write_shards
    from tests.tiny import save_llava, save_tiny_llava

    root = Path(folder)
    write_shards(root / "questions", make_samples(140), 7)
    write_shards(root / "conversations", make_conversations(140), 7)
    field_map = {"image": "jpg", "context": "json[question]", "answers": "txt"}
    preparing = []
    for name, kind in (
        ("questions", ["VQASample", "--field-map", json.dumps(field_map)]),
        ("conversations", ["CrudeWebdataset"]),
    ):
        command = [str(Path(sys.executable).with_name("energon")), "prepare", "--non-interactive"]
        command += ["--no-progress", "--num-workers", "1", "--split-ratio", "6,1,0"]
        preparing.append(subprocess.Popen([*command, "--sample-type", *kind, str(root / name)]))
    (root / "mixture.yaml").write_text(
        "datasets:\n  questions: {path: questions, weight: 2}\n"
        "  conversations: {path: conversations, weight: 1, template: plain}\n"
    )
    for name in ("llava", "llava_next"):
        save_llava(root / name / "hf", False, kind=name)
        sys.argv = [
            "convert",
            "--hf-dir",
            str(root / name / "hf"),
            "--megatron-dir",
            f"{root / name}/megatron",
        ]
        try:
            runpy.run_path("scripts/convert/convert_hf_to_megatron.py", run_name="__main__")
        except SystemExit as ended:
            assert not ended.code
    for family in families:
        save_tiny_llava(root / "towers" / family, family)
    for name, seed in (("a.jpg", 1), ("b.jpg", 2)):
        (root / name).write_bytes(jpeg(seed))
    asked = [
        {"prompt": "What is in this picture?", "image": "a.jpg"},
        {"prompt": "Who are you, and what is the answer?"},
        {"prompt": "Describe the image.", "image": ["b.jpg"]},
        {"prompt": "<image> 0 1 2 <image> 3?", "image": ["b.jpg", "a.jpg"]},
    ]
    (root / "asked.jsonl").write_text("".join(json.dumps(question) + "\n" for question in asked))
    assert not any(process.wait() for process in preparing)


FAMILIES = (
    *("clip-llama", "siglip-qwen2", "clip-mistral", "clip-mixtral", "clip-qwen3-tied"),
    *("next-clip-llama", "onevision-siglip-qwen2"),
)


def both(
    collect: Callable[[Tree, Path, Path], Values], reference: Tree, current: Tree, inputs: Path, folder: Path
) -> tuple[Values, Values]:
    """Return the values of each tree, which writes to a folder of its own."""
    ours, theirs = (collect(tree, inputs, folder / tree.folder.name) for tree in (current, reference))
    return theirs, ours


def training_flags(inputs: Path, model: str, flags: Sequence[str]) -> list[str]:
    """Return the flags of a short run on two processes, with ``{inputs}`` in ``flags`` replaced by their
    folder."""
    return [
        *("-g", "2", "--device", "cpu", "--log-interval", "1", "--train-iters", str(ITERATIONS)),
        *(
            "--megatron-load-dir",
            f"{inputs}/{model}/megatron",
            "--tokenizer-load-dir",
            f"{inputs}/{model}/hf",
        ),
        *("--data-path", f"{inputs}/questions", "--data-workers", "2", "--shuffle-buffer-size", "20"),
        *("--micro-batch-size", "2", "--global-batch-size", "4", "--seq-length", "96", "--lang", "en"),
        *("--lr", "2e-3", "--lr-warmup-iters", "2", "--max-corrupt-rate", "0.5"),
        *(flag.format(inputs=inputs) for flag in flags),
    ]


def train(model: str, flags: Sequence[str], tree: Tree, inputs: Path, folder: Path) -> Values:
    """Train, and return what ``metrics.jsonl`` and ``validation.jsonl`` say, but for times."""
    arguments = [*training_flags(inputs, model, flags), "--save-dir", folder, "--name", "run"]
    tree.run("scripts/train/run.py", *arguments, "--no-save")
    return read_metrics(folder / "run")


def read_metrics(run: Path) -> dict[str, Any]:
    """Read all metrics of a run folder that no clock has a part in."""
    found = {}
    for name in ("metrics", "validation"):
        path = run / f"{name}.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            entries = json.loads(line)
            at = f"{name}, iteration {entries['iteration']}, "
            found.update({at + key: value for key, value in entries.items() if not _MEASURED.fullmatch(key)})
    return found


def go_on(reference: Tree, current: Tree, inputs: Path, folder: Path) -> tuple[Values, Values]:
    """Return the values of the reference's run, and of a copy that this tree goes on with from its middle.

    Compared are the metrics, and in the last checkpoint the weights and the optimizer's state.
    """
    flags = ["--tp", "2", "--train-vision", "--fp32", "--save-optim", "--save-interval", str(SAVED_AT)]
    command = ["scripts/train/run.py", *training_flags(inputs, "llava", flags), "--name", "run", "--save-dir"]
    reference.run(*command, folder / "whole")
    whole, half = folder / "whole/run", folder / "half/run"
    shutil.copytree(whole, half)
    shutil.rmtree(half / "checkpoints" / f"iter_{ITERATIONS:07d}")
    (half / "checkpoints/latest_checkpointed_iteration.txt").write_text(str(SAVED_AT))
    current.run(*command, folder / "half")
    superseded = (half / "metrics.superseded.jsonl").read_text().splitlines()
    assert len(superseded) == ITERATIONS - SAVED_AT  # so that the lines below are new ones
    found = []
    for run in (whole, half):
        hashes = hash_native(run / "checkpoints" / f"iter_{ITERATIONS:07d}")
        found.append({**read_metrics(run), **{f"last checkpoint, {name}": hashes[name] for name in hashes}})
    return found[0], found[1]


def plan(runs: Mapping[str, tuple[str, Sequence[str]]], tree: Tree, inputs: Path, folder: Path) -> Values:
    """Return what ``run.py --dry-run`` prints of each run: layout, batch, tokens, FLOPs and memory."""
    found = {}
    for name, (model, flags) in runs.items():
        arguments = [
            *training_flags(inputs, model, flags),
            "--save-dir",
            inputs,
            "--name",
            "run",
            "--dry-run",
        ]
        lines = tree.run("scripts/train/run.py", *arguments).stderr.splitlines()
        found.update({f"{name}, line {number}": line for number, line in enumerate(lines, 1)})
    return found


def generate(layout: Sequence[str], flags: Sequence[str], tree: Tree, inputs: Path, folder: Path) -> Values:
    """Return the answers to ``asked.jsonl``, how many tokens each has, and why it ends there."""
    folder.mkdir(parents=True)
    arguments = ["--megatron-dir", inputs / "llava/megatron", "--tokenizer-load-dir", inputs / "llava/hf"]
    files = ["--input", inputs / "asked.jsonl", "--output", folder / "answers.jsonl"]
    more = ["--lang", "en", "--max-new-tokens", "24", "--device", "cpu"]
    tree.run("scripts/inference/generate.py", *arguments, *files, *more, *layout, *flags)
    lines = (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    return {
        f"question {number}, {key}": value
        for number, line in enumerate(lines, 1)
        for key, value in json.loads(line).items()
    }


def convert(tree: Tree, inputs: Path, folder: Path) -> Values:
    """Return SHA256 of each tensor that conversions write, to both of Megatron's formats and back."""
    for_all = []
    for family in FAMILIES:
        for form in ("torch_dist", "classic"):
            there, back = f"{folder}/{family}/{form}", f"{folder}/{family}/{form}-back"
            for_all += [
                (
                    "to_megatron",
                    ("--hf-dir", f"{inputs}/towers/{family}", "--megatron-dir", there, "--format", form),
                ),
                ("to_hf", ("--megatron-dir", there, "--hf-dir", back)),
            ]
    tree.call(
        run_conversions, [(name, [*arguments, "--tp", "2", "--pp", "2"]) for name, arguments in for_all]
    )
    found: dict[str, str] = {}
    for family in FAMILIES:
        hashed = {
            "torch_dist": hash_native(folder / family / "torch_dist/release"),
            "classic": hash_classic(folder / family / "classic"),
            **{
                f"{form}, back": hash_hf(folder / family / f"{form}-back")
                for form in ("torch_dist", "classic")
            },
        }
        for form, hashes in hashed.items():
            found.update({f"{family}, {form}, {name}": value for name, value in hashes.items()})
    return found


def run_conversions(commands: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Run the two conversion scripts of the tree that this runs in, all commands in one process."""
    import runpy
    import sys

    scripts = {"to_megatron": "convert_hf_to_megatron", "to_hf": "convert_megatron_to_hf"}
    for name, arguments in commands:
        sys.argv = [name, *arguments]
        try:
            runpy.run_path(f"scripts/convert/{scripts[name]}.py", run_name="__main__")
        except SystemExit as ended:
            if ended.code:
                raise


def sha256(tensor: Tensor) -> str:
    """Return a hash of a tensor's dtype, shape and bytes."""
    data = tensor.detach().contiguous()
    hashed = hashlib.sha256(f"{data.dtype} {tuple(data.shape)}".encode())
    hashed.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def hash_native(folder: Path) -> dict[str, str]:
    """Return SHA256 of each tensor of a checkpoint in torch's own format, read by torch alone."""
    reader = FileSystemReader(folder)
    stored = reader.read_metadata().state_dict_metadata
    state: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is .* uninitialized")
        load(state, storage_reader=FileSystemReader(folder), no_dist=True)
    return {name: sha256(tensor) for name, tensor in sorted(state.items())}


def hash_classic(folder: Path) -> dict[str, str]:
    """Return SHA256 of each tensor of Megatron-LM's ``mp_rank_*`` files."""

    def tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, Mapping):
            for key, inner in value.items():
                yield from tensors(inner, f"{name}.{key}")

    found = {}
    with torch.serialization.safe_globals([argparse.Namespace]):
        for path in sorted(folder.rglob("*.pt")):
            rank = path.parent.name
            found.update({name: sha256(t) for name, t in tensors(torch.load(path, weights_only=True), rank)})
    return found


def hash_hf(folder: Path) -> dict[str, str]:
    """Return SHA256 of each tensor of a Hugging Face folder."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: sha256(tensor) for path in files for name, tensor in load_file(path).items()}


def demo(layout: Sequence[str], tree: Tree, inputs: Path, folder: Path) -> Values:
    """Return the metrics of the demo, its answers to the held-out digits, and how many are right."""
    tree.run("examples/digits/demo.py", *layout)
    made = tree.folder / "demo"
    answers = json.loads((made / "predictions.json").read_text(encoding="utf-8"))
    found = read_metrics(made / "runs/digits")
    found.update({f"answer to {answer['key']}": answer["prediction"] for answer in answers})
    found["right answers"] = sum(answer["prediction"] == answer["answer"] for answer in answers)
    return found


RUNS: dict[str, tuple[str, Sequence[str]]] = {
    "stage 1 tp2": ("llava", ("--stage", "1", "--tp", "2", "--fp32", "--eval-interval", "10")),
    "stage 2 pp2 dist-optim": (
        "llava",
        ("--stage", "2", "--train-vision", "--pp", "2", "--dist-optim", "--bf16"),
    ),
    "LoRA tp2": ("llava", ("--lora-rank", "4", "--lora-dropout", "0.1", "--tp", "2", "--fp32")),
    "packing dp2": ("llava", ("--packing", "--seq-length", "160", "--dist-optim", "--bf16")),
    "anyres tp2 sp": (
        "llava_next",
        ("--tp", "2", "--sequence-parallel", "--train-vision", "--seq-length", "192", "--fp32"),
    ),
    "mixture dp2": ("llava", ("--data-path", "{inputs}/mixture.yaml", "--fp32", "--eval-interval", "10")),
}
METRICS = f"metrics of {ITERATIONS} iterations"
CASES = (
    *(Case(name, METRICS, partial(both, partial(train, *run))) for name, run in RUNS.items()),
    Case("resume tp2", f"metrics and last checkpoint after iteration {SAVED_AT}", go_on),
    Case("plan", "what --dry-run prints of these runs", partial(both, partial(plan, RUNS))),
    Case("greedy tp2", "answers", partial(both, partial(generate, ["--tp", "2"], []))),
    Case(
        "sampled pp2",
        "answers",
        partial(
            both, partial(generate, ["--pp", "2"], ["--temperature", "0.9", "--top-p", "0.95", "--seed", "7"])
        ),
    ),
    Case("conversion tp2 pp2", "SHA256 of tensors", partial(both, convert)),
    *(
        Case(
            f"demo tp2 pp{pp}",
            "metrics, predictions, right answers",
            partial(both, partial(demo, ["--tp", "2", "--pp", pp])),
            slow=True,
        )
        for pp in ("1", "2")
    ),
)


def first_difference(reference: Values, current: Values) -> str:
    """Return the first name at which the two differ, with both values; empty if they are the same."""
    for name in [*reference, *(name for name in current if name not in reference)]:
        # As JSON, a float is all its digits, and one that is not a number equals itself.
        then, now = (json.dumps(v[name]) if name in v else "nothing" for v in (reference, current))
        if then != now:
            return f"{name}: {then} was, {now} is"
    return ""


def compare(
    cases: Sequence[Case], reference: Tree, current: Tree, folder: Path
) -> Iterator[tuple[Case, int, str, float]]:
    """Run cases in an empty folder.

    Yields:
        each case with the number of values, the first difference and the seconds it took.
    """
    inputs = folder / "inputs"
    inputs.mkdir()
    reference.call(make_inputs, str(inputs), FAMILIES)
    for case in cases:
        begun = time.perf_counter()
        scratch = folder / case.name.replace(" ", "-")
        scratch.mkdir()
        then, now = case.collect(reference, current, inputs, scratch)
        if not then:
            sys.exit(f"error: {case.name} compares nothing")
        yield case, len(then), first_difference(then, now), time.perf_counter() - begun


def git(*arguments: str) -> str:
    """Return what git says, in this checkout."""
    ended = subprocess.run(["git", "-C", CHECKOUT, *arguments], capture_output=True, text=True)
    if ended.returncode:
        sys.exit(f"error: git {shlex.join(arguments)}: {ended.stderr.strip()}")
    return ended.stdout


def copy_of_commit(ref: str, folder: Path) -> Tree:
    """Return a commit's tree, as git has it."""
    known = subprocess.run(
        ["git", "-C", CHECKOUT, "cat-file", "-e", f"{ref}^{{commit}}"], capture_output=True
    )
    if known.returncode:
        print(f"error: --ref: git knows no commit {ref} in {CHECKOUT}", file=sys.stderr)
        sys.exit(2)
    commit = git("rev-parse", "--short=12", f"{ref}^{{commit}}").strip()
    folder.mkdir()
    archive = folder.with_suffix(".tar")
    git("archive", "--output", str(archive), commit)
    shutil.unpack_archive(archive, folder)
    return Tree(folder, commit)


def copy_of_checkout(folder: Path) -> Tree:
    """Return a copy of this checkout's files, those that git ignores left out, which may change meanwhile."""
    for name in git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0"):
        if name and (CHECKOUT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(CHECKOUT / name, folder / name)
    commit = git("rev-parse", "--short=12", "HEAD").strip()
    return Tree(folder, commit + (" with uncommitted changes" if git("status", "--porcelain") else ""))


def heading(reference: Tree, current: Tree) -> str:
    """Return what the table's numbers were made with."""
    packages = ("torch", "megatron-core", "megatron-energon", "transformers", "numpy")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return (
        f"# {current.commit} beside {reference.commit}\n\n"
        f"{date.today().isoformat()}, {processor()}, 1 thread per process; "
        f"python {platform.python_version()}, {versions}.\n"
        f"Command: `{shlex.join(['python', '-m', 'benchmarks.same_numbers', *sys.argv[1:]])}`.\n\n"
        "| case | compared | values | | seconds |\n|---|---|---|---|---|"
    )


def main() -> int:
    """Compare, print a line for each case as it ends, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--ref", required=True, metavar="COMMIT", help="with whose numbers this checkout's are compared"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cases whose names begin so")
    parser.add_argument(
        "--demo", action="store_true", help="the demo too, 2 minutes for each tree and layout"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table here too, as Markdown")
    args = parser.parse_args()
    cases = [case for case in CASES if args.demo or not case.slow]
    if args.only:
        cases = [case for case in cases if case.name.startswith(tuple(args.only))]
        if not cases:
            names = ", ".join(case.name for case in CASES)
            parser.error(
                f"--only {' '.join(args.only)}: no case begins so; there are {names} (the demo with --demo)"
            )
    with tempfile.TemporaryDirectory(prefix="same-numbers-") as temporary:
        folder = Path(temporary)
        reference = copy_of_commit(args.ref, folder / "reference")
        current = copy_of_checkout(folder / "current")
        lines = [heading(reference, current)]
        print(lines[0], flush=True)
        same = True
        for case, count, difference, seconds in compare(cases, reference, current, folder):
            same &= not difference
            lines.append(f"| {case.name} | {case.what} | {count} | {difference or 'same'} | {seconds:.0f} |")
            print(lines[-1], flush=True)
    lines.append(f"\n{'All is the same, bit for bit.' if same else 'Not the same.'}")
    print(lines[-1])
    if args.output:
        args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
