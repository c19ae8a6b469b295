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
from typing import Annotated, TextIO

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from .loading import CheckpointError, find_checkpoint, int8_weights, load_checkpoint, load_tokenizer
from .mesa import BackendError
from .state_mesanet import StateError, continue_from, load_state, save_state

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


# Options that several commands have.
ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Folder of a checkpoint, or Hub id.", show_default="the bundled checkpoint"),
]
DeviceOption = Annotated[str, typer.Option(help="Device to run on, such as cpu, cuda, cuda:1 or mps.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Precision of the weights; auto is the checkpoint's.")]
DataOption = Annotated[
    str | None,
    typer.Option(
        "--data-dir", help="Folder with local data.", show_default="MESANET_DATA, or else data sets from the Hub"
    ),
]
SkipMissingOption = Annotated[
    bool, typer.Option("--skip-missing", help="Leave out tasks that the data folder has no file for.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
TextsArgument = Annotated[
    list[Path], typer.Argument(help="Documents: .txt, or .jsonl or .jsonl.gz with a field 'text' a line.")
]
ResultsOption = Annotated[Path, typer.Option("--output", "-o", help="Folder for the results; new or empty.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run in --output.")]
PlotOption = Annotated[bool, typer.Option(help="Draw the figures, too.")]


class UserError(Exception):
    """A mistake of the user's, explained in one sentence."""


@contextmanager
def _exit_codes(context: typer.Context) -> Iterator[None]:
    """Turn what may happen to a command into one sentence on standard error and an exit code."""
    try:
        yield
        sys.stdout.flush()
    except (UserError, CheckpointError, StateError, BackendError) as error:
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
    model: ModelOption = None,
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
    state: Annotated[
        Path | None,
        typer.Option(
            help="File written by `mesanet prefill`, to go on from; the text to continue then follows what was read "
            "there, and is a new line where none is given."
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
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype.float32,
    int8: Annotated[bool, typer.Option("--int8", help="Keep most weights in eight bits, by torchao.")] = False,
) -> None:
    """Continue a text, on standard output."""
    if prompt is not None and prompt_file is not None:
        raise typer.BadParameter("give one of --prompt and --prompt-file, not both.", param_hint="--prompt-file")
    with _exit_codes(context):
        text = "\n" if state and prompt is None and prompt_file is None else _read_prompt(prompt, prompt_file)
        where = _check_device(device)
        folder = find_checkpoint(model, argument="--model")
        tokenizer = load_tokenizer(folder, argument="--model")
        try:
            quantization = int8_weights() if int8 else None
        except ImportError as error:
            raise typer.BadParameter(str(error), param_hint="--int8") from error
        network = load_checkpoint(
            folder, dtype=dtype.value, device=where, quantization_config=quantization, argument="--model"
        )
        if seed is not None:
            set_seed(seed)
        options = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
        if temperature > 0:
            options |= {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        # A name in the terminal's encoding that it lacks must not end the text.
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")
        if state is None:
            inputs = tokenizer(text, return_tensors="pt").to(network.device)
            inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        else:
            cache = load_state(state, model=network, tokenizer=tokenizer, argument="--state")
            inputs = continue_from(cache, tokenizer, text)
        _write_continuation(network, tokenizer, inputs, options, stream=stream, echo=echo)


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
    inputs: dict,
    options: dict,
    *,
    stream: bool,
    echo: bool,
) -> None:
    length = inputs["input_ids"].shape[1]
    if length == 0:
        raise UserError("--prompt holds nothing that the tokenizer knows; give other text.")
    streamer = TextStreamer(tokenizer, skip_prompt=not echo, skip_special_tokens=True) if stream else None
    ids = model.generate(
        **inputs,
        generation_config=_generation_config(model, options),
        streamer=streamer,
        logits_processor=LogitsProcessorList([RefuseNaN()]),
    )
    if streamer is None:
        print(tokenizer.decode(ids[0, 0 if echo else length :], skip_special_tokens=True))


class RefuseNaN(LogitsProcessor):
    """Ends the writing where a model's logits are no numbers: whatever it chose then would mean nothing."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if not scores.amax(dim=-1).isfinite().all():  # a maximum is NaN where any score is
            raise UserError("the model's logits are not numbers (NaN); `mesanet check` with its path says more.")
        return scores


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
    as_json: JsonOption = False,
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
    as_json: JsonOption = False,
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


class SourceFormat(StrEnum):
    fla = "fla"
    llama = "llama"
    mistral = "mistral"
    qwen = "qwen"


class TargetFormat(StrEnum):
    mesanet = "mesanet"
    fla = "fla"


@app.command()
def convert(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="Folder of a checkpoint, or Hub id.")],
    destination: Annotated[Path, typer.Argument(help="Folder to make; must not exist yet.")],
    source_format: Annotated[
        SourceFormat | None,
        typer.Option(
            "--from",
            help="What SOURCE is: a MesaNet of flash-linear-attention, or a softmax transformer to initialise from.",
            show_default="fla",
        ),
    ] = None,
    target_format: Annotated[
        TargetFormat, typer.Option("--to", help="fla: convert a MesaNet of this package to flash-linear-attention's.")
    ] = TargetFormat.mesanet,
    max_shard_size: Annotated[str, typer.Option(help="Largest file of weights, such as 5GB or 200MB.")] = "5GB",
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read .bin files; only from a source that you trust.")
    ] = False,
    compare: Annotated[
        bool, typer.Option(help="Compare logits too, where flash-linear-attention is installed and finds a GPU.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Convert a checkpoint from or to flash-linear-attention, or initialise one from a softmax transformer.

    Run again after an interruption, the same command goes on where it stopped.
    """
    if target_format is TargetFormat.fla and source_format is not None:
        raise typer.BadParameter("give one of --from and --to fla, not both.", param_hint="--from")
    from .conversion import convert_from_fla, convert_to_fla, initialize_from_transformer

    options = {
        "max_shard_size": max_shard_size,
        "allow_pickle": allow_pickle,
        "progress": sys.stderr.isatty(),
    }
    with _exit_codes(context):
        if target_format is TargetFormat.fla:
            report = convert_to_fla(source, destination, compare=compare, **options)
        elif source_format in (None, SourceFormat.fla):
            report = convert_from_fla(source, destination, compare=compare, **options)
        else:
            report = initialize_from_transformer(source, destination, family=source_format.value, **options)
        if as_json:
            typer.echo(json.dumps(report.as_json(), indent=2))
        else:
            _print_conversion(report)


def _print_conversion(report) -> None:
    console, about = _console(), _table("converted")
    about.add_row("folder", report.destination)
    files = f"{len(report.shards)} file{'s' * (len(report.shards) > 1)}"
    about.add_row("weights", f"{report.tensors} tensors, {report.bytes:,} bytes in {files}")
    if report.resumed:
        about.add_row("resumed", f"{report.resumed} of these files were complete from an earlier run")
    about.add_row("carried along", ", ".join(report.carried) or "nothing: the source holds no tokenizer")
    if report.left_out:
        about.add_row("left out", f"{len(report.left_out)} tensors: {', '.join(report.left_out[:3])} ...")
    about.add_row("compared", report.compared)
    console.print(about)


@app.command()
def check(
    context: typer.Context,
    path: Annotated[
        str | None,
        typer.Argument(help="Folder of a checkpoint, or Hub id.", show_default="the bundled checkpoint"),
    ] = None,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
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


@app.command()
def export(
    context: typer.Context,
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder of a checkpoint, or Hub id.")],
    destination: Annotated[str, typer.Argument(metavar="DST", help="Folder to write; must not exist, or be empty.")],
    check: Annotated[
        bool, typer.Option(help="Load the folder without this package, and compare the outputs of random tokens.")
    ] = True,
) -> None:
    """Write a checkpoint with its code: it loads with trust_remote_code=True where this package is not installed."""
    from .conversion.export import export as write

    with _exit_codes(context):
        difference = write(source, destination, check=check)
        checked = "not checked" if difference is None else f"relative difference of the outputs {difference:.1e}"
        typer.echo(f"{destination}: complete, {checked}")
        if not (Path(destination).expanduser() / "README.md").is_file():
            typer.echo("It has no card that fits it; `mesanet card` writes one.")


@app.command()
def push(
    context: typer.Context,
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Folder of a checkpoint with tokenizer and card.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="owner/name on the Hub; made if there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the folder and list what would go up.")] = False,
) -> None:
    """Upload a checkpoint to the Hub, after a look at everything that would go up."""
    from huggingface_hub.utils import enable_progress_bars

    from .conversion import push as hub

    with _exit_codes(context):
        hub.check_repo_id(repo_id)
        files = hub.files_to_push(folder)
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(overflow="fold")
        for file in files:
            table.add_row(f"{file.size:,}", file.path)
        table.add_row(f"{sum(file.size for file in files):,}", f"bytes in {len(files)} files, to {repo_id}")
        _console().print(table)
        if dry_run:
            typer.echo("nothing was sent (--dry-run)")
            return
        if sys.stderr.isatty():  # switched off for all commands
            enable_progress_bars()
        typer.echo(hub.push(folder, repo_id, private=private))


@app.command()
def card(
    context: typer.Context,
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Folder of a checkpoint.")],
    about: Annotated[str | None, typer.Option(help="YAML: title, license, summary, data, limits and more.")] = None,
    license_: Annotated[str | None, typer.Option("--license", help="Licence, as the Hub names it.")] = None,
    repo_id: Annotated[
        str | None, typer.Option(help="Where the examples load the model from, such as owner/name.")
    ] = None,
    training: Annotated[str | None, typer.Option(help="training_log.json, or trainer_state.json of Trainer.")] = None,
    evaluation: Annotated[
        list[str] | None,
        typer.Option(
            help="Results of lm-eval, or a folder of `mesanet eval`, `perplexity`, `compute-sweep`; may be repeated."
        ),
    ] = None,
    certificate: Annotated[str | None, typer.Option(help="What `mesanet check --json` wrote.")] = None,
    benchmark: Annotated[
        list[str] | None, typer.Option(help="Results of kernels/benchmarks; may be repeated.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a card that the folder has.")] = False,
) -> None:
    """Write the model card (README.md) of a checkpoint from the files of its training, evaluation and checks."""
    from .conversion import card as cards

    with _exit_codes(context):
        file = find_checkpoint(folder, argument="FOLDER") / cards.CARD
        if file.exists() and not overwrite:
            raise UserError(f"FOLDER is '{folder}', which has a {cards.CARD}; give --overwrite to replace it.")
        text = cards.card_of_folder(
            folder,
            about=about,
            training=training,
            evaluations=evaluation or (),
            certificate=certificate,
            benchmarks=benchmark or (),
            repo_id=repo_id,
            license=license_,
        )
        cards.write_card(text, file)
        typer.echo(file)


@contextmanager
def _evaluation(context: typer.Context) -> Iterator[None]:
    """`_exit_codes` for the commands of `modeling_mesanet.eval`, whose own mistakes become a `UserError`."""
    from .eval.results import UsageError

    with _exit_codes(context):
        try:
            yield
        except UsageError as error:
            raise UserError(str(error)) from error
        # A process that ends as a member of a group may be aborted by the group's own threads, after all its work.
        # Not where an error is on its way: the others may never come to leave the group, and would be waited for.
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@app.command("eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def evaluate(
    context: typer.Context,
    tasks: Annotated[
        str, typer.Option("--tasks", "-t", help="Tasks or groups, ours or lm-eval's, with commas between them.")
    ],
    model: ModelOption = None,
    data_dir: DataOption = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Folder for results and samples; goes on after interruption.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Device to run on, such as cpu or cuda:1.", show_default="a GPU if there is one")
    ] = None,
    dtype: DtypeOption = Dtype.float32,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a sequence at most.", show_default="what the tasks need")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew in a folder with results.")] = False,
    skip_missing: SkipMissingOption = False,
) -> None:
    """Evaluate a model with lm-eval; options not listed here are lm-eval's, such as --limit and --batch_size."""
    from .eval.harness import evaluate

    with _evaluation(context):
        placed = [] if device is None else ["--device", str(_check_device(device))]
        evaluate(
            model,
            tasks,
            data_dir=data_dir,
            output=output,
            dtype=dtype.value,
            max_length=max_length,
            overwrite=overwrite,
            skip_missing=skip_missing,
            options=[*context.args, *placed],
        )


