# SPDX-License-Identifier: Apache-2.0
"""The command line, `mesanet`.

Standard output carries the answer and nothing else; messages go to standard error. Exit codes: 0 done, 1 a mistake
that one sentence explains (or, from `doctor` and `check`, something broken), 2 wrong usage, 130 interrupted, 141 the
reader of standard output went away.
"""

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer, set_seed
from transformers.utils import logging as transformers_logging

from .loading import CheckpointError, find_checkpoint, load_checkpoint, load_tokenizer
from .mesa import BackendError

DEFAULT_PROMPT = "It was a dark night"

_INTERRUPTED = 130  # 128 + SIGINT
_BROKEN_PIPE = 141  # 128 + SIGPIPE

# Tracebacks are plain: typer's decorated ones print local variables, prompts among them.
app = typer.Typer(
    help="Generate text with MesaNet, and look at its checkpoints and its installation.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    auto = "auto"


class UserError(Exception):
    """A mistake of the user's, explained in one sentence."""


@contextmanager
def _exit_codes(context: typer.Context) -> Iterator[None]:
    """Turn what may happen to a command into one sentence on standard error and an exit code."""
    try:
        yield
        sys.stdout.flush()
    except (UserError, CheckpointError, BackendError) as error:
        if context.obj["debug"]:
            raise
        typer.echo(f"mesanet: error: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo(err=True)  # ends the line of the interrupted text in a terminal
        raise typer.Exit(_INTERRUPTED) from None
    except BrokenPipeError:
        # Python flushes standard output once more at exit, and would report the same error again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(_BROKEN_PIPE) from None


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"mesanet {version('modeling-mesanet')}")
        raise typer.Exit


@app.callback()
def _common(
    context: typer.Context,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="MESANET_DEBUG", help="Show tracebacks and transformers' messages.")
    ] = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    context.obj = {"debug": debug}
    if not debug:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()


# Logits over a temperature below this are no float32 numbers any more.
_LOWEST_TEMPERATURE = 1e-4


def _temperature(value: float) -> float:
    if 0 < _finite(value) < _LOWEST_TEMPERATURE:
        raise typer.BadParameter(f"{value} is too small; give 0 for the likeliest token, or {_LOWEST_TEMPERATURE} up.")
    return value


def _finite(value: float) -> float:
    # The ranges of options let NaN through, since it compares false with everything.
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


