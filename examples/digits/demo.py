"""The whole pipeline on handwritten digits, every command printed before it runs.

The commands are those that a real run takes, with other paths and sizes; each can be pasted into
a shell at the root of the checkout once ``source .venv/bin/activate`` was run there.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

CHECKOUT = Path(__file__).resolve().parents[2]
FIELD_MAP = '{"image": "jpg", "context": "json[question]", "answers": "txt"}'
TRAIN_ITERATIONS = 500

FINISH = """
Finished in {minutes:.1f} minutes at TP {tp} x PP {pp}.

run folder       demo/runs/digits/
                   config.json              the resolved run config
                   checkpoints/             iter_*/ in megatron-core's torch_dist format
                   metrics.jsonl            one line per logged iteration: loss, lr, grad_norm, ...
                   logs/
exported model   demo/export/               a Hugging Face folder, for LlavaForConditionalGeneration
held-out data    demo/data/held-out-*.tar   [idx].jpg image, [idx].txt answer, [idx].json question
answers          demo/predictions.json      key, question, answer and prediction of each held-out digit
picture          demo/digits.png            held-out digits with the model's answers, and the loss curve
"""


def step(title: str) -> None:
    print(f"\n=== {title}", flush=True)


def run(*command: str) -> None:
    """Print a command and run it at the root of the checkout; the demo ends where one fails."""
    print(f"\n$ {shlex.join(command)}", flush=True)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        # Nothing here needs the network, and notes on torchvision's absence would hide the rest.
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    code = subprocess.run(command, cwd=CHECKOUT, env=environment, stdin=subprocess.DEVNULL).returncode
    if code:
        sys.exit(f"error: exit code {code} from the command above")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tp", type=int, default=2, help="tensor-parallel size (default: 2)")
    parser.add_argument("--pp", type=int, default=1, help="pipeline-parallel size (default: 1)")
    args = parser.parse_args()
    if args.tp not in (1, 2) or args.pp not in (1, 2, 4):  # its models have 2 key-value heads and 4 layers
        parser.error(
            f"TP={args.tp} PP={args.pp} does not fit the demo's model; use TP 1 or 2, and PP 1, 2 or 4"
        )
    tp, pp, ranks = str(args.tp), str(args.pp), args.tp * args.pp
    start = time.monotonic()
    shutil.rmtree(CHECKOUT / "demo", ignore_errors=True)

    step("1. 1,797 handwritten digits become a dataset: 1,500 to train on, 297 held out")
    run("python", "examples/digits/make_dataset.py", "--save-dir", "demo/data")
    run(
        *("energon", "prepare", "--non-interactive", "--no-progress", "--num-workers", "2"),
        *("--split-parts", "train:train-.*", "--split-parts", "val:held-out-.*"),
        *("--sample-type", "VQASample", "--field-map", FIELD_MAP, "demo/data"),
    )

    step("2. A text model and a vision tower, both with random weights, become a LLaVA")
    run("python", "examples/digits/make_models.py", "--save-dir", "demo/models")
    run(
        *("python", "scripts/convert/build_llava_jp.py", "--save-dir", "demo/llava", "--lang", "en"),
        *("--text-model", "demo/models/text-model", "--vision-model", "demo/models/vision-model"),
    )
    print("\nBefore training it does not even know that the answer is a digit:")
    evaluate = ("python", "examples/digits/evaluate.py", "--data-path", "demo/data")
    run(*evaluate, "--hf-dir", "demo/llava")

    step("3. From Hugging Face to Megatron")
    run(
        *("python", "scripts/convert/convert_hf_to_megatron.py", "--tp", tp, "--pp", pp),
        *("--hf-dir", "demo/llava", "--megatron-dir", "demo/megatron"),
    )

    step(f"4. Training with megatron-core on {ranks} ranks")
    too_few_gpus = 0 < torch.cuda.device_count() < ranks
    run(
        *("python", "scripts/train/run.py", "-g", str(ranks), "--tp", tp, "--pp", pp),
        *("--name", "digits", "--save-dir", "demo/runs", "--data-path", "demo/data", "--lang", "en"),
        *("--megatron-load-dir", "demo/megatron", "--tokenizer-load-dir", "demo/llava"),
        *("--stage", "2", "--train-vision", "--fp32", "--seq-length", "64"),
        *("--micro-batch-size", str(48 // args.pp), "--global-batch-size", "48"),
        *("--train-iters", str(TRAIN_ITERATIONS), "--lr", "1e-3", "--lr-warmup-iters", "50"),
        *("--adam-beta2", "0.95", "--log-interval", "10", "--save-optim"),
        *(("--device", "cpu") if too_few_gpus else ()),
    )

    step("5. From Megatron back to Hugging Face")
    run(
        *("python", "scripts/convert/convert_megatron_to_hf.py", "--tp", tp, "--pp", pp),
        *("--megatron-dir", "demo/runs/digits", "--hf-dir", "demo/export", "--tokenizer-dir", "demo/llava"),
    )

    step("6. transformers answers for the held-out digits")
    run(*evaluate, "--hf-dir", "demo/export", "--predictions", "demo/predictions.json", "--expect", "0.97")
    run(
        *("python", "examples/digits/contact_sheet.py", "--output", "demo/digits.png"),
        *("--predictions", "demo/predictions.json", "--data-path", "demo/data"),
        *("--metrics", "demo/runs/digits/metrics.jsonl"),
    )
    print(FINISH.format(minutes=(time.monotonic() - start) / 60, tp=tp, pp=pp))


if __name__ == "__main__":
    main()
