"""The verbs put together, and what each way of ending returns to the shell.

0    done                        2    the user's input is wrong: one message, no traceback
75   stopped after saving        130  interrupted by Ctrl-C
1    anything else, with its traceback
"""

import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from megascratch import __version__
from megascratch.cli import (
    align,
    config,
    convert,
    evaluate,
    generate,
    inspect,
    launch,
    merge,
    plan,
    preflight,
    preprocess,
    pretrain,
    tokenizer,
)
from megascratch.errors import MegascratchError


def _print_version(asked: bool) -> None:
    if asked:
        print(f"megascratch {__version__}")
        raise typer.Exit


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a traceback is for whoever mends it: plain, with nothing left out
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train language models in three dimensions, from raw text to generation.",
)


@app.callback()
def _megascratch(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Without a verb: the options of the command itself."""


app.add_typer(tokenizer.app, name="tokenizer")
app.command("preprocess")(preprocess.preprocess)
app.command("merge")(merge.merge)
app.command("pretrain")(pretrain.pretrain)
app.command("sft")(align.sft)
app.command("reward")(align.reward)
app.command("dpo")(align.dpo)
app.command("ppo")(align.ppo)
app.command("grpo")(align.grpo)
app.command("convert")(convert.convert)
app.command("generate")(generate.generate)
app.command("eval")(evaluate.evaluate)
app.command("inspect")(inspect.inspect)
app.command("plan")(plan.plan)
app.command("config")(config.config)
app.command("launch")(launch.launch)
app.command("preflight")(preflight.preflight)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a verb and leave the process.

    Args:
        arguments: without the program's name; those of the process when None.

    Raises: SystemExit: always, with the exit code.
    """
    try:
        app(arguments, prog_name="megascratch")
    except MegascratchError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    raise AssertionError("typer leaves the process by itself")
