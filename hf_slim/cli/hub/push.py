"""hf-slim push: uploads a model to the Hugging Face Hub."""

import argparse
from pathlib import Path
from typing import Any

HELP = """\
Uploads a finished model to the Hugging Face Hub, with its card and its report, as one commit. Training checkpoints,
optimizer states and pickles are not sent. Log in once with `hf auth login`, or set HF_TOKEN.

  hf-slim push runs/quickstart me/small
  hf-slim push runs/quickstart me/small --private --revision int8
"""


def add(commands: argparse._SubParsersAction, style: dict[str, Any]) -> None:
    """Adds the verb to the command line."""
    parser = commands.add_parser("push", help="upload a model to the Hub", description=HELP, **style)
    parser.add_argument("folder", type=Path, help="a folder that `hf-slim train` or `save_pretrained` has written")
    parser.add_argument("repository", help="user/name; made if it is not there")
    parser.add_argument("--private", action="store_true", help="only you and your organization can see it")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to push to; made if it is not there")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Prints what was sent, and where it is."""
    from hf_slim.workflows.hub.push import push

    pushed = push(options.folder, options.repository, options.private, options.revision)
    print(f"Sent: {', '.join(pushed.files)}")
    if pushed.left_out:
        print(f"Left out: {', '.join(pushed.left_out)}")
    print(f"\n{pushed.url}")
