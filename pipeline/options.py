"""The command line's arguments and options: name, type and help of each, shared by the commands that take it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Recipes = Annotated[list[Path], typer.Argument(help="Recipe files, such as models/smollm2-135m.toml.")]
Artifacts = Annotated[
    list[str], typer.Argument(help="Artifact folders, ids, or MODEL:VARIANT such as smollm2-135m:Q4_K_M.")
]
On = Annotated[
    list[str],
    typer.Option(
        "--on",
        help="Device to run on (repeatable): `local` (this machine), `emulated` (a Pi in QEMU), or what ssh takes: "
        "[user@]host or an alias.",
    ),
]
OneOn = Annotated[
    str, typer.Option("--on", help="Device to run on: `local` (this machine), `emulated`, [user@]host or an alias.")
]
SshConfig = Annotated[Path | None, typer.Option(help="An ssh configuration file instead of your own (ssh -F).")]
Threads = Annotated[
    int, typer.Option(min=0, help="Inference threads; 0 = all cores of a board, half of this machine's, 1 if emulated.")
]
BuildThreads = Annotated[int, typer.Option(min=0, help="Inference threads; 0 = half of this machine's cores.")]
Timeout = Annotated[int, typer.Option("--timeout", min=1, help="Seconds after which a task is given up.")]
MemoryLimit = Annotated[
    int, typer.Option("--memory-limit-mib", min=0, help="Private memory a task may take, in MiB; 0 = no limit.")
]
WaitCool = Annotated[
    float | None, typer.Option(help="Before each timed task wait until the CPU is below this temperature, in Celsius.")
]
Governor = Annotated[str, typer.Option(help="Clock governor during the run, such as `performance`; needs --sudo.")]
Sudo = Annotated[bool, typer.Option("--sudo", help="Let --governor use sudo on the device, without a password.")]
Force = Annotated[bool, typer.Option("--force", help="Run although the predicted memory does not fit the device.")]
Meter = Annotated[
    str,
    typer.Option(
        help="Power readings of the one device: a .csv (time_unix_s,watts; the device's clock), or a command that is "
        "run here once a second and prints watts."
    ),
]
Plain = Annotated[bool, typer.Option("--plain", help="Plain lines instead of progress bars.")]
Only = Annotated[
    list[str] | None,
    typer.Option(
        help="Build only this variant (repeatable), in the recipe or not, such as Q4_K_M or GPTQ-Q4_K (METHOD-PLAN); "
        "the reference always is. PRUNER-PERCENT- before it prunes first: of a language model a percentage of its "
        "blocks' weights (WIDTHS-20-Q4_K_M), of an encoder one of its own layers, heads or channels (LAYERS-33-FP32)."
    ),
]
OneArtifact = Annotated[
    str, typer.Argument(help="Artifact folder, id, or MODEL:VARIANT such as minilm-l6-tweets:FP32.")
]
DeviceName = Annotated[str, typer.Argument(help="The device: what --on takes, but not `local`.")]
Again = Annotated[bool, typer.Option("--again", help="Measure again instead of replaying an equal job's samples.")]
TaskNames = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        help="Run only this task (repeatable): parity, throughput, perplexity, choices, divergence, tweets; or "
        "profile, which times products of every format in the model's shapes, for plans that keep a budget of time.",
    ),
]
WithDivergence = Annotated[
    bool,
    typer.Option(
        "--divergence",
        help="Also measure the KL divergence to the reference of each language model, recorded on this machine first "
        "(2 bytes a scored token and vocabulary entry).",
    ),
]
Text = Annotated[
    str | None, typer.Option(help="Text for perplexity: demo:NAME, data:PATH, path:FILE, hf:... or a known name.")
]
ChoiceSets = Annotated[
    list[str] | None,
    typer.Option(
        "--choices",
        help="Questions for zero-shot multiple choice (repeatable): arc_easy, arc_challenge, openbookqa, hellaswag, "
        "hellaswag_1000 (a sample), winogrande, boolq, or a file of questions named like --text.",
    ),
]
Rows = Annotated[str | None, typer.Option(help="Labelled rows (CSV) for tweets, named like --text.")]
TextColumn = Annotated[str | None, typer.Option(help="Column of --rows that holds the text.")]
LabelColumn = Annotated[str | None, typer.Option(help="Column of --rows that holds the label.")]
KeywordColumn = Annotated[
    str | None, typer.Option(help="Column of --rows that holds a keyword, for classifiers that read one.")
]
NCtx = Annotated[int | None, typer.Option(help="Context length of the perplexity task, in tokens.")]
NChunks = Annotated[int | None, typer.Option(help="Chunks of n_ctx tokens to score; 0 = all.")]
NPrompt = Annotated[int | None, typer.Option(help="Tokens of prefill in the throughput task.")]
NGen = Annotated[int | None, typer.Option(help="Tokens of decode in the throughput task.")]
Repetitions = Annotated[int | None, typer.Option(help="Repetitions of the throughput task.")]
Limit = Annotated[int | None, typer.Option(help="Rows of the tweets task, or questions of each set, to run; 0 = all.")]

TweetTable = Annotated[
    str,
    typer.Argument(
        metavar="TABLE",
        help="Tweets: a .csv, .tsv or .parquet file, data:PATH, hf:ORG/NAME/FILE, tweets-train or tweets-test.",
    ),
]
TweetId = Annotated[str, typer.Option("--id-column", help="Column of the ids.")]
TweetKeyword = Annotated[str, typer.Option("--keyword-column", help="Column of the keywords.")]
TweetLocation = Annotated[str, typer.Option("--location-column", help="Column of the locations.")]
TweetText = Annotated[str, typer.Option("--text-column", help="Column of the texts, the only one that must be there.")]
TweetTarget = Annotated[str, typer.Option("--target-column", help="Column of the labels, 0 and 1 (disaster).")]
ExplorePage = Annotated[Path, typer.Option("--out", help="The page to write.")]
Submission = Annotated[Path, typer.Option("--submission", help="The CSV file to write.")]
