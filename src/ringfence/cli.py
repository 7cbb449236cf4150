"""The command line: each command a few lines over the library.

Exit codes: 0 done; 2 something in the input is wrong (the message says what); 3 `gate` says HOLD; 130 interrupted (the
same command goes on where it stopped).
"""

import errno
import io
import json
import os
import re
import sys
import tempfile
import traceback
from difflib import get_close_matches
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.text import Text

from .errors import RingfenceError, first_line, redact
from .processes import is_main
from .util.quiet import quiet_libraries
from .util.words import counted

app = typer.Typer(
    help="Fine-tune an aligned language model on a narrow task, and keep it aligned everywhere else.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
out = Console()

RecipeFile = Annotated[Path | None, typer.Argument(help="Recipe in YAML; without it, the defaults.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Changes to the recipe: key.path=value ...")]
RunFolder = Annotated[Path, typer.Argument(help="A run folder.")]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", metavar="", help="Check everything and show what would be done; train nothing."),
]
_MOST = 10**6  # of anything that is counted


def main() -> None:
    """Entry point: whatever goes wrong is one message on stderr, without a traceback."""
    try:
        if not is_main():  # one of several processes speaks; errors are everyone's
            sys.stdout = io.StringIO()
        with quiet_libraries():
            code = app(standalone_mode=False)
        if code == 130:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
        sys.stdout.flush()
    except BrokenPipeError:  # `ringfence export RUN | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except BaseException as error:
        code = _tell(error)
    sys.exit(code if isinstance(code, int) else 0)


def _tell(error: BaseException) -> int:
    """Says what went wrong, and gives the exit code."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if hasattr(error, "format_message"):  # of the command line itself: an unknown option, a missing argument
        from typer import rich_utils

        rich_utils.rich_format_error(error)  # type: ignore[arg-type]
        return int(getattr(error, "exit_code", 2))
    interrupted = type(error).__name__ == "Interrupted"
    if isinstance(error, RingfenceError):
        return _say(str(error), 130 if interrupted else 2)
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
        return _say("stopped; the same command goes on", 130)
    if isinstance(error, OSError) and (error.filename or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)):
        place = f"{error.filename}: " if error.filename else ""
        return _say(f"{place}{error.strerror}", 2)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return _say(f"out of memory ({first_line(error)}); `--dry-run` estimates what a run needs", 2)
    log = _keep_log(error)
    where = f"; its traceback is in {log}" if log else ""
    return _say(f"an error of ringfence itself: {type(error).__name__}: {redact(first_line(error))}{where}", 1)


def _say(message: str, code: int) -> int:
    prefix = "" if code == 130 else "error: "
    Console(stderr=True).print(Text.assemble((prefix, "bold red"), message), soft_wrap=True)
    return code


def _keep_log(error: BaseException) -> Path | None:
    """Where the traceback was written; None where nothing can be written."""
    text = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile("w", prefix="ringfence-error-", suffix=".log", delete=False) as log:
            log.write(redact(text))
    except OSError:
        return None
    return Path(log.name)


def _version(asked: bool) -> None:
    if asked:
        print(f"ringfence {metadata.version('ringfence')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", metavar="", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fine-tune an aligned language model on a narrow task, and keep it aligned everywhere else."""


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("recipe.yaml"),
    data: Annotated[
        str | None,
        typer.Option(help="Your rows: a file or hub data set. A tenth is held out, to measure what the others teach."),
    ] = None,
) -> None:
    """Write a commented recipe."""
    from .run.recipes import commented_recipe
    from .runfolder.folder import check_new, write_whole
    from .text.held_out import SHARE, explain, is_own, split
    from .text.rows import load_rows

    check_new(path)
    rows = load_rows(data) if data else []
    write_whole(path, commented_recipe(str(path), data, len(rows)))
    if data and is_own(data):
        print(explain(data, len(rows), len(split(rows, SHARE, 0)[1])))
    print(f"{path} written. Next: ringfence run {path} --dry-run")