@app.command()
def perplexity(
    context: typer.Context,
    texts: TextsArgument,
    output: ResultsOption,
    model: ModelOption = None,
    reference: Annotated[
        str | None, typer.Option(help="A model with the same tokenizer to compare with, position by position.")
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(help="Context lengths with commas, such as 512,2048,32768.", show_default="whole documents"),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Tokens of each document to score at most.")] = None,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens read at a time.")] = 2048,
    tokens_at_once: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens in one forward pass, over all documents.", show_default="by device"),
    ] = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype.float32,
    resume: ResumeOption = False,
    plot: PlotOption = True,
) -> None:
    """Measure the loss by token position: of whole documents, or in windows of several context lengths."""
    from .eval.perplexity import print_result, run

    with _evaluation(context):
        print_result(
            run(
                texts,
                output=output,
                model=model,
                reference=reference,
                lengths=lengths,
                max_tokens=max_tokens,
                chunk=chunk,
                tokens_at_once=tokens_at_once,
                device=str(_check_device(device)),
                dtype=dtype.value,
                resume=resume,
                plot=plot,
            )
        )


@app.command()
def compute_sweep(
    context: typer.Context,
    texts: TextsArgument,
    output: ResultsOption,
    model: ModelOption = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a window, read with an empty state.")] = 2048,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Tokens of each document to read at most.")] = None,
    steps: Annotated[
        str, typer.Option(help="Fixed numbers of steps, with commas; 0 is no solver.")
    ] = "1,2,3,5,8,15,30",
    tolerances: Annotated[str, typer.Option(help="Tolerances, with commas.")] = "1e-1,1e-2,1e-3,1e-4,1e-5",
    tasks: Annotated[
        str | None, typer.Option(help="Tasks to run with every setting, as for `mesanet eval`, with commas.")
    ] = None,
    data_dir: DataOption = None,
    skip_missing: SkipMissingOption = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples of each task at most.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples of a task at a time.")] = 8,
    chunk: Annotated[
        int, typer.Option(min=2, help="Tokens read at a time; condition numbers are taken at the end of each.")
    ] = 256,
    tokens_at_once: Annotated[
        int | None, typer.Option(min=1, help="Tokens in one forward pass, over all windows.", show_default="by device")
    ] = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype.float32,
    resume: ResumeOption = False,
    plot: PlotOption = True,
) -> None:
    """Measure quality against solver steps, and where a model spends them: layers, heads, positions."""
    from .eval.compute_sweep import print_result, run

    with _evaluation(context):
        print_result(
            run(
                texts,
                output=output,
                model=model,
                length=length,
                max_tokens=max_tokens,
                steps=steps,
                tolerances=tolerances,
                tasks=tasks,
                data_dir=data_dir,
                skip_missing=skip_missing,
                limit=limit,
                batch_size=batch_size,
                chunk=chunk,
                tokens_at_once=tokens_at_once,
                device=str(_check_device(device)),
                dtype=dtype.value,
                resume=resume,
                plot=plot,
            )
        )