@app.command()
def generate(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Folder of a checkpoint, or Hub id.", show_default="the bundled checkpoint"
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Text to continue.", show_default=DEFAULT_PROMPT)
    ] = None,
    prompt_file: Annotated[
        str | None,
        typer.Option(
            "--prompt-file",
            "-f",
            help="File with the text to continue (UTF-8; one newline at its end is dropped), - for standard input.",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 200,
    temperature: Annotated[
        float, typer.Option(min=0.0, callback=_temperature, help="Sampling temperature; 0 takes the likeliest token.")
    ] = 0.8,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, callback=_finite, help="Sample from this much probability mass.")
    ] = 0.95,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from this many tokens at most; 0 is no limit.")] = 0,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=2**32 - 1, help="Seed of the sampling.", show_default="another at every run"),
    ] = None,
    stream: Annotated[bool, typer.Option(help="Print words as they come, or the whole text at the end.")] = True,
    echo: Annotated[bool, typer.Option(help="Print the prompt before its continuation.")] = True,
    device: Annotated[str, typer.Option(help="Device to run on, such as cpu, cuda, cuda:1 or mps.")] = "cpu",
    dtype: Annotated[Dtype, typer.Option(help="Precision of the weights; auto is the checkpoint's.")] = Dtype.float32,
) -> None:
    """Continue a text, on standard output."""
    if prompt is not None and prompt_file is not None:
        raise typer.BadParameter("give one of --prompt and --prompt-file, not both.", param_hint="--prompt-file")
    with _exit_codes(context):
        text = _read_prompt(prompt, prompt_file)
        where = _check_device(device)
        folder = find_checkpoint(model, argument="--model")
        tokenizer = load_tokenizer(folder, argument="--model")
        network = load_checkpoint(folder, dtype=dtype.value, device=where, argument="--model")
        if seed is not None:
            set_seed(seed)
        options = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
        if temperature > 0:
            options |= {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        # A name in the terminal's encoding that it lacks must not end the text.
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")
        _write_continuation(network, tokenizer, text, options, stream=stream, echo=echo)


def _read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    if prompt_file is None:
        source, text = "--prompt", DEFAULT_PROMPT if prompt is None else prompt
    else:
        source = f"--prompt-file '{prompt_file}'"
        try:
            data = sys.stdin.buffer.read() if prompt_file == "-" else Path(prompt_file).read_bytes()
            text = data.decode("utf-8").removesuffix("\n").removesuffix("\r")
        except FileNotFoundError as error:
            raise UserError(
                f"{source} does not exist; give the path of a text file, or - for standard input."
            ) from error
        except UnicodeDecodeError as error:
            raise UserError(f"{source} is not UTF-8 text ({error.reason}); convert it to UTF-8.") from error
        except OSError as error:
            raise UserError(f"{source} cannot be read ({error.strerror}); give the path of a text file.") from error
    if not text.strip():
        raise UserError(f"{source} holds no text; give at least one word to continue.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # bytes of an argument that are no UTF-8 come as lone surrogates
        raise UserError(f"{source} is not UTF-8 text; convert it to UTF-8.") from error
    return text


def _check_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    # torch reports an unknown name, a missing driver and an index out of range as RuntimeError, a torch built without
    # the device as AssertionError.
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device is '{name}', which this machine or this build of torch does not have; use --device cpu, or see "
            "`mesanet doctor` for the devices found."
        ) from error
    if device.type == "meta":
        raise UserError("--device is 'meta', which computes nothing; use --device cpu.")
    return device


def _write_continuation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    options: dict,
    *,
    stream: bool,
    echo: bool,
) -> None:
    inputs = tokenizer(text, return_tensors="pt").to(model.device)
    length = inputs["input_ids"].shape[1]
    if length == 0:
        raise UserError("--prompt holds nothing that the tokenizer knows; give other text.")
    streamer = TextStreamer(tokenizer, skip_prompt=not echo, skip_special_tokens=True) if stream else None
    ids = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        generation_config=_generation_config(model, options),
        streamer=streamer,
    )
    if streamer is None:
        print(tokenizer.decode(ids[0, 0 if echo else length :], skip_special_tokens=True))


def _generation_config(model: PreTrainedModel, options: dict) -> GenerationConfig:
    """The options given, and of the checkpoint's own settings only its special tokens.

    What the help states as default is what runs, whatever sampling a checkpoint recommends.
    """
    own = model.generation_config
    pad = own.pad_token_id
    if pad is None:
        pad = own.eos_token_id[0] if isinstance(own.eos_token_id, list) else own.eos_token_id
    return GenerationConfig(bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=pad, **options)


