"""The flags of ``scripts/inference/generate.py``.

config = GenerationConfig.from_flags(sys.argv[1:])
config.validate(model)
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import Dict, Optional, Sequence, Tuple

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.artifacts.checkpoint import checkpoint_layers
from megatron_vlm.artifacts.image_rule import ALPHAS, ORIENTATIONS
from megatron_vlm.artifacts.templates import TEMPLATES
from megatron_vlm.config.checks import between, not_negative, positive
from megatron_vlm.config.flags import FlagParser, flag
from megatron_vlm.config.sections import ParallelSection
from megatron_vlm.config.sections.launch import LaunchSection

# Headings of --help, in order.
MODEL = "Model"
PROMPTS = "What is asked"
SAMPLING = "Which token comes next"
MACHINE = "What runs it"
GROUPS = (MODEL, PROMPTS, SAMPLING, MACHINE)


@dataclass(frozen=True)
class SourceSection:
    """The flags that say which model answers, and how a question becomes its prompt."""

    megatron_dir: Optional[str] = flag(
        MODEL, None, "checkpoint: its folder, the root above it, or a run folder"
    )
    base: Optional[str] = flag(
        MODEL,
        None,
        "checkpoint with all weights under one of trained weights only",
        shown_default="where it was when that was saved",
    )
    tokenizer_load_dir: Optional[str] = flag(
        MODEL,
        None,
        "Hugging Face folder with tokenizer and image processor",
        shown_default="the training run's, or the one that the checkpoint carries",
    )
    template: Optional[str] = flag(
        MODEL,
        None,
        "how a question becomes a prompt",
        choices=TEMPLATES,
        shown_default="the training run's, else chat if there is one, else v1",
    )
    lang: Optional[str] = flag(
        MODEL,
        None,
        "language of the prompts",
        choices=("jp", "en"),
        shown_default="the training run's, else jp",
    )
    image_orientation: Optional[str] = flag(
        MODEL,
        None,
        "turn images as their EXIF data says, or take them as they are stored",
        choices=ORIENTATIONS,
        shown_default="the training run's, else exif",
    )
    image_alpha: Optional[str] = flag(
        MODEL,
        None,
        "drop an image's alpha channel, or lay it on white",
        choices=ALPHAS,
        shown_default="the training run's, else drop",
    )
    precision: Optional[str] = flag(
        MODEL,
        None,
        "compute in bfloat16",
        choices=("bf16", "fp32"),
        switches=True,
        shown_default="what the weights are stored in",
    )


@dataclass(frozen=True)
class PromptSection:
    """The questions, and where the answers go."""

    prompt: Optional[str] = flag(
        PROMPTS, None, "the question; <image> in it says where an image goes, otherwise images come first"
    )
    image: Tuple[str, ...] = flag(PROMPTS, (), "image files of the question")
    input: Optional[str] = flag(
        PROMPTS, None, 'many questions: a file with {"prompt": ..., "image": file or files} on each line'
    )
    output: Optional[str] = flag(
        PROMPTS, None, "write the input's lines and their answers here, as JSON Lines", shown_default="stdout"
    )
    force: bool = flag(PROMPTS, False, "replace an --output that is there")
    raw_prompt: bool = flag(PROMPTS, False, "give the text to the model as it is, without the template")
    batch_size: int = flag(PROMPTS, 8, "questions of --input that are answered together")

    def __post_init__(self) -> None:
        positive(self, "batch_size")
        if self.input is not None and (self.prompt is not None or self.image):
            given = "--prompt" if self.prompt is not None else "--image"
            raise ValueError(f"{given} and --input both say what is asked; leave one out")
        if self.input is None and self.prompt is None and not self.image:
            raise ValueError("nothing is asked; give --prompt, --image or --input")
        if self.force and self.output is None:
            raise ValueError("--force replaces an --output, and none is given; leave it out")
        if self.raw_prompt and self.input is None and self.prompt is None:
            raise ValueError("--raw-prompt needs --prompt, the text as the model takes it")


def incomplete(output: str) -> str:
    """Return the file that holds answers until all of them are there."""
    return f"{output}.incomplete"


@dataclass(frozen=True)
class SamplingSection:
    """The flags that say how the next token is chosen, and when to stop."""

    max_new_tokens: Optional[int] = flag(
        SAMPLING,
        None,
        "longest answer in tokens, its end token included",
        shown_default="256, or less where the model has fewer positions left",
    )
    temperature: float = flag(
        SAMPLING,
        0.0,
        "logits are divided by X and a token is drawn",
        shown_default="0, the most likely token",
    )
    top_k: int = flag(SAMPLING, 0, "draw among the N most likely tokens", shown_default="0, all")
    top_p: float = flag(SAMPLING, 1.0, "draw among the most likely tokens that together reach probability X")
    repetition_penalty: float = flag(
        SAMPLING, 1.0, "above 1 makes tokens that the prompt or the answer holds already less likely"
    )
    seed: int = flag(SAMPLING, 1234, "of what is drawn")

    def __post_init__(self) -> None:
        positive(self, "max_new_tokens", "top_p", "repetition_penalty")
        not_negative(self, "temperature", "top_k")
        between(self, "top_p", 0, 1)
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            name = "--top-k" if self.top_k else "--top-p"
            raise ValueError(f"{name} limits what is drawn, and nothing is without --temperature; give both")


@dataclass(frozen=True)
class MachineSection:
    """The flags that say what the model runs on."""

    tp: int = flag(MACHINE, 1, "tensor-parallel size")
    pp: int = flag(MACHINE, 1, "pipeline-parallel size")
    device: Optional[str] = flag(
        MACHINE,
        None,
        "what runs the model",
        choices=("cuda", "cpu"),
        shown_default="cuda where there is a GPU",
    )
    sif_path: Optional[str] = flag(MACHINE, None, "run inside this Apptainer (Singularity) image")
    bind: Tuple[str, ...] = flag(
        MACHINE, (), "further paths to bind into the container, each source[:target[:ro]]"
    )

    def __post_init__(self) -> None:
        positive(self, "tp", "pp")


SECTIONS: Dict[str, type] = {
    "source": SourceSection,
    "prompts": PromptSection,
    "sampling": SamplingSection,
    "machine": MachineSection,
}


@dataclass(frozen=True)
class GenerationConfig:
    """The flags of generation, in sections; the rules inside a section are checked when it is built."""

    source: SourceSection
    prompts: PromptSection
    sampling: SamplingSection
    machine: MachineSection

    @classmethod
    def from_flags(cls, argv: Sequence[str], prog: Optional[str] = None) -> GenerationConfig:
        """Read command-line flags. ``--help`` prints the help and raises ``SystemExit(0)``.

        Raises:
            ValueError: a flag is unknown or malformed, or a rule inside a section is broken.
        """
        parser = FlagParser(
            SECTIONS,
            GROUPS,
            prog=prog,
            usage="%(prog)s --megatron-dir PATH [--image FILE] --prompt TEXT [flags]",
            description="Let a Megatron checkpoint of a vision-language model answer.",
        )
        given = parser.read(argv)
        sections = {}
        for name, section in SECTIONS.items():
            names = [field.name for field in fields(section)]
            sections[name] = section(**{key: given[key] for key in names if key in given})
        return cls(**sections)

    @property
    def parallel(self) -> ParallelSection:
        """The layout of the ranks."""
        return ParallelSection(tp=self.machine.tp, pp=self.machine.pp, device=self.machine.device)

    @property
    def launch(self) -> LaunchSection:
        """The way the ranks are started: on this machine, one copy of the model."""
        return LaunchSection(gpus=self.machine.tp * self.machine.pp, node=1, rank=0)

    @property
    def paths(self) -> Tuple[str, ...]:
        """Files and folders that are read or written, an input's and an output's folder among them.

        Raises:
            ValueError: there is no such checkpoint, or what it lies over isn't where it was.
        """
        source, prompts = self.source, self.prompts
        bases = [str(folder) for folder in checkpoint_layers(self.checkpoint, source.base)[:-1]]
        folders = [
            os.path.dirname(file) or "." for file in (prompts.input, prompts.output) if file is not None
        ]
        named = (source.megatron_dir, *bases, source.tokenizer_load_dir, *prompts.image, *folders)
        return tuple(path for path in named if path is not None)

    @property
    def checkpoint(self) -> str:
        """The value of ``--megatron-dir``.

        Raises:
            ValueError: it isn't given.
        """
        if self.source.megatron_dir is None:
            raise ValueError("--megatron-dir is missing: a checkpoint or a run folder")
        return self.source.megatron_dir

    def check_files(self) -> None:
        """Check that what is read is there, and that the output can be, without replacing anything.

        Raises:
            ValueError: one line that names the flag.
        """
        files = [("--image", path) for path in self.prompts.image]
        if self.prompts.input is not None:
            files.append(("--input", self.prompts.input))
        for name, path in files:
            if not os.path.isfile(path):
                raise ValueError(f"{name} {path}: no such file")
        output = self.prompts.output
        if output is not None and not os.path.isdir(os.path.dirname(output) or "."):
            raise ValueError(f"--output {output}: no such folder")
        for path in (output, incomplete(output)) if output is not None and not self.prompts.force else ():
            if os.path.exists(path):
                what = (
                    "is there already"
                    if path == output
                    else f"{path} holds answers of a run that did not end"
                )
                raise ValueError(f"--output {output}: {what}; give another file, or --force to replace it")

    def check_model(self, model: ModelConfig) -> None:
        """Check that the model can be cut as the flags say.

        Raises:
            ValueError: it cannot; the message says which sizes would work.
        """
        model.check_layout(self.machine.tp, self.machine.pp)
