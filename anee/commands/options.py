"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="A model source, hub id or local folder.")]
Prompt = Annotated[str, typer.Argument(help="The text to continue.")]
PolicyString = Annotated[str, typer.Option("--policy", "-p", help="A policy string, like 'static:skip=5 14'.")]
Budget = Annotated[float | None, typer.Option("--budget", "-b", help="Share of the dense FLOPs that may be spent.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", help="How many tokens to add.")]
Sample = Annotated[bool, typer.Option("--sample", help="Sample instead of taking the likeliest token.")]
SampleSeed = Annotated[int | None, typer.Option("--seed", help="Seed of sampling.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16.")]
Weights = Annotated[str | None, typer.Option("--weights", help="Quantise the layers' weights: int8 or int4.")]
Device = Annotated[str | None, typer.Option("--device", help="Where to run, like cuda:0.")]
Length = Annotated[int, typer.Option("--length", help="Tokens per block.")]
Blocks = Annotated[int, typer.Option("--blocks", help="Blocks of each text.")]
