"""Measure perplexity, divergence from a float model, size and speed."""

from __future__ import annotations

import argparse

from .command import Result, add_loading, load_model

NAME = "eval"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder or Hub name of the model to measure")
    parser.add_argument("--text", metavar="FILE", required=True, help=".txt or .jsonl file to read")
    parser.add_argument("--reference", metavar="MODEL", help="float model to compare with")
    parser.add_argument("--tokenizer", metavar="MODEL", help="default: the model's own")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens per window (default: 512)")
    parser.add_argument("--max-tokens", type=int, help="read no more than this many tokens")
    parser.add_argument("--batch-size", type=int, default=1, help="windows at a time (default: 1)")
    parser.add_argument("--no-speed", action="store_true", help="do not measure tokens per second")
    add_loading(parser)


def run(args: argparse.Namespace) -> Result:
    from ..evaluation import evaluate

    model = load_model(args.model, args)
    evaluation = evaluate(
        model,
        None if args.reference is None else load_model(args.reference, args),
        dataset=args.text,
        tokenizer=args.tokenizer,
        seqlen=args.seqlen,
        max_tokens=args.max_tokens,
        batch_size=args.batch_size,
        speed=not args.no_speed,
    )
    names = {"model": args.model, "reference_model": args.reference, "text": args.text}
    return Result(data={**names, **evaluation.to_dict()}, text=evaluation.table())