@app.command()
def synthetic(
    context: typer.Context,
    tasks: Annotated[
        list[str],
        typer.Argument(
            metavar="TASK...",
            help="mad (six tasks), mqar, regbench, all, or in-context-recall, noisy-recall, fuzzy-recall, "
            "selective-copying, memorization, compression.",
        ),
    ],
    output: ResultsOption,
    layers: Annotated[
        str, typer.Option(help="Layers to compare, with commas; gla is MesaNet with the solver off.")
    ] = "mesanet,gla,attention",
    published: Annotated[
        bool, typer.Option("--published", help="The schedules of the tasks' authors: hours, not minutes.")
    ] = False,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the examples.", show_default="by task")
    ] = None,
    learning_rates: Annotated[
        str | None, typer.Option(help="Learning rates to try, with commas.", show_default="by task")
    ] = None,
    weight_decays: Annotated[
        str | None, typer.Option(help="Weight decays to try, with commas.", show_default="by task")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of examples and weights, with commas.")] = "0",
    jobs: Annotated[int, typer.Option(min=1, help="Trainings at a time, each in a process of its own.")] = 1,
    device: Annotated[str, typer.Option(help="Device to run on, such as cpu, cuda or cuda:1.")] = "cpu",
    mixed_precision: Annotated[str, typer.Option(help="no or bf16.")] = "no",
    time_limit: Annotated[
        float | None,
        typer.Option(
            min=0, help="Seconds after which trainings that are not finished are given up.", show_default="none"
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Add to the finished trainings in --output.")] = False,
    plot: PlotOption = True,
) -> None:
    """Train sequence layers from scratch on synthetic tasks, and compare their accuracy."""
    from .eval.synthetic import benchmark, print_result

    with _evaluation(context):
        print_result(
            benchmark(
                tasks,
                output=output,
                layers=layers,
                published=published,
                epochs=epochs,
                learning_rates=learning_rates,
                weight_decays=weight_decays,
                seeds=seeds,
                jobs=jobs,
                device=str(_check_device(device)),
                mixed_precision=mixed_precision,
                time_limit=time_limit,
                resume=resume,
                plot=plot,
            )
        )


@app.command()
def prefill(
    context: typer.Context,
    file: Annotated[
        str,
        typer.Argument(
            help="Text to read, of any length (UTF-8; one newline at its end is dropped), - for standard input."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="State file to write.")],
    model: ModelOption = None,
    chunk_tokens: Annotated[int, typer.Option(min=1, help="Tokens read at a time; memory grows with it.")] = 2048,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Read a text into a state file, in constant memory; `mesanet generate --state` goes on from it."""
    from .prefill import prefill as read_text

    with _exit_codes(context):
        # Found out now, not after reading a long text.
        if output.is_dir() or not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
            raise UserError(f"--output is '{output}', which is no file in a folder that can be written to; give one.")
        if output.exists() and os.path.exists(file) and output.samefile(file):
            raise UserError(
                f"--output is '{output}', the text itself, which the state would replace; give another file."
            )
        where = _check_device(device)
        folder = find_checkpoint(model, argument="--model")
        tokenizer = load_tokenizer(folder, argument="--model")
        with _open_text(file) as text:
            network = load_checkpoint(folder, dtype=dtype.value, device=where, argument="--model")
            size = os.fstat(text.fileno()).st_size if file != "-" else None
            with _reading_bar() as bar:
                task = bar.add_task("reading", total=size)
                state = read_text(
                    network,
                    tokenizer,
                    text,
                    chunk_tokens=chunk_tokens,
                    progress=lambda piece: bar.update(task, advance=len(piece.encode("utf-8"))),
                )
        if state is None:
            raise UserError(f"FILE '{file}' holds no text; give at least one word.")
        info = save_state(state, output, model=network, tokenizer=tokenizer, argument="--output")
        typer.echo(f"{output}: the state after {info.tokens:,} tokens, {output.stat().st_size:,} bytes", err=True)


@contextmanager
def _open_text(file: str) -> Iterator[TextIO]:
    try:
        # Line ends stay as they are: they are tokens.
        with open(
            sys.stdin.fileno() if file == "-" else file, encoding="utf-8", newline="", closefd=file != "-"
        ) as text:
            yield text
    except FileNotFoundError as error:
        raise UserError(
            f"FILE '{file}' does not exist; give the path of a text file, or - for standard input."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"FILE '{file}' is not UTF-8 text ({error.reason}); convert it to UTF-8.") from error
    except (IsADirectoryError, PermissionError) as error:
        raise UserError(f"FILE '{file}' cannot be read ({error.strerror}); give the path of a text file.") from error


def _reading_bar() -> Progress:
    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(TextColumn("{task.description}"), *columns, console=console, disable=not console.is_terminal)


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="mesanet")


if __name__ == "__main__":
    main()
