"""Upload a saved model to the Hub, as one commit with its model card."""

from __future__ import annotations

import argparse

from .command import Result, quiet_libraries

NAME = "push"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="folder of a quantized model")
    parser.add_argument("repo", metavar="REPO", help="repository, organization/name")
    parser.add_argument(
        "--private", action="store_true", default=None, help="make a new repository private"
    )


def run(args: argparse.Namespace) -> Result:
    from ..integrations.hub import push_to_hub

    quiet_libraries()
    commit = push_to_hub(args.path, args.repo, private=args.private)
    return Result(
        data={"repo": args.repo, "commit": commit.oid, "url": commit.commit_url},
        text=f"pushed to {args.repo}: {commit.commit_url}",
    )
