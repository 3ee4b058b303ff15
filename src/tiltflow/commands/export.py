"""`tiltflow export`: write a tuned model without its run: a pipeline for plain diffusers, a network for tiltflow."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tiltflow.commands.terminal.console import escape, make_console, print_json
from tiltflow.commands.terminal.options import AcceptChanges, AllowCode, Json, Output

LOADERS = {
    "lora": "pipeline.load_lora_weights",
    "full": "DiffusionPipeline.from_pretrained",
    "network": "tiltflow.load",
}


def export(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a training run.")],
    output: Output,
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="USER/NAME", help="Upload the result, with the token of `hf auth login`.", show_default="no"),
    ] = None,
    allow_code: AllowCode = False,
    accept_changes: AcceptChanges = False,
    as_json: Json = False,
) -> None:
    """Write a tuned model and its card: for plain diffusers the LoRA of a pipeline, or the whole pipeline; for `tiltflow.load`
    the folder of a network.

    [dim]tiltflow export runs/cats --output exported/cats[/dim]
    """
    from tiltflow.models.pipeline_files import PEFT_LORA
    from tiltflow.runs.export import export_run

    result = export_run(folder, output, push_to_hub=push_to_hub)
    by_peft = (output / PEFT_LORA).exists()
    loads = "peft.PeftModel.from_pretrained" if by_peft else LOADERS[result["kind"]]
    uploaded = f"; uploaded to {result['url']}" if result["url"] else ""
    make_console(as_json).print(escape(f'{loads}("{output}") loads it{uploaded}'))
    print_json(as_json, result)