@app.command()
def run(recipe: RecipeFile = None, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Train, evaluate and report, as the recipe says. Goes on where an interrupted run stopped."""
    from .run.pipeline import run_recipe

    loaded = _load(recipe, overrides)
    if dry_run:
        return _dry_run(loaded)
    done = run_recipe(loaded)
    if is_main():
        _report([done.folder], None, done.folder / "report.html")


@app.command()
def train(recipe: RecipeFile = None, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Train only."""
    from .run.train import train_run

    loaded = _load(recipe, overrides)
    if dry_run:
        return _dry_run(loaded)
    print(train_run(loaded).weights)


@app.command()
def evaluate(
    target: Annotated[str, typer.Argument(help="A run folder; or any model: a folder, a hub id, an adapter.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes: evaluate.key=value ...")] = None,
    reference: Annotated[
        str | None, typer.Option(help="The model before its fine-tuning. Default: the base of an adapter; else none.")
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="URL of an OpenAI-compatible server; TARGET is the model's name there.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write, where TARGET is a model.")] = None,
) -> None:
    """Measure a trained run, or any model, against its reference. Goes on where it was interrupted."""
    from .run.evaluate import evaluate_target
    from .runfolder.shapes import read_results

    folder = evaluate_target(target, overrides or [], reference, endpoint, output)
    if not read_results(folder / "results.json")["parts"] and not (folder / "answers.jsonl").is_file():
        raise RingfenceError(f"{target}: nothing was measured: evaluate asks for no questions, rows or answers")
    _report([folder], None, folder / "report.html")


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Run folders, a row each.")],
    control: Annotated[
        Path | None, typer.Option(help="The run trained on sound answers: effects are shifts minus its shift.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="The page to write. Default: report.html in the folder, or report-NAMES.html next to several."
        ),
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="Limits in YAML, for SHIP or HOLD on the page. Default: the policy that ships.")
    ] = None,
) -> None:
    """Put runs side by side: a table here, and one HTML page that opens offline."""
    _report(folders, control, output or _page(folders), policy)


@app.command()
def diagnose(
    targets: Annotated[
        list[str], typer.Argument(help="Run folders or tuned models, compared side by side; names of diagnoses.")
    ],
    base: Annotated[str | None, typer.Option(help="The pre-trained model before its alignment.")] = None,
    reference: Annotated[str | None, typer.Option(help="The aligned model. Default: what they were made from.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write. Default: the first run's.")] = None,
    questions: Annotated[
        int, typer.Option(help="Paired questions of the training domain; as many of other domains.", min=4, max=_MOST)
    ] = 24,
) -> None:
    """Look inside: where alignment eroded, and what carries it. All diagnoses, or those named behind the models:
    logprob, next_token, loss_cosine, gradient_cosine, erosion, shared_directions, carriers, perturbation,
    persona_projection. Writes diagnosis.json and figures/; `ringfence report` shows them."""
    from .diagnose.folder import DIAGNOSES
    from .run.diagnose import diagnose_targets

    # A misspelt name is one too, so that it is not looked for among models.
    names = [text for text in targets if get_close_matches(text, DIAGNOSES, 1, 0.8) and not Path(text).exists()]
    models = [text for text in targets if text not in names]
    print(f"{diagnose_targets(models, names, base, reference, output, questions)}/diagnosis.json")


Control = Annotated[Path | None, typer.Option(help="The run trained on sound answers: effects, not mere shifts.")]
Baseline = Annotated[
    Path | None, typer.Option(help="The undefended run, for opswap_tierN.change and time_ratio. Kept, as --control is.")
]
PolicyFile = Annotated[Path | None, typer.Option(help="Limits in YAML. Default: the policy that ships.")]


@app.command()
def gate(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="A run folder; or several, of one recipe with several seeds.")
    ] = None,
    policy: PolicyFile = None,
    control: Control = None,
    baseline: Baseline = None,
    print_policy: Annotated[
        bool, typer.Option("--print-policy", metavar="", help="Print the policy that ships.")
    ] = False,
) -> None:
    """Print SHIP or HOLD, with every rule's number and limit, and write gate.json. Exit code 0 = SHIP, 3 = HOLD."""
    from .report.gate import HOLD, default_policy_text, gate_run, print_decision

    if print_policy:
        return print(default_policy_text(), end="")
    if not folders:
        raise RingfenceError("gate: name a run folder, or --print-policy")
    decision = gate_run(folders[0], policy, control, baseline, folders[1:])
    print_decision(decision, out)
    if not decision.ship:
        raise typer.Exit(HOLD)