@app.command()
def doctor(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check the installation: versions, devices, backends, and a self-test; exit code 1 where something is broken."""
    from .doctor import diagnose

    with _exit_codes(context):
        report = diagnose()
        if as_json:
            typer.echo(json.dumps(report, indent=2))
        else:
            _print_diagnosis(report)
    if not report["ok"]:
        raise typer.Exit(1)


def _print_diagnosis(report: dict) -> None:
    console = _console()
    versions = _table("versions")
    for name, number in report["versions"].items():
        versions.add_row(name, number or "not installed")
    console.print(versions)
    for entry in report["devices"]:
        test = entry["self_test"]
        device = _table(f"device {entry['device']}")
        device.add_row("name", entry["name"])
        device.add_row("backend", f"{entry['backend']}: {entry['reason']}")
        verdict = "ok" if test["ok"] else "FAILED"
        device.add_row("self-test", f"{verdict}, float32 against the float64 oracle, at most {test['tolerance']:.0e}")
        for quantity, error in test["errors"].items():
            device.add_row(f"  {quantity}", f"{error:.1e}")
        if test["failure"]:
            device.add_row("  failure", test["failure"])
        console.print(device)
    checkpoint = _table("bundled checkpoint")
    if checkpoint_path := report["checkpoint"]["path"]:
        checkpoint.add_row("path", checkpoint_path)
        checkpoint.add_row("parameters", f"{report['checkpoint']['parameters']:,}")
    checkpoint.add_row("loads", "ok" if report["checkpoint"]["ok"] else f"FAILED: {report['checkpoint']['failure']}")
    console.print(checkpoint)
    console.print("everything works" if report["ok"] else "something is broken, see FAILED above")


@app.command()
def info(
    context: typer.Context,
    path: Annotated[
        str | None,
        typer.Argument(help="Folder of a checkpoint, or Hub id.", show_default="the bundled checkpoint"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Describe a checkpoint without loading its weights: parameters, state bytes per sequence, layers, solver."""
    from .info import describe

    with _exit_codes(context):
        report = describe(path, argument="PATH")
        if as_json:
            typer.echo(json.dumps(report, indent=2))
        else:
            _print_description(report)


def _print_description(report: dict) -> None:
    console = _console()
    about = _table(report["architecture"])
    about.add_row("path", report["path"])
    parameters = report["parameters"]
    about.add_row("parameters", f"{parameters['total']:,} ({', '.join(parameters['by_dtype'])})")
    for part, count in parameters["by_part"].items():
        about.add_row(f"  {part}", f"{count:,}")
    layers = dict(report["layers"])
    total = layers.pop("total")
    about.add_row("layers", f"{total} ({', '.join(f'{count} {kind}' for kind, count in layers.items())})")
    about.add_row("state", f"{report['state_bytes']:,} bytes a sequence, whatever its length (float32)")
    for title in ("solver", "model"):
        for name, value in report[title].items():
            about.add_row(f"{title} {name.replace('_', ' ')}", "off" if value is None else str(value))
    console.print(about)


@app.command()
def check(
    context: typer.Context,
    path: Annotated[
        str | None,
        typer.Argument(help="Folder of a checkpoint, or Hub id.", show_default="the bundled checkpoint"),
    ] = None,
    device: Annotated[str, typer.Option(help="Device to run on, such as cpu, cuda, cuda:1 or mps.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Prove that batches, pads, packing, caches and backends change no result of a checkpoint; else exit code 1."""
    from .check import check as run_checks

    with _exit_codes(context):
        report = run_checks(path, _check_device(device), argument="PATH")
        if as_json:
            typer.echo(json.dumps(report, indent=2))
        else:
            _print_checks(report)
    if report["verdict"] == "fail":
        raise typer.Exit(1)


def _print_checks(report: dict) -> None:
    console = _console()
    table = _table(f"{report['path']} on {report['device']}, {report['backend']}, {report['dtype']}")
    table.show_header = True
    for title in ("error", "at most", ""):
        table.add_column(title, no_wrap=True)
    table.columns[0].header, table.columns[1].header = "check", "result"
    for entry in report["checks"]:
        numbers = ("" if number is None else f"{number:.1e}" for number in (entry["error"], entry["bound"]))
        table.add_row(entry["name"], entry["status"].upper(), *numbers, entry["reason"] or "")
    console.print(table)
    console.print(f"verdict: {report['verdict']}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    path: Annotated[str, typer.Argument(help="Folder of a checkpoint, or Hub id; goes before the options.")],
) -> None:
    """Serve a checkpoint over HTTP with transformers' server, which takes all options that follow PATH."""
    from .serving import ServingError
    from .serving import serve as run_server

    with _exit_codes(context):
        try:
            run_server(find_checkpoint(path, argument="PATH"), context.args)
        except ServingError as error:
            raise UserError(str(error)) from error


def _console() -> Console:
    # Without a terminal rich assumes 80 columns and would break paths in two.
    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 10_000)


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="mesanet")


if __name__ == "__main__":
    main()
