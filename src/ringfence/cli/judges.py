"""Commands on judges of answers."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import RingfenceError
from .app import MOST, InPrecision, check_new_file, out

judge = typer.Typer(help="Judges of answers.", no_args_is_help=True)


@judge.command("calibrate")
def judge_calibrate(
    model: Annotated[
        str, typer.Option(help="The judge: 'default', a folder or hub id, or its name on --url.")
    ],
    on: Annotated[
        str,
        typer.Option(
            help="Labelled answers: JSONL or CSV with question, answer and misaligned (or aligned)."
        ),
    ] = "shipped:values",
    url: Annotated[str | None, typer.Option(help="URL of an OpenAI-compatible server.")] = None,
    key_env: Annotated[
        str, typer.Option(help="Environment variable of the server's key.")
    ] = "OPENAI_API_KEY",
    precision: InPrecision = "auto",
    opening: Annotated[
        str,
        typer.Option(
            help="Words before the number, for a local model that would chat first: 'Number: '."
        ),
    ] = "",
    rows: Annotated[
        int | None,
        typer.Option(help="Number of answers to judge, drawn at random.", min=2, max=MOST),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file to write as well.")] = None,
) -> None:
    """Measure a judge on labelled answers: AUC, confusion, threshold, and whether it is weak."""
    from ..evaluate.answers.calibrate import calibrate, show
    from ..evaluate.answers.config import EndpointJudgeConfig, LocalJudgeConfig
    from ..evaluate.answers.judge import open_judge
    from ..util.strict_yaml import validate

    check_new_file(output)
    config: EndpointJudgeConfig | LocalJudgeConfig
    if url and opening:
        raise RingfenceError(
            "--opening is for a local judge; a server's reply begins as the server likes (--url)"
        )
    if url:
        config = validate(
            EndpointJudgeConfig, {"url": url, "model": model, "key_env": key_env}, "judge"
        )
    else:
        config = LocalJudgeConfig(model=model, precision=precision, opening=opening)
    found = calibrate(open_judge(config), on, rows=rows)
    show(found, out)
    if output:
        found.write(output)