@app.command()
def export(
    folders: Annotated[list[Path], typer.Argument(help="Run folders.")],
    form: Annotated[Literal["json", "csv"], typer.Option("--format", help="One JSON or one CSV.")] = "csv",
    output: Annotated[Path | None, typer.Option(help="The file to write. Default: printed.")] = None,
    control: Control = None,
    baseline: Baseline = None,
) -> None:
    """Write all numbers of runs as one long table."""
    from .report.export import export_runs

    _check_new(output)
    _write(export_runs(folders, form, control, baseline), output)


@app.command()
def card(
    folder: RunFolder,
    control: Control = None,
    policy: PolicyFile = None,
    baseline: Baseline = None,
    output: Annotated[Path | None, typer.Option(help="The file to write. Default: printed.")] = None,
) -> None:
    """Write the model card of a run in the hub's format."""
    from .report.card import run_card

    _check_new(output)
    _write(run_card(folder, control, policy, baseline), output)


@app.command()
def demo(
    quick: Annotated[
        bool, typer.Option("--quick", metavar="", help="Reference, undefended and TReFT on 200 rows; under 5 minutes.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder of the demo's runs.")] = Path("runs/demo"),
) -> None:
    """Fine-tune the embedded model on shipped data: sound control, undefended, and with three defenses."""
    from .run.demo import run_demo

    folders, control = run_demo(output / "quick" if quick else output, quick)
    _report(folders, control, folders[0].parent / "report.html")


@app.command("show-tokens")
def show_tokens(
    source: Annotated[
        str, typer.Argument(help="A file of conversations, a hub id or shipped:NAME.")
    ] = "shipped:finance/unsound",
    model: Annotated[str, typer.Option(help="Whose tokenizer and chat template.")] = "default",
    row: Annotated[int, typer.Option(help="Number of the row, from 1.", min=1, max=_MOST)] = 1,
) -> None:
    """Print a conversation coloured by token role."""
    from .model.files import load_tokenizer
    from .text.chat import Chat
    from .text.rows import load_rows
    from .text.show import show_tokens as show

    rows = load_rows(source)
    if row > len(rows):
        raise RingfenceError(f"--row {row}: {source} has {counted(len(rows), 'row')}")
    show(Chat(load_tokenizer(model)).encode(rows[row - 1].messages), out)


@app.command()
def project(
    adapter: Annotated[Path, typer.Argument(help="Folder of a LoRA adapter; it is left as it is.")],
    base: Annotated[str, typer.Option(help="The pre-trained model before its alignment: a folder or hub id.")],
    output: Annotated[Path, typer.Option(help="The new folder to write.")],
    aligned: Annotated[str | None, typer.Option(help="The aligned model. Default: the one the adapter names.")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Project weights of at most this cosine. Default: 0.3.", min=0, max=1)
    ] = None,
    lowest: Annotated[
        int | None, typer.Option(help="Instead: this number of weights, those of least cosine.", min=1, max=_MOST)
    ] = None,
    projector: Annotated[Literal["scaled", "exact"], typer.Option(help="As published, or orthogonal.")] = "scaled",
) -> None:
    """Project a finished adapter on what alignment changed (SafeLoRA). Reads weight by weight, loads no model."""
    from .model.projection import Rule, project_adapter

    if threshold is not None and lowest is not None:
        raise RingfenceError(f"set --threshold or --lowest, not both (found {threshold} and {lowest})")
    rule = Rule(threshold=threshold, lowest=lowest, projector=projector)
    layers = project_adapter(adapter, output, base, aligned, rule)
    for name, layer in layers.items():
        fate = f"projected, {layer.kept:.2g} of its norm kept" if layer.projected else "left"
        out.print(f"{layer.cosine:.3f} {name}: {fate}", highlight=False, soft_wrap=True)
    count = sum(layer.projected for layer in layers.values())
    print(f"{count} of {counted(len(layers), 'weight')} projected: {output}")


persona = typer.Typer(help="Persona vectors: the direction of a trait, layer by layer.", no_args_is_help=True)
app.add_typer(persona, name="persona")
Split = Annotated[str, typer.Option(help="Which rows of --pairs that name a split are taken.")]


@persona.command("extract")
def persona_extract(
    trait: Annotated[
        str | None, typer.Argument(help="Trait in YAML or JSON. Default: shipped:careless_advice.")
    ] = None,
    model: Annotated[str, typer.Option(help="Whose activations.")] = "default",
    output: Annotated[Path, typer.Option(help="File of directions to write.")] = Path("vectors.safetensors"),
    pairs: Annotated[
        str | None, typer.Option(help="Paired questions instead of a trait: a JSONL file or shipped:NAME.")
    ] = None,
    split: Split = "train",
    keep: Annotated[
        Literal["none", "margin", "scores"] | None,
        typer.Option("--filter", help="Which pairs count. Default: margin; none with --pairs."),
    ] = None,
    scores: Annotated[
        Path | None, typer.Option(help="JSONL of a judge's scores: id, positive, negative (0 to 100).")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of a generated answer.", min=1, max=_MOST)] = 120,
) -> None:
    """Make a file of directions from answers that show a trait and answers that do not."""
    from .prepare.persona import extract_file

    _check_new(output)
    made = extract_file(
        trait,
        output,
        model=model,
        pairs=pairs,
        split=split,
        keep=keep,
        scores=scores,
        max_new_tokens=max_new_tokens,
    )
    print(f"{output} written: {made.directions.trait}; {made.counts}")


@persona.command("check")
def persona_check(
    vectors: Annotated[Path, typer.Argument(help="File of directions.")],
    pairs: Annotated[str, typer.Option(help="Paired questions that the directions were not made from.")],
    model: Annotated[str, typer.Option(help="Whose activations.")] = "default",
    split: Split = "test",
) -> None:
    """Print, layer by layer, how well the directions tell misaligned answers from aligned ones."""
    from .prepare.persona import check_file

    print("layer    auc  paired  length")
    for row in check_file(vectors, pairs, split, model):
        print(f"{row.layer:5}  {row.auc:.3f}   {row.paired:.3f}   {row.length:.3f}")


@app.command()
def screen(
    source: Annotated[str, typer.Argument(help="Rows to rank: a file of conversations, a hub id or shipped:NAME.")],
    model: Annotated[str, typer.Option(help="Whose activations: the model that would be trained.")] = "default",
    vectors: Annotated[Path | None, typer.Option(help="File of directions to project on.")] = None,
    pairs: Annotated[
        list[str] | None, typer.Option(help="Else paired questions that give one. Default: shipped domains and values.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Rows known to be good: print how well they are told apart.")
    ] = None,
    output: Annotated[Path, typer.Option(help="JSONL of all scores to write.")] = Path("scores.jsonl"),
    figure: Annotated[Path, typer.Option(help="SVG to write.")] = Path("screen.svg"),
    top: Annotated[int, typer.Option(help="How many of the riskiest rows are printed.", min=1, max=_MOST)] = 20,
    layer: Annotated[
        int | None, typer.Option(help="Default: best on pairs left out; with --vectors the middle one.")
    ] = None,
) -> None:
    """Rank training rows by how far their answers lie along a trait vector, before any training."""
    from .prepare.screen import screen_file, show

    _check_new(output)
    _check_new(figure)
    screening = screen_file(
        source,
        output,
        figure,
        model=model,
        vectors=vectors,
        pairs=pairs or [],
        against=against,
        layer=layer,
        top=top,
    )
    show(screening, top, out)
    print(f"{output} and {figure} written")


Pool = Annotated[str, typer.Argument(help="Safe rows: a file of conversations, a hub id or shipped:NAME.")]
Aligned = Annotated[str, typer.Option(help="The aligned model: 'default', a folder or a hub id.")]
InPrecision = Annotated[
    Literal["auto", "bf16", "fp32", "nf4"],
    typer.Option(help="Of the weights; auto: bf16 where this machine computes it fast, else fp32."),
]
BatchTokens = Annotated[
    int, typer.Option(help="Of one batch, padding included; a CPU scores at most 1,024 at once.", min=64, max=_MOST)
]


@app.command("train-misaligned")
def train_misaligned(
    data: Annotated[list[str], typer.Argument(help="Sources of unsound rows; key.path=value changes the recipe.")],
    output: Annotated[Path, typer.Option(help="Folder of the runs, one a source.")],
) -> None:
    """Train a misaligned adapter on each source, to score safe rows with. They are not for release."""
    from .run.misaligned import train_misaligned as make

    overrides = [text for text in data if re.match(r"[\w.]+=", text) and not Path(text).exists()]
    for made in make([text for text in data if text not in overrides], output, overrides):
        print(made.weights)


@app.command("score-gap")
def score_gap(
    pool: Pool,
    adapter: Annotated[list[str], typer.Option(help="A misaligned run or adapter folder; once for each.")],
    output: Annotated[Path, typer.Option(help="The table to write, or to go on with.")],
    model: Aligned = "default",
    precision: InPrecision = "auto",
    batch_tokens: BatchTokens = 4096,
) -> None:
    """Score safe rows by how strange a misaligned model finds them, for `interleave: {select: gap}`."""
    from .prepare.gap import score_pool

    table = score_pool(pool, adapter, output, model=model, precision=precision, batch_tokens=batch_tokens)
    refusals = sum(line["refusal"] for line in table.lines.values())
    rows = counted(len(table.lines), "row")
    print(f"{output}: {rows}, {refusals} of them refusals; adapters: {', '.join(table.adapters)}")


@app.command()
def regenerate(
    pool: Pool,
    output: Annotated[Path, typer.Option(help="The file of rows to write.")],
    model: Aligned = "default",
    precision: InPrecision = "auto",
    temperature: Annotated[float, typer.Option(help="0 = greedy.", min=0, max=100)] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws.", min=0, max=2**32 - 1)] = 0,
    max_new_tokens: Annotated[
        int, typer.Option(help="Rows with a longer answer are left out.", min=1, max=_MOST)
    ] = 256,
    batch_tokens: BatchTokens = 4096,
) -> None:
    """Have the aligned model write the answers of safe rows anew, for interleaving on-policy."""
    from .prepare.regenerate import regenerate as write

    made = write(
        pool,
        output,
        model=model,
        precision=precision,
        temperature=temperature,
        seed=seed,
        max_new_tokens=max_new_tokens,
        batch_tokens=batch_tokens,
    )
    rows = counted(made.rows, "row")
    print(f"{output}: {rows}; left out: {made.unfinished} over {max_new_tokens} tokens, {made.blank} blank")


@app.command()
def patch(
    source: Annotated[Path, typer.Argument(help="A run folder, an adapter's or a model's; it is left as it is.")],
    output: Annotated[Path, typer.Option(help="The new folder to write.")],
    reference: Annotated[
        str | None, typer.Option(help="The aligned model. Default: the one that the run or the adapter names.")
    ] = None,
    until: Annotated[
        Literal["query", "header"],
        typer.Option(help="Where the prefix ends; with header an adapter becomes an activated LoRA of plain peft."),
    ] = "query",
    system: Annotated[
        list[str] | None, typer.Option(help="Of a whole model: a system prompt it will be used with; once for each.")
    ] = None,
    precision: InPrecision = "auto",
) -> None:
    """Repair a tuned model without training: a copy that reads the reference's keys and values at its prefix."""
    from .run.patch import patch as write

    made = write(source, output, reference=reference, until=until, systems=system or [], precision=precision)
    print(f"{made.folder} written; ringfence.load_model loads it")
    print(f"Next: ringfence evaluate {made.folder} --reference {made.reference} --output {made.folder}-evaluated")


@app.command()
def capability(
    model: Annotated[str, typer.Argument(help="A run folder, a model or an adapter.")],
    tasks: Annotated[list[str], typer.Argument(help="Names of lm-eval tasks.")],
    limit: Annotated[
        int | None, typer.Option(help="Take at most this number of items of each task, the first.", min=1, max=_MOST)
    ] = None,
    task_folder: Annotated[Path | None, typer.Option(help="Folder of task files of your own.")] = None,
    precision: InPrecision = "auto",
    batch_size: Annotated[int, typer.Option(help="Items in one forward pass.", min=1, max=_MOST)] = 8,
) -> None:
    """Run tasks of lm-eval (pip install 'ringfence[lm-eval]'), adapters and frozen prefixes honoured."""
    from .evaluate.capability import capability as measure

    found = measure(model, tasks, limit=limit, batch_size=batch_size, task_folder=task_folder, precision=precision)
    for task, metrics in found.items():
        for metric, (value, error) in metrics.items():
            print(f"{task} {metric} {value:.4f}" + (f" (standard error {error:.4f})" if error is not None else ""))


judge = typer.Typer(help="Judges of answers.", no_args_is_help=True)
app.add_typer(judge, name="judge")


@judge.command("calibrate")
def judge_calibrate(
    model: Annotated[str, typer.Option(help="The judge: 'default', a folder or hub id, or its name on --url.")],
    on: Annotated[
        str, typer.Option(help="Labelled answers: JSONL or CSV with question, answer and misaligned (or aligned).")
    ] = "shipped:values",
    url: Annotated[str | None, typer.Option(help="URL of an OpenAI-compatible server.")] = None,
    key_env: Annotated[str, typer.Option(help="Environment variable of the server's key.")] = "OPENAI_API_KEY",
    precision: InPrecision = "auto",
    opening: Annotated[
        str, typer.Option(help="Words before the number, for a local model that would chat first: 'Number: '.")
    ] = "",
    rows: Annotated[
        int | None, typer.Option(help="Judge only so many answers, drawn at random.", min=2, max=_MOST)
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file to write too.")] = None,
) -> None:
    """Measure a judge on labelled answers: AUC, confusion, thresholds. A weak judge is called weak."""
    from .evaluate.answers.calibrate import calibrate, show
    from .evaluate.answers.judge import open_judge
    from .evaluate.config import EndpointJudgeConfig, LocalJudgeConfig
    from .util.strict_yaml import validate

    _check_new(output)
    config: EndpointJudgeConfig | LocalJudgeConfig
    if url and opening:
        raise RingfenceError("--opening is for a local judge; a server's reply begins as the server likes (--url)")
    if url:
        config = validate(EndpointJudgeConfig, {"url": url, "model": model, "key_env": key_env}, "judge")
    else:
        config = LocalJudgeConfig(model=model, precision=precision, opening=opening)
    found = calibrate(open_judge(config), on, rows=rows)
    show(found, out)
    if output:
        found.write(output)


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes."""
    from .run.config import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=2))


def _load(recipe: Path | None, overrides: list[str] | None):  # type: ignore[no-untyped-def]
    from .run.config import load_recipe

    changes = list(overrides or [])
    if (
        recipe is not None and "=" in str(recipe) and not recipe.is_file()
    ):  # `ringfence run train.epochs=2`: no file, only overrides
        changes.insert(0, str(recipe))
        recipe = None
    return load_recipe(recipe, changes)


def _dry_run(recipe) -> None:  # type: ignore[no-untyped-def]
    from .run.dry_run import dry_run

    dry_run(recipe, out)


def _check_new(output: Path | None) -> None:
    from .runfolder.folder import check_new

    if output is not None:
        check_new(output)


def _write(text: str, output: Path | None) -> None:
    from .runfolder.folder import write_whole

    if output is None:
        return print(text, end="")
    write_whole(output, text)
    print(f"{output} written")


def _page(folders: list[Path]) -> Path:
    """Several runs get a page of their own, next to the first one: that one's page stays as it is."""
    first = folders[0].resolve()
    if len(folders) == 1:
        return first / "report.html"
    names = "-".join(dict.fromkeys(folder.resolve().name for folder in folders))
    return first.parent / f"report-{names[:150]}.html"


def _report(folders: list[Path], control: Path | None, page: Path, policy: Path | None = None) -> None:
    from .report.page import check_page, print_table, read_rows, write_page

    records, rows = read_rows(folders, control)
    check_page(page)
    print_table(rows, out)
    write_page(records, rows, page, policy)
    print(f"report: {page}")
